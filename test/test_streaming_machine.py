"""Whatever chunks, states, orders and clocks come in: what may never go out."""

from typing import ClassVar

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from streaming_world import (
    CARTESIAN_ROBOT,
    DT,
    HORIZON,
    JOINT_ROBOT,
    JOINTS,
    MS,
    T0,
    config_of,
    replaced,
)  # fmt: skip

from specprune_ros.streaming.streamer import Command, Safety, Streamer, StreamState
from specprune_ros.types import ActionChunk, ActionSpace

TIMEOUT_S = 0.6
LOW, HIGH, SPEED, MAX_STEP, INITIAL = -0.3, 0.4, 1.0, 0.03, 0.045
STEP = min(SPEED * DT / 1e9, MAX_STEP)
ROUNDING = 3e-9
LIMITS = {
    'limits__position_min': [LOW], 'limits__position_max': [HIGH],
    'limits__velocity_max': [SPEED], 'limits__max_step': [MAX_STEP],
    'limits__max_initial_step': INITIAL, 'stream__command_timeout_s': TIMEOUT_S,
    'stream__dry_run': False,
}  # fmt: skip
QUIET = (
    StreamState.INACTIVE, StreamState.DISABLED, StreamState.WAITING, StreamState.PAUSED,
    StreamState.STOPPED, StreamState.STALLED,
)  # fmt: skip
WEIRD = st.sampled_from([np.nan, np.inf, -np.inf, 1e300, -1e7])
SPOILT = st.sampled_from([
    {}, {}, {}, {}, {'epoch': 99}, {'space': 3}, {'step_dt_s': 0.1}, {'stand_in': True},
    {'dry_run': True}, {'names': ('a', 'b')}, {'valid_for_s': -0.1},
    {'data': np.zeros((2, 2))}, {'observation_stamp_ns': 0}, {'stamp_ns': 2 * T0},
])  # fmt: skip


