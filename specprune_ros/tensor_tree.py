"""Values that hold tensors at any depth: dataclasses, tuples, lists and dicts of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable

import torch
from torch import Tensor

PLAIN = (bool, int, float, str, bytes, type(None), frozenset, torch.device, torch.dtype)


def map_tensors(function: Callable[[Tensor], object], value: object) -> object:
    """The value with every tensor replaced; what holds none stays the same object.

    Raises:
        TypeError: it holds something in which a tensor could hide.
    """
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, PLAIN):
        return value
    if isinstance(value, dict):
        return {key: map_tensors(function, item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map_tensors(function, item) for item in value)
    if not dataclasses.is_dataclass(value):
        raise TypeError(f'{type(value).__name__} is no value of tensors')
    fields = {spec.name: getattr(value, spec.name) for spec in dataclasses.fields(value)}
    mapped = {name: map_tensors(function, item) for name, item in fields.items()}
    same = all(_same(mapped[name], item) for name, item in fields.items())
    return value if same else dataclasses.replace(value, **mapped)


def _same(mapped: object, item: object) -> bool:
    return mapped is item or (isinstance(item, (list, tuple, dict)) and not tensors(item))


def tensors(value: object) -> list[Tensor]:
    """All tensors in a value, in order.

    Raises:
        TypeError: as map_tensors.
    """
    found: list[Tensor] = []
    map_tensors(lambda tensor: found.append(tensor) or tensor, value)
    return found


def signature(value: object) -> Hashable:
    """Equal for two values that differ in nothing but the numbers in their tensors.

    Raises:
        TypeError: as map_tensors.
    """
    if isinstance(value, Tensor):
        return tuple(value.shape), value.dtype, value.device
    if isinstance(value, PLAIN):
        return type(value).__name__, value
    if isinstance(value, dict):
        return tuple((key, signature(item)) for key, item in value.items())
    if type(value) in (list, tuple):
        return tuple(signature(item) for item in value)
    if not dataclasses.is_dataclass(value):
        raise TypeError(f'{type(value).__name__} is no value of tensors')
    names = (spec.name for spec in dataclasses.fields(value))
    return type(value), tuple(signature(getattr(value, name)) for name in names)
