"""The prompt's ids and the instruction's place among them.

A small vocabulary of Llama's form is built here. The real one is not ours to publish: name a
folder with it in SPECPRUNE_LLAMA_TOKENIZER to run the tests that need it.
"""

import functools
import io
import json
import os
import sys

import pytest
from conftest import golden
from hypothesis import example, given, settings
from hypothesis import strategies as st

from specprune_ros.errors import CheckpointError, MissingDependencyError, ObservationError
from specprune_ros.models.tokenizer import OPENVLA_TEMPLATE, SLOT, LlamaTokenizer

# A template of another shape: that of OpenVLA v0.1, whose towers are not known here.
OPENVLA_V01_TEMPLATE = (
    'A chat between a curious user and an artificial intelligence assistant. '
    "The assistant gives helpful, detailed, and polite answers to the user's questions. "
    f'USER: What action should the robot take to {SLOT}? ASSISTANT:'
)

WORDS = (
    '▁In : ▁What ▁action ▁should ▁the ▁robot ▁take ▁to ? Out ▁pick ▁up ▁cup ▁? ?? ▁▁ ▁ASS'
).split()
BEFORE, AFTER = OPENVLA_TEMPLATE.split('{instruction}')
BEFORE_PIECES = '<s> ▁In : ▁What ▁action ▁should ▁the ▁robot ▁take ▁to'.split()
AFTER_PIECES = '? <0x0A> Out : ▁'.split()
REAL = os.environ.get('SPECPRUNE_LLAMA_TOKENIZER')
needs_real_vocabulary = pytest.mark.skipif(
    not REAL, reason='SPECPRUNE_LLAMA_TOKENIZER names no folder with the real vocabulary'
)


def llama_json() -> dict:
    """A tokenizer.json as checkpoints have it; merges grow every word from the left."""
    tokenizers = pytest.importorskip('tokenizers')
    merges = [(word[:end], word[end]) for word in WORDS for end in range(1, len(word))]
    merges = list(dict.fromkeys(merges))
    pieces = ['<unk>', '<s>', '</s>', *(f'<0x{byte:02X}>' for byte in range(256))]
    pieces += [chr(code) for code in range(33, 127)] + ['▁', 'é']
    pieces += [left + right for left, right in merges]
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.BPE(
            {piece: index for index, piece in enumerate(pieces)},
            merges,
            unk_token='<unk>',
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    tokenizer.normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.Prepend('▁'), tokenizers.normalizers.Replace(' ', '▁')]
    )
    tokenizer.add_special_tokens(['<unk>', '<s>', '</s>', '<PAD>'])
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single='<s> $A', special_tokens=[('<s>', 1)]
    )
    return json.loads(tokenizer.to_str())


def sentencepiece_model(byte_fallback: bool = True) -> bytes:
    """A tokenizer.model with Llama's settings."""
    sentencepiece = pytest.importorskip('sentencepiece')
    text = (OPENVLA_TEMPLATE + OPENVLA_V01_TEMPLATE).split('\n') * 3
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text),
        model_writer=model,
        model_type='bpe',
        vocab_size=400 if byte_fallback else 80,
        byte_fallback=byte_fallback,
        normalization_rule_name='identity',
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        minloglevel=2,
    )
    return model.getvalue()


def write(folder, data: object) -> str:
    """Folder that now holds the tokenizer.json."""
    text = data if isinstance(data, str) else json.dumps(data)
    (folder / 'tokenizer.json').write_text(text, encoding='utf-8')
    return str(folder)


@pytest.fixture(scope='session')
def llama_folder(tmp_path_factory):
    return write(tmp_path_factory.mktemp('llama'), llama_json())


@pytest.fixture(scope='session')
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp('sentencepiece')
    (folder / 'tokenizer.model').write_bytes(sentencepiece_model())
    return str(folder)


@pytest.fixture(
    scope='session', params=['llama_folder', 'model_folder', *(['real'] if REAL else [])]
)
def folder(request):
    """Every kind of tokenizer file that is at hand."""
    return REAL if request.param == 'real' else request.getfixturevalue(request.param)


@functools.cache
def loaded(folder: str, template: str = OPENVLA_TEMPLATE) -> LlamaTokenizer:
    return LlamaTokenizer(folder, template=template)


