"""The SDXL script on a tiny pipeline: every term, the network call, other levels, bad input."""

import json
import shutil

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel

import train_senseflow_sdxl as script
from helpers import (
    assert_guided_where_asked,
    assert_same_image,
    assert_starts_as_the_teacher,
    built,
    image_of,
    launch,
    logged,
    missing,
    refused,
    resume_is_the_same_run,
    run_card,
    the_cards_call_is_infers_image,
    without,
)
from senseflow.errors import UserError
from stock_call import assert_called_as_stock
from tiny_pipelines import tiny_vae, write_sdxl


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory):
    path = tmp_path_factory.mktemp("sdxl")
    write_sdxl(path)
    return path


@pytest.fixture
def flags(sdxl, data, vision):
    """Everything on, IDA too; accumulation 2, the student in every second iteration."""
    return [
        *(
            "--pretrained_model_name_or_path",
            str(sdxl),
            "--dataset_json",
            str(data),
            "--resolution",
            "64",
        ),
        *(
            "--train_batch_size",
            "2",
            "--gradient_accumulation_steps",
            "2",
            "--ttur_ratio",
            "2",
            "--learning_rate",
            "1e-3",
        ),
        *("--max_train_steps", "4", "--checkpointing_steps", "2", "--export_dtype", "fp32", "--ida_decay", "0.97"),
        *("--discriminator_backbone", str(vision / "dinov2")),
        *("--discriminator_text_encoder", str(vision / "clip")),
    ]


def test_everything_on_resume_export_and_a_stock_call(flags, tmp_path):
    whole = resume_is_the_same_run(
        script, flags, tmp_path, "--validation_prompts", "a red square", "--validation_steps", "2"
    )
    record = json.loads((whole / "senseflow.json").read_text())
    assert record["timesteps"] == [999, 749, 499, 249] and "timesteps" not in record["pipeline_call"]
    the_cards_call_is_infers_image(whole, "timesteps", tmp_path)
    assert_same_image(image_of(whole / "checkpoint-4", tmp_path / "c"), image_of(whole, tmp_path / "images"))
    tags = logged(whole).Tags()
    losses = {"dmd_loss", "isg_loss", "adversarial_loss", "discriminator_loss", "real_logits", "fake_logits"}
    assert losses <= set(tags["scalars"])
    assert {"validation/images", "validation/panel"} <= set(tags["images"])


def test_latents_another_vae_other_levels_and_bf16(flags, lmdb_of_latents, tmp_path):
    """LMDB latents, decoded for the discriminator; another VAE, which is saved; anchors that the call must name."""
    other = tmp_path / "other_vae"
    torch.manual_seed(7)
    tiny_vae(scaling_factor=0.2).save_pretrained(other)
    flags = [
        *without(flags, "--dataset_json"),
        "--dataset_lmdb",
        str(lmdb_of_latents),
        "--anchors",
        "999",
        "600",
        "300",
    ]
    out = tmp_path / "out"
    arguments = [
        *flags,
        "--pretrained_vae_model_name_or_path",
        str(other),
        "--output_dir",
        str(out),
        "--gradient_checkpointing",
    ]
    arguments += ["--validation_prompts", "a red square", "--validation_steps", "4"]
    launch("train_senseflow_sdxl.py", arguments, precision="bf16")
    record = json.loads((out / "senseflow.json").read_text())
    assert record["pipeline_call"]["timesteps"] == [999, 600, 300]
    the_cards_call_is_infers_image(out, "timesteps", tmp_path)
    saved = AutoencoderKL.from_pretrained(out, subfolder="vae")
    assert saved.config.scaling_factor == 0.2
    wanted = AutoencoderKL.from_pretrained(other).state_dict()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in saved.state_dict().items())
    assert_same_image(image_of(out / "checkpoint-4", tmp_path / "c"), image_of(out, tmp_path / "images"))
    with pytest.raises(UserError, match="made with another vae"):
        script.main([*flags, "--output_dir", str(out), "--resume_from_checkpoint", "latest"])


@pytest.fixture
def build(flags, tmp_path):
    """build(*flags) -> the run of `helpers.built`."""
    return lambda *add: built(script, [*flags, "--output_dir", str(tmp_path), "--report_to", "none", *add])


def test_the_network_is_called_as_the_stock_pipeline_calls_it(build):
    run = build("--gan_weight", "0", "--validation_prompts", "a red square")
    assert_called_as_stock(run, run.pipeline_kwargs | {"guidance_scale": 8.0}, scale=8.0)
    assert_called_as_stock(run, run.pipeline_kwargs, scale=None)
    assert_starts_as_the_teacher(run.models)


ZERO_SNR, V_PREDICTION = {"rescale_betas_zero_snr": True}, {"prediction_type": "v_prediction"}


def change_scheduler(folder, changes: dict) -> None:
    """Change entries of a saved pipeline's scheduler; None removes one."""
    file = folder / "scheduler" / "scheduler_config.json"
    config = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({name: value for name, value in config.items() if value is not None}))


