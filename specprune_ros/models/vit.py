"""Vision transformer with the parameter names of OpenVLA's two towers (DINOv2 and SigLIP).

Source: openvla-oft 213c5ff, modeling_prismatic.py, and timm 0.9.10, which it calls. Our own small
module instead of timm (which needs torchvision) or transformers' (whose names and fused layers
differ from the checkpoints').
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NORM_EPS = 1e-6


@dataclass(frozen=True, kw_only=True)
class TowerConfig:
    """Size of one tower.

    Attributes:
        registers: register tokens beside the class token; None for neither (SigLIP).
        layer_scale: whether blocks scale their residuals (DINOv2).
        film_width: width of the language vector that modulates every block (FiLM, section 9);
            None without FiLM.
    """

    width: int
    depth: int
    heads: int
    mlp_width: int
    registers: int | None
    layer_scale: bool
    film_width: int | None = None
    patch_size: int = 14
    image_size: int = 224

    @property
    def patches(self) -> int:
        """Patches of one image."""
        return (self.image_size // self.patch_size) ** 2


class LayerScale(nn.Module):
    """Residual scale; the checkpoints call it `scale_factor`."""

    def __init__(self, width: int):
        super().__init__()
        self.scale_factor = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] -> the same."""
        return x * self.scale_factor


class Attention(nn.Module):
    """Self-attention with one fused query-key-value projection."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, width] -> the same."""
        query, key, value = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value)
        return self.proj(mixed.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """fc1, exact GELU, fc2."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] -> the same."""
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm transformer block, optionally modulated by language between its two halves."""

    def __init__(self, config: TowerConfig):
        super().__init__()
        scale = LayerScale if config.layer_scale else lambda width: nn.Identity()
        self.norm1 = nn.LayerNorm(config.width, eps=NORM_EPS)
        self.attn = Attention(config.width, config.heads)
        self.ls1 = scale(config.width)
        self.norm2 = nn.LayerNorm(config.width, eps=NORM_EPS)
        self.mlp = Mlp(config.width, config.mlp_width)
        self.ls2 = scale(config.width)
        self.film = config.film_width is not None
        if self.film:
            self.scale = nn.Linear(config.film_width, config.width)
            self.shift = nn.Linear(config.film_width, config.width)

    def forward(self, x: Tensor, language: Tensor | None = None) -> Tensor:
        """[B, T, width], with FiLM also [film_width] -> [B, T, width]."""
        x = x + self.ls1(self.attn(self.norm1(x)))
        if self.film:
            x = x * (1 + self.scale(language)) + self.shift(language)
        return x + self.ls2(self.mlp(self.norm2(x)))


class PatchEmbed(nn.Module):
    """Convolution that turns an image into patch tokens."""

    def __init__(self, config: TowerConfig):
        super().__init__()
        self.proj = nn.Conv2d(3, config.width, config.patch_size, config.patch_size)

    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, Y, X] -> [B, N, width], row-major."""
        return self.proj(images).flatten(2).transpose(1, 2)


class VisionTower(nn.Module):
    """A tower read at its second-to-last block, without the final norm.

    Source: openvla-oft 213c5ff, modeling_prismatic.py; so a checkpoint's last block is never run.
    """

    def __init__(self, config: TowerConfig):
        super().__init__()
        self.config = config
        self.patch_embed = PatchEmbed(config)
        self.pos_embed = nn.Parameter(torch.zeros(1, config.patches, config.width))
        if config.registers is not None:
            self.cls_token = nn.Parameter(torch.zeros(1, 1, config.width))
            self.reg_token = nn.Parameter(torch.zeros(1, config.registers, config.width))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))

    def forward(self, images: Tensor, language: Tensor | None = None) -> Tensor:
        """[B, 3, Y, X] normalised, with FiLM also [film_width] -> [B, N, width]."""
        x = self.patch_embed(images) + self.pos_embed
        prefix = 0
        if self.config.registers is not None:
            tokens = torch.cat((self.cls_token, self.reg_token), dim=1)
            prefix = tokens.shape[1]
            x = torch.cat((tokens.expand(len(x), -1, -1), x), dim=1)
        for block in self.blocks[:-1]:
            x = block(x, language)
        return x[:, prefix:]
