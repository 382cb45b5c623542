"""Quality of service of every topic, and why; and who is told when a peer's does not match."""

from collections.abc import Callable

from rclpy.duration import Duration
from rclpy.qos import (
    DurabilityPolicy,
    HistoryPolicy,
    QoSProfile,
    ReliabilityPolicy,
    qos_policy_name_from_kind,
)

try:
    from rclpy.event_handler import PublisherEventCallbacks, SubscriptionEventCallbacks
except ImportError:  # Humble
    from rclpy.qos_event import PublisherEventCallbacks, SubscriptionEventCallbacks

# What camera drivers and joint-state broadcasters publish, and overlays; only the newest value
# matters. A best-effort subscription also takes from a reliable publisher. A viewer that asks for
# reliable images sees no overlay, and is told of as `qos_incompatible`: one that is slow, or
# behind a bad network, must not make the node send a picture twice.
SENSOR = QoSProfile(
    depth=1, history=HistoryPolicy.KEEP_LAST, reliability=ReliabilityPolicy.BEST_EFFORT
)
# Replayed inputs: any subscriber matches a reliable publisher.
RELIABLE = QoSProfile(
    depth=1, history=HistoryPolicy.KEEP_LAST, reliability=ReliabilityPolicy.RELIABLE
)
REPORTS = QoSProfile(
    depth=5, history=HistoryPolicy.KEEP_LAST, reliability=ReliabilityPolicy.RELIABLE
)


def chunk(valid_for_s: float) -> QoSProfile:
    """Action chunks: the middleware itself drops one that is no longer valid."""
    return QoSProfile(
        depth=1,
        history=HistoryPolicy.KEEP_LAST,
        reliability=ReliabilityPolicy.RELIABLE,
        lifespan=Duration(nanoseconds=round(valid_for_s * 1e9)),
    )


# Executed actions: every one counts for the displacement, so a burst must not be lost.
EVERY_STEP = QoSProfile(
    depth=64, history=HistoryPolicy.KEEP_LAST, reliability=ReliabilityPolicy.RELIABLE
)
# What goes to a controller: an older command is worth nothing once there is a newer one.
COMMANDS = RELIABLE
# The instruction, a status: they reach a node that starts later.
LATCHED = QoSProfile(
    depth=1,
    history=HistoryPolicy.KEEP_LAST,
    reliability=ReliabilityPolicy.RELIABLE,
    durability=DurabilityPolicy.TRANSIENT_LOCAL,
)
# Presses of several buttons, each latched: at depth 1 the release of one would take the place of
# another's press before anybody looks.
STOPS = QoSProfile(
    depth=64,
    history=HistoryPolicy.KEEP_LAST,
    reliability=ReliabilityPolicy.RELIABLE,
    durability=DurabilityPolicy.TRANSIENT_LOCAL,
)
# rqt_robot_monitor and the aggregator subscribe reliably: best effort would reach nobody.
DIAGNOSTICS = QoSProfile(
    depth=10, history=HistoryPolicy.KEEP_LAST, reliability=ReliabilityPolicy.RELIABLE
)


# Of a publisher that nobody can fail to match. Every event costs the executor a hundredth of a
# millisecond at every turn, and rclpy makes two for each topic unless it is told not to.
NO_EVENTS = PublisherEventCallbacks(use_default_callbacks=False)


def subscription_events(tell: Callable[[str], None]) -> SubscriptionEventCallbacks:
    """Tells the name of the policy in which a publisher is incompatible: nothing comes from it."""
    return SubscriptionEventCallbacks(incompatible_qos=_telling(tell), use_default_callbacks=False)


def publisher_events(tell: Callable[[str], None]) -> PublisherEventCallbacks:
    """Tells the name of the policy in which a subscriber is incompatible: nothing reaches it."""
    return PublisherEventCallbacks(incompatible_qos=_telling(tell), use_default_callbacks=False)


def _telling(tell: Callable[[str], None]) -> Callable[[object], None]:
    return lambda event: tell(qos_policy_name_from_kind(event.last_policy_kind))
