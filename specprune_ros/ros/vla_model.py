"""`~/model_info`: which model `vla_node` runs, as a message."""

from __future__ import annotations

import hashlib
from pathlib import Path

from specprune_ros.config import PolicyConfig
from specprune_ros.msg import ModelInfo
from specprune_ros.ros.conversions import to_duration, to_time
from specprune_ros.shipped import find_checkpoint
from specprune_ros.types import ActionSpace

# Class of an action head -> what model.head calls it. By name: torch is not imported here.
HEADS = {
    'L1RegressionHead': 'l1',
    'DiffusionHead': 'diffusion',
    'ParallelTokensHead': 'discrete',
    'GreedyTokensHead': 'discrete',
    'LatentActionHead': 'latent',
}
WEIGHTS = ('.safetensors', '.pt', '.bin')
HEADER_BYTES = 1 << 16  # of a weight file that says nothing of its header's length
MAX_HEADER_BYTES = 1 << 26  # more is no safetensors header


def model_info(policy, config: PolicyConfig, now_ns: int) -> ModelInfo:
    """What runs: the configuration, and what the loaded model says of itself."""
    info, robot = policy.model.info, config.robot
    device, dtype = _placed(policy.model)
    folder = config.model.checkpoint
    from_files = bool(folder) and not info.stand_in
    msg = ModelInfo(
        name=config.model.name,
        checkpoint=folder,
        fingerprint=fingerprint(find_checkpoint(folder)) if folder else '',
        unnorm_key=dataset(config) if from_files else config.model.unnorm_key,
        head=head(policy.model) or config.model.head,
        method=config.pruning.method,
        device=device or config.model.device,
        dtype=dtype or config.model.dtype,
        parameters=info.parameters,
        cameras=list(info.cameras),
        proprio=list(robot.joint_names),
        horizon=info.horizon,
        step_dt=to_duration(robot.step_dt_s),
        space=ActionSpace[robot.action_space.upper()],
        names=list(robot.action_names),
        units=list(robot.per_action('action_units')),
        stand_in=info.stand_in,
    )
    msg.header.stamp, msg.header.frame_id = to_time(now_ns), robot.frame_id
    return msg


def head(model) -> str:
    """The action head that a loaded model has; empty where it does not show it."""
    module = getattr(getattr(model, 'parts', None), 'action_head', None)
    return HEADS.get(type(module).__name__, '')


def dataset(config: PolicyConfig) -> str:
    """The dataset whose statistics un-normalise, by the name it has in the checkpoint's folder.

    Raises:
        ConfigError, CheckpointError: as when the model is loaded.
    """
    from specprune_ros.models.openvla_folder import Folder

    return Folder.open(config.model.checkpoint).statistics(config.model.unnorm_key)[0]


def fingerprint(folder: Path) -> str:
    """SHA-256 over names, sizes and headers of a folder's weight files; empty without any.

    Tells checkpoints apart within milliseconds. It is no proof against someone who changes
    weights on purpose: they are not read.
    """
    digest = hashlib.sha256()
    files = sorted(folder.iterdir()) if folder.is_dir() else []
    weights = [path for path in files if path.suffix in WEIGHTS and path.is_file()]
    for path in weights:
        digest.update(f'{path.name}\0{path.stat().st_size}\0'.encode())
        digest.update(_header(path))
    return digest.hexdigest() if weights else ''


def _header(path: Path) -> bytes:
    """A safetensors file's header, which has every tensor's name, type and shape; else a start."""
    with path.open('rb') as file:
        start = file.read(8)
        length = int.from_bytes(start, 'little') if path.suffix == '.safetensors' else HEADER_BYTES
        return start + file.read(min(length, MAX_HEADER_BYTES))


def _placed(model) -> tuple[str, str]:
    """Device and number format of the model's weights; empty where it does not show them."""
    layers = getattr(getattr(model, 'decoder', None), 'layers', ())
    weight = next((each for layer in layers for each in layer.parameters()), None)
    if weight is None:
        return '', ''
    return str(weight.device), str(weight.dtype).removeprefix('torch.')
