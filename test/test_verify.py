"""`specprune verify` and `specprune info` on checkpoint folders."""

from __future__ import annotations

import argparse
import json
import shlex
import shutil

import numpy as np
import pytest
import torch
from openvla_world import FOLDER, HEAD, MODEL, PROPRIO, assemble, inputs, outputs
from safetensors.torch import load_file, save_file
from test_tokenizer import llama_json

from specprune_ros.cli import COMMANDS, main
from specprune_ros.cli.info import counted
from specprune_ros.config_files import load_config
from specprune_ros.errors import ConfigError
from specprune_ros.shipped import find_checkpoint
from specprune_ros.verify import StoredPrompt, for_reference, tensor_error, without_tf32

FILM = 'film/vision_backbone--150000_checkpoint.pt'
DIFFUSION = (
    f'diffusion/{HEAD}',
    'diffusion/noisy_action_projector--150000_checkpoint.pt',
    PROPRIO,
)
ALOHA = (
    'aloha/action_head.safetensors',
    'aloha/proprio_projector.safetensors',
    'aloha/dataset_statistics.json',
    FILM,
)
NO_PROPRIO, ONE_CAMERA, THREE_CAMERAS = (
    ('--set', value)
    for value in (
        "robot.joint_names=['']",
        'robot.camera_names=[a]',
        'robot.camera_names=[a, b, c]',
    )
)
golden = pytest.mark.golden


@pytest.fixture
def make(tmp_path):
    """Assembles a folder, with a tokenizer."""

    def assembled(*files, name='folder'):
        for file in files:
            if not (FOLDER / file).exists():
                pytest.skip(f'reference vectors lack {file}')
        folder = assemble(tmp_path / name, *files)
        (folder / 'tokenizer.json').write_text(json.dumps(llama_json()))
        return folder

    return assembled


def dataset() -> str:
    """The one whose statistics the reference folder holds."""
    return str(inputs()['unnorm_key'])


def change_json(path, **changes) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


# verify: what is compared --------------------------------------------------------------------


def verify(folder, golden, *arguments) -> int:
    return main(['verify', str(folder), '--golden', str(golden), *arguments])


def compared(text: str) -> set[str]:
    """Names in the table."""
    lines = text.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith('tensor'))
    end = next(i for i, line in enumerate(lines) if line.startswith('passed over'))
    return {line.split()[0] for line in lines[start + 1 : end]}


@golden
@pytest.mark.parametrize(
    ('files', 'part', 'arguments', 'names', 'not_these'),
    [
        ((HEAD, PROPRIO), '', (), {'actions', 'position_layout'}, {'discrete_actions'}),
        (
            (PROPRIO,), '', (),
            {'discrete_actions', 'discrete_token_ids', 'final_norm_hidden'}, {'actions'},
        ),
        ((HEAD,), '', NO_PROPRIO, {'noproprio_actions', 'projected_patches'}, {'actions'}),
        ((HEAD, PROPRIO), '', ONE_CAMERA, {'oneimage_actions', 'vit_dino_view0'}, {'actions'}),
        ((HEAD, PROPRIO), '', THREE_CAMERAS, {'threeimage_hflip_actions'}, {'actions'}),
        ((HEAD, PROPRIO, FILM), 'film', (), {'projected_patches', 'actions'}, set()),
        (DIFFUSION, 'diffusion', (), {'noise_pred_per_step', 'alphas_cumprod', 'actions'}, set()),
        (
            ALOHA, 'aloha', ('--params', 'robots/aloha', '--params', 'models/openvla_oft'),
            {'normalized_actions', 'actions', 'action_hidden_states'}, set(),
        ),
    ],
    ids=['l1', 'discrete', 'noproprio', 'oneimage', 'threeimage', 'film', 'diffusion', 'aloha'],
)  # fmt: skip
def test_verify_compares_what_applies(make, capsys, files, part, arguments, names, not_these):
    assert verify(make(*files), FOLDER / part, *arguments) == 0
    out = capsys.readouterr().out
    if part == 'diffusion':
        names = names | {name for name in outputs(part) if name.startswith('time_embedding')}
    assert names <= compared(out)
    assert not not_these & compared(out)
    passed_over = next(line for line in out.splitlines() if line.startswith('passed over'))
    assert all(name in passed_over for name in not_these)


@golden
def test_verify_finds_a_changed_weight(make, capsys):
    folder = make(HEAD, PROPRIO)
    weights = load_file(folder / MODEL)
    weights['projector.fc1.weight'][0] += 1
    (folder / MODEL).unlink()
    save_file(weights, folder / MODEL)
    assert verify(folder, FOLDER) == 1
    lines = capsys.readouterr().out.splitlines()
    assert 'OFF' in next(line for line in lines if line.startswith('projected_patches'))
    assert 'OFF' not in next(line for line in lines if line.startswith('vit_dino_view0'))


