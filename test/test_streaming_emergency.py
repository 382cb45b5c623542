"""An emergency stop with several buttons."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from specprune_ros.streaming.emergency import UNHEARD, Presses

A, B, C = b'a', b'b', b'c'


def test_one_button():
    presses = Presses()
    assert presses.put(True, A, {A})
    assert presses.put(True, A, {A})
    assert not presses.put(False, A, {A})


def test_nobody_releases_the_press_of_another():
    presses = Presses()
    assert presses.put(True, A, {A, B})
    assert presses.put(False, B, {A, B})
    assert presses.put(True, B, {A, B})
    assert presses.put(False, A, {A, B})
    assert not presses.put(False, B, {A, B})


def test_the_press_of_a_publisher_that_is_gone_ends_with_the_next_release():
    """As `ros2 topic pub --once` and a button that was restarted do it."""
    presses = Presses()
    assert presses.put(True, A, {A})
    assert not presses.put(False, B, {B})


def test_a_publisher_that_cannot_be_heard_presses_as_long_as_it_is_there():
    presses = Presses()
    assert presses.put(True, UNHEARD, {A, B, UNHEARD})
    assert presses.put(False, A, {A, B, UNHEARD})
    assert not presses.put(False, A, {A})


@pytest.mark.parametrize('sender', [None, C], ids=['not said', 'not in the graph'])
def test_who_cannot_be_told_apart_only_releases_alone(sender):
    presses = Presses()
    assert presses.put(True, sender, {A, B})
    assert presses.put(False, sender, {A, B})
    assert presses.put(False, A, {A, B})
    assert not presses.put(False, sender, {A})


@given(st.lists(st.tuples(st.sampled_from([A, B, C]), st.booleans())))
def test_it_is_on_exactly_while_somebody_presses(messages):
    presses, newest = Presses(), {}
    for sender, on in messages:
        newest[sender] = on
        assert presses.put(on, sender, {A, B, C}) == any(newest.values())