@functools.cache
def pieces_of(folder: str) -> dict[int, str]:
    """Read by the libraries' own means."""
    if os.path.exists(os.path.join(folder, 'tokenizer.json')):
        from tokenizers import Tokenizer

        vocabulary = Tokenizer.from_file(os.path.join(folder, 'tokenizer.json')).get_vocab()
        return {index: piece for piece, index in vocabulary.items()}
    from sentencepiece import SentencePieceProcessor

    processor = SentencePieceProcessor(model_file=os.path.join(folder, 'tokenizer.model'))
    return {index: processor.id_to_piece(index) for index in range(processor.vocab_size())}


def read(folder: str, instruction: str, *template: str) -> tuple[list[str], list[str], list[str]]:
    """Pieces of the prompt: before the instruction, the instruction's, after it."""
    tokens = loaded(folder, *template).prompt(instruction)
    names = pieces_of(folder)
    pieces = [names[index] for index in tokens.ids]
    start, stop = tokens.instruction.start, tokens.instruction.stop
    return pieces[:start], pieces[start:stop], pieces[stop:]


# The prompt ------------------------------------------------------------------------------------


def test_the_prompt_of_openvla(llama_folder):
    parts = read(llama_folder, 'pick up the cup')
    assert parts == (BEFORE_PIECES, ['▁pick', '▁up', '▁the', '▁cup'], AFTER_PIECES)


def test_the_prompt_of_version_01(llama_folder):
    before, words, after = read(llama_folder, 'pick up', OPENVLA_V01_TEMPLATE)
    assert before[0] == '<s>'
    text = ''.join(before[1:]).replace('▁', ' ')
    assert text.startswith(' A chat between a curious user and an artificial intelligence assist')
    assert text.endswith(" the user's questions. USER: What action should the robot take to")
    assert words == ['▁pick', '▁up']
    assert after == ['?', '▁ASS', *'ISTANT', ':', '▁']


def test_the_instruction_is_lower_cased(folder):
    assert read(folder, 'PICK Up the CuP') == read(folder, 'pick up the cup')


def test_the_space_piece_comes_once(llama_folder):
    """A prompt that ends in it already gets no second one."""
    assert read(llama_folder, 'pick', 'In {instruction} ')[2] == ['▁']
    assert read(llama_folder, 'pick', 'In {instruction}')[2] == ['▁']


@pytest.mark.parametrize(
    ('instruction', 'before', 'words', 'after'),
    [
        ('pick up?', [], ['▁pick', '▁up', '??'], AFTER_PIECES[1:]),  # with the template's '?'
        ('?', [], ['▁?'], AFTER_PIECES),
        ('pick ', [], ['▁pick', '▁?'], AFTER_PIECES[1:]),
        ('  pick', [], ['▁▁', '▁pick'], AFTER_PIECES),  # with the template's space
        ('pick  up', [], ['▁pick', '▁', '▁up'], AFTER_PIECES),
        ('pick\nup\n', [], ['▁pick', '<0x0A>', 'u', 'p', '<0x0A>'], AFTER_PIECES),
        ('pick é', [], ['▁pick', '▁', 'é'], AFTER_PIECES),
        ('😀', ['▁'], ['<0xF0>', '<0x9F>', '<0x98>', '<0x80>'], AFTER_PIECES),
        ('İ', ['▁'], ['i', '<0xCC>', '<0x87>'], AFTER_PIECES),  # in lower case two characters
        ('{instruction}', ['▁'], [*'{instruction}'], AFTER_PIECES),
    ],
)
def test_which_tokens_are_the_instruction(llama_folder, instruction, before, words, after):
    """A token shared with the template counts as instruction, on either side."""
    parts = read(llama_folder, instruction)
    assert parts == ([*BEFORE_PIECES, *before], words, after)


@pytest.mark.parametrize('markup', ['</s>', '<s>', '<PAD>', '<0x0A>'])
def test_markup_in_an_instruction_is_text(folder, markup):
    """tokenizers reads '</s>' as the stop token unless told otherwise."""
    tokenizer = LlamaTokenizer(folder)
    ids = tokenizer.prompt(f'pick {markup} up').ids
    assert ids[0] == 1
    assert not {1, tokenizer.stop_id} & set(ids[1:])
    assert len(ids) >= len(tokenizer.prompt('pick up').ids) + 3


def spelled(pieces: list[str]) -> bytes:
    """The text that pieces stand for."""
    return b''.join(
        bytes.fromhex(piece[3:5])
        if len(piece) == 6 and piece.startswith('<0x')
        else piece.replace('▁', ' ').encode()
        for piece in pieces
    )


