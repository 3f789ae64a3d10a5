from __future__ import annotations

import collections
import dataclasses
import os
import pathlib
import pickle
import pickletools
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cartridges_jax.command_line.errors import UserError
from synth import conversation, inert_pickle, legacy
from synth.conversation import Message
from synth.inert_pickle import Record, Refused


@dataclasses.dataclass
class FlatTopLogprobs:
    token_idx: Any
    token_id: Any
    logprobs: Any
    shape: Any


@dataclasses.dataclass
class TrainingExample:
    """Both kinds have this name; which fields there are tells them apart."""

    @dataclasses.dataclass
    class Message:
        content: str
        role: str
        token_ids: Any = None
        top_logprobs: Any = None

    messages: list[Any]
    system_prompt: str = "Context: é"
    metadata: Any = dataclasses.field(default_factory=lambda: {"seed_prompt": "ask", "n": np.float32(2)})
    type: str = "todo"


class Pydantic:
    """Keeps its fields as pydantic does."""

    def __init__(self, **fields: Any):
        self.__dict__ |= fields

    def __getstate__(self) -> dict[str, Any]:
        return {"__dict__": dict(self.__dict__), "__pydantic_fields_set__": set(self.__dict__)}


@pytest.fixture(autouse=True)
def upstream(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Their module exists while a pickle is written; nothing looks for it when one is read."""
    module = types.ModuleType("cartridges.structs")
    for cls in (TrainingExample, FlatTopLogprobs, Pydantic, TrainingExample.Message):
        monkeypatch.setattr(cls, "__module__", "cartridges.structs")
        monkeypatch.setattr(module, cls.__name__, cls, raising=False)
    monkeypatch.setitem(sys.modules, "cartridges", types.ModuleType("cartridges"))
    monkeypatch.setitem(sys.modules, "cartridges.structs", module)
    yield


def dumped(tmp_path: Path, value: Any, protocol: int = 4) -> Path:
    path = tmp_path / "dataset.pkl"
    path.write_bytes(pickle.dumps(value, protocol))
    return path


QWEN = (151644, 151645)


def older_row(cut: bool = False) -> TrainingExample:
    """Two turns, laid out for Qwen, with the teacher's top two of every token but the first."""
    user, answer = [11, 12], [21, 22, 23]
    ids = [QWEN[0], 872, 198, *user, QWEN[1], 198, QWEN[0], 77091, 198, *answer] + [QWEN[1]] * (not cut)
    row = TrainingExample([TrainingExample.Message("who", "user"), TrainingExample.Message("Ada L.", "assistant")])
    vars(row).update(
        token_ids=np.array(ids),
        num_output_tokens=4,
        top_logprob_ids=np.array([[token, token + 100] for token in ids[1:]], np.int32),
        top_logprob_logprobs=np.array([[-0.1 * t, -3.0] for t in range(1, len(ids))], np.float32),
    )
    return row


@pytest.mark.parametrize("protocol", [4, 5])
def test_the_older_kind_is_cut_into_turns(tmp_path: Path, protocol: int):
    value = {"rows": [older_row(), older_row(cut=True)], "context": Pydantic(title="t", path=pathlib.PosixPath("a/b"))}
    whole, cut = legacy.read(dumped(tmp_path, value, protocol))
    assert whole.system_prompt == "Context: é" and whole.metadata == {"seed_prompt": "ask", "n": 2.0}
    user, answer = whole.messages
    assert (user.content, user.token_ids, user.top_logprobs) == ("who", (11, 12, QWEN[1]), None)
    assert (answer.content, answer.token_ids) == ("Ada L.", (21, 22, 23, QWEN[1]))
    top = answer.top_logprobs
    assert top and top.shape == (4, 2)
    assert top.token_idx.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert top.token_id.tolist() == [21, 121, 22, 122, 23, 123, QWEN[1], QWEN[1] + 100]
    assert top.logprobs[::2] == pytest.approx([-1.0, -1.1, -1.2, -1.3])
    assert cut.messages[1].token_ids == (21, 22, 23)
    assert cut.messages[1].top_logprobs and cut.messages[1].top_logprobs.shape == (3, 2)


def test_an_unknown_layout_keeps_the_words(tmp_path: Path):
    row = older_row()
    vars(row)["token_ids"] = np.arange(14)
    (made,) = legacy.read(dumped(tmp_path, {"rows": [row], "resources": []}))
    assert made.messages == (Message("who", "user"), Message("Ada L.", "assistant"))


@pytest.mark.parametrize("protocol", [4, 5])
@pytest.mark.parametrize("arrays", [True, False])
def test_the_newer_kind(tmp_path: Path, protocol: int, arrays: bool):
    make = np.asarray if arrays else list
    top = FlatTopLogprobs(make([0, 1]), make([5, 7]), make([-0.5, -0.25]), (2, 20))
    messages = [TrainingExample.Message("q", "user", [1]), TrainingExample.Message("a", "assistant", make([5, 7]), top)]
    (made,) = legacy.read(dumped(tmp_path, [TrainingExample(messages)], protocol))
    assert made.messages[0] == Message("q", "user", (1,))
    found = made.messages[1].top_logprobs
    assert made.messages[1].token_ids == (5, 7) and found and found.shape == (2, 20)
    assert found.logprobs.tolist() == [-0.5, -0.25] and found.token_id.tolist() == [5, 7]


def test_pydantic_and_ordered_dicts(tmp_path: Path):
    row = Pydantic(
        messages=[Pydantic(content="q", role="user", token_ids=None, top_logprobs=None)],
        system_prompt="s",
        metadata=collections.OrderedDict(a=1, b={"c": (1, None)}),
        type="todo",
    )
    (made,) = legacy.read(dumped(tmp_path, [row]))
    assert made.messages == (Message("q", "user"),) and made.metadata == {"a": 1, "b": {"c": [1, None]}}


@pytest.mark.parametrize("kind", ["<i2", ">i4", "<f8", "|u1", "|b1", "<f2"])
def test_arrays_of_every_kind(tmp_path: Path, kind: str):
    for order in ("C", "F"):
        array = np.array([[1, 0, 1], [0, 1, 1]], kind, order=order)
        for protocol in (3, 4, 5):
            found = inert_pickle.load(dumped(tmp_path, [array, array[0, 0]], protocol), ())
            np.testing.assert_array_equal(found[0], array)
            assert found[1] == array[0, 0]


def test_the_command(tmp_path: Path):
    old = dumped(tmp_path, {"rows": [older_row()] * 1500, "context": None})
    new = tmp_path / "deep" / "new.parquet"
    done = subprocess.run([sys.executable, "-m", "synth.legacy", str(old), str(new)], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"{new}: 1500 conversations\n"), done.stderr
    assert conversation.read(new) == list(legacy.read(old))
    assert [path.name for path in new.parent.iterdir()] == ["new.parquet"]


class Call:
    def __init__(self, function: Callable[..., Any], *arguments: Any):
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def hostile(touched: Path) -> list[Any]:
    return [
        Call(os.system, f"touch {touched}"),
        Call(eval, f"open({str(touched)!r}, 'w')"),
        Call(subprocess.Popen, ["touch", str(touched)]),
        Call(getattr, "x", "upper"),
        Call(__import__, "os"),
        Call(np.load, str(touched)),
        Call(np.ndarray, (2**40,)),
        np.array([Call(os.system, f"touch {touched}")], object),
        types.SimpleNamespace(a=1),
    ]


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("number", range(9))
def test_a_hostile_pickle_is_refused_and_never_run(tmp_path: Path, number: int, protocol: int):
    touched = tmp_path / "touched"
    evil = hostile(touched)[number]
    row = TrainingExample([], metadata={"a": evil})
    for value in (evil, [row], {"rows": [row]}, TrainingExample([evil])):
        with pytest.raises(UserError, match=r"dataset\.pkl") as caught:
            list(legacy.read(dumped(tmp_path, value, protocol)))
        assert "\n" not in str(caught.value)
    assert not touched.exists()


def test_the_sentence_names_what_was_asked_for(tmp_path: Path):
    with pytest.raises(Refused, match=r"names 'posix\.system', which no dataset needs: it was not run"):
        list(legacy.read(dumped(tmp_path, Call(os.system, "true"))))
    with pytest.raises(Refused, match="has the instruction PERSID, which no dataset needs: it was not run"):
        (tmp_path / "p.pkl").write_bytes(b"Pid\n.")
        inert_pickle.load(tmp_path / "p.pkl", ())


def test_names_of_theirs_are_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = dumped(tmp_path, [Pydantic(a=1)])
    monkeypatch.setitem(sys.modules, "cartridges", None)
    (found,) = inert_pickle.load(path, ("cartridges",))
    assert isinstance(found, Record) and (found.name, found.fields) == ("cartridges.structs.Pydantic", {"a": 1})


NESTED = b"]" + b"".join(b"q\x00]" + b"(" + b"h\x00" * 100 + b"e" for _ in range(9)) + b"q\x01"
# each list holds the one before a hundred times: written out, the last one has no end


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x80\x04",
        b"\x8e\xff\xff\xff\xff\xff\xff\xff\x7f.",  # bytes of 2^63
        b"\x96\xff\xff\xff\xff\xff\xff\xff\x7f.",  # a bytearray of as many
        b"Nr\xff\xff\xff\x7f.",  # the memo's place 2^31
        b"(" * 1000 + b".",
        b")" + b"\x85" * 200_000 + b"}" + b"\x8c\x01aR.",  # a tuple very deep
        b"}" + b")" + b"\x85" * 200_000 + b"Ns.",  # and as a key
        b"]" + b"]" * 100_000 + b"a" * 100_000 + b".",  # a list as deep
        b"I" + b"9" * 100_000 + b"\n.",
        b"c\\o\nx\n.",  # Python warns of the escape
        NESTED + b"cpathlib\nPosixPath\nh\x01\x85R.",
        NESTED + b"cnumpy\ndtype\nh\x01\x85R.",
    ],
)
def test_bombs(tmp_path: Path, data: bytes):
    path = tmp_path / "dataset.pkl"
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"dataset\.pkl"):
        list(legacy.read(path))


