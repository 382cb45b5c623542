"""A trained network as a checkpoint folder in OpenVLA-OFT's layout, with its model card.

Source: openvla-oft 213c5ff, openvla_utils.py, which reads such folders.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from specprune_ros.config import PruneConfig
from specprune_ros.config_files import write_parameter_file
from specprune_ros.models.openvla_folder import MEANS, OVERRIDES, STDS
from specprune_ros.models.openvla_oft import Bounds
from specprune_ros.shipped import PARAMS
from specprune_ros.sim.state import ACTION_NAMES, STEP_NS
from specprune_ros.train.config import PATCH, NetworkConfig
from specprune_ros.train.data import TrainingSet
from specprune_ros.train.gate import Gate
from specprune_ros.train.network import llama_sizes
from specprune_ros.train.trainer import Trainer
from specprune_ros.train.vocabulary import FILE as TOKENIZER

DATASET = 'specprune_sim'  # key of the statistics
PAPER_PATCHES = 256  # per camera, for which the K of PruneConfig are counted


def export(trainer: Trainer, folder: Path, gate: Gate | None = None) -> Path:
    """Write the averaged weights; auxiliary heads stay behind.

    Args:
        trainer: what to write.
        folder: made if it is not there.
        gate: a measurement for the model card; None measures now.

    Returns:
        the folder.

    Raises:
        MissingDependencyError: safetensors is not installed.
    """
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    network, data = trainer.averaged[0], trainer.data
    for stale in folder.glob('*_checkpoint.pt'):  # two steps in one folder are refused
        stale.unlink()
    parts = ('vision_backbone', 'projector', 'language_model')
    weights = {
        f'{name}.{key}': tensor.cpu().contiguous()
        for name in parts
        for key, tensor in getattr(network, name).state_dict().items()
    }
    save_file(weights, folder / 'model.safetensors')
    (folder / 'model.safetensors').chmod(0o644)  # its writer leaves it to its owner alone
    head = {f'module.model.{k}': v.cpu() for k, v in network.action_head.state_dict().items()}
    proprio = {f'module.{k}': v.cpu() for k, v in network.proprio_projector.state_dict().items()}
    torch.save(head, folder / f'action_head--{trainer.step}_checkpoint.pt')
    torch.save(proprio, folder / f'proprio_projector--{trainer.step}_checkpoint.pt')
    shutil.copy(trainer.folder / TOKENIZER, folder)
    sizes = trainer.config.network
    _write_json(folder / 'config.json', config_json(sizes))
    _write_json(folder / 'dataset_statistics.json', {DATASET: statistics_json(data)})
    _write_json(folder / 'preprocessor_config.json', preprocessor_json(sizes.image_size))
    write_parameter_file(folder / PARAMS, {'/**': parameters(trainer)})
    card = model_card(trainer, trainer.gate() if gate is None else gate, _bytes(weights))
    (folder / 'README.md').write_text(card)
    return folder


def config_json(sizes: NetworkConfig) -> dict:
    """config.json with the towers' sizes where the published ones are implied."""
    text = {name: value for name, value in llama_sizes(sizes).items() if value is not None}
    return {
        'model_type': 'openvla',
        'architectures': ['OpenVLAForActionPrediction'],
        'arch_specifier': 'no-align+fused-gelu-mlp',
        'vision_backbone_id': 'dinosiglip-vit-so-224px',
        'use_fused_vision_backbone': True,
        'image_resize_strategy': 'resize-naive',
        'image_sizes': [sizes.image_size] * 2,
        'llm_max_length': text['max_position_embeddings'],
        'n_action_bins': 256,
        'pad_to_multiple_of': 64,
        'torch_dtype': 'float32',
        'text_config': {'model_type': 'llama', **text},
        OVERRIDES: [
            {'embed_dim': width, 'depth': depth, 'num_heads': sizes.tower_heads}
            for width, depth in (
                (sizes.dino_width, sizes.dino_depth),
                (sizes.siglip_width, sizes.siglip_depth),
            )
        ],
    }


def statistics_json(data: TrainingSet) -> dict:
    """One dataset's entry of dataset_statistics.json, as far as normalisation needs it."""
    return {
        'action': {**_quantiles(data.action_bounds), 'mask': data.action_bounds.mask.tolist()},
        'proprio': _quantiles(data.proprio_bounds),
        'num_transitions': len(data.demos) + len(data.layouts),
        'num_trajectories': data.episodes,
    }


def _quantiles(bounds: Bounds) -> dict:
    return {'q01': np.asarray(bounds.low).tolist(), 'q99': np.asarray(bounds.high).tolist()}


def preprocessor_json(size: int) -> dict:
    """What published folders tell of the images."""
    return {
        'image_resize_strategy': 'resize-naive',
        'input_sizes': [[3, size, size]] * 2,
        'means': [list(mean) for mean in MEANS],
        'stds': [list(std) for std in STDS],
        'use_fused_vision_backbone': True,
    }


