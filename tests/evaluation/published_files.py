"""Tiny networks in the layouts of HPS v2.1 and ImageReward as published, with weights and images by formula."""

import torch
from PIL import Image
from transformers import BlipConfig, CLIPConfig

from senseflow.evaluation.converters import transformer_sizes


SIZES = [(300, 300), (224, 224), (301, 200)]


def hpsv2_config(vocabulary=40):
    return CLIPConfig(
        vision_config=transformer_sizes(160, 2, 2) | {"patch_size": 14, "image_size": 28, "hidden_act": "gelu"},
        text_config=transformer_sizes(128, 2, 2)
        | {
            "vocab_size": vocabulary,
            "max_position_embeddings": 8,
            "eos_token_id": vocabulary - 1,
            "hidden_act": "gelu",
        },
        projection_dim=32,
    )


def imagereward_config(vocabulary=40):
    return BlipConfig(
        vision_config=transformer_sizes(128, 2, 2) | {"image_size": 32, "layer_norm_eps": 1e-6},
        text_config=transformer_sizes(64, 2, 1) | {"vocab_size": vocabulary, "max_position_embeddings": 40},
    )


def hpsv2_weights(vocabulary=40):
    shapes = {"visual.class_embedding": (160,), "visual.positional_embedding": (5, 160), "visual.proj": (160, 32)}
    shapes |= {"visual.conv1.weight": (160, 3, 14, 14), "positional_embedding": (8, 128), "text_projection": (128, 32)}
    shapes |= {"token_embedding.weight": (vocabulary, 128), "logit_scale": ()}
    shapes |= norm("visual.ln_pre", 160) | norm("visual.ln_post", 160) | norm("ln_final", 128)
    for layer in range(2):
        for name, width in (("visual.transformer", 160), ("transformer", 128)):
            block = f"{name}.resblocks.{layer}"
            shapes |= {f"{block}.attn.in_proj_weight": (3 * width, width), f"{block}.attn.in_proj_bias": (3 * width,)}
            shapes |= linear(f"{block}.attn.out_proj", width, width)
            shapes |= linear(f"{block}.mlp.c_fc", 4 * width, width) | linear(f"{block}.mlp.c_proj", width, 4 * width)
            shapes |= norm(f"{block}.ln_1", width) | norm(f"{block}.ln_2", width)
    return weights_by_formula(shapes)


def imagereward_weights(vocabulary=40):
    vision, text = "blip.visual_encoder", "blip.text_encoder"
    shapes = {f"{vision}.cls_token": (1, 1, 128), f"{vision}.pos_embed": (1, 5, 128)}
    shapes |= {f"{vision}.patch_embed.proj.weight": (128, 3, 16, 16), f"{vision}.patch_embed.proj.bias": (128,)}
    shapes |= {f"{text}.embeddings.word_embeddings.weight": (vocabulary, 64)}
    shapes |= {f"{text}.embeddings.position_embeddings.weight": (40, 64), f"{text}.embeddings.position_ids": None}
    shapes |= norm(f"{vision}.norm", 128) | norm(f"{text}.embeddings.LayerNorm", 64)
    shapes |= linear("blip.vision_proj", 8, 128) | linear("blip.text_proj", 8, 64)
    for index, inputs, outputs in ((0, 64, 1024), (2, 1024, 128), (4, 128, 64), (6, 64, 16), (7, 16, 1)):
        shapes |= linear(f"mlp.layers.{index}", outputs, inputs)
    for layer in range(2):
        block = f"{vision}.blocks.{layer}"
        shapes |= norm(f"{block}.norm1", 128) | norm(f"{block}.norm2", 128) | linear(f"{block}.attn.qkv", 384, 128)
        shapes |= linear(f"{block}.attn.proj", 128, 128)
        shapes |= linear(f"{block}.mlp.fc1", 512, 128) | linear(f"{block}.mlp.fc2", 128, 512)
        block = f"{text}.encoder.layer.{layer}"
        for attention, width in ((f"{block}.attention", 64), (f"{block}.crossattention", 128)):
            shapes |= linear(f"{attention}.self.query", 64, 64) | linear(f"{attention}.self.key", 64, width)
            shapes |= linear(f"{attention}.self.value", 64, width) | linear(f"{attention}.output.dense", 64, 64)
            shapes |= norm(f"{attention}.output.LayerNorm", 64)
        shapes |= linear(f"{block}.intermediate.dense", 256, 64) | linear(f"{block}.output.dense", 64, 256)
        shapes |= norm(f"{block}.output.LayerNorm", 64)
    return weights_by_formula(shapes)


def linear(name, outputs, inputs):
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def norm(name, width):
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def weights_by_formula(shapes):
    """Make the weights of `fill_by_formula` in benchmarks/scorer_parity.py, which computed the expected scores."""
    state = {}
    for number, (name, shape) in enumerate(sorted(shapes.items())):
        if not shape:  # a buffer and a scalar, which the formula leaves as they are
            state[name] = torch.arange(40)[None] if shape is None else torch.zeros(())
            continue
        values = torch.zeros(shape)
        waves = torch.sin(torch.arange(values.numel(), dtype=torch.float64) * 0.7 + number).view(shape)
        scale = 1.5 / max(1, values[0].numel()) ** 0.5 if values.dim() > 1 else 0.1
        state[name] = values.copy_(scale * waves + (values.dim() == 1 and name.endswith("weight")))
    return state


def image_by_formula(size):
    """Make the image of benchmarks/scorer_parity.py."""
    x, y = (torch.arange(length).double() for length in size)
    waves = torch.sin(x[None, :, None] / 9 + torch.arange(3)) * torch.cos(y[:, None, None] / 7 - torch.arange(3))
    return Image.fromarray(((waves + 1) * 127.5).byte().numpy())
