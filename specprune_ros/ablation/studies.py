"""What each study varies, and what the paper found: data only.

A variant is a name and the fields of PruneConfig that it sets over the user's configuration.
Sources: SpecPrune-VLA v3 (arXiv 2509.05614), sections 7.2 to 7.5, A.1.3, A.3 and A.6.2.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from specprune_ros.config import PruneConfig
from specprune_ros.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Published:
    """What the paper prints for a variant, measured on LIBERO in closed loop; None if nothing.

    Attributes:
        success: success rate, share of episodes.
        speedup: end to end, times.
        latency_ms: end to end, on an A800.
        flops: share of the dense model's.
        retention: share of the visual tokens left after static pruning (Table 8).
        recall: of important tokens (Tables 3 and 4).
    """

    success: float | None = None
    speedup: float | None = None
    latency_ms: float | None = None
    flops: float | None = None
    retention: float | None = None
    recall: float | None = None

    def text(self) -> str:
        """All that is known, in words."""
        shares = {
            'SR': self.success,
            'FLOPs': self.flops,
            'tokens': self.retention,
            'recall': self.recall,
        }
        parts = [f'{name} {100 * x:.1f} %' for name, x in shares.items() if x is not None]
        if self.speedup is not None:
            parts.append(f'{self.speedup:.2f}x')
        if self.latency_ms is not None:
            parts.append(f'{self.latency_ms:.1f} ms')
        return ', '.join(parts)


@dataclass(frozen=True)
class Variant:
    """One row of a study: its name, fields of PruneConfig, and the paper's figures."""

    name: str
    overrides: Mapping[str, object]
    paper: Published = field(default_factory=Published)

    def configured(self, base: PruneConfig) -> PruneConfig:
        """The base with this variant's fields.

        Raises:
            ConfigError: the fields do not fit the base.
        """
        return dataclasses.replace(base, **self.overrides)


@dataclass(frozen=True)
class Study:
    """One table.

    Attributes:
        name: what `--study` takes.
        title: what is varied.
        source: where the paper has it; empty for a study of our own.
        variants: the rows.
        note: what a reader must know to compare with the paper.
    """

    name: str
    title: str
    source: str
    variants: tuple[Variant, ...]
    note: str = ''


DENSE = {'method': 'none'}