@golden
@pytest.mark.parametrize(
    ('files', 'part', 'arguments', 'told'),
    [
        (DIFFUSION, '', (), 'needs vectors with noise'),
        ((HEAD, PROPRIO), 'diffusion', (), 'those of a diffusion head'),
        ((HEAD,), '', (*NO_PROPRIO, *ONE_CAMERA), 'noproprio, oneimage'),
        ((HEAD, PROPRIO), '', ('--set', 'robot.camera_names=[a, b, c, d]'), 'camera_names'),
        ((HEAD,), 'film', NO_PROPRIO, 'noproprio_'),
    ],
)
def test_verify_refuses_vectors_of_another_model(make, capsys, files, part, arguments, told):
    if part and not (FOLDER / part).exists():
        pytest.skip(f'reference vectors lack {part}')
    assert verify(make(*files), FOLDER / part, *arguments) == 2
    assert told in capsys.readouterr().err


@golden
@pytest.mark.parametrize('horizon', [5, 20])
def test_verify_with_another_horizon_tells_the_shapes(make, capsys, horizon):
    assert verify(make(HEAD, PROPRIO), FOLDER, '--set', f'robot.horizon={horizon}') == 1
    lines = capsys.readouterr().out.splitlines()
    actions = next(line for line in lines if line.startswith('actions '))
    assert f'({horizon}, 7)' in actions
    assert '(8, 7)' in actions
    assert 'inf' in next(line for line in lines if line.startswith('llm_input_embeds'))


def vectors(folder, changes=None, **arrays):
    """A folder of vectors: the golden inputs, changed, and these outputs."""
    folder.mkdir()
    np.savez(folder / 'inputs.npz', **{**inputs(), **(changes or {})})
    np.savez(folder / 'outputs.npz', **arrays)
    return folder


@golden
@pytest.mark.parametrize('rows', [100_000, 10], ids=['out of range', 'too few'])
def test_verify_with_rows_of_another_sequence(make, tmp_path, capsys, rows):
    golden = vectors(
        tmp_path / 'golden',
        hidden_rows_index=np.array([0, rows]),
        hidden_after_layer_00=outputs()['hidden_after_layer_00'],
    )
    assert verify(make(HEAD, PROPRIO), golden) == 1
    assert 'inf' in capsys.readouterr().out


@golden
def test_verify_fails_when_nothing_is_compared(make, tmp_path, capsys):
    golden = vectors(tmp_path / 'golden', foo=np.zeros(3), actions=np.array(['text']))
    assert verify(make(HEAD, PROPRIO), golden) == 2
    error = capsys.readouterr().err
    assert 'foo' in error
    assert 'actions' in error


@golden
@pytest.mark.parametrize(
    ('changes', 'told'),
    [
        ({'input_ids': np.arange(12)}, 'input_ids'),
        ({'input_ids': np.full(30, 10**6)}, 'input_ids'),
        ({'images_uint8': np.zeros((2, 224, 224, 3))}, 'images_uint8'),
        ({'proprio_raw': np.zeros(3)}, 'proprio_raw'),
    ],
)
def test_verify_names_a_bad_input(make, tmp_path, capsys, changes, told):
    golden = vectors(tmp_path / 'golden', changes, actions=np.zeros((8, 7)))
    assert verify(make(HEAD, PROPRIO), golden) == 2
    assert told in capsys.readouterr().err


@pytest.mark.parametrize('content', [None, b'', b'PK\x03\x04 broken', b'text'])
def test_verify_without_vectors(tmp_path, capsys, content):
    if content is not None:
        (tmp_path / 'inputs.npz').write_bytes(content)
    assert verify(tmp_path, tmp_path) == 2
    assert 'inputs.npz' in capsys.readouterr().err


def test_stored_prompt_ends_in_one_space_piece_however_it_is_stored():
    without = list(range(1, 21))
    for stored in (without, [*without, 29871]):
        prompt = StoredPrompt(np.array(stored)).prompt('')
        assert prompt.ids == (*without, 29871)
        assert (prompt.instruction.start, prompt.instruction.stop) == (10, 16)


@pytest.mark.parametrize('count', [0, 1, 14])
def test_a_stored_prompt_without_an_instruction_is_refused(count):
    with pytest.raises(ConfigError, match=f'input_ids.*{count} tokens'):
        StoredPrompt(np.arange(count))


def test_nan_is_infinitely_far():
    assert not tensor_error('x', np.array([np.nan]), np.array([0.0])).within


