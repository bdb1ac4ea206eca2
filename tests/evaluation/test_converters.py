"""Files in the layouts of HPS v2.1 and ImageReward: what their own code says of such networks, and what is refused.

The numbers are what `python benchmarks/judges.py original DIR --tiny --layers 2` says, where open_clip and ImageReward are.
"""

import sys

import pytest
import torch

from helpers import ROOT
from senseflow.errors import UserError
from senseflow.evaluation import converters


sys.path.insert(0, str(ROOT / "benchmarks"))
from scorer_parity import SIZES, by_formula, image  # noqa: E402


def linear(name, outputs, inputs):
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def norm(name, width):
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def clip_block(name, width):
    attention = {f"{name}.attn.in_proj_weight": (3 * width, width), f"{name}.attn.in_proj_bias": (3 * width,)}
    attention |= linear(f"{name}.attn.out_proj", width, width)
    mlp = linear(f"{name}.mlp.c_fc", 4 * width, width) | linear(f"{name}.mlp.c_proj", width, 4 * width)
    return attention | mlp | norm(f"{name}.ln_1", width) | norm(f"{name}.ln_2", width)


def hpsv2_shapes(vocabulary=40):
    shapes = {"visual.class_embedding": (160,), "visual.positional_embedding": (5, 160), "visual.proj": (160, 32)}
    shapes |= {"visual.conv1.weight": (160, 3, 14, 14), "positional_embedding": (8, 128), "text_projection": (128, 32)}
    shapes |= {"token_embedding.weight": (vocabulary, 128), "logit_scale": ()}
    shapes |= norm("visual.ln_pre", 160) | norm("visual.ln_post", 160) | norm("ln_final", 128)
    for layer in range(2):
        shapes |= clip_block(f"visual.transformer.resblocks.{layer}", 160) | clip_block(
            f"transformer.resblocks.{layer}", 128
        )
    return shapes


def imagereward_shapes(vocabulary=40):
    see, read = "blip.visual_encoder", "blip.text_encoder"
    shapes = {
        f"{see}.cls_token": (1, 1, 128),
        f"{see}.pos_embed": (1, 5, 128),
        f"{see}.patch_embed.proj.weight": (128, 3, 16, 16),
    }
    shapes |= {f"{see}.patch_embed.proj.bias": (128,), f"{read}.embeddings.position_ids": None}
    shapes |= {f"{read}.embeddings.word_embeddings.weight": (vocabulary, 64)}
    shapes |= {f"{read}.embeddings.position_embeddings.weight": (40, 64)}
    shapes |= norm(f"{see}.norm", 128) | norm(f"{read}.embeddings.LayerNorm", 64)
    shapes |= linear("blip.vision_proj", 8, 128) | linear("blip.text_proj", 8, 64)
    for place, (inputs, outputs) in zip((0, 2, 4, 6, 7), [(64, 1024), (1024, 128), (128, 64), (64, 16), (16, 1)]):
        shapes |= linear(f"mlp.layers.{place}", outputs, inputs)
    for layer in range(2):
        block = f"{see}.blocks.{layer}"
        shapes |= norm(f"{block}.norm1", 128) | norm(f"{block}.norm2", 128) | linear(f"{block}.attn.qkv", 384, 128)
        shapes |= (
            linear(f"{block}.attn.proj", 128, 128)
            | linear(f"{block}.mlp.fc1", 512, 128)
            | linear(f"{block}.mlp.fc2", 128, 512)
        )
        block = f"{read}.encoder.layer.{layer}"
        for attention, width in (("attention", 64), ("crossattention", 128)):
            shapes |= linear(f"{block}.{attention}.self.query", 64, 64) | linear(
                f"{block}.{attention}.self.key", 64, width
            )
            shapes |= linear(f"{block}.{attention}.self.value", 64, width) | linear(
                f"{block}.{attention}.output.dense", 64, 64
            )
            shapes |= norm(f"{block}.{attention}.output.LayerNorm", 64)
        shapes |= linear(f"{block}.intermediate.dense", 256, 64) | linear(f"{block}.output.dense", 64, 256)
        shapes |= norm(f"{block}.output.LayerNorm", 64)
    return shapes


