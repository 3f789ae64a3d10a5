"""An earlier address of `example_of`, kept for one round: it is at home in `cartridges_jax.training.data`."""

from __future__ import annotations

from cartridges_jax.training.data import example_of as example_of
