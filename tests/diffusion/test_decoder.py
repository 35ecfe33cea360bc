"""What the decoder promises whatever the weights, on prompts and on texts with spans, under every rule."""

from typing import get_args

import jax.numpy as jnp
import numpy as np
import pytest

from jaxblock.diffusion.decoding import decoder, masked
from jaxblock.diffusion.decoding.config import DecodeConfig, RuleName
from tests.diffusion.conftest import (
    EOT,
    FILL,
    FIXED,
    MASK,
    MEASURED,
    QUESTIONS,
    TWO_LAYERS,
    VOCAB,
    Fixed,
    assert_same,
    decoded,
    decoding,
    make_layout,
)


def fixed(options, rows):
    """Decodes the first three prompts: rows[first token][position] -> {token: logit}; every other logit is 0."""
    table = np.zeros((VOCAB, 9, VOCAB), np.float32)
    for first, positions in rows.items():
        for position, logits in positions.items():
            for token, value in logits.items():
                table[first, position, token] = value
    return decoded((FIXED, {"table": table}), make_layout(), options, QUESTIONS[:3])


@pytest.mark.parametrize(
    "options, steps",
    [
        *((decoding(2, rule=rule), "001223445") for rule in MEASURED),
        (decoding(5), "102345678"),  # a finished block takes no further steps
        (decoding(3, quota="dream"), "212455788"),  # Dream's first step commits nothing here
    ],
)
def test_steps_quota_and_commit_order(options, steps):
    """Most confident first, ties to the lowest index, the remainder of the quota to the first step."""
    out = fixed(options, {1: {0: {1: 3.0}, 1: {1: 5.0}, 2: {1: 3.0}}})
    assert out.commit_step[0].tolist() == list(map(int, steps)) and out.nfe[0] == int(max(steps)) + 1
    assert out.response[0].tolist() == [1, 1, 1] + [0] * 6, "equal logits give the lowest token"


def test_early_stop_freezes_finished_rows_and_saves_forwards():
    """Row 0 ends in its first block, row 1 in its second, row 2 never; a stop token freezes after its whole block."""
    sure = {i: {2: 20.0} for i in range(9)}
    rows = {1: sure | {1: {EOT: 20.0}}, 2: sure | {5: {FILL: 20.0}}, 4: sure}
    stopped = fixed(decoding(3, early_stop=True, cfg_scale=0.5, rule="confidence_threshold"), rows)
    assert stopped.response.tolist() == [[2, EOT, 2] + [FILL] * 6, [2, 2, 2, 2, 2, FILL] + [FILL] * 3, [2] * 9]
    assert stopped.nfe.tolist() == [2, 4, 6], "guidance costs two forwards a step"
    assert (stopped.commit_step[0, 3:] == -1).all() and (stopped.commit_step[2] == np.repeat([0, 1, 2], 3)).all()
    states = decoder.responses_by_step(make_layout(), stopped, 3)[:, 0].tolist()
    assert states == [[MASK] * 9] + [[2, EOT, 2] + [MASK] * 6] * 3
    going = fixed(decoding(2, rule="confidence_threshold"), rows)
    assert going.nfe.tolist() == [3, 3, 3] and going.response[0].tolist() == [2, EOT] + [2] * 7


def test_settings_that_compile_alike_share_a_program():
    """Seed, batch size, sizes and ids are no part of the program, whose static arguments are equal; a rule is."""
    same = ({}, {"seed": 3, "batch_size": 2}, {"steps_per_block": 3}, {"stop_ids": (1,), "fill_id": 2})
    assert len({DecodeConfig(**fields).static(3) for fields in same}) == 1
    assert DecodeConfig(rule="random").static(3) != DecodeConfig().static(3)


