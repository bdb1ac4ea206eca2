#!/usr/bin/env python
# Copyright 2026 The SenseFlow-scripts authors. Licensed under the Apache License, Version 2.0.
"""Measure train_senseflow_sdxl.py on a trained teacher: a tiny StableDiffusionXLPipeline for the demo's scenes.

    OMP_NUM_THREADS=1 python demo/sdxl.py                 # students of 4 and of 2 steps, three seeds each
    OMP_NUM_THREADS=1 python demo/sdxl.py --stage grid    # the teacher at few steps

The teacher is a UNet that predicts epsilon in the latents of the demo's VAE, trained with 10 % empty conditions.
Students are trained by train_senseflow_sdxl.py. infer.py generates their images, and demo/measure.py measures them.

What exists in demo/out/sdxl is not made again; delete what should be.
"""

import argparse
import itertools
import json
import sys
import time
from functools import partial
from types import SimpleNamespace

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from make_teacher import Stage, render_pool, to_pixels
from measure import load_classifier, load_images, measure
from run import HERE, ROOT, DemoError, flags, run_command
from scenes import RESOLUTION, all_captions, sample_scenes
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer


OUT, CLASSIFIER = HERE / "out" / "sdxl", HERE / "out" / "classifier.pt"
TEACHER = OUT / "teacher"

# The teacher's training, with the arguments of make_teacher.Stage and make_teacher.render_pool.
TRAINING = SimpleNamespace(
    work_dir=OUT,
    device="cpu",
    seed=0,
    pool_size=12_000,
    steps=2_000,
    batch_size=32,
    learning_rate=2e-3,
    decay_share=0.4,
    ema_decay=0.998,
    checkpointing_steps=200,
    condition_dropout=0.1,
)

SCHEDULERS = {
    "euler": EulerDiscreteScheduler.from_config,  # SDXL's own, which starts at 751 (4 steps) or 501 (2 steps)
    # The others start at 999, as a student does. Euler with trailing spacing equals DDIM.
    "ddim trailing": partial(DDIMScheduler.from_config, timestep_spacing="trailing", clip_sample=False),
    "dpm++ trailing": partial(DPMSolverMultistepScheduler.from_config, timestep_spacing="trailing"),
    "ancestral": partial(EulerAncestralDiscreteScheduler.from_config, timestep_spacing="trailing"),  # DDPM sampling
    "lcm": partial(LCMScheduler.from_config, original_inference_steps=100),  # the student's sampler
}

# (steps, scheduler, guidance) of the teacher, the best of `--stage grid`: at many steps with SDXL's solver and with a
# stochastic sampler, and with as many forwards as a student of 2 and of 4 steps (guidance above 1 takes two a step).
MANY = {"ODE": (25, "euler", 2.0), "SDE": (50, "ancestral", 2.0)}
FEW = {
    2: [(1, "ddim trailing", 1.5), (1, "ddim trailing", 2.0), (2, "ddim trailing", 1.0)],
    4: [(2, "ddim trailing", 1.5), (2, "ddim trailing", 2.0), (4, "ddim trailing", 1.0)],
}
PER_CAPTION = 6  # x 96 captions = 576 images per row
IMAGE_SEED, OTHER_IMAGE_SEED = 0, 1_000_000  # image i has seed + i, so these two have none in common

STUDENT = {
    "max_train_steps": 300,
    "train_batch_size": 32,
    "resolution": RESOLUTION,
    "anchors": [999, 749, 499, 249],
    "learning_rate": 2e-4,
    "learning_rate_fake": 5e-4,
    "lr_scheduler": "cosine",
    "lr_warmup_steps": 10,
    "adam_beta1": 0.0,
    "adam_beta2": 0.99,
    "ttur_ratio": 3,
    "isg_weight": 0.2,
    "gan_weight": 0,  # as in the demo
    "backward_simulation_prob": 1.0,
    "dmd_guidance_scale": 2.0,
    "isg_guidance_scale": 2.0,
    "mixed_precision": "no",
    "export_dtype": "fp32",
}
VARIANTS = {
    "4-step": {},
    "4-step-isg-1": {"isg_weight": 1.0},
    "4-step-isg-0": {"isg_weight": 0.0},
    "4-step-guidance-1.5": {"dmd_guidance_scale": 1.5},
    "2-step": {"anchors": [999, 499]},
    "4-step-rank-32": {"rank": 32, "learning_rate": 1.4e-3, "learning_rate_fake": 2.5e-3, "max_train_steps": 450},
}


