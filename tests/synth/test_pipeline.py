from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from stub_server import MODEL, StubServer

from cartridges_jax.command_line.errors import UserError
from cartridges_jax.command_line.files import locked
from synth import conversation, pipeline
from synth.clients.base import Unavailable
from synth.config import ChunkerConfig, ClientConfig, FilterConfig, SamplingConfig, SynthConfig
from synth.dry_run import describe
from synth.pipeline import synthesize

MakeConfig = Callable[..., SynthConfig]


def make(config: SynthConfig) -> list[conversation.Conversation]:
    return conversation.read(asyncio.run(synthesize(config)))


def parts(config: SynthConfig) -> list[Path]:
    return sorted((Path(config.output_dir) / "parts").iterdir())


def test_conversations(server: StubServer, make_config: MakeConfig, capsys: pytest.CaptureFixture[str]):
    config = make_config()
    made = make(config)
    assert [m.metadata["conversation_index"] for m in made] == list(range(10))
    document = Path(config.resource.path).read_text(encoding="utf-8")
    for one in made:
        question, answer = one.messages
        assert (question.role, answer.role) == ("user", "assistant")
        assert question.token_ids and question.top_logprobs is None
        assert answer.token_ids and answer.top_logprobs
        assert answer.top_logprobs.shape == (len(answer.token_ids), 5)
        assert one.metadata["model"] == MODEL and one.metadata["finish_reasons"] == ["stop", "stop"]
        start, end = one.metadata["chunk_span"]
        chunk = document.encode()[start:end].decode(errors="ignore")
        assert chunk in one.system_prompt
    assert len({m.system_prompt for m in made[:4]}) == 1, "a batch shares its chunk"
    assert len({m.system_prompt for m in made}) == 3
    printed = capsys.readouterr().out
    assert "10 of 10 conversations" in printed and "found: empty 0, truncated 0, repetition 0" in printed


def test_what_each_side_sees(server: StubServer, make_config: MakeConfig):
    (made,) = make(make_config(num_conversations=1, rounds=2))
    seen = [[(m["role"], m["content"]) for m in body["messages"]] for body in server.requests]
    system, seed = ("system", made.system_prompt), ("user", made.metadata["seed_prompt"])
    q1, a1, q2, a2 = (m.content for m in made.messages)
    assert seen == [
        [system, seed],
        [system, ("user", q1)],
        [system, seed, ("assistant", q1), ("user", a1)],
        [system, ("user", q1), ("assistant", a1), ("user", q2)],
    ]
    assert [m.role for m in made.messages] == ["user", "assistant"] * 2 and a2
    assert [body["temperature"] for body in server.requests] == [0.6, 0.0, 0.6, 0.0]
    assert len({body["seed"] for body in server.requests}) == 4


def test_an_instruction_is_put_around_the_first_question(server: StubServer, make_config: MakeConfig):
    config = make_config(
        num_conversations=1,
        rounds=2,
        instructions=("{question} Be brief.",),
        question=SamplingConfig(stop=("\n",)),
    )
    (made,) = make(config)
    asked, _, again, _ = (m.content for m in made.messages)
    assert asked.endswith(" Be brief.") and not again.endswith(" Be brief.")
    assert server.requests[1]["messages"][-1]["content"] == asked
    # ids of a text that was changed or cut would be wrong ones
    assert made.messages[0].token_ids is None and made.messages[2].token_ids is None
    assert [body.get("stop") for body in server.requests] == [["\n"], None, ["\n"], None]


def test_an_instruction_has_a_place_for_the_question(make_config: MakeConfig):
    with pytest.raises(UserError, match=r"config.instructions needs at least one text, each with \{question\}"):
        make_config(instructions=("Be brief.",))


def test_the_chunk_never_leaks_into_messages(server: StubServer, make_config: MakeConfig):
    config = make_config()
    lines = Path(config.resource.path).read_text(encoding="utf-8").splitlines()
    for one in make(config):
        assert not any(line in message.content for message in one.messages for line in lines)
    for body in server.requests:
        assert [m["role"] for m in body["messages"]].count("system") == 1
        assert not any(line in m["content"] for m in body["messages"][1:] for line in lines)


def test_same_seed_same_conversations_whatever_the_concurrency(
    server: StubServer, make_config: MakeConfig, tmp_path: Path
):
    one = make(make_config(output_dir=str(tmp_path / "1"), max_chunks_in_flight=1))
    server.faults.extend([503, "drop", 429])
    many = make(make_config(output_dir=str(tmp_path / "2"), max_chunks_in_flight=3))
    other = make(make_config(output_dir=str(tmp_path / "3"), seed=1))
    assert one == many
    assert [m.messages for m in one] != [m.messages for m in other]


