"""The policy: episode state, bad observations, failing safe. One suite for every method."""

import dataclasses
from typing import ClassVar

import numpy as np
import pytest
import torch
from conftest import make_action, make_observation, make_policy
from hypothesis import given, settings
from hypothesis import strategies as st

from specprune_ros.config import PruneConfig
from specprune_ros.errors import ActionError, ConfigError, ObservationError
from specprune_ros.models.decoder import QueryDecoder
from specprune_ros.pruning import METHODS
from specprune_ros.pruning.base import PruneMethod, PruneRun, QueryContext
from specprune_ros.pruning.specprune import SpecPruneRun
from specprune_ros.types import Mode, Reason

SLOW, FAST = (0.1, 0.0, -0.1), (0.9, 0.0, 0.0)
CAMERAS = ('wrist', 'side')


@pytest.fixture(scope='module')
def shared():
    """One model for all tests; each test starts with a reset."""
    return make_policy(runtime__warm_up_queries=0)


@pytest.fixture
def policy(shared):
    shared.set_pruning(PruneConfig())
    shared.reset()
    return shared


def run_queries(policy, count: int = 4, velocity=FAST, cameras=CAMERAS) -> list:
    """Several queries, with executed actions and images between them."""
    results = []
    for query in range(count):
        observation = make_observation(8 * query, cameras)
        results.append(policy.infer(observation))
        for step in range(8):
            images = make_observation(8 * query + step, cameras).images
            policy.observe_executed(make_action(*velocity), images)
    return results


def make_prompt(policy):
    """A prompt of the policy's model, and what gives its actions under a PruneRun."""
    model, observation = policy.model, make_observation()
    pixels = model.preprocess([observation.images[name] for name in CAMERAS])
    prompt = model.embed(pixels, None, observation.instruction)
    act = torch.inference_mode()(
        lambda run: model.act(prompt, QueryDecoder(model.decoder, prompt.layout, run))
    )
    return prompt, act


def make_context(policy, prompt, memory, query: int) -> QueryContext:
    return QueryContext(
        layout=prompt.layout, depth=len(policy.model.decoder.layers), device=torch.device('cpu'),
        fine=False, alpha=0.8, similarity=None, memory=memory, query=query,
    )  # fmt: skip


# Every method ------------------------------------------------------------------------------


@pytest.mark.parametrize('budget', ['union', 'fixed'])
@pytest.mark.parametrize('method', METHODS)
class TestContract:
    """What every pruning method promises."""

    def test_reports_are_consistent(self, policy, method, budget):
        policy.set_pruning(PruneConfig(method=method, budget=budget))
        for result in run_queries(policy):
            report, chunk = result.report, result.chunk
            assert report.method == method
            assert np.isfinite(chunk.data).all()
            assert chunk.data.shape == (8, 7)
            assert report.reason.shape == report.pruned_after_layer.shape == (512,)
            gone = report.pruned_after_layer.reshape(2, 256)
            assert ((gone == 0).sum(axis=1) == report.tokens_kept).all()
            assert (report.tokens_kept <= report.tokens_static).all()
            assert (report.tokens_static <= report.tokens_total).all()
            counts = [
                512 - int(((gone > 0) & (gone <= layer)).sum()) for layer in report.layer_index
            ]
            assert counts == report.layer_tokens.tolist()
            assert report.fallback_reason == ''

    def test_first_query_is_dense(self, policy, method, budget):
        policy.set_pruning(PruneConfig(method=method, budget=budget))
        dense = make_policy(pruning__method='none', runtime__warm_up_queries=0)
        observation = make_observation()
        first = policy.infer(observation)
        assert first.report.mode == Mode.DENSE
        assert np.array_equal(first.chunk.data, dense.infer(observation).chunk.data)

    def test_a_dense_run_keeps_all_and_leaves_what_a_query_can_go_on_from(
        self, policy, method, budget
    ):
        config = PruneConfig(method=method, budget=budget)
        asked = METHODS[method](config)
        prompt, act = make_prompt(policy)
        dense = act(PruneRun(None))
        memory = None
        for query in range(2):
            context = make_context(policy, prompt, memory, query)
            run = asked.begin_dense(context)
            assert torch.equal(act(run), dense)
            trace = run.trace()
            assert (trace.mode, trace.layer_index) == (Mode.DENSE, [])
            assert not trace.pruned_after_layer.any()
            memory = run.memory()
            act(asked.begin(make_context(policy, prompt, memory, query)))

    def test_nothing_survives_a_reset(self, policy, method, budget):
        policy.set_pruning(PruneConfig(method=method, budget=budget))
        policy.reset()
        expected = run_queries(policy)
        run_queries(policy, 2, SLOW)
        policy.reset()
        again = run_queries(policy)
        for a, b in zip(expected, again, strict=True):
            assert np.array_equal(a.chunk.data, b.chunk.data)
            assert np.array_equal(a.report.pruned_after_layer, b.report.pruned_after_layer)

    def test_cameras_may_come_in_any_order(self, policy, method, budget):
        """A dict's order is not the model's: the same images give the same action."""
        policy.set_pruning(PruneConfig(method=method, budget=budget))
        policy.reset()
        expected = run_queries(policy)[-1]
        observation = make_observation(24)
        swapped = dict(reversed(list(observation.images.items())))
        policy.reset()
        run_queries(policy, 3)
        got = policy.infer(dataclasses.replace(observation, images=swapped))
        assert np.array_equal(got.chunk.data, expected.chunk.data)


