"""`specprune eval`: paired episodes, the tests on them, and going on after an interruption."""

import dataclasses
import json
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
from conftest import ACTION_NAMES
from hypothesis import given
from hypothesis import strategies as st
from test_sim import JOINTS, World

from specprune_ros.cli import main
from specprune_ros.cli.eval import digest_of
from specprune_ros.config import PruneConfig
from specprune_ros.config_files import load_config
from specprune_ros.errors import ConfigError, RecordingError
from specprune_ros.images import as_rgb
from specprune_ros.shipped import PARAMS
from specprune_ros.sim import evaluate as evaluating
from specprune_ros.sim.closed_loop import LiberoTask
from specprune_ros.sim.comparison import compare, discordant, mcnemar
from specprune_ros.sim.conditions import CONDITIONS
from specprune_ros.sim.evaluate import LATER, Conditioned, Plan, Result, pruning_of, read_results
from specprune_ros.sim.film import STILL_FRAMES
from specprune_ros.sim.found import share_left
from specprune_ros.types import Mode, Observation, PolicyResult, PruneReport

TASKS = ['object_shuffled/0', 'object_shuffled/1']
OVERRIDES = {
    'robot.camera_names': ('wrist', 'side'),
    'robot.joint_names': JOINTS,
    'robot.action_names': ACTION_NAMES,
    'model.name': 'tiny',
}
PLAN = Plan(params=('robots/libero_franka_3cam',), overrides=OVERRIDES, size=8)


def result(task='a/0', method='dense', seed=0, success=True, **changes) -> Result:
    values = {
        'steps': 100, 'queries': 13, 'latency_ms': 20.0, 'kept': 0.3, 'static': 0.4, 'fine': 0.5,
        'action_error': 0.01, 'object_static': 0.9, 'object_kept': 0.8,
    }  # fmt: skip
    return Result(task=task, method=method, seed=seed, success=success, **{**values, **changes})


# The wrist camera's 5 x 8 patches and the side camera's 6 x 10: one row of the first goes in
# static pruning, another one later.
WENT = np.concatenate([np.repeat((0, 2, 0, 5, 0), 8), np.zeros(60)]).astype(np.uint8)
# The dense model's: that early row and that late one, and half of the side camera's.
IMPORTANT = np.concatenate([np.repeat((0, 1, 0, 1, 0), 8), np.arange(60) % 2]).astype(np.uint8)


class Still:
    """A policy that never moves, or always one way, and says that it pruned."""

    config = None

    def __init__(self, action: float = 0.0, mode: Mode = Mode.FINE):
        self._action, self._mode = action, mode

    def reset(self):
        pass

    def infer(self, observation):
        report = PruneReport(
            stamp_ns=observation.stamp_ns, chunk_id=0, epoch=1, method='', budget='', alpha=1.0,
            mode=self._mode, mode_reason='', tokens_total=np.array([40, 60]),
            tokens_static=np.array([20, 20]), tokens_kept=np.array([10, 20]),
            cameras=('wrist', 'side'), grid_rows=np.array([5, 6]), grid_cols=np.array([8, 10]),
            reason=np.ones(100, np.uint8), pruned_after_layer=WENT, static_layer=2,
            important=IMPORTANT, flops_share=0.4,
            latency_total_s=0.5 if observation.stamp_ns == 0 else 0.02,
        )  # fmt: skip
        chunk = SimpleNamespace(data=np.full((8, 7), self._action))
        return PolicyResult(chunk=chunk, report=report)

    def observe_executed(self, action, images=None):
        return False


@pytest.fixture
def worlds(monkeypatch):
    """Episodes of twelve steps in `World`, and what ran in them."""
    ran = []

    def environment(task, cameras, size):
        world = World(task)
        world.task = dataclasses.replace(world.task, max_steps=12)
        world.rendering_s = 0.0
        world.disturb = lambda disturbance, seed: world.__dict__.update(given=(disturbance, seed))
        ran.append(world)
        return world

    def policy(plan, method):
        return Still(0.25 if method == 'specprune' else 0.0)

    monkeypatch.setattr(evaluating, '_policy', policy)
    monkeypatch.setattr(evaluating, '_environment', environment)
    return ran