def test_what_unfolds_without_measure(tmp_path: Path):
    deep: Any = ["x" * 1000] * 100
    for _ in range(6):
        deep = [deep] * 100
    circle: list[Any] = []
    circle.append(circle)
    message = TrainingExample.Message("x" * 10_000, "user")
    rows = [TrainingExample([message] * 1000)] * 1000
    with pytest.raises(UserError, match="unfolds to more than 200 times its size: refused"):
        list(legacy.read(dumped(tmp_path, [TrainingExample([], metadata={"a": deep})])))
    with pytest.raises(UserError, match=r"unfolds to more than|is no conversation of upstream's"):
        list(legacy.read(dumped(tmp_path, [TrainingExample([], metadata={"a": circle})])))
    top = FlatTopLogprobs(deep, deep, deep, (1, 1))
    asked = [TrainingExample.Message("x", "user", deep), TrainingExample.Message("x", "user", [1], top)]
    for row in (TrainingExample([], deep), TrainingExample([], type=deep), *(TrainingExample([one]) for one in asked)):
        with pytest.raises(UserError, match=r"row 0, is no conversation of upstream's: TypeError\('[\w ,-]+ should be"):
            list(legacy.read(dumped(tmp_path, [row])))
    with pytest.raises(UserError, match="unfolds to more than"):
        list(legacy.read(dumped(tmp_path, rows)))


