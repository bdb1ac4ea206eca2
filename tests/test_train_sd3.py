"""The SD 3.5 script on tiny pipelines: presets, levels, every term, resume, export, prompts only, bad input."""

import json

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
from safetensors.torch import load_file

import train_senseflow_sd3 as script
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
    states,
    the_cards_call_is_infers_image,
    without,
    without_gan,
)
from senseflow.training.models import resolve_teacher
from senseflow_utils import StatelessRNG
from stock_call import assert_called_as_stock
from tiny_pipelines import write_sd3


@pytest.fixture(scope="module")
def sd3(tmp_path_factory):
    path = tmp_path_factory.mktemp("sd3")
    write_sd3(path)
    return path


@pytest.fixture
def flags(sd3, vision, data):
    """Everything on: GAN, ISG, IDA, accumulation 2, the student in every second iteration."""
    return [
        *("--pretrained_model_name_or_path", str(sd3), "--dataset_json", str(data), "--resolution", "64"),
        *("--discriminator_backbone", str(vision / "dinov2"), "--discriminator_text_encoder", str(vision / "clip")),
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
        *(
            "--max_train_steps",
            "4",
            "--checkpointing_steps",
            "2",
            "--max_sequence_length",
            "16",
            "--export_dtype",
            "fp32",
        ),
    ]


def test_everything_on_resume_export_and_a_stock_call(flags, tmp_path):
    whole = resume_is_the_same_run(
        script, flags, tmp_path, "--validation_prompts", "a red square", "--validation_steps", "2"
    )
    record = json.loads((whole / "senseflow.json").read_text())
    assert record["pipeline_call"]["guidance_scale"] == 1 and record["pipeline_call"]["max_sequence_length"] == 16
    np.testing.assert_allclose(record["sigmas"], [1, 0.9, 0.75, 0.5], atol=1e-6)
    the_cards_call_is_infers_image(whole, "sigmas", tmp_path)
    assert_same_image(image_of(whole / "checkpoint-4", tmp_path / "c"), image_of(whole, tmp_path / "images"))
    tags = logged(whole).Tags()
    assert {"isg_loss", "adversarial_loss", "dmd_loss", "discriminator_loss"} <= set(tags["scalars"])
    assert {"validation/images", "validation/panel"} <= set(tags["images"])


def test_prompts_alone_euler_without_t5_a_warm_start_and_bf16(flags, tmp_path):
    bare = tmp_path / "bare"
    write_sd3(bare, t5=False)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red square\na blue circle\n")
    flags = without_gan(without(flags, "--dataset_json", "--pretrained_model_name_or_path", "--max_train_steps"))
    flags += ["--pretrained_model_name_or_path", str(bare), "--prompts_file", str(prompts)]
    flags += ["--backward_simulation_prob", "1", "--max_train_steps", "2"]
    first, second = tmp_path / "first", tmp_path / "second"
    script.main(
        [*flags, "--output_dir", str(first), "--anchors", "1000", "700", "--sampler", "euler", "--preset", "large"]
    )
    record = json.loads((first / "senseflow.json").read_text())
    np.testing.assert_allclose(record["timesteps"], [1000, 700], atol=1e-3)
    assert record["sampler"] == "euler" and image_of(first, tmp_path / "images").std() > 0

    # No step is taken: what a warm start gives comes out as it went in.
    start = ["--student_model_name_or_path", str(first), "--learning_rate", "0", "--learning_rate_fake", "1e-3"]
    script.main([*flags, *start, "--output_dir", str(second)])
    a, b = (load_file(path / "transformer" / "diffusion_pytorch_model.safetensors") for path in (first, second))
    assert all(torch.equal(a[name], b[name]) for name in a)

    low = [*flags, "--output_dir", str(tmp_path / "bf16"), "--gradient_checkpointing", "--export_dtype", "fp16"]
    low += ["--max_shard_size", "50KB"]
    said = launch("train_senseflow_sd3.py", low, precision="bf16")
    assert "preset medium: ttur_ratio 2, ida_decay 0.98, isg_weight 0.5" in said, (
        "the choice is logged, flags included"
    )
    assert all(torch.isfinite(tensor.float()).all() for tensor in states(tmp_path / "bf16" / "checkpoint-2").values())
    shards = [load_file(file) for file in (tmp_path / "bf16" / "transformer").glob("*.safetensors")]
    assert {tensor.dtype for shard in shards for tensor in shard.values()} == {torch.float16}
    kwargs = {"subfolder": "transformer", "dtype": torch.float16}
    network = script.SD3Models.network_class.from_pretrained(tmp_path / "bf16", **kwargs).state_dict()
    assert len(shards) > 1 and len(network) == sum(map(len, shards))
    assert all(torch.equal(network[name], tensor) for shard in shards for name, tensor in shard.items())


