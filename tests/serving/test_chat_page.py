"""The page at `/`, in headless Chromium, against a server whose model says what a test wants."""

from __future__ import annotations

import random
import re
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from browser import chromium
from playwright.sync_api import Browser, Error, Page, Route, expect
from running import running  # pyrefly: ignore[missing-import] (pytest puts this folder on the path)
from test_server import END, TOKENIZER, FakeCartridge, ScriptEngine  # pyrefly: ignore[missing-import]

from cartridges_jax.serving.server import Server
from cartridges_jax.serving.store import CartridgeStore

EVIL = "<img src=x onerror=\"document.title='taken'\"> [a](javascript:b)"
SAID = f"""## Sizes
A **bold** one, *softly*, `a_b` and snake_case_word.

- first
- second
  1. inner

| part | size |
|--|-:|
| lid | 4 cm |

```python
print("**not bold**")
```
> said
{EVIL}"""
DOCUMENT = "The lid is 4 cm wide. " * 8


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as found:
        yield found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cartridges")
    (folder / "manual.safetensors").write_text("five!")
    (folder / "wrong.safetensors").write_text("bad")
    return folder


@pytest.fixture
def serve_page(folder: Path) -> Iterator[Callable[..., str]]:
    servers = []

    def start(said: str = SAID, pause: float = 0.0, **options: Any) -> str:
        engine = ScriptEngine([*said.encode(), END], max_num_seqs=2, max_length=900, pause=pause)
        store = CartridgeStore(folder, FakeCartridge, compose=FakeCartridge.compose)
        options = {"kv_bytes_per_token": 1000, "document": DOCUMENT, **options}
        server = running(Server(engine, TOKENIZER, store, "tiny", rng=random.Random(0), **options))
        servers.append(server)
        return server.__enter__()

    yield start
    for server in servers:
        server.__exit__(None, None, None)


@pytest.fixture
def open_page(browser: Browser) -> Iterator[Callable[..., Page]]:
    pages: list[Page] = []
    complaints: list[str] = []

    def open_one(
        url: str, where: str = "/", quiet: bool = True, held: list[Route] | None = None, **settings: Any
    ) -> Page:
        page = browser.new_page(**settings)
        pages.append(page)
        if held is not None:  # then the page waits for what the server has, until the test lets it go on
            page.route("**/v1/models", lambda request: held.append(request))
        if quiet:
            page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda r: complaints.append(r.url) if not r.url.startswith((url, "data:")) else None)
        page.goto(url + where)
        return page

    yield open_one
    for page in pages:
        page.close()
    assert not complaints, "the console is silent, and nothing but this server is asked"


def test_chatting_with_a_cartridge(serve_page: Callable[..., str], open_page: Callable[..., Page]):
    page = open_page(serve_page(document=None), quiet=False)  # no document is a 404, which the console tells
    expect(page.locator("#cartridge")).to_have_value("manual")
    expect(page.locator("#about")).to_contain_text("5")
    page.fill("#question", "How wide is the lid?")
    page.press("#question", "Enter")
    said = page.locator(".assistant .said")
    expect(said.locator("strong")).to_have_text("bold")
    expect(said.locator("em")).to_have_text("softly")
    expect(said.locator("ul > li > ol > li")).to_have_text("inner")
    expect(said.locator("tbody td").last).to_have_text("4 cm")
    expect(said.locator("pre")).to_have_text('print("**not bold**")')
    expect(said.locator("blockquote")).to_contain_text("said")
    expect(said).to_contain_text("snake_case_word")
    expect(page.locator(".figures")).to_contain_text("5 slots + ")
    expect(page.locator(".figures")).to_contain_text("kB of KV")
    expect(said).to_contain_text(EVIL)
    assert said.locator("img, a, script").count() == 0 and page.title() == "Cartridges", "text stays text"
    page.fill("#question", "And then?")
    page.click("#send")
    expect(page.locator(".message")).to_have_count(4)
    page.click("#clear")
    expect(page.locator(".message")).to_have_count(0)


def test_stopping_frees_the_slot_and_keeps_what_was_said(
    serve_page: Callable[..., str], open_page: Callable[..., Page]
):
    page = open_page(serve_page("word " * 100, pause=0.01))
    expect(page.locator("#cartridge")).to_have_value("manual")
    page.fill("#question", "Talk")
    page.click("#send")
    expect(page.locator(".assistant .said")).to_contain_text("word")
    page.click("#stop")
    expect(page.locator(".figures")).to_have_text("stopped")
    assert len(page.inner_text(".assistant .said")) < 490
    expect(page.locator("#send")).to_be_visible()


