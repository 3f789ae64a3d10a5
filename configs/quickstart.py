"""The quickstart: SmolLM2-135M reads a document of about 2,000 tokens and becomes its cartridge, on a laptop's CPU.

    make quickstart
    make quickstart DOC=file.txt QUESTIONS=file.jsonl

`python -m synth --config=configs/quickstart.py:synth` runs one stage alone; `train` and `evaluate` have commands, too.

Hardware: 2 CPU cores and 4 GB of memory take 6 to 9 minutes after the installation, 2 of them for self-study, 2 for
training and 2 for evaluation; older or busy cores take twice as long. Expected on examples/document.txt: 200 slots for
2,002 tokens close 1.01 of the gap in likelihood between answers without the document and with all of it, by attention
matching alone, with 23 % of the answers right. 25 steps of training keep that, with 35 to 38 % of the answers right,
where the full document gives 29 %.

What was found while tuning these settings:
- A model of 135M parameters finds nothing to ask in a whole chunk: with the paper's five seed prompts its answers owe
  the text 0.4 to 0.8 nats per token (benchmarks/teacher_gain.py). It asks well when it is shown one sentence of the
  chunk (`sentence`), and the beginning of a sentence is a question of its own (`cloze`). Each makes half of them here.
- The chunk alone is the best system prompt: every sentence of instruction is one more thing to talk about.
- Answers are greedy and have at most 40 tokens: beyond that, and at higher temperatures, the model invents.
- The loss needs the tail of the teacher's distribution (`tail: bucket`). A student that learns of the best 20 tokens
  only (`drop`) takes all weight from the others, and most reference answers begin outside those 20.
- With as many slots for every head, attention matching closes 0.8 of the gap at a quarter of the document, and 480
  conversations bear a learning rate of 4e-3 for one epoch. With the slots where they matter it closes all of it at a
  tenth, and has that to lose: an eighth of the rate keeps it.
- A system message that the chat template adds by itself, between the cartridge and the question, costs 1.4 nats per
  answer token; behind a cartridge it is left out (`Tokenizer.render_turns`).
- Training multiplies in bfloat16 where the CPU has units for it (AMX), which is twice as fast. Decoding is in float32.
"""

from ml_collections import ConfigDict, config_dict

MODEL = "smollm2-135m"


def get_config(stage: str = "") -> ConfigDict:
    config = ConfigDict(
        {
            "num_held_out": 24,  # conversations that become the questions when there are none
            "server": {"max_num_seqs": 48, "max_length": 544, "dtype": "float32"},
            "synth": {
                "output_dir": "runs/synth",
                "dry_run": False,  # True shows prompts and an estimate, and calls nobody
                "num_conversations": 480,
                "resource": {"path": "examples/document.txt"},
                "client": {"base_url": "http://127.0.0.1:8000/v1", "model": MODEL, "timeout_seconds": 600.0},
                "chunker": {"min_tokens": 128, "max_tokens": 224},
                "conversations_per_chunk": 12,
                "max_chunks_in_flight": 6,
                "seed_prompts": ("sentence", "cloze"),
                "instructions": ("{question}", "{question} Answer with a short phrase only."),
                "system_prompt": "{chunk}",
                "question": {"temperature": 0.5, "top_p": 0.9, "max_tokens": 40, "stop": ("\n",)},
                "answer": {"temperature": 0.0, "top_p": 1.0, "max_tokens": 40},
            },
            "train": {
                "dataset": "runs/synth/dataset.parquet",
                "corpus": "examples/document.txt",
                "output_dir": "runs/train",
                "model": MODEL,
                "dtype": "auto",
                "seq_len": 256,
                "batch_size": 4,
                "remat": "elementwise",  # holds half a gigabyte more than "layers", which takes a sixth longer
                "num_epochs": 1,
                "num_steps": config_dict.placeholder(int),  # 0: the cartridge of attention matching alone, in seconds
                "max_minutes": config_dict.placeholder(float),
                "checkpoint_every": 10,
                "init": {"kind": "attention_matching", "num_slots": 200, "budget": "profile"},
                "evals": {"every": config_dict.placeholder(int), "off_topic": False},
                "track": {"tensorboard": False, "wandb": "off"},
                "tail": "bucket",
                "optim": {"lr": 5e-4, "warmup_steps": 4},
            },
            "evaluate": {
                "cartridge": "runs/train/cartridge.safetensors",
                "corpus": "examples/document.txt",
                "questions": "examples/questions.jsonl",
                "output_dir": "runs/evaluate",
                "dtype": "float32",
                "instruction": "{question} Answer with a short phrase only.",
                "max_answer_tokens": 20,
            },
        }
    )
    return config[stage] if stage else config
