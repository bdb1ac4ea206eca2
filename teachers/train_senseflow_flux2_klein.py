#!/usr/bin/env python
# Copyright 2026 The SenseFlow-scripts authors. Licensed under the Apache License, Version 2.0.
"""Distill FLUX.2 klein base to few steps with SenseFlow: train_senseflow_flux.py with another teacher.

    accelerate launch --config_file accelerate_configs/fsdp2.yaml teachers/train_senseflow_flux2_klein.py \
        --pretrained_model_name_or_path black-forest-labs/FLUX.2-klein-base-4B --dataset_json data.json \
        --output_dir klein-4step --mixed_precision bf16 --gradient_checkpointing --offload_text_encoders

FLUX.2 klein without "base" is distilled already, and refused. Tried with tiny networks, not with the published weights
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
        "The defaults are those of the SenseFlow release for FLUX.1-dev, but for --anchors, which are SD 3.5's: of "
        "the teacher's own 4 steps, 1000 967 908 767 at 1024 pixels, the first two are too close for --isg_margin. "
        "omega(t) of the adversarial losses is (1 - sigma)^2.",
        "Flux2KleinPipeline", "Flux2Transformer2DModel", max_tokens=512,
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

import numpy as np
import torch
from diffusers import AutoencoderKLFlux2, Flux2KleinPipeline, Flux2Transformer2DModel
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu, retrieve_timesteps

import train_senseflow_flux as flux
from senseflow.models.vae import vae_scale_of
from senseflow.training.models import TrainingModels


class Flux2KleinModels(flux.FluxModels):
    """FLUX.2 klein: latents folded by the VAE's batch norm, ids of four axes, a shift of the pipeline's own."""

    parse_args = staticmethod(parse_args)
    pipeline_class, network_class, vae_class = Flux2KleinPipeline, Flux2Transformer2DModel, AutoencoderKLFlux2
    scheduler_sets_shift = False
    compatible_config = ("in_channels", "out_channels", "joint_attention_dim", "patch_size")
    comfyui_shift, lora_base, comfyui_guidance = None, TrainingModels.lora_base, TrainingModels.comfyui_guidance
    teacher_pipeline_kwargs = TrainingModels.teacher_pipeline_kwargs

    @staticmethod
    def stock_sigmas(scheduler, steps, num_tokens):
        mu = compute_empirical_mu(num_tokens, steps)
        retrieve_timesteps(scheduler, steps, "cpu", sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
        return scheduler.sigmas[:-1].tolist()

    @classmethod
    def pixel_multiple(cls, source):
        return vae_scale_of(source.config(cls.vae_class, "vae"))  # of folded latents

    @torch.no_grad()
    def encode_prompts(self, prompts):
        """Encode prompts to (embeddings (B, L, D),); the pipeline pads them, without a mask."""
        length = self.args.max_sequence_length
        return self.pipeline.encode_prompt(list(prompts), device=self.device, max_sequence_length=length)[:1]

    def network_output(self, role, x_t, t, condition, scale=None):
        (embeds,) = condition
        output = role(
            hidden_states=Flux2KleinPipeline._pack_latents(x_t.to(role.dtype)),
            timestep=t.to(role.dtype) / 1000,
            guidance=None if scale is None else scale.to(role.dtype),
            encoder_hidden_states=embeds,
            txt_ids=Flux2KleinPipeline._prepare_text_ids(embeds).to(x_t.device),
            img_ids=Flux2KleinPipeline._prepare_latent_ids(x_t).to(x_t.device),
            return_dict=False,
        )[0]
        return output.mT.reshape(x_t.shape)


main = partial(flux.main, models=Flux2KleinModels)

if __name__ == "__main__":
    run_script(main)
