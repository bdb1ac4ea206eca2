#!/usr/bin/env python
# Copyright 2026 The SenseFlow-scripts authors. Licensed under the Apache License, Version 2.0.
"""Distill an SDXL teacher to few steps with DMD2 (Yin et al., 2024, arXiv 2405.14867), the baseline of SenseFlow.

    accelerate launch --config_file accelerate_configs/fsdp2.yaml train_dmd2_sdxl.py \
        --pretrained_model_name_or_path stabilityai/stable-diffusion-xl-base-1.0 --dataset_json data.json \
        --pretrained_vae_model_name_or_path madebyollin/sdxl-vae-fp16-fix --output_dir sdxl-dmd2 \
        --mixed_precision bf16 --gradient_checkpointing

`train_iteration` is the paper's algorithm on three roles: student, teacher, and fake score, on whose mid-block a
classifier takes the place of SenseFlow's discriminator. There is no ISG and no IDA. The teacher is that of
train_senseflow_sdxl.py.
"""

from senseflow.arguments import (
    Parser,
    add_checkpointing_arguments,
    add_data_arguments,
    add_distribution_matching_arguments,
    add_lora_arguments,
    add_model_arguments,
    add_optimization_arguments,
    add_precision_arguments,
    add_validation_arguments,
    number,
)
from senseflow.errors import UserError, run_script


# fmt: off
def parse_args(argv=None):
    parser = Parser(
        description=__doc__.split("\n\n")[0],
        epilog="The defaults are those of the SenseFlow release for its baseline, of DMD2's paper for "
        "--backward_simulation_prob, and, with --rank, ours for the learning rates.",
    )
    add = add_model_arguments(parser, "StableDiffusionXLPipeline", "UNet2DConditionModel")
    add("--pretrained_vae_model_name_or_path", help="Another VAE, e.g. the fp16-fix one; saved with the student.")
    add_lora_arguments(parser)
    add_data_arguments(parser)
    add = add_distribution_matching_arguments(parser, "dmd2")
    add("--gan_weight", type=number(float, 0),
        help="Weight of the adversarial loss. 0 turns it off, and no classifier is trained.")
    add("--classifier_weight", type=number(float, 0), help="Weight of the classifier's loss beside the fake score's.")
    add_optimization_arguments(parser)
    add_precision_arguments(parser)
    add_checkpointing_arguments(parser)
    add = add_validation_arguments(parser)
    add("--teacher_guidance_scale", type=number(float, 0), default=5.0,
        help="Guidance scale of the teacher for its validation images.")
    parser.set_defaults(
        anchors=[999.0, 749.0, 499.0, 249.0], ttur_ratio=5, dmd_guidance_scale=[8.0], backward_simulation_prob=1.0,
        gan_weight=5e-3, classifier_weight=1e-2,
        learning_rate=1e-6, max_train_steps=18000, teacher_num_inference_steps=50,
        sampler="stochastic",  # what LCMScheduler does
        isg_weight=0.0, isg_margin=0.0, isg_guidance_scale=[1.0], ida_decay=1.0,  # no flags: SenseFlow's, turned off
        lora_layers="to_q to_k to_v to_out.0 proj_in proj_out ff.net.0.proj ff.net.2 conv1 conv2 conv_shortcut "
        "time_emb_proj downsamplers.0.conv upsamplers.0.conv".split(),  # those of diffusers' LCM-LoRA
    )
    return parser.parse_args(argv)
# fmt: on


if __name__ == "__main__":
    run_script(parse_args)  # answer --help and bad arguments before the slow imports

import math
from functools import partial

import torch
from diffusers import UNet2DConditionModel
from tqdm.auto import tqdm

from senseflow.data.loader import make_dataloader
from senseflow.memory.report import report
from senseflow.models.discriminator import LatentClassifier
from senseflow.models.hub import ModelSource
from senseflow.training.checkpoints import Checkpointer
from senseflow.training.metrics import Metrics
from senseflow.training.models import TrainingModels
from senseflow.training.prompts import cache_prompts
from senseflow.training.runtime import Runtime
from senseflow.training.validation import Validation
from senseflow_utils import StatelessRNG, denoising_loss, logistic_loss, needs_images, non_saturating_loss
from train_senseflow_sdxl import SDXLModels, prepare, student_input, student_losses


