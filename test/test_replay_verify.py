"""`specprune replay --verify`: recorded decisions, computed again, bit for bit."""

import dataclasses
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import DATA
from rosbags.rosbag2 import StoragePlugin, Writer
from rosbags.typesys import Stores, get_typestore

from specprune_ros.cli import main
from specprune_ros.cli.replay_verify import Difference, outcomes
from specprune_ros.config_files import from_mapping
from specprune_ros.errors import RecordingError
from specprune_ros.offline import fit_robot, run_recording
from specprune_ros.policy import Policy
from specprune_ros.recordings import open_recording
from specprune_ros.recordings.bag import register_own_messages
from specprune_ros.recordings.decisions import DecisionRecording
from specprune_ros.recordings.topics import recorded_topics
from specprune_ros.types import ExecutedAction, Observation, PolicyResult, PruneReport

NS, PERIOD = 1_000_000_000, 50_000_000
CAMERAS, JOINTS = ('wrist', 'side'), ('j1', 'j2')
ACTIONS = ('x', 'y', 'z', 'roll', 'pitch', 'yaw', 'gripper')
SETTINGS = {
    'robot.camera_names': list(CAMERAS),
    'robot.joint_names': list(JOINTS),
    'robot.horizon': 4,
    'model.threads': 1,
}
START = 1_767_261_600 * NS  # a clock time: sums of nanoseconds beyond what a double holds


@dataclasses.dataclass(frozen=True)
class Written:
    """One recorded message; `tag` says what it is of: camera, 'executed' or 'report', and step."""

    topic: str
    written_ns: int
    message: object
    tag: tuple[str, int]


