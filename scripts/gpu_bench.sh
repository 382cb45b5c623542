#!/usr/bin/env bash
# Measures everything that docs/performance.md asks of a GPU, in one call of less than 10 minutes.
# Each part is a process of its own: one that fails says so, and the rest goes on.
#
#   bash scripts/gpu_bench.sh [FOLDER]     # default out/gpu
#
# Needs python3 with torch for CUDA, transformers, PyYAML and NumPy; matplotlib for the pictures,
# pytest and hypothesis for the tests, torchao for int8 and fp8 are used where they are.
# PYTHON, PARAMS (a parameter file), REPEATS and LIMIT_S (seconds for all) can be set.
set -uo pipefail
out=$(mkdir -p "${1:-out/gpu}" && cd "${1:-out/gpu}" && pwd)
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}
params=${PARAMS:-models/random_7b}
repeats=${REPEATS:-40}
limit=${LIMIT_S:-570}
log=$out/gpu_bench.log
export PYTHONPATH=.${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
: >"$log"
failed=()

part() { # NAME SECONDS COMMAND...: run, log, and go on whatever comes of it
  local name=$1 seconds=$2 left=$((limit - SECONDS)) status=0
  shift 2
  printf '\n=== %s\n' "$name" | tee -a "$log"
  if [ "$left" -lt 15 ]; then
    status=124
    echo "not started: $limit s are over" | tee -a "$log"
  else
    timeout --kill-after=5 "$((seconds < left ? seconds : left))" "$@" 2>&1 | tee -a "$log"
    status=${PIPESTATUS[0]}
  fi
  [ "$status" = 0 ] || failed+=("$name (exit $status)")
  printf '=== %s: exit %s, %s s so far\n' "$name" "$status" "$SECONDS" | tee -a "$log"
}

bench() { # ARGUMENTS...: of `specprune bench`, with a picture where that can be drawn
  "$python" -m specprune_ros.bench --params "$params" "$@"
}
export -f bench
export python params

plot=()
"$python" -c 'import matplotlib' 2>/dev/null && plot=(--plot)
picture() { [ ${#plot[@]} = 0 ] || printf '%s\n' --plot "$out/$1.png"; }

methods=$("$python" -c 'from specprune_ros.pruning import METHODS; print(*METHODS)') || methods=
three=$out/rows.json

part machine 60 "$python" - <<'PY'
import platform, torch, transformers
print(platform.platform(), 'python', platform.python_version())
print('torch', torch.__version__, 'cuda', torch.version.cuda, 'transformers', transformers.__version__)
for i in range(torch.cuda.device_count()):
    print(torch.cuda.get_device_properties(i))
PY
# shellcheck disable=SC2046,SC2086 # several words each
part 'forms, 3 cameras' 170 bash -c 'bench "$@"' bench --cameras 3 --repeats "$repeats" \
  --breakdown --json "$three" $(picture rows)
part targets 30 "$python" scripts/gpu_targets.py "$three"
part 'launches, waits and copies' 90 bash -c 'bench "$@"' bench --cameras 3 --repeats 2 \
  --forms sdpa graph --profile
part 'every method: graph against eager' 120 bash -c 'bench "$@"' bench --cameras 3 \
  --repeats "$((repeats / 2))" --methods $methods --forms sdpa graph --json "$out/methods.json"
part 'tests that need a GPU' 100 "$python" -m pytest -q -m gpu -p no:cacheprovider \
  test/test_graph.py test/test_preprocess.py
part '1 and 2 cameras' 100 bash -c 'bench "$@"' bench --cameras 1 2 --repeats "$repeats" \
  --forms sdpa graph --json "$out/rows12.json"
part 'cost against work' 150 bash -c 'bench "$@"' bench --work --forms "${WORK_FORM:-graph}" \
  --patches 64 256 576 --repeats "$((repeats / 5))" --json "$out/work.json" $(picture work)
part 'compile, int8, fp8' 150 bash -c 'bench "$@"' bench --cameras 3 \
  --repeats "$((repeats / 2))" --forms fused compile int8 fp8 --json "$out/more_forms.json"

printf '\n%s s; %s\n' "$SECONDS" "results and log in $out" | tee -a "$log"
if [ ${#failed[@]} -gt 0 ]; then
  printf 'FAILED: %s\n' "${failed[@]}" | tee -a "$log"
  exit 1
fi
