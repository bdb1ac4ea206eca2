#!/usr/bin/env python
# Copyright 2026 The SenseFlow-scripts authors. Licensed under the Apache License, Version 2.0.
"""Write the configurations of the full-size teachers without weights, and load them with random weights.

    python benchmarks/full_size.py flux DIR      # or another name of NETWORKS

The folder has the class names, layout and scheduler of the published pipeline, and the tests' small tokenizers.
"""

import argparse
import inspect
import json
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    AutoencoderKLQwenImage21,
    ChromaTransformer2DModel,
    Flux2Transformer2DModel,
    Ideogram4Transformer2DModel,
    Krea2Transformer2DModel,
    ModelMixin,
    OvisImageTransformer2DModel,
    QwenImage21Transformer2DModel,
    QwenImageTransformer2DModel,
    SanaTransformer2DModel,
    ZImageTransformer2DModel,
)
from transformers import PreTrainedModel

from senseflow.models import discriminator
from senseflow.models.discriminator import Discriminator


ROOT = Path(__file__).resolve().parents[1]
FILES = {"scheduler": "scheduler/scheduler_config.json", "model_index": "model_index.json"}
LOADING_INFO = dict.fromkeys(("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"), ())

CLIP_L = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "projection_dim": 768,
}
CLIP_G = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "projection_dim": 1280,
}
CLIP_L, CLIP_G = ({**config, "vocab_size": 49408, "max_position_embeddings": 77} for config in (CLIP_L, CLIP_G))
T5_XXL = {"d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64, "vocab_size": 32128}
T5_XXL = {
    **T5_XXL,
    "feed_forward_proj": "gated-gelu",
    "is_gated_act": True,
    "dense_act_fn": "gelu_new",
    "tie_word_embeddings": False,
}
VAE = {
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "sample_size": 1024,
    "latent_channels": 16,
}
FLUX_VAE = {**VAE, "scaling_factor": 0.3611, "shift_factor": 0.1159}
SD3_VAE = {**VAE, "scaling_factor": 1.5305, "shift_factor": 0.0609}
SDXL_VAE = {**VAE, "scaling_factor": 0.13025, "latent_channels": 4}

FLUX = {
    "patch_size": 1,
    "in_channels": 64,
    "num_layers": 19,
    "num_single_layers": 38,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "axes_dims_rope": [16, 56, 56],
}
SD3 = {
    "sample_size": 128,
    "in_channels": 16,
    "out_channels": 16,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 2048,
}
SD35_MEDIUM = {
    **SD3,
    "num_layers": 24,
    "attention_head_dim": 64,
    "num_attention_heads": 24,
    "caption_projection_dim": 1536,
    "pos_embed_max_size": 384,
    "dual_attention_layers": list(range(13)),
}
SD35_LARGE = {
    **SD3,
    "num_layers": 38,
    "attention_head_dim": 64,
    "num_attention_heads": 38,
    "caption_projection_dim": 2432,
    "pos_embed_max_size": 192,
    "dual_attention_layers": [],
}
SDXL = {
    "sample_size": 128,
    "block_out_channels": [320, 640, 1280],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "attention_head_dim": [5, 10, 20],
    "transformer_layers_per_block": [1, 2, 10],
    "cross_attention_dim": 2048,
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
DINOV2_LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "mlp_ratio": 4}
DINOV2_LARGE = {**DINOV2_LARGE, "image_size": 518, "patch_size": 14}
DINOV2_SMALL = {**DINOV2_LARGE, "hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6}
SD3_TEXT_ENCODERS = {"text_encoder": CLIP_L, "text_encoder_2": CLIP_G, "text_encoder_3": T5_XXL}

# The teachers of teachers/. Text encoders are those of kohya-ss/musubi-tuner (qwen_image_utils.py, flux2_utils.py,
# zimage_utils.py, krea2_encoder.py, ideogram4_utils.py), but for Ovis-Image's.
QWEN3 = {"head_dim": 128, "num_key_value_heads": 8, "vocab_size": 151936, "max_position_embeddings": 40960}
QWEN3 = {**QWEN3, "num_attention_heads": 32, "num_hidden_layers": 36, "layer_types": ["full_attention"] * 36}
QWEN3_4B = {**QWEN3, "hidden_size": 2560, "intermediate_size": 9728, "tie_word_embeddings": True}
QWEN3_8B = {**QWEN3, "hidden_size": 4096, "intermediate_size": 12288}
QWEN3_2B = {**QWEN3, "hidden_size": 2048, "intermediate_size": 6144, "tie_word_embeddings": True}
QWEN3_2B |= {"num_attention_heads": 16, "num_hidden_layers": 28, "layer_types": ["full_attention"] * 28}


def qwen3_vl(text: dict, **vision) -> dict:
    """Return the configuration of Qwen3-VL with the widths and depths of a Qwen3."""
    rope = {"rope_type": "default", "mrope_section": [24, 20, 20], "rope_theta": 5e6, "mrope_interleaved": True}
    text = {**text, "model_type": "qwen3_vl_text", "max_position_embeddings": 262144, "rope_parameters": rope}
    del text["layer_types"]
    vision = {"model_type": "qwen3_vl_vision", "num_heads": 16, "out_hidden_size": text["hidden_size"], **vision}
    return {"text_config": text, "vision_config": vision}


QWEN3_VL_4B = {"depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "deepstack_visual_indexes": [5, 11, 17]}
QWEN3_VL_8B = {"depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "deepstack_visual_indexes": [8, 16, 24]}
QWEN3_VL_4B, QWEN3_VL_8B = qwen3_vl(QWEN3_4B, **QWEN3_VL_4B), qwen3_vl(QWEN3_8B, **QWEN3_VL_8B)
QWEN25_VL_7B = {
    "text_config": {
        "model_type": "qwen2_5_vl_text",
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
        "max_position_embeddings": 128000,
        "rope_parameters": {"rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 1e6},
    },
    "vision_config": {"model_type": "qwen2_5_vl_vision", "depth": 32, "hidden_size": 1280, "intermediate_size": 3420},
}
GEMMA2_2B = {
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "vocab_size": 256000,
    "layer_types": ["sliding_attention", "full_attention"] * 13,
}
MISTRAL_SMALL = {
    "text_config": {
        "model_type": "mistral",
        "hidden_size": 5120,
        "intermediate_size": 32768,
        "num_hidden_layers": 40,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 131072,
        "max_position_embeddings": 131072,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e9},
        "sliding_window": None,
    },
    "vision_config": {"model_type": "pixtral", "image_size": 1540, "patch_size": 14},  # else the class's defaults
    "tie_word_embeddings": False,  # so that it has the published 24.0 billion weights
}


def defaults(cls) -> dict:
    """Return the configuration that a network of diffusers has by default."""
    parameters = list(inspect.signature(cls.__init__).parameters.values())[1:]  # without self
    return {parameter.name: parameter.default for parameter in parameters}


VAE_WITHOUT_QUANT = {**FLUX_VAE, "use_quant_conv": False, "use_post_quant_conv": False}
FLUX2, FLUX2_VAE = defaults(Flux2Transformer2DModel), defaults(AutoencoderKLFlux2)
KLEIN_4B = {"num_layers": 5, "num_single_layers": 20, "num_attention_heads": 24, "joint_attention_dim": 7680}
KLEIN_9B = {"num_layers": 8, "num_single_layers": 24, "num_attention_heads": 32, "joint_attention_dim": 12288}
KLEIN_4B, KLEIN_9B = ({**FLUX2, "guidance_embeds": False, **klein} for klein in (KLEIN_4B, KLEIN_9B))
QWEN_IMAGE, QWEN_VAE = defaults(QwenImageTransformer2DModel), defaults(AutoencoderKLQwenImage)
IDEOGRAM4, KREA2 = defaults(Ideogram4Transformer2DModel), defaults(Krea2Transformer2DModel)
SANA = {**defaults(SanaTransformer2DModel), "qk_norm": "rms_norm_across_heads"}
DC_BLOCKS = ["ResBlock"] * 3 + ["EfficientViTBlock"] * 3
SANA_VAE = {"encoder_block_types": DC_BLOCKS, "decoder_block_types": DC_BLOCKS, "scaling_factor": 0.41407}
SANA_VAE |= {"downsample_block_type": "Conv", "upsample_block_type": "interpolate"}
SANA_VAE = {**defaults(AutoencoderDC), **SANA_VAE}
KREA2_LAYERS = {"text_encoder_select_layers": list(range(2, 36, 3))}

# {name: (name in tests/tiny_pipelines.py, {component: changes to the configuration of the tiny pipeline})}
NETWORKS = {
    "flux": ("flux", {"transformer": FLUX, "vae": FLUX_VAE, "text_encoder": CLIP_L, "text_encoder_2": T5_XXL}),
    "sd35-large": ("sd3", {"transformer": SD35_LARGE, "vae": SD3_VAE, **SD3_TEXT_ENCODERS}),
    "sd35-medium": ("sd3", {"transformer": SD35_MEDIUM, "vae": SD3_VAE, **SD3_TEXT_ENCODERS}),
    "sdxl": ("sdxl", {"unet": SDXL, "vae": SDXL_VAE, "text_encoder": CLIP_L, "text_encoder_2": CLIP_G}),
    # The classes' defaults, as musubi-tuner has them in qwen_image_model.py and qwen_image_utils.py.
    "qwenimage": ("qwenimage", {"transformer": QWEN_IMAGE, "vae": QWEN_VAE, "text_encoder": QWEN25_VL_7B}),
    # The classes' defaults: published are 7B weights, 32 blocks and Qwen3-VL-8B; no copy of the files was found.
    "qwenimage21": (
        "qwenimage21",
        {
            "transformer": defaults(QwenImage21Transformer2DModel),
            "vae": defaults(AutoencoderKLQwenImage21),
            "text_encoder": QWEN3_VL_8B,
        },
    ),
    # The transformer's defaults, as musubi-tuner has them in zimage_config.py. Two ports state the shift.
    "zimage": (
        "zimage",
        {
            "transformer": defaults(ZImageTransformer2DModel),
            "vae": VAE_WITHOUT_QUANT,
            "text_encoder": QWEN3_4B,
            "scheduler": {"shift": 6.0},
        },
    ),
    # diffusers' scripts/convert_flux2_to_diffusers.py; of dev these are the classes' defaults.
    "flux2": ("flux2", {"transformer": FLUX2, "vae": FLUX2_VAE, "text_encoder": MISTRAL_SMALL}),
    "flux2-klein-4b": ("flux2_klein", {"transformer": KLEIN_4B, "vae": FLUX2_VAE, "text_encoder": QWEN3_4B}),
    "flux2-klein-9b": ("flux2_klein", {"transformer": KLEIN_9B, "vae": FLUX2_VAE, "text_encoder": QWEN3_8B}),
    # The classes' defaults, as musubi-tuner has them in ideogram4_model.py; the VAE is FLUX.2's.
    "ideogram4": (
        "ideogram4",
        {
            "transformer": IDEOGRAM4,
            "unconditional_transformer": IDEOGRAM4,
            "vae": FLUX2_VAE,
            "text_encoder": QWEN3_VL_8B,
        },
    ),
    # The classes' defaults, as musubi-tuner has them in krea2_utils.py and krea2_encoder.py; the VAE is Qwen-Image's.
    "krea2": (
        "krea2",
        {"transformer": KREA2, "vae": QWEN_VAE, "text_encoder": QWEN3_VL_4B, "model_index": KREA2_LAYERS},
    ),
    # The transformer's defaults, as AIDC-AI/Ovis-Image has them in ovis_image/__init__.py. No copy of the text
    # encoder's file was found: it is the Qwen3 of Ovis2.5-2B, and Qwen3-1.7B's width is the joint_attention_dim.
    "ovis_image": (
        "ovis_image",
        {
            "transformer": defaults(OvisImageTransformer2DModel),
            "vae": VAE_WITHOUT_QUANT,
            "text_encoder": QWEN3_2B,
        },
    ),
    # The transformer's defaults, as ostris/ai-toolkit's chroma/src/model.py has them; VAE and T5 are FLUX.1's.
    "chroma": (
        "chroma",
        {"transformer": defaults(ChromaTransformer2DModel), "vae": FLUX_VAE, "text_encoder": T5_XXL},
    ),
    # diffusers' scripts/convert_sana_to_diffusers.py and convert_dcae_to_diffusers.py; Gemma2Config's defaults.
    "sana": ("sana", {"transformer": SANA, "vae": SANA_VAE, "text_encoder": GEMMA2_2B}),
    "discriminator": ("discriminator", {"dinov2": DINOV2_LARGE, "clip": CLIP_L}),
    "discriminator-small": ("discriminator", {"dinov2": DINOV2_SMALL, "clip": CLIP_L}),
}


def script_of(teacher: str) -> str:
    """Return the path of the training script of a teacher in NETWORKS, without its suffix."""
    name = f"train_senseflow_{NETWORKS[teacher][0]}"
    return name if (ROOT / f"{name}.py").exists() else f"teachers/{name}"


def write_configs(name: str, folder: Path, tiny: bool = False) -> None:
    """Write configurations, tokenizers and scheduler of one of NETWORKS, unless the folder exists.

    Args:
        tiny: keep the networks as small as in the tests.
    """
    if folder.exists():
        return
    pipeline, changes = NETWORKS[name]
    command = [sys.executable, ROOT / "tests" / "tiny_pipelines.py", pipeline, folder]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    for weights in folder.rglob("*.safetensors"):
        weights.unlink()
    for component, values in {} if tiny else changes.items():
        config = folder / FILES.get(component, f"{component}/config.json")
        config.write_text(json.dumps(json.loads(config.read_text()) | values, indent=2))


@contextmanager
def random_weights(device="cpu"):
    """Make `from_pretrained` return networks with random weights on `device`, built from their configurations."""

    def load_diffusers(cls, path, subfolder=None, dtype=None, torch_dtype=None, output_loading_info=False, **_):
        config = cls.load_config(path, subfolder=subfolder)
        network = build(lambda: cls.from_config(config), dtype or torch_dtype)
        return (network, LOADING_INFO) if output_loading_info else network

    def load_transformers(cls, path, subfolder="", dtype=None, torch_dtype=None, output_loading_info=False, **_):
        config = cls.config_class.from_pretrained(path, subfolder=subfolder or "")
        network = build(lambda: cls(config)).to(dtype or torch_dtype)
        return (network, LOADING_INFO) if output_loading_info else network

    def build(make, dtype=None):
        default_dtype = torch.get_default_dtype()
        torch.manual_seed(0)
        torch.set_default_dtype(dtype if isinstance(dtype, torch.dtype) else torch.float32)
        try:
            with torch.device(device):
                return make().eval()
        finally:
            torch.set_default_dtype(default_dtype)

    def build_discriminator(*args):
        with torch.device(device):
            return Discriminator(*args)

    with (
        mock.patch.object(discriminator, "Discriminator", build_discriminator),
        mock.patch.object(ModelMixin, "from_pretrained", classmethod(load_diffusers)),
        mock.patch.object(PreTrainedModel, "from_pretrained", classmethod(load_transformers)),
    ):
        yield


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=NETWORKS)
    parser.add_argument("folder", metavar="DIR", type=Path)
    args = parser.parse_args()
    write_configs(args.name, args.folder)


if __name__ == "__main__":
    main()
