"""Low-rank updates (LoRA), merged into plain weights while they are read.

Source: peft 0.11.1, as openvla-oft 213c5ff uses it (finetune.py, film_vit_wrapper.py).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from specprune_ros.errors import CheckpointError, shown
from specprune_ros.models.checkpoint import Weight, Weights, open_weights, read_finite, read_json

OFT_ALPHA = 16  # OpenVLA-OFT trains with alpha = min(rank, 16) and saves it in no component file
BASE, BASE_BIAS = '.base_layer.weight', '.base_layer.bias'
WRAPPED_A, WRAPPED_B = '.lora_A.default.weight', '.lora_B.default.weight'
ADAPTER_A, ADAPTER_B, ADAPTER_PREFIX = '.lora_A.weight', '.lora_B.weight', 'base_model.model.'
ADAPTER_CONFIG, ADAPTER_WEIGHTS = 'adapter_config.json', 'adapter_model.safetensors'
# Options of peft that change the update in ways which the weights alone do not show.
UNSUPPORTED = ('use_rslora', 'alpha_pattern', 'rank_pattern', 'fan_in_fan_out')


def merge(base: Tensor, lora_a: Tensor, lora_b: Tensor, scale: float) -> Tensor:
    """base + scale * B A, in float32 and rounded once by whoever casts the result.

    Args:
        base: [out, in] of a Linear, or [out, c, h, w] of a Conv2d.
        lora_a: [rank, in], or [rank, c, h, w].
        lora_b: [out, rank], or [out, rank, 1, 1].
        scale: alpha / rank.

    Returns:
        The base's shape, float32, on its device.

    Source: as above. differs: the reference adds in the base's dtype.
    """
    flat = (tensor.float().flatten(1) for tensor in (base, lora_b, lora_a))
    return torch.addmm(*flat, alpha=scale).view(base.shape)


def merge_wrapped(weights: Weights) -> Weights:
    """Plain weights of a file whose layers were saved inside peft's wrappers (FiLM's towers).

    `<m>.base_layer.weight`, `<m>.lora_A.default.weight` and `<m>.lora_B.default.weight` become
    `<m>.weight`, float32 and merged when it is read; `<m>.base_layer.bias` becomes `<m>.bias`.
    The scale is min(rank, 16) / rank, with the rank from the shapes.

    Raises:
        CheckpointError: a part is missing, or shapes do not fit each other.
    """
    layers, plain = _by_layer(weights, (BASE, BASE_BIAS, WRAPPED_A, WRAPPED_B))
    for path, parts in layers.items():
        if BASE_BIAS in parts:
            plain[f'{path}.bias'] = parts[BASE_BIAS]
        layer = _complete(parts, (BASE, WRAPPED_A, WRAPPED_B), path)
        rank = _rank(*layer)
        plain[f'{path}.weight'] = _merged(*layer, min(rank, OFT_ALPHA) / rank)
    return plain


@dataclass(frozen=True, eq=False)
class Adapter:
    """A LoRA adapter in a folder of its own, as peft saves it.

    Attributes:
        scale: alpha / rank.
        layers: path of a layer in the base model -> its parts by key ending.
        file: where the weights lie.
    """

    scale: float
    layers: dict[str, Weights]
    file: Path

    @classmethod
    def open(cls, folder: Path) -> Adapter:
        """Read adapter_config.json and the header of adapter_model.safetensors.

        Raises:
            CheckpointError: a file is missing or broken, a field is absent, bad or unsupported,
                or a weight is no part of a low-rank update of the rank that the config says.
        """
        rank, alpha = _rank_and_alpha(folder / ADAPTER_CONFIG)
        file = folder / ADAPTER_WEIGHTS
        weights = {
            key.removeprefix(ADAPTER_PREFIX): weight for key, weight in open_weights(file).items()
        }
        layers, rest = _by_layer(weights, (BASE, ADAPTER_A, ADAPTER_B))
        if rest:
            raise CheckpointError(f'{file}: {next(iter(rest.values())).key} is no LoRA weight')
        for path, parts in layers.items():
            lora_a, _ = _complete(parts, (ADAPTER_A, ADAPTER_B), path)
            if lora_a.shape[:1] != (rank,):
                raise CheckpointError(
                    f'{file}: {lora_a.key} is {lora_a.shape}, but r in {ADAPTER_CONFIG} is {rank}'
                )
        return cls(alpha / rank, layers, file)

    def apply(self, weights: Weights) -> Weights:
        """The base model's weights, each merged in float32 when it is read.

        A full copy of a base weight in the adapter takes the place of the base model's.

        Args:
            weights: of the base model, by names that end in `.weight`.

        Raises:
            CheckpointError: the adapter changes layers that the base model lacks, or shapes do not
                fit each other.
        """
        absent = [path for path in self.layers if f'{path}.weight' not in weights]
        if absent:
            raise CheckpointError(
                f'{self.file}: {len(absent)} of {len(self.layers)} layers are not in the base '
                f'model, e.g. {absent[0]}; is it the right one?'
            )
        merged = dict(weights)
        for path, parts in self.layers.items():
            base = weights[f'{path}.weight']
            copy = parts.get(BASE, base)
            if copy.shape != base.shape:
                raise CheckpointError(
                    f'{self.file}: {copy.key} has {copy.shape}, the base model {base.shape}'
                )
            layer = (copy, parts[ADAPTER_A], parts[ADAPTER_B])
            _rank(*layer)
            merged[f'{path}.weight'] = _merged(*layer, self.scale)
        return merged


def _by_layer(weights: Weights, endings: tuple[str, ...]) -> tuple[dict[str, Weights], Weights]:
    """Weights whose names end so, as path -> ending -> weight; and all others."""
    layers: dict[str, Weights] = {}
    rest: Weights = {}
    for name, weight in weights.items():
        ending = next((ending for ending in endings if name.endswith(ending)), None)
        if ending is None:
            rest[name] = weight
        else:
            layers.setdefault(name.removesuffix(ending), {})[ending] = weight
    return layers, rest


def _complete(parts: Weights, endings: tuple[str, ...], path: str) -> list[Weight]:
    """The parts of a layer in this order.

    Raises:
        CheckpointError: one is missing.
    """
    lacking = [ending for ending in endings if ending not in parts]
    if lacking:
        known = next(iter(parts.values()))
        raise CheckpointError(f'{known.file}: has {known.key} but not {path}{lacking[0]}')
    return [parts[ending] for ending in endings]


def _rank(base: Weight, lora_a: Weight, lora_b: Weight) -> int:
    """Rank of an update.

    Raises:
        CheckpointError: the shapes do not fit each other.
    """
    rank, *inputs = lora_a.shape or (0,)
    pointwise = (1,) * (len(base.shape) - 2)
    wanted = (*base.shape[:1], rank, *pointwise), (*base.shape[:1], *inputs)
    if rank < 1 or (lora_b.shape, base.shape) != wanted:
        raise CheckpointError(
            f'{lora_a.file}: {lora_a.key} {lora_a.shape} and {lora_b.key} {lora_b.shape} do not '
            f'fit {base.key} {base.shape}'
        )
    return rank


def _merged(base: Weight, lora_a: Weight, lora_b: Weight, scale: float) -> Weight:
    """The base with an update that is made when it is read."""
    return replace(base, read=partial(_read_merged, base, lora_a, lora_b, scale))


def _read_merged(base: Weight, lora_a: Weight, lora_b: Weight, scale: float) -> Tensor:
    # The update is checked by itself, so that the message names the file at fault.
    return merge(base.read(), read_finite(lora_a), read_finite(lora_b), scale)


def _rank_and_alpha(path: Path) -> tuple[int, float]:
    """`r` and `lora_alpha` of an adapter_config.json.

    Raises:
        CheckpointError: the file or a field is missing or bad, or it says more than plain LoRA.
    """
    config = read_json(path)
    if config is None:
        raise CheckpointError(f'{path}: missing')
    special = [name for name in UNSUPPORTED if config.get(name)]
    if special:
        value = shown(config[special[0]])
        raise CheckpointError(f'{path}: {special[0]} = {value}: is not supported')
    rank, alpha = config.get('r'), config.get('lora_alpha')
    if type(rank) is not int or rank < 1:
        raise CheckpointError(f'{path}: r = {shown(rank)}: must be a whole number above 0')
    if type(alpha) not in (int, float) or not 0 < alpha < math.inf:
        raise CheckpointError(f'{path}: lora_alpha = {shown(alpha)}: must be a number above 0')
    return rank, alpha
