# Copyright 2026 The SenseFlow-scripts authors. Licensed under the Apache License, Version 2.0.
"""Compute metrics of generated images: against reference images, their prompts, or each other.

    python evaluate.py --images student --reference teacher --metrics fid patch_fid clip --inception inception.pt
    python evaluate.py --images student --reference coco/data.json --metrics fd   # real images, JSON as for training

Prompts come from infer.py's metadata.jsonl in the folder, or from --prompts_file: line 8 is the prompt of 0007.png.
Features are cached in the folder .features beside the images: another metric or reference computes only what is new.
"""

import argparse
import json
import logging
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple, Optional, Sequence

from senseflow.arguments import DTYPES, Parser, dtype, number, torch_device
from senseflow.errors import UserError, check_writable, require_package, run_script, write_atomically


logger = logging.getLogger("evaluate")


class Metric(NamedTuple):
    column: str  # title in tables
    network: str  # the flag of its network
    needs_prompts: bool = False
    needs_reference: bool = False


METRICS = {
    "fid": Metric("FID-T", "inception", needs_reference=True),
    "patch_fid": Metric("Patch FID-T", "inception", needs_reference=True),
    "clip": Metric("CLIP", "clip_model", needs_prompts=True),
    "hpsv2": Metric("HPSv2", "hpsv2", needs_prompts=True),
    "pickscore": Metric("Pick", "pickscore_model", needs_prompts=True),
    "imagereward": Metric("ImageReward", "imagereward", needs_prompts=True),
    "fd": Metric("FD", "feature_model", needs_reference=True),
    "diversity": Metric("diversity", "feature_model"),
}  # the columns of the paper's table, in its order, then others
FILES = {
    "inception": "inception-2015-12-05.pt, a TorchScript file",
    "hpsv2": "HPS_v2.1_compressed.pt of xswu/HPSv2",
    "imagereward": "ImageReward.pt of zai-org/ImageReward",
}  # {flag: the published file that it takes}; other networks have a Hub id
MIN_IMAGES = 2048  # a Frechet distance of fewer images is biased


# fmt: off
def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    parser = Parser(prog="evaluate.py", description=__doc__.splitlines()[0])
    group = parser.add_argument_group("images")
    source = group.add_mutually_exclusive_group(required=True)
    source.add_argument("--images", help="Folder of images, or JSON of images and captions as for training.")
    source.add_argument("--checkpoints", metavar="DIR",
        help="Output folder of a training run: evaluate images that each checkpoint generates for --prompts_file.")
    group.add_argument("--reference",
        help="Images to compare with, in the same form: the teacher's for the same prompts, or real images.")
    group.add_argument("--prompts_file", help="File with one prompt per line; default: metadata.jsonl in the folder.")
    group.add_argument("--num_images_per_prompt", type=number(int, 1),
        help="Images that each checkpoint generates for a prompt; default: 2 for diversity, else 1.")
    add = parser.add_argument_group("metrics").add_argument
    add("--metrics", nargs="+", choices=METRICS, default=["clip", "diversity"], help="Metrics to compute.")
    for flag, file in FILES.items():
        add(f"--{flag}", metavar="FILE", help=f"Path of {file}.")
    add("--imagereward_tokenizer", default="google-bert/bert-base-uncased", help="Hub id or folder of its tokenizer.")
    add("--clip_model", default="laion/CLIP-ViT-g-14-laion2B-s12B-b42K",
        help="Hub id or folder of the CLIPModel for clip.")
    add("--clip_prefix", default="",
        help='Text before each prompt for clip; "A photo depicts " in DMD2\'s evaluation.')
    add("--pickscore_model", default="yuvalkirstain/PickScore_v1",
        help="Hub id or folder of the CLIPModel for pickscore.")
    add("--feature_model", default="facebook/dinov2-large",
        help="Hub id or folder of the vision model of transformers for fd and diversity.")
    add("--bootstrap", type=number(int, 2), metavar="SAMPLES",
        help="Bootstrap samples of the prompts for standard errors of fid, patch_fid and fd; default: no such errors.")
    add = parser.add_argument_group("hardware").add_argument
    add("--batch_size", type=number(int, 1), default=32, help="Images per batch.")
    add("--dataloader_num_workers", type=number(int, 0), default=0, help="Processes that read and scale images.")
    add("--device", help="Device of torch; default: cuda if there is a GPU, else cpu.")
    add("--dtype", type=dtype, choices=DTYPES, default="fp32", help="Precision of all networks but Inception.")
    add = parser.add_argument_group("output").add_argument
    add("--output", default="report.json", help="Path of the JSON report.")
    add("--append_to", help="Path of a Markdown table to which rows are added, or which is created.")
    args = parser.parse_args(argv)
    args.metrics = [name for name in METRICS if name in args.metrics]
    return args
# fmt: on


if __name__ == "__main__":
    run_script(parse_args)  # answer --help and wrong arguments before the imports below, which take seconds

from senseflow.data.prompts import read_prompts_file
from senseflow.evaluation import metrics
from senseflow.evaluation.image_sets import ImageSet, read_image_set
from senseflow.evaluation.scorers import compute_image_features, compute_prompt_features, load_scorer
from senseflow.models.hub import ModelSource
from senseflow.student_config import read_student_config


