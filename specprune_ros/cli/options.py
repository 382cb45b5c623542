"""Arguments that several commands share."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

import yaml

from specprune_ros.config import PolicyConfig
from specprune_ros.config_files import load_config
from specprune_ros.errors import ConfigError

if TYPE_CHECKING:  # at run time this would bring OpenCV, which bench runs without
    from specprune_ros.recordings.base import Recording


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """`--params` and `--set`."""
    parser.add_argument(
        '--params',
        action='append',
        default=[],
        metavar='FILE',
        help='parameter file, or one that ships, e.g. pruning/specprune; may be repeated',
    )
    parser.add_argument(
        '--set',
        action='append',
        default=[],
        metavar='NAME=VALUE',
        help='one parameter, e.g. pruning.alpha=0.6; may be repeated',
    )


def config_from(arguments: argparse.Namespace) -> PolicyConfig:
    """The configuration that the arguments name.

    Raises:
        ConfigError: a file, name or value is bad.
    """
    default = getattr(arguments, 'params_default', ['models/tiny'])
    return load_config(arguments.params or default, overrides_from(arguments))


def overrides_from(arguments: argparse.Namespace) -> dict[str, object]:
    """Name -> value of every `--set`.

    Raises:
        ConfigError: one is not NAME=VALUE, or its value is not YAML.
    """
    overrides = {}
    for text in arguments.set:
        name, equals, value = text.partition('=')
        if not equals:
            raise ConfigError('--set', text, 'must look like pruning.alpha=0.6')
        try:
            overrides[name.strip()] = yaml.safe_load(value)
        except (ValueError, yaml.YAMLError) as error:
            reason = ' '.join(str(error).split())
            raise ConfigError('--set', text, f'the value is not YAML: {reason}') from error
    return overrides


def at_least(name: str, value: int, least: int) -> int:
    """The value.

    Raises:
        ConfigError: it is too small.
    """
    if value < least:
        raise ConfigError(f'--{name}', value, f'must be at least {least}')
    return value


def add_recording_arguments(parser: argparse.ArgumentParser) -> None:
    """The recording and how to read it."""
    parser.add_argument('recording', help='rosbag2 folder or file, .npz observation, or video')
    parser.add_argument(
        '--camera',
        action='append',
        default=[],
        metavar='NAME[=TOPIC]',
        help='camera of a bag by its topic, or the name for a video; may be repeated',
    )
    parser.add_argument('--instruction', default='', help="the task instead of the recording's")


def recording_from(arguments: argparse.Namespace) -> Recording:
    """The recording that the arguments name.

    Raises:
        RecordingError: it cannot be read.
    """
    from specprune_ros.recordings import open_recording

    topics = dict(text.split('=', 1) for text in arguments.camera if '=' in text)
    names = [text for text in arguments.camera if '=' not in text]
    return open_recording(
        arguments.recording,
        cameras=topics,
        camera=names[0] if names else 'side',
        instruction=arguments.instruction,
    )
