# Copyright 2026 The SenseFlow-scripts authors. Licensed under the Apache License, Version 2.0.
"""Draws pictures with a distilled student, or with any diffusers text-to-image pipeline, such as its teacher.

    python infer.py --model OUTPUT_DIR --prompts_file prompts.txt --output_dir pictures --grid
    python infer.py --model OUTPUT_DIR/checkpoint-3000 --prompt "a red fox in the snow"

How a student is called stands in its senseflow.json, flags override; without that file the pipeline's own defaults hold.
A picture is a function of (model, settings, prompt, seed, index): neither batch size nor start index changes it, and several
processes may draw windows of one prompts file into one folder. A rerun draws what is missing.
"""

import argparse
import functools
import hashlib
import inspect
import json
import logging
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Mapping, Optional, Sequence

import diffusers
import torch
import transformers
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from huggingface_hub import constants, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from PIL import Image, ImageDraw
from tqdm import tqdm

from senseflow_pipeline import left_out
from senseflow_runtime import Parser, UserError, loading, run_script
from senseflow_utils import SAMPLERS


logger = logging.getLogger("infer")

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
CALL_FLAGS = ("num_inference_steps", "guidance_scale", "height", "width")
GRID_SIDE = 4096  # pixels; larger grids are scaled down: 1,000 pictures of 1024 px would take 3 GB


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


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    parser = Parser(prog="infer.py", description=__doc__.splitlines()[0])
    trained = "default: senseflow.json, else the pipeline's own"
    group = parser.add_argument_group("model")
    group.add_argument("--model", required=True, help="pipeline folder, checkpoint-N folder of a training run, or Hub id")
    group.add_argument("--dtype", choices=DTYPES, help="of the weights; default: bfloat16 on a GPU, float32 on a CPU")
    group.add_argument("--device", help="a torch device; default: cuda if there is one, else cpu")
    group = parser.add_argument_group("prompts")
    source = group.add_mutually_exclusive_group()
    source.add_argument("--prompt", nargs="+", help="one picture each")
    default = str(Path(__file__).with_name("prompts.txt"))
    source.add_argument("--prompts_file", default=default, help="one prompt a line; default: prompts.txt beside infer.py")
    group.add_argument("--start_idx", type=number(int, 0), default=0, help="index of the first prompt; lines count from 0")
    group.add_argument("--num_prompts", type=number(int, 1), help="how many lines from there; default: all")
    group = parser.add_argument_group("sampling")
    group.add_argument("--num_inference_steps", type=number(int, 1), help=f"forwards of the network; {trained}")
    group.add_argument("--sampler", choices=SAMPLERS, help=f"fresh noise at each level, or none; {trained}")
    group.add_argument("--guidance_scale", type=number(float, 0), help=trained)
    group.add_argument("--height", type=number(int, 1), help=f"pixels; {trained}")
    group.add_argument("--width", type=number(int, 1), help=f"pixels; {trained}")
    group.add_argument("--seed", type=number(int, 0, 2**63), default=42, help="idx is drawn with seed + idx; default: 42")
    group.add_argument("--batch_size", type=number(int, 1), default=1, help="pictures drawn at a time; default: 1")
    group = parser.add_argument_group("output")
    group.add_argument("--output_dir", default="outputs", help="gets 0000.png ... and metadata.jsonl; default: outputs")
    group.add_argument("--grid", action="store_true", help="also write grid.png: the pictures in order, each with its index")
    return parser.parse_args(argv)


def choose_device(args: argparse.Namespace) -> tuple[torch.device, torch.dtype]:
    """`--device` and `--dtype` or their defaults. UserError (2) if there is no such device."""
    name = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: not available here; give cpu, or a device that torch sees", 2) from error
    return device, DTYPES[args.dtype or ("float32" if device.type == "cpu" else "bfloat16")]


def read_prompts(args: argparse.Namespace) -> tuple[dict[int, str], list[int]]:
    """(prompts, window): all prompts by index (place in --prompt, or line number from 0; blank lines are left out), and the
    indices in [start_idx, start_idx + num_prompts). UserError (2): no such file, not text, or no prompt there."""
    flag, lines = "--prompt", args.prompt
    if lines is None:
        flag = f"--prompts_file {args.prompts_file}"
        try:
            lines = Path(args.prompts_file).read_text(encoding="utf-8-sig").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{flag}: cannot be read ({error}); give a UTF-8 text file, one prompt a line", 2) from error
    prompts = {idx: line.strip() for idx, line in enumerate(lines) if line.strip()}
    if not prompts:
        raise UserError(f"{flag}: holds no prompt; give at least one", 2)
    stop = max(prompts) + 1 if args.num_prompts is None else args.start_idx + args.num_prompts
    window = [idx for idx in prompts if args.start_idx <= idx < stop]
    if not window:
        raise UserError(f"--start_idx {args.start_idx}: no prompt from there; the last one has index {max(prompts)}", 2)
    return prompts, window


