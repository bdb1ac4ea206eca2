#!/usr/bin/env python
# Copyright 2026 The SenseFlow-scripts authors. Licensed under the Apache License, Version 2.0.
"""Distill an SDXL teacher to few steps with SenseFlow (Ge et al., ICLR 2026, arXiv 2506.00523).

    accelerate launch --config_file accelerate_configs/fsdp2.yaml train_senseflow_sdxl.py \
        --pretrained_model_name_or_path stabilityai/stable-diffusion-xl-base-1.0 --dataset_json data.json \
        --pretrained_vae_model_name_or_path madebyollin/sdxl-vae-fp16-fix --output_dir sdxl-4step \
        --mixed_precision bf16 --gradient_checkpointing

`train_iteration` is the paper's algorithm, in its order, on four roles: student, teacher, fake score and
discriminator. `SDXLModels` holds what is particular to this teacher. The mathematics is in senseflow_utils.py. Code
marked `# Copied from` is the same in all scripts, which a test checks.
"""

from senseflow.arguments import (
    Parser,
    add_checkpointing_arguments,
    add_data_arguments,
    add_lora_arguments,
    add_model_arguments,
    add_optimization_arguments,
    add_precision_arguments,
    add_senseflow_arguments,
    add_validation_arguments,
    number,
    sizes_by_flag,
)
from senseflow.errors import UserError, run_script


# fmt: off
def parse_args(argv=None):
    parser = Parser(
        description=__doc__.split("\n\n")[0],
        epilog="The defaults are those of the SenseFlow release for SDXL, of the paper for --max_train_steps, of "
        "and, with --rank, ours for the learning rates. omega(t) of the adversarial losses is sqrt(alphas_cumprod).",
    )
    add = add_model_arguments(parser, "StableDiffusionXLPipeline", "UNet2DConditionModel")
    add("--pretrained_vae_model_name_or_path", help="Another VAE, e.g. the fp16-fix one; saved with the student.")
    add_lora_arguments(parser)
    add_data_arguments(parser)
    add_senseflow_arguments(parser)
    add_optimization_arguments(parser)
    add_precision_arguments(parser)
    add_checkpointing_arguments(parser)
    add = add_validation_arguments(parser)
    add("--teacher_guidance_scale", type=number(float, 0), default=5.0,
        help="Guidance scale of the teacher for its validation images.")
    parser.set_defaults(
        anchors=[999.0, 749.0, 499.0, 249.0], ttur_ratio=5, ida_decay=1.0, isg_weight=0.2, isg_margin=20.0,
        gan_weight=0.5, backward_simulation_prob=0.5, dmd_guidance_scale=[8.0], isg_guidance_scale=[3.0, 15.0],
        learning_rate=1e-6, max_train_steps=18000, teacher_num_inference_steps=50,
        sampler="stochastic",  # what LCMScheduler does
        lora_layers="to_q to_k to_v to_out.0 proj_in proj_out ff.net.0.proj ff.net.2 conv1 conv2 conv_shortcut "
        "time_emb_proj downsamplers.0.conv upsamplers.0.conv".split(),  # those of diffusers' LCM-LoRA
    )
    return parser.parse_args(argv)
# fmt: on


if __name__ == "__main__":
    run_script(parse_args)  # answer --help and bad arguments before the slow imports

from functools import partial

import torch
from diffusers import AutoencoderKL, DDPMScheduler, LCMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from tqdm.auto import tqdm

