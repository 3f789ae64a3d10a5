"""All commands share configs, errors of one sentence, files that are whole or absent, and progress."""

from __future__ import annotations

import ast
import dataclasses
import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax.numpy as jnp
import pytest
from ml_collections import ConfigDict

from cartridges_jax.command_line import files, progress
from cartridges_jax.command_line.config import ConfigError, build, load, run
from cartridges_jax.command_line.errors import MissingPackage, UserError
from cartridges_jax.command_line.progress import Progress, stage

ROOT = Path(__file__).parent.parent
# ml_collections loads a config file by a method that importlib is going to remove.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")

FILE = """
from ml_collections import ConfigDict, config_dict


def get_config():
    config = ConfigDict({"name": "run", "steps": 3, "limit": config_dict.placeholder(int), "optim": {"lr": 0.1}})
    return config
"""


@dataclasses.dataclass(frozen=True)
class Optim:
    lr: float = 0.5
    kind: Literal["cosine", "linear"] = "cosine"


@dataclasses.dataclass(frozen=True)
class Settings:
    name: str
    steps: int = 1
    limit: int | None = None
    on: bool = False
    words: tuple[str, ...] = ()
    optim: Optim = dataclasses.field(default_factory=Optim)
    other: Optim = dataclasses.field(default_factory=Optim)
    rate: float | None = None


@pytest.fixture
def config(tmp_path: Path) -> str:
    (tmp_path / "config.py").write_text(FILE)
    return str(tmp_path / "config.py")


def settings(*arguments: str) -> Settings:
    return build(Settings, load(arguments, Settings))


def test_a_config_file_becomes_a_dataclass(config: str):
    assert settings(f"--config={config}") == Settings("run", 3, optim=Optim(0.1))


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("--config.optim.lr=1e-3", Settings("run", 3, optim=Optim(1e-3))),
        ("--config.optim.lr=2", Settings("run", 3, optim=Optim(2.0))),
        ("--config.steps=7", Settings("run", 7, optim=Optim(0.1))),
        ("--config.limit=9", Settings("run", 3, 9, optim=Optim(0.1))),
        ("--config.name=a=b", Settings("a=b", 3, optim=Optim(0.1))),
    ],
)
def test_overrides_reach_into_groups_and_may_stand_anywhere(config: str, override: str, expected: Settings):
    assert settings(f"--config={config}", override) == expected
    assert settings(override, f"--config={config}") == expected
    assert settings("--config", config, override) == expected
    assert settings(override, "--config", config) == expected


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("--config.on=True", Settings("run", 3, on=True, optim=Optim(0.1))),
        ("--config.optim.kind=linear", Settings("run", 3, optim=Optim(0.1, "linear"))),
        ("--config.words=('a', 'b')", Settings("run", 3, words=("a", "b"), optim=Optim(0.1))),
        ("--config.limit=5", Settings("run", 3, limit=5, optim=Optim(0.1))),
        ("--config.other.lr=2", Settings("run", 3, other=Optim(2.0), optim=Optim(0.1))),
        ("--config.rate=2", Settings("run", 3, rate=2.0, optim=Optim(0.1))),
    ],
)
def test_what_the_file_leaves_out_can_be_set(config: str, override: str, expected: Settings):
    assert settings(f"--config={config}", override) == expected


def test_groups_are_filled_each_by_its_own_kind(tmp_path: Path):
    (tmp_path / "two.py").write_text(
        "from ml_collections import ConfigDict\ndef get_config():\n  return ConfigDict({'a': {'name': 'x'}, 'b': {}})\n"
    )
    kinds = {"a": Settings, "b": Optim}
    found = load([f"--config={tmp_path}/two.py", "--config.a.steps=9", "--config.b.lr=3"], kinds)
    assert (build(Settings, found.a).steps, build(Optim, found.b).lr) == (9, 3.0)


