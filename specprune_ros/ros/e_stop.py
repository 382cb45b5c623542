"""The emergency stop as a ROS input that several publishers may share."""

from __future__ import annotations

from collections.abc import Callable

from rclpy.node import Node
from rclpy.qos import QoSCompatibility, qos_check_compatible
from rclpy.subscription import Subscription
from std_msgs.msg import Bool

from specprune_ros.ros import qos
from specprune_ros.streaming.emergency import UNHEARD, Presses

TOPIC = 'e_stop'


class EmergencyStopInput:
    """Listens to `e_stop`, and says after every message whether the stop is on.

    Args:
        node: that listens.
        tell: called with whether somebody presses.
        incompatible: called with the name of the policy in which a publisher differs, which then
            cannot be heard; it counts as pressing.
    """

    def __init__(
        self, node: Node, tell: Callable[[bool], None], incompatible: Callable[[str], None]
    ):
        self._node, self._tell, self._incompatible = node, tell, incompatible
        self._presses = Presses()
        # Humble's rclpy hands over the message alone.
        knows_sender = hasattr(Subscription, 'CallbackType')
        self._subscription = node.create_subscription(
            Bool,
            TOPIC,
            self._on_message_from if knows_sender else self._on_message,
            qos.STOPS,
            event_callbacks=qos.subscription_events(self._on_incompatible),
        )

    def destroy(self) -> None:
        """Listen no more."""
        self._node.destroy_subscription(self._subscription)

    def _on_message_from(self, msg: Bool, info: dict) -> None:
        gid = info.get('publisher_gid')  # newer than Jazzy
        self._put(msg.data, bytes(gid['data']) if gid else None)

    def _on_message(self, msg: Bool) -> None:
        self._put(msg.data, None)

    def _on_incompatible(self, policy: str) -> None:
        self._incompatible(policy)
        self._put(True, UNHEARD)

    def _put(self, on: bool, sender: bytes | None) -> None:
        self._tell(self._presses.put(on, sender, self._present()))

    def _present(self) -> set[bytes]:
        """The publishers that are there now."""
        publishers = self._node.get_publishers_info_by_topic(self._subscription.topic_name)
        present = {bytes(each.endpoint_gid) for each in publishers}
        verdicts = [qos_check_compatible(each.qos_profile, qos.STOPS)[0] for each in publishers]
        return present | {UNHEARD} if QoSCompatibility.ERROR in verdicts else present
