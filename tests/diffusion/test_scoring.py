"""Token choice, confidence and the drawing of positions: against float64 tables and exact distributions.

Every distribution is tested by a chi-square over many rows, each with its own key, and so are variants that are wrong in
one way: the test must tell them apart.
"""

from __future__ import annotations

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxblock.diffusion import canvas as canvases
from jaxblock.diffusion.canvas import Layout
from jaxblock.diffusion.decoding import decoder, measures, scoring, transfer
from jaxblock.diffusion.decoding.config import DecodeConfig
from jaxblock.diffusion.decoding.rules import RULES
from jaxblock.diffusion.decoding.transfer import StepInfo

VOCAB, MASK, FILL, EOT = 7, 6, 0, 1
MANY = 20_000
LAYOUT = Layout(4, 4, "same_position", "aligned", None, MASK, FILL, (EOT,))
LOGITS = np.array(
    [
        [1.5, 0.25, 2.5, 3.0, -1.0, 0.0, 1.0],
        [0.0, 0.5, 0.25, -0.5, 4.0, 3.75, -2.0],
        [-1.0, 0.125, 1.0, 2.0, 0.75, 0.5, 2.25],  # the mask token leads
        [2.0, -3.0, 5.0, -1.0, 0.5, 1.0, 4.0],  # and here it is second
    ],
    np.float32,
)
_score = jax.jit(scoring.score, static_argnums=(0, 1))


def _keys(many=MANY, seed=0):
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), jnp.arange(many))


def _scores(options, logits=LOGITS, many=1, layout=LAYOUT):
    """``score`` of ``many`` rows of the same logits, each with its own key."""
    wide = jnp.broadcast_to(jnp.asarray(logits), (many, *logits.shape))
    return _score(layout, options, wide, jnp.ones(wide.shape[:2], bool), _keys(many))


def _softmax(logits):
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


def _kept(logits, temperature=0.0, top_p=None, top_k=None, wrong=None):
    """The distribution that Dream draws from, one token at a time in float64; ``wrong`` names a mistake to make."""
    logits = np.array(logits, np.float64) / (temperature or 1.0)
    order = sorted(range(len(logits)), key=lambda token: (-logits[token], token))
    ranked = list(order)
    if wrong == "top_k_first":
        ranked = ranked[: top_k or None]
    p = _softmax(logits * (temperature or 1.0) if wrong == "top_p_untempered" else logits)
    p = p / p[ranked].sum()
    if top_p is not None:
        kept, before = [], 0.0
        for token in ranked:
            level = before + p[token] if wrong == "cuts_the_crossing_token" else before
            if kept and level > top_p:
                break
            kept.append(token)
            before += p[token]
        ranked = kept
    ranked = ranked[: top_k or None]
    best = next(token for token in order if token != MASK)
    cut = [token for token in range(len(logits)) if token not in {*ranked, best}]
    logits[cut] = -np.inf
    return _softmax(logits)


FILTERS = [
    {},
    {"temperature": 0.5},
    {"top_p": 0.75},
    {"top_k": 2},
    {"temperature": 1.5, "top_p": 0.7},
    {"temperature": 2.0, "top_k": 3},
    {"temperature": 2.0, "top_p": 0.85, "top_k": 4},
]


@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_filters_and_confidence_are_dreams(filters):
    """Candidates, and each measure on them: the mask token's probability counts wherever it survives."""
    plain = _decoding(1, **filters)
    with np.errstate(divide="ignore"):
        want = np.array([np.log(_kept(row, **filters)) for row in LOGITS])
    got = np.array(jax.nn.log_softmax(scoring.candidates(plain, MASK, jnp.asarray(LOGITS))))
    np.testing.assert_allclose(got, want, atol=2e-6)
    p = np.exp(want)
    for rule in ("maskgit_plus", "topk_margin", "entropy"):
        found = _scores(dataclasses.replace(plain, rule=rule), many=3)
        assert not (np.asarray(found.token) == MASK).any()
        for row, at in itertools.product(range(3), range(4)):
            others = np.sort(np.delete(p[at], np.argmax(p[at, :MASK])))
            confidence = {
                "maskgit_plus": p[at, found.token[row, at]],
                "topk_margin": max(p[at, :MASK].max() - others[-1], 0.0),
                "entropy": np.sum(p[at] * np.log(p[at] + 1e-10)),
            }[rule]
            value = float(found.surprise[row, at])
            np.testing.assert_allclose(-value if rule == "entropy" else np.exp(-value), confidence, atol=3e-6)


