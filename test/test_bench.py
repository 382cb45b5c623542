"""`specprune bench`: what its rows mean, and that every figure is one of the same run."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import make_policy
from torch.utils.flop_counter import FlopCounterMode

from specprune_ros.bench import latency
from specprune_ros.bench.ceilings import Ceilings, floors_s, measure_ceilings, rows_per_layer
from specprune_ros.bench.latency import LAPS, Sample, breakdown, measure, rows_of
from specprune_ros.bench.launches import launches_of, launches_table
from specprune_ros.bench.plots import plot_rows, plot_work
from specprune_ros.bench.variants import Variant, make_lineup, with_cameras
from specprune_ros.bench.work import points_of, variants_at, work_table
from specprune_ros.cli import main
from specprune_ros.config_files import load_config
from specprune_ros.errors import ConfigError
from specprune_ros.models.tiny import SIZES
from specprune_ros.pruning import METHODS
from specprune_ros.pruning.base import PruneMethod, PruneRun
from specprune_ros.types import Mode

FORMS = ('sdpa', 'fused', 'graph')
ONE = Ceilings(matmul_flops=1.0, memory_bytes=math.inf, upload_bytes=math.inf)


@pytest.fixture(scope='module')
def config():
    return load_config(['models/tiny'], {'runtime.warm_up_queries': 0})


@pytest.fixture(scope='module')
def lineup(config):
    return make_lineup(config, 1, ['specprune'], FORMS)


@pytest.fixture(scope='module')
def result(lineup):
    return latency.run(lineup, repeats=2)


# What is compared -----------------------------------------------------------------------------


def test_every_form_runs_dense_and_pruned_with_both_budgets_over_one_model(lineup):
    found = [(variant.method, variant.label) for variant in lineup.variants]
    assert found[0] == ('none', 'sdpa')
    assert sorted(found) == sorted(
        [('none', form) for form in ('sdpa', 'fused')]
        + [
            ('specprune', f'{form} {budget}')
            for form in ('sdpa', 'fused')
            for budget in ('union', 'fixed')
        ]
    )
    assert len({id(variant.policy.model) for variant in lineup.variants}) == 1
    memory = set()
    for variant in lineup.variants:
        block = variant.policy.decoder.blocks[0]
        weight = (
            block.gate_up.weight if variant.form == 'fused' else block.layer.mlp.up_proj.weight
        )
        memory.add(weight.untyped_storage().data_ptr())
    assert len(memory) == 1, 'no form holds its own copy'


@pytest.mark.skipif(torch.cuda.is_available(), reason='there it runs')
def test_a_form_that_the_machine_lacks_is_left_out_and_says_why(lineup):
    assert list(lineup.skipped) == ['graph']
    assert 'CUDA' in lineup.skipped['graph']


def test_the_baseline_is_there_though_not_asked_for(config):
    found = make_lineup(config, 1, ['none'], ['fused']).variants
    assert [(variant.method, variant.label) for variant in found] == [
        ('none', 'sdpa'),
        ('none', 'fused'),
    ]


@pytest.mark.parametrize(
    ('methods', 'forms', 'word'), [(['no'], ['sdpa'], 'method'), (['none'], ['no'], 'forms')]
)
def test_unknown_names_are_refused_before_anything_is_loaded(config, methods, forms, word):
    with pytest.raises(ConfigError, match=word):
        make_lineup(config, 1, methods, forms)


def test_a_method_without_budgets_runs_once_per_form(config, monkeypatch):
    class Plain(PruneMethod):
        name = 'plain'

        def begin(self, context):
            return PruneRun(context)

    monkeypatch.setitem(METHODS, 'plain', Plain)
    found = make_lineup(config, 1, ['plain'], ['sdpa', 'fused']).variants
    assert [variant.label for variant in found if variant.method == 'plain'] == ['sdpa', 'fused']


# Figures --------------------------------------------------------------------------------------


def test_both_modes_are_measured_alike_and_the_dense_first_query_not(result):
    for samples in result.samples:
        modes = {sample.report.mode for sample in samples}
        dense = samples[0].report.method == 'none'
        assert modes == ({Mode.DENSE} if dense else {Mode.FINE, Mode.COARSE})


def test_rows_tell_every_stage_once_with_ratios_to_dense_sdpa(result):
    rows = rows_of(result)
    stages = {'preprocess', 'vision', 'projector', 'decoder', 'head', 'total'}
    for variant in result.lineup.variants:
        mine = [r for r in rows if (r.method, r.form) == (variant.method, variant.label)]
        pruned = set() if variant.method == 'none' else {'scores', 'selection'}
        assert sorted(row.stage for row in mine) == sorted(stages | pruned)
        for row in mine:
            assert row.p95_ms >= row.median_ms > 0
            assert row.ratio_low <= row.ratio_to_dense_sdpa <= row.ratio_high
            assert (row.ratio_high == 0) == (row.stage in ('scores', 'selection'))
    baseline = [row for row in rows if (row.method, row.form) == ('none', 'sdpa')]
    assert all(row.ratio_low == row.ratio_high == 1.0 for row in baseline)


def test_stages_that_add_up_make_the_total_or_little_less(result):
    for samples in result.samples:
        for sample in samples:
            added = sum(
                sample.seconds(stage) for stage in LAPS if stage not in ('scores', 'selection')
            )
            assert added == pytest.approx(sum(sample.laps_s.values()))
            assert added <= sample.seconds('total')


def sample_of(report, decode: float, graph: float = 0.0) -> Sample:
    laps = dict.fromkeys([lap for laps in LAPS.values() for lap in laps], 0.001)
    laps.update(decode=decode, score=0.0, select=0.0, gather=0.0, graph=graph)
    return Sample(dataclasses.replace(report, latency_total_s=decode + 1), laps, 0.0)


def test_ratios_are_of_paired_queries_and_flops_of_the_same_form(result):
    """Dense 4 and 8 s, this 1 and 4 s: ratios 4 and 2; with half the FLOPs, 0.5 and 1 of them."""
    reports = [samples[0].report for samples in result.samples]
    half = [dataclasses.replace(report, flops_share=0.5) for report in reports]
    samples = [
        [sample_of(report, *pair) for pair in (((4.0,), (8.0,)) if dense else ((1.0,), (4.0,)))]
        for report, dense in zip(
            half, [v.method == 'none' for v in result.lineup.variants], strict=True
        )
    ]
    rows = rows_of(dataclasses.replace(result, samples=samples))
    for row in (row for row in rows if row.stage == 'decoder' and row.method == 'specprune'):
        assert row.ratio_to_dense_sdpa == pytest.approx(3.0)
        assert row.median_ms == pytest.approx(2500)
        assert row.against_flops == pytest.approx((1 / 2 + 4 / 4) / 2)
    assert all(row.against_flops is None for row in rows if row.method == 'none')


def test_a_recorded_query_s_one_piece_is_held_against_all_that_it_replaces(result):
    report = result.samples[0][0].report
    dense = sample_of(report, decode=2.0)
    replaced = sum(dense.seconds(stage) for stage in ('vision', 'projector', 'decoder'))
    assert dense.dense_seconds('graph') == pytest.approx(replaced)
    assert sample_of(report, 0.0, graph=0.5).seconds('graph') == 0.5


def test_a_pruned_query_beside_a_dense_one_that_is_replayed_has_no_time_per_flop(result):
    """As when a method's queries cannot be recorded, and dense ones can."""
    samples = [
        [sample_of(mine[0].report, *((0.0, 2.0) if v.method == 'none' and index else (1.0,)))]
        for index, (v, mine) in enumerate(zip(result.lineup.variants, result.samples, strict=True))
    ]
    rows = rows_of(dataclasses.replace(result, samples=samples))
    decoders = [row for row in rows if row.method == 'specprune' and row.stage == 'decoder']
    known = {row.form.split()[0]: row.against_flops is not None for row in decoders}
    assert known == {'sdpa': True, 'fused': False}


