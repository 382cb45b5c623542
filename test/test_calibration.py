"""Parameters from a recording: valleys of speeds, noise of still patches, K and layers."""

import dataclasses
import gc
import itertools
import json
import math
import weakref
from dataclasses import dataclass

import cv2
import numpy as np
import pytest
import torch
from conftest import DATA, make_action, make_observation, make_policy
from hypothesis import given, settings
from hypothesis import strategies as st

from specprune_ros.calibration import study, thresholds
from specprune_ros.calibration.budget import global_rank, search_budget
from specprune_ros.calibration.density import Bins, TwoModes
from specprune_ros.calibration.dip import (
    dip_p_value,
    dip_statistic,
    sparse_stretch,
    unimodal_mass,
)
from specprune_ros.calibration.folds import gain_of
from specprune_ros.calibration.layers import config_layer, config_layers, search_layers
from specprune_ros.calibration.log_concave import fit_log_concave
from specprune_ros.calibration.noise import camera_noise, patch_power, proposed_tau
from specprune_ros.calibration.power_normal import POWERS, PowerNormal
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
from specprune_ros.calibration.thresholds import SpeedValley, executed_motion, find_valley
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

KINDS = ('normal', 'log normal', 'gamma', 'uniform')
# Speeds at which densities are looked up: modes may be narrow, and slow ones lie close to 0.
GRID = np.concatenate(
    (np.geomspace(1e-4, 0.02, 4000, endpoint=False), np.linspace(0.02, 2.5, 40000))
)
RIGHT = 0.1  # an error up to here is as the acceptance asks


@dataclass(frozen=True)
class Mode:
    """Speeds of one kind of motion: mean, and width as a share of it."""

    kind: str
    mean: float
    width: float

    def sample(self, random: np.random.Generator, steps: int) -> np.ndarray:
        mean, spread = self.mean, self.mean * self.width
        if self.kind == 'normal':
            return np.abs(random.normal(mean, spread, steps))
        if self.kind == 'log normal':
            spread = self._log_width
            return mean * np.exp(random.normal(-(spread**2) / 2, spread, steps))
        if self.kind == 'gamma':
            return random.gamma(self.width**-2, mean * self.width**2, steps)
        return random.uniform(*self._ends, steps)

    def density(self, speeds: np.ndarray) -> np.ndarray:
        """Up to a factor: the boundary scales each mode to its share."""
        if self.kind == 'normal':
            return np.exp(-0.5 * ((speeds / self.mean - 1) / self.width) ** 2)
        if self.kind == 'log normal':
            spread = self._log_width
            return np.exp(-0.5 * (np.log(speeds / self.mean) / spread + spread / 2) ** 2) / speeds
        if self.kind == 'gamma':
            shape = self.width**-2
            ratio = speeds / self.mean
            return np.exp((shape - 1) * np.log(ratio) - shape * (ratio - 1))
        low, high = self._ends
        return ((speeds >= low) & (speeds <= high)).astype(float)

    @property
    def _log_width(self) -> float:
        return math.sqrt(math.log1p(self.width**2))

    @property
    def _ends(self) -> tuple[float, float]:
        half = math.sqrt(3) * self.width
        return self.mean * max(1 - half, 0), self.mean * (1 + half)


@dataclass(frozen=True, kw_only=True)
class Stream:
    """Executed speeds of two kinds of motion, of a robot that also stands still.

    Attributes:
        slow, fast: the modes.
        share: of the slow steps among the moving ones.
        steps: that move.
        rest: steps that stand still, per step that moves.
        odd: share of the moving steps that belong to neither mode.
        seed: of the sample.
    """

    slow: Mode
    fast: Mode
    share: float
    steps: int
    rest: float = 0.0
    odd: float = 0.0
    seed: int = 0

    def speeds(self) -> np.ndarray:
        random, n = np.random.default_rng([self.seed, 7]), self.steps
        moving = np.where(
            random.random(n) < self.share,
            self.slow.sample(random, n),
            self.fast.sample(random, n),
        )
        is_odd = random.random(n) < self.odd
        moving = np.where(is_odd, random.uniform(0, 1.2 * self.fast.mean, n), moving)
        still = np.abs(random.normal(0, 1e-4 * (self.seed % 2), int(self.rest * n)))
        return random.permutation(np.concatenate((moving, still)))


