# Copyright 2026 The SenseFlow-scripts authors. Licensed under the Apache License, Version 2.0.
"""The networks that look at images for evaluate.py, and how each wants images and prompts."""

import hashlib
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Callable, Optional

import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer, CLIPModel

from senseflow.arguments import DTYPES
from senseflow.evaluation.converters import hpsv2_pixels, imagereward_pixels, read_hpsv2, read_imagereward
from senseflow.evaluation.metrics import centre_patch
from senseflow.models.hub import ModelSource, fingerprint


TOKENS_OF_IMAGEREWARD = 35


@dataclass
class Network:
    """What looks at images.

    Attributes:
        name: of the files of its features; says everything that these depend on besides images and prompts.
        prepare: an image -> a tensor.
        look: a batch of these, on the device -> features (B, D); where `reads_while_looking`, of these and their prompts.
        read: prompts -> embeddings (B, D), where it reads them by themselves.
        logit_scale: of a CLIPModel.
    """

    name: str
    prepare: Callable[[Image.Image], torch.Tensor]
    look: Callable[..., torch.Tensor]
    read: Optional[Callable[[list[str]], torch.Tensor]] = None
    logit_scale: float = 0.0
    reads_while_looking: bool = False


def load_inception(args, patch: bool) -> Network:
    """The network of FID as StyleGAN publishes it: uint8 images of any size -> 2,048 numbers."""
    with ModelSource("--inception", args.inception).loading():
        network = torch.jit.load(args.inception, map_location=args.device).eval()
    digest = hashlib.sha256(Path(args.inception).read_bytes()).hexdigest()[:16]
    crop = centre_patch if patch else (lambda image: image)
    look = partial(network, return_features=True)
    return Network(f"inception{'-patch' if patch else ''}-{digest}", lambda image: _bytes_of(crop(image)), look)


def _bytes_of(image: Image.Image) -> torch.Tensor:
    """(3, H, W) uint8."""
    return (
        torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
        .view(image.height, image.width, 3)
        .permute(2, 0, 1)
    )


def load_vision(args) -> Network:
    """The pooled output of a vision model of transformers; of DINOv2 the CLS token after the last norm."""
    source, dtype = ModelSource("--feature_model", args.feature_model), DTYPES[args.dtype]
    with source.loading():
        model = source.load(AutoModel.from_pretrained, dtype=dtype).eval().to(args.device)
        processor = source.load(AutoImageProcessor.from_pretrained)

    def look(pixels: torch.Tensor) -> torch.Tensor:
        return model(pixel_values=pixels.to(dtype)).pooler_output

    return Network(f"vision-{fingerprint(model)}-{args.dtype}", partial(_processed, processor), look)


def load_clip(args, flag: str) -> Network:
    """A CLIPModel of transformers with its own processing of images and texts."""
    source = ModelSource(f"--{flag}", getattr(args, flag))
    with source.loading():
        model = source.load(CLIPModel.from_pretrained)
        processor = source.load(AutoImageProcessor.from_pretrained)
    return _clip(args, model, partial(_processed, processor), source)


def load_hpsv2(args) -> Network:
    """HPS v2.1; its tokenizer is that of every CLIP."""
    model = read_hpsv2(Path(args.hpsv2))
    prepare = partial(hpsv2_pixels, model.config.vision_config.image_size)
    return _clip(args, model, prepare, ModelSource("--clip_model", args.clip_model))


def _clip(args, model: CLIPModel, prepare: Callable, source: ModelSource) -> Network:
    """Args: source: of the tokenizer."""
    dtype, name = DTYPES[args.dtype], f"clip-{fingerprint(model)}-{args.dtype}"
    model = model.eval().to(args.device, dtype)
    with source.loading():
        tokenizer = source.load(AutoTokenizer.from_pretrained)
    length = model.config.text_config.max_position_embeddings

    def look(pixels: torch.Tensor) -> torch.Tensor:
        return model.visual_projection(model.vision_model(pixel_values=pixels.to(dtype)).pooler_output)

    def read(prompts: list[str]) -> torch.Tensor:
        tokens = tokenizer(prompts, padding=True, truncation=True, max_length=length, return_tensors="pt").to(
            args.device
        )
        return model.text_projection(model.text_model(**tokens).pooler_output)

    return Network(name, prepare, look, read, model.logit_scale.item())


def load_imagereward(args) -> Network:
    """ImageReward, whose features are its scores (B, 1)."""
    model, dtype = read_imagereward(Path(args.imagereward)), DTYPES[args.dtype]
    name, model = f"imagereward-{fingerprint(model)}-{args.dtype}", model.to(args.device, dtype)
    source = ModelSource("--imagereward_tokenizer", args.imagereward_tokenizer)
    with source.loading():
        tokenizer = source.load(AutoTokenizer.from_pretrained)
    how = {"padding": "max_length", "truncation": True, "max_length": TOKENS_OF_IMAGEREWARD, "return_tensors": "pt"}

    def look(pixels: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        tokens = tokenizer(prompts, **how).to(args.device)
        return model(pixels.to(dtype), tokens.input_ids, tokens.attention_mask)[:, None]

    prepare = partial(imagereward_pixels, model.vision.config.image_size)
    return Network(name, prepare, look, reads_while_looking=True)


def _processed(processor, image: Image.Image) -> torch.Tensor:
    return processor(images=image, return_tensors="pt").pixel_values[0]
