"""Whole recordings through a policy, and the command line around it."""

import csv
import dataclasses
import json
import math
from pathlib import Path

import cv2
import numpy as np
import pytest
from conftest import DATA, make_action, make_policy

from specprune_ros.cli import main
from specprune_ros.config_files import from_mapping, load_config
from specprune_ros.errors import ObservationError, RecordingError
from specprune_ros.inbox import POSE_NAMES
from specprune_ros.offline import fit_robot, run_recording, skipped_words
from specprune_ros.policy import Policy
from specprune_ros.recordings import Recording, open_recording
from specprune_ros.recordings.base import CameraEvent, InstructionEvent, JointEvent, PoseEvent
from specprune_ros.types import Mode, PolicyResult

OWN_BAG = DATA / 'pick_place'
NS, PERIOD = 1_000_000_000, 50_000_000
QUERIES = math.ceil(155 / 8)
STAGES = ('preprocess', 'embed', 'decode', 'act', 'pruning', 'total')
TIMINGS = {f'latency_{stage}_s' for stage in STAGES}


class InMemory:
    """A recording of given events."""

    path = 'in-memory'
    has_poses = False

    def __init__(self, events: list, cameras=('side',), joint_names=(), has_actions=True):
        self._events = events
        self.cameras, self.joint_names, self.has_actions = cameras, joint_names, has_actions
        self.duration_s = max((event.stamp_ns for event in events), default=0) / NS

    def events(self):
        return iter(self._events)


def picture(step: int = 0) -> np.ndarray:
    image = np.random.default_rng(0).integers(0, 255, (32, 32, 3), np.uint8)
    image[step % 24 : step % 24 + 8] = 250
    return image


def side_events(steps: int, actions: dict | None = None) -> list:
    """One camera and one action a step; `actions` replaces those of some steps."""
    events = [InstructionEvent(0, 'go')]
    for step in range(steps):
        stamp = step * PERIOD
        events.append(CameraEvent(stamp, 'side', picture(step)))
        action = (actions or {}).get(step, make_action(0.9))
        events.append(dataclasses.replace(action, stamp_ns=stamp + 1))
    return events


def results_of(outcomes: list) -> list[PolicyResult]:
    return [outcome[1] for outcome in outcomes if isinstance(outcome, tuple)]


@pytest.fixture(scope='module')
def own() -> Recording:
    return open_recording(OWN_BAG)


@pytest.fixture(scope='module')
def policies(own) -> dict[str, Policy]:
    """Budget -> tiny policy fitted to the own bag."""
    return {
        budget: Policy.load(fit_robot(from_mapping({'pruning.budget': budget}), own))
        for budget in ('union', 'fixed')
    }


@pytest.fixture(scope='module')
def outcomes(own, policies) -> dict[str, list]:
    """Budget -> everything that a run over the own bag yielded."""
    return {budget: list(run_recording(policy, own)) for budget, policy in policies.items()}


@pytest.fixture
def side_policy(shared_side_policy) -> Policy:
    shared_side_policy.reset()
    return shared_side_policy


@pytest.fixture(scope='module')
def shared_side_policy() -> Policy:
    return make_policy(robot__camera_names=('side',), robot__horizon=4)


# A robot as it was recorded --------------------------------------------------------------------


@pytest.mark.parametrize(
    ('turned', 'recorded', 'expected'),
    [
        ([180], ('front', 'wrist'), {'wrist': 180, 'front': 180}),
        ([180, 0, 0], ('wrist', 'overhead'), {'wrist': 180, 'overhead': 0}),
        ([180, 0, 180], ('front', 'overhead', 'side'), {'side': 0, 'overhead': 180, 'front': 0}),
        ([180, 0, 0], ('overhead', 'side', 'wrist'), {'wrist': 180, 'side': 0, 'overhead': 0}),
    ],
)
def test_cameras_keep_their_own_rotation(turned, recorded, expected):
    config = from_mapping(
        {'robot.camera_names': ['wrist', 'side', 'overhead'], 'robot.camera_rotations': turned}
    )
    robot = fit_robot(config, InMemory([], cameras=recorded)).robot
    assert robot.per_camera('camera_rotations') == expected


