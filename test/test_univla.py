"""UniVLA folders against the published formulas, which are written out here once more in NumPy.

No published checkpoint was at hand: the language model is the tiny reference one, the decoder's
weights are random. Names and shapes are those of the code that writes `action_decoder.pt`.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from functools import lru_cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from openvla_world import FILM, FOLDER, HEAD, PROPRIO, assemble, configuration, inputs
from test_tokenizer import llama_json

from specprune_ros import models
from specprune_ros.cli import main
from specprune_ros.config_files import load_config
from specprune_ros.errors import CheckpointError, ConfigError
from specprune_ros.models.base import Prompt
from specprune_ros.models.decoder import Decoded, KVCache, QueryDecoder, decode
from specprune_ros.models.heads.latent import ActionDecoder, LatentActionHead
from specprune_ros.models.openvla_checkpoint import load
from specprune_ros.models.preprocess import jpeg_round_trip
from specprune_ros.models.resample import center_crop
from specprune_ros.policy import Policy
from specprune_ros.pruning.base import PruneRun
from specprune_ros.token_layout import Span, TokenLayout
from specprune_ros.types import ExecutedAction, Observation
from specprune_ros.verify import StoredPrompt

HORIZON, PATCHES = 12, 256
DECODER = 'action_decoder.pt'
POOLS = ('latent_action_pool', 'visual_pool')
TOLERANCE = 1e-5
CPU = torch.device('cpu')


def tiny() -> int:
    """Width of the reference's language model; skips the test without the reference."""
    path = FOLDER / 'config.json'
    if not path.exists():
        pytest.skip(f'reference vectors {path} are not there')
    return json.loads(path.read_text())['text_config']['hidden_size']


def shapes(features: int, horizon: int = HORIZON) -> dict[str, tuple[int, ...]]:
    """Every key of action_decoder.pt and its shape."""
    pool = {
        'latents': (1, 512),
        'projection.weight': (512, features),
        'projection.bias': (512,),
        'attn_norm.g': (512,),
        'mlp_norm.g': (512,),
        'attn.q.weight': (512, 512),
        'attn.kv.weight': (1024, 512),
        'attn.proj.weight': (512, 512),
        'attn.proj.bias': (512,),
        'mlp.0.project.weight': (4096, 512),
        'mlp.0.project.bias': (4096,),
        'mlp.1.weight': (512, 2048),
        'mlp.1.bias': (512,),
    }
    both = {f'{name}.{key}': shape for name in POOLS for key, shape in pool.items()}
    return both | {'proj.0.weight': (7 * horizon, 512), 'proj.0.bias': (7 * horizon,)}


