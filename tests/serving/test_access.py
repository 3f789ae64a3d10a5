"""Who may ask a server, for how long, and what it counts; cartridges that messages name."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_server import END, HELLO, SAID, Client, ScriptEngine, folder, serving  # pyrefly: ignore[missing-import]

__all__ = ["folder"]  # a fixture


def test_other_sites_and_other_names_are_refused():
    async def test(client: Client) -> None:
        port = client.url.rpartition(":")[2]
        for headers, code in (
            ({"Origin": "https://evil.example"}, "origin"),
            ({"Origin": "null"}, "origin"),
            ({"Host": f"evil.example:{port}"}, "host"),
            ({"Host": "[:::"}, "host"),
        ):
            status, reply = await client.post("/v1/chat/completions", json={"messages": HELLO}, headers=headers)
            assert (status, reply["error"]["code"]) == (403, code), headers
        for headers in ({"Origin": client.url}, {"Host": f"localhost:{port}"}):
            assert (await client.post("/v1/chat/completions", json={"messages": HELLO}, headers=headers))[0] == 200

    serving(ScriptEngine(SAID), test)


def test_with_a_key_any_name_may_be_asked():
    async def test(client: Client) -> None:
        headers = {"Host": "models.example", "Origin": "https://models.example", "Authorization": "Bearer key"}
        assert (await client.get("/v1/models", headers=headers))[0] == 200  # as behind a proxy
        for path in ("/metrics", "/v1/cartridges", "/openapi.json", "/document"):
            assert (await client.get(path))[0] == 401
        async with client.session.get(client.url + "/") as response:
            assert response.status == 200 and "default-src 'none'" in response.headers["Content-Security-Policy"]
        assert (await client.get("/page/../server.py"))[0] == 401
        assert (await client.get("/page/server.py"))[0] == 404

    serving(ScriptEngine(SAID), test, api_key="key")


@pytest.mark.parametrize("stream", [True, False])
def test_time_is_up(stream: bool):
    engine = ScriptEngine(list(b"abc"), max_num_seqs=1, pause=0.01)

    async def test(client: Client) -> None:
        if stream:
            assert (await client.stream())[-1]["error"]["code"] == "timeout"
        else:
            status, reply = await client.chat()
            assert status == 504 and reply["error"]["code"] == "timeout"
        assert engine.steps < 200
        assert (await client.chat(max_tokens=2))[0] == 200, "the slot is free again"

    serving(engine, test, max_seconds=1.0)


def test_messages_name_cartridges(folder: Path):
    async def test(client: Client) -> None:
        tag = '<cartridge>{"id": "manual", "source": "local"}</cartridge>'
        system = {"role": "system", "content": f"{tag} Be kind. {tag.replace('manual', 'nested')}"}
        status, reply = await client.chat(messages=[system, *HELLO], return_token_ids=True)
        assert status == 200 and reply["usage"]["prompt_tokens_details"]["cartridge_tokens"] == 13
        assert bytes(reply["prompt_token_ids"]) == b"s:Be kind.\nu:hello\na:"
        _, reply = await client.chat(messages=[{"role": "system", "content": tag}, *HELLO], return_token_ids=True)
        assert bytes(reply["prompt_token_ids"]) == b"u:hello\na:", "nothing is left of an empty system message"
        _, reply = await client.chat(messages=[{"role": "user", "content": tag}], return_token_ids=True)
        assert tag.encode() in bytes(reply["prompt_token_ids"]), "a user's text is only text"
        for broken in ("<cartridge>{</cartridge>", "<cartridge>5</cartridge>", '<cartridge>{"id": 5}</cartridge>'):
            status, reply = await client.chat(messages=[{"role": "system", "content": broken}, *HELLO])
            assert status == 400 and "cartridge" in reply["error"]["message"]
        both = await client.chat(messages=[system, *HELLO], cartridges=[{"id": "manual"}])
        assert both[0] == 400 and "either here or as tags" in both[1]["error"]["message"]

    serving(ScriptEngine(SAID), test, folder)


def test_thinking_is_the_templates():
    async def test(client: Client) -> None:
        for name in ("chat_template_kwargs", "apply_chat_template_overrides"):
            for on in (True, False):
                _, reply = await client.chat(**{name: {"enable_thinking": on}}, return_token_ids=True)
                assert bytes(reply["prompt_token_ids"]).endswith(b"<think>") == on
        assert (await client.chat(chat_template_kwargs={"enable_thinking": 1}))[0] == 400
        assert (await client.chat(chat_template_kwargs=[]))[0] == 400

    serving(ScriptEngine(SAID), test)


def test_a_cartridge_holds_the_beginning_of_a_text(folder: Path):
    async def test(client: Client) -> None:
        async def prompted(**body: object) -> tuple[int, list[int]]:
            asked = {"prompt": "hi", "max_tokens": 1, "return_token_ids": True} | body
            status, reply = await client.post("/v1/completions", json=asked)
            return status, reply["prompt_token_ids"] if status == 200 else [reply["error"]["param"]]

        behind = {"cartridges": [{"id": "manual"}]}
        assert await prompted() == (200, [END, *b"hi"])
        assert await prompted(**behind) == (200, [*b"hi"])
        assert await prompted(**behind, add_special_tokens=False) == (200, [*b"hi"])
        assert await prompted(**behind, add_special_tokens=True) == (400, ["add_special_tokens"])
        assert await prompted(**behind, prompt=[END, 5]) == (200, [END, 5]), "ids are taken as they are"

    serving(ScriptEngine(SAID), test, folder)
