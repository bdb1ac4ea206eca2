# Copyright 2026 The SenseFlow-scripts authors. Licensed under the Apache License, Version 2.0.
"""What people look at while a run trains: pictures of --validation_prompts, what these say in numbers, and panels of latents."""

import inspect
import itertools
import math
from contextlib import contextmanager
from functools import partial
from typing import Iterator, Sequence

import numpy as np
import torch
from diffusers import ModelMixin
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

from senseflow_roles import Role
from senseflow_runtime import Runtime
from senseflow_signals import Watch
from senseflow_vae import decode


THUMBNAIL = 16  # pixels a side, on which pictures are compared


class Validation:
    """Draws --validation_prompts with the teacher once, and with the student again and again.

    Attributes:
        signals: of the student's last pictures: "iteration", and what `picture_statistics` and `latent_statistics` find, as shares
            of the teacher's. Warns of those that leave their bands (senseflow_signals).
    """

    def __init__(self, runtime: Runtime, args, pipeline, subfolder: str):
        self.runtime, self.args, self.pipeline, self.subfolder = runtime, args, pipeline, subfolder
        self.signals: dict[str, float] = {}
        self._teachers: dict[str, float] = {}
        self._watch = Watch(args.rank > 0)

    def draw(self, role: Role, scheduler, call: dict, iteration: int) -> None:
        """The pictures of a role, teacher or student, with a stock call of the pipeline, to the trackers; all processes call it."""
        scheduler = type(scheduler).from_config(scheduler.config)
        self.pipeline.register_modules(scheduler=scheduler, **{self.subfolder: role.module})
        self.pipeline.set_progress_bar_config(disable=True)
        rows, latents = draw_pictures(self.runtime, self.pipeline, self.args, call)
        self.runtime.log_picture(f"validation/{role.name}", picture_grid(rows), iteration)
        found = picture_statistics(rows) | latent_statistics(latents)
        if role.name == "teacher":
            self._teachers = found
            return
        shares = {f"signal/{name}": value / self._teachers[name] for name, value in found.items() if self._teachers[name] > 0}
        self.runtime.accelerator.log(shares, step=iteration)
        self._watch.look(iteration, shares)
        self.signals = {"iteration": iteration, **shares}


# ---------------------------------------------------------------------------------------------------------------------
# Pictures
# ---------------------------------------------------------------------------------------------------------------------
def bind_generator(scheduler, generator) -> None:
    """Makes a scheduler's `step` draw from `generator` (one, or a list of one per sample): not every pipeline hands it on."""
    step = type(scheduler).step
    if "generator" in inspect.signature(step).parameters:
        scheduler.step = partial(step, scheduler, generator=generator)


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


def draw_pictures(runtime: Runtime, pipeline, args, call: dict) -> tuple[list[list[Image.Image]], list[list[torch.Tensor]]]:
    """Validation pictures and their latents (C, ...) of a stock pipeline call, lists of lists, one for each prompt.

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
            picture = pipeline(prompt=prompt, generator=generator, **call).images[0]
        if number < len(jobs):
            drawn.append((number, picture, latents[-1][0]))
    drawn = sorted(runtime.gather_objects(drawn), key=lambda found: found[0])
    rows = [drawn[i : i + args.num_validation_images] for i in range(0, len(drawn), args.num_validation_images)]
    return [[picture for _, picture, _ in row] for row in rows], [[latents for _, _, latents in row] for row in rows]


def draw_panel(vae: ModelMixin, panel: dict[str, torch.Tensor], pictures: int = 4) -> Image.Image:
    """What the last student's turn looked at, decoded: a row for each of student, teacher and fake x0, ISG direct and target."""
    rows = []
    for latents in panel.values():
        with torch.no_grad():
            decoded = decode(vae, latents[:pictures])
        rows.append(VaeImageProcessor().postprocess(decoded.cpu(), output_type="pil"))
    return picture_grid(rows)


def picture_grid(rows: Sequence[Sequence[Image.Image]]) -> Image.Image:
    """Rows of equally sized pictures as one picture."""
    width, height = rows[0][0].size
    grid = Image.new("RGB", (width * max(map(len, rows)), height * len(rows)))
    for y, row in enumerate(rows):
        for x, picture in enumerate(row):
            grid.paste(picture, (x * width, y * height))
    return grid


# ---------------------------------------------------------------------------------------------------------------------
# Numbers
# ---------------------------------------------------------------------------------------------------------------------
def picture_statistics(rows: Sequence[Sequence[Image.Image]]) -> dict[str, float]:
    """What a student that goes wrong gets wrong first, of pictures in [0, 1].

    Args:
        rows: the pictures of each prompt.
    Returns:
        diversity: mean distance (root of the mean square) of two pictures of one prompt, as thumbnails; only where there are two.
        saturation: mean of largest less smallest channel.
        contrast: standard deviation of the luminance within a picture.
        sharpness: energy of the luminance at more than half of the highest frequency, in either direction, per pixel.
    """
    found = {"saturation": [], "contrast": [], "sharpness": []}
    for picture in itertools.chain(*rows):
        pixels, grey = (np.asarray(picture.convert(mode), dtype=np.float64) / 255 for mode in ("RGB", "L"))
        found["saturation"].append(np.ptp(pixels, axis=2).mean())
        found["contrast"].append(grey.std())
        spectrum = np.abs(np.fft.fft2(grey)) ** 2 / grey.size**2
        high = [np.abs(np.fft.fftfreq(side)) > 0.25 for side in grey.shape]
        found["sharpness"].append(spectrum[high[0][:, None] | high[1]].sum())
    size = (THUMBNAIL, THUMBNAIL)
    for row in rows:
        small = [np.asarray(picture.convert("RGB").resize(size, Image.Resampling.BOX)) / 255 for picture in row]
        for one, other in itertools.combinations(small, 2):
            found.setdefault("diversity", []).append(np.sqrt(((one - other) ** 2).mean()))
    return {name: float(np.mean(values)) for name, values in found.items()}


def latent_statistics(rows: Sequence[Sequence[torch.Tensor]]) -> dict[str, float]:
    """The same of what the VAE decoded: every number that the student draws counts, not what is left of it in a thumbnail.

    Args:
        rows: the latents (C, ...) of the pictures of each prompt.
    Returns:
        latent_diversity: distance (root of the mean square) of two of one prompt; only where there are two.
        latent_contrast: standard deviation within a channel, mean over channels.
    """
    found = {"latent_contrast": [latents.flatten(1).std(1, correction=0).mean().item() for latents in itertools.chain(*rows)]}
    pairs = itertools.chain(*(itertools.combinations(row, 2) for row in rows))
    distances = [(one - other).square().mean().sqrt().item() for one, other in pairs]
    if distances:
        found["latent_diversity"] = distances
    return {name: float(np.mean(values)) for name, values in found.items()}
