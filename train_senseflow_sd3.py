#!/usr/bin/env python
# Copyright 2026 The SenseFlow-scripts authors. Licensed under the Apache License, Version 2.0.
"""Distill an SD 3.5 teacher, Medium or Large, to few steps with SenseFlow (Ge et al., ICLR 2026, arXiv 2506.00523).

    accelerate launch --config_file accelerate_configs/fsdp2.yaml train_senseflow_sd3.py \
        --pretrained_model_name_or_path stabilityai/stable-diffusion-3.5-medium --dataset_json data.json \
        --output_dir sd35-4step --mixed_precision bf16 --gradient_checkpointing

`train_iteration` is the paper's algorithm, in its order, on four roles: student, teacher, fake score and
discriminator. `SD3Models` holds what is particular to this teacher. The mathematics is in senseflow_utils.py. Code
marked `# Copied from` is the same in all scripts, which a test checks.
"""

from senseflow.arguments import (
    SAMPLERS,
    Parser,
    add_checkpointing_arguments,
    add_data_arguments,
    add_lora_arguments,
    add_model_arguments,
    add_optimization_arguments,
    add_precision_arguments,
    add_senseflow_arguments,
    add_validation_arguments,
    describe_presets,
    number,
    sizes_by_flag,
)
from senseflow.errors import UserError, run_script


# Defaults that depend on the teacher's size. Flags override them.
PRESETS = {
    "medium": {
        "ttur_ratio": 10,
        "ida_decay": 0.98,
        "isg_weight": 0.5,
        "dmd_guidance_scale": [2.0, 8.0],
        "isg_guidance_scale": [2.0, 4.0],
    },
    "large": {
        "ttur_ratio": 5,
        "ida_decay": 0.97,
        "isg_weight": 1.0,
        "dmd_guidance_scale": [3.0, 10.0],
        "isg_guidance_scale": [5.0, 5.0],
    },
}


# fmt: off
def parse_args(argv=None):
    parser = Parser(
        description=__doc__.split("\n\n")[0],
        epilog="The defaults are those of the SenseFlow release for SD 3.5, and of the paper for --max_train_steps "
        "(Large; ours for Medium); with --rank, ours for the learning rates. --preset decides: "
        f"{describe_presets(PRESETS)}. The defaults of --anchors are the indices 999 749 499 249 of the teacher's "
        "1000 ascending noise levels: 1000 900 750 500 with a shift of 3. --isg_margin counts such indices. omega(t) "
        "of the adversarial losses is sigma^2 of the descending levels.",
    )
    add = add_model_arguments(parser, "StableDiffusion3Pipeline", "SD3Transformer2DModel")
    add("--preset", choices=["auto", *PRESETS], default="auto",
        help="Defaults for this size of the teacher; auto: large above 30 transformer blocks.")
    add("--max_sequence_length", type=number(int, 1, 512), default=77, help="Number of T5 tokens.")
    add_lora_arguments(parser)
    add_data_arguments(parser)
    add = add_senseflow_arguments(parser)
    add("--sampler", choices=SAMPLERS, default="stochastic",
        help="How backward simulation and the exported pipeline step from anchor to anchor.")
    add_optimization_arguments(parser)
    add_precision_arguments(parser)
    add_checkpointing_arguments(parser)
    add = add_validation_arguments(parser)
    add("--teacher_guidance_scale", type=number(float, 0), default=4.5,
        help="Guidance scale of the teacher for its validation images.")
    parser.set_defaults(
        isg_margin=50.0, gan_weight=0.1, backward_simulation_prob=0.5,
        learning_rate=1e-6, max_train_steps=27000, teacher_num_inference_steps=28,
        lora_layers="to_q to_k to_v to_out.0 add_q_proj add_k_proj add_v_proj to_add_out net.0.proj net.2".split(),
    )
    return parser.parse_args(argv)
# fmt: on


if __name__ == "__main__":
    run_script(parse_args)  # answer --help and bad arguments before the slow imports

import math
from functools import partial
from typing import Any

import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel, StableDiffusion3Pipeline
from tqdm.auto import tqdm

