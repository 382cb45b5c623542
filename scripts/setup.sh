#!/usr/bin/env bash
# Makes .venv and .ws, all that this checkout needs to run and to be tested; quick when nothing
# changed. Afterwards:  . scripts/env.sh
#
# Where a ROS is sourced, .venv sees its Python packages and pip adds what is missing. Elsewhere
# ROS 2 Kilted comes from PyPI wheels (x86-64 Linux, CPython 3.10 to 3.13).
#
#   SPECPRUNE_TORCH    what pip installs as torch, e.g. 'torch==2.9.1'; '' leaves torch to you
#   SPECPRUNE_PYTHON   the interpreter for .venv
#   SPECPRUNE_ROS      'wheels' takes those although a ROS is installed
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
root=$PWD log=$PWD/.ws/setup.log

say() { printf 'setup: %s\n' "$*"; }
die() { printf 'setup: %s\n' "$*" >&2; exit 1; }
quietly() {
  "$@" >>"$log" 2>&1 && return
  tail -n 25 "$log" >&2
  die "failed: $(basename "$1") ${*:2:3} ... (whole log: $log)"
}
find_python() { # prints the first interpreter that passes the Python test $1
  local name
  for name in ${SPECPRUNE_PYTHON:-.venv/bin/python "${@:2}"}; do
    "$name" -c "import os, sys; $1; print(os.path.realpath(sys._base_executable))" 2>/dev/null && return
  done
  return 1
}

# One setup at a time: the demo and the tests may be started side by side.
exec 9>.setup.lock
if command -v flock >/dev/null && ! flock -n 9; then
  say 'waiting for another setup of this checkout'
  flock 9
fi

# Entries of an earlier `. scripts/env.sh` must not leak into what is built now.
for name in PATH PYTHONPATH LD_LIBRARY_PATH {AMENT,CMAKE,COLCON}_PREFIX_PATH; do
  value=$(tr : '\n' <<<"${!name-}" | grep -vE "^($root/\.(venv|ws)(/|$)|$)" | paste -sd :) || true
  if [ -n "$value" ]; then export "$name=$value"; else unset "$name"; fi
done
unset VIRTUAL_ENV

if [ -n "${ROS_DISTRO:-}" ] && [ -n "${AMENT_PREFIX_PATH:-}" ]; then
  [ "${SPECPRUNE_ROS:-}" != wheels ] ||
    die "SPECPRUNE_ROS=wheels, but ROS $ROS_DISTRO is sourced: take a shell in which none is"
  ros=$ROS_DISTRO
  python=$(find_python 'import rclpy' python3 /usr/bin/python3) ||
    die "ROS $ros is sourced, but no Python here imports its rclpy (apt install ros-$ros-rclpy)"
