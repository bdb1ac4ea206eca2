# Copyright 2026 The SenseFlow-scripts authors. Licensed under the Apache License, Version 2.0.
"""Generate images with a distilled student, or with any text-to-image pipeline of diffusers, such as its teacher.

    python infer.py --model OUTPUT_DIR --prompts_file prompts.txt --output_dir images --grid
    python infer.py --model OUTPUT_DIR/checkpoint-3000 --prompt "a red fox in the snow"
    python infer.py --model FLUX.1-dev --transformer domiso/SenseFlow --transformer_subfolder FOLDER --released flux

An image depends on model, settings, prompt, seed and index only, not on batch size or start index. Several processes,
started by `accelerate launch infer.py` or torchrun, share the prompts. A rerun generates the missing images.
"""

import argparse
import ast
import json
import logging
import math
import os
import re
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, Optional, Sequence

from senseflow.arguments import (
    DTYPES,
    SAMPLERS,
    Parser,
    attention_backend,
    dtype,
    number,
    torch_device,
    torch_dtype,
)
from senseflow.data.prompts import read_lines, read_prompts_file
from senseflow.errors import UserError, check_launcher, check_writable, run_script, write_atomically
from senseflow.released import RELEASED


# Flags that are arguments of the pipeline's call, too.
CALL_FLAGS = ("num_inference_steps", "guidance_scale", "height", "width")
# Arguments of the pipeline's call that this script sets, or that change the type of the result.
RESERVED = ("self", "prompt", "generator", "num_images_per_prompt", "output_type", "return_dict")
SEED_STEP = 10**6  # from an image of a prompt to the next: larger than the index of a prompt
GRID_SIDE = 4096  # pixels; images in grid.png are scaled down to it: 1,000 of 1024 pixels would take 3 GB


def pipeline_argument(text: str) -> tuple[str, Any]:
    """Parse NAME=VALUE, an argparse type; VALUE is a Python literal, true, false or null, else a string."""
    name, equals, value = text.partition("=")
    if not (equals and name.isidentifier()):
        raise argparse.ArgumentTypeError(f"must be NAME=VALUE, such as true_cfg_scale=4, not {text}")
    literal = {"true": "True", "false": "False", "null": "None"}.get(value, value)
    try:  # by way of JSON, as it is read back from metadata.jsonl
        return name, json.loads(json.dumps(ast.literal_eval(literal), allow_nan=False))
    except (ValueError, SyntaxError, TypeError):
        return name, value


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    parser = Parser(
        prog="infer.py",
        description=__doc__.splitlines()[0],
        epilog="The defaults of --num_inference_steps, --sampler, --guidance_scale, --height and --width are those of "
        "--released or in the model's senseflow.json, else the pipeline's own.",
    )
    add = parser.add_argument_group("model").add_argument
    add("--model", required=True, help="Pipeline folder, checkpoint-N folder of a training run, or Hub id.")
    add("--revision", help="Branch, tag or commit of --model on the Hub, or of the teacher of a checkpoint.")
    add("--variant", help="Variant of the weight files of --model or of a checkpoint's teacher, e.g. fp16.")
    network = parser.add_argument_group("another network in the place of the model's own")
    add_one_of = network.add_mutually_exclusive_group().add_argument
    add_one_of("--transformer", help="Folder or Hub id with config.json and weights.")
    add_one_of("--unet", help="The same for a pipeline with a UNet.")
    add_one_of("--checkpoint", help="State dict: .safetensors, or .pth (by itself, or under model or ema_model).")
    network.add_argument(
        "--transformer_subfolder", "--unet_subfolder", metavar="FOLDER", help="Folder of it in there."
    )
    network.add_argument(
        "--transformer_config",
        "--unet_config",
        metavar="FILE",
        help="Configuration of --checkpoint, if not --model's.",
    )
    add("--released", choices=RELEASED, help="Use the preset of these published weights, not senseflow.json.")
    add("--dtype", type=dtype, choices=DTYPES, help="Precision of the weights; default: bf16 on a GPU, fp32 on a CPU.")
    add("--attention_backend", type=attention_backend, metavar="NAME",
        help="Attention kernel of the network, as in training; default: torch's choice among its own.")  # fmt: skip
    add("--device", help="Torch device; default: cuda if there is one, else cpu.")
    group = parser.add_argument_group("prompts")
    source = group.add_mutually_exclusive_group()
    source.add_argument("--prompt", nargs="+", help="One or more prompts; one image each.")
    default = str(Path(__file__).with_name("prompts.txt"))
    source.add_argument("--prompts_file", default=default, help="Text file with one prompt a line.")
    add = group.add_argument
    add("--start_idx", type=number(int, 0), default=0, help="Index of the first prompt; lines count from 0.")
    add("--num_prompts", type=number(int, 1), help="Number of lines from there; default: all.")
    add = parser.add_argument_group("sampling").add_argument
    add("--num_inference_steps", type=number(int, 1), help="Steps, that is forward passes of the student.")
    add("--sampler", choices=SAMPLERS, help="stochastic: fresh noise at each level. euler: none.")
    add("--guidance_scale", type=number(float, 0), help="Guidance scale, as in the pipeline's call.")
    add("--height", type=number(int, 1), help="Height in pixels.")
    add("--width", type=number(int, 1), help="Width in pixels.")
    add("--pipeline_kwargs", type=pipeline_argument, nargs="+", action="extend", metavar="NAME=VALUE",
        help="Further arguments of the pipeline's call, e.g. true_cfg_scale=4 negative_prompt=blurry.")  # fmt: skip
    add("--num_images_per_prompt", type=number(int, 1), default=1, help="Images of each prompt, by default 1.")
    add("--seed", type=number(int, 0, 2**63), default=42,
        help=f"Image k of prompt idx, both from 0, is generated with the seed + idx + {SEED_STEP} k.")  # fmt: skip
    add("--batch_size", type=number(int, 1), default=1, help="Images generated at a time.")
    add = parser.add_argument_group("output").add_argument
    add("--output_dir", default="outputs",
        help="Folder for 0000.png, 0001.png, ... of the prompts, their further images 0000_1.png, ..., and "
        "metadata.jsonl.")  # fmt: skip
    add("--grid", action="store_true", help="Also write grid.png: the images in order, each with its name.")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_script(parse_args)  # answer --help and bad arguments before the slow imports

