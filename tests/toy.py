#!/usr/bin/env python
# Copyright 2026 The SenseFlow-scripts authors. Licensed under the Apache License, Version 2.0.
"""A toy with a known answer: SenseFlow on a Gaussian mixture, whose velocity and epsilon are formulas.

    python tests/toy.py --seeds 3    # prints the table of benchmarks/RESULTS.md and writes benchmarks/toy.png

The losses, schedules, roles, optimizers and random numbers are those of the training scripts: the toy calls
`train_iteration`. This file adds the teacher, two small MLPs and the measurements. An "image" is a set of independent
vectors of one class, so that the normalizer of L_DMD averages over many numbers, as it does for an image. Samples are
compared by their energy distance.
"""

import argparse
import copy
import math
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Callable, Optional

import torch
from diffusers import DDPMScheduler

from senseflow.arguments import SAMPLERS
from senseflow.training.models import TrainingModels
from senseflow.training.runtime import Runtime
from senseflow_utils import (
    DDPMSchedule,
    FlowSchedule,
    Schedule,
    StatelessRNG,
    backward_simulation,
    guide,
)
from train_senseflow_flux import train_iteration


EMPTY = -1  # the class that stands for the empty prompt
POINTS = 8  # vectors in an image
FAMILIES = ("flow", "epsilon")
DDPM_ANCHORS = (999.0, 749.0, 499.0, 249.0)
ANCHORS = {"flow": (1000.0, 904.5, 759.5, 512.8), "epsilon": DDPM_ANCHORS, "v": DDPM_ANCHORS}


# ---------------------------------------------------------------------------------------------------------------------
# The teacher
# ---------------------------------------------------------------------------------------------------------------------
def make_schedule(family: str, anchors: Optional[tuple] = None) -> Schedule:
    """Return FLUX's schedule for "flow" and SDXL's for "epsilon", with these anchors or the four of ANCHORS.

    "v" is that of SDXL's teachers of v-prediction with zero terminal SNR.
    """
    anchors = anchors or ANCHORS[family]
    if family == "flow":
        return FlowSchedule(torch.arange(1, 1001), anchors)
    levels = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    ddpm = DDPMScheduler(**levels, rescale_betas_zero_snr=family == "v")
    kwargs = {"prediction_type": "v_prediction" if family == "v" else "epsilon", "dmd_range": (20, 980)}
    return DDPMSchedule(ddpm.alphas_cumprod, torch.arange(1000), anchors, fake_range=(0, 999), **kwargs)


class Mixture(torch.nn.Module):
    """The exact network of isotropic Gaussians N(means[k], spread^2), of which mode k belongs to class `classes[k]`.

    An image is POINTS independent vectors of its class, x0 (B, POINTS, D).

    Args:
        schedule: decides whether the network predicts velocity, epsilon or v.
        means: (K, D); the modes of a class have equal weights, and so have the classes.
        classes: (K,) integers.
        empty_mean: (D,) or None. The empty prompt stands for N(empty_mean, spread^2), or for all modes together.
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
        """Return velocity or epsilon at x_t (B, POINTS, D), t (B,), class (B,).

        With var = alpha^2 spread^2 + sigma^2: E[x0 | x_t] = sum_k w_k (mu_k + alpha spread^2 / var (x_t - alpha mu_k))
        and E[noise | x_t] = sigma / var sum_k w_k (x_t - alpha mu_k), w = softmax_k(-|x_t - alpha mu_k|^2 / 2 var).
        """
        alpha, sigma = (level.float().view(-1, 1, 1) for level in self.schedule.levels(t))
        variance = alpha**2 * self.spread**2 + sigma**2
        scaled = alpha * self.means
        # |x - m|^2 without |x|^2, which is the same for all modes and cancels in the softmax.
        logits = (x_t @ scaled.mT - 0.5 * scaled.square().sum(-1)[:, None]) / variance
        in_class = self.classes == condition[:, None]
        all_modes = ~in_class.any(1, keepdim=True)
        weights = logits.masked_fill(~(in_class | all_modes)[:, None], -math.inf).softmax(-1)
        mean = weights @ self.means
        offset = x_t - alpha * mean
        return self.schedule.target(mean + alpha * self.spread**2 / variance * offset, sigma / variance * offset, t)

    def sample(self, condition: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Draw exact x0 (B, POINTS, D) of the classes (B,)."""
        in_class = (self.classes == condition[:, None]).float()
        index = torch.multinomial(in_class, POINTS, replacement=True, generator=generator)
        return self.means[index] + self.spread * torch.randn(len(condition), *self.shape, generator=generator)