# Controls ------------------------------------------------------------------------------------


@pytest.mark.parametrize('budget', ['union', 'fixed'])
@pytest.mark.parametrize('method', ['random', 'uniform'])
def test_controls_keep_as_many_as_specprune_would(policy, method, budget):
    counts = {}
    for name in ('specprune', method):
        policy.set_pruning(PruneConfig(method=name, budget=budget))
        policy.reset()
        counts[name] = run_queries(policy, 2)[1].report  # the same memory: the first one is dense
    ours, theirs = counts[method], counts['specprune']
    assert ours.tokens_static.tolist() == theirs.tokens_static.tolist()
    assert ours.layer_tokens.tolist() == theirs.layer_tokens.tolist()
    kept = (ours.pruned_after_layer == 0) & (theirs.pruned_after_layer == 0)
    assert kept.sum() < 0.7 * ours.tokens_kept.sum(), 'chosen without looking'


@pytest.mark.parametrize('method', ['random', 'uniform'])
def test_controls_keep_as_many_in_every_query_of_a_fixed_budget(policy, method):
    counts = []
    for name in ('specprune', method):
        policy.set_pruning(PruneConfig(method=name, budget='fixed'))
        policy.reset()
        reports = [result.report for result in run_queries(policy, 4)]
        counts.append([report.layer_tokens.tolist() for report in reports])
    assert counts[0] == counts[1]


def test_random_patches_differ_by_query_and_seed(policy):
    def kept(seed: int) -> list[np.ndarray]:
        policy.set_pruning(PruneConfig(method='random', seed=seed))
        policy.reset()
        return [result.report.pruned_after_layer == 0 for result in run_queries(policy)[1:]]

    first, again, other = kept(0), kept(0), kept(1)
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not np.array_equal(first[0], first[1])
    assert not np.array_equal(first[0], other[0])


def test_uniform_patches_are_even_in_both_directions(policy):
    policy.set_pruning(PruneConfig(method='uniform', budget='fixed', dynamic=False))
    policy.reset()
    report = run_queries(policy)[-1].report
    grid = (report.pruned_after_layer == 0).reshape(2, 16, 16)[0]
    quarters = grid.reshape(4, 4, 4, 4).sum(axis=(1, 3))
    assert quarters.max() - quarters.min() <= 1
    assert quarters.min() > 2


# SpecPrune -----------------------------------------------------------------------------------


@settings(max_examples=10, deadline=None)
@given(alpha=st.floats(0.2, 1.5), velocity=st.sampled_from([SLOW, FAST]))
def test_union_stays_within_the_sum_of_its_sets(shared, alpha, velocity):
    shared.set_pruning(PruneConfig(alpha=alpha, budget='union'))
    shared.reset()
    report = run_queries(shared, 2, velocity)[-1].report
    fine = velocity is SLOW
    assert report.mode == (Mode.FINE if fine else Mode.COARSE)
    k_local, k_dynamic = (40, 10) if fine else (24, 20)
    bound = 2 * int(alpha * 30 + 1e-9) + 2 * int(alpha * k_local + 1e-9)
    bound += int(alpha * k_dynamic + 1e-9)
    assert (report.tokens_static <= max(bound, 1)).all()
    wanted = (report.reason.reshape(2, 256) > 0).sum(axis=1)
    assert np.array_equal(wanted, report.tokens_static)


