"""Actions as discrete tokens: OpenVLA-OFT's parallel form and OpenVLA's token by token.

Source: openvla-oft 213c5ff, modeling_prismatic.py and action_tokenizer.py.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from specprune_ros.models.base import ActionHead, Prompt
from specprune_ros.models.decoder import KVCache, QueryDecoder


class ActionTokens(nn.Module):
    """Token ids to action values: the last ids of the text vocabulary are bins of -1..1.

    Args:
        vocabulary: ids of text and actions together, 32000 for Llama-2.
        bins: edges of the evenly spaced bins, 256 in the published checkpoints.
    """

    def __init__(self, vocabulary: int, bins: int):
        super().__init__()
        self.vocabulary = vocabulary
        edges = torch.linspace(-1.0, 1.0, bins, dtype=torch.float64)
        self.register_buffer('centres', (edges[1:] + edges[:-1]) / 2, persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        """[...] token ids -> [...] float64 bin centres; an id that is no action clips."""
        index = (self.vocabulary - ids - 1).clamp(0, len(self.centres) - 1)
        return self.centres[index]


class ParallelTokensHead(ActionHead):
    """One pass, the likeliest token at each placeholder (OpenVLA-OFT without an action head).

    Args:
        lm_head: [vocabulary, C] language-model head.
        tokens: ids to values.
        action_dim: A.
    """

    def __init__(self, lm_head: nn.Linear, tokens: ActionTokens, action_dim: int):
        super().__init__()
        self.lm_head = lm_head
        self.tokens = tokens
        self.action_dim = action_dim

    def forward(self, hidden: Tensor) -> Tensor:
        """[L * A, C] hidden states -> [L, A] normalised actions."""
        ids = self.lm_head(hidden).argmax(dim=-1)
        return self.tokens(ids).unflatten(0, (-1, self.action_dim))


class GreedyTokensHead(ActionHead):
    """Greedy decoding of one action, token by token, with a KV cache (OpenVLA).

    Args:
        lm_head: [vocabulary, C] language-model head.
        embed_tokens: token embeddings.
        tokens: ids to values.
        action_dim: A, tokens to decode.
    """

    def __init__(
        self,
        lm_head: nn.Linear,
        embed_tokens: nn.Embedding,
        tokens: ActionTokens,
        action_dim: int,
    ):
        super().__init__()
        self.lm_head = lm_head
        self.embed_tokens = embed_tokens
        self.tokens = tokens
        self.action_dim = action_dim

    def act(self, prompt: Prompt, decode: QueryDecoder) -> Tensor:
        """[1, A] normalised actions; the prompt is decoded once, pruned."""
        device, cache = prompt.embeds.device, KVCache()
        hidden = decode(prompt.embeds, cache).at(prompt.layout.head.idx(device))
        ids = []
        for index in range(self.action_dim):
            ids.append(self.lm_head(hidden).argmax(dim=-1))
            if index + 1 < self.action_dim:
                position = torch.full((1,), prompt.layout.length + index, device=device)
                hidden = decode.extend(self.embed_tokens(ids[-1]), position, cache)
        return self.tokens(torch.cat(ids))[None]
