# Copyright 2026 The SenseFlow-scripts authors. Licensed under the Apache License, Version 2.0.
"""Draws pictures with a distilled student, or with any diffusers text-to-image pipeline, such as its teacher.

    python infer.py --model OUTPUT_DIR --prompts_file prompts.txt --output_dir pictures --grid
    python infer.py --model OUTPUT_DIR/checkpoint-3000 --prompt "a red fox in the snow"
    python infer.py --model FLUX.1-dev --transformer domiso/SenseFlow --transformer_subfolder FOLDER --released flux

How a student is called stands in its senseflow.json, or in --released for the published weights; flags override; without either
the pipeline's own defaults hold.
A picture is a function of (model, settings, prompt, seed, index): neither batch size nor start index changes it, and several
processes may draw windows of one prompts file into one folder. A rerun draws what is missing.
"""

import argparse
import hashlib
import inspect
import json
import logging
import math
import os
import pickle
import re
import zipfile
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Mapping, Optional, Sequence

import diffusers
import torch
import transformers
from accelerate import init_empty_weights
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, LCMScheduler
from huggingface_hub import constants, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from PIL import Image, ImageDraw
from safetensors.torch import load_file
from tqdm import tqdm

from senseflow_args import Parser, UserError, loading, run_script
from senseflow_hub import left_out
from senseflow_pipeline import bind_generator
from senseflow_utils import SAMPLERS


logger = logging.getLogger("infer")

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
CALL_FLAGS = ("num_inference_steps", "guidance_scale", "height", "width")
GRID_SIDE = 4096  # pixels; larger grids are scaled down: 1,000 pictures of 1024 px would take 3 GB
NETWORKS = ("transformer", "unet")
WRAPPERS = {"module", "_fsdp_wrapped_module", "_orig_mod", "_checkpoint_wrapped_module"}  # DDP, FSDP, compile, checkpointing
# What a network's configuration must have in common with the one whose place it takes: its class, its latents and its text.
FITTING = ("_class_name", "in_channels", "joint_attention_dim", "cross_attention_dim", "pooled_projection_dim", "caption_channels")

