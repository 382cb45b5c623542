"""What `vla_node` looks at again and again: clock, inference, the task's time, and peers."""

from __future__ import annotations

import time
from collections.abc import Callable

from rclpy.clock import JumpThreshold, TimeJump
from rclpy.duration import Duration
from rclpy.node import Node

from specprune_ros.health import Presence, has_jumped_back
from specprune_ros.ros.vla_pipeline import Pipeline, Surroundings
from specprune_ros.tasks import NS, NodeState

WATCH_S = 0.05  # how often to look
READER_GRACE_S = 1.0  # discovery takes a while: nobody is missed before
PEER_TIMEOUT_S = 1.0  # of action_streamer's heartbeat, five a second


class Watchdogs:
    """Each tells its fault, and makes the task machine follow. In the executor's thread.

    Args:
        node: whose clock is watched.
        around: what is told, and changed.
        pipeline: the node's, None while it is not configured.
    """

    def __init__(self, node: Node, around: Surroundings, pipeline: Callable[[], Pipeline | None]):
        self._around, self._machine, self._pipeline = around, around.machine, pipeline
        self._now_ns = lambda: node.get_clock().now().nanoseconds
        self._watched_ns = 0
        self._reader, self._peer = Presence(READER_GRACE_S), Presence(PEER_TIMEOUT_S)
        # Another source of time cannot come about: see params.fixed_changes.
        self._jumps = node.get_clock().create_jump_callback(
            JumpThreshold(
                min_forward=None, min_backward=Duration(nanoseconds=-1), on_clock_change=False
            ),
            post_callback=self._on_jump,
        )

    def destroy(self) -> None:
        """Look no more."""
        self._jumps.unregister()

    def peer_seen(self) -> None:
        """A sign of life of action_streamer came."""
        self._peer.seen(time.monotonic())

    def forget_peer(self) -> None:
        """It is not listened to any more."""
        self._peer.forget()

    @property
    def peer(self) -> str:
        """action_streamer: 'absent', 'alive' or 'gone'."""
        if not self._peer.is_known:
            return 'absent'
        return 'gone' if self._peer.is_gone(time.monotonic()) else 'alive'

    def look(self) -> None:
        """Look at everything, every WATCH_S."""
        self._look_at_clock()
        self._look_at_inference()
        if self._machine.task is not None:
            with self._around.acting() as machine:
                machine.tick(self._now_ns())
        self._look_at_peers()

    def _look_at_peers(self) -> None:
        now_s, pipeline, fault = time.monotonic(), self._pipeline(), self._around.fault
        if self._machine.state is not NodeState.RUNNING:
            self._reader.forget()
        elif pipeline.has_reader or not self._reader.is_known:
            self._reader.seen(now_s)
        if self._reader.went(now_s):
            fault('subscriber_gone', 'action_chunk = unread: nobody subscribes to it')
        if self._peer.went(now_s):
            fault('peer_gone', f'action_streamer = silent for {PEER_TIMEOUT_S:g} s')

    def _look_at_inference(self) -> None:
        pipeline = self._pipeline()
        if pipeline is None or self._machine.is_hung:
            return
        deadline_s = pipeline.config.runtime.inference_deadline_s
        busy_s = pipeline.worker.busy_s if pipeline.worker.is_alive else float('inf')
        if busy_s > deadline_s:
            message = f'inference = {busy_s:.2f} s: outlived its deadline of {deadline_s:g} s'
            self._around.fault('hung', message)
            # First of all, so that its result is void before it has no owner.
            with self._around.acting() as machine:
                machine.hang(message)
            self._around.once.give_up(message)

    def _look_at_clock(self) -> None:
        """rclpy tells of jumps of simulated time only; a system clock can be set back too."""
        now_ns = self._now_ns()
        if has_jumped_back(self._watched_ns, now_ns):
            self._went_back(now_ns - self._watched_ns)
        self._watched_ns = now_ns

    def _on_jump(self, jump: TimeJump) -> None:
        self._went_back(jump.delta.nanoseconds)

    def _went_back(self, delta_ns: int) -> None:
        self._watched_ns = self._now_ns()
        pipeline = self._pipeline()
        if pipeline is None:
            return
        text = f'clock = {delta_ns / NS:.3f} s: went backwards, buffers are dropped'
        self._around.fault('clock_jump', text)
        pipeline.inbox.forget_inputs()
        with self._around.acting() as machine:
            machine.clock_jumped(delta_ns)
