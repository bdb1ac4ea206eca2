# Copyright 2026 The SenseFlow-scripts authors. Licensed under the Apache License, Version 2.0.
"""Images that are not square: --resolution HEIGHT WIDTH."""

import json

import pytest
from diffusers import FluxPipeline

import train_senseflow_flux
import train_senseflow_sd3
import train_senseflow_sdxl
from helpers import built, image_of, refused
from stock_call import assert_called_as_stock


SCRIPTS = {"flux": train_senseflow_flux, "sd3": train_senseflow_sd3, "sdxl": train_senseflow_sdxl}


@pytest.fixture
def flags(teachers, vision, data):
    """flags(name) -> two iterations of that script with all losses."""

    def make(name):
        return [
            *("--pretrained_model_name_or_path", str(teachers[name]), "--dataset_json", str(data)),
            *("--discriminator_backbone", f"{vision}/dinov2", "--discriminator_text_encoder", f"{vision}/clip"),
            *"--train_batch_size 2 --ttur_ratio 1 --max_train_steps 2 --export_dtype fp32".split(),
            *(["--max_sequence_length", "16"] if name != "sdxl" else []),
        ]

    return make


@pytest.mark.parametrize("name", SCRIPTS)
def test_landscape_images(name, flags, tmp_path):
    """The teacher is called as in a stock call; training, validation, the export and infer.py have the size."""
    size = ["--resolution", "64", "96", "--validation_prompts", "a red square", "--report_to", "none"]
    arguments = [*flags(name), *size, "--output_dir", str(tmp_path / "out")]
    run = built(SCRIPTS[name], arguments)
    (_, debug_latents), (batch,) = run.step(0)
    assert batch["pixel_values"].shape == (2, 3, 64, 96)
    assert {latents.shape[2:] for latents in debug_latents.values()} == {(8, 12)}
    unpacked = (lambda latents: FluxPipeline._unpack_latents(latents, 64, 96, 8)) if name == "flux" else (lambda x: x)
    assert_called_as_stock(run, run.pipeline_kwargs | {"guidance_scale": 4.0}, 4.0, unpacked)

    SCRIPTS[name].main(arguments)
    call = json.loads((tmp_path / "out" / "senseflow.json").read_text())["pipeline_call"]
    assert (call["height"], call["width"]) == (64, 96)
    card = (tmp_path / "out" / "README.md").read_text()
    for text in ("height=64, width=96", "| latent | empty, 96 x 64 |", "| resolution | 64, 96 |"):
        assert text in card
    assert image_of(tmp_path / "out", tmp_path / "images").shape == (64, 96, 3)


@pytest.mark.parametrize(
    "name, size, message",
    [
        ("flux", "64 72", "--resolution 64 72: must be divisible by 16 for this teacher"),
        ("sdxl", "60 64", "--resolution 60 64: must be divisible by 8 for this teacher"),
        ("sd3", "64 272", "--resolution 64 272: this teacher has positions for 256 pixels a side at most"),
        ("flux", "64 64 64", "--resolution 64 64 64: give one side, or HEIGHT WIDTH"),
    ],
)
def test_bad_sizes_are_refused(name, size, message, flags, tmp_path, capsys):
    arguments = [*flags(name), "--resolution", *size.split(), "--output_dir", str(tmp_path / "out")]
    refused(SCRIPTS[name], arguments, 2, message, capsys)
