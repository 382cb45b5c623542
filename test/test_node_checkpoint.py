"""vla_node with a checkpoint folder: refused when broken, configurable again, any method."""

import json
import shutil

import pytest

rclpy = pytest.importorskip('rclpy', reason='no ROS here: source one, or run scripts/test.sh')
pytest.importorskip('specprune_ros.msg', reason='messages are not built: run scripts/setup.sh')
pytest.importorskip('tokenizers')

from openvla_world import FOLDER, HEAD, MODEL, PROPRIO, assemble  # noqa: E402
from ros_world import (  # noqa: E402
    CAMERAS,
    FAST_NODE,
    START_S,
    NodeProcess,
    domain_fixture,
    refuse_to_configure,
    world_fixture,
)
from task_world import TaskWorld  # noqa: E402
from test_tokenizer import llama_json  # noqa: E402

from specprune_ros.shipped import find_checkpoint  # noqa: E402

pytestmark = [pytest.mark.ros, pytest.mark.golden, pytest.mark.timeout(180)]
SHIPPED = 'shipped/libero_small'
ELEMENTS = [f'e{index}' for index in range(8)]


context = domain_fixture(6)
world = world_fixture


@pytest.fixture
def folder(tmp_path):
    """A whole checkpoint folder, tokenizer included."""
    folder = assemble(tmp_path / 'good', HEAD, PROPRIO)
    (folder / 'tokenizer.json').write_text(json.dumps(llama_json()))
    return folder


def parameters(folder) -> dict[str, object]:
    return {
        **FAST_NODE,
        'robot.joint_names': ELEMENTS,
        'model.name': 'openvla_oft',
        'model.checkpoint': str(folder),
        'model.device': 'cpu',
    }


class Robot(TaskWorld):
    """A robot whose joint state has the checkpoint's elements."""

    def joint_state(self, names=tuple(ELEMENTS), positions=(0.1,) * 8):
        return super().joint_state(names, positions)


@pytest.mark.slow
def test_broken_then_mended_then_every_method(folder, tmp_path):
    broken = tmp_path / 'broken'
    shutil.copytree(folder, broken, symlinks=True)
    shutil.copy(FOLDER / HEAD, broken / 'action_head--9_checkpoint.pt')
    world = Robot('robot')
    with NodeProcess('vla_node', parameters(broken)) as process:
        refuse_to_configure(world)
        assert 'action_head--9_checkpoint.pt' in process.output()
        assert world.run(5, lambda: bool(world.faults.get('checkpoint')))
        assert world.set_parameter('model.checkpoint', str(folder))[0]
        world.streams.add('executed')
        world.start()
        assert world.more_chunks(3), process.output()
        assert not world.chunks[-1].stand_in
        assert world.run(5, lambda: bool(world.models))
        assert world.models[-1].head == 'l1', 'the one that its files hold'
        (dataset,) = json.loads((folder / 'dataset_statistics.json').read_text())
        assert world.models[-1].unnorm_key == dataset, 'the only one there'
        assert world.reports[-1].method == 'specprune'
        assert world.reports[-1].fallback_reason == ''
        assert sum(world.reports[-1].tokens_kept) < 2 * 256
        assert world.set_parameter('pruning.method', 'none')[0]
        assert world.run(20, lambda: world.reports[-1].method == 'none'), process.output()
        assert sum(world.reports[-1].tokens_kept) == len(CAMERAS) * 256
        assert process.stop()[0] == 0
    world.destroy_node()


@pytest.mark.slow
@pytest.mark.parametrize('folder', [SHIPPED, find_checkpoint(SHIPPED)])
def test_what_ships_moves_no_real_arm(world, folder):
    """It knows a simulator: without simulated time it is configured for a dry run alone."""
    values = {
        **parameters(folder), 'model.center_crop': False, 'runtime.dry_run': False,
    }  # fmt: skip
    with NodeProcess('vla_node', values) as process:
        refuse_to_configure(world)
        assert f'runtime.dry_run = False: {folder} is for simulated' in process.output()
        assert world.set_parameter('runtime.dry_run', True)[0]
        assert world.lifecycle.change('configure'), process.output()
        assert process.stop()[0] == 0
    with NodeProcess('vla_node', {**values, 'use_sim_time': True}) as process:
        world.lifecycle.wait(START_S)
        assert world.lifecycle.change('configure'), process.output()
        assert process.stop()[0] == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ('fault', 'told'),
    [
        ('shard', MODEL),
        ('tokenizer', 'tokenizer.json'),
        ('statistics', 'dataset_statistics.json'),
        ('joints', 'robot.joint_names'),
        ('cameras', 'robot.camera_names'),
    ],
)
def test_faults_leave_the_node_unconfigured_and_configurable(world, folder, fault, told):
    values, mend = parameters(folder), None
    if fault == 'joints':
        values['robot.joint_names'], mend = ELEMENTS[:5], ('robot.joint_names', ELEMENTS)
    elif fault == 'cameras':
        values['robot.camera_names'] = list('abcde')
        mend = ('robot.camera_names', list(CAMERAS))
    elif fault == 'shard':
        (folder / MODEL).unlink()
        (folder / MODEL).write_bytes(b'\0' * 100)
    elif fault == 'tokenizer':
        (folder / 'tokenizer.json').unlink()
    else:
        (folder / 'dataset_statistics.json').write_text('{}')
        config = json.loads((folder / 'config.json').read_text())
        (folder / 'config.json').write_text(json.dumps({**config, 'norm_stats': {}}))
    with NodeProcess('vla_node', values) as process:
        refuse_to_configure(world)
        assert told in process.output(), process.output()
        if mend is None:
            mend = ('model.name', 'tiny')
        assert world.set_parameter(*mend)[0]
        assert world.lifecycle.change('configure'), process.output()
        assert process.stop()[0] == 0
