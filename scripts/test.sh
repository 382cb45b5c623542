#!/usr/bin/env bash
# Sets up what is missing, checks the style, runs the tests. Arguments go to pytest; without any,
# the fast tests run first, and the slow ones beside them.
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
  timeout --foreground --kill-after=10 1400 python -m pytest "$@"
}
if [ $# -gt 0 ]; then
  run_tests "$@"
  exit
fi
# The slow tests mostly wait for processes: they run beside the fast ones, which need a core and no
# ROS domain.
log=$(mktemp) journal=$(mktemp)
slow_tests() {
  timeout --foreground --kill-after=10 1400 python -m pytest -m slow --journal="$journal"
}
all_slow_tests() {
  local status=0
  slow_tests || status=$?
  if [ $status -eq 139 ]; then # rclpy, rarely, where a test's node is destroyed
    echo 'test: the interpreter crashed in the test above; going on with that test'
    status=0
    slow_tests || status=$?
    if grep '^failed ' "$journal"; then status=1; fi
  fi
  return $status
}
set -m # a process group, to be ended as a whole
all_slow_tests >"$log" 2>&1 &
slow=$!
set +m
trap 'kill -- -"$slow" 2>/dev/null || true; rm -f "$log" "$journal"' EXIT
status=0
run_tests -m 'not slow' || status=$?
echo 'the slow tests, so far and to come:'
tail -n +1 -f --pid=$slow "$log"
wait $slow || status=$?
exit $status
