"""A simulated arm in running time: a clock that waits for the simulator, and velocity commands."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass

import numpy as np

from specprune_ros.sim.state import CLOSE, METRES_PER_UNIT, OPEN, RADIANS_PER_UNIT, STEP_NS

START_NS = 1_000_000_000  # zero means "no time yet" to ROS
STALE_STEPS = 2  # control steps after which a velocity command no longer moves the arm
NS = 1e9


class SimClock:
    """Simulated time: runs at a rate of steady time, but never beyond what is simulated.

    Threads may share it.

    Args:
        rate: simulated seconds per second.
        start_ns: where it begins.
    """

    def __init__(self, rate: float, start_ns: int = START_NS):
        self._rate = rate
        self._now_ns, self._limit_ns = float(start_ns), float(start_ns)
        self._seen_s = time.monotonic()
        self._lock = threading.Lock()

    def now_ns(self) -> int:
        """Simulated time; never goes back."""
        with self._lock:
            now_s = time.monotonic()
            # Time that the simulator was late by is not caught up: it would come as a jump.
            passed_ns = (now_s - self._seen_s) * self._rate * NS
            self._now_ns = min(self._now_ns + passed_ns, self._limit_ns)
            self._seen_s = now_s
            return round(self._now_ns)

    def allow(self, until_ns: int) -> None:
        """Let time run on to what is simulated by now."""
        self.now_ns()  # what passed until now was not allowed
        with self._lock:
            self._limit_ns = max(self._limit_ns, float(until_ns))

    def wait_for(self, at_ns: int, halt: threading.Event) -> bool:
        """Wait until a simulated time that is allowed; False when halted before.

        Raises:
            ValueError: the time was not allowed, so that it would never come.
        """
        if at_ns > self._limit_ns:
            raise ValueError(f'{at_ns} ns is beyond the limit of {self._limit_ns:.0f} ns')
        while (left_ns := at_ns - self.now_ns()) > 0:
            if halt.wait(left_ns / NS / self._rate):
                return False
        return not halt.is_set()


@dataclass(frozen=True)
class Units:
    """What a full command means to whoever sends velocities and finger positions.

    Attributes:
        translation_m, rotation_rad: that one control step moves at a command of 1.
        finger_closed_m, finger_open_m: positions of one finger.
    """

    translation_m: float = METRES_PER_UNIT
    rotation_rad: float = RADIANS_PER_UNIT
    finger_closed_m: float = 0.0
    finger_open_m: float = 0.04


class VelocityCommands:
    """The newest velocity and finger position, as an action of the simulated arm.

    A velocity that is not renewed stops after STALE_STEPS; a finger position stays.

    Args:
        units: of what comes.
    """

    def __init__(self, units: Units):
        self._units = units
        self.forget()

    def forget(self) -> None:
        """No velocity, gripper open, as at the beginning of an episode."""
        self._twist, self._until_ns, self._gripper = np.zeros(6), 0, OPEN

    def move(self, linear: np.ndarray, angular: np.ndarray, stamp_ns: int) -> None:
        """Take a velocity.

        Args:
            linear: [3] m/s.
            angular: [3] rad/s.
            stamp_ns: simulated time of the command.

        Raises:
            ValueError: a number is not finite.
        """
        twist = np.concatenate((linear, angular))
        if not np.isfinite(twist).all():
            raise ValueError(f'twist = {twist}: must be finite')
        self._twist, self._until_ns = twist, stamp_ns + STALE_STEPS * STEP_NS

    def grip(self, position_m: float) -> None:
        """Take the position that one finger is to have.

        Raises:
            ValueError: it is not finite.
        """
        if not np.isfinite(position_m):
            raise ValueError(f'gripper = {position_m}: must be finite')
        units = self._units
        opening = (position_m - units.finger_closed_m) / (
            units.finger_open_m - units.finger_closed_m
        )
        self._gripper = CLOSE + (OPEN - CLOSE) * min(max(opening, 0.0), 1.0)

    def action(self, now_ns: int) -> np.ndarray:
        """[7] what the arm does in the control step that begins now."""
        twist = self._twist if now_ns < self._until_ns else np.zeros(6)
        full = np.repeat((self._units.translation_m, self._units.rotation_rad), 3)
        move = twist * (STEP_NS / NS) / full
        return np.clip((*move, self._gripper), -1.0, 1.0)
