#!/usr/bin/env python
# Copyright 2026 The SenseFlow-scripts authors. Licensed under the Apache License, Version 2.0.
"""Distill Sana or Sana 1.5 to few steps with SenseFlow: train_senseflow_sd3.py with another teacher.

    accelerate launch --config_file accelerate_configs/fsdp2.yaml teachers/train_senseflow_sana.py \
        --pretrained_model_name_or_path Efficient-Large-Model/SANA1.5_1.6B_1024px_diffusers --dataset_json data.json \
        --output_dir sana-4step --mixed_precision bf16 --gradient_checkpointing --offload_text_encoders

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
        "The defaults are those of the SenseFlow release for SD 3.5 Medium. The defaults of --anchors are the indices "
        "999 749 499 249 of the teacher's 1000 ascending noise levels, and --isg_margin counts such indices. omega(t) "
        "of the adversarial losses is sigma^2 of the descending levels.",
        "SanaPipeline", "SanaTransformer2DModel", max_tokens=1024,
    )
    parser.set_defaults(
        max_sequence_length=300, teacher_guidance_scale=4.5,
        ttur_ratio=10, ida_decay=0.98, isg_weight=0.5, isg_margin=50.0, gan_weight=0.1, backward_simulation_prob=0.5,
        dmd_guidance_scale=[2.0, 8.0], isg_guidance_scale=[2.0, 4.0],
        learning_rate=1e-6, max_train_steps=27000, teacher_num_inference_steps=20,
        lora_layers="to_q to_k to_v to_out.0 conv_inverted conv_point".split(),
    )
    return parser.parse_args(argv)
# fmt: on


if __name__ == "__main__":
    run_script(parse_args)  # answer --help and bad arguments before the slow imports

import inspect
from functools import partial

import torch
from diffusers import AutoencoderDC, SanaPipeline, SanaTransformer2DModel

import train_senseflow_sd3 as sd3
from senseflow.training.models import TrainingModels


class SanaModels(sd3.SD3Models):
    """Sana: an instruction before the prompt but not before the unconditional one."""

    parse_args, presets = staticmethod(parse_args), {}
    pipeline_class, network_class, vae_class = SanaPipeline, SanaTransformer2DModel, AutoencoderDC
    compatible_config = ("in_channels", "out_channels", "caption_channels", "patch_size", "timestep_scale")
    comfyui_shift, lora_base = None, TrainingModels.lora_base
    scheduler_sets_shift = False  # its stock call passes no mu
    unconditional_prompt = None  # the empty text without the instruction that the prompt "" gets

    @classmethod
    def make_schedule(cls, args, source, device):
        schedule, scheduler, pipeline_kwargs = super().make_schedule(args, source, device)
        return schedule, scheduler, {**pipeline_kwargs, "use_resolution_binning": False}  # which changes the size

    @torch.no_grad()
    def encode_prompts(self, prompts):
        """Encode prompts to (embeddings (B, L, D), mask (B, L)); the pipeline pads them, and cuts the instruction."""
        kwargs = {"device": self.device, "max_sequence_length": self.args.max_sequence_length}
        if list(prompts) == [self.unconditional_prompt]:
            return self.pipeline.encode_prompt("", False, **kwargs)[:2]
        instruction = inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default
        return self.pipeline.encode_prompt(list(prompts), False, complex_human_instruction=instruction, **kwargs)[:2]

    def network_output(self, role, x_t, t, condition):
        embeds, mask = condition
        return role(
            hidden_states=x_t.to(role.dtype),
            encoder_hidden_states=embeds.to(role.dtype),
            encoder_attention_mask=mask,
            timestep=t.float() * self.network.config.timestep_scale,
            return_dict=False,
        )[0]


main = partial(sd3.main, models=SanaModels)

if __name__ == "__main__":
    run_script(main)
