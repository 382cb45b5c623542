"""What `vla_node` publishes: chunks and reports, overlays, its status and its model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial

from rclpy.node import Node
from sensor_msgs.msg import Image

from specprune_ros.config import PolicyConfig
from specprune_ros.faults import FAULTS
from specprune_ros.images import as_rgb
from specprune_ros.msg import ActionChunk, PruningDiagnostics, VlaStatus
from specprune_ros.overlay import draw_overlay
from specprune_ros.ros import conversions, qos
from specprune_ros.tasks import TaskMachine
from specprune_ros.types import PolicyResult, PruneReport
from specprune_ros.worker import Job, SpareThread


def fault_number(code: str) -> int:
    """The number of a fault; 0 for none, that of `error` for one without a number."""
    return FAULTS.get(code, FAULTS['error']).number if code else 0


def stamped(result: PolicyResult, now_ns: int, epoch: int) -> PolicyResult:
    """The result as the node gives it out: valid from now on, in the node's epoch."""
    chunk = dataclasses.replace(result.chunk, stamp_ns=now_ns, epoch=epoch)
    return PolicyResult(chunk=chunk, report=dataclasses.replace(result.report, epoch=epoch))


class ChunkPublisher:
    """~/action_chunk and ~/pruning.

    Args:
        node: publishes.
        config: of the robot.
        tell: told of a subscriber whose quality of service does not match.
    """

    def __init__(self, node: Node, config: PolicyConfig, tell: Callable[[str, str], None]):
        self._node = node
        profile = qos.chunk(config.robot.chunk_validity_s)
        self._chunk, self._report = (
            node.create_publisher(
                kind, topic, quality, event_callbacks=qos.publisher_events(partial(tell, topic))
            )
            for kind, topic, quality in (
                (ActionChunk, '~/action_chunk', profile),
                (PruningDiagnostics, '~/pruning', qos.REPORTS),
            )
        )

    @property
    def has_reader(self) -> bool:
        """Whether anybody subscribes to the chunks."""
        return self._chunk.get_subscription_count() > 0

    def publish_chunk(self, msg: ActionChunk) -> None:
        """Publish a chunk."""
        self._chunk.publish(msg)

    def publish_report(self, report: PruneReport) -> None:
        """Publish a report."""
        self._report.publish(conversions.report_to_msg(report))

    def destroy(self) -> None:
        """Remove the topics."""
        for publisher in (self._chunk, self._report):
            self._node.destroy_publisher(publisher)


class OverlayPublisher:
    """~/overlay/<camera>, drawn in a thread of its own that gives way to inference.

    Args:
        node: publishes.
        config: asked anew for every overlay: its rate and opacity are live.
        in_the_way: whether inference has something to do.
        is_valid: whether what was asked for in an epoch may still be shown.
        frame_ids: camera -> frame of its newest image.
        on_error: told what went wrong in the thread.
        tell: told of a subscriber whose quality of service does not match.
    """

    def __init__(
        self,
        node: Node,
        config: Callable[[], PolicyConfig],
        in_the_way: Callable[[], bool],
        is_valid: Callable[[int], bool],
        frame_ids: dict[str, str],
        on_error: Callable[[Exception], None],
        tell: Callable[[str, str], None],
    ):
        self._node, self._config, self._is_valid = node, config, is_valid
        self._frame_ids = frame_ids
        self._publishers = {
            name: node.create_publisher(
                Image,
                f'~/overlay/{name}',
                qos.SENSOR,
                event_callbacks=qos.publisher_events(partial(tell, f'~/overlay/{name}')),
            )
            for name in config().robot.camera_names
        }
        self._thread: SpareThread[tuple[Job, PolicyResult]] = SpareThread(
            self._draw, in_the_way, lambda: config().runtime.overlay_rate_hz, on_error
        )

    def offer(self, job: Job, result: PolicyResult) -> None:
        """A result to draw, if there is time."""
        if any(each.get_subscription_count() for each in self._publishers.values()):
            self._thread.offer((job, result))

    def destroy(self, timeout_s: float) -> None:
        """Remove the topics, when the thread has ended or the time is up."""
        self._thread.stop(timeout_s)
        for publisher in self._publishers.values():
            self._node.destroy_publisher(publisher)

    def _draw(self, item: tuple[Job, PolicyResult]) -> None:
        job, result = item
        for camera, publisher in self._publishers.items():
            if publisher.get_subscription_count() == 0:
                continue
            self._thread.give_way()
            image = as_rgb(job.observation.images[camera])
            opacity = self._config().runtime.overlay_opacity
            overlay = draw_overlay(image, result.report, camera, opacity)
            msg = conversions.image_to_msg(
                overlay,
                job.observation.image_stamps_ns[camera],
                self._frame_ids.get(camera, ''),
            )
            # Not under the node's gate: nobody acts on a picture, so one that goes out while the
            # task ends does no harm, whereas a chunk or an emergency stop must not wait for it.
            if not self._is_valid(job.ticket):
                return
            publisher.publish(msg)


class StatusPublisher:
    """~/status, latched: at every change, and as a heartbeat.

    Args:
        node: publishes.
        machine: the task's state.
        newest_fault: code and message.
    """

    def __init__(
        self, node: Node, machine: TaskMachine, newest_fault: Callable[[], tuple[str, str]]
    ):
        self._machine, self._newest_fault = machine, newest_fault
        self._now = lambda: node.get_clock().now().to_msg()
        self._publisher = node.create_publisher(
            VlaStatus, '~/status', qos.LATCHED, event_callbacks=qos.NO_EVENTS
        )
        self._told: tuple = ()
        self.dense = False
        self.dry_run = True

    def publish(self, *, heartbeat: bool = False) -> None:
        """Publish what changed, or whatever it is."""
        machine, task = self._machine, self._machine.task
        code, message = self._newest_fault()
        waiting_for = task.waiting_for if task else ''
        # An age in `waiting_for` or a message changes all the time: the heartbeat shows it.
        waiting = waiting_for.partition(' = ')[0]
        state, dense, dry_run = machine.state, self.dense, self.dry_run
        key = (state, machine.epoch, machine.task_id, waiting, code, dense, dry_run)
        if not heartbeat and key == self._told:
            return
        self._told = key
        msg = VlaStatus(
            state=state,
            epoch=machine.epoch,
            task_id=machine.task_id,
            instruction=task.goal.instruction if task else '',
            waiting_for=waiting_for,
            fault_code=fault_number(code),
            fault_message=message,
            dense=dense,
            dry_run=dry_run,
        )
        msg.header.stamp = self._now()
        self._publisher.publish(msg)
