#!/usr/bin/env bash
# Makes the figures about success: data, networks, gates, table, robustness. It takes many
# hours; run it again and it goes on where it stopped.
#
#   bash scripts/evidence.sh [STAGE...]   # default: data train controls gates table repeat
#                                        #          goal seeds spared robustness ros document
#   SPECPRUNE_EVIDENCE=DIR   # data and networks; default out/evidence
#   SPECPRUNE_FIGURES=DIR    # episodes; default docs/evidence, where episodes that were run count:
#                            # name another one to run all of them again
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
out=${SPECPRUNE_EVIDENCE:-out/evidence} figures=${SPECPRUNE_FIGURES:-docs/evidence}
bash scripts/setup_sim.sh
cores=$(nproc) # which goes by OMP_NUM_THREADS where that is set
MUJOCO_GL=$(cat .venv-sim/specprune_ros_gl)
export MUJOCO_GL PYOPENGL_PLATFORM=$MUJOCO_GL LP_NUM_THREADS=1 OMP_NUM_THREADS=1
specprune=.venv-sim/bin/specprune

NETWORK=shipped/libero_small # which is seed_0 of stage_train
SHUFFLED=(object_shuffled/{0..3})
GOALS=(libero_goal/{1,4,6,8})
STEPS=5000 # of a run, as config/train/libero.yaml has it
EARLIER='[4000,4500]' # checkpoints of one run
EPISODES=50 # per task
FIXED=specprune:budget=fixed
MAIN=(dense $FIXED specprune:budget=union random:budget=fixed uniform:budget=fixed)
STUDY=( # FlashVLA's reuse of actions and the other methods: not written yet
  $FIXED,alpha=1.0 $FIXED,alpha=0.6
  $FIXED,controller=false $FIXED,dynamic=false $FIXED,static=false
  $FIXED,dynamic=false,controller=false
  $FIXED,k_global=0,k_local_coarse=14,k_local_fine=18 # the paper gives K_local what K_global had
  $FIXED,layer_weight=average $FIXED,score_direction=image_to_text
  $FIXED,hysteresis=false # Alg. 1's stateless mode
  $FIXED,translation_threshold={0.3,0.7} $FIXED,rotation_threshold={0.1,0.4}
  $FIXED,k_global={5,10} $FIXED,k_local_coarse=3,k_dynamic_coarse=4
  $FIXED,k_local_coarse=9,k_dynamic_coarse=8
)

train() { # NAME, then settings
  local name=$1
  shift
  # In the background the shell itself becomes the training, so that it can be ended.
  ${background:-} $specprune train --params train/libero --out "$out/$name" \
    --set data.demos="[$out/demos]" --set data.layouts="[$out/layouts]" \
    --set data.gate="$out/gate" "$@" 9>&-
}