from senseflow.data.loader import make_dataloader
from senseflow.data.sources import check_latents, load_rows
from senseflow.memory.report import report
from senseflow.models.discriminator import diff_augment, load_discriminator
from senseflow.models.hub import ModelSource
from senseflow.models.schedulers import fit_flow_scheduler, load_flow_scheduler
from senseflow.models.vae import latent_shape_of, vae_scale_of
from senseflow.training.checkpoints import Checkpointer, find_checkpoint
from senseflow.training.metrics import Metrics
from senseflow.training.models import TrainingModels, resolve_teacher
from senseflow.training.prompts import cache_prompts
from senseflow.training.runtime import Runtime
from senseflow.training.validation import Validation
from senseflow_utils import (
    IndexedFlowSchedule,
    StatelessRNG,
    adversarial_loss,
    backward_simulation,
    denoising_loss,
    dmd_loss,
    draw_guidance,
    hinge_loss,
    isg_loss,
    isg_target,
    needs_images,
    num_simulated_steps,
)


# ---------------------------------------------------------------------------------------------------------------------
# The algorithm
# ---------------------------------------------------------------------------------------------------------------------
# Copied from train_senseflow_flux.student_input
def student_input(models: TrainingModels, rng: StatelessRNG, batch: dict, condition: tuple, args):
    """Return the student's input x_t (B, C, H, W) and the index (B,) of its anchor, without gradient (step 1)."""
    schedule, sample_indices, num_anchors = models.schedule, batch["sample_indices"], len(models.schedule.anchors)
    noise = rng.normal("input_noise", sample_indices, models.x0_shape(batch))
    num_steps = num_simulated_steps(rng, args.backward_simulation_prob, num_anchors)
    if num_steps is not None:
        predict = partial(models.predict, models.student, condition=condition)
        x_t = backward_simulation(predict, schedule, args.sampler, rng, sample_indices, noise, num_steps)
        return x_t, torch.full((len(sample_indices),), num_steps, device=noise.device)
    # Drawn on the CPU, since the host has to know which samples to encode: one at the top anchor is pure noise.
    index = StatelessRNG(rng.seed, rng.iteration).integers("anchor", sample_indices, 0, num_anchors - 1)
    rows = index.nonzero().flatten()
    if len(rows) > 0:
        x0 = models.real_latents(batch, rows, rng)
        noise[rows] = schedule.add_noise(x0, noise[rows], schedule.anchors[index[rows].to(noise.device)])
    return noise, index.to(noise.device)


# Copied from train_senseflow_flux.student_losses
def student_losses(
    models: TrainingModels, rng: StatelessRNG, batch: dict, condition, x_t, t, t_next, prediction, args
):
    """Compute the student's losses, except for the adversarial loss (step 3).

    Returns:
        ({name: loss, or metric to log}, {name: latents (B, C, H, W) for the debug panel}).
    """
    schedule, predict, sample_indices = models.schedule, models.predict, batch["sample_indices"]
    student_x0 = prediction.x0

    # L_DMD: fake score and teacher denoise the same noised student_x0.
    t_dmd = schedule.draw_dmd_timesteps(rng, sample_indices)
    with torch.no_grad():
        noise = rng.normal("dmd_noise", sample_indices, student_x0.shape[1:])
        noised = schedule.add_noise(student_x0, noise, t_dmd)
        guidance = draw_guidance(rng, "dmd_guidance", sample_indices, args.dmd_guidance_scale)
        fake_x0 = predict(models.fake_score, noised, t_dmd, condition).x0
        teacher_x0 = predict(models.teacher, noised, t_dmd, condition, guidance).x0
    dmd, metrics = dmd_loss(student_x0, fake_x0, teacher_x0)
    losses = {"dmd_loss": dmd, **metrics}
    debug_latents = {"student_x0": student_x0, "fake_x0": fake_x0, "teacher_x0": teacher_x0}

    # L_ISG: the student's step to t_next should end where the teacher's step to t_mid and its own from there end.
    if args.isg_weight > 0:
        t_mid = schedule.draw_mid_timesteps(rng, sample_indices, t, t_next, args.isg_margin)
        guidance = draw_guidance(rng, "isg_guidance", sample_indices, args.isg_guidance_scale)
        teacher_predict = partial(predict, models.teacher, condition=condition, guidance=guidance)
        student_predict = partial(predict, models.student, condition=condition)
        target = isg_target(teacher_predict, student_predict, schedule, x_t, t, t_mid, t_next)
        direct = schedule.step(prediction, t_next)
        losses["isg_loss"] = isg_loss(direct, target)
        debug_latents |= {"isg_target": target, "isg_direct": direct}
    return losses, {name: latents.detach() for name, latents in debug_latents.items()}


