# Copyright 2026 The SenseFlow-scripts authors. Licensed under the Apache License, Version 2.0.
"""Export the student as a pipeline around the teacher's other components or as an adapter, with a model card."""

import json
import math
import os
from pathlib import Path
from typing import Any

import torch
import yaml
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME
from huggingface_hub import ModelCard

from senseflow.arguments import torch_dtype
from senseflow.models.hub import (
    UNREADABLE,
    ModelSource,
    component_files,
    copy_component_file,
    missing_components,
    saved_components,
)
from senseflow.models.lora import FILE, export_lora, find_lora
from senseflow.models.quantization import quantization_config
from senseflow.models.weights import check_export_dtype
from senseflow.student_config import write_student_config
from senseflow.training.models import TrainingModels
from senseflow_utils import DDPMSchedule, Schedule


FOLDER_IN_CARD = "path/of/this/folder"
ALPHA_AT_ZERO_SNR = 2.213e-4  # ComfyUI's, in the place of 0


def export_pipeline(
    folder: Path,
    args,
    models: TrainingModels,
    extra_components: dict[str, Any],
    config: dict[str, Any],
    files: dict[str, Path],
) -> str:
    """Write the student's whole pipeline. All processes call it; the main process writes.

    Args:
        folder: new, and only for this.
        extra_components: components that are not the teacher's, besides the student.
        config: content of senseflow.json.
        files: of `teacher_files`.
    Returns:
        The file that makes the folder count.
    """
    network = models.student.gather_network()
    if network is not None:
        write_pipeline_files(folder, args, models, extra_components, config)
        for file, path in files.items():
            copy_component_file(path, folder / file)
        network = network.to("cpu", torch_dtype(args.export_dtype))
        check_export_dtype(network.state_dict(), network.dtype)
        network.save_pretrained(folder / models.network_name, max_shard_size=args.max_shard_size)
    return "model_index.json"


def export_adapter(
    folder: Path, args, models: TrainingModels, extra_components: dict[str, Any], config: dict[str, Any]
) -> str:
    """Write the student's adapter as `load_lora_weights` of the teacher's pipeline reads it. As `export_pipeline`."""
    weights = models.student.weights()
    if weights:
        network, dtype = models.student.module, torch_dtype(args.export_dtype)
        names = {"base": models.lora_base(), "kohya_names": models.kohya_names}
        export_lora(folder, models.pipeline_class, models.network_name, network, weights, dtype, **names)
        write_adapter_files(folder, args, models, extra_components, {**config, "lora_alpha": float(args.rank)})
    return FILE


# ---------------------------------------------------------------------------------------------------------------------
# Everything but the student's weights: known, and tried, before training
# ---------------------------------------------------------------------------------------------------------------------
def write_pipeline_files(folder: Path, args, models: TrainingModels, extra_components: dict, config: dict) -> None:
    """Write what a pipeline holds besides the student's network and the teacher's components."""
    folder.mkdir(exist_ok=True)
    cls, index = models.pipeline_class, models.source.read_json("model_index.json")
    for name, component in extra_components.items():
        component.save_pretrained(folder / name)
        index[name] = [type(component).__module__.split(".")[0], type(component).__name__]
    (folder / "model_index.json").write_text(json.dumps({**index, "_class_name": cls.__name__}, indent=2))
    write_student_config(folder, config)
    dtype, absent = torch_dtype(args.export_dtype), missing_components(cls, index)
    code = f"""from diffusers import {cls.__name__}
pipeline = {cls.__name__}.from_pretrained({folder_in_card(args)!r}, dtype={dtype}{format_kwargs(absent)})"""
    write_model_card(folder, code, args, models, config)


def write_adapter_files(folder: Path, args, models: TrainingModels, extra_components: dict, config: dict) -> None:
    """Write what an exported adapter comes with."""
    folder.mkdir(exist_ok=True)
    for name, component in extra_components.items():
        component.save_pretrained(folder / name)
    write_student_config(folder, config)
    write_model_card(folder, adapter_code(args, models, extra_components, config), args, models, config)


def teacher_files(models: TrainingModels, extra_components: dict[str, Any]) -> dict[str, Path]:
    """Return {path in the exported pipeline: file} of the teacher's components that are not replaced."""
    names = saved_components(models.source.read_json("model_index.json"))
    kept = [name for name in names if name != models.network_name and name not in extra_components]
    return {f"{name}/{file}": path for name in kept for file, path in component_files(models.source, name).items()}


