"""`vla.launch.py` with a replay of the recorded bag, under launch_testing.

Skipped, with the reason in pytest's summary, where launch_testing is missing (the PyPI wheels lack
it); test_node_processes.py then makes the same check over plain processes.
"""

import unittest
from pathlib import Path

import pytest

pytest.importorskip('launch_testing', reason='launch_testing is missing: this needs an apt ROS')
pytest.importorskip('launch_ros', reason='launch_ros is missing: this needs an apt ROS')
pytest.importorskip('specprune_ros.msg', reason='messages are not built: run scripts/setup.sh')

import launch_testing
import launch_testing.actions
import launch_testing.asserts
import rclpy
from launch.launch_description_sources import PythonLaunchDescriptionSource
from ros_world import World, check_replay

import launch

ROOT = Path(__file__).resolve().parent.parent
NAMESPACE = 'launched'
CHUNKS_S = 60.0


@pytest.mark.launch_test
def generate_test_description() -> launch.LaunchDescription:
    arguments = {
        'recording': str(ROOT / 'test' / 'data' / 'pick_place'),
        'namespace': NAMESPACE,
        'loop': 'true',
    }
    source = PythonLaunchDescriptionSource(str(ROOT / 'launch' / 'vla.launch.py'))
    return launch.LaunchDescription(
        [
            launch.actions.IncludeLaunchDescription(source, launch_arguments=arguments.items()),
            launch_testing.actions.ReadyToTest(),
        ]
    )


class TestReplay(unittest.TestCase):
    """While the launch runs."""

    @classmethod
    def setUpClass(cls):
        rclpy.init()
        cls.world = World(namespace=NAMESPACE)
        cls.world.streams.clear()

    @classmethod
    def tearDownClass(cls):
        cls.world.destroy_node()
        rclpy.shutdown()

    def test_reports_come_by_themselves(self):
        assert self.world.run(CHUNKS_S, lambda: len(self.world.reports) >= 8)
        check_replay(self.world)


@launch_testing.post_shutdown_test()
class TestShutdown(unittest.TestCase):
    """After it was stopped."""

    def test_exit_codes(self, proc_info):
        # A node that Ctrl-C reaches through launch may also end by the signal itself.
        launch_testing.asserts.assertExitCodes(proc_info, allowable_exit_codes=[0, -2])
