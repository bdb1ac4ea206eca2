"""torch.compile of blocks on tiny networks: the same training, checkpoints and exports as without, and few graphs."""

import copy
import shutil

import pytest
import torch
from diffusers import FluxTransformer2DModel
from safetensors.torch import load_file
from torch._dynamo.utils import counters

import train_senseflow_flux
import train_senseflow_sdxl
from helpers import assert_same, built, states, training_runs, without, without_gan
from senseflow.errors import UserError
from senseflow.training.compilation import compile_blocks
from senseflow.training.roles import launch_config
from senseflow.training.runtime import Runtime


@pytest.fixture
def dynamo_backend(monkeypatch):
    """dynamo_backend(name): runs that start now are configured as by `accelerate launch --dynamo_backend NAME`."""

    def configure(name, mode="default"):
        launch_config.cache_clear()
        for variable, value in {"BACKEND": name.upper(), "MODE": mode, "USE_DYNAMIC": "False"}.items():
            monkeypatch.setenv(f"ACCELERATE_DYNAMO_{variable}", value)

    with torch._dynamo.config.patch(recompile_limit=8, optimize_ddp=True):  # which a run changes
        torch._dynamo.reset()
        counters.clear()
        yield configure
        torch._dynamo.reset()
    launch_config.cache_clear()
    training_runs.clear()  # --dry_run is the same without compilation


@pytest.fixture
def flags(vision, data):
    """Everything on, with the student in every second iteration."""
    return [
        *("--dataset_json", str(data), "--resolution", "64", "--report_to", "none", "--export_dtype", "fp32"),
        *("--discriminator_backbone", f"{vision}/dinov2", "--discriminator_text_encoder", f"{vision}/clip"),
        *"--train_batch_size 2 --ttur_ratio 2 --ida_decay 0.97 --max_train_steps 4 --checkpointing_steps 2".split(),
        *"--learning_rate 1e-3 --adam_epsilon 1e-3 --gradient_checkpointing --discriminator_layers 0 1 3".split(),
    ]


def num_graphs() -> int:
    assert not counters["graph_break"]
    return counters["stats"]["unique_graphs"]


def test_compiled_runs_train_resume_and_export_as_eager_ones(teacher, flags, dynamo_backend, tmp_path):
    """And resume each other. Validation compiles nothing."""
    script = train_senseflow_flux
    flags += ["--pretrained_model_name_or_path", str(teacher), "--max_sequence_length", "16"]
    eager, compiled, resumed, resumed_compiled = (tmp_path / name for name in ("eager", "compiled", "third", "fourth"))
    script.main([*flags, "--output_dir", str(eager)])
    assert num_graphs() == 0
    dynamo_backend("aot_eager")
    script.main([*flags, "--output_dir", str(compiled)])
    compiled_graphs = num_graphs()
    assert 20 <= compiled_graphs <= 32
    shutil.copytree(eager / "checkpoint-2", resumed_compiled / "checkpoint-2")
    resume = ["--resume_from_checkpoint", "latest"]
    dynamo_backend("aot_eager")
    validation = ["--validation_prompts", "a", "b", "--validation_steps", "3"]
    script.main([*flags, *resume, *validation, "--output_dir", str(resumed_compiled)])
    assert num_graphs() == compiled_graphs
    dynamo_backend("no")
    shutil.copytree(compiled / "checkpoint-2", resumed / "checkpoint-2")
    script.main([*flags, *resume, "--output_dir", str(resumed)])
    end = states(eager / "checkpoint-4")
    for run in (compiled, resumed, resumed_compiled):
        assert_same(end, states(run / "checkpoint-4"), rtol=0, atol=1e-5)
    files = [{str(path.relative_to(run)) for path in run.rglob("*")} for run in (eager, compiled)]
    assert files[0] == files[1]
    a, b = (load_file(run / "transformer" / "diffusion_pytorch_model.safetensors") for run in (eager, compiled))
    torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def test_graphs_are_those_of_the_first_two_iterations(teachers, flags, bfloat16, dynamo_backend, tmp_path):
    """One for each kind of call and shape of block, for student and fake score together.

    In bf16, where layers use copies of their weights, which change between the calls.
    """
    flags = [*without(without_gan(flags), "--discriminator_layers"), *bfloat16, "--rank", "4"]
    flags += ["--pretrained_model_name_or_path", str(teachers["sdxl"]), "--output_dir", str(tmp_path)]
    eager = built(train_senseflow_sdxl, flags)
    dynamo_backend("eager")
    run = built(train_senseflow_sdxl, flags)
    for iteration in range(2):
        run.step(iteration)
    assert 20 < num_graphs() <= 36
    with torch.compiler.set_stance("fail_on_recompile"):
        for iteration in range(2, 4):
            run.step(iteration)
    for iteration in range(4):
        eager.step(iteration)
    for role in ("student", "fake_score"):
        networks = [getattr(models, role).module for models in (eager.models, run.models)]
        a, b = (dict(network.named_parameters()) for network in networks)
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def test_inductor_trains_as_eager(teacher, flags, dynamo_backend, tmp_path):
    """One block, since compiling for the CPU is slow: a forward without gradient, a step, and another forward."""
    flags = [*flags, "--pretrained_model_name_or_path", str(teacher), "--output_dir", str(tmp_path)]
    torch.manual_seed(0)
    shape = {"num_layers": 0, "num_single_layers": 1, "attention_head_dim": 8, "num_attention_heads": 2}
    network = FluxTransformer2DModel(
        4, 4, 4, **shape, joint_attention_dim=8, pooled_projection_dim=8, axes_dims_rope=[2, 2, 4]
    )
    inputs = {
        "hidden_states": torch.randn(1, 4, 4),
        "encoder_hidden_states": torch.randn(1, 3, 8),
        "return_dict": False,
    }
    inputs |= {
        "pooled_projections": torch.randn(1, 8),
        "timestep": torch.ones(1),
        "img_ids": torch.ones(4, 3),
        "txt_ids": torch.ones(3, 3),
    }
    outputs = []
    for backend in ("no", "inductor"):
        dynamo_backend(backend)
        args = train_senseflow_flux.parse_args(flags)
        role = Runtime(args).trained_role("student", copy.deepcopy(network), 1e-2)
        with torch.no_grad():
            before = role(**inputs)[0]
        with role.accumulate():
            role.backward(role(**inputs)[0].square().mean())
        role.step()
        with torch.no_grad():
            outputs.append([before, role(**inputs)[0]])
    assert num_graphs() == 3
    torch.testing.assert_close(*outputs, rtol=0, atol=1e-5)
    assert (outputs[0][0] - outputs[0][1]).abs().max() > 1e-3


def test_a_dry_run_compiles_nothing_and_a_backend_that_does_not_run_is_refused(
    teacher, flags, dynamo_backend, tmp_path
):
    flags = [*flags, "--pretrained_model_name_or_path", str(teacher), "--output_dir", str(tmp_path)]
    dynamo_backend("fx2trt")
    with pytest.raises(UserError, match="dynamo_backend fx2trt, dynamo_mode default does not run here") as error:
        Runtime(train_senseflow_flux.parse_args(flags))
    assert error.value.exit_code == 2
    network = torch.nn.Sequential(torch.nn.Linear(1, 1))
    network._repeated_blocks = ["Linear"]
    Runtime(train_senseflow_flux.parse_args([*flags, "--dry_run"])).compile(network)
    assert "forward" not in vars(network[0])
    compile_blocks(network, {"backend": "eager"})
    assert "forward" in vars(network[0]) and list(network.state_dict()) == ["0.weight", "0.bias"]
