"""Recorded queries: the same numbers as eager ones, nothing baked in, and eager where it must be.

No GPU is needed: a list of operators takes the place of a CUDA graph (graph_world.py).
"""

from __future__ import annotations

import dataclasses
import logging
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import make_action, make_observation, make_policy
from graph_world import HOST_READS, Tape, TapeRecorder

from specprune_ros.errors import ConfigError, ObservationError
from specprune_ros.host_copy import DeferredResult
from specprune_ros.models.preprocess import FastPreprocessor
from specprune_ros.policy import Policy
from specprune_ros.pruning import METHODS
from specprune_ros.pruning.specprune import SpecPrune
from specprune_ros.query import Query, QueryInputs
from specprune_ros.query_graph import REST, TRIES, CudaRecorder, QueryGraphs
from specprune_ros.tensor_tree import map_tensors, signature, tensors
from specprune_ros.timing import PARTS, StageClock
from specprune_ros.types import Mode, Observation

FAST, SLOW = 0.9, 0.1
# Of every query's executed actions: dense, then fine and coarse twice each.
SPEEDS = (SLOW, FAST, SLOW, FAST, SLOW)
JOINTS = ('a', 'b', 'c')


@pytest.fixture(scope='module')
def shared():
    return make_policy(
        runtime__warm_up_queries=0, robot__joint_names=JOINTS, pruning__budget='fixed'
    )


@pytest.fixture(scope='module')
def fitting():
    """A policy whose device fits the images, as a GPU does in fast preprocessing."""
    policy = make_policy(
        runtime__warm_up_queries=0, robot__joint_names=JOINTS, pruning__budget='fixed',
        model__preprocessing='fast',
    )  # fmt: skip
    policy.model.parts.preprocessor.on_host = False
    return policy


def recorded(policy: Policy, **pruning) -> tuple[Policy, TapeRecorder]:
    """A policy over the same model that records its queries."""
    config = dataclasses.replace(
        policy.config, pruning=dataclasses.replace(policy.config.pruning, **pruning)
    )
    recording, recorder = Policy(policy.model, config), TapeRecorder()
    recording.graphs = QueryGraphs(recorder)
    return recording, recorder


def small_observation(step: int = 0, **changes) -> Observation:
    """With images of other sizes than the model's, and than each other."""
    observation = make_observation(step, **changes)
    wrist, side = observation.images.values()
    return dataclasses.replace(observation, images={'wrist': wrist[::2, ::2], 'side': side[30:]})


def episode(policy: Policy, speeds=SPEEDS, observe=make_observation) -> list:
    """Queries with other images, joints and motion each time."""
    results = []
    for query, speed in enumerate(speeds):
        proprio = np.linspace(-1, 1, 3) * 0.3 * query
        results.append(policy.infer(observe(8 * query, proprio=proprio)))
        for step in range(8):
            images = observe(8 * query + step).images
            policy.observe_executed(make_action(speed, 0, -0.1), images)
    return results


def assert_same(results: list, expected: list) -> None:
    for got, wanted in zip(results, expected, strict=True):
        np.testing.assert_array_equal(got.chunk.normalized, wanted.chunk.normalized)
        for name in ('mode', 'fallback_reason', 'mode_reason', 'sequence_tokens', 'flops_share'):
            assert getattr(got.report, name) == getattr(wanted.report, name)
        for name in (
            'reason', 'pruned_after_layer', 'important', 'recall', 'recall_mean',
            'layer_confidence', 'layer_index', 'layer_tokens',
        ):  # fmt: skip
            np.testing.assert_array_equal(
                getattr(got.report, name), getattr(wanted.report, name), err_msg=name
            )


# The whole query -----------------------------------------------------------------------------


@pytest.mark.parametrize('method', METHODS)
def test_recorded_queries_equal_eager_ones_and_read_nothing_back(shared, method):
    policy, recorder = recorded(shared, method=method)
    eager = Policy(shared.model, policy.config)
    results = episode(policy)
    assert_same(results, episode(eager))
    if method != 'none':
        modes = [result.report.mode for result in results]
        assert modes == [Mode.DENSE, *[Mode.FINE, Mode.COARSE] * 2]
    # The dense model has one kind; else a dense first query without reference, then the modes.
    assert len(recorder.tapes) == (1 if method == 'none' else 3)
    assert policy.graphs.replays == len(results) - 1, 'all is recorded at the first query'
    for tape in recorder.tapes:
        assert not HOST_READS & set(tape.operators)