class Boundary:
    """Where the two modes of a stream part.

    Any threshold with fewer than one step of the stream expected on its wrong side is right: the
    modes part in an empty gap. Else the one at which the densities are equal is, and the one at
    which their sum is lowest.

    Attributes:
        lowest: speed between the peaks at which the density is lowest.
        depth: the density there over that of the lower peak.
    """

    def __init__(self, stream: Stream):
        self._gap, self._points, self.depth, self.lowest = None, (), 1.0, math.nan
        slow, fast = (mode.density(GRID) for mode in (stream.slow, stream.fast))
        widths = np.diff(GRID, prepend=0)
        slow, fast = (
            share * part / (part @ widths)
            for share, part in ((stream.share, slow), (1 - stream.share, fast))
        )
        self._wrong = stream.share - np.cumsum(slow * widths) + np.cumsum(fast * widths)
        empty = GRID[stream.steps * self._wrong <= 1]
        if len(empty):
            self._gap = empty[0], empty[-1]
        # Of a flat top, the end that faces the other mode.
        first = len(slow) - 1 - int(slow[::-1].argmax())
        last = int(fast.argmax())
        if last > first + 1:
            between = slice(first, last + 1)
            both = (slow + fast)[between]
            is_slow = np.append(True, slow[between] >= fast[between])
            crossing = max(np.flatnonzero(is_slow)[-1] - 1, 0)
            lowest = int(both.argmin())
            self._points = GRID[between][[crossing, lowest]]
            self.lowest = GRID[between][lowest]
            self.depth = both[lowest] / min(both[: lowest + 1].max(), both[lowest:].max())

    @property
    def kind(self) -> str:
        """How the modes part."""
        if self._gap:
            return 'gap'
        kinds = {0.25: 'clear', 0.5: 'overlap', 0.75: 'shallow'}
        return next((kind for depth, kind in kinds.items() if self.depth < depth), 'none')

    def error(self, threshold: float) -> float:
        """0 in a gap, else relative to the nearer point."""
        if self._gap and self._gap[0] <= threshold <= self._gap[1]:
            return 0.0
        return min((abs(threshold / point - 1) for point in self._points), default=math.inf)

    def misassigned(self, threshold: float) -> float:
        """Share of the steps on the wrong side, beyond what is unavoidable."""
        return float(np.interp(threshold, GRID, self._wrong) - self._wrong.min())


def draw(seed: int) -> Stream:
    """A stream that varies in all that a robot's does."""
    random = np.random.default_rng([seed, 3])

    def log_uniform(low: float, high: float) -> float:
        return math.exp(random.uniform(math.log(low), math.log(high)))

    fast = random.uniform(0.4, 1.0)
    slow = fast * log_uniform(0.06, 0.75)
    return Stream(
        slow=Mode(KINDS[random.integers(4)], slow, log_uniform(0.005, 0.6)),
        fast=Mode(KINDS[random.integers(4)], fast, log_uniform(0.005, 0.4)),
        share=random.uniform(0.1, 0.9),
        steps=int(log_uniform(200, 5000)),
        rest=random.choice([0, random.uniform(0, 0.5)]),
        odd=random.choice([0, random.uniform(0, 0.03)]),
        seed=seed,
    )


# slow mode, fast mode, share of slow steps, steps
FIXED = {
    'far apart': (('normal', 0.3, 0.2), ('normal', 0.8, 0.12), 0.4, 800),
    'close': (('normal', 0.35, 0.22), ('normal', 0.68, 0.13), 0.5, 1500),
    'few slow': (('normal', 0.2, 0.3), ('normal', 0.7, 0.17), 0.25, 1200),
    'skewed': (('log normal', 0.16, 0.36), ('log normal', 0.8, 0.2), 0.5, 800),
    'mixed': (('gamma', 0.12, 0.58), ('normal', 0.8, 0.15), 0.5, 1200),
    # Bugs: refused, or a threshold far within the fast mode.
    'narrow slow, few fast': (('gamma', 0.09, 0.01), ('normal', 0.8, 0.3), 0.84, 400),
    'flat': (('uniform', 0.29, 0.09), ('uniform', 0.73, 0.06), 0.78, 1600),
    'narrow slow, gap': (('normal', 0.13, 0.02), ('normal', 0.7, 0.21), 0.5, 600),
    'narrow slow, no gap': (('normal', 0.094, 0.02), ('normal', 0.98, 0.3), 0.53, 4800),
}


