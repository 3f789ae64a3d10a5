"""The deployment recipes are whole: they parse, and every command of ours in them exists with these options."""

from __future__ import annotations

import ast
import re
import subprocess
from pathlib import Path

import pytest
import yaml

from cartridges_jax import serve

RECIPES = Path(__file__).parent.parent / "configs" / "deploy"


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.py")), ids=lambda path: path.name)
def test_a_modal_recipe_parses_and_asks_for_a_key(path: Path):
    tree = ast.parse(path.read_text())
    docstring = ast.get_docstring(tree)
    assert docstring and f"modal deploy configs/deploy/{path.name}" in docstring
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    assert [function.name for function in functions] == ["serve"]
    decorators = [ast.unparse(decorator) for decorator in functions[0].decorator_list]
    assert decorators[0].startswith("app.function(") and "cartridges-api-key" in decorators[0]
    assert decorators[1].startswith("modal.concurrent(") and decorators[2].startswith("modal.web_server(PORT")
    assert "0.0.0.0" in path.read_text() and "API_KEY" in path.read_text()


@pytest.mark.parametrize("path", sorted(RECIPES.glob("skypilot_*.yaml")), ids=lambda path: path.name)
def test_a_skypilot_recipe_parses_and_opens_no_port(path: Path):
    task = yaml.safe_load(path.read_text())
    assert task.keys() <= {"name", "resources", "workdir", "envs", "setup", "run"}
    assert set(task["resources"]) <= {"accelerators", "disk_size"}  # no ports
    assert "0.0.0.0" not in path.read_text()
    for script in (task["setup"], task["run"]):
        assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0
        assert set(re.findall(r"\$(\w+)", script)) <= set(task["envs"])


@pytest.mark.parametrize("path", sorted(RECIPES.iterdir()), ids=lambda path: path.name)
def test_the_options_of_our_server_exist(path: Path):
    text = path.read_text()
    if "cartridges_jax.serve" not in text or path.is_dir():
        return
    options = sorted(set(re.findall(r"--(?:model|dtype|host|port|cartridge|api-key-file)\b", text)))
    values = {"--dtype": "bfloat16", "--port": "1", "--cartridge": "a=b"}
    chosen = [f"{name}={values.get(name, 'x')}" for name in options]
    assert serve._arguments(chosen).cartridge == ["a=b"]
    known = {"--constraint", "--env"} | set(options)
    assert {option for option in re.findall(r"(?<![\w-])--[a-z][a-z-]*", text)} <= known