@pytest.mark.parametrize(
    "fields, alignment",
    [
        (dict(steps_per_block=2, temperature=1.5, cache="dual"), "same_position"),
        pytest.param(
            dict(rule="entropy", quota="dream", temperature=1.2, top_p=0.9, alg_temp=0.3, cache="prefix"), "shifted",
            marks=pytest.mark.slow,
        ),
        pytest.param(dict(rule="confidence_threshold", threshold=0.3, cfg_scale=0.5), "shifted", marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_without_a_right_side_filling_is_ordinary_decoding(fields, alignment):
    layout, options = make_layout(alignment=alignment, response_len=6), DecodeConfig(early_stop=False, **fields)
    filled = decoded(TWO_LAYERS, layout._replace(infill=True), options, rests=[[MASK] * 6] * 4)
    assert_same(decoded(TWO_LAYERS, layout, options), filled)


class Watched(Fixed):
    """A network that says of how many positions of a block it was asked for logits."""

    def __init__(self):
        self.counts = set()

    def logits(self, params, hidden):
        self.counts.add(hidden.shape[1])
        return hidden


@pytest.mark.parametrize(
    "fields, counts",
    [
        (dict(steps_per_block=6), {18, 16, 8}),
        (dict(rule="confidence_threshold", threshold=0.4, cfg_scale=0.5), {18, 16, 8}),
        (dict(rule="random", steps_per_block=2, eos_suppression="confidence"), {18, 16}),
        (dict(rule="entropy", quota="dream", alg_temp=0.5), {18, 16, 8}),
        (dict(temperature=1.0), {18}),  # the noise of all positions is drawn at once
        (dict(rule="origin"), {18}),
    ],
    ids=["quota", "threshold", "random", "dream", "temperature", "origin"],
)
def test_a_step_asks_for_logits_of_as_many_positions_as_may_be_masks(fields, counts, monkeypatch):
    """And decodes what it does with those of the whole block, where spans leave a row fewer masks too."""
    table = np.random.default_rng(0).normal(scale=2, size=(VOCAB, 18, VOCAB)).astype(np.float32)
    layout, options = (
        make_layout(block=18, response_len=18)._replace(infill=True),
        DecodeConfig(early_stop=False, **fields),
    )
    rests = [[MASK] * 18, [MASK, 3, 3, *[MASK] * 11, 2, 2, MASK, MASK], [MASK] * 4]
    found = []
    for most in (masked.MOST_COUNTS, 1):
        monkeypatch.setattr(masked, "MOST_COUNTS", most)
        net = Watched()
        found.append(decoded((net, {"table": table}), layout, options, QUESTIONS[:3], rests))
        assert net.counts == (counts if most > 1 else {18})
    assert len(set(found[0].response[0].tolist())) > 5, "different tokens"
    assert_same(*found)


class SeesTheEnd(Fixed):
    """A network that sees the last visible token alone: ``table[token]`` are the logits of every position."""

    def hidden(self, params, view, row_keys=None):
        last = jnp.take_along_axis(view.ids, view.length[:, None] - 1, axis=1)
        return jnp.broadcast_to(params["table"][last], (*view.active.shape, VOCAB))


SEES_THE_END = SeesTheEnd()


@pytest.mark.parametrize("rule", get_args(RuleName))
def test_every_rule_fills_the_spans_alone_and_never_with_the_mask_token(rule):
    """After token 2 the logits favour 1, after masks 1 even more: guidance, which no rule sees, makes them favour 0.

    The mask token's logit is the largest: threshold and factor accept nothing but the best, one step a token.
    """
    table = np.full((VOCAB, VOCAB), -30, np.float32)
    table[[2, MASK], 1], table[[2, MASK], 0], table[:, MASK] = [2.0, 4.0], [1.5, 1.0], 30.0
    prompts, rests = [[5], [6, 6]], [[MASK, MASK, MASK, MASK, 3, MASK, 2], [MASK, 2]]
    net, drawn = (SEES_THE_END, {"table": table}), rule in ("random", "origin")
    for scale, token in ((0.0, 1), (0.5, 0))[: 2 if rule == "low_confidence" else 1]:
        options = decoding(2, rule=rule, cfg_scale=scale, temperature=0.01 if drawn else 0.0)
        found = decoded(net, make_layout()._replace(infill=True), options, prompts, rests)
        for response, rest in zip(found.response, rests, strict=True):
            assert response[: len(rest)].tolist() == [token if given == MASK else given for given in rest]
        least, most = {"origin": (3, 6), "confidence_threshold": (5, 5), "factor": (5, 5)}.get(rule, (4, 4))
        assert least <= found.nfe[0] // options.passes <= most and found.nfe[1] >= options.passes
