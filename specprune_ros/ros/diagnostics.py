"""`/diagnostics` messages from a node's health."""

from __future__ import annotations

from collections.abc import Mapping

from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus, KeyValue
from rclpy.node import Node

from specprune_ros.health import Health
from specprune_ros.ros.conversions import to_time

OK, WARN, ERROR, STALE = (
    DiagnosticStatus.OK,
    DiagnosticStatus.WARN,
    DiagnosticStatus.ERROR,
    DiagnosticStatus.STALE,
)
PERIOD_S = 1.0


def node_name(node: Node) -> str:
    """The node's name with its namespace: /diagnostics is shared by all robots of a domain."""
    return node.get_fully_qualified_name().lstrip('/')


def status(name: str, level: bytes, message: str, values: Mapping[str, str]) -> DiagnosticStatus:
    """One status line."""
    return DiagnosticStatus(
        name=name,
        level=level,
        message=message,
        values=[KeyValue(key=key, value=value) for key, value in values.items()],
    )


def fault_status(node: str, health: Health) -> DiagnosticStatus:
    """Faults by code; WARN while they go on."""
    counts, messages, recent = health.faults()
    values = {code: str(count) for code, count in sorted(counts.items())}
    values |= {f'{code} (last)': message for code, message in sorted(messages.items())}
    total = sum(counts.values())
    if recent:
        return status(f'{node}: faults', WARN, f'{recent} new, {total} in all', values)
    return status(f'{node}: faults', OK, f'{total} in all', values)


def array(stamp_ns: int, hardware: str, statuses: list[DiagnosticStatus]) -> DiagnosticArray:
    """The message that carries them."""
    for entry in statuses:
        entry.hardware_id = hardware
    msg = DiagnosticArray(status=statuses)
    msg.header.stamp = to_time(stamp_ns)
    return msg
