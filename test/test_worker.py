"""The inference thread with a policy of our own making, and what `/diagnostics` counts."""

import gc
import sys
import threading
import time
import weakref
from types import SimpleNamespace

import numpy as np
import pytest

from specprune_ros import health as health_module
from specprune_ros.config import PruneConfig, RobotConfig, RuntimeConfig
from specprune_ros.errors import ActionError, ConfigError, ObservationError, SpecPruneError
from specprune_ros.health import (
    REPEAT_S,
    Health,
    Presence,
    free_gpu_memory,
    gpu_memory,
    keep_ratio,
)
from specprune_ros.inbox import Inbox
from specprune_ros.types import Mode, PruneReport
from specprune_ros.worker import (
    GIVE_WAY_S,
    MAX_STEPS,
    InferenceWorker,
    Job,
    LoadingThread,
    SpareThread,
    fault_code,
)

SOON = 5.0  # seconds within which a thread surely did what it was told
ABSENT = 0.05  # seconds after which what did not happen will not


class FakePolicy:
    """Writes down its calls; `infer` waits while `gate` is closed, and raises what it is given."""

    def __init__(self):
        self.calls: list[tuple[str, object]] = []
        self.gate = threading.Event()
        self.gate.set()
        self.started = threading.Semaphore(0)

    def infer(self, observation):
        self.calls.append(('infer', observation))
        self.started.release()
        assert self.gate.wait(SOON)
        if isinstance(observation, Exception):
            raise observation
        return f'result of {observation}'

    def observe_executed(self, action, images, image_stamps_ns=None):
        self.calls.append(('step', action))
        if isinstance(action, Exception):
            raise action

    def set_pruning(self, pruning):
        self.calls.append(('pruning', pruning))
        if isinstance(pruning, Exception):
            raise pruning

    def reset(self):
        self.calls.append(('reset', None))


class Bench:
    """A worker, and everything it handed out."""

    def __init__(self):
        self.policy = FakePolicy()
        self.results: list[tuple[int, object]] = []
        self.errors: list[Exception] = []
        self.failed: list[int | None] = []  # tickets of the queries that they ended
        self._came = threading.Semaphore(0)
        self.worker = InferenceWorker(self.policy, self._on_result, self._on_error)

    def _on_result(self, job, result):
        self.results.append((job.ticket, result))
        self._came.release()
        if result == 'result of poison':
            raise RuntimeError('the publisher broke')

    def _on_error(self, error, job):
        self.errors.append(error)
        self.failed.append(None if job is None else job.ticket)
        self._came.release()

    def submit(self, ticket: int, observation: object = 'scene') -> None:
        self.worker.submit(Job(ticket, observation))

    def hold(self, ticket: int) -> None:
        """Make the worker busy with one job until the gate opens."""
        self.policy.gate.clear()
        self.submit(ticket)
        assert self.policy.started.acquire(timeout=SOON)

    def wait(self, count: int = 1) -> None:
        """Until so many results or errors came."""
        for _ in range(count):
            assert self._came.acquire(timeout=SOON)

    def nothing_more(self) -> bool:
        return not self._came.acquire(timeout=ABSENT)


@pytest.fixture
def bench():
    bench = Bench()
    yield bench
    bench.policy.gate.set()
    assert bench.worker.stop(SOON)


def calls(bench: Bench, *kinds: str) -> list:
    return [call for call in bench.policy.calls if not kinds or call[0] in kinds]


# Jobs ------------------------------------------------------------------------------------------


def test_result_comes_with_its_job(bench):
    bench.submit(7, 'kitchen')
    bench.wait()
    assert bench.results == [(7, 'result of kitchen')]
    assert bench.errors == []


def test_latest_observation_wins_while_busy(bench):
    bench.hold(1)
    for ticket in (2, 3, 4):
        bench.submit(ticket)
    bench.policy.gate.set()
    bench.wait(2)
    assert [ticket for ticket, _ in bench.results] == [1, 4]
    assert bench.nothing_more()


def test_submitting_never_waits(bench):
    bench.hold(1)
    before = time.monotonic()
    for ticket in range(100):
        bench.submit(ticket)
        bench.worker.observe('step', {})
        bench.worker.reset()
    assert time.monotonic() - before < 1.0


