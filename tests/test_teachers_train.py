"""Every file of teachers/ trains, resumes, exports and generates, with adapters, in two processes.

What trains here is traced with --dry_run, too (conftest.py).
"""

import os
import shutil
import subprocess
import sys

import pytest
from test_teachers import FURTHER_FLAGS, SCRIPTS, pipeline  # noqa: F401

from helpers import (
    ROOT,
    assert_same,
    image_of,
    launch,
    logged,
    models_class,
    resume_is_the_same_run,
    run_card,
    states,
    the_cards_call_is_infers_image,
    without,
    without_gan,
)


@pytest.fixture
def flags(pipeline, data, vision):  # noqa: F811
    """Return flags(name) -> arguments with every loss on, the student in every second iteration."""

    def make(name):
        flags = f"--pretrained_model_name_or_path {pipeline(name)} --dataset_json {data} --resolution 64 "
        flags += f"--discriminator_backbone {vision}/dinov2 --discriminator_text_encoder {vision}/clip "
        flags += "--max_sequence_length 160 --train_batch_size 2 --gradient_accumulation_steps 2 --ttur_ratio 2 "
        flags += "--learning_rate 1e-3 --lr_warmup_steps 0 --max_train_steps 4 --checkpointing_steps 2 "
        flags += f"--export_dtype fp32 --teacher_num_inference_steps 2 {FURTHER_FLAGS.get(name, '')}"
        return flags.split()

    return make


@pytest.mark.parametrize("name", SCRIPTS)
def test_it_trains_resumes_to_the_bit_and_exports_what_its_card_generates(name, flags, tmp_path):
    validation = ("--validation_prompts", "a red square", "--validation_steps", "4")
    whole = resume_is_the_same_run(SCRIPTS[name], flags(name), tmp_path, *validation)
    the_cards_call_is_infers_image(whole, "sigmas", tmp_path, fresh=False)
    tags = logged(whole).Tags()
    losses = {"dmd_loss", "isg_loss", "adversarial_loss", "discriminator_loss", "fake_loss"}
    assert losses <= set(tags["scalars"]) and {"validation/images", "validation/panel"} <= set(tags["images"])


@pytest.mark.parametrize("name", SCRIPTS)
def test_adapters_in_bf16_resume_to_the_bit_and_are_generated_with(name, flags, bfloat16, tmp_path):
    cls, script = models_class(SCRIPTS[name]), SCRIPTS[name]
    if not (hasattr(cls.network_class, "add_adapter") and hasattr(cls.pipeline_class, "save_lora_weights")):
        pytest.skip("its pipeline takes no adapters")
    out, again = tmp_path / "out", tmp_path / "again"
    arguments = [*flags(name), *bfloat16, "--rank", "4", "--offload_text_encoders"]
    script.main([*arguments, "--output_dir", str(out)])
    assert image_of(out, tmp_path / "images").std() > 0
    run_card(out)
    shutil.copytree(out / "checkpoint-2", again / "checkpoint-2")
    script.main([*arguments, "--output_dir", str(again), "--resume_from_checkpoint", "latest"])
    assert_same(states(out / "checkpoint-4"), states(again / "checkpoint-4"))


@pytest.mark.parametrize("name", SCRIPTS)
def test_two_processes_train_as_one(name, flags, tmp_path):
    """Launched by its path: the file finds the scripts, and DDP a gradient for each trained weight."""
    arguments = without_gan(without(flags(name), "--train_batch_size", "--checkpointing_steps"))
    arguments += ["--adam_epsilon", "1e-3", "--max_grad_norm", "0.05", "--max_train_steps", "2"]
    one, two = tmp_path / "one", tmp_path / "two"
    SCRIPTS[name].main([*arguments, "--train_batch_size", "4", "--output_dir", str(one)])
    launch(f"teachers/train_senseflow_{name}.py", [*arguments, "--train_batch_size", "2", "--output_dir", str(two)], 2)
    assert_same(states(one / "checkpoint-2"), states(two / "checkpoint-2"), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_answers_before_heavy_imports_from_any_folder(name, tmp_path):
    """Without an installed library: the file finds it beside its folder."""
    script = ROOT / "teachers" / f"train_senseflow_{name}.py"
    code = (
        f"import runpy, sys; sys.argv = [{str(script)!r}, '--help']\n"
        f"try: runpy.run_path({str(script)!r}, run_name='__main__')\n"
        "except SystemExit as stop:\n"
        "    sys.exit(stop.code or ' '.join({'torch', 'diffusers', 'numpy'} & {*sys.modules}) or 0)"
    )
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [sys.executable, "-P", "-c", code]  # -P: without the present folder
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert result.returncode == 0 and "usage:" in result.stdout, result.stderr[-500:]
