"""Compare the discriminator with hand computations."""

import shutil
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import spectral_norm
from transformers import Dinov2Config, Dinov2Model

from senseflow.errors import UserError
from senseflow.memory.counter import Counter, Work
from senseflow.memory.gpu_rules import gpu_rules
from senseflow.models.discriminator import (
    Discriminator,
    LocalBatchNorm,
    TextFeatures,
    VisionFeatures,
    check_discriminator_args,
    default_layers,
    diff_augment,
    load_discriminator,
)
from senseflow.models.weights import fingerprint
from senseflow_utils import StatelessRNG


def features(batch, channels=8, sizes=(9, 9), seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, channels, size, size, generator=generator) for size in sizes]


def test_local_batch_norm_groups_neighbors():
    norm = LocalBatchNorm(3)
    norm.virtual_batch = 4
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([1.0, 2.0, 3.0]))
        norm.bias.copy_(torch.tensor([0.5, 0.0, -0.5]))
    x = torch.randn(8, 3, 5, 6) * 3 + 1
    for group in (x[:4], x[4:]):
        expected = F.batch_norm(group, None, None, norm.weight, norm.bias, training=True, eps=1e-5)
        torch.testing.assert_close(norm(group), expected)
    torch.testing.assert_close(norm(x), torch.cat([norm(x[:4]), norm(x[4:])]))
    torch.testing.assert_close(norm(x[:1]), F.instance_norm(x[:1], weight=norm.weight, bias=norm.bias, eps=1e-5))
    # Six samples: groups of three, the largest divisor up to four.
    torch.testing.assert_close(norm(x[:6]), torch.cat([norm(x[:3]), norm(x[3:6])]))


def test_sizes_equal_the_release():
    """At 1024 px, 73 x 73 patches give 10 x 10 logits per head, 800 in all; width 1024 has about 772 M weights."""
    heads = Discriminator(4, 8, 6)
    (logits,) = heads((features(1, 4, [73] * 8),), features(1, 4, [73] * 8), torch.randn(1, 6))
    assert logits.shape == (1, 800)
    with torch.device("meta"):
        weights = sum(p.numel() for p in Discriminator(1024, 8, 768).parameters())
    assert round(weights / 1e6) in (772, 773)


