#!/usr/bin/env python
# Copyright 2026 The SenseFlow-scripts authors. Licensed under the Apache License, Version 2.0.
"""Distils an SDXL teacher to few steps with SenseFlow (Ge et al., ICLR 2026, arXiv 2506.00523), or with its baseline DMD2.

    accelerate launch --config_file accelerate_configs/fsdp2.yaml train_senseflow_sdxl.py \
        --pretrained_model_name_or_path stabilityai/stable-diffusion-xl-base-1.0 --dataset_json data.json --output_dir sdxl-4step \
        --pretrained_vae_model_name_or_path madebyollin/sdxl-vae-fp16-fix --mixed_precision bf16 --gradient_checkpointing

`train_iteration` is the algorithm, in the paper's order. It speaks of four roles (student, teacher, fake_score, discriminator);
what stands behind a role is senseflow.training.roles' business, the formulas are senseflow_utils'. What `# Copied from` marks is the
same in every script, and a test keeps it so. With `--method dmd2` (Yin et al., 2024, arXiv 2405.14867) a classifier on the fake
score's mid-block stands in for the discriminator; the lines marked dmd2 are its.
"""

import copy
import math
import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Callable, Optional, Sequence

import torch
import transformers
from accelerate.logging import get_logger


transformers.utils.logging.set_verbosity_error()  # importing a pipeline would print notes about packages that are not needed
transformers.utils.logging.get_logger("bitsandbytes").setLevel("ERROR")

from diffusers import AutoencoderKL, DDPMScheduler, LCMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from tqdm.auto import tqdm

from senseflow.arguments import (
    DTYPES,
    LR_SCHEDULERS,
    HelpFormatter,
    Parser,
    add_lora_arguments,
    check_common_args,
    complete_args,
    fill_in,
)
from senseflow.data.sources import check_data_args, check_latents, load_rows, make_dataloader
from senseflow.errors import UserError, run_script
from senseflow.memory.report import report
from senseflow.models.discriminator import LatentClassifier, check_discriminator_args, diff_augment, load_discriminator
from senseflow.models.hub import (
    ModelSource,
    check_compatible,
    check_pipeline,
    load_network,
    load_pipeline,
    student_source,
    teacher_source,
)
from senseflow.models.lora import adapted_twins, check_lora_args, make_base
from senseflow.models.text_encoders import encode_small_set, place_text_encoders
from senseflow.models.vae import decode, latent_shape_of, load_vae, real_images, real_latents, vae_scale_of
from senseflow.models.weights import from_pretrained_meta, materialize
from senseflow.training.checkpoints import (
    check_disk,
    check_finished,
    clear_leftovers,
    compare_with_checkpoint,
    find_checkpoint,
    fingerprint,
    fingerprints_of,
    read_state,
    save_checkpoint,
)
from senseflow.training.export import check_anchors, check_resolution, export, student_config, write_student_config
from senseflow.training.roles import Role
from senseflow.training.runtime import Metrics, Runtime
from senseflow.training.validation import Validation, decode_debug_latents
from senseflow_utils import (
    DDPMSchedule,
    Guidance,
    Prediction,
    Schedule,
    StatelessRNG,
    adversarial_loss,
    backward_simulation,
    denoising_loss,
    dmd_loss,
    draw_guidance,
    guide,
    hinge_loss,
    isg_loss,
    isg_target,
    logistic_loss,
    non_saturating_loss,
)


logger = get_logger(__name__)

# What the teacher is and what the student is saved as, and of what it is made.
PIPELINE, UNET, VAE = StableDiffusionXLPipeline, UNet2DConditionModel, AutoencoderKL
LORA_LAYERS = (
    "to_q to_k to_v to_out.0 proj_in proj_out ff.net.0.proj ff.net.2 conv1 conv2 conv_shortcut time_emb_proj".split()
)
LORA_LAYERS += ["downsamplers.0.conv", "upsamplers.0.conv"]  # as diffusers' LCM-LoRA
ANCHORS = [999, 749, 499, 249]

