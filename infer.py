# Copyright 2026 The SenseFlow-scripts authors. Licensed under the Apache License, Version 2.0.
"""Draws images with a distilled student, or with any diffusers text-to-image pipeline, such as its teacher.

    python infer.py --model OUTPUT_DIR --prompts_file prompts.txt --output_dir images --grid
    python infer.py --model OUTPUT_DIR/checkpoint-3000 --prompt "a red fox in the snow"
    python infer.py --model FLUX.1-dev --transformer domiso/SenseFlow --transformer_subfolder FOLDER --released flux

How a student is called stands in its senseflow.json, or in --released for the published weights; flags override; without either
the pipeline's own defaults hold.
An image is a function of (model, settings, prompt, seed, index): neither batch size nor start index changes it. Processes under
`accelerate launch infer.py` or torchrun share the prompts out; those started by hand may draw windows of one prompts file into one
folder. A rerun draws what is missing.
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

import torch
from torch import distributed


logging.getLogger("bitsandbytes").setLevel(
    logging.ERROR
)  # which diffusers imports, and which has a note to print on some CPUs

from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, LCMScheduler
from PIL import Image, ImageDraw
from tqdm import tqdm

from senseflow.arguments import DTYPES, SAMPLERS, Parser, torch_dtype
from senseflow.errors import UserError, run_script
from senseflow.inference import (
    NETWORKS,
    RELEASED,
    Model,
    check_parts,
    find_model,
    load_model_pipeline,
    model_digest,
    pixel_multiple,
    set_released,
    swap_network,
)
from senseflow.models.schedulers import bind_generator


logger = logging.getLogger("infer")

CALL_FLAGS = ("num_inference_steps", "guidance_scale", "height", "width")
# Arguments of a pipeline that decide what comes back, or are this script's own.
NO_CALL = ("self", "prompt", "generator", "num_images_per_prompt", "output_type", "return_dict")
GRID_SIDE = 4096  # pixels; larger grids are scaled down: 1,000 images of 1024 px would take 3 GB


def number(kind: type, low: float, high: float = math.inf):
    """An argparse type: a number in [low, high]."""

    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text}: give {kind.__name__} >= {low}")
        return value

    return parse


def short_dtype(text: str) -> str:
    """An argparse type: fp32, bf16, fp16, also by their long names."""
    return next((name for name, long in DTYPES.items() if text == long), text)


def call_argument(text: str) -> tuple[str, Any]:
    """An argparse type: NAME=VALUE as (name, value); the value is a Python literal or JSON's true, false, null, else a string."""
    name, equals, value = text.partition("=")
    if not (equals and name.isidentifier()):
        raise argparse.ArgumentTypeError(f"{text}: give NAME=VALUE, such as true_cfg_scale=4")
    words = {"true": True, "false": False, "null": None}
    try:
        return name, words[value] if value in words else json.loads(
            json.dumps(ast.literal_eval(value), allow_nan=False)
        )
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return name, value


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    parser = Parser(prog="infer.py", description=__doc__.splitlines()[0])
    trained = "default: --released or senseflow.json, else the pipeline's own"
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model", required=True, help="pipeline folder, checkpoint-N folder of a training run, or Hub id"
    )
    teacher = "or of a checkpoint's teacher; default: of a teacher, what senseflow.json says"
    group.add_argument("--revision", help=f"branch, tag or commit of --model on the Hub, {teacher}")
    group.add_argument("--variant", help=f"of the weight files of --model, e.g. fp16, {teacher}")
    swap = group.add_mutually_exclusive_group()
    swap.add_argument(
        "--transformer", help="draws in place of the model's own: a folder or Hub id with config.json and weights"
    )
    swap.add_argument("--unet", help="the same, where the pipeline has a UNet")
    swap.add_argument(
        "--checkpoint", help="the same, a state dict: .safetensors, or .pth (under model, ema_model or by itself)"
    )
    subfolders, configs = zip(*((f"--{name}_subfolder", f"--{name}_config") for name in NETWORKS))
    group.add_argument(*subfolders, dest="subfolder", help="of --transformer or --unet")
    group.add_argument(*configs, dest="network_config", help="config.json of --checkpoint; default: the model's own")
    group.add_argument(
        "--released", choices=RELEASED, help="draw as these published weights want it, not as senseflow.json says"
    )
    group.add_argument(
        "--dtype", type=short_dtype, choices=DTYPES, help="of the weights; default: bf16 on a GPU, fp32 on a CPU"
    )
    group.add_argument("--device", help="a torch device; default: cuda if there is one, else cpu")
    group = parser.add_argument_group("prompts")
    source = group.add_mutually_exclusive_group()
    source.add_argument("--prompt", nargs="+", help="one image each")
    default = str(Path(__file__).with_name("prompts.txt"))
    source.add_argument(
        "--prompts_file", default=default, help="one prompt a line; default: prompts.txt beside infer.py"
    )
    group.add_argument(
        "--start_idx", type=number(int, 0), default=0, help="index of the first prompt; lines count from 0"
    )
    group.add_argument("--num_prompts", type=number(int, 1), help="how many lines from there; default: all")
    group = parser.add_argument_group("sampling")
    group.add_argument("--num_inference_steps", type=number(int, 1), help=f"forwards of the network; {trained}")
    group.add_argument("--sampler", choices=SAMPLERS, help=f"fresh noise at each level, or none; {trained}")
    group.add_argument("--guidance_scale", type=number(float, 0), help=trained)
    group.add_argument("--height", type=number(int, 1), help=f"pixels; {trained}")
    group.add_argument("--width", type=number(int, 1), help=f"pixels; {trained}")
    called = "further arguments of the pipeline's call, e.g. true_cfg_scale=4 negative_prompt=blurry"
    group.add_argument(
        "--call", type=call_argument, nargs="+", action="extend", default=[], metavar="NAME=VALUE", help=called
    )
    group.add_argument(
        "--seed", type=number(int, 0, 2**63), default=42, help="idx is drawn with seed + idx; default: 42"
    )
    group.add_argument("--batch_size", type=number(int, 1), default=1, help="images drawn at a time; default: 1")
    group = parser.add_argument_group("output")
    group.add_argument(
        "--output_dir", default="outputs", help="gets 0000.png ... and metadata.jsonl; default: outputs"
    )
    group.add_argument(
        "--grid", action="store_true", help="also write grid.png: the images in order, each with its index"
    )
    return parser.parse_args(argv)


