"""transformers' Llama, imported only when a model is built."""

from __future__ import annotations

from torch import nn

from specprune_ros.errors import MissingDependencyError
from specprune_ros.loading import COMMANDS


def make_llama(sizes: dict) -> nn.Module:
    """A LlamaModel without its language-model head.

    Args:
        sizes: arguments of transformers.LlamaConfig.

    Raises:
        MissingDependencyError: transformers is missing or broken.
    """
    try:
        from transformers import LlamaConfig, LlamaModel
    except ImportError as error:
        raise MissingDependencyError(
            'transformers', 'the model', COMMANDS['transformers'], error
        ) from error
    return LlamaModel(LlamaConfig(**sizes))