# What `--method` decides where a flag does not, and the flags that it has no use for (as senseflow.arguments.UNUSED).
PRESETS = {
    "senseflow": {
        "ida_decay": 1.0,
        "isg_weight": 0.2,
        "isg_margin": 20.0,
        "isg_guidance_scale": [3.0, 15.0],
        "gan_weight": 0.5,
        "classifier_weight": 0.0,
        "backward_simulation_prob": 0.5,
        "discriminator_backbone": "facebook/dinov2-large",
        "discriminator_text_encoder": "openai/clip-vit-large-patch14",
    },
    "dmd2": {
        "ida_decay": 1.0,
        "isg_weight": 0.0,
        "isg_margin": 0.0,
        "isg_guidance_scale": [1.0, 1.0],
        "gan_weight": 5e-3,
        "classifier_weight": 1e-2,
        "backward_simulation_prob": 1.0,
    },
}
INACTIVE_FLAGS = (
    (lambda args: args.method == "senseflow", "--method senseflow", ("classifier_weight",)),
    (lambda args: args.method == "dmd2", "--method dmd2",
     ("ida_decay", "isg_weight", "isg_margin", "isg_guidance_scale", "learning_rate_disc",
      "discriminator_backbone", "discriminator_layers", "discriminator_resolution", "discriminator_text_encoder")),
    (lambda args: args.method == "dmd2" and args.dataset_lmdb and not args.validation_prompts, "--method dmd2 on latents",
     ("vae_dtype",)),
)  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# The algorithm
# ---------------------------------------------------------------------------------------------------------------------
# Copied from train_senseflow_flux.TrainingModels but for lines marked dmd2
@dataclass
class TrainingModels:
    """What `train_iteration` works with. The functions hide the teacher's family, layout and conditioning.

    A condition is what prompts become: a tuple of tensors (B, ...), of the same shapes throughout a run but for B. Text of
    variable length is padded to one, with a mask (senseflow.models.text_encoders.pad_condition).
    """

    student: Role
    teacher: Role
    fake_score: Role
    discriminator: Optional[Role]  # None with --gan_weight 0; what follows `latent_shape` is not called then
    predict: Callable[
        ..., Prediction
    ]  # predict(role, x_t, t, condition, guidance=None); guidance for the teacher alone
    encode_prompts: Callable[[Sequence[str]], tuple[torch.Tensor, ...]]  # prompts -> condition
    real_latents: Callable[..., torch.Tensor]  # (batch, rows, draws) -> x0 of these rows of a batch
    latent_shape: tuple[int, ...]  # of one x0 (senseflow.models.vae.latent_shape_of)
    real_images: Optional[Callable[[dict], torch.Tensor]] = None  # batch -> images in [-1, 1]
    decode: Optional[Callable[[torch.Tensor], torch.Tensor]] = None  # x0 -> images in [-1, 1], with gradient
    vision_features: Optional[Callable[[torch.Tensor], Any]] = (
        None  # images -> maps of the frozen network, with gradient
    )
    text_features: Optional[Callable[[Sequence[str]], torch.Tensor]] = None  # prompts -> (B, T) for the discriminator
    omega: Optional[Callable[[torch.Tensor], torch.Tensor]] = None  # t (B,) -> omega(t) (B,)
    # (role, x0, draws, slots, name, condition) -> logits (B,); None but with --method dmd2  # dmd2
    classify: Optional[Callable[..., torch.Tensor]] = None  # dmd2


# Copied from train_senseflow_flux.num_simulated_steps
def num_simulated_steps(rng: StatelessRNG, probability: float, anchors: int) -> Optional[int]:
    """How many anchors backward simulation runs through in this iteration; None: it noises real latents. Same on all ranks."""
    if rng.shared_uniform("simulate") < probability:
        return rng.shared_integer("simulated_steps", anchors)
    return None


# Copied from train_senseflow_flux.needs_images
def needs_images(seed: int, gan_weight: float, probability: float, iteration: int) -> bool:
    """Whether an iteration looks at real images at all; where not, none is read from the disk."""
    return gan_weight > 0 or num_simulated_steps(StatelessRNG(seed, iteration), probability, 1) is None


# Copied from train_senseflow_flux.student_input
def student_input(models: TrainingModels, schedule: Schedule, rng: StatelessRNG, batch: dict, condition, args):
    """Step 1: x_t (B, ...) and the index (B,) of its anchor, without gradient."""
    sample_indices, num_anchors = batch["sample_indices"], len(schedule.anchors)
    noise = rng.normal("input_noise", sample_indices, models.latent_shape)
    steps = num_simulated_steps(rng, args.backward_simulation_prob, num_anchors)
    if steps is not None:
        predict = partial(models.predict, models.student, condition=condition)
        x_t = backward_simulation(predict, schedule, args.sampler, rng, sample_indices, noise, steps)
        return x_t, torch.full((len(sample_indices),), steps, device=noise.device)
    # On the host: a sample that draws the top anchor starts from pure noise, as a sampler does, and is not encoded.
    index = StatelessRNG(rng.seed, rng.iteration).integers("anchor", sample_indices, 0, num_anchors - 1)
    rows = index.nonzero().flatten()
    if len(rows) > 0:
        x0 = models.real_latents(batch, rows, rng)
        noise[rows] = schedule.add_noise(x0, noise[rows], schedule.anchors[index[rows].to(noise.device)])
    return noise, index.to(noise.device)


# Copied from train_senseflow_flux.student_losses
def student_losses(
    models: TrainingModels,
    schedule: Schedule,
    rng: StatelessRNG,
    sample_indices,
    x_t,
    t,
    t_next,
    prediction,
    condition,
    args,
):
    """Step 3, without the adversarial term: ({name: loss}, {name: latents of the panel that people look at})."""
    predict, student_x0 = models.predict, prediction.x0
    losses, debug_latents = {}, {"student_x0": student_x0}

    # L_DMD: both scores look at the noised x0 of the student.
    t_dmd = schedule.draw_dmd_timesteps(rng, sample_indices)
    with torch.no_grad():
        noised = schedule.add_noise(student_x0, rng.normal("dmd_noise", sample_indices, student_x0.shape[1:]), t_dmd)
        guidance = draw_guidance(rng, "dmd_guidance", sample_indices, args.dmd_guidance_scale)
        debug_latents["fake_x0"] = predict(models.fake_score, noised, t_dmd, condition).x0
        debug_latents["teacher_x0"] = predict(models.teacher, noised, t_dmd, condition, guidance).x0
    losses["dmd_loss"], found = dmd_loss(student_x0, debug_latents["fake_x0"], debug_latents["teacher_x0"])
    losses |= found

    # L_ISG: the student's own step should end where teacher, then student arrive over an intermediate timestep.
    if args.isg_weight > 0:
        t_mid = schedule.draw_mid_timesteps(rng, sample_indices, t, t_next, args.isg_margin)
        guidance = draw_guidance(rng, "isg_guidance", sample_indices, args.isg_guidance_scale)
        guided = partial(predict, models.teacher, condition=condition, guidance=guidance)
        unguided = partial(predict, models.student, condition=condition)
        debug_latents["isg_target"] = isg_target(guided, unguided, schedule, x_t, t, t_mid, t_next)
        debug_latents["isg_direct"] = schedule.step(prediction, t_next)
        losses["isg_loss"] = isg_loss(debug_latents["isg_direct"], debug_latents["isg_target"])
    return losses, {name: tensor.detach() for name, tensor in debug_latents.items()}


