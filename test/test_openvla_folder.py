"""Checkpoint folders as users have them: loading, `specprune info`, `specprune verify`, faults."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from conftest import GOLDEN
from openvla_world import (
    FOLDER,
    HEAD,
    MODEL,
    PROPRIO,
    assemble,
    configuration,
    inputs,
    load_golden,
)
from safetensors.torch import load_file, save_file

from specprune_ros.cli import main
from specprune_ros.errors import CheckpointError, ConfigError
from specprune_ros.models import load_model
from specprune_ros.models.openvla_checkpoint import load
from specprune_ros.policy import Policy
from specprune_ros.pruning import METHODS
from specprune_ros.types import ExecutedAction, Observation
from specprune_ros.verify import StoredPrompt

pytestmark = pytest.mark.golden
NOISY = 'diffusion/noisy_action_projector--150000_checkpoint.pt'


@pytest.fixture
def folder(tmp_path):
    return assemble(tmp_path / 'libero', HEAD, PROPRIO)


def spoil_json(path, **changes) -> None:
    content = json.loads(path.read_text())
    for key, value in changes.items():
        content[key] = value
    path.write_text(json.dumps(content))


def own_weights(folder) -> dict[str, torch.Tensor]:
    """The model's weights, in memory; the linked file makes way for a new one."""
    weights = load_file(folder / MODEL)
    (folder / MODEL).unlink()
    return weights


# What users do -----------------------------------------------------------------------------


def test_without_a_tokenizer_the_message_says_which_file_is_missing(folder):
    with pytest.raises(CheckpointError, match=r'tokenizer\.json'):
        load_model(folder, cameras=['agentview', 'wrist'], device='cpu')


@pytest.mark.parametrize('name', METHODS)
def test_every_method_runs_on_the_same_checkpoint(folder, name):
    config = configuration(folder)
    model = load(config, torch.device('cpu'), StoredPrompt(inputs()['input_ids']))
    policy = Policy(model, config)
    policy.set_pruning(type(config.pruning)(method=name))
    for step in range(3):
        pictures = [np.roll(picture, 20 * step, axis=1) for picture in inputs()['images_uint8']]
        images = dict(zip('ab', pictures, strict=True))
        result = policy.infer(
            Observation(
                images=images,
                proprio=inputs()['proprio_raw'],
                instruction='pick up the bowl',
                stamp_ns=step * 400_000_000,
            )
        )
        chunk, report = result.chunk, result.report
        assert report.fallback_reason == ''
        assert chunk.data.shape == (8, 7)
        assert set(np.unique(chunk.data[:, 6])) <= {-1.0, 0.0, 1.0}, 'the gripper is binary'
        for row in chunk.data:
            policy.observe_executed(
                ExecutedAction(stamp_ns=0, names=chunk.names, units=chunk.units, data=row), images
            )
    kept = report.tokens_kept.sum() / report.tokens_total.sum()
    assert kept == 1 if name == 'none' else kept < 0.7
    assert report.crop_side == pytest.approx(0.9**0.5)


def test_diffusion_is_pruned_once_and_keeps_the_same_tokens_at_every_step(tmp_path):
    folder = assemble(tmp_path / 'diffusion', f'diffusion/{HEAD}', NOISY, PROPRIO)
    config = configuration(folder, diffusion_steps=4)
    policy = Policy(load(config, torch.device('cpu'), StoredPrompt(inputs()['input_ids'])), config)
    rows: list[int] = []
    policy.model.decoder.norm.register_forward_hook(lambda m, i, out: rows.append(len(out)))
    for step in range(2):
        rows.clear()
        report = policy.infer(
            Observation(
                images=dict(zip('ab', inputs()['images_uint8'], strict=True)),
                proprio=inputs()['proprio_raw'],
                instruction='go',
                stamp_ns=step * 400_000_000,
            )
        ).report
    assert len(rows) == 4
    pruned = int(report.tokens_total.sum()) - int(report.tokens_kept.sum())
    assert pruned > 0
    assert set(rows) == {report.sequence_tokens - pruned}


def test_head_discrete_can_be_asked_for_beside_an_action_head(folder):
    model = load_golden(folder, inputs()['input_ids'], head='discrete')
    assert 'discrete' in model.info.name


def test_plain_openvla_decodes_token_by_token(tmp_path):
    """Greedy decoding with a KV cache gives what decoding anew from the start gives."""
    folder = assemble(tmp_path / 'openvla')
    config = configuration(folder, cameras=1, name='openvla')
    config = type(config)(
        robot=type(config.robot)(**{**vars(config.robot), 'horizon': 1}), model=config.model
    )
    model = load(config, torch.device('cpu'), StoredPrompt(inputs()['input_ids']))
    policy = Policy(model, config)
    observation = Observation(
        images={'a': inputs()['images_uint8'][0]}, proprio=None, instruction='go', stamp_ns=0
    )
    chunk = policy.infer(observation).chunk
    assert chunk.normalized.shape == (1, 7)
    assert (chunk.normalized[0] == from_scratch(model, observation.images['a'])).all()


