"""What leaves action_streamer: a command for one control step, or the one safety output."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from specprune_ros.types import ExecutedAction


@dataclass(frozen=True, eq=False, kw_only=True)
class JointTarget:
    """Joint positions to be reached after a time.

    Attributes:
        names: [J] joints.
        positions: [J] rad or m; empty: no point, which ends the running trajectory.
        duration_s: time to get there.
    """

    names: tuple[str, ...]
    positions: np.ndarray
    duration_s: float


@dataclass(frozen=True, eq=False, kw_only=True)
class TwistTarget:
    """Speed of the end effector.

    Attributes:
        linear, angular: [3] m/s and rad/s, or with stream.twist 'unitless' shares of full speed.
        frame_id: frame of both.
    """

    linear: np.ndarray
    angular: np.ndarray
    frame_id: str


@dataclass(frozen=True, eq=False, kw_only=True)
class PoseTarget:
    """Pose of the end effector.

    Attributes:
        position: [3] m.
        quaternion_xyzw: [4], of norm 1.
        frame_id: frame of both.
    """

    position: np.ndarray
    quaternion_xyzw: np.ndarray
    frame_id: str


Target = JointTarget | TwistTarget | PoseTarget


@dataclass(frozen=True, eq=False, kw_only=True)
class Command:
    """One control step.

    Attributes:
        executed: the action after all limits, in action units; its dry_run says whether `target`
            and `gripper` may leave.
        target: what goes to the arm.
        gripper: positions of the grippers, in the order of the action; None: not commanded apart.
    """

    executed: ExecutedAction
    target: Target
    gripper: tuple[float, ...] | None = None


@dataclass(frozen=True, eq=False, kw_only=True)
class Safety:
    """The one output when streaming ends.

    Attributes:
        reason: code of the fault, a key of `faults.FAULTS`, or what the operator did.
        target: what goes to the arm; None: nothing.
        executed: the action that says the same of the arm's elements: stay. Its epoch is that of
            the chunks before, and its chunk_id 0, because it is no row of a chunk. None: nothing
            goes out, or what it says is no action: a stop of joints at positions nobody knows.
        dry_run: True: `target` may not leave.
    """

    reason: str
    target: Target | None
    executed: ExecutedAction | None
    dry_run: bool


Output = Command | Safety
