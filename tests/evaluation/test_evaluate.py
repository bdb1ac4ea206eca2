"""evaluate.py and its metrics: closed forms, transformers' own scores, the cache, and bad input."""

import json
import logging
import math
import os
import pickle
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from published_files import hpsv2_config, hpsv2_weights, imagereward_config, imagereward_weights
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor, CLIPConfig, CLIPImageProcessorPil, CLIPModel, Dinov2Model

import evaluate
import train_senseflow_flux as script
from helpers import ROOT, refused
from senseflow.errors import UserError
from senseflow.evaluation import converters, scorers
from senseflow.evaluation.converters import ImageReward, load_published, transformer_sizes
from senseflow.evaluation.image_sets import read_image_set
from senseflow.evaluation.metrics import (
    bootstrap_error,
    center_patch,
    clip_score,
    diversity,
    frechet_distance,
    pickscore,
    standard_error,
)
from tiny_pipelines import clip_config, clip_tokenizer


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("rows, others, width", [(400, 300, 6), (20, 15, 40), (60, 12, 20)])
def test_frechet_distance_of_gaussians(rows, others, width):
    """It is 0 for identical sets, in closed form where covariances commute, and else as defined, by eigenvalues."""
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
    assert standard_error(scores, [0, 0, 0, 0]) is None
    features = randn(300, 1)

    def mean_difference(a, b):
        return a.mean().item() - b.mean().item()

    error = bootstrap_error(mean_difference, features, features, list(range(300)), 400)
    assert error == pytest.approx(features.std().item() / math.sqrt(300), rel=0.2)
    pairs = features[:150].repeat_interleave(2, 0)  # images of one prompt are resampled together
    error = bootstrap_error(mean_difference, pairs, pairs, [i // 2 for i in range(300)], 400)
    assert error == pytest.approx(features[:150].std().item() / math.sqrt(150), rel=0.2)


def test_diversity_is_within_prompts():
    x, y = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 2.0])
    features = torch.stack([x, 3 * x, y, -y, x, y, y])
    spreads = diversity(features, [0, 0, 1, 1, 2, 2, 3])
    assert spreads.tolist() == pytest.approx([0, 2, 1])  # parallel, opposite, orthogonal; and a prompt with one image
    assert len(diversity(features[:1], [0])) == 0


@pytest.mark.parametrize("size, corner", [((299, 299), (0, 0)), ((302, 300), (1, 0)), ((401, 511), (51, 106))])
def test_center_patch_is_not_scaled(size, corner):
    pixels = np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    left, top = corner
    patch = np.asarray(center_patch(Image.fromarray(pixels)))
    assert np.array_equal(patch, pixels[top : top + 299, left : left + 299])


def test_help_imports_no_torch():
    code = "import sys, runpy; sys.argv = ['evaluate.py', '--help']\n"
    code += f"try: runpy.run_path({str(ROOT / 'evaluate.py')!r}, run_name='__main__')\n"
    code += "except SystemExit: print(sorted({'torch', 'transformers', 'diffusers', 'datasets'} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "--feature_model" in run.stdout and run.stdout.splitlines()[-1] == "[]"


