"""The terminal chat: its commands against a model that says what a test wants, and a real session in a terminal."""

from __future__ import annotations

import os
import pty
import random
import re
import select
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny
from test_server import SAID, TOKENIZER, ScriptEngine  # pyrefly: ignore[missing-import] (pytest finds this folder)

import cartridges_jax as cj
from cartridges_jax import chat
from cartridges_jax.command_line.errors import UserError
from cartridges_jax.serving.scheduler import Prefix


def load(name: str) -> Prefix:
    if name == "broken":
        raise UserError("it is broken")
    if name == "endless":
        raise KeyboardInterrupt
    return Prefix(name, 7, object())


def talk(
    engine: Any,
    lines: Sequence[str],
    prefix: Prefix | None = None,
    max_tokens: int = 50,
    document: str | None = None,
) -> tuple[chat.Chat, str]:
    told: list[str] = []
    rest = iter(lines)

    def read() -> str:
        try:
            return next(rest)
        except StopIteration:
            raise EOFError from None

    talker = chat.Chat(engine, TOKENIZER, prefix, max_tokens=max_tokens, temperature=0.0, rng=random.Random(0))
    chat.Terminal(talker, read, told.append, load, document).talk()
    return talker, "".join(told)


def test_chat_in_the_terminal():
    engine = ScriptEngine(SAID, max_num_seqs=1)
    talker, told = talk(engine, ["hi", "", "more", "/help", "/undo"], Prefix("key", 7, object()))
    assert told == f"Grüße!\nGrüße!\n{chat.HELP}\n\n"
    assert talker.messages == [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "Grüße!"}]
    assert engine.prefilled < 25, "the first turn was not computed again"
    assert talk(engine, ["hi", "/clear"])[0].messages == []
    assert talk(engine, ["/quit", "hi"])[1] == ""


def test_chat_says_when_an_answer_is_cut():
    endless = list(b"abc")
    assert talk(ScriptEngine(endless, 1), ["hi"], max_tokens=4)[1] == "abca [--max-tokens is reached]\n\n"
    talker, told = talk(ScriptEngine(endless, 1, 20), ["hi", "again", "/undo", "x"], Prefix("key", 3, object()))
    first, second, *_ = told.splitlines()
    assert first == "abcabcabca [the window is full]"
    assert "20 positions is full (3 of the cartridge" in second
    assert talker.messages[0]["content"] == "x", "the refused question is not kept, /undo took the first"
    engine = ScriptEngine(endless, 1, 100)
    engine.max_position_embeddings = 17
    assert talk(engine, ["hi", "again", "/undo", "x"], Prefix("key", 3, object()))[1] == told, "slots are not counted"


def test_ctrl_c_stops_an_answer_and_keeps_it():
    engine = ScriptEngine(list(b"abc"), 1)
    talker = chat.Chat(engine, TOKENIZER, None, max_tokens=50, temperature=0.0, rng=random.Random(0))
    told: list[str] = []

    def write(piece: str) -> None:
        told.append(piece)
        if len(told) == 4:
            signal.raise_signal(signal.SIGINT)

    lines = iter(["hi", "/quit"])
    chat.Terminal(talker, lambda: next(lines), write, load).talk()
    assert "".join(told) == "abca [stopped]\n" and talker.messages[-1]["content"] == "abca"
    assert "".join(talker.answer("y"))[:4] == "abca"


def test_another_cartridge_in_mid_conversation():
    engine = ScriptEngine(SAID, max_num_seqs=1)
    talker, told = talk(engine, ["hi", "/cartridge one", "again", "/cartridge broken", "/cartridge none", "/cartridge"])
    assert told == f"Grüße!\n7 slots\nGrüße!\nit is broken\nno cartridge\n{chat.HELP}\n\n"
    assert talker.prefix is None and len(talker.messages) == 4, "the conversation goes on"


def test_ctrl_c_stops_a_load_and_keeps_the_conversation():
    engine = ScriptEngine(SAID, max_num_seqs=1)
    talker, told = talk(engine, ["hi", "/cartridge one", "/cartridge endless", "again"])
    assert told == "Grüße!\n7 slots\n\nGrüße!\n\n"
    assert talker.prefix is not None and talker.prefix.key == "one" and len(talker.messages) == 4


def test_comparing_asks_three_times_and_leaves_the_conversation_alone():
    engine = ScriptEngine(SAID, max_num_seqs=1)
    talker, told = talk(engine, ["/compare", "hi", "/compare"], Prefix("key", 7, object()), document="D" * 100)
    assert talker.messages == [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "Grüße!"}]
    assert told.startswith("there is no question yet")
    parts = re.findall(r"— (.*) —\nGrüße!\n\((.*) prompt tokens, first token \d+ ms, [\d,.]+ tokens/s\)", told)
    assert parts == [("nothing", "7"), ("cartridge", "7 slots + 7"), ("full document", "110")]
    assert "--document" in talk(engine, ["/compare x"])[1]