@pytest.mark.parametrize(('velocity', 'count'), [(FAST, 69), (SLOW, 84)])
def test_fixed_keeps_its_share_of_every_camera(policy, velocity, count):
    policy.set_pruning(PruneConfig(budget='fixed'))
    for result in run_queries(policy, velocity=velocity)[1:]:
        assert result.report.tokens_static.tolist() == [count, count]
        kept = result.report.pruned_after_layer != 2
        votes = np.unpackbits(result.report.reason[:, None] & 7, axis=1).sum(axis=1)
        assert kept[votes >= 2].all()
        filler = result.report.reason & Reason.FILL > 0
        assert not filler[~kept].any()


def test_dynamic_pruning_leaves_two_thirds(policy):
    report = run_queries(policy)[-1].report
    assert report.layer_index.tolist() == [2, 4, 6, 8, 9]
    tokens = report.layer_tokens.tolist()
    assert tokens[1:] == [int(0.9 * before + 1e-9) for before in tokens[:-1]]
    assert report.tokens_kept.sum() <= 0.66 * report.tokens_static.sum()


def test_moved_square_is_kept_as_dynamic(policy):
    report = run_queries(policy, 3)[-1].report
    reason, _ = report.camera_grid('wrist')
    top = 2 + 16 % 10  # where make_observation puts the square at step 16
    square = reason[top : top + 2, 4:6]
    assert (square & Reason.DYNAMIC > 0).all()
    assert report.reference_age > 0


def test_dense_every_refreshes(policy):
    policy.set_pruning(PruneConfig(dense_every=2))
    modes = [result.report.mode for result in run_queries(policy)]
    assert modes == [Mode.DENSE, Mode.COARSE, Mode.DENSE, Mode.COARSE]


def test_options_change_what_is_kept(policy):
    base = run_queries(policy)[-1].report.pruned_after_layer
    for change in (
        {'score_direction': 'image_to_text'},
        {'score_text': 'prompt'},
        {'global_fusion': 'mean'},
        {'alpha': 0.6},
        {'rank_slope': 3.0, 'ema_rate': 0.9},
    ):
        policy.set_pruning(PruneConfig(**change))
        policy.reset()
        got = run_queries(policy)[-1].report.pruned_after_layer
        assert not np.array_equal(got, base), change


def test_without_executed_actions_pruning_is_gentle(policy):
    policy.infer(make_observation(0))
    report = policy.infer(make_observation(8)).report
    assert report.mode == Mode.FINE
    assert 'no executed action' in report.mode_reason
    assert np.isnan(report.translation_speed)
    assert report.reference_age == 8  # 0.4 s have room for 8 control steps


def test_controller_reads_the_last_executed_action(policy):
    policy.infer(make_observation(0))
    policy.observe_executed(make_action(*SLOW))
    policy.observe_executed(make_action(*FAST))
    report = policy.infer(make_observation(2)).report
    assert report.mode == Mode.COARSE
    assert report.translation_speed == pytest.approx(0.9)
    assert report.chunk_displacement == pytest.approx(np.hypot(1.0, 0.1))


def test_recall_is_known_from_the_second_query_on(policy):
    first, *rest = run_queries(policy)
    assert np.isnan(first.report.recall).all()
    for result in rest:
        assert ((result.report.recall >= 0) & (result.report.recall <= 1)).all()


# Episodes --------------------------------------------------------------------------------------


def test_new_instruction_and_time_jump_start_an_episode(policy):
    run_queries(policy, 2)
    epoch = policy.epoch
    other = policy.infer(make_observation(30, instruction='open the drawer'))
    assert (other.report.mode, other.chunk.epoch) == (Mode.DENSE, epoch + 1)
    later = policy.infer(make_observation(31, instruction='open the drawer'))
    assert (later.report.mode, later.chunk.epoch) == (Mode.FINE, epoch + 1)
    back = policy.infer(make_observation(5, instruction='open the drawer'))
    assert (back.report.mode, back.chunk.epoch) == (Mode.DENSE, epoch + 2)


def test_warm_up_leaves_no_trace():
    policy = make_policy(runtime__warm_up_queries=3)
    policy.warm_up()
    result = policy.infer(make_observation())
    assert result.report.mode == Mode.DENSE
    assert (result.chunk.chunk_id, result.chunk.epoch) == (1, 1)


