"""Measures how a model shares slots out over its heads: `python -m cartridges_jax.budgets --model=MODEL`.

A few heads need nearly all of a document, most need almost nothing of it, and which ones they are hardly depends on the
document. So this profile is measured once for a model; attention matching with `init.budget=profile` uses it. Where a
model has none, one is measured at first use and kept in the cache folder. The file is small and may be published.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from cartridges_jax.command_line import config, files
from cartridges_jax.command_line.progress import stage


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m cartridges_jax.budgets", description=__doc__)
    parser.add_argument("--model", required=True, help="a name, a Hub id, a folder or a .gguf file")
    parser.add_argument("--text", type=Path, help="what it is measured on (default: 2,000 tokens of our own)")
    parser.add_argument("--output", type=Path, help="the profile's file (default: in the cache folder)")
    args = parser.parse_args(argv)

    import numpy as np

    from cartridges_jax.initial.budgets import PROFILE_TEXT, RATIOS, Profile, cached_profile
    from cartridges_jax.models.language_model import load_model

    text = files.read_text(args.text or PROFILE_TEXT, "the text that the profile is measured on")
    with stage(f"loading {args.model}"):
        model = load_model(args.model)
    with stage("measuring what attention each token receives in each head"):
        profile = Profile.measured(model, text)
    path = args.output or cached_profile(model)
    profile.save(path)
    print(f"{path}: shares of {profile.shares[0].size} heads of {model.name}")
    print("| slots, of the document's tokens | smallest share | median | largest |\n|---|---|---|---|")
    for ratio, shares_lk in zip(RATIOS, profile.shares, strict=True):
        lowest, median, highest = np.quantile(shares_lk, (0, 0.5, 1))
        print(f"| 1/{ratio} | {lowest:.2f} | {median:.2f} | {highest:.2f} times the average |")
    return 0


if __name__ == "__main__":
    config.run(main)
