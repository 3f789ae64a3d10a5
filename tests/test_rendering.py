"""Token for token: what is trained is what is served, and what the teacher saw, whatever the chat template does."""

from __future__ import annotations

import dataclasses
import datetime
import itertools
import json
import re
from pathlib import Path
from typing import Any

import chat_templates
import pytest
import tiny
from chat_templates import APART, BOS, TEMPLATES

import cartridges_jax as cj
from cartridges_jax.command_line.errors import UserError
from cartridges_jax.initial.initializers import InitConfig
from cartridges_jax.models.hub import resolve
from cartridges_jax.models.tokenizer import Tokenizer, load_tokenizer
from cartridges_jax.serving import generate as generation
from cartridges_jax.training import run as training
from cartridges_jax.training.config import TrainConfig
from cartridges_jax.training.data import example_of, thinking_of
from synth import conversation
from synth.conversation import Conversation, Message, TopLogprobs

CONTEXT = "You know this text well:\n\n<text>\nThe owl sleeps in box 3.\n</text>"
QUESTIONS = ["Who sleeps in box 3?", "Why so?\n", "  Why?\n\n", "List:\n- a\n-  ", "ein Käse\t", "Q: "]
SAID = ["The owl does.", "<think>\nIt flies.\n</think>\n\nThe owl.\n", "hm\n</think>\n\nBecause.", " Yes. "]
MODES = (None, True, False)
KINDS = ("bytes", "pieces")


def asked(questions: list[str], answers: list[str]) -> list[dict[str, str]]:
    """Turns up to a question; one answer fewer than questions."""
    turns = [{"role": "user", "content": questions[0]}]
    for said, question in zip(answers, questions[1:], strict=True):
        turns += [{"role": "assistant", "content": said}, {"role": "user", "content": question}]
    return turns


ROUNDS = [asked([q], []) for q in QUESTIONS] + [
    asked([q, QUESTIONS[i - 1]], [said]) for i, q in enumerate(QUESTIONS) for said in SAID
]


def trained(tokenizer: Tokenizer, turns: list[dict[str, str]], mode: bool | None) -> list[int]:
    """What stands before the last answer in its example; the answer's ids are such as nobody would encode."""
    sampled = (5, 6, 7, 7)
    messages = [Message(one["content"], one["role"]) for one in turns]
    top = TopLogprobs([0, 0, 3], [5, 9, 7], [-0.1, -3.0, -0.2], (4, 2))
    last = Message("whatever it says", "assistant", sampled, top)
    metadata = {} if mode is None else {"thinking": mode}
    example = example_of(Conversation((*messages, last), CONTEXT, metadata), tokenizer)[-1]
    start = len(example.tokens) - len(sampled)
    assert tuple(example.tokens[start:]) == sampled
    assert (example.target_index - start + 1).tolist() == [0, 0, 3] and example.target_ids.tolist() == [5, 9, 7]
    return example.tokens[:start].tolist()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", list(TEMPLATES))
def test_what_is_trained_is_what_is_served_and_what_the_teacher_saw(name: str, kind: str):
    tokenizer = chat_templates.tokenizer(name, kind)
    for turns, mode in itertools.product(ROUNDS, MODES):
        served = tokenizer.turn_ids(turns, add_generation_prompt=True, thinking=mode)
        assert trained(tokenizer, turns, mode) == served
        assert served[0] != tokenizer.bos_id
        if name in APART:
            seen = [{"role": "system", "content": CONTEXT}, *turns]
            teachers = tokenizer.chat_ids(seen, add_generation_prompt=True, thinking=mode)
            assert teachers[len(teachers) - len(served) :] == served
            shown = tokenizer.render_chat(seen, add_generation_prompt=True, thinking=mode)
        else:  # as the template has it without a system message
            shown = tokenizer.render_chat(turns, add_generation_prompt=True, thinking=mode)
            whole = tokenizer.chat_ids(turns, add_generation_prompt=True, thinking=mode)
            assert whole == [tokenizer.bos_id, *served]
        behind = tokenizer.render_turns(turns, add_generation_prompt=True, thinking=mode)
        assert shown.endswith(behind) and not behind.startswith(BOS)
        left_out = shown.removesuffix(behind)
        assert re.sub(r"(<.end.>)?\s*$", "", left_out).endswith(CONTEXT) if name in APART else left_out == BOS


