#!/usr/bin/env python
"""Breaks one thing at a time in a copy of the repository and asks whether a test notices.

    python tests/mutants.py [part of a mutant's name ...]

A mutant is a text that occurs exactly once in its file, and what replaces it. It is caught if one of its tests fails.
Exit code 1 unless all are caught, 2 if a mutant no longer fits the code or the tests fail without any.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path


ROOT = Path(__file__).resolve().parents[1]
UTILS, ROLES, LORA = "senseflow_utils.py", "senseflow/training/roles.py", "senseflow/models/lora.py"
LOOP, SD3, SDXL = "train_senseflow_flux.py", "train_senseflow_sd3.py", "train_senseflow_sdxl.py"
MATH = "tests/test_math.py"
HAND = "tests/test_toy.py::test_an_iteration_is_the_one_written_by_hand"
TTUR = "tests/test_toy.py::test_the_student_learns_in_every_ttur_th_iteration_and_the_fake_score_in_each"
ADVERSARIAL = "tests/test_toy.py::test_the_adversarial_turns_are_the_ones_written_by_hand"
REAL = "tests/test_toy.py::test_without_simulation_real_latents_are_noised_to_an_anchor_per_sample"
GAN = "tests/test_loop.py::test_each_backward_reaches_only_the_network_of_the_turn"
SD3_LEVELS = "tests/test_train_sd3.py::test_levels_time_weight_and_intermediate_timesteps_are_the_recipes"
SD3_CALL = "tests/test_train_sd3.py::test_the_network_is_called_as_the_stock_pipeline_calls_it"
FLUX_CALL = "tests/test_train_flux.py::test_the_network_is_called_as_the_stock_pipeline_calls_it"
SDXL_OMEGA = "tests/test_train_sdxl.py::test_the_discriminators_weight_is_the_roots_of_abar"
DMD2 = "tests/test_train_sdxl.py::test_the_classifier_sees_the_middle_alone_and_learns_in_the_fake_scores_turn_only"
SHOWN = "tests/test_train_sdxl.py::test_the_classifier_is_shown_noised_latents_of_student_and_real_images"
LEAK = "tests/test_loop.py::test_a_frozen_discriminator_does_not_change_the_students_turn"
AT_ONCE = "tests/test_modes.py::test_one_step_reaches_the_next_forward_unless_its_gradient_is_not_finite"
STEP = "tests/test_roles.py::test_a_step_is_clipped_and_taken_only_where_its_gradient_is_finite"
ONE_BASE = "tests/test_lora.py::test_three_roles_are_one_base_and_two_adapters"
ONE_PART = "tests/test_modes.py::test_under_fsdp2_a_process_holds_its_part_of_one_base"
MODES = "tests/test_modes.py::test_two_processes_train_as_one"

# fmt: off
MUTANTS = [  # name, file, test, text, replacement, and so on for what moves
    # Schedules
    ("x0 from velocity: sign", UTILS, MATH,
        "(x_t - sigma * output).float(), (x_t + alpha",
        "(x_t + sigma * output).float(), (x_t + alpha"),
    ("x0 from epsilon: not divided by alpha", UTILS, MATH,
        "((x_t - sigma * output) / alpha).float()",
        "(x_t - sigma * output).float()"),
    ("velocity target: sign", UTILS, MATH,
        "return noise - x0",
        "return x0 - noise"),
    ("DDPM levels: abar instead of its root", UTILS, MATH,
        "return abar.sqrt(), (1 - abar).sqrt()",
        "return abar, 1 - abar"),
    ("solver step renoises with x0", UTILS, MATH,
        "prediction.x0, prediction.noise, t_next)",
        "prediction.x0, prediction.x0, t_next)"),
    ("anchors: each followed by itself", UTILS, MATH,
        "[*list(anchors)[1:], final]",
        "list(anchors)"),
    ("SD 3.5: omega from the ascending table", UTILS, SD3_LEVELS,
        "self.table.flip(0)[self.index_of(t)]",
        "self.table[self.index_of(t)]"),
    # Guidance and samplers
    ("guidance: off by one scale", UTILS, MATH,
        "unconditional + scale * (cond",
        "conditional + scale * (cond"),
    ("stochastic and Euler swapped", UTILS, MATH,
        'if sampler == "euler":',
        'if sampler != "euler":'),
    ("backward simulation: anchors from the last", UTILS, MATH,
        "predict(x_t, schedule.anchors[i].expand",
        "predict(x_t, schedule.anchors[-1 - i].expand"),
    ("backward simulation: one step too many", UTILS, MATH,
        "for i in range(steps):",
        "for i in range(min(steps + 1, len(schedule.anchors) - 1)):"),
    ("backward simulation: the same noise each time", UTILS, MATH,
        'draws.normal(f"renoise_{i}", slots, noise.shape[1:])',
        "noise"),
    # Losses
    ("DMD gradient: sign", UTILS, MATH,
        "gradient, error = (fake_x0 - teacher_x0) / normalizer",
        "gradient, error = (teacher_x0 - fake_x0) / normalizer"),
    ("DMD normalizer dropped", UTILS, MATH,
        "gradient, error = (fake_x0 - teacher_x0) / normalizer",
        "gradient, error = fake_x0 - teacher_x0"),
    ("DMD normalizer over the batch", UTILS, MATH,
        "(x0 - teacher_x0).abs().flatten(1).mean(1).view(",
        "(x0 - teacher_x0).abs().mean().expand(len(x0)).view("),
    ("DMD normalizer from the fake score", UTILS, MATH,
        "normalizer = (x0 - teacher_x0)",
        "normalizer = (x0 - fake_x0)"),
    ("DMD: non-finite gradients pass", UTILS, MATH,
        "torch.where(finite, x, torch.zeros_like(x)) for x",
        "x for x"),
    ("ISG: the student before the teacher", UTILS, MATH,
        "schedule.step(teacher_predict(x_t, t), t_mid)",
        "schedule.step(student_predict(x_t, t), t_mid)"),
    ("ISG: the second step starts at t", UTILS, MATH,
        "schedule.step(student_predict(x_mid, t_mid), t_next)",
        "schedule.step(student_predict(x_mid, t), t_next)"),
    ("ISG: gradient into the target", UTILS, MATH,
        "direct.float() - target.detach().float()",
        "direct.float() - target.float()"),
    ("adversarial loss: sign", UTILS, MATH,
        "return -(weight * fake_logits",
        "return (weight * fake_logits"),
    ("hinge: signs swapped", UTILS, MATH,
        "F.relu(1 - real_logits.float()).mean(1) + F.relu(1 + fake",
        "F.relu(1 + real_logits.float()).mean(1) + F.relu(1 - fake"),
    ("hinge: omega forgotten", UTILS, MATH,
        "return (weight * per_image).mean()",
        "return per_image.mean()"),
    ("DMD2: the student runs from the classifier", UTILS, MATH,
        "F.softplus(-fake_logits.float()).mean()\n\n\ndef logistic",
        "F.softplus(fake_logits.float()).mean()\n\n\ndef logistic"),
    ("DMD2: real and fake swapped", UTILS, MATH,
        "F.softplus(fake_logits.float()).mean() + F.softplus(-real_logits.float()).mean()",
        "F.softplus(-fake_logits.float()).mean() + F.softplus(real_logits.float()).mean()"),
    ("IDA: direction", UTILS, MATH,
        "fake.lerp_(student, 1 - decay)",
        "fake.lerp_(student, decay)"),
    # Draws
    ("draws ignore the slot", UTILS, MATH,
        "{'shared' if slot is None else slot}",
        "{'shared' if slot is None else 0}"),
    ("draws ignore the iteration", UTILS, MATH,
        "{self.seed}/{self.iteration}/{name}",
        "{self.seed}/{name}"),
    # The iteration
    ("fake score's target: sign", LOOP, HAND,
        "denoising_loss(output, schedule.target(x0, noise))",
        "denoising_loss(output, -schedule.target(x0, noise))"),
    ("fake score learns through the student", LOOP, HAND,
        "drawn.append((slots, prediction.x0.detach(), condition))",
        "drawn.append((slots, prediction.x0, condition))"),
    ("L_DMD: teacher and fake score swapped", LOOP, HAND,
        'dmd_loss(student_x0, panel["fake_x0"], panel["teacher_x0"])',
        'dmd_loss(student_x0, panel["teacher_x0"], panel["fake_x0"])'),
    ("L_DMD: the scores look at other noise levels than was noised", LOOP, HAND,
        "noised, t_dmd, condition).x0",
        "noised, t_dmd.flip(0), condition).x0"),
    ("L_DMD: the teacher's guidance dropped", LOOP, HAND,
        "noised, t_dmd, condition, guidance).x0",
        "noised, t_dmd, condition).x0"),
    ("ttur ignored", LOOP, TTUR,
        "(iteration + 1) % args.ttur_ratio == 0",
        "(iteration + 1) % 1 == 0"),
    ("backward simulation: always to the last anchor", LOOP, HAND,
        'return draws.shared_integer("simulated_steps", anchors)',
        "return anchors - 1"),
    ("the student is told the anchor before its input's", LOOP, HAND,
        "torch.full((len(slots),), steps, device",
        "torch.full((len(slots),), max(steps - 1, 0), device"),
    ("real latents: the top anchor is not pure noise", LOOP, REAL,
        "rows = index.nonzero().flatten()",
        "rows = torch.arange(len(index))"),
    ("IDA the wrong way round", LOOP, HAND,
        "fake_score.align_with(student, args.ida_decay)",
        "student.align_with(fake_score, args.ida_decay)"),
    ("IDA after the fake score's turn", LOOP, HAND,
        "        if args.ida_decay < 1:\n            fake_score.align_with(student, args.ida_decay)\n",
        "",
        '    totals["fake_score_grad_norm"] = fake_score.step()\n',
        '    totals["fake_score_grad_norm"] = fake_score.step()\n'
        "    if student_turn and args.ida_decay < 1:\n"
        "        fake_score.align_with(student, args.ida_decay)\n"),
    ("ISG: weight ignored", LOOP, HAND,
        'loss + args.isg_weight * losses["isg_loss"]',
        'loss + losses["isg_loss"]'),
    ("ISG: the roles swapped", LOOP, HAND,
        "isg_target(guided, unguided, schedule",
        "isg_target(unguided, guided, schedule"),
    ("the discriminator learns in the student's turn", LOOP, LEAK,
        "                    (logits,) = discriminator((fake,), reference, text)\n",
        "                    discriminator._set_learning(True)\n"
        "                    (logits,) = discriminator((fake,), reference, text)\n"),
    ("the student's GAN gradient cut", LOOP, ADVERSARIAL,
        'losses["adversarial_loss"] = adversarial_loss(logits, omega)',
        'losses["adversarial_loss"] = adversarial_loss(logits.detach(), omega)'),
    ("the discriminator takes its fakes for real", LOOP, ADVERSARIAL,
        "discriminator((real, fake), reference, text)",
        "discriminator((fake, real), reference, text)"),
    ("the discriminator's hinge reaches the student", LOOP, GAN,
        "fake = [features.detach() for features in fake]",
        "fake = [features for features in fake]"),
    # What differs between the models
    ("FLUX: the teacher told another guidance", LOOP, FLUX_CALL,
        "guidance=scales.to(dtype) if embedded",
        "guidance=(scales - 1).to(dtype) if embedded"),
    ("SD 3.5: the network told sigma, not the timestep", SD3, SD3_CALL,
        "timestep=steps.float()",
        "timestep=steps.float() / 1000"),
    ("SD 3.5: guidance the wrong way round", SD3, SD3_CALL,
        "guide(*output.float().chunk(2), guidance.scale)",
        "guide(*output.float().chunk(2)[::-1], guidance.scale)"),
    ("SDXL: omega is the noise level", SDXL, SDXL_OMEGA,
        "schedule.levels(t)[0].float()",
        "schedule.levels(t)[1].float()"),
    ("DMD2: the mid-block left out", SDXL, DMD2,
        "for block in (*unet.down_blocks, unet.mid_block):",
        "for block in unet.down_blocks:"),
    ("DMD2: clean latents for the classifier", SDXL, SHOWN,
        "role(**sdxl_inputs(role, x_t, t, condition), classify=True)",
        "role(**sdxl_inputs(role, x0, t, condition), classify=True)"),
    ("DMD2: the student's latents for real", SDXL, SHOWN,
        "parts.classify(fake_score, reals.pop(0), draws",
        "parts.classify(fake_score, x0, draws"),
    # Roles
    ("a role goes on learning after its turn", ROLES, HAND,
        "                self._set_learning(False)\n",
        "                pass\n"),
    ("gradients are not cleared", ROLES, HAND,
        "        self.optimizer.zero_grad(set_to_none=True)\n",
        ""),
    ("IDA on half of the parameters", ROLES, HAND,
        "ida_update(list(self.parameters.values()), list(other",
        "ida_update(list(self.parameters.values())[:1], list(other"),
    ("no clipping", ROLES, STEP,
        "(norm / self.max_grad_norm).clamp(min=1)",
        "torch.ones_like(norm)"),
    ("a step that is not finite is taken", ROLES, STEP,
        "(~finite).float()",
        "torch.zeros_like(norm)"),
    # Roles of several processes
    ("DDP: gradients are never averaged", ROLES, f"{MODES}[flux-ddp]",
        "self._gradients_stay_here(self._turns % self.accumulation > 0)",
        "self._gradients_stay_here(True)"),
    ("FSDP2: IDA moves shards while gathered weights stay", ROLES, f"{AT_ONCE}[fsdp2]",
        "    def align_with(self, other, decay):\n        self._free_gathered()\n",
        "    def align_with(self, other, decay):\n"),
    ("FSDP2: each process clips by the norm of its own part", ROLES, f"{AT_ONCE}[fsdp2]",
        "self._whole(torch.nn.utils.get_total_norm(gradients))",
        "torch.nn.utils.get_total_norm([getattr(gradient, '_local_tensor', gradient) for gradient in gradients])"),
    ("ZeRO: IDA moves the network and not the masters", ROLES, f"{MODES}[flux-zero2]",
        "        ida_update(self._masters(), other._masters(), decay)\n        self._fill_network()\n",
        "        super().align_with(other, decay)\n"),
    # Roles over one base
    ("adapters: one for both", LORA, f"{ONE_BASE}[sd3]",
        "return student, copy_sharing_base(student, base)",
        "return student, student"),
    ("adapters: a base for each", LORA, f"{ONE_BASE}[sd3]",
        "return copy.deepcopy(network, {id(tensor): tensor for tensor in shared})",
        "return copy.deepcopy(network)"),
    ("adapters: under FSDP2 shards of the base for each", ROLES, ONE_PART,
        "share_base(self.module, self._base)",
        "pass"),
]
# fmt: on


def mutated(mutant: tuple) -> str:
    """The text of the mutant's file with it applied."""
    name, file, _, *edits = mutant
    text = (ROOT / file).read_text()
    for old, new in zip(edits[::2], edits[1::2]):
        if text.count(old) != 1:
            print(
                f'error: mutant "{name}": occurs {text.count(old)} times in {file}, not once:\n{old}', file=sys.stderr
            )
            sys.exit(2)
        text = text.replace(old, new)
    return text