def test_a_command_may_have_a_config_of_its_own(config: str):
    assert build(Settings, load(["--config.steps=7"], Settings, default=config)).steps == 7


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], r"^no config was given: pass --config=configs/NAME\.py$"),
        (["--config"], r"^no config was given: pass --config=configs/NAME\.py$"),
        (["--config=none.py"], r"^config file 'none\.py' is neither in the folder /.* nor in /.*, which has configs/"),
        (["--config={config}", "more"], r"^unexpected argument 'more': every setting is written --config\.KEY=VALUE$"),
        (["--config={config}", "--lr=3"], r"^the command line cannot be read: Unknown command line flag 'lr'"),
        (["--config={config}", "--config.steps=x"], r"--config\.steps=x: invalid literal for int\(\)"),
        (["--config={config}", "--config.steps=1.5"], r"--config\.steps=1\.5: invalid literal for int\(\)"),
        (["--config={config}", "--config.optim.lr=x"], r"--config\.optim\.lr=x: could not convert string to float"),
        (["--config={config}", "--config.optim=3"], r"--config\.optim=3: Failed to parse"),
        (["--config={config}", "--config.step=3"], r"no key that fits step \('step' Did you mean \"steps\" instead"),
        (["--config={config}", "--config.optim.lrr=3"], r"no key that fits optim\.lrr \('lrr' Did you mean \"lr\""),
        (["--config={config}:argument"], r"^config file .* cannot be read: TypeError: get_config\(\) takes 0"),
    ],
)
def test_a_command_line_that_cannot_be_read_is_one_sentence(config: str, arguments: list[str], sentence: str):
    with pytest.raises(ConfigError, match=sentence) as caught:
        settings(*(a.format(config=config) for a in arguments))
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("def get_config(:\n", "cannot be read: invalid syntax"),
        ("def get_config():\n    return nothing\n", "cannot be read: name 'nothing' is not defined"),
        ("def get_config():\n    return 5\n", "returns a int, expected a ConfigDict"),
        ("x = 1\n", "no key that fits its own code"),
        ("import no_such_module\n", "No module named 'no_such_module'"),
    ],
)
def test_a_config_file_that_is_wrong_is_one_sentence(tmp_path: Path, text: str, sentence: str):
    """Each has a process of its own, since a config file is a module that Python remembers."""
    (tmp_path / "bad.py").write_text(text)
    code = "from cartridges_jax.command_line.config import load, run; run(lambda argv: load(argv, {}) and 0)"
    done = subprocess.run(
        [sys.executable, "-c", code, f"--config={tmp_path}/bad.py"], cwd=ROOT, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, "", 1), done.stderr
    assert done.stderr.startswith("error: ") and sentence in done.stderr


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({}, r"^config\.name is missing$"),
        ({"name": 3}, r"^config\.name is 3 \(int\), expected str$"),
        ({"name": "a", "steps": 1.0}, r"^config\.steps is 1\.0 \(float\), expected int$"),
        ({"name": "a", "steps": True}, r"^config\.steps is True \(bool\), expected int$"),
        ({"name": "a", "steps": None}, r"^config\.steps is None \(NoneType\), expected int$"),
        ({"name": "a", "limit": "x"}, r"^config\.limit is 'x' \(str\), expected int$"),
        ({"name": "a", "on": 1}, r"^config\.on is 1 \(int\), expected bool$"),
        ({"name": "a", "words": "abc"}, r"^config\.words is 'abc', expected a list$"),
        ({"name": "a", "words": ["a", 3]}, r"^config\.words\[1\] is 3 \(int\), expected str$"),
        ({"name": "a", "optim": 3}, r"^config\.optim is 3, expected a group of keys$"),
        ({"name": "a", "optim": {"lr": "1"}}, r"^config\.optim\.lr is '1' \(str\), expected float$"),
        ({"name": "a", "optim": {"lr": True}}, r"^config\.optim\.lr is True \(bool\), expected float$"),
        (
            {"name": "a", "optim": {"kind": "cos"}},
            r"^config\.optim\.kind is 'cos', expected one of 'cosine', 'linear'$",
        ),
        ({"name": "a", "optim": {"lrr": 1.0}}, r"^unknown key config\.optim\.lrr: did you mean 'lr'\?$"),
        ({"name": "a", "stepz": 1}, r"^unknown key config\.stepz: did you mean 'steps'\?$"),
        (
            {"name": "a", "zzz": 1},
            r"^unknown key config\.zzz: known keys are limit, name, on, optim, other, rate, steps, words$",
        ),
    ],
)
@pytest.mark.parametrize("kind", [dict, ConfigDict])
def test_a_value_that_does_not_fit_is_one_sentence_with_its_path(kind: type, values: dict[str, Any], sentence: str):
    with pytest.raises(ConfigError, match=sentence):
        build(Settings, kind(values))


