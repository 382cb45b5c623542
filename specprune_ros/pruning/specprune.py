"""SpecPrune-VLA: static pruning per action, dynamic pruning per layer, action-aware control.

Source: SpecPrune-VLA v3 (arXiv 2509.05614), sections 4 to 6, A.3, A.6.2. Where the paper is silent
or differs from the released code, each choice is a field of PruneConfig.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from specprune_ros.config import PruneConfig
from specprune_ros.errors import ConfigError
from specprune_ros.pruning import scores
from specprune_ros.pruning.base import LayerProbe, PruneMethod, PruneRun, PruneTrace, QueryContext
from specprune_ros.pruning.budget import (
    STATIC_LAYER,
    fixed_count,
    k_budget,
    layer_keep_count,
    scale_layers,
    select_fixed,
    select_union,
)
from specprune_ros.pruning.motion import Motion, next_fine, reference_age
from specprune_ros.types import Mode, Reason

CONTROLLER_OFF = 'the controller is off'


@dataclass(frozen=True)
class Schedule:
    """1-based layers at which something happens, for one decoder depth."""

    prune: tuple[int, ...]
    update: frozenset[int]
    important: tuple[int, ...]

    @classmethod
    def of(cls, config: PruneConfig, depth: int) -> Schedule:
        """Scale the configured layers to a decoder of `depth` layers.

        The first prune layer never directly follows static pruning: some layer between must have
        updated the scores (Alg. 1 updates where it does not prune).

        Raises:
            ConfigError: update layers fall on or behind the first prune layer at this depth.
        """
        layers = config.prune_layers if config.dynamic else ()
        prune = scale_layers(layers, depth, first=STATIC_LAYER + 2)
        important = scale_layers(config.global_layers, depth, first=1)
        last = max(prune, default=0)
        wanted = range(STATIC_LAYER + 1, last)
        if config.update_layers:
            wanted = scale_layers(config.update_layers, depth, first=STATIC_LAYER + 1)
        update = frozenset(wanted) & frozenset(range(last)) - frozenset(prune)
        if prune and not any(layer < prune[0] for layer in update):
            raise ConfigError(
                'pruning.update_layers',
                config.update_layers,
                f'scaled to {depth} layers, none comes before layer {prune[0]}, the first of '
                f'pruning.prune_layers = {config.prune_layers}',
            )
        return cls(prune=prune, update=update, important=important)


def budget_of(config: PruneConfig, context: QueryContext) -> str:
    """'union' or 'fixed'; by the device where the configuration leaves it open."""
    if config.budget != 'auto':
        return config.budget
    return 'fixed' if context.device.type == 'cuda' else 'union'


def why_dense(config: PruneConfig, context: QueryContext, *, asked: bool = False) -> str:
    """Why nothing goes in a query, in words; empty where it prunes.

    Args:
        config: how it prunes.
        context: the query.
        asked: whether somebody wants nothing to go.
    """
    if context.memory is None:
        first = context.query == 0
        return 'first query of the episode' if first else 'nothing is known of a query before'
    if asked:
        return 'nothing may go in this query'
    if config.dense_every and context.query % config.dense_every == 0:
        return 'periodic refresh'
    # All of a camera that returned stays. The fixed budget has no shape for that.
    if context.unseen and budget_of(config, context) == 'fixed':
        return 'a camera returned'
    return ''


@dataclass(frozen=True, eq=False)
class Memory:
    """What one query leaves to the next.

    Attributes:
        global_rank: [V, N], rank in V_global; infinity outside it.
        confidence: [depth] omega_conf of every layer, from the last dense query.
    """

    global_rank: Tensor
    confidence: Tensor


class SpecPruneRun(PruneRun):
    """One inference of SpecPrune-VLA.

    differs: the paper does not say what the first query of an episode does; it is dense, and gives
        V_global and the layers' confidence.
    """

    def __init__(self, config: PruneConfig, context: QueryContext, *, dense: bool = False):
        super().__init__(context)
        self._config = config
        self._schedule = Schedule.of(config, context.depth)
        self._fine = context.fine and config.controller
        self._k = k_budget(config, self._fine, context.alpha)
        self._shape = (len(context.layout.cameras), context.layout.patches)
        self._budget = budget_of(config, context)
        self._dense_why = why_dense(config, context, asked=dense)
        self._dense = bool(self._dense_why)
        new = {'device': context.device}
        self._local_rank = torch.full(self._shape, torch.inf, **new)
        self._local_score = torch.zeros(self._shape, **new)
        self._ema: Tensor | None = None
        self._important: list[Tensor] = []  # [V, N] score of each global layer
        self._entropy: list[Tensor] = []
        self._reason = torch.zeros(self._shape, dtype=torch.uint8, **new)
        self._gone = torch.zeros(self._shape, dtype=torch.uint8, **new).flatten()
        self._counts: list[tuple[int, int]] = []

    def after_layer(self, probe: LayerProbe) -> Tensor | None:
        """Score, and prune after layer 2 (static) and after the prune layers (dynamic)."""
        layer, schedule = probe.layer, self._schedule
        prunes = not self._dense and layer in schedule.prune
        keep = None
        if self._dense:
            self._entropy.append(scores.attention_entropy(self._text_attention(probe)))
        elif layer <= STATIC_LAYER:
            self._collect_local(probe)
            if layer == STATIC_LAYER and self._config.static:
                keep = self._select_static()
        elif layer in schedule.update:
            self._update_scores(probe)
        if layer in schedule.important:
            self._important.append(self._score_grid(probe))
        if prunes:
            keep = self._select_dynamic(probe.visual_idx)
        if keep is not None:
            self._record(layer, probe.visual_idx, keep)
        return keep

    def memory(self) -> Memory:
        """V_global for the next query, and the layers' confidence."""
        return self._left

    @cached_property
    def _left(self) -> Memory:
        confidence = (
            scores.layer_confidence(torch.stack(self._entropy))
            if self._entropy
            else self._memory.confidence
        )
        return Memory(global_rank=self._next_global_rank(), confidence=confidence)

    def trace(self) -> PruneTrace:
        """What this run did."""
        last = self.context.memory
        now = self.memory()
        mode = Mode.FINE if self._fine else Mode.COARSE
        return PruneTrace(
            mode=Mode.DENSE if self._dense else mode,
            mode_reason=self._dense_why or ('' if self._config.controller else CONTROLLER_OFF),
            budget=self._budget,
            reason=self._reason,
            pruned_after_layer=self._gone.view(self._shape),
            static_layer=STATIC_LAYER,
            layer_index=[layer for layer, _ in self._counts],
            layer_tokens=[count for _, count in self._counts],
            recall=None
            if last is None
            else scores.recall(last.global_rank.isfinite(), now.global_rank.isfinite()),
            important=now.global_rank.isfinite(),
            confidence=now.confidence,
        )

    @property
    def _memory(self) -> Memory:
        return self.context.memory

    def _text_attention(self, probe: LayerProbe) -> Tensor:
        return probe.text_attention(prompt=self._config.score_text == 'prompt')

    def _attention(self, probe: LayerProbe) -> Tensor:
        """[H, T, M] in the configured direction (Eq. 2)."""
        if self._config.score_direction == 'image_to_text':
            return probe.image_attention(prompt=self._config.score_text == 'prompt')
        return self._text_attention(probe)

    def _score_grid(self, probe: LayerProbe) -> Tensor:
        """[V, N] score of the tokens alive, -inf for pruned ones."""
        score = scores.attention_score(self._attention(probe))
        grid = torch.full(self._shape, -torch.inf, device=score.device).flatten()
        return grid.scatter_(0, probe.visual_idx, score).view(self._shape)

    def _collect_local(self, probe: LayerProbe) -> None:
        """V_local: union of the top K_local of layers 1 and 2 (section 4.1.3)."""
        grid = self._score_grid(probe)
        rank = scores.top_k_rank(grid, self._k.k_local)
        self._local_rank = torch.minimum(self._local_rank, rank)
        self._local_score = self._local_score + grid

    def _select_static(self) -> Tensor:
        """V_retain after layer 2, as ascending visual_idx; remembers each patch's reasons."""
        global_rank = self._memory.global_rank
        similarity = self.context.similarity
        if similarity is None:
            similarity = torch.ones(self._shape, device=global_rank.device)
        changed = scores.changed_patches(
            similarity, self._config.similarity_threshold, self._k.k_dynamic
        )
        sets = {
            Reason.GLOBAL: global_rank.isfinite(),
            Reason.DYNAMIC: changed,
            Reason.LOCAL: self._local_rank.isfinite(),
        }
        if self._budget == 'union':
            for camera in self.context.unseen:
                sets[Reason.DYNAMIC][camera] = True
            keep, filler = select_union(*sets.values())
        else:
            keep, filler = select_fixed(
                fixed_count(self._config, self._fine, self._shape[1], self.context.alpha),
                global_rank=global_rank,
                dynamic_set=changed,
                local_rank=self._local_rank,
                similarity=similarity,
                local_score=self._local_score,
            )
        for reason, members in {**sets, Reason.FILL: filler}.items():
            self._reason += members.to(torch.uint8) * int(reason)
        return keep

    def _update_scores(self, probe: LayerProbe) -> None:
        """S_i <- (1 - beta) S_i + beta omega_rank omega_conf (Eqs. 5, 9)."""
        per_head = self._attention(probe).float().mean(dim=1)
        weight = scores.rank_weight(per_head, self._config.rank_slope, self._config.rank_base)
        score = weight
        if self._config.layer_weight == 'entropy':
            score = weight * self._memory.confidence[probe.layer - 1]
        previous = torch.zeros_like(score) if self._ema is None else self._ema
        self._ema = scores.ema(previous, score, self._config.ema_rate)

    def _select_dynamic(self, alive: Tensor) -> Tensor:
        """The floor(gamma n) best scores, as ascending visual_idx (section 5.2)."""
        score = self._ema
        exempt = 0
        for camera in self.context.unseen:  # all of a returned camera stays
            seen = alive // self._shape[1] != camera
            score = score.masked_fill(~seen, torch.inf)
            exempt += self._shape[1]
        count = exempt + layer_keep_count(self._config.layer_keep_ratio, len(alive) - exempt)
        rows = score.argsort(descending=True, stable=True)[:count].sort().values
        self._ema = self._ema[rows]
        return alive[rows]

    def _record(self, layer: int, alive: Tensor, keep: Tensor) -> None:
        went = torch.zeros_like(self._gone)
        went.index_fill_(0, alive, layer).index_fill_(0, keep, 0)
        self._gone += went
        self._counts.append((layer, len(keep)))

    def _next_global_rank(self) -> Tensor:
        """V_global: top K_global of layers 15 and 32, fused (section 4.1.1).

        Only surviving tokens have scores; a pruned one comes back through V_local or V_dynamic.
        differs: the paper does not say how the two layers are fused; `union` is what reaches its
        Table 8.
        """
        if self._config.global_fusion == 'mean':
            fused = torch.stack(self._important).mean(dim=0)
            return scores.top_k_rank(fused, self._k.k_global)
        ranks = [scores.top_k_rank(grid, self._k.k_global) for grid in self._important]
        return torch.stack(ranks).amin(dim=0)


