"""Stock clients against the server over real HTTP: the `openai` package, and what Tokasaurus' clients send."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import random
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

import numpy as np
import openai
import pytest
from running import running  # pyrefly: ignore[missing-import] (pytest puts this folder on the path)
from test_server import SAID, TOKENIZER, FakeCartridge, ScriptEngine  # pyrefly: ignore[missing-import]

from cartridges_jax.serving.server import Server
from cartridges_jax.serving.store import CartridgeStore
from synth.clients.base import Refused
from synth.clients.factory import connect
from synth.config import ClientConfig

HELLO: Any = [{"role": "user", "content": "hello"}]
TAGGED: Any = [{"role": "system", "content": '<cartridge>{"id": "manual"}</cartridge>'}, *HELLO]


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("cartridges")
    (folder / "manual.safetensors").write_text("five!")
    (folder / "other.safetensors").write_text("six...")
    store = CartridgeStore(folder, FakeCartridge, compose=FakeCartridge.compose)
    server = Server(ScriptEngine(SAID), TOKENIZER, store, "tiny", api_key="key", max_queue=8, rng=random.Random(0))
    with running(server) as root:
        yield root


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="key", max_retries=0) as made:
        yield made


def slots(reply: Any) -> int:
    return reply.usage.prompt_tokens_details.cartridge_tokens


def test_openai_lists_models(client: openai.OpenAI):
    assert [model.id for model in client.models.list()] == ["tiny", "tiny:manual", "tiny:other"]
    assert client.models.retrieve("tiny:manual").owned_by == "cartridges-jax"


def test_our_tokasaurus_client_finds_the_model_in_a_list(url: str):

    async def check(model: str) -> None:
        config = ClientConfig(f"{url}/v1", model, kind="tokasaurus", api_key="key")
        async with connect(config, config.urls[0]) as client:
            await client.check()

    asyncio.run(check("Tiny"))
    asyncio.run(check("tiny:manual"))
    with pytest.raises(Refused, match="serves tiny, tiny:manual, tiny:other, not 'tiny:none'"):
        asyncio.run(check("tiny:none"))


def test_openai_chats(client: openai.OpenAI):
    reply = client.chat.completions.create(model="tiny", messages=HELLO, n=2, logprobs=True, top_logprobs=2)
    assert [choice.message.content for choice in reply.choices] == ["Grüße!"] * 2
    assert reply.choices[0].logprobs.content[0].top_logprobs[1].token == "A"
    assert reply.usage.prompt_tokens_details.cached_tokens >= 0
    with client.chat.completions.create(
        model="tiny", messages=HELLO, stream=True, stream_options={"include_usage": True}
    ) as stream:
        *chunks, last = stream
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "Grüße!"
    assert last.usage.completion_tokens == len(SAID)


def test_openai_chooses_cartridges_three_ways(client: openai.OpenAI):
    asked = {"cartridges": [{"id": "manual"}, {"id": "other"}]}
    for more, expected in (({"extra_body": asked}, 10), ({"model": "tiny:manual"}, 5), ({"messages": TAGGED}, 5)):
        options: dict[str, Any] = {"model": "tiny", "messages": HELLO, **more}
        assert slots(client.chat.completions.create(**options)) == expected, more
    assert slots(client.completions.create(model="tiny:other", prompt="x")) == 6


def test_openai_completes(client: openai.OpenAI):
    reply = client.completions.create(model="tiny", prompt=["one", "two"], n=2, logprobs=1, max_tokens=4)
    assert [(choice.index, choice.text, choice.finish_reason) for choice in reply.choices] == [
        (i, "Gr\u00fc", "length") for i in range(4)
    ]
    assert reply.choices[3].logprobs.text_offset == [0, 1, 2, 2] and reply.choices[0].logprobs.tokens[:2] == ["G", "r"]
    assert client.completions.create(model="tiny", prompt=[104, 105]).choices[0].text == "Grüße!"
    with client.completions.create(model="tiny", prompt="x", stream=True) as stream:
        assert "".join(chunk.choices[0].text for chunk in stream) == "Grüße!"


def test_openai_raises_its_own_errors(url: str, client: openai.OpenAI):
    cases = [
        (openai.BadRequestError, {"temperature": 9}),
        (openai.BadRequestError, {"messages": [{"role": "user", "content": "x" * 500}]}),
        (openai.NotFoundError, {"model": "gpt-4"}),
        (openai.NotFoundError, {"extra_body": {"cartridges": [{"id": "none"}]}}),
    ]
    for kind, more in cases:
        with pytest.raises(kind):
            client.chat.completions.create(**{"model": "tiny", "messages": HELLO, **more})
    with (
        openai.OpenAI(base_url=f"{url}/v1", api_key="wrong", max_retries=0) as stranger,
        pytest.raises(openai.AuthenticationError),
    ):
        stranger.models.list()


def post(url: str, body: object, accept: str = "*/*") -> tuple[str, bytes]:
    headers = {"Authorization": "Bearer key", "Accept": accept, "Content-Type": "application/json"}
    with urllib.request.urlopen(urllib.request.Request(url, json.dumps(body).encode(), headers)) as response:
        return response.headers.get_content_type(), response.read()


CALL = {"messages": HELLO, "model": "tiny", "max_completion_tokens": 20, "temperature": 0.0, "logprobs": True}
LOCAL = {"cartridges": [{"id": "manual", "source": "local", "force_redownload": False}]}


@pytest.mark.parametrize("start", ["/custom/cartridge", "/v1/cartridge"])
def test_tokasaurus_routes(url: str, start: str):
    body = CALL | LOCAL | {"top_logprobs": 3, "logprobs_in_fingerprint": True}
    reply = json.loads(post(f"{url}{start}/chat/completions", body)[1])
    told = json.loads(reply["system_fingerprint"])
    assert told["completion_ids"] == [SAID] and reply["choices"][0]["logprobs"] is None
    decoded = [base64.b64decode(told[f"packed_{name}"][0]) for name in ("chosen_logprobs", "topk_indices")]
    assert np.frombuffer(decoded[0], "<f4").tolist() == [-0.25] * len(SAID)
    assert np.frombuffer(decoded[1], "<i4").reshape(-1, 3)[:, 0].tolist() == SAID
    assert len(base64.b64decode(told["packed_topk_logprobs"][0])) == 4 * 3 * len(SAID)
    plain = json.loads(post(f"{url}{start}/completions", {"prompt": "x", **LOCAL})[1])
    assert json.loads(plain["system_fingerprint"]) == {"completion_ids": [SAID]}


@pytest.mark.parametrize("path", ["custom", "custom/cartridge", "batch/cartridge", "v1/cartridge"])
def test_tokasaurus_batches_may_exceed_the_queue(url: str, path: str):
    bodies = [
        CALL | (LOCAL if i % 2 else {}) | {"top_logprobs": 2, "max_completion_tokens": 1 + i % 9} for i in range(40)
    ]
    route = f"{url}/{path}/synchronous-batch-completions"
    kind, data = post(route, {"requests": bodies})
    replies = json.loads(data)
    assert kind == "application/json" and len(replies) == 40
    ids = [json.loads(reply["system_fingerprint"])["completion_ids"][0] for reply in replies]
    assert ids == [SAID[: 1 + i % 9] for i in range(40)]
    kind, data = post(route, {"requests": bodies[:3]}, accept="application/x-npz")
    arrays = np.load(io.BytesIO(data), allow_pickle=False)
    assert kind == "application/x-npz"
    for i in range(3):
        assert arrays[f"completion_ids_{i}_0"].tolist() == ids[i] == arrays[f"topk_indices_{i}_0"][:, 0].tolist()
    assert [reply["usage"] for reply in json.loads(arrays["replies"].tobytes())][1]["completion_tokens"] == 2


def test_the_older_tokasaurus_client_sends_batches_elsewhere(url: str):
    route = f"{url}/batch/cartridge/chat/completions"
    assert len(json.loads(post(route, {"requests": [CALL | LOCAL] * 2})[1])) == 2
    assert json.loads(post(route, CALL | LOCAL)[1])["object"] == "chat.completion"


def test_one_broken_request_refuses_its_batch(url: str):
    with pytest.raises(urllib.error.HTTPError) as caught:
        post(f"{url}/custom/synchronous-batch-completions", {"requests": [CALL, CALL | {"temperature": 9}]})
    with caught.value as error:
        told = json.loads(error.read())["error"]
    assert told["param"] == "requests[1].temperature" and told["message"].startswith("requests[1]: temperature")


def test_tokens_of_a_stream_are_those_of_the_whole(url: str):
    body = {"prompt": "x", "return_token_ids": True, "logprobs": 2, "seed": 1}
    whole = json.loads(post(f"{url}/v1/completions", body)[1])["choices"][0]
    lines = post(f"{url}/v1/completions", body | {"stream": True})[1].decode().split("\n\n")
    choices = [json.loads(line[6:])["choices"][0] for line in lines if line.startswith("data: {")]
    assert [i for choice in choices for i in choice["token_ids"]] == whole["token_ids"] == SAID
    offsets = [at for choice in choices if choice["logprobs"] for at in choice["logprobs"]["text_offset"]]
    assert offsets == whole["logprobs"]["text_offset"]
