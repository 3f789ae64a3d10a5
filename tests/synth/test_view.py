from __future__ import annotations

import json
import re
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from browser import chromium
from hypothesis import given
from hypothesis import strategies as st
from playwright.sync_api import Browser, Page, expect

from cartridges_jax.command_line.errors import UserError
from synth import conversation, dataset
from synth.conversation import Conversation, Message, flatten
from synth.view.index import Index
from synth.view.vocabulary import Vocabulary, find_vocabulary

EVIL = "<script>document.title = 'taken'</script><img src=x onerror=\"document.title='taken'\">"
WORDS = "Grüße an Ada — 你好, ok."
END = "<|im_end|>"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bytes, so that most characters are more than one token."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[attr-defined]
    made.decoder = tokenizers.decoders.ByteLevel()  # type: ignore[attr-defined]
    trainer = tokenizers.trainers.BpeTrainer(  # type: ignore[attr-defined]
        vocab_size=300,
        special_tokens=[END],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),  # type: ignore[attr-defined]
        show_progress=False,
    )
    made.train_from_iterator([WORDS, "Answers of Ada"], trainer)
    folder = tmp_path_factory.mktemp("tokenizer")
    made.save(str(folder / "tokenizer.json"))
    return folder


def sample(i: int, encode: Callable[[str], Any]) -> Conversation:
    answer = EVIL if i == 3 else f"{WORDS} Number {i}."
    ids = tuple(encode(answer).ids)
    rows = [[(token_id, -0.1 * (t % 7) - 0.001), ((token_id + 1) % 250, -2.5)] for t, token_id in enumerate(ids)]
    metadata = {
        "seed_prompt_type": EVIL if i == 4 else ("question", "cloze")[i % 2],
        "seed_prompt": EVIL,
        "chunk_span": [i, i + 40],
        "resource": "paper.pdf",
        "finish_reasons": ["stop", "length" if i % 10 == 0 else "stop"],
        "completion_tokens": [7, len(ids)],
    }
    messages = (
        Message(f"{EVIL} Who is number {i}?", "user"),
        Message(answer, "assistant", (*ids, encode(END).ids[0]), flatten(rows, 1.0)),
    )
    return Conversation(messages, f"Context {i} {EVIL}" + " needle" * (i == 77), metadata, "self_study")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tokenizer: Path) -> Path:
    """130 conversations in parts, as a run leaves them that is not finished."""
    folder = tmp_path_factory.mktemp("run")
    encode = tokenizers.Tokenizer.from_file(str(tokenizer / "tokenizer.json")).encode
    made = [sample(i, encode) for i in range(130)]
    for first in range(0, 130, 26):
        conversation.write(folder / "parts" / f"part-{first:05d}.parquet", made[first : first + 26])
    return folder