def test_an_exception_is_handed_over_and_the_thread_goes_on(bench):
    faults = [RuntimeError('out of memory'), ActionError('not finite'), ZeroDivisionError()]
    for ticket, fault in enumerate(faults):
        bench.submit(ticket, fault)
        bench.wait()
    assert bench.errors == faults
    assert bench.failed == [0, 1, 2]
    bench.submit(9)
    bench.wait()
    assert [ticket for ticket, _ in bench.results] == [9]


def test_a_callback_that_fails_is_handed_over_too(bench):
    bench.submit(1, 'poison')
    bench.wait(2)
    assert [str(error) for error in bench.errors] == ['the publisher broke']
    bench.submit(2)
    bench.wait()
    assert [ticket for ticket, _ in bench.results] == [1, 2]


# Steps, pruning, reset -------------------------------------------------------------------------


def test_steps_come_in_order_before_the_query(bench):
    for step in range(5):
        bench.worker.observe(step, {})
    assert bench.nothing_more()
    bench.submit(1, 'first')
    bench.wait()
    bench.worker.observe(5, {})
    bench.submit(2, 'second')
    bench.wait()
    assert calls(bench) == [
        *(('step', step) for step in range(5)),
        ('infer', 'first'),
        ('step', 5),
        ('infer', 'second'),
    ]


def test_steps_during_a_query_wait_for_the_next(bench):
    bench.hold(1)
    bench.worker.observe('moved', {})
    assert calls(bench, 'step') == []
    bench.policy.gate.set()
    bench.wait()
    bench.submit(2)
    bench.wait()
    assert calls(bench) == [('infer', 'scene'), ('step', 'moved'), ('infer', 'scene')]


def test_steps_after_an_observation_are_not_in_its_query(bench):
    """Bug: what was executed after the images were taken counted as motion before them."""
    bench.hold(1)
    bench.worker.observe('before', {})
    bench.submit(2, 'second')
    bench.worker.observe('after', {})
    bench.policy.gate.set()
    bench.wait(2)
    assert calls(bench)[1:3] == [('step', 'before'), ('infer', 'second')]
    bench.submit(3, 'third')
    bench.wait()
    assert calls(bench)[3:] == [('step', 'after'), ('infer', 'third')]


def test_a_step_that_asks_for_a_new_query_is_passed_on_at_once():
    asked = threading.Event()
    policy = FakePolicy()
    policy.observe_executed = lambda action, images, stamps_ns: action == 'fine'
    worker = InferenceWorker(policy, None, None, asked.set)
    worker.observe('coarse', {})
    assert not asked.wait(ABSENT)
    worker.observe('fine', {})
    assert asked.wait(SOON)
    assert worker.stop(SOON)


def test_a_bad_step_costs_neither_the_others_nor_the_query(bench):
    bad = [
        ObservationError('action_not_finite', 'executed_action.data', [1.0], 'must be finite'),
        ZeroDivisionError('the pruning method broke'),
    ]
    for step in ('first', *bad, 'last'):
        bench.worker.observe(step, {})
    bench.submit(1)
    bench.wait(3)
    assert bench.errors == bad
    assert bench.failed == [None, None], 'a bad step is no failed query'
    assert [step for _, step in calls(bench, 'step')] == ['first', *bad, 'last']
    assert len(bench.results) == 1


def test_the_newest_steps_of_a_long_query_are_kept(bench):
    bench.hold(1)
    for step in range(MAX_STEPS + 30):
        bench.worker.observe(step, {})
    bench.submit(2)
    bench.policy.gate.set()
    bench.wait(2)
    assert [step for _, step in calls(bench, 'step')] == list(range(30, MAX_STEPS + 30))


def test_reset_clears_what_waits(bench):
    bench.hold(1)
    bench.worker.observe('old', {})
    bench.submit(2)
    bench.worker.reset()
    bench.policy.gate.set()
    bench.wait()
    assert bench.nothing_more()
    bench.worker.observe('new', {})
    bench.submit(3)
    bench.wait()
    assert [ticket for ticket, _ in bench.results] == [1, 3]
    assert calls(bench) == [
        ('infer', 'scene'),
        ('reset', None),
        ('step', 'new'),
        ('infer', 'scene'),
    ]