def read_json(source: str, file: str, origin: str = "--model") -> Optional[dict]:
    """One JSON file of a model folder or Hub repository; None if the model has no such file.

    UserError (2): no such folder, a Hub id that cannot be reached, a damaged file; `origin` says what named `source`.
    """
    path = Path(source) / file
    if not os.path.isdir(source):
        # "demo/teacher" has the form of a Hub id, but where demo/ is a folder it is a path with a slip.
        if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", source) or os.path.isdir(source.split("/")[0]):
            raise UserError(f"{origin} {source}: no such folder; give a pipeline or checkpoint folder, or a Hub id", 2)
        try:
            path = Path(hf_hub_download(source, file))
        except (OSError, ValueError) as error:
            absent = isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError)
            if absent or (constants.HF_HUB_OFFLINE and file != "model_index.json"):
                return None
            raise UserError(f"{origin} {source}: no such folder, nor a model on the Hub that can be reached", 2) from error
    if not path.is_file():
        return None
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise UserError(f"{origin} {source}: {file} is damaged ({error}); copy it again", 2) from error


@dataclass
class Model:
    """A pipeline, or a checkpoint to which its teacher lends the rest of the pipeline."""

    name: str  # `--model` as given
    base: str  # folder or Hub id of the whole pipeline: the model itself, or a checkpoint's teacher
    index: dict[str, Any]  # the base's model_index.json
    parameters: Mapping[str, inspect.Parameter]  # of the pipeline's call
    distilled: dict[str, Any]  # senseflow.json; empty for a model that was not trained here
    replaced: dict[str, Path]  # folders of the components that come from elsewhere than the base

    def config(self, component: str) -> dict[str, Any]:
        """A component's configuration; empty if the pipeline has no such component."""
        file = "scheduler_config.json" if component == "scheduler" else "config.json"
        if component in self.replaced:
            return read_json(str(self.replaced[component]), file) or {}
        return (read_json(self.base, f"{component}/{file}") or {}) if component in self.index else {}


def find_model(name: str) -> Model:
    """Reads what `--model` is. UserError (2): unknown, damaged, or neither a pipeline nor a checkpoint."""
    index, distilled = read_json(name, "model_index.json"), read_json(name, "senseflow.json") or {}
    base, replaced = name, {}
    if index is None:
        base = distilled.get("teacher")
        if not isinstance(base, str):
            raise UserError(f"--model {name}: has neither model_index.json nor a senseflow.json that names a teacher", 2)
        index = read_json(base, "model_index.json", f"--model {name}: the teacher in its senseflow.json,")
        if index is None:
            raise UserError(f"--model {name}: the teacher in its senseflow.json, {base}, has no model_index.json", 2)
        replaced = {part: Path(name) / part for part in index if (Path(name) / part).is_dir()}
    class_name, call = str(index.get("_class_name")), distilled.get("pipeline_call", {})
    parameters = inspect.signature(getattr(diffusers, class_name, DiffusionPipeline).__call__).parameters
    if "prompt" not in parameters:
        raise UserError(f"--model {name}: {class_name} is no text-to-image pipeline of diffusers {diffusers.__version__}", 2)
    if not isinstance(call, dict) or set(call) - set(parameters):
        raise UserError(f"--model {name}: pipeline_call in senseflow.json is no call of {class_name}; copy the file again", 2)
    if distilled.get("sampler", "euler") not in SAMPLERS:
        raise UserError(f"--model {name}: sampler in senseflow.json must be one of {SAMPLERS}; copy the file again", 2)
    named = {part for part, entry in index.items() if isinstance(entry, list) and entry[0]}
    lacking = sorted(part for part in named - set(replaced) if os.path.isdir(base) and not Path(base, part).is_dir())
    if lacking:
        raise UserError(f"--model {name}: {base} lacks {lacking[0]}, which its model_index.json names; copy it again", 2)
    return Model(name, base, index, parameters, distilled, replaced)


