"""The paper's formulas against independent reference vectors, and their invariants."""

import re

import numpy as np
import pytest
import torch
from conftest import golden
from hypothesis import given
from hypothesis import strategies as st

from specprune_ros.pruning import scores
from specprune_ros.pruning.budget import layer_keep_count

PRUNERS = 'pruners/paper_specprune_scores.npz'


def named(data: dict, pattern: str) -> tuple[np.ndarray, list[str]]:
    """The one array whose name matches, and the groups: sizes stand in the names."""
    (found,) = [match for name in data if (match := re.fullmatch(pattern, name))]
    return data[found.string], list(found.groups())


def attention(data: dict, rows: np.ndarray, columns: np.ndarray) -> torch.Tensor:
    """[layers, H, rows, columns] of a full attention map."""
    return torch.from_numpy(data['attn'][:, :, rows][..., columns])


@pytest.mark.golden
@pytest.mark.parametrize('camera', [0, 1])
def test_eq2_in_both_directions(camera):
    data = golden(PRUNERS)
    image, text = data[f'vis_view{camera}'], data['text_idx']
    forward = attention(data, text, image)
    backward = attention(data, image, text).mT
    for name, maps in (('text_to_image', forward), ('image_to_text', backward)):
        got = np.stack([scores.attention_score(layer).numpy() for layer in maps])
        np.testing.assert_allclose(got, data[f'eq2_{name}_view{camera}'], atol=1e-6)


@pytest.mark.golden
@pytest.mark.parametrize('camera', [0, 1])
def test_local_and_global_sets(camera):
    data = golden(PRUNERS)
    ids = data[f'vis_view{camera}']
    maps = attention(data, data['text_idx'], ids)
    score = torch.stack([scores.attention_score(layer) for layer in maps])[:, None]

    def union(layers: list[int], k: int) -> np.ndarray:
        wanted = sum(scores.top_k_rank(score[layer], k).isfinite()[0].int() for layer in layers)
        return ids[wanted.bool().numpy()]

    local, (k,) = named(data, rf'vlocal_k(\d+)_view{camera}')
    assert union([0, 1], int(k)).tolist() == local.tolist()
    # The file's middle and last layer are not named; its sets must come from one pair of layers.
    last = len(maps) - 1
    pairs = [(layer, last) for layer in range(last)]
    both, (k,) = named(data, rf'vglobal_union_k(\d+)_view{camera}')
    k, expected = int(k), both.tolist()
    assert expected in [union(list(pair), k).tolist() for pair in pairs]

    def mean(layers: list[int], k: int) -> np.ndarray:
        fused = torch.stack([score[layer] for layer in layers]).mean(dim=0)
        return ids[scores.top_k_rank(fused, k).isfinite()[0].numpy()]

    right = [list(pair) for pair in pairs if union(list(pair), k).tolist() == expected]
    means = [mean(pair, k).tolist() for pair in right]
    assert data[f'vglobal_mean_k{k}_view{camera}'].tolist() in means


@pytest.mark.golden
@pytest.mark.parametrize('base', [0, 1])
@pytest.mark.parametrize('slope', [0.05, 0.1, 1.0])
def test_eq6_rank_weight(slope, base):
    data = golden(PRUNERS)
    expected, (tokens,) = named(data, rf'eq6_w_M(\d+)_k{slope}_base{base}')
    descending = torch.arange(int(tokens), 0, -1)[None].float()
    got = scores.rank_weight(descending, slope, base).numpy()
    np.testing.assert_allclose(got, expected, rtol=1e-5)


@pytest.mark.golden
def test_eq7_entropy_and_eq8_confidence():
    data = golden(PRUNERS)
    image = np.concatenate([data['vis_view0'], data['vis_view1']])
    maps = attention(data, data['text_idx'], image)
    entropy = torch.stack([scores.attention_entropy(layer) for layer in maps])
    np.testing.assert_allclose(entropy.numpy(), data['eq7_entropy_renorm'], rtol=1e-5)
    confidence = scores.layer_confidence(entropy)
    np.testing.assert_allclose(confidence.numpy(), data['eq8_conf_renorm'], rtol=1e-5)


