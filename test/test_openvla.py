"""OpenVLA-OFT against its reference implementation, and what every trap of the spec would do."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from conftest import GOLDEN, golden
from openvla_world import (
    ALOHA,
    DIFFUSION_HEAD,
    FILM,
    HEAD,
    NOISY,
    PROPRIO,
    assemble,
    configuration,
    inputs,
    load_golden,
    outputs,
)

from specprune_ros.models.decoder import QueryDecoder
from specprune_ros.models.heads.diffusion import TRAIN_STEPS, alphas_cumprod, timesteps
from specprune_ros.models.openvla_checkpoint import LM_HEAD, UNUSED, Skeleton
from specprune_ros.models.openvla_folder import Folder
from specprune_ros.pruning.base import PruneRun
from specprune_ros.verify import captured, compare, tensor_error, trace

TOLERANCE = 1e-4
CLEARLY = 100 * TOLERANCE  # what a trap's actions must at least be off by
TIME_EMBEDDING = 'time_embedding_t'
PRUNED_AFTER = 2  # layers
pytestmark = pytest.mark.golden


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """LIBERO: L1 head and proprioception."""
    return assemble(tmp_path_factory.mktemp('libero') / 'libero', HEAD, PROPRIO)


@pytest.fixture(scope='module')
def model(folder):
    return load_golden(folder, inputs()['input_ids'])


def images(count: int = 2) -> list[np.ndarray]:
    return list(inputs()['images_uint8'][:count])


def actions_of(model, pictures, proprio=None) -> np.ndarray:
    """Un-normalised actions of one dense query."""
    with torch.inference_mode():
        prompt = model.embed(model.preprocess(pictures), proprio, '')
        decode = QueryDecoder(model.decoder, prompt.layout, PruneRun(None))
        return model.unnormalize(model.act(prompt, decode).numpy())


def worst(got, expected) -> float:
    assert got.shape == expected.shape
    return float(np.abs(got - expected).max())


# Parity ------------------------------------------------------------------------------------


def test_every_stored_tensor_of_the_libero_model(model, folder):
    robot = configuration(folder).robot
    errors = list(compare(model, robot, inputs(), outputs()))
    names = {error.name for error in errors}
    layers = len(model.decoder.layers)
    assert {f'hidden_after_layer_{layer:02d}' for layer in range(layers)} <= names
    assert {
        'vit_dino_view1', 'vit_siglip_view0', 'projected_patches', 'proprio_token',
        'llm_input_embeds', 'final_norm_hidden', 'action_hidden_states', 'normalized_actions',
        'actions', 'libero_env_actions', 'attn_text_rows_headmean', 'attn_colmean_over_queries',
        'attn_row_bos_patch0_proprio_stop', 'attn_action_rows_every14',
    } <= names  # fmt: skip
    assert [error for error in errors if not error.within] == []


def test_pixels_are_the_reference_s_to_the_bit(model):
    backbone = model.parts.vision_backbone
    pixels = model.preprocess(images()).permute(0, 3, 1, 2).float() / 255
    dino = (pixels - backbone.dino_mean) / backbone.dino_std
    siglip = (pixels - backbone.siglip_mean) / backbone.siglip_std
    stacked = torch.cat((dino, siglip), dim=1).flatten(0, 1).numpy()
    assert (stacked == inputs()['pixel_values'][0]).all()


def test_proprioception_is_normalised_as_the_reference_does(model):
    bounds = model.parts.proprio_bounds
    got = bounds.normalize(inputs()['proprio_raw'])
    np.testing.assert_allclose(got, inputs()['proprio'], atol=1e-12)


def test_layout_is_the_stored_one(model):
    prompt = model.embed(model.preprocess(images()), inputs()['proprio_raw'], '')
    layout = prompt.layout
    proprio = layout.camera_starts[-1] + layout.patches
    got = [0, *layout.camera_starts, proprio, layout.prompt.start]
    got += [layout.actions.start, layout.actions.stop, layout.length]
    assert got == outputs()['position_layout'].tolist()
    assert layout.head.start == layout.actions.start - 1


@pytest.mark.parametrize(
    ('name', 'cameras', 'proprio'),
    [('noproprio', 2, False), ('oneimage', 1, True), ('threeimage_hflip', 3, True)],
)
def test_other_inputs(tmp_path, name, cameras, proprio):
    folder = assemble(tmp_path / 'other', HEAD, *([PROPRIO] if proprio else []))
    model = load_golden(folder, inputs()['input_ids'], cameras=cameras)
    pictures = images()[:cameras]
    raw = inputs()['proprio_raw'] if proprio else None
    if cameras == 3:  # the third view is the first one's processed picture, mirrored
        with torch.inference_mode():
            pixels = model.preprocess(images())
            pixels = torch.cat((pixels, pixels[:1].flip(2)))
            prompt = model.embed(pixels, raw, '')
            decode = QueryDecoder(model.decoder, prompt.layout, PruneRun(None))
            got = model.unnormalize(model.act(prompt, decode).numpy())
    else:
        got = actions_of(model, pictures, raw)
    assert worst(got, outputs()[f'{name}_actions']) <= TOLERANCE


def test_discrete_tokens(tmp_path):
    """The stored ids come from the model with proprioception and no action head."""
    folder = assemble(tmp_path / 'discrete', PROPRIO)
    model = load_golden(folder, inputs()['input_ids'])
    assert Folder.open(folder).head == 'discrete'
    normalized = trace(model, images(), inputs()['proprio_raw'])['normalized_actions']
    expected = outputs()
    head = model.parts.action_head
    centres = head.tokens(torch.tensor(expected['discrete_token_ids']).flatten())
    shape = model.info.horizon, model.info.action_dim
    assert (normalized == centres.reshape(shape).numpy().astype(np.float32)).all()
    got = actions_of(model, images(), inputs()['proprio_raw'])
    assert worst(got, expected['discrete_actions']) <= TOLERANCE


def test_diffusion(tmp_path):
    folder = assemble(tmp_path / 'diffusion', DIFFUSION_HEAD, NOISY, PROPRIO)
    expected = outputs('diffusion')
    steps = len(expected['timesteps'])
    model = load_golden(folder, inputs()['input_ids'], diffusion_steps=steps)
    head = model.parts.action_head
    assert timesteps(steps) == expected['timesteps'].tolist()
    assert worst(alphas_cumprod().numpy(), expected['alphas_cumprod']) <= 1e-6
    embedded = {
        int(name.removeprefix(TIME_EMBEDDING)): array
        for name, array in expected.items()
        if name.startswith(TIME_EMBEDDING)
    }
    assert embedded
    for step, array in embedded.items():
        ours = head.times[head.timesteps.index(step)].numpy()
        assert worst(ours, array.squeeze()) <= 1e-5
    head.noise = torch.tensor(expected['noise'][0])
    noises: list[np.ndarray] = []
    passes: list[int] = []
    predictor, norm = head.noise_predictor, model.decoder.norm
    hooks = [
        predictor.register_forward_hook(lambda m, i, out: noises.append(out.numpy())),
        norm.register_forward_hook(lambda m, i, out: passes.append(len(out))),
    ]
    with captured(norm, 'hidden', arrays := {}):
        got = actions_of(model, images(), inputs()['proprio_raw'])
    for hook in hooks:
        hook.remove()
    assert len(passes) == steps, 'one pass of the language model per denoising step'
    assert worst(np.stack(noises), expected['noise_pred_per_step']) <= TOLERANCE
    span = model.layout(model.parts.tokenizer.prompt('')).head
    hidden = arrays['hidden'][span.start : span.stop]
    assert worst(hidden, expected['action_hidden_states_last_step']) <= TOLERANCE
    assert worst(got, expected['actions']) <= TOLERANCE


def film_folder(target):
    return assemble(target, HEAD, PROPRIO, FILM)


def test_film(tmp_path):
    model = load_golden(film_folder(tmp_path / 'film'), inputs()['input_ids'])
    assert model.parts.film
    arrays = trace(model, images(), inputs()['proprio_raw'])
    expected = outputs('film')
    for name in ('projected_patches', 'action_hidden_states', 'actions'):
        error = tensor_error(name, arrays[name], expected[name])
        assert error.within, error


def aloha_folder(target):
    return assemble(
        target,
        'aloha/action_head.safetensors',
        'aloha/proprio_projector.safetensors',
        'aloha/dataset_statistics.json',
        FILM,
    )


def test_aloha(tmp_path):
    """Three views, FiLM, 25 steps of 14 joints, normalised by min and max."""
    io = golden('openvla_oft/aloha/io.npz')
    folder = aloha_folder(tmp_path / 'aloha')
    model = load_golden(folder, io['input_ids'], cameras=3, robot=ALOHA)
    pictures = [*images(), io['image3_uint8']]
    assert (model.preprocess(pictures)[2].numpy() == io['image3_cropped_uint8']).all()
    bounds = model.parts.proprio_bounds
    np.testing.assert_allclose(bounds.normalize(io['proprio_raw']), io['proprio'], atol=1e-12)
    arrays = trace(model, pictures, io['proprio_raw'])
    for name in ('action_hidden_states', 'normalized_actions', 'actions'):
        error = tensor_error(name, arrays[name], io[name])
        assert error.within, error


def test_bfloat16_stays_near(folder):
    model = load_golden(folder, inputs()['input_ids'], dtype='bfloat16')
    got = actions_of(model, images(), inputs()['proprio_raw'])
    exact, rounded = outputs()['actions'], outputs()['bf16_actions']
    allowed = 3 * worst(rounded, exact)  # rounding in another order gives other errors of the size
    assert worst(got, exact) < allowed
    assert worst(got, rounded) < allowed
    assert worst(got, exact) > TOLERANCE, 'this was not bfloat16'


# The ten traps, each taken on purpose ---------------------------------------------------------


def changed_actions(model) -> float:
    """How far the actions are from the reference's."""
    return worst(actions_of(model, images(), inputs()['proprio_raw']), outputs()['actions'])