def test_pruning_changes_before_the_next_query_and_once(bench):
    first, last = PruneConfig(alpha=0.5), PruneConfig(alpha=0.6)
    answers = []
    bench.worker.set_pruning(first, lambda error: answers.append((first, error)))
    bench.worker.set_pruning(last, lambda error: answers.append((last, error)))
    for ticket in (1, 2):
        bench.submit(ticket)
        bench.wait()
    assert answers == [(last, None)]
    assert calls(bench) == [('pruning', last), ('infer', 'scene'), ('infer', 'scene')]


def test_pruning_that_the_policy_refuses_is_told_and_no_end(bench):
    refused, answers = ConfigError('pruning.method', 'fastest', 'unknown'), []
    bench.worker.set_pruning(refused, answers.append)
    for ticket in (1, 2):
        bench.submit(ticket)
        bench.wait()
    assert answers == [refused]
    assert [ticket for ticket, _ in bench.results] == [1, 2], 'what held before holds on'
    assert not bench.errors


# Asked queries -----------------------------------------------------------------------------------


def test_what_is_asked_for_survives_a_reset_and_comes_first(bench):
    bench.hold(1)
    bench.submit(2)
    assert bench.worker.ask(Job(3, 'asked'))
    assert not bench.worker.ask(Job(4, 'one too many'))
    bench.submit(5)
    bench.worker.reset()
    bench.submit(6)
    bench.policy.gate.set()
    bench.wait(3)
    assert [ticket for ticket, _ in bench.results] == [1, 3, 6]


def test_a_query_apart_leaves_the_episode_before_and_after(bench):
    bench.worker.ask(Job(1, 'apart', apart=True))
    bench.wait()
    assert calls(bench) == [('reset', None), ('infer', 'apart'), ('reset', None)]
    bench.worker.ask(Job(2, ActionError('not finite'), apart=True))
    bench.wait()
    assert [kind for kind, _ in calls(bench)][-1] == 'reset', 'also when it fails'


def test_steps_wait_for_a_query_of_the_episode(bench):
    bench.hold(1)
    bench.worker.observe('before', {})
    bench.submit(2, 'second')
    bench.worker.ask(Job(3, 'asked'))
    bench.policy.gate.set()
    bench.wait(3)
    assert calls(bench)[1:] == [('infer', 'asked'), ('step', 'before'), ('infer', 'second')]


def test_busy_while_it_infers_and_idle_after(bench):
    assert bench.worker.is_idle
    assert bench.worker.busy_s == 0.0
    bench.hold(1)
    time.sleep(0.05)
    assert not bench.worker.is_idle
    assert 0.05 <= bench.worker.busy_s < 1.0
    bench.policy.gate.set()
    bench.wait()
    assert bench.worker.is_idle
    assert bench.worker.busy_s == 0.0


def test_a_panic_is_handed_over_and_the_thread_goes_on(bench):
    bench.submit(1, 'scene')
    bench.wait()
    bench.policy.infer = lambda observation: (_ for _ in ()).throw(Panic('broken tokenizer'))
    bench.submit(2)
    bench.wait()
    assert 'broken tokenizer' in str(bench.errors[0])
    assert bench.failed == [2]
    del bench.policy.infer
    bench.submit(3)
    bench.wait()
    assert bench.results[-1][0] == 3


# Faults ----------------------------------------------------------------------------------------


class OutOfMemoryError(RuntimeError):
    """As torch.OutOfMemoryError, and torch.cuda.OutOfMemoryError before it."""


@pytest.mark.parametrize(
    ('error', 'code'),
    [
        (OutOfMemoryError('CUDA out of memory'), 'out_of_memory'),
        (MemoryError(), 'out_of_memory'),
        (RuntimeError('DefaultCPUAllocator: not enough memory'), 'out_of_memory'),
        (RuntimeError('shapes differ'), 'inference'),
        (ZeroDivisionError(), 'inference'),
        (ActionError('not finite'), 'action'),
        (ObservationError('camera_stale', 'cameras/wrist', 1, 'old'), 'camera_stale'),
    ],
)
def test_the_fault_that_an_error_stands_for(error, code):
    assert fault_code(error) == code


def test_torchs_own_error_is_known():
    torch = pytest.importorskip('torch')
    kind = getattr(torch, 'OutOfMemoryError', None) or torch.cuda.OutOfMemoryError
    assert fault_code(kind('no memory')) == 'out_of_memory'


