"""What the decoder promises whatever the weights: batches do not matter, it ends, no mask token is committed."""

from typing import get_args

import chex
import jax
import numpy as np
import pytest

from jaxblock.diffusion import canvas as canvases
from jaxblock.diffusion.decoding import decoder
from jaxblock.diffusion.decoding.config import DecodeConfig, RuleName
from tests.diffusion.decoding import FIXED, decode_jit, decoding, padded

MASK, FILL, EOT = 9, 8, 7
PROMPTS = [[1], [2, 3], [4, 5, 6], [0, 1]]


@pytest.fixture(scope="module")
def net(tiny):
    return tiny[0](dtype="float32", n_layers=1)


@pytest.fixture(scope="module")
def layout(tiny):
    return tiny[1]()


def _run(net, layout, options, rows, width=4, seed=3):
    """Decodes PROMPTS[rows], each under its own index."""
    ids, lengths, _ = padded([PROMPTS[row] for row in rows], width)
    found = decode_jit(net[0], layout, options, net[1], seed, ids, lengths, np.array(rows, np.int32))
    return jax.device_get(found._replace(computed=found.nfe))  # what is computed for a row depends on its batch


OPTIONS = {
    "dream": decoding(2, rule="entropy", quota="dream", temperature=1.2, top_p=0.9, alg_temp=0.3, early_stop=True),
    "origin": decoding(3, rule="origin", temperature=1.0, top_k=4, cfg_scale=0.5),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_a_result_does_not_depend_on_the_batch(net, layout, name):
    """The same prompts in another order, and one alone on a wider canvas."""
    together = _run(net, layout, OPTIONS[name], [0, 1, 2, 3])
    turned = _run(net, layout, OPTIONS[name], [3, 1, 0, 2])
    alone = _run(net, layout, OPTIONS[name], [1], width=7)
    chex.assert_trees_all_equal(jax.tree.map(lambda leaf: leaf[[3, 1, 0, 2]], together), turned)
    chex.assert_trees_all_equal(jax.tree.map(lambda leaf: leaf[[1]], together), alone)
    assert (_run(net, layout, OPTIONS[name], [0, 1, 2, 3], seed=4).response != together.response).any()


def test_block_by_block_from_the_host_is_the_scan(net, layout):
    """What ``decode --watch`` does."""
    options, prompts = OPTIONS["dream"], padded(PROMPTS)

    @jax.jit
    def begin(*prompts):
        canvas = canvases.for_decoding(layout, *prompts)
        return canvas, decoder.start_decoding(layout, canvas, 3)

    canvas, carry = begin(*prompts)
    block = jax.jit(decoder.decode_block, static_argnums=(0, 1, 2))
    for k in range(layout.n_blocks):
        carry = block(net[0], layout, options, net[1], canvas, carry, np.full(4, k, np.int32))
    found = jax.jit(decoder.finish, static_argnums=0)(layout, canvas, carry)
    chex.assert_trees_all_equal(found._replace(computed=found.nfe), _run(net, layout, options, [0, 1, 2, 3]))


def _fixed(layout, options, rows):
    """Decodes the first three prompts: rows[first token][position] -> {token: logit}; every other logit is 0."""
    table = np.zeros((11, 9, 11), np.float32)
    for first, positions in rows.items():
        for position, logits in positions.items():
            for token, value in logits.items():
                table[first, position, token] = value
    return _run((FIXED, {"table": table}), layout, options, [0, 1, 2])


ORDERED = {1: {0: {1: 3.0}, 1: {1: 5.0}, 2: {1: 3.0}}}


def _options(rule):
    return decoding(2, rule=rule, temperature=1.0 if rule in ("random", "origin", "factor") else 0.0)


@pytest.mark.parametrize("rule", get_args(RuleName))
def test_the_mask_token_is_never_committed_and_every_rule_ends(layout, rule):
    """Its logit is the largest everywhere: threshold and factor accept nothing but the best, one step a token."""
    out = _fixed(layout, _options(rule), {n: {i: {MASK: 30.0} for i in range(9)} for n in (1, 2, 4)})
    assert (out.response != MASK).all() and (out.commit_step >= 0).all()
    if rule == "origin":  # a block may be full before its last step
        assert (out.nfe >= 3).all() and (out.nfe <= 6).all()
    else:
        assert out.nfe.tolist() == [9 if rule in ("confidence_threshold", "factor") else 6] * 3


@pytest.mark.parametrize("rule", ["low_confidence", "maskgit_plus", "topk_margin", "entropy"])
def test_steps_quota_and_commit_order(layout, rule):
    """Most confident first, ties to the lowest index, the remainder of the quota to the first step."""
    out = _fixed(layout, _options(rule), ORDERED)
    assert out.commit_step[0].tolist() == [0, 0, 1, 2, 2, 3, 4, 4, 5]
    assert out.response[0].tolist() == [1, 1, 1] + [0] * 6, "equal logits give the lowest token"


def test_more_steps_than_masks_and_steps_that_commit_nothing(layout):
    idle, late = (_fixed(layout, options, ORDERED) for options in (decoding(5), decoding(3, quota="dream")))
    assert idle.nfe.tolist() == [9] * 3, "a finished block takes no further steps"
    assert late.commit_step[0].tolist() == [2, 1, 2, 4, 5, 5, 7, 8, 8], "Dream's first step commits nothing here"
    assert late.nfe[0] == 9


def test_early_stop_freezes_finished_rows_and_saves_forwards(layout):
    """Row 0 ends in its first block, row 1 in its second, row 2 never; a stop token freezes after its whole block."""
    sure = {i: {2: 20.0} for i in range(9)}
    rows = {1: sure | {1: {EOT: 20.0}}, 2: sure | {5: {FILL: 20.0}}, 4: sure}
    stopped = _fixed(layout, decoding(3, early_stop=True, cfg_scale=0.5, rule="confidence_threshold"), rows)
    assert stopped.response.tolist() == [[2, EOT, 2] + [FILL] * 6, [2, 2, 2, 2, 2, FILL] + [FILL] * 3, [2] * 9]
    assert stopped.nfe.tolist() == [2, 4, 6], "guidance costs two forwards a step"
    assert (stopped.commit_step[0, 3:] == -1).all() and (stopped.commit_step[2] == np.repeat([0, 1, 2], 3)).all()
    going = _fixed(layout, _options("confidence_threshold"), rows)
    assert going.nfe.tolist() == [3, 3, 3] and going.response[0].tolist() == [2, EOT] + [2] * 7


def test_guidance_extrapolates_from_the_masked_prompt(layout):
    """Scale 1: un + 2 (cond - un) is 3 for token 1, and 2.9 or 3.1 for token 2."""
    logits = {1: {i: {1: 2.0, 2: 1.55 if i % 2 else 1.45} for i in range(9)}, MASK: {i: {1: 1.0} for i in range(9)}}
    out = _fixed(layout, decoding(1, cfg_scale=1.0), logits)
    assert out.response[0].tolist() == [1, 2, 1, 2, 1, 2, 1, 2, 1] and out.nfe[0] == 6


def test_settings_that_compile_alike_share_a_program():
    """Seed, batch size, sizes and ids are no part of the program, whose static arguments are equal; a rule is."""
    same = ({}, {"seed": 3, "batch_size": 2}, {"steps_per_block": 3}, {"stop_ids": (1,), "fill_id": 2})
    assert len({DecodeConfig(**fields).static(3) for fields in same}) == 1
    assert DecodeConfig(rule="random").static(3) != DecodeConfig().static(3)


def test_responses_by_step_are_rebuilt_from_the_commit_steps(layout):
    mask = layout.mask_id
    responses = decoder.Responses(
        np.array([[5, 6, 7, 1]]), np.array([[2, 0, 2, -1]]), np.array([3]), np.array([9]), np.array([9])
    )
    got = decoder.responses_by_step(layout, responses, 3)[:, 0].tolist()
    assert got == [[mask] * 4, [mask, 6, mask, mask], [mask, 6, mask, mask], [5, 6, 7, mask]]
