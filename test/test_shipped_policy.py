"""The checkpoint that ships: recorded frames through all of it give the actions that they gave.

The frames show another scene than it knows (its own may not be distributed), so the actions mean
nothing; that they stay the same does. After another checkpoint: python test/test_shipped_policy.py
"""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from conftest import DATA

from specprune_ros.config import PolicyConfig
from specprune_ros.config_files import load_config
from specprune_ros.errors import ObservationError
from specprune_ros.policy import Policy
from specprune_ros.recordings import open_recording
from specprune_ros.recordings.base import CameraEvent
from specprune_ros.shipped import own_params
from specprune_ros.types import ExecutedAction, Mode, Observation

CHECKPOINT = 'shipped/libero_small'
EXPECTED = DATA / 'libero_small.json'
METHODS = ('none', 'specprune', 'random')
HAND = (-0.1, 0.0, 0.25, np.pi, 0.0, 0.0, 0.04, -0.04)  # pose and fingers; the bag has no pose
INSTRUCTION = 'pick up the butter and place it in the basket'
STEPS, QUERIES = 8, 5
# Of commands in -1..1: a JPEG decoder of another version moves images by a gray level.
TOLERANCE = 0.02


def frames() -> list[tuple[dict, ExecutedAction]]:
    """The images of every control step, and what was executed then."""
    images: dict = {}
    steps = []
    for event in open_recording(DATA / 'pick_place').events():
        if isinstance(event, CameraEvent):
            images[event.camera] = event.image
        elif isinstance(event, ExecutedAction):
            steps.append((dict(images), event))
    return steps


def shipped_config(method: str) -> PolicyConfig:
    return load_config(
        [own_params(CHECKPOINT)],
        {
            'model.checkpoint': CHECKPOINT,
            'pruning.method': method,
            'pruning.budget': 'fixed',
            'model.threads': 1,
        },
    )


def actions_of(method: str) -> list[dict]:
    """What each query of an episode gives: actions [8, 7], and tokens left in static pruning."""
    policy = Policy.load(shipped_config(method))
    config = policy.config
    answers = []
    for step, (images, executed) in enumerate(frames()[: STEPS * QUERIES]):
        if step % STEPS == 0:
            result = policy.infer(
                Observation(
                    images=images,
                    proprio=np.array(HAND),
                    instruction=INSTRUCTION,
                    stamp_ns=executed.stamp_ns - 1,
                )
            )
            answers.append(
                {
                    'kept': int((result.report.reason > 0).sum()),
                    'actions': np.round(result.chunk.data, 4).tolist(),
                }
            )
        policy.observe_executed(replace(executed, names=config.robot.action_names), images)
    return answers


@pytest.mark.parametrize('method', METHODS)
def test_recorded_frames_give_the_actions_that_they_gave(method):
    expected = json.loads(EXPECTED.read_text())[method]
    got = actions_of(method)
    assert [each['kept'] for each in got] == [each['kept'] for each in expected]
    for query, (ours, theirs) in enumerate(zip(got, expected, strict=True)):
        np.testing.assert_allclose(
            ours['actions'], theirs['actions'], atol=TOLERANCE, err_msg=f'query {query}'
        )


def test_the_methods_differ():
    """Expected actions that no method could change would test nothing."""
    expected = json.loads(EXPECTED.read_text())
    dense, pruned, drawn = (
        np.array([each['actions'] for each in expected[method]]) for method in METHODS
    )
    assert np.array_equal(dense[0], pruned[0]), 'the first query is dense'
    assert np.abs(dense[1:] - pruned[1:]).max() > 2 * TOLERANCE
    assert np.abs(drawn[1:] - pruned[1:]).max() > 2 * TOLERANCE


def test_a_refused_instruction_leaves_the_episode_as_it_was():
    """Bug: one that the model cannot take began a new episode before it was refused."""
    policy = Policy.load(shipped_config('specprune'))
    images, executed = frames()[0]
    seen = Observation(
        images=images, proprio=np.array(HAND), instruction=INSTRUCTION, stamp_ns=executed.stamp_ns
    )
    policy.infer(seen)
    epoch = policy.epoch
    with pytest.raises(ObservationError, match='instruction'):
        policy.infer(replace(seen, instruction='pick up the soup ' * 1500))
    assert policy.epoch == epoch
    assert policy.infer(seen).report.mode == Mode.FINE


if __name__ == '__main__':
    EXPECTED.write_text(json.dumps({method: actions_of(method) for method in METHODS}) + '\n')
