"""A command's config: `--config=file.py --config.key=value` becomes a frozen dataclass, or a sentence on what is wrong.

The functions behind a command take dataclasses, so that nothing but this module and the configs knows `ml_collections`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import sys
import traceback
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from absl import flags
from ml_collections import config_dict, config_flags

from cartridges_jax.command_line import files
from cartridges_jax.command_line.addresses import without_credentials
from cartridges_jax.command_line.errors import UserError
from cartridges_jax.command_line.progress import printable

T = TypeVar("T")
_SETTABLE = (bool, int, float, str, tuple)  # the types of settings that the command line can give


class ConfigError(UserError):
    """A config that names an unknown key or holds a value of the wrong type."""


def load(argv: Sequence[str], kind: type | Mapping[str, type], default: str | None = None) -> config_dict.ConfigDict:
    """Reads `--config=PATH[:ARGUMENT]` and its `--config.key=value` overrides out of `argv` (program name excluded).

    Args:
      kind: the dataclass that `build` makes of the config, or of each of its groups, with the defaults of other keys.
      default: the config file that is read if `argv` names none.

    Raises:
      ConfigError: there is no such file, or it or an override cannot be read.
    """
    path, overrides = _split(argv, default)
    name, colon, argument = path.partition(":")
    file = files.find(name)
    if not file.is_file():
        shipped = ", ".join(f"configs/{found.name}" for found in sorted((files.PACKAGE / "configs").glob("*.py")))
        raise ConfigError(
            f"config file {name!r} is neither in the folder {Path.cwd()} nor in {files.PACKAGE}, which has {shipped}"
        )
    with _one_sentence(overrides, path):
        config = _parsed([f"--config={file}{colon}{argument}"], config_flags.DEFINE_config_file)[0]
    if not isinstance(config, config_dict.ConfigDict):
        raise ConfigError(f"get_config of {path!r} returns a {type(config).__name__}, expected a ConfigDict")
    for group, cls in kind.items() if isinstance(kind, Mapping) else [("", kind)]:
        _fill(config[group] if group else config, cls)
    with _one_sentence(overrides, path):
        config, rest = _parsed(overrides, config_flags.DEFINE_config_dict, config)
    if rest:
        raise ConfigError(f"unexpected argument {rest[0]!r}: every setting is written --config.KEY=VALUE")
    return config


def _parsed(arguments: Sequence[str], define: Callable[..., Any], default: Any = None) -> tuple[Any, list[str]]:
    """Returns the config and the arguments that belong to no key of it."""
    values, program = flags.FlagValues(), ["command", *arguments]
    define("config", default, flag_values=values, sys_argv=program)
    rest = values(program)[1:]
    return values["config"].value, rest


@contextlib.contextmanager
def _one_sentence(overrides: Sequence[str], path: str) -> Iterator[None]:
    """Turns every exception that reading a config may raise into a `ConfigError` of one sentence."""
    try:
        yield
    except (AttributeError, KeyError) as error:
        raise ConfigError(_unknown_key(overrides, path, error)) from error
    except flags.Error as error:
        text = str(error)
        if "Traceback" in text:  # the config file's own code failed, and the last line says what is wrong
            raise ConfigError(f"config file {path!r} cannot be read: {text.strip().splitlines()[-1]}") from error
        raise ConfigError(f"the command line cannot be read: {text}") from error
    except (SyntaxError, NameError, ImportError) as error:
        raise ConfigError(f"config file {path!r} cannot be read: {error}") from error
    except TypeError as error:
        raise ConfigError(f"a value of the wrong type: {error}") from error


def _fill(config: config_dict.ConfigDict, cls: type) -> None:
    """Adds the defaults of `cls` and of its groups, since the command line can only set keys that are there."""
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
    """Turns a config into the frozen dataclass `cls`, and its groups into the dataclasses of `cls`'s fields.

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
    """Runs a command. A mistake that its user can mend becomes one sentence and exit status 2, and Ctrl-C status 130.

    Any other exception is a bug and shows its traceback; with `--traceback` a user's mistake shows one, too.

    Args:
      renamed: the flags of earlier versions (`--config.KEY`, too), each with its new name, which answers the old one.
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


def _split(argv: Sequence[str], default: str | None) -> tuple[str, list[str]]:
    """Returns the file that `--config=PATH` or `--config PATH` names, and the arguments before and after it."""
    for i, argument in enumerate(argv):
        if argument.startswith("--config="):
            return argument.partition("=")[2], [*argv[:i], *argv[i + 1 :]]
        if argument == "--config" and i + 1 < len(argv):
            return argv[i + 1], [*argv[:i], *argv[i + 2 :]]
    if default is None or "--config" in argv:
        raise ConfigError("no config was given: pass --config=configs/NAME.py")
    return default, list(argv)


def _convert(hint: Any, value: Any, where: str) -> Any:
    """Returns the value as the type `hint` has it; `where` is its path in the config, for a complaint."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        inner = [a for a in args if a is not type(None)]
        for option in inner[:-1]:
            with contextlib.suppress(ConfigError):
                return _convert(option, value, where)
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


def _suggest(key: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(key, list(known), n=1)
    return f": did you mean {near[0]!r}?" if near else f": known keys are {', '.join(sorted(known))}"


def _unknown_key(overrides: Sequence[str], path: str, error: Exception) -> str:
    keys = [a.partition("=")[0].removeprefix("--config.") for a in overrides if a.startswith("--config.")]
    while error.args and isinstance(error.args[0], Exception):
        error = error.args[0]
    # The text of a KeyError is its argument; `str` would give that in quotes.
    detail = " ".join(str(error.args[0]).split()) if error.args else type(error).__name__
    return f"{path} has no key that fits {', '.join(keys) or 'its own code'} ({detail})"