# The own bag -----------------------------------------------------------------------------------


def test_one_outcome_per_step_and_one_query_per_chunk(own, outcomes):
    for run in outcomes.values():
        assert len(run) == own.control_steps == 155
        assert len(results_of(run)) == QUERIES
        assert [step for step, outcome in enumerate(run) if outcome is not None] == list(
            range(0, 155, 8)
        )


def test_first_query_is_dense_then_both_modes_come(outcomes):
    for run in outcomes.values():
        modes = [result.report.mode for result in results_of(run)]
        assert modes[0] == Mode.DENSE
        assert set(modes[1:]) == {Mode.COARSE, Mode.FINE}


def test_observations_are_the_recorded_ones(own, outcomes):
    for outcome in outcomes['union'][::8]:
        observation, result = outcome
        assert observation.instruction == 'put the black bowl on the plate'
        assert set(observation.images) == set(own.cameras)
        assert observation.proprio.shape == (9,)
        assert result.report.stamp_ns == observation.stamp_ns
    stamps = [outcome[0].stamp_ns for outcome in outcomes['union'][::8]]
    assert np.diff(stamps).tolist() == [8 * PERIOD] * (QUERIES - 1)


def test_union_keeps_what_the_paper_reports(outcomes):
    for result in results_of(outcomes['union'])[1:]:
        share = result.report.tokens_static / result.report.tokens_total
        assert ((share >= 0.15) & (share <= 0.47)).all()


def test_fixed_keeps_an_exact_count(outcomes):
    for result in results_of(outcomes['fixed'])[1:]:
        count = 69 if result.report.mode == Mode.COARSE else 84
        assert result.report.tokens_total.tolist() == [256] * 3
        assert result.report.tokens_static.tolist() == [count] * 3


@pytest.mark.parametrize('budget', ['union', 'fixed'])
def test_layers_leave_two_thirds_of_that(outcomes, budget):
    for result in results_of(outcomes[budget])[1:]:
        report = result.report
        assert 0 < report.tokens_kept.sum() <= 0.66 * report.tokens_static.sum()
        assert (report.tokens_kept > 0).all()


@pytest.mark.parametrize('budget', ['union', 'fixed'])
def test_recall_is_known_after_the_first_query(outcomes, budget):
    first, *rest = (result.report.recall for result in results_of(outcomes[budget]))
    assert np.isnan(first).all()
    for recall in rest:
        assert np.isfinite(recall).all()
        assert ((recall >= 0) & (recall <= 1)).all()
    assert np.mean(rest) > 0.5  # neighbouring frames agree on what matters


def test_chunks_are_finite_and_within_limits(outcomes):
    chunks = [result.chunk for result in results_of(outcomes['union'])]
    assert [chunk.chunk_id for chunk in chunks] == list(range(1, QUERIES + 1))
    for chunk in chunks:
        assert chunk.data.shape == (8, 7)
        assert np.abs(chunk.data).max() <= 1


def same(first: object, second: object) -> bool:
    if isinstance(first, np.ndarray):
        floats = first.dtype.kind == 'f'
        return first.dtype == second.dtype and np.array_equal(first, second, equal_nan=floats)
    return first == second or (first != first and second != second)  # NaN equals NaN


@pytest.mark.parametrize('budget', ['union', 'fixed'])
def test_running_twice_gives_the_same_bits(own, policies, outcomes, budget):
    fresh = Policy(policies[budget].model, policies[budget].config)
    again = results_of(list(run_recording(fresh, own)))
    for first, second in zip(results_of(outcomes[budget]), again, strict=True):
        for a, b in ((first.chunk, second.chunk), (first.report, second.report)):
            for spec in dataclasses.fields(a):
                if spec.name not in TIMINGS:
                    assert same(getattr(a, spec.name), getattr(b, spec.name)), spec.name


def test_every_chooses_the_queries(own, policies):
    policies['union'].reset()
    run = list(run_recording(policies['union'], own, every=50))
    asked = [step for step, outcome in enumerate(run) if outcome is not None]
    assert asked == [0, 50, 100, 150]


