"""The launch files, each as a process of its own, with what they start.

Skipped, with the reason in pytest's summary, where launch_ros is missing (the PyPI wheels lack
it); test_node_processes.py then makes the check of the replay over plain processes.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

pytest.importorskip('launch_ros', reason='launch_ros is missing: this needs an apt ROS')
pytest.importorskip('specprune_ros.msg', reason='messages are not built: run scripts/setup.sh')

from ros_world import FAST_NODE, NodeProcess, World, check_replay, ros_domain

from specprune_ros.config_files import load_config
from specprune_ros.msg import StreamerStatus
from specprune_ros.recordings.topics import recorded_topics
from specprune_ros.ros import qos

pytestmark = [pytest.mark.ros, pytest.mark.timeout(180)]

ROOT = Path(__file__).resolve().parent.parent
NAMESPACE = 'launched'
RUN = """
import sys
from launch import LaunchService
from launch.actions import IncludeLaunchDescription
from launch.launch_description_sources import PythonLaunchDescriptionSource
source = PythonLaunchDescriptionSource(sys.argv[1])
arguments = [argument.split(':=', 1) for argument in sys.argv[2:]]
service = LaunchService()
service.include_launch_description(IncludeLaunchDescription(source, launch_arguments=arguments))
sys.exit(service.run())
"""


class Launched:
    """A running launch file; everything that it started is gone when the block ends."""

    def __init__(self, name: str, **arguments: object):
        words = [f'{key}:={value}' for key, value in arguments.items()]
        self._log = tempfile.TemporaryFile(mode='w+')  # noqa: SIM115 - lives as long as the process
        self.process = subprocess.Popen(
            [sys.executable, '-c', RUN, str(ROOT / 'launch' / f'{name}.launch.py'), *words],
            stdout=self._log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def __enter__(self):
        return self

    def __exit__(self, *exc: object) -> None:
        for pid in (*self.pids().values(), self.process.pid):
            try:
                os.killpg(pid, signal.SIGKILL) if pid == self.process.pid else os.kill(pid, 9)
            except ProcessLookupError:
                continue
        self.process.wait()
        self._log.close()

    def output(self) -> str:
        """What launch and its processes printed so far."""
        return os.pread(self._log.fileno(), 1 << 20, 0).decode(errors='replace')

    def pids(self) -> dict[str, int]:
        """Executable -> process, the newest of that name."""
        found = re.findall(r'\[([\w]+)-\d+\]: process started with pid \[(\d+)\]', self.output())
        return {name: int(pid) for name, pid in found}

    def wait_for(self, holds: Callable[[], bool], seconds: float = 60.0) -> None:
        """Until something holds.

        Raises:
            AssertionError: it did not; tells what was printed.
        """
        end = time.monotonic() + seconds
        while not holds():
            assert time.monotonic() < end, self.output()
            time.sleep(0.1)

    def stop(self) -> int:
        """Ctrl-C; the exit status of the launch."""
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(30.0)


@pytest.fixture(autouse=True, scope='module')
def context():
    """One ROS domain for this file's tests and their processes."""
    with ros_domain(41):
        yield


@pytest.fixture
def world():
    node = World(namespace=NAMESPACE)
    node.streams.clear()
    node.streamer = []
    node.create_subscription(
        StreamerStatus, 'action_streamer/status', node.streamer.append, qos.LATCHED
    )
    yield node
    node.destroy_node()


# vla.launch.py -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_vla_with_a_replay_and_a_streamer_that_holds_still(world):
    arguments = {
        'recording': ROOT / 'test' / 'data' / 'pick_place',
        'namespace': NAMESPACE,
        'stream': 'twist',
    }
    with Launched('vla', **arguments) as launched:
        assert world.run(60.0, lambda: len(world.reports) >= 8), launched.output()
        check_replay(world)
        state = world.streamer[-1]
        assert (state.state, state.dry_run) == (StreamerStatus.STATE_DISABLED, True)
        assert state.commands == 0
        assert launched.stop() == 0, launched.output()
        assert 'process has died' not in launched.output()
        assert 'Traceback' not in launched.output()


@pytest.mark.slow
def test_names_can_be_those_of_the_robots_own_driver(world):
    rules = 'executed_action:=/arm/done eef_pose:=/arm/pose'
    with Launched('vla', namespace=NAMESPACE, stream='twist', remap=rules) as launched:
        counts = (world.count_publishers, '/arm/done'), (world.count_subscribers, '/arm/pose')
        found = world.run(60.0, lambda: all(count(name) for count, name in counts))
        assert found, launched.output()