def weights(shapes):
    state = {name: torch.arange(40)[None] if shape is None else torch.zeros(shape) for name, shape in shapes.items()}
    by_formula(state)
    return state


def test_hpsv2_says_what_open_clip_says_of_its_file(tmp_path):
    torch.save({"epoch": 1, "state_dict": weights(hpsv2_shapes())}, tmp_path / "hps.pt")
    model = converters.read_hpsv2(tmp_path / "hps.pt")
    tokens = torch.tensor([[38, 3, 5, 39, 0, 0, 0, 0], [38, 9, 3, 7, 2, 39, 0, 0]])
    pixels = torch.stack([converters.hpsv2_pixels(28, image(size)) for size in (SIZES[0], SIZES[2])])
    with torch.no_grad():
        said = model(input_ids=tokens, pixel_values=pixels)
    scores = (said.image_embeds * said.text_embeds).sum(1)
    assert scores.tolist() == pytest.approx([-0.3692439794540405, -0.5273345112800598], abs=1e-5)


def test_imagereward_says_what_its_own_code_says_of_its_file(tmp_path):
    torch.save(weights(imagereward_shapes()), tmp_path / "imagereward.pt")
    network = converters.read_imagereward(tmp_path / "imagereward.pt")
    tokens = [[30, 16, 15, 4, 26, 31, 17, 26, 5, 31, 39, 12], [4, 22, 11, 27, 19, 28, 39, 34, 39, 3, 36, 36]]
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[1, 7:] = 0
    pixels = torch.stack([converters.imagereward_pixels(32, image(size)) for size in SIZES[:2]])
    with torch.no_grad():
        scores = network(pixels, torch.tensor(tokens), mask)
    assert scores.tolist() == pytest.approx([1.1821677684783936, 1.1881552934646606], abs=1e-4)


@pytest.mark.parametrize("size", [(28, 28), (40, 20), (13, 30)])
def test_pixels_by_hand(size):
    """Where nothing is scaled, or one side is; black is what CLIP's normalization makes of it."""
    shown = image(size)
    pixels = converters.hpsv2_pixels(max(size), shown)
    high = (max(size) - size[1]) // 2
    wide = (max(size) - size[0]) // 2
    own = pixels[:, high : high + size[1], wide : wide + size[0]] * torch.tensor(converters.STD).view(3, 1, 1)
    own = ((own + torch.tensor(converters.MEAN).view(3, 1, 1)) * 255).round().byte()
    assert own.permute(1, 2, 0).flatten().tolist() == list(shown.tobytes())
    black = -torch.tensor(converters.MEAN) / torch.tensor(converters.STD)
    outside = pixels.sum() - pixels[:, high : high + size[1], wide : wide + size[0]].sum()
    area = max(size) ** 2 - size[0] * size[1]
    torch.testing.assert_close(outside, area * black.sum(), rtol=1e-3, atol=1e-2)
    assert converters.imagereward_pixels(9, shown).shape == (3, 9, 9)


@pytest.mark.parametrize("kind", ["hpsv2", "imagereward"])
def test_every_weight_has_its_place(kind, tmp_path):
    state = weights({"hpsv2": hpsv2_shapes, "imagereward": imagereward_shapes}[kind]())
    load, file = getattr(converters, f"read_{kind}"), tmp_path / "file.pt"

    def bad(changed, message):
        torch.save(changed, file)
        with pytest.raises(UserError, match=rf"--{kind} {file}: {message}") as caught:
            load(file)
        assert caught.value.exit_code == 2

    last = sorted(name for name in state if name.endswith("2.bias"))[-1]
    bad({name: tensor for name, tensor in state.items() if name != last}, "1 weights of its .* are missing")
    bad(state | {"visual.more": torch.zeros(1)}, r"1 weights of its .* have no place \(visual.more\)")
    bad(state | {last: torch.zeros(3)}, "1 weights of its .* are of other shapes")
    first = "visual.conv1.weight" if kind == "hpsv2" else "blip.visual_encoder.pos_embed"
    bad({name: tensor for name, tensor in state.items() if name != first}, f"has no weight '{first}'")
    bad({"state_dict": 3}, "no weights can be read")
    file.write_bytes(b"PK no archive")
    with pytest.raises(UserError, match="no weights can be read"):
        load(file)