# Copied from train_senseflow_flux.train_iteration but for lines marked dmd2
def train_iteration(iteration: int, batches: list[dict], models: TrainingModels, schedule: Schedule, args, device):
    """One iteration of SenseFlow over the micro-batches of one global batch (paper, algorithm 1).

    Args:
        iteration: from 0; the student learns in every `args.ttur_ratio`-th.
        batches: `gradient_accumulation_steps` micro-batches of senseflow.data.loader.PromptImageLoader.
    Returns:
        ({name: device scalar}, {name: latents (B, ...) that people look at, from the last micro-batch of a student's turn}).
    """
    student, fake_score, discriminator = models.student, models.fake_score, models.discriminator
    rng = StatelessRNG(args.seed, iteration, device)
    update_student = (iteration + 1) % args.ttur_ratio == 0
    totals: dict[str, torch.Tensor] = {}
    debug_latents: dict[str, torch.Tensor] = {}
    student_samples = []  # what the student drew, for the fake score to learn
    reals = []  # what the classifier should tell it from: latents of real images  # dmd2

    def record(values: dict[str, torch.Tensor]) -> None:
        for name, value in values.items():
            totals[name] = totals.get(name, 0) + value.detach() / len(batches)

    for batch in batches:
        # 1. The student's input: its own first steps from noise (backward simulation), or noised real latents.
        sample_indices = batch["sample_indices"]
        with torch.no_grad():
            condition = models.encode_prompts(batch["prompts"])
            if models.classify is not None:  # dmd2
                x0 = models.real_latents(batch, torch.arange(len(sample_indices)), rng)  # dmd2
                batch = {**batch, "latents": x0}  # encoded once, whoever else wants them  # dmd2
                reals.append(x0)  # dmd2
            x_t, index = student_input(models, schedule, rng, batch, condition, args)
            t, t_next = schedule.anchors[index], schedule.next_timesteps[index]
            if discriminator is not None:
                real, text, omega = models.real_images(batch), models.text_features(batch["prompts"]), models.omega(t)
                reference = models.vision_features(real)

        # 2. What the student makes of it; with gradient on its turn only.
        with student.accumulate() if update_student else torch.no_grad():
            prediction = models.predict(student, x_t, t, condition)
            if discriminator is not None:
                fake = models.vision_features(diff_augment(models.decode(prediction.x0), rng, sample_indices, "fake"))

            # 3. The student's losses, on its turn: L_DMD + w_isg L_ISG + w_gan omega(t) L_adv, the discriminator frozen.
            if update_student:
                losses, debug_latents = student_losses(
                    models, schedule, rng, sample_indices, x_t, t, t_next, prediction, condition, args
                )
                loss = losses["dmd_loss"]
                if "isg_loss" in losses:
                    loss = loss + args.isg_weight * losses["isg_loss"]
                if discriminator is not None:
                    (logits,) = discriminator((fake,), reference, text)
                    losses["adversarial_loss"] = adversarial_loss(logits, omega)
                    loss = loss + args.gan_weight * losses["adversarial_loss"]
                if models.classify is not None:  # dmd2
                    logits = models.classify(
                        fake_score, prediction.x0, rng, sample_indices, "student", condition
                    )  # dmd2
                    losses["adversarial_loss"] = non_saturating_loss(logits)  # dmd2
                    loss = loss + args.gan_weight * losses["adversarial_loss"]  # dmd2
                student.backward(loss)
                record(losses)
        student_samples.append((sample_indices, prediction.x0.detach(), condition))

        # 4. The discriminator's turn, which shares the student's decoded image and its features: hinge loss.
        if discriminator is not None:
            fake = [features.detach() for features in fake]
            with torch.no_grad():
                real = models.vision_features(diff_augment(real, rng, sample_indices, "real"))
            with discriminator.accumulate():
                real_logits, fake_logits = discriminator((real, fake), reference, text)
                loss = hinge_loss(real_logits, fake_logits, omega)
                discriminator.backward(loss)
            record({"discriminator_loss": loss, "real_logits": real_logits.mean(), "fake_logits": fake_logits.mean()})

    # 5. The student's step, then implicit distribution alignment, before the fake score learns.
    if update_student:
        totals["student_grad_norm"], totals["signal/update_ratio"] = student.step(measure_update=True)
        if args.ida_decay < 1:
            fake_score.ida_update_from(student, args.ida_decay)

    # 6. The fake score's turn: it learns to denoise what the student drew before its step.
    for sample_indices, x0, condition in student_samples:
        t = schedule.draw_fake_timesteps(rng, sample_indices)
        noise = rng.normal("fake_noise", sample_indices, x0.shape[1:])
        with fake_score.accumulate():
            output = models.predict(fake_score, schedule.add_noise(x0, noise, t), t, condition).output
            loss = denoising_loss(output, schedule.target(x0, noise))
            record({"fake_loss": loss})
            if models.classify is not None:  # dmd2
                real_logits = models.classify(fake_score, reals.pop(0), rng, sample_indices, "real", condition)  # dmd2
                fake_logits = models.classify(fake_score, x0, rng, sample_indices, "fake", condition)  # dmd2
                classifier_loss = logistic_loss(real_logits, fake_logits)  # dmd2
                record({"classifier_loss": classifier_loss})  # dmd2
                record({"real_logits": real_logits.mean(), "fake_logits": fake_logits.mean()})  # dmd2
                loss = loss + args.classifier_weight * classifier_loss  # dmd2
            fake_score.backward(loss)
    totals["fake_score_grad_norm"] = fake_score.step()
    if discriminator is not None:
        totals["discriminator_grad_norm"] = discriminator.step()
    return totals, debug_latents


