"""Visual-token pruning methods, by name."""

from __future__ import annotations

from specprune_ros.config import PruneConfig
from specprune_ros.errors import ConfigError
from specprune_ros.pruning.base import KeepAll, PruneMethod
from specprune_ros.pruning.controls import RandomPatches, UniformPatches
from specprune_ros.pruning.specprune import SpecPrune

METHODS: dict[str, type[PruneMethod]] = {
    method.name: method for method in (KeepAll, SpecPrune, RandomPatches, UniformPatches)
}


def make_method(config: PruneConfig) -> PruneMethod:
    """Build the configured method.

    Raises:
        ConfigError: no such method.
    """
    if config.method not in METHODS:
        raise ConfigError('pruning.method', config.method, f'must be one of {", ".join(METHODS)}')
    return METHODS[config.method](config)


def check_depth(config: PruneConfig, depth: int) -> None:
    """Refuse a configuration that some method cannot use in a decoder of `depth` layers.

    All methods are asked, since which one runs may change live and its layers may not.

    Raises:
        ConfigError: naming the field and its value.
    """
    for method in METHODS.values():
        method(config).check_depth(depth)
