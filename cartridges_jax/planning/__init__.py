"""What a run would need on devices that are not here: `python -m cartridges_jax.plan`."""
