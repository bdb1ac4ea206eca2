"""evaluate.py and its metrics: closed forms, transformers' own scores, what is kept, and what is refused."""

import json
import logging
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_converters import hpsv2_shapes, imagereward_shapes, weights
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, Dinov2Model

import evaluate
import train_senseflow_flux as script
from helpers import refused
from senseflow.errors import UserError
from senseflow.evaluation import converters, scorers
from senseflow.evaluation.metrics import (
    bootstrap,
    centre_patch,
    cosine,
    diversity,
    frechet_distance,
    scaled_cosine,
    standard_error,
)
from tiny_pipelines import clip_config, clip_tokenizer


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("rows, others, width", [(400, 300, 6), (20, 15, 40), (60, 12, 20)])
def test_frechet_distance_of_gaussians(rows, others, width):
    """In closed form where covariances commute; of identical sets none; of any others as scipy's definition, by eigenvalues."""
    first, second = randn(rows, width), randn(others, width, seed=1) * 1.4 + 0.3
    assert frechet_distance(first, first) == pytest.approx(0, abs=1e-6 * first.var(0).sum().item())
    scaled = 3 * first + 2  # means m and 3 m + 2, covariances C and 9 C
    wanted = (2 * first.mean(0) + 2).square().sum() + 4 * first.var(0).sum()
    assert frechet_distance(first, scaled) == pytest.approx(wanted.item(), rel=1e-6)
    product = torch.cov(first.T) @ torch.cov(second.T)
    root = torch.linalg.eigvals(product).real.clamp(min=0).sqrt().sum()
    wanted = (first.mean(0) - second.mean(0)).square().sum() + first.var(0).sum() + second.var(0).sum() - 2 * root
    assert frechet_distance(first, second) == pytest.approx(wanted.item(), rel=1e-4)
    assert frechet_distance(first, second) == pytest.approx(frechet_distance(second, first), rel=1e-9)


def test_errors_are_over_prompts():
    scores, groups = torch.tensor([1.0, 3.0, 2.0, 6.0]), [0, 0, 1, 1]
    assert standard_error(scores, groups) == pytest.approx(math.sqrt(2) / math.sqrt(2))  # of the means 2 and 4
    assert math.isnan(standard_error(scores, [0, 0, 0, 0]))
    features = randn(300, 1)
    mean_of = lambda a, b: a.mean().item() - b.mean().item()  # noqa: E731
    found = bootstrap(mean_of, features, features, list(range(300)), 400)
    assert found == pytest.approx(features.std().item() / math.sqrt(300), rel=0.2)
    twins = features[:150].repeat_interleave(2, 0)  # images of one prompt are drawn together
    found = bootstrap(mean_of, twins, twins, [i // 2 for i in range(300)], 400)
    assert found == pytest.approx(features[:150].std().item() / math.sqrt(150), rel=0.2)


def test_diversity_is_within_prompts():
    x, y = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 2.0])
    features = torch.stack([x, 3 * x, y, -y, x, y, y])
    found = diversity(features, [0, 0, 1, 1, 2, 2, 3])
    assert found.tolist() == pytest.approx([0, 2, 1])  # the same, opposite, at right angles; and a prompt of one image
    assert len(diversity(features[:1], [0])) == 0


@pytest.mark.parametrize("size, corner", [((299, 299), (0, 0)), ((302, 300), (1, 0)), ((401, 511), (51, 106))])
def test_a_patch_is_the_unscaled_centre(size, corner):
    pixels = np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    left, top = corner
    assert np.array_equal(
        np.asarray(centre_patch(Image.fromarray(pixels))), pixels[top : top + 299, left : left + 299]
    )


