"""Collectives of a program's text, in loops and in pairs of start and done."""

from __future__ import annotations

from cartridges_jax.planning.hlo import Traffic, exposed, traffic

PROGRAM = """HloModule jit_step, entry_computation_layout={(f32[8,4]{1,0})->f32[8,4]{1,0}}

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}

%inner (p: (s32[], bf16[8,4])) -> (s32[], bf16[8,4]) {
  %p = (s32[], bf16[8,4]{1,0}) parameter(0)
  %all-reduce.2 = bf16[8,4]{1,0} all-reduce(%x), channel_id=2, replica_groups={{0,1}}, to_apply=%add
}

%body (p: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %p = (s32[], f32[8,4]{1,0}) parameter(0)
  %gather = (f32[2,4]{1,0}, f32[8,4]{1,0}) all-gather-start(%w), channel_id=1, dimensions={0}
  %done = f32[8,4]{1,0} all-gather-done(%gather)
  %while.2 = (s32[], bf16[8,4]{1,0}) while(%t), condition=%more, body=%inner
}

ENTRY %main.1 (a: f32[8,4]) -> f32[8,4] {
  %a = f32[8,4]{1,0} parameter(0)
  %while.1 = (s32[], f32[8,4]{1,0}) while(%t), body=%body, backend_config={"known_trip_count":{"n":"5"},"x":"y"}
  ROOT %both = (f32[], f32[3]{0}) all-reduce(%b, %c), channel_id=3, to_apply=%add
}
"""


def test_loops_count_as_often_as_they_turn():
    gathered = Traffic(5, 5 * 8 * 4 * 4)
    assert traffic(PROGRAM, unknown_trips=2) == {
        "all-gather": gathered,
        "all-reduce": Traffic(2 * 5 + 1, 2 * 5 * 8 * 4 * 2 + 16),
    }
    assert traffic(PROGRAM)["all-reduce"].count == 5 + 1


def test_a_loop_that_says_its_length_in_its_condition_only():
    """As TPU programs do; one that compares two numbers of its state depends on the data."""
    condition = """%more (p: (s32[], bf16[8,4])) -> pred[] {
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  %n = s32[]{:T(128)} constant(7)
  ROOT %less = pred[]{:T(512)} compare(%i, %n), direction=LT
}

"""
    program = PROGRAM.replace("%inner (p", condition + "%inner (p")
    assert traffic(program, unknown_trips=2)["all-reduce"].count == 7 * 5 + 1
    depends = program.replace("constant(7)", "get-tuple-element(%p), index=1")
    assert traffic(depends, unknown_trips=2)["all-reduce"].count == 2 * 5 + 1


def test_what_has_a_product_beside_it_is_not_exposed():
    alone = {"all-gather": 5 * 8 * 4 * 4, "all-reduce": 2 * 5 * 8 * 4 * 2 + 16}
    assert exposed(PROGRAM, unknown_trips=2) == alone
    done = "  %done = f32[8,4]{1,0} all-gather-done(%gather)"
    product = "%product (a: f32[4,4]) -> f32[4,4] {\n  ROOT %dot.1 = f32[4,4] dot(%a, %a)\n}\n\n"
    fusion = "  %fusion.1 = f32[4,4]{1,0} fusion(%a), kind=kCustom, calls=%product, metadata={}\n"
    program = PROGRAM.replace("%inner (p", product + "%inner (p")
    assert exposed(program.replace(done, fusion + done), unknown_trips=2) == alone | {"all-gather": 0}
    assert exposed(program.replace(done, done + "\n" + fusion), unknown_trips=2) == alone
    assert traffic(program.replace(done, fusion + done)) == traffic(PROGRAM)
