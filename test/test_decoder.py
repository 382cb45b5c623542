"""Our decoder loop against transformers' own forward, and what pruning may do to it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaModel, Qwen2Config, Qwen2Model

from specprune_ros.config import PruneConfig
from specprune_ros.errors import PruningError
from specprune_ros.models.decoder import Decoder, decode
from specprune_ros.pruning.base import PruneRun, QueryContext
from specprune_ros.pruning.specprune import Memory, SpecPrune
from specprune_ros.token_layout import Span, TokenLayout

LAYERS, PATCHES = 5, 16
SIZES = {
    'hidden_size': 48,
    'intermediate_size': 96,
    'num_hidden_layers': LAYERS,
    'num_attention_heads': 4,
    'vocab_size': 64,
    'max_position_embeddings': 256,
}
LAYOUT = TokenLayout(
    cameras=('a', 'b'),
    grid=(4, 4),
    camera_starts=(1, 17),
    length=50,
    prompt=Span(33, 42),
    instruction=Span(35, 40),
    head=Span(41, 49),
)


def make_model(kind: str, kv_heads: int = 4) -> torch.nn.Module:
    torch.manual_seed(0)
    sizes = {**SIZES, 'num_key_value_heads': kv_heads}
    if kind == 'llama':
        model = LlamaModel(LlamaConfig(**sizes))
    else:
        model = Qwen2Model(Qwen2Config(**sizes))
    for parameter in model.parameters():  # the default initialisation is nearly linear
        torch.nn.init.normal_(parameter, std=0.2 if parameter.dim() > 1 else 0.5)
    return model.eval().requires_grad_(False)


def context() -> QueryContext:
    return QueryContext(
        layout=LAYOUT, depth=LAYERS, device=torch.device('cpu'), fine=False, alpha=0.8,
        similarity=None, memory=None, query=0,
    )  # fmt: skip


class KeepAt(PruneRun):
    """Keeps given visual tokens after given layers, and remembers what it was shown."""

    def __init__(self, keep: dict[int, list[int]]):
        super().__init__(context())
        self.keep = {layer: torch.tensor(idx) for layer, idx in keep.items()}
        self.attention, self.image_attention = {}, {}

    def after_layer(self, probe):
        self.attention[probe.layer] = probe.text_attention()
        self.image_attention[probe.layer] = probe.image_attention()
        return self.keep.get(probe.layer)


def own_forward(model, embeds, causal: bool) -> torch.Tensor:
    """The transformers model's forward; an all-zero additive mask lets every token see all."""
    mask = None if causal else torch.zeros(1, 1, len(embeds), len(embeds))
    return model(inputs_embeds=embeds[None], attention_mask=mask, use_cache=False)[0][0]


@pytest.mark.parametrize('causal', [False, True])
@pytest.mark.parametrize(('kind', 'kv_heads'), [('llama', 4), ('llama', 2), ('qwen2', 2)])
def test_without_pruning_equals_the_models_own_forward(kind, kv_heads, causal):
    model = make_model(kind, kv_heads)
    embeds = torch.randn(LAYOUT.length, 48, generator=torch.Generator().manual_seed(1))
    got = decode(Decoder.of(model, causal=causal), embeds, LAYOUT, PruneRun(context()))
    expected = own_forward(model, embeds, causal)
    assert (got.hidden - expected).abs().max() <= 1e-5
    assert own_forward(model, embeds, not causal).sub(expected).abs().max() > 1e-2


@pytest.mark.parametrize('causal', [False, True])
def test_probe_equals_eager_attention(causal):
    """The side computation gives the very probabilities that full eager attention forms."""
    model = make_model('llama', 2)
    model.config._attn_implementation = 'eager'  # set_attn_implementation() is newer than 4.50
    embeds = torch.randn(LAYOUT.length, 48, generator=torch.Generator().manual_seed(2))
    run = KeepAt({})
    decode(Decoder.of(model, causal=causal), embeds, LAYOUT, run)
    mask = torch.zeros(1, 1, LAYOUT.length, LAYOUT.length)
    if causal:
        mask.fill_(-torch.inf).triu_(1)
    maps = model(inputs_embeds=embeds[None], attention_mask=mask, output_attentions=True)
    image = LAYOUT.visual_pos_idx()
    for layer, full in enumerate(maps.attentions, start=1):
        text = full[0][:, LAYOUT.instruction.idx()]
        assert (run.attention[layer] - text[..., image]).abs().max() <= 1e-6
        back = full[0][:, image][..., LAYOUT.instruction.idx()].mT
        assert (run.image_attention[layer] - back).abs().max() <= 1e-6
        assert not causal or run.image_attention[layer].abs().max() == 0


