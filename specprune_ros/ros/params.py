"""ROS parameters from the configuration dataclasses: one description serves both."""

from __future__ import annotations

import array
import dataclasses
import sys

from rcl_interfaces.msg import FloatingPointRange, IntegerRange, ParameterDescriptor
from rclpy.exceptions import ParameterException
from rclpy.node import Node
from rclpy.parameter import Parameter

from specprune_ros.config import PolicyConfig, axes_of
from specprune_ros.config_files import from_mapping, other_nodes_axes, parameter_names
from specprune_ros.streaming.config import StreamerConfig

# rclpy's own parameters
SIM_TIME = 'use_sim_time'
FOREIGN = (SIM_TIME, 'start_type_description_service', 'qos_overrides.')
INT64_MIN, INT64_MAX = -(2**63), 2**63 - 1


class Parameters:
    """A node's parameters, as one configuration.

    A bad value in a parameter file does not stop the node from starting: it is kept aside, and
    `read` fails with the reason until the parameter is set to a good one.
    """

    def __init__(self, node: Node, defaults: PolicyConfig | StreamerConfig):
        self._node = node
        self._defaults, kind = defaults, type(defaults)
        self._axes = axes_of(kind)
        self._names = parameter_names(kind)
        self._given = given_parameters(node)
        self._bad: dict[str, object] = {}
        for axis, cls in self._axes.items():
            for spec in dataclasses.fields(cls):
                default = getattr(getattr(self._defaults, axis), spec.name)
                self._declare(f'{axis}.{spec.name}', default, spec)

    def read(self) -> PolicyConfig | StreamerConfig:
        """The configuration that holds now.

        Raises:
            ConfigError: an unknown parameter was given, or a value is bad.
        """
        values = {name: _plain(self._node.get_parameter(name)) for name in self._names}
        return from_mapping({**values, **self._bad, **self._unknown()}, self._defaults)

    def with_changes(self, parameters: list[Parameter]) -> PolicyConfig | StreamerConfig:
        """The configuration with some parameters changed, which are not set yet.

        Raises:
            ConfigError: a changed value is bad, or the parameter unknown.
        """
        changes = {p.name: _plain(p) for p in parameters if not p.name.startswith(FOREIGN)}
        values = {name: _plain(self._node.get_parameter(name)) for name in self._names}
        return from_mapping({**values, **changes}, self._defaults)

    def accept(self, parameters: list[Parameter]) -> None:
        """Forget the bad values that are now replaced."""
        for parameter in parameters:
            self._bad.pop(parameter.name, None)

    def strangers(self) -> dict[str, object]:
        """Given parameters that belong to no node of this package: a typo, or someone else's."""
        known = set(self._axes) | other_nodes_axes(type(self._defaults))
        return {
            name: parameter.value
            for name, parameter in self._given.items()
            if name.partition('.')[0] not in known and not name.startswith(FOREIGN)
        }

    def _unknown(self) -> dict[str, object]:
        return {
            name: parameter.value
            for name, parameter in self._given.items()
            if name.partition('.')[0] in self._axes and name not in self._names
        }

    def _declare(self, name: str, default: object, spec: dataclasses.Field) -> None:
        value = list(default) if isinstance(default, tuple) else default
        # An empty list has no type: [''] stands for it, config_files.from_mapping drops the ''.
        value = [''] if value == [] else value
        descriptor = describe(spec)
        try:
            self._node.declare_parameter(name, value, descriptor)
        except (ParameterException, TypeError, ValueError):
            self._bad[name] = self._given[name].value
            self._node.declare_parameter(name, value, descriptor, ignore_override=True)


def given_parameters(node: Node) -> dict[str, Parameter]:
    """Name -> what files and the command line set, declared or not."""
    return dict(getattr(node, '_parameter_overrides', {}))


def _plain(parameter: Parameter) -> object:
    """Its value; a list of numbers comes as an array once it was set by a service."""
    value = parameter.value
    return value.tolist() if isinstance(value, array.array) else value


def describe(spec: dataclasses.Field) -> ParameterDescriptor:
    """Descriptor of a config field: meaning, unit, range."""
    meta = spec.metadata
    unit = f' [{meta["unit"]}]' if meta['unit'] else ''
    constraints = []
    if meta['choices']:
        constraints.append(f'one of {", ".join(map(str, meta["choices"]))}')
    if not meta['live']:
        constraints.append('fixed once the node is configured')
    descriptor = ParameterDescriptor(
        description=meta['doc'] + unit,
        additional_constraints='; '.join(constraints),
        # config.py checks types: it takes YAML's `1` for a float, and says what is wrong.
        dynamic_typing=True,
    )
    low, high = meta['low'], meta['high']
    if (low, high) == (None, None):
        return descriptor
    if spec.type == 'float':
        descriptor.floating_point_range = [
            FloatingPointRange(
                from_value=-sys.float_info.max if low is None else float(low),
                to_value=sys.float_info.max if high is None else float(high),
            )
        ]
    elif spec.type == 'int':
        descriptor.integer_range = [
            IntegerRange(
                from_value=INT64_MIN if low is None else int(low),
                to_value=INT64_MAX if high is None else int(high),
            )
        ]
    return descriptor


def fixed_changes(parameters: list[Parameter], kind: type = PolicyConfig) -> list[Parameter]:
    """Those parameters that may not change once the node is configured.

    The source of time is one of them: every stamp and deadline that the node holds is of the
    former one.
    """
    fixed = [parameter for parameter in parameters if parameter.name == SIM_TIME]
    for parameter in parameters:
        axis, _, key = parameter.name.partition('.')
        field = getattr(axes_of(kind).get(axis), '__dataclass_fields__', {}).get(key)
        if field is not None and not field.metadata['live']:
            fixed.append(parameter)
    return fixed