@pytest.mark.parametrize("name", list(TEMPLATES))
def test_no_trace_of_a_probe_is_left(name: str):
    tokenizer = chat_templates.tokenizer(name)
    for turns, mode in itertools.product((asked(["Why"], []), asked(["Why", "How"], ["So"])), MODES):
        behind = tokenizer.render_turns(turns, add_generation_prompt=True, thinking=mode)
        assert "." not in behind and "," not in behind and "helpful" not in behind and "Date" not in behind


def test_qwen3_shows_a_student_the_thinking_that_its_teacher_was_shown():
    tokenizer = chat_templates.tokenizer("qwen3")
    turns = asked(["Who?", "Why?"], ["<think>\nhm\n</think>\n\nThe owl."])
    texts = {mode: tokenizer.decode(trained(tokenizer, turns, mode), skip_special_tokens=False) for mode in MODES}
    plain = "<|user|>\nWho?<|end|>\n<|assistant|>\nThe owl.<|end|>\n<|user|>\nWhy?<|end|>\n<|assistant|>\n"
    assert texts == {None: plain, True: plain, False: plain + "<think>\n\n</think>\n\n"}


def test_r1s_generation_prompt_opens_a_thought_once():
    tokenizer = chat_templates.tokenizer("r1")
    text = tokenizer.decode(trained(tokenizer, asked(["Who?"], []), None), skip_special_tokens=False)
    assert text == "<|user|>Who?<|assistant|><think>\n"


def test_a_system_message_of_the_callers_own_stays_behind_a_cartridge_without_a_second_bos():
    for name in ("qwen3", "llama3", "folded first", "tulu", "deepseek llm", "drops system"):
        tokenizer = chat_templates.tokenizer(name)
        turns = [{"role": "system", "content": "Be brief!"}, *asked(["Who?"], [])]
        whole = tokenizer.chat_ids(turns, add_generation_prompt=True)
        behind = tokenizer.turn_ids(turns, add_generation_prompt=True)
        assert behind == (whole[1:] if whole[0] == tokenizer.bos_id else whole)


def test_a_bos_that_begins_every_turn_stays():
    """SmolLM2's is <|im_start|>."""
    tokenizer = load_tokenizer(resolve("smollm2-135m"))
    assert tokenizer.bos_id == tokenizer.encode("<|im_start|>")[0]
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    for messages in (turns, turns[1:]):
        assert tokenizer.turn_ids(messages, add_generation_prompt=True)[0] == tokenizer.bos_id


def test_single_rounds_of_smollm2_are_laid_out_as_ever():
    tokenizer = load_tokenizer(resolve("smollm2-135m"))
    answer = tuple(tokenizer.encode("The owl.<|im_end|>"))
    for question in QUESTIONS:
        top = TopLogprobs([0], [answer[0]], [-0.1], (len(answer), 1))
        messages = (Message(question, "user"), Message("The owl.", "assistant", answer, top))
        [example] = example_of(Conversation(messages, CONTEXT, {}), tokenizer)
        frame = f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
        assert example.tokens.tolist() == [*tokenizer.encode(frame), *answer]
        if question == question.strip():  # as it was encoded piece by piece
            pieces = ("<|im_start|>user\n", question, "<|im_end|>\n", "<|im_start|>assistant\n")
            assert example.tokens.tolist() == [*itertools.chain(*map(tokenizer.encode, pieces)), *answer]


