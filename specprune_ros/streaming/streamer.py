"""What action_streamer does with chunks, measurements and orders: its states.

    inactive -> disabled -> waiting -> streaming -> stalled -> streaming ...
       activate   enable(True)   a chunk      a failure   the next good chunk

pause and e_stop interrupt that from anywhere. Whatever ends streaming gives one safety output, and
then there is silence.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from specprune_ros.health import has_jumped_back
from specprune_ros.streaming.chunk_checks import rows_of
from specprune_ros.streaming.config import StreamerConfig
from specprune_ros.streaming.measured import Measured
from specprune_ros.streaming.peer import Peer, Status
from specprune_ros.streaming.player import ChunkPlayer
from specprune_ros.streaming.queue import NS
from specprune_ros.streaming.refusal import Refusal
from specprune_ros.streaming.states import Orders, StreamState
from specprune_ros.streaming.targets import Command, Output, Safety
from specprune_ros.types import ActionChunk

__all__ = ['Command', 'Output', 'Safety', 'StreamState', 'Streamer']

DISABLING = ('tracking_error',)  # after these a person decides whether to go on


ENABLED = (StreamState.WAITING, StreamState.STREAMING, StreamState.STALLED)


class Streamer:
    """Commands for one robot, one per control step. Without clocks, threads and ROS.

    All times are integer nanoseconds of ROS time. Not thread-safe: all calls come from one thread.

    With stream.output `chunk` another node executes the chunks, and only that node knows what it
    executed: enabling is refused, no chunk is taken, and there is never any output.

    Args:
        config: the robot, what to do with chunks, and the limits.
        on_fault: called with the code (a key of faults.FAULTS) and message of every fault.
        stopped: an emergency stop of before, under another configuration, waits for its reset.

    Attributes:
        chunks_rejected: chunks refused whole.
        rejected: [A] times that a limit refused a chunk or command because of an element.
        fault: code and message of the newest fault; None: none since the start or the last reset.

    Raises:
        ConfigError: the configuration does not say what the commands are.
    """

    def __init__(
        self,
        config: StreamerConfig,
        on_fault: Callable[[str, str], None],
        *,
        stopped: bool = False,
    ):
        self._config, self._on_fault = config, on_fault
        plays = config.stream.output != 'chunk'
        self._player = ChunkPlayer(config, self._on_clamp) if plays else None
        self._orders = Orders(stopped=stopped)
        self._phase = StreamState.WAITING  # of a streamer that may stream
        self._peer = Peer(config.stream.peer_timeout_s)
        self._now_ns = 0
        self._pending: list[Output] = []  # safety output that no call has returned yet
        self.chunks_rejected = 0
        self.rejected = np.zeros(len(config.robot.action_names), np.uint64)
        self.fault: tuple[str, str] | None = None

    # State -----------------------------------------------------------------------------------

    @property
    def state(self) -> StreamState:
        """Where it is; never UNCONFIGURED, which is a streamer that is not made yet."""
        return self._orders.state(self._phase)

    @property
    def is_stopped(self) -> bool:
        """Whether an emergency stop waits for its reset, whatever the state."""
        return self._orders.stopped

    @property
    def epoch(self) -> int:
        """Epoch of the chunk that is streamed; 0: none."""
        return self._current.chunk.epoch if self._current else 0

    @property
    def chunk_id(self) -> int:
        """The chunk that is streamed; 0: none."""
        return self._current.chunk.chunk_id if self._current else 0

    @property
    def step(self) -> int:
        """Its row that was executed last."""
        return max(self._current.last, 0) if self._current else 0

    @property
    def queue_depth(self) -> int:
        """Rows of it that are still to come."""
        return self._player.queue.depth(self._now_ns) if self._player else 0

    @property
    def commands(self) -> int:
        """Commands computed."""
        return self._player.commands if self._player else 0

    @property
    def clamped(self) -> np.ndarray:
        """[A] times that a limit changed an action element."""
        return self._player.clamped if self._player else np.zeros_like(self.rejected)

    @property
    def _current(self):
        return self._player.queue.current if self._player else None

    # Inputs ----------------------------------------------------------------------------------

    def put_chunk(self, chunk: ActionChunk, now_ns: int) -> bool:
        """Take a chunk whole, or refuse it whole.

        Returns:
            Whether it was taken. A chunk that is refused is a fault, unless it is well-formed and
            comes while nothing is streamed (disabled, paused, stopped, inactive).
        """
        now_ns = self._at(now_ns)
        if not self._orders.active:
            return False
        try:
            rows = rows_of(chunk, self._config)
            if self.state not in ENABLED:
                return False
            self._peer.check(now_ns)
            self._peer.check_epoch(chunk.epoch)
            self._player.take(chunk, rows, now_ns)
        except Refusal as refusal:
            self.chunks_rejected += 1
            self._report(refusal, f'chunk_id = {chunk.chunk_id}: ')
            return False
        self._phase = StreamState.STREAMING
        return True

    def put_joints(
        self, stamp_ns: int, names: Sequence[str], positions: Sequence[float], now_ns: int
    ) -> None:
        """Take a joint state: names and positions [J], rad or m, in any order, extra ones ignored.

        One that lacks a joint of the action or is not finite is a fault, and ignored.
        """
        self._measure(now_ns, lambda m, now: m.put_joints(stamp_ns, names, positions, now))

    def put_pose(
        self,
        stamp_ns: int,
        position_xyz: Sequence[float],
        quaternion_xyzw: Sequence[float],
        frame_id: str,
        now_ns: int,
    ) -> None:
        """Take the end effector's pose, [3] m and [4]; a bad one is a fault, and ignored.

        So is one in another frame than robot.frame_id: a command that starts from it would lead
        elsewhere, and no limit would notice.
        """
        wanted = self._config.robot.frame_id

        def put(measured: Measured, now_ns: int) -> None:
            if frame_id != wanted:
                why = f'eef_pose.header.frame_id = {frame_id!r}, robot.frame_id = {wanted!r}'
                raise Refusal('pose_frame', why)
            measured.put_pose(stamp_ns, position_xyz, quaternion_xyzw, now_ns)

        self._measure(now_ns, put)

    def _measure(self, now_ns: int, put: Callable) -> None:
        now_ns = self._at(now_ns)
        if self._player is None:
            return
        try:
            put(self._player.measured, now_ns)
        except Refusal as refusal:
            self._report(refusal)

    def put_peer(self, running: bool, epoch: int, stamp_ns: int, now_ns: int) -> None:
        """Take vla_node's status: whether a task runs there, and the epoch of its chunks."""
        self._at(now_ns)
        self._peer.put(Status(running, epoch, stamp_ns))
        if self.state == StreamState.STREAMING and not (running and epoch == self.epoch):
            why = f'epoch {epoch} follows {self.epoch}' if running else 'vla_node runs no task'
            self._stall(Refusal('task_ended', why))

    # What the operator does ------------------------------------------------------------------

    def activate(self, now_ns: int) -> None:
        """Begin to take inputs; nothing moves before `enable`."""
        self._at(now_ns)
        self._orders.active = True

    def deactivate(self, now_ns: int) -> list[Output]:
        """End all but an emergency stop; the safety output is the last there is."""
        self._at(now_ns)
        outputs = self._halt('deactivated')
        self._orders.active = False
        self._orders.clear()
        self._forget()
        return outputs

    def enable(self, on: bool, now_ns: int) -> tuple[bool, str, list[Output]]:
        """Allow commands, or end them.

        Returns:
            Whether that took effect, why not, and outputs.
        """
        self._at(now_ns)
        refused = self._orders.why_not_enable() if on else self._orders.why_inactive()
        if on and self._player is None:
            refused = 'stream.output is chunk: another node executes the chunks'
        if refused:
            return False, refused, []
        outputs = [] if on and self._orders.enabled else self._halt('disabled')
        self._orders.enabled = on
        return True, '', outputs

    def pause(self, on: bool, now_ns: int) -> tuple[bool, str, list[Output]]:
        """Interrupt, or resume with the measured state and new chunks.

        Returns:
            As `enable`.
        """
        self._at(now_ns)
        refused = self._orders.why_not_pause()
        if refused:
            return False, refused, []
        outputs = self._halt('paused') if on else []
        self._orders.paused = on
        return True, '', outputs

    def e_stop(self, on: bool, now_ns: int) -> list[Output]:
        """The emergency stop's state. It overrides all; see `reset` for the way back."""
        self._at(now_ns)
        pressed, self._orders.e_stop = on and not self._orders.e_stop, on
        if not on:
            return []
        outputs = self._halt('e_stop')
        self._orders.stopped = True
        self._orders.clear()
        if pressed:
            self._report(Refusal('e_stop', 'release it, then ~/reset, then ~/enable'))
        return outputs

    def reset(self, now_ns: int) -> tuple[bool, str, list[Output]]:
        """Flush everything and go to DISABLED, also from an emergency stop that was released.

        Returns:
            As `enable`.
        """
        self._at(now_ns)
        refused = self._orders.why_not_reset()
        if refused:
            return False, refused, []
        outputs = self._halt('reset')
        self._orders.stopped = False
        self._orders.clear()
        if self._player:
            self._player.forget()
        self.fault = None
        return True, '', outputs

    # The control loop ------------------------------------------------------------------------

    def tick(self, now_ns: int) -> list[Output]:
        """One control step, called every robot.step_dt_s.

        Returns:
            A command, or the one safety output, or nothing.
        """
        now_ns = self._at(now_ns)
        if self.state == StreamState.STREAMING and not self._pending:
            try:
                self._peer.check(now_ns)
                command = self._player.play(now_ns)
            except Refusal as refusal:
                self._stall(refusal)
            else:
                return [command] if command else []
        pending, self._pending = self._pending, []
        return pending

    # Ends ------------------------------------------------------------------------------------

    def _at(self, now_ns: int) -> int:
        """Let time go on; when it jumped back, drop all that was stamped before."""
        back_ns = self._now_ns - now_ns
        if has_jumped_back(self._now_ns, now_ns):
            self._now_ns = now_ns
            self._forget()
            refusal = Refusal('clock_jump', f'the clock went back by {back_ns / NS:.3f} s')
            if self.state == StreamState.STREAMING:
                self._stall(refusal)
            elif self._orders.active:
                self._report(refusal)
        self._now_ns = max(self._now_ns, now_ns)
        return self._now_ns

    def _forget(self) -> None:
        """Drop all that has a time stamp."""
        self._peer.forget()
        if self._player:
            self._player.forget()

    def _stall(self, refusal: Refusal) -> None:
        """Something that streaming needs failed."""
        self._pending = self._halt(refusal.code)
        self._phase = StreamState.STALLED
        if refusal.code in DISABLING:
            self._orders.enabled = False
        self._report(refusal)

    def _halt(self, reason: str) -> list[Output]:
        """End streaming: its safety output, or one that no call has returned yet."""
        outputs, self._pending = self._pending, []
        stopped_ns = None
        if self.state == StreamState.STREAMING:
            safety = self._player.safety(reason, self._now_ns)
            outputs.append(safety)
            stopped_ns = None if safety.target is None else self._now_ns
        if self._player:
            self._player.interrupt(stopped_ns)
        self._phase = StreamState.WAITING
        return outputs

    def _on_clamp(self, refusal: Refusal) -> None:
        """A limit changed a command: a fault, but nothing was refused."""
        self._report(Refusal(refusal.code, str(refusal)), 'clamped: ')

    def _report(self, refusal: Refusal, prefix: str = '') -> None:
        self.rejected[refusal.columns] += np.uint64(1)
        self.fault = (refusal.code, f'{prefix}{refusal}')
        self._on_fault(*self.fault)
