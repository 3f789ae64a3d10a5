"""The client of SGLang's native /generate (also that of sglang-jax), which takes and gives token ids.

The chat template is applied on this side, so `config.client.tokenizer` names the model's tokenizer. Log-probabilities
are those after temperature, unless the server was started with SGLANG_RETURN_ORIGINAL_LOGPROB=1. No seed is sent: it
works with deterministic inference only, and older servers refuse the field. docs.sglang.ai: native APIs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from synth.clients import base
from synth.clients.alignment import Alignment
from synth.clients.base import ChatMessages, Completion, Unavailable, Unsuited, reading
from synth.clients.http import HttpClient
from synth.clients.local import ChatTokenizer
from synth.config import ClientConfig, SamplingConfig

MORE = "start the server so that it gives as many"


class SGLangClient(HttpClient):
    def __init__(self, config: ClientConfig, url: str):
        super().__init__(config, url)
        self._url = f"{self._root}/v1"  # for the list of models, whether it was given or not
        assert config.tokenizer, "ClientConfig sees to it"
        self._tokenizer = ChatTokenizer(config.tokenizer)
        self._alignment = Alignment(self._tokenizer.decode)

    async def complete(
        self, messages: ChatMessages, sampling: SamplingConfig, seed: int, top_logprobs: int = 0
    ) -> Completion:
        thinking = None if sampling.thinking is None else sampling.thinking > 0
        prompt = self._tokenizer.chat_ids(messages, add_generation_prompt=True, thinking=thinking)
        sampling_params: dict[str, Any] = {
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "max_new_tokens": sampling.max_tokens,
        }
        if sampling.stop:
            sampling_params["stop"] = list(sampling.stop)
        reply, meta = await self._generate(prompt, sampling_params, top_logprobs, first=-1)
        with reading(self._root):
            ended = str(meta["finish_reason"]["type"])
            ids = [token for _, token, *_ in meta["output_token_logprobs"]] if top_logprobs else None
            rows = base.enough(_rows(meta["output_top_logprobs"]), top_logprobs, MORE) if top_logprobs else None
            completion = Completion(
                text=reply["text"],
                token_ids=tuple(ids if ids is not None else reply.get("output_ids") or ()) or None,
                top_logprobs=rows,
                finish_reason=ended,
                prompt_tokens=meta["prompt_tokens"],
                completion_tokens=meta["completion_tokens"],
                cached_tokens=meta.get("cached_tokens") or 0,
            )
        if ended == "abort":
            reason = str(meta["finish_reason"].get("message"))[:300]
            raise Unavailable(f"{self._root} gave a request up: {reason}", "aborted")
        if rows is not None and ids is not None:
            if not len(ids) == len(rows) == completion.completion_tokens:
                raise Unavailable(
                    f"{self._root} counts {completion.completion_tokens} tokens and gave {len(ids)} ids with "
                    f"logprobs of {len(rows)}",
                    "wrong tokens",
                )
            await self._alignment.check(completion, sampling.stop)
        return completion

    async def score(self, messages: ChatMessages, top_logprobs: int) -> Completion:
        before = list(messages[:-1])
        opened = self._tokenizer.chat_ids(before, add_generation_prompt=True, thinking=False)
        nothing = {"role": "assistant", "content": ""}
        empty = self._tokenizer.chat_ids([*before, nothing], add_generation_prompt=False, thinking=False)
        whole = self._tokenizer.chat_ids(messages, add_generation_prompt=False, thinking=False)
        part = base.answer_span(opened, empty, whole)
        # SGLang gives no log-probability for the first position asked for, so that is the token before the answer
        sent = whole[: part.stop]
        _, meta = await self._generate(sent, {"temperature": 0.0, "max_new_tokens": 1}, top_logprobs, part.start - 1)
        with reading(self._root):
            ids = tuple(token for _, token, *_ in meta["input_token_logprobs"][1:])
            rows = base.enough(_rows(meta["input_top_logprobs"][1:]), top_logprobs, MORE)
        if list(ids) != whole[part] or len(rows) != len(ids):
            raise Unavailable(f"{self._root} scored {len(ids)} tokens, which are not the answer's", "wrong tokens")
        return Completion(messages[-1]["content"], ids, rows, "given", len(sent), 0, 0)

    async def tokenize(self, text: str) -> list[int]:
        return self._tokenizer.encode(text)

    async def detokenize(self, token_ids: Sequence[int]) -> str:
        return await self._tokenizer.decode(token_ids)

    async def _generate(
        self, prompt: list[int], sampling_params: dict[str, Any], top_logprobs: int, first: int
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """The reply and its `meta_info`; `first` is the first prompt position with log-probabilities, -1 for none."""
        body: dict[str, Any] = {"input_ids": prompt, "sampling_params": sampling_params}
        if top_logprobs:
            body |= {"return_logprob": True, "logprob_start_len": first, "top_logprobs_num": top_logprobs}
        reply = await self._post(f"{self._root}/generate", body)
        meta = reply.get("meta_info")
        if not isinstance(meta, dict):
            raise Unavailable(f"{self._root} gave a reply without meta_info", "broken reply")
        if top_logprobs and not meta.get("output_token_logprobs"):
            raise Unsuited(f"{self._root} gives no log-probabilities: SGLang's /generate does")
        return reply, meta


def _rows(rows: Any) -> list[list[tuple[int, float]]]:
    return [list(zip((e[1] for e in row), base.as_logprobs([e[0] for e in row]), strict=True)) for row in rows]