SLOW = ('far apart', 'few slow', 'skewed', 'narrow slow, gap')


def fixed(case: str, **changes) -> Stream:
    slow, fast, share, steps = FIXED[case]
    return Stream(**{'slow': Mode(*slow), 'fast': Mode(*fast), 'share': share, 'steps': steps,
                     'odd': 0.01, **changes})  # fmt: skip


@pytest.fixture
def few_resamples(monkeypatch):
    """They say how sure a threshold is, not where it lies."""
    monkeypatch.setattr(thresholds, 'RESAMPLES', 4)


@pytest.mark.parametrize(
    'case', [pytest.param(c, marks=pytest.mark.slow if c in SLOW else ()) for c in FIXED]
)
def test_threshold_is_found(case, few_resamples):
    stream = fixed(case)
    valley = find_valley(stream.speeds())
    assert valley.bimodal, valley.why_not
    assert Boundary(stream).error(valley.valley) <= RIGHT
    assert valley.found_share == 1
    assert valley.peaks[0] < valley.valley < valley.peaks[1]
    assert valley.depth < 0.7


@pytest.mark.slow
def test_interval_holds_the_thresholds_of_other_samples():
    """Half of 95 % is asked for: the intervals are of four samples only."""
    valleys = [find_valley(fixed('close', seed=seed).speeds()) for seed in range(4)]
    for one in valleys:
        low, high = one.interval
        assert low < one.valley < high
        assert np.mean([low <= other.valley <= high for other in valleys]) >= 0.5


def seeds_of(kind: str, count: int, start: int) -> list[int]:
    """The first seeds from `start` on whose streams part in such a way."""
    fits = (seed for seed in itertools.count(start) if Boundary(draw(seed)).kind == kind)
    return list(itertools.islice(fits, count))


# kind -> least share of the streams that have a threshold, and of these, that have it right; a few
# points below what more seeds give. The rest is what so few steps leave open.
SHARES = {'gap': (0.93, 0.96), 'clear': (0.8, 0.84), 'overlap': (0.4, 0.84)}


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize('kind', SHARES)
def test_threshold_of_streams_of_all_kinds(kind, few_resamples):
    boundaries, found = [], []
    for seed in seeds_of(kind, 60, start=2_000_000):
        stream = draw(seed)
        valley = find_valley(stream.speeds())
        if valley.bimodal:
            boundaries.append(Boundary(stream))
            found.append(valley.valley)
    errors = [b.error(value) for b, value in zip(boundaries, found, strict=True)]
    lost = [b.misassigned(value) for b, value in zip(boundaries, found, strict=True)]
    least_found, least_right = SHARES[kind]
    assert len(found) / 60 >= least_found
    assert np.mean(np.array(errors) <= RIGHT) >= least_right
    assert np.median(errors) <= 0.03
    assert np.quantile(lost, 0.9) <= 0.03


def draw_smooth(seed: int) -> Stream:
    """A stream of two normal, gamma or log-normal modes with a deep valley."""
    random = np.random.default_rng([seed, 11])
    while True:
        kinds = random.choice(('normal', 'log normal', 'gamma'), 2)
        slow, fast = 0.8 / random.uniform(2.5, 10), 0.8
        stream = Stream(
            slow=Mode(kinds[0], slow, random.uniform(0.15, 0.45)),
            fast=Mode(kinds[1], fast, random.uniform(0.1, 0.35)),
            share=random.uniform(0.3, 0.7),
            steps=1000,
            seed=seed,
        )
        if Boundary(stream).depth < 0.4:
            return stream


def test_valley_is_where_the_density_is_lowest(monkeypatch):
    """Also in a gap of the sample, of whose middle this is far."""
    monkeypatch.setattr(thresholds, 'RESAMPLES', 1)
    monkeypatch.setattr(thresholds, 'dip_p_value', lambda *_: 0.0)  # slow, and tested elsewhere
    streams = [draw_smooth(seed) for seed in range(40)]
    errors = [find_valley(s.speeds()).valley / Boundary(s).lowest - 1 for s in streams]
    assert np.sum(np.abs(errors) <= RIGHT) >= 36


