"""An episode as a video: what the cameras see, and below it what the newest query kept of it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import cv2
import numpy as np

from specprune_ros.ablation.task import Driven
from specprune_ros.config import PolicyConfig
from specprune_ros.errors import ConfigError
from specprune_ros.images import CameraImage, as_rgb
from specprune_ros.overlay import draw_overlay
from specprune_ros.sim.state import STEP_NS
from specprune_ros.types import ExecutedAction, Observation, PolicyResult

TILE = 224  # px, width of a camera's picture
STILL_FRAMES = 15  # that the last picture stays


class Filmed:
    """A policy whose episode becomes a video, one frame per control step; closed on exit.

    Args:
        policy: that acts.
        path: of the video; its folder is made.
    """

    def __init__(self, policy: Driven, path: Path):
        self._policy, self._path = policy, path
        self._writer: cv2.VideoWriter | None = None
        self._kept: np.ndarray | None = None
        self._frame: np.ndarray | None = None

    def __enter__(self) -> Filmed:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._writer is not None:
            for _ in range(STILL_FRAMES):
                self._writer.write(self._frame)
            self._writer.release()

    @property
    def config(self) -> PolicyConfig:
        """The policy's."""
        return self._policy.config

    def reset(self) -> None:
        """A new episode begins."""
        self._policy.reset()

    def infer(self, observation: Observation) -> PolicyResult:
        """One query."""
        result = self._policy.infer(observation)
        overlays = [
            draw_overlay(as_rgb(image), result.report, name)
            for name, image in observation.images.items()
        ]
        self._kept = np.hstack([_tile(overlay) for overlay in overlays])
        return result

    def observe_executed(
        self,
        action: ExecutedAction | None,
        images: Mapping[str, np.ndarray | CameraImage] | None = None,
    ) -> bool:
        """One control step was executed."""
        if images is not None and self._kept is not None:
            live = np.hstack([_tile(as_rgb(image)) for image in images.values()])
            self._write(np.vstack((live, self._kept)))
        return self._policy.observe_executed(action, images)

    def _write(self, picture: np.ndarray) -> None:
        # A codec halves the colours: an odd side is refused.
        even = picture[: picture.shape[0] // 2 * 2, : picture.shape[1] // 2 * 2]
        self._frame = cv2.cvtColor(even, cv2.COLOR_RGB2BGR)
        if self._writer is None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            codec = cv2.VideoWriter_fourcc(*'mp4v')
            size = self._frame.shape[1::-1]
            self._writer = cv2.VideoWriter(str(self._path), codec, 1e9 / STEP_NS, size)
            if not self._writer.isOpened():
                raise ConfigError('--videos', str(self._path), 'OpenCV cannot write this video')
        self._writer.write(self._frame)


def _tile(image: np.ndarray) -> np.ndarray:
    """A picture of a tile's width."""
    height = round(image.shape[0] * TILE / image.shape[1])
    return cv2.resize(image, (TILE, height), interpolation=cv2.INTER_AREA)
