"""What the expert would do from a still frame, computed without a simulator.

A demonstration shows few hands far from the right path, and always the one that goes to the named
object: a network can read the target off the hand's motion. These labels hold for any hand and
any instruction, so that only image and words tell which way to go.
"""

from __future__ import annotations

import numpy as np

from specprune_ros.sim.state import CLOSE, METRES_PER_UNIT, OPEN, RADIANS_PER_UNIT
from specprune_ros.sim.tasks import Skill

# How the hand follows a translation command: m per step at unit 1, and what stays of the last
# step's motion. Fitted to 12 demonstrations (residual 0.7 to 1.3 mm of up to 13 mm per step).
GAIN_M, MEMORY = 0.0051, 0.60
TURN_MEMORY = 0.75  # what stays of a rotation error after a step
CLOSE_M = 0.006  # the gripper closes this near to the grasp
# Horizontal distance from the grasp within which the hand is let down, all the way or part of it.
# Along x the open fingers pass an object at its sides, so an error there counts half. More must
# be let pass than seems good: a chunk that lets a far hand down drifts by 20 mm in x before its
# end, and an answer that lifts the hand for it would go up and down for ever.
BELOW_M, ABOVE_M = 0.015, 0.045
X_WEIGHT = 0.5
DESCENT = 0.7  # largest command of a hand over the grasp: slower, it drifts less


def reach_chunk(
    hand: np.ndarray, turn: np.ndarray, grasp: np.ndarray, travel_z: float, horizon: int
) -> np.ndarray:
    """Actions that bring an open hand over an object, down to its grasp, and close it.

    Args:
        hand: [N, 3] m.
        turn: [N, 3] rad, rotation that is left until the hand points straight down.
        grasp: [N, 3] m, where the hand is to be when it closes.
        travel_z: m, height of the hand on its way.
        horizon: L.

    Returns:
        [N, L, 7] in -1..1, named state.ACTION_NAMES.
    """
    hand, speed = hand.astype(float), np.zeros(hand.shape)
    closed = np.zeros(len(hand), bool)
    actions = np.zeros((len(hand), horizon, 7))
    for step in range(horizon):
        error = approach(hand, grasp, travel_z) - hand
        closed |= np.linalg.norm(grasp - hand, axis=1) < CLOSE_M
        over = _off(hand, grasp) < ABOVE_M
        command = _shortened(error / METRES_PER_UNIT, np.where(over, DESCENT, 1.0))
        command[closed] = 0.0
        speed = MEMORY * speed + GAIN_M * command
        hand = hand + speed
        actions[:, step, :3] = command
        actions[:, step, 3:6] = np.clip(turn * TURN_MEMORY**step / RADIANS_PER_UNIT, -0.2, 0.2)
        actions[:, step, 6] = np.where(closed, CLOSE, OPEN)
    return actions


def approach(hand: np.ndarray, grasp: np.ndarray, travel_z: float) -> np.ndarray:
    """[N, 3] where a hand [N, 3] is to go next: high where it is not yet over the grasp."""
    share = np.clip((_off(hand, grasp) - BELOW_M) / (ABOVE_M - BELOW_M), 0.0, 1.0)
    target = grasp.astype(float)
    target[:, 2] += share * (travel_z - grasp[:, 2])
    return target


def grasp_of(skill: Skill, places: np.ndarray, names: list[str]) -> np.ndarray:
    """[..., 3] the skill's grasp, from places [..., O, 3] of these names."""
    return places[..., names.index(skill.pick), :] + np.array(skill.grasp)


def before_grasp(actions: np.ndarray) -> int:
    """How many control steps of a demonstration [T, 7] come before its gripper first closes."""
    closing = np.flatnonzero(actions[:, 6] > 0)
    return int(closing[0]) if len(closing) else len(actions)


def _off(hand: np.ndarray, grasp: np.ndarray) -> np.ndarray:
    """[N] m, how far hands [N, 3] are from being over their grasps."""
    x, y = (hand - grasp)[:, :2].T
    return np.hypot(X_WEIGHT * x, y)


def _shortened(vectors: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """[N, 3], each no longer than its length [N]."""
    norms = np.linalg.norm(vectors, axis=1)
    return vectors * np.minimum(1.0, lengths / np.maximum(norms, 1e-9))[:, None]
