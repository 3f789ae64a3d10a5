"""This is the definition of `decode_attention`, a dense softmax for each request alone; tests hold the rest to it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from cartridges_jax.kernels.decode_attention.pages import AttentionMetadata, Pages, slot_head_page, visible
from cartridges_jax.kernels.decode_attention.softmax import Options, heads_apart, heads_together, sinks_together
from cartridges_jax.kernels.prefix_attention.blockwise import soft_capped

POSITIONS_LAST = False


def reference_attention(
    q: Float[Array, "r t n h"], pages: Pages, metadata: AttentionMetadata, options: Options
) -> Float[Array, "r t n h"]:
    window, scale, soft_cap, sinks = options
    t, n, k, z = *q.shape[1:3], metadata.kv_heads, pages.page_size
    layer, room = metadata.layer, metadata.slot_block_table.shape[1] * metadata.heads
    starts_ak, lens_ak = (jnp.asarray(a)[layer] for a in (metadata.slot_starts, metadata.slot_lens))

    def alone(
        q_tnh: Array, start: Int[Array, ""], table_c: Int[Array, " c"], cartridge: Int[Array, ""]
    ) -> Float[Array, "t n h"]:
        slot_page_e = slot_head_page(metadata, cartridge, jnp.arange(room))
        after_start_ks = jnp.arange(room * z) - starts_ak[cartridge][:, None]
        is_slot_ks = (after_start_ks >= 0) & (after_start_ks < lens_ak[cartridge][:, None]) & (cartridge >= 0)
        token_page_kc = table_c * metadata.heads + (layer * k + jnp.arange(k))[:, None]
        seen_ts = visible(start, t, jnp.arange(len(table_c) * z), window) & jnp.repeat(table_c >= 0, z)
        seen_kts = jnp.concatenate([jnp.tile(is_slot_ks[:, None], (1, t, 1)), jnp.tile(seen_ts, (k, 1, 1))], axis=2)
        page_ke = jnp.concatenate([jnp.tile(slot_page_e, (k, 1)), token_page_kc], axis=1)
        keys_ksh, values_ksh = (
            a[page_ke].reshape(k, -1, a.shape[-1]).astype(jnp.float32) for a in (pages.keys, pages.values)
        )
        bias_ks = jnp.where(jnp.arange(page_ke.shape[1] * z) < room * z, pages.bias[page_ke].reshape(k, -1), 0)
        q_kmh = heads_together(q_tnh.astype(jnp.float32), k, scale)
        scores_kms = soft_capped(jnp.einsum("kmh,ksh->kms", q_kmh, keys_ksh), soft_cap) + bias_ks[:, None]
        seen_kms = jnp.repeat(seen_kts, n // k, axis=1)
        scores_kms = jnp.where(seen_kms, scores_kms, -jnp.inf)
        sink_km = jnp.full(scores_kms.shape[:2], -jnp.inf) if sinks is None else sinks_together(sinks, k, t)
        running_max_km = jnp.maximum(scores_kms.max(2), sink_km)
        running_max_km = jnp.where(
            jnp.isneginf(running_max_km), 0, running_max_km
        )  # a row that only pads a batch sees nothing
        probs_kms = jnp.where(seen_kms, jnp.exp(scores_kms - running_max_km[..., None]), 0)
        denominator_km = probs_kms.sum(2) + jnp.exp(sink_km - running_max_km)
        # a weight of zero is not enough: what is not seen may be infinite
        values_ksh = jnp.where(seen_kms.any(1)[..., None], values_ksh, 0)
        o_kmh = jnp.einsum("kms,ksh->kmh", probs_kms, values_ksh) / jnp.maximum(denominator_km, 1e-30)[..., None]
        return heads_apart(o_kmh, t).astype(q.dtype)

    return jax.vmap(alone)(q, metadata.starts, metadata.block_table, metadata.cartridge_ids)
