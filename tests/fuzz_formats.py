"""Coverage-guided fuzzing of the readers by atheris: `make fuzz`.

Every input is read as a `.pt` file, as the pickle inside one, and as the tensor file of an adapter. Anything but a
ValueError of one sentence is a find; atheris leaves the input in a file `crash-…`. It starts from the golden files.
"""

from __future__ import annotations

import sys
import tempfile
import zipfile
from pathlib import Path

import atheris
import make_golden_formats as golden

with atheris.instrument_imports(include=["cartridges_jax.interop", "synth.inert_pickle", "zipfile", "pickletools"]):
    from cartridges_jax.interop import peft, upstream

FOLDER = Path(tempfile.mkdtemp(prefix="fuzz-"))
CONFIG = golden.FORMATS / "cartridge" / peft.CONFIG


def one_input(data: bytes) -> None:
    (FOLDER / "whole.pt").write_bytes(data)
    (FOLDER / peft.TENSORS).write_bytes(data)
    with zipfile.ZipFile(FOLDER / "program.pt", "w") as archive:
        for name, content in (("data.pkl", data), ("data/0", bytes(1024))):
            archive.writestr(f"archive/{name}", content)
    for read, path in ((upstream.read, "whole.pt"), (upstream.read, "program.pt"), (peft.read, peft.CONFIG)):
        try:
            read(FOLDER / path)
        except ValueError as error:
            assert "\n" not in str(error), error


def main() -> None:
    corpus = FOLDER / "corpus"
    corpus.mkdir()
    for path in golden.FORMATS.rglob("*"):
        if path.suffix in (".pt", ".safetensors"):
            (corpus / path.name).write_bytes(path.read_bytes())
    for path in sorted(corpus.glob("*.pt")):
        with zipfile.ZipFile(path) as archive:
            (corpus / f"{path.stem}.pkl").write_bytes(archive.read(f"{path.stem}/data.pkl"))
    (FOLDER / peft.CONFIG).write_bytes(CONFIG.read_bytes())
    atheris.Setup([sys.argv[0], str(corpus), *sys.argv[1:]], one_input)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
