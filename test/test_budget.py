"""Static budgets, K tables, and layer schedules."""

import re

import numpy as np
import pytest
import torch
from conftest import golden
from hypothesis import given, settings
from hypothesis import strategies as st

from specprune_ros.config import PruneConfig
from specprune_ros.pruning import scores
from specprune_ros.pruning.budget import (
    fixed_count,
    layer_keep_count,
    scale_layers,
    select_fixed,
    select_union,
)
from specprune_ros.pruning.specprune import Schedule

PATCHES = 32


@st.composite
def candidates(draw) -> dict[str, torch.Tensor]:
    """Random sets of two cameras, as the run hands them to select_fixed."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    similarity = torch.rand(2, PATCHES, generator=generator)
    score = torch.rand(2, PATCHES, generator=generator)
    sizes = [draw(st.integers(0, PATCHES)) for _ in range(3)]
    return {
        'global_rank': scores.top_k_rank(torch.rand(2, PATCHES, generator=generator), sizes[0]),
        'dynamic_set': scores.changed_patches(similarity, 0.8, sizes[1]),
        'local_rank': scores.top_k_rank(score, sizes[2]),
        'similarity': similarity,
        'local_score': score,
    }


@settings(deadline=None)
@given(candidates(), st.integers(1, PATCHES))
def test_fixed_keeps_its_count_and_what_two_sets_want(sets, count):
    keep, filler = select_fixed(count, **sets)
    assert keep.tolist() == sorted(set(keep.tolist()))
    votes = (
        sets['global_rank'].isfinite().int()
        + sets['dynamic_set'].int()
        + sets['local_rank'].isfinite().int()
    )
    for camera in range(2):
        mine = keep[(keep >= camera * PATCHES) & (keep < (camera + 1) * PATCHES)] % PATCHES
        assert len(mine) == count
        kept_votes, all_votes = votes[camera][mine], votes[camera]
        for least in (3, 2, 1):
            wanted = int((all_votes >= least).sum())
            assert int((kept_votes >= least).sum()) == min(wanted, count)
        assert not (filler[camera] & (all_votes > 0)).any()


@settings(deadline=None)
@given(candidates())
def test_union_is_the_union(sets):
    members = (sets['global_rank'].isfinite(), sets['dynamic_set'], sets['local_rank'].isfinite())
    keep, filler = select_union(*members)
    expected = (members[0] | members[1] | members[2]).flatten().nonzero().flatten()
    assert torch.equal(keep, expected)
    assert not filler.any()


@pytest.mark.golden
@pytest.mark.parametrize('camera', [0, 1])
def test_retained_set_of_the_reference(camera):
    """V_global u V_dynamic u V_local of one camera, all three computed here."""
    data, retain = (
        golden(f'pruners/paper_specprune_{name}.npz') for name in ('scores', 'static_retain')
    )
    ids = data[f'vis_view{camera}']
    in_set = [
        torch.from_numpy(np.isin(ids, chosen))[None]
        for chosen in (
            next(data[n] for n in data if re.fullmatch(rf'vglobal_union_k\d+_view{camera}', n)),
            retain[f'dyn_view{camera}'],
            next(data[n] for n in data if re.fullmatch(rf'vlocal_k\d+_view{camera}', n)),
        )
    ]
    keep, _ = select_union(*in_set)
    assert sorted(ids[keep.numpy()]) == sorted(retain[f'retain_union_view{camera}'].tolist())


def test_fixed_counts_at_alpha_08():
    config = PruneConfig(alpha=0.8)
    assert [fixed_count(config, fine, 256) for fine in (False, True)] == [69, 84]


@given(st.floats(0.1, 2.0), st.floats(0.1, 2.0), st.booleans())
def test_fixed_count_rises_with_alpha(a, b, fine):
    low, high = sorted((a, b))
    counts = [fixed_count(PruneConfig(alpha=alpha), fine, 256) for alpha in (low, high)]
    assert 1 <= counts[0] <= counts[1] <= 256


@pytest.mark.parametrize(('tokens', 'kept'), [(100, 90), (57, 51), (10, 9), (1, 1)])
def test_ten_percent_go(tokens, kept):
    assert layer_keep_count(0.9, tokens) == kept


def test_schedule_of_32_layers_is_the_papers():
    schedule = Schedule.of(PruneConfig(), 32)
    assert schedule.prune == (10, 15, 20, 25)
    assert schedule.important == (15, 32)
    assert schedule.update == frozenset(range(3, 25)) - {10, 15, 20}


@given(st.integers(6, 80))
def test_schedule_of_other_depths(depth):
    schedule = Schedule.of(PruneConfig(), depth)
    assert list(schedule.prune) == sorted(set(schedule.prune))
    assert schedule.prune[0] >= 4
    assert max(schedule.prune + schedule.important) <= depth
    assert schedule.important[-1] == depth
    assert 3 in schedule.update
    assert depth < 8 or len(schedule.prune) == 4


def test_layers_scale_in_proportion():
    assert scale_layers((10, 15, 20, 25), 64, first=4) == (20, 30, 40, 50)
    assert scale_layers((10, 15, 20, 25), 12, first=4) == (4, 6, 8, 9)
