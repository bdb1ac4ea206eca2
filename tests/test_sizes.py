# Copyright 2026 The SenseFlow-scripts authors. Licensed under the Apache License, Version 2.0.
"""Images that are not square, and of several sizes: --resolution HEIGHT WIDTH, --aspect_ratio_buckets."""

import json
from functools import partial

import pytest
from diffusers import FluxPipeline

import train_dmd2_sdxl
import train_senseflow_flux
import train_senseflow_sd3
import train_senseflow_sdxl
from helpers import built, image_of, refused, resume_is_the_same_run, without, without_gan
from stock_call import assert_called_as_stock


SCRIPTS = {
    "flux": train_senseflow_flux,
    "sd3": train_senseflow_sd3,
    "sdxl": train_senseflow_sdxl,
    "dmd2": train_dmd2_sdxl,
}
SIZES = [(64, 96), (80, 80), (96, 64)]


@pytest.fixture
def flags(teachers, vision, data):
    """flags(name) -> two iterations of that script with all losses."""

    def make(name):
        teacher = teachers[name.replace("dmd2", "sdxl")]
        arguments = [
            *("--pretrained_model_name_or_path", str(teacher), "--dataset_json", str(data)),
            *("--discriminator_backbone", f"{vision}/dinov2", "--discriminator_text_encoder", f"{vision}/clip"),
            *"--train_batch_size 2 --ttur_ratio 1 --max_train_steps 2 --export_dtype fp32 --report_to none".split(),
            *(["--max_sequence_length", "16"] if name in ("flux", "sd3") else []),
        ]
        if name == "dmd2":
            arguments = without(arguments, "--discriminator_backbone", "--discriminator_text_encoder")
        return arguments

    return make


@pytest.fixture
def buckets(flags):
    """buckets(name) -> four iterations of that script, in each of which images have one of three sizes."""

    def make(name):
        text = ";".join(f"{height},{width}" for height, width in SIZES)
        steps = "--max_train_steps 4 --checkpointing_steps 2 --gradient_accumulation_steps 2".split()
        # With this seed, sizes change from the first iteration to the second and from the third to the fourth.
        return [*flags(name), "--resolution", "64", "96", "--aspect_ratio_buckets", text, *steps, "--seed", "7"]

    return make


@pytest.mark.parametrize("name", SCRIPTS)
def test_images_of_several_sizes(name, buckets, tmp_path):
    """An iteration has one size; the teacher is called as in a stock call of it; a run resumes to the bit; validation,
    the export and infer.py have --resolution."""
    script, decodes = SCRIPTS[name], ("--validation_prompts", "a red square")
    run, seen = built(script, [*buckets(name), *decodes, "--output_dir", str(tmp_path / "out")]), []
    for iteration in range(4):
        (_, debug_latents), batches = run.step(iteration)
        height, width = batches[0]["size"]
        assert {batch["pixel_values"].shape for batch in batches} == {(2, 3, height, width)}
        assert {latents.shape[2:] for latents in debug_latents.values()} == {(height // 8, width // 8)}
        seen.append((height, width))
    assert seen == [(80, 80), (64, 96)] * 2
    for height, width in SIZES:
        call = run.pipeline_kwargs | {"height": height, "width": width, "guidance_scale": 4.0}
        run.models.latent_shape = run.models.x0_shape({"size": (height, width)})
        unpack = partial(FluxPipeline._unpack_latents, height=height, width=width, vae_scale_factor=8)
        assert_called_as_stock(run, call, 4.0, unpack if name == "flux" else lambda latents: latents)

    whole = resume_is_the_same_run(script, buckets(name), tmp_path, *decodes)
    record, card = json.loads((whole / "senseflow.json").read_text()), (whole / "README.md").read_text()
    assert record["sizes"] == list(map(list, SIZES))
    assert (record["pipeline_call"]["height"], record["pipeline_call"]["width"]) == (64, 96)
    for text in (
        "height=64, width=96",
        "images\nof 64 x 96, 80 x 80, 96 x 64 (height x width).",
        "| latent | empty, 96 x 64 |",
        "| resolution | 64, 96 |",
        "| aspect_ratio_buckets | [64, 96], [80, 80], [96, 64] |",
    ):
        assert text in card
    assert image_of(whole, tmp_path / "images").shape == (64, 96, 3)


def test_a_dry_run_traces_the_largest_size(flags, tmp_path, capsys):
    arguments = [*without_gan(flags("flux")), "--output_dir", str(tmp_path / "out"), "--dry_run", "--dry_run_output"]
    for file, sizes in (
        ("several", ["--resolution", "80", "--aspect_ratio_buckets", "64,96;48,144;80,80"]),
        ("one", ["--resolution", "48", "144"]),
    ):
        train_senseflow_flux.main([*arguments, str(tmp_path / file), *sizes])
    several, one = (json.loads((tmp_path / file).read_text()) for file in ("several", "one"))
    assert several == one and several["image_size"] == [48, 144]
    line = "images of 48 x 144 pixels, the largest of --aspect_ratio_buckets"
    assert capsys.readouterr().out.count(line) == 1


@pytest.mark.parametrize(
    "name, given, message",
    [
        ("flux", ["--resolution", "64", "72"], "--resolution 64 72: must be divisible by 16 for this teacher"),
        ("sdxl", ["--resolution", "60", "64"], "--resolution 60 64: must be divisible by 8 for this teacher"),
        (
            "sd3",
            ["--resolution", "64", "272"],
            "--resolution 64 272: this teacher has positions for 256 pixels a side",
        ),
        ("flux", ["--resolution", "64", "64", "64"], "--resolution 64 64 64: give one side, or HEIGHT WIDTH"),
        ("flux", ["64,64;64,72"], "--aspect_ratio_buckets 64,72: must be divisible by 16 for this teacher"),
        ("sd3", ["64,272"], "--aspect_ratio_buckets 64,272: this teacher has positions for 256 pixels a side"),
        (
            "flux",
            ["80,48;64,80"],
            "--aspect_ratio_buckets 64,80: has 20 tokens, --resolution 16, and this teacher's noise levels depend on "
            "them; give sizes within 10% of that",
        ),
        ("sdxl", ["64x64"], "--aspect_ratio_buckets 64x64: must be different sizes H,W;H,W;..."),
        ("sdxl", ["64,64;"], "--aspect_ratio_buckets 64,64;: must be different sizes"),
        ("sdxl", ["64,64;0,64"], "--aspect_ratio_buckets 64,64;0,64: must be different sizes"),
        ("sdxl", ["64,64;96,64;64,64"], "--aspect_ratio_buckets 64,64;96,64;64,64: must be different sizes"),
        ("sdxl", ["64,64", "--dataset_lmdb", "x"], "--aspect_ratio_buckets: --dataset_lmdb holds latents of one size"),
        (
            "sdxl",
            ["64,64", "--dataset_name", "x", "--streaming"],
            "--aspect_ratio_buckets: --streaming reads images whose sizes are not known before",
        ),
        ("flux", ["64,64;8,512"], "--aspect_ratio_buckets 8,512: must be divisible by 16"),
        (
            "sdxl",
            ["64,64;8,64", "--discriminator_resolution", "16"],
            "--discriminator_resolution 16: must not exceed --aspect_ratio_buckets 8,64; lower it",
        ),
    ],
)
def test_bad_sizes_are_refused(name, given, message, flags, tmp_path, capsys):
    if "--resolution" not in given:
        given = ["--resolution", "64", "--aspect_ratio_buckets", *given]
    refused(SCRIPTS[name], [*flags(name), *given, "--output_dir", str(tmp_path / "out")], 2, message, capsys)
