"""docs/evidence.md says what docs/evidence/*.json say; scripts/evidence.sh measures its rows."""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from specprune_ros.config import PruneConfig
from specprune_ros.outputs import plain
from specprune_ros.sim.comparison import compare
from specprune_ros.sim.evaluate import pruning_of, read_results

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


def write(folder: Path, name: str, *cells: dict, weights: str = 'a') -> None:
    content = {'plan': {'weights': weights}, 'cells': cells}
    (folder / f'{name}.json').write_text(json.dumps(content))


def measured() -> set[tuple[str, str, str]]:
    """(file, method, task) of all that the stages evaluate; nothing is run."""
    text = SCRIPT.read_text()
    settings = text[text.index('NETWORK=') : text.index('train() {')]
    stages = text[text.index('stage_gates() {') : text.index('stage_ros() {')]
    code = f"""
set -eu
out=/out specprune=false
train() {{ :; }}
beside() {{ :; }}
ended() {{ :; }}
trained() {{ :; }}
shipped() {{ :; }}
{settings}
{stages}
evaluate() {{
  local name=$2 word reading= method task
  local methods=() tasks=()
  shift 2
  for word; do
    case $word in
      --*) reading=$word ;;
      *) case $reading in
        --method) methods+=("$word") ;;
        --task) tasks+=("$word") ;;
      esac ;;
    esac
  done
  for method in "${{methods[@]}}"; do
    for task in "${{tasks[@]}}"; do echo "$name $method $task"; done
  done
}}
for stage in gates table repeat goal seeds spared robustness; do stage_$stage; done
"""
    done = subprocess.run(['bash', '-c', code], capture_output=True, text=True, check=True)
    return {tuple(line.split()) for line in done.stdout.splitlines()}


def test_the_document_is_up_to_date(tables):
    text = tables.DOCUMENT.read_text()
    assert tables.filled(text, tables.FIGURES) == text, 'run python scripts/evidence_tables.py'


def test_every_table_is_in_the_document_once(tables):
    assert sorted(name for _, name, _ in tables.BLOCK.findall(tables.DOCUMENT.read_text())) == (
        sorted([*tables.TABLES, 'ros'])
    )


def test_every_row_is_measured_and_all_that_is_measured_has_a_row(tables):
    rows = [row for _, some in tables.TABLES.values() for row in some]
    runs = measured()
    assert {(row.file, row.method) for row in rows} == {run[:2] for run in runs}
    assert {(row.file, row.method, row.task) for row in rows if row.task} <= runs


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


def test_one_task_of_several(tables, tmp_path):
    write(tmp_path, 'table', cell(), cell(task='object_shuffled/0', successes=40, episodes=50))
    assert '| `object_shuffled/0`, dense | 40/50, 80.0 % |' in tables.table('tasks', tmp_path)


def test_every_file_says_what_its_episodes_say(tables):
    folders = [path.parent for path in tables.FIGURES.glob('*/episodes.csv')]
    assert folders
    for folder in folders:
        content = json.loads(folder.with_suffix('.json').read_text())
        plan = json.loads((folder / 'evaluation.json').read_text())
        assert content['plan'] == plan, folder.name
        results = read_results(folder)
        order = list(dict.fromkeys(one['method'] for one in content['cells']))
        results.sort(key=lambda one: order.index(one.method))
        cells = [plain(one) for one in compare(results, order[0])]
        for got, wanted in zip(content['cells'], cells, strict=True):
            for name, value in wanted.items():  # sums depend on the order of the episodes
                assert got[name] == pytest.approx(value), (folder.name, name)


SAME_AS_DEFAULT = {'layer_weight=average', 'rotation_threshold=0.1', 'rotation_threshold=0.4'}


def test_settings_that_change_nothing_are_known(tables):
    """The document says of each why it is no finding."""
    ledgers: dict[str, set] = {}
    for one in read_results(tables.FIGURES / 'table'):
        row = dataclasses.replace(one, method='', latency_ms=0.0, fallback=0.0)
        ledgers.setdefault(one.method, set()).add(repr(row))
    default = ledgers.pop(tables.FIXED)
    same = {method for method, ledger in ledgers.items() if ledger == default}
    assert same == {f'{tables.FIXED},{fields}' for fields in SAME_AS_DEFAULT}


def test_the_pairs_say_what_the_plain_episodes_say(tables):
    pairs = json.loads((tables.FIGURES / tables.ROS).read_text())['episodes']
    plain_of = {
        (one.task, one.seed): (one.success, one.steps)
        for one in read_results(tables.FIGURES / 'ros_plain')
    }
    told = {(one['task'], one['seed']): (one['plain'], one['plain_steps']) for one in pairs}
    assert told == plain_of
    both = [one for one in pairs if one['ros'] and one['plain']]
    later = [one['ros_steps'] - one['plain_steps'] for one in both]
    words = ' '.join(tables.DOCUMENT.read_text().split())
    assert f'take {min(later)} to {max(later)} steps more' in words


def test_figures_of_other_weights_are_refused(tables, tmp_path):
    for name, weights in (('table', 'a'), ('goal', 'a'), ('main_seed_1_checkpoint', 'b')):
        write(tmp_path, name, cell(), weights=weights)
    tables.check_weights(tmp_path, 'a')
    write(tmp_path, 'gate_grey', cell(), weights='b')
    with pytest.raises(ValueError, match=r'gate_grey\.json'):
        tables.check_weights(tmp_path, 'a')


def test_the_document_is_of_the_network_that_ships(tables):
    tables.check_weights(tables.FIGURES, tables.weights())


def test_what_runs_in_the_background_ends_with_the_script(tmp_path):
    """The lines of the script themselves, around a training that would take a minute."""
    text = SCRIPT.read_text()
    lines = text[text.index('train() {') : text.index('evaluate() {')]
    sleeper = tmp_path / 'specprune'
    sleeper.write_text(f'#!/bin/sh\necho $$ >{tmp_path}/pid\nexec sleep 60\n')
    sleeper.chmod(0o755)
    code = f"""
set -euo pipefail
out={tmp_path} specprune={sleeper}
exec 9>"$out/lock"
flock -n 9
{lines}
beside train seed_0
until [ -s "$out/pid" ]; do sleep 0.05; done
exit 3
"""
    done = subprocess.run(['bash', '-c', code], timeout=30)
    assert done.returncode == 3
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / 'pid').read_text()), 0)
    subprocess.run(['flock', '-n', str(tmp_path / 'lock'), 'true'], check=True)


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
    (tmp_path / 'ros.json').write_text(json.dumps({'episodes': pairs}))
    assert tables.table('ros', tmp_path).splitlines()[2:] == [
        '| `a/0` | 0 to 1 | 2/2 | 1/2 | seed 1 (ROS) |',
        '| `b/0` | 0 to 0 | 1/1 | 1/1 |  |',
    ]
    ros.write_text(json.dumps([{**episodes[0], 'seed': 7}]))
    with pytest.raises(ValueError, match='counterpart'):
        tables.ros_pairs(tmp_path / 'episodes.csv', [ros])
