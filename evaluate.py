# Copyright 2026 The SenseFlow-scripts authors. Licensed under the Apache License, Version 2.0.
"""Measures images, such as infer.py's: against the teacher's of the same prompts, against their prompts, against each other.

    python evaluate.py --images student --reference teacher --metrics fid patch_fid clip pickscore --inception inception.pt
    python evaluate.py --images student --reference coco/data.json --metrics fd        # real images and captions, as for training

A folder's prompts are those of infer.py's metadata.jsonl, or lines of --prompts_file, 0007.png's the eighth. What a network says of
its images is kept in a folder .features there, so that another metric or reference costs only what is new.
"""

import argparse
import hashlib
import importlib.util
import itertools
import json
import logging
import math
import os
import re
from functools import partial
from pathlib import Path
from typing import Any, Callable, Optional, Sequence

import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader
from tqdm import tqdm

from infer import number, short_dtype, write_aside
from senseflow.arguments import DTYPES, Parser
from senseflow.data.images import read_image
from senseflow.errors import UserError, run_script
from senseflow.evaluation.curves import draw, find_checkpoints, plot
from senseflow.evaluation.image_sets import ImageSet, find_images
from senseflow.evaluation.metrics import (
    FEW,
    PATCH,
    bootstrap,
    cosine,
    diversity,
    frechet_distance,
    scaled_cosine,
    standard_error,
)
from senseflow.evaluation.scorers import Network, load_clip, load_hpsv2, load_imagereward, load_inception, load_vision


logger = logging.getLogger("evaluate")

# In the order of the paper's table, then what it does not have: {metric: (column, whether it compares, the flag of its network)}
METRICS = {
    "fid": ("FID-T", True, "inception"),
    "patch_fid": ("Patch FID-T", True, "inception"),
    "clip": ("CLIP", False, "clip_model"),
    "hpsv2": ("HPSv2", False, "hpsv2"),
    "pickscore": ("Pick", False, "pickscore_model"),
    "imagereward": ("ImageReward", False, "imagereward"),
    "fd": ("FD", True, "feature_model"),
    "diversity": ("diversity", False, "feature_model"),
}
OF_PROMPTS = ("clip", "hpsv2", "pickscore", "imagereward")
FILES = {  # of networks that no Hub id names: {flag: what it is}
    "inception": "inception-2015-12-05.pt, a TorchScript file",
    "hpsv2": "HPS_v2.1_compressed.pt of xswu/HPSv2",
    "imagereward": "ImageReward.pt of zai-org/ImageReward",
}
CHUNK = 256  # images whose features are one file


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    parser = Parser(prog="evaluate.py", description=__doc__.splitlines()[0])
    group = parser.add_argument_group("images")
    what = group.add_mutually_exclusive_group(required=True)
    what.add_argument("--images", help="a folder of images, or a JSON of images and captions as for training")
    what.add_argument(
        "--checkpoints", metavar="DIR", help="the output of a training run, whose checkpoints draw --prompts_file"
    )
    group.add_argument(
        "--reference", help="the same, of what to compare with: the teacher's images of the same prompts, or real ones"
    )
    group.add_argument(
        "--prompts_file", help="of --images: one prompt a line; default: metadata.jsonl, as infer.py writes it"
    )
    group = parser.add_argument_group("metrics")
    group.add_argument("--metrics", nargs="+", choices=METRICS, default=["clip", "diversity"])
    for flag, what in FILES.items():
        group.add_argument(f"--{flag}", metavar="FILE", help=what)
    group.add_argument("--imagereward_tokenizer", default="google-bert/bert-base-uncased", help="of imagereward")
    group.add_argument("--clip_model", default="laion/CLIP-ViT-g-14-laion2B-s12B-b42K", help="of clip: a CLIPModel")
    group.add_argument(
        "--clip_prefix", default="", help='before each prompt; DMD2\'s evaluator has "A photo depicts "'
    )
    group.add_argument("--pickscore_model", default="yuvalkirstain/PickScore_v1", help="of pickscore: a CLIPModel")
    group.add_argument(
        "--feature_model", default="facebook/dinov2-large", help="of fd and diversity: a transformers vision model"
    )
    group.add_argument(
        "--bootstrap", type=number(int, 2), help="draws of the prompts, for the standard errors of fid, patch_fid, fd"
    )
    group = parser.add_argument_group("how")
    group.add_argument("--batch_size", type=number(int, 1), default=32, help="default: 32")
    group.add_argument(
        "--dataloader_num_workers", type=number(int, 0), default=0, help="that read and scale images; default: 0"
    )
    group.add_argument("--device", help="a torch device; default: cuda if there is one, else cpu")
    group.add_argument(
        "--dtype",
        type=short_dtype,
        choices=DTYPES,
        default="fp32",
        help="of the networks but Inception; default: fp32",
    )
    group = parser.add_argument_group("output")
    group.add_argument("--output", default="report.json", help="default: report.json")
    group.add_argument("--append_to", help="a Markdown table that gets a row, and its head where it is new")
    args = parser.parse_args(argv)
    args.metrics = [name for name in METRICS if name in args.metrics]
    try:
        args.device = torch.empty(0, device=args.device or ("cuda" if torch.cuda.is_available() else "cpu")).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(
            f"--device {args.device}: not available here; give cpu, or a device that torch sees", 2
        ) from error
    return args


