"""A cell of the table: one method with one budget on one document, measured, in a JSON file of its own.

Whatever writes such a file into the folder of cells, a script in another environment for instance, is in the table.
"""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

from cartridges_jax.command_line import files
from cartridges_jax.command_line.config import build


@dataclasses.dataclass(frozen=True)
class Asked:
    """A question of a cell, and what the model made of it."""

    question: str
    kind: str
    nll: float  # of the whole expected answer, in nats
    num_tokens: int  # of the expected answer
    answer: str | None = None  # in the model's words, if it was asked to write
    score: float | None = None


@dataclasses.dataclass(frozen=True)
class Cell:
    suite: str
    model: str
    document: str
    method: str
    share: int | None  # the document's tokens over the method's; None where the method has no budget
    seed: int
    context_tokens: int  # what stands before a question: slots (on average over heads) or tokens
    kv_bytes: int  # of its keys and values
    seconds_to_make: float  # once, before any question
    tokens_to_make: int  # that the model read, wrote or was trained on, once
    questions: tuple[Asked, ...]
    seconds_to_first_token: float | None = None
    decode_tokens_per_second: float | None = None
    off_topic: float | None = None  # loss of general questions, in nats per token

    @property
    def name(self) -> str:
        return cell_name(self.document, self.method, self.share, self.seed)


def cell_name(document: str, method: str, share: int | None, seed: int) -> str:
    """Returns the name of a cell's file, without its folder."""
    parts = document, method, "all" if share is None else str(share), f"seed{seed}"
    return "-".join(re.sub(r"[^\w.+]+", "_", part) for part in parts) + ".json"


def write_cell(folder: Path, cell: Cell) -> None:
    files.write_text(folder / cell.name, json.dumps(dataclasses.asdict(cell), indent=1, ensure_ascii=False) + "\n")


def read_cells(folder: Path) -> list[Cell]:
    """Reads all cells of a folder, by name. Raises: UserError, for one that is damaged or has another form."""
    return [build(Cell, files.read_json(path), str(path)) for path in sorted(folder.glob("*.json"))]
