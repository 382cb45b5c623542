"""Who presses the emergency stop: it is on until everybody who pressed it has released it."""

from __future__ import annotations

from collections.abc import Collection

# A publisher whose quality of service does not match: it cannot be heard, so it may be pressing.
UNHEARD = b'unheard'
_SOMEBODY = b'somebody'  # a press of which nobody knows whose it is


class Presses:
    """The presses of an emergency stop that several publishers share.

    A press holds until its own publisher releases it. Of a publisher that is gone nobody else can:
    the next release by another ends its press. Where it is not known who sent a message, a release
    only counts while there is one publisher.
    """

    def __init__(self):
        self._pressed: set[bytes] = set()

    def put(self, on: bool, sender: bytes | None, present: Collection[bytes]) -> bool:
        """Take a message.

        Args:
            on: what it says.
            sender: the global id of its publisher, or UNHEARD; None: not known.
            present: those of the publishers that are there now, UNHEARD where one is among them.

        Returns:
            Whether the stop is on.
        """
        sender = sender if sender in present else _SOMEBODY
        if on:
            self._pressed.add(sender)
        else:
            others = set(present) - {sender}
            if len(present) > 1:
                others.add(_SOMEBODY)
            self._pressed &= others
        return bool(self._pressed)
