#!/usr/bin/env bash
# Makes .venv-sim, in which LIBERO's scenes run: 2 GB, Python 3.10 or 3.11. It pins older libraries
# than the rest needs, so it is an environment of its own that sees .venv behind its own packages.
#
#   bash scripts/setup_sim.sh
#   .venv-sim/bin/specprune collect --help
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
root=$PWD log=$PWD/.ws/setup_sim.log

say() { printf 'setup_sim: %s\n' "$*"; }
die() { printf 'setup_sim: %s\n' "$*" >&2; exit 1; }

bash scripts/setup.sh
exec 9>.setup.lock
if command -v flock >/dev/null && ! flock -n 9; then
  say 'waiting for another setup of this checkout'
  flock 9
fi

python=$(.venv/bin/python -c 'import os, sys; print(os.path.realpath(sys._base_executable))')
version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
case $version in
  3.10 | 3.11) ;;
  *) [ -z "${ROS_DISTRO:-}" ] ||
      die "LIBERO's libraries need Python 3.10 or 3.11, and the sourced ROS has $version: no" \
        'simulator here'
    die "LIBERO's libraries need Python 3.10 or 3.11, and .venv has $version: name another in" \
      'SPECPRUNE_PYTHON and run this again' ;;
esac
mapfile -t requirements < <(.venv/bin/python -c "
import importlib.metadata
for line in importlib.metadata.requires('specprune_ros'):
    requirement, _, marker = line.partition(';')
    if 'sim' in marker:
        print(requirement.strip())")
wanted=$(printf '%s\n' "$python" "$root" "${requirements[@]}" | sha256sum)
if [ "$(cat .venv-sim/specprune_ros_stamp 2>/dev/null)" != "$wanted" ]; then
  say 'installing the simulator, 2 GB'
  rm -rf .venv-sim
  "$python" -m venv .venv-sim
  .venv-sim/bin/python -m pip install -q "${requirements[@]}" >"$log" 2>&1 || {
    tail -n 25 "$log" >&2
    die "pip failed (whole log: $log)"
  }
  # Packages that both have come from .venv-sim, which stands first.
  site=lib/python$version/site-packages
  printf '%s\n' "$root/.venv/$site" "$root" >".venv-sim/$site/specprune_ros.pth"
  echo "$wanted" >.venv-sim/specprune_ros_stamp
fi
cat >.venv-sim/bin/specprune <<EOF
#!$root/.venv-sim/bin/python
import os
import pathlib
import sys

renderer = pathlib.Path(sys.prefix, 'specprune_ros_gl')
os.environ.setdefault('MUJOCO_GL', renderer.read_text().strip())

from specprune_ros.cli import main

if __name__ == '__main__':  # workers run this file as well
    sys.exit(main())
EOF
chmod +x .venv-sim/bin/specprune

# Rendering needs libraries of the system.
renders() {
  MUJOCO_GL=$1 PYOPENGL_PLATFORM=$1 .venv-sim/bin/python - >"$log" 2>&1 <<'PY'
import mujoco

model = mujoco.MjModel.from_xml_string('<mujoco><worldbody><geom size="1"/></worldbody></mujoco>')
renderer = mujoco.Renderer(model, 32, 32)
renderer.update_scene(mujoco.MjData(model))
renderer.render()
PY
}
for gl in ${MUJOCO_GL:-egl osmesa}; do
  if renders "$gl"; then
    echo "$gl" >.venv-sim/specprune_ros_gl
    say "ready, rendering with $gl"
    exit
  fi
done
tail -n 5 "$log" >&2
die 'nothing renders here: apt install libegl1 libegl-mesa0 libgl1-mesa-dri'
