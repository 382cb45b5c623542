"""A query's input in two halves: what the host prepares, and what the device computes of it.

The second half reads tensors only, and its work depends on no number in them: it can be recorded
once and replayed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from specprune_ros.models.base import Prompt, VLAModel
from specprune_ros.models.openvla_oft import OpenVLAOFT, VisionBackbone
from specprune_ros.models.preprocess import Staged
from specprune_ros.token_layout import TokenLayout

INSTRUCTIONS = 4  # whose tokens stay on the device

Lap = Callable[[str], None]


@dataclass(frozen=True, eq=False)
class Words:
    """An instruction, ready for the device.

    Attributes:
        ids: [T] int64 token ids of the whole text; empty where the model takes the instruction.
        layout: where everything stands, None where only embedding tells.
        instruction: the user's words, where the model takes them; else empty.
    """

    ids: Tensor
    layout: TokenLayout | None
    instruction: str = ''


class Stager(Protocol):
    """Both halves, for one model.

    Attributes:
        recordable: whether `pixels` and `embed` are free of the host.
    """

    recordable: bool

    def images(self, images: Sequence[np.ndarray]) -> Staged:
        """Camera images on the device, in one call for all of a query.

        Args:
            images: [H, W, 3] uint8 RGB each, of any sizes and strides.
        """

    def words(self, instruction: str) -> Words:
        """Tokenise.

        Raises:
            ObservationError: the instruction is too long.
        """

    def state(self, proprio: np.ndarray | None) -> Tensor | None:
        """[P] normalised, on the device; None without."""

    def pixels(self, images: Staged) -> Tensor:
        """[V, *image_size, 3] uint8: the model's images, of V from `images`."""

    def embed(self, images: Tensor, words: Words, state: Tensor | None, lap: Lap) -> Prompt:
        """The prompt.

        Args:
            images: from `pixels`.
            words, state: from the methods above.
            lap: told the end of 'vision', 'projector' and 'embed'.
        """


def make_stager(model: VLAModel, device: torch.device) -> Stager:
    """The stager of a model; one of an architecture unknown here embeds as a whole."""
    if isinstance(model, OpenVLAOFT):
        return OpenVLAStager(model, device)
    return WholeStager(model)


class WholeStager:
    """For a model that embeds a query in one call, from the user's words to the prompt."""

    recordable = False

    def __init__(self, model: VLAModel):
        self._model = model

    def images(self, images: Sequence[np.ndarray]) -> Staged:
        """The model's images: the whole of preprocessing."""
        return tuple(self._model.preprocess(images))

    def pixels(self, images: Staged) -> Tensor:
        """See Stager."""
        return torch.stack(images)

    def words(self, instruction: str) -> Words:
        """The words as they are."""
        return Words(torch.empty(0, dtype=torch.int64), None, instruction)

    def state(self, proprio: np.ndarray | None) -> Tensor | None:
        """[P] raw, on the host."""
        return None if proprio is None else torch.as_tensor(proprio)

    def embed(self, images: Tensor, words: Words, state: Tensor | None, lap: Lap) -> Prompt:
        """See Stager."""
        raw = None if state is None else state.numpy()
        prompt = self._model.embed(images, raw, words.instruction)
        lap('embed')
        return prompt


class OpenVLAStager:
    """For models of the OpenVLA-OFT architecture: to the bit what their `embed` gives."""

    recordable = True

    def __init__(self, model: OpenVLAOFT, device: torch.device):
        self._model = model
        self._parts = model.parts
        self._device = device
        self._weights = model.parts.language_model.embed_tokens.weight
        self._side = torch.cuda.Stream(device) if device.type == 'cuda' else None
        self.images = model.parts.preprocessor.stage
        self.pixels = model.parts.preprocessor.fit
        self.words = lru_cache(INSTRUCTIONS)(self._words)

    def _words(self, instruction: str) -> Words:
        tokens = self._parts.tokenizer.prompt(instruction)
        stop = [self._parts.tokenizer.stop_id] if self._parts.placeholders else []
        ids = torch.tensor([*tokens.ids, *stop])
        return Words(sent(ids, self._device), self._model.layout(tokens))

    def state(self, proprio: np.ndarray | None) -> Tensor | None:
        """See Stager."""
        if self._parts.proprio_projector is None:
            return None
        raw = self._parts.proprio_bounds.normalize(np.asarray(proprio, np.float64))
        return sent(torch.as_tensor(raw, dtype=self._weights.dtype), self._device)

    def embed(self, images: Tensor, words: Words, state: Tensor | None, lap: Lap) -> Prompt:
        """BOS, patches of every camera, proprio, time, prompt, zeroed placeholders, stop."""
        parts, layout = self._parts, words.layout
        text = parts.language_model.embed_tokens(words.ids)
        language = text.mean(dim=0) if parts.film else None
        features = vision_features(parts.vision_backbone, images, language, self._side)
        lap('vision')
        patches = parts.projector(features).flatten(0, 1)
        lap('projector')
        sequence = [text[:1], patches]
        if state is not None:
            sequence.append(parts.proprio_projector(state)[None])
        if parts.time_token:
            sequence.append(text.new_zeros(1, text.shape[-1]))
        sequence.append(text[1 : 1 + len(layout.prompt)])
        if layout.actions is not None:
            sequence += [text.new_zeros(len(layout.actions), text.shape[-1]), text[-1:]]
        prompt = Prompt(torch.cat(sequence), layout)
        lap('embed')
        return prompt


def vision_features(
    backbone: VisionBackbone,
    images: Tensor,
    language: Tensor | None,
    side: torch.cuda.Stream | None,
) -> Tensor:
    """Both towers, all cameras in one batch each, one tower beside the other on a GPU.

    Args:
        backbone: the towers.
        images: [V, Y, X, 3] uint8.
        language: see VisionBackbone.
        side: a second stream for the first tower; None runs one after the other.

    Returns:
        [V, N, features].
    """
    if side is None:
        return backbone(images, language)
    pixels = images.permute(0, 3, 1, 2).float() / 255
    dtype = backbone.featurizer.pos_embed.dtype
    dino = ((pixels - backbone.dino_mean) / backbone.dino_std).to(dtype)
    siglip = ((pixels - backbone.siglip_mean) / backbone.siglip_std).to(dtype)
    current = torch.cuda.current_stream()
    # Every use of the side stream starts and ends so, which also orders the reuse of memory:
    # nothing is freed before the streams have met.
    side.wait_stream(current)
    try:
        with torch.cuda.stream(side):
            first = backbone.featurizer(dino, language)
        second = backbone.fused_featurizer(siglip, language)
    finally:
        current.wait_stream(side)
    return torch.cat((first, second), dim=-1)


def sent(host: Tensor, device: torch.device) -> Tensor:
    """A small host tensor on the device; the host does not wait."""
    if device.type == 'cuda':
        host = host.pin_memory()
    return host.to(device, non_blocking=True)
