"""What may differ from the world that a policy was trained in, to find out what it needs."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import cv2
import numpy as np

from specprune_ros.errors import ConfigError
from specprune_ros.images import CameraImage, LateImage, as_rgb
from specprune_ros.sim.tasks import GREY, SHUFFLED, WANTED, WITHHELD, find_task
from specprune_ros.types import Observation

NOISE = 20.0  # standard deviation, gray levels
BLUR = 1.0  # standard deviation, px


@dataclass(frozen=True, kw_only=True)
class Disturbance:
    """A change of the simulated scene; the cameras' direction of change is drawn per episode.

    Attributes:
        camera_m: how far every camera is moved.
        camera_rad: how far it is turned.
        light: brightness of all lights, 1 is as before.
    """

    camera_m: float = 0.0
    camera_rad: float = 0.0
    light: float = 1.0


UNDISTURBED = Disturbance()


@dataclass(frozen=True, kw_only=True)
class Condition:
    """One difference.

    Attributes:
        image: what becomes of every image, [rows, cols, 3] uint8 to the same.
        instruction: a task's name and its instruction -> what the policy is told.
        scene: what the simulator changes.
    """

    image: Callable[[np.ndarray], np.ndarray] | None = None
    instruction: Callable[[str, str], str] | None = None
    scene: Disturbance = UNDISTURBED

    def seen(
        self, images: Mapping[str, np.ndarray | CameraImage]
    ) -> Mapping[str, np.ndarray | CameraImage]:
        """The images as the policy gets them."""
        if self.image is None:
            return images
        return {
            name: LateImage(lambda image=image: self.image(as_rgb(image)))
            for name, image in images.items()
        }

    def given(self, observation: Observation, task: str) -> Observation:
        """The observation as the policy gets it.

        Raises:
            ConfigError: the condition does not exist for this task.
        """
        told = observation.instruction
        return dataclasses.replace(
            observation,
            images=self.seen(observation.images),
            instruction=told if self.instruction is None else self.instruction(task, told),
        )


def _grey(image: np.ndarray) -> np.ndarray:
    return np.full_like(image, GREY)


def _noisy(image: np.ndarray) -> np.ndarray:
    """The same image gets the same noise, so that all methods meet the same."""
    rng = np.random.default_rng(zlib.crc32(image.tobytes()))
    return np.clip(image + rng.normal(0.0, NOISE, image.shape), 0, 255).astype(np.uint8)


def _blurred(image: np.ndarray) -> np.ndarray:
    return cv2.GaussianBlur(np.ascontiguousarray(image), (0, 0), BLUR)


def _another_tasks(task: str, told: str) -> str:
    suite, _, index = task.partition('/')
    if suite != SHUFFLED:
        raise ConfigError('--condition', 'wrong', f'only tasks of {SHUFFLED} share their scenes')
    return find_task(f'{SHUFFLED}/{(int(index) + 1) % len(WANTED)}').instruction


CONDITIONS: dict[str, Condition] = {
    'normal': Condition(),
    # Controls: a policy that needs what it is told it needs fails in these.
    'grey': Condition(image=_grey),
    'withheld': Condition(instruction=lambda task, told: WITHHELD),
    'wrong': Condition(instruction=_another_tasks),  # success is still that of the task
    # Robustness.
    'noise': Condition(image=_noisy),
    'blur': Condition(image=_blurred),
    'dark': Condition(scene=Disturbance(light=0.6)),
    'bright': Condition(scene=Disturbance(light=1.4)),
    'camera': Condition(scene=Disturbance(camera_m=0.01, camera_rad=0.02)),
}
