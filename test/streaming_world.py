"""A streamer in a small world without ROS: its robot, its vla_node, its time."""

from __future__ import annotations

import dataclasses

import numpy as np

from specprune_ros.config_files import from_mapping
from specprune_ros.faults import FAULTS
from specprune_ros.streaming.config import StreamerConfig
from specprune_ros.streaming.streamer import Command, Safety, Streamer
from specprune_ros.types import ActionChunk, ActionSpace

MS = 1_000_000
DT = 50 * MS
T0 = 1_000_000 * MS
HORIZON = 8
JOINTS = ('j1', 'j2', 'j3')
JOINT_ROBOT = {
    'robot.action_names': [*JOINTS, 'gripper'],
    'robot.action_units': ['rad', 'rad', 'rad', '1'],
    'robot.action_space': 'joint_position',
    'robot.translation_names': [],
    'robot.rotation_names': [],
    'stream.output': 'joint_trajectory',
}
CARTESIAN_ROBOT = {
    'robot.action_space': 'eef_delta_pose',
    'stream.output': 'pose',
    'stream.translation_unit_m': 0.05,
    'stream.rotation_unit_rad': 0.5,
}


def config_of(base: dict, **changes: object) -> StreamerConfig:
    """A configuration; names use __ for the dot, e.g. stream__output='twist'."""
    values = {name.replace('__', '.'): value for name, value in changes.items()}
    common = {'robot.horizon': HORIZON, 'robot.step_dt_s': DT / 1e9}
    return from_mapping({**common, **base, **values}, StreamerConfig())


class World:
    """A streamer, active and enabled, with a fresh measured state and a running vla_node."""

    def __init__(self, base: dict = JOINT_ROBOT, *, enabled: bool = True, **changes: object):
        self.config = config_of(base, **changes)
        self.faults: list[str] = []
        self.messages: list[str] = []
        self.streamer = Streamer(self.config, self._on_fault)
        self.now = T0
        self.joints = np.zeros(len(JOINTS))
        self.position = np.array([0.4, 0.0, 0.3])
        self.quaternion = np.array([0.0, 0.0, 0.0, 1.0])
        self.running, self.epoch = True, 3
        self.outputs: list[Command | Safety] = []
        self._chunk_id = 0
        if enabled:
            self.streamer.activate(self.now)
            assert self.streamer.enable(True, self.now) == (True, '', [])
        self.refresh()

    def _on_fault(self, code: str, message: str) -> None:
        assert code in FAULTS
        assert message
        self.faults.append(code)
        self.messages.append(message)

    @property
    def state(self) -> str:
        return self.streamer.state.name

    @property
    def commands(self) -> list[Command]:
        return [output for output in self.outputs if isinstance(output, Command)]

    @property
    def safeties(self) -> list[Safety]:
        return [output for output in self.outputs if isinstance(output, Safety)]

    def refresh(self) -> None:
        """A measurement and a status of vla_node, now."""
        self.measure()
        self.streamer.put_peer(self.running, self.epoch, self.now, self.now)

    def measure(self) -> None:
        self.streamer.put_joints(self.now, JOINTS, self.joints, self.now)
        frame_id = self.config.robot.frame_id
        self.streamer.put_pose(self.now, self.position, self.quaternion, frame_id, self.now)

    def chunk(self, rows: object = 0.0, *, latency: int = 0, **changes) -> ActionChunk:
        """A chunk that is published now, `rows` broadcast to [L, A]."""
        robot = self.config.robot
        self._chunk_id += 1
        data = np.array(np.broadcast_to(rows, (robot.horizon, len(robot.action_names))), float)
        fields = {
            'stamp_ns': self.now, 'observation_stamp_ns': self.now - latency,
            'frame_id': robot.frame_id, 'step_dt_s': robot.step_dt_s,
            'valid_for_s': robot.chunk_validity_s, 'chunk_id': self._chunk_id,
            'epoch': self.epoch, 'space': ActionSpace[robot.action_space.upper()],
            'names': robot.action_names, 'units': robot.per_action('action_units'),
            'data': data, 'normalized': data, 'clamped': 0, 'dry_run': False, 'stand_in': False,
        }  # fmt: skip
        return ActionChunk(**{**fields, **changes})

    def put(self, rows: object = 0.0, **changes) -> bool:
        return self.streamer.put_chunk(self.chunk(rows, **changes), self.now)

    def tick(self, steps: int = 1, *, fresh: bool = True, after: int = DT) -> list:
        """Let time go on step by step; what came out."""
        outputs = []
        for _ in range(steps):
            self.now += after
            if fresh:
                self.refresh()
            outputs += self.streamer.tick(self.now)
        self.outputs += outputs
        return outputs

    def order(self, name: str, *args) -> list:
        """An operator's order that must be accepted; what came out."""
        done = getattr(self.streamer, name)(*args, self.now)
        if isinstance(done, tuple):
            assert done[:2] == (True, ''), done
            done = done[2]
        self.outputs += done or []
        return done or []


def ramp(step: float, width: int = 4, start: float = 0.0, horizon: int = HORIZON) -> np.ndarray:
    """[L, A] that rises by `step` per row, the first row one step above `start`."""
    rows = start + step * np.arange(1, horizon + 1)
    return np.repeat(rows[:, None], width, axis=1)


def steps(commands: list[Command]) -> list[tuple[int, int]]:
    """(chunk, row) of each command."""
    return [(c.executed.chunk_id, c.executed.step) for c in commands]


def replaced(chunk: ActionChunk, **changes) -> ActionChunk:
    return dataclasses.replace(chunk, **changes)