def test_what_is_no_dataset(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"none\.pkl does not exist"):
        list(legacy.read(tmp_path / "none.pkl"))
    for value in ("text", {"rows": 1}, [1], {"a": []}):
        with pytest.raises(UserError, match="is no dataset of upstream's"):
            list(legacy.read(dumped(tmp_path, value)))
    with pytest.raises(UserError, match="row 0, is no conversation of upstream's"):
        list(legacy.read(dumped(tmp_path, [Pydantic(messages=3)])))


INSTRUCTIONS = sorted(opcode.code.encode("latin-1") for opcode in pickletools.opcodes)


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.data())
def test_no_bytes_do_anything_but_a_sentence(tmp_path: Path, data: st.DataObject):
    """Pickles that were damaged anywhere, and programs at random, give conversations or a ValueError."""
    whole = pickle.dumps({"rows": [older_row()]}, data.draw(st.integers(0, 5)))
    if data.draw(st.booleans()):
        place = data.draw(st.integers(0, len(whole) - 1))
        noise = data.draw(st.binary(max_size=8))
        program = whole[:place] + noise + whole[place + len(noise) :]
    else:
        names = [b"K\x01", b"\x8c\x01a", b"cposix\nsystem\n", b"cnumpy\ndtype\n", b"ccartridges\nA\n"]
        piece = st.sampled_from(INSTRUCTIONS) | st.sampled_from(names)
        program = b"".join(data.draw(st.lists(piece, max_size=40))) + b"."
    path = tmp_path / "dataset.pkl"
    path.write_bytes(program)
    try:
        for made in legacy.read(path):
            assert isinstance(made, conversation.Conversation)
    except ValueError as error:
        assert "dataset.pkl" in str(error)
