"""Whether the installed XLA calls custom functions in the way that `handler.ll` was written for.

jaxlib ships the C header of the library that it holds. The layout of every struct that the handler uses is compared
with that header before anything native runs; XLA itself then compares versions when the handler is registered.
"""

from __future__ import annotations

import re
from pathlib import Path

import jax

API_MAJOR = 0  # XLA raises it when functions written for the earlier number no longer work
HANDLER = Path(__file__).with_name("handler.ll")
Struct = list[tuple[str, str]]  # the name of each field, and its type in LLVM's language


class UnknownInterfaceError(Exception):
    """XLA calls custom functions in a way that `handler.ll` does not know."""


def read_interface() -> dict[str, int]:
    """Gives the values for `handler.ll` that depend on the installed XLA.

    They are its version (`major`, `minor`), which the handler tells XLA when it is registered, and where in XLA's
    table of functions those stand that the handler calls (`destroy`, `schedule`).

    Raises:
      UnknownInterfaceError: there is no header, or it has another major version, another struct or no such function.
    """
    path = Path(jax.ffi.include_dir()) / "xla" / "ffi" / "api" / "c_api.h"
    if not path.is_file():
        raise UnknownInterfaceError(f"{path} does not exist")
    header = path.read_text(encoding="utf-8")
    version = dict(re.findall(r"#define XLA_FFI_API_(MAJOR|MINOR) (\d+)", header))
    if version.get("MAJOR") != str(API_MAJOR) or "MINOR" not in version:
        raise UnknownInterfaceError(f"its interface has version {version}, expected major version {API_MAJOR}")
    declared = _declared_structs(header)
    for name, expected in _expected_structs().items():
        if declared.get(name) != expected:
            raise UnknownInterfaceError(f"its struct XLA_FFI_{name} is {declared.get(name)}, expected {expected}")
    functions = re.findall(r"_XLA_FFI_API_STRUCT_FIELD\(XLA_FFI_(\w+)\)", header)
    if not {"Error_Destroy", "ThreadPool_Schedule"} <= set(functions):
        raise UnknownInterfaceError(f"its functions are {', '.join(functions)}: one that the kernel calls is missing")
    places = {"destroy": functions.index("Error_Destroy"), "schedule": functions.index("ThreadPool_Schedule")}
    return places | {"major": API_MAJOR, "minor": int(version["MINOR"])}


def _expected_structs() -> dict[str, Struct]:
    """Reads handler.ll's structs, behind whose types the names of the fields stand."""
    text = HANDLER.read_text(encoding="utf-8")
    found = re.findall(r"^%(\w+) = type \{ (.*) \} ; (.*)$", text, re.MULTILINE)
    return {name: list(zip(fields.split(), types.split(", "), strict=True)) for name, types, fields in found}


def _declared_structs(header: str) -> dict[str, Struct]:
    """Reads the header's structs. A type that is not known keeps its name in C and so equals no type of LLVM's."""
    code = re.sub("//.*", "", header)
    bodies = dict(re.findall(r"struct XLA_FFI_(\w+) \{(.*?)\n\}", code, re.DOTALL))
    types = {"size_t": "i64", "int64_t": "i64", "int": "i32", "uint32_t": "i32"}
    types |= {f"XLA_FFI_{name}": f"%{name}" for name in bodies}
    types |= dict.fromkeys(re.findall(r"typedef enum \{[^}]*\} (\w+);", code), "i32")
    types |= {alias: types.get(name, name) for name, alias in re.findall(r"typedef (\w+) (\w+);", code)}

    def struct(body: str) -> Struct:
        fields = re.findall(r"(\S.*?)\s*\b(\w+);", body)
        return [(field, "ptr" if "*" in c_type else types.get(c_type, c_type)) for c_type, field in fields]

    return {name: struct(body) for name, body in bodies.items()}