@pytest.mark.parametrize("kind", KINDS)
def test_an_answer_that_nobody_sampled_follows_its_prompt_as_one_text(kind: str):
    for name, mode in itertools.product(TEMPLATES, MODES):
        tokenizer = chat_templates.tokenizer(name, kind)
        turns = asked(["Who sleeps there?"], [])
        prompt, answer = tokenizer.answered_ids(turns, "The owl does.", thinking=mode)
        assert prompt == tokenizer.turn_ids(turns, add_generation_prompt=True, thinking=mode)
        text = tokenizer.render_chat(turns, add_generation_prompt=True, thinking=mode) + "The owl does."
        assert tokenizer.encode(text)[-len(answer) :] == answer
        alone, same = tokenizer.answered_ids(turns, "The owl does.", behind_cartridge=False, thinking=mode)
        assert alone == tokenizer.chat_ids(turns, add_generation_prompt=True, thinking=mode) and same == answer


def test_the_day_is_the_templates_and_can_be_pinned():
    tokenizer = chat_templates.tokenizer("llama3")
    turns = asked(["Who?"], [])
    today = datetime.date.today().strftime("%d %b %Y")
    assert f"Today Date: {today}" in tokenizer.render_chat(turns, add_generation_prompt=True)
    pinned = tokenizer.on(datetime.date(2025, 3, 1))
    assert "Today Date: 01 Mar 2025" in pinned.render_chat(turns, add_generation_prompt=True)
    assert pinned.turn_ids(turns, add_generation_prompt=True) == tokenizer.turn_ids(turns, add_generation_prompt=True)
    assert pinned.rendering != tokenizer.rendering != tokenizer.on(datetime.date(2025, 3, 2)).rendering


def test_a_mode_of_thinking_that_is_none_is_refused():
    messages = (Message("Q", "user"), Message("A", "assistant"))
    with pytest.raises(UserError, match="thinking 'yes', expected true, false or no such key"):
        example_of(Conversation(messages, "", {"thinking": "yes"}), chat_templates.tokenizer("qwen3"))


def test_a_prompt_behind_a_cartridge_has_no_bos(monkeypatch: pytest.MonkeyPatch):
    model = dataclasses.replace(tiny.model(), tokenizer=chat_templates.tokenizer("tulu"))
    prompts: list[tuple[int, ...]] = []
    monkeypatch.setattr(generation, "generate_ids", lambda _, given, *rest: prompts.extend(given) or [[]])
    cj.generate(model, ["Hi"])
    cj.generate(model, ["Hi"], cartridge=cj.Cartridge.from_tokens(model, [1, 2, 3]))
    assert prompts == [(model.tokenizer.bos_id, *prompts[1]), tuple(model.tokenizer.encode("Hi"))]


@pytest.mark.parametrize("kind", KINDS)
def test_a_rendered_text_reads_behind_a_cartridge_as_its_turns_do(kind: str, monkeypatch: pytest.MonkeyPatch):
    """SentencePiece would put a space before one that begins without a special token."""
    prompts: list[tuple[int, ...]] = []
    monkeypatch.setattr(generation, "generate_ids", lambda _, given, *rest: prompts.extend(given) or [[]])
    for name in TEMPLATES:
        tokenizer = chat_templates.tokenizer(name, kind)
        model = dataclasses.replace(tiny.model(), tokenizer=tokenizer)
        cartridge = cj.Cartridge.from_tokens(model, [1, 2, 3])
        for turns, mode in itertools.product([*ROUNDS[:6], *ROUNDS[6::5]], MODES):
            text = tokenizer.render_turns(turns, add_generation_prompt=True, thinking=mode)
            cj.generate(model, [text], cartridge=cartridge)
            assert prompts.pop() == tuple(tokenizer.turn_ids(turns, add_generation_prompt=True, thinking=mode))


