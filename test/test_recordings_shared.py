"""Real recordings, which are not ours to ship.

They are looked for in `SPECPRUNE_RECORDINGS`, by default `../shared/data` beside the checkout, and
skipped where they are not.
"""

import os
from pathlib import Path

import numpy as np
import pytest
from conftest import DATA

from specprune_ros.config_files import from_mapping
from specprune_ros.offline import fit_robot, run_recording
from specprune_ros.policy import Policy
from specprune_ros.recordings import open_recording
from specprune_ros.types import Mode, Reason

ROOT = Path(__file__).resolve().parent.parent
FOLDER = Path(os.environ.get('SPECPRUNE_RECORDINGS', ROOT.parent / 'shared' / 'data'))
NAMES = (
    'franka_flip_pot_upright.mp4',
    'franka_put_carrot.mp4',
    'libero_spatial_task1.mp4',
    'libero_spatial_observation.npz',
)
FIXED = {Mode.COARSE: 69, Mode.FINE: 84}  # of 256 patches, at alpha 0.8


def find(name: str) -> Path:
    path = DATA / name if name == 'pick_place' else FOLDER / name
    if not path.exists():
        pytest.skip(f'optional recording {name} is not in SPECPRUNE_RECORDINGS')
    return path


def reports_of(path: Path, budget: str) -> list:
    recording = open_recording(path)
    config = from_mapping({'pruning.budget': budget, 'pruning.alpha': 0.8})
    policy = Policy.load(fit_robot(config, recording))
    outcomes = run_recording(policy, recording)
    return [outcome[1].report for outcome in outcomes if isinstance(outcome, tuple)]


@pytest.mark.parametrize('budget', ['union', 'fixed'])
@pytest.mark.parametrize('name', [*NAMES, 'pick_place'])
def test_tokens_kept(name, budget):
    first, *rest = reports_of(find(name), budget)
    assert first.mode == Mode.DENSE
    assert len(rest) >= 5
    for report in rest:
        if budget == 'fixed':
            assert set(report.tokens_static) == {FIXED[Mode(report.mode)]}
        else:
            shares = report.tokens_static / report.tokens_total
            assert (shares >= 0.15).all()
            assert (shares <= 0.47).all()
        assert report.tokens_kept.sum() <= 0.66 * report.tokens_static.sum()
        assert np.isfinite(report.recall).all()
        assert (report.recall <= 1).all()


def test_moving_arm_is_among_the_kept_patches():
    """Patches that changed between two frames of the Franka video are kept, as dynamic."""
    recording = open_recording(find('franka_flip_pot_upright.mp4'))
    policy = Policy.load(fit_robot(from_mapping({}), recording))
    hits = total = 0
    before = None
    for outcome in run_recording(policy, recording):
        if not isinstance(outcome, tuple):
            continue
        observation, result = outcome
        image = observation.images['side'].astype(float)
        if before is not None:
            rows, cols = image.shape[0] // 16, image.shape[1] // 16
            change = np.abs(image - before).mean(axis=2).reshape(16, rows, 16, cols)
            moved = np.argsort(change.mean(axis=(1, 3)), axis=None)[-8:]
            reason, gone = result.report.camera_grid('side')
            dynamic = (reason & Reason.DYNAMIC > 0) & (gone != 2)
            hits += int(dynamic.flatten()[moved].sum())
            total += 8
        before = image
    # Chance is 8 of 256 patches, 3 %.
    assert hits / total > 0.3, f'{hits} of {total} most changed patches were kept as dynamic'
