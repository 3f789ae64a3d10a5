"""Seven ways to give SmolLM2-135M a document of 2,000 tokens, at 1/4, 1/10 and 1/20 of its memory, on our own suite.

    python -m cartridges_jax.compare --config=configs/compare/embedded.py

The suite `embedded` has three invented documents and 120 questions in four classes: facts in the document's words,
paraphrases without its rare words, questions over several places, and questions that the document does not answer.
Self-study and training are the quickstart's. `--config.compare.documents="('manual',)"` compares on one document.

Hardware: 2 CPU cores and 12 GB of memory take 80 minutes: 8 for self-study, 35 for 15 cartridges, 15 for the summaries
and for what BM25 finds, the rest for everything else. BM25 needs `pip install 'cartridges-jax[compare]'`.
"""

from ml_collections import ConfigDict

from cartridges_jax.configs.quickstart import get_config as quickstart


def get_config(stage: str = "") -> ConfigDict:
    config = ConfigDict({name: quickstart()[name] for name in ("server", "synth", "train")})
    config.train.dtype = "float32"  # as the questions are asked
    config.compare = ConfigDict(
        {
            "output_dir": "runs/compare/embedded",
            "suite": "embedded",
            "shares": (4, 10, 20),
            "seeds": (1, 3, 1),  # of the trained one, by share
        }
    )
    return config[stage] if stage else config