# ---------------------------------------------------------------------------------------------------------------------
# SDXL: the network call, the levels
# ---------------------------------------------------------------------------------------------------------------------
def sdxl_inputs(role: Role, x_t, t, condition) -> dict:
    """The arguments of a UNet call at latents x_t (B, C, H, W) and timesteps t (B,)."""
    embeds, pooled, time_ids = condition
    return {
        "sample": x_t.to(role.dtype),
        "timestep": t,
        "encoder_hidden_states": embeds,
        "added_cond_kwargs": {"text_embeds": pooled, "time_ids": time_ids},
    }


def sdxl_predict(schedule: Schedule, role: Role, x_t, t, condition, guidance: Optional[Guidance] = None) -> Prediction:
    """Asks a role about latents x_t (B, C, H, W) at timesteps t (B,).

    Args:
        condition: (prompt_embeds (B, L, D), pooled (B, P), time_ids (B, 6)).
        guidance: for the teacher only. Where none of its scales is above 1, the pass without a prompt (zeros) is not run.
    """
    classifier_free = guidance is not None and guidance.above_one
    latents, steps = x_t, t
    if classifier_free:
        latents, steps = torch.cat([x_t, x_t]), torch.cat([t, t])
        embeds, pooled, time_ids = condition
        condition = (
            torch.cat([torch.zeros_like(embeds), embeds]),
            torch.cat([torch.zeros_like(pooled), pooled]),
            torch.cat([time_ids, time_ids]),
        )
    output = role(**sdxl_inputs(role, latents, steps, condition), return_dict=False)[0]
    if classifier_free:
        output = guide(*output.float().chunk(2), guidance.scale)
    return schedule.as_prediction(x_t, output, t)


class Score(torch.nn.Module):
    """A UNet that returns a tuple, and with `classify` a classifier's logits (B,) on its mid-block (DMD2, section 4.3).

    The classifier is a part of the fake score: it learns with it, and a checkpoint holds both in one place.
    """

    def __init__(self, unet: UNET, classifier: LatentClassifier):
        super().__init__()
        self.unet, self.classifier = unet, classifier

    def forward(self, classify: bool = False, return_dict: bool = False, **inputs):
        return (
            self.classifier(middle(self.unet, **inputs)) if classify else self.unet(**inputs, return_dict=return_dict)
        )


def middle(unet: UNET, sample, timestep, encoder_hidden_states, added_cond_kwargs) -> torch.Tensor:
    """Features (B, C, h, w) after the mid-block: the first half of UNet2DConditionModel.forward; the up-blocks are not run."""
    embedding = unet.time_embedding(unet.get_time_embed(sample, timestep))
    embedding = embedding + unet.get_aug_embed(embedding, encoder_hidden_states, added_cond_kwargs)
    sample = unet.conv_in(sample)
    for block in (*unet.down_blocks, unet.mid_block):
        text = {"encoder_hidden_states": encoder_hidden_states} if getattr(block, "has_cross_attention", False) else {}
        sample = block(sample, temb=embedding, **text)
        sample = sample[0] if isinstance(sample, tuple) else sample  # a down-block returns its skip connections, too
    return sample


def middle_size(unet: UNET, latent_size: int) -> int:
    """Side of the mid-block's features for latents of this side: a down-block that halves rounds up."""
    for block in unet.down_blocks:
        latent_size = math.ceil(latent_size / 2) if block.downsamplers else latent_size
    return latent_size


def classify(
    schedule: Schedule, role: Role, x0, rng: StatelessRNG, sample_indices, name: str, condition
) -> torch.Tensor:
    """The classifier's logits (B,) on x0 (B, C, H, W), noised to uniform timesteps of the whole table; gradient flows to x0."""
    t = schedule.table[rng.integers(f"{name}_classifier_timestep", sample_indices, 0, len(schedule.table) - 1)]
    x_t = schedule.add_noise(x0, rng.normal(f"{name}_classifier_noise", sample_indices, x0.shape[1:]), t)
    return role(**sdxl_inputs(role, x_t, t, condition), classify=True)


