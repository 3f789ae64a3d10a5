"""Chat templates, one for each way in which models differ, and small tokenizers that have what goes with them."""

from __future__ import annotations

import functools
import json
import tempfile
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend

from cartridges_jax.models.hub import ModelFiles
from cartridges_jax.models.tokenizer import Tokenizer, load_tokenizer

BOS, END, USER, ASSISTANT, SYSTEM = "<|bos|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"
SPECIALS = [BOS, END, USER, ASSISTANT, SYSTEM, "<think>", "</think>"]
_ASK = "{% if add_generation_prompt %}"
_MARKED = "{{ '<|' + m.role + '|>' + m.content + '<|end|>\\n' }}"

# An empty thought before an answer that is asked for without thinking, and in the last answer; none in earlier ones.
QWEN3 = (
    "{%- set ns = namespace(last=0) %}{%- for m in messages %}{%- if m.role == 'user' %}"
    "{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}{%- for m in messages %}{%- if m.role == 'assistant' %}"
    "{%- set said = m.content.split('</think>')[-1].lstrip('\\n') %}"
    "{%- set thought = m.content.split('</think>')[0].split('<think>')[-1].strip('\\n') %}"
    "{%- if '</think>' not in m.content %}{%- set thought = '' %}{%- endif %}"
    "{%- if loop.index0 > ns.last %}"
    "{{- '<|assistant|>\\n<think>\\n' + thought + '\\n</think>\\n\\n' + said + '<|end|>\\n' }}"
    "{%- else %}{{- '<|assistant|>\\n' + said + '<|end|>\\n' }}{%- endif %}"
    "{%- else %}{{- '<|' + m.role + '|>\\n' + m.content + '<|end|>\\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|assistant|>\\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}"
    "{%- endif %}"
)
# The generation prompt opens a thought, earlier answers are shown without theirs; the system message has no frame.
R1 = (
    "{% set ns = namespace(system='') %}{% for m in messages %}{% if m.role == 'system' %}"
    "{% set ns.system = m.content %}{% endif %}"
    "{% endfor %}{{ bos_token }}{{ ns.system }}{% for m in messages %}{% if m.role == 'user' %}"
    "{{ '<|user|>' + m.content }}{% elif m.role == 'assistant' %}"
    "{{ '<|assistant|>' + m.content.split('</think>')[-1] + '<|end|>' }}{% endif %}{% endfor %}"
    + _ASK
    + "{{ '<|assistant|><think>\\n' }}{% endif %}"
)
# Contents are trimmed; a system message of the template's own tells the date, with or without another.
LLAMA3 = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{% set told = messages[0].content | trim %}"
    "{% set messages = messages[1:] %}{% else %}"
    "{% set told = '' %}{% endif %}"
    "{{ '<|system|>\\n\\nCutting Knowledge Date: December 2023\\nToday Date: ' + strftime_now('%d %b %Y')"
    " + '\\n\\n' + told + '<|end|>' }}{% for m in messages %}"
    "{{ '<|' + m.role + '|>\\n\\n' + m.content | trim + '<|end|>' }}{% endfor %}"
    + _ASK
    + "{{ '<|assistant|>\\n\\n' }}{% endif %}"
)
# The system message is told which mode of thinking it is.
MODE_IN_SYSTEM = (
    "{% set mode = '/think' if enable_thinking is not defined or enable_thinking else '/no_think' %}"
    "{{ '<|system|>\\nReasoning Mode: ' + mode + '\\n\\n' + (messages[0].content if messages[0].role == 'system' else"
    " 'You are a helpful assistant.') + '<|end|>\\n' }}"
    "{% for m in messages if m.role != 'system' %}" + _MARKED + "{% endfor %}" + _ASK + "{{ '<|assistant|>' }}"
    "{% if mode == '/no_think' %}{{ '<think>\\n\\n</think>\\n' }}{% endif %}{% endif %}"
)
# The system message stands at the beginning of the first user message.
FOLDED_FIRST = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{% set told = messages[0].content + '\\n\\n' %}"
    "{% set messages = messages[1:] %}{% else %}"
    "{% set told = '' %}{% endif %}{% for m in messages %}"
    "{{ '<|' + m.role + '|>\\n' + (told if loop.first else '') + m.content | trim + '<|end|>\\n' }}{% endfor %}"
    + _ASK
    + "{{ '<|assistant|>\\n' }}{% endif %}"
)
# … or of the last one; alone it is refused.
FOLDED_LAST = (
    "{% if messages[0].role == 'system' %}{% set told = messages[0].content + '\\n\\n' %}"
    "{% set messages = messages[1:] %}{% else %}"
    "{% set told = '' %}{% endif %}{% if not messages or messages[0].role != 'user' %}"
    "{{ raise_exception('a conversation begins with the user') }}{% endif %}<|bos|>{% for m in messages %}"
    "{% if m.role == 'user' %}{{ '[INST] ' + (told if loop.last else '') + m.content + '[/INST]' }}"
    "{% else %}{{ ' ' + m.content + '<|end|>' }}{% endif %}{% endfor %}"
)
# Nobody may give a system message.
NO_SYSTEM = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    + _MARKED
    + "{% endfor %}"
    + _ASK
    + "{{ '<|assistant|>' }}{% endif %}"
)
# Or it is dropped without a word.
DROPS_SYSTEM = (
    "<|bos|>{% for m in messages if m.role != 'system' %}" + _MARKED + "{% endfor %}" + _ASK + "{{ '<|assistant|>' }}"
    "{% endif %}"
)
# The frame is text, so that what a question ends with merges with what follows it.
TULU = (
    "{{ bos_token }}{% for m in messages %}{{ '<' + m.role + '>\\n' + m.content + ('<|end|>' if m.role == 'assistant'"
    " else '') + '\\n' }}{% endfor %}" + _ASK + "{{ '<assistant>\\n' }}{% endif %}"
)
DEEPSEEK_LLM = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ 'User: ' + m.content + '\\n\\n' }}"
    "{% elif m.role == 'assistant' %}{{ 'Assistant: ' + m.content + '<|end|>' }}{% else %}{{ m.content + '\\n\\n' }}"
    "{% endif %}{% endfor %}" + _ASK + "{{ 'Assistant:' }}{% endif %}"
)
# A default system message, none may stand alone.
DEFAULT_NOT_ALONE = (
    "{{ bos_token }}{% if messages[0].role != 'system' %}{{ '<|system|>\\nYou are helpful<|end|>\\n' }}{% endif %}"
    "{% if not messages | selectattr('role', 'equalto', 'user') | list %}{{ raise_exception('No user query found') }}"
    "{% endif %}{% for m in messages %}" + _MARKED + "{% endfor %}" + _ASK + "{{ '<|assistant|>' }}{% endif %}"
)
# Whatever is not to be continued ends with an EOS.
EOS_AT_END = (
    "{{ bos_token }}{% if messages[0].role != 'system' %}{{ '<|system|>You are helpful<|end|>\\n' }}{% endif %}"
    "{% for m in messages %}"
    + _MARKED
    + "{% endfor %}"
    + _ASK
    + "{{ '<|assistant|>' }}{% else %}{{ eos_token }}{% endif %}"
)
# Every question opens with a BOS, and the first holds the system message.
LLAMA2 = (
    "{% if messages[0].role == 'system' %}{% set told = '<<SYS>>' + messages[0].content + '<</SYS>>' %}"
    "{% set messages = messages[1:] %}{% else %}{% set told = '' %}{% endif %}{% for m in messages %}"
    "{% if m.role == 'user' %}{{ bos_token + '[INST] ' }}{{ told if loop.first else '' }}"
    "{{ m.content.strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
# All of it is text.
VICUNA = (
    "{% if messages[0].role == 'system' %}{{ messages[0].content + ' ' }}{% set messages = messages[1:] %}"
    "{% else %}{{ 'A chat with a helpful assistant. ' }}{% endif %}{% for m in messages %}{% if m.role == 'user' %}"
    "{{ 'USER: ' + m.content + ' ' }}{% else %}{{ 'ASSISTANT: ' + m.content + eos_token }}{% endif %}{% endfor %}"
    + _ASK
    + "{{ 'ASSISTANT:' }}{% endif %}"
)
# A question is told whether it shall be thought over.
SOFT_SWITCH = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\\n' + m.content }}"
    "{% if m.role == 'user' and enable_thinking is defined %}{{ ' /think' if enable_thinking else ' /no_think' }}"
    "{% endif %}{{ '<|end|>\\n' }}{% endfor %}" + _ASK + "{{ '<|assistant|>\\n' }}{% endif %}"
)
TEMPLATES = {
    "qwen3": QWEN3,
    "r1": R1,
    "llama3": LLAMA3,
    "mode in system": MODE_IN_SYSTEM,
    "folded first": FOLDED_FIRST,
    "folded last": FOLDED_LAST,
    "no system": NO_SYSTEM,
    "drops system": DROPS_SYSTEM,
    "tulu": TULU,
    "deepseek llm": DEEPSEEK_LLM,
    "default, not alone": DEFAULT_NOT_ALONE,
    "eos at end": EOS_AT_END,
    "llama2": LLAMA2,
    "vicuna": VICUNA,
    "soft switch": SOFT_SWITCH,
}
FOLDED = ("folded first", "folded last", "no system", "drops system", "llama2")  # or without a system message
APART = tuple(name for name in TEMPLATES if name not in FOLDED)
TEXT = ["Who sleeps in box 3?\n\n", "The owl does.\n", "User: Why so?\n", "Assistant: [INST] It flies. [/INST]"] * 4


