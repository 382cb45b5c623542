"""What the network is told about a batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from specprune_ros.sim.found import REACH_PATCHES
from specprune_ros.train.config import PATCH, FitConfig
from specprune_ros.train.data import Batch
from specprune_ros.train.network import AuxiliaryHeads, Outputs

# Rotations are corrections of a few degrees; normalised, they would weigh as much as the way.
ACTION_WEIGHTS = (1.0, 1.0, 1.0, 0.2, 0.2, 0.2, 1.0)


@dataclass(frozen=True, eq=False, kw_only=True)
class Losses:
    """Means over a batch.

    Attributes:
        action: L1 of normalised actions; rotations count ACTION_WEIGHTS.
        target: L1 of the named object's place, in TARGET_UNIT_M.
        flag: cross entropy of 'this patch shows the named object'.
        patch: cross entropy of what a patch shows, and L1 of where in it, in patches.
        words: L1 of where in every image the named object is, as the words know it early on, in
            patches.
    """

    action: Tensor
    target: Tensor
    flag: Tensor
    patch: Tensor
    words: Tensor

    def total(self, fit: FitConfig) -> Tensor:
        """The weighted sum."""
        return (
            self.action
            + fit.target_weight * self.target
            + fit.flag_weight * self.flag
            + fit.patch_weight * self.patch
            + fit.words_weight * self.words
        )


def losses_of(
    outputs: Outputs,
    heads: AuxiliaryHeads,
    batch: Batch,
    size: int,
    visual_idx: Tensor | None = None,
) -> Losses:
    """Compare what a network says with the answers.

    Args:
        outputs: of the batch.
        heads: of the auxiliary questions.
        batch: the answers.
        size: of the images, px.
        visual_idx: [B, K] which patches each sequence has; None for all.
    """
    weights = torch.tensor(ACTION_WEIGHTS, device=batch.actions.device)
    error = (outputs.actions - batch.actions).abs() @ weights / weights.sum()
    kind, offset = patch_labels(batch.pixels, size)
    return Losses(
        action=error.mean(),
        target=(heads.target(outputs.stop) - batch.target).abs().mean(),
        flag=_flag_loss(heads.flag(outputs.visual)[..., 0], kind[batch.scene], batch, visual_idx),
        patch=patch_loss(outputs.patches, heads, kind, offset),
        words=_words_loss(heads.place(outputs.words), batch, size),
    )


def patch_loss(patches: Tensor, heads: AuxiliaryHeads, kind: Tensor, offset: Tensor) -> Tensor:
    """What patches show and where.

    Args:
        patches: [I, V*N, C] projected.
        heads: of the questions.
        kind, offset: from `patch_labels`.
    """
    shown = kind > 0
    entropy = F.cross_entropy(heads.kind(patches).transpose(1, 2), kind, ignore_index=-1)
    where = (heads.offset(patches) - offset).abs().mean(dim=-1)
    return entropy + (where * shown).sum() / shown.sum().clamp(min=1)


def patch_labels(pixels: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Which object's centre is in or next to a patch.

    Args:
        pixels: [I, V, O, 2] px to the right and down; NaN for unknown.
        size: of the images, px.

    Returns:
        [I, V*N] int64: 0 for no object, 1 + o for object o, -1 where nothing is known;
        [I, V*N, 2] from the patch's centre to the object's, in patches.
    """
    side = size // PATCH
    at = torch.arange(side, device=pixels.device) + 0.5
    centres = torch.stack((at.repeat(side), at.repeat_interleave(side)), dim=-1)  # x, y
    known = pixels.isfinite().all(dim=-1)
    gap = pixels.nan_to_num(nan=1e6)[:, :, None] / PATCH - centres[None, None, :, None]
    distance, nearest = gap.abs().amax(dim=-1).min(dim=-1)  # [I, V, N]
    kind = torch.where(distance <= REACH_PATCHES, nearest + 1, 0)
    kind = kind.masked_fill(~known.any(dim=-1)[..., None], -1)
    offset = gap.gather(3, nearest[..., None, None].expand(*nearest.shape, 1, 2))[..., 0, :]
    offset = offset.clamp(-2 * REACH_PATCHES, 2 * REACH_PATCHES)
    return kind.flatten(1), offset.flatten(1, 2)


def _flag_loss(logits: Tensor, kind: Tensor, batch: Batch, visual_idx: Tensor | None) -> Tensor:
    """Binary cross entropy over the patches of which something is known."""
    if visual_idx is not None:
        kind = kind.gather(1, visual_idx)
    known = (kind >= 0) & (batch.named >= 0)[:, None]
    wanted = (kind == batch.named[:, None] + 1).float()
    loss = F.binary_cross_entropy_with_logits(logits, wanted, reduction='none')
    return (loss * known).sum() / known.sum().clamp(min=1)


def _words_loss(told: Tensor, batch: Batch, size: int) -> Tensor:
    """L1 in the images that show the named object; told [B, V*2] in image widths."""
    place = batch.pixels[batch.scene] / size  # [B, V, O, 2]
    index = batch.named.clamp(min=0)[:, None, None, None].expand(-1, place.shape[1], 1, 2)
    place = place.gather(2, index)[:, :, 0]
    shown = ((place > 0) & (place < 1)).all(dim=-1) & (batch.named >= 0)[:, None]
    off = (told.view_as(place) - place.nan_to_num()).abs().mean(dim=-1) * (size / PATCH)
    return (off * shown).sum() / shown.sum().clamp(min=1)
