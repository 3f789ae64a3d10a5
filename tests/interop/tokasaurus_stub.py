"""Tokasaurus' cartridge routes, as its branch geoff/cartridges serves them; the engine behind them is ours.

Bodies with unknown fields are refused, an id is sanitised and looked up in the folder, `cartridge.pt` is read by the
rules of its loader, and its slots have to fill whole pages.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import yaml
from loopback import QuietHandler, serving

import cartridges_jax as cj
from cartridges_jax.interop import torch_zip
from cartridges_jax.models.language_model import LanguageModel

PAGE = 16
FIELDS = {
    *("messages", "model", "max_tokens", "max_completion_tokens", "n", "temperature", "stop", "logprobs"),
    *("top_logprobs", "ignore_eos", "logprobs_in_fingerprint", "apply_chat_template_overrides", "cartridges"),
    *("seed", "response_format", "user", "metadata", "stream", "top_p"),
}


class Refused(Exception):
    def __init__(self, status: int, detail: str):
        super().__init__(detail)
        self.status = status


def sanitised(id: str) -> str:
    id = re.sub(r"[/\\]", "-", id)
    id = re.sub(r"[:|*?<>\"'\x00-\x1f]|\.+", "_", id)
    return re.sub(r"[-_]{2,}", "_", id)


def load(folder: Path) -> cj.Cartridge:
    """By the rules of the server's loader, not by ours."""
    config = yaml.safe_load((folder / "config.yaml").read_text())
    tree, _ = torch_zip.load(folder / "cartridge.pt")
    renamed = {name.replace("frozen", "fixed"): tensors for name, tensors in tree.items()}
    names = ("fixed_keys", "fixed_values", "trainable_keys", "trainable_values")
    assert {len(renamed[name]) for name in names} == {len(renamed["fixed_keys"])}
    assert renamed["fixed_keys"][0].ndim == 4 and renamed["fixed_keys"][0].shape[0] == 1
    sides = []
    for side in ("keys", "values"):
        layers = zip(renamed[f"fixed_{side}"], renamed[f"trainable_{side}"], strict=True)
        sides.append(np.stack([np.concatenate(pair, axis=2)[0].swapaxes(0, 1) for pair in layers]))
    slots = sides[0].shape[1]
    if -(-config["kv_cache_initializer"]["max_tokens"] // PAGE) != slots // PAGE or slots % PAGE:
        raise Refused(500, "Block indices length does not match")
    assert config["model"]["pretrained_model_name_or_path"]
    return cj.Cartridge(*(jnp.asarray(side, jnp.float32) for side in sides))


def answer(model: LanguageModel, folder: Path, body: dict[str, Any]) -> dict[str, Any]:
    if unknown := body.keys() - FIELDS:
        raise Refused(422, f"Extra inputs are not permitted: {sorted(unknown)}")
    if ("max_tokens" in body) == ("max_completion_tokens" in body):
        raise Refused(400, "Must specify exactly one of max_tokens and max_completion_tokens")
    (asked,) = body["cartridges"]
    assert asked.keys() <= {"id", "source", "force_redownload"}
    place = folder / sanitised(asked["id"])
    if asked["source"] != "local" or not all((place / name).is_file() for name in ("cartridge.pt", "config.yaml")):
        raise Refused(400, f"Cartridge {asked['id']} not found")
    prompt = model.tokenizer.render_turns(body["messages"], add_generation_prompt=True)
    limit = body.get("max_tokens") or body["max_completion_tokens"]
    (text,) = cj.generate(model, [prompt], cartridge=load(place), max_tokens=limit, temperature=body["temperature"])
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop", "logprobs": None}
    return {"id": "1", "object": "chat.completion", "created": 0, "model": body["model"], "choices": [choice]}


@contextmanager
def run_tokasaurus(model: LanguageModel, folder: Path) -> Iterator[str]:
    class Handler(QuietHandler):
        def do_GET(self) -> None:
            self._json(200, {"message": "pong"}) if self.path == "/ping" else self._json(404, {"detail": "Not Found"})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if self.path != "/custom/cartridge/chat/completions":
                return self._json(404, {"detail": "Not Found"})
            try:
                self._json(200, answer(model, folder, body))
            except Refused as error:
                self._json(error.status, {"detail": str(error)})

        def _json(self, status: int, body: dict[str, Any]) -> None:
            self.send(status, json.dumps(body).encode(), Content_Type="application/json")

    with serving(Handler) as url:
        yield url
