"""Reads costs off programs that were written by hand, and off small real ones whose costs are known."""

import jax
import jax.numpy as jnp
import pytest

from jaxblock.fit.costs import count_costs
from jaxblock.fit.hlo import parse_program
from jaxblock.fit.transfers import COLLECTIVE_KINDS

PROGRAM = """\
HloModule by_hand, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%all-reduce-scatter.1 (given: f32[8,16]) -> f32[2,16] {
  %given = f32[8,16]{1,0} parameter(0)
  %reduced = f32[8,16]{1,0} all-reduce(%given), channel_id=7, replica_groups={{0,1,2,3}}, to_apply=%add
  %zero = s32[] constant(0)
  ROOT %part = f32[2,16]{1,0} dynamic-slice(%reduced, %zero, %zero), dynamic_slice_sizes={2,16}
}

%start.1 (given: bf16[4,8]) -> (bf16[4,8], bf16[16,8]) {
  %given.1 = bf16[4,8]{1,0} parameter(0)
  %whole = bf16[16,8]{1,0} all-gather(%given.1), channel_id=9, replica_groups=[1,4]<=[4], dimensions={0}
  ROOT %begun = (bf16[4,8]{1,0}, bf16[16,8]{1,0}) custom-call(%whole), custom_call_target="AsyncCollectiveStart"
}

%async_collective_fusion.1 (given: bf16[4,8]) -> bf16[16,8] {
  %given.2 = bf16[4,8]{1,0} parameter(0)
  ROOT %again = bf16[16,8]{1,0} all-gather(%given.2), channel_id=9, replica_groups=[1,4]<=[4], dimensions={0}
}

%inner_body (carry: (u32[], f32[8,8])) -> (u32[], f32[8,8]) {
  %carry = (u32[]{:T(128)}, f32[8,8]{1,0}) parameter(0)
  %count = u32[] get-tuple-element(%carry), index=0
  %two = u32[] constant(2)
  %next = u32[] add(%count, %two)
  %x = f32[8,8]{1,0} get-tuple-element(%carry), index=1
  %y = f32[8,8]{1,0} dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %out = (u32[], f32[8,8]{1,0}) tuple(%next, %y)
}

%inner_condition (carry: (u32[], f32[8,8])) -> pred[] {
  %carry.1 = (u32[], f32[8,8]{1,0}) parameter(0)
  %count.1 = u32[] get-tuple-element(%carry.1), index=0
  %four = u32[] constant(4)
  ROOT %go = pred[] compare(%count.1, %four), direction=LT
}

%outer_body (carry: (s32[], f32[8,16])) -> (s32[], f32[8,16]) {
  %carry.2 = (s32[], f32[8,16]{1,0}) parameter(0)
  %zero.1 = u32[] constant(0)
  %x.1 = f32[8,8]{1,0} constant({...})
  %begin = (u32[], f32[8,8]{1,0}) tuple(%zero.1, %x.1)
  %kernel = f32[8,8]{1,0} custom-call(%x.1), custom_call_target="tpu_custom_call", frontend_attributes={metadata={"a":
}}, more={}
  %loop = (u32[], f32[8,8]{1,0}) while(%begin), condition=%inner_condition, body=%inner_body
  %wide = f32[8,16]{1,0} get-tuple-element(%carry.2), index=1
  %scattered = f32[2,16]{1,0} fusion(%wide), kind=kCustom, calls=%all-reduce-scatter.1
  %index = s32[] get-tuple-element(%carry.2), index=0
  %one = s32[] constant(1)
  %index.1 = s32[] add(%index, %one)
  ROOT %out.1 = (s32[], f32[8,16]{1,0}) tuple(%index.1, %wide)
}

%outer_condition (carry: (s32[], f32[8,16])) -> pred[] {
  %carry.3 = (s32[], f32[8,16]{1,0}) parameter(0)
  %index.2 = s32[] get-tuple-element(%carry.3), index=0
  %limit = s32[] constant(32)
  ROOT %lt = pred[] compare(%index.2, %limit), direction=LT
}

ENTRY %main (w: f32[8,16], v: bf16[4,8]) -> f32[8,16] {
  %w = f32[8,16]{1,0} parameter(0)
  %v = bf16[4,8]{1,0} parameter(1)
  %one.1 = s32[] constant(1)
  %begin.1 = (s32[], f32[8,16]{1,0}) tuple(%one.1, %w)
  %layers = (s32[], f32[8,16]{1,0}) while(%begin.1), condition=%outer_condition, body=%outer_body
  %begun.1 = (bf16[4,8]{1,0}, bf16[16,8]{1,0}) fusion(%v), kind=kCustom, calls=%start.1
  %part.1 = bf16[16,8]{1,0} fusion(%v), kind=kCustom, calls=%async_collective_fusion.1
  %sum.1 = f32[100]{0} all-reduce(%w), channel_id=11, replica_groups=mesh['x'=2,'y'=2] {'y'}, to_apply=%add
  %moved = (f32[8,16]{1,0}, f32[8,16]{1,0}, u32[]) collective-permute-start(%w), channel_id=12, source_target_pairs={{0,1}}
  %moved.1 = f32[8,16]{1,0} collective-permute-done(%moved)
  %token = token[] after-all()
  %far = (f32[8,16]{1,0}, u32[], token[]) send(%w, %token), channel_id=9, frontend_attributes={_megascale="ALL_REDUCE"}
  ROOT %result = f32[8,16]{1,0} get-tuple-element(%layers), index=1
}
"""


