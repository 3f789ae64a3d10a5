"""Reads the texts that a config names, and makes the one string that stands for all of them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from cartridges_jax.command_line import files
from cartridges_jax.command_line.errors import UserError
from synth.resources import documents, folder, html, json_tree, latex, mail, office, slack, table, text
from synth.resources.config import Kind, ResourceConfig
from synth.resources.sections import Section, Sections

CORPUS = "corpus.txt"  # what training and evaluation read, beside the dataset
TOLD = "resources.txt"  # what was read of every resource, and what was left out
SNAPSHOT = "resources.json"  # texts that came over a network, since another day they may be others


@dataclasses.dataclass(frozen=True)
class Resource:
    """One text of a run, in sections."""

    name: str  # its file's or folder's, or its address
    sections: tuple[Section, ...]
    weight: float = 1.0
    told: str = dataclasses.field(default="", compare=False)  # what was read and left out, in a sentence

    def to_string(self) -> str:
        return "".join(section.text for section in self.sections)


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Every resource of a run."""

    resources: tuple[Resource, ...]

    def to_string(self) -> str:
        """The full context that a cartridge stands in for. Of a single text file it is the very text."""
        return "\n\n".join(resource.to_string() for resource in self.resources)


def read(config: ResourceConfig, output: Path) -> Corpus:
    """Reads every resource that `config` names. Those that an earlier run fetched are taken from `output`.

    Raises:
      UserError, OSError: something cannot be read; the sentence says what, and what to do.
    """
    kept = _kept(output / SNAPSHOT)
    told = (output / TOLD).read_text(encoding="utf-8").split("\n") if kept and (output / TOLD).is_file() else []
    return Corpus(tuple(_read_one(one, kept, told) for one in config.every()))


def keep(config: ResourceConfig, corpus: Corpus, output: Path) -> None:
    """Writes into `output` the corpus as one text, what was read and left out, and texts from a network."""
    files.write_text(output / CORPUS, corpus.to_string())
    files.write_text(output / TOLD, "".join(f"{resource.told}\n" for resource in corpus.resources))
    remote = {
        one.path: [dataclasses.astuple(section) for section in resource.sections]
        for one, resource in zip(config.every(), corpus.resources, strict=True)
        if one.is_remote
    }
    if remote:
        files.write_text(output / SNAPSHOT, json.dumps(remote, ensure_ascii=False))


def _read_one(config: ResourceConfig, kept: dict[str, list[list[str]]], told_before: Sequence[str]) -> Resource:
    is_kept = config.is_remote and config.path in kept
    if is_kept:
        sections = Sections(Section(name, text) for name, text in kept[config.path])
    else:
        sections = _sections(config.path, config.found_kind(), config)
    if not any(section.text.strip() for section in sections):
        raise UserError(f"{config.path} is empty: expected a text")
    # readers of the dataset need not know where the file was on this machine
    name = config.path if config.is_remote else Path(config.path).resolve().name
    name = files.writable(name, "the name of a resource")
    writable = [Section(files.writable(s.name, name), files.writable(s.text, f"{name}, {s.name}")) for s in sections]
    told = f"{name}: {Sections(writable, sections.read, sections.left_out)}"
    if is_kept:  # more was known when it was fetched
        told = next((line for line in told_before if line.startswith(f"{name}: ")), told)
    return Resource(name, tuple(writable), config.weight, told)


def _kept(snapshot: Path) -> dict[str, list[list[str]]]:
    if not snapshot.is_file():
        return {}
    try:
        return json.loads(snapshot.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{snapshot} is damaged, delete it to fetch the resources again: {error}") from error


def _sections(path: str, kind: Kind, config: ResourceConfig) -> Sections:
    found = _read(path, kind, config)
    return found if isinstance(found, Sections) else Sections(found)


def _read(path: str, kind: Kind, config: ResourceConfig) -> list[Section]:
    match kind:
        case "text":
            return text.read_text(path)
        case "directory":
            return folder.read(path, config.include)
        case "json":
            return json_tree.read_json(path)
        case "jsonl":
            return json_tree.read_jsonl(path)
        case "markdown":
            return text.read_markdown(path)
        case "html":
            return html.read(path)
        case "rst":
            return text.read_rst(path)
        case "pdf" | "docx" | "pptx" | "epub" | "ipynb":
            return documents.READERS[f".{kind}"](path)
        case "xlsx":
            return office.read_spreadsheet(path)
        case "latex":
            return latex.read(path, config.api_url)
        case "csv":
            return table.read(path)
        case "mbox":
            return mail.read_mbox(path)
        case "gmail":
            return mail.read_gmail(path, config.api_url)
        case "slack":
            return slack.read_api(path, config.api_url) if config.is_remote else slack.read_export(path)
