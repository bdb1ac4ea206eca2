"""The benchmarks that need a GPU or full-size networks, on tiny ones: they run, and say what was not measured."""

import json
import subprocess
import sys

from helpers import ROOT


def test_what_a_gpu_would_be_asked(tmp_path):
    command = [
        sys.executable,
        str(ROOT / "benchmarks" / "gpu.py"),
        "--tiny",
        "--iterations",
        "6",
        "--output_dir",
        str(tmp_path),
    ]
    subprocess.run([*command, "--cases", "sdxl-dmd2"], check=True, capture_output=True)
    found = json.loads((tmp_path / "gpu.json").read_text())["sdxl-dmd2"]
    assert "failed" not in found and len(found["iterations"]) == 6
    assert {row["student"] for row in found["iterations"]} == {True, False}
    assert found["tflop"]["student's turn"] > found["tflop"]["other"] > 0
    table = (tmp_path / "gpu.md").read_text()
    assert "| flux-rank | not measured |" in table and "| sdxl-dmd2 | not measured |" not in table