def make_mixture(
    schedule: Schedule, dim: int = 32, modes: int = 8, classes: int = 2, spread: float = 0.35, scale: float = 0.7
) -> Mixture:
    """Make a mixture of `modes` random means, N(0, scale^2) in each coordinate, assigned to the classes in turn."""
    means = scale * torch.randn(modes, dim, generator=torch.Generator().manual_seed(1))
    return Mixture(schedule, means, torch.arange(modes) % classes, spread)


# ---------------------------------------------------------------------------------------------------------------------
# The trained networks
# ---------------------------------------------------------------------------------------------------------------------
class MLP(torch.nn.Module):
    """Predict velocity or epsilon from x_t, Fourier features of the noise level and a class embedding.

    x0 of an epsilon network has the network's error divided by alpha, 15-fold at SDXL's top anchor. The network
    therefore returns sigma x_t + alpha v with the MLP's output v: x0 = alpha x_t - sigma v is as well conditioned as
    x0 = x_t - sigma v of a flow.
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


def pretrain_mlp(teacher: Mixture, width: int = 128, steps: int = 1000, batch: int = 64, seed: int = 0) -> MLP:
    """Train an MLP on the teacher's outputs: the initial student and fake score."""
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
# Distillation
# ---------------------------------------------------------------------------------------------------------------------
def make_args(**changes) -> SimpleNamespace:
    """Return the flags that `train_iteration` and Runtime read: plain DMD with backward simulation, then `changes`."""
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
        "bf16_weight_copies": False,
        "dry_run": None,
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


class ToyModels(TrainingModels):
    """The mixture as the teacher, two copies of a network to train, prompts "0", "1", ..., and no VAE."""

    def __init__(self, args, teacher: Mixture, network: torch.nn.Module):
        runtime = Runtime(args)
        self.args, self.schedule, self.device, self.latent_shape = args, teacher.schedule, "cpu", teacher.shape
        self.teacher = runtime.frozen_role("teacher", teacher)
        self.student = runtime.trained_role(
            "student", copy.deepcopy(network), args.learning_rate, step_every=args.ttur_ratio
        )
        self.fake_score = runtime.trained_role("fake_score", copy.deepcopy(network), args.learning_rate_fake)
        self.discriminator = None

    def predict(self, role, x_t, t, condition, guidance=None):
        """Predict (x0, noise) at x_t (B, POINTS, D) and t (B,) for classes (B,)."""
        output = role(x_t, t, condition)
        if guidance is not None and guidance.above_one:
            output = guide(role(x_t, t, torch.full_like(condition, EMPTY)), output, guidance.scale)
        return self.schedule.as_prediction(x_t, output, t)

    def x0_shape(self, batch):
        return self.latent_shape

    def condition(self, batch):
        return torch.tensor([int(prompt) for prompt in batch["prompts"]])

    def real_latents(self, batch, rows, rng):
        return batch["pixel_values"][rows]


def make_batch(args, teacher: Mixture, iteration: int) -> dict:
    """Make a batch as the data loader does: sample indices, prompts and real images of random classes."""
    generator = StatelessRNG(args.seed, iteration).generator("data")
    condition = torch.randint(teacher.num_classes, (args.train_batch_size,), generator=generator)
    return {
        "sample_indices": list(range(args.train_batch_size)),
        "prompts": [str(c) for c in condition.tolist()],
        "pixel_values": teacher.sample(condition, generator),
    }


def distill(args, teacher: Mixture, network: torch.nn.Module, callback: Optional[Callable] = None) -> ToyModels:
    """Run `args.max_train_steps` iterations; `callback(iterations done, models, values)` is called after each."""
    models = ToyModels(args, teacher, network)
    for iteration in range(args.max_train_steps):
        batch = make_batch(args, teacher, iteration)
        values, _ = train_iteration(iteration, [batch], models, args)
        if callback:
            callback(iteration + 1, models, values)
    return models


