"""docs/specprune.md names an option or a test for every reading of the paper: all exist."""

import re
from pathlib import Path

import pytest

from specprune_ros.config_files import parameter_names

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / 'docs' / 'specprune.md').read_text()
ROWS = re.findall(r'^\| (\d+) \|.*\| (.+) \|$', TEXT, re.MULTILINE)
TESTS = {
    name
    for path in (ROOT / 'test').glob('test_*.py')
    for name in re.findall(r'^ *def (test_\w+)\(', path.read_text(), re.MULTILINE)
}


def test_all_33_points_are_answered():
    assert [int(number) for number, _ in ROWS] == list(range(1, 34))


@pytest.mark.parametrize(('number', 'where'), ROWS, ids=[number for number, _ in ROWS])
def test_where_it_is_answered_exists(number, where):
    names = re.findall(r'`([\w.]+)`', where)
    assert names
    for name in names:
        assert name in TESTS or name in parameter_names(), name


def test_every_pruning_option_is_listed():
    missing = [n for n in parameter_names() if n.startswith('pruning.') and n not in TEXT]
    assert set(missing) <= LISTED_ELSEWHERE


# The K's of A.6.2, the method's name and the update rate are the paper's own, not readings.
LISTED_ELSEWHERE = {
    'pruning.method', 'pruning.k_global', 'pruning.k_local_coarse', 'pruning.k_dynamic_coarse',
    'pruning.ema_rate',
}  # fmt: skip
