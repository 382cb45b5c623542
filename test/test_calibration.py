"""Parameters from a recording: valleys of speeds, noise of still patches, K and layers."""

import dataclasses
import json
import math

import cv2
import numpy as np
import pytest
import torch
from conftest import DATA, make_action, make_observation, make_policy
from hypothesis import given, settings
from hypothesis import strategies as st

from specprune_ros.calibration import study
from specprune_ros.calibration.budget import global_rank, search_budget
from specprune_ros.calibration.dip import dip_p_value, dip_statistic
from specprune_ros.calibration.folds import gain_of
from specprune_ros.calibration.layers import config_layer, config_layers, search_layers
from specprune_ros.calibration.noise import camera_noise, patch_power, proposed_tau
from specprune_ros.calibration.proposal import (
    Proposal,
    k_proposals,
    layer_proposal,
    tau_proposal,
    threshold_proposal,
    with_proposals,
    write_figures,
    write_parameters,
)
from specprune_ros.calibration.scan import QueryScores, RecordingScan, ScoreRecorder
from specprune_ros.calibration.study import calibrate, write_study
from specprune_ros.calibration.thresholds import executed_motion, find_valley
from specprune_ros.cli import main
from specprune_ros.config import PruneConfig, RobotConfig
from specprune_ros.config_files import from_mapping, load_config
from specprune_ros.errors import PruningError
from specprune_ros.loading import load_policy
from specprune_ros.policy import Policy
from specprune_ros.pruning.budget import fixed_count, scale_layers
from specprune_ros.pruning.motion import Motion
from specprune_ros.pruning.scores import patch_similarity
from specprune_ros.pruning.specprune import SpecPrune
from specprune_ros.recordings import open_recording

OWN_BAG = DATA / 'pick_place'
K_NAMES = ('k_global', 'k_local_coarse', 'k_dynamic_coarse', 'k_local_fine', 'k_dynamic_fine')

# Speeds -----------------------------------------------------------------------------------------


def normal(mean: float, width: float):
    """Sampler and density."""
    return (
        lambda random, n: np.abs(random.normal(mean, width, n)),
        lambda x: np.exp(-0.5 * ((x - mean) / width) ** 2) / width,
    )


def log_normal(mean: float, width: float):
    return (
        lambda random, n: mean * np.exp(random.normal(0, width, n)),
        lambda x: np.exp(-0.5 * (np.log(x / mean) / width) ** 2) / (width * x),
    )


def gamma(shape: float, scale: float):
    factor = math.sqrt(2 * math.pi) / math.gamma(shape) / scale**shape
    return (
        lambda random, n: random.gamma(shape, scale, n),
        lambda x: factor * x ** (shape - 1) * np.exp(-x / scale),
    )


# slow mode, fast mode, share of slow steps, steps
SHAPES = {
    'far apart': (normal(0.3, 0.06), normal(0.8, 0.1), 0.4, 800),
    'apart': (normal(0.3, 0.08), normal(0.7, 0.1), 0.5, 800),
    'close': (normal(0.35, 0.08), normal(0.68, 0.09), 0.5, 1500),
    'few slow': (normal(0.2, 0.06), normal(0.7, 0.12), 0.25, 1200),
    'skewed': (log_normal(0.15, 0.35), log_normal(0.8, 0.2), 0.5, 800),
    'skewed slow': (gamma(3, 0.05), gamma(30, 0.025), 0.5, 1200),
    'mixed': (gamma(3, 0.04), normal(0.8, 0.12), 0.5, 1200),
}
NOISE_SHARE, FASTEST = 0.03, 1.2


def stream(shape: str, seed: int) -> np.ndarray:
    """Speeds of a shape, with some that belong to nothing."""
    slow, fast, share, steps = SHAPES[shape]
    random = np.random.default_rng(seed)
    is_slow = random.random(steps) < share
    speeds = np.where(is_slow, slow[0](random, steps), fast[0](random, steps))
    odd = random.random(steps) < NOISE_SHARE
    return np.where(odd, random.uniform(0, FASTEST, steps), speeds)


