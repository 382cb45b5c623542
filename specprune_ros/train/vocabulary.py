"""A small tokenizer of Llama's form, in the file that checkpoint folders have.

Llama-2's own 32000 pieces are not ours to ship, and a small model needs none of them but those of
its instructions. Words outside of those are spelled in letters or bytes.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from specprune_ros.errors import ConfigError, MissingDependencyError
from specprune_ros.loading import COMMANDS
from specprune_ros.models.tokenizer import BYTES, OPENVLA_TEMPLATE, SLOT, SPACE

FILE = 'tokenizer.json'
SPECIAL = ('<unk>', '<s>', '</s>')


def write_tokenizer(folder: Path, instructions: Iterable[str], size: int) -> None:
    """Write `tokenizer.json`.

    Every word of the instructions becomes one piece, and so do the two fixed parts of the prompt:
    they say the same in every query.

    Args:
        folder: where.
        instructions: sentences.
        size: pieces that the model has room for.

    Raises:
        ConfigError: they do not fit.
        MissingDependencyError: tokenizers is not installed.
    """
    try:
        from tokenizers import Tokenizer, models, normalizers, processors
    except ImportError as error:
        raise MissingDependencyError('tokenizers', FILE, COMMANDS['tokenizers'], error) from error
    merges = _merges(instructions)
    pieces = [*SPECIAL, *BYTES, *(chr(code) for code in range(33, 127)), SPACE]
    pieces = list(dict.fromkeys(pieces + [left + right for left, right in merges]))
    if len(pieces) > size:
        why = f'the instructions need {len(pieces)} pieces'
        raise ConfigError('network.vocabulary', size, why)
    ids = {piece: index for index, piece in enumerate(pieces)}
    model = models.BPE(ids, merges, unk_token='<unk>', fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend(SPACE), normalizers.Replace(' ', SPACE)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single='<s> $A', special_tokens=[('<s>', ids['<s>'])]
    )
    tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.save(str(folder / FILE))


def _merges(instructions: Iterable[str]) -> list[tuple[str, str]]:
    """Pairs to join, in rank: words grow from the left, then the template's words join."""
    before, after = OPENVLA_TEMPLATE.split(SLOT)
    fixed = [SPACE + word for word in before.split()]
    words = [SPACE + word for sentence in instructions for word in sentence.lower().split()]
    merges = [pair for word in (*fixed, *words) for pair in _grown(list(word))]
    tail = after.replace('\n', '').partition('?')  # a line break is spelled as a byte
    merges += _grown(fixed) + _grown(list(tail[2]))
    return list(dict.fromkeys(merges))


def _grown(parts: list[str]) -> list[tuple[str, str]]:
    """The pairs that join parts one after the other."""
    return [(''.join(parts[:end]), parts[end]) for end in range(1, len(parts))]
