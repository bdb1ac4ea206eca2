"""What can be said of launches, checkpoints and their ends without launching anything; the modes themselves: test_modes.py."""

import ast
import json
import os
import resource
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import senseflow_checkpoints
import senseflow_prompts as prompt_tools
import senseflow_runtime
import train_senseflow_flux as script
from scripts import ROOT, assert_same, refused, states
from senseflow_args import UserError
from senseflow_roles import Launch, _joined


FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
ZERO = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}


@pytest.fixture
def flags(teacher, vision, data):
    return [
        *("--pretrained_model_name_or_path", str(teacher), "--dataset_json", str(data), "--resolution", "64"),
        *("--discriminator_backbone", str(vision / "dinov2"), "--discriminator_text_encoder", str(vision / "clip")),
        *("--ttur_ratio", "2", "--max_train_steps", "4", "--checkpointing_steps", "2", "--max_sequence_length", "16"),
        *("--learning_rate", "1e-3", "--report_to", "none", "--export_dtype", "fp32"),
    ]


@pytest.mark.parametrize(
    "environment, mode, processes",
    [({}, "replicated", 1), ({"WORLD_SIZE": "4"}, "replicated", 4), ({**FSDP2, "WORLD_SIZE": "2"}, "fsdp2", 2), (ZERO, "zero3", 1)],
)
def test_a_launch_is_read_from_what_accelerate_leaves(environment, mode, processes, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    launch = Launch()
    assert (launch.mode, launch.world_size) == (mode, processes) and (launch.plugin is None) == (mode == "replicated")


@pytest.mark.parametrize(
    "environment, needle",
    [
        ({**FSDP2, "FSDP_VERSION": "1"}, "fsdp_version 1"),
        ({**FSDP2, "FSDP_OFFLOAD_PARAMS": "true"}, "fsdp_offload_params"),
        ({**FSDP2, "FSDP_ACTIVATION_CHECKPOINTING": "true"}, "--gradient_checkpointing"),
        ({**ZERO, "ACCELERATE_DEEPSPEED_ZERO_STAGE": "1"}, "zero_stage 1"),
        ({**ZERO, "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu"}, "offload_optimizer_device"),
    ],
)
def test_a_configuration_that_no_role_can_follow_is_refused(environment, needle, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=needle) as error:
        Launch()
    assert error.value.exit_code == 2


def test_a_deepspeed_file_with_an_optimizer_is_refused(tmp_path, monkeypatch):
    config = {"zero_optimization": {"stage": 2}, "train_micro_batch_size_per_gpu": "auto", "optimizer": {"type": "AdamW"}}
    (tmp_path / "ds.json").write_text(json.dumps(config))
    for name, value in {**ZERO, "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(tmp_path / "ds.json")}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="optimizer of the DeepSpeed file"):
        Launch()


def as_if(monkeypatch, mode: str, processes: int) -> None:
    """Makes this process believe in another launch."""
    launch = Launch()
    launch.mode, launch.world_size = mode, processes
    for module in (senseflow_checkpoints, senseflow_runtime):
        monkeypatch.setattr(module, "launched", lambda: launch)


@pytest.mark.parametrize(
    "made, now, fits",
    [
        (("replicated", 1), ("fsdp2", 8), True),
        (("fsdp2", 8), ("fsdp2", 4), True),
        (("fsdp2", 8), ("replicated", 2), True),
        (("zero3", 2), ("zero3", 2), True),
        (("zero3", 2), ("zero3", 4), False),
        (("zero3", 2), ("zero2", 2), False),
        (("zero2", 2), ("fsdp2", 2), False),
        (("replicated", 2), ("zero2", 2), False),
    ],
)
def test_deepspeeds_state_goes_on_as_it_was_launched(made, now, fits, flags, tmp_path, monkeypatch, capsys):
    """Found before any network loads."""
    (tmp_path / "checkpoint-2").mkdir()
    record = {"mode": made[0], "processes": made[1]}
    state = {"iteration": 2, "samples_seen": 2, "args": {}, "fingerprint": {}, "launch": record}
    (tmp_path / "checkpoint-2" / "state.json").write_text(json.dumps(state))
    as_if(monkeypatch, *now)
    if fits:
        senseflow_checkpoints.check_launch(tmp_path / "checkpoint-2")
    else:
        arguments = [*flags, "--output_dir", str(tmp_path), "--resume_from_checkpoint", "latest"]
        refused(script, arguments, 2, f"made under {made[0]} in {made[1]} processes, and this is {now[0]} in {now[1]}", capsys)


def test_8_bit_adam_is_refused_under_fsdp2(flags, tmp_path, monkeypatch):
    as_if(monkeypatch, "fsdp2", 2)
    args = script.parse_args([*flags, "--use_8bit_adam", "--output_dir", str(tmp_path)])
    with pytest.raises(UserError, match="--use_8bit_adam"):
        senseflow_runtime.Runtime(args)


def test_shards_are_joined_along_their_first_dimension():
    whole = torch.arange(10.0).view(5, 2)
    parts = [{"w": {"exp_avg": rows, "step": torch.tensor(3.0)}} for rows in (whole[:3], whole[3:], whole[5:])]
    joined = _joined(parts, "w")
    assert torch.equal(joined["exp_avg"], whole) and joined["step"] == 3


def test_sigterm_ends_the_run_with_a_checkpoint_that_goes_on_as_if_nothing_had_been(flags, tmp_path, monkeypatch):
    script.main([*flags, "--output_dir", str(tmp_path / "whole")])
    iterate = script.train_iteration

    def interrupted(iteration, *args):
        if iteration == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return iterate(iteration, *args)

    monkeypatch.setattr(script, "train_iteration", interrupted)
    halves = ["--output_dir", str(tmp_path / "halves"), "--checkpointing_steps", "100"]
    with pytest.raises(UserError, match="stopped by SIGTERM; checkpoint-3 in .* is complete") as error:
        script.main([*flags, *halves])
    assert error.value.exit_code == 143
    monkeypatch.setattr(script, "train_iteration", iterate)
    script.main([*flags, *halves, "--checkpointing_steps", "2", "--resume_from_checkpoint", "latest"])
    assert_same(states(tmp_path / "whole" / "checkpoint-4"), states(tmp_path / "halves" / "checkpoint-4"))


def test_a_full_disk_is_one_line_and_older_checkpoints_stay(flags, tmp_path):
    """A limit on the size of a file stands for the disk: the second checkpoint cannot be written."""
    script.main([*flags, "--output_dir", str(tmp_path), "--max_train_steps", "2"])
    before = states(tmp_path / "checkpoint-2")
    command = [sys.executable, str(ROOT / "train_senseflow_flux.py"), *flags, "--output_dir", str(tmp_path)]
    limit = {"preexec_fn": lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))}
    ended = subprocess.run([*command, "--resume_from_checkpoint", "latest"], capture_output=True, text=True, **limit)
    assert ended.returncode == 1 and "Traceback" not in ended.stderr, ended.stderr
    assert f"error: --output_dir {tmp_path}: checkpoint-4 could not be written" in ended.stderr.splitlines()[-1]
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-2"]
    assert_same(before, states(tmp_path / "checkpoint-2"))