@pytest.mark.parametrize("name", list(TEMPLATES))
def test_a_template_is_rendered_as_transformers_renders_it(name: str):
    """Which lets nobody say what day it is."""
    tokenizer = chat_templates.tokenizer(name)
    for turns, mode, asked_for in itertools.product(ROUNDS[:8], MODES, (True, False)):
        options: dict[str, Any] = {"add_generation_prompt": asked_for}
        switch = {} if mode is None else {"enable_thinking": mode}
        expected = tokenizer._wrapped.apply_chat_template(turns, tokenize=False, **options, **switch)
        assert tokenizer.render_chat(turns, thinking=mode, **options) == expected


def test_the_header_keeps_the_mode_of_thinking(tmp_path: Path):
    model = tiny.model()
    made = {}
    for mode in MODES:
        bare = cj.Cartridge.from_tokens(model, [1, 2, 3])
        kept = bare.replace(provenance=dataclasses.replace(bare.provenance, thinking=mode))
        kept.save(tmp_path / f"{mode}.safetensors")
        made[mode] = cj.Cartridge.load(tmp_path / f"{mode}.safetensors", model=model)
        assert made[mode].provenance.as_dict().get("thinking", "absent") == ("absent" if mode is None else mode)
        assert made[mode].thinking is mode
        assert cj.compose([made[mode], made[mode]]).thinking is mode
    assert cj.compose([made[True], made[False]]).thinking is None
    assert cj.compose([made[None], made[False]]).thinking is None


@pytest.mark.parametrize(
    "modes, kept",
    [([True, True], True), ([False], False), ([True, False], None), ([None, False], None), ([None], None)],
)
def test_a_datasets_mode_is_that_of_all_its_conversations(tmp_path: Path, modes: list[bool | None], kept: bool | None):
    turns = (Message("Q", "user"), Message("A", "assistant"))
    told = [{} if mode is None else {"thinking": mode} for mode in modes]
    conversation.write(tmp_path / "d.parquet", [Conversation(turns, "", one) for one in told])
    assert thinking_of(tmp_path / "d.parquet") is kept


def test_a_run_that_goes_on_tomorrow_renders_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model = dataclasses.replace(tiny.model(), tokenizer=chat_templates.tokenizer("llama3"))
    top = TopLogprobs([0], [5], [-0.1], (1, 1))
    turns = (Message("Be brief.", "system"), Message("Who?", "user"), Message("I", "assistant", (5,), top))
    conversation.write(tmp_path / "d.parquet", [Conversation(turns, "", {"thinking": False})])
    (tmp_path / "corpus.txt").write_text(tiny.TEXT)

    def run(name: str, day: datetime.date) -> tuple[dict[str, Any], list[str], list[int]]:
        class Calendar(datetime.date):
            @classmethod
            def today(cls) -> datetime.date:
                return day

        monkeypatch.setattr(training.datetime, "date", Calendar)
        shown: list[Any] = []
        rows = training.PackedRows
        monkeypatch.setattr(
            training, "PackedRows", lambda examples, *rest: shown.extend(examples) or rows(examples, *rest)
        )
        settings = TrainConfig(
            corpus=str(tmp_path / "corpus.txt"),
            output_dir=str(tmp_path / name),
            dataset=str(tmp_path / "d.parquet"),
            num_steps=0,
            seq_len=256,
            init=InitConfig(kind="text", num_slots=4),
        )
        path = training.train(settings, model)
        assert cj.Cartridge.load(path).thinking is False
        monkeypatch.undo()
        record = json.loads((tmp_path / name / "config.json").read_text())
        return record, sorted(p.name for p in (tmp_path / name / "examples").iterdir()), shown[0].tokens.tolist()

    first, second = datetime.date(2025, 3, 1), datetime.date(2025, 3, 2)
    begun = run("one", first)
    assert begun[0]["day"] == "2025-03-01"
    assert "Today Date: 01 Mar 2025" in model.tokenizer.decode(begun[2])
    assert run("one", second) == begun
    assert "Today Date: 02 Mar 2025" in model.tokenizer.decode(run("two", second)[2])
