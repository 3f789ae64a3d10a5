"""Moves datasets to and from the Hugging Face Hub: `python -m synth.hub push RUN USER/NAME`, `… pull USER/NAME FOLDER`.

A repository holds data/train-*.parquet, as upstream's do, the config that made them without its addresses, and a card.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
from pathlib import Path
from typing import Any

from cartridges_jax.command_line import config
from cartridges_jax.command_line.errors import UserError
from synth import conversation, dataset

LEFT_OUT = (
    "api_key",
    "api_url",
    "base_url",
    "output_dir",
    "path",
    "also",
    "env",
)  # of the config: whose servers and folders
SIZES = ((10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M"), (10**12, "n>1M"))

CARD = """---
tags: [cartridges, self-study, synthetic]
size_categories: ["{size}"]
configs: [{{config_name: default, data_files: [{{split: train, path: "data/*.parquet"}}]}}]
---

# {name}

{total} conversations about a text, made by self-study ([arXiv 2506.06266](https://arxiv.org/abs/2506.06266)) with
cartridges_jax: one side asks, the other answers while it sees the text, and its log-probabilities are kept as the
targets of a distillation. The text stands in `system_prompt`, and never in `messages`.

| | |
|---|---|
| models | {models} |
| resources | {resources} |
| mean tokens | question {question:.1f}, answer {answer:.1f} |

| seed type | conversations |
|---|---|
{types}

Columns: `messages` (a list of `content`, `role`, `token_ids` and `top_logprobs`: entry i says that for the token at
`token_idx[i]` of `token_ids`, `token_id[i]` had `logprobs[i]`), `system_prompt`, `metadata` (JSON), `type`.

```
python -m synth.hub pull {repo} runs/data
python -m synth.view runs/data
```
{recipe}"""


def push(path: str | os.PathLike[str], repo: str, *, private: bool = True, endpoint: str | None = None) -> str:
    """Uploads a dataset, a file or a run's folder, in one commit, and returns the address of its page.

    The token is the one that `hf auth login` or the environment's HF_TOKEN gave.

    Raises:
      FileNotFoundError, UserError: there is no dataset at `path`, or a damaged one.
      OSError: the Hub cannot be reached or refuses.
    """
    from huggingface_hub import CommitOperationAdd, HfApi  # slow, and needed here only

    files = dataset.files_of(path)
    made_by = Path(path) / "config.json" if Path(path).is_dir() else Path(path).parent / "config.json"
    recipe = _recipe(made_by)
    added = {f"data/train-{i:05d}-of-{len(files):05d}.parquet": file for i, file in enumerate(files)}
    operations = [CommitOperationAdd(name, str(file)) for name, file in added.items()]
    operations.append(CommitOperationAdd("README.md", card(files, repo, recipe).encode()))
    if recipe:
        operations.append(CommitOperationAdd("config.json", (json.dumps(recipe, indent=2) + "\n").encode()))
    api = HfApi(endpoint=endpoint)
    try:
        api.create_repo(repo, repo_type="dataset", private=private, exist_ok=True)
        api.create_commit(repo, operations, commit_message="A dataset of conversations", repo_type="dataset")
    except Exception as error:  # the library has many of its own
        raise _sentence(f"{path} cannot be pushed to {repo}", error) from error
    return f"{api.endpoint}/datasets/{repo}"


def pull(repo: str, folder: str | os.PathLike[str], *, endpoint: str | None = None) -> list[Path]:
    """Downloads a dataset into `folder`, and returns its Parquet files, after a look at each.

    Raises:
      UserError: what the repository holds is no dataset of conversations.
      OSError: the Hub cannot be reached, or there is no such repository for this token.
    """
    from huggingface_hub import snapshot_download

    wanted = ["data/*.parquet", "*.json", "README.md"]
    try:
        snapshot_download(repo, repo_type="dataset", local_dir=folder, allow_patterns=wanted, endpoint=endpoint)
    except Exception as error:
        raise _sentence(f"{repo} cannot be pulled", error) from error
    try:
        files = dataset.files_of(folder)
    except FileNotFoundError as error:
        raise UserError(f"{repo} holds no data/*.parquet: it is no dataset of conversations") from error
    for file in files:
        conversation.open_file(file).close()
    return files


def card(files: list[Path], repo: str, recipe: dict[str, Any]) -> str:
    """The text of a dataset's page."""
    types: collections.Counter[str] = collections.Counter()
    models: collections.Counter[str] = collections.Counter()
    resources: collections.Counter[str] = collections.Counter()
    question = answer = 0
    for head in dataset.heads(files):
        types[head.seed_type] += 1
        models[str(head.metadata.get("model") or "unknown")] += 1
        resources[str(head.metadata.get("resource") or "unknown")] += 1
        question += head.count("user")
        answer += head.count("assistant")
    total = types.total()
    as_json = json.dumps(recipe, indent=2)
    return CARD.format(
        size=next(name for limit, name in SIZES if total < limit),
        name=repo.rpartition("/")[2],
        repo=repo,
        total=f"{total:,}",
        models=", ".join(models),
        resources=", ".join(resources),
        question=question / max(1, total),
        answer=answer / max(1, total),
        types="\n".join(f"| {name} | {count:,} |" for name, count in types.most_common()),
        recipe=f"\nMade with:\n\n```json\n{as_json}\n```\n" if recipe else "",
    )


def _recipe(path: Path) -> dict[str, Any]:
    """The run's config, without what says where its maker's files and servers are."""
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is damaged: {error}") from error
    return _without_addresses(found)


def _without_addresses(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _without_addresses(value) for key, value in tree.items() if key not in LEFT_OUT}
    return [_without_addresses(value) for value in tree] if isinstance(tree, list) else tree


def _sentence(what: str, error: Exception) -> OSError:
    words = " ".join(str(error).split()) or type(error).__name__
    return OSError(f"{what}: {words[:300]}; log in with `hf auth login` if the repository is private or to be written")


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m synth.hub", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    pushing = commands.add_parser("push", help="upload a dataset")
    pushing.add_argument("run", help="a .parquet file, or the output_dir of a run")
    pushing.add_argument("repo", help="USER/NAME")
    pushing.add_argument("--public", action="store_true", help="anyone may see it (default: you alone)")
    pulling = commands.add_parser("pull", help="download a dataset")
    pulling.add_argument("repo", help="USER/NAME")
    pulling.add_argument("folder")
    for command in (pushing, pulling):
        command.add_argument("--endpoint", help="another Hub than https://huggingface.co")
    args = parser.parse_args(argv)
    if args.command == "push":
        print(push(args.run, args.repo, private=not args.public, endpoint=args.endpoint))
    else:
        files = pull(args.repo, args.folder, endpoint=args.endpoint)
        print(f"{args.folder}: {sum(conversation.read_notes(file)[0] for file in files)} conversations")
    return 0


if __name__ == "__main__":
    config.run(main)