@pytest.mark.slow
@pytest.mark.parametrize(
    ('arguments', 'model', 'robot'),
    [
        ({}, ('openvla_oft', 'shipped/libero_small'), ['wrist', 'side', 'overhead']),
        ({'robot': 'aloha'}, ('tiny', ''), ['cam_high', 'cam_left_wrist', 'cam_right_wrist']),
        (
            {'checkpoint': 'shipped/libero_small'},
            ('openvla_oft', 'shipped/libero_small'),
            ['wrist', 'side', 'overhead'],
        ),
    ],
)
def test_what_is_not_named_follows_from_what_is(world, arguments, model, robot):
    with Launched('vla', namespace=NAMESPACE, **arguments) as launched:
        world.target = 'vla_node'
        client = type(world.lifecycle)(world, world.target)
        client.wait(40.0)
        launched.wait_for(lambda: client.state() == 'active')
        named = [world.get_parameter_value(f'model.{name}') for name in ('name', 'checkpoint')]
        assert tuple(named) == model
        assert list(world.get_parameter_value('robot.camera_names')) == robot
        assert world.get_parameter_value('runtime.dry_run') is True
        assert launched.stop() == 0, launched.output()


def ros2(*words: str, seconds: float = 30.0) -> str:
    """What a `ros2` command prints; one that goes on is interrupted."""
    with subprocess.Popen(
        ['ros2', *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as command:
        try:
            return command.communicate(timeout=seconds)[0]
        except subprocess.TimeoutExpired:
            command.send_signal(signal.SIGINT)
            return command.communicate(timeout=10.0)[0]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which('ros2') is None, reason='no ros2 command: this needs an apt ROS')
def test_the_command_line(world):
    node = f'/{NAMESPACE}/vla_node'
    arguments = {'recording': ROOT / 'test' / 'data' / 'pick_place', 'namespace': NAMESPACE}
    at_once = ('--no-daemon', '--spin-time', '2')
    with Launched('vla', **arguments) as launched:
        assert world.run(60.0, lambda: len(world.reports) >= 2), launched.output()
        assert 'active [3]' in ros2('lifecycle', 'get', node, *at_once)
        told = ros2('param', 'set', node, 'pruning.alpha', '50.0', *at_once)
        assert 'failed' in told
        assert '50.0' in told
        told = ros2('param', 'set', node, 'pruning.alhpa', '0.5', *at_once)
        assert "did you mean 'pruning.alpha'" in told
        assert 'successful' in ros2('param', 'set', node, 'pruning.alpha', '0.7', *at_once)
        rates = re.findall(
            r'average rate: ([\d.]+)', ros2('topic', 'hz', f'{node}/action_chunk', seconds=8.0)
        )
        assert float(rates[-1]) > 1.0, rates  # a chunk of 8 steps of 50 ms: 2.5
        assert 'successful' in ros2('lifecycle', 'set', node, 'deactivate', *at_once)
        assert 'inactive [2]' in ros2('lifecycle', 'get', node, *at_once)
        assert launched.stop() == 0, launched.output()


@pytest.mark.slow
def test_what_died_comes_back_unconfigured_and_dry(world):
    """Even after dry_run:=false: the command line of a second life is not that of the first."""
    arguments = {
        'namespace': NAMESPACE,
        'robot': 'libero_franka_3cam',
        'model': 'tiny',
        'stream': 'twist',
        'respawn': 'true',
        'dry_run': 'false',
        'params_file': '',
    }
    dry_run = {'vla_node': 'runtime.dry_run', 'action_streamer': 'stream.dry_run'}
    with Launched('vla', **arguments) as launched:
        for world.target, parameter in dry_run.items():
            client = type(world.lifecycle)(world, world.target)
            client.wait(40.0)
            launched.wait_for(lambda client=client: client.state() == 'active')
            assert world.get_parameter_value(parameter) is False
        first = launched.pids()
        for node in dry_run:
            os.kill(first[node], signal.SIGKILL)
        launched.wait_for(lambda: launched.output().count('up and unconfigured') == 4)
        world.run(1.0)  # until the services of the dead are no longer taken for theirs
        for world.target, parameter in dry_run.items():
            client = type(world.lifecycle)(world, world.target)
            client.wait(40.0)
            assert world.get_parameter_value(parameter) is True
            world.run(3.0)  # in which a launch that drives transitions would
            assert client.state() == 'unconfigured'
            # By hand it is configured, and stays inactive: nothing is left that would activate it.
            assert client.change('configure'), launched.output()
            world.run(1.0)
            assert client.state() == 'inactive'
        assert launched.stop() == 0, launched.output()


def test_a_stream_that_there_is_not():
    with Launched('vla', stream='teleport') as launched:
        assert launched.process.wait(30.0) == 1
        assert 'teleport' in launched.output()


# inspect.launch.py -------------------------------------------------------------------------------


def fake_package(prefix: Path, name: str) -> None:
    """An installed package whose executable of the same name tells its arguments, and waits."""
    marker = prefix / 'share/ament_index/resource_index/packages' / name
    marker.parent.mkdir(parents=True, exist_ok=True)
    marker.touch()
    fake_program(prefix / 'lib' / name / name)


def fake_program(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text('#!/bin/sh\necho "ARGUMENTS $@"\nexec sleep 100\n')
    path.chmod(0o755)


@pytest.fixture
def prefix(tmp_path, monkeypatch) -> Path:
    """A prefix for fake packages, and a PATH of fake programs."""
    for name, folder in (('AMENT_PREFIX_PATH', 'prefix'), ('PATH', 'bin')):
        monkeypatch.setenv(name, f'{tmp_path / folder}{os.pathsep}{os.environ[name]}')
    (tmp_path / 'prefix').mkdir()
    return tmp_path / 'prefix'


def arguments_of(launched: Launched, program: str) -> str:
    """What a fake program was started with."""
    launched.wait_for(lambda: re.search(rf'\[{program}-\d+\] ARGUMENTS', launched.output()))
    return re.search(rf'\[{program}-\d+\] ARGUMENTS (.*)', launched.output())[1]


def test_inspect_names_what_is_missing():
    with Launched('inspect') as launched:
        assert launched.process.wait(30.0) == 0
        printed = launched.output()
    for package in ('rqt-gui', 'rviz2', 'foxglove-bridge'):
        assert re.search(rf'apt install .*ros-\S+-{package}', printed), printed


def test_inspect_opens_what_is_there(prefix):
    for package in ('rqt_gui', 'rviz2', 'foxglove_bridge'):
        fake_package(prefix, package)
    arguments = {'robot': 'libero_franka', 'namespace': NAMESPACE, 'port': 9001}
    with Launched('inspect', **arguments) as launched:
        for package, option in (('rqt_gui', '--perspective-file'), ('rviz2', '--display-config')):
            given = arguments_of(launched, package).split()
            assert given[0] == option
            layout = Path(given[1]).read_text()
            assert f'/{NAMESPACE}/vla_node/overlay/agentview' in layout
        arguments_of(launched, 'foxglove_bridge')
        told = re.search(r'ws://localhost:9001, then import (\S+\.json)', launched.output())
        assert f'/{NAMESPACE}/vla_node/overlay/agentview' in Path(told[1]).read_text()
        launched.stop()


# record.launch.py --------------------------------------------------------------------------------


def test_record_without_a_recorder_says_what_to_install():
    with Launched('record') as launched:
        assert launched.process.wait(30.0) == 1
        assert re.search(r'apt install ros-\S+-ros2bag', launched.output())


@pytest.mark.parametrize('taken', ['run', 'run.yaml', 'run.qos.yaml'])
def test_record_leaves_an_earlier_recording_alone(prefix, tmp_path, taken):
    fake_package(prefix, 'ros2bag')
    (tmp_path / taken).write_text('of before')
    with Launched('record', out=tmp_path / 'run') as launched:
        assert launched.process.wait(30.0) == 1
        assert f'{tmp_path / taken} exists' in launched.output()
    assert [path.name for path in tmp_path.glob('run*')] == [taken]
    assert (tmp_path / taken).read_text() == 'of before'


@pytest.mark.slow
@pytest.mark.parametrize('storage', ['mcap', 'sqlite3'])
def test_record_starts_the_recorder_and_keeps_the_parameters(prefix, tmp_path, storage):
    fake_package(prefix, 'ros2bag')
    fake_program(tmp_path / 'bin' / 'ros2')
    if storage == 'mcap':
        fake_package(prefix, 'rosbag2_storage_mcap')
    out, parameters = tmp_path / 'kept' / 'run', {**FAST_NODE, 'pruning.alpha': 0.7}
    with (
        NodeProcess('vla_node', parameters, '-r', f'__ns:=/{NAMESPACE}'),
        Launched('record', namespace=NAMESPACE, out=out) as launched,
    ):
        given = arguments_of(launched, 'ros2').split()
        launched.wait_for(lambda: 'parameters of' in launched.output())
        launched.stop()
    robot = load_config(['robots/libero_franka_3cam']).robot
    topics = recorded_topics(robot, NAMESPACE)
    wanted = f'bag record --storage {storage} --output {out} --qos-profile-overrides-path'
    assert ' '.join(given).startswith(wanted)
    assert given[-len(topics) :] == [*topics]
    assert yaml.safe_load(Path(f'{out}.qos.yaml').read_text()) == topics
    assert '&' not in Path(f'{out}.qos.yaml').read_text(), 'an anchor'
    config = load_config([f'{out}.yaml'])
    assert config.pruning.alpha == 0.7
    assert config.robot.camera_names == ('wrist', 'side')
