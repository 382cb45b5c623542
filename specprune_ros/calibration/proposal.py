"""All that a recording says about the pruning parameters, and what to set them to."""

from __future__ import annotations

import dataclasses
import json
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np
import yaml

from specprune_ros.calibration.budget import KSearch
from specprune_ros.calibration.folds import Gain
from specprune_ros.calibration.layers import LayerSearch
from specprune_ros.calibration.noise import CameraNoise, proposed_tau
from specprune_ros.calibration.thresholds import SpeedValley
from specprune_ros.config import PruneConfig
from specprune_ros.outputs import plain

HIGH, MEDIUM, LOW = 'high', 'medium', 'low'
MEANINGLESS = 'meaningless'
NOTHING = '-'
INDENT = 6 * ' '
STAND_IN = 'the attention of a stand-in model means nothing'
# half-width of an interval, as a share of the value, up to which a confidence reaches
WIDTHS = ((0.1, HIGH), (0.25, MEDIUM))
RESAMPLES_AGREE = 0.9  # share of the resamples that must have a valley at all


@dataclass(frozen=True, kw_only=True)
class Proposal:
    """One parameter.

    Attributes:
        parameter: field of PruneConfig.
        now: configured value.
        proposed: better value; None keeps the configured one.
        confidence: high, medium, low, 'meaningless' (a stand-in's), or '-'.
        evidence: where the value comes from, one line.
        usable: False for what a stand-in's attention gave: shown, never written.
    """

    parameter: str
    now: object
    proposed: object | None
    confidence: str
    evidence: str
    usable: bool = True

    @property
    def written(self) -> bool:
        """Whether the parameter file sets it."""
        return self.usable and self.proposed is not None


def threshold_proposal(parameter: str, now: float, valley: SpeedValley) -> Proposal:
    """The valley of the executed speeds as a threshold (section 6.2)."""
    if not valley.bimodal:
        return Proposal(
            parameter=parameter, now=now, proposed=None, confidence=NOTHING,
            evidence=f'{valley.why_not}{_below(valley.speeds, now)}; kept',
        )  # fmt: skip
    low, high = valley.interval
    sure = valley.found_share >= RESAMPLES_AGREE
    slow, fast = valley.peaks
    return Proposal(
        parameter=parameter,
        now=now,
        proposed=_rounded(valley.valley),
        confidence=_grade(valley.valley, valley.interval) if sure else LOW,
        evidence=f'valley of {len(valley.speeds)} executed speeds, 95 % {low:.3g}..{high:.3g}; '
        f'modes {slow:.3g} and {fast:.3g}, dip p {valley.p_value:.3f}, '
        f'{100 * valley.slow_share:.0f} % slower',
    )


def tau_proposal(now: float, cameras: Mapping[str, CameraNoise], rate: float) -> Proposal:
    """tau from the noise of still patches (section 4.1.2)."""
    tau, lowest = proposed_tau(cameras)
    each = '; '.join(f'{name}: {_noise_words(noise)}' for name, noise in cameras.items())
    if not lowest:
        rates = [n.false_change_rate(now) for n in cameras.values() if len(n.static)]
        false = f'; now {100 * max(rates):.2g} % false changes at most' if rates else ''
        return Proposal(
            parameter='similarity_threshold', now=now, proposed=None, confidence=NOTHING,
            evidence=f'{each}{false}; kept',
        )  # fmt: skip
    noise = cameras[lowest]
    gaps = tuple(1.0 - end for end in noise.interval)
    before, after = (100 * noise.false_change_rate(value) for value in (now, tau))
    return Proposal(
        parameter='similarity_threshold',
        now=now,
        proposed=tau,
        confidence=_grade(1.0 - noise.threshold, gaps),
        evidence=f'lowest camera {lowest}: {after:.2g} % of its still patches count as changed '
        f'(wanted {100 * rate:g} %), now {before:.2g} %; {each}',
    )


def layer_proposal(now: tuple[int, ...], search: LayerSearch | None, stand_in: bool) -> Proposal:
    """The pair of layers that foresees most (sections 3.1, 4.1.1)."""
    fields = {'parameter': 'global_layers', 'now': now, 'usable': not stand_in}
    if search is None:
        return Proposal(
            **fields, proposed=None, confidence=NOTHING, evidence='too few queries or layers; kept'
        )
    best, gain = search.best, search.gain
    evidence = (
        f'foresees {100 * search.recall[best]:.1f} % of the next important patches, now '
        f'{100 * search.configured_recall:.1f} %, of {len(search.pairs)} pairs; held out '
        f'{100 * gain.held_out:+.1f} points over {gain.queries} queries'
    )
    better = gain.worth_it or stand_in
    return Proposal(
        **fields,
        proposed=search.names[best] if better else None,
        confidence=MEANINGLESS if stand_in else _gain_grade(gain),
        evidence=evidence if better else f'{evidence}; kept',
    )


