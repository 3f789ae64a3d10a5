"""configs/large.py with our start: Llama 3.1 8B, 2,048 slots a head on average, where the model's heads need them.

    python -m cartridges_jax.plan --config=configs/large_budgets.py:train --topology=v5e-16
    python -m cartridges_jax.train --config=configs/large_budgets.py:train --config.distributed=True

Slots start by attention matching, as many for each head as the model's profile says (`cartridges_jax.budgets` measures
it at the first use). The learning rate is the quickstart's, since such a start has much to lose.
`--config.num_steps=0` keeps it as it is, without self-study.

Hardware: that of configs/large.py, and like it not run yet.
"""

from ml_collections import ConfigDict

from cartridges_jax.configs.large import get_config as large


def get_config(stage: str = "") -> ConfigDict:
    config = large()
    config.train.init = ConfigDict({"kind": "attention_matching", "num_slots": 2048, "budget": "profile"})
    config.train.optim.lr = 5e-4
    return config[stage] if stage else config