# ---------------------------------------------------------------------------------------------------------------------
# The model card
# ---------------------------------------------------------------------------------------------------------------------
def format_kwargs(kwargs: dict[str, Any]) -> str:
    """Format keyword arguments that follow others in a call."""
    return "".join(f", {name}={value!r}" for name, value in kwargs.items())


def without_folders(path: str) -> str:
    """Return a placeholder for an absolute path, whose folders the card does not publish; other text unchanged."""
    return f"path/of/{Path(path).name}" if os.path.isabs(path) else path


def folder_in_card(args) -> str:
    """Return where the card's code finds the export: the repository of --push_to_hub, or a placeholder."""
    return args.hub_model_id if args.push_to_hub else FOLDER_IN_CARD


def table_cell(value: Any) -> str:
    """Return an argument in one line of a Markdown table, without the folders of an absolute path."""
    values = value if isinstance(value, (list, tuple)) else [value]
    text = ", ".join(f"{each:g}" if isinstance(each, float) else str(each) for each in values)
    return " ".join(without_folders(text).split()).replace("|", "\\|")


def adapter_code(args, models: TrainingModels, extra_components: dict[str, Any], config: dict[str, Any]) -> str:
    """Return the code that loads the teacher's pipeline as the adapter was trained over it, and then the adapter."""
    cls, dtype = models.pipeline_class, torch_dtype(args.export_dtype)
    classes = sorted({cls.__name__, *(type(component).__name__ for component in extra_components.values())})
    lines = [f"from diffusers import {', '.join(classes)}", f"folder = {folder_in_card(args)!r}"]
    kwargs = {name: config[f"teacher_{name}"] for name in ("revision", "variant") if config[f"teacher_{name}"]}
    kwargs |= missing_components(cls, models.source.read_json("model_index.json"))
    quantization = ""
    if args.base_quantization != "none":
        lines.append("from diffusers.quantizers import PipelineQuantizationConfig")
        lines.append(f"base = {quantization_config(args.base_quantization, models.network_name, dtype)}")
        quantization = ", quantization_config=base"
    arguments = f"{without_folders(config['teacher'])!r}, dtype={dtype}{quantization}{format_kwargs(kwargs)}"
    lines.append(f"pipeline = {cls.__name__}.from_pretrained({arguments})")
    for name, component in extra_components.items():
        arguments = f"folder, subfolder={name!r}"
        arguments += f", dtype={dtype}" if isinstance(component, torch.nn.Module) else ""
        lines.append(f"pipeline.{name} = {type(component).__name__}.from_pretrained({arguments})")
    if args.teacher_lora:  # the teacher comes before the adapter that was trained over it
        lora = without_folders(config["teacher_lora"])
        file = find_lora(ModelSource("--teacher_lora", args.teacher_lora)).name
        weight_name = "" if os.path.isfile(args.teacher_lora) else f", weight_name={file!r}"
        lines.append(f"pipeline.load_lora_weights({lora!r}{weight_name})")
        scale = f"lora_scale={args.teacher_lora_scale}"
        lines.append(f"pipeline.fuse_lora({cls._lora_loadable_modules}, {scale})".replace("'", '"'))
        lines.append("pipeline.unload_lora_weights()")
    return "\n".join([*lines, "pipeline.load_lora_weights(folder)"])


def license_of(source: ModelSource) -> dict[str, str]:
    """Return the license entries of a model's card; {"license": "other"} if there are none."""
    try:
        card = ModelCard.load(source.file("README.md") or "").data
    except (*UNREADABLE, yaml.YAMLError):
        return {"license": "other"}
    entries = {name: getattr(card, name, None) for name in ("license", "license_name", "license_link")}
    return {name: str(value) for name, value in entries.items() if value} or {"license": "other"}


def comfyui_sigmas(schedule: Schedule, t: torch.Tensor) -> list[float]:
    """Return the noise levels at timesteps t as ComfyUI counts them: sigma of a flow, sigma / alpha of DDPM."""
    alpha, sigma = schedule.levels(t)
    return (sigma / alpha.clamp(min=ALPHA_AT_ZERO_SNR) if isinstance(schedule, DDPMSchedule) else sigma).tolist()


