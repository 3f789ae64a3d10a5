"""Cartridges and datasets put on the Hugging Face Hub, with a card that says what they are."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any, Literal

from cartridges_jax.cartridge import file as cartridge_file
from cartridges_jax.cartridge.arrays import Cartridge
from cartridges_jax.command_line import files
from cartridges_jax.command_line.addresses import without_credentials
from cartridges_jax.command_line.errors import UserError
from cartridges_jax.interop.sources import dataset_files
from cartridges_jax.models.hub import HUB_ID, hub_errors

CARD = """# {title}

A *cartridge* ([arXiv 2506.06266](https://arxiv.org/abs/2506.06266)): {slots} key/value slots per head that stand in
for a text in the context of `{model}`, made with cartridges_jax. It means nothing to another model.

| | |
|---|---|
| model | `{model}` |
| slots of a head | {described}; {frozen} frozen |
| layout | {layers} layers, {heads} kv heads of size {size}{bias} |
| made by | {recipe} |
| training | {training} |
| SHA-256 of the text | {corpus} |

## How good it is

{quality}

## Use

```python
import cartridges_jax as cj

model = cj.load_model("{model}")
cartridge = cj.Cartridge.load("hf:{repo}", model=model)  # refused if it was made for another model
turns = [{{"role": "user", "content": "…"}}]
prompt = model.tokenizer.render_turns(turns, add_generation_prompt=True, thinking=cartridge.thinking)
print(cj.generate(model, [prompt], cartridge=cartridge, max_tokens=64)[0])
```

Served: `python -m cartridges_jax.serve --model={model} --cartridge={name}=hf:{repo}`, then ask for the model
`{model}:{name}`.
For PEFT, Tokasaurus or upstream: `python -m cartridges_jax.convert hf:{repo} FOLDER --to=peft`.
"""
UNKNOWN = "unknown"


def push_to_hub(
    cartridge: Cartridge, repo: str, *, dtype: str | None = None, report: str = "", private: bool = False
) -> str:
    """Uploads `cartridge.safetensors` and a card, and returns the repository's address.

    Args:
      repo: `org/name`, which is made if it does not exist.
      report: Markdown that says how good the cartridge is, such as the `report.md` of `evaluate`.

    Raises:
      UserError: `repo` is no valid Hub id.
      PermissionError, FileNotFoundError, ConnectionError: no login, no such organisation, no network.
    """
    with tempfile.TemporaryDirectory() as folder:
        cartridge_file.write(cartridge, Path(folder) / "cartridge.safetensors", dtype)
        files.write_text(Path(folder) / "README.md", card(cartridge, repo, report))
        return _upload(Path(folder), repo, "model", private)


def push_dataset(dataset: str | os.PathLike[str], repo: str, *, private: bool = False) -> str:
    """Uploads a dataset's Parquet file in the Hub's layout, and the `config.json` beside it; returns the address.

    Raises:
      FileNotFoundError, UserError: there is no such file, or it is no dataset.
      PermissionError, ConnectionError: no login, or no network.
    """
    paths = dataset_files(dataset)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "data").mkdir()
        for i, path in enumerate(paths):
            (Path(folder) / f"data/train-{i:05}-of-{len(paths):05}.parquet").symlink_to(path.resolve())
        for config in (paths[0].parent / name for name in ("config.json", "config.yaml")):
            if config.is_file():
                text = config.read_text(encoding="utf-8", errors="replace")
                files.write_text(Path(folder) / config.name, without_credentials(text))
        return _upload(Path(folder), repo, "dataset", private)


def card(cartridge: Cartridge, repo: str, report: str = "") -> str:
    """Returns the README.md of a cartridge's repository, with the Hub's metadata on top."""
    p = cartridge.provenance
    metadata: dict[str, Any] = {"library_name": "cartridges_jax", "tags": ["cartridge", "kv-cache"]}
    if HUB_ID.fullmatch(p.model):
        metadata["base_model"] = p.model
    l, _, k, h = cartridge.keys.shape
    text = CARD.format(
        title=repo.rpartition("/")[2],
        model=(p.model if HUB_ID.fullmatch(p.model) else Path(p.model).name) or UNKNOWN,
        slots=cartridge.average_slots,
        described=cartridge.described(),
        frozen=cartridge.num_frozen,
        **{"layers": l, "heads": k, "size": h, "repo": repo, "name": repo.rpartition("/")[2]},
        bias="" if cartridge.bias is None else ", with a log-weight for each slot",
        recipe=p.recipe or UNKNOWN,
        training=f"{p.training_tokens:,} tokens, {p.training_flops:.3g} FLOPs" if p.training_tokens else UNKNOWN,
        corpus=p.corpus_hash or UNKNOWN,
        quality=report.strip() or "Not measured: `python -m cartridges_jax.evaluate` does.",
    )
    # JSON is YAML, and quotes whatever needs it
    front = "\n".join(f"{key}: {json.dumps(value)}" for key, value in metadata.items())
    return f"---\n{front}\n---\n{text}"


def _upload(folder: Path, repo: str, kind: Literal["model", "dataset"], private: bool) -> str:
    if not HUB_ID.fullmatch(repo):
        raise UserError(f"{repo!r} is no valid Hub id: expected 'org/name'")
    from huggingface_hub import HfApi

    with hub_errors(repo, "cartridge" if kind == "model" else "dataset", "pushed to"):
        api = HfApi()
        address = api.create_repo(repo, repo_type=kind, private=private, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=folder, repo_type=kind, commit_message="from cartridges_jax")
    return str(address)
