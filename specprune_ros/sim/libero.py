"""One LIBERO task as an environment: cameras, joints, end-effector pose, success, without ROS."""

from __future__ import annotations

import atexit
import contextlib
import copy
import functools
import importlib
import io
import logging
import os
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from specprune_ros.errors import ConfigError, MissingDependencyError
from specprune_ros.images import LateImage
from specprune_ros.sim.conditions import Disturbance
from specprune_ros.sim.expert import straightening
from specprune_ros.sim.kinematics import project, rotation_about, solve_hand
from specprune_ros.sim.placement import HandDraw, draw_layout, seed_stream
from specprune_ros.sim.simplify import simplify_model
from specprune_ros.sim.state import ACTION_NAMES, OPEN, STEP_NS, SimState
from specprune_ros.sim.tasks import SEEDS, SimTask, find_task
from specprune_ros.types import Observation

CAMERAS = {
    'wrist': 'robot0_eye_in_hand',
    'side': 'agentview',
    'agentview': 'agentview',  # as LIBERO calls it
    'overhead': 'birdview',
    'front': 'frontview',
}
# Arena -> height of its surface; stock birdview shows mostly the room, this shows the workspace.
OVERHEAD_FOVY_DEG = {'floor': 12.5, 'table': 20.0}
OVERHEAD_CENTRE = {'floor': (0.0, 0.045), 'table': (-0.1, 0.0)}
SPLITS = ('train', 'eval')
SETTLE_STEPS = 10  # LIBERO's protocol: objects fall into place, the gripper opens
DETAIL_M = 0.008  # of visual meshes; smaller details go
MAX_SIZE = 640
FINGERS = 2
HEADLIGHT = ('ambient', 'diffuse', 'specular')
LIGHTS = ('light_ambient', 'light_diffuse', 'light_specular')
MAX_ARRANGEMENTS = 1000  # one in some hundred hands cannot be reached
INSTALL = (
    'bash scripts/setup_sim.sh and .venv-sim/bin/specprune, or in the checkout pip install -e '
    '".[sim]" into an environment of its own: it pins NumPy 1.26'
)


