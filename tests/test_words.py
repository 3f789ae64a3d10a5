"""A word has one meaning, and the field's word is taken where it has one: the names that others replaced stay away."""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
TREES = ("cartridges_jax", "synth", "benchmarks", "tests")
FILES = sorted(path for tree in TREES for path in (ROOT / tree).rglob("*.py"))
AXES = re.compile(r"_[a-z]{1,4}$")
Kind = Literal["class", "function", "field", "name", "array", "part", "flag"]

ENGINE = ("cartridges_jax/serving/engine", "cartridges_jax/serving/scheduler")
DECODE = ("cartridges_jax/kernels/decode", "cartridges_jax/kernels/prefix_decode")
SOFTMAX = ("cartridges_jax/kernels/prefix", "cartridges_jax/kernels/decode", "tests/kernels")
SERVING = ("cartridges_jax/serving", "tests/serving")
BREAKER = ("synth/endpoint", "synth/fleet")


class Word(NamedTuple):
    """A replaced word, and what it named.

    A "name" is that of any argument, variable, field or function. An "array" is a name that may end in axes, such as
    `total_km`, and a "part" is what stands between a name's underscores.
    """

    old: str
    new: str
    kind: Kind
    paths: tuple[str, ...] = TREES  # where it had that meaning: a path begins with one of these


WORDS = (
    Word("num_slots", "max_num_seqs", "name", (*ENGINE, "cartridges_jax/serving/generate")),
    Word("--slots", "--max-num-seqs", "flag", ("cartridges_jax", "synth", "benchmarks/soak")),
    Word("Plan", "AttentionMetadata, BlockSizes or Candidate", "class"),
    Word("Reading", "AttentionMetadata", "class"),
    Word("members", "shared_mask", "array", (*DECODE, *ENGINE, "tests/kernels")),
    Word("reader", "seq_ids", "array", (*DECODE, *ENGINE, "tests/kernels")),
    Word("count", "kv_lens", "field", DECODE),
    Word("first", "starts", "field", DECODE),
    Word("page", "block_table", "field", DECODE),
    Word("Place", "BlockTable", "class"),
    Word("place", "block_table or slot_mapping", "name", (*ENGINE, "cartridges_jax/serving/decoder")),
    Word("page", "slot_mapping", "name", ("cartridges_jax/serving/decoder",)),
    Word("Step.page", "slot_mapping", "field"),
    Word("top", "running_max", "array", SOFTMAX),
    Word("total", "denominator", "array", SOFTMAX),
    Word("kept", "rescale", "array", SOFTMAX),
    Word("weights", "probs", "array", SOFTMAX),
    Word("wishes", "sampling_params", "name", ("cartridges_jax", "tests/serving")),
    Word("Call", "GenerationRequest", "class", SERVING),
    Word("Job", "PendingRequest or TrainingRun", "class"),
    Word("Journal", "MetricsWriter", "class"),
    Word("Told", "GenerationStats", "class"),
    Word("lease", "allocate", "function", SERVING),
    Word("hold", "acquire", "function", SERVING),
    Word("let_go", "release", "function", SERVING),
    Word("publish", "insert", "function", SERVING),
    Word("withdraw", "remove", "function", SERVING),
    Word("split", "copy_to_tp", "function", ("cartridges_jax/parallel",)),
    Word("joined", "reduce_from_tp", "function", ("cartridges_jax/parallel",)),
    Word("whole", "all_gather_fsdp", "function", ("cartridges_jax/parallel",)),
    Word("picked", "gather_logits", "function", ("cartridges_jax/parallel",)),
    Word("own_heads", "local_kv_heads", "function"),
    Word("gathered_product", "gathered_matmul", "name"),
    Word("cut", "pack_panels", "function", ("cartridges_jax/serving/decoder", "cartridges_jax/kernels")),
    Word("rearranged", "to_decode_layout", "function", ("cartridges_jax",)),
    Word("shut", "open", "part", BREAKER),
    Word("due", "half_open", "part", BREAKER),
    Word("probed", "half_open", "part", BREAKER),
    Word("Ticket", "permit", "class"),
    Word("ticket", "permit", "part", BREAKER),
    Word("Talk", "PlannedConversation", "class"),
    Word("hold", "run", "name", ("synth/self_study",)),
    Word("consult", "call_tools", "function", ("synth",)),
    Word("spoken", "strip_thinking", "function", ("synth",)),
    Word("Judge", "Filter", "class"),
    Word("look", "check", "function", ("synth",)),
)


