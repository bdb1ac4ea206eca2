"""--dry_run: what it foretells is what a run takes, byte for byte; what it prints, and what it refuses."""

import gc
import json
import os
import re
import shutil
import subprocess
import sys
from contextlib import ExitStack

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

import train_senseflow_flux
import train_senseflow_sd3
import train_senseflow_sdxl
from helpers import ROOT, models_class, refused
from senseflow.memory import report
from senseflow.memory.counter import GRADIENTS, STATES, WEIGHTS, Counter
from senseflow.memory.report import GIB, candidates, under_zero, verdict, without
from senseflow.memory.trace import patch_loaders, trace
from tiny_pipelines import write_sd3, write_sdxl


SCRIPTS = {"flux": train_senseflow_flux, "sd3": train_senseflow_sd3, "sdxl": train_senseflow_sdxl}


@pytest.fixture
def flags(teacher, vision, data, tmp_path):
    """flags(kind, *more): a script's, for two images of 64 px at a time."""

    def make(kind, *more):
        path = teacher
        if kind != "flux":
            path = tmp_path / kind
            {"sd3": write_sd3, "sdxl": write_sdxl}[kind](path)
        command = ["--pretrained_model_name_or_path", str(path), "--dataset_json", str(data), "--resolution", "64"]
        command += ["--output_dir", str(tmp_path / "out"), "--train_batch_size", "2", "--report_to", "none", *more]
        if "--gan_weight" not in more and "dmd2" not in more:
            command += [
                "--discriminator_backbone",
                str(vision / "dinov2"),
                "--discriminator_text_encoder",
                str(vision / "clip"),
            ]
        return command + (["--max_sequence_length", "16"] if kind != "sdxl" else [])

    return make


def traced(script, arguments, fake=True, device="cpu") -> dict:
    """What a trace finds, of tensors without values or of real ones."""
    args = script.parse_args(arguments)
    source, _ = script.prepare(args)
    around = (patch_loaders(args), FakeTensorMode(allow_non_fake_inputs=True)) if fake else ()
    counter = Counter()
    with ExitStack() as stack:
        for context in (*around, counter):
            stack.enter_context(context)
        own = (models_class(script), script.make_models, script.train_iteration)
        return trace(args, source, *own, counter, tqdm(disable=True, total=100), device)


def allocated(events) -> int:
    """The most bytes that torch's own allocator had given out, by its profiler."""
    live = peak = 0
    for event in sorted((event for event in events if event.name() == "[memory]"), key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def test_the_counter_counts_what_torchs_allocator_gives_out():
    """Two steps of a small network: the peak by torch's own account of its memory, and FLOPs by hand."""
    counter = Counter()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler, counter:
        network = torch.nn.Sequential(torch.nn.Linear(64, 512), torch.nn.GELU(), torch.nn.Linear(512, 64))
        images, optimizer = torch.randn(96, 64), torch.optim.AdamW(network.parameters(), fused=True)
        for _ in range(2):
            network(images).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    held = sum(4 * parameter.numel() for parameter in network.parameters())
    assert counter.peak == pytest.approx(allocated(profiler.profiler.kineto_results.events()), rel=0.001)
    assert counter.peak > 4 * held  # with gradients and two moments
    assert sum(counter.flops.values()) == 2 * 2 * 96 * 64 * 512 * (
        2 + 3
    )  # forward two products, backward three: no input learns


@pytest.mark.parametrize(
    "kind, more",
    [
        ("flux", ["--gradient_checkpointing"]),
        ("sd3", ["--rank", "8", "--gan_weight", "0", "--gradient_accumulation_steps", "3"]),
        ("sdxl", ["--method", "dmd2", "--gan_weight", "0.005", "--ttur_ratio", "1"]),
    ],
)
def test_what_is_foretold_is_what_a_run_takes(kind, more, flags):
    script, arguments = SCRIPTS[kind], flags(kind, *more)
    foretold = traced(script, arguments)
    gc.collect()  # what was there before shall not go while the allocator is watched
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        true = traced(script, arguments, fake=False)
    assert true["peak"] == pytest.approx(allocated(profiler.profiler.kineto_results.events()), rel=0.03)
    for key in {*foretold["at_peak"], *true["at_peak"]}:
        assert foretold["at_peak"].get(key, 0) == true["at_peak"].get(key, 0), key
    assert (
        foretold["peak"] == true["peak"] and foretold["where"] == true["where"] and foretold["flops"] == true["flops"]
    )
    own = 4 * foretold["numbers"]["student"]
    if "--rank" not in more:
        assert own <= foretold["at_peak"]["student", WEIGHTS] <= 1.01 * own
        assert 2 * own <= foretold["states"]["student"] <= 2.01 * own


@pytest.mark.skipif(torch.version.cuda is None, reason="wants torch's build for GPUs; a GPU it does not want")
@pytest.mark.parametrize("kind, precision", [("flux", "no"), ("flux", "bf16"), ("sd3", "no"), ("sdxl", "no")])
def test_no_devices_are_mixed(kind, precision, flags, bfloat16, monkeypatch):
    """On fake CUDA tensors; no backward, for which torch wants a GPU, and no bf16 where autocast passes fake convolutions by."""

    def backward(loss):
        assert loss.device.type == "cuda" and loss.dtype == torch.float32

    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setattr(torch.Tensor, "backward", backward)
    monkeypatch.setattr("torch.cuda.amp.common.amp_definitely_not_available", lambda: False)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda: True)
    found = traced(
        SCRIPTS[kind], flags(kind, "--mixed_precision", precision, "--gradient_checkpointing"), device="cuda"
    )
    assert found["peak"] > 4 * found["numbers"]["student"]


FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_RESHARD_AFTER_FORWARD": "true"}


def foretold_in(environment: dict, arguments: list[str]) -> list[str]:
    """What a process of many prints: mode, number of processes, numbers and at_peak in place of the tables."""
    code = "import train_senseflow_flux as script, senseflow.memory.report as dry_run, sys, json\n"
    code += "def tell(found, mode, processes):\n"
    code += "    held = [[*key, size] for key, size in found['at_peak'].items()]\n"
    code += "    print(json.dumps([mode, processes, found['numbers'], held]))\n"
    command = [sys.executable, "-c", code + "dry_run.tell = tell\nscript.main(sys.argv[1:])", *arguments]
    return subprocess.run(
        command, env={**os.environ, **environment}, cwd=ROOT, stdout=subprocess.PIPE, text=True
    ).stdout.splitlines()


@pytest.mark.parametrize("mode, environment, processes", [("fsdp2", FSDP2, 8), ("ddp", {}, 2)])
def test_a_process_of_many_without_the_others(mode, environment, processes, flags):
    """Under FSDP2 it holds its part of weights, gradients and optimizer; under DDP the gradients of all networks, always."""
    arguments = flags("flux", "--gan_weight", "0", "--dry_run")
    found = foretold_in({**environment, "WORLD_SIZE": str(processes)}, arguments)
    name, count, numbers, held = json.loads(found[0])
    held = {(owner, kind): size for owner, kind, size in held}
    assert (name, count) == (mode, processes)
    models = processes if mode == "fsdp2" else 1
    for role in ("student", "fake_score"):
        whole = 4 * numbers[role]
        assert whole / models <= held[role, WEIGHTS] <= 1.1 * whole / models
        assert 2 * whole / models <= held[role, STATES] <= 2.2 * whole / models
        if mode == "ddp":
            assert held[role, GRADIENTS] == whole
        else:  # what was gathered before is free
            assert held.get((role, "activations"), 0) < whole
    assert foretold_in({**environment, "WORLD_SIZE": str(processes), "RANK": "1"}, arguments) == []