# ---------------------------------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------------------------------
class Inception(torch.nn.Module):
    """Takes the place of the published network, and has its interface: uint8 images."""

    def forward(self, x: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        return torch.nn.functional.adaptive_avg_pool2d(x.float(), [4, 4]).flatten(1)


PROMPTS = ["a red circle", "a red circle", "a blue square", "a blue square", "a\u2028cat", "a\u2028cat"]


def generate(folder, seed, size=300, prompts=PROMPTS):
    folder.mkdir()
    rng = np.random.default_rng(seed)
    with open(folder / "metadata.jsonl", "w") as lines:
        for idx, prompt in enumerate(prompts):
            coarse = rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(coarse).resize((size + 3, size), Image.Resampling.BICUBIC).save(folder / f"{idx:04d}.png")
            lines.write(
                json.dumps({"file_name": f"{idx:04d}.png", "idx": idx, "prompt": prompt}, ensure_ascii=False) + "\n"
            )
    return folder


@pytest.fixture
def folders(tmp_path):
    return generate(tmp_path / "student", 1), generate(tmp_path / "teacher", 2)


@pytest.fixture(scope="module")
def network_flags(tmp_path_factory, vision):
    """Flags of tiny networks of all kinds."""
    path, tokenizer = tmp_path_factory.mktemp("networks"), clip_tokenizer()
    torch.jit.script(Inception()).save(path / "inception.pt")
    sizes = transformer_sizes(32, layers=2, heads=2) | {"patch_size": 16, "image_size": 64}
    config = CLIPConfig(text_config=clip_config(tokenizer).to_dict(), vision_config=sizes, projection_dim=16)
    torch.manual_seed(0)
    CLIPModel(config).save_pretrained(path / "clip")
    tokenizer.save_pretrained(path / "clip")
    size = {"size": {"shortest_edge": 64}, "crop_size": {"height": 64, "width": 64}}
    CLIPImageProcessorPil(**size).save_pretrained(path / "clip")
    torch.save(hpsv2_weights(len(tokenizer)), path / "hps.pt")
    torch.save(imagereward_weights(len(tokenizer)), path / "imagereward.pt")
    flags = ["--inception", path / "inception.pt", "--clip_model", path / "clip", "--pickscore_model", path / "clip"]
    flags += ["--hpsv2", path / "hps.pt", "--imagereward", path / "imagereward.pt"]
    flags += ["--imagereward_tokenizer", path / "clip", "--feature_model", vision / "dinov2", "--device", "cpu"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(converters, "HPSV2_CONFIG", hpsv2_config(len(tokenizer)))
        patch.setattr(converters, "IMAGEREWARD_CONFIG", imagereward_config(len(tokenizer)))
        yield [str(word) for word in flags]


def run(folders, network_flags, tmp_path, *more):
    student, teacher = folders
    output = tmp_path / "report.json"
    command = ["--images", student, "--reference", teacher, "--output", output, *network_flags, *more]
    evaluate.main([str(word) for word in command])
    return json.loads(output.read_text())["metrics"]


def test_all_metrics_and_the_table(folders, network_flags, tmp_path, caplog):
    """Each metric equals what transformers, or numpy on the images' pixels, computes."""
    table = tmp_path / "table.md"
    flags = ["--metrics", *evaluate.METRICS, "--append_to", table, "--bootstrap", "3", "--batch_size", "4"]
    with caplog.at_level(logging.WARNING):
        results = run(folders, network_flags, tmp_path, *flags, "--clip_prefix", "A photo depicts ")
    assert "fid: 6 and 6 images for 48 dimensions" in caplog.text
    run(folders, network_flags, tmp_path, "--metrics", "clip", "--append_to", table)
    lines = table.read_text().splitlines()
    assert len(lines) == 4
    assert lines[0] == "| | n | FID-T | Patch FID-T | CLIP | HPSv2 | Pick | ImageReward | FD | diversity |"
    assert all(line.count("|") == 11 for line in lines) and f"{results['fid']['value']:.4g} ± " in lines[2]

    images = [[Image.open(folder / f"{i:04d}.png") for i in range(6)] for folder in folders]
    inception = Inception()
    pixels = [[torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] for image in each] for each in images]
    features = [torch.cat([inception(image) for image in each]) for each in pixels]
    assert results["fid"]["value"] == pytest.approx(frechet_distance(*features), rel=1e-6)
    features = [torch.cat([inception(image[..., :299, 2:301]) for image in each]) for each in pixels]
    assert results["patch_fid"]["value"] == pytest.approx(frechet_distance(*features), rel=1e-6)

    def path_of(flag):
        return Path(network_flags[network_flags.index(flag) + 1])

    clip, tokenizer = CLIPModel.from_pretrained(path_of("--clip_model")), clip_tokenizer()
    process = CLIPImageProcessorPil.from_pretrained(path_of("--clip_model"))
    inputs = process(images=images[0], return_tensors="pt")
    for name, prefix in (("clip", "A photo depicts "), ("pickscore", "")):
        tokens = tokenizer([prefix + prompt for prompt in PROMPTS], padding=True, return_tensors="pt")
        with torch.no_grad():
            logits = clip(**inputs, **tokens).logits_per_image.diag()
        wanted = logits.mean() / (clip.logit_scale.exp() if name == "clip" else 1)
        assert results[name]["value"] == pytest.approx(wanted.item(), rel=1e-4)
        assert results[name]["n"] == 6 and results[name]["standard_error"] > 0

    hpsv2 = load_published("", path_of("--hpsv2"), CLIPModel(hpsv2_config(len(tokenizer))))
    inputs = torch.stack([converters.hpsv2_pixels(28, image) for image in images[0]])
    tokens = tokenizer(PROMPTS, padding=True, truncation=True, max_length=8, return_tensors="pt")
    with torch.no_grad():
        outputs = hpsv2(pixel_values=inputs, **tokens)
    wanted = (outputs.image_embeds * outputs.text_embeds).sum(1).mean().item()
    assert results["hpsv2"]["value"] == pytest.approx(wanted, rel=1e-4)

    reward = load_published("", path_of("--imagereward"), ImageReward(imagereward_config(len(tokenizer))))
    inputs = torch.stack([converters.imagereward_pixels(32, image) for image in images[0]])
    tokens = tokenizer(PROMPTS, padding="max_length", truncation=True, max_length=35, return_tensors="pt")
    with torch.no_grad():
        scores = reward(inputs, tokens.input_ids, tokens.attention_mask)
    assert results["imagereward"]["value"] == pytest.approx(scores.mean().item(), rel=1e-4) and scores.std() > 1e-4

    dino = Dinov2Model.from_pretrained(path_of("--feature_model")).eval()
    process = AutoImageProcessor.from_pretrained(path_of("--feature_model"))
    with torch.no_grad():
        features = [dino(**process(images=each, return_tensors="pt")).last_hidden_state[:, 0] for each in images]
    assert results["fd"]["value"] == pytest.approx(frechet_distance(*features), rel=1e-3)
    student, teacher = (diversity(each, [0, 0, 1, 1, 2, 2]).mean().item() for each in features)
    assert results["diversity"]["value"] == pytest.approx(student, rel=1e-3)
    assert results["diversity"]["share_of_reference"] == pytest.approx(student / teacher, rel=1e-3)
    torch.testing.assert_close(clip_score(*features) * math.e, pickscore(*features, 1.0))


def test_features_are_cached_until_an_image_changes(folders, network_flags, tmp_path, monkeypatch):
    """A killed run continues where it stopped."""
    monkeypatch.setattr(scorers, "CHUNK_SIZE", 2)
    encoded, load, write = [], scorers.load_inception, scorers.write_features

    def load_and_count(*args):
        scorer = load(*args)
        network = scorer.encode_images
        scorer.encode_images = lambda batch: encoded.extend(batch) or network(batch)
        return scorer

    def stop_at_third_chunk(*args):
        if len(encoded) > 4:
            raise KeyboardInterrupt
        write(*args)

    monkeypatch.setattr(scorers, "load_inception", load_and_count)
    monkeypatch.setattr(scorers, "write_features", stop_at_third_chunk)
    with pytest.raises(KeyboardInterrupt):
        run(folders, network_flags, tmp_path, "--metrics", "fid")
    monkeypatch.setattr(scorers, "write_features", write)
    encoded.clear()
    first = run(folders, network_flags, tmp_path, "--metrics", "fid")
    assert len(encoded) == 12 - 4  # two chunks were cached
    encoded.clear()
    assert run(folders, network_flags, tmp_path, "--metrics", "fid") == first and not encoded
    Image.open(folders[1] / "0001.png").save(folders[0] / "0003.png")
    os.utime(folders[0] / "0003.png", ns=(0, 0))
    assert run(folders, network_flags, tmp_path, "--metrics", "fid") != first and len(encoded) == 2


def other_image_processor(folder):
    CLIPImageProcessorPil(size={"shortest_edge": 32}, do_center_crop=False).save_pretrained(folder)


def other_configuration(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"hidden_act": "relu"}))


