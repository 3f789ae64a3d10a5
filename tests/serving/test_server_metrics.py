"""What `/metrics` says, read as Prometheus reads it, and that the dashboard asks for nothing else."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable
from pathlib import Path

import aiohttp
from prometheus_client.parser import text_string_to_metric_families
from test_server import END, SAID, Client, ScriptEngine, serving  # pyrefly: ignore[missing-import]

DASHBOARD = Path(__file__).parents[2] / "configs" / "deploy" / "grafana.json"
Samples = dict[tuple[str, str], float]


async def scraped(client: Client) -> Samples:
    """Every sample by its name and its one label beside the model's."""
    async with client.session.get(client.url + "/metrics") as response:
        assert response.content_type == "text/plain"
        families = list(text_string_to_metric_families(await response.text()))
    found: Samples = {}
    for sample in (sample for family in families for sample in family.samples):
        labels = dict(sample.labels)
        assert labels.pop("model_name", "tiny") == "tiny"
        found[sample.name, ",".join(labels.values())] = sample.value
    return found


async def until(client: Client, reached: Callable[[Samples], bool]) -> Samples:
    while not reached(found := await scraped(client)):
        await asyncio.sleep(0.01)
    return found


def ended(found: Samples) -> dict[str, float]:
    return {label: value for (name, label), value in found.items() if name == "vllm:request_success_total"}


def test_answers_are_counted_and_timed():
    async def test(client: Client) -> None:
        await client.chat(n=2)
        await client.stream(max_tokens=3)
        await client.chat(temperature=9)
        found = await scraped(client)
        assert found["cartridges_jax_requests_total", "/v1/chat/completions,200"] == 2
        assert found["cartridges_jax_requests_total", "/v1/chat/completions,400"] == 1
        assert found["vllm:generation_tokens_total", ""] == 2 * len(SAID) + 3
        assert found["vllm:prefix_cache_queries_total", ""] == found["vllm:prompt_tokens_total", ""]
        assert 0 < found["vllm:prefix_cache_hits_total", ""] < found["vllm:prompt_tokens_total", ""]
        assert ended(found) == {"stop": 2, "length": 1}
        assert found["vllm:time_to_first_token_seconds_count", ""] == 3
        assert found["vllm:inter_token_latency_seconds_count", ""] == 2 * (len(SAID) - 1) + 2
        assert found["vllm:e2e_request_latency_seconds_count", ""] == 3
        for name in ("running", "waiting"):
            assert found[f"vllm:num_requests_{name}", ""] == 0
        assert found["vllm:kv_cache_usage_perc", ""] == 0, "what is only remembered is not in use"
        assert found["cartridges_jax_max_num_seqs", ""] == 4

    serving(ScriptEngine(SAID), test)


def test_a_pause_is_in_the_histogram_between_tokens():
    engine = ScriptEngine([*b"abcd", END], pause=0.03)

    async def test(client: Client) -> None:
        await client.chat()
        found = await scraped(client)
        assert found["vllm:inter_token_latency_seconds_bucket", "0.02"] == 0
        assert found["vllm:inter_token_latency_seconds_sum", ""] >= 4 * 0.03 * 0.9
        whole = found["vllm:e2e_request_latency_seconds_sum", ""]
        parts = [found[f"vllm:{name}_seconds_sum", ""] for name in ("time_to_first_token", "inter_token_latency")]
        assert sum(parts) <= whole < sum(parts) + 0.1

    serving(engine, test)


def test_what_runs_waits_and_is_cancelled():
    engine = ScriptEngine(list(b"abc"), max_num_seqs=1, pause=0.01)

    async def test(client: Client) -> None:
        body = {"messages": [{"role": "user", "content": "hi"}]}
        asking = [
            asyncio.create_task(client.post("/v1/chat/completions", json=body | {"stream": stream}))
            for stream in (True, False, False)
        ]
        busy = await until(client, lambda found: found["vllm:num_requests_waiting", ""] == 2)
        assert busy["vllm:num_requests_running", ""] == 1 and 0 < busy["vllm:kv_cache_usage_perc", ""] <= 1
        for task in asking:
            task.cancel()
        idle = await until(client, lambda found: ended(found).get("abort") == 3)
        assert ended(idle) == {"abort": 3}
        await until(client, lambda found: found["vllm:kv_cache_usage_perc", ""] == 0)

    serving(engine, test)


def test_an_answer_that_took_too_long_is_an_error():
    async def test(client: Client) -> None:
        assert (await client.stream())[-1]["error"]["code"] == "timeout"
        assert (await client.chat())[0] == 504
        assert ended(await scraped(client)) == {"error": 2}

    serving(ScriptEngine(list(b"abc"), max_num_seqs=1, pause=0.01), test, max_seconds=0.2)


def test_the_dashboard_asks_for_what_there_is():
    dashboard = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    asked = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", [])]
    names = {name for expr in asked for name in re.findall(r"(?:vllm:|cartridges_jax_)\w+", expr)}
    assert len(dashboard["panels"]) >= 8 and len({panel["id"] for panel in dashboard["panels"]}) == len(
        dashboard["panels"]
    )

    async def test(client: Client) -> None:
        await client.chat()
        there = {name for name, _ in await scraped(client)}
        assert names <= there, names - there
        for name in ("time_to_first_token", "inter_token_latency", "e2e_request_latency"):
            assert f"vllm:{name}_seconds_bucket" in names
        assert {"vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc"} <= names

    serving(ScriptEngine(SAID), test)


def test_connections_that_are_cut_are_answers_cut():
    """A client that goes away in the middle of a stream counts as aborted, whatever it had read."""
    engine = ScriptEngine(list(b"abc"), max_num_seqs=1, pause=0.01)

    async def test(client: Client) -> None:
        async with aiohttp.ClientSession() as session:
            response = await session.post(
                f"{client.url}/v1/chat/completions",
                json={"messages": [{"role": "user", "content": "hi"}], "stream": True},
            )
            await response.content.readline()
            response.close()
        assert ended(await until(client, lambda found: bool(ended(found)))) == {"abort": 1}

    serving(engine, test)
