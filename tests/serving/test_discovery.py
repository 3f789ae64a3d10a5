"""How clients find their way: the list of models, other sites' pages, ids of requests, roles, and a full context."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from test_server import HELLO, SAID, Client, ScriptEngine, folder, serving  # pyrefly: ignore[missing-import]

from cartridges_jax import serve
from cartridges_jax.command_line.errors import UserError

__all__ = ["folder"]  # a fixture
APP = "https://chat.example"


def test_every_model_that_is_listed_answers(folder: Path):
    async def test(client: Client) -> None:
        status, reply = await client.get("/v1/models")
        models = {model["id"]: model for model in reply["data"]}
        assert status == 200 and list(models) == ["tiny", "tiny:manual", "tiny:nested", "tiny:wrong"]
        assert "parent" not in models["tiny"] and models["tiny:manual"]["parent"] == "tiny"
        for id in ("tiny", "tiny:manual", "tiny:nested"):
            assert (await client.chat(model=id))[1]["model"] == id
            assert (await client.get(f"/v1/models/{id}"))[1]["id"] == id
        _, reply = await client.get("/v1/models")
        assert [model["max_model_len"] for model in reply["data"]] == [400, 395, 391, 400], "as far as they are loaded"

    serving(ScriptEngine(SAID), test, folder)


# What each sends behind the model that was picked and the messages, besides the numbers that its user sets: as its
# sources of 2025 and 2026 have it.
GUIS = {
    "Open WebUI": {"stream": True, "stream_options": {"include_usage": True}},
    "LibreChat": {"stream": True, "stream_options": {"include_usage": True}, "user": "66f0c", "n": 1}
    | {"temperature": 1, "top_p": 1, "presence_penalty": 0, "frequency_penalty": 0},
    "Jan": {"stream": True, "stream_options": {"include_usage": True}, "temperature": 0.7, "top_k": 20, "top_p": 0.8}
    | {"tools": [], "tool_choice": "auto", "max_tokens": 5},
}


@pytest.mark.parametrize("gui", GUIS)
def test_a_picker_shows_cartridges_and_their_chat_answers(gui: str, folder: Path):
    async def test(client: Client) -> None:
        key = {"Authorization": "Bearer none"}  # all three send one, whether the server asks for it or not
        _, reply = await client.get("/v1/models", headers=key)
        assert "tiny:manual" in [model["id"] for model in reply["data"]]
        chunks = await client.stream(model="tiny:manual", **GUIS[gui])
        assert {chunk["model"] for chunk in chunks} == {"tiny:manual"} and chunks[-1]["usage"]["completion_tokens"] > 0

    serving(ScriptEngine(SAID), test, folder)


def test_tokasaurus_own_client_finds_one_model(folder: Path):
    async def test(client: Client) -> None:
        assert [model["id"] for model in (await client.get("/v1/models"))[1]["data"]] == ["tiny"]
        assert (await client.get("/v1/models/tiny:manual"))[0] == 200

    serving(ScriptEngine(SAID), test, folder, list_cartridges=False)


@pytest.mark.parametrize("allowed", [APP, "*"])
def test_a_page_of_an_allowed_site_may_ask(allowed: str):
    async def test(client: Client) -> None:
        asks = {
            "Origin": APP,
            "Access-Control-Request-Method": "POST",
            "Access-Control-Request-Headers": "authorization,content-type",
            "Access-Control-Request-Private-Network": "true",
        }
        async with client.session.options(client.url + "/v1/chat/completions", headers=asks) as response:
            told = response.headers
            assert response.status == 204 and told["Access-Control-Allow-Origin"] == APP
            assert told["Access-Control-Allow-Headers"] == "authorization,content-type"
            assert "POST" in told["Access-Control-Allow-Methods"] and told["Access-Control-Allow-Private-Network"]
        headers = {"Origin": APP, "Authorization": "Bearer key"}
        for body in ({"messages": HELLO}, {"messages": HELLO, "stream": True}, {"messages": []}):
            async with client.session.post(client.url + "/v1/chat/completions", json=body, headers=headers) as response:
                assert response.headers["Access-Control-Allow-Origin"] == APP and response.headers["Vary"] == "Origin"
        async with client.session.post(client.url + "/v1/chat/completions", headers={"Origin": APP}) as response:
            assert response.status == 401 and response.headers["Access-Control-Allow-Origin"] == APP
        other = {**asks, "Origin": "https://evil.example"}
        async with client.session.options(client.url + "/v1/chat/completions", headers=other) as response:
            assert response.status == (204 if allowed == "*" else 403)

    serving(ScriptEngine(SAID), test, api_key="key", allow_origins=[allowed])


def test_anthropics_clients_send_the_key_elsewhere():
    async def test(client: Client) -> None:
        assert (await client.get("/v1/models", headers={"X-Api-Key": "key"}))[0] == 200
        assert (await client.get("/v1/models", headers={"X-Api-Key": "other"}))[0] == 401

    serving(ScriptEngine(SAID), test, api_key="key")


@pytest.mark.parametrize("given", ["chat.example", "https://a.example/path", "https://", "https://a b"])
def test_what_is_no_origin_is_refused(given: str):
    with pytest.raises(UserError, match="expected a site like"):
        serve._arguments([f"--allow-origin={given}"])
    assert serve._arguments(["--allow-origin=HTTPS://A.example/", "--allow-origin=*"]).allow_origin == [
        "https://a.example",
        "*",
    ]


def test_every_response_names_its_request():
    async def test(client: Client) -> None:
        await client.chat()
        first = client.headers["X-Request-Id"]
        await client.get("/v1/nothing")
        assert re.fullmatch("[0-9a-f]{32}", first) and client.headers["X-Request-Id"] != first
        for given, kept in (("abc-1", True), ("a b", False), ("x" * 200, False)):
            await client.get("/health", headers={"X-Request-Id": given})
            assert (client.headers["X-Request-Id"] == given) == kept

    serving(ScriptEngine(SAID), test)


@pytest.mark.parametrize(
    ("path", "body", "words"),
    [
        (
            "chat/completions",
            {"messages": [{"role": "user", "content": "x" * 500}]},
            "This model's maximum context length is 400 tokens. However, you requested 506 tokens "
            "(505 in the messages, 1 in the completion). Please reduce the length of the messages or completion.",
        ),
        (
            "completions",
            {"prompt": "x" * 390, "max_tokens": 50},
            "This model's maximum context length is 400 tokens. However, you requested 441 tokens "
            "(391 in the prompt, 50 in the completion). Please reduce the length of the prompt or completion.",
        ),
    ],
)
def test_a_context_that_is_full_is_said_in_openais_words(path: str, body: dict[str, object], words: str):
    async def test(client: Client) -> None:
        status, reply = await client.post(f"/v1/{path}", json=body)
        assert status == 400 and reply["error"]["message"] == words
        assert reply["error"]["code"] == "context_length_exceeded"
        assert reply["error"]["type"] == "invalid_request_error"

    serving(ScriptEngine(SAID), test)


def test_a_developer_is_the_system(folder: Path):
    async def test(client: Client) -> None:
        asked = [{"role": "developer", "content": 'Be kind. <cartridge>{"id": "manual"}</cartridge>'}, *HELLO]
        _, reply = await client.chat(messages=asked, return_token_ids=True)
        assert bytes(reply["prompt_token_ids"]) == b"s:Be kind.\nu:hello\na:"
        assert reply["usage"]["prompt_tokens_details"]["cartridge_tokens"] == 5

    serving(ScriptEngine(SAID), test, folder)


def test_what_this_server_cannot_have_is_said():
    async def test(client: Client) -> None:
        status, reply = await client.post("/v1/embeddings", json={"input": "x", "model": "tiny"})
        assert status == 404 and "has no embeddings" in reply["error"]["message"]

    serving(ScriptEngine(SAID), test)