# ---------------------------------------------------------------------------------------------------------------------
# The teacher
# ---------------------------------------------------------------------------------------------------------------------
def build_unet(latent_channels, text_width, pooled_width):
    """Build an untrained UNet2DConditionModel (2.3 M parameters): 8 x 8 latents, cross-attention at 4 x 4."""
    return UNet2DConditionModel(
        sample_size=RESOLUTION // 8,
        in_channels=latent_channels,
        out_channels=latent_channels,
        block_out_channels=(48, 96),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=8,
        attention_head_dim=(2, 3),
        use_linear_projection=True,
        transformer_layers_per_block=(1, 1),
        cross_attention_dim=text_width,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + pooled_width,
    )


def build_pipeline():
    """Build a tiny SDXL: the demo's VAE and tokenizer, two text encoders, a UNet, SDXL's scheduler.

    The text encoders are random and frozen, with smaller weights than the demo's. SDXL's UNet gets hidden states
    before the last norm. With the demo's factor of 8 these are in the hundreds, and some pooled embeddings are equal.
    """
    torch.manual_seed(TRAINING.seed)
    source = HERE / "teacher"
    vae = AutoencoderKL.from_pretrained(source / "vae")
    tokenizer = CLIPTokenizer.from_pretrained(source / "tokenizer")
    config = CLIPTextConfig.from_pretrained(source / "text_encoder", initializer_factor=2.0)
    unet = build_unet(vae.config.latent_channels, 2 * config.hidden_size, config.projection_dim)
    return StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(config).eval(),
        tokenizer=tokenizer,
        text_encoder_2=CLIPTextModelWithProjection(config).eval(),
        tokenizer_2=tokenizer,
        unet=unet,
        scheduler=EulerDiscreteScheduler(
            beta_schedule="scaled_linear",
            beta_start=0.00085,
            beta_end=0.012,
            timestep_spacing="leading",
            steps_offset=1,
        ),
    )


@torch.no_grad()
def encode_pool(vae):
    """Return scaled latents [N, 8, 8, 8] and caption indices [N] of the pool of scenes; set the VAE's scaling factor.

    SDXL's pipelines ignore a shift factor, so it is removed and the latents keep their small mean.
    """
    path = OUT / "latents.pt"
    if not path.exists():
        images, captions = render_pool(TRAINING)
        generator = torch.Generator().manual_seed(TRAINING.seed)
        latents = [
            vae.encode(to_pixels(batch, TRAINING.device)).latent_dist.sample(generator)
            for batch in tqdm(images.split(250), desc="latents")
        ]
        torch.save({"latents": torch.cat(latents), "captions": captions}, path)
    pool = torch.load(path, weights_only=True)
    vae.register_to_config(scaling_factor=1 / pool["latents"].std().item(), shift_factor=None)
    return pool["latents"] * vae.config.scaling_factor, pool["captions"]


@torch.no_grad()
def encode_captions(pipeline):
    """Return embeds [97, L, D] and pooled [97, P] of all captions; the last row is SDXL's empty prompt, zeros."""
    embeds, _, pooled, _ = pipeline.encode_prompt(all_captions(), device="cpu", do_classifier_free_guidance=False)
    return torch.cat([embeds, torch.zeros_like(embeds[:1])]), torch.cat([pooled, torch.zeros_like(pooled[:1])])


def train_unet(pipeline, latents, captions):
    """Train epsilon prediction at uniform timesteps. Random numbers of a step depend on (seed, step)."""
    embeds, pooled = encode_captions(pipeline)
    time_ids = torch.tensor([RESOLUTION, RESOLUTION, 0, 0, RESOLUTION, RESOLUTION])  # no crop, as in a diffusers call
    time_ids = time_ids.float().expand(TRAINING.batch_size, -1)
    scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)

    def compute_loss(step):
        generator = torch.Generator().manual_seed(TRAINING.seed * 10_000_000 + step)
        rows = torch.randint(len(latents), (TRAINING.batch_size,), generator=generator)
        t = torch.randint(scheduler.config.num_train_timesteps, (TRAINING.batch_size,), generator=generator)
        dropped = torch.rand(TRAINING.batch_size, generator=generator) < TRAINING.condition_dropout
        noise = torch.randn(latents[rows].shape, generator=generator)
        wanted = captions[rows].masked_fill(dropped, -1)
        added = {"text_embeds": pooled[wanted], "time_ids": time_ids}
        x_t = scheduler.add_noise(latents[rows], noise, t)
        prediction = pipeline.unet(x_t, t, encoder_hidden_states=embeds[wanted], added_cond_kwargs=added).sample
        return (prediction - noise).square().mean()

    Stage("unet", pipeline.unet, TRAINING.steps, TRAINING.learning_rate, TRAINING).run(compute_loss)