def test_the_preset_follows_the_size_and_flags_override_it(sd3, data, tmp_path):
    large = tmp_path / "large"
    write_sd3(large, layers=31)

    def chosen(teacher, *add):
        args = script.parse_args(
            ["--pretrained_model_name_or_path", str(teacher), "--output_dir", str(tmp_path), *add]
        )
        source = resolve_teacher(args, script.SD3Models)
        name = script.SD3Models.preset_name(args, source)
        names = ("ttur_ratio", "ida_decay", "isg_weight", "dmd_guidance_scale", "isg_guidance_scale")
        return [name, *(getattr(args, flag) for flag in names)]

    assert chosen(sd3) == ["medium", 10, 0.98, 0.5, [2, 8], [2, 4]]
    assert chosen(large) == ["large", 5, 0.97, 1.0, [3, 10], [5, 5]]
    assert chosen(sd3, "--preset", "large", "--ttur_ratio", "7", "--ida_decay", "1") == [
        "large",
        7,
        1,
        1.0,
        [3, 10],
        [5, 5],
    ]


@pytest.fixture
def build(flags, tmp_path):
    """build(*flags) -> what tests/scripts.py `built` has to say, without the adversarial term."""
    return lambda *add: built(
        script, [*without_gan(flags), "--output_dir", str(tmp_path), "--report_to", "none", *add]
    )


def test_levels_time_weight_and_intermediate_timesteps_are_the_recipes(flags, tmp_path):
    run = built(script, [*flags, "--output_dir", str(tmp_path), "--report_to", "none"])
    models, schedule = run.models, run.schedule
    shifted = [3 * sigma / (1 + 2 * sigma) for sigma in (1, 0.75, 0.5, 0.25)]
    torch.testing.assert_close(schedule.anchors, 1000 * torch.tensor(shifted, dtype=torch.float64), atol=1e-3, rtol=0)
    torch.testing.assert_close(
        models.omega(schedule.anchors), torch.tensor([0, 0.25, 0.5625, 0.81]), atol=2e-3, rtol=0
    )

    # t_mid: every index in [i(t_next) + margin, i(t) - margin], ends included, seen as the table's level.
    sample_indices = list(range(4000))
    index = {anchor: number for anchor, number in zip(schedule.anchors.tolist(), (999, 749, 499, 249))} | {0.0: 0}
    for t, t_next in zip(schedule.anchors, schedule.next_timesteps):
        student_samples = schedule.draw_mid_timesteps(
            StatelessRNG(0, 0), sample_indices, t.expand(4000), t_next.expand(4000), 50
        )
        indices = schedule.index_of(student_samples)
        assert torch.equal(schedule.train_timesteps[indices], student_samples)
        assert indices.min() == index[t_next.item()] + 50 and indices.max() == index[t.item()] - 50
    student_samples = schedule.index_of(schedule.draw_dmd_timesteps(StatelessRNG(0, 0), sample_indices))
    assert 20 <= student_samples.min() < 25 and 975 < student_samples.max() <= 980


def test_the_network_is_called_as_the_stock_pipeline_calls_it(build):
    run = build("--validation_prompts", "a red square")
    assert_called_as_stock(run, run.pipeline_kwargs | {"guidance_scale": 4.0}, scale=4.0)
    assert_called_as_stock(run, run.pipeline_kwargs, scale=None)
    assert_starts_as_the_teacher(run.models)


def test_the_teacher_is_run_without_a_prompt_only_for_the_loss_that_is_guided(build):
    assert_guided_where_asked(build)


BAD = {
    "dynamic shift": (["--pretrained_model_name_or_path", "{dynamic}"], "has use_dynamic_shifting in its scheduler"),
    "another pipeline": (["--pretrained_model_name_or_path", "{flux}"], "holds a FluxPipeline"),
    "preset": (["--preset", "small"], "--preset"),
    "isg margin": (["--isg_margin", "130"], "--isg_margin 130 leaves no timestep"),
    "resolution": (["--resolution", "72"], "--resolution 72"),
    "positions": (["--resolution", "272"], "--resolution 272"),
    "sequence": (["--max_sequence_length", "600"], "--max_sequence_length 600"),
    "student": (["--student_model_name_or_path", "{flux}"], "--student_model_name_or_path"),
    "guidance": (["--isg_guidance_scale", "4", "2"], "--isg_guidance_scale 4 2"),
    "teacher guidance": (["--teacher_guidance_scale", "-1"], "--teacher_guidance_scale -1"),
    "anchors": (["--anchors", "500", "900"], "--anchors 500 900"),
    "8 bit": (["--use_8bit_adam"], "--use_8bit_adam"),
    "xformers": (["--enable_xformers_memory_efficient_attention"], "--enable_xformers"),
    "a FLUX flag": (["--student_guidance_scale", "3"], "--student_guidance_scale"),
    "no preset reaches it": (["--ttur_ratio", "0"], "--ttur_ratio 0"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_exit_code_2(case, flags, teacher, tmp_path, monkeypatch, capsys):
    add, needle = BAD[case]
    missing(monkeypatch, "bitsandbytes", "xformers")
    monkeypatch.setattr(
        SD3Transformer2DModel, "from_pretrained", lambda *a, **k: pytest.fail("weights before the check")
    )
    dynamic = tmp_path / "dynamic"
    if "{dynamic}" in add:
        write_sd3(dynamic)
        FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True).save_pretrained(dynamic / "scheduler")
        capsys.readouterr()
    add = [part.format(flux=teacher, dynamic=dynamic) for part in add]
    refused(script, [*flags, "--output_dir", str(tmp_path / "out"), *add], 2, needle, capsys)
