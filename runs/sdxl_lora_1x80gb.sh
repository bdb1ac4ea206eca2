#!/usr/bin/env bash
# SDXL in 4 steps: an adapter (LoRA) on one GPU of 80 GB, from captions to a row beside the paper's.
#
# bash runs/sdxl_lora_1x80gb.sh           (with DATA=data.json, a captions JSON; it goes on where it was stopped)
#
# Training, estimated by --dry_run, not measured: 35 GiB of GPU memory, 54 hours on an H100.
# 40 GiB of disk for checkpoints and the export. 5,000 images of student and teacher each come on top. It has been run
# whole with tiny networks (tests/test_runs.py), never with real weights.

TEACHER=${TEACHER:-stabilityai/stable-diffusion-xl-base-1.0}
SCRIPT=train_senseflow_sdxl.py CARD="A100 80 GB" OUT=${OUT:-runs/sdxl-lora}
source "$(dirname "$0")/common.sh"
LAUNCH=(--config_file accelerate_configs/single.yaml)
FLAGS=(
    --pretrained_model_name_or_path "$TEACHER" --dataset_json "$DATA" --output_dir "$OUT" --rank 64
    --mixed_precision bf16 --gradient_checkpointing --gradient_accumulation_steps 8
    --max_train_steps "${STEPS:-18000}" --checkpoints_total_limit 2
    --validation_prompts "a lighthouse at dusk" "two cats playing chess"
)

download
dry_run
train
evaluate "| the paper, SDXL in full | 5000 | 17.76 | 21.01 | 0.3248 | 0.301 | 23.17 | 0.9951 |  |  |" \
    --num_inference_steps "${TEACHER_STEPS:-40}" --guidance_scale 5
