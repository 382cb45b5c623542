"""Compare the rows of `specprune bench --json` with what a GPU has to show; see performance.md."""

from __future__ import annotations

import json
import sys
from pathlib import Path

ABSOLUTE_MS = 15.0
BF16_TOLERANCE = 0.03  # of normalised actions


def targets(rows: list[dict]) -> list[tuple[str, float | None, str, float]]:
    """(figure, measured or None, 'at least' or 'at most', bound)."""
    total = {(row['method'], row['form']): row for row in rows if row['stage'] == 'total'}
    graph = next((r for (m, f), r in total.items() if m != 'none' and 'graph' in f), {})

    def times_faster(form: str) -> float | None:
        dense = total.get(('none', form))
        return dense['median_ms'] / graph['median_ms'] if dense and graph else None

    return [
        ('end to end, dense eager / pruned graph', times_faster('eager'), 'at least', 2.2),
        ('end to end, dense graph / pruned graph', times_faster('graph'), 'at least', 1.6),
        ('end to end, pruned graph / floor', graph.get('time_to_floor'), 'at most', 1.8),
        ('end to end, pruned graph, ms', graph.get('median_ms'), 'at most', ABSOLUTE_MS),
        ('actions, graph - eager', graph.get('action_error_max'), 'at most', BF16_TOLERANCE),
    ]


def main() -> int:
    """Print all figures; 1 when one is missed or missing."""
    text = Path(sys.argv[1]).read_text()
    if not text:
        print('no rows: the measurement did not come to its end')
        return 1
    met = []
    for figure, value, relation, bound in targets(json.loads(text)):
        good = value is not None and (value >= bound if relation == 'at least' else value <= bound)
        shown = 'not measured' if value is None else f'{value:.3f}'
        print(f'{"met   " if good else "MISSED"} {figure}: {shown} ({relation} {bound:g})')
        met.append(good)
    return 0 if all(met) else 1


if __name__ == '__main__':
    raise SystemExit(main())