def run(tests: list[str], mutant: tuple | None = None) -> subprocess.CompletedProcess:
    """pytest in a copy of the repository."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, "copy")
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".*", "__pycache__", "out", "outputs"))
        if mutant:
            (copy / mutant[1]).write_text(mutated(mutant))
        command = [
            "timeout",
            "300" if mutant else "3600",
            sys.executable,
            "-m",
            "pytest",
            "-x",
            "-p",
            "no:cacheprovider",
        ]
        return subprocess.run([*command, *tests], cwd=copy, capture_output=True, text=True)


def caught(mutant: tuple) -> bool:
    done = run([mutant[2]], mutant)
    verdict = {0: "SURVIVED", 1: "caught"}.get(done.returncode, f"ERROR: pytest ended with {done.returncode}")
    first = next((line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))), "")
    print(f"{verdict:8s}  {mutant[0]}  {first.split('::')[-1].split(' - ')[0]}", flush=True)
    return done.returncode == 1


def main() -> int:
    chosen = [mutant for mutant in MUTANTS if not sys.argv[1:] or any(part in mutant[0] for part in sys.argv[1:])]
    for mutant in chosen:  # all of them must fit before the first runs
        mutated(mutant)
    clean = run(sorted({mutant[2] for mutant in chosen}))
    if clean.returncode:
        print(f"{clean.stdout}{clean.stderr}\nerror: the tests fail without any mutant", file=sys.stderr)
        return 2
    with ThreadPoolExecutor(int(os.environ.get("MUTANT_JOBS", "2"))) as pool:
        count = sum(pool.map(caught, chosen))
    print(f"caught {count}/{len(chosen)}")
    return 0 if count == len(chosen) else 1


if __name__ == "__main__":
    sys.exit(main())
