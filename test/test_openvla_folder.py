"""Checkpoint folders as users have them: loading, faults."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil

import numpy as np
import pytest
import torch
from conftest import GOLDEN
from openvla_world import (
    DIFFUSION_HEAD,
    FILM,
    FOLDER,
    HEAD,
    MODEL,
    NOISY,
    PROPRIO,
    assemble,
    configuration,
    inputs,
    load_golden,
)
from safetensors.torch import load_file, save_file
from test_tokenizer import llama_json

from specprune_ros.config_files import load_config
from specprune_ros.errors import CheckpointError, ConfigError
from specprune_ros.models import load_model
from specprune_ros.models.decoder import QueryDecoder
from specprune_ros.models.openvla_checkpoint import load
from specprune_ros.policy import Policy
from specprune_ros.pruning import METHODS
from specprune_ros.pruning.base import PruneRun
from specprune_ros.types import ExecutedAction, Observation
from specprune_ros.verify import StoredPrompt

pytestmark = pytest.mark.golden


@pytest.fixture
def folder(tmp_path):
    return assemble(tmp_path / 'libero', HEAD, PROPRIO)


def spoil_json(path, **changes) -> None:
    content = json.loads(path.read_text())
    for key, value in changes.items():
        content[key] = value
    path.write_text(json.dumps(content))


def text_config() -> dict:
    """Sizes of the reference's language model."""
    return json.loads((FOLDER / 'config.json').read_text())['text_config']


def unnorm_key() -> str:
    """The dataset whose statistics the reference folder holds."""
    return str(inputs()['unnorm_key'])


def own_weights(folder) -> dict[str, torch.Tensor]:
    """The model's weights, in memory; the linked file makes way for a new one."""
    weights = load_file(folder / MODEL)
    (folder / MODEL).unlink()
    return weights


# What users do -----------------------------------------------------------------------------


ALOHA_FILES = (
    'aloha/action_head.safetensors',
    'aloha/proprio_projector.safetensors',
    'aloha/dataset_statistics.json',
    FILM,
)


@pytest.mark.parametrize(
    ('platform', 'files', 'cameras', 'chunk', 'proprio'),
    [
        ('libero_franka', (HEAD, PROPRIO), ['agentview', 'wrist'], (8, 7), 8),
        ('aloha', ALOHA_FILES, ['high', 'left', 'right'], (25, 14), 14),
    ],
)
def test_load_model(tmp_path, platform, files, cameras, chunk, proprio):
    """A folder, camera names and a platform give a model that acts on what it is told."""
    folder = assemble(tmp_path / 'folder', *files)
    (folder / 'tokenizer.json').write_text(json.dumps(llama_json()), encoding='utf-8')
    model = load_model(folder, cameras=cameras, platform=platform, device='cpu', dtype='float32')
    info = model.info
    assert (info.cameras, info.proprio_dim) == (tuple(cameras), proprio)
    assert (info.horizon, info.action_dim) == chunk
    assert not info.stand_in
    pictures = [inputs()['images_uint8'][0]] * len(cameras)

    def actions(instruction: str) -> np.ndarray:
        with torch.inference_mode():
            prompt = model.embed(model.preprocess(pictures), np.zeros(proprio), instruction)
            decode = QueryDecoder(model.decoder, prompt.layout, PruneRun(None))
            return model.unnormalize(model.act(prompt, decode).numpy())

    pick = actions('pick up the cup')
    assert pick.shape == chunk
    assert np.isfinite(pick).all()
    assert (pick == actions('pick up the cup')).all()
    assert (pick != actions('take the cup up to the robot')).any()


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
        assert chunk.data.shape == (model.info.horizon, model.info.action_dim)
        assert set(np.unique(chunk.data[:, 6])) <= {-1.0, 0.0, 1.0}, 'the gripper is binary'
        for row in chunk.data:
            policy.observe_executed(
                ExecutedAction(stamp_ns=0, names=chunk.names, units=chunk.units, data=row), images
            )
    kept = report.tokens_kept.sum() / report.tokens_total.sum()
    assert kept == 1 if name == 'none' else kept < 0.7
    assert report.crop_side == pytest.approx(0.9**0.5)


def test_diffusion_is_pruned_once_and_keeps_the_same_tokens_at_every_step(tmp_path):
    folder = assemble(tmp_path / 'diffusion', DIFFUSION_HEAD, NOISY, PROPRIO)
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


# What the configuration decides ----------------------------------------------------------------