def test_a_server_that_starts_says_so(serve_page: Callable[..., str], open_page: Callable[..., Page]):
    gates = [threading.Event(), threading.Event()]
    page = open_page(
        serve_page(programs=[partial(gate.wait, 20) for gate in gates]), quiet=False
    )  # 503s, which the console tells
    starting = page.locator("#starting")
    expect(starting).to_have_text(
        "The server is starting: 0 of 2 programs are compiled. What you ask is answered then."
    )
    gates[0].set()
    expect(starting).to_contain_text("1 of 2 programs are compiled, about ")
    page.fill("#question", "How wide is the lid?")
    page.press("#question", "Enter")
    expect(page.locator(".assistant .said.waiting")).to_be_visible()
    gates[1].set()
    expect(page.locator(".assistant .said strong")).to_have_text("bold")
    expect(starting).to_be_hidden()


def test_comparing_side_by_side(serve_page: Callable[..., str], open_page: Callable[..., Page]):
    page = open_page(serve_page(), "/#compare")
    expect(page.locator("#size")).to_have_text(f"{len(DOCUMENT)} characters")
    page.fill("#same", "How wide is the lid?")
    page.click("#send-all")
    columns = page.locator(".column")
    expect(columns).to_have_count(3)
    for column in columns.all():
        expect(column.locator("strong")).to_have_text("bold")
        expect(column.locator("dd")).to_have_count(3)
    kv = [float(column.locator("dd").last.inner_text().split()[0]) for column in columns.all()]
    assert kv[0] < kv[1] < kv[2], "nothing, five slots, the whole document"
    page.click("#text summary")
    page.fill("#document", "")
    page.select_option("#cartridge", "")
    page.click("#send-all")
    expect(columns.nth(1)).to_contain_text("choose one")
    expect(columns.nth(2)).to_contain_text("paste it above")
    expect(columns.nth(0).locator("dd")).to_have_count(3)


def test_errors_are_shown(serve_page: Callable[..., str], open_page: Callable[..., Page]):
    page = open_page(serve_page(), quiet=False)
    page.select_option("#cartridge", "wrong")
    expect(page.locator("#about [role=alert]")).to_contain_text("made for another model")
    page.fill("#question", "why?")
    page.press("#question", "Enter")
    expect(page.locator("#problem")).to_contain_text("made for another model")
    page.select_option("#cartridge", "")
    page.fill("#question", "x" * 1000)
    page.click("#send")
    expect(page.locator("#problem")).to_contain_text("maximum context length is 900 tokens")
    expect(page.locator("#question")).to_have_value("x" * 1000)
    expect(page.locator(".message")).to_have_count(0)
    page.fill("#question", "shorter")
    page.click("#send")
    expect(page.locator(".assistant .said strong")).to_have_text("bold")
    expect(page.locator("#problem")).to_be_empty()


def test_a_full_context_drops_its_oldest_turns(serve_page: Callable[..., str], open_page: Callable[..., Page]):
    page = open_page(serve_page("It is four centimetres wide. " * 5), quiet=False)
    page.select_option("#cartridge", "")
    figures = page.locator(".figures")
    for i in range(6):
        page.fill("#question", f"Question {i}: how wide is the lid, in centimetres and in inches?")
        page.press("#question", "Enter")
        expect(figures.nth(i)).to_contain_text("tokens/s")
    line = page.locator(".full")
    expect(line).to_have_count(1)
    expect(line).to_have_text("The context is full: the model no longer knows what stands above this line.")
    kinds = page.locator("#messages > *").evaluate_all("all => all.map(one => one.className)")
    assert 0 < kinds.index("full quiet") < 6 and len(kinds) == 7, "nothing has left the page"
    told = [int(re.findall(r"(\d+) tokens\b", text)[-1]) for text in figures.all_inner_texts()]
    assert told[0] < told[1] < told[2] and max(told) <= 900, "and the model was told as much as fits"
    page.click("#clear")
    expect(page.locator("#messages > *")).to_have_count(1)


@pytest.mark.parametrize("view", ["chat", "compare"])
def test_a_question_waits_for_what_the_page_has_to_know(
    view: str, serve_page: Callable[..., str], open_page: Callable[..., Page]
):
    """A question that is sent while the list of cartridges is on its way is answered with what that list chooses."""
    held: list[Route] = []
    page = open_page(serve_page(), f"/#{view}", quiet=False, held=held)
    field, said = {"chat": ("#question", ".figures"), "compare": ("#same", ".column.cartridge")}[view]
    expect(page.locator("#cartridge")).to_be_disabled()
    page.locator("#document").evaluate("field => { field.value = 'Mine.'; }")
    page.fill(field, "How wide is the lid?")
    page.press(field, "Enter")
    page.wait_for_timeout(200)
    held[0].continue_()
    expect(page.locator(said)).to_contain_text("5 slots + ")
    expect(page.locator("#cartridge")).to_be_enabled()
    expect(page.locator("#problem")).to_be_empty()
    expect(page.locator("#document")).to_have_value("Mine.")


def test_a_choice_outlives_a_new_key(serve_page: Callable[..., str], open_page: Callable[..., Page]):
    page = open_page(serve_page(), quiet=False)
    page.select_option("#cartridge", "")
    page.evaluate("document.querySelector('#login').hidden = false")
    page.fill("#key", "anything")
    page.press("#key", "Enter")
    expect(page.locator("#login")).to_be_hidden()
    expect(page.locator("#cartridge")).to_have_value("")