def other_last_values(folder):
    weights = load_file(folder / "model.safetensors")
    for tensor in weights.values():
        tensor.view(-1)[8:] *= 1.5
    save_file(weights, folder / "model.safetensors")


def other_tokenizer(folder):
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    ids = tokenizer["model"]["vocab"]
    ids["red</w>"], ids["blue</w>"] = ids["blue</w>"], ids["red</w>"]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))


@pytest.mark.parametrize("change", [other_image_processor, other_configuration, other_last_values, other_tokenizer])
def test_features_are_cached_by_all_that_they_depend_on(change, folders, network_flags, tmp_path):
    metric, flag = "diversity", "--feature_model"
    if change is other_tokenizer:
        metric, flag = "imagereward", "--imagereward_tokenizer"
    other, flags = tmp_path / "other", ["--metrics", metric]
    shutil.copytree(network_flags[network_flags.index(flag) + 1], other)
    change(other)
    first = run(folders, network_flags, tmp_path, *flags)
    second = run(folders, network_flags, tmp_path, *flags, flag, other)
    assert second[metric]["value"] != first[metric]["value"]
    shutil.rmtree(folders[0] / ".features")
    assert run(folders, network_flags, tmp_path, *flags, flag, other) == second
    assert run(folders, network_flags, tmp_path, *flags) == first