def test_valley_of_hard_edges_is_the_middle_of_the_gap(few_resamples):
    """Even modes say nothing about the gap between."""
    random = np.random.default_rng(0)
    speeds = np.concatenate((random.uniform(0.1, 0.2, 1000), random.uniform(0.5, 0.8, 1000)))
    assert find_valley(random.permutation(speeds)).valley == pytest.approx(0.316, rel=0.02)


def mixed(share: float, one, other):
    """A share of one sampler's steps, the others of the other's."""
    return lambda random, n: np.where(random.random(n) < share, one(random, n), other(random, n))


UNIMODAL = {
    'normal': lambda random, n: np.abs(random.normal(0.6, 0.15, n)),
    'exponential': lambda random, n: random.exponential(0.3, n),
    'uniform': lambda random, n: random.uniform(0, 1, n),
    'log normal': lambda random, n: np.exp(random.normal(-1, 0.8, n)),
    'norm of a vector': lambda random, n: np.linalg.norm(random.normal(0, 0.3, (n, 3)), axis=1),
    'heavy tail': lambda random, n: np.abs(random.standard_cauchy(n)),
    'constant': lambda random, n: np.full(n, 0.4),
    'constant but for rounding': lambda random, n: 0.4 + 1e-12 * random.random(n),
    'rounded': lambda random, n: np.round(np.abs(random.normal(0.6, 0.15, n)), 1),
    'finely rounded': lambda random, n: np.round(np.abs(random.normal(0.6, 0.15, n)), 2),
    'cut off by a limit': lambda random, n: np.clip(random.normal(0.8, 0.15, n), 0.01, 1),
    'tail cut off by a limit': lambda random, n: np.minimum(random.exponential(0.4, n), 1),
    'spike in a wide mode': mixed(
        0.3, lambda r, n: r.normal(0.6, 0.01, n), lambda r, n: np.abs(r.normal(0.6, 0.2, n))
    ),
    'shoulder': mixed(
        0.7, lambda r, n: r.normal(0.4, 0.1, n), lambda r, n: r.normal(0.62, 0.12, n)
    ),
    'step': mixed(0.5, lambda r, n: r.uniform(0.02, 1, n), lambda r, n: r.uniform(0.02, 0.3, n)),
}


@pytest.mark.parametrize(
    'kind', ['uniform', 'heavy tail', 'constant', 'constant but for rounding', 'rounded', 'step',
             'cut off by a limit'],
)  # fmt: skip
def test_one_mode_has_no_valley(kind):
    valley = find_valley(UNIMODAL[kind](np.random.default_rng(0), 1000))
    assert not valley.bimodal, valley.valley
    assert 'not bimodal' in valley.why_not
    assert math.isnan(valley.valley)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_one_mode_rarely_has_a_valley(few_resamples):
    found = [
        find_valley(sample(np.random.default_rng([seed, 5]), steps)).bimodal
        for sample in UNIMODAL.values()
        for steps in (60, 200, 1000, 4000)
        for seed in range(4)
    ]
    assert np.mean(found) <= 0.02


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


@pytest.mark.parametrize('between', [0, 60])
def test_valley_of_clipped_commands(between, few_resamples):
    """Commands that repeat exactly, as of a limit or a scripted arm, are modes like others."""
    random = np.random.default_rng(0)
    others = random.uniform(0.1, 0.9, between)
    speeds = np.concatenate((np.full(60, 0.4), np.full(120, 0.9), others))
    valley = find_valley(random.permutation(speeds))
    assert 0.5 < valley.valley < 0.8


@pytest.mark.parametrize(('factor', 'seed'), [(700.0, 1)])
def test_threshold_scales_with_the_speeds(factor, seed, few_resamples):
    speeds = fixed('far apart', seed=seed, steps=200).speeds()
    one, other = find_valley(speeds), find_valley(factor * speeds)
    assert other.valley == pytest.approx(factor * one.valley, rel=0.02)
    assert other.p_value == pytest.approx(one.p_value, abs=0.02)


def p_value(speeds: np.ndarray) -> float:
    bins = Bins.of(speeds)
    return dip_p_value(float(dip_statistic(speeds)), bins.count(bins.index(speeds)), bins.edges)


def test_dip_against_its_definition():
    """Two points and two equal pairs have dips that can be found by hand; see Hartigan 1985."""
    assert dip_statistic(np.array([0.0, 0.0, 1.0, 1.0])) == pytest.approx(0.25, abs=0.01)
    assert 0 < dip_statistic(np.linspace(0, 1, 100)) < 0.02


