#!/usr/bin/env python
# Copyright 2026 The SenseFlow-scripts authors. Licensed under the Apache License, Version 2.0.
"""Distill Ovis-Image to few steps with SenseFlow: train_senseflow_flux.py with another teacher.

    accelerate launch --config_file accelerate_configs/fsdp2.yaml teachers/train_senseflow_ovis_image.py \
        --pretrained_model_name_or_path AIDC-AI/Ovis-Image-7B --dataset_json data.json --output_dir ovis-4step \
        --mixed_precision bf16 --gradient_checkpointing --offload_text_encoders

Its pipeline loads no adapters: --rank is refused. Tried with tiny networks, not with the published weights
(docs/teachers.md).
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
        "own 4-step schedule at --resolution. omega(t) of the adversarial losses is (1 - sigma)^2.",
        "OvisImagePipeline", "OvisImageTransformer2DModel", max_tokens=256,
    )
    parser.set_defaults(
        max_sequence_length=256, teacher_guidance_scale=5.0,
        ttur_ratio=5, ida_decay=0.97, isg_weight=1.0, isg_margin=20.0, gan_weight=2.0, backward_simulation_prob=0.5,
        dmd_guidance_scale=[1.0, 8.0], isg_guidance_scale=[1.0, 8.0],
        learning_rate=1e-5, lr_scheduler="constant_with_warmup", lr_warmup_steps=500, lr_warmup_start_factor=0.5,
        max_train_steps=12000, checkpointing_steps=1500, teacher_num_inference_steps=50,
        lora_layers="to_q to_k to_v to_out.0 add_q_proj add_k_proj add_v_proj to_add_out net.0.proj net.2".split(),
    )
    return parser.parse_args(argv)
# fmt: on


if __name__ == "__main__":
    run_script(parse_args)  # answer --help and bad arguments before the slow imports

from functools import partial

import torch
from diffusers import OvisImagePipeline, OvisImageTransformer2DModel

import train_senseflow_flux as flux
from senseflow.training.models import TrainingModels


class OvisImageModels(flux.FluxModels):
    """Ovis-Image: FLUX's VAE and packing, text of one length with positions and no mask."""

    parse_args = staticmethod(parse_args)
    pipeline_class, network_class = OvisImagePipeline, OvisImageTransformer2DModel
    compatible_config = ("in_channels", "out_channels", "joint_attention_dim", "patch_size")
    comfyui_shift, lora_base, comfyui_guidance = None, TrainingModels.lora_base, TrainingModels.comfyui_guidance
    teacher_pipeline_kwargs = TrainingModels.teacher_pipeline_kwargs

    @torch.no_grad()
    def encode_prompts(self, prompts):
        """Encode prompts to (embeddings (B, L, D),); the pipeline pads them."""
        kwargs = {"do_classifier_free_guidance": False, "max_sequence_length": self.args.max_sequence_length}
        return self.pipeline.encode_prompt(list(prompts), device=self.device, **kwargs)[:1]

    def network_output(self, role, x_t, t, condition):
        batch, channels, height, width = x_t.shape
        (embeds,), pipeline = condition, OvisImagePipeline
        position = torch.arange(embeds.shape[1], device=x_t.device, dtype=role.dtype)
        output = role(
            hidden_states=pipeline._pack_latents(x_t.to(role.dtype), batch, channels, height, width),
            timestep=t.to(role.dtype) / 1000,
            encoder_hidden_states=embeds,
            txt_ids=torch.stack([torch.zeros_like(position), position, position], 1),
            img_ids=pipeline._prepare_latent_image_ids(batch, height // 2, width // 2, x_t.device, role.dtype),
            return_dict=False,
        )[0]
        output = output.view(batch, height // 2, width // 2, channels, 2, 2)
        return output.permute(0, 3, 1, 4, 2, 5).reshape(x_t.shape)


main = partial(flux.main, models=OvisImageModels)

if __name__ == "__main__":
    run_script(main)
