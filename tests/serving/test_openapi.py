"""`/openapi.json`: requests made from it, at random and on its edges, never meet a 500; `make fuzz-api` makes more."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
import schemathesis
import tiny
from hypothesis import HealthCheck, Phase, given, seed, settings
from running import running  # pyrefly: ignore[missing-import] (pytest puts this folder on the path)
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from test_server import SAID, FakeCartridge, ScriptEngine  # pyrefly: ignore[missing-import]

from cartridges_jax.serving.openapi import document_of
from cartridges_jax.serving.server import Server
from cartridges_jax.serving.store import CartridgeStore

HEALTHS = list(HealthCheck)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Server:
    folder = tmp_path_factory.mktemp("cartridges")
    (folder / "manual.safetensors").write_text("five!")
    store = CartridgeStore(folder, FakeCartridge, compose=FakeCartridge.compose)
    engine = ScriptEngine(SAID, max_num_seqs=4, max_length=400)
    return Server(engine, tiny.model().tokenizer, store, "tiny", rng=random.Random(0))


@pytest.fixture(scope="module")
def url(server: Server) -> Iterator[str]:
    with running(server) as root:
        yield root


def test_it_describes_every_route(server: Server):
    routes = {
        (route.resource.canonical, route.method.lower())
        for route in server._app().router.routes()
        if route.resource and route.method in ("GET", "POST")
    }
    told = {
        (path, method)
        for path, methods in document_of("tiny", server._reader.table)["paths"].items()
        for method in methods
    }
    pages = {("/", "get"), ("/page/{name}", "get"), ("/document", "get"), ("/openapi.json", "get")}
    assert told | pages == routes


@pytest.mark.parametrize("examples", [4, pytest.param(300, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])])
@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
def test_no_request_meets_a_500(url: str, mode: GenerationMode, examples: int):
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
    for found in schema.get_all_operations():
        operation = found.ok()
        if operation.method == "post" or mode is GenerationMode.POSITIVE:

            @seed(1)
            @settings(
                max_examples=examples,
                deadline=None,
                database=None,
                phases=[Phase.generate],
                suppress_health_check=HEALTHS,
            )
            @given(case=operation.as_strategy(generation_mode=mode))
            def ask(case: schemathesis.Case) -> None:
                case.call_and_validate(checks=[not_a_server_error])

            ask()
