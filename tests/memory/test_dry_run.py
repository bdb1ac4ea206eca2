"""--dry_run: its numbers equal those of a real run to the byte; what it prints and refuses."""

import gc
import json
import os
import re
import shutil
import subprocess
import sys
from contextlib import ExitStack, nullcontext

import pytest
import torch
import torch.nn.functional as F
from diffusers import HiDreamImageTransformer2DModel
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile

import train_dmd2_sdxl
import train_senseflow_flux
import train_senseflow_sd3
import train_senseflow_sdxl
from helpers import ROOT, models_class, refused, without
from senseflow.arguments import complete_args, keep_last
from senseflow.errors import UserError
from senseflow.memory.counter import GRADIENTS, STATES, WEIGHTS, Counter, Work
from senseflow.memory.gpu_rules import FLOAT32, gpu_rules
from senseflow.memory.report import GIB, apply_zero, fit
from senseflow.memory.suggestions import INTERVAL, Command, savings, suggest_savings, suggest_speed
from senseflow.memory.trace import Trace, patch_loaders, trace
from senseflow.training.prompts import encodes_before_training
from tiny_pipelines import write_sd3, write_sdxl


SCRIPTS = {"flux": train_senseflow_flux, "sd3": train_senseflow_sd3, "sdxl": train_senseflow_sdxl}
SCRIPTS["dmd2"] = train_dmd2_sdxl


@pytest.fixture
def flags(teacher, vision, data, tmp_path):
    """flags(name, *more): those of a script, with micro-batches of two images of 64 px."""

    def make(name, *more):
        path = teacher
        if name != "flux":
            path = tmp_path / name
            (write_sd3 if name == "sd3" else write_sdxl)(path)
        command = ["--pretrained_model_name_or_path", path, "--dataset_json", data, "--resolution", "64"]
        command += ["--output_dir", tmp_path / "out", "--train_batch_size", "2", "--report_to", "none", *more]
        if "--gan_weight" not in more:
            command += ["--discriminator_backbone", vision / "dinov2", "--discriminator_text_encoder", vision / "clip"]
        return [str(part) for part in command] + (["--max_sequence_length", "16"] if name in ("flux", "sd3") else [])

    return make


def run_trace(script, arguments, fake=True, device="cpu", many_prompts=True) -> Trace:
    """Trace a script with fake tensors or with real ones, and as if the data had more prompts than it has."""
    args = script.parse_args(arguments)
    source, rows = script.prepare(models_class(script), args)
    encodes_first = bool(args.cache_dir) if many_prompts else encodes_before_training(args, rows)
    counter = Counter()
    with ExitStack() as stack:
        for context in (patch_loaders(args), FakeTensorMode(allow_non_fake_inputs=True)) if fake else ():
            stack.enter_context(context)
        stack.enter_context(counter)
        functions = (models_class(script), script.make_models, script.train_iteration)
        return trace(args, source, encodes_first, *functions, counter, device)


def allocator_peak(profiler) -> int:
    """Return the peak bytes of torch's allocator by its profiler."""
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def test_the_counter_agrees_with_torchs_allocator_and_with_flops_by_hand():
    counter = Counter()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler, counter:
        network = torch.nn.Sequential(torch.nn.Linear(64, 512), torch.nn.GELU(), torch.nn.Linear(512, 64))
        images, optimizer = torch.randn(96, 64), torch.optim.AdamW(network.parameters(), fused=True)
        for _ in range(2):
            network(images).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    weight_bytes = sum(4 * parameter.numel() for parameter in network.parameters())
    assert counter.peak == pytest.approx(allocator_peak(profiler), rel=0.001)
    assert counter.peak > 4 * weight_bytes  # with gradients and two moments
    # Two products forward and three backward: the input needs no gradient.
    assert sum(counter.work.values(), Work()).flops == 2 * 2 * 96 * 64 * 512 * (2 + 3)


