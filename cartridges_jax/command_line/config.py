"""From `--config=file.py --config.key=value` to a frozen dataclass, or one sentence that says what is wrong.

A command's main function takes dataclasses only; `ml_collections` stays at this edge (docs/style: "run config").
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import sys
import traceback
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from absl import flags
from ml_collections import config_dict, config_flags

from cartridges_jax.command_line import files
from cartridges_jax.command_line.addresses import without_credentials
from cartridges_jax.command_line.errors import UserError
from cartridges_jax.command_line.progress import printable

T = TypeVar("T")
_SETTABLE = (bool, int, float, str, tuple)  # what a setting on the command line can be


class ConfigError(UserError):
    """A config that names an unknown key or holds a value of the wrong type."""


def load(argv: Sequence[str], kind: type | Mapping[str, type], default: str | None = None) -> config_dict.ConfigDict:
    """Reads `--config=PATH[:ARGUMENT]` and its `--config.key=value` overrides out of `argv` (program name excluded).

    Args:
      kind: the dataclass that `build` makes of it, or those of its groups: what the file leaves out has their defaults.
      default: the config file if none is given.
    """
    arguments = list(argv)
    if not any(a == "--config" or a.startswith("--config=") for a in arguments):
        if default is None:
            raise ConfigError("no config was given: pass --config=configs/NAME.py")
        arguments.insert(0, f"--config={default}")
    path, overrides = _split(arguments)
    name, colon, argument = path.partition(":")
    file = files.find(name)
    if not file.is_file():
        shipped = ", ".join(f"configs/{found.name}" for found in sorted((files.PACKAGE / "configs").glob("*.py")))
        raise ConfigError(
            f"config file {name!r} is neither in the folder {Path.cwd()} nor in {files.PACKAGE}, which has {shipped}"
        )
    with _one_sentence(arguments, path):
        config = _parsed([f"--config={file}{colon}{argument}"], config_flags.DEFINE_config_file)[0]
    if not isinstance(config, config_dict.ConfigDict):
        raise ConfigError(f"get_config of {path!r} returns a {type(config).__name__}, expected a ConfigDict")
    for group, cls in kind.items() if isinstance(kind, Mapping) else [("", kind)]:
        _fill(config[group] if group else config, cls)
    with _one_sentence(arguments, path):
        config, rest = _parsed(overrides, config_flags.DEFINE_config_dict, config)
    if rest:
        raise ConfigError(f"unexpected argument {rest[0]!r}: every setting is written --config.KEY=VALUE")
    return config


def _parsed(arguments: Sequence[str], define: Callable[..., Any], default: Any = None) -> tuple[Any, list[str]]:
    """The config, and what is left of the arguments."""
    values, program = flags.FlagValues(), ["command", *arguments]
    define("config", default, flag_values=values, sys_argv=program)
    rest = values(program)[1:]
    return values["config"].value, rest


@contextlib.contextmanager
def _one_sentence(arguments: Sequence[str], path: str) -> Iterator[None]:
    try:
        yield
    except (AttributeError, KeyError) as error:
        raise ConfigError(_unknown_key(arguments, path, error)) from error
    except flags.Error as error:
        text = str(error)
        if "Traceback" in text:  # of the config file's own code; its last line says what is wrong
            raise ConfigError(f"config file {path!r} cannot be read: {text.strip().splitlines()[-1]}") from error
        raise ConfigError(f"the command line cannot be read: {text}") from error
    except (SyntaxError, NameError, ImportError) as error:
        raise ConfigError(f"config file {path!r} cannot be read: {error}") from error
    except TypeError as error:
        raise ConfigError(f"a value of the wrong type: {error}") from error


def _fill(config: config_dict.ConfigDict, cls: type) -> None:
    """Adds the defaults of `cls`, groups included: the command line can only set what is there."""
    with config.unlocked():
        for field in dataclasses.fields(typing.cast(Any, cls)):
            hint = typing.get_type_hints(cls)[field.name]
            value = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
            if field.name in config:
                value = config[field.name]
            elif dataclasses.is_dataclass(value):
                value = config[field.name] = config_dict.ConfigDict()
            elif isinstance(value, _SETTABLE):
                config[field.name] = value
            elif value is None:
                options = [option for option in typing.get_args(hint) if option is not type(None)]
                if len(options) == 1 and options[0] in _SETTABLE:
                    config[field.name] = config_dict.placeholder(options[0])
            if isinstance(value, config_dict.ConfigDict):
                for group in filter(dataclasses.is_dataclass, (hint, *typing.get_args(hint))):
                    _fill(value, typing.cast(type, group))


def build(cls: type[T], config: config_dict.ConfigDict | dict[str, Any], where: str = "config") -> T:
    """Turns a config into the frozen dataclass `cls`, nested ones included.

    Raises:
      ConfigError: an unknown or missing key, or a value of the wrong type; the sentence names its full path.
    """
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(typing.cast(Any, cls))}
    for key in config:
        if key not in fields:
            raise ConfigError(f"unknown key {where}.{key}{_suggest(key, fields)}")
    kwargs = {}
    for name, field in fields.items():
        if name in config:
            kwargs[name] = _convert(hints[name], config[name], f"{where}.{name}")
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise ConfigError(f"{where}.{name} is missing")
    return cls(**kwargs)


def run(main: Callable[[list[str]], int | None], renamed: Mapping[str, str] = types.MappingProxyType({})) -> None:
    """Runs a command: a mistake that a user can mend becomes one sentence on stderr and exit status 2, Ctrl-C 130.

    Any other exception is a bug and shows its traceback; `--traceback` shows one for a user's mistake, too.

    Args:
      renamed: flags of earlier versions, `--config.KEY` included, and their names today: an old one is refused.
    """
    arguments = [argument for argument in sys.argv[1:] if argument != "--traceback"]
    shown = len(arguments) < len(sys.argv[1:])
    try:
        for flag in (argument.partition("=")[0] for argument in arguments):
            if flag in renamed:
                raise UserError(f"{flag} has a new name: write {renamed[flag]}")
        sys.exit(main(arguments))
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        sys.exit(130)
    except (UserError, OSError) as error:
        if shown:
            traceback.print_exception(error)
        sentence = printable(without_credentials(" ".join(str(error).split()))) or type(error).__name__
        print(f"error: {sentence}", file=sys.stderr)
        sys.exit(2)


def _split(arguments: Sequence[str]) -> tuple[str, list[str]]:
    """The file that `--config=PATH` or `--config PATH` names, and the arguments before and after it."""
    for i, argument in enumerate(arguments):
        if argument.startswith("--config="):
            return argument.partition("=")[2], [*arguments[:i], *arguments[i + 1 :]]
        if argument == "--config" and i + 1 < len(arguments):
            return arguments[i + 1], [*arguments[:i], *arguments[i + 2 :]]
    raise ConfigError("--config names no file: pass --config=configs/NAME.py")


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        inner = [a for a in args if a is not type(None)]
        for option in inner[:-1]:
            try:
                return _convert(option, value, where)
            except ConfigError:
                continue
        return _convert(inner[-1], value, where)
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, (dict, config_dict.ConfigDict)):
            raise ConfigError(f"{where} is {value!r}, expected a group of keys")
        return build(typing.cast(type, hint), value, where)
    if origin is typing.Literal:
        if value not in args:
            raise ConfigError(f"{where} is {value!r}, expected one of {', '.join(map(repr, args))}")
        return value
    if origin in (tuple, list, Sequence):
        if not isinstance(value, (list, tuple)):
            raise ConfigError(f"{where} is {value!r}, expected a list")
        return tuple(_convert(args[0], v, f"{where}[{i}]") for i, v in enumerate(value))
    if hint is float and type(value) is int:
        return float(value)
    if hint is Any or type(value) is hint:
        return value
    expected = getattr(hint, "__name__", str(hint))
    raise ConfigError(f"{where} is {value!r} ({type(value).__name__}), expected {expected}")


def _suggest(key: str, known: typing.Iterable[str]) -> str:
    near = difflib.get_close_matches(key, list(known), n=1)
    return f": did you mean {near[0]!r}?" if near else f": known keys are {', '.join(sorted(known))}"


def _unknown_key(arguments: Sequence[str], path: str, error: Exception) -> str:
    keys = [a.partition("=")[0].removeprefix("--config.") for a in arguments if a.startswith("--config.")]
    while error.args and isinstance(error.args[0], Exception):
        error = error.args[0]
    # `str` of a KeyError is the repr of its text
    detail = " ".join(str(error.args[0]).split()) if error.args else type(error).__name__
    return f"{path} has no key that fits {', '.join(keys) or 'its own code'} ({detail})"
