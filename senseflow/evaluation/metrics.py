# Copyright 2026 The SenseFlow-scripts authors. Licensed under the Apache License, Version 2.0.
"""Compute metrics from features of images: distances between sets, scores of images, and their standard errors."""

from collections import defaultdict
from typing import Callable, Hashable, Optional, Sequence

import torch
import torch.nn.functional as F
from PIL import Image


PATCH = 299  # pixels; side of the patches of Patch FID, and Inception's input size


def frechet_distance(first: torch.Tensor, second: torch.Tensor) -> float:
    """Return |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)) of two sets (Heusel et al., 2017, eq. 6).

    m are means, C covariances, in float64. It is exact with fewer rows than dimensions, too: tr (C1 C2)^(1/2) is the
    sum of the singular values of X1 X2^T / sqrt((N - 1) (M - 1)), where X are the centered features.

    Args:
        first, second: features (N, D) and (M, D); N and M are at least 2. Covariances are unbiased.
    """
    first, second = first.double(), second.double()
    shift = (first.mean(0) - second.mean(0)).square().sum()
    first, second = (x.sub(x.mean(0)).div((len(x) - 1) ** 0.5) for x in (first, second))
    spread = first.square().sum() + second.square().sum()
    # The factor R of X = QR has D rows and the singular values of X.
    first, second = (torch.linalg.qr(x, mode="r").R if len(x) > x.shape[1] else x for x in (first, second))
    return (shift + spread - 2 * torch.linalg.svdvals(first @ second.T).sum()).item()


def bootstrap_error(
    distance: Callable, first: torch.Tensor, second: torch.Tensor, groups: Sequence[Hashable], num_samples: int
) -> float:
    """Return the standard error of `distance(first, second)`: its standard deviation over resampled prompts.

    Args:
        first, second: features (N, D) and (M, D). Only the first set is resampled.
        groups: the prompt of each of the N images. Images of one prompt are resampled together.
    """
    rows, generator = _rows_by_group(groups), torch.Generator().manual_seed(0)
    distances = []
    for _ in range(num_samples):
        sample = torch.randint(len(rows), (len(rows),), generator=generator).tolist()
        distances.append(distance(first[[row for group in sample for row in rows[group]]], second))
    return torch.tensor(distances, dtype=torch.float64).std().item()


def center_patch(image: Image.Image) -> Image.Image:
    """Crop the center PATCH x PATCH pixels, without scaling, for Patch FID (Lin et al., SDXL-Lightning, 2024)."""
    left, top = (image.width - PATCH) // 2, (image.height - PATCH) // 2
    return image.crop((left, top, left + PATCH, top + PATCH))


def clip_score(images: torch.Tensor, prompts: torch.Tensor) -> torch.Tensor:
    """Return the cosines (N,) of features (N, D) of images and of their prompts (Hessel et al., 2021).

    They lie in [-1, 1], as in the paper's tables: not clipped at 0, and not multiplied by 100 or 2.5.
    """
    return F.cosine_similarity(images.float(), prompts.float(), dim=-1)


def pickscore(images: torch.Tensor, prompts: torch.Tensor, logit_scale: float) -> torch.Tensor:
    """Return exp(logit_scale) times the cosines, (N,) (Kirstain et al., 2023, eq. 1); about 20 if released."""
    return torch.exp(torch.tensor(logit_scale)) * clip_score(images, prompts)


def diversity(features: torch.Tensor, groups: Sequence[Hashable]) -> torch.Tensor:
    """Return the mean pairwise 1 - cosine of features (N, D) of each prompt with several images: (P,), in [0, 2]."""
    features, spreads = F.normalize(features.double(), dim=-1), []
    for rows in _rows_by_group(groups):
        n = len(rows)
        if n > 1:
            cosines = features[rows].sum(0).square().sum()  # each pair counts twice, and each image with itself once
            spreads.append(1 - (cosines - n) / (n * (n - 1)))
    return torch.stack(spreads) if spreads else torch.empty(0, dtype=torch.float64)


def standard_error(scores: torch.Tensor, groups: Sequence[Hashable]) -> Optional[float]:
    """Return the standard error over prompts (the groups) of the mean of scores (N,); None for a single prompt."""
    values = scores.double().tolist()
    means = [sum(values[row] for row in rows) / len(rows) for rows in _rows_by_group(groups)]
    return torch.tensor(means, dtype=torch.float64).std().item() / len(means) ** 0.5 if len(means) > 1 else None


def _rows_by_group(groups: Sequence[Hashable]) -> list[list[int]]:
    rows = defaultdict(list)
    for row, group in enumerate(groups):
        rows[group].append(row)
    return list(rows.values())