def test_a_token_that_takes_the_sum_to_top_p_exactly_is_not_the_last():
    """Probabilities 1/2, 1/4, 1/8 and 1/8, without rounding: the sum must exceed ``top_p``, as in Dream."""
    logits = jnp.log(jnp.array([0.125, 0.5, 0.125, 0.25]))
    assert np.asarray(jax.nn.softmax(logits)).tolist() == [0.125, 0.5, 0.125, 0.25]
    for top_p, kept in ((0.5, [0, 1, 0, 1]), (0.75, [1, 1, 0, 1]), (0.6, [0, 1, 0, 1])):
        assert np.asarray(scoring.keep_top_p(logits, top_p)).astype(int).tolist() == kept


def test_other_rules_filter_the_token_but_not_the_confidence():
    """LLaDA's family: -log p of the token under the un-noised softmax of all logits."""
    options = _decoding(1, temperature=2.0, top_k=1, rule="low_confidence")
    found = _scores(options, many=8)
    best = LOGITS[:, :MASK].argmax(-1)
    assert (np.asarray(found.token) == best).all(), "top_k 1 leaves nothing to draw"
    want = [-np.log(_softmax(row.astype(float))[token]) for row, token in zip(LOGITS, best, strict=True)]
    np.testing.assert_allclose(found.surprise, np.broadcast_to(want, (8, 4)), rtol=1e-5)


def test_a_lead_near_1_does_not_tie():
    """p1 - p2 is 1 in float32 for both rows, and the second is more certain."""
    logits = jnp.asarray([[40.0, 20.0, 0.0], [40.0, 19.0, 0.0]], jnp.float32)
    p = np.sort(np.asarray(jax.nn.softmax(logits)), axis=-1)
    assert (p[:, 2] - p[:, 1] == 1).all()
    first, second = np.asarray(measures.margin_surprise(logits, 2))
    assert first > second > 0
    np.testing.assert_allclose(first, 2 * np.exp(-20.0), rtol=1e-5)


def _chi2(seen, chance):
    """Chi-square over the degrees of freedom's 0.001 quantile (Wilson-Hilferty): above 1 is a rejection."""
    seen, expected = np.asarray(seen, float), np.asarray(chance) * np.sum(seen)
    if seen[expected == 0].any():
        return np.inf
    there = expected > 0
    free = max(there.sum() - 1, 1)
    limit = free * (1 - 2 / (9 * free) + 3.09 * np.sqrt(2 / (9 * free))) ** 3
    return ((seen - expected)[there] ** 2 / expected[there]).sum() / limit


def _without_mask(p):
    p = np.where(np.arange(VOCAB) == MASK, 0.0, p)
    return p / p.sum()


def test_tokens_are_drawn_from_what_the_filters_leave():
    """Each position's 20,000 tokens; every mistake of the oracle is rejected somewhere."""
    options = {"temperature": 3.0, "top_p": 0.7, "top_k": 4}
    token = np.asarray(_scores(_decoding(1, rule="maskgit_plus", **options), many=MANY).token)
    seen = [np.bincount(token[:, at], minlength=VOCAB) for at in range(4)]

    def worst(**how):
        return max(_chi2(seen[at], _without_mask(_kept(LOGITS[at], **how))) for at in range(4))

    assert worst(**options) < 1
    for wrong in ("cuts_the_crossing_token", "top_p_untempered", "top_k_first"):
        assert worst(**options, wrong=wrong) > 2, wrong
    for left_out in options:
        assert worst(**{**options, left_out: None}) > 2, left_out


