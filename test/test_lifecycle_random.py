"""Random lifecycle transitions and service calls to both nodes: a model predicts every answer.

The full walk: SPECPRUNE_CALLS=1000 python -m pytest test/test_lifecycle_random.py -s
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pytest

rclpy = pytest.importorskip('rclpy', reason='no ROS here: source one, or run scripts/test.sh')
pytest.importorskip('specprune_ros.msg', reason='messages are not built: run scripts/setup.sh')

from lifecycle_msgs.srv import ChangeState, GetState  # noqa: E402
from ros_world import START_S, ros_domain  # noqa: E402
from soak_world import STREAMER, VLA, SoakWorld, Usage  # noqa: E402
from std_srvs.srv import SetBool, Trigger  # noqa: E402

from specprune_ros.ros.lifecycle import TRANSITIONS  # noqa: E402
from specprune_ros.srv import InferOnce, StartTask  # noqa: E402

pytestmark = [pytest.mark.ros, pytest.mark.slow]
CALLS, SEED = int(os.environ.get('SPECPRUNE_CALLS', 150)), 3
ANSWER_S = 5.0  # the longest that any call may take
SETTLE_S = 5.0  # until the status shows a change
LEAK_MB = 5.0  # per 1,000 calls
MEASURABLE = 500  # calls; fewer do not tell a leak from an allocator's next page
PATIENT = {  # no task ends by itself
    'runtime.task_timeout_s': 0.0,
    'runtime.input_timeout_s': 3600.0,
    'runtime.inference_deadline_s': 60.0,
    'runtime.query_rate_hz': 20.0,
}
# A busy machine lets the arm lag behind; who disables the streamer then is not in the model.
FOLLOWED = {'limits.max_tracking_error': 10.0}
# transition -> lifecycle before and after
STEPS = {
    'configure': ('unconfigured', 'inactive'),
    'activate': ('inactive', 'active'),
    'deactivate': ('active', 'inactive'),
    'cleanup': ('inactive', 'unconfigured'),
}
BOGUS = 99  # no transition
# An inference does not hang here; whether a chunk is there already is the machine's speed.
VLA_STATES = {'UNCONFIGURED', 'INACTIVE', 'IDLE', 'RUNNING', 'PAUSED', 'STOPPED'}
STREAMER_STATES = {'UNCONFIGURED', 'INACTIVE', 'DISABLED', 'PAUSED', 'STOPPED'}


@pytest.fixture(autouse=True, scope='module')
def context():
    """One ROS domain for this file's test and its processes."""
    with ros_domain(31):
        yield


# The model ---------------------------------------------------------------------------------------


@dataclass
class Model:
    """What either node is after all the calls so far.

    Attributes:
        button: the emergency stop's last message.
        label: of the lifecycle.
        heard: the emergency stop as the node heard it: while configured.
        stopped: by it, until a reset.
        paused: as asked.
    """

    button: bool = False
    label: str = 'unconfigured'
    heard: bool = False
    stopped: bool = False
    paused: bool = False

    @property
    def is_active(self) -> bool:
        return self.label == 'active'

    def press(self, on: bool) -> None:
        self.button = on
        if self.label != 'unconfigured':
            self.hear()

    def hear(self) -> None:
        raise NotImplementedError

    def change(self, transition: str) -> bool:
        """A transition; whether it is one from here."""
        before, after = STEPS.get(transition, ('', ''))
        if before != self.label:
            return False
        self.label = after
        if transition == 'configure':
            self.configured()
        if transition == 'deactivate':
            self.deactivated()
        return True

    def configured(self) -> None:
        self.hear()

    def deactivated(self) -> None:
        self.paused = False


@dataclass
class VlaModel(Model):
    """vla_node: its emergency stop outlives everything but a reset."""

    task: bool = False

    def hear(self) -> None:
        if self.button and not self.heard:
            self.stopped, self.task, self.paused = True, False, False
        self.heard = self.button

    def deactivated(self) -> None:
        self.task = self.paused = False

    def states(self) -> set[str]:
        if not self.is_active:
            return {self.label.upper()}
        if self.stopped:
            return {'STOPPED'}
        if not self.task:
            return {'IDLE'}
        return {'PAUSED' if self.paused else 'RUNNING'}

    def start(self) -> bool:
        accepted = self.is_active and not self.stopped and not self.task
        self.task |= accepted
        return accepted

    def cancel(self) -> bool:
        had, self.task, self.paused = self.task, False, False
        return had

    def pause(self, on: bool) -> bool:
        if on and not self.task:
            return False
        self.paused = on
        return True

    def reset(self) -> bool:
        if self.heard or not self.is_active:
            return False
        self.stopped = self.task = self.paused = False
        return True

    def set_dense(self) -> bool:
        return self.label != 'unconfigured'

    def infer_once(self) -> bool | None:
        """None: it depends on the inputs, which take a moment to come."""
        return None if self.is_active else False


