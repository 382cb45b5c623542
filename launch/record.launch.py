"""Record what a replay, a calibration, a check or a bug report needs, and nothing more.

ros2 launch specprune_ros record.launch.py robot:=libero_franka namespace:=arm

Writes <out> (a rosbag2, mcap where its plugin is installed), <out>.yaml (the nodes' parameters)
and <out>.qos.yaml. Then, without ROS:  specprune replay <out> --verify
"""

import os
import time

import yaml
from ament_index_python.packages import PackageNotFoundError, get_package_prefix
from launch.actions import DeclareLaunchArgument, ExecuteProcess, LogInfo, OpaqueFunction
from launch.substitutions import LaunchConfiguration
from launch_ros.actions import Node

from launch import LaunchContext, LaunchDescription
from specprune_ros.config_files import load_config
from specprune_ros.recordings.topics import NODES, full_name, recorded_topics

ARGUMENTS = {
    'robot': ('libero_franka_3cam', 'a file of config/robots, or a path: names the cameras'),
    'params_file': ('', 'a parameter file that outranks the robot file'),
    'namespace': ('', 'namespace of the nodes'),
    'out': ('', 'the folder to make; empty: recording_<date>_<time> here'),
}


def installed(package: str) -> bool:
    """Whether a ROS package is there."""
    try:
        get_package_prefix(package)
    except PackageNotFoundError:
        return False
    return True


def command(out: str, topics: list[str]) -> list[str]:
    """`ros2 bag record` for these topics."""
    storage = 'mcap' if installed('rosbag2_storage_mcap') else 'sqlite3'
    record = ['ros2', 'bag', 'record', '--storage', storage, '--output', out]
    record += ['--qos-profile-overrides-path', f'{out}.qos.yaml']
    # Humble knows topics by position only, which is deprecated later.
    return [*record, *([] if os.environ.get('ROS_DISTRO') == 'humble' else ['--topics']), *topics]


def setup(context: LaunchContext) -> list:
    """Actions that need the arguments' values."""
    if not installed('ros2bag'):
        distro = os.environ.get('ROS_DISTRO', '<distro>')
        raise RuntimeError(f'ros2bag is not installed: apt install ros-{distro}-ros2bag')
    value = {name: LaunchConfiguration(name).perform(context) for name in ARGUMENTS}
    shipped = f'robots/{value["robot"]}'
    robot = value['robot'] if os.path.isfile(value['robot']) else shipped
    config = load_config([robot, *filter(None, [value['params_file']])])
    topics = recorded_topics(config.robot, value['namespace'])
    out = value['out'] or time.strftime('recording_%Y%m%d_%H%M%S')
    out = os.path.abspath(os.path.expanduser(out))
    for path in (out, f'{out}.yaml', f'{out}.qos.yaml'):
        if os.path.exists(path):  # rosbag2 would refuse its folder, too late for the other two
            raise RuntimeError(f'{path} exists: name another with out:=')
    os.makedirs(os.path.dirname(out), exist_ok=True)
    with open(f'{out}.qos.yaml', 'w') as file:
        # safe_dump would write equal profiles as anchors, which rosbag2's reader need not know.
        yaml.dump({topic: dict(profile) for topic, profile in topics.items()}, file)
    nodes = [full_name(name, value['namespace']) for name in NODES]
    return [
        LogInfo(msg=f'recording to {out}: {", ".join(topics)}'),
        ExecuteProcess(cmd=command(out, list(topics)), output='screen'),
        Node(
            package='specprune_ros',
            executable='parameter_snapshot',
            arguments=['--out', f'{out}.yaml', *nodes],
            output='screen',
        ),
    ]


def generate_launch_description() -> LaunchDescription:
    arguments = [
        DeclareLaunchArgument(name, default_value=default, description=text)
        for name, (default, text) in ARGUMENTS.items()
    ]
    return LaunchDescription([*arguments, OpaqueFunction(function=setup)])