@pytest.mark.parametrize('causal', [False, True])
def test_pruned_rows_keep_their_original_positions(causal):
    """Pruning before the first layer's successor equals masking the pruned keys from then on."""
    model = make_model('llama')
    decoder = Decoder.of(model, causal=causal)
    embeds = torch.randn(LAYOUT.length, 48, generator=torch.Generator().manual_seed(3))
    keep = [0, 3, 7, 16, 30, 31]
    got = decode(decoder, embeds, LAYOUT, KeepAt({2: keep}))
    alive = torch.ones(LAYOUT.length, dtype=torch.bool)
    alive[LAYOUT.visual_pos_idx()] = False
    alive[LAYOUT.visual_pos_idx()[keep]] = True
    assert got.pos_idx.tolist() == alive.nonzero().flatten().tolist()
    expected = masked_reference(model, embeds, alive, after=2, causal=causal)
    assert (got.hidden - expected[alive]).abs().max() <= 1e-5
    head = LAYOUT.head.idx()
    assert torch.equal(got.at(head), got.hidden[torch.searchsorted(got.pos_idx, head)])


def masked_reference(model, embeds, alive, after: int, causal: bool) -> torch.Tensor:
    """The transformers layers one by one; from layer `after` on, pruned keys are masked."""
    count = len(embeds)
    mask = torch.zeros(count, count)
    if causal:
        mask = torch.full((count, count), -torch.inf).triu(1)
    cut = mask.masked_fill(~alive, -torch.inf)
    cut[~alive] = 0.0  # rows of pruned tokens may see anything, nobody reads them
    rotary = model.rotary_emb(embeds[None], torch.arange(count)[None])
    hidden = embeds[None]
    for index, layer in enumerate(model.layers):
        chosen = (mask if index < after else cut)[None, None]
        out = layer(hidden, attention_mask=chosen, position_embeddings=rotary)
        hidden = out[0] if isinstance(out, tuple) else out
    return model.norm(hidden)[0]


@settings(max_examples=25, deadline=None)
@given(st.lists(st.sets(st.integers(0, 31), min_size=1), min_size=1, max_size=4))
def test_rows_stay_sorted_protected_and_within_what_was_kept(wishes):
    decoder = Decoder.of(make_model('llama'), causal=False)
    alive, keep = set(range(32)), {}
    for layer, wish in enumerate(wishes, start=1):
        alive = (alive & wish) or alive
        keep[layer] = sorted(alive)
    got = decode(decoder, torch.randn(LAYOUT.length, 48), LAYOUT, KeepAt(keep))
    positions = got.pos_idx.tolist()
    assert positions == sorted(set(positions))
    kept = set(LAYOUT.visual_pos_idx()[sorted(alive)].tolist())
    assert set(positions) == kept | set(LAYOUT.protected_pos_idx().tolist())


@pytest.mark.parametrize('keep', [[], list(range(33)), [3, 2], [1, 1], [40]])
def test_impossible_keep_sets_are_pruning_errors(keep):
    decoder = Decoder.of(make_model('llama'), causal=False)
    with pytest.raises(PruningError, match='layer 2: keeps'):
        decode(decoder, torch.randn(LAYOUT.length, 48), LAYOUT, KeepAt({2: keep}))


def test_layout_rejects_parts_that_overlap():
    with pytest.raises(ValueError, match='overlap'):
        TokenLayout(('a',), (4, 4), (1,), 30, Span(10, 20), Span(11, 12), Span(19, 29))
    with pytest.raises(ValueError, match='not inside'):
        TokenLayout(('a',), (4, 4), (1,), 40, Span(17, 20), Span(16, 18), Span(19, 29))
    with pytest.raises(ValueError, match='prunable'):
        TokenLayout(('a',), (4, 4), (1,), 40, Span(17, 20), Span(18, 19), Span(5, 9))


@pytest.mark.parametrize('first', [True, False])
def test_fixed_budget_needs_nothing_from_the_device(first):
    """On the meta device whatever reads data back (.item(), nonzero, a boolean mask) raises."""
    model = make_model('llama').to('meta')
    shape = (2, PATCHES)
    memory = Memory(torch.zeros(shape, device='meta'), torch.zeros(LAYERS, device='meta'))
    run = SpecPrune(PruneConfig(budget='fixed')).begin(
        QueryContext(
            layout=LAYOUT,
            depth=LAYERS,
            device=torch.device('meta'),
            fine=False,
            alpha=1.0,
            similarity=torch.zeros(shape, device='meta'),
            memory=None if first else memory,
            query=0,
        )
    )
    decoder = Decoder.of(model, causal=False)
    got = decode(decoder, torch.zeros(LAYOUT.length, 48, device='meta'), LAYOUT, run)
    assert got.at(LAYOUT.head.idx('meta')).shape == (8, 48)
    assert run.memory().global_rank.shape == shape
    assert (len(got.pos_idx) < LAYOUT.length) != first
