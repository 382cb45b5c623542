"""Stand-ins of the OpenVLA-OFT architecture with random weights, most small enough for a CPU.

THEIR ACTIONS MEAN NOTHING. They exist so that the package runs, is tested, demonstrated and
measured without a download: same towers, projector, bidirectional Llama, placeholders and head as
the real model.
"""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn

from specprune_ros.config import PolicyConfig
from specprune_ros.errors import ConfigError
from specprune_ros.models.base import ModelInfo
from specprune_ros.models.heads.l1 import L1RegressionHead
from specprune_ros.models.llama import make_llama
from specprune_ros.models.openvla_oft import (
    Bounds,
    OpenVLAOFT,
    OpenVLAParts,
    Projector,
    ProprioProjector,
    VisionBackbone,
)
from specprune_ros.models.preprocess import make_preprocessor
from specprune_ros.models.prompt import PromptTokens
from specprune_ros.models.vit import TowerConfig
from specprune_ros.token_layout import Span

MAX_CAMERAS = 4


@dataclass(frozen=True)
class Sizes:
    """One stand-in's sizes.

    Attributes:
        dino, siglip: the towers.
        llama: arguments of transformers.LlamaConfig.
        for_gpu: too large for a CPU; weights are drawn on the device, so other ones on each.
    """

    dino: TowerConfig
    siglip: TowerConfig
    llama: dict[str, object]
    for_gpu: bool = False

    def with_grid(self, side: int) -> Sizes:
        """The same for images of side x side patches, square ones."""
        towers = (
            replace(tower, image_size=side * tower.patch_size)
            for tower in (self.dino, self.siglip)
        )
        return Sizes(*towers, self.llama, self.for_gpu)


SIZES = {
    # Tens of milliseconds per query: tests and demos.
    'tiny': Sizes(
        TowerConfig(width=32, depth=3, heads=2, mlp_width=128, registers=4, layer_scale=True),
        TowerConfig(width=32, depth=3, heads=2, mlp_width=120, registers=None, layer_scale=False),
        {
            'hidden_size': 64,
            'intermediate_size': 176,
            'num_hidden_layers': 12,
            'num_attention_heads': 2,
        },
    ),
    # The 7B's shape with an eighth of its width everywhere: what pruning saves and costs on a CPU.
    'shrunk_7b': Sizes(
        TowerConfig(width=128, depth=24, heads=2, mlp_width=512, registers=4, layer_scale=True),
        TowerConfig(
            width=144, depth=27, heads=2, mlp_width=538, registers=None, layer_scale=False
        ),
        {
            'hidden_size': 512,
            'intermediate_size': 1376,
            'num_hidden_layers': 32,
            'num_attention_heads': 8,
        },
    ),
    # The published model's shape, for a GPU: how long it takes, without its 15 GB of weights.
    'random_7b': Sizes(
        TowerConfig(width=1024, depth=24, heads=16, mlp_width=4096, registers=4, layer_scale=True),
        TowerConfig(
            width=1152, depth=27, heads=16, mlp_width=4304, registers=None, layer_scale=False
        ),
        {
            'hidden_size': 4096,
            'intermediate_size': 11008,
            'num_hidden_layers': 32,
            'num_attention_heads': 32,
        },
        for_gpu=True,
    ),
}
LLAMA = {
    'vocab_size': 1024,
    'max_position_embeddings': 4096,
    'rms_norm_eps': 1e-6,
}
# Queries and keys this much larger than fan-in scaling make attention peak, as a trained model's.
ATTENTION_GAIN = 1.6


class WordTokenizer:
    """Stand-in for Llama's tokenizer: one id per word, by hash; the real prompt's layout."""

    bos_id, stop_id, end_piece_id, first_word_id = 1, 2, 3, 4

    def prompt(self, instruction: str) -> PromptTokens:
        """Tokenise the OpenVLA prompt around the instruction."""
        before = 'In : What action should the robot take to'.split()
        words = instruction.lower().split()
        after = ['?', '\n', 'Out', ':']
        ids = [self._word_id(word) for word in (*before, *words, *after)]
        start = 1 + len(before)
        return PromptTokens(
            (self.bos_id, *ids, self.end_piece_id), Span(start, start + len(words))
        )

    def _word_id(self, word: str) -> int:
        free = LLAMA['vocab_size'] - self.first_word_id
        return self.first_word_id + zlib.crc32(word.encode()) % free


