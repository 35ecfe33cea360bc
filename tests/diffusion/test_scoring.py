"""Token choice, confidence and the drawing of positions: against float64 tables and exact distributions.

Every distribution is tested by a chi-square over many rows, each with its own key, and so are some that are wrong in one way:
the test must tell them apart.
"""

import dataclasses
import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jaxblock.diffusion.canvas import Layout
from jaxblock.diffusion.decoding import measures, scoring
from jaxblock.diffusion.decoding.rules import RULES
from jaxblock.diffusion.decoding.transfer import StepInfo
from tests.diffusion.conftest import FIXED, MEASURED, chi_square, decoded, decoding

VOCAB, MASK, FILL, EOT = 7, 6, 0, 1
MANY, ALG_TEMP = 20_000, 0.4
LAYOUT = Layout(4, 4, "same_position", "aligned", None, MASK, FILL, (EOT,))
LOGITS = np.array([
    [1.5, 0.25, 2.5, 3.0, -1.0, 0.0, 1.0], [0.0, 0.5, 0.25, -0.5, 4.0, 3.75, -2.0],
    [-1.0, 0.125, 1.0, 2.0, 0.75, 0.5, 2.25], [2.0, -3.0, 5.0, -1.0, 0.5, 1.0, 4.0],  # the mask token leads, and is second
], np.float32)  # fmt: skip


@partial(jax.jit, static_argnums=(0, 1, 3))
def _scores(every, layout, logits, many):
    """The scores of ``many`` rows of the same logits, each with its own key, for all of these settings in one program."""
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(0), jnp.arange(many))
    wide = jnp.broadcast_to(logits, (many, *logits.shape))
    found = [scoring.find(layout, options, wide, keys) for options in every]
    eligible = jnp.ones(wide.shape[:2], bool)
    return [scoring.score(layout, *each, eligible, keys) for each in zip(every, found, strict=True)]


def score(*every, logits=LOGITS, many=1, layout=LAYOUT):
    return jax.device_get(_scores(every, layout, logits, many))


def softmax(logits):
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


def kept(logits, temperature=0.0, top_p=None, top_k=None):
    """The distribution that Dream draws from, one token at a time in float64."""
    logits = np.array(logits, np.float64) / (temperature or 1.0)
    order = sorted(range(len(logits)), key=lambda token: (-logits[token], token))
    shares = softmax(logits)[order]
    before = np.cumsum(shares) - shares
    left = [token for n, token in enumerate(order) if top_p is None or n == 0 or before[n] <= top_p][:top_k]
    best = next(token for token in order if token != MASK)
    return softmax(np.where(np.isin(np.arange(len(logits)), [*left, best]), logits, -np.inf))


FILTERS = [{}, {"top_p": 0.75}, {"top_k": 2}, {"temperature": 1.5, "top_p": 0.7}]
FILTERS += [{"temperature": 2.0, "top_p": 0.85, "top_k": 4}]


def test_filters_and_confidence_are_dreams():
    """Candidates, and each measure on them: the mask token's probability counts wherever it survives."""
    every = [decoding(1, **filters) for filters in FILTERS]
    left = jax.jit(lambda x: [jax.nn.log_softmax(scoring.candidates(options, MASK, x)) for options in every])(LOGITS)
    cases = list(itertools.product(range(len(FILTERS)), ("maskgit_plus", "topk_margin", "entropy")))
    scores = score(*(dataclasses.replace(every[at], rule=rule) for at, rule in cases), many=2)
    with np.errstate(divide="ignore"):
        want = np.array([[np.log(kept(row, **filters)) for row in LOGITS] for filters in FILTERS])
    np.testing.assert_allclose(left, want, atol=2e-6)
    for (filters, rule), found in zip(cases, scores, strict=True):
        p = np.exp(want[filters])
        assert not (found.token == MASK).any()
        for row, at in np.ndindex(2, 4):
            others = np.sort(np.delete(p[at], np.argmax(p[at, :MASK])))
            confidence = {
                "maskgit_plus": p[at, found.token[row, at]],
                "topk_margin": max(p[at, :MASK].max() - others[-1], 0.0),
                "entropy": np.sum(p[at] * np.log(p[at] + 1e-10)),
            }[rule]
            value = float(found.surprise[row, at])
            np.testing.assert_allclose(-value if rule == "entropy" else np.exp(-value), confidence, atol=3e-6)


def test_other_rules_filter_the_token_but_not_the_confidence():
    """LLaDA's family: -log p of the token under the un-noised softmax of all logits."""
    (found,) = score(decoding(1, temperature=2.0, top_k=1, rule="low_confidence"), many=8)
    best = LOGITS[:, :MASK].argmax(-1)
    assert (found.token == best).all(), "top_k 1 leaves nothing to draw"
    want = [-np.log(softmax(row.astype(float))[token]) for row, token in zip(LOGITS, best, strict=True)]
    np.testing.assert_allclose(found.surprise, np.broadcast_to(want, (8, 4)), rtol=1e-5)