def test_concurrency_is_bounded(server: StubServer, make_config: MakeConfig):
    server.latency = 0.02
    make(make_config(num_conversations=32, max_chunks_in_flight=2))
    assert server.most_in_flight == 8


def test_empty_answers_are_sampled_again_then_dropped(
    server: StubServer, make_config: MakeConfig, capsys: pytest.CaptureFixture[str]
):
    config = make_config(question=SamplingConfig(temperature=0.5), num_conversations=40)
    server.empty = lambda body: body["seed"] % 2 == 0
    made = make(config)
    assert 20 < len(made) < 40, "one in eight stays empty three times, twice a conversation"
    assert all(message.content for one in made for message in one.messages)
    assert f"empty {40 - len(made)} (dropped)" in capsys.readouterr().out
    asked = len(server.requests)
    assert len(make(dataclasses.replace(config, filters=FilterConfig(empty=False)))) == 40
    assert len(server.requests) == asked, "another choice of filters asks for nothing"
    server.empty = lambda body: True
    with pytest.raises(UserError, match=r"the filters leave none of 10 conversations \(empty 10 \(dropped\)"):
        make(make_config(output_dir=config.output_dir + "2"))


def test_a_complete_run_says_so(server: StubServer, make_config: MakeConfig, capsys: pytest.CaptureFixture[str]):
    first = make(make_config())
    asked = len(server.requests)
    assert make(make_config()) == first
    assert len(server.requests) == asked
    assert "is complete" in capsys.readouterr().out


def test_more_conversations_go_on_from_there(server: StubServer, make_config: MakeConfig, tmp_path: Path):
    few = make(make_config())
    asked = len(server.requests)
    more = make(make_config(num_conversations=18))
    assert more[:10] == few and len(more) == 18
    assert len(server.requests) - asked == 16, "two calls for each that was not there"
    assert more == make(make_config(num_conversations=18, output_dir=str(tmp_path / "fresh")))
    with pytest.raises(UserError, match=r"num_conversations is 4, but .* was made for 18"):
        make(make_config(num_conversations=4))


def test_a_folder_belongs_to_its_config(server: StubServer, make_config: MakeConfig):
    config = make_config(client=dataclasses.replace(make_config().client, api_key="secret"))
    make(config)
    assert "secret" not in (Path(config.output_dir) / "config.json").read_text()
    with pytest.raises(UserError, match=r"config\.chunker\.max_tokens is 200, but .* was made with 300: go back"):
        make(make_config(chunker=ChunkerConfig(100, 200)))
    Path(config.resource.path).write_text("Another text. " * 90)
    with pytest.raises(UserError, match=r"document\.txt is not the text that"):
        make(config)


def test_a_folder_without_data_belongs_to_nobody(server: StubServer, make_config: MakeConfig):
    with pytest.raises(UserError, match="does not serve 'typo'"):
        make(make_config(client=ClientConfig(server.url, "typo")))
    config = make_config()
    assert len(make(config)) == 10
    (Path(config.output_dir) / "config.json").unlink()
    with pytest.raises(UserError, match=r"config\.json does not say how it was made"):
        make(config)


