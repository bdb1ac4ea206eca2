# Copyright 2026 The SenseFlow-scripts authors. Licensed under the Apache License, Version 2.0.
"""Schedulers of diffusers: check a teacher's, fit one to a student's levels, control the noise that one draws."""

import inspect
import math
from functools import partial
from typing import Callable, Sequence

import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler

from senseflow.models.hub import ModelSource


# Entries of a DDPM scheduler's configuration that decide about its levels and about what a network predicts there.
DDPM_LEVELS = (
    "beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr", "prediction_type"
)  # fmt: skip
# Entries of a flow scheduler's configuration that change its levels in `set_timesteps` only.
OTHER_SPACINGS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "invert_sigmas")


def check_ddpm_scheduler(source: ModelSource) -> None:
    """Refuse (UserError, exit code 2) a teacher whose scheduler has other levels or predictions than DDPMSchedule."""
    config = source.config(DDPMScheduler, "scheduler")
    prediction_type = config.get("prediction_type", "epsilon")
    if "beta_schedule" not in config:
        raise source.error(f"has the levels of {config.get('_class_name')}; this script trains DDPM's")
    if prediction_type not in ("epsilon", "v_prediction"):
        raise source.error(f"predicts {prediction_type}; this script trains teachers of epsilon or v_prediction")
    if config.get("rescale_betas_zero_snr") and prediction_type == "epsilon":
        problem = "has rescale_betas_zero_snr and predicts epsilon, which gives no image where there is only noise"
        raise source.error(f"{problem}; give a teacher that predicts v_prediction")


def load_flow_scheduler(source: ModelSource) -> FlowMatchEulerDiscreteScheduler:
    """Load a teacher's scheduler of flow matching: its `timesteps` are the teacher's levels, without a dynamic shift.

    A multistep scheduler with a fixed shift, such as Sana's DPM-Solver, becomes the Euler scheduler of its levels.
    UserError (exit code 2) for any other, whose shift an Euler scheduler would pass over without a word, and for
    levels that only `set_timesteps` makes.
    """
    cls = FlowMatchEulerDiscreteScheduler
    config = source.config(cls, "scheduler")
    spaced = next((name for name in OTHER_SPACINGS if config.get(name)), None)
    if spaced:
        raise source.error(
            f"has {spaced} in its scheduler; give a teacher without, since its levels would not be trained"
        )
    fixed_shift = config.get("use_flow_sigmas") and not config.get("use_dynamic_shifting")
    if fixed_shift and config.get("prediction_type") == "flow_prediction":
        return cls(shift=config.get("flow_shift", 1.0))
    if not config.get("_class_name", cls.__name__).startswith("FlowMatch"):
        fix = f"give a teacher with a {cls.__name__}, or with use_flow_sigmas, flow_prediction and a fixed flow_shift"
        raise source.error(f"has the levels of {config['_class_name']}; {fix}")
    return source.load(cls.from_pretrained, subfolder="scheduler")


def fit_flow_scheduler(
    sigmas: Sequence[float],
    visited_sigmas: Callable[[FlowMatchEulerDiscreteScheduler], Sequence[float]],
    sampler: str,
    dynamic: bool = True,
    tolerance: float = 1e-3,
) -> tuple[FlowMatchEulerDiscreteScheduler, list[float]]:
    """Fit a scheduler with which a stock pipeline call visits the given noise levels.

    A static shift (one degree of freedom) is tried first, then a shift with `shift_terminal` (two).

    Args:
        sigmas: (n,) levels in (0, 1], decreasing.
        visited_sigmas: `visited_sigmas(scheduler)` -> the n levels that this pipeline's stock call visits.
        sampler: "stochastic" or "euler": what the scheduler's `step` does.
        dynamic: write the shift with `shift_terminal` as dynamic shifting; False for pipelines that do not support it.
    Returns:
        (scheduler, levels): the levels that it visits, on which to train. If none fits within the tolerance, an
        unshifted scheduler and `sigmas`: then the pipeline must be called with `sigmas=`.
    """
    wanted = torch.as_tensor(list(sigmas), dtype=torch.float64)

    def make_scheduler(**config):
        return FlowMatchEulerDiscreteScheduler(stochastic_sampling=sampler == "stochastic", **config)

    def make_terminal(log_shift: float):
        static = {"shift": math.exp(log_shift)}
        shift = {"use_dynamic_shifting": True, "base_shift": log_shift, "max_shift": log_shift} if dynamic else static
        return make_scheduler(shift_terminal=wanted[-1].item(), **shift)

    def error(scheduler) -> float:
        return (torch.as_tensor(visited_sigmas(scheduler), dtype=torch.float64) - wanted).abs().max().item()

    plain = make_scheduler(shift=1.0)
    candidates = [plain]
    if len(wanted) > 1 and wanted[-1] < 1:
        base, last = visited_sigmas(plain)[-1], wanted[-1].item()
        candidates.append(make_scheduler(shift=last * (1 - base) / (base * (1 - last))))
        low, high = -4.0, 6.0  # log of the shift; golden-section search, the error is unimodal in it
        ratio = (5**0.5 - 1) / 2
        for _ in range(60):
            left, right = high - ratio * (high - low), low + ratio * (high - low)
            if error(make_terminal(left)) < error(make_terminal(right)):
                high = right
            else:
                low = left
        candidates.append(make_terminal((low + high) / 2))
    for scheduler in candidates:
        if error(scheduler) <= tolerance:
            return scheduler, [float(level) for level in visited_sigmas(scheduler)]
    return plain, wanted.tolist()


def bind_generator(scheduler, generator) -> None:
    """Make a scheduler's `step` draw noise from `generator` (one, or a list of one per sample).

    FLUX and SD 3 pipelines call `step` without a generator: it would draw from the global one.
    """
    step = type(scheduler).step
    if "generator" in inspect.signature(step).parameters:
        scheduler.step = partial(step, scheduler, generator=generator)
