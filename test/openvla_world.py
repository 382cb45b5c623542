"""Checkpoint folders in the published layout, put together from the reference vectors."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import GOLDEN, golden
from safetensors.torch import load_file

from specprune_ros.config import PolicyConfig
from specprune_ros.config_files import load_config
from specprune_ros.models.openvla_checkpoint import load
from specprune_ros.models.openvla_oft import OpenVLAOFT
from specprune_ros.verify import StoredPrompt

FOLDER = GOLDEN / 'openvla_oft'
CPU = torch.device('cpu')
SMALL_FILES = ('config.json', 'dataset_statistics.json', 'preprocessor_config.json')
MODEL = 'model.safetensors'


def component(name: str, part: str = '') -> str:
    """A component's path in the golden folder, whatever training step its name tells."""
    files = sorted((FOLDER / part).glob(f'{name}--*_checkpoint.pt'))
    file = files[0].name if files else f'{name}--absent_checkpoint.pt'
    return f'{part}/{file}' if part else file


HEAD, PROPRIO = component('action_head'), component('proprio_projector')
FILM = component('vision_backbone', 'film')
DIFFUSION_HEAD = component('action_head', 'diffusion')
NOISY = component('noisy_action_projector', 'diffusion')
LIBERO, ALOHA = 'libero', 'aloha'


def assemble(target: Path, *files: str) -> Path:
    """A checkpoint folder: the base model's files, and others by their path in the golden folder.

    Small files are copied so that a test may spoil them, the weights are linked. Skips the test
    where one of them is absent.
    """
    for name in (MODEL, *SMALL_FILES, *files):
        if not (FOLDER / name).exists():
            pytest.skip(f'reference vectors {FOLDER / name} are not there')
    target.mkdir(exist_ok=True)
    for name in SMALL_FILES:
        shutil.copy(FOLDER / name, target)
    (target / MODEL).symlink_to((FOLDER / MODEL).resolve())
    for name in files:
        source = FOLDER / name
        if source.suffix == '.safetensors':  # a component without its published form
            weights = {f'module.{key}': value for key, value in load_file(source).items()}
            torch.save(weights, target / f'{source.stem}--150000_checkpoint.pt')
        elif source.suffix == '.json':
            shutil.copy(source, target)
        else:
            (target / source.name).symlink_to(source.resolve())
    return target


def configuration(folder: Path, *, cameras: int = 2, robot: str = LIBERO, **model) -> PolicyConfig:
    """A configuration with as many cameras, and joints only where the folder takes some."""
    values = {
        'robot.camera_names': tuple('abcde'[:cameras]),
        'robot.camera_rotations': (0,),
        'robot.source_size': 0,
        'model.name': 'openvla_oft',
        'model.checkpoint': str(folder),
        **{f'model.{name}': value for name, value in model.items()},
    }
    if not any('proprio' in path.name for path in folder.glob('*checkpoint*')):
        values['robot.joint_names'] = ()
    name = {LIBERO: 'libero_franka', ALOHA: 'aloha'}[robot]
    return load_config([f'robots/{name}'], values)


def load_golden(folder: Path, input_ids: np.ndarray, **options) -> OpenVLAOFT:
    """The folder's model, float32 on the CPU, with the stored prompt."""
    return load(configuration(folder, **options), CPU, StoredPrompt(input_ids))


def inputs() -> dict[str, np.ndarray]:
    """The reference's inputs."""
    return golden('openvla_oft/inputs.npz')


def outputs(part: str = '') -> dict[str, np.ndarray]:
    """The reference's outputs, of the base model or of a part such as 'film'."""
    return golden(f'openvla_oft/{part}/outputs.npz' if part else 'openvla_oft/outputs.npz')
