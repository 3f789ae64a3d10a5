"""The same methods on needles in a text of 1,200 words: one number of many, three of a subject, two linked facts.

    python -m cartridges_jax.compare --config=configs/compare/needles.py

`--config.compare.suite_options.words=4000` makes the text longer, up to the model's window.
"""

from ml_collections import ConfigDict

from cartridges_jax.configs.compare.embedded import get_config as embedded


def get_config(stage: str = "") -> ConfigDict:
    config = embedded()
    config.compare.update({"output_dir": "runs/compare/needles", "suite": "needles"})
    config.compare.suite_options = ConfigDict({"words": 1200, "num_documents": 2, "questions_a_class": 10, "seed": 0})
    return config[stage] if stage else config
