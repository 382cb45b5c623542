"""Ablation studies: what they vary, what they measure, and what they write."""

import csv
import dataclasses
import io
import itertools
import json
import math

import cv2
import numpy as np
import pytest
from conftest import DATA, make_observation
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from rich.console import Console

from specprune_ros.ablation import output
from specprune_ros.ablation.panel import QueryFigures
from specprune_ros.ablation.runner import Ablation, base_of, configurations, run_ablation, ticks
from specprune_ros.ablation.studies import DENSE, STUDIES, Study, Variant, select
from specprune_ros.ablation.summary import (
    FIGURES,
    VariantSummary,
    by_query,
    estimate,
    mean_interval,
    summarize,
)
from specprune_ros.ablation.task import Late, RecordingTask
from specprune_ros.cli import main
from specprune_ros.config import PolicyConfig, PruneConfig
from specprune_ros.config_files import from_mapping
from specprune_ros.errors import ConfigError, ObservationError, RecordingError
from specprune_ros.models import load
from specprune_ros.offline import fit_robot
from specprune_ros.outputs import plain
from specprune_ros.recall import kept_recall, own_recall, supplemented_recall
from specprune_ros.recordings import open_recording
from specprune_ros.recordings.base import CameraEvent
from specprune_ros.types import ExecutedAction, PruneReport, Reason

OWN_BAG = DATA / 'pick_place'
PERIOD = 50_000_000
QUERIES, STEPS = 5, 33  # of the shortened recording: dense, coarse, coarse, fine, fine
LATENCIES = {'decode_ms', 'total_ms', 'decode_ratio', 'total_ratio'}


class Cut:
    """A recording up to a control step."""

    def __init__(self, recording, steps: int, has_actions: bool = True):
        self._recording, self.control_steps = recording, steps
        self.has_actions = has_actions

    def __getattr__(self, name: str):
        return getattr(self._recording, name)

    def events(self):
        left = self.control_steps
        for event in self._recording.events():
            action = isinstance(event, ExecutedAction)
            left -= action
            if left < 0:
                return
            if self.has_actions or not action:
                yield event


@pytest.fixture(scope='module')
def recording() -> Cut:
    return Cut(open_recording(OWN_BAG), STEPS)


@pytest.fixture(scope='module')
def config(recording) -> PolicyConfig:
    values = {
        'robot.camera_names': ('side',),
        'runtime.warm_up_queries': 0,
        'model.device': 'cpu',
    }
    return fit_robot(from_mapping(values), recording)


@pytest.fixture(scope='module')
def model(config):
    return load(config)


@pytest.fixture(scope='module')
def task(recording, config) -> RecordingTask:
    return RecordingTask(recording, config.robot)


@pytest.fixture(scope='module')
def everything(model, config, task) -> Ablation:
    """All studies with one seed."""
    return run_ablation(model, config, task, select([]), seeds=1)


@pytest.fixture(scope='module')
def some(model, config, task) -> Ablation:
    """Those studies of which a test asks more than that they run."""
    studies = select(['techniques', 'alpha', 'budget'])
    return run_ablation(model, config, task, studies, seeds=1)


@pytest.fixture(scope='module')
def two_seeds(model, config, recording) -> Ablation:
    """A small study with two seeds, of three queries each."""
    short = RecordingTask(Cut(recording, 17), config.robot)
    return run_ablation(model, config, short, select(['hysteresis']), seeds=2)


@pytest.fixture(scope='module')
def summaries(some) -> dict[str, list[VariantSummary]]:
    return {study.name: summarize(some, study) for study in some.studies}


def named(summaries: dict, study: str) -> dict[str, VariantSummary]:
    return {summary.variant.name: summary for summary in summaries[study]}


def values(summaries: list[VariantSummary], figure: str) -> list[float]:
    return [summary.estimates[figure].value for summary in summaries]


def without_latency(row: QueryFigures) -> dict[str, object]:
    """NaN as None, so that equal rows are equal."""
    fields = dataclasses.asdict(row).items()
    return {k: plain(v) for k, v in fields if k not in LATENCIES}


# Studies ---------------------------------------------------------------------------------------


