"""The settings of a training run, as its config file gives them."""

from __future__ import annotations

import dataclasses
from typing import Literal

from cartridges_jax.command_line.errors import UserError
from cartridges_jax.initial.initializers import InitConfig
from cartridges_jax.models.transformer import Remat
from cartridges_jax.parallel.sharding import MeshConfig
from cartridges_jax.training.data import MixConfig, Targets
from cartridges_jax.training.evals.during import EvalsConfig
from cartridges_jax.training.losses import Reduction, Tail
from cartridges_jax.training.optim import OptimConfig
from cartridges_jax.training.trackers import TrackConfig


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    corpus: str  # the text file the cartridge stands in for
    output_dir: str
    dataset: str | None = None  # dataset.parquet of `synth`, a folder of such files, hf:…, wandb:…
    # times that the document, repeated by the model behind all of it, is added to an epoch; dataset=None: it alone
    repeats: int = 0
    mix: tuple[MixConfig, ...] = ()  # other conversations beside it, such as general ones without a context
    model: str = "smollm2-135m"
    dtype: str = "float32"  # of the frozen weights; "auto" is the one that the hardware multiplies fastest
    quantization: Literal["none", "int8", "fp8"] = "none"  # of the frozen layers; they are multiplied in `dtype`
    seed: int = 0
    seq_len: int = 1024  # tokens of a packed row
    batch_size: int = 1  # rows whose gradients are computed together
    accumulation: int = 1  # batches whose gradients are added before a step
    num_epochs: int = 1
    num_steps: int | None = None  # stops earlier than the epochs would; 0 leaves the initial state as it is
    max_minutes: float | None = None  # of training, without evaluations; the run stops then, whatever its schedule says
    checkpoint_every: int = 50  # steps
    remat: Remat = "layers"  # what the backward pass computes again; "elementwise" holds more memory
    # the implementation of attention: "xla", "gpu", "tpu"; None is the fastest that has been measured where it runs
    attention: str | None = None
    targets: Targets = "logprobs"  # the teacher's log-probabilities, or "tokens": the answers' next tokens
    tail: Tail = "bucket"
    reduction: Reduction = "token"
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)  # how many devices share rows, weights and heads
    distributed: bool = False  # this is one of several processes, on one host or many: see `processes.joined_job`
    init: InitConfig = dataclasses.field(default_factory=InitConfig)
    optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)
    evals: EvalsConfig = dataclasses.field(default_factory=EvalsConfig)
    track: TrackConfig = dataclasses.field(default_factory=TrackConfig)

    def __post_init__(self) -> None:
        for name in ("seq_len", "batch_size", "accumulation", "num_epochs", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}, expected at least 1")
        if self.num_steps is not None and self.num_steps < 0:
            raise UserError(f"num_steps is {self.num_steps}, expected at least 0")
        if self.max_minutes is not None and not self.max_minutes > 0:
            raise UserError(f"max_minutes is {self.max_minutes}, expected more than 0")
        if self.repeats < 0:
            raise UserError(f"repeats is {self.repeats}, expected at least 0")
        if self.dataset is None and self.repeats == 0 and self.num_steps != 0:
            raise UserError(
                "config.dataset names no conversations to train on: give one, or train on the document itself with "
                "repeats, or set num_steps to 0"
            )
        if sum(mixed.weight for mixed in self.mix) > 1 - 1e-6:
            raise UserError("the weights of config.mix come to 1 or more: expected a rest for config.dataset")