class TestShareLeft:
    def report(self) -> PruneReport:
        return (
            Still().infer(Observation(images={}, proprio=None, instruction='', stamp_ns=0)).report
        )

    @pytest.mark.parametrize(
        ('centre', 'shares'),
        [
            ((4.0, 4.0), (2 / 3, 1 / 3)),  # the middle three of five rows
            ((4.0, 1.0), (0.5, 0.5)),  # rows 0 and 1: one goes early
            ((7.9, 5.5), (1.0, 0.5)),  # rows 2 and 3, at the edge: one goes late
            ((8.0, 4.0), None),  # outside
            ((np.nan, np.nan), None),  # behind the camera
        ],
    )
    def test_patches_around_the_centre(self, centre, shares):
        got = share_left(self.report(), {'wrist': np.array(centre)}, size=8)
        if shares is None:
            assert np.isnan(got).all()
        else:
            assert got == pytest.approx(shares)

    def test_all_cameras_that_see_it_count(self):
        centres = {'wrist': np.array([4.0, 1.0]), 'side': np.array([4.0, 4.0])}
        alone = share_left(self.report(), {'side': centres['side']}, size=8)
        assert alone == (1.0, 1.0)
        both = share_left(self.report(), centres, size=8)
        assert both[0] == 0.75, 'two of four patches of the first, four of four of the other'

    def test_a_camera_upside_down_and_a_crop(self):
        report = dataclasses.replace(self.report(), rotation_deg=np.array([180, 0]))
        centre = {'wrist': np.array([4.0, 7.0])}
        assert share_left(report, centre, size=8) == (0.5, 0.5), (
            'row 1 of the turned image is gone'
        )
        cropped = dataclasses.replace(self.report(), crop_side=0.5)
        edge, inside = np.array([4.0, 1.0]), np.array([4.0, 2.6])
        assert np.isnan(share_left(cropped, {'wrist': edge}, size=8)).all(), 'cut off'
        assert share_left(cropped, {'wrist': inside}, size=8) == (0.5, 0.5), 'the new upper edge'

    def test_a_mirrored_camera_has_its_object_on_the_other_side(self):
        robot = load_config(PLAN.params, OVERRIDES).robot
        turned = dataclasses.replace(robot, camera_rotations=(180, 0))
        for one, y in ((robot, 1.0), (turned, 7.0)):
            task = LiberoTask(World(TASKS[0]), one)
            assert task.centres('alphabet_soup_1')['wrist'].tolist() == [4.0, y]

    def test_a_ledger_of_before_can_still_be_read(self, tmp_path, worlds):
        list(evaluating.evaluate(tmp_path, PLAN, [(TASKS[0], 'dense', 0)], workers=0))
        path = tmp_path / 'episodes.csv'
        rows = [line.rsplit(',', len(LATER))[0] for line in path.read_text().splitlines()]
        path.write_text('\n'.join(rows) + '\n')
        (one,) = read_results(tmp_path)
        assert np.isnan((one.object_static, one.flops, one.recall_kept)).all()
        assert one.kept == 0.3
        jobs = [(TASKS[0], method, 0) for method in ('dense', 'specprune')]
        _, new = evaluating.evaluate(tmp_path, PLAN, jobs, workers=0)
        old, again = read_results(tmp_path)
        assert (again, new.flops) == (new, 0.4)
        assert np.isnan(old.flops)

    def test_a_task_that_the_expert_does_not_know_has_none(self, tmp_path, worlds, monkeypatch):
        monkeypatch.setattr(evaluating, 'SKILLS', {})
        (one,) = evaluating.evaluate(tmp_path, PLAN, [(TASKS[0], 'dense', 0)], workers=0)
        assert np.isnan((one.object_static, one.object_kept)).all()
        assert np.isnan(read_results(tmp_path)[0].object_kept)
        (cell,) = compare([one, result()], 'dense')[:1]
        assert cell.object_static == 0.9, 'the mean of those that have one'


