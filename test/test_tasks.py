"""Tasks and epochs: one at a time, ended once, and nothing void is ever accepted."""

import math

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from specprune_ros.faults import FAULTS
from specprune_ros.tasks import NS, EndReason, Goal, NodeState, TaskEnd, TaskMachine

MAX_FAILURES, INPUT_TIMEOUT_S = 3, 2.0


class Bench:
    """A machine, how its tasks ended, and a clock."""

    def __init__(self, active: bool = True):
        self.ends: list[TaskEnd] = []
        self.machine = TaskMachine(self.ends.append)
        self.now_ns = 10 * NS
        if active:
            self.machine.configure(MAX_FAILURES, INPUT_TIMEOUT_S)
            self.machine.activate()

    def start(self, instruction: str = 'go', **limits) -> int:
        task_id, refusal = self.machine.start(Goal(instruction, **limits), self.now_ns)
        assert not refusal
        return task_id

    def wait(self, seconds: float) -> None:
        self.now_ns += round(seconds * NS)
        self.machine.tick(self.now_ns)

    @property
    def reason(self) -> EndReason:
        """Of the only task that ended."""
        (end,) = self.ends
        assert end.message
        return end.reason


@pytest.fixture
def bench() -> Bench:
    return Bench()


# States ----------------------------------------------------------------------------------------


def test_states_of_a_life():
    bench = Bench(active=False)
    machine, states = bench.machine, []
    acts = [
        lambda: machine.configure(3, 1.0),
        machine.activate,
        bench.start,
        lambda: machine.pause(True),
        lambda: machine.pause(False),
        machine.cancel,
        machine.deactivate,
        machine.cleanup,
    ]
    for act in acts:
        act()
        states.append(machine.state.name)
    assert states == [
        'INACTIVE', 'IDLE', 'RUNNING', 'PAUSED', 'RUNNING', 'IDLE', 'INACTIVE', 'UNCONFIGURED',
    ]  # fmt: skip


@pytest.mark.parametrize(
    ('prepare', 'words'),
    [
        (lambda machine: machine.deactivate(), 'activate it'),
        (lambda machine: machine.cleanup(), 'configure and activate'),
        (lambda machine: machine.e_stop(True), 'release e_stop'),
        (lambda machine: machine.hang('too long'), '~/reset'),
        (lambda machine: machine.start(Goal('first'), 0), 'task 1 runs: cancel it first'),
    ],
)
def test_no_task_starts_where_none_may(bench, prepare, words):
    prepare(bench.machine)
    before = bench.machine.task
    task_id, refusal = bench.machine.start(Goal('second'), bench.now_ns)
    assert task_id == 0
    assert words in refusal
    assert bench.machine.task is before


# Ends ------------------------------------------------------------------------------------------


def test_complete_after_its_steps(bench):
    bench.start(steps=3)
    for step in range(3):
        assert not bench.ends
        bench.machine.executed(bench.machine.epoch, chunk_id=1, step=step)
    assert bench.reason is EndReason.COMPLETED


def test_steps_of_another_epoch_are_not_this_tasks(bench):
    bench.start(steps=1)
    bench.machine.executed(bench.machine.epoch - 1)
    assert not bench.ends
    bench.machine.executed(bench.machine.epoch)  # a safety output belongs to no chunk
    assert not bench.ends
    bench.machine.executed(0)  # teleoperation, a recording
    assert bench.reason is EndReason.COMPLETED


def test_time_runs_out(bench):
    bench.start(duration_s=5.0)
    bench.wait(4.99)
    assert not bench.ends
    bench.wait(0.02)
    assert bench.reason is EndReason.TIMEOUT


def test_a_task_without_end_does_not_end(bench):
    bench.machine.instruct('go', bench.now_ns)
    bench.machine.waits('camera_stale', 'cameras/wrist', bench.now_ns)
    bench.wait(1e6)
    assert bench.machine.state is NodeState.RUNNING


def test_missing_input_for_too_long(bench):
    bench.start()
    bench.machine.waits('camera_stale', "cameras/wrist = '0.6 s old'", bench.now_ns)
    bench.wait(INPUT_TIMEOUT_S - 0.01)
    bench.machine.waits('camera_stale', "cameras/wrist = '2.6 s old'", bench.now_ns)
    assert not bench.ends
    bench.wait(0.02)
    assert bench.reason is EndReason.STALE_INPUT
    assert bench.ends[0].code == 'camera_stale'
    assert 'cameras/wrist' in bench.ends[0].message


def test_inputs_that_come_back_start_the_wait_anew(bench):
    bench.start()
    for _ in range(5):
        bench.machine.waits('camera_stale', 'cameras/wrist', bench.now_ns)
        bench.wait(INPUT_TIMEOUT_S - 0.01)
        bench.machine.task.fed()
    assert not bench.ends


def test_a_pause_is_no_missing_input(bench):
    bench.start()
    bench.machine.waits('camera_stale', 'cameras/wrist', bench.now_ns)
    bench.machine.pause(True)
    bench.wait(100.0)
    bench.machine.pause(False)
    bench.wait(100.0)
    assert not bench.ends