def test_what_pruning_adds_is_told_of_every_pruned_variant_and_adds_up(result):
    parts = breakdown(result)
    variants = {(part.method, part.form) for part in parts}
    assert variants == {
        (v.method, v.label) for v in result.lineup.variants if v.method == 'specprune'
    }
    names = {part.name for part in parts}
    assert {'reference frame', 'similarity', 'score', 'gather', 'controller', 'all'} <= names


# Floors ---------------------------------------------------------------------------------------


def test_ceilings_are_measured_and_no_query_beats_its_floor(result):
    ceilings = result.ceilings
    assert min(ceilings.matmul_flops, ceilings.memory_bytes, ceilings.upload_bytes) > 1e6
    for row in rows_of(result):
        if row.stage in ('total', 'vision', 'decoder'):
            assert 0 < row.floor_ms < row.median_ms
            assert row.time_to_floor == pytest.approx(row.median_ms / row.floor_ms)


def test_a_floor_is_the_flops_over_the_rate_or_the_bytes_over_the_bandwidth():
    ceilings = Ceilings(matmul_flops=10.0, memory_bytes=5.0, upload_bytes=1.0)
    assert ceilings.seconds(100, 5) == 10
    assert ceilings.seconds(100, 500) == 100
    assert ceilings.best_of(ONE) == Ceilings(10.0, math.inf, math.inf)