class Machine(RuleBasedStateMachine):
    """Random calls; the invariants hold for every output.

    Motion is per axis; `before` is what the next command is measured against: the command before,
    or, after a stop, the measured state of that moment.
    """

    base: ClassVar = JOINT_ROBOT
    changes: ClassVar = {}

    def __init__(self):
        super().__init__()
        self.faults: list[str] = []
        config = config_of(self.base, **{**LIMITS, **self.changes})
        self.config, self.robot = config, config.robot
        self.streamer = Streamer(config, lambda code, message: self.faults.append(code))
        self.now, self.epoch, self.running = T0, 1, True
        self.chunks: dict[int, ActionChunk] = {}
        self.at, self.measured_ns = np.zeros(3), T0
        self.before: np.ndarray | None = None
        self.executed: set[tuple[int, int]] = set()
        self.sent_ns: list[int] = []  # commands since the last safety output
        self.silent = True  # a safety output, or nothing, was the last to go out
        self.streamed = False  # the state was STREAMING after the last call

    # Calls -----------------------------------------------------------------------------------

    def call(self, name: str, *args) -> None:
        """One call, whose outputs are checked."""
        done = getattr(self.streamer, name)(*args, self.now)
        outputs = done[2] if isinstance(done, tuple) else done if isinstance(done, list) else []
        assert len(outputs) <= 1
        for output in outputs:
            self.check(output)

    def measure(self, stamp_ns: int) -> None:
        self.measured_ns = stamp_ns
        self.streamer.put_joints(stamp_ns, JOINTS, self.at, self.now)
        frame_id = self.robot.frame_id
        self.streamer.put_pose(stamp_ns, self.at, (0, 0, 0, 1), frame_id, self.now)

    def tell(self, running: bool) -> None:
        self.running = running
        self.streamer.put_peer(running, self.epoch, self.now, self.now)

    def put(self, rows: np.ndarray, latency: int, spoilt: dict) -> None:
        number = len(self.chunks) + 1
        chunk = ActionChunk(
            stamp_ns=self.now, observation_stamp_ns=self.now - latency * DT,
            frame_id=self.robot.frame_id, step_dt_s=self.robot.step_dt_s, valid_for_s=0.4,
            chunk_id=number, epoch=self.epoch, names=self.robot.action_names,
            space=ActionSpace[self.robot.action_space.upper()],
            units=self.robot.per_action('action_units'), data=rows, normalized=rows, clamped=0,
            dry_run=False, stand_in=False,
        )  # fmt: skip
        self.chunks[number] = replaced(chunk, **spoilt)
        if self.streamer.put_chunk(self.chunks[number], self.now):
            assert not spoilt
            assert self.streamer.state == StreamState.STREAMING
            self.streamed = True

    def rows(self, seed: int, scale: float) -> np.ndarray:
        """[L, A] random displacements, or positions that begin where the arm is."""
        width = len(self.robot.action_names)
        rows = np.random.default_rng(seed).uniform(-scale, scale, (HORIZON, width))
        if self.robot.action_space == 'joint_position':
            rows = np.cumsum(rows, axis=0)
            rows[:, :3] += self.at
        return rows

    @initialize()
    def begin(self):
        self.call('activate')
        self.recover()

    @rule()
    def recover(self):
        """All that it takes to be ready for the next chunk."""
        self.call('e_stop', False)
        self.call('reset')
        self.call('enable', True)
        self.at = np.clip(self.at, LOW, HIGH)
        self.measure(self.now)
        self.tell(True)

    def play(self, seed: int, scale: float, latency: int, count: int, ms: int) -> None:
        self.measure(self.now)
        self.put(self.rows(seed, scale), latency, {})
        self.run(count, ms)

    SEEDS, COUNTS = st.integers(0, 2**16), st.integers(1, HORIZON + 2)
    MILLISECONDS = st.sampled_from([50, 50, 50, 49, 51, 17, 120])

    @rule(seed=SEEDS, latency=st.integers(0, 3), count=st.integers(1, 4), ms=st.just(50))
    def play_gently(self, seed, latency, count, ms):
        self.play(seed, 0.01, latency, count, ms)

    @rule(
        seed=SEEDS, scale=st.sampled_from([0.0, 0.02, 0.1, 3.0]), latency=st.integers(0, 14),
        count=COUNTS, ms=MILLISECONDS,
    )  # fmt: skip
    def play_wildly(self, seed, scale, latency, count, ms):
        self.play(seed, scale, latency, count, ms)

    @rule(count=COUNTS, ms=MILLISECONDS)
    def run(self, count, ms):
        """The control loop for a while; the arm follows with an error, and is measured."""
        for step in range(count):
            self.now += ms * MS
            if self.before is not None:
                self.at = self.before + 0.002 * (-1) ** step
            self.measure(self.now)
            self.tell(self.running)
            self.call('tick')

    @rule(spoilt=SPOILT, value=WEIRD)
    def spoil(self, spoilt, value):
        """A chunk that must be refused, while another one may be streamed."""
        rows = self.rows(0, 0.0)
        rows[3, 1] = value
        self.put(self.rows(0, 0.0), 0, spoilt or {'data': rows})

    @rule(kind=st.sampled_from(['hand', 'bad', 'late']), by=st.floats(-0.6, 0.6), value=WEIRD)
    def sense(self, kind, by, value):
        """Somebody moves the arm; or a measurement is nonsense, or older than the last."""
        if kind == 'hand':
            self.at = self.at + by
            self.measure(self.now)
        elif kind == 'late':
            stamp_ns = min(self.now, self.measured_ns) - DT
            self.streamer.put_joints(stamp_ns, JOINTS, self.at + by, self.now)
        else:
            self.streamer.put_joints(self.now, JOINTS, (0.0, value, 0.0), self.now)
            bad = (0.0, value, 0.0), (0, 0, 0, 1)
            self.streamer.put_pose(self.now, *bad, self.robot.frame_id, self.now)

    @rule(kind=st.sampled_from(['enable', 'pause', 'e_stop']), on=st.booleans())
    def order(self, kind, on):
        self.call(kind, on)

    @rule(restart=st.booleans())
    def start_over(self, restart):
        self.call('deactivate' if restart else 'reset')
        assert self.streamer.state not in (StreamState.STREAMING, StreamState.WAITING)
        self.call('activate')
        self.call('enable', True)

    @rule(running=st.booleans(), more=st.integers(0, 1))
    def status(self, running, more):
        self.epoch += more
        self.tell(running)

    @rule(ms=st.integers(-100_000, 2000))
    def time_jumps(self, ms):
        self.now += ms * MS
        self.call('tick')
        assert ms > -10 or self.streamer.state != StreamState.STREAMING

    # What holds ------------------------------------------------------------------------------

    def check(self, output) -> None:
        if isinstance(output, Safety):
            assert not self.silent or self.streamed, 'a second safety output'
            self.silent, self.streamed = True, False
            self.check_safe(output.target)
            self.check_rest(output)
            self.before, self.sent_ns = None, []
            return
        assert isinstance(output, Command)
        assert self.streamer.state == StreamState.STREAMING
        self.silent = False
        self.check_origin(output.executed)
        self.check_motion(output)

    def check_origin(self, executed) -> None:
        chunk = self.chunks[executed.chunk_id]
        assert executed.epoch == chunk.epoch == self.epoch
        assert self.now - chunk.observation_stamp_ns <= TIMEOUT_S * 1e9
        assert self.running
        assert not chunk.stand_in
        assert not chunk.dry_run
        assert (executed.chunk_id, executed.step) not in self.executed
        self.executed.add((executed.chunk_id, executed.step))
        assert np.isfinite(executed.data).all()
        shown_ns = chunk.observation_stamp_ns - self.config.stream.command_latency_s * 1e9
        unseen = sum(shown_ns < sent_ns <= chunk.stamp_ns for sent_ns in self.sent_ns)
        assert executed.step >= unseen, 'a row that was on its way already'
        self.sent_ns.append(self.now)

    def check_motion(self, command: Command) -> None:
        sent = command.target.positions
        assert np.isfinite(sent).all()
        assert ((sent >= LOW) & (sent <= HIGH)).all()
        step = STEP if self.before is not None else min(STEP, INITIAL)
        base = self.at if self.before is None else self.before
        assert (np.abs(sent - base) <= step + ROUNDING).all()
        self.before = sent

    def check_rest(self, safety: Safety) -> None:
        """Said of the safety output: no row of a chunk, of an epoch before or now, no motion."""
        executed = safety.executed
        if executed is None:
            return
        assert executed.chunk_id == 0
        assert 0 < executed.epoch <= self.epoch
        if self.robot.action_space == 'joint_position':
            assert ((executed.data >= LOW) & (executed.data <= HIGH)).all()
        else:
            assert not executed.data.any()

    def check_safe(self, target) -> None:
        if len(target.positions):
            assert np.array_equal(target.positions, self.at)
            assert ((self.at >= LOW) & (self.at <= HIGH)).all()

    @invariant()
    def streaming_ends_with_a_safety_output(self):
        state = self.streamer.state
        assert state in (*QUIET, StreamState.STREAMING)
        if state != StreamState.STREAMING:
            # What a call other than the tick ended is told at the next tick.
            self.call('tick')
            assert self.silent
            assert self.streamer.queue_depth == self.streamer.chunk_id == 0
        self.streamed = state == StreamState.STREAMING