_ALL = (
    Study(
        'techniques',
        'the three techniques, one after another',
        'Fig. 8 and 7.5.1, LIBERO-Spatial',
        (
            Variant('dense', DENSE, Published(success=0.976, latency_ms=109.0, speedup=1.0)),
            Variant('static', {'static': True, 'dynamic': False, 'controller': False}),
            Variant(
                'static + dynamic',
                {'static': True, 'dynamic': True, 'controller': False},
                Published(success=0.968, latency_ms=70.8),
            ),
            Variant(
                '+ controller',
                {'static': True, 'dynamic': True, 'controller': True},
                Published(success=0.974, latency_ms=72.3, speedup=1.51),
            ),
        ),
        'The text of the paper gives no figure for static pruning alone.',
    ),
    Study(
        'global_reuse',
        'attention of the last query, reused or not',
        'Table 3, mean of four LIBERO suites',
        (
            Variant(
                'with V_global',
                {'k_global': 30, 'k_local_coarse': 24, 'k_local_fine': 40},
                Published(success=0.961, recall=0.92),
            ),
            Variant(
                'without',
                {'k_global': 0, 'k_local_coarse': 54, 'k_local_fine': 70},
                Published(success=0.934, recall=0.84),
            ),
        ),
        'The paper names K_local 54, which is 24 + 30; of fine mode it says nothing, and we take '
        '40 + 30.',
    ),
    Study(
        'layer_weight',
        'confidence of a layer in the scores of dynamic pruning',
        'Table 4, mean of four LIBERO suites',
        (
            Variant('entropy', {'layer_weight': 'entropy'}, Published(success=0.961, recall=0.88)),
            Variant('average', {'layer_weight': 'average'}, Published(success=0.920, recall=0.66)),
        ),
    ),
    Study(
        'thresholds',
        'speeds below which motion is fine',
        'Table 7, LIBERO-Spatial',
        tuple(
            Variant(
                f'{varied} {speeds[varied]:g}',
                {
                    'translation_threshold': speeds['v_t'],
                    'rotation_threshold': speeds['v_r'],
                },
                Published(success=success),
            )
            for varied, speeds, success in (
                ('v_t', {'v_t': 0.3, 'v_r': 0.2}, 0.968),
                ('v_t', {'v_t': 0.5, 'v_r': 0.2}, 0.974),
                ('v_t', {'v_t': 0.7, 'v_r': 0.2}, 0.976),
                ('v_r', {'v_t': 0.5, 'v_r': 0.1}, 0.968),
                ('v_r', {'v_t': 0.5, 'v_r': 0.2}, 0.974),
                ('v_r', {'v_t': 0.5, 'v_r': 0.4}, 0.974),
            )
        ),
        'v_r is 0.2 while v_t varies, v_t is 0.5 while v_r varies.',
    ),
    Study(
        'alpha',
        'prune ratio',
        'Tables 1, 8 and 11, mean of four LIBERO suites',
        (
            Variant('dense', DENSE, Published(success=0.966, speedup=1.0, flops=1.0)),
            Variant(
                'alpha 1.0', {'alpha': 1.0}, Published(success=0.965, speedup=1.4, retention=0.344)
            ),
            Variant(
                'alpha 0.8',
                {'alpha': 0.8},
                Published(success=0.961, speedup=1.46, flops=0.43, retention=0.298),
            ),
            Variant(
                'alpha 0.6',
                {'alpha': 0.6},
                Published(success=0.947, speedup=1.51, retention=0.254),
            ),
        ),
        'The FLOPs of Table 1 are of the whole model, ours and those of A.3 (37 % at 0.8) of the '
        'decoder.',
    ),
    Study(
        'k_global',
        'K_global',
        'Fig. 7 and 7.2',
        tuple(Variant(f'K_global {k}', {'k_global': k}) for k in (20, 30, 40)),
        'The text of the paper says only that recall (Eq. 1) is highest at 30.',
    ),
    Study(
        'k_local_dynamic',
        'K_local and K_dynamic',
        'Fig. 7 and 7.2',
        tuple(
            Variant(
                f'K {local}, {dynamic}',
                {
                    'k_local_coarse': local,
                    'k_dynamic_coarse': dynamic,
                    'k_local_fine': fine_local,
                    'k_dynamic_fine': fine_dynamic,
                },
            )
            for local, dynamic, fine_local, fine_dynamic in (
                (12, 15, 20, 8),
                (24, 20, 40, 10),
                (36, 30, 60, 15),
            )
        ),
        'The text of the paper says only that the recall of the supplemented set is highest at '
        '(24, 20). The pairs are of coarse mode; the paper is silent on fine mode, whose pair we '
        'scale alike.',
    ),
    Study(
        'score_direction',
        'whose attention scores a patch',
        '',
        tuple(
            Variant(name, {'score_direction': name}) for name in ('text_to_image', 'image_to_text')
        ),
        "Kept recall measures by the configured direction's important tokens, which favours it; "
        'the action error favours neither.',
    ),
    Study(
        'global_fusion',
        'how the scores of two layers become one V_global',
        '',
        tuple(Variant(name, {'global_fusion': name}) for name in ('union', 'mean')),
        'Kept recall measures by the V_global of the configured fusion.',
    ),
    Study(
        'budget',
        'size of the retained set',
        '',
        tuple(Variant(name, {'budget': name}) for name in ('union', 'fixed')),
        'union follows the data, as the paper; fixed is an exact count.',
    ),
    Study(
        'hysteresis',
        'how fine mode ends',
        '',
        (
            Variant('above a threshold (6.2)', {'hysteresis': True}),
            Variant('anew every step (Alg. 1)', {'hysteresis': False}),
        ),
    ),
)
STUDIES = {study.name: study for study in _ALL}


def select(names: Iterable[str]) -> tuple[Study, ...]:
    """The named studies, each once; all for no name.

    Raises:
        ConfigError: there is no such study.
    """
    wanted = list(dict.fromkeys(names)) or list(STUDIES)
    for name in wanted:
        if name not in STUDIES:
            raise ConfigError('--study', name, f'must be one of {", ".join(STUDIES)}')
    return tuple(STUDIES[name] for name in wanted)
