"""Decoding with cached keys and values, and with passes no wider than what is visible, against the plain decoder."""

from __future__ import annotations

import dataclasses

import chex
import jax
import numpy as np
import pytest

from jaxblock.diffusion import likelihood
from jaxblock.diffusion.canvas import MOST_WIDTHS, from_rows
from jaxblock.diffusion.config import CanvasConfig
from jaxblock.diffusion.decoding import decoder, passes
from jaxblock.diffusion.decoding.rules import check_options
from jaxblock.diffusion.layouts import decoding_layout
from jaxblock.errors import UserError
from tests.diffusion.decoding import BLIND, Refreshing, decode_jit, decoding, padded

PROMPTS = [[1], [2, 3], [4, 5, 6], [0, 1]]
WAYS = {
    "threshold": decoding(3, rule="confidence_threshold", threshold=0.9, cfg_scale=0.5),
    "drawn": decoding(3, rule="entropy", quota="dream", temperature=1.2, top_p=0.9, alg_temp=0.3, early_stop=True),
}


@pytest.fixture(scope="module")
def made(tiny):
    """{layers: (network, parameters)}."""
    return {layers: tiny[0](dtype="float32", n_layers=layers) for layers in (1, 2)}


def _decode(net, layout, options, prompts=PROMPTS, width=4, first=0):
    ids, lengths, index = padded(prompts, width)
    return jax.device_get(decode_jit(net[0], layout, options, net[1], 3, ids, lengths, index + first))


def _assert_same(one, other, but=("positions", "computed")):
    """Asserts that responses are equal but for the counts named."""
    chex.assert_trees_all_equal(*(found._replace(**dict.fromkeys(but, np.zeros(1))) for found in (one, other)))


def _equations(jaxpr):
    """Yields every operation of a traced function, and of those that it calls."""
    for eqn in jaxpr.eqns:
        yield eqn
        for leaf in jax.tree.leaves(eqn.params):
            inner = getattr(leaf, "jaxpr", leaf)
            yield from _equations(inner) if hasattr(inner, "eqns") else ()


def _with(options, **fields):
    return decoder.DecodeConfig(**{**vars(options), **fields})


@pytest.mark.parametrize("alignment", ["same_position", "shifted"])
def test_every_position_of_every_pass_is_counted(tiny, alignment):
    """5 blocks of 3, 2 steps each: a full pass, and one beside the cache."""
    layout, shift = tiny[1](alignment=alignment, response_len=15), alignment == "shifted"
    full, first = np.array([1, 2, 3, 2]) + 15, sum(15 - 3 * k + shift for k in range(5))
    computed = sum(15 - 3 * k + shift for k in (0, 0, 2, 3, 4))  # the passes of blocks 0 and 1 have one size
    beside = {"prefix": (first, computed), "dual": (5 * (3 + shift),) * 2}
    net = BLIND, {"table": np.eye(11, dtype=np.float32)}
    plain = _decode(net, layout, decoding(2))
    assert plain.positions.tolist() == (10 * full).tolist() and plain.computed.tolist() == [10 * 19] * 4
    for cache, (needed, total) in beside.items():
        found = _decode(net, layout, decoding(2, cache=cache))
        _assert_same(plain, found)
        assert found.nfe.tolist() == [10] * 4
        assert found.positions.tolist() == (5 * full + needed).tolist()
        assert found.computed.tolist() == [5 * 19 + total] * 4


@pytest.mark.parametrize(
    "cache, alignment, way", [("prefix", "shifted", "drawn"), ("dual", "same_position", "threshold")]
)
def test_caches_serve_every_way_to_decode(tiny, made, cache, alignment, way):
    """The keys and values of a single layer depend on their own token alone, so that its caches are exact."""
    layout, options = tiny[1](alignment=alignment), _with(WAYS[way], cache=cache)
    cached = _decode(made[1], layout, options)
    _assert_same(_decode(made[1], layout, WAYS[way]), cached)
    beside_others = _decode(made[1], layout, options, PROMPTS[1:2] * 4, first=1)
    _assert_same(
        *(jax.tree.map(lambda leaf, at=at: leaf[at], found) for found, at in ((cached, 1), (beside_others, 0)))
    )


def test_a_block_that_the_first_step_fills_takes_no_second_pass(tiny, made):
    """A network that is sure of every token; guidance takes two passes a step."""
    net, params = made[1]
    sure = net, params | {"head": 1e4 * params["head"]}
    found = _decode(sure, tiny[1](), _with(WAYS["threshold"], cache="dual"))
    assert found.nfe.tolist() == [6] * 4 and found.positions.tolist() == [6 * n for n in (10, 11, 12, 11)]


