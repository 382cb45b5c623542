"""Why something is not taken or not sent."""

from __future__ import annotations

import numpy as np

from specprune_ros.errors import SpecPruneError


class Refusal(SpecPruneError):
    """A chunk, a measurement or a command is refused.

    Args:
        code: a key of `faults.FAULTS`.
        message: in words, with the value.
        columns: action columns that a limit refused.
    """

    def __init__(self, code: str, message: str, columns: np.ndarray | None = None):
        super().__init__(message)
        self.code = code
        self.columns = np.zeros(0, int) if columns is None else columns
