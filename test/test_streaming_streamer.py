"""The streamer: which row is due, what a chunk must be, what the operator's orders do."""

import numpy as np
import pytest
from streaming_world import (
    CARTESIAN_ROBOT,
    DT,
    HORIZON,
    JOINT_ROBOT,
    JOINTS,
    MS,
    World,
    config_of,
    ramp,
    steps,
)  # fmt: skip

from specprune_ros.checks import executed_displacement
from specprune_ros.errors import ConfigError
from specprune_ros.streaming import rotation
from specprune_ros.streaming.streamer import Safety, Streamer

ARM = [0, 1, 2]


def positions(outputs) -> np.ndarray:
    return np.array([output.target.positions for output in outputs])


# Time ------------------------------------------------------------------------------------------


def test_each_row_is_executed_once_at_its_time():
    world = World()
    assert world.put(ramp(0.01))
    assert world.state == 'STREAMING'
    world.tick(HORIZON)
    assert steps(world.commands) == [(1, row) for row in range(HORIZON)]
    assert np.allclose(positions(world.commands), ramp(0.01)[:, ARM])
    stamps = [command.executed.stamp_ns for command in world.commands]
    first = world.now - (HORIZON - 1) * DT
    assert stamps == [first + row * DT for row in range(HORIZON)]


def test_nothing_is_executed_before_the_first_row_is_due():
    world = World()
    world.put(ramp(0.01))
    assert world.tick(after=DT - 1) == []
    assert len(world.tick(after=1)) == 1


