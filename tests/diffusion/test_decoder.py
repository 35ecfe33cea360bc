"""What the decoder promises whatever the weights: batches do not matter, it ends, no mask token is committed."""

from __future__ import annotations

from typing import get_args

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxblock.diffusion import canvas as canvases
from jaxblock.diffusion.canvas import Layout
from jaxblock.diffusion.decoding import decoder, scoring
from jaxblock.diffusion.decoding.config import DecodeConfig, RuleName

MASK, FILL, EOT = 9, 8, 7
PROMPTS = [[1], [2, 3], [4, 5, 6], [0, 1]]
_decode = jax.jit(decoder.decode, static_argnums=(0, 1, 2))


def _decoding(steps, **fields):
    return DecodeConfig(steps_per_block=steps, **{"early_stop": False, **fields})


@pytest.fixture(scope="module")
def net(tiny):
    return tiny[0](dtype="float32", n_layers=1)


@pytest.fixture(scope="module")
def layout(tiny):
    return tiny[1]()


def _run(net, layout, options, rows, width=4, seed=3):
    """Decodes PROMPTS[rows], each under its own index, on a canvas for prompts of ``width`` at most."""
    prompts = [PROMPTS[row] for row in rows]
    ids = np.array([p + [0] * (width - len(p)) for p in prompts], np.int32)
    index = jnp.asarray(rows, jnp.int32)
    lengths = jnp.asarray([len(p) for p in prompts], jnp.int32)
    canvas = canvases.for_decoding(layout, jnp.asarray(ids), lengths, index)
    return jax.device_get(_decode(net[0], layout, options, net[1], canvas, seed))


