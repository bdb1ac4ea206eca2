#!/usr/bin/env python
# Copyright 2026 The SenseFlow-scripts authors. Licensed under the Apache License, Version 2.0.
"""Compare bf16 with fp32 in the direction of L_DMD's gradient and in the student's rollouts, on a CPU.

    OMP_NUM_THREADS=1 python demo/precision.py    # the tables of benchmarks/RESULTS.md

Two teachers are trained, those of demo/sdxl.py and of the demo, with student and fake score of a short run. The third
is a tiny SD 3.5 with random weights, whose fake score is the teacher with noise on its weights. Text embeddings are
bf16 in every precision.
"""

import copy
import subprocess
import sys
from functools import partial

import sdxl
import torch
from run import HERE, ROOT, TRAINING_FLAGS, flags
from scenes import all_captions
from torch.utils._pytree import tree_map

import train_senseflow_flux
import train_senseflow_sd3
import train_senseflow_sdxl
from senseflow.errors import quiet_libraries
from senseflow.training.runtime import Runtime
from senseflow_utils import Guidance, StatelessRNG, backward_simulation, dmd_loss


OUT = HERE / "out" / "precision"
LEVELS = (20, 100, 250, 500, 750, 900, 980)  # t'
CAPTIONS = all_captions()[::2]  # of the samples
RNG, SAMPLE_INDICES = StatelessRNG(0, 0), range(len(CAPTIONS))
# For SD 3.5: (noise on the fake score's weights, relative to the root mean square of each tensor; guidance)
PERTURBATIONS = ((0.003, 5.0), (0.003, 1.0), (0.01, 1.0), (0.03, 1.0))
# {name: (precision of the teacher, of the fake score)}; "autocast" has fp32 weights, "bf16" has bf16 weights
CASES = {
    "teacher bf16, fake score autocast": ("bf16", "autocast"),
    "teacher bf16, fake score fp32": ("bf16", "fp32"),
    "both autocast": ("autocast", "autocast"),
    "teacher fp32, fake score autocast": ("fp32", "autocast"),
}


class FrozenNetwork:
    """A copy of a role's module in the precision "fp32", "bf16" or "autocast", which `predict` calls as a role."""

    def __init__(self, module, precision):
        self.dtype = torch.float32 if precision == "fp32" else torch.bfloat16
        self.module = copy.deepcopy(module).to(torch.bfloat16 if precision == "bf16" else torch.float32)
        self.autocast = partial(torch.autocast, "cpu", torch.bfloat16, enabled=precision == "autocast")

    def __call__(self, return_dict=False, **inputs):
        for name in {"encoder_hidden_states", "pooled_projections", "added_cond_kwargs"} & set(inputs):
            inputs[name] = tree_map(lambda text: text.bfloat16().to(self.dtype), inputs[name])
        with self.autocast():
            return self.module(**inputs, return_dict=return_dict)


def load(script, models_class, teacher, settings, iterations=0):
    """Return (args, schedule, models) of a training script in fp32, after a run of `iterations` if that is not 0."""
    prompts, run = OUT / "prompts.txt", OUT / script.__name__
    prompts.write_text("\n".join(all_captions()) + "\n")
    settings = {**settings, "pretrained_model_name_or_path": teacher, "prompts_file": prompts, "output_dir": run}
    settings |= {"max_train_steps": max(1, iterations), "checkpointing_steps": max(1, iterations), "report_to": "none"}
    arguments = list(map(str, flags(settings)))
    if iterations and not (run / f"checkpoint-{iterations}").exists():
        script.main(arguments)
    args = script.parse_args([*arguments, "--output_dir", str(OUT / "not_written")])
    source, _ = script.prepare(models_class, args)
    schedule = models_class.make_schedule(args, source, "cpu")[0]
    models = script.make_models(models_class, args, source, schedule, Runtime(args))
    for role in (models.student, models.fake_score) if iterations else ():
        role.load(run / f"checkpoint-{iterations}")
    return args, schedule, models


@torch.no_grad()
def rollouts(args, schedule, models, precision):
    """Return x_t at the last anchor and x0 of every anchor [anchors, B, ...] of the student's rollouts."""
    student, condition = FrozenNetwork(models.student.module, precision), models.encode_prompts(CAPTIONS)
    predict = partial(models.predict, student, condition=condition)
    noise, x0 = RNG.normal("input_noise", SAMPLE_INDICES, models.latent_shape), []
    for steps, anchor in enumerate(schedule.anchors):
        x_t = backward_simulation(predict, schedule, args.sampler, RNG, SAMPLE_INDICES, noise, steps)
        x0.append(predict(x_t, anchor.expand(len(SAMPLE_INDICES))).x0)
    return x_t, torch.stack(x0)


