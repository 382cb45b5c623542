"""Arguments that several commands share."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from specprune_ros.config import PolicyConfig, RobotConfig
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


def check_output(option: str, path: Path) -> None:
    """See that a file can be written before the work whose result it is to hold.

    Its folder is made; a file that was not there is not there afterwards.

    Raises:
        ConfigError: it cannot be.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        is_new = not path.exists()
        path.open('a').close()
        if is_new:
            path.unlink()
    except OSError as error:
        raise ConfigError(f'--{option}', str(path), f'cannot be written: {error}') from error


def refuse_given(arguments: argparse.Namespace, why: str, defaults: dict[str, object]) -> None:
    """Refuse options that would say nothing.

    Args:
        why: e.g. 'does not go with --verify'.
        defaults: name of an argument -> its value when it was not given.

    Raises:
        ConfigError: one of them was given.
    """
    for name, default in defaults.items():
        if (value := getattr(arguments, name)) != default:
            raise ConfigError(f'--{name.replace("_", "-")}', value, why)


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


def recording_from(arguments: argparse.Namespace, robot: RobotConfig | None = None) -> Recording:
    """The recording that the arguments name; `robot` says which topic is which camera.

    Raises:
        ConfigError: --camera does not fit its kind.
        RecordingError: it cannot be read.
    """
    from specprune_ros.recordings import BagRecording, VideoRecording, open_recording

    topics = dict(text.split('=', 1) for text in arguments.camera if '=' in text)
    names = [text for text in arguments.camera if '=' not in text]
    recording = open_recording(
        arguments.recording,
        cameras=topics,
        camera=names[0] if names else 'side',
        instruction=arguments.instruction,
        robot=robot,
    )
    if isinstance(recording, BagRecording) and names:
        raise ConfigError('--camera', names[0], 'must be NAME=TOPIC for a bag')
    if isinstance(recording, VideoRecording) and len(arguments.camera) > len(names[:1]):
        raise ConfigError('--camera', arguments.camera, 'must be one NAME for a video')
    if not isinstance(recording, (BagRecording, VideoRecording)) and arguments.camera:
        raise ConfigError('--camera', arguments.camera, 'says nothing for an .npz')
    return recording
