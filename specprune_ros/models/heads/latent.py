"""UniVLA's head: four latent-action tokens, and a decoder that turns them into a chunk.

Source: UniVLA (arXiv 2505.06111) and its public code, OpenDriveLab/UniVLA at 0ab9e9d:
vla-scripts/finetune_libero.py, prismatic/models/policy/transformer_utils.py and
experiments/robot/libero/run_libero_eval_blocking.py. Parameter names and shapes are those that
this code writes. No published file could be read: whether those hold the same shows only when
one is loaded, where every name and shape is compared.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from specprune_ros.models.base import ActionHead, Prompt
from specprune_ros.models.decoder import KVCache, QueryDecoder

LATENT_TOKENS = 4  # that describe one chunk
ACTION_DIM = 7
WIDTH, HEAD_DIM, MLP_RATIO = 512, 64, 4  # of both pools
MIN_RMS = 1e-8


class RMSNorm(nn.Module):
    """x / max(RMS(x), 1e-8) * g."""

    def __init__(self, width: int):
        super().__init__()
        self.g = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] -> the same."""
        rms = x.norm(dim=-1, keepdim=True) * x.shape[-1] ** -0.5
        return x / rms.clamp(min=MIN_RMS) * self.g


class SwiGLU(nn.Module):
    """p * SiLU(g), where p and g are the halves of one linear map, in this order."""

    def __init__(self, width: int, hidden_width: int):
        super().__init__()
        self.project = nn.Linear(width, 2 * hidden_width)

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] -> [..., hidden_width]."""
        value, gate = self.project(x).chunk(2, dim=-1)
        return value * F.silu(gate)


class SeedAttention(nn.Module):
    """Multi-head attention of one learned row to tokens."""

    def __init__(self, width: int):
        super().__init__()
        self.q = nn.Linear(width, width, bias=False)
        self.kv = nn.Linear(width, 2 * width, bias=False)
        self.proj = nn.Linear(width, width)

    def forward(self, seed: Tensor, tokens: Tensor, visible: Tensor | None) -> Tensor:
        """[1, width] and [N, width] -> [1, width]; `visible` as for AttentionPool."""
        key, value = self.kv(tokens).chunk(2, dim=-1)
        query, key, value = (
            x.unflatten(-1, (-1, HEAD_DIM)).transpose(0, 1)[None]
            for x in (self.q(seed), key, value)
        )
        mask = None if visible is None else visible[None]
        pooled = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return self.proj(pooled[0].transpose(0, 1).flatten(1))


class AttentionPool(nn.Module):
    """Any number of tokens to one row; each step is added first and normalised then.

    Args:
        features: C, width of a token.
    """

    def __init__(self, features: int):
        super().__init__()
        self.latents = nn.Parameter(torch.zeros(1, WIDTH))
        self.projection = nn.Linear(features, WIDTH)
        self.attn_norm, self.mlp_norm = RMSNorm(WIDTH), RMSNorm(WIDTH)
        self.attn = SeedAttention(WIDTH)
        hidden_width = MLP_RATIO * WIDTH
        self.mlp = nn.Sequential(SwiGLU(WIDTH, hidden_width), nn.Linear(hidden_width, WIDTH))

    def forward(
        self, tokens: Tensor, start: Tensor | None = None, visible: Tensor | None = None
    ) -> Tensor:
        """Pool.

        Args:
            tokens: [N, C].
            start: [1, WIDTH] added to the learned row, or None.
            visible: [N] bool, the tokens to pool, at least one; None pools all.

        Returns:
            [1, WIDTH].
        """
        seed = self.latents if start is None else self.latents + start
        seed = self.attn_norm(seed + self.attn(seed, self.projection(tokens), visible))
        return self.mlp_norm(seed + self.mlp(seed))


class ActionDecoder(nn.Module):
    """`action_decoder.pt` of LIBERO, CALVIN and Bridge: what was seen starts what pools the plan.

    Args:
        features: C, width of a hidden state.
        horizon: L.
    """

    def __init__(self, features: int, horizon: int):
        super().__init__()
        self.latent_action_pool = AttentionPool(features)
        self.visual_pool = AttentionPool(features)
        self.proj = nn.Sequential(nn.Linear(WIDTH, horizon * ACTION_DIM), nn.Tanh())

    def forward(self, latent: Tensor, hidden: Tensor, visible: Tensor) -> Tensor:
        """Normalised actions.

        Args:
            latent: [LATENT_TOKENS, C] hidden states that stand for the action.
            hidden: [K, C] hidden states of the whole prompt.
            visible: [K] bool, which of `hidden` are visual rows.

        Returns:
            [L, 7] in -1..1.
        """
        seen = self.visual_pool(hidden, visible=visible)
        plan = self.latent_action_pool(latent, start=seen)
        return self.proj(plan)[0].unflatten(0, (-1, ACTION_DIM))


class LatentActionHead(ActionHead):
    """Four latent-action tokens, decoded with a KV cache; their hidden states make the chunk.

    These are the states from which the four tokens are predicted, at the prompt's last token and
    at the first three, as the public scripts take them; training took those at the four tokens
    themselves. Visual rows are BOS and all patches but the last: the public code counts 256 rows
    from BOS on, in training too.

    Args:
        lm_head: [vocabulary, C] language-model head.
        embed_tokens: token embeddings.
        action_decoder: float32.

    differs: the likeliest token each time, so that a chunk is a function of the observation; the
        public scripts draw at temperature 0.75 from the likeliest 0.9, and never the stop token.
    differs: no history. The main public script puts the last latent tokens into the prompt and
        queries at every step; this is the form of its blocking script, a chunk at a time. CALVIN's
        decoders load, but their prompts, which always have a history, are not made.
    differs: with pruned patches the visual pool attends to those that are left; the public code
        prunes nothing.
    """

    def __init__(
        self, lm_head: nn.Linear, embed_tokens: nn.Embedding, action_decoder: ActionDecoder
    ):
        super().__init__()
        self.lm_head = lm_head
        self.embed_tokens = embed_tokens
        self.action_decoder = action_decoder

    def act(self, prompt: Prompt, decode: QueryDecoder) -> Tensor:
        """[L, 7] float32 normalised actions; the prompt is decoded once, pruned."""
        layout, device, cache = prompt.layout, prompt.embeds.device, KVCache()
        decoded = decode(prompt.embeds, cache)
        latent = [decoded.at(layout.head.idx(device))]
        for index in range(LATENT_TOKENS - 1):
            token = self.lm_head(latent[-1]).argmax(dim=-1)
            position = torch.full((1,), layout.length + index, device=device)
            latent.append(decode.extend(self.embed_tokens(token), position, cache))
        # A mask has one shape whichever patches are left; picking rows would make the host wait.
        last_patch = layout.camera_starts[-1] + layout.patches - 1
        visible = decoded.pos_idx < last_patch
        return self.action_decoder(torch.cat(latent).float(), decoded.hidden.float(), visible)