def test_preprocessing_on_the_device_is_recorded_with_the_query(fitting):
    speeds = (SLOW, FAST, SLOW)
    policy, recorder = recorded(fitting)
    results = episode(policy, speeds, small_observation)
    eager = Policy(fitting.model, policy.config)
    assert_same(results, episode(eager, speeds, small_observation))
    assert policy.graphs.replays == len(results) - 1, 'all is recorded at the first query'
    for tape in recorder.tapes:
        assert not HOST_READS & set(tape.operators)


def test_images_of_another_size_are_another_kind(fitting):
    policy, recorder = recorded(fitting)
    policy.infer(make_observation(proprio=np.zeros(3)))
    before = len(recorder.tapes)
    with pytest.raises(ObservationError, match='size'):
        policy.infer(small_observation(proprio=np.zeros(3)))
    policy.infer(small_observation(proprio=np.zeros(3)))
    assert len(recorder.tapes) == 2 * before
    policy.reset()
    policy.infer(make_observation(proprio=np.zeros(3)))
    assert len(recorder.tapes) == 2 * before, 'those of the first size stay'


def inputs_of(policy: Policy, observe=make_observation) -> tuple[Query, QueryInputs]:
    """A coarse query in the middle of an episode."""
    policy.reset()
    episode(policy, (FAST, FAST), observe)
    held = {}

    def keep(query, inputs, clock):
        held['query'], held['inputs'] = query, inputs
        return query.run(inputs, clock)

    policy._evaluate, original = keep, policy._evaluate
    try:
        policy.infer(observe(16, proprio=np.zeros(3)))
    finally:
        policy._evaluate = original
    return held['query'], held['inputs']


@pytest.mark.parametrize(
    ('name', 'observe'), [('shared', make_observation), ('fitting', small_observation)]
)
@torch.inference_mode()
def test_every_input_is_read_anew_at_a_replay(name, observe, request):
    """Whatever had become a constant of the recording would show: each input changes alone."""
    query, inputs = inputs_of(request.getfixturevalue(name), observe)
    shapes = [image.shape for image in observe().images.values()]
    assert [image.shape for image in inputs.images] == shapes
    graphs = QueryGraphs(TapeRecorder())
    noise = torch.Generator().manual_seed(0)
    changes = {
        'images': tuple(
            torch.randint(0, 256, image.shape, generator=noise, dtype=torch.uint8)
            for image in inputs.images
        ),
        'reference': tuple(image.flip(0) for image in inputs.images),
        'words': dataclasses.replace(inputs.words, ids=inputs.words.ids.roll(3)),
        'state': inputs.state + 0.5,
        'memory': map_tensors(lambda tensor: tensor.flip(-1), inputs.memory),
    }
    assert set(changes) == {spec.name for spec in dataclasses.fields(QueryInputs)}

    def run(given):
        return graphs.run('kind', query.record, given, plain=pytest.fail)

    run(inputs)
    base = query.record(inputs)
    for name, value in changes.items():
        given = dataclasses.replace(inputs, **{name: value})
        expected = tensors(query.record(given))
        got = tensors(run(given))
        assert all(map(torch.equal, got, expected)), name
        assert not all(map(torch.equal, got, tensors(base))), f'{name} makes no difference'
    assert graphs.replays == len(changes)


@torch.inference_mode()
def test_memory_and_trace_of_a_query_outlive_later_ones(shared):
    query, inputs = inputs_of(shared)
    graphs = QueryGraphs(TapeRecorder())
    flipped = dataclasses.replace(inputs, images=tuple(map(torch.flipud, inputs.images)))
    outcomes = [
        graphs.run('kind', query.record, given, plain=pytest.fail)
        for given in (inputs, inputs, flipped, inputs)
    ]
    first, *_, last = (tensors(outcome) for outcome in outcomes[1:])
    assert all(map(torch.equal, first, last))
    assert all(map(torch.equal, tensors(outcomes[0]), first))


