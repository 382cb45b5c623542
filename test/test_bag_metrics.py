"""A recording through replay_node, vla_node and action_streamer to a fake arm, as figures.

How soon the arm stops when the inputs end, how soon it goes on when they come back, and how often
it holds or stops although nothing is wrong.
"""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass

import numpy as np
import pytest

rclpy = pytest.importorskip('rclpy', reason='no ROS here: source one, or run scripts/test.sh')
pytest.importorskip('specprune_ros.msg', reason='messages are not built: run scripts/setup.sh')

from arm_world import CARTESIAN_ARM, DT_S, ArmWorld, arm_world  # noqa: E402
from conftest import DATA  # noqa: E402
from ros_world import START_S, NodeProcess, ros_domain  # noqa: E402
from soak_world import SoakProcess  # noqa: E402

from specprune_ros.msg import StreamerStatus as Status  # noqa: E402
from specprune_ros.ros.lifecycle import LifecycleClient  # noqa: E402

pytestmark = [pytest.mark.ros, pytest.mark.slow, pytest.mark.timeout(180)]
CAMERAS = ['wrist', 'side', 'overhead']
HORIZON = 8  # rows of a chunk, as OpenVLA-OFT has
STOPS = 5
CLEAN_S = 10.0
IMAGE_AGE_S = 0.5  # runtime.max_image_age_s
STREAMER = {**CARTESIAN_ARM, 'stream.output': 'twist', 'robot.horizon': HORIZON}
VLA = {
    'robot.camera_names': CAMERAS,
    'robot.joint_names': [''],
    'robot.horizon': HORIZON,
    'model.threads': 1,
    'runtime.query_rate_hz': 5.0,
    'runtime.max_image_age_s': IMAGE_AGE_S,
    'runtime.dry_run': False,
}
REPLAY = {'recording': str(DATA / 'pick_place'), 'loop': True}


@pytest.fixture(autouse=True, scope='module')
def context():
    """One ROS domain for this file's test and its processes."""
    with ros_domain(32):
        yield


@dataclass(frozen=True)
class Clean:
    """Undisturbed replay: shares of the control steps.

    Attributes:
        hold: without a command.
        false_stop: with a safety output.
    """

    hold: float
    false_stop: float


def undisturbed(world: ArmWorld) -> Clean:
    world.forget()
    start = time.monotonic()
    world.run(CLEAN_S)
    steps = (time.monotonic() - start) / DT_S
    commands = len(world.executed)
    return Clean(max(1 - commands / steps, 0.0), max(len(world.sent) - commands, 0) / steps)


def last_motion_s(world: ArmWorld, start_s: float) -> float:
    """When the newest command that moves something arrived, if one did after a start."""
    moving = (sent.at_s for sent in world.sent if np.abs(sent.values).max() > 0)
    return max(moving, default=start_s)


def stop_and_go(world: ArmWorld, replay: NodeProcess) -> tuple[float, float]:
    """Seconds until the arm stands after the inputs end, and until it moves when they go on."""
    assert world.streams(5)
    assert world.reaches(Status.STATE_STREAMING)
    world.forget()
    ended_s = time.monotonic()
    replay.process.send_signal(signal.SIGSTOP)
    assert world.reaches(Status.STATE_STALLED), world.status
    world.run(0.2)
    to_stop = last_motion_s(world, ended_s) - ended_s
    assert np.abs(world.sent[-1].values).max() == 0, 'no safety output'
    assert world.silent_for(0.5)
    replay.process.send_signal(signal.SIGCONT)
    resumed_s = time.monotonic()
    assert world.streams(1)
    return to_stop, world.sent[-1].at_s - resumed_s


def test_stops_holds_and_resumes_on_a_recording():
    with (
        arm_world(STREAMER, vla=False) as (world, streamer),
        SoakProcess(VLA) as vla,
        NodeProcess('replay_node', REPLAY) as replay,
    ):
        life = LifecycleClient(world, 'vla_node')
        life.wait(START_S)
        assert life.change('configure'), vla.output()
        assert life.change('activate')
        world.start()
        assert world.streams(20), (vla.output(), streamer.output(), replay.output())
        clean = undisturbed(world)
        times = [stop_and_go(world, replay) for _ in range(STOPS)]
    to_stop, to_resume = np.array(times).T
    print(
        f'time to stop {to_stop.mean():.2f} s (most {to_stop.max():.2f}), to resume '
        f'{to_resume.mean():.2f} s (most {to_resume.max():.2f}), {STOPS} times; undisturbed for '
        f'{CLEAN_S:g} s: hold {100 * clean.hold:.1f} %, false stops '
        f'{100 * clean.false_stop:.2f} %; load {os.getloadavg()[0]:.1f}'
    )
    # The newest chunk's observation is at most that old, and it has so many rows.
    assert to_stop.max() < IMAGE_AGE_S + HORIZON * DT_S + 0.3
    assert to_resume.max() < 2.0
    assert clean.hold < 0.2
    assert clean.false_stop < 0.02
