"""The contract between models and the policy.

A model turns images and words into a prompt, offers its decoder layers, and turns hidden states
into actions. It never sees a pruning method.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from torch import Tensor, nn

from specprune_ros.models.decoder import Decoder, QueryDecoder
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
        crop_side: share of a camera image's side that the model sees (the centre).
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
    crop_side: float
    grid: tuple[int, int]
    proprio_dim: int
    horizon: int
    action_dim: int
    parameters: int


class ActionHead(nn.Module):
    """Turns a query into normalised actions; most need one pass of the decoder."""

    def act(self, prompt: Prompt, decode: QueryDecoder) -> Tensor:
        """[L, A] normalised actions, in the model's dtype.

        Args:
            prompt: from the model's `embed`.
            decode: runs the decoder on input embeddings.
        """
        head = prompt.layout.head.idx(prompt.embeds.device)
        return self(decode(prompt.embeds).at(head))


class VLAModel(Protocol):
    """A loaded Vision-Language-Action model, batch size 1."""

    info: ModelInfo
    decoder: Decoder

    def preprocess(self, images: Sequence[np.ndarray]) -> Tensor:
        """Images as the model sees them.

        Args:
            images: [H, W, 3] uint8 RGB each, of any size.

        Returns:
            [V, *image_size, 3] uint8 on the model's device.
        """

    def embed(self, images: Tensor, proprio: np.ndarray | None, instruction: str) -> Prompt:
        """Encode one query.

        Args:
            images: [V, *image_size, 3] uint8 on the model's device, in camera order.
            proprio: [P] raw joint positions, or None.
            instruction: the user's words.

        Raises:
            ObservationError: the instruction is too long.
        """

    def act(self, prompt: Prompt, decode: QueryDecoder) -> Tensor:
        """[L, A] normalised actions, float32.

        Args:
            prompt: from `embed`.
            decode: runs the decoder, pruned, as often as the head needs.
        """

    def unnormalize(self, normalized: np.ndarray) -> np.ndarray:
        """[L, A] normalised -> [L, A] float64 in the robot's units."""