import numpy as np
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, LCMScheduler
from diffusers.utils import make_image_grid
from PIL import Image, ImageDraw, ImageOps
from torch import distributed
from tqdm import tqdm

from senseflow.inference import (
    Model,
    check_attention,
    find_model,
    hash_model,
    load_model_pipeline,
    pixel_multiple,
)
from senseflow.models.hub import ModelSource
from senseflow.models.schedulers import bind_generator
from senseflow.models.vae import over_white


logger = logging.getLogger("infer")


def choose_device(args: argparse.Namespace) -> tuple[torch.device, str]:
    """Return the device and a key of DTYPES; each process has its own GPU. UserError (2) for an absent device."""
    name = args.device
    if name in (None, "cuda") and "LOCAL_RANK" in os.environ and torch.cuda.is_available():
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    device = torch_device(name)
    return device, args.dtype or ("fp32" if device.type == "cpu" else "bf16")


def read_prompts(args: argparse.Namespace) -> tuple[dict[int, str], list[int]]:
    """Read the prompts. UserError (2) if the file is unreadable or no prompt is selected.

    Returns:
        All prompts by index, which is the place in --prompt or the line number; blank lines are left out.
        The indices that --start_idx and --num_prompts select.
    """
    lines = read_prompts_file(args.prompts_file) if args.prompt is None else args.prompt
    prompts = {idx: line.strip() for idx, line in enumerate(lines) if line.strip()}
    if not prompts:
        raise UserError("--prompt: has no text; give at least one prompt", exit_code=2)
    stop = max(prompts) + 1 if args.num_prompts is None else args.start_idx + args.num_prompts
    selected = [idx for idx in prompts if args.start_idx <= idx < stop]
    if not selected:
        raise UserError(f"--start_idx {args.start_idx}: no prompt from there; the last has index {max(prompts)}", 2)
    return prompts, selected


def choose_network(args: argparse.Namespace) -> Optional[ModelSource]:
    """Return the network that replaces the model's own, if any."""
    for name in ("transformer", "unet", "checkpoint"):
        if getattr(args, name) is not None:
            return ModelSource(f"--{name}", getattr(args, name))
    return None