def _sets(weights, size):
    """Chance of each set of ``size`` positions drawn one after another without replacement, by enumeration."""
    chance = dict.fromkeys(itertools.combinations(range(len(weights)), size), 0.0)
    for drawn in itertools.permutations(range(len(weights)), size):
        p, left = 1.0, np.sum(weights)
        for at in drawn:
            p, left = p * weights[at] / left, left - weights[at]
        chance[tuple(sorted(drawn))] += p
    return chance


@pytest.mark.parametrize("rule", ["low_confidence", "maskgit_plus", "topk_margin", "entropy"])
def test_alg_temp_draws_positions_without_replacement(rule):
    """The quota's sets of two of four positions against the exact law; weights are exp(confidence / alg_temp)."""
    alg_temp = 0.4
    options = _decoding(2, rule=rule, alg_temp=alg_temp)
    found = _scores(options, many=MANY)
    chosen = RULES[rule].transfer(options, 4)(found, StepInfo(jnp.int32(0), jnp.full(MANY, 4, jnp.int32)))
    chosen = np.asarray(chosen)
    assert (chosen.sum(-1) == 2).all(), "drawn with replacement, some rows would commit one"
    surprise = np.asarray(_scores(dataclasses.replace(options, alg_temp=0.0)).surprise, float)[0]
    confidence = -surprise if rule == "entropy" else np.exp(-surprise)
    names = list(itertools.combinations(range(4), 2))
    seen = [(chosen[:, a] & chosen[:, b]).sum() for a, b in names]

    def against(weights):
        law = _sets(weights, 2)
        return _chi2(seen, [law[name] for name in names])

    assert against(np.exp(confidence / alg_temp)) < 1
    assert against(np.exp(confidence)) > 2, "another temperature"
    if rule != "entropy":
        assert against(np.exp(-surprise / alg_temp)) > 2, "noise on -log p instead of on p"
    # The pairs of distinct independent draws (with replacement, repeated until distinct) have another law.
    weights = np.exp(confidence / alg_temp)
    twice = np.array([weights[a] * weights[b] for a, b in names])
    assert _chi2(seen, twice / twice.sum()) > 1.5


def test_the_smallest_alg_temp_is_the_most_confident():
    for rule in ("maskgit_plus", "topk_margin", "entropy"):
        sharp = _scores(_decoding(2, rule=rule, alg_temp=1e-5), many=50)
        plain = _scores(_decoding(2, rule=rule), many=50)
        step = StepInfo(jnp.int32(0), jnp.full(50, 4, jnp.int32))
        take = transfer.by_quota(transfer.quota_table("even", 4, 2))
        np.testing.assert_array_equal(take(sharp, step), take(plain, step))


class Still:
    """A network whose logits do not depend on what it sees."""

    def hidden(self, params, view):
        return jnp.broadcast_to(params["table"], (view.ids.shape[0], *params["table"].shape))

    def logits(self, params, hidden):
        return hidden

    def nll(self, params, hidden, targets):
        raise AssertionError("a decoder knows no targets")


STILL = Still()
_decode = jax.jit(decoder.decode, static_argnums=(0, 1, 2))


def _decoding(steps, **fields):
    return DecodeConfig(steps_per_block=steps, **{"early_stop": False, **fields})


def _decoded(options, many):
    """``many`` prompts of one token, a response of one block of two."""
    layout = LAYOUT._replace(response_len=2, block=2)
    index = jnp.arange(many, dtype=jnp.int32)
    canvas = canvases.for_decoding(layout, jnp.full((many, 1), 2, jnp.int32), jnp.ones(many, jnp.int32), index)
    params = {"table": jnp.asarray(LOGITS[2:])}
    return jax.device_get(_decode(STILL, layout, options, params, canvas, 5))