def test_a_token_that_takes_the_sum_to_top_p_exactly_is_not_the_last():
    """Probabilities 1/2, 1/4, 1/8 and 1/8, without rounding: the sum must exceed ``top_p``, as in Dream."""
    logits, cases = np.log(np.array([0.125, 0.5, 0.125, 0.25], np.float32)), {0.5: "0101", 0.75: "1101", 0.6: "0101"}
    p, *kept = jax.jit(lambda x: [jax.nn.softmax(x), *(scoring.keep_top_p(x, top_p) for top_p in cases)])(logits)
    assert p.tolist() == [0.125, 0.5, 0.125, 0.25]
    assert ["".join(map(str, np.asarray(row, int))) for row in kept] == list(cases.values())


def test_probabilities_and_leads_near_1_do_not_tie():
    """They are 1 in float32 for both rows, and the second is more certain."""
    logits = np.array([[40.0, 20.0, 0.0], [40.0, 19.0, 0.0]], np.float32)
    both = jax.jit(lambda x: (measures.surprise(x, jnp.zeros(2, int)), measures.margin_surprise(x, 2)))(logits)
    for (first, second), want in zip(both, (np.exp(-20.0), 2 * np.exp(-20.0)), strict=True):
        assert first > second > 0 and np.exp(-first) == np.exp(-second) == 1
        np.testing.assert_allclose(first, want, rtol=1e-5)


def test_a_row_looked_through_by_pieces_has_the_best_token_and_the_surprise_of_the_whole_row():
    """Rows with ties within a piece and between two, near certainty, tokens left out, nothing but one token, and no number."""
    rows = np.random.default_rng(0).normal(size=(40, 336)).astype(np.float32) * 3
    rows[0, [7, 9]] = rows[1, [9, 300]] = rows[2, 335] = 20
    rows[3, 5], rows[4, 17] = 60, 90
    rows[5], rows[6, 100] = -np.inf, np.nan
    rows[5, 200] = 1.0
    token = rows.argmax(axis=1).astype(np.int32)
    token[10:] = np.arange(30)
    assert [measures.piece_size(vocabulary) for vocabulary in (11, 320, 336, 8000, 126_464)] == [None, 16, 16, 80, 304]

    @jax.jit
    def found(rows, token):
        best = [(measures._best_token(rows, out), measures.best_token(rows, out)) for out in (None, 0, 17, 335)]
        return best, measures._surprise(rows, token), measures.surprise(rows, token)

    best, whole, by_pieces = jax.device_get(found(rows, token))
    number = np.arange(40) != 6
    for plain, ours in best:
        np.testing.assert_array_equal(ours[number], plain[number])
    assert best[0][0][:6].tolist() == [7, 9, 335, 5, 17, 200] and best[2][0][4] != 17
    np.testing.assert_allclose(by_pieces, whole, rtol=1e-6)
    assert whole[3] > whole[4] > 0 and whole[5] == 0 and np.isnan(whole[6])
    np.testing.assert_allclose(whole[[0, 1]], np.log(2), rtol=1e-4)


def without_mask(p):
    p = np.where(np.arange(VOCAB) == MASK, 0.0, p)
    return p / p.sum()


def test_tokens_are_drawn_from_what_the_filters_leave():
    """Each position's 20,000 tokens, under both conventions; a distribution without one of the settings is rejected somewhere."""
    options = {"temperature": 3.0, "top_p": 0.7, "top_k": 4}
    llada = {"temperature": 0.5}
    found = score(decoding(1, rule="maskgit_plus", **options), decoding(1, **llada), many=MANY)
    seen, plain = ([np.bincount(scores.token[:, at], minlength=VOCAB) for at in range(4)] for scores in found)

    def worst(seen, **how):
        return max(chi_square(seen[at], without_mask(kept(LOGITS[at], **how))) for at in range(4))

    assert worst(plain, **llada) < 1 < worst(plain, temperature=0.55)
    assert worst(seen, **options) < 1
    for left_out in options:
        assert worst(seen, **{**options, left_out: None}) > 2, left_out