def parameters(trainer: Trainer) -> dict:
    """What runs the folder, as a parameter file has it; only `model.checkpoint` is missing."""
    data = trainer.config.data
    robot = {
        'camera_names': list(trainer.data.cameras),
        'camera_rotations': [0],
        'camera_transports': ['raw'],
        'joint_names': list(data.proprio),
        'normalization': 'bounds_q99',
        'action_names': list(ACTION_NAMES),
        'action_units': ['1'],
        'action_space': 'eef_delta_pose',
        'action_min': [-1.0],
        'action_max': [1.0],
        'gripper': 'close_positive',
        'horizon': data.horizon,
        'step_dt_s': STEP_NS / 1e9,
        'frame_id': 'panda_link0',
    }
    model = {
        'name': 'openvla_oft',
        'unnorm_key': DATASET,
        'center_crop': False,
        'dtype': 'float32',
    }
    pruning = budgets((trainer.config.network.image_size // PATCH) ** 2)
    return {'robot': robot, 'model': model, 'pruning': pruning}


def budgets(patches: int) -> dict[str, int]:
    """The paper's K, which are counts of 256 patches, as the same share of `patches`."""
    paper = dataclasses.asdict(PruneConfig())
    counts = {name: value for name, value in paper.items() if name.startswith('k_')}
    return {name: max(round(k * patches / PAPER_PATCHES), 1) for name, k in counts.items()}


def model_card(trainer: Trainer, gate: Gate, size: int) -> str:
    """README.md: what it is, from what and how it was made, and what is known of it."""
    config, data = trainer.config, trainer.data
    count = sum(p.numel() for p in trainer.averaged[0].parameters())
    sentences = '\n'.join(f'- {text}' for text in data.instructions)
    done = f'{trainer.step} of {config.fit.steps} steps'
    verdict = 'holds' if gate.passed() else 'DOES NOT HOLD: no figure about pruning counts'
    return CARD.format(
        count=count / 1e6,
        megabytes=size / 1e6,
        cameras=', '.join(data.cameras),
        patches=(config.network.image_size // PATCH) ** 2,
        layers=config.network.layers,
        width=config.network.width,
        horizon=config.data.horizon,
        sentences=sentences,
        episodes=data.episodes,
        frames=len(data.demos),
        scenes=len(data.layouts),
        done=done,
        hours=trainer.seconds / 3600,
        threads=config.fit.threads,
        device=trainer.device,
        seed=config.fit.seed,
        withheld=config.data.withheld,
        precision=config.fit.precision,
        optimizer=config.fit.optimizer,
        dropout=config.fit.token_dropout,
        spared=config.fit.token_spared,
        batch=config.fit.layout_images * config.fit.layout_instructions + config.fit.demo_frames,
        held_out=min(config.fit.gate_scenes, len(data.gate)),
        nearest=gate.nearest,
        error=gate.error_mm,
        heading=gate.heading_deg,
        verdict=verdict,
    )


CARD = """# A small VLA for LIBERO's scenes, trained with `specprune train`

The architecture of OpenVLA-OFT with {count:.2f} M parameters ({megabytes:.1f} MB): two vision
towers, a bidirectional Llama of {layers} layers, width {width}, and an L1 head for chunks of
{horizon} actions.
Cameras: {cameras}, {patches} patches each. For simulation and tests; never for a real arm.

It knows these instructions, and nothing else:

{sentences}

| | |
|---|---|
| data | {episodes} episodes of a scripted expert ({frames} frames), {scenes} still scenes |
| made with | `specprune collect`, training split; layouts are drawn anew for every episode |
| withheld from it | {withheld} |
| training | {done}, batch {batch}, seed {seed}, {hours:.1f} h on {device}, {threads} thread(s) |
| arithmetic | {precision}, {optimizer} |
| tokens missing in training | up to {dropout:.0%} of the patches, another share in every step |
| of them, go last | patches that show the named object, with a chance of {spared:.0%} |
| held-out scenes | {held_out}: told the right object in {nearest:.0%}, off by {error:.0f} mm |
| heading | off by {heading:.0f} degrees (median) |
| gate (98 %, 10 mm) | {verdict} |
| licence | as the package: no weights, images or meshes of others are in it |
| what it saw | LIBERO's scenes (MIT, CC BY 4.0), in them NVIDIA's HOPE scans (CC BY-NC-SA 4.0) |

Success in closed loop is not in this card; `specprune eval FOLDER` measures it. `params.yaml`
holds all that a launch needs but the folder's own path (`model.checkpoint`).
"""


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + '\n')


def _bytes(weights: dict[str, Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in weights.values())
