#!/usr/bin/env bash
# SD 3.5 Medium in 4 steps: the whole network on one GPU of 80 GB, from captions to a row of a table.
#
# bash runs/sd35_medium_1x80gb.sh           (with DATA=data.json, a captions JSON; it goes on where it was stopped)
#
# Training, estimated by --dry_run, not measured: 68 GiB of GPU memory, 60 hours on an H100.
# 109 GiB of disk for checkpoints and the export. 5,000 images of student and teacher each come on top. It has been run
# whole with tiny networks (tests/test_runs.py), never with real weights.

TEACHER=${TEACHER:-stabilityai/stable-diffusion-3.5-medium}
SCRIPT=train_senseflow_sd3.py CARD="A100 80 GB" OUT=${OUT:-runs/sd35-medium}
source "$(dirname "$0")/common.sh"
LAUNCH=(--config_file accelerate_configs/single.yaml)
FLAGS=(
    --pretrained_model_name_or_path "$TEACHER" --dataset_json "$DATA" --output_dir "$OUT" --use_8bit_adam
    --mixed_precision bf16 --gradient_checkpointing --gradient_accumulation_steps 8
    --max_train_steps "${STEPS:-27000}" --checkpoints_total_limit 2
    --validation_prompts "a lighthouse at dusk" "two cats playing chess"
)

download
dry_run
train
evaluate "| the paper, SD 3.5 Large | 5000 | 13.38 | 17.48 | 0.3286 | 0.3016 | 23.01 | 1.1713 |  |  |" \
    --num_inference_steps "${TEACHER_STEPS:-50}" --guidance_scale 7
