"""`benchmarks/accelerator.py`: every part runs, what is wrong is found, and on a GPU nothing is."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import pytest
from accelerator_parts import correct
from accelerator_parts.measuring import Line, Options, attempts

from cartridges_jax import kernels
from cartridges_jax.kernels.decode_attention import cpu as decode_cpu
from cartridges_jax.kernels.decode_attention import xla as decode_xla
from cartridges_jax.kernels.prefix_attention import gpu, tpu, xla
from cartridges_jax.parallel import collectives

PROGRAM = Path(__file__).parents[1] / "benchmarks" / "accelerator.py"
PARTS = {"device", "correct", "attention", "decode", "train", "engine", "quickstart", "profile"}


def run(folder: Path, *arguments: str, python: str = sys.executable) -> tuple[int, list[Line], str]:
    """The exit status, the lines and the tables."""
    done = subprocess.run([python, PROGRAM, f"--out={folder}", *arguments], capture_output=True, text=True)
    text = (folder / "accelerator.jsonl").read_text()
    assert text == "".join(f"{line}\n" for line in done.stdout.split("\n\n")[0].splitlines())
    return done.returncode, [json.loads(line) for line in text.splitlines()], (folder / "accelerator.md").read_text()


@pytest.mark.timeout(600)  # eight processes that compile: a minute, or several on a busy machine
def test_every_part_runs(tmp_path: Path) -> None:
    status, lines, tables = run(tmp_path, "--tiny")
    assert [line for line in lines if "failed" in line or line.get("verdict") == "WRONG"] == []
    assert status == 0
    assert {line["part"] for line in lines} == PARTS
    assert all(f"\n## {part}\n" in tables for part in PARTS)
    assert {line["skipped"].partition(":")[0] for line in lines if "skipped" in line} == {
        "torch_attention",
        "torch_train",
        "torch_engine",
    }
    checks = {line["check"] for line in lines if "check" in line}
    assert {"prefix attention", "decode attention", "loss and its gradient", "greedy answer"} < checks


@pytest.mark.parity
def test_the_sides_that_we_are_compared_with_run(tmp_path: Path) -> None:
    status, lines, _ = run(tmp_path, "--tiny", "attention", "train", "engine")
    assert status == 0, lines
    sides = {line[name] for line in lines for name in ("attention", "side", "decoding") if name in line}
    theirs = {"flex_attention", "transformers, SDPA", "PEFT's CARTRIDGE", "transformers, static cache"}
    assert theirs < sides
    assert not any("skipped" in line for line in lines)


def test_parts_are_listed_and_others_refused(tmp_path: Path) -> None:
    listed = subprocess.run([sys.executable, PROGRAM, "--list"], capture_output=True, text=True, check=True)
    assert [line.split()[0] for line in listed.stdout.splitlines()] == [
        "correct",
        "attention",
        "decode",
        "train",
        "engine",
        "quickstart",
        "profile",
    ]
    refused = subprocess.run([sys.executable, PROGRAM, "speed"], capture_output=True, text=True)
    assert refused.returncode == 2 and "'speed' is no part: expected some of correct, attention" in refused.stderr


def test_a_part_that_takes_too_long_is_stopped_and_says_so(tmp_path: Path) -> None:
    status, lines, _ = run(tmp_path, "--tiny", "--seconds=0.1", "profile")
    assert status == 1
    assert {"part": "profile", "failed": "profile was stopped at the end of the part's time"} in [
        {name: line[name] for name in line if name != "s"} for line in lines
    ]


def test_one_failure_does_not_end_the_others() -> None:
    def fails() -> Line:
        raise RuntimeError("out of memory\nand more")

    found = list(attempts([({"n": 1}, fails), ({"n": 2}, lambda: {"ms": 3})]))
    assert found[0]["failed"] == "RuntimeError: out of memory" and "in fails" in found[0]["traceback"]
    assert found[1] == {"n": 2, "ms": 3}


def _more_than_asked(original: Any) -> Any:
    return lambda *arguments: original(*arguments) + 1


# A fault, and the check that finds it: a query that sees one place too many, or weights that are not what they were.
FAULTS = {
    "xla's mask": (xla, "first_key", lambda f: lambda *a: f(*a) * 0, "attention", "xla"),
    "xla's scale": (xla, "xla_attention", lambda f: lambda q, *a, **o: f(1.01 * q, *a, **o), "attention", "xla"),
    "the gpu's mask": (gpu, "first_key", lambda f: lambda *a: f(*a) * 0, "attention", "gpu"),
    "the tpu's scale": (
        tpu,
        "_attention",
        lambda f: lambda plan, inputs, *a: f(plan, inputs._replace(q=1.01 * inputs.q), *a),
        "attention",
        "tpu",
    ),
    "decoding's mask": (decode_xla, "visible", lambda f: lambda start, *a: f(start - 1, *a), "decode", "xla"),
    "decoding's range": (decode_cpu, "_range", lambda f: lambda place, *a: f(place - 1, *a), "decode", "cpu"),
    "the loss": (collectives, "log_sum_exp", _more_than_asked, "loss", ""),
}
CHECKS = {"attention": correct.attention_checks, "decode": correct.decode_checks, "loss": correct.loss_checks}


@pytest.fixture
def fresh_programs() -> Iterator[None]:
    """What was compiled before a fault was planted would not have it; nor may what has it be kept."""
    jax.clear_caches()
    yield
    jax.clear_caches()


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(fault: str, monkeypatch: pytest.MonkeyPatch, fresh_programs: None) -> None:
    module, name, plant, check, of = FAULTS[fault]
    monkeypatch.setattr(module, name, plant(getattr(module, name)))
    checks = [(what, call) for what, call in CHECKS[check](tiny=True) if what["of"].startswith(of)]
    assert "WRONG" in {line.get("verdict") for line in attempts(checks[:2])}


def test_a_platforms_own_kernel_is_not_interpreted(monkeypatch: pytest.MonkeyPatch, fresh_programs: None) -> None:
    """What ran interpreted on a GPU would say nothing about it. On a CPU, Pallas refuses to do anything else."""
    monkeypatch.setattr(kernels, "platform", lambda: "gpu")
    names = {what["of"].split()[0] for what, _ in correct.attention_checks(tiny=False)}
    assert names == {"xla", "gpu"}
    of_a_gpu = [(what, call) for what, call in correct.attention_checks(tiny=False) if what["of"].startswith("gpu")]
    (line,) = attempts(of_a_gpu[:1])
    assert "interpret mode" in line["failed"]


def _on_a_gpu() -> list[Any]:
    checks = itertools.chain(*(of(tiny=False) for of in CHECKS.values()))
    return [pytest.param(call, id=f"{what['check']}, {what['of']}, {what['dtype']}") for what, call in checks]


@pytest.fixture
def gpu_is_here() -> None:
    try:
        jax.devices("gpu")
    except RuntimeError:
        pytest.skip("no NVIDIA GPU is here, or JAX is not installed for it: pip install 'cartridges-jax[cuda]'")


@pytest.mark.gpu
@pytest.mark.usefixtures("gpu_is_here")
@pytest.mark.parametrize("check", _on_a_gpu())
def test_right_on_a_gpu(check: Any) -> None:
    with jax.default_matmul_precision("highest"):
        assert check()["verdict"] == "right"


@pytest.mark.gpu
@pytest.mark.usefixtures("gpu_is_here")
def test_a_gpu_gives_what_a_cpu_gives(tmp_path: Path) -> None:
    options = Options(tiny=False, model="smollm2-135m", dataset=None, gap=None)
    with correct.on_a_cpu(options, tmp_path / "cpu.npz") as process, jax.default_matmul_precision("highest"):
        lines = list(attempts(correct.against_the_cpu(options, process, tmp_path / "cpu.npz")))
    assert {line.get("verdict", line.get("failed")) for line in lines} == {"right"}
