"""What the machine can do at best, measured, and the least time that a query then takes.

The floor is a roofline: every part of the model takes as long as its matrix products at the best
rate seen at the decoder's own shapes, or as its weights' way through memory, whichever is longer.
Norms, softmaxes, rotary embeddings, launches and all that pruning adds count as free.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from specprune_ros.bench.variants import IMAGE_SHAPE, Variant
from specprune_ros.models.base import VLAModel
from specprune_ros.models.decoder import Decoder
from specprune_ros.models.heads.l1 import L1RegressionHead
from specprune_ros.models.openvla_oft import OpenVLAOFT, OpenVLAParts
from specprune_ros.models.vit import VisionTower
from specprune_ros.pruning.flops import tokens_per_layer
from specprune_ros.types import PruneReport

ROUNDS = 5  # of which the best counts
CALLS = {'cuda': 20, 'cpu': 2}  # per round
COPIED_BYTES = {'cuda': 2**30, 'cpu': 2**26}


@dataclass(frozen=True)
class Ceilings:
    """Best rates seen.

    Attributes:
        matmul_flops: FLOP/s of a decoder projection, in the model's number format.
        memory_bytes: bytes/s read and written by a copy within the device's memory.
        upload_bytes: bytes/s of camera images from the host to the device.
    """

    matmul_flops: float
    memory_bytes: float
    upload_bytes: float

    def seconds(self, flops: float, moved: float) -> float:
        """The least time for so many FLOPs and bytes, one beside the other."""
        return max(flops / self.matmul_flops, moved / self.memory_bytes)

    def best_of(self, other: Ceilings) -> Ceilings:
        """The better of every rate: a busy machine shows its own only now and then."""
        rates = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return Ceilings(*map(max, rates))


@torch.inference_mode()
def measure_ceilings(variant: Variant, tokens: int) -> Ceilings:
    """Measure on the device and in the number format of a variant's model.

    Args:
        variant: its decoder's projections are multiplied with.
        tokens: rows of the unpruned sequence.
    """
    linears = [m for m in variant.policy.decoder.blocks[0].modules() if isinstance(m, nn.Linear)]
    device = linears[0].weight.device
    rates = []
    for linear in linears:
        rows = torch.randn(tokens, linear.in_features, device=device).to(linear.weight.dtype)
        spent = _best(lambda x=rows, w=linear.weight: F.linear(x, w), device)
        rates.append(2 * tokens * linear.weight.numel() / spent)
    source = torch.ones(COPIED_BYTES[device.type], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copied = _best(lambda: target.copy_(source), device)
    return Ceilings(
        matmul_flops=max(rates),
        memory_bytes=2 * source.numel() / copied,
        upload_bytes=_upload_rate(variant.cameras, device),
    )


def _upload_rate(images: int, device: torch.device) -> float:
    host = torch.zeros((images, *IMAGE_SHAPE), dtype=torch.uint8, pin_memory=_is_cuda(device))
    target = torch.empty_like(host, device=device)
    return host.numel() / _best(lambda: target.copy_(host, non_blocking=True), device)


def _best(work: Callable[[], object], device: torch.device) -> float:
    """Seconds per call in the best round; the first call, which tunes and allocates, is extra."""
    work()
    calls, spent = CALLS[device.type], []
    for _ in range(ROUNDS):
        _wait(device)
        start = time.perf_counter()
        for _ in range(calls):
            work()
        _wait(device)
        spent.append((time.perf_counter() - start) / calls)
    return min(spent)


def _wait(device: torch.device) -> None:
    if _is_cuda(device):
        torch.cuda.synchronize(device)


def _is_cuda(device: torch.device) -> bool:
    return device.type == 'cuda'


# Floors ----------------------------------------------------------------------------------------


def floors_s(
    variant: Variant, reports: Sequence[PruneReport], ceilings: Ceilings
) -> dict[str, float]:
    """Stage -> least seconds of a query, the mean over those reported; 'total' is their sum.

    Empty for a model with a course of its own: several decoder passes, or one that goes on token
    by token.
    """
    model = variant.policy.model
    if not _passes_once(model):
        return {}
    parts, cameras = model.parts, variant.cameras
    backbone = parts.vision_backbone
    towers = (backbone.featurizer, backbone.fused_featurizer)
    patches = cameras * model.info.grid[0] * model.info.grid[1]
    floors = {
        'preprocess': cameras * math.prod(IMAGE_SHAPE) / ceilings.upload_bytes,
        'vision': sum(tower_s(tower, cameras, ceilings) for tower in towers),
        'projector': linears_s(parts.projector, patches, ceilings),
        'decoder': float(
            np.mean([decoder_s(variant.policy.decoder, r, ceilings) for r in reports])
        ),
        'head': linears_s(parts.action_head, model.info.horizon, ceilings),
    }
    floors['graph'] = sum(floors[name] for name in ('vision', 'projector', 'decoder', 'head'))
    return {**floors, 'total': floors['preprocess'] + floors['graph']}


def _passes_once(model: VLAModel) -> bool:
    if not isinstance(model, OpenVLAOFT) or model.decoder.causal:
        return False
    parts: OpenVLAParts = model.parts
    return isinstance(parts.action_head, L1RegressionHead)


def tower_s(tower: VisionTower, images: int, ceilings: Ceilings) -> float:
    """Least seconds of a vision tower; its last block never runs."""
    config = tower.config
    prefix = 0 if config.registers is None else 1 + config.registers
    tokens = config.patches + prefix
    first = tower.patch_embed.proj.weight
    least = ceilings.seconds(2 * images * config.patches * first.numel(), held_bytes([first]))
    for block in tower.blocks[:-1]:
        attention = 4 * images * tokens**2 * config.width
        least += linears_s(block, images * tokens, ceilings, attention)
    return least


def decoder_s(decoder: Decoder, report: PruneReport, ceilings: Ceilings) -> float:
    """Least seconds of one decoder pass with the rows that a report tells of."""
    counts = rows_per_layer(report, len(decoder.layers))
    width = decoder.layers[0].self_attn.o_proj.in_features
    return sum(
        linears_s(layer, rows, ceilings, 4 * rows**2 * width)
        for layer, rows in zip(decoder.layers, counts, strict=True)
    )


def rows_per_layer(report: PruneReport, depth: int) -> list[int]:
    """[depth] rows of the hidden states that every layer computed."""
    left = report.layer_tokens.astype(int).tolist()
    before = [int(report.tokens_total.sum()), *left]
    gone = {
        int(layer): had - has
        for layer, had, has in zip(report.layer_index, before, left, strict=False)
    }
    return tokens_per_layer(report.sequence_tokens, depth, gone)


def linears_s(module: nn.Module, rows: int, ceilings: Ceilings, more_flops: float = 0.0) -> float:
    """Least seconds of all linear maps in a module, over so many rows."""
    weights = [m.weight for m in module.modules() if isinstance(m, nn.Linear)]
    flops = 2 * rows * sum(weight.numel() for weight in weights) + more_flops
    return ceilings.seconds(flops, held_bytes(weights))


def held_bytes(weights: Sequence[Tensor]) -> int:
    """Bytes of tensors."""
    return sum(weight.numel() * weight.element_size() for weight in weights)
