"""OpenVLA-OFT's diffusion head: DDIM over the action chunk, one decoder pass per step.

Source: openvla-oft 213c5ff, action_heads.py and modeling_prismatic.py; DDIM as in diffusers.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from specprune_ros.models.base import ActionHead, Prompt
from specprune_ros.models.decoder import QueryDecoder
from specprune_ros.models.heads.l1 import L1RegressionHead

TRAIN_STEPS = 50
MAX_BETA = 0.999
COSINE_OFFSET = 0.008
MAX_PERIOD = 10_000.0  # of the time embedding


def alphas_cumprod() -> Tensor:
    """[TRAIN_STEPS] float32 products of 1 - beta of the squared-cosine schedule."""

    def bar(time: float) -> float:
        return math.cos((time + COSINE_OFFSET) / (1 + COSINE_OFFSET) * math.pi / 2) ** 2

    betas = [
        min(1 - bar((step + 1) / TRAIN_STEPS) / bar(step / TRAIN_STEPS), MAX_BETA)
        for step in range(TRAIN_STEPS)
    ]
    return torch.cumprod(1 - torch.tensor(betas), dim=0)


def timesteps(steps: int) -> list[int]:
    """Descending training steps that `steps` inference steps visit ('leading' spacing)."""
    stride = TRAIN_STEPS // steps
    return [index * stride for index in reversed(range(steps))]


def ddim_step(sample: Tensor, noise: Tensor, alpha: Tensor, alpha_previous: Tensor) -> Tensor:
    """One deterministic DDIM step (eta 0) towards the clean sample, which is clipped to -1..1.

    Args:
        sample: [L, A] noisy actions.
        noise: [L, A] predicted noise.
        alpha, alpha_previous: products of 1 - beta at this training step and at the next one.
    """
    clean = ((sample - (1 - alpha).sqrt() * noise) / alpha.sqrt()).clamp(-1.0, 1.0)
    return alpha_previous.sqrt() * clean + (1 - alpha_previous).sqrt() * noise


def time_embedding(step: int, width: int) -> Tensor:
    """[width] float32 sines, then cosines, of a training step."""
    half = width // 2
    frequencies = torch.exp(-math.log(MAX_PERIOD) / (half - 1) * torch.arange(half))
    angles = step * frequencies
    return torch.cat((angles.sin(), angles.cos()))


class NoisyActionProjector(nn.Module):
    """One noisy action scalar to one token: fc1, GELU, fc2."""

    def __init__(self, width: int):
        super().__init__()
        self.fc1 = nn.Linear(1, width)
        self.fc2 = nn.Linear(width, width)

    def forward(self, scalars: Tensor) -> Tensor:
        """[..., 1] -> [..., width]."""
        return self.fc2(F.gelu(self.fc1(scalars)))


class DiffusionHead(ActionHead):
    """Denoises a chunk; time token and placeholders of the prompt are filled at every step.

    Args:
        noise_predictor: hidden states to noise, the L1 head's network.
        projector: of noisy actions to tokens.
        steps: denoising steps, 1..TRAIN_STEPS.
        horizon, action_dim: L and A.
        seed: of the noise.

    differs: the noise is the same at every query, so that a chunk is a function of the
        observation alone, on any device; the reference draws anew.
    """

    def __init__(
        self,
        noise_predictor: L1RegressionHead,
        projector: NoisyActionProjector,
        *,
        steps: int,
        horizon: int,
        action_dim: int,
        seed: int = 0,
    ):
        super().__init__()
        self.noise_predictor = noise_predictor
        self.projector = projector
        self.timesteps = timesteps(steps)
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(horizon, action_dim, generator=generator)
        width = projector.fc2.out_features
        times = torch.stack([time_embedding(step, width) for step in self.timesteps])
        # The last step goes to the clean sample, whose product is 1.
        alphas = torch.cat((alphas_cumprod()[self.timesteps], torch.ones(1)))
        for name, value in (('noise', noise), ('times', times), ('alphas', alphas)):
            self.register_buffer(name, value, persistent=False)

    def act(self, prompt: Prompt, decode: QueryDecoder) -> Tensor:
        """[L, A] float32 normalised actions."""
        layout = prompt.layout
        head = layout.head.idx(prompt.embeds.device)
        sample, embeds = self.noise, prompt.embeds.clone()
        for index in range(len(self.timesteps)):
            scalars = sample.flatten()[:, None].to(embeds.dtype)
            embeds[layout.time] = self.times[index].to(embeds.dtype)
            embeds[layout.actions.start : layout.actions.stop] = self.projector(scalars)
            noise = self.noise_predictor(decode(embeds).at(head)).float()
            sample = ddim_step(sample, noise, self.alphas[index], self.alphas[index + 1])
        return sample
