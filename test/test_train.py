"""Behaviour cloning: labels, batches, the batched forward, resuming, and the exported folder."""

import dataclasses
import math
import os
import signal

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from specprune_ros.cli import main
from specprune_ros.config_files import load_config
from specprune_ros.errors import CheckpointError, ConfigError
from specprune_ros.models.base import Prompt
from specprune_ros.models.openvla_checkpoint import load
from specprune_ros.models.openvla_folder import Folder
from specprune_ros.models.tokenizer import LlamaTokenizer
from specprune_ros.policy import Policy
from specprune_ros.shipped import PARAMS
from specprune_ros.sim.dataset import (
    Episode,
    Recipe,
    episode_path,
    episodes,
    open_dataset,
    write_episode,
)
from specprune_ros.sim.labels import CLOSE_M, reach_chunk
from specprune_ros.sim.layouts import RECIPE, LayoutRecipe, Layouts
from specprune_ros.sim.state import ACTION_NAMES, PROPRIO_NAMES
from specprune_ros.sim.tasks import BASKET, SHUFFLE
from specprune_ros.train.config import DataConfig, FitConfig, NetworkConfig, TrainConfig
from specprune_ros.train.data import Batch, draw_batch, draw_visual_idx, load_training_set
from specprune_ros.train.export import export
from specprune_ros.train.losses import losses_of, named_patches, patch_labels
from specprune_ros.train.network import AuxiliaryHeads, Network, Outputs
from specprune_ros.train.precision import reduced
from specprune_ros.train.trainer import CHECKPOINT, CURVES, Trainer
from specprune_ros.train.vocabulary import write_tokenizer
from specprune_ros.types import Observation

SIZE, CAMERAS = 28, ('wrist', 'side')
NAMES = [*SHUFFLE.objects, BASKET]
NETWORK = NetworkConfig(
    image_size=SIZE, dino_width=16, dino_depth=2, siglip_width=16, siglip_depth=2, tower_heads=2,
    width=32, mlp_width=48, layers=2, heads=2,
)  # fmt: skip
FIT = FitConfig(
    steps=4, vision_steps=1, layout_images=2, demo_frames=2, warm_up=1, gate_every=4,
    gate_scenes=4, shift_px=1,
)  # fmt: skip

NEEDS_MUON = pytest.mark.skipif(not hasattr(torch.optim, 'Muon'), reason='this torch has no Muon')


def some_layouts(count: int, seed: int) -> Layouts:
    rng = np.random.default_rng(seed)
    places = rng.uniform((-0.2, -0.2, 0.0), (0.2, 0.2, 0.05), (count, len(NAMES), 3))
    return Layouts(
        images=rng.integers(0, 255, (count, len(CAMERAS), SIZE, SIZE, 3), np.uint8),
        proprio=rng.normal(0.0, 0.2, (count, len(PROPRIO_NAMES))).astype(np.float32),
        turn=np.zeros((count, 3), np.float32),
        place_names=np.array(NAMES),
        places=places.astype(np.float32),
        pixels=rng.uniform(0, SIZE, (count, len(CAMERAS), len(NAMES), 2)).astype(np.float32),
    )


def write_layouts(folder, count: int, seed: int, split: str = 'train') -> None:
    folder.mkdir()
    recipe = LayoutRecipe(
        cameras=CAMERAS, size=SIZE, split=split, detail_m=0.008, proprio_names=PROPRIO_NAMES
    )
    import json

    (folder / RECIPE).write_text(json.dumps(dataclasses.asdict(recipe)))
    layouts = some_layouts(count, seed)
    arrays = {f.name: getattr(layouts, f.name) for f in dataclasses.fields(Layouts)}
    np.savez(folder / '0000000.npz', **arrays)


def write_demos(folder, size: int = SIZE, task: str = 'object_shuffled/1', names=NAMES) -> None:
    recipe = Recipe(
        cameras=CAMERAS, size=size, every=2, noise=0.0, noisy_share=0.0, split='train',
        detail_m=0.008, proprio_names=PROPRIO_NAMES, action_names=ACTION_NAMES, step_dt_s=0.05,
    )  # fmt: skip
    open_dataset(folder, recipe)
    rng = np.random.default_rng(3)
    steps, frames = 12, 6
    actions = rng.uniform(-1, 1, (steps, 7)).astype(np.float32)
    actions[:, 6] = np.where(np.arange(steps) < 6, -1.0, 1.0)
    episode = Episode(
        task=task, seed=0, instruction='do it',
        frame_steps=np.arange(frames) * 2,
        images=rng.integers(0, 255, (frames, len(CAMERAS), size, size, 3), np.uint8),
        proprio=rng.normal(0.0, 0.2, (steps, len(PROPRIO_NAMES))).astype(np.float32),
        actions=actions, executed=actions, place_names=np.array(names),
        places=rng.uniform(-0.2, 0.2, (steps, len(names), 3)).astype(np.float32),
        pixels=rng.uniform(0, size, (frames, len(CAMERAS), len(names), 2)).astype(np.float32),
    )  # fmt: skip
    write_episode(episode_path(folder, task, 0), episode)


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp('data')
    write_layouts(root / 'layouts', 12, seed=1)
    write_layouts(root / 'gate', 6, seed=2, split='eval')
    write_demos(root / 'demos')
    return root


def data_config(root, **changes) -> DataConfig:
    values = {
        'demos': (str(root / 'demos'),),
        'layouts': (str(root / 'layouts'),),
        'gate': str(root / 'gate'),
    }
    return DataConfig(**{**values, **changes})