# How the published weights are drawn with: (pipeline, changes to its scheduler, what its call has besides 4 steps at 1024 px).
# With these changes a stock 4-step call visits the trained levels at any size, and fewer steps visit some of them.
FLOW, SHIFT = FlowMatchEulerDiscreteScheduler.__name__, math.log(2.002)
# Sigmas 1 .9045 .7595 .5128: FLUX's own at 1024 px. No guidance in the call: the network has no embedder for it.
FLUX = {"_class_name": FLOW, "use_dynamic_shifting": False, "shift": math.exp(1.15), "shift_terminal": None}
# Sigmas 1 .9 .75 .5
SD35 = {"_class_name": FLOW, "use_dynamic_shifting": True, "base_shift": SHIFT, "max_shift": SHIFT, "shift_terminal": 0.5}
SD35_CALL = {"guidance_scale": 1.0, "max_sequence_length": 77}
SDXL = {"_class_name": LCMScheduler.__name__, "original_inference_steps": 4}  # timesteps 999 749 499 249
RELEASED = {
    "flux": ("FluxPipeline", FLUX, {"max_sequence_length": 512}),
    "sd35-medium": ("StableDiffusion3Pipeline", SD35, SD35_CALL),
    "sd35-large": ("StableDiffusion3Pipeline", SD35, SD35_CALL),
    "sdxl": ("StableDiffusionXLPipeline", SDXL, {"guidance_scale": 0.0}),
    "sdxl-dmd2": ("StableDiffusionXLPipeline", SDXL, {"guidance_scale": 0.0}),
}


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
    trained = "default: --released or senseflow.json, else the pipeline's own"
    group = parser.add_argument_group("model")
    group.add_argument("--model", required=True, help="pipeline folder, checkpoint-N folder of a training run, or Hub id")
    swap = group.add_mutually_exclusive_group()
    swap.add_argument("--transformer", help="draws in place of the model's own: a folder or Hub id with config.json and weights")
    swap.add_argument("--unet", help="the same, where the pipeline has a UNet")
    swap.add_argument("--checkpoint", help="the same, a state dict: .safetensors, or .pth (under model, ema_model or by itself)")
    subfolders, configs = zip(*((f"--{name}_subfolder", f"--{name}_config") for name in NETWORKS))
    group.add_argument(*subfolders, dest="subfolder", help="of --transformer or --unet")
    group.add_argument(*configs, dest="network_config", help="config.json of --checkpoint; default: the model's own")
    group.add_argument("--released", choices=RELEASED, help="draw as these published weights want it, not as senseflow.json says")
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
            raise UserError(f"{origin} {source}: no such folder; give one with a {Path(file).name}, or a Hub id", 2)
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
    """A pipeline, or a checkpoint to which its teacher lends the rest of the pipeline; a network may be swapped in."""

    name: str  # `--model` as given
    base: str  # folder or Hub id of the whole pipeline: the model itself, or a checkpoint's teacher
    index: dict[str, Any]  # the base's model_index.json
    parameters: Mapping[str, inspect.Parameter]  # of the pipeline's call
    distilled: dict[str, Any]  # senseflow.json, or what stands for it; empty where nothing says how the network was trained
    replaced: dict[str, tuple[str, str]]  # (folder or Hub id, subfolder) of what comes from elsewhere than the base
    scheduler: dict[str, Any] = field(default_factory=dict)  # changes to the scheduler's configuration
    swapped: Optional[tuple[str, str]] = None  # (flag, value) of the network in the place of the model's own
    checkpoint: Optional[Path] = None  # its weights, where they are a bare state dict; `replaced` then says whose configuration
    network_config: Optional[dict] = None  # its configuration, where that is given by itself

    @property
    def network(self) -> Optional[str]:
        """The component that is distilled; None if the pipeline has neither."""
        return next((name for name in NETWORKS if name in self.index), None)

    def place(self, component: str) -> tuple[str, str]:
        """(folder or Hub id, path in it) of a component's configuration."""
        source, subfolder = self.replaced.get(component, (self.base, component))
        return source, str(PurePosixPath(subfolder, "scheduler_config.json" if component == "scheduler" else "config.json"))

    def config(self, component: str) -> dict[str, Any]:
        """A component's configuration; empty if the pipeline has no such component."""
        if component not in self.index:
            return {}
        if component == self.network and self.network_config is not None:
            return self.network_config
        origin = self.swapped[0] if self.swapped and component == self.network else "--model"
        return (read_json(*self.place(component), origin) or {}) | (self.scheduler if component == "scheduler" else {})


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
        replaced = {part: (name, part) for part in index if (Path(name) / part).is_dir()}
    class_name = str(index.get("_class_name"))
    parameters = inspect.signature(getattr(diffusers, class_name, DiffusionPipeline).__call__).parameters
    if "prompt" not in parameters:
        raise UserError(f"--model {name}: {class_name} is no text-to-image pipeline of diffusers {diffusers.__version__}", 2)
    model = Model(name, base, index, parameters, distilled, replaced)
    check_usage(model, f"--model {name}")
    return model


def check_usage(model: Model, origin: str) -> None:
    """UserError (2) where the senseflow.json in `model.distilled`, which `origin` brought, does not fit the pipeline."""
    call = model.distilled.get("pipeline_call", {})
    if not isinstance(call, dict) or set(call) - set(model.parameters):
        raise UserError(f"{origin}: pipeline_call in senseflow.json is no call of this pipeline; copy the file again", 2)
    if model.distilled.get("sampler", "euler") not in SAMPLERS:
        raise UserError(f"{origin}: sampler in senseflow.json must be one of {SAMPLERS}; copy the file again", 2)


def check_parts(model: Model) -> None:
    """UserError (2) where the base lacks a component that nothing replaces."""
    named = {part for part, entry in model.index.items() if isinstance(entry, list) and entry[0]}
    for part in sorted(named - set(model.replaced)):
        if os.path.isdir(model.base) and not Path(model.base, part).is_dir():
            raise UserError(f"--model {model.name}: {model.base} lacks {part}, which its model_index.json names; copy it", 2)