def true_valley(shape: str) -> float:
    """Where the density is lowest between the modes' peaks."""
    slow, fast, share, _ = SHAPES[shape]
    grid = np.linspace(1e-3, FASTEST, 20_000)
    parts = share * slow[1](grid), (1 - share) * fast[1](grid)
    between = slice(parts[0].argmax(), parts[1].argmax())
    return grid[between][np.sum(parts, axis=0)[between].argmin()]


@pytest.mark.parametrize('seed', [1, 2])
@pytest.mark.parametrize('shape', SHAPES)
def test_valley_is_found(shape, seed):
    valley = find_valley(stream(shape, seed), seed)
    assert valley.bimodal
    assert valley.valley == pytest.approx(true_valley(shape), rel=0.1)
    low, high = valley.interval
    assert low < high
    assert valley.mixture.depth < 1
    assert valley.kernel.peaks[0] < valley.valley < valley.kernel.peaks[1]


UNIMODAL = {
    'normal': lambda random, n: np.abs(random.normal(0.6, 0.15, n)),
    'exponential': lambda random, n: random.exponential(0.3, n),
    'uniform': lambda random, n: random.uniform(0, 1, n),
    'log normal': lambda random, n: np.exp(random.normal(-1, 0.8, n)),
    'norm of a vector': lambda random, n: np.linalg.norm(random.normal(0, 0.3, (n, 3)), axis=1),
    'heavy tail': lambda random, n: np.abs(random.standard_cauchy(n)),
    'constant': lambda random, n: np.full(n, 0.4),
    'constant but for rounding': lambda random, n: 0.4 + 1e-12 * random.random(n),
}


@pytest.mark.parametrize('kind', UNIMODAL)
@pytest.mark.parametrize('steps', [60, 1000])
def test_one_mode_has_no_valley(kind, steps):
    for seed in range(2):
        valley = find_valley(UNIMODAL[kind](np.random.default_rng(seed), steps))
        assert not valley.bimodal, (seed, valley.valley)
        assert 'not bimodal' in valley.why_not
        assert math.isnan(valley.valley)


@pytest.mark.parametrize('steps', [0, 1, 2, 10, 49])
def test_few_steps_say_so(steps):
    speeds = np.tile([0.1, 0.9], 25)[:steps]
    valley = find_valley(speeds)
    assert not valley.bimodal
    assert ('no executed actions' if steps == 0 else f'{steps} executed steps') in valley.why_not


def test_standing_still_is_no_mode():
    """A robot that pauses and moves at one speed has no fine motion to tell from it."""
    random = np.random.default_rng(0)
    speeds = np.concatenate((np.zeros(200), random.normal(0.7, 0.1, 200)))
    valley = find_valley(speeds)
    assert (valley.at_rest, len(valley.speeds)) == (200, 200)
    assert not valley.bimodal


def test_valley_of_clipped_commands():
    """Commands that repeat exactly, as of a limit or a scripted arm, are modes like others."""
    random = np.random.default_rng(0)
    speeds = np.concatenate((np.full(60, 0.4), np.full(120, 0.9), random.uniform(0.1, 0.9, 60)))
    valley = find_valley(random.permutation(speeds))
    assert 0.5 < valley.valley < 0.8


@settings(max_examples=4, deadline=None)
@given(st.floats(1e-3, 1e3), st.integers(0, 3))
def test_threshold_scales_with_the_speeds(factor, seed):
    speeds = stream('apart', seed)
    one, other = find_valley(speeds), find_valley(factor * speeds)
    assert other.valley == pytest.approx(factor * one.valley, rel=0.01)
    assert other.p_value == one.p_value


def test_dip_against_its_definition():
    """Two points and two equal pairs have dips that can be found by hand; see Hartigan 1985."""
    assert dip_statistic(np.array([0.0, 0.0, 1.0, 1.0])) == pytest.approx(0.25, abs=0.01)
    even = dip_statistic(np.linspace(0, 1, 100))
    assert 0 < even < 0.02
    assert dip_p_value(0.25, 100) < 0.01
    assert dip_p_value(even, 100) > 0.9


def test_dip_of_unimodal_samples_is_rarely_significant():
    random = np.random.default_rng(5)
    p_values = [dip_p_value(dip_statistic(random.random(400)), 400) for _ in range(60)]
    assert np.mean(np.array(p_values) < 0.1) < 0.25
    assert np.median(p_values) == pytest.approx(0.5, abs=0.2)


