"""The paper's recipe at its own scale (arXiv 2506.06266): Llama 3.1 8B, 2,048 slots, a document of 100,000 tokens.

    python -m cartridges_jax.plan --config=configs/large.py:train --topology=v5e-16 --what=sweep
    python -m cartridges_jax.train --config=configs/large.py:train --config.distributed=True

Hardware: by the plan, v5e-16 (a chip's peak is 7.4 of 16 GiB) or eight A100 (10.1 of 74.5 GiB). The mesh is for 8
devices or a multiple; `--config.mesh.fsdp` sets another. `--config.model=Qwen/Qwen3-4B` takes another model and has to
be given to every stage.
Self-study needs an inference server of the same model at `client.base_url`. This config has not been run yet: its
settings are the paper's, and its time is what the plan estimates.
"""

from ml_collections import ConfigDict

from cartridges_jax.configs.quickstart import get_config as quickstart

MODEL = "meta-llama/Llama-3.1-8B-Instruct"


def get_config(stage: str = "") -> ConfigDict:
    config = quickstart()
    with config.unlocked():
        config.synth.num_conversations = 65_536
        config.synth.client.model = MODEL
        config.synth.chunker = ConfigDict({"min_tokens": 512, "max_tokens": 4096})
        config.synth.seed_prompts = ("structuring", "summarization", "question", "use_case", "creative")
        config.synth.question = ConfigDict({"temperature": 0.6, "max_tokens": 512})
        config.synth.answer = ConfigDict({"temperature": 0.0, "max_tokens": 512})
        config.train.model = config.evaluate.model = MODEL
        config.train.dtype = config.evaluate.dtype = "bfloat16"
        config.train.seq_len = 2048
        config.train.batch_size = 32
        config.train.accumulation = 1
        config.train.num_steps = 512  # about one epoch
        config.train.mesh = ConfigDict({"fsdp": 8, "tensor": 1})
        config.train.init = ConfigDict({"kind": "text", "num_slots": 2048})
        config.train.optim = ConfigDict({"lr": 2e-2, "warmup_steps": 20})
    return config[stage] if stage else config
