"""One recording from end to end: speeds, pictures, scores, and what follows from them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from specprune_ros.calibration.budget import KSearch, search_budget
from specprune_ros.calibration.evidence import plot_grid, plot_layers, plot_noise, plot_speeds
from specprune_ros.calibration.layers import LayerSearch, search_layers
from specprune_ros.calibration.noise import CameraNoise, camera_noise
from specprune_ros.calibration.proposal import (
    STAND_IN,
    Proposal,
    k_proposals,
    layer_proposal,
    tau_proposal,
    threshold_proposal,
    with_proposals,
    write_figures,
    write_parameters,
)
from specprune_ros.calibration.scan import (
    FrameChanges,
    RecordingScan,
    ScoreRecorder,
    scan_recording,
)
from specprune_ros.calibration.thresholds import SpeedValley, executed_motion, find_valley
from specprune_ros.config import PolicyConfig, PruneConfig
from specprune_ros.errors import SpecPruneError
from specprune_ros.loading import load_policy
from specprune_ros.models.base import ModelInfo
from specprune_ros.offline import fit_robot, skipped_words
from specprune_ros.recordings.base import Recording

SPEEDS = {'translation_threshold': 'translation_speed', 'rotation_threshold': 'rotation_speed'}
Watch = Callable[[Iterator[SpecPruneError | None]], object]
QUANTILES = (0.01, 0.1, 0.5, 0.9, 0.99)


@dataclass(frozen=True, eq=False, kw_only=True)
class Study:
    """Everything that one recording said.

    Attributes:
        source: recording and model, in words.
        config: the configured pruning.
        stand_in: whether the model's attention means nothing.
        rate: wanted false-change rate.
        valleys: parameter -> the speeds' valley.
        unusable_actions: executed actions that do not say what moved.
        cameras: camera -> its noise.
        layers, ks: the searches, None without consecutive queries.
        proposals: what follows.
        notes: what a user should know before trusting it.
    """

    source: str
    config: PruneConfig
    stand_in: bool
    rate: float
    valleys: dict[str, SpeedValley]
    unusable_actions: int
    cameras: dict[str, CameraNoise]
    layers: LayerSearch | None
    ks: KSearch | None
    proposals: list[Proposal]
    notes: list[str]


def calibrate(
    config: PolicyConfig,
    recording: Recording,
    *,
    every: int = 0,
    rate: float = 0.01,
    budget: float | None = None,
    watch: Watch = list,
) -> Study:
    """Study a recording.

    Args:
        config: robot, model and pruning; cameras and joints are fitted to the recording.
        recording: of the user's robot.
        every: control steps between queries; 0 takes the horizon.
        rate: share of still patches that may count as changed.
        budget: share of the patches to keep on average; None for what is kept now.
        watch: takes what happens per control step, e.g. to show progress; must exhaust it.

    Raises:
        RecordingError: no query was possible.
        ConfigError, CheckpointError, MissingDependencyError: see models.load.
    """
    config = fit_robot(config, recording)
    configured = dataclasses.replace(config.pruning, method='specprune')
    motions, unusable = executed_motion(recording.events(), config.robot)
    valleys = {
        name: find_valley(np.array([getattr(motion, speed) for motion in motions]))
        for name, speed in SPEEDS.items()
    }
    proposals = [
        threshold_proposal(name, getattr(configured, name), valleys[name]) for name in SPEEDS
    ]
    # The modes in which queries are judged are those of the thresholds to come.
    pruning = with_proposals(configured, proposals)
    skipped: list[SpecPruneError] = []
    scan, recorder, model = _scanned(
        dataclasses.replace(config, pruning=pruning),
        recording,
        every,
        lambda outcomes: watch(_noting(outcomes, skipped)),
    )
    cameras = {name: _noise(each, rate) for name, each in scan.changes.items()}
    proposals.append(tau_proposal(configured.similarity_threshold, cameras, rate))
    layers = search_layers(recorder.records, pruning)
    proposals.append(layer_proposal(configured.global_layers, layers, model.stand_in))
    pruning = with_proposals(configured, proposals)
    ks = search_budget(recorder.records, pruning, now=configured, share=budget)
    proposals += k_proposals(configured, ks, model.stand_in, asked=budget is not None)
    return Study(
        source=f'{recording.path}, model {model.name}',
        config=configured,
        stand_in=model.stand_in,
        rate=rate,
        valleys=valleys,
        unusable_actions=unusable,
        cameras=cameras,
        layers=layers,
        ks=ks,
        proposals=proposals,
        notes=_notes(recording, model.stand_in, unusable, skipped),
    )


def write_study(study: Study, out: Path) -> Path:
    """Write the parameter file, the figures and the pictures to an existing folder.

    Returns:
        The parameter file.
    """
    config, note = study.config, STAND_IN if study.stand_in else ''
    now = {name: getattr(config, name) for name in SPEEDS}
    plot_speeds(study.valleys, now, out / 'speeds.png')
    tau = next(p for p in study.proposals if p.parameter == 'similarity_threshold').proposed
    plot_noise(study.cameras, config.similarity_threshold, tau, out / 'noise.png')
    if study.ks is not None:
        plot_grid(study.ks, note, out / 'budget.png')
    if study.layers is not None:
        plot_layers(study.layers, config.global_layers, note, out / 'layers.png')
    write_figures(out / 'calibration.json', figures(study))
    file = out / 'pruning.yaml'
    write_parameters(file, config, study.proposals, study.source)
    return file


def figures(study: Study) -> dict[str, object]:
    """All figures, for JSON; samples of pictures as quantiles."""
    cameras = {}
    for name, noise in study.cameras.items():
        fields = {f.name: getattr(noise, f.name) for f in dataclasses.fields(noise)}
        static, gaps = fields.pop('static'), fields.pop('all_pairs')
        cameras[name] = {
            **fields,
            'static_pairs': len(static),
            'quantiles': QUANTILES,
            'static_gap': np.quantile(static, QUANTILES) if len(static) else None,
            'all_gap': np.quantile(gaps, QUANTILES) if len(gaps) else None,
            'false_changes_now': noise.false_change_rate(study.config.similarity_threshold),
        }
    return {
        'source': study.source,
        'stand_in': study.stand_in,
        'notes': study.notes,
        'false_changes_wanted': study.rate,
        'unusable_actions': study.unusable_actions,
        'proposals': study.proposals,
        'speeds': study.valleys,
        'noise': cameras,
        'layers': study.layers,
        'budget': None if study.ks is None else grid_figures(study.ks),
    }


def grid_figures(search: KSearch) -> dict[str, object]:
    """Every point of the grid, means per mode."""
    grid = search.grid
    points = []
    for mode, shown in (('coarse', ~grid.fine), ('fine', grid.fine)):
        if not shown.any():
            continue
        tables = {
            name: getattr(grid, name)[..., shown].mean(axis=-1)
            for name in ('kept', 'recall', 'own_recall', 'paper_recall')
        }
        eq_1 = grid.global_recall[:, shown].mean(axis=1)
        for row, k_global in enumerate(grid.k_global):
            for column, (local, dynamic) in enumerate(grid.pairs):
                point = {'mode': mode, 'k_global': k_global, 'k_local': local}
                point |= {'k_dynamic': dynamic, 'global_recall': eq_1[row]}
                points.append({**point, **{n: t[row, column] for n, t in tables.items()}})
    return {
        'best': search.values,
        'budget': search.budget,
        'kept': search.kept,
        'unseen': search.unseen,
        'gain': search.gain,
        'kept_now': grid.now_kept.mean(),
        'recall_now': grid.now_recall.mean(),
        'points': points,
    }


def _scanned(
    config: PolicyConfig, recording: Recording, every: int, watch: Watch
) -> tuple[RecordingScan, ScoreRecorder, ModelInfo]:
    """A scan of the recording, its scores, and what the model says of itself."""
    from specprune_ros.policy import Policy

    model = load_policy(config).model
    recorder = ScoreRecorder(config.pruning)
    scan = RecordingScan(Policy(model, config, method=recorder))
    watch(scan_recording(scan, recording, every))
    return scan, recorder, model.info


def _noise(changes: FrameChanges, rate: float) -> CameraNoise:
    tables = (changes.dissimilarity, changes.power)
    dissimilarity, power = (np.stack(t) if t else np.zeros((0, 0)) for t in tables)
    return camera_noise(dissimilarity, power, rate)


def _noting(
    outcomes: Iterator[SpecPruneError | None], skipped: list[SpecPruneError]
) -> Iterator[SpecPruneError | None]:
    """The same outcomes; errors are kept on their way."""
    for outcome in outcomes:
        if outcome is not None:
            skipped.append(outcome)
        yield outcome


def _notes(
    recording: Recording, stand_in: bool, unusable: int, skipped: list[SpecPruneError]
) -> list[str]:
    notes = []
    if stand_in:
        notes.append(f'in parentheses, not written: {STAND_IN}')
    if not recording.has_actions:
        notes.append('no executed actions were recorded: every query counts as fine')
    if unusable:
        notes.append(f'{unusable} executed actions do not say what moved')
    if skipped:
        notes.append(skipped_words(skipped))
    return notes