def test_keys_and_focus(serve_page: Callable[..., str], open_page: Callable[..., Page]):
    page = open_page(serve_page("word " * 100, pause=0.01))
    expect(page.locator("#question")).to_be_focused()
    page.keyboard.type("Talk")
    page.keyboard.press("Enter")
    expect(page.locator(".assistant .said")).to_contain_text("word")
    page.keyboard.press("Escape")
    expect(page.locator(".figures")).to_have_text("stopped")
    expect(page.locator("#question")).to_be_focused()
    page.click("nav a[data-view=compare]")
    expect(page.locator("#same")).to_be_focused()
    page.keyboard.type("Talk")
    page.keyboard.press("Enter")
    expect(page.locator(".column .said").first).to_contain_text("word")
    page.keyboard.press("Escape")
    expect(page.locator(".column .error")).to_have_text("stopped")


def test_a_server_that_is_gone_is_said_in_plain_words(folder: Path, open_page: Callable[..., Page]):
    engine = ScriptEngine([*b"word " * 100, END], max_num_seqs=2, max_length=900, pause=0.01)
    server = Server(engine, TOKENIZER, CartridgeStore(folder, FakeCartridge), "tiny", document=DOCUMENT)
    gone = "The server cannot be reached: it may have been stopped. Send again when it runs."
    with running(server) as url:
        page = open_page(url, quiet=False)
        expect(page.locator("#cartridge")).to_have_value("manual")
        page.fill("#question", "Talk")
        page.press("#question", "Enter")
        expect(page.locator(".assistant .said")).to_contain_text("word")
    expect(page.locator(".figures .error")).to_have_text(re.compile("stopping|cannot be reached"))
    page.fill("#question", "And then?")
    page.press("#question", "Enter")
    expect(page.locator("#problem")).to_have_text(gone)
    expect(page.locator("#question")).to_have_value("And then?")
    expect(page.locator(".message")).to_have_count(2)


def test_the_key_is_asked_for(serve_page: Callable[..., str], open_page: Callable[..., Page]):
    page = open_page(serve_page(api_key="secret"), quiet=False)
    expect(page.locator("#login")).to_be_visible()
    expect(page.locator("#refused")).to_be_empty()
    page.fill("#question", "Is it there?")
    page.press("#question", "Enter")
    expect(page.locator("#problem")).to_have_text("The server wants its API key: give it above, then send again.")
    page.fill("#key", "wrong")
    page.click("#login button")
    expect(page.locator("#refused")).to_have_text("The server does not know this key: check it, and try again.")
    page.fill("#key", "secret")
    page.press("#key", "Enter")
    expect(page.locator("#login")).to_be_hidden()
    expect(page.locator("#problem")).to_be_empty()
    expect(page.locator("#question")).to_have_value("Is it there?")
    expect(page.locator("#question")).to_be_focused()
    expect(page.locator("#cartridge")).to_have_value("manual")
    page.goto(page.url + "#compare")
    expect(page.locator("#document")).to_have_value(DOCUMENT)


ASK = """async ([url, key]) => {
  const headers = { Authorization: `Bearer ${key}`, "Content-Type": "application/json" };
  const body = JSON.stringify({ messages: [{ role: "user", content: "hi" }], max_tokens: 4 });
  const response = await fetch(`${url}/v1/chat/completions`, { method: "POST", headers, body });
  return [response.status, response.headers.get("X-Request-Id").length, (await response.json()).object];
}"""


def test_a_browser_lets_the_page_of_an_allowed_site_ask(serve_page: Callable[..., str], browser: Browser):
    page = browser.new_page()
    site = serve_page()
    page.goto(f"{site}/ping")  # a page of this site that may ask others
    asked = serve_page(allow_origins=[site], api_key="secret")
    assert page.evaluate(ASK, [asked, "secret"]) == [200, 32, "chat.completion"]
    assert page.evaluate(ASK, [asked, "wrong"])[0] == 401
    with pytest.raises(Error, match="Failed to fetch"):
        page.evaluate(ASK, [serve_page(), ""])
    page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_telephone_and_either_scheme(
    serve_page: Callable[..., str], open_page: Callable[..., Page], scheme: Any
):
    page = open_page(serve_page(), viewport={"width": 360, "height": 700}, color_scheme=scheme)
    expect(page.locator("#cartridge")).to_have_value("manual")
    page.fill("#question", "How?")
    page.click("#send")
    expect(page.locator(".figures")).to_contain_text("KV")
    page.click("#clear")
    expect(page.locator(".message")).to_have_count(0)
    for view in ("chat", "compare"):
        page.click(f"nav a[data-view={view}]")
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
    text, ground = (page.evaluate(f"getComputedStyle(document.body).{name}") for name in ("color", "backgroundColor"))
    dark = [sum(map(int, part[4:-1].split(","))) < 384 for part in (text, ground)]
    assert dark == [scheme == "light", scheme == "dark"]