# ---------------------------------------------------------------------------------------------------------------------
# The algorithm
# ---------------------------------------------------------------------------------------------------------------------
def train_iteration(iteration: int, batches: list[dict], models: TrainingModels, args):
    """Run one iteration of DMD2 over the micro-batches of one global batch.

    Args:
        iteration: number from 0; the student is updated in every `args.ttur_ratio`-th iteration.
        batches: `gradient_accumulation_steps` micro-batches of senseflow.data.loader.PromptImageLoader.
    Returns:
        ({name: scalar on the device}, {name: latents (B, C, H, W) for the debug panel}, or {} without student update).
    """
    schedule, student, fake_score = models.schedule, models.student, models.fake_score
    rng = StatelessRNG(args.seed, iteration, models.device)
    update_student = (iteration + 1) % args.ttur_ratio == 0
    totals: dict[str, torch.Tensor] = {}
    debug_latents: dict[str, torch.Tensor] = {}
    student_samples = []  # the student's x0 before its update, for the fake score to learn
    real_samples = []  # latents of real images, for the classifier

    def record(scalars: dict[str, torch.Tensor]) -> None:
        for name, value in scalars.items():
            totals[name] = totals.get(name, 0) + value.detach() / len(batches)

    for batch in batches:
        # 1. The student's input: from its own first steps (backward simulation), or noised real latents.
        sample_indices = batch["sample_indices"]
        with torch.no_grad():
            condition = models.condition(batch)
            if args.gan_weight > 0:
                x0 = models.real_latents(batch, torch.arange(len(sample_indices)), rng)
                batch = {**batch, "latents": x0}  # encoded once, for the student's input, too
                real_samples.append(x0)
            x_t, index = student_input(models, rng, batch, condition, args)
            t, t_next = schedule.anchors[index], schedule.next_timesteps[index]

        # 2. The student's prediction; with gradient only if the student is updated.
        with student.accumulate() if update_student else torch.no_grad():
            prediction = models.predict(student, x_t, t, condition)

            # 3. The student's loss: L_DMD + w_gan L_adv, with the classifier frozen.
            if update_student:
                losses, debug_latents = student_losses(models, rng, batch, condition, x_t, t, t_next, prediction, args)
                loss = losses["dmd_loss"]
                if args.gan_weight > 0:
                    logits = models.classify(prediction.x0, rng, sample_indices, "student", condition)
                    losses["adversarial_loss"] = non_saturating_loss(logits)
                    loss = loss + args.gan_weight * losses["adversarial_loss"]
                student.backward(loss)
                record(losses)
        student_samples.append((sample_indices, prediction.x0.detach(), condition))

    # 4. The student's step.
    if update_student:
        totals["student_grad_norm"], totals["signal/update_ratio"] = student.step(measure_update=True)

    # 5. The fake score's and the classifier's loss, and their step: they learn from the student's samples.
    for sample_indices, x0, condition in student_samples:
        t = schedule.draw_fake_timesteps(rng, sample_indices)
        noise = rng.normal("fake_noise", sample_indices, x0.shape[1:])
        with fake_score.accumulate():
            output = models.predict(fake_score, schedule.add_noise(x0, noise, t), t, condition).output
            loss = denoising_loss(output, schedule.target(x0, noise, t))
            record({"fake_loss": loss})
            if args.gan_weight > 0:
                real_logits = models.classify(real_samples.pop(0), rng, sample_indices, "real", condition)
                fake_logits = models.classify(x0, rng, sample_indices, "fake", condition)
                classifier_loss = logistic_loss(real_logits, fake_logits)
                record({"classifier_loss": classifier_loss})
                record({"real_logits": real_logits.mean(), "fake_logits": fake_logits.mean()})
                loss = loss + args.classifier_weight * classifier_loss
            fake_score.backward(loss)
    totals["fake_score_grad_norm"] = fake_score.step()
    return totals, debug_latents