class LiberoEnv:
    """One task; episodes begin with `reset`.

    The same seed gives the same episode, and the same images on the same renderer. Not
    thread-safe: the renderer belongs to the thread that made it.

    Args:
        task: what to do, or its name.
        cameras: names out of CAMERAS to render.
        size: height and width of the images, px.
        detail_m: visual details smaller than this are left out, which makes rendering several
            times faster; 0 renders LIBERO's own meshes.

    Attributes:
        task: what to do.
        cameras: that are rendered.
        size: height and width of the images, px.
        instruction: in words.
        state: of the present control step.
        rendering_s: spent on images so far.

    Raises:
        ConfigError: no such task or camera, a bad size, or no library to render with.
        MissingDependencyError: the simulator is not installed.
    """

    task: SimTask
    state: SimState

    def __init__(
        self,
        task: SimTask | str,
        *,
        cameras: Sequence[str] = ('wrist', 'side', 'overhead'),
        size: int = 224,
        detail_m: float = DETAIL_M,
    ):
        self.task = find_task(task) if isinstance(task, str) else task
        self.cameras = tuple(cameras)
        check_cameras(self.cameras)
        if not 1 <= size <= MAX_SIZE:
            raise ConfigError('size', size, f'must be 1 to {MAX_SIZE} px')
        benchmark, bddl_files, control_env = _import_simulator()
        with _quiet():
            suite = benchmark.get_benchmark_dict()[self.task.suite]()
            official = suite.get_task(self.task.index)
            self._official_states = suite.get_task_init_states(self.task.index)
            bddl = Path(bddl_files, official.problem_folder, official.bddl_file)
            # robosuite's own renderer is left out: ours reads the simplified meshes.
            self._env = control_env(
                bddl_file_name=str(bddl),
                use_camera_obs=False,
                has_offscreen_renderer=False,
                hard_reset=False,
                ignore_done=True,
            )
        theirs = self._env.language_instruction if self.task.reworded else official.language
        self.instruction = self.task.instruction or theirs
        self._prepare_model(detail_m, size)
        self.size = size
        self._renderer: Any = None
        self.rendering_s = 0.0
        _OPEN.add(self)
        self._rest: np.ndarray | None = None  # qpos of a settled episode

    def reset(self, seed: int, split: str = 'eval') -> SimState:
        """Begin an episode, and let everything settle.

        Args:
            seed: which episode. An official task has 50 for 'eval', its initial states; every
                other one is drawn.
            split: 'train' or 'eval'; they share no episode.

        Raises:
            ConfigError: a bad seed or split.
        """
        if split not in SPLITS:
            raise ConfigError('split', split, f'must be one of {SPLITS}')
        official = split == 'eval' and self.task.shuffle is None
        limit = len(self._official_states) if official else SEEDS
        if not 0 <= seed < limit:
            raise ConfigError('seed', seed, f'{self.task.name} has 0..{limit - 1} for {split}')
        rng = seed_stream(seed, split=split, task=self.task.name)
        with _numpy_seed(int(rng.integers(2**32))):
            self._env.reset()
        # robosuite's fingers go on from their last command, which a reset without a new model
        # does not forget: an episode would depend on the one before.
        self._env.env.robots[0].gripper.current_action = np.zeros(FINGERS)
        if official:
            self._env.set_init_state(self._official_states[seed])
        elif self.task.shuffle is not None:
            self._place(draw_layout(self.task.shuffle, rng))
        self._steps = 0
        for _ in range(SETTLE_STEPS):
            self._advance(np.array([0.0] * 6 + [OPEN]))
        self.state = self._read_state()
        return self.state

    def step(self, action: np.ndarray) -> SimState:
        """One control step of 50 ms.

        Args:
            action: [7] named state.ACTION_NAMES, clipped to -1..1.

        Raises:
            ValueError: another shape, or not finite.
        """
        action = np.asarray(action, float)
        if action.shape != (len(ACTION_NAMES),) or not np.isfinite(action).all():
            raise ValueError(f'an action is 7 finite numbers, not {action}')
        self._advance(np.clip(action, -1.0, 1.0))
        self._steps += 1
        self.state = self._read_state()
        return self.state

    def arrange(
        self, seed: int, hand: HandDraw, split: str = 'train', fingers_m: float = 0.04
    ) -> SimState:
        """A still scene: a drawn layout, and the arm anywhere; nothing moves or falls.

        Args:
            seed: which scene; other draws than those of `reset`.
            hand: draws where the hand is.
            split: 'train' or 'eval'.
            fingers_m: how far each finger is open.

        Raises:
            ConfigError: the task's objects are not shuffled, or a bad seed or split.
        """
        if self.task.shuffle is None:
            raise ConfigError('task', self.task.name, 'its objects are not shuffled')
        if self._rest is None:
            self.reset(0, 'train')
            self._rest = self._env.env.sim.data.qpos.copy()
        rng = seed_stream(seed, split=f'{split} layout', task=self.task.suite)
        data = self._env.env.sim.data._data
        for _ in range(MAX_ARRANGEMENTS):
            data.qpos[:] = self._rest
            self._place(draw_layout(self.task.shuffle, rng))
            places = self._places()
            if self._move_hand(*hand(places, rng), fingers_m):
                break
        else:
            raise RuntimeError(f'no hand of {MAX_ARRANGEMENTS} could be reached')
        self._env.env.sim.forward()
        self._observed = {
            'robot0_joint_pos': data.qpos[self._robot._ref_joint_pos_indexes].copy(),
            'robot0_gripper_qpos': data.qpos[self._robot._ref_gripper_joint_pos_indexes].copy(),
            'robot0_eef_pos': data.site_xpos[self._robot.eef_site_id].copy(),
            'robot0_eef_quat': self._hand_xyzw(),
        }
        self._steps = 0
        self.state = self._read_state()
        return self.state

    def disturb(self, disturbance: Disturbance, seed: int) -> None:
        """Change cameras and lights until the next call.

        Args:
            disturbance: from the scene as it is.
            seed: of the episode: which way each camera is moved and turned, another one per task.
        """
        import mujoco

        model = self._env.env.sim.model._model
        for name, value in self._undisturbed.items():
            getattr(model, name)[:] = value
        rng = seed_stream(seed, split='disturbance', task=self.task.name)
        for name in self.cameras:
            camera = model.camera(CAMERAS[name])
            camera.pos[:] += disturbance.camera_m * _direction(rng)
            turn, before = np.zeros(4), camera.quat.copy()
            mujoco.mju_axisAngle2Quat(turn, _direction(rng), disturbance.camera_rad)
            mujoco.mju_mulQuat(camera.quat, turn, before)
        for name in LIGHTS:
            getattr(model, name)[:] *= disturbance.light
        for name, value in self._headlight.items():
            getattr(model.vis.headlight, name)[:] = value * disturbance.light

    def pixels(self, names: Sequence[str]) -> np.ndarray:
        """Where objects and regions appear in the images of this state.

        Args:
            names: out of `state.places`.

        Returns:
            [V, O, 2] px to the right and down from the top left corner, perhaps outside of the
            image or hidden; NaN behind the camera.
        """
        sim = self._env.env.sim
        model, data = sim.model._model, sim.data._data
        points = np.array([self.state.places[name] for name in names])
        seen = []
        for name in self.cameras:
            camera = model.camera(CAMERAS[name]).id
            seen.append(
                project(
                    points,
                    eye=data.cam_xpos[camera],
                    axes=data.cam_xmat[camera].reshape(3, 3),
                    fovy_deg=float(model.cam_fovy[camera]),
                    size=self.size,
                )
            )
        return np.stack(seen)

    @property
    def success(self) -> bool:
        """LIBERO's own check of the goal, at this step."""
        if self.task.goal:
            return bool(self._env.env._eval_predicate(list(self.task.goal)))
        return bool(self._env.check_success())

    def images(self) -> dict[str, np.ndarray]:
        """Render every camera.

        Returns:
            camera -> [size, size, 3] uint8 RGB, upright.

        Raises:
            ConfigError: MuJoCo cannot render on this machine as it is set up.
        """
        return {name: self._render(self._data, name) for name in self.cameras}

    def late_images(self) -> dict[str, LateImage]:
        """The same images, each rendered when it is asked for, be it after later steps."""
        data = copy.copy(self._data)
        return {name: LateImage(partial(self._render, data, name)) for name in self.cameras}

    @property
    def _data(self) -> Any:
        return self._env.env.sim.data._data

    def _render(self, data: Any, camera: str) -> np.ndarray:
        import mujoco

        if self._renderer is None:
            self._renderer = _make_renderer(self._env.env.sim.model._model, self.size)
        options = mujoco.MjvOption()
        options.geomgroup[0] = 0  # collision shapes
        started = time.perf_counter()
        self._renderer.update_scene(data, CAMERAS[camera], options)
        image = self._renderer.render()
        self.rendering_s += time.perf_counter() - started
        return image

    def observation(self, joint_names: tuple[str, ...] = ()) -> Observation:
        """What a policy may know of this step; images are rendered when it looks at them.

        Args:
            joint_names: elements of the proprioception, out of state.PROPRIO_NAMES.

        Raises:
            ConfigError: the robot has no such joint.
        """
        return Observation(
            images=self.late_images(),
            proprio=self.state.proprio(joint_names),
            instruction=self.instruction,
            stamp_ns=self.state.step * STEP_NS,
        )

    def close(self) -> None:
        """Free the simulator; closing twice does no harm."""
        self._renderer = None  # its context is freed with it
        if self._env is not None:
            self._env.close()
            self._env = None

    def _prepare_model(self, detail_m: float, size: int) -> None:
        model = self._env.env.sim.model._model
        if detail_m:
            simplify_model(model, detail_m)
        model.vis.quality.offsamples = 0  # several samples per pixel cost a third of the time
        model.vis.global_.offwidth = model.vis.global_.offheight = max(size, 64)
        arena = 'floor' if 'floor' in self._env.env.fixtures_dict else 'table'
        camera = model.camera(CAMERAS['overhead'])
        camera.fovy[:] = OVERHEAD_FOVY_DEG[arena]
        camera.pos[:2] = OVERHEAD_CENTRE[arena]
        self._undisturbed = {
            name: getattr(model, name).copy() for name in ('cam_pos', 'cam_quat', *LIGHTS)
        }
        lamp = model.vis.headlight
        self._headlight = {name: getattr(lamp, name).copy() for name in HEADLIGHT}

    def _place(self, layout: Mapping[str, np.ndarray]) -> None:
        sim = self._env.env.sim
        for name, point in layout.items():
            joint = self._env.env.get_object(name).joints[-1]
            pose = sim.data.get_joint_qpos(joint).copy()
            pose[:2] = point
            sim.data.set_joint_qpos(joint, pose)
        sim.forward()

    def _advance(self, action: np.ndarray) -> None:
        self._observed, *_ = self._env.step(action)

    @property
    def _robot(self) -> Any:
        return self._env.env.robots[0]

    def _move_hand(self, position: np.ndarray, turn: np.ndarray, fingers_m: float) -> bool:
        """Bring the hand somewhere, turned by [3] rad from straight down; False: it cannot."""
        sim, robot = self._env.env.sim, self._robot
        sim.data.qpos[robot._ref_gripper_joint_pos_indexes] = (fingers_m, -fingers_m)
        sim.forward()
        # The site's own rotation, brought from the hand's present pose to straight down.
        now = sim.data._data.site_xmat[robot.eef_site_id].reshape(3, 3)
        down = rotation_about(straightening(self._hand_xyzw())) @ now
        return solve_hand(
            sim.model._model,
            sim.data._data,
            site=robot.eef_site_id,
            joints=np.asarray(robot._ref_joint_pos_indexes),
            dofs=np.asarray(robot._ref_joint_vel_indexes),
            position=position,
            rotation=rotation_about(turn) @ down,
        )

    def _hand_xyzw(self) -> np.ndarray:
        body = self._env.env.sim.data.get_body_xquat(self._robot.robot_model.eef_name)
        return np.roll(body, -1)

    def _places(self) -> dict[str, np.ndarray]:
        env = self._env.env
        data = env.sim.data
        places = {name: data.body_xpos[body].copy() for name, body in env.obj_body_id.items()}
        return places | {name: data.get_site_xpos(name).copy() for name in env.object_sites_dict}

    def _read_state(self) -> SimState:
        seen = self._observed
        places = self._places()
        joints = np.concatenate((seen['robot0_joint_pos'], seen['robot0_gripper_qpos']))
        return SimState(
            step=self._steps,
            joints=joints,
            hand=seen['robot0_eef_pos'],
            hand_xyzw=seen['robot0_eef_quat'],
            places=places,
        )


