"""Checkpoint folders, read one tensor at a time; nothing that lies in them is ever executed.

Opening a file reads names and shapes only. So a checkpoint that does not fit its model is refused
before any of its gigabytes is read, and keys are picked, renamed and merged as plain dicts.

Source: openvla-oft 213c5ff, openvla_utils.py and modeling_prismatic.py.
"""

from __future__ import annotations

import json
import pickle
import pickletools
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from specprune_ros.errors import CheckpointError, MissingDependencyError
from specprune_ros.shipped import find_checkpoint

CONFIG = 'config.json'
STATISTICS = 'dataset_statistics.json'
INDEX, SINGLE = 'model.safetensors.index.json', 'model.safetensors'
ADAPTER = 'lora_adapter'
DDP_PREFIX = 'module.'  # what torch's DistributedDataParallel puts before every key
LISTED = 8  # keys of each kind that a message names
ZIP_START, PICKLE_START, LFS_START = b'PK\x03\x04', b'\x80', b'version https://git-lfs'
SCANNED = 1 << 24  # bytes of a refused pickle that are searched for what it wanted
# What a pickle of tensors asks for; anything else would be code of somebody's choice.
TENSOR_GLOBAL = re.compile(
    r'collections\.OrderedDict|torch\.\w+|torch\._(utils|tensor)\._rebuild\w+'
)


@dataclass(frozen=True, eq=False)
class Weight:
    """One tensor of a checkpoint, not read yet.

    Attributes:
        key: its name in the file, without DistributedDataParallel's `module.`.
        shape: from the file's header.
        file: where it lies.
        read: reads it, on the CPU. The result may be mapped from the file: copy it before the
            file may change, and drop it to give the memory back.
    """

    key: str
    shape: tuple[int, ...]
    file: Path
    read: Callable[[], Tensor]


Weights = dict[str, Weight]  # by the name that the model gives them: `Weight.key`, or a new one


class Checkpoint:
    """A checkpoint folder.

    Args:
        folder: where it is, or the name of a shipped one.

    Attributes:
        folder: where it is.
        config: content of config.json.

    Raises:
        CheckpointError: no such folder, or config.json is missing or broken.
    """

    def __init__(self, folder: str | Path):
        self.folder = find_checkpoint(folder)
        if not self.folder.is_dir():
            why = 'is a file' if self.folder.exists() else 'does not exist'
            raise CheckpointError(f'checkpoint folder {self.folder}: {why}')
        config = self.json(CONFIG)
        if config is None:
            raise CheckpointError(f'{self.folder / CONFIG}: missing; is this a checkpoint folder?')
        self.config = config

    def json(self, name: str) -> dict | None:
        """Content of a JSON file of the folder; None where there is no such file.

        Raises:
            CheckpointError: it is broken, or no JSON object.
        """
        return read_json(self.folder / name)

    def statistics(self) -> dict[str, dict]:
        """Statistics by dataset: dataset_statistics.json, else `norm_stats` of config.json.

        Raises:
            CheckpointError: neither is there, or it holds something else.
        """
        found, file = self.json(STATISTICS), STATISTICS
        if found is None:
            found, file = self.config.get('norm_stats'), f'norm_stats in {CONFIG}'
        if not found:
            raise CheckpointError(
                f'{self.folder}: no dataset statistics, neither {STATISTICS} '
                f'nor norm_stats in {CONFIG}'
            )
        if not isinstance(found, dict) or not all(isinstance(one, dict) for one in found.values()):
            raise CheckpointError(f'{self.folder}: {file} is not a mapping of dataset to values')
        return found

    def component(self, name: str) -> Path | None:
        """The one file whose name holds the component's name and the word 'checkpoint'.

        Backups that the reference's loader makes (`*.back.*`) and code (`*.py`) do not count.

        Raises:
            CheckpointError: several files match.

        Source: openvla-oft 213c5ff, openvla_utils.py.
        """
        matches = [
            path
            for path in sorted(self.folder.iterdir())
            if name in path.name
            and 'checkpoint' in path.name
            and not (path.is_dir() or '.back.' in path.name or path.suffix == '.py')
        ]
        if len(matches) > 1:
            names = ', '.join(path.name for path in matches)
            raise CheckpointError(
                f'{self.folder}: {len(matches)} files for {name} ({names}); keep one of them here'
            )
        return matches[0] if matches else None

    @property
    def has_weights(self) -> bool:
        """Whether the folder holds a whole model; if not, an adapter needs its base model."""
        return any((self.folder / name).exists() for name in (INDEX, SINGLE))

    @property
    def lora_adapter(self) -> Path | None:
        """The folder of an adapter, for `lora.Adapter`; not needed where `has_weights`."""
        folder = self.folder / ADAPTER
        return folder if folder.is_dir() else None

    def weights(self) -> Weights:
        """The whole model's weights, through the index of its shards, else from its one file.

        Raises:
            CheckpointError: no weights, a shard is missing or broken, or the index is wrong.
        """
        index = self.json(INDEX)
        if index is not None:
            return self._indexed(index)
        if self.has_weights:
            return open_weights(self.folder / SINGLE)
        hint = f'; {ADAPTER} needs the base model that it changes' if self.lora_adapter else ''
        raise CheckpointError(f'{self.folder}: neither {INDEX} nor {SINGLE}{hint}')

    def _indexed(self, index: dict) -> Weights:
        """Weights of all shards, which must hold what the index says, and no more."""
        where = index.get('weight_map')
        if not isinstance(where, dict) or not all(_is_file_name(name) for name in where.values()):
            raise CheckpointError(f'{self.folder / INDEX}: weight_map is not key to file name')
        names = sorted(set(where.values()))
        missing = [name for name in names if not (self.folder / name).exists()]
        if missing:
            raise CheckpointError(
                f'{self.folder}: {len(missing)} of {len(names)} shards missing: {_list(missing)}'
            )
        shards = {name: open_weights(self.folder / name) for name in names}
        absent = [f'{key} ({name})' for key, name in where.items() if key not in shards[name]]
        if absent:
            raise CheckpointError(
                f'{self.folder / INDEX}: names keys that their shards lack: {_list(absent)}'
            )
        found = [(key, name) for name, shard in shards.items() for key in shard]
        extra = [f'{key} ({name})' for key, name in found if where.get(key) != name]
        if extra:
            raise CheckpointError(
                f'{self.folder / INDEX}: lacks keys that are in the shards: {_list(extra)}'
            )
        return {key: shards[name][key] for key, name in found}


