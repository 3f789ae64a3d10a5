"""Asks a question behind a cartridge, of a server that is not ours (Tokasaurus or vLLM).

    python -m cartridges_jax.ask --engine=tokasaurus --name=NAME QUESTION

Such a server looks for cartridges in a folder. With `--folder` and `--cartridge` the cartridge is put there first, in
the server's format.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from cartridges_jax.command_line import config
from cartridges_jax.command_line.addresses import without_credentials
from cartridges_jax.command_line.errors import UserError
from cartridges_jax.command_line.progress import printable
from cartridges_jax.interop.engines import answer_text, post, tokasaurus_request, vllm_request

# Tokasaurus changes other characters of an id, and then looks for a folder of another name.
NAME = re.compile(r"[A-Za-z0-9]+([_-][A-Za-z0-9]+)*")
DEFAULT_URLS = {"tokasaurus": "http://127.0.0.1:10210", "vllm": "http://127.0.0.1:8000"}


def main(argv: list[str]) -> int:
    args = _arguments(argv)
    if args.cartridge is not None:
        _register(args)
    url = (args.url or DEFAULT_URLS[args.engine]).rstrip("/")
    if args.engine == "tokasaurus":
        body = tokasaurus_request(args.name, args.question, args.model, args.max_tokens)
        reply = post(f"{url}/custom/cartridge/chat/completions", body)
    else:
        num_slots, thinking = _slots_and_thinking(args)
        prompt = _prompt(args.model, args.question, thinking)
        body = vllm_request(args.name, num_slots, prompt, args.served_model or args.model, args.max_tokens)
        reply = post(f"{url}/v1/completions", body)
    print(printable(answer_text(reply, without_credentials(url)).strip()))
    return 0


def _arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m cartridges_jax.ask", description=__doc__)
    parser.add_argument("question")
    parser.add_argument("--engine", required=True, choices=sorted(DEFAULT_URLS))
    parser.add_argument("--name", required=True, help="of the cartridge, on the server")
    parser.add_argument("--url", help=f"of the server (default: {DEFAULT_URLS})")
    parser.add_argument("--model", default="smollm2-135m", help="whose tokenizer and name are used")
    parser.add_argument("--served-model", help="the model's name on the server, if another")
    parser.add_argument("--folder", type=Path, help="of the server's cartridges: where --cartridge is put")
    parser.add_argument("--cartridge", help="a file or folder in any format, hf:… or wandb:…")
    parser.add_argument("--max-tokens", type=int, default=128)
    args = parser.parse_args(argv)
    if not NAME.fullmatch(args.name):
        raise UserError(f"--name is {args.name!r}, expected letters and digits with single dashes or underscores")
    if args.cartridge is not None and args.folder is None:
        raise UserError("--cartridge is put into the server's folder of cartridges: say which with --folder")
    if args.engine == "vllm" and args.folder is None:
        raise UserError(
            "vLLM wants a placeholder for every slot: give --folder, where the cartridge tells their number"
        )
    return args


def _register(args: argparse.Namespace) -> None:
    from cartridges_jax.cartridge.arrays import Cartridge
    from cartridges_jax.interop import formats

    place, format = (args.folder / args.name, "tokasaurus")
    if args.engine == "vllm":
        place, format = args.folder / f"{args.name}.safetensors", "safetensors"
    formats.write(Cartridge.load(args.cartridge), place, format)


def _slots_and_thinking(args: argparse.Namespace) -> tuple[int, bool | None]:
    from cartridges_jax.cartridge.arrays import Cartridge

    cartridge = Cartridge.load(args.folder / f"{args.name}.safetensors")
    return cartridge.num_slots, cartridge.thinking


def _prompt(model: str, question: str, thinking: bool | None) -> list[int]:
    from cartridges_jax.models.hub import resolve
    from cartridges_jax.models.tokenizer import load_tokenizer

    messages = [{"role": "user", "content": question}]
    return load_tokenizer(resolve(model)).turn_ids(messages, add_generation_prompt=True, thinking=thinking)


if __name__ == "__main__":
    config.run(main)
