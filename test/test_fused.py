"""The forms of a decoder, and a query's two halves: the same numbers as the plain ones."""

from __future__ import annotations

import dataclasses
import sys

import numpy as np
import pytest
import torch
from conftest import make_observation, make_policy
from openvla_world import (
    DIFFUSION_HEAD,
    FILM,
    HEAD,
    NOISY,
    PROPRIO,
    assemble,
    inputs,
    load_golden,
    outputs,
)
from test_decoder import LAYOUT, SIZES, KeepAt, context, make_model
from test_graph import Stream

from specprune_ros.config import ModelConfig, PolicyConfig
from specprune_ros.errors import ConfigError, MissingDependencyError
from specprune_ros.form_error import form_error
from specprune_ros.models.decoder import Decoded, Decoder, KVCache, QueryDecoder, decode
from specprune_ros.models.forms import FORMS, prepared
from specprune_ros.models.staging import OpenVLAStager, WholeStager, make_stager, vision_features
from specprune_ros.policy import Policy
from specprune_ros.pruning.base import PruneRun

CPU = torch.device('cpu')
KINDS = [('llama', 4), ('llama', 2), ('qwen2', 2)]
KEEP = {2: [0, 3, 7, 16, 30, 31], 4: [3, 16]}


def embeds_of(seed: int = 1, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(LAYOUT.length, SIZES['hidden_size'], generator=generator).to(dtype)


def pruned(decoder: Decoder, embeds: torch.Tensor, cache: KVCache | None = None) -> Decoded:
    return decode(decoder, embeds, LAYOUT, KeepAt(KEEP), cache)


def worst(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got.double() - expected.double()).abs().max())


@pytest.mark.parametrize('causal', [False, True])
@pytest.mark.parametrize(('kind', 'kv_heads'), KINDS)
@pytest.mark.parametrize('form', [{}, {'attention': 'eager', 'fused': False}])
def test_forms_give_the_plain_decoder_s_numbers(kind, kv_heads, causal, form):
    plain = Decoder.of(make_model(kind, kv_heads), causal=causal)
    other = prepared(plain, ModelConfig(**form))
    expected, got = pruned(plain, embeds_of()), pruned(other, embeds_of())
    assert torch.equal(got.pos_idx, expected.pos_idx)
    assert worst(got.hidden, expected.hidden) <= 1e-5


@pytest.mark.parametrize('form', [{}, {'attention': 'eager', 'fused': False}])
def test_a_token_more_sees_the_cached_ones(form):
    plain = Decoder.of(make_model('llama', 2), causal=True)
    results = []
    for decoder in (plain, prepared(plain, ModelConfig(**form))):
        cache = KVCache()
        one = QueryDecoder(decoder, LAYOUT, KeepAt(KEEP))
        one(embeds_of(), cache)
        results.append(one.extend(embeds_of(2)[:1], torch.tensor([LAYOUT.length]), cache))
    assert worst(*results) <= 1e-5


def test_fusing_leaves_the_loaded_model_as_it_is_and_holds_no_byte_twice():
    model = make_model('qwen2', 2)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    own = model(inputs_embeds=embeds_of()[None])[0]
    fused = prepared(Decoder.of(model, causal=True), ModelConfig())
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert torch.equal(model(inputs_embeds=embeds_of()[None])[0], own)
    block, attention = fused.blocks[0], model.layers[0].self_attn
    memory = block.qkv.weight.untyped_storage()
    assert attention.k_proj.weight.untyped_storage().data_ptr() == memory.data_ptr()
    assert memory.nbytes() == 4 * block.qkv.weight.numel()
    assert block.o_proj.weight.data_ptr() == attention.o_proj.weight.data_ptr()
    again = prepared(Decoder.of(model, causal=True), ModelConfig())
    assert again.blocks[0].gate_up.weight.data_ptr() == block.gate_up.weight.data_ptr()
    assert again.blocks[0].qkv.bias.data_ptr() == block.qkv.bias.data_ptr()


@pytest.mark.parametrize('seed', range(3))
def test_in_bfloat16_the_fused_form_is_no_further_from_the_exact_one(seed):
    model = make_model('llama', 4)
    exact = pruned(Decoder.of(model.double(), causal=False), embeds_of(seed).double()).hidden
    plain = Decoder.of(model.bfloat16(), causal=False)
    rounded = embeds_of(seed, torch.bfloat16)
    error = worst(pruned(plain, rounded).hidden, exact)
    assert worst(pruned(prepared(plain, ModelConfig()), rounded).hidden, exact) <= 1.5 * error


