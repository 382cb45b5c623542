"""SpecPrune-VLA in the policy: its options, and state that survives a robot."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import make_action, make_observation, make_policy
from hypothesis import given, settings
from hypothesis import strategies as st

from specprune_ros.config import PruneConfig
from specprune_ros.errors import ActionError, ConfigError, ObservationError
from specprune_ros.images import CompressedImage
from specprune_ros.pruning import METHODS
from specprune_ros.pruning.base import QueryContext
from specprune_ros.pruning.specprune import Memory, SpecPrune
from specprune_ros.token_layout import Span, TokenLayout
from specprune_ros.types import Mode, Reason

CAMERAS = ('wrist', 'side')
FAST, SLOW = (0.9,), (0.1, 0.0, -0.1)
STEPS = 8


@pytest.fixture(scope='module')
def shared():
    return make_policy(runtime__warm_up_queries=0)


@pytest.fixture
def policy(shared):
    shared.set_pruning(PruneConfig())
    shared.reset()
    return shared


def execute(policy, query: int, steps: int = STEPS, velocity=FAST, cameras=CAMERAS) -> list[bool]:
    """Execute some steps of a chunk, with the named cameras' images."""
    wishes = []
    for step in range(steps):
        images = make_observation(8 * query + step, cameras).images
        wishes.append(policy.observe_executed(make_action(*velocity), images))
    return wishes


def reports(policy, queries: int = 3, velocity=FAST, **options) -> list:
    """Reports of some queries with other options."""
    policy.set_pruning(PruneConfig(**options))
    policy.reset()
    results = []
    for query in range(queries):
        results.append(policy.infer(make_observation(8 * query)).report)
        execute(policy, query, velocity=velocity)
    return results


# Options -----------------------------------------------------------------------------------


def test_techniques_can_be_switched_off_one_by_one(policy):
    both, no_static, no_dynamic = (
        reports(policy, **options)[-1] for options in ({}, {'static': False}, {'dynamic': False})
    )
    assert both.tokens_kept.sum() < no_dynamic.tokens_kept.sum() < no_static.tokens_kept.sum()
    assert (no_static.tokens_static == no_static.tokens_total).all()
    assert (no_dynamic.tokens_static == no_dynamic.tokens_kept).all()


def test_without_the_controller_slow_motion_prunes_as_hard_as_fast_motion(policy):
    fine = reports(policy, velocity=SLOW, budget='fixed')[-1]
    coarse = reports(policy, velocity=SLOW, budget='fixed', controller=False)[-1]
    assert (fine.mode, coarse.mode) == (Mode.FINE, Mode.COARSE)
    assert coarse.tokens_static.sum() < fine.tokens_static.sum()


class Layer:
    """A probe whose text attends to one half of the image."""

    def __init__(self, layer: int, alive: torch.Tensor, favourites: torch.Tensor):
        self.layer, self.visual_idx = layer, alive
        self._attention = torch.isin(alive, favourites).float()[None, None]

    def text_attention(self, prompt: bool = False) -> torch.Tensor:
        return self._attention


def survivors(confidence: dict[int, float], **options) -> torch.Tensor:
    """Which of 40 patches survive layer 4, when layers 3 and after like different halves."""
    layout = TokenLayout(('a',), (5, 8), (1,), 60, Span(41, 50), Span(43, 48), Span(50, 56))
    memory = Memory(
        global_rank=torch.full((1, 40), torch.inf),
        confidence=torch.tensor([confidence.get(layer, 1.0) for layer in range(1, 33)]),
    )
    run = SpecPrune(
        PruneConfig(static=False, prune_layers=(5,), layer_keep_ratio=0.5, **options)
    ).begin(
        QueryContext(
            layout=layout, depth=32, device=torch.device('cpu'), fine=False, alpha=0.8,
            similarity=None, memory=memory, query=1,
        )
    )  # fmt: skip
    alive, first, second = torch.arange(40), torch.arange(20), torch.arange(20, 40)
    for layer, favourites in ((1, first), (2, first), (3, first), (4, second), (5, second)):
        keep = run.after_layer(Layer(layer, alive, favourites))
    return keep


def test_entropy_weighs_layers_and_average_does_not():
    confident_early = {3: 100.0, 4: 1.0}
    assert survivors(confident_early).tolist() == list(range(20))
    late = survivors(confident_early, layer_weight='average')
    assert (late >= 20).sum() >= 10, 'in the average the later layer weighs at least as much'


def test_update_layers_choose_who_scores():
    assert survivors({}, update_layers=(3,)).tolist() == list(range(20))
    assert survivors({}, update_layers=(4,)).tolist() == list(range(20, 40))


