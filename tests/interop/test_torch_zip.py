"""Files of torch's that are damaged or hostile: a sentence, whatever they hold; nothing run, nothing allocated."""

from __future__ import annotations

import io
import pickle
import resource
import struct
import subprocess
import sys
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from make_golden_formats import FORMATS as GOLDEN

from cartridges_jax.command_line.errors import UserError
from cartridges_jax.interop import torch_zip
from cartridges_jax.interop.formats import read
from cartridges_jax.interop.torch_zip import _global, _integer, _integers, _text

REAL = (GOLDEN / "cache-step512.pt").read_bytes()


def program_of(content: bytes) -> bytes:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return archive.read(next(name for name in archive.namelist() if name.endswith("data.pkl")))


PROGRAM = program_of(REAL)


def torch_file(path: Path, program: bytes, data: bytes = bytes(64), **records: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in {"data.pkl": program, "byteorder": b"little", "data/0": data, **records}.items():
            archive.writestr(f"archive/{name}", content)
    return path


def tensor(
    shape: tuple[int, ...], strides: tuple[int, ...], offset: int = 0, kind: str = "torch.FloatStorage", key: str = "0"
) -> bytes:
    storage = _text("storage") + _global(kind) + _text(key) + _text("cpu") + _integer(16)
    arguments = b"(" + storage + b"tQ" + _integer(offset) + _integers(shape) + _integers(strides)
    return _global(torch_zip.TENSOR) + b"(" + arguments + b"\x89" + _global(torch_zip.ORDERED_DICT) + b")RtR"


def tree(*items: bytes) -> bytes:
    return b"\x80\x02}" + _text("x") + b"](" + b"".join(items) + b"es."


class Runs:
    def __reduce__(self) -> Any:
        return Path.touch, (Path("was-run"),)


def refused(path: Path, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence) as caught:
        torch_zip.load(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_tensor_may_be_a_view(tmp_path: Path):
    data = np.arange(16, dtype=np.float32)
    path = torch_file(tmp_path / "f", tree(tensor((2, 3), (1, 4), 5), tensor((0, 3), (3, 1), 16)), data.tobytes())
    found, _ = torch_zip.load(path)
    np.testing.assert_array_equal(found["x"][0], data[5:].reshape(-1)[[[0, 4, 8], [1, 5, 9]]])
    assert found["x"][1].shape == (0, 3)


@pytest.mark.parametrize("protocol", range(6))
def test_a_pickle_that_calls_something_is_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, protocol: int
) -> None:
    monkeypatch.chdir(tmp_path)
    refused(torch_file(tmp_path / "f", pickle.dumps({"trainable_keys": Runs()}, protocol)), "is refused: ")
    assert not (tmp_path / "was-run").exists()


@pytest.mark.parametrize(
    "name", ["os.system", "builtins.eval", "torch.hub.load", "torch._utils._rebuild_tensor", "torch.LongStorage"]
)
def test_a_foreign_global_is_named(tmp_path: Path, name: str):
    refused(
        torch_file(tmp_path / "f", b"\x80\x02" + _global(name) + b"."), f"it names '{name}', which no cartridge needs"
    )


@pytest.mark.parametrize(
    ("item", "sentence"),
    [
        (tensor((1 << 40,), (1,)), "more elements than the file has bytes for"),
        (tensor((1 << 20, 1 << 20, 1 << 20), (0, 0, 0)), "more elements than the file has bytes for"),
        (tensor((200, 100), (0, 0)), "more elements than the file has bytes for"),
        (tensor((100,), (0,)) * 100, "more elements than the file has bytes for"),
        (tensor((17,), (1,)), "is not a whole file"),
        (tensor((16,), (1,), 1), "is not a whole file"),
        (tensor((2,), (1 << 40,)), "is not a whole file"),
        (tensor((1,) * 9, (1,) * 9), "a tensor's shape is no shape"),
        (tensor((-1, -16), (1, 1)), "a tensor's shape is no shape"),
        (tensor((2,), (-1,), 8), "a tensor's shape is no shape"),
        (tensor((2,), (1,), key="1"), "is not a whole file"),
        (tensor((2,), (1,), key="../../../etc/passwd"), "is not a whole file"),
        (tensor((2,), (1,), kind=torch_zip.TENSOR), "another storage than floating-point numbers"),
    ],
)
def test_a_tensor_lies_in_the_file(tmp_path: Path, item: bytes, sentence: str):
    tracemalloc.start()
    refused(torch_file(tmp_path / "f", tree(item)), sentence)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


def test_a_zip_bomb_is_not_unpacked(tmp_path: Path):
    with zipfile.ZipFile(tmp_path / "f", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", tree(tensor((16,), (1,))))
        archive.writestr("archive/data/0", bytes(50 << 20))
    assert (tmp_path / "f").stat().st_size < 1 << 20
    refused(tmp_path / "f", "its record 'data.pkl' is compressed, which torch.save never does")


def test_records_that_overlap_or_claim_more_than_the_file_are_refused(tmp_path: Path):
    """Two entries of the directory for one record's bytes, and one whose length is a lie."""
    whole = torch_file(tmp_path / "f", tree(tensor((2,), (1,)), tensor((2,), (1,), key="1")), bytes(4096)).read_bytes()
    start = whole.rindex(b"PK\x01\x02", 0, whole.rindex(b"archive/data/0"))
    end = whole.rindex(b"PK\x05\x06")
    twin = whole[start:end].replace(b"archive/data/0", b"archive/data/1")
    count, size, place = struct.unpack("<HII", whole[end + 10 : end + 20])
    tail = struct.pack("<HHII", count + 1, count + 1, size + len(twin), place) + bytes(2)
    (tmp_path / "f").write_bytes(whole[:end] + twin + whole[end : end + 8] + tail)
    refused(tmp_path / "f", "is not a whole file|more than the file has")
    lie = struct.pack("<II", 1 << 31, 1 << 31)
    (tmp_path / "f").write_bytes(whole[: start + 20] + lie + whole[start + 28 :])
    refused(tmp_path / "f", "claims 2147483648 bytes, more than the file has")


def test_a_long_pickle_and_other_oddities_are_refused(tmp_path: Path):
    refused(torch_file(tmp_path / "f", bytes(5 << 20)), "its pickle has 5242880 bytes, expected a few thousand")
    refused(torch_file(tmp_path / "f", tree(), byteorder=b"big"), "its numbers are big-endian")
    with pytest.raises(UserError, match="it has no trainable_keys"):
        read(torch_file(tmp_path / "f", b"\x80\x02" + b"(" * 100000 + b"t" * 100000 + b"."))  # a very deep tuple
    refused(torch_file(tmp_path / "f", b"\x80\x02r\xff\xff\xff\xffN."), "is not a whole file")
    storage = _text("storage") + _global("torch.FloatStorage") + b")" + b"\x85" * 10**6 + _text("cpu") + _integer(16)
    refused(torch_file(tmp_path / "f", b"\x80\x02(" + storage + b"tQ."), "a storage's name is no text")
    with zipfile.ZipFile(tmp_path / "f", "w") as archive:
        archive.writestr("a/data.pkl", b"")
        archive.writestr("b/data.pkl", b"")
    refused(tmp_path / "f", "it has 2 data.pkl, expected one")


def test_a_file_from_before_the_zip_format_is_no_zip(tmp_path: Path):
    (tmp_path / "f").write_bytes(pickle.dumps(0x1950A86A20F9469CFC6C, 2))
    refused(tmp_path / "f", "is not a whole file of torch's zip format")


def read_or_refuse(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    try:
        read(path)
    except ValueError as error:
        assert "\n" not in str(error)


FUZZ = settings(max_examples=120, deadline=None)


@FUZZ
@given(program=st.binary(max_size=60) | st.lists(st.sampled_from(list(PROGRAM)), max_size=80).map(bytes))
def test_any_pickle_gives_a_sentence(tmp_path_factory: pytest.TempPathFactory, program: bytes):
    path = torch_file(tmp_path_factory.getbasetemp() / "program.pt", b"\x80\x02" + program + b".")
    read_or_refuse(path, path.read_bytes())


@FUZZ
@given(st.integers(0, len(PROGRAM) - 1), st.integers(0, 255), st.integers(0, 3))
def test_a_real_pickle_with_a_changed_byte_gives_a_sentence(
    tmp_path_factory: pytest.TempPathFactory, place: int, byte: int, dropped: int
):
    program = PROGRAM[:place] + bytes([byte]) + PROGRAM[place + dropped :]
    with zipfile.ZipFile(io.BytesIO(REAL)) as archive:
        data = {f"data/{key}": archive.read(f"cache-step512/data/{key}") for key in "01"}
    path = torch_file(tmp_path_factory.getbasetemp() / "changed.pt", program, **{"data/0": b"", **data})
    read_or_refuse(path, path.read_bytes())


@FUZZ
@given(st.integers(0, len(REAL) - 1), st.binary(max_size=12), st.integers(0, 40))
def test_a_real_file_with_changed_bytes_gives_a_sentence(
    tmp_path_factory: pytest.TempPathFactory, place: int, put: bytes, dropped: int
):
    path = tmp_path_factory.getbasetemp() / "damaged.pt"
    read_or_refuse(path, REAL[:place] + put + REAL[place + dropped :])


@FUZZ
@given(st.sampled_from(["adapter_config.json", "adapter_model.safetensors"]), st.data())
def test_a_damaged_adapter_gives_a_sentence(tmp_path_factory: pytest.TempPathFactory, name: str, data: st.DataObject):
    folder = tmp_path_factory.getbasetemp() / "adapter"
    folder.mkdir(exist_ok=True)
    for path in (GOLDEN / "cartridge").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    content = (folder / name).read_bytes()
    place = data.draw(st.integers(0, len(content) - 1))
    put, dropped = data.draw(st.binary(max_size=12)), data.draw(st.integers(0, 40))
    (folder / name).write_bytes(content[:place] + put + content[place + dropped :])
    try:
        read(folder)
    except ValueError as error:
        assert "\n" not in str(error)


def test_a_claim_of_gigabytes_needs_no_memory(tmp_path: Path):
    """Read in a process whose address space is limited to what it needs anyway and little more."""
    items = tensor((1 << 31,), (0,)) + tensor((1 << 40, 1), (1, 1))
    path = torch_file(tmp_path / "f", tree(items))
    code = (
        "import resource, sys\nfrom pathlib import Path\nfrom cartridges_jax.interop import torch_zip\n"
        "used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20),) * 2)\n"
        "try: torch_zip.load(Path(sys.argv[1]))\nexcept ValueError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "more elements than the file has bytes for" in done.stdout
    assert resource.getrlimit(resource.RLIMIT_AS)[0] == resource.RLIM_INFINITY
