"""Put the arm where the hand is to be, without physics; and where a point appears in an image."""

from __future__ import annotations

from typing import Any

import numpy as np

ITERATIONS = 60
DAMPING = 0.05
TOLERANCE_M, TOLERANCE_RAD = 5e-4, 5e-3
MAX_STEP_RAD = 0.3  # of one joint in one iteration


def solve_hand(
    model: Any,
    data: Any,
    *,
    site: int,
    joints: np.ndarray,
    dofs: np.ndarray,
    position: np.ndarray,
    rotation: np.ndarray,
) -> bool:
    """Set the arm's joints so that a site has a pose: damped least squares from where they are.

    Args:
        model, data: MuJoCo's; joints and all that follows from them in `data` are changed.
        site: id of the point between the fingertips.
        joints: [J] indices into qpos.
        dofs: [J] indices into qvel.
        position: [3] m, world frame.
        rotation: [3, 3] of the site.

    Returns:
        whether it came within 0.5 mm and 5 mrad, with all joints inside their limits.

    Source: Wampler 1986, damped least squares.
    """
    import mujoco

    low, high = model.jnt_range[model.dof_jntid[dofs]].T
    translation, turning = np.zeros((3, model.nv)), np.zeros((3, model.nv))
    for _ in range(ITERATIONS):
        mujoco.mj_kinematics(model, data)
        mujoco.mj_comPos(model, data)
        error = _pose_error(data, site, position, rotation)
        if _arrived(error):
            return bool(((data.qpos[joints] >= low) & (data.qpos[joints] <= high)).all())
        mujoco.mj_jacSite(model, data, translation, turning, site)
        jacobian = np.vstack((translation[:, dofs], turning[:, dofs]))
        damped = jacobian @ jacobian.T + DAMPING**2 * np.eye(6)
        step = jacobian.T @ np.linalg.solve(damped, error)
        data.qpos[joints] += np.clip(step, -MAX_STEP_RAD, MAX_STEP_RAD)
    return False


def _pose_error(data: Any, site: int, position: np.ndarray, rotation: np.ndarray) -> np.ndarray:
    """[6] m and rad, for small rotations."""
    now = data.site_xmat[site].reshape(3, 3)
    turn = 0.5 * np.cross(now, rotation, axis=0).sum(axis=1)
    return np.concatenate((position - data.site_xpos[site], turn))


def _arrived(error: np.ndarray) -> bool:
    return bool(
        np.linalg.norm(error[:3]) < TOLERANCE_M and np.linalg.norm(error[3:]) < TOLERANCE_RAD
    )


def rotation_about(vector: np.ndarray) -> np.ndarray:
    """[3, 3] rotation by a vector [3], rad (Rodrigues' formula)."""
    angle = float(np.linalg.norm(vector))
    if angle == 0.0:
        return np.eye(3)
    x, y, z = vector / angle
    cross = np.array([[0.0, -z, y], [z, 0.0, -x], [-y, x, 0.0]])
    return np.eye(3) + np.sin(angle) * cross + (1.0 - np.cos(angle)) * cross @ cross


def project(
    points: np.ndarray, *, eye: np.ndarray, axes: np.ndarray, fovy_deg: float, size: int
) -> np.ndarray:
    """Where points appear in an upright square image of a pinhole camera.

    Args:
        points: [O, 3] m, world frame.
        eye: [3] of the camera.
        axes: [3, 3], columns right, up and backwards, as MuJoCo has a camera's frame.
        fovy_deg: field of view, top to bottom.
        size: px.

    Returns:
        [O, 2] px to the right and down from the image's top left corner; NaN behind the camera.
    """
    seen = (points - eye) @ axes
    depth = -seen[:, 2]
    focal = 0.5 * size / np.tan(np.radians(fovy_deg) / 2)
    offset = focal * seen[:, :2] * (1.0, -1.0) / np.where(depth > 0, depth, np.nan)[:, None]
    return 0.5 * size + offset
