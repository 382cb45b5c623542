"""Messages and dataclasses say the same, without ROS: the .msg files are read as text."""

import dataclasses
import re
from pathlib import Path

import pytest

from specprune_ros.types import (
    ActionChunk,
    ActionSpace,
    ExecutedAction,
    Mode,
    PruneReport,
    Reason,
)

MSG = Path(__file__).resolve().parent.parent / 'msg'
PAIRS = {
    'ActionChunk': ActionChunk,
    'ExecutedAction': ExecutedAction,
    'PruningDiagnostics': PruneReport,
}
FIELD = re.compile(r'^([\w/]+(?:\[\])?)\s+(\w+)\s*(#.*)?$')
CONSTANT = re.compile(r'^uint8\s+([A-Z_]+)=(\d+)')


def parse(name: str) -> tuple[dict[str, str], dict[str, int]]:
    """Fields (name -> type) and constants of a message."""
    fields, constants = {}, {}
    for line in (MSG / f'{name}.msg').read_text().splitlines():
        if constant := CONSTANT.match(line):
            constants[constant[1]] = int(constant[2])
        elif field := FIELD.match(line):
            fields[field[2]] = field[1]
    return fields, constants


def attribute(name: str, kind: str) -> set[str]:
    """The dataclass attributes that carry a message field."""
    if kind == 'std_msgs/Header':
        return {'stamp_ns', 'frame_id'}
    suffix = {'builtin_interfaces/Time': '_ns', 'builtin_interfaces/Duration': '_s'}
    return {name + suffix.get(kind, '')}


@pytest.mark.parametrize('name', PAIRS)
def test_fields_agree(name):
    fields, _ = parse(name)
    carried = set().union(*(attribute(*item) for item in fields.items()))
    own = {field.name for field in dataclasses.fields(PAIRS[name])}
    # A report has no frame; horizon is derived from the data's shape.
    assert carried - own <= {'horizon', 'frame_id'}
    assert own <= carried


@pytest.mark.parametrize('name', PAIRS)
def test_every_field_has_a_comment(name):
    for line in (MSG / f'{name}.msg').read_text().splitlines():
        if FIELD.match(line):
            assert '#' in line, line


def test_constants_agree():
    _, report = parse('PruningDiagnostics')
    assert {name: report[f'MODE_{name}'] for name in Mode.__members__} == Mode.__members__
    assert {name: report[f'REASON_{name}'] for name in Reason.__members__} == dict(
        Reason.__members__
    )
    _, chunk = parse('ActionChunk')
    assert {name: chunk[f'SPACE_{name}'] for name in ActionSpace.__members__} == dict(
        ActionSpace.__members__
    )


def test_cmake_generates_every_message():
    cmake = (MSG.parent / 'CMakeLists.txt').read_text()
    for path in MSG.glob('*.msg'):
        assert f'msg/{path.name}' in cmake