# ---------------------------------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------------------------------
class Inception(torch.nn.Module):
    """In the place of the published one: called as it is, on uint8 images."""

    def forward(self, x: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        return torch.nn.functional.adaptive_avg_pool2d(x.float(), [4, 4]).flatten(1)


PROMPTS = ["a red circle", "a red circle", "a blue square", "a blue square", "a cat", "a cat"]


def draw(folder, seed, size=300, prompts=PROMPTS):
    folder.mkdir()
    rng = np.random.default_rng(seed)
    with open(folder / "metadata.jsonl", "w") as lines:
        for idx, prompt in enumerate(prompts):
            coarse = rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(coarse).resize((size + 3, size), Image.Resampling.BICUBIC).save(folder / f"{idx:04d}.png")
            lines.write(json.dumps({"file_name": f"{idx:04d}.png", "idx": idx, "prompt": prompt}) + "\n")
    return folder


@pytest.fixture
def folders(tmp_path):
    return draw(tmp_path / "student", 1), draw(tmp_path / "teacher", 2)


@pytest.fixture(scope="module")
def judges(tmp_path_factory, vision):
    """Flags of tiny networks of all kinds."""
    path, tokenizer = tmp_path_factory.mktemp("judges"), clip_tokenizer()
    torch.jit.script(Inception()).save(path / "inception.pt")
    sight = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "patch_size": 16,
    }
    config = CLIPConfig(
        text_config=clip_config(tokenizer).to_dict(), vision_config=sight | {"image_size": 64}, projection_dim=16
    )
    torch.manual_seed(0)
    model = CLIPModel(config).eval()
    for folder in (path / "clip", path / "dinov2"):
        size = {"size": {"shortest_edge": 64}, "crop_size": {"height": 64, "width": 64}}
        CLIPImageProcessorPil(**size).save_pretrained(folder)
    model.save_pretrained(path / "clip")
    tokenizer.save_pretrained(path / "clip")
    Dinov2Model.from_pretrained(vision / "dinov2").save_pretrained(path / "dinov2")
    torch.save(weights(hpsv2_shapes(len(tokenizer))), path / "hps.pt")
    torch.save(weights(imagereward_shapes(len(tokenizer))), path / "imagereward.pt")
    flags = ["--inception", path / "inception.pt", "--clip_model", path / "clip", "--pickscore_model", path / "clip"]
    flags += [
        "--hpsv2",
        path / "hps.pt",
        "--imagereward",
        path / "imagereward.pt",
        "--imagereward_tokenizer",
        path / "clip",
    ]
    return [str(word) for word in (*flags, "--feature_model", path / "dinov2", "--device", "cpu")]


def run(folders, judges, tmp_path, *more):
    student, teacher = folders
    command = ["--images", student, "--reference", teacher, "--output", tmp_path / "report.json", *judges, *more]
    evaluate.main([str(word) for word in command])
    return json.loads((tmp_path / "report.json").read_text())["metrics"]


def test_all_metrics_and_the_table(folders, judges, tmp_path, caplog):
    """Each against what transformers, or numpy on the images' pixels, says."""
    table = tmp_path / "table.md"
    asked = ["--metrics", *evaluate.METRICS, "--append_to", table, "--bootstrap", "3"]
    with caplog.at_level(logging.WARNING):
        found = run(folders, judges, tmp_path, *asked, "--batch_size", "4", "--clip_prefix", "A photo depicts ")
    assert "fid: of 6 and 6 images, in 48 dimensions" in caplog.text
    run(folders, judges, tmp_path, "--metrics", "clip", "--append_to", table)
    lines = table.read_text().splitlines()
    assert (
        len(lines) == 4
        and lines[0] == "| | n | FID-T | Patch FID-T | CLIP | HPSv2 | Pick | ImageReward | FD | diversity |"
    )
    assert all(line.count("|") == 11 for line in lines) and f"{found['fid']['value']:.4g} ± " in lines[2]

    images = [[Image.open(folder / f"{i:04d}.png") for i in range(6)] for folder in folders]
    look = Inception()
    pixels = [[torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] for image in own] for own in images]
    features = [torch.cat([look(image) for image in own]) for own in pixels]
    assert found["fid"]["value"] == pytest.approx(frechet_distance(*features), rel=1e-6)
    features = [torch.cat([look(image[..., :299, 2:301]) for image in own]) for own in pixels]
    assert found["patch_fid"]["value"] == pytest.approx(frechet_distance(*features), rel=1e-6)

    path = judges[judges.index("--clip_model") + 1]
    model, process, tokenizer = (
        CLIPModel.from_pretrained(path),
        CLIPImageProcessorPil.from_pretrained(path),
        clip_tokenizer(),
    )
    shown = process(images=images[0], return_tensors="pt")
    for name, prefix in (("clip", "A photo depicts "), ("pickscore", "")):
        texts = tokenizer([prefix + prompt for prompt in PROMPTS], padding=True, return_tensors="pt")
        with torch.no_grad():
            logits = model(**shown, **texts).logits_per_image.diag()
        wanted = logits.mean() / (model.logit_scale.exp() if name == "clip" else 1)
        assert found[name]["value"] == pytest.approx(wanted.item(), rel=1e-4)
        assert found[name]["n"] == 6 and found[name]["standard_error"] > 0
    files = [Path(judges[judges.index(flag) + 1]) for flag in ("--hpsv2", "--imagereward")]
    score, reward = converters.read_hpsv2(files[0]), converters.read_imagereward(files[1])
    shown = torch.stack([converters.hpsv2_pixels(28, image) for image in images[0]])
    texts = tokenizer(PROMPTS, padding=True, truncation=True, max_length=8, return_tensors="pt")
    with torch.no_grad():
        said = score(pixel_values=shown, **texts)
    wanted = (said.image_embeds * said.text_embeds).sum(1).mean().item()
    assert found["hpsv2"]["value"] == pytest.approx(wanted, rel=1e-4)
    shown = torch.stack([converters.imagereward_pixels(32, image) for image in images[0]])
    texts = tokenizer(PROMPTS, padding="max_length", truncation=True, max_length=35, return_tensors="pt")
    with torch.no_grad():
        scores = reward(shown, texts.input_ids, texts.attention_mask)
    assert found["imagereward"]["value"] == pytest.approx(scores.mean().item(), rel=1e-4) and scores.std() > 1e-4
    dino = Dinov2Model.from_pretrained(judges[judges.index("--feature_model") + 1]).eval()
    with torch.no_grad():
        features = [dino(**process(images=own, return_tensors="pt")).last_hidden_state[:, 0] for own in images]
    assert found["fd"]["value"] == pytest.approx(frechet_distance(*features), rel=1e-3)
    groups = [0, 0, 1, 1, 2, 2]
    own, theirs = (diversity(each, groups).mean().item() for each in features)
    assert found["diversity"]["value"] == pytest.approx(own, rel=1e-3)
    assert found["diversity"]["share_of_reference"] == pytest.approx(own / theirs, rel=1e-3)
    torch.testing.assert_close(cosine(features[0], features[1]) * math.e, scaled_cosine(features[0], features[1], 1.0))


