# Copyright 2026 The SenseFlow-scripts authors. Licensed under the Apache License, Version 2.0.
"""What people look at while a run trains: images of --validation_prompts, what these say in numbers, and panels of latents."""

import itertools
import math
from contextlib import contextmanager
from typing import Iterator, Sequence

import numpy as np
import torch
from diffusers import ModelMixin
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

from senseflow.models.schedulers import bind_generator
from senseflow.models.vae import decode
from senseflow.training.roles import Role
from senseflow.training.runtime import Runtime
from senseflow.training.signals import SignalMonitor


THUMBNAIL = 16  # pixels a side, on which images are compared


class Validation:
    """Draws --validation_prompts with the teacher once, and with the student again and again.

    Attributes:
        signals: of the student's last images: "iteration", and what `image_statistics` and `latent_statistics` find, as shares
            of the teacher's. Warns of those that leave their bands (senseflow.training.signals).
    """

    def __init__(self, runtime: Runtime, args, pipeline, subfolder: str):
        self.runtime, self.args, self.pipeline, self.subfolder = runtime, args, pipeline, subfolder
        self.signals: dict[str, float] = {}
        self._teachers: dict[str, float] = {}
        self._watch = SignalMonitor(args.rank > 0)

    def draw(self, role: Role, scheduler, call: dict, iteration: int) -> None:
        """The images of a role, teacher or student, with a stock call of the pipeline, to the trackers; all processes call it."""
        scheduler = type(scheduler).from_config(scheduler.config)
        self.pipeline.register_modules(scheduler=scheduler, **{self.subfolder: role.module})
        self.pipeline.set_progress_bar_config(disable=True)
        rows, latents = generate_images(self.runtime, self.pipeline, self.args, call)
        self.runtime.log_image(f"validation/{role.name}", image_grid(rows), iteration)
        found = image_statistics(rows) | latent_statistics(latents)
        if role.name == "teacher":
            self._teachers = found
            return
        shares = {
            f"signal/{name}": value / self._teachers[name] for name, value in found.items() if self._teachers[name] > 0
        }
        self.runtime.accelerator.log(shares, step=iteration)
        self._watch.look(iteration, shares)
        self.signals = {"iteration": iteration, **shares}


# ---------------------------------------------------------------------------------------------------------------------
# Images
# ---------------------------------------------------------------------------------------------------------------------
@contextmanager
def kept_latents(vae: ModelMixin) -> Iterator[list[torch.Tensor]]:
    """What the VAE is asked to decode meanwhile, on the CPU in float32."""
    decode, kept = vae.decode, []

    def keep(latents: torch.Tensor, *args, **kwargs):
        kept.append(latents.detach().float().cpu())
        return decode(latents, *args, **kwargs)

    vae.decode = keep
    try:
        yield kept
    finally:
        vae.decode = decode


def generate_images(
    runtime: Runtime, pipeline, args, call: dict
) -> tuple[list[list[Image.Image]], list[list[torch.Tensor]]]:
    """Validation images and their latents (C, ...) of a stock pipeline call, lists of lists, one for each prompt.

    Each process draws its own, and gets all.
    """
    jobs = [(i, prompt) for prompt in args.validation_prompts for i in range(args.num_validation_images)]
    rank, world_size = runtime.accelerator.process_index, runtime.accelerator.num_processes
    drawn = []
    for number in range(rank, math.ceil(len(jobs) / world_size) * world_size, world_size):
        # Past the last, once more: a sharded network runs in all ranks at once, or in none.
        i, prompt = jobs[min(number, len(jobs) - 1)]
        generator = torch.Generator().manual_seed(args.seed + i)
        bind_generator(pipeline.scheduler, generator)
        # The student is in fp32, VAE and text encoders may not be.
        with torch.no_grad(), runtime.accelerator.autocast(), kept_latents(pipeline.vae) as latents:
            image = pipeline(prompt=prompt, generator=generator, **call).images[0]
        if number < len(jobs):
            drawn.append((number, image, latents[-1][0]))
    drawn = sorted(runtime.gather_objects(drawn), key=lambda found: found[0])
    rows = [drawn[i : i + args.num_validation_images] for i in range(0, len(drawn), args.num_validation_images)]
    return [[image for _, image, _ in row] for row in rows], [[latents for _, _, latents in row] for row in rows]


