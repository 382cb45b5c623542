"""Our own loop over a loaded language model's decoder layers, so that tokens can go on the way.

The layers (Llama and Qwen2 shape, grouped-query attention included) are called as loaded, or with
their projections fused (blocks.py): nothing is patched, copied or vendored. With nothing pruned,
the result equals the loaded model's own forward. Pruned rows keep the position ids of the full
sequence: with renumbered positions success falls by half (VLA-ACL, Table IV).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from specprune_ros.errors import PruningError
from specprune_ros.models.blocks import Block, Rotary
from specprune_ros.pruning.base import PruneRun
from specprune_ros.token_layout import TokenLayout

Lap = Callable[[str], None]
# Rotated query [H, Q, D], key and value [H, K, D], and whether to mask -> [H, Q, D].
Attend = Callable[[Tensor, Tensor, Tensor, bool], Tensor]
SCORE_CHUNK = 128  # query rows whose attention to all keys is formed at a time


def attend_fused(query: Tensor, key: Tensor, value: Tensor, causal: bool) -> Tensor:
    """Attention by one kernel that never forms the probabilities; see Attend."""
    return F.scaled_dot_product_attention(query[None], key[None], value[None], is_causal=causal)[0]


def attend_eager(query: Tensor, key: Tensor, value: Tensor, causal: bool) -> Tensor:
    """The same with all probabilities formed: what published speedups are often relative to."""
    logits = query @ key.mT * query.shape[-1] ** -0.5
    if causal:
        row = torch.arange(logits.shape[-1], device=logits.device)
        logits = logits.masked_fill(row > row[:, None], -torch.inf)
    return logits.softmax(dim=-1, dtype=torch.float32).to(value.dtype) @ value


@dataclass(frozen=True, eq=False)
class Decoder:
    """Decoder layers and what the loop needs to know of them.

    Attributes:
        layers: modules with input_layernorm, self_attn.{q,k,v,o}_proj, post_attention_layernorm
            and mlp.
        norm: final norm.
        inverse_frequencies: [D/2] of the rotary embedding.
        rotary_scale: factor on cos and sin (1 without RoPE scaling).
        head_dim: D.
        causal: False when every token sees every token (OpenVLA-OFT).
        blocks: the layers as the loop calls them.
        attend: the form of attention.
    """

    layers: Sequence[nn.Module]
    norm: nn.Module
    inverse_frequencies: Tensor
    rotary_scale: float
    head_dim: int
    causal: bool
    blocks: Sequence[Block]
    attend: Attend = attend_fused

    @property
    def width(self) -> int:
        """C, width of the hidden states."""
        return self.layers[0].self_attn.q_proj.in_features

    @property
    def mlp_width(self) -> int:
        """Inner width of the layers' MLP."""
        return self.layers[0].mlp.gate_proj.out_features

    @classmethod
    def of(cls, model: nn.Module, *, causal: bool) -> Decoder:
        """Read the parts of a transformers LlamaModel or Qwen2Model.

        Args:
            model: the model without its language-model head.
            causal: whether a token sees only earlier ones.
        """
        config = model.config
        head_dim = getattr(config, 'head_dim', None)
        head_dim = head_dim or config.hidden_size // config.num_attention_heads
        return cls(
            layers=model.layers,
            norm=model.norm,
            inverse_frequencies=model.rotary_emb.inv_freq,
            rotary_scale=float(getattr(model.rotary_emb, 'attention_scaling', 1.0)),
            head_dim=head_dim,
            causal=causal,
            blocks=[Block(layer, head_dim) for layer in model.layers],
        )

    def rotary(self, pos_idx: Tensor, dtype: torch.dtype) -> Rotary:
        """Of positions [K]; formed in float32, then cast."""
        angles = pos_idx[:, None].float() * self.inverse_frequencies.float()
        cos, sin = angles.cos() * self.rotary_scale, angles.sin() * self.rotary_scale
        return Rotary(torch.cat((cos, cos), -1).to(dtype), torch.cat((-sin, sin), -1).to(dtype))


@dataclass(frozen=True, eq=False)
class Decoded:
    """Final hidden states [K, C] of the surviving rows, and their positions [K]."""

    hidden: Tensor
    pos_idx: Tensor

    def at(self, positions: Tensor) -> Tensor:
        """[M, C] hidden states of surviving positions [M]."""
        return self.hidden[TokenLayout.row_idx(self.pos_idx, positions)]


