"""The quickstart with three times the conversations, read twice: what the same model gains from more self-study.

    make quickstart CONFIG=configs/longer.py

Hardware: 2 CPU cores with AMX and 4 GB of memory take 22 minutes, 11 for 1,440 conversations, 6.4 for 146 steps, and
the rest for attention matching and the evaluation. With 500 slots, as many for every head, and a rate of 1e-2, 0.92 of
the gap was closed on examples/document.txt (0.79 before the steps; configs/quickstart.py says which gap), and 31 % of
the answers were right. With the quickstart's budgets it has not been measured.
"""

from ml_collections import ConfigDict

from cartridges_jax.configs.quickstart import get_config as quickstart


def get_config(stage: str = "") -> ConfigDict:
    config = quickstart()
    config.synth.num_conversations = 1440
    config.train.num_epochs = 2
    return config[stage] if stage else config
