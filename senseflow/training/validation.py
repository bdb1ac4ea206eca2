# Copyright 2026 The SenseFlow-scripts authors. Licensed under the Apache License, Version 2.0.
"""Validation: images of --validation_prompts, a panel of debug latents, and statistics of the images as signals."""

import itertools
import textwrap
from contextlib import contextmanager, suppress
from typing import Callable, Iterator, Optional, Sequence

import numpy as np
import torch
from accelerate.logging import get_logger
from accelerate.utils import gather_object
from diffusers import ModelMixin
from diffusers.image_processor import VaeImageProcessor
from PIL import Image, ImageDraw, ImageFont

from senseflow.models.schedulers import bind_generator
from senseflow.models.vae import over_white
from senseflow.training.roles import Role
from senseflow.training.runtime import Runtime
from senseflow.training.signals import SignalMonitor


logger = get_logger(__name__)

THUMBNAIL_SIZE = 16  # pixels a side; images of a prompt are compared as thumbnails
NUM_DEBUG_LATENTS = 4  # rows of the panel of debug latents
MAX_LINES = 3  # of a prompt that is written above its images


class Validation:
    """Generate images of --validation_prompts with stock pipeline calls: with the teacher once, then with the student.

    Warn of signals that leave their bands (senseflow.training.signals).

    Args:
        models: a script's TrainingModels. Read are pipeline (with the teacher's scheduler), network_name, vae, the
            roles teacher and student, and teacher_pipeline_kwargs().
        scheduler: the student's.
        pipeline_kwargs: arguments of the student's pipeline call.
    Attributes:
        signals: the "iteration" of the student's last images, and their statistics relative to the teacher's.
    """

    def __init__(self, runtime: Runtime, args, models, scheduler, pipeline_kwargs: dict):
        self.runtime, self.args, self.models, self.pipeline_kwargs = runtime, args, models, pipeline_kwargs
        self.scheduler, self.teacher_scheduler = scheduler, models.pipeline.scheduler
        self.signals: dict[str, float] = {}
        self._teacher_images: list[list[Image.Image]] = []
        self._teacher_statistics: dict[str, float] = {}
        self._monitor = SignalMonitor(args.rank > 0)

    @torch.compiler.set_stance("force_eager")  # or other batch sizes and precisions would be compiled for few calls
    def run(self, iteration: int, debug_latents: Optional[dict[str, torch.Tensor]] = None) -> None:
        """Log the student's images beside the teacher's, its signals, and debug latents. All processes call it.

        The first call generates the teacher's images, too. Without --validation_prompts nothing is done.

        Args:
            debug_latents: {name: latents (B, C, ...)} of the last student update; a column of the panel each.
        """
        if not self.args.validation_prompts:
            return
        teacher_kwargs = self.pipeline_kwargs | self.models.teacher_pipeline_kwargs()
        if not self._teacher_images:
            logger.info(
                f"the teacher generates its validation images in {teacher_kwargs['num_inference_steps']} steps"
            )
            images, latents = self._generate(self.models.teacher, self.teacher_scheduler, teacher_kwargs)
            self._teacher_images = images
            self._teacher_statistics = image_statistics(images) | latent_statistics(latents)
        images, latents = self._generate(self.models.student, self.scheduler, self.pipeline_kwargs)
        columns = [f"teacher, {teacher_kwargs['num_inference_steps']} steps"] * len(images[0])
        student = f"student, {self.pipeline_kwargs['num_inference_steps']} steps, iteration {iteration}"
        columns += [student] * len(images[0])
        rows = [of_teacher + of_student for of_teacher, of_student in zip(self._teacher_images, images)]
        image = labeled_grid(rows, columns, self.args.validation_prompts)
        self.runtime.log_image("validation/images", image, iteration)
        if debug_latents:
            rows = decode_debug_latents(self.models.decode, debug_latents)
            self.runtime.log_image("validation/panel", labeled_grid(rows, list(debug_latents)), iteration)
        statistics, teacher = image_statistics(images) | latent_statistics(latents), self._teacher_statistics
        signals = {f"signal/{name}": value / teacher[name] for name, value in statistics.items() if teacher[name] > 0}
        self.runtime.log(signals, step=iteration)
        if iteration > 0:  # the bands are those of students that have been trained
            self._monitor.update(iteration, signals)
        self.signals = {"iteration": iteration, **signals}

    def record_prompts(self) -> None:
        """Start every stock call of `run`, which calls the pipeline's `encode_prompt`, and stop it at the network."""
        if not self.args.validation_prompts:
            return
        pipeline = self.models.pipeline
        student = (self.models.student, self.scheduler, self.pipeline_kwargs)
        teacher_kwargs = self.pipeline_kwargs | self.models.teacher_pipeline_kwargs()
        for role, scheduler, kwargs in (student, (self.models.teacher, self.teacher_scheduler, teacher_kwargs)):
            self._register(role, scheduler)
            # First of all hooks: those of shards would gather them.
            hook = role.module.register_forward_pre_hook(_stop, prepend=True)
            for prompt in self.args.validation_prompts:
                with suppress(_Stopped):
                    call_pipeline(self.runtime.accelerator, pipeline, prompt, self.args.seed, kwargs)
            hook.remove()

    def _generate(self, role: Role, scheduler, pipeline_kwargs: dict):
        """Return the images and latents of `generate_images` with a role's network."""
        self._register(role, scheduler)
        return generate_images(self.runtime.accelerator, self.models.pipeline, self.args, pipeline_kwargs)

    def _register(self, role: Role, scheduler) -> None:
        pipeline, scheduler = self.models.pipeline, type(scheduler).from_config(scheduler.config)
        pipeline.register_modules(scheduler=scheduler, **{self.models.network_name: role.module})
        pipeline.set_progress_bar_config(disable=True)


