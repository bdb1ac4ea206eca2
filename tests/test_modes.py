"""The real scripts under every configuration of accelerate_configs/, in two processes each: `make test-modes`.

All runs of a script train on the same global batches: 12 iterations of 2 micro-batches, a student update in every
fifth, all losses on, and gradient clipping active. Compared are the weights of all three networks in a checkpoint.
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

import pytest
import torch
import yaml
from safetensors.torch import load_file

from helpers import ROOT, assert_same, launch, start, states, without, without_gan
from senseflow.models.weights import stored_weights
from tiny_pipelines import write_sd3, write_sdxl
from workers.load_memory import write_network


STUDENT_FOLDERS = {"flux": "transformer", "sd3": "transformer", "sdxl": "unet"}
LAST = 12
ADVERSARIAL_FLAGS = ("--discriminator_backbone", "--discriminator_text_encoder", "--learning_rate_disc")


@pytest.fixture(scope="session")
def flags(teacher, vision, data, tmp_path_factory):
    """flags(script) -> its arguments without the batch size and the output folder. FLUX trains on two data sets."""
    folder = tmp_path_factory.mktemp("folder")
    for number in (0, 3, 7):
        shutil.copy(data.parent / f"{number}.png", folder)
        (folder / f"{number}.txt").write_text(f"square {number} of the folder")
    mixed = ["--train_data_dir", str(folder), "--dataset_weights", "3", "1"]
    teachers = {"flux": teacher}
    for name, write in (("sd3", write_sd3), ("sdxl", write_sdxl)):
        teachers[name] = tmp_path_factory.mktemp(name)
        write(teachers[name])

    def make(script):
        return [
            *("--pretrained_model_name_or_path", str(teachers[script]), "--dataset_json", str(data)),
            *(mixed if script == "flux" else []),
            *("--discriminator_backbone", f"{vision}/dinov2", "--discriminator_text_encoder", f"{vision}/clip"),
            *f"--gradient_accumulation_steps 2 --ttur_ratio 5 --max_train_steps {LAST} --ida_decay 0.97".split(),
            *"--checkpointing_steps 3 --resolution 64 --random_flip --export_dtype fp32 --report_to none".split(),
            # The heads' LeakyReLUs have kinks, and Adam divides gradients that are all rounding: neither may decide.
            *"--learning_rate 1e-3 --learning_rate_disc 1e-4 --adam_epsilon 1e-3 --max_grad_norm 0.05".split(),
            *(["--max_sequence_length", "16"] if script != "sdxl" else []),
        ]

    return make


@pytest.fixture(scope="session")
def shard_all_weights(tmp_path_factory):
    """zero3.yaml as for large networks: by default DeepSpeed does not shard weights of less than 100,000 values."""
    folder = tmp_path_factory.mktemp("configuration")
    names = ("param_persistence_threshold", "max_live_parameters", "prefetch_bucket_size")
    zero = {"stage": 3, **{f"stage3_{name}": 0 for name in names}}
    (folder / "deepspeed.json").write_text(
        json.dumps({"zero_optimization": zero, "gradient_accumulation_steps": "auto"})
    )
    config = yaml.safe_load((ROOT / "accelerate_configs" / "zero3.yaml").read_text())
    del config["mixed_precision"]  # accelerate refuses it beside a DeepSpeed file
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
            arguments = [*flags(script), "--train_batch_size", str(16 // processes), "--output_dir", str(out)]
            if precision == "bf16":
                arguments += "--gradient_checkpointing --validation_prompts a b c --validation_steps 5".split()
            elif processes > 1:  # some blocks are recomputed, others are not; gradients stay the same
                arguments += ["--gradient_checkpointing_interval", "2"]
            launch(f"train_senseflow_{script}.py", arguments, processes, precision, mode, *more)
        return done[script, mode, precision]

    return run


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Read every tensor of the three networks."""
    files = sorted(checkpoint.rglob("*.safetensors"))
    return {f"{file.parent.name}/{name}": tensor for file in files for name, tensor in load_file(file).items()}


def assert_near(a: dict, b: dict, tolerance: float = 1e-5) -> None:
    assert a.keys() == b.keys() and len(a) > 50
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=tolerance, msg=name)


def assert_checkpoints_near(one: Path, two: Path, *iterations: int) -> None:
    for iteration in iterations:
        assert_near(weights(one / f"checkpoint-{iteration}"), weights(two / f"checkpoint-{iteration}"))


