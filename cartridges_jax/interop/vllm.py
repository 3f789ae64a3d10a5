"""A KV connector, vLLM's kind of plugin, with which vLLM serves cartridges. It runs inside vLLM, which brings torch.

    vllm serve MODEL --kv-transfer-config '{"kv_connector": "CartridgeConnector", "kv_role": "kv_both",
      "kv_connector_module_path": "cartridges_jax.interop.vllm", "kv_connector_extra_config": {"cartridges": "FOLDER"}}'

A request's prompt begins with p placeholder ids, whose keys and values are taken from the cartridge instead of being
computed; `engines.vllm_request` writes such a request. It names the cartridge twice: in `kv_transfer_params`, and as
its `cache_salt`, without which vLLM's prefix cache would take one cartridge's placeholders for another's. A request
that cannot be served as asked fails alone, and the log says why.

vLLM drops what a connector offers where it needs a log-probability of every prompt token (`prompt_logprobs`, `echo`):
such a request sees placeholders.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from safetensors import torch as torch_tensors
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1, KVConnectorMetadata
from vllm.logger import init_logger

from cartridges_jax.cartridge import ragged, tensor_file
from cartridges_jax.command_line.errors import UserError
from cartridges_jax.models.config import ModelConfig
from cartridges_jax.models.rope import shift_keys
from cartridges_jax.serving.store import CartridgeStore, UnknownCartridge

logger = init_logger("vllm.cartridges")


@dataclasses.dataclass(frozen=True)
class Slots:
    """The slots of a cartridge's file. `tensors` are torch's, [l, p, k, h]."""

    num_slots: int
    tensors: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Load:
    """What the worker has to do: write slots from `first` on into these blocks, or without a name report a failure."""

    name: str
    first: int
    blocks: tuple[int, ...]


@dataclasses.dataclass
class Loads(KVConnectorMetadata):
    loads: list[Load]


class CartridgeConnector(KVConnectorBase_V1):
    """Cartridges of a folder, `<name>.safetensors` or `<name>/cartridge.safetensors`, each read once."""

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any):
        super().__init__(vllm_config=vllm_config, role=role, kv_cache_config=kv_cache_config)
        folder = vllm_config.kv_transfer_config.get_from_extra_config("cartridges", None)
        if folder is None or not Path(folder).is_dir():
            raise UserError(f'kv_connector_extra_config needs {{"cartridges": FOLDER}}, an existing folder: {folder!r}')
        if vllm_config.parallel_config.tensor_parallel_size > 1:
            raise UserError("cartridges are served without tensor parallelism: --tensor-parallel-size=1")
        self._page = vllm_config.cache_config.block_size
        # how vLLM stores the weights changes nothing of the slots that it is given
        raw = vllm_config.model_config.hf_config.to_dict() | {"quantization_config": None}
        self._config = ModelConfig.from_hf(raw)
        self._store = CartridgeStore(Path(folder), self._read)
        self._held: dict[str, Slots] = {}
        self._pending: dict[str, Load] = {}
        self._failed: set[int] = set()

    # The scheduler's side.

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int, bool]:
        name = (request.kv_transfer_params or {}).get("cartridge")
        if name is None:
            return 0, False
        try:
            slots = self._checked(request, name)
        except (UserError, UnknownCartridge, OSError) as error:
            logger.error("request %s is refused: %s", request.request_id, error)
            # one token that is never brought: the worker reports its block, and the scheduler fails the request
            self._pending[request.request_id] = Load("", num_computed_tokens, ())
            return min(1, request.num_prompt_tokens - 1 - num_computed_tokens), False
        return max(0, slots.num_slots - num_computed_tokens), False

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        if num_external_tokens <= 0:
            return
        (ids,) = blocks.get_block_ids()
        if request.request_id in self._pending:  # refused above
            first = self._pending[request.request_id].first
            load = Load("", first, (ids[first // self._page],))
        else:
            name = request.kv_transfer_params["cartridge"]
            load = Load(name, self._held[name].num_slots - num_external_tokens, tuple(ids))
        self._pending[request.request_id] = load

    def build_connector_meta(self, scheduler_output: Any) -> Loads:
        loads = [load for load in self._pending.values() if load.blocks]
        self._pending.clear()
        return Loads(loads)

    def _checked(self, request: Any, name: object) -> Slots:
        if not isinstance(name, str):
            raise UserError("kv_transfer_params.cartridge is no text")
        slots = self._slots(name)
        if request.cache_salt != name:
            raise UserError(f"cache_salt is {request.cache_salt!r}, expected {name!r}, the cartridge's name")
        if request.num_prompt_tokens <= slots.num_slots:
            raise UserError(
                f"the prompt has {request.num_prompt_tokens} tokens, expected {slots.num_slots} placeholders and a text"
            )
        return slots

    # The worker's side.

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        for load in self._get_connector_metadata().loads:
            if load.name:
                self._write(load, forward_context)
            else:
                self._failed |= set(load.blocks)

    def get_block_ids_with_load_errors(self) -> set[int]:
        failed, self._failed = self._failed, set()
        return failed

    def wait_for_layer_load(self, layer_name: str) -> None:
        pass  # everything is there when start_load_kv returns

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any) -> None:
        pass

    def wait_for_save(self) -> None:
        pass

    def _write(self, load: Load, forward_context: Any) -> None:
        slots = self._slots(load.name)
        positions = range(load.first, slots.num_slots)
        places = [load.blocks[i // self._page] * self._page + i % self._page for i in positions]
        for name, layer in forward_context.no_compile_layers.items():
            cache = getattr(layer, "kv_cache", None)
            if cache is None or ".layers." not in name:
                continue
            index = int(name.partition(".layers.")[2].partition(".")[0])
            keys, values = (
                slots.tensors[side][index, load.first :].to(cache.device, cache.dtype).contiguous()
                for side in ("keys", "values")
            )
            where = keys.new_tensor(places).long()
            # the backend's own operation: on a CPU the cache is packed for its vector units
            layer.impl.do_kv_cache_update(layer, keys, values, cache, where)

    def _slots(self, name: str) -> Slots:
        if name not in self._held:
            self._held[name] = self._read(self._store.find(name))
        return self._held[name]

    def _read(self, path: Path) -> Slots:
        if path.suffix != ".safetensors":
            raise UserError(f"{path} is no cartridge.safetensors: convert it with python -m cartridges_jax.convert")
        try:
            data, metadata = tensor_file.read(path)
            header, tensors = json.loads(metadata["cartridge"]), torch_tensors.load(data)
            keys, values = (_decoded(tensors, side) for side in ("keys", "values"))
            lengths, offset = None, keys.shape[1]
            if header["format_version"] >= 3:
                lengths, offset = tensors["lengths"].numpy(), header["offset"]
                ragged.check(lengths, len(keys))
                keys, values = (side.new_tensor(ragged.padded(side.numpy(), lengths)) for side in (keys, values))
        except Exception as error:
            raise UserError(f"{path} is not a whole cartridge file ({error!r}): make it again") from error
        c, version = self._config, header["format_version"]
        if version > 3 or type(offset) is not int or not 0 <= offset <= c.max_position_embeddings:
            most = c.max_position_embeddings
            raise UserError(f"{path} has format {version} and offset {offset!r}, expected at most 3 and 0 to {most}")
        if lengths is not None and (lengths != keys.shape[1]).any():
            raise UserError(f"the heads of {path} have different numbers of slots, for which vLLM has no place")
        shape = (c.num_layers, keys.shape[1], c.num_kv_heads, c.head_dim)
        difference = c.layout_differs(header.get("model_config", ""))
        if difference or keys.shape != shape or values.shape != shape:
            raise UserError(f"{path} was made for another model {difference or f'with slots {tuple(keys.shape)}'}")
        if "bias" in tensors and bool((tensors["bias"] != 0).any()):
            raise UserError(f"{path} has a bias, for which vLLM has no place: convert it with --fold-bias=TEXT")
        if offset != keys.shape[1]:  # vLLM rotates what follows at the positions behind the placeholders
            keys = keys.new_tensor(shift_keys(keys.numpy(), keys.shape[1] - offset, c))
        return Slots(keys.shape[1], {"keys": keys, "values": values})


def _decoded(tensors: dict[str, Any], side: str) -> Any:
    scale = tensors.get(f"{side}_scale")
    if scale is not None and scale.shape != tensors[side].shape[:-1]:
        raise UserError(f"{side}_scale is {tuple(scale.shape)}, expected {tuple(tensors[side].shape[:-1])}")
    return tensors[side].float() * (1 if scale is None else scale[..., None])