@dataclass
class StreamerModel(Model):
    """action_streamer: a new configuration hears the button anew; a stop outlives it."""

    enabled: bool = False

    def hear(self) -> None:
        self.heard = self.button
        if self.button:
            self.stopped, self.enabled, self.paused = True, False, False

    def configured(self) -> None:
        self.heard = False
        super().configured()

    def deactivated(self) -> None:
        self.enabled = self.paused = False

    def states(self) -> set[str]:
        if not self.is_active:
            return {self.label.upper()}
        if self.stopped:
            return {'STOPPED'}
        if self.paused:
            return {'PAUSED'}
        return {'WAITING', 'STREAMING', 'STALLED'} if self.enabled else {'DISABLED'}

    def enable(self, on: bool) -> bool:
        if not self.is_active or (on and (self.stopped or self.paused)):
            return False
        self.enabled = on
        return True

    def pause(self, on: bool) -> bool:
        if not self.is_active or self.stopped:
            return False
        self.paused = on
        return True

    def reset(self) -> bool:
        if not self.is_active or self.heard:
            return False
        self.stopped = self.enabled = self.paused = False
        return True


# The calls ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Call:
    """A service call; what the model says it must answer, None: either."""

    node: str
    kind: type
    service: str
    request: object
    predict: Callable[[Model], bool | None]

    @property
    def name(self) -> str:
        return f'{self.node}/{self.service}'

    @property
    def key(self) -> tuple[str, object]:
        """The service, and what tells its requests apart."""
        request = self.request
        if isinstance(request, ChangeState.Request):
            return self.service, request.transition.id
        return self.service, getattr(request, 'data', getattr(request, 'instruction', None))


def switch(node: str, service: str, predict: Callable[[Model, bool], bool]) -> list[Call]:
    return [
        Call(node, SetBool, service, SetBool.Request(data=on), lambda m, on=on: predict(m, on))
        for on in (True, False)
    ]


def transitions(node: str) -> list[Call]:
    ids = {**TRANSITIONS, 'bogus': BOGUS}
    calls = []
    for name, number in ids.items():
        request = ChangeState.Request()
        request.transition.id = number
        calls.append(
            Call(node, ChangeState, 'change_state', request, lambda m, n=name: m.change(n))
        )
    return calls


def starts() -> list[Call]:
    good = StartTask.Request(instruction='go')
    bad = [StartTask.Request(), StartTask.Request(instruction='go', max_duration_s=float('nan'))]
    return [
        Call(VLA, StartTask, 'start_task', good, VlaModel.start),
        *(Call(VLA, StartTask, 'start_task', each, lambda m: False) for each in bad),
    ]


def all_calls() -> list[Call]:
    once = InferOnce.Request(instruction='look')
    return [
        *transitions(VLA),
        *transitions(STREAMER),
        *starts(),
        Call(VLA, Trigger, 'cancel_task', Trigger.Request(), VlaModel.cancel),
        Call(VLA, Trigger, 'reset', Trigger.Request(), VlaModel.reset),
        Call(VLA, InferOnce, 'infer_once', once, VlaModel.infer_once),
        *switch(VLA, 'pause', VlaModel.pause),
        *switch(VLA, 'set_dense', lambda m, on: m.set_dense()),
        Call(STREAMER, Trigger, 'reset', Trigger.Request(), StreamerModel.reset),
        *switch(STREAMER, 'pause', StreamerModel.pause),
        *switch(STREAMER, 'enable', StreamerModel.enable),
    ]


