"""One query as a function of tensors: from camera images on the device to normalised actions.

Its course is decided before it starts, by what the host knows. The same function runs eagerly and
under recording (query_graph.py).
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, replace

from torch import Tensor

from specprune_ros.config import PruneConfig
from specprune_ros.errors import PruningError, named
from specprune_ros.models.base import VLAModel
from specprune_ros.models.decoder import Decoder
from specprune_ros.models.preprocess import Staged
from specprune_ros.models.staging import Stager, Words
from specprune_ros.passes import Outcome, QueryPasses
from specprune_ros.pruning.base import PruneMethod, QueryContext
from specprune_ros.pruning.guard import GuardState, checks_now
from specprune_ros.pruning.scores import patch_similarity
from specprune_ros.query_graph import QueryGraphs
from specprune_ros.timing import NoClock, StageClock


@dataclass(frozen=True, eq=False, kw_only=True)
class QueryInputs:
    """All that differs from query to query of one kind, on the device.

    Attributes:
        images: V camera images, from the stager.
        reference: likewise, of the frame to compare with; None without.
        words: of the instruction.
        state: [P] normalised proprioception; None without.
        memory: of the pruning method; None at an episode's first query.
    """

    images: Staged
    reference: Staged | None
    words: Words
    state: Tensor | None
    memory: object | None


@dataclass(frozen=True, eq=False, kw_only=True)
class Query:
    """What is done with the inputs.

    Attributes:
        model, stager, decoder: compute; the decoder in the form in which it runs.
        method: prunes.
        config: of pruning and its guard.
        context: what the method may know, but for what comes with the inputs.
        guard: what it found so far.
        fault: what failed of pruning before the query: it runs dense; or empty.
    """

    model: VLAModel
    stager: Stager
    decoder: Decoder
    method: PruneMethod
    config: PruneConfig
    context: QueryContext
    guard: GuardState
    fault: str = ''

    def run(self, inputs: QueryInputs, clock: StageClock) -> Outcome:
        """Compute the query, and let the host check what pruning keeps where that is free."""
        return self._run(inputs, clock, check=None)

    def record(self, inputs: QueryInputs) -> Outcome:
        """The same without anything for which a host would have to wait.

        Raises:
            PruningError: pruning failed, which must not be recorded.
        """
        outcome = self._run(inputs, NoClock(), check=False)
        if outcome.fallback:
            raise PruningError(outcome.fallback)
        return outcome

    def kind(self, inputs: QueryInputs) -> tuple[str, Hashable]:
        """Why this query cannot be recorded, or empty; and what decides its course beside shapes.

        Two queries of one kind, with inputs of one tensor_tree.signature, do the same operations.
        """
        context, broken = self._context(inputs, None), self.fault
        try:
            key = self.method.graph_key(context)
        except Exception as error:
            key, broken = None, named(error)
        obstacles = {
            f'pruning failed: {broken}': bool(broken),
            'the model embeds a query as a whole': not self.stager.recordable,
            'a causal model goes on token by token': self.decoder.causal,
            'the guard compares this query, or has stopped pruning': self._guarded,
            f'what {self.method.name} does depends on data (such as budget union)': key is None,
        }
        why = next((reason for reason, holds in obstacles.items() if holds), '')
        return why, (key, self.config.keep_floor)

    def record_ahead(self, graphs: QueryGraphs, inputs: QueryInputs, outcome: Outcome) -> None:
        """Record the kinds of query that follow an episode's first one, in either mode.

        They differ from former tasks' by the length of the prompt, and recording them takes about
        as long as four queries each: better before the robot moves than in its motion.

        Args:
            graphs: where they are kept; nothing is done for kinds that it has.
            inputs: of the first query.
            outcome: likewise.
        """
        try:
            compares = self.method.reference_age(0.0, 1) > 0
        except Exception as error:  # a recording costs speed at worst, never the action
            graphs.eager(named(error))
            return
        given = replace(
            inputs, reference=inputs.images if compares else None, memory=outcome.done.memory
        )
        for fine in (True, False):
            context = replace(self.context, fine=fine, query=self.context.query + 1)
            ahead = replace(self, context=context, guard=outcome.guard)
            why, kind = ahead.kind(given)
            if not why:
                graphs.prepare(kind, ahead.record, given)

    @property
    def _guarded(self) -> bool:
        check = checks_now(self.config, self.context.query, self.guard.overdue)
        return check or self.guard.tripped

    def _run(self, inputs: QueryInputs, clock: StageClock, check: bool | None) -> Outcome:
        pixels, reference = self.stager.pixels(inputs.images), None
        if inputs.reference is not None:
            reference = self.stager.pixels(inputs.reference)
        clock.lap('preprocess')
        similarity, fault = self._similarity(pixels, reference)
        clock.lap('similarity')
        prompt = self.stager.embed(pixels, inputs.words, inputs.state, clock.lap)
        context = replace(self._context(inputs, similarity), layout=prompt.layout)
        passes = QueryPasses(
            model=self.model,
            method=self.method,
            config=self.config,
            prompt=prompt,
            context=context,
            clock=clock,
            decoder=self.decoder,
            check=check,
            fault=fault,
        )
        return replace(passes.act(self.guard), layout=prompt.layout)

    def _similarity(self, pixels: Tensor, reference: Tensor | None) -> tuple[Tensor | None, str]:
        """[V, N] to the reference frame, None without one; and what failed, or empty."""
        if reference is None or self.fault:
            return None, self.fault
        try:
            return patch_similarity(pixels, reference, self.model.info.grid), ''
        except Exception as error:
            return None, named(error)

    def _context(self, inputs: QueryInputs, similarity: Tensor | None) -> QueryContext:
        return replace(self.context, similarity=similarity, memory=inputs.memory)
