"""A recorded bag through the launch file, as launch_testing runs it.

Skipped, with the reason in pytest's summary, where launch_testing is missing (the PyPI wheels lack
it). With a sourced ROS:  launch_test test/test_launch_bag.py
"""

import sys
import unittest
from pathlib import Path

import pytest

pytest.importorskip('launch_testing', reason='launch_testing is missing: this needs an apt ROS')
pytest.importorskip('launch_ros', reason='launch_ros is missing: this needs an apt ROS')
pytest.importorskip('specprune_ros.msg', reason='messages are not built: run scripts/setup.sh')

import launch_testing
import rclpy
from launch.actions import IncludeLaunchDescription
from launch.launch_description_sources import PythonLaunchDescriptionSource
from launch_testing.actions import ReadyToTest
from launch_testing.asserts import assertExitCodes

from launch import LaunchDescription

TEST = Path(__file__).resolve().parent
sys.path.insert(0, str(TEST))  # launch_test does not

from ros_world import World, check_replay  # noqa: E402

from specprune_ros.ros.process import shut_down_rclpy  # noqa: E402

NAMESPACE = 'bagged'
CHUNKS = 8
WAIT_S = 90.0


@pytest.mark.launch_test
@pytest.mark.slow
@pytest.mark.ros
@pytest.mark.timeout(180)
def generate_test_description():
    """vla_node, lifecycle and all, beside a replay of the bag."""
    source = PythonLaunchDescriptionSource(str(TEST.parent / 'launch' / 'vla.launch.py'))
    bag = str(TEST / 'data' / 'pick_place')
    arguments = {'recording': bag, 'namespace': NAMESPACE}
    launched = IncludeLaunchDescription(source, launch_arguments=arguments.items())
    return LaunchDescription([launched, ReadyToTest()])


class TestWhileItRuns(unittest.TestCase):
    """What a robot would see."""

    @classmethod
    def setUpClass(cls):
        rclpy.init()
        cls.world = World(namespace=NAMESPACE)
        cls.world.streams.clear()  # the bag speaks

    @classmethod
    def tearDownClass(cls):
        cls.world.destroy_node()
        shut_down_rclpy()

    def test_the_node_activates_itself(self):
        self.world.lifecycle.wait(WAIT_S)
        active = self.world.run(WAIT_S, lambda: self.world.lifecycle.state() == 'active')
        assert active

    def test_the_bag_gives_pruned_chunks(self):
        came = self.world.run(WAIT_S, lambda: len(self.world.reports) >= CHUNKS)
        assert came, f'{len(self.world.reports)} reports, faults {self.world.messages}'
        check_replay(self.world)


@launch_testing.post_shutdown_test()
class TestAfterwards(unittest.TestCase):
    """What is left when launch has stopped all."""

    def test_every_process_ended_well(self, proc_info):
        assertExitCodes(proc_info)

    def test_nothing_raised(self, proc_output):
        text = ''.join(line.text.decode(errors='replace') for line in proc_output)
        assert 'Traceback' not in text