def test_later_passes_keep_what_the_first_kept_and_ask_nobody():
    decoder = Decoder.of(make_model('llama'), causal=False)
    run = KeepAt(KEEP)
    one = QueryDecoder(decoder, LAYOUT, run)
    one(embeds_of(1))
    run.keep = {}
    got = one(embeds_of(2))
    assert torch.equal(got.hidden, pruned(decoder, embeds_of(2)).hidden)
    assert set(run.attention) == {1, 2, 3, 4, 5}


# Quantisation, compilation ---------------------------------------------------------------------


def test_quantisation_needs_fused_projections_a_fitting_device_and_torchao(monkeypatch):
    with pytest.raises(ConfigError, match=r'model\.quantization'):
        ModelConfig(quantization='int8', fused=False)
    decoder = Decoder.of(make_model('llama'), causal=False)
    with pytest.raises(ConfigError, match='float8'):
        prepared(decoder, ModelConfig(quantization='fp8'))
    monkeypatch.setitem(sys.modules, 'torchao', None)
    monkeypatch.setitem(sys.modules, 'torchao.quantization', None)
    with pytest.raises(MissingDependencyError, match='pip install torchao'):
        prepared(decoder, ModelConfig(quantization='int8'))


def test_int8_changes_actions_a_little_and_the_loaded_weights_not_at_all():
    pytest.importorskip('torchao')
    policy = make_policy(runtime__warm_up_queries=0)
    layer = policy.model.decoder.layers[0]
    before = layer.mlp.down_proj.weight.clone()
    quantised = in_form(policy, 'int8')
    exact, got = (one.infer(make_observation()).chunk.normalized for one in (policy, quantised))
    assert 1e-4 < np.abs(got - exact).max() < 0.2
    assert torch.equal(layer.mlp.down_proj.weight, before)


@pytest.mark.slow
def test_compiled_layers_give_the_same_actions():
    policy = make_policy(runtime__warm_up_queries=0)
    compiled = in_form(policy, 'compile')
    exact, got = (one.infer(make_observation()).chunk.normalized for one in (policy, compiled))
    np.testing.assert_allclose(got, exact, atol=1e-4)


def in_form(policy: Policy, form: str) -> Policy:
    """The same model in another form."""
    model = dataclasses.replace(policy.config.model, **FORMS[form])
    return Policy(policy.model, dataclasses.replace(policy.config, model=model))


def test_forms_that_a_cpu_has_prune_alike():
    policy = make_policy(runtime__warm_up_queries=0, pruning__budget='fixed')
    expected = two_reports(policy)
    for form in ('eager', 'sdpa', 'fused'):
        got = two_reports(in_form(policy, form))
        for name in ('layer_tokens', 'pruned_after_layer', 'reason'):
            np.testing.assert_array_equal(getattr(got, name), getattr(expected, name), form)


def test_form_error_can_have_something_executed_between_its_queries():
    policy = make_policy(runtime__warm_up_queries=0)
    told = []
    form_error(
        in_form(policy, 'sdpa'), policy, [make_observation(0), make_observation(8)],
        after=lambda which, observation, query: told.append((which is policy, query)),
    )  # fmt: skip
    assert told == [(False, 0), (True, 0), (False, 1), (True, 1)]


def test_form_error_is_nought_for_the_same_form_and_tells_another_one():
    policy = make_policy(runtime__warm_up_queries=0)
    rounded = make_policy(runtime__warm_up_queries=0, model__dtype='bfloat16')
    asked = [make_observation(8 * query) for query in range(2)]
    same, other = (form_error(one, policy, asked) for one in (in_form(policy, 'fused'), rounded))
    assert (same.mean, same.largest, same.queries) == (0.0, 0.0, 2)
    assert 0 < other.mean < other.largest
    with pytest.raises(ValueError, match='no observation'):
        form_error(policy, policy, [])


def two_reports(policy: Policy):
    policy.infer(make_observation(0))
    return policy.infer(make_observation(8)).report


# A query's two halves ---------------------------------------------------------------------------


def assert_staged(model, pixels, proprio, instruction: str) -> None:
    stager = make_stager(model, CPU)
    assert isinstance(stager, OpenVLAStager)
    told = []
    with torch.inference_mode():
        words, state = stager.words(instruction), stager.state(proprio)
        got = stager.embed(pixels, words, state, told.append)
        expected = model.embed(pixels, proprio, instruction)
        whole = WholeStager(model)
        again = whole.embed(pixels, whole.words(instruction), whole.state(proprio), told.append)
    assert torch.equal(got.embeds, expected.embeds)
    assert torch.equal(again.embeds, expected.embeds)
    assert got.layout == expected.layout == words.layout == again.layout
    assert told == ['vision', 'projector', 'embed', 'embed']


