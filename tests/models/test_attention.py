"""Record which kernels of attention every script runs, and refuse those that do not run here."""

import sys
from types import SimpleNamespace

import diffusers.models.attention_dispatch
import diffusers.models.attention_processor
import pytest
import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from diffusers.models.attention_processor import Attention
from torch.nn.attention import _cur_sdpa_kernel_backends
from torch.utils._python_dispatch import TorchDispatchMode

import infer
import train_senseflow_flux
import train_senseflow_sd3
import train_senseflow_sdxl
from helpers import assert_same_image, built, missing, models_class, refused
from senseflow.arguments import ATTENTION_BACKENDS
from senseflow.memory.gpu_rules import gpu_rules
from senseflow.models import attention
from senseflow.training import models as training_models


SCRIPTS = {"flux": train_senseflow_flux, "sd3": train_senseflow_sd3, "sdxl": train_senseflow_sdxl}
NETWORKS = {"flux": FluxTransformer2DModel, "sd3": SD3Transformer2DModel, "sdxl": UNet2DConditionModel}
FLAG = "--enable_xformers_memory_efficient_attention"
FLASH, MATH = "_scaled_dot_product_flash_attention_for_cpu", "_safe_softmax"
BACKWARD = {FLASH: f"{FLASH}_backward", MATH: "_softmax_backward_data"}


class KernelRecorder(TorchDispatchMode):
    """Count the calls of torch's kernels of attention."""

    def __init__(self):
        super().__init__()
        self.calls = dict.fromkeys([*BACKWARD, *BACKWARD.values()], 0)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name in self.calls:
            self.calls[name] += 1
        return function(*args, **kwargs or {})


class TorchWithGPU:
    """torch that reports a GPU and makes its tensors on the CPU."""

    cuda = SimpleNamespace(is_available=lambda: True)

    def __getattr__(self, name):
        found = getattr(torch, name)
        if name not in ("zeros", "randn"):
            return found
        return lambda *shape, device=None, **how: found(*shape, **how)


@pytest.fixture
def attend(monkeypatch):
    """Replace xformers' attention; `attend.shapes` and `attend.dtypes` are the queries', keys' and values', and
    `attend.fails` is an error to raise.
    """
    attend = SimpleNamespace(shapes=[], dtypes=set(), fails=None)

    def memory_efficient_attention(query, key, value, attn_bias=None, p=0.0, scale=None, op=None):
        if attend.fails:
            raise attend.fails
        attend.shapes.append(query.shape)
        attend.dtypes |= {query.dtype, key.dtype, value.dtype}
        # xformers takes (B, L, heads, D), or (B, L, D).
        query, key, value = (each.transpose(1, -2) if each.ndim == 4 else each for each in (query, key, value))
        out = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_bias, scale=scale)
        return out.transpose(1, -2) if out.ndim == 4 else out

    ops = SimpleNamespace(memory_efficient_attention=memory_efficient_attention)
    package = SimpleNamespace(ops=ops, __spec__=object())
    monkeypatch.setitem(sys.modules, "xformers", package)
    monkeypatch.setitem(sys.modules, "xformers.ops", ops)
    monkeypatch.setattr(diffusers.models.attention_dispatch, "_CAN_USE_XFORMERS_ATTN", True)
    monkeypatch.setattr(diffusers.models.attention_dispatch, "xops", ops)
    monkeypatch.setattr(diffusers.models.attention_processor, "is_xformers_available", lambda: True)
    monkeypatch.setattr(diffusers.models.attention_processor, "xformers", package, raising=False)
    for module in (attention, training_models, diffusers.models.attention_processor):  # these look for a GPU
        monkeypatch.setattr(module, "torch", TorchWithGPU())
    return attend


@pytest.fixture(params=SCRIPTS)
def run(request, teachers, data, tmp_path):
    """Return (script, flags) without the adversarial term."""
    kind = request.param
    flags = ["--pretrained_model_name_or_path", str(teachers[kind]), "--dataset_json", str(data)]
    flags += ["--resolution", "64", "--gan_weight", "0", "--output_dir", str(tmp_path / "out")]
    flags += ["--train_batch_size", "2", *(["--max_sequence_length", "16"] if kind != "sdxl" else [])]
    return SCRIPTS[kind], flags


