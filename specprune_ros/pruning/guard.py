"""Watches what pruning does to the actions, and relaxes it before the robot shows it.

Our own: no published method checks itself. Two signs are read at a rare query that is computed
both ways: the disagreement of pruned and dense actions, and how many of the patches that the
dense pass finds important the pruned pass kept (kept_share). The latter is not the recall of Eq. 1
that reports hold: that one compares two queries in a row, and cannot see what both had dropped.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from specprune_ros.config import PruneConfig
from specprune_ros.pruning.base import PruneTrace
from specprune_ros.pruning.scores import recall

ROUNDING = 1e-9  # what sums of steps may be off
GOOD_CHECKS = 3  # checks in a row that must pass before the guard takes a step back


@dataclass(frozen=True)
class GuardState:
    """What the guard has found in this episode.

    Attributes:
        extra: added to the configured alpha.
        tripped: the highest alpha did not help: queries run dense, but for those that check.
        good: checks passed in a row.
        why: what made it relax, in words; empty while nothing did.
        overdue: a check was due at a query that pruned nothing; the next one makes up for it.
    """

    extra: float = 0.0
    tripped: bool = False
    good: int = 0
    why: str = ''
    overdue: bool = False

    def alpha(self, config: PruneConfig) -> float:
        """The alpha to prune with; a live change of the configured one keeps the bound."""
        return min(config.alpha + self.extra, max(config.alpha, config.guard_alpha))


def checks_now(config: PruneConfig, query: int, overdue: bool = False) -> bool:
    """Whether a query is computed both ways, if it prunes; an episode's first never does."""
    if config.guard_every == 0:
        return False
    return overdue or (query > 0 and query % config.guard_every == 0)


def kept_share(pruned: PruneTrace, dense: PruneTrace) -> float:
    """The guard's recall: share of what matters to the dense pass that pruning kept to the end.

    Args:
        pruned, dense: of two passes over the same query.

    Returns:
        The lowest of the cameras'; NaN when the dense pass finds no patch important, or does not
        say which.
    """
    if dense.important is None:
        return math.nan
    kept = pruned.pruned_after_layer == 0
    shares = recall(kept.cpu(), dense.important.cpu()).tolist()
    return min((share for share in shares if math.isfinite(share)), default=math.nan)


def after_check(
    state: GuardState, config: PruneConfig, *, disagreement: float, recall: float
) -> GuardState:
    """The state after a query was computed both ways.

    Args:
        state: before.
        config: limits and bounds.
        disagreement: mean absolute difference of the normalised actions.
        recall: see kept_share; NaN when unknown.

    Returns:
        One step looser after a bad check, dense beyond the highest alpha; one step back towards
        the configured alpha after GOOD_CHECKS good ones.
    """
    state, reasons = replace(state, overdue=False), []
    if not disagreement <= config.guard_disagreement:  # NaN is bad
        reasons.append(f'actions differ by {disagreement:.3f}')
    if recall < config.guard_recall:
        reasons.append(f'recall {recall:.2f}')
    room = max(config.guard_alpha - config.alpha, 0.0)
    if reasons:
        tripped = state.extra >= room - ROUNDING
        extra = min(state.extra + config.guard_step, room)
        return GuardState(extra, tripped, 0, ', '.join(reasons))
    if state.tripped:
        return replace(state, tripped=False, good=0)
    good = state.good + 1
    if good < GOOD_CHECKS or state.extra == 0.0:
        return replace(state, good=good)
    extra = state.extra - config.guard_step
    return GuardState(extra, False, 0, state.why) if extra > ROUNDING else GuardState()
