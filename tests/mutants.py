#!/usr/bin/env python
"""Break one thing at a time in a copy of the repository, and check that a test fails for each.

    python tests/mutants.py [part of a mutant's name ...]

A mutant replaces text that occurs exactly once in its file. It is caught if its test fails. The exit code is 0 if all
mutants are caught and 1 if not. It is 2 if a text to replace does not occur once, or if a test fails without a mutant.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path


ROOT = Path(__file__).resolve().parents[1]
UTILS, LORA = "senseflow_utils.py", "senseflow/models/lora.py"
ROLES, SHARDED = "senseflow/training/roles.py", "senseflow/training/sharded.py"
MODELS = "senseflow/training/models.py"
FLUX, SD3, SDXL = "train_senseflow_flux.py", "train_senseflow_sd3.py", "train_senseflow_sdxl.py"
DMD2 = "train_dmd2_sdxl.py"

MATH = "tests/test_math.py"
BY_HAND = "tests/test_toy.py::test_an_iteration_is_the_one_written_by_hand"
TTUR = "tests/test_toy.py::test_the_student_learns_in_every_ttur_th_iteration_and_the_fake_score_in_each"
ADVERSARIAL = "tests/test_toy.py::test_the_adversarial_turns_are_the_ones_written_by_hand"
REAL_LATENTS = "tests/test_toy.py::test_without_simulation_real_latents_are_noised_to_an_anchor_per_sample"
BACKWARD = "tests/training/test_loop.py::test_each_backward_reaches_only_the_network_being_trained"
FROZEN = "tests/training/test_loop.py::test_a_student_update_does_not_change_the_discriminators_step"
COPIES = "tests/training/test_loop.py::test_weight_copies_train_to_the_bit_as_without_them"
STEP = "tests/training/test_roles.py::test_a_step_is_clipped_and_taken_only_where_its_gradient_is_finite"
FLUX_CALL = "tests/test_train_flux.py::test_the_network_is_called_as_the_stock_pipeline_calls_it"
SD3_CALL = "tests/test_train_sd3.py::test_the_network_is_called_as_the_stock_pipeline_calls_it"
SD3_LEVELS = "tests/test_train_sd3.py::test_levels_time_weight_and_intermediate_timesteps_are_the_recipes"
SDXL_OMEGA = "tests/test_train_sdxl.py::test_the_discriminators_weight_is_the_roots_of_abar"
MIDDLE = "tests/test_train_dmd2.py::test_the_classifier_sees_the_middle_alone_and_learns_in_the_fake_scores_turn_only"
CLASSIFIER = "tests/test_train_dmd2.py::test_the_classifier_is_shown_noised_latents_of_student_and_real_images"
ONE_BASE = "tests/models/test_lora.py::test_three_roles_are_one_base_and_two_adapters[sd3]"
SHARED_BASE = "tests/test_modes.py::test_under_fsdp2_a_process_holds_its_shard_of_one_base"
FSDP2_STEP = "tests/test_modes.py::test_one_step_reaches_the_next_forward_unless_its_gradient_is_not_finite[fsdp2]"
TWO_PROCESSES = "tests/test_modes.py::test_two_processes_train_as_one"

# fmt: off
MUTANTS = [  # name, file, test, text, replacement; more pairs of text and replacement may follow
    # Schedules
    ("x0 from velocity: sign", UTILS, MATH,
        "(x_t - sigma * output).float(), (x_t + alpha",
        "(x_t + sigma * output).float(), (x_t + alpha"),
    ("x0 from epsilon: not divided by alpha", UTILS, MATH,
        "((x_t - sigma * output) / alpha).float()",
        "(x_t - sigma * output).float()"),
    ("x0 from v: sign", UTILS, MATH,
        "(alpha * x_t - sigma * output).float()",
        "(alpha * x_t + sigma * output).float()"),
    ("v target: sign", UTILS, MATH,
        "(alpha * noise - sigma * x0).float()",
        "(sigma * x0 - alpha * noise).float()"),
    ("velocity target: sign", UTILS, MATH,
        "return noise - x0",
        "return x0 - noise"),
    ("DDPM levels: abar instead of its root", UTILS, MATH,
        "return abar.sqrt(), (1 - abar).sqrt()",
        "return abar, 1 - abar"),
    ("solver step: x0 in the place of the noise", UTILS, MATH,
        "prediction.x0, prediction.noise, t_next)",
        "prediction.x0, prediction.x0, t_next)"),
    ("anchors: each followed by itself", UTILS, MATH,
        "[*list(anchors)[1:], final]",
        "list(anchors)"),
    ("SD 3.5: omega from the ascending levels", UTILS, SD3_LEVELS,
        "self.train_timesteps.flip(0)[self.index_of(t)]",
        "self.train_timesteps[self.index_of(t)]"),
    # Guidance and samplers
    ("guidance: off by one scale", UTILS, MATH,
        "unconditional + scale * (cond",
        "conditional + scale * (cond"),
    ("samplers: stochastic and Euler swapped", UTILS, MATH,
        'if sampler == "euler":',
        'if sampler != "euler":'),
    ("backward simulation: anchors from the last", UTILS, MATH,
        "predict(x_t, schedule.anchors[i].expand",
        "predict(x_t, schedule.anchors[-1 - i].expand"),
    ("backward simulation: one step too many", UTILS, MATH,
        "for i in range(steps):",
        "for i in range(min(steps + 1, len(schedule.anchors) - 1)):"),
    ("backward simulation: the same noise in each step", UTILS, MATH,
        'rng.normal(f"renoise_{i}", sample_indices, noise.shape[1:])',
        "noise"),
    ("backward simulation: always to the last anchor", UTILS, BY_HAND,
        'return rng.shared_integer("simulated_steps", num_anchors)',
        "return num_anchors - 1"),
    # Losses
    ("DMD gradient: sign", UTILS, MATH,
        "gradient, error = (fake_x0 - teacher_x0)",
        "gradient, error = (teacher_x0 - fake_x0)"),
    ("DMD gradient: not normalized", UTILS, MATH,
        "        finite = torch.isfinite(gradient)\n",
        "        gradient = fake_x0 - teacher_x0\n"
        "        finite = torch.isfinite(gradient)\n"),
    ("DMD gradient: normalized over the batch", UTILS, MATH,
        "(x0 - teacher_x0).abs().flatten(1).mean(1).view(",
        "(x0 - teacher_x0).abs().mean().expand(len(x0)).view("),
    ("DMD gradient: normalized by the fake score", UTILS, MATH,
        "(x0 - teacher_x0).abs().flatten(1)",
        "(x0 - fake_x0).abs().flatten(1)"),
    ("DMD gradient: values that are not finite stay", UTILS, MATH,
        "torch.where(finite, x, torch.zeros_like(x)) for x",
        "x for x"),
    ("ISG target: the student before the teacher", UTILS, MATH,
        "schedule.step(teacher_predict(x_t, t), t_mid)",
        "schedule.step(student_predict(x_t, t), t_mid)"),
    ("ISG target: the second step starts at t", UTILS, MATH,
        "schedule.step(student_predict(x_mid, t_mid), t_next)",
        "schedule.step(student_predict(x_mid, t), t_next)"),
    ("ISG loss: gradient into the target", UTILS, MATH,
        "direct.float() - target.detach().float()",
        "direct.float() - target.float()"),
    ("adversarial loss: sign", UTILS, MATH,
        "return -(weight * fake_logits",
        "return (weight * fake_logits"),
    ("hinge loss: signs swapped", UTILS, MATH,
        "F.relu(1 - real_logits.float()).mean(1) + F.relu(1 + fake",
        "F.relu(1 + real_logits.float()).mean(1) + F.relu(1 - fake"),
    ("hinge loss: not weighted by omega", UTILS, MATH,
        "return (weight * per_image).mean()",
        "return per_image.mean()"),
    ("DMD2, student's GAN loss: sign", UTILS, MATH,
        "return F.softplus(-fake_logits",
        "return F.softplus(fake_logits"),
    ("DMD2, classifier's loss: real and fake swapped", UTILS, MATH,
        "F.softplus(fake_logits.float()).mean() + F.softplus(-real_logits.float()).mean()",
        "F.softplus(-fake_logits.float()).mean() + F.softplus(real_logits.float()).mean()"),
    ("IDA: decay and its complement swapped", UTILS, MATH,
        "torch._foreach_lerp_(fake_parameters, student_parameters, 1 - decay)",
        "torch._foreach_lerp_(fake_parameters, student_parameters, decay)"),
    # Random numbers
    ("random numbers: the same for each sample", UTILS, MATH,
        "{'shared' if sample_index is None else sample_index}",
        "{'shared' if sample_index is None else 0}"),
    ("random numbers: the same in each iteration", UTILS, MATH,
        "{self.seed}/{self.iteration}/{name}",
        "{self.seed}/{name}"),
    # The iteration
    ("fake score's target: sign", FLUX, BY_HAND,
        "denoising_loss(output, schedule.target(x0, noise, t))",
        "denoising_loss(output, -schedule.target(x0, noise, t))"),
    ("fake score's loss: gradient into the student", FLUX, BY_HAND,
        "student_samples.append((sample_indices, prediction.x0.detach(), condition))",
        "student_samples.append((sample_indices, prediction.x0, condition))"),
    ("L_DMD: teacher and fake score swapped", FLUX, BY_HAND,
        "dmd_loss(student_x0, fake_x0, teacher_x0)",
        "dmd_loss(student_x0, teacher_x0, fake_x0)"),
    ("L_DMD: the fake score gets the timesteps of other samples", FLUX, BY_HAND,
        "noised, t_dmd, condition).x0",
        "noised, t_dmd.flip(0), condition).x0"),
    ("L_DMD: the teacher gets no guidance", FLUX, BY_HAND,
        "noised, t_dmd, condition, guidance).x0",
        "noised, t_dmd, condition).x0"),
    ("student: updated in each iteration", FLUX, TTUR,
        "(iteration + 1) % args.ttur_ratio == 0",
        "(iteration + 1) % 1 == 0"),
    ("student: run at the anchor before that of its input", FLUX, BY_HAND,
        "torch.full((len(sample_indices),), num_steps, device",
        "torch.full((len(sample_indices),), max(num_steps - 1, 0), device"),
    ("real latents: the input at the top anchor is not pure noise", FLUX, REAL_LATENTS,
        "rows = index.nonzero().flatten()",
        "rows = torch.arange(len(index))"),
    ("IDA: moves the student to the fake score", FLUX, BY_HAND,
        "fake_score.ida_update_from(student, args.ida_decay)",
        "student.ida_update_from(fake_score, args.ida_decay)"),
    ("IDA: after the fake score's step", FLUX, BY_HAND,
        "        if args.ida_decay < 1:\n            fake_score.ida_update_from(student, args.ida_decay)\n",
        "",
        '    totals["fake_score_grad_norm"] = fake_score.step()\n',
        '    totals["fake_score_grad_norm"] = fake_score.step()\n'
        "    if update_student and args.ida_decay < 1:\n"
        "        fake_score.ida_update_from(student, args.ida_decay)\n"),
    ("L_ISG: not weighted", FLUX, BY_HAND,
        'loss + args.isg_weight * losses["isg_loss"]',
        'loss + losses["isg_loss"]'),
    ("L_ISG: teacher and student swapped", FLUX, BY_HAND,
        "isg_target(teacher_predict, student_predict, schedule",
        "isg_target(student_predict, teacher_predict, schedule"),
    ("L_adv: gradient into the discriminator", FLUX, FROZEN,
        "                    (logits,) = discriminator((fake,), reference, text)\n",
        "                    discriminator._set_training(True)\n"
        "                    (logits,) = discriminator((fake,), reference, text)\n"),
    ("L_adv: no gradient into the student", FLUX, ADVERSARIAL,
        'losses["adversarial_loss"] = adversarial_loss(logits, omega)',
        'losses["adversarial_loss"] = adversarial_loss(logits.detach(), omega)'),
    ("discriminator: real and fake swapped", FLUX, ADVERSARIAL,
        "discriminator((real, fake), reference, text)",
        "discriminator((fake, real), reference, text)"),
    ("discriminator: gradient of the hinge loss into the student", FLUX, BACKWARD,
        "fake = [features.detach() for features in fake]",
        "fake = [features for features in fake]"),
    # Teachers
    ("FLUX: the teacher gets another guidance scale", FLUX, FLUX_CALL,
        "guidance=None if scale is None else scale.to(role.dtype)",
        "guidance=None if scale is None else (scale - 1).to(role.dtype)"),
    ("SD 3.5: the network gets sigma instead of the timestep", SD3, SD3_CALL,
        "timestep=t.float()",
        "timestep=t.float() / 1000"),
    ("guidance: conditional and unconditional output swapped", MODELS, SD3_CALL,
        "guide(*output.float().chunk(2), guidance.scale)",
        "guide(*output.float().chunk(2)[::-1], guidance.scale)"),
    ("SDXL: omega is sigma instead of alpha", SDXL, SDXL_OMEGA,
        "self.schedule.levels(t)[0].float()",
        "self.schedule.levels(t)[1].float()"),
    ("DMD2, classifier: features before the mid-block", DMD2, MIDDLE,
        "for block in (*unet.down_blocks, unet.mid_block):",
        "for block in unet.down_blocks:"),
    ("DMD2, classifier: latents without noise", DMD2, CLASSIFIER,
        "self.unet_inputs(self.fake_score, x_t, t, condition), classify=True",
        "self.unet_inputs(self.fake_score, x0, t, condition), classify=True"),
    ("DMD2, classifier: the student's latents as real ones", DMD2, CLASSIFIER,
        "models.classify(real_samples.pop(0), rng",
        "models.classify(x0, rng"),
    # Roles
    ("role: still trains after `accumulate`", ROLES, BY_HAND,
        "                self._set_training(False)\n",
        "                pass\n"),
    ("role: gradients are not cleared", ROLES, BY_HAND,
        "        self.optimizer.zero_grad(set_to_none=True)\n",
        ""),
    ("role: IDA of the first parameter only", ROLES, BY_HAND,
        "ida_update(self._masters(), other._masters(), decay)",
        "ida_update(self._masters()[:1], other._masters()[:1], decay)"),
    ("role: copies of weights stay as before a step", ROLES, COPIES,
        "norm = self._step()\n        self._refresh_copies()",
        "norm = self._step()"),
    ("role: copies of weights stay as before IDA", ROLES, COPIES,
        "other._masters(), decay)\n        self._refresh_copies()",
        "other._masters(), decay)"),
    ("role: copies of weights stay as before a checkpoint", ROLES, COPIES,
        "self._load_weights(weights)\n            self._refresh_copies()",
        "self._load_weights(weights)"),
    ("role: copies of weights are constants", ROLES, COPIES,
        "self.copies.attach()",
        "pass"),
    ("role: no clipping", ROLES, STEP,
        "(norm / self.max_grad_norm).clamp(min=1)",
        "torch.ones_like(norm)"),
    ("role: a step that is not finite is taken", ROLES, STEP,
        "(~finite).float()",
        "torch.zeros_like(norm)"),
    # Roles in several processes
    ("DDP: gradients are never averaged", ROLES, f"{TWO_PROCESSES}[flux-ddp]",
        "with nullcontext() if last else self._defer_gradient_sync():",
        "with self._defer_gradient_sync():"),
    ("FSDP2: IDA changes shards while gathered weights stay", SHARDED, FSDP2_STEP,
        "    def ida_update_from(self, other, decay):\n        self._free_gathered()\n",
        "    def ida_update_from(self, other, decay):\n"),
    ("FSDP2: each process clips by the norm of its shard", ROLES, FSDP2_STEP,
        "self._full_tensor(torch.nn.utils.get_total_norm(gradients))",
        "torch.nn.utils.get_total_norm([getattr(gradient, '_local_tensor', gradient) for gradient in gradients])"),
    ("ZeRO: IDA changes the masters and not the network", SHARDED, f"{TWO_PROCESSES}[flux-zero2]",
        "        super().ida_update_from(other, decay)\n        self._copy_masters_to_network()\n",
        "        super().ida_update_from(other, decay)\n"),
    # Roles with a shared base
    ("adapters: one for student and fake score", LORA, ONE_BASE,
        "fake_score = copy_sharing_base(student, base)",
        "fake_score = student"),
    ("adapters: a copy of the base for each", LORA, ONE_BASE,
        "return copy.deepcopy(network, {id(tensor): tensor for tensor in shared})",
        "return copy.deepcopy(network)"),
    ("adapters: under FSDP2 shards of the base for each", SHARDED, SHARED_BASE,
        "share_base(self.module)",
        "pass"),
]
# fmt: on


def mutated(mutant: tuple) -> str:
    """Return the text of a mutant's file with its replacements; exit with code 2 if they do not fit."""
    name, file, _, *edits = mutant
    text = (ROOT / file).read_text()
    for old, new in zip(edits[::2], edits[1::2], strict=True):
        if text.count(old) != 1:
            message = f'error: mutant "{name}": {file} has this text {text.count(old)} times, not once; correct it:'
            print(f"{message}\n{old}", file=sys.stderr)
            sys.exit(2)
        text = text.replace(old, new)
    return text


