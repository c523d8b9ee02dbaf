#!/bin/sh
# The atelier's second edition on one page, from nothing: drawn pictures, the base models that are trained on them,
# PrefGen, and the evaluation. On two CPU cores it takes nights. A finished stage is skipped and a stopped one goes on
# where it was, so the same command always continues. Two stages at a time, one thread each: on small models two
# processes do more than two threads.
#
#     PREFGEN_ATELIER_WEIGHTS=/somewhere RUNS=/elsewhere sh training/runs/world.sh
#     sh training/runs/world.sh --set atelier.world.unet.steps=9000       every stage takes the same options
#     ONLY=base sh training/runs/world.sh                                 the base models and the users alone
set -eu
cd "$(dirname "$0")/../.."
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
RUNS="${RUNS:-runs/world}"
# Of the branch, in every arm and in the method beside them.
ARM_STEPS="${ARM_STEPS:-1200}"

timed() {
    started=$(date +%s)
    ${PYTHON:-.venv/bin/python} -m "training.$@" || { echo "$1 stopped; the same command goes on from there." >&2; exit 1; }
    echo "$1: $(($(date +%s) - started)) s"
}

base() {
    name=$1
    shift
    timed "atelier.world.$name" --runs "$RUNS" "$@"
}

prefgen() {
    name=$1
    shift
    timed "$name" --config world --runs "$RUNS" --set "data.path=$RUNS/people" "$@"
}

# The world and its base models. A lab has them: SDXL, a CLIP, an MLLM.
timed atelier.world.tokenizers
base pool "$@"                      # 50,000 pictures with labels

(base vae "$@") &                   # pictures <-> latents
vae=$!
(
    base judge_a "$@"               # reads scenes off pictures; for choices
    base clip "$@"                  # captions <-> pictures
    base judge_b "$@"               # the same as judge A; for what is reported
) &
readers=$!
wait $vae
wait $readers
base gate_vae "$@"
(base unet "$@") &                  # captions and trait tokens -> latents
unet=$!
base vae_decoder "$@"               # the VAE's decoder, sharper: the UNet needs the encoder alone
base clip_vision "$@"               # CLIP's image tower for longer: the UNet needs the text tower alone
base mllm_vision "$@"               # the MLLM's vision tower
base captioning "$@"                # the MLLM's language model
timed atelier.world.people "$RUNS/people" --processes 1
if [ "${ONLY:-}" = base ]; then
    wait $unet
    exit
fi

# PrefGen, in the paper's order; the MLLM's part beside the UNet.
prefgen train_mllm "$@"             # the MLLM learns to read histories, by preference questions
prefgen extract "$@"                # hidden states and CLIP embeddings of many users' histories
prefgen probe_layers "$@"           # which layers give e_sem and e_core
prefgen train_alignment "$@"        # e_sem -> CLIP's text space, by MMD
wait $unet
prefgen train_user_attention "$@"   # the user branch of every cross-attention; writes the adapter

# What is measured: docs/evidence/second_edition.md.
timed evaluation.vqa_score --config world --runs "$RUNS" --set "data.path=$RUNS/people"
timed evaluation.world.arms --runs "$RUNS" --out "$RUNS/arms" --set "data.path=$RUNS/people" \
    --set "train_user_attention.steps=$ARM_STEPS"
timed evaluation.world --arms "$RUNS/arms" --runs "$RUNS/evaluation" --out "$RUNS/evidence" --short
