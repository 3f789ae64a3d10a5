"""The methods on the quickstart's document and its 48 questions, or on a document of your own.

    python -m cartridges_jax.compare --config=configs/compare/quickstart.py
    python -m cartridges_jax.compare --config=configs/compare/quickstart.py \\
        --config.compare.output_dir=runs/compare/own \\
        --config.compare.suite_options.document=file.txt \\
        --config.compare.suite_options.question_file=file.jsonl

These questions use the document's own words, so that a search for words finds them; `configs/compare/embedded.py` has
questions that it does not.
"""

from ml_collections import ConfigDict

from cartridges_jax.configs.compare.embedded import get_config as embedded


def get_config(stage: str = "") -> ConfigDict:
    config = embedded()
    config.compare.update({"output_dir": "runs/compare/quickstart", "suite": "files", "answers_a_class": 48})
    config.compare.suite_options = ConfigDict(
        {"document": "examples/document.txt", "question_file": "examples/questions.jsonl"}
    )
    return config[stage] if stage else config
