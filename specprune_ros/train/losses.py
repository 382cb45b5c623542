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

LEAST = 1e-6  # share of the attention that a logarithm takes
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
        words: of the attention that goes from the prompt to a camera early on, how much goes to
            the patches that show the named object: minus the logarithm of that share.
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
    labels: tuple[Tensor, Tensor],
    visual_idx: Tensor | None = None,
) -> Losses:
    """Compare what a network says with the answers.

    Args:
        outputs: of the batch.
        heads: of the auxiliary questions.
        batch: the answers.
        labels: of its images, from `patch_labels`.
        visual_idx: [B, K] which patches each sequence has; None for all.
    """
    weights = torch.tensor(ACTION_WEIGHTS, device=batch.actions.device)
    error = (outputs.actions - batch.actions).abs() @ weights / weights.sum()
    kind, offset = labels
    shown, camera = kind[batch.scene], _cameras(batch, kind.shape[1])
    if visual_idx is not None:
        shown, camera = shown.gather(1, visual_idx), camera[visual_idx]
    wanted = named_patches(shown, batch)
    return Losses(
        action=error.mean(),
        target=(heads.target(outputs.stop) - batch.target).abs().mean(),
        flag=_flag_loss(heads.flag(outputs.visual)[..., 0], wanted, known=shown >= 0),
        patch=patch_loss(outputs.patches, heads, kind, offset),
        words=_words_loss(outputs.looks, wanted, camera),
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


def named_patches(kind: Tensor, batch: Batch) -> Tensor:
    """[B, K] bool, which of the patches [B, K] of these kinds show what their question names."""
    return kind == batch.named[:, None] + 1


def _cameras(batch: Batch, patches: int) -> Tensor:
    """[V*N, V] float, one-hot, which camera a patch belongs to."""
    cameras = batch.pixels.shape[1]
    each = torch.eye(cameras, device=batch.pixels.device)
    return each.repeat_interleave(patches // cameras, dim=0)


def _flag_loss(logits: Tensor, wanted: Tensor, known: Tensor) -> Tensor:
    """Binary cross entropy over the patches of which something is known."""
    wanted = wanted.float()
    loss = F.binary_cross_entropy_with_logits(logits, wanted, reduction='none')
    return (loss * known).sum() / known.sum().clamp(min=1)


def _words_loss(looks: Tensor, wanted: Tensor, camera: Tensor) -> Tensor:
    """Mean over layers, and over the cameras that show the named object.

    Args:
        looks: [B, layers, K] attention to the patches that were shown.
        wanted: [B, K] which of them show the named object.
        camera: [B, K, V] one-hot, whose they are; or [K, V], of all sequences.
    """
    everywhere, there = looks @ camera, (looks * wanted[:, None]) @ camera  # [B, layers, V]
    share = (there / everywhere.clamp(min=LEAST)).clamp(min=LEAST)
    shown = (wanted[:, None].float() @ camera > 0).expand_as(share)
    return -(share.log() * shown).sum() / shown.sum().clamp(min=1)
