#!/usr/bin/env bash
# Sets everything up, then runs vla_node and a replay as ROS processes and shows what pruning did.
#
#   bash scripts/demo.sh [--recording PATH] [--instruction TEXT] [--out DIR] [--chunks N]
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
bash "$root/scripts/setup.sh"
set +u # what colcon and ROS generate reads unset variables
. "$root/scripts/env.sh"
set -u
# A domain of its own: another robot's nodes on this network stay out of the demo.
export ROS_DOMAIN_ID=${ROS_DOMAIN_ID:-$((30 + $$ % 70))}
case " $* " in
  *' --recording'*) ;;
  *) set -- --recording "$root/test/data/pick_place" "$@" ;;
esac
exec python -m specprune_ros.ros.demo "$@"
