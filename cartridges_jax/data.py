"""The earlier address of `example_of`, for programs that still import it from here, not from `training.data`."""

from __future__ import annotations

from cartridges_jax.training.data import example_of as example_of