# ---------------------------------------------------------------------------------------------------------------------
# Before networks load
# ---------------------------------------------------------------------------------------------------------------------
def check(args, images: ImageSet, reference: Optional[ImageSet]) -> None:
    """UserError (2) for what would fail after networks are loaded."""
    for name in args.metrics:
        column, compares, flag = METRICS[name]
        if compares and reference is None:
            raise UserError(f"--metrics {name}: compares with other images; give --reference", 2)
        if name in OF_PROMPTS and images.prompts is None:
            raise UserError(f"--metrics {name}: no prompt is known of {images.name}; give --prompts_file", 2)
        if flag in FILES and not Path(getattr(args, flag) or "").is_file():
            raise UserError(f"--{flag} {getattr(args, flag)}: is no file, and --metrics {name} needs {FILES[flag]}", 2)
    of_teacher = {"fid", "patch_fid"} & set(args.metrics)
    if (
        of_teacher
        and not Path(args.reference).is_file()
        and images.prompts is not None
        and reference.prompts is not None
    ):
        if set(images.prompts) != set(reference.prompts):
            other = sorted(set(images.prompts) ^ set(reference.prompts))[0]
            problem = f"{images.name} and {reference.name} are of different prompts, one is {other[:60]!r}"
            raise UserError(f"--metrics {min(of_teacher)}: {problem}; draw both with one prompts file", 2)
    if "patch_fid" in args.metrics:
        for images in (images, reference):
            for file in images.files:
                with Image.open(file) as image:
                    if min(image.size) < PATCH:
                        size = f"{image.width} x {image.height}, smaller than a patch of {PATCH}"
                        raise UserError(f"--metrics patch_fid: {file} is {size}; leave it out", 2)


# ---------------------------------------------------------------------------------------------------------------------
# Features
# ---------------------------------------------------------------------------------------------------------------------
@torch.no_grad()
def features_of(args, images: ImageSet, network: Network) -> torch.Tensor:
    """What a network says of images, (N, D) float32 on the CPU; a chunk of them is kept as soon as it is there.

    A chunk's file is named after its images' names, sizes and times and after the network: what has changed is looked at anew.
    """
    found = []
    with tqdm(total=len(images.files), desc=f"{network.name.split('-')[0]} {images.name}", unit="image") as progress:
        for start in range(0, len(images.files), CHUNK):
            files = images.files[start : start + CHUNK]
            times = [(str(file), (stat := file.stat()).st_size, stat.st_mtime_ns) for file in files]
            prompts = images.prompts[start : start + CHUNK] if network.reads_while_looking else None
            digest = hashlib.sha256(json.dumps([network.name, times, prompts]).encode()).hexdigest()[:24]
            kept = images.cache / f"{network.name}-{digest}.safetensors"
            if kept.exists():
                found.append(load_file(kept)["features"])
                progress.update(len(files))
                continue
            how = {"batch_size": args.batch_size, "num_workers": args.dataloader_num_workers, "collate_fn": list}
            chunk = []
            for batch in DataLoader(Prepared(files, network.prepare), **how):
                broken = next((each for each in batch if isinstance(each, str)), None)
                if broken:
                    raise UserError(f"{broken}; draw or copy it again", 2)
                for _, same in itertools.groupby(batch, lambda pixels: pixels.shape):
                    pixels, done = torch.stack(list(same)).to(args.device), sum(map(len, chunk))
                    read = [prompts[done : done + len(pixels)]] if prompts else []
                    chunk.append(network.look(pixels, *read).float().cpu())
                progress.update(len(batch))
            found.append(torch.cat(chunk))
            keep(kept, found[-1])
    return torch.cat(found)


