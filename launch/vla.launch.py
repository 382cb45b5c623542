"""vla_node, its parameters from one file per axis, and optionally a replay.

ros2 launch specprune_ros vla.launch.py recording:=/path/to/bag
ros2 launch specprune_ros vla.launch.py robot:=libero_franka checkpoint:=/path/to/folder
"""

import os

from ament_index_python.packages import get_package_share_directory
from launch.actions import (
    DeclareLaunchArgument,
    EmitEvent,
    IncludeLaunchDescription,
    OpaqueFunction,
    RegisterEventHandler,
    SetEnvironmentVariable,
)
from launch.event_handlers import OnProcessStart
from launch.events import matches_action
from launch.launch_description_sources import PythonLaunchDescriptionSource
from launch.substitutions import LaunchConfiguration
from launch_ros.actions import LifecycleNode
from launch_ros.event_handlers import OnStateTransition
from launch_ros.events.lifecycle import ChangeState
from launch_ros.parameter_descriptions import ParameterValue
from lifecycle_msgs.msg import Transition

from launch import LaunchContext, LaunchDescription
from specprune_ros.config_files import load_config

SHARE = get_package_share_directory('specprune_ros')
ARGUMENTS = {
    'robot': (
        '',
        'a file of config/robots, or a path; empty: libero_franka for a checkpoint, '
        'libero_franka_3cam for the stand-in',
    ),
    'model': ('', 'a file of config/models, or a path; empty: tiny, openvla_oft for a checkpoint'),
    'checkpoint': ('', "folder of the model's weights; empty: the model file's"),
    'unnorm_key': ('', "dataset in the checkpoint's statistics; empty: the model file's"),
    'pruning': ('specprune', 'a file of config/pruning, or a path'),
    'params_file': ('', 'a parameter file that outranks the robot, model and pruning files'),
    'cameras': ('', "camera names, e.g. 'wrist,side'; empty: the robot file's"),
    'transport': ('', "raw or compressed, for all cameras; empty: the robot file's"),
    'namespace': ('', 'namespace of all nodes'),
    'use_sim_time': ('false', 'take time from /clock'),
    'log_level': ('info', 'debug, info, warn or error'),
    'autostart': ('true', 'configure and activate at once'),
    'dry_run': ('', 'true or false: mark chunks as not to be executed; empty: as the files say'),
    'recording': ('', 'replay this recording as well'),
    'rate': ('1.0', 'speed of the replay'),
    'loop': ('true', 'replay again and again'),
}


def config_file(axis: str, name: str) -> str:
    """Path of a shipped parameter file, or the given path."""
    shipped = os.path.join(SHARE, 'config', axis, f'{name}.yaml')
    return shipped if os.path.isfile(shipped) else os.path.abspath(name)


def parameter_files(value: dict[str, str]) -> list[str]:
    """Parameter files, later ones first in rank."""
    stand_in = not value['checkpoint']
    model = value['model'] or ('tiny' if stand_in else 'openvla_oft')
    robot = value['robot'] or ('libero_franka_3cam' if stand_in else 'libero_franka')
    files = [
        config_file('robots', robot),
        config_file('models', model),
        config_file('pruning', value['pruning']),
        os.path.join(SHARE, 'config', 'node.yaml'),
    ]
    return [*files, value['params_file']] if value['params_file'] else files


def parameter_overrides(value: dict[str, str]) -> dict[str, object]:
    """Parameters that arguments set, flat names -> values."""
    overrides: dict[str, object] = {}
    if value['checkpoint']:
        # Relative to where launch was started, wherever the node runs.
        folder = os.path.expanduser(value['checkpoint'])
        overrides['model.checkpoint'] = os.path.abspath(folder)
    if value['unnorm_key']:
        overrides['model.unnorm_key'] = value['unnorm_key']
    if value['dry_run']:
        overrides['runtime.dry_run'] = value['dry_run'].lower() != 'false'
    if value['cameras']:
        overrides['robot.camera_names'] = [name.strip() for name in value['cameras'].split(',')]
    if value['transport']:
        overrides['robot.camera_transports'] = [value['transport']]
    return overrides


def autostart_events(node: LifecycleNode) -> list:
    """Configure when the process is up, activate when it is configured; Humble can do this too."""

    def change(transition: int) -> EmitEvent:
        matcher = matches_action(node)
        return EmitEvent(
            event=ChangeState(lifecycle_node_matcher=matcher, transition_id=transition)
        )

    configure = change(Transition.TRANSITION_CONFIGURE)
    activate = change(Transition.TRANSITION_ACTIVATE)
    return [
        RegisterEventHandler(OnProcessStart(target_action=node, on_start=[configure])),
        RegisterEventHandler(
            OnStateTransition(
                target_lifecycle_node=node,
                start_state='configuring',
                goal_state='inactive',
                entities=[activate],
            )
        ),
    ]


def setup(context: LaunchContext) -> list:
    """Actions that need the arguments' values."""
    value = {name: LaunchConfiguration(name).perform(context) for name in ARGUMENTS}
    files, overrides = parameter_files(value), parameter_overrides(value)
    texts = {name: text for name, text in overrides.items() if isinstance(text, str)}
    # Else launch reads a text as YAML, in which a folder `/a #1` is `/a`.
    texts = {name: ParameterValue(text, value_type=str) for name, text in texts.items()}
    node = LifecycleNode(
        package='specprune_ros',
        executable='vla_node',
        name='vla_node',
        namespace=value['namespace'],
        parameters=[
            *files,
            {**overrides, **texts},
            {'use_sim_time': value['use_sim_time'].lower() == 'true'},
        ],
        ros_arguments=['--log-level', value['log_level']],
        output='screen',
    )
    # The handlers come first: the process may be up before the next action is visited.
    actions = [*(autostart_events(node) if value['autostart'].lower() == 'true' else []), node]
    if value['recording']:
        replay = os.path.join(SHARE, 'launch', 'replay.launch.py')
        names = ('recording', 'rate', 'loop', 'namespace', 'use_sim_time', 'log_level')
        arguments = {name: value[name] for name in names}
        arguments['transport'] = load_config(files, overrides).robot.camera_transports[0]
        actions.append(
            IncludeLaunchDescription(
                PythonLaunchDescriptionSource(replay), launch_arguments=arguments.items()
            )
        )
    return actions


def generate_launch_description() -> LaunchDescription:
    arguments = [
        DeclareLaunchArgument(name, default_value=default, description=text)
        for name, (default, text) in ARGUMENTS.items()
    ]
    # An image does not fit Fast DDS's default shared-memory segment.
    profile = os.environ.get(
        'FASTDDS_DEFAULT_PROFILES_FILE', os.path.join(SHARE, 'config', 'fastdds.xml')
    )
    environment = [SetEnvironmentVariable('FASTDDS_DEFAULT_PROFILES_FILE', profile)]
    if os.environ.get('ROS_DISTRO') in ('humble', 'jazzy'):
        environment.append(SetEnvironmentVariable('FASTRTPS_DEFAULT_PROFILES_FILE', profile))
    return LaunchDescription([*arguments, *environment, OpaqueFunction(function=setup)])
