"""Checkpoint folders: what is read, what is refused and why, and how much memory it takes."""

import json
import math
import os
import pickle
import struct
import subprocess
import sys
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import GOLDEN
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

from specprune_ros.errors import CheckpointError
from specprune_ros.models.checkpoint import Checkpoint, load_weights, open_weights
from specprune_ros.models.lora import Adapter, merge, merge_wrapped
from specprune_ros.models.openvla_checkpoint import TOWERS, UNUSED, Skeleton
from specprune_ros.models.openvla_folder import Folder

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device('cpu')
INDEX = 'model.safetensors.index.json'
STATISTICS = {'libero': {'action': {'q01': [0.0], 'q99': [1.0]}}}


class Toy(nn.Module):
    """A module with every kind of state."""

    def __init__(self):
        super().__init__()
        with torch.device('meta'):
            self.conv = nn.Conv2d(3, 4, 2)
            self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
            self.register_buffer('scale', torch.zeros(4))
            self.register_buffer('steps', torch.zeros((), dtype=torch.int64))
        self.register_buffer('mean', torch.tensor([0.5, 0.25]), persistent=False)


def toy_state(dtype=torch.bfloat16, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random values for every entry of Toy's state dict."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(value.shape, generator=generator).to(dtype)
        if value.is_floating_point()
        else torch.tensor(7)
        for name, value in Toy().state_dict().items()
    }


def make_folder(path: Path, *, state=None, shards: int = 2, config=None) -> Path:
    """A checkpoint folder with sharded weights."""
    path.mkdir(exist_ok=True)
    config = {'model_type': 'openvla', 'norm_stats': STATISTICS} if config is None else config
    (path / 'config.json').write_text(json.dumps(config))
    state = toy_state() if state is None else state
    where = {key: shard_name(i % shards, shards) for i, key in enumerate(state)}
    for name in set(where.values()):
        save_file({key: state[key] for key in state if where[key] == name}, path / name)
    (path / INDEX).write_text(json.dumps({'metadata': {}, 'weight_map': where}))
    return path


def shard_name(index: int, count: int) -> str:
    return f'model-{index + 1:05d}-of-{count:05d}.safetensors'


@pytest.fixture
def folder(tmp_path) -> Path:
    return make_folder(tmp_path / 'openvla-7b-oft')


@contextmanager
def refused(*told: object):
    """Expects a CheckpointError whose message holds these words."""
    with pytest.raises(CheckpointError) as caught:
        yield
    for text in told:
        assert str(text) in str(caught.value)


def cut(path: Path, share: float = 0.5) -> None:
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])


def load(module: nn.Module, weights, **changes) -> nn.Module:
    load_weights(module, weights, **{'device': CPU, 'dtype': torch.float32, **changes})
    return module


def save_pt(path: Path, content: object) -> Path:
    torch.save(content, path)
    return path


