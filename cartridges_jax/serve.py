"""`python -m cartridges_jax.serve`: one model and a folder of cartridges behind an OpenAI-compatible API."""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import errno
import io
import json
import signal
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cartridges_jax.command_line import config, files, progress
from cartridges_jax.command_line.errors import UserError
from cartridges_jax.serving.server import Server, is_loopback
from cartridges_jax.serving.store import NAME, CartridgeStore

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from cartridges_jax.cartridge.arrays import Cartridge
    from cartridges_jax.serving.engine import Engine

DEFAULT_FOLDER = "cartridges"
# how long the event loop may keep the engine's thread, and that the device, waiting for the interpreter's lock
SWITCH_SECONDS = 5e-4
LIMITS = {
    "port": (0, 65535),
    "max_num_seqs": (1, 4096),
    "tensor": (1, 4096),
    "max_length": (2, 1 << 20),
    "max_queue": (0, 4096),
    "max_body": (1024, 1 << 30),
    "max_seconds": (1, 1 << 20),
    "max_cartridges": (1, 4096),
    "cache_tokens": (1, 1 << 40),
    "max_num_batched_tokens": (1, 1 << 20),
}


def main(argv: list[str]) -> int:
    progress.log_to_terminal()
    args = _arguments(argv)
    folder = _folder(args.cartridges)
    api_key = _read_key(args.api_key_file)
    document = None if args.document is None else files.read_text(args.document, "a text for the chat page")
    # Taken before the model is loaded, which may take a minute: a port in use is better known at once.
    with bind(args.host, args.port) as sock:
        if api_key is None and not is_loopback(sock):
            print(f"warning: {args.host} can be reached from other machines, without an API key", file=sys.stderr)
        server, name = _load(args, folder, api_key, document)
        host, port = sock.getsockname()[:2]
        url = f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"
        room = f"{args.max_num_seqs} requests of {args.max_length} positions at once"
        ready = f"ready: {url} (model {name}, {room}; a chat page at {url[:-2]})"
        if args.warmup:
            print(f"{url}: requests wait until all programs are compiled (--no-warmup: for their own)", file=sys.stderr)
        sys.setswitchinterval(SWITCH_SECONDS)
        sys.stdin = io.StringIO()  # or the package wandb would ask there for a key, and a request wait for the answer
        return asyncio.run(run(server, sock, ready))


def bind(host: str, port: int) -> socket.socket:
    """Returns a socket that listens on the first address of `host`, or raises an OSError; port 0 picks a free one."""
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        sock = socket.socket(family, kind, proto)
    except OSError as error:
        raise OSError(f"{host!r} is not an address of this machine ({error.strerror}): try --host=127.0.0.1") from error
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        sock.listen(128)  # without it a second server could bind the port too, and fail only later
    except OSError as error:
        sock.close()
        if error.errno == errno.EADDRINUSE:
            raise OSError(f"port {port} of {host} is in use: choose another with --port, or --port=0") from error
        raise OSError(f"cannot listen on port {port} of {host}: {error.strerror}") from error
    return sock


def _arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m cartridges_jax.serve", description=__doc__)
    parser.add_argument("--model", default="smollm2-135m", help="a known name, a Hub id, a folder or a .gguf file")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--tensor", type=int, default=1, help="devices that share heads, MLP and vocabulary")
    parser.add_argument("--cartridges", help=f"folder of cartridges (default: {DEFAULT_FOLDER})")
    parser.add_argument(
        "--cartridge",
        action="append",
        default=[],
        metavar="NAME=SOURCE",
        help="one that lies elsewhere: a file or folder in any format, hf:org/name or wandb:entity/project/run",
    )
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000, help="0 picks a free one")
    parser.add_argument("--max-num-seqs", type=int, default=16, help="requests that are answered at the same time")
    parser.add_argument("--max-length", type=int, default=2048, help="cartridge, prompt and answer of one request")
    parser.add_argument(
        "--cache-tokens", type=int, help="positions in memory (default: enough for all requests at --max-length)"
    )
    parser.add_argument(
        "--max-num-batched-tokens",
        type=int,
        help="tokens of prompts that are read between two steps of the answers (default: few on a CPU)",
    )
    parser.add_argument("--max-queue", type=int, default=64, help="requests that may wait for their turn")
    parser.add_argument("--max-body", type=int, default=1 << 20, help="bytes of one request")
    parser.add_argument("--max-seconds", type=int, default=600, help="that a request may take, waiting included")
    parser.add_argument("--max-cartridges", type=int, default=32, help="that are in memory at the same time")
    parser.add_argument(
        "--remote-sources", action="store_true", help="requests may name cartridges of the Hugging Face Hub and W&B"
    )
    parser.add_argument("--document", type=Path, help="a text that the chat page at / compares cartridges with")
    parser.add_argument("--api-key-file", type=Path, help="file with the key that clients must send")
    parser.add_argument(
        "--warmup",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="compile every program before the first answer, or each when it is first needed",
    )
    args = parser.parse_args(argv)
    for name, (low, high) in LIMITS.items():
        value = getattr(args, name)
        if value is not None and not low <= value <= high:
            raise UserError(f"--{name.replace('_', '-')} is {value}, expected {low} to {high}")
    return args