def make_schedule(args, device) -> tuple[DDPMSchedule, LCMScheduler, dict]:
    """(schedule to train on, scheduler to save, arguments of the stock call): the anchors are the levels which that call visits."""
    config = teacher_source(args).config(DDPMScheduler, "scheduler", exact=False)
    teacher = DDPMScheduler.from_config(config)
    num_timesteps, steps = teacher.config.num_train_timesteps, len(args.anchors)
    ranges = {
        "dmd_range": (round(0.02 * num_timesteps), round(0.98 * num_timesteps)),
        "fake_range": (0, num_timesteps - 1),
    }
    schedule = DDPMSchedule(teacher.alphas_cumprod, torch.arange(num_timesteps), args.anchors, device=device, **ranges)
    check_anchors(args, schedule)
    betas = {name: teacher.config[name] for name in ("beta_start", "beta_end", "beta_schedule", "trained_betas")}
    scheduler = LCMScheduler(num_train_timesteps=num_timesteps, original_inference_steps=steps, **betas)
    call = {"num_inference_steps": steps, "guidance_scale": 0.0, "height": args.resolution, "width": args.resolution}
    visiting = LCMScheduler.from_config(scheduler.config)
    visiting.set_timesteps(steps)
    if visiting.timesteps.tolist() != args.anchors:
        call["timesteps"] = [int(t) for t in args.anchors]
    return schedule, scheduler, call


