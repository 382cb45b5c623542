"""How often something worked, per task, with the interval that the number of episodes allows."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from specprune_ros.sim.dataset import Attempt

Z_95 = 1.959964  # of the normal distribution, two-sided 95 %


def wilson_interval(successes: int, episodes: int, z: float = Z_95) -> tuple[float, float]:
    """Where the true success rate lies, with 95 % confidence.

    Args:
        successes: out of `episodes`.
        episodes: independent ones; 0 tells nothing.
        z: quantile of the normal distribution.

    Returns:
        least and greatest rate, 0..1.

    Source: Wilson 1927; Brown, Cai and DasGupta 2001, Eq. 4. Unlike the normal approximation it
        holds for a few episodes that all succeeded.
    """
    if not 0 <= successes <= episodes:
        raise ValueError(f'{successes} successes of {episodes} episodes')
    if episodes == 0:
        return 0.0, 1.0
    rate, spread = successes / episodes, z * z / episodes
    centre = (rate + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt((rate * (1 - rate) + spread / 4) / episodes)
    # At the ends the formula gives exactly 0 and 1, but for rounding.
    return (centre - half if successes else 0.0), (centre + half if successes < episodes else 1.0)


@dataclass(frozen=True, kw_only=True)
class TaskSummary:
    """All attempts at one task.

    Attributes:
        task: its name.
        attempts: episodes.
        successes: out of them.
        clean: attempts without noise.
        clean_successes: out of them.
        steps: control steps of the successful ones, mean.
        frames_per_s: frames rendered per second of one worker, each of all cameras.
        megabytes: of a file, mean.
    """

    task: str
    attempts: int
    successes: int
    clean: int
    clean_successes: int
    steps: float
    frames_per_s: float
    megabytes: float


def summarize(attempts: Iterable[Attempt]) -> list[TaskSummary]:
    """One summary per task, in the order in which the tasks first appear."""
    by_task: dict[str, list[Attempt]] = {}
    for attempt in attempts:
        by_task.setdefault(attempt.task, []).append(attempt)
    return [_summary(task, group) for task, group in by_task.items()]


def _summary(task: str, attempts: list[Attempt]) -> TaskSummary:
    good = [attempt for attempt in attempts if attempt.success]
    clean = [attempt for attempt in attempts if not attempt.noisy]
    seconds = sum(attempt.seconds for attempt in attempts)
    return TaskSummary(
        task=task,
        attempts=len(attempts),
        successes=len(good),
        clean=len(clean),
        clean_successes=sum(attempt.success for attempt in clean),
        steps=_mean([attempt.steps for attempt in good]),
        frames_per_s=sum(attempt.frames for attempt in attempts) / max(seconds, 1e-9),
        megabytes=_mean([attempt.bytes for attempt in good]) / 1e6,
    )


def _mean(values: list[int]) -> float:
    return sum(values) / len(values) if values else math.nan
