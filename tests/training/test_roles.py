"""Launch configurations, optimizer steps, and how runs end, in a single process; test_modes.py tests the others."""

import copy
import json
import os
import re
import resource
import signal
import subprocess
import sys
import weakref
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.tracking import TensorBoardTracker
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm.auto import tqdm

import infer
import train_senseflow_flux as script
from helpers import ROOT, assert_same, refused, states
from senseflow.arguments import keep_last
from senseflow.errors import UserError
from senseflow.models import text_encoders
from senseflow.training import checkpoints
from senseflow.training import runtime as runtime_module
from senseflow.training.metrics import Metrics
from senseflow.training.roles import LaunchConfig, join_shards


FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
ZERO = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}


@pytest.fixture(scope="module")
def flags(teacher, vision, data):
    return [
        *("--pretrained_model_name_or_path", str(teacher), "--dataset_json", str(data)),
        *("--discriminator_backbone", f"{vision}/dinov2", "--discriminator_text_encoder", f"{vision}/clip"),
        *"--ttur_ratio 2 --max_train_steps 4 --checkpointing_steps 2 --learning_rate 1e-3 --report_to none".split(),
        *"--resolution 64 --max_sequence_length 16 --export_dtype fp32".split(),
    ]


@pytest.mark.parametrize(
    "environment, mode, processes",
    [
        ({}, "replicated", 1),
        ({"WORLD_SIZE": "4"}, "replicated", 4),
        ({**FSDP2, "WORLD_SIZE": "2"}, "fsdp2", 2),
        (ZERO, "zero3", 1),
    ],
)
def test_a_launch_is_read_from_the_environment_that_accelerate_sets(environment, mode, processes, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    launch = LaunchConfig()
    assert (launch.mode, launch.world_size) == (mode, processes) and (launch.plugin is None) == (mode == "replicated")


@pytest.mark.parametrize(
    "environment, needle",
    [
        ({**FSDP2, "FSDP_VERSION": "1"}, "fsdp_version 1"),
        ({**FSDP2, "ACCELERATE_USE_PARALLELISM_CONFIG": "true"}, "parallelism_config is not supported here"),
        ({**FSDP2, "FSDP_OFFLOAD_PARAMS": "true"}, "fsdp_offload_params"),
        ({**FSDP2, "FSDP_ACTIVATION_CHECKPOINTING": "true"}, "--gradient_checkpointing"),
        ({**ZERO, "ACCELERATE_DEEPSPEED_ZERO_STAGE": "1"}, "zero_stage 1"),
        ({**ZERO, "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu"}, "offload_optimizer_device"),
        ({**ZERO, "ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, "dynamo_backend with DeepSpeed"),
        ({"ACCELERATE_DYNAMO_BACKEND": "FASTEST"}, "dynamo_backend .*FASTEST"),
        (
            {"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR", "ACCELERATE_DYNAMO_MODE": "reduce-overhead"},
            "dynamo_mode reduce-overhead",
        ),
    ],
)
def test_an_unsupported_configuration_is_refused(environment, needle, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=needle) as error:
        LaunchConfig()
    assert error.value.exit_code == 2


def test_a_deepspeed_file_with_an_optimizer_is_refused(tmp_path, monkeypatch):
    config = {
        "zero_optimization": {"stage": 2},
        "train_micro_batch_size_per_gpu": "auto",
        "optimizer": {"type": "AdamW"},
    }
    (tmp_path / "ds.json").write_text(json.dumps(config))
    for name, value in {**ZERO, "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(tmp_path / "ds.json")}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="optimizer of the DeepSpeed file"):
        LaunchConfig()


def test_a_number_of_processes_without_a_launcher_is_refused(flags, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    args = script.parse_args([*flags, "--output_dir", str(tmp_path)])
    for start in (lambda: runtime_module.Runtime(args), lambda: infer.process_group().__enter__()):
        with pytest.raises(
            UserError, match="^WORLD_SIZE=2 is set without RANK, LOCAL_RANK, MASTER_ADDR, MASTER"
        ) as error:
            start()
        assert error.value.exit_code == 2


def patch_launch(monkeypatch, mode: str, processes: int) -> None:
    """Replace the launch configuration of this process."""
    launch = LaunchConfig()
    launch.mode, launch.world_size = mode, processes
    for module in (checkpoints, runtime_module):
        monkeypatch.setattr(module, "launch_config", lambda: launch)


@pytest.mark.parametrize(
    "saved, launched, fits",
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
def test_deepspeeds_checkpoints_resume_only_as_they_were_launched(
    saved, launched, fits, flags, tmp_path, monkeypatch, capsys
):
    """Others are refused before any network loads."""
    (tmp_path / "checkpoint-2").mkdir()
    record = {"mode": saved[0], "processes": saved[1]}
    state = {"iteration": 2, "samples_seen": 2, "args": {}, "fingerprint": {}, "launch": record}
    (tmp_path / "checkpoint-2" / "state.json").write_text(json.dumps(state))
    patch_launch(monkeypatch, *launched)
    if fits:
        checkpoints.check_launch(tmp_path / "checkpoint-2")
    else:
        arguments = [*flags, "--output_dir", str(tmp_path), "--resume_from_checkpoint", "latest"]
        refused(
            script,
            arguments,
            2,
            f"made under {saved[0]} in {saved[1]} processes, and this is {launched[0]} in {launched[1]}",
            capsys,
        )


def test_8_bit_adam_is_refused_under_fsdp2(flags, tmp_path, monkeypatch):
    patch_launch(monkeypatch, "fsdp2", 2)
    args = script.parse_args([*flags, "--use_8bit_adam", "--output_dir", str(tmp_path)])
    with pytest.raises(UserError, match="--use_8bit_adam"):
        runtime_module.Runtime(args)


def test_shards_are_joined_along_their_first_dimension():
    full = torch.arange(10.0).view(5, 2)
    shards = [{"w": {"exp_avg": rows, "step": torch.tensor(3.0)}} for rows in (full[:3], full[3:], full[5:])]
    joined = join_shards(shards, "w")
    assert torch.equal(joined["exp_avg"], full) and joined["step"] == 3
    assert torch.equal(join_shards(shards, "w", slice(2, 4))["exp_avg"], full[2:4])


@pytest.fixture(scope="module")
def uninterrupted(flags, tmp_path_factory):
    """checkpoint-4 of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    script.main([*flags, "--output_dir", str(folder)])
    return folder / "checkpoint-4"


def test_a_checkpoint_of_another_discriminator_resolution_is_refused(uninterrupted, flags, tmp_path, capsys):
    arguments = [
        *flags,
        "--output_dir",
        str(tmp_path),
        "--resume_from_checkpoint",
        str(uninterrupted),
        "--discriminator_resolution",
        "32",
    ]
    refused(
        script,
        arguments,
        1,
        "made with another discriminator_resolution; give the discriminator_resolution it",
        capsys,
    )


def failing_loader(loader, num_batches: int, raises: bool):
    """Make a loader that meets unreadable data after some micro-batches: it raises, or continues with a `failure`."""

    class FailingLoader:
        failure = None

        def __iter__(self):
            for number, batch in enumerate(loader):
                if number == num_batches and raises:
                    raise UserError("--dataset_json data.json: lost.png; mend it")
                if number == num_batches:
                    self.failure = UserError("--dataset_json data.json: lost.png; mend it")
                yield batch

    return FailingLoader()


@pytest.mark.parametrize(
    "ending, code, iterations, message",
    [
        ([signal.SIGTERM], 143, 3, "stopped by SIGTERM; checkpoint-3 in .* is complete"),
        ([signal.SIGINT], 130, 3, "stopped by Ctrl-C; checkpoint-3 in .* is complete"),
        # From a terminal and from a launcher: still one Ctrl-C.
        ([signal.SIGINT, signal.SIGINT, signal.SIGTERM], 130, 3, "stopped by Ctrl-C; checkpoint-3 in .* is complete"),
        ("failure", 1, 3, "lost.png; mend it, checkpoint-3 is complete"),
        ("error", 1, 1, "lost.png; mend it, checkpoint-1 is complete"),
    ],
)
def test_an_interrupted_run_saves_and_resumes_to_the_same_weights(
    ending, code, iterations, message, uninterrupted, flags, tmp_path, monkeypatch
):
    def interrupted(iteration, *args):
        for number in ending if iteration == 1 else ():
            os.kill(os.getpid(), number)
        return iterate(iteration, *args)

    iterate, load = script.train_iteration, script.make_dataloader
    if isinstance(ending, list):
        monkeypatch.setattr(script, "train_iteration", interrupted)
    else:
        monkeypatch.setattr(
            script, "make_dataloader", lambda *args: failing_loader(load(*args), 1, raises=ending == "error")
        )
    arguments = [*flags, "--output_dir", str(tmp_path)]
    with pytest.raises(UserError, match=message) as error:
        script.main([*arguments, "--checkpointing_steps", "100"])
    assert error.value.exit_code == code
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == [f"checkpoint-{iterations}"]
    monkeypatch.setattr(script, "train_iteration", iterate)
    monkeypatch.setattr(script, "make_dataloader", load)
    script.main([*arguments, "--resume_from_checkpoint", f"checkpoint-{iterations}"])  # the bare name, as in diffusers
    assert_same(states(uninterrupted), states(tmp_path / "checkpoint-4"))


def test_unreadable_data_at_once_leaves_no_empty_checkpoint(flags, tmp_path, monkeypatch):
    load = script.make_dataloader
    monkeypatch.setattr(script, "make_dataloader", lambda *args: failing_loader(load(*args), 0, raises=True))
    with pytest.raises(UserError, match="lost.png; mend it, no checkpoint has been saved yet"):
        script.main([*flags, "--output_dir", str(tmp_path)])
    assert not list(tmp_path.glob("checkpoint-*"))


def test_unreadable_data_in_one_of_several_processes_names_the_last_checkpoint(flags, tmp_path, monkeypatch):
    """The others wait in a collective, so nothing more can be saved."""
    runtime = runtime_module.Runtime(script.parse_args([*flags, "--output_dir", str(tmp_path)]))
    metrics = Metrics(runtime, None, 1, tqdm(disable=True))
    runtime.saved = 7
    monkeypatch.setattr(Accelerator, "num_processes", 2)
    batches = metrics.batches(failing_loader([{}, {}], 1, raises=True), 5)
    assert next(batches) == [{}]
    with pytest.raises(UserError, match="lost.png; mend it, checkpoint-7 is complete") as error:
        next(batches)
    assert error.value.exit_code == 1 and not error.value.everywhere


CTRL_C_SCRIPT = """
import os, signal, sys
import senseflow.training.runtime as runtime_module, train_senseflow_flux as script
from senseflow.errors import run_script

train_iteration, make_models, when = script.train_iteration, script.make_models, sys.argv.pop(1)


def press(times):
    for _ in range(times):
        os.killpg(0, signal.SIGINT)  # as a terminal does: to the workers of the DataLoader, too


def interrupted_iteration(iteration, *args):
    press({"once": 1, "twice": 2}.get(when, 0) if iteration == 2 else 0)
    return train_iteration(iteration, *args)


def interrupted_loading(*args):
    press(when == "loading")
    return make_models(*args)


runtime_module.SAME_CTRL_C = 0
script.train_iteration, script.make_models = interrupted_iteration, interrupted_loading
run_script(lambda: script.main(sys.argv[1:]))
"""


@pytest.mark.parametrize("when, saved", [("loading", []), ("once", [2, 4]), ("twice", [2])])
def test_ctrl_c_is_one_line_and_130(when, saved, flags, tmp_path):
    arguments = [*flags, "--max_train_steps", "50", "--dataloader_num_workers", "1", "--output_dir", str(tmp_path)]
    arguments = [sys.executable, "-c", CTRL_C_SCRIPT, when, *keep_last(arguments)]
    alone = {key: value for key, value in os.environ.items() if key != "ACCELERATE_MIXED_PRECISION"}
    launched = alone | {"ACCELERATE_MIXED_PRECISION": "no"}  # by accelerate, which dies of the first Ctrl-C
    environment, again = (launched, r"kill -INT \d+") if when == "once" else (alone, "a second Ctrl-C")
    run = {"cwd": ROOT, "env": environment, "capture_output": True, "text": True, "start_new_session": True}
    ended = subprocess.run(arguments, **run)
    assert when == "loading" or re.search(rf"or the next; {again} ends at once", ended.stderr)
    assert ended.returncode == 130 and "Traceback" not in ended.stderr and "Worker" not in ended.stderr, ended.stderr
    last = {
        "loading": "stopped by Ctrl-C",
        "once": "checkpoint-4 in .* is complete",
        "twice": "at once by a second Ctrl-C",
    }[when]
    assert re.search(last, ended.stderr.splitlines()[-1]), ended.stderr
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == [f"checkpoint-{number}" for number in saved]


LATE_THREAD_SCRIPT = """
import atexit, os, torch
from senseflow.errors import run_script


class Thread:
    def __del__(self, abort=os.abort):
        abort()


thread = Thread()  # as one of gloo's that asks for the interpreter when it ends
atexit.register(print, "and unlocked")
run_script(lambda: print("trained", end=" "))
"""


def test_several_processes_end_without_finalization():
    ended = subprocess.run(
        [sys.executable, "-c", LATE_THREAD_SCRIPT],
        env={**os.environ, "WORLD_SIZE": "2"},
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert (ended.returncode, ended.stdout) == (0, "trained and unlocked\n")


def fail_on_sync(*_):
    raise AssertionError("the host waits for the device")


@pytest.mark.parametrize("fused", [True, False])
def test_a_step_is_clipped_and_taken_only_where_its_gradient_is_finite(fused, flags, tmp_path, monkeypatch):
    """Against AdamW's own steps. An optimizer that cannot skip (8-bit Adam; plain AdamW here) gets a zero gradient."""
    args = script.parse_args(
        [*flags, "--max_grad_norm", "0.5", "--learning_rate", "0.1", "--output_dir", str(tmp_path)]
    )
    torch.manual_seed(0)
    module = torch.nn.Linear(3, 2)
    expected = {name: torch.nn.Parameter(weight.detach().clone()) for name, weight in module.named_parameters()}
    adam = torch.optim.AdamW(expected.values(), lr=0.05, weight_decay=0)  # half of the rate: the warm-up's start
    role = runtime_module.Runtime(args).trained_role("student", module, 0.1)
    assert role.optimizer.defaults["fused"]
    if not fused:
        role.optimizer = torch.optim.AdamW(role.parameters.values(), lr=0.05, weight_decay=0)

    def state() -> list[torch.Tensor]:
        moments = [tensor for moments in role.optimizer.state.values() for tensor in moments.values()]
        return [tensor.clone() for tensor in (*role.parameters.values(), *moments)]

    for factor in (1.0, float("nan"), 0.01, float("inf"), 3.0):  # 0.01 is not clipped
        finite, before = abs(factor) < 10, state()
        for name, parameter in role.parameters.items():
            parameter.grad = torch.linspace(-1, 2, parameter.numel()).view_as(parameter) * factor
            expected[name].grad = parameter.grad.clone() if finite else torch.zeros_like(parameter)
        with monkeypatch.context() as context:
            for method in ("item", "tolist", "__bool__", "__float__"):
                context.setattr(torch.Tensor, method, fail_on_sync)
            if fused:  # a step that is not fused reads its own counter
                norm = role.step()
        norm = norm if fused else role.step()
        assert norm.isfinite() == finite and all(parameter.grad is None for parameter in role.parameters.values())
        if finite:
            assert norm == pytest.approx(torch.nn.utils.clip_grad_norm_(expected.values(), 0.5).item())
        if finite or not fused:
            adam.step()
        else:
            assert all(torch.equal(a, b) for a, b in zip(before, state(), strict=True))
        for group in (*adam.param_groups, *role.optimizer.param_groups):
            group["lr"] = 0.05
        torch.testing.assert_close(dict(role.parameters), expected)


class CountBfloat16Copies(TorchDispatchMode):
    """Count the copies of weights in bfloat16 that are in memory at once."""

    def __init__(self, shape):
        super().__init__()
        self.shape, self.copies, self.most = shape, [], 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and function is torch.ops.aten._to_copy.default:
            if out.dtype == torch.bfloat16 and out.shape == self.shape:
                self.copies = [copy for copy in self.copies if copy() is not None] + [weakref.ref(out)]
                self.most = max(self.most, len(self.copies))
        return out


class Layers(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(5, 5, bias=False) for _ in range(6))

    def forward(self, x):
        for layer in self.layers:
            x = x + torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False).sin()
        return x.float()


def test_gradient_checkpointing_keeps_bfloat16_copies_of_one_layer_at_a_time(flags, bfloat16, tmp_path):
    """And gradients equal those of torch's autocast, which keeps all copies until the forward ends."""
    runtime = runtime_module.Runtime(script.parse_args([*flags, *bfloat16, "--output_dir", str(tmp_path)]))
    torch.manual_seed(0)
    module, x = Layers(), torch.randn(3, 5)
    exact = copy.deepcopy(module)
    role = runtime.trained_role("student", module, 0.1)
    with CountBfloat16Copies(torch.Size([5, 5])) as ours, role.accumulate():
        role.backward(role(x).square().mean())
    with CountBfloat16Copies(torch.Size([5, 5])) as theirs, torch.autocast("cpu", torch.bfloat16):
        loss = exact(x).square().mean()
    loss.backward()
    assert ours.most <= 2 and theirs.most == 6
    for name, parameter in exact.named_parameters():
        assert parameter.grad.abs().sum() > 0
        torch.testing.assert_close(role.parameters[name].grad, parameter.grad, rtol=1e-2, atol=1e-3, msg=name)


def test_skipped_steps_are_counted_and_three_in_a_row_end_the_run(flags, tmp_path, monkeypatch):
    runtime = runtime_module.Runtime(script.parse_args([*flags, "--output_dir", str(tmp_path)]))
    role = runtime.trained_role("student", torch.nn.Linear(1, 1), 0.1)
    metrics, logged = Metrics(runtime, role, 1, tqdm(disable=True)), []
    monkeypatch.setattr(runtime, "log", lambda values, step: logged.append(values))
    nan, one = torch.tensor(float("nan")), torch.tensor(1.0)
    for iteration, norm in enumerate((one, nan, nan, one, nan, nan)):
        metrics.push(iteration, {"dmd_loss": one, "student_grad_norm": norm, "fake_score_grad_norm": one})
    metrics.push(6, {"fake_loss": one, "fake_score_grad_norm": nan})  # no student update
    assert [values["student_skipped_steps"] for values in logged] == [0, 1, 2, 2, 3, 4]
    assert [values["fake_score_skipped_steps"] for values in logged] == [0] * 6
    with pytest.raises(UserError, match="fake_score_grad_norm not finite 3 times in a row"):
        metrics.flush()


def test_a_tracker_that_does_not_start_is_refused_before_weights_load(flags, tmp_path, monkeypatch, capsys):
    def start(tracker):
        raise RuntimeError("No API key configured.\nUse `login`.")

    monkeypatch.setattr(TensorBoardTracker, "start", start)
    monkeypatch.setattr(script, "make_models", fail_on_sync)
    reason = (
        "--report_to tensorboard: does not start (RuntimeError: No API key configured. Use `login`.): log in to it"
    )
    refused(script, [*flags, "--report_to", "tensorboard", "--output_dir", str(tmp_path)], 2, reason, capsys)


def test_logged_names_suit_every_tracker_and_missing_images_are_warned_of(flags, tmp_path, monkeypatch, caplog):
    """mlflow has the strictest rule for names, and shows no images."""
    names = set()
    monkeypatch.setattr(TensorBoardTracker, "log", lambda _, values, step: names.update(values))
    monkeypatch.setattr(TensorBoardTracker, "log_images", lambda _, values, step, **kwargs: names.update(values))
    arguments = [*flags, "--report_to", "tensorboard", "--validation_prompts", "a", "--validation_steps", "2"]
    script.main([*arguments, "--output_dir", str(tmp_path / "shown")])
    assert {"dmd_loss", "real_logits", "student_skipped_steps", "validation/images"} <= names and len(names) > 15
    assert all(re.fullmatch(r"[\w\-. :/]+", name) and os.path.normpath(name) == name for name in names), names
    monkeypatch.delattr(TensorBoardTracker, "log_images")
    script.main([*arguments, "--output_dir", str(tmp_path / "missed")])
    assert caplog.text.count("tensorboard shows no images") == 1


def test_a_full_disk_is_one_line_and_earlier_checkpoints_stay(flags, tmp_path):
    """A limit on file sizes stands in for the disk: the second checkpoint cannot be written."""
    script.main([*flags, "--output_dir", str(tmp_path), "--max_train_steps", "2"])
    before = states(tmp_path / "checkpoint-2")
    command = [sys.executable, str(ROOT / "train_senseflow_flux.py"), *flags, "--output_dir", str(tmp_path)]
    limit = {"preexec_fn": lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))}
    ended = subprocess.run([*command, "--resume_from_checkpoint", "latest"], capture_output=True, text=True, **limit)
    assert ended.returncode == 1 and "Traceback" not in ended.stderr, ended.stderr
    assert f"error: --output_dir {tmp_path}: checkpoint-4 could not be written" in ended.stderr.splitlines()[-1]
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-2"]
    assert_same(before, states(tmp_path / "checkpoint-2"))


def test_deepspeed_is_not_imported_at_module_level():
    for file in (*ROOT.glob("*.py"), *ROOT.glob("senseflow/**/*.py")):
        assert not re.search(r"^(import|from) deepspeed", file.read_text(), re.MULTILINE), file


@pytest.mark.parametrize("offload, where", [(True, "cpu"), (False, "meta")])
def test_offloaded_encoders_run_on_the_cpu_and_their_output_goes_to_the_device(offload, where):
    """The device is `meta`, which computes nothing."""
    encoder, asked = torch.nn.Linear(1, 1), []
    encoder.device = torch.device(where)

    def encode(prompts, device):
        asked.append(str(device))
        return "untouched", torch.zeros(len(prompts), device=device)

    pipeline = SimpleNamespace(components={"text_encoder": encoder, "text_encoder_2": None}, encode_prompt=encode)
    text_encoders.place_text_encoders(SimpleNamespace(offload_text_encoders=offload), pipeline, "meta")
    assert encoder.weight.device.type == where and not encoder.weight.requires_grad
    assert pipeline.encode_prompt(["a"], device="meta")[1].device.type == "meta" and asked == [where]