# ---------------------------------------------------------------------------------------------------------------------
# Measurements
# ---------------------------------------------------------------------------------------------------------------------
@torch.no_grad()
def few_step_samples(network, teacher: Mixture, condition: torch.Tensor, sampler: str, seed: int) -> torch.Tensor:
    """Sample x0 (B, POINTS, D) with a student at its anchors, along the path of backward simulation."""
    schedule, sample_indices = teacher.schedule, range(len(condition))
    rng, last = StatelessRNG(seed, 0), len(schedule.anchors) - 1

    def predict(x_t, t):
        return schedule.as_prediction(x_t, network(x_t, t, condition), t)

    noise = rng.normal("input_noise", sample_indices, teacher.shape)
    x_t = backward_simulation(predict, schedule, sampler, rng, sample_indices, noise, last)
    return predict(x_t, schedule.anchors[last].expand(len(sample_indices))).x0


def energy_distance(x: torch.Tensor, y: torch.Tensor) -> float:
    """Compute 2 E|X - Y| - E|X - X'| - E|Y - Y'| of samples (N, D), (M, D).

    Pairs of a sample with itself are included, so that two samples of one distribution are a little above 0 apart.
    """
    return (2 * torch.cdist(x, y).mean() - torch.cdist(x, x).mean() - torch.cdist(y, y).mean()).item()


def measure(samples: torch.Tensor, condition: torch.Tensor, teacher: Mixture, exact: torch.Tensor) -> dict:
    """Compare the points of samples (B, POINTS, D) of classes (B,) with those of `exact`, class by class.

    Returns:
        "distance": mean over the classes of the energy distance. "weights": (K,) share of each mode within its class,
        relative to the true share. "spread": standard deviation per coordinate about the nearest mode of the class.
    """
    samples, exact, condition = samples.flatten(0, 1), exact.flatten(0, 1), condition.repeat_interleave(POINTS)
    squares = torch.cdist(samples, teacher.means).square()
    squares = squares.masked_fill(teacher.classes != condition[:, None], math.inf)
    nearest = squares.argmin(1)
    shares = torch.bincount(nearest, minlength=len(teacher.means)) / torch.bincount(condition)[teacher.classes]
    modes_per_class = torch.bincount(teacher.classes)[teacher.classes]
    per_class = [energy_distance(samples[condition == c], exact[condition == c]) for c in range(teacher.num_classes)]
    return {
        "distance": sum(per_class) / len(per_class),
        "weights": shares * modes_per_class,
        "spread": (squares.min(1).values.mean() / samples.shape[1]).sqrt().item(),
    }


class Evaluation:
    """Measure networks at few steps against exact samples.

    Attributes:
        floor: `measure` of other exact samples. start: that of the undistilled network's samples.
    """

    def __init__(self, teacher: Mixture, network: torch.nn.Module, sampler: str = "stochastic", images: int = 500):
        generator = torch.Generator().manual_seed(1234)
        self.teacher, self.sampler = teacher, sampler
        self.condition = torch.arange(images) % teacher.num_classes
        self.exact = teacher.sample(self.condition, generator)
        self.floor = measure(teacher.sample(self.condition, generator), self.condition, teacher, self.exact)
        self.start = self._measure(network)

    def _measure(self, network: torch.nn.Module) -> dict:
        samples = few_step_samples(network, self.teacher, self.condition, self.sampler, seed=99)
        return measure(samples, self.condition, self.teacher, self.exact)

    def __call__(self, network: torch.nn.Module) -> dict:
        """Return `measure` and "closed", the share of the distance from start to floor that is closed."""
        result, start = self._measure(network), self.start["distance"]
        closed = (start - result["distance"]) / max(start - self.floor["distance"], 1e-12)
        return {**result, "closed": closed}


# ---------------------------------------------------------------------------------------------------------------------
# The benchmark
# ---------------------------------------------------------------------------------------------------------------------
SETTINGS = {
    "DMD": {},
    "DMD + IDA .97": {"ida_decay": 0.97},
    "DMD + ISG .5": {"isg_weight": 0.5},
    "DMD + ISG .5 + IDA .97": {"isg_weight": 0.5, "ida_decay": 0.97},
    "DMD + ISG .5, real latents": {"isg_weight": 0.5, "backward_simulation_prob": 0.0},
    "DMD + ISG .5, Euler": {"isg_weight": 0.5, "sampler": "euler"},
}
PLOTTED = "DMD + ISG .5"  # the setting whose samples are plotted