@pytest.fixture(scope="module")
def url(run: Path, tokenizer: Path) -> Iterator[str]:
    command = [sys.executable, "-m", "synth.view", str(run), "--port=0", f"--tokenizer={tokenizer}"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout
        found = re.search(r"http://127\.0\.0\.1:\d+/", process.stdout.readline())
        assert found
        yield found[0]
        process.terminate()


def get(url: str, path: str) -> Any:
    with urllib.request.urlopen(url + path) as reply:
        return json.load(reply)


def places(url: str, query: str) -> list[int]:
    return [row["place"] for row in get(url, f"api/conversations?limit=200&{query}")["rows"]]


def test_every_conversation_is_listed_in_pages(url: str):
    assert places(url, "") == list(range(130))
    assert get(url, "api/conversations?offset=120&limit=50")["matches"] == 130
    assert [r["place"] for r in get(url, "api/conversations?offset=120&limit=3")["rows"]] == [120, 121, 122]


def test_search_and_filter(url: str):
    assert places(url, "type=cloze") == list(range(1, 130, 2))
    assert places(url, "search=NUMBER%2011.") == [11]
    assert places(url, "search=number%2011.&type=question") == []
    assert places(url, "search=needle") == [] and places(url, "search=needle&context=1") == [77]
    assert places(url, "search=who%20is%20number%2012&type=question") == [12, 120, 122, 124, 126, 128]


def test_tokens_spell_the_message(url: str, tokenizer: Path):
    for place in (0, 3, 129):
        made = get(url, f"api/conversations/{place}")
        answer = made["messages"][1]
        assert answer["aligned"]
        *tokens, end = answer["tokens"]
        assert "".join(token["text"] for token in tokens) == answer["content"]
        assert (end["text"], end["special"], "p" in end) == (END, True, False)
        assert [token["p"] for token in tokens[:2]] == [pytest.approx(0.999), pytest.approx(0.904, abs=1e-3)]
        for token in tokens:
            assert token["id"] in [token_id for _, token_id, _ in token["top"]]
            assert [p for _, _, p in token["top"]] == sorted((p for _, _, p in token["top"]), reverse=True)
        assert "tokens" not in made["messages"][0]


def test_the_summary_counts(url: str):
    found = get(url, "api/summary")
    assert found["total"] == 130 and dict(found["types"])["cloze"] == 65
    assert dict(found["endings"]) == {"stop": 117, "length": 13}
    assert sum(found["answer_tokens"]["counts"]) == 130 and found["question_tokens"]["mean"] == 7
    assert sum(found["coverage"]["paper.pdf"]) == pytest.approx(130 * 40 / (129 + 40) * 32, rel=0.01)
    assert sum(found["probabilities"]) > 130


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("api/conversations/130", 404),
        ("api/conversations/-1", 404),
        ("api/conversations/%C2%B2", 404),
        ("api/conversations?offset=x", 400),
        ("..%2f..%2fetc%2fpasswd", 404),
        ("view.py", 404),
    ],
)
def test_requests_for_what_is_not_there(url: str, path: str, status: int):
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(url + path)
    with caught.value as error:
        assert error.code == status


def test_another_sites_name_is_refused(url: str):
    request = urllib.request.Request(url + "api/summary", headers={"Host": "evil.example:80"})
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(request)
    with caught.value as error:
        assert error.code == 403


