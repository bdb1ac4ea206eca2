# Copyright 2026 The SenseFlow-scripts authors. Licensed under the Apache License, Version 2.0.
"""What every script does with a diffusers pipeline: check and load its parts, speak to its VAE, draw with it, and save the
student as one. No network, and no family of pipelines, is named here.
"""

import inspect
import json
import math
import os
import re
from functools import partial
from pathlib import Path
from typing import Optional, Sequence

import torch
import yaml
from accelerate.logging import get_logger
from diffusers import ModelMixin
from diffusers.image_processor import VaeImageProcessor
from huggingface_hub import ModelCard, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError
from PIL import Image
from tqdm.auto import tqdm

from senseflow_args import DTYPES, UserError, loading
from senseflow_checkpoints import INCOMPLETE, publish_folder, writing
from senseflow_discriminator import Discriminator, TextFeatures, VisionFeatures
from senseflow_roles import Role
from senseflow_runtime import Runtime
from senseflow_utils import Draws, Schedule


logger = get_logger(__name__)

SMALL_SET = 1000  # prompts whose embeddings are kept; those of FLUX.1-dev take 4 MB each in bf16


# ---------------------------------------------------------------------------------------------------------------------
# Before any weight loads
# ---------------------------------------------------------------------------------------------------------------------
def read_index(path: str, revision: Optional[str] = None) -> dict:
    """model_index.json of a pipeline. OSError or ValueError where there is none."""
    name, local = "model_index.json", os.path.isdir(path)
    index = json.loads(Path(Path(path) / name if local else hf_hub_download(path, name, revision=revision)).read_text())
    if not isinstance(index, dict):
        raise ValueError("no index")
    return index


def check_pipeline(pipeline_class, flag: str, path: str, revision: Optional[str] = None) -> None:
    """Refuses (exit code 2) an unknown folder or Hub id, and one that holds another pipeline class."""
    if not os.path.isdir(path) and not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", path):
        raise UserError(f"{flag} {path}: no such folder; give a diffusers pipeline folder or a Hub id", exit_code=2)
    try:
        index = read_index(path, revision)
    except (OSError, ValueError) as error:
        message = f"{flag} {path}: neither a folder with model_index.json nor a Hub id that can be reached"
        raise UserError(message, exit_code=2) from error
    if index.get("_class_name") != pipeline_class.__name__:
        message = f"{flag} {path}: holds a {index.get('_class_name')}, this script trains a {pipeline_class.__name__}"
        raise UserError(message, exit_code=2)


def left_out(pipeline_class, index: dict) -> dict[str, None]:
    """{component: None} of what a pipeline was saved without (SD 3.5 without T5): from_pretrained wants to be told."""
    named = {name for name, entry in index.items() if isinstance(entry, list) and entry[0] is None}
    return dict.fromkeys(sorted(named - set(pipeline_class._optional_components)))


def config_of(
    kind, flag: str, path: str, subfolder: Optional[str] = None, revision: Optional[str] = None, exact: bool = True
) -> dict:
    """A component's configuration, no weights; UserError (exit code 2) where it cannot be read or, with `exact`, is of another
    class (a scheduler reads the configuration of any other of its family)."""
    where = f"{flag} {path}" + (f" ({subfolder})" if subfolder else "")
    try:
        config = kind.load_config(path, subfolder=subfolder, revision=revision)
    except (OSError, ValueError) as error:
        raise UserError(f"{where}: no readable {kind.__name__}; download or copy it again", exit_code=2) from error
    found = config.get("_class_name", kind.__name__)
    if exact and found != kind.__name__:
        raise UserError(f"{where}: is a {found}, this script takes a {kind.__name__}", exit_code=2)
    return config


def check_alike(flag: str, path: str, kind, subfolder: str, teacher: dict, names: Sequence[str]) -> None:
    """Refuses (exit code 2) a network to take the place of the teacher's own that is not there, or whose configuration differs in
    one of `names`, the entries that say which latents and prompts it speaks of."""
    other = config_of(kind, flag, path, subfolder_of(path, subfolder))
    for name in names:
        if other.get(name) != teacher.get(name):
            message = f"{flag} {path}: its {name} is {other.get(name)}, the teacher's {teacher.get(name)}"
            raise UserError(message + "; give one that was made for this teacher", exit_code=2)