class Payload:
    """Unpickled without care, it makes a file."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return os.system, (f'touch {self.mark}',)


# The folder ------------------------------------------------------------------------------------


def test_statistics_of_the_file_replace_those_of_config(folder):
    assert Checkpoint(str(folder)).statistics() == STATISTICS
    (folder / 'dataset_statistics.json').write_text('{"bridge": {}}')
    assert Checkpoint(folder).statistics() == {'bridge': {}}


@pytest.mark.parametrize('norm_stats', [None, {}, 'libero', {'libero': 3}])
def test_no_statistics(tmp_path, norm_stats):
    path = make_folder(tmp_path / 'f', config={'norm_stats': norm_stats})
    with refused(path, 'norm_stats', 'config.json'):
        Checkpoint(path).statistics()


def test_not_a_checkpoint_folder(tmp_path, folder):
    with refused(tmp_path / 'nothing', 'does not exist'):
        Checkpoint(tmp_path / 'nothing')
    with refused(folder / 'config.json', 'is a file'):
        Checkpoint(folder / 'config.json')
    (folder / 'config.json').unlink()
    with refused(folder / 'config.json', 'missing'):
        Checkpoint(folder)


@pytest.mark.parametrize(
    ('content', 'reason'),
    [
        (b'{"a": 1', 'delimiter'),
        (b'', 'Expecting value'),
        (b'\xff\xfe{}', 'utf-8'),
        (b'[1, 2]', 'must be a JSON object, is a list'),
        (b'[' * 100_000, 'recursion'),
        (b'version https://git-lfs.github.com/spec/v1\noid sha256:0\n', 'git lfs pull'),
    ],
    ids=['cut', 'empty', 'bytes', 'list', 'deep', 'lfs'],
)
def test_broken_json(folder, content, reason):
    for name in ('dataset_statistics.json', 'config.json'):
        (folder / name).write_bytes(content)
    with refused(folder / 'config.json', reason):
        Checkpoint(folder)
    make_folder(folder)
    with refused(folder / 'dataset_statistics.json', reason):
        Checkpoint(folder).statistics()


@pytest.mark.parametrize('step', ['150000', 'latest'])
def test_component_lookup(folder, step):
    name = f'action_head--{step}_checkpoint.pt'
    for other in (
        name,
        f'{name}.back.20250101_120000',
        'action_head_checkpoint.py',
        'action_head.safetensors',
        f'noisy_action_projector--{step}_checkpoint.pt',
    ):
        (folder / other).touch()
    (folder / 'action_head_checkpoints').mkdir()
    assert Checkpoint(folder).component('action_head') == folder / name
    assert Checkpoint(folder).component('proprio_projector') is None


def test_two_files_for_a_component(folder):
    names = [f'action_head--{step}_checkpoint.pt' for step in (50000, 150000)]
    for name in names:
        (folder / name).touch()
    with refused(folder, 'action_head', *names):
        Checkpoint(folder).component('action_head')


def test_a_link_to_nowhere_is_not_an_absent_component(folder):
    """An interrupted download must not turn into a model without proprioception."""
    path = folder / 'proprio_projector--1_checkpoint.pt'
    path.symlink_to(folder / 'blob')
    with refused(path):
        open_weights(Checkpoint(folder).component('proprio_projector'))


def test_code_in_the_folder_is_not_run(folder):
    mark = folder / 'ran'
    for name in ('modeling_prismatic', 'configuration_prismatic', 'checkpoint', '__init__'):
        (folder / f'{name}.py').write_text(f'open({str(mark)!r}, "w")\n')
    auto_map = {'AutoModelForVision2Seq': 'modeling_prismatic.OpenVLAForActionPrediction'}
    config = {'auto_map': auto_map, 'norm_stats': STATISTICS}
    (folder / 'config.json').write_text(json.dumps(config))
    checkpoint = Checkpoint(folder)
    load(Toy(), checkpoint.weights())
    assert checkpoint.component('modeling_prismatic') is None
    assert checkpoint.statistics() == STATISTICS
    assert not mark.exists()


# The shards ------------------------------------------------------------------------------------


@pytest.mark.parametrize('shards', [1, 2, 3])
def test_all_shards_are_read(tmp_path, shards):
    path = make_folder(tmp_path / 'f', shards=shards)
    weights = Checkpoint(path).weights()
    assert weights.keys() == toy_state().keys()
    for key, value in toy_state().items():
        assert weights[key].shape == tuple(value.shape)
        torch.testing.assert_close(weights[key].read(), value, rtol=0, atol=0)


def test_one_file_without_an_index(folder):
    (folder / INDEX).unlink()
    assert not Checkpoint(folder).has_weights
    with refused(folder, 'model.safetensors'):
        Checkpoint(folder).weights()
    save_file(toy_state(), folder / 'model.safetensors')
    assert Checkpoint(folder).has_weights
    assert Checkpoint(folder).weights().keys() == toy_state().keys()


def test_missing_shard(folder):
    gone = folder / shard_name(1, 2)
    gone.unlink()
    with refused(folder, gone.name, '1 of 2 shards missing'):
        Checkpoint(folder).weights()


@given(share=st.floats(0, 1, exclude_max=True))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30)
def test_any_truncated_shard_is_refused(tmp_path, share):
    path = make_folder(tmp_path / 'f')
    shard = path / shard_name(0, 2)
    cut(shard, share)
    with refused(shard, 'cannot be read'):
        Checkpoint(path).weights()


def test_index_names_a_key_that_its_shard_lacks(folder):
    index = json.loads((folder / INDEX).read_text())
    index['weight_map']['projector.fc9.weight'] = shard_name(1, 2)
    (folder / INDEX).write_text(json.dumps(index))
    with refused(folder / INDEX, 'projector.fc9.weight', shard_name(1, 2), 'lack'):
        Checkpoint(folder).weights()


def test_shard_holds_a_key_that_the_index_lacks(folder):
    index = json.loads((folder / INDEX).read_text())
    del index['weight_map']['conv.bias']
    (folder / INDEX).write_text(json.dumps(index))
    with refused(folder / INDEX, 'conv.bias', 'lacks'):
        Checkpoint(folder).weights()


@pytest.mark.parametrize('name', ['../secret.safetensors', '/etc/passwd', '', '..', 3, None])
def test_index_must_not_lead_out_of_the_folder(folder, name):
    save_file(toy_state(), folder.parent / 'secret.safetensors')
    (folder / INDEX).write_text(json.dumps({'weight_map': dict.fromkeys(toy_state(), name)}))
    with refused(folder / INDEX, 'weight_map'):
        Checkpoint(folder).weights()


# Component files -------------------------------------------------------------------------------


@pytest.mark.parametrize('suffix', ['.pt', '.safetensors'])
@pytest.mark.parametrize('prefix', ['', 'module.'])
def test_component_keys_lose_the_prefix_of_ddp(tmp_path, suffix, prefix):
    path = tmp_path / f'head_checkpoint{suffix}'
    state = {f'{prefix}{key}': value for key, value in toy_state().items()}
    (torch.save if suffix == '.pt' else save_file)(state, path)
    weights = open_weights(path)
    assert weights.keys() == toy_state().keys()
    for key, value in toy_state().items():
        torch.testing.assert_close(weights[key].read(), value, rtol=0, atol=0)


def test_nested_state_dicts_are_flattened(tmp_path):
    state = {'model': {'projector': {'fc1.weight': torch.ones(2, 3)}, 'head': {}}}
    weights = open_weights(save_pt(tmp_path / 'x.pt', state))
    assert {key: weight.shape for key, weight in weights.items()} == {
        'model.projector.fc1.weight': (2, 3)
    }


def test_pickled_code_is_refused_and_not_run(tmp_path):
    mark = tmp_path / 'ran'
    content = {'module.fc1.weight': torch.ones(2), 'x': Payload(mark)}
    path = save_pt(tmp_path / 'action_head--1_checkpoint.pt', content)
    with refused(path, 'wants to run code', 'system'):
        open_weights(path)
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        path.write_bytes(pickle.dumps(Payload(mark), protocol))
        with refused(path, 'wants to run code', 'system'):
            open_weights(path)
    path.write_bytes(pickle.dumps(Payload(mark), 0))  # the oldest looks like plain text
    with refused(path, 'not a zip archive'):
        open_weights(path)
    assert not mark.exists()
    pickle.loads(pickle.dumps(Payload(mark)))
    assert mark.exists(), 'the payload must be one that works'


@given(share=st.floats(0, 1, exclude_max=True))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30)
def test_any_truncated_pt_is_refused(tmp_path, share):
    path = save_pt(tmp_path / 'head_checkpoint.pt', toy_state())
    cut(path, share)
    with refused(path, 'cannot be read'):
        open_weights(path)


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('suffix', ['.pt', '.safetensors'])
@given(seed=st.integers(0, 2**32 - 1))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
def test_corrupt_bytes_are_read_or_refused(tmp_path, suffix, seed):
    path = tmp_path / f'head_checkpoint{suffix}'
    (torch.save if suffix == '.pt' else save_file)(toy_state(), path)
    data = np.frombuffer(bytearray(path.read_bytes()), np.uint8)
    rng = np.random.default_rng(seed)
    data[rng.integers(0, min(len(data), 900), 3)] = rng.integers(0, 256, 3, np.uint8)
    path.write_bytes(data.tobytes())
    with suppress(CheckpointError):
        for weight in open_weights(path).values():
            assert tuple(weight.read().shape) == weight.shape


@pytest.mark.parametrize(
    ('content', 'reason'),
    [
        ({}, 'no tensors'),
        ([torch.ones(2)], 'is a list'),
        (torch.ones(2), 'is a Tensor'),
        ({'a': torch.ones(2), 'step': 3}, 'step is a int'),
        ({'a': {'b': 'text'}}, 'a.b is a str'),
        ({'a': torch.ones(2, 2).to_sparse()}, 'not a plain tensor'),
        ({'a': torch.ones(2, device='meta')}, 'not a plain tensor'),
    ],
    ids=['empty', 'list', 'tensor', 'number', 'text', 'sparse', 'meta'],
)
def test_not_a_state_dict(tmp_path, content, reason):
    path = save_pt(tmp_path / 'x.pt', content)
    with refused(path, reason):
        open_weights(path)


@pytest.mark.parametrize('suffix', ['.pt', '.safetensors'])
def test_not_a_weight_file(tmp_path, suffix):
    path = tmp_path / f'x{suffix}'
    with refused(path, 'No such file'):
        open_weights(path)
    path.write_text('version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n')
    with refused(path, 'git lfs pull'):
        open_weights(path)
    path.write_text('<!DOCTYPE html><title>Not found</title>')
    with refused(path, 'cannot be read'):
        open_weights(path)


# Filling a module ------------------------------------------------------------------------------


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize('stored', [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_module_gets_every_value(tmp_path, stored, dtype):
    path = make_folder(tmp_path / 'f', state=toy_state(stored))
    toy = load(Toy(), Checkpoint(path).weights(), dtype=dtype)
    for name, value in toy_state(stored).items():
        wanted = value.to(dtype) if value.is_floating_point() else value
        torch.testing.assert_close(toy.state_dict()[name], wanted, rtol=0, atol=0)
    assert not any(parameter.requires_grad for parameter in toy.parameters())
    assert toy.steps.dtype == torch.int64
    assert toy.mean.dtype == torch.float32
    assert toy.conv(torch.ones(1, 3, 2, 2, dtype=dtype)).shape == (1, 4, 1, 1)


@pytest.mark.parametrize('suffix', ['.pt', '.safetensors'])
def test_a_loaded_module_outlives_its_file(tmp_path, suffix):
    """A checkpoint that is updated in place must not change a model that runs."""
    path = tmp_path / f'toy_checkpoint{suffix}'
    (torch.save if suffix == '.pt' else save_file)(toy_state(torch.float32), path)
    toy = load(Toy(), open_weights(path))
    with path.open('r+b') as file:
        file.write(bytes(path.stat().st_size))
    for name, value in toy_state(torch.float32).items():
        torch.testing.assert_close(toy.state_dict()[name], value, rtol=0, atol=0)


def test_all_that_does_not_fit_is_told_at_once_before_data_is_read(folder):
    state = toy_state()
    state['layers.1.weight'] = torch.zeros(4, 5)
    state['projector.fc9.weight'] = torch.zeros(6, 7)
    del state['conv.bias'], state['scale']
    weights = Checkpoint(make_folder(folder, state=state)).weights()
    for shard in folder.glob('*.safetensors'):
        shard.unlink()  # whatever is read from now on fails in another way
    with refused(
        folder / shard_name(0, 2),
        folder / shard_name(1, 2),
        '2 missing',
        'conv.bias (4,)',
        'scale (4,)',
        '1 unexpected: projector.fc9.weight (6, 7)',
        'layers.1.weight: file has (4, 5), the model needs (4, 4)',
        'hint',
    ):
        load(Toy(), weights)


def test_a_long_list_of_keys_is_cut(tmp_path):
    path = tmp_path / 'x.safetensors'
    save_file({f'key_{i:03d}': torch.zeros(1) for i in range(500)}, path)
    with pytest.raises(CheckpointError, match='500 unexpected') as caught:
        load(Toy(), open_weights(path))
    assert 'key_000 (1,)' in str(caught.value)
    assert 'and 492 more' in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_unused_keys_are_skipped_unread_but_not_those_that_are_needed(tmp_path):
    path = tmp_path / 'x.safetensors'
    state = {**toy_state(), 'attn_pool.q.weight': torch.full((9, 9), float('nan'))}
    save_file(state, path)
    with refused('1 unexpected', 'attn_pool.q.weight (9, 9)'):
        load(Toy(), open_weights(path), unused=('conv.',))
    toy = load(Toy(), open_weights(path), unused=('attn_pool.', 'conv.'))
    assert not toy.conv.weight.is_meta


@pytest.mark.parametrize('bad', [float('nan'), float('inf'), -float('inf')])
@pytest.mark.parametrize('stored', [torch.float32, torch.bfloat16, torch.float16])
def test_weights_that_are_not_finite(folder, bad, stored):
    state = toy_state(stored)
    state['layers.1.bias'][3] = bad
    file = folder / shard_name(list(state).index('layers.1.bias') % 2, 2)
    weights = Checkpoint(make_folder(folder, state=state)).weights()
    with refused(file, 'layers.1.bias', 'NaN or inf'):
        load(Toy(), weights)


def test_weights_beyond_the_range_of_the_chosen_type(folder):
    state = toy_state()
    state['conv.weight'][0] = 1e6
    weights = Checkpoint(make_folder(folder, state=state)).weights()
    load(Toy(), weights, dtype=torch.bfloat16)
    with refused('conv.weight', 'leaves the range of torch.float16'):
        load(Toy(), weights, dtype=torch.float16)


@pytest.mark.parametrize(
    ('name', 'value', 'needed'),
    [
        ('layers.0.weight', torch.ones(4, 4, dtype=torch.int8), 'floats'),
        ('steps', torch.tensor(7.0), 'torch.int64'),
    ],
)
def test_values_of_another_kind_are_refused(folder, name, value, needed):
    weights = Checkpoint(make_folder(folder, state={**toy_state(), name: value})).weights()
    with refused(name, value.dtype, needed):
        load(Toy(), weights)


def test_a_buffer_that_nobody_fills_is_an_error_of_ours(folder):
    toy = Toy()
    toy.mean = toy.mean.to('meta')
    with pytest.raises(ValueError, match='mean'):
        load(toy, Checkpoint(folder).weights())


# LoRA ------------------------------------------------------------------------------------------


def low_rank(shape: tuple[int, ...], rank: int, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """Base, A and B of a layer; B of a convolution is one of 1x1."""
    generator = torch.Generator().manual_seed(seed)
    ones = (1,) * (len(shape) - 2)
    shapes = shape, (rank, *shape[1:]), (shape[0], rank, *ones)
    return tuple(torch.randn(shape, generator=generator) for shape in shapes)


@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 9), st.integers(0, 99))
def test_a_merged_linear_is_the_sum_of_both_paths(rows, cols, rank, seed):
    base, a, b = low_rank((rows, cols), rank, seed)
    x = torch.randn(5, cols)
    both = x @ base.T + 0.3 * (x @ a.T) @ b.T
    torch.testing.assert_close(x @ merge(base, a, b, 0.3).T, both, rtol=1e-4, atol=1e-4)


@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 9), st.integers(0, 99))
def test_a_merged_convolution_is_the_sum_of_both_paths(channels, size, rank, seed):
    base, a, b = low_rank((channels, 3, size, size + 1), rank, seed)
    x = torch.randn(1, 3, 6, 6)
    both = nn.functional.conv2d(x, base)
    both = both + 0.8 * nn.functional.conv2d(nn.functional.conv2d(x, a), b)
    merged = nn.functional.conv2d(x, merge(base, a, b, 0.8))
    torch.testing.assert_close(merged, both, rtol=1e-4, atol=1e-4)


def test_a_small_update_of_a_half_precision_base_is_not_lost():
    base = torch.full((8, 8), 256.0, dtype=torch.bfloat16)
    a, b = torch.full((1, 8), 0.1), torch.full((8, 1), 0.1)
    merged = merge(base, a.bfloat16(), b.bfloat16(), 1.0)
    assert merged.dtype == torch.float32
    torch.testing.assert_close(merged - 256, torch.full((8, 8), 0.01), rtol=0.01, atol=0)
    assert (base == 256).all()


def wrapped(rank: int, path: str = 'tower.blocks.0.attn.qkv', shape=(6, 4)) -> dict:
    """One layer as peft saves it inside its wrapper."""
    base, a, b = low_rank(shape, rank)
    return {
        f'{path}.base_layer.weight': base,
        f'{path}.base_layer.bias': torch.ones(shape[0]),
        f'{path}.lora_A.default.weight': a,
        f'{path}.lora_B.default.weight': b,
    }


@pytest.mark.parametrize(('rank', 'scale'), [(8, 1.0), (16, 1.0), (20, 0.8), (32, 0.5)])
@pytest.mark.parametrize('shape', [(6, 4), (6, 3, 2, 2)])
def test_wrapped_layers_become_plain(tmp_path, rank, scale, shape):
    """Trap 10: convolutions are wrapped, too; scale and shift of FiLM are not."""
    state = {**wrapped(rank, 't.proj', shape), 't.blocks.0.scale.weight': torch.ones(2, 2)}
    plain = merge_wrapped(open_weights(save_pt(tmp_path / 'x.pt', state)))
    assert plain.keys() == {'t.proj.weight', 't.proj.bias', 't.blocks.0.scale.weight'}
    base, a, b = low_rank(shape, rank)
    update = torch.einsum('or,r...->o...', b.flatten(1), a)
    torch.testing.assert_close(plain['t.proj.weight'].read(), base + scale * update)
    assert plain['t.proj.weight'].shape == shape
    assert (plain['t.proj.bias'].read() == 1).all()


@pytest.mark.parametrize('part', ['base_layer.weight', 'lora_A.default', 'lora_B.default'])
def test_wrapped_layer_lacks_a_part(tmp_path, part):
    state = {key: value for key, value in wrapped(8).items() if part not in key}
    path = save_pt(tmp_path / 'x.pt', state)
    with refused(path, 'tower.blocks.0.attn.qkv', f'but not tower.blocks.0.attn.qkv.{part}'):
        merge_wrapped(open_weights(path))


@pytest.mark.parametrize(
    ('part', 'shape'),
    [
        ('lora_A.default.weight', (8, 5)),
        ('lora_A.default.weight', (7, 4)),
        ('lora_A.default.weight', (0, 4)),
        ('lora_A.default.weight', ()),
        ('lora_B.default.weight', (5, 8)),
        ('lora_B.default.weight', (6, 8, 2, 2)),
        ('base_layer.weight', (6,)),
    ],
)
def test_wrapped_layer_of_other_shapes(tmp_path, part, shape):
    key = f'tower.blocks.0.attn.qkv.{part}'
    path = save_pt(tmp_path / 'x.pt', {**wrapped(8), key: torch.zeros(shape)})
    with refused(path, f'{key} {shape}'):
        merge_wrapped(open_weights(path))


def test_wrapped_layer_of_rank_zero(tmp_path):
    path = save_pt(tmp_path / 'x.pt', wrapped(0))
    with refused(path, 'lora_A.default.weight (0, 4)'):
        merge_wrapped(open_weights(path))


def test_unmerged_lora_is_named_as_the_cause(tmp_path):
    path = save_pt(tmp_path / 'x.pt', {**toy_state(), **wrapped(8, 'layers.0', (4, 4))})
    with refused(path, 'LoRA is not merged'):
        load(Toy(), open_weights(path))


def make_adapter(folder: Path, *, config=None, **changes) -> Path:
    """An adapter of conv, and of layers.0 with a full copy of its base; None leaves a key out."""
    folder.mkdir(exist_ok=True)
    config = {'r': 32, 'lora_alpha': 16, 'peft_type': 'LORA', **(config or {})}
    (folder / 'adapter_config.json').write_text(json.dumps(config))
    copy, *linear = low_rank((4, 4), 32, seed=1)
    _, *conv = low_rank((4, 3, 2, 2), 32, seed=2)
    state = {
        'layers.0.base_layer.weight': copy,
        'layers.0.lora_A.weight': linear[0],
        'layers.0.lora_B.weight': linear[1],
        'conv.lora_A.weight': conv[0],
        'conv.lora_B.weight': conv[1],
        **changes,
    }
    state = {f'base_model.model.{k}': v for k, v in state.items() if v is not None}
    save_file(state, folder / 'adapter_model.safetensors')
    return folder


def test_an_adapter_changes_its_layers_and_no_others(folder):
    assert Checkpoint(folder).lora_adapter is None
    make_adapter(folder / 'lora_adapter')
    base = Checkpoint(folder)
    toy = load(Toy(), Adapter.open(base.lora_adapter).apply(base.weights()))
    wanted = {key: value.float() for key, value in toy_state().items()}
    copy, a, b = low_rank((4, 4), 32, seed=1)
    wanted['layers.0.weight'] = copy + 0.5 * b @ a
    _, a, b = low_rank((4, 3, 2, 2), 32, seed=2)
    wanted['conv.weight'] += 0.5 * torch.einsum('or,rchw->ochw', b.flatten(1), a)
    for name, value in wanted.items():
        torch.testing.assert_close(toy.state_dict()[name].float(), value)


def test_a_folder_that_holds_only_an_adapter(tmp_path):
    make_adapter(tmp_path / 'lora_adapter')
    (tmp_path / 'config.json').write_text('{}')
    checkpoint = Checkpoint(tmp_path)
    assert not checkpoint.has_weights
    with refused(tmp_path, 'base model'):
        checkpoint.weights()


def test_an_adapter_of_another_base_model(folder):
    extra = low_rank((4, 4), 32)[1:]
    keys = [f'language_model.q_proj.lora_{letter}.weight' for letter in 'AB']
    adapter = make_adapter(folder / 'lora_adapter', **dict(zip(keys, extra, strict=True)))
    with refused('adapter_model.safetensors', '1 of 3 layers', 'language_model.q_proj'):
        Adapter.open(adapter).apply(Checkpoint(folder).weights())


@pytest.mark.parametrize(
    ('key', 'value', 'told'),
    [
        ('conv.lora_A.weight', None, 'conv.lora_A.weight'),
        ('conv.lora_A.weight', torch.zeros(8, 3, 2, 2), 'r in adapter_config.json is 32'),
        ('conv.lora_A.weight', torch.full((32, 3, 2, 2), float('nan')), 'NaN'),
        ('conv.lora_B.weight', torch.zeros(5, 32, 1, 1), '(5, 32, 1, 1)'),
        ('layers.0.base_layer.weight', torch.zeros(4, 5), 'the base model (4, 4)'),
        ('conv.lora_magnitude_vector', torch.zeros(4), 'conv.lora_magnitude_vector'),
    ],
    ids=['absent', 'rank', 'nan', 'shape', 'copy', 'dora'],
)
def test_broken_adapter_weights(folder, key, value, told):
    adapter = make_adapter(folder / 'lora_adapter', **{key: value})
    with refused(adapter / 'adapter_model.safetensors', key.partition('.')[0], told):
        load(Toy(), Adapter.open(adapter).apply(Checkpoint(folder).weights()))


@pytest.mark.parametrize(
    ('field', 'value'),
    [
        ('r', None),
        ('r', 0),
        ('r', '32'),
        ('r', True),
        ('lora_alpha', None),
        ('lora_alpha', -1),
        ('lora_alpha', float('inf')),
        ('use_rslora', True),
        ('alpha_pattern', {'lm_head': 3}),
    ],
)
def test_broken_adapter_config(folder, field, value):
    adapter = make_adapter(folder / 'lora_adapter', config={field: value})
    with refused(adapter / 'adapter_config.json', f'{field} = {value!r}'):
        Adapter.open(adapter)


@pytest.mark.parametrize('name', ['adapter_config.json', 'adapter_model.safetensors'])
def test_adapter_without_a_file(folder, name):
    adapter = make_adapter(folder / 'lora_adapter')
    (adapter / name).unlink()
    with refused(adapter / name):
        Adapter.open(adapter)


# The real layout -------------------------------------------------------------------------------


@pytest.fixture
def oft() -> Path:
    path = GOLDEN / 'openvla_oft'
    if not path.exists():
        pytest.skip(f'reference checkpoint {path} is not there')
    return path


@pytest.mark.golden
def test_a_folder_of_the_real_layout(oft):
    weights = Checkpoint(oft).weights()
    stored = load_file(oft / 'model.safetensors')
    assert {key: weight.shape for key, weight in weights.items()} == {
        key: tuple(value.shape) for key, value in stored.items()
    }
    folder = Folder.open(oft)
    assert count('language_model.model.layers', weights) == folder.llama['num_hidden_layers']
    dino, siglip = folder.towers
    assert count('vision_backbone.featurizer.blocks', weights) == dino.depth
    assert count('vision_backbone.fused_featurizer.blocks', weights) == siglip.depth
    assert weights['language_model.model.norm.weight'].shape == (folder.width,)


def count(prefix: str, keys) -> int:
    """How many numbered parts there are behind a prefix."""
    return len({key.split('.')[prefix.count('.') + 1] for key in keys if key.startswith(prefix)})


@pytest.mark.golden
@pytest.mark.parametrize(
    ('name', 'key', 'kind', 'axis'),
    [
        ('action_head', 'model.fc2.weight', 'action', 0),
        ('proprio_projector', 'fc1.weight', 'proprio', 1),
    ],
)
def test_component_files_of_the_real_layout(oft, name, key, kind, axis):
    """Its size on the side of the robot is that of the statistics, its values are the file's."""
    file = next(oft.glob(f'{name}--*_checkpoint.pt'), None)
    if file is None:
        pytest.skip(f'reference checkpoint {oft} has no {name}')
    checkpoint = Checkpoint(oft)
    assert checkpoint.component(name) == file
    weights = open_weights(file)
    for statistics in checkpoint.statistics().values():
        assert weights[key].shape[axis] == len(statistics[kind]['q01'])
    stored = torch.load(file, weights_only=True)
    assert len(weights) == len(stored)
    for stored_key, value in stored.items():
        weight = weights[stored_key.removeprefix('module.')]
        torch.testing.assert_close(weight.read(), value, rtol=0, atol=0)


