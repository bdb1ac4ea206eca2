#!/usr/bin/env python
# Copyright 2026 The SenseFlow-scripts authors. Licensed under the Apache License, Version 2.0.
"""Distill Qwen-Image to few steps with SenseFlow: train_senseflow_flux.py with another teacher.

    accelerate launch --config_file accelerate_configs/fsdp2.yaml teachers/train_senseflow_qwenimage.py \
        --pretrained_model_name_or_path Qwen/Qwen-Image --dataset_json data.json --output_dir qwenimage-4step \
        --mixed_precision bf16 --gradient_checkpointing --offload_text_encoders

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
        "The defaults are those of the SenseFlow release for FLUX.1-dev, but for --anchors: the teacher's own 4 steps "
        "end at 20, since its scheduler stretches them; not stretched, they are these at 1024 pixels. omega(t) of the "
        "adversarial losses is (1 - sigma)^2.",
        "QwenImagePipeline", "QwenImageTransformer2DModel", max_tokens=1024,
    )
    parser.set_defaults(
        anchors=[1000.0, 857.0, 667.0, 400.0], max_sequence_length=512, teacher_guidance_scale=4.0,
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
import torch.nn.functional as F
from diffusers import AutoencoderKLQwenImage, QwenImagePipeline, QwenImageTransformer2DModel

import train_senseflow_flux as flux
from senseflow.models.text_encoders import pad_condition
from senseflow.training.models import TrainingModels


class QwenImageModels(flux.FluxModels):
    """Qwen-Image: padded text with a mask, latents with a frame axis, guidance that keeps the length of a token."""

    parse_args = staticmethod(parse_args)
    pipeline_class, network_class = QwenImagePipeline, QwenImageTransformer2DModel
    vae_class = AutoencoderKLQwenImage
    compatible_config = ("in_channels", "out_channels", "joint_attention_dim", "patch_size")
    unconditional_prompt = " "
    comfyui_shift, lora_base, comfyui_guidance = None, TrainingModels.lora_base, TrainingModels.comfyui_guidance

    @classmethod
    def student_guidance_kwargs(cls, args, source):
        return {"true_cfg_scale": 1.0}

    def teacher_pipeline_kwargs(self):
        steps, guidance = self.args.teacher_num_inference_steps, self.args.teacher_guidance_scale
        guided = {"true_cfg_scale": guidance, "negative_prompt": self.unconditional_prompt} if guidance > 1 else {}
        return {"num_inference_steps": steps, "sigmas": None, **guided}

    @torch.no_grad()
    def encode_prompts(self, prompts):
        """Encode prompts to (embeddings (B, L, D), mask (B, L))."""
        length = self.args.max_sequence_length
        embeds, mask = self.pipeline.encode_prompt(list(prompts), device=self.device, max_sequence_length=length)
        return pad_condition(embeds, length, mask)

    def network_output(self, role, x_t, t, condition):
        batch, channels, height, width = x_t.shape
        embeds, mask = condition
        output = role(
            hidden_states=QwenImagePipeline._pack_latents(x_t.to(role.dtype), batch, channels, height, width),
            timestep=t.to(role.dtype) / 1000,
            encoder_hidden_states=embeds,
            encoder_hidden_states_mask=mask,
            img_shapes=[[(1, height // 2, width // 2)]] * batch,
            return_dict=False,
        )[0]
        output = output.view(batch, height // 2, width // 2, channels, 2, 2)
        return output.permute(0, 3, 1, 4, 2, 5).reshape(x_t.shape)

    def guide(self, unconditional, conditional, scale):
        guided = super().guide(unconditional, conditional, scale)
        # Each token, 2 x 2 latents, keeps the norm of its conditional output.
        norms = [F.avg_pool2d(x.square().sum(1, keepdim=True), 2).sqrt() for x in (conditional, guided)]
        return guided * F.interpolate(norms[0] / norms[1], scale_factor=2)

    @staticmethod
    def unused_weights(config):
        last = f"transformer_blocks.{config['num_layers'] - 1}."  # its text output is not read
        return [last + name for name in ("attn.add_q_proj", "attn.norm_added_q", "attn.to_add_out", "txt_mlp")]


main = partial(flux.main, models=QwenImageModels)

if __name__ == "__main__":
    run_script(main)
