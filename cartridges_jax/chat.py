"""`python -m cartridges_jax.chat`: talk to a model, and to a cartridge, in a terminal; no server is started."""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.util
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cartridges_jax.command_line import config, files, progress
from cartridges_jax.command_line.errors import UserError
from cartridges_jax.models.tokenizer import StreamDecoder, Tokenizer
from cartridges_jax.serving.scheduler import (
    NOT_FINITE,
    Engine,
    Finished,
    Prefix,
    Request,
    Scheduler,
    Token,
    most_tokens,
)
from cartridges_jax.serving.store import CartridgeStore
from cartridges_jax.serving.warmup import Warmup, keep_programs

HELP = """\
/clear            forget the conversation
/undo             forget the last question and its answer
/cartridge NAME   go on with another cartridge: a name in --cartridges, a file or folder, hf:… or wandb:…; or none
/compare [TEXT]   ask this, or the last question, with nothing, with the cartridge and with --document in the prompt
/quit             leave, as Ctrl-D does; Ctrl-C stops an answer or a load, and clears the line at the prompt"""
# What a terminal is told so that it marks what is pasted.
MARK_PASTES, MARK_NOTHING = "\x1b[?2004h", "\x1b[?2004l"


@dataclass
class GenerationStats:
    """What an answer took: tokens and times, for the user to read."""

    start: float
    num_prompt: int
    num_slots: int
    num_tokens: int = 0
    first: float | None = None
    last: float = 0.0
    cut: str = ""  # why the answer ended early, if it did

    def token(self) -> None:
        self.last = time.monotonic()
        self.first = self.first or self.last
        self.num_tokens += 1

    def __str__(self) -> str:
        slots = f"{self.num_slots:,} slots + " if self.num_slots else ""
        text = f"{slots}{self.num_prompt:,} prompt tokens"
        if self.first is not None:
            text += f", first token {1000 * (self.first - self.start):,.0f} ms"
            if self.num_tokens > 1:
                text += f", {(self.num_tokens - 1) / (self.last - self.first):.1f} tokens/s"
        return text


class Chat:
    """A conversation. What the engine already holds of it is not computed again."""

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        prefix: Prefix | None,
        *,
        max_tokens: int,
        temperature: float,
        rng: random.Random,
        thinking: bool | None = None,
    ):
        self._engine, self._tokenizer, self.prefix = engine, tokenizer, prefix
        self._max_tokens, self._temperature, self._rng = max_tokens, temperature, rng
        self._thinking = thinking  # None: as the cartridge was trained, or as the template has it
        self._scheduler = Scheduler(engine, max_queue=0)
        self.messages: list[dict[str, str]] = []
        self.stats = GenerationStats(0.0, 0, 0)  # of the last answer

    def clear(self) -> None:
        self.messages = []

    def undo(self) -> None:
        """Forgets the last question and its answer."""
        self.messages = self.messages[:-2]

    def answer(self, question: str) -> Generator[str, None, None]:
        """Streams the answer; a consumer that stops early (Ctrl-C) keeps what it has. A full window is a UserError."""
        messages = [*self.messages, {"role": "user", "content": question}]
        request = self._request(messages, self.prefix)
        said = ""
        try:
            for piece in self._stream(request):
                said += piece
                yield piece
        finally:
            self.messages = [*messages, {"role": "assistant", "content": said}]

    def aside(self, question: str, prefix: Prefix | None, document: str | None = None) -> Generator[str, None, None]:
        """Streams an answer to a question outside the conversation, of which it knows nothing. Raises: as `answer`."""
        system = [] if document is None else [{"role": "system", "content": document}]
        yield from self._stream(self._request([*system, {"role": "user", "content": question}], prefix))

    def _request(self, messages: Sequence[Mapping[str, str]], prefix: Prefix | None) -> Request:
        encode = self._tokenizer.turn_ids if prefix else self._tokenizer.chat_ids
        cartridge = prefix or self.prefix  # a question without a cartridge is asked in its mode too, to be compared
        thinking = cartridge.thinking if cartridge and self._thinking is None else self._thinking
        mode = {} if thinking is None else {"thinking": thinking}
        prompt = tuple(encode(messages, add_generation_prompt=True, **mode))
        slots = prefix.length if prefix else 0
        most = most_tokens(self._engine, prefix)
        room = most - len(prompt)
        if room < 1:
            raise UserError(
                f"the window of {slots + most} positions is full ({slots} of the cartridge, {len(prompt)} "
                "of the conversation): /undo, /clear, or start again with a larger --max-length"
            )
        return Request(
            id="chat",
            prompt=prompt,
            prefix=prefix,
            max_tokens=min(room, self._max_tokens),
            temperature=self._temperature,
            seed=self._rng.randrange(2**31),
            stop_ids=self._tokenizer.stop_ids,
        )

    def _stream(self, request: Request) -> Iterator[str]:
        decoder = StreamDecoder(self._tokenizer)
        slots = request.prefix.length if request.prefix else 0
        self.stats = GenerationStats(time.monotonic(), len(request.prompt), slots)
        self._scheduler.submit(request)
        try:
            while self._scheduler.has_work:
                for event in self._scheduler.step():
                    if isinstance(event, Token):
                        self.stats.token()
                    if isinstance(event, Token) and event.sampled.token not in request.stop_ids:
                        yield decoder.push(event.sampled.token)
                    elif isinstance(event, Finished):
                        self.stats.cut = self._why_cut(event, request)
                        yield decoder.flush()
        finally:
            self._scheduler.cancel(request.id)  # does nothing unless the consumer has stopped
            self._scheduler.step()

    def _why_cut(self, event: Finished, request: Request) -> str:
        if event.reason == "not_finite":
            return NOT_FINITE
        if event.reason != "length":
            return ""
        return "--max-tokens is reached" if request.max_tokens == self._max_tokens else "the window is full"


