"""The search for a mesh and a micro-batch: formulas rank all that are possible, and the best ones are compiled."""

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
from cartridges_jax.planning.chips import Chip, name_of
from cartridges_jax.planning.costs import expected_traffic, least_memory, received, train_costs
from cartridges_jax.planning.programs import STEPS, DoesNotFit, Program, train_program
from cartridges_jax.training.config import TrainConfig

KEPT = 3  # candidates that are returned
TRIED = 9  # candidates that are compiled at most
SPARE = 1 / 16  # of a device's memory, which the runtime keeps for itself


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A mesh and a micro-batch that fit, with the program that was compiled for them and how long it should take."""

    mesh: tuple[int, int, int]
    config: TrainConfig  # with the candidate's batch_size and accumulation
    program: Program
    seconds: float
    mfu: float


def fits(program: Program, chip: Chip) -> bool:
    """Says whether a chip has the memory for a program."""
    return program.peak <= (1 - SPARE) * chip.memory


def sweep(config: TrainConfig, model: ModelConfig, chip: Chip, devices: list[Any]) -> list[Candidate]:
    """Returns the candidates that fit, fastest first. Each has as many rows in a step as `config` has.

    Raises:
      UserError: none of those that were compiled fits.
    """
    device = name_of(devices[0])
    tried = sorted(_possible(config, model, chip, len(devices), device), key=lambda predicted: predicted[0])[:TRIED]
    found: list[Candidate] = []
    progress = Progress("compiling", len(tried), "candidates")
    for _, mesh, changed in tried:
        try:
            on = sharding.make_mesh(MeshConfig(*mesh), devices)
            program = train_program(changed, model, on, STEPS)
        except DoesNotFit:
            program = None
        progress.advance()
        if program is None or not fits(program, chip):
            continue
        costs = train_costs(changed, model, mesh, device)
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
    return sorted(found, key=lambda candidate: candidate.seconds)


def _possible(
    config: TrainConfig, model: ModelConfig, chip: Chip, count: int, device: str
) -> Iterator[tuple[float, tuple[int, int, int], TrainConfig]]:
    """Yields predicted seconds, mesh and config of all that the sizes allow and that the memory might hold."""
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
                    costs = train_costs(changed, model, mesh, device)
                    communicated = received(expected_traffic(changed, model, mesh, device))
                    yield costs.seconds(chip, communicated), mesh, changed


def _divisors(n: int) -> list[int]:
    return [i for i in range(1, n + 1) if n % i == 0]
