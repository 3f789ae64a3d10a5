"""The loss of distillation against a teacher's top-k log-probabilities (arXiv 2506.06266 §4.2).

It is computed in chunks of target positions, so that logits of all positions never exist at one time. The model's head
is frozen, so only the gradient with respect to the hidden states is needed. It is computed chunk by chunk in the
forward pass, while a chunk's logits are at hand, and the backward pass only scales it. Positions without a target are
sorted behind the others, and their chunks are not visited.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from cartridges_jax import kernels
from cartridges_jax.cartridge.arrays import Cartridge, Placement, Slots
from cartridges_jax.command_line.errors import UserError
from cartridges_jax.kernels.block_sizes import of_kernel
from cartridges_jax.models.config import ModelConfig
from cartridges_jax.models.params import Params
from cartridges_jax.models.transformer import Remat, head_weights, hidden_states
from cartridges_jax.models.weights import Dense
from cartridges_jax.parallel import collectives
from cartridges_jax.training.batch import Batch

if TYPE_CHECKING:
    from cartridges_jax.models.language_model import LanguageModel

NOTHING = -1e30  # a logit whose probability is zero; finite, so that a row of them gives no NaN

Tail = Literal["drop", "bucket"]
Reduction = Literal["token", "entry", "row"]


def distillation_loss(
    cartridge: Cartridge,
    model: LanguageModel,
    batch: Batch,
    tail: Tail = "drop",
    reduction: Reduction = "token",
) -> Float[Array, ""]:
    """Returns the cross-entropy of the student's next token against the teacher's top-k.

    It is differentiable in the cartridge alone: the model is frozen, and no gradient flows to its parameters. The loss
    of a target is -sum_j p_j log q_j, over the teacher's entries.

    Args:
      tail: "bucket" adds the rest of the teacher's mass against the rest of the student's; "drop" does not.
      reduction: "token" averages over targets and "entry" over their entries; "row" averages over the entries of each
        row and then over rows, as upstream does.
    """
    slots, placement = cartridge.checked(model.config).slots, cartridge.placement
    total, count = _loss_sum(slots, placement, model.params, batch, model.config, tail, reduction)
    return total / jnp.maximum(count, 1)


@functools.partial(jax.jit, static_argnums=(4, 5, 6))
def _loss_sum(
    slots: Slots,
    placement: Placement,
    params: Params,
    batch: Batch,
    config: ModelConfig,
    tail: Tail,
    reduction: Reduction,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """`loss_sum` as one program for all cartridges whose arrays have the same shapes."""
    return loss_sum(Cartridge.of(slots, placement), params, batch, config=config, tail=tail, reduction=reduction)


def loss_sum(
    cartridge: Cartridge,
    params: Params,
    batch: Batch,
    *,
    config: ModelConfig,
    tail: Tail,
    reduction: Reduction,
    remat: Remat = "layers",
    attention: str | None = None,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Returns the summed loss of a batch and its divisor, apart because means do not add up over micro-batches."""
    if tail not in ("drop", "bucket") or reduction not in ("token", "entry", "row"):
        raise UserError(
            f"tail is {tail!r} and reduction {reduction!r}, expected drop or bucket and token, entry or row"
        )
    batch = jax.tree.map(jnp.asarray, batch)
    inputs = batch.tokens, batch.segment_ids, batch.positions
    slots = *cartridge.prefix, cartridge.lengths, cartridge.offset
    hidden_btd = hidden_states(params, *inputs, *slots, config=config, implementation=attention, remat=remat)
    mask_btj = batch.target_entries
    targets = hidden_btd, batch.target_ids, batch.target_logprobs, mask_btj
    head_vd = head_weights(params)
    if reduction == "row":
        sums_b = jax.lax.map(lambda row: top_k_cross_entropy(row[0], head_vd, *row[1:], tail), targets)
        entries_b = mask_btj.sum((1, 2))
        return (sums_b / jnp.maximum(entries_b, 1)).sum(), (entries_b > 0).sum().astype(jnp.float32)
    hidden_td, *rest = (a.reshape(-1, a.shape[-1]) for a in targets)
    total = top_k_cross_entropy(hidden_td, head_vd, *rest, tail)
    return total, batch.num_targets if reduction == "token" else mask_btj.sum().astype(jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def top_k_cross_entropy(
    hidden: Float[Array, "t d"],
    head: Float[Array, "v d"],
    ids: Int[Array, "t j"],
    logprobs: Float[Array, "t j"],
    mask: Bool[Array, "t j"],
    tail: Tail,
    chunk: int | None = None,
) -> Float[Array, ""]:
    """Returns the loss summed over targets. No gradient flows to `head`, which is frozen.

    Args:
      chunk: how many targets have logits at one time; None is what the table of block sizes has for this device.
    """
    return _over_chunks(hidden, head, ids, logprobs, mask, tail, chunk, with_gradient=False)[0]


def _backward(tail: Tail, chunk: int | None, gradient_td: Array, cotangent: Array) -> tuple[Any, ...]:
    return (gradient_td * cotangent.astype(gradient_td.dtype), None, None, None, None)


def _over_chunks(
    hidden: Array,
    head: Array,
    ids: Array,
    logprobs: Array,
    mask: Array,
    tail: Tail,
    chunk: int | None,
    *,
    with_gradient: bool,
) -> tuple[Array, Array]:
    t = hidden.shape[0]
    chunk = min(chunk or of_kernel(kernels.platform()).loss_chunk, t)
    is_target_t = mask.any(-1)
    padded = -(-t // chunk) * chunk
    # targets come first, in their order; an index past the end reads a row of zeros (mode="fill"), and what is written
    # there is dropped
    order_t = jnp.concatenate([jnp.argsort(~is_target_t, stable=True), jnp.full(padded - t, t)])

    def body(i: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        total, gradient_td = carry
        rows_c = jax.lax.dynamic_slice(order_t, (i * chunk,), (chunk,))
        hidden_cd, ids_cj, logprobs_cj, mask_cj = (
            a.at[rows_c].get(mode="fill", fill_value=0) for a in (hidden, ids, logprobs, mask)
        )
        if not with_gradient:
            return total + _chunk_loss(hidden_cd, head, ids_cj, logprobs_cj, mask_cj, tail), gradient_td
        loss, gradient_cd = jax.value_and_grad(_chunk_loss)(hidden_cd, head, ids_cj, logprobs_cj, mask_cj, tail)
        return total + loss, gradient_td.at[rows_c].set(gradient_cd, mode="drop")

    chunks = collectives.max_over_devices(-(-is_target_t.sum() // chunk))
    dtype = jnp.promote_types(jnp.float32, hidden.dtype)
    return jax.lax.fori_loop(0, chunks, body, (jnp.zeros((), dtype), jnp.zeros_like(hidden)))


top_k_cross_entropy.defvjp(functools.partial(_over_chunks, with_gradient=True), _backward)


def _chunk_loss(
    hidden_cd: Array, head_vd: Array, ids_cj: Array, logprobs_cj: Array, mask_cj: Array, tail: Tail
) -> Array:
    dtype = jnp.promote_types(jnp.float32, hidden_cd.dtype)
    logits_cv = Dense(head_vd).matmul(collectives.copy_to_tp(hidden_cd.astype(dtype)), "cd,vd->cv")
    normalizer_c = collectives.log_sum_exp(logits_cv)
    teacher_cj = jnp.where(mask_cj, jnp.exp(logprobs_cj.astype(dtype)), 0)
    student_cj = collectives.gather_logits(logits_cv, ids_cj) - normalizer_c[:, None]
    loss = -jnp.sum(teacher_cj * student_cj)
    if tail == "bucket":
        # the student's remaining mass from the remaining logits: 1 - sum(q) would cancel when q is close to one
        local_cj, here_cj = collectives.local_token_ids(ids_cj, head_vd.shape[0])
        listed_cj = jnp.where(mask_cj & here_cj, local_cj, head_vd.shape[0])  # an index out of range is dropped
        rest_cv = logits_cv.at[jnp.arange(ids_cj.shape[0])[:, None], listed_cj].set(NOTHING, mode="drop")
        entries_c = mask_cj.sum(-1)  # 0: the position has no target; the whole vocabulary: nothing remains
        vocab_size = collectives.vocab_size(head_vd.shape[0])
        rest_c = jnp.clip(1 - teacher_cj.sum(-1), 0, 1) * ((entries_c > 0) & (entries_c < vocab_size))
        loss -= jnp.sum(rest_c * (collectives.log_sum_exp(rest_cv) - normalizer_c))
    return loss
