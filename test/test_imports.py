"""Dependencies point inward: ROS at the rim, heavy packages only where they are needed."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / 'specprune_ros'
MODULES = sorted(path for path in PACKAGE.rglob('*.py'))
ROS = {
    'rclpy', 'sensor_msgs', 'std_msgs', 'diagnostic_msgs', 'lifecycle_msgs', 'rcl_interfaces',
    'builtin_interfaces', 'geometry_msgs', 'trajectory_msgs', 'launch', 'launch_ros',
}  # fmt: skip


def imported(path: Path, *, top_only: bool) -> set[str]:
    """Names of the modules that a file imports."""
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_only else ast.walk(tree)
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module or '')
    return names


def uses(names: set[str], package: str) -> bool:
    return any(name == package or name.startswith(package + '.') for name in names)


@pytest.mark.parametrize('path', MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_dependencies_point_inward(path):
    where = path.relative_to(PACKAGE).parts
    names = imported(path, top_only=False)
    if where[0] != 'ros':
        assert not [ros for ros in ROS if uses(names, ros)], 'ROS outside ros/'
        assert not uses(names, 'specprune_ros.msg')
    if where[0] not in ('ros', 'cli'):
        assert not uses(names, 'specprune_ros.ros')
    if where[0] == 'ros' and where[-1] not in (
        'conversions.py', 'vla_node.py', 'streamer_node.py', 'replay_node.py', 'demo_watch.py',
        'tasks.py', 'vla_inputs.py', 'vla_model.py', 'vla_outputs.py',
        'vla_pipeline.py', 'cloud_node.py',
    ):  # fmt: skip
        assert not uses(names, 'specprune_ros.msg')
    if where[0] == 'pruning':
        assert not uses(names, 'specprune_ros.models'), 'a method never sees a model'
    if where[0] == 'models' and where[-1] != 'decoder.py':
        assert not uses(names, 'specprune_ros.pruning'), 'a model never sees a method'
    assert not uses(imported(path, top_only=True), 'transformers'), 'loaders import it lazily'


@pytest.mark.parametrize('name', ['msg', 'srv', 'action'])
def test_no_module_shadows_a_generated_one(name):
    assert not list(PACKAGE.glob(f'{name}*'))


def run_python(code: str) -> str:
    done = subprocess.run(
        [sys.executable, '-c', code], capture_output=True, text=True, timeout=60, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_what_the_node_needs_before_configure_needs_no_torch():
    modules = (
        'types errors config config_files checks images inbox overlay health worker loading '
        'tasks faults cloud inspection shipped runlog'
    ).split()
    modules += [f'streaming.{path.stem}' for path in (PACKAGE / 'streaming').glob('[!_]*.py')]
    names = ', '.join(f'specprune_ros.{name}' for name in modules)
    out = run_python(f"import sys, {names}; print('torch' in sys.modules)")
    assert out.strip() == 'False'


def test_the_simulator_needs_no_torch_before_a_policy_is_loaded():
    modules = [path.stem for path in (PACKAGE / 'sim').glob('[!_]*.py')]
    names = ', '.join(f'specprune_ros.sim.{name}' for name in modules)
    assert run_python(f"import sys, {names}; print('torch' in sys.modules)").strip() == 'False'


def without(packages: set[str]) -> str:
    """Code that makes packages absent: importing one fails, looking for one finds nothing."""
    return f'import sys\nfor name in {sorted(packages)!r}: sys.modules[name] = None\n'


def test_importing_the_package_imports_nothing_heavy():
    loaded = run_python(
        'import sys, specprune_ros; '
        "print([m for m in ('torch', 'numpy', 'rclpy', 'transformers') if m in sys.modules])"
    )
    assert loaded.strip() == '[]'


@pytest.mark.slow
def test_bench_runs_on_a_bare_pytorch_machine(tmp_path):
    bare = without(ROS | {'cv2', 'rich', 'matplotlib', 'rosbags'})
    out = tmp_path / 'rows.json'
    printed = run_python(
        bare
        + f"""
from specprune_ros.cli import main
options = ['--cameras', '1', '--repeats', '2', '--breakdown', '--json', {str(out)!r}]
assert main(['bench', *options]) == 0
"""
    )
    assert all(part in printed for part in ('similarity', 'score', 'gather', 'controller'))
    rows = json.loads(out.read_text())
    assert {row['method'] for row in rows} == {'none', 'specprune'}
    wanted = {'method', 'form', 'cameras', 'stage', 'median_ms', 'p95_ms', 'ratio_to_dense_sdpa'}
    assert all(wanted <= row.keys() for row in rows)


def test_policy_runs_without_ros():
    out = run_python(
        without(ROS)
        + """
import numpy as np
from specprune_ros.config_files import from_mapping
from specprune_ros.policy import Policy
from specprune_ros.types import Observation
policy = Policy.load(from_mapping({'robot.camera_names': ['side'], 'model.threads': 1}))
image = np.zeros((48, 64, 3), np.uint8)
observation = Observation(images={'side': image}, proprio=None, instruction='go', stamp_ns=0)
print(policy.infer(observation).chunk.data.shape, 'cv2' in sys.modules)
"""
    )
    assert out.strip() == '(8, 7) False'
