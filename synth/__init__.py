"""Self-study: asks inference servers for conversations about a text, and writes them as a dataset. No JAX here."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd


def load(path: str | os.PathLike[str]) -> pd.DataFrame:
    """A dataset, a .parquet file or a run's folder, as a table: see `synth.dataset.load`."""
    from synth import dataset  # pandas and pyarrow come with the first call, not with the package

    return dataset.load(path)