# Spare work ------------------------------------------------------------------------------------


class Spare:
    """A SpareThread, what it did, and what is in its way."""

    def __init__(self, rate_hz: float = 1000.0):
        self.done: list[object] = []
        self.errors: list[Exception] = []
        self.busy, self.rate_hz = False, rate_hz
        self.thread = SpareThread(
            self.work, lambda: self.busy, lambda: self.rate_hz, self.errors.append
        )

    def work(self, item):
        if isinstance(item, Exception):
            raise item
        self.done.append(item)

    def until(self, count: int, seconds: float = SOON) -> bool:
        end = time.monotonic() + seconds
        while len(self.done) < count and time.monotonic() < end:
            time.sleep(0.002)
        return len(self.done) >= count


@pytest.fixture
def spare():
    spare = Spare()
    yield spare
    assert spare.thread.stop(SOON)


def test_spare_work_is_done_and_a_failure_is_no_end(spare):
    spare.thread.offer('first')
    assert spare.until(1)
    spare.thread.offer(ValueError('bad picture'))
    time.sleep(ABSENT)
    spare.thread.offer('second')
    assert spare.until(2)
    assert [str(error) for error in spare.errors] == ['bad picture']


def test_spare_work_gives_way_and_only_the_newest_is_done(spare):
    spare.busy = True
    for item in range(5):
        spare.thread.offer(item)
        time.sleep(0.005)
    assert not spare.done
    spare.busy = False
    assert spare.until(1)
    time.sleep(ABSENT)
    assert spare.done == [4]


def test_spare_work_does_not_give_way_for_ever(spare):
    spare.busy = True
    spare.thread.offer('item')
    assert spare.until(1, 4 * GIVE_WAY_S)


def test_rate_of_spare_work(spare):
    spare.rate_hz = 20.0
    end = time.monotonic() + 0.5
    while time.monotonic() < end:
        spare.thread.offer('item')
        time.sleep(0.002)
    assert 5 <= len(spare.done) <= 12
    spare.rate_hz, count = 0.0, len(spare.done)
    time.sleep(ABSENT)
    spare.thread.offer('never')
    time.sleep(ABSENT)
    assert len(spare.done) == count


# Stop ------------------------------------------------------------------------------------------


def test_stop_while_idle():
    bench = Bench()
    before = time.monotonic()
    assert bench.worker.stop(SOON) is True
    assert time.monotonic() - before < 1.0
    assert bench.worker.stop(SOON) is True


def test_stop_gives_up_on_an_inference_that_hangs():
    bench = Bench()
    bench.hold(1)
    before = time.monotonic()
    assert bench.worker.stop(0.1) is False
    assert 0.09 < time.monotonic() - before < 2.0
    bench.policy.gate.set()
    assert bench.worker.stop(SOON) is True


def test_stop_waits_for_an_inference_that_ends():
    bench = Bench()
    bench.hold(1)
    threading.Timer(0.05, bench.policy.gate.set).start()
    assert bench.worker.stop(SOON) is True


def test_nothing_is_published_after_stop():
    bench = Bench()
    bench.hold(1)
    bench.submit(2)
    assert bench.worker.stop(0.0) is False
    bench.submit(3)
    bench.policy.gate.set()
    assert bench.worker.stop(SOON) is True
    bench.submit(4)
    assert bench.nothing_more()
    assert bench.results == []
    assert len(calls(bench, 'infer')) == 1


# Loading ---------------------------------------------------------------------------------------


def test_loading_hands_the_policy_over_and_keeps_nothing():
    """A policy that the thread still held would keep the GPU's memory after cleanup."""
    policies = [FakePolicy()]
    gone = weakref.ref(policies[0])
    loading = LoadingThread(policies.pop)
    policy = loading.wait(threading.Event())
    assert policy is gone()
    assert not loading.is_alive
    del policy
    gc.collect()
    assert gone() is None


class Panic(BaseException):
    """What an extension written in Rust raises when it breaks."""


@pytest.mark.parametrize(
    ('fault', 'kind'),
    [
        (ConfigError('model.name', 'huge', 'unknown'), ConfigError),
        (ZeroDivisionError('by zero'), ZeroDivisionError),
        (Panic('broken tokenizer'), RuntimeError),
    ],
)
def test_what_loading_raises_comes_to_the_one_who_waits(fault, kind):
    def load():
        raise fault

    with pytest.raises(kind, match=str(fault)):
        LoadingThread(load).wait(threading.Event())


