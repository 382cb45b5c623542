"""A robot's worth of topics around a vla_node, and a client of its tasks."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import rclpy
from rclpy.action import ActionClient
from ros_world import ANSWER_S, FAST_NODE, ROOT, START_S, NodeProcess, World
from std_msgs.msg import Bool, String
from std_srvs.srv import SetBool, Trigger

from specprune_ros.action import RunTask
from specprune_ros.msg import ModelInfo, VlaStatus
from specprune_ros.ros import qos
from specprune_ros.ros.arguments import ros_arguments
from specprune_ros.srv import StartTask
from specprune_ros.tasks import NodeState

HERE = Path(__file__).resolve().parent
FAULTY_NODE = {
    **FAST_NODE,
    'runtime.query_rate_hz': 20.0,
    'runtime.max_failures': 3,
    'runtime.input_timeout_s': 1.0,
    'runtime.inference_deadline_s': 0.5,
}


class FaultyProcess(NodeProcess):
    """vla_node with the policy of faulty_policy.py."""

    def __init__(self, parameters: dict[str, object] | None = None, *extra: str):
        command = [sys.executable, str(HERE / 'faulty_policy.py')]
        command += [*ros_arguments({**FAULTY_NODE, **(parameters or {})}), *extra]
        self._log = tempfile.TemporaryFile(mode='w+')  # noqa: SIM115 - lives as long as the process
        # A script's own folder comes first in Python's path, not the checkout.
        path = os.pathsep.join([str(ROOT), os.environ.get('PYTHONPATH', '')])
        self.process = subprocess.Popen(
            command,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            env={**os.environ, 'PYTHONPATH': path},
        )


class TaskWorld(World):
    """A World that also runs tasks, and hears the status."""

    def __init__(self, name: str = 'task_world', **kwargs):
        super().__init__(name, **kwargs)
        self.status = VlaStatus()
        self.history: list[VlaStatus] = []
        self.models: list[ModelInfo] = []
        self.feedback: list[RunTask.Feedback] = []
        self.goals = ActionClient(self, RunTask, f'{self.target}/run_task')
        self.emergency = self.create_publisher(Bool, 'e_stop', qos.LATCHED)
        self.mode = self.create_publisher(String, f'{self.target}/mode', qos.LATCHED)
        self.create_subscription(VlaStatus, f'{self.target}/status', self._on_status, qos.LATCHED)
        self.create_subscription(
            ModelInfo, f'{self.target}/model_info', self.models.append, qos.LATCHED
        )
        self._task_clients: dict[str, object] = {}

    @property
    def state(self) -> NodeState:
        return NodeState(self.status.state)

    def activate(self) -> None:
        """Configure and activate; no task."""
        self.lifecycle.wait(START_S)
        assert self.lifecycle.change('configure')
        assert self.lifecycle.change('activate')
        assert self.goals.wait_for_server(START_S)
        assert self.reaches(NodeState.IDLE)

    def behave(self, mode: str) -> None:
        """Tell the faulty policy what to do from its next query on."""
        self.mode.publish(String(data=mode))
        self.run(0.1)

    def stop(self, on: bool = True) -> None:
        self.emergency.publish(Bool(data=on))

    def reaches(self, state: NodeState, seconds: float = ANSWER_S) -> bool:
        """Whether the status says so before long."""
        return self.run(seconds, lambda: self.status.state == state)

    def told(self, code: int, seconds: float = ANSWER_S) -> bool:
        """Whether the status shows a fault before long."""
        return self.run(seconds, lambda: self.status.fault_code == code)

    # Services --------------------------------------------------------------------------------

    def call(self, kind: type, service: str, request=None):
        """The answer of one of the node's services; the streams go on meanwhile."""
        future = self.ask(kind, service, request)
        assert self.run(ANSWER_S, future.done), service
        return future.result()

    def ask(self, kind: type, service: str, request=None):
        """A future of the answer."""
        client = self._task_clients.get(service)
        if client is None:
            client = self.create_client(kind, f'{self.target}/{service}')
            self._task_clients[service] = client
            assert client.wait_for_service(START_S)
        return client.call_async(request or kind.Request())

    def trigger(self, service: str) -> Trigger.Response:
        return self.call(Trigger, service)

    def switch(self, service: str, on: bool) -> SetBool.Response:
        return self.call(SetBool, service, SetBool.Request(data=on))

    def begin(self, instruction: str = 'go', **limits) -> StartTask.Response:
        """Start a task by the service."""
        return self.call(
            StartTask, 'start_task', StartTask.Request(instruction=instruction, **limits)
        )

    def answer_s(self, future) -> float:
        """Seconds until a future is done, with the finest clock that one process has."""
        start = time.monotonic()
        while not future.done():
            assert time.monotonic() - start < ANSWER_S
            rclpy.spin_once(self, timeout_sec=0.001)
        return time.monotonic() - start

    # The action ------------------------------------------------------------------------------

    def send(self, instruction: str = 'go', **limits):
        """The handle of a goal; not accepted, see its `accepted`."""
        future = self.goals.send_goal_async(
            RunTask.Goal(instruction=instruction, **limits),
            feedback_callback=lambda msg: self.feedback.append(msg.feedback),
        )
        assert self.run(ANSWER_S, future.done)
        return future.result()

    def outcome(self, handle, seconds: float = ANSWER_S):
        """Goal status and RunTask.Result of an accepted goal."""
        future = handle.get_result_async()
        assert self.run(seconds, future.done), 'no result'
        return future.result().status, future.result().result

    def ends(self, handle, act: Callable[[], object]):
        """Do something, then the goal's outcome."""
        future = handle.get_result_async()
        self.run(0.1)
        act()
        assert self.run(ANSWER_S, future.done), 'no result'
        return future.result().status, future.result().result

    def _on_status(self, msg: VlaStatus) -> None:
        self.status = msg
        self.history.append(msg)
