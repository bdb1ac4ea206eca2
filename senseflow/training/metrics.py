# Copyright 2026 The SenseFlow-scripts authors. Licensed under the Apache License, Version 2.0.
"""Log the scalars of a run's iterations, and notice what ends the run early."""

import math
import os
import time
from collections import Counter
from typing import Iterator, Optional

import torch
from accelerate.logging import get_logger
from accelerate.utils import send_to_device

from senseflow.errors import UserError
from senseflow.training.roles import Role
from senseflow.training.runtime import ENDINGS, Runtime
from senseflow.training.signals import SignalMonitor


logger = get_logger(__name__)

MEAN_WINDOW = 100  # values of a loss over which its running mean is taken
PROGRESS_BAR = ("dmd_loss", "isg_loss", "adversarial_loss", "fake_loss", "discriminator_loss")
PATIENCE = 3  # iterations with non-finite values, without a good student update between, until a run ends

DIVERGED = "the run has diverged; resume from an earlier checkpoint with a lower --learning_rate"
BROKEN_FROM_THE_START = (
    "no iteration of this run was finite, so the student has not diverged: the teacher, its VAE or text encoders, or "
    "the checkpoint to start from yield values that are not; give others, or --mixed_precision no and --vae_dtype fp32"
)


class Metrics:
    """Log the scalars of the iterations to the trackers and the progress bar.

    Values are read one iteration late, so that the device never waits for the host. The progress bar shows running
    means. Added to what `train_iteration` returns are `lr`, `samples_per_second` (of this iteration, without the
    validation images and checkpoints between two) and, since this start of the run, `{role}_skipped_steps` (steps with
    a gradient norm that was not finite) and `signal/fake_lag` (the fake score's loss over its running mean).

    Args:
        samples: per iteration, over all processes.
        progress: a tqdm progress bar.
    Attributes:
        ended_by: the one of ENDINGS that ends the run early, else None. It is known in all processes after the same
            iteration: the one that was running, or the next.
        failure: the error in this process' data that ends the run, else None.
    """

    def __init__(self, runtime: Runtime, student: Role, samples: int, progress):
        self.runtime, self.student, self.samples, self.progress = runtime, student, samples, progress
        self.ended_by: Optional[str] = None
        self.failure: Optional[UserError] = None
        self._pending: Optional[tuple] = None  # what `flush` logs: of the last iteration, read from the device then
        self._num_bad_in_a_row, self._start = 0, self._now()
        self._was_finite = False  # whether any iteration of this run was
        self._skipped: Counter[str] = Counter()
        self._monitor = SignalMonitor(runtime.args.rank > 0)
        self._means: dict[str, float] = {}
        self._num_values: Counter[str] = Counter()

    def batches(self, loader, iterations: int) -> Iterator[list[dict]]:
        """Iterate over the micro-batches of so many iterations, on the device, until something ends the run.

        Raises:
            UserError: one of several processes cannot make a batch. The others wait for it and cannot save. A single
                process sets `ended_by` instead.
        """
        runtime = self.runtime
        runtime.save_when_interrupted()
        loader.worker_init_fn = _leave_process_group
        data = iter(loader)
        for _ in range(iterations):
            if self.ended_by:
                return
            self._start = self._now()
            try:
                batches = [next(data) for _ in range(runtime.args.gradient_accumulation_steps)]
            except UserError as error:
                if runtime.accelerator.num_processes > 1:
                    raise UserError(f"{error}, {runtime.last_checkpoint()}", error.exit_code) from error
                self.failure, self.ended_by = error, "failure"
                return
            if loader.failure is not None:
                self.failure = loader.failure
                runtime.endings.add("failure")
            yield send_to_device(batches, runtime.device, non_blocking=True)

    def push(self, iteration: int, values: dict[str, torch.Tensor]) -> None:
        """Take an iteration's scalars, on the device, and log those of the iteration before."""
        self.flush()
        names = sorted(values)
        scalars = [values[name].detach().float().reshape(()) for name in names]
        endings = torch.tensor([float(ending in self.runtime.endings) for ending in ENDINGS])
        scalars += endings.to(self.runtime.device, non_blocking=True)
        means = self.runtime.accelerator.reduce(torch.stack(scalars), reduction="mean")
        self._pending = (iteration, self.student.learning_rate, names, means, self._start, self._now())
        self._start = self._now()

    def flush(self) -> None:
        """Log the last iteration pushed, unless that has been done.

        Raises:
            UserError: values were not finite for PATIENCE iterations.
        """
        if self._pending is None:
            return
        iteration, learning_rate, names, means, start, end = self._pending
        self._pending = None
        means = means.tolist()
        values, endings = dict(zip(names, means)), dict(zip(ENDINGS, means[len(names) :]))
        self.ended_by = self.ended_by or next((ending for ending, mean in endings.items() if mean > 0), None)
        self._check_finite(iteration, values)
        for name in names:
            if name.endswith("_grad_norm"):
                role = name.removesuffix("_grad_norm")
                self._skipped[role] += not math.isfinite(values[name])
                values[f"{role}_skipped_steps"] = self._skipped[role]
        if math.isfinite(values.get("fake_loss", math.nan)) and self._means.get("fake_loss", 0) > 0:
            values["signal/fake_lag"] = values["fake_loss"] / self._means["fake_loss"]
        seconds = end - start if isinstance(end, float) else start.elapsed_time(end) / 1000
        values |= {"lr": learning_rate, "samples_per_second": self.samples / max(seconds, 1e-9)}
        self.runtime.log(values, step=iteration)
        self._monitor.update(iteration, values)
        for name in PROGRESS_BAR:
            if math.isfinite(values.get(name, math.nan)):
                self._num_values[name] = min(self._num_values[name] + 1, MEAN_WINDOW)
                mean = self._means.setdefault(name, 0.0)
                self._means[name] += (values[name] - mean) / self._num_values[name]
        postfix = {name: f"{self._means[name]:.3g}" for name in PROGRESS_BAR if name in self._means}
        self.progress.set_postfix(postfix, refresh=False)
        self.progress.update(1)

    def _now(self) -> float | torch.cuda.Event:
        """Return the time in seconds, on a GPU as an event behind the work queued so far, for which nobody waits."""
        if self.runtime.device.type != "cuda":
            return time.monotonic()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _check_finite(self, iteration: int, values: dict[str, float]) -> None:
        bad = [name for name, value in values.items() if not math.isfinite(value)]
        if values.get("dmd_non_finite", 0) > 0:
            bad.append("dmd_gradient")
        if bad:
            self._num_bad_in_a_row += 1
            problem = f"not finite: {', '.join(bad)} ({self._num_bad_in_a_row} in a row)"
            logger.warning(f"iteration {iteration}: {problem}")
            if self._num_bad_in_a_row >= PATIENCE:
                problem = f"{', '.join(bad)} not finite {PATIENCE} times in a row, last in iteration {iteration}"
                raise UserError(f"{problem}: {DIVERGED if self._was_finite else BROKEN_FROM_THE_START}")
        else:
            self._was_finite = True
            if "dmd_loss" in values:
                self._num_bad_in_a_row = 0


def _leave_process_group(worker: int) -> None:
    """Keep signals that Ctrl-C or a launcher sends to the process group from a worker of the DataLoader."""
    os.setpgid(0, 0)
