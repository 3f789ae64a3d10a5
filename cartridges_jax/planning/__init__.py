"""Planning: what a run would need on devices that are not here, for `python -m cartridges_jax.plan`."""