def read_json(path: Path) -> dict | None:
    """A JSON object; None where there is no such file.

    Raises:
        CheckpointError: the file cannot be read, is no JSON, or no object.
    """
    try:
        content = json.loads(path.read_text(encoding='utf-8'))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise _unreadable(path, error) from error
    if not isinstance(content, dict):
        raise CheckpointError(f'{path}: must be a JSON object, is a {type(content).__name__}')
    return content


def open_weights(path: Path) -> Weights:
    """Names and shapes of all tensors in a file, without their data.

    A `.safetensors` file is mapped anew for each tensor that is read. Any other file is taken for
    one of `torch.save` and stays mapped as long as the result lives; only tensors are unpickled
    from it. Names of nested dicts are joined by dots (CogACT saves {'model': {'projector': ...}}).

    Raises:
        CheckpointError: the file is missing, broken or truncated, wants to run code, or holds
            something other than tensors.
        MissingDependencyError: safetensors is not installed.
    """
    opened = _open_safetensors if path.suffix == '.safetensors' else _open_torch
    weights = opened(path)
    if not weights:
        raise CheckpointError(f'{path}: holds no tensors')
    prefix = DDP_PREFIX if all(weight.key.startswith(DDP_PREFIX) for weight in weights) else ''
    keys = [weight.key.removeprefix(prefix) for weight in weights]
    return {key: replace(weight, key=key) for key, weight in zip(keys, weights, strict=True)}


def load_weights(
    module: nn.Module,
    weights: Weights,
    *,
    device: torch.device,
    dtype: torch.dtype,
    unused: tuple[str, ...] = (),
) -> None:
    """Fill a module that was built on the meta device, with one tensor in host memory at a time.

    All keys and shapes are compared before any data is read. Parameters become copies that need no
    gradient, so the files may change or go afterwards; on the CPU the peak is therefore the model,
    and one tensor. Floats become `dtype`, other types stay. Buffers that are in no checkpoint keep
    value and dtype, and follow to the device.

    Args:
        module: gets the weights in place; half filled after an error.
        weights: by the names of the module's state dict.
        device, dtype: of the loaded weights.
        unused: prefixes of names that may be there although the module lacks them.

    Raises:
        CheckpointError: keys are missing or unexpected or shapes differ (all in one message), or
            a tensor is no float where one is needed, holds NaN or inf, or does so as `dtype`.
        ValueError: a buffer that is in no checkpoint has no value.
    """
    targets = module.state_dict()
    buffers = {name: item for name, item in module.named_buffers() if name not in targets}
    empty = [name for name, buffer in buffers.items() if buffer.is_meta]
    if empty:
        raise ValueError(f'buffers that no checkpoint holds were built on meta: {_list(empty)}')
    shapes = {name: tuple(target.shape) for name, target in targets.items()}
    _check_fit(shapes, weights, unused)
    for name in [name for name in weights if name in targets]:
        _assign(module, name, _load(weights[name], targets[name], device, dtype))
    for name, buffer in buffers.items():
        _assign(module, name, buffer.to(device))