def test_operations_and_bytes_by_hand():
    x, weight = torch.zeros(8, 32), torch.zeros(16, 32)
    with Counter() as counter:
        y = (x @ weight.T).view(4, 2, 16)  # neither the transpose nor the view is an operation
        torch._foreach_mul_([y, weight], 2)
        _ = y + torch.zeros(16).expand(2, 16)
        torch._foreach_copy_([weight], [weight + 1])  # what it overwrites is not read
        work = sum(counter.work.values(), Work())
    values = (8 * 32 + 16 * 32 + 8 * 16) + 2 * (8 * 16 + 16 * 32) + 16 + (2 * 8 * 16 + 16) + 2 * 2 * 16 * 32
    assert (work.operations, work.bytes_moved, work.flops) == (6, 4 * values, 2 * 8 * 32 * 16)


@pytest.mark.parametrize("groups", [1, 4])
def test_flops_of_grouped_convolutions(groups):
    conv = torch.nn.Conv2d(8, 16, 3, stride=2, groups=groups)
    x = torch.zeros(2, 8, 9, 9, requires_grad=True)
    with Counter() as counter:
        conv(x).sum().backward()  # (2, 16, 4, 4)
    assert sum(counter.work.values(), Work()).flops == 3 * 2 * 2 * 16 * 16 * (8 // groups * 9)


def test_autocast_of_the_trace_is_cudas():
    """What CUDA's autocast computes in float32 does so, and nothing that the CPU's own autocast rules already."""
    cuda, cpu = (torch._C._dispatch_get_registrations_for_dispatch_key(key) for key in ("AutocastCUDA", "AutocastCPU"))
    names = {f"aten::{name}" for name in FLOAT32}
    assert names <= set(cuda) and not names & set(cpu)
    x = torch.ones(4, 8, dtype=torch.bfloat16)
    results = {}
    for rules in (nullcontext(), gpu_rules(), nullcontext()):
        with rules, torch.autocast("cpu", torch.bfloat16):
            outputs = F.layer_norm(x, (8,)), x.softmax(-1), x.pow(2), x.sum(-1), F.linear(x, x)
        results.setdefault(type(rules), []).append([output.dtype for output in outputs])
    half, full = torch.bfloat16, torch.float32
    assert list(results.values()) == [[[half] * 5, [half] * 5], [[full] * 4 + [half]]]


def test_text_that_a_mask_selects_counts_whole(flags):
    """As in the ports whose network takes texts of their own lengths."""
    args = train_senseflow_sd3.parse_args(flags("sd3"))
    with patch_loaders(args), FakeTensorMode():
        text, mask = torch.zeros(5, 3), torch.zeros(5) > 0
        assert text[mask].shape == (5, 3)


@pytest.mark.parametrize("training", [False, True])
def test_experts_get_all_tokens(training, flags):
    """Where the tokens of each expert are counted, one gets all, with the same FLOPs; where they are masked, each."""

    def traced(fake):
        torch.manual_seed(0)
        counter, args = Counter(), train_senseflow_sd3.parse_args(flags("sd3"))
        with ExitStack() as stack:
            for context in (patch_loaders(args), FakeTensorMode(allow_non_fake_inputs=True)) if fake else ():
                stack.enter_context(context)
            stack.enter_context(counter)
            sizes = {"num_layers": 1, "num_single_layers": 1, "attention_head_dim": 8, "num_attention_heads": 4}
            sizes |= {"axes_dims_rope": (4, 2, 2), "max_resolution": (32, 32), "llama_layers": (0, 1)}
            sizes |= {"patch_size": 2, "in_channels": 4, "caption_channels": [32, 16], "text_emb_dim": 64}
            network = HiDreamImageTransformer2DModel(**sizes, num_routed_experts=4, num_activated_experts=2)
            inputs = {"encoder_hidden_states_t5": (2, 16, 32), "pooled_embeds": (2, 64)}
            inputs |= {"hidden_states": (2, 4, 8, 8), "encoder_hidden_states_llama3": (2, 2, 16, 16)}
            inputs = {name: torch.randn(shape) for name, shape in inputs.items()}
            network.train(training)(timesteps=torch.tensor([3.0, 4.0]), **inputs).sample.square().mean().backward()
        return sum(counter.work.values(), Work()).flops, counter.peak

    (flops, peak), (fake_flops, fake_peak) = traced(fake=False), traced(fake=True)
    if training:
        assert 2 < fake_flops / flops < 4 and fake_peak > peak
    else:
        assert fake_flops == flops and peak < fake_peak < 1.02 * peak


def test_what_depends_on_values_is_refused(flags, monkeypatch):
    def train_iteration(iteration, batches, models, args):
        batches[0]["pixel_values"].sum().item()

    monkeypatch.setattr(train_senseflow_flux, "train_iteration", train_iteration)
    arguments = flags("flux", "--gan_weight", "0", "--dry_run")
    with pytest.raises(UserError, match="--dry_run: the result of aten._local_scalar_dense.default depends on values"):
        train_senseflow_flux.main(arguments)


@pytest.mark.parametrize(
    "name, more",
    [
        ("flux", ["--gradient_checkpointing", "--cache_dir", "not-made", "--dry_run"]),
        ("sd3", ["--rank", "8", "--gan_weight", "0", "--gradient_accumulation_steps", "3"]),
        ("dmd2", ["--gan_weight", "0.005", "--ttur_ratio", "1"]),
    ],
)
def test_a_trace_equals_a_run_with_real_tensors(name, more, flags):
    script, arguments = SCRIPTS[name], flags(name, *more)
    fake = run_trace(script, arguments)
    gc.collect()  # nothing older may be released while the profiler runs
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        real = run_trace(script, arguments, fake=False)
    assert real.peak == pytest.approx(allocator_peak(profiler), rel=0.03)
    for key in {*fake.at_peak, *real.at_peak}:
        assert fake.at_peak.get(key, 0) == real.at_peak.get(key, 0), key
    assert (fake.peak, fake.peak_phase) == (real.peak, real.peak_phase)
    for stage, phases in fake.work.items():
        for phase, work in phases.items():
            other = real.work[stage][phase]
            assert work.flops == other.flops, (stage, phase)  # kernels of attention may differ
            assert work.operations == pytest.approx(other.operations, rel=0.02), (stage, phase)
            assert work.bytes_moved == pytest.approx(other.bytes_moved, rel=0.02), (stage, phase)
    student_bytes = 4 * fake.num_params["student"]
    if "--rank" not in more:
        assert student_bytes <= fake.at_peak["student", WEIGHTS] <= 1.01 * student_bytes
        assert 2 * student_bytes <= fake.optimizer_bytes["student"] <= 2.01 * student_bytes


# {(script, flags): (operations, MB moved) of an ordinary iteration, and of one with the student's update}
COUNTS = {
    ("sdxl", "--bf16_weight_copies"): ((3831, 144), (6546, 256)),
    ("sd3", ""): ((3761, 146), (6974, 241)),
    ("flux", "--rank 8"): ((3566, 117), (6061, 178)),
}


@pytest.mark.parametrize("name, more", COUNTS)
def test_operations_and_bytes_of_an_iteration(name, more, flags, bfloat16):
    """Within 5 %. What changes them belongs into docs/performance.md, too, by a trace at full size."""
    work = run_trace(SCRIPTS[name], flags(name, *bfloat16, *more.split())).work
    totals = [sum(phases.values(), Work()) for phases in work.values()]
    counts = [(total.operations, total.bytes_moved / 1e6) for total in totals]
    for count, expected in zip(counts, COUNTS[name, more], strict=True):
        assert count == pytest.approx(expected, rel=0.05), counts


def test_with_a_cache_no_text_encoder_is_there_during_training(flags, tmp_path):
    """Neither the pipeline's nor the discriminator's; nothing is encoded, and the folder is not made."""
    cache = ["--dry_run", "--cache_dir", str(tmp_path / "cache")]
    without_cache, with_cache = (run_trace(train_senseflow_flux, flags("flux", *more)) for more in ([], cache))
    assert ("text encoders", "forward") in without_cache.work["ordinary"]
    assert not any(size for (owner, _), size in with_cache.at_peak.items() if owner == "text encoders")
    assert not any(owner == "text encoders" for phases in with_cache.work.values() for owner, _ in phases)
    freed = without_cache.at_peak["text encoders", WEIGHTS]
    freed += without_cache.at_peak["other frozen", WEIGHTS] - with_cache.at_peak["other frozen", WEIGHTS]
    assert with_cache.encoder_bytes == without_cache.encoder_bytes < freed
    assert freed * 0.9 < without_cache.peak - with_cache.peak < freed * 1.1
    assert with_cache.export_bytes == without_cache.export_bytes and not (tmp_path / "cache").exists()
    few = run_trace(train_senseflow_flux, flags("flux", "--dry_run", "--offload_text_encoders"), many_prompts=False)
    assert (few.peak, few.at_peak, few.work) == (with_cache.peak, with_cache.at_peak, with_cache.work)


def test_the_peak_may_be_where_few_prompts_are_encoded(flags, teacher, tmp_path):
    """With --offload_text_encoders, too: they are on the GPU beside all networks, before any optimizer has states."""
    wide = shutil.copytree(teacher, tmp_path / "wide")
    config = wide / "text_encoder_2" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"num_layers": 4, "d_ff": 2**18}))
    arguments = ["--rank", "4", "--offload_text_encoders", "--dry_run", "--pretrained_model_name_or_path", str(wide)]
    few, many = (
        run_trace(train_senseflow_flux, [*flags("flux"), *arguments], many_prompts=many) for many in (False, True)
    )
    assert few.peak_phase == ("text encoders", "encoding before training") != many.peak_phase
    assert few.encoder_bytes == many.encoder_bytes < few.peak
    assert few.peak > many.peak