_OPEN: weakref.WeakSet[LiberoEnv] = weakref.WeakSet()


@functools.cache
def _close_before_graphics() -> None:
    """Else renderers that are left at exit outlive mujoco's display, and complain."""

    def close_all() -> None:
        for env in list(_OPEN):
            env.close()

    atexit.register(close_all)  # before what mujoco registered when it was imported


def _direction(rng: np.random.Generator) -> np.ndarray:
    """[3] of length 1, any way."""
    vector = rng.normal(size=3)
    return vector / np.linalg.norm(vector)


def check_cameras(names: Sequence[str]) -> None:
    """Nothing, when the simulator has all of these cameras.

    Raises:
        ConfigError: a name is not in CAMERAS.
    """
    unknown = [name for name in names if name not in CAMERAS]
    if unknown:
        raise ConfigError('robot.camera_names', unknown, f'the simulator has {list(CAMERAS)}')


def _make_renderer(model: Any, size: int) -> Any:
    import mujoco

    _close_before_graphics()
    try:
        renderer = mujoco.Renderer(model, size, size)
    except Exception as error:  # EGL, OSMesa, GLFW and mujoco each raise their own
        raise _no_renderer(error) from error
    renderer.scene.flags[mujoco.mjtRndFlag.mjRND_SHADOW] = 0  # a second pass over all triangles
    return renderer