def difference(a: dict, b: dict, role: str) -> torch.Tensor:
    """Subtract a network's weights, as one vector."""
    names = [name for name in a if name.startswith(f"{role}/") and not name.endswith(("._u", "._v"))]
    return torch.cat([(b[name] - a[name]).flatten() for name in names])


def assert_trained(out: Path, *roles: str, last: int = LAST) -> None:
    """Check that each network moves by more than ten times the tolerance of `assert_near`."""
    for role in roles:
        movement = difference(weights(out / "checkpoint-3"), weights(out / f"checkpoint-{last}"), role)
        assert movement.abs().max() > 1e-4, role


MODES = [("flux", mode) for mode in ("ddp", "fsdp2", "zero2", "zero3")]
MODES += [("sd3", "ddp"), ("sd3", "fsdp2"), ("sdxl", "ddp"), ("sdxl", "fsdp2"), ("sdxl", "zero3")]


@pytest.mark.parametrize("script, mode", MODES)
def test_two_processes_train_as_one(script, mode, trained):
    """To 1e-5 after 12 iterations; the same pipeline is exported."""
    student, one = STUDENT_FOLDERS[script], trained(script, "single", "no", 1)
    # In one case a forward leaves weights gathered, those of frozen networks, too.
    more = ["--fsdp_reshard_after_forward", "false"] if (script, mode) == ("sd3", "fsdp2") else []
    two = trained(script, mode, "no", 2, *more)
    assert_checkpoints_near(one, two, 3, LAST)
    assert_trained(two, student, "fake_score", "discriminator")
    exported = [
        {str(path.relative_to(out)) for path in out.rglob("*") if "checkpoint" not in str(path)} for out in (one, two)
    ]
    assert exported[0] == exported[1] and "model_index.json" in exported[0]
    assert_near(*(load_file(out / student / "diffusion_pytorch_model.safetensors") for out in (one, two)))
    # The student first steps in the fifth iteration: before, its optimizer has no state to store.
    for file in (two / "checkpoint-3").glob("student_optimizer-*"):
        stored = torch.load(file, weights_only=True)["state"]
        assert stored.keys() <= {"0"} if mode.startswith("zero") else not stored
        assert all(set(state) == {"master"} for state in stored.values())


@pytest.mark.parametrize("mode", ["ddp", "fsdp2"])
def test_compiled_blocks_train_as_eager_ones(mode, trained, flags, tmp_path):
    """With checkpoints inside and around compiled blocks."""
    arguments = [*flags("flux"), "--train_batch_size", "8", "--gradient_checkpointing", "--output_dir", str(tmp_path)]
    launch("tests/workers/compiled.py", arguments, 2, "no", mode, "--dynamo_backend", "aot_eager")
    assert_checkpoints_near(trained("flux", "single", "no", 1), tmp_path, 3, LAST)


@pytest.mark.parametrize("mode", ["ddp", "fsdp2", "zero2", "zero3"])
def test_one_step_reaches_the_next_forward_unless_its_gradient_is_not_finite(mode, tmp_path):
    """IDA and skipped steps. In the runs above, student and fake score are too close for IDA to show."""
    more = ["--fsdp_reshard_after_forward", "false"] if mode == "fsdp2" else []
    launch("tests/workers/role_step.py", [str(tmp_path)], 2, "no", mode, *more)


def test_zero3_trains_as_one_if_every_weight_is_sharded(shard_all_weights, trained, flags, tmp_path):
    """While two processes generate three images: the process without a third prompt must gather with the other."""
    arguments = [*flags("flux"), "--train_batch_size", "8", "--output_dir", str(tmp_path)]
    arguments += "--validation_prompts a b c --validation_steps 6".split()
    launch("train_senseflow_flux.py", arguments, 2, "no", shard_all_weights)
    assert_checkpoints_near(trained("flux", "single", "no", 1), tmp_path, LAST)


def resume(checkpoint: Path, arguments: list[str], processes: int, mode: str, out: Path) -> None:
    """Run the FLUX script from a copy of another run's checkpoint."""
    shutil.copytree(checkpoint, out / checkpoint.name)
    arguments = [*arguments, "--output_dir", str(out), "--resume_from_checkpoint", "latest"]
    launch("train_senseflow_flux.py", arguments, processes, "no", mode)