@functools.cache
def backend(kind: str) -> Backend:
    """`bytes`: as Llama 3 splits texts; `pieces`: as SentencePiece does, with a mark at the beginning of each."""
    model = models.BPE(byte_fallback=kind == "pieces", unk_token="<unk>" if kind == "pieces" else None)
    made = Backend(model)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if kind == "bytes":
        words = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        split = pre_tokenizers.Split(Regex(words), "isolated")
        made.pre_tokenizer = pre_tokenizers.Sequence(
            [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        )
        made.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(vocab_size=420, initial_alphabet=alphabet, show_progress=False)
    else:
        made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        made.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        letters = [chr(i) for i in range(33, 127)] + ["\n"]
        units = ["<unk>", *(f"<0x{i:02X}>" for i in range(256))]
        trainer = trainers.BpeTrainer(
            vocab_size=560, initial_alphabet=letters, special_tokens=units, show_progress=False
        )
    made.train_from_iterator(TEXT, trainer)
    made.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIALS])
    made.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, made.token_to_id(BOS))]
    )
    return made


def write_tokenizer(folder: Path, kind: str, template: str, **config: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    backend(kind).save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": BOS, "eos_token": END} | config
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": template}))
    return folder


@functools.cache
def tokenizer(name: str, kind: str = "bytes") -> Tokenizer:
    with tempfile.TemporaryDirectory() as folder:
        path = write_tokenizer(Path(folder) / "model", kind, TEMPLATES[name])
        return load_tokenizer(ModelFiles(name, directory=path))
