"""Both nodes under random faults for a long time: nothing unsafe, nothing lost, nothing leaks.

One robot, output and way to stop after the other, in an order that the seed draws: the full soak
takes all of them, the short one a joint trajectory at positions, one of displacements or speeds, a
pose and a twist.

The full soak: SPECPRUNE_SOAK=10000 python -m pytest test/test_soak.py -s
Another one: SPECPRUNE_SEED=8
"""

from __future__ import annotations

import os
import time
from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import pytest

rclpy = pytest.importorskip('rclpy', reason='no ROS here: source one, or run scripts/test.sh')
pytest.importorskip('specprune_ros.msg', reason='messages are not built: run scripts/setup.sh')

from ros_world import ANSWER_S, CAMERAS, ros_domain  # noqa: E402
from soak_arms import SETUPS, Setup  # noqa: E402
from soak_world import (  # noqa: E402
    DEADLINE_S,
    STREAMER,
    VLA,
    SoakWorld,
    Usage,
    truncated,
)
from std_msgs.msg import String  # noqa: E402

from specprune_ros.streaming.states import StreamState  # noqa: E402
from specprune_ros.tasks import NodeState  # noqa: E402

pytestmark = [pytest.mark.ros, pytest.mark.slow]
INFERENCES = int(os.environ.get('SPECPRUNE_SOAK', 400))
SEED = int(os.environ.get('SPECPRUNE_SEED', 7))
LEAK_MB = 1.0  # per 1,000 inferences
FULL = 5000  # inferences from which on a soak takes every robot
# Of a short soak: what tells the arms apart.
KINDS = (
    lambda setup: setup.space == 'joint_position',
    lambda setup: setup.space in ('joint_delta', 'joint_velocity'),
    lambda setup: setup.output == 'pose',
    lambda setup: setup.output == 'twist',
)
ON_STALL = ('stop', 'hold')
WARM_UP = 300  # inferences of a process before which its memory may grow
MEASURABLE = 1500  # fewer do not tell a leak from an allocator's next page
PEER_GONE_S = 0.8 + 0.5  # stream.peer_timeout_s, and what a busy machine of two cores adds
BOTH = (VLA, STREAMER)


@pytest.fixture(autouse=True, scope='module')
def context():
    """One ROS domain for this file's test and its processes."""
    with ros_domain(30):
        yield


@dataclass
class Lives:
    """What each process used, by node and life: inferences so far, the robot, and the usage then.

    Attributes:
        fits: robots so far.
    """

    samples: dict[tuple[str, int], list[tuple[int, int, Usage]]] = field(default_factory=dict)
    births: Counter[str] = field(default_factory=Counter)
    fits: int = 0

    def look(self, world: SoakWorld) -> None:
        """Take a sample of every process."""
        for name, usage in world.usage().items():
            key = (name, self.births[name])
            self.samples.setdefault(key, []).append((world.inferences, self.fits, usage))

    def growth(self) -> dict[str, tuple[float, float, int, int, int]]:
        """Life -> MB per 1,000 inferences, over how many, and how many more threads and files.

        All after warm-up. The first figure leaves out what a node takes when it is configured for
        another robot (3 MB at its first pose: libraries), the second counts it.
        """
        rows = {}
        for (name, birth), samples in self.samples.items():
            warm = [each for each in samples if each[0] >= samples[0][0] + WARM_UP] or samples[-1:]
            slope, count = _growth(warm)
            whole, _ = _growth([(n, 0, usage) for n, _, usage in warm])
            first, last = warm[0][2], warm[-1][2]
            rows[f'{name} {birth + 1}'] = (
                slope, whole, count, last.threads - first.threads, last.files - first.files,
            )  # fmt: skip
        return rows


def _growth(samples: list[tuple[int, int, Usage]]) -> tuple[float, int]:
    """MB per 1,000 inferences with one robot, the same for all of them, and over how many."""
    robots = np.array([robot for _, robot, _ in samples])
    count = np.array([n for n, _, _ in samples], float)
    memory = np.array([usage.rss_mb for _, _, usage in samples])
    span = 0.0
    for robot in np.unique(robots):
        own = robots == robot
        span += np.ptp(count[own])
        count[own] -= count[own].mean()
        memory[own] -= memory[own].mean()
    return (1e3 * float(count @ memory / (count @ count)) if span else 0.0), int(span)


