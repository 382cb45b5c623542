"""A recording through a policy, without ROS: the same inputs, the same decisions.

The recording's stamps are the clock.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from specprune_ros.config import PolicyConfig
from specprune_ros.errors import ActionError, ObservationError, RecordingError, SpecPruneError
from specprune_ros.inbox import POSE_NAMES, Inbox
from specprune_ros.recordings.base import (
    CameraEvent,
    Event,
    InstructionEvent,
    JointEvent,
    PoseEvent,
    Recording,
)
from specprune_ros.types import ExecutedAction, Observation, PolicyResult

if TYPE_CHECKING:
    from specprune_ros.policy import Policy


Outcome = tuple[Observation, PolicyResult] | SpecPruneError
MAX_CAMERAS = 4  # as many as any model here takes
STALE = '_stale'  # how the codes of inputs that are too old end


def fit_robot(config: PolicyConfig, recording: Recording) -> PolicyConfig:
    """The configuration with the cameras and joints that a recording has.

    Where all configured cameras were recorded, they are it; else those that were, in the
    configured order, then the recording's other ones, MAX_CAMERAS in all; these are turned as all
    configured ones are, or not at all where those differ. Joints, and elements of
    the end-effector pose: the configured ones if they were recorded, the recorded joints if none
    was.

    Raises:
        RecordingError: some configured joints were recorded and some were not.
    """
    robot = config.robot
    cameras = [name for name in robot.camera_names if name in recording.cameras]
    if len(cameras) < len(robot.camera_names):
        cameras += [name for name in recording.cameras if name not in cameras]
    recorded = {*recording.joint_names, *(POSE_NAMES if recording.has_poses else ())}
    missing = [name for name in robot.joint_names if name not in recorded]
    if missing and len(missing) < len(robot.joint_names):
        why = f'lacks the joints {missing} of the robot'
        if set(missing) <= set(POSE_NAMES):
            why = f'holds no end-effector poses (topic eef_pose): the robot needs {missing}'
        raise RecordingError(recording.path, why)
    joints = recording.joint_names if missing else robot.joint_names or recording.joint_names
    cameras = cameras[:MAX_CAMERAS]
    turns = robot.per_camera('camera_rotations')
    other = turns[robot.camera_names[0]] if len({*turns.values()}) == 1 else 0
    fitted = dataclasses.replace(
        robot,
        camera_names=tuple(cameras),
        camera_rotations=tuple(turns.get(name, other) for name in cameras),
        camera_topics=(),
        camera_transports=robot.camera_transports[:1],
        joint_names=joints,
    )
    return dataclasses.replace(config, robot=fitted)


def run_recording(
    policy: Policy, recording: Recording, *, every: int = 0
) -> Iterator[Outcome | None]:
    """Query the policy along a recording, as a robot that executed the recorded actions would.

    A control step is an executed action where the recording has them, else an image of the last
    camera (its motion is then unknown). Inputs older than `policy.config.runtime` allows are
    refused, as the node does: a query waits until they come again.

    Args:
        policy: fitted to the recording.
        recording: the source.
        every: control steps between queries; 0 takes the policy's horizon.

    Yields:
        Per control step: None, or the observation and result of a query, or why one was skipped.

    Raises:
        RecordingError: some camera, joint or the instruction never came, or never in time.
    """
    run = _Run(policy, recording.has_actions, every)
    for event in recording.events():
        yield from run.take(event)
    if not run.queries:
        raise RecordingError(recording.path, f'no query was possible: {run.why_not()}')


def skipped_words(errors: Iterable[SpecPruneError]) -> str:
    """What was refused along a recording, in one line for a summary; empty when nothing was.

    Args:
        errors: what `run_recording` yielded in place of a query.
    """
    counts = Counter(_kind(error) for error in errors)
    if not counts:
        return ''
    kinds = ', '.join(f'{kind} {count} x' for kind, count in counts.most_common())
    stale = any(kind.endswith(STALE) for kind in counts)
    limits = '; limits: runtime.max_image_age_s, runtime.max_joint_age_s' if stale else ''
    return f'skipped: {kinds}{limits}'


def _kind(error: SpecPruneError) -> str:
    return ' '.join(filter(None, (getattr(error, 'field', ''), error.code)))


class _Run:
    """One pass of a recording's events through a policy.

    Args:
        policy: fitted to the recording.
        has_actions: whether executed actions are the control steps, else images of the last
            camera are.
        every: control steps between queries; 0 takes the policy's horizon.

    Attributes:
        queries: that were answered.
    """

    def __init__(self, policy: Policy, has_actions: bool, every: int):
        config = policy.config
        self.queries = 0
        self._policy, self._has_actions = policy, has_actions
        self._every = every or config.robot.horizon
        self._since = math.inf  # control steps since the last query
        self._camera = config.robot.camera_names[-1]
        self._inbox = Inbox(config.robot, config.runtime)
        self._refused: SpecPruneError | None = None
        self._told = False  # that the camera whose images are the steps has stopped

    def take(self, event: Event) -> Iterator[Outcome | None]:
        """Keep an input; on a control step, query if it is time."""
        try:
            _store(self._inbox, event)
        except ObservationError as error:
            yield error
            return
        if self._is_step(event):
            self._told = False
            yield from self._step(event)
        elif not self._told and self._has_lost_steps(event.stamp_ns):
            self._told = True
            yield self._query(event.stamp_ns)

    def why_not(self) -> str:
        """Why there was no query."""
        ages = self._inbox.age_s(0)
        missing = [name for name, age in ages.items() if math.isinf(age)]
        if not missing and self._refused is not None:
            return str(self._refused)
        return f'missing: {missing or ["instruction"]}'

    def _is_step(self, event: Event) -> bool:
        if self._has_actions:
            return isinstance(event, ExecutedAction)
        return isinstance(event, CameraEvent) and event.camera == self._camera

    def _has_lost_steps(self, now_ns: int) -> bool:
        """Whether the steps' camera has stopped; then none is left to tell it at."""
        inbox = self._inbox
        came, recent = self._camera in inbox.images, self._camera in inbox.recent_images(now_ns)
        return not self._has_actions and came and not recent

    def _step(self, event: CameraEvent | ExecutedAction) -> Iterator[Outcome | None]:
        yield self._query(event.stamp_ns) if self._since >= self._every else None
        if not self.queries:
            return
        action = event if isinstance(event, ExecutedAction) else None
        self._since += 1
        try:
            images = self._inbox.recent_images(event.stamp_ns)
            if self._policy.observe_executed(action, images):
                self._since = self._every  # the next step queries
        except ObservationError as error:
            yield error

    def _query(self, now_ns: int) -> Outcome:
        try:
            observation = self._inbox.observation(now_ns)
            outcome = observation, self._policy.infer(observation)
        except (ObservationError, ActionError) as error:
            self._refused = error
            return error
        self._since, self.queries = 0, self.queries + 1
        return outcome


def _store(inbox: Inbox, event: Event) -> None:
    if isinstance(event, ObservationError):
        raise event
    if isinstance(event, CameraEvent):
        inbox.put_image(event.camera, event.stamp_ns, event.image)
    elif isinstance(event, JointEvent):
        inbox.put_joints(event.stamp_ns, event.names, event.positions)
    elif isinstance(event, PoseEvent):
        inbox.put_pose(event.stamp_ns, event.position, event.quaternion_xyzw)
    elif isinstance(event, InstructionEvent):
        inbox.put_instruction(event.text)
