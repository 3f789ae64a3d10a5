"""Options of training that must do something: each of these fails if its option does nothing."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from tiny_runs import bytes_of, config_of, interrupted, metrics_of, settings_in, write_inputs

from cartridges_jax.cartridge.arrays import Cartridge, Slots
from cartridges_jax.command_line.errors import UserError
from cartridges_jax.initial.texts import SummaryConfig
from cartridges_jax.kernels import prefix_attention as kernel
from cartridges_jax.models import transformer
from cartridges_jax.parallel import sharding
from cartridges_jax.training.data import MixConfig, PackedRows, batches, read_examples
from cartridges_jax.training.evals.during import Evals, EvalsConfig, GenerationEval, LossEval
from cartridges_jax.training.loop import Best
from cartridges_jax.training.run import train
from cartridges_jax.training.step import TrainState, train_step

SHORT = {"num_steps": 4, "checkpoint_every": 2}
OWL = {"question": "Where does the owl number 5 sleep?", "answer": "box 5"}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_inputs(tmp_path_factory.mktemp("inputs"))
    tiny.write_dataset(folder / "held_out.parquet", tiny.model(), count=4, seed=1)
    tiny.write_dataset(folder / "general.parquet", tiny.model(), count=6, seed=2)
    (folder / "questions.jsonl").write_text(json.dumps(OWL) + "\n", encoding="utf-8")
    Cartridge.from_text(tiny.model(), tiny.TEXT, 16, num_frozen=2).save(folder / "start.safetensors")
    return folder


@pytest.fixture
def settings(inputs: Path, tmp_path: Path) -> dict[str, Any]:
    return settings_in(tmp_path, inputs) | SHORT


def held_out(inputs: Path, **more: Any) -> EvalsConfig:
    return EvalsConfig(loss=(LossEval("held_out", str(inputs / "held_out.parquet")),), **more)


def trained(settings: dict[str, Any], name: str = "run", **changes: Any) -> Cartridge:
    output = Path(settings["output_dir"]).with_name(name)
    return Cartridge.load(train(config_of(settings, output_dir=str(output), **changes), tiny.model()))


@pytest.fixture(scope="module")
def plain(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Cartridge:
    """What the settings give as they are."""
    return trained(settings_in(tmp_path_factory.mktemp("plain"), inputs) | SHORT)


def test_an_implementation_of_attention_can_be_named(settings: dict[str, Any]):
    one, other = (trained(settings, f"by {name}", attention=name, num_steps=1) for name in (None, "reference"))
    np.testing.assert_allclose(one.keys, other.keys, atol=1e-5)
    assert (np.asarray(one.keys) != np.asarray(other.keys)).any()  # by roundings: it is not the same program
    with pytest.raises(UserError, match="implementation is 'gpu', which needs a gpu"):
        trained(settings, "by gpu", attention="gpu", num_steps=1)


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1},
        {"accumulation": 2},
        {"targets": "tokens"},
        {"reduction": "row"},
        {"tail": "drop"},
        {"quantization": "int8"},
        {"optim": {"lr": 5e-2, "warmup_steps": 2, "clip_norm": 1e-3}},
    ],
    ids=lambda change: next(iter(change)),
)
def test_an_option_changes_the_cartridge(settings: dict[str, Any], plain: Cartridge, change: dict[str, Any]):
    assert float(jnp.abs(plain.values - trained(settings, **change).values).max()) > 1e-6


def test_a_mix_is_trained_on(settings: dict[str, Any], inputs: Path, plain: Cartridge):
    mixed = trained(settings, mix=(MixConfig(str(inputs / "general.parquet"), 0.25),))
    assert float(jnp.abs(plain.values - mixed.values).max()) > 1e-6


def test_epochs_end_a_run(settings: dict[str, Any], tmp_path: Path):
    tiny.write_dataset(tmp_path / "small.parquet", tiny.model(), count=8)  # two steps
    trained(settings, dataset=str(tmp_path / "small.parquet"), num_epochs=2, num_steps=None)
    assert len(metrics_of(settings["output_dir"])) == 4


def test_a_mix_has_its_weights(inputs: Path):
    tokenizer = tiny.model().tokenizer
    own, general = (read_examples(inputs / f"{name}.parquet", tokenizer) for name in ("dataset", "general"))
    rows = PackedRows(own, 192, 1, 2, 0, [(general, 0.25)])
    members = [i for row in rows._rows for i in row]
    counts = np.bincount(members, minlength=len(own) + len(general))
    assert (counts[: len(own)] == 2).all()  # every conversation of ours once an epoch
    assert counts[len(own) :].sum() / counts.sum() == pytest.approx(0.25)
    assert (counts[len(own) :] >= 2).all()
    assert PackedRows(own, 192, 1, 1, 0)._rows == PackedRows(own, 192, 1, 1, 0, [])._rows


def test_a_mix_that_leaves_nothing_is_refused(settings: dict[str, Any]):
    with pytest.raises(UserError, match="expected above 0 and below 1"):
        MixConfig("x", 1.0)
    with pytest.raises(UserError, match=r"come to 1 or more: expected a rest"):
        config_of(settings, mix=(MixConfig("x", 0.7), MixConfig("y", 0.2), MixConfig("z", 0.1)))  # 0.9999999999999999


def test_a_small_share_of_a_mix_is_one_conversation_at_least(inputs: Path):
    own, general = (
        read_examples(inputs / f"{name}.parquet", tiny.model().tokenizer) for name in ("held_out", "general")
    )
    rows = PackedRows(own, 192, 1, 1, 0, [(general, 0.01)])
    assert sum(len(row) for row in rows._rows) == len(own) + 1


def test_rows_that_cut_every_answer_are_refused(settings: dict[str, Any]):
    with pytest.raises(UserError, match="seq_len is 4, which cuts every conversation before its first answer"):
        trained(settings, seq_len=4)
    assert not Path(settings["output_dir"]).exists()


def test_a_summary_is_not_asked_for_by_every_process(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    init = {"kind": "summary", "num_slots": 16, "summary": SummaryConfig("http://127.0.0.1:9/v1")}
    with pytest.raises(UserError, match="asks a server once, and this job has 2 processes"):
        trained(settings, init=init)


def test_minutes_end_a_run_and_count_on_when_it_is_resumed(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch):
    config = config_of(settings, max_minutes=1e-6)
    train(config, tiny.model())
    assert len(metrics_of(settings["output_dir"])) == 1
    before = (Path(settings["output_dir"]) / "metrics.jsonl").read_bytes()
    train(config, tiny.model())
    assert (Path(settings["output_dir"]) / "metrics.jsonl").read_bytes() == before

    settings["output_dir"] += "-long"
    config = config_of(settings, max_minutes=60.0)
    interrupted(config, 3, monkeypatch)
    train(config, tiny.model())
    seconds = [line["seconds"] for line in metrics_of(settings["output_dir"], timing=True)]
    assert len(seconds) == 4 and (np.diff(seconds) > 0).all()


def test_no_conversations_are_needed_for_no_steps(settings: dict[str, Any]):
    del settings["dataset"]
    with pytest.raises(UserError, match=r"config\.dataset names no conversations"):
        config_of(settings)
    cartridge = trained(settings, num_steps=0, init={"kind": "attention_matching", "num_slots": 16})
    assert cartridge.bias is not None and cartridge.num_slots == 16


def test_the_bias_of_attention_matching_trains(settings: dict[str, Any]):
    init = {"kind": "attention_matching", "num_slots": 16}
    start, end = trained(settings, "start", num_steps=0, init=init), trained(settings, "end", init=init)
    assert start.bias is not None and end.bias is not None
    assert (start.bias[:, 1:] != end.bias[:, 1:]).mean() > 0.9
    assert bytes_of(start.bias[:, :1]) == bytes_of(end.bias[:, :1])


def test_training_goes_on_counting_where_a_cartridge_came_from(settings: dict[str, Any], inputs: Path, tmp_path: Path):
    once = trained(settings, "once")
    init = {"kind": "pretrained", "path": str(tmp_path / "once" / "cartridge.safetensors"), "num_frozen": 2}
    twice = trained(settings, "twice", init=init)
    assert twice.provenance.training_tokens == 2 * once.provenance.training_tokens > 0
    assert twice.provenance.training_flops == 2 * once.provenance.training_flops
    assert twice.provenance.recipe.count("steps of distillation") == 2
    assert len(twice.provenance.dataset_hash) == 64


def test_early_stop_stops_and_keeps_the_best(settings: dict[str, Any], inputs: Path):
    settings |= {"num_steps": 40, "optim": {"lr": 1e4, "schedule": "constant"}}
    stopped = trained(settings, evals=held_out(inputs, every=1, patience=2))
    lines = metrics_of(settings["output_dir"])
    losses = {line["step"]: line["eval_held_out/loss"] for line in lines if "loss" not in line}
    best = min(losses, key=lambda step: losses[step])
    assert max(losses) < 39 and max(losses) == best + 2
    evals = Evals(held_out(inputs), tiny.model(), "logprobs", "bucket")
    assert evals.run(stopped)[0]["eval_held_out/loss"] == losses[best] < losses[max(losses)]
    assert f"; {best + 1} steps, the best of {best + 3}, of distillation" in stopped.provenance.recipe
    assert json.loads(stopped.provenance.evaluation)["eval_held_out/loss"] == losses[best]
    report = (Path(settings["output_dir"]) / "report.md").read_text(encoding="utf-8")
    assert f"behind {best + 1} steps, kept" in report and f"| {losses[best]:.4g} |" in report
    train(config_of(settings, evals=held_out(inputs, every=1, patience=2)), tiny.model())
    assert metrics_of(settings["output_dir"]) == lines  # what has stopped stays so


def test_the_same_loss_again_is_not_a_better_one():
    slots = Cartridge.from_text(tiny.model(), tiny.TEXT, 16).slots
    state, mesh = TrainState(slots, None, jnp.ones((), jnp.int32)), sharding.mesh_of(tiny.model().params)
    for loss in np.random.default_rng(0).uniform(1, 2, 20):  # float32 rounds half of them up
        best = Best.of(slots).after(state, loss, mesh).after(state, loss, mesh)
        assert int(best.stale) == 1 and int(best.step) == 1


def test_patience_without_a_loss_is_refused():
    with pytest.raises(UserError, match=r"evals\.patience is 2: it takes at least 1, evals\.every, and"):
        EvalsConfig(patience=2, every=1)


def test_another_dataset_at_the_same_place_does_not_continue_a_run(settings: dict[str, Any], tmp_path: Path):
    own = tmp_path / "own.parquet"
    shutil.copy(settings["dataset"], own)
    trained(settings, dataset=str(own))
    tiny.write_dataset(own, tiny.model(), seed=5)
    with pytest.raises(UserError, match="holds a run with another dataset_hash"):
        trained(settings, dataset=str(own))


ALIKE = ("sampled_chunks", "random_text", "random_vectors")  # other numbers in the same program


@pytest.mark.parametrize(
    "kind",
    ["text", "pretrained", "attention_matching", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ALIKE)],
)
def test_every_start_resumes_with_the_same_bytes(
    settings: dict[str, Any], inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
):
    """With accumulation, a mix, evaluations and early stopping on."""
    init = {"kind": kind, "num_slots": 16, "num_frozen": 2}
    if kind == "pretrained":
        init["path"] = str(inputs / "start.safetensors")
    answers = kind == "sampled_chunks"  # one of the slow ones: generation compiles its own programs
    generation = (GenerationEval("facts", str(inputs / "questions.jsonl"), max_tokens=3),) if answers else ()
    evals = held_out(inputs, every=1, patience=3, off_topic=answers, generation=generation)
    config = config_of(
        settings,
        init=init,
        evals=evals,
        mix=(MixConfig(str(inputs / "general.parquet"), 0.2),),
        batch_size=1,
        accumulation=2,
    )
    other = dataclasses.replace(config, output_dir=str(tmp_path / "whole"))
    train(other, tiny.model())
    interrupted(config, 3, monkeypatch)
    train(config, tiny.model())
    for name in ("cartridge.safetensors", *(("samples.jsonl",) if generation else ())):
        ours, theirs = (Path(c.output_dir) / name for c in (config, other))
        assert ours.read_bytes() == theirs.read_bytes()
    assert metrics_of(config.output_dir) == metrics_of(other.output_dir)


def test_the_gradient_of_a_whole_step_is_that_of_finite_differences(inputs: Path, monkeypatch: pytest.MonkeyPatch):
    """In float64, with accumulation and a bias; attention by its definition, which its own tests compare with."""

    def attention(*arguments: Any, **options: Any) -> jax.Array:
        return kernel.prefix_attention(*arguments[:-1], "reference", **options)

    monkeypatch.setattr(transformer, "prefix_attention", attention)
    model, tx = tiny.model(), optax.sgd(1.0)
    rows = PackedRows(read_examples(inputs / "dataset.parquet", model.tokenizer), 192, 4, 1, 0)
    batch = jax.tree.map(lambda a: a.reshape(2, 2, *a.shape[1:]), next(batches(rows, 4, 0)))
    start = Cartridge.from_text(model, tiny.TEXT, 12)
    rng = np.random.default_rng(0)
    arrays = {"keys": start.keys, "values": start.values, "bias": rng.standard_normal(start.keys.shape[:3])}
    arrays = {name: np.asarray(array, np.float64) for name, array in arrays.items()}
    directions = {name: rng.standard_normal(array.shape) for name, array in arrays.items()}
    with jax.enable_x64(True):
        params = jax.tree.map(lambda a: jnp.asarray(np.asarray(a), jnp.float64), model.params)

        def step(moved: dict[str, np.ndarray]) -> tuple[Slots, float]:
            slots = Slots(**{name: jnp.asarray(array) for name, array in moved.items()})
            state = TrainState(slots, tx.init(slots), jnp.zeros((), jnp.int32))
            options: Any = {"tail": "bucket", "reduction": "token", "remat": "layers"}
            state, metrics = train_step(state, params, batch, start.placement, config=model.config, tx=tx, **options)
            return state.cartridge, float(metrics["loss"])

        after, _ = step(arrays)
        for name, direction in directions.items():
            gradient = arrays[name] - np.asarray(getattr(after, name))
            assert gradient.dtype == np.float64
            ahead, behind = (step(arrays | {name: arrays[name] + sign * 1e-5 * direction})[1] for sign in (1, -1))
            assert (gradient * direction).sum() == pytest.approx((ahead - behind) / 2e-5, rel=1e-7), name
