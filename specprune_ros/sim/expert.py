"""A scripted expert for pick and place: it reads true poses, never the images.

It walks through legs with proportional control, keeps the hand pointing straight down, and begins
again when the object is not in the hand after the lift.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from specprune_ros.sim.state import CLOSE, METRES_PER_UNIT, OPEN, RADIANS_PER_UNIT, SimState
from specprune_ros.sim.tasks import Skill

MAX_SLEW = 0.4  # change of the translation command per control step, unit 1
MAX_ROTATION = 0.2  # orientation correction per axis, unit 1
HOLD_M = 0.04  # an object that is further from its place in the hand was lost
RETREAT_M = 0.08
Target = Callable[['Expert', SimState], np.ndarray]


@dataclass(frozen=True)
class Leg:
    """One part of the motion.

    Attributes:
        name: what it does.
        target: [3] m where the hand is to be, asked every step; None: stand still.
        gripper: OPEN or CLOSE.
        speed: largest translation command, unit 1.
        tolerance_m: the leg ends this close to its target.
        steps: control steps that it lasts at least.
    """

    name: str
    target: Target | None
    gripper: float
    speed: float = 0.0
    tolerance_m: float = 0.01
    steps: int = 0


class Expert:
    """Does one pick and place.

    Args:
        skill: what to move where.

    Attributes:
        retries: how often it grasped and held nothing.
    """

    def __init__(self, skill: Skill):
        self.skill = skill
        self.retries = 0
        self._leg = 0
        self._age = 0
        self._start = np.zeros(3)  # of the hand, when the leg began
        self._command = np.zeros(3)

    @property
    def done(self) -> bool:
        """Whether all legs are over."""
        return self._leg == len(LEGS)

    @property
    def leg(self) -> str:
        """Name of the present leg."""
        return 'done' if self.done else LEGS[self._leg].name

    def act(self, state: SimState) -> np.ndarray:
        """The action for this state.

        Returns:
            [7] in -1..1, named state.ACTION_NAMES.
        """
        if self.done:
            return np.array([0.0] * 6 + [OPEN])
        leg = LEGS[self._leg]
        if self._age == 0:
            self._start = state.hand
        error = np.zeros(3) if leg.target is None else leg.target(self, state) - state.hand
        self._age += 1
        wanted = shortened(error / METRES_PER_UNIT, leg.speed)
        wanted = self._command + shortened(wanted - self._command, MAX_SLEW)
        self._command = wanted
        if self._age >= leg.steps and np.linalg.norm(error) < leg.tolerance_m:
            self._next(state)
        return np.clip([*wanted, *upright(state.hand_xyzw), leg.gripper], -1.0, 1.0)

    def _next(self, state: SimState) -> None:
        lost = LEGS[self._leg].name == 'lift' and not self._holds(state)
        self.retries += lost
        self._leg, self._age = (0 if lost else self._leg + 1), 0

    def _holds(self, state: SimState) -> bool:
        return bool(np.linalg.norm(state.hand - self.in_object(state)) < HOLD_M)

    def over_object(self, state: SimState) -> np.ndarray:
        """[3] above the grasp, at travel height."""
        return self._at_height(self.in_object(state))

    def in_object(self, state: SimState) -> np.ndarray:
        """[3] of the grasp."""
        return state.places[self.skill.pick] + np.array(self.skill.grasp)

    def lifted(self, state: SimState) -> np.ndarray:
        """[3] above where the hand closed."""
        return self._at_height(self._start)

    def over_place(self, state: SimState) -> np.ndarray:
        """[3] that brings the held object above its place, at travel height."""
        return self._at_height(self.at_place(state))

    def at_place(self, state: SimState) -> np.ndarray:
        """[3] that brings the held object, wherever it is in the hand, to its place."""
        place = state.places[self.skill.place] + np.array(self.skill.release)
        return state.hand + place - state.places[self.skill.pick]

    def away(self, state: SimState) -> np.ndarray:
        """[3] above where the hand opened."""
        return self._start + np.array([0.0, 0.0, RETREAT_M])

    def _at_height(self, point: np.ndarray) -> np.ndarray:
        return np.array([*point[:2], self.skill.travel_z])


LEGS = (
    Leg('reach', Expert.over_object, OPEN, speed=1.0, tolerance_m=0.02),
    Leg('descend', Expert.in_object, OPEN, speed=0.9, tolerance_m=0.006),
    Leg('close', None, CLOSE, steps=8),
    Leg('lift', Expert.lifted, CLOSE, speed=0.9, tolerance_m=0.03),
    Leg('carry', Expert.over_place, CLOSE, speed=0.9, tolerance_m=0.015),
    Leg('lower', Expert.at_place, CLOSE, speed=0.6, tolerance_m=0.01),
    Leg('open', None, OPEN, steps=6),
    Leg('retreat', Expert.away, OPEN, speed=0.9, tolerance_m=0.03),
)


def shortened(vector: np.ndarray, length: float) -> np.ndarray:
    """[3] `vector`, no longer than `length`."""
    norm = float(np.linalg.norm(vector))
    return vector if norm <= length else vector * (length / norm)


def upright(hand_xyzw: np.ndarray) -> np.ndarray:
    """The rotation command that turns the hand towards straight down, fingers along y.

    Args:
        hand_xyzw: [4] orientation of the hand.

    Returns:
        [3] roll, pitch, yaw in the world frame, unit 1.
    """
    rotation = straightening(hand_xyzw)
    return np.clip(rotation / RADIANS_PER_UNIT, -MAX_ROTATION, MAX_ROTATION)


def straightening(hand_xyzw: np.ndarray) -> np.ndarray:
    """[3] rad, the rotation in the world frame that makes a hand [4] point straight down."""
    x, y, z, w = hand_xyzw
    # Straight down is (1, 0, 0, 0): its product with the conjugate of the hand's quaternion.
    error = np.array([w, z, -y, x])
    vector, scalar = error[:3], error[3]
    sine = float(np.linalg.norm(vector))
    if sine == 0.0:
        return np.zeros(3)
    angle = 2.0 * np.arctan2(sine, abs(scalar))
    return vector * (np.copysign(angle, scalar) / sine)
