"""Turn what one inference did into a PruneReport."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from specprune_ros.episode import Episode
from specprune_ros.models.decoder import Decoder
from specprune_ros.pruning.base import PruneTrace
from specprune_ros.pruning.flops import flops_share, tokens_per_layer
from specprune_ros.token_layout import TokenLayout
from specprune_ros.types import ActionChunk, Mode, Observation, PruneReport

NAN = float('nan')


def input_stamps(
    observation: Observation, episode: Episode, cameras: tuple[str, ...]
) -> dict[str, object]:
    """The report's fields that name what a query read; `episode` is as before its end."""
    stamps = {
        'image_stamps_ns': [observation.image_stamps_ns.get(c, 0) for c in cameras],
        'proprio_stamps_ns': observation.proprio_stamps_ns,
        'executed_stamps_ns': [stamp for stamp, _ in episode.executed],
        'executed_image_stamps_ns': [s.get(c, 0) for _, s in episode.executed for c in cameras],
    }
    arrays = {name: np.array(values, np.int64) for name, values in stamps.items()}
    return {'query': episode.query, 'instruction': observation.instruction, **arrays}


@dataclass(frozen=True)
class View:
    """What of a camera's image the model sees.

    Attributes:
        crop_side: share of the image's side, around its centre.
        rotation_deg: camera -> by how much the image is turned first.
    """

    crop_side: float
    rotation_deg: Mapping[str, int]


def make_report(
    *,
    chunk: ActionChunk,
    layout: TokenLayout,
    trace: PruneTrace,
    episode: Episode,
    method: str,
    alpha: float,
    reference_age: int,
    view: View,
    decoder: Decoder,
    fallback: str,
    guard_disagreement: float,
    dense_passes: int,
    latency_s: dict[str, float],
) -> PruneReport:
    """The report of one query, on the host.

    Args:
        chunk: of the same inference.
        layout: of its sequence.
        trace: from its PruneRun; tensors may be on the device.
        episode: as it was when the query ran.
        method, alpha: that pruned.
        reference_age: control steps to the frame that it compared with, 0 for none.
        view: what of the images the patches cover.
        decoder: whose sizes the FLOPs model takes.
        fallback: why it ran dense, or empty.
        guard_disagreement: of pruned and dense actions; NaN where not compared.
        dense_passes: dense ones beside the one that `trace` is of; flops_share counts them.
        latency_s: field -> seconds, from StageClock.
    """
    cameras, motion = len(layout.cameras), episode.motion
    gone = trace.pruned_after_layer.cpu().numpy()
    counts = {
        'grid_rows': cameras * [layout.grid[0]],
        'grid_cols': cameras * [layout.grid[1]],
        'rotation_deg': [view.rotation_deg[name] for name in layout.cameras],
        'tokens_total': cameras * [layout.patches],
        'tokens_static': ((gone == 0) | (gone > trace.static_layer)).sum(axis=1),
        'tokens_kept': (gone == 0).sum(axis=1),
        'layer_index': trace.layer_index,
        'layer_tokens': trace.layer_tokens,
    }
    return PruneReport(
        stamp_ns=chunk.observation_stamp_ns,
        chunk_id=chunk.chunk_id,
        epoch=chunk.epoch,
        method=method,
        budget=trace.budget,
        alpha=alpha,
        mode=Mode.FALLBACK if fallback else trace.mode,
        mode_reason=mode_reason(trace, episode),
        fallback_reason=fallback,
        translation_speed=motion.translation_speed if motion else NAN,
        rotation_speed=motion.rotation_speed if motion else NAN,
        vertical_displacement=motion.vertical if motion else NAN,
        chunk_displacement=float(np.linalg.norm(episode.displacement)),
        reference_age=reference_age,
        cameras=layout.cameras,
        crop_side=view.crop_side,
        **{name: np.asarray(values, np.uint32) for name, values in counts.items()},
        recall=np.full(cameras, NAN) if trace.recall is None else _host(trace.recall),
        recall_mean=known_mean(episode.recalls, cameras),
        flops_share=decoder_share(trace, layout, decoder) + dense_passes,
        guard_disagreement=guard_disagreement,
        reason=trace.reason.cpu().numpy().reshape(-1),
        pruned_after_layer=gone.reshape(-1),
        important=_mask(trace.important),
        static_layer=trace.static_layer,
        layer_confidence=np.zeros(0) if trace.confidence is None else _host(trace.confidence),
        sequence_tokens=layout.length,
        stand_in=chunk.stand_in,
        **latency_s,
    )


def known_mean(recalls: list[np.ndarray], cameras: int) -> np.ndarray:
    """[V] mean over the queries whose recall is known; NaN where none is."""
    stacked = np.stack(recalls) if recalls else np.full((1, cameras), NAN)
    known = np.isfinite(stacked)
    total = np.where(known, stacked, 0.0).sum(axis=0)
    return np.where(known.any(axis=0), total / known.sum(axis=0).clip(1), NAN)


def decoder_share(trace: PruneTrace, layout: TokenLayout, decoder: Decoder) -> float:
    """One pass's decoder FLOPs as a share of a dense one's, by the counts measured (A.3)."""
    before = [layout.visual_count, *trace.layer_tokens]
    gone = {
        layer: had - left
        for layer, had, left in zip(trace.layer_index, before, trace.layer_tokens, strict=False)
    }
    counts = tokens_per_layer(layout.length, len(decoder.layers), gone)
    return flops_share(counts, width=decoder.width, mlp_width=decoder.mlp_width)


def mode_reason(trace: PruneTrace, episode: Episode) -> str:
    """Why a query was in its mode, in words.

    differs: the paper always knows the last executed action; while none is known, fine is safer.
    """
    motion, guard = episode.motion, episode.guard
    if trace.mode_reason:
        why = trace.mode_reason
    elif motion is None:
        why = 'no executed action is known: prune gently'
    else:
        why = (
            f'v_t {motion.translation_speed:.2f}, v_r {motion.rotation_speed:.2f}, '
            f'dz {motion.vertical:+.2f}'
        )
    relaxed = guard.extra and trace.mode != Mode.DENSE
    return f'{why}; relaxed by the guard: {guard.why}' if relaxed else why


def _mask(tensor: Tensor | None) -> np.ndarray:
    if tensor is None:
        return np.zeros(0, np.uint8)
    return tensor.cpu().numpy().astype(np.uint8).reshape(-1)


def _host(tensor: Tensor) -> np.ndarray:
    return tensor.cpu().double().numpy()
