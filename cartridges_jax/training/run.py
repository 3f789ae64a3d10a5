"""A training run, from its inputs to `cartridge.safetensors`.

A run that is killed and started again continues from its last checkpoint and ends with the same bytes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from cartridges_jax.cartridge.arrays import Cartridge
from cartridges_jax.command_line import files
from cartridges_jax.command_line.addresses import without_credentials
from cartridges_jax.command_line.config import build
from cartridges_jax.command_line.errors import UserError
from cartridges_jax.command_line.progress import stage
from cartridges_jax.initial.chunks import ROW
from cartridges_jax.initial.initializers import initial_cartridge
from cartridges_jax.interop.sources import dataset_files
from cartridges_jax.models.config import ModelConfig
from cartridges_jax.models.language_model import LanguageModel, load_model
from cartridges_jax.models.weights import quantized
from cartridges_jax.parallel import processes, sharding
from cartridges_jax.parallel.device import matmul_peak
from cartridges_jax.parallel.sharding import MeshConfig
from cartridges_jax.training.checkpoint import Checkpoints
from cartridges_jax.training.config import TrainConfig
from cartridges_jax.training.data import (
    Example,
    PackedRows,
    check_lengths,
    dataset_hash,
    read_corpus,
    read_examples,
    thinking_of,
)
from cartridges_jax.training.evals.during import Evals
from cartridges_jax.training.example_cache import ExampleCache
from cartridges_jax.training.loop import Best, RunState, TrainingRun, run_loop
from cartridges_jax.training.metrics import METRICS, MetricsWriter, evaluation_behind, history
from cartridges_jax.training.optim import optimizer
from cartridges_jax.training.repetition import taught_repetitions
from cartridges_jax.training.report import write_training_report
from cartridges_jax.training.step import TrainState
from cartridges_jax.training.trackers import TrackConfig

INITIAL = "initial.safetensors"  # the cartridge before training, in the run's directory
EXAMPLES = "examples"  # the folder of the example cache, in the run's directory


def train(config: TrainConfig, model: LanguageModel | None = None) -> Path:
    """Runs or resumes a training run and returns the path of its `cartridge.safetensors`.

    On several hosts `output_dir` has to be a folder that all of them see. Only the first process writes there.

    Args:
      model: the model to train for. By default `config.model` is loaded and laid on the devices as `config.mesh` says;
        a model that is given stays on the devices on which it lies.

    Raises:
      FileNotFoundError, UserError: an input is missing or unusable. Nothing has been written then.
    """
    if config.init.kind == "summary" and jax.process_count() > 1:
        raise UserError(
            f"init.kind 'summary' asks a server once, and this job has {jax.process_count()} processes: make the "
            "initial state with one and num_steps=0, and go on from it with init.kind 'pretrained'"
        )
    with _locked(Path(config.output_dir)):
        return _train(config, model)


def _train(config: TrainConfig, model: LanguageModel | None) -> Path:
    corpus = read_corpus(config.corpus)
    for source in [*_datasets(config), *(one.dataset for one in config.evals.loss if one.dataset)]:
        dataset_files(source)
    mesh = sharding.make_mesh(config.mesh) if model is None else sharding.mesh_of(model.params)
    sharding.check_rows(config.batch_size, mesh)
    model = model or load_model(config.model, config.dtype, None if mesh.size == 1 else mesh)
    config = dataclasses.replace(config, dtype=str(model.params["embed"].dtype))  # which may have been "auto"
    model = model if config.quantization == "none" else quantized(model, config.quantization)
    _check_window(0, config, model)
    directory = Path(config.output_dir)
    day = _day(directory)
    model = dataclasses.replace(model, tokenizer=model.tokenizer.on(day))
    settings = _settings(config) | {"day": day.isoformat()}
    _refuse_other_config(directory, settings)
    step_rows = config.batch_size * config.accumulation
    with stage("laying out conversations"):
        cache = ExampleCache(directory / EXAMPLES, model.tokenizer, config.targets, model.config.vocab_size)
        examples = [] if config.dataset is None else cache.read(config.dataset)
        mixed = [(cache.read(one.dataset), one.weight) for one in config.mix]
        check_lengths([*examples, *(example for others, _ in mixed for example in others)], config.seq_len)
    repeated = _repeated(config, model, corpus)
    rows = PackedRows([*examples, *repeated], config.seq_len, step_rows, config.num_epochs, config.seed, mixed)
    thinking = None if config.dataset is None else thinking_of(config.dataset)
    evals = Evals(config.evals, model, config.targets, config.tail, thinking)
    cartridge = _initial(config, model, corpus, examples)
    _check_window(cartridge.offset, config, model)
    evals.check_window(cartridge.offset)
    num_steps = len(rows) // step_rows
    num_steps = num_steps if config.num_steps is None else min(num_steps, config.num_steps)
    tx = optimizer(config.optim, num_steps, cartridge.num_frozen)
    _begin(directory, settings, cartridge, cache)
    slots = jax.tree.map(jnp.asarray, cartridge.slots)
    train_state = TrainState(slots, tx.init(slots), jnp.zeros((), jnp.int32))
    best = None if config.evals.patience is None else Best.of(slots)
    state = sharding.placed(RunState(train_state, best, jnp.zeros((), jnp.float32)), sharding.CARTRIDGE, mesh)
    run = TrainingRun(config, model, cartridge, rows, tx, num_steps, mesh, evals)
    checkpoints = Checkpoints(directory / "checkpoints")
    try:
        restored = checkpoints.restore(state)
        state = state if restored is None else restored
        writer = _metrics_writer(run, state, directory, settings)
        try:
            state = run_loop(run, state, writer, checkpoints)
        finally:
            writer.close()
    finally:
        checkpoints.close()
    return _finish(run, state, directory, settings)


def fit_uniform(directory: Path, model: LanguageModel) -> Cartridge:
    """Fits a cartridge anew from a run's inputs, with as many slots for every head, which other formats can hold.

    It is what attention matching makes; it is not trained.

    Raises:
      FileNotFoundError, UserError: the folder holds no run, or the run's inputs are gone.
    """
    settings = _recorded(directory)
    if settings is None:
        raise UserError(f"{directory} holds no run with a config.json: expected the folder of a training run")
    known = {field.name for field in dataclasses.fields(TrainConfig)}
    config = build(TrainConfig, {key: value for key, value in settings.items() if key in known}, str(directory))
    examples = [] if config.dataset is None else read_examples(config.dataset, model.tokenizer, config.targets)
    # fitted keys are worth more before training, and less behind it: here nothing is trained
    matching = dataclasses.replace(config.init.matching, fit_keys=config.init.matching.fit_keys is not False)
    init = dataclasses.replace(config.init, kind="attention_matching", path=None, budget="uniform", matching=matching)
    return initial_cartridge(init, model, read_corpus(config.corpus), examples, config.seed)


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Locks the directory, by the job's first process. If another run has it, every process raises a UserError."""
    with contextlib.ExitStack() as stack:
        refusal = None
        if processes.is_first():
            try:
                stack.enter_context(files.locked(directory))
            except UserError as error:
                refusal = error
        if processes.agreed(refusal is not None):
            raise refusal or UserError(f"{directory} is in use by another run")
        yield


