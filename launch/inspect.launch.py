"""Open what is installed of rqt, RViz and foxglove_bridge, with our layouts.

ros2 launch specprune_ros inspect.launch.py robot:=libero_franka namespace:=arm

What is missing is named in the log with the package that brings it, and is no failure.
"""

import os
import tempfile

from ament_index_python.packages import (
    PackageNotFoundError,
    get_package_prefix,
    get_package_share_directory,
)
from launch.actions import DeclareLaunchArgument, LogInfo, OpaqueFunction
from launch.substitutions import LaunchConfiguration
from launch_ros.actions import Node

from launch import LaunchContext, LaunchDescription
from specprune_ros.config_files import load_config
from specprune_ros.inspection import LAYOUTS, adapted

SHARE = get_package_share_directory('specprune_ros')
APT = {
    'rqt_gui': ('rqt-gui', 'rqt-common-plugins', 'rqt-robot-monitor'),
    'rviz2': ('rviz2',),
    'foxglove_bridge': ('foxglove-bridge',),
}
ARGUMENTS = {
    'robot': ('libero_franka_3cam', 'a file of config/robots, or a path: names the cameras'),
    'params_file': ('', 'a parameter file that outranks the robot file'),
    'namespace': ('', 'namespace of the nodes'),
    'tools': ('rqt_gui,rviz2,foxglove_bridge', 'which of these to open'),
    'port': ('8765', 'where foxglove_bridge listens'),
}


def tool(package: str, layout: str, port: str) -> list:
    """Actions that open one tool, or say what would bring it."""
    try:
        get_package_prefix(package)
    except PackageNotFoundError:
        distro = os.environ.get('ROS_DISTRO', '<distro>')
        names = ' '.join(f'ros-{distro}-{name}' for name in APT[package])
        return [LogInfo(msg=f'{package} is not installed: sudo apt install {names}')]
    if package == 'foxglove_bridge':
        text = f'Foxglove: open a connection to ws://localhost:{port}, then import {layout}'
        bridge = Node(
            package=package,
            executable=package,
            name=package,
            parameters=[{'port': int(port)}],
            output='screen',
        )
        return [LogInfo(msg=text), bridge]
    option = {'rqt_gui': '--perspective-file', 'rviz2': '--display-config'}[package]
    return [Node(package=package, executable=package, arguments=[option, layout], output='screen')]


def setup(context: LaunchContext) -> list:
    """Actions that need the arguments' values."""
    value = {name: LaunchConfiguration(name).perform(context) for name in ARGUMENTS}
    shipped = f'robots/{value["robot"]}'
    robot_file = value['robot'] if os.path.isfile(value['robot']) else shipped
    robot = load_config([robot_file, *filter(None, [value['params_file']])]).robot
    folder = tempfile.mkdtemp(prefix='specprune_inspect_')
    actions = []
    for package in filter(None, map(str.strip, value['tools'].split(','))):
        if package not in LAYOUTS:
            raise ValueError(f'tools = {package!r}: must be of {", ".join(LAYOUTS)}')
        layout = os.path.join(folder, LAYOUTS[package])
        with open(os.path.join(SHARE, 'config', 'inspect', LAYOUTS[package])) as file:
            text = adapted(file.read(), robot, value['namespace'])
        with open(layout, 'w') as file:
            file.write(text)
        actions += tool(package, layout, value['port'])
    return actions


def generate_launch_description() -> LaunchDescription:
    arguments = [
        DeclareLaunchArgument(name, default_value=default, description=text)
        for name, (default, text) in ARGUMENTS.items()
    ]
    return LaunchDescription([*arguments, OpaqueFunction(function=setup)])
