"""The quickstart goes from a document to a report, in real processes and with a tiny model; so does the notebook."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import tiny

from cartridges_jax import quickstart
from cartridges_jax.command_line.errors import UserError

ROOT = Path(__file__).parents[1]


def _overrides() -> list[str]:
    model = tiny.folder()
    settings = {
        "num_held_out": 4,
        "server.max_num_seqs": 8,
        "synth.client.model": model,
        "synth.num_conversations": 24,
        "synth.answer.max_tokens": 8,
        "train.model": model,
        "train.init.num_slots": 64,
    }
    return [f"--config.{key}={value}" for key, value in settings.items()]


def _quickstart(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "cartridges_jax.quickstart", f"--runs={folder / 'runs'}"]
    return subprocess.run(
        [*command, *_overrides(), *arguments], cwd=ROOT, capture_output=True, text=True, timeout=240, check=False
    )


def _code_cells() -> list[dict[str, Any]]:
    notebook = json.loads((ROOT / "notebooks" / "quickstart.ipynb").read_text(encoding="utf-8"))
    assert notebook["nbformat"] == 4
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def _notebook(folder: Path, document: Path) -> subprocess.CompletedProcess[str]:
    """Runs its cells in order, as plain Python that needs no Jupyter, in a folder that has what a clone has."""
    for name in ("configs", "examples"):
        (folder / name).symlink_to(ROOT / name)
    cells = "\n".join("".join(cell["source"]) for cell in _code_cells())
    environment = os.environ | {"DOCUMENT": str(document), "OVERRIDES": " ".join(_overrides())}
    return subprocess.run(
        [sys.executable, "-c", cells], cwd=folder, env=environment, capture_output=True, text=True, timeout=240
    )


def test_from_a_document_without_questions_to_a_report_and_again_in_the_notebook(tmp_path: Path):
    """The notebook runs the same command, finds what the first run has made, and its last cell chats with that."""
    document = tmp_path / "animals.txt"
    document.write_text(tiny.TEXT[:800], encoding="utf-8")
    first = _quickstart(tmp_path, f"--document={document}")
    assert first.returncode == 0, first.stderr
    *_, last = first.stdout.strip().splitlines()
    assert last.startswith("run directory: ") and "cartridges_jax.chat" in first.stdout
    directory = Path(last.removeprefix("run directory: ").partition(" (")[0])
    report = json.loads((directory / "report.json").read_text(encoding="utf-8"))
    assert report["num_questions"] == 4
    conditions = [row["condition"] for row in report["rows"]]
    assert conditions == ["nothing", "first p tokens", "initial state", "cartridge", "full document"]
    assert all(row["answers"][0]["question"] in first.stdout for row in report["rows"])

    begun = time.monotonic()
    cartridge = (directory / "train" / "cartridge.safetensors").read_bytes()
    second = _notebook(tmp_path, document)
    assert second.returncode == 0, second.stderr
    table = [line for line in first.stdout.splitlines() if line.startswith("|")]
    assert len(table) >= len(conditions) and all(line in second.stdout for line in table)
    assert f"run directory: runs/{directory.name} " in second.stdout
    assert (directory / "train" / "cartridge.safetensors").read_bytes() == cartridge
    assert "server" not in second.stderr and time.monotonic() - begun < 120


def test_the_notebook_keeps_no_output_and_every_cell_is_python():
    for cell in _code_cells():
        assert cell["outputs"] == [] and cell["execution_count"] is None
        compile("".join(cell["source"]), "cell", "exec")


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # ml_collections
def test_a_setting_of_an_earlier_version_is_answered_with_its_new_name(tmp_path: Path):
    run = _quickstart(tmp_path, "--config.server.slots=8")
    assert (run.returncode, run.stdout) == (2, "") and not (tmp_path / "runs").exists()
    assert run.stderr == "error: --config.server.slots has a new name: write --config.server.max_num_seqs\n"
    earlier = tmp_path / "earlier.py"
    earlier.write_text((ROOT / "configs" / "quickstart.py").read_text().replace("max_num_seqs", "slots"))
    with pytest.raises(UserError, match=r"config\.server\.slots has a new name: write max_num_seqs in the config file"):
        quickstart.main([f"--config={earlier}", f"--runs={tmp_path / 'runs'}"])
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("content", "message"), [(None, "does not exist"), (b" \n", "is empty"), (b"\xff\xfe\x00", "is not UTF-8")]
)
def test_an_unusable_document_is_one_sentence_and_leaves_nothing(tmp_path: Path, content: bytes | None, message: str):
    document = tmp_path / "document.txt"
    if content is not None:
        document.write_bytes(content)
    run = _quickstart(tmp_path, f"--document={document}")
    assert run.returncode == 2 and run.stderr.startswith("error: ") and run.stderr.count("\n") == 1
    assert message in run.stderr and not (tmp_path / "runs").exists()