class _Stopped(Exception):
    """A stock call has come to its network."""


def _stop(*_) -> None:
    raise _Stopped


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


@torch.no_grad()
def call_pipeline(accelerator, pipeline, prompt: str, seed: int, pipeline_kwargs: dict) -> Image.Image:
    """Generate one image with a stock call."""
    generator = torch.Generator().manual_seed(seed)
    bind_generator(pipeline.scheduler, generator)
    with accelerator.autocast():  # the student is in float32, VAE and text encoders may not be
        return over_white(pipeline(prompt=prompt, generator=generator, **pipeline_kwargs).images[0])


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
            with record_decoded_latents(pipeline.vae) as latents:
                image = call_pipeline(accelerator, pipeline, prompt, args.seed + number, pipeline_kwargs)
            results[index] = image, latents[-1][0]
    results = dict(gather_object(list(results.items())))
    images, latents = zip(*(results[index] for index, _ in jobs))
    starts = range(0, len(jobs), num_images)
    return [list(images[i : i + num_images]) for i in starts], [list(latents[i : i + num_images]) for i in starts]


@torch.no_grad()
def decode_debug_latents(decode: Callable, debug_latents: dict[str, torch.Tensor]) -> list[list[Image.Image]]:
    """Decode the first NUM_DEBUG_LATENTS samples of debug latents (B, C, ...): a row of images per sample."""
    images = [decode(latents[:NUM_DEBUG_LATENTS]).cpu() for latents in debug_latents.values()]
    columns = [VaeImageProcessor().postprocess(column, output_type="pil") for column in images]
    return [list(row) for row in zip(*columns)]


def labeled_grid(
    rows: Sequence[Sequence[Image.Image]], columns: Sequence[str], captions: Sequence[str] = ()
) -> Image.Image:
    """Paste rows of images, all of one size, under the names of the columns; each row under its caption, if any."""
    width = rows[0][0].width
    parts = [draw_text(columns, width)]
    for number, row in enumerate(rows):
        if captions:
            parts.append(draw_text([f"{number + 1}. {captions[number]}"], width * len(row), font_width=width))
        parts.append(np.hstack([np.asarray(image.convert("RGB")) for image in row]))
    return Image.fromarray(np.vstack(parts))


def draw_text(texts: Sequence[str], width: int, font_width: Optional[int] = None) -> np.ndarray:
    """Draw texts side by side on white (H, W, 3), each wrapped to this width and cut after MAX_LINES lines.

    Pillow's own font draws boxes in the place of letters that are not Latin.

    Args:
        font_width: the width of an image, to which the size of the letters is in proportion; default: the width.
    """
    size = max(12, (font_width or width) // 32)
    font = ImageFont.load_default(size)
    wrapped = []
    for text in texts:
        text = " ".join(text.encode(errors="replace").decode().split())  # a lone surrogate cannot be drawn
        num_letters = int(len(text) * (width - size) / max(font.getlength(text), 1))  # in a line, on average
        wrapped.append(textwrap.wrap(text, max(num_letters, 8), max_lines=MAX_LINES, placeholder=" ..."))
    line_height = round(1.3 * size)
    image = Image.new("RGB", (width * len(texts), max(map(len, wrapped)) * line_height + size // 2), "white")
    for column, lines in enumerate(wrapped):
        for number, line in enumerate(lines):
            ImageDraw.Draw(image).text((column * width + size // 2, number * line_height), line, "black", font)
    return np.asarray(image)


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
