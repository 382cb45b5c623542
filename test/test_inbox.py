"""The newest good value of every input, and when they make an observation."""

import math

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from specprune_ros.config import RobotConfig, RuntimeConfig
from specprune_ros.errors import ObservationError
from specprune_ros.images import RawImage
from specprune_ros.inbox import POSE_NAMES, Inbox, QueryTrigger, axis_angle, proprio_inputs

NS = 1_000_000_000
NOW = 1000 * NS
JOINTS = ('shoulder', 'elbow', 'finger')
NAN, INF = float('nan'), float('inf')


def picture(value: int = 0) -> np.ndarray:
    return np.full((4, 4, 3), value, np.uint8)


def make_inbox(joints: tuple[str, ...] = JOINTS, **runtime: float) -> Inbox:
    robot = RobotConfig(camera_names=('wrist', 'side'), joint_names=joints)
    ages = {'max_image_age_s': 0.5, 'max_joint_age_s': 0.2, **runtime}
    return Inbox(robot, RuntimeConfig(**ages))


def full_inbox() -> Inbox:
    inbox = make_inbox()
    inbox.put_instruction('pick up the soup')
    inbox.put_image('wrist', NOW, picture(1))
    inbox.put_image('side', NOW, picture(2))
    inbox.put_joints(NOW, JOINTS, (0.1, 0.2, 0.3))
    return inbox


def refusal(inbox: Inbox, now_ns: int = NOW) -> ObservationError:
    with pytest.raises(ObservationError) as caught:
        inbox.observation(now_ns)
    return caught.value


def test_all_inputs_make_an_observation():
    observation = full_inbox().observation(NOW)
    assert {name: int(image[0, 0, 0]) for name, image in observation.images.items()} == {
        'wrist': 1,
        'side': 2,
    }
    assert observation.proprio.tolist() == [0.1, 0.2, 0.3]
    assert observation.instruction == 'pick up the soup'
    assert observation.image_stamps_ns == {'wrist': NOW, 'side': NOW}


def test_newest_image_of_each_camera():
    inbox = full_inbox()
    inbox.put_image('side', NOW + 1, picture(9))
    observation = inbox.observation(NOW + 1)
    assert int(observation.images['side'][0, 0, 0]) == 9
    assert int(observation.images['wrist'][0, 0, 0]) == 1
    assert inbox.images.keys() == {'wrist', 'side'}


def test_an_observation_does_not_change_afterwards():
    inbox = full_inbox()
    observation = inbox.observation(NOW)
    inbox.put_image('side', NOW + 1, picture(9))
    inbox.put_joints(NOW + 1, JOINTS, (7.0, 8.0, 9.0))
    inbox.forget_inputs()
    assert int(observation.images['side'][0, 0, 0]) == 2
    assert observation.proprio.tolist() == [0.1, 0.2, 0.3]


# Joints ----------------------------------------------------------------------------------------


@given(st.permutations([*JOINTS, 'gripper_mimic', 'head_pan']))
def test_joints_by_name_in_any_order_with_extras(names):
    values = {name: float(index) for index, name in enumerate(JOINTS)}
    inbox = full_inbox()
    inbox.put_joints(NOW, names, [values.get(name, NAN) for name in names])
    assert inbox.observation(NOW).proprio.tolist() == [0.0, 1.0, 2.0]


@pytest.mark.parametrize(
    ('names', 'positions', 'code', 'told'),
    [
        (JOINTS[:2], (1.0, 2.0), 'joint_missing', 'finger'),
        ((), (), 'joint_missing', 'shoulder'),
        (JOINTS, (1.0, NAN, 2.0), 'joint_not_finite', 'elbow'),
        (JOINTS, (INF, 1.0, 2.0), 'joint_not_finite', 'shoulder'),
        (JOINTS, (1.0, 2.0), 'joint_width', '3 names, 2 positions'),
        (JOINTS, (1.0, 2.0, 3.0, 4.0), 'joint_width', '3 names, 4 positions'),
        (JOINTS, (), 'joint_width', '3 names, 0 positions'),
    ],
)
def test_bad_joint_state_is_refused_and_the_former_kept(names, positions, code, told):
    inbox = full_inbox()
    with pytest.raises(ObservationError, match=told) as caught:
        inbox.put_joints(NOW + 5, names, np.array(positions))
    assert caught.value.code == code
    assert caught.value.field.startswith('joint_states')
    assert inbox.observation(NOW).proprio.tolist() == [0.1, 0.2, 0.3]