def test_every_role_uses_xformers(run, attend):
    script, flags = run
    x_t, t = torch.randn(2, *built(script, flags).models.latent_shape), torch.tensor([900.0, 500.0])

    @torch.no_grad()
    def predictions(models):
        condition, found = models.encode_prompts(("a red square", "blue")), []
        for role in (models.teacher, models.student, models.fake_score):
            attend.shapes.clear()
            found.append((models.predict(role, x_t, t, condition).x0, len(attend.shapes)))
        return found

    plain = predictions(built(script, flags).models)
    for (wanted, none), (x0, calls) in zip(plain, predictions(built(script, [*flags, FLAG]).models), strict=True):
        assert none == 0 and calls > 0
        torch.testing.assert_close(x0, wanted, atol=1e-5, rtol=1e-5)


def test_every_role_uses_the_kernel_forward_recomputed_and_backward(run):
    """With the same predictions and gradients as with torch's choice."""
    script, flags = run
    x_t, t = None, torch.tensor([900.0, 500.0])
    more = ["--rank", "4"] if script is train_senseflow_sd3 else []
    found = []
    for name in ([], ["--attention_backend", "_native_math"]):
        models = built(script, [*flags, *more, "--gradient_checkpointing", *name]).models
        condition = models.encode_prompts(("a red square", "blue"))
        x_t = torch.randn(2, *models.latent_shape) if x_t is None else x_t
        with torch.no_grad(), KernelRecorder() as frozen:
            x0 = models.predict(models.teacher, x_t, t, condition).x0
        outputs, calls = {"teacher": x0}, [frozen.calls]
        for role in (models.student, models.fake_score):
            with role.accumulate(), KernelRecorder() as trained:
                role.backward(models.predict(role, x_t, t, condition).x0.square().mean())
            outputs |= {f"{role.name} {key}": p.grad for key, p in role.parameters.items() if p.grad is not None}
            calls.append(trained.calls)
        found.append((outputs, calls))
    (plain, plain_calls), (math, math_calls) = found
    assert plain.keys() == math.keys() and len(plain) > 20
    for name in plain:
        torch.testing.assert_close(math[name], plain[name], atol=1e-5, rtol=1e-4, msg=name)
    for calls, kernel, other in ((plain_calls, FLASH, MATH), (math_calls, MATH, FLASH)):
        layers = calls[0][kernel]
        for role in calls:
            assert role[other] == role[BACKWARD[other]] == 0
        for role in calls[1:]:
            assert role[BACKWARD[kernel]] == layers > 0 and role[kernel] > layers  # recomputed


@pytest.mark.parametrize("kind", SCRIPTS)
def test_infer_uses_the_kernel(kind, teachers, tmp_path, monkeypatch, capsys):
    recorders, forward = [], NETWORKS[kind].forward

    def recorded(*args, **kwargs):
        with KernelRecorder() as recorder:
            recorders.append(recorder)
            return forward(*args, **kwargs)

    monkeypatch.setattr(NETWORKS[kind], "forward", recorded)
    arguments = ["--model", str(teachers[kind]), "--prompt", "a red square", "--num_inference_steps", "2"]
    arguments += ["--height", "64", "--width", "64", "--output_dir"]
    images = []
    for name, kernel, other in (("native", FLASH, MATH), ("_native_math", MATH, FLASH)):
        recorders.clear()
        infer.main([*arguments, str(tmp_path / name), "--attention_backend", name])
        assert recorders and all(each.calls[kernel] > 0 and each.calls[other] == 0 for each in recorders)
        images.append(infer.np.asarray(infer.Image.open(tmp_path / name / "0000.png")))
    assert_same_image(*images)
    capsys.readouterr()
    again = [*arguments, str(tmp_path / "native"), "--attention_backend", "_native_math"]
    refused(infer, again, 2, "was generated with attention_backend native, not _native_math", capsys)
    again[-1] = "xformers"
    missing(monkeypatch, "xformers")
    refused(infer, again, 2, "--attention_backend xformers: needs xformers, which is not installed", capsys)


class Recording:
    """A processor of attention that records the kernels which torch may use."""

    def __call__(self, layer, hidden_states, encoder_hidden_states=None, attention_mask=None, of_its_own=None):
        self.kernels, self.keyword = _cur_sdpa_kernel_backends(), of_its_own
        return hidden_states


@pytest.mark.parametrize("name", attention.TORCH_KERNELS)
def test_a_kernel_of_torch_holds_inside_of_the_layer_alone(name):
    network, before = torch.nn.Sequential(Attention(32, heads=2, dim_head=16, processor=Recording())), None
    before = _cur_sdpa_kernel_backends()
    attention.set_attention_backend(network, name)
    network[0](torch.randn(1, 4, 32), of_its_own=3)
    assert network[0].processor.kernels == [attention.TORCH_KERNELS[name]] and network[0].processor.keyword == 3
    assert _cur_sdpa_kernel_backends() == before