def fingerprint(model: Model) -> str:
    """12 hex digits that tell retrained weights from the same ones: sizes, small files, and 64 blocks of each large file.

    What comes from the Hub is known by its commit, the folder in which the Hub's cache holds it.
    """
    digest = hashlib.sha256(json.dumps(model.distilled, sort_keys=True).encode())
    folders = {part: Path(model.base) / part for part in model.index} | model.replaced
    if not os.path.isdir(model.base):
        digest.update(Path(hf_hub_download(model.base, "model_index.json")).parent.name.encode())
    for file in sorted(file for folder in folders.values() for file in folder.glob("*") if file.is_file()):
        size = file.stat().st_size
        digest.update(f"{file.parent.name}/{file.name} {size}".encode())
        with open(file, "rb") as stream:
            for position in range(0, size, max(4096, size // 64)):
                stream.seek(position)
                digest.update(stream.read(4096))
    return digest.hexdigest()[:12]


def pixel_multiple(model: Model) -> int:
    """What height and width must be divisible by: the VAE's factor times the network's patch."""
    vae, network = model.config("vae"), model.config("transformer") or model.config("unet")
    blocks = next((vae[key] for key in ("block_out_channels", "encoder_block_out_channels", "dim_mult") if key in vae), [1])
    channels = network.get("in_channels", 1)
    # FLUX and its like fold 2 x 2 latents into channels before the network, whose own patch_size then does not count.
    packed = math.isqrt(channels // (vae.get("latent_channels") or vae.get("z_dim") or channels))
    return 2 ** (len(blocks) - 1) * (packed if packed > 1 else network.get("patch_size") or 1)


def choose_sampler(asked: Optional[str], model: Model) -> Optional[str]:
    """The sampler; None where the scheduler is neither of the two. UserError (2) where the scheduler leaves no choice."""
    config, trained = model.config("scheduler"), model.distilled.get("sampler")
    if config.get("_class_name") == FlowMatchEulerDiscreteScheduler.__name__:
        return asked or trained or ("stochastic" if config.get("stochastic_sampling") else "euler")
    own = trained or ("stochastic" if "LCM" in config.get("_class_name", "") else None)
    if asked not in (None, own):
        raise UserError(f"--sampler {asked}: {config.get('_class_name')} of the model leaves no choice; drop --sampler", 2)
    return own


def choose_call(args: argparse.Namespace, model: Model) -> tuple[dict[str, Any], dict[str, Any]]:
    """(call, settings): the pipeline's keyword arguments besides prompt and generator, and what of them metadata.jsonl records
    (None: the pipeline decides). UserError (2): a flag that the pipeline does not take, or a size that does not divide."""
    trained = {name: model.distilled[name] for name in CALL_FLAGS if name in model.distilled}
    trained |= model.distilled.get("pipeline_call", {})
    given = {name: getattr(args, name) for name in CALL_FLAGS if getattr(args, name) is not None}
    for name in given:
        if name not in model.parameters:
            raise UserError(f"--{name} {given[name]}: {model.index['_class_name']} takes none; drop --{name}", 2)
    call = {name: value for name, value in (trained | given).items() if name in model.parameters}
    steps = trained.get("num_inference_steps", call.get("num_inference_steps"))
    if call.get("num_inference_steps") != steps:
        call = {name: value for name, value in call.items() if name not in ("sigmas", "timesteps")}
        logger.info("--num_inference_steps: trained for %s; the scheduler's own noise levels are used instead", steps)
    if "guidance_scale" in given and model.config("transformer").get("guidance_embeds") is False:
        logger.info("--guidance_scale has no effect: this network has no guidance embedder")
    multiple = pixel_multiple(model)
    for name in ("height", "width"):
        excess = (call.get(name) or 0) % multiple
        if excess:
            raise UserError(f"--{name} {call[name]}: not divisible by {multiple}; {call[name] - excess + multiple} is", 2)
    defaults = {name: parameter.default for name, parameter in model.parameters.items()}
    return call, {name: call.get(name, defaults.get(name)) for name in CALL_FLAGS}


def load_component(model: Model, name: str, dtype: torch.dtype):
    """One of `model.replaced`, of the class that its own configuration names, else of the class in the base's index."""
    library, class_name = model.index[name]
    class_name = model.config(name).get("_class_name", class_name)
    component_class = getattr(diffusers if library == "diffusers" else transformers, class_name)
    options = {"dtype": dtype} if issubclass(component_class, torch.nn.Module) else {}
    return component_class.from_pretrained(model.replaced[name], **options)


def load_pipeline(model: Model, sampler: Optional[str], device: torch.device, dtype: torch.dtype) -> DiffusionPipeline:
    """The whole pipeline on its device. UserError (1) where weights are missing or damaged."""
    with loading("--model", model.name):
        parts = {name: load_component(model, name, dtype) for name in model.replaced}
        absent = left_out(getattr(diffusers, model.index["_class_name"], DiffusionPipeline), model.index)
        pipeline = DiffusionPipeline.from_pretrained(model.base, dtype=dtype, **absent, **parts).to(device)
    if isinstance(pipeline.scheduler, FlowMatchEulerDiscreteScheduler):
        config, stochastic = pipeline.scheduler.config, sampler == "stochastic"
        pipeline.scheduler = FlowMatchEulerDiscreteScheduler.from_config(config, stochastic_sampling=stochastic)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(pipeline: DiffusionPipeline, prompts: list[str], seeds: list[int], call: dict[str, Any]) -> list[Image.Image]:
    """One batch. A picture's noise, initial and stochastic, comes from its own seed alone: one CPU generator a picture."""
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    step = type(pipeline.scheduler).step
    if "generator" in inspect.signature(step).parameters:
        # FLUX and SD 3 call `step` without a generator; it would draw from the global one.
        pipeline.scheduler.step = functools.partial(step, pipeline.scheduler, generator=generators)
    try:
        return pipeline(prompt=prompts, generator=generators, **call).images
    except torch.OutOfMemoryError as error:
        raise UserError(f"--batch_size {len(prompts)}: out of memory; give a smaller one, or smaller pictures") from error


def write_aside(path: Path, write) -> None:
    """`write(temporary path)`, then renames: `path` is there completely or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    write(temporary)
    os.replace(temporary, path)


def open_folder(folder: Path) -> list[dict[str, Any]]:
    """Makes the folder; returns the lines of metadata.jsonl whose picture is there: only with its line is a picture drawn.

    Lines that a kill has cut, or whose picture is gone, are removed. UserError (2) if it cannot be a folder.
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


def refuse_other_settings(folder: Path, records: list[dict], settings: dict[str, Any], prompts: dict[int, str]) -> None:
    """UserError (2) if the folder holds a picture that these settings and prompts would not give."""
    for record in records:
        wanted = settings | {"prompt": prompts.get(record["idx"], record.get("prompt"))}
        name = next((name for name, value in wanted.items() if record.get(name) != value), None)
        if name is not None:
            there = f"{record['idx']:04d}.png there was drawn with {name} {record.get(name)}, not {wanted[name]}"
            raise UserError(f"--output_dir {folder}: {there}; give another folder or empty this one", 2)


def save_picture(folder: Path, picture: Image.Image, record: dict[str, Any]) -> None:
    """Writes a picture, then its line, so that a kill leaves at most a picture without a line, which the next run redraws."""
    try:
        write_aside(folder / record["file_name"], lambda temporary: picture.save(temporary, format="PNG"))
        # One unbuffered write: processes that share the folder do not mix their lines.
        with open(folder / "metadata.jsonl", "ab", buffering=0) as stream:
            stream.write((json.dumps(record, ensure_ascii=False) + "\n").encode())
    except OSError as error:
        raise UserError(f"--output_dir {folder}: cannot be written ({error.strerror}); make room or give another") from error


def make_grid(folder: Path, indices: Sequence[int]) -> Image.Image:
    """The pictures in order, row by row, near square; each with its index beneath."""
    columns, label = math.ceil(math.sqrt(len(indices))), 14
    grid = None
    for place, idx in enumerate(indices):
        picture = Image.open(folder / f"{idx:04d}.png").convert("RGB")
        picture.thumbnail((GRID_SIDE // columns, GRID_SIDE // columns))
        width, height = picture.width, picture.height + label
        grid = grid or Image.new("RGB", (columns * width, math.ceil(len(indices) / columns) * height), "white")
        left, top = place % columns * width, place // columns * height
        grid.paste(picture, (left, top))
        ImageDraw.Draw(grid).text((left + 2, top + picture.height + 1), str(idx), fill="black")
    return grid


def main(argv: Optional[Sequence[str]] = None) -> None:
    args = parse_args(argv)
    # 1. Whatever can be wrong is found before any weight loads.
    prompts, window = read_prompts(args)
    device, dtype = choose_device(args)
    model = find_model(args.model)
    call, settings = choose_call(args, model)
    settings |= {"sampler": choose_sampler(args.sampler, model), "seed": args.seed}
    settings |= {"dtype": str(dtype).removeprefix("torch."), "weights": fingerprint(model)}
    folder = Path(args.output_dir)
    records = open_folder(folder)
    refuse_other_settings(folder, records, settings, prompts)

    # 2. What is not there yet is drawn.
    missing = sorted(set(window) - {record["idx"] for record in records})
    pipeline = load_pipeline(model, settings["sampler"], device, dtype) if missing else None
    with tqdm(total=len(window), initial=len(window) - len(missing), unit="picture") as progress:
        for start in range(0, len(missing), args.batch_size):
            batch = missing[start : start + args.batch_size]
            pictures = draw(pipeline, [prompts[idx] for idx in batch], [args.seed + idx for idx in batch], call)
            for idx, picture in zip(batch, pictures):
                record = {"file_name": f"{idx:04d}.png", "idx": idx, "prompt": prompts[idx], **settings, "model": args.model}
                save_picture(folder, picture, record)
            progress.update(len(batch))
    if args.grid:
        grid = make_grid(folder, window)
        write_aside(folder / "grid.png", lambda temporary: grid.save(temporary, format="PNG"))


if __name__ == "__main__":
    logging.basicConfig(format="%(message)s")
    logger.setLevel(logging.INFO)
    run_script(main)