@pytest.fixture(scope="module")
def unlike_base(sdxl, tmp_path_factory):
    """A teacher of v-prediction with zero terminal SNR, whose unconditional prompt is "" instead of zeros.

    It was saved as an image-to-image pipeline.
    """
    path = tmp_path_factory.mktemp("unlike") / "sdxl"
    shutil.copytree(sdxl, path)
    changes = {"force_zeros_for_empty_prompt": False, "_class_name": "StableDiffusionXLImg2ImgPipeline"}
    index = json.loads((path / "model_index.json").read_text()) | changes
    (path / "model_index.json").write_text(json.dumps(index))
    change_scheduler(path, {**ZERO_SNR, **V_PREDICTION, "timestep_spacing": "trailing"})
    return path


def test_a_teacher_that_is_not_like_sdxls_base_is_called_and_saved_as_it_is(flags, unlike_base, tmp_path):
    flags = [*flags, "--pretrained_model_name_or_path", str(unlike_base), "--report_to", "none", "--gan_weight", "0"]
    run = built(script, [*flags, "--output_dir", str(tmp_path / "built"), "--validation_prompts", "a red square"])
    assert_called_as_stock(run, run.pipeline_kwargs | {"guidance_scale": 8.0}, scale=8.0)
    assert run.schedule.levels(run.schedule.anchors)[0][0] == 0
    flags += ["--max_train_steps", "1", "--ttur_ratio", "1"]
    for kind, add in (("full", []), ("adapter", ["--rank", "2"])):
        script.main([*flags, *add, "--output_dir", str(tmp_path / kind)])
    index = json.loads((tmp_path / "full/model_index.json").read_text())
    assert index["force_zeros_for_empty_prompt"] is False and index["_class_name"] == "StableDiffusionXLPipeline"
    (tmp_path / "full/model_index.json").write_text(json.dumps(index | {"layers": [2, 5, 8]}))
    for kind in ("full", "adapter"):
        scheduler = json.loads((tmp_path / kind / "scheduler/scheduler_config.json").read_text())
        assert scheduler["_class_name"] == "LCMScheduler" and scheduler.items() >= (ZERO_SNR | V_PREDICTION).items()
        image_of(tmp_path / kind, tmp_path / "images" / kind)
        run_card(tmp_path / kind)


def test_the_teacher_is_run_without_a_prompt_only_for_the_loss_that_is_guided(build):
    assert_guided_where_asked(lambda *add: build("--gan_weight", "0", *add))


def test_the_discriminators_weight_is_the_roots_of_abar(build):
    run = build()
    omega = run.models.omega(run.schedule.anchors)
    torch.testing.assert_close(omega, torch.tensor([0.068, 0.238, 0.527, 0.822]), atol=1e-3, rtol=0)


BAD = {
    "another pipeline": (["--pretrained_model_name_or_path", "{flux}"], "holds a FluxPipeline"),
    "fractional anchors": (["--anchors", "999", "500.5"], "--anchors 999 500.5"),
    "anchors above": (["--anchors", "1000", "500"], "--anchors 1000 500"),
    "resolution": (["--resolution", "60"], "--resolution 60"),
    "vae": (
        ["--pretrained_vae_model_name_or_path", "/no/such/vae"],
        "--pretrained_vae_model_name_or_path /no/such/vae",
    ),
    "student": (["--student_model_name_or_path", "{flux}"], "--student_model_name_or_path"),
    "sampler": (["--sampler", "euler"], "--sampler"),
    "latents of another size": (["--resolution", "72"], "--dataset_lmdb"),
    "8 bit": (["--use_8bit_adam"], "--use_8bit_adam"),
    "xformers": (["--enable_xformers_memory_efficient_attention"], "--enable_xformers"),
    "levels of EDM": (["--pretrained_model_name_or_path", "{v}"], "levels of EDMEulerScheduler"),
    "zero snr": (["--pretrained_model_name_or_path", "{v}"], "rescale_betas_zero_snr"),
    "inpainting": (["--pretrained_model_name_or_path", "{v}"], "takes 9 channels for latents of 4"),
    "prediction of x0": (["--pretrained_model_name_or_path", "{v}"], "predicts sample"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_exit_code_2(
    case, flags, sdxl, teacher, lmdb_of_latents, tmp_path, monkeypatch, capsys
):
    add, needle = BAD[case]
    missing(monkeypatch, "bitsandbytes", "xformers")
    changes = {
        "prediction of x0": {"prediction_type": "sample"},
        "zero snr": ZERO_SNR,
        "levels of EDM": {"_class_name": "EDMEulerScheduler", "beta_schedule": None},
    }
    if case in changes or case == "inpainting":
        shutil.copytree(sdxl, tmp_path / "v")
        change_scheduler(tmp_path / "v", changes.get(case, {}))
    if case == "inpainting":
        config = tmp_path / "v" / "unet" / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"in_channels": 9}))
    if "latents" in case:
        flags = [*without(flags, "--dataset_json"), "--dataset_lmdb", str(lmdb_of_latents)]
    monkeypatch.setattr(
        UNet2DConditionModel, "from_pretrained", lambda *a, **k: pytest.fail("weights before the check")
    )
    add = [part.format(flux=teacher, v=tmp_path / "v") for part in add]
    refused(script, [*flags, "--output_dir", str(tmp_path / "out"), *add], 2, needle, capsys)