# Kinds and limits of recording -----------------------------------------------------------------


def test_another_alpha_threshold_or_prompt_length_is_another_kind(shared):
    policy, recorder = recorded(shared)
    episode(policy, (FAST, FAST))
    before = len(recorder.tapes)
    config = policy.config.pruning
    for change in ({'alpha': 0.6}, {'similarity_threshold': 0.8}):
        policy.set_pruning(dataclasses.replace(config, **change))
        policy.infer(make_observation(24, proprio=np.zeros(3)))
    assert len(recorder.tapes) == before + 2
    longer = make_observation(25, proprio=np.zeros(3), instruction='pick up the red soup')
    eager = Policy(shared.model, policy.config)
    assert_same([policy.infer(longer)], [eager.infer(longer)])
    assert len(recorder.tapes) == before + 2 + 3, 'a new task: its first query, and both modes'


@pytest.mark.parametrize(
    ('pruning', 'word'),
    [({'budget': 'union'}, 'budget union'), ({'guard_every': 1}, 'guard')],
)
def test_queries_that_cannot_be_recorded_run_eagerly_and_say_why_once(
    shared, caplog, pruning, word
):
    policy, recorder = recorded(shared, **pruning)
    eager = Policy(shared.model, policy.config)
    with caplog.at_level(logging.INFO, 'specprune_ros.query_graph'):
        results = episode(policy, (FAST,) * 4)
    assert_same(results, episode(eager, (FAST,) * 4))
    assert len(recorder.tapes) <= 1, 'only the dense first query'
    assert [word in record.getMessage() for record in caplog.records] == [True]


def test_a_method_of_ones_own_is_never_recorded(shared):
    class Own(SpecPrune):
        name = 'own'

    _, recorder = recorded(shared)
    policy = Policy(shared.model, shared.config, method=Own(shared.config.pruning))
    policy.graphs = QueryGraphs(recorder)
    episode(policy, (FAST, FAST))
    assert recorder.tapes == []


def test_a_pruning_fault_is_not_recorded(shared):
    policy, recorder = recorded(shared, keep_floor=0.9)
    results = episode(policy, (FAST,) * 3)
    assert [result.report.mode for result in results] == [Mode.DENSE, *[Mode.FALLBACK] * 2]
    assert len(recorder.tapes) == 1


def test_a_graph_is_refused_at_load_where_there_is_no_gpu(shared):
    model = dataclasses.replace(shared.config.model, cuda_graph='on', device='cpu')
    with pytest.raises(ConfigError, match=r'model\.cuda_graph'):
        Policy(shared.model, dataclasses.replace(shared.config, model=model))
    assert shared.graphs is None


class Failing(TapeRecorder):
    def record(self, work):
        self.tapes.append(None)
        raise RuntimeError('capture is broken on purpose')


def test_a_recording_that_fails_is_not_tried_again(caplog):
    recorder = Failing()
    graphs = QueryGraphs(recorder)
    with caplog.at_level(logging.INFO, 'specprune_ros.query_graph'):
        for value in range(3):
            given = torch.tensor(float(value))
            assert graphs.run('kind', torch.neg, given, plain=torch.neg) == -value
    assert len(recorder.tapes) == 1
    assert len(caplog.records) == 1
    assert 'broken on purpose' in caplog.text


class FailingAtFirst(TapeRecorder):
    """Out of memory until so many attempts were made."""

    def __init__(self, failures: int):
        super().__init__()
        self.failures, self.attempts = failures, 0

    def record(self, work):
        self.attempts += 1
        if self.attempts <= self.failures:
            raise RuntimeError('out of memory')
        return super().record(work)


