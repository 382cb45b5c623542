#!/usr/bin/env bash
# Sets everything up, then lets a simulated arm do a task: sim_node, vla_node and action_streamer as
# ROS processes. With --recording no simulator is installed (2 GB): a replay takes the arm's place.
#
#   bash scripts/demo.sh [--task NAME] [--seed N] [--episodes N] [--rate R] [--out DIR]
#   bash scripts/demo.sh --recording [PATH] [--instruction TEXT] [--out DIR] [--chunks N]
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
case " $* " in
  *' --recording'*)
    module=demo
    bash "$root/scripts/setup.sh" ;;
  *)
    module=demo_loop
    bash "$root/scripts/setup_sim.sh" || {
      echo 'demo: without the simulator:  bash scripts/demo.sh --recording' >&2
      exit 1
    }
    MUJOCO_GL=$(cat "$root/.venv-sim/specprune_ros_gl")
    export MUJOCO_GL PYOPENGL_PLATFORM=$MUJOCO_GL
    set -- --sim-python "$root/.venv-sim/bin/python" "$@" ;;
esac
set +u # what colcon and ROS generate reads unset variables
. "$root/scripts/env.sh"
set -u
# A domain of its own: another robot's nodes on this network stay out of the demo.
export ROS_DOMAIN_ID=${ROS_DOMAIN_ID:-$((30 + $$ % 70))}
exec python -m specprune_ros.ros.$module "$@"