class TestMcNemar:
    @pytest.mark.parametrize(
        ('won', 'lost', 'p_value'),
        [(0, 0, 1.0), (0, 1, 1.0), (0, 5, 0.0625), (0, 6, 0.03125), (3, 10, 0.0922852)],
    )
    def test_known_values(self, won, lost, p_value):
        assert mcnemar(won, lost) == pytest.approx(p_value)
        assert mcnemar(lost, won) == pytest.approx(p_value)

    @given(st.integers(0, 60), st.integers(0, 60))
    def test_it_is_a_probability_that_falls_as_one_side_wins_more(self, won, lost):
        assert 0 < mcnemar(won, lost) <= 1
        if won >= lost:
            assert mcnemar(won + 1, lost) <= mcnemar(won, lost) + 1e-12


class TestComparison:
    def test_pairs_are_episodes_of_one_task_and_seed(self):
        dense = [result(seed=s, success=s < 3) for s in range(5)]
        pruned = [result(method='p', seed=s, success=s in (0, 3)) for s in (0, 1, 2, 3)]
        assert discordant(pruned, dense) == (1, 2)
        (whole, other) = compare([*dense, *pruned], 'dense')
        assert (whole.successes, whole.episodes, whole.p_value) == (3, 5, None)
        assert (other.won, other.lost) == (1, 2)
        assert other.low < 0.5 < other.high

    def test_tasks_come_after_all_of_them(self):
        cells = compare([result(task=t, seed=s) for t in ('b/0', 'a/0') for s in (0, 1)], 'dense')
        assert [(cell.task, cell.episodes) for cell in cells] == [('', 4), ('a/0', 2), ('b/0', 2)]

    def test_a_method_that_never_succeeds_has_no_steps(self):
        (cell,) = compare([result(success=False)], 'dense')
        assert np.isnan(cell.steps)


class TestMethods:
    def test_names_and_fields(self):
        base = PruneConfig(guard_every=5)
        assert pruning_of('dense', base).method == 'none'
        chosen = pruning_of('specprune:alpha=1,budget=fixed,controller=false', base)
        assert (chosen.alpha, chosen.budget, chosen.controller) == (1.0, 'fixed', False)
        assert chosen.guard_every == 0, "the guard's dense actions would hide what pruning does"

    @pytest.mark.parametrize(
        'method', ['magic', 'specprune:beta=1', 'specprune:alpha', 'specprune:alpha=9']
    )
    def test_what_is_none_is_named(self, method):
        with pytest.raises(ConfigError):
            pruning_of(method, PruneConfig())


class Listener:
    """A policy that keeps what it is given."""

    config = None

    def reset(self):
        pass

    def infer(self, observation):
        self.seen = observation
        return SimpleNamespace(report=SimpleNamespace(latency_total_s=0.05))

    def observe_executed(self, action, images=None):
        self.images = images
        return False