# Fitting a robot -------------------------------------------------------------------------------


def test_configured_cameras_and_joints_are_taken_where_recorded(own):
    config = load_config(
        [], {'robot.camera_names': ['side', 'wrist'], 'robot.joint_names': ['panda_joint7']}
    )
    robot = fit_robot(config, own).robot
    assert robot.camera_names == ('side', 'wrist')
    assert robot.joint_names == ('panda_joint7',)


def test_recorded_cameras_and_joints_stand_in_for_others(own):
    config = load_config(
        [], {'robot.camera_names': ['front', 'side'], 'robot.joint_names': ['left_knee']}
    )
    robot = fit_robot(config, own).robot
    assert robot.camera_names[0] == 'side'
    assert set(robot.camera_names) == set(own.cameras)
    assert robot.joint_names == own.joint_names


def test_half_of_the_configured_joints_is_an_error():
    """Bug: the robot was silently fitted to whatever was recorded."""
    recording = InMemory([], has_actions=False)
    recording.joint_names, recording.cameras = ('a', 'g'), ('side',)
    with pytest.raises(RecordingError, match=r"lacks the joints \['b'\]"):
        fit_robot(from_mapping({'robot.joint_names': ['a', 'b']}), recording)


@pytest.mark.parametrize(
    ('wanted', 'has_poses', 'fitted'),
    [
        ((*POSE_NAMES, 'a'), True, (*POSE_NAMES, 'a')),
        (POSE_NAMES, True, POSE_NAMES),
        (POSE_NAMES, False, ('a', 'b')),
        (('b', 'a'), True, ('b', 'a')),
        ((), True, ('a', 'b')),
    ],
)
def test_the_poses_elements_are_recorded_where_poses_are(wanted, has_poses, fitted):
    recording = InMemory([], joint_names=('a', 'b'))
    recording.has_poses = has_poses
    robot = fit_robot(from_mapping({'robot.joint_names': wanted}), recording).robot
    assert robot.joint_names == fitted


def test_fingers_without_the_pose_are_an_error(own):
    config = load_config(['robots/libero_franka'])
    with pytest.raises(
        RecordingError, match=r"no end-effector poses \(topic eef_pose\).*'eef_ax'"
    ):
        fit_robot(config, own)


def test_no_more_cameras_than_a_model_takes():
    recording = InMemory([], has_actions=False)
    recording.cameras = tuple('abcdef')
    assert len(fit_robot(from_mapping({}), recording).robot.camera_names) == 4


# Recordings of other kinds ---------------------------------------------------------------------


def test_without_actions_images_are_the_steps_and_motion_is_unknown(side_policy):
    events = [event for event in side_events(12) if isinstance(event, CameraEvent)]
    recording = InMemory([InstructionEvent(0, 'go'), *events], has_actions=False)
    run = list(run_recording(side_policy, recording))
    assert len(run) == 12
    reports = [result.report for result in results_of(run)]
    assert [report.mode for report in reports] == [Mode.DENSE, Mode.FINE, Mode.FINE]
    assert np.isnan(reports[-1].translation_speed)


def test_queries_wait_for_the_first_image(side_policy):
    events = side_events(10)
    del events[1:6:2]  # the images of steps 0, 1 and 2
    run = list(run_recording(side_policy, InMemory(events)))
    assert [isinstance(outcome, ObservationError) for outcome in run[:4]] == [True] * 3 + [False]
    assert len(results_of(run)) == 2


@pytest.mark.parametrize(
    ('absent', 'told'),
    [(CameraEvent, 'cameras/side'), (InstructionEvent, 'instruction'), (JointEvent, 'joint')],
)
def test_input_that_never_came_is_named(absent, told):
    policy = make_policy(robot__camera_names=('side',), robot__joint_names=('a',))
    events = [JointEvent(0, ('a',), np.zeros(1)), *side_events(3)]
    events = [event for event in events if not isinstance(event, absent)]
    with pytest.raises(RecordingError, match=told):
        list(run_recording(policy, InMemory(events, joint_names=('a',))))


