"""Turn what one inference did into a PruneReport."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from specprune_ros.episode import Episode
from specprune_ros.pruning.base import PruneTrace
from specprune_ros.token_layout import TokenLayout
from specprune_ros.types import ActionChunk, Mode, PruneReport

NAN = float('nan')


def make_report(
    *,
    chunk: ActionChunk,
    layout: TokenLayout,
    trace: PruneTrace,
    episode: Episode,
    method: str,
    alpha: float,
    reference_age: int,
    fallback: str,
    latency_s: dict[str, float],
) -> PruneReport:
    """The report of one query, on the host.

    Args:
        chunk: of the same inference.
        layout: of its sequence.
        trace: from its PruneRun; tensors may be on the device.
        episode: as it was when the query ran.
        method, alpha: of the configuration.
        reference_age: control steps to the frame that it compared with, 0 for none.
        fallback: why it ran dense, or empty.
        latency_s: field -> seconds, from StageClock.
    """
    cameras, motion = len(layout.cameras), episode.motion
    gone = trace.pruned_after_layer.cpu().numpy()
    counts = {
        'grid_rows': cameras * [layout.grid[0]],
        'grid_cols': cameras * [layout.grid[1]],
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
        mode_reason=trace.mode_reason or mode_reason(episode),
        fallback_reason=fallback,
        translation_speed=motion.translation_speed if motion else NAN,
        rotation_speed=motion.rotation_speed if motion else NAN,
        vertical_displacement=motion.vertical if motion else NAN,
        chunk_displacement=float(np.linalg.norm(episode.displacement)),
        reference_age=reference_age,
        cameras=layout.cameras,
        **{name: np.asarray(values, np.uint32) for name, values in counts.items()},
        recall=np.full(cameras, NAN) if trace.recall is None else _host(trace.recall),
        reason=trace.reason.cpu().numpy().reshape(-1),
        pruned_after_layer=gone.reshape(-1),
        static_layer=trace.static_layer,
        layer_confidence=np.zeros(0) if trace.confidence is None else _host(trace.confidence),
        sequence_tokens=layout.length,
        stand_in=chunk.stand_in,
        **latency_s,
    )


def mode_reason(episode: Episode) -> str:
    """Why the controller is in its mode, in words.

    differs: the paper always knows the last executed action; while none is known, fine is safer.
    """
    motion = episode.motion
    if motion is None:
        return 'no executed action is known: prune gently'
    return (
        f'v_t {motion.translation_speed:.2f}, v_r {motion.rotation_speed:.2f}, '
        f'dz {motion.vertical:+.2f}'
    )


def _host(tensor: Tensor) -> np.ndarray:
    return tensor.cpu().double().numpy()