from senseflow.data.loader import make_dataloader
from senseflow.data.sources import check_latents, load_rows
from senseflow.memory.report import report
from senseflow.models.discriminator import diff_augment, load_discriminator
from senseflow.models.hub import ModelSource, check_compatible, load_network
from senseflow.models.schedulers import DDPM_LEVELS, check_ddpm_scheduler
from senseflow.models.vae import latent_shape_of, vae_scale_of
from senseflow.models.weights import fingerprint
from senseflow.training.checkpoints import Checkpointer, find_checkpoint
from senseflow.training.metrics import Metrics
from senseflow.training.models import TrainingModels, resolve_teacher
from senseflow.training.prompts import cache_prompts
from senseflow.training.roles import Role
from senseflow.training.runtime import Runtime
from senseflow.training.validation import Validation
from senseflow_utils import (
    DDPMSchedule,
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
# The teacher: SDXL
# ---------------------------------------------------------------------------------------------------------------------
class SDXLModels(TrainingModels):
    """SDXL: CLIP embeddings, pooled embeddings and sizes; guidance with zeros or the empty prompt."""

    parse_args = staticmethod(parse_args)
    pipeline_class, network_class, vae_class = StableDiffusionXLPipeline, UNet2DConditionModel, AutoencoderKL
    network_name, kohya_names, comfyui_shift = "unet", True, 1.0
    pipeline_entries = ("force_zeros_for_empty_prompt", "add_watermarker")  # the latter is about finished images
    recipe_batch_size = 8  # the release's 8 GPUs, with an image each
    compatible_config = (
        "in_channels", "out_channels", "cross_attention_dim", "projection_class_embeddings_input_dim",
        "time_cond_proj_dim", "mid_block_type",
    )  # fmt: skip

    def __init__(self, args, source: ModelSource, schedule: DDPMSchedule, runtime: Runtime):
        super().__init__(args, source, schedule, runtime)
        self.time_ids: dict[tuple, torch.Tensor] = {}  # by the height and width of x0
        for height, width in sizes_by_flag(args).values():
            ids = [[height, width, 0, 0, height, width]]  # whole images, as in a stock call
            shape = latent_shape_of(self.vae_config, (height, width))
            self.time_ids[shape[1:]] = torch.tensor(ids, device=self.device, dtype=runtime.weight_dtype)
        if self.empty_condition is not None and self.pipeline.config.force_zeros_for_empty_prompt:
            self.empty_condition = tuple(map(torch.zeros_like, self.empty_condition))
        if args.pretrained_vae_model_name_or_path:
            self.extra_components["vae"] = load_network(self.vae_source(args, source), self.vae_class, "vae")

    @classmethod
    def check_args(cls, args, source: ModelSource) -> None:
        if any(t != int(t) or t > 999 for t in args.anchors):
            shown = " ".join(f"{t:g}" for t in args.anchors)
            raise UserError(f"--anchors {shown}: SDXL has integer timesteps up to 999", exit_code=2)
        if args.pretrained_vae_model_name_or_path:
            names = ("latent_channels", "block_out_channels", "latents_mean", "latents_std")
            vae_config = source.config(cls.vae_class, "vae")
            check_compatible(cls.vae_source(args, source), cls.vae_class, "vae", vae_config, names)
        check_ddpm_scheduler(source)
        super().check_args(args, source)

    @classmethod
    def make_schedule(cls, args, source: ModelSource, device):
        teacher_scheduler = DDPMScheduler.from_config(source.config(DDPMScheduler, "scheduler"))
        num_timesteps, num_steps = teacher_scheduler.config.num_train_timesteps, len(args.anchors)
        schedule = DDPMSchedule(
            teacher_scheduler.alphas_cumprod,
            torch.arange(num_timesteps),
            args.anchors,
            dmd_range=(round(0.02 * num_timesteps), round(0.98 * num_timesteps)),
            fake_range=(0, num_timesteps - 1),
            prediction_type=teacher_scheduler.config.prediction_type,
            device=device,
        )
        levels = {name: teacher_scheduler.config[name] for name in DDPM_LEVELS}
        scheduler = LCMScheduler(num_train_timesteps=num_timesteps, original_inference_steps=num_steps, **levels)
        pipeline_kwargs = {
            "num_inference_steps": num_steps,
            "guidance_scale": 0.0,
            "height": args.resolution[0],
            "width": args.resolution[1],
        }
        visiting = LCMScheduler.from_config(scheduler.config)
        visiting.set_timesteps(num_steps)
        if visiting.timesteps.tolist() != args.anchors:
            pipeline_kwargs["timesteps"] = [int(t) for t in args.anchors]
        return schedule, scheduler, pipeline_kwargs

    @classmethod
    def pixel_multiple(cls, source: ModelSource) -> int:
        return vae_scale_of(source.config(cls.vae_class, "vae"))

    @staticmethod
    def vae_source(args, source: ModelSource) -> ModelSource:
        path = args.pretrained_vae_model_name_or_path
        return ModelSource("--pretrained_vae_model_name_or_path", path, variant=args.variant) if path else source

    def lora_base(self):
        return "stable-diffusion-xl-v1-base", "sdxl_base_v1-0"

    @torch.no_grad()
    def encode_prompts(self, prompts):
        """Encode prompts to (embeddings (B, L, D), pooled embeddings (B, P))."""
        embeds, _, pooled, _ = self.pipeline.encode_prompt(
            list(prompts), device=self.device, do_classifier_free_guidance=False
        )
        return embeds, pooled

    def network_output(self, role, x_t, t, condition):
        return role(**self.unet_inputs(role, x_t, t, condition), return_dict=False)[0]

    def omega(self, t):
        return self.schedule.levels(t)[0].float()

    def teacher_pipeline_kwargs(self):
        steps, guidance = self.args.teacher_num_inference_steps, self.args.teacher_guidance_scale
        return {"num_inference_steps": steps, "guidance_scale": guidance, "timesteps": None}

    def fingerprints(self):
        vae = self.extra_components.get("vae")
        return {**super().fingerprints(), "vae": "the teacher's" if vae is None else fingerprint(vae)}

    def unet_inputs(self, role: Role, x_t, t, condition) -> dict:
        """Return the arguments of a UNet call at latents x_t (B, C, H, W) and timesteps t (B,)."""
        embeds, pooled = condition
        time_ids = self.time_ids[tuple(x_t.shape[2:])].expand(len(x_t), -1)
        return {
            "sample": x_t.to(role.dtype),
            "timestep": t,
            "encoder_hidden_states": embeds,
            "added_cond_kwargs": {"text_embeds": pooled, "time_ids": time_ids},
        }


# ---------------------------------------------------------------------------------------------------------------------
# The run
# ---------------------------------------------------------------------------------------------------------------------
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


# Copied from train_senseflow_flux.main with FluxModels->SDXLModels
def main(argv=None, models: type[TrainingModels] = SDXLModels):
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
