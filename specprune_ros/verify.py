"""Compare a loaded model with stored outputs of its reference implementation.

A folder of reference vectors holds `inputs.npz` (images_uint8, input_ids, proprio_raw) and
`outputs.npz`. A folder inside it with `outputs.npz` alone (FiLM, diffusion) shares its inputs; one
with `io.npz` (ALOHA) shares the two images and adds a third. Arrays that a model computes by the
same name are compared; for a model with another head or other inputs than the vectors are made
for, those under its prefix are, and the plain ones that it shares.
"""

from __future__ import annotations

import re
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from specprune_ros.config import PolicyConfig, RobotConfig
from specprune_ros.errors import ConfigError
from specprune_ros.models.decoder import Probe, QueryDecoder
from specprune_ros.models.heads.diffusion import DiffusionHead, alphas_cumprod
from specprune_ros.models.heads.tokens import ParallelTokensHead
from specprune_ros.models.openvla_oft import OpenVLAOFT
from specprune_ros.models.prompt import PromptTokens
from specprune_ros.pruning.base import PruneRun, QueryContext
from specprune_ros.robot_action import to_robot
from specprune_ros.token_layout import Span, TokenLayout

TOLERANCE, ATTENTION_TOLERANCE = 1e-4, 1e-3  # attention is stored as float16
SPACE_PIECE, STOP = 29871, 2  # of Llama-2's vocabulary
TEMPLATE_BEFORE, TEMPLATE_AFTER = 10, 4  # tokens of the prompt around the instruction
ATTENTION_STRIDE = 14  # every 14th action row's attention is stored
PROMPT_WITHOUT_WORDS = TEMPLATE_BEFORE + TEMPLATE_AFTER
# Prefix of what is stored for a model that departs from the vectors in one thing -> the plain
# arrays that hold for it too.
PREFIXES = {
    '': '.*',
    'discrete_': '(?!(normalized_|libero_env_)?actions$).*',
    'noproprio_': 'vit_.*|projected_patches',
    'oneimage_': 'vit_.*',
    'threeimage_hflip_': 'vit_.*',
}
INDEX_ARRAYS = ('hidden_rows_index',)  # say which rows others hold


@dataclass(frozen=True)
class TensorError:
    """How far one tensor is from its reference.

    Attributes:
        name: of the stored array.
        worst, mean: absolute differences; infinity where the shapes differ.
        tolerance: what float32 should stay within.
        note: the shapes, where they differ.
    """

    name: str
    worst: float
    mean: float
    tolerance: float
    note: str = ''

    @property
    def within(self) -> bool:
        """Whether it is as near as it should be."""
        return self.worst <= self.tolerance


class StoredPrompt:
    """A tokenizer that knows one prompt: the stored ids, whatever the instruction.

    Args:
        input_ids: [T'] with or without the lone space piece at the end.

    Raises:
        ConfigError: too few for the template around at least one token of instruction.
    """

    stop_id = STOP

    def __init__(self, input_ids: np.ndarray):
        ids = [int(token) for token in np.ravel(input_ids)]
        if ids[-1:] == [SPACE_PIECE]:
            ids.pop()
        if len(ids) <= PROMPT_WITHOUT_WORDS:
            raise ConfigError(
                'input_ids',
                ids,
                f'has {len(ids)} tokens; the prompt takes {TEMPLATE_BEFORE} before the '
                f'instruction, {TEMPLATE_AFTER} after it, and the instruction at least one',
            )
        words = Span(TEMPLATE_BEFORE, len(ids) - TEMPLATE_AFTER)
        self._tokens = PromptTokens((*ids, SPACE_PIECE), words)

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


def position_layout(layout: TokenLayout) -> np.ndarray:
    """Positions of BOS, each camera, what follows them, the prompt, the actions, and the end."""
    actions = layout.actions
    ends = [] if actions is None else [actions.start, actions.stop]
    after_cameras = layout.camera_starts[-1] + layout.patches
    starts = [0, *layout.camera_starts, after_cameras, layout.prompt.start]
    return np.asarray([*starts, *ends, layout.length])