def check_args(args) -> None:
    """Refuse (UserError, exit code 2) flags that do not fit together, and files that do not exist."""
    for name in args.metrics:
        flag = METRICS[name].network
        if METRICS[name].needs_reference and args.reference is None:
            raise UserError(f"--metrics {name}: compares with other images; give --reference", 2)
        if flag in FILES and not Path(getattr(args, flag) or "").is_file():
            raise UserError(f"--{flag} {getattr(args, flag)}: no such file; --metrics {name} needs {FILES[flag]}", 2)
    if args.checkpoints:
        if args.prompts_file is None:
            raise UserError(f"--checkpoints {args.checkpoints}: give --prompts_file to generate images for", 2)
        require_package("matplotlib", "--checkpoints")
    elif args.num_images_per_prompt:
        logger.warning("--num_images_per_prompt %d: no effect without --checkpoints", args.num_images_per_prompt)
    for flag in ("output", "append_to"):
        if getattr(args, flag):
            check_writable(f"--{flag}", Path(getattr(args, flag)))


def check_images(args, images: ImageSet, reference: Optional[ImageSet]) -> None:
    """Refuse (UserError, exit code 2) images whose prompts, number or sizes do not suit a metric."""
    for name in args.metrics:
        if METRICS[name].needs_prompts and images.prompts is None:
            raise UserError(f"--metrics {name}: {images.name} has no prompts; give --prompts_file", 2)
        if name == "diversity" and len(set(images.groups)) == len(images.files):
            raise UserError("--metrics diversity: no prompt has two images; give --num_images_per_prompt 2", 2)
        if METRICS[name].network == "inception" and Path(args.reference).is_dir():
            if images.prompts and reference.prompts and set(images.prompts) != set(reference.prompts):
                other = min(set(images.prompts) ^ set(reference.prompts))
                problem = f"{images.name} and {reference.name} have different prompts, such as {other[:60]!r}"
                raise UserError(f"--metrics {name}: {problem}; generate both with one prompts file", 2)
        if name == "patch_fid":
            for file, size in zip(images.files + reference.files, images.sizes + reference.sizes):
                if min(size) < metrics.PATCH:
                    problem = f"{file} has {size[0]} x {size[1]} pixels, fewer than the patch of {metrics.PATCH}"
                    raise UserError(f"--metrics patch_fid: {problem}; leave out patch_fid, or the image", 2)


def compute_metric(args, name: str, images: ImageSet, reference: Optional[ImageSet]) -> dict[str, Any]:
    """Return value, n, network, and standard_error, which is over prompts and None if it is not computed."""
    scorer = load_scorer(args, name)
    features, groups = compute_image_features(args, scorer, images), images.groups
    result = {"n": len(features), "network": scorer.name}
    if METRICS[name].needs_reference:
        others = compute_image_features(args, scorer, reference)
        if min(len(features), len(others)) < max(MIN_IMAGES, features.shape[1]):
            count = f"{len(features)} and {len(others)} images for {features.shape[1]} dimensions"
            logger.warning("%s: %s; a Frechet distance needs %d or more of each", name, count, MIN_IMAGES)
        distance = metrics.frechet_distance
        error = args.bootstrap and metrics.bootstrap_error(distance, features, others, groups, args.bootstrap)
        return result | {"value": distance(features, others), "standard_error": error}
    if name == "diversity":
        scores = metrics.diversity(features, groups)
        groups = range(len(scores))
        if reference is not None:
            others = metrics.diversity(compute_image_features(args, scorer, reference), reference.groups)
            if len(others):
                result["share_of_reference"] = scores.mean().item() / others.mean().item()
    elif name == "imagereward":
        scores = features[:, 0]
    else:
        prefix = args.clip_prefix if name == "clip" else ""
        prompts = compute_prompt_features(args, scorer, [prefix + prompt for prompt in images.prompts])
        if name == "pickscore":
            scores = metrics.pickscore(features, prompts, scorer.logit_scale)
        else:
            scores = metrics.clip_score(features, prompts)
    return result | {"value": scores.double().mean().item(), "standard_error": metrics.standard_error(scores, groups)}


def compute_metrics(args, images: ImageSet, reference: Optional[ImageSet]) -> dict[str, dict[str, Any]]:
    """Return {metric: result}."""
    results = {}
    for name in args.metrics:
        results[name] = compute_metric(args, name, images, reference)
        logger.info("%s %.6g", name, results[name]["value"])
    return results


def find_checkpoints(run: Path) -> dict[int, Path]:
    """Return {iteration: folder} of a run's checkpoints, in order. UserError (2) if there are none."""
    folders = [file.parent for file in run.glob("checkpoint-*/senseflow.json")]
    checkpoints = {int(f.name[11:]): f for f in folders if re.fullmatch(r"checkpoint-\d+", f.name)}
    if not checkpoints:
        raise UserError(f"--checkpoints {run}: has no checkpoint-N; give the --output_dir of a training run", 2)
    return dict(sorted(checkpoints.items()))


