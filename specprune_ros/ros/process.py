"""How a node's process starts and ends."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable

import rclpy
from rclpy.executors import ExternalShutdownException, SingleThreadedExecutor
from rclpy.node import Node
from rclpy.signals import SignalHandlerOptions

SPIN_S = 0.1  # longest time until a signal is noticed


def spin_process(
    make_node: Callable[[], Node],
    args: list[str] | None = None,
    *,
    done: threading.Event | None = None,
) -> int:
    """Run one node until SIGINT, SIGTERM, or `done`; then tear it down.

    rclpy's own handlers shut the context down at once, under the node's feet: then nothing can be
    published any more and the lifecycle's shutdown never runs. So we take the signals ourselves.

    Returns:
        The process's exit status, 0.
    """
    rclpy.init(args=args, signal_handler_options=SignalHandlerOptions.NO)
    stop = done or threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    node = make_node()
    executor = SingleThreadedExecutor()
    executor.add_node(node)
    try:
        while not stop.is_set() and rclpy.ok():
            executor.spin_once(timeout_sec=SPIN_S)
    except ExternalShutdownException:
        pass
    finally:
        shut_down = getattr(node, 'shut_down', None)
        if shut_down is not None:
            shut_down()
        executor.shutdown(timeout_sec=1.0)
        node.destroy_node()
        rclpy.try_shutdown()
    return 0
