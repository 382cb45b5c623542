"""The served model's own modules, and their forward over a batch.

Serving decodes one sequence, and drops visual tokens on the way (models/decoder.py). Training
needs many at once; tokens that `visual_idx` leaves out are missing from the first layer on. A test
compares the two.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from specprune_ros.models.blocks import Rotary
from specprune_ros.models.decoder import Decoder
from specprune_ros.models.heads.l1 import L1RegressionHead
from specprune_ros.models.llama import make_llama
from specprune_ros.models.openvla_folder import LLAMA_7B, MLP_RATIOS
from specprune_ros.models.openvla_oft import Projector, ProprioProjector, VisionBackbone
from specprune_ros.models.vit import TowerConfig
from specprune_ros.pruning.budget import STATIC_LAYER
from specprune_ros.train.config import NetworkConfig

ACTION_DIM = 7
REGISTERS = 4
WORDS_LAYERS = STATIC_LAYER  # in which it matters what the words look at: V_local goes by it


@dataclass(frozen=True, eq=False)
class Outputs:
    """Of B sequences that show I scenes of V cameras with N patches each.

    Attributes:
        actions: [B, L, 7] normalised.
        stop: [B, C] final hidden state of the stop token, which no action is read from.
        visual: [B, K, C] final hidden states of the patches that were shown.
        patches: [I, V*N, C] what the projector makes of them.
        looks: [B, WORDS_LAYERS, K] attention of the prompt's tokens to the patches that were
            shown, mean over tokens and heads.
    """

    actions: Tensor
    stop: Tensor
    visual: Tensor
    patches: Tensor
    looks: Tensor

    def float(self) -> Outputs:
        """The same in float32, for losses."""
        return Outputs(*(getattr(self, f.name).float() for f in dataclasses.fields(self)))


class Network(nn.Module):
    """What becomes the checkpoint folder.

    Args:
        sizes: of all parts.
        proprio_dim: P.
        horizon: L.
    """

    def __init__(self, sizes: NetworkConfig, *, proprio_dim: int, horizon: int):
        super().__init__()
        dino, siglip = towers(sizes)
        self.horizon = horizon
        self.vision_backbone = VisionBackbone(dino, siglip)
        self.projector = Projector(dino.width + siglip.width, sizes.width)
        self.language_model = nn.Module()
        self.language_model.model = make_llama(llama_sizes(sizes))
        self.action_head = L1RegressionHead(sizes.width, ACTION_DIM, hidden_width=sizes.width)
        self.proprio_projector = ProprioProjector(proprio_dim, sizes.width)
        self._initialise()

    def _initialise(self) -> None:
        """Residual branches begin small, and positions and words differ from the first step on."""
        llama = self.language_model.model
        nn.init.normal_(llama.embed_tokens.weight, std=0.5)
        for layer in llama.layers:
            for linear in (m for m in layer.modules() if isinstance(m, nn.Linear)):
                nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
            for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
                linear.weight.data *= (2 * len(llama.layers)) ** -0.5
        for tower in (self.vision_backbone.featurizer, self.vision_backbone.fused_featurizer):
            nn.init.normal_(tower.pos_embed, std=0.3)
            for block in tower.blocks:
                for linear in (block.attn.proj, block.mlp.fc2):
                    linear.weight.data *= (2 * len(tower.blocks)) ** -0.5
        for name in ('cls_token', 'reg_token'):
            nn.init.normal_(getattr(self.vision_backbone.featurizer, name), std=0.3)

    def patches(self, images: Tensor) -> Tensor:
        """[I, V, Y, X, 3] of 0..255 -> [I, V*N, C] projected patches."""
        features = self.vision_backbone(images.flatten(0, 1))
        return self.projector(features).unflatten(0, images.shape[:2]).flatten(1, 2)

    def forward(
        self,
        images: Tensor,
        scene: Tensor,
        proprio: Tensor,
        ids: Sequence[tuple[int, ...]],
        visual_idx: Tensor | None = None,
    ) -> Outputs:
        """Many sequences.

        Args:
            images: [I, V, Y, X, 3] of 0..255.
            scene: [B] which scene each sequence shows.
            proprio: [B, P] normalised.
            ids: of every sequence, the prompt's ids and the stop token's.
            visual_idx: [B, K] ascending, which patches each sequence has; None for all.
        """
        patches = self.patches(images)
        state = self.proprio_projector(proprio)
        length = torch.tensor([len(one) for one in ids])
        parts, order = [], []
        for tokens in length.unique().tolist():  # no padding: attention takes its fast path
            alike = (length == tokens).nonzero().flatten().tolist()
            batch = torch.tensor(alike, device=scene.device)
            text = torch.tensor([ids[index] for index in alike], device=scene.device)
            left = None if visual_idx is None else visual_idx[batch]
            parts.append(self._decode(patches[scene[batch]], state[batch], text, left))
            order.append(batch)
        back = torch.cat(order).argsort()
        actions, stop, visual, looks = (torch.cat(part)[back] for part in zip(*parts, strict=True))
        return Outputs(actions, stop, visual, patches, looks)

    def _decode(
        self, patches: Tensor, state: Tensor, ids: Tensor, visual_idx: Tensor | None
    ) -> tuple[Tensor, ...]:
        """Sequences of one length; the order of tokens is OpenVLAOFT.embed's."""
        llama = self.language_model.model
        text = llama.embed_tokens(ids)
        count = self.horizon * ACTION_DIM
        zeros = text.new_zeros(len(text), count, text.shape[-1])
        parts = (text[:, :1], patches, state[:, None], text[:, 1:-1], zeros, text[:, -1:])
        hidden = torch.cat(parts, dim=1)
        pos_idx = torch.arange(hidden.shape[1], device=hidden.device)
        decoder = Decoder.of(llama, causal=False)
        rotary = decoder.rotary(pos_idx, hidden.dtype)
        left = patches.shape[1]
        if visual_idx is not None:
            left = visual_idx.shape[1]
            pos_idx = pos_idx.expand(len(hidden), -1)
            behind = pos_idx[:, 1 + patches.shape[1] :]
            pos_idx = torch.cat((pos_idx[:, :1], 1 + visual_idx, behind), dim=1)
            hidden = hidden.gather(1, pos_idx[..., None].expand(-1, -1, hidden.shape[-1]))
            rotary = Rotary(rotary.cos[pos_idx][:, None], rotary.sin[pos_idx][:, None])
        prompt = slice(2 + left, -1 - count)  # behind patches and proprioception
        hidden, looks = decode_batch(decoder, hidden, rotary, prompt)
        head = hidden[:, -2 - count : -2]  # from the last prompt token on
        actions = self.action_head(head).unflatten(0, (len(text), self.horizon))
        return actions, hidden[:, -1], hidden[:, 1 : 1 + left], looks[..., 1 : 1 + left]