@pytest.fixture
def film(oft) -> Path:
    path = next((oft / 'film').glob('vision_backbone--*_checkpoint.pt'), None)
    if path is None:
        pytest.skip(f'reference checkpoint {oft} has no film/')
    return path


@pytest.mark.golden
def test_the_film_file_becomes_the_towers_of_the_model_and_film(oft, film):
    folder = Folder.open(oft)
    towers = merge_wrapped(open_weights(film))
    modulation = {key for key in towers if '.scale.' in key or '.shift.' in key}
    plain = {key.replace('.block.', '.'): towers[key].shape for key in towers.keys() - modulation}
    dino, siglip = folder.towers
    parts = ('scale.weight', 'scale.bias', 'shift.weight', 'shift.bias')
    assert len(modulation) == len(parts) * (dino.depth + siglip.depth)
    model = {
        key: weight.shape
        for key, weight in folder.checkpoint.weights().items()
        if key.startswith(TOWERS)
    }
    shared = plain.keys() & model.keys()
    assert {key: plain[key] for key in shared} == {key: model[key] for key in shared}
    assert all(key.startswith(UNUSED) for key in plain.keys() ^ model.keys())


@pytest.mark.golden
def test_merged_layers_of_the_film_file(film):
    """Trap 10: the patch embedding is wrapped, too; a rank of 20 gives 16 / 20."""
    towers, stored = merge_wrapped(open_weights(film)), torch.load(film, weights_only=True)
    for layer, equation in (('patch_embed.proj', 'orij,rchw->ochw'), ('attn.qkv', 'or,rc->oc')):
        path = next(key for key in stored if f'{layer}.base_layer.weight' in key)
        path = path.removesuffix('.base_layer.weight')
        base, a, b = (
            stored[f'{path}.{part}.weight'].float()
            for part in ('base_layer', 'lora_A.default', 'lora_B.default')
        )
        wanted = base + lora_scale(film, rank=len(a)) * torch.einsum(equation, b, a)
        torch.testing.assert_close(towers[f'{path}.weight'].read(), wanted)


