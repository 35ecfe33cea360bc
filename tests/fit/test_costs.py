"""Reads costs off programs that were written by hand, and off small real ones whose costs are known."""

from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from jaxblock.fit.costs import count_costs
from jaxblock.fit.hlo import parse_program
from jaxblock.fit.transfers import COLLECTIVE_KINDS

PROGRAM = (Path(__file__).parents[1] / "fixtures" / "by_hand.hlo").read_text()


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
