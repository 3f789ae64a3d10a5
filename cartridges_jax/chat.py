"""`python -m cartridges_jax.chat`: talk to a model, and to a cartridge, in a terminal; no server is started."""

from __future__ import annotations

import argparse
import random
import signal
import sys
import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager

from cartridges_jax.serving.scheduler import Engine, Finished, Prefix, Request, Scheduler, Token
from cartridges_jax.tokenizer import StreamDecoder, Tokenizer
from command_line import config, progress

HELP = "/clear forgets the conversation, /undo the last question and its answer, /quit leaves; Ctrl-C stops an answer"


class Chat:
    """A conversation; what the slot already holds of it is not computed again."""

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        prefix: Prefix | None,
        *,
        max_tokens: int,
        temperature: float,
        rng: random.Random,
    ):
        self._engine, self._tokenizer, self._prefix = engine, tokenizer, prefix
        self._max_tokens, self._temperature, self._rng = max_tokens, temperature, rng
        self._scheduler = Scheduler(engine, max_queue=0)
        self.messages: list[dict[str, str]] = []
        self.cut = ""  # why the last answer ends early, if it does

    def clear(self) -> None:
        self.messages = []

    def undo(self) -> None:
        """Forgets the last question and its answer."""
        self.messages = self.messages[:-2]

    def answer(self, question: str) -> Generator[str, None, None]:
        """Streams the answer; a consumer that stops early (Ctrl-C) keeps what it has seen of it.

        Raises:
          ValueError: the window is full; the conversation is then as before.
        """
        messages = [*self.messages, {"role": "user", "content": question}]
        encode = self._tokenizer.turn_ids if self._prefix else self._tokenizer.chat_ids
        prompt = tuple(encode(messages, add_generation_prompt=True))
        slots = self._prefix.length if self._prefix else 0
        room = self._engine.max_length - slots - len(prompt)
        if room < 1:
            raise ValueError(
                f"the window of {self._engine.max_length} positions is full ({slots} of the cartridge, {len(prompt)} "
                "of the conversation): /undo, /clear, or start again with a larger --max-length"
            )
        request = Request(
            id="chat",
            prompt=prompt,
            prefix=self._prefix,
            max_tokens=min(room, self._max_tokens),
            temperature=self._temperature,
            seed=self._rng.randrange(2**31),
            stop_ids=self._tokenizer.stop_ids,
        )
        said = ""
        try:
            for piece in self._stream(request):
                said += piece
                yield piece
        finally:
            self.messages = [*messages, {"role": "assistant", "content": said}]

    def _stream(self, request: Request) -> Iterator[str]:
        decoder = StreamDecoder(self._tokenizer)
        self.cut = ""
        self._scheduler.submit(request)
        try:
            while self._scheduler.has_work:
                for event in self._scheduler.step():
                    if isinstance(event, Token) and event.sampled.token not in request.stop_ids:
                        yield decoder.push(event.sampled.token)
                    elif isinstance(event, Finished):
                        self.cut = self._why_cut(event, request)
                        yield decoder.flush()
        finally:
            self._scheduler.cancel(request.id)  # nothing, unless the consumer has stopped
            self._scheduler.step()

    def _why_cut(self, event: Finished, request: Request) -> str:
        if event.reason != "length":
            return ""
        return "--max-tokens is reached" if request.max_tokens == self._max_tokens else "the window is full"


def talk(chat: Chat, read: Callable[[], str], write: Callable[[str], object]) -> None:
    """Reads questions and commands until /quit or the end of the input."""
    while True:
        try:
            line = read().strip()
        except (EOFError, KeyboardInterrupt):
            write("\n")
            return
        if line == "/quit":
            return
        if line == "/clear":
            chat.clear()
        elif line == "/undo":
            chat.undo()
        elif line.startswith("/"):
            write(f"{HELP}\n")
        elif line:
            _tell(chat, line, write)


def _tell(chat: Chat, question: str, write: Callable[[str], object]) -> None:
    with _interrupts() as stopped, closing(chat.answer(question)) as pieces:
        try:
            for piece in pieces:
                write(piece)
                if stopped.is_set():
                    break
            note = "stopped" if stopped.is_set() else chat.cut
            write(f" [{note}]\n" if note else "\n")
        except ValueError as error:
            write(f"{error}\n")


@contextmanager
def _interrupts() -> Iterator[threading.Event]:
    """Ctrl-C sets the event instead of raising, which could strike while the engine replaces its cache."""
    stopped = threading.Event()
    before = signal.signal(signal.SIGINT, lambda *_: stopped.set())
    try:
        yield stopped
    finally:
        signal.signal(signal.SIGINT, before)


def main(argv: list[str]) -> int:
    args = _arguments(argv)

    import cartridges_jax as cj
    from cartridges_jax.serving.engine import Engine as DeviceEngine

    with progress.stage(f"loading {args.model}"):
        model = cj.load_model(args.model, dtype="float32")
        engine = DeviceEngine(model, num_slots=1, max_length=args.max_length, max_top_logprobs=1)
    prefix = None
    if args.cartridge is not None:
        cartridge = cj.Cartridge.load(args.cartridge, model=model)
        prefix = Prefix(args.cartridge, cartridge.num_slots, cartridge)
    rng = random.Random(args.seed)
    chat = Chat(engine, model.tokenizer, prefix, max_tokens=args.max_tokens, temperature=args.temperature, rng=rng)
    print(f"{model.name}, {prefix.length if prefix else 0} slots of a cartridge. /help lists the commands.")
    talk(chat, _read, _write)
    return 0


def _arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m cartridges_jax.chat", description=__doc__)
    parser.add_argument("--model", default="smollm2-135m", help="a known name, a Hub id, a folder or a .gguf file")
    parser.add_argument("--cartridge", help="a cartridge's file or folder, in any format, hf:… or wandb:…")
    parser.add_argument("--max-length", type=int, default=2048, help="cartridge and conversation together")
    parser.add_argument("--max-tokens", type=int, default=512, help="of one answer")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--seed", type=int, help="for the same answers again, at a temperature above 0")
    args = parser.parse_args(argv)
    if args.max_tokens < 1 or not 0 <= args.temperature <= 2:
        raise ValueError("--max-tokens is at least 1 and --temperature from 0 to 2")
    return args


def _read() -> str:
    return input("> ")


def _write(piece: str) -> None:
    sys.stdout.write(piece)
    sys.stdout.flush()


if __name__ == "__main__":
    config.run(main)
