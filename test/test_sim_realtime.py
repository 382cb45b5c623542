"""Simulated time that waits for the simulator, and velocities that become actions."""

import threading
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from specprune_ros.sim.realtime import STALE_STEPS, START_NS, SimClock, Units, VelocityCommands
from specprune_ros.sim.state import CLOSE, METRES_PER_UNIT, OPEN, RADIANS_PER_UNIT, STEP_NS

NOW = START_NS
STILL, TURN = np.zeros(3), np.array([0.0, 0.0, 1.0])


def test_time_stands_still_until_something_is_simulated():
    clock = SimClock(rate=100.0)
    time.sleep(0.02)
    assert clock.now_ns() == START_NS
    clock.allow(START_NS + STEP_NS)
    time.sleep(0.02)
    assert clock.now_ns() == START_NS + STEP_NS, 'and not beyond what is'


@given(limits=st.lists(st.integers(0, 10 * STEP_NS), max_size=8))
def test_time_never_goes_back(limits):
    clock = SimClock(rate=100.0)
    seen = [clock.now_ns()]
    for limit in limits:
        clock.allow(START_NS + limit)
        seen.append(clock.now_ns())
    assert seen == sorted(seen)
    assert seen[-1] <= START_NS + max(limits, default=0)


def test_time_that_the_simulator_was_late_by_is_no_jump():
    clock = SimClock(rate=1.0)
    time.sleep(0.1)
    clock.allow(START_NS + 60 * 10**9)
    assert clock.now_ns() - START_NS < 0.05e9


@pytest.mark.parametrize('rate', [0.5, 4.0])
def test_rate(rate):
    clock, halt = SimClock(rate), threading.Event()
    clock.allow(START_NS + STEP_NS)
    start = time.monotonic()
    assert clock.wait_for(START_NS + STEP_NS, halt)
    assert time.monotonic() - start >= 0.99 * STEP_NS / 1e9 / rate


def test_waiting_ends_when_halted_and_not_for_what_never_comes():
    clock, halt = SimClock(0.01), threading.Event()
    with pytest.raises(ValueError, match='beyond the limit'):
        clock.wait_for(START_NS + 1, halt)
    clock.allow(START_NS + STEP_NS)
    halt.set()
    start = time.monotonic()
    assert not clock.wait_for(START_NS + STEP_NS, halt)
    assert time.monotonic() - start < 1.0


@given(st.lists(st.floats(-1, 1), min_size=6, max_size=6))
def test_a_velocity_moves_as_far_as_its_units_say(action):
    commands = VelocityCommands(Units())
    speed = np.array(action) * np.repeat((METRES_PER_UNIT, RADIANS_PER_UNIT), 3) * 1e9 / STEP_NS
    commands.move(*np.split(speed, 2), NOW)
    np.testing.assert_allclose(commands.action(NOW)[:6], action, atol=1e-12)


def test_a_velocity_that_is_not_renewed_stops():
    commands = VelocityCommands(Units())
    commands.move(np.array([0.1, 0.0, 0.0]), TURN, NOW)
    assert commands.action(NOW + (STALE_STEPS - 1) * STEP_NS)[:6].any()
    assert not commands.action(NOW + STALE_STEPS * STEP_NS)[:6].any()


@pytest.mark.parametrize(
    ('position', 'command'), [(0.0, CLOSE), (0.04, OPEN), (0.02, 0.0), (9.0, OPEN), (-1.0, CLOSE)]
)
def test_finger_position(position, command):
    commands = VelocityCommands(Units())
    commands.grip(position)
    assert commands.action(NOW + 100 * STEP_NS)[6] == pytest.approx(command), 'it stays'
    commands.forget()
    assert commands.action(NOW)[6] == OPEN


@pytest.mark.parametrize('bad', [np.nan, np.inf])
def test_what_is_not_finite_is_refused_and_moves_nothing(bad):
    commands = VelocityCommands(Units())
    with pytest.raises(ValueError, match='must be finite'):
        commands.move(np.array([bad, 0.0, 0.0]), STILL, NOW)
    with pytest.raises(ValueError, match='must be finite'):
        commands.grip(bad)
    np.testing.assert_array_equal(commands.action(NOW), (*[0.0] * 6, OPEN))
