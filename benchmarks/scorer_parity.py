#!/usr/bin/env python
# Copyright 2026 The SenseFlow-scripts authors. Licensed under the Apache License, Version 2.0.
"""Compare senseflow/evaluation/converters.py with the original code of HPS v2.1 and ImageReward, on random weights.

    python benchmarks/scorer_parity.py original DIR  # needs open_clip_torch, hpsv2, image-reward: writes their outputs
    python benchmarks/scorer_parity.py compare DIR   # needs this project: loads the same files, prints the differences

The networks have the published widths, but fewer layers (--layers, the same for both). `original --tiny --layers 2`
has the sizes of tests/evaluation/published_files.py, and prints the scores that test_converters.py there expects.
"""

import argparse
import json
import sys
import types
from pathlib import Path

import torch
from PIL import Image


SIZES = [(300, 300), (224, 224), (301, 200), (157, 411), (1024, 768)]


def fill_by_formula(state: dict[str, torch.Tensor]) -> None:
    """Set weights to values of a new network's size: 1 / sqrt(inputs) in matrices, 1 or 0 plus 0.1 in vectors."""
    with torch.no_grad():
        for number, (name, tensor) in enumerate(sorted(state.items())):
            if tensor.is_floating_point() and tensor.dim():
                waves = torch.sin(torch.arange(tensor.numel(), dtype=torch.float64) * 0.7 + number).view(tensor.shape)
                scale = 1.5 / max(1, tensor[0].numel()) ** 0.5 if tensor.dim() > 1 else 0.1
                tensor.copy_(scale * waves + (tensor.dim() == 1 and name.endswith("weight")))


def image_by_formula(size: tuple[int, int]) -> Image.Image:
    x, y = (torch.arange(length).double() for length in size)
    waves = torch.sin(x[None, :, None] / 9 + torch.arange(3)) * torch.cos(y[:, None, None] / 7 - torch.arange(3))
    return Image.frombytes("RGB", size, bytes(((waves + 1) * 127.5).byte().flatten().tolist()))


def hpsv2_outputs(file: Path, layers: int, tiny: bool) -> dict[str, torch.Tensor]:
    """Write an open_clip network to `file`. Return its inputs and outputs for two images and prompts."""
    import open_clip
    from hpsv2.src.open_clip.transform import image_transform

    vision = {"image_size": 224, "layers": layers, "width": 1280, "head_width": 80, "patch_size": 14}
    text = {"context_length": 77, "vocab_size": 49408, "width": 1024, "heads": 16, "layers": layers}
    if tiny:
        vision |= {"image_size": 28, "width": 160}
        text |= {"context_length": 8, "vocab_size": 40, "width": 128, "heads": 2}
    clip = open_clip.model.CLIP(32 if tiny else 1024, vision, text).eval()
    fill_by_formula(clip.state_dict())
    torch.save({"epoch": 1, "state_dict": clip.state_dict()}, file)
    transform = image_transform(vision["image_size"], is_train=False, resize_longest_max=True)
    start, end = text["vocab_size"] - 2, text["vocab_size"] - 1
    tokens = torch.zeros(2, text["context_length"], dtype=torch.long)
    tokens[0, :4], tokens[1, :6] = torch.tensor([start, 3, 5, end]), torch.tensor([start, 9, 3, 7, 2, end])
    pixels = [transform(image_by_formula(size)) for size in SIZES if size != (224, 224) or not tiny]
    with torch.no_grad():
        image = clip.encode_image(torch.stack(pixels[:2]), normalize=True)
        prompt = clip.encode_text(tokens, normalize=True)
    return {"pixels": pixels, "tokens": tokens, "image": image, "text": prompt, "score": (image * prompt).sum(1)}


