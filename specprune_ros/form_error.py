"""What a form of the model (models/forms.py), such as an 8-bit one, does to the actions."""

from __future__ import annotations

from collections.abc import Iterable
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
    policy: Policy, reference: Policy, observations: Iterable[Observation]
) -> FormError:
    """Ask two policies the same, from a reset on, and compare.

    Nobody executes anything between the queries, so both prune in fine mode; what differs is the
    form's arithmetic, and the tokens that it makes one keep and the other not.

    Args:
        policy: in the form in question.
        reference: over the same weights.
        observations: one episode's, at least one.

    Raises:
        ObservationError, ActionError: see Policy.infer.
        ValueError: there is no observation.
    """
    policy.reset()
    reference.reset()
    differences = [
        np.abs(policy.infer(one).chunk.normalized - reference.infer(one).chunk.normalized)
        for one in observations
    ]
    if not differences:
        raise ValueError('no observation to compare at')
    every = np.stack(differences)
    return FormError(float(every.mean()), float(every.max()), len(differences))
