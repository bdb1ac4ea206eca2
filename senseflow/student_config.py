# Copyright 2026 The SenseFlow-scripts authors. Licensed under the Apache License, Version 2.0.
"""Write and read senseflow.json: how a student was trained and how a stock pipeline call has to look to run it.

It lies beside an exported student and in each checkpoint. `infer.py` takes its defaults from it.
"""

import json
import os
from pathlib import Path, PurePosixPath
from typing import Any, Optional

from senseflow.arguments import SAMPLERS


STUDENT_CONFIG = "senseflow.json"


def absolute_if_local(path: str) -> str:
    """Return the absolute path of an existing file or folder, and a Hub id unchanged."""
    return str(Path(path).resolve()) if os.path.exists(path) else path


def make_student_config(
    args,
    revision: Optional[str],
    sigmas: list[float],
    timesteps: list[float],
    pixel_multiple: int,
    pipeline_class: str,
    pipeline_kwargs: dict[str, Any],
    iteration: int,
    teacher_fingerprint: str,
) -> dict[str, Any]:
    """Make the content of senseflow.json.

    Args:
        args: parsed arguments of a training script.
        revision: commit of the teacher on the Hub; None for a folder.
        sigmas, timesteps: the trained noise levels, from pure noise on.
        pixel_multiple: what height and width of an image must be divisible by.
        pipeline_class: class of the stock pipeline; the teacher's model_index.json may name another that fits.
        pipeline_kwargs: keyword arguments with which the stock pipeline visits these levels.
        teacher_fingerprint: identifies the weights that an adapter was trained over; unused without --rank.
    """
    config = {
        "sigmas": sigmas,
        "timesteps": timesteps,
        "sampler": args.sampler,
        "num_inference_steps": len(timesteps),
        "sizes": args.aspect_ratio_buckets or [args.resolution],
        "pixel_multiple": pixel_multiple,
        "teacher": absolute_if_local(args.pretrained_model_name_or_path),
        "teacher_revision": revision,
        "teacher_variant": args.variant,
        "iteration": iteration,
        "pipeline_class": pipeline_class,
        "pipeline_call": pipeline_kwargs,
    }
    if args.rank:
        config |= {"rank": args.rank, "lora_alpha": args.lora_alpha, "teacher_fingerprint": teacher_fingerprint}
    if args.base_quantization != "none":
        config["base_quantization"] = args.base_quantization
    if args.rank and args.teacher_lora:
        config |= {"teacher_lora": absolute_if_local(args.teacher_lora), "teacher_lora_scale": args.teacher_lora_scale}
    if "guidance_scale" in pipeline_kwargs:
        config["guidance_scale"] = pipeline_kwargs["guidance_scale"]
    return config


def write_student_config(folder: Path, config: dict[str, Any]) -> None:
    """Write senseflow.json into a folder."""
    (folder / STUDENT_CONFIG).write_text(json.dumps(config, indent=1))


def read_student_config(source, folder: str = "") -> Optional[dict[str, Any]]:
    """Read and check senseflow.json; return None if there is none.

    Args:
        source: a senseflow.models.hub.ModelSource.
        folder: the folder of the file in the source.
    Raises:
        UserError: exit code 2; a damaged file.
    """
    config = source.read_json(str(PurePosixPath(folder, STUDENT_CONFIG)))
    if config is None:
        return None
    pixel_multiple = config.get("pixel_multiple", 1)
    for name, valid, wanted in (
        ("pipeline_call", isinstance(config.get("pipeline_call", {}), dict), "an object"),
        ("sampler", config.get("sampler", SAMPLERS[0]) in SAMPLERS, f"one of {', '.join(SAMPLERS)}"),
        ("pixel_multiple", isinstance(pixel_multiple, int) and pixel_multiple >= 1, "a whole number of pixels"),
    ):
        if not valid:
            raise source.error(f"{name} in {STUDENT_CONFIG} must be {wanted}; copy the file again")
    return config
