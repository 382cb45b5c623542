"""The guard relaxes pruning when actions or recall degrade, within its bounds, and back again."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import make_action, make_observation, make_policy
from hypothesis import given
from hypothesis import strategies as st

from specprune_ros.config import PruneConfig
from specprune_ros.pruning.guard import GOOD_CHECKS, GuardState, after_check, checks_now
from specprune_ros.types import Mode

CONFIG = PruneConfig(guard_every=4, guard_alpha=1.1, guard_step=0.1)
GOOD = {'disagreement': 0.0, 'recall': 1.0}
BAD = {'disagreement': 1.0, 'recall': 1.0}


def after(checks: list[dict], state: GuardState | None = None) -> GuardState:
    state = state or GuardState()
    for check in checks:
        state = after_check(state, CONFIG, **check)
    return state


def test_bad_checks_raise_alpha_step_by_step_and_then_trip():
    assert after([BAD]).alpha(CONFIG) == pytest.approx(0.9)
    assert after([BAD] * 3).alpha(CONFIG) == pytest.approx(1.1)
    assert not after([BAD] * 3).tripped
    tripped = after([BAD] * 4)
    assert tripped.tripped
    assert tripped.alpha(CONFIG) == pytest.approx(1.1)
    assert 'differ by 1.000' in tripped.why


@pytest.mark.parametrize(
    ('check', 'word'),
    [
        ({'disagreement': float('nan'), 'recall': 1.0}, 'nan'),
        ({'disagreement': 0.0, 'recall': 0.1}, 'recall 0.10'),
    ],
)
def test_what_counts_as_bad(check, word):
    state = after([check])
    assert state.extra > 0
    assert word in state.why


def test_unknown_recall_is_no_fault():
    assert after([{'disagreement': 0.0, 'recall': float('nan')}]).extra == 0


def test_good_checks_bring_alpha_back():
    relaxed = after([BAD] * 2)
    assert after([GOOD] * (GOOD_CHECKS - 1), relaxed).extra == relaxed.extra
    once = after([GOOD] * GOOD_CHECKS, relaxed)
    assert once.extra == pytest.approx(relaxed.extra - 0.1)
    home = after([GOOD] * GOOD_CHECKS, once)
    assert home.extra == pytest.approx(0)
    assert home.why == ''


def test_a_good_check_ends_the_dense_state_but_keeps_the_highest_alpha():
    recovered = after([GOOD], after([BAD] * 5))
    assert not recovered.tripped
    assert recovered.alpha(CONFIG) == pytest.approx(1.1)


@given(st.lists(st.sampled_from([GOOD, BAD]), max_size=40))
def test_alpha_stays_within_its_bounds(checks):
    state = GuardState()
    for check in checks:
        state = after_check(state, CONFIG, **check)
        assert CONFIG.alpha - 1e-9 <= state.alpha(CONFIG) <= CONFIG.guard_alpha + 1e-9
        assert not state.tripped or state.alpha(CONFIG) == pytest.approx(CONFIG.guard_alpha)


def test_checks_come_every_nth_query_and_never_without_a_guard():
    assert [q for q in range(13) if checks_now(CONFIG, q)] == [4, 8, 12]
    assert not any(checks_now(PruneConfig(), q) for q in range(100))


# In the policy ---------------------------------------------------------------------------------


def run(policy, queries: int) -> list:
    results = []
    for query in range(queries):
        results.append(policy.infer(make_observation(8 * query)))
        for _ in range(8):
            policy.observe_executed(make_action(0.9), make_observation(8 * query).images)
    return results


def guarded(**limits):
    values = {f'pruning__{name}': value for name, value in limits.items()}
    return make_policy(runtime__warm_up_queries=0, pruning__guard_every=2, **values)


def test_a_compared_query_returns_the_dense_actions_and_says_so():
    policy = guarded(guard_disagreement=1e3, guard_recall=0.0)
    dense = make_policy(runtime__warm_up_queries=0, pruning__method='none')
    results, expected = run(policy, 4), run(dense, 4)
    compared = [not np.isnan(result.report.guard_disagreement) for result in results]
    assert compared == [False, False, True, False]
    assert results[2].report.guard_disagreement > 0
    assert results[2].report.mode == Mode.COARSE
    np.testing.assert_array_equal(results[2].chunk.normalized, expected[2].chunk.normalized)
    assert np.abs(results[3].chunk.normalized - expected[3].chunk.normalized).max() > 0


def test_disagreement_relaxes_pruning_up_to_dense_and_is_counted():
    policy = guarded(guard_disagreement=0.0, guard_alpha=0.9, guard_recall=0.0)
    reports = [result.report for result in run(policy, 8)]
    assert [round(report.alpha, 3) for report in reports[:4]] == [0.8, 0.8, 0.8, 0.9]
    assert 'relaxed by the guard' in reports[3].mode_reason
    assert reports[3].tokens_kept.sum() > 0
    assert reports[5].mode == Mode.FALLBACK
    assert 'guard: actions differ' in reports[5].fallback_reason
    assert (reports[5].tokens_kept == reports[5].tokens_total).all()
    assert reports[6].mode == Mode.COARSE, 'it goes on checking'
    assert reports[7].mode == Mode.FALLBACK
    policy.reset()
    assert run(policy, 2)[1].report.alpha == pytest.approx(0.8), 'a new episode starts afresh'


def test_too_few_kept_runs_dense():
    policy = make_policy(runtime__warm_up_queries=0, pruning__keep_floor=0.9)
    report = run(policy, 2)[1].report
    assert report.mode == Mode.FALLBACK
    assert 'pruning.keep_floor' in report.fallback_reason
    assert report.flops_share == 1.0


def test_flops_share_falls_with_alpha():
    shares = []
    for alpha in (0.4, 0.8, 1.2):
        policy = make_policy(runtime__warm_up_queries=0, pruning__alpha=alpha)
        shares.append(run(policy, 2)[1].report.flops_share)
    assert 0 < shares[0] < shares[1] < shares[2] < 1


def test_recall_mean_is_the_mean_of_the_recalls_so_far():
    reports = [result.report for result in run(make_policy(runtime__warm_up_queries=0), 5)]
    assert np.isnan(reports[0].recall_mean).all()
    recalls = np.stack([report.recall for report in reports[1:]])
    np.testing.assert_allclose(reports[-1].recall_mean, recalls.mean(axis=0))
