"""A wheel is built and installed: it brings two packages and what they need, and commands work in an empty folder."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import tiny

ROOT = Path(__file__).parents[1]
PACKAGES = ("cartridges_jax", "synth")
SHIPPED = ("configs", "examples")  # these lie beside the packages, and inside cartridges_jax when it is installed
NOT_COPIED = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "runs")
PIP = (sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel is built from a copy, since setuptools leaves files behind and takes in what it left before."""
    folder = tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT, folder / "source", ignore=NOT_COPIED, symlinks=True)
    offline = ("--no-deps", "--no-index", "--no-build-isolation")
    subprocess.run([*PIP, "wheel", *offline, f"--wheel-dir={folder}", str(folder / "source")], check=True)
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path) -> Path:
    """A folder with the wheel's packages; those that they need are this environment's."""
    folder = wheel.parent / "installed"
    subprocess.run([*PIP, "install", "--no-deps", "--no-index", f"--target={folder}", str(wheel)], check=True)
    return folder


def files_of(folder: Path) -> set[str]:
    """Returns the paths of a folder's files, except those that Python and editors leave there."""
    paths = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return {str(path) for path in paths if path.parts[-2:-1] != ("__pycache__",) and not path.name.startswith(".")}


def start(installed: Path, folder: Path, *command: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", *command],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(installed)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def run(installed: Path, folder: Path, *command: str) -> tuple[int, str]:
    with start(installed, folder, *command) as process:
        said = process.communicate(timeout=120)[0]
    return process.returncode, said


def test_the_wheel_brings_two_packages_and_every_file_of_theirs(wheel: Path):
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    expected = {f"{package}/{name}" for package in PACKAGES for name in files_of(ROOT / package)}
    expected |= {f"cartridges_jax/{folder}/{name}" for folder in SHIPPED for name in files_of(ROOT / folder)}
    assert names == expected


def test_a_shipped_config_the_one_it_imports_and_its_document_are_found(installed: Path, tmp_path: Path):
    status, said = run(installed, tmp_path, "synth", "--config=configs/longer.py:synth", "--config.dry_run=True")
    assert status == 0 and "Harn Point Tide Station" in said, said
    assert os.listdir(tmp_path) == []


def test_training_from_a_shipped_config_asks_for_what_synthesis_makes(installed: Path, tmp_path: Path):
    status, said = run(installed, tmp_path, "cartridges_jax.train", "--config=configs/arxiv.py:train")
    assert status == 2 and said.startswith("error: runs/arxiv/synth/corpus.txt does not exist: "), said
    assert said.count("\n") == 1


def test_a_config_that_is_nowhere_names_both_places_and_what_is_shipped(installed: Path, tmp_path: Path):
    status, said = run(installed, tmp_path, "synth", "--config=configs/quikstart.py:synth")
    assert status == 2 and said.startswith("error: config file 'configs/quikstart.py'") and said.count("\n") == 1, said
    assert str(tmp_path) in said and str(installed / "cartridges_jax") in said
    assert all(f"configs/{name}.py" in said for name in ("arxiv", "large", "longer", "quickstart"))


@pytest.mark.slow
def test_the_quickstart_begins_in_an_empty_folder(installed: Path, tmp_path: Path):
    """Its server starts and makes conversations about the shipped document. The later stages read no other shipped file
    but the questions, which are read first of all."""
    settings = {"synth.client.model": tiny.folder(), "train.model": tiny.folder(), "synth.num_conversations": 6}
    options = [f"--config.{key}={value}" for key, value in settings.items()]
    with start(installed, tmp_path, "cartridges_jax.quickstart", *options) as process:
        while process.poll() is None and not list(tmp_path.glob("runs/document-*/synth/dataset.parquet")):
            time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=120)[0]
    assert process.returncode == 130, said
    (corpus,) = tmp_path.glob("runs/document-*/synth/corpus.txt")
    assert corpus.read_bytes() == (ROOT / "examples" / "document.txt").read_bytes()
