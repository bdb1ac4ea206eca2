# Copyright 2026 The SenseFlow-scripts authors. Licensed under the Apache License, Version 2.0.
"""infer.py: its images are those of the stock pipeline and depend on the index and the seed only."""

import functools
import json
import os
import re
import shutil
import subprocess
import sys
from operator import itemgetter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel, LCMScheduler
from PIL import Image
from safetensors.torch import load_file, save_file

import infer
from helpers import assert_same_image, launch
from senseflow import inference
from senseflow.arguments import torch_dtype
from senseflow.errors import UserError
from senseflow.models.hub import resolve_repo
from tiny_pipelines import cache_repository, only_variant, write_flux, write_sd3, write_sdxl


ROOT = Path(infer.__file__).parent
CALL = {"num_inference_steps": 4, "guidance_scale": 3.5, "height": 64, "width": 64, "max_sequence_length": 16}
PROMPTS = ["a red circle", "", "a blue square", "two green triangles", "an empty room", "a hat"]
LINES = [0, 2, 3, 4, 5]


# The student's transformer as state dicts: by itself, in older and other formats, and under wrappers.
STATE_DICT_FILES = ("bare.pth", "old.pth", "ema.pth", "model.pth", "bare.safetensors")


def write_senseflow(folder: Path, **changes) -> None:
    content = {
        "sigmas": [1.0, 0.9, 0.75, 0.5],
        "timesteps": [1000.0, 900.0, 750.0, 500.0],
        "sampler": "stochastic",
        "num_inference_steps": 4,
        "guidance_scale": 3.5,
        "teacher": "unused",
        "iteration": 7,
        "pipeline_call": CALL,
    }
    (folder / "senseflow.json").write_text(json.dumps(content | changes))


@pytest.fixture(autouse=True, scope="module")
def on_the_cpu():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        yield


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Write teacher/, student/ (a stochastic pipeline with senseflow.json) and checkpoint-7/ (its network alone)."""
    root = tmp_path_factory.mktemp("models")
    write_flux(root / "teacher")
    teacher = DiffusionPipeline.from_pretrained(root / "teacher")
    torch.manual_seed(1)
    config = dict(teacher.transformer.config) | {"guidance_embeds": False}
    transformer = FluxTransformer2DModel.from_config(config)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, stochastic_sampling=True)
    student = type(teacher)(**teacher.components | {"transformer": transformer, "scheduler": scheduler})
    student.save_pretrained(root / "student")
    write_senseflow(root / "student")
    checkpoint = root / "checkpoint-7"
    transformer.save_pretrained(checkpoint / "transformer")
    scheduler.save_pretrained(checkpoint / "scheduler")
    write_senseflow(checkpoint, teacher=str(root / "teacher"))
    (root / "prompts.txt").write_text("\n".join(PROMPTS) + "\n\n")
    write_sd3(root / "sd3")
    write_sdxl(root / "sdxl")
    return root


@pytest.fixture(scope="module")
def networks(models):
    """Write networks by themselves.

    flat/ is the student's transformer with its senseflow.json and scheduler in the same folder.

    base/ is the teacher, whose transformer has a configuration and no weights. files/ has the student's transformer as
    state dicts, with its senseflow.json and scheduler. hub/ is a cache of the Hub with a repository of networks.
    """
    shutil.copytree(models / "teacher", models / "base")
    next((models / "base/transformer").glob("*.safetensors")).unlink()
    shutil.copytree(models / "checkpoint-7", models / "files", ignore=shutil.ignore_patterns("transformer"))
    shutil.copytree(models / "files", models / "flat")
    shutil.copytree(models / "checkpoint-7/transformer", models / "flat", dirs_exist_ok=True)
    state = load_file(models / "checkpoint-7/transformer/diffusion_pytorch_model.safetensors")
    first = next(iter(state))

    def write(name, content):
        torch.save(content, models / "files" / name)

    write("bare.pth", state)
    write("ema.pth", {"step": 3, "ema_model": {f"_orig_mod.module.{name}": tensor for name, tensor in state.items()}})
    inside = {
        name.replace("blocks.0.", "blocks.0._checkpoint_wrapped_module."): tensor for name, tensor in state.items()
    }
    model = {f"module._fsdp_wrapped_module.{name}": tensor for name, tensor in inside.items()}
    write("model.pth", {"model": model, "ema_model": {first: state[first]}})
    save_file(state, models / "files/bare.safetensors")
    torch.save(state, models / "files/old.pth", _use_new_zipfile_serialization=False)

    write("missing.pth", {name: tensor for name, tensor in state.items() if not name.startswith("proj_out")})
    write("unexpected.pth", {"model": state | {"alien.weight": torch.ones(2)}})
    write("shape.pth", state | {first: torch.ones(2, 3)})
    write("prefixed.pth", {f"student.{name}": tensor for name, tensor in state.items()})
    write("list.pth", [1, 2])
    write("steps.pth", {"model": 7})
    write("pickle.pth", {"model": state, "path": Path("x")})
    (models / "files/cut.pth").write_bytes((models / "files/bare.pth").read_bytes()[:3000])
    (models / "files/cut.safetensors").write_bytes((models / "files/bare.safetensors").read_bytes()[:3000])
    (models / "files/empty.pth").write_bytes(b"")

    cache_repository(models / "hub", "someone/networks", models / "checkpoint-7", "0123abcd" * 5, "distilled")
    return models


def record_calls(monkeypatch) -> list[tuple[float, dict]]:
    """Return a list that gets (timestep, keyword arguments) of each call of a pipeline's network from now on."""
    calls, generate = [], infer.generate

    def hook(_, positional, keywords):
        timestep = keywords["timestep"] if "timestep" in keywords else positional[1]
        calls.append((timestep.flatten()[0].item(), keywords))

    def recorded(pipeline, *args):
        network = getattr(pipeline, "transformer", None) or pipeline.unet
        with network.register_forward_pre_hook(hook, with_kwargs=True):
            return generate(pipeline, *args)

    monkeypatch.setattr(infer, "generate", recorded)
    return calls


def main(*argv) -> None:
    infer.main([str(word) for word in argv])


def run(models: Path, out: Path, *flags, model="student") -> None:
    main("--model", models / model, "--prompts_file", models / "prompts.txt", "--output_dir", out, *flags)


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


