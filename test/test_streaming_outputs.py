"""From actions to targets and back: spaces, units, grippers; what several chunks say at once."""

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from streaming_world import (
    CARTESIAN_ROBOT,
    DT,
    HORIZON,
    JOINT_ROBOT,
    JOINTS,
    World,
    ramp,
    steps,
)  # fmt: skip

from specprune_ros.streaming.rotation import between, compose, from_rotation_vector

DT_S = DT / 1e9
METRIC = {
    'robot.action_units': ['m', 'm', 'm', 'rad', 'rad', 'rad', '1'],
    'stream.translation_unit_m': 0.0,
    'stream.rotation_unit_rad': 0.0,
}


def only(world: World, rows: object):
    """The first command of a chunk."""
    assert world.put(rows), world.messages
    (command,) = world.tick()
    return command


# Joints ----------------------------------------------------------------------------------------


def joint_world(space: str, **changes) -> World:
    limits = {'limits__velocity_max': [10.0], **changes}
    return World({**JOINT_ROBOT, 'robot.action_space': space}, **limits)


@pytest.mark.parametrize(
    ('space', 'scale'), [('joint_delta', 1.0), ('joint_velocity', DT_S)]
)  # fmt: skip
def test_relative_joint_actions_add_up_from_the_measured_state(space, scale):
    world = joint_world(space)
    world.joints[:] = (0.1, -0.2, 0.3)
    world.refresh()
    row = np.array([0.01, 0.02, -0.03, 0.5])
    world.put(row)
    start = world.joints.copy()
    world.joints = world.joints + 0.004  # a measured state that lags does not shorten the motion
    commands = world.tick(3)
    for count, command in enumerate(commands, 1):
        base = start + 0.004
        assert np.allclose(command.target.positions, base + count * scale * row[:3])
        assert np.allclose(command.executed.data, row)


def test_a_joint_target_is_reached_one_control_period_later():
    command = only(World(), ramp(0.01))
    assert command.target.names == JOINTS
    assert command.target.duration_s == pytest.approx(DT_S)
    assert command.gripper is None


def test_executed_action_says_what_it_is():
    world = World()
    executed = only(world, ramp(0.01)).executed
    assert (executed.chunk_id, executed.epoch, executed.step) == (1, world.epoch, 0)
    assert executed.units == ('rad', 'rad', 'rad', '1')
    assert executed.space == 0
    assert executed.frame_id == 'base_link'
    assert executed.step_dt_s == pytest.approx(DT_S)


# End effector ----------------------------------------------------------------------------------


def turn(axis: tuple, angle: float) -> np.ndarray:
    """[3, 3] by Rodrigues' formula, as a check on the quaternions."""
    x, y, z = np.array(axis) / np.linalg.norm(axis)
    k = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    return np.eye(3) + np.sin(angle) * k + (1 - np.cos(angle)) * k @ k


