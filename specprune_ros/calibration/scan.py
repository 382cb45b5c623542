"""One pass over a recording: scores of every layer at every query, and how pictures change.

Each query is one dense inference; its attention is reduced to a score per patch and layer
([V, N], Eq. 2) before the next layer runs, so that no attention map is kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from specprune_ros.calibration.noise import patch_power
from specprune_ros.checks import check_image
from specprune_ros.config import PolicyConfig, PruneConfig
from specprune_ros.errors import ObservationError, PruningError, SpecPruneError
from specprune_ros.images import CameraImage, as_rgb, turned
from specprune_ros.offline import run_recording
from specprune_ros.policy import Policy
from specprune_ros.pruning import scores
from specprune_ros.pruning.base import LayerProbe, PruneRun, QueryContext
from specprune_ros.pruning.specprune import SpecPrune
from specprune_ros.recordings.base import Recording
from specprune_ros.types import ExecutedAction, Observation, PolicyResult


@dataclass(frozen=True, eq=False, kw_only=True)
class QueryScores:
    """What one dense query leaves, on the host.

    Attributes:
        scores: [L, V, N] text-image attention of every layer (Eq. 2), shallow first.
        confidence: [L] omega_conf (Eq. 8).
        similarity: [V, N] to the reference frame, None at an episode's first query.
        unseen: whether a camera had no image in the reference frame.
        fine: the controller's mode.
        follows: whether the record before it is the query before it, of the same episode.
    """

    scores: Tensor
    confidence: Tensor
    similarity: Tensor | None
    unseen: bool
    fine: bool
    follows: bool


class _ScoreRun(PruneRun):
    """Prunes nothing, and scores the patches after every layer."""

    def __init__(self, config: PruneConfig, context: QueryContext, records: list[QueryScores]):
        super().__init__(context)
        self._config = config
        self._records = records
        self._scores: list[Tensor] = []
        self._entropy: list[Tensor] = []

    def after_layer(self, probe: LayerProbe) -> None:
        """Reduce the layer's attention to [V, N]."""
        whole_prompt = self._config.score_text == 'prompt'
        text = probe.text_attention(prompt=whole_prompt)
        image = self._config.score_direction == 'image_to_text'
        attention = probe.image_attention(prompt=whole_prompt) if image else text
        shape = (len(self.context.layout.cameras), self.context.layout.patches)
        self._scores.append(scores.attention_score(attention).view(shape))
        self._entropy.append(scores.attention_entropy(text))
        if probe.layer == self.context.depth:
            self._records.append(self._record())

    def memory(self) -> object:
        """Something, to tell the next query that it follows.

        Not the run itself, which would keep all runs before it.
        """
        return True

    def _record(self) -> QueryScores:
        similarity = self.context.similarity
        return QueryScores(
            scores=torch.stack(self._scores).cpu(),
            confidence=scores.layer_confidence(torch.stack(self._entropy)).cpu(),
            similarity=None if similarity is None else similarity.cpu(),
            unseen=bool(self.context.unseen),
            fine=self.context.fine and self._config.controller,
            follows=self.context.memory is not None,
        )


class ScoreRecorder(SpecPrune):
    """SpecPrune's controller and reference frames, but every query is dense and recorded.

    Attributes:
        records: of all queries, in order.
    """

    def __init__(self, config: PruneConfig):
        super().__init__(config)
        self.records: list[QueryScores] = []

    def begin(self, context: QueryContext) -> PruneRun:
        """Start one dense inference."""
        return _ScoreRun(self.config, context, self.records)


@dataclass(eq=False)
class FrameChanges:
    """How one camera's consecutive pictures differ, as the model sees them.

    Attributes:
        dissimilarity: [N] each, 1 - similarity.
        power: [N] each, mean squared pixel value of the patches in both pictures.
    """

    dissimilarity: list[np.ndarray] = field(default_factory=list)
    power: list[np.ndarray] = field(default_factory=list)


class RecordingScan:
    """Takes a policy's place in `offline.run_recording`, and watches what it is given.

    Args:
        policy: with a method that keeps its records.

    Attributes:
        config: the policy's.
        changes: camera -> how its pictures follow each other.
    """

    def __init__(self, policy: Policy):
        self.config: PolicyConfig = policy.config
        self.changes = {name: FrameChanges() for name in policy.model.info.cameras}
        self._policy = policy
        self._last: dict[str, tuple[object, Tensor]] = {}

    def infer(self, observation: Observation) -> PolicyResult:
        """One dense query.

        Raises:
            PruningError: the scores could not be recorded.
        """
        result = self._policy.infer(observation)
        if result.report.fallback_reason:
            raise PruningError(f'no scores of this query: {result.report.fallback_reason}')
        return result

    def observe_executed(
        self, action: ExecutedAction | None, images: Mapping[str, np.ndarray | CameraImage]
    ) -> bool:
        """One control step: compare every camera's new picture with its last one."""
        model, rotations = self._policy.model, self.config.robot.per_camera('camera_rotations')
        for camera in self.changes:
            image = images.get(camera)
            before, pixels_before = self._last.get(camera, (None, None))
            if image is None or image is before:
                continue
            try:
                rgb = as_rgb(image)
                check_image(camera, rgb)
            except ObservationError:
                continue
            pixels = model.preprocess([turned(rgb, rotations[camera])])
            self._last[camera] = (image, pixels)
            if pixels_before is not None:
                self._compare(camera, pixels, pixels_before)
        return self._policy.observe_executed(action, images)

    def _compare(self, camera: str, now: Tensor, before: Tensor) -> None:
        grid = self._policy.model.info.grid
        similarity = scores.patch_similarity(now, before, grid)
        power = (patch_power(now, grid) + patch_power(before, grid)) / 2
        self.changes[camera].dissimilarity.append(1.0 - similarity[0].cpu().numpy())
        self.changes[camera].power.append(power[0].cpu().numpy())


def scan_recording(
    scan: RecordingScan, recording: Recording, every: int = 0
) -> Iterator[SpecPruneError | None]:
    """Query along a recording.

    Args:
        scan: fills up as it goes.
        recording: what its policy was fitted to.
        every: control steps between queries; 0 takes the horizon.

    Yields:
        Per control step: None, or why a query was skipped.

    Raises:
        RecordingError: no query was possible.
        PruningError: the scores could not be recorded.
    """
    for outcome in run_recording(scan, recording, every=every):
        yield outcome if isinstance(outcome, SpecPruneError) else None
