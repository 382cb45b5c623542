"""config.json of a checkpoint: what would be computed wrongly, or not at all, is refused."""

import json

import pytest
from openvla_world import assemble

from specprune_ros.errors import CheckpointError, ConfigError
from specprune_ros.models import PLATFORMS, load_model
from specprune_ros.models.openvla_folder import Folder

pytestmark = pytest.mark.golden


@pytest.fixture
def folder(tmp_path):
    return assemble(tmp_path / 'folder')


def spoil(folder, name: str, value: object, file: str = 'config.json') -> None:
    """Set a field, `text_config.x` for one of the language model."""
    content = json.loads((folder / file).read_text())
    target, key = content, name
    if '.' in name:
        outer, key = name.split('.')
        target = content[outer]
    target[key] = value
    (folder / file).write_text(json.dumps(content))


@pytest.mark.parametrize(
    ('name', 'value'),
    [
        ('model_type', 'llava'),
        ('vision_backbone_id', 'clip'),
        ('use_fused_vision_backbone', False),
        ('image_resize_strategy', 'letterbox'),
        ('arch_specifier', 'align'),
        ('text_config', None),
        ('text_config', [1]),
        ('text_config.rope_theta', 500000.0),
        ('text_config.rope_scaling', {'type': 'linear', 'factor': 2.0}),
        ('text_config.attention_bias', True),
        ('text_config.tie_word_embeddings', True),
        ('text_config.hidden_act', 'gelu'),
        ('text_config.hidden_size', '32'),
        ('text_config.hidden_size', -1),
        ('text_config.num_attention_heads', 0),
        ('text_config.num_attention_heads', 7919),
        ('text_config.vocab_size', 0),
        ('text_config.max_position_embeddings', None),
        ('n_action_bins', 1),
        ('n_action_bins', '256'),
        ('pad_to_multiple_of', -64),
        ('golden_tiny_vit_overrides', [{'depth': 3}]),
        ('golden_tiny_vit_overrides', 7),
    ],
)
def test_a_field_that_is_not_implemented_is_named(folder, name, value):
    spoil(folder, name, value)
    with pytest.raises(CheckpointError, match=name.replace('.', r'\.')) as caught:
        Folder.open(folder)
    assert 'config.json' in str(caught.value)


@pytest.mark.parametrize('value', [[[0.5] * 3, [0.5] * 3], 'none', [[0.485, 0.456, 0.406]]])
def test_another_normalisation_is_named(folder, value):
    spoil(folder, 'means', value, 'preprocessor_config.json')
    with pytest.raises(CheckpointError, match=r'preprocessor_config\.json: means'):
        Folder.open(folder)


def test_a_config_with_only_the_published_fields_is_enough(folder):
    content = json.loads((folder / 'config.json').read_text())
    kept = {key: content[key] for key in ('vision_backbone_id', 'text_config', 'norm_stats')}
    (folder / 'config.json').write_text(json.dumps(kept))
    (folder / 'preprocessor_config.json').unlink()
    assert Folder.open(folder).towers[0].width == 1024


def test_a_mask_of_words_is_refused(folder):
    path = folder / 'dataset_statistics.json'
    statistics = json.loads(path.read_text())
    name, values = next(iter(statistics.items()))
    values['action']['mask'] = ['false'] * len(values['action']['mask'])
    path.write_text(json.dumps({name: values}))
    with pytest.raises(CheckpointError, match='mask holds'):
        Folder.open(folder).bounds('action', 'bounds_q99', '')


def test_load_model_says_what_it_knows(folder):
    with pytest.raises(ConfigError, match='robots/aloha'):
        load_model(folder, cameras=['a'], platform='unknown')
    with pytest.raises(ConfigError, match='must be a list of names'):
        load_model(folder, cameras='wrist')
    for platform in PLATFORMS:  # found; what follows is another complaint
        with pytest.raises((ConfigError, CheckpointError)) as caught:
            load_model(folder, cameras=['a'], platform=platform, device='cpu')
        assert 'params_file' not in str(caught.value)