class TestConditions:
    IMAGE = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)

    def given(self, condition: str) -> Listener:
        listener = Listener()
        policy = Conditioned(listener, condition, 'object_shuffled/3')
        observation = Observation(
            images={'side': self.IMAGE}, proprio=None, instruction='take it', stamp_ns=0
        )
        result = policy.infer(observation)
        policy.observe_executed(None, {'side': self.IMAGE})
        assert [query.report for query in policy.queries] == [result.report]
        policy.reset()
        assert policy.queries == []
        return listener

    def test_rendering_is_no_latency(self):
        spent = iter([1.0, 1.03])
        policy = Conditioned(Listener(), 'normal', 'a/0', rendering_s=lambda: next(spent))
        policy.infer(Observation(images={}, proprio=None, instruction='x', stamp_ns=0))
        assert [query.seconds for query in policy.queries] == pytest.approx([0.02])

    def test_normal_changes_nothing(self):
        listener = self.given('normal')
        assert listener.seen.instruction == 'take it'
        assert np.array_equal(as_rgb(listener.seen.images['side']), self.IMAGE)
        assert np.array_equal(as_rgb(listener.images['side']), self.IMAGE)

    def test_grey_shows_nothing_before_and_after_an_action(self):
        listener = self.given('grey')
        for images in (listener.seen.images, listener.images):
            assert np.ptp(as_rgb(images['side'])) == 0
        assert listener.seen.instruction == 'take it'

    @pytest.mark.parametrize('condition', ['noise', 'blur'])
    def test_an_image_is_spoilt_the_same_way_whenever_it_is_seen(self, condition):
        image = np.random.default_rng(0).integers(40, 200, (32, 32, 3)).astype(np.uint8)
        once, twice = (
            as_rgb(CONDITIONS[condition].seen({'side': image})['side']) for _ in range(2)
        )
        assert np.array_equal(once, twice)
        change = np.abs(once.astype(int) - image).mean()
        assert 5 < change < 50
        assert once.dtype == np.uint8

    def test_instructions_are_withheld_or_another_task_s(self):
        assert self.given('withheld').seen.instruction == 'do it'
        assert 'alphabet soup' in self.given('wrong').seen.instruction

    def test_an_official_task_has_no_wrong_instruction(self):
        policy = Conditioned(Listener(), 'wrong', 'libero_goal/1')
        observation = Observation(images={}, proprio=None, instruction='x', stamp_ns=0)
        with pytest.raises(ConfigError, match='wrong'):
            policy.infer(observation)


class TestEvaluate:
    def run(self, folder, seeds=2, plan=PLAN, films=0) -> list[Result]:
        jobs = evaluating.jobs_of(TASKS, ['dense', 'specprune'], seeds)
        return list(evaluating.evaluate(folder, plan, jobs, workers=0, films=films))

    def test_every_method_meets_the_same_episodes(self, tmp_path, worlds):
        results = self.run(tmp_path)
        assert [(one.task, one.method, one.seed) for one in results] == [
            (task, method, seed)
            for task in TASKS
            for method in ('dense', 'specprune')
            for seed in (0, 1)
        ]
        for one in results:
            assert (one.steps, one.queries, one.success) == (12, 2, False)
            assert (one.kept, one.static, one.fine) == (0.3, 0.4, 1.0)
            assert one.latency_ms == 20.0, 'without the first query'
            assert (one.object_static, one.object_kept) == (0.5, 0.5)
            pruned = one.method == 'specprune'
            assert one.action_error == (0.25 if pruned else 0.0)
            assert one.flops == 0.4
            # Half, then none of the wrist's important ones; all of the side's.
            assert (one.recall_static, one.recall_kept) == ((0.75, 0.5) if pruned else (1.0, 1.0))
        assert read_results(tmp_path) == results

    def test_a_second_run_makes_only_what_is_missing(self, tmp_path, worlds):
        first = self.run(tmp_path, seeds=1)
        with (tmp_path / 'episodes.csv').open('a') as file:
            file.write('object_shuffled/0,den')  # killed while writing
        again = self.run(tmp_path, seeds=2)
        assert len(worlds) == 8
        assert again[:4] == first
        assert len(read_results(tmp_path)) == 8

    def test_a_scene_is_disturbed_by_the_seed_of_its_episode(self, tmp_path, worlds):
        self.run(tmp_path, plan=dataclasses.replace(PLAN, condition='dark'))
        assert [world.given[1] for world in worlds] == [0, 1] * 4
        assert {world.given[0].light for world in worlds} == {0.6}

    def test_a_query_after_a_part_of_each_chunk(self, tmp_path, worlds):
        results = self.run(tmp_path, plan=dataclasses.replace(PLAN, open_loop_steps=5))
        assert {(one.steps, one.queries) for one in results} == {(12, 3)}

    def test_a_query_later_than_the_chunk_is_refused(self, tmp_path, worlds):
        with pytest.raises(ConfigError, match='open_loop_steps'):
            self.run(tmp_path, plan=dataclasses.replace(PLAN, open_loop_steps=9))

    def test_videos_show_every_step(self, tmp_path, worlds):
        self.run(tmp_path, films=1)
        videos = sorted((tmp_path / 'videos').iterdir())
        assert len(videos) == 4, 'of two tasks, two methods, one seed'
        film = cv2.VideoCapture(str(videos[0]))
        assert film.get(cv2.CAP_PROP_FRAME_COUNT) == 12 + STILL_FRAMES
        assert film.get(cv2.CAP_PROP_FPS) == 20
        assert film.read()[1].std() > 10

    def test_another_plan_in_the_folder_is_refused(self, tmp_path, worlds):
        self.run(tmp_path, seeds=1)
        other = Plan(params=PLAN.params, overrides=OVERRIDES, size=16)
        with pytest.raises(ConfigError, match='another evaluation'):
            self.run(tmp_path, plan=other)

    def test_the_same_weights_in_another_folder_are_the_same_evaluation(self, tmp_path, worlds):
        def plan(folder: str, weights: str) -> Plan:
            overrides = {**OVERRIDES, 'model.checkpoint': folder}
            params = (f'{folder}/{PARAMS}', *PLAN.params)
            return dataclasses.replace(PLAN, params=params, overrides=overrides, weights=weights)

        evaluating.open_folder(tmp_path, plan('one', 'a'))
        assert evaluating.open_folder(tmp_path, plan('two', 'a')) == []
        with pytest.raises(ConfigError, match='another evaluation'):
            evaluating.open_folder(tmp_path, plan('one', 'b'))

    def test_a_damaged_line_is_named(self, tmp_path, worlds):
        self.run(tmp_path, seeds=1)
        path = tmp_path / 'episodes.csv'
        path.write_text(path.read_text().replace('12', 'x', 1))
        with pytest.raises(RecordingError, match='damaged'):
            read_results(tmp_path)

    def test_a_line_that_was_cut_is_damaged(self, tmp_path, worlds):
        self.run(tmp_path, seeds=1)
        path = tmp_path / 'episodes.csv'
        path.write_text(path.read_text().rstrip().rsplit(',', 2)[0] + '\n')
        with pytest.raises(RecordingError, match='damaged'):
            read_results(tmp_path)

    def test_a_name_given_twice_counts_once(self):
        jobs = evaluating.jobs_of([TASKS[0]] * 2, ['dense', 'specprune', 'dense'], 2)
        assert len(jobs) == len(set(jobs)) == 4

    def test_an_official_task_has_fifty_episodes(self):
        with pytest.raises(ConfigError, match='50'):
            evaluating.jobs_of(['libero_goal/1'], ['dense'], 51)