def choose_sampler(sampler: Optional[str], model: Model) -> Optional[str]:
    """Return --sampler or its default; None for other schedulers. UserError (2) if the scheduler leaves no choice."""
    scheduler, trained = model.config("scheduler"), model.student_config.get("sampler")
    class_name = scheduler.get("_class_name", "")
    if class_name == FlowMatchEulerDiscreteScheduler.__name__:
        return sampler or trained or ("stochastic" if scheduler.get("stochastic_sampling") else "euler")
    only = trained or ("stochastic" if "LCM" in class_name else None)
    if sampler not in (None, only):
        raise UserError(f"--sampler {sampler}: the model's {class_name} has no such choice; drop --sampler", 2)
    return only


def choose_pipeline_kwargs(args: argparse.Namespace, model: Model) -> dict[str, Any]:
    """Return the pipeline's arguments besides prompt and generator: those of the training, replaced by flags.

    Raises:
        UserError: exit code 2; an argument that the pipeline does not take, or a size that does not divide.
    """
    parameters, trained = model.call_parameters, model.student_config.get("pipeline_call", {})
    flags = {name: getattr(args, name) for name in CALL_FLAGS if getattr(args, name) is not None}
    flags |= dict(args.pipeline_kwargs or ())
    for name, value in flags.items():
        if name not in parameters or name in RESERVED:
            flag = f"--{name} {value}" if name in CALL_FLAGS else f"--pipeline_kwargs {name}={value}"
            names = ", ".join(name for name in parameters if name not in RESERVED)
            raise UserError(f"{flag}: {model.class_name} does not take it; it takes {names}", exit_code=2)
    steps = trained.get("num_inference_steps")
    if steps not in (None, flags.get("num_inference_steps", steps)):
        trained = {name: value for name, value in trained.items() if name not in ("sigmas", "timesteps")}
        logger.info("--num_inference_steps: trained for %s; the scheduler's own noise levels are used instead", steps)
    # In a pipeline with true_cfg_scale, guidance_scale is the input of the network's guidance embedder.
    if "guidance_scale" in flags and "true_cfg_scale" in parameters:
        if model.config("transformer").get("guidance_embeds") is False:
            fix = "see --pipeline_kwargs true_cfg_scale=..."
            logger.info("--guidance_scale: no effect, since this network has no guidance embedder; %s", fix)
    kwargs, multiple = trained | flags, pixel_multiple(model)
    for name in ("height", "width"):
        excess = (kwargs.get(name) or 0) % multiple
        if excess:
            fix = f"give {kwargs[name] - excess + multiple}"
            raise UserError(f"--{name} {kwargs[name]}: must be divisible by {multiple}; {fix}", exit_code=2)
    return kwargs


def fit_scheduler(model: Model, steps: Optional[int]) -> None:
    """Make one step possible for a scheduler that fixes the last level. UserError (2) for more steps than LCM has."""
    scheduler = model.config("scheduler")
    limit = scheduler.get("original_inference_steps")
    if steps and limit and steps > limit and scheduler["_class_name"] == LCMScheduler.__name__:
        problem = f"this LCMScheduler has {limit}; give {limit} or fewer"
        raise UserError(f"--num_inference_steps {steps}: {problem}", exit_code=2)
    if steps == 1 and scheduler.get("shift_terminal"):
        model.scheduler_changes["shift_terminal"] = None  # to stretch a single level divides 0 by 0


