"""What self-study can be told to do: contexts, seed prompts, thinking, tools, two models, conversations that exist."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import random
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from stub_server import MODEL, StubServer

from cartridges_jax.command_line.errors import UserError
from synth import conversation, seed_prompts
from synth.config import ClientConfig, ExistingConfig, SamplingConfig, SynthConfig, ToolsConfig
from synth.conversation import Conversation
from synth.pipeline import synthesize
from synth.seed_prompts import SeedPrompt
from synth.self_study import strip_thinking

MakeConfig = Callable[..., SynthConfig]


def make(config: SynthConfig) -> list[Conversation]:
    return conversation.read(asyncio.run(synthesize(config)))


class Speaker(StubServer):
    """Says what `speak` makes of a request; every word has the same id."""

    speak: Callable[[dict[str, Any]], str]

    def _answer(self, body: dict[str, Any]) -> dict[str, Any]:
        text = self.speak(body)
        ids = list(text.encode())
        others = [self._entry(2000 + j, -9.0 - j) for j in range(1, body.get("top_logprobs", 1))]
        entries = [{**self._entry(i, -0.1), "top_logprobs": [self._entry(i, -0.1), *others]} for i in ids]
        choice = {"message": {"content": text}, "finish_reason": "stop", "token_ids": ids}
        return {"choices": [choice | ({"logprobs": {"content": entries}} if body.get("logprobs") else {})]}


@pytest.fixture
def speaker(make_config: MakeConfig) -> Any:
    stub = Speaker().start()
    yield stub
    stub.stop()


def asked_of(server: StubServer) -> list[list[tuple[str, str]]]:
    return [[(m["role"], m["content"]) for m in body["messages"]] for body in server.requests]


def test_several_chunks_each_behind_the_description(server: StubServer, make_config: MakeConfig):
    config = make_config(chunks_per_context=3, description="A list of what is stored where.", num_conversations=8)
    document = Path(config.resource.path).read_text(encoding="utf-8").encode()
    for one in make(config):
        spans = one.metadata["chunk_spans"]
        assert len(spans) == 3 and one.metadata["chunk_span"] == spans[0]
        assert one.system_prompt.count("A list of what is stored where.\n\n") == 3
        for start, end in spans:
            assert document[start:end].decode(errors="ignore") in one.system_prompt
        assert len({start for start, _ in spans}) == 3, "spread over the document"


def test_questions_of_one_list(speaker: Speaker, make_config: MakeConfig):
    def speak(body: dict[str, Any]) -> str:
        task = body["messages"][-1]["content"]
        return "Here:\n1. Who?\n2) What?\n**3.** Where?" if "Number the results" in task else f"About {task}"

    speaker.speak = speak
    client = ClientConfig(speaker.url, MODEL, timeout_seconds=30.0)
    config = make_config(client=client, questions_per_call=3, conversations_per_chunk=6, num_conversations=12)
    made = make(config)
    assert [one.messages[0].content for one in made] == ["Who?", "What?", "Where?"] * 4
    assert [one.messages[1].content for one in made] == ["About Who?", "About What?", "About Where?"] * 4
    lists = [body for body in speaker.requests if "Number the results" in body["messages"][-1]["content"]]
    assert len(lists) == 4 and all(body["max_tokens"] == 3 * 512 for body in lists)
    assert [len({one.metadata["seed_prompt"] for one in made[i : i + 3]}) for i in (0, 3, 6, 9)] == [1] * 4
    assert all(one.messages[0].token_ids is None for one in made)


def test_a_list_that_is_too_short_is_asked_for_again_then_used(speaker: Speaker, make_config: MakeConfig):
    speaker.speak = lambda body: "1. Who?" if "Number the results" in body["messages"][-1]["content"] else "He."
    client = ClientConfig(speaker.url, MODEL, timeout_seconds=30.0)
    made = make(make_config(client=client, questions_per_call=2, conversations_per_chunk=2, num_conversations=4))
    assert [one.messages[0].content for one in made] == ["Who?", "Who?"], "those without a question are filtered"
    assert sum("Number the results" in body["messages"][-1]["content"] for body in speaker.requests) == 6


def test_questions_by_another_model(server: StubServer, speaker: Speaker, make_config: MakeConfig):
    speaker.speak = lambda body: "Why so?"
    asking = ClientConfig(speaker.url, "other", timeout_seconds=30.0)
    made = make(make_config(question_client=asking))
    assert len(made) == 10 and all(one.messages[0].content == "Why so?" for one in made)
    assert all(one.messages[0].token_ids is None and one.messages[1].token_ids for one in made)
    assert {body["model"] for body in speaker.requests} == {"other"}
    assert {body["model"] for body in server.requests} == {MODEL}
    assert {(one.metadata["question_model"], one.metadata["model"]) for one in made} == {("other", MODEL)}


def test_thinking_is_drawn_once_a_conversation_and_recorded(speaker: Speaker, make_config: MakeConfig):
    def speak(body: dict[str, Any]) -> str:
        thinks = body["chat_template_kwargs"]["enable_thinking"]
        return "<think>\nhm\n</think>\n\nSo it is." if thinks else "It is."

    speaker.speak = speak
    client = ClientConfig(speaker.url, MODEL, timeout_seconds=30.0)
    config = make_config(
        client=client,
        num_conversations=60,
        conversations_per_chunk=20,
        rounds=2,
        question=SamplingConfig(thinking=0.5),
        answer=SamplingConfig(thinking=0.25, thinking_instruction="Think first."),
    )
    made = make(config)
    assert 0.12 < sum(one.metadata["thinking"] for one in made) / len(made) < 0.4
    asked = set()
    for one in made:
        thinks, questions = one.metadata["thinking"], [one.messages[i] for i in (0, 2)]
        assert all(one.messages[i].content.startswith("<think>") == thinks for i in (1, 3))
        assert all(question.content.endswith("\n\nThink first.") == thinks for question in questions)
        said = [question.content.removesuffix("\n\nThink first.") for question in questions]
        assert said in (["So it is."] * 2, ["It is."] * 2), "nobody is asked a thought"
        asked.add(said[0])
        for question in questions:
            assert (question.token_ids is None) == (thinks or said[0] == "So it is."), "of a text that was changed"
    assert len(asked) == 2
    told = [(body["messages"][1:], body["chat_template_kwargs"]["enable_thinking"]) for body in speaker.requests]
    taught = [shown for body, shown in zip(speaker.requests, told, strict=True) if body.get("logprobs")]
    for one in made:
        turns = [{"role": message.role, "content": message.content} for message in one.messages]
        assert (turns[:1], one.metadata["thinking"]) in taught
        assert (turns[:3], one.metadata["thinking"]) in taught, "earlier turns reach the template as they are kept"
    for body in speaker.requests:
        if not body.get("logprobs"):
            assert not any(text in m["content"] for m in body["messages"] for text in ("<think>", "Think first."))


def test_what_is_spoken():
    assert strip_thinking("<think>a</think>\n\nb") == "b" and strip_thinking("a\n") == "a\n"
    assert strip_thinking("<think>cut") == "" and strip_thinking("2 < 3 <think>") == "2 < 3 <think>"


def test_nobody_is_told_of_thinking_unasked(server: StubServer, make_config: MakeConfig):
    make(make_config(num_conversations=1))
    assert not any("chat_template_kwargs" in body for body in server.requests)
    assert all((body["top_k"], body["min_p"]) == (0, 0.0) for body in server.requests)


@pytest.mark.parametrize("sides", [("answer",), ("question",), ("question", "answer")])
def test_tools_may_be_used_by_either_side(speaker: Speaker, make_config: MakeConfig, sides: Any):
    def speak(body: dict[str, Any]) -> str:
        wants_call = "<tools>" in body["messages"][-1]["content"]
        return '<tool_call>{"name": "search", "arguments": {"query": "item 41"}}</tool_call>' if wants_call else "Yes?"

    speaker.speak = speak
    client = ClientConfig(speaker.url, MODEL, timeout_seconds=30.0)
    tools = ToolsConfig(search=True, sides=sides)
    (made,) = make(make_config(client=client, num_conversations=1, tools=tools, seed_prompts=("question",)))
    assert [c["name"] for c in made.metadata["tool_calls"]] == ["search"] * len(sides)
    assert all(c["success"] and "item 41 weighs" in c["output"] for c in made.metadata["tool_calls"])
    assert made.system_prompt.count("<tool_output>") == len(sides)
    *_, question, answer = [m for m in asked_of(speaker) if "<tools>" not in m[-1][1]]
    assert ("<tool_output>" in question[0][1]) == ("question" in sides)
    assert answer[0] == ("system", made.system_prompt), "both see what was found, from then on"
    assert not any("tool_call" in message.content for message in made.messages)


def test_seed_prompts_of_a_file_and_of_a_function(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "mine.txt").write_text("Ask about\nweights.\n\n \nAsk about boxes.\n")
    (tmp_path / "my_prompts.py").write_text(
        "from synth.seed_prompts import SeedPrompt\n"
        "def plain(chunk, rng): return f'Ask about {chunk} or {rng.randrange(9)}.'\n"
        "def whole(chunk, rng): return SeedPrompt('mine', 'What is it?', is_question=True)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    rng = random.Random(0)
    drawn = [seed_prompts.draw((str(tmp_path / "mine.txt"),), "x", rng) for _ in range(50)]
    assert {prompt.text for prompt in drawn} == {"Ask about\nweights.", "Ask about boxes."}
    assert {prompt.kind for prompt in drawn} == {"mine"}
    plain = seed_prompts.draw(("my_prompts:plain",), "x", random.Random(1))
    assert plain == seed_prompts.draw(("my_prompts:plain",), "x", random.Random(1))
    assert plain.kind == "my_prompts:plain" and plain.text.startswith("Ask about x or ")
    assert seed_prompts.draw(("my_prompts:whole",), "x", rng) == SeedPrompt("mine", "What is it?", True)
    sys.modules.pop("my_prompts", None)
    for kind, sentence in (
        (str(tmp_path / "no.txt"), r"no\.txt does not exist: expected the seed prompts"),
        ("my_prompts:no", "cannot be imported"),
        ("no_such:thing", "cannot be imported"),
        ("clozee", "did you mean 'cloze'"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=sentence):
            seed_prompts.check((kind,), ())


def test_weights_and_the_looser_prompts():
    rng = random.Random(0)
    kinds = Counter(
        seed_prompts.draw(("generic", "qa", "cloze"), "x y z", rng, (3.0, 1.0, 0.0)).kind for _ in range(4000)
    )
    assert 0.72 < kinds["generic"] / 4000 < 0.78 and kinds["generic"] + kinds["qa"] == 4000
    for weights in ((1.0,), (1.0, -1.0), (0.0, 0.0)):
        with pytest.raises(UserError, match=r"config\.seed_prompt_weights is .* expected 2 numbers"):
            seed_prompts.check(("generic", "qa"), weights)


def test_a_list_cannot_end_at_a_line_break(make_config: MakeConfig):
    with pytest.raises(UserError, match=r"config\.questions_per_call asks for a list"):
        make_config(questions_per_call=2, question=SamplingConfig(stop=("\n",)))
    with pytest.raises(UserError, match=r"config\.answer\.thinking is 2"):
        make_config(answer=SamplingConfig(thinking=2.0))


class Scorer(StubServer):
    """A server with vLLM's prompt_logprobs, whose template is one byte before and after each content."""

    def _chat_ids(self, body: dict[str, Any]) -> list[int]:
        text = "".join(f"{m['role'][0]}:{m['content']}~" for m in body["messages"])
        return list((text + ("a:" if body["add_generation_prompt"] else "")).encode())

    async def _tokenize(self, request: Any) -> Any:
        from aiohttp import web

        body = await request.json()
        return (
            web.json_response({"tokens": self._chat_ids(body)})
            if "messages" in body
            else await super()._tokenize(request)
        )

    def _answer(self, body: dict[str, Any]) -> dict[str, Any]:
        if "prompt_logprobs" not in body:
            return super()._answer(body)
        ids = self._chat_ids(body)
        rows: list[Any] = [None]
        for token in ids[1:]:  # the two best, and the prompt's own, which is not among them
            others = [(i, -6.0 - i) for i in range(3, body["prompt_logprobs"] + 1)]
            rows.append({str(i): {"logprob": lp} for i, lp in ((token, -5.0), (1, -0.5), (2, -1.5), *others)})
        usage = {"prompt_tokens": len(ids), "completion_tokens": 1}
        choice = {"message": {"content": "x"}, "finish_reason": "length"}
        return {"choices": [choice], "usage": usage, "prompt_token_ids": ids, "prompt_logprobs": rows}


