"""What the simulated robot can be told to do.

`<suite>/<index>` is an official task of LIBERO or LIBERO-PRO with its own initial states and
instruction.
`object_shuffled/<index>` is ours: scene, instructions and success check of LIBERO-Object, with
another distribution of initial states, see `placement`. Its figures are not LIBERO's.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from specprune_ros.errors import ConfigError
from specprune_ros.sim.placement import Shuffle

# Suite -> (tasks, control steps after which an episode has failed). Source: the evaluation that
# published OpenVLA; each limit is a little above the longest demonstration.
OWN_SUITES = {
    'libero_spatial': (10, 220),
    'libero_object': (10, 280),
    'libero_goal': (10, 300),
    'libero_10': (10, 520),
    'libero_90': (90, 400),
}
# LIBERO-PRO's perturbations of them, under our limits for the originals: other looks, other
# places, other words, another goal. It has more.
PERTURBATIONS = ('object', 'swap', 'lan', 'task')
SUITES = OWN_SUITES | {
    f'{suite}_{change}': figures
    for suite, figures in OWN_SUITES.items()
    if suite != 'libero_90'
    for change in PERTURBATIONS
}
REWORDED = ('_lan', '_task')  # what is to be done is in the scene's file, not in the task's name
SHUFFLED = 'object_shuffled'
# What a policy is given where images, or the instruction, are withheld from it.
GREY, WITHHELD = 128, 'do it'
OFFICIAL_STATES = 50  # per task
SEEDS = 2**31  # of a drawn layout

# Scene of libero_object/0. Its slot at (0.15, 0.03) is nearer here: beyond x = 0.16 an elbow joint
# reaches its limit while the hand carries something to the basket.
OBJECT_SCENE = ('libero_object', 0)
SHUFFLE = Shuffle(
    objects=(
        'alphabet_soup_1',
        'cream_cheese_1',
        'tomato_sauce_1',
        'butter_1',
        'milk_1',
        'salad_dressing_1',
    ),
    slots=(
        (-0.12, -0.24), (0.05, -0.10), (-0.15, 0.06), (0.10, -0.20), (0.11, 0.03), (-0.20, -0.08),
    ),
    jitter_m=0.03,
    distance_m=0.10,
    hand_m=(0.065, 0.13),
)  # fmt: skip
BASKET = 'basket_1_contain_region'
# Milk and dressing stand higher than the hand opens, so they only distract.
WANTED = ('alphabet_soup_1', 'cream_cheese_1', 'tomato_sauce_1', 'butter_1')


@dataclass(frozen=True, kw_only=True)
class SimTask:
    """One thing to do.

    Attributes:
        name: `<suite>/<index>`.
        suite, index: the official task whose scene it is.
        max_steps: control steps after which an episode has failed.
        instruction: ours; empty for the official one.
        goal: LIBERO's predicate over object states, ours; empty for the official one.
        shuffle: how objects are placed; None for the official initial states.
    """

    name: str
    suite: str
    index: int
    max_steps: int
    instruction: str = ''
    goal: tuple[str, ...] = ()
    shuffle: Shuffle | None = None

    @property
    def reworded(self) -> bool:
        """Whether LIBERO's name of the task is not what is to be done."""
        return self.suite.endswith(REWORDED)

    @property
    def seeds(self) -> int:
        """How many held-out episodes differ."""
        return OFFICIAL_STATES if self.shuffle is None else SEEDS


@dataclass(frozen=True, kw_only=True)
class Skill:
    """How the expert does a pick and place; offsets are [3] in m, heights above the world's 0.

    Attributes:
        pick: the object.
        place: object or region to put it.
        grasp: from the object's origin to the hand that grips it.
        release: from the place to the object's origin when the hand opens.
        travel_z: of the hand on its way, above all that stands around.
    """

    pick: str
    place: str
    grasp: tuple[float, float, float]
    release: tuple[float, float, float]
    travel_z: float


BOWL = 'akita_black_bowl_1'
BOWL_RIM = (0.0, 0.043, 0.025)  # on the side that faces away from the cabinet
CAN, BOX = (0.0, 0.0, 0.015), (0.0, 0.0, 0.003)


def _into_basket(name: str) -> Skill:
    return Skill(
        pick=name,
        place=BASKET,
        grasp=CAN if name in ('alphabet_soup_1', 'tomato_sauce_1') else BOX,
        release=(0.0, 0.0, 0.12),
        travel_z=0.23,
    )


SKILLS = {
    'libero_goal/1': Skill(
        pick=BOWL, place='flat_stove_1_cook_region', grasp=BOWL_RIM,
        release=(0.0, 0.0, 0.03), travel_z=1.15,
    ),
    'libero_goal/4': Skill(
        pick=BOWL, place='wooden_cabinet_1_top_side', grasp=BOWL_RIM,
        release=(0.0, 0.0, 0.03), travel_z=1.25,
    ),
    'libero_goal/6': Skill(
        pick='cream_cheese_1', place=BOWL, grasp=BOX, release=(0.0, 0.0, 0.06), travel_z=1.12,
    ),
    'libero_goal/8': Skill(
        pick=BOWL, place='plate_1', grasp=BOWL_RIM, release=(0.0, 0.0, 0.01), travel_z=1.12,
    ),
    **{f'{SHUFFLED}/{i}': _into_basket(name) for i, name in enumerate(WANTED)},
}  # fmt: skip


def find_task(name: str) -> SimTask:
    """The task of that name.

    Raises:
        ConfigError: there is none.
    """
    suite, _, index = name.partition('/')
    counts = {key: count for key, (count, _) in SUITES.items()} | {SHUFFLED: len(WANTED)}
    if not re.fullmatch(r'\d{1,3}', index) or int(index) >= counts.get(suite, 0):
        known = ', '.join(f'{key}/0..{count - 1}' for key, count in counts.items())
        raise ConfigError('task', name, f'must be one of {known}')
    if suite == SHUFFLED:
        return _shuffled(name, WANTED[int(index)])
    return SimTask(name=name, suite=suite, index=int(index), max_steps=SUITES[suite][1])


def _shuffled(name: str, wanted: str) -> SimTask:
    words = wanted.removesuffix('_1').replace('_', ' ')
    suite, index = OBJECT_SCENE
    return SimTask(
        name=name,
        suite=suite,
        index=index,
        max_steps=SUITES[suite][1],
        instruction=f'pick up the {words} and place it in the basket',
        goal=('in', wanted, BASKET),
        shuffle=SHUFFLE,
    )


def skill_of(task: SimTask) -> Skill:
    """How the expert does a task.

    Raises:
        ConfigError: it has not learnt that one.
    """
    if task.name not in SKILLS:
        known = ', '.join(SKILLS)
        raise ConfigError('task', task.name, f'the expert knows only {known}')
    return SKILLS[task.name]