def test_bad_executed_actions_cost_no_query(side_policy):
    """Bug: what `observe_executed` refuses ended the run; a robot would have gone on."""
    bad = {2: make_action(np.nan), 5: make_action(names=tuple('abcdefg'))}
    run = list(run_recording(side_policy, InMemory(side_events(12, bad))))
    assert len(results_of(run)) == 3


def test_bad_joint_state_costs_no_query():
    policy = make_policy(robot__camera_names=('side',), robot__joint_names=('a',))
    events = side_events(10)
    events.insert(1, JointEvent(0, ('a',), np.ones(1)))
    events.insert(-3, JointEvent(5, ('a',), np.array([np.nan])))
    run = list(run_recording(policy, InMemory(events, joint_names=('a',))))
    assert len([outcome for outcome in run if isinstance(outcome, ObservationError)]) == 1
    assert len(results_of(run)) == 2


def test_recorded_poses_reach_the_model():
    names = ('eef_z', 'eef_ax', 'a')
    policy = make_policy(robot__camera_names=('side',), robot__joint_names=names)
    pose = PoseEvent(0, np.array([0.1, 0.2, 0.3]), np.array([0.6, 0.0, 0.0, 0.8]))
    bad = dataclasses.replace(pose, quaternion_xyzw=np.zeros(4))
    events = [JointEvent(0, ('a',), np.ones(1)), pose, bad, *side_events(3)]
    recording = InMemory(events, joint_names=('a',))
    recording.has_poses = True
    error, (observation, _), *_ = run_recording(policy, recording)
    assert error.code == 'pose_quaternion'
    np.testing.assert_allclose(observation.proprio, [0.3, 2 * math.acos(0.8), 1.0])
    with pytest.raises(RecordingError, match='eef_pose'):
        list(run_recording(policy, InMemory(events[3:], joint_names=('a',))))


# Stale inputs ----------------------------------------------------------------------------------

AGE_S, DIES, LIVES = 0.5, 10, 30  # default limit; steps after which an input stops and is back


def without(events: list, kind: type, camera: str = '', until: int = LIVES) -> list:
    """The events without an input's from step DIES to `until`."""
    gone = range(DIES * PERIOD, until * PERIOD)
    return [
        event
        for event in events
        if not (
            isinstance(event, kind)
            and getattr(event, 'camera', '') == camera
            and event.stamp_ns in gone
        )
    ]


def wrist_and_side(steps: int) -> list:
    events = side_events(steps)
    wrist = [CameraEvent(e.stamp_ns, 'wrist', e.image) for e in events if hasattr(e, 'camera')]
    return sorted([*events, *wrist], key=lambda event: event.stamp_ns)


def stale(run: list) -> list[ObservationError]:
    return [outcome for outcome in run if isinstance(outcome, ObservationError)]


@pytest.mark.parametrize('names', [('wrist', 'side'), ('side', 'wrist')])
def test_a_dead_camera_skips_queries_until_it_is_back(names):
    """Bug: its last image was repeated for ever."""
    policy = make_policy(robot__camera_names=names, robot__horizon=4)
    events = without(wrist_and_side(40), CameraEvent, 'wrist')
    run = list(run_recording(policy, InMemory(events, cameras=names)))
    errors = stale(run)
    assert len(errors) >= LIVES - DIES - AGE_S * NS / PERIOD - 4
    assert {(error.code, error.field) for error in errors} == {('camera_stale', 'cameras/wrist')}
    for observation, result in (outcome for outcome in run if isinstance(outcome, tuple)):
        now_ns = observation.image_stamps_ns['side']
        assert now_ns - observation.image_stamps_ns['wrist'] <= AGE_S * NS
        assert result.report.fallback_reason == ''
    last = results_of(run)[-1].report
    assert last.stamp_ns >= LIVES * PERIOD
    reported = skipped_words(errors)
    assert f'cameras/wrist camera_stale {len(errors)} x' in reported
    assert 'runtime.max_image_age_s' in reported