def test_configurations_are_enough_and_what_is_printed_says_whether_it_fits(flags, teacher, tmp_path, capsys):
    bare = tmp_path / "bare"
    shutil.copytree(teacher, bare)
    for file in bare.rglob("*.safetensors"):
        file.unlink()
    arguments = flags(
        "flux", "--gan_weight", "0", "--ida_decay", "0.9", "--dry_run", "--pretrained_model_name_or_path", str(bare)
    )
    train_senseflow_flux.main(arguments)
    said = capsys.readouterr().out
    peak = float(re.search(r"^peak ([\d.]+) GiB, in: ", said, re.MULTILINE)[1])
    assert 0 < peak < 0.1 and said.strip().splitlines()[-1].startswith("fits in 24, 40, 48, 80, 141 GB")
    assert re.search(r"^student +[\d.]+ +[\d.]+ +[\d.]+", said, re.MULTILINE)
    assert "student's turn: " in said and "on disk: a checkpoint " in said
    assert not (tmp_path / "out").exists()
    (bare / "transformer" / "config.json").unlink()
    refused(train_senseflow_flux, arguments, 2, f"{bare} (transformer): no readable FluxTransformer2DModel", capsys)
    needle = "--dry_run: reads no checkpoint; leave out --resume_from_checkpoint latest"
    refused(
        train_senseflow_flux, [*flags("flux", "--dry_run"), "--resume_from_checkpoint", "latest"], 2, needle, capsys
    )


def test_what_does_not_fit_is_tried_with_more_until_it_does(flags, capsys, monkeypatch):
    peaks = {"--gradient_checkpointing": 60, "--offload_text_encoders": 60, "--use_8bit_adam": 30}
    tried = []

    def traced_with(command, processes):
        tried.append(command)
        if "--train_batch_size" in command[-4:]:
            return None
        return min([90, *(peak for flag, peak in peaks.items() if flag in command)]) * GIB

    monkeypatch.setattr(report, "traced_with", traced_with)
    monkeypatch.setattr(sys, "argv", ["script.py", *flags("flux", "--dry_run", "40")])
    args = train_senseflow_flux.parse_args(sys.argv[1:])
    command = without(sys.argv[1:], ["dry_run"])
    report.suggest(args, command, "single", 1, 90 * GIB, 40)
    *lines, last = capsys.readouterr().out.splitlines()
    assert lines == [
        "with --gradient_checkpointing: 60.00 GiB",
        "with --gradient_checkpointing --offload_text_encoders: 60.00 GiB; no help, left out",
        "with --gradient_checkpointing --train_batch_size 1 --gradient_accumulation_steps 2: refused, left out",
        "with --gradient_checkpointing --use_8bit_adam: 30.00 GiB",
    ]
    assert last == "fits in 40 GB with --gradient_checkpointing --use_8bit_adam"
    assert tried[0] == [*command, "--gradient_checkpointing"] and not any("--dry_run" in command for command in tried)
    assert verdict(30 * GIB).startswith("fits in 40, 48, 80, 141 GB; does not fit in 24 by 7.7 GiB")
    # Flags of what is left out are left out, too; what a mode cannot do is not offered.
    (flags_of_last, useless) = candidates(args, "fsdp2")[-1]
    assert flags_of_last == ["--gan_weight", "0"] and "--discriminator_backbone" not in without(command, useless)
    offered = {flags[0] for flags, _ in candidates(args, "zero3")}
    assert "--rank" not in offered and report.MORE in offered and "--use_8bit_adam" in offered


def test_under_zero_by_arithmetic():
    held = {
        ("student", WEIGHTS): 400,
        ("student", GRADIENTS): 400,
        ("student", STATES): 800,
        ("teacher", WEIGHTS): 200,
    }
    found = {"at_peak": held, "numbers": {"student": 100, "teacher": 100}, "states": {"student": 800}}
    two, three = (under_zero(found, mode, 4, half=True)["at_peak"] for mode in ("zero2", "zero3"))
    # bf16 weights whole or a quarter, a quarter of bf16 gradients, of fp32 masters and moments.
    assert [two["student", kind] for kind in (WEIGHTS, GRADIENTS, STATES)] == [200, 50, 300] and two[
        "teacher", WEIGHTS
    ] == 200
    assert [three["student", kind] for kind in (WEIGHTS, GRADIENTS, STATES)] == [50, 50, 300] and three[
        "teacher", WEIGHTS
    ] == 50
    assert under_zero(found, "zero2", 4, half=True)["peak"] == 750
