#!/usr/bin/env python
# Copyright 2026 The SenseFlow-scripts authors. Licensed under the Apache License, Version 2.0.
"""Measure what limits evaluate.py: images per second that are decoded, prepared and encoded by networks of real sizes.

    python benchmarks/evaluation_throughput.py [--device cuda] [--dtype bf16]

The weights are random. The image is a gradient with noise, of 1024 px, a PNG as infer.py writes it.
Inception is left out.
"""

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from full_size import DINOV2_LARGE
from PIL import Image
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, Dinov2Config, Dinov2Model

from senseflow.arguments import DTYPES, torch_dtype
from senseflow.data.images import read_image
from senseflow.evaluation import converters
from senseflow.evaluation.metrics import center_patch
from senseflow.evaluation.scorers import process_image


def calls_per_second(function, *args, seconds: float = 5) -> float:
    """Return the rate of calls, after one that is not counted."""
    function(*args)
    count, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        function(*args)
        count += 1
    return count / (time.perf_counter() - start)


def clip_vision_model(width: int, layers: int, intermediate_size: int) -> torch.nn.Module:
    vision = converters.transformer_sizes(width, layers, heads=16) | {"patch_size": 14, "image_size": 224}
    config = CLIPConfig(
        vision_config=vision | {"intermediate_size": intermediate_size},
        text_config=converters.transformer_sizes(64, layers=1, heads=1),
    )
    return CLIPModel(config).vision_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--batch_size", type=int, default=8)
    args = parser.parse_args()
    dtype = torch_dtype(args.dtype)
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, {args.device}, {args.dtype}; images per second"
    )
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "image.png"
        ramp = np.linspace(0, 200, 1024)[:, None, None] + np.random.default_rng(0).normal(20, 8, (1024, 1024, 3))
        Image.fromarray(ramp.clip(0, 255).astype(np.uint8)).save(file)
        image = read_image(str(file))[0]
        print(f"| decoded | {calls_per_second(read_image, str(file)):.1f} |")
    processor = CLIPImageProcessorPil()
    for name, prepare in {
        "fid": converters.to_tensor,
        "patch_fid": lambda image: converters.to_tensor(center_patch(image)),
        "clip, pickscore, fd": lambda image: process_image(processor, image),
        "hpsv2": lambda image: converters.hpsv2_pixels(224, image),
        "imagereward": lambda image: converters.imagereward_pixels(224, image),
    }.items():
        print(f"| prepared for {name} | {calls_per_second(prepare, image):.1f} |", flush=True)

    pixels = torch.randn(args.batch_size, 3, 224, 224).to(args.device, dtype)
    tokens = torch.ones(args.batch_size, 35, dtype=torch.long, device=args.device)
    networks = {
        "fd, diversity: DINOv2 large": (lambda: Dinov2Model(Dinov2Config(**DINOV2_LARGE)), ()),
        "hpsv2, pickscore: ViT-H-14": (lambda: clip_vision_model(1280, 32, 5120), ()),
        "clip: ViT-g-14": (lambda: clip_vision_model(1408, 40, 6144), ()),
        "imagereward: BLIP large": (
            lambda: converters.ImageReward(converters.IMAGEREWARD_CONFIG),
            (tokens, torch.ones_like(tokens)),
        ),
    }
    for name, (make, more) in networks.items():
        with torch.no_grad():
            network = make().eval().to(args.device, dtype)

            def encode(network=network, more=more):
                network(pixels, *more)
                if args.device.startswith("cuda"):
                    torch.cuda.synchronize()

            print(f"| encoded for {name} | {args.batch_size * calls_per_second(encode):.2f} |", flush=True)
        del network, encode


if __name__ == "__main__":
    main()
