"""Fused layers hold the same differences of weights, and no layer is lost without a word."""

import json
import re

import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel, SD3Transformer2DModel
from safetensors.torch import load_file, save_file

import train_senseflow_flux
from helpers import assert_same_image, image_of, refused
from senseflow import merge_lora
from senseflow.convert_lora import FLUX, SD3, layers_of, main
from senseflow.errors import UserError


NETWORKS = {"flux": (FluxTransformer2DModel, FLUX), "sd3": (SD3Transformer2DModel, SD3)}


@pytest.fixture(params=NETWORKS)
def lora(request, teachers, tmp_path):
    """(layout, {diffusers' name: tensor}, file) of a LoRA with all layers of all blocks, each of another rank."""
    cls, layout = NETWORKS[request.param]
    network = cls.from_pretrained(teachers[request.param], subfolder="transformer")
    rng, weights = torch.Generator().manual_seed(0), {}
    for name, layer in network.named_modules():
        if isinstance(layer, torch.nn.Linear) and re.search(r"blocks\.\d+\.(attn|ff|proj|norm)", name):
            rank = 2 + len(weights) % 3
            weights[f"transformer.{name}.lora_A.weight"] = torch.randn(rank, layer.in_features, generator=rng)
            weights[f"transformer.{name}.lora_B.weight"] = torch.randn(layer.out_features, rank, generator=rng)
    save_file(weights, tmp_path / "diffusers.safetensors", metadata={"ss_network_dim": "4"})
    return layout, weights, tmp_path / "diffusers.safetensors"


def differences(weights: dict[str, torch.Tensor], a: str, b: str) -> dict[str, torch.Tensor]:
    """{layer: the difference that its LoRA makes}"""
    layers = [name.removesuffix(f".{a}.weight") for name in weights if name.endswith(f".{a}.weight")]
    scale = {name: weights.get(f"{name}.alpha", torch.tensor(0)).item() for name in layers}
    return {
        name: weights[f"{name}.{b}.weight"]
        @ weights[f"{name}.{a}.weight"]
        * (scale[name] / len(weights[f"{name}.{a}.weight"]) or 1)
        for name in layers
    }


def test_fused_layers_hold_the_same_differences_and_divide_again(lora, tmp_path):
    layout, weights, file = lora
    main([str(file), str(tmp_path / "kohya.safetensors"), "--to", "kohya"])
    fused = load_file(tmp_path / "kohya.safetensors")
    wanted = differences(
        {name.removeprefix("transformer."): value for name, value in weights.items()}, "lora_A", "lora_B"
    )
    found = differences(fused, "lora_down", "lora_up")
    for name, parts in layers_of(layout, weights).items():
        if name in found:
            together = torch.cat([wanted.pop(part) for part in parts])
            if "context_block_adaLN" in name and len(together) == 2 * together.shape[1]:
                together = torch.cat(together.chunk(2)[::-1])  # SD 3's last block
            torch.testing.assert_close(found.pop(name), together, rtol=0, atol=1e-6)
    assert not wanted and not found
    if layout is FLUX:  # which diffusers reads itself, but for linear1 of other sizes than the published ones
        read = FluxPipeline.lora_state_dict({name: value for name, value in fused.items() if "linear1" not in name})
        theirs, ours = differences(read, "lora_A", "lora_B"), differences(weights, "lora_A", "lora_B")
        assert len(theirs) > len(ours) / 2
        for name, difference in theirs.items():
            torch.testing.assert_close(difference, ours[name], rtol=0, atol=1e-6)

    # Back, from a file whose alpha is not the rank.
    halved = {name: value / 2 if name.endswith(".alpha") else value for name, value in fused.items()}
    save_file(halved, tmp_path / "halved.safetensors")
    main([str(tmp_path / "halved.safetensors"), str(tmp_path / "back.safetensors"), "--to", "diffusers"])
    back = load_file(tmp_path / "back.safetensors")
    assert back.keys() == weights.keys()
    for name, value in weights.items():
        assert torch.equal(back[name], value / 2 if ".lora_B." in name else value), name


@pytest.mark.parametrize(
    "case, needle",
    [
        ("a part", r"it has no transformer_blocks.0.attn.to_k, which lora_unet_.*qkv holds, too"),
        ("an unknown layer", r"1 tensors have no place in the other layout, such as x_embedder.lora_A.weight"),
        ("the same names", "it has the layers of diffusers already"),
        ("no file", "No such file"),
    ],
)
def test_what_cannot_be_converted_is_one_line(case, needle, lora, tmp_path):
    _, weights, file = lora
    if case == "a part":
        weights = {name: value for name, value in weights.items() if "blocks.0.attn.to_k" not in name}
    elif case == "an unknown layer":
        weights["transformer.x_embedder.lora_A.weight"] = torch.ones(1, 1)
    save_file(weights, file)
    if case == "no file":
        file.unlink()
    target = "diffusers" if case == "the same names" else "kohya"
    with pytest.raises(UserError, match=f"diffusers.safetensors cannot be converted to .*{needle}"):
        main([str(file), str(tmp_path / "out.safetensors"), "--to", target])
    assert not (tmp_path / "out.safetensors").exists()


def test_a_merged_student_draws_the_adapters_image(teacher, data, tmp_path, capsys):
    adapter, merged = tmp_path / "adapter", tmp_path / "merged"
    flags = ["--pretrained_model_name_or_path", str(teacher), "--dataset_json", str(data), "--report_to", "none"]
    flags += "--gan_weight 0 --resolution 64 --max_sequence_length 16 --rank 2 --learning_rate 0.1".split()
    train_senseflow_flux.main([*flags, "--ttur_ratio", "1", "--max_train_steps", "2", "--output_dir", str(adapter)])
    merge_lora.main([str(adapter), str(merged), "--dtype", "fp32"])
    assert not [name for name in json.loads((merged / "senseflow.json").read_text()) if "lora" in name]
    assert_same_image(image_of(merged, tmp_path / "a"), image_of(adapter, tmp_path / "b"))
    capsys.readouterr()
    refused(merge_lora, [str(adapter), str(merged)], 2, f"OUT {merged}: is there already", capsys)
    refused(merge_lora, [str(merged), str(tmp_path / "new")], 2, "is no adapter of a run with --rank", capsys)