@pytest.mark.skipif(torch.version.cuda is None, reason="needs torch's build for GPUs, without a GPU")
@pytest.mark.parametrize("name, precision", [("flux", "no"), ("flux", "bf16"), ("sd3", "no"), ("sdxl", "no")])
def test_devices_are_not_mixed(name, precision, flags, bfloat16, monkeypatch):
    """Fake CUDA tensors. Backward needs a real GPU, and autocast of fake convolutions does not work."""

    def backward(loss):
        assert loss.device.type == "cuda" and loss.dtype == torch.float32

    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setattr(torch.Tensor, "backward", backward)
    monkeypatch.setattr("torch.cuda.amp.common.amp_definitely_not_available", lambda: False)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda: True)
    arguments = flags(name, "--mixed_precision", precision, "--gradient_checkpointing")
    traced = run_trace(SCRIPTS[name], arguments, device="cuda")
    assert traced.peak > 4 * traced.num_params["student"]


FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_RESHARD_AFTER_FORWARD": "true"}


@pytest.mark.parametrize("mode, environment, processes", [("fsdp2", FSDP2, 8), ("ddp", {}, 2)])
def test_one_process_of_many(mode, environment, processes, flags, tmp_path):
    """Under FSDP2 it has its part of weights, gradients and states; under DDP always the gradients of all networks."""
    output = tmp_path / "dry_run.json"
    command = [ROOT / "train_senseflow_flux.py", *flags("flux", "--gan_weight", "0", "--dry_run")]
    command = [sys.executable, *command, "--dry_run_output", output]
    environment = {**os.environ, **environment, "WORLD_SIZE": str(processes)}

    def run(rank: int) -> str:
        kwargs = {"env": {**environment, "RANK": str(rank)}, "stdout": subprocess.PIPE, "text": True, "check": True}
        return subprocess.run(keep_last(map(str, command)), **kwargs).stdout

    assert run(1) == "" and not output.exists()
    printed, summary = run(0), json.loads(output.read_text())
    assert (summary["mode"], summary["processes"]) == (mode, processes)
    assert f"\npeak {summary['peak_gib']:.5f} GiB, in: {summary['peak_phase']}\n" in printed
    shards = processes if mode == "fsdp2" else 1
    for role in ("student", "fake_score"):
        total, memory = 4 * summary["parameters"][role] / GIB, summary["memory_gib"][role]
        assert total / shards <= memory[WEIGHTS] <= 1.1 * total / shards
        assert 2 * total / shards <= memory[STATES] <= 2.2 * total / shards
        if mode == "ddp":
            assert memory[GRADIENTS] == total
        else:  # weights gathered earlier are freed
            assert memory.get("activations", 0) < total