def test_alg_temp_draws_positions_without_replacement():
    """The quota's sets of two of four positions against the exact law; weights are exp(confidence / alg_temp)."""

    @jax.jit
    def draw(logits):
        found = {}
        for rule in MEASURED:
            pick, found[rule] = RULES[rule].transfer(decoding(2, rule=rule), 4), []
            for temp, many in ((ALG_TEMP, MANY), (1e-5, 50), (0.0, 50)):
                (scores,) = _scores((decoding(2, rule=rule, alg_temp=temp),), LAYOUT, logits, many)
                found[rule].append(pick(scores, StepInfo(jnp.int32(0), jnp.full(many, 4, jnp.int32))))
            found[rule].append(scores.surprise[0])
        return found

    pairs = list(itertools.combinations(range(4), 2))
    for rule, (chosen, sharp, plain, surprise) in jax.device_get(draw(LOGITS)).items():
        np.testing.assert_array_equal(sharp, plain, "the smallest alg_temp takes the most confident")
        assert (chosen.sum(-1) == 2).all(), "drawn with replacement, some rows would commit one"
        seen = [(chosen[:, a] & chosen[:, b]).sum() for a, b in pairs]

        def against(weights, seen=seen):
            """The first of the two, then the second of what is left, in either order."""
            w = weights / weights.sum()
            return chi_square(seen, [w[a] * w[b] * (1 / (1 - w[a]) + 1 / (1 - w[b])) for a, b in pairs])

        surprise = surprise.astype(float)
        confidence = -surprise if rule == "entropy" else np.exp(-surprise)
        assert against(np.exp(confidence / ALG_TEMP)) < 1, rule
        assert against(np.exp(confidence)) > 2, f"{rule}: another temperature"
        assert rule == "entropy" or against(np.exp(-surprise / ALG_TEMP)) > 2, f"{rule}: noise on -log p, not on p"


def test_origin_lifts_each_mask_by_chance_on_dreams_grid():
    """P(step i) = t_i - t_{i+1}, the rest in the last step; positions, steps and tokens independent of one another."""
    steps, eps = 3, 0.2
    options, layout = decoding(steps, rule="origin", eps=eps, temperature=1.0), LAYOUT._replace(response_len=2, block=2)
    out = decoded((FIXED, {"table": LOGITS[None, 2:]}), layout, options, [[0]] * MANY, room=1, seed=5)
    grid = np.linspace(1, eps, steps + 1)
    when = np.append(grid[:-2] - grid[1:-1], grid[-2])
    tokens = [without_mask(kept(row, temperature=1.0)) for row in LOGITS[2:]]

    def against(commit_step, when):
        joint = np.ravel_multi_index((*commit_step.T, *out.response.T), (steps, steps, VOCAB, VOCAB))
        law = np.einsum("i,j,a,b->ijab", when, when, *tokens).ravel()
        common = law * MANY >= 5  # rare outcomes together
        seen = np.bincount(joint, minlength=law.size)
        return chi_square(np.append(seen[common], seen[~common].sum()), np.append(law[common], law[~common].sum()))

    assert out.response.max() < MASK
    assert against(out.commit_step, when) < 1
    assert against(out.commit_step, np.full(steps, 1 / steps)) > 2, "the same chance in every step"
    assert (out.nfe == out.commit_step.max(-1) + 1).all(), "a block that is full takes no further forwards"


def test_suppressed_stop_tokens_come_last_under_every_measure():
    """Positions 0 and 2 want to end with certainty; with ``logits`` the fill token is never written."""
    logits = np.zeros((4, VOCAB), np.float32)
    logits[0, [FILL, 5]], logits[2, EOT] = (9.0, 1.0), 12.0
    logits[1, 3], logits[3, 4] = 2.0, 1.0
    for how, noisy in (("confidence", "entropy"), ("none", None), ("logits", "maskgit_plus")):
        temps = {rule: 0.5 if rule == noisy else 0.0 for rule in MEASURED}
        every = [decoding(2, rule=rule, alg_temp=temp, eos_suppression=how) for rule, temp in temps.items()]
        for found in score(*every, logits=logits, many=5):
            assert (found.token == [5 if how == "logits" else FILL, 3, EOT, 4]).all()
            if how == "confidence":
                assert (np.isinf(found.surprise) == [True, False, True, False]).all()
            if how == "none":
                assert (np.argsort(found.surprise, axis=-1) == [2, 0, 1, 3]).all()


def test_where_the_mask_token_alone_would_pass_the_best_other_token_is_taken():
    """A nucleus of the mask token alone, and a top_k of 1 with the mask token first: nothing is NaN, no mask is written."""
    logits = np.zeros((1, VOCAB), np.float32)
    logits[0, MASK], logits[0, 4] = 20.0, 1.0
    filters = itertools.cycle(({"top_p": 0.5}, {"top_k": 1}))
    rules = (*MEASURED, *MEASURED[:1], "random", "origin")
    every = [decoding(1, rule=rule, temperature=1.0, **cut) for rule, cut in zip(rules, filters, strict=False)]
    for found in score(*every, logits=logits, many=9, layout=LAYOUT._replace(response_len=1, block=1)):
        assert (found.token == 4).all() and not np.isnan(found.surprise).any()
