#!/usr/bin/env python
# Copyright 2026 The SenseFlow-scripts authors. Licensed under the Apache License, Version 2.0.
"""Distill FLUX.2 dev to few steps with SenseFlow: train_senseflow_flux.py with another teacher.

    accelerate launch --config_file accelerate_configs/fsdp2.yaml teachers/train_senseflow_flux2.py \
        --pretrained_model_name_or_path black-forest-labs/FLUX.2-dev --dataset_json data.json \
        --output_dir flux2-4step --mixed_precision bf16 --gradient_checkpointing --offload_text_encoders

Its text processor needs torchvision. Tried with tiny networks, not with the published weights (docs/teachers.md).
"""

import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the scripts, without pip install -e .

from senseflow.arguments import make_flow_parser, number
from senseflow.errors import run_script


# fmt: off
def parse_args(argv=None):
    parser = make_flow_parser(
        __doc__.split("\n\n")[0],
        "The defaults are those of the SenseFlow release for FLUX.1-dev, but for --anchors, which are SD 3.5's: of "
        "the teacher's own 4 steps, 1000 967 908 767 at 1024 pixels, the first two are too close for --isg_margin. "
        "omega(t) of the adversarial losses is (1 - sigma)^2.",
        "Flux2Pipeline", "Flux2Transformer2DModel", max_tokens=512,
    )
    parser.add_argument_group("guidance").add_argument(
        "--student_guidance_scale", type=number(float, 0), default=4.0,
        help="Guidance that the embedder of student and fake score gets in every call.",
    )
    parser.set_defaults(
        anchors=[1000.0, 900.0, 750.0, 500.0], max_sequence_length=512, teacher_guidance_scale=4.0,
        ttur_ratio=5, ida_decay=0.97, isg_weight=1.0, isg_margin=20.0, gan_weight=2.0, backward_simulation_prob=0.5,
        dmd_guidance_scale=[1.0, 8.0], isg_guidance_scale=[1.0, 8.0],
        learning_rate=1e-5, lr_scheduler="constant_with_warmup", lr_warmup_steps=500, lr_warmup_start_factor=0.5,
        max_train_steps=12000, checkpointing_steps=1500, teacher_num_inference_steps=50,
        # Attention and feed-forward, which in the single blocks are one layer in and one out.
        lora_layers=[
            r".*blocks\.\d+\.(attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out|to_qkv_mlp_proj)"
            r"|ff(_context)?\.linear_(in|out))|single_transformer_blocks\.\d+\.attn\.to_out"
        ],
    )
    return parser.parse_args(argv)
# fmt: on


if __name__ == "__main__":
    run_script(parse_args)  # answer --help and bad arguments before the slow imports

from functools import partial

from diffusers import Flux2Pipeline

import train_senseflow_flux as flux
from senseflow.training.models import TrainingModels
from train_senseflow_flux2_klein import Flux2KleinModels


class Flux2Models(Flux2KleinModels):
    """FLUX.2 dev: the network of klein with a guidance embedder, which the student keeps."""

    parse_args = staticmethod(parse_args)
    pipeline_class = Flux2Pipeline

    @classmethod
    def student_guidance_kwargs(cls, args, source):
        return {"guidance_scale": args.student_guidance_scale}

    def make_student(self):
        return TrainingModels.make_student(self)  # FLUX.1's is folded into a bias


main = partial(flux.main, models=Flux2Models)

if __name__ == "__main__":
    run_script(main)
