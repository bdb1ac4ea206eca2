# Copyright 2026 The SenseFlow-scripts authors. Licensed under the Apache License, Version 2.0.
"""The student saved as a pipeline around the teacher's other parts, or as an adapter. No family of pipelines is named here."""

import json
import os
from pathlib import Path
from typing import Optional

import torch
import yaml
from accelerate.logging import get_logger
from huggingface_hub import ModelCard

from senseflow.arguments import DTYPES
from senseflow.errors import UserError
from senseflow.models.hub import UNREADABLE, ModelSource, load_pipeline, missing_components, teacher_source
from senseflow.models.lora import FILE, find_lora, metadata_of
from senseflow.models.quantization import quantization_config
from senseflow.training.checkpoints import INCOMPLETE, publish_folder, writing
from senseflow.training.roles import Role
from senseflow.training.runtime import Runtime
from senseflow_utils import Schedule


logger = get_logger(__name__)

PLACE = "path/of/this/folder"  # in a model card
LOWEST_DEFAULT = 50  # the timestep, of 1000, below which no anchor is chosen for a user


# ---------------------------------------------------------------------------------------------------------------------
# Before any weight loads
# ---------------------------------------------------------------------------------------------------------------------
def check_resolution(args, multiple: int) -> None:
    """Refuses (exit code 2) a --resolution that this teacher's latents do not divide into; keeps `multiple` for `usage_record`."""
    args.pixel_multiple = multiple
    if args.resolution % multiple:
        message = f"--resolution {args.resolution} is not divisible by {multiple}, as this teacher's latents need"
        raise UserError(message, exit_code=2)


def check_anchors(args, schedule: Schedule) -> None:
    """Refuses (exit code 2) an --isg_margin that leaves a segment between anchors without a timestep; and, ISG or not, anchors
    that nobody gave and that are crowded in this way, or end below LOWEST_DEFAULT."""
    default, crowded = "anchors" not in args.given, schedule.check_margin(args.isg_margin)
    shown = [f"{t:.4g}" for t in schedule.anchors]
    problem, fix = None, "give --anchors, such as 1000 900 750 500"
    if default and schedule.anchors[-1] < LOWEST_DEFAULT:
        problem = f"{shown[-1]} is below {LOWEST_DEFAULT}, where next to nothing is left to draw"
    elif crowded and (default or args.isg_weight > 0):
        problem = f"--isg_margin {args.isg_margin:g} leaves no timestep between {crowded[0]:.4g} and {crowded[1]:.4g}"
        fix = "lower it, or give --anchors further apart" if args.isg_weight > 0 else fix
    if problem:
        origin = f"--anchors {' '.join(shown)}{' (found for this teacher)' if default else ''}"
        raise UserError(f"{origin}: {problem}; {fix}", exit_code=2)


# ---------------------------------------------------------------------------------------------------------------------
# The student as a pipeline
# ---------------------------------------------------------------------------------------------------------------------
def absolute_if_local(path: str) -> str:
    """The absolute path of a file or folder, so that a checkpoint finds its teacher from anywhere; a Hub id as it is."""
    return str(Path(path).resolve()) if os.path.exists(path) else path


def student_config(args, schedule: Schedule, call: dict, iteration: int, fingerprints: dict) -> dict:
    """What senseflow.json holds: the trained levels, the sampler, the stock pipeline call that visits them, and what it takes to
    load the rest of the pipeline again; of an adapter, its rank and the fingerprint of the network that it belongs to.

    Args:
        prints: of `senseflow.training.checkpoints.fingerprints_of`.
    """
    record = {
        "sigmas": schedule.levels(schedule.anchors)[1].tolist(),
        "timesteps": schedule.anchors.tolist(),
        "sampler": args.sampler,
        "num_inference_steps": len(schedule.anchors),
        "pixel_multiple": args.pixel_multiple,
        "teacher": absolute_if_local(args.pretrained_model_name_or_path),
        "teacher_revision": args.revision,
        "teacher_variant": args.variant,
        "iteration": iteration,
        "pipeline_call": call,
    }
    if args.rank:
        record |= {"rank": args.rank, "lora_alpha": args.lora_alpha, "teacher_fingerprint": fingerprints["teacher"]}
    if args.base_quantization != "none":
        record |= {"base_quantization": args.base_quantization}
    if args.rank and args.teacher_lora:
        record |= {"teacher_lora": absolute_if_local(args.teacher_lora), "teacher_lora_scale": args.teacher_lora_scale}
    return record | {name: call[name] for name in ("guidance_scale",) if name in call}


