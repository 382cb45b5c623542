"""What vla_node said last, and whether it still says anything."""

from __future__ import annotations

from dataclasses import dataclass

from specprune_ros.streaming.refusal import Refusal


@dataclass(frozen=True)
class Status:
    """One status of vla_node.

    Attributes:
        running: a task runs.
        epoch: that of valid chunks.
    """

    running: bool
    epoch: int
    stamp_ns: int


class Peer:
    """vla_node, as its status shows it; `timeout_s` is the age from which on it counts as gone."""

    def __init__(self, timeout_s: float):
        self._timeout_s = timeout_s
        self._status: Status | None = None

    def put(self, status: Status) -> None:
        """Take its newest status."""
        self._status = status

    def forget(self) -> None:
        """It has not been heard yet."""
        self._status = None

    def check(self, now_ns: int) -> None:
        """Refuse to stream without it.

        Raises:
            Refusal: peer_gone or task_ended.
        """
        status = self._status
        if status is None or (now_ns - status.stamp_ns) / 1e9 > self._timeout_s:
            raise Refusal('peer_gone', f'no status of vla_node for {self._timeout_s:g} s')
        if not status.running:
            raise Refusal('task_ended', 'vla_node runs no task')

    def check_epoch(self, epoch: int) -> None:
        """Refuse what belongs to another epoch.

        Raises:
            Refusal: chunk_epoch.
        """
        if self._status is None or epoch != self._status.epoch:
            known = self._status and self._status.epoch
            raise Refusal('chunk_epoch', f'epoch {epoch}, vla_node is at {known}')