class LiveRun:
    """What a recorder would have heard beside the node, message by message."""

    def __init__(self):
        self.store = get_typestore(Stores.ROS2_HUMBLE)
        register_own_messages(self.store)
        self.heard: list[Written] = []
        self.reports: list[PruneReport] = []

    def write(self, path: Path, heard: list[Written] | None = None) -> Path:
        """As a bag with the parameters beside it."""
        topics: dict = {}
        with Writer(path, version=9, storage_plugin=StoragePlugin.MCAP) as writer:
            for entry in self.heard if heard is None else heard:
                kind = entry.message.__msgtype__
                if entry.topic not in topics:
                    topics[entry.topic] = writer.add_connection(
                        entry.topic, kind, typestore=self.store
                    )
                data = bytes(self.store.serialize_cdr(entry.message, kind))
                writer.write(topics[entry.topic], entry.written_ns, data)
        parameters = {'/arm/vla_node': {'ros__parameters': SETTINGS}}
        path.with_name(f'{path.name}.yaml').write_text(yaml.safe_dump(parameters))
        return path

    def without(self, *lost: tuple[str, int]) -> list[Written]:
        """All that was heard, but for some messages."""
        return [entry for entry in self.heard if entry.tag not in lost]

    def with_change(self, tag: tuple[str, int], **fields) -> list[Written]:
        """All that was heard, with some fields of one message changed."""
        return [
            dataclasses.replace(entry, message=dataclasses.replace(entry.message, **fields))
            if entry.tag == tag
            else entry
            for entry in self.heard
        ]

    def put(self, tag, topic: str, written_ns: int, kind: str, stamp_ns: int, **fields) -> None:
        types = self.store.types
        stamp = types['builtin_interfaces/msg/Time'](stamp_ns // NS, stamp_ns % NS)
        message = types[kind](header=types['std_msgs/msg/Header'](stamp, 'base'), **fields)
        self.heard.append(Written(topic, written_ns, message, tag))

    def image(self, camera: str, step: int, stamp_ns: int, rgb: np.ndarray, late_ns: int) -> None:
        self.put(
            (camera, step), f'/arm/cameras/{camera}/image_raw', stamp_ns + late_ns,
            'sensor_msgs/msg/Image',
            stamp_ns, height=rgb.shape[0], width=rgb.shape[1], encoding='rgb8', is_bigendian=0,
            step=3 * rgb.shape[1], data=rgb.reshape(-1),
        )  # fmt: skip

    def joints(self, step: int, stamp_ns: int, positions: np.ndarray) -> None:
        self.put(
            ('joints', step), '/arm/joint_states', stamp_ns,
            'sensor_msgs/msg/JointState', stamp_ns,
            name=list(JOINTS), position=positions, velocity=np.zeros(0), effort=np.zeros(0),
        )  # fmt: skip

    def executed(self, step: int, action: ExecutedAction) -> None:
        duration = self.store.types['builtin_interfaces/msg/Duration'](0, PERIOD)
        self.put(
            ('executed', step), '/arm/executed_action', action.stamp_ns,
            'specprune_ros/msg/ExecutedAction',
            action.stamp_ns, chunk_id=1, epoch=1, step=0, step_dt=duration, space=2,
            names=list(action.names), units=list(action.units), data=action.data, dry_run=False,
        )  # fmt: skip

    def decision(self, step: int, written_ns: int, result: PolicyResult) -> None:
        kind, report = 'specprune_ros/msg/PruningDiagnostics', result.report
        self.reports.append(report)
        fields = {spec.name: getattr(report, spec.name) for spec in dataclasses.fields(report)}
        stamp = fields.pop('stamp_ns')
        fields = {k: list(v) if isinstance(v, tuple) else v for k, v in fields.items()}
        fields = {k: int(v) if isinstance(v, np.integer) else v for k, v in fields.items()}
        wanted = self.store.types[kind].__dataclass_fields__
        fields = {k: self._typed(wanted[k].type, v) for k, v in fields.items() if k in wanted}
        tag = ('report', step)
        self.put(tag, '/arm/vla_node/pruning', written_ns, kind, stamp, **fields)
        chunk, make = result.chunk, self.store.types
        self.put(
            ('chunk', step), '/arm/vla_node/action_chunk', written_ns,
            'specprune_ros/msg/ActionChunk', written_ns,
            observation_stamp=make['builtin_interfaces/msg/Time'](*divmod(stamp, NS)),
            step_dt=make['builtin_interfaces/msg/Duration'](0, PERIOD),
            valid_for=make['builtin_interfaces/msg/Duration'](0, PERIOD),
            chunk_id=report.chunk_id, epoch=report.epoch, space=2, names=list(chunk.names),
            units=list(chunk.units), horizon=chunk.horizon, data=chunk.data.ravel(),
            normalized=chunk.normalized.ravel(), clamped=0, dry_run=True, stand_in=True,
        )  # fmt: skip

    @staticmethod
    def _typed(kind: str, value):
        """rosbags writes what it is given: sizes and signs must be the message's."""
        if not isinstance(value, np.ndarray):
            return value
        wanted = next(d for d in ('uint32', 'uint8', 'int64', 'float64') if d in str(kind))
        return value.astype(wanted)


def picture(camera: str, step: int) -> np.ndarray:
    rgb = np.random.default_rng(len(camera)).integers(0, 255, (48, 64, 3), np.uint8)
    rgb[8:20, step % 40 : step % 40 + 12] = 250
    return rgb


@pytest.fixture(scope='module')
def live() -> LiveRun:
    """Two tasks of two queries: images come before, and are written after, what they fed."""
    policy, run, images, stamps = Policy.load(from_mapping(SETTINGS)), LiveRun(), {}, {}
    for step in range(16):
        now = START + step * PERIOD
        for index, camera in enumerate(CAMERAS):
            stamps[camera] = now + 1000 * index
            images[camera] = picture(camera, step)
            late = 30_000_000 if camera == 'side' else 0
            run.image(camera, step, stamps[camera], images[camera], late)
        joints = np.array([0.1 * step, -0.2])
        run.joints(step, now + 5, joints)
        action = ExecutedAction(
            stamp_ns=now + 10, names=ACTIONS, units=('1',) * 7,
            data=np.array([0.9 - 0.1 * (step % 7), 0, -0.3, 0, 0, 0.1, 1.0]),
        )  # fmt: skip
        run.executed(step, action)
        policy.observe_executed(action, images, dict(stamps))
        if step % 4 == 3:
            observation = Observation(
                images=dict(images),
                proprio=joints,
                instruction='stack the cubes' if step < 12 else 'open the drawer',
                stamp_ns=min(*stamps.values(), now + 5),
                image_stamps_ns=dict(stamps),
                proprio_stamps_ns=(now + 5,),
            )
            run.decision(step, now + 20, policy.infer(observation))
    return run


def verify(path: Path, capsys) -> tuple[int, str]:
    status = main(['replay', str(path), '--verify'])
    captured = capsys.readouterr()
    return status, ' '.join((captured.out + captured.err).split())


@pytest.fixture(scope='module')
def computed(tmp_path_factory, live):
    """Outcomes of a recording of what was heard, with a policy of one's own."""
    policy = Policy.load(from_mapping(SETTINGS))

    def compute(heard: list[Written]) -> list:
        path = live.write(tmp_path_factory.mktemp('bag') / 'live', heard)
        return list(outcomes(policy, DecisionRecording(path, policy.config.robot)))

    return compute


def kinds(results: list) -> list[type]:
    wanted = (PolicyResult, Difference, RecordingError)
    return [next(kind for kind in wanted if isinstance(result, kind)) for result in results]


def test_a_recorded_run_is_computed_again_bit_for_bit(tmp_path, capsys, live):
    status, told = verify(live.write(tmp_path / 'live'), capsys)
    assert status == 0, told
    assert '4 queries: 4 equal bit for bit, 0 different, 0 not comparable' in told


def test_a_difference_is_told_and_is_the_status(tmp_path, capsys, live):
    heard = live.with_change(('report', 7), mode=3)
    status, told = verify(live.write(tmp_path / 'live', heard), capsys)
    assert status == 1
    assert '3 equal bit for bit, 1 different, 0 not comparable' in told
    assert 'first different: query 1 of epoch 1' in told
    assert 'mode: recorded 3, computed' in told


def test_the_same_recording_twice_is_the_same(live, computed):
    for results in (computed(live.heard), computed(live.heard)):
        assert kinds(results) == 4 * [PolicyResult]


@pytest.mark.parametrize(
    ('tag', 'changes'),
    [
        (('report', 7), {'alpha': float(np.nextafter(0.8, 1.0))}),
        (('chunk', 7), {'data': np.zeros(4 * 7)}),
        # Not merely the report is compared: the decision is computed from the recorded inputs.
        (('wrist', 7), {'data': np.zeros(48 * 64 * 3, np.uint8)}),
        pytest.param(('executed', 6), {'data': np.full(7, 0.01)}, marks=pytest.mark.slow),
        pytest.param(('joints', 7), {'position': np.array([0.7, -0.3])}, marks=pytest.mark.slow),
    ],
)
def test_one_change_is_found(live, computed, tag, changes):
    results = computed(live.with_change(tag, **changes))
    assert kinds(results)[:2] == [PolicyResult, Difference]
    assert 'query 1 of epoch 1' in results[1].text


def test_a_lost_image_that_nobody_looked_at_costs_nothing(live, computed):
    # The query after step s compares with the images of the action `reference_age` before s + 1.
    looked_at = {4 * index + 4 - r.reference_age for index, r in enumerate(live.reports)}
    lost = next(step for step in range(12) if step % 4 != 3 and step not in looked_at)
    assert kinds(computed(live.without(('side', lost)))) == 4 * [PolicyResult]


@pytest.mark.parametrize(
    'lost',
    [
        ('wrist', 7),
        pytest.param(('executed', 6), marks=pytest.mark.slow),
        pytest.param(('joints', 7), marks=pytest.mark.slow),
    ],
)
def test_a_loss_is_told_up_to_the_next_episode(live, computed, lost):
    results = computed(live.without(lost))
    assert kinds(results) == [PolicyResult, RecordingError, RecordingError, PolicyResult]
    assert 'lacks' in str(results[1])
    assert 'query 1 could not' in str(results[2])


def test_a_lost_report_is_told_up_to_the_next_episode(live, computed):
    results = computed(live.without(('report', 7)))
    assert kinds(results) == [PolicyResult, RecordingError, PolicyResult]
    assert 'no report of query 1' in str(results[1])


def test_chunks_of_a_restarted_node_are_told_apart(live, computed):
    # Its epochs and chunk ids begin again: the same numbers, of other observations.
    make = live.store.types['builtin_interfaces/msg/Time']
    later = [
        dataclasses.replace(
            entry,
            message=dataclasses.replace(
                entry.message,
                observation_stamp=make(entry.message.observation_stamp.sec + 60, 0),
                data=np.zeros(4 * 7),
            ),
            written_ns=entry.written_ns + 60 * NS,
        )
        for entry in live.heard
        if entry.tag[0] == 'chunk'
    ]
    assert kinds(computed(live.heard + later)) == 4 * [PolicyResult]


def test_a_robot_that_read_other_inputs_is_refused(tmp_path, capsys, live):
    path = live.write(tmp_path / 'live')
    path.with_name('live.yaml').unlink()  # models/tiny: another camera, no joints
    status, told = verify(path, capsys)
    assert status == 2
    assert "cameras ('wrist', 'side')" in told
    assert '--params' in told
    others = f'robot.camera_names=[{", ".join(CAMERAS)}]', 'robot.joint_names=[]'
    assert main(['replay', str(path), '--verify', '--set', others[0], '--set', others[1]]) == 2
    told = ' '.join(capsys.readouterr().err.split())
    assert '1 messages of state per query, robot.joint_names needs ()' in told


def test_recordings_without_decisions_are_refused(tmp_path, capsys):
    status, told = verify(DATA / 'pick_place', capsys)
    assert status == 2
    assert 'holds no decisions' in told
    assert main(['replay', str(tmp_path / 'absent'), '--verify']) == 2


@pytest.mark.parametrize(
    ('options', 'refused'),
    [
        (['--verify', '--rate', '2'], '--rate'),
        (['--verify', '--camera', 'wrist=/a'], '--camera'),
        (['--set', 'pruning.alpha=0.6'], '--set'),
    ],
)
def test_options_that_would_say_nothing_are_refused(capsys, options, refused):
    assert main(['replay', str(DATA / 'pick_place'), *options]) == 2
    assert f'{refused} = ' in capsys.readouterr().err


def decisions_of(policy: Policy) -> Iterator[tuple]:
    """Everything that two runs of a recording must have in common."""
    policy.reset()
    for outcome in run_recording(policy, open_recording(DATA / 'pick_place')):
        if isinstance(outcome, tuple):
            report, chunk = outcome[1].report, outcome[1].chunk
            yield report.reason.tobytes(), report.important.tobytes(), report.mode, report.alpha
            yield report.pruned_after_layer.tobytes(), chunk.data.tobytes()


@pytest.mark.slow
def test_the_same_recording_twice_gives_the_same_decisions():
    recording = open_recording(DATA / 'pick_place')
    config = fit_robot(from_mapping({'model.threads': 1}), recording)
    first, second = (list(decisions_of(Policy.load(config))) for _ in range(2))
    assert first == second
    assert len(first) == 40


@pytest.mark.slow
@pytest.mark.ros
@pytest.mark.timeout(180)
def test_a_run_of_the_real_node_is_computed_again(tmp_path, capsys):
    rclpy = pytest.importorskip('rclpy', reason='no ROS here')
    pytest.importorskip('specprune_ros.msg', reason='messages are not built')
    import ros_world

    from specprune_ros.ros.parameter_snapshot import snapshot

    path = tmp_path / 'live'
    # A late query has a report and no chunk: a busy machine must not matter.
    patient = {**ros_world.FAST_NODE, 'runtime.max_result_age_s': 20.0}
    with ros_world.ros_domain(17), ros_world.NodeProcess('vla_node', patient) as node:
        world, recorder = ros_world.World(), rclpy.create_node('recorder')
        world.streams.add('executed')
        with Writer(path, version=9, storage_plugin=StoragePlugin.MCAP) as writer:
            record_topics(recorder, writer)
            world.start()
            assert snapshot(world, ['/vla_node'], path.with_name('live.yaml')) == 1
            end = time.monotonic() + 30.0
            while len(world.reports) < 12 and time.monotonic() < end:
                world.run(0.01)
                for _ in range(20):
                    rclpy.spin_once(recorder, timeout_sec=0.0)
            assert len(world.reports) >= 12, node.output()
        world.destroy_node(), recorder.destroy_node()
    status, told = verify(path, capsys)
    assert status == 0, told
    equal = int(told.split(' equal')[0].split()[-1])
    assert equal >= 10, told


def record_topics(recorder, writer: Writer) -> None:
    """Write what record.launch.py would record, as it comes off the wire."""
    from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy
    from ros_world import FAST_NODE
    from sensor_msgs.msg import Image, JointState

    from specprune_ros.msg import ActionChunk, ExecutedAction, PruningDiagnostics

    store = get_typestore(Stores.ROS2_HUMBLE)
    register_own_messages(store)
    kinds = {
        'image_raw': Image, 'joint_states': JointState, 'executed_action': ExecutedAction,
        'pruning': PruningDiagnostics, 'action_chunk': ActionChunk,
    }  # fmt: skip
    robot = from_mapping({k: v for k, v in FAST_NODE.items() if k.startswith('robot')}).robot
    for topic, profile in recorded_topics(robot).items():
        kind = kinds.get(topic.rpartition('/')[2])
        if kind is None:
            continue
        name = f'{kind.__module__.partition(".")[0]}/msg/{kind.__name__}'
        connection = writer.add_connection(topic, name, typestore=store)
        quality = QoSProfile(
            depth=profile['depth'],
            reliability=ReliabilityPolicy[profile['reliability'].upper()],
            durability=DurabilityPolicy[profile.get('durability', 'volatile').upper()],
        )
        recorder.create_subscription(
            kind,
            topic,
            lambda data, connection=connection: writer.write(connection, time.time_ns(), data),
            quality,
            raw=True,
        )
