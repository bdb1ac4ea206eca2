#!/usr/bin/env python
# Copyright 2026 The SenseFlow-scripts authors. Licensed under the Apache License, Version 2.0.
"""Distill a FLUX teacher to few steps with SenseFlow (Ge et al., ICLR 2026, arXiv 2506.00523).

    accelerate launch --config_file accelerate_configs/fsdp2.yaml train_senseflow_flux.py \
        --pretrained_model_name_or_path black-forest-labs/FLUX.1-dev --dataset_json data.json --output_dir flux-4step \
        --mixed_precision bf16 --gradient_checkpointing --offload_text_encoders

`train_iteration` is the paper's algorithm, in its order, on four roles: student, teacher, fake score and
discriminator. `FluxModels` holds what is particular to this teacher. The mathematics is in senseflow_utils.py. Code
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
    number,
    warn_inactive,
)
from senseflow.errors import UserError, run_script


# fmt: off
def parse_args(argv=None):
    parser = Parser(
        description=__doc__.split("\n\n")[0],
        epilog="The defaults are those of the SenseFlow release for FLUX.1-dev, of the paper for --max_train_steps, "
        "and ours for --student_guidance_scale and, with --rank, for the learning rates. The default of --anchors is "
        "the teacher's own 4-step schedule at --resolution: 1000 904.5 759.5 512.8 for FLUX.1-dev at 1024 pixels. "
        "omega(t) of the adversarial losses is (1 - sigma)^2.",
    )
    add = add_model_arguments(parser, "FluxPipeline", "FluxTransformer2DModel")
    add("--student_guidance_scale", type=number(float, 0), default=3.5,
        help="Guidance at which student and fake score start as the teacher. The embedder's output at it is folded "
        "into a bias and the guidance embedder is dropped; with --rank the embedder stays and gets it in every call. "
        "0: nothing is folded, as in the release. The teacher's validation images are guided by it, too (3.5 for 0).")
    add("--max_sequence_length", type=number(int, 1, 512), default=512, help="Number of T5 tokens.")
    add_lora_arguments(parser)
    add_data_arguments(parser)
    add = add_senseflow_arguments(parser)
    add("--sampler", choices=SAMPLERS, default="stochastic",
        help="How backward simulation and the exported pipeline step from anchor to anchor.")
    add_optimization_arguments(parser)
    add_precision_arguments(parser)
    add_checkpointing_arguments(parser)
    add_validation_arguments(parser)
    parser.set_defaults(
        ttur_ratio=5, ida_decay=0.97, isg_weight=1.0, isg_margin=20.0, gan_weight=2.0, backward_simulation_prob=0.5,
        dmd_guidance_scale=[1.0, 8.0], isg_guidance_scale=[1.0, 8.0],
        learning_rate=1e-5, lr_scheduler="constant_with_warmup", lr_warmup_steps=500, lr_warmup_start_factor=0.5,
        max_train_steps=12000, checkpointing_steps=1500, teacher_num_inference_steps=28,
        # Attention and feed-forward; in the single blocks these are called proj_mlp and proj_out.
        lora_layers=[
            r".*blocks\.\d+\.(attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)"
            r"|ff(_context)?\.net\.(0\.proj|2)|proj_mlp|proj_out)"
        ],
    )
    return parser.parse_args(argv)
# fmt: on


if __name__ == "__main__":
    run_script(parse_args)  # answer --help and bad arguments before the slow imports

import math
from functools import partial
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, FluxPipeline, FluxTransformer2DModel
from diffusers.pipelines.flux.pipeline_flux import calculate_shift, retrieve_timesteps
from tqdm.auto import tqdm

from senseflow.data.loader import make_dataloader
from senseflow.data.sources import check_latents, load_rows
from senseflow.memory.report import report
from senseflow.models.discriminator import diff_augment, load_discriminator
from senseflow.models.hub import ModelSource
from senseflow.models.schedulers import fit_flow_scheduler, load_flow_scheduler
from senseflow.models.vae import latent_shape_of, vae_scale_of
from senseflow.models.weights import materialize_submodule, meta_network, weights_of
from senseflow.training.checkpoints import Checkpointer, find_checkpoint
from senseflow.training.metrics import Metrics
from senseflow.training.models import TrainingModels, resolve_teacher
from senseflow.training.prompts import cache_prompts
from senseflow.training.runtime import Runtime
from senseflow.training.validation import Validation
from senseflow_utils import (
    FlowSchedule,
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
# The teacher: FLUX
# ---------------------------------------------------------------------------------------------------------------------
class FluxModels(TrainingModels):
    """FLUX: packed latents, T5 and pooled CLIP embeddings, guidance by an embedder or by a second pass."""

    parse_args = staticmethod(parse_args)
    pipeline_class, network_class, vae_class = FluxPipeline, FluxTransformer2DModel, AutoencoderKL
    vae_auto_dtype = "bf16"
    scheduler_sets_shift = True  # whether a stock call computes its shift from the scheduler's configuration
    comfyui_shift = math.exp(1.15)
    recipe_batch_size = 8  # the release's 8 GPUs, with an image each
    compatible_config = ("in_channels", "joint_attention_dim", "pooled_projection_dim")

    @classmethod
    def check_args(cls, args, source: ModelSource) -> None:
        load_flow_scheduler(source)  # refuses a scheduler of another class
        super().check_args(args, source)
        has_embedder = cls.has_embedder(source)
        if has_embedder and args.rank and args.student_guidance_scale == 0:
            fix = "with --rank the teacher's embedder stays; give a guidance, such as 3.5"
            raise UserError(f"--student_guidance_scale 0: {fix}", exit_code=2)
        if not has_embedder and not args.validation_prompts:
            warn_inactive(args, "a run whose teacher has no guidance embedder", ["student_guidance_scale"])

    @classmethod
    def has_embedder(cls, source: ModelSource) -> bool:
        return bool(source.config(cls.network_class, cls.network_name).get("guidance_embeds"))

    @classmethod
    def make_schedule(cls, args, source: ModelSource, device):
        teacher_scheduler = load_flow_scheduler(source)
        num_tokens = math.prod(args.resolution) // cls.pixel_multiple(source) ** 2
        stock_sigmas = partial(cls.stock_sigmas, num_tokens=num_tokens)
        train_timesteps = teacher_scheduler.timesteps.clone()
        wanted = [t / 1000 for t in args.anchors] if args.anchors else stock_sigmas(teacher_scheduler, 4)
        scheduler, sigmas = fit_flow_scheduler(
            wanted, lambda s: stock_sigmas(s, len(wanted)), args.sampler, cls.scheduler_sets_shift
        )
        schedule = FlowSchedule(train_timesteps, [1000 * sigma for sigma in sigmas], device=device)
        pipeline_kwargs = {
            "num_inference_steps": len(sigmas),
            **cls.student_guidance_kwargs(args, source),
            "height": args.resolution[0],
            "width": args.resolution[1],
        }
        visited = stock_sigmas(type(scheduler).from_config(scheduler.config), len(sigmas))
        if max(abs(a - b) for a, b in zip(visited, sigmas)) > 1e-3:  # no scheduler visits them by itself
            pipeline_kwargs["sigmas"] = schedule.levels(schedule.anchors)[1].tolist()
        return schedule, scheduler, {**pipeline_kwargs, "max_sequence_length": args.max_sequence_length}

    @staticmethod
    def stock_sigmas(scheduler, steps: int, num_tokens: int) -> list[float]:
        """Set a scheduler to the levels that a stock call visits; return them without the final 0."""
        config = scheduler.config
        lengths = config.base_image_seq_len, config.max_image_seq_len
        mu = calculate_shift(num_tokens, *lengths, config.base_shift, config.max_shift)
        retrieve_timesteps(scheduler, steps, "cpu", sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
        return scheduler.sigmas[:-1].tolist()

    @classmethod
    def student_guidance_kwargs(cls, args, source: ModelSource) -> dict[str, Any]:
        """Return what the student's stock call is told about guidance."""
        # An adapter keeps the guidance embedder; a network without one ignores the call's guidance.
        keeps_embedder = args.rank and cls.has_embedder(source)
        return {"guidance_scale": args.student_guidance_scale if keeps_embedder else 1.0}

    @classmethod
    def pixel_multiple(cls, source: ModelSource) -> int:
        return 2 * vae_scale_of(source.config(cls.vae_class, "vae"))

    def lora_base(self):
        return "flux-1-dev" if self.network.config.guidance_embeds else "flux-1-schnell", "flux1"

    def comfyui_guidance(self):
        if self.student.module.config.guidance_embeds:
            return {"FluxGuidance": f"{self.args.student_guidance_scale:g}"}
        # A network without guidance embedder is taken for FLUX.1-schnell, whose levels are not shifted.
        shift = {"ModelSamplingFlux, if the scheduler is simple": "max_shift 1.15, base_shift 0.5, 1024 x 1024"}
        return {"FluxGuidance": "has no effect", **shift}

    @torch.no_grad()
    def encode_prompts(self, prompts):
        """Encode prompts to (T5 embeddings (B, L, D), pooled CLIP embeddings (B, P))."""
        length = self.args.max_sequence_length
        return self.pipeline.encode_prompt(list(prompts), None, device=self.device, max_sequence_length=length)[:2]

    def predict(self, role, x_t, t, condition, guidance=None):
        """Predict (x0, noise); a guidance embedder gets `guidance`, --student_guidance_scale in the other roles."""
        if not role.module.config.get("guidance_embeds"):
            return super().predict(role, x_t, t, condition, guidance)
        scale = torch.full_like(t, self.args.student_guidance_scale, dtype=torch.float32)
        scale = scale if guidance is None else guidance.scale
        return self.schedule.as_prediction(x_t, self.network_output(role, x_t, t, condition, scale), t)

    def calls_twice(self):
        return super().calls_twice() and not self.network.config.get("guidance_embeds")

    def network_output(self, role, x_t, t, condition, scale=None):
        batch, channels, height, width = x_t.shape
        embeds, pooled = condition
        output = role(
            hidden_states=FluxPipeline._pack_latents(x_t.to(role.dtype), batch, channels, height, width),
            timestep=t.to(role.dtype) / 1000,  # rounded as the stock pipeline rounds in this dtype
            guidance=None if scale is None else scale.to(role.dtype),
            pooled_projections=pooled,
            encoder_hidden_states=embeds,
            txt_ids=torch.zeros(embeds.shape[1], 3, device=x_t.device, dtype=role.dtype),
            img_ids=FluxPipeline._prepare_latent_image_ids(batch, height // 2, width // 2, x_t.device, role.dtype),
            return_dict=False,
        )[0]
        output = output.view(batch, height // 2, width // 2, channels, 2, 2)
        return output.permute(0, 3, 1, 4, 2, 5).reshape(x_t.shape)

    def omega(self, t):
        return ((1 - t / 1000) ** 2).float()

    def make_student(self):
        student = super().make_student()
        has_embedder = student.config.get("guidance_embeds")
        return fold_guidance_embedder(student, self.args.student_guidance_scale) if has_embedder else student

    def teacher_pipeline_kwargs(self):
        guidance = self.args.student_guidance_scale or 3.5  # FluxPipeline's default
        steps = self.args.teacher_num_inference_steps
        kwargs = {"num_inference_steps": steps, "guidance_scale": guidance, "sigmas": None}
        if self.network.config.guidance_embeds:
            return kwargs
        return {**kwargs, "true_cfg_scale": guidance, "negative_prompt": ""}


def fold_guidance_embedder(transformer: FluxTransformer2DModel, scale: float) -> FluxTransformer2DModel:
    """Return a copy of the transformer in float32 without its guidance embedder, whose output is added to a bias.

    The copy equals the original at the guidance `scale`. With scale 0 nothing is added, as in the release. A
    transformer without a guidance embedder is only copied. The copy is on the meta device until its role is made.
    """
    weights, changed = weights_of(transformer), {}
    if transformer.config.guidance_embeds and scale > 0:
        bias = "time_text_embed.timestep_embedder.linear_2.bias"
        embedder = materialize_submodule(transformer, "time_text_embed.guidance_embedder")
        with torch.no_grad():
            projected = transformer.time_text_embed.time_proj(torch.tensor([1000.0 * scale])).float()
            changed[bias] = weights[bias][...].float().cpu() + embedder(projected)[0]
    config = {**transformer.config, "guidance_embeds": False}
    return meta_network(FluxTransformer2DModel, config, weights | changed)


# ---------------------------------------------------------------------------------------------------------------------
# The run
# ---------------------------------------------------------------------------------------------------------------------
def prepare(models: type[TrainingModels], args):
    """Complete and check the arguments and read the rows of data; no weights load. Return (teacher's source, rows)."""
    source = resolve_teacher(args, models)
    models.check_args(args, source)
    if args.dry_run is None:
        find_checkpoint(args)  # refuses an unknown checkpoint, and an --output_dir that holds another run
    rows = load_rows(args)
    check_latents(args, rows, latent_shape_of(source.config(models.vae_class, "vae"), args.resolution))
    return source, rows


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


def main(argv=None, models: type[TrainingModels] = FluxModels):
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