def run_tests(tests: list[str], mutant: tuple | None = None) -> subprocess.CompletedProcess:
    """Run tests in a copy of the repository, with a mutant or without."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, "copy")
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".*", "__pycache__", "out", "outputs"))
        if mutant:
            (copy / mutant[1]).write_text(mutated(mutant))
        limit = ["timeout", "300" if mutant else "3600"]
        command = [*limit, sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", *tests]
        return subprocess.run(command, cwd=copy, capture_output=True, text=True)


def is_caught(mutant: tuple) -> bool:
    """Run a mutant's test and print whether it fails."""
    result = run_tests([mutant[2]], mutant)
    status = {0: "SURVIVED", 1: "caught"}.get(result.returncode, f"ERROR: pytest ended with {result.returncode}")
    failed = next((line for line in result.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))), "")
    print(f"{status:8s}  {mutant[0]}  {failed.split('::')[-1].split(' - ')[0]}", flush=True)
    return result.returncode == 1


def main() -> int:
    chosen = [mutant for mutant in MUTANTS if not sys.argv[1:] or any(part in mutant[0] for part in sys.argv[1:])]
    for mutant in chosen:  # all of them must fit before any test runs
        mutated(mutant)
    clean = run_tests(sorted({mutant[2] for mutant in chosen}))
    if clean.returncode:
        print(f"{clean.stdout}{clean.stderr}\nerror: the tests fail without any mutant", file=sys.stderr)
        return 2
    with ThreadPoolExecutor(int(os.environ.get("MUTANT_JOBS", "2"))) as pool:
        num_caught = sum(pool.map(is_caught, chosen))
    print(f"caught {num_caught}/{len(chosen)}")
    return 0 if num_caught == len(chosen) else 1


if __name__ == "__main__":
    sys.exit(main())