OPTIONS = {
    "sampled": _decoding(3, temperature=0.8),
    "random": _decoding(2, rule="random", temperature=1.0),
    "threshold": _decoding(3, rule="confidence_threshold", threshold=0.5, early_stop=True),
    "guided": _decoding(2, temperature=0.5, cfg_scale=1.5),
    "dream": _decoding(2, rule="entropy", quota="dream", temperature=1.2, top_p=0.9, alg_temp=0.3, early_stop=True),
    "origin": _decoding(3, rule="origin", temperature=1.0, top_k=4, cfg_scale=0.5),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_a_result_does_not_depend_on_the_batch(net, layout, name):
    """The same prompts alone, in another order, and on a wider canvas."""
    together = _run(net, layout, OPTIONS[name], [0, 1, 2, 3])
    turned = _run(net, layout, OPTIONS[name], [3, 1, 0, 2])
    alone = _run(net, layout, OPTIONS[name], [1], width=7)
    chex.assert_trees_all_equal(jax.tree.map(lambda leaf: leaf[[3, 1, 0, 2]], together), turned)
    chex.assert_trees_all_equal(jax.tree.map(lambda leaf: leaf[[1]], together), alone)
    if OPTIONS[name].temperature:
        assert (_run(net, layout, OPTIONS[name], [0, 1, 2, 3], seed=4).response != together.response).any()


class Fixed:
    """A network that says the same whatever it sees: ``table[prompt length, response position]`` are its logits."""

    def hidden(self, params, view, row_keys=None):
        prompt_len = view.length - params["table"].shape[1]
        at = view.active - prompt_len[:, None]
        return params["table"][prompt_len[:, None], at]

    def logits(self, params, hidden):
        return hidden

    def nll(self, params, hidden, targets):
        raise AssertionError("a decoder knows no targets")


FIXED = Fixed()


def _fixed(rows, vocab=11):
    """Params of ``Fixed``: rows[length][position] -> {token: logit}; every other logit is 0."""
    table = np.zeros((5, 9, vocab), np.float32)
    for length, positions in rows.items():
        for position, logits in positions.items():
            for token, value in logits.items():
                table[length, position, token] = value
    return {"table": jnp.asarray(table)}


@pytest.mark.parametrize("rule", get_args(RuleName))
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_mask_token_is_never_committed_and_every_rule_ends(layout, rule, temperature):
    """Its logit is the largest everywhere: threshold and factor accept nothing but the best, one step a token."""
    params = _fixed({n: {i: {MASK: 30.0} for i in range(9)} for n in range(1, 5)})
    out = _run((FIXED, params), layout, _decoding(3, rule=rule, temperature=temperature), [0, 1, 2])
    assert (out.response != MASK).all() and (out.commit_step >= 0).all()
    if rule == "origin":  # a block may be full before its last step
        assert (out.nfe >= 3).all() and (out.nfe <= 9).all()
    else:
        assert out.nfe.tolist() == [9, 9, 9]


def test_early_stop_freezes_finished_rows_and_saves_forwards(layout):
    """Row 0 ends in its first block, row 1 in its second, row 2 never; a stop token freezes after its whole block."""
    sure = {i: {2: 20.0} for i in range(9)}
    params = _fixed({1: sure | {1: {EOT: 20.0}}, 2: sure | {5: {FILL: 20.0}}, 3: sure})
    rule = dict(rule="confidence_threshold", threshold=0.9)
    stopped = _run((FIXED, params), layout, _decoding(3, early_stop=True, **rule), [0, 1, 2])
    assert stopped.response.tolist() == [[2, EOT, 2] + [FILL] * 6, [2, 2, 2, 2, 2, FILL] + [FILL] * 3, [2] * 9]
    assert stopped.nfe.tolist() == [1, 2, 3]
    assert (stopped.commit_step[0, 3:] == -1).all() and (stopped.commit_step[2] == np.repeat([0, 1, 2], 3)).all()
    going = _run((FIXED, params), layout, _decoding(3, **rule), [0, 1, 2])
    assert going.nfe.tolist() == [3, 3, 3] and going.response[0].tolist() == [2, EOT] + [2] * 7
    two = _run((FIXED, params), layout, _decoding(3, early_stop=True, cfg_scale=0.5, **rule), [0, 1, 2])
    assert two.nfe.tolist() == [2, 4, 6], "guidance costs two forwards a step"


@pytest.mark.parametrize("rule", ["low_confidence", "maskgit_plus", "topk_margin", "entropy"])
def test_steps_quota_and_commit_order(layout, rule):
    """Most confident first, ties to the lowest index, the remainder of the quota to the first step."""
    params = _fixed({1: {0: {1: 3.0}, 1: {1: 5.0}, 2: {1: 3.0}}})
    out = _run((FIXED, params), layout, _decoding(2, rule=rule), [0])
    assert out.commit_step[0].tolist() == [0, 0, 1, 2, 2, 3, 4, 4, 5]
    assert out.response[0].tolist() == [1, 1, 1] + [0] * 6, "equal logits give the lowest token"
    assert out.nfe.tolist() == [6]
    idle = _run((FIXED, params), layout, _decoding(5, rule=rule), [0])
    assert idle.nfe.tolist() == [9], "a finished block takes no further steps"
    late = _run((FIXED, params), layout, _decoding(3, rule=rule, quota="dream"), [0])
    assert late.commit_step[0].tolist() == [2, 1, 2, 4, 5, 5, 7, 8, 8], "Dream's first step commits nothing here"
    assert late.nfe.tolist() == [9]


def test_eos_suppression(layout):
    """``logits`` never writes the fill token; ``confidence`` writes it, last."""
    params = _fixed({1: {0: {FILL: 9.0, 1: 1.0}, 1: {2: 2.0}, 2: {EOT: 8.0, 3: 1.0}}})
    none, logits, confidence = (
        _run((FIXED, params), layout, _decoding(3, eos_suppression=how), [0])
        for how in ("none", "logits", "confidence")
    )
    assert none.response[0, :3].tolist() == [FILL, 2, EOT] and none.commit_step[0, :3].tolist() == [0, 2, 1]
    assert logits.response[0, :3].tolist() == [1, 2, EOT] and logits.commit_step[0, :3].tolist() == [2, 1, 0]
    assert confidence.response[0, :3].tolist() == [FILL, 2, EOT] and confidence.commit_step[0, :3].tolist() == [1, 0, 2]


def test_gumbel_noise_samples_the_softmax_at_its_temperature():
    """One token of 20,000 rows at T = 0.5, 1 and 2: chi-square against softmax(logits / T), mask left out."""
    logits = np.array([0.0, 1.0, -1.0, 2.0, 0.5, 5.0], np.float32)  # the last is the mask
    layout = Layout(1, 1, "same_position", "aligned", None, 5, 0, (0,))
    many = 20_000
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(0), jnp.arange(many))
    wide = jnp.broadcast_to(jnp.asarray(logits), (many, 1, 6))
    for temperature in (0.5, 1.0, 2.0):
        options = _decoding(1, temperature=temperature)
        run = jax.jit(scoring.score, static_argnums=(0, 1))
        token = np.asarray(run(layout, options, wide, jnp.ones((many, 1), bool), keys).token)[:, 0]
        weights = np.exp(logits[:5] / temperature)
        expected = many * weights / weights.sum()
        seen = np.bincount(token, minlength=5)
        assert len(seen) == 5, "the mask token is never drawn"
        assert ((seen - expected) ** 2 / expected).sum() < 18.5, "chi-square of 4 degrees of freedom at 0.001"


