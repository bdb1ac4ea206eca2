"""Launched by test_modes.py: the host memory of a process that loads, saves and resumes a network of about 1 GB.

python tests/one_load.py FOLDER OUTPUT_DIR

FOLDER holds a transformer/ (see `write`). Each process writes OUTPUT_DIR/RANK.json: of a frozen role, a trained one, its checkpoint
and its resume, what the process held at most and what afterwards, beyond what it held before, in MB.
"""

import gc
import json
import os
import sys
import threading
from pathlib import Path

import torch


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from diffusers import FluxTransformer2DModel

from senseflow.models.hub import ModelSource
from senseflow.models.weights import from_pretrained_meta
from senseflow.training.runtime import Runtime
from train_senseflow_flux import parse_args


PAGE, MB = os.sysconf("SC_PAGE_SIZE"), 2**20


def write(folder: Path) -> None:
    """Random weights in float32, in files of 300 MB."""
    config = {"num_layers": 2, "num_single_layers": 4, "attention_head_dim": 128, "num_attention_heads": 12}
    config |= {"joint_attention_dim": 512, "pooled_projection_dim": 256, "in_channels": 16, "guidance_embeds": False}
    with torch.device("meta"):
        network = FluxTransformer2DModel(**config)
    network.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.uniform_(-0.02, 0.02)
    network.save_pretrained(folder / "transformer", max_shard_size="300MB")


class Peak:
    """What this process holds at most while something runs, and afterwards, beyond what it held before; in MB."""

    def __enter__(self):
        gc.collect()
        self.before = self.peak = self.now()
        self.done = threading.Event()
        self.watch = threading.Thread(target=self.look)
        self.watch.start()
        return self

    @staticmethod
    def now() -> float:
        return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE / MB

    def look(self) -> None:
        while not self.done.wait(0.002):
            self.peak = max(self.peak, self.now())

    def __exit__(self, *_):
        self.done.set()
        self.watch.join()
        gc.collect()
        self.grown, self.held = self.peak - self.before, self.now() - self.before


def main() -> None:
    folder, out = map(Path, sys.argv[1:])
    flags = ["--pretrained_model_name_or_path", str(folder), "--mixed_precision", "no", "--report_to", "none"]
    runtime = Runtime(parse_args([*flags, "--output_dir", str(out)]))
    found: dict[str, dict] = {}

    def network() -> torch.nn.Module:
        return from_pretrained_meta(ModelSource(*flags[:2]), FluxTransformer2DModel, "transformer")

    def of(name: str, peak: Peak) -> None:
        found[name] = {"peak": round(peak.grown), "held": round(peak.held)}

    with Peak() as peak:
        teacher = runtime.frozen_role("teacher", network())
    of("frozen", peak)
    with Peak() as peak:
        student = runtime.trained_role("student", network(), 1e-3, subfolder="transformer")
    of("trained", peak)
    runtime.accelerator.wait_for_everyone()
    if runtime.accelerator.is_main_process:
        out.mkdir(parents=True, exist_ok=True)
    runtime.accelerator.wait_for_everyone()
    with Peak() as peak:
        student.save(out)
    of("saved", peak)
    runtime.accelerator.wait_for_everyone()
    with Peak() as peak:
        student.load(out)
    of("resumed", peak)
    rank = runtime.accelerator.process_index
    (out / f"{rank}.json").write_text(json.dumps(found))
    runtime.accelerator.wait_for_everyone()
    del teacher
    runtime.accelerator.end_training()


if __name__ == "__main__":
    main()
