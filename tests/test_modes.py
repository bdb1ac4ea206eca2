"""The real scripts under every configuration of accelerate_configs/, two processes each: `make test-modes`.

All runs of a script train on the same global batches: 12 iterations of 2 micro-batches, the student in every fifth, everything
on. Clipping binds. What is compared is what a checkpoint holds of all three networks.
"""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import one_load
import pytest
import torch
import yaml
from safetensors.torch import load_file

from helpers import ROOT, assert_same, launch, start, states, without
from senseflow.models.weights import Weights
from tiny_pipelines import write_sd3, write_sdxl


ROLES = {"flux": "transformer", "sd3": "transformer", "sdxl": "unet"}  # where the student lies
LAST = 12


@pytest.fixture(scope="session")
def flags(teacher, vision, data, tmp_path_factory):
    """flags(script) -> its arguments, but for the batch size and the output folder."""
    teachers = {"flux": teacher}
    for name, write in (("sd3", write_sd3), ("sdxl", write_sdxl)):
        teachers[name] = tmp_path_factory.mktemp(name)
        write(teachers[name])

    def make(script):
        return [
            *(
                "--pretrained_model_name_or_path",
                str(teachers[script]),
                "--dataset_json",
                str(data),
                "--resolution",
                "64",
            ),
            *(
                "--discriminator_backbone",
                str(vision / "dinov2"),
                "--discriminator_text_encoder",
                str(vision / "clip"),
            ),
            *("--gradient_accumulation_steps", "2", "--ttur_ratio", "5", "--max_train_steps", str(LAST)),
            *("--checkpointing_steps", "3", "--ida_decay", "0.97", "--export_dtype", "fp32", "--random_flip"),
            # The heads' LeakyReLUs have kinks, and Adam divides by gradients that are all rounding: neither shall decide.
            *(
                "--learning_rate",
                "1e-3",
                "--learning_rate_disc",
                "1e-4",
                "--adam_epsilon",
                "1e-3",
                "--max_grad_norm",
                "0.05",
            ),
            *("--report_to", "none"),
            *(["--max_sequence_length", "16"] if script != "sdxl" else []),
        ]

    return make


@pytest.fixture(scope="session")
def everything_parted(tmp_path_factory):
    """zero3.yaml as it would be for large networks: DeepSpeed keeps weights of less than 100,000 numbers whole if not told so."""
    folder = tmp_path_factory.mktemp("configuration")
    zero = {
        "stage": 3,
        "stage3_param_persistence_threshold": 0,
        "stage3_max_live_parameters": 0,
        "stage3_prefetch_bucket_size": 0,
    }
    (folder / "deepspeed.json").write_text(
        json.dumps({"zero_optimization": zero, "gradient_accumulation_steps": "auto"})
    )
    config = yaml.safe_load((ROOT / "accelerate_configs" / "zero3.yaml").read_text())
    del config["mixed_precision"]  # accelerate refuses what DeepSpeed's file may say
    config["deepspeed_config"] = {"deepspeed_config_file": str(folder / "deepspeed.json"), "zero3_init_flag": False}
    (folder / "zero3.yaml").write_text(yaml.safe_dump(config))
    return str(folder / "zero3")


