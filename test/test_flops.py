"""The FLOPs model of A.3."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from specprune_ros.pruning.flops import (
    flops_share,
    layer_flops,
    linear_share,
    scheduled_tokens,
    tokens_per_layer,
)

SEVEN_B = {'width': 4096, 'mlp_width': 11008}
PAPER = {'static_share': 0.4, 'static_layer': 2, 'keep_ratio': 0.9}


def test_the_papers_figures():
    """0.44 after static pruning, 0.85 of that and 0.37 of all after dynamic pruning (A.3)."""
    static = linear_share(scheduled_tokens(600, 32, prune_layers=(), **PAPER))
    final = linear_share(scheduled_tokens(600, 32, prune_layers=(10, 15, 20, 25), **PAPER))
    assert static == pytest.approx(0.4375)
    assert final == pytest.approx(0.3723, abs=1e-4)
    assert final / static == pytest.approx(0.85, abs=2e-3)


def test_equation_12_term_by_term():
    total, kept = 600.0, 240.0
    terms = [2 * layer_flops(total, **SEVEN_B), 8 * layer_flops(kept, **SEVEN_B)]
    terms += [5 * layer_flops(0.9**k * kept, **SEVEN_B) for k in (1, 2, 3)]
    terms += [(32 - 10 - 15) * layer_flops(0.9**4 * kept, **SEVEN_B)]
    counts = scheduled_tokens(total, 32, prune_layers=(10, 15, 20, 25), **PAPER)
    dense = 32 * layer_flops(total, **SEVEN_B)
    assert flops_share(counts, **SEVEN_B) == pytest.approx(sum(terms) / dense)


def test_layer_formula():
    assert layer_flops(3, 5, 7) == 4 * 3 * 25 + 2 * 9 * 5 + 2 * 3 * 5 * 7 + 3 * 7


def test_the_layer_that_prunes_still_computes_all():
    assert tokens_per_layer(100, 5, {2: 60, 4: 10}) == [100, 100, 40, 40, 30]


@given(
    st.integers(1, 40).flatmap(
        lambda depth: st.tuples(
            st.just(depth), st.dictionaries(st.integers(1, depth), st.integers(0, 20), max_size=5)
        )
    )
)
def test_pruning_more_never_costs_more(case):
    depth, gone = case
    counts = tokens_per_layer(1000, depth, gone)
    share = flops_share(counts, **SEVEN_B)
    assert 0 < share <= 1
    assert share <= linear_share(counts) + 1e-12, 'attention is quadratic: it saves more, not less'
    assert (share == 1) == (sum(c for layer, c in gone.items() if layer < depth) == 0)
