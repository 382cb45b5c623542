"""A simulated arm that does what it is told: sim_node, vla_node, action_streamer, and a driver.

ros2 launch specprune_ros demo.launch.py task:=object_shuffled/3 episodes:=3
ros2 launch specprune_ros demo.launch.py sim_python:=/path/to/.venv-sim/bin/python

sim_node needs LIBERO in its Python: the extra `sim`, or scripts/setup_sim.sh and sim_python. The
driver begins the episodes, enables the streamer, and ends the launch with a table.
"""

import os

from ament_index_python.packages import get_package_share_directory
from launch.actions import (
    DeclareLaunchArgument,
    IncludeLaunchDescription,
    OpaqueFunction,
    Shutdown,
)
from launch.launch_description_sources import PythonLaunchDescriptionSource
from launch.substitutions import LaunchConfiguration
from launch_ros.actions import Node

from launch import LaunchContext, LaunchDescription
from specprune_ros.shipped import EMBEDDED

SHARE = get_package_share_directory('specprune_ros')
ARGUMENTS = {
    'task': ('object_shuffled/1', 'what to do, <suite>/<index>'),
    'seed': ('1', 'of the first episode'),
    'episodes': ('1', 'how many; the launch ends after them'),
    'rate': ('1.0', 'simulated seconds per second, at most'),
    'pruning': ('specprune', 'a file of config/pruning, or a path'),
    'out': ('out', 'folder for overlays, plots and the table'),
    'sim_python': ('', 'the Python that has LIBERO; empty: the one of ROS'),
}


def setup(context: LaunchContext) -> list:
    """Actions that need the arguments' values."""
    value = {name: LaunchConfiguration(name).perform(context) for name in ARGUMENTS}
    common = {
        'robot': EMBEDDED,
        'model': EMBEDDED,
        'pruning': value['pruning'],
        'stream': 'twist',
        'dry_run': 'false',
        'use_sim_time': 'true',
    }
    nodes = IncludeLaunchDescription(
        PythonLaunchDescriptionSource(os.path.join(SHARE, 'launch', 'vla.launch.py')),
        launch_arguments=common.items(),
    )
    simulator = Node(
        package='specprune_ros',
        executable='sim_node',
        name='sim_node',
        prefix=value['sim_python'],
        parameters=[{'task': value['task'], 'size': 112, 'rate': float(value['rate'])}],
        output='screen',
    )
    options = ('task', 'seed', 'episodes', 'rate', 'out')
    driver = Node(
        package='specprune_ros',
        executable='demo_loop',
        arguments=['--attach', *[word for name in options for word in (f'--{name}', value[name])]],
        output='screen',
        on_exit=Shutdown(reason='the demo is over'),
    )
    return [nodes, simulator, driver]


def generate_launch_description() -> LaunchDescription:
    arguments = [
        DeclareLaunchArgument(name, default_value=default, description=text)
        for name, (default, text) in ARGUMENTS.items()
    ]
    return LaunchDescription([*arguments, OpaqueFunction(function=setup)])