# ---------------------------------------------------------------------------------------------------------------------
# Before anything loads: arguments
# ---------------------------------------------------------------------------------------------------------------------
# fmt: off
def parse_args(argv=None):
    parser = Parser(description=__doc__.split("\n\n")[0], formatter_class=HelpFormatter)

    add = parser.add_argument_group("model").add_argument
    add("--pretrained_model_name_or_path", required=True, help=f"the teacher: a {PIPELINE.__name__}, Hub id or folder")
    add("--revision", help="of the teacher on the Hub: a branch, tag or commit; the run keeps to its commit")
    add("--variant", help="of the weight files, e.g. fp16, of the teacher and of other networks that come in it")
    add("--pretrained_vae_model_name_or_path", help="another VAE, e.g. the fp16-fix one; saved with the student (diffusers)")
    add("--student_model_name_or_path",
        help=f"warm start of student and fake score: {UNET.__name__} or {PIPELINE.__name__}; with --rank an adapter of that rank")

    add_lora_arguments(parser, LORA_LAYERS)

    add = parser.add_argument_group("data: exactly one of the first five").add_argument
    add("--dataset_json", help='{"keys": [...], "image_paths": [...], "prompts": [...]}; paths absolute or relative to the file')
    add("--dataset_name", help="Hub id, or whatever datasets.load_dataset takes")
    add("--train_data_dir", help="folder of images; captions in metadata.{jsonl,csv,parquet} or a .txt each, one a line")
    add("--prompts_file", help="one prompt a line; needs --gan_weight 0 --backward_simulation_prob 1, no image is needed then")
    add("--dataset_lmdb", help="a folder with DMD2's LMDB of VAE latents and prompts, or of several; needs lmdb")
    add("--dataset_config_name", help="of --dataset_name")
    add("--image_column", default="image", help="of --dataset_name and --train_data_dir (datasets' imagefolder)")
    add("--caption_column", default="text", help="of both; of a list of captions, one is drawn (datasets' imagefolder)")
    add("--streaming", action="store_true", help="read --dataset_name as a stream, without a copy on the disk; a folder needs none")
    add("--resolution", type=int, default=1024,
        help="px, a multiple of 8 (SDXL): the shorter side, then a square crop (release, SDXL)")
    add("--center_crop", action="store_true", help="crop the center instead of a random square")
    add("--random_flip", action="store_true", help="flip half of the images horizontally")
    add("--max_train_samples", type=int, help="use the first so many rows; of a stream, so many")
    add("--dataloader_num_workers", type=int, default=0, help="processes that read images, per rank (diffusers)")

    add = parser.add_argument_group("senseflow").add_argument
    add("--method", choices=list(PRESETS), default="senseflow",
        help="senseflow, or its baseline dmd2: no ISG, no IDA, and a classifier on the fake score's mid-block for the "
        "discriminator; decides the defaults marked (method: senseflow / dmd2)")
    add("--anchors", type=float, nargs="+", default=ANCHORS,
        help="decreasing integer timesteps in [1, 999] at which the student is run (release, SDXL)")
    add("--ttur_ratio", type=int, default=5, help="iterations per step of the student (release, SDXL)")
    add("--ida_decay", type=float,
        help="fake <- decay fake + (1 - decay) student after its step; 1 = off (release, SDXL); "
        "0.97-0.98 for FLUX and SD 3.5 (method: 1 / none)")
    add("--isg_weight", type=float,
        help="of intra-segment guidance, a Charbonnier loss as in the release (paper: squared L2); 0 = off (method: 0.2 / none; "
        "release, SDXL, of a loss in which t_mid cancels, times sqrt(abar(t_next)) .24 .53 .82 1; this one is whole)")
    add("--isg_margin", type=float,
        help="timesteps that t_mid keeps from both ends of its segment (method: 20 / none; release, SDXL)")
    add("--gan_weight", type=float,
        help="of the adversarial loss, with senseflow times omega(t), the release's sqrt(abar) (paper: abar); "
        "0 = off, no discriminator is loaded (method: 0.5 / 0.005; release, SDXL)")
    add("--classifier_weight", type=float,
        help="of the classifier's loss beside the fake score's (method: none / 0.01; release, SDXL)")
    add("--backward_simulation_prob", type=float,
        help="else real latents are noised (method: 0.5, release, SDXL / 1, DMD2's paper; the release has 0)")
    add("--dmd_guidance_scale", type=float, nargs="+", default=[8.0],
        help="the teacher's in L_DMD: a value or MIN MAX (release, SDXL)")
    add("--isg_guidance_scale", type=float, nargs="+",
        help="the teacher's in L_ISG: a value or MIN MAX (method: 3 15 / none; release, SDXL)")
    add("--discriminator_backbone", help="a DINOv2, Hub id or folder (method: facebook/dinov2-large / none; release, SDXL)")
    add("--discriminator_layers", type=int, nargs="+",
        help="its blocks whose output is looked at (default: 2 5 8 10 14 19 23 of 24, the same depths of any other; release, SDXL)")
    add("--discriminator_resolution", type=int, help="px, to which images are scaled for it (default: none; release, SDXL)")
    add("--discriminator_text_encoder", help="a CLIP with projection (method: openai/clip-vit-large-patch14 / none; release, SDXL)")

    add = parser.add_argument_group("optimization").add_argument
    add("--train_batch_size", type=int, default=1, help="images per process and micro-batch (release, SDXL)")
    add("--gradient_accumulation_steps", type=int, default=1, help="micro-batches per iteration (release, SDXL)")
    add("--max_train_steps", type=int, default=18000,
        help="iterations = fake-score updates, of 8 images in the paper (paper, SDXL)")
    add("--learning_rate", type=float, default=1e-6, help="of the student (release, SDXL; seven times that with --rank)")
    add("--learning_rate_fake", type=float, help="of the fake score (default: --learning_rate; with --rank five sevenths of it)")
    add("--learning_rate_disc", type=float, help="of the discriminator (default: --learning_rate; with --rank a seventh of it)")
    add("--lr_scheduler", default="constant", choices=LR_SCHEDULERS, help="as in diffusers (release, SDXL)")
    add("--lr_warmup_steps", type=int, default=0, help="in iterations (release, SDXL)")
    add("--lr_warmup_start_factor", type=float, default=0.0, help="fraction of the rate that the warm-up starts from (diffusers)")
    add("--adam_beta1", type=float, default=0.9, help="(release, SDXL)")
    add("--adam_beta2", type=float, default=0.999, help="(release, SDXL)")
    add("--adam_epsilon", type=float, default=1e-8, help="(release, SDXL)")
    add("--adam_weight_decay", type=float, default=0.0, help="(release, SDXL)")
    add("--max_grad_norm", type=float, default=1.0, help="clipping, each network by itself (release, SDXL)")
    add("--seed", type=int, default=0, help="of every random draw (ours)")

    add = parser.add_argument_group("precision and memory").add_argument
    add("--mixed_precision", choices=["no", "bf16"], default=os.environ.get("ACCELERATE_MIXED_PRECISION", "no"),
        help="bf16: frozen networks in bf16, trained ones with fp32 masters (default: accelerate's configuration)")
    add("--vae_dtype", choices=["auto", "fp32", "bf16"], default="auto",
        help="in which the VAE encodes and decodes; auto: fp32, under --mixed_precision bf16 too (release, SDXL)")
    add("--gradient_checkpointing", action="store_true", help="recompute student, fake score, DINOv2, VAE decoder in the backward")
    add("--offload_text_encoders", action="store_true", help="keep them on the CPU; freed if the prompts are few (ours)")
    add("--use_8bit_adam", action="store_true", help="needs bitsandbytes (off in the release, SDXL)")
    add("--allow_tf32", action="store_true", help="TF32 matmuls on Ampere and later")
    add("--enable_xformers_memory_efficient_attention", action="store_true", help="needs xformers")
    add("--dry_run", type=float, nargs="?", const=0.0, metavar="GB",
        help="train nothing: print what this command takes of a GPU, and for a card of GB what would make it fit (ours)")

    add = parser.add_argument_group("checkpointing").add_argument
    add("--output_dir", required=True, help="checkpoints, logs, and in the end the pipeline")
    add("--checkpointing_steps", type=int, default=3000, help="iterations (release, SDXL)")
    add("--checkpoints_total_limit", type=int, help="keep the newest so many")
    add("--resume_from_checkpoint", help='a checkpoint folder, the name of one in --output_dir, or "latest"')
    add("--export_dtype", choices=list(DTYPES), default="bf16", help="of the saved pipeline (ours)")

    add = parser.add_argument_group("logging and validation").add_argument
    add("--report_to", default="tensorboard", help="a tracker of accelerate, or none (diffusers)")
    add("--logging_dir", default="logs", help="below --output_dir (diffusers)")
    add("--validation_prompts", nargs="+", help="draw these with the teacher once and with the student each time")
    add("--validation_steps", type=int, default=500, help="iterations (ours)")
    add("--num_validation_images", type=int, default=1, help="per prompt (ours)")
    add("--teacher_num_inference_steps", type=int, default=50,
        help="of the teacher's validation images (StableDiffusionXLPipeline's default)")
    add("--teacher_guidance_scale", type=float, default=5.0,
        help="of the teacher's validation images (StableDiffusionXLPipeline's default)")
    parser.set_defaults(sampler="stochastic")  # what LCMScheduler does
    args = parser.parse_args(argv)
    return complete_args(fill_in(args, PRESETS[args.method]))
