"""The status lines of `vla_node` on /diagnostics."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from diagnostic_msgs.msg import DiagnosticStatus

from specprune_ros.errors import ObservationError
from specprune_ros.health import Health
from specprune_ros.inbox import Inbox
from specprune_ros.ros.diagnostics import ERROR, OK, STALE, WARN, fault_status, status
from specprune_ros.tasks import NodeState, TaskMachine

# What asks for attention in the line `task`.
TASK_LEVELS = {NodeState.STOPPED: ERROR, NodeState.FAULT: ERROR, NodeState.PAUSED: WARN}


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """What the lines are made from.

    Attributes:
        name: the node's, namespace included.
        now_ns: ROS time.
        state: the lifecycle's, in words.
        machine: tasks.
        health: counts and timings.
        inbox: the newest inputs; None unless active.
        dense: pruning is switched off.
        has_reader: somebody subscribes to the chunks; None: nothing is published.
        peer: action_streamer: 'absent', 'alive' or 'gone'.
    """

    name: str
    now_ns: int
    state: str
    machine: TaskMachine
    health: Health
    inbox: Inbox | None
    dense: bool
    has_reader: bool | None
    peer: str


def lines(shot: Snapshot) -> list[DiagnosticStatus]:
    """All status lines."""
    name, health = shot.name, shot.health
    pruning = {**health.pruning(), 'dense': str(shot.dense).lower()}
    return [
        _task(shot),
        _inputs(shot),
        status(f'{name}: inference', OK, shot.state, health.inference()),
        status(f'{name}: pruning', OK, shot.state, pruning),
        status(f'{name}: output guard', OK, shot.state, health.guard()),
        _peers(shot),
        fault_status(name, health),
    ]


def _task(shot: Snapshot) -> DiagnosticStatus:
    machine, task = shot.machine, shot.machine.task
    values = {'epoch': str(machine.epoch), 'task id': str(machine.task_id)}
    if task is not None:
        values['instruction'] = task.goal.instruction
        values['elapsed s'] = f'{(shot.now_ns - task.started_ns) / 1e9:.1f}'
        values['chunks'] = str(task.chunks)
        values['executed steps'] = str(task.steps)
        values['waiting for'] = task.waiting_for
    state = machine.state
    level = TASK_LEVELS.get(state, WARN if task is not None and task.waiting_for else OK)
    return status(f'{shot.name}: task', level, state.name.lower(), values)


def _inputs(shot: Snapshot) -> DiagnosticStatus:
    name = f'{shot.name}: inputs'
    rates = shot.health.rates_hz()
    if shot.inbox is None:
        return status(name, OK, shot.state, {})
    values = _stream_values(shot.inbox.age_s(shot.now_ns), rates)
    try:
        shot.inbox.check(shot.now_ns)
    except ObservationError as error:
        return status(name, STALE, str(error), values)
    return status(name, OK, 'complete', values)


def _stream_values(ages: Mapping[str, float], rates: Mapping[str, float]) -> dict[str, str]:
    values = {}
    for stream, age in ages.items():
        values[f'{stream} age s'] = f'{age:.3f}'
        values[f'{stream} rate Hz'] = f'{rates.get(stream, 0.0):.1f}'
    return values


def _peers(shot: Snapshot) -> DiagnosticStatus:
    values = {'action_streamer': shot.peer}
    if shot.has_reader is not None:
        values['action_chunk'] = 'is read' if shot.has_reader else 'nobody subscribes'
    unheard = shot.machine.task is not None and shot.has_reader is False
    if shot.peer == 'gone':
        return status(f'{shot.name}: peers', WARN, 'action_streamer is gone', values)
    if unheard:
        return status(f'{shot.name}: peers', WARN, 'nobody subscribes to the chunks', values)
    return status(f'{shot.name}: peers', OK, shot.state, values)