# Copied from train_senseflow_flux.train_iteration
def train_iteration(iteration: int, batches: list[dict], models: TrainingModels, args):
    """Run one iteration of SenseFlow over the micro-batches of one global batch (paper, algorithm 1).

    Args:
        iteration: number from 0; the student is updated in every `args.ttur_ratio`-th iteration.
        batches: `gradient_accumulation_steps` micro-batches of senseflow.data.loader.PromptImageLoader.
    Returns:
        ({name: scalar on the device}, {name: latents (B, C, H, W) for the debug panel}, or {} without student update).
    """
    schedule, discriminator = models.schedule, models.discriminator
    student, fake_score = models.student, models.fake_score
    rng = StatelessRNG(args.seed, iteration, models.device)
    update_student = (iteration + 1) % args.ttur_ratio == 0
    totals: dict[str, torch.Tensor] = {}
    debug_latents: dict[str, torch.Tensor] = {}
    student_samples = []  # the student's x0 before its update, for the fake score to learn

    def record(scalars: dict[str, torch.Tensor]) -> None:
        for name, value in scalars.items():
            totals[name] = totals.get(name, 0) + value.detach() / len(batches)

    for batch in batches:
        # 1. The student's input: from its own first steps (backward simulation), or noised real latents.
        sample_indices = batch["sample_indices"]
        with torch.no_grad():
            condition = models.condition(batch)
            x_t, index = student_input(models, rng, batch, condition, args)
            t, t_next = schedule.anchors[index], schedule.next_timesteps[index]
            if discriminator is not None:
                real, text, omega = models.real_images(batch), models.discriminator_text(batch), models.omega(t)
                reference = models.vision_features(real)  # the discriminator is conditioned on these and on the text

        # 2. The student's prediction; with gradient only if the student is updated.
        with student.accumulate() if update_student else torch.no_grad():
            prediction = models.predict(student, x_t, t, condition)
            if discriminator is not None:
                augmented = diff_augment(models.decode(prediction.x0), rng, sample_indices, "fake")
                fake = models.vision_features(augmented)

            # 3. The student's loss: L_DMD + w_isg L_ISG + w_gan omega(t) L_adv, with the discriminator frozen.
            if update_student:
                losses, debug_latents = student_losses(models, rng, batch, condition, x_t, t, t_next, prediction, args)
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

        # 4. The discriminator's loss: hinge loss on features of real images and of the student's (from step 2).
        if discriminator is not None:
            fake = [features.detach() for features in fake]
            with torch.no_grad():
                real = models.vision_features(diff_augment(real, rng, sample_indices, "real"))  # features, as `fake`
            with discriminator.accumulate():
                real_logits, fake_logits = discriminator((real, fake), reference, text)
                loss = hinge_loss(real_logits, fake_logits, omega)
                discriminator.backward(loss)
            logits = {"real_logits": real_logits.mean(), "fake_logits": fake_logits.mean()}
            record({"discriminator_loss": loss, **logits})

    # 5. The student's step, then implicit distribution alignment, before the fake score learns.
    if update_student:
        totals["student_grad_norm"], totals["signal/update_ratio"] = student.step(measure_update=True)
        if args.ida_decay < 1:
            fake_score.ida_update_from(student, args.ida_decay)

    # 6. The fake score's loss and step: it learns to denoise the student's samples.
    for sample_indices, x0, condition in student_samples:
        t = schedule.draw_fake_timesteps(rng, sample_indices)
        noise = rng.normal("fake_noise", sample_indices, x0.shape[1:])
        with fake_score.accumulate():
            output = models.predict(fake_score, schedule.add_noise(x0, noise, t), t, condition).output
            loss = denoising_loss(output, schedule.target(x0, noise, t))
            record({"fake_loss": loss})
            fake_score.backward(loss)
    totals["fake_score_grad_norm"] = fake_score.step()
    if discriminator is not None:
        totals["discriminator_grad_norm"] = discriminator.step()
    return totals, debug_latents


