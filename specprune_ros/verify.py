"""Compare a loaded model with stored outputs of its reference implementation.

A folder of reference vectors holds `inputs.npz` (images_uint8, input_ids, proprio_raw) and
`outputs.npz`; arrays of the names below are compared, others are passed over.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from specprune_ros.config import RobotConfig
from specprune_ros.errors import ConfigError
from specprune_ros.models.decoder import Probe, QueryDecoder
from specprune_ros.models.openvla_oft import OpenVLAOFT
from specprune_ros.models.prompt import PromptTokens
from specprune_ros.pruning.base import PruneRun, QueryContext
from specprune_ros.robot_action import to_robot
from specprune_ros.token_layout import Span, TokenLayout

TOLERANCE, ATTENTION_TOLERANCE = 1e-4, 1e-3  # attention is stored as float16
SPACE_PIECE, STOP = 29871, 2  # of Llama-2's vocabulary
TEMPLATE_BEFORE, TEMPLATE_AFTER = 10, 4  # tokens of the prompt around the instruction
ATTENTION_STRIDE = 14  # every 14th action row's attention is stored


@dataclass(frozen=True)
class TensorError:
    """How far one tensor is from its reference.

    Attributes:
        name: of the stored array.
        worst, mean: absolute differences; infinity where the shapes differ.
        tolerance: what float32 should stay within.
    """

    name: str
    worst: float
    mean: float
    tolerance: float

    @property
    def within(self) -> bool:
        """Whether it is as near as it should be."""
        return self.worst <= self.tolerance


class StoredPrompt:
    """A tokenizer that knows one prompt: the stored ids, whatever the instruction.

    Args:
        input_ids: [T'] without the lone space piece.
    """

    stop_id = STOP

    def __init__(self, input_ids: np.ndarray):
        ids = [int(token) for token in np.ravel(input_ids)]
        words = Span(TEMPLATE_BEFORE, len(ids) - TEMPLATE_AFTER)
        if ids[-1] != SPACE_PIECE:
            ids.append(SPACE_PIECE)
        self._tokens = PromptTokens(tuple(ids), words)

    def prompt(self, instruction: str) -> PromptTokens:
        """The stored ids."""
        return self._tokens


class CaptureRun(PruneRun):
    """Prunes nothing and copies hidden states and attention rows of every layer."""

    def __init__(self, context: QueryContext):
        super().__init__(context)
        self.arrays: dict[str, np.ndarray] = {}
        self._attention: dict[str, list[np.ndarray]] = {}

    def after_layer(self, probe: Probe) -> None:
        """Copy what one layer did."""
        layout, device = self.context.layout, probe.hidden.device
        self.arrays[f'hidden_after_layer_{probe.layer - 1:02d}'] = _array(probe.hidden)
        rows = torch.arange(layout.length, device=device)
        whole = probe.attention(rows, rows)
        text = whole[:, layout.prompt.idx(device)]
        self._add('attn_text_rows_headmean', text.mean(dim=0))
        if probe.layer == 1:
            self.arrays['attn_text_rows_layer00_perhead'] = _array(text)
        self._add('attn_colmean_over_queries', whole.mean(dim=1))
        self._add('attn_row_bos_patch0_proprio_stop', whole[:, single_rows(layout)])
        if layout.actions is not None:
            every = torch.arange(layout.actions.start, layout.actions.stop, ATTENTION_STRIDE)
            self._add('attn_action_rows_every14', whole[:, every.to(device)])

    def finish(self) -> dict[str, np.ndarray]:
        """All arrays, attention stacked over layers."""
        return self.arrays | {name: np.stack(rows) for name, rows in self._attention.items()}

    def _add(self, name: str, rows: Tensor) -> None:
        self._attention.setdefault(name, []).append(_array(rows))


def single_rows(layout: TokenLayout) -> list[int]:
    """Positions of BOS, the first patch, what follows the patches, and the last token."""
    last_camera = layout.camera_starts[-1]
    return [0, layout.camera_starts[0], last_camera + layout.patches, layout.length - 1]


def trace(model: OpenVLAOFT, images: list[np.ndarray], proprio: np.ndarray | None) -> dict:
    """Name -> array of everything that one dense query computes.

    Args:
        model: whose tokenizer is a StoredPrompt.
        images: one per camera, [H, W, 3] uint8.
        proprio: [P] raw, or None.
    """
    arrays: dict[str, np.ndarray] = {}
    parts = model.parts
    with torch.inference_mode(), ExitStack() as hooks:
        for name, module in (
            ('vit_dino', parts.vision_backbone.featurizer),
            ('vit_siglip', parts.vision_backbone.fused_featurizer),
            ('projected_patches', parts.projector),
            ('proprio_token', parts.proprio_projector),
        ):
            if module is not None:
                hooks.enter_context(captured(module, name, arrays))
        pixels = model.preprocess(images)
        prompt = model.embed(pixels, proprio, '')
        arrays['llm_input_embeds'] = _array(prompt.embeds)
        run = CaptureRun(
            QueryContext(
                layout=prompt.layout,
                depth=len(model.decoder.layers),
                device=prompt.embeds.device,
                fine=False,
                alpha=1.0,
                similarity=None,
                memory=None,
                query=0,
            )
        )
        decode = QueryDecoder(model.decoder, prompt.layout, run)
        hooks.enter_context(captured(model.decoder.norm, 'final_norm_hidden', arrays))
        normalized = _array(model.act(prompt, decode))
    head = prompt.layout.head
    for name in ('vit_dino', 'vit_siglip'):
        views = arrays.pop(name)
        arrays |= {f'{name}_view{index}': view for index, view in enumerate(views)}
    arrays['projected_patches'] = arrays['projected_patches'].reshape(
        -1, arrays['projected_patches'].shape[-1]
    )
    arrays['action_hidden_states'] = arrays['final_norm_hidden'][head.start : head.stop]
    arrays['normalized_actions'] = normalized
    arrays['actions'] = model.unnormalize(normalized)
    return arrays | run.finish()


def compare(
    model: OpenVLAOFT, robot: RobotConfig, inputs: dict, outputs: dict
) -> Iterator[TensorError]:
    """How far each stored array is from ours.

    Args:
        model: loaded with `StoredPrompt(inputs['input_ids'])`.
        robot: whose gripper convention makes libero_env_actions.
        inputs, outputs: arrays of the two files.

    Raises:
        ConfigError: an input is missing, or there are fewer images than cameras.
    """
    for name in ('images_uint8', 'input_ids'):
        if name not in inputs:
            raise ConfigError('--golden', name, 'inputs.npz lacks this array')
    count = len(model.info.cameras)
    images = list(inputs['images_uint8'][:count])
    if len(images) < count:
        raise ConfigError('robot.camera_names', count, f'inputs.npz has {len(images)} images')
    arrays = trace(model, images, inputs['proprio_raw'] if model.info.proprio_dim else None)
    arrays['libero_env_actions'] = to_robot(arrays['actions'], robot)
    rows = outputs.get('hidden_rows_index')
    for name, expected in outputs.items():
        if name not in arrays:
            continue
        got = arrays[name]
        if name.startswith('hidden_after_layer') and rows is not None:
            got = got[rows]
        tolerance = ATTENTION_TOLERANCE if name.startswith('attn') else TOLERANCE
        yield tensor_error(name, got, expected, tolerance)


def tensor_error(
    name: str, got: np.ndarray, expected: np.ndarray, tolerance: float = TOLERANCE
) -> TensorError:
    """Largest and mean absolute difference; NaN counts as infinitely far."""
    got, expected = got.squeeze(), expected.squeeze()
    if got.shape != expected.shape:
        return TensorError(name, np.inf, np.inf, tolerance)
    difference = np.abs(got.astype(np.float64) - expected.astype(np.float64))
    difference = np.nan_to_num(difference, nan=np.inf)
    return TensorError(name, float(difference.max()), float(difference.mean()), tolerance)


def read_vectors(folder: Path) -> tuple[dict, dict]:
    """inputs.npz and outputs.npz of a folder.

    Raises:
        ConfigError: one is missing or no npz.
    """
    arrays = []
    for name in ('inputs.npz', 'outputs.npz'):
        try:
            with np.load(folder / name) as file:
                arrays.append(dict(file))
        except (OSError, ValueError) as error:
            raise ConfigError(
                '--golden', str(folder / name), f'cannot be read: {error}'
            ) from error
    return arrays[0], arrays[1]


@contextmanager
def captured(module: torch.nn.Module, name: str, arrays: dict[str, np.ndarray]) -> Iterator[None]:
    """Copy a module's output into `arrays` whenever it runs."""

    def copy(module: torch.nn.Module, arguments: tuple, output: Tensor) -> None:
        arrays[name] = _array(output)

    handle = module.register_forward_hook(copy)
    try:
        yield
    finally:
        handle.remove()


def _array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().float().cpu().numpy()
