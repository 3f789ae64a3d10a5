"""draft"""

from ml_collections import ConfigDict


def get_config(stage: str = "") -> ConfigDict:
    model = "smollm2-135m"
    config = ConfigDict(
        {
            "num_held_out": 24,
            "server": {"slots": 48, "max_length": 384},
            "synth": {
                "output_dir": "runs/synth",
                "num_conversations": 480,
                "resource": {"path": "examples/document.txt"},
                "client": {"base_url": "http://127.0.0.1:8000/v1", "model": model, "timeout_seconds": 600.0},
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
                "model": model,
                "dtype": "float32",
                "seq_len": 256,
                "batch_size": 4,
                "num_epochs": 2,
                "init": {"kind": "text", "num_slots": 480},
                "optim": {"lr": 2e-2, "warmup_steps": 4},
            },
            "evaluate": {"instruction": "{question} Answer with a short phrase only.", "max_answer_tokens": 24},
        }
    )
    return config[stage] if stage else config
