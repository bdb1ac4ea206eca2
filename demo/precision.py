#!/usr/bin/env python
# Copyright 2026 The SenseFlow-scripts authors. Licensed under the Apache License, Version 2.0.
"""What bf16 does to the direction of L_DMD's gradient, and to the student's rollouts, against fp32; on a CPU.

    OMP_NUM_THREADS=1 python benchmarks/precision.py    # the tables of RESULTS.md

Two teachers that were trained, benchmarks/sdxl.py's and the demo's, with student and fake score of a short run, and a tiny SD 3.5
with random weights, whose fake score is the teacher with noise on its weights. Text embeddings are rounded to bf16 everywhere.
"""

import copy
import sys
from functools import partial
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import sdxl as benchmark
import torch
from run import TRAINING_FLAGS, flags
from scenes import all_captions
from torch.utils._pytree import tree_map

import train_senseflow_flux
import train_senseflow_sd3
import train_senseflow_sdxl
from senseflow.errors import quiet_libraries
from senseflow.training.runtime import Runtime
from senseflow_utils import StatelessRNG, backward_simulation, dmd_loss
from tiny_pipelines import write_sd3


OUT = benchmark.OUT.parent / "precision"
LEVELS = (20, 100, 250, 500, 750, 900, 980)  # t'
CAPTIONS = all_captions()[::2]  # a sample each
DRAWS, SLOTS = StatelessRNG(0, 0), range(len(CAPTIONS))
# Of SD 3.5: (noise on the fake score's weights, in units of each tensor's root mean square; guidance).
PERTURBED = ((0.003, 5.0), (0.003, 1.0), (0.01, 1.0), (0.03, 1.0))
# name: (precision of the teacher, of the fake score). "autocast" has fp32 weights, "bf16" has not.
CASES = {
    "teacher bf16, fake score autocast": ("bf16", "autocast"),
    "teacher bf16, fake score fp32": ("bf16", "fp32"),
    "both autocast": ("autocast", "autocast"),
    "teacher fp32, fake score autocast": ("fp32", "autocast"),
}


class FrozenRole:
    """What a prediction needs of a senseflow.training.roles.Role, in the precision "fp32", "bf16" or "autocast"."""

    def __init__(self, module, precision):
        self.dtype = torch.float32 if precision == "fp32" else torch.bfloat16
        self.module = copy.deepcopy(module).to(torch.bfloat16 if precision == "bf16" else torch.float32)
        self.autocast = partial(torch.autocast, "cpu", torch.bfloat16, enabled=precision == "autocast")

    def __call__(self, return_dict=False, **inputs):
        for name in {"encoder_hidden_states", "pooled_projections", "added_cond_kwargs"} & set(inputs):
            inputs[name] = tree_map(lambda text: text.bfloat16().to(self.dtype), inputs[name])
        with self.autocast():
            return self.module(**inputs, return_dict=return_dict)


def load(script, teacher, settings, iterations=0):
    """(args, schedule, parts) of a training script, all in fp32; student and fake score after a run of so many iterations."""
    prompts, run = OUT / "prompts.txt", OUT / script.__name__
    prompts.write_text("\n".join(all_captions()) + "\n")
    settings = {**settings, "pretrained_model_name_or_path": teacher, "prompts_file": prompts, "output_dir": run}
    settings |= {"max_train_steps": max(1, iterations), "checkpointing_steps": max(1, iterations), "report_to": "none"}
    arguments = list(map(str, flags(settings)))
    if iterations and not (run / f"checkpoint-{iterations}").exists():
        script.main(arguments)
    args = script.parse_args(arguments)
    script.check_args(args)  # completes them, too
    schedule = script.make_schedule(args, "cpu")[0]
    models = script.load_parts(args, Runtime(args), schedule)[0]
    for role in (models.student, models.fake_score) if iterations else ():
        role.load(run / f"checkpoint-{iterations}")
    return args, schedule, models


@torch.no_grad()
def rollouts(args, schedule, models, precision):
    """(x_t at the last anchor, x0 of every anchor [anchors, B, ...]) of the student's own rollouts in this precision."""
    predict = partial(
        models.predict, FrozenRole(models.student.module, precision), condition=models.encode_prompts(CAPTIONS)
    )
    noise, x0 = DRAWS.normal("input_noise", SLOTS, models.latent_shape), []
    for steps, anchor in enumerate(schedule.anchors):
        x_t = backward_simulation(predict, schedule, args.sampler, DRAWS, SLOTS, noise, steps)
        x0.append(predict(x_t, anchor.expand(len(SLOTS))).x0)
    return x_t, torch.stack(x0)