@pytest.fixture
def own(folder):
    """A model that a test may spoil."""
    return load_golden(folder, inputs()['input_ids'])


def test_trap_1_the_placeholders_own_hidden_states_are_the_wrong_ones(own):
    layout = own.layout

    def unshifted(tokens):
        right = layout(tokens)
        return type(right)(**{**vars_of(right), 'head': right.actions})

    own.layout = unshifted
    assert changed_actions(own) > CLEARLY


def vars_of(layout) -> dict:
    return {name: getattr(layout, name) for name in layout.__dataclass_fields__}


def test_trap_2_causal_attention_is_wrong(folder):
    model = load_golden(folder, inputs()['input_ids'])
    object.__setattr__(model.decoder, 'causal', True)
    arrays = trace(model, images(), inputs()['proprio_raw'])
    assert worst(arrays['actions'], outputs()['actions']) > 0.1


def test_trap_3_rms_norm_epsilon_is_1e_6(model):
    assert {layer.input_layernorm.variance_epsilon for layer in model.decoder.layers} == {1e-6}
    assert model.decoder.norm.variance_epsilon == 1e-6


def test_trap_4_swapped_towers_statistics_are_wrong(own):
    backbone = own.parts.vision_backbone
    backbone.dino_mean, backbone.siglip_mean = backbone.siglip_mean, backbone.dino_mean
    backbone.dino_std, backbone.siglip_std = backbone.siglip_std, backbone.dino_std
    assert changed_actions(own) > CLEARLY


