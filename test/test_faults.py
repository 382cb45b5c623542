"""Every fault that the code can report has a number and a meaning."""

import ast
from pathlib import Path

import pytest

from specprune_ros import errors
from specprune_ros.faults import FAULTS, number

PACKAGE = Path(errors.__file__).parent
RAISED = ('ObservationError', 'Refusal')  # calls whose first argument is a code
REPORTED = ('fault', '_fault', 'on_fault', '_on_fault')


def codes_of(tree: ast.AST) -> set[str]:
    """Literal codes in calls, and `code = '...'` of error classes."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and node.args:
            name = getattr(node.func, 'attr', getattr(node.func, 'id', ''))
            first = node.args[0]
            if name in (*RAISED, *REPORTED) and isinstance(first, ast.Constant):
                found.add(first.value)
        named_code = isinstance(node, ast.Assign) and getattr(node.targets[0], 'id', '') == 'code'
        if named_code and isinstance(node.value, ast.Constant):
            found.add(node.value.value)
    return found


def test_every_code_in_the_source_has_a_number():
    found = {
        code: str(path.relative_to(PACKAGE))
        for path in PACKAGE.rglob('*.py')
        for code in codes_of(ast.parse(path.read_text()))
        if isinstance(code, str)
    }
    assert len(found) > 30
    assert {code: where for code, where in found.items() if code not in FAULTS} == {}


def test_numbers_are_unique_and_in_their_range():
    numbers = [fault.number for fault in FAULTS.values()]
    assert len(set(numbers)) == len(numbers)
    assert all(100 <= value < 700 for value in numbers)
    assert all(fault.meaning for fault in FAULTS.values())


def test_unknown_code():
    with pytest.raises(KeyError):
        number('no_such_fault')