def test_motion_is_the_controllers():
    robot = RobotConfig(translation_scale=0.1, rotation_scale=0.5)
    events = [
        make_action(0.03, 0.04, 0, 0, 0, 0.25),
        make_action(0.1, dry_run=True),
        make_action(float('nan')),
        make_action(names=tuple('abcdefg')),
        make_action(0, 0, -0.1),
    ]
    motions, unusable = executed_motion(events, robot)
    assert unusable == 2
    speeds = [(m.translation_speed, m.rotation_speed, m.vertical) for m in motions]
    np.testing.assert_allclose(speeds, [(0.5, 0.5, 0), (1, 0, -1)])


# Noise ------------------------------------------------------------------------------------------

ROWS, PATCH = 8, 14
SIDE = ROWS * PATCH


def scene(seed: int) -> np.ndarray:
    """A textured picture, patches of different brightness."""
    random = np.random.default_rng(seed)
    shade = random.uniform(40, 210, (ROWS, 1, ROWS, 1, 3))
    texture = random.normal(0, 15, (ROWS, PATCH, ROWS, PATCH, 3))
    return (shade + texture).reshape(SIDE, SIDE, 3)


def noisy(picture: np.ndarray, sigma: float, random: np.random.Generator) -> np.ndarray:
    return np.clip(np.rint(random.normal(picture, sigma)), 0, 255).astype(np.uint8)


