"""The action-aware controller against reference vectors."""

import pytest
from conftest import golden

from specprune_ros.config import PruneConfig
from specprune_ros.pruning.budget import k_budget
from specprune_ros.pruning.motion import Motion, motion_of, next_fine, reference_age

CONTROLLER = 'pruners/paper_specprune_controller.npz'
LIMITS = {'translation_threshold': 0.5, 'rotation_threshold': 0.2}


@pytest.mark.golden
@pytest.mark.parametrize(
    ('hysteresis', 'name'), [(True, 'fine_text_hysteresis'), (False, 'fine_alg1_stateless')]
)
def test_modes_follow_the_paper(hysteresis, name):
    data = golden(CONTROLLER)
    fine, modes = False, []
    for delta, speed, turn in zip(data['deltas'], data['vt'], data['vr'], strict=True):
        motion = motion_of(delta[:3], delta[3:])
        assert motion.translation_speed == pytest.approx(speed)
        assert motion.rotation_speed == pytest.approx(turn)
        fine = next_fine(fine, motion, hysteresis=hysteresis, **LIMITS)
        modes.append(fine)
    assert modes == data[name].tolist()


@pytest.mark.golden
def test_reference_age_follows_the_paper():
    data = golden(CONTROLLER)
    for speed, row in zip(data['v_for_T'], data['T_clamped'], strict=True):
        for frames, expected in zip(data['hist_len'], row, strict=True):
            # A history of n frames, the current one included, reaches n - 1 steps back.
            assert reference_age(float(speed), int(frames) - 1) == expected


def test_lifting_slowly_stays_fine_only_with_hysteresis():
    lift = Motion(0.3, 0.0, 0.3)
    assert next_fine(True, lift, hysteresis=True, **LIMITS)
    assert not next_fine(True, lift, hysteresis=False, **LIMITS)
    assert not next_fine(False, lift, hysteresis=True, **LIMITS)
    assert not next_fine(True, Motion(0.6, 0.0, 0.3), hysteresis=True, **LIMITS)


@pytest.mark.golden
def test_k_table_of_a62():
    data = golden(CONTROLLER)
    for fine, name in ((False, 'K_coarse'), (True, 'K_fine')):
        for alpha, row in zip(data['alpha'], data[name], strict=True):
            k = k_budget(PruneConfig(alpha=float(alpha)), fine)
            assert [k.k_global, k.k_local, k.k_dynamic] == row.tolist()


def test_no_reference_without_history():
    assert reference_age(0.0, 0) == 0
    assert reference_age(100.0, 5) == 1
    assert reference_age(0.0, 50) == 11