def comfyui_section(models: TrainingModels, config: dict[str, Any]) -> str:
    """Describe how ComfyUI samples as the stock call does; "" for a script without `comfyui_shift`."""
    if models.comfyui_shift is None:
        return ""
    schedule, num_steps, call = models.schedule, config["num_inference_steps"], config["pipeline_call"]
    # What ComfyUI's scheduler "simple" visits: levels at equal distances, shifted.
    fractions = torch.arange(num_steps, 0, -1, dtype=torch.float64) / num_steps
    sampling = {}
    if isinstance(schedule, DDPMSchedule):
        if schedule.predicts_v:
            sampling = {"ModelSamplingDiscrete": f"v_prediction, zsnr {str(schedule.abar[-1].item() == 0).lower()}"}
        simple = comfyui_sigmas(schedule, len(schedule.train_timesteps) * fractions - 1)
    else:
        simple = (models.comfyui_shift * fractions / (1 + (models.comfyui_shift - 1) * fractions)).tolist()
    sigmas = comfyui_sigmas(schedule, schedule.anchors)
    settings = {
        "sampler": "lcm" if config["sampler"] == "stochastic" else config["sampler"],
        "steps": str(num_steps),
        "CFG": "1.0",
        "denoise": "1.0",
        "latent": f"empty, {call['width']} x {call['height']}",
        "sigmas to paste (ManualSigmas)": ", ".join(f"{sigma:.6g}" for sigma in [*sigmas, 0]),
    }
    if all(math.isclose(a, b, rel_tol=1e-4) for a, b in zip(simple, sigmas)):
        settings["or the scheduler"] = "simple, which visits these sigmas"
    if "teacher_lora" in config:
        lora = Path(config["teacher_lora"]).name
        settings["LoRA of the teacher"] = f"{lora}, too, at strength {config['teacher_lora_scale']:g}"
    settings |= {**sampling, **models.comfyui_guidance()}
    file = f"`{models.network_name}/{SAFETENSORS_WEIGHTS_NAME}`"
    how = f'"Load Diffusion Model" takes {file} as it is; text encoders and VAE are loaded as for the teacher'
    if "rank" in config:
        how = f"`{FILE}` goes into LoraLoaderModelOnly at strength 1, over the teacher's own weights"
    rows = "\n".join(f"| {table_cell(name)} | {table_cell(value)} |" for name, value in settings.items())
    return f"""## In ComfyUI

{how}.

| setting | value |
|---|---|
{rows}

"""


def write_model_card(folder: Path, code: str, args, models: TrainingModels, config: dict[str, Any]) -> None:
    """Write README.md: how to generate an image, the noise levels, the training arguments and the teacher's license.

    Args:
        code: makes `pipeline`.
        config: content of senseflow.json.
    """
    teacher, license_entries = config["teacher"], license_of(models.source)
    front = {"library_name": "diffusers", "pipeline_tag": "text-to-image", **license_entries}
    if without_folders(teacher) == teacher:
        front["base_model"] = teacher
    made = f"{config['iteration']} iterations"
    if args.rank:
        front |= {"base_model_relation": "adapter", "tags": ["lora"]}
        made += f"; an adapter (LoRA) of rank {args.rank} for the teacher's own weights"
        made += f" in {args.base_quantization}" * (args.base_quantization != "none")
    arguments = {name: value for name, value in vars(args).items() if name != "given"}
    arguments["revision"] = models.source.revision
    table = "\n".join(f"| {name} | {table_cell(value)} |" for name, value in sorted(arguments.items()))
    levels = ", ".join(f"{t:g} (sigma {sigma:.4f})" for t, sigma in zip(config["timesteps"], config["sigmas"]))
    sizes = ", ".join(f"{height} x {width}" for height, width in config["sizes"])
    version = "".join(
        f", {name} `{config[f'teacher_{name}']}`" for name in ("revision", "variant") if config[f"teacher_{name}"]
    )
    license_name = license_entries.get("license_name", license_entries["license"])
    name = table_cell(teacher).removeprefix("path/of/")
    card = f"""---
{yaml.safe_dump(front, sort_keys=False).strip()}
---

# {Path(name).name} in {config["num_inference_steps"]} steps

Distilled from `{name}`{version} with {models.method}: {made}.

```python
import torch
{code}
image = pipeline(prompt="a prompt"{format_kwargs(config["pipeline_call"])}).images[0]
```

The student was trained at these timesteps, which the call visits: {levels}; {config["sampler"]} sampler; and on images
of {sizes} (height x width).

The weights are a derivative of the teacher's and stay under the teacher's license ({license_name}).

{comfyui_section(models, config)}## Training arguments

| flag | value |
|---|---|
{table}
"""
    (folder / "README.md").write_text(card, encoding="utf-8", errors="backslashreplace")  # paths may not be UTF-8