def test_loops_and_collectives_of_a_program_by_hand():
    found = count_costs(parse_program(PROGRAM), 4)
    # The outer loop runs from 1 to 32, the inner one from 0 to 4 by twos; a kernel's attributes do not end a computation.
    assert found.flops == 31 * 2 * (2 * 8 * 8 * 8)
    assert found.sent("reduce-scatter") == 31 * (8 * 16 * 4) * 3 / 4
    assert found.sent("all-gather") == 16 * 8 * 2 * 3 / 4  # once, although its channel is in two fusions
    assert found.sent("all-reduce") == 2 * (8 * 16 * 4) / 2  # of the pairs along y
    assert found.sent("collective-permute") == 8 * 16 * 4
    assert found.across == 8 * 16 * 4
    assert found.sent() == sum(found.sent(kind) for kind in COLLECTIVE_KINDS)
    (scatter,) = [one for one in found.collectives if one.kind == "reduce-scatter"]
    assert (scatter.times, scatter.group) == (31, 4)


def test_a_noted_length_is_believed():
    noted = PROGRAM.replace("body=%outer_body", 'body=%outer_body, backend_config={"known_trip_count":{"n":"5"}}')
    assert count_costs(parse_program(noted), 4).sent("reduce-scatter") == 5 * (8 * 16 * 4) * 3 / 4


@pytest.mark.parametrize(
    "line, flops",
    [
        # A product of [512, 4096] and [4096, 64]; with a batch of 32 as a spatial dimension; padded taps do not count.
        ("bf16[512,64] convolution(%l, %r), dim_labels=bf_io->bf", 2 * 512 * 4096 * 64),
        ("f32[6,2,3] convolution(%p, %q), window={size=3 pad=1_1}, dim_labels=b0f_0io->b0f", 2 * 6 * 4 * 5 * 3),
    ],
)
def test_products_that_are_written_as_convolutions(line, flops):
    text = f"""\
ENTRY %main (l: bf16[512,4096]) -> f32[] {{
  %l = bf16[512,4096]{{1,0}} parameter(0)
  %r = bf16[4096,64]{{1,0}} parameter(1)
  %p = f32[6,2,5]{{2,1,0}} parameter(2)
  %q = f32[3,5,3]{{2,1,0}} parameter(3)
  ROOT %c = {line}
}}
"""
    assert count_costs(parse_program(text), 1).flops == flops


def test_a_scan_counts_all_its_layers():
    """XLA's own analysis counts a loop's body once, which is why costs are read off the program's text."""

    def layers(x: jax.Array, w: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]

    compiled = jax.jit(layers).lower(jnp.zeros((16, 64)), jnp.zeros((7, 64, 64))).compile()
    found = count_costs(parse_program(compiled.as_text()), 1)
    assert found.flops == 7 * 2 * 16 * 64 * 64
    weights = 7 * 64 * 64 * 4
    # Each layer reads its own slice, not the stack (seven times as much); a slice may be written and read once more.
    assert weights <= found.traffic < 5 * weights
