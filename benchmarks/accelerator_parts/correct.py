"""Whether the kernels, the loss, a training step and decoding are right on this device.

Attention and the loss are held to their definitions in float64. A training step of a small random model and the answers
of the quickstart's model are held to what a CPU gives for them in float32: another process computes that meanwhile.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from against_definition import definition, outputs
from decode_cases import BATCHES, Case, attend, is_interpreted

from accelerator_parts import models
from accelerator_parts.measuring import Line, Options, attempts, rounded
from cartridges_jax import kernels
from cartridges_jax.cartridge.arrays import Cartridge
from cartridges_jax.kernels.decode_attention import HEAD_SIZES, IMPLEMENTATIONS
from cartridges_jax.kernels.prefix_attention import KERNELS
from cartridges_jax.kernels.prefix_attention.shapes import ON_DEVICE, SMALL, Shape
from cartridges_jax.models.language_model import LanguageModel
from cartridges_jax.serving.engine import Engine
from cartridges_jax.serving.generate import run
from cartridges_jax.serving.scheduler import Prefix, Request, Scheduler, Token
from cartridges_jax.training.losses import Tail, top_k_cross_entropy
from cartridges_jax.training.step import TrainState, train_step

# The largest error, as a fraction of an array's largest value (of 1, where that is less). In bfloat16 the definition
# gets the rounded inputs; weights, output and gradients are rounded a few times more, 2^-9 of relative error each.
MOST = {"float32": 5e-6, "bfloat16": 3 * 2**-8}
ANSWER, SEED = 64, 7
DOCUMENT_SLOTS = 256


def measure(options: Options) -> Iterator[Line]:
    with tempfile.TemporaryDirectory() as folder:
        expected = Path(folder) / "cpu.npz"
        with on_a_cpu(options, expected) as process, jax.default_matmul_precision("highest"):
            yield from attempts(attention_checks(options.tiny))
            yield from attempts(decode_checks(options.tiny))
            yield from attempts(loss_checks(options.tiny))
            yield from attempts(against_the_cpu(options, process, expected))


def _verdict(error: float, most: float) -> Line:
    return {"error": rounded(error, 2), "most": most, "verdict": "right" if error <= most else "WRONG"}


def _error(found: Any, expected: Any) -> float:
    """NaN counts as infinitely wrong."""
    expected = np.asarray(expected, np.float64)
    error = np.abs(np.asarray(found, np.float64) - expected).max(initial=0)
    scale = max(1.0, float(np.abs(expected).max(initial=0)))
    return float(np.nan_to_num(error / scale, nan=np.inf))


Check = tuple[Line, Callable[[], Line]]


def attention_checks(tiny: bool) -> Iterator[Check]:
    """Every implementation of `prefix_attention` that runs here, both passes; on a CPU the kernels are interpreted."""
    on_cpu = kernels.platform() == "cpu"
    names = ("xla", *KERNELS) if on_cpu else ("xla", kernels.platform())
    # segments and bias, then a window; interpreting is slow
    table = [(SMALL[2], ("float32", "bfloat16")), (SMALL[3], ("float32",))]
    for shape, dtypes in table if tiny else [(shape, ("float32", "bfloat16")) for shape in ON_DEVICE]:
        for dtype in dtypes:
            case = functools.cache(functools.partial(_attention_case, shape, dtype))
            for name in names:
                what = {"check": "prefix attention", "of": f"{name} {shape}", "dtype": dtype}
                yield what, functools.partial(_attention_error, case, name, (shape.window, shape.lengths), dtype)


def _attention_case(shape: Shape, dtype: str) -> tuple[Any, np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    """Arguments (rows in `dtype`, slots and bias in float32, all of values that `dtype` has), and what is right."""
    drawn, segment_ids, cotangent = shape.draw()
    cotangent = np.where((segment_ids > 0)[..., None, None], cotangent, 0)  # padding may hold anything
    exact = {n: a if a is None or n == "bias" else _rounded_to(dtype, a) for n, a in drawn.items()}
    given = {n: a if a is None else jnp.asarray(a, dtype if n in "qkv" else None) for n, a in exact.items()}
    cotangent = _rounded_to(dtype, cotangent)
    return given, segment_ids, cotangent, definition(exact, segment_ids, cotangent, shape.window, shape.lengths)


def _rounded_to(dtype: str, array: np.ndarray) -> np.ndarray:
    return np.asarray(jnp.asarray(array, dtype), np.float32)


def _attention_error(case: Callable[[], Any], name: str, options: Any, dtype: str) -> Line:
    given, segment_ids, cotangent, expected = case()
    found = outputs(given, segment_ids, cotangent, name, *options)
    real = (segment_ids > 0)[..., None, None]
    errors = {
        n: _error(found[n] * real if n == "o" else found[n], a * real if n == "o" else a) for n, a in expected.items()
    }
    worst = max(errors, key=lambda n: errors[n])
    return {"worst in": worst, **_verdict(errors[worst], MOST[dtype])}


def decode_checks(tiny: bool) -> Iterator[Check]:
    """Every implementation of `decode_attention` that runs here; on a CPU the kernels are interpreted."""
    names = IMPLEMENTATIONS if kernels.platform() == "cpu" else ("reference", "xla", kernels.platform())
    cases = (Case(), Case(is_ragged=True)) if tiny else (Case(3, 64, 32), Case(8, 128, 32), Case(8, 128, 32, True))
    for case in cases:
        for requests, t in BATCHES[::2] if tiny else BATCHES:
            for name in names:
                if tiny and is_interpreted(name) and not (case.is_ragged and len(requests) == 5):
                    continue  # interpreting is slow
                heads = "heads of several lengths" if case.is_ragged else "heads of one length"
                of = f"{name}, requests {requests}, {t} tokens, {heads}, head size {case.h}"
                yield (
                    {"check": "decode attention", "of": of, "dtype": "float32"},
                    functools.partial(_decode_error, case, requests, t, name),
                )


def _decode_error(case: Case, requests: list[int], t: int, name: str) -> Line:
    q = np.random.default_rng(1).standard_normal((len(requests), t, 4 * case.kv_heads, case.h)).astype(np.float32)
    run = jax.jit(functools.partial(attend, implementation=name))
    found = run(2 * q, case.pages(name), case.given(requests, t))
    return _verdict(_error(found, [case.alone(2 * q[row], r) for row, r in enumerate(requests)]), MOST["float32"])


def loss_checks(tiny: bool) -> Iterator[Check]:
    t, d, v, j = (150, 16, 300, 5) if tiny else (1000, 512, 50_000, 20)
    for tail in ("drop", "bucket"):
        what = {"check": "loss and its gradient", "of": f"{tail}, {t} positions, {v} words", "dtype": "float32"}
        yield what, functools.partial(_loss_error, tail, t, d, v, j)


def _loss_error(tail: Tail, t: int, d: int, v: int, j: int) -> Line:
    rng = np.random.default_rng(0)
    hidden, head = rng.standard_normal((t, d)), rng.standard_normal((v, d)) * d**-0.5
    ids = np.array([rng.choice(v, j, replace=False) for _ in range(t)], np.int32)
    logprobs = np.log(rng.dirichlet([0.5] * (j + 1), t)[:, :j] + 1e-9)
    mask = (rng.random((t, j)) < 0.8) & (rng.random((t, 1)) < 0.6)
    arrays = [a.astype(np.float32) for a in (hidden, head)] + [ids, logprobs.astype(np.float32), mask]
    own = jax.jit(jax.value_and_grad(lambda hidden, *rest: top_k_cross_entropy(hidden, *rest, tail)))
    value, gradient = own(*map(jnp.asarray, arrays))
    with jax.enable_x64(True):
        wide = [jnp.asarray(a, jnp.float64 if a.dtype == np.float32 else None) for a in arrays]
        exact, exact_gradient = jax.value_and_grad(functools.partial(_dense_loss, tail=tail))(*wide)
        errors = [_error(value / exact, 1.0), _error(gradient, exact_gradient)]
    return _verdict(max(errors), MOST["float32"])


def _dense_loss(hidden: Any, head: Any, ids: Any, logprobs: Any, mask: Any, *, tail: Tail) -> Any:
    """The loss by its definition, over the whole vocabulary."""
    student_tv = jax.nn.log_softmax(hidden @ head.T)
    teacher_tj = jnp.where(mask, jnp.exp(logprobs), 0)
    loss = -jnp.sum(teacher_tj * jnp.take_along_axis(student_tv, ids, axis=-1))
    if tail == "bucket":
        rows = jnp.arange(len(ids))[:, None]
        named_tv = jnp.zeros(student_tv.shape, bool).at[rows, ids].max(mask)
        rest_t = jax.nn.logsumexp(jnp.where(named_tv, -jnp.inf, student_tv), axis=-1)
        loss -= jnp.sum(jnp.where(mask.any(-1), (1 - teacher_tj.sum(-1)) * rest_t, 0))
    return loss


def against_the_cpu(options: Options, process: subprocess.Popen[bytes], path: Path) -> Iterator[Check]:
    @functools.cache
    def both() -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        found = outcomes(options)
        if process.wait():
            raise ChildProcessError(f"the CPU's side ended with {process.returncode}: its words are above")
        return found, dict(np.load(path))

    def close(name: str) -> Line:
        found, expected = (side[name] for side in both())
        return _verdict(_error(found, expected), 1e-5)

    def equal(name: str) -> Line:
        found, expected = (side[name] for side in both())
        different = np.flatnonzero(found != expected)
        where = f"first at token {different[0]} of {len(found)}" if len(different) else f"{len(found)} tokens"
        return {"where": where, "verdict": "WRONG" if len(different) else "right"}

    def by_seed() -> Line:
        found = both()[0]
        same = (found["sampled"] == found["sampled again"]).all()
        other = (found["sampled"] != found["sampled by another seed"]).any()
        return {"verdict": "right" if same and other else "WRONG"}

    for name in ("loss of a step", "keys after a step", "values after a step"):
        yield {"check": name, "of": "against the CPU", "dtype": "float32"}, functools.partial(close, name)
    for name in ("greedy", "greedy behind a cartridge", "sampled"):
        yield {"check": f"{name} answer", "of": "against the CPU", "dtype": "float32"}, functools.partial(equal, name)
    yield {"check": "sampling by its seed", "of": "three answers", "dtype": "float32"}, by_seed


class on_a_cpu:
    """Another process, in which `outcomes` are a CPU's; it is ended with the block."""

    def __init__(self, options: Options, path: Path):
        arguments = [f"--{name}={value}" for name, value in dataclasses.asdict(options).items() if value is not None]
        arguments = [a for a in arguments if not a.startswith("--tiny")] + ["--tiny"] * options.tiny
        program = str(Path(__file__).parents[1] / "accelerator.py")
        self._command = [sys.executable, program, f"--outcomes={path}", *arguments]

    def __enter__(self) -> subprocess.Popen[bytes]:
        self._process = subprocess.Popen(self._command, env=os.environ | {"JAX_PLATFORMS": "cpu"})
        return self._process

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()


