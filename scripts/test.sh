#!/usr/bin/env bash
# Sets up what is missing, checks the style, runs the tests. Arguments go to pytest; without any,
# the fast tests run first and the slow ones after them.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh
set +u # what env.sh sources reads unset variables
. scripts/env.sh
set -u
# Two test runs on one machine must not hear each other.
export ROS_DOMAIN_ID=${ROS_DOMAIN_ID:-$(($$ % 100 + 1))}

ruff check

run_tests() { # killed when it hangs, as rclpy has done at shutdown
  timeout --foreground --kill-after=10 1200 python -m pytest "$@"
}
if [ $# -gt 0 ]; then
  run_tests "$@"
  exit
fi
status=0
run_tests -m 'not slow' || status=$?
if grep -rqE 'mark\.slow' --include='*.py' test; then
  run_tests -m slow || status=$?
fi
exit $status