def test_memory_that_grows_is_told_from_what_another_robot_takes():
    at = np.arange(0, 2000, 100)
    robots = at // 500

    def samples(per_robot_mb: float, per_inference_mb: float) -> list[tuple[int, int, Usage]]:
        sizes = 100.0 + per_robot_mb * robots + per_inference_mb * at
        return [
            (int(n), int(robot), Usage(rss_mb=float(size), threads=5, files=9))
            for n, robot, size in zip(at, robots, sizes, strict=True)
        ]

    assert _growth(samples(3.0, 0.0)) == (pytest.approx(0.0), 1600)
    assert _growth(samples(3.0, 2e-3)) == (pytest.approx(2.0), 1600)
    assert _growth(samples(3.0, 2e-3)[:1]) == (0.0, 0)


class Soak:
    """Injects faults, and keeps what has to be counted for them.

    Attributes:
        exact: (node, code) -> how often it must have been counted in this life of the node.
        least: likewise, a lower bound: a message that spoils an input may be overwritten by the
            next before it is read, and a busy machine adds faults of its own.
        most: likewise, an upper bound: messages that were spoilt.
    """

    def __init__(self, world: SoakWorld, seed: int):
        self.world, self.random = world, np.random.default_rng(seed)
        self.exact: Counter[tuple[str, str]] = Counter()
        self.least: Counter[tuple[str, str]] = Counter()
        self.most: Counter[tuple[str, str]] = Counter()
        self.injected: Counter[str] = Counter()
        self.lives = Lives()

    def short_s(self) -> float:
        return float(self.random.uniform(0.1, 0.4))

    @property
    def measured(self) -> str:
        """What action_streamer measures, as in fault codes."""
        return self.world.wire.arm.MEASURED

    # Inputs -----------------------------------------------------------------------------------

    def inject_corrupt_image(self) -> None:
        def spoil(msg) -> None:
            truncated(msg)
            self.most[VLA, 'image_truncated'] += 1

        self.world.spoil_image = spoil
        self.counted({VLA: 'image_truncated'})

    def inject_dropped_images(self) -> None:
        self.world.streams.discard(str(self.random.choice(CAMERAS)))
        self.counted({VLA: 'camera_stale'})

    def inject_nan_measurement(self) -> None:
        def spoil(msg) -> None:
            msg.position[int(self.random.integers(len(msg.position)))] = np.nan
            for node in BOTH if self.measured == 'joint' else (VLA,):
                self.most[node, 'joint_not_finite'] += 1

        def spoil_pose(msg) -> None:
            msg.pose.position.y = np.nan
            self.most[STREAMER, 'pose_not_finite'] += 1

        self.world.spoil_joints, self.world.spoil_pose = spoil, spoil_pose
        self.counted({VLA: 'joint_not_finite', STREAMER: f'{self.measured}_not_finite'})

    def inject_missing_joint(self) -> None:
        """Or an orientation that is none."""

        def spoil(msg) -> None:
            msg.name = ['another' if name == 'j2' else name for name in msg.name]

        def spoil_pose(msg) -> None:
            msg.pose.orientation.w += 2.0

        self.world.spoil_joints, self.world.spoil_pose = spoil, spoil_pose
        code = 'joint_missing' if self.measured == 'joint' else 'pose_quaternion'
        self.counted({VLA: 'joint_missing', STREAMER: code})

    def inject_silent_joints(self) -> None:
        self.world.streams.discard('joints')
        assert self.world.run(ANSWER_S, lambda: not self.world.is_moving()), self.world.explain()
        self.world.hush(self.short_s())

    def inject_jump_back(self) -> None:
        self.world.jump(-float(self.random.uniform(0.5, 20.0)))
        for node in BOTH:
            self.exact[node, 'clock_jump'] += 1
        self.world.run(self.short_s())

    def inject_jump_ahead(self) -> None:
        self.world.jump(float(self.random.uniform(2.0, 20.0)))
        self.world.run(self.short_s())

    # The policy -------------------------------------------------------------------------------

    def inject_policy_that_raises(self) -> None:
        self.fails('raise')

    def inject_policy_of_nan(self) -> None:
        self.fails('nan')

    def inject_policy_without_memory(self) -> None:
        self.fails('oom')

    def fails(self, mode: str) -> None:
        """Three in a row end the task; how many there were, the policy says itself."""
        self.world.behave(mode)
        assert self.world.run(ANSWER_S, lambda: self.world.state is NodeState.IDLE)
        self.stays_silent()

    def inject_slow_policy(self) -> None:
        self.world.behave(f'slow {self.random.uniform(0.02, 0.3):.2f}')
        self.world.run(self.short_s() + 0.3)

    def inject_hung_policy(self) -> None:
        self.world.behave(f'slow {DEADLINE_S + 0.4}')
        assert self.world.run(ANSWER_S, lambda: self.world.state is NodeState.FAULT)
        self.exact[VLA, 'hung'] += 1
        self.stays_silent()

    def inject_wild_actions(self) -> None:
        clamped = sum(self.world.streamer.clamped)
        self.world.behave('wild')
        assert self.world.run(ANSWER_S, lambda: sum(self.world.streamer.clamped) > clamped)
        self.world.run(self.short_s() + 0.3)  # the first clamping may be that of the way to it

    # Orders -----------------------------------------------------------------------------------

    def inject_instruction(self) -> None:
        text, epoch = f'task {self.random.integers(1e9)}', self.world.status.epoch
        if self.world.status.instruction == 'go':  # a task by the service is not replaced
            self.world.trigger('cancel_task')
        self.world.instruction.publish(String(data=text))
        assert self.world.run(ANSWER_S, lambda: self.world.status.instruction == text)
        assert self.world.status.epoch > epoch

    def inject_pause(self) -> None:
        if self.random.random() < 0.5:
            assert self.world.switch('pause', True).success
        else:
            assert self.world.stream_call('pause', True)[0]
        self.stays_silent()

    def inject_cancel(self) -> None:
        assert self.world.trigger(str(self.random.choice(['cancel_task', 'reset']))).success
        self.stays_silent()

    def inject_streamer_orders(self) -> None:
        if self.random.random() < 0.5:
            assert self.world.stream_call('reset')[0]
        else:
            assert self.world.stream_call('enable', False)[0]
        self.stays_silent()

    def inject_e_stop(self) -> None:
        world = self.world
        world.stop()
        assert world.run(ANSWER_S, self._are_stopped), world.explain()
        for node in BOTH:
            self.exact[node, 'e_stop'] += 1
        world.hush(self.short_s())
        assert not world.stream_call('reset')[0], 'reset although the button is down'
        assert not world.trigger('reset').success
        world.stop(False)
        world.run(self.short_s())
        assert self._are_stopped(), 'a released stop needs a reset'
        assert not world.stream_call('enable', True)[0]

    def _are_stopped(self) -> bool:
        world = self.world
        stopped = world.stream_state() is StreamState.STOPPED
        return stopped and world.state is NodeState.STOPPED

    def inject_bad_parameter(self) -> None:
        taken, why = self.world.set_parameter('runtime.dry_run', True)
        assert not taken
        assert 'fixed' in why
        self.exact[VLA, 'config'] += 1

    # Death ------------------------------------------------------------------------------------

    def kill(self, name: str) -> None:
        """kill -9: silence until somebody configures, activates and enables it again."""
        self.reckon()
        world = self.world
        world.recover()
        world.kill(name)
        killed_s = time.monotonic()
        assert world.run(ANSWER_S, lambda: name == STREAMER or not world.is_moving())
        world.hush(1.0)
        assert world.wire.last_s - killed_s < PEER_GONE_S + 5 * world.lag_s
        self.forget(name)
        if name == STREAMER:
            self.least[VLA, 'peer_gone'] += 1
        world.start(name)
        self.lives.births[name] += 1
        self.injected[f'kill -9 {name}'] += 1
        world.wire.forget()
        world.bring_up(name)

    def forget(self, name: str) -> None:
        """Another life counts from 0."""
        for counts in (self.exact, self.least, self.most):
            for key in [key for key in counts if key[0] == name]:
                del counts[key]

    # Another robot ----------------------------------------------------------------------------

    def refit(self, setup: Setup) -> None:
        """Both nodes are configured for it."""
        self.world.recover()
        self.world.rest()
        self.world.refit(setup)
        self.lives.fits += 1

    # Bookkeeping ------------------------------------------------------------------------------

    def counted(self, codes: dict[str, str]) -> None:
        """Go on until every node has counted its fault."""
        self.world.until_counted(codes)
        for node, code in codes.items():
            self.least[node, code] += 1

    def stays_silent(self) -> None:
        """No command leaves; what streamed has come to its end before."""
        streaming = StreamState.STREAMING
        assert self.world.run(ANSWER_S, lambda: self.world.stream_state() is not streaming)
        self.world.hush(self.short_s())

    def episode(self, name: str) -> None:
        self.world.recover()
        self.injected[name.removeprefix('inject_')] += 1
        getattr(self, name)()
        self.world.recover()
        self.world.run(float(self.random.uniform(0.2, 1.5)))
        self.world.check()
        self.lives.look(self.world)

    def reckon(self) -> None:
        """Every fault that was injected was counted."""
        world = self.world
        world.recover()
        world.rest()
        world.run(2.5)  # /diagnostics come once a second
        policy = {'raise': 'inference', 'nan': 'action', 'oom': 'out_of_memory'}
        exact = dict(self.exact)
        exact |= {(VLA, code): world.counts.get(kind, 0) for kind, code in policy.items()}
        counts = {node: world.fault_counts(node) for node in BOTH}
        for (node, code), wanted in exact.items():
            assert counts[node].get(code, 0) == wanted, (node, code, counts, exact)
        for (node, code), least in self.least.items():
            assert counts[node].get(code, 0) >= least, (node, code, counts)
        for (node, code), most in self.most.items():
            assert counts[node].get(code, 0) <= most, (node, code, counts)
        print(f'counted exactly: { {f"{n} {c}": k for (n, c), k in exact.items()} }')


