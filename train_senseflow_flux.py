#!/usr/bin/env python
# Copyright 2026 The SenseFlow-scripts authors. Licensed under the Apache License, Version 2.0.
"""Distils a FLUX teacher to few steps with SenseFlow (Ge et al., ICLR 2026, arXiv 2506.00523).

    accelerate launch --config_file accelerate_configs/fsdp2.yaml train_senseflow_flux.py \
        --pretrained_model_name_or_path black-forest-labs/FLUX.1-dev --dataset_json data.json --output_dir flux-4step \
        --mixed_precision bf16 --gradient_checkpointing --offload_text_encoders

`train_iteration` is the algorithm, in the paper's order. It speaks of four roles (student, teacher, fake_score, discriminator);
what stands behind a role is senseflow.training.roles' business, the formulas are senseflow_utils'.
"""

import copy
import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Callable, Optional, Sequence

import numpy as np
import torch
import transformers
from accelerate.logging import get_logger


transformers.utils.logging.set_verbosity_error()  # importing a pipeline would print notes about packages that are not needed
transformers.utils.logging.get_logger("bitsandbytes").setLevel("ERROR")

from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from diffusers.pipelines.flux.pipeline_flux import calculate_shift, retrieve_timesteps
from tqdm.auto import tqdm

from senseflow.arguments import (
    DTYPES,
    LR_SCHEDULERS,
    HelpFormatter,
    Parser,
    add_lora_arguments,
    check_common_args,
    complete_args,
    refuse_unused,
)
from senseflow.data.sources import check_data_args, check_latents, load_rows, make_dataloader
from senseflow.errors import UserError, run_script
from senseflow.memory.report import report
from senseflow.models.discriminator import check_discriminator_args, diff_augment, load_discriminator
from senseflow.models.hub import check_compatible, check_pipeline, load_pipeline, student_source, teacher_source
from senseflow.models.lora import adapted_twins, check_lora_args, make_base
from senseflow.models.schedulers import fit_flow_scheduler
from senseflow.models.text_encoders import encode_small_set, place_text_encoders
from senseflow.models.vae import decode, latent_shape_of, load_vae, real_images, real_latents, vae_scale_of
from senseflow.models.weights import from_pretrained_meta, materialize, meta_network, part_of, weights_of
from senseflow.training.checkpoints import (
    check_disk,
    check_finished,
    clear_leftovers,
    compare_with_checkpoint,
    find_checkpoint,
    fingerprints_of,
    read_state,
    save_checkpoint,
)
from senseflow.training.export import check_anchors, check_resolution, export, student_config, write_student_config
from senseflow.training.roles import Role
from senseflow.training.runtime import Metrics, Runtime
from senseflow.training.validation import Validation, decode_debug_latents
from senseflow_utils import (
    SAMPLERS,
    FlowSchedule,
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
)


logger = get_logger(__name__)

# What the teacher is and what the student is saved as, and of what it is made.
PIPELINE, TRANSFORMER, VAE = FluxPipeline, FluxTransformer2DModel, AutoencoderKL
# Attention and feed-forward, in the single blocks, too, where they are proj_mlp and proj_out.
LORA_LAYERS = [
    r".*blocks\.\d+\.(attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)|ff(_context)?\.net\.(0\.proj|2)|proj_mlp|proj_out)"
]


# ---------------------------------------------------------------------------------------------------------------------
# The algorithm
# ---------------------------------------------------------------------------------------------------------------------
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


def num_simulated_steps(rng: StatelessRNG, probability: float, anchors: int) -> Optional[int]:
    """How many anchors backward simulation runs through in this iteration; None: it noises real latents. Same on all ranks."""
    if rng.shared_uniform("simulate") < probability:
        return rng.shared_integer("simulated_steps", anchors)
    return None