@dataclass
class Walk:
    """Random calls to both nodes.

    Attributes:
        slowest_s: the longest that an answer took, by call.
        taken: calls that took effect (True) and that were refused (False).
        visited: how often a call left a node in a state.
    """

    world: SoakWorld
    random: np.random.Generator
    models: dict[str, Model] = field(
        default_factory=lambda: {VLA: VlaModel(), STREAMER: StreamerModel()}
    )
    slowest_s: Counter[str] = field(default_factory=Counter)
    taken: Counter[bool] = field(default_factory=Counter)
    visited: Counter[tuple[str, str]] = field(default_factory=Counter)
    clients: dict[tuple[str, str], object] = field(default_factory=dict)

    def step(self, calls: list[Call]) -> None:
        """One call, or the emergency stop's button."""
        # Else most calls would find a node that is unconfigured or stopped.
        button, draw = self.models[VLA].button, self.random.random()
        if draw < (0.25 if button else 0.04):
            self.press(not button)
        elif draw < 0.5:
            self.act(self.onwards(calls))
        else:
            self.act(calls[self.random.integers(len(calls))])

    def onwards(self, calls: list[Call]) -> Call:
        """The call that brings one of the nodes nearer to motion, or to a pause of it."""
        node = str(self.random.choice([VLA, STREAMER]))
        model = self.models[node]
        if not model.is_active:
            name = 'configure' if model.label == 'unconfigured' else 'activate'
            wanted = ('change_state', TRANSITIONS[name])
        elif model.stopped:
            wanted = ('reset', None)
        elif model.paused:
            wanted = ('pause', False)
        elif model.states() & {'RUNNING', 'STREAMING'}:
            wanted = ('pause', True)
        else:
            wanted = ('start_task', 'go') if node == VLA else ('enable', True)
        return next(call for call in calls if call.node == node and call.key == wanted)

    def press(self, on: bool) -> None:
        self.world.stop(on)
        for model in self.models.values():
            model.press(on)
        self.world.run(0.2)
        self.settle('e_stop')

    def act(self, call: Call) -> None:
        model = self.models[call.node]
        said, before = self.answer(call), str(model)
        wanted = call.predict(model)
        if call.service == 'enable' and wanted and not said[0] and 'nobody subscribes' in said[1]:
            end = time.monotonic() + SETTLE_S  # discovery of the controller takes a moment
            while not said[0] and time.monotonic() < end:
                self.world.run(0.1)
                said = self.answer(call)
        assert wanted in (None, said[0]), (call.name, call.request, said, before)
        assert said[0] or said[1] or call.kind is ChangeState, f'{call.name} gives no reason'
        self.taken[said[0]] += 1
        if call.kind is ChangeState and said[0]:
            self.world.run(0.2)  # a latched e_stop arrives at who was configured
        self.settle(call.name)

    def answer(self, call: Call) -> tuple[bool, str]:
        """Whether it took effect, and why not."""
        start = time.monotonic()
        answer = self.ask(call.node, call.kind, call.service, call.request)
        name = call.name
        self.slowest_s[name] = max(self.slowest_s[name], time.monotonic() - start)
        taken = answer.accepted if call.kind is StartTask else answer.success
        return bool(taken), getattr(answer, 'message', '')

    def ask(self, node: str, kind: type, service: str, request: object):
        client = self.clients.get((node, service))
        if client is None:
            client = self.world.create_client(kind, f'{node}/{service}')
            self.clients[node, service] = client
            assert self.world.run(START_S, client.service_is_ready), service
        future = client.call_async(request)
        assert self.world.run(ANSWER_S, future.done), f'{node}/{service} was not answered'
        return future.result()

    def settle(self, after: str) -> None:
        """Both nodes are, and say they are, what the models say."""
        for node, state in {VLA: self.world_state, STREAMER: self.stream_state}.items():
            model = self.models[node]
            reached = self.world.run(SETTLE_S, lambda s=state, m=model: s() in m.states())
            assert reached, (after, node, state(), model, self.world.explain())
            self.visited[node, state()] += 1
            label = self.ask(node, GetState, 'get_state', GetState.Request()).current_state.label
            assert label == model.label, (after, node, label, model)

    def world_state(self) -> str:
        return self.world.state.name

    def stream_state(self) -> str:
        return self.world.stream_state().name

    def usage(self, calls: list[Call]) -> dict[str, Usage]:
        """Of both, unconfigured: what a configuration made must be gone."""
        down = [('change_state', TRANSITIONS[name]) for name in ('deactivate', 'cleanup')]
        for key in down:
            for call in (each for each in calls if each.key == key):
                self.act(call)
        self.world.run(0.5)
        return self.world.usage()


def walk(seed: int, count: int) -> tuple[Walk, dict[str, Usage], dict[str, Usage]]:
    """So many calls; and what both processes held after a third of them, and in the end."""
    with SoakWorld() as world:
        run, calls = Walk(world, np.random.default_rng(seed)), all_calls()
        for name in (VLA, STREAMER):
            world.start(name, PATIENT if name == VLA else FOLLOWED)
        for i in range(count):
            if i == count // 3:
                before = run.usage(calls)
            run.step(calls)
        after = run.usage(calls)
        world.check()
        for process in world.processes.values():
            assert process.stop()[0] == 0, process.output()
        return run, before, after


@pytest.mark.timeout(300 + 2 * CALLS)
def test_any_order_of_calls():
    start = time.monotonic()
    run, before, after = walk(SEED, CALLS)
    seconds, since = time.monotonic() - start, CALLS - CALLS // 3
    name, slowest = run.slowest_s.most_common(1)[0]
    print(f'{sum(run.taken.values())} calls in {seconds:.0f} s, {run.taken[True]} took effect; '
          f'slowest answer: {name}, {1e3 * slowest:.0f} ms')  # fmt: skip
    print(f'states after a call: { {" ".join(key): n for key, n in run.visited.items()} }')
    assert {state for node, state in run.visited if node == VLA} >= VLA_STATES
    assert {state for node, state in run.visited if node == STREAMER} >= STREAMER_STATES
    assert min(run.taken.values()) > 0.1 * CALLS
    for node in (VLA, STREAMER):
        growth = 1e3 * (after[node].rss_mb - before[node].rss_mb) / since
        print(f'{node}: {growth:+.2f} MB per 1,000 calls over {since}, threads '
              f'{before[node].threads} -> {after[node].threads}, files '
              f'{before[node].files} -> {after[node].files}')  # fmt: skip
        assert after[node].threads <= before[node].threads
        assert after[node].files <= before[node].files + 2
        assert since < MEASURABLE or growth < LEAK_MB