def test_all_studies_are_the_default():
    assert [study.name for study in select([])] == list(STUDIES)
    assert {'techniques', 'global_reuse', 'layer_weight', 'thresholds', 'alpha', 'k_global',
            'k_local_dynamic', 'score_direction', 'global_fusion', 'budget',
            'hysteresis'} == set(STUDIES)  # fmt: skip


def test_a_study_named_twice_runs_once():
    assert [study.name for study in select(['alpha', 'budget', 'alpha'])] == ['alpha', 'budget']


@pytest.mark.parametrize('study', STUDIES.values(), ids=STUDIES)
def test_the_variants_of_a_study_differ(study):
    made = [variant.configured(PruneConfig()) for variant in study.variants]
    names = [variant.name for variant in study.variants]
    assert len(set(names)) == len(names)
    twice = {'v_t 0.5', 'v_r 0.2'} & set(names)  # the point where both tables meet
    assert len(set(made)) == len(made) - max(len(twice) - 1, 0)


def test_a_configuration_of_several_studies_is_one():
    """Full method, alpha 0.8, K 30, K (24, 20), entropy, v_t 0.5: all the paper's default."""
    studies = select(['techniques', 'alpha', 'k_global', 'k_local_dynamic', 'layer_weight'])
    keys = configurations(studies, PruneConfig())
    assert keys[0].method == 'none'
    assert keys.count(PruneConfig()) == 1
    assert len(keys) == 1 + 1 + 2 + 2 + 2 + 2 + 1


def test_the_base_has_no_guard():
    assert base_of(PruneConfig(guard_every=3, alpha=0.7)) == PruneConfig(alpha=0.7)


def test_studies_of_another_method_are_refused():
    with pytest.raises(ConfigError, match=r"pruning\.method = 'none'.*specprune"):
        base_of(PruneConfig(method='none'))


