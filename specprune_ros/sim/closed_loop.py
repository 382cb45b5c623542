"""A simulated task for a policy: what it decides is what happens next."""

from __future__ import annotations

import dataclasses
import math
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import islice

import numpy as np

from specprune_ros.ablation.task import Driven
from specprune_ros.config import RobotConfig
from specprune_ros.errors import ConfigError
from specprune_ros.images import CameraImage, LateImage, as_rgb
from specprune_ros.sim.libero import LiberoEnv, check_cameras
from specprune_ros.sim.state import ACTION_NAMES, STEP_NS, check_names
from specprune_ros.types import ActionSpace, ExecutedAction, Observation


@dataclass(frozen=True)
class LiberoTask:
    """An `ablation.task.Task`: one episode per seed, until LIBERO says success or time is up.

    Args:
        env: what to act in.
        robot: as the policy has it.
        open_loop_steps: of a chunk that are executed before the next query; 0: all of them. The
            policy may ask for that query earlier.

    Raises:
        ConfigError: the robot is not the simulated one, or its chunks are shorter.
    """

    env: LiberoEnv
    robot: RobotConfig
    open_loop_steps: int = 0
    closed_loop = True

    def __post_init__(self) -> None:
        check_robot(self.robot)
        if not 0 <= self.open_loop_steps <= self.robot.horizon:
            why = f'must be 1 to {self.robot.horizon}, or 0 for all of a chunk'
            raise ConfigError('open_loop_steps', self.open_loop_steps, why)

    @property
    def name(self) -> str:
        """The task's name and its instruction."""
        return f'{self.env.task.name} ({self.env.instruction})'

    @property
    def queries(self) -> int:
        """Of an episode that fails; others end earlier."""
        return math.ceil(self.env.task.max_steps / self._steps_per_query)

    @property
    def _steps_per_query(self) -> int:
        return self.open_loop_steps or self.robot.horizon

    @property
    def seeds(self) -> int:
        """Held-out episodes."""
        return self.env.task.seeds

    @property
    def seed_meaning(self) -> str:
        """Where the initial state comes from."""
        if self.env.task.shuffle is None:
            return 'is the official initial state s'
        return 'draws where the objects stand, apart from all demonstrations'

    def run(self, policy: Driven, seed: int) -> Iterator[Mapping[str, float]]:
        """One episode.

        Yields:
            Once: 'success', 1.0 or 0.0, and 'steps', control steps until the end.

        Raises:
            ConfigError: the task has no such seed.
            ObservationError, ActionError: see Policy.infer.
        """
        policy.reset()
        state = self.env.reset(seed)
        chunk: deque[np.ndarray] = deque()
        while not self.env.success and state.step < self.env.task.max_steps:
            observation = self._observation()
            if not chunk:
                chunk.extend(islice(policy.infer(observation).chunk.data, self._steps_per_query))
            executed = self._executed(chunk.popleft(), observation)
            state = self.env.step(executed.data)
            if policy.observe_executed(executed, observation.images):
                chunk.clear()
        yield {'success': float(self.env.success), 'steps': float(state.step)}

    def centres(self, name: str) -> dict[str, np.ndarray]:
        """Camera -> [2] px to the right and down, where an object or region is in an observation.

        Perhaps outside of the image, or hidden; NaN behind the camera.
        """
        seen = self.env.pixels([name])[:, 0]
        rotations = self.robot.per_camera('camera_rotations')
        return {
            camera: np.array([x, self.env.size - y]) if rotations[camera] else np.array([x, y])
            for camera, (x, y) in zip(self.env.cameras, seen, strict=True)
        }

    def _observation(self) -> Observation:
        """As the robot's cameras are mounted: one that is turned by 180 degrees is LIBERO's own.

        LIBERO renders the bottom row first, and what OpenVLA was trained on is that, turned; its
        left is our right.
        """
        observation = self.env.observation(self.robot.joint_names)
        rotations = self.robot.per_camera('camera_rotations')
        images = {
            name: LateImage(partial(_mirrored, image)) if rotations[name] else image
            for name, image in observation.images.items()
        }
        return dataclasses.replace(observation, images=images)

    def _executed(self, action: np.ndarray, observation: Observation) -> ExecutedAction:
        return ExecutedAction(
            stamp_ns=observation.stamp_ns + STEP_NS,
            names=self.robot.action_names,
            units=self.robot.per_action('action_units'),
            data=action,
            space=ActionSpace.EEF_DELTA_POSE,
            frame_id=self.robot.frame_id,
            step_dt_s=self.robot.step_dt_s,
        )


def _mirrored(image: np.ndarray | CameraImage) -> np.ndarray:
    return as_rgb(image)[::-1]


def check_robot(robot: RobotConfig) -> None:
    """Nothing, when the simulated arm can be driven as this robot.

    Raises:
        ConfigError: it has other cameras, joints, actions, or another control period.
    """
    check_cameras(robot.camera_names)
    check_names(robot.joint_names)
    wanted = {
        'action_names': ACTION_NAMES,
        'action_space': 'eef_delta_pose',
        'step_dt_s': STEP_NS / 1e9,
    }
    for name, value in wanted.items():
        if getattr(robot, name) != value:
            raise ConfigError(
                f'robot.{name}', getattr(robot, name), f'the simulated arm has {value}'
            )