def test_loading_can_be_given_up():
    gate, stop = threading.Event(), threading.Event()
    loading = LoadingThread(lambda: gate.wait(SOON))
    threading.Timer(0.05, stop.set).start()
    before = time.monotonic()
    with pytest.raises(SpecPruneError, match='given up'):
        loading.wait(stop)
    assert 0.04 < time.monotonic() - before < 1.0
    assert loading.is_alive
    gate.set()


# Health ----------------------------------------------------------------------------------------


class Clock:
    """Stands in for the module `time`."""

    def __init__(self):
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(health_module, 'time', clock)
    return clock


def result(mode: Mode = Mode.COARSE, latency_s: float = 0.1, **changes) -> SimpleNamespace:
    counts = {'tokens_total': (100, 100), 'tokens_static': (30, 40), 'tokens_kept': (20, 20)}
    report = PruneReport(
        stamp_ns=0,
        chunk_id=1,
        epoch=1,
        method='specprune',
        budget='union',
        alpha=0.8,
        mode=mode,
        mode_reason='v_t 0.90',
        cameras=('wrist', 'side'),
        latency_total_s=latency_s,
        recall=changes.pop('recall', np.array([0.5, 0.7])),
        **{name: np.array(values, np.uint32) for name, values in counts.items()},
        **changes,
    )
    return SimpleNamespace(report=report, chunk=SimpleNamespace(clamped=2))


def test_faults_are_counted_by_code(clock):
    health = Health()
    for code, message in (('stale', 'a'), ('stale', 'b'), ('empty', 'c')):
        health.fault(code, message)
    assert health.faults() == ({'stale': 2, 'empty': 1}, {'stale': 'b', 'empty': 'c'}, 3)
    assert health.faults()[2] == 0
    health.fault('stale', 'd')
    assert health.faults() == ({'stale': 3, 'empty': 1}, {'stale': 'd', 'empty': 'c'}, 1)


def test_the_same_fault_is_logged_now_and_then(clock):
    health, logged = Health(), []
    for _ in range(40):  # 20 s, twice a second
        logged.append(health.fault('stale', 'the same'))
        clock.now += 0.5
    assert logged[0]
    assert sum(logged) == round(20 / REPEAT_S)
    assert health.faults()[0] == {'stale': 40}


def test_another_fault_is_logged_at_once(clock):
    health = Health()
    assert health.fault('stale', 'wrist')
    assert not health.fault('stale', 'wrist')
    assert health.fault('empty', 'wrist')
    assert health.fault('stale', 'side')


def test_a_stale_camera_does_not_flood_the_log(clock):
    """Bug: the message holds the age, so that every tick had a new one and was logged."""
    inbox = Inbox(RobotConfig(camera_names=('wrist',)), RuntimeConfig())
    inbox.put_instruction('go')
    inbox.put_image('wrist', 0, np.zeros((4, 4, 3), np.uint8))
    health, logged = Health(), 0
    for tick in range(10):
        clock.now += 0.05
        with pytest.raises(ObservationError) as caught:
            inbox.observation(1_000_000_000 + tick * 50_000_000)
        logged += health.fault(caught.value.code, str(caught.value))
    assert logged == 1


def test_counts_of_many_threads(clock):
    health = Health()

    def work():
        for _ in range(500):
            health.fault('stale', 'x')
            health.inferred(result())

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SOON)
    assert health.faults()[0] == {'stale': 2000}
    assert health.inference()['queries'] == '2000'


def test_figures_before_the_first_query():
    health = Health()
    assert health.inference() == {'queries': '0', 'discarded': '0'}
    assert health.pruning() == {}
    assert health.faults() == ({}, {}, 0)


def test_figures_of_inference():
    health = Health()
    for latency_ms in range(1, 101):
        health.inferred(result(latency_s=latency_ms / 1e3))
    health.discarded()
    figures = health.inference()
    assert (figures['queries'], figures['discarded']) == ('100', '1')
    assert float(figures['latency p50 ms']) == pytest.approx(50.5, abs=0.1)
    assert float(figures['latency p95 ms']) == pytest.approx(95, abs=0.2)