def test_spawned_workers_read_images_for_every_network(folders, network_flags, monkeypatch):
    """As on macOS, and with Python 3.14: what they are given is pickled."""
    args = evaluate.parse_args(["--images", str(folders[0]), *network_flags])
    images, image = read_image_set("--images", args.images), Image.open(folders[0] / "0000.png")
    for metric in evaluate.METRICS:
        scorer = scorers.load_scorer(args, metric)
        assert torch.equal(pickle.loads(pickle.dumps(scorer.prepare))(image), scorer.prepare(image))
    scorer = scorers.load_scorer(args, "patch_fid")
    expected = scorers.compute_image_features(args, scorer, images)
    shutil.rmtree(images.cache)
    args.dataloader_num_workers = 1
    monkeypatch.setattr(scorers, "DataLoader", partial(scorers.DataLoader, multiprocessing_context="spawn"))
    assert torch.equal(scorers.compute_image_features(args, scorer, images), expected)


def test_real_images_and_a_file_of_prompts(folders, network_flags, tmp_path):
    student, teacher = folders
    captions = {"image_paths": [f"teacher/{i:04d}.png" for i in range(6)], "prompts": [["x", "y"]] * 6}
    (tmp_path / "real.json").write_text(json.dumps(captions))
    (student / "metadata.jsonl").unlink()
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    plain = run(
        folders, network_flags, tmp_path, "--metrics", "fid", "clip", "--prompts_file", tmp_path / "prompts.txt"
    )
    real = run((student, tmp_path / "real.json"), network_flags, tmp_path, "--metrics", "fid")
    assert real["fid"]["value"] == pytest.approx(plain["fid"]["value"], rel=1e-6) and plain["clip"]["n"] == 6


def test_every_image_of_a_folder_is_measured_or_counted(tmp_path, caplog):
    names = ["0.png", "1.AVIF", "2.bmp", "3.jpeg", "4.tiff", "5.webp"]
    for name in names:
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    for name in ("._0.png", ".DS_Store", "grid.png", "6.heic", "7.mp4", "8.mp4"):
        (tmp_path / name).write_text("x")
    (tmp_path / "more").mkdir()
    with caplog.at_level(logging.INFO):
        images = read_image_set("--images", str(tmp_path))
    assert [file.name for file in images.files] == names
    assert f"--images {tmp_path}: 6 images; not used: 2 .mp4, 1 .heic, 1 folder" in caplog.text