def test_truncated_part_is_made_again(
    server: StubServer, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr(pipeline, "ROWS_PER_PART", 4)
    config = make_config()
    made = make(config)
    (Path(config.output_dir) / "dataset.parquet").unlink()
    part = parts(config)[1]
    part.write_bytes(part.read_bytes()[:-20])
    asked = len(server.requests)
    assert make(config) == made
    assert len(server.requests) - asked == 8
    assert "part-00001.parquet is not a whole Parquet file" in caplog.text


def test_failed_conversations_are_counted_and_made_by_the_next_run(server: StubServer, make_config: MakeConfig):
    config = make_config(max_chunks_in_flight=1, client=ClientConfig(server.url, MODEL, max_retries=0))
    server.faults.append(503)
    with pytest.raises(Unavailable, match=r"1 of 10 conversations are missing, 1 failed and 0 were not finished"):
        make(config)
    assert len(parts(config)) == 1
    assert not (Path(config.output_dir) / "dataset.parquet").exists()
    asked = len(server.requests)
    assert len(make(config)) == 10
    assert len(server.requests) - asked == 2


def test_a_server_that_went_away_is_not_waited_for(server: StubServer, make_config: MakeConfig):
    config = make_config(num_conversations=200, client=ClientConfig(server.url, MODEL, max_retries=0))
    server.faults.extend([503] * 1000)
    with pytest.raises(Unavailable, match="200 of 200 conversations are missing"):
        make(config)
    assert len(server.requests) < 60


CONFIG_FILE = """
from ml_collections import config_dict

def get_config():
    return config_dict.ConfigDict({settings})
"""


@pytest.fixture
def command(make_config: MakeConfig, tmp_path: Path) -> Callable[..., list[str]]:
    def make_command(**changes: Any) -> list[str]:
        settings = dataclasses.asdict(make_config(num_conversations=48, max_chunks_in_flight=2, **changes))
        del settings["client"]["api_key"], settings["chunker"]["tokenizer"]
        (tmp_path / "config.py").write_text(CONFIG_FILE.format(settings=settings))
        return [sys.executable, "-m", "synth", f"--config={tmp_path / 'config.py'}"]

    return make_command


def test_ctrl_c_stops_cleanly(server: StubServer, command: Callable[..., list[str]]):
    server.latency = 0.5  # no answer is there before the signal is
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job would inherit deafness
    process = subprocess.Popen(command(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    signal.signal(signal.SIGINT, before)
    while len(server.requests) < 20:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "the same command goes on" in error and "Traceback" not in error


def test_dead_server_is_one_sentence(command: Callable[..., list[str]]):
    arguments = command(client=ClientConfig("http://127.0.0.1:9/v1", MODEL))
    finished = subprocess.run(arguments, capture_output=True, text=True)
    assert finished.returncode == 2
    assert finished.stderr == (
        "error: no inference server answers at http://127.0.0.1:9/v1: start one with python -m cartridges_jax.serve "
        "or change config.client.base_url\n"
    )


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"seed_prompts": ("questoin",)}, "unknown type 'questoin': did you mean 'question'"),
        ({"seed_prompts": ()}, "seed_prompts is empty"),
        ({"system_prompt": "no place"}, r"config\.system_prompt has no \{chunk\}"),
        ({"num_conversations": 0}, r"config\.num_conversations is 0, expected at least 1"),
        ({"answer": SamplingConfig(top_p=0.0)}, r"config\.answer\.top_p is 0\.0"),
    ],
)
def test_bad_settings_are_one_sentence(make_config: MakeConfig, changes: dict[str, Any], sentence: str):
    with pytest.raises(UserError, match=sentence):
        make_config(**changes)


def test_bad_groups_are_one_sentence():
    with pytest.raises(UserError, match=r"min_tokens is 9, more than config\.chunker\.max_tokens, 8"):
        ChunkerConfig(9, 8)
    with pytest.raises(UserError, match="base_url is 'localhost'"):
        ClientConfig("localhost", MODEL)


def test_no_jax_behind_synth():
    code = "import json, sys, synth.__main__; print(json.dumps(sorted(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ)
    loaded = set(json.loads(found.stdout))
    assert not {"jax", "jaxlib", "flax", "torch"} & loaded
    ours = {module for module in loaded if module.startswith("cartridges_jax.")}
    assert ours and all(module.startswith("cartridges_jax.command_line") for module in ours)


def test_passing_faults_are_tried_again(server: StubServer, make_config: MakeConfig, caplog: pytest.LogCaptureFixture):
    server.faults.extend([503, "drop", "broken"])
    assert len(make(make_config(max_chunks_in_flight=1))) == 10
    assert len([record for record in caplog.records if "retry 1 of 3" in record.message]) == 3


def test_a_dry_run_shows_prompts_and_calls_nobody(server: StubServer, make_config: MakeConfig, tmp_path: Path):
    nobody = ClientConfig("http://127.0.0.1:9/v1", MODEL)
    config = make_config(num_conversations=1000, client=nobody, dry_run=True, seed_prompts=("question", "cloze"))
    shown = asyncio.run(describe(config))
    assert shown.count("--- conversation") == 3 and "what side A is told" in shown
    assert "1000 conversations about 250 chunks: about 1.5" in shown or "about 1.4" in shown
    assert "tokens are taken for 4 characters each" in shown
    assert not (tmp_path / "out").exists()


def test_a_dry_run_with_the_tokenizer_shows_the_very_prompts(
    server: StubServer, make_config: MakeConfig, tmp_path: Path
):
    words = tokenizers.Tokenizer(tokenizers.models.BPE())
    words.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[attr-defined]
    words.decoder = tokenizers.decoders.ByteLevel()  # type: ignore[attr-defined]
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    words.model = tokenizers.models.BPE({letter: i for i, letter in enumerate(alphabet)}, [])  # type: ignore[attr-defined]
    words.save(str(tmp_path / "tokenizer.json"))
    config = make_config(chunker=ChunkerConfig(100, 300, tokenizer=str(tmp_path / "tokenizer.json")))
    shown = asyncio.run(describe(config))
    made = make(config)
    for index in (0, 3, 6):
        assert (
            f"--- conversation {index}, {made[index].metadata['seed_prompt_type']}\n{made[index].system_prompt}"
            in shown
        )
        assert made[index].metadata["seed_prompt"] in shown


def test_two_runs_in_one_folder_are_refused(server: StubServer, make_config: MakeConfig):
    config = make_config()
    with locked(Path(config.output_dir)), pytest.raises(UserError, match="is in use by another run"):
        make(config)
    assert len(make(config)) == 10
