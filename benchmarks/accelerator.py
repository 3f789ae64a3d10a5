"""How the project stands on an accelerator: what is right there, how fast it is, and beside what.

    python benchmarks/accelerator.py --list
    python benchmarks/accelerator.py [PART …] [--out=FOLDER]    no part: all of them, in order of worth
    python benchmarks/accelerator.py --tiny                     every part on a CPU, in seconds: figures mean nothing

It works from a bare checkout: `PYTHONPATH=$PWD`, and a Python with jax, flax, optax, orbax and, for the sides that we
are compared with, torch, transformers and peft. What else such a machine lacks, `benchmarks/accelerator_prepare` lays
out as wheels, with the quickstart's model and dataset (`--model`, `--dataset`, `--gap`).

Each side of a part runs in a process of its own, so that none holds another's memory and a crash ends nobody else.
Lines are JSON, on the terminal and in FOLDER/accelerator.jsonl as soon as they are known; at the end they are tables in
FOLDER/accelerator.md. A part is stopped after four minutes. The exit status is 1 if something was wrong or failed.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import datetime
import importlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

ROOT = Path(__file__).parents[1]
sys.path += [str(ROOT / folder) for folder in ("", "tests", "tests/kernels")]  # the definitions are the tests' own

from accelerator_parts.measuring import Line, Options, failure  # noqa: E402


@dataclasses.dataclass(frozen=True)
class Part:
    sides: tuple[str, ...]  # modules of `accelerator_parts`, a process each: ours, and theirs
    shows: str


PARTS = {
    "correct": Part(("correct",), "kernels, loss, a training step and answers against float64 and the CPU"),
    "attention": Part(("attention", "torch_attention"), "prefix attention beside cuDNN and flex_attention"),
    "decode": Part(("decode",), "decode attention beside XLA's and the roofline, together and alone, block sizes"),
    "train": Part(("train", "torch_train"), "the training step of 8B and 4B beside transformers and PEFT"),
    "engine": Part(("engine", "torch_engine"), "decoding and the first token beside the roofline and transformers"),
    "quickstart": Part(("quickstart",), "the quickstart's training and evaluation, its gap beside a CPU's"),
    "profile": Part(("profile",), "the twenty costliest kernels of a training and of a decoding step"),
}
PART_SECONDS = 240.0
OUR_SHARE = 0.65  # of a part's time, where another side is measured, too
UNOPTIMIZED = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
ENVIRONMENT = {
    # most of the memory at once, instead of piece by piece: what is measured is not how memory is got
    "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.9",
    # what one side has compiled, others and the next run of the program do not compile again
    "JAX_COMPILATION_CACHE_DIR": str(Path(tempfile.gettempdir()) / "cartridges_jax-accelerator"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.5",
}


def main() -> int:
    args = _arguments()
    options = Options(args.tiny, args.model, args.dataset, args.gap)
    if args.list:
        print("\n".join(f"{name:12}{part.shows}" for name, part in PARTS.items()))
        return 0
    if args.outcomes:
        return _write_outcomes(args.outcomes, options)
    if args.side:
        return _run_side(args.side, options)
    folder = Path(args.out)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "accelerator.jsonl").open("w", encoding="utf-8") as log:
        run = _run_tiny if args.tiny else _run
        lines = list(_told(run(args.parts or list(PARTS), args.seconds), log))
    tables = markdown(lines, " ".join(sys.argv[1:]))
    (folder / "accelerator.md").write_text(tables, encoding="utf-8")
    print(f"\n{tables}")
    return int(any("failed" in line or line.get("verdict") == "WRONG" for line in lines))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--list", action="store_true", help="says what the parts show")
    parser.add_argument("--tiny", action="store_true", help="shapes for a CPU: that the program works")
    parser.add_argument("--out", default="runs/accelerator", help="default: %(default)s")
    parser.add_argument("--seconds", type=float, default=PART_SECONDS, help="of a part, at most (default: %(default)s)")
    parser.add_argument("--model", default="smollm2-135m", help="the quickstart's: a name, a folder or a .gguf file")
    parser.add_argument("--dataset", help="the quickstart's dataset.parquet")
    parser.add_argument("--gap", type=float, help="that it closed on a CPU with the same dataset")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--outcomes", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if unknown := [part for part in args.parts if part not in PARTS]:
        parser.error(f"{unknown[0]!r} is no part: expected some of {', '.join(PARTS)}")
    return args


def _run(parts: list[str], limit: float) -> Iterator[Line]:
    yield {"part": "device", **_commit()}
    yield from _side("device", "device", limit)
    for part in parts:
        deadline = time.monotonic() + limit
        ours, *theirs = PARTS[part].sides
        yield from _side(part, ours, limit * (OUR_SHARE if theirs else 1))
        for side in theirs:
            yield from _side(part, side, deadline - time.monotonic())


def _run_tiny(parts: list[str], limit: float) -> Iterator[Line]:
    """Two sides at a time, as their figures mean nothing: what counts is that each of them runs, and how soon."""
    yield {"part": "device", **_commit()}
    sides = [("device", "device"), *((part, side) for part in parts for side in PARTS[part].sides)]
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        for lines in pool.map(lambda side: list(_side(*side, limit)), sides):
            yield from lines


def _side(part: str, side: str, limit: float) -> Iterator[Line]:
    """The lines of one process, while it writes them; what it ended with, if that was not its own end."""
    command = [sys.executable, __file__, f"--side={side}", *sys.argv[1:]]
    environment = ENVIRONMENT | os.environ
    if "--tiny" in sys.argv:  # compiling is what takes the time
        environment["XLA_FLAGS"] = f"{UNOPTIMIZED} {environment.get('XLA_FLAGS', '')}"
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    stopped = threading.Event()

    def stop() -> None:
        stopped.set()
        process.kill()

    timer = threading.Timer(max(limit, 0), stop)
    timer.start()
    assert process.stdout is not None
    with process.stdout:
        for text in process.stdout:
            if text.startswith("{"):
                yield {"part": part, **json.loads(text)}
    code = process.wait()
    timer.cancel()
    if stopped.is_set():
        yield {"part": part, "failed": f"{side} was stopped at the end of the part's time"}
    elif code:
        yield {"part": part, "failed": f"{side} ended with {code}: its words are above"}


def _told(lines: Iterator[Line], log: TextIO) -> Iterator[Line]:
    """Each line is on the disk and on the terminal before the next one is measured."""
    start = time.monotonic()
    for line in lines:
        timed = {"s": round(time.monotonic() - start, 1), **line}
        for file in (log, sys.stdout):
            print(json.dumps(timed), file=file, flush=True)
        if "traceback" in line:
            print(line["traceback"], file=sys.stderr, flush=True)
        yield line


def _commit() -> Line:
    said = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    date = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d")
    return {"date": date, "commit": said.stdout.strip() or "unknown"}


def _run_side(side: str, options: Options) -> int:
    try:
        for line in importlib.import_module(f"accelerator_parts.{side}").measure(options):
            print(json.dumps(line), flush=True)
    except Exception as error:
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        theirs = (missing or "").partition(".")[0] in ("torch", "transformers", "peft")
        line = {"skipped": f"{side}: {missing} is not installed"} if theirs else failure(error)
        print(json.dumps(line), flush=True)
    return 0


def _write_outcomes(path: str, options: Options) -> int:
    import numpy as np
    from accelerator_parts.correct import outcomes

    arrays: Any = outcomes(options)
    with Path(path).open("wb") as file:
        np.savez(file, **arrays)
    return 0


def markdown(lines: list[Line], arguments: str) -> str:
    """A table for each kind of line, below its part's name; lines of a kind have the same figures."""
    text = [f"Command: `{f'python benchmarks/accelerator.py {arguments}'.strip()}`"]
    part, header = "", None
    for line in lines:
        figures = {name: value for name, value in line.items() if name not in ("part", "traceback")}
        if line["part"] != part:
            part, header = line["part"], None
            text.append(f"\n## {part}")
        if list(figures) != header:
            header = list(figures)
            text += ["", f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
        text.append(f"| {' | '.join(_cell(value) for value in figures.values())} |")
    return "\n".join(text) + "\n"


def _cell(value: Any) -> str:
    return "" if value is None else str(value).replace("|", "\\|")


if __name__ == "__main__":
    sys.exit(main())
