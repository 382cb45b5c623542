"""Compute a recorded live run's decisions again, from what it read, and compare bit for bit."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from specprune_ros.errors import ObservationError, RecordingError, SpecPruneError, shown
from specprune_ros.inbox import POSE, Inbox, proprio_inputs
from specprune_ros.recordings.base import CameraEvent, Event
from specprune_ros.recordings.decisions import (
    Decision,
    DecisionRecording,
    Key,
    QueryInputs,
    image_keys,
)
from specprune_ros.types import PolicyResult, PruneReport

if TYPE_CHECKING:
    from specprune_ros.config import RobotConfig
    from specprune_ros.policy import Policy

# How much later than the report that speaks of it an input may have been written.
LATE_NS = 2_000_000_000
# What is another machine's, another run's, or an input.
NOT_COMPARED = {'chunk_id', 'epoch', *(spec.name for spec in dataclasses.fields(QueryInputs))}
COMPARED = tuple(
    spec.name
    for spec in dataclasses.fields(PruneReport)
    if spec.name not in NOT_COMPARED and not spec.name.startswith('latency_')
)


@dataclass(frozen=True)
class Unrecorded:
    """Stands for an image that the recording lacks, until somebody looks at it."""

    path: str
    key: Key

    def rgb(self) -> np.ndarray:
        """Never an image.

        Raises:
            RecordingError: always.
        """
        raise _lacks(self.path, self.key)


@dataclass(frozen=True)
class Difference:
    """A decision that came out otherwise.

    Attributes:
        text: query, field, and both values.
    """

    text: str


class RecordedInputs:
    """The inputs that decisions still to come need, by key.

    Args:
        path: the recording's, for messages.
        needed: per decision the keys of its inputs.
    """

    def __init__(self, path: str, needed: list[set[Key]]):
        self._path = path
        self._last_use = {key: index for index, keys in enumerate(needed) for key in keys}
        self._events: dict[Key, Event] = {}

    def put(self, key: Key, event: Event) -> None:
        """Keep a recorded input, if some decision needs it."""
        if key in self._last_use and not isinstance(event, ObservationError):
            self._events[key] = event

    def get(self, key: Key) -> Event:
        """One input.

        Raises:
            RecordingError: it was not recorded.
        """
        if key not in self._events:
            raise _lacks(self._path, key)
        return self._events[key]

    def image(self, key: Key) -> object:
        """One camera image; where it was not recorded, what says so once it is looked at."""
        event = self._events.get(key)
        return event.image if isinstance(event, CameraEvent) else Unrecorded(self._path, key)

    def drop_used(self, index: int) -> None:
        """Forget what no later decision than this one needs."""
        last_use = self._last_use
        self._events = {k: event for k, event in self._events.items() if last_use[k] > index}


def _lacks(path: str, key: Key) -> RecordingError:
    return RecordingError(path, f'lacks {key[0]} stamped {key[1]} ns, which a query read')


def _check_inputs(path: str, decision: Decision, robot: RobotConfig) -> None:
    """Refuse a robot that reads other inputs than the recorded node did."""
    cameras, states = decision.report.cameras, len(decision.inputs.proprio_stamps_ns)
    needed = proprio_inputs(robot)
    if cameras != robot.camera_names:
        why = f'cameras {shown(cameras)}, configured are {shown(robot.camera_names)}'
    elif states != len(needed):
        why = f'{states} messages of state per query, robot.joint_names needs {shown(needed)}'
    else:
        return
    why = f"was recorded with {why}: name the node's parameters with --params"
    raise RecordingError(path, why)


def outcomes(
    policy: Policy, recording: DecisionRecording
) -> Iterator[PolicyResult | Difference | RecordingError]:
    """Compute every recorded decision again.

    Args:
        policy: as the recorded node was configured.
        recording: of that node.

    Yields:
        Per decision: the result where it is the recorded one bit for bit; else the first
        difference; or why it cannot be compared, as then all that follow in its episode.

    Raises:
        RecordingError: the recording is damaged, does not say what was read, or is of a robot with
            other inputs.
    """
    decisions = recording.decisions()
    proprio = proprio_inputs(policy.config.robot)
    if decisions:
        _check_inputs(recording.path, decisions[0], policy.config.robot)
    inputs = RecordedInputs(recording.path, [d.keys(proprio) for d in decisions])
    stream, at = recording.inputs(), -LATE_NS
    state = EpisodeState(policy, recording.path)
    for index, decision in enumerate(decisions):
        while at <= decision.written_ns + LATE_NS and (entry := next(stream, None)) is not None:
            at, key, event = entry
            inputs.put(key, event)
        yield state.outcome(decision, inputs)
        inputs.drop_used(index)


class EpisodeState:
    """Follows the recorded episodes with a policy of its own.

    Args:
        policy: nobody else's.
        path: the recording's, for messages.
    """

    def __init__(self, policy: Policy, path: str):
        self._policy = policy
        self._path = path
        self._next: tuple[int, int] | None = None  # epoch and query that can be computed
        self._gap = 'the recording begins within an episode'

    def outcome(
        self, decision: Decision, inputs: RecordedInputs
    ) -> PolicyResult | Difference | RecordingError:
        """One decision; see `outcomes`."""
        epoch, query = decision.report.epoch, decision.inputs.query
        if query == 0:
            self._policy.reset()
        elif self._next != (epoch, query):
            if self._next is not None:
                self._gap = f'no report of query {self._next[1]} was recorded'
            self._next = None
            why = f'query {query} of epoch {epoch} cannot be computed: {self._gap}'
            return RecordingError(self._path, why)
        try:
            self._take_method(decision.report)
            result = recompute(self._policy, decision, inputs)
        except RecordingError as error:
            self._next, self._gap = None, f'query {query} could not'
            return error
        except SpecPruneError as error:
            self._next, self._gap = None, f'query {query} failed'
            return Difference(_told(decision, f'recorded a result, computed: {error}'))
        self._next = (epoch, query + 1)
        difference = first_difference(decision, result)
        return result if not difference else Difference(_told(decision, difference))

    def _take_method(self, report: PruneReport) -> None:
        """What ~/set_dense did."""
        pruning = self._policy.config.pruning
        if pruning.method != report.method:
            self._policy.set_pruning(dataclasses.replace(pruning, method=report.method))


def recompute(policy: Policy, decision: Decision, inputs: RecordedInputs) -> PolicyResult:
    """One query, after the executed actions before it.

    Raises:
        RecordingError: an input that matters was not recorded.
        ObservationError, ActionError: see `Policy.infer`.
    """
    read, cameras, robot = decision.inputs, decision.report.cameras, policy.config.robot
    for action, images in read.steps(cameras):
        newest = {camera: inputs.image(key) for camera, key in images.items()}
        with contextlib.suppress(ObservationError):  # it was refused and counted then, too
            policy.observe_executed(inputs.get(action), newest)
    inbox = Inbox(robot, None)
    inbox.put_instruction(read.instruction)
    for camera, key in image_keys(cameras, read.image_stamps_ns.tolist()).items():
        inbox.put_image(camera, key[1], inputs.get(key).image)
    for key in zip(proprio_inputs(robot), read.proprio_stamps_ns.tolist(), strict=True):
        event = inputs.get(key)
        if key[0] == POSE:
            inbox.put_pose(key[1], event.position, event.quaternion_xyzw)
        else:
            inbox.put_joints(key[1], event.names, event.positions)
    observation = inbox.observation(decision.report.stamp_ns)
    return policy.infer(dataclasses.replace(observation, instruction=read.instruction))


def first_difference(decision: Decision, result: PolicyResult) -> str:
    """Which field differs and how; '' when none does."""
    pairs = {n: (getattr(decision.report, n), getattr(result.report, n)) for n in COMPARED}
    if decision.actions is not None:
        data, normalized = decision.actions
        pairs['action_chunk.data'] = (data, result.chunk.data)
        pairs['action_chunk.normalized'] = (normalized, result.chunk.normalized)
    for name, (recorded, computed) in pairs.items():
        if not _same(recorded, computed):
            return f'{name}: {_values(recorded, computed)}'
    return ''


def _same(recorded: object, computed: object) -> bool:
    if isinstance(recorded, (str, tuple)):
        return recorded == computed
    return np.array_equal(recorded, computed, equal_nan=True)


def _values(recorded: object, computed: object) -> str:
    """Both values; of arrays the first element that differs, and how many do."""
    if not isinstance(recorded, np.ndarray) or np.shape(recorded) != np.shape(computed):
        return f'recorded {shown(recorded)}, computed {shown(computed)}'
    old, new = np.ravel(recorded), np.ravel(computed)
    where = np.flatnonzero((old != new) & ~((old != old) & (new != new)))
    first = where[0]
    return f'recorded {old[first]}, computed {new[first]} at {first}; {len(where)} of {len(old)}'


def _told(decision: Decision, difference: str) -> str:
    report, at_s = decision.report, decision.written_ns / 1e9
    return (
        f'query {decision.inputs.query} of epoch {report.epoch}, chunk {report.chunk_id}, at '
        f'{at_s:.3f} s: {difference}'
    )


def run(arguments: argparse.Namespace) -> int:
    """`specprune replay --verify`.

    Returns:
        0 when every query that could be compared is equal; 1 when one is not.

    Raises:
        RecordingError: no query could be compared.
    """
    from rich.console import Console

    from specprune_ros.cli.options import config_from
    from specprune_ros.loading import load_policy

    console, path = Console(), Path(arguments.recording).expanduser()
    beside = path.with_name(f'{path.name}.yaml')  # as record.launch.py writes it
    arguments.params_default = [str(beside)] if beside.is_file() else ['models/tiny']
    config = config_from(arguments)
    recording = DecisionRecording(path, config.robot)
    policy = load_policy(config)
    policy.warm_up()
    counts: Counter[str] = Counter()
    first: dict[str, str] = {}
    for outcome in outcomes(policy, recording):
        kind, text = _told_kind(outcome)
        counts[kind] += 1
        if text:
            first.setdefault(kind, text)
    if counts['equal'] + counts['different'] == 0:
        raise RecordingError(path, first.get('not comparable', 'holds no decision of a query'))
    console.print(
        f'{sum(counts.values())} queries: {counts["equal"]} equal bit for bit, '
        f'{counts["different"]} different, {counts["not comparable"]} not comparable'
    )
    for kind, text in first.items():
        console.print(f'first {kind}: {text}', markup=False, soft_wrap=True)
    return 1 if counts['different'] else 0


def _told_kind(outcome: PolicyResult | Difference | RecordingError) -> tuple[str, str]:
    """How an outcome counts, and what to say of it."""
    if isinstance(outcome, Difference):
        return 'different', outcome.text
    if isinstance(outcome, RecordingError):
        return 'not comparable', str(outcome)
    return 'equal', ''
