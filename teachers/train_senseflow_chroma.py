#!/usr/bin/env python
# Copyright 2026 The SenseFlow-scripts authors. Licensed under the Apache License, Version 2.0.
"""Distill Chroma to few steps with SenseFlow: train_senseflow_sd3.py with another teacher.

    accelerate launch --config_file accelerate_configs/fsdp2.yaml teachers/train_senseflow_chroma.py \
        --pretrained_model_name_or_path lodestones/Chroma1-HD --dataset_json data.json --output_dir chroma-4step \
        --mixed_precision bf16 --gradient_checkpointing --offload_text_encoders

The mask of the text is used as by the stock call of diffusers 0.42, which adds its 0 and 1 to the attention's logits.
Tried with tiny networks, not with the published weights (docs/teachers.md).
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
        "The defaults are those of the SenseFlow release for SD 3.5 Large. The defaults of --anchors are the indices "
        "999 749 499 249 of the teacher's 1000 ascending noise levels, and --isg_margin counts such indices: "
        "1000 750 500 250 without a shift. omega(t) of the adversarial losses is sigma^2 of the descending levels.",
        "ChromaPipeline", "ChromaTransformer2DModel", max_tokens=512,
    )
    parser.set_defaults(
        max_sequence_length=512, teacher_guidance_scale=5.0,
        ttur_ratio=5, ida_decay=0.97, isg_weight=1.0, isg_margin=50.0, gan_weight=0.1, backward_simulation_prob=0.5,
        dmd_guidance_scale=[3.0, 10.0], isg_guidance_scale=[5.0],
        learning_rate=1e-6, max_train_steps=27000, teacher_num_inference_steps=35,
        lora_layers=[r".*blocks\..*(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out|net\.(0\.proj|2)|proj_(mlp|out))"],
    )
    return parser.parse_args(argv)
# fmt: on


if __name__ == "__main__":
    run_script(parse_args)  # answer --help and bad arguments before the slow imports

from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import ChromaPipeline, ChromaTransformer2DModel

import train_senseflow_sd3 as sd3
from senseflow.models.vae import vae_scale_of
from senseflow.training.models import TrainingModels


class ChromaModels(sd3.SD3Models):
    """Chroma: FLUX's VAE and packing, T5 alone, a mask over text and image, levels without a shift."""

    parse_args, presets = staticmethod(parse_args), {}
    pipeline_class, network_class = ChromaPipeline, ChromaTransformer2DModel
    compatible_config = ("in_channels", "out_channels", "joint_attention_dim", "patch_size")
    comfyui_shift, lora_base = None, TrainingModels.lora_base

    @staticmethod
    def stock_sigmas(scheduler, steps):
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps).tolist(), mu=scheduler.config.base_shift)
        return scheduler.sigmas[:-1].tolist()

    @classmethod
    def pixel_multiple(cls, source):
        return 2 * vae_scale_of(source.config(cls.vae_class, "vae"))

    @torch.no_grad()
    def encode_prompts(self, prompts):
        """Encode prompts to (T5 embeddings (B, L, D), mask (B, L), which keeps one token of padding)."""
        kwargs = {"do_classifier_free_guidance": False, "max_sequence_length": self.args.max_sequence_length}
        embeds, _, mask, *_ = self.pipeline.encode_prompt(list(prompts), device=self.device, **kwargs)
        return embeds, mask

    def student_and_fake_score(self):
        networks = super().student_and_fake_score()
        for network in networks:
            if network.gradient_checkpointing:
                network.enable_gradient_checkpointing(masked(network._gradient_checkpointing_func))
        return networks

    def network_output(self, role, x_t, t, condition):
        batch, channels, height, width = x_t.shape
        (embeds, mask), pipeline = condition, ChromaPipeline
        output = role(
            hidden_states=pipeline._pack_latents(x_t.to(role.dtype), batch, channels, height, width),
            timestep=t.to(role.dtype) / 1000,
            encoder_hidden_states=embeds,
            txt_ids=torch.zeros(embeds.shape[1], 3, device=x_t.device, dtype=role.dtype),
            img_ids=pipeline._prepare_latent_image_ids(batch, height // 2, width // 2, x_t.device, role.dtype),
            attention_mask=F.pad(mask, (0, height * width // 4), value=1),
            return_dict=False,
        )[0]
        output = output.view(batch, height // 2, width // 2, channels, 2, 2)
        return output.permute(0, 3, 1, 4, 2, 5).reshape(x_t.shape)


def masked(recompute):
    """Give recomputed single blocks the mask of the double blocks before them: diffusers 0.42 leaves it out."""
    mask = None

    def run(block, *inputs):
        nonlocal mask
        mask = inputs[4] if len(inputs) == 5 else mask  # the last of a double block's inputs
        return recompute(block, *inputs, *([mask] if len(inputs) == 3 else []))

    return run


main = partial(sd3.main, models=ChromaModels)

if __name__ == "__main__":
    run_script(main)