@dataclass
class Terminal:
    """Reads questions and commands, and writes what comes of them."""

    chat: Chat
    read: Callable[[], str]
    write: Callable[[str], object]
    load: Callable[[str], Prefix]  # gives the cartridge of a name or source, as `/cartridge` takes it
    document: str | None = None  # the text that `/compare` puts into the prompt

    def talk(self) -> None:
        """Reads and answers until /quit or the end of the input."""
        while True:
            try:
                text = self.read().strip()
                if text == "/quit":
                    return
                with _typing_waits():
                    self._take(text)
            except KeyboardInterrupt:  # at the prompt, or while a cartridge is loaded: answers have their own way
                self.write("\n")
            except EOFError:
                self.write("\n")
                return

    def _take(self, text: str) -> None:
        """Does what a command says, or answers a question of one or more lines."""
        if text.startswith("/"):
            name, _, rest = text.partition(" ")
            self._command(name, rest.strip())
        elif text:
            self._show(self.chat.answer(text))

    def _command(self, name: str, rest: str) -> None:
        if name == "/clear":
            self.chat.clear()
        elif name == "/undo":
            self.chat.undo()
        elif name == "/cartridge" and rest:
            self._change(rest)
        elif name == "/compare":
            self._compare(rest)
        elif name in ("/help", "/cartridge"):
            self.write(f"{HELP}\n")
        else:
            self.write(f"{name} is no command:\n{HELP}\n")

    def _change(self, name: str) -> None:
        try:
            self.chat.prefix = None if name == "none" else self.load(name)
        except (UserError, OSError, LookupError) as error:
            self.write(f"{error}\n")
            return
        self.write("no cartridge\n" if name == "none" else f"{self.chat.prefix.length:,} slots\n")

    def _compare(self, question: str) -> None:
        questions = [message["content"] for message in self.chat.messages if message["role"] == "user"]
        if not question and not questions:
            self.write("there is no question yet: /compare QUESTION\n")
            return
        question, prefix = question or questions[-1], self.chat.prefix
        self.write("— nothing —\n")
        going = self._show(self.chat.aside(question, None), measured=True)
        if going and prefix is not None:
            self.write("— cartridge —\n")
            going = self._show(self.chat.aside(question, prefix), measured=True)
        if going and self.document is not None:
            self.write("— full document —\n")
            self._show(self.chat.aside(question, None, self.document), measured=True)
        elif going:
            self.write("(start with --document=FILE to compare with the full text)\n")

    def _show(self, pieces: Generator[str, None, None], measured: bool = False) -> bool:
        """Writes an answer piece by piece; whether it came to its end and was not stopped."""
        with _interrupts() as stopped, contextlib.closing(pieces):
            try:
                for piece in pieces:
                    self.write(piece)
                    if stopped.is_set():
                        break
                stats = self.chat.stats
                note = "stopped" if stopped.is_set() else stats.cut
                self.write(f" [{note}]\n" if note else "\n")
                self.write(f"({stats})\n\n" if measured else "")
            except UserError as error:
                self.write(f"{error}\n")
            return not stopped.is_set()


