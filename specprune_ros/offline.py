"""A recording through a policy, without ROS: the same inputs, the same decisions, no clock."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
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


MAX_CAMERAS = 4  # as many as any model here takes


def fit_robot(config: PolicyConfig, recording: Recording) -> PolicyConfig:
    """The configuration with the cameras and joints that a recording has.

    Where all configured cameras were recorded, they are it; else those that were, in the
    configured order, then the recording's other ones, MAX_CAMERAS in all. Joints, and elements of
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
    fitted = dataclasses.replace(
        robot,
        camera_names=tuple(cameras[:MAX_CAMERAS]),
        camera_topics=(),
        camera_transports=robot.camera_transports[:1],
        joint_names=joints,
    )
    return dataclasses.replace(config, robot=fitted)


def run_recording(
    policy: Policy, recording: Recording, *, every: int = 0
) -> Iterator[tuple[Observation, PolicyResult] | SpecPruneError | None]:
    """Query the policy along a recording, as a robot that executed the recorded actions would.

    A control step is an executed action where the recording has them, else an image of the last
    camera (its motion is then unknown).

    Args:
        policy: fitted to the recording.
        recording: the source.
        every: control steps between queries; 0 takes the policy's horizon.

    Yields:
        Per control step: None, or the observation and result of a query, or why one was skipped.

    Raises:
        RecordingError: some camera, joint or the instruction never came.
    """
    robot = policy.config.robot
    inbox, since, queries = Inbox(robot, None), math.inf, 0
    every = every or robot.horizon
    trigger = ExecutedAction if recording.has_actions else CameraEvent
    for event in recording.events():
        try:
            _store(inbox, event)
        except ObservationError as error:
            yield error
            continue
        if not isinstance(event, trigger):
            continue
        if isinstance(event, CameraEvent) and event.camera != robot.camera_names[-1]:
            continue
        outcome = _query(policy, inbox, event.stamp_ns) if since >= every else None
        if isinstance(outcome, tuple):
            since, queries = 0, queries + 1
        yield outcome
        if queries:
            action = event if isinstance(event, ExecutedAction) else None
            since += 1
            try:
                if policy.observe_executed(action, inbox.images):
                    since = every  # the next step queries
            except ObservationError as error:
                yield error
    if not queries:
        ages = inbox.age_s(0)
        missing = [name for name, age in ages.items() if math.isinf(age)] or ['instruction']
        raise RecordingError(recording.path, f'no query was possible, missing: {missing}')


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


def _query(
    policy: Policy, inbox: Inbox, now_ns: int
) -> tuple[Observation, PolicyResult] | SpecPruneError:
    try:
        observation = inbox.observation(now_ns)
        return observation, policy.infer(observation)
    except (ObservationError, ActionError) as error:
        return error
