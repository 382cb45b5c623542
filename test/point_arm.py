"""A simulated arm that is a point with a gripper; `python point_arm.py --ros-args` runs it."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np

from specprune_ros.errors import ConfigError
from specprune_ros.sim.state import JOINTS, OPEN, SimState

GOAL_X = 0.05
CAMERAS = ('wrist', 'side', 'overhead')


class Point:
    """A hand that goes where it is told; done when it is far enough in x."""

    task = SimpleNamespace(name='point/0', max_steps=10**6)
    instruction = 'move away'

    def __init__(self, cameras=('wrist',), size=8, max_steps=10**6):
        self.task = SimpleNamespace(name='point/0', max_steps=max_steps)
        self._cameras, self._size = cameras, size
        self.hand, self.gripper, self.steps = np.zeros(3), OPEN, 0
        self.closed = False

    def reset(self, seed, split):
        if seed == 13:
            raise ConfigError('seed', seed, 'brings bad luck')
        self.hand, self.steps = np.array([0.0, seed, 0.0]), 0
        return self._state()

    def step(self, action):
        self.hand = self.hand + 0.001 * action[:3]
        self.gripper, self.steps = action[6], self.steps + 1
        return self._state()

    def images(self):
        image = np.zeros((self._size, self._size, 3), np.uint8)
        image[0] = 200  # bright above
        return dict.fromkeys(self._cameras, image)

    @property
    def success(self):
        return self.hand[0] > GOAL_X

    def close(self):
        self.closed = True

    def _state(self):
        return SimState(
            step=self.steps, joints=np.arange(len(JOINTS)) / 10, hand=self.hand,
            hand_xyzw=np.array([1.0, 0.0, 0.0, 0.0]), places={},
        )  # fmt: skip


class Wanderer(Point):
    """Done when it has gone far enough, whichever way: no model knows a world like this one."""

    MAX_STEPS = 200

    def __init__(self, task, cameras, size):
        super().__init__(cameras, size, self.MAX_STEPS)
        self.way = 0.0

    def reset(self, seed, split):
        self.way = 0.0
        return super().reset(seed, split)

    def step(self, action):
        self.way += 0.001 * np.linalg.norm(action[:3])
        return super().step(action)

    @property
    def success(self):
        return self.way > 0.005


if __name__ == '__main__':
    from specprune_ros.ros.process import spin_process
    from specprune_ros.ros.sim_node import SimNode

    raise SystemExit(spin_process(lambda stop: SimNode(stop, Wanderer)))