def check_weights(module: nn.Module, weights: Weights, unused: tuple[str, ...] = ()) -> None:
    """Compare keys and shapes as `load_weights` does before it reads any data.

    Args:
        module: may be on the meta device; stays as it is.
        weights, unused: as for `load_weights`.

    Raises:
        CheckpointError: keys are missing or unexpected, or shapes differ.
    """
    shapes = {name: tuple(target.shape) for name, target in module.state_dict().items()}
    _check_fit(shapes, weights, unused)


def read_finite(weight: Weight) -> Tensor:
    """Read a tensor.

    Raises:
        CheckpointError: it holds NaN or inf.
    """
    tensor = weight.read()
    if not _is_finite(tensor):
        raise CheckpointError(f'{weight.file}: {weight.key} holds NaN or inf')
    return tensor


# Fitting a module ------------------------------------------------------------------------------


def _check_fit(shapes: dict[str, tuple], weights: Weights, unused: tuple[str, ...]) -> None:
    """Compare names and shapes; every difference goes into one message."""
    extra = [name for name in weights if name not in shapes and not name.startswith(unused)]
    problems = {
        'missing': [f'{name} {shape}' for name, shape in shapes.items() if name not in weights],
        'unexpected': [f'{weights[name].key} {weights[name].shape}' for name in extra],
        'of another shape': [
            f'{weights[name].key}: file has {weights[name].shape}, the model needs {shape}'
            for name, shape in shapes.items()
            if name in weights and weights[name].shape != shape
        ],
    }
    lines = [f'{len(some)} {kind}: {_list(some)}' for kind, some in problems.items() if some]
    if lines:
        files = _list(sorted({str(weight.file) for weight in weights.values()}))
        unmerged = any('lora_' in weights[name].key for name in extra)
        hint = 'its LoRA is not merged' if unmerged else 'another model or size, or incomplete'
        raise CheckpointError(
            '\n  '.join((f'{files}: does not fit the model', *lines, f'hint: perhaps {hint}'))
        )