def _finish(run: TrainingRun, state: RunState, directory: Path, settings: dict[str, Any]) -> Path:
    """Writes the cartridge, the last or the best one, and the report; returns the cartridge's path."""
    train_state, best = state.train, state.best
    kept = int(train_state.step if best is None else best.step)
    trained = sharding.gathered(train_state.cartridge if best is None else best.cartridge)
    if not all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(trained)):
        raise UserError("the trained slots are not finite: training diverged, lower config.optim.lr")
    path = directory / "cartridge.safetensors"
    if processes.is_first():
        trained = run.initial.with_slots(trained)
        _with_training(trained, run, kept, int(train_state.step), directory, settings["dataset_hash"]).save(path)
        write_training_report(directory, kept)
    processes.wait_for_all("the cartridge is saved")
    return path


def _metrics_writer(run: TrainingRun, state: RunState, directory: Path, settings: dict[str, Any]) -> MetricsWriter:
    first = int(state.train.step)
    peak = matmul_peak(run.config.dtype, run.mesh.size) / flops_per_token(run.model.config)
    where = directory if processes.is_first() else None
    return MetricsWriter(where, first, run.num_steps, run.tokens(first), peak, run.config, settings)


def _check_window(offset: int, config: TrainConfig, model: LanguageModel) -> None:
    if offset + config.seq_len > model.config.max_position_embeddings:
        raise UserError(
            f"a cartridge's offset of {offset} and rows of {config.seq_len} tokens exceed {model.name}'s window of "
            f"{model.config.max_position_embeddings}: lower config.seq_len"
        )


def _initial(config: TrainConfig, model: LanguageModel, corpus: str, examples: list[Example]) -> Cartridge:
    """Makes the cartridge before training, or reads it from the directory of a run that is resumed."""
    saved = Path(config.output_dir) / INITIAL
    if processes.agreed(saved.is_file()):
        return Cartridge.load(saved, model=model)
    with stage(f"initial state: {config.init.kind}"):
        return jax.block_until_ready(initial_cartridge(config.init, model, corpus, examples, config.seed))


