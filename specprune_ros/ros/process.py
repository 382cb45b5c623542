"""How a node's process starts and ends."""

from __future__ import annotations

import gc
import signal
import sys
import threading
from collections.abc import Callable
from typing import Protocol

import rclpy
from rclpy.exceptions import ParameterException
from rclpy.executors import ExternalShutdownException, SingleThreadedExecutor
from rclpy.signals import SignalHandlerOptions


class StoppableNode(Protocol):
    """An rclpy node that can stop its own threads."""

    def shut_down(self) -> None:
        """End threads and free what they use; the node is destroyed next."""

    def destroy_node(self) -> None:
        """As rclpy.node.Node does."""


SPIN_S = 0.1  # longest time until a signal is noticed


def spin_process(
    make_node: Callable[[], StoppableNode],
    args: list[str] | None = None,
    *,
    done: threading.Event | None = None,
) -> int:
    """Run one node until SIGINT, SIGTERM, or `done`; then tear it down.

    rclpy's own handlers shut the context down at once, under the node's feet: then nothing can be
    published any more and the lifecycle's shutdown never runs. So we take the signals ourselves.

    Returns:
        The process's exit status: 0, or 2 when a parameter is bad.
    """
    rclpy.init(args=args, signal_handler_options=SignalHandlerOptions.NO)
    stop = done or threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    try:
        node = make_node()
    except ParameterException as error:
        print(error, file=sys.stderr)
        rclpy.try_shutdown()
        return 2
    executor = SingleThreadedExecutor()
    executor.add_node(node)
    try:
        while not stop.is_set() and rclpy.ok():
            executor.spin_once(timeout_sec=SPIN_S)
    except ExternalShutdownException:
        pass
    finally:
        node.shut_down()
        executor.shutdown(timeout_sec=1.0)
        node.destroy_node()
        rclpy.try_shutdown()
        # What still refers to the DDS participant must go now, or peers see a ghost; the rest,
        # torch and transformers, would cost the interpreter's last collections a second.
        del node, executor
        gc.collect()
        gc.freeze()
    return 0