def test_reference_frame_that_does_not_decode_is_skipped(policy):
    class Broken:
        def rgb(self):
            raise ObservationError('image_truncated', 'cameras/wrist', '3 bytes', 'no image')

    policy.infer(make_observation(0))
    policy.observe_executed(make_action(*FAST))
    policy.observe_executed(make_action(*FAST), dict.fromkeys(CAMERAS, Broken()))
    policy.observe_executed(make_action(*FAST))
    for step in (3, 4, 5):
        assert policy.infer(make_observation(step)).report.mode == Mode.COARSE


# Bad input -------------------------------------------------------------------------------------


def grey(*shape, dtype=np.uint8) -> np.ndarray:
    return np.full(shape, 90, dtype)


@pytest.mark.parametrize(
    ('changes', 'code'),
    [
        ({'instruction': '  '}, 'instruction_empty'),
        ({'images': {'wrist': grey(224, 224, 3)}}, 'camera_missing'),
        ({'images': dict.fromkeys(CAMERAS, grey(0, 0, 3))}, 'image_empty'),
        ({'images': dict.fromkeys(CAMERAS, grey(224, 224))}, 'image_shape'),
        ({'images': dict.fromkeys(CAMERAS, grey(224, 224, 3, dtype=np.float32))}, 'image_shape'),
    ],
)
def test_bad_observation_is_refused_and_the_next_one_taken(policy, changes, code):
    run_queries(policy, 2)
    with pytest.raises(ObservationError) as caught:
        policy.infer(make_observation(20, **changes))
    assert caught.value.code == code
    assert caught.value.field in str(caught.value)
    assert policy.infer(make_observation(24)).report.mode == Mode.COARSE


def test_resized_camera_is_refused_once(policy):
    run_queries(policy, 2)
    smaller = {'wrist': grey(120, 160, 3), 'side': grey(224, 224, 3)}
    with pytest.raises(ObservationError, match=r'\(120, 160\).*\(224, 224\)'):
        policy.infer(make_observation(20, images=smaller))
    assert policy.infer(make_observation(21, images=smaller)).report.mode == Mode.DENSE


@pytest.mark.parametrize('proprio', [None, [0.0], [0.0, np.nan, 0.0], [np.inf, 0.0, 0.0]])
def test_bad_proprio(proprio):
    policy = make_policy(robot__joint_names=('a', 'b', 'c'), runtime__warm_up_queries=0)
    bad = None if proprio is None else np.array(proprio)
    with pytest.raises(ObservationError, match='joint_states'):
        policy.infer(make_observation(proprio=bad))
    assert policy.infer(make_observation(proprio=np.zeros(3))).chunk.data.shape == (8, 7)


@pytest.mark.parametrize(
    ('action', 'code'),
    [
        (make_action(np.nan), 'action_not_finite'),
        (make_action(names=('a',) * 7), 'action_names'),
    ],
)
def test_bad_executed_action_makes_motion_unknown(policy, action, code):
    run_queries(policy, 2)
    with pytest.raises(ObservationError) as caught:
        policy.observe_executed(action)
    assert caught.value.code == code
    assert policy.infer(make_observation(24)).report.mode == Mode.FINE


def test_nan_action_never_leaves(policy, monkeypatch):
    monkeypatch.setattr(policy.model, 'act', lambda prompt, decode: torch.full((8, 7), torch.nan))
    with pytest.raises(ActionError):
        policy.infer(make_observation())
    monkeypatch.undo()
    assert np.isfinite(policy.infer(make_observation()).chunk.data).all()


def test_actions_are_clamped_and_counted():
    policy = make_policy(robot__action_max=[0.01], runtime__warm_up_queries=0)
    chunk = policy.infer(make_observation()).chunk
    assert chunk.data.max() <= 0.01
    assert chunk.clamped == int((chunk.normalized > 0.01 + 1e-8).sum()) > 0


# Failing safe ----------------------------------------------------------------------------------


class Faulty(PruneMethod):
    """Prunes half after layer 2, and fails as told."""

    name = 'faulty'
    fault = 'raise'

    def begin(self, context):
        if self.fault == 'begin':
            raise RuntimeError('broken on purpose')
        return FaultyRun(context, self.fault)


