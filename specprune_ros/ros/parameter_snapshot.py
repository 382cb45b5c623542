"""`parameter_snapshot`: the parameter values of some nodes, once, to a parameter file.

The file is one that `--params` and `params_file` take, so that what a recording shows can be
computed again. Nodes that do not answer within WAIT_S are left out, and the log names them.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import rclpy
from rcl_interfaces.msg import Parameter as ParameterMsg
from rcl_interfaces.srv import GetParameters, ListParameters
from rclpy.executors import ExternalShutdownException
from rclpy.node import Node
from rclpy.parameter import Parameter
from rclpy.utilities import remove_ros_args

from specprune_ros.config_files import write_parameter_file
from specprune_ros.ros.params import FOREIGN
from specprune_ros.ros.process import shut_down_rclpy

WAIT_S = 60.0  # a node that loads a model answers when it is done
POLL_S = 0.2


def values_of(node: Node, target: str, end_s: float) -> dict[str, object] | None:
    """The parameters of another node, flat; rclpy's own are left out.

    Args:
        node: used for the calls, and spun.
        target: the other node's full name.
        end_s: time.monotonic() at which to give up.

    Returns:
        None when it did not answer.
    """
    found = _call(
        node, ListParameters, f'{target}/list_parameters', ListParameters.Request(), end_s
    )
    if found is None:
        return None
    names = [name for name in found.result.names if not name.startswith(FOREIGN)]
    request = GetParameters.Request(names=names)
    got = _call(node, GetParameters, f'{target}/get_parameters', request, end_s)
    if got is None:
        return None
    messages = [ParameterMsg(name=n, value=v) for n, v in zip(names, got.values, strict=True)]
    return {m.name: _plain(Parameter.from_parameter_msg(m).value) for m in messages}


def _call(node: Node, kind: type, service: str, request, end_s: float):
    """The service's answer; None when it does not come in time."""
    client = node.create_client(kind, service)
    try:
        while not client.wait_for_service(POLL_S):
            if time.monotonic() > end_s or not rclpy.ok():
                return None
        future = client.call_async(request)
        rclpy.spin_until_future_complete(
            node, future, timeout_sec=max(end_s - time.monotonic(), 0.0)
        )
        return future.result() if future.done() else None
    finally:
        node.destroy_client(client)


def _plain(value: object) -> object:
    """What YAML can write: arrays become lists."""
    return value if isinstance(value, (bool, int, float, str, type(None))) else list(value)


def snapshot(node: Node, targets: list[str], out: Path) -> int:
    """Write the parameters of those that answer; returns how many did."""
    tree, end = {}, time.monotonic() + WAIT_S
    for name in targets:
        values = values_of(node, name, end)
        if values is None:
            node.get_logger().warning(f'{name} did not answer: its parameters are not written')
            continue
        tree[name] = dict(sorted(values.items()))
        write_parameter_file(out, tree)
        node.get_logger().info(f'parameters of {name}: {out}')
    return len(tree)


def main(argv: list[str] | None = None) -> int:
    """Process entry point; 1 when no node answered."""
    words = sys.argv if argv is None else ['parameter_snapshot', *argv]
    parser = argparse.ArgumentParser(prog='parameter_snapshot', description=__doc__)
    parser.add_argument('--out', type=Path, required=True, help='the parameter file')
    parser.add_argument('nodes', nargs='+', help='full names')
    arguments = parser.parse_args(remove_ros_args(words)[1:])
    rclpy.init(args=words)
    node = Node('parameter_snapshot', start_parameter_services=False)
    count = 0
    try:
        count = snapshot(node, arguments.nodes, arguments.out)
    except (KeyboardInterrupt, ExternalShutdownException):
        pass
    finally:
        node.destroy_node()
        shut_down_rclpy()
    return 0 if count else 1


if __name__ == '__main__':
    raise SystemExit(main())