def run_settings(family: str, seed: int, iterations: int, every: int) -> dict:
    """Distill one initial network with each of SETTINGS.

    Returns:
        {setting: {"curve": [(iteration, distance)], "result": of Evaluation, "seconds": CPU time, "student":
        network}}, and "evaluation" and "start", the undistilled network.
    """
    teacher = make_mixture(make_schedule(family))
    network = pretrain_mlp(teacher, seed=seed)
    evaluations = {sampler: Evaluation(teacher, network, sampler) for sampler in SAMPLERS}
    runs = {"evaluation": evaluations["stochastic"], "start": network}
    for name, flags in SETTINGS.items():
        args = make_args(seed=seed, max_train_steps=iterations, **flags)
        evaluation = evaluations[args.sampler]
        curve = [(0, evaluation.start["distance"])]

        def callback(iteration, models, values, evaluation=evaluation, curve=curve):
            if iteration % every == 0:
                curve.append((iteration, evaluation(models.student.module)["distance"]))

        start = time.process_time()
        student = distill(args, teacher, network, callback).student.module
        seconds = time.process_time() - start
        result = evaluation(student)
        runs[name] = {"curve": curve, "result": result, "seconds": seconds, "student": student}
        print(
            f"{family}, seed {seed}, {name}: distance {result['distance']:.4f}, {result['closed']:.1%} closed",
            file=sys.stderr,
        )
    return runs


def table(results: dict) -> str:
    """Format results[family][seed] of `run_settings` as Markdown: means over the seeds, and the worst seed's gap."""
    lines = [
        "| family | setting | distance | gap closed | worst seed | mode weights (true 1) | spread (true 1) | CPU s |",
        "|---|---|---|---|---|---|---|---|",
    ]

    def row(family, name, results, true_spread, seconds=()):
        count, weights = len(results), torch.stack([result["weights"] for result in results])
        closed = [result["closed"] for result in results if "closed" in result]
        cells = [
            family,
            name,
            f"{sum(result['distance'] for result in results) / count:.4f}",
            f"{sum(closed) / count:.1%}" if closed else "",
            f"{min(closed):.1%}" if closed else "",
            f"{weights.min():.2f} .. {weights.max():.2f}",
            f"{sum(result['spread'] for result in results) / count / true_spread:.2f}",
            f"{sum(seconds) / count:.0f}" if seconds else "",
        ]
        lines.append("| " + " | ".join(cells) + " |")

    for family, runs in results.items():
        evaluations = [run["evaluation"] for run in runs]
        spread = evaluations[0].teacher.spread
        row(family, "floor: exact samples", [evaluation.floor for evaluation in evaluations], spread)
        row(family, "start: undistilled, 4 steps", [evaluation.start for evaluation in evaluations], spread)
        for name in SETTINGS:
            row(family, name, [run[name]["result"] for run in runs], spread, [run[name]["seconds"] for run in runs])
    return "\n".join(lines)


def plot(results: dict, path: Path) -> None:
    """Plot each setting's mean distance and range over the seeds, and below that samples on two principal axes."""
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
        floor = runs[0]["evaluation"].floor["distance"]
        axes.axhline(floor, color="black", linestyle=":", label="floor: exact samples")
        axes.set(
            yscale="log", title=f"{family}, {len(runs)} seeds", xlabel="iteration", ylabel="energy distance, 4 steps"
        )
    axes.legend(fontsize=8)

    family, runs = next(iter(results.items()))
    evaluation, teacher = runs[0]["evaluation"], runs[0]["evaluation"].teacher
    networks = {"undistilled, 4 steps": runs[0]["start"], f"{PLOTTED}, 4 steps": runs[0][PLOTTED]["student"]}
    samples = {"exact samples": evaluation.exact}
    for title, network in networks.items():
        samples[title] = few_step_samples(network, teacher, evaluation.condition, "stochastic", seed=7)
    directions = torch.pca_lowrank(teacher.means, q=2)[2]
    for axes, (title, x0) in zip(below.subplots(1, 3, sharex=True, sharey=True), samples.items()):
        for c in range(teacher.num_classes):
            points = (x0[evaluation.condition == c].flatten(0, 1)[:1000] @ directions).numpy()
            axes.scatter(points[:, 0], points[:, 1], s=3, alpha=0.4, label=f"class {c}")
        axes.set_title(f"{family}: {title}")
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=100)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--iterations", type=int, default=1000)
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=FAMILIES)
    parser.add_argument("--plot", type=Path, default=Path(__file__).parents[1] / "benchmarks" / "toy.png")
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