def test_failures_in_a_row(bench):
    bench.start()
    machine = bench.machine
    for _ in range(MAX_FAILURES - 1):
        machine.failed(machine.epoch, 'inference', 'broke')
    machine.inferred(machine.epoch)
    for _ in range(MAX_FAILURES - 1):
        machine.failed(machine.epoch, 'inference', 'broke')
    assert not bench.ends
    machine.failed(machine.epoch - 1, 'inference', 'an older epoch')
    assert not bench.ends
    machine.failed(machine.epoch, 'out_of_memory', 'no memory')
    assert bench.reason is EndReason.POLICY_ERROR
    assert bench.ends[0].code == 'out_of_memory'


def test_deactivate_ends_the_task(bench):
    bench.start()
    bench.machine.deactivate()
    assert bench.reason is EndReason.DEACTIVATED


def test_cancel_only_the_task_that_is_meant(bench):
    first = bench.start()
    assert bench.machine.cancel(first)
    second = bench.start()
    assert not bench.machine.cancel(first), 'a stale cancel stopped the next task'
    assert bench.machine.task.id == second
    assert bench.machine.cancel()
    assert [end.task_id for end in bench.ends] == [first, second]


# Topic -----------------------------------------------------------------------------------------


def test_another_instruction_replaces_its_like(bench):
    machine = bench.machine
    assert machine.instruct('open', bench.now_ns) == ''
    epoch = machine.epoch
    assert machine.instruct('open', bench.now_ns) == ''
    assert (machine.task.id, machine.epoch) == (1, epoch), 'the same instruction changes nothing'
    machine.pause(True)
    assert machine.instruct('close', bench.now_ns) == ''
    assert machine.task.id == 2
    assert machine.epoch > epoch
    assert machine.state is NodeState.PAUSED, 'a topic does not override the operator'
    assert bench.reason is EndReason.CANCELED


def test_an_instruction_does_not_push_a_task_aside(bench):
    bench.start()
    assert 'cancel it first' in bench.machine.instruct('close', bench.now_ns)
    assert bench.machine.task.goal.instruction == 'go'


# Stops -----------------------------------------------------------------------------------------


def test_emergency_stop_needs_release_and_reset(bench):
    machine = bench.machine
    bench.start()
    machine.e_stop(True)
    assert bench.reason is EndReason.ESTOP
    assert machine.state is NodeState.STOPPED
    assert 'release' in machine.reset(busy=False)
    machine.e_stop(False)
    assert machine.state is NodeState.STOPPED
    assert machine.reset(busy=False) == ''
    assert machine.state is NodeState.IDLE


def test_emergency_stop_outlives_the_lifecycle(bench):
    machine = bench.machine
    machine.e_stop(True)
    machine.cleanup()
    machine.configure(1, 1.0)
    machine.activate()
    assert machine.state is NodeState.STOPPED


def test_hung_until_it_returns_and_is_reset(bench):
    machine = bench.machine
    bench.start()
    machine.hang('2.0 s')
    assert bench.reason is EndReason.POLICY_ERROR
    assert bench.ends[0].code == 'hung'
    assert 'configure' in machine.reset(busy=True)
    assert machine.state is NodeState.FAULT
    machine.deactivate()
    machine.activate()
    assert machine.state is NodeState.FAULT
    assert machine.reset(busy=False) == ''
    assert machine.state is NodeState.IDLE


def test_cleanup_leaves_a_hung_inference_behind(bench):
    bench.machine.hang('2.0 s')
    bench.machine.cleanup()
    bench.machine.configure(1, 1.0)
    bench.machine.activate()
    assert bench.machine.state is NodeState.IDLE


def test_clock_jump_voids_and_shifts_but_does_not_end(bench):
    bench.start(duration_s=5.0)
    epoch = bench.machine.epoch
    bench.now_ns -= 8 * NS
    bench.machine.clock_jumped(-8 * NS)
    assert bench.machine.epoch > epoch
    bench.wait(4.9)
    assert not bench.ends
    bench.wait(0.2)
    assert bench.reason is EndReason.TIMEOUT


def test_rows_that_are_still_to_come(bench):
    bench.start()
    machine = bench.machine
    machine.published(machine.epoch, chunk_id=4, rows=8)
    assert machine.task.queue_depth == 8
    machine.executed(machine.epoch, chunk_id=4, step=2)
    assert machine.task.queue_depth == 5
    machine.executed(machine.epoch, chunk_id=3, step=7)
    assert machine.task.queue_depth == 5


# Any sequence ----------------------------------------------------------------------------------

FAULT_CODES = st.sampled_from(['inference', 'action', 'out_of_memory', 'camera_stale'])


