"""What an active `vla_node` subscribes to. The callbacks only store, and tell that they did."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

from geometry_msgs.msg import PoseStamped
from rclpy.node import Node
from sensor_msgs.msg import CompressedImage, Image, JointState
from std_msgs.msg import String

from specprune_ros.config import RobotConfig
from specprune_ros.errors import ObservationError
from specprune_ros.inbox import JOINTS, POSE, Inbox, proprio_inputs
from specprune_ros.msg import ExecutedAction, StreamerStatus
from specprune_ros.ros import conversions, qos
from specprune_ros.types import ExecutedAction as Executed

TRANSPORTS = {'raw': (Image, ''), 'compressed': (CompressedImage, '/compressed')}


@dataclass(frozen=True, kw_only=True)
class InputEvents:
    """Who is told of what.

    Attributes:
        image: a camera's image was stored.
        state: a joint state or end-effector pose was.
        executed: a control step was executed; with the cameras' newest images.
        instruction: a text came.
        peer: action_streamer gave a sign of life.
        fault: code and message of what was refused.
        arrived: a message came on a stream.
    """

    image: Callable[[str], None]
    state: Callable[[], None]
    executed: Callable[[Executed, Mapping], None]
    instruction: Callable[[str], None]
    peer: Callable[[], None]
    fault: Callable[[str, str], None]
    arrived: Callable[[str], None]


class Inputs:
    """Subscriptions to the robot's state; each bad message is counted, and skipped.

    Args:
        node: subscribes.
        robot: which topics.
        inbox: where values go.
        events: who is told.
        frame_ids: filled: camera -> frame of its newest image.
    """

    def __init__(
        self,
        node: Node,
        robot: RobotConfig,
        inbox: Inbox,
        events: InputEvents,
        frame_ids: dict[str, str],
    ):
        self._node, self._inbox, self._events = node, inbox, events
        self._frame_ids = frame_ids
        self._subscriptions: list = []
        try:
            self._subscribe_all(robot)
        except Exception:  # what was subscribed already would go on for ever
            self.destroy()
            raise

    def destroy(self) -> None:
        """Unsubscribe."""
        for subscription in self._subscriptions:
            self._node.destroy_subscription(subscription)
        self._subscriptions.clear()

    def _subscribe_all(self, robot: RobotConfig) -> None:
        transports = robot.per_camera('camera_transports')
        for camera, topic in robot.image_topics().items():
            kind, suffix = TRANSPORTS[transports[camera]]
            self._subscribe(kind, topic + suffix, partial(self._on_image, camera), qos.SENSOR)
        states = {JOINTS: (JointState, self._on_joints), POSE: (PoseStamped, self._on_pose)}
        for topic in proprio_inputs(robot):
            kind, callback = states[topic]
            self._subscribe(kind, topic, callback, qos.SENSOR)
        self._subscribe(ExecutedAction, 'executed_action', self._on_executed, qos.EVERY_STEP)
        self._subscribe(String, '~/instruction', self._on_instruction, qos.LATCHED)
        self._subscribe(
            StreamerStatus, 'action_streamer/status', lambda _: self._events.peer(), qos.LATCHED
        )

    def _subscribe(self, kind: type, topic: str, callback, profile) -> None:
        def on_message(msg) -> None:
            try:
                callback(msg)
            except ObservationError as error:
                self._events.fault(error.code, str(error))

        subscription = self._node.create_subscription(
            kind,
            topic,
            on_message,
            profile,
            event_callbacks=qos.subscription_events(
                lambda policy: self._events.fault('qos_incompatible', mismatch(topic, policy))
            ),
        )
        self._subscriptions.append(subscription)

    def _on_image(self, camera: str, msg: Image | CompressedImage) -> None:
        field = f'cameras/{camera}'
        self._events.arrived(field)
        image = conversions.image_from_msg(msg, field)
        self._inbox.put_image(camera, self._stamp(field, msg), image)
        self._frame_ids[camera] = msg.header.frame_id
        self._events.image(camera)

    def _on_joints(self, msg: JointState) -> None:
        self._events.arrived(JOINTS)
        self._inbox.put_joints(self._stamp(JOINTS, msg), msg.name, msg.position)
        self._events.state()

    def _on_pose(self, msg: PoseStamped) -> None:
        self._events.arrived(POSE)
        self._inbox.put_pose(self._stamp(POSE, msg), *conversions.pose_from_msg(msg))
        self._events.state()

    def _on_executed(self, msg: ExecutedAction) -> None:
        self._events.arrived('executed_action')
        images = self._inbox.recent_images(self._now_ns())
        self._events.executed(conversions.executed_from_msg(msg), images)

    def _on_instruction(self, msg: String) -> None:
        self._events.instruction(msg.data)

    def _stamp(self, field: str, msg) -> int:
        """Header stamp; the time of receipt, and a fault, where the sender left it 0."""
        stamp_ns = conversions.to_ns(msg.header.stamp)
        if stamp_ns == 0:
            text = f'{field}.header.stamp = 0: taking the time of receipt'
            self._events.fault('stamp_missing', text)
            return self._now_ns()
        return stamp_ns

    def _now_ns(self) -> int:
        return self._node.get_clock().now().nanoseconds


def mismatch(topic: str, policy: str) -> str:
    """What to tell of a peer whose quality of service does not match."""
    return f'{topic}.{policy} = incompatible: a peer on this topic is not heard, or hears nothing'