texts = st.text(st.characters(codec='utf-8'), min_size=1, max_size=30) | st.text(
    ' ?:\nOuté😀▁', min_size=1, max_size=12
)


@pytest.mark.parametrize('template', [OPENVLA_TEMPLATE, OPENVLA_V01_TEMPLATE])
@settings(deadline=None)  # the first example loads the file
@given(text=texts)
@example(text=' ? ')
@example(text='▁a▁')
def test_every_instruction_is_spelled_and_found(folder, template, text):
    """The prompt spells the template around the words; no smaller span holds all of them."""
    before, words, after = read(folder, text, template)
    ahead, behind = (part.encode() for part in template.split('{instruction}'))
    wanted = text.lower().replace('▁', ' ').encode()
    assert (before[0], after[-1]) == ('<s>', '▁')
    got = [spelled(part) for part in (before[1:], words, after[:-1])]
    assert b''.join(got) == b' ' + ahead + wanted + behind
    assert (b' ' + ahead).startswith(got[0])
    assert behind.endswith(got[2])
    assert len(got[0]) + len(spelled(words[:1])) > len(b' ' + ahead)
    assert len(got[2]) + len(spelled(words[-1:])) > len(behind)


# What is refused -------------------------------------------------------------------------------


def test_an_instruction_too_long(folder):
    ids = LlamaTokenizer(folder).prompt('pick up').ids
    assert LlamaTokenizer(folder, max_tokens=len(ids)).prompt('pick up').ids == ids
    short = LlamaTokenizer(folder, max_tokens=len(ids) - 1)
    with pytest.raises(ObservationError, match=f'{len(ids)} tokens.* {len(ids) - 1}$') as caught:
        short.prompt('pick up')
    assert (caught.value.code, caught.value.field) == ('instruction_too_long', 'instruction')


def test_an_instruction_longer_than_the_model(llama_folder):
    tokenizer = LlamaTokenizer(llama_folder)
    assert len(tokenizer.prompt('pick up ' * 900).ids) == 10 + 1800 + 5
    with pytest.raises(ObservationError, match='2048') as caught:
        tokenizer.prompt('pick up ' * 1200)
    assert len(str(caught.value)) < 300


def test_an_empty_instruction(folder):
    with pytest.raises(ValueError, match='empty'):
        LlamaTokenizer(folder).prompt('')


def test_an_instruction_that_is_no_unicode(folder):
    with pytest.raises(ObservationError, match='surrogates') as caught:
        LlamaTokenizer(folder).prompt('pick \ud800')
    assert caught.value.code == 'instruction_encoding'


@pytest.mark.parametrize('template', ['no place', '{instruction} {instruction}'])
def test_a_template_needs_one_place(llama_folder, template):
    with pytest.raises(ValueError, match='once'):
        LlamaTokenizer(llama_folder, template=template)


# Files -----------------------------------------------------------------------------------------


def test_what_else_the_file_asks_for_is_ignored(llama_folder, tmp_path):
    """Truncation would cut the prompt; transformers 5 writes no BOS into the file."""
    data = llama_json()
    data['truncation'] = {
        'max_length': 4, 'stride': 0, 'strategy': 'LongestFirst', 'direction': 'Right',
    }  # fmt: skip
    data['padding'] = {
        'strategy': {'Fixed': 99}, 'direction': 'Right', 'pad_to_multiple_of': None, 'pad_id': 0,
        'pad_type_id': 0, 'pad_token': '<unk>',
    }  # fmt: skip
    data['post_processor'] = None
    assert read(write(tmp_path, data), 'pick up') == read(llama_folder, 'pick up')


def test_a_folder_without_a_tokenizer(tmp_path):
    with pytest.raises(CheckpointError) as caught:
        LlamaTokenizer(tmp_path)
    for told in (str(tmp_path), 'tokenizer.json', 'tokenizer.model'):
        assert told in str(caught.value)


@pytest.mark.parametrize('text', ['', '{', '[]', 'version https://git-lfs', '{"model": {}}'])
def test_a_broken_json(tmp_path, text):
    pytest.importorskip('tokenizers')
    with pytest.raises(CheckpointError, match=r'tokenizer\.json: cannot be read'):
        LlamaTokenizer(write(tmp_path, text))