def test_latency_forgets_long_ago():
    health = Health()
    for latency_s in [9.0] * 50 + [0.01] * 500:
        health.inferred(result(latency_s=latency_s))
    assert float(health.inference()['latency p95 ms']) == pytest.approx(10)


def test_figures_of_pruning():
    health = Health()
    for mode in (Mode.DENSE, Mode.COARSE, Mode.COARSE, Mode.FINE):
        health.inferred(result(mode))
    figures = health.pruning()
    assert figures['queries dense'] == '1'
    assert figures['queries coarse'] == '2'
    assert (figures['mode'], figures['mode reason']) == ('fine', 'v_t 0.90')
    assert float(figures['kept after static']) == pytest.approx(0.35)
    assert float(figures['kept after layers']) == pytest.approx(0.2)
    assert float(figures['recall']) == pytest.approx(0.6)
    assert 'fallback reason' not in figures


def test_unknown_recall_is_left_out_and_a_fallback_named():
    health = Health()
    unknown = np.full(2, np.nan)
    health.inferred(result(Mode.FALLBACK, recall=unknown, fallback_reason='broke'))
    figures = health.pruning()
    assert 'recall' not in figures
    assert figures['fallback reason'] == 'broke'
    assert figures['queries fallback'] == '1'


def test_the_newest_fault_until_it_is_forgiven(clock):
    health = Health()
    assert health.newest_fault == ('', '')
    health.fault('stale', 'a')
    health.fault('empty', 'b')
    assert health.newest_fault == ('empty', 'b')
    health.forgive()
    assert health.newest_fault == ('', '')
    assert health.faults()[0] == {'stale': 1, 'empty': 1}


def test_rates_of_streams(clock):
    health = Health()
    for _ in range(60):
        health.arrived('cameras/wrist')
    clock.now += 2.0
    assert health.rates_hz() == {'cameras/wrist': pytest.approx(30.0)}
    clock.now += 1.0
    assert health.rates_hz() == {}


def test_figures_of_the_guards():
    health = Health()
    health.inferred(result(guard_disagreement=0.02))
    health.inferred(result(Mode.FALLBACK))
    health.fault('action', 'not finite')
    figures = health.guard()
    assert figures['clamped elements'] == '4'
    assert figures['actions not finite'] == '1'
    assert figures['pruning failures'] == '1'
    assert figures['queries compared with dense'] == '1'


def test_keep_ratio():
    assert keep_ratio(result().report) == pytest.approx(0.2)


def test_a_torch_that_is_being_imported_has_no_gpu_yet(monkeypatch):
    monkeypatch.setitem(sys.modules, 'torch', SimpleNamespace())
    assert gpu_memory() == {}
    free_gpu_memory()


def test_no_gpu_no_figures():
    torch = pytest.importorskip('torch')
    if not torch.cuda.is_available():
        assert gpu_memory() == {}


def test_presence_is_told_once_for_every_loss():
    peer = Presence(1.0)
    assert not peer.went(100.0), 'who never came cannot go'
    for start in (100.0, 200.0):
        peer.seen(start)
        assert not peer.went(start + 0.9)
        assert [peer.went(start + passed) for passed in (1.1, 1.2, 9.0)] == [True, False, False]
        assert peer.is_gone(start + 9.0)
    peer.forget()
    assert not peer.is_gone(300.0)


def test_a_worker_that_ended_holds_no_policy():
    """Bug: an abandoned worker kept the model, and the next one did not fit beside it."""
    policy = FakePolicy()
    kept = weakref.ref(policy)
    worker = InferenceWorker(policy, lambda *_: None, lambda *_: None)
    assert worker.stop(SOON)
    del policy
    gc.collect()
    assert kept() is None


def test_an_error_that_cannot_be_told_does_not_end_the_thread(bench):
    """Bug: what the callback raised ended the thread, and nobody noticed."""
    told = []

    def tell(error, job):
        told.append(job.ticket)
        raise RuntimeError('no words for it')

    bench.worker._on_error = tell
    bench.worker.submit(Job(1, ValueError('bad')))
    bench.worker.submit(Job(1, ValueError('bad')))
    bench.submit(2, 'good')
    bench.wait()
    assert bench.results[-1][0] == 2
