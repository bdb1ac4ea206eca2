# Copyright 2026 The SenseFlow-scripts authors. Licensed under the Apache License, Version 2.0.
"""Write the student of a run with --rank as a whole pipeline, for programs that take no adapters.

python -m senseflow.merge_lora flux-4step-lora flux-4step-merged
"""

import os
import shutil
from pathlib import Path

import torch

from senseflow.arguments import DTYPES, Parser, torch_dtype
from senseflow.errors import UserError, run_script
from senseflow.inference import find_model, load_model_pipeline
from senseflow.student_config import write_student_config


def main(argv=None):
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("model", metavar="MODEL", help="The exported adapter or a checkpoint: a folder or Hub id.")
    parser.add_argument("output", metavar="OUT", type=Path, help="Folder to write.")
    parser.add_argument("--dtype", choices=list(DTYPES), default="bf16", help="Precision of the merged pipeline.")
    args = parser.parse_args(argv)
    model = find_model(args.model)
    config = model.student_config
    if model.adapter is None:
        raise UserError(f"MODEL {args.model}: is no adapter of a run with --rank", exit_code=2)
    if "base_quantization" in config:
        problem = f"was trained over weights in {config['base_quantization']}, into which nothing can be merged"
        raise UserError(f"MODEL {args.model}: {problem}", exit_code=2)
    if args.output.exists() and (not args.output.is_dir() or os.listdir(args.output)):
        raise UserError(f"OUT {args.output}: is there already; give a new folder", exit_code=2)

    pipeline = load_model_pipeline(model, config["sampler"], torch.device("cpu"), torch_dtype(args.dtype))
    network = getattr(pipeline, model.network)
    network.fuse_lora(safe_fusing=True)
    network.unload_lora()
    aside = args.output.with_name(f".{args.output.name}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        pipeline.save_pretrained(aside, max_shard_size="1TB")
        of_adapters = ("rank", "lora_alpha", "teacher_fingerprint", "teacher_lora", "teacher_lora_scale")
        write_student_config(aside, {name: value for name, value in config.items() if name not in of_adapters})
        os.replace(aside, args.output)
    except OSError as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise UserError(f"OUT {args.output}: cannot be written ({error})") from error


if __name__ == "__main__":
    run_script(main)
