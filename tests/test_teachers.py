"""Every file of teachers/ calls its networks as the stock pipeline does, and its flags are complete.

A new file is found by its name: teachers/train_senseflow_NAME.py needs `write_NAME` in tests/tiny_pipelines.py. What
takes longer is in test_teachers_train.py.
"""

import importlib.util
import inspect
import json
import shutil
from contextlib import nullcontext
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from PIL import Image

import infer
import tiny_pipelines
from helpers import ROOT, assert_starts_as_the_teacher, built, models_class, refused
from senseflow.models.attention import attention_layers
from senseflow.training.models import TrainingModels
from senseflow.training.validation import call_pipeline
from stock_call import assert_called_as_stock


FILES = sorted((ROOT / "teachers").glob("train_senseflow_*.py"))
SCRIPTS = {path.stem.removeprefix("train_senseflow_"): importlib.import_module(path.stem) for path in FILES}

# Where a teacher's defaults are refused at 64 pixels, or ask it without guidance.
FURTHER_FLAGS = {
    "ideogram4": "--anchors 1000 846.1 666.7 421.1",
    "qwenimage21": "--dmd_guidance_scale 1 8 --isg_guidance_scale 1 8 --teacher_guidance_scale 4",
}
PADS_A_BATCH = ("qwenimage21",)  # a stock call of two prompts is another than two calls
# Flags that no shared default serves.
REQUIRED = (
    "ttur_ratio ida_decay isg_weight isg_margin gan_weight backward_simulation_prob dmd_guidance_scale "
    "isg_guidance_scale learning_rate max_train_steps teacher_num_inference_steps teacher_guidance_scale lora_layers "
    "max_sequence_length"
).split()


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """Return pipeline(name) -> folder of the tiny pipeline of a file of teachers/; each is written once."""
    written = {}

    def write(name):
        if name not in written:
            written[name] = tmp_path_factory.mktemp(name)
            getattr(tiny_pipelines, f"write_{name}")(written[name])
        return written[name]

    return write


