"""The loss of examples behind a prefix. Each target counts once, whatever row it lies in."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from cartridges_jax.cartridge.arrays import Cartridge
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
    # the cartridge without its provenance, which would compile the same program again for each cartridge
    cartridge = Cartridge(*(no_prefix(model.config) if prefix is None else prefix.prefix), num_frozen=0)
    length = max(ROW, *(len(example.tokens) for example in examples))
    if cartridge.num_slots + length > model.config.max_position_embeddings:
        length = max(len(example.tokens) for example in examples)
    if cartridge.num_slots + length > model.config.max_position_embeddings:
        raise UserError(
            f"{cartridge.num_slots} slots and a conversation of {length} tokens exceed {model.name}'s window of "
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
        loss, targets = _loss(cartridge, model.params, batch, config=model.config, tail=tail, mesh=mesh)
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
    cartridge: Cartridge, params: Params, batch: Batch, *, config: ModelConfig, tail: Tail, mesh: Mesh
) -> tuple[jax.Array, jax.Array]:
    def loss(cartridge: Cartridge, params: Params, batch: Batch) -> tuple[jax.Array, jax.Array]:
        sums = loss_sum(cartridge, params, batch, config=config, tail=tail, reduction="token")
        return collectives.sum_over_rows(sums)

    tables = (cartridge, sharding.CARTRIDGE), (params, weight_specs(config)), (batch, P(sharding.ROWS))
    specs = tuple(sharding.fitted(*pair, mesh) for pair in tables)
    return sharding.on_mesh(loss, mesh, specs, (P(), P()))(cartridge, params, batch)
