"""`replay_node`: plays a recording as camera, robot-state, executed-action and instruction topics.

Stamps are those of now, so that a node under test sees fresh inputs; distances between events are
the recording's, divided by `rate`.
"""

from __future__ import annotations

import dataclasses
import threading
import time

import cv2
from diagnostic_msgs.msg import DiagnosticArray
from geometry_msgs.msg import PoseStamped
from rcl_interfaces.msg import FloatingPointRange, ParameterDescriptor
from rclpy.node import Node
from sensor_msgs.msg import CompressedImage, Image, JointState
from std_msgs.msg import String

from specprune_ros.config import RobotConfig
from specprune_ros.errors import ConfigError, ObservationError, SpecPruneError
from specprune_ros.health import Health
from specprune_ros.images import CompressedImage as EncodedImage
from specprune_ros.images import as_rgb
from specprune_ros.inbox import JOINTS, POSE
from specprune_ros.msg import ExecutedAction as ExecutedActionMsg
from specprune_ros.recordings import Recording, open_recording
from specprune_ros.recordings.base import (
    CameraEvent,
    Event,
    InstructionEvent,
    JointEvent,
    PoseEvent,
)
from specprune_ros.ros import conversions, diagnostics, qos
from specprune_ros.ros.params import FOREIGN
from specprune_ros.ros.process import spin_process
from specprune_ros.types import ExecutedAction

NS = 1_000_000_000
JPEG_QUALITY = 90
POLL_S = 0.05
STOP_S = 1.0
TRANSPORTS = {'raw': (Image, ''), 'compressed': (CompressedImage, '/compressed')}


