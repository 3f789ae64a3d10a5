"""The quickstart: SmolLM2-135M reads a document of about 2,000 tokens and becomes its cartridge, on a laptop's CPU.

    make quickstart
    make quickstart DOC=file.txt QUESTIONS=file.jsonl

One stage alone: `python -m synth --config=configs/quickstart.py:synth`, and the like with `train` and `evaluate`.

Hardware: 2 CPU cores, 4 GB of memory, about 10 minutes with the installation. Expected on examples/document.txt: gap
closed 0.80 with 500 slots for 2,002 tokens (0.77 from attention matching, the rest from 25 steps of distillation),
and 23 % of the answers against 29 % with the full document.

What was found while tuning it (benchmarks/teacher_gain.py measures the first):
- A model of 135M parameters cannot ask. With the paper's five seed prompts its questions are mostly about nothing,
  and its answers owe the text 0.4 to 0.8 nats per token. So the question is a cue from the text (`cloze`).
- The chunk alone is the best system prompt: every sentence of instruction is one more thing to talk about.
- Greedy answers of at most 40 tokens: beyond, and at higher temperatures, the model invents.
- The first p tokens as initial state, with learning rate 2e-2 and 37 steps, closed 0.27 of the gap: far too few steps
  for that start. Attention matching starts where they would end, and then wants a small learning rate.
- A system message that the chat template adds by itself, between the cartridge and the question, costs 1.4 nats per
  answer token; behind a cartridge it is left out (`Tokenizer.render_turns`).
"""

from ml_collections import ConfigDict

MODEL = "smollm2-135m"


def get_config(stage: str = "") -> ConfigDict:
    config = ConfigDict(
        {
            "num_held_out": 24,  # conversations that become the questions when there are none
            "server": {"slots": 48, "max_length": 448},
            "synth": {
                "output_dir": "runs/synth",
                "num_conversations": 480,
                "resource": {"path": "examples/document.txt"},
                "client": {"base_url": "http://127.0.0.1:8000/v1", "model": MODEL, "timeout_seconds": 600.0},
                "chunker": {"min_tokens": 128, "max_tokens": 224},
                "conversations_per_chunk": 12,
                "max_chunks_in_flight": 6,
                "seed_prompts": ("cloze",),
                "system_prompt": "{chunk}",
                "answer": {"temperature": 0.0, "top_p": 1.0, "max_tokens": 40},
            },
            "train": {
                "dataset": "runs/synth/dataset.parquet",
                "corpus": "examples/document.txt",
                "output_dir": "runs/train",
                "model": MODEL,
                "dtype": "float32",
                "seq_len": 256,
                "batch_size": 4,
                "num_epochs": 1,
                "checkpoint_every": 10,
                "init": {"kind": "attention_matching", "num_slots": 500},
                "optim": {"lr": 3e-3, "warmup_steps": 4},
            },
            "evaluate": {
                "cartridge": "runs/train/cartridge.safetensors",
                "corpus": "examples/document.txt",
                "questions": "examples/questions.jsonl",
                "output_dir": "runs/evaluate",
                "instruction": "{question} Answer with a short phrase only.",
                "max_answer_tokens": 20,
            },
        }
    )
    return config[stage] if stage else config
