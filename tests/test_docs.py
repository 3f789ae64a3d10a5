"""The README and its pages name only what exists: files, names in them, modules, flags, targets of make and links."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    *(page for folder in ("docs", "benchmarks", "examples") for page in (ROOT / folder).glob("*.md")),
]
TREES = "cartridges_jax|synth|configs|tests|benchmarks|examples|notebooks|docs"
TARGET = re.compile(r"^([\w-]+):", re.MULTILINE)
OTHERS = ("pip", "pytest", "venv")  # modules that are not ours

pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def names_of(path: Path) -> set[str]:
    """What a Python file defines: its functions, classes and variables, and the methods of its classes."""
    found = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
            found |= {f"{node.name}.{part.name}" for part in getattr(node, "body", ()) if hasattr(part, "name")}
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            found |= {name.id for name in ast.walk(node) if isinstance(name, ast.Name)}
    return found


def anchors_of(page: Path) -> set[str]:
    """The addresses that GitHub gives a page's headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def file_of(module: str) -> Path:
    path = ROOT / module.replace(".", "/")
    return path / "__main__.py" if path.is_dir() else path.with_suffix(".py")


@pages
def test_every_path_exists(page: Path):
    # what stands behind a slash or a dollar is another folder's; a capital word, such as NAME.py, is to be filled in
    named = re.findall(rf"(?<![\w/$.~-])((?:{TREES})/[\w./*-]*)(?:::([\w.]+))?", page.read_text(encoding="utf-8"))
    for path, name in named:
        path = path.rstrip(".")
        if re.search(r"\b[A-Z]{2,}\b\.", path):
            continue
        assert list(ROOT.glob(path)), f"{path} does not exist"
        assert not name or name.rstrip(".") in names_of(ROOT / path), f"{path} has no {name}"


@pages
def test_every_module_exists_and_knows_its_flags(page: Path):
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    commands = re.findall(r"python -m ([\w.]+)([^\n`#]*)", text)
    commands += [
        (path.replace("/", "."), rest) for path, rest in re.findall(r"python (benchmarks/\w+)\.py([^\n`#]*)", text)
    ]
    for module, rest in commands:
        if (module := module.rstrip(".")) in OTHERS:
            continue
        assert file_of(module).is_file(), f"there is no module {module}"
        for flag in re.findall(r"--([a-z][\w-]*)", rest):
            known = flag.startswith("config") or f'"--{flag.removeprefix("no-")}"' in file_of(module).read_text("utf-8")
            assert known, f"{module} has no flag --{flag}"


@pages
def test_every_target_of_make_exists(page: Path):
    targets = set(TARGET.findall((ROOT / "Makefile").read_text(encoding="utf-8")))
    asked = re.findall(r"(?:^|`)(?:\w+=\S+ )?make ([a-z-]+)", page.read_text(encoding="utf-8"), re.MULTILINE)
    assert set(asked) <= targets


@pages
def test_every_link_leads_somewhere(page: Path):
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", page.read_text(encoding="utf-8")):
        linked = (page.parent / target).resolve() if target else page
        assert linked.exists(), f"{target} does not exist"
        assert not anchor or anchor in anchors_of(linked), f"{target} has no heading {anchor}"


def test_the_readme_is_short():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 150 and max(map(len, lines)) <= 100


def test_the_index_names_every_page():
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    assert [
        page.name for page in (ROOT / "docs").glob("*.md") if page.name != "README.md" and f"({page.name})" not in index
    ] == []