def write_student_config(folder: Path, record: dict, components: dict, signals: Optional[dict] = None) -> None:
    """senseflow.json, and the `components` that are not the teacher's (the scheduler): what infer.py needs beside the student; and
    validation.json of what was last seen in the validation images, if anything.
    """
    for name, component in components.items():
        component.save_pretrained(folder / name)
    (folder / "senseflow.json").write_text(json.dumps(record, indent=1))
    if signals:
        (folder / "validation.json").write_text(json.dumps(signals, indent=1))


def export(runtime: Runtime, args, pipeline_class, student: Role, components: dict, record: dict) -> None:
    """The whole pipeline in --output_dir, or with --rank the adapter for the teacher's; with senseflow.json and the model card.
    Written aside, then moved.

    Args:
        components: what is not the teacher's besides the student: the scheduler.
        record: of `usage_record`.
    """
    student.check_finite()
    if args.rank:
        export_adapter(runtime, args, pipeline_class, student, components, record)
        return
    network = student.network()
    if runtime.accelerator.is_main_process:
        dtype = DTYPES[args.export_dtype]
        aside = Path(args.output_dir) / f"export{INCOMPLETE}"
        others = {student.subfolder: None, **components}
        pipeline = load_pipeline(teacher_source(args), pipeline_class, dtype=dtype, **others)
        pipeline.register_modules(**{student.subfolder: network})  # the run is over
        with writing(aside):
            pipeline.to("cpu", dtype).save_pretrained(aside)
            write_student_config(aside, record, {})
            absent = keywords(missing_components(pipeline_class, json.loads((aside / "model_index.json").read_text())))
            lines = f"""from diffusers import {pipeline_class.__name__}
pipeline = {pipeline_class.__name__}.from_pretrained("{PLACE}", dtype={dtype}{absent})"""
            write_model_card(aside, lines, record, args)
            publish_folder(aside, Path(args.output_dir), last="model_index.json")
        logger.info(f"the pipeline is in {args.output_dir}")
    runtime.accelerator.wait_for_everyone()


def export_adapter(runtime: Runtime, args, pipeline_class, student: Role, components: dict, record: dict) -> None:
    """The adapter in --output_dir, as `load_lora_weights` of the teacher's pipeline wants it, and what else `export` writes."""
    weights = student.weights()
    if runtime.accelerator.is_main_process:
        weights = {name: tensor.to(DTYPES[args.export_dtype]) for name, tensor in weights.items()}
        aside = Path(args.output_dir) / f"export{INCOMPLETE}"
        with writing(aside):
            layers, metadata = f"{student.subfolder}_lora_layers", f"{student.subfolder}_lora_adapter_metadata"
            pipeline_class.save_lora_weights(aside, **{layers: weights, metadata: metadata_of(student.module)})
            write_student_config(aside, record, components)
            write_model_card(
                aside,
                lines_with_adapter(pipeline_class, student.subfolder, components, record, args),
                record,
                args,
                adapter=True,
            )
            publish_folder(aside, Path(args.output_dir), last=FILE)
        logger.info(f"the adapter is in {args.output_dir}")
    runtime.accelerator.wait_for_everyone()


def license_of(source: ModelSource) -> dict[str, str]:
    """The license entries of a model's card (license, license_name, license_link); {"license": "other"} where it has none."""
    try:
        card = ModelCard.load(source.file("README.md") or "").data
    except (*UNREADABLE, yaml.YAMLError):
        return {"license": "other"}
    entries = {name: getattr(card, name, None) for name in ("license", "license_name", "license_link")}
    return {name: str(value) for name, value in entries.items() if value} or {"license": "other"}


def keywords(arguments: dict) -> str:
    """How they follow others in a call."""
    return "".join(f", {name}={value!r}" for name, value in arguments.items())