@pytest.fixture
def scorer() -> Any:
    stub = Scorer().start()
    yield stub
    stub.stop()


def write_logs(path: Path, count: int, **more: Any) -> str:
    lines = []
    for i in range(count):
        said = [("user", f"q{i}"), ("assistant", f"answer {i}"), ("user", "and?"), ("assistant", "so.")]
        lines.append(json.dumps({"messages": [{"role": r, "content": c} for r, c in said], **more}))
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def test_existing_conversations_are_scored_in_context(scorer: Scorer, make_config: MakeConfig, tmp_path: Path):
    logs = write_logs(tmp_path / "logs.jsonl", 12)
    client = ClientConfig(scorer.url, MODEL, timeout_seconds=30.0)
    made = make(make_config(client=client, distill_existing=ExistingConfig(logs), top_logprobs=2))
    assert [one.messages[0].content for one in made] == [f"q{i}" for i in range(10)]
    for one in made:
        assert one.type == "distill_existing" and one.metadata["seed_prompt_type"] == "existing"
        assert "Line" in one.system_prompt and one.metadata["context"] is True
        for message in one.messages[1::2]:
            assert bytes(message.token_ids or ()).decode() == message.content + "~", "with the end of the turn"
            assert message.top_logprobs and message.top_logprobs.shape == (len(message.content) + 1, 2)
            assert message.top_logprobs.token_id.tolist() == [1, 2] * (len(message.content) + 1)
        assert all(message.token_ids is None for message in one.messages[0::2])
    assert all("prompt_logprobs" in body for body in scorer.requests), "nothing is sampled"