def k_proposals(
    config: PruneConfig, search: KSearch | None, stand_in: bool, asked: bool
) -> list[Proposal]:
    """K_global, K_local and K_dynamic of both modes (section 7.2).

    Args:
        config: the configured values.
        search: the grid, or None without consecutive queries.
        stand_in: whether the scores mean nothing.
        asked: whether the user set the budget: then the best point is proposed in any case.
    """
    names = ('k_global', 'k_local_coarse', 'k_dynamic_coarse', 'k_local_fine', 'k_dynamic_fine')
    values, confidence, why = {}, NOTHING, 'too few queries; kept'
    if search is not None:
        why = 'no point of the grid fits the budget; kept'
    if search is not None and search.gain is not None:
        gain = search.gain
        why = (
            f'recall {100 * gain.in_sample:+.1f} points at no more tokens, held out '
            f'{100 * gain.held_out:+.1f} over {gain.queries} queries; keeps '
            + ', '.join(f'{100 * search.kept[m]:.1f} % {m}' for m in search.kept)
        )
        # What tau and the layers to come would add must not break the budget.
        better = gain.worth_it or stand_in or asked or not search.now_fits
        values = search.values if better else {}
        why = why if better else f'{why}; kept'
        confidence = MEANINGLESS if stand_in else _gain_grade(gain)
        if search.unseen:
            why += f'; {search.unseen[0]} motion was not recorded'
    return [
        Proposal(
            parameter=name,
            now=getattr(config, name),
            proposed=values.get(name),
            confidence=confidence,
            evidence=why,
            usable=not stand_in,
        )
        for name in names
    ]


def with_proposals(config: PruneConfig, proposals: list[Proposal]) -> PruneConfig:
    """The configuration with all that is proposed and means something."""
    changes = {each.parameter: each.proposed for each in proposals if each.written}
    return dataclasses.replace(config, **changes)


def write_parameters(
    path: Path, config: PruneConfig, proposals: list[Proposal], source: str
) -> None:
    """A ROS parameter file that takes the place of config/pruning/specprune.yaml.

    Args:
        path: the file.
        config: what is configured now; values that are not the defaults go along.
        proposals: what to set; the others are named in comments.
        source: recording and model, for the first line.
    """
    lines = _comment(f'Proposed by `specprune calibrate`: {source}', indent='')
    lines += ['/**:', '  ros__parameters:', '    pruning:', '      method: specprune']
    for evidence, group in groupby(proposals, key=lambda each: each.evidence):
        each = list(group)
        names = ', '.join(one.parameter for one in each)
        told = f'{names}: {evidence} (confidence: {each[0].confidence})'
        lines += _comment(told if each[0].usable else f'{told}; not set', INDENT)
        lines += [_line(one.parameter, one.proposed) for one in each if one.written]
    written = {'method', *(each.parameter for each in proposals if each.written)}
    others = [
        _line(spec.name, getattr(config, spec.name))
        for spec in dataclasses.fields(PruneConfig)
        if spec.name not in written and getattr(config, spec.name) != spec.default
    ]
    lines += [*_comment('As configured.', INDENT), *others] if others else []
    path.write_text('\n'.join(lines) + '\n')


def write_figures(path: Path, figures: Mapping[str, object]) -> None:
    """Figures as JSON; what is not finite is null."""
    path.write_text(json.dumps(plain(figures), indent=1, allow_nan=False) + '\n')


def _comment(text: str, indent: str) -> list[str]:
    return textwrap.wrap(
        text, 99, initial_indent=f'{indent}# ', subsequent_indent=f'{indent}# ',
        break_long_words=False, break_on_hyphens=False,
    )  # fmt: skip


def _line(name: str, value: object) -> str:
    """One parameter in YAML; `['']` is how a ROS parameter file writes an empty list."""
    value = (list(value) or ['']) if isinstance(value, tuple) else value
    text = yaml.safe_dump(value, default_flow_style=True).removesuffix('...\n').strip()
    return f'{INDENT}{name}: {text}'


def _below(speeds: np.ndarray, threshold: float) -> str:
    if not len(speeds):
        return ''
    return f'; {100 * (speeds < threshold).mean():.0f} % of the moving steps are slower than now'


def _noise_words(noise: CameraNoise) -> str:
    if noise.why_not:
        return noise.why_not
    still = f'{noise.static_patches} of {noise.patches} patches still'
    return f'tau {noise.threshold:.5g}, noise {noise.sigma:.2g} levels, {still}'


def _rounded(value: float) -> float:
    return float(f'{value:.3g}')


def _grade(value: float, interval: tuple[float, float]) -> str:
    half = max(abs(end - value) for end in interval) / value
    return next((grade for width, grade in WIDTHS if half <= width), LOW)


def _gain_grade(gain: Gain) -> str:
    if not gain.worth_it:
        return LOW
    return HIGH if gain.interval[0] > 0.0 else MEDIUM