def test_deepspeed_is_imported_where_it_is_launched_alone():
    for file in ROOT.glob("*.py"):
        for node in ast.parse(file.read_text()).body:
            assert not (isinstance(node, (ast.Import, ast.ImportFrom)) and "deepspeed" in ast.unparse(node)), file


@pytest.mark.parametrize("offload, where", [(True, "cpu"), (False, "meta")])
def test_encoders_on_the_cpu_run_there_and_what_they_say_goes_to_the_device(offload, where):
    """The device is `meta`, which computes nothing."""
    encoder, asked = torch.nn.Linear(1, 1), []
    encoder.device = torch.device(where)

    def encode(prompts, device):
        asked.append(str(device))
        return "untouched", torch.zeros(len(prompts), device=device)

    pipeline = SimpleNamespace(components={"text_encoder": encoder, "text_encoder_2": None}, encode_prompt=encode)
    prompt_tools.place_text_encoders(SimpleNamespace(offload_text_encoders=offload), pipeline, "meta")
    assert encoder.weight.device.type == where and not encoder.weight.requires_grad
    assert pipeline.encode_prompt(["a"], device="meta")[1].device.type == "meta" and asked == [where]


@pytest.mark.parametrize("few, validate", [(True, False), (True, True), (False, True)])
def test_text_encoders_leave_the_device(few, validate, flags, tmp_path, monkeypatch):
    """The same run with and without; a small set's prompts are encoded once, and only validation keeps the encoders then."""
    calls, found = [], []
    place = script.prompt_tools.encode_small_set

    def watched(args, rows, pipeline, encode_prompts, device):
        if args.offload_text_encoders:
            encode = pipeline.encode_prompt
            pipeline.encode_prompt = lambda *a, **k: calls.append(1) or encode(*a, **k)
            found.append(pipeline)
        return place(args, rows, pipeline, encode_prompts, device)

    monkeypatch.setattr(script.prompt_tools, "encode_small_set", watched)
    monkeypatch.setattr(script.prompt_tools, "SMALL_SET", 12 if few else 11)  # the data set has 12 prompts
    flags = [*flags, "--max_train_steps", "2", *(["--validation_prompts", "a red square"] if validate else [])]
    for name, add in (("with", ["--offload_text_encoders"]), ("without", [])):
        script.main([*flags, *add, "--output_dir", str(tmp_path / name)])
    assert_same(states(tmp_path / "with" / "checkpoint-2"), states(tmp_path / "without" / "checkpoint-2"), rtol=1e-5, atol=1e-6)
    (pipeline,) = found
    freed = pipeline.text_encoder is None and pipeline.text_encoder_2 is None
    assert freed == (few and not validate)
    # Two training batches; the teacher's one validation picture is drawn with guidance by the embedder, so with one prompt.
    assert len(calls) == (12 if few else 2) + validate
