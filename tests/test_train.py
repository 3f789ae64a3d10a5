"""Training on a tiny model, end to end: what moves, what must not, and a run that is killed again and again."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from tiny_runs import STEPS, TIMING, bytes_of, config_of, metrics_of, settings_in
from tiny_runs import inputs as inputs

from cartridges_jax import train as train_module
from cartridges_jax.cartridge.arrays import Cartridge
from cartridges_jax.command_line import progress
from cartridges_jax.command_line.config import run
from cartridges_jax.command_line.errors import UserError
from cartridges_jax.initial.initializers import InitConfig, initial_cartridge
from cartridges_jax.models.language_model import load_model
from cartridges_jax.training import loop as loop_module
from cartridges_jax.training.data import PackedRows, batches, read_examples
from cartridges_jax.training.evals.during import Evals, EvalsConfig, GenerationEval, LossEval
from cartridges_jax.training.losses import Reduction
from cartridges_jax.training.metrics import MetricsLog, MetricsWriter
from cartridges_jax.training.run import train
from cartridges_jax.training.step import TrainState, train_step

ROOT = Path(__file__).parent.parent
BEGUN = {"checkpoints", "config.json", "examples", "initial.safetensors", "metrics.jsonl"}
# ml_collections loads a config file by a method that importlib is going to remove
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")

CONFIG = """
from ml_collections import ConfigDict


def get_config():
    return ConfigDict({values!r})
