"""The decoder passes of one query: pruned, dense, or both where the guard compares them.

Whatever fails in pruning costs speed, never the action.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from torch import Tensor

from specprune_ros.config import PruneConfig
from specprune_ros.errors import named
from specprune_ros.models.base import Prompt, VLAModel
from specprune_ros.models.decoder import Decoder, QueryDecoder
from specprune_ros.pruning.base import PruneMethod, PruneRun, PruneTrace, QueryContext
from specprune_ros.pruning.guard import GuardState, after_check, checks_now, kept_share
from specprune_ros.timing import StageClock
from specprune_ros.token_layout import TokenLayout
from specprune_ros.types import Mode

KEEP_ALL = 1.0  # keep_floor of a pass in which nothing may go


@dataclass(frozen=True, eq=False)
class Pass:
    """What one pass gave.

    Attributes:
        actions: [L, A] normalised.
        trace: what pruning did.
        memory: for the next query; None leaves the last one.
        fault: why the method's own dense run was not used, or empty.
    """

    actions: Tensor
    trace: PruneTrace
    memory: object | None
    fault: str = ''


@dataclass(frozen=True, eq=False, kw_only=True)
class Outcome:
    """What one query did; the episode takes it over once its action is known to be good.

    Attributes:
        done: the pass that counts; where both were computed the pruned one, with the actions of
            the dense one.
        guard: the guard's state from here on.
        fallback: why it ran dense, or empty.
        disagreement: of pruned and dense actions; NaN where not compared.
        dense_passes: those beside the one that `done.trace` is of.
        layout: of the query's sequence; None before `Query` says.
    """

    done: Pass
    guard: GuardState
    fallback: str = ''
    disagreement: float = math.nan
    dense_passes: int = 0
    layout: TokenLayout | None = None


@dataclass(frozen=True, eq=False, kw_only=True)
class QueryPasses:
    """One query's passes through the decoder.

    Attributes:
        model: gives the actions.
        method: prunes.
        config: of pruning and its guard.
        prompt: the query, embedded.
        context: what the method may know of it.
        clock: told what took how long.
        decoder: the model's in the form in which it runs; None: as the model offers it.
        check: whether keep sets are read back and checked; None: where that costs nothing.
        fault: what failed of pruning before the decoder: the query runs dense; or empty.
    """

    model: VLAModel
    method: PruneMethod
    config: PruneConfig
    prompt: Prompt
    context: QueryContext
    clock: StageClock
    decoder: Decoder | None = None
    check: bool | None = None
    fault: str = ''

    def act(self, guard: GuardState) -> Outcome:
        """Actions with pruning, or dense when the guard or anything that fails says so.

        A check that is due and finds nothing pruned stays due. After a failure the method's memory
        stays as it was.
        """
        check = checks_now(self.config, self.context.query, guard.overdue)
        if guard.tripped and not check:
            return self._stopped(guard)
        done, fallback = self._pruned()
        if check and done.trace.mode != Mode.DENSE:
            return self._compared(done, guard)
        return Outcome(done=done, guard=replace(guard, overdue=check), fallback=fallback)

    def _pruned(self) -> tuple[Pass, str]:
        """The method's pass; or a plain one, and why."""
        if self.fault:
            return self._plain(), self.fault
        try:
            return self._run(self.method.begin(self.context), self.config.keep_floor), ''
        except Exception as error:
            return self._plain(), named(error)

    def _stopped(self, guard: GuardState) -> Outcome:
        """Dense, until a check passes."""
        dense, why = self._dense(), f'guard: {guard.why}'
        if dense.fault:
            why += f'; no dense run of the method: {dense.fault}'
        return Outcome(done=dense, guard=guard, fallback=why)

    def _compared(self, pruned: Pass, guard: GuardState) -> Outcome:
        """The dense actions, and what they and the dense pass's attention say of pruning."""
        dense = self._dense()
        try:
            disagreement = float((pruned.actions - dense.actions).abs().mean())
            share = kept_share(pruned.trace, dense.trace)
            guard = after_check(guard, self.config, disagreement=disagreement, recall=share)
        except Exception as error:
            done = replace(dense, memory=None)
            return Outcome(done=done, guard=replace(guard, overdue=False), fallback=named(error))
        done = replace(pruned, actions=dense.actions)
        return Outcome(done=done, guard=guard, disagreement=disagreement, dense_passes=1)

    def _dense(self) -> Pass:
        """The method's own dense run, or a plain one where that fails or drops something."""
        try:
            return self._run(self.method.begin_dense(self.context), KEEP_ALL)
        except Exception as error:
            return replace(self._plain(), fault=named(error))

    def _plain(self) -> Pass:
        return self._run(PruneRun(self.context), KEEP_ALL)

    def _run(self, run: PruneRun, keep_floor: float) -> Pass:
        layout, lap = self.prompt.layout, self.clock.lap
        decode = QueryDecoder(
            self.decoder or self.model.decoder,
            layout,
            run,
            keep_floor=keep_floor,
            lap=lap,
            check=self.check,
        )
        actions = self.model.act(self.prompt, decode)
        lap('act')
        done = Pass(actions, run.trace(), run.memory())
        lap('trace')
        return done