@pytest.mark.parametrize(('failures', 'attempts'), [(1, 2), (2, 3), (9, TRIES)])
def test_a_recording_that_fails_is_tried_again_later_and_not_for_ever(failures, attempts):
    recorder = FailingAtFirst(failures)
    graphs = QueryGraphs(recorder)
    for value in range(TRIES * (REST + 1) + 2):
        given = torch.tensor(float(value))
        assert graphs.run('kind', torch.neg, given, plain=torch.neg) == -value
        if value <= REST:
            assert recorder.attempts == 1
    assert recorder.attempts == attempts
    assert (graphs.replays > 0) == (failures < TRIES)


def test_the_first_result_is_its_caller_s_own():
    """The rehearsal's lies in memory of another stream, which may use it again at once."""
    held = []

    class Rehearsing(TapeRecorder):
        def rehearse(self, work):
            held.append(work())
            return held[-1]

    got = QueryGraphs(Rehearsing()).run('kind', torch.neg, torch.ones(2), plain=pytest.fail)
    assert torch.equal(got, held[0])
    assert got.data_ptr() != held[0].data_ptr()


class Stream:
    """Of CUDA, as far as is needed; notes what waits for what."""

    def __init__(self, name: str, log: list[str]):
        self.name, self.log = name, log

    def wait_stream(self, other: Stream) -> None:
        self.log.append(f'{self.name} waits for {other.name}')

    def __enter__(self):
        self.log.append(f'on {self.name}')

    def __exit__(self, *error):
        self.log.append(f'off {self.name}')


def test_a_rehearsal_that_fails_leaves_the_streams_in_order(monkeypatch):
    log: list[str] = []
    current, own = Stream('current', log), Stream('own', log)
    monkeypatch.setattr(torch.cuda, 'graph_pool_handle', lambda: None)
    monkeypatch.setattr(torch.cuda, 'Stream', lambda device: own)
    monkeypatch.setattr(torch.cuda, 'current_stream', lambda: current)
    monkeypatch.setattr(torch.cuda, 'stream', lambda stream: stream)
    recorder = CudaRecorder(torch.device('cuda'))
    with pytest.raises(ZeroDivisionError):
        recorder.rehearse(lambda: 1 / 0)
    assert log == ['own waits for current', 'on own', 'off own', 'current waits for own']


@pytest.mark.parametrize('method', METHODS)
def test_all_kinds_of_a_task_can_be_recorded_at_its_first_query(shared, method):
    """Another instruction has another length: what was recorded for the last task is no use."""
    policy, recorder = recorded(shared, method=method)
    first = policy.infer(make_observation(proprio=np.zeros(3)))
    kinds = len(recorder.tapes)
    policy.reset()
    results = episode(policy)
    assert len(recorder.tapes) == kinds, 'nothing is recorded in motion'
    assert policy.graphs.replays == len(results)
    assert_same(results, episode(Policy(shared.model, policy.config)))
    assert first.chunk.normalized.shape == results[0].chunk.normalized.shape


def test_nothing_is_recorded_ahead_that_runs_eagerly(shared):
    query, inputs = inputs_of(shared)
    query = dataclasses.replace(query, config=dataclasses.replace(query.config, guard_every=1))
    graphs = QueryGraphs(recorder := TapeRecorder())
    with torch.inference_mode():
        query.record_ahead(graphs, inputs, query.record(inputs))
    assert recorder.tapes == []


def test_only_the_latest_kinds_stay_recorded():
    recorder = TapeRecorder()
    graphs = QueryGraphs(recorder, limit=2)
    for kind in 'abab' + 'ca':
        graphs.run(kind, torch.neg, torch.ones(2), plain=pytest.fail)
    assert len(recorder.tapes) == 4, 'c drove a out'


@pytest.mark.parametrize('crop', [True, False])
def test_images_are_fitted_by_their_shape_alone(crop):
    """So this half of preprocessing can be a part of a recording."""
    fast = FastPreprocessor(center_crop=crop, source_size=(256, 256), device=torch.device('cpu'))
    fast.on_host = False
    noise = torch.Generator().manual_seed(0)
    one, other = (
        torch.randint(0, 256, (2, 48, 64, 3), generator=noise, dtype=torch.uint8) for _ in 'ab'
    )
    expected = fast.fitted(other)
    given = one.clone()
    with Tape() as tape:
        result = fast.fitted(given)
    given.copy_(other)
    tape.play()
    assert torch.equal(result, expected)
    assert not HOST_READS & set(tape.operators)
    assert torch.equal(fast([other[0].numpy(), other[1].numpy()]), expected)