def _load(weight: Weight, target: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """A checked copy on the device."""
    tensor = weight.read()
    where = f'{weight.file}: {weight.key}'
    if tensor.is_floating_point() != target.is_floating_point():
        needed = 'floats' if target.is_floating_point() else target.dtype
        raise CheckpointError(f'{where} is {tensor.dtype}, the model needs {needed}')
    moved = tensor.to(
        device=device,
        dtype=dtype if target.is_floating_point() else target.dtype,
        copy=True,
        memory_format=torch.contiguous_format,
    )
    if not _is_finite(moved):
        overflow = (
            f'leaves the range of {dtype}' if _is_finite(tensor.double()) else 'holds NaN or inf'
        )
        raise CheckpointError(f'{where} {overflow}')
    return moved


def _is_finite(tensor: Tensor) -> bool:
    """One pass and no mask: NaN and inf both show in the extremes."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    return bool(torch.stack(torch.aminmax(tensor)).isfinite().all())


def _assign(module: nn.Module, name: str, tensor: Tensor) -> None:
    path, _, leaf = name.rpartition('.')
    owner = module.get_submodule(path)
    is_parameter = isinstance(getattr(owner, leaf), nn.Parameter)
    setattr(owner, leaf, nn.Parameter(tensor, requires_grad=False) if is_parameter else tensor)


# Files -----------------------------------------------------------------------------------------


@contextmanager
def _safetensors(path: Path) -> Iterator:
    """The opened file; what is wrong with it becomes a CheckpointError."""
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        command = 'pip install safetensors'
        raise MissingDependencyError('safetensors', 'the checkpoint', command, error) from error
    try:
        with safe_open(path, framework='pt') as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise _unreadable(path, error) from error


def _open_safetensors(path: Path) -> list[Weight]:
    with _safetensors(path) as file:
        keys = file.keys()
        shapes = {key: tuple(file.get_slice(key).get_shape()) for key in keys}
    return [
        Weight(key, shape, path, partial(_read_safetensors, path, key))
        for key, shape in shapes.items()
    ]


def _read_safetensors(path: Path, key: str) -> Tensor:
    with _safetensors(path) as file:  # the tensor alone keeps the mapping alive from here on
        return file.get_tensor(key)


def _open_torch(path: Path) -> list[Weight]:
    tensors = _flat(path, _unpickle(path))
    return [
        Weight(key, tuple(tensor.shape), path, partial(_given, tensor))
        for key, tensor in tensors.items()
    ]


def _given(tensor: Tensor) -> Tensor:
    return tensor


def _unpickle(path: Path) -> object:
    """What `torch.save` wrote, tensors mapped from the file; refuses code.

    Only the zip format of torch 1.6 and later is read: the older ones cannot be mapped, and torch
    before 2.6 could be made to run code from them in spite of weights_only (CVE-2025-32434).
    """
    try:
        with path.open('rb') as file:
            start = file.read(len(ZIP_START))
        if start != ZIP_START:
            raise ValueError('not a zip archive as torch.save makes it since torch 1.6')
        if not zipfile.is_zipfile(path):
            raise ValueError('its end is missing')
        return torch.load(path, map_location='cpu', weights_only=True, mmap=True)
    except Exception as error:  # zip, pickle and storages each raise their own
        wanted = _foreign_globals(path)
        if wanted:
            raise CheckpointError(
                f'{path}: wants to run code ({_list(wanted)}); it was refused and nothing was run'
            ) from error
        raise _unreadable(path, error) from error


def _foreign_globals(path: Path) -> list[str]:
    """Python objects other than tensors that a pickle asks for; found without unpickling."""
    found, words = [], []
    try:
        for opcode, argument, _ in pickletools.genops(_pickle_bytes(path)):
            if opcode.name in ('GLOBAL', 'INST'):
                found.append(argument.replace(' ', '.'))
            elif opcode.name == 'STACK_GLOBAL':
                found.append('.'.join(words[-2:]))
            elif isinstance(argument, str):
                words.append(argument)
    except Exception:  # broken from here on, each layer in its own way; what was found counts
        pass
    return [name for name in dict.fromkeys(found) if not TENSOR_GLOBAL.fullmatch(name)]


def _pickle_bytes(path: Path) -> bytes:
    """The start of the pickle in a file of torch.save, or of a bare pickle; else nothing."""
    with path.open('rb') as file:
        data = file.read(SCANNED)
    if not data.startswith(ZIP_START):
        return data if data.startswith(PICKLE_START) else b''
    with zipfile.ZipFile(path) as archive:
        name = next(name for name in archive.namelist() if name.endswith('data.pkl'))
        with archive.open(name) as file:
            return file.read(SCANNED)


def _flat(path: Path, content: object, prefix: str = '') -> dict[str, Tensor]:
    """Tensors of a nested dict, by their names joined with dots."""
    if isinstance(content, Tensor) and prefix:
        if content.layout != torch.strided or content.device.type != 'cpu':
            raise CheckpointError(f'{path}: {prefix} is not a plain tensor with data')
        return {prefix: content}
    if not isinstance(content, dict):
        what = prefix or 'its content'
        raise CheckpointError(
            f'{path}: {what} is a {type(content).__name__}, where a state dict of tensors must be'
        )
    flat: dict[str, Tensor] = {}
    for key, value in content.items():
        flat |= _flat(path, value, f'{prefix}.{key}' if prefix else str(key))
    return flat


def _unreadable(path: Path, error: Exception) -> CheckpointError:
    """What whoever downloaded the file should know of it."""
    try:
        with path.open('rb') as file:
            start = file.read(len(LFS_START))
    except OSError:
        start = b''
    if start == LFS_START:
        return CheckpointError(f'{path}: only a Git LFS pointer; fetch the file with git lfs pull')
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    if isinstance(error, pickle.UnpicklingError):  # torch would advise to allow code
        reason = 'its pickle is broken'
    return CheckpointError(f'{path}: cannot be read, is the download complete? ({reason})')


def _is_file_name(name: object) -> bool:
    """A bare name: an index must not lead out of its folder."""
    return isinstance(name, str) and name not in ('', '.', '..') and Path(name).name == name


def _list(items: Iterable[str]) -> str:
    items = list(items)
    more = f' and {len(items) - LISTED} more' if len(items) > LISTED else ''
    return ', '.join(items[:LISTED]) + more