def test_float32_unless_asked_otherwise():
    config = load_config(['models/openvla_oft', 'robots/aloha'])
    ready = for_reference(config, {'timesteps': np.arange(7)}, set())
    assert ready.model.dtype == 'float32'
    assert ready.model.diffusion_steps == 7
    assert ready.robot.source_size == 0
    given = {'model.dtype', 'robot.source_size'}
    assert for_reference(config, {}, given) == config


def test_tf32_is_off_while_it_runs():
    switches = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [switch.allow_tf32 for switch in switches]
    assert any(before), 'else there is nothing to switch off'
    with without_tf32():
        assert not any(switch.allow_tf32 for switch in switches)
    assert [switch.allow_tf32 for switch in switches] == before


# info ----------------------------------------------------------------------------------------


def info(folder, capsys) -> tuple[int, str]:
    code = main(['info', str(folder)])
    return code, capsys.readouterr().out


def launches(out: str) -> list[str]:
    return [line for line in out.splitlines() if line.startswith('launch:')]


@golden
def test_info(make, capsys):
    folder = make(HEAD, PROPRIO)
    code, out = info(folder, capsys)
    assert code == 0
    for told in ('L1', '7 action elements', '8 elements', dataset(), 'nothing',
                 f'checkpoint:={folder}'):  # fmt: skip
        assert told in out
    assert launches(out)[0].endswith('robot:=libero_franka')
    (folder / 'tokenizer.json').unlink()
    code, out = info(folder, capsys)
    assert code == 1
    assert out.count('tokenizer.json') == 1


@golden
def test_info_of_a_broken_folder_goes_on(make, capsys):
    folder = make(f'diffusion/{HEAD}', PROPRIO)
    (folder / 'dataset_statistics.json').write_text('{')
    code, out = info(folder, capsys)
    assert code == 1
    for told in ('dataset_statistics.json', 'diffusion'):
        assert told in out


@golden
def test_info_of_a_diffusion_head_without_its_projector(make, capsys):
    code, out = info(make(f'diffusion/{HEAD}', PROPRIO), capsys)
    assert code == 1
    assert 'noisy_action_projector' in out


def other_depth(folder):
    text = json.loads((folder / 'config.json').read_text())['text_config']
    depth = text['num_hidden_layers']
    change_json(folder / 'config.json', text_config={**text, 'num_hidden_layers': depth + 3})
    return f'language_model.model.layers.{depth}'


def empty_tokenizer(folder):
    (folder / 'tokenizer.json').write_text('{}')
    return 'tokenizer.json'


def second_head(folder):
    shutil.copy(FOLDER / HEAD, folder / 'action_head--9_checkpoint.pt')
    return 'action_head--9_checkpoint.pt'


def statistics_of_another_robot(folder):
    path = folder / 'dataset_statistics.json'
    statistics = json.loads(path.read_text())
    statistics[dataset()]['action']['q99'] = [1.0] * 14
    path.write_text(json.dumps(statistics))
    return dataset()


@golden
@pytest.mark.parametrize(
    'fault', [other_depth, empty_tokenizer, second_head, statistics_of_another_robot]
)
def test_info_finds_what_loading_would_refuse(make, capsys, fault):
    folder = make(HEAD, PROPRIO)
    told = fault(folder)
    code, out = info(folder, capsys)
    assert code == 1
    assert told in out.partition('missing/broken:')[2]


@golden
def test_info_offers_no_robot_file_that_does_not_fit(make, capsys):
    code, out = info(make(HEAD), capsys)
    assert code == 0
    assert launches(out)[0].endswith('robot:=/path/to/my_robot.yaml')
    assert "a copy of libero_franka with robot.joint_names: ['']" in out


@golden
def test_info_of_an_unknown_dataset_lists_what_the_robot_needs(make, capsys):
    folder = make(HEAD, PROPRIO)
    path = folder / 'dataset_statistics.json'
    path.write_text(json.dumps({'mine': next(iter(json.loads(path.read_text()).values()))}))
    code, out = info(folder, capsys)
    assert code == 0
    assert 'needs robot.joint_names: 8 names, robot.action_names: 7 names' in out


@golden
def test_info_takes_the_robot_of_the_dataset_that_it_names(make, capsys):
    folder = make(HEAD, PROPRIO)
    path = folder / 'dataset_statistics.json'
    statistics = json.loads(path.read_text())
    only = next(iter(statistics.values()))
    path.write_text(json.dumps({**statistics, 'bridge_orig': only}))
    launch = launches(info(folder, capsys)[1])[0]
    assert launch.endswith(f'robot:=libero_franka unnorm_key:={dataset()}')


@golden
def test_info_of_a_plain_folder_offers_one_camera(make, capsys):
    plain, parallel = launches(info(make(), capsys)[1])
    assert 'model:=openvla ' in plain
    assert plain.endswith('robot:=libero_franka_1cam')
    assert 'model:=openvla_oft ' in parallel
    assert parallel.endswith('my_robot.yaml')