def trace(
    model: OpenVLAOFT,
    images: list[np.ndarray],
    proprio: np.ndarray | None,
    *,
    mirrored: bool = False,
) -> dict[str, np.ndarray]:
    """Name -> array of everything that one dense query computes.

    Args:
        model: whose tokenizer is a StoredPrompt.
        images: one per camera, [H, W, 3] uint8.
        proprio: [P] raw, or None.
        mirrored: whether one more view follows, the first one's processed picture left to right.
    """
    arrays: dict[str, np.ndarray] = {}
    with torch.inference_mode(), ExitStack() as hooks:
        for name, module in _watched(model).items():
            hooks.enter_context(captured(module, name, arrays))
        pixels = model.preprocess(images)
        if mirrored:
            pixels = torch.cat((pixels, pixels[:1].flip(2)))
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
        noises = hooks.enter_context(_noises(model))
        normalized = _array(model.act(prompt, decode))
    head = prompt.layout.head
    for name in ('vit_dino', 'vit_siglip'):
        views = arrays.pop(name)
        arrays |= {f'{name}_view{index}': view for index, view in enumerate(views)}
    arrays['projected_patches'] = arrays['projected_patches'].reshape(
        -1, arrays['projected_patches'].shape[-1]
    )
    arrays['action_hidden_states'] = arrays['final_norm_hidden'][head.start : head.stop]
    arrays['position_layout'] = position_layout(prompt.layout)
    arrays['normalized_actions'] = normalized
    arrays['actions'] = model.unnormalize(normalized)
    if 'token_logits' in arrays:
        arrays['token_ids'] = arrays.pop('token_logits').argmax(axis=-1)
    return arrays | run.finish() | _of_diffusion(model, arrays, noises)


def _watched(model: OpenVLAOFT) -> dict[str, torch.nn.Module]:
    """Array name -> module whose output it is."""
    parts, action_head = model.parts, model.parts.action_head
    modules = {
        'vit_dino': parts.vision_backbone.featurizer,
        'vit_siglip': parts.vision_backbone.fused_featurizer,
        'projected_patches': parts.projector,
    }
    if parts.proprio_projector is not None:
        modules['proprio_token'] = parts.proprio_projector
    if parts.film:
        modules['language_embeddings'] = parts.language_model.embed_tokens
    if isinstance(action_head, ParallelTokensHead):
        modules['token_logits'] = action_head.lm_head
    return modules


@contextmanager
def _noises(model: OpenVLAOFT) -> Iterator[list[np.ndarray]]:
    """What a diffusion head predicts at each step, as it runs; nothing of other heads."""
    noises: list[np.ndarray] = []
    head = model.parts.action_head
    if not isinstance(head, DiffusionHead):
        yield noises
        return
    handle = head.noise_predictor.register_forward_hook(
        lambda module, given, out: noises.append(_array(out))
    )
    try:
        yield noises
    finally:
        handle.remove()


def _of_diffusion(
    model: OpenVLAOFT, arrays: dict[str, np.ndarray], noises: list[np.ndarray]
) -> dict[str, np.ndarray]:
    """Arrays that only a diffusion head has."""
    head = model.parts.action_head
    if not isinstance(head, DiffusionHead):
        return {}
    embeddings = zip(head.timesteps, head.times, strict=True)
    return {
        'noise': _array(head.noise),
        'timesteps': np.asarray(head.timesteps),
        'alphas_cumprod': alphas_cumprod().numpy(),
        'noise_pred_per_step': np.stack(noises),
        'action_hidden_states_last_step': arrays['action_hidden_states'],
        **{f'time_embedding_t{step}': _array(time) for step, time in embeddings},
    }


def compare(
    model: OpenVLAOFT, robot: RobotConfig, inputs: dict, outputs: dict
) -> Iterator[TensorError]:
    """How far each stored array that applies to the model is from ours.

    Args:
        model: loaded with `StoredPrompt(inputs['input_ids'])`; a diffusion head with as many
            steps as `outputs['timesteps']` has. It gets the stored noise.
        robot: whose gripper convention makes libero_env_actions.
        inputs, outputs: arrays of the two files.

    Raises:
        ConfigError: an input is missing or malformed, the vectors are of another action head, or
            none of them is of this head, these cameras and this proprioception.
    """
    prefix = _prefix(model, inputs)
    _check_ids(model, inputs['input_ids'])
    _set_noise(model, outputs)
    mirrored = prefix == 'threeimage_hflip_'
    images = _images(inputs, len(model.info.cameras) - mirrored)
    arrays = trace(model, images, _proprio(model, inputs), mirrored=mirrored)
    arrays['libero_env_actions'] = to_robot(arrays['actions'], robot)
    names = comparable(prefix, arrays, outputs)
    rows = outputs.get('hidden_rows_index')
    for stored, name in names.items():
        index = rows if name.startswith('hidden_after_layer') else None
        tolerance = ATTENTION_TOLERANCE if name.startswith('attn') else TOLERANCE
        yield tensor_error(stored, _at(arrays[name], index), outputs[stored], tolerance)


