"""Runs whose directory was damaged, or is another's: told by name, and never trained on."""

from __future__ import annotations

import gc
import json
import logging
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from tiny_runs import bytes_of, config_of, interrupted, metrics_of, settings_in
from tiny_runs import inputs as inputs

from cartridges_jax.cartridge.arrays import Cartridge
from cartridges_jax.command_line import files
from cartridges_jax.command_line.errors import UserError
from cartridges_jax.initial.texts import SummaryConfig
from cartridges_jax.training.checkpoint import Checkpoints, checksum
from cartridges_jax.training.metrics import history
from cartridges_jax.training.run import train

# Orbax leaves coroutines behind where it cannot read, which complain when they are collected: here, by `collected`
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
STEPS = 8  # with a checkpoint behind every third, and the last


@pytest.fixture(autouse=True)
def collected() -> Iterator[None]:
    yield
    gc.collect()


@pytest.fixture(scope="module")
def stopped(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run that was stopped behind step 7, with checkpoints of 3 and 6."""
    folder = tmp_path_factory.mktemp("stopped")
    with pytest.MonkeyPatch.context() as monkeypatch:
        interrupted(config_of(settings_in(folder, inputs), num_steps=STEPS), 7, monkeypatch)
    assert sorted(path.name for path in (folder / "run" / "checkpoints").iterdir()) == ["3", "6"]
    return folder / "run"


@pytest.fixture(scope="module")
def whole(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cartridge's file of a run that nothing disturbed."""
    return train(config_of(settings_in(tmp_path_factory.mktemp("whole"), inputs), num_steps=STEPS), tiny.model())


@pytest.fixture
def settings(stopped: Path, inputs: Path, tmp_path: Path) -> dict[str, Any]:
    shutil.copytree(stopped, tmp_path / "run")
    return settings_in(tmp_path, inputs) | {"num_steps": STEPS}


def flipped(path: Path, place: float = 0.5) -> None:
    data = bytearray(path.read_bytes())
    data[int(len(data) * place)] ^= 1
    path.write_bytes(data)


def largest(folder: Path) -> Path:
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DAMAGE: dict[str, Callable[[Path], None]] = {
    "one byte": lambda step: flipped(largest(step)),
    "truncated": lambda step: cut(largest(step)),
    "arrays gone": lambda step: largest(step).unlink(),
    "metadata cut": lambda step: cut(step / "default" / "_METADATA"),
    "metadata that is none": lambda step: (step / "default" / "_METADATA").write_bytes(b"\xff{}"),
    "no manifest": lambda step: (step / "default" / "manifest.ocdbt").unlink(),
    "empty": lambda step: shutil.rmtree(step / "default"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_checkpoint_is_told_and_the_one_before_it_is_used(
    settings: dict[str, Any], whole: Path, case: str, caplog: pytest.LogCaptureFixture
):
    folder = Path(settings["output_dir"])
    DAMAGE[case](folder / "checkpoints" / "6")
    with caplog.at_level(logging.WARNING, "cartridges_jax.training.checkpoint"):
        made = train(config_of(settings), tiny.model())
    told = [record.message for record in caplog.records if record.name == "cartridges_jax.training.checkpoint"]
    assert len(told) == 1 and "checkpoints/6 is damaged (" in told[0] and "\n" not in told[0]
    assert made.read_bytes() == whole.read_bytes()
    assert metrics_of(folder) == metrics_of(whole.parent)
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["6", "8"], "written anew"


@pytest.mark.parametrize("name", ["_METADATA", "_CHECKPOINT_METADATA"])
def test_a_checkpoint_without_a_file_of_metadata_goes_on_or_back(settings: dict[str, Any], whole: Path, name: str):
    step = Path(settings["output_dir"]) / "checkpoints" / "6"
    for path in step.rglob(name):
        path.unlink()
    assert train(config_of(settings), tiny.model()).read_bytes() == whole.read_bytes()


def test_no_whole_checkpoint_is_one_sentence_and_nothing_is_removed(settings: dict[str, Any]):
    checkpoints = Path(settings["output_dir"]) / "checkpoints"
    for step in ("3", "6"):
        flipped(largest(checkpoints / step))
    with pytest.raises(UserError, match=r"checkpoints/6, .*checkpoints/3: no checkpoint can be read: bring one back"):
        train(config_of(settings), tiny.model())
    assert sorted(path.name for path in checkpoints.iterdir()) == ["3", "6"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "uint8", "float16"])
def test_a_checksum_sees_every_bit(dtype: str):
    rng = np.random.default_rng(0)
    size = jnp.dtype(dtype).itemsize
    raw = rng.integers(0, 256, (3, 2, size), np.uint8)
    unsigned = jnp.dtype(f"uint{8 * size}")

    def state(raw: np.ndarray) -> Any:
        bits = jnp.asarray(raw.view(unsigned)[..., 0])
        return {"a": jax.lax.bitcast_convert_type(bits, jnp.dtype(dtype)), "n": jnp.int32(3)}

    expected = int(checksum(state(raw)))
    for place in np.ndindex(raw.shape):
        for bit in range(8):
            other = raw.copy()
            other[place] ^= 1 << bit
            assert int(checksum(state(other))) != expected
    assert int(checksum(state(raw))) == expected


def test_a_byte_that_changed_anywhere_is_never_restored(tmp_path: Path):
    """Restored as it was, or not at all."""
    state = {"a": jnp.arange(64.0).reshape(8, 8), "n": jnp.int32(5)}
    saved = Checkpoints(tmp_path / "saved")
    saved.save(1, state)
    saved.close()
    paths = [path.relative_to(tmp_path / "saved") for path in (tmp_path / "saved").rglob("*") if path.is_file()]
    for number, path in enumerate(paths):
        folder = tmp_path / str(number)
        shutil.copytree(tmp_path / "saved", folder)
        if (folder / path).stat().st_size:
            flipped(folder / path, 0.6)
        damaged = Checkpoints(folder)
        try:
            assert bytes_of(damaged.restore(state)) == bytes_of(state)
        except UserError as error:
            assert str(folder / "1") in str(error)
        damaged.close()


FILES: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "config cut": ("config.json", cut, r"run/config\.json is damaged"),
    "config empty": ("config.json", lambda p: p.write_bytes(b""), r"run/config\.json is damaged"),
    "config of another kind": ("config.json", lambda p: p.write_bytes(b"[1]"), r"run/config\.json is damaged"),
    "config in bytes": ("config.json", lambda p: p.write_bytes(b"\xff\xfe{}"), r"run/config\.json is damaged"),
    "config very deep": ("config.json", lambda p: p.write_bytes(b"[" * 99999), r"run/config\.json is damaged"),
    "initial cut": ("initial.safetensors", cut, r"run/initial\.safetensors is not a whole cartridge"),
    "initial empty": ("initial.safetensors", lambda p: p.write_bytes(b""), r"run/initial\.safetensors is not a whole"),
    "a line cut": (
        "metrics.jsonl",
        lambda p: p.write_bytes(p.read_bytes().replace(b'{"step": 1, ', b'{"step": 1', 1)),
        r"run/metrics\.jsonl, line 2, is damaged",
    ),
    "a line of bytes": (
        "metrics.jsonl",
        lambda p: p.write_bytes(p.read_bytes().replace(b"loss", b"lo\xff\xfe", 1)),
        r"run/metrics\.jsonl, line 1, is damaged",
    ),
    "a line of another kind": (
        "metrics.jsonl",
        lambda p: p.write_bytes(b"7\n" + p.read_bytes()),
        r"run/metrics\.jsonl, line 1, is damaged",
    ),
    "a line without a step": (
        "metrics.jsonl",
        lambda p: p.write_bytes(b'{"loss": 1}\n' + p.read_bytes()),
        r"run/metrics\.jsonl, line 1, is damaged",
    ),
}


@pytest.mark.parametrize("case", FILES)
def test_a_damaged_file_of_a_run_is_named(settings: dict[str, Any], case: str):
    name, damage, sentence = FILES[case]
    path = Path(settings["output_dir"]) / name
    damage(path)
    before = path.read_bytes()
    with pytest.raises(UserError, match=sentence) as caught:
        train(config_of(settings), tiny.model())
    assert "\n" not in str(caught.value)
    assert path.read_bytes() == before


def test_a_damaged_log_is_named_by_who_reads_it(tmp_path: Path):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 0, "loss": 1}\n{"step": 1, "lo')
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 2, is damaged"):
        history(tmp_path / "metrics.jsonl")


@pytest.mark.parametrize("damage", [cut, lambda path: path.write_bytes(b""), lambda path: flipped(path, 0.0)])
def test_a_damaged_cartridge_is_named(whole: Path, tmp_path: Path, damage: Callable[[Path], None]):
    path = tmp_path / "cartridge.safetensors"
    shutil.copy(whole, path)
    damage(path)
    with pytest.raises(UserError, match=r"cartridge\.safetensors is not a whole cartridge file"):
        Cartridge.load(path)


def test_a_second_run_on_a_directory_is_refused_and_harms_nothing(settings: dict[str, Any], whole: Path):
    folder = Path(settings["output_dir"])
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys, time; from cartridges_jax.command_line import files\n"
            "with files.locked(sys.argv[1]): print('held', flush=True); time.sleep(60)",
            str(folder),
        ],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout and holder.stdout.readline() == "held\n"
    start = time.monotonic()
    with pytest.raises(UserError, match=r"run is in use by another run: wait for it or choose another output_dir"):
        train(config_of(settings), tiny.model())
    assert time.monotonic() - start < 5, "before anything is read"
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"} == before
    holder.kill()
    holder.wait()
    holder.stdout.close()
    assert train(config_of(settings), tiny.model()).read_bytes() == whole.read_bytes()
    assert not (folder / ".lock").exists()


def test_a_lock_leaves_nothing_where_nothing_was_written(tmp_path: Path):
    with files.locked(tmp_path / "a"), pytest.raises(UserError, match="is in use"), files.locked(tmp_path / "a"):
        pass
    assert not (tmp_path / "a").exists()
    with files.locked(tmp_path / "b"):
        (tmp_path / "b" / "x").touch()
    assert [path.name for path in (tmp_path / "b").iterdir()] == ["x"]


def test_a_servers_password_is_in_no_file_of_a_run(inputs: Path, tmp_path: Path):
    settings = settings_in(tmp_path, inputs)
    init = settings["init"] | {"summary": SummaryConfig("http://ada:secret@127.0.0.1:9/v1")}
    run = config_of(settings, num_steps=0, init=init)
    train(run, tiny.model())
    other = SummaryConfig("http://ada:another-secret@127.0.0.1:9/v1")
    train(config_of(settings, num_steps=0, init=init | {"summary": other}), tiny.model())
    found = json.loads((tmp_path / "run" / "config.json").read_text())
    assert found["init"]["summary"]["base_url"] == "http://127.0.0.1:9/v1"
    for path in (tmp_path / "run").rglob("*"):
        assert path.is_dir() or b"secret" not in path.read_bytes()
