#!/usr/bin/env python
# Copyright 2026 The SenseFlow-scripts authors. Licensed under the Apache License, Version 2.0.
"""Distill Qwen-Image 2.1 to few steps with SenseFlow: train_senseflow_flux.py with another teacher.

    accelerate launch --config_file accelerate_configs/fsdp2.yaml teachers/train_senseflow_qwenimage21.py \
        --pretrained_model_name_or_path Qwen/Qwen-Image-2.1 --dataset_json data.json --output_dir qwenimage21-4step \
        --mixed_precision bf16 --gradient_checkpointing --offload_text_encoders

Turbo, which is distilled already, is refused. Tried with tiny networks, not the published weights (docs/teachers.md).
"""

import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the scripts, without pip install -e .

from senseflow.arguments import make_flow_parser
from senseflow.errors import UserError, run_script


# fmt: off
def parse_args(argv=None):
    parser = make_flow_parser(
        __doc__.split("\n\n")[0],
        "The defaults are those of the SenseFlow release for FLUX.1-dev, but for --anchors: the teacher's own 4 steps "
        "end at 20, since its scheduler stretches them; not stretched, they are these at 1024 pixels. The teacher is "
        "sampled without guidance, as its authors recommend, so the losses ask it without. omega(t) of the "
        "adversarial losses is (1 - sigma)^2.",
        "QwenImage21Pipeline", "QwenImage21Transformer2DModel", max_tokens=4096,
    )
    parser.set_defaults(
        anchors=[1000.0, 857.0, 667.0, 400.0], max_sequence_length=512, teacher_guidance_scale=1.0,
        ttur_ratio=5, ida_decay=0.97, isg_weight=1.0, isg_margin=20.0, gan_weight=2.0, backward_simulation_prob=0.5,
        dmd_guidance_scale=[1.0, 1.0], isg_guidance_scale=[1.0, 1.0],
        learning_rate=1e-5, lr_scheduler="constant_with_warmup", lr_warmup_steps=500, lr_warmup_start_factor=0.5,
        max_train_steps=12000, checkpointing_steps=1500, teacher_num_inference_steps=40,
        lora_layers="to_q to_k to_v to_out.0 img_mlp.proj img_mlp.gate_layer img_mlp.out".split(),
    )
    return parser.parse_args(argv)
# fmt: on


if __name__ == "__main__":
    run_script(parse_args)  # answer --help and bad arguments before the slow imports

from functools import partial

import torch
from accelerate.logging import get_logger
from diffusers import AutoencoderKLQwenImage21, QwenImage21Pipeline, QwenImage21Transformer2DModel

import train_senseflow_flux as flux
from senseflow.models.text_encoders import pad_condition
from senseflow.training.models import TrainingModels
from train_senseflow_qwenimage import QwenImageModels


logger = get_logger(__name__)


class QwenImage21Models(QwenImageModels):
    """Qwen-Image 2.1: text and image in one sequence, in which the image's position follows from the text's length."""

    parse_args = staticmethod(parse_args)
    pipeline_class, network_class = QwenImage21Pipeline, QwenImage21Transformer2DModel
    vae_class = AutoencoderKLQwenImage21
    compatible_config = ("in_channels", "out_channels", "context_in_dim", "patch_size", "causal_condition")
    guide, unused_weights = TrainingModels.guide, staticmethod(TrainingModels.unused_weights)

    @classmethod
    def check_args(cls, args, source):
        if args.attention_backend:  # its processor passes none on to the kernels of a call without a cache
            fix = "QwenImage21Transformer2DModel trains with torch's choice of a kernel; drop the flag"
            raise UserError(f"--attention_backend {args.attention_backend}: {fix}", exit_code=2)
        super().check_args(args, source)

    @classmethod
    def make_schedule(cls, args, source, device):
        schedule, scheduler, pipeline_kwargs = super().make_schedule(args, source, device)
        del pipeline_kwargs["max_sequence_length"]  # the stock call takes prompts of any length
        return schedule, scheduler, pipeline_kwargs

    @staticmethod
    def stock_sigmas(scheduler, steps, num_tokens):
        return flux.FluxModels.stock_sigmas(scheduler, steps, 4 * num_tokens)  # a token is one latent, not 2 x 2

    @torch.no_grad()
    def encode_prompts(self, prompts):
        """Encode prompts to (embeddings (B, L, D), mask (B, L))."""
        embeds, mask, _ = self.pipeline.encode_prompt(list(prompts), device=self.device)
        length = self.args.max_sequence_length
        if embeds.shape[1] > length:
            logger.warning_once(f"--max_sequence_length {length}: prompts of more tokens lose their end")
            embeds, mask = embeds[:, :length], None if mask is None else mask[:, :length]
        return pad_condition(embeds, length, mask)

    def network_output(self, role, x_t, t, condition):
        # One prompt at a time and without padding, as a stock call of one prompt: padding would move the image.
        return torch.cat([self.output_of_one(role, *one) for one in zip(x_t.split(1), t.split(1), *condition)])

    def output_of_one(self, role, x_t, t, embeds, mask):
        height, width = x_t.shape[2:]
        text = embeds[mask]  # (length, D)
        positions = torch.arange(len(text) + height * width // 4, device=x_t.device)  # a place for 2 x 2 latents
        output = role(
            hidden_states=x_t.flatten(2).mT.to(role.dtype),
            encoder_hidden_states=text[None],
            timestep=t.to(role.dtype) / 1000,
            img_shapes=[[(1, height, width)]],
            img_mask=(positions >= len(text))[None],
            return_dict=False,
        )[0]
        return output[:, -height * width :].mT.reshape(x_t.shape)


main = partial(flux.main, models=QwenImage21Models)

if __name__ == "__main__":
    run_script(main)
