#!/usr/bin/env bash
# SDXL in 4 steps for a style or subject: an adapter (LoRA) from a folder of about 20 photos, on one GPU of 24 GB.
#
# PHOTOS=photos bash runs/photos_lora_1x24gb.sh     (photos/0.jpg, and its caption in photos/0.txt; it goes on where it
# was stopped)
#
# The teacher has to know the subject or style already: give a fine-tuned one as TEACHER, or its LoRA by
# TRAIN="--teacher_lora my-style.safetensors". Distillation keeps what the teacher draws; the photos are what the
# discriminator takes for real, and their captions are the prompts of training and evaluation.
# Training, estimated by --dry_run, not measured: 20 GiB of GPU memory, 7 hours on an RTX 4090. 9 GiB of disk for
# checkpoints and the export. It has been run whole with tiny networks (tests/test_runs.py), never with real weights;
# how few photos are enough has not been tried.

PHOTOS=${PHOTOS:-photos} DATA=unused
TEACHER=${TEACHER:-stabilityai/stable-diffusion-xl-base-1.0}
SCRIPT=train_senseflow_sdxl.py CARD="RTX 4090" OUT=${OUT:-runs/photos-lora}
PROMPTS=$OUT-prompts.txt METRICS="clip diversity" IMAGES=2  # diversity compares images of a prompt
source "$(dirname "$0")/common.sh"
LAUNCH=(--config_file accelerate_configs/single.yaml)
FLAGS=(
    --pretrained_model_name_or_path "$TEACHER" --train_data_dir "$PHOTOS" --output_dir "$OUT" --rank 64
    --mixed_precision bf16 --gradient_checkpointing --use_8bit_adam --offload_text_encoders
    --discriminator_backbone "${BACKBONE:-facebook/dinov2-small}" --gradient_accumulation_steps 8
    --max_train_steps "${STEPS:-2000}" --checkpointing_steps 500 --checkpoints_total_limit 2 --random_flip
)

awk 1 "$PHOTOS"/*.txt > "$PROMPTS"
dry_run
train
evaluate "" --num_inference_steps "${TEACHER_STEPS:-40}" --guidance_scale 5