def _repeated(config: TrainConfig, model: LanguageModel, corpus: str) -> list[Example]:
    """Makes the examples in which the document is repeated, if the run asks for some."""
    if not config.repeats or config.num_steps == 0:
        return []
    length = min(config.seq_len, ROW)
    with stage("repeating the document behind all of it"):
        return taught_repetitions(model, corpus, config.repeats, length, config.init.matching)


def _datasets(config: TrainConfig) -> list[str]:
    """Returns the names of all datasets whose conversations train the cartridge."""
    own = [] if config.dataset is None else [config.dataset]
    return own + [mixed.dataset for mixed in config.mix]


def _settings(config: TrainConfig) -> dict[str, Any]:
    """Returns a run's settings, as JSON has them, without its folder, devices and dashboards, which may change."""
    moved = dataclasses.replace(config, output_dir="", mesh=MeshConfig(), distributed=False, track=TrackConfig())
    settings = dataclasses.asdict(moved) | {"dataset_hash": dataset_hash(*_datasets(config))}
    return json.loads(without_credentials(json.dumps(settings)))


def _refuse_other_config(directory: Path, mine: dict[str, Any]) -> None:
    """Raises a UserError if the directory holds a run that was begun with other settings, and says which."""
    theirs = _recorded(directory)
    if theirs is None:
        return
    theirs.setdefault("day", mine["day"])
    changed = sorted(key for key in mine if mine[key] != theirs.get(key))
    if changed:
        raise UserError(
            f"{directory} holds a run with another {', '.join(changed)}: choose another config.output_dir or remove it"
        )


def _day(directory: Path) -> datetime.date:
    """Returns the day that chat templates are told: the one on which the run began, which its config.json records."""
    recorded = (_recorded(directory) or {}).get("day")
    day = datetime.date.today() if recorded is None else datetime.date.fromisoformat(recorded)
    return datetime.date.fromordinal(processes.agreed(day.toordinal()))


def _recorded(directory: Path) -> dict[str, Any] | None:
    """Returns the settings of the run that the folder holds, or None without a run. Damaged ones are a UserError."""
    path = directory / "config.json"
    if not path.is_file():
        return None
    try:
        settings = json.loads(path.read_bytes())
        datetime.date.fromisoformat(settings.get("day", "2000-01-01"))  # which earlier versions did not record
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{path} is damaged and does not say how the run was made: bring it back, or choose another "
            "config.output_dir"
        ) from error
    return settings


def _begin(directory: Path, settings: dict[str, Any], cartridge: Cartridge, cache: ExampleCache) -> None:
    """Writes what the run starts from: its config, its initial cartridge and its laid-out conversations."""
    whole = cartridge.with_slots(sharding.gathered(cartridge.slots))
    if processes.is_first():
        files.write_text(directory / "config.json", json.dumps(settings, indent=2, sort_keys=True) + "\n")
        if not (directory / INITIAL).is_file():
            whole.save(directory / INITIAL)
        cache.keep()
    processes.wait_for_all("the run has begun")


def flops_per_token(config: ModelConfig) -> float:
    """Returns a token's FLOPs in the layers' matrices: of the forward pass and of the activations' gradient."""
    return 4.0 * config.matrix_weights


def _with_training(
    cartridge: Cartridge, run: TrainingRun, kept: int, num_steps: int, directory: Path, dataset_hash: str
) -> Cartridge:
    """Returns the cartridge, of step `kept`, with this run added to what its provenance says of earlier ones."""
    config, before = run.config, cartridge.provenance
    tokens = run.tokens(kept)
    objective = "distillation" if config.targets == "logprobs" else "next-token prediction"
    steps = f"{num_steps} steps" if config.evals.patience is None else f"{kept} steps, the best of {num_steps},"
    recipe = f"{steps} of {objective}, lr {config.optim.lr}, tail {config.tail}, reduction {config.reduction}"
    recipe += f", the document repeated {config.repeats} times" if config.repeats else ""
    recipe += "" if config.quantization == "none" else f", {config.quantization} base"
    evaluated = evaluation_behind(kept, history(directory / METRICS))
    evaluation = before.evaluation if kept == 0 else ""
    provenance = dataclasses.replace(
        before,
        recipe=f"{before.recipe}; {recipe}",
        training_tokens=before.training_tokens + tokens,
        training_flops=before.training_flops + flops_per_token(run.model.config) * tokens,
        dataset_hash=dataset_hash if config.dataset else before.dataset_hash,
        thinking=thinking_of(config.dataset) if config.dataset else before.thinking,
        evaluation=json.dumps(evaluated, sort_keys=True) if evaluated else evaluation,
    )
    return cartridge.replace(provenance=provenance)
