"""Models, by name; each is imported only when asked for."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path

import torch

from specprune_ros.config import PolicyConfig
from specprune_ros.config_files import load_config
from specprune_ros.errors import ConfigError
from specprune_ros.models.base import VLAModel

# name -> module with load(config, device) -> VLAModel
MODELS = {
    'tiny': 'specprune_ros.models.tiny',
    'shrunk_7b': 'specprune_ros.models.tiny',
    'random_7b': 'specprune_ros.models.tiny',
    'openvla_oft': 'specprune_ros.models.openvla_checkpoint',
    'openvla': 'specprune_ros.models.openvla_checkpoint',
    'univla': 'specprune_ros.models.openvla_checkpoint',
}


# The reference's names for its sets of constants -> file of config/robots
PLATFORMS = {'libero': 'libero_franka', 'aloha': 'aloha', 'bridge': 'bridge_widowx'}


def load(config: PolicyConfig) -> VLAModel:
    """Load the configured model onto its device.

    Raises:
        ConfigError: no such model or device.
        MissingDependencyError: a package is missing; the message has the command.
        CheckpointError: the model's files are missing or broken.
    """
    name = config.model.name
    if name not in MODELS:
        raise ConfigError('model.name', name, f'must be one of {", ".join(MODELS)}')
    if config.model.threads:
        torch.set_num_threads(config.model.threads)
    return importlib.import_module(MODELS[name]).load(config, pick_device(config.model.device))


def load_model(
    folder: str | Path,
    *,
    cameras: Sequence[str],
    platform: str | Path = 'libero_franka',
    device: str | torch.device = 'auto',
    dtype: str | torch.dtype = 'auto',
    **model: object,
) -> VLAModel:
    """Load a published checkpoint folder, without configuration files.

    Args:
        folder: of an OpenVLA-OFT checkpoint (`name='openvla'` for a plain OpenVLA one,
            `name='univla'` for UniVLA).
        cameras: names, in the order in which the model was trained.
        platform: robot whose constants the checkpoint was trained with (chunk length, action and
            proprioception elements, normalisation, gripper): a key of PLATFORMS, a file of
            config/robots, or a path.
        device, dtype, **model: fields of ModelConfig, or torch's own objects.

    Raises:
        ConfigError, MissingDependencyError, CheckpointError: as `load`.
    """
    if isinstance(cameras, str):
        raise ConfigError('cameras', cameras, 'must be a list of names')
    robot = platform
    if not Path(platform).is_file():
        robot = f'robots/{PLATFORMS.get(str(platform), platform)}'
    dtype = str(dtype).removeprefix('torch.')
    values = {'name': 'openvla_oft', 'device': str(device), 'dtype': dtype, **model}
    settings = {f'model.{name}': value for name, value in values.items()}
    settings['model.checkpoint'] = str(folder)
    settings |= {
        'robot.camera_names': tuple(cameras),
        'robot.camera_topics': (),
        'robot.camera_transports': ('raw',),
        'robot.camera_rotations': (0,),
    }
    return load(load_config([robot], settings))


def pick_device(name: str) -> torch.device:
    """The torch device of a name; 'auto' is cuda where there is one, else cpu.

    Raises:
        ConfigError: unknown or absent device.
    """
    if name == 'auto':
        name = 'cuda' if torch.cuda.is_available() else 'cpu'
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError('model.device', name, f'cannot be used: {reason}') from error
    return device
