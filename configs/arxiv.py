"""The paper about cartridges (arXiv 2506.06266) becomes a cartridge, as in the README of its authors' own code.

    python -m synth --config=configs/arxiv.py:synth
    python -m cartridges_jax.train --config=configs/arxiv.py:train
    python -m cartridges_jax.evaluate --config=configs/arxiv.py:evaluate

`--config.resource.path=arxiv:ID` reads another paper. Without a network, the path may be a folder of LaTeX or its main
file. The text that was read, without comments and with every \\input resolved, lies as corpus.txt beside the dataset:
training starts from it, and the evaluation asks with all of it in the context.

The settings are those of that README: chunks of 512 to 1,024 tokens, the five seed prompts with the same chance, 512
conversations, one epoch at a learning rate of 2e-2, 32 rows a step, 2,048 slots, and the teacher's best 20 tokens
(`tail: drop`). Two things differ: slots start from the paper's first tokens instead of another text's, and rows hold
2,048 tokens without cutting conversations in two. Questions are conversations that were kept out of training
(`cartridges_jax.training.data.split_dataset` makes the files), or your own with `--config.questions=FILE.jsonl`.

Hardware: an inference server of Qwen3-4B (vLLM, SGLang or `cartridges_jax.serve`), and a GPU or TPU with 24 GB for
training. This has not been measured here; two CPU cores can run configs/quickstart.py on another `synth.resource.path`.
"""

from ml_collections import ConfigDict, config_dict

MODEL = "Qwen/Qwen3-4B"
RUN = "runs/arxiv"


def get_config(stage: str = "") -> ConfigDict:
    config = ConfigDict(
        {
            "synth": {
                "output_dir": f"{RUN}/synth",
                "dry_run": False,  # True shows prompts and an estimate, and calls nobody
                "num_conversations": 512,
                "resource": {
                    "path": "arxiv:2506.06266",
                    "kind": "latex",
                    "api_url": config_dict.placeholder(str),  # another mirror than arxiv.org
                },
                "client": {"base_url": "http://127.0.0.1:8000/v1", "model": MODEL},
                "chunker": {
                    "min_tokens": 512,
                    "max_tokens": 1024,
                    "kind": "tokens",
                    "tokenizer": config_dict.placeholder(str),  # the server's own
                },
                "conversations_per_chunk": 16,
                "max_chunks_in_flight": 16,
                "seed_prompts": ("structuring", "summarization", "question", "use_case", "creative"),
                "question": {"temperature": 0.6, "max_tokens": 512},
                "answer": {"temperature": 0.0, "max_tokens": 1024},
                "top_logprobs": 20,
            },
            "train": {
                "dataset": f"{RUN}/synth/dataset.parquet",
                "corpus": f"{RUN}/synth/corpus.txt",
                "output_dir": f"{RUN}/train",
                "model": MODEL,
                "dtype": "auto",
                "seq_len": 2048,
                "batch_size": 1,
                "accumulation": 32,
                "num_epochs": 1,
                "num_steps": config_dict.placeholder(int),
                "max_minutes": config_dict.placeholder(float),
                "init": {"kind": "text", "num_slots": 2048},
                "tail": "drop",
                "optim": {"lr": 2e-2},
                "evals": {"every": config_dict.placeholder(int), "off_topic": True},
                "track": {"tensorboard": False, "wandb": "off", "project": "cartridges"},
            },
            "evaluate": {
                "cartridge": f"{RUN}/train/cartridge.safetensors",
                "corpus": f"{RUN}/synth/corpus.txt",
                "output_dir": f"{RUN}/evaluate",
                "model": MODEL,
                "held_out": f"{RUN}/held_out.parquet",
            },
        }
    )
    return config[stage] if stage else config
