"""The contract between pruning methods and the decoder.

A method never sees a model, a model never sees a method. One inference:

    run = method.begin(context)
    for each decoder layer:  keep = run.after_layer(probe)     (decoder.decode calls this)
    memory = run.memory()     what the next query of the episode may read; Policy keeps it
    trace = run.trace()       what happened, for the report

A method names patches by `visual_idx` and can name nothing else: BOS, proprio, text, action
placeholders and the stop token cannot be pruned.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from specprune_ros.config import PruneConfig
from specprune_ros.pruning.motion import Motion
from specprune_ros.token_layout import TokenLayout
from specprune_ros.types import Mode


class LayerProbe(Protocol):
    """What a run may look at after a decoder layer; nothing is computed until it is asked for."""

    layer: int  # 1-based
    visual_idx: Tensor  # [M] ascending, the visual tokens that this layer saw
    hidden: Tensor  # [K, C] the layer's output

    def text_attention(self, prompt: bool = False) -> Tensor:
        """[H, T, M] attention of the instruction's (or the whole prompt's) rows to the image."""

    def image_attention(self, prompt: bool = False) -> Tensor:
        """[H, T, M] attention of the image's rows to the instruction (or prompt), transposed."""


@dataclass(frozen=True, eq=False, kw_only=True)
class QueryContext:
    """All that a method may know before the decoder starts.

    Attributes:
        layout: the query's sequence.
        depth: decoder layers.
        device: where the decoder runs.
        fine: the controller's mode.
        alpha: prune ratio of this query, the configured one unless a guard relaxed it.
        similarity: [V, N] patch similarity to the reference frame, or None without one.
        unseen: cameras that were away since the last query or in the reference frame: what
            changed there is not known, and all of their patches must stay.
        memory: what the last run of this episode returned; None at its first query.
        query: 0-based count of this episode's queries.
    """

    layout: TokenLayout
    depth: int
    device: torch.device
    fine: bool
    alpha: float
    similarity: Tensor | None
    unseen: frozenset[int] = frozenset()
    memory: object | None
    query: int


@dataclass(frozen=True, eq=False, kw_only=True)
class PruneTrace:
    """What one run did.

    Attributes:
        mode: how hard it pruned.
        mode_reason: why, when the method itself decided; empty leaves it to the controller.
        budget: 'union', 'fixed' or '' where that means nothing.
        reason: [V, N] uint8 of types.Reason bits.
        pruned_after_layer: [V, N] uint8, 1-based layer; 0 for patches that survived.
        static_layer: layers up to this one count as static pruning.
        layer_index, layer_tokens: layers after which it chose, and the visual tokens left.
        recall: [V] Eq. 1 against the last query, or None; what reports show. The guard judges by
            another one, guard.kept_share.
        important: [V, N] bool, V_global of this query, or None.
        confidence: [depth] Eq. 8, or None.
    """

    mode: Mode
    mode_reason: str
    budget: str
    reason: Tensor
    pruned_after_layer: Tensor
    static_layer: int = 0
    layer_index: list[int] = field(default_factory=list)
    layer_tokens: list[int] = field(default_factory=list)
    recall: Tensor | None = None
    important: Tensor | None = None
    confidence: Tensor | None = None


class PruneRun:
    """One inference that keeps everything; methods override what they change."""

    def __init__(self, context: QueryContext):
        self.context = context

    def after_layer(self, probe: LayerProbe) -> Tensor | None:
        """Choose what stays after a decoder layer.

        Returns:
            Ascending `visual_idx`, a subset of `probe.visual_idx`; None keeps all.
        """
        return None

    def memory(self) -> object | None:
        """What the next query of this episode may read."""
        return None

    def trace(self) -> PruneTrace:
        """What this run did; called once, after the last layer."""
        shape = (len(self.context.layout.cameras), self.context.layout.patches)
        nothing = torch.zeros(shape, dtype=torch.uint8, device=self.context.device)
        return PruneTrace(
            mode=Mode.DENSE,
            mode_reason='nothing is pruned',
            budget='',
            reason=nothing,
            pruned_after_layer=nothing,
        )


class PruneMethod:
    """A pruning method: stateless, built once from the configuration.

    Attributes:
        name: key in pruning.METHODS.
    """

    name: ClassVar[str]

    def __init__(self, config: PruneConfig):
        self.config = config

    def reference_age(self, displacement: float, available: int) -> int:
        """How many control steps back the frame to compare with is; 0 compares with none."""
        return 0

    def next_fine(self, fine: bool, motion: Motion) -> bool:
        """The controller's mode after one more executed action."""
        return False

    def check_depth(self, depth: int) -> None:
        """Refuse a configuration that cannot work in a decoder of `depth` layers.

        Raises:
            ConfigError: naming the field and its value.
        """

    def graph_key(self, context: QueryContext) -> Hashable | None:
        """What decides the course of a run, beside the shapes of the context's tensors.

        A run whose course depends on nothing else can be recorded as a CUDA graph once, and
        replayed for every context of the same key. This one cannot.

        Args:
            context: its tensors may be missing; their values must not be read.

        Returns:
            None when what lies on the device decides too, or the host must see it.
        """
        return None

    def begin(self, context: QueryContext) -> PruneRun:
        """Start one inference."""
        raise NotImplementedError

    def begin_dense(self, context: QueryContext) -> PruneRun:
        """Start one inference that keeps everything.

        It runs where the guard has stopped pruning or compares with it, so a method that learns
        from what a run sees goes on learning: the run's memory() serves the next query as a pruned
        one's would, and its trace() says which patches were important. This one learns nothing.
        """
        return PruneRun(context)


class KeepAll(PruneMethod):
    """`none`: the dense model."""

    name = 'none'

    def graph_key(self, context: QueryContext) -> Hashable | None:
        """One course for all; a subclass may do otherwise."""
        return (self.name,) if type(self) is KeepAll else None

    def begin(self, context: QueryContext) -> PruneRun:
        """Start one inference that prunes nothing."""
        return PruneRun(context)