def test_features_are_kept_until_a_image_changes_and_a_killed_run_goes_on(folders, judges, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "CHUNK", 2)
    looked = []
    load = scorers.load_inception

    def counted(*args, **kwargs):
        network = load(*args, **kwargs)
        look = network.look
        network.look = lambda batch: looked.extend(range(len(batch))) or look(batch)
        return network

    def cannot(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(scorers, "load_inception", counted)
    keep, calls = evaluate.keep, []
    monkeypatch.setattr(evaluate, "keep", lambda *args: calls.append(1) or (keep if len(calls) < 3 else cannot)(*args))
    with pytest.raises(KeyboardInterrupt):
        run(folders, judges, tmp_path, "--metrics", "fid")
    monkeypatch.setattr(evaluate, "keep", keep)
    looked.clear()
    first = run(folders, judges, tmp_path, "--metrics", "fid")
    assert len(looked) == 12 - 4  # two chunks were there
    looked.clear()
    assert run(folders, judges, tmp_path, "--metrics", "fid") == first and not looked
    Image.open(folders[1] / "0001.png").save(folders[0] / "0003.png")
    os.utime(folders[0] / "0003.png", ns=(0, 0))
    other = run(folders, judges, tmp_path, "--metrics", "fid")
    assert len(looked) == 2 and other != first


def test_real_images_and_a_file_of_prompts(folders, judges, tmp_path):
    student, teacher = folders
    rows = {
        "keys": list("abcdef"),
        "image_paths": [f"teacher/{i:04d}.png" for i in range(6)],
        "prompts": [["x", "y"]] * 6,
    }
    (tmp_path / "real.json").write_text(json.dumps(rows))
    (student / "metadata.jsonl").unlink()
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    plain = run(folders, judges, tmp_path, "--metrics", "fid", "clip", "--prompts_file", tmp_path / "prompts.txt")
    real = run((student, tmp_path / "real.json"), judges, tmp_path, "--metrics", "fid")
    assert real["fid"]["value"] == pytest.approx(plain["fid"]["value"], rel=1e-6) and plain["clip"]["n"] == 6


REFUSED = {
    "no folder": (["--images", "{root}/none"], "--images {root}/none: is no folder"),
    "no images": (["--images", "{root}/empty"], "--images {root}/empty: holds no image"),
    "unreadable": (["--images", "{root}/broken"], "1 images cannot be read, one is 0001.png"),
    "no reference": (["--metrics", "fd"], "--metrics fd: compares with other images; give --reference"),
    "no prompts": (["--images", "{root}/bare", "--metrics", "clip"], "--metrics clip: no prompt is known of"),
    "too few prompts": (
        ["--images", "{root}/bare", "--prompts_file", "{root}/one.txt"],
        "no line is that of 0001.png",
    ),
    "a line cut": (["--images", "{root}/cut"], "metadata.jsonl has no prompt of 1 images, one is 0001.png"),
    "other prompts": (["--metrics", "fid", "--reference", "{root}/other"], "are of different prompts"),
    "small": (
        ["--metrics", "patch_fid", "--reference", "{root}/small"],
        "0000.png is 67 x 64, smaller than a patch of 299",
    ),
    "inception": (
        ["--metrics", "fid", "--reference", "{root}/student", "--inception", "none.pt"],
        "--inception none.pt: is no file",
    ),
    "hpsv2": (
        ["--metrics", "hpsv2", "--hpsv2", "none"],
        "--hpsv2 none: is no file, and --metrics hpsv2 needs HPS_v2.1_compr",
    ),
    "device": (["--device", "nowhere"], "--device nowhere: not available here"),
    "no checkpoints": (
        ["--checkpoints", "{root}/empty", "--prompts_file", "x"],
        "{root}/empty: holds no checkpoint-N",
    ),
    "captions": (
        ["--reference", "{root}/cut/metadata.jsonl", "--metrics", "fd"],
        "no images and captions can be read",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_one_line_before_a_network_loads(case, judges, tmp_path, capsys, monkeypatch):
    for name in ("student", "broken", "bare", "cut"):
        draw(tmp_path / name, 0, prompts=["a", "b"])
    draw(tmp_path / "other", 0, prompts=["a", "c"])
    draw(tmp_path / "small", 0, size=64, prompts=["a", "b"])
    (tmp_path / "empty").mkdir()
    (tmp_path / "one.txt").write_text("a\n")
    (tmp_path / "broken/0001.png").write_bytes(b"no image")
    (tmp_path / "bare/metadata.jsonl").unlink()
    lines = (tmp_path / "cut/metadata.jsonl").read_text().splitlines()
    (tmp_path / "cut/metadata.jsonl").write_text(lines[0] + "\n" + lines[1][:9])
    for name in ("load_inception", "load_vision", "load_clip", "load_hpsv2", "load_imagereward"):
        monkeypatch.setattr(
            scorers, name, lambda *args, **kwargs: pytest.fail("a network was loaded before the check")
        )
    flags, needle = REFUSED[case]
    given = [] if "--checkpoints" in flags else ["--images", str(tmp_path / "student")]
    arguments = [*given, *judges, *(flag.format(root=tmp_path) for flag in flags)]
    refused(evaluate, arguments, 2, needle.format(root=tmp_path), capsys)


def test_a_image_that_breaks_off_is_named(folders, judges, tmp_path):
    file = folders[0] / "0004.png"
    file.write_bytes(file.read_bytes()[:500])
    with pytest.raises(UserError, match=rf"{file}: cannot be read \(image file is truncated\)") as caught:
        run(folders, judges, tmp_path, "--metrics", "fid")
    assert caught.value.exit_code == 2


def test_every_checkpoint_of_a_run(teacher, data, judges, tmp_path):
    """Drawn, measured, and drawn as curves."""
    run = tmp_path / "run"
    arguments = ["--pretrained_model_name_or_path", str(teacher), "--dataset_json", str(data), "--resolution", "64"]
    arguments += [
        "--gan_weight",
        "0",
        "--max_train_steps",
        "2",
        "--ttur_ratio",
        "1",
        "--learning_rate",
        "0.1",
        "--lr_warmup_steps",
        "0",
    ]
    arguments += ["--checkpointing_steps", "1", "--report_to", "none", "--max_sequence_length", "16"]
    script.main([*arguments, "--output_dir", str(run)])
    (tmp_path / "prompts.txt").write_text("a red circle\na red circle\na cat\n")
    command = ["--checkpoints", str(run), "--prompts_file", str(tmp_path / "prompts.txt"), *judges]
    command += ["--metrics", "clip", "diversity", "--output", str(tmp_path / "report.json")]
    command += ["--append_to", str(tmp_path / "table.md")]
    evaluate.main(command)
    report = json.loads((tmp_path / "report.json").read_text())["checkpoints"]
    assert list(report) == ["checkpoint-1", "checkpoint-2"] and report["checkpoint-1"] != report["checkpoint-2"]
    rows = (tmp_path / "table.md").read_text().splitlines()[2:]
    assert [row.split("|")[1].strip() for row in rows] == list(report)
    assert Image.open(run / "evaluation" / "curves.png").size[0] > 500