"""


@pytest.fixture
def settings(inputs: Path, tmp_path: Path) -> dict[str, Any]:
    return settings_in(tmp_path, inputs)


def write_config(settings: dict[str, Any], **changes: Any) -> Path:
    path = Path(settings["output_dir"]).with_name("config.py")
    path.write_text(CONFIG.format(values=settings | changes))
    return path


def leftovers(folder: Path) -> list[str]:
    """What must never remain of a run that ended by itself: unfinished files and checkpoints."""
    return [str(p) for p in folder.rglob("*") if "tmp" in p.name or (p.name.startswith(".") and p.is_file())]


def command(settings: dict[str, Any], **changes: Any) -> list[str]:
    return [sys.executable, "-m", "cartridges_jax.train", f"--config={write_config(settings, **changes)}"]


@pytest.fixture(scope="module")
def finished(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The settings of a run by the command, in a process of its own, that nothing disturbed."""
    settings = settings_in(tmp_path_factory.mktemp("finished"), inputs)
    done = subprocess.run(command(settings), cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"cartridge: {settings['output_dir']}/cartridge.safetensors\n"
    return settings


def same_outcome(settings: dict[str, Any], reference: dict[str, Any]) -> None:
    ours, theirs = Path(settings["output_dir"]), Path(reference["output_dir"])
    assert metrics_of(ours) == metrics_of(theirs)
    assert [line["step"] for line in metrics_of(ours)] == list(range(STEPS))
    assert (ours / "cartridge.safetensors").read_bytes() == (theirs / "cartridge.safetensors").read_bytes()
    assert leftovers(ours) == []


def test_a_run_leaves_what_design_says(finished: dict[str, Any]):
    folder = Path(finished["output_dir"])
    assert set(os.listdir(folder)) == {*BEGUN, "cartridge.safetensors", "report.md", "report.png"}
    assert leftovers(folder) == []
    config = json.loads((folder / "config.json").read_text())
    recorded = {name: config[name] for name in ("dataset_hash", "day")}
    ours = dataclasses.asdict(config_of(finished)) | {"output_dir": ""} | recorded
    assert config == json.loads(json.dumps(ours))
    lines = metrics_of(folder, timing=True)
    assert set(lines[0]) == {"step", "loss", "targets", "grad_norm", "lr", "tokens", *TIMING}
    np.testing.assert_allclose([line["lr"] for line in lines[:3]], [0.025, 0.05, 0.05], rtol=1e-6)
    assert (np.diff([line["tokens"] for line in lines]) > 0).all()


def test_progress_says_how_fast_it_is_and_what_it_takes(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)
    train(config_of(settings, num_steps=2, max_minutes=30.0), tiny.model())
    first = next(line for line in capsys.readouterr().err.splitlines() if line.startswith("training"))
    number = r"\d+(\.\d+)?"
    assert re.fullmatch(
        rf"training, 30 minutes at most: 1/2 steps, {number} steps/s, \d+s left, loss {number}, {number} tokens/s, "
        rf"{number} of them targets(, {number}% of the peak)?, {number} GB",
        first,
    )


def test_nothing_waits_for_the_host_between_two_steps(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch):
    """The host computes nothing with JAX there, the next batch is on its way, and numbers are read a step late."""
    happened: list[str] = []
    step, stacked, write = loop_module.train_step, loop_module._stacked, MetricsWriter.step

    def guarded_step(*arguments: Any, **options: Any) -> Any:
        happened.append("step")
        jax.config.update("jax_transfer_guard", "disallow" if happened.count("step") < 6 else "allow")
        return step(*arguments, **options)

    def noted_batches(*arguments: Any) -> Iterator[Any]:
        for batch in stacked(*arguments):
            happened.append("batch")
            yield batch

    def noted_write(*arguments: Any) -> None:
        happened.append("write")
        write(*arguments)

    monkeypatch.setattr(loop_module, "train_step", guarded_step)
    monkeypatch.setattr(loop_module, "_stacked", noted_batches)
    monkeypatch.setattr(MetricsWriter, "step", noted_write)
    try:
        train(config_of(settings, num_steps=6, checkpoint_every=6), tiny.model())
    finally:
        jax.config.update("jax_transfer_guard", "allow")
    assert happened[:9] == ["batch", "step", "batch", "step", "batch", "write", "step", "batch", "write"]


def test_later_evaluations_compile_nothing(settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Neither their forward passes nor what generates answers."""
    questions = tmp_path / "questions.jsonl"
    questions.write_text('{"question": "What weighs 7 grams?", "answer": "The owl."}\n' * 3)
    evals = EvalsConfig(
        every=2,
        loss=(LossEval("held_out", settings["dataset"]),),
        generation=(GenerationEval("asked", str(questions), max_tokens=4),),
        off_topic=True,
    )
    compiled: list[list[str]] = []
    run_evals = Evals.run

    def noted(self: Evals, cartridge: Cartridge) -> Any:
        compiled.append([])
        jax.monitoring.register_event_duration_secs_listener(lambda name, _, **__: compiled[-1].append(name))
        try:
            return run_evals(self, cartridge)
        finally:
            jax.monitoring.clear_event_listeners()

    monkeypatch.setattr(Evals, "run", noted)
    train(config_of(settings, num_steps=6, checkpoint_every=6, evals=evals), tiny.model())
    first, *others = [sum("compile" in name for name in names) for names in compiled]
    assert first and others == [0, 0, 0]


def test_the_loss_falls_and_the_cartridge_says_how_it_came_to_be(finished: dict[str, Any]):
    model, folder = tiny.model(), Path(finished["output_dir"])
    lines = metrics_of(folder)
    assert np.mean([m["loss"] for m in lines[-4:]]) < np.mean([m["loss"] for m in lines[:4]]) - 0.2
    trained = Cartridge.load(folder / "cartridge.safetensors", model=model)
    start = initial_cartridge(InitConfig(**finished["init"]), model, tiny.TEXT, [], 0)
    assert trained.provenance.corpus_hash == start.provenance.corpus_hash
    assert trained.provenance.recipe == (
        "text, first 16 tokens; 24 steps of distillation, lr 0.05, tail bucket, reduction token"
    )
    assert trained.provenance.training_tokens == lines[-1]["tokens"]
    weights = sum(model.params["blocks"][name].size for name in ("q", "k", "v", "o", "gate", "up", "down"))
    assert trained.provenance.training_flops == 4.0 * weights * lines[-1]["tokens"]


def test_frozen_slots_keep_their_bits_and_the_others_move(finished: dict[str, Any]):
    trained = Cartridge.load(Path(finished["output_dir"]) / "cartridge.safetensors")
    start = initial_cartridge(InitConfig(**finished["init"]), tiny.model(), tiny.TEXT, [], 0)
    assert trained.num_frozen == 2
    assert bytes_of([trained.keys[:, :2], trained.values[:, :2]]) == bytes_of([start.keys[:, :2], start.values[:, :2]])
    assert (trained.values[:, 2:] != start.values[:, 2:]).mean() > 0.99


def test_the_base_model_keeps_its_bits_and_another_process_agrees(settings: dict[str, Any], finished: dict[str, Any]):
    model = tiny.model()
    before = bytes_of(model.params)
    train(config_of(settings), model)
    assert bytes_of(model.params) == before
    same_outcome(settings, finished)


def test_a_bias_trains_too(settings: dict[str, Any], tmp_path: Path):
    start = Cartridge.from_text(tiny.model(), tiny.TEXT, 8, num_frozen=3)
    start = start.replace(bias=jnp.asarray(np.random.default_rng(0).standard_normal(start.keys.shape[:3]), jnp.float32))
    start.save(tmp_path / "start.safetensors")
    init = {"kind": "pretrained", "path": str(tmp_path / "start.safetensors"), "num_frozen": 3}
    trained = Cartridge.load(train(config_of(settings, init=init, num_steps=3), tiny.model()), model=tiny.model())
    assert trained.bias is not None and start.bias is not None
    assert bytes_of(trained.bias[:, :3]) == bytes_of(start.bias[:, :3])
    assert (trained.bias[:, 3:] != start.bias[:, 3:]).all()


def test_accumulation_is_one_large_batch(inputs: Path):
    """Targets are unequally many in the rows, so that a mean of means would be another number."""
    model = tiny.model()
    examples = read_examples(inputs / "dataset.parquet", model.tokenizer)
    batch = next(batches(PackedRows(examples[:5], 192, 4, 1, seed=0), 4, 0))
    counts = np.asarray(batch.target_mask.any(-1).sum(-1))
    assert len(set(counts.tolist())) > 1
    results = []
    tx = optax.sgd(1.0)
    for accumulation in (1, 2):
        start = Cartridge.from_text(model, tiny.TEXT, 16)
        state = TrainState(start.slots, tx.init(start.slots), jnp.zeros((), jnp.int32))
        shaped = jax.tree.map(lambda a, n=accumulation: a.reshape(n, 4 // n, *a.shape[1:]), batch)
        options = {
            "config": model.config,
            "tx": tx,
            "tail": "drop",
            "reduction": "token",
            "remat": "elementwise" if accumulation == 2 else "layers",
        }
        results.append(train_step(state, model.params, shaped, start.placement, **options))
    start = Cartridge.from_text(model, tiny.TEXT, 16)
    (one, metrics), *others = results
    assert float(jnp.abs(one.cartridge.values - start.values).max()) > 1e-4
    for state, found in others:
        for name in ("loss", "targets", "grad_norm"):
            np.testing.assert_allclose(found[name], metrics[name], rtol=2e-6)
        for ours, theirs in zip(jax.tree.leaves(state.cartridge), jax.tree.leaves(one.cartridge), strict=True):
            np.testing.assert_allclose(ours, theirs, atol=1e-6)


@pytest.mark.parametrize("reduction", ["token", "entry", "row"])
def test_targets_are_counted_whatever_the_loss_is_divided_by(inputs: Path, reduction: Reduction):
    model, tx = tiny.model(), optax.sgd(1.0)
    rows = PackedRows(read_examples(inputs / "dataset.parquet", model.tokenizer), 192, 4, 1, seed=0)
    batch = jax.tree.map(lambda a: a.reshape(2, 2, *a.shape[1:]), next(batches(rows, 4, 0)))
    start = Cartridge.from_text(model, tiny.TEXT, 16)
    state = TrainState(start.slots, tx.init(start.slots), jnp.zeros((), jnp.int32))
    options: Any = {"config": model.config, "tx": tx, "tail": "drop", "reduction": reduction, "remat": "layers"}
    _, metrics = train_step(state, model.params, batch, start.placement, **options)
    assert metrics["targets"] == np.asarray(batch.target_mask).any(-1).sum() > 4


def test_no_steps_give_the_initial_cartridge(settings: dict[str, Any]):
    trained = Cartridge.load(train(config_of(settings, num_steps=0), tiny.model()))
    start = initial_cartridge(InitConfig(**settings["init"]), tiny.model(), tiny.TEXT, [], 0)
    assert bytes_of(trained) == bytes_of(start)


def test_of_pretrained_the_file_decides_how_many_slots(settings: dict[str, Any], tmp_path: Path):
    start = Cartridge.from_text(tiny.model(), tiny.TEXT, 8).at_offset(8, tiny.model().config)
    start.save(tmp_path / "start.safetensors")
    init = {"kind": "pretrained", "path": str(tmp_path / "start.safetensors")}
    fits = config_of(settings, init=init, num_steps=0, seq_len=1016)
    assert Cartridge.load(train(fits, tiny.model())).num_slots == 8
    with pytest.raises(UserError, match="offset of 8 and rows of 1017 tokens exceed"):
        train(config_of(settings, init=init, num_steps=0, seq_len=1017, output_dir=str(tmp_path / "b")), tiny.model())
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("step", [0, 5, 6, STEPS - 1])
def test_a_run_that_stops_at_any_line_goes_on_without_a_gap(
    settings: dict[str, Any], finished: dict[str, Any], monkeypatch: pytest.MonkeyPatch, step: int
):
    """Stops where it is about to write the line of `step`, also when a checkpoint of that step is due."""
    write = MetricsLog.write

    def stop(self: MetricsLog, this: int, metrics: dict[str, Any]) -> None:
        if this == step:
            raise KeyboardInterrupt
        write(self, this, metrics)

    with monkeypatch.context() as patch:
        patch.setattr(MetricsLog, "write", stop)
        with pytest.raises(KeyboardInterrupt):
            train(config_of(settings), tiny.model())
    assert [m["step"] for m in metrics_of(settings["output_dir"])] == list(range(step))
    train(config_of(settings), tiny.model())
    same_outcome(settings, finished)


def test_a_line_that_a_crash_cut_short_is_written_again(settings: dict[str, Any], finished: dict[str, Any]):
    shutil.copytree(finished["output_dir"], settings["output_dir"])
    folder = Path(settings["output_dir"])
    shutil.rmtree(folder / "checkpoints" / str(STEPS))
    text = (folder / "metrics.jsonl").read_text()
    (folder / "metrics.jsonl").write_text(text[: len(text) * 9 // 10])
    (folder / "cartridge.safetensors").unlink()
    latest = max(int(p.name) for p in (folder / "checkpoints").iterdir() if p.name.isdigit())
    kept = text.splitlines(keepends=True)[:latest]
    (folder / "metrics.jsonl").write_text("".join(kept) + '{"step": 21, "lo')
    train(config_of(settings), tiny.model())
    same_outcome(settings, finished)


def test_a_finished_run_is_not_run_again(
    settings: dict[str, Any], finished: dict[str, Any], monkeypatch: pytest.MonkeyPatch
):
    shutil.copytree(finished["output_dir"], settings["output_dir"])
    monkeypatch.setattr(loop_module, "train_step", None)
    train(config_of(settings), tiny.model())
    same_outcome(settings, finished)
    (Path(settings["output_dir"]) / "cartridge.safetensors").unlink()
    train(config_of(settings), tiny.model())
    same_outcome(settings, finished)


def test_a_run_that_is_killed_at_any_moment_ends_with_the_same_bytes(
    settings: dict[str, Any], finished: dict[str, Any]
):
    folder = Path(settings["output_dir"])

    def writing_a_checkpoint() -> bool:
        return any("tmp" in name for name in _names(folder / "checkpoints"))

    def has_lines(count: int) -> Callable[[], bool]:
        return lambda: (
            (folder / "metrics.jsonl").exists() and (folder / "metrics.jsonl").read_bytes().count(10) >= count
        )

    def writing_a_late_checkpoint() -> bool:
        return any("tmp" in name and int(name.split(".")[0]) > 12 for name in _names(folder / "checkpoints"))

    argv = command(settings)
    killed = 0
    for moment in (writing_a_checkpoint, has_lines(8), writing_a_late_checkpoint):
        process = subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 120
        while process.poll() is None and not moment():
            assert time.monotonic() < deadline
            time.sleep(0.0005)
        process.send_signal(signal.SIGKILL)
        killed += process.wait() == -signal.SIGKILL
    assert killed >= 2  # the last process may have been quicker than the watch
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    same_outcome(settings, finished)


def _names(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except FileNotFoundError:
        return []


Failing = Callable[..., str]


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Iterator[Failing]:
    """Runs the command and returns the one sentence that it fails with."""
    level = logging.getLogger("absl").level

    def fail(config: Path, *overrides: str) -> str:
        monkeypatch.setattr(sys, "argv", ["train", f"--config={config}", *overrides])
        capfd.readouterr()
        with pytest.raises(SystemExit) as caught:
            run(train_module.main)
        out, err = capfd.readouterr()
        lines = err.splitlines()
        assert caught.value.code == 2, err
        assert [line for line in lines if line.startswith("error: ")] == lines[-1:], err
        assert "Traceback" not in err and out == ""
        return lines[-1].removeprefix("error: ")

    yield fail
    logging.getLogger("absl").setLevel(level)


def _other_cartridge(folder: Path) -> str:
    other = tiny.load_model(str(tiny.write_model(folder / "other", seed=1)))
    Cartridge.from_text(other, tiny.TEXT, 8).save(folder / "other.safetensors")
    return str(folder / "other.safetensors")


def _file(path: Path, content: bytes) -> str:
    path.write_bytes(content)
    return str(path)


REFUSED: dict[str, tuple[Callable[[Path, dict[str, Any]], dict[str, Any]], str]] = {
    "unknown key": (lambda _, s: {"sequence_length": 3}, r"unknown key config\.sequence_length: "),
    "unknown key in a group": (
        lambda _, s: {"optim": {"lrr": 1e-3}},
        r"unknown key config\.optim\.lrr: did you mean 'lr'\?",
    ),
    "wrong type": (lambda _, s: {"batch_size": "two"}, r"config\.batch_size is 'two' \(str\), expected int"),
    "wrong choice": (lambda _, s: {"tail": "bukket"}, r"config\.tail is 'bukket', expected one of 'drop', 'bucket'"),
    "no dataset": (lambda f, s: {"dataset": str(f / "none")}, r"none does not exist: make it with python -m synth"),
    "cut dataset": (
        lambda f, s: {"dataset": _file(f / "cut.parquet", Path(s["dataset"]).read_bytes()[:-100])},
        r"cut\.parquet is not a whole Parquet file",
    ),
    "dataset cut in the middle": (
        lambda f, s: {"dataset": _file(f / "cut.parquet", Path(s["dataset"]).read_bytes()[:2000])},
        r"cut\.parquet is not a whole Parquet file",
    ),
    "damaged dataset": (
        lambda f, s: {
            "dataset": _file(f / "bad.parquet", b"PAR1" + b"\xff" * 3000 + Path(s["dataset"]).read_bytes()[3004:])
        },
        r"bad\.parquet (is damaged|is not a whole)",
    ),
    "no corpus": (lambda f, s: {"corpus": str(f / "none.txt")}, r"none\.txt does not exist: expected the text"),
    "empty corpus": (lambda f, s: {"corpus": _file(f / "e.txt", b" \n\n")}, r"e\.txt is empty: expected a text"),
    "corpus that is no text": (lambda f, s: {"corpus": _file(f / "b.txt", b"ab\xff\xfe")}, r"b\.txt is not UTF-8"),
    "short corpus": (lambda f, s: {"corpus": _file(f / "s.txt", b"A cat.")}, r"fewer than init\.num_slots, 16"),
    "another model's cartridge": (
        lambda f, s: {"init": {"kind": "pretrained", "path": _other_cartridge(f)}},
        r"other\.safetensors was made for .*other \(weights \w+…\), not for ",
    ),
    "no cartridge": (
        lambda f, s: {"init": {"kind": "pretrained", "path": str(f / "none.safetensors")}},
        r"none\.safetensors does not exist",
    ),
    "rows beyond the window": (
        lambda f, s: {"seq_len": 1025},
        r"rows of 1025 tokens exceed .*of 1024: lower config\.seq",
    ),
    "no model": (lambda f, s: {"model": str(f / "no-model")}, r"no-model' does not exist"),
    "a rate of zero": (lambda f, s: {"optim": {"lr": 0.0}}, r"optim has lr 0\.0"),
    "no rows": (lambda f, s: {"batch_size": 0}, r"batch_size is 0, expected at least 1"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_work_is_refused_before_anything_is_written(
    settings: dict[str, Any], tmp_path: Path, failing: Failing, case: str
):
    change, sentence = REFUSED[case]
    assert_matches(failing(write_config(settings, **change(tmp_path, settings))), sentence)
    assert not Path(settings["output_dir"]).exists()


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("--config.optim.lrr=1e-3", r'has no key that fits optim\.lrr .*Did you mean "lr"'),
        ("--config.optim.lr=fast", r"config\.optim\.lr=fast: could not convert string to float"),
        ("--config.batch_size=1.5", r"config\.batch_size=1\.5: invalid literal for int"),
        ("--config.output=x", "has no key that fits output"),
    ],
)
def test_overrides_are_checked_too(settings: dict[str, Any], failing: Failing, override: str, sentence: str):
    assert_matches(failing(write_config(settings), override), sentence)
    assert not Path(settings["output_dir"]).exists()


def assert_matches(text: str, pattern: str) -> None:
    assert re.search(pattern, text), f"{text!r} does not match {pattern!r}"


def test_another_config_does_not_continue_a_run(settings: dict[str, Any], finished: dict[str, Any], failing: Failing):
    shutil.copytree(finished["output_dir"], settings["output_dir"])
    said = failing(write_config(settings, optim={"lr": 1e-3}, seed=7))
    assert_matches(said, "holds a run with another optim, seed: choose another config.output_dir or remove it")
    same_outcome(settings, finished)


def test_a_run_keeps_the_dtype_that_auto_came_to(settings: dict[str, Any]):
    """A run that moves to other hardware is refused there: its bytes would be others."""
    config = config_of(settings, dtype="auto", num_steps=0)
    train(config)
    recorded = json.loads((Path(config.output_dir) / "config.json").read_text())["dtype"]
    assert recorded == str(load_model(config.model, "auto").params["embed"].dtype)
    train(config)
    other = "float32" if recorded == "bfloat16" else "bfloat16"
    with pytest.raises(UserError, match="holds a run with another dtype"):
        train(dataclasses.replace(config, dtype=other))


def test_divergence_is_an_error_and_leaves_no_cartridge(settings: dict[str, Any], failing: Failing):
    """RMS norms keep the loss of a tiny model finite at any sensible excess, so that it takes the edge of float32."""
    assert_matches(failing(write_config(settings, optim={"lr": 3e38})), "diverged, lower config.optim.lr")
    folder = Path(settings["output_dir"])
    assert not (folder / "cartridge.safetensors").exists()
    assert leftovers(folder) == []


def test_slots_that_overflow_in_the_last_step_are_no_cartridge(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
):
    def overflow(state: TrainState, *_: Any, **__: Any) -> tuple[TrainState, dict[str, jax.Array]]:
        cartridge = state.cartridge.replace(values=state.cartridge.values.at[-1, -1].set(jnp.inf))
        metrics = {name: jnp.ones(()) for name in ("loss", "targets", "grad_norm")}
        return state.replace(cartridge=cartridge, step=state.step + 1), metrics

    monkeypatch.setattr(loop_module, "train_step", overflow)
    with pytest.raises(UserError, match="the trained slots are not finite: training diverged"):
        train(config_of(settings, num_steps=1), tiny.model())
    assert not (Path(settings["output_dir"]) / "cartridge.safetensors").exists()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=700k", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small disk needs root")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_full_disk_is_one_sentence(settings: dict[str, Any], small_disk: Path, failing: Failing):
    settings["output_dir"] = str(small_disk / "run")
    config = write_config(settings | {"output_dir": str(small_disk.parent / "run")}, output_dir=settings["output_dir"])
    assert_matches(failing(config), r"run/checkpoints has \d+ bytes free and a checkpoint needs \d+: free some space")
    assert set(os.listdir(settings["output_dir"])) == BEGUN
    assert os.listdir(Path(settings["output_dir"]) / "checkpoints") == []


def test_a_checkpoint_that_cannot_be_written_ends_the_run(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch):
    """A limit on the size of files, which the free space of a disk does not show. Threads of TensorStore may complain
    before our sentence, which is the last line."""
    settings |= {"init": {"kind": "text", "num_slots": 256}, "num_steps": 4}
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(loop_module, "train_step", mock.Mock(side_effect=KeyboardInterrupt))
        train(config_of(settings), tiny.model())  # the initial state is there and needs no room any more
    limited = ["bash", "-c", 'ulimit -f 40; exec "$@"', "bash", *command(settings)]
    done = subprocess.run(limited, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 2, done.stderr
    assert_matches(done.stderr.splitlines()[-1], "^error: cannot write a checkpoint in .*/run/checkpoints: ")
    assert set(os.listdir(settings["output_dir"])) == BEGUN
    assert os.listdir(Path(settings["output_dir"]) / "checkpoints") == []
