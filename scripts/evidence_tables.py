"""Fill the tables of docs/evidence.md from docs/evidence/*.json, which `specprune eval` wrote.

python scripts/evidence_tables.py           # rewrites the document
python scripts/evidence_tables.py --ros EPISODES.csv ROS/*/episodes.json   # makes ros.json
python scripts/evidence_tables.py --weights [FOLDER] # digest of it, or of what ships

SPECPRUNE_FIGURES names another folder than docs/evidence.
"""

from __future__ import annotations

import csv
import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from specprune_ros.cli.eval import digest_of  # noqa: E402
from specprune_ros.shipped import EMBEDDED, PREFIX, find_checkpoint  # noqa: E402

DOCUMENT = ROOT / 'docs' / 'evidence.md'
FIGURES = Path(os.environ.get('SPECPRUNE_FIGURES') or ROOT / 'docs' / 'evidence')
BLOCK = re.compile(r'(<!-- table: (\w+) -->\n).*?(<!-- end -->)', re.DOTALL)
FIXED = 'specprune:budget=fixed'
ROS = 'ros.json'
OTHER_NETWORKS = ('main_', 'gate_trained_', 'spared_')  # files of networks that do not ship
MISSING = 'not measured yet'


@dataclass(frozen=True)
class Row:
    """A line of a table: what it is called, and where its figures are.

    Attributes:
        name: as the document has it.
        file: of FIGURES, without its ending.
        method: as `specprune eval` has it.
        task: its name; '' for all.
    """

    name: str
    file: str
    method: str
    task: str = ''


Cell = dict
Column = tuple[str, Callable[[Cell], str]]


def success(cell: Cell) -> str:
    """'181/200, 90.5 %'."""
    rate = 100 * cell['successes'] / cell['episodes']
    return f'{cell["successes"]}/{cell["episodes"]}, {rate:.1f} %'


def interval(cell: Cell) -> str:
    """'85.6 to 93.9 %'."""
    return f'{100 * cell["low"]:.1f} to {100 * cell["high"]:.1f} %'


def paired(cell: Cell) -> str:
    """'+3 -11, p 0.057': episodes that only this one, or only the reference solved."""
    if cell['p_value'] is None:
        return ''
    p = cell['p_value']
    return f'+{cell["won"]} -{cell["lost"]}, p {"< 0.001" if p < 0.001 else f"{p:.3f}"}'


def share(*names: str) -> Callable[[Cell], str]:
    """'31 %, 22 %' of some fields; nothing where one is unknown."""

    def text(cell: Cell) -> str:
        values = [cell[name] for name in names]
        return '' if None in values else ', '.join(f'{100 * value:.0f} %' for value in values)

    return text


def action_error(cell: Cell) -> str:
    """Against dense."""
    return '' if cell['p_value'] is None else f'{cell["action_error"]:.3f}'


SUCCESS: tuple[Column, ...] = (('success', success), ('95 %', interval))
PAIRED: tuple[Column, ...] = (*SUCCESS, ('against dense', paired))
KEPT: tuple[Column, ...] = (('static, end', share('static', 'kept')), ('FLOPs', share('flops')))
RECALL: Column = ('recall: static, end', share('recall_static', 'recall_kept'))
OBJECT: Column = ('object: static, end', share('object_static', 'object_kept'))
FULL = (*PAIRED, *KEPT, RECALL, OBJECT, ('action error', action_error))
GOAL_TASKS = [f'libero_goal/{index}' for index in (1, 4, 6, 8)]
SHUFFLED_TASKS = [f'object_shuffled/{index}' for index in range(4)]


def study(name: str, fields: str) -> Row:
    """A variant of SpecPrune in the main evaluation."""
    return Row(name, 'table', f'{FIXED},{fields}' if fields else FIXED)


