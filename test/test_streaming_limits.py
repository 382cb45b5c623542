"""Limits: what is refused, what is clamped, and that nothing beyond them ever leaves."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from streaming_world import (
    CARTESIAN_ROBOT,
    DT,
    HORIZON,
    JOINT_ROBOT,
    World,
    config_of,
    ramp,
    steps,
)  # fmt: skip

from specprune_ros.config_files import load_config
from specprune_ros.errors import ConfigError
from specprune_ros.models import MODELS
from specprune_ros.streaming.config import StreamerConfig
from specprune_ros.streaming.limits import Limits
from specprune_ros.streaming.streamer import Safety

DT_S = DT / 1e9
BOX = {'limits__position_min': [-0.5], 'limits__position_max': [0.5]}
SPEED = {'limits__velocity_max': [1.0]}  # 0.05 rad per control period
STEP = {'limits__max_step': [0.03]}
CLAMP = {'limits__policy': 'clamp'}


def target(world: World) -> np.ndarray:
    (command,) = world.tick()
    return command.target.positions


# Reject ----------------------------------------------------------------------------------------


def last_row(value: float) -> np.ndarray:
    """[L, A] rest, and a last row that only j2 leaves."""
    rows = np.zeros((HORIZON, 4))
    rows[-1, 1] = value
    return rows


@pytest.mark.parametrize(
    ('limits', 'rows', 'code'),
    [
        (BOX, ramp(0.09), 'position_limit'),
        (BOX, -ramp(0.09), 'position_limit'),
        (SPEED, ramp(0.051), 'velocity_limit'),
        (STEP, ramp(0.031), 'step_limit'),
        (SPEED, last_row(0.06), 'velocity_limit'),
        (STEP, last_row(0.04), 'step_limit'),
        ({}, ramp(0.0, start=0.11), 'initial_step'),
    ],
)
def test_a_chunk_with_one_row_beyond_a_limit_is_refused_whole(limits, rows, code):
    world = World(**limits)
    assert not world.put(rows)
    assert world.faults == [code]
    assert world.tick(2) == []
    assert world.put()


@pytest.mark.parametrize('limits', [BOX, SPEED, STEP])
def test_rows_at_a_limit_pass(limits):
    world = World(**limits)
    assert world.put(ramp(0.03))
    world.tick(HORIZON)
    assert len(world.commands) == HORIZON
    assert world.faults == []


def test_refusals_are_counted_per_element():
    world = World(**STEP)
    world.put(last_row(1.0))
    assert world.streamer.rejected.tolist() == [0, 1, 0, 0]
    assert 'j2' in world.messages[0]
    assert world.streamer.clamped.tolist() == [0, 0, 0, 0]


def test_a_jump_at_the_seam_is_refused_and_the_old_chunk_goes_on():
    world = World(**STEP)
    world.put(ramp(0.02))
    world.tick(2)
    observed = world.now
    world.tick()
    assert not world.put(ramp(0.02, start=0.2), observation_stamp_ns=observed)
    assert world.faults == ['step_limit']
    world.tick()
    assert steps(world.commands)[-1] == (1, 3)


def test_a_row_that_became_unreachable_ends_streaming():
    """Rows were skipped, so that the step to the next one is too long."""
    world = World(**STEP)
    world.put(ramp(0.02))
    world.tick(2)
    (safety,) = world.tick(after=3 * DT)
    assert isinstance(safety, Safety)
    assert world.faults == ['step_limit']
    assert world.streamer.rejected.tolist() == [1, 1, 1, 0]
    assert world.state == 'STALLED'


def test_deltas_add_up_to_the_position_limit():
    base = {**JOINT_ROBOT, 'robot.action_space': 'joint_delta'}
    assert World(base, **BOX).put(np.full(4, 0.06))
    world = World(base, **BOX)
    assert not world.put(np.full(4, 0.07))
    assert world.faults == ['position_limit']


@pytest.mark.parametrize('output', ['pose', 'twist'])
def test_an_end_effector_that_would_leave_its_box_is_refused(output):
    box = {'limits__position_min': [0.3, -0.1, 0.1], 'limits__position_max': [0.5, 0.1, 0.4]}
    world = World(CARTESIAN_ROBOT, stream__output=output, **box)
    up = np.array([0, 0, 0.3, 0, 0, 0, 0])  # 0.015 m per step, 0.12 m in all
    assert not world.put(up)
    assert world.faults == ['position_limit']
    assert 'z' in world.messages[0]
    assert world.put(up * 0.8)


# Clamp -----------------------------------------------------------------------------------------


def test_clamp_brings_the_element_within_and_counts_it():
    world = World(**CLAMP, **STEP)
    world.put([0.05, 0.02, -0.09, 0.5])
    assert np.allclose(target(world), [0.03, 0.02, -0.03])
    assert np.allclose(target(world), [0.05, 0.02, -0.06])
    assert world.streamer.clamped.tolist() == [1, 0, 2, 0]
    assert world.faults == ['step_limit']  # once per chunk
    assert world.streamer.rejected.tolist() == [0, 0, 0, 0]


def test_executed_is_what_was_sent_after_the_limits():
    world = World(**CLAMP, **STEP)
    world.put([0.05, 0.02, -0.09, 0.5])
    (command,) = world.tick()
    assert np.allclose(command.executed.data, [0.03, 0.02, -0.03, 0.5])


def test_the_first_command_approaches_from_the_measured_state():
    world = World(**CLAMP, limits__max_initial_step=0.02)
    world.joints[:] = (0.0, 1.0, 0.0)
    world.refresh()
    world.put(ramp(0.0))
    assert np.allclose(target(world), [0.0, 0.98, 0.0])


def test_a_clamped_position_obeys_speed_and_step_too():
    world = World(**CLAMP, **BOX, **SPEED, **STEP)
    world.joints[:] = 0.49
    world.refresh()
    world.put(ramp(1.0))
    assert np.array_equal(target(world), [0.5, 0.5, 0.5])


def test_clamp_refuses_what_no_command_can_satisfy():
    """Measured far outside the box: getting back in one step breaks the step limit."""
    world = World(**CLAMP, **BOX, **STEP)
    world.joints[0] = 0.9
    world.refresh()
    assert world.put()
    assert [type(output) for output in world.tick(2)] == [Safety]
    assert world.faults == ['position_limit']
    assert world.streamer.rejected.tolist() == [1, 0, 0, 0]


def test_a_delta_starts_from_the_command_before_not_from_what_was_wanted():
    base = {**JOINT_ROBOT, 'robot.action_space': 'joint_delta'}
    world = World(base, **CLAMP, **STEP)
    world.put(np.full(4, 0.05))
    assert np.allclose(target(world), 0.03)
    world.joints[:] = 0.01  # the arm lags
    assert np.allclose(target(world), 0.06)


def test_a_twist_is_clamped_at_the_edge_of_the_box():
    box = {'limits__position_min': [-1.0], 'limits__position_max': [1.0, 1.0, 0.31]}
    world = World(CARTESIAN_ROBOT, stream__output='twist', **CLAMP, **box)
    world.put([0.1, 0, 1, 0, 0, 0, 0])
    (command,) = world.tick()
    assert np.allclose(command.target.linear, [0.1, 0.0, 0.2])  # 0.01 m in 0.05 s
    assert np.allclose(command.executed.data[:3], [0.1, 0.0, 0.2])
    assert world.streamer.clamped.tolist() == [0, 0, 1, 0, 0, 0, 0]


def test_the_first_pose_is_near_the_measured_one():
    world = World(CARTESIAN_ROBOT, **CLAMP, limits__max_initial_step=0.02)
    world.put([0.6, 0.8, 0, 0, 0, 0, 0])  # 0.05 m
    (command,) = world.tick()
    assert np.allclose(command.target.position - world.position, [0.012, 0.016, 0])


# Properties ------------------------------------------------------------------------------------

SMALL = st.floats(-2.0, 2.0)
WIDE = st.floats(0.001, 1.0)


@given(
    move=st.lists(SMALL, min_size=3, max_size=3),
    at=st.lists(SMALL, min_size=3, max_size=3),
    box=st.tuples(SMALL, WIDE),
    speed=WIDE,
    step=WIDE,
    initial=WIDE,
    first=st.booleans(),
    cartesian=st.booleans(),
)
def test_what_clamp_returns_breaks_no_limit(move, at, box, speed, step, initial, first, cartesian):
    limits = Limits(
        low=np.full(3, box[0]), high=np.full(3, box[0] + box[1]), speed_step=np.full(3, speed),
        max_step=np.full(3, step), initial=initial, cartesian=cartesian,
    )  # fmt: skip
    move, at = np.array(move), np.array(at)
    allowed = limits.clamp(move, at, first=first)
    if allowed is None:
        assert limits.outside(at).any()
        reach = np.full(3, min(speed, step, initial) if first else min(speed, step))
        inside = np.minimum(np.maximum(at, limits.low), limits.high) - at
        assert (first and cartesian) or (np.abs(inside) > reach).any()
        return
    assert not limits.violations(allowed[None], (at + allowed)[None], first=first)
    if not limits.violations(move[None], (at + move)[None], first=first):
        assert np.allclose(allowed, move, atol=1e-8)


ROWS = st.lists(
    st.lists(st.floats(-0.4, 0.4), min_size=4, max_size=4), min_size=HORIZON, max_size=HORIZON
)


@pytest.mark.parametrize('policy', ['clamp', 'reject'])
@pytest.mark.parametrize('space', ['joint_position', 'joint_delta', 'joint_velocity'])
@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_no_joint_command_is_ever_beyond_a_limit(policy, space, data):
    limits = {
        'limits__position_min': [-0.2], 'limits__position_max': [0.15, 0.2, 0.25, 0.0],
        'limits__velocity_max': [1.0], 'limits__max_step': [0.2, 0.03, 0.2, 0.2],
        'limits__max_initial_step': 0.04,
    }  # fmt: skip
    base = {**JOINT_ROBOT, 'robot.action_space': space}
    world = World(base, limits__policy=policy, **limits)
    low, high = np.full(3, -0.2), np.array([0.15, 0.2, 0.25])
    step, before = np.array([0.05, 0.03, 0.05]), None
    scale = data.draw(st.sampled_from([0.05, 0.5, 1.0, 50.0]))
    for _ in range(4):
        world.put(scale * np.array(data.draw(ROWS)), latency=data.draw(st.integers(0, 3)) * DT)
        for _ in range(data.draw(st.integers(1, HORIZON))):
            for output in world.tick(after=data.draw(st.sampled_from([DT, DT // 3, 2 * DT]))):
                if isinstance(output, Safety):
                    before = None
                    continue
                sent = output.target.positions
                assert ((low <= sent) & (sent <= high)).all()
                assert (
                    np.abs(sent - (world.joints if before is None else before)) <= step + 2e-9
                ).all()
                if before is None:
                    assert (np.abs(sent - world.joints) <= 0.04 + 2e-9).all()
                assert world.joints.shape == sent.shape
                before = sent
                world.joints = sent + data.draw(st.floats(-0.005, 0.005))


# Configuration ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ('base', 'changes', 'field'),
    [
        (JOINT_ROBOT, {'limits__velocity_max': [1.0, 1.0]}, 'limits.velocity_max'),
        (JOINT_ROBOT, {'limits__max_step': [1.0] * 3}, 'limits.max_step'),
        (CARTESIAN_ROBOT, {**BOX, 'limits__position_min': [0.0] * 7}, 'limits.position_min'),
        (JOINT_ROBOT, {'limits__position_min': [0.0]}, 'limits.position_max'),
        (JOINT_ROBOT, {**BOX, 'limits__position_min': [0.6]}, 'limits.position_min'),
        (JOINT_ROBOT, {'stream__blending': 'frozen_prefix'}, 'stream.blending'),
        (JOINT_ROBOT, {'stream__output': 'pose'}, 'stream.output'),
        (CARTESIAN_ROBOT, {'stream__gripper': 'joint'}, 'stream.gripper'),
        (
            CARTESIAN_ROBOT,
            {'stream__gripper': 'position', 'robot__gripper_names': ['']},
            'stream.gripper',
        ),
    ],
)
def test_limits_and_outputs_that_do_not_fit(base, changes, field):
    with pytest.raises(ConfigError) as caught:
        config_of(base, **changes)
    assert caught.value.field == field


def test_a_frozen_prefix_is_refused_by_the_names_of_the_models():
    with pytest.raises(ConfigError) as caught:
        config_of(JOINT_ROBOT, stream__blending='frozen_prefix')
    published = [name for name, module in MODELS.items() if module.endswith('_checkpoint')]
    assert published
    for name in published:
        assert name in str(caught.value)


@pytest.mark.parametrize(
    ('changes', 'field'),
    [
        ({'stream__translation_unit_m': 0.0}, 'stream.translation_unit_m'),
        ({'stream__rotation_unit_rad': 0.0}, 'stream.rotation_unit_rad'),
        ({'robot__action_units': ['rad']}, 'robot.action_units'),
        ({'robot__gripper_names': ['']}, 'robot.action_names'),
        ({'robot__translation_names': [''], 'robot__rotation_names': ['']}, 'robot.action_names'),
        (
            {
                'stream__output': 'twist', 'stream__twist': 'unitless',
                'stream__translation_unit_m': 0.0, **SPEED,
            },
            'stream.translation_unit_m',
        ),
        (
            {
                'stream__output': 'twist', 'stream__twist': 'unitless',
                'robot__action_units': ['m', 'm', 'm', 'rad', 'rad', 'rad', '1'],
            },
            'robot.action_units',
        ),
    ],
)  # fmt: skip
def test_actions_whose_size_is_not_known(changes, field):
    with pytest.raises(ConfigError) as caught:
        World(CARTESIAN_ROBOT, **changes)
    assert caught.value.field == field


def test_a_robot_of_grippers_only_has_nothing_to_stream():
    with pytest.raises(ConfigError, match='no joint'):
        World({**JOINT_ROBOT, 'robot.action_names': ['gripper'], 'robot.action_units': ['1']})


ROBOTS = (
    'aloha', 'bridge_widowx', 'flexiv_rizon4', 'libero_franka', 'libero_franka_1cam',
    'libero_franka_3cam',
)  # fmt: skip


@pytest.mark.parametrize('name', ROBOTS)
def test_shipped_robots_can_be_streamed_and_have_limits(name):
    config = load_config([f'robots/{name}'], base=StreamerConfig())
    assert config.stream.dry_run
    assert config.stream.output != 'chunk'
    assert config.limits.velocity_max
    assert config.limits.position_min or config.robot.action_space != 'joint_position'


def test_nothing_moves_without_a_limit_on_its_speed():
    with pytest.raises(ConfigError, match='velocity_max'):
        config_of(JOINT_ROBOT, stream__dry_run=False)
    for limit in ('velocity_max', 'max_step'):
        assert config_of(JOINT_ROBOT, stream__dry_run=False, **{f'limits__{limit}': [0.1]})