def test_weights_that_a_recording_reads_stay_however_many_sizes_follow():
    """Made anew they would lie elsewhere, and a graph would read memory that was given back."""
    fast = FastPreprocessor(center_crop=True, device=torch.device('cpu'))

    def operators(rows: int) -> Counter[str]:
        with Tape() as tape:
            fast.fitted(torch.zeros(1, rows, 8, 3, dtype=torch.uint8))
        return tape.operators

    first, again = operators(48), operators(48)
    assert sum(first.values()) > sum(again.values()), 'the weights go to the device once'
    for rows in range(1, 41):
        operators(rows)
    assert operators(48) == again


# Values of tensors --------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Leaf:
    tensor: torch.Tensor | None
    word: str = ''


def test_tensors_are_found_at_any_depth_and_nothing_else_is_let_through():
    value = {'a': [Leaf(torch.zeros(2)), (1, torch.ones(1))], 'b': Leaf(None, 'x')}
    doubled = map_tensors(lambda tensor: tensor + 1, value)
    assert doubled['a'][0].tensor.tolist() == [1, 1]
    assert doubled['b'] is value['b']
    assert len(tensors(value)) == 2
    with pytest.raises(TypeError, match='ndarray'):
        tensors({'hidden': np.zeros(1)})


def test_signatures_differ_in_everything_but_numbers():
    value = Leaf(torch.zeros(2), 'x')
    assert signature(value) == signature(Leaf(torch.ones(2), 'x'))
    for other in (
        Leaf(torch.zeros(3), 'x'), Leaf(torch.zeros(2).double(), 'x'), Leaf(torch.zeros(2), 'y'),
        Leaf(None, 'x'),
    ):  # fmt: skip
        assert signature(value) != signature(other)
    assert signature(True) != signature(1)


# Reports ------------------------------------------------------------------------------------


def test_a_report_is_made_when_read_of_what_was_known_then(shared):
    shared.reset()
    expected = [result.report for result in map(shared.infer, three_queries())]
    shared.reset()
    unread = [shared.infer(observation) for observation in three_queries()]
    shared.observe_executed(make_action(FAST), make_observation().images)
    for result, report in zip(unread, expected, strict=True):
        assert isinstance(result, DeferredResult)
        assert result.report.mode_reason == report.mode_reason
        np.testing.assert_array_equal(result.report.recall_mean, report.recall_mean)
        assert result.report is result.report
    again = dataclasses.replace(unread[0], chunk=unread[1].chunk)
    assert again.report is unread[0].report


def three_queries() -> list:
    return [make_observation(8 * query, proprio=np.zeros(3)) for query in range(3)]


def test_laps_name_the_parts_of_a_query(shared):
    shared.reset()
    shared.infer(make_observation(proprio=np.zeros(3)))
    laps = shared.last_laps_s
    assert all(laps[name] > 0 for name in ('vision', 'projector', 'decode'))
    clock = StageClock(torch.device('cpu'))
    for part in PARTS:
        clock.lap(part)
    spent = clock.seconds()
    parts = sum(clock.laps()[part] for part in PARTS)
    assert spent['latency_embed_s'] + spent['latency_decode_s'] == pytest.approx(parts)
    assert spent['latency_pruning_s'] == 0


# On a GPU -------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')
@pytest.mark.parametrize('method', METHODS)
def test_cuda_graphs_equal_the_eager_path(method):
    policy, eager = (
        make_policy(
            model__device='cuda', model__cuda_graph=mode, pruning__method=method,
            runtime__warm_up_queries=0, robot__joint_names=JOINTS,
        )
        for mode in ('on', 'off')
    )  # fmt: skip
    for got, wanted in zip(episode(policy), episode(eager), strict=True):
        np.testing.assert_allclose(got.chunk.normalized, wanted.chunk.normalized, atol=2e-2)
        assert got.report.layer_tokens.tolist() == wanted.report.layer_tokens.tolist()
    assert policy.graphs.replays >= 2
