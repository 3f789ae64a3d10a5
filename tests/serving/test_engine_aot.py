"""The engine's step compiled for accelerators that are not here, its heads over four of them."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import mesh_programs
import pytest

from cartridges_jax.models.language_model import LanguageModel
from cartridges_jax.models.params import decode_specs, weight_specs
from cartridges_jax.parallel import sharding
from cartridges_jax.parallel.sharding import MeshConfig
from cartridges_jax.planning.chips import devices_of
from cartridges_jax.planning.hlo import traffic
from cartridges_jax.serving.decoder import to_decode_layout
from cartridges_jax.serving.engine import Engine
from cartridges_jax.serving.steps import decode_step


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