@dataclass(eq=False)
class KVCache:
    """Rotated keys and values, [H, K_l, D] each, of the rows that every layer l saw."""

    layers: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def extend(self, index: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Append rows to a layer's; layers come in order the first time.

        Returns:
            All of the layer's keys and values.
        """
        if index == len(self.layers):
            self.layers.append((key, value))
        else:
            past_key, past_value = self.layers[index]
            self.layers[index] = torch.cat((past_key, key), 1), torch.cat((past_value, value), 1)
        return self.layers[index]


class SurvivingRows:
    """Which tokens the rows of the hidden states are; made anew only when some go.

    Attributes:
        pos_idx: [K] position of every row, ascending.
        visual_idx: [M] the visual tokens among them, ascending.
        visual, instruction, prompt: rows of the visual tokens, the instruction, and all text.
    """

    def __init__(self, layout: TokenLayout, device: torch.device):
        self._visual_pos = layout.visual_pos_idx(device)
        self._protected_pos = layout.protected_pos_idx(device)
        self._text_pos = [span.idx(device) for span in (layout.instruction, layout.prompt)]
        self.pos_idx = torch.arange(layout.length, device=device)
        self._locate(torch.arange(layout.visual_count, device=device))

    def keep(self, visual_idx: Tensor) -> Tensor:
        """Keep these visual tokens and all that is protected.

        Returns:
            [K'] the rows to gather, in terms of the rows before.
        """
        kept = torch.cat((self._protected_pos, self._visual_pos[visual_idx])).sort().values
        rows = TokenLayout.row_idx(self.pos_idx, kept)
        self.pos_idx = kept
        self._locate(visual_idx)
        return rows

    def _locate(self, visual_idx: Tensor) -> None:
        self.visual_idx = visual_idx
        self.visual = TokenLayout.row_idx(self.pos_idx, self._visual_pos[visual_idx])
        self.instruction, self.prompt = (
            TokenLayout.row_idx(self.pos_idx, positions) for positions in self._text_pos
        )


class Probe:
    """pruning.base.LayerProbe over one layer's rotated queries and keys, [H, K, D] each."""

    def __init__(
        self,
        layer: int,
        hidden: Tensor,
        query: Tensor,
        key: Tensor,
        causal: bool,
        rows: SurvivingRows,
    ):
        self.layer = layer
        self.hidden = hidden
        self.visual_idx = rows.visual_idx
        self._query, self._key = query, key
        self._causal = causal
        self._rows = rows

    def text_attention(self, prompt: bool = False) -> Tensor:
        """[H, T, M] attention of the text's rows to the image; [H, T, K] exists on the way."""
        return self.attention(self._text_rows(prompt), self._rows.visual)

    def image_attention(self, prompt: bool = False) -> Tensor:
        """[H, T, M] attention of the image's rows to the text, never an [L, L] map.

        Only the text's columns are formed; what normalises them is the log-sum-exp of the rows,
        which the fused attention kernels return. In a causal model the image comes first: 0.
        """
        text, image = self._text_rows(prompt), self._rows.visual
        if self._causal:
            shape = (self._query.shape[0], len(text), len(image))
            return torch.zeros(shape, device=self._query.device)
        query = self._query[:, image]
        total = log_sum_exp(query, self._key)
        if total is None:
            chunks = [self.attention(rows, text) for rows in image.split(SCORE_CHUNK)]
            return torch.cat(chunks, dim=1).mT
        logits = query.float() @ self._key[:, text].float().mT * query.shape[-1] ** -0.5
        return (logits - total[..., None]).exp().mT

    def _text_rows(self, prompt: bool) -> Tensor:
        return self._rows.prompt if prompt else self._rows.instruction

    def attention(self, query_rows: Tensor, key_rows: Tensor) -> Tensor:
        """[H, Q, M] float32 probabilities; each row is normalised over all K keys.

        Args:
            query_rows: [Q] rows of the hidden states that the layer saw.
            key_rows: [M], likewise.
        """
        query = self._query[:, query_rows].float()
        logits = query @ self._key.float().mT * query.shape[-1] ** -0.5
        if self._causal:
            later = torch.arange(logits.shape[-1], device=logits.device) > query_rows[:, None]
            logits = logits.masked_fill(later, -torch.inf)
        return logits.softmax(dim=-1)[..., key_rows]


def log_sum_exp(query: Tensor, key: Tensor) -> Tensor | None:
    """Log of every query's softmax normaliser, from the fused attention kernel.

    Args:
        query: [H, Q, D].
        key: [H, K, D].

    Returns:
        [H, Q] float32 with the usual scale D^-0.5; None on a device without such a kernel.
    """
    if query.device.type == 'cpu':
        fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        return fused(query[None], key[None], key[None])[1][0].float()
    if query.device.type == 'cuda':  # pads the rows to a multiple of its tile
        fused = torch.ops.aten._scaled_dot_product_efficient_attention
        return fused(query[None], key[None], key[None], None, True)[1][0, :, : query.shape[1]]
    return None


@dataclass(frozen=True, eq=False)
class Kept:
    """What goes on after a layer: rows [K'] of those before, and their rotary embedding."""

    row_idx: Tensor
    rotary: Rotary


class Passage:
    """A pass's course: which rows go on after which layer. One that keeps what a former pass kept.

    Attributes:
        rotary: of all rows of the unpruned sequence.
        kept: 1-based layer -> what goes on after it.
        pos_idx: [K] positions of the rows that came through.
    """

    def __init__(self, rotary: Rotary, kept: dict[int, Kept], pos_idx: Tensor):
        self.rotary = rotary
        self.kept = kept
        self.pos_idx = pos_idx

    def after_layer(self, layer: int, hidden: Tensor, query: Tensor, key: Tensor) -> Kept | None:
        """What goes on after a layer; None for everything."""
        return self.kept.get(layer)


class FirstPassage(Passage):
    """A pass's course as a method decides on it.

    Args:
        decoder: the layers.
        embeds: [S, C] input embeddings.
        layout: of the unpruned sequence.
        run: decides after every layer.
        lap: see `decode`.
        check: whether to read keep sets back and check them; a GPU's host would wait for that.
    """

    def __init__(
        self,
        decoder: Decoder,
        embeds: Tensor,
        layout: TokenLayout,
        run: PruneRun,
        lap: Lap,
        check: bool,
    ):
        self._rows = SurvivingRows(layout, embeds.device)
        super().__init__(decoder.rotary(self._rows.pos_idx, embeds.dtype), {}, self._rows.pos_idx)
        self._causal = decoder.causal
        self._run = run
        self._lap = lap
        self._check = check
        self._current = self.rotary

    def after_layer(self, layer: int, hidden: Tensor, query: Tensor, key: Tensor) -> Kept | None:
        """Ask the run.

        Raises:
            PruningError: a keep set is empty, too long, out of order, or no subset of what was
                alive.
        """
        probe = Probe(layer, hidden, query, key, self._causal, self._rows)
        keep = _ask(self._run, probe, self._check)
        self._lap('score' if keep is None else 'select')
        if keep is None:
            return None
        row_idx = self._rows.keep(keep)
        self._current = self._current.rows(row_idx)
        self.kept[layer] = Kept(row_idx, self._current)
        self.pos_idx = self._rows.pos_idx
        return self.kept[layer]


def decode(
    decoder: Decoder,
    embeds: Tensor,
    layout: TokenLayout,
    run: PruneRun,
    cache: KVCache | None = None,
    lap: Lap = lambda stage: None,
) -> Decoded:
    """Run the decoder, dropping the tokens that `run` does not keep.

    Args:
        decoder: the layers.
        embeds: [S, C] input embeddings.
        layout: of the unpruned sequence.
        run: decides after every layer.
        cache: an empty one to fill, for a model that goes on token by token.
        lap: told at the end of every part of the work (timing.PRUNING, and 'decode').

    Returns:
        Hidden states after the final norm.

    Raises:
        PruningError: a keep set is empty, too long, out of order, or no subset of what was alive.
    """
    passage = FirstPassage(decoder, embeds, layout, run, lap, check=on_host(embeds))
    return _pass(decoder, embeds, passage, cache, lap)


def on_host(tensor: Tensor) -> bool:
    """Whether reading a tensor's values back costs nothing."""
    return tensor.device.type == 'cpu'


def _pass(
    decoder: Decoder, embeds: Tensor, passage: Passage, cache: KVCache | None, lap: Lap
) -> Decoded:
    hidden, rotary = embeds, passage.rotary
    for index in range(len(decoder.layers)):
        hidden, query, key = _layer_forward(decoder, index, hidden, rotary, cache)
        lap('decode')
        kept = passage.after_layer(index + 1, hidden, query, key)
        if kept is not None:
            hidden, rotary = hidden[kept.row_idx], kept.rotary
            lap('gather')
    decoded = Decoded(decoder.norm(hidden), passage.pos_idx)
    lap('decode')
    return decoded


class QueryDecoder:
    """The decoder for one query: the first pass prunes, later ones keep the same tokens.

    A diffusion head passes once per denoising step, a causal model goes on token by token.

    What denoising steps share is computed once: the embeddings of images and text, the choice of
    tokens, where survivors stand and their rotary embedding. Hidden states cannot be shared: in a
    bidirectional decoder those of every token change with the noisy actions from the first
    layer's output on, and with them all later keys and values. A cache of them would be an
    approximation. Exact would be only the first layer's queries, keys and values of tokens that
    are no actions: less than a 32nd of a pass's projections, which is not worth a path of its own.

    Args:
        decoder: the layers.
        layout: of the unpruned sequence.
        run: the method's, asked in the first pass only.
        keep_floor: share of all visual tokens that must stay at the least.
        lap: told 'act' before every pass, then as `decode` says; for the clock.
        check: whether keep sets are read back and checked; None: where that costs nothing.
    """

    def __init__(
        self,
        decoder: Decoder,
        layout: TokenLayout,
        run: PruneRun,
        *,
        keep_floor: float = 0.0,
        lap: Lap = lambda stage: None,
        check: bool | None = None,
    ):
        self._decoder = decoder
        self._layout = layout
        self._run: PruneRun = _Floor(run, math.ceil(keep_floor * layout.visual_count))
        self._lap = lap
        self._check = check
        self._course: Passage | None = None

    def __call__(self, embeds: Tensor, cache: KVCache | None = None) -> Decoded:
        """One pass over [S, C]; see `decode`."""
        self._lap('act')
        passage = self._course or self._first(embeds)
        decoded = _pass(self._decoder, embeds, passage, cache, self._lap)
        self._course = Passage(passage.rotary, passage.kept, passage.pos_idx)
        return decoded

    def _first(self, embeds: Tensor) -> Passage:
        check = on_host(embeds) if self._check is None else self._check
        return FirstPassage(self._decoder, embeds, self._layout, self._run, self._lap, check)

    def extend(self, embeds: Tensor, pos_idx: Tensor, cache: KVCache) -> Tensor:
        """Decode one token more.

        Args:
            embeds: [1, C].
            pos_idx: [1] its position in the unpruned sequence.
            cache: filled by a pass; grows by the token.

        Returns:
            [1, C] hidden state after the final norm.
        """
        self._lap('act')
        decoder, hidden = self._decoder, embeds
        rotary = decoder.rotary(pos_idx, embeds.dtype)
        for index in range(len(decoder.layers)):
            hidden, _, _ = _layer_forward(decoder, index, hidden, rotary, cache)
        self._lap('decode')
        return decoder.norm(hidden)


class _Floor(PruneRun):
    """Passes on what a run keeps, and refuses too little."""

    def __init__(self, run: PruneRun, least: int):
        super().__init__(run.context)
        self._run = run
        self._least = least

    def after_layer(self, probe: Probe) -> Tensor | None:
        keep = self._run.after_layer(probe)
        if keep is not None and len(keep) < self._least:
            raise PruningError(
                f'layer {probe.layer}: keeps {len(keep)} visual tokens, less than '
                f'{self._least} (pruning.keep_floor)'
            )
        return keep


def _ask(run: PruneRun, probe: Probe, check: bool) -> Tensor | None:
    keep = run.after_layer(probe)
    if keep is None:
        return None
    alive = probe.visual_idx
    if not 0 < len(keep) <= len(alive):
        raise PruningError(f'layer {probe.layer}: keeps {len(keep)} of {len(alive)} visual tokens')
    if check:
        if (keep[1:] <= keep[:-1]).any():
            raise PruningError(f'layer {probe.layer}: keeps tokens out of order or twice')
        if not torch.isin(keep, alive, assume_unique=True).all():
            raise PruningError(f'layer {probe.layer}: keeps tokens that are gone')
    return keep


def _layer_forward(
    decoder: Decoder, index: int, hidden: Tensor, rotary: Rotary, cache: KVCache | None
) -> tuple[Tensor, Tensor, Tensor]:
    """One pre-norm decoder layer on [K, C]; also its rotated query and key, [H, K, D] each."""
    block = decoder.blocks[index]
    query, key, value = block.heads(hidden, rotary)
    if cache is not None:
        key, value = cache.extend(index, key, value)
    groups = query.shape[0] // key.shape[0]
    if groups > 1:  # grouped-query attention
        key, value = key.repeat_interleave(groups, 0), value.repeat_interleave(groups, 0)
    # A token that continues a cached sequence sees all of it; only a pass from its start masks.
    from_start = query.shape[1] == key.shape[1]
    mixed = decoder.attend(query, key, value, decoder.causal and from_start)
    hidden = hidden + block.output(mixed.transpose(0, 1).flatten(1))
    hidden = hidden + block.mlp(hidden)
    return hidden, query, key