def from_scratch(model, image) -> np.ndarray:
    """Seven tokens by seven full passes of transformers' own causal forward."""
    head = model.parts.action_head
    with torch.inference_mode():
        embeds = model.embed(model.preprocess([image]), None, '').embeds
        ids = []
        for _ in range(7):
            hidden = model.parts.language_model(inputs_embeds=embeds[None]).last_hidden_state
            ids.append(head.lm_head(hidden[0, -1:]).argmax(-1))
            embeds = torch.cat((embeds, head.embed_tokens(ids[-1])))
        return head.tokens(torch.cat(ids)).numpy().astype(np.float32)


def test_lora_adapter_over_a_base_model(tmp_path):
    """An adapter of zeros changes nothing; one with values changes what it names."""
    base = assemble(tmp_path / 'base', HEAD, PROPRIO)
    key = 'language_model.model.layers.0.mlp.down_proj'
    weight = load_file(base / MODEL)[f'{key}.weight']
    for value in (0.0, 0.1):
        folder = assemble(tmp_path / f'adapter{value}', HEAD, PROPRIO)
        (folder / MODEL).unlink()
        (folder / 'lora_adapter').mkdir()
        rank = 32
        save_file(
            {
                f'base_model.model.{key}.lora_A.weight': torch.full(
                    (rank, weight.shape[1]), value
                ),
                f'base_model.model.{key}.lora_B.weight': torch.full(
                    (weight.shape[0], rank), value
                ),
            },
            folder / 'lora_adapter' / 'adapter_model.safetensors',
        )
        text = json.dumps({'r': rank, 'lora_alpha': 16, 'base_model_name_or_path': 'openvla-7b'})
        (folder / 'lora_adapter' / 'adapter_config.json').write_text(text)
        model = load_golden(folder, inputs()['input_ids'], base_checkpoint=str(base))
        merged = model.decoder.layers[0].mlp.down_proj.weight
        expected = weight.float() + 0.5 * value * value * rank
        torch.testing.assert_close(merged.data, expected)
        with pytest.raises(ConfigError, match=r'model\.base_checkpoint'):
            load_golden(folder, inputs()['input_ids'])


def test_info(folder, capsys):
    assert main(['info', str(folder)]) == 1, 'the tokenizer is missing'
    out = capsys.readouterr().out
    for told in ('L1', '7 action elements', '8 elements', 'libero_spatial_no_noops',
                 'tokenizer.json', f'checkpoint:={folder}', 'robot:=libero_franka'):  # fmt: skip
        assert told in out
    (folder / 'tokenizer.json').touch()
    assert main(['info', str(folder)]) == 0
    assert 'nothing' in capsys.readouterr().out


def test_info_of_a_broken_folder_goes_on(tmp_path, capsys):
    folder = assemble(tmp_path / 'broken', f'diffusion/{HEAD}', PROPRIO)
    (folder / 'dataset_statistics.json').write_text('{')
    assert main(['info', str(folder)]) == 1
    out = capsys.readouterr().out
    assert 'dataset_statistics.json' in out
    assert 'noisy_action_projector' in out
    assert 'diffusion' in out