# ---------------------------------------------------------------------------------------------------------------------
# The teacher: SD 3.5
# ---------------------------------------------------------------------------------------------------------------------
class SD3Models(TrainingModels):
    """SD 3.5: joint CLIP and T5 embeddings, pooled CLIP embeddings, classifier-free guidance with the empty prompt."""

    parse_args, presets = staticmethod(parse_args), PRESETS
    comfyui_shift = 3.0
    scheduler_sets_shift = True  # whether a stock call computes its shift from the scheduler's configuration
    pipeline_class, network_class, vae_class = StableDiffusion3Pipeline, SD3Transformer2DModel, AutoencoderKL
    recipe_batch_size = 8  # the release's 8 GPUs, with an image each
    compatible_config = (
        "in_channels", "out_channels", "joint_attention_dim", "pooled_projection_dim", "patch_size",
        "pos_embed_max_size",
    )  # fmt: skip

    @classmethod
    def preset_name(cls, args, source: ModelSource) -> str:
        if args.preset != "auto":
            return args.preset
        return "large" if source.config(cls.network_class, "transformer")["num_layers"] > 30 else "medium"

    @classmethod
    def check_args(cls, args, source: ModelSource) -> None:
        if load_flow_scheduler(source).config.use_dynamic_shifting:
            raise source.error("has use_dynamic_shifting in its scheduler; this script trains levels of a fixed shift")
        super().check_args(args, source)
        side = source.config(cls.network_class, "transformer").get("pos_embed_max_size", math.inf)
        largest = side * cls.pixel_multiple(source)
        for flag, size in sizes_by_flag(args).items():
            if max(size) > largest:
                raise UserError(f"{flag}: this teacher has positions for {largest} pixels a side at most", exit_code=2)

    @classmethod
    def make_schedule(cls, args, source: ModelSource, device):
        train_timesteps = load_flow_scheduler(source).timesteps.flip(0)
        wanted = [t / 1000 for t in args.anchors or train_timesteps[[999, 749, 499, 249]].tolist()]
        scheduler, sigmas = fit_flow_scheduler(
            wanted, lambda s: cls.stock_sigmas(s, len(wanted)), args.sampler, cls.scheduler_sets_shift
        )
        anchors = [1000 * sigma for sigma in sigmas]
        schedule = IndexedFlowSchedule(train_timesteps, anchors, dmd_range=(20, 980), device=device)
        pipeline_kwargs = {
            "num_inference_steps": len(sigmas),
            **cls.student_guidance_kwargs(args, source),
            "height": args.resolution[0],
            "width": args.resolution[1],
        }
        visited = cls.stock_sigmas(type(scheduler).from_config(scheduler.config), len(sigmas))
        if max(abs(a - b) for a, b in zip(visited, sigmas)) > 1e-3:  # no scheduler visits them by itself
            pipeline_kwargs["sigmas"] = schedule.levels(schedule.anchors)[1].tolist()
        return schedule, scheduler, {**pipeline_kwargs, "max_sequence_length": args.max_sequence_length}

    @staticmethod
    def stock_sigmas(scheduler, steps: int) -> list[float]:
        """Set a scheduler to the levels that a stock call visits; return them without the final 0."""
        shift = {"mu": scheduler.config.base_shift} if scheduler.config.use_dynamic_shifting else {}
        scheduler.set_timesteps(steps, **shift)
        return scheduler.sigmas[:-1].tolist()

    @classmethod
    def student_guidance_kwargs(cls, args, source: ModelSource) -> dict[str, Any]:
        """Return what the student's stock call is told about guidance."""
        return {"guidance_scale": 1.0}

    @classmethod
    def pixel_multiple(cls, source: ModelSource) -> int:
        patch_size = source.config(cls.network_class, "transformer")["patch_size"]
        return patch_size * vae_scale_of(source.config(cls.vae_class, "vae"))

    def lora_base(self):
        size = f"5-{self.preset_name(self.args, self.source)}"
        return f"stable-diffusion-3-{size}", size

    @torch.no_grad()
    def encode_prompts(self, prompts):
        """Encode prompts to (CLIP and T5 embeddings (B, L, D), pooled CLIP embeddings (B, P))."""
        kwargs = {"do_classifier_free_guidance": False, "max_sequence_length": self.args.max_sequence_length}
        embeds, _, pooled, _ = self.pipeline.encode_prompt(list(prompts), None, None, device=self.device, **kwargs)
        return embeds, pooled

    def network_output(self, role, x_t, t, condition):
        embeds, pooled = condition
        return role(
            hidden_states=x_t.to(role.dtype),
            timestep=t.float(),
            encoder_hidden_states=embeds,
            pooled_projections=pooled,
            return_dict=False,
        )[0]

    def omega(self, t):
        return self.schedule.descending_sigma_squared(t)


# ---------------------------------------------------------------------------------------------------------------------
# The run
# ---------------------------------------------------------------------------------------------------------------------
def preset_name(args, source: ModelSource) -> str:
    """Return the preset that --preset names, or that fits the teacher's number of blocks."""
    if args.preset != "auto":
        return args.preset
    return "large" if source.config(SD3Transformer2DModel, "transformer")["num_layers"] > 30 else "medium"


