"""The robot-facing object: observation in, action chunk and report out.

Works without ROS: from a script, a simulator, a server, or `ros/vla_node.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial

import numpy as np
import torch

from specprune_ros.checks import (
    check_image,
    check_instruction,
    check_proprio,
    executed_displacement,
)
from specprune_ros.config import PolicyConfig, PruneConfig
from specprune_ros.episode import Episode, Frame, FrameHistory
from specprune_ros.errors import ActionError, ConfigError, ObservationError, named
from specprune_ros.host_copy import DeferredResult, HostCopy
from specprune_ros.images import CameraImage, as_rgb, turned
from specprune_ros.models import load, pick_device
from specprune_ros.models.base import VLAModel
from specprune_ros.models.forms import prepared
from specprune_ros.models.preprocess import Staged
from specprune_ros.models.staging import make_stager
from specprune_ros.passes import Outcome
from specprune_ros.pruning import check_depth, make_method
from specprune_ros.pruning.base import PruneMethod, PruneTrace, QueryContext
from specprune_ros.pruning.guard import GuardState
from specprune_ros.pruning.motion import motion_of
from specprune_ros.query import Query, QueryInputs
from specprune_ros.query_graph import CudaRecorder, QueryGraphs
from specprune_ros.report import View, input_stamps, make_report
from specprune_ros.robot_action import to_robot, within_limits
from specprune_ros.timing import StageClock
from specprune_ros.token_layout import TokenLayout
from specprune_ros.types import (
    ActionChunk,
    ActionSpace,
    ExecutedAction,
    Observation,
    PolicyResult,
    PruneReport,
)


class Policy:
    """A VLA model with a pruning method; the only owner of episode state.

    Not thread-safe: call it from one thread.

    Attributes:
        model: the loaded model.
        config: all axes.
        decoder: the model's, in the form in which this policy runs it.
        graphs: what records and replays its queries; None where all run eagerly.
        last_laps_s: stage or part of it (timing) -> seconds, last query.

    Args:
        model: a loaded model.
        config: all axes.
        method: instead of the configured one, e.g. a method of one's own.

    Raises:
        ConfigError: model, robot and pruning do not fit, or the method is unknown.
    """

    def __init__(self, model: VLAModel, config: PolicyConfig, method: PruneMethod | None = None):
        self.model = model
        self.config = config
        self._check_robot()
        self._check_pruning(config.pruning)
        self._device = pick_device(config.model.device)
        self.decoder = prepared(model.decoder, config.model)
        self._stager = make_stager(model, self._device)
        self.graphs = self._make_graphs()
        self._method = method or make_method(config.pruning)
        self._method.check_depth(len(model.decoder.layers))
        self._rotations = config.robot.per_camera('camera_rotations')
        self._episode = Episode(epoch=1)
        self._chunks = 0
        self.last_laps_s: dict[str, float] = {}

    def _make_graphs(self) -> QueryGraphs | None:
        """None where nothing is recorded.

        Raises:
            ConfigError: a recording is asked for, and cannot be.
        """
        wanted, cuda = self.config.model.cuda_graph, self._device.type == 'cuda'
        if wanted == 'on' and not cuda:
            raise ConfigError('model.cuda_graph', wanted, f'{self._device} has no CUDA graphs')
        if wanted == 'on' and self.decoder.causal:
            raise ConfigError('model.cuda_graph', wanted, 'a causal model goes token by token')
        return QueryGraphs(CudaRecorder(self._device)) if cuda and wanted != 'off' else None

    @classmethod
    def load(cls, config: PolicyConfig) -> Policy:
        """Load the configured model.

        Raises:
            ConfigError, CheckpointError, MissingDependencyError: see models.load.
        """
        make_method(config.pruning)  # a typo must not cost the time to load a model
        return cls(load(config), config)

    @property
    def epoch(self) -> int:
        """Which episode this is; rises at every reset."""
        return self._episode.epoch

    def reset(self) -> None:
        """Forget the episode: frames, V_global, confidence, mode, executed displacement."""
        self._episode = Episode(epoch=self._episode.epoch + 1)

    def set_pruning(self, pruning: PruneConfig) -> None:
        """Take other pruning parameters from the next query on.

        Another method forgets V_global and the guard's verdict on the former one. Without a guard
        its verdict goes, too.

        Raises:
            ConfigError: unknown method, or it does not fit the model; nothing changes.
        """
        method = make_method(pruning)
        self._check_pruning(pruning)
        if method.name != self._method.name:
            self._episode.memory = None
        if method.name != self._method.name or not pruning.guard_every:
            self._episode.guard = GuardState()
        self._method = method
        self.config = PolicyConfig(
            robot=self.config.robot,
            model=self.config.model,
            pruning=pruning,
            runtime=self.config.runtime,
        )

    def warm_up(self) -> None:
        """Run the configured number of inferences on grey images, then forget them.

        Raises:
            ActionError: even a grey image gives no finite action.
        """
        info = self.model.info
        grey = np.full((*info.image_size, 3), 127, np.uint8)
        chunks = self._chunks
        for _ in range(self.config.runtime.warm_up_queries):
            proprio = np.zeros(info.proprio_dim) if info.proprio_dim else None
            self.infer(
                Observation(
                    images=dict.fromkeys(info.cameras, grey),
                    proprio=proprio,
                    instruction='warm up',
                    stamp_ns=0,
                )
            )
        self._chunks = chunks
        self._episode = Episode(epoch=self._episode.epoch)

    def observe_executed(
        self,
        action: ExecutedAction | None,
        images: Mapping[str, np.ndarray | CameraImage] | None = None,
        image_stamps_ns: Mapping[str, int] | None = None,
    ) -> bool:
        """Tell the policy that one control step was executed; a dry run's action was not.

        Args:
            action: what was sent to the robot; None when a step passed but what moved is unknown.
            images: the newest camera images when it was sent, if there are any. They are decoded
                only if a query compares with them, so a caller hands them over as they came. A
                camera that is missing among others was away: at the next query all of it stays.
            image_stamps_ns: camera -> its image's stamp, where a caller knows them: the report
                names by them what the query went by.

        Returns:
            True when the rest of the chunk should be replaced by a new query at once: motion
            turned fine, and pruning.replan_on_fine asks for it.

        Raises:
            ObservationError: the action is not finite, or lacks the elements that the robot
                configuration names; the step counts, motion becomes unknown.
        """
        if action is not None and action.dry_run:
            return False
        if action is not None:
            self._episode.executed.append((action.stamp_ns, image_stamps_ns or {}))
        self._count_step(images)
        moved = None if action is None else executed_displacement(action, self.config.robot)
        return moved is not None and self._moved(*moved)

    def _count_step(self, images: Mapping[str, np.ndarray | CameraImage] | None) -> None:
        episode = self._episode
        if images:
            episode.frames.push(Frame(episode.step, dict(images)))
            episode.absent |= set(self.model.info.cameras) - set(images)
        episode.step += 1
        episode.counts_steps = True
        episode.motion = None

    def _moved(self, translation: np.ndarray, rotation: np.ndarray) -> bool:
        """Tell the controller of one step's motion; whether it asks for a new query."""
        episode, was_fine = self._episode, self._episode.fine
        episode.displacement = episode.displacement + translation
        episode.motion = motion_of(translation, rotation)
        episode.fine = self._method.next_fine(was_fine, episode.motion)
        pruning = self.config.pruning
        return pruning.replan_on_fine and pruning.controller and episode.fine and not was_fine

    def infer(self, observation: Observation) -> PolicyResult:
        """One query.

        Returns:
            The chunk and what pruning did. `chunk.stamp_ns` is the observation's: a caller with a
            clock sets the start of validity.

        Raises:
            ObservationError: the observation cannot be used; the episode goes on, except that a
                camera whose size changed starts a new one.
            ActionError: the model's action is not finite.
        """
        with torch.inference_mode(), current(self._device):
            return self._infer(observation)

    def _infer(self, observation: Observation) -> PolicyResult:
        clock = StageClock(self._device)
        images = self._checked_images(observation)
        words = self._stager.words(observation.instruction)
        self._begin_query(observation)
        staged, reference, fault = self._staged(images)
        inputs = QueryInputs(
            images=staged,
            reference=None if reference is None else reference.pixels,
            words=words,
            state=self._stager.state(observation.proprio),
            memory=self._episode.memory,
        )
        clock.lap('preprocess')
        query = self._query(words.layout, reference, fault)
        outcome = self._evaluate(query, inputs, clock)
        actions = HostCopy(outcome.done.actions, self._device)
        clock.lap('act')
        trace = self._report_copy(outcome.done.trace)
        normalized = actions.wait().double().numpy()
        self.last_laps_s = clock.laps()
        chunk = self._chunk(observation, normalized)
        self._take_over(outcome, trace)
        report = self._report(chunk, query, outcome, trace, reference, clock.seconds())
        read = input_stamps(observation, self._episode, self.model.info.cameras)
        self._end_query(observation, staged)
        return DeferredResult(chunk, lambda: replace(report(), **read))

    def _query(self, layout: TokenLayout | None, reference: Frame | None, fault: str) -> Query:
        return Query(
            model=self.model,
            stager=self._stager,
            decoder=self.decoder,
            method=self._method,
            config=self.config.pruning,
            context=self._context(layout, reference),
            guard=self._episode.guard,
            fault=fault,
        )

    def _evaluate(self, query: Query, inputs: QueryInputs, clock: StageClock) -> Outcome:
        """Run the query, or replay what was recorded of one of its kind."""
        if self.graphs is None:
            return query.run(inputs, clock)
        why, kind = query.kind(inputs)
        if why:
            self.graphs.eager(why)
            return query.run(inputs, clock)
        outcome = self.graphs.run(
            kind, query.record, inputs, plain=lambda inputs: query.run(inputs, clock)
        )
        clock.lap('graph')
        outcome = replace(outcome, guard=replace(query.guard, overdue=False))
        if query.context.query == 0:  # before the robot moves
            query.record_ahead(self.graphs, inputs, outcome)
        return outcome

    def _report_copy(self, trace: PruneTrace) -> HostCopy[PruneTrace]:
        """The trace on its way to the host, behind the actions; recall in double precision."""
        recall = None if trace.recall is None else trace.recall.double()
        return HostCopy(replace(trace, recall=recall), self._device)

    def _report(
        self,
        chunk: ActionChunk,
        query: Query,
        outcome: Outcome,
        trace: HostCopy[PruneTrace],
        reference: Frame | None,
        latency_s: dict[str, float],
    ) -> Callable[[], PruneReport]:
        """Makes the report of a query, of what is known of the episode now."""
        episode = self._episode
        then = replace(
            episode,
            guard=query.guard,  # what a check found is for the next one
            frames=FrameHistory(),
            memory=None,
            recalls=[*episode.recalls],
        )
        return partial(
            _finish_report,
            trace,
            chunk=chunk,
            layout=outcome.layout,
            episode=then,
            method=self._method.name,
            alpha=query.context.alpha,
            reference_age=0 if reference is None else episode.step - reference.step,
            view=View(self.model.info.crop_side, self._rotations),
            decoder=self.decoder,
            fallback=outcome.fallback,
            guard_disagreement=outcome.disagreement,
            dense_passes=outcome.dense_passes,
            latency_s=latency_s,
        )

    def _begin_query(self, observation: Observation) -> None:
        episode = self._episode
        other_task = episode.instruction not in (None, observation.instruction)
        if other_task or self._time_jumped(observation):
            sizes = episode.sizes
            self.reset()
            self._episode.sizes = sizes  # of this very observation
        elif episode.query and not episode.counts_steps:
            # Nobody reports executed actions: count the control steps that time has room for.
            period_ns = 1e9 * self.config.robot.step_dt_s
            since_ns = observation.stamp_ns - episode.stamp_ns
            episode.step = episode.step_of_query + max(round(since_ns / period_ns), 1)

    def _time_jumped(self, observation: Observation) -> bool:
        if self._episode.stamp_ns is None:
            return False
        since_s = (observation.stamp_ns - self._episode.stamp_ns) / 1e9
        return not 0 <= since_s <= self.config.runtime.max_gap_s

    def _end_query(self, observation: Observation, staged: Staged) -> None:
        episode = self._episode
        episode.instruction = observation.instruction
        episode.stamp_ns = observation.stamp_ns
        episode.frames.push(Frame(episode.step, {}, staged))
        episode.step_of_query = episode.step
        episode.absent.clear()
        episode.executed.clear()
        episode.displacement = np.zeros(3)
        episode.query += 1

    def _staged(self, images: list[np.ndarray]) -> tuple[Staged, Frame | None, str]:
        """The query's images on the device, its reference frame with its own there, and a fault.

        Both go there in one call, which works on all images side by side.
        """
        episode = self._episode
        wanted, fault = self._reference_age()
        raw: list[np.ndarray] = []
        while (frame := episode.frames.find(episode.step, wanted)) and frame.pixels is None:
            try:
                raw = self._upright(frame.images)
                break
            except ObservationError:
                episode.frames.forget(frame)  # another one serves
        staged = self._stager.images([*images, *raw])
        current, older = staged[: len(images)], iter(staged[len(images) :])
        if frame is not None and frame.pixels is None:
            names = self.model.info.cameras
            seen = [name in frame.images for name in names]
            # An unseen camera stands in for itself: its similarity is never read.
            both = zip(seen, current, strict=True)
            frame.pixels = tuple(next(older) if there else now for there, now in both)
            frame.unseen = frozenset(index for index, there in enumerate(seen) if not there)
            frame.images = {}
        return current, frame, fault

    def _reference_age(self) -> tuple[int, str]:
        """How many control steps back to compare, 0 for not; and what failed, or empty."""
        episode = self._episode
        displacement = float(np.linalg.norm(episode.displacement))
        try:
            age = self._method.reference_age(displacement, episode.frames.reach(episode.step))
        except Exception as error:
            return 0, named(error)
        return age, ''

    def _upright(self, images: Mapping[str, np.ndarray | CameraImage]) -> list[np.ndarray]:
        """RGB images in model order, checked, and turned as the robot's configuration says."""
        upright = []
        for name in (name for name in self.model.info.cameras if name in images):
            image = as_rgb(images[name])
            check_image(name, image)
            upright.append(turned(image, self._rotations[name]))
        return upright

    def _context(self, layout: TokenLayout | None, reference: Frame | None) -> QueryContext:
        """What the method may know of the query, but for what comes with its inputs."""
        episode = self._episode
        return QueryContext(
            layout=layout,
            depth=len(self.model.decoder.layers),
            device=self._device,
            fine=episode.fine or episode.motion is None,
            alpha=episode.guard.alpha(self.config.pruning),
            similarity=None,
            unseen=self._unseen(reference),
            memory=None,
            query=episode.query,
        )

    def _unseen(self, reference: Frame | None) -> frozenset[int]:
        """Cameras, in model order, that were away since the last query or in the reference."""
        absent = self._episode.absent
        away = {i for i, name in enumerate(self.model.info.cameras) if name in absent}
        return frozenset(away if reference is None else away | reference.unseen)

    def _take_over(self, outcome: Outcome, trace: HostCopy[PruneTrace]) -> None:
        """Keep what a good query leaves to the next."""
        episode, done = self._episode, outcome.done
        if done.memory is not None:
            episode.memory = done.memory
        episode.guard = outcome.guard
        if trace.value.recall is not None:
            # Its numbers may still be on their way; whoever makes a report waits for them.
            episode.recalls.append(trace.value.recall.numpy())

    def _chunk(self, observation: Observation, normalized: np.ndarray) -> ActionChunk:
        robot = self.config.robot
        data = to_robot(self.model.unnormalize(normalized), robot)
        if not (np.isfinite(normalized).all() and np.isfinite(data).all()):
            raise ActionError('the model gave an action that is not finite; it was discarded')
        limited = within_limits(data, robot)
        self._chunks += 1
        return ActionChunk(
            stamp_ns=observation.stamp_ns,
            observation_stamp_ns=observation.stamp_ns,
            frame_id=robot.frame_id,
            step_dt_s=robot.step_dt_s,
            valid_for_s=robot.chunk_validity_s,
            chunk_id=self._chunks,
            epoch=self._episode.epoch,
            space=ActionSpace[robot.action_space.upper()],
            names=robot.action_names,
            units=robot.per_action('action_units'),
            data=limited,
            normalized=normalized,
            clamped=int((limited != data).sum()),
            dry_run=self.config.runtime.dry_run,
            stand_in=self.model.info.stand_in,
        )

    def _check_robot(self) -> None:
        robot, info = self.config.robot, self.model.info
        fits = {
            'camera_names': (robot.camera_names, info.cameras),
            'horizon': (robot.horizon, info.horizon),
            'action_names': (len(robot.action_names), info.action_dim),
            'joint_names': (len(robot.joint_names), info.proprio_dim),
        }
        for name, (got, needed) in fits.items():
            if got != needed:
                raise ConfigError(
                    f'robot.{name}', getattr(robot, name), f'{info.name} needs {needed}'
                )

    def _check_pruning(self, pruning: PruneConfig) -> None:
        check_depth(pruning, len(self.model.decoder.layers))
        if self.model.decoder.causal and pruning.score_direction == 'image_to_text':
            raise ConfigError(
                'pruning.score_direction',
                pruning.score_direction,
                'in a causal model the image comes first and attends to no text',
            )

    def _checked_images(self, observation: Observation) -> list[np.ndarray]:
        """All cameras' RGB images, in model order, after every check of the observation."""
        names = self.model.info.cameras
        missing = [name for name in names if name not in observation.images]
        self._episode.absent.update(missing)
        check_instruction(observation.instruction)
        check_proprio(observation.proprio, self.model.info.proprio_dim)
        for name in missing:
            raise ObservationError(
                'camera_missing', f'cameras/{name}', None, 'no image of this camera'
            )
        images = self._upright(observation.images)
        self._check_sizes(dict(zip(names, images, strict=True)))
        return images

    def _check_sizes(self, images: Mapping[str, np.ndarray]) -> None:
        """A camera whose size changed was swapped or reconfigured: its past cannot be compared."""
        sizes = {name: image.shape[:2] for name, image in images.items()}
        before = {name: self._episode.sizes.get(name, size) for name, size in sizes.items()}
        resized = [name for name in sizes if sizes[name] != before[name]]
        if resized:
            self.reset()
        self._episode.sizes = sizes
        for name in resized:
            raise ObservationError(
                'camera_resized',
                f'cameras/{name}',
                sizes[name],
                f'the size (rows, cols) was {before[name]}: the episode starts anew',
            )


def current(device: torch.device) -> AbstractContextManager:
    """Makes a GPU the one whose streams and events are meant; nothing for another device."""
    return torch.cuda.device(device) if device.type == 'cuda' else nullcontext()


def _finish_report(trace: HostCopy[PruneTrace], **rest: object) -> PruneReport:
    return make_report(trace=trace.wait(), **rest)
