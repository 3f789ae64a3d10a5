"""Which mesh and which micro-batch: all that go together by hand, then the fastest of them by their compiler."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax

from cartridges_jax.command_line.errors import UserError
from cartridges_jax.command_line.progress import Progress
from cartridges_jax.models.config import ModelConfig
from cartridges_jax.parallel import sharding
from cartridges_jax.parallel.sharding import MeshConfig
from cartridges_jax.planning.chips import Chip
from cartridges_jax.planning.costs import expected_traffic, least_memory, received, train_costs
from cartridges_jax.planning.programs import STEPS, DoesNotFit, Program, train_program
from cartridges_jax.training.config import TrainConfig

KEPT = 3  # plans that are shown
TRIED = 9  # compilations at most
SPARE = 1 / 16  # of a device's memory, that the runtime keeps for itself


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A mesh and a micro-batch that fit, with the program that was compiled for them and how long it should take."""

    mesh: tuple[int, int, int]
    config: TrainConfig  # batch_size and accumulation are the plan's
    program: Program
    seconds: float
    mfu: float


def fits(program: Program, chip: Chip) -> bool:
    return program.peak <= (1 - SPARE) * chip.memory


def sweep(config: TrainConfig, model: ModelConfig, chip: Chip, devices: list[Any]) -> list[Candidate]:
    """The plans that fit, fastest first, for the rows that a step of `config` has in all.

    Raises:
      UserError: none fits, of the fastest that might.
    """
    candidates = sorted(_candidates(config, model, chip, len(devices)), key=lambda c: c[0])
    found: list[Candidate] = []
    tried = candidates[:TRIED]
    progress = Progress("compiling", len(tried), "plans")
    for _, mesh, changed in tried:
        try:
            on = sharding.make_mesh(MeshConfig(*mesh), devices)
            program = train_program(changed, model, on, STEPS)
        except DoesNotFit:
            progress.advance()
            continue
        progress.advance()
        if not fits(program, chip):
            continue
        costs = train_costs(changed, model, mesh)
        seconds = costs.seconds(chip, received(program.collectives))
        found.append(Candidate(mesh, changed, program, seconds, costs.mfu(chip, seconds)))
        if len(found) == KEPT:
            break
    progress.close()
    if not found:
        rows = config.batch_size * config.accumulation
        raise UserError(
            f"no mesh of {len(devices)} devices fits {config.model} with {rows} rows of {config.seq_len} tokens "
            f"({len(tried)} were compiled): take more devices, shorter rows or fewer slots"
        )
    return sorted(found, key=lambda plan: plan.seconds)


def _candidates(
    config: TrainConfig, model: ModelConfig, chip: Chip, count: int
) -> Iterator[tuple[float, tuple[int, int, int], TrainConfig]]:
    """Predicted seconds, mesh and config of whatever the sizes allow and the memory might hold."""
    total = config.batch_size * config.accumulation
    for tensor in _divisors(count):
        for fsdp in _divisors(count // tensor):
            mesh = count // tensor // fsdp, fsdp, tensor
            abstract = jax.sharding.AbstractMesh(mesh, sharding.AXES)
            for accumulation in _divisors(total):
                changed = dataclasses.replace(config, batch_size=total // accumulation, accumulation=accumulation)
                try:
                    sharding.check(model, abstract)
                    sharding.check_rows(changed.batch_size, abstract)
                except UserError:
                    continue
                if least_memory(changed, model, mesh) <= (1 - SPARE) * chip.memory:
                    costs = train_costs(changed, model, mesh)
                    yield costs.seconds(chip, received(expected_traffic(changed, model, mesh))), mesh, changed


def _divisors(n: int) -> list[int]:
    return [i for i in range(1, n + 1) if n % i == 0]