def test_a_layer_with_a_kernel_is_compiled_whole():
    layer = Attention(32, heads=2, dim_head=16)
    x = torch.randn(1, 4, 32)
    wanted = layer(x)
    attention.set_attention_backend(layer, "_native_math")
    torch.testing.assert_close(torch.compile(layer, backend="eager", fullgraph=True)(x), wanted)


@pytest.mark.parametrize("kind, name", [("flux", "flash"), ("flux", "xformers"), ("sd3", "xformers")])
def test_kernels_of_other_packages_get_one_precision_under_autocast(kind, name, teachers, attend, monkeypatch):
    """By CUDA's rules, which compute the norms of queries and keys in float32, and with weights in float32."""

    def flash(query, key, value, **_):
        return diffusers.models.attention_dispatch.xops.memory_efficient_attention(query, key, value)

    monkeypatch.setitem(_AttentionBackendRegistry._backends, AttentionBackendName.FLASH, flash)
    network = NETWORKS[kind].from_pretrained(teachers[kind], subfolder="transformer")
    attention.set_attention_backend(network, name)
    size, width = network.config.in_channels, network.config.joint_attention_dim
    inputs = {"encoder_hidden_states": torch.randn(1, 4, width), "timestep": torch.tensor([1.0])}
    inputs["pooled_projections"] = torch.randn(1, network.config.pooled_projection_dim)
    if kind == "flux":
        inputs |= {"hidden_states": torch.randn(1, 16, size), "guidance": torch.ones(1)}
        inputs |= {"img_ids": torch.zeros(16, 3), "txt_ids": torch.zeros(4, 3)}
    else:
        inputs["hidden_states"] = torch.randn(1, size, 8, 8)
    attend.dtypes.clear()  # diffusers has tried xformers
    with gpu_rules(), torch.autocast("cpu", torch.bfloat16):
        network(**inputs)
    assert attend.dtypes == {torch.bfloat16}


def test_names_are_those_of_diffusers():
    assert set(ATTENTION_BACKENDS) < {name.value for name in AttentionBackendName}


NO_KERNEL = "does not run here, on cpu in float32 with heads of 16 (No viable backend for scaled_dot_product"
REFUSED = [
    ("flux", "_native_cudnn", NO_KERNEL),
    ("sdxl", "_native_efficient", NO_KERNEL),
    ("flux", "flash", "needs flash_attn, which is not installed: pip install flash_attn"),
    ("flux", "_flash_3_hub", "needs kernels, which is not installed: pip install kernels"),
    ("sd3", "flash_varlen", "SD3Transformer2DModel does not go through diffusers' dispatcher, so it has torch's"),
    ("sdxl", "xformers", "needs xformers, which is not installed: pip install xformers"),
    ("sd3", "sage", "must be one of native, "),
]


@pytest.mark.parametrize("run, name, needle", REFUSED, indirect=["run"])
def test_a_kernel_that_does_not_run_is_refused_with_those_that_do(run, name, needle, monkeypatch, capsys):
    script, flags = run
    missing(monkeypatch, "flash_attn", "kernels", "xformers")
    with pytest.raises(SystemExit) as stop:
        infer.run_script(lambda: script.main([*flags, "--attention_backend", name]))
    (line,) = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and f"error: --attention_backend {name}: {needle}" in line
    runs = "native, _native_flash, _native_math" + ("" if script is train_senseflow_flux else ", flash")
    end = f"; give --attention_backend {runs}"
    assert line.endswith("xformers (sage has no backward pass) (see --help)" if name == "sage" else end)


def test_two_kernels_are_refused(run, capsys):
    script, flags = run
    two, problem = [*flags, FLAG, "--attention_backend", "native"], f"{FLAG} is given, too; drop one of both"
    refused(script, two, 2, f"--attention_backend native: {problem}", capsys)


def test_failing_xformers_is_refused(run, attend, capsys):
    script, flags = run
    attend.fails = NotImplementedError("No operator found:\n  many lines")
    fix = f"install its build for torch {torch.__version__}; give --attention_backend native"
    needle = f"{FLAG}: does not run here, on cuda in float32 with heads of 16 (No operator found): {fix}"
    refused(script, [*flags, FLAG], 2, needle, capsys)


def test_a_dry_run_takes_the_flag_and_ignores_it(run, caplog):
    script, flags = run
    args = script.parse_args([*flags, "--dry_run", "--attention_backend", "_native_cudnn"])
    script.prepare(models_class(script), args)
    assert args.attention_backend is None
    assert "--attention_backend: no effect in --dry_run" in caplog.text