def decode_debug_latents(vae: ModelMixin, debug_latents: dict[str, torch.Tensor], images: int = 4) -> Image.Image:
    """What the last student's turn looked at, decoded: a row for each of student, teacher and fake x0, ISG direct and target."""
    rows = []
    for latents in debug_latents.values():
        with torch.no_grad():
            decoded = decode(vae, latents[:images])
        rows.append(VaeImageProcessor().postprocess(decoded.cpu(), output_type="pil"))
    return image_grid(rows)


def image_grid(rows: Sequence[Sequence[Image.Image]]) -> Image.Image:
    """Rows of equally sized images as one image."""
    width, height = rows[0][0].size
    grid = Image.new("RGB", (width * max(map(len, rows)), height * len(rows)))
    for y, row in enumerate(rows):
        for x, image in enumerate(row):
            grid.paste(image, (x * width, y * height))
    return grid


# ---------------------------------------------------------------------------------------------------------------------
# Numbers
# ---------------------------------------------------------------------------------------------------------------------
def image_statistics(rows: Sequence[Sequence[Image.Image]]) -> dict[str, float]:
    """What a student that goes wrong gets wrong first, of images in [0, 1].

    Args:
        rows: the images of each prompt.
    Returns:
        diversity: mean distance (root of the mean square) of two images of one prompt, as thumbnails; only where there are two.
        saturation: mean of largest less smallest channel.
        contrast: standard deviation of the luminance within an image.
        sharpness: energy of the luminance at more than half of the highest frequency, in either direction, per pixel.
    """
    found = {"saturation": [], "contrast": [], "sharpness": []}
    for image in itertools.chain(*rows):
        pixels, grey = (np.asarray(image.convert(mode), dtype=np.float64) / 255 for mode in ("RGB", "L"))
        found["saturation"].append(np.ptp(pixels, axis=2).mean())
        found["contrast"].append(grey.std())
        spectrum = np.abs(np.fft.fft2(grey)) ** 2 / grey.size**2
        high = [np.abs(np.fft.fftfreq(side)) > 0.25 for side in grey.shape]
        found["sharpness"].append(spectrum[high[0][:, None] | high[1]].sum())
    size = (THUMBNAIL, THUMBNAIL)
    for row in rows:
        small = [np.asarray(image.convert("RGB").resize(size, Image.Resampling.BOX)) / 255 for image in row]
        for one, other in itertools.combinations(small, 2):
            found.setdefault("diversity", []).append(np.sqrt(((one - other) ** 2).mean()))
    return {name: float(np.mean(values)) for name, values in found.items()}


def latent_statistics(rows: Sequence[Sequence[torch.Tensor]]) -> dict[str, float]:
    """The same of what the VAE decoded: every number that the student draws counts, not what is left of it in a thumbnail.

    Args:
        rows: the latents (C, ...) of the images of each prompt.
    Returns:
        latent_diversity: distance (root of the mean square) of two of one prompt; only where there are two.
        latent_contrast: standard deviation within a channel, mean over channels.
    """
    found = {
        "latent_contrast": [
            latents.flatten(1).std(1, correction=0).mean().item() for latents in itertools.chain(*rows)
        ]
    }
    pairs = itertools.chain(*(itertools.combinations(row, 2) for row in rows))
    distances = [(one - other).square().mean().sqrt().item() for one, other in pairs]
    if distances:
        found["latent_diversity"] = distances
    return {name: float(np.mean(values)) for name, values in found.items()}
