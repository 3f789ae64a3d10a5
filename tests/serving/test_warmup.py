"""Compiling before the first answer: what clients are told meanwhile, and that a later start finds it done."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path

import pytest
import tiny
from test_server import SAID, Client, ScriptEngine, serving  # pyrefly: ignore[missing-import]

from cartridges_jax import serve
from cartridges_jax.command_line.errors import UserError
from cartridges_jax.serving import engine_thread, server_process
from cartridges_jax.serving.engine import Engine
from cartridges_jax.serving.warmup import Warmup


def test_requests_wait_and_health_says_how_long():
    gates = [threading.Event(), threading.Event()]

    async def test(client: Client) -> None:
        starting = {"status": "starting", "programs": 2}
        assert await client.get("/health") == (503, {**starting, "compiled": 0, "seconds_left": None})
        assert client.headers["Retry-After"] == "1"
        waiting = asyncio.create_task(client.chat())
        await asyncio.sleep(0.05)
        gates[0].set()
        while (told := (await client.get("/health"))[1])["compiled"] == 0:
            await asyncio.sleep(0.01)
        assert told == {**starting, "compiled": 1, "seconds_left": told["seconds_left"]}
        assert told["seconds_left"] > 0.04, "as long as the first one took, at least"
        assert (await client.get("/v1/models"))[0] == 200 and not waiting.done()
        gates[1].set()
        assert (await waiting)[0] == 200
        assert await client.get("/health") == (200, {"status": "ok"})

    serving(ScriptEngine(SAID), test, programs=[partial(gate.wait, 20) for gate in gates])


def test_rare_programs_wait_until_no_request_has_come_for_a_while(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(engine_thread, "QUIET_SECONDS", 3.0)
    compiled: list[int] = []

    async def test(client: Client) -> None:
        for _ in range(35):  # which together take longer than the quiet that it waits for
            await asyncio.sleep(0.1)
            assert (await client.chat())[0] == 200
        assert not compiled
        for count in 1, 2:
            while len(compiled) < count:
                await asyncio.sleep(0.01)
            assert (await client.chat())[0] == 200
        assert compiled == [0, 1]

    serving(ScriptEngine(SAID), test, rare_programs=[partial(compiled.append, i) for i in range(2)])


def test_a_process_that_starts_a_server_says_how_far_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    log = tmp_path / "log"
    log.touch()
    with server_process._progress_from(log), log.open("a", encoding="utf-8") as file:
        file.write("loading a model ...\ncompiling: 1/9 programs, 0.15 programs/s, 1m28s left\n")
    # Read only now: `readouterr` drops what another thread prints between its reading and its truncating.
    assert capsys.readouterr().err == "compiling: 1/9 programs, 0.15 programs/s, 1m28s left\n"


def test_a_program_that_cannot_be_compiled_is_a_failed_engine():
    def fail() -> None:
        raise RuntimeError("out of memory")

    async def test(client: Client) -> None:
        while (told := await client.get("/health"))[1]["status"] == "starting":
            await asyncio.sleep(0.01)
        assert told == (503, {"status": "failed"})
        status, reply = await client.chat()
        assert status == 500 and reply["error"]["code"] == "engine_failed"

    serving(ScriptEngine(SAID), test, programs=[fail])


def test_it_stops_between_programs(capsys: pytest.CaptureFixture[str]):
    done: list[int] = []
    warmup = Warmup([lambda i=i: done.append(i) for i in range(5)])
    warmup.run(lambda: len(done) == 2)
    assert done == [0, 1] and warmup.compiled == 2 and not warmup.is_done and warmup.seconds_left is not None
    assert "compiling: 2/5 programs" in capsys.readouterr().err
    Warmup().run()
    assert Warmup().is_done and capsys.readouterr().err == "", "nothing to compile is nothing to tell"


KEPT = """
import json, jax
from cartridges_jax.serving.warmup import keep_programs

found = []
jax.monitoring.register_event_listener(lambda name, **_: found.append(name.rpartition("/")[2]))
keep_programs()
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)  # however fast this machine is
for _ in range(2):
    step = lambda _, y: jax.numpy.sort(y) @ y + jax.numpy.sin(y)
    jax.jit(lambda x: jax.lax.fori_loop(0, 9, step, x)).lower(jax.ShapeDtypeStruct((9, 9), "float32")).compile()
    jax.clear_caches()
print(json.dumps([found.count("cache_hits"), jax.config.jax_compilation_cache_dir]))
"""


@pytest.mark.parametrize("told", [None, "elsewhere"])
def test_programs_are_kept_for_the_next_start(tmp_path: Path, told: str | None):
    environment = os.environ | {"CARTRIDGES_JAX_CACHE": str(tmp_path / "ours"), "JAX_PLATFORMS": "cpu"}
    environment |= {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / told)} if told else {}
    run = subprocess.run([sys.executable, "-c", KEPT], env=environment, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    hits, folder = json.loads(run.stdout)
    assert Path(folder) == (tmp_path / told if told else tmp_path / "ours" / "programs")
    assert told or (hits == 1 and len(list(Path(folder).glob("*-cache"))) == 1)


def test_what_fits_is_said():
    engine = Engine(tiny.model(), max_num_seqs=3, max_length=200, cache_tokens=1000)
    said = serve.memory_of(engine, 2**20)
    assert said.startswith("keys and values: 1,024 positions in 1.00 GiB, room for 2 of 3 requests of 200 at once")
    with pytest.raises(UserError, match="cache_tokens is 100, expected at least 384 for a request of 200"):
        Engine(tiny.model(), max_num_seqs=3, max_length=200, cache_tokens=100)
    with pytest.raises(UserError, match="--cache-tokens is 0"):
        serve.main(["--cache-tokens=0"])
