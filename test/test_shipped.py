"""Checkpoints by the name that they have in this package."""

from pathlib import Path

import pytest

from specprune_ros import shipped
from specprune_ros.errors import CheckpointError
from specprune_ros.models.checkpoint import Checkpoint
from specprune_ros.shipped import find_checkpoint, shipped_names


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    (tmp_path / 'small').mkdir()
    (tmp_path / 'small' / 'config.json').write_text('{"model_type": "openvla"}')
    (tmp_path / 'unfinished').mkdir()
    monkeypatch.setattr(shipped, 'FOLDER', tmp_path)
    return tmp_path


def test_a_path_is_itself(folder):
    assert find_checkpoint('/a/b') == find_checkpoint(Path('/a/b')) == Path('/a/b')
    assert find_checkpoint('~/x') == Path.home() / 'x'


def test_a_shipped_one_is_found_by_its_name(folder):
    assert shipped_names() == ['small']
    assert Checkpoint('shipped/small').config == {'model_type': 'openvla'}


@pytest.mark.parametrize('name', ['unfinished', '', '../small', 'large'])
def test_another_name_is_answered_with_what_there_is(folder, name):
    with pytest.raises(CheckpointError, match='ships shipped/small'):
        find_checkpoint(f'shipped/{name}')