def film(sigma: float, motion: str, frames: int = 26, seed: int = 0):
    """Noisy frames of a scene, and which patches never move [N]."""
    random, base = np.random.default_rng(seed), scene(seed)
    moving = random.permutation(ROWS**2)[: {'none': 0, 'most': 40}.get(motion, 16)]
    wide = random.uniform(0, 255, (SIDE, SIDE + frames, 3))
    pictures = []
    for step in range(frames):
        picture = base.copy()
        for patch in moving:
            y, x = PATCH * (patch // ROWS), PATCH * (patch % ROWS)
            area = (slice(y, y + PATCH), slice(x, x + PATCH))
            if motion != 'at times' or step % 20 < 10:
                picture[area] = wide[y : y + PATCH, x + step : x + step + PATCH]
        pictures.append(noisy(picture, sigma, random))
    return pictures, np.isin(np.arange(ROWS**2), moving, invert=True)


def changes(pictures: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """[P, N] 1 - similarity and power, as the scan has them."""
    frames = torch.from_numpy(np.stack(pictures))
    gaps = [
        1 - patch_similarity(a[None], b[None], (ROWS, ROWS))[0]
        for a, b in zip(frames[1:], frames, strict=False)
    ]
    return torch.stack(gaps).numpy(), patch_power(frames, (ROWS, ROWS)).numpy()[1:]


def expected_gap(sigma: float, static: np.ndarray, rate: float, seed: int = 0) -> float:
    """1 - tau by brute force: fresh noise on the still patches, and the cosine in float64."""
    random, base = np.random.default_rng(99), scene(seed)
    gaps = []
    for _ in range(40):
        a, b = (
            noisy(base, sigma, random).astype(float).reshape(ROWS, PATCH, ROWS, PATCH * 3)
            for _ in range(2)
        )
        dot, aa, bb = ((p * q).sum(axis=(1, 3)) for p, q in ((a, b), (a, a), (b, b)))
        gaps.append((1 - dot / np.sqrt(aa * bb)).ravel()[static])
    return float(np.quantile(gaps, 1 - rate))


@pytest.mark.parametrize('sigma', [2.0, 15.0])
@pytest.mark.parametrize('motion', ['none', 'some', 'at times', 'most'])
def test_tau_follows_from_the_noise(sigma, motion):
    pictures, static = film(sigma, motion)
    noise = camera_noise(*changes(pictures), rate=0.01)
    assert 1 - noise.threshold == pytest.approx(expected_gap(sigma, static, 0.01), rel=0.1)
    assert noise.sigma == pytest.approx(sigma, rel=0.05)
    assert noise.static_patches == static.sum()
    assert noise.interval[0] <= noise.threshold <= noise.interval[1]


def test_wanted_rate_of_false_changes():
    pictures, static = film(5.0, 'some')
    gaps, power = changes(pictures)
    for rate in (0.01, 0.1):
        tau, _ = proposed_tau({'side': camera_noise(gaps, power, rate)})
        assert (gaps[:, static] > 1 - tau).mean() <= rate
        assert 1 - tau == pytest.approx(expected_gap(5.0, static, rate), rel=0.1)


def test_lowest_camera_sets_tau():
    quiet, loud = (camera_noise(*changes(film(s, 'none')[0]), rate=0.01) for s in (2.0, 9.0))
    blind = camera_noise(np.zeros((0, 4)), np.zeros((0, 4)), 0.01)
    tau, camera = proposed_tau({'a': quiet, 'b': loud, 'c': blind})
    assert camera == 'b'
    assert tau == pytest.approx(loud.threshold, rel=1e-3)
    assert max(noise.false_change_rate(tau) for noise in (quiet, loud)) <= 0.01
    assert 'needs' in blind.why_not


def test_repeated_pictures_say_nothing():
    """A camera slower than the control, or a video of repeated frames."""
    pictures, _ = film(5.0, 'some')
    doubled = [picture for picture in pictures for _ in (0, 1)]
    once, twice = (camera_noise(*changes(p), rate=0.01) for p in (pictures, doubled))
    assert once.threshold == twice.threshold


def test_rendered_pictures_have_no_noise():
    random, base = np.random.default_rng(0), scene(0)
    pictures = []
    for _ in range(30):
        picture = base.copy()
        picture[:PATCH] = random.uniform(0, 255, (PATCH, SIDE, 3))
        pictures.append(noisy(picture, 0.0, random))
    noise = camera_noise(*changes(pictures), rate=0.01)
    assert 'no noise' in noise.why_not
    assert proposed_tau({'side': noise}) == pytest.approx((math.nan, ''), nan_ok=True)
    kept = tau_proposal(0.95, {'side': noise}, 0.01)
    assert kept.proposed is None
    assert 'no noise' in kept.evidence


def test_a_camera_that_always_moves_has_no_still_patches():
    random = np.random.default_rng(0)
    wide = cv2.GaussianBlur(random.uniform(0, 255, (SIDE, 900, 3)), (0, 0), 6)
    wide = 128 + 4 * (wide - 128)
    at = np.cumsum(random.integers(0, 40, 40))  # faster, slower, standing
    noise = camera_noise(
        *changes([noisy(wide[:, x : x + SIDE], 1.0, random) for x in at % 780]), 0.01
    )
    assert 'nothing keeps still' in noise.why_not


# K ----------------------------------------------------------------------------------------------

DEPTH, PATCHES = 12, 256


def random_scores(queries: int, seed: int = 0, cameras: int = 2) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(DEPTH, cameras, PATCHES, generator=generator) for _ in range(queries)]


def make_records(scores: list[torch.Tensor], similarity=None, fine=lambda q: q % 3 == 0) -> list:
    still = torch.ones(scores[0].shape[1:])
    return [
        QueryScores(
            scores=each,
            confidence=torch.ones(len(each)),
            similarity=None if q == 0 else still if similarity is None else similarity[q],
            unseen=False,
            fine=bool(fine(q)),
            follows=q > 0,
        )
        for q, each in enumerate(scores)
    ]


def lasting(queries: int, size: int, layers=(6, 12)) -> list[torch.Tensor]:
    """Scores whose best `size` patches of some layers stay the same, in an ever new order."""
    scores = random_scores(queries)
    for each in scores:
        for layer in layers:
            each[layer - 1, :, 50 : 50 + size] += 10
    return scores


def mean_kept(search, mode: str) -> float:
    shown = search.grid.fine == (mode == 'fine')
    at = (search.choice.k_global, getattr(search.choice, mode))
    return float(search.grid.kept[at][shown].mean())


def test_lasting_importance_asks_for_a_large_k_global():
    """40 patches stay important: K_global 50 at alpha 0.8 holds them all, more is waste."""
    search = search_budget(make_records(lasting(20, size=40)), PruneConfig())
    assert search.values['k_global'] == 50
    assert search.grid.recall[search.choice.k_global].min() == 1
    assert search.grid.recall[: search.choice.k_global].max(axis=1).mean() < 1
    assert search.values['k_local_fine'] == search.values['k_local_coarse'] == 6
    assert search.gain.held_out > 0.1
    assert search.gain.worth_it


def test_importance_that_moves_asks_for_dynamic_tokens():
    """What is important is always what changed, never what was important before."""
    scores, similarity = random_scores(24), []
    for query, each in enumerate(scores):
        start = 40 * (query % 5)
        each[[5, 11], :, start : start + 24] += 10
        similar = torch.ones(2, PATCHES)
        similar[:, start : start + 24] = 0.5
        similarity.append(similar)
    search = search_budget(make_records(scores, similarity), PruneConfig(budget='union'))
    assert search.values['k_global'] == 10
    assert search.values['k_dynamic_coarse'] == search.values['k_dynamic_fine'] == 30
    chosen = search.grid.recall[search.choice.k_global, search.choice.fine]
    assert chosen.mean() == 1


@pytest.mark.parametrize(('share', 'seed'), [(None, 0), (None, 1), (0.15, 2), (0.3, 3), (0.5, 4)])
def test_proposal_stays_within_the_budget(share, seed):
    similarity = [each[0] for each in random_scores(12, seed + 50)]
    records = make_records(random_scores(12, seed), similarity)
    search = search_budget(records, PruneConfig(budget='union'), share=share)
    limit = search.grid.now_kept.mean() if share is None else share
    fine = search.grid.fine.mean()
    total = fine * mean_kept(search, 'fine') + (1 - fine) * mean_kept(search, 'coarse')
    assert total <= limit + 1e-9
    for mode in ('coarse', 'fine'):
        assert mean_kept(search, mode) == pytest.approx(search.kept[mode])
        assert search.kept[mode] <= search.budget[mode] + 1e-9


@pytest.mark.parametrize('fine_every', [2, 5])
def test_fixed_budget_does_not_grow_either(fine_every):
    config = PruneConfig(budget='fixed')
    records = make_records(lasting(20, size=45), fine=lambda q: q % fine_every)
    search = search_budget(records, config)
    proposed = dataclasses.replace(config, **search.values)
    assert proposed != config
    fine = search.grid.fine.mean()
    before, after = (
        (1 - fine) * fixed_count(c, False, 10_000) + fine * fixed_count(c, True, 10_000)
        for c in (config, proposed)
    )
    assert after <= before + 1


def test_budget_holds_the_tau_to_come():
    """A tau that calls more patches changed must not add tokens by the back door."""
    similarity = [torch.linspace(0.96, 0.999, PATCHES).expand(2, -1)] * 16
    records = make_records(random_scores(16), similarity)
    now = PruneConfig(budget='union')
    search = search_budget(records, dataclasses.replace(now, similarity_threshold=0.99), now=now)
    assert not search.now_fits
    proposed = k_proposals(now, search, stand_in=False, asked=False)
    assert all(each.written for each in proposed)
    assert search.kept['coarse'] <= search.budget['coarse'] + 1e-9


def test_all_points_are_there():
    """The paper's values are points of the grid, and so are configured ones beside it."""
    search = search_budget(make_records(random_scores(4)), PruneConfig(k_global=33))
    grid = search.grid
    assert {20, 30, 33, 40} <= set(grid.k_global)
    assert {(12, 15), (24, 20), (36, 30), (40, 10)} <= set(grid.pairs)
    points = study.grid_figures(search)['points']
    assert len(points) == 2 * len(grid.k_global) * len(grid.pairs)
    assert all(0 < point['kept'] < 1 and 0 <= point['recall'] <= 1 for point in points)


def test_recalls_by_hand():
    """One camera; K 3, 2, 1 at alpha 1: V_global of two queries, local and changed patches."""
    before, now = torch.zeros(DEPTH, 1, 12), torch.zeros(DEPTH, 1, 12)
    before[[5, 11], 0, :3] = torch.tensor([3.0, 2, 1])  # V_{t-1} = 0 1 2
    now[[5, 11], 0, 2:5] = torch.tensor([3.0, 2, 1])  # V_t = 2 3 4
    now[:2, 0, 8:10] = 1.0  # V_local = 8 9
    similarity = torch.ones(1, 12)
    similarity[0, 4] = 0.1  # V_dynamic = 4
    config = PruneConfig(
        alpha=1.0, k_global=3, k_local_coarse=2, k_dynamic_coarse=1, budget='union'
    )
    records = make_records([before, now], [None, similarity], fine=lambda q: False)
    grid = search_budget(records, config).grid
    at = (grid.k_global.index(3), grid.pairs.index((2, 1)))
    assert grid.kept[at][0] == pytest.approx(6 / 12)  # 0 1 2 4 8 9
    assert grid.recall[at][0] == pytest.approx(2 / 3)  # 2 4 of 2 3 4
    assert grid.global_recall[at[0]][0] == pytest.approx(1 / 3)
    assert grid.paper_recall[at][0] == pytest.approx(1 / 5)  # 2 of 2 3 4 8 9
    assert grid.now_recall[0] == pytest.approx(2 / 3)


def test_a_mode_that_was_not_recorded_keeps_its_k():
    records = make_records(lasting(20, size=40), fine=lambda q: True)
    search = search_budget(records, PruneConfig())
    assert search.unseen == ('coarse',)
    assert (search.values['k_local_coarse'], search.values['k_dynamic_coarse']) == (24, 20)


def test_without_consecutive_queries_nothing_is_searched():
    assert search_budget(make_records(random_scores(1)), PruneConfig()) is None
    assert search_layers(make_records(random_scores(1)), PruneConfig()) is None
    assert search_layers([], PruneConfig()) is None
    assert not any(p.proposed for p in k_proposals(PruneConfig(), None, False, asked=False))


def test_chance_is_no_gain():
    """The best of many random points looks good where it was chosen, and nowhere else."""
    random = np.random.default_rng(0)
    table, now = random.random((500, 40)), random.random(40)
    gain = gain_of(lambda q: table[table[:, q].mean(axis=1).argmax()], now)
    assert gain.in_sample > 0.1
    assert abs(gain.held_out) < 0.1


# Layers -----------------------------------------------------------------------------------------


@pytest.mark.parametrize('pair', [(4, 9), (3, 12), (7, 8)])
def test_planted_pair_of_layers_is_found(pair):
    scores = random_scores(20)
    for each in scores:
        each[pair[0] - 1, :, 20:40] += 10
        each[pair[1] - 1, :, 100:120] += 10
    search = search_layers(make_records(scores), PruneConfig())
    assert tuple(search.pairs[search.best]) == pair
    assert scale_layers(search.names[search.best], DEPTH, first=1) == pair
    assert search.gain.held_out > 0.1
    assert len(search.pairs) == math.comb(DEPTH - 2, 2)
    proposal = layer_proposal((15, 32), search, stand_in=False)
    assert proposal.proposed == search.names[search.best]


def test_pairs_compare_at_the_same_number_of_tokens():
    """Two layers that say the same name fewer patches; that must not lose them the comparison."""
    scores = random_scores(20)
    for each in scores:
        each[[3, 8], :, 20:70] += 10
    search = search_layers(make_records(scores), PruneConfig())
    assert tuple(search.pairs[search.best]) == (4, 9)
    assert search.own_recall[search.best] > 0.7


@settings(deadline=None)
@given(st.integers(2, 48), st.data())
def test_layer_names_round_trip(depth, data):
    layers = data.draw(st.lists(st.integers(1, depth), min_size=1, max_size=4, unique=True))
    layers = tuple(sorted(layers))
    names = config_layers(layers, depth)
    if names is None:
        assert depth > 32
    else:
        assert scale_layers(names, depth, first=1) == layers
        PruneConfig(global_layers=names)


def test_configured_name_of_a_layer_is_kept():
    assert config_layer(6, 12, preferred=(15, 32)) == 15
    assert config_layers((6, 12), 12, preferred=(15, 32)) == (15, 32)
    assert config_layers((15, 32), 32) == (15, 32)


# Scan -------------------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def policy() -> Policy:
    return make_policy()


def test_scores_are_those_of_the_method(policy):
    """The first query is dense in both: its V_global follows from the recorded scores."""
    policy.reset()
    recorder = ScoreRecorder(policy.config.pruning)
    scan = RecordingScan(Policy(policy.model, policy.config, method=recorder))
    for step in (0, 8):
        scan.infer(make_observation(step))
    important = policy.infer(make_observation(0)).report.important.reshape(2, -1)
    first, second = recorder.records
    rank = global_rank(first.scores[None], policy.config.pruning)[0]
    np.testing.assert_array_equal(rank < 24, important.astype(bool))
    assert (first.follows, second.follows) == (False, True)
    assert first.similarity is None
    assert second.similarity.shape == (2, 256)
    assert second.confidence.shape == (len(policy.model.decoder.layers),)


def test_scan_compares_new_pictures_only(policy):
    policy.reset()
    scan = RecordingScan(policy)
    random = np.random.default_rng(0)
    one, two = (random.integers(0, 255, (48, 64, 3), np.uint8) for _ in range(2))
    broken = np.zeros((4, 4), np.uint8)
    for image in (one, one, two, broken, two, one):
        scan.observe_executed(None, {'side': image})
    assert len(scan.changes['side'].dissimilarity) == 2
    assert scan.changes['side'].dissimilarity[0].shape == (256,)
    assert scan.changes['side'].power[0].max() > 1000


def test_scores_that_cannot_be_taken_are_an_error(policy):
    """A policy would go on without pruning, and the study with too few records."""
    recorder = ScoreRecorder(policy.config.pruning)
    recorder.begin = None
    scan = RecordingScan(Policy(policy.model, policy.config, method=recorder))
    with pytest.raises(PruningError, match='no scores'):
        scan.infer(make_observation())


# Parameter file ---------------------------------------------------------------------------------


def propose(parameter: str, now: object, proposed: object, **fields) -> Proposal:
    values = {'confidence': 'high', 'evidence': 'seen: 100 % #1 {of} it', **fields}
    return Proposal(parameter=parameter, now=now, proposed=proposed, **values)


def test_parameter_file_takes_effect(tmp_path):
    config = PruneConfig(alpha=0.6, prune_layers=(), method='specprune', budget='union')
    proposals = [
        propose('translation_threshold', 0.5, 0.7),
        propose('rotation_threshold', 0.2, None, evidence='not bimodal: kept'),
        propose('similarity_threshold', 0.95, 1e-5),
        propose('global_layers', (15, 32), (14, 30)),
        propose('k_global', 30, 44, usable=False),
    ]
    path = tmp_path / 'pruning.yaml'
    write_parameters(path, config, proposals, 'a bag: "with" #signs')
    loaded = load_config([path]).pruning
    assert loaded == with_proposals(config, proposals)
    assert (loaded.translation_threshold, loaded.global_layers) == (0.7, (14, 30))
    assert (loaded.k_global, loaded.rotation_threshold, loaded.alpha) == (30, 0.2, 0.6)
    motion = Motion(0.6, 0.1, -0.1)
    assert SpecPrune(loaded).next_fine(False, motion)
    assert not SpecPrune(config).next_fine(False, motion)
    text = path.read_text()
    assert 'not bimodal: kept' in text
    assert max(map(len, text.splitlines())) < 100


def test_parameter_file_is_a_ros_one(tmp_path):
    parameter = pytest.importorskip('rclpy.parameter')
    path = tmp_path / 'pruning.yaml'
    write_parameters(path, PruneConfig(), [propose('global_layers', (15, 32), (14, 30))], 'bag')
    values = parameter.parameter_dict_from_yaml_file(str(path), use_wildcard=True)
    assert list(values['pruning.global_layers'].value.integer_array_value) == [14, 30]


def test_confidence_follows_the_interval():
    grades = [
        threshold_proposal('translation_threshold', 0.5, find_valley(stream('apart', 0)[:steps]))
        for steps in (800, 60)
    ]
    assert grades[0].confidence == 'high'
    assert grades[1].confidence != 'high'


def test_figures_are_json_to_any_reader(tmp_path):
    write_figures(tmp_path / 'f.json', {'a': math.nan, 'b': np.array([1.0, math.inf]), 'c': (1,)})
    assert json.loads((tmp_path / 'f.json').read_text()) == {'a': None, 'b': [1, None], 'c': [1]}


# The command ------------------------------------------------------------------------------------

SHORT = ['--set', 'model.threads=1', '--every', '24']


@pytest.mark.slow
def test_own_recording(tmp_path, capsys):
    out = tmp_path / 'made' / 'here'
    assert main(['calibrate', str(OWN_BAG), *SHORT, '--out', str(out)]) == 0
    told = capsys.readouterr().out
    assert f'ros2 launch specprune_ros vla.launch.py pruning:={out}/pruning.yaml' in told
    assert 'meaningless' in told
    loaded = load_config([out / 'pruning.yaml']).pruning
    # The arm is scripted to move at 0.4 and 0.9.
    assert 0.55 < loaded.translation_threshold < 0.75
    default = PruneConfig()
    assert loaded == dataclasses.replace(
        default, translation_threshold=loaded.translation_threshold
    )
    figures = json.loads((out / 'calibration.json').read_text())
    assert figures['stand_in'] is True
    assert set(figures['noise']) == {'wrist', 'side', 'overhead'}
    assert len(figures['budget']['points']) > 500
    assert len(figures['layers']['recall']) == math.comb(DEPTH - 2, 2)
    for name in ('speeds', 'noise', 'budget', 'layers'):
        assert cv2.imread(str(out / f'{name}.png')).std() > 5


@pytest.mark.slow
def test_a_trained_model_sets_k_and_layers(tmp_path, monkeypatch):
    def load_trained(config):
        policy = load_policy(config)
        policy.model.info = dataclasses.replace(policy.model.info, stand_in=False)
        return policy

    monkeypatch.setattr(study, 'load_policy', load_trained)
    config = from_mapping({'model.threads': 1, 'pruning.alpha': 0.7})
    found = calibrate(config, open_recording(OWN_BAG), every=16)
    path = write_study(found, tmp_path)
    loaded = load_config([path]).pruning
    assert loaded.alpha == 0.7
    assert loaded == with_proposals(found.config, found.proposals)
    by_name = {each.parameter: each for each in found.proposals}
    assert any(by_name[name].written for name in K_NAMES)
    assert by_name['k_global'].confidence in ('high', 'medium', 'low')
    shares = found.ks.kept, found.ks.budget
    assert all(shares[0][mode] <= shares[1][mode] + 1e-9 for mode in shares[0])


@pytest.mark.slow
def test_noisy_video_without_actions(tmp_path, capsys):
    path = tmp_path / 'wipe_the_table.avi'
    random = np.random.default_rng(0)
    # Uncompressed: a codec would be what is measured.
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*'FFV1'), 10, (SIDE, SIDE))
    for _ in range(30):
        writer.write(noisy(scene(0), 8.0, random))
    writer.release()
    out = tmp_path / 'out'
    command = ['calibrate', str(path), '--set', 'model.center_crop=false', '--budget', '0.2']
    assert main([*command, '--every', '10', '--set', 'model.threads=1', '--out', str(out)]) == 0
    assert 'no executed actions' in capsys.readouterr().out
    loaded = load_config([out / 'pruning.yaml']).pruning
    default = PruneConfig()
    assert loaded == dataclasses.replace(default, similarity_threshold=loaded.similarity_threshold)
    assert 0.97 < loaded.similarity_threshold < 0.9999
    figures = json.loads((out / 'calibration.json').read_text())
    assert figures['noise']['side']['static_patches'] == 256
    assert figures['budget']['unseen'] == ['coarse']


@pytest.mark.parametrize(
    ('arguments', 'told'),
    [
        (['--budget', '1.5'], '--budget'),
        (['--false-changes', '0'], '--false-changes'),
        (['--every', '-1'], '--every'),
        (['--set', 'pruning.alfa=1'], 'pruning.alpha'),
    ],
)
def test_what_the_user_can_mend(tmp_path, capsys, arguments, told):
    out = tmp_path / 'out'
    assert main(['calibrate', str(OWN_BAG), *arguments, '--out', str(out)]) == 2
    assert told in capsys.readouterr().err
    assert not out.exists()


def test_output_folder_that_cannot_be_made(tmp_path, capsys):
    (tmp_path / 'file').write_text('')
    assert main(['calibrate', str(OWN_BAG), '--out', str(tmp_path / 'file')]) == 2
    assert str(tmp_path / 'file') in capsys.readouterr().err