# ---------------------------------------------------------------------------------------------------------------------
# The teacher: SDXL, with a classifier on the fake score
# ---------------------------------------------------------------------------------------------------------------------
class DMD2Models(SDXLModels):
    """SDXL, whose fake score has a classifier on its mid-block, unless --gan_weight is 0."""

    parse_args = staticmethod(parse_args)
    method = "DMD2 (arXiv 2405.14867)"
    inactive_flags = ((lambda args: True, "DMD2, which has no discriminator of its own", ("learning_rate_disc",)),)

    @classmethod
    def check_adversarial_args(cls, args, source: ModelSource) -> None:
        if source.config(UNet2DConditionModel, "unet").get("mid_block_type", "") is None:
            fix = "give --gan_weight 0 or another teacher"
            raise source.error(f"its UNet has no mid-block for DMD2's classifier; {fix}")
        if args.classifier_weight == 0:
            fix = "give --gan_weight 0 to train without it"
            raise UserError(f"--classifier_weight 0: the classifier would never learn; {fix}", exit_code=2)

    def uses_vae(self, args):
        encodes, decodes = super().uses_vae(args)
        if args.gan_weight > 0:  # the classifier sees latents of real images in every iteration, and no decoded image
            return not args.dataset_lmdb, bool(args.validation_prompts)
        return encodes, decodes

    def student_and_fake_score(self):
        student, fake_score = super().student_and_fake_score()
        if self.args.gan_weight > 0:
            # self.time_ids has all sizes; the classifier is made for the smallest height and width.
            sides = [mid_block_side(student, min(sides)) for sides in zip(*self.time_ids)]
            classifier = LatentClassifier(student.config.block_out_channels[-1], *sides)
            fake_score = ScoreWithClassifier(fake_score, classifier)
        return student, fake_score

    def classify(self, x0, rng: StatelessRNG, sample_indices, name: str, condition) -> torch.Tensor:
        """Return the classifier's logits (B,) on x0 (B, C, H, W), noised to uniform timesteps, with gradient."""
        schedule, last = self.schedule, len(self.schedule.train_timesteps) - 1
        t = schedule.train_timesteps[rng.integers(f"{name}_classifier_timestep", sample_indices, 0, last)]
        x_t = schedule.add_noise(x0, rng.normal(f"{name}_classifier_noise", sample_indices, x0.shape[1:]), t)
        return self.fake_score(**self.unet_inputs(self.fake_score, x_t, t, condition), classify=True)


class ScoreWithClassifier(torch.nn.Module):
    """The fake score's UNet and a classifier on its mid-block (DMD2, section 4.3), trained and saved together."""

    def __init__(self, unet: UNet2DConditionModel, classifier: LatentClassifier):
        super().__init__()
        self.unet, self.classifier = unet, classifier

    def forward(self, classify: bool = False, return_dict: bool = False, **inputs):
        """Return the UNet's output as a tuple; with `classify` the classifier's logits (B,)."""
        if classify:
            return self.classifier(mid_block_features(self.unet, **inputs))
        return self.unet(**inputs, return_dict=return_dict)


def mid_block_features(unet, sample, timestep, encoder_hidden_states, added_cond_kwargs) -> torch.Tensor:
    """Return features (B, C, h, w) after the mid-block: the first half of UNet2DConditionModel.forward."""
    embedding = unet.time_embedding(unet.get_time_embed(sample, timestep))
    embedding = embedding + unet.get_aug_embed(embedding, encoder_hidden_states, added_cond_kwargs)
    sample = unet.conv_in(sample)
    for block in (*unet.down_blocks, unet.mid_block):
        attends = getattr(block, "has_cross_attention", False)
        sample = block(sample, temb=embedding, **({"encoder_hidden_states": encoder_hidden_states} if attends else {}))
        sample = sample[0] if isinstance(sample, tuple) else sample  # a down-block returns skip connections, too
    return sample


def mid_block_side(unet: UNet2DConditionModel, latent_side: int) -> int:
    """Return the side of the mid-block's features for latents of this side; a down-block that halves rounds up."""
    for block in unet.down_blocks:
        latent_side = math.ceil(latent_side / 2) if block.downsamplers else latent_side
    return latent_side


# ---------------------------------------------------------------------------------------------------------------------
# The run
# ---------------------------------------------------------------------------------------------------------------------
def make_models(models: type[TrainingModels], args, source: ModelSource, schedule, runtime: Runtime) -> TrainingModels:
    """Load the networks and make the three roles."""
    models = models(args, source, schedule, runtime)
    student, fake_score = models.student_and_fake_score()
    models.teacher = runtime.frozen_role("teacher", models.network)  # first: adapters share the weights of its role
    models.student = runtime.trained_role(
        "student", student, args.learning_rate, step_every=args.ttur_ratio, subfolder=models.network_name
    )
    models.fake_score = runtime.trained_role("fake_score", fake_score, args.learning_rate_fake)
    return models


# Copied from train_senseflow_flux.main with FluxModels->DMD2Models
def main(argv=None, models: type[TrainingModels] = DMD2Models):
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