def _no_renderer(error: Exception) -> ConfigError:
    why = (
        f'MuJoCo cannot render ({error}): start Python with MUJOCO_GL=egl after apt install '
        'libegl1 libegl-mesa0 libgl1-mesa-dri, or with MUJOCO_GL=osmesa after apt install '
        'libosmesa6'
    )
    return ConfigError('MUJOCO_GL', os.environ.get('MUJOCO_GL'), why)


def _import_simulator() -> tuple[Any, str, Any]:
    """LIBERO's benchmark module, its folder of tasks, and the class of its environments."""
    # Software rendering with a thread per core is slower than with one for images of this size.
    os.environ.setdefault('LP_NUM_THREADS', '1')
    os.environ.setdefault('MUJOCO_GL', 'egl')  # mujoco reads it when it is first imported
    logging.getLogger('robosuite_logs').setLevel(logging.ERROR)
    try:
        with _quiet():
            libero = importlib.import_module('libero.libero')
            benchmark = importlib.import_module('libero.libero.benchmark')
            wrapper = importlib.import_module('libero.libero.envs.env_wrapper')
    except ImportError as error:
        package = (error.name or 'libero').partition('.')[0]
        raise MissingDependencyError(package, 'the simulator', INSTALL, error) from error
    except AttributeError as error:  # PyOpenGL, where a library that it wraps is missing
        raise _no_renderer(error) from error
    return benchmark, libero.get_libero_path('bddl_files'), wrapper.ControlEnv


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """LIBERO prints what is no news."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield


@contextlib.contextmanager
def _numpy_seed(seed: int) -> Iterator[None]:
    """LIBERO draws from NumPy's global generator; the caller's is given back."""
    before = np.random.get_state()
    np.random.seed(seed)
    try:
        yield
    finally:
        np.random.set_state(before)
