"""Messages to the package's types and back; the only file that knows both."""

from __future__ import annotations

import array
import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from builtin_interfaces.msg import Duration, Time
from geometry_msgs.msg import PoseStamped, TwistStamped
from sensor_msgs.msg import CompressedImage as CompressedImageMsg
from sensor_msgs.msg import Image, JointState
from std_msgs.msg import Float64MultiArray
from trajectory_msgs.msg import JointTrajectory, JointTrajectoryPoint

from specprune_ros.images import CompressedImage, RawImage
from specprune_ros.msg import ActionChunk as ActionChunkMsg
from specprune_ros.msg import ExecutedAction as ExecutedActionMsg
from specprune_ros.msg import PruningDiagnostics, StreamerStatus
from specprune_ros.types import ActionChunk, ExecutedAction, PolicyResult, PruneReport

if TYPE_CHECKING:
    from specprune_ros.streaming.streamer import JointTarget, PoseTarget, Streamer, TwistTarget

NS = 1_000_000_000
TIME, DURATION = 'builtin_interfaces/Time', 'builtin_interfaces/Duration'
TYPECODES = {'double': 'd', 'float': 'f', 'uint8': 'B', 'uint32': 'I', 'int64': 'q', 'uint64': 'Q'}


def to_ns(stamp: Time | Duration) -> int:
    """Nanoseconds of a time or duration message."""
    return stamp.sec * NS + stamp.nanosec


