"""How much of what was important a query still had: Eq. 1 and the recalls of the tables."""

from __future__ import annotations

import numpy as np

from specprune_ros.types import PruneReport, Reason

NAN = float('nan')
SUPPLEMENTED = Reason.LOCAL | Reason.DYNAMIC


def kept_recall(report: PruneReport, important: np.ndarray) -> tuple[float, float]:
    """Share of the important tokens of an observation that a variant still had.

    Important is V_global that a dense run of the base configuration gives at the same observation
    (4.1.1: the top K_global of two layers, per camera). One ruler measures all variants, so that a
    variant cannot pass by calling fewer tokens important.

    Args:
        report: the variant's.
        important: [sum N_v] uint8, the ruler's.

    Returns:
        After static pruning and after the last layer, each a mean over cameras; NaN where no
        token is important.

    Source: the recall of Tables 3 and 4. The paper is silent on what it takes as important tokens
        there (V_global or another K, of a dense or of a pruned run), whether it counts after
        static pruning (Table 3 is about it) or after the layers (Table 4), and over which queries
        it averages; Table 3's 92 % and Table 4's 88 % of the same method suggest one each.
    """
    gone = report.pruned_after_layer
    masks = (gone == 0) | (gone > report.static_layer), gone == 0
    static, final = (_share(mask, important, report.tokens_total) for mask in masks)
    return static, final


def own_recall(report: PruneReport) -> float:
    """Eq. 1, mean over the cameras that have important tokens; NaN without any."""
    known = [camera.any() for camera in _by_camera(report.important, report.tokens_total)]
    recalls = report.recall[np.array(known, bool)]
    return float(recalls.mean()) if recalls.size else NAN


def supplemented_recall(report: PruneReport, before: PruneReport) -> float:
    """|V_t-1 n W| / |W| with W = V_t u V_local u V_dynamic, mean over cameras (7.2).

    Args:
        report: of this query.
        before: of the last one.

    Returns:
        NaN where static pruning did not run, or nothing was important before.
    """
    if not report.reason.any() or not before.important.any():
        return NAN
    supplemented = (report.important > 0) | (report.reason & SUPPLEMENTED > 0)
    return _share(before.important > 0, supplemented, report.tokens_total)


def _by_camera(mask: np.ndarray, sizes: np.ndarray) -> list[np.ndarray]:
    """[sum N_v] -> [N_v] per camera."""
    return np.split(mask, np.cumsum(sizes)[:-1])


def _share(members: np.ndarray, whole: np.ndarray, sizes: np.ndarray) -> float:
    """|members n whole| / |whole|, mean over the cameras whose whole is not empty."""
    pairs = zip(_by_camera(members > 0, sizes), _by_camera(whole > 0, sizes), strict=True)
    shares = [(mine & its).sum() / its.sum() for mine, its in pairs if its.any()]
    return float(np.mean(shares)) if shares else NAN
