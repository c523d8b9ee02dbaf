#!/bin/sh
# The whole pipeline on one page: from nothing to the weights under prefgen/atelier/weights. On two CPU cores it takes
# hours. A finished stage is skipped and a stopped one goes on where it was, so the same command always continues.
#
#     make train-atelier
#     make train-atelier ARGS="--runs runs/other --set train_mllm.steps=800"     every stage takes the same options
#     make train-atelier ARGS="--start-from prefgen/atelier/weights"             VAE, CLIP, judge, UNet, MLLM go on from there
#     BASE=shipped make train-atelier       the base stays as shipped, the MLLM goes on, what comes after it from nothing
set -eu
cd "$(dirname "$0")/../.."

stage() {
    started=$(date +%s)
    ${PYTHON:-.venv/bin/python} -m "training.$@" || { echo "$1 stopped; the same command goes on from there." >&2; exit 1; }
    echo "$1: $(($(date +%s) - started)) s"
}

# The world and its base models. A lab has them: SDXL, a CLIP, an MLLM.
if [ "${BASE:-}" = shipped ]; then
    on="--start-from prefgen/atelier/weights"
    on="$on --set train_mllm.steps=1200 --set train_mllm.lr=0.0007 --set train_mllm.warmup=100"
    stage atelier.pool "$@"
    stage atelier.mllm_vision $on --set atelier.mllm_vision.steps=0 "$@"
else
    on=""
    stage atelier.tokenizers           # vocabularies of CLIP and the MLLM
    stage atelier.pool "$@"            # 40,000 pictures with labels
    stage atelier.vae "$@"             # pictures <-> latents
    stage atelier.clip "$@"            # captions <-> pictures
    stage atelier.judge "$@"           # reads attributes off pictures; trained on renders alone
    stage atelier.unet "$@"            # captions -> latents
    stage atelier.mllm_vision "$@"     # the MLLM's vision tower
fi

# PrefGen, in the paper's order.
stage train_mllm $on "$@"          # the MLLM learns to read histories
stage extract "$@"                 # hidden states and CLIP embeddings of many users' histories
stage probe_layers "$@"            # which layers give e_sem and e_core
stage train_alignment "$@"         # e_sem -> CLIP's text space, by MMD
stage train_user_attention "$@"    # the user branch of every cross-attention; writes the adapter