def check_resolution(args, multiple: int) -> None:
    """Refuses (exit code 2) a --resolution that this teacher's latents do not divide into."""
    if args.resolution % multiple:
        message = f"--resolution {args.resolution} is not divisible by {multiple}, as this teacher's latents need"
        raise UserError(message, exit_code=2)


def check_margin(args, schedule: Schedule) -> None:
    """Refuses (exit code 2) an --isg_margin that leaves a segment between anchors without a timestep."""
    crowded = schedule.check_margin(args.isg_margin) if args.isg_weight > 0 else None
    if crowded:
        raise UserError(
            f"--isg_margin {args.isg_margin:g} leaves no timestep between anchors {crowded[0]:g} and {crowded[1]:g}: lower it, "
            "or move the --anchors apart",
            exit_code=2,
        )


# ---------------------------------------------------------------------------------------------------------------------
# Loading
# ---------------------------------------------------------------------------------------------------------------------
def holds(path: str, file: str) -> bool:
    """Whether a folder or Hub repository has this file."""
    if os.path.isdir(path):
        return (Path(path) / file).is_file()
    try:
        return bool(hf_hub_download(path, file))
    except (OSError, ValueError):  # no such file there, or nothing that can be reached
        return False


def subfolder_of(path: str, name: str) -> Optional[str]:
    """Where a network lies in a folder or Hub repository: under its name in a pipeline, or by itself (None)."""
    return name if holds(path, f"{name}/config.json") or not holds(path, "config.json") else None


def load_network(kind, flag: str, path: str, subfolder: str, **source) -> torch.nn.Module:
    """A network of a pipeline, or one by itself. UserError (exit code 1) where weights are missing or damaged."""
    with loading(flag, path):
        network, info = kind.from_pretrained(path, subfolder=subfolder_of(path, subfolder), output_loading_info=True, **source)
        if info["missing_keys"]:
            raise ValueError(f"{len(info['missing_keys'])} weights are missing, {sorted(info['missing_keys'])[0]} among them")
        return network


def load_pipeline(pipeline_class, flag: str, path: str, revision: Optional[str] = None, **components):
    """The rest of the teacher's pipeline around `components`; UserError (exit code 1) where weights are missing or damaged."""
    with loading(flag, path):
        components = left_out(pipeline_class, read_index(path, revision)) | components
        return pipeline_class.from_pretrained(path, revision=revision, **components)


def vae_scale_of(config: dict) -> int:
    """Pixels per latent along a side."""
    return 2 ** (len(config.get("block_out_channels") or config["encoder_block_out_channels"]) - 1)


