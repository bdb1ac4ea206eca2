#!/usr/bin/env python
# Copyright 2026 The SenseFlow-scripts authors. Licensed under the Apache License, Version 2.0.
"""Distill Z-Image to few steps with SenseFlow: train_senseflow_sd3.py with another teacher.

    accelerate launch --config_file accelerate_configs/fsdp2.yaml teachers/train_senseflow_zimage.py \
        --pretrained_model_name_or_path Tongyi-MAI/Z-Image --dataset_json data.json --output_dir zimage-4step \
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
        "The defaults are those of the SenseFlow release for SD 3.5 Large. The defaults of --anchors are the indices "
        "999 749 499 249 of the teacher's 1000 ascending noise levels, and --isg_margin counts such indices. Guidance "
        "scales count from 1 for no guidance, the pipeline's from 0. omega(t) of the adversarial losses is sigma^2 of "
        "the descending levels.",
        "ZImagePipeline", "ZImageTransformer2DModel", max_tokens=1024,
    )
    parser.set_defaults(
        max_sequence_length=512, teacher_guidance_scale=6.0,
        ttur_ratio=5, ida_decay=0.97, isg_weight=1.0, isg_margin=50.0, gan_weight=0.1, backward_simulation_prob=0.5,
        dmd_guidance_scale=[3.0, 10.0], isg_guidance_scale=[5.0],
        learning_rate=1e-6, max_train_steps=27000, teacher_num_inference_steps=50,
        lora_layers="to_q to_k to_v to_out.0 feed_forward.w1 feed_forward.w2 feed_forward.w3".split(),
    )
    return parser.parse_args(argv)
# fmt: on


if __name__ == "__main__":
    run_script(parse_args)  # answer --help and bad arguments before the slow imports

from functools import partial

import numpy as np
import torch
from diffusers import ZImagePipeline, ZImageTransformer2DModel

import train_senseflow_sd3 as sd3
from senseflow.models.text_encoders import pad_condition
from senseflow.models.vae import vae_scale_of
from senseflow.training.models import TrainingModels


class ZImageModels(sd3.SD3Models):
    """Z-Image: lists of images and texts, time from 0 (noise) to 1, a negated velocity, guidance from 0."""

    parse_args, presets = staticmethod(parse_args), {}
    pipeline_class, network_class = ZImagePipeline, ZImageTransformer2DModel
    compatible_config = ("in_channels", "dim", "cap_feat_dim", "all_patch_size", "all_f_patch_size", "axes_dims")
    comfyui_shift, lora_base = None, TrainingModels.lora_base

    @staticmethod
    def stock_sigmas(scheduler, steps):
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps).tolist(), mu=scheduler.config.base_shift)
        return scheduler.sigmas[:-1].tolist()

    @classmethod
    def student_guidance_kwargs(cls, args, source):
        return {"guidance_scale": 0.0}

    @classmethod
    def pixel_multiple(cls, source):
        return 2 * vae_scale_of(source.config(cls.vae_class, "vae"))

    def teacher_pipeline_kwargs(self):
        kwargs = super().teacher_pipeline_kwargs()
        return {**kwargs, "guidance_scale": max(kwargs["guidance_scale"] - 1, 0.0)}

    @torch.no_grad()
    def encode_prompts(self, prompts):
        """Encode prompts to (embeddings (B, L, D), mask (B, L))."""
        length, kwargs = self.args.max_sequence_length, {"do_classifier_free_guidance": False}
        prompts = list(prompts)  # which the pipeline writes to
        embeds, _ = self.pipeline.encode_prompt(prompts, device=self.device, max_sequence_length=length, **kwargs)
        return pad_condition(embeds, length)

    def network_output(self, role, x_t, t, condition):
        images = x_t.to(role.dtype).unsqueeze(2).unbind()
        texts = [embeds[mask] for embeds, mask in zip(*condition)]
        output = role(list(images), (1000 - t.float()) / 1000, texts, return_dict=False)[0]
        return -torch.stack(output).squeeze(2).float()


main = partial(sd3.main, models=ZImageModels)

if __name__ == "__main__":
    run_script(main)
