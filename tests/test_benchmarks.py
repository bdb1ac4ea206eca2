"""benchmarks/gpu.py with tiny networks on a CPU."""

import json
import subprocess
import sys

from helpers import ROOT


def test_a_case_is_measured_and_the_others_are_reported_as_not_measured(tmp_path):
    command = [sys.executable, ROOT / "benchmarks" / "gpu.py", "--tiny", "--iterations", "2", "--cases", "sdxl-dmd2"]
    subprocess.run([*command, "--output_dir", tmp_path], check=True, capture_output=True)
    result = json.loads((tmp_path / "gpu.json").read_text())["sdxl-dmd2"]
    assert "failed" not in result and len(result["iterations"]) == 4
    assert {row["student"] for row in result["iterations"] if row["timed"]} == {True, False}
    assert json.loads((tmp_path / "dry_runs" / "sdxl-dmd2.json").read_text())["peak_gib"] > 0
    table = (tmp_path / "gpu.md").read_text()
    assert "| flux-rank | not measured |" in table and "| sdxl-dmd2 | not measured |" not in table
