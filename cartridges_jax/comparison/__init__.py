"""Methods that stand in for a document, compared on one suite: see `python -m cartridges_jax.compare`."""
