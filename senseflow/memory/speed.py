# Copyright 2026 The SenseFlow-scripts authors. Licensed under the Apache License, Version 2.0.
"""Estimate the seconds of an iteration on a card from its operations, bytes and FLOPs: a roofline.

A phase, such as the forward of the student, takes as long as the host needs to launch its operations or the card to
compute them, whichever is longer. The card moves the bytes, then computes the FLOPs. docs/performance.md has the error
on measured rows.
"""

from dataclasses import dataclass

from senseflow.memory.counter import Work


@dataclass
class Card:
    """A card as published: GiB, TB/s, and dense bf16 TFLOP/s with float32 accumulation."""

    gib: int
    terabytes_per_second: float
    teraflops: float


CARDS = {
    "RTX 4090": Card(24, 1.01, 165),
    "A100 40 GB": Card(40, 1.56, 312),
    "L40S": Card(48, 0.86, 362),
    "A100 80 GB": Card(80, 2.04, 312),
    "H100 80 GB": Card(80, 3.35, 989),
    "H200": Card(141, 4.8, 989),
}
GIB = 2**30
SIZES = sorted({card.gib for card in CARDS.values()})
USABLE = 0.93  # assumed share of it; the rest is for the driver, workspaces of kernels and fragmentation
# Fitted to rows of an H200 in benchmarks/RESULTS.md, see docs/performance.md.
LAUNCH_SECONDS = 37.5e-6  # an operation, with Python and autograd; depends on the host
BANDWIDTH_SHARE, FLOPS_SHARE = 0.57, 0.81  # of the published rates


def seconds_of(phases: dict[tuple[str, str], Work], card: Card) -> dict[tuple[str, str], float]:
    """Return the estimated seconds of each phase on a card."""
    bandwidth = BANDWIDTH_SHARE * card.terabytes_per_second * 1e12
    flops = FLOPS_SHARE * card.teraflops * 1e12
    return {
        phase: max(work.operations * LAUNCH_SECONDS, work.bytes_moved / bandwidth + work.flops / flops)
        for phase, work in phases.items()
    }