class AnySequence(RuleBasedStateMachine):
    """Whatever operators, clients, inputs and the policy do."""

    def __init__(self):
        super().__init__()
        self.bench = Bench(active=False)
        self.machine = self.bench.machine
        self.started: list[int] = []
        self.asked: list[int] = []  # epochs in which a query went out
        self.void_below = 0  # epochs below are void

    def voids(self) -> None:
        """The act that ran must have raised the epoch."""
        assert self.machine.epoch > self.before
        self.void_below = self.machine.epoch

    def note(self) -> None:
        self.before = self.machine.epoch
        self.ends_before = len(self.bench.ends)

    @rule()
    def configure(self):
        self.machine.configure(MAX_FAILURES, INPUT_TIMEOUT_S)

    @precondition(lambda self: self.machine.state is NodeState.INACTIVE)
    @rule()
    def activate(self):
        self.note()
        self.machine.activate()
        self.voids()

    @rule()
    def deactivate(self):
        self.note()
        was_active = self.machine.state > NodeState.INACTIVE
        self.machine.deactivate()
        if was_active:
            self.voids()

    @rule()
    def cleanup(self):
        self.machine.cleanup()

    @rule(
        duration=st.sampled_from([1.0, 20.0, math.inf]),
        steps=st.integers(0, 3),
        topic=st.booleans(),
        words=st.sampled_from(['a', 'b']),
    )
    def start(self, duration, steps, topic, words):
        self.note()
        task = self.machine.task
        if topic:
            refusal = self.machine.instruct(words, self.bench.now_ns)
        else:
            _, refusal = self.machine.start(Goal(words, duration, steps), self.bench.now_ns)
        new = self.machine.task is not task
        assert not (refusal and new)
        if new:
            self.started.append(self.machine.task.id)
            self.voids()

    @rule(which=st.integers(0, 5))
    def cancel(self, which):
        self.note()
        task = self.machine.task
        meant = which or None
        done = self.machine.cancel(meant)
        assert done == (task is not None and meant in (None, task.id))
        if done:
            self.voids()
        else:
            assert self.machine.task is task

    @rule(on=st.booleans())
    def pause(self, on):
        self.note()
        was = self.machine.state
        refusal = self.machine.pause(on)
        if on and not refusal:
            assert self.machine.state is NodeState.PAUSED
            if was is NodeState.RUNNING:
                self.voids()

    @rule(busy=st.booleans())
    def reset(self, busy):
        self.note()
        if self.machine.reset(busy=busy) == '':
            self.voids()
            assert self.machine.task is None
            assert self.machine.state not in (NodeState.STOPPED, NodeState.FAULT)

    @rule(on=st.booleans())
    def e_stop(self, on):
        self.note()
        was = self.machine.state
        self.machine.e_stop(on)
        if on and was in (NodeState.RUNNING, NodeState.PAUSED):
            self.voids()
            assert self.machine.state is NodeState.STOPPED

    @rule()
    def hang(self):
        self.note()
        self.machine.hang('too long')
        self.voids()

    @rule(delta=st.integers(-20 * NS, -1))
    def clock_jump(self, delta):
        self.note()
        self.bench.now_ns += delta
        self.machine.clock_jumped(delta)
        self.voids()

    @precondition(lambda self: self.machine.state is NodeState.RUNNING)
    @rule()
    def query(self):
        self.asked.append(self.machine.epoch)

    @rule(code=FAULT_CODES, good=st.booleans(), data=st.data())
    def result(self, code, good, data):
        if not self.asked:
            return
        epoch = data.draw(st.sampled_from(self.asked))
        accepted = self.machine.accepts(epoch)
        assert not (accepted and epoch < self.void_below), 'a void chunk was accepted'
        assert not (accepted and self.machine.state is not NodeState.RUNNING)
        if not good:
            self.machine.failed(epoch, code, 'broke')
        elif accepted:
            self.machine.inferred(epoch)
            self.machine.published(epoch, 1, 8)

    @rule(old=st.booleans())
    def step(self, old):
        self.machine.executed(self.machine.epoch - old, 1, 0)

    @rule(code=FAULT_CODES, missing=st.booleans())
    def inputs(self, code, missing):
        if missing:
            self.machine.waits(code, 'cameras/wrist', self.bench.now_ns)
        elif self.machine.task:
            self.machine.task.fed()

    @rule(seconds=st.floats(0.0, 3.0))
    def wait(self, seconds):
        self.bench.wait(seconds)

    @invariant()
    def every_task_ends_exactly_once(self):
        ended = [end.task_id for end in self.bench.ends]
        running = [self.machine.task.id] if self.machine.task else []
        assert sorted(ended + running) == self.started == sorted(set(self.started))

    @invariant()
    def every_end_has_words_and_a_known_fault(self):
        for end in self.bench.ends[-1:]:
            assert end.message
            assert end.code in ('', *FAULTS)

    @invariant()
    def a_task_runs_only_where_it_may(self):
        runs = self.machine.state in (NodeState.RUNNING, NodeState.PAUSED)
        assert (self.machine.task is not None) == runs

    @invariant()
    def the_epoch_never_falls(self):
        assert self.machine.epoch >= getattr(self, 'highest', 0)
        self.highest = self.machine.epoch

    @invariant()
    def nothing_older_is_accepted(self):
        assert not any(self.machine.accepts(epoch) for epoch in range(self.void_below))


AnySequence.TestCase.settings = settings(max_examples=30, stateful_step_count=40, deadline=None)
TestAnySequence = AnySequence.TestCase