@pytest.mark.parametrize("cache, alignment", [("prefix", "shifted"), ("dual", "same_position")])
def test_a_cache_refreshed_at_every_step_is_no_cache_and_a_stale_one_is_not(tiny, made, cache, alignment):
    net, params = made[2]
    guidance = {"prefix": 0.0, "dual": 0.5}[cache]
    layout, options = tiny[1](alignment=alignment, response_len=6), decoding(3, temperature=0.7, cfg_scale=guidance)
    plain = _decode((net, params), layout, options)
    _assert_same(plain, _decode((Refreshing(net.arch), params), layout, _with(options, cache=cache)))
    stale = _decode((net, params), layout, _with(options, cache=cache))
    assert (stale.response != plain.response).any()


def test_the_first_step_of_a_block_is_exact(tiny, made):
    plain, cached = (_decode(made[2], tiny[1](), decoding(1, cache=cache)) for cache in ("none", "dual"))
    _assert_same(plain, cached, ())


def test_one_block_without_a_prompt_has_nothing_stale(tiny, made):
    layout = tiny[1](alignment="shifted", response_len=3)
    plain, dual = (_decode(made[2], layout, decoding(3, cache=cache), [[]], 0) for cache in ("none", "dual"))
    _assert_same(plain, dual)


def test_positions_past_the_window_are_not_computed(tiny, made, monkeypatch):
    """The same tokens and NELBO as with all positions computed, the hidden ones as hidden keys."""
    options, long = decoding(2, cache="prefix"), tiny[1](response_len=24)._replace(suffix_window=4)
    sizes = passes.sizes_by_block(long, options, 4)
    assert len(set(sizes)) == MOST_WIDTHS and sizes[0] == (4 + 2 * 3 + 4, 3 + 4) and sizes[-1] == (28, 6)
    layout = tiny[1](response_len=12, block=6)._replace(suffix_window=2)
    ids, lengths, index = padded(PROMPTS)
    rows = (ids, lengths, np.full((4, 12), 5, np.int32), np.array([12, 7, 3, 9], np.int32), index)

    def both():
        found = _decode(made[1], layout, options)
        canvas = jax.jit(from_rows, static_argnums=0)(layout, *rows)
        score = jax.jit(lambda p, c: likelihood.nelbo(made[1][0], layout, 2, p, c, jax.random.key(0)))
        return found, score(made[1][1], canvas).per_block

    narrow, scores = both()
    monkeypatch.setattr(likelihood, "widths_by_block", lambda layout, room: (16,) * 2)
    monkeypatch.setattr(passes, "widths_by_block", lambda layout, room: (16,) * 2)
    decode_jit.clear_cache()
    wide, oracle = both()
    decode_jit.clear_cache()
    _assert_same(narrow, wide, ("computed",))
    np.testing.assert_allclose(scores, oracle, rtol=2e-5)
    assert (narrow.computed < wide.computed).all() and np.abs(oracle).max() > 1


@pytest.mark.parametrize("cache", ["none", "dual"])
def test_a_loop_over_passes_holds_the_matrices_of_each_unrolled_layer(tiny, made, cache):
    """It would copy them out of their stacks at every pass. The tokens are those of scanned layers, whose loop holds the stacks."""
    (net, params), layout, options = made[2], tiny[1](), decoding(3, cache=cache)
    unrolled = dataclasses.replace(net, scan_layers=False)
    stacks = {leaf.shape for leaf in params["blocks"].values() if leaf.ndim == 3}

    def held(net):
        """The shapes of what the innermost loop of the decoder is given."""
        run = jax.make_jaxpr(lambda params, *given: decoder.decode_prompts(net, layout, options, params, 3, *given))
        found = [eqn for eqn in _equations(run(params, *padded(PROMPTS)).jaxpr) if eqn.primitive.name == "while"]
        return {var.aval.shape for eqn in found for var in eqn.invars}

    assert held(net) >= stacks and not held(unrolled) & stacks
    _assert_same(*(_decode((each, params), layout, options) for each in (net, unrolled)), ())


@pytest.mark.parametrize(
    "fields, says",
    [
        (dict(quirks="fast_dllm"), "set cache to prefix or dual"),
        (dict(quirks="fast_dllm", cache="dual"), "no decode.rule low_confidence"),
        (dict(quirks="fast_dllm", cache="dual", rule="entropy"), "quota even"),
        (dict(quirks="fast_dllm", cache="dual", rule="entropy", quota="dream", steps_per_block=1), "at least 2"),
        (dict(quirks="fast_dllm", cache="dual", rule="confidence_threshold"), "predicts its own position"),
    ],
)
def test_quirks_that_cannot_be_had_are_refused(made, fields, says):
    options = decoder.DecodeConfig(**fields)
    with pytest.raises(UserError, match=says):
        check_options(options)
        decoding_layout(CanvasConfig(), options, made[1][0].arch, (7,))
