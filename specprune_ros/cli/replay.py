"""Play a recording as ROS topics: cameras, joint states, executed actions, instruction.

With --verify nothing is played and no ROS is needed: every decision that vla_node recorded is
computed again from the inputs that it read, and compared bit for bit.
"""

from __future__ import annotations

import argparse

from specprune_ros.cli.options import (
    add_config_arguments,
    add_recording_arguments,
    recording_from,
    refuse_given,
)
from specprune_ros.errors import MissingDependencyError
from specprune_ros.ros.arguments import ros_arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    add_recording_arguments(parser)
    parser.add_argument('--rate', type=float, default=1.0, help='speed, 1 is as recorded')
    parser.add_argument('--loop', action='store_true', help='start again at the end')
    parser.add_argument('--transport', choices=('raw', 'compressed'), default='raw')
    parser.add_argument(
        '--verify',
        action='store_true',
        help="compare with the recorded decisions; parameters: --params, else <recording>.yaml's",
    )
    add_config_arguments(parser)
    parser.add_argument('--ros-args', nargs=argparse.REMAINDER, default=[], help='passed to rclpy')


def run(arguments: argparse.Namespace) -> int:
    """Run the command."""
    if arguments.verify:
        played = {'rate': 1.0, 'loop': False, 'transport': 'raw', 'camera': [], 'instruction': ''}
        refuse_given(arguments, 'does not go with --verify', {**played, 'ros_args': []})
        from specprune_ros.cli import replay_verify  # needs OpenCV, which bench runs without

        return replay_verify.run(arguments)
    refuse_given(arguments, 'needs --verify', {'params': [], 'set': []})
    recording = recording_from(arguments)  # fails before any ROS starts
    try:
        from specprune_ros.ros import replay_node
    except ImportError as error:
        raise MissingDependencyError(
            error.name or 'rclpy',
            'replay',
            'source a ROS 2 workspace that holds specprune_ros, or `. scripts/env.sh`',
            error,
        ) from error
    values = {
        'recording': recording.path,
        'rate': arguments.rate,
        'loop': arguments.loop,
        'transport': arguments.transport,
        'instruction': arguments.instruction,
        'camera': recording.cameras[0],
        'cameras': [text for text in arguments.camera if '=' in text] or [''],
        'exit_at_end': True,
    }
    return replay_node.main([*ros_arguments(values), *arguments.ros_args])