def records(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metadata.jsonl").read_text().splitlines()]


def refusal(*argv, exit_code=2) -> str:
    """Run infer.py in this process; it must fail with that exit code and one line, which is returned."""
    with pytest.raises(UserError) as caught:
        main(*argv)
    assert caught.value.exit_code == exit_code, caught.value
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture(scope="module")
def student_samples(models, tmp_path_factory):
    """An image of each prompt by the student, generated one at a time."""
    out = tmp_path_factory.mktemp("images")
    run(models, out)
    return out


def test_names_and_metadata(models, student_samples):
    names = [f"{idx:04d}.png" for idx in LINES]
    assert sorted(path.name for path in student_samples.iterdir()) == [*names, "metadata.jsonl"]
    record = records(student_samples)[1]
    expected = {name: CALL[name] for name in infer.CALL_FLAGS} | {"sampler": "stochastic", "dtype": "float32"}
    expected |= {"file_name": "0002.png", "idx": 2, "prompt": PROMPTS[2], "seed": 42, "model": str(models / "student")}
    assert expected.items() <= record.items()
    assert [record["idx"] for record in records(student_samples)] == LINES


@pytest.mark.parametrize("sampler", ["euler", "stochastic"])
def test_equals_the_stock_pipeline(models, tmp_path, sampler):
    out = tmp_path / "saved"
    pipeline = DiffusionPipeline.from_pretrained(models / "student")
    pipeline.scheduler.register_to_config(stochastic_sampling=sampler == "stochastic")
    pipeline.save_pretrained(out)
    write_senseflow(out, sampler=sampler)
    main("--model", out, "--prompt", "a red circle", "--output_dir", tmp_path / "images", "--seed", 9)

    stock = DiffusionPipeline.from_pretrained(out)
    generator = torch.Generator().manual_seed(9)
    if sampler == "stochastic":
        stock.scheduler.step = functools.partial(stock.scheduler.step, generator=generator)
    image = stock("a red circle", generator=generator, **CALL).images[0]
    assert_same_image(pixels(tmp_path / "images/0000.png"), np.asarray(image))


def test_sampler_flag_overrides(models, student_samples, tmp_path):
    run(models, tmp_path, "--sampler", "euler", "--num_prompts", 1)
    stock = DiffusionPipeline.from_pretrained(models / "student")
    stock.scheduler = FlowMatchEulerDiscreteScheduler.from_config(stock.scheduler.config, stochastic_sampling=False)
    image = stock(PROMPTS[0], generator=torch.Generator().manual_seed(42), **CALL).images[0]
    assert_same_image(pixels(tmp_path / "0000.png"), np.asarray(image))
    assert not np.array_equal(pixels(tmp_path / "0000.png"), pixels(student_samples / "0000.png"))


def test_batch_size_and_start_index_do_not_change_an_image(models, student_samples, tmp_path):
    run(models, tmp_path, "--start_idx", 1, "--num_prompts", 4, "--batch_size", 3)
    assert [record["idx"] for record in records(tmp_path)] == [2, 3, 4]
    for idx in (2, 3, 4):
        assert_same_image(pixels(tmp_path / f"{idx:04d}.png"), pixels(student_samples / f"{idx:04d}.png"))
    assert np.abs(pixels(student_samples / "0002.png") - pixels(student_samples / "0003.png")).max() > 1


def returns_zero(sample=None, *args, hidden_states=None, **kwargs):
    return (torch.zeros_like(sample if hidden_states is None else hidden_states),)


@pytest.mark.parametrize("name, released", [("student", None), ("sd3", "sd35-large"), ("sdxl", "sdxl")])
def test_noise_depends_on_the_seed_only(models, name, released):
    """Exactly, initial and stochastic: with a network that returns 0 the last latents are made of noise only."""
    model = inference.find_model(str(models / name), released=released)
    pipeline = inference.load_model_pipeline(model, "stochastic", torch.device("cpu"), torch.float32)
    getattr(pipeline, model.network).forward = returns_zero
    steps = []
    keep = {"callback_on_step_end": lambda pipeline, i, t, kwargs: steps.append(kwargs["latents"]) or {}}
    kwargs = model.student_config["pipeline_call"] | {"height": 64, "width": 64, "output_type": "latent"} | keep
    infer.generate(pipeline, ["a", "b", "c"], [5, 6, 7], kwargs)
    together, steps[:] = list(steps), []
    infer.generate(pipeline, ["c"], [7], kwargs)
    assert len(steps) == 4 and not torch.equal(steps[0], steps[1])
    assert all(torch.equal(a[2], b[0]) and not torch.equal(a[1], a[2]) for a, b in zip(together, steps))


def test_rerun_generates_the_missing_images(models, student_samples, tmp_path, monkeypatch):
    out = tmp_path / "out"
    shutil.copytree(student_samples, out)
    before = {idx: os.stat(out / f"{idx:04d}.png").st_mtime_ns for idx in LINES}
    (out / "0003.png").unlink()
    lines = (out / "metadata.jsonl").read_text().splitlines(keepends=True)
    # As after a kill: image 5 is there and its line is cut.
    (out / "metadata.jsonl").write_text("".join(lines[:-1]) + lines[-1][:20])
    run(models, out)
    after = {idx: os.stat(out / f"{idx:04d}.png").st_mtime_ns for idx in LINES}
    assert [idx for idx in LINES if after[idx] != before[idx]] == [3, 5]
    assert sorted(record["idx"] for record in records(out)) == LINES
    for idx in LINES:
        assert np.array_equal(pixels(out / f"{idx:04d}.png"), pixels(student_samples / f"{idx:04d}.png"))
    # If nothing is missing, no weights load.
    monkeypatch.setattr(infer, "load_model_pipeline", None)
    run(models, out)


def test_several_images_of_a_prompt(models, student_samples, tmp_path):
    """They are added to those that are there. Image k has a seed of its own, with which it can be generated alone."""
    out, alone = tmp_path / "out", tmp_path / "alone"
    shutil.copytree(student_samples, out)
    (out / "0003.png").unlink()
    before = {file.name: file.stat().st_mtime_ns for file in out.glob("*.png")}
    run(models, out, "--num_images_per_prompt", 3, "--batch_size", 4, "--grid")
    names = [name for idx in LINES for name in (f"{idx:04d}.png", f"{idx:04d}_1.png", f"{idx:04d}_2.png")]
    assert sorted(file.name for file in out.glob("0*.png")) == names
    assert {name: (out / name).stat().st_mtime_ns for name in before} == before
    assert_same_image(pixels(out / "0003.png"), pixels(student_samples / "0003.png"))
    assert len({(out / name).read_bytes() for name in names}) == len(names)
    assert pixels(out / "grid.png").shape == (3 * 78, 6 * 64, 3)  # two prompts in a row
    found = {record["file_name"]: record for record in records(out)}
    assert sorted(found) == names
    assert [found["0002_1.png"][key] for key in ("idx", "image_idx", "prompt")] == [2, 1, PROMPTS[2]]
    run(models, alone, "--start_idx", 2, "--num_prompts", 1, "--seed", 42 + 10**6)
    assert_same_image(pixels(alone / "0002.png"), pixels(out / "0002_1.png"))
    # A rerun, also with fewer, generates what is missing.
    (out / "0004_1.png").unlink()
    kept = (out / "0004_2.png").stat().st_mtime_ns
    run(models, out, "--num_images_per_prompt", 2)
    assert (out / "0004_1.png").exists() and (out / "0004_2.png").stat().st_mtime_ns == kept
    assert sorted(record["file_name"] for record in records(out)) == names


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    with pytest.raises(UserError, match=f"^--output_dir {tmp_path}/gone: cannot be written .*; make room") as caught:
        infer.save_image(tmp_path / "gone", Image.new("RGB", (8, 8)), {"file_name": "0000.png"})
    assert caught.value.exit_code == 1


def test_processes_share_the_prompts(models, student_samples, tmp_path):
    """Under a launcher, after a kill: images and lines are those of one process."""
    out = tmp_path / "out"
    shutil.copytree(student_samples, out)
    lines = (out / "metadata.jsonl").read_text().splitlines(keepends=True)
    (out / "metadata.jsonl").write_text(lines[0] + lines[1][:20])
    argv = ["--model", models / "student", "--prompts_file", models / "prompts.txt", "--output_dir", out]
    launch("infer.py", [*map(str, argv), "--seed", "42", "--dtype", "fp32", "--grid"], processes=2)
    key = itemgetter("idx")
    assert sorted(records(out), key=key) == sorted(records(student_samples), key=key)
    for idx in LINES:
        assert_same_image(pixels(out / f"{idx:04d}.png"), pixels(student_samples / f"{idx:04d}.png"))
    assert (out / "grid.png").exists()


def test_each_process_takes_its_own_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(infer, "torch_device", torch.device)
    monkeypatch.setenv("LOCAL_RANK", "3")
    for flags, device in ([], "cuda:3"), (["--device", "cuda"], "cuda:3"), (["--device", "cuda:1"], "cuda:1"):
        assert str(infer.choose_device(infer.parse_args(["--model", "m", *flags]))[0]) == device


def test_a_failed_batch_keeps_the_images_before_it(models, tmp_path, monkeypatch):
    generate, calls = infer.generate, []

    def fails_the_second_time(*args):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return generate(*args)

    monkeypatch.setattr(infer, "generate", fails_the_second_time)
    with pytest.raises(KeyboardInterrupt):
        run(models, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0000.png", "metadata.jsonl"]
    assert len(records(tmp_path)) == 1


@pytest.mark.parametrize("flags", [["--seed", 43], ["--sampler", "euler"], ["--height", 32], ["--dtype", "float16"]])
def test_other_settings_are_refused(models, student_samples, flags):
    with pytest.raises(UserError, match="--output_dir.*was generated with " + flags[0][2:]) as caught:
        run(models, student_samples, *flags)
    assert caught.value.exit_code == 2


def test_other_prompts_and_weights_are_refused(models, student_samples, tmp_path):
    common = ["--output_dir", student_samples]
    assert "prompt a red circle, not another" in refusal("--model", models / "student", "--prompt", "another", *common)
    shutil.copytree(models / "student", tmp_path / "student")
    retrained = FluxTransformer2DModel.from_pretrained(tmp_path / "student/transformer")
    with torch.no_grad():
        for parameter in retrained.parameters():
            parameter.add_(1e-3)
    retrained.save_pretrained(tmp_path / "student/transformer")
    command = ["--model", tmp_path / "student", "--prompts_file", models / "prompts.txt", *common]
    assert "was generated with weights" in refusal(*command)


def test_checkpoint_folder(models, student_samples, tmp_path):
    run(models, tmp_path, "--num_prompts", 3, model="checkpoint-7")
    for idx in (0, 2):
        assert_same_image(pixels(tmp_path / f"{idx:04d}.png"), pixels(student_samples / f"{idx:04d}.png"))


def test_a_model_without_senseflow_json(models, tmp_path, caplog):
    flags = ["--height", 32, "--width", 64, "--num_prompts", 1]
    run(models, tmp_path / "own", *flags, model="teacher")
    stock = DiffusionPipeline.from_pretrained(models / "teacher")
    image = stock(PROMPTS[0], generator=torch.Generator().manual_seed(42), height=32, width=64).images[0]
    assert_same_image(pixels(tmp_path / "own/0000.png"), np.asarray(image))
    record = records(tmp_path / "own")[0]
    assert (record["num_inference_steps"], record["guidance_scale"], record["sampler"]) == (28, 3.5, "euler")
    run(models, tmp_path / "given", *flags, "--num_inference_steps", 2, "--guidance_scale", 7, model="teacher")
    image = stock(
        PROMPTS[0],
        generator=torch.Generator().manual_seed(42),
        height=32,
        width=64,
        num_inference_steps=2,
        guidance_scale=7.0,
    ).images[0]
    assert_same_image(pixels(tmp_path / "given/0000.png"), np.asarray(image))


def test_explicit_sigmas_hold_at_the_trained_number_of_steps(models, tmp_path, caplog):
    shutil.copytree(models / "student", tmp_path / "student")
    write_senseflow(tmp_path / "student", pipeline_call=CALL | {"sigmas": [1.0, 0.9, 0.4, 0.1]})
    model = inference.find_model(str(tmp_path / "student"))

    def choose(*flags, model=model):
        caplog.clear()
        return infer.choose_pipeline_kwargs(infer.parse_args(["--model", "unused", *flags]), model)

    with caplog.at_level("INFO", logger="infer"):
        assert choose()["sigmas"] == [1.0, 0.9, 0.4, 0.1] and not caplog.records
        kwargs = choose("--num_inference_steps", "2")
        assert "sigmas" not in kwargs and kwargs["num_inference_steps"] == 2 and "trained for 4" in caplog.text
        assert "sigmas" in choose("--guidance_scale", "2") and "no guidance embedder" in caplog.text
        # In a pipeline without true_cfg_scale, guidance_scale is not the embedder's.
        choose("--guidance_scale", "2", model=inference.find_model(str(models / "sd3")))
        assert not caplog.records


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_dtype(models, student_samples, tmp_path, dtype):
    run(models, tmp_path, "--num_prompts", 1, "--dtype", dtype)
    difference = np.abs(pixels(tmp_path / "0000.png") - pixels(student_samples / "0000.png"))
    assert records(tmp_path)[0]["dtype"] == dtype and 0 < difference.max() and difference.mean() < 10


def test_short_and_long_names_of_dtypes_are_the_same(models, student_samples, monkeypatch):
    monkeypatch.setattr(infer, "load_model_pipeline", None)
    for dtype in ("fp32", "float32"):
        run(models, student_samples, "--dtype", dtype)
    with pytest.raises(UserError, match="was generated with dtype float32, not bfloat16"):
        run(models, student_samples, "--dtype", "bf16")


VALUES = {
    "4": 4,
    "4.5": 4.5,
    "-1e-3": -1e-3,
    "True": True,
    "true": True,
    "null": None,
    "": "",
    "(64, 32)": [64, 32],
    "'4'": "4",
    "blurry, low quality": "blurry, low quality",
    "a=b": "a=b",
    "nan": "nan",
    "1e999": "1e999",
    "{1, 2}": "{1, 2}",
    "[1, 0": "[1, 0",
    "print(1)": "print(1)",
}


@pytest.mark.parametrize("text", VALUES)
def test_values_of_pipeline_kwargs(text):
    argv = ["--model", "m", "--pipeline_kwargs", "other=1", "--pipeline_kwargs", f"name={text}"]
    kwargs = dict(infer.parse_args(argv).pipeline_kwargs)
    assert kwargs == {"other": 1, "name": VALUES[text]} and type(kwargs["name"]) is type(VALUES[text])


def test_pipeline_kwargs_reach_the_pipeline_and_are_recorded(models, tmp_path):
    two = ["--pipeline_kwargs", "true_cfg_scale=3", "negative_prompt=a blue square"]
    flags = [*two, "max_sequence_length=8", "--num_prompts", 4, "--batch_size", 3]
    run(models, tmp_path, *flags)
    stock = DiffusionPipeline.from_pretrained(models / "student")
    kwargs = {"true_cfg_scale": 3, "negative_prompt": "a blue square", "max_sequence_length": 8}
    for idx in (0, 3):
        generator = torch.Generator().manual_seed(42 + idx)
        stock.scheduler = FlowMatchEulerDiscreteScheduler.from_config(stock.scheduler.config)
        stock.scheduler.step = functools.partial(stock.scheduler.step, generator=generator)
        image = stock(prompt=PROMPTS[idx], generator=generator, **{**CALL, **kwargs}).images[0]
        assert_same_image(pixels(tmp_path / f"{idx:04d}.png"), np.asarray(image))
    assert records(tmp_path)[0]["pipeline_kwargs"] == kwargs
    run(models, tmp_path, *flags)
    for other in ([], two, ["--pipeline_kwargs", "true_cfg_scale=2"]):
        with pytest.raises(UserError, match="was generated with pipeline_kwargs "):
            run(models, tmp_path, *other)
    wrong = ["--pipeline_kwargs", "max_sequence_length=many", "--output_dir", tmp_path / "none", "--prompt", "a hat"]
    line = refusal("--model", models / "student", *wrong, exit_code=1)
    assert line.startswith("--pipeline_kwargs max_sequence_length=many: FluxPipeline fails (")


def test_a_negative_prompt_is_repeated_for_a_batch():
    class Pipeline:
        scheduler = FlowMatchEulerDiscreteScheduler()

        def __call__(self, **kwargs):
            self.arguments, self.images = kwargs, np.zeros((2, 1, 1, 3))
            return self

        numpy_to_pil = staticmethod(DiffusionPipeline.numpy_to_pil)

    kwargs = {"negative_prompt": "b", "prompt_2": "c", "system_prompt": "d", "scale": 2}
    pipeline = Pipeline()
    infer.generate(pipeline, ["x", "y"], [1, 2], kwargs)
    received = pipeline.arguments
    assert received["negative_prompt"] == ["b", "b"] and received["prompt_2"] == ["c", "c"]
    assert received["system_prompt"] == "d" and received["scale"] == 2 and kwargs["prompt_2"] == "c"


def test_an_image_with_nan_is_refused_not_saved_as_black(models, tmp_path):
    """A guidance beyond the range of float32 makes the teacher's output NaN, in an image after a sound one."""
    flags = ["--model", models / "teacher", "--height", 64, "--width", 64, "--num_inference_steps", 1]
    flags += ["--prompt", "a hat", "--output_dir", tmp_path, "--dtype", "fp32"]
    line = refusal(*flags, "--guidance_scale", "1e38", exit_code=1)
    assert line.startswith("--dtype float32: the image of 'a hat' holds NaN and is not saved: "), line
    assert not list(tmp_path.glob("*.png")) and not (tmp_path / "metadata.jsonl").exists()
    main(*flags)
    assert records(tmp_path) and pixels(tmp_path / "0000.png").std() > 0


def test_the_pixel_multiple_is_that_of_the_training(models, tmp_path):
    shutil.copytree(models / "student", tmp_path / "student", ignore=shutil.ignore_patterns("*.safetensors"))
    argv = ["--model", str(tmp_path / "student"), "--height", "48"]
    infer.choose_pipeline_kwargs(infer.parse_args(argv), inference.find_model(argv[1]))
    write_senseflow(tmp_path / "student", pixel_multiple=32)
    with pytest.raises(UserError, match="--height 48: must be divisible by 32; give 64"):
        infer.choose_pipeline_kwargs(infer.parse_args(argv), inference.find_model(argv[1]))


MULTIPLES = {  # (pixels, entries of the VAE's configuration, of the network's)
    "FLUX.1": (16, {"block_out_channels": [1] * 4, "latent_channels": 16}, {"in_channels": 64, "patch_size": 1}),
    "FLUX.2": (
        16,
        {"block_out_channels": [1] * 4, "latent_channels": 32, "patch_size": [2, 2], "batch_norm_eps": 1e-4},
        {"in_channels": 128, "patch_size": 1},
    ),
    "Qwen-Image": (16, {"dim_mult": [1] * 4, "z_dim": 16}, {"in_channels": 64, "patch_size": 2}),
    "Z-Image": (
        16,
        {"block_out_channels": [1] * 4, "latent_channels": 16},
        {"in_channels": 16, "all_patch_size": [2]},
    ),
    "Sana": (32, {"encoder_block_out_channels": [1] * 6, "latent_channels": 32}, {"in_channels": 32, "patch_size": 1}),
    "in pixels": (1, {}, {"in_channels": 3}),
}


@pytest.mark.parametrize("name", MULTIPLES)
def test_the_pixel_multiple_is_read_from_the_configurations(name):
    multiple, vae, network = MULTIPLES[name]
    model = SimpleNamespace(student_config={}, config={"vae": vae, "transformer": network}.get)
    assert inference.pixel_multiple(model) == multiple


def test_a_checkpoint_finds_the_variant_of_its_teacher(models, student_samples, tmp_path):
    shutil.copytree(models / "teacher", tmp_path / "teacher")
    only_variant(tmp_path / "teacher")
    shutil.copytree(models / "checkpoint-7", tmp_path / "checkpoint-7")
    command = ["--model", tmp_path / "checkpoint-7", "--prompt", PROMPTS[0], "--output_dir"]
    write_senseflow(tmp_path / "checkpoint-7", teacher=str(tmp_path / "teacher"))
    line = refusal(*command, tmp_path / "none")
    assert f"{tmp_path / 'teacher'}: text_encoder holds only *.fp16.safetensors: give --variant fp16" in line
    main(*command, tmp_path / "flag", "--variant", "fp16")
    write_senseflow(tmp_path / "checkpoint-7", teacher=str(tmp_path / "teacher"), teacher_variant="fp16")
    main(*command, tmp_path / "own")
    for out in ("flag", "own"):
        assert_same_image(pixels(tmp_path / out / "0000.png"), pixels(student_samples / "0000.png"))
    # A pipeline itself, and a network in the place of its own.
    command = ["--model", tmp_path / "teacher", "--prompt", "a hat", "--height", 32, "--num_inference_steps", 1]
    command += ["--output_dir"]
    main(*command, tmp_path / "whole", "--variant", "fp16")
    main(*command, tmp_path / "network", "--transformer", tmp_path / "teacher/transformer", "--variant", "fp16")
    assert "is a folder, which has none" in refusal(*command, tmp_path / "none", "--revision", "main")
    # With weights in both, images of one are not completed with the other.
    shutil.copytree(models / "teacher", tmp_path / "teacher", dirs_exist_ok=True)
    main(*command, tmp_path / "both")
    assert "was generated with weights" in refusal(*command, tmp_path / "both", "--variant", "fp16")


def test_a_checkpoint_finds_the_revision_of_its_teacher(models, student_samples, tmp_path, monkeypatch):
    """After the run, the teacher's repository on the Hub gets other weights."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    first, second = "01" * 20, "23" * 20
    write_flux(tmp_path / "other", seed=5)
    cache_repository(tmp_path / "hub", "some/teacher", models / "teacher", first)
    cache_repository(tmp_path / "hub", "some/teacher", tmp_path / "other", second)
    shutil.copytree(models / "checkpoint-7", tmp_path / "checkpoint-7")
    write_senseflow(tmp_path / "checkpoint-7", teacher="some/teacher", teacher_revision=first)
    command = ["--model", tmp_path / "checkpoint-7", "--prompt", PROMPTS[0], "--output_dir"]
    main(*command, tmp_path / "own")
    assert_same_image(pixels(tmp_path / "own/0000.png"), pixels(student_samples / "0000.png"))
    main(*command, tmp_path / "flag", "--revision", "main")
    assert np.abs(pixels(tmp_path / "flag/0000.png") - pixels(student_samples / "0000.png")).max() > 1
    assert "was generated with weights" in refusal(*command, tmp_path / "own", "--revision", second)
    assert "some/teacher: no such folder" in refusal(*command, tmp_path / "none", "--revision", "89" * 20)


def test_grid(models, student_samples, tmp_path):
    shutil.copytree(student_samples, tmp_path / "out")
    run(models, tmp_path / "out", "--grid")
    grid = pixels(tmp_path / "out/grid.png")
    assert grid.shape == (2 * 78, 3 * 64, 3)  # 5 images, 14 pixels of label
    assert np.array_equal(grid[:64, 64:128], pixels(student_samples / "0002.png"))
    assert np.array_equal(grid[78:142, 64:128], pixels(student_samples / "0005.png"))
    assert grid[142:, 64:128].min() < 128, "a label"


FOLDER = ["--transformer", "{root}/checkpoint-7", "--transformer_subfolder", "transformer"]
STATE_DICTS = [["--checkpoint", f"{{root}}/files/{name}"] for name in STATE_DICT_FILES]
ON_HUB = ["--transformer", "someone/networks", "--transformer_subfolder", "distilled/transformer"]
BASE_WITHOUT_NETWORK = ["--model", "{root}/nothing", *FOLDER]
WITH_CONFIG = ["--transformer_config", "{root}/checkpoint-7/transformer/config.json", *STATE_DICTS[0]]
FLAT = ["--transformer", "{root}/flat"]
NETWORKS = [FOLDER, FLAT, BASE_WITHOUT_NETWORK, ON_HUB, *STATE_DICTS, WITH_CONFIG]


@pytest.mark.parametrize("flags", NETWORKS, ids=lambda flags: " ".join(flags[-2:]))
def test_a_replaced_network_gives_the_images_of_the_pipeline_saved_with_it(
    networks, student_samples, tmp_path, monkeypatch, flags
):
    """Without further flags: senseflow.json and the scheduler are beside the network.

    The base has other weights or none, and a guidance embedder that the student lacks.
    """
    if flags is BASE_WITHOUT_NETWORK:
        shutil.copytree(networks / "base", networks / "nothing", ignore=shutil.ignore_patterns("transformer"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(networks / "hub"))
    flags = [flag.format(root=networks) for flag in flags]
    run(networks, tmp_path, *flags, "--num_prompts", 1, model="base")
    assert_same_image(pixels(tmp_path / "0000.png"), pixels(student_samples / "0000.png"))
    record = records(tmp_path)[0]
    assert (record["num_inference_steps"], record["sampler"]) == (4, "stochastic")
    assert record["network"] == f"{flags[-2]} {flags[-1]}" or record["network"].endswith("/transformer")


def test_a_replaced_network_without_senseflow_json_is_called_as_the_base_is(networks, tmp_path, caplog):
    (tmp_path / "a/b").mkdir(parents=True)
    teacher = load_file(networks / "teacher/transformer/diffusion_pytorch_model.safetensors")
    torch.save(teacher, tmp_path / "a/b/teacher.pth")
    flags = ["--num_prompts", 1, "--height", 64, "--width", 64, "--num_inference_steps", 2]
    with caplog.at_level("INFO", logger="senseflow.inference"):
        run(networks, tmp_path / "own", *flags, model="teacher")
        assert not caplog.records
        run(networks, tmp_path / "other", *flags, "--checkpoint", tmp_path / "a/b/teacher.pth", model="base")
    (record,) = caplog.records
    origin = f"--checkpoint {tmp_path}/a/b/teacher.pth"
    assert record.message == (
        f"{origin}: no senseflow.json beside it and no --released; sampling as --model {networks}/base does"
    )
    assert_same_image(pixels(tmp_path / "own/0000.png"), pixels(tmp_path / "other/0000.png"))
    # Other weights, or the same ones with other settings, do not go into the same folder.
    torch.save({name: tensor + 1e-3 for name, tensor in teacher.items()}, tmp_path / "a/b/other.pth")
    command = ["--model", networks / "base", "--prompts_file", networks / "prompts.txt", *flags]
    command += ["--output_dir", tmp_path / "other", "--checkpoint"]
    assert "was generated with weights" in refusal(*command, tmp_path / "a/b/other.pth")
    other = [tmp_path / "a/b/teacher.pth", "--released", "flux", "--sampler", "euler"]
    assert "was generated with weights" in refusal(*command, *other)


def find(models: Path, model: str, flags: list[str]) -> inference.Model:
    """Find a model with a replaced network."""
    args = infer.parse_args(["--model", str(models / model), *(flag.format(root=models) for flag in flags)])
    return inference.find_model(
        args.model, network=infer.choose_network(args), subfolder=args.transformer_subfolder or ""
    )


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_state_dict_gives_the_weights_that_a_folder_gives(networks, dtype):
    dtype = torch_dtype(dtype)
    folder = inference.load_component(find(networks, "base", FOLDER), "transformer", dtype).state_dict()
    assert {tensor.dtype for tensor in folder.values()} == {dtype}
    for flags in STATE_DICTS:
        network = inference.load_component(find(networks, "base", flags), "transformer", dtype)
        state = network.state_dict()
        assert state.keys() == folder.keys() and not network.training
        for name in folder:
            assert torch.equal(state[name], folder[name]) and state[name].dtype == folder[name].dtype


def test_a_network_on_the_hub_is_identified_by_its_commit(networks, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(networks / "hub"))
    repository = networks / "hub/models--someone--networks"

    def digest():
        resolve_repo.cache_clear()  # a process keeps to the commit that it resolved first
        return inference.hash_model(find(networks, "base", ON_HUB))

    before, commit = digest(), (repository / "refs/main").read_text()
    shutil.copytree(repository / "snapshots" / commit, repository / "snapshots" / commit[::-1])
    (repository / "refs/main").write_text(commit[::-1])
    assert digest() != before
    (repository / "refs/main").write_text(commit)
    assert digest() == before


@pytest.mark.parametrize("name, network", [("sd3", "transformer"), ("sdxl", "unet")])
def test_a_state_dict_of_another_family(networks, tmp_path, name, network):
    weights = load_file(networks / name / network / "diffusion_pytorch_model.safetensors")
    torch.save({"model": {f"module.{key}": tensor for key, tensor in weights.items()}}, tmp_path / "network.pth")
    model = find(networks, name, ["--checkpoint", str(tmp_path / "network.pth")])
    state = inference.load_component(model, network, torch.float32).state_dict()
    assert state.keys() == weights.keys() and all(torch.equal(state[key], weights[key]) for key in weights)


DAMAGED = {
    "missing.pth": r"2 missing \(proj_out.bias, proj_out.weight\); give the --model",
    "unexpected.pth": r"1 unexpected \(alien.weight\); give",
    "shape.pth": r"1 of another shape \(\S+ \[2, 3\] not \[.*\]\); give",
    "prefixed.pth": r"\d\d missing \(\S+, \S+, \S+, \.\.\.\), \d\d unexpected \(student\.\S+, .*\.\.\.\); give",
    "list.pth": "holds no state dict",
    "steps.pth": "holds no state dict",
    "pickle.pth": "damaged, or holds more than tensors",
    "cut.pth": "damaged|cannot load",
    "cut.safetensors": "cannot load the weights",
    "empty.pth": "cannot load the weights",
}


@pytest.mark.parametrize("file", DAMAGED)
def test_a_state_dict_that_does_not_fit_is_refused(networks, tmp_path, file):
    path = networks / "files" / file
    line = refusal("--model", networks / "base", "--checkpoint", path, "--output_dir", tmp_path, exit_code=1)
    assert line.startswith(f"--checkpoint {path}: ") and re.search(DAMAGED[file], line), line


def test_a_folder_that_lacks_weights_is_refused(networks, tmp_path):
    shutil.copytree(networks / "checkpoint-7", tmp_path / "checkpoint-7")
    path = tmp_path / "checkpoint-7/transformer/diffusion_pytorch_model.safetensors"
    save_file({name: tensor for name, tensor in load_file(path).items() if name != "proj_out.bias"}, path)
    for model, flags in ((networks / "base", ["--transformer", path.parent]), (tmp_path / "checkpoint-7", [])):
        line = refusal("--model", model, *flags, "--output_dir", tmp_path / "out", exit_code=1)
        origin = f"{flags[0]} {flags[1]}" if flags else f"--model {model} (transformer)"
        assert line.startswith(f"{origin}: 1 weights are missing (proj_out")


@pytest.mark.parametrize(
    "name, model, levels, text",
    [
        ("flux", "student", [1, 0.90453, 0.75951, 0.51284], 512),
        ("sd35-medium", "sd3", [1000, 900, 750, 500], 77 + 77),
        ("sd35-large", "sd3", [1000, 900, 750, 500], 77 + 77),
        ("sdxl", "sdxl", [999, 749, 499, 249], 77),
        ("sdxl-dmd2", "sdxl", [999, 749, 499, 249], 77),
    ],
)
def test_released_sets_levels_sampler_guidance_and_text(
    networks, tmp_path, monkeypatch, caplog, name, model, levels, text
):
    calls = record_calls(monkeypatch)
    flags = ["--released", name, "--height", 64, "--width", 64, "--num_prompts", 4]
    with caplog.at_level("INFO", logger="senseflow.inference"):
        run(networks, tmp_path / "one", *flags, model=model)
    assert ("overrides the senseflow.json" in caplog.text) == (model == "student")
    np.testing.assert_allclose([t for t, _ in calls], levels * 3, rtol=1e-5)  # of 4 lines one is blank
    for _, keywords in calls:
        assert tuple(keywords["encoder_hidden_states"].shape[:2]) == (1, text), "batch 1: no classifier-free guidance"
    record = records(tmp_path / "one")[0]
    assert (record["sampler"], record["released"]) == ("stochastic", name)

    run(networks, tmp_path / "three", *flags, "--batch_size", 3, model=model)
    for idx in (0, 2, 3):
        assert_same_image(pixels(tmp_path / f"one/{idx:04d}.png"), pixels(tmp_path / f"three/{idx:04d}.png"))

    # One step visits the first level and gives an image.
    calls.clear()
    run(networks, tmp_path / "step", *flags[:-1], 1, "--num_inference_steps", 1, model=model)
    np.testing.assert_allclose([t for t, _ in calls], levels[:1], rtol=1e-5)
    assert pixels(tmp_path / "step/0000.png").std() > 1

    args = infer.parse_args(["--model", "unused", "--guidance_scale", "2"])
    kwargs = infer.choose_pipeline_kwargs(args, inference.find_model(str(networks / model), released=name))
    assert {"num_inference_steps": 4, "guidance_scale": 2, "height": 1024, "width": 1024}.items() <= kwargs.items()


def test_released_with_a_replaced_unet(networks, tmp_path, monkeypatch):
    """The published SDXL: the base's text encoders and VAE, another UNet, and LCM in the place of Euler."""
    write_sdxl(tmp_path / "other", seed=1)
    calls = record_calls(monkeypatch)
    flags = ["--released", "sdxl", "--height", 64, "--width", 64, "--num_prompts", 1]
    run(networks, tmp_path / "out", *flags, "--unet", tmp_path / "other", "--unet_subfolder", "unet", model="sdxl")
    stock = DiffusionPipeline.from_pretrained(networks / "sdxl")
    unet = DiffusionPipeline.from_pretrained(tmp_path / "other").unet
    stock.register_modules(unet=unet, scheduler=LCMScheduler.from_config(stock.scheduler.config))
    call = {"timesteps": [999, 749, 499, 249], "guidance_scale": 0, "height": 64, "width": 64}  # as DMD2 publishes it
    image = stock(PROMPTS[0], generator=torch.Generator().manual_seed(42), **call).images[0]
    assert len(calls) == 4
    assert_same_image(pixels(tmp_path / "out/0000.png"), np.asarray(image))


SHARD_INDEX = "diffusion_pytorch_model.safetensors.index.json"
BAD = {
    "--transformer {root}/none": "--transformer .*/none: no such folder, and it is no Hub id",
    "--transformer {root}/files/bare.pth": "--transformer .*bare.pth: is a single file; give a folder",
    "--transformer {root}/student": "no .*student/config.json; name the folder.*--transformer_subfolder",
    "--transformer nobody/nothing": "--transformer nobody/nothing: no such folder, and the cache .* lacks it",
    "--transformer {root}/student/vae": "_class_name is AutoencoderKL, but FluxTransformer2DModel in",
    "--unet {root}/student/transformer": "--unet .*: FluxPipeline has no unet; give --transformer",
    "--model {root}/sdxl --transformer {root}/student/transformer": "has no transformer; give --unet",
    "--transformer {root}/student/transformer --checkpoint x": "--checkpoint: not allowed with .*--transformer",
    f"--transformer {{root}}/student/transformer/{SHARD_INDEX}": "no such folder",
    f"--transformer {{root}}/shards/{SHARD_INDEX}": "is a single file; give",
    "--transformer {root}/shards": r"--transformer .*/shards: it holds only \*.fp16.safetensors: give --variant fp16",
    "--transformer {root}/wide": "--transformer .*/wide: joint_attention_dim is 64, but 32",
    "--transformer {root}/call/transformer": "--transformer .*call/transformer: pipeline_call in senseflow.json",
    "--checkpoint {root}/none.pth": "--checkpoint .*none.pth: no such file",
    "--checkpoint {root}/student": "--checkpoint .*student: no such file",
    "--model {root}/files/bare.safetensors": "--model .*bare.safetensors: is a single file; give a folder",
    "--model {root}/student/model_index.json": "is a single file; give a folder with a model_index.json",
    "--model no/such/folder": "--model no/such/folder: no such folder",
    "--model tests/typo": "--model tests/typo: no such folder",
    "--model nobody/nothing": "--model nobody/nothing: no such folder, and the cache .*: unset HF_HUB_OFFLINE",
    "--model {root}/student/vae": "neither model_index.json nor a senseflow.json",
    "--model {root}/cut": "senseflow.json is damaged",
    "--model {root}/list": "senseflow.json is damaged",
    "--model {root}/call": "pipeline_call in senseflow.json has steps, which FluxPipeline lacks",
    "--model {root}/text": "pipeline_call in senseflow.json must be an object",
    "--model {root}/sampler": "sampler in senseflow.json must be one of stochastic, euler",
    "--model {root}/multiple": "pixel_multiple in senseflow.json must be a whole number",
    "--model {root}/class": "NoSuchPipeline is no text-to-image pipeline",
    "--model {root}/models": "models: lacks .*, which its model_index.json names",
    "--model {root}/lost": "teacher in its senseflow.json, ./moved: no such folder",
    "--model {root}/lcm": "--num_inference_steps 50: this LCMScheduler has 4",
    "--revision main": "--revision main: .*/student is a folder",
    "--variant fp16": "--variant fp16: .*/student holds no weights",
    "--pipeline_kwargs true_cfg_scale": "--pipeline_kwargs true_cfg_scale: must be NAME=VALUE, such as",
    "--pipeline_kwargs true_cfg=3": "true_cfg=3: FluxPipeline does not take it; it takes .*true_cfg_scale",
    "--pipeline_kwargs output_type=pt": "FluxPipeline does not take it; it takes (?!.*output_type)",
    "--released sd35-large": "--released sd35-large: is for a StableDiffusion3Pipeline; .* is a FluxPipeline",
    "--model {root}/sd3 --released flux": "--released flux: is for a FluxPipeline",
    "--released sd35": "--released: invalid choice: 'sd35'",
    "--model {root}/sdxl --released sdxl --num_inference_steps 5": "--num_inference_steps 5: .* 4 or fewer",
    "--model {root}/sdxl --released sdxl --sampler euler": "--sampler euler: the model's LCMScheduler",
    "--batch_size 0": "--batch_size 0: must be a whole number, 1 or more",
    "--num_inference_steps four": "--num_inference_steps four: must be a whole number",
    "--guidance_scale nan": "--guidance_scale nan: must be 0 or more",
    "--seed -1": "--seed -1: must be a whole number, in",
    "--dtype int8": "--dtype: invalid choice: 'int8'",
    "--sampler ddim": "--sampler: invalid choice",
    "--device warp": "--device warp",
    "--start_idx 6": "--start_idx 6: .* last has index 5",
    "--start_idx 1 --num_prompts 1": "--start_idx 1",
    "--height 72": "--height 72: must be divisible by 16; give 80",
    "--width 8": "--width 8: must be divisible by 16",
    "--prompt a": "--prompt",
    "--checkpoint {root}/student/model_index.json --transformer_config {root}/none.json": "no .*none.json",
    "--prompts_file {root}/none.txt": "--prompts_file .*none.txt: cannot be read",
    "--prompts_file {root}/blank.txt": "--prompts_file .*it is empty",
    "--prompts_file {root}/student/transformer/diffusion_pytorch_model.safetensors": "--prompts_file .*UTF-8",
    "--output_dir {root}/prompts.txt": "--output_dir .*prompts.txt",
    "--unknown 1": "--unknown",
}


@pytest.fixture(scope="module")
def bad_models(networks):
    """Write models that are damaged or do not fit, beside the good ones."""
    root, student = networks, networks / "student"
    for name in ("cut", "list", "call", "text", "sampler", "models", "class", "lost", "multiple"):
        (root / name).mkdir()
        if name != "lost":
            shutil.copy(student / "model_index.json", root / name)
    (root / "cut/senseflow.json").write_text((student / "senseflow.json").read_text()[:-9])
    (root / "list/senseflow.json").write_text("[1, 2]")
    write_senseflow(root / "sampler", sampler="ddim")
    write_senseflow(root / "multiple", pixel_multiple="16")
    write_senseflow(root / "text", pipeline_call="steps=4")
    write_senseflow(root / "call", pipeline_call={"steps": 4})
    write_senseflow(root / "lost", teacher="./moved")
    (root / "class/model_index.json").write_text('{"_class_name": "NoSuchPipeline"}')
    shutil.copytree(student / "transformer", root / "call/transformer")
    shutil.copytree(student / "transformer", root / "shards")
    only_variant(root / "shards")
    (root / "shards" / SHARD_INDEX).write_text("{}")
    shutil.copytree(student / "transformer", root / "wide")
    config = json.loads((student / "transformer/config.json").read_text())
    (root / "wide/config.json").write_text(json.dumps(config | {"joint_attention_dim": 64}))
    shutil.copytree(root / "sdxl", root / "lcm", ignore=shutil.ignore_patterns("*.safetensors"))
    LCMScheduler(original_inference_steps=4).save_pretrained(root / "lcm/scheduler")
    (root / "blank.txt").write_text("\n  \n")
    return root


@pytest.mark.parametrize("flags", BAD)
def test_bad_arguments(bad_models, tmp_path, monkeypatch, flags):
    monkeypatch.setattr(infer, "load_model_pipeline", None)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(ROOT)
    argv = flags.format(root=bad_models).split()
    defaults = {
        "--model": bad_models / "student",
        "--prompts_file": bad_models / "prompts.txt",
        "--output_dir": tmp_path,
    }
    line = refusal(*(word for flag in defaults.items() for word in flag if flag[0] not in argv), *argv)
    assert re.search(BAD[flags], line), line


def test_a_subfolder_without_a_network_is_a_warning(models, student_samples, caplog):
    run(models, student_samples, "--transformer_subfolder", "a")
    assert "--transformer_subfolder a: no effect without --transformer or --unet" in caplog.text


def test_a_scheduler_without_the_choice(models, tmp_path):
    shutil.copytree(models / "student", tmp_path / "student")
    os.remove(tmp_path / "student/senseflow.json")
    config = {"_class_name": "FlowMatchLCMScheduler"}
    (tmp_path / "student/scheduler/scheduler_config.json").write_text(json.dumps(config))
    model = inference.find_model(str(tmp_path / "student"))
    assert infer.choose_sampler(None, model) == infer.choose_sampler("stochastic", model) == "stochastic"
    with pytest.raises(UserError, match="--sampler euler: the model's FlowMatchLCMScheduler"):
        infer.choose_sampler("euler", model)


def test_truncated_weights_in_a_real_process(models, tmp_path):
    shutil.copytree(models / "checkpoint-7", tmp_path / "checkpoint-7")
    weights = next((tmp_path / "checkpoint-7/transformer").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    argv = ["--model", tmp_path / "checkpoint-7", "--output_dir", tmp_path / "out"]
    command = [sys.executable, ROOT / "infer.py", *argv]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith(f"infer.py: error: --model {tmp_path / 'checkpoint-7'}: cannot load the weights")
