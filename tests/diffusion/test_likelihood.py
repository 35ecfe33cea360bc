"""The NELBO bounds the decoder's own likelihood under the random rule, and equals it where the order cannot matter."""

import itertools
import math
from functools import partial

import jax
import numpy as np
import pytest

from jaxblock.diffusion import likelihood
from jaxblock.diffusion.canvas import decoding_canvas
from tests.diffusion.conftest import MASK, TEXTS, build_truth, chi_square, decoded, decoding, make_layout, make_net

_nelbo = jax.jit(likelihood.nelbo, static_argnums=(0, 1, 2))
_many = jax.jit(jax.vmap(likelihood.nelbo, (None, None, None, None, None, 0)), static_argnums=(0, 1, 2))


@partial(jax.jit, static_argnums=(0, 1))
def _terms(net, layout, params, ids, prompt_len, row_id, *sets):
    canvas = decoding_canvas(layout, ids, prompt_len, row_id)
    return likelihood.set_terms(net, layout, params, canvas, likelihood.MaskedSets(*sets), jax.random.key(0))


pytestmark = pytest.mark.usefixtures("x64")


def log_likelihood(truth):
    """log p of each block [row, block]: the mean over commit orders of the product of conditionals, a token a step."""
    out = np.zeros(truth.nll.shape[:2])
    for i, sizes in enumerate(truth.n):
        for k, n in enumerate(sizes):
            paths = []
            for order in itertools.permutations(range(n)):
                left, surprise = 2**n - 1, 0.0
                for position in order:
                    surprise += truth.nll[i, k, left, position]
                    left ^= 1 << position
                paths.append(np.exp(-surprise))
            out[i, k] = np.log(np.mean(paths))
    return out


@pytest.mark.parametrize("name", ["aligned", "paper", "order_free"])
def test_nelbo_bounds_the_decoders_likelihood(truths, name):
    """``order_free`` has a network whose attention does nothing, so that the order of commits cannot matter."""
    net, params, made = truths
    order_free = params | {"blocks": params["blocks"] | {"o": 0 * params["blocks"]["o"]}}
    truth = made.get(name) or build_truth(net, order_free, make_layout(), TEXTS["aligned"])
    gap = truth.nelbo() + log_likelihood(truth)
    several = np.array([[n > 1 for n in sizes] + [False] * (gap.shape[1] - len(sizes)) for sizes in truth.n])
    assert np.abs(gap[~several]).max() < 1e-10, "a block of one token has one order"
    assert (np.abs(gap[several]) < 1e-10 if name == "order_free" else gap[several] > 1e-3).all()


@pytest.mark.parametrize("context", ["aligned", "paper"])
def test_exact_mode_is_the_enumeration(truths, context):
    net, params, made = truths
    truth, size = made[context], np.array([s.bit_count() for s in range(8)])
    got = jax.device_get(_nelbo(net, truth.layout, 7, params, truth.canvas, jax.random.key(0)))
    np.testing.assert_allclose(got.per_block, truth.nelbo(), rtol=1e-10)
    assert not got.variance.any()
    sums, sets = np.nansum(truth.nll, axis=(0, 1, 3)), (~np.isnan(truth.nll[..., 0])).sum((0, 1))
    np.testing.assert_allclose(got.by_count.total, np.bincount(size, sums)[1:], rtol=1e-10)
    np.testing.assert_allclose(got.by_count.weight, np.bincount(size, size * sets)[1:])


def test_monte_carlo_agrees_with_the_exact_mode_whatever_the_batch(truths):
    net, params, made = truths
    truth, samples = made["paper"], 5  # fewer than the 7 sets of a block
    assert not likelihood.is_exact(truth.layout, samples)
    keys = jax.random.split(jax.random.key(1), 400)
    estimate = jax.device_get(_many(net, truth.layout, samples, params, truth.canvas, keys))
    want = truth.nelbo()
    values, variance = estimate.per_block, estimate.variance
    error = values.std(0) / np.sqrt(len(keys))
    assert (np.abs(values.mean(0) - want) <= 4 * error + 1e-12).all()
    several = np.array([[True, True, True], [True, False, False]])
    assert (values[:, several].std(0) > 0).all()
    # A variance of 400 values is itself 10% uncertain.
    assert (variance.mean(0)[several] > 0.75 * values.var(0)[several]).all(), "the reported error is not too small"
    # The rows in another order, one of them as another row.
    turned = jax.tree.map(lambda x: x[::-1], truth.canvas)._replace(row_id=np.array([1, 5], np.int32))
    other = jax.device_get(_many(net, truth.layout, samples, params, turned, keys))
    np.testing.assert_allclose(other.per_block[:, 0], values[:, 1], rtol=1e-12)
    np.testing.assert_allclose(other.variance[:, 0], variance[:, 1], rtol=1e-9, atol=1e-12)
    assert not np.allclose(other.per_block[:, 1], values[:, 0])