def to_time(stamp_ns: int) -> Time:
    """Time message of nanoseconds."""
    return Time(sec=stamp_ns // NS, nanosec=stamp_ns % NS)


def to_duration(seconds: float) -> Duration:
    """Duration message of seconds."""
    total = round(seconds * NS)
    return Duration(sec=total // NS, nanosec=total % NS)


def image_from_msg(msg: Image | CompressedImageMsg, field: str) -> RawImage | CompressedImage:
    """An image as it came, checked but not decoded; shares the message's buffer.

    Raises:
        ObservationError: see images.RawImage and images.CompressedImage.
    """
    if isinstance(msg, CompressedImageMsg):
        return CompressedImage(field, msg.format, msg.data)
    return RawImage(field, msg.encoding, msg.height, msg.width, msg.step, msg.data)


def image_to_msg(image: np.ndarray, stamp_ns: int, frame_id: str) -> Image:
    """[rows, cols, 3] uint8 RGB -> rgb8 message."""
    msg = Image(height=image.shape[0], width=image.shape[1], encoding='rgb8')
    msg.header.stamp, msg.header.frame_id = to_time(stamp_ns), frame_id
    msg.step = 3 * image.shape[1]
    # array.array: assigning an ndarray or a list makes rclpy look at every byte.
    msg.data = array.array('B', np.ascontiguousarray(image).tobytes())
    return msg


def compressed_to_msg(image: CompressedImage, stamp_ns: int, frame_id: str) -> CompressedImageMsg:
    """Recorded JPEG or PNG bytes -> message."""
    msg = CompressedImageMsg(format=image.format)
    msg.header.stamp, msg.header.frame_id = to_time(stamp_ns), frame_id
    msg.data = array.array('B', bytes(image.data))
    return msg


def joints_to_msg(names: tuple[str, ...], positions: np.ndarray, stamp_ns: int) -> JointState:
    """Joint positions by name -> message."""
    msg = JointState(name=list(names))
    msg.header.stamp = to_time(stamp_ns)
    msg.position = array.array('d', positions.tolist())
    return msg


def pose_from_msg(msg: PoseStamped) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Position [3] in m and orientation [4] as x, y, z, w."""
    at, turn = msg.pose.position, msg.pose.orientation
    return (at.x, at.y, at.z), (turn.x, turn.y, turn.z, turn.w)


def pose_to_msg(
    position: np.ndarray, quaternion_xyzw: np.ndarray, stamp_ns: int, frame_id: str
) -> PoseStamped:
    """Position [3] in m and orientation [4] -> message."""
    msg = PoseStamped()
    msg.header.stamp, msg.header.frame_id = to_time(stamp_ns), frame_id
    at, turn = msg.pose.position, msg.pose.orientation
    at.x, at.y, at.z = map(float, position)
    turn.x, turn.y, turn.z, turn.w = map(float, quaternion_xyzw)
    return msg


def chunk_to_msg(chunk: ActionChunk) -> ActionChunkMsg:
    """Action chunk -> message."""
    return _to_msg(chunk, ActionChunkMsg())


def chunk_from_msg(msg: ActionChunkMsg) -> ActionChunk:
    """Message -> action chunk.

    Raises:
        ValueError: the numbers do not make `horizon` rows of one per name.
    """
    values = _from_msg(msg, ActionChunk)
    shape = (msg.horizon, len(msg.names))
    for name in ('data', 'normalized'):
        values[name] = values[name].reshape(shape)
    return ActionChunk(**values)


def stamped(result: PolicyResult, now_ns: int) -> PolicyResult:
    """The result with the chunk's validity starting now."""
    return dataclasses.replace(result, chunk=dataclasses.replace(result.chunk, stamp_ns=now_ns))


def report_to_msg(report: PruneReport) -> PruningDiagnostics:
    """Pruning report -> message."""
    return _to_msg(report, PruningDiagnostics())


def report_from_msg(msg: PruningDiagnostics) -> PruneReport:
    """Message -> pruning report."""
    return PruneReport(**_from_msg(msg, PruneReport))


def executed_to_msg(action: ExecutedAction) -> ExecutedActionMsg:
    """Executed action -> message."""
    return _to_msg(action, ExecutedActionMsg())


def executed_from_msg(msg: ExecutedActionMsg) -> ExecutedAction:
    """Message -> executed action."""
    return ExecutedAction(**_from_msg(msg, ExecutedAction))


def joint_target_to_msg(target: JointTarget, stamp_ns: int) -> JointTrajectory:
    """Joint target -> trajectory of one point, to be reached after the target's duration.

    A target without positions gives a trajectory without points, which ends the running one.
    """
    msg = JointTrajectory(joint_names=list(target.names))
    msg.header.stamp = to_time(stamp_ns)
    if len(target.positions) == 0:
        return msg
    point = JointTrajectoryPoint(time_from_start=to_duration(target.duration_s))
    point.positions = _doubles(target.positions)
    msg.points = [point]
    return msg


def twist_target_to_msg(target: TwistTarget, stamp_ns: int) -> TwistStamped:
    """Twist target -> message."""
    msg = TwistStamped()
    msg.header.stamp, msg.header.frame_id = to_time(stamp_ns), target.frame_id
    linear, angular = msg.twist.linear, msg.twist.angular
    linear.x, linear.y, linear.z = map(float, target.linear)
    angular.x, angular.y, angular.z = map(float, target.angular)
    return msg


def pose_target_to_msg(target: PoseTarget, stamp_ns: int) -> PoseStamped:
    """Pose target -> message."""
    return pose_to_msg(target.position, target.quaternion_xyzw, stamp_ns, target.frame_id)


def fill_streamer_status(msg: StreamerStatus, streamer: Streamer) -> None:
    """What the streamer counts -> the fields of the same names."""
    for name in ('epoch', 'chunk_id', 'step', 'queue_depth', 'commands', 'chunks_rejected'):
        setattr(msg, name, int(getattr(streamer, name)))
    msg.clamped = _sequence(streamer.clamped, 'sequence<uint64>')
    msg.rejected = _sequence(streamer.rejected, 'sequence<uint64>')


def gripper_to_msg(positions: Sequence[float]) -> Float64MultiArray:
    """Gripper positions [G] in m or rad -> message."""
    return Float64MultiArray(data=_doubles(positions))


def _doubles(values: Sequence[float]) -> array.array:
    return array.array('d', map(float, values))


def _to_msg(value: object, msg):
    """Fill a message from the dataclass fields of the same names."""
    for name, kind in msg.get_fields_and_field_types().items():
        if name == 'header':
            msg.header.stamp = to_time(value.stamp_ns)
            msg.header.frame_id = getattr(value, 'frame_id', '')
        elif kind == TIME:
            setattr(msg, name, to_time(getattr(value, f'{name}_ns')))
        elif kind == DURATION:
            setattr(msg, name, to_duration(getattr(value, f'{name}_s')))
        elif kind.startswith('sequence'):
            setattr(msg, name, _sequence(getattr(value, name), kind))
        else:
            setattr(msg, name, getattr(value, name))
    return msg


def _sequence(values, kind: str):
    element = kind.partition('<')[2].rstrip('>')
    if element == 'string':
        return list(values)
    code = TYPECODES[element]
    return array.array(code, np.asarray(values).astype(code, copy=False).tobytes())


def _from_msg(msg, cls: type) -> dict[str, object]:
    """Values for a dataclass from the message fields of the same names."""
    kinds = msg.get_fields_and_field_types()
    values: dict[str, object] = {}
    for spec in dataclasses.fields(cls):
        if spec.name == 'stamp_ns':
            values['stamp_ns'] = to_ns(msg.header.stamp)
        elif spec.name == 'frame_id':
            values['frame_id'] = msg.header.frame_id
        elif kinds.get(spec.name.removesuffix('_ns')) == TIME:
            values[spec.name] = to_ns(getattr(msg, spec.name.removesuffix('_ns')))
        elif kinds.get(spec.name.removesuffix('_s')) == DURATION:
            values[spec.name] = to_ns(getattr(msg, spec.name.removesuffix('_s'))) / NS
        else:
            values[spec.name] = _plain(getattr(msg, spec.name))
    return values


def _plain(value):
    if isinstance(value, (array.array, np.ndarray)):
        return np.array(value)
    return tuple(value) if isinstance(value, list) else value