FAULTS = [name for name in vars(Soak) if name.startswith('inject_')]


def plan(random: np.random.Generator, inferences: int) -> list[tuple[Setup, list[str]]]:
    """The robots of a soak in their order, each with its faults."""
    drawn = [SETUPS[i] for i in random.permutation(len(SETUPS))]
    if inferences >= FULL:
        return [(setup, random.permutation(FAULTS).tolist()) for setup in drawn]
    stops = random.permutation(len(KINDS)) % 2
    few = [
        next(each for each in drawn if is_one(each) and each.on_stall == ON_STALL[stop])
        for is_one, stop in zip(KINDS, stops, strict=True)
    ]
    shares = np.array_split(random.permutation(FAULTS), len(few))
    return [(setup, share.tolist()) for setup, share in zip(few, shares, strict=True)]


def soak(seed: int, inferences: int) -> Soak:
    """Random faults until there were so many inferences, and every fault at least once."""
    robots = plan(np.random.default_rng(seed), inferences)
    deaths = {len(robots) // 3: STREAMER, 2 * len(robots) // 3: VLA}
    with SoakWorld(robots[0][0]) as world:
        run = Soak(world, seed)
        for name in BOTH:
            world.start(name)
            world.bring_up(name)
        for index, (setup, deck) in enumerate(robots):
            if index:
                run.refit(setup)
            if index in deaths:
                run.kill(deaths[index])
            run.injected[f'robot: {setup}'] += 1
            while deck or world.inferences < inferences * (index + 1) / len(robots):
                deck = deck or run.random.permutation(FAULTS).tolist()
                run.episode(deck.pop())
        run.reckon()
        for process in world.processes.values():
            assert process.stop()[0] == 0, process.output()
        return run


@pytest.mark.timeout(300 + INFERENCES)
def test_soak():
    start = time.monotonic()
    run = soak(SEED, INFERENCES)
    world, wire = run.world, run.world.wire
    seconds = time.monotonic() - start
    print(f'seed {SEED}: {world.inferences} inferences, {wire.messages} messages to the arm in '
          f'{seconds:.0f} s, load {os.getloadavg()[0]:.1f}; {sum(run.injected.values())} robots '
          f'and faults: {dict(run.injected)}; {wire.stops} stops on the wire, {wire.idle_stops} '
          'of them before any command; nothing forbidden on the wire')  # fmt: skip
    assert world.inferences >= INFERENCES
    assert wire.messages > 100
    for life, (slope, whole, count, threads, files) in run.lives.growth().items():
        if count == 0:
            continue  # killed before it was warm
        print(f'{life}: {slope:+.2f} MB per 1,000 inferences over {count} after the first '
              f'{WARM_UP}, {whole:+.2f} with what other robots took, {threads:+d} threads, '
              f'{files:+d} files')  # fmt: skip
        assert threads <= 0
        assert files <= 2
        assert count < MEASURABLE or slope < LEAK_MB
        assert count < FULL or whole < LEAK_MB  # so many that a library is lost in them
