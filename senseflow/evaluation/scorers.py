# Copyright 2026 The SenseFlow-scripts authors. Licensed under the Apache License, Version 2.0.
"""Load the networks behind the metrics, and compute their features of images and prompts."""

import hashlib
import itertools
import json
import logging
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Callable, Optional

import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer, CLIPModel

from senseflow.arguments import torch_dtype
from senseflow.data.images import read_image
from senseflow.errors import UserError, write_atomically
from senseflow.evaluation import converters
from senseflow.evaluation.image_sets import ImageSet
from senseflow.evaluation.metrics import center_patch
from senseflow.models.hub import ModelSource


logger = logging.getLogger(__name__)
CHUNK_SIZE = 256  # images whose features are cached in one file


@dataclass
class Scorer:
    """A network that computes features of images, and perhaps of prompts.

    Attributes:
        name: of the kind of network, and a hash of what its features depend on; part of the names of cached files.
        prepare: image -> the network's input, without the batch dimension. Picklable.
        encode_images: (inputs (B, 3, H, W) on the device; with `needs_prompts`, also B prompts) -> features (B, D).
        encode_prompts: prompts -> features (B, D).
        logit_scale: of a CLIPModel.
    """

    name: str
    prepare: Callable[[Image.Image], torch.Tensor]
    encode_images: Callable[..., torch.Tensor]
    encode_prompts: Optional[Callable[[list[str]], torch.Tensor]] = None
    logit_scale: float = 0.0
    needs_prompts: bool = False


def load_scorer(args, metric: str) -> Scorer:
    """Load the network of a metric. UserError: exit code 1 for damaged weights, 2 for a file with other weights."""
    if metric in ("fid", "patch_fid"):
        return load_inception(args, metric)
    if metric in ("clip", "hpsv2", "pickscore"):
        return load_clip(args, metric)
    return load_imagereward(args) if metric == "imagereward" else load_vision_model(args)


