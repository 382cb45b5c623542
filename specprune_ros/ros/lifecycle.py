"""Lifecycle nodes, from both ends: transitions that never fail unseen, and a client of them."""

from __future__ import annotations

import time
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable

import rclpy
from lifecycle_msgs.msg import Transition
from lifecycle_msgs.srv import ChangeState, GetState
from rclpy.lifecycle import LifecycleNode, LifecycleState, TransitionCallbackReturn
from rclpy.node import Node

from specprune_ros.errors import SpecPruneError, named

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
SUCCESS, FAILURE, ERROR = (
    TransitionCallbackReturn.SUCCESS,
    TransitionCallbackReturn.FAILURE,
    TransitionCallbackReturn.ERROR,
)


class ManagedNode(LifecycleNode, ABC):
    """A lifecycle node whose transitions tell why they failed; rclpy would swallow that.

    A configure that fails leaves the node unconfigured, an activate that fails inactive. Any other
    transition that raises frees everything: the node is unconfigured, and can be configured again.
    """

    _broken = 'a transition callback raised'  # why the newest transition raised

    @abstractmethod
    def _set_up(self) -> None:
        """Configure.

        Raises:
            SpecPruneError: what the user can mend.
        """

    @abstractmethod
    def _start(self) -> None:
        """Activate."""

    @abstractmethod
    def _halt(self) -> None:
        """Undo `_start`, and be quick; also where it raised half-way, or never ran."""

    @abstractmethod
    def _tear_down(self) -> None:
        """Undo `_set_up` and `_start`; also where one raised half-way, or never ran."""

    @abstractmethod
    def _fault(self, code: str, message: str, log: str = '') -> None:
        """Count a fault, and log it: `log` instead of the message, where there is one."""

    def on_configure(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Set up; on failure the node stays unconfigured."""
        return self._attempt('configure', self._set_up, self._tear_down)

    def on_activate(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Start; on failure the node stays inactive."""
        outcome = self._attempt('activate', self._start, self._halt)
        return super().on_activate(state) if outcome is SUCCESS else outcome

    def on_deactivate(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Stop at once: nothing is published from here on."""
        outcome = self._undo('deactivate', self._halt)
        return super().on_deactivate(state) if outcome is SUCCESS else outcome

    def on_cleanup(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Free what configure took."""
        return self._undo('cleanup', self._tear_down)

    def on_shutdown(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Stop and free, from any state."""
        return self._undo('shutdown', self._tear_down)

    def on_error(self, state: LifecycleState) -> TransitionCallbackReturn:
        """A transition raised: free everything and become unconfigured, to be configured again."""
        self._fault('transition', f'transition from {state.label} = failed: {self._broken}')
        self._tear_down()
        return SUCCESS

    def _LifecycleNodeMixin__change_state(self, transition_id: int) -> TransitionCallbackReturn:
        """rclpy's own, private, made safe for Humble and Jazzy.

        There a transition that does not fit the state, or that there is not, raises where nobody
        catches it, and the process ends.
        """
        try:
            return super()._LifecycleNodeMixin__change_state(transition_id)
        except RuntimeError as error:  # rclpy's RCLError is one
            self._fault('transition', f'transition {transition_id} = refused: {error}')
            return ERROR

    def _attempt(
        self, code: str, act: Callable[[], None], undo: Callable[[], None]
    ) -> TransitionCallbackReturn:
        try:
            act()
        except SpecPruneError as error:
            self._fault(error.code, str(error))
        except Exception as error:
            self._fault(code, named(error), traceback.format_exc())
        else:
            return SUCCESS
        undo()
        return FAILURE

    def _undo(self, name: str, act: Callable[[], None]) -> TransitionCallbackReturn:
        try:
            act()
        except Exception as error:
            self._broken = f'{name}: {named(error)}'
            self.get_logger().error(traceback.format_exc())
            return ERROR
        return SUCCESS


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
