#!/bin/sh
# The first real run: PrefGen on SD1.5 for Pick-a-Pic's people, on one card with 24 GB, from the published files to an
# exported adapter and its evaluation. Nobody has run it yet. The same command goes on where it was stopped.
#
#     sh training/runs/sd15_pickapic.sh
#     SOURCE=/data/pickapic_v2 sh training/runs/sd15_pickapic.sh
#
# What it needs, all local, safetensors and Parquet only:
#   SOURCE   yuvalkirstain/pickapic_v2 as published, with pictures (not the no_images variant)
#   BASE     stable-diffusion-v1-5 as a diffusers folder
#   ADAPTER  ip-adapter_sd15.safetensors, whose K and V the branch starts from (python -m prefgen.download sd15)
#   CLIP     CLIP-ViT-H-14-laion2B-s32B-b79K, of transformers or open_clip
#   MLLM     SmolVLM2-2.2B-Instruct as a transformers folder
#
# Sizes and hours are arithmetic, and unmeasured. 25 TFLOP/s of bf16 is a third of the dense peak that NVIDIA's GA102 paper
# states for a 24 GB card (71), 12 of fp32 a third of 36; another card scales them. From diffusers' SD1.5 counted on the
# meta device by torch's FlopCounterMode: UNet at 512 pixels 0.80 TFLOP forward, 0.87 backward to K and V alone; VAE 1.12 a
# picture. MLLM: 2 operations a weight and token, 2.2 billion weights, 1,600 tokens for 16 pictures of 81; its vision tower
# 0.6 TFLOP a picture. Pick-a-Pic: 6,394 users (arXiv 2512.06020), nine in ten for training, and as many pictures as the
# planted tables leave (docs/performance.md), 749,000, of which 250,000 are liked by training users.
#
#   stage                  operations, TFLOP                             hours   disk
#   pickapic               decodes each picture once                     6       100 GB, at 130 KB a picture
#   vqa, traits            5,700 users x 20, and 2 answers of 60 words   3       0.1 GB
#   train_mllm             2,000 steps x 32 x (4 x 7.2 + 10)             28      0.1 GB
#   extract                5,700 x 2 histories x 17                      2       1.2 GB
#   probe, alignment       an MLP                                        1
#   latents                250,000 x 1.12, in fp32                       7       8 GB, at 32 KB a picture
#   train_user_attention   40,000 steps x 32 x (0.80 + 0.87 + 0.80)      35      2 GB of checkpoints
#   compare                2,304 pictures x 30 steps x 2 x 0.80          1       1 GB
#   together                                                             83      113 GB
set -eu
cd "$(dirname "$0")/../.."
PYTHON=${PYTHON:-.venv/bin/python}
LAUNCH=${LAUNCH:-$PYTHON}                                  # what starts a stage on several devices
CONFIG=${CONFIG:-sd15_pickapic}
RUNS=${RUNS:-runs/sd15_pickapic}
SOURCE=${SOURCE:-data/pickapic_v2}
DATA=${DATA:-data/pickapic}                                # data.path of the configuration
QUESTIONS=${QUESTIONS:-data/pickapic-questions}            # data.questions of the configuration
BASE=${BASE:-models/stable-diffusion-v1-5}
ADAPTER=${ADAPTER:-models/ipadapter/ip-adapter_sd15.safetensors}
CLIP=${CLIP:-models/CLIP-ViT-H-14-laion2B-s32B-b79K}
MLLM=${MLLM:-models/mllm/SmolVLM2-2.2B-Instruct}
OUT=${OUT:-$RUNS/prefgen.safetensors}
COMPARE=${COMPARE:---users 48 --prompts 4 --seeds 2}       # --pickscore, --csd and --viper add judges: docs/compare.md
set -- --config "$CONFIG" --runs "$RUNS" --set data.path="$DATA" --set data.questions="$QUESTIONS" \
    --set base.path="$BASE" --set base.ip_adapter="$ADAPTER" --set clip_vision.path="$CLIP" --set mllm.path="$MLLM" "$@"

# A wrong path is known before the first hour, and not before the last one.
$PYTHON -c 'import os, sys; sys.exit(next((f"{path} is not there" for path in sys.argv[1:] if not os.path.exists(path)), 0))' \
    "$SOURCE" "$BASE" "$ADAPTER" "$CLIP" "$MLLM"

$PYTHON -m training.data.pickapic "$SOURCE" "$DATA"               # people's choices, cleaned: docs/pickapic.md
$PYTHON -m training.data check "$DATA"
$PYTHON -m training.data.vqa "$DATA" "$QUESTIONS"                 # questions that only a history answers
$PYTHON -m training.data.traits "$DATA" --mllm "$MLLM"            # what each user likes, in the MLLM's words

$LAUNCH -m training.train_mllm "$@"                               # LoRA on the language model: reads histories
$LAUNCH -m training.extract "$@"                                  # hidden states, CLIP embeddings of the histories
$PYTHON -m training.probe_layers "$@"                             # which layers give e_sem and e_core
$LAUNCH -m training.train_alignment "$@"                          # e_sem -> the base's text space, by MMD
$LAUNCH -m training.train_user_attention "$@"                     # the user branch beside the frozen UNet
$PYTHON -m training.export "$@" --out "$OUT"                      # the one file that artists load

shift 4                                                           # compare takes no --runs
$PYTHON -m training.evaluation.compare --config "$CONFIG" "$@" --adapter "$OUT" --lora "$RUNS/train_mllm/lora" \
    --clip "$CLIP" --out "$RUNS/compare" $COMPARE