# fmt: on


def check_levels(source: ModelSource, scheduler: dict) -> None:
    """Refuses (exit code 2) teachers that look like SDXL and have other noise levels or another prediction."""
    found = scheduler.get("prediction_type", "epsilon")
    if "beta_schedule" not in scheduler:
        found = f"the levels of {scheduler.get('_class_name')}"
    elif scheduler.get("rescale_betas_zero_snr"):
        found = "rescale_betas_zero_snr"
    if found != "epsilon":
        raise source.error(f"has {found}; this script trains teachers that predict epsilon, as SDXL does")


def check_args(args):
    """Refuses bad arguments with one line each, before any weight loads; returns the rows of the data set."""
    check_common_args(args, INACTIVE_FLAGS)
    checked = check_data_args(args)
    if any(t != int(t) or t > 999 for t in args.anchors):
        shown = " ".join(f"{t:g}" for t in args.anchors)
        raise UserError(f"--anchors {shown}: SDXL has integer timesteps up to 999", exit_code=2)
    source = check_pipeline(teacher_source(args), PIPELINE)
    args.revision = source.revision
    vae = source.config(VAE, "vae")
    if args.pretrained_vae_model_name_or_path:
        names = ("latent_channels", "block_out_channels", "latents_mean", "latents_std")
        check_compatible(vae_source(args), VAE, "vae", vae, names)
    check_levels(source, source.config(DDPMScheduler, "scheduler", exact=False))
    unet = source.config(UNET, "unet")
    check_lora_args(args, UNET, unet, LORA_LAYERS)
    if args.student_model_name_or_path and not args.rank:
        names = ("in_channels", "out_channels", "cross_attention_dim", "projection_class_embeddings_input_dim")
        names += ("time_cond_proj_dim", "mid_block_type")
        check_compatible(student_source(args, source), UNET, "unet", unet, names)
    if args.gan_weight > 0 and args.method == "dmd2" and unet.get("mid_block_type", "") is None:
        raise source.error(
            "its UNet has no mid-block for --method dmd2's classifier; give --gan_weight 0 or another teacher"
        )
    if args.gan_weight > 0 and args.method == "dmd2" and args.classifier_weight == 0:
        raise UserError(
            "--classifier_weight 0: the classifier would never learn; give --gan_weight 0 to do without", exit_code=2
        )
    if args.gan_weight > 0 and args.method == "senseflow":
        check_discriminator_args(args)
    check_resolution(args, vae_scale_of(vae))
    make_schedule(args, "cpu")
    rows = load_rows(args, checked)
    check_latents(args, rows, latent_shape_of(vae, args.resolution))
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# Loading
# ---------------------------------------------------------------------------------------------------------------------
def vae_source(args) -> ModelSource:
    """Where the VAE is."""
    if args.pretrained_vae_model_name_or_path:
        path = args.pretrained_vae_model_name_or_path
        return ModelSource("--pretrained_vae_model_name_or_path", path, variant=args.variant)
    return teacher_source(args)


def own_vae(args) -> dict:
    """{"vae": a whole one} where it is not the teacher's: it is saved with the student."""
    if not args.pretrained_vae_model_name_or_path:
        return {}
    return {"vae": load_network(vae_source(args), VAE, "vae")}


def load_parts(args, runtime: Runtime, schedule: DDPMSchedule) -> tuple[TrainingModels, PIPELINE]:
    """All networks, as the roles and functions that the algorithm works with; (parts, the pipeline)."""
    source, device = teacher_source(args), runtime.device
    unet = from_pretrained_meta(source, UNET, "unet", runtime.weight_dtype)
    dmd2 = args.method == "dmd2" and args.gan_weight > 0
    encodes = (args.backward_simulation_prob < 1 or dmd2) and not args.dataset_lmdb
    decodes = (args.gan_weight > 0 and not dmd2) or bool(args.validation_prompts)
    vae = load_vae(vae_source(args), VAE, args, device, encodes, decodes, "fp32")
    pipeline = load_pipeline(source, PIPELINE, unet=unet, vae=vae, dtype=runtime.weight_dtype)
    teacher_print = make_base(args, pipeline, "unet", device)
    place_text_encoders(args, pipeline, device)
    size = (args.resolution, args.resolution)
    time_ids = torch.tensor(
        [[*size, 0, 0, *size]], device=device, dtype=runtime.weight_dtype
    )  # whole images, as a stock call

    @torch.no_grad()
    def encode_prompts(prompts):
        embeds, _, pooled, _ = pipeline.encode_prompt(list(prompts), device=device, do_classifier_free_guidance=False)
        return embeds, pooled, time_ids.expand(len(prompts), -1)

    if args.rank:
        student, fake_score = adapted_twins(materialize(unet, device), args)
    else:
        student = from_pretrained_meta(student_source(args, source), UNET, "unet")
        fake_score = copy.deepcopy(student)
    for network in (unet, student, fake_score):
        if args.enable_xformers_memory_efficient_attention:
            network.enable_xformers_memory_efficient_attention()
    if args.gradient_checkpointing:
        student.enable_gradient_checkpointing()
        fake_score.enable_gradient_checkpointing()
    config = source.config(VAE, "vae")
    latent_shape = latent_shape_of(config, args.resolution)
    if dmd2:
        classifier = LatentClassifier(student.config.block_out_channels[-1], middle_size(student, latent_shape[-1]))
        fake_score = Score(fake_score, classifier)
    models = TrainingModels(
        teacher=runtime.frozen_role("teacher", unet, teacher_print),  # first: its twins take its shards
        student=runtime.trained_role("student", student, args.learning_rate, args.ttur_ratio, subfolder="unet"),
        fake_score=runtime.trained_role("fake_score", fake_score, args.learning_rate_fake),
        discriminator=None,
        predict=partial(sdxl_predict, schedule),
        encode_prompts=encode_prompts,
        real_latents=partial(real_latents, vae),
        latent_shape=latent_shape,
    )
    if dmd2:
        models.classify = partial(classify, schedule)
    elif args.gan_weight > 0:
        heads, *features = load_discriminator(args, runtime.weight_dtype, device)
        models.vision_features, models.text_features = features
        models.discriminator = runtime.trained_role(
            "discriminator", heads, args.learning_rate_disc, gather_bf16=False
        )
        models.real_images, models.decode = partial(real_images, vae), partial(decode, vae)
        models.omega = lambda t: schedule.levels(t)[0].float()
    return models, pipeline