def test_the_decoder_s_floor_counts_the_rows_that_each_layer_had(lineup):
    """At one FLOP/s and with free memory the floor is the FLOPs, by hand."""
    variant = next(v for v in lineup.variants if v.label == 'fused fixed')
    (samples,) = measure([variant], 1)
    report = samples[0].report
    rows = rows_per_layer(report, 12)
    assert rows[0] == rows[1] == report.sequence_tokens
    assert rows[2] == report.sequence_tokens - 256 + report.tokens_static.sum()
    assert rows[-1] == report.sequence_tokens - 256 + report.tokens_kept.sum()
    width, mlp = 64, 176
    expected = sum(2 * r * (4 * width**2 + 3 * width * mlp) + 4 * r**2 * width for r in rows)
    floors = floors_s(variant, [report], ONE)
    assert floors['decoder'] == pytest.approx(expected)
    assert floors['total'] == pytest.approx(
        sum(floors[name] for name in ('preprocess', 'vision', 'projector', 'decoder', 'head'))
    )
    dense = dataclasses.replace(
        report, layer_index=report.layer_index[:0], layer_tokens=report.layer_tokens[:0]
    )
    assert floors_s(variant, [dense], ONE)['decoder'] > floors['decoder']


def test_vision_flops_are_those_of_the_blocks_that_run(lineup):
    """Against torch's own counter, whose attention on a CPU counts for nothing."""
    variant = lineup.variants[0]
    backbone = variant.policy.model.parts.vision_backbone
    images = torch.zeros(1, 224, 224, 3, dtype=torch.uint8)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        backbone(images)
    attention = sum(
        (tower.config.depth - 1) * 4 * tokens**2 * tower.config.width
        for tower, tokens in ((backbone.featurizer, 261), (backbone.fused_featurizer, 256))
    )
    report = variant.policy.infer(latency.scene(('wrist',), 0, 0)).report
    expected = counter.get_total_flops() + attention
    assert floors_s(variant, [report], ONE)['vision'] == pytest.approx(expected, rel=1e-6)


def test_a_model_with_a_course_of_its_own_has_no_floor(lineup):
    variant = lineup.variants[0]
    model = variant.policy.model
    variant = Variant('none', 'sdpa', '', make_policy(runtime__warm_up_queries=0))
    other = object.__new__(type(model))
    other.__dict__.update(model.__dict__)
    other.decoder = dataclasses.replace(model.decoder, causal=True)
    variant.policy.model = other
    assert floors_s(variant, [], ONE) == {}


def test_ceilings_are_of_the_model_s_number_format():
    policy = make_policy(runtime__warm_up_queries=0, model__dtype='bfloat16')
    assert measure_ceilings(Variant('none', 'fused', '', policy), 8).matmul_flops > 0


# Cost against work ----------------------------------------------------------------------------


def test_time_against_work_has_the_patches_and_alphas_asked_for(config, tmp_path):
    points = points_of(variants_at(with_cameras(config, 1), 64, (0.4, 1.0), 'fused'), repeats=2)
    assert [point.alpha for point in points] == [None, 0.4, 1.0]
    for point in points:
        assert (point.cameras, point.patches, point.tokens) == (1, 64, 64)
        assert min(point.decoder_ms, point.total_ms, point.total_ratio) > 0
    dense, least, most = points
    assert dense.kept_final == dense.flops_share == dense.total_ratio == 1.0
    assert least.kept_final < most.kept_final < 1
    assert least.flops_share < most.flops_share < 1
    assert len(work_table(points).splitlines()) == 1 + len(points)
    plot_work(points, 'title', tmp_path / 'work.png')
    assert (tmp_path / 'work.png').stat().st_size > 1000


def test_a_stand_in_of_another_grid_is_the_same_but_for_its_images():
    sizes = SIZES['shrunk_7b'].with_grid(12)
    assert sizes.dino.patches == sizes.siglip.patches == 144
    assert sizes.dino.registers == SIZES['shrunk_7b'].dino.registers
    assert sizes.llama == SIZES['shrunk_7b'].llama


def test_the_published_shape_is_refused_on_a_cpu_before_memory_is_taken():
    config = load_config(['models/random_7b'], {'model.device': 'cpu'})
    with pytest.raises(ConfigError, match='GPU'):
        make_lineup(config, 1, ['none'], ['sdpa'])


# The command ----------------------------------------------------------------------------------

FIELDS = {
    'method', 'form', 'cameras', 'stage', 'median_ms', 'p95_ms', 'ratio_to_dense_sdpa',
    'hardware', 'torch',
}  # fmt: skip