@pytest.mark.parametrize("mode", ["ddp", "fsdp2", "zero2", "zero3"])
@pytest.mark.parametrize("at", [3, 6])
def test_a_resumed_run_is_the_same_run(mode, at, trained, flags, tmp_path):
    """To the bit, under ZeRO-3 to rounding; at 3 the student has not stepped yet, at 6 it has."""
    full = trained("flux", mode)
    resume(full / f"checkpoint-{at}", [*flags("flux"), "--train_batch_size", "8"], 2, mode, tmp_path)
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if mode == "zero3" else {}
    assert_same(states(full / f"checkpoint-{LAST}"), states(tmp_path / f"checkpoint-{LAST}"), **tolerance)


@pytest.mark.parametrize(
    "saved, mode, processes", [("fsdp2", "fsdp2", 1), ("fsdp2", "ddp", 2), ("fsdp2", "single", 1), ("ddp", "fsdp2", 2)]
)
def test_a_run_resumes_in_another_number_of_processes_and_mode(saved, mode, processes, trained, flags, tmp_path):
    full = trained("flux", saved)
    arguments = [*flags("flux"), "--train_batch_size", str(16 // processes)]
    resume(full / "checkpoint-6", arguments, processes, mode, tmp_path)
    assert_checkpoints_near(full, tmp_path, LAST)


@pytest.mark.parametrize("mode", ["ddp", "fsdp2", "zero2", "zero3"])
def test_bf16_trains_as_fp32(mode, trained):
    """With gradient checkpointing and three validation prompts for two processes: from iteration 6 to 12 every network
    moves in the direction of float32."""
    exact = [weights(trained("flux", "single", "no", 1) / f"checkpoint-{iteration}") for iteration in (6, LAST)]
    rounded = [weights(trained("flux", mode, "bf16") / f"checkpoint-{iteration}") for iteration in (6, LAST)]
    assert {tensor.dtype for tensor in rounded[1].values()} == {torch.float32}, "the masters"
    # The student trains on the difference of two scores that start equal: it is most affected, in every mode.
    for role, cosine in (("transformer", 0.9), ("fake_score", 0.99), ("discriminator", 0.99)):
        a, b = difference(*exact, role), difference(*rounded, role)
        assert torch.dot(a, b) / (a.norm() * b.norm()) > cosine, role
        assert 0.97 < b.norm() / a.norm() < 1.03, role


@pytest.mark.parametrize("mode", ["ddp", "fsdp2"])
def test_processes_share_a_cache_of_prompts(mode, trained, flags, tmp_path):
    """As the run that encodes in its loop; resumed, to the bit."""
    arguments = [*flags("flux"), "--train_batch_size", "8", "--cache_dir", str(tmp_path / "cache")]
    arguments += ["--validation_prompts", "a red square", "--teacher_num_inference_steps", "2"]
    arguments += ["--max_train_steps", "6"]
    launch("train_senseflow_flux.py", [*arguments, "--output_dir", str(tmp_path / "full")], 2, "no", mode)
    assert_checkpoints_near(trained("flux", mode), tmp_path / "full", 3, 6)
    files = sorted((tmp_path / "cache").rglob("*.safetensors"))
    keys = [{bytes(key.tolist()) for key in load_file(file)["keys"]} for file in files]
    assert len(files) == 4, "of two processes and two encoders"
    assert keys[0].isdisjoint(keys[1]) and abs(len(keys[0]) - len(keys[1])) <= 1
    assert keys[0] | keys[1] == keys[2] | keys[3]
    if mode == "fsdp2":
        resume(tmp_path / "full" / "checkpoint-3", arguments, 2, mode, tmp_path / "resumed")
        ends = (states(tmp_path / folder / "checkpoint-6") for folder in ("full", "resumed"))
        assert_same(*ends)
        assert files == sorted((tmp_path / "cache").rglob("*.safetensors"))


def test_two_nodes_train_as_one(trained, flags, tmp_path):
    """Two launches of one process each, as on two machines: rows and sample indices follow the global rank."""
    arguments = [*flags("flux"), "--train_batch_size", "8", "--output_dir", str(tmp_path)]
    node_flags = ("--main_process_port", "29533", "--machine_rank")
    nodes = [start("train_senseflow_flux.py", arguments, 2, "no", "fsdp2_2nodes", *node_flags, rank) for rank in "01"]
    for node in nodes:
        _, stderr = node.communicate()
        assert node.returncode == 0, stderr[-3000:]
    assert_checkpoints_near(trained("flux", "fsdp2"), tmp_path, LAST)


@pytest.mark.parametrize("mode", ["ddp", "fsdp2"])
def test_dmd2_trains_as_one(mode, flags, tmp_path):
    """The classifier is a part of the fake score: one network runs three times before its backward."""
    arguments = [*without(flags("sdxl"), *ADVERSARIAL_FLAGS, "--ida_decay")]
    arguments += ["--classifier_weight", "1"]
    for name, processes, launched in (("one", 1, "single"), ("two", 2, mode)):
        batch = ["--train_batch_size", str(16 // processes), "--output_dir", str(tmp_path / name)]
        launch("train_dmd2_sdxl.py", [*arguments, *batch], processes, "no", launched)
    assert_checkpoints_near(tmp_path / "one", tmp_path / "two", LAST)


@pytest.fixture(scope="session")
def several_sizes(flags, tmp_path_factory):
    """several_sizes(mode, processes, folder) runs six iterations without GAN, each with images of one of two sizes."""

    def run(mode, processes, out, *more):
        sizes = ["--resolution", "64", "96", "--aspect_ratio_buckets", "64,96;80,80", "--seed", "7"]
        arguments = [*without_gan(without(flags("flux"), *ADVERSARIAL_FLAGS)), *sizes, "--max_train_steps", "6"]
        arguments += ["--train_batch_size", str(4 // processes), "--output_dir", str(out), *more]
        return launch("train_senseflow_flux.py", arguments, processes, "no", mode)

    return run


@pytest.fixture(scope="session")
def several_sizes_in_one_process(several_sizes, tmp_path_factory):
    out = tmp_path_factory.mktemp("sizes")
    several_sizes("single", 1, out)
    return out


@pytest.mark.parametrize("mode", ["ddp", "fsdp2"])
def test_images_of_several_sizes_in_two_processes(
    mode, several_sizes, several_sizes_in_one_process, tmp_path, monkeypatch
):
    """As in one process, and resumed to the bit; each process reads the sizes of a half of the images."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    said = several_sizes(mode, 2, tmp_path / "whole")
    assert said.count("rows by height x width: 64 x 96: 3, 80 x 80: 12") == 1, said
    assert_checkpoints_near(several_sizes_in_one_process, tmp_path / "whole", 3, 6)
    assert_trained(tmp_path / "whole", "transformer", "fake_score", last=6)
    shutil.copytree(tmp_path / "whole" / "checkpoint-3", tmp_path / "half" / "checkpoint-3")
    several_sizes(mode, 2, tmp_path / "half", "--resume_from_checkpoint", "latest")
    assert_same(*(states(tmp_path / run / "checkpoint-6") for run in ("whole", "half")))


# ---------------------------------------------------------------------------------------------------------------------
# Adapters
# ---------------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="session")
def adapter_flags(flags):
    """adapter_flags(script, processes) -> the arguments of a run with --rank; SDXL's is DMD2."""

    def make(script, processes):
        arguments = [*without(flags(script), "--learning_rate"), "--rank", "4", "--learning_rate", "1e-2"]
        if script == "sdxl":
            arguments = [*without(arguments, *ADVERSARIAL_FLAGS, "--ida_decay")]
            arguments += ["--classifier_weight", "1"]
        return [*arguments, "--train_batch_size", str(16 // processes)]

    return make


@pytest.fixture(scope="session")
def adapted(adapter_flags, tmp_path_factory):
    """adapted(script, mode, processes) -> the output folder of its run; each is run once."""
    done: dict[tuple, Path] = {}

    def run(script, mode, processes):
        if (script, mode) not in done:
            out = done[script, mode] = tmp_path_factory.mktemp(f"adapted-{script}-{mode}")
            arguments = [*adapter_flags(script, processes), "--output_dir", str(out)]
            name = "train_dmd2_sdxl.py" if script == "sdxl" else f"train_senseflow_{script}.py"
            launch(name, arguments, processes, "no", mode)
        return done[script, mode]

    return run


@pytest.mark.parametrize("script, mode", [("flux", "ddp"), ("flux", "fsdp2"), ("sdxl", "fsdp2")])
def test_adapters_train_in_two_processes_as_in_one(script, mode, adapted):
    one, two = adapted(script, "single", 1), adapted(script, mode, 2)
    assert_checkpoints_near(one, two, 3, LAST)
    assert_trained(two, STUDENT_FOLDERS[script], "fake_score")
    a, b = (load_file(out / "pytorch_lora_weights.safetensors") for out in (one, two))
    torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


@pytest.mark.parametrize("mode, processes", [("ddp", 2), ("fsdp2", 2), ("single", 1)])
def test_adapters_resume(mode, processes, adapted, adapter_flags, tmp_path):
    """To the bit in the same launch; from FSDP2's shards in a single process, too."""
    full = adapted("flux", "fsdp2" if mode == "single" else mode, 2)
    resume(full / "checkpoint-6", adapter_flags("flux", processes), processes, mode, tmp_path)
    if mode == "single":
        assert_checkpoints_near(full, tmp_path, LAST)
    else:
        assert_same(states(full / f"checkpoint-{LAST}"), states(tmp_path / f"checkpoint-{LAST}"))


# ---------------------------------------------------------------------------------------------------------------------
# Memory
# ---------------------------------------------------------------------------------------------------------------------
def test_under_fsdp2_a_process_holds_its_shard_of_one_base(teacher, data, tmp_path):
    arguments = ["--pretrained_model_name_or_path", str(teacher), "--dataset_json", str(data)]
    arguments += "--gan_weight 0 --resolution 64 --max_sequence_length 16".split()
    arguments += "--train_batch_size 2 --ttur_ratio 1 --rank 4 --learning_rate 1e-2 --report_to none".split()
    launch("tests/workers/shared_base.py", [*arguments, "--output_dir", str(tmp_path)], 2, "no", "fsdp2")


@pytest.fixture(scope="session")
def large(tmp_path_factory):
    """(a folder with the transformer of load_memory.py, its size, the size of its largest tensor), in MB."""
    folder = tmp_path_factory.mktemp("large")
    write_network(folder)
    weights = stored_weights(sorted((folder / "transformer").glob("*.safetensors")))
    sizes = [4 * math.prod(stored.shape) / 2**20 for stored in weights.values()]
    assert 1000 < sum(sizes) < 1500
    return folder, sum(sizes), max(sizes)


@pytest.mark.parametrize("mode", ["fsdp2", "zero3"])
def test_a_process_holds_its_shard_of_a_network_and_one_tensor(mode, large, tmp_path):
    """While it loads, saves and resumes. DeepSpeed leaves gaps between shards, holds a trained shard several times
    (weights, masters, gradients), and reads its masters from a file as large."""
    folder, size, tensor = large
    launch("tests/workers/load_memory.py", [str(folder), str(tmp_path)], 2, "no", mode)
    shard = size / 2
    for rank in range(2):
        memory = json.loads((tmp_path / f"{rank}.json").read_text())
        peak = {name: values["peak"] for name, values in memory.items()}
        assert peak["frozen"] < (shard if mode == "fsdp2" else 1.4 * shard) + 2 * tensor, memory
        assert peak["trained"] < (shard if mode == "fsdp2" else memory["trained"]["held"]) + 3 * tensor, memory
        assert peak["saved"] < shard / 2, memory
        assert peak["resumed"] < (shard if mode == "zero3" else 0) + 2 * tensor, memory


def test_under_fsdp2_a_process_gathers_one_tower_of_the_discriminator(tmp_path):
    launch("tests/workers/gathered_towers.py", [str(tmp_path)], 2, "no", "fsdp2")


@pytest.mark.parametrize("mode", sorted(file.stem for file in (ROOT / "accelerate_configs").glob("*.yaml")))
def test_what_the_dry_run_suggests_needs_the_memory_that_it_prints(mode, flags, tmp_path):
    """The suggested command, launched by itself, traces the same peak as the process that traced the suggestion."""
    arguments = [*without_gan(without(flags("flux"), *ADVERSARIAL_FLAGS)), "--train_batch_size", "1"]
    arguments += ["--gradient_checkpointing", "--offload_text_encoders", "--output_dir", str(tmp_path / "out")]
    machines = [[]]
    if mode == "fsdp2_2nodes":
        machines = [["--main_process_port", "29533", "--machine_rank", rank] for rank in "01"]

    def dry_run(processes, *more):
        command = ("train_senseflow_flux.py", [*arguments, *more], processes, "no", mode)
        launched = [start(*command, *machine, stdout=subprocess.PIPE) for machine in machines]
        outputs = [process.communicate() for process in launched]
        assert all(process.returncode == 0 for process in launched), outputs
        return "".join(stdout for stdout, _ in outputs)

    processes = 1 if mode == "single" else 2
    output = dry_run(processes, "--dry_run", "0.00001")
    # DeepSpeed's warnings may stand above it.
    assert re.search(rf"^{mode.removesuffix('_2nodes')}, {processes} process", output, re.MULTILINE)
    suggested, peak = re.findall(r"^with (.*): ([\d.]+) GiB$", output, re.MULTILINE)[-1]
    more = re.search(r" ?(\d+) processes", suggested)
    assert (more is not None) == (mode not in ("single", "ddp"))
    if more:
        suggested, processes = suggested.replace(more[0], ""), int(more[1])
    assert re.search(rf"^peak {peak} GiB", dry_run(processes, *suggested.split(), "--dry_run"), re.MULTILINE)


# ---------------------------------------------------------------------------------------------------------------------
# Runs that end early
# ---------------------------------------------------------------------------------------------------------------------
def has_traceback(stderr: str) -> bool:
    """Whether a process ended with one; torch's warnings in builds for GPUs begin with [rank0]:W."""
    return re.search(r"\[rank\d+\]: ", stderr) is not None


FAULTS = [
    (mode, *fault)
    for mode in ("ddp", "fsdp2", "zero3")
    for fault in (("error", "the disk went away; mount it again"), ("nan", "fake_loss not finite 3 times"))
]


FAULTS += [("ddp", "encoding", "the disk went away; mount it again")]
FAULTS += [("ddp", "elsewhere", "not the same folder in all processes; give one on a disk that all nodes see")]


@pytest.mark.parametrize("mode, fault, message", FAULTS)
def test_what_ends_one_process_ends_all_and_is_printed_last(mode, fault, message, flags, tmp_path):
    arguments = [fault, *flags("flux"), "--train_batch_size", "1", "--output_dir", str(tmp_path)]
    if fault == "encoding":  # the other process waits for its files
        arguments += ["--cache_dir", str(tmp_path / "cache")]
    if fault == "elsewhere":
        arguments = [fault, *flags("flux"), "--cache_dir", "relative", "--output_dir", str(tmp_path)]
    process = start("tests/workers/faulty_rank.py", arguments, 2, "no", mode)
    try:
        _, stderr = process.communicate(timeout=90)  # starting takes up to 20 s
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 1
    (cause,) = re.findall(r"Root Cause.*?traceback : (.*?)\n=", stderr, re.DOTALL)
    assert message in cause and stderr.rstrip().endswith("==="), stderr[-3000:]
    assert not has_traceback(stderr)


@pytest.mark.parametrize(
    "mode, name", [("ddp", "SIGTERM"), ("fsdp2", "SIGINT"), ("zero2", "SIGTERM"), ("zero3", "SIGINT")]
)
def test_a_signal_to_the_launcher_saves_a_checkpoint(mode, name, flags, tmp_path):
    """As a cluster or a terminal sends it; all processes stop after the same iteration."""
    arguments = [*flags("flux"), "--output_dir", str(tmp_path)]
    arguments += "--train_batch_size 1 --max_train_steps 100000 --checkpoints_total_limit 3".split()
    arguments += ["--dataloader_num_workers", "1"]  # the launcher signals its workers, too
    process = start("train_senseflow_flux.py", arguments, 2, "no", mode)
    while not (tmp_path / "checkpoint-3").exists():
        assert process.poll() is None, process.communicate()[1][-3000:]
        time.sleep(0.1)
    process.send_signal(getattr(signal, name))
    _, stderr = process.communicate()
    cause = {"SIGTERM": "SIGTERM", "SIGINT": "Ctrl-C"}[name]
    (number,) = re.findall(rf"stopped by {cause}; checkpoint-(\d+) in .* is complete", stderr)
    assert json.loads((tmp_path / f"checkpoint-{number}" / "state.json").read_text())["iteration"] == int(number)
    assert not (tmp_path / "model_index.json").exists()
    assert not has_traceback(stderr) and "Worker" not in stderr, stderr[-3000:]


def test_unreadable_data_in_one_process_saves_a_checkpoint_of_all(flags, tmp_path):
    arguments = ["unreadable", *flags("flux"), "--train_batch_size", "1", "--output_dir", str(tmp_path)]
    process = start("tests/workers/faulty_rank.py", arguments, 2, "no", "ddp")
    _, stderr = process.communicate()
    assert process.returncode == 1
    message = r"error: --dataset_json data.json: lost.png; mend it, checkpoint-(\d+) is complete\n"
    (number,) = re.findall(message, stderr)
    assert 2 <= int(number) <= 3 and (tmp_path / f"checkpoint-{number}" / "state.json").exists()
    assert not has_traceback(stderr)


def test_kills_at_any_moment_lose_nothing():
    """Three of benchmarks/kill_resume.py's; RESULTS.md has twenty."""
    subprocess.run([sys.executable, str(ROOT / "benchmarks" / "kill_resume.py"), "--kills", "3"], check=True)