def generate(
    pipeline: DiffusionPipeline, prompts: list[str], seeds: list[int], kwargs: dict[str, Any]
) -> list[Image.Image]:
    """Generate a batch of images, each with noise from its own seed: one CPU generator per image.

    UserError (exit code 1) if the memory does not suffice, or an image holds NaN.
    """
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    bind_generator(pipeline.scheduler, generators)  # the pipelines of FLUX and SD 3 call `step` without a generator
    for name, value in kwargs.items():  # not every pipeline repeats a second or negative prompt
        if isinstance(value, str) and re.fullmatch(r"(negative_)?prompt(_\d)?", name):
            kwargs = kwargs | {name: [value] * len(prompts)}
    try:
        images = pipeline(prompt=prompts, generator=generators, **kwargs | {"output_type": "np"}).images
    except torch.OutOfMemoryError as error:
        problem = "out of memory; give a smaller one, or smaller images"
        raise UserError(f"--batch_size {len(prompts)}: {problem}") from error
    for prompt, image in zip(prompts, images):
        if not np.isfinite(image).all():  # it would be saved as black
            name = str(pipeline.dtype).removeprefix("torch.")
            problem = f"the image of {prompt[:60]!r} holds NaN and is not saved"
            cause = "a value too large for float16, or damaged weights; give bf16 or fp32, or another model"
            raise UserError(f"--dtype {name}: {problem}: {cause}")
    return pipeline.numpy_to_pil(images)


def image_name(idx: int, k: int) -> str:
    """Return the file name of image k of prompt idx."""
    return f"{idx:04d}_{k}.png" if k else f"{idx:04d}.png"


def image_key(record: dict[str, Any]) -> tuple[int, int]:
    """Return (idx of the prompt, k) of a record in metadata.jsonl."""
    return record["idx"], record.get("image_idx", 0)


