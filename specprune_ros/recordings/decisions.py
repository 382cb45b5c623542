"""What the live node decided, and from what: read from a recording of its topics.

`PruningDiagnostics` names every input of its query by stamp. Order of arrival is no guide: the
recorder hears each topic at another moment than the node did.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from specprune_ros.config import RobotConfig
from specprune_ros.errors import ObservationError, RecordingError
from specprune_ros.inbox import JOINTS, POSE
from specprune_ros.recordings.bag import BagRecording
from specprune_ros.recordings.base import CameraEvent, Event, JointEvent, PoseEvent
from specprune_ros.recordings.topics import camera_topics
from specprune_ros.types import ExecutedAction, PruneReport

REPORTS = 'specprune_ros/msg/PruningDiagnostics'
CHUNKS = 'specprune_ros/msg/ActionChunk'
EXECUTED = 'executed_action'
Key = tuple[str, int]  # `cameras/<name>`, JOINTS, POSE or EXECUTED, and the header's stamp in ns


@dataclass(frozen=True, eq=False, kw_only=True)
class QueryInputs:
    """What one query read, by the header stamps of the messages, in ns; V cameras.

    Attributes:
        query: which one of its episode, from 0.
        instruction: the task.
        image_stamps_ns: [V] of the images, in the order of the report's cameras.
        proprio_stamps_ns: [0..2] of the joint state and of the end-effector pose, as far as the
            robot's proprioception needs them, in this order.
        executed_stamps_ns: [M] of the executed actions that count since the query before.
        executed_image_stamps_ns: [M * V] of the images that were the newest then; 0: none.
    """

    query: int
    instruction: str
    image_stamps_ns: np.ndarray
    proprio_stamps_ns: np.ndarray
    executed_stamps_ns: np.ndarray
    executed_image_stamps_ns: np.ndarray

    def steps(self, cameras: tuple[str, ...]) -> Iterator[tuple[Key, dict[str, Key]]]:
        """Per executed action its key, and those of the images that were the newest then."""
        images = self.executed_image_stamps_ns.reshape(-1, max(len(cameras), 1))
        for stamp, row in zip(self.executed_stamps_ns.tolist(), images.tolist(), strict=True):
            keys = image_keys(cameras, row)
            yield (EXECUTED, stamp), {name: key for name, key in keys.items() if key[1]}


@dataclass(frozen=True, eq=False)
class Decision:
    """One recorded query.

    Attributes:
        written_ns: when its report was recorded, since the recording's start.
        report: what pruning did.
        inputs: what it read.
        actions: [L, A] `data` and `normalized` of its chunk; None when no chunk was recorded.
    """

    written_ns: int
    report: PruneReport
    inputs: QueryInputs
    actions: tuple[np.ndarray, np.ndarray] | None

    def keys(self, proprio: tuple[str, ...]) -> set[Key]:
        """All recorded inputs that it needs; `proprio` names those of the robot's state."""
        cameras = self.report.cameras
        needed = {*image_keys(cameras, self.inputs.image_stamps_ns.tolist()).values()}
        needed |= {*zip(proprio, self.inputs.proprio_stamps_ns.tolist(), strict=False)}
        for action, images in self.inputs.steps(cameras):
            needed |= {action, *images.values()}
        return needed


def image_keys(cameras: tuple[str, ...], stamps_ns: list[int]) -> dict[str, Key]:
    """Camera -> key of its image."""
    return {c: (f'cameras/{c}', stamp) for c, stamp in zip(cameras, stamps_ns, strict=True)}


class DecisionRecording:
    """A recording of vla_node at work: its inputs by stamp, and its decisions.

    Args:
        path: of a rosbag2.
        robot: the node's: says which topic is which camera.

    Raises:
        RecordingError: not a rosbag2, or one without the topics that this needs.
    """

    def __init__(self, path: Path, robot: RobotConfig):
        bag = BagRecording(path)
        topics, self._chunks = (
            [topic for topic, kind in bag.topics.items() if kind == wanted]
            for wanted in (REPORTS, CHUNKS)
        )
        if not topics:
            raise RecordingError(path, 'holds no decisions: record vla_node/pruning, too')
        if len(topics) > 1:
            raise RecordingError(path, f'holds the decisions of more than one node: {topics}')
        self.path = str(path)
        self._reports = topics[0]
        namespace = self._reports.rsplit('/', 2)[0]
        cameras = camera_topics(robot, namespace)
        if not {*cameras.values()} <= {*bag.topics}:
            cameras = {}  # remapped topics are found by their names
        self._bag = BagRecording(path, cameras, near=[f'{namespace}/vla_node'])

    def decisions(self) -> list[Decision]:
        """All recorded queries, in the order of writing.

        Raises:
            RecordingError: the reports do not name their inputs, or the data is damaged.
        """
        reports, actions = [], {}
        for _, kind, written, message in self._bag.messages({self._reports, *self._chunks}):
            if kind == CHUNKS:
                actions[_chunk_key(message, message.observation_stamp)] = _actions(message)
            else:
                reports.append((written - self._bag.start_ns, message))
        return [self._decision(written, message, actions) for written, message in reports]

    def inputs(self) -> Iterator[tuple[int, Key, Event]]:
        """Time of writing, key and event of every recorded input, by time of writing."""
        for written, stamp, event in self._bag.stamped_events():
            if isinstance(event, CameraEvent):
                yield written, (f'cameras/{event.camera}', stamp), event
            elif isinstance(event, (JointEvent, PoseEvent)):
                yield written, (JOINTS if isinstance(event, JointEvent) else POSE, stamp), event
            elif isinstance(event, ExecutedAction):
                action = dataclasses.replace(event, stamp_ns=stamp)
                yield written, (EXECUTED, stamp), action
            elif isinstance(event, ObservationError):
                yield written, (event.field, stamp), event

    def _decision(self, written: int, message, actions: dict) -> Decision:
        try:
            return Decision(
                written_ns=written,
                report=PruneReport(**_values(message, PruneReport)),
                inputs=QueryInputs(**_values(message, QueryInputs)),
                actions=actions.get(_chunk_key(message, message.header.stamp)),
            )
        except AttributeError as error:
            why = f'its PruningDiagnostics do not say what the query read ({error})'
            raise RecordingError(self.path, why) from error


def _chunk_key(message, observed) -> tuple[int, ...]:
    """Of a chunk, and of its report: a restarted node counts epochs and chunks anew."""
    return message.epoch, message.chunk_id, observed.sec, observed.nanosec


def _actions(message) -> tuple[np.ndarray, np.ndarray]:
    shape = (message.horizon, len(message.names))
    return message.data.reshape(shape), message.normalized.reshape(shape)


def _values(message, cls: type) -> dict[str, object]:
    """Values for a dataclass from the message fields of the same names."""
    values = {}
    for spec in dataclasses.fields(cls):
        if spec.name == 'stamp_ns':
            stamp = message.header.stamp
            values['stamp_ns'] = stamp.sec * 1_000_000_000 + stamp.nanosec
        else:
            value = getattr(message, spec.name)
            values[spec.name] = tuple(value) if isinstance(value, list) else value
    return values
