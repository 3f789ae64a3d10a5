"""The product against its definition in float64, and on a CPU the kernel behind it."""

from __future__ import annotations

import concurrent.futures
import functools
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from cartridges_jax.command_line.errors import UserError
from cartridges_jax.kernels import gathered_matmul as module
from cartridges_jax.kernels.gathered_matmul import cpu, gathered_matmul, interface
from cartridges_jax.kernels.gathered_matmul.kernel import Kernel

# left matrices, products, x, d, y, right matrices: queries by pages, activations by panels for one token and many, rows
# that are divided among cores with a rest, vectors that are shorter than the machine's, nothing at all
SHAPES = [
    (5, 7, 3, 64, 128, 9),
    (3, 6, 3, 128, 64, 4),
    (1, 36, 1, 576, 16, 36),
    (1, 36, 16, 576, 16, 36),
    (1, 6, 61, 96, 16, 6),
    (4, 12, 300, 65, 40, 9),
    (1, 5, 2, 48, 4, 5),
    (2, 1, 1, 1, 8, 2),
    (2, 0, 4, 4, 4, 2),
]
rng = np.random.default_rng(0)
run = jax.jit(gathered_matmul, static_argnames="side_by_side")


def lists(i: int, n: int, x: int, d: int, y: int, j: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    left, right = rng.standard_normal((i, x, d)), rng.standard_normal((j, d, y))
    places = rng.integers(i, size=n), rng.integers(j, size=n)
    return left.astype(np.float32), places[0].astype(np.int32), right.astype(np.float32), places[1].astype(np.int32)


def definition(left: jax.Array, left_index: np.ndarray, right: jax.Array, right_index: np.ndarray) -> np.ndarray:
    products = np.asarray(left, np.float64)[left_index] @ np.asarray(right, np.float64)[right_index]
    return products * (right_index >= 0)[:, None, None]


@pytest.mark.parametrize("dtypes", [("float32", "float32"), ("float32", "bfloat16"), ("bfloat16", "bfloat16")])
@pytest.mark.parametrize("side_by_side", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_each_product_is_that_of_its_two_matrices(
    shape: tuple[int, ...], side_by_side: bool, dtypes: tuple[str, str]
) -> None:
    left, left_index, right, right_index = lists(*shape)
    left, right = jnp.asarray(left, dtypes[0]), jnp.asarray(right, dtypes[1])
    right_index[1::3] = -1
    expected = definition(left, left_index, right, right_index)
    if side_by_side:
        expected = expected.swapaxes(0, 1).reshape(left.shape[1], -1)
    found = run(left, left_index, right, right_index, side_by_side=side_by_side)
    assert_allclose(found, expected, rtol=0, atol=2e-6 * shape[3])


@pytest.mark.parametrize("side_by_side", [False, True])
def test_the_kernel_and_xla_agree(side_by_side: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = lists(4, 9, 6, 32, 16, 5)
    arguments[3][4] = -1
    kernels = run(*arguments, side_by_side=side_by_side)
    assert "custom_call" in run.lower(*arguments, side_by_side=side_by_side).as_text()
    monkeypatch.setattr(module, "has_kernel", lambda platform: False)
    xla = jax.jit(functools.partial(gathered_matmul, side_by_side=side_by_side))
    assert "custom_call" not in xla.lower(*arguments).as_text()
    assert_allclose(xla(*arguments), kernels, rtol=0, atol=1e-5)


def test_a_dtype_or_a_width_that_the_kernel_does_not_have_is_xlas() -> None:
    left, left_index, right, right_index = given = lists(2, 3, 4, 8, 6, 2)
    assert_allclose(run(*given), definition(*given), atol=1e-5)
    halves = left.astype(np.float16), left_index, right[..., :4].astype(np.float16), right_index
    assert_allclose(run(*halves), definition(*halves), atol=1e-2)


def with_header(change: Callable[[str], str], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the header of another XLA the installed one, and forgets which kernels this one has taken."""
    header = Path(jax.ffi.include_dir()) / "xla" / "ffi" / "api" / "c_api.h"
    copy = folder / "xla" / "ffi" / "api" / "c_api.h"
    copy.parent.mkdir(parents=True)
    copy.write_text(change(header.read_text()))
    monkeypatch.setattr(jax.ffi, "include_dir", lambda: str(folder))
    for name in ("_register", "_try_smallest"):
        monkeypatch.setattr(cpu, name, functools.cache(getattr(cpu, name).__wrapped__))


def test_the_installed_header_is_known_and_every_struct_is_read_from_it() -> None:
    interface.read_interface()
    structs = interface._expected_structs()
    assert {"CallFrame", "Args", "Buffer", "Api", "Metadata", "ThreadPool_Schedule_Args"} <= structs.keys()
    assert structs["CallFrame"][:3] == [("struct_size", "i64"), ("extension_start", "ptr"), ("api", "ptr")]


@pytest.mark.parametrize("name", sorted(interface._expected_structs()))
def test_a_struct_with_another_field_is_noticed(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_header(
        lambda text: text.replace(f"struct XLA_FFI_{name} {{", f"struct XLA_FFI_{name} {{\n  int64_t new;"),
        tmp_path,
        monkeypatch,
    )
    with pytest.raises(interface.UnknownInterfaceError, match=rf"its struct XLA_FFI_{name} is .*'new'"):
        interface.read_interface()


OTHER_XLAS = {
    "of another major version": ("XLA_FFI_API_MAJOR 0", "XLA_FFI_API_MAJOR 1", "its interface has version"),
    "which XLA refuses": (
        "XLA_FFI_API_MINOR ",
        "XLA_FFI_API_MINOR 9",
        "is incompatible with the framework's API version",
    ),
    "with another struct": ("  XLA_FFI_Args args;", "  XLA_FFI_Args* args;", "its struct XLA_FFI_CallFrame"),
    "without a function": (
        "FIELD(XLA_FFI_ThreadPool_Schedule)",
        "FIELD(XLA_FFI_New)",
        "one that the kernel calls is missing",
    ),
}


@pytest.mark.parametrize("kind", OTHER_XLAS)
def test_an_xla_that_does_not_fit_multiplies_itself_and_one_warning_says_why(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    before, after, reason = OTHER_XLAS[kind]
    arguments = lists(4, 9, 6, 32, 16, 5)
    kernels = run(*arguments)
    with_header(lambda text: text.replace(before, after), tmp_path, monkeypatch)
    for _ in range(2):
        xla = jax.jit(functools.partial(gathered_matmul))
        assert "custom_call" not in xla.lower(*arguments).as_text()
        assert_allclose(xla(*arguments), kernels, rtol=0, atol=1e-5)
    (record,) = caplog.records
    assert record.levelname == "WARNING" and reason in record.message


def test_an_xla_without_its_header_multiplies_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_header(str, tmp_path, monkeypatch)
    monkeypatch.setattr(jax.ffi, "include_dir", lambda: str(tmp_path / "none"))
    assert not module.has_kernel("cpu")


def test_calls_of_several_threads_do_not_meet() -> None:
    """Each call has a list of items of its own, also while XLA's threads still help with another."""
    calls = [lists(3, 24, 4, 64, 32, 5) for _ in range(4)]
    alone = [run(*arguments) for arguments in calls]
    with concurrent.futures.ThreadPoolExecutor(4) as threads:
        together = list(threads.map(lambda i: run(*calls[i % 4]), range(400)))
    for i, found in enumerate(together):
        assert_array_equal(found, alone[i % 4])


def test_one_program_has_calls_of_any_length() -> None:
    """The kernel is compiled for matrices, not for how many there are."""
    left, _, right, _ = lists(3, 1, 2, 16, 16, 7)
    for n in (1, 2, 50):
        left_index, right_index = (rng.integers(size, size=n).astype(np.int32) for size in (3, 7))
        expected = definition(left, left_index, right, right_index)
        assert_allclose(run(left, left_index, right, right_index), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("lanes", "registers"), [(16, 32), (8, 16), (4, 32)])
@pytest.mark.parametrize("shape", [s for s in SHAPES if s[1]], ids=str)
def test_a_tile_fits_the_machine(shape: tuple[int, ...], lanes: int, registers: int) -> None:
    """Sums, the columns that meet them and one row's number are held at once; columns are divided without a rest."""
    _, _, x, d, y, _ = shape
    kernel = Kernel(x, d, y, "float32", "float32", False, lanes, registers)
    rows, vectors = kernel.tile
    assert rows * vectors + vectors + 1 < registers
    assert y % (vectors * kernel.width) == 0
    assert kernel.block_rows % rows == 0


def test_an_error_of_shapes_is_raised() -> None:
    left, left_index, right, right_index = lists(2, 3, 4, 8, 8, 2)
    with pytest.raises(UserError, match=r"left matrices .* do not belong together"):
        run(left[:, :, :6], left_index, right, right_index)