REFUSED = {
    "no folder": ("--images {root}/none", "--images {root}/none: no such folder"),
    "no images": ("--images {root}/empty", "--images {root}/empty: has no image that Pillow opens"),
    "unreadable": ("--images {root}/broken", "1 images cannot be read, such as 0001.png"),
    "no reference": ("--metrics fd", "--metrics fd: compares with other images; give --reference"),
    "no prompts": ("--images {root}/bare --metrics clip", "--metrics clip: {root}/bare has no prompts"),
    "one image": ("--metrics diversity", "--metrics diversity: no prompt has two images; give --num_images_per_pr"),
    "too few prompts": ("--images {root}/bare --prompts_file {root}/one.txt", "no prompt for 0001.png"),
    "a line cut": ("--images {root}/cut", "metadata.jsonl lacks the prompt of an image"),
    "a line missing": ("--images {root}/short", "metadata.jsonl lacks the prompt of an image ('0001.png')"),
    "other prompts": ("--metrics fid --reference {root}/other", "have different prompts"),
    "small": (
        "--metrics patch_fid --reference {root}/small",
        "0000.png has 67 x 64 pixels, fewer than the patch of 299",
    ),
    "inception": ("--metrics fid --reference {root}/student --inception none.pt", "--inception none.pt: no such file"),
    "hpsv2": ("--metrics hpsv2 --hpsv2 none", "--hpsv2 none: no such file; --metrics hpsv2 needs HPS_v2.1_compr"),
    "device": ("--device nowhere", "--device nowhere: not available here"),
    "batch size": ("--batch_size 0", "--batch_size 0: must be a whole number, 1 or more"),
    "no checkpoints": ("--checkpoints {root}/empty --prompts_file x", "{root}/empty: has no checkpoint-N"),
    "no prompts file": ("--checkpoints {root}/empty", "{root}/empty: give --prompts_file"),
    "prompts twice": (
        "--images {root}/two.json --prompts_file {root}/one.txt",
        "{root}/two.json is a JSON with captions",
    ),
    "half a character": ("--images {root}/half.json", "--images {root}/half.json: row 1 holds '\\ud83d', which is no"),
    # What the checkpoints' images lack is found before they are generated.
    "no prompts to generate": (
        "--checkpoints {root}/run --prompts_file {root}/none",
        "--prompts_file {root}/none: can",
    ),
    "one image of each": (
        "--checkpoints {root}/run --prompts_file {root}/one.txt --num_images_per_prompt 1",
        "--metrics diversity: no prompt has two images; give --num_images_per_prompt 2",
    ),
    "images to be small": (
        "--checkpoints {root}/run --prompts_file {root}/two.txt --metrics patch_fid --reference {root}/student",
        "{root}/run/checkpoint-1/image 0 has 64 x 64 pixels, fewer than the patch of 299",
    ),
    "prompts to be others": (
        "--checkpoints {root}/run --prompts_file {root}/one.txt --metrics fid --reference {root}/student",
        "{root}/run/checkpoint-1 and {root}/student have different prompts, such as 'b'",
    ),
    "no folder for the report": (
        "--output {root}/none/a.json",
        "--output {root}/none/a.json: cannot be written (No s",
    ),
    "a folder as the report": ("--output {root}/empty", "--output {root}/empty: is not a file"),
    "below a file": ("--append_to {root}/one.txt/table.md", "--append_to {root}/one.txt/table.md: cannot be written"),
    "read-only": ("--append_to /sys/table.md", "--append_to /sys/table.md: cannot be written (Permission denied)"),
    "captions": ("--reference {root}/cut/metadata.jsonl --metrics fd", "cannot be read (JSONDecodeError"),
}


