"""A cartridge put into Tokasaurus' folder and asked there, by the client command."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
from loopback import QuietHandler, serving
from tokasaurus_stub import run_tokasaurus

import cartridges_jax as cj
from cartridges_jax import ask
from cartridges_jax.cartridge.arrays import Cartridge
from cartridges_jax.command_line.errors import UserError
from cartridges_jax.initial.texts import SummaryConfig, summary
from cartridges_jax.interop import engines

QUESTION = "What sleeps in box 3?"


def asked(url: str, folder: Path, source: Path, *more: str) -> list[str]:
    arguments = ["--engine=tokasaurus", f"--url={url}", "--name=the-manual_2", f"--model={tiny.folder()}"]
    return [*arguments, f"--folder={folder}", f"--cartridge={source}", "--max-tokens=6", *more, QUESTION]


def test_a_cartridge_is_registered_and_answers(
    cartridge: Cartridge, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    cartridge.save(tmp_path / "c.safetensors")
    with run_tokasaurus(tiny.model(), tmp_path / "served") as url:
        assert ask.main(asked(url, tmp_path / "served", tmp_path / "c.safetensors")) == 0
        prompt = tiny.model().tokenizer.render_turns(
            [{"role": "user", "content": QUESTION}], add_generation_prompt=True
        )
        (expected,) = cj.generate(tiny.model(), [prompt], cartridge=cartridge, max_tokens=6, temperature=0.0)
        assert capsys.readouterr().out.strip() == expected.strip()
        with pytest.raises(UserError, match=r"answers 400: .*Cartridge other not found"):
            ask.main([*asked(url, tmp_path, tmp_path)[:2], "--name=other", f"--model={tiny.folder()}", QUESTION])


def test_each_failure_is_a_sentence(cartridge: Cartridge, tmp_path: Path):
    part = Cartridge(cartridge.keys[:, :9], cartridge.values[:, :9])
    part.save(tmp_path / "c.safetensors")
    with pytest.raises(UserError, match="9 slots, and Tokasaurus loads multiples"):
        ask.main(asked("http://127.0.0.1:9", tmp_path / "served", tmp_path / "c.safetensors"))
    with pytest.raises(UserError, match=r"--name is 'a\.b', expected letters and digits"):
        ask.main(["--engine=tokasaurus", "--name=a.b", QUESTION])
    with pytest.raises(UserError, match="say which with --folder"):
        ask.main(["--engine=tokasaurus", "--name=a", "--cartridge=c", QUESTION])
    with pytest.raises(ConnectionError, match=r"cannot be asked .* is the server running there"):
        ask.main(["--engine=tokasaurus", "--name=a", "--url=http://127.0.0.1:9", QUESTION])
    with pytest.raises(UserError, match="vLLM wants a placeholder for every slot"):
        ask.main(["--engine=vllm", "--name=a", QUESTION])


def test_a_request_to_vllm_names_its_cartridge_twice():
    body = engines.vllm_request("manual", 3, [7, 8], "m", 5)
    assert body["prompt"] == [0, 0, 0, 7, 8]
    assert (body["kv_transfer_params"], body["cache_salt"]) == ({"cartridge": "manual"}, "manual")


def answering(status: int, content: bytes, seen: list[QuietHandler], **headers: str) -> type[QuietHandler]:
    class Handler(QuietHandler):
        def do_POST(self) -> None:
            seen.append(self)
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send(status, content, **headers)

        do_GET = do_POST

    return Handler


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_nothing_is_sent_to_where_a_server_leads(status: int):
    seen: list[QuietHandler] = []
    with (
        serving(answering(200, b"{}", seen)) as elsewhere,
        serving(answering(status, b"", [], Location=f"{elsewhere}/v1")) as url,
        pytest.raises(UserError, match=r"leads to http://127\.0\.0\.1:\d+/v1, where nothing was sent"),
    ):
        engines.post(url, {"messages": "SECRET"})
    assert not seen


def test_a_password_in_the_address_is_a_login_and_in_no_sentence():
    seen: list[QuietHandler] = []
    with serving(answering(401, b"no", seen)) as url, pytest.raises(UserError, match="answers 401: no") as caught:
        summary("text", 5, SummaryConfig(url.replace("//", "//ada:se%40cret@")))
    assert [handler.headers["Authorization"] for handler in seen] == ["Basic YWRhOnNlQGNyZXQ="]
    with pytest.raises(ConnectionError, match=r"http://127\.0\.0\.1:9/.* cannot be asked") as gone:
        summary("text", 5, SummaryConfig("http://ada:se%40cret@127.0.0.1:9"))
    assert "cret" not in f"{caught.value}{gone.value}"


@pytest.mark.parametrize(
    "reply",
    [
        *(b"", b"[]", b"7", b"[" * 99_999, b"\xff", b"{}", b'{"choices": []}', b'{"choices": [7]}'),
        *(b'{"choices": 7}', b'{"choices": [{"message": {"content": 7}}]}', b'{"choices": [{"text": null}]}'),
        b"x" * (engines.LARGEST_REPLY + 1),
    ],
)
def test_replies_that_are_nonsense_are_one_sentence(reply: bytes):
    with serving(answering(200, reply, [])) as url:
        with pytest.raises((ConnectionError, UserError)) as caught:
            summary("text", 5, SummaryConfig(url))
        with pytest.raises(ConnectionError):
            ask.main(["--engine=tokasaurus", "--name=a", f"--url={url}", QUESTION])
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500