def test_a_dead_camera_is_absent_for_the_policy(monkeypatch):
    """What was away is compared with nothing old, as in the node."""
    policy = make_policy(robot__camera_names=('wrist', 'side'), robot__horizon=4)
    seen = []
    observe = policy.observe_executed
    monkeypatch.setattr(
        policy,
        'observe_executed',
        lambda a, images: seen.append(set(images)) or observe(a, images),
    )
    events = without(wrist_and_side(40), CameraEvent, 'wrist')
    list(run_recording(policy, InMemory(events, cameras=('wrist', 'side'))))
    away = [step for step, names in enumerate(seen) if names == {'side'}]
    last_seen = DIES - 1
    assert away == list(range(last_seen + round(AGE_S * NS / PERIOD), LIVES))


def test_a_dead_joint_state_skips_queries():
    policy = make_policy(robot__camera_names=('side',), robot__joint_names=('a',))
    events = side_events(40)
    joints = [JointEvent(e.stamp_ns, ('a',), np.ones(1)) for e in events if hasattr(e, 'camera')]
    events = without([*events, *joints], JointEvent)
    events.sort(key=lambda event: event.stamp_ns)
    run = list(run_recording(policy, InMemory(events, joint_names=('a',))))
    assert {error.code for error in stale(run)} == {'joint_stale'}
    assert results_of(run)[-1].report.stamp_ns >= LIVES * PERIOD


@pytest.mark.parametrize(('limit_s', 'queries', 'skipped'), [(0.5, 2, 5), (60.0, 3, 0)])
def test_an_input_that_comes_once_goes_stale_as_on_the_robot(limit_s, queries, skipped):
    """The limit is the configured one: the same recording passes whole with a larger one."""
    policy = make_policy(
        robot__camera_names=('side',), robot__joint_names=('a',), runtime__max_joint_age_s=limit_s
    )
    events = [JointEvent(0, ('a',), np.ones(1)), *side_events(21)]
    run = list(run_recording(policy, InMemory(events, joint_names=('a',))))
    assert (len(results_of(run)), len(stale(run))) == (queries, skipped)


def test_a_dead_step_camera_is_told_though_no_step_is_left():
    """Bug: without actions its images are the steps, and the run just ended, silently."""
    policy = make_policy(robot__camera_names=('side',), robot__joint_names=('a',))
    images = [event for event in side_events(40) if isinstance(event, CameraEvent)]
    joints = [JointEvent(event.stamp_ns, ('a',), np.ones(1)) for event in images]
    events = without([InstructionEvent(0, 'go'), *joints, *images], CameraEvent, 'side', until=40)
    events.sort(key=lambda event: event.stamp_ns)
    run = list(run_recording(policy, InMemory(events, joint_names=('a',), has_actions=False)))
    (error,) = stale(run)
    assert (error.code, error.field) == ('camera_stale', 'cameras/side')


def test_inputs_that_never_meet_in_time_are_told():
    policy = make_policy(robot__camera_names=('side',), robot__joint_names=('a',))
    late = [dataclasses.replace(e, stamp_ns=e.stamp_ns + 90 * NS) for e in side_events(9)[1:]]
    events = [JointEvent(0, ('a',), np.ones(1)), *side_events(1)[:1], *late]
    with pytest.raises(RecordingError, match=r'joint_states.*90\.\d+ s old'):
        list(run_recording(policy, InMemory(events, joint_names=('a',))))


def test_nothing_skipped_needs_no_words():
    assert skipped_words([]) == ''


# specprune run ---------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def run_folder(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp('run') / 'made' / 'here'
    params = ['--params', 'models/tiny', '--params', 'pruning/specprune']
    code = main(
        ['run', str(OWN_BAG), *params, '--set', 'pruning.alpha=0.6', '--every', '16',
         '--out', str(out)]
    )  # fmt: skip
    assert code == 0
    return out


def test_run_writes_chunks(run_folder):
    with np.load(run_folder / 'chunks.npz') as file:
        assert file['data'].shape == file['normalized'].shape == (10, 8, 7)
        assert np.isfinite(file['data']).all()
        assert (np.diff(file['stamp_ns']) == 16 * PERIOD).all()
        assert file['chunk_id'].tolist() == list(range(1, 11))
        assert file['names'].tolist() == ['x', 'y', 'z', 'roll', 'pitch', 'yaw', 'gripper']


