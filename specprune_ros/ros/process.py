"""How a node's process starts and ends."""

from __future__ import annotations

import gc
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Protocol

import rclpy
from rclpy.clock import Clock, ClockType
from rclpy.exceptions import InvalidTopicNameException, ParameterException
from rclpy.executors import ExternalShutdownException, SingleThreadedExecutor
from rclpy.node import Node
from rclpy.signals import SignalHandlerOptions

from specprune_ros.errors import ConfigError

SPIN_S = 0.1  # longest time until a signal is noticed
# For how long one thread may hold the interpreter while another wants it. Python's 5 ms would lie
# between an image and the inference thread, and between that and the chunk on the wire; half a
# millisecond was a sixth of what the node adds.
SWITCH_S = 1e-4


class StoppableNode(Protocol):
    """An rclpy node that can stop its own threads."""

    def shut_down(self) -> bool:
        """End threads and free what they use; False when a thread would not end."""

    def destroy_node(self) -> None:
        """As rclpy.node.Node does."""


class Paced:
    """Calls something once per period, where it is given the chance often enough.

    Args:
        period_s: steady time between two calls.
        call: what is called.
    """

    def __init__(self, period_s: float, call: Callable[[], None]):
        self._period_s, self._call = period_s, call
        self._next_s = time.monotonic()

    def __call__(self) -> None:
        """Call it if it is time."""
        now_s = time.monotonic()
        if now_s >= self._next_s:
            self._next_s = now_s + self._period_s
            self._call()


def control_clock(node: Node) -> Clock:
    """The clock for a node's control loop: simulated time, else one that no one sets back.

    A timer on the system's clock waits until that has caught up with where it was.
    """
    if node.get_parameter('use_sim_time').value:
        return node.get_clock()
    return Clock(clock_type=ClockType.STEADY_TIME)


class Mailbox:
    """Calls that other threads, or callbacks in which they would come too early, leave for later.

    They run in the executor's thread, in order.

    Args:
        node: whose executor runs them.
    """

    def __init__(self, node: Node):
        self._calls: deque[Callable[[], None]] = deque()
        self._guard = node.create_guard_condition(self._run)

    def post(self, call: Callable[[], None]) -> None:
        """Leave a call."""
        self._calls.append(call)
        self._guard.trigger()

    def _run(self) -> None:
        for _ in range(len(self._calls)):
            self._calls.popleft()()


def shut_down_rclpy() -> None:
    """Shut rclpy down unless it is already (rclpy.try_shutdown() is newer than Humble)."""
    if rclpy.ok():
        rclpy.shutdown()


def spin_process(
    make_node: Callable[[threading.Event], StoppableNode], args: list[str] | None = None
) -> int:
    """Run one node until SIGINT or SIGTERM, or until it says so; then tear it down.

    rclpy's own handlers shut the context down at once, under the node's feet: then nothing can be
    published any more and the lifecycle's shutdown never runs. So we take the signals ourselves.

    Args:
        make_node: takes the event that stops the process: to look at during long work, or to set.
        args: command line for rclpy.

    Returns:
        The process's exit status: 0, or 2 when a parameter or a file of the package is bad.
    """
    sys.setswitchinterval(SWITCH_S)
    rclpy.init(args=args, signal_handler_options=SignalHandlerOptions.NO)
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    try:
        node = make_node(stop)
    except (ParameterException, ConfigError, InvalidTopicNameException) as error:
        print(error, file=sys.stderr)
        shut_down_rclpy()
        return 2
    executor = SingleThreadedExecutor()
    executor.add_node(node)
    clean = False
    try:
        while not stop.is_set() and rclpy.ok():
            executor.spin_once(timeout_sec=SPIN_S)
    except ExternalShutdownException:
        pass
    finally:
        clean = node.shut_down()
        executor.shutdown(timeout_sec=1.0)
        node.destroy_node()
        shut_down_rclpy()
        # What still refers to the DDS participant must go now, or peers see a ghost; the rest,
        # torch and transformers, would cost the interpreter's last collections a second.
        del node, executor
        gc.collect()
        gc.freeze()
        # Python gives handlers back before it ends: a second Ctrl-C would kill it then.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
    if not clean:
        # A thread is still inside native code; the interpreter would abort under it.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
    return 0