def test_values_that_fit_are_taken():
    values = {"name": "a", "limit": None, "words": ["a", "b"], "optim": {"lr": 3, "kind": "linear"}}
    built = build(Settings, ConfigDict(values))
    assert built == Settings("a", words=("a", "b"), optim=Optim(3.0, "linear"))
    assert type(built.optim.lr) is float


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (UserError("a is 3, expected 4"), 2, "error: a is 3, expected 4\n"),
        (UserError("two\n  lines"), 2, "error: two lines\n"),
        (MissingPackage("pip install x"), 2, "error: pip install x\n"),
        (ConfigError("no such key"), 2, "error: no such key\n"),
        (FileNotFoundError("x does not exist"), 2, "error: x does not exist\n"),
        (OSError(errno.ENOSPC, "No space left on device", "x"), 2, "error: [Errno 28] No space left on device: 'x'\n"),
        (UserError(), 2, "error: UserError\n"),
        (KeyboardInterrupt(), 130, "stopped; the same command goes on from here\n"),
    ],
)
def test_user_errors_are_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: BaseException, status: int, said: str
):
    def main(argv: list[str]) -> int:
        assert argv == ["--x"]
        raise error

    monkeypatch.setattr(sys, "argv", ["command", "--x"])
    with pytest.raises(SystemExit) as caught:
        run(main)
    assert caught.value.code == status
    assert capsys.readouterr() == ("", said)


def _fails_to_broadcast() -> object:
    return jnp.ones((2, 3)) + jnp.ones((2, 2))


def _matrices_that_do_not_multiply() -> object:
    return jnp.ones((2, 3)) @ jnp.ones((2, 2))


@pytest.mark.parametrize(
    "bug",
    [lambda: int("x"), lambda: {}["key"], lambda: len(5), _fails_to_broadcast, _matrices_that_do_not_multiply],  # type: ignore[arg-type]
)
def test_a_bug_keeps_its_traceback(bug: Callable[[], object]):
    """A ValueError, KeyError or TypeError of Python or JAX says nothing to a user."""
    with pytest.raises((ValueError, KeyError, TypeError)) as caught:
        run(lambda _: bug() and None)
    assert not isinstance(caught.value, UserError)


def test_the_traceback_of_a_mistake_is_shown_when_it_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def main(argv: list[str]) -> int:
        assert argv == ["--x"]  # the flag belongs to all commands, none of them sees it
        raise UserError("a is 3, expected 4")

    monkeypatch.setattr(sys, "argv", ["command", "--traceback", "--x"])
    with pytest.raises(SystemExit) as caught:
        run(main)
    shown = capsys.readouterr().err
    assert caught.value.code == 2
    assert shown.startswith("Traceback") and 'raise UserError("a is 3' in shown
    assert shown.endswith("error: a is 3, expected 4\n")


@pytest.mark.parametrize("argument", ["--slots=4", "--slots", "--config.server.slots=4"])
def test_a_flag_of_an_earlier_version_is_answered_with_its_new_name(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], argument: str
):
    renamed = {"--slots": "--max-num-seqs", "--config.server.slots": "--config.server.max_num_seqs"}
    monkeypatch.setattr(sys, "argv", ["command", "--model=--slots", argument])
    with pytest.raises(SystemExit) as caught:
        run(lambda _: 0, renamed)
    flag = argument.partition("=")[0]
    assert caught.value.code == 2
    assert capsys.readouterr() == ("", f"error: {flag} has a new name: write {renamed[flag]}\n")


