#!/usr/bin/env python
# Copyright 2026 The SenseFlow-scripts authors. Licensed under the Apache License, Version 2.0.
"""SenseFlow on a teacher whose answer is known: a Gaussian mixture, whose velocity and score are formulas at every noise level.

    python benchmarks/toy.py --seeds 3

The iteration is the training script's own (`train_iteration`), with its losses, schedules, roles, optimizers and draws; this
file brings only the teacher, two small MLPs and the ruler. A "image" is a set of independent vectors of one class, so that
the normalizer of L_DMD is a mean over many numbers, as it is over an image, and few draws feed many vectors. Distances between
samples are energy distances, so that the student's start (the undistilled network at 4 steps) and the floor (exact samples
against exact samples) have one unit.
"""

import argparse
import copy
import math
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Callable, Optional


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from diffusers import DDPMScheduler

from senseflow.training.roles import Role
from senseflow.training.runtime import Runtime
from senseflow_utils import (
    SAMPLERS,
    DDPMSchedule,
    FlowSchedule,
    Prediction,
    Schedule,
    StatelessRNG,
    backward_simulation,
    guide,
)
from train_senseflow_flux import TrainingModels, train_iteration


EMPTY = -1  # the empty prompt, as a class
POINTS = 8  # vectors in an image
FAMILIES = ("flow", "epsilon")
ANCHORS = {"flow": (1000.0, 904.5, 759.5, 512.8), "epsilon": (999.0, 749.0, 499.0, 249.0)}


# ---------------------------------------------------------------------------------------------------------------------
# The teacher and its world
# ---------------------------------------------------------------------------------------------------------------------
def make_schedule(family: str, anchors: Optional[tuple] = None) -> Schedule:
    """The flow has FLUX's table, anchors and draws, epsilon has SDXL's."""
    anchors = anchors or ANCHORS[family]
    if family == "flow":
        return FlowSchedule(torch.arange(1, 1001), anchors)
    ddpm = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    return DDPMSchedule(ddpm.alphas_cumprod, torch.arange(1000), anchors, dmd_range=(20, 980), fake_range=(0, 999))