def test_robot_without_joints_needs_none():
    inbox = make_inbox(joints=())
    inbox.put_instruction('go')
    for camera in ('wrist', 'side'):
        inbox.put_image(camera, NOW, picture())
    assert inbox.observation(NOW).proprio is None


# End-effector pose -----------------------------------------------------------------------------

LIBERO = (*POSE_NAMES, 'finger_left', 'finger_right')
FINGERS, POSITION, TURN = LIBERO[6:], (0.1, -0.2, 1.3), (0.6, 0.0, 0.0, 0.8)
TURN_ANGLE = 2 * math.acos(0.8)  # about x
ROOT = math.sqrt(0.5)


def libero_inbox(joints: tuple[str, ...] = LIBERO) -> Inbox:
    """One that lacks the robot's state only."""
    inbox = make_inbox(joints)
    inbox.put_instruction('go')
    for camera in ('wrist', 'side'):
        inbox.put_image(camera, NOW, picture())
    return inbox


def test_pose_and_fingers_make_the_state():
    inbox = libero_inbox()
    inbox.put_joints(NOW, ('other', *FINGERS), (9.0, 0.04, -0.04))
    inbox.put_pose(NOW, POSITION, TURN)
    expected = [*POSITION, TURN_ANGLE, 0.0, 0.0, 0.04, -0.04]
    np.testing.assert_allclose(inbox.observation(NOW).proprio, expected, rtol=1e-12)


@given(st.permutations(LIBERO), st.integers(1, len(LIBERO)))
def test_state_is_in_the_configured_order(names, count):
    names = tuple(names[:count])
    inbox = libero_inbox(names)
    inbox.put_joints(NOW, FINGERS, (0.04, -0.04))
    inbox.put_pose(NOW, POSITION, TURN)
    values = dict(zip(LIBERO, [*POSITION, TURN_ANGLE, 0.0, 0.0, 0.04, -0.04], strict=True))
    expected = [values[name] for name in names]
    np.testing.assert_allclose(inbox.observation(NOW).proprio, expected, rtol=1e-12)


@pytest.mark.parametrize(
    ('joints', 'inputs'),
    [
        ((), ()),
        (('a', 'b'), ('joint_states',)),
        (('eef_x', 'eef_az'), ('eef_pose',)),
        (LIBERO, ('joint_states', 'eef_pose')),
    ],
)
def test_only_inputs_that_the_state_needs_are_waited_for(joints, inputs):
    inbox = libero_inbox(joints)
    assert proprio_inputs(RobotConfig(joint_names=joints)) == inputs
    assert set(inbox.age_s(NOW)) - {'cameras/wrist', 'cameras/side'} == set(inputs)
    positions = (0.0,) * len(joints)
    inbox.put_joints(NOW - 100 * NS, joints, positions)
    inbox.put_pose(NOW - 100 * NS, POSITION, TURN)
    if 'joint_states' in inputs:
        inbox.put_joints(NOW, joints, positions)
    if 'eef_pose' in inputs:
        inbox.put_pose(NOW, POSITION, TURN)
    assert inbox.observation(NOW).stamp_ns == NOW