def decode_batch(
    decoder: Decoder, hidden: Tensor, rotary: Rotary, prompt: slice
) -> tuple[Tensor, Tensor]:
    """Every token sees every token.

    Args:
        decoder: of the language model.
        hidden: [B, K, C] embeddings.
        rotary: of their places in the whole sequence: a token keeps its own when others go.
        prompt: which tokens are the prompt's.

    Returns:
        [B, K, C] final hidden states; [B, WORDS_LAYERS, K] attention of the prompt's tokens to all
        tokens, mean over tokens and heads.
    """
    looks = []
    for number, layer in enumerate(decoder.layers, 1):
        query, key, value = _heads(layer, hidden, rotary, decoder.head_dim)
        if number <= WORDS_LAYERS:
            scores = query[:, :, prompt] * decoder.head_dim**-0.5 @ key.transpose(-1, -2)
            looks.append(scores.float().softmax(dim=-1).mean(dim=(1, 2)))
        hidden = _layer(layer, hidden, _attend(query, key, value))
    return _rms_norm(hidden, decoder.norm), torch.stack(looks, dim=1)


def _heads(
    layer: nn.Module, hidden: Tensor, rotary: Rotary, head_dim: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values, [B, H, K, D] each."""
    attention = layer.self_attn
    # One product of three: a narrow layer's time goes into calls.
    weight = torch.cat([p.weight for p in (attention.q_proj, attention.k_proj, attention.v_proj)])
    heads = F.linear(_rms_norm(hidden, layer.input_layernorm), weight)
    query, key, value = heads.unflatten(-1, (-1, head_dim)).transpose(1, 2).chunk(3, dim=1)
    return rotary(query), rotary(key), value


def _layer(layer: nn.Module, hidden: Tensor, mixed: Tensor) -> Tensor:
    """A layer's output, of what its attention mixed."""
    mlp = layer.mlp
    hidden = hidden + layer.self_attn.o_proj(mixed.transpose(1, 2).flatten(2))
    weight = torch.cat((mlp.gate_proj.weight, mlp.up_proj.weight))
    normed = _rms_norm(hidden, layer.post_attention_layernorm)
    gate, up = F.linear(normed, weight).chunk(2, dim=-1)
    return hidden + mlp.down_proj(F.silu(gate) * up)


def _attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """[B, H, K, D] of each -> the same.

    In bfloat16 on a CPU the fused attention is slow, and torch's own form of products, which
    `precision.reduced` leaves to the towers, takes a third longer than these.
    """
    if torch.is_autocast_enabled('cpu') and query.device.type == 'cpu':
        with torch.autocast('cpu', enabled=False):  # it would make float32 of the scores
            scaled = (query * query.shape[-1] ** -0.5).to(value.dtype)
            return (scaled @ key.to(value.dtype).transpose(-1, -2)).softmax(dim=-1) @ value
    return F.scaled_dot_product_attention(query, key, value)


def _rms_norm(hidden: Tensor, norm: nn.Module) -> Tensor:
    return F.rms_norm(hidden, norm.weight.shape, norm.weight, norm.variance_epsilon)


def towers(sizes: NetworkConfig) -> tuple[TowerConfig, TowerConfig]:
    """DINOv2's and SigLIP's shape in these sizes."""
    common = {'heads': sizes.tower_heads, 'image_size': sizes.image_size}
    dino, siglip = (
        {**common, 'width': width, 'mlp_width': int(width * ratio)}
        for width, ratio in zip((sizes.dino_width, sizes.siglip_width), MLP_RATIOS, strict=True)
    )
    return (
        TowerConfig(**dino, depth=sizes.dino_depth, registers=REGISTERS, layer_scale=True),
        TowerConfig(**siglip, depth=sizes.siglip_depth, registers=None, layer_scale=False),
    )


def llama_sizes(sizes: NetworkConfig) -> dict:
    """Arguments of transformers.LlamaConfig."""
    return {
        **LLAMA_7B,
        'vocab_size': sizes.vocabulary,
        'hidden_size': sizes.width,
        'intermediate_size': sizes.mlp_width,
        'num_hidden_layers': sizes.layers,
        'num_attention_heads': sizes.heads,
        'num_key_value_heads': sizes.heads,
    }


class AuxiliaryHeads(nn.Module):
    """Questions about the scene that training asks beside the actions; export drops them.

    Args:
        width: C.
        objects: O, what a patch may show.
    """

    def __init__(self, width: int, objects: int):
        super().__init__()
        self.kind = nn.Linear(width, objects + 1)
        self.offset = nn.Linear(width, 2)
        self.flag = nn.Linear(width, 1)
        self.target = nn.Linear(width, 3)
        nn.init.constant_(self.flag.bias, -math.log(100.0))  # about one patch in a hundred