@pytest.mark.parametrize(
    ('arguments', 'told'),
    [
        (['--study', 'alpah'], "'alpah': must be one of techniques, "),
        (['--study', 'alpha', 'nothing'], "'nothing'"),
        (['--seeds', '0'], 'seeds'),
        (['--set', 'pruning.method=none'], 'pruning.method'),
        (['--set', 'model.name=huge'], 'huge'),
    ],
)
def test_what_the_user_can_mend_is_one_line(tmp_path, capsys, arguments, told):
    out = tmp_path / 'out'
    assert main(['ablate', str(OWN_BAG), '--out', str(out), *arguments]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert told in lines[0]
    assert not out.exists()


# What is run -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_every_study_gives_every_figure(everything):
    unknown = {  # why a figure may be missing
        'recall': {'without'},  # no V_global, nothing to recall
        'recall_supplemented': {'dense', 'without'},
    }
    for study in everything.studies:
        for summary in summarize(everything, study):
            for figure in FIGURES:
                known = math.isfinite(summary.estimates[figure.name].value)
                absent = summary.variant.name in unknown.get(figure.name, ())
                assert known is not absent, (study.name, summary.variant.name, figure.name)


@pytest.mark.slow
@pytest.mark.parametrize('study', ['k_global', 'k_local_dynamic'])
def test_a_greater_k_keeps_more(everything, study):
    found = values(summarize(everything, STUDIES[study]), 'static_share')
    assert found == sorted(found)
    assert len(set(found)) == len(found)


@pytest.mark.slow
def test_lower_thresholds_make_less_fine(everything):
    study = {s.variant.name: s for s in summarize(everything, STUDIES['thresholds'])}
    fine = [study[f'v_t {v}'].modes.get('fine', 0) for v in (0.3, 0.5, 0.7)]
    assert fine == sorted(fine)
    assert fine[0] < fine[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    'study', ['global_reuse', 'layer_weight', 'score_direction', 'global_fusion']
)
def test_choices_that_must_matter_do(everything, study):
    one, other = (v.configured(everything.base) for v in STUDIES[study].variants)
    errors = [[row.action_error for row in everything.figures[key]] for key in (one, other)]
    assert errors[0] != errors[1]


@pytest.mark.slow
def test_terminal_tables_have_the_papers_figures_beside_ours(everything):
    console = Console(width=output.WIDTH, file=io.StringIO())
    for study in everything.studies:
        found = summarize(everything, study)
        console.print(output.terminal_table(study, found, everything))
    text = console.file.getvalue()
    assert '…' not in text
    for found in ('Table 3', 'recall 92.0', 'SR 96.8 %', '34.4 %', 'no study of the paper'):
        assert found in text


def test_all_variants_see_the_same_observations(some):
    stamps = [
        [(row.seed, row.query, row.stamp_ns) for row in rows] for rows in some.figures.values()
    ]
    assert len(stamps) == len(configurations(some.studies, some.base)) == 8
    assert all(mine == stamps[0] for mine in stamps)
    assert np.diff([stamp for _, _, stamp in stamps[0]]).tolist() == [8 * PERIOD] * (QUERIES - 1)


def test_every_first_query_is_dense_and_no_table_has_it(some, summaries):
    for rows in some.figures.values():
        assert [row.first for row in rows] == [True] + [False] * (QUERIES - 1)
        assert {row.mode for row in rows if row.first} == {'dense'}
        assert {row.action_error for row in rows if row.first} == {0.0}
    counts = {s.estimates['static_share'].count for study in summaries.values() for s in study}
    assert counts == {QUERIES - 1}


def test_dense_is_the_reference(some, summaries):
    dense = named(summaries, 'alpha')['dense']
    exactly = {
        'static_share': 1.0,
        'final_share': 1.0,
        'flops_share': 1.0,
        'kept_static': 1.0,
        'kept_final': 1.0,
        'action_error': 0.0,
        'action_error_max': 0.0,
        'decode_ratio': 1.0,
        'total_ratio': 1.0,
    }
    for name, value in exactly.items():
        found = dense.estimates[name]
        assert (found.least, found.value, found.greatest) == (value, value, value), name
    assert dense.modes == {'dense': 1.0}
    assert 0 < dense.estimates['recall'].value <= 1


def test_pruned_variants_err_and_save(some, summaries):
    for name, study in summaries.items():
        for summary in study:
            if summary.variant.name != 'dense':
                found = summary.estimates
                assert found['action_error'].least > 0, name
                assert found['action_error_max'].value > found['action_error'].value
                assert found['flops_share'].greatest < 1
                assert found['final_share'].value <= found['static_share'].value
                assert found['kept_final'].value <= found['kept_static'].value


@pytest.mark.parametrize(
    ('study', 'figure'),
    [
        ('alpha', 'static_share'),
        ('alpha', 'final_share'),
        ('alpha', 'flops_share'),
        ('alpha', 'kept_static'),
    ],
)
def test_a_smaller_alpha_keeps_less(summaries, study, figure):
    found = values(summaries[study], figure)
    assert found == sorted(found, reverse=True)
    assert len(set(found)) == len(found)


def test_techniques_add_up(summaries):
    study = named(summaries, 'techniques')
    static, both, full = (study[n] for n in ('static', 'static + dynamic', '+ controller'))
    final = 'final_share'
    assert static.estimates[final] == static.estimates['static_share']
    assert static.estimates[final].value > both.estimates[final].value
    assert set(static.modes) == set(both.modes) == {'coarse'}
    assert full.modes == {'coarse': 0.5, 'fine': 0.5}
    assert full.estimates[final].value > both.estimates[final].value  # fine mode keeps more


def test_budgets_are_named(summaries):
    study = named(summaries, 'budget')
    assert {name: summary.budgets for name, summary in study.items()} == {
        'union': ('union',),
        'fixed': ('fixed',),
    }


def test_the_same_seed_gives_the_same_figures(some, two_seeds):
    assert two_seeds.seeds == (0, 1)
    common = some.figures.keys() & two_seeds.figures.keys()
    assert len(common) == 2  # dense, and the default
    for key in common:
        first, again = some.figures[key][:3], two_seeds.figures[key][:3]
        assert [without_latency(row) for row in first] == [without_latency(row) for row in again]


def test_a_seed_draws_other_weights(two_seeds):
    rows = two_seeds.figures[two_seeds.base]
    assert [row.seed for row in rows] == [0, 0, 0, 1, 1, 1]
    assert [row.first for row in rows] == [True, False, False] * 2
    errors = [row.action_error for row in rows]
    assert errors[1:3] != errors[4:]
    assert 'random weights' in two_seeds.seed_meaning
    assert 'meaningless' in output.evidence(two_seeds)


def test_seeds_follow_the_configured_one(config, recording, two_seeds):
    task = RecordingTask(Cut(recording, 9), config.robot)
    shifted = dataclasses.replace(config, model=dataclasses.replace(config.model, seed=1))
    one = run_ablation(load(shifted), shifted, task, select(['hysteresis']), seeds=1)
    assert one.seeds == (1,)
    rows, before = one.figures[one.base], two_seeds.figures[two_seeds.base][3:5]
    assert [without_latency(row) for row in rows] == [without_latency(row) for row in before]


def test_progress_is_told(model, config, recording):
    count = itertools.count()
    short, studies = RecordingTask(Cut(recording, 9), config.robot), select(['hysteresis'])
    run_ablation(model, config, short, studies, seeds=1, tick=lambda: next(count))
    assert next(count) == ticks(short, studies, config.pruning, 1) == 2
    assert ticks(Simulator(), studies, config.pruning, 5) == 5 * 3 * Simulator.queries


def test_one_query_is_nothing_to_compare(model, config, recording):
    short = RecordingTask(Cut(recording, 3), config.robot)
    ablation = run_ablation(model, config, short, select(['hysteresis']), seeds=1)
    with pytest.raises(RecordingError, match='one query per episode'):
        summarize(ablation, STUDIES['hysteresis'])


# Tasks -----------------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def trained(config):
    """A model that claims not to be a stand-in."""
    model = load(config)
    model.info = dataclasses.replace(model.info, stand_in=False)
    return model


def test_with_a_checkpoint_a_seed_shifts_the_queries(trained, config, recording):
    task = RecordingTask(Cut(recording, 17), config.robot)
    ablation = run_ablation(trained, config, task, select(['hysteresis']), seeds=2)
    stamps = {seed: [] for seed in ablation.seeds}
    for row in ablation.figures[ablation.base]:
        stamps[row.seed].append(row.stamp_ns)
    assert ablation.seeds == (0, 1)
    assert stamps[1][0] - stamps[0][0] == PERIOD
    assert [len(mine) for mine in stamps.values()] == [3, 2]
    assert 'meaningless' not in output.evidence(ablation)
    assert 'control steps later' in output.evidence(ablation)


def test_there_are_as_many_phases_as_steps_in_a_chunk(trained, config, task):
    with pytest.raises(ConfigError, match=r'--seeds = 9: .* has only 8'):
        run_ablation(trained, config, task, select(['budget']), seeds=9)


def test_stages_of_a_replayed_query_cannot_be_compared(trained, config, task):
    graphs = dataclasses.replace(config.model, cuda_graph='on')
    with pytest.raises(ConfigError, match=r"model\.cuda_graph = 'on'"):
        run_ablation(
            trained, dataclasses.replace(config, model=graphs), task, select(['budget']), seeds=1
        )


@pytest.mark.parametrize('has_actions', [True, False])
def test_late_keeps_all_but_the_first_steps(recording, has_actions):
    source = Cut(recording, 10, has_actions)

    def steps(events: list) -> list[int]:
        if has_actions:
            return [event.stamp_ns for event in events if isinstance(event, ExecutedAction)]
        images = [event for event in events if isinstance(event, CameraEvent)]
        return [image.stamp_ns for image in images if image.camera == 'side']

    before, after = list(source.events()), list(Late(source, 3, 'side').events())
    assert len(after) == len(before) - 3
    assert steps(after) == steps(before)[3:]


def test_a_bad_observation_is_skipped_for_all(model, config, recording):
    class Broken(Cut):
        def events(self):
            for index, event in enumerate(super().events()):
                if isinstance(event, CameraEvent) and event.camera == 'side' and 30 < index < 60:
                    yield ObservationError('image_empty', 'cameras/side', 0, 'nothing in it')
                else:
                    yield event

    task = RecordingTask(Broken(recording, 20), config.robot)
    ablation = run_ablation(model, config, task, select(['hysteresis']), seeds=1)
    stamps = [[row.stamp_ns for row in rows] for rows in ablation.figures.values()]
    assert all(mine == stamps[0] for mine in stamps)
    assert ablation.outcomes[ablation.base][0]['queries'] == len(stamps[0]) == 3
    assert ablation.outcomes[ablation.base][0]['skipped'] > 0


class Simulator:
    """A closed loop: what is shown next depends on the first action."""

    name, closed_loop, queries, seeds = 'simulator', True, 4, 100
    seed_meaning = 'places the objects'

    def run(self, policy, seed):
        for episode in range(2):
            policy.reset()
            moved = 0.0
            for step in range(2):
                image_at = int(4 * abs(moved)) + step + episode
                chunk = policy.infer(
                    make_observation(image_at, ('side',), stamp_ns=step * PERIOD)
                ).chunk
                moved += float(chunk.normalized[0, 0])
                policy.observe_executed(None)
            yield {'success': float(episode == 0), 'moved': moved}


def test_a_closed_loop_runs_every_variant_alone_beside_dense(config):
    robot = from_mapping({'robot.camera_names': ('side',)}).robot
    config = dataclasses.replace(config, robot=robot)
    variants = Variant('dense', DENSE), Variant('pruned', {'alpha': 0.6})
    study = Study('small', 'how much', '', variants)
    ablation = run_ablation(load(config), config, Simulator(), [study], seeds=1)
    moved = [[end['moved'] for end in ends] for ends in ablation.outcomes.values()]
    assert moved[0] != moved[1]  # each its own actions
    dense, pruned = ablation.figures.values()
    assert {row.action_error for row in dense} == {0.0}
    assert [row.first for row in pruned] == [True, False, True, False]
    assert [row.action_error > 0 for row in pruned] == [False, True, False, True]
    summaries = summarize(ablation, study)
    assert output.outcome_text(summaries[0]).startswith('success 0.5, moved ')
    text = output.markdown(ablation, {'small': summaries})
    assert '| outcome | paper' in text
    assert 'Open loop' not in text


# What is measured ------------------------------------------------------------------------------


def report(gone, important=(), reason=(), sizes=(4, 4), recall=(), static_layer=2) -> PruneReport:
    """A report with planted masks."""
    return PruneReport(
        stamp_ns=0, chunk_id=1, epoch=1, method='specprune', budget='union', alpha=0.8, mode=1,
        mode_reason='', tokens_total=np.array(sizes, np.uint32), static_layer=static_layer,
        pruned_after_layer=np.array(gone, np.uint8), important=np.array(important, np.uint8),
        reason=np.array(reason, np.uint8), recall=np.array(recall),
    )  # fmt: skip


def test_kept_recall_of_planted_masks():
    #              camera 1      camera 2
    gone = np.array([0, 2, 9, 2, 0, 0, 2, 2])
    important = np.array([1, 1, 1, 0, 1, 0, 0, 0])
    static, final = kept_recall(report(gone), important)
    assert static == pytest.approx((2 / 3 + 1) / 2)
    assert final == pytest.approx((1 / 3 + 1) / 2)


def test_kept_recall_leaves_out_a_camera_without_important_tokens():
    important = np.array([0, 0, 0, 0, 1, 1, 0, 0])
    assert kept_recall(report([0, 0, 0, 0, 0, 2, 0, 0]), important) == (0.5, 0.5)
    assert all(map(math.isnan, kept_recall(report([0] * 8), np.zeros(8, np.uint8))))


@given(
    hnp.arrays(np.uint8, 12, elements=st.sampled_from([0, 2, 4, 6])),
    hnp.arrays(np.uint8, 12, elements=st.integers(0, 1)).filter(np.any),
    st.integers(0, 11),
)
def test_kept_recall_never_falls_when_a_token_stays_longer(gone, important, index):
    static, final = kept_recall(report(gone, sizes=(4, 8)), important)
    assert 0 <= final <= static <= 1
    more = gone.copy()
    more[index] = 0
    longer = kept_recall(report(more, sizes=(4, 8)), important)
    assert longer[0] >= static
    assert longer[1] >= final
    assert kept_recall(report(np.zeros(12), sizes=(4, 8)), important) == (1, 1)


def test_the_ruler_is_a_dense_run(model, config, recording):
    """Where it calls every patch important, kept recall is the share of patches kept."""
    pruning = dataclasses.replace(config.pruning, k_global=4096)
    config = dataclasses.replace(config, pruning=pruning)
    task = RecordingTask(Cut(recording, 17), config.robot)
    ablation = run_ablation(model, config, task, select(['global_reuse']), seeds=1)
    rows = [row for rows in ablation.figures.values() for row in rows]
    assert [row.kept_static for row in rows] == [row.static_share for row in rows]
    assert [row.kept_final for row in rows] == [row.final_share for row in rows]
    assert min(row.final_share for row in rows) < 0.5


def test_ratios_are_paired(some):
    dense, *others = some.figures.values()
    for rows in others:
        for mine, base in zip(rows, dense, strict=True):
            assert mine.decode_ratio * mine.decode_ms == pytest.approx(base.decode_ms)
            assert mine.total_ratio * mine.total_ms == pytest.approx(base.total_ms)


def test_supplemented_recall_of_planted_sets():
    before = report([0] * 5, important=[1, 1, 0, 1, 0], sizes=(5,))
    reason = [Reason.GLOBAL, Reason.LOCAL, Reason.LOCAL, Reason.DYNAMIC, Reason.FILL]
    now = report([0] * 5, important=[0, 0, 0, 0, 1], reason=reason, sizes=(5,))
    assert supplemented_recall(now, before) == 2 / 4  # W = {1, 2, 3, 4}: 1 and 3 were important
    dense = report([0] * 5, important=[0, 1, 0, 0, 0], reason=[0] * 5, sizes=(5,))
    assert math.isnan(supplemented_recall(dense, before))
    forgot = report([0] * 5, important=[0] * 5, sizes=(5,))
    assert math.isnan(supplemented_recall(now, forgot))


def test_recall_of_no_important_tokens_is_unknown():
    """Eq. 1 gives 1 for an empty set: without V_global that is no merit."""
    assert own_recall(report([0] * 8, [1, 0, 0, 0, 0, 0, 0, 0], recall=[0.4, 1.0])) == 0.4
    assert math.isnan(own_recall(report([0] * 8, [0] * 8, recall=[1.0, 1.0])))


# Statistics ------------------------------------------------------------------------------------

TABLES = hnp.arrays(
    float,
    hnp.array_shapes(min_dims=2, max_dims=2, max_side=12),
    elements=st.floats(-10, 10, allow_subnormal=False),
)


@given(TABLES, st.floats(-5, 5), st.floats(0.1, 10))
def test_the_interval_moves_and_scales_with_the_values(table, shift, scale):
    low, high = mean_interval(table)
    assert table.min() - 1e-9 <= low <= high <= table.max() + 1e-9
    moved = mean_interval(scale * table + shift)
    np.testing.assert_allclose(moved, (scale * low + shift, scale * high + shift), atol=1e-8)


def test_seeds_that_disagree_make_a_wide_interval():
    assert mean_interval(np.repeat([[0.0], [1.0]], 30, axis=1)) == (0.0, 1.0)
    assert mean_interval(np.full((3, 30), 0.25)) == (0.25, 0.25)


def test_neighbours_that_agree_make_it_wider():
    """Runs of equal values tell less than as many independent ones."""
    rng = np.random.default_rng(1)
    runs = np.repeat(rng.integers(0, 2, 16), 4)[None].astype(float)
    widths = [np.diff(mean_interval(v)) for v in (runs, rng.permuted(runs, axis=1))]
    assert widths[0] > 1.2 * widths[1]


def test_unknown_values_are_left_out():
    known = estimate(np.array([[0.2, math.nan, 0.4], [math.nan] * 3]), median=False)
    assert (known.value, known.least, known.greatest, known.count) == (
        pytest.approx(0.3), 0.2, 0.4, 2,
    )  # fmt: skip
    nothing = estimate(np.full((2, 3), math.nan), median=False)
    assert nothing.count == 0
    assert math.isnan(nothing.value)


def test_a_latency_is_a_median_with_quartiles():
    found = estimate(np.array([[1.0, 2.0, 3.0, 4.0, 90.0]]), median=True)
    assert (found.low, found.value, found.high) == (2.0, 3.0, 4.0)


def test_figures_are_laid_out_by_seed_and_query(two_seeds):
    rows = two_seeds.figures[two_seeds.base][:-1]
    table = by_query(rows, 'final_share')
    assert table.shape == (2, 3)
    assert np.isnan(table).sum() == 1
    assert table[1, 1] == rows[4].final_share


# What is written -------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def folder(some, summaries, tmp_path_factory):
    """All files of one study."""
    out = tmp_path_factory.mktemp('ablate') / 'made'
    few = dataclasses.replace(some, studies=select(['alpha']))
    out.mkdir()
    output.write_all(few, summaries, out, out / 'ablation.json')
    return out


def test_json_holds_every_variant(folder):
    def refuse(word: str):
        raise ValueError(f'{word} is not JSON')

    tree = json.loads((folder / 'ablation.json').read_text(), parse_constant=refuse)
    assert tree['model']['stand_in'] is True
    assert tree['seeds'] == {'values': [0], 'a_seed': 'draws the random weights'}
    assert [study['name'] for study in tree['studies']] == ['alpha']
    for study in tree['studies']:
        for variant in study['variants']:
            assert set(variant['estimates']) == {figure.name for figure in FIGURES}
    dense = tree['studies'][0]['variants'][0]
    assert dense['paper']['success'] == 0.966
    assert dense['paper']['latency_ms'] is None
    assert dense['estimates']['recall_supplemented']['value'] is None
    assert dense['overrides'] == {'method': 'none'}


def test_json_holds_every_seed(two_seeds):
    found = summarize(two_seeds, STUDIES['hysteresis'])
    tree = output.as_tree(two_seeds, {'hysteresis': found})
    for variant in tree['studies'][0]['variants']:
        seeds = [variant['by_seed'][seed]['action_error'] for seed in ('0', '1')]
        assert seeds[0] != seeds[1]
        assert np.mean(seeds) == pytest.approx(variant['estimates']['action_error']['value'])


def test_csv_holds_every_query(folder, some):
    with (folder / 'queries.csv').open(newline='') as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 4 * QUERIES
    mine = [row for row in rows if (row['study'], row['variant']) == ('alpha', 'alpha 0.6')]
    key = dataclasses.replace(some.base, alpha=0.6)
    assert [float(row['final_share']) for row in mine] == [
        row.final_share for row in some.figures[key]
    ]
    assert mine[0]['recall'] == ''
    assert mine[0]['first'] == 'True'


def test_markdown_has_tables_and_what_they_are_worth(folder, summaries):
    text = (folder / 'ablation.md').read_text()
    assert 'meaningless as evidence' in text
    assert 'Seeds: 0; seed s draws the random weights' in text
    assert 'SR 96.1 %, FLOPs 43.0 %, tokens 29.8 %, 1.46x |' in text
    widths = {line.count('|') for line in text.splitlines() if line.startswith('|')}
    assert widths == {len(FIGURES) + 4}
    share = named(summaries, 'alpha')['alpha 0.6'].estimates['static_share']
    half = 50 * (share.high - share.low)
    assert f'| alpha 0.6 | coarse 50, fine 50 | {100 * share.value:.1f} ±{half:.1f} |' in text
    assert '(alpha.png)' in text


def test_plots_show_something(folder):
    assert cv2.imread(str(folder / 'alpha.png')).std() > 10


@pytest.mark.parametrize('option', ['--out', '--json'])
def test_output_that_cannot_be_written_is_told_before_anything_runs(tmp_path, capsys, option):
    (tmp_path / 'file').write_text('')
    rest = {'--out': tmp_path / 'out', option: tmp_path / 'file' / 'a.json'}
    words = [str(word) for pair in rest.items() for word in pair]
    assert main(['ablate', str(OWN_BAG), '--study', 'budget', *words]) == 2
    assert f'specprune ablate: {option} = ' in capsys.readouterr().err


@pytest.mark.slow
def test_the_command_runs_a_whole_recording(tmp_path, capsys):
    out, as_json = tmp_path / 'out', tmp_path / 'all.json'
    assert main(['ablate', str(OWN_BAG), '--study', 'budget', 'hysteresis', '--seeds', '1',
                 '--out', str(out), '--json', str(as_json),
                 '--set', 'robot.camera_names=[wrist, side]']) == 0  # fmt: skip
    tree = json.loads(as_json.read_text())
    assert tree['model']['cameras'] == ['wrist', 'side']
    budget = tree['studies'][0]['variants'][1]
    assert budget['estimates']['static_share']['count'] == math.ceil(155 / 8) - 1
    assert {path.name for path in out.iterdir()} == {
        'ablation.md', 'queries.csv', 'budget.png', 'hysteresis.png',
    }  # fmt: skip
    printed = capsys.readouterr().out
    assert 'STAND-IN WEIGHTS' in printed
    assert 'budget: size of the retained set' in printed