def test_modes_part_in_the_gap():
    assert sparse_stretch(np.array([0.7, 0.1, 0.2, 0.8, 0.3, 0.9])) == (0.3, 0.7)


def test_dip_of_unimodal_samples_is_rarely_significant():
    random = np.random.default_rng(5)
    p_values = np.array([p_value(random.random(200)) for _ in range(5)])
    assert (p_values > 0.01).all()
    assert p_value(np.concatenate((random.random(100), 3 + random.random(100)))) < 0.01


@settings(deadline=None)
@given(st.lists(st.integers(0, 9), min_size=2, max_size=12), st.data())
def test_likeliest_unimodal_mass(counts, data):
    """It has one peak and all counts, and no other unimodal mass tried here is likelier."""
    counts = np.array(counts, float)
    counts[0] += 1
    sizes = st.floats(0.1, 2)
    widths = np.array(data.draw(st.lists(sizes, min_size=len(counts), max_size=len(counts))))
    mass = unimodal_mass(counts, widths)
    assert mass.sum() == pytest.approx(counts.sum())
    turns = np.sign(np.round(np.diff(mass / widths), 9))
    turns = turns[turns != 0]
    assert (np.diff(turns) <= 0).all(), 'it falls and rises again'
    np.testing.assert_allclose(unimodal_mass(mass, widths), mass, atol=1e-9)
    even = counts.sum() * widths / widths.sum()
    seen = counts > 0
    assert counts[seen] @ np.log(mass[seen]) >= counts[seen] @ np.log(even[seen]) - 1e-9


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(0, 50), min_size=3, max_size=40), st.integers(0, 99))
def test_log_concave_density(counts, seed):
    """It is concave in its logarithm, a density, and likelier than a Gaussian, which is one."""
    weights = np.array(counts, float)
    weights[[0, -1]] += 1
    widths = np.random.default_rng(seed).uniform(0.5, 2, len(weights))
    at = np.cumsum(widths) - widths / 2
    density = fit_log_concave(at, widths, weights)
    assert density @ widths == pytest.approx(1)
    slopes = np.diff(np.log(density)) / np.diff(at)
    assert (np.diff(slopes) < 1e-6).all()
    shares = weights / weights.sum()
    mean = shares @ at
    gauss = np.exp(-0.5 * (at - mean) ** 2 / (shares @ (at - mean) ** 2))
    gauss /= gauss @ widths
    assert shares @ np.log(density) >= shares @ np.log(gauss) - 1e-3


def two_modes(slow: tuple[float, float], fast: tuple[float, float]) -> TwoModes:
    """Even densities between two speeds each, half of 1000 steps in either."""
    bins = Bins(np.linspace(0.01, 1.01, 1001))
    at = bins.centers
    mass = np.zeros((3, 1000))
    for mode, (low, high) in enumerate((slow, fast)):
        mass[mode] = (at > low) & (at < high)
    return TwoModes(bins, mass / 2 / np.maximum(mass.sum(axis=1, keepdims=True), 1), 1000)


def test_threshold_lies_in_the_middle_of_an_empty_gap():
    modes = two_modes((0.1, 0.2), (0.8, 0.9))
    assert modes.threshold == pytest.approx(0.4, rel=0.01)
    assert modes.depth == 0
    assert modes.peaks[0] < 0.2 < 0.8 < modes.peaks[1]


def test_threshold_is_where_the_sum_of_both_densities_is_lowest():
    """Slow motion falls to 0.5, where fast motion is denser already, and rises more slowly."""
    bins = Bins(np.linspace(0.01, 1.01, 1001))
    at = bins.centers
    slow = np.where(at > 0.1, np.maximum(0.5 - at, 0), 0)
    fast = np.where(at < 0.9, np.maximum(at - 0.3, 0), 0) / 2
    mass = np.stack((slow, fast, np.zeros(1000)))
    modes = TwoModes(bins, mass / mass.sum(), 1000)
    assert modes.threshold == pytest.approx(0.5, rel=0.01)
    assert modes.peaks == pytest.approx((0.1, 0.9), rel=0.02)
    assert modes.depth == pytest.approx(0.1 / 0.3, rel=0.05)


def test_an_empty_mode_is_no_valley():
    modes = two_modes((0.1, 0.2), (0.8, 0.8))
    assert modes.depth == 1


