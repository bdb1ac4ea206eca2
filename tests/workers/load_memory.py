"""Measure the host memory of a process that loads, saves and resumes a network of 1 GB. Launched by test_modes.py.

python tests/workers/load_memory.py FOLDER OUTPUT_DIR

FOLDER holds a transformer/ (see `write_network`). Each process writes OUTPUT_DIR/RANK.json: for a frozen role, a
trained one, its checkpoint and its resume, the peak and the final memory in MB, beyond that of before.
"""

import gc
import json
import os
import sys
import threading
from pathlib import Path

import torch
from diffusers import FluxTransformer2DModel

from senseflow.errors import exit_without_finalization
from senseflow.models.hub import ModelSource
from senseflow.models.weights import from_pretrained_meta
from senseflow.training.runtime import Runtime
from train_senseflow_flux import parse_args


PAGE, MB = os.sysconf("SC_PAGE_SIZE"), 2**20


def write_network(folder: Path) -> None:
    """Write random weights in float32, in files of 300 MB."""
    config = {"num_layers": 2, "num_single_layers": 4, "attention_head_dim": 128, "num_attention_heads": 12}
    config |= {"joint_attention_dim": 512, "pooled_projection_dim": 256, "in_channels": 16, "guidance_embeds": False}
    with torch.device("meta"):
        network = FluxTransformer2DModel(**config)
    network.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.uniform_(-0.02, 0.02)
    network.save_pretrained(folder / "transformer", max_shard_size="300MB")


class MemoryPeak:
    """Measure the resident memory of this process within a block, in MB beyond that of before.

    Attributes:
        peak, held: at most within the block, and after it.
    """

    def __enter__(self):
        gc.collect()
        self._start = self._max = self._resident()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample)
        self._thread.start()
        return self

    @staticmethod
    def _resident() -> float:
        return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE / MB

    def _sample(self) -> None:
        while not self._done.wait(0.002):
            self._max = max(self._max, self._resident())

    def __exit__(self, *_):
        self._done.set()
        self._thread.join()
        gc.collect()
        self.peak, self.held = self._max - self._start, self._resident() - self._start


def main() -> None:
    folder, out = map(Path, sys.argv[1:])
    flags = ["--pretrained_model_name_or_path", str(folder), "--mixed_precision", "no", "--report_to", "none"]
    runtime = Runtime(parse_args([*flags, "--output_dir", str(out)]))

    def network() -> torch.nn.Module:
        return from_pretrained_meta(ModelSource(*flags[:2]), FluxTransformer2DModel, "transformer")

    with MemoryPeak() as frozen:
        roles = [runtime.frozen_role("teacher", network())]  # which keeps it in memory
    with MemoryPeak() as trained:
        roles.append(student := runtime.trained_role("student", network(), 1e-3, subfolder="transformer"))
    out.mkdir(parents=True, exist_ok=True)
    with MemoryPeak() as saved:
        student.save(out)
    runtime.accelerator.wait_for_everyone()
    with MemoryPeak() as resumed:
        student.load(out)
    stages = {"frozen": frozen, "trained": trained, "saved": saved, "resumed": resumed}
    memory = {name: {"peak": round(stage.peak), "held": round(stage.held)} for name, stage in stages.items()}
    (out / f"{runtime.accelerator.process_index}.json").write_text(json.dumps(memory))
    runtime.accelerator.wait_for_everyone()
    runtime.accelerator.end_training()
    exit_without_finalization()


if __name__ == "__main__":
    main()
