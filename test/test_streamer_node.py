"""action_streamer as a process, between a fake vla_node and a fake arm: what is on the wire."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import dds_memory
import numpy as np
import pytest

rclpy = pytest.importorskip('rclpy', reason='no ROS here: source one, or run scripts/test.sh')
pytest.importorskip('specprune_ros.msg', reason='messages are not built: run scripts/setup.sh')

from arm_world import CARTESIAN_ARM, DT_S, JOINT_ARM, JOINTS, arm_world  # noqa: E402
from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy  # noqa: E402
from ros_world import ANSWER_S, STOP_S, TELLS_SENDERS, ros_domain  # noqa: E402
from std_msgs.msg import Bool  # noqa: E402

from specprune_ros.faults import FAULTS  # noqa: E402
from specprune_ros.msg import StreamerStatus as Status  # noqa: E402
from specprune_ros.msg import VlaStatus  # noqa: E402
from specprune_ros.ros import e_stop, qos  # noqa: E402

# Robots' speed: all of it is slow.
pytestmark = [pytest.mark.ros, pytest.mark.slow, pytest.mark.timeout(120)]
START = np.array([0.1, -0.2, 0.3])  # where ArmWorld's arm stands
SLACK_S = 0.15  # what a busy machine of two cores adds to a control period
TRIES = 5  # at what a busy machine may interrupt
JOINT_DELTA = {**JOINT_ARM, 'robot.action_space': 'joint_delta'}
TWIST = {**CARTESIAN_ARM, 'stream.output': 'twist'}
POSE = {**CARTESIAN_ARM, 'stream.output': 'pose'}
GRIPPER = {
    **JOINT_ARM,
    'stream.gripper': 'position',
    'stream.gripper_closed': 0.0,
    'stream.gripper_open': 1.0,
    'stream.gripper_closed_position': 0.0,
    'stream.gripper_open_position': 0.04,
}


@pytest.fixture(autouse=True, scope='module')
def context():
    """One ROS domain for this file's tests and their processes."""
    with ros_domain(2):
        yield


def ramp(step: int) -> np.ndarray:
    """Joints that swing slowly about the start, a gripper that opens and closes."""
    turn = 0.1 * np.sin(0.1 * step)
    return np.array([*(START + turn), float(step % 40 >= 20)])


def steady(step: int) -> np.ndarray:
    """Joints that stay."""
    return np.array([*START, 0.0])


def positions(world) -> np.ndarray:
    return np.array([sent.values for sent in world.sent if len(sent.values)])


def assert_within_limits(world) -> None:
    """What the arm got, safety outputs included, keeps JOINT_ARM's limits."""
    wire = positions(world)
    assert np.isfinite(wire).all()
    assert np.abs(wire).max() <= 1.0 + 1e-9
    assert np.abs(np.diff(wire, axis=0)).max() <= 0.1 + 1e-9


def in_time(world, ms: float, allowed_s: float) -> bool:
    """Whether something came soon enough, for a machine that held up this process, too."""
    return ms < 1e3 * (allowed_s + SLACK_S + world.lag_s)


