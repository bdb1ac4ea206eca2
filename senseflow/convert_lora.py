# Copyright 2026 The SenseFlow-scripts authors. Licensed under the Apache License, Version 2.0.
"""Convert a LoRA of FLUX or SD 3.5 between diffusers' layers and the fused ones of sd-scripts and Forge."""

import re
from pathlib import Path

import torch
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from senseflow.arguments import Parser
from senseflow.errors import UserError, run_script, write_atomically
from senseflow.models.lora import read_adapter


# Layers in a block of FLUX and of SD 3, and diffusers' layers whose weights these hold, one below the other.
LAYERS = (
    ("img_attn_qkv", "x_block_attn_qkv", "attn.to_q attn.to_k attn.to_v"),
    ("txt_attn_qkv", "context_block_attn_qkv", "attn.add_q_proj attn.add_k_proj attn.add_v_proj"),
    ("img_attn_proj", "x_block_attn_proj", "attn.to_out.0"),
    ("txt_attn_proj", "context_block_attn_proj", "attn.to_add_out"),
    ("img_mlp_0", "x_block_mlp_fc1", "ff.net.0.proj"),
    ("img_mlp_2", "x_block_mlp_fc2", "ff.net.2"),
    ("txt_mlp_0", "context_block_mlp_fc1", "ff_context.net.0.proj"),
    ("txt_mlp_2", "context_block_mlp_fc2", "ff_context.net.2"),
    ("img_mod_lin", "x_block_adaLN_modulation_1", "norm1.linear"),
    ("txt_mod_lin", "context_block_adaLN_modulation_1", "norm1_context.linear"),
    ("", "x_block_attn2_qkv", "attn2.to_q attn2.to_k attn2.to_v"),
    ("", "x_block_attn2_proj", "attn2.to_out.0"),
)
FLUX = {f"double_blocks_{{}}_{flux}": f"transformer_blocks.{{}} {parts}" for flux, _, parts in LAYERS if flux} | {
    "single_blocks_{}_linear1": "single_transformer_blocks.{} attn.to_q attn.to_k attn.to_v proj_mlp",
    "single_blocks_{}_linear2": "single_transformer_blocks.{} proj_out",
    "single_blocks_{}_modulation_lin": "single_transformer_blocks.{} norm.linear",
}
SD3 = {f"joint_blocks_{{}}_{sd3}": f"transformer_blocks.{{}} {parts}" for _, sd3, parts in LAYERS}


def layers_of(layout: dict[str, str], names) -> dict[str, list[str]]:
    """Return {kohya's layer: diffusers' layers} for the numbers of blocks in tensor names of either kind."""
    layers = {}
    for number in sorted({int(number) for name in names for number in re.findall(r"blocks[._](\d+)[._]", name)}):
        for fused, parts in layout.items():
            block, *parts = parts.format(number).split()
            layers[f"lora_unet_{fused.format(number)}"] = [f"{block}.{part}" for part in parts]
    return layers


def to_kohya(weights: dict[str, torch.Tensor], layout: dict[str, str]) -> dict[str, torch.Tensor]:
    """Fuse layers: A (rank, in) one below the other, B (out, rank) on a diagonal of blocks; alpha is the rank."""
    fused = {}
    for name, parts in layers_of(layout, weights).items():
        missing = [part for part in parts if f"{part}.lora_A.weight" not in weights]
        if missing and len(missing) < len(parts):
            raise ValueError(f"it has no {', '.join(missing)}, which {name} holds, too")
        if not missing:
            down = torch.cat([weights.pop(f"{part}.lora_A.weight") for part in parts])
            up = torch.block_diag(*(weights.pop(f"{part}.lora_B.weight") for part in parts))
            fused[f"{name}.lora_down.weight"], fused[f"{name}.lora_up.weight"] = down, in_order(name, up, down)
            fused[f"{name}.alpha"] = torch.tensor(float(len(down)))
    return fused


def to_diffusers(weights: dict[str, torch.Tensor], layout: dict[str, str]) -> dict[str, torch.Tensor]:
    """Divide fused layers into B's rows, and of A what these use: the inverse of `to_kohya`."""
    divided = {}
    for name, parts in layers_of(layout, weights).items():
        if f"{name}.lora_down.weight" in weights:
            down, up = weights.pop(f"{name}.lora_down.weight"), weights.pop(f"{name}.lora_up.weight")
            alpha = weights.pop(f"{name}.alpha", torch.tensor(len(down))).item()
            up, width = in_order(name, up * (alpha / len(down)), down), down.shape[1]  # of q, k and v
            for part, rows in zip(parts, up.split([width] * (len(parts) - 1) + [len(up) - width * (len(parts) - 1)])):
                used = rows.any(0)
                used[0] |= not used.any()
                divided[f"transformer.{part}.lora_A.weight"] = down[used].contiguous()
                divided[f"transformer.{part}.lora_B.weight"] = rows[:, used].contiguous()
    return divided


def in_order(name: str, up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    """Exchange scale and shift in the last block of SD 3's text stream, whose order is the other in diffusers."""
    return torch.cat(up.chunk(2)[::-1]) if "context_block_adaLN" in name and len(up) == 2 * down.shape[1] else up


def convert(source: Path, target: str) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Read and convert a LoRA. Return (tensors, metadata). ValueError for a layer without a place among the others."""
    with safe_open(source, "pt") as file:
        metadata = file.metadata() or {}
        weights = {name: file.get_tensor(name) for name in file.keys()}
    if any(name.startswith("lora_unet_") for name in weights) == (target == "kohya"):
        raise ValueError(f"it has the layers of {target} already")
    is_flux = any("single" in name or "double" in name for name in weights)
    layout = FLUX if is_flux or metadata.get("ss_base_model_version", "").startswith("flux") else SD3
    if target == "kohya":
        dtype = next(iter(weights.values())).dtype
        weights = {name: tensor.to(dtype) for name, tensor in read_adapter(source, torch.nn.Module())[0].items()}
    converted = (to_kohya if target == "kohya" else to_diffusers)(weights, layout)
    if weights:
        raise ValueError(f"{len(weights)} tensors have no place in the other layout, such as {min(weights)}")
    return converted, {name: text for name, text in metadata.items() if name != LORA_ADAPTER_METADATA_KEY}


def main(argv=None):
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("input", metavar="IN", type=Path, help="The LoRA, a .safetensors file.")
    parser.add_argument("output", metavar="OUT", type=Path, help="The file to write.")
    parser.add_argument("--to", required=True, choices=("kohya", "diffusers"), help="Whose layers OUT has.")
    args = parser.parse_args(argv)
    try:
        tensors, metadata = convert(args.input, args.to)
        write_atomically(args.output, lambda path: save_file(tensors, path, metadata=metadata))
    except (OSError, SafetensorError, ValueError) as error:
        raise UserError(f"{args.input} cannot be converted to {args.output}: {error}") from error


if __name__ == "__main__":
    run_script(main)
