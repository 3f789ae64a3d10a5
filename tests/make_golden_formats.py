"""Small files that torch and peft themselves wrote, and the logits they gave: `python tests/make_golden_formats.py`.

Made and checked where torch and peft are installed (`make golden`, `make test-parity`); every test run reads them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import make_golden
import ml_dtypes
import numpy as np

FORMATS = make_golden.GOLDEN / "formats"
FAMILY = "llama"  # grouped heads, scaled RoPE
LAYERS, KV_HEADS, HEAD_DIM, SLOTS = 3, 2, 16, 7
STEPS = 3
# name -> how many slots are frozen, the name of their lists, and whether torch's own ParameterList holds the tensors
UPSTREAM = {
    "cache-step512": (1, "frozen", True),
    "cache-june": (3, "fixed", True),
    "cache-bare": (0, "frozen", True),
    "cache-lists": (2, "frozen", False),
}


def slots(name: str) -> np.ndarray:
    """Keys or values [l, p, k, h], the same ones wherever they are asked for; exact in bfloat16."""
    drawn = make_golden.draw(f"golden {name}", (LAYERS, SLOTS, KV_HEADS, HEAD_DIM))
    return drawn.astype(ml_dtypes.bfloat16).astype(np.float32)


def save_upstream(path: Path, num_frozen: int, frozen: str, parameter_lists: bool) -> None:
    """As upstream saves a cache: bfloat16, and trainable and frozen slots cut out of one tensor."""
    import torch

    def cut(name: str, part: slice, trains: bool) -> Any:
        whole = torch.from_numpy(slots(name)).to(torch.bfloat16).permute(0, 2, 1, 3)  # [l, k, p, h]
        tensors = [torch.nn.Parameter(layer[None, :, part], requires_grad=trains) for layer in whole]
        # without frozen slots upstream's list of them is empty
        tensors = tensors if part != slice(0, 0) else []
        return torch.nn.ParameterList(tensors) if parameter_lists else tensors

    frozen_part, rest = slice(0, num_frozen), slice(num_frozen, None)
    tree = {f"trainable_{name}": cut(name, rest, True) for name in ("keys", "values")}
    tree |= {f"{frozen}_{name}": cut(name, frozen_part, False) for name in ("keys", "values")}
    torch.save(tree, path)


def train_peft(base: Any, folder: Path, kind: str = "CARTRIDGE", steps: int = STEPS) -> np.ndarray:
    """Lets peft train an adapter on the fixed tokens for a few steps and save it; returns its logits [t, v]."""
    import peft
    import torch

    torch.manual_seed(0)
    if kind == "CARTRIDGE":
        config: Any = peft.CartridgeConfig(task_type="CAUSAL_LM", num_virtual_tokens=SLOTS, num_frozen_tokens=2)
    else:
        config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=SLOTS)
    model = peft.get_peft_model(base, config)
    tokens = torch.from_numpy(make_golden.fixed_tokens())[None].long()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
    model.eval().save_pretrained(str(folder))
    with torch.no_grad():
        return model(input_ids=tokens).logits[0].numpy()


def main() -> None:
    FORMATS.mkdir(parents=True, exist_ok=True)
    for name, how in UPSTREAM.items():
        save_upstream(FORMATS / f"{name}.pt", *how)
    for kind in ("CARTRIDGE", "PREFIX_TUNING"):
        model = make_golden.torch_model(FAMILY)
        make_golden.torch_outputs(model, make_golden.weights(FAMILY))  # loads the weights
        folder = FORMATS / kind.lower()
        np.savez_compressed(FORMATS / f"{kind.lower()}.npz", logits=train_peft(model, folder, kind))
        (folder / "README.md").unlink(missing_ok=True)  # peft's card, a form to fill in


if __name__ == "__main__":
    main()