def choose_device(args: argparse.Namespace) -> tuple[torch.device, torch.dtype]:
    """`--device` and `--dtype` or their defaults; each of several processes has a GPU of its own. UserError (2): there is none."""
    name = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and "LOCAL_RANK" in os.environ:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        device = torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: not available here; give cpu, or a device that torch sees", 2) from error
    return device, torch_dtype(args.dtype or ("fp32" if device.type == "cpu" else "bf16"))


@contextmanager
def distributed_context():
    """(rank, number of processes, wait) of a process that a launcher has started: `wait()` until all have come so far."""
    rank, world_size = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1)))
    if world_size == 1:
        yield 0, 1, lambda: None
        return
    distributed.init_process_group("gloo", timeout=timedelta(days=7))  # the slowest may have much to draw
    yield rank, world_size, distributed.barrier
    distributed.destroy_process_group()


def read_prompts(args: argparse.Namespace) -> tuple[dict[int, str], list[int]]:
    """(prompts, window): all prompts by index (place in --prompt, or line number from 0; blank lines are left out), and the
    indices in [start_idx, start_idx + num_prompts). UserError (2): no such file, not text, or no prompt there."""
    flag, lines = "--prompt", args.prompt
    if lines is None:
        flag = f"--prompts_file {args.prompts_file}"
        try:
            lines = Path(args.prompts_file).read_text(encoding="utf-8-sig").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(
                f"{flag}: cannot be read ({error}); give a UTF-8 text file, one prompt a line", 2
            ) from error
    prompts = {idx: line.strip() for idx, line in enumerate(lines) if line.strip()}
    if not prompts:
        raise UserError(f"{flag}: holds no prompt; give at least one", 2)
    stop = max(prompts) + 1 if args.num_prompts is None else args.start_idx + args.num_prompts
    window = [idx for idx in prompts if args.start_idx <= idx < stop]
    if not window:
        raise UserError(
            f"--start_idx {args.start_idx}: no prompt from there; the last one has index {max(prompts)}", 2
        )
    return prompts, window


def choose_sampler(asked: Optional[str], model: Model) -> Optional[str]:
    """The sampler; None where the scheduler is neither of the two. UserError (2) where the scheduler leaves no choice."""
    config, trained = model.config("scheduler"), model.distilled.get("sampler")
    if config.get("_class_name") == FlowMatchEulerDiscreteScheduler.__name__:
        return asked or trained or ("stochastic" if config.get("stochastic_sampling") else "euler")
    own = trained or ("stochastic" if "LCM" in config.get("_class_name", "") else None)
    if asked not in (None, own):
        raise UserError(
            f"--sampler {asked}: {config.get('_class_name')} of the model leaves no choice; drop --sampler", 2
        )
    return own