class Mixture(torch.nn.Module):
    """Isotropic Gaussians N(means[k], spread^2), mode k in class `classes[k]`; called, it is the exact network of its family.

    An image is POINTS independent vectors of its class, x0 (B, POINTS, D).

    Args:
        means: (K, D); the modes of a class weigh the same, and so do the classes.
        classes: (K,) integers.
        empty_mean: (D,) or None. Given, the empty prompt means N(empty_mean, spread^2) instead of all the modes together.
    """

    def __init__(self, schedule: Schedule, means: torch.Tensor, classes: torch.Tensor, spread: float, empty_mean=None):
        super().__init__()
        self.schedule, self.spread, self.num_classes = schedule, spread, int(classes.max()) + 1
        if empty_mean is not None:
            means, classes = torch.cat([means, empty_mean[None]]), torch.cat([classes, torch.tensor([EMPTY])])
        self.shape = (POINTS, means.shape[1])
        self.register_buffer("means", means)
        self.register_buffer("classes", classes)

    def forward(self, x_t: torch.Tensor, t: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        """Velocity or epsilon at x_t (B, POINTS, D), t (B,), class (B,).

        With var = alpha^2 spread^2 + sigma^2: E[x0 | x_t] = sum_k w_k (mu_k + alpha spread^2 / var (x_t - alpha mu_k)) and
        E[noise | x_t] = sigma / var sum_k w_k (x_t - alpha mu_k), w = softmax_k(-|x_t - alpha mu_k|^2 / 2 var).
        """
        alpha, sigma = (level.float().view(-1, 1, 1) for level in self.schedule.levels(t))
        variance = alpha**2 * self.spread**2 + sigma**2
        scaled = alpha * self.means
        # |x - m|^2 without its |x|^2, which the softmax over the modes does not see.
        logits = (x_t @ scaled.mT - 0.5 * scaled.square().sum(-1)[:, None]) / variance
        own = self.classes == condition[:, None]
        everything = ~own.any(1, keepdim=True)
        weights = logits.masked_fill(~(own | everything)[:, None], -math.inf).softmax(-1)
        mean = weights @ self.means
        offset = x_t - alpha * mean
        return self.schedule.target(mean + alpha * self.spread**2 / variance * offset, sigma / variance * offset)

    def sample(self, condition: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Exact x0 (B, POINTS, D) of the classes (B,)."""
        own = (self.classes == condition[:, None]).float()
        index = torch.multinomial(own, POINTS, replacement=True, generator=generator)
        return self.means[index] + self.spread * torch.randn(len(condition), *self.shape, generator=generator)


def make_mixture(
    schedule: Schedule, dim: int = 32, modes: int = 8, classes: int = 2, spread: float = 0.35, scale: float = 0.7
) -> Mixture:
    """`modes` random means, N(0, scale^2) in each coordinate, dealt to the classes in turn."""
    means = scale * torch.randn(modes, dim, generator=torch.Generator().manual_seed(1))
    return Mixture(schedule, means, torch.arange(modes) % classes, spread)


# ---------------------------------------------------------------------------------------------------------------------
# The networks that learn
# ---------------------------------------------------------------------------------------------------------------------
class MLP(torch.nn.Module):
    """Velocity or epsilon from x_t, Fourier features of the noise level and a class embedding.

    An epsilon network divides its error by alpha on the way to x0 (15-fold at SDXL's top anchor). It therefore returns
    sigma x_t + alpha v with the MLP's own v, so that x0 = alpha x_t - sigma v as well conditioned as a flow's x_t - sigma v.
    """

    def __init__(self, schedule: Schedule, dim: int, classes: int, width: int):
        super().__init__()
        self.schedule = schedule
        self.register_buffer("frequencies", math.pi * 2.0 ** torch.arange(-1, 3), persistent=False)
        self.embedding = torch.nn.Embedding(classes, width)
        self.level = torch.nn.Linear(2 * len(self.frequencies), width)
        self.enter = torch.nn.Linear(dim, width)
        self.hidden = torch.nn.ModuleList(torch.nn.Linear(width, width) for _ in range(2))
        self.leave = torch.nn.Linear(width, dim)

    def forward(self, x_t: torch.Tensor, t: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        phase = (t / 1000).float()[:, None] * self.frequencies
        h = (
            self.enter(x_t)
            + (self.level(torch.cat([phase.sin(), phase.cos()], 1)) + self.embedding(condition))[:, None]
        )
        for layer in self.hidden:
            h = layer(torch.nn.functional.silu(h))
        output = self.leave(torch.nn.functional.silu(h))
        if isinstance(self.schedule, FlowSchedule):
            return output
        alpha, sigma = (level.float().view(-1, 1, 1) for level in self.schedule.levels(t))
        return sigma * x_t + alpha * output


def start_from(teacher: Mixture, width: int = 128, steps: int = 1000, batch: int = 64, seed: int = 0) -> MLP:
    """A network that has learned the teacher's outputs: what student and fake score start from, as from a teacher's weights."""
    schedule = teacher.schedule
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    network = MLP(schedule, teacher.shape[-1], teacher.num_classes, width)
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=0.0)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        condition = torch.randint(teacher.num_classes, (batch,), generator=generator)
        x0 = teacher.sample(condition, generator)
        t = schedule.train_timesteps[torch.randint(len(schedule.train_timesteps), (batch,), generator=generator)]
        x_t = schedule.add_noise(x0, torch.randn(x0.shape, generator=generator), t)
        loss = (network(x_t, t, condition) - teacher(x_t, t, condition)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay.step()
    return network


# ---------------------------------------------------------------------------------------------------------------------
# Distillation: the script's own iteration
# ---------------------------------------------------------------------------------------------------------------------
def make_args(**changes) -> SimpleNamespace:
    """The training script's flags that the iteration and the runtime read; plain DMD with backward simulation."""
    args = {
        "seed": 0,
        "max_train_steps": 1000,
        "train_batch_size": 64,
        "gradient_accumulation_steps": 1,
        "ttur_ratio": 2,
        "sampler": "stochastic",
        "backward_simulation_prob": 1.0,
        "dmd_guidance_scale": [1.0, 1.0],
        "isg_guidance_scale": [1.0, 1.0],
        "isg_weight": 0.0,
        "isg_margin": 20,
        "ida_decay": 1.0,
        "gan_weight": 0.0,
        "learning_rate": 1e-3,
        "learning_rate_fake": 1e-3,
        "lr_scheduler": "cosine",
        "lr_warmup_steps": 0,
        "lr_warmup_start_factor": 0.0,
        "adam_beta1": 0.0,
        "adam_beta2": 0.99,
        "adam_epsilon": 1e-8,
        "adam_weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "use_8bit_adam": False,
        "rank": 0,
        "base_quantization": "none",
        "mixed_precision": "no",
        "allow_tf32": False,
        "report_to": "none",
        "output_dir": tempfile.gettempdir(),
        "logging_dir": "logs",
    }
    unknown = sorted(set(changes) - set(args))
    if unknown:
        raise ValueError(f"no such flags: {unknown}")
    return SimpleNamespace(**{**args, **changes})


def toy_predict(schedule: Schedule, role: Role, x_t, t, condition, guidance=None) -> Prediction:
    """As flux_predict, for x_t (B, POINTS, D) and classes (B,)."""
    output = role(x_t, t, condition)
    if guidance is not None and guidance.above_one:
        output = guide(role(x_t, t, torch.full_like(condition, EMPTY)), output, guidance.scale)
    return schedule.as_prediction(x_t, output, t)


def make_parts(args, teacher: Mixture, network: torch.nn.Module) -> TrainingModels:
    """Roles of a Runtime, and the toy's prompts ("0", "1", ...) and images (exact samples, no VAE)."""
    runtime = Runtime(args)
    return TrainingModels(
        student=runtime.trained_role("student", copy.deepcopy(network), args.learning_rate, args.ttur_ratio),
        teacher=runtime.frozen_role("teacher", teacher),
        fake_score=runtime.trained_role("fake_score", copy.deepcopy(network), args.learning_rate_fake),
        discriminator=None,
        predict=partial(toy_predict, teacher.schedule),
        encode_prompts=lambda prompts: torch.tensor([int(prompt) for prompt in prompts]),
        real_latents=lambda batch, rows, rng: batch["pixel_values"][rows],
        latent_shape=teacher.shape,
    )


def make_batch(args, teacher: Mixture, iteration: int) -> dict:
    """As a senseflow.data.loader.PromptImageLoader's: slots, prompts and real images, a class per slot."""
    generator = StatelessRNG(args.seed, iteration).generator("data")
    condition = torch.randint(teacher.num_classes, (args.train_batch_size,), generator=generator)
    return {
        "sample_indices": list(range(args.train_batch_size)),
        "prompts": [str(c) for c in condition.tolist()],
        "pixel_values": teacher.sample(condition, generator),
    }


def distil(args, teacher: Mixture, network: torch.nn.Module, watch: Optional[Callable] = None) -> TrainingModels:
    """Runs `args.max_train_steps` iterations; `watch(iteration, parts, values)` looks on after each."""
    models = make_parts(args, teacher, network)
    for iteration in range(args.max_train_steps):
        batch = make_batch(args, teacher, iteration)
        values, _ = train_iteration(iteration, [batch], models, teacher.schedule, args, "cpu")
        if watch:
            watch(iteration + 1, models, values)
    return models


# ---------------------------------------------------------------------------------------------------------------------
# The ruler
# ---------------------------------------------------------------------------------------------------------------------
@torch.no_grad()
def few_step_samples(network, teacher: Mixture, condition: torch.Tensor, sampler: str, seed: int) -> torch.Tensor:
    """x0 (B, POINTS, D) of a student at its anchors, by the path that backward simulation takes, and the last prediction."""
    schedule, sample_indices = teacher.schedule, range(len(condition))
    rng, last = StatelessRNG(seed, 0), len(schedule.anchors) - 1

    def predict(x_t, t):
        return schedule.as_prediction(x_t, network(x_t, t, condition), t)

    noise = rng.normal("input_noise", sample_indices, teacher.shape)
    x_t = backward_simulation(predict, schedule, sampler, rng, sample_indices, noise, last)
    return predict(x_t, schedule.anchors[last].expand(len(sample_indices))).x0


def energy_distance(x: torch.Tensor, y: torch.Tensor) -> float:
    """2 E|X - Y| - E|X - X'| - E|Y - Y'| of two samples (N, D), (M, D), self-pairs included (hence a floor above 0)."""
    return (2 * torch.cdist(x, y).mean() - torch.cdist(x, x).mean() - torch.cdist(y, y).mean()).item()


def measure(samples: torch.Tensor, condition: torch.Tensor, teacher: Mixture, exact: torch.Tensor) -> dict:
    """Compares the points of samples (B, POINTS, D) of classes (B,) with those of `exact`, class by class.

    Returns:
        distance: mean over the classes of the energy distance; weights: (K,) share of each mode within its class, in units of
        the true share; spread: standard deviation per coordinate about the nearest mode of the own class.
    """
    samples, exact, condition = samples.flatten(0, 1), exact.flatten(0, 1), condition.repeat_interleave(POINTS)
    away = torch.cdist(samples, teacher.means).square().masked_fill(teacher.classes != condition[:, None], math.inf)
    nearest = away.argmin(1)
    shares = torch.bincount(nearest, minlength=len(teacher.means)) / torch.bincount(condition)[teacher.classes]
    own = torch.bincount(teacher.classes)[teacher.classes]
    per_class = [energy_distance(samples[condition == c], exact[condition == c]) for c in range(teacher.num_classes)]
    return {
        "distance": sum(per_class) / len(per_class),
        "weights": shares * own,
        "spread": (away.min(1).values.mean() / samples.shape[1]).sqrt().item(),
    }


class Ruler:
    """Exact samples to measure against, the floor among them, and the undistilled start."""

    def __init__(self, teacher: Mixture, network: torch.nn.Module, sampler: str = "stochastic", images: int = 500):
        generator = torch.Generator().manual_seed(1234)
        self.teacher, self.sampler = teacher, sampler
        self.condition = torch.arange(images) % teacher.num_classes
        self.exact = teacher.sample(self.condition, generator)
        self.floor = measure(teacher.sample(self.condition, generator), self.condition, teacher, self.exact)
        self.start = self(network)

    def __call__(self, network: torch.nn.Module) -> dict:
        """`measure` of a network's few-step samples, and `closed`: which part of the way from start to floor is gone."""
        samples = few_step_samples(network, self.teacher, self.condition, self.sampler, seed=99)
        found = measure(samples, self.condition, self.teacher, self.exact)
        start = getattr(self, "start", found)["distance"]
        return {**found, "closed": (start - found["distance"]) / max(start - self.floor["distance"], 1e-12)}


# ---------------------------------------------------------------------------------------------------------------------
# The long run
# ---------------------------------------------------------------------------------------------------------------------
SETTINGS = {
    "DMD": {},
    "DMD + IDA .97": {"ida_decay": 0.97},
    "DMD + ISG .5": {"isg_weight": 0.5},
    "DMD + ISG .5 + IDA .97": {"isg_weight": 0.5, "ida_decay": 0.97},
    "DMD + ISG .5, real latents": {"isg_weight": 0.5, "backward_simulation_prob": 0.0},
    "DMD + ISG .5, Euler": {"isg_weight": 0.5, "sampler": "euler"},
}
SHOWN = "DMD + ISG .5"  # the setting whose samples are drawn


def run_settings(family: str, seed: int, iterations: int, every: int) -> dict:
    """All settings from one start.

    Returns:
        {setting: {"curve": [(iteration, distance)], "found": what Ruler says, "seconds": of CPU, "student": network}}, and
        "ruler" and "start", the undistilled network.
    """
    teacher = make_mixture(make_schedule(family))
    network = start_from(teacher, seed=seed)
    rulers = {sampler: Ruler(teacher, network, sampler) for sampler in SAMPLERS}
    results = {"ruler": rulers["stochastic"], "start": network}
    for name, flags in SETTINGS.items():
        args = make_args(seed=seed, max_train_steps=iterations, **flags)
        ruler, curve = rulers[args.sampler], [(0, rulers[args.sampler].start["distance"])]

        def watch(iteration, models, values, ruler=ruler, curve=curve):
            if iteration % every == 0:
                curve.append((iteration, ruler(models.student.module)["distance"]))

        since = time.process_time()
        models = distil(args, teacher, network, watch)
        seconds = time.process_time() - since
        found = ruler(models.student.module)
        results[name] = {"curve": curve, "found": found, "seconds": seconds, "student": models.student.module}
        print(
            f"{family}, seed {seed}, {name}: distance {found['distance']:.4f}, {found['closed']:.1%} closed",
            file=sys.stderr,
        )
    return results


def table(results: dict) -> str:
    """Markdown: mean over the seeds, and the worst seed where it says so; results[family][seed] as `run_settings` makes them."""
    lines = [
        "| family | setting | distance | gap closed | worst seed | mode weights (true 1) | spread (true 1) | CPU s |",
        "|---|---|---|---|---|---|---|---|",
    ]

    def row(family, name, found, closed, seconds):
        count = len(found)
        weights = torch.stack([one["weights"] for one in found])
        cells = [
            family,
            name,
            f"{sum(one['distance'] for one in found) / count:.4f}",
            f"{sum(closed) / count:.1%}" if closed else "",
            f"{min(closed):.1%}" if closed else "",
            f"{weights.min():.2f} .. {weights.max():.2f}",
            f"{sum(one['spread'] for one in found) / count:.2f}",
            f"{sum(seconds) / count:.0f}" if seconds else "",
        ]
        lines.append("| " + " | ".join(cells) + " |")

    for family, runs in results.items():
        rulers = [run["ruler"] for run in runs]
        spread = rulers[0].teacher.spread

        def relative(found, spread=spread):
            return {**found, "spread": found["spread"] / spread}

        row(family, "floor: exact samples", [relative(ruler.floor) for ruler in rulers], [], [])
        row(family, "start: undistilled, 4 steps", [relative(ruler.start) for ruler in rulers], [], [])
        for name in SETTINGS:
            of_setting = [run[name] for run in runs]
            found = [relative(one["found"]) for one in of_setting]
            row(family, name, found, [one["closed"] for one in found], [one["seconds"] for one in of_setting])
    return "\n".join(lines)


def plot(results: dict, path: Path) -> None:
    """Distances over the iterations, a line per setting with its range over the seeds; below, samples on two principal axes."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure = plt.figure(figsize=(12, 8), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=(1.2, 1))
    for axes, (family, runs) in zip(above.subplots(1, len(results), squeeze=False)[0], results.items()):
        for name in SETTINGS:
            steps = [step for step, _ in runs[0][name]["curve"]]
            distances = torch.tensor([[distance for _, distance in run[name]["curve"]] for run in runs])
            (line,) = axes.plot(steps, distances.mean(0), label=name)
            axes.fill_between(
                steps, distances.min(0).values, distances.max(0).values, color=line.get_color(), alpha=0.12
            )
        axes.axhline(runs[0]["ruler"].floor["distance"], color="black", linestyle=":", label="floor: exact samples")
        axes.set(
            yscale="log", title=f"{family}, {len(runs)} seeds", xlabel="iteration", ylabel="energy distance, 4 steps"
        )
    axes.legend(fontsize=8)

    family, runs = next(iter(results.items()))
    ruler, teacher = runs[0]["ruler"], runs[0]["ruler"].teacher
    students = {"undistilled, 4 steps": runs[0]["start"], f"{SHOWN}, 4 steps": runs[0][SHOWN]["student"]}
    clouds = {"exact samples": ruler.exact}
    for title, network in students.items():
        clouds[title] = few_step_samples(network, teacher, ruler.condition, "stochastic", seed=7)
    directions = torch.pca_lowrank(teacher.means, q=2)[2]
    for axes, (title, cloud) in zip(below.subplots(1, 3, sharex=True, sharey=True), clouds.items()):
        for c in range(teacher.num_classes):
            points = (cloud[ruler.condition == c].flatten(0, 1)[:1000] @ directions).numpy()
            axes.scatter(points[:, 0], points[:, 1], s=3, alpha=0.4, label=f"class {c}")
        axes.set_title(f"{family}: {title}")
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=100)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--iterations", type=int, default=1000)
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=FAMILIES)
    parser.add_argument("--plot", type=Path, default=Path(__file__).with_name("toy.png"))
    args = parser.parse_args()
    torch.set_num_threads(1)  # the matrices are small
    every = max(1, args.iterations // 15)
    results = {
        family: [run_settings(family, seed, args.iterations, every) for seed in range(args.seeds)]
        for family in args.families
    }
    print(table(results))
    plot(results, args.plot)


if __name__ == "__main__":
    main()
