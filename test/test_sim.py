"""Simulated tasks: layouts, expert, dataset and closed loop; most needs no simulator."""

import contextlib
import dataclasses
import os
import re
import runpy
import subprocess
import sys
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import make_policy
from hypothesis import given, settings
from hypothesis import strategies as st

from specprune_ros.cli import main
from specprune_ros.config import RobotConfig
from specprune_ros.errors import ConfigError, MissingDependencyError, RecordingError
from specprune_ros.images import as_rgb
from specprune_ros.sim import collect as collecting
from specprune_ros.sim import dataset
from specprune_ros.sim import layouts as scenes
from specprune_ros.sim.closed_loop import LiberoTask
from specprune_ros.sim.conditions import Disturbance
from specprune_ros.sim.dataset import Attempt, Episode, Recipe
from specprune_ros.sim.expert import Expert, straightening, upright
from specprune_ros.sim.kinematics import project, rotation_about
from specprune_ros.sim.layouts import (
    LayoutRecipe,
    collect_layouts,
    draw_hand,
    read_layout_recipe,
    read_layouts,
    render_layouts,
)
from specprune_ros.sim.placement import draw_layout, seed_stream, stand_apart
from specprune_ros.sim.rollouts import roll_out
from specprune_ros.sim.simplify import cluster_faces
from specprune_ros.sim.state import ACTION_NAMES, JOINTS, PROPRIO_NAMES, SimState
from specprune_ros.sim.summary import summarize, wilson_interval
from specprune_ros.sim.tasks import BASKET, SHUFFLE, SKILLS, WANTED, find_task, skill_of
from specprune_ros.types import Observation

ROOT = Path(__file__).resolve().parent.parent
TASK = 'object_shuffled/1'
DOWN = np.array([1.0, 0.0, 0.0, 0.0])
SEED = st.integers(0, 2**31 - 1)


def recipe(**changes: object) -> Recipe:
    values = {
        'cameras': ('wrist', 'side'), 'size': 8, 'every': 3, 'noise': 0.0, 'noisy_share': 0.0,
        'split': 'train', 'detail_m': 0.008, 'proprio_names': PROPRIO_NAMES,
        'action_names': ACTION_NAMES, 'step_dt_s': 0.05,
    }  # fmt: skip
    return Recipe(**{**values, **changes})


class World:
    """A hand that goes where it is told, and objects that stay in it once it has closed on them.

    Args:
        slips: how many grasps fail.
        unsolvable: seeds at which the goal counts as missed whatever happens.
    """

    cameras = ('wrist', 'side')
    size = 8

    def __init__(self, name: str = TASK, slips: int = 0, unsolvable: tuple[int, ...] = ()):
        self.task = find_task(name)
        self.skill = skill_of(self.task)
        self.instruction = 'do it'
        self.slips = slips
        self.unsolvable = unsolvable
        self.resets = []

    def reset(self, seed: int, split: str = 'eval') -> SimState:
        self.resets.append((seed, split))
        rng = seed_stream(seed, split=split, task=self.task.name)
        self._hand = np.array([-0.2, 0.0, self.skill.travel_z])
        drawn = rng.uniform((-0.2, -0.25, -0.21), (0.15, 0.05, -0.19))
        surface = np.array([0.0, 0.0, self.skill.travel_z])
        self._places = {
            self.skill.pick: surface + drawn,
            self.skill.place: surface + np.array([0.0, 0.26, -0.16]),
        }
        self._closed = 0
        self._held = None
        self._missed = seed in self.unsolvable
        self._slips_left = self.slips
        self._step = 0
        return self._state()

    def step(self, action: np.ndarray) -> SimState:
        self._hand = self._hand + 0.0125 * np.asarray(action)[:3]
        self._closed = self._closed + 1 if action[6] > 0 else 0
        pick = self.skill.pick
        if not self._closed:
            if self._held is not None:  # it falls
                self._places[pick][2] = self.skill.travel_z - 0.2
            self._held = None
        elif self._closed == 4:
            offset = self._places[pick] - self._hand
            near = np.linalg.norm(offset + np.array(self.skill.grasp)) < 0.01
            self._held = offset if near and not self._slips_left else None
            self._slips_left = max(self._slips_left - 1, 0)
        if self._held is not None:
            self._places[pick] = self._hand + self._held
        self._step += 1
        return self._state()

    @property
    def success(self) -> bool:
        gap = self._places[self.skill.pick] - self._places[self.skill.place]
        there = self._held is None and np.hypot(*gap[:2]) < 0.03
        return bool(there and not self._missed)

    def images(self) -> dict[str, np.ndarray]:
        image = np.full((8, 8, 3), self._step % 256, np.uint8)
        image[0] = 255  # the top row
        return {'wrist': image, 'side': image}

    def pixels(self, names: Sequence[str]) -> np.ndarray:
        """The wrist camera has it near its upper edge, the other one not at all."""
        return np.array([[[4.0, 1.0]] * len(names), [[-5.0, 4.0]] * len(names)])

    def observation(self, joint_names: tuple[str, ...] = ()) -> Observation:
        return Observation(
            images=self.images(),
            proprio=self._state().proprio(joint_names),
            instruction=self.instruction,
            stamp_ns=self._step * 50_000_000,
        )

    def _state(self) -> SimState:
        return SimState(
            step=self._step,
            joints=np.arange(9.0),
            hand=self._hand,
            hand_xyzw=DOWN,
            places={name: point.copy() for name, point in self._places.items()},
        )


