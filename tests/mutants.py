#!/usr/bin/env python
"""Breaks one thing at a time in a copy of the repository and asks whether a test notices.

    python tests/mutants.py [part of a mutant's name ...]

A mutant is a text that occurs exactly once in its file, and what replaces it. It is caught if one of its test files fails.
Exit code 1 unless all are caught, 2 if a mutant no longer fits the code or the tests fail without any.
"""

import importlib
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from multiprocessing.connection import wait
from pathlib import Path
from typing import NamedTuple

import pytest
import torch


# Imported once, here: a mutant's process is forked with the heavy libraries in it.
for library in (
    "accelerate",
    "transformers.models.clip",
    "transformers.models.t5",
    "diffusers.pipelines.flux",
    "diffusers.pipelines.stable_diffusion_3",
    "diffusers.pipelines.stable_diffusion_xl",
):
    importlib.import_module(library)

ROOT = Path(__file__).resolve().parents[1]
UTILS, LOOP, ROLES = "senseflow_utils.py", "train_senseflow_flux.py", "senseflow_roles.py"
SIGNALS = "senseflow_signals.py"
MATH, LOOP_TESTS = "tests/test_math.py", "tests/test_loop.py"
HAND = "tests/test_toy.py::test_an_iteration_is_the_one_written_by_hand"
TTUR = "tests/test_toy.py::test_the_student_learns_in_every_ttur_th_iteration_and_the_fake_score_in_each"
ADVERSARIAL = "tests/test_toy.py::test_the_adversarial_turns_are_the_ones_written_by_hand"
REAL = "tests/test_toy.py::test_without_simulation_real_latents_are_noised_to_an_anchor_per_sample"
GAN = f"{LOOP_TESTS}::test_each_backward_reaches_only_the_network_of_the_turn"
SD3, SDXL = "train_senseflow_sd3.py", "train_senseflow_sdxl.py"
SD3_LEVELS = "tests/test_train_sd3.py::test_levels_time_weight_and_intermediate_timesteps_are_the_recipes"
SD3_CALL = "tests/test_train_sd3.py::test_the_network_is_called_as_the_stock_pipeline_calls_it"
SD3_PRESET = "tests/test_train_sd3.py::test_the_preset_follows_the_size_and_flags_override_it"
SDXL_CALL = "tests/test_train_sdxl.py::test_the_network_is_called_as_the_stock_pipeline_calls_it"
FLUX_CALL = "tests/test_train_flux.py::test_the_network_is_called_as_the_stock_pipeline_calls_it"
ROWS = "test_the_teacher_is_run_without_a_prompt_only_for_the_loss_that_is_guided"
ANCHORS = "tests/test_train_flux.py::test_anchors_that_nobody_gave_serve_or_are_refused"
VAE = "senseflow_vae.py"
STOCK_VAE = "tests/test_vae.py::test_pictures_become_the_latents_and_latents_the_pictures_of_the_stock_pipeline"
VAE_DTYPE = "tests/test_vae.py::test_the_vae_computes_in_its_own_precision_in_training_and_validation"
SDXL_OMEGA = "tests/test_train_sdxl.py::test_the_discriminators_weight_is_the_roots_of_abar"
DMD2 = "tests/test_train_sdxl.py::test_the_classifier_sees_the_middle_alone_and_learns_in_the_fake_scores_turn_only"
SHOWN = "tests/test_train_sdxl.py::test_the_classifier_is_shown_noised_latents_of_student_and_real_pictures"
COPIES = "tests/test_copies.py"
LEAK = f"{LOOP_TESTS}::test_a_frozen_discriminator_does_not_change_the_students_turn"


BF16 = "tests/test_modes.py::test_bf16_learns_what_fp32_learns"
RESUMED = "tests/test_modes.py::test_a_resumed_run_is_the_same_run"
AT_ONCE = "tests/test_modes.py::test_one_step_reaches_the_next_forward_unless_its_gradient_is_not_finite"
STREAM, ROLE_TESTS = "senseflow_stream.py", "tests/test_roles.py"
HUB, MODELS, HUB_TESTS, INFER_TESTS = "senseflow_hub.py", "senseflow_models.py", "tests/test_hub.py", "tests/test_infer.py"
OF_TEACHER = f"{INFER_TESTS}::test_a_checkpoint_finds_the_{{}}_of_its_teacher"
STEP = f"{ROLE_TESTS}::test_a_step_is_clipped_and_taken_only_where_its_gradient_is_finite"
ENDS = f"{ROLE_TESTS}::test_what_ends_a_run_saves_and_the_run_goes_on_as_if_nothing_had_been"
DISCRIMINATOR = "senseflow_discriminator.py"
TOWERS = "tests/test_discriminator.py::test_towers_that_run_again_learn_the_same_and_keep_the_maps_alone"
VISION = "tests/test_discriminator.py::test_under_bf16_weights_and_residual_stream_stay_float32"
LORA, ONE_BASE = "senseflow_lora.py", "tests/test_lora.py::test_three_roles_are_one_base_and_two_adapters"
QUANTIZED = "tests/test_lora.py::test_a_run_over_a_quantised_base_goes_on_where_it_was_and_draws_as_it_was_trained[flux 4bit]"
ADAPTER_CARD = "tests/test_lora.py::test_resume_to_the_bit_adapters_alone_and_a_card_that_draws_infers_picture"
OVER_ITS_OWN = "tests/test_lora.py::test_an_adapter_is_drawn_with_over_its_own_base_and_whole"
START = "tests/test_lora.py::test_student_and_fake_score_start_as_an_adapter"
IN_BFLOAT16 = "tests/test_lora.py::test_in_bfloat16_adapters_are_float32_and_the_teacher_computes_as_its_twins"
ONE_PART = "tests/test_modes.py::test_under_fsdp2_a_process_holds_its_part_of_one_base"
ITS_PART = "tests/test_modes.py::test_a_process_holds_its_part_of_a_network_and_one_tensor"
ONE_TOWER = "tests/test_modes.py::test_under_fsdp2_a_process_gathers_one_tower_of_the_discriminator"
OF_A_LORA = "tests/test_lora.py::test_a_teacher_with_a_lora_is_distilled_and_drawn_with"
TRACE, FORETOLD = "senseflow_trace.py", "tests/test_dry_run.py::test_what_is_foretold_is_what_a_run_takes"
COUNTER, EVALUATE, VALIDATION = "senseflow_counter.py", "tests/test_evaluate.py", "tests/test_validation.py"
METRICS, LAYOUTS, LAYOUT_TESTS = "senseflow_metrics.py", "senseflow_layouts.py", "tests/test_layouts.py"
ALL_METRICS = f"{EVALUATE}::test_all_metrics_and_the_table"
OF_MANY = "tests/test_dry_run.py::test_a_process_of_many_without_the_others"
RUNTIME, MODES = "senseflow_runtime.py", "tests/test_modes.py::test_two_processes_train_as_one"