def test_configurations_suffice_and_the_cards_are_printed(flags, teacher, tmp_path, capsys):
    bare = tmp_path / "bare"
    shutil.copytree(teacher, bare)
    for file in bare.rglob("*.safetensors"):
        file.unlink()
    arguments = flags("flux", "--gan_weight", "0", "--ida_decay", "0.9", "--dry_run")
    arguments += ["--pretrained_model_name_or_path", str(bare)]
    train_senseflow_flux.main(arguments)
    output = capsys.readouterr().out
    peak = float(re.search(r"^peak ([\d.]+) GiB, in: ", output, re.MULTILINE)[1])
    assert 0 < peak < 0.1 and output.strip().splitlines()[-1].startswith("fits in 24, 40, 48, 80, 141 GB")
    assert re.search(r"^student +[\d.]+ +[\d.]+ +[\d.]+", output, re.MULTILINE)
    assert "\niteration with student " in output and "on disk: a checkpoint " in output
    assert not (tmp_path / "out").exists()
    (bare / "transformer" / "config.json").unlink()
    refused(train_senseflow_flux, arguments, 2, f"{bare} (transformer): no readable FluxTransformer2DModel", capsys)
    needle = "--dry_run: reads no checkpoint; leave out --resume_from_checkpoint latest"
    arguments = [*flags("flux", "--dry_run"), "--resume_from_checkpoint", "latest"]
    refused(train_senseflow_flux, arguments, 2, needle, capsys)


