#!/usr/bin/env bash
# What is too heavy for every change: the simulator's own tests, the shipped checkpoint in closed
# loop without ROS, and the demo. Fails where dense control solves fewer episodes than it must; what
# pruned control solves is reported, not judged.
#
#   bash scripts/nightly.sh [DIR]      # results, anew; default out/nightly
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
out=${1:-out/nightly} seeds=10 least=30 # of 4 tasks: 40 episodes
bash scripts/setup_sim.sh
MUJOCO_GL=$(cat .venv-sim/specprune_ros_gl)
export MUJOCO_GL PYOPENGL_PLATFORM=$MUJOCO_GL LP_NUM_THREADS=1
rm -rf "$out/eval" "$out/success.json" # else the episodes of an earlier night would be counted
.venv-sim/bin/python -m pytest -m slow test/test_sim.py
.venv-sim/bin/specprune eval shipped/libero_small --out "$out/eval" --json "$out/success.json" \
  --method dense specprune:budget=fixed random:budget=fixed --seeds $seeds --workers "$(nproc)"
.venv-sim/bin/python - "$out/success.json" $least <<'PY'
import json
import pathlib
import sys

path, least = pathlib.Path(sys.argv[1]), int(sys.argv[2])
cells = json.loads(path.read_text())['cells']
(dense,) = (cell for cell in cells if (cell['task'], cell['method']) == ('', 'dense'))
print(f'dense solved {dense["successes"]} of {dense["episodes"]} episodes, {least} are asked')
sys.exit(dense['successes'] < least)
PY
bash scripts/demo.sh --episodes 2 --out "$out/demo"