def test_a_taken_port_is_one_sentence(url: str, run: Path):
    port = url.rstrip("/").rpartition(":")[2]
    command = [sys.executable, "-m", "synth.view", str(run), f"--port={port}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and f"port {port} of 127.0.0.1 is taken: choose another --port" in done.stderr


@given(st.text(max_size=20))
def test_bytes_of_any_text_are_spelled(text: str):
    vocabulary = Vocabulary({byte: bytes([byte]) for byte in range(256)}, frozenset())
    texts = vocabulary.texts(list(text.encode()))
    assert "".join(texts) == text and len(texts) == len(text.encode())


@given(st.binary(max_size=20))
def test_bytes_that_are_no_text_are_shown_all_the_same(data: bytes):
    vocabulary = Vocabulary({byte: bytes([byte]) for byte in range(256)}, frozenset())
    assert len(vocabulary.texts(list(data))) == len(data)


def test_vocabularies_that_cannot_be_read(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    assert find_vocabulary(None, "no/such-model") is None
    assert "shown as ids: name their --tokenizer" in caplog.text
    for name in ("absent", "absent.gguf"):
        with pytest.raises(UserError, match=rf"--tokenizer .*{name} cannot be read"):
            find_vocabulary(str(tmp_path / name), None)


def test_sentence_pieces(tmp_path: Path):
    made = tokenizers.Tokenizer(tokenizers.models.BPE({"▁a": 0, "b": 1, "<0xC3>": 2, "<0xA9>": 3, "<0x0A>": 4}, []))
    made.decoder = tokenizers.decoders.Sequence(  # type: ignore[attr-defined]
        [tokenizers.decoders.Replace("▁", " "), tokenizers.decoders.ByteFallback(), tokenizers.decoders.Fuse()]
    )
    made.save(str(tmp_path / "tokenizer.json"))
    vocabulary = find_vocabulary(str(tmp_path), None)
    assert vocabulary and vocabulary.texts([0, 1, 2, 3, 4, 9]) == [" a", "b", "", "é", "\n", "⟨9⟩"]


def test_the_index_finds_what_lies_in_any_part(run: Path):
    index = Index(dataset.files_of(run))
    assert index.total == 130 and index.conversation(129).metadata["chunk_span"] == [129, 169]
    assert [head.contents[0].split()[-1] for head in index.heads([0, 26, 129])] == ["0?", "26?", "129?"]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as found:
        yield found


@pytest.fixture
def open_page(browser: Browser, url: str) -> Iterator[Callable[..., Page]]:
    pages: list[Page] = []
    complaints: list[str] = []

    def open_one(where: str = "", **settings: Any) -> Page:
        page = browser.new_page(**settings)
        pages.append(page)
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda r: complaints.append(r.url) if not r.url.startswith((url, "data:")) else None)
        page.goto(url + where)
        page.wait_for_selector("#rows a", state="attached")
        return page

    yield open_one
    for page in pages:
        page.close()
    assert not complaints, "the console is silent, and nothing but this server is asked"


def test_browsing_in_a_browser(open_page: Callable[..., Page]):
    page = open_page()
    expect(page.locator("#matches")).to_have_text("130 conversations")
    page.click("#next")
    expect(page.locator("#rows a").first).to_contain_text("#50")
    page.select_option("#type", "cloze")
    page.fill("#search", "number 11.")
    expect(page.locator("#matches")).to_have_text("1 of 130 conversations")
    page.click("#rows a")
    expect(page.locator(".message.user .text")).to_contain_text("Who is number 11?")
    page.click("summary:has-text('Context')")
    expect(page.locator(".context").first).to_contain_text("Context 11")


def test_a_token_shows_its_alternatives(open_page: Callable[..., Page]):
    page = open_page("#/12")
    expect(page.locator(".tokens")).to_have_text(f"{WORDS} Number 12.{END}")
    page.hover(".token >> nth=1")
    expect(page.locator("#tip tr.own td >> nth=1")).to_have_text("90%")
    expect(page.locator("#tip tr")).to_have_count(2)
    likely, unlikely = (
        page.locator(f".token >> nth={i}").evaluate("e => getComputedStyle(e).backgroundColor") for i in (0, 6)
    )
    assert likely != unlikely, "coloured by probability"
    page.keyboard.press("Escape")
    expect(page.locator("#tip")).to_be_hidden()


def test_arrow_keys_and_the_summary(open_page: Callable[..., Page]):
    page = open_page("#/5")
    page.keyboard.press("ArrowDown")
    expect(page.locator("#conversation h2")).to_have_text("Conversation 6")
    page.click("nav a >> text=Summary")
    expect(page.locator("#summary svg")).to_have_count(4)
    expect(page.locator("#list")).to_be_hidden()
    page.click("#summary a >> text=cloze")
    expect(page.locator("#matches")).to_have_text("65 of 130 conversations")


@pytest.mark.parametrize("where", ["#/3", "#/4", "#/summary"])
def test_text_stays_text(open_page: Callable[..., Page], where: str):
    page = open_page(where)
    page.wait_for_timeout(200)
    assert page.title() != "taken"
    assert page.locator("main script, main img").count() == 0
    if where == "#/3":
        expect(page.locator(".tokens")).to_contain_text(EVIL)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_telephone_and_either_scheme(open_page: Callable[..., Page], scheme: Any):
    page = open_page("#/12", viewport={"width": 360, "height": 700}, color_scheme=scheme)
    page.wait_for_selector(".tokens")
    expect(page.locator("#list")).to_be_hidden()
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    text, ground = (page.evaluate(f"getComputedStyle(document.body).{name}") for name in ("color", "backgroundColor"))
    dark = [sum(map(int, re.findall(r"\d+", colour)[:3])) < 384 for colour in (text, ground)]
    assert dark == [scheme == "light", scheme == "dark"]
    page.click(".back")
    expect(page.locator("#rows a").first).to_be_visible()