@pytest.mark.golden
@pytest.mark.parametrize('base', [0, 1])
def test_eq5_and_eq9_scores_and_ten_percent_prune(base):
    data = golden(PRUNERS)
    image = np.concatenate([data['vis_view0'], data['vis_view1']])
    maps = attention(data, data['text_idx'], image)
    confidence = torch.from_numpy(data['eq8_conf_renorm']).float()
    total = torch.zeros(len(image))
    for index, expected in enumerate(data[f'eq5_9_S_joint_per_head_base{base}'], start=2):
        weight = scores.rank_weight(maps[index].mean(dim=1), 0.1, base)
        total = scores.ema(total, weight * confidence[index], 0.2)
        np.testing.assert_allclose(total.numpy(), expected, rtol=1e-4, atol=1e-7)
    keep = data[f'prune10_keep_per_head_base{base}']
    assert len(keep) == layer_keep_count(0.9, len(image))
    best = total.argsort(descending=True, stable=True)[: len(keep)].sort().values
    assert image[best].tolist() == keep.tolist()


@pytest.mark.golden
@pytest.mark.parametrize('camera', ['primary', 'wrist'])
def test_patch_similarity_and_changed_patches(camera):
    frames = golden('pruners/specprune_ref_patch_similarity.npz')
    sets = golden('pruners/paper_specprune_dynamic_tokens.npz')
    now, before = (torch.from_numpy(frames[f'{when}_{camera}'])[None] for when in ('cur', 'prev'))
    similarity = scores.patch_similarity(now, before, (16, 16))
    np.testing.assert_allclose(similarity[0].numpy(), frames[f'sim_{camera}'], atol=2e-6)
    for name, expected in sets.items():
        if not name.startswith(f'vdyn_{camera}'):
            continue
        threshold, k = name.split('tau')[1].split('_k')
        chosen = scores.changed_patches(similarity, float(threshold), int(k))[0]
        assert set(chosen.nonzero().flatten().tolist()) == set(expected.tolist()), name


def test_similarity_of_black_patches_is_defined():
    black = torch.zeros(1, 28, 28, 3, dtype=torch.uint8)
    half = black.clone()
    half[:, :14] = 9
    assert scores.patch_similarity(black, black, (2, 2)).tolist() == [[1, 1, 1, 1]]
    assert scores.patch_similarity(half, black, (2, 2)).tolist() == [[0, 0, 1, 1]]


def test_similarity_rejects_frames_that_differ_in_shape():
    with pytest.raises(ValueError, match='differ'):
        scores.patch_similarity(torch.zeros(1, 28, 28, 3), torch.zeros(1, 14, 28, 3), (2, 2))


@given(st.integers(0, 40), st.integers(1, 3), st.randoms(use_true_random=False))
def test_top_k_rank_has_k_distinct_ranks_per_row(k, rows, random):
    values = torch.tensor(
        [[random.choice([0.0, 0.5, 1.0]) for _ in range(20)] for _ in range(rows)]
    )
    ranks = scores.top_k_rank(values, k)
    for row, scored in zip(ranks, values, strict=True):
        finite = row.isfinite()
        assert sorted(row[finite].tolist()) == list(range(min(k, 20)))
        if 0 < k < 20:
            assert scored[finite].min() >= scored[~finite].max()


@given(st.integers(1, 4), st.integers(1, 30), st.floats(0.01, 2.0))
def test_rank_weight_is_a_distribution_that_favours_the_best(heads, tokens, slope):
    values = torch.rand(heads, tokens, generator=torch.Generator().manual_seed(tokens))
    weight = scores.rank_weight(values, slope)
    assert weight.sum().item() == pytest.approx(1.0, abs=1e-5)
    best = scores.rank_weight(values[:1], slope)
    assert best.argmax() == values[0].argmax()


def test_recall_of_eq1():
    last = torch.tensor([[True, True, False, False]])
    now = torch.tensor([[True, False, True, True]])
    assert scores.recall(last, now).item() == pytest.approx(1 / 3)
    assert scores.recall(last, torch.zeros_like(now)).isnan().all(), 'nothing was important'
