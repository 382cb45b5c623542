"""Where everything stands in a model's input sequence, and the only converter between indices.

Four index spaces, never mixed:
- `patch_idx`: a patch in one camera's grid, row-major, 0..N-1;
- `visual_idx`: the same over all cameras, camera * N + patch_idx, 0..V*N-1;
- `pos_idx`: a token in the unpruned sequence, 0..S-1;
- `row_idx`: a row of the surviving hidden states, 0..K-1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class Span:
    """Positions start..stop-1 of the unpruned sequence."""

    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    def idx(self, device: torch.device | str = 'cpu') -> Tensor:
        """[len] int64 positions."""
        return torch.arange(self.start, self.stop, device=device)


@dataclass(frozen=True)
class TokenLayout:
    """One query's sequence.

    Attributes:
        cameras: camera names, in the order of the sequence.
        grid: (rows, cols) of every camera's patch grid.
        camera_starts: position of every camera's first patch.
        length: S, tokens in the unpruned sequence.
        prompt: all text tokens, the template's too.
        instruction: the text tokens of the user's instruction alone.
        head: positions whose final hidden states the action head reads.
        actions: positions of the action placeholders; None for a model without.
        time: position of the diffusion time token; None for a model without.

    Raises:
        ValueError: the parts overlap, leave the sequence, or do not fit each other.
    """

    cameras: tuple[str, ...]
    grid: tuple[int, int]
    camera_starts: tuple[int, ...]
    length: int
    prompt: Span
    instruction: Span
    head: Span
    actions: Span | None = None
    time: int | None = None

    def __post_init__(self) -> None:
        if len(self.cameras) != len(self.camera_starts) or not self.cameras:
            raise ValueError(f'{len(self.cameras)} cameras, {len(self.camera_starts)} starts')
        if not (
            self.prompt.start <= self.instruction.start
            and self.instruction.stop <= self.prompt.stop
            and len(self.instruction) > 0
        ):
            raise ValueError(f'instruction {self.instruction} is not inside prompt {self.prompt}')
        images = [Span(start, start + self.patches) for start in self.camera_starts]
        spans = sorted([*images, self.prompt], key=lambda span: span.start)
        ends = [0, *(span.stop for span in spans)]
        starts = [*(span.start for span in spans), self.length]
        if any(end > start for end, start in zip(ends, starts, strict=True)):
            raise ValueError(f'spans overlap or leave 0..{self.length}: {spans}')
        if not 0 <= self.head.start < self.head.stop <= self.length:
            raise ValueError(f'head {self.head} leaves 0..{self.length}')
        if any(s.start < self.head.stop and self.head.start < s.stop for s in images):
            raise ValueError(f'head {self.head} reads prunable patches')

    @property
    def patches(self) -> int:
        """N, patches of one camera."""
        return self.grid[0] * self.grid[1]

    @property
    def visual_count(self) -> int:
        """V * N, patches of all cameras."""
        return len(self.cameras) * self.patches

    @cached_property
    def _visual_pos(self) -> Tensor:
        starts = torch.tensor(self.camera_starts)[:, None]
        return (starts + torch.arange(self.patches)).flatten()

    @cached_property
    def _on_device(self) -> dict[tuple[str, str], Tensor]:
        """What was copied to a device once: a pass of the decoder must not copy again."""
        return {}

    def visual_pos_idx(self, device: torch.device | str = 'cpu') -> Tensor:
        """[V*N] position of every visual token, indexed by `visual_idx`."""
        return self._once('visual', device, lambda: self._visual_pos)

    def protected_pos_idx(self, device: torch.device | str = 'cpu') -> Tensor:
        """[S - V*N] ascending positions of all that is never pruned: everything but patches."""

        def protected() -> Tensor:
            keep = torch.ones(self.length, dtype=torch.bool)
            keep[self._visual_pos] = False
            return keep.nonzero().flatten()

        return self._once('protected', device, protected)

    def _once(self, name: str, device: torch.device | str, make: Callable[[], Tensor]) -> Tensor:
        key = (name, str(device))
        if key not in self._on_device:
            self._on_device[key] = make().to(device)
        return self._on_device[key]

    @staticmethod
    def row_idx(pos_idx: Tensor, wanted: Tensor) -> Tensor:
        """Rows at which positions survive.

        Args:
            pos_idx: [K] ascending positions of the surviving rows.
            wanted: [M] positions, every one of which survives.

        Returns:
            [M] int64 rows. No synchronisation.
        """
        return torch.searchsorted(pos_idx, wanted)