@pytest.mark.parametrize('sign', [1, -1])
def test_pose_missing_then_stale(sign):
    inbox = libero_inbox()
    inbox.put_joints(NOW, FINGERS, (0.04, -0.04))
    error = refusal(inbox)
    assert (error.code, error.field) == ('pose_missing', 'eef_pose')
    assert inbox.age_s(NOW)['eef_pose'] == INF
    inbox.put_pose(NOW - sign * NS // 5, POSITION, TURN)
    assert inbox.observation(NOW).stamp_ns == min(NOW, NOW - sign * NS // 5)
    inbox.put_pose(NOW - sign * NS // 4, POSITION, TURN)
    error = refusal(inbox)
    assert (error.code, error.field) == ('pose_stale', 'eef_pose')
    assert f'{sign * 0.25:.3f} s old' in str(error)
    assert inbox.age_s(NOW)['eef_pose'] == sign * 0.25


def test_pose_is_forgotten_with_the_other_inputs():
    inbox = libero_inbox(('eef_x',))
    inbox.put_pose(NOW, POSITION, TURN)
    inbox.forget_inputs()
    assert inbox.age_s(NOW)['eef_pose'] == INF


@pytest.mark.parametrize(
    ('position', 'quaternion', 'code', 'told'),
    [
        ((NAN, 0, 0), TURN, 'pose_not_finite', 'nan'),
        ((0, 0, -INF), TURN, 'pose_not_finite', 'inf'),
        (POSITION, (0, 0, NAN, 1), 'pose_not_finite', 'nan'),
        (POSITION, (0, 0, 0, 0), 'pose_quaternion', 'norm 1, has 0'),
        (POSITION, (0, 0, 0, 2), 'pose_quaternion', 'norm 1, has 2'),
        (POSITION, (0, 0, 0, 0.99), 'pose_quaternion', 'has 0.99'),
        (POSITION, (1e200, 0, 0, 1e200), 'pose_quaternion', 'norm 1'),
    ],
)
def test_bad_pose_is_refused_and_the_former_kept(position, quaternion, code, told):
    inbox = libero_inbox(POSE_NAMES)
    inbox.put_pose(NOW, POSITION, TURN)
    with pytest.raises(ObservationError, match=told) as caught:
        inbox.put_pose(NOW + 5, position, quaternion)
    assert caught.value.code == code
    assert caught.value.field.startswith('eef_pose')
    assert inbox.observation(NOW).stamp_ns == NOW
    assert inbox.observation(NOW).proprio[:3].tolist() == list(POSITION)


@given(st.floats(-9e-4, 9e-4))
def test_rounded_quaternions_count_as_their_rotation(error):
    inbox = libero_inbox(POSE_NAMES)
    inbox.put_pose(NOW, POSITION, np.array(TURN) * (1 + error))
    np.testing.assert_allclose(
        inbox.observation(NOW).proprio[3:], [TURN_ANGLE, 0, 0], rtol=1e-9, atol=1e-12
    )


@pytest.mark.parametrize(
    ('quaternion', 'expected'),
    [
        ((0, 0, 0, 1), (0, 0, 0)),
        ((0, 0, 0, -1), (0, 0, 0)),
        ((0, 0, 0, 1 + 1e-9), (0, 0, 0)),  # rounded up: no root of a negative number
        ((1, 0, 0, 0), (math.pi, 0, 0)),
        ((-1, 0, 0, 0), (-math.pi, 0, 0)),
        ((0, ROOT, 0, ROOT), (0, math.pi / 2, 0)),
        ((0, -ROOT, 0, -ROOT), (0, -3 * math.pi / 2, 0)),  # the same rotation, the long way
        ((0, 0, math.sin(0.05), math.cos(0.05)), (0, 0, 0.1)),
        # Nearly a whole turn: the cosine has no digits left to tell the angle by.
        ((0, 0, 3.81e-7, 7.3e-14 - 1), (0, 0, 2 * math.pi - 7.62e-7)),
    ],
)
def test_axis_angle(quaternion, expected):
    np.testing.assert_allclose(axis_angle(quaternion), expected, atol=1e-9)


def rotation(quaternion: np.ndarray) -> np.ndarray:
    """[3, 3] matrix of a unit quaternion, w last."""
    x, y, z, w = quaternion
    return np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
            [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
            [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
        ]
    )


@given(st.lists(st.floats(-1, 1), min_size=4, max_size=4))
def test_axis_angle_is_the_rotation_and_says_which_way(parts):
    norm = np.linalg.norm(parts)
    if norm < 1e-3:
        return
    quaternion = np.array(parts) / norm
    vector = axis_angle(quaternion)
    angle = np.linalg.norm(vector)
    assert angle <= 2 * math.pi + 1e-6
    matrix, _ = cv2.Rodrigues(vector)
    np.testing.assert_allclose(matrix, rotation(quaternion), atol=1e-6)
    if angle > 1e-3 and abs(quaternion[3]) < 0.999:
        other = axis_angle(-quaternion)
        assert vector @ other < 0
        assert angle + np.linalg.norm(other) == pytest.approx(2 * math.pi, abs=1e-6)


# Instruction -----------------------------------------------------------------------------------


@pytest.mark.parametrize('text', ['', ' ', '\n\t'])
def test_empty_instruction_keeps_the_former(text):
    inbox = full_inbox()
    with pytest.raises(ObservationError) as caught:
        inbox.put_instruction(text)
    assert caught.value.code == 'instruction_empty'
    assert inbox.observation(NOW).instruction == 'pick up the soup'


def test_instruction_is_replaced_and_survives_forgetting():
    inbox = full_inbox()
    inbox.put_instruction('  open the drawer\n')
    inbox.forget_inputs()
    assert refusal(inbox).code == 'camera_missing'
    for camera in ('wrist', 'side'):
        inbox.put_image(camera, NOW, picture())
    assert refusal(inbox).code == 'joint_missing'
    inbox.put_joints(NOW, JOINTS, (1.0, 2.0, 3.0))
    assert inbox.observation(NOW).instruction == 'open the drawer'


# Missing and stale -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ('absent', 'code'),
    [
        ('instruction', 'instruction_missing'),
        ('cameras/wrist', 'camera_missing'),
        ('cameras/side', 'camera_missing'),
        ('joint_states', 'joint_missing'),
    ],
)
def test_input_that_never_came(absent, code):
    inbox = make_inbox()
    if absent != 'instruction':
        inbox.put_instruction('go')
    for camera in ('wrist', 'side'):
        if absent != f'cameras/{camera}':
            inbox.put_image(camera, NOW, picture())
    if absent != 'joint_states':
        inbox.put_joints(NOW, JOINTS, (1.0, 2.0, 3.0))
    error = refusal(inbox)
    assert (error.code, error.field) == (code, absent)
    if absent != 'instruction':
        assert inbox.age_s(NOW)[absent] == INF


@pytest.mark.parametrize('sign', [1, -1])
@pytest.mark.parametrize(
    ('name', 'limit', 'code'),
    [
        ('cameras/wrist', 0.5, 'camera_stale'),
        ('cameras/side', 0.5, 'camera_stale'),
        ('joint_states', 0.2, 'joint_stale'),
    ],
)
def test_stale_and_future_stamps(name, limit, code, sign):
    def at_age(age_s: float) -> Inbox:
        inbox, stamp = full_inbox(), NOW - round(sign * age_s * NS)
        if name == 'joint_states':
            inbox.put_joints(stamp, JOINTS, (1.0, 2.0, 3.0))
        else:
            inbox.put_image(name.removeprefix('cameras/'), stamp, picture())
        return inbox

    assert at_age(limit).observation(NOW).instruction
    error = refusal(at_age(limit + 0.01))
    assert (error.code, error.field) == (code, name)
    assert f'{sign * (limit + 0.01):.3f}' in str(error)
    assert f'{limit:g}' in str(error)
    assert at_age(limit + 0.01).age_s(NOW)[name] == pytest.approx(sign * (limit + 0.01))


@given(st.lists(st.integers(0, NS // 5), min_size=3, max_size=3))
def test_stamp_is_the_oldest(ages):
    inbox, stamps = full_inbox(), [NOW - age for age in ages]
    inbox.put_image('wrist', stamps[0], picture())
    inbox.put_image('side', stamps[1], picture())
    inbox.put_joints(stamps[2], JOINTS, (1.0, 2.0, 3.0))
    observation = inbox.observation(NOW)
    assert observation.stamp_ns == min(stamps)
    assert observation.image_stamps_ns == {'wrist': stamps[0], 'side': stamps[1]}


def test_inputs_that_the_robot_does_not_have_do_not_matter():
    """Bug: an unused camera or joint state dated the observation, or made it stale."""
    inbox = make_inbox(joints=())
    inbox.put_instruction('go')
    inbox.put_joints(NOW - 100 * NS, ('wheel',), (1.0,))
    for camera in ('wrist', 'side'):
        inbox.put_image(camera, NOW, picture())
    assert inbox.observation(NOW).stamp_ns == NOW
    inbox.put_image('ceiling', NOW - 100 * NS, picture())
    assert inbox.observation(NOW).stamp_ns == NOW


# Any sequence ----------------------------------------------------------------------------------

GOOD = st.tuples(st.sampled_from(['wrist', 'side', 'joints', 'instruction']), st.just(True))
BAD = st.tuples(st.sampled_from(['wrist', 'side', 'joints', 'instruction']), st.just(False))


def put(inbox: Inbox, kind: str, number: int, good: bool) -> None:
    """Put the n-th value of a sequence, as the node's callbacks do."""
    stamp = NOW + number
    if kind == 'joints':
        last = float(number) if good else NAN
        inbox.put_joints(stamp, JOINTS, (0.0, 0.0, last))
    elif kind == 'instruction':
        inbox.put_instruction(f'task {number}' if good else ' ')
    else:
        data = bytes([number % 256] * 12) if good else b'short'
        inbox.put_image(kind, stamp, RawImage(f'cameras/{kind}', 'rgb8', 2, 2, 6, data))


@given(st.lists(GOOD | BAD, max_size=30))
def test_any_sequence_leaves_the_newest_good_values(puts):
    inbox = full_inbox()
    newest = {}
    for number, (kind, good) in enumerate(puts, start=1):
        if good:
            put(inbox, kind, number, good)
            newest[kind] = number
        else:
            with pytest.raises(ObservationError):
                put(inbox, kind, number, good)
    observation = inbox.observation(NOW)
    for camera, first in (('wrist', 1), ('side', 2)):
        image, number = observation.images[camera], newest.get(camera)
        pixels = image if number is None else image.rgb()
        assert pixels[0, 0, 0] == (first if number is None else number)
        assert observation.image_stamps_ns[camera] == NOW + (number or 0)
    assert observation.proprio[2] == newest.get('joints', 0.3)
    expected = f'task {newest["instruction"]}' if 'instruction' in newest else 'pick up the soup'
    assert observation.instruction == expected


def test_recent_images_leave_out_a_camera_that_fell_silent():
    inbox = full_inbox()
    inbox.put_image('side', NOW + NS, picture(3))
    assert set(inbox.recent_images(NOW)) == {'wrist', 'side'}
    assert set(inbox.recent_images(NOW + NS)) == {'side'}


def test_another_instruction_for_one_observation():
    inbox = full_inbox()
    assert inbox.observation(NOW, 'look around').instruction == 'look around'
    assert inbox.observation(NOW).instruction == 'pick up the soup'


# When to query ---------------------------------------------------------------------------------

MS = 1_000_000
PERIOD = 400 * MS


def trigger() -> QueryTrigger:
    trigger = QueryTrigger(('wrist', 'side'), PERIOD)
    trigger.start(NOW)
    return trigger


def test_the_image_that_completes_a_set_triggers():
    due = trigger()
    assert not due.image('wrist', NOW)
    assert not due.image('wrist', NOW + 33 * MS)
    assert due.image('side', NOW + 40 * MS)
    assert due.image('wrist', NOW + 66 * MS), 'it stays due while inference is busy'
    due.queried(NOW + 66 * MS)
    assert not due.image('side', NOW + 73 * MS)


def test_images_from_before_it_was_due_are_no_new_ones():
    due = trigger()
    due.queried(NOW)
    for camera in ('wrist', 'side'):
        assert not due.image(camera, NOW + PERIOD - MS)
    assert not due.image('wrist', NOW + PERIOD + MS)
    assert due.image('side', NOW + PERIOD + 2 * MS)


def test_a_dead_camera_does_not_hold_a_query_up():
    due = trigger()
    assert not due.is_overdue(NOW + due.START_PATIENCE_NS - 1)
    assert due.is_overdue(NOW + due.START_PATIENCE_NS)
    due.queried(NOW)
    assert not due.is_overdue(NOW + PERIOD + due.PATIENCE_NS - 1)
    assert due.is_overdue(NOW + PERIOD + due.PATIENCE_NS)


@given(
    st.integers(5, 400).map(lambda ms: ms * MS),
    st.lists(st.integers(1, 60), min_size=50, max_size=200),
)
def test_queries_keep_their_rate_on_average(period, gaps_ms):
    """However images come: no more queries than the rate allows, and not far fewer."""
    due, now, queries = QueryTrigger(('wrist',), period), NOW, 0
    due.start(now)
    for gap in gaps_ms:
        now += gap * MS
        if due.image('wrist', now):
            due.queried(now)
            queries += 1
    passed, slack = now - NOW, 60 * MS
    assert queries <= passed / period + 1
    assert queries >= passed / (period + slack) - 1


def test_a_set_waits_for_the_arm_s_state_but_not_long():
    trigger = QueryTrigger(('wrist', 'side'), PERIOD, 25 * MS)
    trigger.start(NOW)
    trigger.image('wrist', NOW)
    assert not trigger.hold(NOW), 'nothing waits for the state but a complete set'
    trigger.image('side', NOW)
    assert not trigger.is_held
    assert trigger.hold(NOW)
    assert trigger.is_held
    assert trigger.hold(NOW + 24 * MS)
    assert trigger.image('wrist', NOW + 24 * MS), 'further images do not make it wait anew'
    assert not trigger.hold(NOW + 25 * MS)
    trigger.queried(NOW + 25 * MS)
    assert not trigger.is_held
    assert not trigger.hold(NOW + 26 * MS)


def test_the_lag_of_the_state_is_counted_from_the_newest_image():
    inbox = full_inbox()
    assert inbox.proprio_lag_s == 0.0
    inbox.put_image('side', NOW + 30 * MS, picture(3))
    assert inbox.proprio_lag_s == pytest.approx(0.03)
    inbox.put_joints(NOW + 40 * MS, JOINTS, (0.1, 0.2, 0.3))
    assert inbox.proprio_lag_s == 0.0


def test_the_state_lags_until_its_last_message_has_come():
    """Joints and the hand's pose come in messages of their own, in any order."""
    inbox = libero_inbox((*POSE_NAMES, 'gripper'))
    inbox.put_joints(NOW, ('gripper',), (0.04,))
    inbox.put_pose(NOW - 50 * MS, POSITION, TURN)
    assert inbox.proprio_lag_s == pytest.approx(0.05)
    inbox.put_joints(NOW + 1, ('gripper',), (0.04,))
    assert inbox.proprio_lag_s == pytest.approx(0.05), 'the pose is still of before'
    inbox.put_pose(NOW, POSITION, TURN)
    assert inbox.proprio_lag_s == 0.0


def test_a_clock_set_back_does_not_silence_the_trigger():
    """Bug: the next query waited until the clock had caught up."""
    trigger = QueryTrigger(('wrist',), PERIOD)
    trigger.start(NOW)
    assert trigger.image('wrist', NOW)
    trigger.queried(NOW)
    earlier = NOW - 600 * 1_000_000_000
    assert trigger.image('wrist', earlier)
    trigger.queried(earlier)
    assert trigger.image('wrist', earlier + 2 * PERIOD)