def lora_scale(film: Path, rank: int) -> float:
    """As noted beside the file; without a note, as OpenVLA-OFT trains."""
    note = film.parent / 'film_config.json'
    return json.loads(note.read_text())['scaling'] if note.exists() else min(rank, 16) / rank


# Memory ----------------------------------------------------------------------------------------

SHARDS, PER_SHARD, SHARD_BYTES = 6, 4, 400 << 20
needs_proc = pytest.mark.skipif(not Path('/proc/self/status').exists(), reason='needs Linux')

STATUS = """
import sys
from pathlib import Path
import torch

def status(name):
    lines = Path('/proc/self/status').read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(name))

torch.set_num_threads(1)
"""

MEASURE = f"""{STATUS}
from torch import nn
from specprune_ros.models.checkpoint import Checkpoint, load_weights

class Accelerator(nn.Module):
    # Takes weights as a GPU does: every page is read, nothing stays in host memory.
    def __init__(self, weights):
        super().__init__()
        for name, weight in weights.items():
            empty = torch.empty(weight.shape, device='meta')
            self.register_parameter(name, nn.Parameter(empty))
        self.filled = set()

    def __setattr__(self, name, value):
        if isinstance(value, nn.Parameter):
            value.sum()
            self.filled.add(name)
        else:
            super().__setattr__(name, value)

weights = Checkpoint(sys.argv[1]).weights()
start = status('VmRSS:')
if sys.argv[2] == 'load':
    module = Accelerator(weights)
    load_weights(module, weights, device=torch.device('cpu'), dtype=torch.bfloat16)
    assert module.filled == set(weights)
else:
    held = [weight.read() for weight in weights.values()]
    total = sum(tensor.sum() for tensor in held)
print(status('VmHWM:') - start)
"""


