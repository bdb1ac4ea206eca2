#!/usr/bin/env python
# Copyright 2026 The SenseFlow-scripts authors. Licensed under the Apache License, Version 2.0.
"""Distill Ideogram 4 to few steps with SenseFlow: train_senseflow_flux.py with another teacher.

    accelerate launch --config_file accelerate_configs/fsdp2.yaml teachers/train_senseflow_ideogram4.py \
        --pretrained_model_name_or_path ideogram-ai/ideogram-v4 --dataset_json data.json --output_dir ideogram4-4step \
        --mixed_precision bf16 --gradient_checkpointing --offload_text_encoders

The student's stock call, at guidance 1, runs the teacher's unconditional network in vain. Tried with tiny networks,
not with the published weights (docs/teachers.md).
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
        "own 4-step schedule at --resolution: 999.9 846.1 666.7 421.1 at 1024 pixels. omega(t) of the adversarial "
        "losses is (1 - sigma)^2.",
        "Ideogram4Pipeline", "Ideogram4Transformer2DModel", max_tokens=2048,
    )
    parser.set_defaults(
        max_sequence_length=512, teacher_guidance_scale=7.0,
        ttur_ratio=5, ida_decay=0.97, isg_weight=1.0, isg_margin=20.0, gan_weight=2.0, backward_simulation_prob=0.5,
        dmd_guidance_scale=[1.0, 8.0], isg_guidance_scale=[1.0, 8.0],
        learning_rate=1e-5, lr_scheduler="constant_with_warmup", lr_warmup_steps=500, lr_warmup_start_factor=0.5,
        max_train_steps=12000, checkpointing_steps=1500, teacher_num_inference_steps=48,
        lora_layers="attention.to_q attention.to_k attention.to_v to_out.0 w1 w2 w3".split(),
    )
    return parser.parse_args(argv)
# fmt: on


if __name__ == "__main__":
    run_script(parse_args)  # answer --help and bad arguments before the slow imports

from functools import partial

import torch
from diffusers import Ideogram4Pipeline, Ideogram4Transformer2DModel
from diffusers.pipelines.ideogram4.pipeline_ideogram4 import _logit_normal_sigmas, _resolution_aware_mu

import train_senseflow_flux as flux
from train_senseflow_flux2_klein import Flux2KleinModels


class Ideogram4Models(Flux2KleinModels):
    """Ideogram 4: one sequence of text and image, folded (p, p, C), and a second network that gets no prompt."""

    parse_args = staticmethod(parse_args)
    pipeline_class, network_class = Ideogram4Pipeline, Ideogram4Transformer2DModel  # with the VAE of FLUX.2
    further_networks = ("unconditional_transformer",)
    compatible_config = ("in_channels", "llm_features_dim")

    @staticmethod
    def stock_sigmas(scheduler, steps, num_tokens):
        mu = _resolution_aware_mu(height=num_tokens, width=16**2, base_mu=0.0)  # a token has 16 x 16 pixels
        scheduler.set_timesteps(sigmas=_logit_normal_sigmas(steps, mu, std=1.5).tolist())
        return scheduler.sigmas[:-1].tolist()

    @classmethod
    def student_guidance_kwargs(cls, args, source):
        return {"guidance_scale": 1.0, "guidance_schedule": None}

    def teacher_pipeline_kwargs(self):
        args = self.args
        return {"num_inference_steps": args.teacher_num_inference_steps, "guidance_scale": args.teacher_guidance_scale}

    def fold(self, latents):
        squares = latents.unflatten(2, (-1, 2)).unflatten(4, (-1, 2))  # (B, C, h, p, w, p)
        return squares.permute(0, 3, 5, 1, 2, 4).flatten(1, 3)

    def unfold(self, latents):
        return latents.unflatten(1, (2, 2, -1)).permute(0, 3, 4, 1, 5, 2).flatten(4).flatten(2, 3)

    @torch.no_grad()
    def encode_prompts(self, prompts):
        """Encode prompts to (features (B, L, D), and of these tokens: position, segment and kind)."""
        length = self.args.max_sequence_length
        return self.pipeline.encode_prompt(list(prompts), 0, 0, length, device=self.device)

    def network_output(self, role, x_t, t, condition):
        features, *text_layout = condition
        image_layout = Ideogram4Pipeline._prepare_ids([0] * len(x_t), *x_t.shape[2:], 0, x_t.device)
        layout = [torch.cat(parts, 1) for parts in zip(text_layout, image_layout)]
        length, latents = features.shape[1], x_t.flatten(2).mT.to(role.dtype)
        features = features.to(role.dtype)
        output = role(
            hidden_states=torch.cat([latents.new_zeros(len(x_t), length, latents.shape[2]), latents], 1),
            timestep=(1 - t.float() / 1000).to(role.dtype),
            encoder_hidden_states=torch.cat([features, features.new_zeros(*latents.shape[:2], features.shape[2])], 1),
            **dict(zip(("position_ids", "segment_ids", "indicator"), layout)),
            return_dict=False,
        )[0]
        return -output[:, length:].mT.reshape(x_t.shape).float()

    def predict(self, role, x_t, t, condition, guidance=None):
        output = self.network_output(role, x_t, t, condition)
        if guidance is not None and guidance.above_one:
            no_text = tuple(part[:, :0] for part in condition)
            (unconditional,) = self.further_roles.values()
            output = self.guide(self.network_output(unconditional, x_t, t, no_text), output, guidance.scale)
        return self.schedule.as_prediction(x_t, output, t)


main = partial(flux.main, models=Ideogram4Models)

if __name__ == "__main__":
    run_script(main)
