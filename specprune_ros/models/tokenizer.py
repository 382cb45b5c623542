"""Llama-2's tokenizer, and the prompts of the OpenVLA family.

Source: openvla-oft 213c5ff, openvla_utils.py (prompt), modeling_prismatic.py (lone space piece).
"""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from itertools import accumulate
from pathlib import Path
from typing import Protocol

from specprune_ros.errors import (
    CheckpointError,
    MissingDependencyError,
    ObservationError,
    shown,
)
from specprune_ros.loading import COMMANDS
from specprune_ros.models.prompt import PromptTokens
from specprune_ros.token_layout import Span

SLOT = '{instruction}'
OPENVLA_TEMPLATE = f'In: What action should the robot take to {SLOT}?\nOut:'
MAX_POSITIONS = 2048  # of Llama-2 as OpenVLA configures it

BOS, STOP, SPACE = '<s>', '</s>', '▁'
BYTES = [f'<0x{byte:02X}>' for byte in range(256)]  # spell what has no piece of its own
IDS = {BOS: 1, STOP: 2}  # what the models were trained with


class Vocabulary(Protocol):
    """A loaded tokenizer file."""

    def id_of(self, piece: str) -> int | None:
        """The id of a piece; None where there is no such piece."""

    def encode(self, text: str) -> tuple[list[int], list[str]]:
        """Ids and pieces of a text, without BOS; '</s>' and the like are mere characters."""


class LlamaTokenizer:
    """A checkpoint folder's tokenizer around one prompt template.

    Args:
        folder: holds `tokenizer.json`, or else `tokenizer.model`.
        template: prompt with one '{instruction}'.
        max_tokens: ids in the longest prompt, that is, what images and actions leave of the
            model's positions.

    Attributes:
        stop_id: id of the token that ends an answer.

    Raises:
        CheckpointError: neither file exists, or the one read is broken or not Llama-2's.
        MissingDependencyError: the package that reads the file is missing.
        ValueError: the template has not exactly one '{instruction}'.
    """

    stop_id = IDS[STOP]

    def __init__(
        self,
        folder: str | Path,
        *,
        template: str = OPENVLA_TEMPLATE,
        max_tokens: int = MAX_POSITIONS,
    ):
        if template.count(SLOT) != 1:
            raise ValueError(f'template {template!r} must hold {SLOT} once')
        self._before, self._after = template.split(SLOT)
        self._max_tokens = max_tokens
        self._path, self._vocabulary = _load(Path(folder))
        self._space_id = self._vocabulary.id_of(SPACE)
        self._encode(self._before + self._after)  # another kind of file shows at once

    def prompt(self, instruction: str) -> PromptTokens:
        """Tokenise the template around the lower-cased instruction.

        Spaces and line breaks stay as they are. A token that covers characters of both the
        instruction and the template, such as a word and the space before it, is instruction.

        Raises:
            ObservationError: instruction_too_long, or instruction_encoding where the text has no
                UTF-8 form.
            CheckpointError: the vocabulary cannot spell the text.
            ValueError: the instruction is empty.
        """
        words = _words(instruction)
        ids, ends = self._encode(f'{self._before}{words}{self._after}')
        ids = [IDS[BOS], *ids]
        if ids[-1] != self._space_id:
            ids.append(self._space_id)
        if len(ids) > self._max_tokens:
            why = f'makes a prompt of {len(ids)} tokens, there is room for {self._max_tokens}'
            raise ObservationError('instruction_too_long', 'instruction', instruction, why)
        start = len(self._before.encode())
        first = bisect_right(ends, start)
        last = bisect_left(ends, start + len(words.encode()))
        return PromptTokens(tuple(ids), Span(1 + first, 1 + last + 1))  # BOS precedes them

    def _encode(self, text: str) -> tuple[list[int], list[int]]:
        """Ids, and for each the number of UTF-8 bytes of `text` up to its end.

        Counted from the pieces: the offsets that the two libraries report differ for characters
        spelled in bytes, and sentencepiece's changed between versions.
        """
        ids, pieces = self._vocabulary.encode(text)
        spelled = [_spelling(piece) for piece in pieces]
        if b''.join(spelled) != f' {text}'.encode():
            raise CheckpointError(
                f"{self._path}: not Llama-2's tokenizer, {shown(text)} became {shown(pieces)}"
            )
        # The tokenizer put a space before the text, which is not the text's.
        return ids, [end - 1 for end in accumulate(map(len, spelled))]