def needs_images(seed: int, gan_weight: float, probability: float, iteration: int) -> bool:
    """Whether an iteration looks at real images at all; where not, none is read from the disk."""
    return gan_weight > 0 or num_simulated_steps(StatelessRNG(seed, iteration), probability, 1) is None


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

    def record(values: dict[str, torch.Tensor]) -> None:
        for name, value in values.items():
            totals[name] = totals.get(name, 0) + value.detach() / len(batches)

    for batch in batches:
        # 1. The student's input: its own first steps from noise (backward simulation), or noised real latents.
        sample_indices = batch["sample_indices"]
        with torch.no_grad():
            condition = models.encode_prompts(batch["prompts"])
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
            fake_score.backward(loss)
    totals["fake_score_grad_norm"] = fake_score.step()
    if discriminator is not None:
        totals["discriminator_grad_norm"] = discriminator.step()
    return totals, debug_latents


# ---------------------------------------------------------------------------------------------------------------------
# FLUX: the network call, the prompts, the levels
# ---------------------------------------------------------------------------------------------------------------------
def flux_predict(
    schedule: Schedule,
    empty: Optional[tuple],
    scale: float,
    role: Role,
    x_t,
    t,
    condition,
    guidance: Optional[Guidance] = None,
) -> Prediction:
    """Asks a role about latents x_t (B, C, H, W) at timesteps t (B,).

    Args:
        empty: condition of the empty prompt, batch 1, for the classifier-free guidance of a role without a guidance embedder;
            None where no guidance scale is above 1.
        scale: what student and fake score, which take no `guidance`, tell a guidance embedder; adapters leave it where it is.
        condition: (prompt_embeds (B, L, D), pooled (B, P)).
        guidance: for the teacher only. Where none of its scales is above 1, the pass for the empty prompt is not run.
    """
    _, channels, height, width = x_t.shape
    embeds, pooled = condition
    embedded = role.module.config.guidance_embeds
    classifier_free = guidance is not None and not embedded and guidance.above_one
    latents, steps = x_t, t
    if classifier_free:
        latents, steps = torch.cat([x_t, x_t]), torch.cat([t, t])
        embeds = torch.cat([empty[0].expand_as(embeds), embeds])
        pooled = torch.cat([empty[1].expand_as(pooled), pooled])
    batch, dtype = len(latents), role.dtype
    scales = torch.full_like(steps, scale, dtype=torch.float32) if guidance is None else guidance.scale
    packed = PIPELINE._pack_latents(latents.to(dtype), batch, channels, height, width)
    output = role(
        hidden_states=packed,
        timestep=steps.to(dtype) / 1000,  # rounded as a stock pipeline in this dtype rounds it
        guidance=scales.to(dtype) if embedded else None,
        pooled_projections=pooled,
        encoder_hidden_states=embeds,
        txt_ids=torch.zeros(embeds.shape[1], 3, device=x_t.device, dtype=dtype),
        img_ids=PIPELINE._prepare_latent_image_ids(batch, height // 2, width // 2, x_t.device, dtype),
        return_dict=False,
    )[0]
    output = (
        output.view(batch, height // 2, width // 2, channels, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(latents.shape)
    )
    if classifier_free:
        output = guide(*output.float().chunk(2), guidance.scale)
    return schedule.as_prediction(x_t, output, t)


def without_guidance_embedder(transformer: TRANSFORMER, scale: float) -> TRANSFORMER:
    """One, in float32, that needs no guidance: the embedder's output at `scale` is folded into the timestep embedder's bias.

    It then equals the original at that guidance. `scale` 0 drops the embedder and nothing makes up for it, as the original
    release does. Of a transformer without the embedder it is a copy. It is empty (senseflow.models.weights) until a role is made of it.
    """
    weights, changed = weights_of(transformer), {}
    if transformer.config.guidance_embeds and scale > 0:
        bias = "time_text_embed.timestep_embedder.linear_2.bias"
        embedder = part_of(transformer, "time_text_embed.guidance_embedder")
        with torch.no_grad():
            projected = transformer.time_text_embed.time_proj(torch.tensor([1000.0 * scale])).float()
            changed[bias] = weights.read(bias).float().cpu() + embedder(projected)[0]
    config = {**transformer.config, "guidance_embeds": False}
    return meta_network(TRANSFORMER, config, weights.with_tensors(changed))


def stock_sigmas(scheduler, steps: int, tokens: int) -> list[float]:
    """The noise levels that a stock FluxPipeline call visits, without the final 0; `tokens` is (height / 16) * (width / 16)."""
    config = scheduler.config
    mu = calculate_shift(
        tokens, config.base_image_seq_len, config.max_image_seq_len, config.base_shift, config.max_shift
    )
    retrieve_timesteps(scheduler, steps, "cpu", sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
    return scheduler.sigmas[:-1].tolist()


def make_schedule(args, device) -> tuple[FlowSchedule, FlowMatchEulerDiscreteScheduler, dict]:
    """(schedule to train on, scheduler to save, arguments of the stock call): the anchors are the levels which that call visits."""
    source = teacher_source(args)
    teacher = source.load(FlowMatchEulerDiscreteScheduler.from_pretrained, subfolder="scheduler")
    vae = source.config(VAE, "vae")
    tokens = (args.resolution // (2 * vae_scale_of(vae))) ** 2
    table = teacher.timesteps.clone()
    wanted = [t / 1000 for t in args.anchors] if args.anchors else stock_sigmas(teacher, 4, tokens)
    scheduler, sigmas = fit_flow_scheduler(wanted, lambda s: stock_sigmas(s, len(wanted), tokens), args.sampler)
    schedule = FlowSchedule(table, [1000 * sigma for sigma in sigmas], device=device)
    check_anchors(args, schedule)
    # An adapter leaves the guidance embedder where it is; of a network without, the call's guidance is no matter.
    embedded = args.rank and source.config(TRANSFORMER, "transformer").get("guidance_embeds")
    guidance = args.student_guidance_scale if embedded else 1.0
    call = {
        "num_inference_steps": len(sigmas),
        "guidance_scale": guidance,
        "height": args.resolution,
        "width": args.resolution,
    }
    visited = stock_sigmas(type(scheduler).from_config(scheduler.config), len(sigmas), tokens)
    if max(abs(a - b) for a, b in zip(visited, sigmas)) > 1e-3:
        call["sigmas"] = schedule.levels(schedule.anchors)[1].tolist()
    return schedule, scheduler, {**call, "max_sequence_length": args.max_sequence_length}


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
    add("--student_model_name_or_path",
        help=f"warm start of student and fake score: a {TRANSFORMER.__name__} or {PIPELINE.__name__}, Hub id or folder; "
        "with --rank an adapter of that rank")
    add("--student_guidance_scale", type=float, default=3.5,
        help="guidance folded into student and fake score, so that they start as the teacher at it, with --rank said to the "
        "embedder in every call; 0 drops the embedder as the release, FLUX, does (3.5: FluxPipeline's default)")
    add("--max_sequence_length", type=int, default=512, help="T5 tokens (release, FLUX)")

    add_lora_arguments(parser, LORA_LAYERS)

    add = parser.add_argument_group("data: exactly one of the first five").add_argument
    add("--dataset_json",
        help='{"keys": [...], "image_paths": [...], "prompts": [...]}; paths absolute or relative to the file')
    add("--dataset_name", help="Hub id, or whatever datasets.load_dataset takes")
    add("--train_data_dir", help="folder of images; captions in metadata.{jsonl,csv,parquet} or a .txt each, one a line")
    add("--prompts_file",
        help="one prompt a line; needs --gan_weight 0 --backward_simulation_prob 1, no image is needed then")
    add("--dataset_lmdb", help="a folder with DMD2's LMDB of VAE latents and prompts, or of several; needs lmdb")
    add("--dataset_config_name", help="of --dataset_name")
    add("--image_column", default="image", help="of --dataset_name and --train_data_dir (datasets' imagefolder)")
    add("--caption_column", default="text", help="of both; of a list of captions, one is drawn (datasets' imagefolder)")
    add("--streaming", action="store_true", help="read --dataset_name as a stream, without a copy on the disk; a folder needs none")
    add("--resolution", type=int, default=1024,
        help="px, a multiple of 16 (FLUX): the shorter side, then a square crop (release, FLUX)")
    add("--center_crop", action="store_true", help="crop the center instead of a random square")
    add("--random_flip", action="store_true", help="flip half of the images horizontally")
    add("--max_train_samples", type=int, help="use the first so many rows; of a stream, so many")
    add("--dataloader_num_workers", type=int, default=0, help="processes that read images, per rank (diffusers)")

    add = parser.add_argument_group("senseflow").add_argument
    add("--anchors", type=float, nargs="+",
        help="decreasing timesteps in (0, 1000] at which the student is run (default: the teacher's "
        "stock 4-step schedule at --resolution; FLUX at 1024 px: 1000 904.5 759.5 512.8)")
    add("--sampler", choices=SAMPLERS, default="stochastic",
        help="how backward simulation and the saved pipeline go from anchor to "
        "anchor (paper: stochastic)")
    add("--ttur_ratio", type=int, default=5, help="iterations per step of the student (release, FLUX)")
    add("--ida_decay", type=float, default=0.97,
        help="fake <- decay fake + (1 - decay) student after its step; 1 = off (release, FLUX)")
    add("--isg_weight", type=float, default=1.0,
        help="of intra-segment guidance, a Charbonnier loss as in the release (paper: squared L2); 0 = off (release, FLUX)")
    add("--isg_margin", type=float, default=20, help="timesteps that t_mid keeps from both ends of its segment (release, FLUX)")
    add("--gan_weight", type=float, default=2.0,
        help="of the adversarial loss times omega(t) = (1 - sigma)^2, as in paper and release; "
        "0 = off, no discriminator is loaded (release, FLUX)")
    add("--backward_simulation_prob", type=float, default=0.5, help="else real latents are noised (release, FLUX)")
    add("--dmd_guidance_scale", type=float, nargs="+", default=[1.0, 8.0],
        help="the teacher's in L_DMD: a value or MIN MAX (release, FLUX)")
    add("--isg_guidance_scale", type=float, nargs="+", default=[1.0, 8.0],
        help="the teacher's in L_ISG: a value or MIN MAX (release, FLUX)")
    add("--discriminator_backbone", default="facebook/dinov2-large", help="a DINOv2, Hub id or folder (release, FLUX)")
    add("--discriminator_layers", type=int, nargs="+",
        help="its blocks whose output is looked at (default: 2 5 8 10 14 19 23 of 24, the same depths of any other; release, FLUX)")
    add("--discriminator_resolution", type=int, help="px, to which images are scaled for it (default: none; release, FLUX)")
    add("--discriminator_text_encoder", default="openai/clip-vit-large-patch14", help="a CLIP with projection (release, FLUX)")

    add = parser.add_argument_group("optimization").add_argument
    add("--train_batch_size", type=int, default=1, help="images per process and micro-batch (release, FLUX)")
    add("--gradient_accumulation_steps", type=int, default=1, help="micro-batches per iteration (release, FLUX)")
    add("--max_train_steps", type=int, default=12000,
        help="iterations = fake-score updates, of 8 images in the paper (paper, FLUX)")
    add("--learning_rate", type=float, default=1e-5, help="of the student (release, FLUX; seven times that with --rank)")
    add("--learning_rate_fake", type=float, help="of the fake score (default: --learning_rate; with --rank five sevenths of it)")
    add("--learning_rate_disc", type=float, help="of the discriminator (default: --learning_rate; with --rank a seventh of it)")
    add("--lr_scheduler", default="constant_with_warmup", choices=LR_SCHEDULERS,
        help="as in diffusers (release, FLUX)")
    add("--lr_warmup_steps", type=int, default=500, help="in iterations (release, FLUX)")
    add("--lr_warmup_start_factor", type=float, default=0.5, help="fraction of the rate that the warm-up starts from (release, FLUX)")
    add("--adam_beta1", type=float, default=0.9, help="(release, FLUX)")
    add("--adam_beta2", type=float, default=0.999, help="(release, FLUX)")
    add("--adam_epsilon", type=float, default=1e-8, help="(release, FLUX)")
    add("--adam_weight_decay", type=float, default=0.0, help="(release, FLUX)")
    add("--max_grad_norm", type=float, default=1.0, help="clipping, each network by itself (release, FLUX)")
    add("--seed", type=int, default=0, help="of every random draw (ours)")

    add = parser.add_argument_group("precision and memory").add_argument
    add("--mixed_precision", choices=["no", "bf16"], default=os.environ.get("ACCELERATE_MIXED_PRECISION", "no"),
        help="bf16: frozen networks in bf16, trained ones with fp32 masters (default: accelerate's configuration)")
    add("--vae_dtype", choices=["auto", "fp32", "bf16"], default="auto",
        help="in which the VAE encodes and decodes; auto: bf16 under --mixed_precision bf16, else fp32 (release, FLUX)")
    add("--gradient_checkpointing", action="store_true", help="recompute student, fake score, DINOv2, VAE decoder in the backward")
    add("--offload_text_encoders", action="store_true", help="keep them on the CPU; freed if the prompts are few (ours)")
    add("--use_8bit_adam", action="store_true", help="needs bitsandbytes (the release, FLUX, uses it; off here)")
    add("--allow_tf32", action="store_true", help="TF32 matmuls on Ampere and later")
    add("--enable_xformers_memory_efficient_attention", action="store_true", help="needs xformers")
    add("--dry_run", type=float, nargs="?", const=0.0, metavar="GB",
        help="train nothing: print what this command takes of a GPU, and for a card of GB what would make it fit (ours)")

    add = parser.add_argument_group("checkpointing").add_argument
    add("--output_dir", required=True, help="checkpoints, logs, and in the end the pipeline")
    add("--checkpointing_steps", type=int, default=1500, help="iterations (release, FLUX)")
    add("--checkpoints_total_limit", type=int, help="keep the newest so many")
    add("--resume_from_checkpoint", help='a checkpoint folder, the name of one in --output_dir, or "latest"')
    add("--export_dtype", choices=list(DTYPES), default="bf16", help="of the saved pipeline (ours)")

    add = parser.add_argument_group("logging and validation").add_argument
    add("--report_to", default="tensorboard", help="a tracker of accelerate, or none (diffusers)")
    add("--logging_dir", default="logs", help="below --output_dir (diffusers)")
    add("--validation_prompts", nargs="+", help="draw these with the teacher once and with the student each time")
    add("--validation_steps", type=int, default=500, help="iterations (ours)")
    add("--num_validation_images", type=int, default=1, help="per prompt (ours)")
    add("--teacher_num_inference_steps", type=int, default=28,
        help="of the teacher's validation images (FluxPipeline's default)")
    return complete_args(parser.parse_args(argv))
# fmt: on


def check_args(args):
    """Refuses bad arguments with one line each, before any weight loads; returns the rows of the data set."""
    check_common_args(args)
    checked = check_data_args(args)
    source = check_pipeline(teacher_source(args), PIPELINE)
    args.revision = source.revision
    if args.max_sequence_length > 512:
        raise UserError(
            f"--max_sequence_length {args.max_sequence_length}: {PIPELINE.__name__} takes 512 at most", exit_code=2
        )
    vae = source.config(VAE, "vae")
    source.config(FlowMatchEulerDiscreteScheduler, "scheduler")
    transformer = source.config(TRANSFORMER, "transformer")
    check_lora_args(args, TRANSFORMER, transformer, LORA_LAYERS)
    if not transformer.get("guidance_embeds") and not args.validation_prompts:
        unused = (lambda args: True, "a teacher without guidance embedder", ("student_guidance_scale",))
        refuse_unused(args, [unused])
    if args.rank and args.student_guidance_scale == 0 and transformer.get("guidance_embeds"):
        raise UserError(
            "--student_guidance_scale 0: with --rank the teacher's embedder stays; give a guidance, such as 3.5", 2
        )
    if args.student_model_name_or_path and not args.rank:
        names = ("in_channels", "joint_attention_dim", "pooled_projection_dim")
        check_compatible(student_source(args, source), TRANSFORMER, "transformer", transformer, names)
    if args.gan_weight > 0:
        check_discriminator_args(args)
    check_resolution(args, 2 * vae_scale_of(vae))
    make_schedule(args, "cpu")
    rows = load_rows(args, checked)
    check_latents(args, rows, latent_shape_of(vae, args.resolution))
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# Loading
# ---------------------------------------------------------------------------------------------------------------------
def load_parts(args, runtime: Runtime, schedule: FlowSchedule) -> tuple[TrainingModels, PIPELINE]:
    """All networks, as the roles and functions that the algorithm works with; (parts, the pipeline)."""
    source, device = teacher_source(args), runtime.device
    transformer = from_pretrained_meta(source, TRANSFORMER, "transformer", runtime.weight_dtype)
    encodes = args.backward_simulation_prob < 1 and not args.dataset_lmdb
    decodes = args.gan_weight > 0 or bool(args.validation_prompts)
    vae = load_vae(source, VAE, args, device, encodes, decodes, "bf16")
    pipeline = load_pipeline(source, PIPELINE, transformer=transformer, vae=vae, dtype=runtime.weight_dtype)
    teacher_print = make_base(args, pipeline, "transformer", device)
    place_text_encoders(args, pipeline, device)

    @torch.no_grad()
    def encode_prompts(prompts):
        return pipeline.encode_prompt(
            list(prompts), None, device=device, max_sequence_length=args.max_sequence_length
        )[:2]

    scales = [*args.dmd_guidance_scale, *(args.isg_guidance_scale if args.isg_weight > 0 else [])]
    guided = max(scales) > 1 and not transformer.config.guidance_embeds
    if args.rank:
        student, fake_score = adapted_twins(materialize(transformer, device), args)
    else:
        start = from_pretrained_meta(student_source(args, source), TRANSFORMER, "transformer")
        student = without_guidance_embedder(start, args.student_guidance_scale)
        fake_score = copy.deepcopy(student)
    for network in (transformer, student, fake_score):
        if args.enable_xformers_memory_efficient_attention:
            network.set_attention_backend("xformers")
    if args.gradient_checkpointing:
        student.enable_gradient_checkpointing()
        fake_score.enable_gradient_checkpointing()
    config = source.config(VAE, "vae")
    models = TrainingModels(
        teacher=runtime.frozen_role("teacher", transformer, teacher_print),  # first: its twins take its shards
        student=runtime.trained_role("student", student, args.learning_rate, args.ttur_ratio, subfolder="transformer"),
        fake_score=runtime.trained_role("fake_score", fake_score, args.learning_rate_fake),
        discriminator=None,
        predict=partial(flux_predict, schedule, encode_prompts([""]) if guided else None, args.student_guidance_scale),
        encode_prompts=encode_prompts,
        real_latents=partial(real_latents, vae),
        latent_shape=latent_shape_of(config, args.resolution),
    )
    if args.gan_weight > 0:
        heads, *features = load_discriminator(args, runtime.weight_dtype, device)
        models.vision_features, models.text_features = features
        models.discriminator = runtime.trained_role(
            "discriminator", heads, args.learning_rate_disc, gather_bf16=False
        )
        models.real_images, models.decode = partial(real_images, vae), partial(decode, vae)
        models.omega = lambda t: ((1 - t / 1000) ** 2).float()
    return models, pipeline


def teacher_call(args, transformer) -> dict:
    """What of the stock call is different where the teacher draws validation images with its many steps."""
    guidance = args.student_guidance_scale or 3.5  # FluxPipeline's default
    call = {"num_inference_steps": args.teacher_num_inference_steps, "guidance_scale": guidance, "sigmas": None}
    return call if transformer.config.guidance_embeds else {**call, "true_cfg_scale": guidance, "negative_prompt": ""}


# ---------------------------------------------------------------------------------------------------------------------
# The run
# ---------------------------------------------------------------------------------------------------------------------
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
    models, pipeline = load_parts(args, runtime, schedule)
    models.encode_prompts = encode_small_set(args, rows, pipeline, models.encode_prompts, runtime.device)
    fingerprints = fingerprints_of(models)
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