SHIPPED = {
    # name: cameras, horizon, action elements, proprioception, normalization, gripper, rotations,
    #       source size
    'libero_franka': (2, 8, 7, 8, 'bounds_q99', 'close_positive', (180,), 0),
    'libero_franka_1cam': (1, 1, 7, 0, 'bounds_q99', 'close_positive', (180,), 0),
    'aloha': (3, 25, 14, 14, 'bounds', 'unchanged', (0,), 256),
    'bridge_widowx': (1, 5, 7, 7, 'bounds_q99', 'unchanged', (0,), 0),
    'flexiv_rizon4': (3, 25, 7, 8, 'bounds_q99', 'unchanged', (0,), 0),
}


@pytest.mark.parametrize('name', SHIPPED)
def test_shipped_robots_have_the_constants_of_their_training(name):
    robot = load_config([f'robots/{name}'], {}).robot
    got = (
        len(robot.camera_names), robot.horizon, len(robot.action_names), len(robot.joint_names),
        robot.normalization, robot.gripper, robot.camera_rotations, robot.source_size,
    )  # fmt: skip
    assert got == SHIPPED[name]


@pytest.fixture(scope='module')
def as_configured(tmp_path_factory):
    """(crop side, picture as the model sees it) of a configuration; loads the model."""
    folder = assemble(tmp_path_factory.mktemp('settings') / 'libero', HEAD, PROPRIO)
    coarse = np.random.default_rng(0).integers(0, 256, (30, 40, 3), np.uint8)
    picture = coarse.repeat(20, axis=0).repeat(20, axis=1)

    def preprocess(source_size: int = 0, **model) -> tuple[float, np.ndarray]:
        config = configuration(folder, **model)
        robot = dataclasses.replace(config.robot, source_size=source_size)
        config = dataclasses.replace(config, robot=robot)
        model = load(config, torch.device('cpu'), StoredPrompt(inputs()['input_ids']))
        return model.info.crop_side, model.preprocess([picture])[0].numpy()

    return preprocess


@pytest.mark.parametrize(
    ('setting', 'crop_side'),
    [
        ({'center_crop': False}, 1.0),
        ({'source_size': 256}, 0.9**0.5),
        ({'preprocessing': 'fast'}, 0.9**0.5),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else '',
)
def test_settings_reach_the_preprocessor(as_configured, setting, crop_side):
    usual_side, usual = as_configured()
    side, picture = as_configured(**setting)
    assert usual_side == pytest.approx(0.9**0.5)
    assert side == pytest.approx(crop_side)
    assert picture.shape == usual.shape
    assert (picture != usual).any()


def test_automatic_preprocessing_of_a_checkpoint_is_exact(as_configured):
    np.testing.assert_array_equal(as_configured()[1], as_configured(preprocessing='exact')[1])


def test_seed_decides_the_diffusion_noise(tmp_path):
    folder = assemble(tmp_path / 'diffusion', DIFFUSION_HEAD, NOISY, PROPRIO)
    first, again, other = (
        load_golden(folder, inputs()['input_ids'], seed=seed).parts.action_head.noise
        for seed in (3, 3, 4)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_ids_that_are_no_action_tokens_clip(tmp_path):
    """256 ids end the text vocabulary; they stand for 255 bins, from high to low values."""
    model = load_golden(assemble(tmp_path / 'discrete'), inputs()['input_ids'])
    config = json.loads((FOLDER / 'config.json').read_text())
    end = config['text_config']['vocab_size'] - config['pad_to_multiple_of']
    ids = torch.tensor([0, end - 257, end - 256, end - 255, end - 254])
    values = model.parts.action_head.tokens(ids).tolist()
    top = 254 / 255
    assert values == pytest.approx([top, top, top, top, top - 2 / 255])
    ids = torch.tensor([end - 2, end - 1, end, end + 63])
    values = model.parts.action_head.tokens(ids).tolist()
    assert values == pytest.approx([2 / 255 - top, -top, -top, -top])


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
    expected = tuple(load_file(FOLDER / MODEL)['projector.fc2.weight'].shape)
    return rf'projector\.fc2\.weight.*\(5, .*{re.escape(str(expected))}', {}


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
    bounds = statistics[unnorm_key()]['action']
    bounds['q99'] = 2 * bounds['q99']
    path.write_text(json.dumps(statistics))
    return f'{unnorm_key()}.*action', {}


def fault_unknown_statistics_key(folder):
    return rf'model\.unnorm_key.*{unnorm_key()}', {'unnorm_key': 'no_such_dataset'}


def fault_two_action_heads(folder):
    other = HEAD.replace('--', '--1')
    shutil.copy(FOLDER / HEAD, folder / other)
    return other, {}


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
