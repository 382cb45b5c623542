"""Fixtures shared by all tests."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from specprune_ros.config_files import from_mapping
from specprune_ros.policy import Policy
from specprune_ros.types import ExecutedAction, Observation

pytest_plugins = ['journal']
DATA = Path(__file__).parent / 'data'
GOLDEN = Path(os.environ.get('SPECPRUNE_GOLDEN', DATA / 'golden'))
ACTION_NAMES = ('x', 'y', 'z', 'roll', 'pitch', 'yaw', 'gripper')

# Two threads that wait for each other at every operator stall on a busy machine of two cores.
torch.set_num_threads(1)


def golden(name: str) -> dict[str, np.ndarray]:
    """The arrays of one reference file; skips the test where the file is absent."""
    path = GOLDEN / name
    if not path.exists():
        pytest.skip(f'reference vectors {path} are not there')
    with np.load(path) as file:
        return dict(file)


def make_policy(**parameters: object) -> Policy:
    """A tiny policy; names use __ for the dot, e.g. pruning__alpha=0.6."""
    values = {name.replace('__', '.'): value for name, value in parameters.items()}
    return Policy.load(from_mapping({'robot.camera_names': ('wrist', 'side'), **values}))


def make_observation(step: int = 0, cameras=('wrist', 'side'), **changes) -> Observation:
    """A deterministic scene in which a square moves with `step`."""
    images = {}
    for index, name in enumerate(cameras):
        image = np.random.default_rng(index).integers(0, 255, (224, 224, 3), np.uint8)
        at = 14 * (2 + step % 10)
        image[at : at + 28, 56:84] = (250, 10, 10)
        images[name] = image
    values = {
        'images': images,
        'proprio': None,
        'instruction': 'pick up the soup',
        'stamp_ns': step * 50_000_000,
        **changes,
    }
    return Observation(**values)


def make_action(*values: float, **changes) -> ExecutedAction:
    """An executed end-effector action; missing elements are 0."""
    data = np.zeros(len(ACTION_NAMES))
    data[: len(values)] = values
    fields = {'stamp_ns': 0, 'names': ACTION_NAMES, 'units': ('1',) * 7, 'data': data, **changes}
    return ExecutedAction(**fields)