def as_x0(models: TrainingModels, latents: torch.Tensor) -> torch.Tensor:
    """Turn a stock pipeline's latents into (B, C, H, W): with a frame axis, or tokens of 1 or of 2 x 2 latents."""
    channels, height, width = models.latent_shape
    if latents.dim() == 3 and latents.shape[2] == channels:
        return latents.mT.unflatten(2, (height, width))
    if latents.dim() == 3:
        squares = latents.unflatten(1, (height // 2, width // 2)).unflatten(3, (channels, 2, 2))
        return squares.permute(0, 3, 1, 4, 2, 5).reshape(-1, channels, height, width)
    return latents.squeeze(2) if latents.dim() == 5 else latents


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_teacher_is_called_as_by_its_stock_pipeline(name, pipeline, tmp_path):
    (tmp_path / "prompts.txt").write_text("a red square\n")
    flags = f"--pretrained_model_name_or_path {pipeline(name)} --prompts_file {tmp_path}/prompts.txt --gan_weight 0"
    flags += f" --backward_simulation_prob 1 --resolution 64 --output_dir {tmp_path} --report_to none"
    flags += f" --max_sequence_length 192 --validation_prompts a {FURTHER_FLAGS.get(name, '')}"
    flags += " --gradient_checkpointing"
    run = built(SCRIPTS[name], flags.split())
    teachers = run.models.teacher_pipeline_kwargs()
    guided = {key: value for key, value in teachers.items() if key not in ("num_inference_steps", "sigmas")}
    assert run.args.teacher_guidance_scale > 1, "give guidance in FURTHER_FLAGS"
    kwargs = {"as_x0": lambda latents: as_x0(run.models, latents), "one_by_one": name in PADS_A_BATCH}
    assert_called_as_stock(run, run.pipeline_kwargs | guided, run.args.teacher_guidance_scale, **kwargs)
    assert_called_as_stock(run, run.pipeline_kwargs, None, **kwargs)
    assert_starts_as_the_teacher(run.models)
    run.args.teacher_guidance_scale = 1.0  # the teacher's images without guidance
    call = run.pipeline_kwargs | run.models.teacher_pipeline_kwargs() | {"num_inference_steps": 2}
    inspect.signature(run.pipeline.__call__).bind(prompt="a", **call)
    assert run.pipeline(prompt="a red square", output_type="np", **call).images.std() > 0


def test_a_prompt_that_is_too_long_for_a_pipeline_that_cuts_none_loses_its_end(pipeline, tmp_path, caplog):
    """It would end a run at the iteration in which it comes."""
    (tmp_path / "prompts.txt").write_text("a red square\n")
    flags = f"--pretrained_model_name_or_path {pipeline('qwenimage21')} --prompts_file {tmp_path}/prompts.txt"
    flags += f" --gan_weight 0 --backward_simulation_prob 1 --resolution 64 --output_dir {tmp_path}"
    models = built(SCRIPTS["qwenimage21"], f"{flags} --report_to none --max_sequence_length 16".split()).models
    whole, mask, _ = models.pipeline.encode_prompt(["a red square, " * 10], device="cpu")
    embeds, found = models.encode_prompts(("a red square, " * 10,))
    assert mask is None and whole.shape[1] > 16 and found.all()
    assert torch.equal(embeds, whole[:, :16]) and "--max_sequence_length 16: prompts of more tokens" in caplog.text


def test_transparent_pixels_are_shown_over_white(pipeline, tmp_path):
    (tmp_path / "prompts.txt").write_text("a red square\n")
    flags = f"--pretrained_model_name_or_path {pipeline('qwenimage21')} --prompts_file {tmp_path}/prompts.txt"
    flags += f" --gan_weight 0 --backward_simulation_prob 1 --resolution 64 --output_dir {tmp_path} --report_to none"
    run = built(SCRIPTS["qwenimage21"], [*flags.split(), "--validation_prompts", "a"])
    call = run.pipeline, "a", 0, run.pipeline_kwargs
    with mock.patch.object(run.pipeline.vae, "decode", lambda *_, **__: (-torch.ones(1, 4, 1, 64, 64),)):
        shown = call_pipeline(SimpleNamespace(autocast=nullcontext), *call)
        image = run.pipeline(prompt="a", **run.pipeline_kwargs).images[0]  # black and transparent
    assert image.getpixel((9, 9)) == (0, 0, 0, 0) and shown.convert("RGB").getpixel((9, 9)) == (255, 255, 255)
    image.save(tmp_path / "0000.png")
    infer.write_grid(tmp_path, [(0, 0)], 1)
    assert Image.open(tmp_path / "grid.png").getpixel((9, 9)) == (255, 255, 255)


@pytest.mark.parametrize("name", [name for name in SCRIPTS if models_class(SCRIPTS[name]).further_networks])
def test_all_networks_of_a_teacher_have_the_chosen_kernel(name, pipeline, tmp_path):
    (tmp_path / "prompts.txt").write_text("a red square\n")
    flags = f"--pretrained_model_name_or_path {pipeline(name)} --prompts_file {tmp_path}/prompts.txt --gan_weight 0"
    flags += f" --backward_simulation_prob 1 --resolution 64 --output_dir {tmp_path} --report_to none"
    run = built(SCRIPTS[name], [*flags.split(), *FURTHER_FLAGS[name].split(), "--attention_backend", "_native_math"])
    for role in (run.models.teacher, *run.models.further_roles.values()):
        kernels = {str(layer.processor._attention_backend.value) for layer in attention_layers(role.module)}
        assert kernels == {"_native_math"}, role.name


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_teacher_has_nothing_of_the_script_that_it_is_made_from(name):
    """Names for other programs, presets, and the flags' defaults, would be another teacher's."""
    script = SCRIPTS[name]
    cls = models_class(script)
    for attribute in ("lora_base", "comfyui_shift", "comfyui_guidance", "kohya_names", "presets", "parse_args"):
        inherited = getattr(TrainingModels, attribute, None)
        assert attribute in vars(cls) or getattr(cls, attribute) == inherited, attribute
    args = script.parse_args(["--pretrained_model_name_or_path", "x", "--output_dir", "y"])
    length = len(inspect.getsource(script).splitlines())
    assert length <= 120, "longer than 120 lines"
    missing = [flag for flag in REQUIRED if getattr(args, flag) is None]
    assert not missing, f"no default: {missing}"
    assert f"teachers/{script.__name__}.py" in script.__doc__, "the docstring has the command"
    assert f"`{script.__name__}.py`" in (ROOT / "docs" / "teachers.md").read_text(), "docs/teachers.md lists the file"


@pytest.mark.parametrize("name", ["flux2_klein", "krea2"])
def test_a_teacher_that_is_distilled_is_refused(name, pipeline, tmp_path, capsys):
    shutil.copytree(pipeline(name), tmp_path / "distilled")
    index = tmp_path / "distilled" / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"is_distilled": True}))
    flags = f"--pretrained_model_name_or_path {tmp_path}/distilled --prompts_file p.txt --output_dir {tmp_path}/out"
    capsys.readouterr()  # of the writing of the pipeline
    refused(SCRIPTS[name], flags.split(), 2, "has is_distilled true in its model_index.json", capsys)


@pytest.mark.skipif(importlib.util.find_spec("torchvision") is not None, reason="torchvision is installed")
@pytest.mark.parametrize("command", ["train", "infer"])
def test_a_processor_that_needs_a_missing_package_is_refused(command, pipeline, tmp_path, capsys):
    folder = shutil.copytree(pipeline("qwenimage21"), tmp_path / "teacher")
    video = '"video_processor": {"video_processor_type": "Qwen3VLVideoProcessor"}, "image_token"'
    for name in ("model_index.json", "processor/processor_config.json"):
        text = (folder / name).read_text().replace('"image_token"', video)
        assert "LlavaProcessor" in text
        (folder / name).write_text(text.replace("LlavaProcessor", "Qwen3VLProcessor"))
    train = f"--pretrained_model_name_or_path {folder} --prompts_file p.txt --output_dir {tmp_path}/out"
    flags = {"train": train, "infer": f"--model {folder} --prompt a --output_dir {tmp_path}/out"}[command]
    script = {"train": SCRIPTS["qwenimage21"], "infer": infer}[command]
    capsys.readouterr()  # of the writing of the pipeline
    refused(script, flags.split(), 2, "(processor): Qwen3VLVideoProcessor requires the Torchvision library", capsys)
    (folder / "processor" / "processor_config.json").write_text("{")
    refused(script, flags.split(), 1, "cannot load the weights", capsys)