def teacher_call(args, unet) -> dict:
    """What of the stock call is different where the teacher draws validation images with its many steps."""
    steps, guidance = args.teacher_num_inference_steps, args.teacher_guidance_scale
    return {"num_inference_steps": steps, "guidance_scale": guidance, "timesteps": None}


# ---------------------------------------------------------------------------------------------------------------------
# The run
# ---------------------------------------------------------------------------------------------------------------------
# Copied from train_senseflow_flux.main but for lines marked vae
def main(argv=None):
    args = parse_args(argv)
    rows = check_args(args)
    if args.dry_run is not None:
        return report(args, make_schedule, load_parts, train_iteration)
    checkpoint = find_checkpoint(args)
    state = read_state(checkpoint) if checkpoint else {"iteration": 0, "samples_seen": 0}
    Path(args.output_dir).mkdir(parents=True, exist_ok=True)
    runtime = Runtime(args)
    runtime.start_trackers("senseflow")
    schedule, scheduler, call = make_schedule(args, runtime.device)
    components = {"scheduler": scheduler}  # what of the saved pipeline is not the teacher's, besides the student
    components |= own_vae(args)  # vae
    models, pipeline = load_parts(args, runtime, schedule)
    models.encode_prompts = encode_small_set(args, rows, pipeline, models.encode_prompts, runtime.device)
    fingerprints = fingerprints_of(models)
    fingerprints["vae"] = fingerprint(components["vae"]) if "vae" in components else "the teacher's"  # vae
    if checkpoint:
        compare_with_checkpoint(checkpoint, state, args, fingerprints, runtime.trained)
        for role in runtime.trained:
            role.load(checkpoint)
    if runtime.accelerator.is_main_process:
        clear_leftovers(args.output_dir)
        check_disk(args, runtime.trained)
    iteration, samples_seen = state["iteration"], state["samples_seen"]
    runtime.saved = iteration
    rank, world_size = runtime.accelerator.process_index, runtime.accelerator.num_processes
    wanted = partial(needs_images, args.seed, args.gan_weight, args.backward_simulation_prob)
    loader = make_dataloader(args, rows, rank, world_size, iteration, samples_seen, wanted)
    per_iteration = args.train_batch_size * args.gradient_accumulation_steps * world_size
    logger.info(f"anchors {', '.join(f'{t:.1f}' for t in schedule.anchors)}; {per_iteration} samples per iteration")

    def save() -> None:
        record = student_config(args, schedule, call, iteration, fingerprints)
        usage = partial(write_student_config, record=record, components=components, signals=validation.signals)
        save_checkpoint(runtime, iteration, samples_seen, fingerprints, usage)

    validation = Validation(runtime, args, pipeline, models.student.subfolder)
    if args.validation_prompts:
        validation.draw(
            models.teacher, pipeline.scheduler, call | teacher_call(args, models.teacher.module), iteration
        )
    progress = tqdm(
        total=args.max_train_steps, initial=iteration, disable=not runtime.accelerator.is_local_main_process
    )
    metrics = Metrics(runtime, models.student, per_iteration, progress)
    debug_latents: dict[str, torch.Tensor] = {}
    for batches in metrics.batches(loader, args.max_train_steps - iteration):
        values, new_debug_latents = train_iteration(iteration, batches, models, schedule, args, runtime.device)
        debug_latents = new_debug_latents or debug_latents
        iteration, samples_seen = iteration + 1, samples_seen + per_iteration
        metrics.push(iteration, values)
        if args.validation_prompts and iteration % args.validation_steps == 0:
            validation.draw(models.student, scheduler, call, iteration)
            if debug_latents:
                runtime.log_image(
                    "panel/" + " ".join(debug_latents), decode_debug_latents(pipeline.vae, debug_latents), iteration
                )
        if iteration % args.checkpointing_steps == 0:
            metrics.flush()  # a diverged student does not replace a sound one
            save()
    metrics.flush()
    if metrics.ended_by and runtime.saved < iteration:
        save()
    progress.close()
    check_finished(runtime, metrics, iteration)
    record = student_config(args, schedule, call, iteration, fingerprints)
    export(runtime, args, PIPELINE, models.student, components, record)
    runtime.accelerator.end_training()


if __name__ == "__main__":
    run_script(main)