class Prepared(torch.utils.data.Dataset):
    """The images of some files as a network wants them; of one that cannot be read, why."""

    def __init__(self, files: list[Path], prepare: Callable):
        self.files, self.prepare = files, prepare

    def __len__(self):
        return len(self.files)

    def __getitem__(self, index: int) -> torch.Tensor | str:
        image, why = read_image(str(self.files[index]))
        return f"{self.files[index]}: cannot be read ({why})" if image is None else self.prepare(image)


def keep(path: Path, features: torch.Tensor) -> None:
    try:
        path.parent.mkdir(exist_ok=True)
        write_aside(path, lambda temporary: save_file({"features": features.contiguous()}, temporary))
    except OSError as error:
        logger.warning("%s: features are not kept (%s)", path.parent, error.strerror)


@torch.no_grad()
def embeddings_of(args, prompts: list[str], network: Network) -> torch.Tensor:
    """Of each prompt, (N, D) float32 on the CPU; prompts that are there several times are read once."""
    different = list(dict.fromkeys(prompts))
    batches = [different[i : i + args.batch_size] for i in range(0, len(different), args.batch_size)]
    table = torch.cat([network.read(batch).float().cpu() for batch in tqdm(batches, "prompts", unit="batch")])
    row = {prompt: i for i, prompt in enumerate(different)}
    return table[[row[prompt] for prompt in prompts]]


# ---------------------------------------------------------------------------------------------------------------------
# The report
# ---------------------------------------------------------------------------------------------------------------------
def measure(args, name: str, network: Network, images: ImageSet, reference: Optional[ImageSet]) -> dict[str, Any]:
    """One metric: value, standard error over prompts (None: not asked for), n."""
    own, groups = features_of(args, images, network), images.groups
    result: dict[str, Any] = {"n": len(own), "network": network.name, "standard_error": None}
    if name in ("fid", "patch_fid", "fd"):
        theirs = features_of(args, reference, network)
        if min(len(own), len(theirs)) < max(FEW, own.shape[1]):
            few = f"of {len(own)} and {len(theirs)} images, in {own.shape[1]} dimensions"
            logger.warning("%s: %s: a Frechet distance is not defined well below %d", name, few, FEW)
        result["value"] = frechet_distance(own, theirs)
        if args.bootstrap:
            error = bootstrap(frechet_distance, own, theirs, groups, args.bootstrap)
            result["standard_error"] = error
    elif name == "diversity":
        spread = diversity(own, groups)
        if not len(spread):
            raise UserError("--metrics diversity: no prompt has two images; draw several of each", 2)
        result["value"], result["standard_error"] = spread.mean().item(), (spread.std() / len(spread) ** 0.5).item()
        if reference is not None:
            theirs = diversity(features_of(args, reference, network), reference.groups)
            if len(theirs):
                result["share_of_reference"] = result["value"] / theirs.mean().item()
    elif name == "imagereward":
        result["value"], result["standard_error"] = own.double().mean().item(), standard_error(own[:, 0], groups)
    else:
        prefix = args.clip_prefix if name == "clip" else ""
        texts = embeddings_of(args, [prefix + prompt for prompt in images.prompts], network)
        scores = cosine(own, texts)
        if name == "pickscore":
            scores = scaled_cosine(own, texts, network.logit_scale)
        result["value"], result["standard_error"] = scores.double().mean().item(), standard_error(scores, groups)
    if result["standard_error"] is not None and math.isnan(result["standard_error"]):
        result["standard_error"] = None  # a single prompt
    return result


