# Copyright 2026 The SenseFlow-scripts authors. Licensed under the Apache License, Version 2.0.
"""Presets with which the published weights are run."""

import math
from typing import Any, NamedTuple


class Released(NamedTuple):
    """A preset of 4 steps at 1024 px.

    The changes to the scheduler make a stock call visit the trained levels at any size; fewer steps visit some of them.
    """

    pipeline: str  # name of the class
    scheduler: dict[str, Any]  # changes to the configuration of its scheduler
    pipeline_kwargs: dict[str, Any]  # besides the number of steps and the size


# Sigmas 1 .9045 .7595 .5128: FLUX's own at 1024 px. No guidance_scale: the network has no embedder for it.
FLUX = Released(
    "FluxPipeline",
    {
        "_class_name": "FlowMatchEulerDiscreteScheduler",
        "use_dynamic_shifting": False,
        "shift": math.exp(1.15),
        "shift_terminal": None,
    },
    {"max_sequence_length": 512},
)
# Sigmas 1 .9 .75 .5
SD35 = Released(
    "StableDiffusion3Pipeline",
    {
        "_class_name": "FlowMatchEulerDiscreteScheduler",
        "use_dynamic_shifting": True,
        "base_shift": math.log(2.002),
        "max_shift": math.log(2.002),
        "shift_terminal": 0.5,
    },
    {"guidance_scale": 1.0, "max_sequence_length": 77},
)
# Timesteps 999 749 499 249
SDXL = Released(
    "StableDiffusionXLPipeline",
    {"_class_name": "LCMScheduler", "original_inference_steps": 4},
    {"guidance_scale": 0.0},
)
RELEASED = {"flux": FLUX, "sd35-medium": SD35, "sd35-large": SD35, "sdxl": SDXL, "sdxl-dmd2": SDXL}