def test_update_layers_must_come_before_the_first_prune_layer():
    with pytest.raises(ConfigError, match=r'pruning\.update_layers'):
        make_policy(pruning__update_layers=(12, 18))


# In a decoder of 12 layers both come to layer 5: nothing scores before the first prune layer.
COLLIDING = {'update_layers': (12,), 'prune_layers': (13,)}


@pytest.mark.parametrize('method', METHODS)
def test_layers_that_collide_at_the_models_depth_fail_at_load(method):
    """Bug: every query failed and ran dense. Any method may be chosen live, its layers may not."""
    with pytest.raises(ConfigError, match=r'pruning\.update_layers = \(12,\).*12 layers'):
        make_policy(
            pruning__method=method,
            **{f'pruning__{name}': layers for name, layers in COLLIDING.items()},
        )


@pytest.mark.parametrize('method', METHODS)
def test_layers_that_collide_at_the_models_depth_change_nothing_live(policy, method):
    with pytest.raises(ConfigError, match=r'pruning\.update_layers'):
        policy.set_pruning(PruneConfig(method=method, **COLLIDING))
    assert policy.config.pruning == PruneConfig()
    assert policy.infer(make_observation(0)).report.method == 'specprune'


LAYERS = st.sets(st.integers(1, 32), max_size=6).map(sorted).map(tuple)


@given(prune=LAYERS, update=LAYERS, depth=st.integers(1, 48))
def test_layers_that_pass_at_load_work_in_every_query(prune, update, depth):
    layout = TokenLayout(('a',), (5, 8), (1,), 60, Span(41, 50), Span(43, 48), Span(50, 56))
    memory = Memory(global_rank=torch.full((1, 40), torch.inf), confidence=torch.ones(depth))
    config = PruneConfig(prune_layers=prune, update_layers=update, budget='fixed')
    try:
        method = SpecPrune(config)
        method.check_depth(depth)
    except ConfigError:
        assert update, 'without a list of their own, some layer always scores'
        return
    run = method.begin(
        QueryContext(
            layout=layout, depth=depth, device=torch.device('cpu'), fine=False, alpha=0.8,
            similarity=None, memory=memory, query=1,
        )
    )  # fmt: skip
    alive = torch.arange(40)
    for layer in range(1, depth + 1):
        keep = run.after_layer(Layer(layer, alive, torch.arange(20)))
        alive = alive if keep is None else keep
    assert run.memory().global_rank.isfinite().any()
    assert 0 < len(alive) <= 40


@given(a=st.floats(0.3, 1.6), b=st.floats(0.3, 1.6), budget=st.sampled_from(['union', 'fixed']))
@settings(max_examples=8, deadline=None)
def test_more_alpha_never_keeps_less(shared, a, b, budget):
    kept = [
        reports(shared, 2, alpha=alpha, budget=budget)[-1].tokens_static
        for alpha in sorted((a, b))
    ]
    assert (kept[0] <= kept[1]).all()


# State -------------------------------------------------------------------------------------


def test_other_camera_names_in_another_order_prune_the_same_patches():
    """Permuting the cameras of a scene permutes what is wanted of each by what it shows.

    The model's own sequence has an order, so attention differs; what changed does not.
    """
    one, other = (
        make_policy(runtime__warm_up_queries=0, robot__camera_names=names)
        for names in (CAMERAS, CAMERAS[::-1])
    )
    changed = []
    for policy in (one, other):
        report = reports(policy, 2)[-1]
        grids = {name: report.camera_grid(name)[0] & Reason.DYNAMIC for name in CAMERAS}
        changed.append(grids)
        assert report.cameras == policy.config.robot.camera_names
    for name in CAMERAS:
        assert changed[0][name].any()
        np.testing.assert_array_equal(changed[0][name], changed[1][name])


@pytest.mark.parametrize('budget', ['union', 'fixed'])
def test_a_camera_that_was_away_is_dense_when_it_returns(policy, budget):
    policy.set_pruning(PruneConfig(budget=budget))
    policy.infer(make_observation(0))
    execute(policy, 0)
    assert policy.infer(make_observation(8)).report.mode == Mode.COARSE
    for query in (1, 2):  # no image of the side camera for two chunks' time
        execute(policy, query, cameras=('wrist',))
    report = policy.infer(make_observation(24)).report
    wrist, side = report.tokens_static
    assert report.fallback_reason == ''
    assert side == 256
    if budget == 'union':
        assert wrist < 256
        assert report.mode == Mode.COARSE
    else:
        assert report.mode == Mode.DENSE
        assert report.mode_reason == 'a camera returned'
    execute(policy, 3)
    after = policy.infer(make_observation(32)).report
    assert (after.tokens_static < 256).all()


