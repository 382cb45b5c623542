"""Forms in which a loaded decoder can run: fused, compiled, quantised, with eager attention."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from specprune_ros.config import ModelConfig
from specprune_ros.errors import ConfigError, MissingDependencyError
from specprune_ros.models.blocks import Block, FusedBlock
from specprune_ros.models.decoder import Decoder, attend_eager, attend_fused

TORCHAO = 'pip install torchao'
FP8_CAPABILITY = (8, 9)  # the first GPUs that multiply float8 matrices
# What a benchmark compares: name -> fields of ModelConfig. 'fused' is the form to be relative to.
FORMS = {
    'eager': {'attention': 'eager', 'fused': False, 'cuda_graph': 'off'},
    'sdpa': {'fused': False, 'cuda_graph': 'off'},
    'fused': {'cuda_graph': 'off'},
    'graph': {'cuda_graph': 'on'},
    'compile': {'compile': True, 'cuda_graph': 'off'},
    'int8': {'quantization': 'int8'},
    'fp8': {'quantization': 'fp8'},
}


def prepared(decoder: Decoder, config: ModelConfig) -> Decoder:
    """A loaded decoder in the configured form; the loaded modules stay what they are.

    Args:
        decoder: as the model offers it.
        config: `fused`, `attention`, `compile` and `quantization`.

    Raises:
        ConfigError: the device cannot do what is asked.
        MissingDependencyError: torchao is missing.
    """
    kind = FusedBlock if config.fused else Block
    blocks = [kind(layer, decoder.head_dim) for layer in decoder.layers]
    if config.quantization != 'none':
        quantize(blocks, config.quantization)
    if config.compile:
        for block in blocks:
            compile_block(block)
    attend = attend_eager if config.attention == 'eager' else attend_fused
    return replace(decoder, blocks=blocks, attend=attend)


def compile_block(block: Block) -> None:
    """Let torch.compile fuse the norms and activations of a block; row counts stay free."""
    block.heads = torch.compile(block.heads, dynamic=True)
    block.mlp = torch.compile(block.mlp, dynamic=True)


def quantize(blocks: list[Block], name: str) -> None:
    """Let the projections of blocks multiply in 8 bits, activations scaled per row as they come.

    Args:
        blocks: fused ones, whose own projections are changed, not the loaded modules'.
        name: 'int8' or 'fp8'.

    Raises:
        ConfigError: fp8 on a device that cannot.
        MissingDependencyError: torchao is missing.
    """
    device = blocks[0].down.weight.device
    if name == 'fp8' and not _multiplies_fp8(device):
        raise ConfigError('model.quantization', name, f'{device} has no float8 matrix product')
    try:
        from torchao.quantization import (
            Float8DynamicActivationFloat8WeightConfig,
            Int8DynamicActivationInt8WeightConfig,
            PerRow,
            quantize_,
        )
    except ImportError as error:
        raise MissingDependencyError('torchao', 'model.quantization', TORCHAO, error) from error
    if name == 'fp8':
        scheme = Float8DynamicActivationFloat8WeightConfig(granularity=PerRow())
    else:
        scheme = Int8DynamicActivationInt8WeightConfig()
    quantize_(nn.ModuleList(blocks), scheme)


def _multiplies_fp8(device: torch.device) -> bool:
    return device.type == 'cuda' and torch.cuda.get_device_capability(device) >= FP8_CAPABILITY
