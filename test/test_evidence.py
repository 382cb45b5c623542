"""docs/evidence.md says what docs/evidence/*.json say; scripts/evidence.sh measures its rows."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from specprune_ros.config import PruneConfig
from specprune_ros.sim.evaluate import pruning_of

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / 'scripts' / 'evidence.sh'


@pytest.fixture(scope='module')
def tables():
    path = ROOT / 'scripts' / 'evidence_tables.py'
    spec = importlib.util.spec_from_file_location('evidence_tables', path)
    module = sys.modules['evidence_tables'] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def cell(**changes) -> dict:
    return {
        'task': '', 'method': 'dense', 'episodes': 200, 'successes': 181, 'low': 0.856,
        'high': 0.939, 'won': None, 'lost': None, 'p_value': None, 'static': 0.3, 'kept': 0.2,
        'flops': 0.4, 'recall_static': 0.9, 'recall_kept': 0.8, 'object_static': 0.7,
        'object_kept': None, 'action_error': 0.05, 'fine': 0.5, **changes,
    }  # fmt: skip


def write(folder: Path, name: str, *cells: dict) -> None:
    (folder / f'{name}.json').write_text(json.dumps({'plan': {}, 'cells': cells}))


def measured() -> set[str]:
    """The methods of the main evaluation."""
    lines = SCRIPT.read_text().splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith('SHUFFLED='))
    last = next(i for i, line in enumerate(lines) if line.startswith('train()'))
    code = '\n'.join([*lines[first:last], r'printf "%s\n" "${MAIN[@]}" "${STUDY[@]}"'])
    out = subprocess.run(['bash', '-c', code], capture_output=True, text=True, check=True).stdout
    return set(out.split())


def test_the_document_is_up_to_date(tables):
    text = tables.DOCUMENT.read_text()
    assert tables.filled(text, tables.FIGURES) == text, 'run python scripts/evidence_tables.py'


def test_every_table_is_in_the_document_once(tables):
    assert sorted(name for _, name, _ in tables.BLOCK.findall(tables.DOCUMENT.read_text())) == (
        sorted([*tables.TABLES, 'ros'])
    )


def test_every_row_of_the_main_evaluation_is_measured_and_the_reverse(tables):
    shown = {
        row.method for _, rows in tables.TABLES.values() for row in rows if row.file == 'table'
    }
    assert shown == measured()


def test_every_method_is_one(tables):
    for _, rows in tables.TABLES.values():
        for row in rows:
            pruning_of(row.method, PruneConfig())


def test_a_row_says_what_its_file_says(tables, tmp_path):
    ours = cell(method=tables.FIXED, successes=170, won=3, lost=14, p_value=0.0127)
    write(tmp_path, 'table', cell(), ours, cell(task='object_shuffled/0'))
    lines = tables.table('main', tmp_path).splitlines()
    assert lines[2] == (
        '| dense | 181/200, 90.5 % | 85.6 to 93.9 % |  | 30 %, 20 % | 40 % | 90 %, 80 % |  |  |'
    )
    assert lines[3] == (
        '| **SpecPrune, alpha 0.8** | 170/200, 85.0 % | 85.6 to 93.9 % | +3 -14, p 0.013 '
        '| 30 %, 20 % | 40 % | 90 %, 80 % |  | 0.050 |'
    )
    assert lines[4].startswith('| SpecPrune, budget `union` | not measured yet |')


def test_one_task_and_an_evaluation_of_one_task_alone(tables, tmp_path):
    of_all, of_one = cell(), cell(task='object_shuffled/0', successes=40, episodes=50)
    write(tmp_path, 'table', of_all, of_one)
    assert '| `object_shuffled/0`, dense | 40/50, 80.0 % |' in tables.table('tasks', tmp_path)
    write(tmp_path, 'gate_normal', of_one)
    assert '| dense | 40/50, 80.0 % |' in tables.table('gates', tmp_path)


def test_episodes_through_ros_are_paired_with_the_plain_ones(tables, tmp_path):
    (tmp_path / 'episodes.csv').write_text(
        'task,seed,success,steps\na/0,1,0,280\na/0,0,1,100\nb/0,0,1,90\n'
    )
    ros = tmp_path / 'episodes.json'
    states = [('a/0', 0, 'success', 110), ('a/0', 1, 'success', 120), ('b/0', 0, 'success', 95)]
    episodes = [dict(zip(('task', 'seed', 'state', 'step'), one, strict=True)) for one in states]
    ros.write_text(json.dumps(episodes))
    pairs = tables.ros_pairs(tmp_path / 'episodes.csv', [ros])
    assert pairs[1] == {
        'task': 'a/0', 'seed': 1, 'ros': True, 'plain': False, 'ros_steps': 120,
        'plain_steps': 280,
    }  # fmt: skip
    (tmp_path / 'ros.json').write_text(json.dumps(pairs))
    assert tables.table('ros', tmp_path).splitlines()[2:] == [
        '| `a/0` | 0 to 1 | 2/2 | 1/2 | seed 1 (ROS) |',
        '| `b/0` | 0 to 0 | 1/1 | 1/1 |  |',
    ]
    ros.write_text(json.dumps([{**episodes[0], 'seed': 7}]))
    with pytest.raises(KeyError):
        tables.ros_pairs(tmp_path / 'episodes.csv', [ros])
