"""What a benchmark compares: methods in forms over one model, and the scene they are shown."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from specprune_ros.config import PolicyConfig
from specprune_ros.errors import ConfigError, SpecPruneError
from specprune_ros.models import load
from specprune_ros.models.base import VLAModel
from specprune_ros.models.forms import FORMS
from specprune_ros.policy import Policy
from specprune_ros.pruning import make_method
from specprune_ros.types import ExecutedAction, Observation

DENSE, BASELINE = 'none', 'sdpa'
BUDGETS = ('union', 'fixed')
RECORDABLE = 'fixed'  # the budget whose queries can be recorded as a graph
FAST, SLOW = 0.9, 0.1  # executed translation per step: coarse and fine
STEP_NS = 50_000_000
IMAGE_SHAPE = (480, 640, 3)
CAMERAS = ('wrist', 'side', 'overhead', 'front')


@dataclass(frozen=True, eq=False)
class Variant:
    """One thing to time.

    Attributes:
        method: a key of pruning.METHODS.
        form: a key of models.forms.FORMS.
        budget: 'union' or 'fixed'; '' where that means nothing.
        policy: runs it.
    """

    method: str
    form: str
    budget: str
    policy: Policy

    @property
    def label(self) -> str:
        """Form and budget; one of a kind among a method's variants."""
        return f'{self.form} {self.budget}'.strip()

    @property
    def cameras(self) -> int:
        """How many images a query takes."""
        return len(self.policy.model.info.cameras)


@dataclass(frozen=True, eq=False)
class Lineup:
    """Variants over one model's weights; the first is dense in the baseline's form.

    Attributes:
        variants: at least that one.
        skipped: form -> why this machine does not run it.
    """

    variants: list[Variant]
    skipped: dict[str, str]


def with_cameras(config: PolicyConfig, cameras: int) -> PolicyConfig:
    """The configuration with so many cameras."""
    robot = dataclasses.replace(
        config.robot,
        camera_names=CAMERAS[:cameras],
        camera_topics=(),
        camera_transports=config.robot.camera_transports[:1],
        camera_rotations=config.robot.camera_rotations[:1],
    )
    return dataclasses.replace(config, robot=robot)


def make_lineup(
    config: PolicyConfig, cameras: int, methods: Sequence[str], forms: Sequence[str]
) -> Lineup:
    """Dense and pruned policies in all forms, warmed up, over one loaded model.

    Args:
        config: all other axes.
        cameras: 1 to 4.
        methods: keys of pruning.METHODS; the dense one is always there.
        forms: keys of FORMS; the dense baseline is always there.

    Raises:
        ConfigError: there is no such method or form.
        CheckpointError, MissingDependencyError: see models.load.
    """
    for form in forms:
        if form not in FORMS:
            raise ConfigError('--forms', form, f'must be one of {", ".join(FORMS)}')
    for method in methods:
        make_method(dataclasses.replace(config.pruning, method=method))
    config = with_cameras(config, cameras)
    gc.collect()  # policies refer to themselves: a former lineup's weights would stay
    model = load(config)
    variants, skipped = [in_form(model, config, DENSE, BASELINE)], {}
    for form in dict.fromkeys(forms):
        try:
            variants += _of_form(model, config, methods, form)
        except (SpecPruneError, RuntimeError) as error:  # a compiler fails as RuntimeError
            if form == BASELINE:
                raise
            skipped[form] = str(error).strip().partition('\n')[0]
    return Lineup(variants, skipped)


def _of_form(
    model: VLAModel, config: PolicyConfig, methods: Sequence[str], form: str
) -> list[Variant]:
    """Dense, unless that is the baseline, and every method with every budget."""
    found = [] if form == BASELINE else [in_form(model, config, DENSE, form)]
    for method in dict.fromkeys(methods):
        if method != DENSE:
            found += _with_budgets(model, config, method, form)
    return found


def _with_budgets(model: VLAModel, config: PolicyConfig, method: str, form: str) -> list[Variant]:
    """One variant per budget that the form can run, or a single one where none means anything."""
    recorded = FORMS[form].get('cuda_graph') == 'on'
    found = []
    for budget in (RECORDABLE,) if recorded else BUDGETS:
        variant = in_form(model, config, method, form, budget)
        if _reported_budget(variant.policy) != budget:
            return [dataclasses.replace(variant, budget='')]
        found.append(variant)
    return found


def in_form(
    model: VLAModel, config: PolicyConfig, method: str, form: str, budget: str = ''
) -> Variant:
    """A warmed-up policy over a loaded model, whose weights it shares.

    Raises:
        ConfigError, MissingDependencyError: this machine cannot run the form.
    """
    pruning = dataclasses.replace(config.pruning, method=method, budget=budget or 'auto')
    settings = dataclasses.replace(config.model, **FORMS[form])
    policy = Policy(model, dataclasses.replace(config, model=settings, pruning=pruning))
    policy.warm_up()
    return Variant(method, form, budget, policy)


def _reported_budget(policy: Policy) -> str:
    policy.reset()
    info = policy.model.info
    return policy.infer(scene(info.cameras, 0, info.proprio_dim)).report.budget


def scene(cameras: tuple[str, ...], step: int, proprio: int) -> Observation:
    """A seeded synthetic scene in which a square moves."""
    images = {}
    for index, name in enumerate(cameras):
        coarse = np.random.default_rng(index).integers(0, 255, (12, 16, 3), np.uint8)
        image = coarse.repeat(IMAGE_SHAPE[0] // 12, axis=0).repeat(IMAGE_SHAPE[1] // 16, axis=1)
        left = (20 * step) % (IMAGE_SHAPE[1] - 80)
        image[200:280, left : left + 80] = (240, 20, 20)
        images[name] = image
    return Observation(
        images=images,
        proprio=np.zeros(proprio) if proprio else None,
        instruction='put the black bowl on the plate',
        stamp_ns=step * STEP_NS,
    )


def executed(policy: Policy, speed: float) -> ExecutedAction:
    """One executed action downwards at a speed, in the robot's own elements."""
    robot = policy.config.robot
    data = np.zeros(len(robot.action_names))
    if robot.translation_names[2:] and robot.translation_names[2] in robot.action_names:
        data[robot.action_names.index(robot.translation_names[2])] = -speed
    return ExecutedAction(
        stamp_ns=0, names=robot.action_names, units=robot.per_action('action_units'), data=data
    )


def execute_chunk(policy: Policy, observation: Observation, step: int) -> None:
    """Tell a policy that its chunk was executed: fast after odd steps, slowly after even ones."""
    action = executed(policy, FAST if step % 2 else SLOW)
    for _ in range(policy.config.robot.horizon):
        policy.observe_executed(action, observation.images)
