"""replay_node: a recording as camera, joint-state, executed-action and instruction topics.

ros2 launch specprune_ros replay.launch.py recording:=/path/to/bag loop:=true
"""

from launch.actions import DeclareLaunchArgument
from launch.substitutions import LaunchConfiguration
from launch_ros.actions import Node
from launch_ros.parameter_descriptions import ParameterValue

from launch import LaunchDescription

# name: (default, meaning, type of the parameter; None for what is no parameter)
ARGUMENTS = {
    'recording': (None, 'rosbag2 folder or file, .npz observation, or video', str),
    'rate': ('1.0', 'speed, 1 is as recorded', float),
    'loop': ('false', 'start again at the end', bool),
    'transport': ('raw', 'raw or compressed image topics', str),
    'instruction': ('', "the task instead of the recording's", str),
    'instruction_topic': ('vla_node/instruction', 'where the instruction goes', str),
    'use_sim_time': ('false', 'take time from /clock', bool),
    'namespace': ('', 'namespace of the node', None),
    'log_level': ('info', 'debug, info, warn or error', None),
}


def generate_launch_description() -> LaunchDescription:
    arguments = [
        DeclareLaunchArgument(name, default_value=default, description=text)
        for name, (default, text, _) in ARGUMENTS.items()
    ]
    parameters = {
        name: ParameterValue(LaunchConfiguration(name), value_type=kind)
        for name, (_, _, kind) in ARGUMENTS.items()
        if kind is not None
    }
    node = Node(
        package='specprune_ros',
        executable='replay_node',
        name='replay_node',
        namespace=LaunchConfiguration('namespace'),
        parameters=[parameters],
        ros_arguments=['--log-level', LaunchConfiguration('log_level')],
        output='screen',
    )
    return LaunchDescription([*arguments, node])
