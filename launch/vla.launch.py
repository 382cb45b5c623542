"""vla_node, its parameters from one file per axis, and optionally action_streamer and a replay.

ros2 launch specprune_ros vla.launch.py recording:=/path/to/bag
ros2 launch specprune_ros vla.launch.py robot:=libero_franka checkpoint:=/path/to/folder
ros2 launch specprune_ros vla.launch.py robot:=aloha checkpoint:=/path stream:=joint_trajectory

Nothing moves on account of this file alone: chunks are marked, and commands held back, until
dry_run:=false; and the streamer sends nothing until its service ~/enable is called with true.

With respawn:=true a node that died, vla_node too, is started again after RESPAWN_DELAY_S as a node
that nobody vouches for: unconfigured and dry, whatever this launch was given. A person looks, and
then sets dry_run, configures and activates it.
"""

import os
from dataclasses import dataclass

from ament_index_python.packages import get_package_share_directory
from launch.actions import (
    DeclareLaunchArgument,
    EmitEvent,
    LogInfo,
    OpaqueFunction,
    RegisterEventHandler,
    SetEnvironmentVariable,
    TimerAction,
)
from launch.event_handlers import OnProcessExit, OnProcessStart
from launch.events import matches_action
from launch.substitutions import LaunchConfiguration
from launch_ros.actions import LifecycleNode, Node
from launch_ros.event_handlers import OnStateTransition
from launch_ros.events.lifecycle import ChangeState
from launch_ros.parameter_descriptions import ParameterValue
from lifecycle_msgs.msg import Transition

from launch import LaunchContext, LaunchDescription
from specprune_ros.config_files import load_config
from specprune_ros.shipped import EMBEDDED, PREFIX, own_params

