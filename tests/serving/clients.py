"""Where `make test-clients` keeps the clients of others: environments of their own."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2] / ".venv-clients"
PYTHON = Path(os.environ.get("CLIENTS_PYTHON", ROOT / "bin" / "python"))
NODE_MODULES = Path(os.environ.get("CLIENTS_NODE_MODULES", ROOT / "node" / "node_modules"))

if not PYTHON.is_file():
    pytest.skip("the clients are not installed: make test-clients", allow_module_level=True)