def outcomes(options: Options) -> dict[str, np.ndarray]:
    """What has to be the same on every device, of this process's."""
    with jax.default_matmul_precision("highest"):
        return {**_one_step(options.tiny), **_answers(models.quickstart(options, "float32"))}


def _one_step(tiny: bool) -> dict[str, np.ndarray]:
    """Of plain gradient descent, which keeps the gradient's size; heads are of a size that the kernels take."""
    config = models.TINY if tiny else models.SMALL
    params = models.random_params(config, "float32")
    cartridge = models.random_cartridge(config, slots=24 if tiny else 300)
    batch = models.random_batch(config, rows=2, t=32 if tiny else 512)
    tx = optax.sgd(1.0)
    state = TrainState(cartridge.slots, tx.init(cartridge.slots), jnp.zeros((), jnp.int32))
    options: Any = {"tail": "bucket", "reduction": "token", "remat": "layers", "attention": models.own_kernel()}
    state, metrics = train_step(state, params, batch, cartridge.placement, config=config, tx=tx, **options)
    return {
        "loss of a step": np.asarray(metrics["loss"]),
        "keys after a step": np.asarray(state.cartridge.keys),
        "values after a step": np.asarray(state.cartridge.values),
    }


def _answers(model: LanguageModel) -> dict[str, np.ndarray]:
    text = " ".join(f"Box {i} of the station holds {7 * i} samples of ice." for i in range(60))
    cartridge = Cartridge.from_text(model, text, num_tokens=DOCUMENT_SLOTS)
    prompt = tuple(model.tokenizer.encode("How many samples does box 12 of the station hold? Box 12"))
    kernel = models.own_kernel()
    attention = kernel if kernel and model.config.head_dim in HEAD_SIZES[kernel] else None
    engine = Engine(model, 1, DOCUMENT_SLOTS + 256, max_top_logprobs=1, attention=attention)

    def answer(prefix: Prefix | None, temperature: float = 0.0, seed: int = SEED) -> np.ndarray:
        request = Request("x", prompt, prefix, ANSWER, temperature, seed=seed)
        return np.array([e.sampled.token for e in run(Scheduler(engine, 1), [request]) if isinstance(e, Token)])

    return {
        "greedy": answer(None),
        "greedy behind a cartridge": answer(Prefix("cartridge", cartridge.num_slots, cartridge)),
        "sampled": answer(None, 1.0),
        "sampled again": answer(None, 1.0),
        "sampled by another seed": answer(None, 1.0, SEED + 1),
    }