def test_a_command_that_is_none_is_named():
    talker, told = talk(ScriptEngine(SAID, max_num_seqs=1), ["/clera", "/usr/bin is what?"])
    assert told == f"/clera is no command:\n{chat.HELP}\n/usr/bin is no command:\n{chat.HELP}\n\n"
    assert talker.messages == []


# The terminal becomes the process' own, so that Ctrl-C is a signal to it, which who runs the tests may have ignored.
IN_ITS_TERMINAL = """
import fcntl, runpy, signal, termios
signal.signal(signal.SIGINT, signal.default_int_handler)
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
runpy.run_module("cartridges_jax.chat", run_name="__main__", alter_sys=True)
"""


class Session:
    """`python -m cartridges_jax.chat` with a model that is tiny, in a terminal of its own."""

    def __init__(self, folder: Path, *options: str, term: str):
        self.screen = b""
        self._keyboard, theirs = pty.openpty()
        environment = os.environ | {"TERM": term, "PYTHONPATH": os.getcwd(), "CARTRIDGES_JAX_CACHE": str(folder)}
        self.process = subprocess.Popen(
            [sys.executable, "-c", IN_ITS_TERMINAL, f"--model={tiny.folder()}", "--no-warmup", *options],
            stdin=theirs,
            stdout=theirs,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env=environment,
            start_new_session=True,
        )
        os.close(theirs)

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._keyboard)

    def type(self, text: str) -> None:
        os.write(self._keyboard, text.encode())

    def interrupt(self) -> None:
        """Ctrl-C, again where nothing comes of it: Python's readline misses one just before it waits for a key."""
        ready: list[int] = []
        while not ready:
            self.type("\x03")
            ready, _, _ = select.select([self._keyboard], [], [], 5)

    def read(self, until: str | None = None, start: int = 0) -> str:
        """What is on the screen from `start` on, once it has this text, or once the session is over."""
        while until is None or until not in self.screen[start:].decode(errors="replace"):
            try:
                part = os.read(self._keyboard, 4096)
            except OSError:  # the other end is closed
                part = b""
            if not part:
                assert until is None, f"{until!r} is not in {self.screen!r}"
                break
            self.screen += part
        return self.screen[start:].decode(errors="replace")


def test_a_session_in_a_terminal(tmp_path: Path):
    cartridge = tmp_path / "cartridges" / "text.safetensors"
    cartridge.parent.mkdir()
    cj.Cartridge.from_text(tiny.model(), tiny.TEXT, 20).save(cartridge)
    (tmp_path / "text.txt").write_text(tiny.TEXT[:200])
    with Session(tmp_path, "--max-length=512", "--max-tokens=4", "--document=text.txt", term="dumb") as session:
        session.type("hello\n/cartridge text\n/compare\n/cartridge nowhere\n/quit\n")
        shown = session.read()
        assert session.process.wait(30) == 0
    assert "0 slots of a cartridge. /help" in shown and "20 slots\r\n" in shown
    assert shown.count("--max-tokens is reached") + shown.count("tokens/s)") >= 4, shown
    assert "nowhere does not exist" in shown


def test_pastes_ctrl_c_and_typing_ahead(tmp_path: Path):
    readline = pytest.importorskip("readline")
    if "libedit" in readline.__doc__:
        pytest.skip("this Python has libedit, which does not know pastes")
    end, prompt = "[--max-tokens is reached]", "> "
    with Session(tmp_path, "--max-length=1024", "--max-tokens=200", term="xterm") as session:
        session.read(until=prompt)
        session.type("\x1b[200~one\rtwo\rthree\x1b[201~")
        session.read(until="three")
        session.type("\r")
        session.read(until=end)
        session.read(until=prompt, start=session.screen.index(end.encode()))
        start = len(session.screen)
        session.type("/nonsense and more")
        session.read(until="more", start=start)
        start = len(session.screen)
        session.interrupt()
        session.read(until=prompt, start=start)
        session.type("again\r")
        session.read(until="again", start=start)
        # readline turns the terminal's echo on when it ends, a moment before the answer turns it off
        session.read(until=chat.MARK_PASTES, start=session.screen.index(b"again", start))
        session.type("typed meanwhile")
        shown = session.read(until="typed meanwhile", start=start)
        session.type("\x15/undo\r/undo\r/undo\r/quit\r")  # Ctrl-U takes the line away
        everything = session.read()
        assert session.process.wait(30) == 0
    assert everything.count(end) == 2, "the pasted lines were one message, the line that was cleared was none"
    assert "no command" not in everything and "[stopped]" not in everything
    answer, _, rest = shown.partition(end)
    assert "typed" not in answer and prompt in rest.partition("typed meanwhile")[0]