class Given(NamedTuple):
    kind: Kind
    name: str
    line: int


def given(tree: ast.AST, owner: str = "") -> Iterator[Given]:
    """Yields every name that code gives to something. Where a name is read, it has to be the one that was given."""
    for node in ast.iter_child_nodes(tree):
        match node:
            case ast.ClassDef():
                yield Given("class", node.name, node.lineno)
                yield from given(node, node.name)
                continue
            case ast.FunctionDef() | ast.AsyncFunctionDef():
                yield Given("function", node.name, node.lineno)
                yield Given("name", node.name, node.lineno)
            case ast.arg(arg=name) | ast.alias(asname=str(name)):
                yield Given("name", name, node.lineno)
            case ast.Name(id=name, ctx=ast.Store()) | ast.Attribute(attr=name, ctx=ast.Store()):
                yield Given("name", name, node.lineno)
                if owner:
                    yield Given("field", f"{owner}.{name}", node.lineno)
            case ast.Constant(value=str(text)):
                for flag in re.findall(r"(?<![\w-])--[a-z][\w-]*", text):
                    yield Given("flag", flag, node.lineno)
            case ast.Dict():  # its keys may be old flags, each with its new name
                yield from (one for value in node.values for one in given(ast.Expression(value), owner))
                continue
        is_in_class = isinstance(node, ast.AnnAssign | ast.Assign)
        yield from given(node, owner if is_in_class else "")


def is_called(word: Word, one: Given) -> bool:
    if word.kind == "part":
        return one.kind == "name" and word.old in one.name.lower().split("_")
    if word.kind == "array":
        return one.kind == "name" and word.old in (one.name, AXES.sub("", one.name))
    name = one.name if "." in word.old else one.name.rpartition(".")[2]
    return one.kind == word.kind and word.old == name.lstrip("_")


@functools.cache
def names_of(path: Path) -> tuple[Given, ...]:
    return tuple(given(ast.parse(path.read_text(encoding="utf-8"))))


@pytest.mark.parametrize("word", WORDS, ids=lambda word: f"{word.old}-{word.kind}")
def test_a_replaced_word_names_nothing(word: Word):
    found = []
    for path in FILES:
        short = path.relative_to(ROOT).as_posix()
        if short.startswith(word.paths):
            found += [f"{short}:{one.line}" for one in names_of(path) if is_called(word, one)]
    assert not found, f"{word.old} is called {word.new} now: {', '.join(found)}"


CODE = """
import numpy as place
from a import picked
class Plan:
    window: int
    top_km: Array
    def hold(self, reader, *, count=3):
        self._members = {"--slots": "--max-num-seqs"}
        total, x.split("--cut=3 a--b")
        async def let_go(): wishes = 3
"""


def test_the_walk_sees_every_name_that_is_given_and_no_other():
    found = [(one.kind, one.name) for one in given(ast.parse(CODE))]
    assert set(found) == {
        ("name", "place"),
        ("class", "Plan"),
        ("field", "Plan.window"),
        ("name", "window"),
        ("field", "Plan.top_km"),
        ("name", "top_km"),
        ("function", "hold"),
        ("name", "hold"),
        ("name", "self"),
        ("name", "reader"),
        ("name", "count"),
        ("name", "_members"),
        ("flag", "--max-num-seqs"),
        ("flag", "--cut"),
        ("function", "let_go"),
        ("name", "let_go"),
        ("name", "wishes"),
    }
    assert is_called(Word("Plan.window", "", "field"), Given("field", "Plan.window", 1))
    assert is_called(Word("window", "", "field"), Given("field", "Plan.window", 1))
    assert is_called(Word("top", "", "array"), Given("name", "top_km", 1))
    assert not is_called(Word("top", "", "name"), Given("name", "top_k", 1))
    assert is_called(Word("let_go", "", "function"), Given("function", "_let_go", 1))
    assert not is_called(Word("split", "", "function"), Given("name", "split", 1))
    assert is_called(Word("shut", "", "part"), Given("name", "_SHUT_AFTER", 1))
    assert not is_called(Word("shut", "", "part"), Given("name", "shutter", 1))