@pytest.fixture(scope="module")
def bad_input(tmp_path_factory):
    root = tmp_path_factory.mktemp("bad_input")
    for name in ("student", "broken", "bare", "cut", "short"):
        generate(root / name, 0, prompts=["a", "b"])
    generate(root / "other", 0, prompts=["a", "c"])
    generate(root / "small", 0, size=64, prompts=["a", "b"])
    (root / "empty").mkdir()
    (root / "run/checkpoint-1").mkdir(parents=True)
    (root / "run/checkpoint-1/senseflow.json").write_text('{"pipeline_call": {"width": 64, "height": 64}}')
    (root / "one.txt").write_text("a\n")
    (root / "two.txt").write_text("a\nb\n")
    for name, prompts in {"two": ["a", "b"], "half": ["a", "\ud83d"]}.items():
        captions = {"image_paths": ["bare/0000.png", "bare/0001.png"], "prompts": prompts}
        (root / f"{name}.json").write_text(json.dumps(captions))
    (root / "broken/0001.png").write_bytes(b"no image")
    (root / "bare/metadata.jsonl").unlink()
    lines = (root / "cut/metadata.jsonl").read_text().splitlines()
    (root / "cut/metadata.jsonl").write_text(lines[0] + "\n" + lines[1][:9])
    (root / "short/metadata.jsonl").write_text(lines[0] + "\n")
    return root


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_one_line_before_a_network_loads(case, network_flags, bad_input, capsys, monkeypatch):
    monkeypatch.setattr(evaluate, "load_scorer", lambda *args: pytest.fail("a network was loaded before the check"))
    monkeypatch.setattr(evaluate.subprocess, "run", lambda *args: pytest.fail("generated before the check"))
    flags, needle = REFUSED[case]
    images = [] if "--checkpoints" in flags else ["--images", str(bad_input / "student")]
    arguments = [*images, *network_flags, *flags.format(root=bad_input).split()]
    refused(evaluate, arguments, 2, needle.format(root=bad_input), capsys)


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "preprocessor_config.json"])
def test_a_scorer_that_does_not_load_is_found_before_images_are_generated(
    file, network_flags, bad_input, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(evaluate.subprocess, "run", lambda *args: pytest.fail("generated before the check"))
    damaged = tmp_path / "damaged"
    shutil.copytree(network_flags[network_flags.index("--feature_model") + 1], damaged)
    (damaged / file).unlink()
    flags = ["--checkpoints", bad_input / "run", "--prompts_file", bad_input / "one.txt", *network_flags]
    flags[flags.index("--feature_model") + 1] = damaged
    refused(evaluate, [str(flag) for flag in flags], 1, f"--feature_model {damaged}: cannot load", capsys)


def test_a_truncated_image_is_named(folders, network_flags, tmp_path):
    file = folders[0] / "0004.png"
    file.write_bytes(file.read_bytes()[:500])
    with pytest.raises(UserError, match=rf"{file}: cannot be read \(image file is truncated\)") as caught:
        run(folders, network_flags, tmp_path, "--metrics", "fid")
    assert caught.value.exit_code == 2


def test_every_checkpoint_of_a_run(teacher, data, network_flags, tmp_path):
    """Each generates images and has metrics; their curves are plotted."""
    run = tmp_path / "run"
    arguments = ["--pretrained_model_name_or_path", str(teacher), "--dataset_json", str(data), "--resolution", "64"]
    arguments += ["--gan_weight", "0", "--max_train_steps", "2", "--ttur_ratio", "1", "--learning_rate", "0.1"]
    arguments += ["--lr_warmup_steps", "0"]
    arguments += ["--checkpointing_steps", "1", "--report_to", "none", "--max_sequence_length", "16"]
    script.main([*arguments, "--output_dir", str(run)])
    (tmp_path / "prompts.txt").write_text("a red circle\n\na cat\n")
    command = ["--checkpoints", str(run), "--prompts_file", str(tmp_path / "prompts.txt"), *network_flags]
    command += ["--metrics", "clip", "diversity", "--output", str(tmp_path / "report.json")]
    command += ["--append_to", str(tmp_path / "table.md")]
    evaluate.main(command)
    report = json.loads((tmp_path / "report.json").read_text())["checkpoints"]
    assert list(report) == ["checkpoint-1", "checkpoint-2"] and report["checkpoint-1"] != report["checkpoint-2"]
    names = [file.name for file in sorted((run / "evaluation" / "checkpoint-2").glob("*.png"))]
    assert names == ["0000.png", "0000_1.png", "0002.png", "0002_1.png"]
    assert report["checkpoint-1"]["diversity"]["n"] == 4
    rows = (tmp_path / "table.md").read_text().splitlines()[2:]
    assert [row.split("|")[1].strip() for row in rows] == list(report)
    assert Image.open(run / "evaluation" / "curves.png").size[0] > 500
