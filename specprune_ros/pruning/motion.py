"""The action-aware controller: coarse or fine motion, and how far back to compare frames.

Source: SpecPrune-VLA v3, sections 4.1.2 and 6.2, Eqs. 10-11, Alg. 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

REFERENCE_BASE = 7.0  # b of section 4.1.2
REFERENCE_OFFSET = 4


@dataclass(frozen=True)
class Motion:
    """One executed action, seen by the controller; unit 1 is a full command.

    Attributes:
        translation_speed: v_t, Eq. 10.
        rotation_speed: v_r, Eq. 11.
        vertical: dz, positive is up.
    """

    translation_speed: float
    rotation_speed: float
    vertical: float


def motion_of(translation: np.ndarray, rotation: np.ndarray) -> Motion:
    """Speeds of one executed action.

    Args:
        translation: [3] displacement x, y, z per control step, unit 1 (z up).
        rotation: [3] angular change per control step, unit 1.

    Source: Eqs. 10-11. The paper's "normalised" displacement is read as the executed command
        scaled to -1..1, the last executed one (differs: the released code reads the queue).
    """
    return Motion(
        float(np.linalg.norm(translation)), float(np.linalg.norm(rotation)), float(translation[2])
    )


def next_fine(
    fine: bool,
    motion: Motion,
    *,
    translation_threshold: float,
    rotation_threshold: float,
    hysteresis: bool,
) -> bool:
    """Whether motion is fine after one more executed action.

    Args:
        fine: the mode before.
        motion: the action.
        translation_threshold: v_t^th, 0.5 in the paper.
        rotation_threshold: v_r^th, 0.2 in the paper.
        hysteresis: True follows section 6.2 (fine mode ends only above a threshold, so an upward
            motion below both keeps it); False is Alg. 1, which decides anew at every step.

    Source: section 6.2; Alg. 1 for hysteresis=False.
    """
    slow = (
        motion.translation_speed < translation_threshold
        and motion.rotation_speed < rotation_threshold
    )
    if slow and motion.vertical <= 0.0:
        return True
    if not hysteresis:
        return False
    exceeds = (
        motion.translation_speed > translation_threshold
        or motion.rotation_speed > rotation_threshold
    )
    return fine and not exceeds


def reference_age(displacement: float, available: int) -> int:
    """T: how many control steps old the reference frame is.

    Args:
        displacement: norm of the translation executed since the last query, unit 1.
        available: how many control steps back the history reaches; 0 gives 0 (no reference).

    Source: section 4.1.2, T = floor(b + k v) + 4 with k = -1, b = 7, clipped to what there is.
    """
    if available <= 0:
        return 0
    age = math.floor(REFERENCE_BASE - displacement) + REFERENCE_OFFSET
    return min(max(age, 1), available)
