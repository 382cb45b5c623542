"""The OpenVLA-OFT architecture: two vision towers, projector, bidirectional Llama, L1 head.

Source: openvla_oft spec, sections 4 to 8.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from specprune_ros.models.base import ModelInfo, Prompt
from specprune_ros.models.decoder import Decoder
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
    """

    low: np.ndarray
    high: np.ndarray
    mask: np.ndarray

    def normalize(self, raw: np.ndarray) -> np.ndarray:
        """[..., D] raw -> clipped to -1..1."""
        scaled = 2 * (raw - self.low) / (self.high - self.low + BOUNDS_EPS) - 1
        return np.clip(np.where(self.mask, scaled, raw), -1.0, 1.0)

    def unnormalize(self, normalized: np.ndarray) -> np.ndarray:
        """[..., D] normalised -> raw; not clipped."""
        scaled = 0.5 * (normalized + 1) * (self.high - self.low + BOUNDS_EPS) + self.low
        return np.where(self.mask, scaled, normalized)


class VisionBackbone(nn.Module):
    """DINOv2 and SigLIP side by side; `featurizer` is DINOv2 (trap 4 of the spec)."""

    def __init__(self, dino: TowerConfig, siglip: TowerConfig):
        super().__init__()
        self.featurizer = VisionTower(dino)
        self.fused_featurizer = VisionTower(siglip)
        for name, values in (
            ('dino_mean', DINO_MEAN),
            ('dino_std', DINO_STD),
            ('siglip_mean', SIGLIP_MEAN),
            ('siglip_std', SIGLIP_STD),
        ):
            self.register_buffer(name, torch.tensor(values)[:, None, None], persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """[V, Y, X, 3] uint8 -> [V, N, dino width + siglip width]."""
        pixels = images.permute(0, 3, 1, 2).float() / 255
        dtype = self.featurizer.pos_embed.dtype
        dino = ((pixels - self.dino_mean) / self.dino_std).to(dtype)
        siglip = ((pixels - self.siglip_mean) / self.siglip_std).to(dtype)
        return torch.cat((self.featurizer(dino), self.fused_featurizer(siglip)), dim=-1)


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


class OpenVLAOFT:
    """A VLAModel of the OpenVLA-OFT architecture with parallel decoding and an L1 head.

    Args:
        info: sizes and names.
        vision_backbone, projector, language_model, action_head: modules, in eval mode.
        proprio_projector: module, or None for a model without proprioception.
        tokenizer: of the prompt.
        action_bounds, proprio_bounds: normalisation.
    """

    def __init__(
        self,
        *,
        info: ModelInfo,
        vision_backbone: VisionBackbone,
        projector: Projector,
        language_model: nn.Module,
        action_head: nn.Module,
        proprio_projector: ProprioProjector | None,
        tokenizer: Tokenizer,
        action_bounds: Bounds,
        proprio_bounds: Bounds | None,
    ):
        self.info = info
        self.decoder = Decoder.of(language_model, causal=False)
        self._vision_backbone = vision_backbone
        self._projector = projector
        self._embed_tokens = language_model.embed_tokens
        self._action_head = action_head
        self._proprio_projector = proprio_projector
        self._tokenizer = tokenizer
        self._action_bounds = action_bounds
        self._proprio_bounds = proprio_bounds

    def preprocess(self, image: np.ndarray) -> np.ndarray:
        """Antialiased resize, aspect not kept ('resize-naive'); an image of the size is returned.

        differs: the reference also sends the image through JPEG and a Lanczos filter.
        """
        rows, cols = self.info.image_size
        if image.shape[:2] == (rows, cols):
            return image
        if not image.flags.writeable:  # torch would warn of the read-only buffer
            image = image.copy()
        pixels = torch.from_numpy(image).permute(2, 0, 1)[None]
        resized = F.interpolate(pixels, (rows, cols), mode='bilinear', antialias=True)
        return resized[0].permute(1, 2, 0).contiguous().numpy()

    def embed(self, images: Tensor, proprio: np.ndarray | None, instruction: str) -> Prompt:
        """BOS, patches of every camera, proprio, prompt, zeroed placeholders, stop."""
        device = self._embed_tokens.weight.device
        tokens = self._tokenizer.prompt(instruction)
        ids = torch.tensor([*tokens.ids, self._tokenizer.stop_id], device=device)
        text = self._embed_tokens(ids)
        patches = self._projector(self._vision_backbone(images)).flatten(0, 1)
        parts = [text[:1], patches]
        if self._proprio_projector is not None:
            raw = self._proprio_bounds.normalize(np.asarray(proprio, np.float64))
            raw = torch.as_tensor(raw, dtype=text.dtype).to(device)
            parts.append(self._proprio_projector(raw)[None])
        actions = self.info.horizon * self.info.action_dim
        parts += [text[1:-1], text.new_zeros(actions, text.shape[-1]), text[-1:]]
        return Prompt(torch.cat(parts), self.layout(tokens))

    def layout(self, tokens: PromptTokens) -> TokenLayout:
        """Where everything stands (openvla_oft spec, section 6).

        The head reads from the last prompt token on, one position before each placeholder
        (trap 1).
        """
        rows, cols = self.info.grid
        count = len(self.info.cameras)
        shift = count * rows * cols + (self._proprio_projector is not None)
        actions = self.info.horizon * self.info.action_dim
        end = shift + len(tokens.ids)
        words = tokens.instruction
        return TokenLayout(
            cameras=self.info.cameras,
            grid=self.info.grid,
            camera_starts=tuple(1 + camera * rows * cols for camera in range(count)),
            length=end + actions + 1,
            prompt=Span(shift + 1, end),
            instruction=Span(shift + words.start, shift + words.stop),
            head=Span(end - 1, end - 1 + actions),
        )

    def act(self, hidden: Tensor) -> Tensor:
        """[L * A, C] -> [L, A] normalised actions."""
        return self._action_head(hidden).float()

    def unnormalize(self, normalized: np.ndarray) -> np.ndarray:
        """[L, A] normalised -> robot units."""
        return self._action_bounds.unnormalize(np.asarray(normalized, np.float64))
