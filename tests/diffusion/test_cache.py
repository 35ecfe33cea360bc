"""Decoding with cached keys and values, and with passes no wider than what is visible, against the plain decoder."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxblock.diffusion import likelihood
from jaxblock.diffusion.config import CanvasConfig
from jaxblock.diffusion.decoding import decoder, passes
from jaxblock.diffusion.decoding.config import DecodeConfig
from jaxblock.diffusion.decoding.rules import check_options
from jaxblock.diffusion.layouts import decoding_layout, infilling_layout
from jaxblock.errors import UserError
from jaxblock.models.transformer import Transformer
from jaxblock.types import KeysValues, View
from tests.diffusion.conftest import (
    ONE_LAYER,
    QUESTIONS,
    SPANS,
    TWO_LAYERS,
    P,
    assert_same,
    decode_jit,
    decoded,
    decoding,
    laid_out,
    make_layout,
    padded,
)

STORED = ("positions", "computed")  # what a cache saves
WAYS = {
    "same_position": dict(temperature=0.7, cfg_scale=0.5),
    "shifted": dict(rule="entropy", quota="dream", temperature=1.2, top_p=0.9, alg_temp=0.3),
}


@pytest.mark.parametrize(
    "cache, alignment", [pytest.param("prefix", "shifted", marks=pytest.mark.slow), ("dual", "same_position")]
)
def test_caches_change_no_token_of_a_single_layer_and_every_position_is_counted(cache, alignment):
    """5 blocks of 3, 2 steps each: a full pass, and one beside the cache."""
    layout, how = make_layout(alignment=alignment, response_len=15), WAYS[alignment]
    plain, cached = (decoded(ONE_LAYER, layout, decoding(2, cache=kind, **how)) for kind in ("none", cache))
    assert_same(plain, cached, STORED)
    guided, full, width, beside = 2, 15 + np.array([1, 2, 3, 2]), 15 + P, (5 * 3, 5 * 3)
    if cache == "prefix":  # from the position before the block on; the passes of blocks 0 and 1 have one size
        guided, beside = 1, [sum(1 + 15 - 3 * k for k in blocks) for blocks in ((0, 1, 2, 3, 4), (0, 0, 2, 3, 4))]
    for found, (needed, computed) in ((plain, (5 * full, 5 * width)), (cached, beside)):
        assert found.nfe.tolist() == [10 * guided] * 4
        assert found.positions.tolist() == (guided * (5 * full + needed)).tolist()
        assert found.computed.tolist() == [guided * (5 * width + computed)] * 4


@pytest.mark.parametrize(
    "cache, alignment, beside",
    [pytest.param("prefix", "same_position", 6, marks=pytest.mark.slow), ("dual", "shifted", 1 + 3)],
)
def test_caches_change_no_token_of_a_single_layer_where_spans_are_filled(cache, alignment, beside):
    layout, (prompts, rests) = make_layout(alignment=alignment)._replace(infill=True), zip(*SPANS, strict=True)
    options = [
        decoding(None, cache=kind, temperature=1.5, cfg_scale=0.5 * (cache == "dual")) for kind in ("none", cache)
    ]
    plain, cached = (decoded(ONE_LAYER, layout, each, prompts, rests) for each in options)
    assert_same(plain, cached, STORED)
    # Four steps over 7 positions, two of which, after a block's first step, compute the block or all from its beginning on.
    passes = options[0].passes
    assert plain.positions[0] == passes * 4 * 7 and cached.positions[0] == passes * (2 * 7 + 2 * beside)


def test_what_no_cache_can_make_stale():
    """The first step of each block, and a single block without a prompt."""

    def both(layout, steps, prompts=QUESTIONS, room=P):
        options = (decoding(steps, cache=cache) for cache in ("none", "dual"))
        return (decoded(TWO_LAYERS, layout, each, prompts, room=room) for each in options)

    assert_same(*both(make_layout(), 1), ())
    assert_same(*both(make_layout(alignment="shifted", response_len=3), 3, [[]], room=0), STORED)


@dataclasses.dataclass(frozen=True)
class Refreshing(Transformer):
    """A network whose cache is the tokens of the block's first step: each step computes the whole canvas anew."""

    def refresh(self, params, view):
        kept = view.ids.astype("float32")[None, :, :, None, None]
        return self.hidden(params, view), KeysValues(kept, kept)

    def update(self, params, part, cache):
        old = cache.k[0, :, :, 0, 0].astype("int32")
        at = np.arange(old.shape[1]) - part.first[:, None]
        here = jnp.clip(at, 0, part.ids.shape[1] - 1)
        ids = jnp.where(at == here, jnp.take_along_axis(part.ids, here, axis=1), old)
        positions, reads = jnp.broadcast_to(np.arange(old.shape[1]), old.shape), part.first[:, None] + part.at
        return self.hidden(params, View(ids, positions, part.length, reads, reads, reads >= 0))


