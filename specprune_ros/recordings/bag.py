"""A rosbag2 (mcap or sqlite3) as a recording, read without ROS through `rosbags`."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from specprune_ros.config_files import shipped_folders
from specprune_ros.errors import (
    MissingDependencyError,
    ObservationError,
    RecordingError,
    SpecPruneError,
    named,
)
from specprune_ros.images import ENCODINGS, CompressedImage, RawImage
from specprune_ros.recordings.base import (
    CameraEvent,
    Event,
    InstructionEvent,
    JointEvent,
    PoseEvent,
)
from specprune_ros.types import ExecutedAction

if TYPE_CHECKING:
    from rosbags.highlevel import AnyReader

NS = 1_000_000_000
IMAGE = 'sensor_msgs/msg/Image'
COMPRESSED = 'sensor_msgs/msg/CompressedImage'
JOINTS = 'sensor_msgs/msg/JointState'
POSE = 'geometry_msgs/msg/PoseStamped'
TEXT = 'std_msgs/msg/String'
EXECUTED = 'specprune_ros/msg/ExecutedAction'
STATUS = 'specprune_ros/msg/VlaStatus'  # says the task where it came as an action or a service
OWN_MESSAGES = (
    *('ActionChunk', 'ExecutedAction', 'ModelInfo', 'PruningDiagnostics'),
    *('StreamerStatus', 'VlaStatus'),
)
# Words of an image topic that name no camera.
TOPIC_TAILS = (
    *('image', 'image_raw', 'image_rect', 'image_rect_raw', 'image_rect_color', 'image_color'),
    *('color', 'rgb', 'compressed'),
)


class BagRecording:
    """Image, joint-state, pose, instruction and executed-action topics of a rosbag2.

    Of each kind but images one topic is taken, a second one may be another arm's: the one that
    shares most namespaces with the executed actions, and these with the cameras.

    Args:
        path: the bag's folder, or one .mcap or .db3 file.
        cameras: camera name -> topic; empty finds them: `cameras/<name>/image_raw` is camera
            `<name>`, of any other image topic the last telling word is its name.
        instruction: the task; empty takes the bag's: of the instruction topic until vla_node's
            status names a task, then from there, where tasks that came as actions are told, too.
        near: topics of the robot that is read, where the bag may hold another one's; empty: its
            cameras.

    Attributes:
        topics: topic -> message type of all that hold messages.
        image_topics: camera -> its topic.
        start_ns: when the first message was written.

    Raises:
        RecordingError: not a rosbag2, no image topic, or a named topic is missing.
        MissingDependencyError: rosbags is not installed.
    """

    def __init__(
        self,
        path: Path,
        cameras: dict[str, str] | None = None,
        instruction: str = '',
        near: Collection[str] = (),
    ):
        self.path = str(path)
        self._instruction = instruction
        with self._reading() as reader:
            types = {c.topic: c.msgtype for c in reader.connections if c.msgcount}
            self.topics = types
            self.image_topics = self._camera_topics(reader, types, cameras or {})
            self._others = {t: kind for t, kind in types.items() if _is_wanted(t, kind)}
            self.duration_s = reader.duration / 1e9
            self.start_ns = reader.start_time
            home = _common_namespace(near or self.image_topics.values())
            for topic in self._choose(EXECUTED, home):
                home = topic.rpartition('/')[0]
            for kind in (POSE, TEXT, STATUS):
                self._choose(kind, home)
            self._choose_joints(reader, home)
            counts = Counter({c.topic: c.msgcount for c in reader.connections})
        self.cameras = tuple(self.image_topics)
        self.has_poses = POSE in self._others.values()
        actions = sum(counts[t] for t, kind in self._others.items() if kind == EXECUTED)
        self.has_actions = actions > 0
        self.control_steps = actions or max(counts[topic] for topic in self.image_topics.values())
        has_text = any(kind in (TEXT, STATUS) for kind in self._others.values())
        if not instruction and not has_text:
            self._instruction = re.sub(r'[_\-\s]+', ' ', path.stem).strip()

    def events(self) -> Iterator[Event]:
        """All events by bag time, from 0 at the bag's start."""
        if self._instruction:
            yield InstructionEvent(0, self._instruction)
        for _, _, event in self.stamped_events():
            yield event

    def stamped_events(self) -> Iterator[tuple[int, int, Event]]:
        """When a message was written, its header's stamp, and the event, by bag time.

        Both are ns; the first is of the recorder's clock and counts from the bag's start, the
        second is of the sender's. A text has no header: 0.

        Raises:
            RecordingError: the data is damaged from here on.
        """
        cameras = {topic: camera for camera, topic in self.image_topics.items()}
        task, is_told = '', False  # and whether the status tells it
        for topic, kind, written, message in self.messages({*cameras, *self._others}):
            since, stamp = written - self.start_ns, _header_ns(message)
            if topic in cameras:
                try:
                    yield since, stamp, _camera_event(since, cameras[topic], message)
                except ObservationError as error:
                    yield since, stamp, error
            elif kind == STATUS:
                is_told |= message.instruction != ''
                if message.instruction not in ('', task) and not self._instruction:
                    task = message.instruction
                    yield since, stamp, InstructionEvent(since, task)
            elif kind != TEXT:
                yield since, stamp, _CONVERTERS[kind](since, message)
            elif not self._instruction and not is_told:
                task = message.data
                yield since, stamp, InstructionEvent(since, task)

    def messages(self, topics: Collection[str]) -> Iterator[tuple[str, str, int, object]]:
        """Topic, type, time of writing (ns) and message of some topics, by that time.

        Raises:
            RecordingError: the data is damaged from here on.
        """
        with self._reading() as reader:
            wanted = [c for c in reader.connections if c.topic in topics]
            for connection, written, raw in reader.messages(wanted):
                message = reader.deserialize(raw, connection.msgtype)
                yield connection.topic, connection.msgtype, written, message

    @contextmanager
    def _reading(self) -> Iterator[AnyReader]:
        """An open reader; whatever damaged data makes it raise becomes a RecordingError."""
        try:
            from rosbags.highlevel import AnyReader
            from rosbags.typesys import Stores, get_typestore
        except ImportError as error:
            raise MissingDependencyError(
                'rosbags', 'reading a bag', 'pip install rosbags', error
            ) from error
        typestore = get_typestore(Stores.ROS2_HUMBLE)
        register_own_messages(typestore)
        try:
            with AnyReader([Path(self.path)], default_typestore=typestore) as reader:
                yield reader
        except SpecPruneError:
            raise
        except Exception as error:  # storage, decompression and decoding each raise their own
            raise RecordingError(
                self.path, f'cannot be read as a rosbag2: {named(error)}'
            ) from error

    def _choose_joints(self, reader: AnyReader, home: str) -> None:
        """Take one joint-state topic: the namespace's own, else `joint_states`, of most joints."""
        names = {}
        for connection in reader.connections:
            if connection.msgtype == JOINTS and connection.msgcount:
                _, _, raw = next(reader.messages([connection]))
                names[connection.topic] = tuple(reader.deserialize(raw, JOINTS).name)

        def rank(topic: str) -> tuple:
            is_own = topic == f'{home}/joint_states'
            named = topic.endswith('/joint_states')
            return is_own, named, len(names[topic]), _shared(topic, home)

        self.joint_names: tuple[str, ...] = ()
        if names:
            best = max(sorted(names), key=rank)
            self.joint_names = names.pop(best)
        for topic in names:
            del self._others[topic]

    def _choose(self, kind: str, home: str) -> list[str]:
        """Take one topic of a type, the nearest to a namespace; empty where there is none."""
        topics = [topic for topic, found in self._others.items() if found == kind]
        topics.sort(key=lambda topic: (-_shared(topic, home), topic.count('/'), topic))
        for topic in topics[1:]:
            del self._others[topic]
        return topics[:1]

    def _camera_topics(
        self, reader: AnyReader, types: dict[str, str], asked: dict[str, str]
    ) -> dict[str, str]:
        """Camera -> topic."""
        images = sorted(topic for topic, kind in types.items() if kind in (IMAGE, COMPRESSED))
        for camera, topic in asked.items():
            if topic not in images:
                raise RecordingError(
                    self.path, f'camera {camera!r}: no image topic {topic!r}, only {images}'
                )
        if asked:
            return dict(sorted(asked.items()))
        color = [topic for topic in images if self._is_color(reader, topic)] or images
        if not color:
            raise RecordingError(self.path, f'has no image topic, only {sorted(types)}')
        names = Counter(camera_name(topic) for topic in color)
        found: dict[str, str] = {}
        for topic in color:
            name = camera_name(topic)
            if names[name] > 1 and not _same_camera(color, name):
                name = camera_name(topic, whole=True)
            found.setdefault(name, topic)  # raw sorts before raw/compressed
        return dict(sorted(found.items()))

    def _is_color(self, reader: AnyReader, topic: str) -> bool:
        """Whether a topic's first image is one that can be shown to the model."""
        connections = [c for c in reader.connections if c.topic == topic]
        connection, _, raw = next(reader.messages(connections))
        message = reader.deserialize(raw, connection.msgtype)
        if connection.msgtype == COMPRESSED:
            return 'compressedDepth' not in message.format
        return message.encoding in ENCODINGS