# The model stays in host memory, so what it takes is subtracted from the peak.
MEASURE_MODEL = f"""{STATUS}
import numpy as np
from specprune_ros.config_files import load_config
from specprune_ros.models.openvla_checkpoint import load
from specprune_ros.verify import StoredPrompt

config = load_config(['robots/libero_franka'], {{
    'robot.joint_names': (),
    'model.name': 'openvla_oft',
    'model.checkpoint': sys.argv[1],
    'model.dtype': 'bfloat16',
}})
start = status('VmRSS:')
model = load(config, torch.device('cpu'), StoredPrompt(np.ones((1, 20), np.int64)))
print(status('VmHWM:') - start - 2 * model.info.parameters)
"""


def sparse_shard(path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """A safetensors file of bf16 zeros that takes no space on the disk."""
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * math.prod(shape)
        header[name] = {'dtype': 'BF16', 'shape': shape, 'data_offsets': [start, end]}
    text = json.dumps(header).encode()
    with path.open('wb') as file:
        file.write(struct.pack('<Q', len(text)) + text)
        file.truncate(file.tell() + end)


def sparse_folder(folder: Path, shards: list[dict[str, tuple[int, ...]]], config: dict) -> None:
    """A checkpoint folder of such files."""
    where = {}
    for index, shapes in enumerate(shards):
        sparse_shard(folder / shard_name(index, len(shards)), shapes)
        where |= dict.fromkeys(shapes, shard_name(index, len(shards)))
    (folder / INDEX).write_text(json.dumps({'weight_map': where}))
    (folder / 'config.json').write_text(json.dumps(config))


def measured_bytes(script: str, *arguments: object) -> int:
    """What a script prints that measures itself in a process of its own."""
    done = subprocess.run(
        [sys.executable, '-c', script, *map(str, arguments)],
        capture_output=True, text=True, timeout=100, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def most_allowed(shard_bytes: int) -> float:
    return 1.2 * shard_bytes + (1 << 30)


@pytest.mark.slow
@needs_proc
def test_host_memory_stays_far_below_the_whole_checkpoint(tmp_path):
    """The peak is that beyond what the process held after its imports."""
    shape = (SHARD_BYTES // PER_SHARD // 2,)
    shards = [{f'layer_{s}_{i}': shape for i in range(PER_SHARD)} for s in range(SHARDS)]
    sparse_folder(tmp_path, shards, {})
    peak, held = (measured_bytes(MEASURE, tmp_path, how) for how in ('load', 'hold'))
    print(f'peak {peak / 2**20:.0f} MiB; {held / 2**20:.0f} MiB when all tensors are held')
    assert peak < most_allowed(SHARD_BYTES) < held


@pytest.mark.slow
@needs_proc
def test_loading_a_model_takes_little_more_than_the_model(tmp_path):
    """Real vision towers and a small language model; twice the model would break the bound."""
    config = {
        'vision_backbone_id': 'dinosiglip-vit-so-224px',
        'text_config': {
            'hidden_size': 2048,
            'intermediate_size': 5632,
            'num_hidden_layers': 4,
            'num_attention_heads': 16,
            'num_key_value_heads': 16,
        },
        'norm_stats': {'libero': {'action': {'q01': [-1.0] * 7, 'q99': [1.0] * 7}}},
    }
    sparse_folder(tmp_path, [], config)
    state = Skeleton(Folder.open(tmp_path), lm_head=True).state_dict()
    by_size = sorted(state, key=lambda name: state[name].numel())  # for shards of one size
    shards = [{name: tuple(state[name].shape) for name in by_size[i::4]} for i in range(4)]
    sizes = [2 * sum(map(math.prod, shard.values())) for shard in shards]
    sparse_folder(tmp_path, shards, config)
    beyond = measured_bytes(MEASURE_MODEL, tmp_path)
    print(f'model {sum(sizes) / 2**20:.0f} MiB; peak {beyond / 2**20:.0f} MiB beyond it')
    assert beyond < most_allowed(max(sizes)) < sum(sizes)
    assert beyond < sum(sizes) / 2