@pytest.mark.parametrize('phase', [0, 1, DT // 2, DT - MS, DT - 1])
def test_a_timer_that_trembles_neither_skips_nor_repeats(phase):
    world = World()
    world.put(ramp(0.01))
    world.tick(after=DT + phase)
    for tremble in (MS, -MS, -MS, 2 * MS, -3 * MS, 2 * MS, -MS):
        world.tick(after=DT + tremble)
    assert steps(world.commands) == [(1, row) for row in range(HORIZON)]


def test_ticks_between_control_steps_do_nothing():
    world = World()
    world.put(ramp(0.01))
    for _ in range(5 * HORIZON):
        world.tick(after=DT // 5)
    rows = [row for _, row in steps(world.commands)]
    assert rows == list(range(HORIZON))


def test_rows_that_are_past_are_dropped():
    world = World()
    world.put(ramp(0.01))
    world.tick()
    world.tick(after=3 * DT)
    world.tick()
    assert steps(world.commands) == [(1, 0), (1, 3), (1, 4)]


def test_a_timer_that_is_too_slow_falls_no_further_behind_than_half_a_period():
    world = World()
    world.put(ramp(0.01))
    start = world.now
    world.tick(after=DT)
    world.tick(4, after=14 * DT // 10)
    assert world.state == 'STREAMING'
    for command in world.commands:
        due = (command.executed.stamp_ns - start) / DT - 1
        assert due - 1.5 <= command.executed.step <= due


def test_no_two_commands_in_half_a_control_period():
    """Even when a chunk claims that its rows were for long ago."""
    world = World()
    world.put(ramp(0.01))
    world.tick()
    world.now += DT // 5
    assert world.put(ramp(0.01), stamp_ns=world.now - 2 * DT)
    assert world.tick(after=DT // 5) == []
    assert len(world.tick(after=DT // 2)) == 1


def test_a_chunk_for_much_later_does_not_keep_the_arm_waiting():
    world = World(robot__step_dt_s=0.01)
    world.put(ramp(0.001))
    world.tick(HORIZON, after=10 * MS)
    assert world.put(ramp(0.001), stamp_ns=world.now + 90 * MS)
    world.tick(2, after=10 * MS)
    assert world.state == 'STREAMING'
    world.tick(2, after=10 * MS)
    assert [s.reason for s in world.safeties] == ['starved']


def test_a_chunk_that_was_published_long_ago_starts_where_its_stamp_says():
    world = World()
    chunk = world.chunk(ramp(0.01))
    world.now += 3 * DT
    world.refresh()
    assert world.streamer.put_chunk(chunk, world.now)
    world.tick()
    assert steps(world.commands) == [(1, 3)]


def test_a_slow_first_inference_drops_no_row():
    world = World()
    assert world.put(ramp(0.01), latency=20 * DT)
    world.tick()
    assert steps(world.commands) == [(1, 0)]


def test_a_chunk_starts_after_the_rows_executed_since_its_observation():
    world = World()
    world.put(ramp(0.01))
    world.tick(3)
    observed = world.now  # after row 2
    world.tick(2)
    assert world.put(ramp(0.01, start=0.03), observation_stamp_ns=observed)
    world.tick(2)
    assert steps(world.commands)[-3:] == [(1, 4), (2, 2), (2, 3)]
    # The same motion goes on without a jump.
    assert np.allclose(np.diff(positions(world.commands), axis=0), 0.01)


def test_a_command_that_had_no_effect_yet_counts_as_executed():
    """Bug: of an arm that takes a step to obey, the observation shows one row less than was sent:
    that row was sent twice, once from each chunk, and all later ones came a step late."""
    world = World(stream__command_latency_s=DT / 1e9)
    world.put(ramp(0.01))
    world.tick(3)
    world.now += DT // 2
    observed = world.now  # row 2 is on its way; what is seen are rows 0 and 1
    world.tick(after=DT // 2)
    assert world.put(ramp(0.01, start=0.02), observation_stamp_ns=observed)
    world.tick(2)
    assert steps(world.commands)[-4:] == [(1, 2), (1, 3), (2, 2), (2, 3)]
    assert np.allclose(np.diff(positions(world.commands), axis=0), 0.01)


def stop_for_a_moment(world: World) -> None:
    world.order('pause', True)
    world.order('pause', False)
    world.now += DT // 2
    world.refresh()


@pytest.mark.parametrize('latency', [1, 4, 7])
def test_a_stop_overtakes_the_commands_that_are_on_their_way(latency):
    """Bug: the first chunk after it began with a later row, as if they had still had an effect."""
    world = World(stream__command_latency_s=latency * DT / 1e9)
    world.put(ramp(0.01))
    world.tick(5)
    stop_for_a_moment(world)
    assert world.put(ramp(0.01))
    world.tick()
    assert steps(world.commands)[-1] == (2, 0)


def test_a_new_task_begins_with_the_first_row_whatever_was_on_its_way():
    world = World(stream__command_latency_s=4 * DT / 1e9)
    world.put(ramp(0.01))
    world.tick(5)
    world.epoch += 1
    world.refresh()
    world.tick()
    assert world.safeties[-1].reason == 'task_ended'
    assert world.put(ramp(0.01))
    world.tick()
    assert steps(world.commands)[-1] == (2, 0)


def test_after_a_stop_the_first_row_is_in_reach_of_the_measured_state():
    """Bug: the rows that were skipped made it too far, and the chunk was refused."""
    world = World(
        stream__command_latency_s=4 * DT / 1e9, limits__policy='reject', limits__max_step=[0.02]
    )
    world.put(ramp(0.01))
    world.tick(5)
    stop_for_a_moment(world)
    assert world.put(ramp(0.01)), world.messages


def test_rows_on_their_way_count_again_after_a_stop():
    world = World(stream__command_latency_s=DT / 1e9)
    world.put(ramp(0.01))
    world.tick(2)
    world.order('pause', True)
    world.order('pause', False)
    world.put(ramp(0.01))
    world.tick(3)
    world.now += DT // 2
    observed = world.now
    world.tick(after=DT // 2)
    assert world.put(ramp(0.01), observation_stamp_ns=observed)
    world.tick()
    assert steps(world.commands)[-2:] == [(2, 3), (3, 2)]


def test_a_stop_does_not_undo_what_had_its_effect():
    """Bug: a chunk that came late began with the row that had been executed before it starved."""
    world = World(stream__command_latency_s=DT / 1e9)
    world.put(ramp(0.01))
    world.tick(8)
    observed = world.now + DT // 2
    world.tick(3)
    assert world.safeties[-1].reason == 'starved'
    assert world.put(ramp(0.01), observation_stamp_ns=observed)
    world.tick()
    assert steps(world.commands)[-1] == (2, 1)


def test_where_no_stop_is_sent_what_is_on_its_way_goes_on():
    world = World(stream__command_latency_s=4 * DT / 1e9, stream__on_stall='none')
    world.put(ramp(0.01))
    world.tick(5)
    stop_for_a_moment(world)
    assert world.put(ramp(0.01))
    world.tick()
    assert steps(world.commands)[-1] == (2, 4)


@pytest.mark.parametrize('dt_s', [0.05, 0.1, 0.3])
def test_a_latency_as_long_as_a_chunk_is_refused(dt_s):
    for horizon in (1, 3, 6, 7, 8):
        changes = {'robot__step_dt_s': dt_s, 'robot__horizon': horizon}
        for rows in (horizon, horizon - 0.5):
            latency_s = rows * dt_s
            if latency_s <= 1.0:
                with pytest.raises(ConfigError, match=r'stream\.command_latency_s'):
                    World(stream__command_latency_s=latency_s, **changes)
        if (horizon - 1) * dt_s <= 1.0:
            World(stream__command_latency_s=(horizon - 1) * dt_s, **changes)


def test_rows_are_dropped_for_executed_steps_not_for_time():
    """Three control periods of latency, but the timer slept: only one row was executed."""
    world = World()
    world.put(ramp(0.01))
    world.tick(2)
    observed = world.now
    world.tick(after=2 * DT)
    world.now += DT
    world.refresh()
    world.put(ramp(0.01, start=0.02), observation_stamp_ns=observed)
    world.tick()
    assert steps(world.commands)[-1] == (2, 1)


def test_the_old_chunk_serves_until_the_new_one_is_due():
    world = World()
    world.put(ramp(0.01))
    world.tick(2)
    world.now += DT // 2
    world.put(ramp(0.01, start=0.02))  # observed and published within one control period
    world.tick(after=DT // 2)
    world.tick(2)
    assert steps(world.commands) == [(1, 0), (1, 1), (1, 2), (2, 1), (2, 2)]


def test_no_command_is_older_than_the_timeout():
    world = World(stream__command_timeout_s=0.3)
    assert world.put(ramp(0.01), latency=2 * DT)
    world.tick(HORIZON)
    ages = [world.now - (HORIZON - 1 - row) * DT for row in range(4)]
    assert [c.executed.stamp_ns for c in world.commands] == ages
    assert [s.reason for s in world.safeties] == ['chunk_stale']
    assert not world.put(ramp(0.01), latency=7 * DT)
    assert world.faults == ['chunk_stale', 'chunk_stale']


def test_a_chunk_is_not_started_after_valid_for():
    world = World()
    chunk = world.chunk(ramp(0.01), valid_for_s=0.12)
    world.now += 3 * DT
    world.refresh()
    assert not world.streamer.put_chunk(chunk, world.now)
    taken = World()
    taken.put(ramp(0.01), valid_for_s=0.12)
    taken.tick(after=3 * DT)
    assert taken.commands == []
    assert [s.reason for s in taken.safeties] == ['chunk_stale']


@pytest.mark.parametrize('late_ms', [0, 1, 20, 49])
@pytest.mark.parametrize('horizon', [1, 2, HORIZON])
def test_the_last_row_of_a_chunk_may_be_its_first(horizon, late_ms):
    """Bug: of a model with one action per query nothing went out, unless a tick met its stamp."""
    world = World(robot__horizon=horizon)
    assert world.put(0.0)
    world.tick(after=horizon * DT + late_ms * MS)
    assert steps(world.commands) == [(1, horizon - 1)]


@pytest.mark.parametrize('field', ['stamp_ns', 'observation_stamp_ns'])
def test_a_chunk_from_the_future_is_refused(field):
    world = World()
    assert not world.put(**{field: world.now + 200 * MS})
    assert world.faults == ['chunk_stamp']


def test_an_older_observation_than_that_of_the_chunk_before_is_refused():
    world = World()
    world.put(ramp(0.01), latency=DT)
    assert not world.put(ramp(0.01), latency=2 * DT)
    assert world.faults == ['chunk_stale']
    world.tick()
    assert steps(world.commands) == [(1, 0)]


def test_starved_once_then_silence_then_it_streams_again():
    world = World()
    world.put(ramp(0.01))
    world.tick(HORIZON)
    world.joints += 0.08
    assert [type(output) for output in world.tick(5)] == [Safety]
    assert world.state == 'STALLED'
    assert world.faults == ['starved']
    assert world.put(ramp(0.01, start=0.08))
    assert world.state == 'STREAMING'
    world.tick()
    assert steps(world.commands)[-1] == (2, 0)
    assert len(world.safeties) == 1


# Chunks ----------------------------------------------------------------------------------------

NAMES = (*JOINTS, 'gripper')
BAD_CHUNKS = {
    'nan': ('chunk_not_finite', {'data': np.full((HORIZON, 4), np.nan)}),
    'one infinity': ('chunk_not_finite', {'data': np.where(np.eye(HORIZON, 4), np.inf, 0.0)}),
    'absurd': ('chunk_not_finite', {'data': np.full((HORIZON, 4), -1e200)}),
    'horizon': ('chunk_shape', {'data': np.zeros((HORIZON - 1, 4))}),
    'width': ('chunk_shape', {'data': np.zeros((HORIZON, 3))}),
    'flat': ('chunk_shape', {'data': np.zeros(HORIZON * 4)}),
    'missing name': ('chunk_names', {'names': NAMES[:3], 'data': np.zeros((HORIZON, 3))}),
    'extra name': ('chunk_names', {'names': (*NAMES, 'j4'), 'data': np.zeros((HORIZON, 5))}),
    'name twice': ('chunk_names', {'names': ('j1', 'j1', 'j3', 'gripper')}),
    'units': ('chunk_names', {'units': ('m', 'rad', 'rad', '1')}),
    'units missing': ('chunk_shape', {'units': ('rad',)}),
    'step_dt': ('chunk_step_dt', {'step_dt_s': 0.04}),
    'step_dt nan': ('chunk_step_dt', {'step_dt_s': float('nan')}),
    'space': ('chunk_space', {'space': 2}),
    'epoch before': ('chunk_epoch', {'epoch': 2}),
    'epoch after': ('chunk_epoch', {'epoch': 4}),
    'valid_for nan': ('chunk_stale', {'valid_for_s': float('nan')}),
}


@pytest.mark.parametrize('name', BAD_CHUNKS)
def test_a_bad_chunk_is_refused_whole(name):
    code, changes = BAD_CHUNKS[name]
    world = World()
    assert not world.put(**changes)
    assert world.faults == [code]
    assert world.streamer.fault[0] == code
    assert (world.state, world.streamer.chunks_rejected) == ('WAITING', 1)
    assert world.tick(3) == []
    assert world.put(ramp(0.01))  # the next good one serves


def test_a_bad_chunk_leaves_the_good_one_streaming():
    world = World()
    world.put(ramp(0.01))
    world.tick()
    assert not world.put(np.nan)
    world.tick(2)
    assert steps(world.commands) == [(1, 0), (1, 1), (1, 2)]


@pytest.mark.parametrize('field', ['stand_in', 'dry_run'])
def test_what_must_not_move_anything_plays_in_dry_run_only(field):
    world = World(stream__dry_run=True)
    assert world.put(ramp(0.01), **{field: True})
    world.tick()
    assert world.commands[0].executed.dry_run
    world = World(stream__dry_run=False, limits__max_step=[0.1])
    assert not world.put(ramp(0.01), **{field: True})
    assert world.faults == [f'chunk_{field}']


def test_dry_run_marks_all_outputs():
    for dry_run in (True, False):
        world = World(stream__dry_run=dry_run, limits__max_step=[0.1])
        world.put(ramp(0.01))
        world.tick(HORIZON + 1)
        assert {c.executed.dry_run for c in world.commands} == {dry_run}
        assert [s.dry_run for s in world.safeties] == [dry_run]


def test_columns_are_found_by_name():
    world = World()
    data = np.tile([0.9, 0.03, 0.01, 0.02], (HORIZON, 1))
    names = ('gripper', 'j3', 'j1', 'j2')
    assert world.put(data=data, names=names, units=('1', 'rad', 'rad', 'rad'))
    (command,) = world.tick()
    assert command.target.names == JOINTS
    assert np.allclose(command.target.positions, [0.01, 0.02, 0.03])
    assert command.executed.names == NAMES
    assert np.allclose(command.executed.data, [0.01, 0.02, 0.03, 0.9])


def test_the_frame_of_cartesian_actions_must_be_the_robots():
    world = World(CARTESIAN_ROBOT)
    assert not world.put(frame_id='tool0')
    assert world.faults == ['chunk_space']


# The measured state ----------------------------------------------------------------------------


def test_joints_are_found_by_name_and_strangers_ignored():
    world = World()
    world.streamer.put_joints(world.now, ('x', 'j3', 'j1', 'j2'), (9.0, 0.3, 0.1, 0.2), world.now)
    world.put(np.array([0.1, 0.2, 0.3, 0.0]))
    world.tick(fresh=False)
    assert world.faults == []
    assert len(world.commands) == 1


@pytest.mark.parametrize(
    ('code', 'names', 'values'),
    [
        ('joint_missing', ('j1', 'j2'), (0.0, 0.0)),
        ('joint_width', JOINTS, (0.0, 0.0)),
        ('joint_not_finite', JOINTS, (0.0, np.nan, 0.0)),
        ('joint_not_finite', JOINTS, (0.0, np.inf, 0.0)),
    ],
)
def test_a_bad_joint_state_is_ignored(code, names, values):
    world = World()
    world.streamer.put_joints(world.now, names, values, world.now)
    assert world.faults == [code]
    assert world.put(ramp(0.01))


@pytest.mark.parametrize(
    ('code', 'position', 'quaternion'),
    [
        ('pose_not_finite', (0.0, np.nan, 0.0), (0, 0, 0, 1)),
        ('pose_not_finite', (0.0, 0.0), (0, 0, 0, 1)),
        ('pose_quaternion', (0.0, 0.0, 0.0), (0, 0, 0, 0)),
        ('pose_quaternion', (0.0, 0.0, 0.0), (0, 0, 0, 2)),
    ],
)
def test_a_bad_pose_is_ignored(code, position, quaternion):
    world = World(CARTESIAN_ROBOT)
    world.streamer.put_pose(world.now, position, quaternion, 'base_link', world.now)
    assert world.faults == [code]
    assert world.put()
    (command,) = world.tick(fresh=False)
    assert np.allclose(command.target.position, world.position)


@pytest.mark.parametrize('frame_id', ['world', ''])
@pytest.mark.parametrize('output', ['pose', 'twist'])
def test_a_pose_in_another_frame_is_no_start_of_a_command(output, frame_id):
    """Bug: the numbers were taken as they came, and the arm was sent off by the transform."""
    world = World({**CARTESIAN_ROBOT, 'stream.output': output})
    world.streamer.put_pose(world.now, (5.0, 0.0, 0.0), (0, 0, 0, 1), frame_id, world.now)
    assert world.faults == ['pose_frame']
    assert repr(frame_id) in world.messages[0]
    assert "'base_link'" in world.messages[0]
    assert world.put()
    (command,) = world.tick(fresh=False)
    if output == 'pose':
        assert np.allclose(command.target.position, world.position)


def test_a_measurement_from_the_future_keeps_no_good_one_out():
    world = World()
    world.streamer.put_joints(world.now + 10**12, JOINTS, (1.0, 1.0, 1.0), world.now)
    assert world.faults == ['joint_stale']
    world.put(ramp(0.01))
    assert len(world.tick()) == 1


def test_the_newest_measurement_counts():
    world = World()
    world.streamer.put_joints(world.now - 10 * MS, JOINTS, (1.0, 1.0, 1.0), world.now)
    world.put(ramp(0.01))
    assert len(world.tick(fresh=False)) == 1


TWIST_ROBOT = {**CARTESIAN_ROBOT, 'stream.output': 'twist'}
VELOCITY_ROBOT = {
    **JOINT_ROBOT, 'robot.action_space': 'joint_velocity', 'limits.velocity_max': [1.0],
}  # fmt: skip


@pytest.mark.parametrize(
    ('base', 'code'),
    [
        (JOINT_ROBOT, 'joint'),
        (VELOCITY_ROBOT, 'joint'),
        (CARTESIAN_ROBOT, 'pose'),
        (TWIST_ROBOT, 'pose'),
        ({**TWIST_ROBOT, 'stream.twist': 'unitless'}, 'pose'),
    ],
    ids=['joints', 'joint speeds', 'pose', 'twist', 'twist unitless'],
)
def test_nothing_moves_without_a_fresh_measurement(base, code):
    world = World(base)
    world.now += 300 * MS
    world.streamer.put_peer(True, world.epoch, world.now, world.now)
    assert not world.put()
    assert world.faults == [f'{code}_stale']
    empty = World(base, enabled=False)
    empty.order('activate')
    empty.order('deactivate')
    empty.order('activate')
    empty.order('enable', True)
    empty.streamer.put_peer(True, empty.epoch, empty.now, empty.now)
    assert not empty.put()
    assert empty.faults == [f'{code}_missing']


@pytest.mark.parametrize('base', [VELOCITY_ROBOT, TWIST_ROBOT], ids=['joints', 'twist'])
def test_speeds_end_when_the_measurement_is_stale(base):
    world = World(base)
    world.put()
    world.tick(2)
    for _ in range(6):
        world.streamer.put_peer(True, world.epoch, world.now, world.now)
        world.tick(fresh=False)
    assert world.state == 'STALLED'
    assert world.faults[0].endswith('_stale')
    assert len(world.safeties) == 1


def test_streaming_ends_when_the_measurement_is_stale_and_begins_again():
    world = World()
    world.put(ramp(0.01))
    world.tick(2)
    for _ in range(6):
        world.streamer.put_peer(True, world.epoch, world.now, world.now)
        world.tick(fresh=False)
    assert world.state == 'STALLED'
    assert world.faults == ['joint_stale']
    (safety,) = world.safeties
    assert len(safety.target.positions) == 0  # where to hold is not known
    world.refresh()
    assert world.put()
    assert len(world.tick()) == 1


# vla_node --------------------------------------------------------------------------------------


def test_a_peer_that_falls_silent():
    world = World(stream__peer_timeout_s=0.3)
    world.put(ramp(0.001, horizon=HORIZON))
    for _ in range(HORIZON - 1):
        world.measure()
        world.tick(fresh=False)
    assert world.faults == ['peer_gone']
    assert [s.reason for s in world.safeties] == ['peer_gone']
    assert not world.put()
    assert world.faults == ['peer_gone', 'peer_gone']
    world.refresh()
    assert world.put()
    assert world.state == 'STREAMING'


@pytest.mark.parametrize(('running', 'epoch'), [(False, 3), (True, 4), (False, 4)])
def test_the_end_of_a_task_ends_its_chunk(running, epoch):
    world = World()
    world.put(ramp(0.01))
    world.tick(2)
    world.running, world.epoch = running, epoch
    world.refresh()
    assert world.state == 'STALLED'
    assert [type(output) for output in world.tick(3)] == [Safety]
    assert world.safeties[0].reason == 'task_ended'
    assert world.put() == running
    if running:
        assert len(world.tick()) == 1


def test_the_safety_output_comes_before_the_next_tasks_commands():
    world = World()
    world.put(ramp(0.01))
    world.tick(2)
    world.epoch += 1
    world.refresh()
    assert world.put()
    world.tick(2)
    assert [type(output).__name__ for output in world.outputs[-2:]] == ['Safety', 'Command']
    assert world.commands[-1].executed.epoch == world.epoch


def test_no_chunk_before_vla_node_said_anything():
    world = World(enabled=False)
    world.streamer.activate(world.now)
    world.order('deactivate')
    world.order('activate')
    world.order('enable', True)
    world.measure()
    assert not world.put()
    assert world.faults == ['peer_gone']


# Time that jumps -------------------------------------------------------------------------------


def test_a_clock_that_jumps_back_flushes_and_stalls():
    world = World()
    world.put(ramp(0.01))
    world.tick(2)
    world.now -= 60 * DT
    (safety,) = world.streamer.tick(world.now)
    assert safety.reason == 'clock_jump'
    # Where the arm is after the jump is not known: no position may go out.
    assert len(safety.target.positions) == 0
    assert world.state == 'STALLED'
    assert world.faults == ['clock_jump']
    assert world.tick(3) == []
    assert world.put(ramp(0.01))
    world.tick()
    assert steps(world.commands)[-1] == (2, 0)


@pytest.mark.parametrize('base', [JOINT_ROBOT, CARTESIAN_ROBOT])
def test_a_jump_seen_by_another_call_gives_its_safety_output_at_the_tick(base):
    world = World(base)
    world.put()
    world.tick()
    world.now -= 60 * DT
    world.measure()
    assert world.state == 'STALLED'
    assert [type(output) for output in world.tick(2)] == [Safety]


def test_a_small_correction_of_the_clock_is_no_jump():
    world = World()
    world.put(ramp(0.01))
    world.tick(2)
    world.streamer.tick(world.now - 5 * MS)
    world.tick()
    assert world.faults == []
    assert steps(world.commands) == [(1, 0), (1, 1), (1, 2)]


@pytest.mark.parametrize(('back_ns', 'jumped'), [(10_000_000 - 1, False), (10_000_000, True)])
def test_a_clock_that_is_set_back_by_ten_milliseconds_has_jumped(back_ns, jumped):
    world = World()
    world.put(ramp(0.01))
    world.tick(2)
    world.streamer.tick(world.now - back_ns)
    assert (world.state == 'STALLED') == jumped


def test_a_clock_that_jumps_ahead_starves():
    world = World()
    world.put(ramp(0.01))
    world.tick(2)
    world.tick(after=3600 * 10**9)
    assert world.state == 'STALLED'
    assert len(world.safeties) == 1


# Orders ----------------------------------------------------------------------------------------


def streaming(**changes) -> World:
    world = World(**changes)
    world.put(ramp(0.01))
    world.tick(2)
    assert world.state == 'STREAMING'
    return world


def test_the_way_to_motion():
    world = World(enabled=False)
    assert world.state == 'INACTIVE'
    assert not world.put(ramp(0.01))
    assert world.streamer.enable(True, world.now) == (False, 'not active', [])
    world.order('activate')
    assert world.state == 'DISABLED'
    world.refresh()
    assert not world.put(ramp(0.01))
    assert world.tick(2) == []
    world.order('enable', True)
    assert world.state == 'WAITING'
    assert world.tick(2) == []
    assert world.put(ramp(0.01))
    assert world.state == 'STREAMING'
    assert world.faults == []


def test_a_bad_chunk_is_a_fault_even_before_enable():
    world = World(enabled=False)
    world.order('activate')
    assert not world.put(np.nan)
    assert world.faults == ['chunk_not_finite']


@pytest.mark.parametrize(
    ('order', 'args', 'state', 'reason'),
    [
        ('enable', (False,), 'DISABLED', 'disabled'),
        ('pause', (True,), 'PAUSED', 'paused'),
        ('e_stop', (True,), 'STOPPED', 'e_stop'),
        ('reset', (), 'DISABLED', 'reset'),
        ('deactivate', (), 'INACTIVE', 'deactivated'),
    ],
)
def test_an_order_ends_streaming_with_one_safety_output(order, args, state, reason):
    world = streaming()
    world.joints[:] = 0.015
    world.measure()
    (safety,) = world.order(order, *args)
    assert isinstance(safety, Safety)
    assert safety.reason == reason
    assert np.allclose(safety.target.positions, 0.015)
    assert world.state == state
    assert world.streamer.queue_depth == world.streamer.chunk_id == 0
    assert not world.put(ramp(0.01))
    assert world.tick(3) == []
    assert world.order(order, *args) == [] if order != 'deactivate' else True


@pytest.mark.parametrize('order', ['enable', 'pause', 'e_stop', 'reset', 'deactivate'])
def test_no_safety_output_when_nothing_streams(order):
    args = {'enable': (False,), 'pause': (True,), 'e_stop': (True,)}.get(order, ())
    assert World().order(order, *args) == []


@pytest.mark.parametrize('order', ['enable', 'pause', 'e_stop', 'reset', 'deactivate'])
def test_an_order_after_a_stall_returns_the_safety_output_that_is_due(order):
    args = {'enable': (False,), 'pause': (True,), 'e_stop': (True,)}.get(order, ())
    world = streaming()
    world.running = False
    world.refresh()
    (safety,) = world.order(order, *args)
    assert safety.reason == 'task_ended'
    assert world.tick(2) == []


def test_resume_starts_from_the_measured_state():
    world = streaming()
    world.order('pause', True)
    assert world.streamer.enable(True, world.now)[:2] == (False, 'paused: ~/pause false first')
    world.order('pause', False)
    assert world.state == 'WAITING'
    world.joints[:] = 0.5  # somebody moved the arm meanwhile
    world.refresh()
    assert not world.put(ramp(0.01))
    assert world.faults == ['initial_step']
    assert world.put(ramp(0.01, start=0.5))
    world.tick()
    assert np.allclose(world.commands[-1].target.positions, 0.51)


def test_pause_keeps_what_was_disabled_disabled():
    world = World(enabled=False)
    world.order('activate')
    world.order('pause', True)
    assert world.state == 'PAUSED'
    world.order('pause', False)
    assert world.state == 'DISABLED'


def test_an_emergency_stop_needs_release_reset_and_enable():
    world = streaming()
    world.order('e_stop', True)
    assert world.faults == ['e_stop']
    for refused in (
        world.streamer.enable(True, world.now),
        world.streamer.pause(True, world.now),
        world.streamer.reset(world.now),
    ):
        assert refused[0] is False
        assert refused[1]
        assert refused[2] == []
    world.order('e_stop', False)
    assert world.state == 'STOPPED'
    assert world.streamer.enable(True, world.now)[0] is False
    world.order('reset')
    assert world.state == 'DISABLED'
    world.order('enable', True)
    assert world.state == 'WAITING'


def test_an_emergency_stop_outlives_deactivation():
    world = World()
    world.order('e_stop', True)
    world.order('deactivate')
    world.order('activate')
    assert world.state == 'STOPPED'


def test_an_emergency_stop_outlives_its_configuration():
    before = World()
    before.order('e_stop', True)
    before.order('e_stop', False)
    before.order('deactivate')
    stopped = before.streamer.is_stopped
    streamer = Streamer(before.config, lambda code, message: None, stopped=stopped)
    streamer.activate(before.now)
    assert streamer.state.name == 'STOPPED'
    assert not streamer.enable(True, before.now)[0]
    assert streamer.reset(before.now)[0]
    assert (streamer.state.name, streamer.is_stopped) == ('DISABLED', False)


def test_an_emergency_stop_that_came_before_activation_counts():
    world = World(enabled=False)
    world.order('e_stop', True)
    assert world.state == 'INACTIVE'
    world.order('activate')
    assert world.state == 'STOPPED'


def test_a_repeated_emergency_stop_is_one_fault():
    world = World()
    for _ in range(3):
        world.order('e_stop', True)
    assert world.faults == ['e_stop']


def test_enable_again_changes_nothing():
    world = streaming()
    assert world.order('enable', True) == []
    assert len(world.tick()) == 1


def test_reset_forgets_the_fault_and_what_was_executed():
    world = streaming()
    world.put(np.nan)
    world.order('reset')
    assert world.streamer.fault is None
    world.order('enable', True)
    world.refresh()
    world.put(ramp(0.01), latency=10 * DT)
    world.tick()
    assert steps(world.commands)[-1] == (2 + 1, 0)


def test_output_chunk_is_inert_and_says_so():
    world = World(CARTESIAN_ROBOT, enabled=False, stream__output='chunk')
    world.order('activate')
    accepted, why, outputs = world.streamer.enable(True, world.now)
    assert (accepted, outputs) == (False, [])
    assert 'chunk' in why
    world.refresh()
    assert not world.put()
    assert not world.put(np.nan)
    assert world.faults == ['chunk_not_finite']
    assert world.tick(3) == world.order('pause', True) == world.order('e_stop', True) == []
    streamer = world.streamer
    assert (streamer.commands, streamer.queue_depth, streamer.clamped.sum()) == (0, 0, 0)


def test_what_the_status_shows():
    world = World()
    streamer = world.streamer
    assert (streamer.epoch, streamer.chunk_id, streamer.step, streamer.queue_depth) == (0,) * 4
    world.put(ramp(0.01))
    assert (streamer.epoch, streamer.chunk_id, streamer.queue_depth) == (3, 1, HORIZON)
    world.tick(3)
    assert (streamer.step, streamer.queue_depth, streamer.commands) == (2, HORIZON - 3, 3)
    assert streamer.fault is None


# Safety output ---------------------------------------------------------------------------------


def safety_of(base: dict, on_stall: str, **changes) -> Safety:
    world = World(base, stream__on_stall=on_stall, **changes)
    world.put()
    world.tick()
    return world.order('enable', False)[0]


def test_hold_stop_and_none():
    assert np.array_equal(safety_of(JOINT_ROBOT, 'hold').target.positions, np.zeros(3))
    stop = safety_of(JOINT_ROBOT, 'stop').target
    assert (stop.names, len(stop.positions)) == (JOINTS, 0)
    assert np.allclose(safety_of(CARTESIAN_ROBOT, 'hold').target.position, [0.4, 0.0, 0.3])
    assert safety_of(CARTESIAN_ROBOT, 'stop').target is None
    for how in ('hold', 'stop'):
        twist = safety_of(CARTESIAN_ROBOT, how, stream__output='twist').target
        assert not np.any([twist.linear, twist.angular])
        assert twist.frame_id == 'base_link'
    for base in (JOINT_ROBOT, CARTESIAN_ROBOT):
        assert safety_of(base, 'none').target is None


@pytest.mark.parametrize('how', ['hold', 'stop'])
@pytest.mark.parametrize(
    'base',
    [
        TWIST_ROBOT,
        CARTESIAN_ROBOT,
        VELOCITY_ROBOT,
        {**JOINT_ROBOT, 'robot.action_space': 'joint_delta'},
    ],
    ids=['twist', 'pose', 'joint speeds', 'joint deltas'],
)
def test_a_safety_output_is_an_executed_action_that_stands_still(base, how):
    safety = safety_of(base, how)
    if safety.target is None:
        assert safety.executed is None
        return
    executed = safety.executed
    moving = 3 if base['stream.output'] == 'joint_trajectory' else 6
    assert executed.data.tolist() == [0.0] * moving
    assert (len(executed.units), 'gripper' in executed.names) == (moving, False)
    assert (executed.epoch, executed.chunk_id, executed.step) == (3, 0, 0)
    assert executed.dry_run == safety.dry_run
    if moving == 6:
        moved = executed_displacement(executed, config_of(base).robot)
        assert not np.any(moved), 'the pruning controller sees motion'


def test_a_safety_output_at_joint_positions_says_where():
    """Of a stop that is the last command; of a stop before any, nobody knows."""
    for how, said in (('hold', 0.02), ('stop', 0.01)):
        world = World(stream__on_stall=how)
        world.put(ramp(0.01))
        world.tick()
        world.joints[:] = 0.02
        world.measure()
        (safety,) = world.order('pause', True)
        assert safety.executed.names == JOINTS
        assert np.allclose(safety.executed.data, said)
    world = World(stream__on_stall='stop')
    world.put()
    (safety,) = world.order('pause', True)
    assert safety.target is not None
    assert safety.executed is None


def test_a_safety_output_after_a_jump_of_the_clock_belongs_to_the_task_before():
    world = World(TWIST_ROBOT)
    world.put()
    world.tick()
    world.now -= 60 * DT
    (safety,) = world.streamer.tick(world.now)
    assert safety.executed.epoch == world.epoch


def test_hold_commands_nothing_beyond_a_limit():
    limits = {'limits__position_min': [-0.1], 'limits__position_max': [0.1]}
    world = World(**limits)
    world.put()
    world.tick()
    world.joints[:] = 0.2
    world.measure()
    (safety,) = world.order('pause', True)
    assert len(safety.target.positions) == 0


def test_every_configured_output_can_be_made():
    for output, base in (
        ('joint_trajectory', JOINT_ROBOT), ('twist', CARTESIAN_ROBOT), ('pose', CARTESIAN_ROBOT),
    ):  # fmt: skip
        Streamer(config_of(base, stream__output=output), lambda code, message: None)


@pytest.mark.parametrize('space', ['joint_delta', 'joint_position'])
def test_an_arm_that_does_not_follow_is_disabled(space):
    """Bug: commands went on adding up, and the arm would have jumped to them once it was free."""
    world = World(robot__action_space=space, limits__max_tracking_error=0.1)
    for _ in range(10):
        rows = ramp(0.03) if space == 'joint_position' else 0 * ramp(0.03) + 0.03
        world.put(rows)
        world.tick(HORIZON)
    reach = max(abs(output.target.positions).max() for output in world.commands)
    assert reach <= 0.1 + 0.03 + 1e-9
    assert 'tracking_error' in world.faults
    assert world.state == 'DISABLED'
    assert len(world.safeties) == 1


STUCK = {  # every row turns by 0.1 rad, and the wrist never follows
    **CARTESIAN_ROBOT, 'stream.rotation_unit_rad': 0.1, 'limits.policy': 'clamp',
    'limits.velocity_max': [2.0], 'limits.max_step': [0.1],
}  # fmt: skip


def angle_of(target, world) -> float:
    return float(np.linalg.norm(rotation.between(world.quaternion, target.quaternion_xyzw)))


def stuck_wrist(rows: int, **limits) -> World:
    world = World({**STUCK, **limits})
    for _ in range(rows):
        world.put([0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0])
        world.tick()
    return world


def test_a_wrist_that_does_not_follow_is_disabled():
    """Bug: only the position was compared, and the angle added up without end."""
    world = stuck_wrist(20)
    assert max(angle_of(command.target, world) for command in world.commands) <= 0.6 + 1e-9
    assert 'tracking_error' in world.faults
    assert 'roll, pitch, yaw are up to' in world.messages[0]
    assert world.state == 'DISABLED'


def test_hold_turns_back_no_faster_than_the_limits_let_it():
    """Bug: the measured orientation was commanded at once, however far it was."""
    world = stuck_wrist(4)
    ahead = angle_of(world.commands[-1].target, world)
    assert ahead == pytest.approx(0.4)
    (safety,) = world.order('pause', True)
    assert angle_of(safety.target, world) == pytest.approx(ahead - 0.1)


@pytest.mark.parametrize('limit', [{'velocity_max': [1.0]}, {'max_step': [0.05]}])
def test_hold_gives_the_arm_the_time_that_its_limits_ask_for(limit):
    """Bug: the safety output asked for the way back to an old measurement within one period."""
    limits = {f'limits__{name}': value for name, value in limit.items()}
    world = World(robot__action_space='joint_delta', **limits)
    world.put(0 * ramp(0.01) + 0.04)
    world.tick(3)  # 0.12 rad ahead of what was measured
    (safety,) = world.order('pause', True)
    assert safety.target.duration_s == pytest.approx(0.12, abs=0.041)
