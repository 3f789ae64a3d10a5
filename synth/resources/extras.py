"""Imports the library of a format when a file of it is read, and names it in one sentence where it is missing."""

from __future__ import annotations

import importlib
from typing import Any

from cartridges_jax.command_line.errors import MissingPackage


def load(module: str, what: str, extra: str = "documents") -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise MissingPackage(f"{what} needs the package {package}: pip install 'cartridges-jax[{extra}]'") from error