class SpecPrune(PruneMethod):
    """Training-free two-level pruning with a controller that reads executed motion."""

    name = 'specprune'

    def __init__(self, config: PruneConfig):
        super().__init__(config)
        first, update = min(config.prune_layers, default=0), config.update_layers
        if update and first and not any(STATIC_LAYER < layer < first for layer in update):
            raise ConfigError(
                'pruning.update_layers',
                update,
                f'needs a layer between {STATIC_LAYER} and {first}, the first of '
                'pruning.prune_layers',
            )

    def reference_age(self, displacement: float, available: int) -> int:
        """T of section 4.1.2."""
        return reference_age(displacement, available)

    def next_fine(self, fine: bool, motion: Motion) -> bool:
        """Fine or coarse, section 6.2."""
        return next_fine(
            fine,
            motion,
            translation_threshold=self.config.translation_threshold,
            rotation_threshold=self.config.rotation_threshold,
            hysteresis=self.config.hysteresis,
        )

    def graph_key(self, context: QueryContext) -> Hashable | None:
        """None where the union's size decides; a subclass may do otherwise."""
        dense = why_dense(self.config, context)
        static = bool(dense) or budget_of(self.config, context) == 'fixed'
        if not static or type(self) is not SpecPrune:
            return None
        return self.config, context.fine, context.alpha, dense, context.unseen

    def check_depth(self, depth: int) -> None:
        """Refuse layers that leave nothing to prune by; see Schedule.of."""
        Schedule.of(self.config, depth)

    def begin(self, context: QueryContext) -> SpecPruneRun:
        """Start one inference."""
        return SpecPruneRun(self.config, context)

    def begin_dense(self, context: QueryContext) -> SpecPruneRun:
        """Start one inference that keeps everything, and renews V_global and the confidence."""
        return SpecPruneRun(self.config, context, dense=True)