def unbroken(world, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """So many commands in a row, from a pause on; and the joints and the pose before them."""
    for _ in range(TRIES):
        assert world.call('pause', True)[0]
        world.run(0.2)
        world.forget()
        joints, pose = world.joints.copy(), world.pose.copy()
        assert world.call('pause', False)[0]
        assert world.streams(count), world.status
        if not world.rested:
            return positions(world)[:count], joints, pose
    raise AssertionError(f'no {count} commands without a stop')


def last_after(world, at_s: float) -> float:
    """Milliseconds from a moment to the last message to the robot."""
    return 1e3 * max((sent.at_s - at_s for sent in world.after(at_s)), default=0.0)


# What arrives ------------------------------------------------------------------------------------


def test_joints_and_grippers_arrive_by_name_at_the_control_rate():
    with arm_world(GRIPPER) as (world, process):
        world.vla.row = ramp
        order = [2, 3, 0, 1]  # the columns of the chunk in another order than the robot's

        def shuffle(msg):
            data = np.array(msg.data).reshape(msg.horizon, -1)[:, order]
            msg.names = [msg.names[i] for i in order]
            msg.units = [msg.units[i] for i in order]
            msg.data = msg.normalized = data.ravel().tolist()

        world.vla.change = shuffle
        world.start()
        assert world.streams(3), process.output()
        rates = []
        while len(rates) < TRIES and (not rates or rates[-1] != pytest.approx(1 / DT_S, rel=0.2)):
            start_s, count = time.monotonic(), len(world.sent)
            assert world.streams(30)
            rates.append((len(world.sent) - count) / (time.monotonic() - start_s))
        world.run(0.2)
        assert_within_limits(world)
        assert {tuple(sent.msg.joint_names) for sent in world.sent} == {JOINTS}
        assert np.abs(positions(world) - START).max() <= 0.11, 'an axis took another one`s place'
        assert np.ptp(positions(world), axis=0).min() > 0.05, 'it does not move'
        point = world.sent[-1].msg.points[0]
        assert point.time_from_start.nanosec == round(DT_S * 1e9)
        assert not point.velocities, 'controllers refuse a trajectory that does not end at rest'
        said = [tuple(action.data[:3]) for action in world.executed + world.rested]
        wire = [tuple(each) for each in positions(world)]
        assert set(wire[:30]) <= set(said)
        assert set(said[:30]) <= set(wire)
        last = world.executed[-1]
        assert (last.names[-1], last.dry_run, last.epoch) == ('gripper', False, 1)
        assert len({(a.chunk_id, a.step) for a in world.executed}) == len(world.executed)
        assert world.reaches(Status.STATE_STREAMING)
        assert world.count_publishers('delta_twist_cmds') == 0, 'of another output'
        assert world.run(ANSWER_S, lambda: 'action_streamer: streamer' in world.diagnostics)
        assert world.diagnostics['action_streamer: inputs'].level == b'\x00'
        assert {tuple(position) for position in world.grippers} == {(0.0,), (0.04,)}
        assert rates[-1] == pytest.approx(1 / DT_S, rel=0.2), rates
        print(f'{rates[-1]:.1f} commands/s of {1 / DT_S:.0f}')


@pytest.mark.parametrize(
    ('parameters', 'row', 'expected'),
    [
        (JOINT_DELTA, [0.004, 0.0, -0.002, 0.0], 'joints'),
        (TWIST, [0.2, 0.0, -0.1, 0.1, 0.0, 0.0, 0.0], [0.2, 0.0, -0.1, 1.0, 0.0, 0.0]),
        pytest.param(
            {**TWIST, 'stream.twist': 'unitless'},
            [0.2, 0.0, -0.1, 0.1, 0.0, 0.0, 0.0],
            [0.2, 0.0, -0.1, 0.1, 0.0, 0.0],
            marks=pytest.mark.slow,
        ),
        (POSE, [0.1, 0.0, -0.05, 0.0, 0.0, 0.02, 0.0], 'pose'),
    ],
    ids=['joint_delta', 'twist', 'twist_unitless', 'pose'],
)
def test_each_output_means_what_the_action_says(parameters, row, expected):
    with arm_world(parameters) as (world, _):
        world.vla.row = lambda step: np.array(row)
        world.start()
        wire, start_joints, start_pose = unbroken(world, 12)
        if expected == 'joints':
            assert np.abs(wire[0] - start_joints).max() <= 0.004 + 1e-9, (
                'starts at the measured state'
            )
            np.testing.assert_allclose(np.diff(wire, axis=0), [row[:3]] * 11, atol=1e-9)
        elif expected == 'pose':
            np.testing.assert_allclose(
                wire[0, :3] - start_pose[:3], [0.005, 0, -0.0025], atol=1e-9
            )
            np.testing.assert_allclose(
                np.diff(wire[:, :3], axis=0), [[0.005, 0, -0.0025]] * 11, atol=1e-9
            )
            np.testing.assert_allclose(np.linalg.norm(wire[:, 3:], axis=1), 1.0)
            yaw = 2 * np.arctan2(wire[:, 5], wire[:, 6])
            np.testing.assert_allclose(np.diff(yaw), 0.01, atol=1e-9)
        else:
            np.testing.assert_allclose(wire, [expected] * 12, atol=1e-9)
        if expected != 'joints':
            assert world.sent[-1].msg.header.frame_id == 'base_link'
            assert abs(world.now_ns() - world.sent[-1].msg.header.stamp.sec * 1e9) < 5e9


def test_limits_hold_on_the_wire_whatever_the_chunks_ask():
    with arm_world(JOINT_ARM) as (world, process):
        random = np.random.default_rng(0)
        world.vla.row = lambda step: np.array([*random.uniform(-3.0, 3.0, 3), 0.0])
        world.start()
        assert world.streams(25), process.output()
        assert_within_limits(world)
        assert np.abs(world.sent[0].values - START).max() <= 0.2 + 1e-9
        world.run(0.3)
        assert sum(world.status.clamped) > 0
        assert world.run(ANSWER_S, lambda: 'action_streamer: limits' in world.diagnostics)
        print(f'{len(world.sent)} commands, clamped {list(world.status.clamped)}')


def test_reject_refuses_the_chunk_that_goes_beyond_a_limit():
    with arm_world({**JOINT_ARM, 'limits.policy': 'reject'}) as (world, process):
        world.vla.row = lambda step: np.array([1.2, -0.2, 0.3, 0.0])
        world.start()
        assert world.run(ANSWER_S, lambda: world.status.chunks_rejected >= 3), process.output()
        assert not world.sent
        assert world.status.rejected[0] > 0
        assert not any(world.status.rejected[1:])
        world.vla.row = steady
        assert world.streams(3)


def test_seam_executes_each_control_step_once():
    """The value tells the control step: no step comes twice, and none is skipped at a seam."""
    slope = 0.002
    with arm_world(JOINT_ARM) as (world, process):
        base = world.vla

        def row(step):
            return np.array([START[0] + slope * (step % 200), START[1], START[2], 0.0])

        base.row = row
        world.start()
        assert world.streams(10), process.output()  # past the approach from the measured state
        for _ in range(TRIES):
            world.forget()
            assert world.streams(40)
            if world.rested:
                continue
            steps = (np.array([a.data[0] for a in world.executed]) - START[0]) / slope
            moves = np.diff(np.round(steps).astype(int)) % 200
            chunks = len({a.chunk_id for a in world.executed})
            print(f'{chunks} chunks, {len(moves)} steps: {np.bincount(moves)} moved by 0, 1, ..')
            rows = [(action.chunk_id, action.step) for action in world.executed]
            assert len(set(rows)) == len(rows), 'a row was executed twice'
            # A step that a late timer skipped the next chunk may take: it did not see that.
            skipped = np.maximum(moves - 1, 0).sum()
            assert (moves == 0).sum() <= skipped, 'a control step was executed twice'
            if (moves == 1).mean() > 0.9:
                assert chunks >= 6
                return
        raise AssertionError('control steps were skipped')


# What does not arrive ----------------------------------------------------------------------------


def test_dry_run_sends_nothing_to_the_robot():
    parameters = {**GRIPPER, 'stream.dry_run': True}
    with arm_world(parameters) as (world, process):
        world.vla.row = ramp
        world.start()
        assert world.run(ANSWER_S, lambda: len(world.executed) >= 10), process.output()
        assert all(action.dry_run for action in world.executed)
        assert world.status.dry_run
        assert not world.call('pause', True)[1].startswith('un')
        world.run(0.3)
        assert not world.sent
        assert not world.grippers
        for topic in ('joint_trajectory', 'delta_twist_cmds', 'pose_command', 'gripper_command'):
            assert world.count_publishers(topic) == 0, topic


def test_nothing_moves_before_enable_and_after_pause():
    with arm_world(JOINT_ARM) as (world, process):
        world.vla.row = ramp
        assert world.run(ANSWER_S, lambda: bool(world.statuses)), process.output()
        assert world.state == Status.STATE_UNCONFIGURED
        assert world.call('enable', True) == (
            False, 'unconfigured: configure and activate the node first',
        )  # fmt: skip
        world.start(enabled=False)
        assert world.reaches(Status.STATE_DISABLED)
        assert world.silent_for(0.4)
        assert not world.executed
        world.enable()
        assert world.streams(5)

        assert world.reaches(Status.STATE_STREAMING)
        before, answered = len(world.rested), time.monotonic()
        assert world.call('pause', True)[0]
        print(f'pause answered in {1e3 * (time.monotonic() - answered):.0f} ms')
        assert world.reaches(Status.STATE_PAUSED)
        world.run(0.2)
        assert stops_since(world, before) == 1
        assert np.abs(world.sent[-1].values - world.sent[-2].values).max() < 0.05, 'holds there'
        assert world.silent_for(0.3)
        world.joints = START + 0.15  # somebody moved the arm
        world.run(0.2)
        before = len(world.sent)
        assert world.call('pause', False)[0]
        assert world.streams(5)
        assert np.abs(world.sent[before].values - START - 0.15).max() <= 0.2 + 1e-9
        assert world.call('reset')[0]
        world.run(0.2)
        assert world.state == Status.STATE_DISABLED
        assert world.silent_for(0.3)
        assert world.call('enable', False)[0]


def test_e_stop_overrides_every_state():
    with arm_world(JOINT_ARM) as (world, process):
        world.vla.row = steady
        world.press(True)
        world.start(enabled=False)  # pressed before anything was up: it is latched
        assert world.reaches(Status.STATE_STOPPED), process.output()
        assert not world.call('enable', True)[0]
        delays = {}
        for state in ('STOPPED', 'DISABLED', 'WAITING', 'STREAMING', 'PAUSED', 'STALLED'):
            if state != 'STOPPED':
                bring_to(world, state)
            before, pressed_s = len(world.rested), world.press(True)
            assert world.reaches(Status.STATE_STOPPED), state
            world.run(0.15)
            assert stops_since(world, before) == (state == 'STREAMING')
            delays[state] = last_after(world, pressed_s)
            assert world.silent_for(0.2)
            accepted, why = world.call('reset')
            assert not accepted
            assert 'stop' in why
            world.press(False)
            world.run(0.1)
            assert world.state == Status.STATE_STOPPED, 'a released stop needs a reset'
            assert not world.call('enable', True)[0]
            assert world.call('reset')[0]
            assert world.reaches(Status.STATE_DISABLED)
        assert in_time(world, delays['STREAMING'], DT_S)
        assert all(ms == 0.0 for state, ms in delays.items() if state != 'STREAMING')
        print(f'e_stop to the last command: {delays["STREAMING"]:.0f} ms')


@pytest.mark.skipif(not TELLS_SENDERS, reason='this rclpy does not tell who sent a message')
def test_an_emergency_stop_of_several_buttons_holds_until_all_are_released():
    with arm_world(JOINT_ARM) as (world, process):
        world.vla.row = steady
        other = world.create_publisher(Bool, 'e_stop', qos.LATCHED)
        world.start()
        assert world.streams(3), process.output()
        world.press(True)
        assert world.reaches(Status.STATE_STOPPED)
        other.publish(Bool(data=False))
        world.run(0.3)
        accepted, why = world.call('reset')
        assert not accepted, 'another button released it'
        assert 'e_stop is still on' in why
        other.publish(Bool(data=True))
        world.run(0.2)
        world.press(False)
        world.run(0.2)
        assert not world.call('reset')[0], 'the other button is down yet'
        other.publish(Bool(data=False))
        assert world.run(ANSWER_S, lambda: world.call('reset')[0])
        assert world.reaches(Status.STATE_DISABLED)
        assert world.silent_for(0.2)


@pytest.mark.skipif(not TELLS_SENDERS, reason='this rclpy does not tell who sent a message')
@pytest.mark.parametrize('live', [True, False])
def test_a_press_is_not_lost_among_other_messages(live):
    """Bug: of several messages that came while the executor was busy only the last was seen."""
    node, said = rclpy.create_node('busy'), []
    one, other = (node.create_publisher(Bool, 'e_stop', qos.LATCHED) for _ in range(2))

    def listen() -> e_stop.EmergencyStopInput:
        return e_stop.EmergencyStopInput(node, said.append, lambda policy: None)

    listener = listen() if live else None
    end = time.monotonic() + ANSWER_S
    while live and one.get_subscription_count() == 0 and time.monotonic() < end:
        rclpy.spin_once(node, timeout_sec=0.1)
    one.publish(Bool(data=True))
    other.publish(Bool(data=False))
    listener = listener or listen()
    time.sleep(0.5)
    try:
        while len(said) < 2 and time.monotonic() < end:
            rclpy.spin_once(node, timeout_sec=0.1)
        assert said[-1], said
    finally:
        listener.destroy()
        node.destroy_node()


def test_without_senders_only_an_only_button_releases(monkeypatch):
    """As on Humble, whose rclpy hands over the message alone."""
    monkeypatch.setattr(e_stop, 'Subscription', object)
    node, said = rclpy.create_node('listener'), []
    listener = e_stop.EmergencyStopInput(node, said.append, lambda policy: None)
    one, other = (node.create_publisher(Bool, 'e_stop', qos.LATCHED) for _ in range(2))

    def said_after(publisher, on: bool) -> bool:
        count, end = len(said), time.monotonic() + ANSWER_S
        publisher.publish(Bool(data=on))
        while len(said) == count and time.monotonic() < end:
            rclpy.spin_once(node, timeout_sec=0.1)
        return said[-1]

    try:
        assert not said_after(one, False)
        assert said_after(one, True)
        assert said_after(other, False)
        assert said_after(one, False)
        node.destroy_publisher(other)
        end = time.monotonic() + ANSWER_S
        while node.count_publishers('e_stop') > 1 and time.monotonic() < end:
            rclpy.spin_once(node, timeout_sec=0.1)
        assert not said_after(one, False)
    finally:
        listener.destroy()
        node.destroy_node()


def test_an_emergency_stop_outlives_cleanup():
    with arm_world(JOINT_ARM) as (world, process):
        world.vla.row = steady
        world.start(enabled=False)
        world.press(True)
        assert world.reaches(Status.STATE_STOPPED), process.output()
        world.press(False)
        world.run(0.2)
        for transition in ('deactivate', 'cleanup', 'configure', 'activate'):
            assert world.lifecycle.change(transition)
        assert world.reaches(Status.STATE_STOPPED), 'a new configuration forgot the stop'
        assert not world.call('enable', True)[0]
        assert world.call('reset')[0]
        world.enable()
        assert world.streams(3)


def test_the_press_of_a_button_that_is_gone_ends_with_the_release_of_another():
    with arm_world(JOINT_ARM) as (world, process):
        world.start(enabled=False)
        gone = world.create_publisher(Bool, 'e_stop', qos.LATCHED)
        gone.publish(Bool(data=True))
        assert world.reaches(Status.STATE_STOPPED), process.output()
        world.destroy_publisher(gone)
        world.run(0.5)
        assert not world.call('reset')[0], 'nobody released it'
        world.press(False)
        assert world.run(ANSWER_S, lambda: world.call('reset')[0])


def bring_to(world, state: str) -> None:
    """From DISABLED to a state."""
    world.vla.streams = state != 'WAITING'
    world.run(0.6 if state == 'WAITING' else 0.0)  # what was on the wire has expired
    if state != 'DISABLED':
        world.enable()
    if state in ('STREAMING', 'PAUSED', 'STALLED'):
        assert world.streams(3)
    if state == 'PAUSED':
        assert world.call('pause', True)[0]
    if state == 'STALLED':
        world.vla.streams = False
    assert world.reaches(getattr(Status, f'STATE_{state}')), (state, world.status)
    world.run(0.1)


def stops_since(world, before: int) -> int:
    """Safety outputs since there were `before` in `world.rested`; exact while it is silent."""
    assert safeties(world) == len(world.rested), 'not every safety output was reported'
    return len(world.rested) - before


def safeties(world) -> int:
    """Messages to the robot that were no row of a chunk, so far; exact while it is silent."""
    return len(world.sent) - len(world.executed)


# When streaming ends -----------------------------------------------------------------------------


def test_stall_gives_one_safety_output_then_silence_then_streams_again():
    with arm_world({**JOINT_ARM, 'stream.on_stall': 'stop'}) as (world, process):
        world.vla.row = steady
        world.start()
        assert world.streams(5), process.output()
        before, world.vla.streams = len(world.rested), False
        assert world.reaches(Status.STATE_STALLED)
        assert world.silent_for(0.6)
        assert stops_since(world, before) == 1
        assert len(world.sent[-1].values) == 0, 'an empty trajectory ends the running one'
        last, said = world.executed[-1], world.rested[-1]
        assert (said.chunk_id, said.epoch, tuple(said.names)) == (0, last.epoch, JOINTS)
        assert list(said.data) == list(last.data)[:3], 'stay where the last command led'
        assert world.status.fault_code == FAULTS['starved'].number
        gap = 1e3 * (world.sent[-1].at_s - world.sent[-2].at_s)
        print(f'last command to the safety output: {gap:.0f} ms')
        assert in_time(world, gap, 2 * DT_S)
        world.vla.streams = True
        assert world.streams(5)
        assert world.reaches(Status.STATE_STREAMING)


def test_bad_chunks_are_refused_whole():
    with arm_world(JOINT_ARM) as (world, process):
        world.vla.row, world.vla.streams = steady, False
        world.start()
        assert world.run(ANSWER_S, lambda: world.state == Status.STATE_WAITING), process.output()
        world.run(0.3)
        nan = np.array([[np.nan, *row[1:]] for row in world.vla.chunk().data])
        good = world.vla.chunk()
        bad = {
            'chunk_not_finite': {'data': nan},
            'chunk_shape': {'data': good.data[:, :3]},
            'chunk_names': {'names': ('j1', 'j2', 'j4', 'gripper')},
            'chunk_step_dt': {'step_dt_s': 0.1},
            'chunk_space': {'space': 2},
            'chunk_epoch': {'epoch': 7},
            'chunk_stale': {'observation_stamp_ns': good.observation_stamp_ns - 5 * 10**9},
            'chunk_stand_in': {'stand_in': True},
        }
        for count, (code, changes) in enumerate(bad.items(), 1):
            world.vla.send(world.vla.chunk(**changes))
            assert world.run(ANSWER_S, lambda n=count: world.status.chunks_rejected == n), code
            assert world.status.fault_code == FAULTS[code].number, world.status.fault_message
            assert world.status.fault_message
        world.vla.change = lambda msg: setattr(msg, 'data', msg.data[1:])  # not 16 rows of 4
        world.vla.send()
        assert world.run(ANSWER_S, lambda: world.status.chunks_rejected == len(bad) + 1)
        assert world.status.fault_code == FAULTS['chunk_shape'].number
        world.vla.change = lambda msg: None
        assert world.silent_for(0.3)
        assert world.run(ANSWER_S, lambda: all(world.faults().get(code) for code in bad))
        world.vla.send()
        assert world.streams(3)


def test_a_refusal_that_lasts_is_logged_once():
    """Bug: every chunk's number made it news, and the log went on as fast as the chunks."""
    with arm_world(JOINT_ARM) as (world, process):
        world.vla.row, world.vla.streams = steady, False
        world.start()
        assert world.run(ANSWER_S, lambda: world.state == Status.STATE_WAITING), process.output()
        for count in range(1, 6):
            world.vla.send(world.vla.chunk(stand_in=True))
            assert world.run(ANSWER_S, lambda n=count: world.status.chunks_rejected == n)
        assert process.output().count('random stand-in weights') == 1


@pytest.mark.parametrize(
    ('spoil', 'code'),
    [
        (lambda world: setattr(world, 'measures', False), 'joint_stale'),
        pytest.param(
            lambda world: setattr(world.vla, 'speaks', False), 'peer_gone', marks=pytest.mark.slow
        ),
        pytest.param(
            lambda world: world.vla.say(state=VlaStatus.STATE_IDLE), None, marks=pytest.mark.slow
        ),
    ],
    ids=['joint_stale', 'peer_gone', 'task_ended'],
)
def test_what_it_needs_goes_silent_and_comes_back(spoil, code):
    with arm_world(JOINT_ARM) as (world, process):
        world.vla.row = steady
        world.start()
        assert world.streams(5), process.output()
        before, spoilt_s = len(world.rested), time.monotonic()
        spoil(world)
        stopped = (Status.STATE_STALLED, Status.STATE_WAITING)
        assert world.run(ANSWER_S, lambda: world.state in stopped), world.status
        world.run(0.2)
        print(f'{code}: last message after {last_after(world, spoilt_s):.0f} ms')
        assert in_time(world, last_after(world, spoilt_s), 0.8 + 2 * DT_S)
        assert stops_since(world, before) == 1
        assert world.silent_for(0.5)
        if code:
            assert world.run(ANSWER_S, lambda: world.faults().get(code)), world.faults()
        world.measures = world.vla.speaks = True
        world.vla.say(state=VlaStatus.STATE_RUNNING)
        assert world.streams(3)


def test_joint_states_that_cannot_be_used():
    with arm_world(JOINT_ARM) as (world, process):
        world.vla.row = steady
        world.start()
        assert world.streams(3), process.output()
        world.distort = lambda msg: (
            setattr(msg.header.stamp, 'sec', 0) or setattr(msg.header.stamp, 'nanosec', 0)
        )
        assert world.run(ANSWER_S, lambda: world.faults().get('stamp_missing'))
        assert world.streams(3), 'the time of receipt serves'
        for code, changes in {
            'joint_missing': {'name': ['j3', 'stranger', 'j1', 'other']},
            'joint_not_finite': {'position': [np.nan, 0.0, 0.1, 0.2]},
            'joint_width': {'position': [0.1]},
        }.items():
            world.distort = lambda msg, c=changes: [setattr(msg, *item) for item in c.items()]
            assert world.reaches(Status.STATE_STALLED), code
            assert world.run(ANSWER_S, lambda c=code: world.faults().get(c)), world.faults()
            world.distort = lambda msg: None
            assert world.streams(3)


def test_lost_controller_disables():
    with arm_world(JOINT_ARM) as (world, process):
        world.vla.row = steady
        world.start()
        assert world.streams(3), process.output()
        world.stop_controllers()
        assert world.reaches(Status.STATE_DISABLED)
        assert world.status.fault_code == FAULTS['subscriber_gone'].number
        accepted, why = world.call('enable', True)
        assert not accepted
        assert 'joint_trajectory' in why
        world.start_controllers()
        world.enable()
        assert world.streams(3)


def test_e_stop_that_cannot_be_heard_counts_as_pressed():
    with arm_world(JOINT_ARM) as (world, process):
        world.vla.row = steady
        world.start()
        assert world.streams(3), process.output()
        volatile = QoSProfile(
            depth=1,
            reliability=ReliabilityPolicy.RELIABLE,
            durability=DurabilityPolicy.VOLATILE,
        )
        unheard = world.create_publisher(Bool, 'e_stop', volatile)
        assert world.reaches(Status.STATE_STOPPED)
        assert world.run(ANSWER_S, lambda: world.faults().get('qos_incompatible'))
        assert world.silent_for(0.3)
        world.press(False)
        world.run(0.2)
        assert not world.call('reset')[0], 'it may be pressed'
        world.destroy_publisher(unheard)
        world.run(0.5)
        world.press(False)
        assert world.run(ANSWER_S, lambda: world.call('reset')[0])


@pytest.mark.parametrize(
    'end',
    [
        'deactivate',
        signal.SIGINT,
        pytest.param('cleanup', marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, marks=pytest.mark.slow),
    ],
)
def test_the_safety_output_is_the_last_message(end):
    with arm_world({**JOINT_ARM, 'stream.on_stall': 'stop'}) as (world, process):
        world.vla.row = steady
        world.start()
        assert world.streams(5), process.output()
        before, start_s = len(world.rested), time.monotonic()
        if isinstance(end, str):
            assert world.lifecycle.change('deactivate')
            if end == 'cleanup':
                assert world.lifecycle.change('cleanup')
        else:
            process.process.send_signal(end)
            assert world.run(STOP_S, lambda: process.process.poll() is not None)
            assert process.process.returncode == 0, process.output()
        world.run(0.3)
        assert stops_since(world, before) == 1
        assert len(world.sent[-1].values) == 0
        print(f'{end}: last message after {last_after(world, start_s):.0f} ms')
        assert 'Traceback' not in process.output()
        if isinstance(end, str):
            assert process.stop()[0] == 0
            assert stops_since(world, before) == 1


def test_killed_vla_node_stops_the_arm_and_a_new_one_moves_it_again():
    def fake_vla():
        return subprocess.Popen([sys.executable, Path(__file__).parent / 'arm_world.py'])

    with arm_world(JOINT_ARM, vla=False) as (world, process):
        peer = fake_vla()
        try:
            world.start()
            assert world.streams(10), process.output()
            before = len(world.rested)
            dds_memory.kill(peer)
            killed_s = time.monotonic()
            assert world.reaches(Status.STATE_STALLED)
            world.run(0.3)
            print(f'kill -9 to the last message: {last_after(world, killed_s):.0f} ms')
            assert in_time(world, last_after(world, killed_s), 0.8 + 2 * DT_S)
            assert stops_since(world, before) == 1
            assert world.silent_for(0.7)
            peer = fake_vla()
            assert world.streams(10)
        finally:
            dds_memory.kill(peer)


def test_simulated_time_jumps_back_and_stands_still():
    with arm_world(JOINT_ARM, sim_time=True) as (world, process):
        world.vla.row = steady
        world.start()
        assert world.streams(5), process.output()
        world.vla.streams = False
        jumped_s = time.monotonic()
        world.jump(-5.0)
        world.freeze()
        assert world.reaches(Status.STATE_STALLED), world.status
        world.run(0.5)
        assert safeties(world) == 1, 'at once, although no control step comes any more'
        assert len(world.after(jumped_s)) <= 2, 'a command of before the jump'
        print(f'jump to the safety output: {last_after(world, jumped_s):.0f} ms')
        world.freeze(False)
        assert world.silent_for(0.5)
        assert safeties(world) == 1
        assert world.run(ANSWER_S, lambda: world.faults().get('clock_jump'))
        world.vla.start_ns, world.vla.streams = world.now_ns(), True
        assert world.streams(5)
        world.freeze()
        world.run(0.1)
        world.press(True)
        assert world.reaches(Status.STATE_STOPPED), 'needs no clock'
        assert world.silent_for(0.2)


# Configuration -----------------------------------------------------------------------------------


def test_bad_parameters_are_refused_and_the_old_value_stays():
    with arm_world({**JOINT_ARM, 'stream.output': 'twist'}) as (world, process):
        world.appears()
        assert not world.lifecycle.change('configure')
        assert world.lifecycle.state() == 'unconfigured'
        assert 'stream.output' in process.output()
        accepted, why = world.set_parameter('stream.on_stall', 'fly')
        assert not accepted
        assert 'stream.on_stall' in why
        assert world.set_parameter('stream.output', 'joint_trajectory')[0]
        accepted, why = world.set_parameter('limits.velocity_max', [1.5])
        assert accepted, why  # Bug: a list of numbers was never taken
        assert world.lifecycle.change('configure')
        accepted, why = world.set_parameter('stream.dry_run', True)
        assert not accepted
        assert 'clean up first' in why
        assert world.run(ANSWER_S, lambda: not world.status.dry_run), 'the old value stays'
        assert not world.set_parameter('stream.outptu', 'twist')[0]
        assert process.stop()[0] == 0


def test_output_chunk_leaves_the_robot_to_another_node():
    parameters = {**JOINT_ARM, 'stream.output': 'chunk', 'stream.dry_run': False}
    with arm_world(parameters) as (world, process):
        world.vla.row = steady
        world.start(enabled=False)
        world.call('enable', True)
        world.run(0.7)
        assert not world.sent
        assert not world.executed
        assert world.count_publishers('executed_action') == 0, process.output()


def test_two_namespaces_do_not_hear_each_other():
    with (
        arm_world(JOINT_ARM, name='left', namespace='left') as (left, left_process),
        arm_world(JOINT_ARM, name='right', namespace='right') as (right, right_process),
    ):
        left.vla.row = right.vla.row = steady
        right.vla.streams = False
        left.start(enabled=False)
        right.start(enabled=False)
        left.beside, right.beside = [right], [left]
        left.enable()
        right.enable()
        assert left.streams(5), left_process.output()
        right.run(0.5)
        assert not right.sent, right_process.output()
        assert not right.executed
        right.press(True)
        assert right.reaches(Status.STATE_STOPPED)
        assert left.streams(5)
        assert left.reaches(Status.STATE_STREAMING)


def test_a_killed_streamer_comes_back_unable_to_move():
    with arm_world(JOINT_ARM) as (world, process):
        world.vla.row = steady
        world.start()
        assert world.streams(3)
        mapped = dds_memory.segments(process.process.pid)
        dds_memory.kill(process.process)
        left = [segment for segment in mapped if segment.exists()]
        assert len(left) < len(mapped), 'the memory of a killed process stays'
    with arm_world(JOINT_ARM) as (world, process):
        world.vla.row = steady
        assert world.run(ANSWER_S, lambda: bool(world.statuses)), process.output()
        assert world.state == Status.STATE_UNCONFIGURED
        assert world.status.dry_run
        assert world.silent_for(1.0)
        assert world.count_publishers('joint_trajectory') == 0