def matrix(quaternion: np.ndarray) -> np.ndarray:
    x, y, z, w = quaternion
    return np.array([
        [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
        [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
        [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
    ])  # fmt: skip


ANGLES = st.floats(-3.0, 3.0)
VECTORS = st.tuples(ANGLES, ANGLES, ANGLES).filter(lambda v: np.linalg.norm(v) > 1e-9)


@settings(max_examples=50)
@given(VECTORS, VECTORS)
def test_rotations_compose_as_matrices_do(left, right):
    a, b = from_rotation_vector(left), from_rotation_vector(right)
    product = compose(a, b)
    assert np.linalg.norm(product) == pytest.approx(1.0)
    wanted = turn(left, np.linalg.norm(left)) @ turn(right, np.linalg.norm(right))
    assert np.allclose(matrix(product), wanted, atol=1e-9)


@given(VECTORS, VECTORS)
def test_the_rotation_between_two_orientations_leads_from_one_to_the_other(left, right):
    start, end = from_rotation_vector(left), from_rotation_vector(right)
    for sign in (1.0, -1.0):  # q and -q are the same orientation
        way = between(start, sign * end)
        assert np.linalg.norm(way) <= np.pi + 1e-9
        reached = compose(from_rotation_vector(way), start)
        assert abs(float(reached @ end)) == pytest.approx(1.0, abs=1e-9)


@given(st.floats(0.0, 1e-5))
def test_small_rotations_keep_their_digits(angle):
    assert from_rotation_vector((angle, 0.0, 0.0))[0] == pytest.approx(
        np.sin(angle / 2), rel=1e-12
    )


def test_a_pose_moves_in_the_robots_frame():
    """Translation is added; rotation is applied after the orientation, about the robot's axes."""
    world = World(CARTESIAN_ROBOT)
    start = turn((0, 0, 1), 0.7)
    world.quaternion = from_rotation_vector((0, 0, 0.7))
    world.refresh()
    command = only(world, [1.0, 0, -0.5, 0.2, 0, 0, 1.0])
    assert np.allclose(command.target.position - world.position, [0.05, 0.0, -0.025])
    assert np.allclose(
        matrix(command.target.quaternion_xyzw), turn((1, 0, 0), 0.1) @ start, atol=1e-9
    )
    assert command.target.frame_id == 'base_link'
    assert np.allclose(command.executed.data, [1.0, 0, -0.5, 0.2, 0, 0, 1.0])


def test_poses_add_up_from_the_command_before():
    world = World(CARTESIAN_ROBOT)
    world.put([0.2, 0, 0, 0, 0, 0, 0])
    commands = world.tick(4)
    moved = [command.target.position[0] - 0.4 for command in commands]
    assert np.allclose(moved, 0.01 * np.arange(1, 5))


@pytest.mark.parametrize(
    ('changes', 'row', 'linear', 'angular'),
    [
        ({}, [0.5, 0, 0, 0, 0, 0.1, 0], [0.5, 0, 0], [0, 0, 1.0]),
        (METRIC, [0.01, 0, 0, 0, 0, 0.02, 0], [0.2, 0, 0], [0, 0, 0.4]),
        ({'robot.action_space': 'eef_twist'}, [0.5, 0, 0, 0, 0, 0.1, 0], [0.5, 0, 0], [0, 0, 1.0]),
        (
            {**METRIC, 'robot.action_space': 'eef_twist'},
            [0.2, 0, 0, 0, 0, 0.4, 0], [0.2, 0, 0], [0, 0, 0.4],
        ),
        ({'stream.twist': 'unitless'}, [0.5, 0, 0, 0, 0, 0.1, 0], [0.5, 0, 0], [0, 0, 0.1]),
        (
            {
                'stream.twist': 'unitless', 'stream.translation_unit_m': 0.0,
                'stream.rotation_unit_rad': 0.0,
            },
            [0.5, 0, 0, 0, 0, 0.1, 0], [0.5, 0, 0], [0, 0, 0.1],
        ),
    ],
)  # fmt: skip
def test_twists(changes, row, linear, angular):
    world = World({**CARTESIAN_ROBOT, 'stream.output': 'twist', **changes})
    command = only(world, row)
    assert np.allclose(command.target.linear, linear)
    assert np.allclose(command.target.angular, angular)
    assert np.allclose(command.executed.data, row)


def test_a_unitless_twist_stays_within_one():
    base = {**CARTESIAN_ROBOT, 'stream.output': 'twist', 'stream.twist': 'unitless'}
    world = World(base)
    assert not world.put([1.1, 0, 0, 0, 0, 0, 0])
    assert world.faults == ['velocity_limit']
    command = only(World(base, limits__policy='clamp'), [1.1, 0, 0, 0, 0, -7, 0])
    assert np.allclose(command.target.linear, [1.0, 0, 0])
    assert np.allclose(command.target.angular, [0, 0, -1.0])


def test_a_pose_from_speeds():
    world = World({**CARTESIAN_ROBOT, **METRIC, 'robot.action_space': 'eef_twist'})
    command = only(world, [0.2, 0, 0, 0, 0, 0, 0])
    assert np.allclose(command.target.position - world.position, [0.01, 0, 0])


# Grippers --------------------------------------------------------------------------------------

GRIPPER = {
    'stream__gripper': 'position',
    'stream__gripper_closed': 1.0,
    'stream__gripper_open': -1.0,
    'stream__gripper_closed_position': 0.0,
    'stream__gripper_open_position': 0.04,
}


@pytest.mark.parametrize(
    ('value', 'position', 'sent'),
    [(-1.0, 0.04, -1.0), (1.0, 0.0, 1.0), (0.0, 0.02, 0.0), (9.0, 0.0, 1.0), (-9.0, 0.04, -1.0)],
)
def test_gripper_positions(value, position, sent):
    command = only(World(CARTESIAN_ROBOT, **GRIPPER), [0, 0, 0, 0, 0, 0, value])
    assert command.gripper == pytest.approx((position,))
    assert command.executed.data[-1] == pytest.approx(sent)


def test_a_gripper_that_is_not_commanded_is_left_as_it_is():
    command = only(World(CARTESIAN_ROBOT), [0, 0, 0, 0, 0, 0, -1.0])
    assert command.gripper is None
    assert command.executed.data[-1] == -1.0


def test_a_gripper_among_the_joints():
    world = World(**{**GRIPPER, 'stream__gripper': 'joint'})
    command = only(world, [0.01, 0.0, 0.0, 1.0])
    assert command.target.names == (*JOINTS, 'gripper')
    assert np.allclose(command.target.positions, [0.01, 0, 0, 0.0])
    assert command.gripper is None
    # It keeps gripping when streaming ends, whatever its measured position is.
    world.joints[0] = 0.01
    world.measure()
    (safety,) = world.order('pause', True)
    assert np.allclose(safety.target.positions, [0.01, 0, 0, 0.0])


def test_no_gripper_is_moved_by_a_stop_before_the_first_command():
    world = World(**{**GRIPPER, 'stream__gripper': 'joint'})
    world.put(ramp(0.01))
    (safety,) = world.order('pause', True)
    assert len(safety.target.positions) == 0


# Blending --------------------------------------------------------------------------------------


def ensemble(decay: float = 0.1, **changes) -> World:
    return World(stream__blending='ensemble', stream__ensemble_decay=decay, **changes)


def grippers(command) -> float:
    return command.executed.data[-1]


def test_ensemble_averages_what_the_chunks_say_about_a_step():
    world = ensemble(decay=0.1)
    world.put(ramp(0.0, start=0.01))
    world.tick(2)
    observed = world.now
    world.tick()
    world.put(ramp(0.0, start=0.03), observation_stamp_ns=observed)
    (command,) = world.tick()
    old, new = 1.0, np.exp(-0.1)  # the oldest weighs most
    assert np.allclose(command.target.positions, (old * 0.01 + new * 0.03) / (old + new))
    assert (command.executed.chunk_id, command.executed.step) == (2, 1)


def test_ensemble_goes_on_with_the_chunks_that_are_left():
    world = ensemble()
    world.put(ramp(0.0, start=0.01))
    world.tick(2)
    observed = world.now
    world.tick()
    world.put(ramp(0.0, start=0.03), observation_stamp_ns=observed)
    commands = world.tick(HORIZON - 1)
    assert len(commands) == HORIZON - 1
    assert np.allclose(commands[-1].target.positions, 0.03)  # the older one is used up
    assert steps(commands) == [(2, row) for row in range(1, HORIZON)]


def test_a_chunk_that_is_too_old_leaves_the_ensemble():
    world = ensemble(stream__command_timeout_s=0.3)
    world.put(ramp(0.0, start=0.01), latency=3 * DT)
    world.tick(2)
    world.put(ramp(0.0, start=0.03), observation_stamp_ns=world.now - DT // 2)
    commands = world.tick(3)
    assert not np.allclose(commands[0].target.positions, 0.03)
    assert np.allclose(commands[1].target.positions, 0.03)


@pytest.mark.parametrize('decay', [0.0, 0.01, 100.0])
def test_grippers_are_never_averaged(decay):
    world = ensemble(decay)
    rows = ramp(0.0)
    rows[:, 3] = 1.0
    world.put(rows)
    world.tick(2)
    observed = world.now
    world.tick()
    world.put(rows * [1, 1, 1, -1], observation_stamp_ns=observed)
    assert grippers(world.tick()[0]) == -1.0


@settings(max_examples=40, deadline=None)
@given(st.floats(0.0, 5.0), st.lists(st.floats(-0.05, 0.05), min_size=3, max_size=3))
def test_an_ensemble_stays_among_its_chunks(decay, values):
    world = ensemble(decay)
    for value in values:
        observed = world.now
        world.put(ramp(0.0, start=value), observation_stamp_ns=observed)
        (command,) = world.tick()
        sent = command.target.positions
        assert (sent >= min(values) - 1e-12).all()
        assert (sent <= max(values) + 1e-12).all()


@pytest.mark.parametrize('space', ['joint_delta', 'joint_velocity'])
def test_deltas_can_be_averaged(space):
    base = {**JOINT_ROBOT, 'robot.action_space': space}
    world = World(
        base, stream__blending='ensemble', stream__ensemble_decay=0.0, limits__velocity_max=[10.0]
    )
    world.put(np.full(4, 0.02))
    world.tick(2)
    observed = world.now
    world.tick()
    world.put(np.full(4, 0.04), observation_stamp_ns=observed)
    assert np.allclose(world.tick()[0].executed.data[:3], 0.03)


@pytest.mark.parametrize('blending', ['replace', 'ensemble'])
@pytest.mark.parametrize('policy', ['reject', 'clamp'])
@settings(max_examples=20, deadline=None)
@given(offsets=st.lists(st.floats(-0.3, 0.3), min_size=1, max_size=5))
def test_the_jump_at_a_seam_is_bounded(blending, policy, offsets):
    world = World(stream__blending=blending, limits__policy=policy, limits__max_step=[0.03])
    for offset in offsets:
        observed = world.now
        world.put(ramp(0.01, start=offset), observation_stamp_ns=observed)
        world.tick(3)
        if world.commands:
            world.joints = world.commands[-1].target.positions
    sent = np.array([world.joints * 0] + [c.target.positions for c in world.commands])
    assert (np.abs(np.diff(sent, axis=0)) <= 0.03 + 2e-9).all()


@pytest.mark.parametrize('blending', ['replace', 'ensemble'])
def test_an_unsafe_blend_is_refused_before_it_is_executed(blending):
    world = World(stream__blending=blending, limits__max_step=[0.03])
    world.put(ramp(0.0))
    world.tick(2)
    observed = world.now
    world.tick()
    rows = ramp(0.0)
    rows[4:] = 0.2
    assert not world.put(rows, observation_stamp_ns=observed)
    assert world.faults == ['step_limit']
    world.tick(2)
    assert {chunk for chunk, _ in steps(world.commands)} == {1}


# Speed -----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize('base', [JOINT_ROBOT, CARTESIAN_ROBOT])
def test_a_tick_takes_less_than_200_microseconds(base):
    limits = {'limits__velocity_max': [1.0], 'limits__policy': 'clamp'}
    world = World(base, robot__horizon=200, stream__command_timeout_s=60.0, **limits)
    best = np.inf
    for _ in range(5):
        world.put()
        taken = []
        for _ in range(150):
            world.now += DT
            world.refresh()
            start = time.perf_counter()
            outputs = world.streamer.tick(world.now)
            taken.append(time.perf_counter() - start)
            assert len(outputs) == 1
        best = min(best, float(np.median(taken)))
    assert best < 200e-6
