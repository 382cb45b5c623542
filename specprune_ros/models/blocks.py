"""One decoder layer as the decoder's loop calls it: by the loaded modules, or fused.

Fused, a layer's projections are two matrix products instead of five, over the loaded weights
themselves: the loaded modules then read the same memory. Nothing of them is replaced.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn


@dataclass(frozen=True, eq=False)
class Rotary:
    """Rotary embedding of K rows.

    Attributes:
        cos: [K, D].
        sin: [K, D], the first half negated.
    """

    cos: Tensor
    sin: Tensor

    def rows(self, row_idx: Tensor) -> Rotary:
        """That of some of the rows."""
        return Rotary(self.cos[row_idx], self.sin[row_idx])

    def __call__(self, x: Tensor) -> Tensor:
        """Rotate [H, K, D]: element i pairs with i + D/2."""
        return torch.addcmul(x * self.cos, x.roll(x.shape[-1] // 2, -1), self.sin)


def split_heads(x: Tensor, head_dim: int) -> Tensor:
    """[K, H * D] -> [H, K, D]."""
    return x.unflatten(-1, (-1, head_dim)).transpose(0, 1)


class Block(nn.Module):
    """A pre-norm decoder layer in the three parts between which the loop works.

    Args:
        layer: a loaded layer of Llama's or Qwen2's shape.
        head_dim: D.
    """

    def __init__(self, layer: nn.Module, head_dim: int):
        super().__init__()
        self.layer = layer
        self.head_dim = head_dim

    def heads(self, hidden: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor, Tensor]:
        """[K, C] -> rotated query [H, K, D], rotated key and value [Hkv, K, D]."""
        attention = self.layer.self_attn
        normed = self.layer.input_layernorm(hidden)
        query, key, value = (
            split_heads(projection(normed), self.head_dim)
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        return rotary(query), rotary(key), value

    def output(self, mixed: Tensor) -> Tensor:
        """[K, H * D] -> [K, C]."""
        return self.layer.self_attn.o_proj(mixed)

    def mlp(self, hidden: Tensor) -> Tensor:
        """[K, C] -> [K, C], without the residual."""
        return self.layer.mlp(self.layer.post_attention_layernorm(hidden))


class FusedBlock(Block):
    """The same with one projection for query, key and value, and one for gate and up.

    Args:
        layer: whose weights it takes; from then on they lie side by side in memory.
        head_dim: D.

    differs: in bfloat16 the norm rounds once, where transformers' rounds twice.
    """

    def __init__(self, layer: nn.Module, head_dim: int):
        nn.Module.__init__(self)
        attention, mlp = layer.self_attn, layer.mlp
        self.head_dim = head_dim
        self.query_heads = attention.q_proj.out_features // head_dim
        self.key_heads = attention.k_proj.out_features // head_dim
        self.norm1 = _rms_norm(layer.input_layernorm)
        self.qkv = side_by_side([attention.q_proj, attention.k_proj, attention.v_proj])
        self.o_proj = side_by_side([attention.o_proj])
        self.norm2 = _rms_norm(layer.post_attention_layernorm)
        self.gate_up = side_by_side([mlp.gate_proj, mlp.up_proj])
        self.down = side_by_side([mlp.down_proj])
        self.activation = mlp.act_fn

    def heads(self, hidden: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor, Tensor]:
        """See Block."""
        heads = split_heads(self.qkv(self.norm1(hidden)), self.head_dim)
        turned = rotary(heads[: -self.key_heads])
        return turned[: self.query_heads], turned[self.query_heads :], heads[-self.key_heads :]

    def output(self, mixed: Tensor) -> Tensor:
        """See Block."""
        return self.o_proj(mixed)

    def mlp(self, hidden: Tensor) -> Tensor:
        """See Block."""
        gate, up = self.gate_up(self.norm2(hidden)).chunk(2, dim=-1)
        return self.down(self.activation(gate).mul_(up))


def side_by_side(linears: Sequence[nn.Linear]) -> nn.Linear:
    """One linear map with the outputs of several, in order.

    Its weight is the memory of theirs: where theirs lie apart, they move, and become views. No
    byte is held twice, and a second call finds what the first one made.

    Args:
        linears: of one input width and type; all with bias, or none.
    """
    rows = sum(linear.out_features for linear in linears)
    bias = linears[0].bias is not None
    joint = nn.Linear(linears[0].in_features, rows, bias=bias, device='meta')
    joint.weight = _frozen(_joined([linear.weight for linear in linears]))
    if bias:
        joint.bias = _frozen(_joined([linear.bias for linear in linears]))
    return joint


def _frozen(data: Tensor) -> nn.Parameter:
    return nn.Parameter(data, requires_grad=False)


def _joined(parts: Sequence[nn.Parameter]) -> Tensor:
    """[sum R, ...] over parts [R, ...], which become views of it unless they are already."""
    first, rows = parts[0].data, sum(len(part) for part in parts)
    if all(_follows(before.data, after.data) for before, after in pairwise(parts)):
        return first.as_strided((rows, *first.shape[1:]), first.stride())
    joined = torch.cat([part.data for part in parts])
    for part, view in zip(parts, joined.split([len(part) for part in parts]), strict=True):
        part.data = view
    return joined


def _follows(before: Tensor, after: Tensor) -> bool:
    """Whether a tensor begins where another one ends, in the same memory."""
    if not (before.is_contiguous() and after.is_contiguous()) or before.is_meta:
        return False
    shared = before.untyped_storage().data_ptr() == after.untyped_storage().data_ptr()
    return shared and before.storage_offset() + before.numel() == after.storage_offset()


def _rms_norm(norm: nn.Module) -> nn.Module:
    """torch's norm, one kernel, over the weight of a loaded RMSNorm; another norm stays itself.

    The weight is not folded into the projection behind: that saved 0.2 % of a layer on a CPU and
    no kernel on a GPU, and rounds a bfloat16 projection anew.
    """
    eps = getattr(norm, 'variance_epsilon', None)
    if eps is None:
        return norm
    fused = nn.RMSNorm(norm.weight.shape, eps=eps, device='meta')
    fused.weight = _frozen(norm.weight.data)
    return fused
