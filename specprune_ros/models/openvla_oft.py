"""The OpenVLA-OFT architecture: two vision towers, projector, bidirectional Llama, action head.

OpenVLA is the same with a causal Llama, without placeholders, decoded token by token.

Source: openvla-oft 213c5ff, modeling_prismatic.py, with its fork of transformers (bc339d9).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from specprune_ros.models.base import ActionHead, ModelInfo, Prompt
from specprune_ros.models.decoder import Decoder, QueryDecoder
from specprune_ros.models.preprocess import Preprocessor
from specprune_ros.models.prompt import PromptTokens, Tokenizer
from specprune_ros.models.vit import TowerConfig, VisionTower
from specprune_ros.token_layout import Span, TokenLayout

DINO_MEAN, DINO_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SIGLIP_MEAN, SIGLIP_STD = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
BOUNDS_EPS = 1e-8  # in the denominator of the normalisation


@dataclass(frozen=True, eq=False)
class Bounds:
    """Lower and upper bound per element, and which elements are normalised at all.

    Attributes:
        low, high: [D] float64, the dataset's q01 and q99, or min and max.
        mask: [D] bool.
        eps: added to the width when un-normalising; OpenVLA-OFT does, OpenVLA does not.
    """

    low: np.ndarray
    high: np.ndarray
    mask: np.ndarray
    eps: float = BOUNDS_EPS

    def normalize(self, raw: np.ndarray) -> np.ndarray:
        """[..., D] raw -> clipped to -1..1."""
        scaled = 2 * (raw - self.low) / (self.high - self.low + BOUNDS_EPS) - 1
        return np.clip(np.where(self.mask, scaled, raw), -1.0, 1.0)

    def unnormalize(self, normalized: np.ndarray) -> np.ndarray:
        """[..., D] normalised -> raw; not clipped."""
        scaled = 0.5 * (normalized + 1) * (self.high - self.low + self.eps) + self.low
        return np.where(self.mask, scaled, normalized)


class VisionBackbone(nn.Module):
    """DINOv2 and SigLIP side by side; `featurizer` is DINOv2 (trap 4 of the spec)."""

    def __init__(self, dino: TowerConfig, siglip: TowerConfig):
        super().__init__()
        self.featurizer = VisionTower(dino)
        self.fused_featurizer = VisionTower(siglip)
        self.make_buffers()

    def make_buffers(self, device: torch.device | None = None) -> None:
        """Set the normalisation constants, which no checkpoint holds."""
        for name, values in (
            ('dino_mean', DINO_MEAN),
            ('dino_std', DINO_STD),
            ('siglip_mean', SIGLIP_MEAN),
            ('siglip_std', SIGLIP_STD),
        ):
            value = torch.tensor(values, device=device)[:, None, None]
            self.register_buffer(name, value, persistent=False)

    def forward(self, images: Tensor, language: Tensor | None = None) -> Tensor:
        """All cameras at once.

        Args:
            images: [V, Y, X, 3] uint8.
            language: [C] language vector for FiLM, or None without.

        Returns:
            [V, N, dino width + siglip width].
        """
        pixels = images.permute(0, 3, 1, 2).float() / 255
        dtype = self.featurizer.pos_embed.dtype
        dino = ((pixels - self.dino_mean) / self.dino_std).to(dtype)
        siglip = ((pixels - self.siglip_mean) / self.siglip_std).to(dtype)
        features = self.featurizer(dino, language), self.fused_featurizer(siglip, language)
        return torch.cat(features, dim=-1)


class Projector(nn.Module):
    """Patch features to token embeddings: fc1, GELU, fc2, GELU, fc3."""

    def __init__(self, features: int, width: int):
        super().__init__()
        self.fc1 = nn.Linear(features, 4 * features)
        self.fc2 = nn.Linear(4 * features, width)
        self.fc3 = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """[..., features] -> [..., width]."""
        return self.fc3(F.gelu(self.fc2(F.gelu(self.fc1(x)))))


class ProprioProjector(nn.Module):
    """Joint state to one token: fc1, GELU, fc2."""

    def __init__(self, proprio_dim: int, width: int):
        super().__init__()
        self.fc1 = nn.Linear(proprio_dim, width)
        self.fc2 = nn.Linear(width, width)

    def forward(self, proprio: Tensor) -> Tensor:
        """[..., P] -> [..., width]."""
        return self.fc2(F.gelu(self.fc1(proprio)))


@dataclass(frozen=True, eq=False, kw_only=True)
class OpenVLAParts:
    """Everything that makes one model; modules are loaded, in eval mode, on one device.

    Attributes:
        info: sizes and names.
        preprocessor: camera images to model images.
        vision_backbone, projector, language_model, action_head: modules; the language model
            without its head.
        proprio_projector: None for a model without proprioception.
        tokenizer: of the prompt.
        action_bounds, proprio_bounds: normalisation.
        causal: True for OpenVLA, whose tokens see only earlier ones.
        placeholders: whether the sequence ends in action placeholders and a stop token.
        time_token: whether a diffusion time token follows proprioception.
        film: whether language modulates the vision towers.
    """

    info: ModelInfo
    preprocessor: Preprocessor
    vision_backbone: VisionBackbone
    projector: Projector
    language_model: nn.Module
    action_head: ActionHead
    proprio_projector: ProprioProjector | None
    tokenizer: Tokenizer
    action_bounds: Bounds
    proprio_bounds: Bounds | None
    causal: bool = False
    placeholders: bool = True
    time_token: bool = False
    film: bool = False


class OpenVLAOFT:
    """A VLAModel of the OpenVLA-OFT architecture."""

    def __init__(self, parts: OpenVLAParts):
        self.info = parts.info
        self.decoder = Decoder.of(parts.language_model, causal=parts.causal)
        self.preprocess = parts.preprocessor
        self.parts = parts
        self._embed_tokens = parts.language_model.embed_tokens

    def embed(self, images: Tensor, proprio: np.ndarray | None, instruction: str) -> Prompt:
        """BOS, patches of every camera, proprio, time, prompt, zeroed placeholders, stop."""
        parts, device = self.parts, self._embed_tokens.weight.device
        tokens = parts.tokenizer.prompt(instruction)
        ids = [*tokens.ids, *([parts.tokenizer.stop_id] if parts.placeholders else [])]
        text = self._embed_tokens(torch.tensor(ids, device=device))
        language = text.mean(dim=0) if parts.film else None
        patches = parts.projector(parts.vision_backbone(images, language)).flatten(0, 1)
        sequence = [text[:1], patches]
        if parts.proprio_projector is not None:
            raw = parts.proprio_bounds.normalize(np.asarray(proprio, np.float64))
            raw = torch.as_tensor(raw, dtype=text.dtype).to(device)
            sequence.append(parts.proprio_projector(raw)[None])
        if parts.time_token:
            sequence.append(text.new_zeros(1, text.shape[-1]))
        count = len(tokens.ids)
        sequence.append(text[1:count])
        if parts.placeholders:
            sequence += [text.new_zeros(self._actions, text.shape[-1]), text[count:]]
        return Prompt(torch.cat(sequence), self.layout(tokens))

    def layout(self, tokens: PromptTokens) -> TokenLayout:
        """Where everything stands.

        The head reads from the last prompt token on, one position before each placeholder
        (trap 1).
        """
        parts, info = self.parts, self.info
        patches, count = info.grid[0] * info.grid[1], len(info.cameras)
        proprio = int(parts.proprio_projector is not None)
        shift = count * patches + proprio + parts.time_token
        end = shift + len(tokens.ids)
        words = tokens.instruction
        actions = Span(end, end + self._actions) if parts.placeholders else None
        head = Span(end - 1, end - 1 + (self._actions if actions else 1))
        return TokenLayout(
            cameras=info.cameras,
            grid=info.grid,
            camera_starts=tuple(1 + camera * patches for camera in range(count)),
            length=actions.stop + 1 if actions else end,
            prompt=Span(shift + 1, end),
            instruction=Span(shift + words.start, shift + words.stop),
            head=head,
            actions=actions,
            time=1 + count * patches + proprio if parts.time_token else None,
        )

    def act(self, prompt: Prompt, decode: QueryDecoder) -> Tensor:
        """[L, A] normalised actions."""
        return self.parts.action_head.act(prompt, decode).float()

    def unnormalize(self, normalized: np.ndarray) -> np.ndarray:
        """[L, A] normalised -> robot units."""
        return self.parts.action_bounds.unnormalize(np.asarray(normalized, np.float64))

    @property
    def _actions(self) -> int:
        return self.info.horizon * self.info.action_dim
