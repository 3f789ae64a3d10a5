"""Who may import whom, read from the source; and what an import must not do, seen in a fresh process."""

from __future__ import annotations

import ast
import functools
import subprocess
import sys
from collections.abc import Iterator, Set
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("cartridges_jax", "synth")
MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for package in PACKAGES
    for path in (ROOT / package).rglob("*.py")
)
COMMAND_LINE = "cartridges_jax.command_line"
INSIDE_VLLM = "cartridges_jax.interop.vllm"  # a plugin: vLLM imports it, and nobody else
ARRAYS = ("jax", "jaxlib", "flax", "optax", "orbax", "grain", "numpy", "ml_dtypes")
# Everything in cartridges_jax but models, kernels, and what both stand on.
BENEATH = ("models", "kernels", "parallel", "command_line")
# The methods of Cartridge that need a module which needs Cartridge; no other function may close a circle.
LOAD_AND_SAVE = {
    ("cartridges_jax.cartridge.arrays", "cartridges_jax.cartridge.file"),
    ("cartridges_jax.cartridge.arrays", "cartridges_jax.interop.formats"),
}
TRAINING_AND_SERVING = [m for m in MODULES if m.startswith("cartridges_jax.") and m.split(".")[1] not in BENEATH]


def source(module: str) -> Path:
    path = ROOT / Path(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


@functools.cache
def imports(module: str, lazy: bool = True) -> frozenset[str]:
    """Names of the modules that `module` imports, those for the type checker only left out.

    `from a import b` gives both a and a.b, since b may be a module. Imports inside functions count with `lazy`.
    """
    found = set()
    for node in _nodes(ast.parse(source(module).read_text(encoding="utf-8")), lazy):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{module} imports relatively: write the whole name"
            found |= {str(node.module)} | {f"{node.module}.{alias.name}" for alias in node.names}
    return frozenset(found)


def _nodes(tree: ast.AST, lazy: bool) -> Iterator[ast.AST]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for other in node.orelse:
                yield from _nodes(other, lazy)
        elif lazy or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node
            yield from _nodes(node, lazy)


def needed(module: str, lazy: bool) -> set[str]:
    """Names of our modules that have to be run before `module` is.

    Those are the modules that it imports and the packages that they lie in. A package that `module` itself lies in
    counts only where a name is taken from it (`from a import b`, which runs `a` first).
    """
    found = set(MODULES) & imports(module, lazy)
    packages = {package for name in found for package in _packages(name)} - _packages(module)
    return (found | packages) - {module}


def _packages(module: str) -> set[str]:
    parts = module.split(".")
    return {".".join(parts[:i]) for i in range(1, len(parts))}


def circles(lazy: bool) -> set[tuple[str, str]]:
    """Pairs of an importing and an imported module that lie on a circle of imports."""
    graph = {module: needed(module, lazy) for module in MODULES}
    return {(a, b) for a in MODULES for b in graph[a] if a in _reached(graph, b)}


def _reached(graph: dict[str, set[str]], start: str) -> set[str]:
    seen, waiting = set(), [start]
    while waiting:
        seen.add(this := waiting.pop())
        waiting += graph[this] - seen
    return seen


def within(names: Set[str], *roots: str) -> set[str]:
    return {name for name in names if any(name == root or name.startswith(f"{root}.") for root in roots)}


def test_the_walk_sees_what_is_there():
    assert {
        "cartridges_jax",
        "cartridges_jax.serving.engine",
        "synth.conversation",
        "cartridges_jax.command_line.files",
    } <= set(MODULES)
    assert "synth.conversation" in imports("cartridges_jax.training.data")
    assert "cartridges_jax.models.transformer" in imports("cartridges_jax.cartridge.arrays")
    assert "cartridges_jax.models.transformer" not in imports("cartridges_jax.cartridge.arrays", lazy=False)
    assert "cartridges_jax.cartridge.arrays" not in imports("cartridges_jax.models.language_model")  # for its type only


def test_no_circle_of_imports():
    assert circles(lazy=False) == set()


def test_no_function_closes_a_circle_but_load_and_save():
    """Or a package's own, which picks one of the package's modules, as kernels do by platform."""
    lazily = {(a, b) for a, b in circles(lazy=True) if b not in needed(a, lazy=False)}
    assert {(a, b) for a, b in lazily if not b.startswith(f"{a}.")} == LOAD_AND_SAVE


@pytest.mark.parametrize("module", MODULES)
def test_nothing_is_taken_from_a_command(module: str):
    """Nor from anything else that lies at the top of the package: what others need has a room."""
    taken = (imports(module) & set(MODULES)) - {"cartridges_jax"}
    assert not [m for m in taken if source(m).parent == ROOT / "cartridges_jax"]


@pytest.mark.parametrize("module", [m for m in MODULES if m.startswith("cartridges_jax")])
def test_little_of_synthesis_is_known_and_in_few_places(module: str):
    found = within(imports(module), "synth")
    if module == "cartridges_jax.training.data":
        assert found == within(found, "synth.conversation")  # the record
    elif module.startswith("cartridges_jax.interop."):
        assert found - {"synth"} == within(found, "synth.inert_pickle")
    else:
        assert not found, f"{module} must take it from cartridges_jax.training.data"


@pytest.mark.parametrize("module", [m for m in MODULES if m.startswith("synth")])
def test_synthesis_knows_neither_jax_nor_training(module: str):
    ours = within(imports(module), "cartridges_jax")
    assert ours - {"cartridges_jax"} == within(ours, COMMAND_LINE)
    assert not within(imports(module), *(a for a in ARRAYS if a != "numpy"))


@pytest.mark.parametrize("module", [m for m in MODULES if m.startswith(COMMAND_LINE)])
def test_the_command_line_knows_none_of_its_commands(module: str):
    found = imports(module)
    assert not within(found, "synth", *ARRAYS)
    assert within(found, "cartridges_jax") - {"cartridges_jax"} == within(found, COMMAND_LINE)


@pytest.mark.parametrize("module", ["scheduler", "server", "store"])
def test_the_async_side_of_serving_holds_no_arrays(module: str):
    """Nor does anything it imports, as far as that is ours."""
    seen, waiting = set(), [f"cartridges_jax.serving.{module}"]
    while waiting:
        this = waiting.pop()
        seen.add(this)
        found = imports(this, lazy=False)
        assert not within(found, *ARRAYS), f"{this} imports arrays"
        waiting += [m for m in within(found, *PACKAGES) if m in MODULES and m not in seen]


@pytest.mark.parametrize("module", MODULES)
def test_suites_and_comparisons_are_known_to_nothing_beneath_them(module: str):
    found = within(imports(module), "cartridges_jax.suites", "cartridges_jax.comparison")
    if module.startswith("cartridges_jax.suites"):
        assert not within(found, "cartridges_jax.comparison")
    elif module != "cartridges_jax.compare" and not module.startswith("cartridges_jax.comparison"):
        assert not found


@pytest.mark.parametrize(
    "module", [m for m in MODULES if m.startswith(("cartridges_jax.models", "cartridges_jax.kernels"))]
)
def test_models_know_nothing_of_training_or_serving(module: str):
    assert not within(imports(module, lazy=False), *TRAINING_AND_SERVING)


@pytest.mark.parametrize("module", [m for m in MODULES if m.startswith("cartridges_jax.kernels")])
def test_kernels_know_no_model(module: str):
    assert not within(imports(module), "cartridges_jax.models", "synth")


@pytest.mark.parametrize("module", MODULES)
def test_nothing_imports_torch_or_the_tests(module: str):
    assert not within(imports(module), "torch", "tests", "tiny", "conftest")
    assert module == INSIDE_VLLM or not within(imports(module), "vllm", INSIDE_VLLM)


def test_the_plugin_of_vllm_needs_no_jax():
    """Its environment has none."""
    seen, waiting = set(), [INSIDE_VLLM]
    while waiting:
        seen.add(this := waiting.pop())
        found = imports(this, lazy=False)
        assert not within(found, *(a for a in ARRAYS if a != "numpy")), f"{this} imports arrays"
        waiting += [m for m in within(found, *PACKAGES) if m in MODULES and m not in seen]


PROBE = """
import builtins, os, socket, sys
sys.argv = ["nothing", "--no-such-flag"]  # whoever parses flags at import ends here
real_import, tried = builtins.__import__, []


def watched(name, globals=None, *rest, **more):
    importer = (globals or {}).get("__name__", "")
    if name.split(".")[0] == "torch" and importer.split(".")[0] in PACKAGES:
        tried.append(importer)
    return real_import(name, globals, *rest, **more)


def no_network(*_, **__):
    raise AssertionError("an import opens a socket")


builtins.__import__ = watched
socket.socket.connect = no_network
import importlib
for module in MODULES:
    importlib.import_module(module)
    bridge = sys.modules.get("jax._src.xla_bridge")
    assert bridge is None or not bridge.backends_are_initialized(), f"{module} starts a backend"
    assert "torch" not in sys.modules, f"{module} imports torch"
assert not tried, tried
print("fine")
"""


def probe(modules: list[str]) -> str:
    code = f"PACKAGES, MODULES = {PACKAGES!r}, {modules!r}\n{PROBE}"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    return done.stdout if not done.returncode and not done.stderr else done.stderr


def test_no_import_starts_a_backend_or_reads_flags_or_speaks():
    # `synth.__main__` is a program: importing it runs it
    assert probe([m for m in MODULES if not m.endswith("__main__") and m != INSIDE_VLLM]) == "fine\n"


def test_the_package_alone_brings_no_jax():
    code = "import sys, cartridges_jax; assert not {'jax', 'numpy', 'flax'} & set(sys.modules); dir(cartridges_jax)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("module", ["synth", "synth.conversation", "synth.pipeline", "cartridges_jax.serving.server"])
def test_the_async_world_runs_without_jax(module: str):
    code = f"import sys, {module}; assert not {{'jax', 'flax', 'optax', 'torch'}} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
