"""One HTML page that shows what pruning did to a recording, and why.

The page is one file: pictures, data, style and script are inside, and its content security policy
lets it load nothing. `explain.html` draws it from JSON; all words about patches and modes are made
here. What comes from a recording or a configuration enters the page as that JSON alone.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np

from specprune_ros.config import AXES, PolicyConfig, PruneConfig
from specprune_ros.images import as_rgb, turned
from specprune_ros.overlay import COLORS, DIMMED, LAYER_DIMMED, UNSEEN
from specprune_ros.runlog import CAMERA_COLORS, MODE_COLORS, STAND_IN_NOTE, report_line
from specprune_ros.types import Mode, Observation, PruneReport, Reason

TEMPLATE = Path(__file__).with_name('explain.html')
PICTURE_WIDTH = 480  # pixels at most; a page shows three side by side
JPEG_QUALITY = 80
REASON_WORDS = {
    Reason.GLOBAL: 'important to the last query (global)',
    Reason.DYNAMIC: 'changed against an earlier frame (dynamic)',
    Reason.LOCAL: 'important to the first two layers (local)',
    Reason.FILL: 'next best, to fill the budget (fill)',
}
# From dropped early to kept; ordered in brightness too, so that colour vision is not needed.
LAYER_COLORS = ('#482878', '#31688e', '#1f9e89', '#6ece58', '#fde725')


@dataclass(frozen=True, kw_only=True)
class About:
    """What a page says of the run as a whole.

    Attributes:
        config: of the policy; its thresholds are drawn, and what differs from the default listed.
        model: the model, in words.
        recording: name of what was replayed.
        environment: hardware and versions, name -> value.
    """

    config: PolicyConfig
    model: str = ''
    recording: str = ''
    environment: Mapping[str, str] = field(default_factory=dict)


def explain(
    reports: Iterable[PruneReport], observations: Iterable[Observation], about: About
) -> str:
    """The page of a whole run.

    Args:
        reports: of consecutive queries of one policy.
        observations: that these queries read, in the same order.
        about: what made them.

    Returns:
        HTML, complete in itself.

    Raises:
        ValueError: no query, or not as many observations as reports.
        ObservationError: an image does not decode.
    """
    explanation = Explanation(about)
    for report, observation in zip(reports, observations, strict=True):
        explanation.add(report, observation)
    return explanation.html()


class Explanation:
    """Collects queries; keeps of their images only the small pictures that the page shows."""

    def __init__(self, about: About):
        self._about = about
        self._reports: list[PruneReport] = []
        self._queries: list[dict[str, object]] = []

    def __len__(self) -> int:
        return len(self._queries)

    def add(self, report: PruneReport, observation: Observation) -> None:
        """One more query.

        Raises:
            ObservationError: an image does not decode.
        """
        angles = dict(zip(report.cameras, report.rotation_deg, strict=False))
        pictures = [
            _base64(jpeg(as_rgb(observation.images[name]), int(angles.get(name, 0))))
            for name in report.cameras
        ]
        self._reports.append(report)
        self._queries.append(
            {
                **json.loads(report_line(report)),
                'instruction': observation.instruction,
                'time_s': (report.stamp_ns - self._reports[0].stamp_ns) / 1e9,
                'why': mode_words(report, self._about.config.pruning),
                'words': dict(_fates(report)),
                'masks': {
                    name: _base64(getattr(report, name).astype(np.uint8).tobytes())
                    for name in ('reason', 'pruned_after_layer', 'important')
                },
                'pictures': pictures,
            }
        )

    def html(self, skipped: str = '') -> str:
        """The page.

        Args:
            skipped: which queries were left out, and why; empty when none was.

        Raises:
            ValueError: there is no query.
        """
        if not self._queries:
            raise ValueError('no query to explain')
        config, first = self._about.config, self._reports[0]
        data = {
            'recording': self._about.recording,
            'model': self._about.model,
            'method': first.method,
            'skipped': skipped,
            'stand_in': STAND_IN_NOTE if first.stand_in else '',
            'environment': dict(self._about.environment),
            'settings': changed_settings(config),
            'sentences': method_sentences(self._reports, config.pruning),
            'limits': {
                'translation': config.pruning.translation_threshold,
                'rotation': config.pruning.rotation_threshold,
                'guard': config.pruning.guard_disagreement,
            },
            'style': _style(config.runtime.overlay_opacity),
            'queries': self._queries,
        }
        return _filled(TEMPLATE.read_text(encoding='utf-8'), data)


def jpeg(image: np.ndarray, rotation_deg: int) -> bytes:
    """A small picture of what a camera saw.

    Args:
        image: [rows, cols, 3] uint8 RGB, as the camera gave it.
        rotation_deg: 0 or 180, by how much the model's image is turned.

    Returns:
        JPEG, turned, at most PICTURE_WIDTH wide.
    """
    rows, cols = image.shape[:2]
    if cols > PICTURE_WIDTH:
        size = (PICTURE_WIDTH, max(round(rows * PICTURE_WIDTH / cols), 1))
        image = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    bgr = np.ascontiguousarray(turned(image, rotation_deg)[..., ::-1])
    return cv2.imencode('.jpg', bgr, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])[1].tobytes()


def patch_words(report: PruneReport, reason: int, gone: int) -> str:
    """What became of a patch and why, in words.

    Args:
        report: of its query.
        reason: the patch's Reason bits.
        gone: 1-based layer after which it went, 0 when it stayed.
    """
    wanted = ', '.join(words for bit, words in REASON_WORDS.items() if reason & bit)
    if report.mode == Mode.FALLBACK:
        return 'kept: the query ran dense, as a fallback'
    if report.mode == Mode.DENSE:
        return f'kept: {report.mode_reason or "nothing was pruned"}'
    if gone == 0:
        return f'kept to the end: {wanted or "nothing dropped it"}'
    if gone <= report.static_layer:
        why = f'{wanted}, but beyond the fixed budget' if wanted else 'no set wanted it'
        return f'dropped after layer {gone}: {why}'
    before, after = _tokens_around(report, gone)
    share = 100 * (before - after) / before
    lowest = f'among the {share:.0f} % lowest scores ({before - after} of {before})'
    first = f'; kept until then: {wanted}' if wanted else ''
    return f'dropped after layer {gone}: {lowest}{first}'


def _tokens_around(report: PruneReport, layer: int) -> tuple[int, int]:
    """Visual tokens before and after a layer dropped some."""
    index = report.layer_index.tolist().index(layer)
    counts = [int(report.tokens_total.sum()), *report.layer_tokens.tolist()]
    return counts[index], counts[index + 1]


def _fates(report: PruneReport) -> Iterator[tuple[str, str]]:
    """'reason:layer' -> words, for all that occur in a report."""
    pairs = np.stack((report.reason, report.pruned_after_layer), axis=1)
    for reason, gone in np.unique(pairs, axis=0).tolist():
        yield f'{reason}:{gone}', patch_words(report, reason, gone)


def mode_words(report: PruneReport, pruning: PruneConfig) -> str:
    """Why a query ran in its mode.

    Source: SpecPrune-VLA v3, section 6.2 and Alg. 1.
    """
    if report.mode == Mode.FALLBACK:
        return f'Computed dense: {report.fallback_reason}.'
    if report.mode == Mode.DENSE:
        return f'Dense: {report.mode_reason}.'
    if not pruning.controller:
        return 'The controller is off: every query prunes as in coarse motion.'
    if not np.isfinite(report.translation_speed):
        return f'{report.mode_reason[:1].upper()}{report.mode_reason[1:]}.'
    raised = f' The guard raised alpha from {pruning.alpha:g} to {report.alpha:g}.'
    return _motion_words(report, pruning) + raised * (report.alpha > pruning.alpha)


def _motion_words(report: PruneReport, pruning: PruneConfig) -> str:
    v_t, v_r, dz = report.translation_speed, report.rotation_speed, report.vertical_displacement
    over = []
    if v_t > pruning.translation_threshold:
        over.append(f'translates fast ({v_t:.2f} > {pruning.translation_threshold:g})')
    if v_r > pruning.rotation_threshold:
        over.append(f'rotates fast ({v_r:.2f} > {pruning.rotation_threshold:g})')
    if report.mode == Mode.COARSE:
        slow = f'is slow but rises ({dz:+.2f})' if dz > 0.0 else 'is not below both thresholds'
        return f'The arm {" and ".join(over) or slow}: prune hard.'
    if dz > 0.0:
        return f'The arm rises ({dz:+.2f}) but is still slow: fine mode lasts, prune gently.'
    return 'The arm is slow and does not rise: prune gently.'


def method_sentences(reports: list[PruneReport], pruning: PruneConfig) -> list[str]:
    """How to read the page, for somebody who does not know the method.

    Source: SpecPrune-VLA v3, sections 4 to 6.
    """
    method = reports[0].method
    if method != 'specprune':
        nothing = ': every patch passes every layer' if method == 'none' else ''
        return [f'This run used the method {method}{nothing}.']
    layers = sorted({n for r in reports for n in r.layer_index.tolist() if n > r.static_layer})
    deeper = f'deeper layers (here {_listed(layers)})' if layers else 'deeper layers'
    static = max(report.static_layer for report in reports) or 2
    off = ' This is off here.'
    return [
        'The model sees every camera picture as a grid of patches; each costs time in every layer '
        'of its decoder, so patches that do not matter are dropped on the way.',
        f'After layer {static} only those stay that mattered to the last query (global), that '
        'changed since an earlier frame (dynamic), or to which the instruction attends now '
        '(local); under a fixed budget the next best fill up (fill).' + off * (not pruning.static),
        f'After some {deeper} the {100 * (1 - pruning.layer_keep_ratio):.0f} % with the lowest '
        'scores go; a score adds up how much the instruction attends to a patch, and layers whose '
        'attention is sharp count for more (confidence).' + off * (not pruning.dynamic),
        'While the arm travels, few patches stay (coarse mode); while it is slow and does not '
        'rise, more stay (fine mode); a query that has nothing to go by, or fails, keeps all '
        '(dense, fallback).',
        'Recall is the share of the patches that matter in this query which the last query had '
        'named: while it is high, what mattered before may be trusted.',
    ]


def _listed(numbers: list[int]) -> str:
    *most, last = map(str, numbers)
    return f'{", ".join(most)} and {last}' if most else last


def changed_settings(config: PolicyConfig) -> list[dict[str, str]]:
    """What differs from the default: name, value, default, unit, meaning."""
    default, rows = PolicyConfig(), []
    for axis in AXES:
        mine, theirs = getattr(config, axis), getattr(default, axis)
        for spec in dataclasses.fields(mine):
            value, usual = getattr(mine, spec.name), getattr(theirs, spec.name)
            if value != usual:
                rows.append(
                    {
                        'name': f'{axis}.{spec.name}',
                        'value': _shown(value),
                        'default': _shown(usual),
                        'unit': spec.metadata['unit'],
                        'meaning': spec.metadata['doc'],
                    }
                )
    return rows


def _shown(value: object) -> str:
    if isinstance(value, tuple):
        return ', '.join(map(str, value)) or 'none'
    return str(value).lower() if isinstance(value, bool) else str(value) or 'none'


def _style(opacity: float) -> dict[str, object]:
    """The overlay's colours and brightnesses, and those of the plots."""
    return {
        'reasons': {name: '#{:02x}{:02x}{:02x}'.format(*rgb) for name, rgb in COLORS.items()},
        'bits': {bit.name.lower(): int(bit) for bit in Reason},
        'modes': [{'name': mode.name.lower(), 'color': MODE_COLORS[mode]} for mode in Mode],
        'cameras': ['var(--ink)', *CAMERA_COLORS[1:]],  # black is not seen in the dark scheme
        'layers': LAYER_COLORS,
        'opacity': opacity,
        'static': DIMMED,
        'layer': LAYER_DIMMED,
        'unseen': UNSEEN,
    }


def _filled(template: str, data: dict[str, object]) -> str:
    """The template with its security policy and its data.

    No character of the data can end the script element that holds it.
    """
    text = json.dumps(data, allow_nan=False, separators=(',', ':'))
    for character in '<>&':
        text = text.replace(character, f'\\u{ord(character):04x}')
    policy = (
        f"default-src 'none'; img-src data:; style-src {_hash(template, 'style')}; "
        f'script-src {_hash(template, "script")}'
    )
    return template.replace('@@POLICY@@', policy).replace('@@DATA@@', text)


def _hash(template: str, tag: str) -> str:
    """The source expression that allows the template's own inline element, and no other."""
    body = re.search(f'<{tag}>(.*?)</{tag}>', template, re.DOTALL).group(1)
    return f"'sha256-{_base64(hashlib.sha256(body.encode()).digest())}'"


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode('ascii')