def latent_shape_of(config: dict, resolution: int) -> tuple[int, int, int]:
    """(channels, height, width) of one x0 at this resolution; `config` is the VAE's."""
    return (config["latent_channels"], *[resolution // vae_scale_of(config)] * 2)


def load_vae(kind, flag: str, path: str, args, device, encodes: bool, decodes: bool, **source) -> Optional[ModelMixin]:
    """The frozen VAE on its device, without the half that nothing will run; None where neither is."""
    if not (encodes or decodes):
        return None
    vae = load_network(kind, flag, path, "vae", **source)
    if not encodes:
        vae.encoder = None
    if not decodes:
        vae.decoder = None
    elif args.gradient_checkpointing and vae._supports_gradient_checkpointing:
        vae.enable_gradient_checkpointing()
    return vae.requires_grad_(False).eval().to(device)


def load_discriminator(args, runtime: Runtime) -> tuple[Role, VisionFeatures, TextFeatures]:
    """The VFM discriminator and what it looks and reads through; only its heads learn."""
    with loading("--discriminator_backbone", args.discriminator_backbone):
        vision = VisionFeatures(args.discriminator_backbone, args.discriminator_layers, runtime.weight_dtype).to(runtime.device)
    with loading("--discriminator_text_encoder", args.discriminator_text_encoder):
        text = TextFeatures(args.discriminator_text_encoder, runtime.weight_dtype).to(runtime.device)
    heads = Discriminator(vision.channels, vision.num_maps, text.channels)
    return runtime.trained_role("discriminator", heads, args.learning_rate_disc, half=False), vision, text


# ---------------------------------------------------------------------------------------------------------------------
# Prompts
# ---------------------------------------------------------------------------------------------------------------------
def text_encoders_of(pipeline) -> dict[str, torch.nn.Module]:
    """The text encoders that a pipeline has, by component."""
    components = pipeline.components.items()
    return {name: part for name, part in components if name.startswith("text_encoder") and part is not None}


def place_text_encoders(args, pipeline, device) -> None:
    """Puts the frozen text encoders on the device or, with --offload_text_encoders, leaves them on the CPU to run there."""
    for encoder in text_encoders_of(pipeline).values():
        encoder.requires_grad_(False).eval().to("cpu" if args.offload_text_encoders else device)
    if args.offload_text_encoders:
        pipeline.encode_prompt = partial(_encode_where_they_are, pipeline, pipeline.encode_prompt)  # the stock call's, too


def _encode_where_they_are(pipeline, encode_prompt, *args, device, **kwargs) -> tuple:
    where = next(iter(text_encoders_of(pipeline).values())).device
    outputs = encode_prompt(*args, device=where, **kwargs)
    return tuple(output.to(device) if torch.is_tensor(output) else output for output in outputs)


def encode_small_set(args, rows, pipeline, encode_prompts, device):
    """With --offload_text_encoders and at most SMALL_SET different prompts: encodes them all, once, and frees the encoders.

    Args:
        rows: of the data set.
        encode_prompts: `encode_prompts(prompts) -> condition`, a tuple of tensors (B, ...).
    Returns:
        What takes the place of `encode_prompts`. The encoders stay on the CPU where --validation_prompts will need them.
    """
    prompts = few_prompts(rows) if args.offload_text_encoders else None
    if prompts is None:
        return encode_prompts
    encoders = text_encoders_of(pipeline)
    for encoder in encoders.values():
        encoder.to(device)
    shown = tqdm(prompts, "prompts", disable=os.environ.get("LOCAL_RANK", "0") != "0")
    table = {prompt: [part.cpu() for part in encode_prompts([prompt])] for prompt in shown}
    for encoder in encoders.values():
        encoder.to("cpu")
    if not args.validation_prompts:
        pipeline.register_modules(**dict.fromkeys(encoders))
    logger.info(f"{len(table)} prompts are encoded; the text encoders are {'on the CPU' if args.validation_prompts else 'freed'}")
    return lambda prompts: tuple(torch.cat(parts).to(device) for parts in zip(*[table[prompt] for prompt in prompts]))


def few_prompts(rows) -> Optional[list[str]]:
    """The different prompts of a data set, if they are at most SMALL_SET; None for more, and for a stream."""
    found: dict[str, None] = {}
    for row in range(len(rows) if hasattr(rows, "__len__") else 0):
        found[rows.prompt(row)] = None
        if len(found) > SMALL_SET:
            return None
    return list(found) or None


# ---------------------------------------------------------------------------------------------------------------------
# Pictures and latents
# ---------------------------------------------------------------------------------------------------------------------
def shift_of(vae: ModelMixin) -> float:
    """What a VAE's latents are off zero by; not every kind has the entry."""
    return vae.config.get("shift_factor") or 0


def encode(vae: ModelMixin, pictures: torch.Tensor, draws: Draws, slots: Sequence[int]) -> torch.Tensor:
    """x0 of pictures (B, 3, H, W) in [-1, 1]: a sample of the VAE's posterior, or its one latent where it has none; float32."""
    encoded = vae.encode(pictures.to(vae.dtype))
    if "latent_dist" in encoded:
        posterior = encoded.latent_dist
        sample = posterior.mean + posterior.std * draws.normal("posterior", slots, posterior.mean.shape[1:])
    else:
        sample = encoded.latent
    return (sample.float() - shift_of(vae)) * vae.config.scaling_factor


def decode(vae: ModelMixin, x0: torch.Tensor) -> torch.Tensor:
    """Pictures (B, 3, H, W), about [-1, 1], float32; gradient flows."""
    latents = x0 / vae.config.scaling_factor + shift_of(vae)
    return vae.decode(latents.to(vae.dtype), return_dict=False)[0].float()


def real_latents(vae: Optional[ModelMixin], batch: dict, rows: torch.Tensor, draws: Draws) -> torch.Tensor:
    """x0 of the given rows of a batch, float32: its latents where the data set holds latents, else its pictures encoded."""
    if "latents" in batch:
        return batch["latents"][rows]
    return encode(vae, batch["pixel_values"][rows], draws, [batch["slots"][row] for row in rows.tolist()])


def real_pictures(vae: ModelMixin, batch: dict) -> torch.Tensor:
    """Pictures (B, 3, H, W) in [-1, 1] of a batch; decoded where the data set holds latents."""
    return decode(vae, batch["latents"]) if "latents" in batch else batch["pixel_values"]


def bind_generator(scheduler, generator) -> None:
    """Makes a scheduler's `step` draw from `generator` (one, or a list of one per sample): not every pipeline hands it on."""
    step = type(scheduler).step
    if "generator" in inspect.signature(step).parameters:
        scheduler.step = partial(step, scheduler, generator=generator)


def draw_grid(runtime: Runtime, pipeline, args, call: dict) -> Image.Image:
    """Validation pictures with a stock pipeline call, one row per prompt; each rank draws its own, the main one gets the grid."""
    jobs = [(i, prompt) for prompt in args.validation_prompts for i in range(args.num_validation_images)]
    rank, world_size = runtime.accelerator.process_index, runtime.accelerator.num_processes
    pictures = []
    for number in range(rank, math.ceil(len(jobs) / world_size) * world_size, world_size):
        # Past the last, once more: a sharded network runs in all ranks at once, or in none.
        i, prompt = jobs[min(number, len(jobs) - 1)]
        generator = torch.Generator().manual_seed(args.seed + i)
        bind_generator(pipeline.scheduler, generator)
        with torch.no_grad(), runtime.accelerator.autocast():  # the student is in fp32, VAE and text encoders may not be
            picture = pipeline(prompt, generator=generator, **call).images[0]
        if number < len(jobs):
            pictures.append((number, picture))
    pictures = [picture for _, picture in sorted(runtime.gather_objects(pictures), key=lambda pair: pair[0])]
    per_row = args.num_validation_images
    return picture_grid([pictures[i : i + per_row] for i in range(0, len(pictures), per_row)])


def draw_panel(vae: ModelMixin, seen: dict[str, torch.Tensor], pictures: int = 4) -> Image.Image:
    """What the last student's turn looked at, decoded: a row for each of student, teacher and fake x0, ISG direct and target."""
    rows = []
    for latents in seen.values():
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
# The student as a pipeline
# ---------------------------------------------------------------------------------------------------------------------
def usage_record(args, schedule: Schedule, call: dict, iteration: int) -> dict:
    """What senseflow.json holds: the trained levels, the sampler, and the stock pipeline call that visits them."""
    return {
        "sigmas": schedule.levels(schedule.anchors)[1].tolist(),
        "timesteps": schedule.anchors.tolist(),
        "sampler": args.sampler,
        "num_inference_steps": len(schedule.anchors),
        "guidance_scale": call["guidance_scale"],
        "teacher": absolute_if_local(args.pretrained_model_name_or_path),
        "iteration": iteration,
        "pipeline_call": call,
    }


def write_usage(folder: Path, record: dict, components: dict) -> None:
    """senseflow.json, and the `components` that are not the teacher's (the scheduler): what infer.py needs beside the student."""
    for name, component in components.items():
        component.save_pretrained(folder / name)
    (folder / "senseflow.json").write_text(json.dumps(record, indent=1))


def export(runtime: Runtime, args, pipeline_class, student: Role, components: dict, record: dict) -> None:
    """The whole pipeline in --output_dir, with senseflow.json and the model card; written aside, then moved.

    Args:
        components: what is not the teacher's besides the student: the scheduler.
        record: of `usage_record`.
    """
    student.check_finite()
    network = student.network()
    if runtime.accelerator.is_main_process:
        dtype, flag, path = DTYPES[args.export_dtype], "--pretrained_model_name_or_path", args.pretrained_model_name_or_path
        aside = Path(args.output_dir) / f"export{INCOMPLETE}"
        others = {student.subfolder: None, **components}
        source = {"revision": args.revision, "variant": args.variant, "dtype": dtype}
        pipeline = load_pipeline(pipeline_class, flag, path, **others, **source)
        pipeline.register_modules(**{student.subfolder: network})  # the run is over
        with writing(aside):
            pipeline.to("cpu", dtype).save_pretrained(aside)
            write_usage(aside, record, {})
            write_model_card(aside, pipeline_class, record, args, license_of(path))
            publish_folder(aside, Path(args.output_dir), last="model_index.json")
        logger.info(f"the pipeline is in {args.output_dir}")
    runtime.accelerator.wait_for_everyone()


def absolute_if_local(path: str) -> str:
    """A folder's absolute path, so that a checkpoint finds its teacher from anywhere; a Hub id as it is."""
    return str(Path(path).resolve()) if os.path.isdir(path) else path


def license_of(path: str) -> dict[str, str]:
    """The licence entries of a model's card (license, license_name, license_link); {"license": "other"} where it has none."""
    try:
        card = ModelCard.load(Path(path) / "README.md" if os.path.isdir(path) else path).data
    except (OSError, ValueError, yaml.YAMLError, HfHubHTTPError):
        return {"license": "other"}
    entries = {name: getattr(card, name, None) for name in ("license", "license_name", "license_link")}
    return {name: str(value) for name, value in entries.items() if value} or {"license": "other"}


def write_model_card(folder: Path, pipeline_class, record: dict, args, teacher_license: dict[str, str]) -> None:
    """README.md of the exported pipeline: three-line usage with the exact call, levels, training arguments, licence.

    Args:
        record: what senseflow.json holds; `pipeline_call` are the arguments of the stock call.
        teacher_license: what `license_of` found.
    """
    teacher = record["teacher"]
    front = {"library_name": "diffusers", "pipeline_tag": "text-to-image", **teacher_license}
    if not os.path.isdir(teacher):
        front["base_model"] = teacher
    pipeline = pipeline_class.__name__
    absent = "".join(f", {name}=None" for name in left_out(pipeline_class, read_index(folder)))
    call = ", ".join(f"{name}={value!r}" for name, value in record["pipeline_call"].items())
    arguments = "\n".join(f"| {name} | {value} |" for name, value in sorted(vars(args).items()))
    levels = ", ".join(f"{t:g} (sigma {sigma:.4f})" for t, sigma in zip(record["timesteps"], record["sigmas"]))
    license_name = teacher_license.get("license_name", teacher_license["license"])
    (folder / "README.md").write_text(
        f"""---
{yaml.safe_dump(front, sort_keys=False).strip()}
---

# {Path(teacher).name} in {record["num_inference_steps"]} steps

Distilled from `{teacher}` with SenseFlow (arXiv 2506.00523), {record["iteration"]} iterations.

```python
import torch
from diffusers import {pipeline}
pipeline = {pipeline}.from_pretrained("path/of/this/folder", dtype={DTYPES[args.export_dtype]}{absent})
image = pipeline("a prompt", {call}).images[0]
```

Timesteps visited: {levels}, {record["sampler"]} sampler. These are the levels that the student was trained at.

The weights are a derivative of the teacher's and under the teacher's licence ({license_name}).

## Training arguments

| flag | value |
|---|---|
{arguments}
"""
    )