@pytest.mark.parametrize('budget', ['union', 'fixed'])
def test_a_camera_that_was_away_between_two_frames_with_it_is_dense(policy, budget):
    """Bug: only the reference frame was asked, here from step 5 and with all cameras."""
    policy.set_pruning(PruneConfig(budget=budget))
    policy.infer(make_observation(0))
    execute(policy, 0, steps=6)
    execute(policy, 0, steps=1, cameras=('wrist',))
    execute(policy, 0, steps=1)
    report = policy.infer(make_observation(8)).report
    assert report.tokens_kept[1] == 256
    assert (report.tokens_kept[0] < 256) == (budget == 'union')
    execute(policy, 1)
    assert (policy.infer(make_observation(16)).report.tokens_kept < 256).all()


@pytest.mark.parametrize('told', [True, False], ids=['executed steps told', 'nothing told'])
def test_a_camera_that_a_query_lacked_is_dense_at_the_next(policy, told):
    def step(query):
        for _ in range(STEPS if told else 0):
            policy.observe_executed(make_action(*FAST))  # a caller that keeps no images

    policy.infer(make_observation(0))
    step(0)
    assert (policy.infer(make_observation(8)).report.tokens_kept < 256).all()
    step(1)
    with pytest.raises(ObservationError, match='cameras/side'):
        policy.infer(make_observation(16, cameras=('wrist',)))
    step(2)
    report = policy.infer(make_observation(24)).report
    assert report.fallback_reason == ''
    assert report.tokens_kept[1] == 256
    assert report.tokens_kept[0] < 256
    step(3)
    assert (policy.infer(make_observation(32)).report.tokens_kept < 256).all()


def test_two_queries_in_one_control_step_add_no_step(policy):
    """Bug: the second of them counted a step that nobody had executed."""
    policy.infer(make_observation(0))
    execute(policy, 0)
    ages = [policy.infer(make_observation(8)).report.reference_age for _ in range(3)]
    assert ages == [3, 8, 8], 'T is 3 after fast motion, and the oldest frame after none'
    execute(policy, 1, steps=2, velocity=SLOW)
    assert policy.infer(make_observation(10)).report.reference_age == 10


def test_time_that_stands_in_for_steps_counts_once(policy, monkeypatch):
    """A query that gave no action leaves the time since the last good one to the next."""
    policy.infer(make_observation(0))
    act = policy.model.act
    with monkeypatch.context() as patch:
        patch.setattr(policy.model, 'act', lambda *given: act(*given) * torch.nan)
        for step in (2, 4):
            with pytest.raises(ActionError):
                policy.infer(make_observation(step))
    assert policy.infer(make_observation(6)).report.reference_age == 6


def test_steps_of_unknown_motion_count_and_time_does_not(policy):
    policy.infer(make_observation(0))
    policy.observe_executed(None)
    policy.infer(make_observation(1))
    assert policy.infer(make_observation(20)).report.reference_age == 1


def test_frames_count_executed_steps_not_time(policy):
    """A chunk of which only three steps ran: the reference is three steps old, no more."""
    policy.infer(make_observation(0))
    execute(policy, 0, steps=3)
    assert policy.infer(make_observation(8)).report.reference_age == 3
    execute(policy, 1, steps=8, velocity=(0.5,))
    report = policy.infer(make_observation(16)).report
    assert report.chunk_displacement == pytest.approx(4.0)
    assert report.reference_age == 7, 'floor(7 - 4) + 4 steps, though the chunk had 8'


def test_a_long_pause_starts_a_new_episode(policy):
    policy.infer(make_observation(0))
    execute(policy, 0)
    epoch = policy.epoch
    late = make_observation(8, stamp_ns=11 * 10**9)
    assert policy.infer(late).report.mode == Mode.DENSE
    assert policy.epoch == epoch + 1


def test_results_do_not_depend_on_what_ran_before_a_reset(policy):
    first = reports(policy)
    policy.infer(make_observation(40, instruction='something else'))
    execute(policy, 9, velocity=SLOW)
    second = reports(policy)
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a.pruned_after_layer, b.pruned_after_layer)
        np.testing.assert_array_equal(a.reason, b.reason)
        np.testing.assert_array_equal(a.recall, b.recall)


def test_dense_queries_equal_the_dense_model_bit_for_bit(policy):
    policy.set_pruning(PruneConfig(method='none'))
    policy.reset()
    expected = [policy.infer(make_observation(8 * query)).chunk for query in range(3)]
    policy.set_pruning(PruneConfig(dense_every=1))
    policy.reset()
    for query, chunk in enumerate(expected):
        result = policy.infer(make_observation(8 * query))
        assert result.report.mode == Mode.DENSE
        np.testing.assert_array_equal(result.chunk.normalized, chunk.normalized)
        execute(policy, query)