@pytest.fixture(scope='module')
def data(folders):
    return load_training_set(data_config(folders))


def make_trainer(folders, data, folder, network=NETWORK, **changes) -> Trainer:
    fit = dataclasses.replace(FIT, **changes)
    return Trainer(TrainConfig(data=data_config(folders), network=network, fit=fit), data, folder)


@pytest.fixture(scope='module')
def trained(folders, data, tmp_path_factory):
    trainer = make_trainer(folders, data, tmp_path_factory.mktemp('run'))
    trainer.run()
    return trainer


@pytest.fixture(scope='module')
def checkpoint(trained, tmp_path_factory):
    return export(trained, tmp_path_factory.mktemp('export') / 'checkpoint')


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {**trainer.network.state_dict(), **trainer.averaged[0].state_dict(prefix='average.')}


class TestLabels:
    XYZ = st.tuples(*[st.floats(-0.3, 0.3)] * 2, st.floats(0.0, 0.3))

    @given(hand=XYZ, grasp=st.tuples(*[st.floats(-0.2, 0.2)] * 2, st.floats(0.0, 0.05)))
    @settings(max_examples=60, deadline=None)
    def test_following_them_brings_every_hand_to_the_grasp(self, hand, grasp):
        hand, grasp = np.array([hand]), np.array([grasp])
        chunk = reach_chunk(hand, np.zeros((1, 3)), grasp, 0.23, horizon=150)[0]
        closing = np.flatnonzero(chunk[:, 6] > 0)
        assert len(closing), 'it arrives'
        assert (chunk[closing[0] :, 6] > 0).all(), 'and stays closed'
        assert np.abs(chunk).max() <= 1.0
        assert (np.linalg.norm(chunk[:, :3], axis=1) <= 1.0 + 1e-9).all()

    def test_a_hand_beside_an_object_rises_before_it_comes_down(self):
        beside = np.array([[0.10, 0.0, 0.02]])
        chunk = reach_chunk(beside, np.zeros((1, 3)), np.zeros((1, 3)), 0.23, horizon=8)[0]
        assert chunk[0, 2] > 0.3

    def test_a_hand_at_the_grasp_closes(self):
        at = np.array([[0.0, 0.0, 0.5 * CLOSE_M]])
        chunk = reach_chunk(at, np.zeros((1, 3)), np.zeros((1, 3)), 0.23, horizon=2)[0]
        assert (chunk[:, 6] == 1.0).all()
        assert (chunk[:, :3] == 0.0).all()


class TestData:
    def test_every_instruction_is_asked_of_an_empty_hand_and_one_of_a_full_one(self, data):
        assert data.layouts.asked.all()
        held = np.arange(6) * 2 >= 6
        np.testing.assert_array_equal(data.demos.asked.sum(axis=1), np.where(held, 1, 4))
        assert data.demos.asked[held][:, 1].all(), 'its own'

    def test_an_official_task_is_asked_its_own_instruction_alone(self, folders, tmp_path):
        goal = 'libero_goal/8'
        write_demos(tmp_path / 'goal', task=goal, names=['akita_black_bowl_1', 'plate_1'])
        demos = (str(folders / 'demos'), str(tmp_path / 'goal'))
        tasks = ('object_shuffled/1', goal)
        both = load_training_set(data_config(folders, demos=demos, tasks=tasks))
        assert both.instructions[1] == 'put the bowl on the plate'
        assert both.layouts.asked[:, 0].all()
        assert not both.layouts.asked[:, 1].any()
        np.testing.assert_array_equal(both.demos.asked[6:], [[False, True]] * 6)
        assert both.objects == (*NAMES, 'akita_black_bowl_1')
        assert both.named.tolist() == [1, len(NAMES)]
        known = np.isfinite(both.demos.pixels).all(axis=(1, 3))
        assert known[:6].tolist() == [[True] * len(NAMES) + [False]] * 6
        assert known[6:].tolist() == [[False] * len(NAMES) + [True]] * 6, 'no plate is asked for'
        (bowl,) = [e.pixels[:, :, 0] for e in episodes(tmp_path / 'goal')]
        np.testing.assert_array_equal(both.demos.pixels[6:, :, -1], bowl)
        assert np.isnan(both.layouts.pixels[:, :, -1]).all(), 'none is in that scene'

    def test_the_gripper_is_libero_s(self, data):
        answers = data.demos.actions[data.demos.asked]
        assert set(np.unique(answers[..., 6])) <= {0.0, 1.0}
        assert (data.demos.actions[-1, 1, :, 6] == 0.0).all(), 'closed in the end'

    def test_a_batch_depends_on_seed_and_step_alone(self, data):
        options = {
            'layouts': 2, 'instructions': 2, 'demos': 1, 'shift_px': 2, 'colour': 0.2,
        }  # fmt: skip
        one, same, other = (draw_batch(data, step, seed=5, **options) for step in (7, 7, 8))
        assert torch.equal(one.images, same.images)
        assert torch.equal(one.actions, same.actions)
        assert not torch.equal(one.images, other.images)

    def test_instructions_of_one_scene_differ(self, data):
        batch = draw_batch(
            data, 0, seed=0, layouts=3, instructions=4, demos=0, shift_px=0, colour=0.0
        )
        for scene in range(3):
            assert sorted(batch.instruction[batch.scene == scene].tolist()) == [0, 1, 2, 3]

    def test_a_shift_takes_the_objects_along(self, data):
        still, moved = (
            draw_batch(
                data, 3, seed=1, layouts=2, instructions=1, demos=0, shift_px=by, colour=0.0
            )
            for by in (0, 2)
        )
        shift = (moved.pixels - still.pixels)[0, 0, 0]
        x, y = int(shift[0]), int(shift[1])
        inside = slice(3, SIZE - 3)
        expected = torch.roll(still.images[0, 0], (y, x), (0, 1))[inside, inside]
        assert torch.equal(moved.images[0, 0][inside, inside], expected)

    @pytest.mark.parametrize(
        ('field', 'value'),
        [
            ('tasks', ('object_shuffled/9',)),
            ('tasks', ('libero_object/0',)),
            ('proprio', ('elbow',)),
            ('tasks', ('object_shuffled/0',)),
        ],
    )
    def test_what_does_not_fit_is_named(self, folders, field, value):
        with pytest.raises(ConfigError, match=r'task|data\.'):
            load_training_set(data_config(folders, **{field: value}))

    def test_images_of_another_size_are_refused(self, folders, tmp_path):
        write_demos(tmp_path / 'demos', size=14)
        with pytest.raises(ConfigError, match='size 14'):
            load_training_set(data_config(folders, demos=(str(tmp_path / 'demos'),)))


