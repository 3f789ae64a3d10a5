"""`transformers`' side of `engine.py`, for a Python that has torch, transformers and gguf. It imports nothing of ours.

python benchmarks/engine_transformers.py model GGUF DIRECTORY        writes a file's weights as a model of theirs
python benchmarks/engine_transformers.py measure DIRECTORY           runs a job for each line that names one, and prints
                                                                     its tokens/s
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer


def write_model(file: Path, directory: Path) -> None:
    where = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
    dequantized = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(**where), dtype=torch.float32)
    model.load_state_dict(dequantized.state_dict())  # a model that came from a GGUF file refuses to be saved
    model.save_pretrained(directory)
    AutoTokenizer.from_pretrained(**where).save_pretrained(directory)


def tokens_per_second(model: Any, job: list[dict[str, Any]]) -> float:
    """The longest answer is how long the batch runs; tokens that were asked for count."""
    longest = max(len(request["prompt"]) for request in job)
    ids = torch.tensor([[0] * (longest - len(r["prompt"])) + r["prompt"] for r in job])
    mask = torch.tensor([[0] * (longest - len(r["prompt"])) + [1] * len(r["prompt"]) for r in job])
    most = max(request["max_tokens"] for request in job)
    start = time.perf_counter()
    model.generate(
        input_ids=ids, attention_mask=mask, do_sample=False, min_new_tokens=most, max_new_tokens=most, pad_token_id=0
    )
    return sum(request["max_tokens"] for request in job) / (time.perf_counter() - start)


def measure(directory: Path) -> None:
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    jobs = json.loads((directory / "jobs.json").read_text())
    print(json.dumps(list(jobs)), flush=True)
    for line in sys.stdin:
        print(tokens_per_second(model, jobs[line.strip()]), flush=True)


def main() -> None:
    kind, *paths = sys.argv[1:]
    if kind == "model":
        write_model(*map(Path, paths))
    else:
        measure(Path(paths[0]))


if __name__ == "__main__":
    main()