def swap_network(args: argparse.Namespace, model: Model) -> None:
    """Puts what --transformer, --unet or --checkpoint names in the place of the model's own network, and the senseflow.json
    beside it in the place of the model's, unless --released says how to draw.

    UserError (2): no such network, or one that this pipeline cannot take.
    """
    flag = next((name for name in (*NETWORKS, "checkpoint") if getattr(args, name) is not None), None)
    if args.subfolder is not None and flag not in NETWORKS:
        raise UserError(f"--transformer_subfolder {args.subfolder}: of what? Give --transformer or --unet, or drop it", 2)
    if args.network_config is not None and flag != "checkpoint":
        raise UserError(f"--transformer_config {args.network_config}: only --checkpoint needs one; drop it", 2)
    if flag is None:
        return
    value, own, class_name = getattr(args, flag), model.network, model.index["_class_name"]
    origin = f"--{flag} {value}"
    if own is None or flag not in (own, "checkpoint"):
        raise UserError(f"{origin}: {class_name} has no {flag}; {f'give --{own}' if own else 'drop it'}", 2)
    wanted = {"_class_name": model.index[own][1]} | model.config(own)
    model.swapped = (f"--{flag}", str(PurePosixPath(value, args.subfolder or "")))
    if flag == "checkpoint":
        model.checkpoint = Path(value)
        if not model.checkpoint.is_file():
            raise UserError(f"{origin}: no such file; give the path of one", 2)
        model.replaced.setdefault(own, (model.base, own))
        if args.network_config is not None:
            path = Path(args.network_config)
            model.network_config = read_json(str(path.parent), path.name, f"--{own}_config") or {}
        usage_near, fix = (str(model.checkpoint.parent), ""), f"give --{own}_config"
    else:
        usage_near = model.replaced[own] = (value, args.subfolder or "")
        fix = f"name the folder that has one with --{own}_subfolder"
    config = model.config(own)
    if not config:
        raise UserError(f"{origin}: no {args.network_config or PurePosixPath(*model.place(own))}; {fix}", 2)
    for name in FITTING:
        if name in wanted and config.get(name, wanted[name]) != wanted[name]:
            there = f"{name} is {config[name]}, but {wanted[name]} in {model.name}"
            raise UserError(f"{origin}: {there}; give the --model that it was distilled from", 2)
    if args.released is None:
        take_usage(model, *usage_near)


def take_usage(model: Model, source: str, subfolder: str) -> None:
    """Takes senseflow.json, and the scheduler beside it, from a swapped network's folder or the one around it; logs what holds."""
    if os.path.isdir(source):
        source, subfolder = os.path.split(os.path.abspath(os.path.join(source, subfolder)))
    origin, place = " ".join(model.swapped), PurePosixPath(subfolder)
    for folder in dict.fromkeys((place, place.parent)):
        usage = read_json(source, str(folder / "senseflow.json"), model.swapped[0])
        if usage is not None:
            model.distilled = usage
            check_usage(model, origin)
            if read_json(source, str(folder / "scheduler/scheduler_config.json"), model.swapped[0]) is not None:
                model.replaced["scheduler"] = (source, str(folder / "scheduler"))
            else:
                logger.info("%s: no scheduler beside its senseflow.json; the noise levels are those of %s", origin, model.name)
            return
    whose = "its senseflow.json" if model.distilled else "the scheduler's own levels"
    logger.info("%s: no senseflow.json beside it and no --released; drawn as %s is: %s", origin, model.name, whose)


def set_released(name: str, model: Model) -> None:
    """Draws as the published weights `name` want it. UserError (2) where they are another pipeline's."""
    (pipeline, scheduler, call), class_name = RELEASED[name], model.index["_class_name"]
    if class_name != pipeline:
        raise UserError(f"--released {name}: is for a {pipeline}; --model {model.name} is a {class_name}", 2)
    if model.distilled:
        logger.info("--released %s overrides the senseflow.json of %s", name, model.name)
    if model.swapped is None:
        logger.info("--released %s: no network is swapped in; %s is taken to hold the published one", name, model.name)
    call = {"num_inference_steps": 4, "height": 1024, "width": 1024, **call}
    model.distilled, model.scheduler = {"sampler": "stochastic", "pipeline_call": call}, dict(scheduler)