@golden
def test_a_proprio_projector_means_openvla_oft(make, capsys):
    _, out = info(make(PROPRIO), capsys)
    assert 'plain OpenVLA' not in out
    assert 'model:=openvla_oft ' in launches(out)[0]
    assert len(launches(out)) == 1


@golden
@pytest.mark.parametrize(
    ('files', 'robot'), [(ALOHA, 'robot:=aloha'), (DIFFUSION, 'robot:=libero_franka')]
)
def test_info_of_other_kinds(make, capsys, files, robot):
    code, out = info(make(*files), capsys)
    assert code == 0
    assert launches(out)[0].endswith(robot)


@golden
def test_info_of_a_broken_folder_says_that_launching_must_wait(make, capsys):
    folder = make(HEAD, PROPRIO)
    empty_tokenizer(folder)
    code, out = info(folder, capsys)
    assert code == 1
    problems, waits, launch = out.partition('launch once the above is fixed:')
    assert not launches(problems)
    assert 'tokenizer.json' in problems
    assert waits
    assert launch.split()[:5] == ['launch:', 'ros2', 'launch', 'specprune_ros', 'vla.launch.py']


@golden
def test_info_of_a_folder_that_fits_nothing_says_so(make, capsys):
    folder = make(HEAD)
    shutil.copy(FOLDER / HEAD, folder / 'action_head--9_checkpoint.pt')
    code, out = info(folder, capsys)
    assert code == 1
    assert 'launch once the above is fixed: how, can only be told then' in out


def test_info_of_a_folder_with_its_own_parameters_takes_them(capsys):
    code, out = info('shipped/libero_small', capsys)
    assert code == 0
    assert 'wrist, side, overhead, 112 x 112 (params.yaml)' in out
    assert '8 steps (params.yaml)' in out
    (launch,) = launches(out)
    folder = find_checkpoint('shipped/libero_small').resolve()
    assert launch.split()[-2:] == ['vla.launch.py', f'checkpoint:={folder}']


@golden
def test_info_of_a_folder_with_broken_parameters_says_so(make, capsys):
    folder = make(HEAD)
    text = '/**:\n  ros__parameters:\n    robot: {horizon: -1}\n'
    (folder / 'params.yaml').write_text(text)
    code, out = info(folder, capsys)
    assert code == 1
    assert 'robot.horizon = -1' in out


@golden
def test_info_passes_over_a_file_of_that_name_that_is_somebody_elses(make, capsys):
    folder = make(HEAD)
    before = info(folder, capsys)
    (folder / 'params.yaml').write_text('learning_rate: 0.1\n')
    assert info(folder, capsys) == before


@golden
def test_info_counts_parameters_to_the_last_one(make, capsys):
    folder = make(HEAD, PROPRIO)
    weights = load_file(folder / MODEL)
    least = sum(weight.numel() for weight in weights.values())
    size = next(line for line in info(folder, capsys)[1].splitlines() if line.startswith('size:'))
    assert int(size.partition('(')[2].partition(')')[0].replace(',', '')) >= least


@pytest.mark.parametrize(
    ('count', 'words'),
    [
        (7_541_237_184, '7.541 B (7,541,237,184)'),
        (999_999_999, '1000 M (999,999,999)'),
        (1_234_567, '1.235 M (1,234,567)'),
        (20_000, '0.02 M (20,000)'),
    ],
)
def test_a_count_is_round_and_exact(count, words):
    assert counted(count) == words


# Help ----------------------------------------------------------------------------------------


def command(name: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f'specprune {name}')
    COMMANDS[name].add_arguments(parser)
    return parser


@pytest.mark.parametrize('name', ['verify', 'info', 'bench', 'calibrate'])
def test_help_has_an_example_that_the_command_takes(name):
    parser = command(name)
    lines = parser.format_help().replace('\\\n', '').splitlines()
    examples = [line for line in lines if line.startswith(f'  specprune {name} ')]
    assert examples
    for line in examples:
        parser.parse_args(shlex.split(line)[2:])


def test_the_example_of_verify_is_of_a_folder_within():
    assert '/film\n' in command('verify').format_help()


@pytest.mark.parametrize(
    ('name', 'option'),
    [('bench', 'repeats'), ('calibrate', 'out'), ('calibrate', 'false_changes')],
)
def test_help_says_the_default(name, option):
    parser = command(name)
    assert f'(default {parser.get_default(option)})' in ' '.join(parser.format_help().split())


def test_help_of_bench_says_how_many_cameras():
    assert '(default 1 2 3)' in ' '.join(command('bench').format_help().split())
