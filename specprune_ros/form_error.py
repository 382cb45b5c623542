"""What a form of the model (models/forms.py), such as an 8-bit one, does to the actions."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from specprune_ros.policy import Policy
from specprune_ros.types import Observation


@dataclass(frozen=True)
class FormError:
    """Absolute differences of normalised actions, over queries, steps and elements.

    Attributes:
        mean, largest: of all.
        queries: how many were compared.
    """

    mean: float
    largest: float
    queries: int


def form_error(
    policy: Policy,
    reference: Policy,
    observations: Iterable[Observation],
    after: Callable[[Policy, Observation, int], object] = lambda policy, observation, query: None,
) -> FormError:
    """Ask two policies the same, from a reset on, and compare.

    What differs is the form's arithmetic, and the tokens that it makes one keep and the other not.

    Args:
        policy: in the form in question.
        reference: over the same weights.
        observations: one episode's, at least one.
        after: told each policy, observation and 0-based query once it is answered, to execute
            something; where nobody does, both policies prune in fine mode.

    Raises:
        ObservationError, ActionError: see Policy.infer.
        ValueError: there is no observation.
    """
    policy.reset()
    reference.reset()
    differences = []
    for query, one in enumerate(observations):
        got, expected = (each.infer(one).chunk.normalized for each in (policy, reference))
        differences.append(np.abs(got - expected))
        for each in (policy, reference):
            after(each, one, query)
    if not differences:
        raise ValueError('no observation to compare at')
    every = np.stack(differences)
    return FormError(float(every.mean()), float(every.max()), len(differences))