def open_folder(folder: Path) -> list[dict[str, Any]]:
    """Make the output folder and return the records in metadata.jsonl of the images that are there.

    Lines that a kill has cut, or whose image is gone, are removed. UserError (2) if it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output_dir {folder}: cannot be a folder ({error.strerror}); give another", 2) from error
    path, records = folder / "metadata.jsonl", []
    check_writable("--output_dir", path)
    lines = read_lines(path, errors="replace") if path.exists() else [""]
    for line in lines:
        try:
            record = json.loads(line)
            if (folder / image_name(*image_key(record))).is_file():
                records.append(record)
        except (ValueError, TypeError, KeyError):
            continue
    kept = [*(json.dumps(record, ensure_ascii=False) for record in records), ""]
    if kept != lines:
        write_atomically(path, lambda temporary: temporary.write_text("\n".join(kept), encoding="utf-8"))
    return records


def check_records(folder: Path, records: list[dict], settings: dict[str, Any], prompts: dict[int, str]) -> None:
    """Refuse (exit code 2) a folder with an image that was generated with other settings or another prompt."""
    for record in records:
        wanted = settings | {"prompt": prompts.get(record["idx"], record.get("prompt"))}
        name = next((name for name, value in wanted.items() if record.get(name) != value), None)
        if name is not None:
            file = image_name(*image_key(record))
            problem = f"{file} was generated with {name} {record.get(name)}, not {wanted[name]}"
            raise UserError(f"--output_dir {folder}: {problem}; give another folder or empty this one", exit_code=2)


def save_image(folder: Path, image: Image.Image, record: dict[str, Any]) -> None:
    """Write an image, then its line: after a kill in between, the next run generates the image again."""
    try:
        write_atomically(folder / record["file_name"], lambda temporary: image.save(temporary, format="PNG"))
        # In one unbuffered write, so that processes that share the folder do not mix their lines.
        with open(folder / "metadata.jsonl", "ab", buffering=0) as stream:
            stream.write((json.dumps(record, ensure_ascii=False) + "\n").encode())
    except OSError as error:
        problem = f"cannot be written ({error.strerror}); make room or give another"
        raise UserError(f"--output_dir {folder}: {problem}") from error


def write_grid(folder: Path, keys: Sequence[tuple[int, int]], images_per_prompt: int) -> None:
    """Write grid.png: images (idx, k) row by row, near square, those of a prompt in one row, each with its name."""
    columns = images_per_prompt * math.ceil(math.sqrt(len(keys)) / images_per_prompt)
    label_height, images = 14, []
    for name in (image_name(*key) for key in keys):
        image = over_white(Image.open(folder / name))
        image.thumbnail((GRID_SIDE // columns, GRID_SIDE // columns))
        image = ImageOps.expand(image, (0, 0, 0, label_height), fill="white")
        ImageDraw.Draw(image).text((2, image.height - label_height + 1), Path(name).stem, fill="black")
        images.append(image)
    rows = math.ceil(len(images) / columns)
    images += [Image.new("RGB", images[0].size, "white")] * (rows * columns - len(images))
    grid = make_image_grid(images, rows, columns)
    write_atomically(folder / "grid.png", lambda temporary: grid.save(temporary, format="PNG"))


@contextmanager
def process_group():
    """Join the processes that a launcher started, if any: yield rank, number of processes and a barrier."""
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world_size == 1:
        yield 0, 1, lambda: None
        return
    check_launcher()
    distributed.init_process_group("gloo", timeout=timedelta(days=7))  # processes wait for the slowest at the end
    yield rank, world_size, distributed.barrier
    distributed.destroy_process_group()


def main(argv: Optional[Sequence[str]] = None) -> None:
    args = parse_args(argv)

    # 1. Find the model and check all settings, before any weights load.
    prompts, selected = read_prompts(args)
    device, precision = choose_device(args)
    network, subfolder = choose_network(args), args.transformer_subfolder or ""
    if subfolder and (network is None or args.checkpoint):
        logger.warning("--transformer_subfolder %s: no effect without --transformer or --unet", subfolder)
    if args.transformer_config and not args.checkpoint:
        logger.warning("--transformer_config %s: no effect without --checkpoint", args.transformer_config)
    model = find_model(
        args.model, args.revision, args.variant, network, subfolder, args.transformer_config, args.released
    )
    if args.attention_backend is not None:
        check_attention(model, args.attention_backend, device, torch_dtype(precision))
    sampler, kwargs = choose_sampler(args.sampler, model), choose_pipeline_kwargs(args, model)
    defaults = {name: parameter.default for name, parameter in model.call_parameters.items()}
    settings = {name: kwargs.get(name, defaults.get(name)) for name in CALL_FLAGS}
    fit_scheduler(model, settings["num_inference_steps"])
    settings |= {"pipeline_kwargs": dict(args.pipeline_kwargs or ()), "sampler": sampler, "seed": args.seed}
    settings |= {"dtype": DTYPES[precision], "weights": hash_model(model)}
    settings |= {"attention_backend": args.attention_backend}
    network_name = network and f"{network}/{subfolder}".rstrip("/")
    origin = {"model": args.model, "network": network_name, "released": args.released}

    folder = Path(args.output_dir)
    with process_group() as (rank, world_size, barrier):
        if rank > 0:
            barrier()  # the first process alone removes damaged lines
        records = open_folder(folder)
        if rank == 0:
            barrier()
        check_records(folder, records, settings, prompts)
        barrier()  # nobody writes before all have read

        # 2. Generate the missing images, each process its share.
        wanted = [(idx, k) for idx in selected for k in range(args.num_images_per_prompt)]
        missing = sorted(set(wanted) - set(map(image_key, records)))
        num_done, missing = len(wanted) - len(missing), missing[rank::world_size]
        pipeline, weight_dtype = None, torch_dtype(precision)
        if missing:
            pipeline = load_model_pipeline(model, sampler, device, weight_dtype, args.attention_backend)
        with tqdm(total=num_done + len(missing), initial=num_done, unit="image", disable=rank > 0) as progress:
            for start in range(0, len(missing), args.batch_size):
                batch = missing[start : start + args.batch_size]
                seeds = [args.seed + idx + SEED_STEP * k for idx, k in batch]
                try:
                    images = generate(pipeline, [prompts[idx] for idx, _ in batch], seeds, kwargs)
                except (ValueError, TypeError, AttributeError, RuntimeError) as error:
                    if not args.pipeline_kwargs:
                        raise
                    shown = " ".join(f"{name}={value}" for name, value in args.pipeline_kwargs)
                    raise UserError(f"--pipeline_kwargs {shown}: {model.class_name} fails ({error})") from error
                for (idx, k), image in zip(batch, images):
                    record = {"file_name": image_name(idx, k), "idx": idx, "image_idx": k, "prompt": prompts[idx]}
                    save_image(folder, image, record | settings | origin)
                progress.update(len(batch))
        barrier()
        if args.grid and rank == 0:
            write_grid(folder, wanted, args.num_images_per_prompt)


if __name__ == "__main__":
    logging.basicConfig(format="%(message)s")
    for name in ("infer", "senseflow.inference"):
        logging.getLogger(name).setLevel(logging.INFO)
    run_script(main)