# Copied from train_senseflow_flux.prepare
def prepare(models: type[TrainingModels], args):
    """Complete and check the arguments and read the rows of data; no weights load. Return (teacher's source, rows)."""
    source = resolve_teacher(args, models)
    models.check_args(args, source)
    if args.dry_run is None:
        find_checkpoint(args)  # refuses an unknown checkpoint, and an --output_dir that holds another run
    rows = load_rows(args)
    check_latents(args, rows, latent_shape_of(source.config(models.vae_class, "vae"), args.resolution))
    return source, rows


# Copied from train_senseflow_flux.make_models
def make_models(models: type[TrainingModels], args, source: ModelSource, schedule, runtime: Runtime) -> TrainingModels:
    """Load the networks and make the four roles."""
    models = models(args, source, schedule, runtime)
    student, fake_score = models.student_and_fake_score()
    models.teacher = runtime.frozen_role("teacher", models.network)  # first: adapters share the weights of its role
    models.student = runtime.trained_role(
        "student", student, args.learning_rate, step_every=args.ttur_ratio, subfolder=models.network_name
    )
    models.fake_score = runtime.trained_role("fake_score", fake_score, args.learning_rate_fake)
    if args.gan_weight > 0:
        dtype = runtime.weight_dtype
        heads, models.vision_features, models.text_features = load_discriminator(args, dtype, models.device)
        runtime.compile(models.vision_features)
        # gather_bf16=False, because spectral norms are computed in float32, of weights in float32.
        models.discriminator = runtime.trained_role("discriminator", heads, args.learning_rate_disc, gather_bf16=False)
    return models


# Copied from train_senseflow_flux.main with FluxModels->SD3Models
def main(argv=None, models: type[TrainingModels] = SD3Models):
    args = models.parse_args(argv)
    source, rows = prepare(models, args)
    if args.dry_run is not None:
        return report(args, source, rows, models, make_models, train_iteration)

    # Processes, noise levels, networks.
    runtime = Runtime(args)
    runtime.start("senseflow")
    schedule, scheduler, pipeline_kwargs = models.make_schedule(args, source, runtime.device)
    models = make_models(models, args, source, schedule, runtime)
    validation = Validation(runtime, args, models, scheduler, pipeline_kwargs)
    cache_prompts(models, rows, runtime, validation.record_prompts)

    # The iteration to start or resume from, and the data from there.
    checkpointer = Checkpointer(args, runtime, models, scheduler, pipeline_kwargs, rows.fingerprint)
    iteration, samples_seen = checkpointer.resume()
    process_index, num_processes = runtime.accelerator.process_index, runtime.accelerator.num_processes
    reads_images = partial(needs_images, args.seed, args.gan_weight, args.backward_simulation_prob)
    loader = make_dataloader(args, rows, process_index, num_processes, iteration, samples_seen, reads_images)
    loader.read_prompts = models.read_prompts
    global_batch_size = args.train_batch_size * args.gradient_accumulation_steps * num_processes
    models.log_recipe(global_batch_size)

    # The loop.
    if iteration == 0:
        validation.run(iteration)
    is_local_main = runtime.accelerator.is_local_main_process
    progress = tqdm(total=args.max_train_steps, initial=iteration, disable=not is_local_main)
    metrics = Metrics(runtime, models.student, global_batch_size, progress)
    debug_latents: dict[str, torch.Tensor] = {}
    for batches in metrics.batches(loader, args.max_train_steps - iteration):
        scalars, new_debug_latents = train_iteration(iteration, batches, models, args)
        debug_latents = new_debug_latents or debug_latents
        iteration, samples_seen = iteration + 1, samples_seen + global_batch_size
        metrics.push(iteration, scalars)
        if iteration % args.validation_steps == 0 or iteration == args.max_train_steps:
            validation.run(iteration, debug_latents)
        if iteration % args.checkpointing_steps == 0:
            metrics.flush()  # raises if the run has diverged, before its checkpoint counts as the latest
            checkpointer.save(iteration, samples_seen, validation.signals)
    metrics.flush()
    if runtime.saved < iteration:
        checkpointer.save(iteration, samples_seen, validation.signals)
    progress.close()

    # The end: an interrupted run exits here; a complete one exports the student.
    checkpointer.check_finished(metrics, iteration)
    checkpointer.export(iteration)
    runtime.finish()
    checkpointer.upload()


if __name__ == "__main__":
    run_script(main)
