"""The engine's step compiled for accelerators that are not here, its heads over four of them."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import mesh_programs
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from cartridges_jax.models.language_model import LanguageModel
from cartridges_jax.models.params import decode_specs, weight_specs
from cartridges_jax.parallel import sharding
from cartridges_jax.parallel.sharding import MeshConfig
from cartridges_jax.planning.chips import devices_of
from cartridges_jax.planning.hlo import traffic
from cartridges_jax.planning.launches import launches
from cartridges_jax.serving.decoder import to_decode_layout
from cartridges_jax.serving.engine import Engine
from cartridges_jax.serving.sampling import KINDS, Wants
from cartridges_jax.serving.steps import decode_step, sample_step


@pytest.mark.aot
@pytest.mark.parametrize("topology", ["v5e-8", "v5p-16", "h100:8"])
def test_a_step_compiles_and_communicates_what_it_does_on_cpus(topology: str) -> None:
    config, rows = mesh_programs.CONFIG, 3
    params = jax.tree.map(lambda a: jnp.asarray(a, jnp.bfloat16), mesh_programs.inputs(config)[0])
    engine = Engine(LanguageModel("tiny", config, params, None, ""), rows, 256, batch_sizes=[rows], attention="xla")  # type: ignore[arg-type]
    batch = engine._next_batch(range(rows))
    mesh = sharding.make_mesh(MeshConfig(tensor=4), devices_of(topology)[1][:4])

    with jax.set_mesh(mesh):  # a CPU's own weights lie otherwise
        given = sharding.abstract(params, weight_specs(config), mesh)
        weights = jax.eval_shape(functools.partial(to_decode_layout, config=config, mesh=mesh), given)
    trees = (weights, decode_specs(config)), (engine._cache, sharding.PAGES)
    weights, cache = (sharding.abstract(tree, table, mesh) for tree, table in trees)
    asked = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), (engine._last, batch))
    options = {"config": config, "mesh": mesh, "num_top": 5, "implementation": "xla"}
    compiled = decode_step.lower(weights, cache, *asked, **options).compile()
    found = traffic(compiled.as_text())
    assert found["all-reduce"].count == 2 * config.num_layers + 1
    assert found["all-gather"].num_bytes == rows * config.vocab_size * 4


@pytest.mark.aot
@pytest.mark.parametrize("kind", KINDS)
def test_sampling_on_a_gpu_never_waits_for_the_host(kind: Wants) -> None:
    config, rows = mesh_programs.CONFIG, 3
    params = jax.tree.map(jnp.asarray, mesh_programs.inputs(config)[0])
    engine = Engine(LanguageModel("tiny", config, params, None, ""), rows, 256, batch_sizes=[rows], attention="xla")  # type: ignore[arg-type]
    logits, mask = (
        np.zeros((rows, config.vocab_size), np.float32),
        np.zeros((rows, -(-config.vocab_size // 32)), np.int32),
    )
    mesh = sharding.make_mesh(MeshConfig(), devices_of("h100:1")[1])
    given = engine._last, logits, engine._next_batch(range(rows)), mask
    asked = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=NamedSharding(mesh, P())), given)
    with jax.set_mesh(mesh):
        known, found_out = (sample_step.lower(*asked, num_top=5, wants=w).compile().as_text() for w in (kind, None))
    assert launches(known, is_gpu=True).waits == 0 < launches(found_out, is_gpu=True).waits