def test_every_refusal_is_of_the_class_that_commands_show():
    """A bare ValueError raised in the packages would be taken for a bug."""
    for package in ("cartridges_jax", "synth"):
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
                    assert ast.unparse(node.exc.func) not in ("ValueError", "ImportError"), f"{path}:{node.lineno}"


@pytest.mark.parametrize("returned", [0, None, 3])
def test_a_command_ends_with_what_main_returns(returned: int | None):
    with pytest.raises(SystemExit) as caught:
        run(lambda _: returned)
    assert caught.value.code == returned


def test_a_file_appears_whole_and_its_folder_with_it(tmp_path: Path):
    path = tmp_path / "a" / "b" / "file.txt"
    with files.atomic(path) as temporary:
        temporary.write_text("new")
        assert not path.exists()
        assert temporary.parent == path.parent
    assert path.read_text() == "new"
    assert os.listdir(path.parent) == ["file.txt"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, OSError])
def test_an_error_in_the_middle_keeps_the_old_file(tmp_path: Path, error: type[BaseException]):
    path = tmp_path / "file.txt"
    files.write_text(path, "öld\n")
    with pytest.raises(error), files.atomic(path) as temporary:
        temporary.write_text("half of the n")
        raise error
    assert path.read_text(encoding="utf-8") == "öld\n"
    assert os.listdir(tmp_path) == ["file.txt"]


def test_an_error_of_the_disk_names_the_file(tmp_path: Path):
    with pytest.raises(OSError, match=r"No space left on device: '.*file\.txt'"), files.atomic(tmp_path / "file.txt"):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_block_that_writes_nothing_is_an_error_and_leaves_nothing(tmp_path: Path):
    with pytest.raises(FileNotFoundError), files.atomic(tmp_path / "file.txt"):
        pass
    assert os.listdir(tmp_path) == []


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_progress_is_plain_lines_off_a_terminal(capfd: pytest.CaptureFixture[str], clock: list[float]):
    bar = Progress("training", 100, "steps", done=20)
    for i in range(30):
        clock[0] += 1
        bar.advance(note=f"loss {i}")
    clock[0] += 60
    bar.advance(50)
    bar.close("the end")
    assert capfd.readouterr() == (
        "",
        "training: 30/100 steps, 1.00 steps/s, 1m10s left, loss 9\n"
        "training: 40/100 steps, 1.00 steps/s, 1m00s left, loss 19\n"
        "training: 50/100 steps, 1.00 steps/s, 50s left, loss 29\n"
        "training: 100/100 steps, 0.89 steps/s, done in 1m30s\n"
        "training: 100/100 steps, 0.89 steps/s, done in 1m30s, the end\n",
    )


def test_progress_that_never_moved_has_no_rate(capfd: pytest.CaptureFixture[str], clock: list[float]):
    Progress("training", 3, "steps").close()
    assert capfd.readouterr().err == "training: 0/3 steps, 0.00 steps/s, unknown time left\n"


def test_progress_says_once_that_it_is_done(capfd: pytest.CaptureFixture[str], clock: list[float]):
    bar = Progress("training", 2, "steps")
    clock[0] += 20
    bar.advance(2, note="loss 1")
    bar.close()
    assert capfd.readouterr().err == "training: 2/2 steps, 0.10 steps/s, done in 20s, loss 1\n"


def test_progress_is_a_bar_on_a_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    bar = Progress("training", 4, "steps", done=1)
    bar.advance(3, note="loss 2")
    bar.close()
    said = capsys.readouterr().err
    assert "\r" in said and "training" in said and "4/4" in said and "loss 2" in said


def test_a_stage_says_that_it_begins_and_how_long_it_took(capfd: pytest.CaptureFixture[str], clock: list[float]):
    with stage("loading"):
        assert capfd.readouterr().err == "loading ...\n"
        clock[0] += 75
    assert capfd.readouterr() == ("", "loading: 1m15s\n")
