"""Parameters on a command line; imports no ROS."""

from __future__ import annotations

import json
from collections.abc import Mapping


def ros_arguments(parameters: Mapping[str, object]) -> list[str]:
    """`--ros-args -p name:=value ...`, values quoted so that ROS reads back what was meant.

    ROS reads values as YAML: a bare `yes` or `y` would be a boolean, `pick: up` a mapping. JSON is
    YAML, and quotes every text.
    """
    words = ['--ros-args']
    for name, value in parameters.items():
        words += ['-p', f'{name}:={json.dumps(value)}']
    return words
