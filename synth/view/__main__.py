"""`python -m synth.view RUN`: serves a page on 127.0.0.1 that shows the conversations of a dataset or a run."""

from __future__ import annotations

import argparse
import asyncio
from pathlib import Path

from cartridges_jax.command_line import config
from synth import dataset
from synth.view.index import Index
from synth.view.server import serve
from synth.view.vocabulary import find_vocabulary


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m synth.view", description=__doc__)
    parser.add_argument("run", help="a .parquet file, or the output_dir of a run")
    parser.add_argument("--port", type=int, default=8010, help="0 finds a free one (default: %(default)s)")
    parser.add_argument(
        "--tokenizer", help="what the teacher's tokens are read with: tokenizer.json, a folder of it, a .gguf, a Hub id"
    )
    args = parser.parse_args(argv)
    index = Index(dataset.files_of(args.run))
    model = index.models.most_common(1)[0][0] if index.models else None
    asyncio.run(serve(index, find_vocabulary(args.tokenizer, model), Path(args.run).resolve().name, args.port))
    return 0


if __name__ == "__main__":
    config.run(main)
