"""A vla_node process whose policy misbehaves as it is told: `python faulty_policy.py --ros-args`.

The topic ~/mode takes: `ok`, `slow SECONDS`, `forever`, `raise`, `nan`, `oom`, `bad_input`,
`bad_pruning`, `bad_deactivate` (once) or `slow_load SECONDS`. No torch: the process starts within
a second.
"""

from __future__ import annotations

import threading
import time
from functools import partial
from types import SimpleNamespace

import numpy as np
from std_msgs.msg import String

from specprune_ros.errors import ConfigError, ObservationError
from specprune_ros.ros import qos
from specprune_ros.ros.process import spin_process
from specprune_ros.ros.vla_node import VlaNode
from specprune_ros.types import ActionChunk, Mode, PolicyResult, PruneReport


class OutOfMemoryError(RuntimeError):
    """Named as torch's."""


class FaultyPolicy:
    """Gives zeros as actions, or does what `mode` says."""

    def __init__(self, config, mode: list[str]):
        self.config, self._mode = config, mode
        robot = config.robot
        self.model = SimpleNamespace(
            info=SimpleNamespace(
                name='faulty',
                stand_in=True,
                cameras=robot.camera_names,
                parameters=7,
                horizon=robot.horizon,
            )
        )
        self._pruning, self._queries, self._chunks = config.pruning, 0, 0

    def reset(self) -> None:
        self._queries = 0

    def set_pruning(self, pruning) -> None:
        if self._mode[0] == 'bad_pruning':
            raise ConfigError('pruning.alpha', pruning.alpha, 'the policy cannot take it')
        self._pruning = pruning

    def observe_executed(self, action, images=None, image_stamps_ns=None) -> bool:
        return False

    def infer(self, observation) -> PolicyResult:
        start = time.perf_counter()
        kind, _, value = self._mode[0].partition(' ')
        self._misbehave(kind, value)
        self._queries += 1
        self._chunks += 1
        chunk = self._chunk(observation, np.nan if kind == 'nan' else 0.0)
        return PolicyResult(chunk=chunk, report=self._report(observation, start))

    def _misbehave(self, kind: str, value: str) -> None:
        if kind == 'slow':
            time.sleep(float(value))
        elif kind == 'forever':
            threading.Event().wait()
        elif kind == 'raise':
            raise ZeroDivisionError('the policy broke')
        elif kind == 'oom':
            raise OutOfMemoryError('tried to allocate 20 GiB')
        elif kind == 'bad_input':
            raise ObservationError('image_truncated', 'cameras/wrist.data', 'x', 'does not decode')

    def _chunk(self, observation, value: float) -> ActionChunk:
        robot = self.config.robot
        data = np.full((robot.horizon, len(robot.action_names)), value)
        return ActionChunk(
            stamp_ns=observation.stamp_ns,
            observation_stamp_ns=observation.stamp_ns,
            frame_id=robot.frame_id,
            step_dt_s=robot.step_dt_s,
            valid_for_s=robot.chunk_validity_s,
            chunk_id=self._chunks,
            epoch=999,  # the node's own counts
            space=2,
            names=robot.action_names,
            units=robot.per_action('action_units'),
            data=data,
            normalized=data,
            clamped=1,
            dry_run=self.config.runtime.dry_run,
            stand_in=True,
        )

    def _report(self, observation, start: float) -> PruneReport:
        cameras = self.model.info.cameras
        grid, total = np.full(len(cameras), 16, np.uint32), np.full(len(cameras), 256, np.uint32)
        zeros = np.zeros(int(total.sum()), np.uint8)
        first = self._queries == 1 or self._pruning.method == 'none'
        return PruneReport(
            stamp_ns=observation.stamp_ns,
            chunk_id=self._chunks,
            epoch=999,
            method=self._pruning.method,
            budget='union',
            alpha=self._pruning.alpha,
            mode=Mode.DENSE if first else Mode.COARSE,
            mode_reason=observation.instruction,
            cameras=cameras,
            grid_rows=grid,
            grid_cols=grid,
            rotation_deg=np.zeros(len(cameras), np.uint32),
            tokens_total=total,
            tokens_static=total,
            tokens_kept=total if first else total // 2,
            recall=np.full(len(cameras), np.nan),
            recall_mean=np.full(len(cameras), np.nan),
            reason=zeros,
            pruned_after_layer=zeros,
            latency_total_s=time.perf_counter() - start,
            stand_in=True,
        )


def load(mode: list[str], config) -> FaultyPolicy:
    """The policy, perhaps after a while."""
    kind, _, value = mode[0].partition(' ')
    if kind == 'slow_load':
        time.sleep(float(value))
    return FaultyPolicy(config, mode)


class FaultyNode(VlaNode):
    """A vla_node with a faulty policy, which listens to ~/mode from the start."""

    def __init__(self, stop: threading.Event):
        self.mode = ['ok']
        super().__init__(stop, load=partial(load, self.mode))
        self.create_subscription(String, '~/mode', self._on_mode, qos.LATCHED)

    def _halt(self) -> None:
        if self.mode[0] == 'bad_deactivate':
            self.mode[0] = 'ok'
            raise ZeroDivisionError('the transition broke')
        super()._halt()

    def _on_mode(self, msg: String) -> None:
        self.mode[0] = msg.data


if __name__ == '__main__':
    raise SystemExit(spin_process(FaultyNode))