def test_verify(folder, capsys):
    assert main(['verify', str(folder), '--golden', str(FOLDER)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum('hidden_after_layer' in line for line in lines) == 6
    assert 'all within tolerance' in lines[-1]
    weights = own_weights(folder)
    weights['projector.fc1.weight'][0] += 1
    save_file(weights, folder / MODEL)
    assert main(['verify', str(folder), '--golden', str(FOLDER)]) == 1
    out = capsys.readouterr().out
    assert 'OFF' in next(line for line in out.splitlines() if 'projected_patches' in line)
    assert 'OFF' not in next(line for line in out.splitlines() if 'vit_dino_view0' in line)


def test_verify_without_vectors(folder, tmp_path, capsys):
    assert main(['verify', str(folder), '--golden', str(tmp_path)]) == 2
    assert 'inputs.npz' in capsys.readouterr().err


# What can be wrong with a folder: each is found at configure time, and named --------------------


def fault_missing_shard(folder):
    names = {key: 'model-00002-of-00002.safetensors' for key in load_file(folder / MODEL)}
    text = json.dumps({'weight_map': names})
    (folder / 'model.safetensors.index.json').write_text(text)
    return 'model-00002-of-00002.safetensors', {}


def fault_truncated_shard(folder):
    (folder / MODEL).unlink()
    data = (FOLDER / MODEL).read_bytes()
    (folder / MODEL).write_bytes(data[: len(data) // 2])
    return MODEL, {}


def fault_wrong_shape(folder):
    weights = own_weights(folder)
    weights['projector.fc2.weight'] = weights['projector.fc2.weight'][:5].clone()
    save_file(weights, folder / MODEL)
    return r'projector\.fc2\.weight.*\(5, ', {}


def fault_nan_weights(folder):
    weights = own_weights(folder)
    weights['language_model.model.norm.weight'][0] = float('nan')
    save_file(weights, folder / MODEL)
    return r'language_model\.model\.norm\.weight holds NaN', {}


def fault_no_statistics(folder):
    (folder / 'dataset_statistics.json').unlink()
    spoil_json(folder / 'config.json', norm_stats={})
    return 'dataset_statistics.json', {}


def fault_statistics_of_another_robot(folder):
    path = folder / 'dataset_statistics.json'
    statistics = json.loads(path.read_text())
    statistics['libero_spatial_no_noops']['action']['q99'] = [1.0] * 14
    path.write_text(json.dumps(statistics))
    return 'libero_spatial_no_noops.*action', {}


def fault_unknown_statistics_key(folder):
    return r'model\.unnorm_key.*libero_spatial_no_noops', {'unnorm_key': 'bridge_orig'}


def fault_two_action_heads(folder):
    shutil.copy(FOLDER / HEAD, folder / 'action_head--5000_checkpoint.pt')
    return 'action_head--5000_checkpoint.pt', {}


class Payload:
    """Runs code when it is unpickled."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return (open, (str(self.target), 'w'))


def fault_pickle_with_code(folder):
    (folder / HEAD).unlink()
    torch.save({'module.model.fc1.weight': Payload(folder / 'owned')}, folder / HEAD)
    return HEAD, {}


def fault_too_many_images(folder):
    return r'robot\.camera_names', {'cameras': 5}


def fault_image_count_that_leaves_the_sequence(folder):
    spoil_json(
        folder / 'config.json',
        text_config={**json.loads((folder / 'config.json').read_text())['text_config'],
                     'max_position_embeddings': 600},
    )  # fmt: skip
    return r'robot\.horizon.*2 cameras', {}


def fault_other_architecture(folder):
    spoil_json(folder / 'config.json', vision_backbone_id='clip-vit-l')
    return 'clip-vit-l', {}


def fault_wrong_head(folder):
    return r'model\.head.*l1', {'head': 'diffusion'}


def fault_unknown_dtype(folder):
    return r'model\.dtype', {'dtype': 'float64'}


FAULTS = [value for name, value in list(globals().items()) if name.startswith('fault_')]


@pytest.mark.parametrize('fault', FAULTS, ids=lambda fault: fault.__name__.removeprefix('fault_'))
def test_faults_are_named_when_the_model_is_loaded(folder, fault):
    told, options = fault(folder)
    with pytest.raises((CheckpointError, ConfigError), match=f'(?s){told}'):
        load_golden(folder, inputs()['input_ids'], **options)
    assert not (folder / 'owned').exists(), 'code from the folder was run'


def test_a_robot_of_another_width_is_refused(folder):
    for change, told in (
        ({'action_names': ('x', 'y')}, r'robot\.action_names.*7'),
        ({'joint_names': ('x',)}, r'robot\.joint_names.*8'),
    ):
        config = configuration(folder)
        robot = type(config.robot)(**{**vars(config.robot), **change})
        config = type(config)(robot=robot, model=config.model)
        with pytest.raises(ConfigError, match=told):
            load(config, torch.device('cpu'), StoredPrompt(inputs()['input_ids']))


def test_code_in_the_folder_is_ignored(folder):
    for name in ('modeling_prismatic.py', 'configuration_prismatic.py'):
        (folder / name).write_text(f'open({str(folder / "owned")!r}, "w")\n')
    spoil_json(folder / 'config.json', auto_map={'AutoConfig': 'configuration_prismatic.Config'})
    load_golden(folder, inputs()['input_ids'])
    assert not (folder / 'owned').exists()


def test_loaded_in_float16_and_bfloat16(folder):
    for dtype in ('float16', 'bfloat16'):
        model = load_golden(folder, inputs()['input_ids'], dtype=dtype)
        weights = [*model.parts.projector.parameters(), *model.parts.language_model.parameters()]
        assert {weight.dtype for weight in weights} == {getattr(torch, dtype)}
        assert not any(weight.requires_grad for weight in weights)


def test_golden_folder_itself_loads():
    """As it lies there, with files of other forms beside the published ones."""
    if not (GOLDEN / 'openvla_oft' / MODEL).exists():
        pytest.skip('reference vectors are not there')
    assert load_golden(FOLDER, inputs()['input_ids']).info.proprio_dim == 8
