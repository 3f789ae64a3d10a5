"""Rewrites a cartridge in another format: `python -m cartridges_jax.convert SRC DST`.

SRC is a file or folder in any known format, which is recognised by its content, or `hf:org/name` or
`wandb:entity/project/run`. DST is a file, a folder, or `hf:org/name`, to which the cartridge is pushed.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from cartridges_jax.command_line import config, files, progress
from cartridges_jax.command_line.errors import UserError

if TYPE_CHECKING:
    from cartridges_jax.cartridge.arrays import Cartridge
    from cartridges_jax.models.language_model import LanguageModel

# the keys of `interop.formats.FORMATS`, which are repeated here so that --help does not import JAX
FORMATS = ("safetensors", "upstream", "peft", "prefix-tuning", "tokasaurus")
DTYPES = ("float32", "float16", "bfloat16", "int8")


def main(argv: list[str]) -> int:
    args = _arguments(argv)

    from cartridges_jax.cartridge.arrays import Cartridge
    from cartridges_jax.interop import formats, publish

    model = _model(args.model)
    if args.uniform:
        from cartridges_jax.training.run import fit_uniform

        assert model is not None
        with progress.stage("fitting as many slots for every head"):
            cartridge = fit_uniform(Path(args.source), model)
    else:
        cartridge = Cartridge.load(args.source, model=model)
    if model is not None and not cartridge.provenance.weights_hash:
        cartridge = dataclasses.replace(cartridge, provenance=cartridge.provenance.made_for(model))
    cartridge = _changed(cartridge, args, model)
    if args.target.startswith("hf:"):
        report = (
            files.read_text(args.report, "a report for the card, such as evaluate's report.md") if args.report else ""
        )
        place = publish.push_to_hub(cartridge, args.target.removeprefix("hf:"), dtype=args.dtype, report=report)
    else:
        formats.write(cartridge, Path(args.target), args.to, args.dtype)
        place = args.target
    l, _, k, h = cartridge.keys.shape
    size = f"{l} layers, {k} heads of size {h}, {args.dtype}"
    print(f"{place}: {formats.FORMATS[args.to].title}, {cartridge.described()}, {size}")
    known = cartridge.provenance.weights_hash
    made_for = progress.printable(cartridge.provenance.model) or "an unknown model"
    print(f"made for {made_for}{'' if known else ' (its weights are unknown)'}")
    return 0


def _arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m cartridges_jax.convert", description=__doc__)
    parser.add_argument("source", metavar="SRC")
    parser.add_argument("target", metavar="DST")
    parser.add_argument("--to", choices=FORMATS, help="needed for a folder; *.pt is upstream's, *.safetensors our own")
    parser.add_argument("--dtype", default="float32", choices=DTYPES, help="int8 is for our own format only")
    parser.add_argument("--model", help="checks that the cartridge is this model's, and notes it down")
    parser.add_argument("--pad", action="store_true", help="adds slots to fill Tokasaurus' pages; needs --model")
    parser.add_argument("--fold-bias", type=Path, metavar="TEXT", help="moves a bias into the keys; needs --model")
    parser.add_argument(
        "--uniform",
        action="store_true",
        help="SRC is a run's folder: fits as many slots for every head, from the run's inputs; needs --model",
    )
    parser.add_argument("--report", type=Path, help="Markdown for the card of hf:…, such as evaluate's report.md")
    args = parser.parse_args(argv)
    if args.to is None:
        args.to = _format_of(args.target)
    if (args.pad or args.fold_bias or args.uniform) and args.model is None:
        raise UserError("--pad, --fold-bias and --uniform need the model that sees the slots: say which with --model")
    if args.target.startswith("hf:") and args.to != "safetensors":
        raise UserError(f"{args.target} is pushed as cartridge.safetensors: convert to a folder for --to={args.to}")
    return args


def _format_of(target: str) -> str:
    if target.startswith("hf:") or target.endswith(".safetensors"):
        return "safetensors"
    if target.endswith(".pt"):
        return "upstream"
    raise UserError(f"{target} says no format: end it in .safetensors or .pt, or give --to={'|'.join(FORMATS)}")


def _model(name: str | None) -> LanguageModel | None:
    if name is None:
        return None
    from cartridges_jax.models.language_model import load_model

    with progress.stage(f"loading {name}"):
        return load_model(name)


def _changed(cartridge: Cartridge, args: argparse.Namespace, model: LanguageModel | None) -> Cartridge:
    from cartridges_jax.interop import slots, tokasaurus

    if args.fold_bias is not None:
        assert model is not None
        cartridge = slots.fold_bias(cartridge, model, files.read_text(args.fold_bias, "a text to fold the bias on"))
    if args.pad:
        assert model is not None
        cartridge = slots.pad_slots(cartridge, tokasaurus.PAGE, model.config)
    return cartridge


if __name__ == "__main__":
    config.run(main)
