"""The soak of `benchmarks/soak.py`, for a few seconds on a tiny model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import tiny

PROGRAM = Path(__file__).parents[2] / "benchmarks" / "soak.py"


def test_a_few_seconds_of_everything():
    command = [sys.executable, str(PROGRAM), "--minutes=0.08", f"--model={tiny.folder()}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout)
    assert report["wrong"] == [] and {"answer", "stream"} <= report["done"].keys()