def test_run_writes_reports(run_folder):
    lines = (run_folder / 'reports.jsonl').read_text().splitlines()
    reports = [json.loads(line) for line in lines]
    assert len(reports) == 10
    assert [report['mode'] for report in reports][:1] == [Mode.DENSE]
    assert {report['alpha'] for report in reports} == {0.6}
    assert all(len(report['tokens_static']) == 3 for report in reports)


def test_reports_are_json_to_any_reader(run_folder):
    """Bug: an unknown recall or speed was written as NaN, which JSON does not have."""

    def refuse(word: str):
        raise ValueError(f'{word} is not JSON')

    for name in ('reports.jsonl', 'summary.json'):
        text = (run_folder / name).read_text()
        for line in text.splitlines() if name.endswith('l') else [text]:
            json.loads(line, parse_constant=refuse)


def test_run_writes_overlays_and_plot(run_folder):
    names = sorted(path.name for path in (run_folder / 'overlays').iterdir())
    cameras = ('overhead', 'side', 'wrist')
    assert names == [f'{camera}_{query:04d}.png' for camera in cameras for query in range(10)]
    overlay = cv2.imread(str(run_folder / 'overlays' / 'wrist_0003.png'))
    assert overlay.shape[0] > overlay.shape[1] >= 448
    assert cv2.imread(str(run_folder / 'queries.png')).std() > 5


def test_run_writes_a_summary(run_folder):
    summary = json.loads((run_folder / 'summary.json').read_text())
    assert (summary['queries'], summary['skipped'], summary['alpha']) == (10, 0, 0.6)
    assert summary['stand_in'] is True
    assert set(summary['cameras']) == {'wrist', 'side', 'overhead'}
    assert summary['modes']['dense']['queries'] == 1
    assert sum(mode['queries'] for mode in summary['modes'].values()) == 10
    assert summary['modes']['dense']['kept_share_per_camera'] == [1, 1, 1]


def test_run_writes_videos(tmp_path):
    path = tmp_path / 'wipe_the_table.avi'
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*'MJPG'), 10, (64, 48))
    for step in range(12):
        writer.write(np.full((48, 64, 3), 20 * step, np.uint8))
    writer.release()
    out = tmp_path / 'out'
    assert main(['run', str(path), '--camera', 'front', '--every', '4', '--video',
                 '--out', str(out)]) == 0  # fmt: skip
    capture = cv2.VideoCapture(str(out / 'overlay_front.mp4'))
    frames = []
    while (frame := capture.read())[0]:
        frames.append(frame[1])
    assert len(frames) == 3
    assert frames[0].shape[1] >= 448
    assert np.abs(frames[2].astype(int) - frames[0]).mean() > 5
    assert not (out / 'overlays').exists()


BAD_ARGUMENTS = {
    'missing recording': (['nowhere/bag'], 'nowhere/bag'),
    'camera not in the bag': ([str(OWN_BAG), '--camera', 'wrist=/nope'], '/nope'),
    'camera without a topic': ([str(OWN_BAG), '--camera', 'wrist'], 'NAME=TOPIC'),
    'unknown name': ([str(OWN_BAG), '--set', 'pruning.alfa=0.5'], 'pruning.alpha'),
    'no equals sign': ([str(OWN_BAG), '--set', 'pruning.alpha'], 'pruning.alpha=0.6'),
    'out of range': ([str(OWN_BAG), '--set', 'pruning.alpha=9'], 'pruning.alpha'),
    'wrong type': ([str(OWN_BAG), '--set', 'pruning.alpha=much'], 'pruning.alpha'),
    'value is not YAML': ([str(OWN_BAG), '--set', 'pruning.alpha=['], 'pruning.alpha'),
    'impossible date': ([str(OWN_BAG), '--set', 'model.name=2024-13-45'], 'model.name'),
    'missing params': ([str(OWN_BAG), '--params', 'robots/none'], 'robots/none'),
    'params of no kind': ([str(OWN_BAG), '--params', str(OWN_BAG / 'metadata.yaml')], 'metadata'),
    'unknown model': ([str(OWN_BAG), '--set', 'model.name=huge'], 'huge'),
    'unknown device': ([str(OWN_BAG), '--set', 'model.device=abacus'], 'abacus'),
    'negative every': ([str(OWN_BAG), '--every', '-3'], 'every'),
}