class Mutant(NamedTuple):
    name: str
    file: str
    tests: str  # a file, or one test where a whole file would take long
    old: str
    new: str
    old_too: str = ""  # a second place in the same file, for what moves
    new_too: str = ""


# fmt: off
MUTANTS = [
    # Schedules
    Mutant("x0 from velocity: sign", UTILS, MATH,
        "(x_t - sigma * output).float(), (x_t + alpha",
        "(x_t + sigma * output).float(), (x_t + alpha"),
    Mutant("x0 from epsilon: not divided by alpha", UTILS, MATH,
        "((x_t - sigma * output) / alpha).float()",
        "(x_t - sigma * output).float()"),
    Mutant("velocity target: sign", UTILS, MATH,
        "return noise - x0",
        "return x0 - noise"),
    Mutant("DDPM levels: abar instead of its root", UTILS, MATH,
        "return abar.sqrt(), (1 - abar).sqrt()",
        "return abar, 1 - abar"),
    Mutant("solver step renoises with x0", UTILS, MATH,
        "prediction.x0, prediction.noise, t_next)",
        "prediction.x0, prediction.x0, t_next)"),
    Mutant("anchors: each followed by itself", UTILS, MATH,
        "[*list(anchors)[1:], final]",
        "list(anchors)"),
    Mutant("table upside down", UTILS, MATH,
        "self.table[size - 1 - from_top]",
        "self.table[from_top]"),
    Mutant("uniform timesteps miss their last", UTILS, MATH,
        "slots, low, high + 1))",
        "slots, low, high))"),
    Mutant("ISG margin only below", UTILS, MATH,
        "torch.floor(t - margin))",
        "torch.floor(t))"),
    # Guidance and samplers
    Mutant("guidance: off by one scale", UTILS, MATH,
        "unconditional + scale * (cond",
        "conditional + scale * (cond"),
    Mutant("guidance: below one interpolates", UTILS, MATH,
        "scale.clamp(min=1).to",
        "scale.to"),
    Mutant("stochastic and Euler swapped", UTILS, MATH,
        'if sampler == "euler":',
        'if sampler != "euler":'),
    Mutant("backward simulation: anchors from the last", UTILS, MATH,
        "predict(x_t, schedule.anchors[i].expand",
        "predict(x_t, schedule.anchors[-1 - i].expand"),
    Mutant("backward simulation: one step too many", UTILS, MATH,
        "for i in range(steps):",
        "for i in range(min(steps + 1, len(schedule.anchors) - 1)):"),
    Mutant("backward simulation: the same noise each time", UTILS, MATH,
        'draws.normal(f"renoise_{i}", slots, noise.shape[1:])',
        "noise"),
    # Losses
    Mutant("DMD gradient: sign", UTILS, MATH,
        "gradient, error = (fake_x0 - teacher_x0) / normaliser",
        "gradient, error = (teacher_x0 - fake_x0) / normaliser"),
    Mutant("DMD normaliser dropped", UTILS, MATH,
        "gradient, error = (fake_x0 - teacher_x0) / normaliser",
        "gradient, error = fake_x0 - teacher_x0"),
    Mutant("DMD normaliser over the batch", UTILS, MATH,
        "(x0 - teacher_x0).abs().flatten(1).mean(1).view(",
        "(x0 - teacher_x0).abs().mean().expand(len(x0)).view("),
    Mutant("DMD normaliser from the fake score", UTILS, MATH,
        "normaliser = (x0 - teacher_x0)",
        "normaliser = (x0 - fake_x0)"),
    Mutant("DMD: non-finite gradients pass", UTILS, MATH,
        "torch.where(finite, x, torch.zeros_like(x)) for x",
        "x for x"),
    Mutant("ISG: the student before the teacher", UTILS, MATH,
        "schedule.step(teacher_predict(x_t, t), t_mid)",
        "schedule.step(student_predict(x_t, t), t_mid)"),
    Mutant("ISG: the second step starts at t", UTILS, MATH,
        "schedule.step(student_predict(x_mid, t_mid), t_next)",
        "schedule.step(student_predict(x_mid, t), t_next)"),
    Mutant("ISG: gradient into the target", UTILS, MATH,
        "direct.float() - target.detach().float()",
        "direct.float() - target.float()"),
    Mutant("ISG: squared error", UTILS, MATH,
        "(torch.sqrt(difference**2 + c**2) - c).mean()",
        "(difference**2).mean()"),
    Mutant("adversarial loss: sign", UTILS, MATH,
        "return -(weight * fake_logits",
        "return (weight * fake_logits"),
    Mutant("hinge: signs swapped", UTILS, MATH,
        "F.relu(1 - real_logits.float()).mean(1) + F.relu(1 + fake",
        "F.relu(1 + real_logits.float()).mean(1) + F.relu(1 - fake"),
    Mutant("hinge: omega forgotten", UTILS, MATH,
        "return (weight * per_picture).mean()",
        "return per_picture.mean()"),
    Mutant("IDA: direction", UTILS, MATH,
        "fake.lerp_(student, 1 - decay)",
        "fake.lerp_(student, decay)"),
    # Draws
    Mutant("draws ignore the slot", UTILS, MATH,
        "{'shared' if slot is None else slot}",
        "{'shared' if slot is None else 0}"),
    Mutant("draws ignore the iteration", UTILS, MATH,
        "{self.seed}/{self.iteration}/{name}",
        "{self.seed}/{name}"),
    # The iteration
    Mutant("fake score's target: sign", LOOP, HAND,
        "denoising_loss(output, schedule.target(x0, noise))",
        "denoising_loss(output, -schedule.target(x0, noise))"),
    Mutant("fake score's target: another noise", LOOP, HAND,
        "denoising_loss(output, schedule.target(x0, noise))",
        "denoising_loss(output, schedule.target(x0, noise.roll(1, 0)))"),
    Mutant("fake score told another timestep", LOOP, HAND,
        "schedule.add_noise(x0, noise, t), t, condition).output",
        "schedule.add_noise(x0, noise, t), t / 2, condition).output"),
    Mutant("fake score learns through the student", LOOP, HAND,
        "drawn.append((slots, prediction.x0.detach(), condition))",
        "drawn.append((slots, prediction.x0, condition))"),
    Mutant("L_DMD: teacher and fake score swapped", LOOP, HAND,
        'dmd_loss(student_x0, panel["fake_x0"], panel["teacher_x0"])',
        'dmd_loss(student_x0, panel["teacher_x0"], panel["fake_x0"])'),
    Mutant("L_DMD: the scores look at other noise levels than was noised", LOOP, HAND,
        "noised, t_dmd, condition).x0",
        "noised, t_dmd.flip(0), condition).x0"),
    Mutant("L_DMD: the teacher's guidance dropped", LOOP, HAND,
        "noised, t_dmd, condition, guidance).x0",
        "noised, t_dmd, condition).x0"),
    Mutant("ttur ignored", LOOP, TTUR,
        "(iteration + 1) % args.ttur_ratio == 0",
        "(iteration + 1) % 1 == 0"),
    Mutant("ttur inverted", LOOP, TTUR,
        "(iteration + 1) % args.ttur_ratio == 0",
        "(iteration + 1) % args.ttur_ratio != 0"),
    Mutant("backward simulation: always to the last anchor", LOOP, HAND,
        'return draws.shared_integer("simulated_steps", anchors)',
        "return anchors - 1"),
    Mutant("the student is told the anchor before its input's", LOOP, HAND,
        "torch.full((len(slots),), steps, device",
        "torch.full((len(slots),), max(steps - 1, 0), device"),
    Mutant("real latents: the top anchor is not pure noise", LOOP, REAL,
        "rows = index.nonzero().flatten()",
        "rows = torch.arange(len(index))"),
    Mutant("IDA forgotten", LOOP, HAND,
        "if args.ida_decay < 1:",
        "if args.ida_decay > 1:"),
    Mutant("IDA the wrong way round", LOOP, HAND,
        "fake_score.align_with(student, args.ida_decay)",
        "student.align_with(fake_score, args.ida_decay)"),
    Mutant("IDA after the fake score's turn", LOOP, HAND,
        "        if args.ida_decay < 1:\n            fake_score.align_with(student, args.ida_decay)\n",
        "",
        '    totals["fake_score_grad_norm"] = fake_score.step()\n',
        '    totals["fake_score_grad_norm"] = fake_score.step()\n'
        "    if student_turn and args.ida_decay < 1:\n"
        "        fake_score.align_with(student, args.ida_decay)\n"),
    Mutant("ISG: weight ignored", LOOP, HAND,
        'loss + args.isg_weight * losses["isg_loss"]',
        'loss + losses["isg_loss"]'),
    Mutant("ISG: the roles swapped", LOOP, HAND,
        "isg_target(guided, unguided, schedule",
        "isg_target(unguided, guided, schedule"),
    Mutant("the discriminator learns in the student's turn", LOOP, LEAK,
        "                    (logits,) = discriminator((fake,), reference, text)\n",
        "                    discriminator._set_learning(True)\n"
        "                    (logits,) = discriminator((fake,), reference, text)\n"),
    Mutant("the student's GAN gradient cut", LOOP, ADVERSARIAL,
        'losses["adversarial_loss"] = adversarial_loss(logits, omega)',
        'losses["adversarial_loss"] = adversarial_loss(logits.detach(), omega)'),
    Mutant("GAN weight ignored", LOOP, ADVERSARIAL,
        'loss + args.gan_weight * losses["adversarial_loss"]',
        'loss + losses["adversarial_loss"]'),
    Mutant("the discriminator takes its fakes for real", LOOP, ADVERSARIAL,
        "discriminator((real, fake), reference, text)",
        "discriminator((fake, real), reference, text)"),
    Mutant("the discriminator's hinge reaches the student", LOOP, GAN,
        "fake = [features.detach() for features in fake]",
        "fake = [features for features in fake]"),
    Mutant("offloaded encoders: lists of tensors stay on the CPU", "senseflow_prompts.py", "tests/test_prompts.py",
        "return send_to_device(encode_prompt(*args, device=where, **kwargs), device)",
        "return encode_prompt(*args, device=where, **kwargs)"),
    Mutant("FLUX: trained beside the levels that the stock call visits", LOOP,
        "tests/test_train_flux.py::test_the_network_is_called_as_the_stock_pipeline_calls_it",
        "FlowSchedule(table, [1000 * sigma for sigma in sigmas], device=device)",
        "FlowSchedule(table, [999 * sigma for sigma in sigmas], device=device)"),
    # Data
    Mutant("16-bit pictures are clipped", "senseflow_pictures.py", "tests/test_pictures.py",
        'if picture.mode in ("I", "F") or picture.mode.startswith("I;16"):',
        'if picture.mode in ("I", "F"):'),
    Mutant("transparency on black", "senseflow_pictures.py", "tests/test_pictures.py",
        'Image.new("RGBA", picture.size, "white")',
        'Image.new("RGBA", picture.size, "black")'),
    Mutant("orientation 6 turned the other way", "senseflow_pictures.py", "tests/test_pictures.py",
        "6: Image.Transpose.ROTATE_270",
        "6: Image.Transpose.ROTATE_90"),
    Mutant("every sample draws the same caption", "senseflow_captions.py", "tests/test_folder.py",
        'integers("caption", [slot]',
        'integers("caption", [0]'),
    Mutant("a caption is drawn once for all iterations", "senseflow_captions.py", "tests/test_folder.py",
        'Draws(seed, iteration).integers("caption"',
        'Draws(seed, 0).integers("caption"'),
    Mutant("the last caption is never drawn", "senseflow_captions.py", "tests/test_folder.py",
        "len(captions) - 1)",
        "len(captions) - 2)"),
    Mutant("several LMDB folders: the row before", "senseflow_lmdb.py", "tests/test_data.py",
        "bisect.bisect_right",
        "bisect.bisect_left"),
    Mutant("pixels in [0, 1]", "senseflow_batches.py", "tests/test_data.py",
        "values.float() / 127.5 - 1 if",
        "values.float() / 255 if"),
    Mutant("unreadable rows never end a run", "senseflow_batches.py", "tests/test_data.py",
        "self.failure = self.failure or counter.add(batch)",
        "counter.add(batch)"),
    Mutant("a folder of pictures by --dataset_name loses rows", "senseflow_data.py", "tests/test_folder.py",
        'if flag == "train_data_dir" or (own and holds_pictures(path)):',
        'if flag == "train_data_dir":'),
    # Roles
    Mutant("a role goes on learning after its turn", ROLES, HAND,
        "                self._set_learning(False)\n",
        "                pass\n"),
    Mutant("gradients are not cleared", ROLES, HAND,
        "        self.optimizer.zero_grad(set_to_none=True)\n",
        ""),
    Mutant("IDA on half of the parameters", ROLES, HAND,
        "ida_update(list(self.parameters.values()), list(other",
        "ida_update(list(self.parameters.values())[:1], list(other"),
    Mutant("no clipping", ROLES, STEP,
        "(norm / self.max_grad_norm).clamp(min=1)",
        "torch.ones_like(norm)"),
    Mutant("small gradients are made large", ROLES, STEP,
        "(norm / self.max_grad_norm).clamp(min=1)",
        "norm / self.max_grad_norm"),
    Mutant("a step that is not finite is taken", ROLES, STEP,
        "(~finite).float()",
        "torch.zeros_like(norm)"),
    Mutant("8-bit Adam takes a step that is not finite", ROLES, STEP,
        ".masked_fill_(~finite, 0)",
        ""),
    Mutant("skipped steps are not counted", RUNTIME,
        f"{ROLE_TESTS}::test_skipped_steps_are_counted_and_three_in_a_row_end_the_run",
        "self.skipped[role] += not math.isfinite(numbers[name])",
        "self.skipped[role] += 0"),
    # DINOv2 under bf16
    Mutant("DINOv2's weights in bf16", DISCRIMINATOR, VISION,
        "Dinov2Model.from_pretrained, path, dtype=torch.float32,",
        "Dinov2Model.from_pretrained, path, dtype=dtype,"),
    Mutant("DINOv2 without autocast", DISCRIMINATOR, VISION,
        "enabled=self.dtype != torch.float32",
        "enabled=False"),
    Mutant("DINOv2 is not told the run's precision", DISCRIMINATOR,
        "tests/test_discriminator.py::test_the_backbone_follows_the_runs_precision_and_memory",
        '{"dtype": runtime.weight_dtype, "grad',
        '{"grad'),
    Mutant("DINOv2 looks at pictures as they are", DISCRIMINATOR,
        "tests/test_discriminator.py::test_pictures_are_scaled_to_a_resolution_of_the_discriminators_own",
        "if self.resolution not in (None, pictures.shape[-1]):",
        "if False:"),
    Mutant("resumed with another look of the discriminator", "senseflow_checkpoints.py",
        f"{ROLE_TESTS}::test_a_checkpoint_is_refused_to_another_look_of_the_discriminator",
        'prints["discriminator_resolution"] = parts.vision_features.resolution',
        "pass"),
    Mutant("FSDP2: a tower stays gathered behind its backward", DISCRIMINATOR, ONE_TOWER,
        "requires_grad=self.training and torch.is_grad_enabled())",
        "requires_grad=False)"),
    Mutant("FSDP2: each process reads a whole network, then shards it", ROLES, f"{ITS_PART}[fsdp2]",
        "        shard(self.module, self._mesh, self._reshard, policy)\n",
        "        fill(self.module, 'cpu')\n        shard(self.module, self._mesh, self._reshard, policy)\n"),
    Mutant("ZeRO-3: each process reads a whole network, then shares it out", ROLES, f"{ITS_PART}[zero3]",
        'share_out if config["zero_optimization"]["stage"] == 3 else None',
        "None"),
    Mutant("a checkpoint is written of whole networks", "senseflow_weights.py", f"{ITS_PART}[fsdp2]",
        "                del tensor\n",
        "                vars(save_tensors).setdefault('kept', []).append(tensor)\n"),
    Mutant("a process reads the rows of another", "senseflow_weights.py", f"{MODES}[flux-fsdp2]",
        "slice(offset[0], offset[0] + shape[0]) if shape",
        "slice(0, shape[0]) if shape"),
    Mutant("FSDP2: the discriminator is gathered whole", DISCRIMINATOR, ONE_TOWER,
        '_no_split_modules = ("Tower",)',
        "_no_split_modules = ()"),
    # SD 3.5
    Mutant("SD 3.5: omega from the ascending table", UTILS, SD3_LEVELS,
        "self.table.flip(0)[self.index_of(t)]",
        "self.table[self.index_of(t)]"),
    Mutant("SD 3.5: t_mid's margin only below", UTILS, SD3_LEVELS,
        "self.index_of(t_next) + margin, self.index_of(t) - margin)",
        "self.index_of(t_next) + margin, self.index_of(t))"),
    Mutant("SD 3.5: t' from all levels", SD3, SD3_LEVELS,
        "dmd_range=(20, 980)",
        "dmd_range=(0, 999)"),
    Mutant("SD 3.5: anchors on unshifted levels", SD3, SD3_LEVELS,
        "args.anchors or table[list(ANCHOR_INDICES)].tolist()",
        "args.anchors or [index + 1 for index in ANCHOR_INDICES]"),
    Mutant("SD 3.5: the network told sigma, not the timestep", SD3, SD3_CALL,
        "timestep=steps.float()",
        "timestep=steps.float() / 1000"),
    Mutant("SD 3.5: guidance the wrong way round", SD3, SD3_CALL,
        "guide(*output.float().chunk(2), guidance.scale)",
        "guide(*output.float().chunk(2)[::-1], guidance.scale)"),
    Mutant("SD 3.5: the sizes' presets swapped", SD3, SD3_PRESET,
        '"large" if blocks > 30 else "medium"',
        '"medium" if blocks > 30 else "large"'),
    # FLUX, and guidance in all of them
    Mutant("FLUX: pictures packed across their sides", LOOP, FLUX_CALL,
        "_prepare_latent_image_ids(batch, height // 2, width // 2,",
        "_prepare_latent_image_ids(batch, 2 * height // 2, width // 4,"),
    Mutant("FLUX: the teacher told another guidance", LOOP, FLUX_CALL,
        "guidance=scales.to(dtype) if embedded",
        "guidance=(scales - 1).to(dtype) if embedded"),
    Mutant("FLUX: guidance counted from 0", LOOP, FLUX_CALL,
        "guide(*output.float().chunk(2), guidance.scale)",
        "guide(*output.float().chunk(2), guidance.scale + 1)"),
    *(Mutant(f"{name}: a loss that is not guided runs without a prompt, too", UTILS, f"tests/test_train_{name}.py::{ROWS}",
        "max(bounds) > 1)",
        "True)") for name in ("flux", "sd3", "sdxl")),
    Mutant("anchors that nobody gave may end at 20", "senseflow_pipeline.py", ANCHORS,
        "schedule.anchors[-1] < LOWEST_DEFAULT:",
        "schedule.anchors[-1] < 0:"),
    Mutant("anchors that nobody gave are not looked at without ISG", "senseflow_pipeline.py", ANCHORS,
        "crowded and (default or args.isg_weight > 0)",
        "crowded and args.isg_weight > 0"),
    # VAEs and prompts
    Mutant("VAE: encoded without its mean", VAE, STOCK_VAE,
        "- mean) / std",
        ") / std"),
    Mutant("VAE: variance for standard deviation", VAE, STOCK_VAE,
        "+ config.batch_norm_eps).sqrt()",
        "+ config.batch_norm_eps)"),
    Mutant("VAE: latents scaled the wrong way", VAE, STOCK_VAE,
        'torch.tensor(std) / (config.get("scaling_factor") or 1)',
        'torch.tensor(std) * (config.get("scaling_factor") or 1)'),
    Mutant("VAE: statistics of latents before they are folded", VAE, STOCK_VAE,
        "F.pixel_shuffle(x0 * std + mean, fold_of(vae.config))",
        "F.pixel_shuffle(x0, fold_of(vae.config)) * std.mean() + mean.mean()"),
    Mutant("VAE: autocast decides its precision", VAE, VAE_DTYPE,
        "torch.autocast(x.device.type, enabled=False)",
        "torch.autocast(x.device.type, enabled=torch.is_autocast_enabled(x.device.type))"),
    Mutant("VAE: --vae_dtype ignored", VAE, VAE_DTYPE,
        'DTYPES[auto if args.vae_dtype == "auto" else args.vae_dtype]',
        "DTYPES[auto]"),
    Mutant("text padded on the left", "senseflow_prompts.py", "tests/test_prompts.py",
        "F.pad(text, (0, 0, 0, length - len(text)))",
        "F.pad(text, (0, 0, length - len(text), 0))"),
    Mutant("the text's mask one too long", "senseflow_prompts.py", "tests/test_prompts.py",
        "device=padded.device) < lengths",
        "device=padded.device) <= lengths"),
    # Flags
    Mutant("a default counts as given", "senseflow_args.py", "tests/test_args.py",
        "if getattr(without_defaults, name) is not absent",
        "if getattr(args, name, None) is not None"),
    Mutant("a flag that would change nothing passes", "senseflow_args.py", "tests/test_args.py",
        "if name in args.given and is_off(args):",
        "if False:"),
    # SDXL and DMD2
    Mutant("SDXL: no prompt is the prompt itself", SDXL, SDXL_CALL,
        "torch.cat([torch.zeros_like(embeds), embeds])",
        "torch.cat([embeds, embeds])"),
    Mutant("SDXL: a crop in the size conditioning", SDXL, SDXL_CALL,
        "[[*size, 0, 0, *size]]",
        "[[*size, 8, 8, *size]]"),
    Mutant("SDXL: omega is the noise level", SDXL, SDXL_OMEGA,
        "schedule.levels(t)[0].float()",
        "schedule.levels(t)[1].float()"),
    Mutant("DMD2: the student runs from the classifier", UTILS, MATH,
        "F.softplus(-fake_logits.float()).mean()\n\n\ndef logistic",
        "F.softplus(fake_logits.float()).mean()\n\n\ndef logistic"),
    Mutant("DMD2: real and fake swapped", UTILS, MATH,
        "F.softplus(fake_logits.float()).mean() + F.softplus(-real_logits.float()).mean()",
        "F.softplus(-fake_logits.float()).mean() + F.softplus(real_logits.float()).mean()"),
    Mutant("DMD2: the classifier's weight ignored", SDXL, DMD2,
        "loss + args.classifier_weight * classifier_loss",
        "loss + 0 * classifier_loss"),
    Mutant("DMD2: the student's weight ignored", SDXL, DMD2,
        'loss = loss + args.gan_weight * losses["adversarial_loss"]  # dmd2',
        'loss = loss + losses["adversarial_loss"]  # dmd2'),
    Mutant("DMD2: the mid-block left out", SDXL, DMD2,
        "for block in (*unet.down_blocks, unet.mid_block):",
        "for block in unet.down_blocks:"),
    Mutant("DMD2: the classifier runs the whole network", SDXL, DMD2,
        "self.classifier(middle(self.unet, **inputs)) if classify",
        "(self.unet(**inputs), self.classifier(middle(self.unet, **inputs)))[1] if classify"),
    Mutant("DMD2: clean latents for the classifier", SDXL, SHOWN,
        "role(**sdxl_inputs(role, x_t, t, condition), classify=True)",
        "role(**sdxl_inputs(role, x0, t, condition), classify=True)"),
    Mutant("DMD2: the student's latents for real", SDXL, SHOWN,
        "parts.classify(fake_score, reals.pop(0), draws",
        "parts.classify(fake_score, x0, draws"),
    # What the scripts share
    Mutant("a copied block drifts", SD3, COPIES,
        "args.ida_decay < 1:",
        "args.ida_decay < 0.99:"),
    # Streams, and ends
    Mutant("stream: each process reads the first one's share", STREAM, "tests/test_stream.py",
        "split_dataset_by_node(order, rank=rank, world_size=world_size)",
        "split_dataset_by_node(order, rank=0, world_size=world_size)"),
    Mutant("stream: a resume begins with the first worker", STREAM, "tests/test_stream.py",
        "        if worker < first % workers:\n            yield []\n",
        ""),
    Mutant("stream: a resume makes some micro-batches again", STREAM, "tests/test_stream.py",
        "(first - worker + workers - 1) // workers",
        "first // workers"),
    Mutant("stream: every epoch in the same order", STREAM, "tests/test_stream.py",
        "np.random.default_rng((seed, epoch))",
        "np.random.default_rng((seed, 0))"),
    Mutant("signals are not heard", RUNTIME, ENDS,
        "        self.endings.add(name)\n",
        "        pass\n"),
    Mutant("unreadable data end nothing", RUNTIME, ENDS,
        'runtime.endings.add("failure")',
        "pass"),
    Mutant("what ends a run saves nothing", LOOP, ENDS,
        "    if metrics.ended_by and runtime.saved < iteration:\n        save()\n",
        ""),
    Mutant("a signal to the group reaches the DataLoader's workers", RUNTIME,
        "tests/test_modes.py::test_a_signal_saves_and_says_so[ddp-SIGTERM]",
        "os.setpgid(0, 0)",
        "pass"),
    Mutant("a full disk leaves half a checkpoint", "senseflow_checkpoints.py",
        f"{ROLE_TESTS}::test_a_full_disk_is_one_line_and_older_checkpoints_stay",
        "        shutil.rmtree(aside, ignore_errors=True)\n        reason",
        "        reason"),
    Mutant("DeepSpeed's state is taken by any launch", "senseflow_checkpoints.py",
        f"{ROLE_TESTS}::test_deepspeeds_state_goes_on_as_it_was_launched",
        "    if made != now and any(",
        "    if False and any("),
    Mutant("autocast keeps every weight's copy until the forward ends", RUNTIME,
        f"{ROLE_TESTS}::test_with_gradient_checkpointing_a_layers_weights_are_in_bfloat16_when_it_runs_alone",
        "AutocastKwargs(cache_enabled=False)",
        "AutocastKwargs()"),
    # Several processes
    Mutant("DDP: gradients are never averaged", ROLES, f"{MODES}[flux-ddp]",
        "self._gradients_stay_here(self._turns % self.accumulation > 0)",
        "self._gradients_stay_here(True)"),
    Mutant("FSDP2: IDA moves shards while gathered weights stay", ROLES,
        f"{AT_ONCE}[fsdp2]",
        "    def align_with(self, other, decay):\n        self._free_gathered()\n",
        "    def align_with(self, other, decay):\n"),
    Mutant("FSDP2: each process clips by the norm of its own part", ROLES, f"{AT_ONCE}[fsdp2]",
        "self._whole(torch.nn.utils.get_total_norm(gradients))",
        "torch.nn.utils.get_total_norm([getattr(gradient, '_local_tensor', gradient) for gradient in gradients])"),
    Mutant("FSDP2: a turn begins with what was gathered frozen", ROLES, f"{MODES}[sd3-fsdp2]",
        "    def _set_learning(self, learning):\n        self._free_gathered()\n",
        "    def _set_learning(self, learning):\n"),
    Mutant("FSDP2: the gradients' precision is looked up when all is frozen", ROLES, f"{BF16}[fsdp2]",
        "        self.module._get_fsdp_state()._lazy_init()\n",
        ""),
    Mutant("FSDP2: moments are not restored", ROLES, f"{RESUMED}[6-fsdp2]",
        "                self.optimizer.state[parameter] = own",
        "                pass"),
    Mutant("ZeRO: the frozen discriminator is called through its engine", ROLES, f"{MODES}[flux-zero3]",
        "self._wrapped if self._learning and torch.is_grad_enabled() else self.module",
        "self._wrapped"),
    Mutant("ZeRO: IDA moves the network and not the masters", ROLES, f"{MODES}[flux-zero2]",
        "        ida_update(self._masters(), other._masters(), decay)\n        self._fill_network()\n",
        "        super().align_with(other, decay)\n"),
    Mutant("ZeRO: IDA does not reach the network", ROLES, f"{AT_ONCE}[zero2]",
        "decay)\n        self._fill_network()\n",
        "decay)\n"),
    Mutant("ZeRO-3: small weights stay as they were", ROLES, f"{AT_ONCE}[zero3]",
        "        zero.empty_partition_cache()",
        "        pass"),
    Mutant("ZeRO: masters are not restored", ROLES, f"{RESUMED}[6-zero2]",
        '            master.copy_(part[str(index)]["master"])\n', ""),
    Mutant("ZeRO: no clipping", RUNTIME, f"{MODES}[flux-zero2]",
        '"gradient_clipping": self.args.max_grad_norm',
        '"gradient_clipping": 1e9'),
    Mutant("every process trains on the first one's pictures", LOOP, f"{MODES}[flux-ddp]",
        "make_dataloader(args, rows, rank, world_size,",
        "make_dataloader(args, rows, 0, world_size,"),
    # What a model is loaded from
    Mutant("a checkpoint forgets its teacher's commit", MODELS, OF_TEACHER.format("revision"),
        'distilled.get("teacher_revision"))',
        "None)"),
    Mutant("a checkpoint forgets its teacher's variant", MODELS, OF_TEACHER.format("variant"),
        'variant = variant or distilled.get("teacher_variant")',
        "variant = variant or None"),
    Mutant("the commit of the run is not written", "senseflow_pipeline.py", HUB_TESTS,
        '"teacher_revision": args.revision,',
        '"teacher_revision": None,'),
    Mutant("the Hub's branch is looked up anew", HUB, HUB_TESTS,
        "@cache\ndef look_up",
        "from types import SimpleNamespace as S\n@lambda f: (setattr(f, 'cache_clear', S) or f)\ndef look_up"),
    Mutant("shards are asked of the Hub", HUB, HUB_TESTS,
        "local_files_only=local, **options",
        "local_files_only=False, **options"),
    Mutant("--call goes unrecorded", "infer.py", f"{INFER_TESTS}::test_a_call_is_the_pipelines_own_and_is_recorded",
        '{"call": asked or None}',
        '{"call": None}'),
    # Adapters
    Mutant("xformers that nothing in SD 3.5 asks for", SD3, "tests/test_attention.py",
           "network.enable_xformers_memory_efficient_attention()", 'network.set_attention_backend("native")'),
    Mutant("adapters: the fake score draws an A of its own", LORA, f"{ONE_BASE}[sd3]",
        "return student, twin(student, base)",
        "fake_score = twin(student, base)\n"
        "    [torch.nn.init.normal_(p) for n, p in fake_score.named_parameters() if 'lora_A' in n]\n"
        "    return student, fake_score"),
    Mutant("adapters: one for both", LORA, f"{ONE_BASE}[sd3]",
        "return student, twin(student, base)",
        "return student, student"),
    Mutant("adapters: a base for each", LORA, f"{ONE_BASE}[sd3]",
        "return copy.deepcopy(network, {id(tensor): tensor for tensor in shared})",
        "return copy.deepcopy(network)"),
    Mutant("adapters: buffers for each", LORA, f"{ONE_BASE}[sd3]",
        "(*base.parameters(), *base.buffers(), *quantization",
        "(*base.parameters(), *quantization"),
    Mutant("adapters: the base is trained, too", RUNTIME, f"{ONE_BASE}[sd3]",
        "in module.named_parameters() if parameter.requires_grad}",
        "in module.named_parameters()}\n        module.requires_grad_(True)"),
    Mutant("adapters: alpha is not exported", "senseflow_pipeline.py", f"{ADAPTER_CARD}[sd3]",
        "metadata: metadata_of(student.module)}",
        "metadata: None}"),
    Mutant("adapters: the fake score's is exported", SDXL, f"{ADAPTER_CARD}[sdxl]",
        "PIPELINE, parts.student, components",
        "PIPELINE, vars(parts.fake_score).update(subfolder='unet') or parts.fake_score, components"),
    Mutant("adapters: the card's call is not at the student's guidance", LOOP, f"{ADAPTER_CARD}[flux]",
        "guidance = args.student_guidance_scale if embedded else 1.0",
        "guidance = 1.0"),
    Mutant("adapters: the network is not called at the student's guidance", LOOP, f"{ONE_BASE}[flux]",
        "torch.full_like(steps, scale, dtype=torch.float32)",
        "torch.full_like(steps, 1.0, dtype=torch.float32)"),
    Mutant("adapters: resumed with another rank", "senseflow_checkpoints.py", f"{ADAPTER_CARD}[flux]",
        "    prints |= adapter_of(parts.student.module)\n",
        ""),
    Mutant("adapters: under FSDP2 shards of the base for each", ROLES, ONE_PART,
        "share_base(self.module, self._base)",
        "pass"),
    Mutant("adapters: the teacher computes as it does by itself", RUNTIME, IN_BFLOAT16,
        "autocast=self.args.rank > 0)",
        "autocast=False)"),
    Mutant("adapters: in the precision of the base", LORA, IN_BFLOAT16,
        "    cast_training_params(student, torch.float32)\n",
        ""),
    Mutant("adapters: drawn over any base", MODELS, OVER_ITS_OWN,
        'if found != model.distilled.get("teacher_fingerprint"):',
        "if found is None:"),
    Mutant("adapters: the one to start from is not read", LORA, START,
        "parameter.copy_(weights[stored_name(name)])",
        "weights[stored_name(name)]"),
    Mutant("adapters: a LoRA of the teacher that fits in part is not spoken of", LORA,
           "tests/test_lora.py::test_layers_of_a_teachers_lora_that_have_no_place_are_said", "if unknown:", "if False:"),
    Mutant("quantised base: scales for each twin", LORA, f"{ONE_BASE}[flux 4bit]",
           "shared = (*base.parameters(), *base.buffers(), *quantization_states(base))",
           "shared = (*base.parameters(), *base.buffers())"),
    Mutant("quantised base: a twin without scales", "senseflow_quantization.py", f"{ONE_BASE}[sdxl 8bit]",
           "small.init_8bit_state()", "pass"),
    Mutant("quantised base: packed anew by the first pass", "senseflow_quantization.py", f"{ONE_BASE}[flux 4bit]",
           "= True, False", "= True, True"),
    Mutant("quantised base: drawn over a plain one", MODELS, QUANTIZED,
           "        quantize(getattr(pipeline, model.network), quantization, device)\n", ""),
    Mutant("quantised base: resumed over another", "senseflow_checkpoints.py", QUANTIZED,
           "    if given != stored:\n        fix", "    if False:\n        fix"),
    Mutant("adapters: the LoRA of the teacher is left out", MODELS, OF_A_LORA,
        "scale if exact is network else None)",
        "None)"),
    Mutant("adapters: the scale of the teacher's LoRA is left out", LORA, OF_A_LORA,
        "pipeline.fuse_lora(lora_scale=scale)",
        "pipeline.fuse_lora()"),
    Mutant("dry run: what is free is counted", COUNTER,
        "tests/test_dry_run.py::test_the_counter_counts_what_torchs_allocator_gives_out",
        "self._held.pop(key)\n        self._add(-size, label)",
        "self._held.pop(key)"),
    Mutant("dry run: gathered weights are counted when they are free", COUNTER, f"{OF_MANY}[fsdp2-environment0-8]",
        "self._add(-old, label)\n",
        "self._add(-min(old, size), label)\n"),
    Mutant("dry run: DDP keeps no gradients", TRACE, f"{OF_MANY}[ddp-environment1-2]",
        "parameter.grad = kept.setdefault(parameter, parameter.grad)",
        "pass"),
    Mutant("dry run: the first step of the optimisers is the last", TRACE, f"{FORETOLD}[sdxl-more2]",
        "for tensor in tensors_in(state.values()):",
        "for tensor in ():"),
    Mutant("dry run: shapes on the meta device are counted", COUNTER, f"{FORETOLD}[flux-more0]",
        'if tensor.device.type == "meta":',
        "if False:"),
    Mutant("dry run: flags without use stay", "senseflow_dry_run.py",
        "tests/test_dry_run.py::test_what_does_not_fit_is_tried_with_more_until_it_does",
        "if not skips:",
        "if True:"),
    Mutant("adapters: float16 is another base", MODELS, OVER_ITS_OWN,
        "if network.dtype == torch.float16:",
        "if False:"),
    Mutant("quantised base: read whole before it is quantised", "senseflow_quantization.py",
        "tests/test_weights.py::test_a_layer_at_a_time_is_read_and_quantised",
        "            part.weight.data = part.weight.new_empty(0)\n", ""),
    Mutant("memory: the decoder keeps its activations", VAE,
        "tests/test_vae.py::test_a_decoder_that_computes_again_gives_the_same_gradient_in_less_memory",
        "block.forward = partial(_recomputed, block.forward)",
        "pass"),
    Mutant("memory: a tower iterates again in its backward", DISCRIMINATOR, TOWERS,
        "            norm.eval()\n",
        "            pass\n"),
    Mutant("memory: a tower keeps its activations", DISCRIMINATOR, TOWERS,
        "if self.gradient_checkpointing and torch.is_grad_enabled():\n            how",
        "if False:\n            how"),
    Mutant("signals: the update is measured behind the step", ROLES, VALIDATION,
        "        before = self._some_values()\n        norm = self.step()\n",
        "        norm = self.step()\n        before = self._some_values()\n"),
    Mutant("signals: a loss is compared with a mean that holds it", RUNTIME, VALIDATION,
        "            if self.fake_loss > 0:\n"
        '                numbers["signal/fake_lag"] = numbers["fake_loss"] / self.fake_loss\n', "",
        '            self.fake_loss += (numbers["fake_loss"] - self.fake_loss) / self.fake_losses\n',
        '            self.fake_loss += (numbers["fake_loss"] - self.fake_loss) / self.fake_losses\n'
        '            numbers["signal/fake_lag"] = numbers["fake_loss"] / self.fake_loss\n'),
    Mutant("signals: the scores' distance is that of the student", UTILS, MATH,
        '"signal/dmd_ratio": gradient.abs().mean()',
        '"signal/dmd_ratio": normaliser.mean()'),
    Mutant("signals: the fake score's error is the teacher's", UTILS, MATH,
        "(x0 - fake_x0) / normaliser",
        "(x0 - teacher_x0) / normaliser"),
    Mutant("signals: what comes in is warned of", SIGNALS, VALIDATION,
        "now if band.starts_outside else 0.0",
        "0.0"),
    Mutant("signals: every value by itself", SIGNALS, VALIDATION,
        "if len(values) < band.over:",
        "if not values:"),
    Mutant("signals: the second side's remedy", SIGNALS, VALIDATION,
        "band.below if mean < band.low else band.above",
        "band.above if mean < band.low else band.below"),
    Mutant("signals: metrics are not watched", RUNTIME, VALIDATION,
        "        self.watch.look(iteration, numbers)\n",
        ""),
    Mutant("signals: pictures are not watched", "senseflow_validation.py", VALIDATION,
        "        self._watch.look(iteration, shares)\n",
        ""),
    Mutant("signals: latents of other prompts", "senseflow_validation.py", VALIDATION,
        "itertools.chain(*(itertools.combinations(row, 2) for row in rows))",
        "itertools.combinations(itertools.chain(*rows), 2)"),
    Mutant("signals: diversity between prompts", "senseflow_validation.py", VALIDATION,
        "for one, other in itertools.combinations(small, 2):",
        "for one, other in itertools.combinations([*small, *(0 * picture for picture in small)], 2):"),
    Mutant("metrics: biased covariance", METRICS, EVALUATE,
        "div((len(x) - 1) ** 0.5)",
        "div(len(x) ** 0.5)"),
    Mutant("metrics: means are not compared", METRICS, EVALUATE,
        "return (shift + spread",
        "return (spread"),
    Mutant("metrics: the patch is a corner", METRICS, EVALUATE,
        "left, top = (width - side) // 2, (height - side) // 2",
        "left, top = 0, 0"),
    Mutant("metrics: PickScore without its scale", METRICS, ALL_METRICS,
        "torch.exp(torch.tensor(logit_scale)) * cosine",
        "1.0 * cosine"),
    Mutant("evaluate: a picture may change unnoticed", "evaluate.py", EVALUATE,
        "(str(file), (stat := file.stat()).st_size, stat.st_mtime_ns)",
        "(str(file), 0, 0)"),
    Mutant("evaluate: ImageReward reads other prompts", "evaluate.py", ALL_METRICS,
        "prompts[done : done + len(pixels)]",
        "prompts[: len(pixels)]"),
    Mutant("HPS v2: projections as they lie in the file", LAYOUTS, LAYOUT_TESTS,
        "tensor = tensor.T if name in TRANSPOSED else tensor",
        "tensor = tensor.T.T"),
    Mutant("HPS v2: keys for queries", LAYOUTS, LAYOUT_TESTS,
        'zip("qkv", tensor.chunk(3))',
        'zip("kqv", tensor.chunk(3))'),
    Mutant("ImageReward: raw scores", LAYOUTS, LAYOUT_TESTS,
        "(states.float().squeeze(1) - self.mean) / self.deviation",
        "states.float().squeeze(1)"),
    Mutant("infer: each process draws everything", "infer.py", f"{INFER_TESTS}::test_processes_share_the_prompts_out",
        "missing[rank::world_size]",
        "missing"),
]
# fmt: on


