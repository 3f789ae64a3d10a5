"""What a program launches, moves and waits for, in texts whose sums can be done by hand."""

from __future__ import annotations

from cartridges_jax.planning.launches import Launches, Paged, launches

# An embedding is looked up and changed in place, a loop turns five times, and a kernel reads pages.
PROGRAM = """HloModule jit_step

%looked_up (table: bf16[1000,64], ids: s32[8]) -> bf16[8,64] {
  %table = bf16[1000,64]{1,0} parameter(0)
  %ids = s32[8]{0} parameter(1)
  ROOT %rows = bf16[8,64]{1,0} gather(%table, %ids), offset_dims={1}
}

%changed (pool: bf16[1000,64], new: bf16[8,64], ids: s32[8]) -> bf16[1000,64] {
  %pool = bf16[1000,64]{1,0} parameter(0)
  %new = bf16[8,64]{1,0} parameter(1)
  %ids.1 = s32[8]{0} parameter(2)
  ROOT %set = bf16[1000,64]{1,0} scatter(%pool, %ids.1, %new), to_apply=%last
}

%body (p: (s32[], f32[4,4])) -> (s32[], f32[4,4]) {
  %p = (s32[], f32[4,4]{1,0}) parameter(0)
  %x = f32[4,4]{1,0} get-tuple-element(%p), index=1
  %product = f32[4,4]{1,0} dot(%x, %x)
  ROOT %both = (s32[], f32[4,4]{1,0}) tuple(%i, %product)
}

ENTRY %main (a: bf16[1000,64], b: s32[8]) -> bf16[8,64] {
  %a = bf16[1000,64]{1,0} parameter(0)
  %b = s32[8]{0} parameter(1)
  %found = bf16[8,64]{1,0} fusion(%a, %b), kind=kLoop, calls=%looked_up, metadata={op_name="x"}
  %while = (s32[], f32[4,4]{1,0}) while(%t), condition=%more, body=%body, backend_config={"known_trip_count":{"n":"5"}}
  %pool.1 = bf16[1000,64]{1,0} fusion(%a, %found, %b), kind=kInput, calls=%changed
  ROOT %o = bf16[8,64] custom-call(%found, %pool.1), custom_call_target="k", metadata={op_name="/decode_attention/"}
}
"""
ROWS, IDS, POOL, PRODUCT = 8 * 64 * 2, 8 * 4, 1000 * 64 * 2, 4 * 4 * 4


def test_bytes_are_those_that_are_read_and_written():
    looked_up = 2 * ROWS + IDS
    changed = 2 * ROWS + IDS  # the new rows are read, and written
    loop = 5 * 3 * PRODUCT
    kernel = 2 * ROWS + 7.0
    found = launches(PROGRAM, Paged(1000, 7.0))
    assert found == Launches(8, looked_up + changed + loop + kernel, 0)
    assert launches(PROGRAM).num_bytes == found.num_bytes - 7.0 + POOL  # a kernel of which nothing is known


def test_the_host_waits_where_the_data_decide():
    loop = PROGRAM.replace('backend_config={"known_trip_count":{"n":"5"}}', "x=y")
    assert launches(loop, unknown_trips=2) == launches(PROGRAM.replace('"n":"5"', '"n":"2"')) + Launches(waits=2)
    call = "  %found.1 = bf16[8,64]{1,0} conditional(%p, %b, %b), branch_computations={%looked_up, %body}\n"
    branched = PROGRAM.replace("  %while =", f"{call}  %while =")
    assert launches(branched, is_gpu=True).waits == 1 and launches(branched).waits == 0
    sent = PROGRAM.replace("  %while =", "  %sent = token[] outfeed(%found, %b)\n  %while =")
    assert launches(sent).waits == 1


def test_what_a_tpu_holds_beside_its_cores_is_not_moved():
    near = PROGRAM.replace("%found = bf16[8,64]{1,0}", "%found = bf16[8,64]{1,0:T(8,128)(2,1)S(1)}")
    assert launches(near).num_bytes == launches(PROGRAM).num_bytes - 3 * ROWS


def test_a_kernel_that_writes_pages_in_place_writes_what_it_is_given():
    text = PROGRAM.replace("ROOT %o = bf16[8,64] custom", "ROOT %o = bf16[1000,64] custom")
    text = text.replace("/decode_attention/", "/write/").replace(
        'target="k"', 'target="k", output_to_operand_aliasing={}'
    )
    assert launches(text, Paged(1000, 7.0)).num_bytes == launches(PROGRAM, Paged(1000, 0.0)).num_bytes
