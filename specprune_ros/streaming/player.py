"""Plays chunks: from a chunk that was taken to one command per control step."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from specprune_ros.streaming.cartesian_motion import PoseMotion, TwistMotion
from specprune_ros.streaming.chunk_checks import check_age, check_start
from specprune_ros.streaming.config import JOINT_SPACES, StreamerConfig
from specprune_ros.streaming.grippers import Grippers
from specprune_ros.streaming.joint_motion import JointMotion
from specprune_ros.streaming.measured import Measured
from specprune_ros.streaming.motion import Motion
from specprune_ros.streaming.queue import NS, ChunkQueue, Due
from specprune_ros.streaming.refusal import Refusal
from specprune_ros.streaming.targets import Command, Safety, Target
from specprune_ros.types import ActionChunk, ActionSpace, ExecutedAction


def motion_of(config: StreamerConfig) -> Motion:
    """How the configured output is made of the robot's actions.

    Raises:
        ConfigError: actions that are not joints, or no translation and rotation, or in units
            whose size is not known.
    """
    if config.robot.action_space in JOINT_SPACES:
        return JointMotion(config)
    return PoseMotion(config) if config.stream.output == 'pose' else TwistMotion(config)


class ChunkPlayer:
    """Takes chunks, and computes what is due, within the limits.

    Args:
        config: the robot, the output and the limits; not for output `chunk`.
        on_clamp: called with the refusal that clamping spared, once per chunk.

    Attributes:
        measured: the arm's state; the owner fills it.
        queue: the chunks.
        commands: commands computed.
        clamped: [A] times that a limit changed an action element.

    Raises:
        ConfigError: see `motion_of`.
    """

    def __init__(self, config: StreamerConfig, on_clamp: Callable[[Refusal], None]):
        robot, stream = config.robot, config.stream
        self._config, self._on_clamp = config, on_clamp
        self._motion, self._grippers = motion_of(config), Grippers(config)
        joints = self._motion.names if isinstance(self._motion, JointMotion) else ()
        self.measured = Measured(joints, stream.max_state_age_s)
        decay = stream.ensemble_decay if stream.blending == 'ensemble' else None
        self.queue = ChunkQueue(
            robot.step_dt_s,
            robot.horizon,
            decay,
            self._grippers.columns,
            stream.command_latency_s,
        )
        self._dt_ns = round(robot.step_dt_s * NS)
        self._sent_ns: int | None = None  # when the last command was sent
        self._commanded = None  # base of the next command; None: the measured state
        self._gripped: tuple[float, ...] | None = None  # where the grippers were sent
        self._epoch = 0  # of the newest chunk
        self._clamped_chunk: ActionChunk | None = None  # of which clamping was reported
        self.commands = 0
        self.clamped = np.zeros(len(robot.action_names), np.uint64)

    def interrupt(self, stopped_ns: int | None = None) -> None:
        """Drop the chunks; the next command starts from the measured state.

        Args:
            stopped_ns: when something was sent that stops the arm; None: nothing was.
        """
        self.queue.flush(stopped_ns)
        self._commanded, self._gripped = None, None

    def forget(self) -> None:
        """Drop all that has a time stamp."""
        self.interrupt()
        self.queue.forget()
        self.measured.forget()
        self._sent_ns = None

    def take(self, chunk: ActionChunk, rows: np.ndarray, now_ns: int) -> None:
        """Queue a chunk, whose rows [L, A] are in the robot's order.

        Raises:
            Refusal: chunk_stale, chunk_stamp, no measured state to start from, or, with
                limits.policy reject, a limit that one of the rows to come breaks.
        """
        check_age(chunk, now_ns, self._config.stream.command_timeout_s)
        check_start(chunk, now_ns)
        newest = self.queue.newest
        if newest and chunk.observation_stamp_ns < newest.chunk.observation_stamp_ns:
            raise Refusal('chunk_stale', 'its observation is older than that of the chunk before')
        candidate = self.queue.aligned(chunk, rows)
        if candidate.is_over(now_ns, self._dt_ns):
            raise Refusal('chunk_stale', 'all its rows are past')
        base = self._base(now_ns)
        if self._config.limits.policy == 'reject':
            moves = self._motion.displacements(self.queue.preview(candidate, now_ns), base)
            broken = self._broken(moves, base)
            if broken:
                raise self._beyond(broken)
        self.queue.put(candidate)
        self._epoch = chunk.epoch

    def play(self, now_ns: int) -> Command | None:
        """The command that is due now.

        Raises:
            Refusal: no chunk in time, no measured state, or a limit in the way.
        """
        base = self._base(now_ns)
        since_ns = None if self._sent_ns is None else now_ns - self._sent_ns
        # Not twice in one control period, however chunks are stamped and timers tick.
        if since_ns is not None and since_ns < self._dt_ns // 2:
            return None
        stale = self.queue.drop_unusable(now_ns, self._config.stream.command_timeout_s)
        due = self.queue.due(now_ns)
        if due is not None:
            return self._command(due, base, now_ns)
        # A chunk whose first row is for the control step after this one is in time.
        in_time = self._commanded is None or since_ns <= 2.5 * self._dt_ns
        if self.queue.newest is None or not in_time:
            code = 'chunk_stale' if stale else 'starved'
            raise Refusal(code, 'no chunk in time for the next control step')
        return None

    def safety(self, reason: str, now_ns: int) -> Safety:
        """What goes out last: see stream.on_stall; `reason` as in targets.Safety."""
        target, executed = self._safe_target(now_ns), None
        action = None if target is None else self._motion.rest(target, self._commanded)
        if action is not None:
            columns = self._motion.columns
            # Simulated time may stand still: who replays tells executed actions apart by stamp.
            stamp_ns = now_ns if self._sent_ns is None else max(now_ns, self._sent_ns + 1)
            executed = self._executed(stamp_ns, columns, action.copy(), epoch=self._epoch)
        dry_run = self._config.stream.dry_run
        target = self._with_grippers(target)
        return Safety(reason=reason, target=target, executed=executed, dry_run=dry_run)

    def _safe_target(self, now_ns: int) -> Target | None:
        how, as_joints = self._config.stream.on_stall, self._config.stream.gripper == 'joint'
        if how == 'none':
            return None
        # Grippers keep what they were told: where they were measured is no command to grip.
        if how == 'stop' or (as_joints and self._gripped is None):
            return self._motion.stop()
        try:
            return self._motion.hold(self.measured, now_ns, self._commanded)
        except Refusal:  # the measurement is missing or stale
            return self._motion.stop()

    def _base(self, now_ns: int):
        """What the next displacement starts from; a measurement has to be there in any case."""
        measured = self._motion.measured(self.measured, now_ns)
        if not self._motion.accumulates or self._commanded is None:
            return measured
        self._check_tracking(measured)
        return self._commanded

    def _check_tracking(self, measured) -> None:
        """An arm that stands still while commands go on would jump to them all at once."""
        lag, limit = self._motion.lag(self._commanded, measured), self._motion.max_lag
        behind = np.flatnonzero(lag > limit)
        if len(behind):
            columns, worst = self._motion.columns[behind], behind[np.argmax(lag[behind])]
            names = ', '.join(self._config.robot.action_names[column] for column in columns)
            why = f'{names} are up to {lag[worst]:.3f} behind, limit {limit[worst]:g}'
            raise Refusal('tracking_error', why, columns)

    def _command(self, due: Due, base, now_ns: int) -> Command:
        motion, how = self._motion, self._config.stream.gripper
        move = self._allowed(due, base)
        base = motion.moved(base, move)
        data = due.row.copy()
        data[motion.columns] = motion.action(base, move)
        if how != 'none':
            data[self._grippers.columns] = self._grippers.limited(due.row)
        self._gripped = self._grippers.positions(due.row)
        self._commanded, self._sent_ns = base, now_ns
        self.queue.executed(now_ns)
        self.commands += 1
        chunk = due.chunk
        origin = {'chunk_id': chunk.chunk_id, 'epoch': chunk.epoch, 'step': due.step}
        return Command(
            executed=self._executed(now_ns, np.arange(len(data)), data, **origin),
            target=self._with_grippers(motion.target(base, move)),
            gripper=self._gripped if how == 'position' else None,
        )

    def _allowed(self, due: Due, base) -> np.ndarray:
        """[M] the displacement that the limits leave of a row's."""
        motion = self._motion
        moves = motion.displacements(due.row[None], base)
        broken = self._broken(moves, base)
        if not broken:
            return moves[0]
        refusal, position = self._beyond(broken), motion.position(base)
        if self._config.limits.policy == 'reject':
            raise refusal
        allowed = motion.limits.clamp(moves[0], position, first=self._commanded is None)
        if allowed is None:
            raise self._beyond({'position_limit': motion.limits.outside(position)})
        self.clamped[motion.columns[allowed != moves[0]]] += np.uint64(1)
        if due.chunk is not self._clamped_chunk:
            self._clamped_chunk = due.chunk
            self._on_clamp(refusal)
        return allowed

    def _broken(self, moves: np.ndarray, base) -> dict[str, np.ndarray]:
        """Fault code -> elements, of the limits that displacements [K, M] break."""
        positions = self._motion.positions(base, moves)
        return self._motion.limits.violations(
            moves, positions, first=self._commanded is None
        )  # fmt: skip

    def _beyond(self, broken: dict[str, np.ndarray]) -> Refusal:
        elements = np.flatnonzero(np.any(list(broken.values()), axis=0))
        columns = self._motion.columns[elements]
        names = [self._config.robot.action_names[column] for column in columns]
        return Refusal(next(iter(broken)), f'{", ".join(broken)}: {", ".join(names)}', columns)

    def _executed(
        self, now_ns: int, columns: np.ndarray, data: np.ndarray, **origin: int
    ) -> ExecutedAction:
        """What was sent: `data` [K] of K action columns; `origin` is the chunk's row."""
        robot, units = self._config.robot, self._config.robot.per_action('action_units')
        return ExecutedAction(
            stamp_ns=now_ns,
            names=tuple(robot.action_names[column] for column in columns),
            units=tuple(units[column] for column in columns),
            data=data,
            space=ActionSpace[robot.action_space.upper()],
            frame_id=robot.frame_id,
            step_dt_s=robot.step_dt_s,
            dry_run=self._config.stream.dry_run,
            **origin,
        )

    def _with_grippers(self, target: Target | None) -> Target | None:
        if self._config.stream.gripper != 'joint' or target is None:
            return target
        return self._grippers.joined(target, self._gripped or ())