def _named(given: str) -> tuple[str, str]:
    name, _, source = given.partition("=")
    if not NAME.fullmatch(name) or not source:
        raise UserError(f"--cartridge is {given!r}, expected NAME=SOURCE, the name without separators")
    return name, source


def _folder(given: str | None) -> Path:
    if given is not None and not Path(given).is_dir():
        raise UserError(f"--cartridges is {given!r}, which is not a folder: create it, or leave the option out")
    return Path(given or DEFAULT_FOLDER)


def _read_key(path: Path | None) -> str | None:
    if path is None:
        return None
    key = path.read_text(encoding="utf-8").strip()
    if not key:
        raise UserError(f"--api-key-file={path} is empty: write the key into it")
    return key


def _load(
    args: argparse.Namespace, folder: Path, api_key: str | None, document: str | None = None
) -> tuple[Server, str]:
    import cartridges_jax as cj
    from cartridges_jax.cartridge.composition import compose
    from cartridges_jax.interop.formats import locate
    from cartridges_jax.interop.sources import fetch
    from cartridges_jax.serving import engine as device
    from cartridges_jax.serving.warmup import keep_programs

    def fetch_file(source: str) -> Path:
        return locate(fetch(source))[1]

    named = {name: fetch_file(source) for name, source in map(_named, args.cartridge)}

    keep_programs()
    with progress.stage(f"loading {args.model}"):
        model = cj.load_model(args.model, args.dtype, _mesh(args.tensor))
        bytes_per_token = model.kv_bytes_per_token
        limits = {"cache_tokens": args.cache_tokens, "max_num_batched_tokens": args.max_num_batched_tokens}
        engine = device.Engine(model, args.max_num_seqs, args.max_length, **limits)
        model = dataclasses.replace(model, params={})  # the engine holds them in a layout of its own
    print(memory_of(engine, bytes_per_token), file=sys.stderr)

    def load(path: Path) -> cj.Cartridge:
        # at the engine's offset already, so that the engine's thread rotates no keys
        return cj.Cartridge.load(path, model=model).at_offset(0, model.config)

    remote = fetch_file if args.remote_sources else None
    store = CartridgeStore(folder, load, args.max_cartridges, named, remote, compose)
    server = Server(
        engine,
        model.tokenizer,
        store,
        model.name,
        max_queue=args.max_queue,
        max_body=args.max_body,
        max_seconds=args.max_seconds,
        api_key=api_key,
        describe=describe,
        kv_bytes_per_token=bytes_per_token,
        document=document,
        programs=engine.programs() if args.warmup else (),
    )
    return server, model.name


def _mesh(tensor: int) -> Mesh | None:
    import jax

    from cartridges_jax.parallel.sharding import MeshConfig, make_mesh

    if tensor > len(jax.devices()):
        raise UserError(f"--tensor is {tensor}, and there are {len(jax.devices())} devices here: expected no more")
    return make_mesh(MeshConfig(tensor=tensor), jax.devices()[:tensor]) if tensor > 1 else None


def memory_of(engine: Engine, bytes_per_token: int) -> str:
    """A sentence that says how much memory the engine has for keys and values, and how many requests fit in it."""
    positions = engine.num_pages * engine.page_size
    fit = min(engine.max_num_seqs, engine.num_pages // engine.pages_each)
    return (
        f"keys and values: {positions:,} positions in {positions * bytes_per_token / 2**30:.2f} GiB, room for {fit} of "
        f"{engine.max_num_seqs} requests of {engine.max_length:,} at once; what they have in common counts once"
    )


def describe(cartridge: Cartridge) -> dict[str, Any]:
    """Size, origin and quality of a cartridge, as JSON."""
    provenance = {name: value for name, value in cartridge.provenance.as_dict().items() if value or value is False}
    evaluation = str(provenance.pop("evaluation", ""))
    provenance.pop("model_config", None)
    return {
        "bytes": cartridge.num_bytes,
        "longest_head": int(cartridge.all_lengths.max(initial=0)),
        "num_frozen": cartridge.num_frozen,
        "provenance": provenance,
        "evaluation": _json_or_text(evaluation) if evaluation else None,
    }


def _json_or_text(text: str) -> Any:
    try:
        value = json.loads(text)
        json.dumps(value, allow_nan=False)
    except (ValueError, RecursionError):  # a file may say anything there
        return text
    return text if _is_deep(value) else value


def _is_deep(value: Any, most: int = 16) -> bool:
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return most == 0 or any(_is_deep(part, most - 1) for part in parts)


async def run(server: Server, sock: socket.socket, ready: str) -> int:
    """Serves until SIGTERM or Ctrl-C (0) or until the engine fails (1)."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    runner = await server.start(sock)
    waits = [asyncio.create_task(stop.wait()), asyncio.create_task(server.failed())]
    announcement = asyncio.create_task(_announce(server, ready))
    try:
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in (*waits, announcement):
            task.cancel()
        await runner.cleanup()
    print("stopped" if stop.is_set() else "error: the engine failed, see above", file=sys.stderr)
    return 0 if stop.is_set() else 1


async def _announce(server: Server, ready: str) -> None:
    await server.warm()
    print(ready, flush=True)


if __name__ == "__main__":
    config.run(main, {"--slots": "--max-num-seqs"})