def load(config: PolicyConfig, device: torch.device) -> OpenVLAOFT:
    """Build the stand-in for a robot configuration.

    Raises:
        ConfigError: not 1 to 4 cameras, or a model for a GPU on a CPU.
        MissingDependencyError: transformers is not installed.
    """
    return build(config, device, SIZES[config.model.name])


def build(config: PolicyConfig, device: torch.device, sizes: Sizes) -> OpenVLAOFT:
    """Build a stand-in of any sizes; see load."""
    robot, name = config.robot, config.model.name
    width, dino, siglip = sizes.llama['hidden_size'], sizes.dino, sizes.siglip
    cameras, horizon, actions = robot.camera_names, robot.horizon, len(robot.action_names)
    if len(cameras) > MAX_CAMERAS:
        raise ConfigError('robot.camera_names', cameras, f'it takes 1 to {MAX_CAMERAS} cameras')
    if sizes.for_gpu and device.type == 'cpu':
        raise ConfigError('model.name', name, 'needs a GPU with 20 GB; a CPU has shrunk_7b')
    proprio_dim = len(robot.joint_names)
    with torch.device('meta'):
        modules = {
            'vision_backbone': VisionBackbone(dino, siglip),
            'projector': Projector(dino.width + siglip.width, width),
            'language_model': make_llama({**LLAMA, **sizes.llama}),
            'action_head': L1RegressionHead(width, actions, hidden_width=width),
            'proprio_projector': ProprioProjector(proprio_dim, width) if proprio_dim else None,
        }
    modules['vision_backbone'].make_buffers()
    llama = modules['language_model']
    llama.rotary_emb = type(llama.rotary_emb)(config=llama.config)
    generator = torch.Generator(device if sizes.for_gpu else 'cpu')
    generator.manual_seed(config.model.seed)
    for module in filter(None, modules.values()):
        _fill(module.eval(), generator, device, _dtype(config, device))
    side = dino.image_size // dino.patch_size
    size = (dino.image_size, dino.image_size)
    preprocessor = make_preprocessor(
        'fast' if config.model.preprocessing == 'auto' else config.model.preprocessing,
        size=size,
        center_crop=config.model.center_crop,
        source_size=(robot.source_size, robot.source_size) if robot.source_size else None,
        device=device,
    )
    info = ModelInfo(
        name=f'{name} (stand-in, random weights: its actions mean nothing)',
        stand_in=True,
        cameras=cameras,
        image_size=size,
        crop_side=preprocessor.crop_side,
        grid=(side, side),
        proprio_dim=proprio_dim,
        horizon=horizon,
        action_dim=actions,
        parameters=sum(p.numel() for m in filter(None, modules.values()) for p in m.parameters()),
    )
    return OpenVLAOFT(
        OpenVLAParts(
            info=info,
            preprocessor=preprocessor,
            tokenizer=WordTokenizer(),
            action_bounds=_bounds(actions, 1.0),
            proprio_bounds=_bounds(proprio_dim, math.pi) if proprio_dim else None,
            **modules,
        )
    )


def _fill(
    module: nn.Module, generator: torch.Generator, device: torch.device, dtype: torch.dtype
) -> None:
    """Draw all weights by ourselves, so that they do not depend on a library's initialisation.

    Constants such as rotary frequencies stay float32.
    """
    for name, parameter in sorted(module.named_parameters()):
        value = _drawn(name, parameter.shape, generator).to(device, dtype)
        path, _, leaf = name.rpartition('.')
        setattr(module.get_submodule(path), leaf, nn.Parameter(value, requires_grad=False))
    module.to(device)


def _drawn(name: str, shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    """One parameter's value, float32."""
    new = {'device': generator.device}
    if 'norm' in name or 'scale_factor' in name or name.split('.')[-2:][0] in ('0',):
        return torch.full(shape, float(name.endswith('weight') or 'scale' in name), **new)
    if name.endswith('bias'):
        return torch.zeros(shape, **new)
    fan_in = math.prod(shape[1:]) if len(shape) > 1 else shape[0]
    gain = ATTENTION_GAIN if 'q_proj' in name or 'k_proj' in name else 1.0
    std = 1.0 if 'embed' in name and 'proj' not in name else gain / math.sqrt(fan_in)
    return torch.randn(shape, generator=generator, **new) * std


def _dtype(config: PolicyConfig, device: torch.device) -> torch.dtype:
    wanted = config.model.dtype
    if wanted == 'auto':
        wanted = 'bfloat16' if device.type == 'cuda' else 'float32'
    return getattr(torch, wanted)


def _bounds(size: int, limit: float) -> Bounds:
    return Bounds(np.full(size, -limit), np.full(size, limit), np.ones(size, bool))