def test_origin_lifts_each_mask_by_chance_on_dreams_grid():
    """P(step i) = t_i - t_{i+1}, the rest in the last step; positions, steps and tokens independent of one another."""
    steps, eps = 3, 0.2
    options = _decoding(steps, rule="origin", eps=eps, temperature=1.0)
    out = _decoded(options, MANY)
    grid = np.linspace(1, eps, steps + 1)
    when = np.append(grid[:-2] - grid[1:-1], grid[-2])
    assert abs(when.sum() - 1) < 1e-12
    tokens = [_without_mask(_kept(row, temperature=1.0)) for row in LOGITS[2:]]

    def against(commit_step, when):
        joint = np.ravel_multi_index((*commit_step.T, *out.response.T), (steps, steps, VOCAB, VOCAB))
        law = np.einsum("i,j,a,b->ijab", when, when, *tokens).ravel()
        common = law * MANY >= 5  # rare outcomes together
        seen = np.bincount(joint, minlength=law.size)
        return _chi2(np.append(seen[common], seen[~common].sum()), np.append(law[common], law[~common].sum()))

    assert out.response.max() < MASK
    assert against(out.commit_step, when) < 1
    assert against(out.commit_step, np.full(steps, 1 / steps)) > 2, "the same chance in every step"
    together = np.repeat(out.commit_step[:, :1], 2, axis=1)
    assert against(together, when) > 2, "one coin for the whole block"
    counted = _decoded(dataclasses.replace(options, rule="random", quota="dream"), MANY)
    assert against(counted.commit_step, when) > 2, "Dream's quota instead of its coin"
    finished = out.commit_step.max(-1) + 1
    np.testing.assert_array_equal(out.nfe, finished, "a block that is full takes no further forwards")
    alone = _decoded(dataclasses.replace(options, steps_per_block=1, eps=1e-3), 5)
    assert (alone.commit_step == 0).all()


@pytest.mark.parametrize("rule", ["low_confidence", "maskgit_plus", "topk_margin", "entropy"])
@pytest.mark.parametrize("alg_temp", [0.0, 0.5])
def test_suppressed_stop_tokens_come_last_under_every_measure(rule, alg_temp):
    """Positions 0 and 2 want to end with certainty; with ``logits`` the fill token is never written."""
    logits = np.zeros((4, VOCAB), np.float32)
    logits[0, FILL], logits[2, EOT] = 9.0, 12.0
    logits[1, 3], logits[3, 4] = 2.0, 1.0
    options = _decoding(2, rule=rule, alg_temp=alg_temp, eos_suppression="confidence", top_k=None)
    found = _scores(options, logits, many=40)
    assert (np.asarray(found.token) == [FILL, 3, EOT, 4]).all()
    assert np.isinf(np.asarray(found.surprise)[:, [0, 2]]).all()
    assert np.isfinite(np.asarray(found.surprise)[:, [1, 3]]).all()
    free = _scores(dataclasses.replace(options, eos_suppression="none"), logits, many=40)
    if not alg_temp:
        assert (np.asarray(transfer.rank(free)) == [1, 2, 0, 3]).all()
    never = _scores(dataclasses.replace(options, eos_suppression="logits"), logits, many=40)
    assert not (np.asarray(never.token) == FILL).any()


def test_where_the_mask_token_alone_would_pass_the_best_other_token_is_taken():
    """A nucleus of the mask token alone, and a top_k of 1 with the mask token first: nothing is NaN, no mask is written."""
    logits = np.zeros((1, VOCAB), np.float32)
    logits[0, MASK], logits[0, 4] = 20.0, 1.0
    layout = LAYOUT._replace(response_len=1, block=1)
    for rule, filters in itertools.product(
        ("low_confidence", "maskgit_plus", "topk_margin", "entropy", "random", "origin"),
        ({"top_p": 0.5}, {"top_k": 1}),
    ):
        found = _scores(_decoding(1, rule=rule, temperature=1.0, **filters), logits, many=9, layout=layout)
        assert (np.asarray(found.token) == 4).all()
        assert not np.isnan(np.asarray(found.surprise)).any()
