#!/usr/bin/env python
# Copyright 2026 The SenseFlow-scripts authors. Licensed under the Apache License, Version 2.0.
"""Are HPS v2.1 and ImageReward what their own code makes of their files? On random weights in their published layouts.

    python benchmarks/judges.py original DIR     # where open_clip_torch, hpsv2 and image-reward are installed: writes what they say
    python benchmarks/judges.py compare DIR      # where this project is: reads their files, and says how far it is from them

Networks of the published widths and kinds, of fewer layers (--layers); --tiny has them as small as tests/test_layouts.py wants, and
prints what stands there.
"""

import argparse
import json
import sys
import types
from pathlib import Path

import torch
from PIL import Image


ROOT = Path(__file__).resolve().parents[1]
SIZES = [(300, 300), (224, 224), (301, 200), (157, 411), (1024, 768)]


def by_formula(state: dict[str, torch.Tensor]) -> None:
    """Gives weights values: a matrix those of about 1 over the root of its inputs, vectors of about 1 or 0, as new ones have."""
    with torch.no_grad():
        for number, (name, tensor) in enumerate(sorted(state.items())):
            if tensor.is_floating_point() and tensor.dim():
                values = torch.sin(torch.arange(tensor.numel(), dtype=torch.float64) * 0.7 + number).view(tensor.shape)
                scale = 1.5 / max(1, tensor[0].numel()) ** 0.5 if tensor.dim() > 1 else 0.1
                tensor.copy_(scale * values + (1 if tensor.dim() == 1 and name.endswith("weight") else 0))


def image(size: tuple[int, int]) -> Image.Image:
    across, down = (torch.arange(length).double() for length in size)
    waves = torch.sin(across[None, :, None] / 9 + torch.arange(3)) * torch.cos(
        down[:, None, None] / 7 - torch.arange(3)
    )
    pixels = ((waves + 1) * 127.5).byte().contiguous()
    return Image.frombytes("RGB", size, bytes(pixels.flatten().tolist()))


def original(folder: Path, layers: int, tiny: bool) -> None:
    import open_clip
    from hpsv2.src.open_clip.transform import image_transform

    vision = {"image_size": 224, "layers": layers, "width": 1280, "head_width": 80, "patch_size": 14}
    text = {"context_length": 77, "vocab_size": 49408, "width": 1024, "heads": 16, "layers": layers}
    if tiny:
        vision |= {"image_size": 28, "width": 160}
        text |= {"context_length": 8, "vocab_size": 40, "width": 128, "heads": 2}
    clip = open_clip.model.CLIP(32 if tiny else 1024, vision, text).eval()
    by_formula(clip.state_dict())
    torch.save({"epoch": 1, "state_dict": clip.state_dict()}, folder / "hps.pt")
    side, most = vision["image_size"], text["vocab_size"]
    see = image_transform(side, is_train=False, resize_longest_max=True)
    tokens = torch.zeros(2, text["context_length"], dtype=torch.long)
    tokens[0, :4], tokens[1, :6] = (
        torch.tensor([most - 2, 3, 5, most - 1]),
        torch.tensor([most - 2, 9, 3, 7, 2, most - 1]),
    )
    pixels = [see(image(size)) for size in SIZES if size != (224, 224) or tiny is False]
    with torch.no_grad():
        shown, said = (
            clip.encode_image(torch.stack(pixels[:2]), normalize=True),
            clip.encode_text(tokens, normalize=True),
        )
    found = {"hps": {"pixels": pixels, "tokens": tokens, "image": shown, "text": said, "score": (shown * said).sum(1)}}

    sys.modules.setdefault("clip", types.ModuleType("clip"))  # which image-reward imports for another score
    from ImageReward.ImageReward import MLP, _transform
    from ImageReward.models.BLIP.med import BertConfig, BertModel
    from ImageReward.models.BLIP.vit import VisionTransformer

    width, text_width = (128, 64) if tiny else (1024, 768)
    side, most = (32, 40) if tiny else (224, 30524)
    config = BertConfig(
        vocab_size=most,
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
    by_formula(network.eval().state_dict())
    torch.save(network.state_dict(), folder / "imagereward.pt")
    see = _transform(side)
    pixels = [see(image(size)) for size in SIZES]
    tokens, mask = (
        torch.randint(1, most, (2, 12), generator=torch.Generator().manual_seed(0)),
        torch.ones(2, 12, dtype=torch.long),
    )
    mask[1, 7:] = 0
    with torch.no_grad():
        seen = network.blip.visual_encoder(torch.stack(pixels[:2]))
        how = {
            "attention_mask": mask,
            "encoder_hidden_states": seen,
            "encoder_attention_mask": torch.ones(seen.shape[:2]),
        }
        states = network.blip.text_encoder(tokens, **how, return_dict=True).last_hidden_state
        score = (network.mlp(states[:, 0]).squeeze(1) - 0.16717362830052426) / 1.0333394966054072
    found["imagereward"] = {
        "pixels": pixels,
        "tokens": tokens,
        "mask": mask,
        "image": seen,
        "text": states,
        "score": score,
    }
    torch.save(found, folder / "found.pt")
    for name, values in found.items():
        print(name, json.dumps({"tokens": values["tokens"].tolist(), "score": values["score"].tolist()}))


def compare(folder: Path) -> None:
    sys.path.insert(0, str(ROOT))
    import senseflow_layouts as layouts

    found = torch.load(folder / "found.pt", weights_only=True)
    theirs, clip = found["hps"], layouts.read_hpsv2(folder / "hps.pt")
    side, sizes = clip.config.vision_config.image_size, SIZES
    if len(theirs["pixels"]) < len(SIZES):
        sizes = [size for size in SIZES if size != (224, 224)]
    own = {"pixels": [layouts.hpsv2_pixels(side, image(size)) for size in sizes]}
    with torch.no_grad():
        said = clip(input_ids=theirs["tokens"], pixel_values=torch.stack(theirs["pixels"][:2]))
    own |= {
        "image": said.image_embeds,
        "text": said.text_embeds,
        "score": (said.image_embeds * said.text_embeds).sum(1),
    }
    report("HPS v2", own, theirs)

    theirs, network = found["imagereward"], layouts.read_imagereward(folder / "imagereward.pt")
    side, pixels = network.vision.config.image_size, torch.stack(theirs["pixels"][:2])
    own = {"pixels": [layouts.imagereward_pixels(side, image(size)) for size in SIZES]}
    with torch.no_grad():
        own |= {
            "image": network.vision(pixels).last_hidden_state,
            "score": network(pixels, theirs["tokens"], theirs["mask"]),
        }
    report("ImageReward", own, theirs)


def report(name: str, own: dict, theirs: dict) -> None:
    for part, values in own.items():
        pairs = zip(values, theirs[part], strict=True)
        apart = max((one - other).abs().max().item() for one, other in pairs)
        most = max(other.abs().max().item() for other in theirs[part])
        print(f"{name}, {part}: at most {apart:.1e} apart, of values up to {most:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("original", "compare"))
    parser.add_argument("folder", metavar="DIR", type=Path)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    if args.what == "original":
        original(args.folder, args.layers, args.tiny)
    else:
        compare(args.folder)


if __name__ == "__main__":
    main()
