#!/bin/sh
# PrefGen on SDXL or SD1.5, from data to the one file that artists load. Paths stand in the configuration; docs/training.md
# says what each stage writes and what to look at. The same command goes on where it was stopped.
#
#     sh training/runs/sdxl.sh sdxl_24gb
#     sh training/runs/sdxl.sh sdxl_24gb --set mllm=smolvlm2_2b
#     LAUNCH="accelerate launch --config_file training/configs/accelerate/ddp.yaml" sh training/runs/sdxl.sh sdxl_8x80gb
set -eu
cd "$(dirname "$0")/../.."
config=${1:?name a configuration, such as sdxl_24gb}
shift
PYTHON=${PYTHON:-.venv/bin/python}
LAUNCH=${LAUNCH:-$PYTHON}                     # what starts a stage on several devices
DATA=${DATA:-data/agents}                     # data.path of the configuration
QUESTIONS=${QUESTIONS:-data/questions}        # data.questions of the configuration
PIPELINE=${PIPELINE:-models/sdxl-base-1.0}    # what paints the simulated users' pictures
OUT=${OUT:-runs/$(basename "$config" .yaml)/prefgen.safetensors}

$PYTHON -m training.data.agents "$DATA" --config "$config" --renderer diffusers --pipeline "$PIPELINE" --device cuda --dtype bfloat16
$PYTHON -m training.data check "$DATA"        # or a set of real people's choices: docs/pickapic.md
$PYTHON -m training.data.vqa "$DATA" "$QUESTIONS"  # questions that only a history answers

$LAUNCH -m training.train_mllm --config "$config" "$@"            # LoRA on the language model: reads histories
$LAUNCH -m training.extract --config "$config" "$@"               # hidden states, CLIP embeddings of the histories
$PYTHON -m training.probe_layers --config "$config" "$@"          # which layers give e_sem and e_core
$LAUNCH -m training.train_alignment --config "$config" "$@"       # e_sem -> the base's text space, by MMD
$LAUNCH -m training.train_user_attention --config "$config" "$@"  # the user branch beside the frozen UNet
$PYTHON -m training.export --config "$config" --out "$OUT" "$@"   # the one file that artists load