def test_guidance_of_scale_0_is_none_and_other_scales_extrapolate(net, layout):
    plain = _run(net, layout, _decoding(3), [0, 1, 2, 3])
    guided = _run(net, layout, _decoding(3, cfg_scale=1e-9), [0, 1, 2, 3])
    np.testing.assert_array_equal(plain.response, guided.response)
    assert (guided.nfe == 2 * plain.nfe).all()
    assert (_run(net, layout, _decoding(3, cfg_scale=3.0), [0, 1, 2, 3]).response != plain.response).any()


def test_block_by_block_from_the_host_is_the_scan(net, layout):
    """What ``decode --watch`` does."""
    options = _decoding(3, temperature=0.7)
    whole = _run(net, layout, options, [0, 1])
    ids = jnp.asarray([[1, 0, 0, 0], [2, 3, 0, 0]], jnp.int32)
    index = jnp.arange(2, dtype=jnp.int32)
    canvas = canvases.for_decoding(layout, ids, jnp.asarray([1, 2], jnp.int32), index)
    carry = decoder.start_decoding(layout, canvas, 3)
    block = jax.jit(decoder.decode_block, static_argnums=(0, 1, 2))
    for k in range(layout.n_blocks):
        carry = block(net[0], layout, options, net[1], canvas, carry, jnp.int32(k))
    chex.assert_trees_all_equal(decoder.finish(layout, canvas, carry), whole)


def test_settings_that_compile_alike_share_a_program(net, layout):
    """Seed, batch size, sizes and ids are no part of the program; a rule is."""
    run = jax.jit(chex.assert_max_traces(decoder.decode, n=1), static_argnums=(0, 1, 2))
    canvas = canvases.for_decoding(layout, jnp.ones((2, 4), jnp.int32), jnp.full(2, 4, jnp.int32), jnp.arange(2))
    for fields in (
        {},
        {"seed": 3, "batch_size": 2},
        {"steps_per_block": layout.block},
        {"stop_ids": (1,), "fill_id": 2},
    ):
        options = DecodeConfig(**fields)
        run(net[0], layout, options.static(layout.block), net[1], canvas, options.seed)
    assert DecodeConfig(rule="random").static(3) != DecodeConfig().static(3)


def test_responses_by_step_are_rebuilt_from_the_commit_steps(layout):
    mask = layout.mask_id
    responses = decoder.Responses(jnp.array([[5, 6, 7, 1]]), jnp.array([[2, 0, 2, -1]]), jnp.array([3]))
    got = decoder.responses_by_step(layout, responses, 3)[:, 0].tolist()
    assert got == [[mask] * 4, [mask, 6, mask, mask], [mask, 6, mask, mask], [5, 6, 7, mask]]
    never = responses._replace(commit_step=jnp.full((1, 4), -1))
    assert (decoder.responses_by_step(layout, never, 3) == mask).all()