POWER_NORMALS = st.builds(
    lambda power, median, width: PowerNormal(power, *power_moments(power, median, width)),
    st.sampled_from(POWERS), st.floats(0.05, 2), st.floats(0.01, 0.3),
)  # fmt: skip


def power_moments(power: float, median: float, width: float) -> tuple[float, float]:
    """Mean and spread of the power of speeds whose spread is about `width` of their median."""
    return (median**power, power * width * median**power) if power else (math.log(median), width)


@settings(deadline=None, max_examples=30)
@given(POWER_NORMALS)
def test_mass_of_a_mode_is_that_of_its_density(mode):
    edges = np.linspace(0.2, 5, 2001) * mode.quantile(0)
    centers, mass = (edges[1:] + edges[:-1]) / 2, mode.mass(edges)
    assert mass.sum() == pytest.approx(1)
    assert mass[centers < mode.quantile(0)].sum() == pytest.approx(0.5, abs=0.1)
    between = slice(1, -1)
    density = np.exp(mode.log_density(centers[between]))
    np.testing.assert_allclose(mass[between], density * np.diff(edges)[between], atol=1e-3)


@settings(deadline=None, max_examples=20)
@given(POWER_NORMALS, st.integers(0, 99))
def test_mode_is_found_from_its_speeds(mode, seed):
    spreads = np.random.default_rng(seed).normal(size=1000)
    speeds = np.sort([mode.quantile(each) for each in spreads.clip(-3, 3)])
    found = PowerNormal.of(mode.power, speeds, np.ones(1000))
    assert found.mean == pytest.approx(mode.mean, abs=0.15 * mode.spread)
    assert found.spread == pytest.approx(mode.spread, rel=0.1)


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


def test_a_long_recording_does_not_pile_up_runs(policy):
    """Bug: every run was kept by the next one, with its scores on the device."""
    policy.reset()
    recorder, runs = ScoreRecorder(policy.config.pruning), weakref.WeakSet()
    begin = recorder.begin

    def watched(context):
        runs.add(run := begin(context))
        return run

    recorder.begin = watched
    scan = RecordingScan(Policy(policy.model, policy.config, method=recorder))
    for step in range(4):
        scan.infer(make_observation(8 * step))
    gc.collect()
    assert len(recorder.records) == 4
    assert len(runs) <= 1


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


@pytest.mark.parametrize(
    ('interval', 'found_share', 'confidence'),
    [((0.48, 0.53), 1.0, 'high'), ((0.4, 0.53), 1.0, 'medium'), ((0.48, 0.53), 0.8, 'low')],
)
def test_confidence_follows_the_interval(interval, found_share, confidence):
    valley = SpeedValley(
        speeds=np.array([0.2, 0.8]), at_rest=0, why_not='', valley=0.5, interval=interval,
        found_share=found_share, peaks=(0.2, 0.8), depth=0.1, dip=0.2, p_value=0.005,
    )  # fmt: skip
    assert threshold_proposal('translation_threshold', 0.5, valley).confidence == confidence


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
    assert f'pruning:={out}/pruning.yaml' in told
    assert 'meaningless' in told
    loaded = load_config([out / 'pruning.yaml']).pruning
    # The arm is scripted to move at 0.4 and 0.9, with a few steps of ramps between.
    assert 0.45 < loaded.translation_threshold < 0.8
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


class DyingCamera:
    """The own recording, whose wrist camera stops half-way."""

    def __init__(self):
        self._source = open_recording(OWN_BAG)

    def __getattr__(self, name: str):
        return getattr(self._source, name)

    def events(self):
        half_ns = self.duration_s * 1e9 / 2
        for event in self._source.events():
            if getattr(event, 'camera', '') != 'wrist' or event.stamp_ns < half_ns:
                yield event


@pytest.mark.slow
def test_a_dead_camera_is_in_the_summary(tmp_path):
    """Bug: its last picture was taken for a still one, and for what the model saw."""
    config = from_mapping({'model.threads': 1})
    found = calibrate(config, DyingCamera(), every=16)
    (note,) = (note for note in found.notes if 'skipped' in note)
    assert 'cameras/wrist camera_stale' in note
    write_study(found, tmp_path)
    assert note in json.loads((tmp_path / 'calibration.json').read_text())['notes']


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