else
  ros=wheels
  for setup in /opt/ros/*/setup.bash; do
    [ ! -e "$setup" ] || [ "${SPECPRUNE_ROS:-}" = wheels ] ||
      die "source your ROS first:  . $setup   (or go without it: SPECPRUNE_ROS=wheels)"
  done
  [ "$(uname -sm)" = 'Linux x86_64' ] ||
    die 'no ROS is sourced, and its PyPI wheels exist for x86-64 Linux only, not for' \
      "$(uname -sm): install ROS 2 with apt, source its setup.bash and run this again"
  test='assert sys.implementation.name == "cpython" and (3, 10) <= sys.version_info[:2] <= (3, 13)'
  python=$(find_python "$test" python3 python3.11 python3.12 python3.10 python3.13) ||
    die 'no ROS is sourced, and its PyPI wheels need CPython 3.10 to 3.13: none is on PATH' \
      '(or name one in SPECPRUNE_PYTHON)'
fi
version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
"$python" -c 'import ensurepip, venv' 2>/dev/null ||
  die "$python has no venv module: apt install python$version-venv"
[ -e "$("$python" -c 'import sysconfig; print(sysconfig.get_paths()["include"])')/Python.h" ] ||
  die "$python has no C headers: apt install python$version-dev"
for tool in cc c++ make; do
  command -v $tool >/dev/null ||
    die "no $tool, which building the messages needs: apt install build-essential"
done

# The environment: made anew when the interpreter or the ROS below it changed.
kind="$ros, Python $version, $python, $root"
if [ -e .venv ] && [ "$(cat .venv/specprune_ros_kind 2>/dev/null)" != "$kind" ]; then
  [ -e .venv/specprune_ros_kind ] || die '.venv exists but is not from this script: move it away'
  rm -rf .venv .ws
fi
mkdir -p .ws
torch=${SPECPRUNE_TORCH-torch==2.13.0}
wanted=$(
  printf '%s\n' "$root" "$torch" |
    cat - setup.py scripts/setup.sh scripts/requirements-ros.txt | sha256sum
)
if [ "$(cat .venv/specprune_ros_stamp 2>/dev/null)" != "$wanted" ]; then
  : >"$log"
  if [ ! -x .venv/bin/pip ]; then # none yet, or an interrupted one
    say "making .venv (${kind%, *})"
    mkdir -p .venv && echo "$kind" >.venv/specprune_ros_kind
    site=; [ "$ros" = wheels ] || site=--system-site-packages
    quietly "$python" -m venv $site .venv
  fi
  quietly .venv/bin/python -m pip install --no-deps -e .

  # setup.py has the only list of requirements; all extras are wanted here but the simulator,
  # which pins libraries older than the others need.
  mapfile -t requirements < <(.venv/bin/python -c "
import importlib.metadata
for line in importlib.metadata.requires('specprune_ros'):
    requirement, _, marker = line.partition(';')
    if 'sim' not in marker:
        print(requirement.strip())")
  imports() { .venv/bin/python -c "import $1" 2>/dev/null; }
  : >.ws/constraints.txt
  if [ "$ros" = wheels ]; then
    requirements+=(-r scripts/requirements-ros.txt)
  else
    # apt's OpenCV and cv_bridge are built for apt's NumPy, and pip does not see apt's cv2.
    imports cv2 && requirements=("${requirements[@]/#opencv-python-headless*/numpy}")
    imports torch && [ -z "${SPECPRUNE_TORCH+set}" ] && torch=
    imports 'numpy; assert numpy.__version__ < "2"' && echo 'numpy<2' >.ws/constraints.txt
    imports 'colcon_ros, colcon_cmake' ||
      mapfile -t -O ${#requirements[@]} requirements < \
        <(grep ^colcon- scripts/requirements-ros.txt)
  fi
  command -v cmake >/dev/null || requirements+=(cmake)
  say "installing Python packages${torch:+, $torch among them}"
  quietly .venv/bin/python -m pip install -q -c .ws/constraints.txt $torch "${requirements[@]}"

  if [ "$ros" = wheels ]; then
    say 'setting the paths in the ROS wheels to this machine'
    .venv/bin/python - <<'PY'
# The wheels' CMake files name places on the machine that built them.
import pathlib
import re
import sys
import sysconfig

import numpy

built = r'/opt/python/cp3\d+-cp3\d+/'
here = {
    built + r'include/python3\.\d+': sysconfig.get_paths()['include'],
    built + r'lib/python3\.\d+/site-packages/numpy/_core/include': numpy.get_include(),
    built + r'lib/python3\.\d+/site-packages': sysconfig.get_paths()['purelib'],
}
if not pathlib.Path('/usr/lib64/libc.so').exists():  # Debian and its like
    here['/usr/lib64/'] = '/usr/lib/x86_64-linux-gnu/'
for path in pathlib.Path(sys.prefix, 'share').rglob('*.cmake'):
    before = after = path.read_text()
    for pattern, place in here.items():
        after = re.sub(pattern, place, after)
    if after != before:
        path.write_text(after)
PY
  fi
  echo "$wanted" >.venv/specprune_ros_stamp
  rm -f .ws/stamp
fi

# The workspace. Installed Python is links to this tree: only new or gone files need a build.
built=$(
  sha256sum CMakeLists.txt package.xml action/* msg/* srv/* scripts/*_node scripts/*_streamer
  find specprune_ros launch config -name __pycache__ -prune -o -type f -print | sort
)
if [ "$(cat .ws/stamp 2>/dev/null)" != "$built" ]; then
  say 'building the workspace'
  rm -f .ws/stamp
  [ "$ros" != wheels ] || export AMENT_PREFIX_PATH="$root/.venv" CMAKE_PREFIX_PATH="$root/.venv"
  export VIRTUAL_ENV="$root/.venv" PATH="$root/.venv/bin:$PATH"
  [ ! -d .ws/install ] || find .ws/install -xtype l -delete
  # CMake refuses NumPy's headers in .venv when that lies below the source folder; so the source
  # folder is one of links.
  mkdir -p .ws/src/specprune_ros
  for name in CMakeLists.txt package.xml action config launch msg scripts specprune_ros srv; do
    ln -sfn "$root/$name" .ws/src/specprune_ros/
  done
  : >"$log"
  (cd .ws && quietly python -m colcon build --symlink-install --cmake-args -DBUILD_TESTING=OFF)
  echo "$built" >.ws/stamp
fi
say 'ready:  . scripts/env.sh'