def test_a_truncated_json(tmp_path):
    text = json.dumps(llama_json())
    with pytest.raises(CheckpointError, match=r'tokenizer\.json: cannot be read'):
        LlamaTokenizer(write(tmp_path, text[: len(text) // 2]))


def test_a_model_without_bytes(tmp_path):
    (tmp_path / 'tokenizer.model').write_bytes(sentencepiece_model(byte_fallback=False))
    with pytest.raises(CheckpointError, match=r"tokenizer\.model: .* no piece '<0x00>'"):
        LlamaTokenizer(tmp_path)


@pytest.mark.parametrize('share', [0, 0.5])
def test_a_broken_model(model_folder, tmp_path, share):
    with open(os.path.join(model_folder, 'tokenizer.model'), 'rb') as file:
        data = file.read()
    (tmp_path / 'tokenizer.model').write_bytes(data[: int(share * len(data))])
    with pytest.raises(CheckpointError, match=r'tokenizer\.model: cannot be read'):
        LlamaTokenizer(tmp_path)


@pytest.mark.parametrize('piece', ['<s>', '</s>', '▁', '<0x00>', '<0x41>', '<0xFF>'])
def test_a_vocabulary_that_lacks_a_piece(tmp_path, piece):
    data = llama_json()
    vocabulary = data['model']['vocab']
    vocabulary['other'] = vocabulary.pop(piece)
    data['model']['merges'] = []
    data['added_tokens'] = [token for token in data['added_tokens'] if token['content'] != piece]
    data['post_processor'] = None
    with pytest.raises(CheckpointError, match=rf"tokenizer\.json: .* no piece '{piece}'"):
        LlamaTokenizer(write(tmp_path, data))


def test_a_vocabulary_with_other_ids(tmp_path):
    data = llama_json()
    vocabulary = data['model']['vocab']
    vocabulary['<s>'], vocabulary['</s>'] = 2, 1
    for token in data['added_tokens']:
        token['id'] = {'<s>': 2, '</s>': 1}.get(token['content'], token['id'])
    with pytest.raises(CheckpointError, match="'<s>' has id 2 and not 1"):
        LlamaTokenizer(write(tmp_path, data))


@pytest.mark.parametrize('change', ['normalizer', 'byte_fallback'])
def test_a_tokenizer_that_spells_otherwise(tmp_path, change):
    """The right pieces, used in another way than Llama's."""
    data = llama_json()
    if change == 'normalizer':
        data['normalizer'] = None
    else:
        data['model']['byte_fallback'] = False
    with pytest.raises(CheckpointError, match="not Llama-2's tokenizer"):
        LlamaTokenizer(write(tmp_path, data))


def test_the_json_is_preferred(llama_folder, tmp_path):
    (tmp_path / 'tokenizer.model').write_bytes(b'not read')
    assert LlamaTokenizer(write(tmp_path, llama_json())).prompt('pick').ids == (
        LlamaTokenizer(llama_folder).prompt('pick').ids
    )


@pytest.mark.parametrize(
    ('name', 'package'), [('tokenizer.json', 'tokenizers'), ('tokenizer.model', 'sentencepiece')]
)
def test_a_missing_package(tmp_path, monkeypatch, name, package):
    (tmp_path / name).write_bytes(b'{}')
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingDependencyError, match=f'{package} .*: pip install {package}$'):
        LlamaTokenizer(tmp_path)


# The real vocabulary ---------------------------------------------------------------------------


@needs_real_vocabulary
def test_the_ids_of_llama_2():
    """Source: npm llama-tokenizer-js, which has the same vocabulary."""
    tokens = LlamaTokenizer(REAL).prompt('put spoon on towel')
    assert tokens.ids[:10] == (1, 512, 29901, 1724, 3158, 881, 278, 19964, 2125, 304)
    assert tokens.ids[-5:] == (29973, 13, 3744, 29901, 29871)
    assert (tokens.instruction.start, tokens.instruction.stop) == (10, len(tokens.ids) - 5)


@needs_real_vocabulary
@pytest.mark.golden
@pytest.mark.parametrize('name', ['inputs.npz', 'aloha/io.npz'])
def test_the_golden_prompts(name):
    """The reference's ids, before it appends the space piece."""
    arrays = golden(f'openvla_oft/{name}')
    text = str(arrays['prompt'])
    assert text.startswith(BEFORE)
    assert text.endswith(AFTER)
    tokens = LlamaTokenizer(REAL).prompt(text[len(BEFORE) : -len(AFTER)])
    assert list(tokens.ids) == [*arrays['input_ids'][0].tolist(), 29871]
