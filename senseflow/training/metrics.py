# Copyright 2026 The SenseFlow-scripts authors. Licensed under the Apache License, Version 2.0.
"""Scalars of the iterations to the trackers and the progress bar; what ends a run early."""

import math
import os
import time
from collections import Counter
from typing import Iterator, Optional

import torch
from accelerate.logging import get_logger

from senseflow.errors import UserError
from senseflow.training.roles import Role
from senseflow.training.runtime import ENDINGS, Runtime
from senseflow.training.signals import SignalMonitor


logger = get_logger(__name__)

LAG = 100  # iterations, over which the mean of the fake score's loss is taken


def _leave_process_group(worker: int) -> None:
    """In a worker of the DataLoader: what Ctrl-C or a launcher sends to the group is the main process' business."""
    os.setpgid(0, 0)


class Metrics:
    """Scalars of the iterations to the trackers and the progress bar, read one iteration late: the device never waits for the host.

    Stops the run (UserError) when values are not finite `patience` times in a row, with no sound student's turn between. Samples
    whose DMD gradient was not finite are counted as `dmd_non_finite`, the mean over micro-batches and processes; steps that a
    network has not taken since this start as `{name}_skipped_steps`; the fake score's loss over its mean of about the last LAG
    iterations, since this start, as `signal/fake_lag`. Warns of signals that leave their bands (senseflow.training.signals).

    Attributes:
        ended_by: of ENDINGS, what reached a process and ends the run before its last iteration, else None. Known in all processes
            after the same iteration, the one that was under way or the next.
        failure: what came of this process' data, if that ends the run.
    """

    shown = ("dmd_loss", "isg_loss", "adversarial_loss", "fake_loss", "discriminator_loss")

    def __init__(self, runtime: Runtime, student: Role, samples: int, progress, patience: int = 3):
        self.runtime, self.student, self.samples, self.progress, self.patience = (
            runtime,
            student,
            samples,
            progress,
            patience,
        )
        self.pending: Optional[tuple[int, float, list[str], torch.Tensor]] = None
        self.bad_in_a_row, self.since, self.postfix = 0, time.monotonic(), {}
        self.skipped: Counter[str] = Counter()
        self.watch = SignalMonitor(runtime.args.rank > 0)
        self.fake_loss, self.fake_losses = 0.0, 0  # their mean, and how many are in it
        self.ended_by: Optional[str] = None
        self.failure: Optional[UserError] = None

    def batches(self, loader, iterations: int) -> Iterator[list[dict]]:
        """The micro-batches of `iterations` iterations, on the device; fewer where something ends the run.

        Raises:
            UserError: no batch can be made, and other processes, which wait for this one, cannot save. A process by itself says so
                with `ended_by`.
        """
        runtime = self.runtime
        runtime.save_when_interrupted()
        loader.worker_init_fn = _leave_process_group
        data = iter(loader)
        for _ in range(iterations):
            if self.ended_by:
                return
            try:
                batches = [runtime.to_device(next(data)) for _ in range(runtime.args.gradient_accumulation_steps)]
            except UserError as error:
                if runtime.accelerator.num_processes > 1:
                    raise UserError(f"{error}, {runtime.last_checkpoint()}", error.exit_code) from error
                self.failure, self.ended_by = error, "failure"
                return
            if loader.failure is not None:
                self.failure = loader.failure
                runtime.endings.add("failure")
            yield batches

    def push(self, iteration: int, values: dict[str, torch.Tensor]) -> None:
        """Takes the device scalars of an iteration, logs the one before."""
        self.flush()
        names = sorted(values)
        stacked = [values[name].detach().float().reshape(()) for name in names]
        endings = torch.tensor([float(ending in self.runtime.endings) for ending in ENDINGS])
        stacked += endings.to(self.runtime.device, non_blocking=True)
        self.pending = (iteration, self.student.learning_rate, names, self.runtime.mean(torch.stack(stacked)))

    def flush(self) -> None:
        """Logs the last iteration pushed, if that has not been done."""
        if self.pending is None:
            return
        iteration, rate, names, stacked = self.pending
        self.pending = None
        means = stacked.tolist()
        numbers, endings = dict(zip(names, means)), means[len(names) :]
        self.ended_by = self.ended_by or next((ending for ending, share in zip(ENDINGS, endings) if share > 0), None)
        self._check(iteration, numbers)
        for name in names:
            if name.endswith("_grad_norm"):
                role = name.removesuffix("_grad_norm")
                self.skipped[role] += not math.isfinite(numbers[name])
                numbers[f"{role}_skipped_steps"] = self.skipped[role]
        if math.isfinite(numbers.get("fake_loss", math.nan)):
            if self.fake_loss > 0:
                numbers["signal/fake_lag"] = numbers["fake_loss"] / self.fake_loss
            self.fake_losses = min(self.fake_losses + 1, LAG)
            self.fake_loss += (numbers["fake_loss"] - self.fake_loss) / self.fake_losses
        now = time.monotonic()
        numbers |= {"lr": rate, "samples_per_second": self.samples / max(now - self.since, 1e-9)}
        self.since = now
        self.runtime.accelerator.log(numbers, step=iteration)
        self.watch.look(iteration, numbers)
        self.postfix |= {name: f"{numbers[name]:.4g}" for name in self.shown if name in numbers}
        self.progress.set_postfix(self.postfix, refresh=False)
        self.progress.update(1)

    def _check(self, iteration: int, numbers: dict[str, float]) -> None:
        bad = [name for name, number in numbers.items() if not math.isfinite(number)]
        if numbers.get("dmd_non_finite", 0) > 0:
            bad.append("dmd_gradient")
        if bad:
            self.bad_in_a_row += 1
            logger.warning(f"iteration {iteration}: not finite: {', '.join(bad)} ({self.bad_in_a_row} in a row)")
            if self.bad_in_a_row >= self.patience:
                raise UserError(
                    f"{', '.join(bad)} not finite {self.patience} times in a row, last in iteration {iteration}: the run has "
                    "diverged; resume from an earlier checkpoint with a lower --learning_rate"
                )
        elif "dmd_loss" in numbers:
            self.bad_in_a_row = 0