class TestPatchLabels:
    def test_patches_around_a_centre_tell_it(self):
        pixels = torch.full((1, 1, 2, 2), -100.0)
        pixels[0, 0, 1] = torch.tensor([20.0, 7.0])  # the second patch of the first row
        kind, offset = patch_labels(pixels, 56)
        assert kind.reshape(4, 4).tolist() == [[2, 2, 0, 0]] * 2 + [[0] * 4] * 2
        np.testing.assert_allclose(offset[0, 1], [20 / 14 - 1.5, 0.0], atol=1e-6)

    def test_nothing_is_asked_where_nothing_is_known(self):
        kind, _ = patch_labels(torch.full((1, 2, 3, 2), torch.nan), 28)
        assert (kind == -1).all()


class TestVocabulary:
    def test_words_are_pieces_and_the_template_is_two(self, tmp_path):
        write_tokenizer(tmp_path, ['pick up the butter', 'put it on the stove'], 512)
        prompt = LlamaTokenizer(tmp_path).prompt('Pick up the butter')
        assert len(prompt.instruction) == 4
        assert prompt.instruction.start == 2, 'BOS and one piece come before'

    def test_a_word_that_it_never_saw_is_spelled(self, tmp_path):
        write_tokenizer(tmp_path, ['pick up the butter'], 512)
        assert len(LlamaTokenizer(tmp_path).prompt('pick up the ölkanne').ids) > 8

    def test_too_small_a_model_is_named(self, tmp_path):
        with pytest.raises(ConfigError, match=r'network\.vocabulary'):
            write_tokenizer(tmp_path, ['pick up the butter'], 300)