SHARE = get_package_share_directory('specprune_ros')
RESPAWN_DELAY_S = 2.0
STREAMS = ('none', 'chunk', 'joint_trajectory', 'twist', 'pose')
ARGUMENTS = {
    'robot': (
        '',
        'a file of config/robots, or a path; empty: libero_franka for a checkpoint, unless its '
        'folder has a params.yaml; libero_franka_3cam for a recording, else libero_small',
    ),
    'model': (
        '',
        'a file of config/models, or a path; empty: openvla_oft for a checkpoint, the stand-in '
        'tiny for a recording or another robot, else libero_small, which is for simulation',
    ),
    'checkpoint': ('', "folder of the model's weights; empty: the model file's"),
    'unnorm_key': ('', "dataset in the checkpoint's statistics; empty: the model file's"),
    'pruning': ('specprune', 'a file of config/pruning, or a path'),
    'params_file': ('', 'a parameter file that outranks the robot, model and pruning files'),
    'cameras': ('', "camera names, e.g. 'wrist,side'; empty: the robot file's"),
    'transport': ('', "raw or compressed, for all cameras; empty: the robot file's"),
    'namespace': ('', 'namespace of all nodes'),
    'remap': (
        '',
        'other names for topics, services and actions of these nodes, with spaces between: '
        'joint_trajectory:=/arm_controller/joint_trajectory eef_pose:=/arm/pose',
    ),
    'use_sim_time': ('false', 'take time from /clock'),
    'log_level': ('info', 'debug, info, warn or error'),
    'stream': (
        'none',
        'start action_streamer, and what it sends; none: it is not started',
    ),
    'autostart': ('true', 'configure and activate at once; never enables motion'),
    'respawn': ('false', 'start a node that died again: unconfigured, and dry'),
    'dry_run': (
        '',
        'true or false: mark chunks as not to be executed, and hold commands back; empty: as the '
        'files say',
    ),
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
    robot, model = value['robot'], value['model']
    own = None
    if value['checkpoint']:
        model = model or 'openvla_oft'
        own = None if robot else own_params(value['checkpoint'])
        robot = robot or 'libero_franka'
    elif robot or model or value['recording']:
        robot, model = robot or 'libero_franka_3cam', model or 'tiny'
    else:
        robot = model = EMBEDDED
    files = [config_file('robots', robot), config_file('models', model)]
    files += [str(own)] if own else []
    files += [
        config_file('pruning', value['pruning']),
        os.path.join(SHARE, 'config', 'node.yaml'),
    ]
    return [*files, value['params_file']] if value['params_file'] else files


@dataclass(frozen=True)
class NodeSpec:
    """One of our lifecycle nodes.

    Attributes:
        executable: also its name.
        parameters: files and values, later ones first in rank.
        dry_run: the parameter that keeps it from moving anything.
    """

    executable: str
    parameters: list
    dry_run: str


def vla_overrides(value: dict[str, str]) -> dict[str, object]:
    """Parameters of vla_node that arguments set, flat names -> values."""
    overrides: dict[str, object] = {}
    if value['checkpoint']:
        overrides['model.checkpoint'] = value['checkpoint']
        if not value['checkpoint'].startswith(PREFIX):
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


def streamer_overrides(value: dict[str, str]) -> dict[str, object]:
    """Parameters of action_streamer that arguments set, flat names -> values."""
    overrides: dict[str, object] = {'stream.output': value['stream']}
    if value['dry_run']:
        overrides['stream.dry_run'] = value['dry_run'].lower() != 'false'
    return overrides


def node_specs(value: dict[str, str]) -> list[NodeSpec]:
    """The nodes to start; both read the same files."""
    given = {'vla_node': vla_overrides(value)}
    if value['stream'] != 'none':
        given['action_streamer'] = streamer_overrides(value)
    dry_run = {'vla_node': 'runtime.dry_run', 'action_streamer': 'stream.dry_run'}
    common = {'use_sim_time': value['use_sim_time'].lower() == 'true'}
    files = parameter_files(value)
    return [
        NodeSpec(name, [*files, {**as_given(overrides), **common}], dry_run[name])
        for name, overrides in given.items()
    ]


def as_given(overrides: dict[str, object]) -> dict[str, object]:
    """Else launch reads a text as YAML, in which a folder `/a #1` is `/a`."""
    texts = {name: text for name, text in overrides.items() if isinstance(text, str)}
    return {**overrides, **{k: ParameterValue(text, value_type=str) for k, text in texts.items()}}


def started(spec: NodeSpec, value: dict[str, str]) -> list:
    """Actions that run one node."""
    node = LifecycleNode(parameters=spec.parameters, **process(spec.executable, value))
    pending = ['configure', 'activate'] if value['autostart'].lower() == 'true' else []
    handlers = autostart_handlers(node, pending)
    if value['respawn'].lower() == 'true':
        handlers.append(respawn_handler(node, spec, value, pending))
    # The handlers come first: the process may be up before the next action is visited.
    return [*map(RegisterEventHandler, handlers), node]


def process(executable: str, value: dict[str, str]) -> dict[str, object]:
    """What a node's first process and the next ones share."""
    remapped = [word for rule in value['remap'].split() for word in ('-r', rule)]
    return {
        'package': 'specprune_ros',
        'executable': executable,
        'name': executable,
        'namespace': value['namespace'],
        'ros_arguments': ['--log-level', value['log_level'], *remapped],
        'output': 'screen',
    }


def autostart_handlers(node: LifecycleNode, pending: list[str]) -> list:
    """Configure when the process is up, activate when it is configured; Humble can do this too.

    Each happens once, and leaves `pending`: who cleans the node up and configures it by hand
    decides by hand whether it acts.
    """
    ids = {
        'configure': Transition.TRANSITION_CONFIGURE,
        'activate': Transition.TRANSITION_ACTIVATE,
    }

    def change(transition: str) -> OpaqueFunction:
        def emit(context: LaunchContext) -> list:
            if transition not in pending:
                return []
            pending.remove(transition)
            matcher = matches_action(node)
            event = ChangeState(lifecycle_node_matcher=matcher, transition_id=ids[transition])
            return [EmitEvent(event=event)]

        return OpaqueFunction(function=emit)

    return [
        OnProcessStart(target_action=node, on_start=[change('configure')]),
        OnStateTransition(
            target_lifecycle_node=node,
            start_state='configuring',
            goal_state='inactive',
            entities=[change('activate')],
        ),
    ]


def respawn_handler(
    node: LifecycleNode, spec: NodeSpec, value: dict[str, str], pending: list[str]
) -> OnProcessExit:
    """Not launch's own respawn at first: it repeats the command line, dry_run:=false and all."""

    def restart(context: LaunchContext) -> list:
        pending.clear()  # `node` still hears the transitions of its successor
        if context.is_shutdown:
            return []
        text = f'{spec.executable} died: it comes back unconfigured and dry'
        parameters = [*spec.parameters, {spec.dry_run: True}]
        again = {'respawn': True, 'respawn_delay': RESPAWN_DELAY_S}
        successor = Node(parameters=parameters, **process(spec.executable, value), **again)
        delayed = TimerAction(period=RESPAWN_DELAY_S, actions=[successor])
        return [LogInfo(msg=text), delayed]

    return OnProcessExit(target_action=node, on_exit=[OpaqueFunction(function=restart)])


def setup(context: LaunchContext) -> list:
    """Actions that need the arguments' values."""
    value = {name: LaunchConfiguration(name).perform(context) for name in ARGUMENTS}
    actions = [action for spec in node_specs(value) for action in started(spec, value)]
    if value['recording']:
        actions.append(replay(value))
    return actions


def replay(value: dict[str, str]) -> Node:
    """The replay, on the topics that vla_node reads."""
    robot = load_config(parameter_files(value), vla_overrides(value)).robot
    transport, *others = {*robot.camera_transports}
    if others:
        raise RuntimeError(
            'recording:= plays all cameras alike: give transport:=raw or compressed'
        )
    texts = {'recording': value['recording'], 'transport': transport}
    parameters = {
        **as_given(texts),
        'rate': float(value['rate']),
        'loop': value['loop'].lower() == 'true',
        'use_sim_time': value['use_sim_time'].lower() == 'true',
        'image_topics': [f'{name}={topic}' for name, topic in robot.image_topics().items()],
    }
    return Node(parameters=[parameters], **process('replay_node', value))


def generate_launch_description() -> LaunchDescription:
    arguments = [
        DeclareLaunchArgument(
            name,
            default_value=default,
            description=text,
            choices=STREAMS if name == 'stream' else None,
        )
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