def commit_of(repository: str, file: str) -> str:
    """The commit of a file on the Hub: the folder in which the Hub's cache holds it."""
    return Path(hf_hub_download(repository, file)).parents[file.count("/")].name


def fingerprint(model: Model) -> str:
    """12 hex digits that tell retrained weights from the same ones: sizes, small files, and 64 blocks of each large file; and
    how a student is called.

    What comes from the Hub is known by its commit.
    """
    usage = [model.distilled, model.scheduler, model.network_config]
    digest = hashlib.sha256(json.dumps(usage, sort_keys=True).encode())
    for part in sorted({*model.index, *model.replaced}):
        source, config = model.place(part)
        files = sorted(file for file in Path(source, config).parent.glob("*") if file.is_file())
        if part == model.network and model.checkpoint is not None:
            files = [model.checkpoint]
        elif part in model.replaced and not os.path.isdir(source):
            digest.update(f"{part}: {commit_of(source, config)}/{config}".encode())
        for file in files:
            size = file.stat().st_size
            digest.update(f"{part}/{file.name} {size}".encode())
            with open(file, "rb") as stream:
                for position in range(0, size, max(4096, size // 64)):
                    stream.seek(position)
                    digest.update(stream.read(4096))
    if not os.path.isdir(model.base):
        digest.update(commit_of(model.base, "model_index.json").encode())
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
    settings = {name: call.get(name, defaults.get(name)) for name in CALL_FLAGS}
    check_steps(settings["num_inference_steps"], model)
    return call, settings


def check_steps(steps: Optional[int], model: Model) -> None:
    """UserError (2) for more steps than LCM's schedule has; makes one step possible where the scheduler sets the last level."""
    config = model.config("scheduler")
    most = config.get("original_inference_steps") if config.get("_class_name") == LCMScheduler.__name__ else None
    if most and steps and steps > most:
        raise UserError(f"--num_inference_steps {steps}: this LCMScheduler has {most}; give {most} or fewer", 2)
    if steps == 1 and config.get("shift_terminal"):
        model.scheduler["shift_terminal"] = None  # stretching a single level divides 0 by 0


def few(names: Sequence[str]) -> str:
    """The first three of many names."""
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def read_state(path: Path) -> dict[str, torch.Tensor]:
    """A state dict on the CPU, without what DDP, FSDP and the like put before its names. UserError (1) if there is none."""
    if path.suffix == ".safetensors":
        state = load_file(path)
    else:
        try:
            # Mapped, not read, where the format allows it: a network in fp32 may be larger than the memory.
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        except pickle.UnpicklingError as error:
            raise UserError(f"--checkpoint {path}: damaged, or holds more than tensors; save the state dict alone") from error
    if isinstance(state, dict):
        state = next((state[key] for key in ("model", "ema_model") if key in state), state)
    if not isinstance(state, dict) or not state or not all(torch.is_tensor(tensor) for tensor in state.values()):
        raise UserError(f"--checkpoint {path}: holds no state dict under model, under ema_model or by itself; save one")
    return {".".join(part for part in name.split(".") if part not in WRAPPERS): tensor for name, tensor in state.items()}


def load_checkpoint(model: Model, network_class: type, dtype: torch.dtype) -> torch.nn.Module:
    """A network with the weights of --checkpoint, all of them and no others, without initialising any. UserError (1) otherwise."""
    state, config = read_state(model.checkpoint), model.config(model.network)
    if "guidance_embeds" in config and model.network_config is None:
        config["guidance_embeds"] = any("guidance_embedder" in name for name in state)
    with init_empty_weights(include_buffers=False):
        network = network_class.from_config(config)
    wanted = {name: list(tensor.shape) for name, tensor in network.state_dict().items()}
    shapes = {name: list(tensor.shape) for name, tensor in state.items()}
    other = [f"{name} {shapes[name]} not {wanted[name]}" for name in wanted if shapes.get(name, wanted[name]) != wanted[name]]
    kinds = {"missing": [*wanted.keys() - shapes.keys()], "unexpected": [*shapes.keys() - wanted.keys()], "of another shape": other}
    faults = [f"{len(names)} {kind} ({few(sorted(names))})" for kind, names in kinds.items() if names]
    if faults:
        fix = f"give the --model that it was distilled from, or --{model.network}_config"
        raise UserError(f"--checkpoint {model.checkpoint}: not the weights of this network: {', '.join(faults)}; {fix}")
    for name, tensor in state.items():  # each tensor goes as its cast copy comes
        state[name] = tensor.to(dtype) if tensor.is_floating_point() else tensor
    network.load_state_dict(state, assign=True)
    return network.eval()


def load_component(model: Model, name: str, dtype: torch.dtype):
    """One of `model.replaced`, of the class that its own configuration names, else of the class in the base's index."""
    library, class_name = model.index[name]
    class_name = model.config(name).get("_class_name", class_name)
    component_class = getattr(diffusers if library == "diffusers" else transformers, class_name)
    source, subfolder = model.replaced[name]
    if name != model.network:
        options = {"dtype": dtype} if issubclass(component_class, torch.nn.Module) else {}
        return component_class.from_pretrained(source, subfolder=subfolder, **options)
    flag, value = model.swapped or ("--model", model.name)
    with loading(flag, value):
        if model.checkpoint is not None:
            return load_checkpoint(model, component_class, dtype)
        network, info = component_class.from_pretrained(source, subfolder=subfolder, dtype=dtype, output_loading_info=True)
    missing, unexpected = sorted(info["missing_keys"]), sorted(info["unexpected_keys"])
    if missing:
        raise UserError(f"{flag} {value}: {len(missing)} weights are missing ({few(missing)}); download or copy them again")
    if unexpected:
        logger.info("%s %s: %d weights have no place in its config.json (%s)", flag, value, len(unexpected), few(unexpected))
    return network


def load_pipeline(model: Model, sampler: Optional[str], device: torch.device, dtype: torch.dtype) -> DiffusionPipeline:
    """The whole pipeline on its device. UserError (1) where weights are missing or damaged."""
    with loading("--model", model.name):
        parts = {name: load_component(model, name, dtype) for name in model.replaced}
        absent = left_out(getattr(diffusers, model.index["_class_name"], DiffusionPipeline), model.index)
        pipeline = DiffusionPipeline.from_pretrained(model.base, dtype=dtype, **absent, **parts).to(device)
    changes = dict(model.scheduler)
    kind = getattr(diffusers, changes.pop("_class_name", ""), type(pipeline.scheduler))
    if kind is FlowMatchEulerDiscreteScheduler:
        changes["stochastic_sampling"] = sampler == "stochastic"
    if changes:  # as keywords: from_config forgets what is merged into a configuration that has the default there
        pipeline.scheduler = kind.from_config(pipeline.scheduler.config, **changes)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(pipeline: DiffusionPipeline, prompts: list[str], seeds: list[int], call: dict[str, Any]) -> list[Image.Image]:
    """One batch. A picture's noise, initial and stochastic, comes from its own seed alone: one CPU generator a picture."""
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    bind_generator(pipeline.scheduler, generators)  # FLUX and SD 3 call `step` without one; it would draw from the global one
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
    swap_network(args, model)
    if args.released is not None:
        set_released(args.released, model)
    check_parts(model)
    call, settings = choose_call(args, model)
    settings |= {"sampler": choose_sampler(args.sampler, model), "seed": args.seed}
    settings |= {"dtype": str(dtype).removeprefix("torch."), "weights": fingerprint(model)}
    folder = Path(args.output_dir)
    source = {"model": args.model, "network": model.swapped and " ".join(model.swapped), "released": args.released}
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
                record = {"file_name": f"{idx:04d}.png", "idx": idx, "prompt": prompts[idx], **settings, **source}
                save_picture(folder, picture, record)
            progress.update(len(batch))
    if args.grid:
        grid = make_grid(folder, window)
        write_aside(folder / "grid.png", lambda temporary: grid.save(temporary, format="PNG"))


if __name__ == "__main__":
    logging.basicConfig(format="%(message)s")
    logger.setLevel(logging.INFO)
    run_script(main)