@contextlib.contextmanager
def _interrupts() -> Iterator[threading.Event]:
    """Ctrl-C sets the event instead of raising, which could strike while the engine replaces its cache."""
    stopped = threading.Event()
    before = signal.signal(signal.SIGINT, lambda *_: stopped.set())
    try:
        yield stopped
    finally:
        signal.signal(signal.SIGINT, before)


def _edit_lines() -> None:
    """Gives the prompt arrow keys and earlier questions, and pasted lines as one, where Python has GNU readline."""
    with contextlib.suppress(ImportError):
        import readline

        if "libedit" not in (readline.__doc__ or ""):
            readline.parse_and_bind("set enable-bracketed-paste on")


@contextlib.contextmanager
def _typing_waits() -> Iterator[None]:
    """What is typed or pasted meanwhile does not show among what is written: it waits for the next prompt."""
    has_termios = importlib.util.find_spec("termios") is not None  # which Windows lacks
    if not (has_termios and sys.stdin.isatty() and sys.stdout.isatty()):
        yield
        return
    import termios

    before = termios.tcgetattr(sys.stdin)
    silent = [*before]
    silent[3] &= ~termios.ECHO
    termios.tcsetattr(sys.stdin, termios.TCSANOW, silent)
    marking = os.environ.get("TERM", "dumb") != "dumb"
    print(end=MARK_PASTES * marking, flush=True)
    try:
        yield
    finally:
        print(end=MARK_NOTHING * marking, flush=True)
        termios.tcsetattr(sys.stdin, termios.TCSANOW, before)


def main(argv: list[str]) -> int:
    args = _arguments(argv)
    document = None if args.document is None else files.read_text(args.document, "the text that /compare asks with")

    import cartridges_jax as cj
    from cartridges_jax.serving.engine import Engine as DeviceEngine

    keep_programs()
    _edit_lines()

    with progress.stage(f"loading {args.model}"):
        model = cj.load_model(args.model, dtype="float32")
        engine = DeviceEngine(model, max_num_seqs=1, max_length=args.max_length, max_top_logprobs=1)
    if args.warmup:
        Warmup(engine.programs()).run()

    load_file = functools.partial(cj.Cartridge.load, model=model)
    store = CartridgeStore(args.cartridges, load_file)

    def load(name: str) -> Prefix:
        if name in store.list():
            return store.get(name)
        cartridge = load_file(name)
        return Prefix.of(f"{name}@{time.monotonic_ns()}", cartridge)

    prefix = None if args.cartridge is None else load(args.cartridge)
    chat = Chat(
        engine,
        model.tokenizer,
        prefix,
        max_tokens=args.max_tokens,
        temperature=args.temperature,
        rng=random.Random(args.seed),
        thinking=args.thinking,
    )
    print(f"{model.name}, {prefix.length if prefix else 0} slots of a cartridge. /help lists the commands.")
    Terminal(chat, lambda: input("> "), _write, load, document).talk()
    return 0


def _arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m cartridges_jax.chat", description=__doc__)
    parser.add_argument("--model", default="smollm2-135m", help="a known name, a Hub id, a folder or a .gguf file")
    parser.add_argument("--cartridge", help="a name in --cartridges, a file or folder in any format, hf:… or wandb:…")
    parser.add_argument("--cartridges", type=Path, default=Path("cartridges"), help="folder of cartridges")
    parser.add_argument("--document", type=Path, help="the full text, for /compare")
    parser.add_argument("--max-length", type=int, default=2048, help="cartridge and conversation together")
    parser.add_argument("--max-tokens", type=int, default=512, help="of one answer")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--seed", type=int, help="gives the same answers again, at a temperature above 0")
    parser.add_argument(
        "--thinking",
        action=argparse.BooleanOptionalAction,
        help="whether the model thinks first, if its template can tell it to (default: as the cartridge was trained)",
    )
    parser.add_argument(
        "--warmup",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="compile every program before the first question, or each when it is first needed",
    )
    args = parser.parse_args(argv)
    if args.max_tokens < 1 or not 0 <= args.temperature <= 2:
        raise UserError("--max-tokens is at least 1 and --temperature from 0 to 2")
    return args


def _write(piece: str) -> None:
    sys.stdout.write(progress.printable(piece))
    sys.stdout.flush()


if __name__ == "__main__":
    config.run(main)