def test_trap_5_towers_end_before_the_last_block_and_without_norm(own, folder):
    tower = own.parts.vision_backbone.featurizer
    whole = tower.blocks
    tower.blocks = torch.nn.ModuleList([*whole, whole[-1]])  # now the last block runs too
    assert changed_actions(own) > CLEARLY
    keys = Skeleton(Folder.open(folder), lm_head=False).state_dict()
    assert not [key for key in keys if 'featurizer.norm' in key]


def test_final_norm_of_the_towers_is_wrong(own):
    for tower in (
        own.parts.vision_backbone.featurizer,
        own.parts.vision_backbone.fused_featurizer,
    ):
        tower.register_forward_hook(
            lambda module, given, out: torch.nn.functional.layer_norm(out, out.shape[-1:])
        )
    assert changed_actions(own) > CLEARLY


def test_trap_6_layer_scale_belongs_to_dino_alone(model):
    keys = model.parts.vision_backbone.state_dict()
    scales = [key for key in keys if key.endswith('scale_factor')]
    assert scales
    assert all(key.startswith('featurizer.blocks.') for key in scales)
    assert not [key for key in keys if 'gamma' in key]


def test_trap_7_epsilons_and_exact_gelu(model):
    block, head = model.parts.vision_backbone.featurizer.blocks[0], model.parts.action_head
    assert block.norm1.eps == 1e-6
    assert head.layer_norm1.eps == 1e-5
    x = torch.randn(3, block.mlp.fc1.in_features)
    exact = block.mlp.fc2(torch.nn.functional.gelu(block.mlp.fc1(x)))
    rough = block.mlp.fc2(torch.nn.functional.gelu(block.mlp.fc1(x), approximate='tanh'))
    assert torch.equal(block.mlp(x), exact)
    assert not torch.equal(block.mlp(x), rough)


class EverySecondPatch(PruneRun):
    """Drops half of the image after layer PRUNED_AFTER."""

    def after_layer(self, probe):
        return probe.visual_idx[::2] if probe.layer == PRUNED_AFTER else None