def test_the_command_writes_rows_tables_and_a_picture(tmp_path, capsys):
    files = {name: tmp_path / f'rows.{name}' for name in ('json', 'csv', 'png')}
    code = main(
        ['bench', '--cameras', '1', '--repeats', '1', '--forms', 'graph',
         '--json', str(files['json']), '--csv', str(files['csv']), '--plot', str(files['png'])]
    )  # fmt: skip
    printed = capsys.readouterr().out
    assert code == 0
    rows = json.loads(files['json'].read_text())
    assert all(rows[0].keys() >= FIELDS and row.keys() == rows[0].keys() for row in rows)
    with files['csv'].open(newline='') as file:
        assert [row['stage'] for row in csv.DictReader(file)] == [row['stage'] for row in rows]
    assert files['png'].stat().st_size > 1000
    if not torch.cuda.is_available():
        assert 'form graph: skipped' in printed


def test_the_work_command_refuses_what_it_cannot_do(capsys):
    for options, word in (
        (['--forms', 'sdpa', 'fused'], '--forms'),
        (['--patches', '65'], 'square'),
        (['--set', 'model.name=openvla_oft'], 'tiny'),
    ):
        assert main(['bench', '--work', *options]) == 2
        assert word in capsys.readouterr().err


@pytest.mark.parametrize(
    ('options', 'refused'),
    [
        (['--preprocessing', 'bag', '--json', 'rows.json'], '--json'),
        (['--preprocessing', 'bag', '--repeats', '3'], '--repeats'),
        (['--preprocessing', 'bag', '--work'], '--work'),
        (['--work', '--breakdown'], '--breakdown'),
        (['--patches', '64'], '--patches'),
    ],
)
def test_options_that_would_say_nothing_are_refused(capsys, options, refused):
    assert main(['bench', *options]) == 2
    assert f'{refused} = ' in capsys.readouterr().err


def test_a_picture_without_matplotlib_is_refused_before_the_measurement(
    monkeypatch, capsys, tmp_path
):
    for name in ('matplotlib', 'matplotlib.figure'):
        monkeypatch.setitem(sys.modules, name, None)
    assert main(['bench', '--plot', str(tmp_path / 'rows.png')]) == 2
    assert 'pip install matplotlib' in capsys.readouterr().err


def test_rows_are_drawn(result, tmp_path):
    plot_rows(rows_of(result), 'title', tmp_path / 'rows.png')
    assert (tmp_path / 'rows.png').stat().st_size > 1000


def test_a_profile_counts_what_the_host_dispatches(lineup):
    found = launches_of(next(v for v in lineup.variants if v.label == 'fused union'))
    assert found.operators > 500
    assert found.host_reads > 0, "the union's size depends on the data"
    assert found.kernels == found.graphs == 0 or torch.cuda.is_available()
    assert f'{found.operators:.0f}' in launches_table([found])


def test_int8_is_asked_for_by_name_and_tells_what_it_does_to_the_actions(config):
    pytest.importorskip('torchao')
    result = latency.run(make_lineup(config, 1, ['none'], ['int8']), repeats=1)
    row = rows_of(result)[-1]
    assert row.form == 'int8'
    assert 0 < row.action_error_mean < row.action_error_max < 0.3


def test_form_errors_are_measured_along_both_modes(lineup):
    variant = next(v for v in lineup.variants if v.label == 'fused fixed')
    error = latency.error_of(variant)
    assert (error.mean, error.largest) == (0.0, 0.0)
    assert error.queries == latency.COMPARED_QUERIES


def test_missing_torchao_skips_int8_with_the_command(config, monkeypatch):
    for name in ('torchao', 'torchao.quantization'):
        monkeypatch.setitem(sys.modules, name, None)
    found = make_lineup(config, 1, ['none'], ['int8'])
    assert 'pip install torchao' in found.skipped['int8']


# The GPU's targets ----------------------------------------------------------------------------


def gpu_row(method: str, form: str, median_ms: float, **more) -> dict:
    return {'method': method, 'form': form, 'stage': 'total', 'median_ms': median_ms, **more}


def test_a_gpu_s_rows_are_held_against_the_targets(tmp_path):
    """Met with 40 and 20 ms dense; missed where a form was skipped; without rows: no success."""
    script = Path(__file__).parents[1] / 'scripts/gpu_targets.py'
    pruned = gpu_row('specprune', 'graph fixed', 10.0, time_to_floor=1.5, action_error_max=0.0)
    dense = [gpu_row('none', 'eager', 40.0), gpu_row('none', 'graph', 20.0)]
    for rows, code, missed in (
        ([*dense, pruned], 0, 0),
        ([dense[0], pruned], 1, 1),
        ([*dense, {**pruned, 'median_ms': 16.0}], 1, 2),
        (None, 1, 0),
    ):
        path = tmp_path / 'rows.json'
        path.write_text('' if rows is None else json.dumps(rows))
        done = subprocess.run(
            [sys.executable, script, path], capture_output=True, text=True, timeout=30
        )
        assert done.returncode == code, done.stderr
        assert done.stdout.count('MISSED') == missed
