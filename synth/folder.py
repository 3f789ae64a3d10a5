"""Ties the folder of a run to the config that it was begun with."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

from cartridges_jax.command_line import files
from cartridges_jax.command_line.addresses import without_credentials
from cartridges_jax.command_line.errors import UserError
from synth import given
from synth.config import SynthConfig

# What may change when a run is resumed: where things are, how fast it goes, and what the filters drop.
_CLIENT_KEYS = ("base_url", "timeout_seconds", "max_retries", "deadline_seconds")
FREE_KEYS = (
    "output_dir",
    "num_conversations",
    "max_chunks_in_flight",
    "dry_run",
    "filters",
    "resource.path",
    "resource.api_url",
    "given_questions.path",
    *(f"{client}.{key}" for client in ("client", "question_client") for key in _CLIENT_KEYS),
)


def claim(output: Path, config: SynthConfig, text: str) -> None:
    """Writes the config into the folder; once that holds data, refuses another config, whose data would be mixed in."""
    ours = dataclasses.asdict(config) | {"document_sha256": hashlib.sha256(text.encode()).hexdigest()}
    if questions := given.digest(config):
        ours["given_questions_sha256"] = questions
    for client in filter(None, (ours["client"], ours["question_client"])):
        del client["api_key"]
    ours = json.loads(without_credentials(json.dumps(ours)))
    path = output / "config.json"
    if (output / "dataset.parquet").exists() or any((output / "parts").glob("*.parquet")):
        try:
            theirs = json.loads(path.read_text(encoding="utf-8"))
            made = theirs["num_conversations"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{output} holds data, but {path} does not say how it was made: choose another config.output_dir"
            ) from error
        before, now = _leaves(theirs), _leaves(ours)
        for key in sorted(before.keys() | now.keys()):
            if not _is_free(key) and before.get(key) != now.get(key):
                if key == "given_questions_sha256":
                    raise UserError(
                        f"config.given_questions.path no longer holds the questions and chunks that {output} was made "
                        "from: bring those back or choose another config.output_dir"
                    )
                if key == "document_sha256":
                    raise UserError(
                        f"{config.resource.path} is not the text that {output} was made from: "
                        "bring that text back or choose another config.output_dir"
                    )
                raise UserError(
                    f"config.{key} is {now.get(key)!r}, but {output} was made with {before.get(key)!r}: go back to "
                    "that value or choose another config.output_dir"
                )
        if config.num_conversations < made:
            raise UserError(
                f"config.num_conversations is {config.num_conversations}, but {output} was made for {made}: "
                "it may grow, not shrink; choose another config.output_dir"
            )
    files.write_text(path, json.dumps(ours, indent=2) + "\n")


def _is_free(key: str) -> bool:
    return any(key == free or key.startswith(f"{free}.") for free in FREE_KEYS)


def _leaves(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        leaves |= _leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return leaves
