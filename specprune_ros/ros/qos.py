"""Quality of service of every topic, and why."""

from rclpy.duration import Duration
from rclpy.qos import DurabilityPolicy, HistoryPolicy, QoSProfile, ReliabilityPolicy

# What camera drivers and joint-state broadcasters publish; only the newest value matters. A
# best-effort subscription also takes from a reliable publisher.
SENSOR = QoSProfile(
    depth=1, history=HistoryPolicy.KEEP_LAST, reliability=ReliabilityPolicy.BEST_EFFORT
)
# Overlays and replayed inputs: any subscriber matches a reliable publisher.
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
# The instruction reaches a node that starts later.
LATCHED = QoSProfile(
    depth=1,
    history=HistoryPolicy.KEEP_LAST,
    reliability=ReliabilityPolicy.RELIABLE,
    durability=DurabilityPolicy.TRANSIENT_LOCAL,
)
# rqt_robot_monitor and the aggregator subscribe reliably: best effort would reach nobody.
DIAGNOSTICS = QoSProfile(
    depth=10, history=HistoryPolicy.KEEP_LAST, reliability=ReliabilityPolicy.RELIABLE
)