class ReplayNode(Node):
    """Plays one recording.

    A recording that cannot be played is one ERROR in `/diagnostics` and the log; the node stays
    up to say so, and `exit_at_end` makes it leave.

    Args:
        stop: ends the process when set.
        failed: set when the recording could not be played.
    """

    def __init__(self, stop: threading.Event | None = None, failed: threading.Event | None = None):
        super().__init__('replay_node')
        self._stop = stop or threading.Event()
        self._failed = failed or threading.Event()
        self._halt = threading.Event()
        self._health = Health()
        self._declare()
        for name, given in getattr(self, '_parameter_overrides', {}).items():
            if not self.has_parameter(name) and not name.startswith(FOREIGN):
                self._fault(ConfigError(name, given.value, 'unknown parameter, ignored'))
        self._sinks: dict[str, object] = {}
        self._played = 0
        self._state = 'waiting'
        self._diagnostics = self.create_publisher(DiagnosticArray, '/diagnostics', qos.DIAGNOSTICS)
        self.create_timer(diagnostics.PERIOD_S, self._publish_diagnostics)
        self._thread = threading.Thread(target=self._run, name='replay', daemon=True)
        self._thread.start()

    def shut_down(self) -> bool:
        """Stop playing; False when the thread would not end."""
        self._halt.set()
        self._thread.join(STOP_S)
        return not self._thread.is_alive()

    def _declare(self) -> None:
        def declare(name: str, default: object, doc: str, low=None, high=None) -> None:
            descriptor = ParameterDescriptor(description=doc, dynamic_typing=low is not None)
            if low is not None:
                descriptor.floating_point_range = [
                    FloatingPointRange(from_value=low, to_value=high)
                ]
            self.declare_parameter(name, default, descriptor)

        declare('recording', '', 'rosbag2 folder or file, .npz observation, or video')
        declare('rate', 1.0, 'speed, 1 is as recorded', 0.01, 100.0)
        declare('loop', False, 'start again at the end')
        declare('transport', 'raw', 'raw or compressed image topics')
        declare('instruction', '', "the task instead of the recording's")
        declare('camera', 'side', "a video's camera name")
        declare('cameras', [''], 'cameras of a bag by topic, as name=topic; empty: all there are')
        declare(
            'image_topics',
            [''],
            "the robot's cameras as name=topic, without transport: what is played where, and, "
            'where a bag holds all of them, which topic is which camera',
        )
        declare('instruction_topic', 'vla_node/instruction', 'where the instruction goes')
        declare(
            'wait_for_subscriber_s', 10.0, 'wait this long for an image subscriber', 0.0, 600.0
        )
        declare('exit_at_end', False, 'end the process at the end of the recording')

    def _value(self, name: str):
        return self.get_parameter(name).value

    def _pairs(self, name: str) -> dict[str, str]:
        """What a parameter of the form name=topic says."""
        return dict(text.split('=', 1) for text in self._value(name) if '=' in text)

    def _robot(self) -> RobotConfig | None:
        """The cameras that are known by their topics."""
        topics = self._pairs('image_topics')
        if not topics:
            return None
        names, topics = zip(*topics.items(), strict=True)
        transports = (self._value('transport'),)
        return RobotConfig(camera_names=names, camera_topics=topics, camera_transports=transports)

    def _run(self) -> None:
        try:
            recording = self._open()
            self._make_publishers(recording)
            self._wait_for_subscriber(recording)
            while self._play(recording) and self._value('loop'):
                pass
            if not self._halt.is_set():
                self._state = 'ended'
                self.get_logger().info(f'end of {recording.path}: {self._played} events')
        except SpecPruneError as error:
            self._failed.set()
            self._state = 'failed'
            self._fault(error)
        if self._value('exit_at_end'):
            self._stop.set()

    def _open(self) -> Recording:
        path, transport = self._value('recording'), self._value('transport')
        if not path:
            raise ConfigError('recording', path, 'names no recording')
        if transport not in TRANSPORTS:
            raise ConfigError('transport', transport, 'must be raw or compressed')
        recording = open_recording(
            path,
            cameras=self._pairs('cameras'),
            camera=self._value('camera'),
            instruction=self._value('instruction'),
            robot=self._robot(),
        )
        self.get_logger().info(
            f'{path}: {recording.duration_s:.1f} s, cameras {", ".join(recording.cameras)}, '
            f'{len(recording.joint_names)} joints, '
            f'{"with" if recording.has_poses else "without"} end-effector poses, '
            f'{"with" if recording.has_actions else "without"} executed actions'
        )
        return recording

    def _make_publishers(self, recording: Recording) -> None:
        kind, suffix = TRANSPORTS[self._value('transport')]
        topics = self._pairs('image_topics')
        for name in recording.cameras:
            base = topics.get(name, f'cameras/{name}/image_raw')
            self._sinks[name] = self.create_publisher(kind, base + suffix, qos.RELIABLE)
        topic = self._value('instruction_topic')
        self._sinks['/joints'] = self.create_publisher(JointState, JOINTS, qos.RELIABLE)
        if recording.has_poses:
            self._sinks['/pose'] = self.create_publisher(PoseStamped, POSE, qos.RELIABLE)
        self._sinks['/instruction'] = self.create_publisher(String, topic, qos.LATCHED)
        self._sinks['/executed'] = self.create_publisher(
            ExecutedActionMsg, 'executed_action', qos.EVERY_STEP
        )

    def _wait_for_subscriber(self, recording: Recording) -> None:
        end = time.monotonic() + self._value('wait_for_subscriber_s')
        first = self._sinks[recording.cameras[0]]
        if first.get_subscription_count() == 0 and time.monotonic() < end:
            self.get_logger().info(
                f'waiting for a subscriber of {first.topic_name}, '
                f'{self._value("wait_for_subscriber_s"):g} s at most'
            )
        while first.get_subscription_count() == 0 and time.monotonic() < end:
            if self._halt.wait(POLL_S):
                return

    def _play(self, recording: Recording) -> bool:
        """One pass through the recording, in its own time; False when it was halted."""
        rate, start = self._value('rate'), time.monotonic()
        self._state = 'playing'
        for event in recording.events():
            if isinstance(event, ObservationError):
                self._fault(event)
                continue
            wait = start + event.stamp_ns / NS / rate - time.monotonic()
            if self._halt.wait(max(wait, 0.0)):
                return False
            try:
                self._publish(event)
            except ObservationError as error:
                self._fault(error)
            self._played += 1
        return True

    def _publish(self, event: Event) -> None:
        now = self.get_clock().now().nanoseconds
        if isinstance(event, CameraEvent):
            self._sinks[event.camera].publish(self._image(event, now))
        elif isinstance(event, JointEvent):
            msg = conversions.joints_to_msg(event.names, event.positions, now)
            self._sinks['/joints'].publish(msg)
        elif isinstance(event, PoseEvent):
            msg = conversions.pose_to_msg(
                event.position, event.quaternion_xyzw, now, event.frame_id
            )
            self._sinks['/pose'].publish(msg)
        elif isinstance(event, InstructionEvent):
            self._sinks['/instruction'].publish(String(data=event.text))
        elif isinstance(event, ExecutedAction):
            # No chunk of the node that listens: its own have such numbers, too.
            action = dataclasses.replace(event, chunk_id=0, epoch=0)
            msg = conversions.executed_to_msg(action)
            msg.header.stamp = conversions.to_time(now)
            self._sinks['/executed'].publish(msg)

    def _image(self, event: CameraEvent, now_ns: int) -> Image | CompressedImage:
        frame_id = f'{event.camera}_optical_frame'
        if self._value('transport') == 'raw':
            return conversions.image_to_msg(as_rgb(event.image), now_ns, frame_id)
        image = event.image
        if not isinstance(image, EncodedImage):
            bgr = cv2.cvtColor(as_rgb(image), cv2.COLOR_RGB2BGR)
            _, jpeg = cv2.imencode('.jpg', bgr, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])
            image = EncodedImage(f'cameras/{event.camera}', 'jpeg', jpeg.tobytes())
        return conversions.compressed_to_msg(image, now_ns, frame_id)

    def _fault(self, error: SpecPruneError) -> None:
        if self._health.fault(error.code, str(error)):
            self.get_logger().error(str(error))

    def _publish_diagnostics(self) -> None:
        name = diagnostics.node_name(self)
        level = diagnostics.ERROR if self._failed.is_set() else diagnostics.OK
        statuses = [
            diagnostics.status(
                f'{name}: replay', level, self._state, {'events': str(self._played)}
            ),
            diagnostics.fault_status(name, self._health),
        ]
        now = self.get_clock().now().nanoseconds
        self._diagnostics.publish(diagnostics.array(now, self._value('recording'), statuses))


def main(args: list[str] | None = None) -> int:
    """Process entry point; 2 when the recording could not be played."""
    failed = threading.Event()
    status = spin_process(lambda stop: ReplayNode(stop, failed), args)
    return 2 if status or failed.is_set() else 0


if __name__ == '__main__':
    raise SystemExit(main())