@pytest.mark.parametrize(
    "cache, alignment, guidance",
    [pytest.param("prefix", "shifted", 0.0, marks=pytest.mark.slow), ("dual", "same_position", 0.5)],
)
def test_a_cache_refreshed_at_every_step_is_no_cache_and_a_stale_one_depends_on_no_other_row(
    cache, alignment, guidance
):
    (net, params), layout = TWO_LAYERS, make_layout(alignment=alignment)
    plain, cached = (decoding(3, temperature=1.5, cfg_scale=guidance, cache=kind) for kind in ("none", cache))
    exact = decoded(TWO_LAYERS, layout, plain)
    assert_same(exact, decoded((Refreshing(net.arch), params), layout, cached), STORED)
    stale = decoded(TWO_LAYERS, layout, cached)
    others = ((decoded(TWO_LAYERS, layout, how, seed=seed).response for how in (plain, cached)) for seed in range(20))
    assert any((ours != theirs).any() for ours, theirs in others)
    alone = decoded(TWO_LAYERS, layout, cached, QUESTIONS[1:2], first=1)
    assert_same(jax.tree.map(lambda leaf: leaf[1:2], stale), alone, ())


def test_a_block_that_its_first_step_fills_takes_no_second_pass():
    found = decoded(
        TWO_LAYERS, make_layout(), decoding(None, rule="confidence_threshold", threshold=1e-6, cache="dual")
    )
    assert found.nfe.tolist() == [3] * 4 and found.computed.tolist() == [3 * (9 + P)] * 4


@pytest.mark.parametrize("cache, window", [("none", 0), pytest.param("prefix", 4, marks=pytest.mark.slow)])
def test_positions_past_the_window_are_not_computed(cache, window, monkeypatch):
    """The same tokens and NELBO as with all positions computed, the hidden ones as hidden keys: 5 blocks at 4 widths."""
    options = decoding(2, cache=cache)
    layout = make_layout(response_len=15)._replace(suffix_window=window)
    canvas = laid_out(layout, QUESTIONS, [[5] * n for n in (15, 7, 3, 12)])
    assert len(set(passes.sizes_by_block(layout, options, P))) == 4

    def both():
        score = jax.jit(lambda p, c: likelihood.nelbo(ONE_LAYER[0], layout, 2, p, c, jax.random.key(0)))
        return decoded(ONE_LAYER, layout, options), score(ONE_LAYER[1], canvas).per_block

    narrow, scores = both()
    for module in (likelihood, passes):
        monkeypatch.setattr(module, "widths_by_block", lambda layout, room: (15 + P,) * 5)
    decode_jit.clear_cache()
    wide, oracle = both()
    decode_jit.clear_cache()
    assert_same(narrow, wide)
    np.testing.assert_allclose(scores, oracle, rtol=2e-5)
    assert (narrow.computed < wide.computed).all() and np.abs(oracle).max() > 1


def equations(jaxpr):
    """Yields every operation of a traced function, and of those that it calls."""
    for eqn in jaxpr.eqns:
        yield eqn
        for leaf in jax.tree.leaves(eqn.params):
            inner = getattr(leaf, "jaxpr", leaf)
            yield from equations(inner) if hasattr(inner, "eqns") else ()


@pytest.mark.parametrize("cache", ["none", "dual"])
def test_a_loop_over_passes_holds_the_matrices_of_each_unrolled_layer(cache):
    """It would copy them out of their stacks at every pass. The tokens are those of scanned layers, whose loop holds the stacks."""
    (net, params), layout, options = TWO_LAYERS, make_layout(), decoding(3, cache=cache)
    unrolled = dataclasses.replace(net, scan_layers=False)
    stacks = {leaf.shape for leaf in params["blocks"].values() if leaf.ndim == 3}

    def held(net):
        """The shapes of what the loops of the decoder are given."""
        run = jax.make_jaxpr(lambda params, *given: decoder.decode_prompts(net, layout, options, params, 3, *given))
        traced = run(params, *padded(QUESTIONS, P), np.arange(4, dtype=np.int32)).jaxpr
        return {var.aval.shape for eqn in equations(traced) if eqn.primitive.name == "while" for var in eqn.invars}

    assert held(net) >= stacks and not held(unrolled) & stacks
    assert_same(*(decoded((each, params), layout, options) for each in (net, unrolled)), ())


@pytest.mark.parametrize(
    "fields, says",
    [
        (dict(quirks="fast_dllm"), "set cache to prefix or dual"),
        (dict(quirks="fast_dllm", cache="dual"), "no decode.rule low_confidence"),
        (dict(quirks="fast_dllm", cache="dual", rule="entropy"), "quota even"),
        (dict(quirks="fast_dllm", cache="dual", rule="entropy", quota="dream", steps_per_block=1), "at least 2"),
        (dict(quirks="fast_dllm", cache="dual", rule="confidence_threshold"), "predicts its own position"),
        (dict(), "set canvas.suffix_window to null"),  # it would hide what is given
    ],
)
def test_what_cannot_be_had_is_refused(fields, says):
    options, arch = DecodeConfig(**fields), TWO_LAYERS[0].arch
    with pytest.raises(UserError, match=says):
        check_options(options)
        decoding_layout(CanvasConfig(), options, arch, (7,))
        infilling_layout(CanvasConfig(suffix_window=8), options, arch, (7,))


def test_a_window_that_hides_nothing_is_no_reason_against_infilling():
    canvas = CanvasConfig(response_len=32, block=8, suffix_window=24)
    assert infilling_layout(canvas, DecodeConfig(), TWO_LAYERS[0].arch, (7,)).infill
    with pytest.raises(UserError, match="hides what comes after"):  # of a longer response it would
        infilling_layout(canvas, DecodeConfig(response_len=64), TWO_LAYERS[0].arch, (7,))