def mutate(mutant: Mutant, folder: Path) -> None:
    """Applies a mutant to a copy; SystemExit if its text is not there exactly once."""
    text = (folder / mutant.file).read_text()
    for old, new in ((mutant.old, mutant.new), (mutant.old_too, mutant.new_too)):
        if old and text.count(old) != 1:
            sys.exit(f'error: mutant "{mutant.name}": its text occurs {text.count(old)} times in {mutant.file}, not once:\n{old}')
        text = text.replace(old, new) if old else text
    (folder / mutant.file).write_text(text)


def copy_repository(folder: Path) -> None:
    for file in ROOT.glob("*.py"):
        shutil.copy(file, folder)
    shutil.copy(ROOT / "pyproject.toml", folder)
    (folder / "demo").symlink_to(ROOT / "demo")
    for name in ("tests", "benchmarks", "accelerate_configs"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.png", "out"))


def run_tests(folder: Path, tests: list[str], log: Path) -> None:
    """In a process of its own: pytest in the copy; exits with its code."""
    with open(log, "w") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
        os.chdir(folder)
        sys.path[:] = [path for path in sys.path if Path(path).resolve() not in (ROOT, ROOT / "tests")]
        torch.set_num_threads(1)
        code = pytest.main(["-x", "-q", "--durations=0", "-p", "no:cacheprovider", *tests])
        sys.stdout.flush()
        os._exit(int(code))


class Trial:
    """A mutated copy, and pytest in it as a process forked from this thread: torch's profiler wants the one that imported it."""

    def __init__(self, mutant: Mutant | None, tests: list[str]):
        self.mutant, self.temporary = mutant, tempfile.TemporaryDirectory()
        folder, self.log = Path(self.temporary.name) / "copy", Path(self.temporary.name) / "log"
        folder.mkdir()
        copy_repository(folder)
        if mutant:
            mutate(mutant, folder)
        self.since, self.limit = time.monotonic(), 300 if mutant else 3600
        self.process = multiprocessing.get_context("fork").Process(target=run_tests, args=(folder, tests, self.log))
        self.process.start()

    def over(self) -> bool:
        if time.monotonic() - self.since > self.limit:
            self.process.kill()
            self.process.join()
        return not self.process.is_alive()

    def result(self) -> tuple[int, str]:
        """(exit code of pytest, its output); 0 = the tests pass, 1 = one fails."""
        self.process.join()
        output = self.log.read_text()
        self.temporary.cleanup()
        return self.process.exitcode, output

    def judge(self) -> bool:
        """Prints the verdict; whether the mutant was caught."""
        code, output = self.result()
        verdict = {0: "SURVIVED", 1: "caught"}.get(code, f"ERROR: pytest ended with {code}")
        first = next((line for line in output.splitlines() if line.startswith("FAILED") or line.startswith("ERROR")), "")
        first = first.split("::")[-1].split(" - ")[0]
        print(f"{verdict:8s} {time.monotonic() - self.since:5.1f} s  {self.mutant.name}  {first}", flush=True)
        return code == 1


def main() -> int:
    chosen = [m for m in MUTANTS if not sys.argv[1:] or any(part in m.name for part in sys.argv[1:])]
    with tempfile.TemporaryDirectory() as temporary:  # all of them must fit before the first runs
        for number, mutant in enumerate(chosen):
            folder = Path(temporary) / str(number)
            folder.mkdir()
            shutil.copy(ROOT / mutant.file, folder)
            mutate(mutant, folder)
    code, output = Trial(None, sorted({mutant.tests for mutant in chosen})).result()
    if code != 0:
        print(f"{output}\nerror: the tests fail without any mutant", file=sys.stderr)
        return 2

    waiting, running, caught = list(chosen), [], []
    while waiting or running:
        while waiting and len(running) < int(os.environ.get("MUTANT_JOBS", "2")):
            mutant = waiting.pop(0)
            running.append(Trial(mutant, [mutant.tests]))
        wait([trial.process.sentinel for trial in running], timeout=1)
        for trial in [trial for trial in running if trial.over()]:
            running.remove(trial)
            caught.append(trial.judge())
    print(f"caught {sum(caught)}/{len(chosen)}")
    return 0 if all(caught) else 1


if __name__ == "__main__":
    sys.exit(main())