def plan_images(args, checkpoint: Path) -> ImageSet:
    """Return the images that infer.py will generate, so that they can be checked before. They have no files yet."""
    prompts = [prompt for prompt in read_prompts_file(args.prompts_file) if prompt] * args.num_images_per_prompt
    call = read_student_config(ModelSource("--checkpoints", str(checkpoint))).get("pipeline_call", {})
    size = call.get("width", metrics.PATCH), call.get("height", metrics.PATCH)  # a size that is not known passes
    files = [checkpoint / f"image {number}" for number in range(len(prompts))]
    return ImageSet(str(checkpoint), files, [size] * len(prompts), prompts, checkpoint)


def evaluate_checkpoints(args, reference: Optional[ImageSet]) -> dict[str, dict[str, dict[str, Any]]]:
    """Return {checkpoint-N: {metric: result}}. Write images and curves to the folder evaluation/ of the run."""
    args.num_images_per_prompt = args.num_images_per_prompt or (2 if "diversity" in args.metrics else 1)
    checkpoints = find_checkpoints(Path(args.checkpoints))
    for checkpoint in checkpoints.values():
        check_images(args, plan_images(args, checkpoint), reference)
    for name in args.metrics:
        load_scorer(argparse.Namespace(**vars(args) | {"device": "cpu"}), name)  # it is there, and not damaged
    folder, results = Path(args.checkpoints, "evaluation"), {}
    flags = ["--prompts_file", args.prompts_file, "--batch_size", args.batch_size, "--device", args.device]
    flags += ["--num_images_per_prompt", args.num_images_per_prompt]
    for iteration, checkpoint in checkpoints.items():
        output = ["--model", checkpoint, "--output_dir", folder / checkpoint.name]
        command = [sys.executable, Path(__file__).with_name("infer.py"), *output, *flags]
        code = subprocess.run([str(word) for word in command]).returncode  # it generates the missing images
        if code:
            problem = f"infer.py ended with exit code {code} for {checkpoint.name}; see its message above"
            raise UserError(f"--checkpoints {args.checkpoints}: {problem}")
        images = read_image_set("--checkpoints", str(folder / checkpoint.name))
        check_images(args, images, reference)
        results[iteration] = compute_metrics(args, images, reference)
    write_atomically(folder / "curves.png", lambda temporary: plot_curves(temporary, results))
    return {f"checkpoint-{iteration}": result for iteration, result in results.items()}


def plot_curves(path: Path, results: dict[int, dict[str, dict[str, Any]]]) -> None:
    """Write a PNG with one plot per metric: value and standard error against iterations, from {iteration: results}."""
    from matplotlib.figure import Figure

    iterations, names = list(results), list(next(iter(results.values())))
    figure = Figure(figsize=(4 * len(names), 3), layout="constrained")
    for name, axes in zip(names, figure.subplots(1, len(names), squeeze=False)[0]):
        values = [result[name]["value"] for result in results.values()]
        errors = [result[name]["standard_error"] or 0 for result in results.values()]
        axes.errorbar(iterations, values, errors, marker="o", capsize=3)
        axes.set(title=METRICS[name].column, xlabel="iterations")
    figure.savefig(path, format="png", dpi=120)


def make_row(name: str, results: dict[str, dict[str, Any]]) -> str:
    """Return the row of a Markdown table with a column for each of METRICS, empty for metrics not in `results`."""
    cells = [name.replace("|", "/"), str(max(result["n"] for result in results.values()))]
    for metric in METRICS:
        cell = f"{results[metric]['value']:.4g}" if metric in results else ""
        if cell and results[metric]["standard_error"]:
            cell += f" ± {results[metric]['standard_error']:.2g}"
        cells.append(cell)
    return f"| {' | '.join(cells)} |"


def main(argv: Optional[Sequence[str]] = None) -> None:
    args = parse_args(argv)
    args.device = torch_device(args.device)
    check_args(args)
    reference = read_image_set("--reference", args.reference) if args.reference else None
    report: dict[str, Any] = {"reference": args.reference}
    if args.checkpoints:
        report["checkpoints"] = results = evaluate_checkpoints(args, reference)
    else:
        images = read_image_set("--images", args.images, args.prompts_file)
        check_images(args, images, reference)
        report |= {"images": args.images, "metrics": compute_metrics(args, images, reference)}
        results = {args.images: report["metrics"]}
    text = json.dumps(report, indent=1) + "\n"
    write_atomically(Path(args.output), lambda temporary: temporary.write_text(text, encoding="utf-8"))

    columns = [metric.column for metric in METRICS.values()]
    head = f"| | n | {' | '.join(columns)} |\n|---|---|{'---|' * len(columns)}"
    rows = "\n".join(make_row(name, result) for name, result in results.items())
    print(f"{head}\n{rows}")
    if args.append_to:
        table = Path(args.append_to)
        before = table.read_text(encoding="utf-8").rstrip("\n") if table.exists() else head
        write_atomically(table, lambda temporary: temporary.write_text(f"{before}\n{rows}\n", encoding="utf-8"))


if __name__ == "__main__":
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    run_script(main)
