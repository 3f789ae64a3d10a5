"""Where `make test-clients` keeps the clients of others: an environment of their own."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

PYTHON = Path(os.environ.get("CLIENTS_PYTHON", Path(__file__).parents[2] / ".venv-clients" / "bin" / "python"))

if not PYTHON.is_file():
    pytest.skip("the clients are not installed: make test-clients", allow_module_level=True)