def test_the_decoder_samples_from_that_likelihood():
    """Frequencies of many decoded pairs against the enumerated distribution; the mask token never occurs.

    The decoder excludes the mask token, so each conditional is renormalised without it: more likely than the
    likelihood, never less.
    """
    net, params = make_net(vocab_size=5, mask_id=4, eos_id=3, pad_id=3, n_layers=1)
    layout = make_layout(block=2, response_len=2)._replace(mask_id=4, fill_id=3, stop_ids=(3,))
    options, draws = decoding(2, rule="random", temperature=1.0), 20_000
    out = decoded((net, params), layout, options, [[1, 2]] * draws, room=2, seed=0)
    assert out.response.max() < 4

    fed = np.array([[1, 2, a, b] for a in range(5) for b in range(5)], np.int32)
    table = jax.jit(net.all_logits)(params, fed, np.tile(np.arange(4), (25, 1)), np.full(25, 4))
    table = np.exp(np.asarray(table)[:, 2:, :4].reshape(5, 5, 2, 4))
    table /= table.sum(-1, keepdims=True)
    first, second = table[4, 4]
    chance = [(first[a] * table[a, 4, 1, b] + second[b] * table[4, b, 0, a]) / 2 for a in range(4) for b in range(4)]
    assert abs(sum(chance) - 1) < 1e-9
    assert chi_square(np.bincount(out.response @ [4, 1], minlength=16), chance) < 1
    assert set(map(tuple, out.commit_step)) == {(0, 1), (1, 0)}
    assert abs((out.commit_step[:, 0] == 0).mean() - 0.5) < 4 * 0.5 / np.sqrt(draws)


def test_single_sets_of_first_tokens_stand_side_by_side(truths):
    """Every set of the first m tokens of every block is a row of one batch; what comes after them is masked."""
    net, params, made = truths
    truth = made["aligned"]
    blocks = [(i, k) for i, sizes in enumerate(truth.n) for k in range(len(sizes))]
    i, block, size, sets = np.array(
        [(*at, m, s) for at in blocks for m in (1, 2, 3) for s in range(1, 2**m)], np.int32
    ).T
    end = truth.canvas.prompt_len[i] + 3 * block + size
    ids = np.where(np.arange(truth.canvas.ids.shape[1]) < end[:, None], truth.canvas.ids[i], MASK)
    weight = [
        1 / (s.bit_count() * math.comb(m, s.bit_count())) for m, s in zip(size.tolist(), sets.tolist(), strict=True)
    ]
    nll = truth.nll[i, block, sets | 8 - (1 << size)] * (sets[:, None] >> np.arange(3) & 1)
    expected = weight * nll.sum(-1)

    def terms(rows, row_id, index, draws):
        of_sets = block[rows], size[rows], index, np.full_like(row_id, draws), block[rows]
        lengths = truth.canvas.prompt_len[i[rows]]
        return np.asarray(_terms(net, truth.layout, params, ids[rows], lengths, row_id, *of_sets))

    every = np.arange(len(ids), dtype=np.int32)
    np.testing.assert_allclose(terms(every, i, sets - 1, 0), expected, rtol=1e-10)
    # Drawn sets: rows of one question have the same masks, and their mean is the sum over all sets.
    exact = expected[(i == 0) & (block == 0) & (size == 3)].sum()
    rows, question = np.full(len(every), np.flatnonzero(size == 3)[0]), every // 4
    drawn = np.concatenate([terms(rows, question + 100 * more, every % 4, 4) for more in range(20)])
    np.testing.assert_array_equal(terms(rows, question * 0, every * 0, 4), np.full(len(every), drawn[0]))
    spread = drawn.std() / np.sqrt(len(drawn))
    assert abs(drawn.mean() - exact) < 4 * spread < exact / 5 and len(set(drawn.tolist())) >= 5
