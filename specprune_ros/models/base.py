"""The contract between models and the policy.

A model turns images and words into a prompt, offers its decoder layers, and turns hidden states
into actions. It never sees a pruning method.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from torch import Tensor

from specprune_ros.models.decoder import Decoder
from specprune_ros.token_layout import TokenLayout


@dataclass(frozen=True, eq=False)
class Prompt:
    """One query's input to the decoder.

    Attributes:
        embeds: [S, C] input embeddings of the unpruned sequence.
        layout: where everything stands in it.
    """

    embeds: Tensor
    layout: TokenLayout


@dataclass(frozen=True, kw_only=True)
class ModelInfo:
    """What a user or a report says about a model.

    Attributes:
        name: short name.
        stand_in: True when the weights are random: the actions mean nothing.
        cameras: camera names in model order.
        image_size: (rows, cols) of the images that `embed` takes.
        grid: (rows, cols) of a camera's patches.
        proprio_dim: P, 0 for none.
        horizon: L.
        action_dim: A.
        parameters: number of weights.
    """

    name: str
    stand_in: bool
    cameras: tuple[str, ...]
    image_size: tuple[int, int]
    grid: tuple[int, int]
    proprio_dim: int
    horizon: int
    action_dim: int
    parameters: int


class VLAModel(Protocol):
    """A loaded Vision-Language-Action model, batch size 1."""

    info: ModelInfo
    decoder: Decoder

    def preprocess(self, image: np.ndarray) -> np.ndarray:
        """[H, W, 3] uint8 RGB, any size -> [*image_size, 3] uint8 as the model sees it."""

    def embed(self, images: Tensor, proprio: np.ndarray | None, instruction: str) -> Prompt:
        """Encode one query.

        Args:
            images: [V, *image_size, 3] uint8 on the model's device, in camera order.
            proprio: [P] raw joint positions, or None.
            instruction: the user's words.
        """

    def act(self, hidden: Tensor) -> Tensor:
        """[len(layout.head), C] final hidden states -> [L, A] normalised actions, float32."""

    def unnormalize(self, normalized: np.ndarray) -> np.ndarray:
        """[L, A] normalised -> [L, A] float64 in the robot's units."""