def gradients(schedule, models, precisions, x0, guidance):
    """Return L_DMD's gradient at x0 for each of LEVELS, flat [B, N]; precisions: of the teacher, of the fake score."""
    teacher = FrozenNetwork(models.teacher.module, precisions[0])
    fake_score = FrozenNetwork(models.fake_score.module, precisions[1])
    condition = models.encode_prompts(CAPTIONS)
    guidance = Guidance(torch.full((len(CAPTIONS),), guidance), guidance > 1)
    x0, result = x0.clone().requires_grad_(), []
    for level in LEVELS:
        t = schedule.train_timesteps[(schedule.train_timesteps - level).abs().argmin()].expand(len(CAPTIONS))
        with torch.no_grad():
            x_t = schedule.add_noise(x0, RNG.normal("dmd_noise", SAMPLE_INDICES, models.latent_shape), t)
            fake_x0 = models.predict(fake_score, x_t, t, condition).x0
            teacher_x0 = models.predict(teacher, x_t, t, condition, guidance).x0
        loss = dmd_loss(x0, fake_x0, teacher_x0)[0] * x0.numel()
        result.append(torch.autograd.grad(loss, x0)[0].flatten(1))
    return result


def report_gradients(name, args, schedule, models, guidance):
    """Print the rows of one teacher and guidance: root mean square of the fp32 gradient, and cosines with it."""
    x0, index = rollouts(args, schedule, models, "fp32")[1], torch.arange(len(CAPTIONS))
    x0 = x0[index % len(x0), index]  # the anchors in turn
    exact = gradients(schedule, models, ("fp32", "fp32"), x0, guidance)
    size = torch.stack(exact).square().mean().sqrt()
    for case, precisions in CASES.items():
        cosines = list(map(torch.cosine_similarity, gradients(schedule, models, precisions, x0, guidance), exact))
        cells = [f"{cosine.mean():.4f}" for cosine in cosines] + [f"{torch.cat(cosines).min():.4f}"]
        print(f"| {name} | {size:.3f} | {case} | " + " | ".join(cells) + " |", flush=True)


def report_rollouts(name, args, schedule, models):
    """Print the relative error of the student's rollouts against fp32."""
    exact, *others = (rollouts(args, schedule, models, precision) for precision in ("fp32", "autocast", "bf16"))
    pairs = [pair for x_t, x0 in others for pair in ((x_t, exact[0]), (x0[-1], exact[1][-1]))]
    print(f"| {name} | " + " | ".join(f"{(a - b).norm() / b.norm():.2%}" for a, b in pairs) + " |")


def main():
    quiet_libraries()
    command = [sys.executable, ROOT / "tests" / "tiny_pipelines.py", "sd3", OUT / "sd3"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    epsilon = load(train_senseflow_sdxl, train_senseflow_sdxl.SDXLModels, sdxl.TEACHER, sdxl.STUDENT, 150)
    flux = load(train_senseflow_flux, train_senseflow_flux.FluxModels, HERE / "teacher", TRAINING_FLAGS[2], 60)
    settings = {"resolution": 64, "gan_weight": 0, "backward_simulation_prob": 1}
    sd3 = load(train_senseflow_sd3, train_senseflow_sd3.SD3Models, OUT / "sd3", settings)
    weights = copy.deepcopy(sd3[2].fake_score.module.state_dict())
    print("| teacher, guidance | size | precision | " + " | ".join(f"t' {t}" for t in LEVELS) + " | worst sample |")
    print("|---" * (len(LEVELS) + 4) + "|")
    for guidance in (2.0, 8.0):  # the run's, the release's
        report_gradients(f"epsilon, {guidance:g}", *epsilon, guidance)
    report_gradients("FLUX, 1.7", *flux, 1.7)
    for size, guidance in PERTURBATIONS:
        torch.manual_seed(0)
        for name, parameter in sd3[2].fake_score.parameters.items():
            scale = size * weights[name].square().mean().sqrt()
            parameter.data = weights[name] + scale * torch.randn_like(parameter)
        report_gradients(f"SD 3.5, weights {size:.1%} off, {guidance:g}", *sd3, guidance)
    print("\n| student | x_t, autocast | x0, autocast | x_t, bf16 weights | x0, bf16 weights |\n" + "|---" * 5 + "|")
    for name, loaded in (("epsilon", epsilon), ("FLUX", flux), ("SD 3.5", sd3)):
        report_rollouts(f"{name}, {len(loaded[1].anchors)} anchors", *loaded)


if __name__ == "__main__":
    main()
