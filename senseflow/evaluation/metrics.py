# Copyright 2026 The SenseFlow-scripts authors. Licensed under the Apache License, Version 2.0.
"""How good images are, in numbers: features and embeddings in, numbers out. No network and no file is opened here."""

from collections import defaultdict
from typing import Callable, Hashable, Sequence

import torch
from PIL import Image


PATCH = 299  # pixels: the side of the patches of Patch FID, and of what Inception looks at
FEW = 2048  # images, below which a distance between Gaussians in as many dimensions is not defined well


# ---------------------------------------------------------------------------------------------------------------------
# Distances between sets
# ---------------------------------------------------------------------------------------------------------------------
def frechet_distance(first: torch.Tensor, second: torch.Tensor) -> float:
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)) between Gaussians fitted to two sets (Heusel et al., 2017, eq. 6), in float64.

    Args:
        first, second: features (N, D) and (M, D), N and M at least 2; covariances are unbiased.
    Returns:
        0 or above, up to rounding. With fewer rows than dimensions it is exact, too: tr (C1 C2)^(1/2) is the sum of the singular
        values of X1 X2^T / sqrt((N - 1) (M - 1)), X the centerd features.
    """
    first, second = first.double(), second.double()
    shift = (first.mean(0) - second.mean(0)).square().sum()
    first, second = (x.sub(x.mean(0)).div((len(x) - 1) ** 0.5) for x in (first, second))
    spread = first.square().sum() + second.square().sum()
    # A matrix R of D rows has the singular values of QR.
    first, second = (torch.linalg.qr(x, mode="r").R if len(x) > x.shape[1] else x for x in (first, second))
    return (shift + spread - 2 * torch.linalg.svdvals(first @ second.T).sum()).item()


def bootstrap(
    distance: Callable, first: torch.Tensor, second: torch.Tensor, groups: Sequence[int], times: int, seed=0
) -> float:
    """The standard error of `distance(first, second)` over the choice of prompts: its deviation where prompts are drawn anew.

    Args:
        first: (N, D); second: (M, D), which stay as they are.
        groups: for each of the N the number of its prompt; images of one prompt are drawn together.
    """
    rows = defaultdict(list)
    for row, group in enumerate(groups):
        rows[group].append(row)
    rows, generator = list(rows.values()), torch.Generator().manual_seed(seed)
    found = []
    for _ in range(times):
        drawn = torch.randint(len(rows), (len(rows),), generator=generator).tolist()
        found.append(distance(first[[row for group in drawn for row in rows[group]]], second))
    return torch.tensor(found, dtype=torch.float64).std().item()


def centre_patch(image: Image.Image, side: int = PATCH) -> Image.Image:
    """The center of an image, not scaled (Patch FID: Lin et al., SDXL-Lightning, 2024); ValueError where it is smaller."""
    width, height = image.size
    if min(width, height) < side:
        raise ValueError(f"{width} x {height} pixels")
    left, top = (width - side) // 2, (height - side) // 2
    return image.crop((left, top, left + side, top + side))


# ---------------------------------------------------------------------------------------------------------------------
# Scores of single images
# ---------------------------------------------------------------------------------------------------------------------
def cosine(images: torch.Tensor, texts: torch.Tensor) -> torch.Tensor:
    """CLIP score of each image, (N,): the cosine of embeddings (N, D) of images and of their prompts (Hessel et al., 2021).

    In [-1, 1], as the paper prints it; neither clipped at 0 nor times 100 or 2.5.
    """
    return torch.nn.functional.cosine_similarity(images.float(), texts.float(), dim=-1)


def scaled_cosine(images: torch.Tensor, texts: torch.Tensor, logit_scale: float) -> torch.Tensor:
    """PickScore of each image, (N,): exp(logit_scale) times the cosine (Kirstain et al., 2023, eq. 1); of its model about 20."""
    return torch.exp(torch.tensor(logit_scale)) * cosine(images, texts)


def standard_error(scores: torch.Tensor, groups: Sequence[int]) -> float:
    """Of the mean of scores (N,) over the choice of prompts; `groups` are the numbers of their prompts. NaN for a single one."""
    means = _by_group(scores.double(), groups)
    return (means.std() / len(means) ** 0.5).item() if len(means) > 1 else float("nan")


def diversity(features: torch.Tensor, groups: Sequence[Hashable]) -> torch.Tensor:
    """Mean pairwise 1 - cosine of features (N, D) within each prompt that has two images or more: (P,), in [0, 2]."""
    unit = torch.nn.functional.normalize(features.double(), dim=-1)
    rows = defaultdict(list)
    for row, group in enumerate(groups):
        rows[group].append(row)
    found = []
    for own in (own for own in rows.values() if len(own) > 1):
        total = unit[own].sum(0).square().sum()  # of all cosines, each pair twice, and of each image with itself
        found.append(1 - (total - len(own)) / (len(own) * (len(own) - 1)))
    return torch.stack(found) if found else torch.empty(0, dtype=torch.float64)


def _by_group(scores: torch.Tensor, groups: Sequence[int]) -> torch.Tensor:
    values = defaultdict(list)
    for score, group in zip(scores.tolist(), groups):
        values[group].append(score)
    return torch.tensor([sum(own) / len(own) for own in values.values()], dtype=torch.float64)
