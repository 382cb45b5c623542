"""All variants as one policy: asked in turn about the same observations, and compared with dense.

What is measured of an answer is defined here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from specprune_ros.config import PolicyConfig, PruneConfig
from specprune_ros.errors import ObservationError
from specprune_ros.images import CameraImage, as_rgb
from specprune_ros.policy import Policy
from specprune_ros.recall import kept_recall, own_recall, supplemented_recall
from specprune_ros.types import (
    ExecutedAction,
    Mode,
    Observation,
    PolicyResult,
    PruneReport,
)

NAN = float('nan')


@dataclass(frozen=True, kw_only=True)
class QueryFigures:
    """What one variant did with one observation; NaN is unknown. Shares and recalls are 0..1.

    Attributes:
        seed: of the run.
        query: 0-based count in the run.
        stamp_ns: of the observation.
        first: first query of an episode: dense in every variant, so no figure of a table has it.
        mode: what the variant did, a name of types.Mode in lower case.
        budget: 'union', 'fixed' or ''.
        static_share: visual tokens left after static pruning.
        final_share: visual tokens left after the last layer.
        flops_share: decoder FLOPs as a share of the dense decoder's (A.3).
        recall: Eq. 1, of the variant's own important tokens, mean over cameras; the dense model's
            in its row. A pruned run scores survivors only, which V_global was among: that raises
            it.
        recall_supplemented: |V_t-1 n W| / |W| with W = V_t u V_local u V_dynamic (7.2).
        kept_static, kept_final: kept recall after static pruning and after the last layer, see
            `kept_recall`.
        action_error, action_error_max: mean and greatest absolute difference to the dense model's
            normalised actions on the same observation.
        decode_ms, total_ms: latency of the decoder, and end to end from uint8 images.
        decode_ratio, total_ratio: the dense model's latency on the same observation over this.
    """

    seed: int
    query: int
    stamp_ns: int
    first: bool
    mode: str
    budget: str
    static_share: float
    final_share: float
    flops_share: float
    recall: float
    recall_supplemented: float
    kept_static: float
    kept_final: float
    action_error: float
    action_error_max: float
    decode_ms: float
    total_ms: float
    decode_ratio: float
    total_ratio: float


class Panel:
    """Policies that answer every query together; to a task they are one policy.

    Args:
        policies: configuration -> policy, all over one model; the dense one is among them.
        dense: the configuration of that one.
        ruler: computes every query dense too, and says which tokens were important.
        lead: the configuration whose answers the task gets.
        seed: for the figures.
        tick: called after every observation.

    Attributes:
        figures: configuration -> one QueryFigures per observation.
    """

    def __init__(
        self,
        policies: Mapping[PruneConfig, Policy],
        *,
        dense: PruneConfig,
        ruler: Policy,
        lead: PruneConfig,
        seed: int,
        tick: Callable[[], None],
    ):
        self.figures: dict[PruneConfig, list[QueryFigures]] = {key: [] for key in policies}
        self._policies = dict(policies)
        self._dense = dense
        self._ruler = ruler
        self._lead = lead
        self._seed = seed
        self._tick = tick
        self._before: dict[PruneConfig, PruneReport] = {}  # of the last query
        self._asked = 0

    @property
    def config(self) -> PolicyConfig:
        """The leading policy's."""
        return self._policies[self._lead].config

    def reset(self) -> None:
        """A new episode for all."""
        for policy in self._everyone():
            policy.reset()

    def infer(self, observation: Observation) -> PolicyResult:
        """Ask all, note what they did, and answer what the leading one does.

        Raises:
            ObservationError: as Policy.infer.
            ActionError: one of them gave an action that is not finite. Nothing is noted, but those
                asked before it had a query more.
        """
        # Decoded once: latency counts from uint8 images, for everyone alike.
        images = {name: as_rgb(image) for name, image in observation.images.items()}
        observation = dataclasses.replace(observation, images=images)
        keys = list(self._policies)
        turn = self._asked % len(keys)  # whoever comes first finds cold caches: not always one
        order = keys[turn:] + keys[:turn]
        results = {key: self._policies[key].infer(observation) for key in order}
        ruler = self._ruler.infer(observation)
        for key in keys:
            self._note(key, results[key], results[self._dense], ruler)
        self._asked += 1
        self._tick()
        return results[self._lead]

    def observe_executed(
        self,
        action: ExecutedAction | None,
        images: Mapping[str, np.ndarray | CameraImage] | None = None,
    ) -> bool:
        """Tell all what was executed.

        Returns:
            What the leading policy returns.

        Raises:
            ObservationError: as Policy.observe_executed, after all were told.
        """
        decoded = {name: _decoded(image) for name, image in (images or {}).items()}
        replan, refused = False, None
        for policy in self._everyone():
            try:
                wants = policy.observe_executed(action, decoded)
            except ObservationError as error:
                refused = error
                continue
            if policy is self._policies[self._lead]:
                replan = wants
        if refused is not None:
            raise refused
        return replan

    def _everyone(self) -> list[Policy]:
        return [*self._policies.values(), self._ruler]

    def _note(
        self, key: PruneConfig, result: PolicyResult, dense: PolicyResult, ruler: PolicyResult
    ) -> None:
        before, report = self._before.get(key), result.report
        self.figures[key].append(
            QueryFigures(
                seed=self._seed,
                query=len(self.figures[key]),
                stamp_ns=report.stamp_ns,
                first=before is None or before.epoch != report.epoch,
                mode=Mode(report.mode).name.lower(),
                budget=report.budget,
                **token_figures(report, ruler.report, before),
                **action_figures(result, dense),
                **latency_figures(report, dense.report),
            )
        )
        self._before[key] = report


def token_figures(
    report: PruneReport, ruler: PruneReport, before: PruneReport | None
) -> dict[str, float]:
    """Field of QueryFigures -> its value, for all that tells of tokens.

    Args:
        report: the variant's.
        ruler: the dense model's, with its important tokens.
        before: the variant's at its last query, if there was one.
    """
    total = report.tokens_total.sum()
    static, final = kept_recall(report, ruler.important)
    return {
        'static_share': float(report.tokens_static.sum() / total),
        'final_share': float(report.tokens_kept.sum() / total),
        'flops_share': report.flops_share,
        'recall': own_recall(report if report.important.size else ruler),
        'recall_supplemented': NAN if before is None else supplemented_recall(report, before),
        'kept_static': static,
        'kept_final': final,
    }


def action_figures(result: PolicyResult, dense: PolicyResult) -> dict[str, float]:
    """Field of QueryFigures -> its value, for all that tells of actions."""
    difference = np.abs(result.chunk.normalized - dense.chunk.normalized)
    return {
        'action_error': float(difference.mean()),
        'action_error_max': float(difference.max()),
    }


def latency_figures(report: PruneReport, dense: PruneReport) -> dict[str, float]:
    """Field of QueryFigures -> its value, for all that tells of time."""
    return {
        'decode_ms': 1e3 * report.latency_decode_s,
        'total_ms': 1e3 * report.latency_total_s,
        'decode_ratio': dense.latency_decode_s / report.latency_decode_s,
        'total_ratio': dense.latency_total_s / report.latency_total_s,
    }


def _decoded(image: np.ndarray | CameraImage) -> np.ndarray | CameraImage:
    """RGB, or the image as it came where it does not decode: the policy handles that."""
    try:
        return as_rgb(image)
    except ObservationError:
        return image
