#!/usr/bin/env python
# Copyright 2026 The SenseFlow-scripts authors. Licensed under the Apache License, Version 2.0.
"""Distill Krea 2 to few steps with SenseFlow: train_senseflow_flux.py with another teacher.

    accelerate launch --config_file accelerate_configs/fsdp2.yaml teachers/train_senseflow_krea2.py \
        --pretrained_model_name_or_path PATH_OR_HUB_ID_OF_KREA2 --dataset_json data.json --output_dir krea2-4step \
        --mixed_precision bf16 --gradient_checkpointing --offload_text_encoders

A checkpoint that is distilled already, with `is_distilled`, is refused. Tried with tiny networks, not with the
published weights (docs/teachers.md).
"""

import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the scripts, without pip install -e .

from senseflow.arguments import make_flow_parser
from senseflow.errors import run_script


# fmt: off
def parse_args(argv=None):
    parser = make_flow_parser(
        __doc__.split("\n\n")[0],
        "The defaults are those of the SenseFlow release for FLUX.1-dev. The default of --anchors is the teacher's "
        "own 4-step schedule at --resolution: 1000 881.4 712.4 452.2 at 1024 pixels. Guidance scales count from 1 for "
        "no guidance, the pipeline's from 0. omega(t) of the adversarial losses is (1 - sigma)^2.",
        "Krea2Pipeline", "Krea2Transformer2DModel", max_tokens=512,
    )
    parser.set_defaults(
        max_sequence_length=512, teacher_guidance_scale=5.5,
        ttur_ratio=5, ida_decay=0.97, isg_weight=1.0, isg_margin=20.0, gan_weight=2.0, backward_simulation_prob=0.5,
        dmd_guidance_scale=[1.0, 8.0], isg_guidance_scale=[1.0, 8.0],
        learning_rate=1e-5, lr_scheduler="constant_with_warmup", lr_warmup_steps=500, lr_warmup_start_factor=0.5,
        max_train_steps=12000, checkpointing_steps=1500, teacher_num_inference_steps=28,
        # Of the blocks, not of the fusion of text layers.
        lora_layers=[r"transformer_blocks\.\d+\.(attn\.(to_[qkv]|to_gate|to_out\.0)|ff\.(gate|up|down))"],
    )
    return parser.parse_args(argv)
# fmt: on


if __name__ == "__main__":
    run_script(parse_args)  # answer --help and bad arguments before the slow imports

from functools import partial

import torch
from diffusers import AutoencoderKLQwenImage, FluxPipeline, Krea2Pipeline, Krea2Transformer2DModel

import train_senseflow_flux as flux
from senseflow.training.models import TrainingModels


class Krea2Models(flux.FluxModels):
    """Krea 2: hidden states of several layers of the text encoder, with a mask; guidance that counts from 0."""

    parse_args = staticmethod(parse_args)
    pipeline_class, network_class = Krea2Pipeline, Krea2Transformer2DModel
    vae_class = AutoencoderKLQwenImage
    pipeline_entries = ("text_encoder_select_layers",)
    compatible_config = ("in_channels", "text_hidden_dim", "num_text_layers")
    comfyui_shift, lora_base, comfyui_guidance = None, TrainingModels.lora_base, TrainingModels.comfyui_guidance

    @classmethod
    def student_guidance_kwargs(cls, args, source):
        return {"guidance_scale": 0.0}

    def teacher_pipeline_kwargs(self):
        steps, guidance = self.args.teacher_num_inference_steps, self.args.teacher_guidance_scale
        return {"num_inference_steps": steps, "guidance_scale": max(guidance - 1, 0.0), "sigmas": None}

    @torch.no_grad()
    def encode_prompts(self, prompts):
        """Encode prompts to (hidden states (B, L, layers, D), mask (B, L)); the pipeline pads them."""
        length = self.args.max_sequence_length
        return self.pipeline.encode_prompt(list(prompts), device=self.device, max_sequence_length=length)

    def network_output(self, role, x_t, t, condition):
        batch, channels, height, width = x_t.shape
        states, mask = condition
        output = role(
            hidden_states=FluxPipeline._pack_latents(x_t.to(role.dtype), batch, channels, height, width),
            encoder_hidden_states=states,
            timestep=(t / 1000).to(role.dtype),
            position_ids=Krea2Pipeline.prepare_position_ids(states.shape[1], height // 2, width // 2, x_t.device),
            encoder_attention_mask=mask,
            return_dict=False,
        )[0]
        output = output.view(batch, height // 2, width // 2, channels, 2, 2)
        return output.permute(0, 3, 1, 4, 2, 5).reshape(x_t.shape)


main = partial(flux.main, models=Krea2Models)

if __name__ == "__main__":
    run_script(main)
