"""Load a policy where torch may be missing: a clear error with the command, not a traceback."""

from __future__ import annotations

from typing import TYPE_CHECKING

from specprune_ros.config import PolicyConfig
from specprune_ros.errors import MissingDependencyError

if TYPE_CHECKING:
    from specprune_ros.policy import Policy

COMMANDS = {
    'cv2': 'pip install opencv-python-headless',
    'yaml': 'pip install pyyaml',
    'torch': 'pip install torch (pytorch.org names the build for your GPU)',
    'transformers': 'pip install "transformers>=4.50"',
    'simplejpeg': 'pip install simplejpeg',
    'PIL': 'pip install pillow',
    'safetensors': 'pip install safetensors',
    'tokenizers': 'pip install tokenizers',
    'sentencepiece': 'pip install sentencepiece',
}


def load_policy(config: PolicyConfig) -> Policy:
    """Load the configured model and pruning method.

    Raises:
        MissingDependencyError: torch or another package is missing.
        ConfigError, CheckpointError: see models.load.
    """
    try:
        from specprune_ros.policy import Policy
    except ImportError as error:
        package = (error.name or 'torch').partition('.')[0]
        command = COMMANDS.get(package, f'pip install {package}')
        raise MissingDependencyError(package, 'the model', command, error) from error
    return Policy.load(config)
