#!/usr/bin/env python
# Copyright 2026 The SenseFlow-scripts authors. Licensed under the Apache License, Version 2.0.
"""What bounds evaluate.py: images per second that are decoded, prepared and looked at, with networks of the real sizes.

    python benchmarks/looking.py [--device cuda] [--dtype bf16]

Random weights; an image of noise over a gradient, 1024 px, PNG as infer.py writes it. Inception's network is not among them.
"""

import argparse
import tempfile
import time
from pathlib import Path

import full_size  # puts the repository on the path
import numpy as np
import torch
from PIL import Image
from transformers import (
    BlipTextConfig,
    BlipVisionConfig,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    Dinov2Config,
    Dinov2Model,
)

from senseflow.arguments import DTYPES
from senseflow.data.images import read_image
from senseflow.evaluation import converters
from senseflow.evaluation.metrics import centre_patch
from senseflow.evaluation.scorers import _bytes_of, _processed


def rate(function, *args, seconds: float = 5) -> float:
    """Calls a second, after one that is not counted."""
    function(*args)
    count, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        function(*args)
        count += 1
    return count / (time.perf_counter() - start)


def sight(width: int, layers: int, heads: int, patch: int) -> dict:
    sizes = {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
    }
    return sizes | {"patch_size": patch, "image_size": 224}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--batch_size", type=int, default=8)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "image.png"
        ramp = np.linspace(0, 200, 1024)[:, None, None] + np.random.default_rng(0).normal(20, 8, (1024, 1024, 3))
        Image.fromarray(ramp.clip(0, 255).astype(np.uint8)).save(file)
        image = read_image(str(file))[0]
        process = CLIPImageProcessorPil()
        print(
            f"torch {torch.__version__}, {torch.get_num_threads()} threads, {args.device}, {args.dtype}; images a second"
        )
        print(f"| decoded | {rate(read_image, str(file)):.1f} |")
        for name, prepare in {
            "fid": _bytes_of,
            "patch_fid": lambda image: _bytes_of(centre_patch(image)),
            "clip, pickscore, fd": lambda image: _processed(process, image),
            "hpsv2": lambda image: converters.hpsv2_pixels(224, image),
            "imagereward": lambda image: converters.imagereward_pixels(224, image),
        }.items():
            print(f"| prepared for {name} | {rate(prepare, image):.1f} |", flush=True)
    dtype, pixels = DTYPES[args.dtype], torch.randn(args.batch_size, 3, 224, 224)
    pixels = pixels.to(args.device, dtype)
    tokens = torch.ones(args.batch_size, 35, dtype=torch.long, device=args.device)

    def clip(vision: dict) -> torch.nn.Module:
        text = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1}
        return CLIPModel(CLIPConfig(vision_config=vision, text_config=text)).vision_model

    def reward() -> torch.nn.Module:
        text = BlipTextConfig(encoder_hidden_size=1024, is_decoder=True)
        head = [(768, 1024), (1024, 128), (128, 64), (64, 16), (16, 1)]
        return converters.ImageReward(BlipVisionConfig(**sight(1024, 24, 16, 16)), text, head)

    networks = {
        "fd, diversity: DINOv2 large": (lambda: Dinov2Model(Dinov2Config(**full_size.DINOV2_LARGE)), ()),
        "hpsv2, pickscore: ViT-H-14": (lambda: clip(sight(1280, 32, 16, 14)), ()),
        "clip: ViT-g-14": (lambda: clip(sight(1408, 40, 16, 14) | {"intermediate_size": 6144}), ()),
        "imagereward: BLIP large": (reward, (tokens, torch.ones_like(tokens))),
    }
    for name, (make, more) in networks.items():
        with torch.no_grad():
            network = make().eval().to(args.device, dtype)

            def look(network=network, more=more):
                network(pixels, *more)
                if args.device.startswith("cuda"):
                    torch.cuda.synchronize()

            print(f"| looked at for {name} | {args.batch_size * rate(look):.2f} |", flush=True)
        del network, look


if __name__ == "__main__":
    main()
