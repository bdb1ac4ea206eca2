# Copyright 2026 The SenseFlow-scripts authors. Licensed under the Apache License, Version 2.0.
"""Validation: images of --validation_prompts, grids of debug latents, and statistics of both as signals."""

import itertools
from contextlib import contextmanager
from typing import Iterator, Optional, Sequence

import numpy as np
import torch
from accelerate.utils import gather_object
from diffusers import ModelMixin
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils import make_image_grid
from PIL import Image

from senseflow.models.schedulers import bind_generator
from senseflow.models.vae import decode
from senseflow.training.roles import Role
from senseflow.training.runtime import Runtime
from senseflow.training.signals import SignalMonitor


THUMBNAIL_SIZE = 16  # pixels a side; images of a prompt are compared as thumbnails
NUM_DEBUG_LATENTS = 4  # columns of the grid of debug latents


class Validation:
    """Generate images of --validation_prompts with stock pipeline calls: with the teacher once, then with the student.

    Warn of signals that leave their bands (senseflow.training.signals).

    Args:
        models: a script's TrainingModels. Read are pipeline (with the teacher's scheduler), network_name, vae and
            teacher_pipeline_kwargs().
        scheduler: the student's.
        pipeline_kwargs: arguments of the student's pipeline call.
    Attributes:
        signals: the "iteration" of the student's last images, and their statistics relative to the teacher's.
    """

    def __init__(self, runtime: Runtime, args, models, scheduler, pipeline_kwargs: dict):
        self.runtime, self.args, self.models, self.pipeline_kwargs = runtime, args, models, pipeline_kwargs
        self.scheduler, self.teacher_scheduler = scheduler, models.pipeline.scheduler
        self.signals: dict[str, float] = {}
        self._teacher_statistics: dict[str, float] = {}
        self._monitor = SignalMonitor(args.rank > 0)

    def run(self, role: Role, iteration: int, debug_latents: Optional[dict[str, torch.Tensor]] = None) -> None:
        """Log the images of the teacher or the student, its signals, and debug latents. All processes call it.

        Without --validation_prompts nothing is done.

        Args:
            debug_latents: {name: latents (B, C, ...)} of the last student update; a row of the grid each.
        """
        if not self.args.validation_prompts:
            return
        scheduler, pipeline_kwargs = self.scheduler, self.pipeline_kwargs
        if role.name == "teacher":
            scheduler = self.teacher_scheduler
            pipeline_kwargs = pipeline_kwargs | self.models.teacher_pipeline_kwargs()
        pipeline = self.models.pipeline
        scheduler = type(scheduler).from_config(scheduler.config)
        pipeline.register_modules(scheduler=scheduler, **{self.models.network_name: role.module})
        pipeline.set_progress_bar_config(disable=True)
        images, latents = generate_images(self.runtime.accelerator, pipeline, self.args, pipeline_kwargs)
        self.runtime.log_image(f"validation/{role.name}", grid(images), iteration)
        if debug_latents:
            rows = decode_debug_latents(self.models.vae, debug_latents)
            self.runtime.log_image("panel/" + " ".join(debug_latents), grid(rows), iteration)
        statistics = image_statistics(images) | latent_statistics(latents)
        if role.name == "teacher":
            self._teacher_statistics = statistics
            return
        teacher = self._teacher_statistics
        signals = {f"signal/{name}": value / teacher[name] for name, value in statistics.items() if teacher[name] > 0}
        self.runtime.accelerator.log(signals, step=iteration)
        self._monitor.update(iteration, signals)
        self.signals = {"iteration": iteration, **signals}


# ---------------------------------------------------------------------------------------------------------------------
# Images
# ---------------------------------------------------------------------------------------------------------------------
@contextmanager
def record_decoded_latents(vae: ModelMixin) -> Iterator[list[torch.Tensor]]:
    """Yield a list to which the latents are added that the VAE decodes, on the CPU in float32."""
    decode, recorded = vae.decode, []

    def record(latents: torch.Tensor, *args, **kwargs):
        recorded.append(latents.detach().float().cpu())
        return decode(latents, *args, **kwargs)

    vae.decode = record
    try:
        yield recorded
    finally:
        vae.decode = decode