def comparable(
    prefix: str, arrays: dict[str, np.ndarray], outputs: dict[str, np.ndarray]
) -> dict[str, str]:
    """Name of a stored array -> name of ours that it is to equal.

    Args:
        prefix: a key of PREFIXES.
        arrays, outputs: ours, and the stored ones.

    Raises:
        ConfigError: none is there, or under the prefix none.
    """
    names = {
        name: name
        for name in outputs
        if name in arrays and re.fullmatch(PREFIXES[prefix], name) and name not in INDEX_ARRAYS
    }
    own = {name: name[len(prefix) :] for name in outputs if name.startswith(prefix)}
    own = {stored: name for stored, name in own.items() if name in arrays} if prefix else names
    names = {name: ours for name, ours in (names | own).items() if _is_numeric(outputs[name])}
    if not own or not names:
        what = f'array {prefix}* ' if prefix else 'array '
        raise ConfigError(
            '--golden',
            'outputs',
            f'no stored {what}is one that this model computes, so nothing would be compared; '
            f'there are: {", ".join(sorted(outputs)) or "none"}',
        )
    return {name: names[name] for name in outputs if name in names}


def _prefix(model: OpenVLAOFT, inputs: dict) -> str:
    """Under which prefix the stored arrays of such a model are."""
    _needs(inputs, 'images_uint8', 'input_ids')
    cameras, stored = len(model.info.cameras), len(inputs['images_uint8'])
    departures = []
    if isinstance(model.parts.action_head, ParallelTokensHead):
        departures.append('discrete_')
    if 'proprio_raw' in inputs and not model.info.proprio_dim:
        departures.append('noproprio_')
    if cameras != stored:
        by_count = {1: 'oneimage_', 3: 'threeimage_hflip_'}
        if cameras not in by_count:
            raise ConfigError(
                'robot.camera_names', model.info.cameras, f'the vectors have {stored} images'
            )
        departures.append(by_count[cameras])
    if len(departures) > 1:
        raise ConfigError(
            '--golden',
            'inputs',
            f'the model departs from the vectors in {len(departures)} things '
            f'({", ".join(name.rstrip("_") for name in departures)}), they hold one at a time; '
            'change robot.camera_names, robot.joint_names or model.head',
        )
    return departures[0] if departures else ''


def _check_ids(model: OpenVLAOFT, ids: np.ndarray) -> None:
    vocabulary = model.parts.language_model.embed_tokens.num_embeddings
    if ids.min() < 0 or ids.max() >= vocabulary:
        raise ConfigError('input_ids', ids.tolist(), f'must lie in 0..{vocabulary - 1}')


def _set_noise(model: OpenVLAOFT, outputs: dict) -> None:
    """Start from the stored noise; another shape stays and shows as the error of `noise`."""
    head = model.parts.action_head
    is_diffusion = isinstance(head, DiffusionHead)
    if is_diffusion != ('noise' in outputs and 'timesteps' in outputs):
        raise ConfigError(
            'model.head',
            model.info.name,
            'a diffusion head needs vectors with noise and timesteps'
            if is_diffusion
            else 'the vectors are those of a diffusion head',
        )
    if not is_diffusion:
        return
    noise = torch.as_tensor(outputs['noise']).to(head.noise).reshape(outputs['noise'].shape[-2:])
    if noise.shape == head.noise.shape:
        head.noise = noise


