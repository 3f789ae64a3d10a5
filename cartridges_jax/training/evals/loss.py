"""The loss of examples behind a prefix. Each target counts once, whatever row it lies in."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from cartridges_jax.cartridge.arrays import Cartridge, Placement, Slots
from cartridges_jax.command_line.errors import UserError
from cartridges_jax.models.config import ModelConfig
from cartridges_jax.models.language_model import LanguageModel, no_prefix
from cartridges_jax.models.params import Params, weight_specs
from cartridges_jax.parallel import collectives, sharding
from cartridges_jax.training.batch import Batch
from cartridges_jax.training.data import Example, PackedRows
from cartridges_jax.training.evals.questions import answer_examples
from cartridges_jax.training.losses import Tail, loss_sum

ROW = 512  # tokens of a packed row; a longer example makes the rows longer


def answer_loss(
    model: LanguageModel, prefix: Cartridge | None, examples: Sequence[Example], tail: Tail = "drop"
) -> tuple[float, int]:
    """Returns the loss summed over the targets, in nats, and their number; what exceeds the window is a UserError."""
    cartridge = Cartridge(*no_prefix(model.config), num_frozen=0) if prefix is None else prefix
    length = max(ROW, *(len(example.tokens) for example in examples))
    if cartridge.offset + length > model.config.max_position_embeddings:
        length = max(len(example.tokens) for example in examples)
    if cartridge.offset + length > model.config.max_position_embeddings:
        raise UserError(
            f"an offset of {cartridge.offset} and a conversation of {length} tokens exceed {model.name}'s window of "
            f"{model.config.max_position_embeddings}: evaluate on shorter conversations"
        )
    mesh = sharding.mesh_of(model.params)
    share = mesh.shape["data"] * mesh.shape["fsdp"]  # rows at a time: one for each device of these axes
    packed = PackedRows(examples, length, batch_size=1, num_epochs=1, seed=0)
    rows = [packed[i] for i in range(len(packed))]
    rows += [{name: np.zeros_like(array) for name, array in rows[0].items()}] * (-len(rows) % share)
    total = count = 0.0
    for start in range(0, len(rows), share):
        group = rows[start : start + share]
        batch = Batch(**{name: np.stack([row[name] for row in group]) for name in group[0]})
        batch = sharding.placed(batch, P(sharding.ROWS), mesh)
        arrays = cartridge.slots, cartridge.placement, model.params, batch
        loss, targets = _loss(*arrays, config=model.config, tail=tail, mesh=mesh)
        total, count = total + float(loss), count + float(targets)
    return total, int(count)


def answer_nll(
    model: LanguageModel, prefix: Cartridge | None, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]
) -> float:
    """Returns the negative log-likelihood of answers behind their prompts and the prefix, in nats per answer token."""
    total, count = answer_loss(model, prefix, answer_examples(prompts, answers))
    return total / count


@functools.partial(jax.jit, static_argnames=("config", "tail", "mesh"))
def _loss(
    slots: Slots, placement: Placement, params: Params, batch: Batch, *, config: ModelConfig, tail: Tail, mesh: Mesh
) -> tuple[jax.Array, jax.Array]:
    def loss(slots: Slots, placement: Placement, params: Params, batch: Batch) -> tuple[jax.Array, jax.Array]:
        sums = loss_sum(Cartridge.of(slots, placement), params, batch, config=config, tail=tail, reduction="token")
        return collectives.sum_over_rows(sums)

    arrays = slots, placement, params, batch
    tables = sharding.CARTRIDGE, sharding.PLACEMENT, weight_specs(config), P(sharding.ROWS)
    specs = tuple(sharding.fitted(*pair, mesh) for pair in zip(arrays, tables, strict=True))
    return sharding.on_mesh(loss, mesh, specs, (P(), P()))(*arrays)