def check_call(asked: dict[str, Any], model: Model) -> None:
    """UserError (2) for a NAME of --call that the pipeline does not take, that no text can give, or that has a flag."""
    open_to = [
        name for name, kind in model.parameters.items() if kind.default is not kind.empty and name not in NO_CALL
    ]
    open_to = [name for name in open_to if not re.search("Tensor|Image|[cC]allback", str(model.parameters[name]))]
    for name in asked:
        if name in CALL_FLAGS:
            raise UserError(f"--call {name}={asked[name]}: give --{name} {asked[name]}", 2)
        if name not in open_to:
            takes = ", ".join(name for name in open_to if name not in CALL_FLAGS)
            raise UserError(
                f"--call {name}={asked[name]}: {model.index['_class_name']} takes {takes}; give one of these", 2
            )


def choose_call(args: argparse.Namespace, model: Model) -> tuple[dict[str, Any], dict[str, Any]]:
    """(call, settings): the pipeline's keyword arguments besides prompt and generator, and what of them metadata.jsonl records
    (None: the pipeline decides). UserError (2): a flag that the pipeline does not take, or a size that does not divide."""
    trained = {name: model.distilled[name] for name in CALL_FLAGS if name in model.distilled}
    trained |= model.distilled.get("pipeline_call", {})
    given, asked = (
        {name: getattr(args, name) for name in CALL_FLAGS if getattr(args, name) is not None},
        dict(args.call),
    )
    check_call(asked, model)
    for name in given:
        if name not in model.parameters:
            raise UserError(f"--{name} {given[name]}: {model.index['_class_name']} takes none; drop --{name}", 2)
    call = {name: value for name, value in (trained | given).items() if name in model.parameters}
    steps = trained.get("num_inference_steps", call.get("num_inference_steps"))
    if call.get("num_inference_steps") != steps:
        call = {name: value for name, value in call.items() if name not in ("sigmas", "timesteps")}
        logger.info("--num_inference_steps: trained for %s; the scheduler's own noise levels are used instead", steps)
    # Where a pipeline has both, guidance_scale is what it tells the network's embedder.
    if "guidance_scale" in given and "true_cfg_scale" in model.parameters:
        if model.config("transformer").get("guidance_embeds") is False:
            logger.info(
                "--guidance_scale has no effect: this network has no guidance embedder; see --call true_cfg_scale=..."
            )
    multiple = pixel_multiple(model)
    for name in ("height", "width"):
        excess = (call.get(name) or 0) % multiple
        if excess:
            raise UserError(
                f"--{name} {call[name]}: not divisible by {multiple}; {call[name] - excess + multiple} is", 2
            )
    defaults = {name: parameter.default for name, parameter in model.parameters.items()}
    settings = {name: call.get(name, defaults.get(name)) for name in CALL_FLAGS} | {"call": asked or None}
    check_steps(settings["num_inference_steps"], model)
    return call | asked, settings


def check_steps(steps: Optional[int], model: Model) -> None:
    """UserError (2) for more steps than LCM's schedule has; makes one step possible where the scheduler sets the last level."""
    config = model.config("scheduler")
    most = config.get("original_inference_steps") if config.get("_class_name") == LCMScheduler.__name__ else None
    if most and steps and steps > most:
        raise UserError(f"--num_inference_steps {steps}: this LCMScheduler has {most}; give {most} or fewer", 2)
    if steps == 1 and config.get("shift_terminal"):
        model.scheduler["shift_terminal"] = None  # stretching a single level divides 0 by 0


def draw(pipeline: DiffusionPipeline, prompts: list[str], seeds: list[int], call: dict[str, Any]) -> list[Image.Image]:
    """One batch. An image's noise, initial and stochastic, comes from its own seed alone: one CPU generator an image."""
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    bind_generator(
        pipeline.scheduler, generators
    )  # FLUX and SD 3 call `step` without one; it would draw from the global one
    for name, value in call.items():  # one text for a whole batch: not every pipeline repeats it
        if isinstance(value, str) and re.fullmatch(r"(negative_)?prompt(_\d)?", name):
            call = call | {name: [value] * len(prompts)}
    try:
        return pipeline(prompt=prompts, generator=generators, **call).images
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"--batch_size {len(prompts)}: out of memory; give a smaller one, or smaller images"
        ) from error


def write_aside(path: Path, write) -> None:
    """`write(temporary path)`, then renames: `path` is there completely or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    write(temporary)
    os.replace(temporary, path)


def open_folder(folder: Path) -> list[dict[str, Any]]:
    """Makes the folder; returns the lines of metadata.jsonl whose image is there: only with its line is an image drawn.

    Lines that a kill has cut, or whose image is gone, are removed. UserError (2) if it cannot be a folder.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output_dir {folder}: cannot be a folder ({error.strerror}); give another", 2) from error
    path, records = folder / "metadata.jsonl", []
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    for line in text.split("\n"):
        try:
            record = json.loads(line)
            if (folder / f"{record['idx']:04d}.png").is_file():
                records.append(record)
        except (ValueError, TypeError, KeyError):
            continue
    kept = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    if kept != text:
        write_aside(path, lambda temporary: temporary.write_text(kept, encoding="utf-8"))
    return records