@pytest.mark.parametrize('joints', [(), ('a', 'b')])
def test_two_halves_make_the_prompt_that_one_call_makes(joints):
    policy = make_policy(runtime__warm_up_queries=0, robot__joint_names=joints)
    proprio = np.array([0.3, -2.0]) if joints else None
    pixels = policy.model.preprocess(list(make_observation().images.values()))
    assert_staged(policy.model, pixels, proprio, 'pick up the soup')


@pytest.mark.golden
@pytest.mark.parametrize(
    'files', [(HEAD, PROPRIO), (HEAD, PROPRIO, FILM), (DIFFUSION_HEAD, NOISY, PROPRIO), (HEAD,)]
)
def test_two_halves_make_the_prompt_of_published_models(tmp_path, files):
    model = load_golden(assemble(tmp_path / 'model', *files), inputs()['input_ids'])
    proprio = inputs()['proprio_raw'] if PROPRIO in files else None
    pixels = model.preprocess(list(inputs()['images_uint8'][:2]))
    assert_staged(model, pixels, proprio, '')


def test_stand_in_computes_in_the_configured_number_format():
    exact = make_policy(runtime__warm_up_queries=0)
    rounded = make_policy(runtime__warm_up_queries=0, model__dtype='bfloat16')
    decoder = rounded.model.decoder
    assert decoder.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16
    assert decoder.inverse_frequencies.dtype == torch.float32
    assert rounded.model.parts.vision_backbone.dino_mean.dtype == torch.float32
    got, expected = (one.infer(make_observation()).chunk.normalized for one in (rounded, exact))
    assert 1e-4 < np.abs(got - expected).max() < 0.2


@torch.inference_mode()
def test_towers_on_two_streams_meet_before_their_features_do(monkeypatch):
    model = make_policy(runtime__warm_up_queries=0).model
    backbone = model.parts.vision_backbone
    pixels = model.preprocess(list(make_observation().images.values()))
    log: list[str] = []
    current, side = Stream('current', log), Stream('side', log)
    monkeypatch.setattr(torch.cuda, 'current_stream', lambda: current)
    monkeypatch.setattr(torch.cuda, 'stream', lambda stream: stream)
    got = vision_features(backbone, pixels, None, side)
    assert log == ['side waits for current', 'on side', 'off side', 'current waits for side']
    assert torch.equal(got, backbone(pixels))


def test_towers_meet_though_one_of_them_fails(monkeypatch):
    log: list[str] = []
    current, side = Stream('current', log), Stream('side', log)
    monkeypatch.setattr(torch.cuda, 'current_stream', lambda: current)
    monkeypatch.setattr(torch.cuda, 'stream', lambda stream: stream)
    backbone = make_policy(runtime__warm_up_queries=0).model.parts.vision_backbone
    with pytest.raises(RuntimeError):
        vision_features(backbone, torch.zeros(1, 28, 28, 3, dtype=torch.uint8), None, side)
    assert log[-1] == 'current waits for side'


# Published models -----------------------------------------------------------------------------


@pytest.mark.golden
@pytest.mark.parametrize(
    ('files', 'part', 'form'),
    [
        ((HEAD, PROPRIO), '', 'fused'),
        ((HEAD, PROPRIO), '', 'eager'),
        ((HEAD, PROPRIO, FILM), 'film', 'fused'),
        ((DIFFUSION_HEAD, NOISY, PROPRIO), 'diffusion', 'fused'),
    ],
)
def test_published_actions_in_every_form(tmp_path, files, part, form):
    expected = outputs(part)
    steps = {'diffusion_steps': len(expected['timesteps'])} if part == 'diffusion' else {}
    folder = assemble(tmp_path / 'model', *files)
    model = load_golden(folder, inputs()['input_ids'], **steps)
    if part == 'diffusion':
        model.parts.action_head.noise = torch.tensor(expected['noise'][0])
    decoder = prepared(model.decoder, dataclasses.replace(PolicyConfig().model, **FORMS[form]))
    with torch.inference_mode():
        pixels = model.preprocess(list(inputs()['images_uint8'][:2]))
        prompt = model.embed(pixels, inputs()['proprio_raw'], '')
        decode_query = QueryDecoder(decoder, prompt.layout, PruneRun(context()))
        got = model.unnormalize(model.act(prompt, decode_query).numpy())
    assert np.abs(got - expected['actions']).max() <= 1e-4