def solve(world: World, seed: int) -> tuple[Expert, list[np.ndarray]]:
    expert, actions = Expert(world.skill), []
    state = world.reset(seed, 'train')
    while not expert.done and state.step < world.task.max_steps:
        actions.append(expert.act(state))
        state = world.step(actions[-1])
    return expert, actions


class TestLayouts:
    @given(SEED)
    def test_the_hand_can_take_every_object(self, seed):
        layout = draw_layout(SHUFFLE, seed_stream(seed, split='train', task=TASK))
        assert set(layout) == set(SHUFFLE.objects)
        points = np.array(list(layout.values()))
        assert stand_apart(points, SHUFFLE)
        from_slots = np.abs(points[:, None] - np.array(SHUFFLE.slots)).max(axis=2)
        assert (from_slots.min(axis=1) <= SHUFFLE.jitter_m + 1e-9).all()

    def test_no_place_tells_which_object_stands_there(self):
        rng = np.random.default_rng(0)
        slots = np.array(SHUFFLE.slots)
        seen = {name: set() for name in SHUFFLE.objects}
        for _ in range(200):
            for name, point in draw_layout(SHUFFLE, rng).items():
                seen[name].add(int(np.linalg.norm(slots - point, axis=1).argmin()))
        assert all(len(places) == len(slots) for places in seen.values())

    def test_same_seed_same_layout_other_split_or_task_another(self):
        def layout(seed, split, task):
            drawn = draw_layout(SHUFFLE, seed_stream(seed, split=split, task=task))
            return np.array(list(drawn.values())).tobytes()

        keys = [(0, 'train', 'a'), (1, 'train', 'a'), (0, 'eval', 'a'), (0, 'train', 'b')]
        assert len({layout(*key) for key in keys}) == len(keys)
        assert [layout(*key) for key in keys] == [layout(*key) for key in keys]

    @pytest.mark.parametrize(
        ('other', 'apart'),
        [((0.0, 0.14), True), ((0.11, 0.0), True), ((0.0, 0.12), False), ((0.06, 0.11), False),
         ((0.07, 0.05), False)],
    )  # fmt: skip
    def test_objects_apart_in_x_or_in_y(self, other, apart):
        assert stand_apart([(0.0, 0.0), other], SHUFFLE) is apart

    def test_a_layout_that_cannot_be_is_an_error(self, monkeypatch):
        monkeypatch.setattr('specprune_ros.sim.placement.MAX_DRAWS', 5)
        crowded = dataclasses.replace(SHUFFLE, distance_m=1.0)
        with pytest.raises(RuntimeError, match='no layout'):
            draw_layout(crowded, np.random.default_rng(0))


class TestTasks:
    @pytest.mark.parametrize('name', SKILLS)
    def test_the_expert_knows_only_tasks_that_there_are(self, name):
        task, skill = find_task(name), skill_of(find_task(name))
        assert task.name == name
        if task.shuffle:
            assert task.goal == ('in', skill.pick, skill.place)

    def test_shuffled_tasks_share_a_scene_and_differ_in_what_is_wanted(self):
        tasks = [find_task(f'object_shuffled/{index}') for index in range(len(WANTED))]
        assert len({task.instruction for task in tasks}) == len(tasks)
        assert len({(task.suite, task.index, task.shuffle) for task in tasks}) == 1
        assert tasks[0].instruction == 'pick up the alphabet soup and place it in the basket'

    @pytest.mark.parametrize(
        'name',
        ['', 'libero_goal', 'libero_goal/10', 'libero_goal/-1', 'nonsense/0', 'libero_goal/x'],
    )
    def test_an_unknown_task_is_refused_with_those_that_there_are(self, name):
        with pytest.raises(ConfigError, match=r'libero_goal/0\.\.9'):
            find_task(name)

    def test_a_task_beyond_the_expert_is_refused(self):
        with pytest.raises(ConfigError, match='expert knows only'):
            skill_of(find_task('libero_goal/0'))


class TestExpert:
    @pytest.mark.parametrize('name', SKILLS)
    @settings(max_examples=5, deadline=None)
    @given(seed=SEED)
    def test_it_does_every_task_wherever_the_object_is(self, name, seed):
        world = World(name)
        expert, actions = solve(world, seed)
        assert expert.done
        assert world.success
        assert expert.retries == 0
        assert np.abs(actions).max() <= 1.0

    def test_it_grasps_again_when_nothing_is_in_the_hand(self):
        world = World(slips=2)
        expert, _ = solve(world, 0)
        assert expert.retries == 2
        assert world.success

    def test_it_rests_when_it_is_done(self):
        world = World()
        expert, _ = solve(world, 0)
        assert expert.act(world.reset(0)).tolist() == [0, 0, 0, 0, 0, 0, -1]

    @given(
        st.tuples(*[st.floats(-1, 1)] * 3).filter(lambda axis: np.linalg.norm(axis) > 0.1),
        st.floats(0.02, 2.5),
        st.sampled_from([-1.0, 1.0]),
    )
    def test_the_rotation_command_turns_the_hand_towards_straight_down(self, axis, angle, sign):
        hand = sign * times(about(axis, angle), DOWN)
        command = upright(hand)
        turned = times(about(command, 0.5 * np.linalg.norm(command)), hand)
        assert tilt(turned) < tilt(hand)

    def test_a_hand_that_points_down_is_not_turned(self):
        assert upright(DOWN).tolist() == [0, 0, 0]