def test_turning_fine_asks_for_a_new_query_where_configured(policy):
    for wanted in (False, True):
        policy.set_pruning(PruneConfig(replan_on_fine=wanted))
        policy.reset()
        policy.infer(make_observation(0))
        assert execute(policy, 0, steps=2, velocity=FAST) == [False, False]
        assert execute(policy, 0, steps=2, velocity=SLOW) == [wanted, False]


def test_important_patches_are_those_that_the_next_query_keeps_as_global(policy):
    before, after = reports(policy, 2)
    wanted = before.important.astype(bool)
    assert wanted.any()
    np.testing.assert_array_equal(after.reason & Reason.GLOBAL > 0, wanted)


def test_a_query_without_a_finite_action_leaves_no_trace(policy, monkeypatch):
    """Bug: the NaN confidence of a failed first query ruled the rest of the episode."""
    policy.set_pruning(PruneConfig())
    act = policy.model.act
    monkeypatch.setattr(policy.model, 'act', lambda *given: act(*given) * torch.nan)
    with pytest.raises(ActionError):
        policy.infer(make_observation(0))
    monkeypatch.setattr(policy.model, 'act', act)
    assert policy.infer(make_observation(8)).report.mode == Mode.DENSE


@pytest.mark.parametrize('method', ['specprune', 'random', 'uniform'])
def test_no_camera_that_returned_loses_patches_later(policy, method):
    """Bug: later layers pruned the camera that static pruning had spared; so did the controls."""
    policy.set_pruning(PruneConfig(method=method))
    policy.infer(make_observation(0))
    execute(policy, 0, cameras=('wrist',))
    report = policy.infer(make_observation(8)).report
    assert report.tokens_kept[1] == 256
    assert report.tokens_kept[0] < report.tokens_static[0] < 256


def test_a_camera_that_a_query_lacked_is_noted_whatever_else_was_wrong(policy):
    """Bug: an observation refused for its instruction did not say which cameras were away."""
    policy.infer(make_observation(0))
    execute(policy, 0)
    with pytest.raises(ObservationError, match='instruction'):
        policy.infer(make_observation(8, cameras=('wrist',), instruction=' '))
    execute(policy, 1)
    assert policy.infer(make_observation(16)).report.tokens_kept[1] == 256


def test_without_the_controller_the_report_does_not_speak_for_it(policy):
    """Bug: a query that was pruned hard was said to be pruned gently."""
    for report in reports(policy, 3, controller=False)[1:]:
        assert report.mode == Mode.COARSE
        assert report.mode_reason == 'the controller is off'


def test_only_the_first_query_of_an_episode_is_called_that(policy):
    """Bug: so was the first one of a method that was chosen in the middle of it."""
    policy.set_pruning(PruneConfig(method='none'))
    for query in range(2):
        policy.infer(make_observation(8 * query))
    policy.set_pruning(PruneConfig())
    report = policy.infer(make_observation(16)).report
    assert report.mode == Mode.DENSE
    assert report.mode_reason == 'nothing is known of a query before'


def test_another_frame_serves_where_one_does_not_decode(policy):
    """Bug: one broken frame, and nothing counted as changed."""
    policy.infer(make_observation(0))
    broken = CompressedImage('cameras/wrist', 'jpeg', b'\xff\xd8 cut')
    for step in range(STEPS):
        images = dict(make_observation(step).images)
        if step == 5:  # T is floor(7 - 7.2) + 4 = 3 steps back
            images['wrist'] = broken
        policy.observe_executed(make_action(*FAST), images)
    report = policy.infer(make_observation(8)).report
    assert report.reference_age == 4
    assert (report.reason & Reason.DYNAMIC).any()


def test_a_camera_that_changed_size_with_the_task_is_refused_at_the_next_query(policy):
    policy.infer(make_observation(0))
    policy.infer(make_observation(8, instruction='another task'))
    small = {name: image[:100] for name, image in make_observation(16).images.items()}
    with pytest.raises(ObservationError, match='the size'):
        policy.infer(make_observation(16, instruction='another task', images=small))


def test_image_to_text_needs_a_model_whose_image_sees_the_text(policy):
    object.__setattr__(policy.model.decoder, 'causal', True)
    try:
        with pytest.raises(ConfigError, match=r'pruning\.score_direction'):
            policy.set_pruning(PruneConfig(score_direction='image_to_text'))
    finally:
        object.__setattr__(policy.model.decoder, 'causal', False)
