"""K_global, K_local and K_dynamic that keep most of what is important, at no more tokens.

SpecPrune-VLA (section 7.2, Fig. 7) picks them from a few values by the recall of important tokens.
Here a grid that holds its values is searched, in both modes, under a budget: without one, more
tokens always recall more.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product

import numpy as np
import torch
from torch import Tensor

from specprune_ros.calibration.folds import Gain, gain_of
from specprune_ros.calibration.layers import all_ranks
from specprune_ros.calibration.scan import QueryScores
from specprune_ros.config import PruneConfig
from specprune_ros.pruning import scores
from specprune_ros.pruning.budget import STATIC_LAYER, KBudget, k_budget, scale_layers

# The paper's values among them: K_global 20, 30, 40; pairs (12, 15), (24, 20), (36, 30); (40, 10)
# in fine mode.
K_GLOBAL = (10, 20, 30, 40, 50, 60, 80)
K_LOCAL = (6, 12, 18, 24, 30, 36, 40, 48, 60)
K_DYNAMIC = (0, 5, 10, 15, 20, 25, 30)
MODES = ('coarse', 'fine')
ALPHAS = tuple(round(0.05 * step, 2) for step in range(2, 41))
ROUNDING = 1e-9
LIGHT = 1e-3
PREFER_FEWER = 1e-6  # recall that one patch less is worth, as a share: decides between equals


@dataclass(frozen=True, eq=False, kw_only=True)
class KGrid:
    """All points of the grid on Q consecutive pairs of queries; means over cameras.

    Attributes:
        k_global: [G] values.
        pairs: [P] (K_local, K_dynamic).
        kept: [G, P, Q] share of patches in V_retain.
        recall: [G, P, Q] share of V_t in V_retain, where V_t has the configured K_global.
        own_recall: [G, P, Q] the same with V_t of the point's own K_global.
        paper_recall: [G, P, Q] |V_{t-1} n V^_t| / |V^_t| as section 7.2 prints it, where V^_t is
            V_t with the local and dynamic tokens.
        global_recall: [G, Q] Eq. 1, V_{t-1} on V_t.
        fine: [Q] the mode of every query.
        now_kept, now_recall: [Q] of what is configured now.
    """

    k_global: tuple[int, ...]
    pairs: tuple[tuple[int, int], ...]
    kept: np.ndarray
    recall: np.ndarray
    own_recall: np.ndarray
    paper_recall: np.ndarray
    global_recall: np.ndarray
    fine: np.ndarray
    now_kept: np.ndarray
    now_recall: np.ndarray


@dataclass(frozen=True)
class KChoice:
    """A point of the grid in both modes: indices into k_global, and into pairs per mode."""

    k_global: int
    coarse: int
    fine: int


@dataclass(frozen=True, eq=False, kw_only=True)
class KSearch:
    """The best point within the budget.

    Attributes:
        grid: all points.
        values: k_global, k_local_coarse, ... of the best; empty when nothing fits the budget.
        choice: where in the grid it is.
        budget: mode -> most that it may keep, share of patches, on average.
        kept: mode -> what the best keeps.
        unseen: modes that the recording does not show; their K_local and K_dynamic stay.
        gain: over what is configured now; with a budget of its own, at the alpha that meets it.
        now_fits: whether the K of now are within the budget, with the tau and layers to come.
    """

    grid: KGrid
    values: dict[str, int]
    choice: KChoice | None
    budget: dict[str, float]
    kept: dict[str, float]
    unseen: tuple[str, ...]
    gain: Gain | None
    now_fits: bool


def search_budget(
    records: Sequence[QueryScores],
    config: PruneConfig,
    *,
    now: PruneConfig | None = None,
    share: float | None = None,
) -> KSearch | None:
    """Search K_global and both modes' (K_local, K_dynamic) for the highest recall (section 7.2).

    Args:
        records: dense queries in order.
        config: alpha, tau and layers with which the grid's points are to run.
        now: what is configured; None for `config` itself.
        share: patches kept on average, in 0..1; None takes what is kept now. The modes divide it
            as they do now.

    Returns:
        None when no query follows another.

    differs: V_t keeps the configured K_global at all points, else fewer important patches would
        be easier to recall; and what counts is how much of V_t is retained, where the paper
        prints |V^_t| as the denominator, by which every token more is a loss. Both other recalls
        are in the grid. The sets are V_retain of section 4.1.3; the fixed budget takes its size
        from alpha, and must not grow either.
    """
    sets = _CandidateSets.of(records, config)
    if sets is None:
        return None
    sets_now = sets if now is None else _CandidateSets.of(records, now)
    grid = _evaluate(sets, sets_now)
    unseen = tuple(mode for mode in MODES if not (grid.fine == (mode == 'fine')).any())
    columns = {
        mode: np.ones_like(grid.fine) if mode in unseen else grid.fine == (mode == 'fine')
        for mode in MODES
    }
    kept_now = {mode: float(grid.now_kept[columns[mode]].mean()) for mode in MODES}
    scale, baseline = 1.0, grid.now_recall
    if share is not None:
        scale = share / float(grid.now_kept.mean())
        baseline = _baseline(sets_now, sets.target, share)
    budget = {mode: scale * kept for mode, kept in kept_now.items()}
    chooser = _Chooser(grid, config, columns, unseen, budget)
    choice = chooser.best(np.arange(len(grid.fine)))
    found = {'grid': grid, 'budget': budget, 'unseen': unseen, 'choice': choice}
    if choice is None:
        return KSearch(**found, values={}, kept=kept_now, gain=None, now_fits=False)
    return KSearch(
        **found,
        values=chooser.values(choice),
        kept=chooser.kept(choice),
        gain=gain_of(lambda queries: chooser.recall(chooser.best(queries)), baseline),
        now_fits=chooser.allows_now(),
    )


def _baseline(sets: _CandidateSets, target: Tensor, share: float) -> np.ndarray:
    """[Q] recall of the configured K at the highest alpha that keeps no more than a share."""
    figures = [sets.figures_by_mode(alpha, target) for alpha in ALPHAS]
    within = [recall for kept, recall in figures if kept.mean() <= share + ROUNDING]
    return within[-1] if within else figures[0][1]


class _Chooser:
    """Picks points of a grid within the budget of either mode."""

    def __init__(
        self,
        grid: KGrid,
        config: PruneConfig,
        columns: dict[str, np.ndarray],
        unseen: tuple[str, ...],
        budget: dict[str, float],
    ):
        self._grid, self._config = grid, config
        self._columns, self._unseen = columns, unseen
        allowed = {mode: self._within(mode, budget[mode]) for mode in MODES}
        self._allowed = allowed['coarse'][:, :, None] & allowed['fine'][:, None, :]
        if config.budget != 'union':
            self._allowed &= self._fixed_within()

    def best(self, queries: np.ndarray) -> KChoice | None:
        """The best allowed point on some queries; None when none is allowed."""
        if not self._allowed.any():
            return None
        grid = self._grid
        worth = grid.recall - PREFER_FEWER * grid.kept
        total = np.zeros(self._allowed.shape)
        for mode, axis in (('coarse', 2), ('fine', 1)):
            shown = grid.fine[queries] == (mode == 'fine')
            # The other mode's queries decide for one that is not there, but weigh little.
            rows = queries[shown] if shown.any() else queries
            mean = worth[..., rows].mean(axis=-1)
            total += max(shown.mean(), LIGHT) * np.expand_dims(mean, axis)
        at = np.unravel_index(np.where(self._allowed, total, -np.inf).argmax(), total.shape)
        return KChoice(*map(int, at))

    def allows_now(self) -> bool:
        """Whether the configured K are allowed."""
        config, grid = self._config, self._grid
        coarse, fine = (
            grid.pairs.index(
                (getattr(config, f'k_local_{mode}'), getattr(config, f'k_dynamic_{mode}'))
            )
            for mode in MODES
        )
        return bool(self._allowed[grid.k_global.index(config.k_global), coarse, fine])

    def recall(self, choice: KChoice) -> np.ndarray:
        """[Q] recall of a point, each query in its mode."""
        table = self._grid.recall[choice.k_global]
        return np.where(self._grid.fine, table[choice.fine], table[choice.coarse])

    def kept(self, choice: KChoice) -> dict[str, float]:
        """Mode -> share of patches that a point keeps in it."""
        table = self._grid.kept[choice.k_global]
        return {
            mode: float(table[getattr(choice, mode), self._columns[mode]].mean()) for mode in MODES
        }

    def values(self, choice: KChoice) -> dict[str, int]:
        """A point as fields of PruneConfig."""
        values = {'k_global': self._grid.k_global[choice.k_global]}
        for mode in MODES:
            local, dynamic = self._grid.pairs[getattr(choice, mode)]
            values |= {f'k_local_{mode}': local, f'k_dynamic_{mode}': dynamic}
        return values

    def _within(self, mode: str, budget: float) -> np.ndarray:
        """[G, P] points that one mode may take."""
        config, grid = self._config, self._grid
        within = grid.kept[..., self._columns[mode]].mean(axis=-1) <= budget + ROUNDING
        if mode in self._unseen:
            here = (getattr(config, f'k_local_{mode}'), getattr(config, f'k_dynamic_{mode}'))
            within &= np.array([pair == here for pair in grid.pairs])
        return within

    def _fixed_within(self) -> np.ndarray:
        """[G, P, P] points with which the fixed budget keeps no more on average either.

        That budget divides what alpha gives between the modes by their K sums (fixed_count).
        """
        local_dynamic = np.array([2 * local + dynamic for local, dynamic in self._grid.pairs])
        sums = np.array(self._grid.k_global)[:, None] + local_dynamic
        config, fine = self._config, self._grid.fine.mean()
        now = [
            config.k_global
            + 2 * getattr(config, f'k_local_{mode}')
            + getattr(config, f'k_dynamic_{mode}')
            for mode in MODES
        ]

        def mean(coarse: np.ndarray, of_fine: np.ndarray) -> np.ndarray:
            return ((1 - fine) * coarse + fine * of_fine) / np.maximum(coarse + of_fine, 1)

        return mean(sums[:, :, None], sums[:, None, :]) <= mean(*now) + ROUNDING


def _evaluate(sets: _CandidateSets, now: _CandidateSets) -> KGrid:
    """Every point of the grid, the configured K among them, and what is kept now."""
    config = sets.config
    values = {
        name: tuple(sorted({*grid, *(getattr(config, field) for field in fields)}))
        for name, grid, fields in (
            ('global', K_GLOBAL, ('k_global',)),
            ('local', K_LOCAL, ('k_local_coarse', 'k_local_fine')),
            ('dynamic', K_DYNAMIC, ('k_dynamic_coarse', 'k_dynamic_fine')),
        )
    }
    pairs = tuple(product(values['local'], values['dynamic']))
    points = [[sets.figures(k, *pair) for pair in pairs] for k in values['global']]
    kept, recall, own, paper = np.moveaxis(np.array(points), 2, 0)  # of [G, P, 4, Q]
    kept_now, recall_now = now.figures_by_mode(now.config.alpha, sets.target)
    return KGrid(
        k_global=values['global'],
        pairs=pairs,
        kept=kept,
        recall=recall,
        own_recall=own,
        paper_recall=paper,
        global_recall=np.array([sets.global_recall(k) for k in values['global']]),
        fine=sets.fine,
        now_kept=kept_now,
        now_recall=recall_now,
    )


@dataclass(frozen=True, eq=False)
class _CandidateSets:
    """Ranks from which V_global, V_local and V_dynamic of any K follow, [Q, V, N] each."""

    config: PruneConfig
    previous: Tensor  # rank in V_global of the query before
    current: Tensor  # rank in V_global of this query
    local: Tensor
    changed: Tensor  # rank among the changed patches, infinity for the others (Eqs. 3-4)
    fine: np.ndarray  # [Q]

    @classmethod
    def of(cls, records: Sequence[QueryScores], config: PruneConfig) -> _CandidateSets | None:
        followers = [i for i, record in enumerate(records) if record.follows and not record.unseen]
        if not followers:
            return None
        every = torch.stack([record.scores for record in records])
        rank = global_rank(every, config)
        no_change = torch.ones_like(every[0, 0])
        each = (records[i].similarity for i in followers)
        similarity = torch.stack([no_change if s is None else s for s in each])
        unchanged = similarity >= config.similarity_threshold
        return cls(
            config=config,
            previous=rank[[i - 1 for i in followers]],
            current=rank[followers],
            local=all_ranks(every[followers, :STATIC_LAYER]).amin(dim=1),
            changed=all_ranks(-similarity).masked_fill(unchanged, torch.inf),
            fine=np.array([records[i].fine for i in followers]),
        )

    def figures(self, *base_k: int) -> tuple[np.ndarray, ...]:
        """[Q] each: share kept, recall, recall of the own V_t, and section 7.2's."""
        k = self._scaled(base_k)
        retained = self._retained(k)
        supplemented = (self.current < k.k_global) | self._supplement(k)
        figures = (
            retained.float().mean(dim=-1),
            scores.recall(retained, self.target),
            scores.recall(retained, self.current < k.k_global),
            scores.recall(self.previous < k.k_global, supplemented),
        )
        return tuple(_per_query(figure) for figure in figures)

    def figures_by_mode(self, alpha: float, target: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """[Q] share kept, and recall of a target, with the configured K and each query's mode."""
        coarse, fine = (
            self._retained(k_budget(self.config, fine=mode, alpha=alpha)) for mode in (False, True)
        )
        retained = torch.where(torch.from_numpy(self.fine)[:, None, None], fine, coarse)
        return _per_query(retained.float().mean(dim=-1)), _per_query(
            scores.recall(retained, target)
        )

    def global_recall(self, k_global: int) -> np.ndarray:
        """[Q] Eq. 1."""
        k = self._scaled((k_global, 0, 0)).k_global
        return _per_query(scores.recall(self.previous < k, self.current < k))

    @property
    def target(self) -> Tensor:
        """[Q, V, N] bool: V_t with the configured K_global."""
        return self.current < k_budget(self.config, fine=False).k_global

    def _retained(self, k: KBudget) -> Tensor:
        return (self.previous < k.k_global) | self._supplement(k)

    def _supplement(self, k: KBudget) -> Tensor:
        return (self.local < k.k_local) | (self.changed < k.k_dynamic)

    def _scaled(self, base_k: Sequence[int]) -> KBudget:
        """floor(alpha K), the same for every kind of K."""
        return KBudget(*(_scaled(self.config, k) for k in base_k))


@lru_cache(maxsize=1024)
def _scaled(config: PruneConfig, k: int) -> int:
    return k_budget(dataclasses.replace(config, k_global=k), fine=False).k_global


def global_rank(every: Tensor, config: PruneConfig) -> Tensor:
    """[Q, V, N] rank in V_global, of scores [Q, L, V, N]; the union takes the best layer's."""
    layers = scale_layers(config.global_layers, every.shape[1], first=1)
    chosen = every[:, [layer - 1 for layer in layers]]
    if config.global_fusion == 'mean':
        return all_ranks(chosen.mean(dim=1))
    return all_ranks(chosen).amin(dim=1)


def _per_query(figure: Tensor) -> np.ndarray:
    """[Q] mean over cameras; what is unknown (an empty V_t) counts as recalled."""
    return figure.nan_to_num(1.0).mean(dim=-1).double().numpy()