class FaultyRun(PruneRun):
    BAD: ClassVar = {'empty': [], 'order': [4, 2], 'twice': [2, 2], 'gone': [1], 'beyond': [5000]}

    def __init__(self, context, fault):
        super().__init__(context)
        self.fault = fault

    def after_layer(self, probe):
        if probe.layer == 2:
            return probe.visual_idx[::2]
        if probe.layer == 3 and self.fault == 'raise':
            raise RuntimeError('broken on purpose')
        if probe.layer == 3 and self.fault in self.BAD:
            return torch.tensor(self.BAD[self.fault], dtype=torch.int64)
        return None

    def trace(self):
        if self.fault == 'trace':
            raise RuntimeError('broken on purpose')
        return super().trace()

    def memory(self):
        if self.fault == 'memory':
            raise RuntimeError('broken on purpose')
        return super().memory()


@pytest.mark.parametrize('fault', ['begin', 'raise', 'trace', 'memory', *FaultyRun.BAD])
def test_faulty_method_costs_speed_not_the_action(policy, monkeypatch, fault):
    monkeypatch.setitem(METHODS, 'faulty', Faulty)
    monkeypatch.setattr(Faulty, 'fault', fault)
    expected = policy.infer(make_observation()).chunk.data
    policy.set_pruning(PruneConfig(method='faulty'))
    result = policy.infer(make_observation())
    assert result.report.mode == Mode.FALLBACK
    assert result.report.fallback_reason
    assert (result.report.tokens_kept == 256).all()
    assert np.array_equal(result.chunk.data, expected)


def broken(*given, **named):
    raise RuntimeError('broken on purpose')


@pytest.mark.parametrize(
    ('target', 'checks'),
    [
        ('specprune_ros.query.patch_similarity', 0),
        ('specprune_ros.pruning.specprune.SpecPrune.reference_age', 0),
        ('specprune_ros.passes.kept_share', 1),
        ('specprune_ros.passes.after_check', 1),
    ],
)
def test_whatever_fails_around_pruning_costs_speed_not_the_action(
    policy, monkeypatch, target, checks
):
    """Bug: what failed outside of the decoder's pass cost the action."""
    run_queries(policy, 2)
    policy.set_pruning(PruneConfig(guard_every=checks))
    monkeypatch.setattr(target, broken)
    result = policy.infer(make_observation(16))
    assert result.report.mode == Mode.FALLBACK
    assert result.report.fallback_reason == 'RuntimeError: broken on purpose'
    assert (result.report.tokens_kept == 256).all()
    monkeypatch.undo()
    policy.set_pruning(PruneConfig(method='none'))
    expected = policy.infer(make_observation(16)).chunk.data
    assert np.array_equal(result.chunk.data, expected)


def test_after_a_fallback_pruning_goes_on(policy, monkeypatch):
    run_queries(policy, 2)
    with monkeypatch.context() as patch:
        patch.setattr(SpecPruneRun, 'after_layer', broken)
        assert policy.infer(make_observation(16)).report.mode == Mode.FALLBACK
    policy.observe_executed(make_action(*FAST))
    assert policy.infer(make_observation(24)).report.mode == Mode.COARSE


def test_dry_run_actions_were_not_executed(policy):
    policy.infer(make_observation(0))
    policy.observe_executed(make_action(*FAST, dry_run=True))
    report = policy.infer(make_observation(1)).report
    assert np.isnan(report.translation_speed)


# Fit ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ('parameters', 'match'),
    [
        ({'pruning__method': 'fastest'}, 'pruning.method'),
        ({'model__name': 'huge'}, 'model.name'),
        ({'model__device': 'abacus'}, 'model.device'),
        ({'robot__camera_names': list('abcde')}, 'robot.camera_names'),
        ({'robot__translation_names': ['x']}, 'robot.translation_names'),
    ],
)
def test_what_does_not_fit_fails_at_load(parameters, match):
    with pytest.raises(ConfigError, match=match):
        make_policy(**parameters)


def test_live_change_to_an_unknown_method_changes_nothing(policy):
    with pytest.raises(ConfigError):
        policy.set_pruning(PruneConfig(method='fastest'))
    assert policy.infer(make_observation()).report.method == 'specprune'


@pytest.mark.parametrize('count', [1, 2, 3, 4])
def test_one_to_four_cameras(count):
    names = ('wrist', 'side', 'overhead', 'front')[:count]
    policy = make_policy(robot__camera_names=names, runtime__warm_up_queries=0)
    result = run_queries(policy, 2, cameras=names)[-1]
    assert result.report.cameras == names
    assert len(result.report.reason) == 256 * count


def test_stand_in_says_so(policy):
    result = policy.infer(make_observation())
    assert result.chunk.stand_in
    assert result.report.stand_in
    assert 'mean nothing' in policy.model.info.name
