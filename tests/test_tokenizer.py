"""The embedded model's tokenizer, a tiny Hugging Face folder and tiny GGUF files: one behaviour for all of them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend

from cartridges_jax.command_line.errors import UserError
from cartridges_jax.models.hub import ModelFiles, resolve
from cartridges_jax.models.tokenizer import MAX_PENDING, StreamDecoder, Tokenizer, gguf_metadata, load_tokenizer

TRICKY = [
    "",
    "Hello  world!\n",
    "  a  b ",
    "déjà vu, naïve ﬁ e\u0301",
    "日本語のテキスト",
    "🙂👩‍👩‍👧 it's 3.14159 and 1234567890",
    "def f(x):\n    return x**2  # ok\n\n\t\tend\r\n",
    "<|im_start|>user\nx<|im_end|>",
    "\x00\x7f\u200b\ufffd\U0010ffff",
]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] not in ['user', 'assistant'] %}"
    "{{ raise_exception('no role ' + m['role']) }}{% endif %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIALS = ["<|begin|>", "<|eos|>", "<|end|>", "<|user|>", "<|assistant|>"]
CORPUS = ["the cat sat on the mat, it's 12345 o'clock\n\n  and the 2nd cat isn't THE cat's"] * 5 + TRICKY
WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPLITS = {  # as the tokenizer.json of a model of each family has it
    "gpt-2": [pre_tokenizers.ByteLevel(add_prefix_space=False)],
    "smollm": [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)],
    "llama-bpe": [
        pre_tokenizers.Split(Regex(WORDS % r"\p{N}{1,3}"), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ],
    "qwen2": [
        pre_tokenizers.Split(Regex(WORDS % r"\p{N}"), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ],
}


@pytest.fixture(scope="module")
def smollm() -> Tokenizer:
    return load_tokenizer(resolve("smollm2-135m"))


def train(pre: str) -> Backend:
    backend = Backend(models.BPE(ignore_merges=pre == "llama-bpe"))
    backend.pre_tokenizer = pre_tokenizers.Sequence(SPLITS[pre])
    backend.decoder = decoders.ByteLevel()
    if pre == "qwen2":
        backend.normalizer = normalizers.NFC()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, show_progress=False)
    )
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIALS])
    backend.add_tokens([AddedToken("<tool>", normalized=False)])
    if pre == "llama-bpe":
        bos = backend.token_to_id("<|begin|>")
        backend.post_processor = processors.TemplateProcessing(
            single="<|begin|> $A", special_tokens=[("<|begin|>", bos)]
        )
    return backend


def write_folder(
    backend: Backend, path: Path, template: str | None = TEMPLATE, stops: object = None, config_stops: object = None
) -> ModelFiles:
    path.mkdir()
    backend.save(str(path / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|begin|>", "eos_token": "<|eos|>"}
    config |= {"chat_template": template} if template else {}
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    if stops is not None:
        (path / "generation_config.json").write_text(json.dumps({"eos_token_id": stops}))
    if config_stops is not None:
        (path / "config.json").write_text(json.dumps({"eos_token_id": config_stops}))
    return ModelFiles(path.name, directory=path)


def write_gguf(
    backend: Backend,
    path: Path,
    pre: str,
    kind: str = "gpt2",
    ids: dict[str, int] | None = None,
    added: Sequence[str] = (),
) -> ModelFiles:
    """`ids` are those that the metadata gives names (eos, eot, …), if not the usual; `added` are put around a text."""
    import gguf

    model = json.loads(backend.to_str())["model"]
    vocab = sorted(backend.get_vocab(), key=backend.get_vocab().__getitem__)
    types = [3 if token in SPECIALS else 4 if token == "<tool>" else 1 for token in vocab] + [5, 5]
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_tokenizer_model(kind)
    writer.add_tokenizer_pre(pre)
    writer.add_token_list([*vocab, "[PAD0]", "[PAD1]"])
    writer.add_token_types(types)
    writer.add_token_merges([" ".join(merge) for merge in model["merges"]])
    names = {"bos": "<|begin|>", "eos": "<|eos|>", "eot": "<|end|>"}
    for name, token_id in ({n: vocab.index(text) for n, text in names.items()} if ids is None else ids).items():
        writer.add_uint32(f"tokenizer.ggml.{name}_token_id", token_id)
    for name in added:
        writer.add_bool(f"tokenizer.ggml.add_{name}_token", True)
    writer.add_chat_template(TEMPLATE)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return ModelFiles(path.name, gguf=path)


@pytest.mark.parametrize("text", TRICKY)
def test_round_trip(smollm: Tokenizer, text: str) -> None:
    assert smollm.decode(smollm.encode(text), skip_special_tokens=False) == text


def test_known_ids(smollm: Tokenizer) -> None:
    # ids that other implementations of this tokenizer publish in their own tests
    assert smollm.encode("Hello, we can use") == [19556, 28, 392, 416, 722]
    assert smollm.encode("Hello world! 123") == [19556, 905, 17, 216, 33, 34, 35]
    assert smollm.encode("<|im_start|>") == [1]
    assert smollm.decode([1, 19556, 2]) == "Hello"
    assert (smollm.vocab_size, smollm.bos_id, smollm.stop_ids) == (49152, 1, frozenset({2}))
    assert smollm.encode("Hello", add_special_tokens=True) == [19556]  # its metadata asks for no BOS


def test_chat_golden(smollm: Tokenizer) -> None:
    messages = [{"role": "user", "content": "What is 2+2?"}]
    system = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    user = "<|im_start|>user\nWhat is 2+2?<|im_end|>\n"
    assert smollm.render_chat(messages, add_generation_prompt=True) == system + user + "<|im_start|>assistant\n"
    ids = smollm.chat_ids(messages, add_generation_prompt=False)
    assert ids == smollm.encode(system + user)
    assert ids.count(1) == ids.count(2) == 2
    own = [{"role": "system", "content": "Be brief."}, *messages]
    assert smollm.render_chat(own, add_generation_prompt=False) == "<|im_start|>system\nBe brief.<|im_end|>\n" + user


def test_turns_stand_behind_a_cartridge_without_the_templates_own_system_message(smollm: Tokenizer) -> None:
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    turns = smollm.render_turns(messages, add_generation_prompt=True)
    assert turns == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHo<|im_end|>\n<|im_start|>assistant\n"
    own = [{"role": "system", "content": "Be brief."}, *messages]
    assert smollm.render_turns(own, add_generation_prompt=False) == smollm.render_chat(own, add_generation_prompt=False)


def test_special_text_in_contents_becomes_special_tokens(smollm: Tokenizer) -> None:
    ids = smollm.chat_ids([{"role": "user", "content": "<|im_end|>"}], add_generation_prompt=False)
    assert ids.count(2) == 3  # as documented: the system message's end, the text's, the message's


@settings(max_examples=200, deadline=None)
@given(text=st.text())
def test_stream_of_any_text(smollm: Tokenizer, text: str) -> None:
    ids = smollm.encode(text)
    stream = StreamDecoder(smollm)
    assert "".join(map(stream.push, ids)) + stream.flush() == smollm.decode(ids)


@settings(max_examples=300, deadline=None)
@given(ids=st.lists(st.integers(0, 300) | st.integers(0, 49151), max_size=40), skip=st.booleans())
def test_stream_of_any_ids(smollm: Tokenizer, ids: list[int], skip: bool) -> None:
    stream = StreamDecoder(smollm, skip_special_tokens=skip)
    assert "".join(map(stream.push, ids)) + stream.flush() == smollm.decode(ids, skip_special_tokens=skip)


def test_stream_holds_back_only_what_is_incomplete(smollm: Tokenizer) -> None:
    stream = StreamDecoder(smollm)
    ids = smollm.encode("ab🙂c")
    pieces = [stream.push(i) for i in ids]
    assert "\ufffd" not in "".join(pieces)
    assert "".join(pieces) == "ab🙂c" and stream.flush() == ""
    first = smollm.encode("🙂")[:1]
    assert stream.push(first[0]) == "" and stream.flush() == "\ufffd"
    assert stream.push(smollm.encode("x")[0]) == "x"


@pytest.mark.parametrize("text", ["\x80" * 400, "é" * 200, "a\x80" * 200, "\xf0\x9f" * 150])
def test_a_long_stream_of_parts_of_characters_is_told_as_it_comes(smollm: Tokenizer, text: str) -> None:
    single = {smollm.token_bytes(i): i for i in range(300) if not smollm.is_special(i)}
    ids = [single[bytes([byte])] for byte in (text.encode() if "é" in text else text.encode("latin-1"))]
    ids[100:100] = [2] * 50  # the end of a turn, which is not shown
    stream = StreamDecoder(smollm)
    told = ""
    for count, i in enumerate(ids, start=1):
        told += stream.push(i)
        assert len(smollm.decode(ids[:count])) - len(told) <= MAX_PENDING
    assert told + stream.flush() == smollm.decode(ids)


@pytest.mark.parametrize("pre", list(SPLITS))
def test_folder_and_gguf_agree(pre: str, tmp_path: Path) -> None:
    backend = train(pre)
    end = backend.token_to_id("<|end|>")
    folder = load_tokenizer(write_folder(backend, tmp_path / "model", stops=[end]))
    gguf = load_tokenizer(write_gguf(backend, tmp_path / "model.gguf", pre))
    assert (gguf.vocab_size, gguf.bos_id, gguf.stop_ids) == (folder.vocab_size, folder.bos_id, folder.stop_ids)
    assert folder.stop_ids == {end, backend.token_to_id("<|eos|>")}
    for text in [*CORPUS, "x<tool><|user|>  y"]:
        for add in (False, True):
            assert gguf.encode(text, add_special_tokens=add) == folder.encode(text, add_special_tokens=add)
        ids = folder.encode(text)
        assert gguf.decode(ids) == folder.decode(ids)
    messages = [{"role": "user", "content": "the cat"}]
    assert folder.render_chat(messages, add_generation_prompt=True) == "<|begin|><|user|>the cat<|end|><|assistant|>"
    ids = folder.chat_ids(messages, add_generation_prompt=True)
    assert ids == gguf.chat_ids(messages, add_generation_prompt=True)
    assert (ids[0], ids[-2]) == (folder.bos_id, end)
    assert gguf.fingerprint == folder.fingerprint


def test_fingerprint_tells_tokenizers_apart(tmp_path: Path) -> None:
    backend = train("gpt-2")
    one = load_tokenizer(write_folder(backend, tmp_path / "one")).fingerprint
    assert load_tokenizer(write_folder(backend, tmp_path / "same", stops=3)).fingerprint == one
    assert load_tokenizer(write_folder(backend, tmp_path / "template", template="other")).fingerprint != one
    backend.add_tokens(["<more>"])
    assert load_tokenizer(write_folder(backend, tmp_path / "vocab")).fingerprint != one


def test_stops_may_be_one_id_and_files_may_lack_them(tmp_path: Path) -> None:
    backend = train("gpt-2")
    eos = backend.token_to_id("<|eos|>")
    assert load_tokenizer(write_folder(backend, tmp_path / "one", stops=7)).stop_ids == {eos, 7}
    assert load_tokenizer(write_folder(backend, tmp_path / "none")).stop_ids == {eos}


def test_stops_of_a_config_count_where_the_generation_config_names_none(tmp_path: Path) -> None:
    backend = train("gpt-2")
    eos = backend.token_to_id("<|eos|>")
    for name, stops, config_stops, expected in (
        ("one", None, 7, {eos, 7}),
        ("several", None, [7, 8], {eos, 7, 8}),
        ("both", 9, [7, 8], {eos, 9}),
        ("zero", None, 0, {eos, 0}),
    ):
        files = write_folder(backend, tmp_path / name, stops=stops, config_stops=config_stops)
        assert load_tokenizer(files).stop_ids == expected
    (tmp_path / "one" / "generation_config.json").write_text('{"temperature": 0.7, "eos_token_id": null}')
    assert load_tokenizer(ModelFiles("one", directory=tmp_path / "one")).stop_ids == {eos, 7}


@pytest.mark.parametrize("stops", ["</s>", [7, None], [True], -1, 7.0])
def test_stops_that_are_no_ids(stops: object, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"generation_config.json has eos_token_id .*, expected the ids that end an"):
        load_tokenizer(write_folder(train("gpt-2"), tmp_path / "model", stops=stops))


def test_damaged_generation_config(tmp_path: Path) -> None:
    files = write_folder(train("gpt-2"), tmp_path / "model", stops=3)
    for content in ('{"eos_token_id": ', "[3]"):
        (tmp_path / "model" / "generation_config.json").write_text(content)
        with pytest.raises(UserError, match=r"generation_config.json (is not a whole JSON file|holds list)"):
            load_tokenizer(files)


def test_stops_that_a_gguf_does_not_name_are_told_by_their_text(tmp_path: Path) -> None:
    backend = train("qwen2")
    end, begin = backend.token_to_id("<|end|>"), backend.token_to_id("<|begin|>")
    backend.add_special_tokens([AddedToken(text, normalized=False) for text in ("<|endoftext|>", "<|eom_id|>")])
    texts = {name: backend.token_to_id(name) for name in ("<|endoftext|>", "<|eom_id|>", "<|eos|>")}
    for ids, expected in (
        ({"eos": texts["<|eos|>"]}, {texts["<|eos|>"], end, texts["<|eom_id|>"]}),
        ({"eos": end}, {end, texts["<|eom_id|>"]}),
        ({}, {texts["<|endoftext|>"], end, texts["<|eom_id|>"]}),
        ({"eos": texts["<|eos|>"], "eot": begin, "eom": begin}, {texts["<|eos|>"], begin}),
    ):
        assert load_tokenizer(write_gguf(backend, tmp_path / "m.gguf", "qwen2", ids=ids)).stop_ids == expected


def test_a_gguf_that_names_no_end_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "SPECIALS", ["<|begin|>"])
    with pytest.raises(UserError, match=r"names no token that ends an answer"):
        load_tokenizer(write_gguf(train("gpt-2"), tmp_path / "m.gguf", "gpt-2", ids={}))


def test_a_folder_that_names_no_end_at_all(tmp_path: Path) -> None:
    for name, template in (("base", None), ("chat", TEMPLATE)):
        files = write_folder(train("gpt-2"), tmp_path / name, template=template)
        path = tmp_path / name / "tokenizer_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token": None}))
        if template is None:
            assert load_tokenizer(files).stop_ids == frozenset()
    with pytest.raises(UserError, match=r"chat' names no token that ends an answer: say which in eos_token_id"):
        load_tokenizer(files)
    (tmp_path / "chat" / "generation_config.json").write_text('{"eos_token_id": 3}')
    assert load_tokenizer(files).stop_ids == {3}


@pytest.mark.parametrize("added", [(), ("bos",), ("eos",), ("bos", "eos")])
def test_what_a_gguf_puts_around_a_text(added: tuple[str, ...], tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write_gguf(train("gpt-2"), tmp_path / "m.gguf", "gpt-2", added=added))
    ids = tokenizer.encode("the cat")
    before, behind = (tokenizer.encode(text) for text in ("<|begin|>", "<|eos|>"))
    expected = before * ("bos" in added) + ids + behind * ("eos" in added)
    assert tokenizer.encode("the cat", add_special_tokens=True) == expected


def test_the_first_part_of_a_gguf_has_the_tokenizer(tmp_path: Path) -> None:
    files = write_gguf(train("gpt-2"), tmp_path / "m-00001-of-00002.gguf", "gpt-2")
    second = tmp_path / "m-00002-of-00002.gguf"
    with pytest.raises(FileNotFoundError, match=r"lacks m-00002-of-00002.gguf, parts of the same model"):
        load_tokenizer(files)
    whole = load_tokenizer(write_gguf(train("gpt-2"), tmp_path / "whole.gguf", "gpt-2"))
    second.write_bytes(b"GGUF")
    assert load_tokenizer(ModelFiles("split", gguf=second)).fingerprint == whole.fingerprint


def test_special_ids_outside_a_gguf_vocabulary(tmp_path: Path) -> None:
    backend = train("gpt-2")
    for name in ("eos", "bos", "eot", "eom"):
        with pytest.raises(UserError, match=rf"names token 4294967295 as its {name}, of \d+: download"):
            load_tokenizer(write_gguf(backend, tmp_path / "m.gguf", "gpt-2", ids={"eos": 1, name: 2**32 - 1}))
    load_tokenizer(write_gguf(backend, tmp_path / "m.gguf", "gpt-2", ids={"eos": 1, "padding": 2**32 - 1}))


def test_limits_saved_in_a_tokenizer_json_do_not_cut_text(tmp_path: Path) -> None:
    backend = train("gpt-2")
    backend.enable_truncation(max_length=4)
    backend.enable_padding(length=8)
    tokenizer = load_tokenizer(write_folder(backend, tmp_path / "model"))
    assert tokenizer.decode(tokenizer.encode("the cat sat on the mat")) == "the cat sat on the mat"


def test_chat_without_a_template_or_against_it(tmp_path: Path) -> None:
    messages = [{"role": "narrator", "content": "x"}]
    with pytest.raises(UserError, match="no chat template"):
        load_tokenizer(write_folder(train("gpt-2"), tmp_path / "base", template=None)).render_chat(
            messages, add_generation_prompt=False
        )
    with pytest.raises(UserError, match="refuses these messages: no role narrator"):
        load_tokenizer(write_folder(train("gpt-2"), tmp_path / "chat")).render_chat(
            messages, add_generation_prompt=False
        )
    wrong = {"concatenate": "{{ messages[0].content + 1 }}", "endfor": "{% for m in messages %}", "zero": "{{ 1 / 0 }}"}
    for reason, template in wrong.items():
        broken = load_tokenizer(write_folder(train("gpt-2"), tmp_path / reason, template=template))
        with pytest.raises(UserError, match=f"refuses these messages: .*{reason}"):
            broken.render_chat(messages, add_generation_prompt=False)
        assert broken.continued_ids("the cat") == broken.encode("the cat"), "plain completions need none"


def test_what_cannot_be_loaded(tmp_path: Path) -> None:
    backend = train("gpt-2")
    with pytest.raises(UserError, match="splits text by 'klingon': known are 'gpt-2', "):
        load_tokenizer(write_gguf(backend, tmp_path / "a.gguf", "klingon"))
    garbled = (tmp_path / "a.gguf").read_bytes().replace(b"klingon", b"gpt-2\0\0").replace(b"t h", b"t q")
    (tmp_path / "a2.gguf").write_bytes(garbled)
    with pytest.raises(UserError, match=r"garbled vocabulary .*Token .* out of vocabulary"):
        load_tokenizer(ModelFiles("garbled", gguf=tmp_path / "a2.gguf"))
    with pytest.raises(UserError, match="kind 'llama'"):
        load_tokenizer(write_gguf(backend, tmp_path / "b.gguf", "gpt-2", kind="llama"))
    whole = (tmp_path / "a.gguf").read_bytes()
    for size in (0, 10, 30, 1000, len(whole) - 40):
        (tmp_path / "cut.gguf").write_bytes(whole[:size])
        with pytest.raises(UserError, match="GGUF"):
            gguf_metadata(tmp_path / "cut.gguf")
    with pytest.raises(FileNotFoundError, match="has no tokenizer"):
        load_tokenizer(ModelFiles("empty", directory=tmp_path))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="cannot be read"):
        load_tokenizer(ModelFiles("broken", directory=tmp_path))


def test_metadata_is_what_the_reference_reader_sees(tmp_path: Path) -> None:
    import gguf

    writer = gguf.GGUFWriter(str(tmp_path / "m.gguf"), "llama")
    numbers = {"uint8": 200, "int8": -3, "uint16": 60000, "int16": -30000, "uint32": 2**32 - 1, "int32": -5}
    for kind, value in (numbers | {"uint64": 2**63, "int64": -(2**40)}).items():
        getattr(writer, f"add_{kind}")(kind, value)
    writer.add_float32("f32", 0.5)
    writer.add_float64("f64", 0.1)
    writer.add_bool("yes", True)
    writer.add_string("text", "déjà")
    writer.add_array("numbers", [1, 2, 3])
    writer.add_array("flags", [True, False])
    writer.add_array("texts", ["a", "", "日本"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    reference = gguf.GGUFReader(tmp_path / "m.gguf").fields
    expected = {key: field.contents() for key, field in reference.items() if not key.startswith("GGUF.")}
    assert gguf_metadata(tmp_path / "m.gguf") == expected


def test_loading_is_quiet_and_needs_neither_torch_nor_jax() -> None:
    code = (
        "import sys\nfrom cartridges_jax.models.hub import resolve\n"
        "from cartridges_jax.models.tokenizer import load_tokenizer\n"
        "assert 'transformers' not in sys.modules\n"
        "load_tokenizer(resolve('smollm2-135m'))\nassert not {'torch', 'jax'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
