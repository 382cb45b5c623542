"""Drive another process's lifecycle node: what `ros2 lifecycle set` does, without ros2cli."""

from __future__ import annotations

import time

import rclpy
from lifecycle_msgs.msg import Transition
from lifecycle_msgs.srv import ChangeState, GetState
from rclpy.node import Node

TRANSITIONS = {
    'configure': Transition.TRANSITION_CONFIGURE,
    'activate': Transition.TRANSITION_ACTIVATE,
    'deactivate': Transition.TRANSITION_DEACTIVATE,
    'cleanup': Transition.TRANSITION_CLEANUP,
}
REACHES = {
    'configure': 'inactive',
    'activate': 'active',
    'deactivate': 'inactive',
    'cleanup': 'unconfigured',
}
ASK_S = 10.0  # without an answer after which the state is looked at
SERVICE_TIMEOUT_S = 20.0  # for the node to appear
CALL_TIMEOUT_S = 120.0  # for a transition; configure loads the model


class LifecycleClient:
    """Calls one lifecycle node's services.

    Args:
        node: used for the calls; spun while one waits, so nobody else may spin it then.
        target: the lifecycle node's name.
    """

    def __init__(self, node: Node, target: str):
        self._node = node
        self._target = target
        self._change = node.create_client(ChangeState, f'{target}/change_state')
        self._get = node.create_client(GetState, f'{target}/get_state')

    def wait(self, timeout_s: float = SERVICE_TIMEOUT_S) -> None:
        """Wait until the node is there.

        Raises:
            TimeoutError: it is not.
        """
        end = time.monotonic() + timeout_s
        for client in (self._change, self._get):
            if not client.wait_for_service(max(end - time.monotonic(), 0.0)):
                raise TimeoutError(f'{self._target} did not appear within {timeout_s:g} s')

    def change(self, transition: str) -> bool:
        """Ask for a transition, a key of TRANSITIONS.

        Returns:
            Whether it succeeded.

        Raises:
            TimeoutError: no answer, and no state either.
        """
        request = ChangeState.Request()
        request.transition.id = TRANSITIONS[transition]
        future = self._change.call_async(request)
        end = time.monotonic() + CALL_TIMEOUT_S
        while time.monotonic() < end:
            rclpy.spin_until_future_complete(self._node, future, timeout_sec=ASK_S)
            if future.done():
                return future.result().success
            # An answer can be lost on a busy machine. A node that tells its state is through.
            asked = self._get.call_async(GetState.Request())
            rclpy.spin_until_future_complete(self._node, asked, timeout_sec=ASK_S)
            if asked.done() and not future.done():
                return asked.result().current_state.label == REACHES[transition]
        raise TimeoutError(f'{self._target} did not answer within {CALL_TIMEOUT_S:g} s')

    def request(self, transition: str) -> None:
        """Ask for a transition without waiting for the answer."""
        request = ChangeState.Request()
        request.transition.id = TRANSITIONS[transition]
        self._change.call_async(request)

    def state(self) -> str:
        """The node's state, e.g. 'active'.

        Raises:
            TimeoutError: no answer.
        """
        return self._call(self._get, GetState.Request()).current_state.label

    def _call(self, client, request):
        future = client.call_async(request)
        rclpy.spin_until_future_complete(self._node, future, timeout_sec=CALL_TIMEOUT_S)
        if not future.done():
            raise TimeoutError(f'{self._target} did not answer within {CALL_TIMEOUT_S:g} s')
        return future.result()