def pruned_by_transformers(model, embeds, layout, *, renumber: bool) -> np.ndarray:
    """EverySecondPatch with transformers' own layers, told where each token stands.

    Args:
        model: whose language model and action head compute.
        embeds: [S, C].
        layout: tells how many patches there are and what the head reads.
        renumber: the mistake: survivors close ranks.
    """
    llama = model.parts.language_model
    patches = range(1, 1 + len(layout.cameras) * layout.patches)
    kept = [at for at in range(layout.length) if at not in patches[1::2]]
    hidden, positions = embeds[None], torch.arange(layout.length)
    for index, layer in enumerate(llama.layers):
        if index == PRUNED_AFTER:
            hidden, positions = hidden[:, kept], positions[kept]
            positions = torch.arange(len(kept)) if renumber else positions
        everything = torch.zeros(1, 1, len(positions), len(positions))  # without it: causal
        out = layer(
            hidden,
            attention_mask=everything,
            position_ids=positions[None],
            position_embeddings=llama.rotary_emb(hidden, positions[None]),
        )
        hidden = out[0] if isinstance(out, tuple) else out
    rows = [kept.index(at) for at in range(layout.head.start, layout.head.stop)]
    return model.parts.action_head(llama.norm(hidden)[0, rows]).numpy()


def test_survivors_keep_their_positions(model):
    assert len(model.decoder.layers) > PRUNED_AFTER, 'no layer would see the pruned sequence'
    with torch.inference_mode():
        prompt = model.embed(model.preprocess(images()), inputs()['proprio_raw'], '')
        layout, run = prompt.layout, EverySecondPatch(None)
        got = model.act(prompt, QueryDecoder(model.decoder, layout, run)).numpy()
        right, wrong = (
            pruned_by_transformers(model, prompt.embeds, layout, renumber=renumber)
            for renumber in (False, True)
        )
    assert worst(got, right) <= TOLERANCE
    assert worst(got, wrong) > CLEARLY


# Sizes of the published model ---------------------------------------------------------------


def test_all_keys_and_shapes_of_the_7b_model(tmp_path):
    path = GOLDEN / 'shapes_7b.json'
    if not path.exists():
        pytest.skip(f'reference vectors {path} are not there')
    shapes = {key: tuple(shape) for key, shape in json.loads(path.read_text()).items()}
    folder = assemble(tmp_path / 'seven')
    config = json.loads((folder / 'config.json').read_text())
    config.pop('golden_tiny_vit_overrides', None)
    config['text_config'] = {
        'model_type': 'llama', 'pad_token_id': 32000, 'torch_dtype': 'bfloat16',
        'vocab_size': 32064,
    }  # fmt: skip
    (folder / 'config.json').write_text(json.dumps(config))
    skeleton = Skeleton(Folder.open(folder), lm_head=True)
    built = {key: tuple(value.shape) for key, value in skeleton.state_dict().items()}
    assert all(value.is_meta for value in skeleton.state_dict().values())
    unread = unread_shapes(dino=1024, siglip=1152, mlp=4304)
    assert all(key.startswith(UNUSED) for key in unread)
    assert shapes == built | unread
    assert (len(shapes), len(unread)) == (982, 17)
    assert any(key.startswith(LM_HEAD) for key in built)


def unread_shapes(*, dino: int, siglip: int, mlp: int) -> dict[str, tuple[int, ...]]:
    """What the published towers hold beyond the blocks that are read: norms, SigLIP's pool."""
    pool = {
        'q': (siglip, siglip), 'kv': (2 * siglip, siglip), 'proj': (siglip, siglip),
        'norm': (siglip,), 'mlp.fc1': (mlp, siglip), 'mlp.fc2': (siglip, mlp),
    }  # fmt: skip
    modules = {'featurizer.norm': (dino,), 'fused_featurizer.norm': (siglip,)}
    modules |= {f'fused_featurizer.attn_pool.{name}': shape for name, shape in pool.items()}
    shapes = {'vision_backbone.fused_featurizer.attn_pool.latent': (1, 1, siglip)}
    for name, weight in modules.items():
        shapes[f'vision_backbone.{name}.weight'] = weight
        shapes[f'vision_backbone.{name}.bias'] = weight[:1]
    return shapes


def test_timesteps_visit_the_whole_schedule():
    for steps in range(1, TRAIN_STEPS + 1):
        visited = timesteps(steps)
        assert len(visited) == steps
        assert visited == sorted(set(visited), reverse=True)
        assert visited[-1] == 0
        assert visited[0] < TRAIN_STEPS