OURS = study('**SpecPrune, alpha 0.8**', '')
TABLES: dict[str, tuple[tuple[Column, ...], list[Row]]] = {
    'gates': (
        SUCCESS,
        [
            Row('dense', 'table', 'dense'),
            Row('grey images', 'gate_grey', 'dense'),
            Row('trained on grey images', 'gate_trained_grey', 'dense'),
            Row('instruction withheld', 'gate_withheld', 'dense'),
            Row('trained without instruction', 'gate_trained_mute', 'dense'),
            Row('another instruction', 'gate_wrong', 'dense'),
            Row('dense, `libero_goal`', 'goal', 'dense'),
            Row('grey images, `libero_goal`', 'gate_goal_grey', 'dense'),
        ],
    ),
    'main': (
        FULL,
        [
            Row('dense', 'table', 'dense'),
            OURS,
            Row('SpecPrune, budget `union`', 'table', 'specprune:budget=union'),
            Row('random, as many', 'table', 'random:budget=fixed'),
            Row('uniform, as many', 'table', 'uniform:budget=fixed'),
        ],
    ),
    'repeat': (
        PAIRED,
        [
            Row('dense', 'table', 'dense'),
            Row('dense, again', 'repeat', 'dense'),
            Row('SpecPrune', 'table', FIXED),
            Row('SpecPrune, again', 'repeat', FIXED),
        ],
    ),
    'goal': (
        FULL,
        [
            Row('dense', 'goal', 'dense'),
            Row('**SpecPrune, alpha 0.8**', 'goal', FIXED),
            Row('random, as many', 'goal', 'random:budget=fixed'),
        ],
    ),
    'tasks': (
        (('success', success),),
        [
            Row(f'`{task}`, {name}', file, method, task)
            for file, tasks in (('table', SHUFFLED_TASKS), ('goal', GOAL_TASKS))
            for task in tasks
            for name, method in (('dense', 'dense'), ('SpecPrune', FIXED))
        ],
    ),
    'global_reuse': (
        (*PAIRED, RECALL),
        [OURS, study('without global reuse', 'k_global=0,k_local_coarse=14,k_local_fine=18')],
    ),
    'layer_weight': ((*PAIRED, RECALL), [OURS, study('average', 'layer_weight=average')]),
    'thresholds': (
        (*PAIRED, ('fine', share('fine'))),
        [
            study('translation 0.3', 'translation_threshold=0.3'),
            study('translation 0.5, rotation 0.2', ''),
            study('translation 0.7', 'translation_threshold=0.7'),
            study('rotation 0.1', 'rotation_threshold=0.1'),
            study('rotation 0.4', 'rotation_threshold=0.4'),
        ],
    ),
    'alpha': (
        (*PAIRED, *KEPT),
        [
            Row('dense', 'table', 'dense'),
            study('alpha 1.0', 'alpha=1.0'),
            OURS,
            study('alpha 0.6', 'alpha=0.6'),
        ],
    ),
    'techniques': (
        (*PAIRED, *KEPT),
        [
            Row('dense', 'table', 'dense'),
            study('static alone', 'dynamic=false,controller=false'),
            study('static and dynamic', 'controller=false'),
            study('dynamic and controller', 'static=false'),
            study('static and controller', 'dynamic=false'),
            OURS,
        ],
    ),
    'k': (
        (*PAIRED, *KEPT, RECALL),
        [
            study('K_global 5 (20 of 256)', 'k_global=5'),
            study('K_global 8 (30), coarse K_local 6, K_dynamic 5', ''),
            study('K_global 10 (40)', 'k_global=10'),
            study('coarse K_local 3, K_dynamic 4', 'k_local_coarse=3,k_dynamic_coarse=4'),
            study('coarse K_local 9, K_dynamic 8', 'k_local_coarse=9,k_dynamic_coarse=8'),
        ],
    ),
    'readings': (
        FULL,
        [
            OURS,
            study('score direction image to text', 'score_direction=image_to_text'),
            study('stateless controller', 'hysteresis=false'),
        ],
    ),
    'spared': (
        FULL,
        [
            Row(f'spared with {chance}: {name}', file, method)
            for chance, file in (('0', 'spared_0'), ('0.5', 'spared_50'), ('1', 'table'))
            for name, method in (
                ('dense', 'dense'),
                ('SpecPrune', FIXED),
                ('random', 'random:budget=fixed'),
            )
        ],
    ),
    'seeds': (
        FULL,
        [
            Row(f'seed {seed}, step {step}: {name}', file, method)
            for seed, step, file in (
                (0, '5000', 'table'),
                (0, '4500', 'main_seed_0_step_4500'),
                (0, '4000', 'main_seed_0_step_4000'),
                (1, '5000', 'main_seed_1_checkpoint'),
                (2, '5000', 'main_seed_2_checkpoint'),
            )
            for name, method in (
                ('dense', 'dense'),
                ('SpecPrune', FIXED),
                ('random', 'random:budget=fixed'),
            )
        ],
    ),
    'robustness': (
        (*PAIRED, ('action error', action_error)),
        [
            Row(f'{condition}: {name}', f'robust_{condition}', method)
            for condition in ('noise', 'blur', 'dark', 'bright', 'camera', 'pro')
            for name, method in (
                ('dense', 'dense'),
                ('SpecPrune', FIXED),
                ('random', 'random:budget=fixed'),
            )
        ],
    ),
}