def imagereward_outputs(file: Path, layers: int, tiny: bool) -> dict[str, torch.Tensor]:
    """Write ImageReward's network to `file`. Return its inputs and outputs for two images and prompts."""
    sys.modules.setdefault("clip", types.ModuleType("clip"))  # which image-reward imports for another score
    from ImageReward.ImageReward import MLP, _transform
    from ImageReward.models.BLIP.med import BertConfig, BertModel
    from ImageReward.models.BLIP.vit import VisionTransformer

    width, text_width, side, vocabulary = (128, 64, 32, 40) if tiny else (1024, 768, 224, 30524)
    config = BertConfig(
        vocab_size=vocabulary,
        hidden_size=text_width,
        num_hidden_layers=layers,
        num_attention_heads=text_width // 64,
        intermediate_size=4 * text_width,
        max_position_embeddings=40 if tiny else 512,
        encoder_width=width,
        add_cross_attention=True,
    )
    network = torch.nn.Module()
    network.blip = torch.nn.Module()
    network.blip.visual_encoder = VisionTransformer(
        img_size=side,
        patch_size=16,
        embed_dim=width,
        depth=layers,
        num_heads=width // 64,
        use_grad_checkpointing=False,
    )
    network.blip.text_encoder = BertModel(config=config, add_pooling_layer=False)
    network.blip.vision_proj, network.blip.text_proj = torch.nn.Linear(width, 8), torch.nn.Linear(text_width, 8)
    network.mlp = MLP(text_width)
    fill_by_formula(network.eval().state_dict())
    torch.save(network.state_dict(), file)
    pixels = [_transform(side)(image_by_formula(size)) for size in SIZES]
    tokens = torch.randint(1, vocabulary, (2, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[1, 7:] = 0
    with torch.no_grad():
        image = network.blip.visual_encoder(torch.stack(pixels[:2]))
        text = network.blip.text_encoder(
            tokens,
            attention_mask=mask,
            encoder_hidden_states=image,
            encoder_attention_mask=torch.ones(image.shape[:2]),
            return_dict=True,
        ).last_hidden_state
        score = (network.mlp(text[:, 0]).squeeze(1) - 0.16717362830052426) / 1.0333394966054072
    return {"pixels": pixels, "tokens": tokens, "mask": mask, "image": image, "text": text, "score": score}


def run_original(folder: Path, layers: int, tiny: bool) -> None:
    outputs = {
        "hps": hpsv2_outputs(folder / "hps.pt", layers, tiny),
        "imagereward": imagereward_outputs(folder / "imagereward.pt", layers, tiny),
    }
    torch.save(outputs, folder / "outputs.pt")
    for name, values in outputs.items():
        print(name, json.dumps({"tokens": values["tokens"].tolist(), "score": values["score"].tolist()}))


def compare(folder: Path, layers: int) -> None:
    from transformers import CLIPModel

    from senseflow.evaluation import converters

    hpsv2_config, imagereward_config = converters.HPSV2_CONFIG, converters.IMAGEREWARD_CONFIG
    for config in (hpsv2_config, imagereward_config):
        config.vision_config.num_hidden_layers = config.text_config.num_hidden_layers = layers

    outputs = torch.load(folder / "outputs.pt", weights_only=True)
    original = outputs["hps"]
    clip = converters.load_published("--hpsv2", folder / "hps.pt", CLIPModel(hpsv2_config))
    with torch.no_grad():
        outs = clip(input_ids=original["tokens"], pixel_values=torch.stack(original["pixels"][:2]))
    ours = {
        "pixels": [converters.hpsv2_pixels(224, image_by_formula(size)) for size in SIZES],
        "image": outs.image_embeds,
        "text": outs.text_embeds,
        "score": (outs.image_embeds * outs.text_embeds).sum(1),
    }
    print_differences("HPS v2", ours, original)

    original = outputs["imagereward"]
    network = converters.ImageReward(imagereward_config)
    network = converters.load_published("--imagereward", folder / "imagereward.pt", network)
    pixels = torch.stack(original["pixels"][:2])
    with torch.no_grad():
        ours = {
            "pixels": [converters.imagereward_pixels(224, image_by_formula(size)) for size in SIZES],
            "image": network.vision(pixels).last_hidden_state,
            "score": network(pixels, original["tokens"], original["mask"]),
        }
    print_differences("ImageReward", ours, original)


def print_differences(name: str, ours: dict, original: dict) -> None:
    for part, values in ours.items():
        difference = max((one - other).abs().max().item() for one, other in zip(values, original[part], strict=True))
        largest = max(other.abs().max().item() for other in original[part])
        print(f"{name}, {part}: largest difference {difference:.1e}, of values up to {largest:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("original", "compare"))
    parser.add_argument("folder", metavar="DIR", type=Path)
    parser.add_argument("--layers", type=int, default=4, help="layers of each part of the networks (default: 4)")
    parser.add_argument("--tiny", action="store_true", help="original: use the sizes of the tests")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    if args.command == "original":
        run_original(args.folder, args.layers, args.tiny)
    else:
        compare(args.folder, args.layers)


if __name__ == "__main__":
    main()
