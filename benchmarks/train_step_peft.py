"""PEFT's side of `train_step.py`, run by a Python that has torch, transformers and peft. It imports nothing of ours.

    python benchmarks/train_step_peft.py model DIRECTORY VOCABULARY   writes random weights of SmolLM2-135M's shape
    python benchmarks/train_step_peft.py synthetic|example DIRECTORY  runs a job, prints one line of JSON

`example` is the step of PEFT's own `examples/cartridge_self_study`: the frozen model reads the whole document and the
conversation for the teacher's distribution, then the student reads the conversation behind its slots.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import CartridgeConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

TOP_K = 20


def make_model(directory: Path, vocabulary: int) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": 1e5},
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(directory)


def with_cartridge(model_directory: Path, job: Any) -> Any:
    base = AutoModelForCausalLM.from_pretrained(model_directory, dtype=torch.float32)
    p = job["keys"].shape[1]
    model = get_peft_model(base, CartridgeConfig(task_type="CAUSAL_LM", num_virtual_tokens=p, num_frozen_tokens=1))
    slots = torch.from_numpy(np.stack([job["keys"], job["values"]], 1).transpose(2, 0, 1, 3, 4).reshape(p, -1).copy())
    encoder = model.prompt_encoder["default"]
    with torch.no_grad():
        encoder.frozen_embedding.copy_(slots[:1])
        encoder.trainable_embedding.copy_(slots[1:])
    return model.train()


def synthetic(model: Any, job: Any) -> Callable[[int], torch.Tensor]:
    tokens = torch.from_numpy(job["tokens"][0]).long()
    mask = torch.from_numpy(job["target_mask"][0].any(-1))
    ids, logprobs = (torch.from_numpy(job[name][0])[mask] for name in ("target_ids", "target_logprobs"))

    def loss(_: int) -> torch.Tensor:
        student = model(input_ids=tokens).logits[mask].log_softmax(-1).gather(-1, ids.long())
        return -(logprobs.exp() * student).sum(-1).mean()

    return loss


def example(model: Any, job: Any) -> Callable[[int], torch.Tensor]:
    document = job["document"]

    def loss(step: int) -> torch.Tensor:
        conversation = job[f"conversation_{step}"]
        read = torch.from_numpy(np.concatenate([document, conversation]))[None].long()
        with torch.no_grad(), model.disable_adapter():
            teacher = model(input_ids=read).logits[:, len(document) :].softmax(-1)
        weights, ids = teacher.topk(TOP_K)
        student = model(input_ids=read[:, len(document) :]).logits.log_softmax(-1).gather(-1, ids)
        return -(weights * student).sum(-1).mean()

    return loss


def main() -> None:
    kind, directory = sys.argv[1], Path(sys.argv[2])
    if kind == "model":
        make_model(directory, int(sys.argv[3]))
        return
    job = np.load(directory / "job.npz")
    model = with_cartridge(Path(str(job["model"])), job)
    loss_of = {"synthetic": synthetic, "example": example}[kind](model, job)
    adam = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad], lr=1e-3)
    seconds, cpu_seconds, losses = [], [], []
    for step in range(int(job["steps"])):
        start, cpu = time.perf_counter(), time.process_time()
        loss = loss_of(step)
        loss.backward()
        adam.step()
        adam.zero_grad()
        losses.append(loss.item())
        seconds.append(time.perf_counter() - start)
        cpu_seconds.append(time.process_time() - cpu)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"seconds": seconds, "cpu_seconds": cpu_seconds, "peak_memory": peak, "loss": losses[0]}))


if __name__ == "__main__":
    main()
