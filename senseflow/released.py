# Copyright 2026 The SenseFlow-scripts authors. Licensed under the Apache License, Version 2.0.
"""Presets with which the published weights are run."""

import math
from typing import Any, NamedTuple


FLOW, SHIFT = "FlowMatchEulerDiscreteScheduler", math.log(2.002)


class Released(NamedTuple):
    """A preset of 4 steps at 1024 pixels.

    With these changes to the scheduler, a stock call visits the trained levels at any size; fewer steps visit some.
    """

    pipeline: str  # name of the class
    scheduler: dict[str, Any]  # changes to the configuration of its scheduler
    pipeline_kwargs: dict[str, Any]  # besides the number of steps and the size


# Sigmas 1 .9045 .7595 .5128: FLUX's own at 1024 pixels. No guidance_scale: the network has no embedder for it.
FLUX = Released(
    "FluxPipeline",
    {"_class_name": FLOW, "use_dynamic_shifting": False, "shift": math.exp(1.15), "shift_terminal": None},
    {"max_sequence_length": 512},
)
# Sigmas 1 .9 .75 .5
SD35 = Released(
    "StableDiffusion3Pipeline",
    dict(_class_name=FLOW, use_dynamic_shifting=True, base_shift=SHIFT, max_shift=SHIFT, shift_terminal=0.5),
    {"guidance_scale": 1.0, "max_sequence_length": 77},
)
# Timesteps 999 749 499 249
SDXL = Released(
    "StableDiffusionXLPipeline",
    {"_class_name": "LCMScheduler", "original_inference_steps": 4},
    {"guidance_scale": 0.0},
)
RELEASED = {"flux": FLUX, "sd35-medium": SD35, "sd35-large": SD35, "sdxl": SDXL, "sdxl-dmd2": SDXL}
