"""What a model needs of a tokenizer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from specprune_ros.token_layout import Span


@dataclass(frozen=True, eq=False)
class PromptTokens:
    """A tokenised prompt.

    Attributes:
        ids: token ids, BOS first, the lone space piece last.
        instruction: which of `ids` are the user's words.
    """

    ids: tuple[int, ...]
    instruction: Span


class Tokenizer(Protocol):
    """Turns an instruction into a prompt."""

    stop_id: int

    def prompt(self, instruction: str) -> PromptTokens:
        """Tokenise the model's prompt template around the lower-cased instruction."""