def test_a_line_may_bring_its_own_context(scorer: Scorer, make_config: MakeConfig, tmp_path: Path):
    logs = write_logs(tmp_path / "logs.jsonl", 2, context="Its very own.")
    client = ClientConfig(scorer.url, MODEL, timeout_seconds=30.0)
    made = make(make_config(client=client, distill_existing=ExistingConfig(logs), num_conversations=2))
    assert all("Its very own." in one.system_prompt and "Line" not in one.system_prompt for one in made)


def test_general_instructions_mixed_in_without_context(scorer: Scorer, make_config: MakeConfig, tmp_path: Path):
    logs = write_logs(tmp_path / "general.jsonl", 4)
    client = ClientConfig(scorer.url, MODEL, timeout_seconds=30.0)
    mixed = make_config(client=client, distill_existing=ExistingConfig(logs, 0.1, False), num_conversations=40)
    made = make(mixed)
    given = [one for one in made if one.type == "distill_existing"]
    assert [one.messages[0].content for one in given] == ["q0", "q1", "q2", "q3"]
    assert [one.metadata["conversation_index"] for one in given] == [9, 19, 29, 39]
    assert all(one.system_prompt == "" for one in given) and len(made) == 40
    scored = [body for body in scorer.requests if "prompt_logprobs" in body]
    assert not any(message["role"] == "system" for body in scored for message in body["messages"])
    with pytest.raises(UserError, match=r"holds 4 conversations, but 5 of 50 conversations are to come from there"):
        make(dataclasses.replace(mixed, num_conversations=50, output_dir=mixed.output_dir + "2"))


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("{", "logs.jsonl:1 is no conversation"),
        ('{"messages": [{"role": "user"}]}', "is no conversation"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "does not end with an answer"),
        ('{"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]}', "in turn"),
        ('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": ""}]}', "empty message"),
    ],
)
def test_bad_lines_are_one_sentence(
    server: StubServer, make_config: MakeConfig, tmp_path: Path, line: str, sentence: str
):
    (tmp_path / "logs.jsonl").write_text(line)
    with pytest.raises(UserError, match=sentence):
        make(make_config(distill_existing=ExistingConfig(str(tmp_path / "logs.jsonl")), num_conversations=1))


def test_a_server_that_scores_nothing_is_refused(server: StubServer, make_config: MakeConfig, tmp_path: Path):
    logs = write_logs(tmp_path / "logs.jsonl", 1)
    with pytest.raises(UserError, match="gives no prompt_logprobs: vLLM and"):
        make(make_config(distill_existing=ExistingConfig(logs), num_conversations=1))
