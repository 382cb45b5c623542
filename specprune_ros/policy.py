"""The robot-facing object: observation in, action chunk and report out.

Works without ROS: from a script, a simulator, a server, or `ros/vla_node.py`.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from specprune_ros.checks import (
    check_image,
    check_instruction,
    check_proprio,
    executed_displacement,
)
from specprune_ros.config import PolicyConfig, PruneConfig
from specprune_ros.episode import Episode
from specprune_ros.errors import ActionError, ConfigError, ObservationError
from specprune_ros.images import CameraImage, as_rgb
from specprune_ros.models import load_model, pick_device
from specprune_ros.models.base import Prompt, VLAModel
from specprune_ros.models.decoder import Decoded, decode
from specprune_ros.pruning import make_method
from specprune_ros.pruning.base import PruneRun, PruneTrace, QueryContext
from specprune_ros.pruning.motion import motion_of
from specprune_ros.pruning.scores import patch_similarity
from specprune_ros.report import make_report
from specprune_ros.timing import StageClock
from specprune_ros.types import (
    ActionChunk,
    ActionSpace,
    ExecutedAction,
    Observation,
    PolicyResult,
)


class Policy:
    """A VLA model with a pruning method; the only owner of episode state.

    Not thread-safe: call it from one thread.

    Args:
        model: a loaded model.
        config: all axes.

    Raises:
        ConfigError: model and robot do not fit, or the method is unknown.
    """

    def __init__(self, model: VLAModel, config: PolicyConfig):
        self.model = model
        self.config = config
        self._check_fit()
        self._device = pick_device(config.model.device)
        self._method = make_method(config.pruning)
        self._episode = Episode(epoch=1)
        self._chunks = 0

    @classmethod
    def load(cls, config: PolicyConfig) -> Policy:
        """Load the configured model.

        Raises:
            ConfigError, CheckpointError, MissingDependencyError: see models.load_model.
        """
        make_method(config.pruning)  # a typo must not cost the time to load a model
        return cls(load_model(config), config)

    @property
    def epoch(self) -> int:
        """Which episode this is; rises at every reset."""
        return self._episode.epoch

    def reset(self) -> None:
        """Forget the episode: frames, V_global, confidence, mode, executed displacement."""
        self._episode = Episode(epoch=self._episode.epoch + 1)

    def set_pruning(self, pruning: PruneConfig) -> None:
        """Take other pruning parameters from the next query on; another method forgets V_global.

        Raises:
            ConfigError: unknown method; nothing changes.
        """
        method = make_method(pruning)
        if method.name != self._method.name:
            self._episode.memory = None
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
    ) -> None:
        """Tell the policy that one control step was executed; a dry run's action was not.

        Args:
            action: what was sent to the robot; None when a step passed but what moved is unknown.
            images: the newest camera images when it was sent, if there are any. They are decoded
                only if a query compares with them, so a caller hands them over as they came.

        Raises:
            ObservationError: the action is not finite, or lacks the elements that the robot
                configuration names; the step counts, motion becomes unknown.
        """
        if action is not None and action.dry_run:
            return
        episode = self._episode
        if images:
            episode.frames.push(episode.step, images, processed=False)
        episode.step += 1
        episode.motion = None
        if action is None:
            return
        translation, rotation = executed_displacement(action, self.config.robot)
        episode.displacement = episode.displacement + translation
        episode.motion = motion_of(translation, rotation)
        episode.fine = self._method.next_fine(episode.fine, episode.motion)

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
        clock = StageClock(self._device)
        images = self._checked_images(observation)
        self._begin_query(observation)
        images = {name: self.model.preprocess(image) for name, image in images.items()}
        with torch.inference_mode():
            frames = self._to_device(images)
            age, similarity = self._similarity(frames)
            clock.lap()
            prompt = self.model.embed(frames, observation.proprio, observation.instruction)
            clock.lap()
            context = QueryContext(
                layout=prompt.layout,
                depth=len(self.model.decoder.layers),
                device=self._device,
                fine=self._episode.fine or self._episode.motion is None,
                similarity=similarity,
                memory=self._episode.memory,
                query=self._episode.query,
            )
            decoded, trace, fallback = self._decode(prompt, context)
            clock.lap()
            head = prompt.layout.head.idx(self._device)
            normalized = self.model.act(decoded.at(head)).cpu().double().numpy()
            clock.lap()
        chunk = self._chunk(observation, normalized)
        report = make_report(
            chunk=chunk,
            layout=prompt.layout,
            trace=trace,
            episode=self._episode,
            method=self._method.name,
            alpha=self.config.pruning.alpha,
            reference_age=age,
            fallback=fallback,
            latency_s=clock.seconds(),
        )
        self._end_query(observation, images)
        return PolicyResult(chunk=chunk, report=report)

    def _begin_query(self, observation: Observation) -> None:
        episode = self._episode
        went_back = episode.stamp_ns is not None and observation.stamp_ns < episode.stamp_ns
        other_task = episode.instruction not in (None, observation.instruction)
        if went_back or other_task:
            self.reset()
        elif episode.query and episode.step == episode.step_of_query:
            # Nobody reports executed actions: count the control steps that time has room for.
            period_ns = 1e9 * self.config.robot.step_dt_s
            since_ns = observation.stamp_ns - episode.stamp_ns
            episode.step += max(round(since_ns / period_ns), 1)

    def _end_query(self, observation: Observation, images: dict[str, np.ndarray]) -> None:
        episode = self._episode
        episode.instruction = observation.instruction
        episode.stamp_ns = observation.stamp_ns
        episode.frames.push(episode.step, images, processed=True)
        episode.step_of_query = episode.step
        episode.displacement = np.zeros(3)
        episode.query += 1

    def _to_device(self, images: Mapping[str, np.ndarray]) -> Tensor:
        """[V, Y, X, 3] uint8 in camera order."""
        stacked = np.stack([images[name] for name in self.model.info.cameras])
        return torch.from_numpy(stacked).to(self._device)

    def _similarity(self, frames: Tensor) -> tuple[int, Tensor | None]:
        """The reference frame's age and the [V, N] patch similarity to it."""
        episode = self._episode
        displacement = float(np.linalg.norm(episode.displacement))
        wanted = self._method.reference_age(displacement, episode.frames.reach(episode.step))
        found = episode.frames.reference(
            episode.step, wanted, lambda image: self.model.preprocess(as_rgb(image))
        )
        if found is None or any(name not in found[1] for name in self.model.info.cameras):
            return 0, None
        age, images = found
        return age, patch_similarity(frames, self._to_device(images), self.model.info.grid)

    def _decode(self, prompt: Prompt, context: QueryContext) -> tuple[Decoded, PruneTrace, str]:
        """Decode with pruning, or dense when anything in that fails; also why it failed.

        After a failure the method's memory stays as it was.
        """
        try:
            run = self._method.begin(context)
            decoded = decode(self.model.decoder, prompt.embeds, prompt.layout, run)
            trace, memory = run.trace(), run.memory()
        except Exception as error:  # whatever fails in pruning costs speed, never the action
            fallback = f'{type(error).__name__}: {error}'
            run = PruneRun(context)
            decoded = decode(self.model.decoder, prompt.embeds, prompt.layout, run)
            return decoded, run.trace(), fallback
        self._episode.memory = memory
        return decoded, trace, ''

    def _chunk(self, observation: Observation, normalized: np.ndarray) -> ActionChunk:
        robot = self.config.robot
        data = self.model.unnormalize(normalized)
        if not (np.isfinite(normalized).all() and np.isfinite(data).all()):
            raise ActionError('the model gave an action that is not finite; it was discarded')
        low, high = (np.array(robot.per_action(name)) for name in ('action_min', 'action_max'))
        limited = np.clip(data, low, high)
        self._chunks += 1
        return ActionChunk(
            stamp_ns=observation.stamp_ns,
            observation_stamp_ns=observation.stamp_ns,
            frame_id=robot.frame_id,
            step_dt_s=robot.step_dt_s,
            valid_for_s=robot.step_dt_s * len(data),
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

    def _check_fit(self) -> None:
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
        for name in ('translation_names', 'rotation_names'):
            if len(getattr(robot, name)) != 3:
                raise ConfigError(f'robot.{name}', getattr(robot, name), 'needs 3 names')

    def _checked_images(self, observation: Observation) -> dict[str, np.ndarray]:
        """All cameras' RGB images, in model order, after every check of the observation."""
        check_instruction(observation.instruction)
        check_proprio(observation.proprio, self.model.info.proprio_dim)
        images = {}
        for name in self.model.info.cameras:
            if name not in observation.images:
                raise ObservationError(
                    'camera_missing', f'cameras/{name}', None, 'no image of this camera'
                )
            images[name] = as_rgb(observation.images[name])
            check_image(name, images[name])
        self._check_sizes(images)
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
