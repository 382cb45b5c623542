"""Models, by name; each is imported only when asked for."""

from __future__ import annotations

import importlib

import torch

from specprune_ros.config import PolicyConfig
from specprune_ros.errors import ConfigError
from specprune_ros.models.base import VLAModel

# name -> module with load(config, device) -> VLAModel
MODELS = {'tiny': 'specprune_ros.models.tiny'}


def load_model(config: PolicyConfig) -> VLAModel:
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