def table(name: str, figures: Path) -> str:
    """One table in Markdown.

    Args:
        name: a key of TABLES, or 'ros'.
        figures: folder of the JSON files.

    Raises:
        KeyError: there is no such table.
    """
    if name == 'ros':
        return ros_table(figures)
    columns, rows = TABLES[name]
    lines = [
        '| | ' + ' | '.join(heading for heading, _ in columns) + ' |',
        '|---|' + '---:|' * len(columns),
    ]
    for row in rows:
        cell = find_cell(row, figures)
        shown = [MISSING] + [''] * (len(columns) - 1)
        if cell is not None:
            shown = [text(cell) for _, text in columns]
        lines.append(f'| {row.name} | ' + ' | '.join(shown) + ' |')
    return '\n'.join(lines) + '\n'


def ros_table(figures: Path) -> str:
    """The same episodes through the nodes and without them, task by task.

    Args:
        figures: folder with ros.json.
    """
    lines = [
        '| task | seeds | through ROS | plain loop | solved by one alone |',
        '|---|---|---:|---:|---|',
    ]
    path = figures / ROS
    pairs = json.loads(path.read_text())['episodes'] if path.exists() else []
    for task in sorted({pair['task'] for pair in pairs}):
        some = [pair for pair in pairs if pair['task'] == task]
        solved = [sum(pair[way] for pair in some) for way in ('ros', 'plain')]
        alone = [
            f'seed {pair["seed"]} ({"ROS" if pair["ros"] else "plain"})'
            for pair in some
            if pair['ros'] != pair['plain']
        ]
        seeds = f'{min(pair["seed"] for pair in some)} to {max(pair["seed"] for pair in some)}'
        counts = ' | '.join(f'{count}/{len(some)}' for count in solved)
        lines.append(f'| `{task}` | {seeds} | {counts} | {", ".join(alone)} |')
    if not pairs:
        lines.append(f'| {MISSING} | | | | |')
    return '\n'.join(lines) + '\n'


def ros_pairs(plain: Path, ros: Sequence[Path]) -> list[dict]:
    """Episodes of the demo beside those of `specprune eval`.

    Args:
        plain: its episodes.csv, of one method.
        ros: episodes.json of the demo.

    Returns:
        one entry per episode, by task and seed.

    Raises:
        ValueError: an episode of one has no counterpart in the other.
    """
    with plain.open(newline='') as file:
        rows = {(row['task'], int(row['seed'])): row for row in csv.DictReader(file)}
    episodes = [one for path in ros for one in json.loads(path.read_text())]
    if alone := {(one['task'], one['seed']) for one in episodes} ^ set(rows):
        raise ValueError(f'episodes without a counterpart: {sorted(alone)}')
    pairs = []
    for episode in episodes:
        row = rows[episode['task'], episode['seed']]
        pairs.append(
            {
                'task': episode['task'],
                'seed': episode['seed'],
                'ros': episode['state'] == 'success',
                'plain': bool(int(row['success'])),
                'ros_steps': episode['step'],
                'plain_steps': int(row['steps']),
            }
        )
    return sorted(pairs, key=lambda pair: (pair['task'], pair['seed']))


def find_cell(row: Row, figures: Path) -> Cell | None:
    """The figures of a row; None where there are none."""
    path = figures / f'{row.file}.json'
    if not path.exists():
        return None
    for cell in json.loads(path.read_text())['cells']:
        if (cell['method'], cell['task']) == (row.method, row.task):
            return cell
    return None


def weights() -> str:
    """Digest of the network that the document is about: the one that ships."""
    return digest_of(find_checkpoint(PREFIX + EMBEDDED))


def check_weights(figures: Path, wanted: str) -> None:
    """Nothing, when all evaluations of the main network are of these weights.

    Args:
        figures: folder of the JSON files.
        wanted: digest of the network.

    Raises:
        ValueError: one is of others.
    """
    for path in sorted(figures.glob('*.json')):
        got = json.loads(path.read_text())['plan']['weights']
        if not path.stem.startswith(OTHER_NETWORKS) and got != wanted:
            raise ValueError(f'{path} is of the weights {got}, the document is of {wanted}')


def filled(text: str, figures: Path) -> str:
    """A document with its tables brought up to date."""
    return BLOCK.sub(lambda found: found[1] + table(found[2], figures) + found[3], text)


def main() -> int:
    """Rewrite the document, or pair episodes, or tell the weights.

    Raises:
        ValueError: figures that do not belong together.
    """
    if sys.argv[1:2] == ['--ros']:
        plain, *ros = map(Path, sys.argv[2:])
        content = {'plan': {'weights': weights()}, 'episodes': ros_pairs(plain, ros)}
        (FIGURES / ROS).write_text(json.dumps(content, indent=1) + '\n')
        return 0
    if sys.argv[1:2] == ['--weights']:
        print(digest_of(Path(sys.argv[2])) if sys.argv[2:] else weights())
        return 0
    check_weights(FIGURES, weights())
    DOCUMENT.write_text(filled(DOCUMENT.read_text(), FIGURES))
    return 0


if __name__ == '__main__':
    sys.exit(main())
