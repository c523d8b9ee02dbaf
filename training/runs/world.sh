#!/bin/sh
# The second world's base models, from nothing: drawn pictures, then everything that is trained on them. On two CPU
# cores it takes a night or two. A finished stage is skipped and a stopped one goes on where it was, so the same command
# always continues. Two stages at a time, one thread each: on small models two processes do more than two threads.
#
#     PREFGEN_ATELIER_WEIGHTS=/somewhere RUNS=/elsewhere sh training/runs/world.sh
#     sh training/runs/world.sh --set atelier.world.unet.steps=9000       every stage takes the same options
set -eu
cd "$(dirname "$0")/../.."
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
RUNS="${RUNS:-runs/world}"

stage() {
    started=$(date +%s)
    ${PYTHON:-.venv/bin/python} -m "training.atelier.world.$@" --runs "$RUNS" || { echo "$1 stopped; the same command goes on from there." >&2; exit 1; }
    echo "$1: $(($(date +%s) - started)) s"
}

${PYTHON:-.venv/bin/python} -m training.atelier.world.tokenizers
stage pool "$@"                      # 50,000 pictures with labels

(stage vae "$@") &                   # pictures <-> latents
vae=$!
(
    stage judge_a "$@"               # reads scenes off pictures; for choices
    stage clip "$@"                  # captions <-> pictures
    stage judge_b "$@"               # the same as judge A; for what is reported
    stage mllm_vision "$@"           # the MLLM's vision tower
) &
readers=$!
wait $vae
wait $readers
stage gate_vae "$@"
stage unet "$@" &                    # captions and trait tokens -> latents
unet=$!
stage captioning "$@"                # the MLLM's language model
${PYTHON:-.venv/bin/python} -m training.atelier.world.people "$RUNS/people" --processes 1
wait $unet