class TestTrainer:
    @pytest.mark.parametrize('optimizer', ['adamw', pytest.param('muon', marks=NEEDS_MUON)])
    @pytest.mark.parametrize('precision', ['float32', 'bfloat16'])
    def test_the_loss_falls(self, folders, data, tmp_path, optimizer, precision):
        trainer = make_trainer(
            folders, data, tmp_path, steps=24, vision_steps=0, rate=3e-3, optimizer=optimizer,
            precision=precision,
        )  # fmt: skip
        losses = [trainer.train_step()['total'] for _ in range(24)]
        assert np.mean(losses[-6:]) < 0.8 * np.mean(losses[:3])

    def test_towers_learn_alone_at_first(self, folders, data, tmp_path):
        trainer = make_trainer(folders, data, tmp_path, steps=2, vision_steps=1)
        before = {name: p.clone() for name, p in trainer.network.named_parameters()}
        assert set(trainer.train_step()) == {'patch', 'total'}
        changed = {n for n, p in trainer.network.named_parameters() if not p.equal(before[n])}
        assert changed
        assert all(name.startswith(('vision_backbone.', 'projector.')) for name in changed)
        assert set(trainer.train_step()) == {
            'action', 'target', 'flag', 'patch', 'words', 'total',
        }  # fmt: skip

    @pytest.mark.parametrize(
        'fit',
        [{}, pytest.param({'optimizer': 'muon', 'precision': 'bfloat16'}, marks=NEEDS_MUON)],
    )
    def test_going_on_gives_the_same_weights(self, folders, data, tmp_path, fit):
        whole = make_trainer(folders, data, tmp_path / 'whole', **fit)
        assert whole.run()
        first = make_trainer(folders, data, tmp_path / 'parts', **fit)
        for _ in range(2):
            first.train_step()
        first.save()
        second = make_trainer(folders, data, tmp_path / 'parts', **fit)
        assert second.step == 2
        assert second.run()
        ours = weights(second)
        for name, tensor in weights(whole).items():
            assert torch.equal(ours[name], tensor), name

    def test_bfloat16_computes_the_same_but_for_its_rounding(self, folders, data, tmp_path):
        steps = {}
        for precision in ('float32', 'bfloat16'):
            trainer = make_trainer(
                folders, data, tmp_path / precision, vision_steps=0, precision=precision
            )
            losses = trainer.train_step()
            gradients = [
                p.grad.flatten() for p in trainer.network.parameters() if p.grad is not None
            ]
            assert {p.dtype for p in trainer.network.parameters()} == {torch.float32}
            steps[precision] = losses, torch.cat(gradients)
        (exact, gradient), (rounded, other) = steps['float32'], steps['bfloat16']
        assert rounded == pytest.approx(exact, rel=0.03, abs=0.01)
        assert rounded != exact
        assert torch.cosine_similarity(gradient, other, dim=0) > 0.99

    def test_precision_leaves_torch_as_it_was(self):
        cuda, query = torch.backends.cuda, torch.ones(1, 1, 3, 4)

        def state() -> tuple[bool, bool, bool, torch.dtype]:
            return (
                torch.is_autocast_enabled('cpu'),
                cuda.fp16_bf16_reduction_math_sdp_allowed(),
                cuda.flash_sdp_enabled(),
                torch.nn.functional.linear(query, query[0, 0]).dtype,
            )

        before = state()
        with reduced(torch.device('cpu'), 'float32'):
            assert state() == before
        with reduced(torch.device('cpu'), 'bfloat16'):
            assert state() == (True, True, False, torch.bfloat16), 'no fused attention'
        assert state() == before == (False, False, True, torch.float32)

    def test_another_precision_is_refused(self):
        with pytest.raises(ValueError, match='float16'), reduced(torch.device('cpu'), 'float16'):
            pass

    def test_a_run_of_before_muon_is_gone_on_with(self, folders, data, tmp_path):
        trainer = make_trainer(folders, data, tmp_path)
        trainer.train_step()
        trainer.save()
        path = tmp_path / CHECKPOINT
        state = torch.load(path, weights_only=True)
        (state['optimizer'],) = state.pop('optimizers')
        for name in ('optimizer', 'precision'):
            del state['config']['fit'][name]
        torch.save(state, path)
        assert make_trainer(folders, data, tmp_path).step == 1

    @pytest.mark.parametrize(
        ('name', 'value'),
        [
            ('seed', 1),
            ('token_dropout', 0.5),
            ('words_weight', 2.0),
            ('precision', 'bfloat16'),
            pytest.param('optimizer', 'muon', marks=NEEDS_MUON),
        ],
    )
    def test_a_run_is_gone_on_with_as_it_began(self, folders, data, tmp_path, name, value):
        make_trainer(folders, data, tmp_path).save()
        with pytest.raises(ConfigError, match=rf'fit\.{name}.*{getattr(FIT, name)}'):
            make_trainer(folders, data, tmp_path, **{name: value})

    def test_a_run_may_go_on_for_longer(self, folders, data, tmp_path):
        make_trainer(folders, data, tmp_path).save()
        assert make_trainer(folders, data, tmp_path, steps=6, gate_every=3).run()

    @NEEDS_MUON
    def test_muon_takes_the_matrices_of_the_layers_and_adamw_the_rest(
        self, folders, data, tmp_path
    ):
        trainer = make_trainer(folders, data, tmp_path, optimizer='muon')
        adamw, muon = (
            [id(p) for group in one.param_groups for p in group['params']]
            for one in trainer.optimizers
        )
        names = {id(p): name for name, p in trainer.network.named_parameters()}
        assert sorted(adamw + muon) == sorted(
            id(p) for module in (trainer.network, trainer.heads) for p in module.parameters()
        )
        taken = {names[one] for one in muon}
        assert 'language_model.model.layers.0.self_attn.q_proj.weight' in taken
        assert 'vision_backbone.featurizer.blocks.0.attn.qkv.weight' in taken
        assert not any('embed' in name or name.endswith('bias') for name in taken)

    def test_a_torch_without_muon_is_named(self, folders, data, tmp_path, monkeypatch):
        monkeypatch.delattr(torch.optim, 'Muon', raising=False)
        with pytest.raises(ConfigError, match=r'fit\.optimizer.*2\.9'):
            make_trainer(folders, data, tmp_path, optimizer='muon')

    def test_a_signal_leaves_a_checkpoint(self, folders, data, tmp_path):
        trainer = make_trainer(folders, data, tmp_path, gate_every=1)
        before = signal.getsignal(signal.SIGTERM)
        assert not trainer.run(lambda *_: os.kill(os.getpid(), signal.SIGTERM))
        assert signal.getsignal(signal.SIGTERM) is before
        assert make_trainer(folders, data, tmp_path).step == 1

    def test_the_normalisation_stays_when_data_are_added(self, folders, data, trained):
        wider = dataclasses.replace(
            data.action_bounds, low=data.action_bounds.low - 1, high=data.action_bounds.high + 1
        )
        again = make_trainer(
            folders, dataclasses.replace(data, action_bounds=wider), trained.folder
        )
        np.testing.assert_array_equal(again.data.action_bounds.low, data.action_bounds.low)

    def test_a_control_is_given_no_images(self, data):
        grey = dataclasses.replace(data, grey=True)
        batch = draw_batch(
            grey, 0, seed=0, layouts=2, instructions=1, demos=1, shift_px=1, colour=0.3
        )
        assert batch.images.unique().tolist() == [128.0]

    def test_a_control_is_given_no_instruction(self, folders, data, tmp_path):
        blind = data_config(folders, withheld='instruction')
        trainer = Trainer(TrainConfig(data=blind, network=NETWORK, fit=FIT), data, tmp_path)
        assert len(set(trainer.prompts)) == 1
        trainer.save()
        with pytest.raises(ConfigError, match=r'data\.withheld'):
            make_trainer(folders, data, tmp_path)

    def test_another_network_in_the_folder_is_refused(self, folders, data, trained):
        other = dataclasses.replace(NETWORK, layers=3)
        with pytest.raises(ConfigError, match=r'network\.layers'):
            make_trainer(folders, data, trained.folder, network=other)

    def test_a_broken_checkpoint_is_named(self, folders, data, tmp_path):
        (tmp_path / CHECKPOINT).write_bytes(b'nothing')
        with pytest.raises(CheckpointError, match=CHECKPOINT):
            make_trainer(folders, data, tmp_path)

    def test_the_curves_have_a_line_per_measurement(self, trained):
        lines = (trained.folder / CURVES).read_text().splitlines()
        assert lines[0].startswith('step,seconds')
        assert [line.split(',')[0] for line in lines[1:2]] == ['4']

    @pytest.mark.parametrize(
        ('name', 'value'), [('image_size', 100), ('heads', 7), ('tower_heads', 3), ('layers', 0)]
    )
    def test_a_bad_size_is_named(self, name, value):
        with pytest.raises(ConfigError, match=rf'network\.{name}'):
            NetworkConfig(**{name: value})

    def test_the_shipped_file_is_read(self):
        config = load_config(['train/libero'], {}, TrainConfig())
        assert config.network.layers >= 8
        assert (config.network.image_size // 14) ** 2 >= 64


@given(
    step=st.integers(0, 10**6),
    sequences=st.integers(1, 5),
    patches=st.integers(1, 40),
    dropout=st.floats(0.0, 0.95),
)
def test_every_sequence_goes_without_as_many_patches(step, sequences, patches, dropout):
    options = {'seed': 3, 'sequences': sequences, 'patches': patches, 'dropout': dropout}
    left = draw_visual_idx(step, **options)
    assert torch.equal(left, draw_visual_idx(step, **options))
    assert len(left) == sequences
    assert max(1, round(patches * (1 - dropout))) <= left.shape[1] <= patches
    assert (left.diff(dim=1) > 0).all()
    assert ((left >= 0) & (left < patches)).all()


def test_what_is_spared_needs_a_dropout():
    with pytest.raises(ConfigError, match=r'fit\.token_spared = 0.5'):
        FitConfig(token_spared=0.5)
    FitConfig(token_spared=0.5, token_dropout=0.1)


@pytest.mark.parametrize('withheld', ['images', 'instruction'])
def test_a_control_is_not_told_the_object_by_which_patches_are_there(withheld):
    """Bug: networks without images, or words, read in training where the spared patches were."""
    spared = FitConfig(token_spared=0.5, token_dropout=0.1)
    with pytest.raises(ConfigError, match=r'fit\.token_spared = 0.5'):
        TrainConfig(data=DataConfig(withheld=withheld), fit=spared)
    TrainConfig(data=DataConfig(withheld=withheld), fit=FitConfig(token_dropout=0.1))


@pytest.mark.parametrize(
    ('field', 'folder', 'split'),
    [('gate', 'layouts', 'eval'), ('layouts', 'gate', 'train')],
)
def test_held_out_scenes_are_not_learnt(folders, field, folder, split):
    path = str(folders / folder)
    change = {field: path if field == 'gate' else (str(folders / 'layouts'), path)}
    with pytest.raises(ConfigError, match=rf"data\.{field} = .*, not '{split}'"):
        load_training_set(dataclasses.replace(data_config(folders), **change))


def test_curves_are_cut_where_a_killed_run_goes_on(folders, data, tmp_path):
    trainer = make_trainer(folders, data, tmp_path)
    trainer.measure()
    trainer.save()
    trainer.step += 1  # killed before the next checkpoint
    trainer.measure()
    with (tmp_path / CURVES).open('a') as file:
        file.write('0,3')  # killed while writing
    again = make_trainer(folders, data, tmp_path)
    again.measure()
    lines = (tmp_path / CURVES).read_text().splitlines()
    assert [line.partition(',')[0] for line in lines] == ['step', '0', '0']


def test_spared_patches_go_last():
    spared = np.zeros((3, 30), bool)
    spared[0, :5] = spared[1, 20:29] = True
    options = {'seed': 0, 'sequences': 3, 'patches': 30, 'dropout': 0.95, 'spared': spared}
    for step in range(50):
        for row, left in enumerate(draw_visual_idx(step, **options, chance=1.0).tolist()):
            kept = spared[row, left].sum()
            assert kept == min(len(left), spared[row].sum())
    some = [draw_visual_idx(n, **options, chance=0.5) for n in range(400)]
    gone = [1 - np.isin(range(30), left[0]) for left in some]
    share = np.mean(gone, axis=0)
    assert share[:5].mean() == pytest.approx(0.5 * share[5:].mean(), rel=0.15), 'half as often'


def test_dropout_takes_half_of_its_share_on_the_average():
    some = [draw_visual_idx(n, seed=0, sequences=4, patches=100, dropout=0.8) for n in range(200)]
    assert np.mean([len(left[0]) for left in some]) == pytest.approx(60, abs=4)
    assert not torch.equal(some[0][0], some[0][1]), 'every sequence has its own'
    seen = torch.cat([left.flatten() for left in some]).bincount(minlength=100)
    assert seen.min() > 0.7 * seen.float().mean(), 'every patch is as likely'


@pytest.mark.parametrize('left', [8, 5, 1])
def test_a_sequence_without_some_patches_is_the_decoder_without_their_tokens(data, left):
    """As transformers' decoder has it: the other tokens keep their places."""
    torch.manual_seed(0)
    network = Network(dataclasses.replace(NETWORK, layers=4), proprio_dim=8, horizon=2)
    llama, patches, count = network.language_model.model, 8, 2 * 7
    llama.config._attn_implementation = 'eager'  # which returns attentions
    images = torch.from_numpy(data.gate.images[:2])
    scene, proprio = torch.tensor([0, 1, 1]), torch.rand(3, 8)
    ids = [tuple(range(9)), tuple(range(12)), tuple(range(3, 12))]  # of two lengths
    visual_idx = draw_visual_idx(0, seed=0, sequences=3, patches=patches, dropout=0.0)
    visual_idx = torch.stack([row[torch.randperm(patches)[:left].sort()[0]] for row in visual_idx])
    with torch.no_grad():
        outputs = network(images, scene, proprio, ids, visual_idx)
        state = network.proprio_projector(proprio)
        for row, tokens in enumerate(ids):
            text = llama.embed_tokens(torch.tensor(tokens))
            whole = torch.cat(
                (text[:1], network.patches(images)[scene[row]], state[row : row + 1], text[1:-1],
                 torch.zeros(count, NETWORK.width), text[-1:])
            )  # fmt: skip
            stays = torch.ones(len(whole), dtype=torch.bool)
            stays[1 : 1 + patches] = False
            stays[1 + visual_idx[row]] = True
            theirs = llama(
                inputs_embeds=whole[None, stays],
                position_ids=stays.nonzero().T,
                attention_mask=torch.zeros(1, 1, *[int(stays.sum())] * 2),  # hides nothing
                output_attentions=True,
            )
            prompt = slice(1 + left + 1, -1 - count)
            final = theirs.last_hidden_state[0]
            looks = [a[0][:, prompt, 1 : 1 + left].mean(dim=(0, 1)) for a in theirs.attentions[:2]]
            close = {'atol': 1e-5, 'rtol': 1e-5}
            torch.testing.assert_close(outputs.looks[row], torch.stack(looks), **close)
            torch.testing.assert_close(outputs.visual[row], final[1 : 1 + left], **close)
            torch.testing.assert_close(outputs.stop[row], final[-1], **close)
            actions = network.action_head(final[None, -2 - count : -2]).view(2, 7)
            torch.testing.assert_close(outputs.actions[row], actions, **close)


def test_a_step_is_asked_about_the_patches_that_it_was_shown(folders, data, tmp_path, monkeypatch):
    """A flag head that knows the right answer of every patch makes no error, whichever go."""
    seen = []

    def forward(images, scene, proprio, ids, visual_idx):
        seen.append(visual_idx)
        kind, _ = patch_labels(batches[-1].pixels, SIZE)
        right = kind[scene] == batches[-1].named[:, None] + 1
        right = right if visual_idx is None else right.gather(1, visual_idx)
        return dataclasses.replace(
            real(images, scene, proprio, ids, visual_idx),
            visual=torch.where(right, 50.0, -50.0)[..., None].expand(-1, -1, NETWORK.width),
        )

    batches = []
    monkeypatch.setattr(
        'specprune_ros.train.trainer.draw_batch',
        lambda *args, **kwargs: batches.append(draw_batch(*args, **kwargs)) or batches[-1],
    )
    for dropout in (0.0, 0.9):
        trainer = make_trainer(
            folders, data, tmp_path / str(dropout), vision_steps=0, token_dropout=dropout,
            token_spared=float(dropout > 0),
        )  # fmt: skip
        real, trainer.network.forward = trainer.network.forward, forward
        trainer.heads.flag.weight.data.fill_(1.0 / NETWORK.width)
        trainer.heads.flag.bias.data.zero_()
        assert trainer.train_step()['flag'] < 1e-6
    assert seen[0] is None
    assert 1 <= seen[1].shape[1] <= 8
    batch = batches[-1]
    named = named_patches(patch_labels(batch.pixels, SIZE)[0][batch.scene], batch)
    left = named.gather(1, seen[1]).sum(dim=1)
    assert left.tolist() == named.sum(dim=1).clamp(max=seen[1].shape[1]).tolist(), 'they go last'
    assert left.sum() > 0


def a_question(pixels: list, named: list[int]) -> Batch:
    """One question per scene of one camera; pixels [scene][object] in px."""
    count = len(pixels)
    return Batch(
        images=torch.zeros(count, 1, SIZE, SIZE, 3),
        pixels=torch.tensor(pixels, dtype=torch.float32)[:, None],
        scene=torch.arange(count),
        instruction=torch.zeros(count, dtype=torch.long),
        proprio=torch.zeros(count, 8),
        actions=torch.zeros(count, 8, 7),
        target=torch.zeros(count, 3),
        named=torch.tensor(named),
    )


def words_loss(pixels: list, named: list[int], looks: list, visual_idx=None) -> float:
    """Of words that look at the four patches of one camera like this, in both layers."""
    batch = a_question(pixels, named)
    attention = torch.tensor(looks, requires_grad=True)
    count = attention.shape[-1]
    outputs = Outputs(
        actions=batch.actions, stop=torch.zeros(len(pixels), 2),
        visual=torch.zeros(len(pixels), count, 2), patches=torch.zeros(len(pixels), 4, 2),
        looks=attention[:, None].expand(-1, 2, -1),
    )  # fmt: skip
    heads = AuxiliaryHeads(2, objects=2)
    if visual_idx is not None:
        visual_idx = torch.tensor(visual_idx)
    loss = losses_of(outputs, heads, batch, patch_labels(batch.pixels, SIZE), visual_idx).words
    loss.backward()
    assert attention.grad.isfinite().all()
    return loss.item()


NOWHERE = [float('nan')] * 2
EVEN = [0.1] * 4  # what is left goes to other tokens
# One object fills the upper left of 2 x 2 patches, the other one the lower right.
BOTH = [[3.0, 3.0], [25.0, 25.0]]


@pytest.mark.parametrize(
    ('pixels', 'named', 'looks', 'expected'),
    [
        ([BOTH], [0], [[0.3, 0.0, 0.0, 0.0]], 0.0),
        ([BOTH], [0], [EVEN], math.log(4)),
        ([BOTH], [1], [[0.3, 0.1, 0.0, 0.2]], math.log(3)),
        ([BOTH], [1], [[0.3, 0.0, 0.0, 0.0]], -math.log(1e-6)),
        ([[[70.0, 3.0], [3.0, 3.0]]], [0], [EVEN], 0.0),  # not in the image
        ([[NOWHERE, NOWHERE]], [0], [EVEN], 0.0),
        ([BOTH, [NOWHERE, NOWHERE]], [0, 0], [EVEN, EVEN], math.log(4)),
        ([BOTH], [0], [[0.0] * 4], -math.log(1e-6)),
    ],
)
def test_the_words_are_to_look_at_the_named_object(pixels, named, looks, expected):
    assert words_loss(pixels, named, looks) == pytest.approx(expected, abs=1e-4)


def test_every_camera_that_shows_the_named_object_counts_by_itself():
    corner, beyond = [3.0, 3.0], [70.0, 3.0]  # px: in the first of four patches, in none
    looks = torch.tensor([[0.2, 0.2, 0.0, 0.0, 0.01, 0.01, 0.01, 0.01]])

    def loss(first: list, second: list, visual_idx: torch.Tensor | None = None) -> float:
        pixels = torch.tensor([first, second])[None, :, None]
        batch = dataclasses.replace(a_question([[corner]], [0]), pixels=pixels)
        shown = looks if visual_idx is None else looks.gather(1, visual_idx)
        outputs = Outputs(
            actions=batch.actions, stop=torch.zeros(1, 2),
            visual=torch.zeros(1, shown.shape[1], 2), patches=torch.zeros(1, 8, 2),
            looks=shown[:, None].expand(-1, 2, -1),
        )  # fmt: skip
        heads = AuxiliaryHeads(2, objects=1)
        labels = patch_labels(batch.pixels, SIZE)
        return losses_of(outputs, heads, batch, labels, visual_idx).words.item()

    half, quarter = math.log(2), math.log(4)
    assert loss(corner, beyond) == pytest.approx(half, abs=1e-5)
    assert loss(beyond, corner) == pytest.approx(quarter, abs=1e-5)
    assert loss(corner, corner) == pytest.approx(0.5 * (half + quarter), abs=1e-5)
    assert loss(corner, corner, torch.tensor([[0, 1, 4, 7]])) == pytest.approx(half, abs=1e-5)
    assert loss(beyond, corner, torch.tensor([[0, 1, 5, 7]])) == 0.0, 'it is not there'


def test_the_words_are_asked_about_the_patches_that_are_left():
    assert words_loss([BOTH], [0], [[0.2, 0.2]], [[0, 3]]) == pytest.approx(math.log(2), abs=1e-4)
    assert words_loss([BOTH], [0], [[0.2, 0.2]], [[1, 3]]) == 0.0, 'it is not there'


def test_a_step_stays_on_its_device(data):
    """On the meta device whatever was made on the CPU shows as an error."""
    batch = draw_batch(
        data, 0, seed=0, layouts=2, instructions=2, demos=1, shift_px=0, colour=0.0
    ).to(torch.device('meta'))
    network = Network(NETWORK, proprio_dim=8, horizon=8).to('meta')
    heads = AuxiliaryHeads(NETWORK.width, len(data.objects)).to('meta')
    ids = [tuple(range(17)), *[tuple(range(18))] * 4]
    visual_idx = draw_visual_idx(0, seed=0, sequences=5, patches=8, dropout=0.5).to('meta')
    outputs = network(batch.images, batch.scene, batch.proprio, ids, visual_idx)
    labels = patch_labels(batch.pixels, SIZE)
    losses_of(outputs, heads, batch, labels, visual_idx).total(FIT).backward()
    assert network.projector.fc1.weight.grad.is_meta


class TestCommand:
    def arguments(self, folders, out, **fit) -> list[str]:
        fit = {**dataclasses.asdict(FIT), **fit}
        axes = {
            'data': dataclasses.asdict(data_config(folders)),
            'network': dataclasses.asdict(NETWORK),
            'fit': fit,
        }
        parameters = {
            axis: {k: list(v) if isinstance(v, tuple) else v for k, v in values.items() if v != ()}
            for axis, values in axes.items()
        }
        path = out / 'run.yaml'
        path.write_text(yaml.safe_dump({'/**': {'ros__parameters': parameters}}))
        return ['train', '--params', str(path), '--out', str(out / 'run')]

    def test_networks_on_the_way_are_kept_where_asked(self, folders, tmp_path, capsys):
        assert main(self.arguments(folders, tmp_path, gate_every=2, keep=(2,))) == 0
        assert 'step 4 of 4' in capsys.readouterr().out
        early, late = tmp_path / 'run' / 'step_2', tmp_path / 'run' / 'checkpoint'
        assert not (tmp_path / 'run' / 'step_4').exists()
        assert {path.name for path in early.iterdir()} >= {PARAMS, 'config.json'}
        before, after = ((folder / 'model.safetensors').read_bytes() for folder in (early, late))
        assert before != after
        assert '2 of 4 steps' in (early / 'README.md').read_text()

    def test_an_interrupted_run_says_so_and_the_same_command_ends_it(
        self, folders, tmp_path, monkeypatch
    ):
        command, step = self.arguments(folders, tmp_path), Trainer.train_step

        def interrupted(trainer):
            os.kill(os.getpid(), signal.SIGTERM)
            return step(trainer)

        monkeypatch.setattr(Trainer, 'train_step', interrupted)
        assert main(command) == 1
        monkeypatch.setattr(Trainer, 'train_step', step)
        assert main([*command, '--export-only']) == 0
        assert main(command) == 0

    @pytest.mark.parametrize(
        'change',
        [
            {'gate_every': 2, 'keep': (3,)},  # not measured
            {'gate_every': 2, 'keep': (6,)},  # after the end
            {'gate_every': 1, 'keep': (1,)},  # towers alone
        ],
    )
    def test_a_step_that_cannot_be_kept_is_refused(self, folders, tmp_path, capsys, change):
        assert main(self.arguments(folders, tmp_path, **change)) != 0
        assert 'fit.keep' in capsys.readouterr().err


class TestExport:
    def served(self, checkpoint):
        params = {'model.checkpoint': str(checkpoint), 'pruning.method': 'none'}
        return load_config([checkpoint / PARAMS], params)

    def observation(self, data, scene: int, instruction: int) -> Observation:
        frames = data.gate
        images = dict(zip(CAMERAS, frames.images[scene], strict=True))
        return Observation(
            images=images,
            proprio=frames.proprio[scene].astype(float),
            instruction=data.instructions[instruction],
            stamp_ns=0,
        )

    def test_the_batched_forward_is_the_served_one(self, data, trained, checkpoint):
        model = load(self.served(checkpoint), torch.device('cpu'))
        network, scenes = trained.averaged[0], [0, 0, 1, 2]
        instructions = [0, 3, 1, 2]  # of two lengths
        images = torch.from_numpy(data.gate.images[:3])
        proprio = data.proprio_bounds.normalize(data.gate.proprio[scenes]).astype(np.float32)
        ids = [trained.prompts[k] for k in instructions]
        with torch.no_grad():
            ours = network(images, torch.tensor(scenes), torch.from_numpy(proprio), ids).actions
            for row, (scene, k) in enumerate(zip(scenes, instructions, strict=True)):
                prompt: Prompt = model.embed(
                    images[scene], data.gate.proprio[scene], data.instructions[k]
                )
                theirs = model.act(prompt, _dense(model, prompt))
                torch.testing.assert_close(ours[row], theirs, atol=1e-5, rtol=1e-5)

    def test_budgets_are_the_papers_shares_of_the_patches(self, checkpoint):
        pruning = load_config([checkpoint / PARAMS]).pruning
        share = (SIZE // 14) ** 2 / 256
        for name, k in (('k_global', 30), ('k_local_coarse', 24), ('k_dynamic_fine', 10)):
            assert getattr(pruning, name) == pytest.approx(max(k * share, 1), abs=0.5)

    def test_a_policy_acts_from_it(self, data, checkpoint):
        policy = Policy.load(self.served(checkpoint))
        result = policy.infer(self.observation(data, 0, 1))
        assert result.chunk.data.shape == (8, 7)
        assert set(np.unique(result.chunk.data[:, 6])) <= {-1.0, 0.0, 1.0}

    def test_nothing_of_the_auxiliary_heads_is_in_it(self, checkpoint, trained):
        folder = Folder.open(checkpoint)
        count = sum(p.numel() for p in trained.network.parameters())
        weights = folder.checkpoint.weights(), folder.action_head, folder.proprio_projector
        assert sum(np.prod(w.shape) for some in weights for w in some.values()) == count

    def test_writing_it_again_leaves_one_head(self, trained, checkpoint):
        trained.step += 1
        export(trained, checkpoint)
        trained.step -= 1
        assert len(list(checkpoint.glob('action_head--*'))) == 1

    def test_the_card_says_what_it_was_made_of(self, data, checkpoint):
        text = (checkpoint / 'README.md').read_text()
        assert all(sentence in text for sentence in data.instructions)
        assert 'DOES NOT HOLD' in text
        assert '12 still scenes' in text
        assert 'float32, adamw' in text
        assert 'up to 0% of the patches' in text

    @pytest.mark.parametrize('sizes', [[100, 100], [28, 42], 28, ['28', '28'], []])
    def test_an_image_size_that_towers_cannot_have_is_refused(self, checkpoint, tmp_path, sizes):
        import json
        import shutil

        shutil.copytree(checkpoint, tmp_path / 'copy')
        path = tmp_path / 'copy' / 'config.json'
        path.write_text(json.dumps({**json.loads(path.read_text()), 'image_sizes': sizes}))
        with pytest.raises(CheckpointError, match='image_sizes'):
            Folder.open(tmp_path / 'copy')


def _dense(model, prompt: Prompt):
    from specprune_ros.models.decoder import QueryDecoder
    from specprune_ros.pruning.base import PruneRun

    class Keep(PruneRun):
        def __init__(self):
            super().__init__(None)

        def after_layer(self, probe):
            return None

    return QueryDecoder(model.decoder, prompt.layout, Keep())