def about(axis, angle: float) -> np.ndarray:
    """Quaternion xyzw."""
    axis = np.asarray(axis) / np.linalg.norm(axis)
    return np.array([*(np.sin(angle / 2) * axis), np.cos(angle / 2)])


def times(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    vector = a[3] * b[:3] + b[3] * a[:3] + np.cross(a[:3], b[:3])
    return np.array([*vector, a[3] * b[3] - a[:3] @ b[:3]])


def tilt(hand: np.ndarray) -> float:
    """Angle to straight down, rad."""
    return 2 * np.arccos(min(abs(float(hand @ DOWN)), 1.0))


class TestSimplify:
    @given(st.integers(0, 1000), st.floats(0.01, 0.5))
    def test_corners_stay_near_and_no_face_degenerates(self, seed, cell):
        rng = np.random.default_rng(seed)
        vertices, faces = rng.random((60, 3)), rng.integers(0, 60, (120, 3))
        kept = cluster_faces(vertices, faces, cell)
        index, corners = kept[:, 0], kept[:, 1:]
        moved = np.linalg.norm(vertices[corners] - vertices[faces[index]], axis=2)
        assert (moved <= np.sqrt(3) * cell + 1e-9).all()
        assert all(len(set(row)) == 3 for row in corners.tolist())
        assert len(np.unique(corners, axis=0)) == len(corners)
        assert (np.diff(index) > 0).all()

    def test_what_is_coarser_than_the_grid_stays(self):
        vertices = np.array([[0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]], float)
        faces = np.array([[0, 1, 2], [0, 2, 3], [1, 3, 2]])
        assert cluster_faces(vertices, faces, 0.1)[:, 1:].tolist() == faces.tolist()

    def test_a_fine_mesh_loses_most_of_its_faces(self):
        side = np.linspace(0, 1, 40)
        vertices = np.array([(x, y, 0.0) for x in side for y in side])
        row = np.arange(39)[:, None] * 40 + np.arange(39)
        faces = np.stack([row, row + 1, row + 40], axis=-1).reshape(-1, 3)
        kept = cluster_faces(vertices, faces, 0.1)
        assert 50 < len(kept) < len(faces) / 5


def episode(steps: int = 7, **changes: object) -> Episode:
    rng = np.random.default_rng(0)
    frames = np.arange(0, steps, 3, dtype=np.int32)
    values = {
        'task': TASK, 'seed': 5, 'instruction': 'pick up the soup', 'frame_steps': frames,
        'images': rng.integers(0, 256, (len(frames), 2, 8, 8, 3), np.uint8),
        'proprio': rng.random((steps, 15), np.float32),
        'actions': rng.random((steps, 7), np.float32),
        'executed': rng.random((steps, 7), np.float32),
        'place_names': np.array(['basket', 'soup']),
        'places': rng.random((steps, 2, 3), np.float32),
        'pixels': rng.random((len(frames), 2, 2, 2), np.float32),
    }  # fmt: skip
    return Episode(**{**values, **changes})


def attempt(seed: int = 0, **changes: object) -> Attempt:
    values = {
        'task': TASK, 'seed': seed, 'success': True, 'steps': 100, 'frames': 34, 'retries': 0,
        'noisy': False, 'seconds': 2.5, 'bytes': 1000,
    }  # fmt: skip
    return Attempt(**{**values, **changes})


class TestDataset:
    def test_an_episode_comes_back_as_it_was_written(self, tmp_path):
        path, written = dataset.episode_path(tmp_path, TASK, 5), episode()
        assert dataset.write_episode(path, written) == path.stat().st_size
        assert [file.name for file in path.parent.iterdir()] == ['000005.npz']
        read = dataset.read_episode(path)
        for field in dataclasses.fields(Episode):
            before, after = getattr(written, field.name), getattr(read, field.name)
            assert np.array_equal(before, after), field.name
            assert getattr(before, 'dtype', type(before)) == getattr(after, 'dtype', type(after))

    @pytest.mark.parametrize(
        'change',
        [{'proprio': np.zeros((3, 15))}, {'images': np.zeros((3, 2, 8, 8, 3))},
         {'frame_steps': np.array([0, 3, 7])}, {'frame_steps': np.array([-1, 3, 6])}],
        ids=['a short array', 'float images', 'a frame after the end', 'a frame before the start'],
    )  # fmt: skip
    def test_an_episode_that_does_not_fit_together_is_refused(self, change):
        with pytest.raises(ValueError):
            episode(**change)

    def test_a_damaged_file_is_named(self, tmp_path):
        path = tmp_path / '000001.npz'
        dataset.write_episode(path, episode())
        path.write_bytes(path.read_bytes()[:500])
        with pytest.raises(RecordingError, match='000001'):
            dataset.read_episode(path)

    @given(st.integers(0, 6), st.integers(1, 12))
    def test_a_chunk_repeats_the_last_action_and_says_so(self, step, horizon):
        recorded = episode()
        chunk, real = recorded.chunk(step, horizon)
        inside = min(horizon, 7 - step)
        assert real.tolist() == [True] * inside + [False] * (horizon - inside)
        assert np.array_equal(chunk[:inside], recorded.actions[step : step + inside])
        assert (chunk[inside:] == recorded.actions[-1]).all()

    def test_a_folder_keeps_its_recipe(self, tmp_path):
        dataset.open_dataset(tmp_path / 'a', recipe())
        assert dataset.read_recipe(tmp_path / 'a') == recipe()
        assert dataset.open_dataset(tmp_path / 'a', recipe()) == []
        with pytest.raises(ConfigError, match='size'):
            dataset.open_dataset(tmp_path / 'a', recipe(size=16))

    def test_a_line_that_was_cut_off_is_made_again(self, tmp_path):
        dataset.open_dataset(tmp_path, recipe())
        for seed in range(2):
            dataset.append_attempt(tmp_path, attempt(seed, success=seed == 0))
        ledger = tmp_path / dataset.LEDGER
        ledger.write_text(ledger.read_text() + f'{TASK},2,1,10')
        assert dataset.open_dataset(tmp_path, recipe()) == [attempt(0), attempt(1, success=False)]
        dataset.append_attempt(tmp_path, attempt(2))
        assert [line.seed for line in dataset.read_ledger(tmp_path)] == [0, 1, 2]

    @pytest.mark.parametrize('text', ['', '{}', '{"format": 99}', '[1]', '{"format": 1, "x": 2}'])
    def test_what_is_no_dataset_is_refused(self, tmp_path, text):
        (tmp_path / dataset.RECIPE).write_text(text)
        with pytest.raises(RecordingError, match='no dataset'):
            dataset.read_recipe(tmp_path)


@pytest.fixture
def worlds(monkeypatch):
    """Demonstrations in `World`; the one that was made last comes last."""
    made = []

    def make(task, *_):
        made.append(World(task, unsolvable=(1, 3)))
        return made[-1]

    monkeypatch.setattr(collecting, '_environment', make)
    return made


def collected(folder: Path, episodes: int, **changes: object) -> list[Attempt]:
    jobs = collecting.jobs_of([TASK], episodes)
    return list(collecting.collect(folder, recipe(**changes), jobs, workers=0))


class TestCollect:
    def test_failures_are_counted_and_not_kept(self, tmp_path, worlds):
        attempts = collected(tmp_path, 5)
        assert [one.success for one in attempts] == [True, False, True, False, True]
        assert [one.bytes > 0 for one in attempts] == [one.success for one in attempts]
        assert [one.seed for one in dataset.episodes(tmp_path)] == [0, 2, 4]
        assert dataset.read_ledger(tmp_path) == attempts

    def test_a_second_run_makes_only_what_is_missing(self, tmp_path, worlds):
        first = collected(tmp_path, 2)
        again = collected(tmp_path, 4)
        assert again[:2] == first
        assert [one.seed for one in again] == [0, 1, 2, 3]
        assert [world.resets for world in worlds] == [[(seed, 'train')] for seed in range(4)]

    def test_noise_moves_the_robot_and_not_the_labels(self, tmp_path, worlds):
        collected(tmp_path, 1, noise=0.4, noisy_share=1.0)
        (noisy,) = dataset.episodes(tmp_path)
        difference = noisy.executed - noisy.actions
        still = np.linalg.norm(noisy.actions[:, :3], axis=1) == 0
        assert 0.1 < np.abs(difference[~still, :3]).mean() < 0.4
        assert not difference[still].any()
        assert not difference[:, 3:].any()

    def test_frames_are_those_of_their_steps(self, tmp_path, worlds):
        collected(tmp_path, 1)
        (clean,) = dataset.episodes(tmp_path)
        assert np.array_equal(clean.actions, clean.executed)
        assert clean.frame_steps.tolist() == list(range(0, len(clean.actions), 3))
        assert np.array_equal(clean.images[:, 0, 1, 0, 0], clean.frame_steps % 256)
        assert clean.pixels.shape == (len(clean.images), 2, len(clean.place_names), 2)
        assert (clean.pixels[:, 0] == (4.0, 1.0)).all(), 'where the wrist camera has them'

    def test_a_bad_command_line_is_answered_with_what_is_allowed(self, tmp_path, capsys):
        bad = {
            '--task': ('libero_goal/0', 'expert knows only'),
            '--camera': ('rear', 'simulator has'),
            '--noise': ('-1', 'must be 0 to 2'),
            '--episodes': ('0', 'at least 1'),
            '--workers': ('10000', 'cores'),
        }
        for name, (value, why) in bad.items():
            assert main(['collect', name, value, '--out', str(tmp_path / 'x')]) == 2
            assert why in capsys.readouterr().err
        assert not (tmp_path / 'x').exists()


def layout_recipe(**changes: object) -> LayoutRecipe:
    values = {
        'cameras': ('wrist', 'side'), 'size': 8, 'split': 'train', 'detail_m': 0.008,
        'proprio_names': PROPRIO_NAMES,
    }  # fmt: skip
    return LayoutRecipe(**{**values, **changes})


class Arrangement:
    """Still scenes without a simulator."""

    def arrange(self, seed: int, hand, split: str, fingers_m: float) -> SimState:
        rng = seed_stream(seed, split=split, task='still')
        layout = draw_layout(SHUFFLE, rng)
        self.places = {name: np.array([*point, 0.02]) for name, point in layout.items()}
        self.places[BASKET] = np.array([0.0, 0.25, 0.07])
        position, _ = hand(self.places, rng)
        joints = np.array([0.0] * 7 + [fingers_m, -fingers_m])
        return SimState(step=0, joints=joints, hand=position, hand_xyzw=DOWN, places=self.places)

    def images(self) -> dict[str, np.ndarray]:
        return dict.fromkeys(('wrist', 'side'), np.zeros((8, 8, 3), np.uint8))

    def pixels(self, names) -> np.ndarray:
        return np.zeros((2, len(names), 2))


class TestStillScenes:
    @given(SEED)
    @settings(max_examples=60, deadline=None)
    def test_a_low_hand_stands_over_one_object_or_between_them(self, seed):
        rng = np.random.default_rng(seed)
        layout = draw_layout(SHUFFLE, rng)
        places = {name: np.array([*point, 0.02]) for name, point in layout.items()}
        hand, turn = draw_hand(places, rng)
        assert np.abs(turn).max() < 0.3
        if hand[2] < 0.11:
            gaps = np.abs([point[:2] - hand[:2] for point in places.values()])
            between_fingers = (gaps < (0.045, 0.02)).all(axis=1)
            assert (between_fingers | (np.linalg.norm(gaps, axis=1) > 0.07)).all()

    def test_a_second_run_makes_only_what_is_missing(self, tmp_path, monkeypatch):
        made = []
        monkeypatch.setattr(scenes, 'SHARD', 4)
        monkeypatch.setattr(
            scenes, '_environment', lambda *sizes: made.append(sizes) or Arrangement()
        )
        assert list(collect_layouts(tmp_path, layout_recipe(), 5, workers=0)) == [0, 4, 4]
        assert list(collect_layouts(tmp_path, layout_recipe(), 12, workers=0)) == [8, 4]
        assert len(made) == 3
        shards = list(read_layouts(tmp_path))
        assert [len(shard.images) for shard in shards] == [4, 4, 4]
        assert shards[0].places.shape == (4, len(SHUFFLE.objects) + 1, 3)
        assert not np.array_equal(shards[0].places[0], shards[0].places[1])
        assert read_layout_recipe(tmp_path) == layout_recipe()

    def test_another_recipe_in_the_folder_is_refused(self, tmp_path):
        assert list(collect_layouts(tmp_path, layout_recipe(), 0, workers=0)) == [0]
        with pytest.raises(ConfigError, match='size=8'):
            list(collect_layouts(tmp_path, layout_recipe(size=16), 0, workers=0))

    def test_broken_files_are_named(self, tmp_path):
        (tmp_path / '0000000.npz').write_bytes(b'nothing')
        with pytest.raises(RecordingError, match='cannot be read as layouts'):
            list(read_layouts(tmp_path))
        with pytest.raises(RecordingError, match='holds no layouts'):
            read_layout_recipe(tmp_path)

    def test_a_bad_command_line_is_answered_with_what_is_allowed(self, tmp_path, capsys):
        for name, value, why in (
            ('--split', 'test', 'must be one of train, eval'),
            ('--camera', 'rear', 'simulator has'),
            ('--layouts', '-1', 'at least 1'),
        ):
            options = ['collect', '--layouts', '5', name, value, '--out', str(tmp_path / 'x')]
            assert main(options) == 2
            assert why in capsys.readouterr().err
        assert not (tmp_path / 'x').exists()


class TestKinematics:
    def test_a_point_on_the_axis_is_in_the_middle_and_one_above_is_higher(self):
        eye = np.array([0.0, 0.0, 2.0])
        points = np.array([[0.0, 0.0, 0.0], [0.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 3.0]])
        seen = project(points, eye=eye, axes=np.eye(3), fovy_deg=90.0, size=100)
        np.testing.assert_allclose(seen[:3], [[50, 50], [50, 25], [75, 50]])
        assert np.isnan(seen[3]).all(), 'behind the camera'

    @given(st.tuples(*[st.floats(-1.0, 1.0)] * 3))
    def test_a_rotation_is_undone_by_its_opposite(self, vector):
        turn = rotation_about(np.array(vector))
        np.testing.assert_allclose(turn @ rotation_about(-np.array(vector)), np.eye(3), atol=1e-9)

    @given(st.tuples(*[st.floats(-0.5, 0.5)] * 3))
    def test_straightening_undoes_a_turn_from_straight_down(self, vector):
        vector = np.array(vector)
        angle = np.linalg.norm(vector)
        half = np.array([*(np.sinc(angle / 2 / np.pi) / 2 * vector), np.cos(angle / 2)])
        x, y, z, w = half  # times (1, 0, 0, 0), straight down
        np.testing.assert_allclose(straightening(np.array([w, z, -y, -x])), -vector, atol=1e-9)


class TestSummary:
    @pytest.mark.parametrize(
        ('successes', 'episodes', 'low', 'high'),
        [(10, 10, 0.7225, 1.0), (0, 10, 0.0, 0.2775), (95, 100, 0.8882, 0.9785), (0, 0, 0.0, 1.0)],
    )
    def test_published_values_of_the_wilson_interval(self, successes, episodes, low, high):
        assert wilson_interval(successes, episodes) == pytest.approx((low, high), abs=1e-4)

    @given(st.integers(0, 300).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
    def test_the_interval_holds_the_rate_and_mirrors(self, counts):
        successes, episodes = counts
        low, high = wilson_interval(successes, episodes)
        assert 0 <= low <= (successes / episodes if episodes else 0.5) <= high <= 1
        mirrored = wilson_interval(episodes - successes, episodes)
        assert mirrored == pytest.approx((1 - high, 1 - low))

    def test_one_row_per_task(self):
        rows = summarize(
            [attempt(0), attempt(1, success=False, bytes=0, noisy=True), attempt(0, task='b')]
        )
        assert [(row.task, row.successes, row.attempts) for row in rows] == [
            (TASK, 1, 2), ('b', 1, 1),
        ]  # fmt: skip
        assert (rows[0].clean_successes, rows[0].clean) == (1, 1)
        assert rows[0].frames_per_s == pytest.approx(34 * 2 / 5.0)
        assert rows[0].megabytes == pytest.approx(0.001)


@dataclasses.dataclass
class Scripted:
    """A policy that answers with the expert's actions, in chunks; it notes what it is told."""

    world: World
    horizon: int = 4
    replan_at: tuple[int, ...] = ()
    log: list = dataclasses.field(default_factory=list)

    def reset(self):
        self.log.append('reset')
        self._expert = Expert(self.world.skill)

    def infer(self, observation):
        self.log.append(('infer', observation.stamp_ns // 50_000_000))
        actions = deque([self._expert.act(self.world._state())] * self.horizon)
        return type('Result', (), {'chunk': type('Chunk', (), {'data': actions})})

    def observe_executed(self, action, images=None):
        self.log.append(('executed', action.stamp_ns // 50_000_000))
        self.image = as_rgb(images['wrist'])
        return action.stamp_ns // 50_000_000 in self.replan_at


class CrowdedWorld(World):
    """With all objects of the shuffled tasks."""

    def reset(self, seed: int, split: str = 'eval') -> SimState:
        super().reset(seed, split)
        others = [name for name in SHUFFLE.objects if name not in self._places]
        self._places |= {name: np.array([0.1, 0.05 * i, 0.0]) for i, name in enumerate(others)}
        return self._state()

    def pixels(self, names) -> np.ndarray:
        return np.zeros((2, len(names), 2))


ROBOT = RobotConfig(camera_names=('wrist', 'side'), horizon=4)


class TestClosedLoop:
    def test_an_episode_ends_with_success(self):
        world = World()
        policy = Scripted(world, horizon=1)
        (end,) = LiberoTask(world, ROBOT).run(policy, 0)
        assert end['success'] == 1.0
        assert 20 < end['steps'] < world.task.max_steps
        assert policy.log[0] == 'reset'
        assert world.resets == [(0, 'eval')]

    def test_an_episode_ends_when_time_is_up(self):
        world = World(unsolvable=(0,))
        (end,) = LiberoTask(world, ROBOT).run(Scripted(world, horizon=1), 0)
        assert end == {'success': 0.0, 'steps': world.task.max_steps}

    def test_chunks_are_executed_to_their_end_unless_the_policy_asks(self):
        world = World(unsolvable=(0,))
        world.task = dataclasses.replace(world.task, max_steps=11)
        policy = Scripted(world, replan_at=(6,))
        list(LiberoTask(world, ROBOT).run(policy, 0))
        assert [step for kind, step in policy.log[1:] if kind == 'infer'] == [0, 4, 6, 10]
        told = [step for kind, step in policy.log[1:] if kind == 'executed']
        assert told == list(range(1, 12))

    def test_a_camera_that_is_turned_by_180_degrees_gets_what_libero_renders(self):
        for rotations, top in (((0,), 0), ((180,), -1)):
            world = World(unsolvable=(0,))
            world.task = dataclasses.replace(world.task, max_steps=1)
            policy = Scripted(world)
            robot = dataclasses.replace(ROBOT, camera_rotations=rotations)
            list(LiberoTask(world, robot).run(policy, 0))
            assert (policy.image[top] == 255).all()

    def test_a_real_policy_runs_in_it(self):
        world = World(unsolvable=(0,))
        world.task = dataclasses.replace(world.task, max_steps=9)
        policy = make_policy(robot__horizon=4, robot__joint_names=JOINTS)
        task = LiberoTask(world, policy.config.robot)
        assert list(task.run(policy, 0)) == [{'success': 0.0, 'steps': 9.0}]
        assert policy.epoch == 2

    def test_a_policy_s_own_episode_becomes_still_scenes_until_it_lifts_something(self):
        world, policy = CrowdedWorld(), Scripted(None, horizon=1)
        policy.world, policy.config = world, SimpleNamespace(robot=ROBOT)
        kept = roll_out(world, policy, layout_recipe(every=3), seed=5)
        assert world.resets == [(5, 'train')], 'held-out episodes are not learnt from'
        lifted = world._step
        assert len(kept.images) == 1 + (lifted - 1) // 3
        heights = kept.places[:, kept.place_names == world.skill.pick, 2]
        assert np.ptp(heights) < 0.005
        assert kept.pixels.shape == (len(kept.images), 2, 7, 2)
        assert kept.proprio.shape == (len(kept.images), len(PROPRIO_NAMES))
        assert not np.array_equal(kept.proprio[0], kept.proprio[-1])

    @pytest.mark.parametrize(
        'change',
        [{'camera_names': ('rear',)}, {'joint_names': ('elbow',)}, {'step_dt_s': 0.1},
         {'action_names': ('x', 'y', 'z')}, {'action_space': 'joint_position'}],
        ids=lambda change: next(iter(change)),
    )  # fmt: skip
    def test_a_robot_that_is_not_the_simulated_one_is_refused(self, change):
        robot = dataclasses.replace(ROBOT, translation_names=(), rotation_names=(), **change)
        with pytest.raises(ConfigError, match=next(iter(change))):
            LiberoTask(World(), robot)


def test_without_the_simulator_the_command_that_installs_it_is_named(tmp_path):
    options = ['collect', '--workers', '0', '--out', str(tmp_path)]
    code = (
        "import sys; sys.modules['libero'] = None\n"
        'from specprune_ros.cli import main\n'
        f'sys.exit(main({options!r}))'
    )
    done = subprocess.run(
        [sys.executable, '-c', code], capture_output=True, text=True, timeout=60, cwd=ROOT
    )
    assert done.returncode == 2, done.stderr
    assert 'bash scripts/setup_sim.sh' in done.stderr
    assert 'pip install -e ".[sim]"' in done.stderr


def test_ablate_refuses_a_task_that_is_none(tmp_path, capsys):
    assert main(['ablate', '--task', 'no/1', '--out', str(tmp_path / 'x')]) == 2
    assert 'libero_goal/0..9' in capsys.readouterr().err
    assert not (tmp_path / 'x').exists()


def test_the_simulators_command_can_be_imported_by_its_workers(tmp_path, monkeypatch):
    """A spawned process runs the file of its parent's main module under another name."""
    text = (Path(__file__).parent.parent / 'scripts' / 'setup_sim.sh').read_text()
    script = re.search(r'cat >\.venv-sim/bin/specprune <<EOF\n(.*?)\nEOF\n', text, re.DOTALL)
    command = tmp_path / 'specprune'
    command.write_text(script[1].replace('#!$root', '#!'))
    (tmp_path / 'specprune_ros_gl').write_text('egl')
    ran = []
    monkeypatch.setattr(sys, 'prefix', str(tmp_path))
    monkeypatch.setattr('specprune_ros.cli.main', lambda: ran.append('main') or 0)
    monkeypatch.setenv('MUJOCO_GL', '')  # so that it is as before afterwards
    monkeypatch.delenv('MUJOCO_GL')
    runpy.run_path(str(command), run_name='__mp_main__')
    assert ran == []
    assert os.environ['MUJOCO_GL'] == 'egl', 'its workers render as well'
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(command), run_name='__main__')
    assert (ran, end.value.code) == (['main'], 0)


@pytest.fixture(scope='module')
def env():
    """LIBERO itself, in a scene of ours."""
    from specprune_ros.sim.libero import LiberoEnv

    try:
        made = LiberoEnv('object_shuffled/1', size=64)
    except MissingDependencyError as error:
        pytest.skip(str(error))
    yield made
    made.close()


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ('name', 'instruction'),
    [
        ('libero_object/0', 'pick up the alphabet soup and place it in the basket'),
        ('libero_object_swap/0', 'pick up the alphabet soup and place it in the basket'),
        ('libero_object_lan/0', 'grab alphabet soup and put it into basket'),
        ('libero_object_task/0', 'pick the cream cheese and place it in the basket'),
    ],
)
def test_a_perturbed_task_says_what_is_to_be_done_there(env, name, instruction):
    from specprune_ros.sim.libero import LiberoEnv

    with contextlib.closing(LiberoEnv(name, size=32)) as other:
        assert other.instruction == instruction
        assert other.task.max_steps == 280
        other.reset(49)
        assert not other.success


@pytest.mark.slow
@pytest.mark.timeout(300)
class TestSimulator:
    def test_a_seed_gives_the_same_episode_whatever_came_before(self, env):
        def run(seed):
            state = env.reset(seed)
            for _ in range(12):
                state = env.step(np.array([0.5, -0.5, -1.0, 0.1, 0.0, 0.0, 1.0]))
            pixels = np.stack(list(env.images().values()))
            return np.concatenate([state.proprio(), *state.places.values()]), pixels

        before = np.random.get_state()[1].copy()
        first, other, again = run(3), run(4), run(3)
        assert np.array_equal(first[0], again[0])
        assert np.array_equal(first[1], again[1])
        assert not np.array_equal(first[0], other[0])
        assert np.array_equal(before, np.random.get_state()[1]), "the caller's generator moved"

    def test_objects_stand_where_they_were_drawn(self, env):
        state = env.reset(7)
        rng = seed_stream(7, split='eval', task=env.task.name)
        rng.integers(2**32)
        for name, point in draw_layout(SHUFFLE, rng).items():
            assert np.abs(state.places[name][:2] - point).max() < 0.02, name

    def test_every_camera_shows_the_scene_upright(self, env):
        env.reset(0)
        images = env.images()
        assert set(images) == {'wrist', 'side', 'overhead'}
        for image in images.values():
            assert (image.shape, image.dtype) == ((64, 64, 3), np.uint8)
            assert image.std() > 15
        wall, floor = images['side'][:4].mean(axis=(0, 1)), images['side'][-4:].mean(axis=(0, 1))
        assert np.ptp(floor) > np.ptp(wall), 'the grey wall is above the wooden floor'

    def test_the_expert_brings_the_named_object_and_no_other_counts(self, env):
        demonstration = collecting.demonstrate(
            env, 0, recipe(cameras=('wrist', 'side'), noise=0.3, noisy_share=1.0)
        )
        assert demonstration.success
        assert demonstration.noisy
        right = env.task
        env.task = find_task('object_shuffled/3')
        try:
            assert not env.success
        finally:
            env.task = right

    def test_observation_and_bad_arguments(self, env):
        state = env.reset(0)
        assert not env.success
        seen = env.observation((*JOINTS[-2:], 'eef_z'))
        assert seen.proprio == pytest.approx([0.04, -0.04, state.hand[2]], abs=0.003)
        assert seen.instruction == 'pick up the cream cheese and place it in the basket'
        with pytest.raises(ValueError):
            env.step(np.full(7, np.nan))
        with pytest.raises(ConfigError, match='split'):
            env.reset(0, 'test')
        with pytest.raises(ConfigError, match='seed'):
            env.reset(-1)

    def test_a_still_scene_is_what_was_drawn(self, env):
        recipe_of = layout_recipe(cameras=env.cameras, size=64)
        still = render_layouts(env, recipe_of, range(4))
        again = render_layouts(env, recipe_of, range(2, 4))
        assert np.array_equal(still.images[2:], again.images)
        assert np.array_equal(still.proprio[2:], again.proprio)
        assert not np.array_equal(still.images[0], still.images[1])
        assert np.linalg.norm(still.turn, axis=1).max() < 0.3
        # The basket never moves: every camera that stands still sees it where it is.
        side = still.pixels[:, 1, still.place_names.tolist().index(BASKET)]
        assert np.ptp(side, axis=0).max() < 1.0
        assert ((side > 0) & (side < 64)).all()
        env.reset(0)
        assert env.images()['side'].std() > 15, 'an episode can begin after it'

    def test_only_shuffled_tasks_have_still_scenes(self, env):
        from specprune_ros.sim.libero import LiberoEnv

        official = LiberoEnv('libero_goal/8', size=64)
        with pytest.raises(ConfigError, match='not shuffled'):
            official.arrange(0, draw_hand)
        official.close()

    def test_an_official_task_starts_in_its_official_states(self, env):
        from specprune_ros.sim.libero import LiberoEnv

        official = LiberoEnv('libero_goal/8', size=64)
        state = official.reset(0)
        assert official.instruction == 'put the bowl on the plate'
        assert state.places['akita_black_bowl_1'][:2] == pytest.approx([-0.098, -0.009], abs=2e-3)
        with pytest.raises(ConfigError, match='seed'):
            official.reset(50)
        drawn = official.reset(50, 'train')
        assert not np.allclose(drawn.places['plate_1'], state.places['plate_1'], atol=1e-4)
        official.close()
        official.close()

    def test_an_image_that_is_rendered_later_is_the_one_of_its_step(self, env):
        env.reset(0)
        late, now = env.late_images(), env.images()
        for _ in range(5):
            env.step(np.array([1.0, 0.0, -1.0, 0.0, 0.0, 0.0, 1.0]))
        after = env.images()
        for name, image in late.items():
            assert np.array_equal(image.rgb(), now[name])
            assert not np.array_equal(image.rgb(), after[name])

    def test_a_disturbed_scene_looks_different_until_it_is_set_right(self, env, monkeypatch):
        env.reset(0)
        before = env.images()

        def seen(disturbance: Disturbance, seed: int = 0) -> dict[str, np.ndarray]:
            env.disturb(disturbance, seed)
            env.reset(0)
            return env.images()

        dark, moved = seen(Disturbance(light=0.5)), seen(Disturbance(camera_m=0.02))
        elsewhere = seen(Disturbance(camera_m=0.02), seed=1)
        with monkeypatch.context() as patch:
            patch.setattr(env, 'task', find_task('object_shuffled/0'))
            env.disturb(Disturbance(camera_m=0.02), 0)
        env.reset(0)
        other_task = env.images()
        turned = seen(Disturbance(camera_rad=0.03))
        for name, image in before.items():
            assert dark[name].mean() < 0.8 * image.mean()
            assert not np.array_equal(moved[name], image)
            assert not np.array_equal(turned[name], image)
            assert not np.array_equal(moved[name], elsewhere[name]), 'another way by another seed'
            assert not np.array_equal(moved[name], other_task[name]), 'and in another task'
        again = seen(Disturbance())
        assert all(np.array_equal(again[name], image) for name, image in before.items())

    def test_a_worker_collects_what_this_process_would(self, env, tmp_path):
        """A spawned process finds the simulator, and a seed does not depend on who runs it."""
        jobs = collecting.jobs_of([TASK], 1)
        (made,) = collecting.collect(tmp_path, recipe(size=32), jobs, workers=1)
        alone = collecting.demonstrate(env, 0, recipe(size=32)).episode
        stored = dataset.read_episode(dataset.episode_path(tmp_path, TASK, 0))
        assert made.success
        assert np.array_equal(stored.actions, alone.actions)
        assert np.array_equal(stored.proprio, alone.proprio)