@pytest.mark.parametrize('case', BAD_ARGUMENTS)
def test_what_the_user_can_mend_is_one_line(tmp_path, capsys, case):
    """Bug: `--set x=[` was a traceback, and `--every -3` queried at every step."""
    arguments, told = BAD_ARGUMENTS[case]
    try:
        code = main(['run', *arguments, '--out', str(tmp_path / 'out')])
    except SystemExit as stop:  # argparse's own refusal, whose last line says why
        code = stop.code
    lines = capsys.readouterr().err.strip().splitlines()
    assert code == 2
    assert told in lines[-1]
    assert lines[-1].startswith('specprune run: ')
    assert len(lines) == 1 or lines[0].startswith('usage: ')
    assert not (tmp_path / 'out').exists()


def test_yaml_error_is_one_line(tmp_path, capsys):
    """Bug: PyYAML's message of five lines was printed as it is."""
    path = tmp_path / 'bad.yaml'
    path.write_text('/**:\n  ros__parameters: [\n')
    assert main(['run', str(OWN_BAG), '--params', str(path)]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert str(path) in lines[0]


def test_output_folder_that_cannot_be_made(tmp_path, capsys):
    """Bug: a traceback of FileExistsError."""
    (tmp_path / 'file').write_text('')
    assert main(['run', str(OWN_BAG), '--out', str(tmp_path / 'file')]) == 2
    assert str(tmp_path / 'file') in capsys.readouterr().err


# specprune bench -------------------------------------------------------------------------------


def test_bench_writes_rows(tmp_path, capsys):
    as_json, as_csv = tmp_path / 'rows.json', tmp_path / 'rows.csv'
    assert main(['bench', '--cameras', '1', '--repeats', '2', '--json', str(as_json),
                 '--csv', str(as_csv)]) == 0  # fmt: skip
    rows = json.loads(as_json.read_text())
    assert {row['method'] for row in rows} == {'none', 'specprune'}
    forms = {(row['method'], row['form']) for row in rows}
    assert len(forms) >= 3
    stages = {'preprocess', 'vision', 'projector', 'decoder', 'head', 'total'}
    for form in forms:
        mine = [row for row in rows if (row['method'], row['form']) == form]
        found = {row['stage'] for row in mine}
        pruned = {'scores', 'selection'} if form[0] == 'specprune' else set()
        assert found == stages | pruned
        assert len(mine) == len(found)
    for row in rows:
        assert row['cameras'] == 1
        for key in ('median_ms', 'p95_ms', 'ratio_to_dense_sdpa'):
            assert math.isfinite(row[key])
            # Of what the dense model does not do at all, the ratio is 0.
            assert row[key] > 0 or row['stage'] in ('scores', 'selection')
        assert row['p95_ms'] >= row['median_ms']
        assert row['torch']
        assert row['hardware']
    with as_csv.open(newline='') as file:
        table = list(csv.DictReader(file))
    assert [row['stage'] for row in table] == [row['stage'] for row in rows]
    assert table[0].keys() == rows[0].keys()
    assert 'specprune' in capsys.readouterr().out


@pytest.mark.parametrize('repeats', ['0', '-1'])
def test_bench_without_repeats(capsys, repeats):
    """Bug: a traceback of ZeroDivisionError, after the models were loaded."""
    try:
        code = main(['bench', '--cameras', '1', '--repeats', repeats])
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    assert 'repeats' in capsys.readouterr().err


def test_bench_that_cannot_write(tmp_path, capsys):
    """Bug: a traceback after the last measurement, and nothing printed was kept."""
    (tmp_path / 'file').write_text('')
    path = tmp_path / 'file' / 'rows.json'
    assert main(['bench', '--cameras', '1', '--repeats', '1', '--json', str(path)]) == 2
    assert str(path) in capsys.readouterr().err