def _images(inputs: dict, count: int) -> list[np.ndarray]:
    images = inputs['images_uint8']
    if images.dtype != np.uint8 or images.ndim != 4 or len(images) < count:
        raise ConfigError(
            '--golden',
            'images_uint8',
            f'must be at least [{count}, H, W, 3] uint8, is {images.shape} {images.dtype}',
        )
    return list(images[:count])


def _proprio(model: OpenVLAOFT, inputs: dict) -> np.ndarray | None:
    size = model.info.proprio_dim
    if not size:
        return None
    _needs(inputs, 'proprio_raw')
    raw = np.ravel(inputs['proprio_raw'])
    if len(raw) != size:
        raise ConfigError('--golden', 'proprio_raw', f'has {len(raw)} elements, not {size}')
    return raw


def _needs(inputs: dict, *names: str) -> None:
    for name in names:
        if name not in inputs:
            raise ConfigError('--golden', name, 'the inputs lack this array')


def _at(got: np.ndarray, rows: np.ndarray | None) -> np.ndarray:
    """The stored rows of a layer; all of them where the sequence is too short for that."""
    if rows is None or rows.max(initial=-1) >= len(got):
        return got
    return got[rows]


def _is_numeric(array: np.ndarray) -> bool:
    return array.dtype.kind in 'fiub'


def tensor_error(
    name: str, got: np.ndarray, expected: np.ndarray, tolerance: float = TOLERANCE
) -> TensorError:
    """Largest and mean absolute difference; NaN counts as infinitely far."""
    got, expected = got.squeeze(), expected.squeeze()
    if got.shape != expected.shape:
        note = f'shape {got.shape}, stored {expected.shape}: other cameras, horizon or prompt?'
        return TensorError(name, np.inf, np.inf, tolerance, note)
    difference = np.abs(got.astype(np.float64) - expected.astype(np.float64))
    difference = np.nan_to_num(difference, nan=np.inf)
    return TensorError(name, float(difference.max()), float(difference.mean()), tolerance)


def read_vectors(folder: Path) -> tuple[dict, dict]:
    """Inputs and outputs of a folder; see the module.

    Raises:
        ConfigError: a file is missing or no npz.
    """
    if (folder / 'io.npz').exists():
        stored = _read(folder / 'io.npz')
        shared = _read(folder.parent / 'inputs.npz')
        _needs(stored, 'image3_uint8', 'input_ids')
        _needs(shared, 'images_uint8')
        images = [*shared['images_uint8'], stored['image3_uint8']]
        if len({image.shape for image in images}) > 1:
            raise ConfigError('--golden', 'image3_uint8', 'is of another size than images_uint8')
        inputs = {'images_uint8': np.stack(images)}
        inputs |= {name: stored[name] for name in ('input_ids', 'proprio_raw') if name in stored}
        given = (*inputs, 'image3_uint8')
        return inputs, {name: array for name, array in stored.items() if name not in given}
    is_part = not (folder / 'inputs.npz').exists() and (folder / 'outputs.npz').exists()
    return _read((folder.parent if is_part else folder) / 'inputs.npz'), _read(
        folder / 'outputs.npz'
    )


def _read(path: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(path) as file:
            return dict(file)
    except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ConfigError('--golden', str(path), f'cannot be read: {error}') from error


def for_reference(config: PolicyConfig, outputs: dict, given: set[str]) -> PolicyConfig:
    """The configuration under which a model can be compared.

    float32 and no first shrinking (the stored images are past it), unless they were given; as
    many denoising steps as stored.

    Args:
        config: what the user asked for.
        outputs: of `read_vectors`.
        given: names of the parameters that the user set by hand.
    """
    model, robot = config.model, config.robot
    if 'model.dtype' not in given:
        model = replace(model, dtype='float32')
    if 'timesteps' in outputs:
        model = replace(model, diffusion_steps=outputs['timesteps'].size)
    if 'robot.source_size' not in given:
        robot = replace(robot, source_size=0)
    return replace(config, model=model, robot=robot)


@contextmanager
def without_tf32() -> Iterator[None]:
    """Keep a GPU from rounding float32 products to 10 bits, which is coarser than TOLERANCE."""
    switches = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [switch.allow_tf32 for switch in switches]
    try:
        for switch in switches:
            switch.allow_tf32 = False
        yield
    finally:
        for switch, value in zip(switches, before, strict=True):
            switch.allow_tf32 = value


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