def generate_images(
    accelerator, pipeline, args, pipeline_kwargs: dict
) -> tuple[list[list[Image.Image]], list[list[torch.Tensor]]]:
    """Generate --num_validation_images of each of --validation_prompts, split between the processes.

    Returns:
        (images, their latents (C, ...)) in all processes, each a list with a list per prompt.
    """
    num_images, results = args.num_validation_images, {}
    jobs = list(enumerate(itertools.product(args.validation_prompts, range(num_images))))
    # Padded: the shards of a network are gathered in all processes at once.
    with accelerator.split_between_processes(jobs, apply_padding=True) as own_jobs:
        for index, (prompt, number) in own_jobs:
            generator = torch.Generator().manual_seed(args.seed + number)
            bind_generator(pipeline.scheduler, generator)
            # Autocast: the student is in float32, VAE and text encoders may not be.
            with torch.no_grad(), accelerator.autocast(), record_decoded_latents(pipeline.vae) as latents:
                image = pipeline(prompt=prompt, generator=generator, **pipeline_kwargs).images[0]
            results[index] = image, latents[-1][0]
    results = dict(gather_object(list(results.items())))
    images, latents = zip(*(results[index] for index, _ in jobs))
    starts = range(0, len(jobs), num_images)
    return [list(images[i : i + num_images]) for i in starts], [list(latents[i : i + num_images]) for i in starts]


@torch.no_grad()
def decode_debug_latents(vae: ModelMixin, debug_latents: dict[str, torch.Tensor]) -> list[list[Image.Image]]:
    """Decode the first NUM_DEBUG_LATENTS of each of the debug latents (B, C, ...) to a row of images."""
    images = [decode(vae, latents[:NUM_DEBUG_LATENTS]).cpu() for latents in debug_latents.values()]
    return [VaeImageProcessor().postprocess(row, output_type="pil") for row in images]


def grid(rows: Sequence[Sequence[Image.Image]]) -> Image.Image:
    """Paste rows of as many images each, all of one size, into one image."""
    return make_image_grid(list(itertools.chain(*rows)), rows=len(rows), cols=len(rows[0]))


# ---------------------------------------------------------------------------------------------------------------------
# Statistics
# ---------------------------------------------------------------------------------------------------------------------
def image_statistics(rows: Sequence[Sequence[Image.Image]]) -> dict[str, float]:
    """Measure, on values in [0, 1], what a diverging student gets wrong first.

    Args:
        rows: the images of each prompt.
    Returns:
        diversity: root mean square difference of two images of a prompt, as thumbnails; absent for one image a prompt.
        saturation: mean of the largest minus the smallest channel.
        contrast: standard deviation of the luminance within an image.
        sharpness: energy per pixel of the luminance above half of the highest frequency, in either direction.
    """
    statistics = {"saturation": [], "contrast": [], "sharpness": []}
    for image in itertools.chain(*rows):
        pixels, luminance = (np.asarray(image.convert(mode), dtype=np.float64) / 255 for mode in ("RGB", "L"))
        statistics["saturation"].append(np.ptp(pixels, axis=2).mean())
        statistics["contrast"].append(luminance.std())
        spectrum = np.abs(np.fft.fft2(luminance)) ** 2 / luminance.size**2
        high = [np.abs(np.fft.fftfreq(side)) > 0.25 for side in luminance.shape]
        statistics["sharpness"].append(spectrum[high[0][:, None] | high[1]].sum())
    size = (THUMBNAIL_SIZE, THUMBNAIL_SIZE)
    for row in rows:
        thumbnails = [np.asarray(image.convert("RGB").resize(size, Image.Resampling.BOX)) / 255 for image in row]
        for a, b in itertools.combinations(thumbnails, 2):
            statistics.setdefault("diversity", []).append(np.sqrt(((a - b) ** 2).mean()))
    return {name: float(np.mean(values)) for name, values in statistics.items()}


def latent_statistics(rows: Sequence[Sequence[torch.Tensor]]) -> dict[str, float]:
    """Measure the same of the latents that the VAE decoded, in which every value counts that the student generates.

    Args:
        rows: the latents (C, ...) of the images of each prompt.
    Returns:
        latent_diversity: root mean square difference of two of a prompt; absent for one image a prompt.
        latent_contrast: standard deviation within a channel, mean over channels.
    """
    latents, pairs = itertools.chain(*rows), [pair for row in rows for pair in itertools.combinations(row, 2)]
    statistics = {
        "latent_contrast": [each.flatten(1).std(1, correction=0).mean().item() for each in latents],
        "latent_diversity": [(a - b).square().mean().sqrt().item() for a, b in pairs],
    }
    return {name: float(np.mean(values)) for name, values in statistics.items() if values}