def _words(instruction: str) -> str:
    """Lower case; Llama's space sign is a space, as to the tokenizer itself."""
    words = instruction.lower().replace(SPACE, ' ')
    if not words:
        raise ValueError('an empty instruction has no tokens')
    try:
        words.encode()
    except UnicodeEncodeError as error:
        raise ObservationError(
            'instruction_encoding', 'instruction', instruction, str(error)
        ) from error
    return words


def _spelling(piece: str) -> bytes:
    """What a piece stands for, in UTF-8."""
    byte = re.fullmatch('<0x([0-9A-F]{2})>', piece)
    return bytes.fromhex(byte[1]) if byte else piece.replace(SPACE, ' ').encode()


def _load(folder: Path) -> tuple[Path, Vocabulary]:
    """The tokenizer file of a folder, and what is in it."""
    for name, kind in KINDS.items():
        path = folder / name
        if path.is_file():
            vocabulary = kind(path)
            _check_pieces(path, vocabulary)
            return path, vocabulary
    raise CheckpointError(f'{folder}: has neither {" nor ".join(KINDS)}')


def _check_pieces(path: Path, vocabulary: Vocabulary) -> None:
    for piece in (*IDS, SPACE, *BYTES):
        found, wanted = vocabulary.id_of(piece), IDS.get(piece)
        if found is None:
            raise CheckpointError(f"{path}: not Llama-2's tokenizer, it has no piece {piece!r}")
        if wanted is not None and found != wanted:
            raise CheckpointError(
                f"{path}: not Llama-2's tokenizer, {piece!r} has id {found} and not {wanted}"
            )


class _TokenizersVocabulary:
    """A `tokenizer.json`."""

    def __init__(self, path: Path):
        try:
            from tokenizers import Tokenizer
        except ImportError as error:
            raise MissingDependencyError(
                'tokenizers', path.name, COMMANDS['tokenizers'], error
            ) from error
        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises nothing narrower
            raise CheckpointError(f'{path}: cannot be read: {error}') from error
        self._tokenizer.encode_special_tokens = True
        self._tokenizer.no_truncation()  # the file may ask for it
        self._tokenizer.no_padding()

    def id_of(self, piece: str) -> int | None:
        return self._tokenizer.token_to_id(piece)

    def encode(self, text: str) -> tuple[list[int], list[str]]:
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        return encoding.ids, encoding.tokens


class _SentencePieceVocabulary:
    """A `tokenizer.model`."""

    def __init__(self, path: Path):
        try:
            from sentencepiece import SentencePieceProcessor
        except ImportError as error:
            raise MissingDependencyError(
                'sentencepiece', path.name, COMMANDS['sentencepiece'], error
            ) from error
        try:
            self._processor = SentencePieceProcessor(model_file=str(path))
        except (RuntimeError, OSError) as error:
            raise CheckpointError(f'{path}: cannot be read: {error}') from error

    def id_of(self, piece: str) -> int | None:
        index = self._processor.piece_to_id(piece)  # that of <unk> for a piece unknown
        return index if self._processor.id_to_piece(index) == piece else None

    def encode(self, text: str) -> tuple[list[int], list[str]]:
        ids = self._processor.encode(text)
        return ids, self._processor.id_to_piece(ids)


KINDS = {'tokenizer.json': _TokenizersVocabulary, 'tokenizer.model': _SentencePieceVocabulary}