def table_of(images: str, found: dict[str, dict]) -> tuple[str, str]:
    """(head, row) of a Markdown table of all metrics, in the paper's order; empty where one was not asked for."""
    names = [column for column, *_ in METRICS.values()]
    cells = []
    for name in METRICS:
        result = found.get(name)
        error = result and result["standard_error"]
        cells.append("" if result is None else f"{result['value']:.4g}" + (f" ± {error:.2g}" if error else ""))
    n = max(result["n"] for result in found.values())
    head = "| | n | " + " | ".join(names) + " |\n|" + "---|" * (len(names) + 2)
    return head, f"| {re.sub(r'[|]', '/', images)} | {n} | " + " | ".join(cells) + " |"


def evaluate(args, images: ImageSet, reference: Optional[ImageSet]) -> dict[str, dict]:
    """All metrics asked for: {metric: result}."""
    found: dict[str, dict] = {}
    networks: dict[tuple, Network] = {}
    for name in args.metrics:
        flag = METRICS[name][2]
        key = (flag, name == "patch_fid")
        if key not in networks:
            networks.clear()  # one at a time
            loaders = {"inception": partial(load_inception, patch=key[1]), "feature_model": load_vision}
            loaders |= {"hpsv2": load_hpsv2, "imagereward": load_imagereward}
            networks[key] = loaders.get(flag, partial(load_clip, flag=flag))(args)
        found[name] = measure(args, name, networks[key], images, reference)
        logger.info("%s %.6g", name, found[name]["value"])
    return found


def write(path: Path, text: str) -> None:
    write_aside(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def evaluate_checkpoints(args, reference: Optional[ImageSet]) -> tuple[dict, list[str]]:
    """({checkpoint-N: {metric: result}}, their rows); all that is made lies in the run's folder evaluation/."""
    if args.prompts_file is None:
        raise UserError(f"--checkpoints {args.checkpoints}: give --prompts_file, what the checkpoints draw", 2)
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError(
            f"--checkpoints {args.checkpoints}: needs matplotlib for the curves; pip install matplotlib", 2
        )
    checkpoints = find_checkpoints(Path(args.checkpoints))
    place, found, rows = Path(args.checkpoints, "evaluation"), {}, []
    for iteration, folder in checkpoints.items():
        draw(folder, args.prompts_file, place / folder.name, args.batch_size, args.device)
        images = find_images("--checkpoints", str(place / folder.name))
        check(args, images, reference)
        found[iteration] = evaluate(args, images, reference)
        rows.append(table_of(folder.name, found[iteration])[1])
    columns = {name: column for name, (column, *_) in METRICS.items()}
    write_aside(place / "curves.png", lambda temporary: plot(temporary, columns, found))
    return {f"checkpoint-{iteration}": result for iteration, result in found.items()}, rows


def main(argv: Optional[Sequence[str]] = None) -> None:
    args = parse_args(argv)
    reference = find_images("--reference", args.reference) if args.reference else None
    report: dict[str, Any] = {"reference": args.reference}
    if args.checkpoints:
        report["checkpoints"], rows = evaluate_checkpoints(args, reference)
        head = table_of("", next(iter(report["checkpoints"].values())))[0]
    else:
        images = find_images("--images", args.images, args.prompts_file)
        check(args, images, reference)
        found = evaluate(args, images, reference)
        report |= {"images": args.images, "metrics": found}
        head, row = table_of(args.images, found)
        rows = [row]
    write(Path(args.output), json.dumps(report, indent=1) + "\n")
    print("\n".join([head, *rows]))
    if args.append_to:
        table = Path(args.append_to)
        before = table.read_text(encoding="utf-8").rstrip("\n") if table.exists() else head
        write(table, "\n".join([before, *rows]) + "\n")


if __name__ == "__main__":
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    run_script(main)
