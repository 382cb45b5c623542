"""The states of action_streamer, and the orders that decide them."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

STILL_ON = (
    'e_stop is still on: whoever pressed it has to release it (after cleanup and configure all '
    'that are there are heard anew)'
)


class StreamState(IntEnum):
    """As in StreamerStatus.msg."""

    UNCONFIGURED = 0
    INACTIVE = 1
    DISABLED = 2
    WAITING = 3
    STREAMING = 4
    PAUSED = 5
    STOPPED = 6
    STALLED = 7


@dataclass
class Orders:
    """What the operator wants.

    Attributes:
        active: the node takes inputs.
        enabled: commands may leave.
        paused: they may not for now.
        stopped: by an emergency stop, since the last reset.
        e_stop: the emergency stop is on.
    """

    active: bool = False
    enabled: bool = False
    paused: bool = False
    stopped: bool = False
    e_stop: bool = False

    def state(self, phase: StreamState) -> StreamState:
        """The state, `phase` being that of a streamer which may stream."""
        if not self.active:
            return StreamState.INACTIVE
        if self.stopped:
            return StreamState.STOPPED
        if self.paused:
            return StreamState.PAUSED
        return phase if self.enabled else StreamState.DISABLED

    def clear(self) -> None:
        """Take back what allows or interrupts motion; activity and the emergency stop stay."""
        self.enabled = self.paused = False

    def why_not_enable(self) -> str:
        """Why `enable` is refused; empty: it is not."""
        return self.why_not_pause() or ('paused: ~/pause false first' if self.paused else '')

    def why_not_pause(self) -> str:
        """Why `pause` is refused; empty: it is not."""
        stopped = 'stopped: release e_stop, then ~/reset' if self.stopped else ''
        return self.why_inactive() or stopped

    def why_not_reset(self) -> str:
        """Why `reset` is refused; empty: it is not."""
        return self.why_inactive() or (STILL_ON if self.e_stop else '')

    def why_inactive(self) -> str:
        """Why nothing can be ordered; empty: it can."""
        return '' if self.active else 'not active'