def gradients(schedule, models, precisions, x0, guidance):
    """L_DMD's gradient at the student's x0 for every one of LEVELS, flat [B, numbers], both scores in these precisions."""
    teacher, fake = (
        FrozenRole(models.teacher.module, precisions[0]),
        FrozenRole(models.fake_score.module, precisions[1]),
    )
    condition, scales = models.encode_prompts(CAPTIONS), torch.full((len(SLOTS),), guidance)
    x0, found = x0.clone().requires_grad_(), []
    for wanted in LEVELS:
        t = schedule.train_timesteps[(schedule.train_timesteps - wanted).abs().argmin()].expand(len(SLOTS))
        with torch.no_grad():
            noised = schedule.add_noise(x0, DRAWS.normal("dmd_noise", SLOTS, models.latent_shape), t)
            fake_x0 = models.predict(fake, noised, t, condition).x0
            teacher_x0 = models.predict(teacher, noised, t, condition, scales).x0
        found.append(torch.autograd.grad(dmd_loss(x0, fake_x0, teacher_x0)[0] * x0.numel(), x0)[0].flatten(1))
    return found


def report_gradients(name, args, schedule, models, guidance):
    """Prints the rows of one teacher and guidance: cosines with the gradient in fp32, and that one's root mean square."""
    every, index = rollouts(args, schedule, models, "fp32")[1], torch.arange(len(SLOTS))
    x0 = every[index % len(every), index]  # of the anchors in turn
    exact = gradients(schedule, models, ("fp32", "fp32"), x0, guidance)
    for case, precisions in CASES.items():
        cosines = list(map(torch.cosine_similarity, gradients(schedule, models, precisions, x0, guidance), exact))
        cells = [f"{cosine.mean():.4f}" for cosine in cosines] + [f"{torch.cat(cosines).min():.4f}"]
        print(
            f"| {name} | {torch.stack(exact).square().mean().sqrt():.3f} | {case} | " + " | ".join(cells) + " |",
            flush=True,
        )


def report_rollouts(name, args, schedule, models):
    """Prints one row: relative error of the student's rollouts against fp32."""
    exact, *others = (rollouts(args, schedule, models, precision) for precision in ("fp32", "autocast", "bf16"))
    pairs = [pair for x_t, x0 in others for pair in ((x_t, exact[0]), (x0[-1], exact[1][-1]))]
    print(f"| {name} | " + " | ".join(f"{(a - b).norm() / b.norm():.2%}" for a, b in pairs) + " |")


def main():
    quiet_libraries()
    write_sd3(OUT / "sd3")
    epsilon = load(train_senseflow_sdxl, benchmark.TEACHER, benchmark.STUDENT, 150)
    flux = load(train_senseflow_flux, benchmark.DEMO / "teacher", TRAINING_FLAGS[2], 60)
    sd3 = load(train_senseflow_sd3, OUT / "sd3", {"resolution": 64, "gan_weight": 0, "backward_simulation_prob": 1})
    exact = copy.deepcopy(sd3[2].fake_score.module.state_dict())
    print("| teacher, guidance | size | precision | " + " | ".join(f"t' {t}" for t in LEVELS) + " | worst sample |")
    print("|---" * (len(LEVELS) + 4) + "|")
    for guidance in (2.0, 8.0):  # the run's, the release's
        report_gradients(f"epsilon, {guidance:g}", *epsilon, guidance)
    report_gradients("FLUX, 1.7", *flux, 1.7)
    for size, guidance in PERTURBED:
        torch.manual_seed(0)
        for key, weight in sd3[2].fake_score.parameters.items():
            weight.data = exact[key] + size * exact[key].square().mean().sqrt() * torch.randn_like(weight)
        report_gradients(f"SD 3.5, weights {size:.1%} off, {guidance:g}", *sd3, guidance)
    print("\n| student | x_t, autocast | x0, autocast | x_t, bf16 weights | x0, bf16 weights |\n" + "|---" * 5 + "|")
    for name, loaded in (("epsilon", epsilon), ("FLUX", flux), ("SD 3.5", sd3)):
        report_rollouts(f"{name}, {len(loaded[1].anchors)} anchors", *loaded)


if __name__ == "__main__":
    main()
