#!/usr/bin/env bash
# FLUX.1-dev in 4 steps: an adapter (LoRA) on one GPU of 80 GB, from captions to a row beside the paper's.
#
# bash runs/flux_lora_1x80gb.sh           (with DATA=data.json, a captions JSON; it goes on where it was stopped)
#
# Training, estimated by --dry_run, not measured: 58 GiB of GPU memory, 52 hours on an H100.
# 44 GiB of disk for checkpoints and the export. 5,000 images of student and teacher each come on top. It has been run
# whole with tiny networks (tests/test_runs.py), never with real weights.

TEACHER=${TEACHER:-black-forest-labs/FLUX.1-dev}
SCRIPT=train_senseflow_flux.py CARD="A100 80 GB" OUT=${OUT:-runs/flux-lora}
source "$(dirname "$0")/common.sh"
LAUNCH=(--config_file accelerate_configs/single.yaml)
FLAGS=(
    --pretrained_model_name_or_path "$TEACHER" --dataset_json "$DATA" --output_dir "$OUT" --rank 64
    --mixed_precision bf16 --gradient_checkpointing --gradient_accumulation_steps 8
    --max_train_steps "${STEPS:-12000}" --checkpoints_total_limit 2
    --validation_prompts "a lighthouse at dusk" "two cats playing chess"
)

download
dry_run
train
evaluate "| the paper, FLUX.1-dev in full | 5000 | 15.64 | 19.6 | 0.3167 | 0.2997 | 23.13 | 1.0921 |  |  |" \
    --num_inference_steps "${TEACHER_STEPS:-50}" --guidance_scale 3.5