def _shared(topic: str, namespace: str) -> int:
    """How many namespaces a topic has in common with this one, from the root."""
    pairs = zip(topic.split('/')[1:], namespace.split('/')[1:], strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def _common_namespace(topics: Collection[str]) -> str:
    """The deepest one that all topics are in; '' is the root."""
    first, *others = topics
    home = first.rpartition('/')[0]
    shared = min([_shared(topic, home) for topic in others], default=home.count('/'))
    return '/'.join(home.split('/')[: 1 + shared])


def _same_camera(topics: list[str], name: str) -> bool:
    """Whether the topics of this name are one image, raw and compressed."""
    bases = {t.removesuffix('/compressed') for t in topics if camera_name(t) == name}
    return len(bases) == 1


def camera_name(topic: str, *, whole: bool = False) -> str:
    """The camera that an image topic belongs to.

    Its last word that names no kind of image, or all such words, joined by `_`.
    """
    words = [word for word in topic.strip('/').split('/') if word not in TOPIC_TAILS]
    telling = words if whole else words[-1:]
    return re.sub(r'\W', '_', '_'.join(telling)) or 'camera'


def register_own_messages(typestore) -> None:
    """Teach a `rosbags` typestore this package's messages (bags from Humble do not carry them)."""
    from rosbags.typesys import get_types_from_msg

    for name in OWN_MESSAGES:
        files = [root / f'{name}.msg' for root in shipped_folders('msg')]
        file = next((path for path in files if path.is_file()), None)
        if file is not None:
            typestore.register(get_types_from_msg(file.read_text(), f'specprune_ros/msg/{name}'))


def _is_wanted(topic: str, kind: str) -> bool:
    if kind == TEXT:
        return topic.rstrip('/').endswith('instruction')
    if kind == POSE:
        return topic.rpartition('/')[2] == 'eef_pose'
    return kind in (JOINTS, EXECUTED, STATUS)


def _header_ns(message) -> int:
    if not hasattr(message, 'header'):
        return 0
    return message.header.stamp.sec * NS + message.header.stamp.nanosec


def _camera_event(stamp: int, camera: str, message) -> CameraEvent:
    field = f'cameras/{camera}'
    if message.__msgtype__ == COMPRESSED:
        return CameraEvent(stamp, camera, CompressedImage(field, message.format, message.data))
    image = RawImage(
        field, message.encoding, message.height, message.width, message.step, message.data
    )
    return CameraEvent(stamp, camera, image)


def _joint_event(stamp: int, message) -> JointEvent:
    return JointEvent(stamp, tuple(message.name), np.array(message.position, float))


def _pose_event(stamp: int, message) -> PoseEvent:
    at, turn = message.pose.position, message.pose.orientation
    return PoseEvent(
        stamp,
        position=np.array((at.x, at.y, at.z)),
        quaternion_xyzw=np.array((turn.x, turn.y, turn.z, turn.w)),
        frame_id=message.header.frame_id,
    )


def _executed_action(stamp: int, message) -> ExecutedAction:
    return ExecutedAction(
        stamp_ns=stamp,
        names=tuple(message.names),
        units=tuple(message.units),
        data=np.array(message.data, float),
        space=int(message.space),
        frame_id=message.header.frame_id,
        chunk_id=int(message.chunk_id),
        epoch=int(getattr(message, 'epoch', 0)),  # bags of old have none
        step=int(message.step),
        step_dt_s=message.step_dt.sec + message.step_dt.nanosec / NS,
        dry_run=bool(message.dry_run),
    )


_CONVERTERS: dict[str, Callable[[int, object], Event]] = {
    JOINTS: _joint_event,
    POSE: _pose_event,
    EXECUTED: _executed_action,
}