def hash_scorer(network: torch.nn.Module, *saved) -> str:
    """Hash the weights of a network, and what `saved` (configuration, image processor, tokenizer) write to files."""
    digest = hashlib.sha256()
    for name, tensor in network.state_dict().items():
        digest.update(name.encode() + tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    for part in saved:
        digest.update(type(part).__name__.encode())  # of Pillow or of torchvision, which scale images differently
        with TemporaryDirectory() as folder:
            part.save_pretrained(folder)
            for file in sorted(Path(folder).iterdir()):
                digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def load_inception(args, metric: str) -> Scorer:
    """Load Inception as StyleGAN's authors publish it: uint8 images of any size -> features of 2,048 dimensions."""
    with ModelSource("--inception", args.inception).loading():
        network = torch.jit.load(args.inception, map_location=args.device).eval()
    digest = hashlib.sha256(Path(args.inception).read_bytes()).hexdigest()[:16]
    encode_images = partial(network, return_features=True)
    if metric == "patch_fid":
        digest, prepare = f"patch-{digest}", patch_to_tensor
    else:
        prepare = converters.to_tensor
    return Scorer(f"inception-{digest}", prepare, encode_images)


def load_vision_model(args) -> Scorer:
    """Load --feature_model. Its feature is the pooled output; for DINOv2, the CLS token after the last norm."""
    source, dtype = ModelSource("--feature_model", args.feature_model), torch_dtype(args.dtype)
    with source.loading():
        model = source.load(AutoModel.from_pretrained, dtype=dtype).eval().to(args.device)
        processor = source.load(AutoImageProcessor.from_pretrained)

    def encode_images(pixels: torch.Tensor) -> torch.Tensor:
        return model(pixel_values=pixels.to(dtype)).pooler_output

    name = f"vision-{hash_scorer(model, model.config, processor)}-{args.dtype}"
    return Scorer(name, partial(process_image, processor), encode_images)


def load_clip(args, metric: str) -> Scorer:
    """Load the CLIPModel of clip, pickscore or hpsv2."""
    flag = "pickscore_model" if metric == "pickscore" else "clip_model"  # hpsv2: all CLIPs have the same tokenizer
    source, dtype = ModelSource(f"--{flag}", getattr(args, flag)), torch_dtype(args.dtype)
    with source.loading():
        tokenizer = source.load(AutoTokenizer.from_pretrained)
        if metric == "hpsv2":
            model = converters.load_published("--hpsv2", Path(args.hpsv2), CLIPModel(converters.HPSV2_CONFIG))
            saved, prepare = (), partial(converters.hpsv2_pixels, model.config.vision_config.image_size)
        else:
            model = source.load(CLIPModel.from_pretrained).eval()
            saved = (source.load(AutoImageProcessor.from_pretrained),)
            prepare = partial(process_image, *saved)
    # The features of prompts are not cached: the tokenizer is not a part of the name.
    name = f"{'hpsv2' if metric == 'hpsv2' else 'clip'}-{hash_scorer(model, model.config, *saved)}-{args.dtype}"
    logit_scale = model.logit_scale.item()  # bf16 would round it
    model = model.to(args.device, dtype)
    length = model.config.text_config.max_position_embeddings

    def encode_images(pixels: torch.Tensor) -> torch.Tensor:
        return model.visual_projection(model.vision_model(pixel_values=pixels.to(dtype)).pooler_output)

    def encode_prompts(prompts: list[str]) -> torch.Tensor:
        tokens = tokenizer(prompts, padding=True, truncation=True, max_length=length, return_tensors="pt")
        return model.text_projection(model.text_model(**tokens.to(args.device)).pooler_output)

    return Scorer(name, prepare, encode_images, encode_prompts, logit_scale)


def load_imagereward(args) -> Scorer:
    """Load ImageReward. Its features are its scores (B, 1)."""
    source, dtype = ModelSource("--imagereward_tokenizer", args.imagereward_tokenizer), torch_dtype(args.dtype)
    with source.loading():
        tokenizer = source.load(AutoTokenizer.from_pretrained)
    network, config = converters.ImageReward(converters.IMAGEREWARD_CONFIG), converters.IMAGEREWARD_CONFIG
    model = converters.load_published("--imagereward", Path(args.imagereward), network)
    name = f"imagereward-{hash_scorer(model, config, tokenizer)}-{args.dtype}"
    model = model.to(args.device, dtype)

    def encode_images(pixels: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        tokens = tokenizer(prompts, padding="max_length", truncation=True, max_length=35, return_tensors="pt")
        tokens = tokens.to(args.device)
        return model(pixels.to(dtype), tokens.input_ids, tokens.attention_mask)[:, None]

    prepare = partial(converters.imagereward_pixels, config.vision_config.image_size)
    return Scorer(name, prepare, encode_images, needs_prompts=True)


def patch_to_tensor(image: Image.Image) -> torch.Tensor:
    return converters.to_tensor(center_patch(image))


def process_image(processor, image: Image.Image) -> torch.Tensor:
    return processor(images=image, return_tensors="pt").pixel_values[0]


def prepare_batch(prepare: Callable, batch: list[tuple[Path, Optional[str]]]) -> list:
    """Return (a network's input, prompt) for each (file, prompt), or a UserError where the file cannot be read."""
    prepared = []
    for file, prompt in batch:
        image, problem = read_image(str(file))
        error = UserError(f"{file}: cannot be read ({problem}); generate or copy it again", 2)
        prepared.append(error if image is None else (prepare(image), prompt))
    return prepared


@torch.no_grad()
def compute_image_features(args, scorer: Scorer, images: ImageSet) -> torch.Tensor:
    """Compute features (N, D), float32 on the CPU, or read them from the cache.

    Each CHUNK_SIZE images have a file in `images.cache`, written as soon as their features are computed. Its name is a
    hash of the scorer's name, the files' paths, sizes and times of change, and the prompts that the scorer needs.
    """
    chunks = []
    with tqdm(total=len(images.files), desc=f"{scorer.name.split('-')[0]} {images.name}", unit="image") as progress:
        for start in range(0, len(images.files), CHUNK_SIZE):
            files = images.files[start : start + CHUNK_SIZE]
            prompts = images.prompts[start : start + CHUNK_SIZE] if scorer.needs_prompts else None
            stats = [(str(file), (stat := file.stat()).st_size, stat.st_mtime_ns) for file in files]
            digest = hashlib.sha256(json.dumps([scorer.name, stats, prompts]).encode()).hexdigest()[:24]
            cached = images.cache / f"{scorer.name}-{digest}.safetensors"
            if cached.exists():
                chunks.append(load_file(cached)["features"])
                progress.update(len(files))
            else:
                chunks.append(compute_chunk(args, scorer, files, prompts, progress))
                write_features(cached, chunks[-1])
    return torch.cat(chunks)


def compute_chunk(args, scorer: Scorer, files: list[Path], prompts: Optional[list[str]], progress) -> torch.Tensor:
    """Compute features (N, D), float32 on the CPU, batch by batch; within a batch, images of one size at a time."""
    features = []
    for batch in DataLoader(
        list(zip(files, prompts or [None] * len(files))),
        args.batch_size,
        num_workers=args.dataloader_num_workers,
        collate_fn=partial(prepare_batch, scorer.prepare),
    ):
        for item in batch:
            if isinstance(item, UserError):
                raise item
        for _, same_size in itertools.groupby(batch, lambda item: item[0].shape):
            pixels, texts = zip(*same_size)
            more = [list(texts)] if scorer.needs_prompts else []
            features.append(scorer.encode_images(torch.stack(pixels).to(args.device), *more).float().cpu())
        progress.update(len(batch))
    return torch.cat(features)


def write_features(path: Path, features: torch.Tensor) -> None:
    """Write features to the cache. Log a warning if the folder cannot be written."""
    try:
        path.parent.mkdir(exist_ok=True)
        write_atomically(path, lambda temporary: save_file({"features": features.contiguous()}, temporary))
    except OSError as error:
        logger.warning("%s: features are not cached (%s)", path.parent, error.strerror)


@torch.no_grad()
def compute_prompt_features(args, scorer: Scorer, prompts: list[str]) -> torch.Tensor:
    """Compute features (N, D), float32 on the CPU. Each different prompt is encoded once."""
    unique = list(dict.fromkeys(prompts))
    batches = [unique[i : i + args.batch_size] for i in range(0, len(unique), args.batch_size)]
    features = [scorer.encode_prompts(batch).float().cpu() for batch in tqdm(batches, "prompts", unit="batch")]
    row = {prompt: i for i, prompt in enumerate(unique)}
    return torch.cat(features)[[row[prompt] for prompt in prompts]]