@pytest.mark.parametrize(
    "name, given",
    [("flux", ""), ("sd3", ""), ("sdxl", ""), ("flux", "--teacher_lora"), ("flux", "--student_model_name_or_path")],
)
def test_runs_without_a_vae_and_with_loras_are_traced(name, given, flags, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("a red square\n")
    arguments = [*without(flags(name, "--gan_weight", "0", "--ttur_ratio", "1"), "--dataset_json", "--output_dir")]
    arguments += ["--prompts_file", str(tmp_path / "prompts.txt"), "--backward_simulation_prob", "1"]
    if given:
        arguments += ["--rank", "4", "--max_train_steps", "1", "--learning_rate", "0"]
        SCRIPTS[name].main([*arguments, "--output_dir", str(tmp_path)])
        arguments += [given, str(tmp_path / "pytorch_lora_weights.safetensors")]
    capsys.readouterr()
    SCRIPTS[name].main([*arguments, "--output_dir", str(tmp_path / "dry"), "--dry_run"])
    output = capsys.readouterr().out
    assert re.search(r"^peak [\d.]+ GiB, in: ", output, re.MULTILINE) and "\niteration with student " in output


def test_flags_are_added_until_the_command_fits(flags, capsys, monkeypatch):
    peaks = {"--gradient_checkpointing": 60, "--offload_text_encoders": 60, "--use_8bit_adam": 30}

    def trace(command, changes):
        if "--train_batch_size" in changes:
            return None
        return {"peak_gib": min([90, *(peak for flag, peak in peaks.items() if flag in changes)])}

    monkeypatch.setattr(Command, "trace", trace)
    args = train_senseflow_flux.parse_args(flags("flux", "--dry_run", "40"))
    suggest_savings(args, Command([], {}, 1), "single", {"peak_gib": 90})
    *lines, last = capsys.readouterr().out.splitlines()
    assert lines == [
        "with --gradient_checkpointing: 60.00 GiB",
        f"with --gradient_checkpointing --cache_dir {args.output_dir}/prompts: 60.00 GiB; no help, left out",
        "with --gradient_checkpointing --offload_text_encoders: 60.00 GiB; no help, left out",
        "with --gradient_checkpointing --train_batch_size 1 --gradient_accumulation_steps 2: fails, left out",
        "with --gradient_checkpointing --use_8bit_adam: 30.00 GiB",
    ]
    assert last == "fits in 40 GB with --gradient_checkpointing --use_8bit_adam"
    assert fit(30 * GIB).startswith("fits in 40, 48, 80, 141 GB; does not fit in 24 by 7.7 GiB")
    # What a mode refuses is not offered, and what costs memory is taken back.
    assert {"--use_8bit_adam": []} not in savings(args, "fsdp2", 8)
    offered = savings(args, "zero3", 8)
    assert {"--rank": [64]} not in offered and {"processes": [16]} in offered and {"--use_8bit_adam": []} in offered
    args.gradient_checkpointing, args.gradient_checkpointing_interval, args.bf16_weight_copies = True, [1, 0], True
    assert savings(args, "single", 1)[:2] == [{INTERVAL: [1]}, {"--bf16_weight_copies": None}]


def test_memory_that_is_left_over_is_turned_into_speed(flags, capsys, monkeypatch):
    """A batch fits and is no faster; no checkpointing of the fake score is; copies do not fit; one of three does."""

    def trace(command, changes):
        batch, intervals = changes.get("--train_batch_size", [1])[0], changes.get(INTERVAL, [1, 1])
        peak = 30 + 20 * ("--bf16_weight_copies" in changes) + batch
        peak += 20 if intervals is None else sum({1: 0, 2: 3, 0: 7}[interval] for interval in intervals)
        seconds = 2 - 0.1 * (4 if intervals is None else sum({1: 0, 2: 1, 0: 2}[interval] for interval in intervals))
        return {"peak_gib": peak, "seconds": {"A100 40 GB": 10, "L40S": seconds, "A100 80 GB": 0}}

    monkeypatch.setattr(Command, "trace", trace)
    arguments = flags("flux", "--dry_run", "48", "--train_batch_size", "1", "--gradient_accumulation_steps", "4")
    args = train_senseflow_flux.parse_args([*arguments, "--gradient_checkpointing"])
    complete_args(args)
    args.mixed_precision = "bf16"
    suggest_speed(args, Command(["--gradient_checkpointing"], {}, 1), "single", trace(None, {}))
    interval = "with --gradient_checkpointing_interval 1 0"
    assert capsys.readouterr().out.splitlines() == [
        "13.64 GiB of 48 GB are left; an iteration takes 2.00 s (estimate for L40S)",
        f"with --cache_dir {args.output_dir}/prompts: 31.00 GiB, 2.00 s; not faster, left out",
        "with --train_batch_size 4 --gradient_accumulation_steps 1: 34.00 GiB, 2.00 s; not faster, left out",
        f"{interval}: 38.00 GiB, 1.80 s",
        f"{interval} --bf16_weight_copies: 58.00 GiB, 1.80 s; does not fit",
        "without --gradient_checkpointing: 51.00 GiB, 1.60 s; does not fit",
        "with --gradient_checkpointing_interval 0 0: 45.00 GiB, 1.60 s; does not fit",
        "with --gradient_checkpointing_interval 2 0: 41.00 GiB, 1.70 s",
        "fits in 48 GB with --gradient_checkpointing_interval 2 0, an iteration in 1.70 s",
    ]


def test_what_is_suggested_is_a_trace_of_the_command(flags, monkeypatch, capsys):
    kept = ["--gan_weight", "0", "--offload_text_encoders"]
    arguments = flags("flux", *kept, "--gradient_checkpointing_interval", "1", "0", "--dry_run", "24")
    monkeypatch.setattr(sys, "argv", ["train", *arguments])
    train_senseflow_flux.main(arguments)
    lines = re.findall(r"^(with.*): ([\d.]+) GiB, [\d.]+ s$", capsys.readouterr().out, re.MULTILINE)
    peak = run_trace(train_senseflow_flux, flags("flux", *kept)).peak / GIB
    assert lines == [("without --gradient_checkpointing_interval", f"{peak:.5f}")]
    command = Command([str(ROOT / "train_senseflow_flux.py"), *arguments], dict(os.environ), 1)
    assert command.trace({"--rank": [-1]}) is None


def test_zero_by_arithmetic():
    student = {("student", WEIGHTS): 400, ("student", GRADIENTS): 400, ("student", STATES): 800}
    traced = Trace(
        peak=1800,
        at_peak={**student, ("teacher", WEIGHTS): 200},
        peak_phase=("student", "step"),
        encoder_bytes=0,
        work={},
        checkpoint_bytes=0,
        export_bytes=0,
        num_params={"student": 100, "teacher": 100},
        optimizer_bytes={"student": 800},
    )
    zero2, zero3 = (apply_zero(traced, mode, 4, bf16=True) for mode in ("zero2", "zero3"))
    # bf16 weights, whole or a quarter; a quarter of bf16 gradients and of fp32 masters and moments.
    kinds = (WEIGHTS, GRADIENTS, STATES)
    assert [zero2.at_peak["student", kind] for kind in kinds] == [200, 50, 300]
    assert [zero3.at_peak["student", kind] for kind in kinds] == [50, 50, 300]
    assert (zero2.at_peak["teacher", WEIGHTS], zero3.at_peak["teacher", WEIGHTS]) == (200, 50)
    assert zero2.peak == 750
    assert zero2.checkpoint_bytes == zero3.checkpoint_bytes == 400  # the masters, besides what the trace counts
