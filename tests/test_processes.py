"""Jobs of real processes over loopback: the same cartridge as one process, and what becomes of a job that loses one."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file
from tiny_runs import write_inputs

from cartridges_jax.training.metrics import history

ROOT = Path(__file__).parent.parent
BOUND = 1e-5  # of slots after STEPS of Adam, and of losses, when processes add up in another order
STEPS, LEARNING_RATE = 6, 5e-2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("jobs"))


def start(folder: Path, name: str, count: int, devices: int = 1, **changes: Any) -> list[subprocess.Popen[str]]:
    """The processes of a job of `count`, each with `devices` virtual devices."""
    values = {
        "dataset": str(folder / "dataset.parquet"),
        "corpus": str(folder / "corpus.txt"),
        "output_dir": str(folder / name),
        "model": str(tiny.folder()),
        "seq_len": 64,
        "batch_size": 4,
        "num_epochs": 4,
        "num_steps": STEPS,
        "checkpoint_every": 2,
        "distributed": count > 1,
        "init": {"num_slots": 16, "num_frozen": 2},
        "optim": {"lr": LEARNING_RATE, "warmup_steps": 2},
        "evals": {
            "every": 3,
            "loss": ({"name": "seen", "dataset": str(folder / "dataset.parquet")},),
            "off_topic": True,
            "patience": 9,
        },
    } | changes
    config = folder / f"{name}.py"
    config.write_text(
        f"from ml_collections import ConfigDict\n\n\ndef get_config():\n    return ConfigDict({values!r})\n"
    )
    return processes([sys.executable, "-m", "cartridges_jax.train", f"--config={config}"], count, devices)


def processes(command: list[str], count: int, devices: int = 1) -> list[subprocess.Popen[str]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": str(devices), "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    environment |= {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(count)}
    return [
        subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment | {"JAX_PROCESS_ID": str(i)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(count)
    ]


def finish(job: list[subprocess.Popen[str]]) -> list[tuple[str, str]]:
    """Standard output and error of each process."""
    said = [process.communicate(timeout=600) for process in job]
    assert [process.returncode for process in job] == [0] * len(job), [error[-2000:] for _, error in said]
    return said


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[str, np.ndarray]:
    """The slots that one process with two devices trains."""
    finish(start(folder, "alone", 1, devices=2))
    return load_file(folder / "alone" / "cartridge.safetensors")


def test_two_processes_are_one_bit_for_bit(folder: Path, alone: dict[str, np.ndarray]):
    said = finish(start(folder, "two", 2))
    assert [f"{folder}/two/cartridge.safetensors" in out for out, _ in said] == [True, False]
    theirs, ours = ((folder / name / "cartridge.safetensors").read_bytes() for name in ("alone", "two"))
    assert ours == theirs
    lines = [(folder / name / "metrics.jsonl").read_text().count("\n") for name in ("alone", "two")]
    assert lines == [STEPS + 3] * 2  # evaluated before, in the middle and after


def test_a_process_reads_its_part_of_the_weights_and_no_more(tmp_path: Path):
    tiny.write_model(tmp_path / "model", vocab_size=320)
    program = ROOT / "tests" / "mesh_programs.py"
    finish(processes([sys.executable, str(program), "loading", str(tmp_path)], 2))
    for i in range(2):
        found = json.loads((tmp_path / f"{i}.json").read_text())
        norms = 4 * tiny.WIDTH * (2 * tiny.LAYERS + 1)  # every device has them whole
        assert found["parts"] == found["held"] == (found["whole"] - norms) // 2 + norms
        assert found["same"] and len(set(found["fingerprints"])) == 1


def assert_agree(folder: Path, name: str, alone: dict[str, np.ndarray]) -> None:
    """Losses agree at every step, and slots but for the few whose gradient is no more than rounding.

    Adam divides a gradient by its own size: one that is zero but for the order of a sum moves its slot a visible part
    of the learning rate, here or there.
    """
    theirs, ours = (
        [line for line in history(folder / run / "metrics.jsonl") if "loss" in line]  # others are of evaluations
        for run in ("alone", name)
    )
    assert len(theirs) == STEPS
    for key in ("loss", "grad_norm"):
        np.testing.assert_allclose([m[key] for m in ours], [m[key] for m in theirs], rtol=BOUND)
    for key, slots in load_file(folder / name / "cartridge.safetensors").items():
        difference = np.abs(slots - alone[key])
        assert np.quantile(difference, 0.99) <= BOUND, key
        assert difference.max() <= LEARNING_RATE / 50, key


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("mesh", [{"data": 4}, {"data": 1, "fsdp": 4}, {"fsdp": 2, "data": 2}])
def test_four_processes_agree_with_one(folder: Path, alone: dict[str, np.ndarray], mesh: dict[str, int]):
    name = "four-" + "-".join(map(str, mesh.values()))
    finish(start(folder, name, 4, mesh=mesh))
    assert_agree(folder, name, alone)


@pytest.mark.slow
@pytest.mark.timeout(900)  # the others wait long before they give up
@pytest.mark.parametrize("lost", [0, 1])
def test_a_lost_process_ends_the_job_and_the_restart_resumes(folder: Path, alone: dict[str, np.ndarray], lost: int):
    """The restart is on another mesh: one process, one device."""
    name = f"lost-{lost}"
    job = start(folder, name, 2)
    checkpoints, deadline = folder / name / "checkpoints", time.monotonic() + 240
    while not (checkpoints.is_dir() and any(path.name.isdigit() for path in checkpoints.iterdir())):
        assert time.monotonic() < deadline and job[lost].poll() is None
        time.sleep(0.01)
    job[lost].send_signal(signal.SIGKILL)
    out, error = job[1 - lost].communicate(timeout=280)
    job[lost].communicate()
    assert job[1 - lost].returncode != 0 and out.count("cartridge:") == 0
    # JAX's own watch ends a process that is within a collective, before ours can speak
    assert "run the same command again" in error or "another task died" in error, error
    finish(start(folder, name, 1))
    assert_agree(folder, name, alone)


def test_a_job_without_others_is_refused(folder: Path):
    config = folder / "nobody.py"
    values = {"dataset": "-", "corpus": "-", "output_dir": "-", "distributed": True}
    config.write_text(
        f"from ml_collections import ConfigDict\n\n\ndef get_config():\n    return ConfigDict({values!r})\n"
    )
    command = [sys.executable, "-m", "cartridges_jax.train", f"--config={config}"]
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "SLURM_", "KUBERNETES_"))}
    done = subprocess.run(command, cwd=ROOT, env=environment | {"JAX_PLATFORMS": "cpu"}, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: config.distributed is True, but who the other processes are")
