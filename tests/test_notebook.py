"""The notebook runs from its first cell to its last; its cells are plain Python, which needs no Jupyter."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny

NOTEBOOK = Path(__file__).parents[1] / "notebooks" / "quickstart.ipynb"


def code_cells() -> list[dict[str, Any]]:
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert notebook["nbformat"] == 4
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def test_no_output_is_kept_and_every_cell_is_python():
    for cell in code_cells():
        assert cell["outputs"] == [] and cell["execution_count"] is None
        compile("".join(cell["source"]), "cell", "exec")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_notebook_makes_a_cartridge_and_chats_with_it(tmp_path: Path):
    """In a folder of its own, which has what a clone has."""
    for name in ("configs", "examples"):
        (tmp_path / name).symlink_to(NOTEBOOK.parents[1] / name)
    document, model = tmp_path / "animals.txt", tiny.folder()
    document.write_text(tiny.TEXT[:800], encoding="utf-8")
    settings = {
        "num_held_out": 4,
        "server.slots": 8,
        "synth.client.model": model,
        "synth.num_conversations": 24,
        "synth.answer.max_tokens": 8,
        "train.model": model,
        "train.init.num_slots": 64,
    }
    overrides = " ".join(f"--config.{name}={value}" for name, value in settings.items())
    program = f"import os\nos.environ |= { ({'DOCUMENT': str(document), 'OVERRIDES': overrides})!r}\n"
    program += "\n".join("".join(cell["source"]) for cell in code_cells())
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=850)
    assert done.returncode == 0, done.stderr
    assert "gap" in done.stdout and "run directory: runs/animals" in done.stdout