def lines_with_adapter(pipeline_class, network: str, components: dict, record: dict, args) -> str:
    """The code that makes `pipeline` of the teacher's, with its `network` as it was trained over, what of it is not the
    teacher's, and the adapter."""
    dtype = DTYPES[args.export_dtype]
    classes = sorted({pipeline_class.__name__, *(type(component).__name__ for component in components.values())})
    source = {name: record[f"teacher_{name}"] for name in ("revision", "variant") if record[f"teacher_{name}"]}
    absent = missing_components(pipeline_class, teacher_source(args).read_json("model_index.json"))
    lines, base = [f"from diffusers import {', '.join(classes)}", f'folder = "{PLACE}"'], ""
    if args.base_quantization != "none":
        lines += [
            "from diffusers.quantizers import PipelineQuantizationConfig",
            f"base = {quantization_config(args.base_quantization, network, dtype)}",
        ]
        base = ", quantization_config=base"
    source = f'"{record["teacher"]}", dtype={dtype}{base}{keywords(source | absent)}'
    lines.append(f"pipeline = {pipeline_class.__name__}.from_pretrained({source})")
    for name, component in components.items():
        how = f", dtype={dtype}" if isinstance(component, torch.nn.Module) else ""
        lines.append(f'pipeline.{name} = {type(component).__name__}.from_pretrained(folder, subfolder="{name}"{how})')
    if args.teacher_lora:  # what the teacher was made with, before what was learned over it
        file = find_lora(ModelSource("--teacher_lora", args.teacher_lora)).name
        lora, name = record["teacher_lora"], "" if os.path.isfile(args.teacher_lora) else f', weight_name="{file}"'
        lines += [
            f'pipeline.load_lora_weights("{lora}"{name})',
            f"pipeline.fuse_lora(lora_scale={args.teacher_lora_scale})",
            "pipeline.unload_lora_weights()",
        ]
    return "\n".join([*lines, "pipeline.load_lora_weights(folder)"])


def write_model_card(folder: Path, lines: str, record: dict, args, adapter: bool = False) -> None:
    """README.md of what is exported: usage in a few lines with the exact call, levels, training arguments, the teacher's license.

    Args:
        lines: the code that makes `pipeline`.
        record: what senseflow.json holds; `pipeline_call` are the arguments of the stock call.
    """
    teacher, teacher_license = record["teacher"], license_of(teacher_source(args))
    front = {"library_name": "diffusers", "pipeline_tag": "text-to-image", **teacher_license}
    if not os.path.isdir(teacher):
        front["base_model"] = teacher
    made = f"{record['iteration']} iterations"
    if adapter:
        front |= {"base_model_relation": "adapter", "tags": ["lora"]}
        made += f"; an adapter (LoRA) of rank {args.rank}, alpha {args.lora_alpha:g}, for the teacher's own weights"
        made += f" in {args.base_quantization}" * (args.base_quantization != "none")
    call = keywords(record["pipeline_call"])
    arguments = "\n".join(f"| {name} | {value} |" for name, value in sorted(vars(args).items()))
    levels = ", ".join(f"{t:g} (sigma {sigma:.4f})" for t, sigma in zip(record["timesteps"], record["sigmas"]))
    source = "".join(
        f", {name} `{record[f'teacher_{name}']}`" for name in ("revision", "variant") if record[f"teacher_{name}"]
    )
    license_name = teacher_license.get("license_name", teacher_license["license"])
    (folder / "README.md").write_text(
        f"""---
{yaml.safe_dump(front, sort_keys=False).strip()}
---

# {Path(teacher).name} in {record["num_inference_steps"]} steps

Distilled from `{teacher}`{source} with SenseFlow (arXiv 2506.00523), {made}.

```python
import torch
{lines}
image = pipeline(prompt="a prompt"{call}).images[0]
```

Timesteps visited: {levels}, {record["sampler"]} sampler. These are the levels that the student was trained at.

The weights are a derivative of the teacher's and under the teacher's license ({license_name}).

## Training arguments

| flag | value |
|---|---|
{arguments}
"""
    )