def refuse_other_settings(
    folder: Path, records: list[dict], settings: dict[str, Any], prompts: dict[int, str]
) -> None:
    """UserError (2) if the folder holds an image that these settings and prompts would not give."""
    for record in records:
        wanted = settings | {"prompt": prompts.get(record["idx"], record.get("prompt"))}
        name = next((name for name, value in wanted.items() if record.get(name) != value), None)
        if name is not None:
            there = f"{record['idx']:04d}.png there was drawn with {name} {record.get(name)}, not {wanted[name]}"
            raise UserError(f"--output_dir {folder}: {there}; give another folder or empty this one", 2)


def save_image(folder: Path, image: Image.Image, record: dict[str, Any]) -> None:
    """Writes an image, then its line, so that a kill leaves at most an image without a line, which the next run redraws."""
    try:
        write_aside(folder / record["file_name"], lambda temporary: image.save(temporary, format="PNG"))
        # One unbuffered write: processes that share the folder do not mix their lines.
        with open(folder / "metadata.jsonl", "ab", buffering=0) as stream:
            stream.write((json.dumps(record, ensure_ascii=False) + "\n").encode())
    except OSError as error:
        raise UserError(
            f"--output_dir {folder}: cannot be written ({error.strerror}); make room or give another"
        ) from error


def make_grid(folder: Path, indices: Sequence[int]) -> Image.Image:
    """The images in order, row by row, near square; each with its index beneath."""
    columns, label = math.ceil(math.sqrt(len(indices))), 14
    grid = None
    for place, idx in enumerate(indices):
        image = Image.open(folder / f"{idx:04d}.png").convert("RGB")
        image.thumbnail((GRID_SIDE // columns, GRID_SIDE // columns))
        width, height = image.width, image.height + label
        grid = grid or Image.new("RGB", (columns * width, math.ceil(len(indices) / columns) * height), "white")
        left, top = place % columns * width, place // columns * height
        grid.paste(image, (left, top))
        ImageDraw.Draw(grid).text((left + 2, top + image.height + 1), str(idx), fill="black")
    return grid


def main(argv: Optional[Sequence[str]] = None) -> None:
    args = parse_args(argv)
    # 1. Whatever can be wrong is found before any weight loads.
    prompts, window = read_prompts(args)
    device, dtype = choose_device(args)
    model = find_model(args.model, args.revision, args.variant)
    swap_network(args, model)
    if args.released is not None:
        set_released(args.released, model)
    check_parts(model, args.variant)
    call, settings = choose_call(args, model)
    settings |= {"sampler": choose_sampler(args.sampler, model), "seed": args.seed}
    settings |= {"dtype": str(dtype).removeprefix("torch."), "weights": model_digest(model)}
    folder = Path(args.output_dir)
    source = {"model": args.model, "network": model.swapped and " ".join(model.swapped), "released": args.released}
    with distributed_context() as (rank, world_size, wait):
        if rank > 0:
            wait()  # the first process mends the folder, alone
        records = open_folder(folder)
        if rank == 0:
            wait()
        refuse_other_settings(folder, records, settings, prompts)
        wait()  # nobody writes before all have looked

        # 2. What is not there yet is drawn, by several processes in turns.
        missing = sorted(set(window) - {record["idx"] for record in records})
        done, missing = len(window) - len(missing), missing[rank::world_size]
        pipeline = load_model_pipeline(model, settings["sampler"], device, dtype) if missing else None
        with tqdm(total=done + len(missing), initial=done, unit="image", disable=rank > 0) as progress:
            for start in range(0, len(missing), args.batch_size):
                batch = missing[start : start + args.batch_size]
                try:
                    images = draw(pipeline, [prompts[idx] for idx in batch], [args.seed + idx for idx in batch], call)
                except (ValueError, TypeError, AttributeError, RuntimeError) as error:
                    if not args.call:
                        raise
                    shown = " ".join(f"{name}={value}" for name, value in args.call)
                    raise UserError(
                        f"--call {shown}: {type(pipeline).__name__} cannot be called so ({error})"
                    ) from error
                for idx, image in zip(batch, images):
                    record = {"file_name": f"{idx:04d}.png", "idx": idx, "prompt": prompts[idx], **settings, **source}
                    save_image(folder, image, record)
                progress.update(len(batch))
        wait()
        if args.grid and rank == 0:
            grid = make_grid(folder, window)
            write_aside(folder / "grid.png", lambda temporary: grid.save(temporary, format="PNG"))


if __name__ == "__main__":
    logging.basicConfig(format="%(message)s")
    for known in (logger, logging.getLogger("senseflow.inference")):
        known.setLevel(logging.INFO)
    run_script(main)
