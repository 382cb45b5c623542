"""docs/safety.md says what the code does: states, faults, parameters, and the tests it names."""

import re
from pathlib import Path

import pytest
from streaming_world import World, ramp

from specprune_ros.config import PolicyConfig
from specprune_ros.config_files import parameter_names
from specprune_ros.faults import FAULTS
from specprune_ros.streaming.config import StreamerConfig
from specprune_ros.streaming.states import StreamState
from specprune_ros.tasks import Goal, NodeState, TaskMachine

TEST = Path(__file__).resolve().parent
TEXT = (TEST.parent / 'docs' / 'safety.md').read_text()
NAMED_TESTS = re.findall(r'`(test_\w+\.py)::(test_\w+)`', TEXT)
SAME = '·'


def section(title: str) -> str:
    """The text under a heading."""
    found = re.search(rf'^## {re.escape(title)}\n(.*?)(?=^## |\Z)', TEXT, re.MULTILINE | re.DOTALL)
    assert found, title
    return found.group(1)


def table(title: str) -> list[list[str]]:
    """Cells of the first table of a section, headings first."""
    lines = re.findall(r'^\|(.+)\|$', section(title), re.MULTILINE)
    rows = [[cell.strip() for cell in line.split('|')] for line in lines]
    return [row for row in rows if not set(row[0]) <= set('-: ')]


# Promises ----------------------------------------------------------------------------------------


def test_all_24_promises_have_a_test_and_a_figure():
    rows = table('The 24 promises')[1:]
    assert [int(row[0]) for row in rows] == list(range(1, 25))
    for number, promise, tests, figure in rows:
        assert '::' in tests, number
        assert promise, number
        assert figure, number


@pytest.mark.parametrize(('file', 'name'), sorted(set(NAMED_TESTS)))
def test_every_test_that_is_named_exists(file, name):
    path = TEST / file
    assert path.exists()
    assert re.search(rf'^ *def {name}\(', path.read_text(), re.MULTILINE)


def test_every_parameter_that_is_named_exists():
    named = set(re.findall(r'`((?:runtime|stream|limits|robot|pruning|model)\.\w+)`', TEXT))
    known = {*parameter_names(PolicyConfig), *parameter_names(StreamerConfig)}
    assert len(named) > 10
    assert named <= known, named - known


# Faults ------------------------------------------------------------------------------------------


def test_the_fault_table_is_the_codes():
    listed = [tuple(row) for row in table('Fault codes')[1:]]
    by_number = sorted(FAULTS.items(), key=lambda item: item[1].number)
    known = [(str(fault.number), f'`{code}`', fault.meaning) for code, fault in by_number]
    assert listed == known, '\n'.join(f'| {" | ".join(row)} |' for row in known)


# States ------------------------------------------------------------------------------------------


def vla_node(state: str) -> TaskMachine:
    """A machine in a state of the table."""
    machine = TaskMachine(lambda end: None)
    if state == 'UNCONFIGURED':
        return machine
    machine.configure(3, 1.0)
    if state == 'INACTIVE':
        return machine
    machine.activate()
    if state in ('RUNNING', 'PAUSED'):
        machine.start(Goal('go'), 0)
    if state == 'PAUSED':
        machine.pause(True)
    if 'STOPPED' in state:
        machine.e_stop(True)
    if state == 'STOPPED, released':
        machine.e_stop(False)
    if state == 'FAULT':
        machine.hang('too long')
    return machine


VLA_EVENTS = {
    'start a task': lambda m: m.start(Goal('go'), 0),
    '`~/cancel_task`': lambda m: m.cancel(),
    '`~/pause` true': lambda m: m.pause(True),
    '`~/pause` false': lambda m: m.pause(False),
    '`~/reset`': lambda m: m.reset(busy=False),
    '`e_stop` true': lambda m: m.e_stop(True),
    '`e_stop` false': lambda m: m.e_stop(False),
    'inference hangs': lambda m: m.hang('too long'),
    'deactivate': lambda m: m.deactivate(),
}
VLA_STATES = (
    'UNCONFIGURED', 'INACTIVE', 'IDLE', 'RUNNING', 'PAUSED', 'STOPPED', 'STOPPED, released',
    'FAULT',
)  # fmt: skip


def action_streamer(state: str) -> World:
    """A streamer in a state of the table."""
    world = World(enabled=False)
    if state == 'INACTIVE':
        return world
    world.order('activate')
    world.refresh()
    if state not in ('DISABLED', 'STOPPED', 'STOPPED, released'):
        world.order('enable', True)
    if state in ('STREAMING', 'STALLED', 'PAUSED'):
        assert world.put(ramp(0.01))
    if state == 'STALLED':
        fail(world)
    if state == 'PAUSED':
        world.order('pause', True)
    if 'STOPPED' in state:
        world.order('e_stop', True)
    if state == 'STOPPED, released':
        world.order('e_stop', False)
    return world


def fail(world: World) -> None:
    """vla_node's task ends."""
    world.running = False
    world.tick()
    world.running = True


STREAMER_EVENTS = {
    '`~/enable` true': lambda w: w.streamer.enable(True, w.now),
    '`~/enable` false': lambda w: w.streamer.enable(False, w.now),
    '`~/pause` true': lambda w: w.streamer.pause(True, w.now),
    '`~/pause` false': lambda w: w.streamer.pause(False, w.now),
    '`~/reset`': lambda w: w.streamer.reset(w.now),
    '`e_stop` true': lambda w: w.streamer.e_stop(True, w.now),
    '`e_stop` false': lambda w: w.streamer.e_stop(False, w.now),
    'a good chunk': lambda w: (w.refresh(), w.put(ramp(0.01))),
    'an input fails': fail,
    'deactivate': lambda w: w.streamer.deactivate(w.now),
}
STREAMER_STATES = (
    'INACTIVE', 'DISABLED', 'WAITING', 'STREAMING', 'STALLED', 'PAUSED', 'STOPPED',
    'STOPPED, released',
)  # fmt: skip
MACHINES = {
    'The states of vla_node': (vla_node, lambda m: m.state.name, VLA_STATES, VLA_EVENTS),
    'The states of action_streamer': (
        action_streamer, lambda w: w.state, STREAMER_STATES, STREAMER_EVENTS,
    ),
}  # fmt: skip


@pytest.mark.parametrize('title', MACHINES)
def test_the_state_tables_are_the_machines(title):
    make, state_of, states, events = MACHINES[title]
    expected = [['state', *events]]
    for state in states:
        row = [state]
        for act in events.values():
            machine = make(state)
            before = state_of(machine)
            assert before == state.split(',')[0]
            act(machine)
            after = state_of(machine)
            row.append(SAME if after == before else after)
        expected.append(row)
    assert table(title) == expected, '\n'.join(f'| {" | ".join(row)} |' for row in expected)


@pytest.mark.parametrize(
    ('title', 'kind'),
    [('The states of vla_node', NodeState), ('The states of action_streamer', StreamState)],
)
def test_every_state_is_explained(title, kind):
    for state in kind:
        assert f'{state.name} ({state.value})' in section(title), state
