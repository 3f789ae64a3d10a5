"""The paper of configs/arxiv.py with our start: slots where the model's heads need them, before the first step.

    python -m synth --config=configs/arxiv.py:synth
    python -m cartridges_jax.train --config=configs/arxiv_budgets.py:train
    python -m cartridges_jax.evaluate --config=configs/arxiv_budgets.py:evaluate

Slots start by attention matching, as many for each head as the model's profile says (`cartridges_jax.budgets` measures
it at the first use), and the loss counts the rest of the teacher's distribution (`tail: bucket`). The learning rate is
the quickstart's, since such a start has much to lose. `--config.num_steps=0` keeps it as it is, without self-study.

Hardware: that of configs/arxiv.py. Not measured on this model: benchmarks/ablations.md has what each choice is worth
on SmolLM2-135M.
"""

from ml_collections import ConfigDict

from cartridges_jax.configs.arxiv import RUN
from cartridges_jax.configs.arxiv import get_config as arxiv


def get_config(stage: str = "") -> ConfigDict:
    config = arxiv()
    config.train.output_dir = f"{RUN}/train-budgets"
    config.evaluate.output_dir = f"{RUN}/evaluate-budgets"
    config.evaluate.cartridge = f"{config.train.output_dir}/cartridge.safetensors"
    config.train.init = ConfigDict({"kind": "attention_matching", "num_slots": 2048, "budget": "profile"})
    config.train.tail = "bucket"
    config.train.optim.lr = 5e-4
    return config[stage] if stage else config
