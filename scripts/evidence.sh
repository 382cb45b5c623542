#!/usr/bin/env bash
# Makes the figures about success: data, networks, gates, table, robustness. It takes many
# hours; run it again and it goes on where it stopped.
#
#   bash scripts/evidence.sh [STAGE...]      # data train controls gates table seeds robustness
#   SPECPRUNE_EVIDENCE=DIR                   # default out/evidence
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
out=${SPECPRUNE_EVIDENCE:-out/evidence}
bash scripts/setup_sim.sh
cores=$(nproc) # which goes by OMP_NUM_THREADS where that is set
MUJOCO_GL=$(cat .venv-sim/specprune_ros_gl)
export MUJOCO_GL PYOPENGL_PLATFORM=$MUJOCO_GL LP_NUM_THREADS=1 OMP_NUM_THREADS=1
specprune=.venv-sim/bin/specprune

SHUFFLED=(object_shuffled/{0..3})
GOALS=(libero_goal/{1,4,6,8})
STEPS=6000 EARLIER='[4500,5250]' # checkpoints of one run
EPISODES=50 # per task
FIXED=specprune:budget=fixed
MAIN=(dense $FIXED specprune:budget=union random:budget=fixed uniform:budget=fixed)
STUDY=( # FlashVLA's reuse of actions and the other methods: not written yet
  $FIXED,alpha=1.0 $FIXED,alpha=0.6
  $FIXED,controller=false $FIXED,k_global=0 $FIXED,dynamic=false $FIXED,static=false
  $FIXED,layer_weight=average $FIXED,score_direction=image_to_text
  $FIXED,hysteresis=false # Alg. 1's stateless mode
)

train() { # NAME, then settings
  local name=$1
  shift
  $specprune train --params train/libero --out "$out/$name" \
    --set data.demos="[$out/demos]" --set data.layouts="[$out/layouts]" \
    --set data.gate="$out/gate" --set fit.threads="$cores" --set fit.steps=$STEPS "$@"
}

evaluate() { # CHECKPOINT, NAME, then arguments
  local checkpoint=$1 name=$2
  shift 2
  $specprune eval "$checkpoint" --out "$out/eval/$name" --json "$out/eval/$name.json" \
    --seeds $EPISODES --workers "$cores" "$@"
}

stage_data() {
  $specprune collect --task "${SHUFFLED[@]}" "${GOALS[@]}" --episodes 75 --out "$out/demos" \
    --workers "$cores"
  $specprune collect --layouts 20000 --out "$out/layouts" --workers "$cores"
  $specprune collect --layouts 600 --split eval --out "$out/gate" --workers "$cores"
}

stage_train() {
  train seed_0 --set fit.seed=0 --set fit.keep="$EARLIER"
  for seed in 1 2; do train "seed_$seed" --set fit.seed=$seed; done
}

stage_controls() { # what a network learns that is never shown images, or never told what to do
  train grey --set data.withheld=images
  train mute --set data.withheld=instruction
}

stage_gates() {
  local condition
  for condition in normal grey withheld wrong; do
    evaluate "$out/seed_0/checkpoint" "gate_$condition" --method dense --task "${SHUFFLED[@]}" \
      --condition $condition
  done
  evaluate "$out/grey/checkpoint" gate_trained_grey --method dense --task "${SHUFFLED[@]}" \
    --condition grey
  evaluate "$out/mute/checkpoint" gate_trained_mute --method dense --task "${SHUFFLED[@]}" \
    --condition withheld
  evaluate "$out/seed_0/checkpoint" gate_goal --method dense --task "${GOALS[@]}"
  evaluate "$out/seed_0/checkpoint" gate_goal_grey --method dense --task "${GOALS[@]}" \
    --condition grey
}

stage_table() {
  evaluate "$out/seed_0/checkpoint" table --method "${MAIN[@]}" "${STUDY[@]}" \
    --task "${SHUFFLED[@]}"
}

stage_seeds() {
  local run
  for run in seed_1/checkpoint seed_2/checkpoint seed_0/step_4500 seed_0/step_5250; do
    evaluate "$out/$run" "main_${run%/*}_${run#*/}" --task "${SHUFFLED[@]}" \
      --method dense $FIXED random:budget=fixed
  done
}

stage_robustness() {
  local condition
  for condition in noise blur dark bright camera; do
    evaluate "$out/seed_0/checkpoint" "robust_$condition" --task "${SHUFFLED[@]}" \
      --method dense $FIXED random:budget=fixed --condition $condition
  done
  evaluate "$out/seed_0/checkpoint" robust_pro --method dense $FIXED random:budget=fixed \
    --task libero_object/0 libero_object_{object,swap,lan,task}/0 # 50 states are all there are
}

mkdir -p "$out/eval"
for stage in "${@:-data train controls gates table seeds robustness}"; do
  for one in $stage; do
    "stage_$one"
  done
done