# Two networks at a time, each on one core: 9 GB of memory each. What they say is in NAME.log.
running=()
trap 'kill "${running[@]}" 2>/dev/null || true; wait' EXIT
beside() {
  if ((${#running[@]} > 1)); then
    wait "${running[0]}"
    running=("${running[@]:1}")
  fi
  background=exec "$@" >>"$out/$2.log" 2>&1 &
  running+=($!)
}

ended() {
  local one
  for one in "${running[@]}"; do
    wait "$one" || {
      echo "evidence: a training stopped: see $out/*.log" >&2
      exit 1
    }
  done
  running=()
}

trained() { # FOLDER STEP: an interrupted run leaves a checkpoint, too
  if [ ! -e "$out/$1/action_head--$2_checkpoint.pt" ]; then
    echo "evidence: $out/$1 is no network of step $2: has its training ended?" >&2
    exit 1
  fi
}

shipped() { # FOLDER: earlier steps of another run would pass for the shipped network's
  local digest='.venv/bin/python scripts/evidence_tables.py --weights'
  if [ "$($digest "$out/$1")" != "$($digest)" ]; then
    echo "evidence: $out/$1 is not $NETWORK" >&2
    exit 1
  fi
}

evaluate() { # CHECKPOINT, NAME, then arguments
  local checkpoint=$1 name=$2
  shift 2
  $specprune eval "$checkpoint" --out "$figures/$name" --json "$figures/$name.json" \
    --seeds $EPISODES --workers "$cores" "$@" 9>&-
}

stage_data() {
  $specprune collect --task "${SHUFFLED[@]}" "${GOALS[@]}" --episodes 75 --out "$out/demos" \
    --workers "$cores"
  $specprune collect --layouts 20000 --out "$out/layouts" --workers "$cores"
  $specprune collect --layouts 600 --split eval --out "$out/gate" --workers "$cores"
}

stage_train() {
  beside train seed_0 --set fit.seed=0 --set fit.keep="$EARLIER"
  beside train seed_1 --set fit.seed=1
  beside train seed_2 --set fit.seed=2
  ended
}

stage_controls() { # what a network learns that is never shown images, or never told what to do
  # Which patches are there must not tell it where the object is: none are spared.
  beside train control_grey --set data.withheld=images --set fit.token_spared=0.0
  beside train control_mute --set data.withheld=instruction --set fit.token_spared=0.0
  ended
}

stage_gates() {
  local condition
  for condition in grey withheld wrong; do
    evaluate "$NETWORK" "gate_$condition" --method dense --task "${SHUFFLED[@]}" \
      --condition $condition
  done
  trained control_grey/checkpoint $STEPS
  evaluate "$out/control_grey/checkpoint" gate_trained_grey --method dense --task "${SHUFFLED[@]}" \
    --condition grey
  trained control_mute/checkpoint $STEPS
  evaluate "$out/control_mute/checkpoint" gate_trained_mute --method dense --task "${SHUFFLED[@]}" \
    --condition withheld
  evaluate "$NETWORK" gate_goal_grey --method dense --task "${GOALS[@]}" \
    --condition grey
}

stage_table() {
  evaluate "$NETWORK" table --method "${MAIN[@]}" "${STUDY[@]}" \
    --task "${SHUFFLED[@]}"
}

stage_repeat() { # the same counts again?
  evaluate "$NETWORK" repeat --method dense $FIXED --task "${SHUFFLED[@]}"
}

stage_goal() {
  evaluate "$NETWORK" goal --method dense $FIXED random:budget=fixed \
    --task "${GOALS[@]}"
}

stage_seeds() {
  local run
  trained seed_0/checkpoint $STEPS
  shipped seed_0/checkpoint
  for run in seed_1/checkpoint seed_2/checkpoint seed_0/step_4000 seed_0/step_4500; do
    case $run in
      */checkpoint) trained "$run" $STEPS ;;
      *) trained "$run" "${run##*_}" ;;
    esac
    evaluate "$out/$run" "main_${run%/*}_${run#*/}" --task "${SHUFFLED[@]}" \
      --method dense $FIXED random:budget=fixed
  done
}

stage_spared() { # networks that did without the named object's patches, too: what does `random` lose?
  local percent
  beside train spared_0 --set fit.token_spared=0.0
  beside train spared_50 --set fit.token_spared=0.5
  ended
  for percent in 0 50; do
    trained "spared_$percent/checkpoint" $STEPS
    evaluate "$out/spared_$percent/checkpoint" spared_$percent --task "${SHUFFLED[@]}" \
      --method dense $FIXED random:budget=fixed
  done
}

stage_robustness() {
  local condition
  for condition in noise blur dark bright camera; do
    evaluate "$NETWORK" "robust_$condition" --task "${SHUFFLED[@]}" \
      --method dense $FIXED random:budget=fixed --condition $condition
  done
  evaluate "$NETWORK" robust_pro --method dense $FIXED random:budget=fixed \
    --task libero_object/0 libero_object_{object,swap,lan,task}/0 # 50 states are all there are
}

stage_ros() { # the same episodes through the nodes, which run what ships
  local index folder weights
  evaluate $NETWORK ros_plain --method specprune --open-loop-steps 4 --seeds 5 \
    --task "${SHUFFLED[@]}"
  weights=$(.venv/bin/python scripts/evidence_tables.py --weights)
  for index in "${!SHUFFLED[@]}"; do
    folder=$out/ros/$weights/$index
    [ -d "$folder" ] && continue
    rm -rf "$folder.partial"
    env -u OMP_NUM_THREADS bash scripts/demo.sh --task "${SHUFFLED[index]}" --seed 0 \
      --episodes 5 --out "$folder.partial"
    mv "$folder.partial" "$folder"
  done
  .venv/bin/python scripts/evidence_tables.py --ros "$figures/ros_plain/episodes.csv" \
    "$out/ros/$weights"/*/episodes.json
}

stage_document() { .venv/bin/python scripts/evidence_tables.py; }

export SPECPRUNE_FIGURES=$figures
mkdir -p "$out" "$figures"
exec 9>"$out/lock"
flock -n 9 || {
  echo "evidence: another run works in $out" >&2
  exit 1
}
for stage in "${@:-data train controls gates table repeat goal seeds spared robustness ros document}"; do
  for one in $stage; do
    "stage_$one"
  done
done
