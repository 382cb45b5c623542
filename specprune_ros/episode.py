"""State of one episode: what happened since the last reset. `Policy` owns the only instance."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from specprune_ros.errors import ObservationError
from specprune_ros.images import CameraImage
from specprune_ros.pruning.motion import Motion
from specprune_ros.types import FRAMES_KEPT

Preprocess = Callable[[np.ndarray | CameraImage], np.ndarray]


@dataclass(eq=False)
class _Frame:
    step: int
    images: dict[str, np.ndarray | CameraImage]
    processed: bool


class FrameHistory:
    """The cameras' images at the last control steps, by executed step and not by wall time.

    Images are kept as they came and brought to the model's size only when a query compares with
    them: of twelve frames usually one is.
    """

    def __init__(self, depth: int = FRAMES_KEPT):
        self._frames: deque[_Frame] = deque(maxlen=depth)

    def push(
        self, step: int, images: Mapping[str, np.ndarray | CameraImage], *, processed: bool
    ) -> None:
        """Keep the images of a control step; a step that has images already keeps those."""
        if not self._frames or self._frames[-1].step < step:
            self._frames.append(_Frame(step, dict(images), processed))

    def reach(self, step: int) -> int:
        """How many control steps before `step` the oldest frame is; 0 without one."""
        return max(step - self._frames[0].step, 0) if self._frames else 0

    def reference(
        self, step: int, age: int, preprocess: Preprocess
    ) -> tuple[int, dict[str, np.ndarray]] | None:
        """The newest frame that is at least `age` steps older than `step`, else the oldest.

        Returns:
            Its true age and its images at the model's size; None when no frame is older, or when
            the frame turns out not to decode (it is then forgotten).
        """
        older = [frame for frame in self._frames if frame.step < step]
        if not older or age <= 0:
            return None
        frame = next((f for f in reversed(older) if step - f.step >= age), older[0])
        if not frame.processed:
            try:
                frame.images = {name: preprocess(image) for name, image in frame.images.items()}
            except ObservationError:
                self._frames.remove(frame)
                return None
            frame.processed = True
        return step - frame.step, frame.images


@dataclass(eq=False)
class Episode:
    """Everything that a reset clears.

    Attributes:
        epoch: which episode this is; chunks of an older one are void.
        instruction: the task; a new one starts a new episode.
        stamp_ns: stamp of the last observation.
        query: queries so far.
        step: executed control steps so far.
        step_of_query: `step` at the last query.
        displacement: [3] executed translation since the last query, unit 1.
        motion: the last executed action, None while none is known.
        fine: the controller's mode.
        memory: what the pruning method left for its next query.
        frames: camera images by control step.
        sizes: camera -> (rows, cols) of its raw images.
    """

    epoch: int
    instruction: str | None = None
    stamp_ns: int | None = None
    query: int = 0
    step: int = 0
    step_of_query: int = -1
    displacement: np.ndarray = field(default_factory=lambda: np.zeros(3))
    motion: Motion | None = None
    fine: bool = False
    memory: object | None = None
    frames: FrameHistory = field(default_factory=FrameHistory)
    sizes: dict[str, tuple[int, int]] = field(default_factory=dict)