def conv(inputs: int, outputs: int, kernel: int, stride: int = 1) -> torch.nn.Module:
    padding = {"padding": kernel // 2, "padding_mode": "circular"}
    return spectral_norm(torch.nn.Conv2d(inputs, outputs, kernel, stride, **padding))


class Block(torch.nn.Sequential):
    def __init__(self, channels: int, kernel: int):
        layers = conv(channels, channels, kernel), LocalBatchNorm(channels), torch.nn.LeakyReLU(0.2)
        super().__init__(*layers)


class Residual(Block):
    def forward(self, x):
        return (super().forward(x) + x) / 2**0.5


class OneByOne(torch.nn.Module):
    """The discriminator as a list of towers over torch's own spectral norm, with weights of its own."""

    def __init__(self, channels: int, num_maps: int, text_channels: int):
        super().__init__()

        def tower():
            layers = [Block(channels, 1)]
            for stage in range(3):
                layers += [conv(channels, channels, 3, 2)]
                layers += [Residual(channels, 3)] if stage < 2 else [conv(channels, 64, 1)]
            return torch.nn.Sequential(*layers)

        self.cls, self.refmap = (torch.nn.ModuleList(tower() for _ in range(num_maps)) for _ in range(2))
        self.cmap = torch.nn.Parameter(torch.randn(num_maps, 64, text_channels))

    def forward(self, images, reference, text):
        logits = [[] for _ in images]
        for head, (cls, refmap) in enumerate(zip(self.cls, self.refmap)):
            condition = F.linear(text, self.cmap[head] / text.shape[1] ** 0.5)[..., None, None]
            condition = condition + refmap(reference[head])
            with parametrize.cached():  # one power iteration for all images
                for per_head, maps in zip(logits, images):
                    per_head.append((cls(maps[head]) * condition).sum(1).flatten(1) / 8)
        return [torch.cat(per_head, 1) for per_head in logits]


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_towers_side_by_side_equal_towers_one_by_one(batch, checkpointing):
    """Logits, gradients and power iterations of three steps; the random weights at the start are the same, too."""
    torch.manual_seed(0)
    plain = OneByOne(8, 5, 6).train()  # a group of four maps and one of one
    torch.manual_seed(0)
    heads = Discriminator(8, 5, 6).train()
    for group in (*heads.cls, *heads.refmap):
        group.gradient_checkpointing = checkpointing
    for step in range(3):
        results = []
        for network in (plain, heads):
            images = [[f.requires_grad_() for f in features(batch, 8, [9] * 5, 10 * step + i)] for i in range(2)]
            logits = network(images, features(batch, 8, [9] * 5, 10 * step + 5), torch.full((batch, 6), step - 1.0))
            (logits[0].relu().mean() - logits[1].square().mean()).backward()
            results.append([*logits, *(f.grad for maps in images for f in maps)])
        torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)
    convolutions = [
        [module for module in tower.modules() if parametrize.is_parametrized(module)] for tower in plain.cls[:4]
    ]
    for index, stacked in enumerate(heads.cls[0].convs):
        norms = [tower[index].parametrizations.weight for tower in convolutions]
        weights = torch.cat([norm.original for norm in norms])
        torch.testing.assert_close(stacked.weight, weights, rtol=0, atol=0)
        gradients = torch.cat([norm.original.grad for norm in norms])
        torch.testing.assert_close(stacked.weight.grad, gradients, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(stacked.u[..., 0], torch.stack([norm[0]._u for norm in norms]))
        torch.testing.assert_close(stacked.v[..., 0], torch.stack([norm[0]._v for norm in norms]))
    torch.testing.assert_close(heads.cmap.weight.grad, plain.cmap.grad.flatten(0, 1), rtol=1e-5, atol=1e-6)


def test_logits_depend_on_text_and_reference_and_not_on_other_images():
    torch.manual_seed(0)
    heads = Discriminator(8, 2, 6).eval()
    image, reference, text = features(2, seed=1), features(2, seed=2), torch.randn(2, 6)
    (logits,) = heads((image,), reference, text)
    for changed in (((image,), reference, text + 1), ((image,), features(2, seed=4), text)):
        (other,) = heads(*changed)
        assert not torch.allclose(other, logits)
    first, _ = heads((image, features(2, seed=3)), reference, text)
    torch.testing.assert_close(first, logits)


def test_weights_are_normalized_and_the_reference_is_processed_once_per_call():
    torch.manual_seed(0)
    heads = Discriminator(8, 2, 6)
    runs = []
    for name in ("cls", "refmap"):
        getattr(heads, name)[0].register_forward_hook(lambda *_, name=name: runs.append(name))
    for _ in range(20):
        heads((features(2), features(2, seed=1)), features(2, seed=2), torch.randn(2, 6))
    assert sorted(runs) == ["cls"] * 20 + ["refmap"] * 20
    for conv in heads.cls[0].convs:
        largest = torch.linalg.matrix_norm(conv.weight.flatten(1).unflatten(0, (2, -1)), 2)
        torch.testing.assert_close(conv().flatten(), largest, rtol=0.05, atol=0)


def test_operations_and_bytes_of_its_turn():
    """At the width of DINOv2 large, one image of 1024 px, bf16 and checkpointing."""
    with FakeTensorMode(), Counter() as counter, gpu_rules():
        heads = Discriminator(1024, 8, 1280).train()
        for group in (*heads.cls, *heads.refmap):
            group.gradient_checkpointing = True
        real, fake, reference = ([torch.zeros(1, 1024, 73, 73) for _ in range(8)] for _ in range(3))
        counter.work.clear()
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            logits = heads((real, fake), reference, torch.zeros(1, 1280))
        (logits[0].mean() - logits[1].mean()).backward()
        work = sum(counter.work.values(), Work())
    assert work.operations < 1.05 * 1408 and work.bytes_moved < 1.05 * 93e9


def test_a_frozen_discriminator_does_not_change_and_passes_gradient_to_the_image():
    torch.manual_seed(0)
    heads = Discriminator(8, 2, 6).eval().requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in heads.state_dict().items()}
    image = [f.requires_grad_() for f in features(2)]
    (logits,) = heads((image,), features(2, seed=1), torch.randn(2, 6))
    logits.mean().backward()
    assert all(f.grad.abs().sum() > 0 for f in image) and all(p.grad is None for p in heads.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in heads.state_dict().items())
    heads.train()((image,), features(2, seed=1), torch.randn(2, 6))
    assert any(not torch.equal(before[name], tensor) for name, tensor in heads.state_dict().items()), (
        "training iterates u and v"
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_checkpointed_towers_train_identically_and_keep_only_their_input(dtype):
    """Compare gradients and power-iteration vectors over two training steps and one frozen step."""
    found = []
    for again in (False, True):
        torch.manual_seed(0)
        heads, kept, gradients = Discriminator(8, 2, 6).train(), [], []
        for group in (*heads.cls, *heads.refmap):
            group.gradient_checkpointing = again
        for step in range(3):
            heads.train(step < 2).requires_grad_(step < 2)
            image = [f.requires_grad_() for f in features(2)]
            with Counter() as counter, torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                logits = heads((image, features(2, seed=1)), features(2, seed=2), torch.ones(2, 6))
                kept.append(counter.live)
            (logits[0].mean() - logits[1].square().mean()).backward()
            gradients += [f.grad for f in image]
        found.append((kept, gradients, heads.state_dict(), [p.grad for p in heads.parameters()]))
    (most, *plain), (less, *again) = found
    assert less[0] < 0.5 * most[0] and less[2] < 0.8 * most[2]
    for one, other in zip(plain, again):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_heads_keep_float32_weights_under_bf16_autocast():
    torch.manual_seed(0)
    heads = Discriminator(8, 2, 6).eval()
    inputs = ((features(2),), features(2, seed=1), torch.randn(2, 6))
    with torch.autocast("cpu", torch.bfloat16):
        (low,) = heads(*inputs)
    (full,) = heads(*inputs)
    assert low.dtype == torch.float32 and not torch.equal(low, full)
    torch.testing.assert_close(low, full, atol=0.1, rtol=0.1)


def test_maps_are_the_backbones_patch_tokens_plus_cls(vision):
    path = vision / "dinov2"
    see, model = VisionFeatures(path), Dinov2Model.from_pretrained(path).eval()
    images = torch.rand(2, 3, 32, 32) * 2 - 1  # the backbone's size: no interpolation
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    normalized = ((images + 1) / 2 - mean.view(1, 3, 1, 1)) / std.view(1, 3, 1, 1)
    states = model(normalized, output_hidden_states=True).hidden_states
    maps = see(images)
    assert see.layers == [0, 1, 2, 3] and len(maps) == see.num_maps == 5
    for own, state in zip(maps, states):
        expected = (state[:, 1:] + state[:, :1]).transpose(1, 2).reshape(2, see.channels, 4, 4)
        torch.testing.assert_close(own, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(VisionFeatures(path, [1])(images)[1], maps[2])
    # A size that is not a multiple of the patch; gradient reaches the image but not the weights.
    wide = (torch.rand(1, 3, 50, 71) * 2 - 1).requires_grad_()
    maps = see(wide)
    assert {tuple(m.shape) for m in maps} == {(1, see.channels, 6, 8)}
    maps[-1].sum().backward()
    assert wide.grad.abs().sum() > 0 and all(not p.requires_grad and p.grad is None for p in see.parameters())


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    """Write a random DINOv2 of twelve blocks, deep enough for rounding errors to grow."""
    path = tmp_path_factory.mktemp("deep")
    torch.manual_seed(0)
    config = Dinov2Config(hidden_size=64, num_hidden_layers=12, num_attention_heads=4, image_size=56, patch_size=14)
    Dinov2Model(config).save_pretrained(path)
    return path


def seen(network: VisionFeatures) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the last map and the gradient of the image through it."""
    generator = torch.Generator().manual_seed(1)
    images = (torch.rand(2, 3, 56, 56, generator=generator) * 2 - 1).requires_grad_()
    last = network(images)[-1]
    (last * torch.randn(last.shape, generator=generator)).sum().backward()
    return last.detach(), images.grad


def test_under_bf16_norms_and_residual_stream_stay_float32(deep):
    """Layers are cast once to what autocast, on float32 weights, casts them to in every pass."""
    exact, ours, rounded = (
        VisionFeatures(deep, dtype=dtype) for dtype in (torch.float32, torch.bfloat16, torch.bfloat16)
    )
    rounded.bfloat16()  # as if its weights had been loaded in bf16
    types = []
    for block in ours.blocks:
        block.register_forward_hook(lambda _, inputs, output: types.append((inputs[0].dtype, output.dtype)))
        block.mlp.fc1.register_forward_hook(lambda _, inputs, output: types.append(output.dtype))
    wanted, got, pure = seen(exact), seen(ours), seen(rounded)
    by_autocast = VisionFeatures(deep)
    by_autocast.dtype = torch.bfloat16
    assert all(torch.equal(a, b) for a, b in zip(got, seen(by_autocast)))
    assert ours.blocks[0].norm1.weight.dtype == torch.float32 != ours.blocks[0].mlp.fc1.weight.dtype
    assert types == [torch.bfloat16, (torch.float32, torch.float32)] * 12
    for a, b, c in zip(wanted, got, pure):
        assert a.dtype == b.dtype == torch.float32
        assert 0 < (b - a).norm() < (c - a).norm() / 2
    # The fingerprint in a checkpoint does not depend on the precision.
    assert fingerprint(exact) == fingerprint(ours) == fingerprint(rounded)


def test_load_discriminator_applies_dtype_checkpointing_and_resolution(vision):
    paths = {"discriminator_backbone": vision / "dinov2", "discriminator_text_encoder": vision / "clip"}
    args = SimpleNamespace(**paths, discriminator_layers=None, discriminator_resolution=24, gradient_checkpointing=1)
    heads, network, _ = load_discriminator(args, torch.bfloat16, "cpu")
    assert all(group.gradient_checkpointing for group in (*heads.cls, *heads.refmap))
    assert network.dtype == torch.bfloat16 and network.gradient_checkpointing and network.resolution == 24


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_checkpointing_recomputes_the_blocks_with_equal_results(deep, dtype):
    runs = []
    for recomputes in (False, True):
        network = VisionFeatures(deep, dtype=dtype, gradient_checkpointing=recomputes)
        count = []
        for block in network.blocks:
            block.register_forward_pre_hook(lambda *_, count=count: count.append(1))
        runs.append((*seen(network), len(count)))
        with torch.no_grad():
            network(torch.zeros(1, 3, 56, 56))
        assert len(count) == runs[-1][2] + 12
    (maps, gradient, once), (maps_again, gradient_again, twice) = runs
    assert torch.equal(maps, maps_again) and torch.equal(gradient, gradient_again)
    assert (once, twice) == (12, 24)


def test_layers_scale_with_the_depth():
    assert default_layers(24) == [2, 5, 8, 10, 14, 19, 23]
    assert default_layers(12) == [1, 2, 3, 5, 7, 9, 11]
    assert default_layers(40) == [4, 9, 14, 17, 24, 32, 39]
    assert default_layers(4) == [0, 1, 2, 3]


def test_images_are_resized_to_discriminator_resolution(vision):
    whole, scaled = VisionFeatures(vision / "dinov2"), VisionFeatures(vision / "dinov2", resolution=24)
    # Antialiased bilinear resizing keeps the middle of a linear ramp exactly.
    slope = torch.linspace(-1, 1, 48).expand(1, 3, 48, 48).clone().requires_grad_()
    small = slope.detach().unflatten(3, (24, 2)).mean(4)[:, :, ::2]
    seen_of = []
    scaled.embeddings.patch_embeddings.projection.register_forward_pre_hook(
        lambda _, inputs: seen_of.append(inputs[0])
    )
    maps = scaled(slope)
    assert seen_of[0].shape == (1, 3, 24, 24)
    torch.testing.assert_close(
        (seen_of[0] * scaled.std + scaled.mean)[..., 2:-2] * 2 - 1, small[..., 2:-2], atol=1e-5, rtol=0
    )
    assert {tuple(m.shape[2:]) for m in maps} == {(3, 3)}
    maps[-1].sum().backward()
    assert (slope.grad != 0).all()
    assert scaled(torch.rand(1, 3, 40, 60))[0].shape[2:] == (3, 36 // 8)  # the shorter side is scaled to it
    images = torch.rand(2, 3, 24, 32) * 2 - 1  # already of that size: unchanged
    assert all(torch.equal(a, b) for a, b in zip(whole(images), scaled(images), strict=True))


@pytest.mark.parametrize(
    "flag, values",
    [("layers", ([0, 9], [-1, 2], [2, 1], [1, 1], [0, 3])), ("resolution", (0, 7, 65, 24)), ("resolution", (-8, 64))],
)
def test_bad_layers_and_resolutions_are_refused(vision, flag, values):
    """The last of the values is valid."""
    args = SimpleNamespace(
        discriminator_backbone=str(vision / "dinov2"),
        discriminator_text_encoder=str(vision / "clip"),
        discriminator_layers=None,
        discriminator_resolution=None,
        resolution=[96, 96],
        aspect_ratio_buckets=[[96, 96], [128, 64]],
    )
    for value in values[:-1]:
        setattr(args, f"discriminator_{flag}", value)
        with pytest.raises(UserError, match=f"--discriminator_{flag} ") as error:
            check_discriminator_args(args)
        assert error.value.exit_code == 2
    setattr(args, f"discriminator_{flag}", values[-1])
    check_discriminator_args(args)


def test_text_features_are_unit_vectors_independent_of_the_batch(vision):
    read = TextFeatures(vision / "clip")
    both = read(["a red square", "a much longer prompt about a blue dog in a tree"])
    torch.testing.assert_close(both.norm(dim=-1), torch.ones(2))
    torch.testing.assert_close(both[:1], read(["a red square"]), atol=1e-5, rtol=1e-5)
    assert (both[0] - both[1]).norm() > 0.01


def test_missing_weights_are_refused(vision, tmp_path):
    """transformers would warn and fill them with random numbers."""
    for name, kind in (("clip", TextFeatures), ("dinov2", VisionFeatures)):
        shutil.copytree(vision / name, tmp_path / name)
        weights = load_file(tmp_path / name / "model.safetensors")
        dropped = next(key for key in weights if "text_projection" in key or "layer.0.norm1.weight" in key)
        save_file({key: weights[key] for key in weights if key != dropped}, tmp_path / name / "model.safetensors")
        with pytest.raises(UserError, match="weights are missing"):
            kind(tmp_path / name)


def test_augmentation_depends_on_the_sample_and_the_name():
    images = torch.rand(3, 3, 20, 30) * 2 - 1
    rng = StatelessRNG(1, 2)
    both = diff_augment(images, rng, [4, 7, 9], "real")
    for i, sample_index in enumerate([4, 7, 9]):
        torch.testing.assert_close(both[i : i + 1], diff_augment(images[i : i + 1], rng, [sample_index], "real"))
    assert not torch.allclose(both, diff_augment(images, rng, [4, 7, 9], "fake"))
    assert not torch.allclose(both, diff_augment(images, StatelessRNG(1, 3), [4, 7, 9], "real"))


class Fixed(StatelessRNG):
    """Return one fraction of the range for every uniform number, except the named ones."""

    def __init__(self, fraction, **named):
        super().__init__(0, 0)
        self.fraction, self.named = fraction, named

    def uniform(self, name, sample_indices, low=0.0, high=1.0, shape=()):
        fraction = self.named.get(name.removeprefix("x_"), self.fraction)
        return torch.full((len(sample_indices),), low + (high - low) * fraction)


def test_augmentations_equal_a_hand_computation():
    x = torch.rand(1, 3, 20, 40) * 2 - 1
    # Brightness: +-.5; at half of their ranges, saturation, contrast and translation change nothing.
    corner = {"cutout_y": 0.0, "cutout_x": 0.0}
    keep = torch.ones(20, 40)
    keep[:2, :4] = 0  # 20 % of the sides (4 x 8) around the corner
    for fraction, shift in ((0.0, -0.5), (0.5, 0.0), (1.0, 0.5)):
        result = diff_augment(x, Fixed(0.5, brightness=fraction, **corner), [0], "x")
        torch.testing.assert_close(result, (x + shift) * keep)
    # Saturation 0 leaves each pixel's mean over the channels, 2 doubles the distance from it.
    grey = x.mean(1, keepdim=True)
    torch.testing.assert_close(
        diff_augment(x, Fixed(0.5, saturation=0.0, **corner), [0], "x"), grey.expand_as(x) * keep
    )
    torch.testing.assert_close(diff_augment(x, Fixed(0.5, saturation=1.0, **corner), [0], "x"), (2 * x - grey) * keep)
    # Contrast .5 and 1.5 about the image's mean.
    for fraction, factor in ((0.0, 0.5), (1.0, 1.5)):
        expected = (x.mean() + (x - x.mean()) * factor) * keep
        torch.testing.assert_close(diff_augment(x, Fixed(0.5, contrast=fraction, **corner), [0], "x"), expected)
    # Translation by 12.5 % of the sides, 3 rows and 5 columns in either direction, filled with zeros.
    moved = torch.zeros_like(x)
    moved[:, :, 3:, 5:] = x[:, :, :-3, :-5]
    far = {"translate_y": 0.9999, "translate_x": 0.9999}
    torch.testing.assert_close(diff_augment(x, Fixed(0.5, **far, **corner), [0], "x"), moved * keep)
    moved = torch.zeros_like(x)
    moved[:, :, :-3, :-5] = x[:, :, 3:, 5:]
    near = {"translate_y": 0.0, "translate_x": 0.0}
    torch.testing.assert_close(diff_augment(x, Fixed(0.5, **near, **corner), [0], "x"), moved * keep)
    # A cutout in the middle; gradient passes everywhere else.
    middle = x.clone().requires_grad_()
    result = diff_augment(middle, Fixed(0.5), [0], "x")
    assert (result == 0).all(1).sum() == 4 * 8 and (result[0, :, 8:12, 16:24] == 0).all()
    result.sum().backward()
    assert (middle.grad[0, :, 8:12, 16:24] == 0).all() and (middle.grad != 0).sum() == 3 * (20 * 40 - 4 * 8)