class SlowMachine(Machine):
    """An arm that does what it is told only four control steps later."""

    changes: ClassVar = {'limits__policy': 'clamp', 'stream__command_latency_s': 4 * DT / 1e9}


class DeltaMachine(Machine):
    """Displacements instead of positions, and an ensemble."""

    base: ClassVar = {**JOINT_ROBOT, 'robot.action_space': 'joint_delta'}
    changes: ClassVar = {'limits__policy': 'clamp', 'stream__blending': 'ensemble'}


class ClampMachine(Machine):
    """Positions, brought within the limits."""

    changes: ClassVar = {'limits__policy': 'clamp'}


class PoseMachine(Machine):
    """An end effector; the box and step limits hold for its translation."""

    base: ClassVar = {**CARTESIAN_ROBOT, 'stream.translation_unit_m': 0.5}
    changes: ClassVar = {'limits__policy': 'clamp'}

    def check_motion(self, command: Command) -> None:
        sent = command.target.position
        assert np.linalg.norm(command.target.quaternion_xyzw) == pytest.approx(1.0)
        assert np.isfinite(sent).all()
        assert ((sent >= LOW) & (sent <= HIGH)).all()
        base = self.at if self.before is None else self.before
        assert (np.abs(sent - base) <= STEP + ROUNDING).all()
        if self.before is None:
            assert np.linalg.norm(sent - base) <= INITIAL + ROUNDING
        self.before = sent

    def check_safe(self, target) -> None:
        if target is None:
            return
        held = target.position
        assert ((held >= LOW) & (held <= HIGH)).all()
        if not np.array_equal(held, self.at):  # further from the last command than one step
            assert (np.abs(held - self.before) <= STEP + ROUNDING).all()
            assert (np.abs(held - self.at) <= np.abs(self.before - self.at) + ROUNDING).all()


class TwistMachine(PoseMachine):
    """Speeds, which lead from the measured position."""

    changes: ClassVar = {'stream__output': 'twist', 'limits__policy': 'reject'}

    def check_motion(self, command: Command) -> None:
        move = command.target.linear * DT / 1e9
        assert np.isfinite(move).all()
        assert (np.abs(move) <= STEP + ROUNDING).all()
        assert (self.at + move >= LOW - ROUNDING).all()
        assert (self.at + move <= HIGH + ROUNDING).all()

    def check_safe(self, target) -> None:
        assert not np.any([target.linear, target.angular])


QUICK = settings(max_examples=12, stateful_step_count=25, deadline=None)
LONG = settings(max_examples=100, stateful_step_count=50, deadline=None)
MACHINES = (Machine, ClampMachine, SlowMachine, DeltaMachine, PoseMachine, TwistMachine)


def check_machine(machine: type[Machine], how: settings) -> None:
    case = machine.TestCase
    case.settings = how
    case('runTest').runTest()


@pytest.mark.parametrize('machine', MACHINES)
def test_nothing_unsafe_goes_out(machine):
    check_machine(machine, QUICK)


@pytest.mark.slow
@pytest.mark.parametrize('machine', MACHINES)
def test_nothing_unsafe_goes_out_in_long_runs(machine):
    check_machine(machine, LONG)