class TestCommand:
    def test_the_table_and_its_json(self, tmp_path, worlds, capsys):
        import yaml

        folder = tmp_path / 'checkpoint'
        folder.mkdir()
        robot = {'camera_names': ['wrist', 'side'], 'joint_names': list(JOINTS)}
        tree = {'/**': {'ros__parameters': {'robot': robot}}}
        (folder / 'params.yaml').write_text(yaml.safe_dump(tree))
        table = tmp_path / 'table.json'
        options = ['--set', 'model.name=tiny', '--workers', '0', '--json', str(table)]
        names = ['--task', TASKS[0], '--method', 'dense', 'specprune', '--seeds', '1']
        out = ['--out', str(tmp_path / 'out')]
        assert main(['eval', str(folder), *options, *names, *out]) == 0
        shown = capsys.readouterr().out
        assert '0/1' in shown
        assert 'specprune' in shown
        content = json.loads(table.read_text())
        assert {'hardware', 'specprune', 'torch'} <= set(content['environment'])
        elsewhere = {**content, 'environment': {'hardware': 'another'}}
        table.write_text(json.dumps(elsewhere))
        assert main(['eval', str(folder), *options, *names, *out]) == 0
        assert json.loads(table.read_text()) == elsewhere, 'nothing was run here'
        cells = content['cells']
        assert [(cell['method'], cell['steps']) for cell in cells] == [
            ('dense', None),
            ('specprune', None),
        ]
        assert cv2.imread(str(tmp_path / 'out' / 'success.png')) is not None

    def test_queries_whose_pruning_failed_are_told(self, tmp_path, worlds, capsys, monkeypatch):
        (tmp_path / 'params.yaml').write_text('/**: {ros__parameters: {}}')
        command = ['eval', str(tmp_path), '--workers', '0', '--seeds', '1', '--task', TASKS[0]]
        for name, mode, told in (('a', Mode.FINE, False), ('b', Mode.FALLBACK, True)):
            monkeypatch.setattr(evaluating, '_policy', lambda plan, method, m=mode: Still(mode=m))
            assert main([*command, '--out', str(tmp_path / name)]) == 0
            assert {one.fallback for one in read_results(tmp_path / name)} == {float(told)}
            words = 'specprune: 100.0% of the queries ran dense because pruning failed'
            assert (words in capsys.readouterr().out) == told

    def test_a_changed_parameter_file_is_another_evaluation(self, tmp_path, worlds, capsys):
        (tmp_path / 'params.yaml').write_text('/**: {ros__parameters: {}}')
        extra = tmp_path / 'extra.yaml'
        robot = f'robot: {{camera_names: [wrist, side], joint_names: [{", ".join(JOINTS)}]}}'
        command = ['eval', str(tmp_path), '--params', str(extra), '--set', 'model.name=tiny']
        command += ['--workers', '0', '--task', TASKS[0], '--method', 'dense', '--seeds', '1']
        for alpha, status in (('0.8', 0), ('0.8', 0), ('0.6', 2)):
            pruning, limits = f'pruning: {{alpha: {alpha}}}', 'limits: {max_step: [1.0]}'
            extra.write_text(f'/**: {{ros__parameters: {{{robot}, {pruning}, {limits}}}}}')
            assert main([*command, '--out', str(tmp_path / 'out')]) == status
        assert 'holds another evaluation' in capsys.readouterr().err

    def test_an_evaluation_that_fails_leaves_no_table(self, tmp_path, worlds, monkeypatch):
        (tmp_path / 'params.yaml').write_text('/**: {ros__parameters: {}}')
        monkeypatch.setattr(evaluating, '_policy', None)
        table = tmp_path / 'new' / 'table.json'
        command = ['eval', str(tmp_path), '--workers', '0', '--json', str(table)]
        with pytest.raises(TypeError):
            main([*command, '--out', str(tmp_path / 'out')])
        assert table.parent.is_dir()
        assert not table.exists()

    def test_a_file_that_cannot_be_written_is_told_before_the_episodes(self, tmp_path, capsys):
        (tmp_path / 'params.yaml').write_text('/**: {ros__parameters: {}}')
        (tmp_path / 'file').write_text('')
        table = tmp_path / 'file' / 'table.json'
        out = tmp_path / 'out'
        assert main(['eval', str(tmp_path), '--json', str(table), '--out', str(out)]) == 2
        assert '--json' in capsys.readouterr().err
        assert not out.exists()

    @pytest.mark.parametrize(
        ('option', 'value', 'why'),
        [
            ('--condition', 'fog', 'must be one of normal'),
            ('--seeds', '0', 'at least 1'),
            ('--task', 'no/1', 'libero_goal'),
            ('--set', 'alpha', 'must look like'),
        ],
    )
    def test_a_bad_command_line_is_answered_with_what_is_allowed(
        self, tmp_path, capsys, option, value, why
    ):
        (tmp_path / 'params.yaml').write_text('/**: {ros__parameters: {}}')
        out = ['--out', str(tmp_path / 'x')]
        assert main(['eval', str(tmp_path), option, value, *out]) == 2
        assert why in capsys.readouterr().err
        assert not (tmp_path / 'x').exists()

    def test_another_training_is_another_evaluation(self, tmp_path):
        (tmp_path / 'model.safetensors').write_bytes(b'one')
        before = digest_of(tmp_path)
        (tmp_path / 'README.md').write_text('what is known of it by now')
        assert before == digest_of(tmp_path), 'the same weights'
        (tmp_path / 'model.safetensors').write_bytes(b'two')
        assert digest_of(tmp_path) != before

    def test_a_folder_without_parameters_is_named(self, tmp_path, capsys):
        assert main(['eval', str(tmp_path)]) == 2
        assert 'params.yaml' in capsys.readouterr().err