@pytest.fixture(scope="session")
def trained(flags, tmp_path_factory):
    """trained(script, mode, precision, processes) -> the output folder of its run; each is run once."""
    done: dict[tuple, Path] = {}

    def run(script, mode, precision="no", processes=2, *more):
        if (script, mode, precision) not in done:
            out = done[script, mode, precision] = tmp_path_factory.mktemp(f"{script}-{mode}-{precision}")
            extra = ["--gradient_checkpointing", "--validation_prompts", "a", "b", "c", "--validation_steps", "5"]
            arguments = [*flags(script), "--train_batch_size", str(16 // processes), "--output_dir", str(out)]
            launch(
                f"train_senseflow_{script}.py",
                arguments + extra * (precision == "bf16"),
                processes,
                precision,
                mode,
                *more,
            )
        return done[script, mode, precision]

    return run


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the three networks."""
    files = sorted(checkpoint.rglob("*.safetensors"))
    return {f"{file.parent.name}/{name}": tensor for file in files for name, tensor in load_file(file).items()}


def assert_near(a: dict, b: dict, tolerance: float = 1e-5) -> None:
    assert a.keys() == b.keys() and len(a) > 50
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=tolerance, msg=name)


def moved(a: dict, b: dict, role: str) -> torch.Tensor:
    """How far a network's weights are from each other, as one vector."""
    names = [name for name in a if name.startswith(f"{role}/") and not name.endswith(("._u", "._v"))]
    return torch.cat([(b[name] - a[name]).flatten() for name in names])


MODES = [("flux", mode) for mode in ("ddp", "fsdp2", "zero2", "zero3")]
MODES += [("sd3", "ddp"), ("sd3", "fsdp2"), ("sdxl", "ddp"), ("sdxl", "fsdp2"), ("sdxl", "zero3")]


@pytest.mark.parametrize("script, mode", MODES)
def test_two_processes_train_as_one(script, mode, trained):
    """<= 1e-5 after 12 iterations, in which every network moves by more than ten times that; the same pipeline comes out."""
    one = trained(script, "single", "no", 1)
    # In one case, gathered weights stay behind each forward, those gathered while frozen, too.
    more = ["--fsdp_reshard_after_forward", "false"] if (script, mode) == ("sd3", "fsdp2") else []
    two = trained(script, mode, "no", 2, *more)
    for iteration in (3, LAST):
        assert_near(weights(one / f"checkpoint-{iteration}"), weights(two / f"checkpoint-{iteration}"))
    for role in (ROLES[script], "fake_score", "discriminator"):
        distance = moved(*(weights(two / f"checkpoint-{iteration}") for iteration in (3, LAST)), role)
        assert distance.abs().max() > 1e-4, role
    exported = [
        sorted(str(path.relative_to(out)) for path in out.rglob("*") if "checkpoint" not in str(path))
        for out in (one, two)
    ]
    assert exported[0] == exported[1] and "model_index.json" in exported[0]
    assert_near(*(load_file(out / ROLES[script] / "diffusion_pytorch_model.safetensors") for out in (one, two)))
    # The student's first step is the fifth iteration's: nothing may be made up for it before.
    for file in (two / "checkpoint-3").glob("student_optimizer-*"):
        stored = torch.load(file, weights_only=True)["state"]
        assert stored.keys() <= {"0"} if mode.startswith("zero") else not stored
        assert all(set(state) == {"master"} for state in stored.values())


@pytest.mark.parametrize("mode", ["ddp", "fsdp2", "zero2", "zero3"])
def test_one_step_reaches_the_next_forward_unless_its_gradient_is_not_finite(mode, tmp_path):
    """IDA and skipped steps; student and fake score are too near each other in the runs above for IDA to be seen there."""
    more = ["--fsdp_reshard_after_forward", "false"] if mode == "fsdp2" else []
    launch("tests/one_step.py", [str(tmp_path)], 2, "no", mode, *more)


def test_zero3_trains_as_one_where_every_weight_is_parted(everything_parted, trained, flags, tmp_path):
    """And draws three images in two processes meanwhile: a process without a prompt of its own must gather with the other."""
    arguments = [*flags("flux"), "--train_batch_size", "8", "--output_dir", str(tmp_path)]
    arguments += ["--validation_prompts", "a", "b", "c", "--validation_steps", "6"]
    launch("train_senseflow_flux.py", arguments, 2, "no", everything_parted)
    one = trained("flux", "single", "no", 1)
    assert_near(weights(one / f"checkpoint-{LAST}"), weights(tmp_path / f"checkpoint-{LAST}"))


@pytest.mark.parametrize("mode", ["ddp", "fsdp2", "zero2", "zero3"])
@pytest.mark.parametrize("at", [3, 6])
def test_a_resumed_run_is_the_same_run(mode, at, trained, flags, tmp_path):
    """To the bit; at 3 the student has not stepped yet, at 6 it has."""
    whole = trained("flux", mode)
    shutil.copytree(whole / f"checkpoint-{at}", tmp_path / f"checkpoint-{at}")
    arguments = [
        *flags("flux"),
        "--train_batch_size",
        "8",
        "--output_dir",
        str(tmp_path),
        "--resume_from_checkpoint",
        "latest",
    ]
    launch("train_senseflow_flux.py", arguments, 2, "no", mode)
    assert_same(states(whole / f"checkpoint-{LAST}"), states(tmp_path / f"checkpoint-{LAST}"))


@pytest.mark.parametrize(
    "made, mode, processes", [("fsdp2", "fsdp2", 1), ("fsdp2", "ddp", 2), ("fsdp2", "single", 1), ("ddp", "fsdp2", 2)]
)
def test_a_run_goes_on_in_other_numbers_and_with_or_without_fsdp2(made, mode, processes, trained, flags, tmp_path):
    whole = trained("flux", made)
    shutil.copytree(whole / "checkpoint-6", tmp_path / "checkpoint-6")
    batch = ["--train_batch_size", str(16 // processes)]
    arguments = [*flags("flux"), *batch, "--output_dir", str(tmp_path), "--resume_from_checkpoint", "latest"]
    launch("train_senseflow_flux.py", arguments, processes, "no", mode)
    assert_near(weights(whole / f"checkpoint-{LAST}"), weights(tmp_path / f"checkpoint-{LAST}"))


@pytest.mark.parametrize("mode", ["ddp", "fsdp2", "zero2", "zero3"])
def test_bf16_learns_what_fp32_learns(mode, trained):
    """With gradient checkpointing and three validation prompts for two processes: from iteration 6 to 12 every network goes the
    same way as in float32."""
    exact = [weights(trained("flux", "single", "no", 1) / f"checkpoint-{iteration}") for iteration in (6, LAST)]
    rough = [weights(trained("flux", mode, "bf16") / f"checkpoint-{iteration}") for iteration in (6, LAST)]
    assert {tensor.dtype for tensor in rough[1].values()} == {torch.float32}, "the masters"
    # The student learns from the difference of two scores that start as one: rounding is felt most there, in every mode alike.
    for role, cosine in (("transformer", 0.9), ("fake_score", 0.99), ("discriminator", 0.99)):
        a, b = moved(*exact, role), moved(*rough, role)
        assert torch.dot(a, b) / (a.norm() * b.norm()) > cosine, role
        assert 0.97 < b.norm() / a.norm() < 1.03, role


def test_two_nodes_train_as_one(trained, flags, tmp_path):
    """Two launches, a process each, as on two machines: rows and slots follow the rank over both."""
    arguments = [*flags("flux"), "--train_batch_size", "8", "--output_dir", str(tmp_path)]
    nodes = [
        start(
            "train_senseflow_flux.py",
            arguments,
            2,
            "no",
            "fsdp2_2nodes",
            "--machine_rank",
            rank,
            "--main_process_port",
            "29533",
        )
        for rank in "01"
    ]
    for node in nodes:
        _, said = node.communicate()
        assert node.returncode == 0, said[-3000:]
    assert_near(weights(trained("flux", "fsdp2") / f"checkpoint-{LAST}"), weights(tmp_path / f"checkpoint-{LAST}"))


@pytest.mark.parametrize("mode", ["ddp", "fsdp2"])
def test_dmd2_trains_as_one(mode, flags, tmp_path):
    """The classifier is a part of the fake score: one network runs three times before its backward."""
    dropped = ("--discriminator_backbone", "--discriminator_text_encoder", "--ida_decay", "--learning_rate_disc")
    common = flags("sdxl")
    for flag in dropped:
        place = common.index(flag)
        del common[place : place + 2]
    common += ["--method", "dmd2", "--classifier_weight", "1"]
    for name, processes, how in (("one", 1, "single"), ("two", 2, mode)):
        batch = ["--train_batch_size", str(16 // processes), "--output_dir", str(tmp_path / name)]
        launch("train_senseflow_sdxl.py", [*common, *batch], processes, "no", how)
    assert_near(*(weights(tmp_path / name / f"checkpoint-{LAST}") for name in ("one", "two")))


@pytest.fixture(scope="session")
def adapted(flags, tmp_path_factory):
    """adapted(script, mode, processes) -> the output folder of its run with --rank; SDXL's is DMD2."""
    done: dict[tuple, Path] = {}

    def run(script, mode, processes):
        if (script, mode) not in done:
            out = done[script, mode] = tmp_path_factory.mktemp(f"adapted-{script}-{mode}")
            launch(
                f"train_senseflow_{script}.py",
                [*of_adapters(script, processes), "--output_dir", str(out)],
                processes,
                "no",
                mode,
            )
        return done[script, mode]

    def of_adapters(script, processes):
        common = [*without(flags(script), "--learning_rate"), "--rank", "4", "--learning_rate", "1e-2"]
        if script == "sdxl":
            dropped = (
                "--discriminator_backbone",
                "--discriminator_text_encoder",
                "--ida_decay",
                "--learning_rate_disc",
            )
            common = [*without(common, *dropped), "--method", "dmd2", "--classifier_weight", "1"]
        return [*common, "--train_batch_size", str(16 // processes)]

    run.flags = of_adapters
    return run


@pytest.mark.parametrize("script, mode", [("flux", "ddp"), ("flux", "fsdp2"), ("sdxl", "fsdp2")])
def test_adapters_train_in_two_processes_as_in_one(script, mode, adapted):
    one, two = adapted(script, "single", 1), adapted(script, mode, 2)
    for iteration in (3, LAST):
        assert_near(weights(one / f"checkpoint-{iteration}"), weights(two / f"checkpoint-{iteration}"))
    for role in (ROLES[script], "fake_score"):
        distance = moved(*(weights(two / f"checkpoint-{iteration}") for iteration in (3, LAST)), role)
        assert distance.abs().max() > 1e-4, role
    a, b = (load_file(out / "pytorch_lora_weights.safetensors") for out in (one, two))
    torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


@pytest.mark.parametrize("mode, processes", [("ddp", 2), ("fsdp2", 2), ("single", 1)])
def test_adapters_go_on_where_they_were(mode, processes, adapted, tmp_path):
    """To the bit as they were launched; from FSDP2's shards in one process, too."""
    whole = adapted("flux", "fsdp2" if mode == "single" else mode, 2)
    shutil.copytree(whole / "checkpoint-6", tmp_path / "checkpoint-6")
    arguments = [
        *adapted.flags("flux", processes),
        "--output_dir",
        str(tmp_path),
        "--resume_from_checkpoint",
        "latest",
    ]
    launch("train_senseflow_flux.py", arguments, processes, "no", mode)
    if mode == "single":
        assert_near(weights(whole / f"checkpoint-{LAST}"), weights(tmp_path / f"checkpoint-{LAST}"))
    else:
        assert_same(states(whole / f"checkpoint-{LAST}"), states(tmp_path / f"checkpoint-{LAST}"))


def test_under_fsdp2_a_process_holds_its_part_of_one_base(teacher, tmp_path):
    (tmp_path / "prompts.txt").write_text("a red square\na blue circle\n")
    arguments = ["--pretrained_model_name_or_path", str(teacher), "--prompts_file", str(tmp_path / "prompts.txt")]
    arguments += [
        "--gan_weight",
        "0",
        "--backward_simulation_prob",
        "1",
        "--resolution",
        "64",
        "--max_sequence_length",
        "16",
    ]
    arguments += [
        "--train_batch_size",
        "2",
        "--ttur_ratio",
        "1",
        "--rank",
        "4",
        "--learning_rate",
        "1e-2",
        "--report_to",
        "none",
    ]
    launch("tests/one_base.py", [*arguments, "--output_dir", str(tmp_path)], 2, "no", "fsdp2")


@pytest.fixture(scope="session")
def large(tmp_path_factory):
    """(a folder with the transformer of one_load.py, its size, the largest tensor's), in MB."""
    folder = tmp_path_factory.mktemp("large")
    one_load.write(folder)
    weights = Weights(sorted((folder / "transformer").glob("*.safetensors")))
    sizes = [4 * math.prod(weights.shape(name)) / 2**20 for name in weights.names()]
    assert 1000 < sum(sizes) < 1500
    return folder, sum(sizes), max(sizes)


@pytest.mark.parametrize("mode", ["fsdp2", "zero3"])
def test_a_process_holds_its_part_of_a_network_and_one_tensor(mode, large, tmp_path):
    """While it loads, saves and resumes: far less than half of a network more. DeepSpeed leaves gaps between what it shares out,
    holds a trained part several times over (weights, masters, gradients), and reads its masters from a file as large."""
    folder, size, tensor = large
    launch("tests/one_load.py", [str(folder), str(tmp_path)], 2, "no", mode)
    part = size / 2
    for rank in range(2):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        peak = {name: values["peak"] for name, values in found.items()}
        assert peak["frozen"] < (part if mode == "fsdp2" else 1.4 * part) + 2 * tensor, found
        assert peak["trained"] < (part if mode == "fsdp2" else found["trained"]["held"]) + 3 * tensor, found
        assert peak["saved"] < part / 2, found
        assert peak["resumed"] < (part if mode == "zero3" else 0) + 2 * tensor, found


def test_under_fsdp2_a_process_gathers_one_tower_of_the_discriminator(tmp_path):
    launch("tests/one_tower.py", [str(tmp_path)], 2, "no", "fsdp2")


def traceback_in(said: str) -> bool:
    """Whether a process of several has ended with one; torch's warnings, which a build for GPUs has here, begin with [rank0]:W."""
    return re.search(r"\[rank\d+\]: ", said) is not None


@pytest.mark.parametrize("mode", ["ddp", "fsdp2", "zero3"])
@pytest.mark.parametrize(
    "fault, message", [("error", "the disk went away; mount it again"), ("nan", "fake_loss not finite 3 times")]
)
def test_what_ends_one_process_ends_all_and_is_said_last(mode, fault, message, flags, tmp_path):
    arguments = [fault, *flags("flux"), "--train_batch_size", "1", "--output_dir", str(tmp_path)]
    process = start("tests/one_rank.py", arguments, 2, "no", mode)
    try:
        _, said = process.communicate(timeout=90)  # a start takes up to 20 s here
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 1
    (cause,) = re.findall(r"Root Cause.*?traceback : (.*?)\n=", said, re.DOTALL)
    assert message in cause and said.rstrip().endswith("==="), said[-3000:]
    assert not traceback_in(said), "no process ends with a traceback"


@pytest.mark.parametrize(
    "mode, sent", [("ddp", "SIGTERM"), ("fsdp2", "SIGINT"), ("zero2", "SIGTERM"), ("zero3", "SIGINT")]
)
def test_a_signal_saves_and_says_so(mode, sent, flags, tmp_path):
    """To the launcher, as a cluster or a terminal sends it; all processes stop after the same iteration."""
    arguments = [
        *flags("flux"),
        "--train_batch_size",
        "1",
        "--max_train_steps",
        "100000",
        "--output_dir",
        str(tmp_path),
    ]
    arguments += ["--dataloader_num_workers", "1"]  # whose processes the launcher signals, too
    process = start("train_senseflow_flux.py", arguments, 2, "no", mode)
    while not (tmp_path / "checkpoint-3").exists():
        assert process.poll() is None, process.communicate()[1][-3000:]
        time.sleep(0.1)
    process.send_signal(getattr(signal, sent))
    _, said = process.communicate()
    who = {"SIGTERM": "SIGTERM", "SIGINT": "Ctrl-C"}[sent]
    (number,) = re.findall(rf"stopped by {who}; checkpoint-(\d+) in .* is complete", said)
    assert json.loads((tmp_path / f"checkpoint-{number}" / "state.json").read_text())["iteration"] == int(number)
    assert not (tmp_path / "model_index.json").exists()
    assert not traceback_in(said) and "Worker" not in said, said[-3000:]


def test_what_must_be_mended_in_one_process_data_saves_in_all(flags, tmp_path):
    arguments = ["unreadable", *flags("flux"), "--train_batch_size", "1", "--output_dir", str(tmp_path)]
    process = start("tests/one_rank.py", arguments, 2, "no", "ddp")
    _, said = process.communicate()
    assert process.returncode == 1
    (number,) = re.findall(r"error: --dataset_json data.json: lost.png; mend it, checkpoint-(\d+) is complete\n", said)
    assert (
        2 <= int(number) <= 3
        and (tmp_path / f"checkpoint-{number}" / "state.json").exists()
        and not traceback_in(said)
    )


def test_kills_at_any_moment_lose_nothing():
    """Three of benchmarks/kill.py's; RESULTS.md has twenty."""
    subprocess.run([sys.executable, str(ROOT / "benchmarks" / "kill.py"), "--kills", "3"], check=True)