def make_teacher():
    """Run stage `teacher`, from its last checkpoint if there is one."""
    if TEACHER.exists():
        return
    start = time.monotonic()
    pipeline = build_pipeline()
    latents, captions = encode_pool(pipeline.vae)
    print(f"UNet: {pipeline.unet.num_parameters() / 1e6:.2f} M parameters", flush=True)
    train_unet(pipeline, latents, captions)
    pipeline.save_pretrained(TEACHER)
    print(f"teacher: {(time.monotonic() - start) / 60:.1f} minutes", flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# Images
# ---------------------------------------------------------------------------------------------------------------------
@torch.no_grad()
def sample(pipeline, steps, scheduler, guidance, per_caption, seed, batch_size=96):
    """Generate images of all captions, uint8 [N, 64, 64, 3]; image i has seed + i, as in infer.py."""
    pipeline.scheduler = SCHEDULERS[scheduler](EulerDiscreteScheduler.load_config(TEACHER, subfolder="scheduler"))
    pipeline.set_progress_bar_config(disable=True)
    captions, images = all_captions() * per_caption, []
    for start in range(0, len(captions), batch_size):
        batch = captions[start : start + batch_size]
        generators = [torch.Generator().manual_seed(seed + start + index) for index in range(len(batch))]
        settings = {
            "num_inference_steps": steps,
            "guidance_scale": guidance,
            "height": RESOLUTION,
            "width": RESOLUTION,
        }
        images += pipeline(batch, generator=generators, **settings).images
    return np.stack([np.asarray(image) for image in images])


def teacher_images(name, *settings):
    """Return `sample(teacher, *settings)`, stored in a file."""
    path = OUT / f"{name}.npy"
    if not path.exists():
        np.save(path, sample(StableDiffusionXLPipeline.from_pretrained(TEACHER), *settings))
    return np.load(path)


# ---------------------------------------------------------------------------------------------------------------------
# Stages
# ---------------------------------------------------------------------------------------------------------------------
def scan_teacher():
    """Run stage `grid`: compare the teacher at many steps with rendered scenes, then at few steps with many."""
    classifier, per_caption = load_classifier(CLASSIFIER), 2
    captions, pipeline = all_captions() * per_caption, StableDiffusionXLPipeline.from_pretrained(TEACHER)
    pool = {}
    for caption, image in sample_scenes(len(captions), seed=99):
        pool.setdefault(caption, []).append(np.asarray(image))
    clean = np.stack([pool[caption].pop() for caption in captions])

    def line(references, settings, seed):
        images, (steps, scheduler, guidance) = sample(pipeline, *settings, per_caption, seed), settings
        results = {kind: measure(classifier, images, captions, reference) for kind, reference in references.items()}
        numbers = "  ".join(f"fd to {kind} {result['fd']:6.2f}" for kind, result in results.items())
        print(f"{steps:2d} steps  {scheduler:14}  guidance {guidance:.2f}  {numbers}  ", end="")
        result = next(iter(results.values()))
        print(f"captions right {result['accuracy']:.3f}  diversity {result['diversity']:.2f}", flush=True)

    print(f"many steps, against clean scenes, {len(captions)} images")
    for (steps, scheduler, _), guidance in itertools.product(MANY.values(), (1.0, 1.5, 2.0, 3.0)):
        line({"clean": clean}, (steps, scheduler, guidance), IMAGE_SEED)
    print("against the teacher at many steps; first with other seeds")
    references = {kind: sample(pipeline, *settings, per_caption, IMAGE_SEED) for kind, settings in MANY.items()}
    for settings in MANY.values():
        line(references, settings, OTHER_IMAGE_SEED)
    for settings in itertools.product((1, 2, 4), SCHEDULERS, (1.0, 1.5, 2.0, 3.0)):
        line(references, settings, IMAGE_SEED)


def make_student(variant, seed):
    """Train a student and generate its images, unless they exist; return the images, uint8 [N, 64, 64, 3]."""
    name = f"student-{variant}-{seed}"
    captions = all_captions() * PER_CAPTION
    prompts, image_prompts = OUT / "prompts.txt", OUT / "image_prompts.txt"
    prompts.write_text("\n".join(all_captions()) + "\n")
    image_prompts.write_text("\n".join(captions) + "\n")
    student, images = OUT / name, OUT / f"{name}-images"
    if not (student / "senseflow.json").exists():
        start = time.monotonic()
        command = [sys.executable, ROOT / "train_senseflow_sdxl.py"]
        command += ["--pretrained_model_name_or_path", TEACHER, "--prompts_file", prompts]
        command += ["--output_dir", student, "--seed", seed, *flags(STUDENT | VARIANTS[variant])]
        run_command(name, command, OUT / f"{name}.log")
        print(f"{name}: {time.monotonic() - start:.0f} s", flush=True)
    # infer.py generates the images that do not exist.
    command = [sys.executable, ROOT / "infer.py", "--model", student, "--output_dir", images, "--device", "cpu"]
    command += ["--prompts_file", image_prompts, "--batch_size", 96, "--seed", IMAGE_SEED]
    run_command(f"{name}-images", command, OUT / f"{name}-images.log")
    return load_images(images, len(captions))


def report(variants, seeds):
    """Run stage `report`: measure teacher and students, write report.json, and print the table."""
    classifier, captions = load_classifier(CLASSIFIER), all_captions() * PER_CAPTION
    forwards = {variant: len((STUDENT | VARIANTS[variant])["anchors"]) for variant in variants}

    def teacher(*settings, seed=IMAGE_SEED):
        return teacher_images("-".join(map(str, (*settings, seed))).replace(" ", "_"), *settings, PER_CAPTION, seed)

    references = {kind: teacher(*settings) for kind, settings in MANY.items()}
    results = {}

    def add(name, count, images):
        measured = {kind: measure(classifier, images, captions, reference) for kind, reference in references.items()}
        fd = {kind: result["fd"] for kind, result in measured.items()}
        results[name] = measured["ODE"] | {"forwards": count, "fd": fd}

    for kind, settings in MANY.items():
        add(f"teacher, {kind}", 2 * settings[0], references[kind])
        add(f"teacher, {kind}, other seeds", 2 * settings[0], teacher(*settings, seed=OTHER_IMAGE_SEED))
    for count in sorted(set(forwards.values())):
        for steps, scheduler, guidance in FEW[count]:
            name = f"teacher, {steps} step{'s' if steps > 1 else ''}, guidance {guidance:g}"
            add(name, count, teacher(steps, scheduler, guidance))
        add(f"student before training, {count} steps", count, teacher(count, "lcm", 1.0))
    for variant, seed in itertools.product(variants, seeds):
        add(f"student {variant}, seed {seed}", forwards[variant], make_student(variant, seed))
    (OUT / "report.json").write_text(json.dumps(results, indent=1) + "\n")
    print_table(results)


def print_table(results):
    columns = ("", "forwards", "captions right", "diversity", "FD to the ODE", "closed", "FD to the SDE", "closed")
    print("| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|")
    for name, result in results.items():
        cells = [name, str(result["forwards"]), f"{result['accuracy']:.3f}", f"{result['diversity']:.2f}"]
        teachers = [
            other
            for other_name, other in results.items()
            if other_name.startswith("teacher") and other["forwards"] == result["forwards"]
        ]
        for kind, distance in result["fd"].items():
            closed = ""
            if name.startswith("student"):
                start = min(other["fd"][kind] for other in teachers)
                floor = results[f"teacher, {kind}, other seeds"]["fd"][kind]
                closed = f"{(start - distance) / (start - floor):.0%}"
            cells += [f"{abs(distance):.2f}", closed]
        print("| " + " | ".join(cells) + " |")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--stage",
        choices=("teacher", "grid", "report"),
        default="report",
        help="grid and report train the teacher, too",
    )
    parser.add_argument(
        "--variants",
        nargs="+",
        choices=VARIANTS,
        default=["4-step", "2-step"],
        help="variants of the student's training",
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds of the students' training")
    args = parser.parse_args()
    OUT.mkdir(parents=True, exist_ok=True)
    make_teacher()
    if args.stage == "grid":
        scan_teacher()
    elif args.stage == "report":
        report(args.variants, args.seeds)


if __name__ == "__main__":
    try:
        main()
    except DemoError as error:
        sys.exit(f"sdxl: {error}")