@lru_cache
def random_weights(horizon: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for key, shape in shapes(tiny(), horizon).items():
        value = torch.randn(shape, generator=generator)
        if len(shape) == 2:
            value *= (3.0 if 'attn.q' in key or '.kv.' in key else 1.0) * shape[1] ** -0.5
        elif key.endswith('.g'):
            value = 1 + 0.2 * value
        weights[key] = value if key.endswith('latents') else 0.7 * value
    return weights


def decoder_weights(horizon: int = HORIZON) -> dict[str, torch.Tensor]:
    """Random ones, with which the attention peaks and no tanh saturates; a dict of one's own."""
    return dict(random_weights(horizon))


@lru_cache
def published() -> Published:
    return Published(decoder_weights())


@pytest.fixture(scope='module')
def decoder(tmp_path_factory):
    """action_decoder.pt, for folders to link to."""
    path = tmp_path_factory.mktemp('decoder') / DECODER
    torch.save(decoder_weights(), path)
    return path


def write(folder, weights) -> None:
    (folder / DECODER).unlink()  # a link to the file of all tests
    torch.save(weights, folder / DECODER)


@pytest.fixture
def make_folder(tmp_path, decoder):
    def make(*files: str):
        folder = assemble(tmp_path / 'univla', *files)
        (folder / DECODER).symlink_to(decoder)
        return folder

    return make


def make_config(folder, horizon: int = HORIZON, cameras: int = 1, **model):
    config = configuration(folder, **{'cameras': cameras, 'name': 'univla', **model})
    return dataclasses.replace(config, robot=dataclasses.replace(config.robot, horizon=horizon))


def load_tiny(folder, **options):
    return load(make_config(folder, **options), CPU, StoredPrompt(inputs()['input_ids']))


@pytest.fixture(scope='module')
def folder(tmp_path_factory, decoder):
    folder = assemble(tmp_path_factory.mktemp('univla') / 'univla-libero-spatial')
    (folder / DECODER).symlink_to(decoder)
    return folder


@pytest.fixture(scope='module')
def model(folder):
    return load_tiny(folder)


@pytest.fixture
def own(make_folder):
    """A folder that a test may spoil."""
    return make_folder()


def image() -> np.ndarray:
    return inputs()['images_uint8'][0]


def observation(step: int = 0) -> Observation:
    return Observation(
        images={'a': np.roll(image(), 20 * step, axis=1)},
        proprio=None,
        instruction='go',
        stamp_ns=step * 400_000_000,
    )


# The published formulas, in float64 -------------------------------------------------------------


class Published:
    """What the public action decoder computes; a test may take one step wrongly on purpose."""

    def __init__(self, weights: dict[str, torch.Tensor], *, swapped=False, pre_norm=False):
        self.weights = {key: value.double().numpy() for key, value in weights.items()}
        self.swapped, self.pre_norm = swapped, pre_norm

    def linear(self, name: str, x: np.ndarray) -> np.ndarray:
        return x @ self.weights[f'{name}.weight'].T + self.weights.get(f'{name}.bias', 0.0)

    def norm(self, name: str, x: np.ndarray) -> np.ndarray:
        scale = np.maximum(np.sqrt((x**2).sum(-1, keepdims=True)) / np.sqrt(512), 1e-8)
        return x / scale * self.weights[f'{name}.g']

    def attention(self, name: str, seed: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        query, both = self.linear(f'{name}.q', seed), self.linear(f'{name}.kv', tokens)
        result = np.zeros((1, 512))
        for head in range(8):
            part = slice(64 * head, 64 * head + 64)
            logits = both[:, :512][:, part] @ query[0, part] / 8.0
            share = np.exp(logits - logits.max())
            result[0, part] = share / share.sum() @ both[:, 512:][:, part]
        return self.linear(f'{name}.proj', result)

    def mlp(self, name: str, x: np.ndarray) -> np.ndarray:
        halves = np.split(self.linear(f'{name}.0.project', x), 2, axis=-1)
        value, gate = reversed(halves) if self.swapped else halves
        return self.linear(f'{name}.1', value * gate / (1 + np.exp(-gate)))

    def pool(self, name: str, tokens: np.ndarray, start=0.0) -> np.ndarray:
        seed = self.weights[f'{name}.latents'] + start
        tokens = self.linear(f'{name}.projection', tokens)
        if self.pre_norm:
            seed = seed + self.attention(
                f'{name}.attn', self.norm(f'{name}.attn_norm', seed), tokens
            )
            return seed + self.mlp(f'{name}.mlp', self.norm(f'{name}.mlp_norm', seed))
        seed = self.norm(f'{name}.attn_norm', seed + self.attention(f'{name}.attn', seed, tokens))
        return self.norm(f'{name}.mlp_norm', seed + self.mlp(f'{name}.mlp', seed))

    def chunk(self, latent: np.ndarray, visual: np.ndarray | None) -> np.ndarray:
        seen = 0.0 if visual is None else self.pool('visual_pool', visual)
        plan = self.pool('latent_action_pool', latent, seen)
        return np.tanh(self.linear('proj.0', plan)).reshape(-1, 7)


def hidden_states(model, pixels: np.ndarray) -> np.ndarray:
    """[S + 4, C] of prompt and four greedy tokens, by transformers' forward without a cache."""
    head, llama = model.parts.action_head, model.parts.language_model
    with torch.inference_mode():
        embeds = model.embed(model.preprocess([pixels]), None, '').embeds
        for _ in range(4):
            hidden = llama(inputs_embeds=embeds[None], use_cache=False).last_hidden_state[0]
            token = head.lm_head(hidden[-1:]).argmax(-1)
            embeds = torch.cat((embeds, head.embed_tokens(token)))
        return llama(inputs_embeds=embeds[None], use_cache=False).last_hidden_state[0].numpy()


def actions(model, run: PruneRun) -> np.ndarray:
    with torch.inference_mode():
        prompt = model.embed(model.preprocess([image()]), None, '')
        return model.act(prompt, QueryDecoder(model.decoder, prompt.layout, run)).numpy()


@pytest.fixture(scope='module')
def reference(model):
    """All hidden states, and the chunk that the published formulas make of them."""
    hidden = hidden_states(model, image())
    return hidden, published().chunk(hidden[-5:-1], hidden[:PATCHES])


@pytest.mark.golden
def test_the_chunk_is_the_published_formulas(model, reference):
    got = actions(model, PruneRun(None))
    assert got.shape == (HORIZON, 7)
    assert np.abs(got - reference[1]).max() <= TOLERANCE
    assert 0.1 < np.abs(got).mean() < 0.9, 'neither linear nor saturated'


MISTAKES = {
    'hidden states at the four tokens, as in training': lambda h: (h[-4:], h[:PATCHES]),
    'all patches, without BOS': lambda h: (h[-5:-1], h[1 : PATCHES + 1]),
    'BOS and all patches': lambda h: (h[-5:-1], h[: PATCHES + 1]),
    'no image': lambda h: (h[-5:-1], None),
}


@pytest.mark.golden
@pytest.mark.parametrize('mistake', MISTAKES)
def test_other_rows_would_show(reference, mistake):
    hidden, right = reference
    rows = MISTAKES[mistake](hidden)
    wrong = published().chunk(*rows)
    assert np.abs(wrong - right).max() > 20 * TOLERANCE


@pytest.mark.golden
@pytest.mark.parametrize('mistake', ['swapped', 'pre_norm'])
def test_other_formulas_would_show(reference, mistake):
    hidden, right = reference
    wrong = Published(decoder_weights(), **{mistake: True}).chunk(hidden[-5:-1], hidden[:PATCHES])
    assert np.abs(wrong - right).max() > 20 * TOLERANCE


@pytest.mark.golden
def test_unnormalised_without_the_epsilon_of_openvla_oft(model):
    statistics = model.parts.action_bounds
    normalized = np.linspace(-1, 1, 7)[None].repeat(HORIZON, axis=0)
    low, high = statistics.low, statistics.high
    expected = np.where(
        [True] * 6 + [False], 0.5 * (normalized + 1) * (high - low) + low, normalized
    )
    np.testing.assert_array_equal(model.unnormalize(normalized), expected)


@pytest.mark.golden
@pytest.mark.parametrize(
    ('name', 'skips'), [('univla', False), ('openvla', False), ('openvla_oft', True)]
)
def test_an_image_of_the_models_size_is_coded_as_the_models_scripts_do(
    tmp_path, decoder, name, skips
):
    folder = assemble(tmp_path / name)
    if name == 'univla':
        (folder / DECODER).symlink_to(decoder)
    model = load_tiny(folder, name=name, horizon=1 if name == 'openvla' else HORIZON)
    pixels = np.random.default_rng(0).integers(0, 256, (224, 224, 3), np.uint8)
    expected = center_crop(pixels if skips else jpeg_round_trip(pixels))
    np.testing.assert_array_equal(model.preprocess([pixels])[0].numpy(), expected)


# Pruned ----------------------------------------------------------------------------------------


class Keep(PruneRun):
    """Keeps given patches after the first layer."""

    def __init__(self, patches):
        super().__init__(None)
        self.patches = torch.tensor(sorted(patches))

    def after_layer(self, probe):
        return self.patches if probe.layer == 1 else None


@pytest.mark.golden
@settings(max_examples=8, deadline=None)
@given(st.sets(st.integers(0, PATCHES - 2), max_size=40), st.booleans())
def test_pools_the_visual_rows_that_are_left(model, patches, last):
    """Whether the last patch, which is no visual row, survives or not."""
    patches = patches | ({PATCHES - 1} if last or not patches else set())
    latent = []
    pool = model.parts.action_head.action_decoder.latent_action_pool
    hook = pool.register_forward_pre_hook(lambda module, given: latent.append(given[0].numpy()))
    got = actions(model, Keep(patches))
    hook.remove()
    with torch.inference_mode():
        prompt = model.embed(model.preprocess([image()]), None, '')
        decoded = decode(model.decoder, prompt.embeds, prompt.layout, Keep(patches), KVCache())
    visual = decoded.hidden[decoded.pos_idx < PATCHES].numpy()
    assert len(visual) == 1 + len(patches - {PATCHES - 1})
    expected = published().chunk(latent[0], visual)
    assert np.abs(got - expected).max() <= TOLERANCE


@pytest.mark.golden
def test_specprune_runs_on_it(model, folder):
    policy = Policy(model, make_config(folder))
    for step in range(3):
        result = policy.infer(observation(step))
        chunk, report = result.chunk, result.report
        assert report.fallback_reason == ''
        assert chunk.data.shape == (HORIZON, 7)
        assert np.isfinite(chunk.data).all()
        for row in chunk.data:
            action = ExecutedAction(stamp_ns=0, names=chunk.names, units=chunk.units, data=row)
            policy.observe_executed(action, observation(step).images)
    assert report.tokens_kept.sum() < 0.7 * report.tokens_total.sum()


def test_nothing_waits_for_the_device():
    """The meta device raises at whatever would read a value back."""
    meta, width = torch.device('meta'), 64
    layout = TokenLayout(
        cameras=('a',), grid=(4, 4), camera_starts=(1,), length=24, prompt=Span(17, 24),
        instruction=Span(19, 21), head=Span(23, 24),
    )  # fmt: skip

    class Pruned:
        def __call__(self, embeds, cache):
            return Decoded(
                torch.empty(15, width, device=meta), torch.empty(15, dtype=int, device=meta)
            )

        def extend(self, embeds, pos_idx, cache):
            return torch.empty(1, width, device=meta)

    with meta:
        head = LatentActionHead(
            torch.nn.Linear(width, 99), torch.nn.Embedding(99, width), ActionDecoder(width, 5)
        )
        chunk = head.act(Prompt(torch.empty(24, width), layout), Pruned())
    assert (chunk.device.type, chunk.shape) == ('meta', (5, 7))


# The files -------------------------------------------------------------------------------------


def test_keys_and_shapes_at_the_published_width():
    with torch.device('meta'):
        decoder = ActionDecoder(4096, 12)
    built = {key: tuple(value.shape) for key, value in decoder.state_dict().items()}
    assert built == shapes(4096)
    assert len(built) == 28
    assert sum(parameter.numel() for parameter in decoder.parameters()) == 12_640_340


@pytest.mark.golden
def test_the_decoder_stays_float32(folder):
    model = load_tiny(folder, dtype='bfloat16')
    head = model.parts.action_head
    assert {p.dtype for p in head.action_decoder.parameters()} == {torch.float32}
    assert head.lm_head.weight.dtype == torch.bfloat16
    got = actions(model, PruneRun(None))
    assert got.dtype == np.float32
    assert np.isfinite(got).all()


@pytest.mark.golden
def test_the_name_that_training_gives(tmp_path):
    folder = assemble(tmp_path / 'bridge')
    torch.save(decoder_weights(horizon=10), folder / 'action_decoder-30000.pt')
    assert load_tiny(folder, horizon=10).info.horizon == 10


class Payload:
    """Runs code when it is unpickled."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return (open, (str(self.target), 'w'))


def renamed(weights: dict, old: str, new: str) -> dict:
    return {key.replace(old, new): value for key, value in weights.items()}


def fault_no_decoder(folder):
    (folder / DECODER).unlink()
    return CheckpointError, r'no action_decoder\.pt', {}


def fault_two_decoders(folder):
    shutil.copy(folder / DECODER, folder / 'action_decoder-500.pt')
    return CheckpointError, r'2 files for action_decoder \(action_decoder-500\.pt', {}


def fault_truncated(folder):
    data = (folder / DECODER).read_bytes()
    (folder / DECODER).unlink()
    (folder / DECODER).write_bytes(data[: len(data) // 2])
    return CheckpointError, DECODER, {}


def fault_code_in_the_pickle(folder):
    write(folder, {'proj.0.weight': Payload(folder / 'owned')})
    return CheckpointError, f'{DECODER}: wants to run code', {}


def fault_decoder_of_a_real_robot(folder):
    weights = renamed(decoder_weights(), 'latent_action_pool', 'attn_pool')
    weights['proprio_proj.0.weight'] = torch.zeros(512, 7)
    write(folder, weights)
    return CheckpointError, 'attn_pool, proj, proprio_proj, visual_pool.*real robots', {}


def fault_missing_key(folder):
    weights = decoder_weights()
    del weights['visual_pool.attn.kv.weight']
    write(folder, weights)
    return CheckpointError, r'1 missing: visual_pool\.attn\.kv\.weight \(1024, 512\)', {}


def fault_wrapped(folder):
    write(folder, renamed(decoder_weights(), 'proj.0', 'proj.net.0'))
    return CheckpointError, r'lacks the matrix proj\.0\.weight', {}


def fault_other_width(folder):
    weights = decoder_weights()
    width = tiny()
    weights['visual_pool.projection.weight'] = torch.zeros(512, width + 16)
    write(folder, weights)
    told = rf'visual_pool\.projection\.weight.*\(512, {width + 16}\).*\(512, {width}\)'
    return CheckpointError, told, {}


def fault_rows_that_are_no_actions(folder):
    weights = decoder_weights()
    weights['proj.0.weight'] = weights['proj.0.weight'][:80]
    write(folder, weights)
    return CheckpointError, r'proj\.0\.weight has 80 rows', {}


def fault_nan(folder):
    weights = decoder_weights()
    weights['proj.0.bias'] = torch.full((84,), float('nan'))
    write(folder, weights)
    return CheckpointError, r'proj\.0\.bias holds NaN', {}


def fault_other_chunk_length(folder):
    return ConfigError, r'robot\.horizon = 8: .*UniVLA.* 12', {'horizon': 8}


def fault_two_cameras(folder):
    return ConfigError, r'robot\.camera_names.*UniVLA takes 1', {'cameras': 2}


def fault_other_head(folder):
    return ConfigError, r"model\.head = 'l1'", {'head': 'l1'}


def fault_taken_for_openvla(folder):
    told = r"model\.name = 'openvla'.*action_decoder\.pt belongs to UniVLA \(univla\)"
    return ConfigError, told, {'name': 'openvla', 'horizon': 1}


def fault_taken_for_openvla_oft(folder):
    return ConfigError, r"model\.name = 'openvla_oft'.*UniVLA", {'name': 'openvla_oft'}


def fault_action_elements(folder):
    config = make_config(folder)
    robot = dataclasses.replace(config.robot, action_names=('x', 'y'))
    return ConfigError, r'robot\.action_names.*7', {'robot': robot}


FAULTS = [value for name, value in list(globals().items()) if name.startswith('fault_')]


@pytest.mark.golden
@pytest.mark.parametrize('fault', FAULTS, ids=lambda fault: fault.__name__.removeprefix('fault_'))
def test_faults_are_named_when_the_model_is_loaded(own, fault):
    kind, told, options = fault(own)
    robot = options.pop('robot', None)
    config = make_config(own, **options)
    config = dataclasses.replace(config, robot=robot) if robot else config
    with pytest.raises(kind, match=f'(?s){told}'):
        load(config, CPU, StoredPrompt(inputs()['input_ids']))
    assert not (own / 'owned').exists(), 'code from the folder was run'


@pytest.mark.golden
@pytest.mark.parametrize('file', [FILM, PROPRIO, HEAD])
def test_files_of_openvla_oft_are_refused(make_folder, file):
    folder = make_folder(file)
    with pytest.raises(ConfigError, match=r"(?s)model\.name = 'univla'.*OpenVLA-OFT"):
        load_tiny(folder)


# specprune info --------------------------------------------------------------------------------


@pytest.mark.golden
def test_info(own, capsys):
    (own / 'tokenizer.json').write_text(json.dumps(llama_json()), encoding='utf-8')
    assert main(['info', str(own)]) == 0
    out = capsys.readouterr().out
    for told in ('UniVLA (', 'latent', '7 action elements', 'exactly 1', '12 steps', 'univla '):
        assert told in out
    assert out.count('ros2 launch') == 1


@pytest.mark.golden
def test_info_of_a_decoder_that_is_not_supported(own, capsys):
    fault_decoder_of_a_real_robot(own)
    assert main(['info', str(own)]) == 1
    out = capsys.readouterr().out
    assert out.count('proprio_proj') == 1, 'a problem is told once'
    assert 'UniVLA' in out


@pytest.mark.golden
def test_info_without_a_head_file_names_both_models(tmp_path, capsys):
    main(['info', str(assemble(tmp_path / 'plain'))])
    out = capsys.readouterr().out
    assert 'plain OpenVLA (launch it with model:=openvla) or of OpenVLA-OFT' in out
    launched = [line for line in out.splitlines() if line.startswith('launch:')]
    assert ['model:=openvla ' in line for line in launched] == [True, False]
    assert ['model:=openvla_oft ' in line for line in launched] == [False, True]


# By name ---------------------------------------------------------------------------------------

ROBOT = """
/**:
  ros__parameters:
    robot:
      camera_names: [agentview]
      horizon: 12
"""


@pytest.mark.golden
def test_by_name_with_a_robot_file_of_ones_own(own, tmp_path):
    """All fits, so that the first thing amiss is the tokenizer, which no test folder has."""
    robot = tmp_path / 'robot.yaml'
    robot.write_text(ROBOT)
    overrides = {'model.checkpoint': str(own), 'model.device': 'cpu'}
    config = load_config([robot, 'models/univla'], overrides)
    with pytest.raises(CheckpointError, match=r'tokenizer\.json'):
        models.load(config)
