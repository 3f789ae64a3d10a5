"""The client of OpenAI-compatible servers that give token ids: vLLM, llama-server, `python -m cartridges_jax.serve`.

Their dialects differ. vLLM and our server give the sampled ids when `return_token_ids` asks for them, and those of
alternatives as `token_id:N` when `return_tokens_as_token_ids` does. llama-server puts an `id` into every entry. All
three give log-probabilities of the model itself, before temperature and truncation (vLLM: unless started with another
`--logprobs-mode`). vLLM: docs.vllm.ai, OpenAI-compatible server; llama-server: tools/server/README.md of llama.cpp.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from synth.clients import base
from synth.clients.alignment import THEN_ONE_IN, Alignment
from synth.clients.base import ChatMessages, Completion, Refused, Rejected, Unavailable, Unsuited
from synth.clients.http import HttpClient
from synth.clients.local import ChatTokenizer
from synth.config import ClientConfig, SamplingConfig

MORE = "start vLLM with --max-logprobs as high, and others with their own setting for it"


class OpenAIClient(HttpClient):
    def __init__(self, config: ClientConfig, url: str):
        super().__init__(config, url)
        own = ChatTokenizer(config.tokenizer) if config.tokenizer else None
        self._alignment = Alignment(own.decode) if own else Alignment(self.detokenize, THEN_ONE_IN)

    async def complete(
        self, messages: ChatMessages, sampling: SamplingConfig, seed: int, top_logprobs: int = 0
    ) -> Completion:
        body: dict[str, Any] = {
            "model": self._config.model,
            "messages": list(messages),
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            # llama-server's defaults, and vLLM's for some models, would leave most tokens out
            "top_k": 0,
            "min_p": 0.0,
            "max_tokens": sampling.max_tokens,
            "seed": seed,
            "return_token_ids": True,
        }
        if sampling.stop:
            body["stop"] = list(sampling.stop)
        if sampling.thinking is not None:
            body["chat_template_kwargs"] = {"enable_thinking": sampling.thinking > 0}
        if top_logprobs:
            # Alternatives come as text otherwise, and text does not say which token it was.
            body |= {"logprobs": True, "top_logprobs": top_logprobs, "return_tokens_as_token_ids": True}
        url = f"{self._url}/chat/completions"
        reply = await self._post(url, body)
        await self._check_named(reply)
        with base.reading(url):
            completion = _completion(reply, top_logprobs)
        if completion.top_logprobs:
            await self._alignment.check(completion, sampling.stop)
        return completion

    async def score(self, messages: ChatMessages, top_logprobs: int) -> Completion:
        url = f"{self._url}/chat/completions"
        body = self._conversation(messages, add_generation_prompt=False) | {
            "max_tokens": 1,
            "prompt_logprobs": top_logprobs,
            "return_token_ids": True,
        }
        reply = await self._post(url, body)
        await self._check_named(reply)
        if not reply.get("prompt_logprobs"):
            raise Unsuited(f"{url} gives no prompt_logprobs: vLLM and cartridges_jax.serve do")
        with base.reading(url):
            whole = list(reply["prompt_token_ids"])
            rows = [_prompt_row(row) for row in reply["prompt_logprobs"]]
            prompt_tokens = reply["usage"]["prompt_tokens"]
        if len(rows) != len(whole):
            raise Unavailable(f"{url} gave {len(whole)} prompt ids with logprobs of {len(rows)}", "wrong tokens")
        before = list(messages[:-1])
        opened = await self._chat_ids(before, add_generation_prompt=True)
        empty = await self._chat_ids([*before, {"role": "assistant", "content": ""}], add_generation_prompt=False)
        part = base.answer_span(opened, empty, whole)
        ids = tuple(whole[part])
        best = base.enough(rows[part], top_logprobs, MORE)
        return Completion(messages[-1]["content"], ids, best, "given", prompt_tokens, 0, 0)

    async def _chat_ids(self, messages: ChatMessages, *, add_generation_prompt: bool) -> list[int]:
        body = self._conversation(messages, add_generation_prompt=add_generation_prompt)
        return self._ids(await self._ask_tokenizer("tokenize", (body,), ("tokens",)))

    def _conversation(self, messages: ChatMessages, *, add_generation_prompt: bool) -> dict[str, Any]:
        return {
            "model": self._config.model,
            "messages": list(messages),
            "add_generation_prompt": add_generation_prompt,
            # an answer that is given was not thought over
            "chat_template_kwargs": {"enable_thinking": False},
        }

    async def tokenize(self, text: str) -> list[int]:
        vllm = {"model": self._config.model, "prompt": text, "add_special_tokens": False}
        llama_cpp = {"content": text, "add_special": False}  # answers vLLM's form with no tokens
        return self._ids(await self._ask_tokenizer("tokenize", (vllm, llama_cpp), ("tokens",)))

    async def detokenize(self, token_ids: Sequence[int]) -> str:
        body = {"model": self._config.model, "tokens": list(token_ids)}
        text = await self._ask_tokenizer("detokenize", (body,), ("prompt", "content"))
        if not isinstance(text, str):
            raise base.broken("a text of tokens that is none")
        return text

    def _ids(self, tokens: Any) -> list[int]:
        if not isinstance(tokens, list) or not base.are_token_ids(tokens):
            raise base.broken("tokens of a text that are none")
        return tokens

    async def _ask_tokenizer(self, route: str, bodies: Sequence[dict[str, Any]], keys: Sequence[str]) -> Any:
        url = f"{self._root}/{route}"
        problem = f"{url} gave no {' or '.join(keys)}"
        for body in bodies:
            try:
                reply = await self._post(url, body)
            except Refused as refusal:
                problem = str(refusal)
                continue
            for key in keys:
                if reply.get(key):
                    return reply[key]
        raise Rejected(f"{problem}: {base.OWN_TOKENIZER}")


def _completion(reply: dict[str, Any], top_logprobs: int) -> Completion:
    choice = reply["choices"][0]
    message = choice["message"]
    text = message.get("content") or ""
    if message.get("reasoning_content") or message.get("reasoning"):
        raise Unsuited(
            "the server sets the model's thinking apart from its answer: start it without a reasoning parser"
        )
    entries = (choice.get("logprobs") or {}).get("content") or []
    token_ids = choice.get("token_ids")
    written = (reply.get("usage") or {}).get("completion_tokens")
    if token_ids and written and abs(len(token_ids) - written) > 1:  # some count the end-of-turn token, others do not
        raise Unavailable(f"the server gave {len(token_ids)} token ids and counts {written}", "wrong tokens")
    rows = None
    if top_logprobs and text.strip():
        if not entries:
            raise Unsuited("the server gives no logprobs: vLLM, llama-server and cartridges_jax.serve do")
        # the hundreds of alternatives are let go as they are read: garbage collection costs more than reading otherwise
        rows = base.enough((_alternatives(entry.pop("top_logprobs")) for entry in entries), top_logprobs, MORE)
        token_ids = _token_ids(entries) if token_ids is None else token_ids
        if len(token_ids) - len(rows) not in (0, 1):  # some servers count the end-of-turn token, but give no logprobs
            raise Unavailable(
                f"the server gave {len(token_ids)} token ids with logprobs of {len(rows)} tokens", "wrong tokens"
            )
    return base.completion_of(reply, text, None if token_ids is None else tuple(token_ids), rows)


def _alternatives(entries: list[dict[str, Any]]) -> Iterable[tuple[int, float]]:
    return zip(_token_ids(entries), base.as_logprobs([entry["logprob"] for entry in entries]), strict=True)


def _token_ids(entries: list[dict[str, Any]]) -> list[int]:
    """The ids of entries, which are all of one server's form."""
    for name in ("token_id", "id"):
        if entries and isinstance(entries[0].get(name), int):
            return [entry.get(name) for entry in entries]
    ids = []
    for entry in entries:
        token = entry.get("token")
        form, _, number = str(token).partition(":")
        if form != "token_id" or not number.isdecimal():
            raise Unsuited(
                f"the server gives no token ids with its logprobs (token {str(token)[:40]!r}): vLLM, llama-server and "
                "cartridges_jax.serve do"
            )
        ids.append(int(number))
    return ids


def _prompt_row(row: dict[str, dict[str, Any]] | None) -> list[tuple[int, float]]:
    """The alternatives at a position of the prompt, among them the prompt's own token, however unlikely it is."""
    row = row or {}
    return list(zip(map(int, row), base.as_logprobs([entry["logprob"] for entry in row.values()]), strict=True))
