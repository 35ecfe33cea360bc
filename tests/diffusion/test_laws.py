"""Each law's expected gradient is the gradient of the NELBO: exactly, by enumerating the uniforms.

The estimator is a sum over rows and draws, so its expectation needs each draw's own marginal only: all rows and draws
are fed the same atoms (a probability and the uniforms of one draw). ``stratified_count`` ties the draws of a batch
together, so there the joint permutations are enumerated. The laws see nothing but uniforms; gradients come from a table
over (row, block, set) that knows nothing of them.
"""

import itertools
from dataclasses import replace
from fractions import Fraction
from math import comb

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxblock.diffusion import laws, objective, sampling
from jaxblock.diffusion.config import MethodConfig
from jaxblock.diffusion.sampling import Uniforms

SIZE, BLOCKS = 3, 3
NODES, NODE_WEIGHTS = (lambda x, w: ((x + 1) / 2, w / 2))(*np.polynomial.legendre.leggauss(6))
COUNTS = (np.arange(6) + 0.5) / 6  # six cells: the counts of n = 1, 2 and 3 alike

pytestmark = pytest.mark.usefixtures("x64")


def _orders(n):
    return (np.array(list(itertools.permutations(range(n)))) + 0.5) / n


def _atoms(law, floor):
    """One draw's uniforms, and how likely they are: (chance, count, position) of all that a law with a floor tells apart."""
    if law not in ("bernoulli", "floored_bernoulli"):
        return [(1 / 36, count, tuple(order)) for count in COUNTS for order in _orders(SIZE)]
    # Quadrature over the rate; given it, one atom per cell between the thresholds of each position's uniform.
    atoms = []
    for u, w in zip(NODES, NODE_WEIGHTS, strict=True):
        t, cells = floor + (1 - floor) * u, []
        for j in range(SIZE):
            # Position j's rate, under bernoulli before and after the first mask in blocks of 1, 2 and 3 positions.
            rates = [t, *(t / (1 - (1 - t) ** left) for left in range(1, SIZE - j + 1))]
            rates = rates if law == "bernoulli" else [laws.RATE_FLOOR + (1 - laws.RATE_FLOOR) * t]
            edges = np.unique([0.0, 1.0, *rates])
            cells.append([((a + b) / 2, b - a) for a, b in itertools.pairwise(edges)])
        atoms += [(w * np.prod([c for _, c in cell]), u, [at for at, _ in cell]) for cell in itertools.product(*cells)]
    return atoms


def _uniforms(how, rows):
    """(chances [E], uniforms with a leading axis E)."""
    atoms = _atoms(how.law, how.rate_floor)
    chance, count, position = (np.array(x) for x in zip(*atoms, strict=True))
    orders = _orders(BLOCKS)[:1] if how.pairs else _orders(BLOCKS)
    strata = _orders(rows * how.draws) if how.law == "stratified_count" else np.zeros((1, rows * how.draws))
    e = np.array(list(itertools.product(range(len(atoms)), range(len(orders)), range(len(strata)))))
    shape = (len(e), rows, how.draws)
    uniforms = Uniforms(
        block=np.broadcast_to(orders[e[:, 1], None], (len(e), rows, BLOCKS)),
        count=np.broadcast_to(count[e[:, 0], None, None], shape),
        stratum=strata[e[:, 2]].reshape(shape),
        position=np.broadcast_to(position[e[:, 0], None, None], (*shape, SIZE)),
        noise=np.zeros((*shape, 0)),
    )
    return chance[e[:, 0]] / (len(orders) * len(strata)), uniforms


def _rows(truth, pairs):
    """The rows fed to the law, and which (row, block) each stands for: (canvas, block, row of the table)."""
    if not pairs:
        return truth.canvas, None, np.arange(len(truth.n))
    flat = np.array([(i, k) for i, sizes in enumerate(truth.n) for k in range(len(sizes))], np.int32)
    canvas = jax.tree.map(lambda x: x[flat[:, 0]], truth.canvas)
    return canvas._replace(row_id=np.arange(len(flat), dtype=np.int32)), flat[:, 1], flat[:, 0]


def _combine(coefficients, grad):
    """sum over (block, set) of coefficient * gradient; a coefficient on a set that cannot be would give NaN."""
    return np.einsum("ks,ksp->p", coefficients, np.where(coefficients[..., None] == 0, 0, grad))


def error(got, want):
    """The largest relative error over rows."""
    return (np.linalg.norm(got - want, axis=-1) / np.linalg.norm(want, axis=-1)).max()


def expected_gradient(truth, how):
    """E over uniforms of the summed gradient of each row [row, parameter]."""
    canvas, block, origin = _rows(truth, how.pairs)
    chance, uniforms = _uniforms(how, len(origin))
    assert abs(chance.sum() - 1) < 1e-12
    every = jax.vmap(lambda u, canvas, block: sampling.draw(how, truth.layout, canvas, u, block), (0, None, None))
    draw = jax.device_get(jax.jit(every)(uniforms, canvas, block))
    sets = draw.masked @ (1 << np.arange(SIZE))
    total = np.zeros((len(truth.n), truth.grad.shape[-1]))
    for i, row in enumerate(origin):
        key = draw.block[:, :, i] * 2**SIZE + sets[:, :, i]
        value = np.broadcast_to(chance[:, None], key.shape) * draw.weight[:, :, i]
        coefficients = np.bincount(key.ravel(), value.ravel(), BLOCKS * 2**SIZE).reshape(BLOCKS, -1)
        total[row] += _combine(coefficients, truth.grad[row])
    return total


def bias(truth, how, factor=lambda n, size: 1):
    """The error of the expected gradient, against the NELBO's with a factor for each set of ``size`` of n positions."""
    weights = truth.nelbo_weights()
    for i, k, s in np.argwhere(weights):
        weights[i, k, s] *= float(factor(truth.n[i][k], int(s).bit_count()))
    return error(expected_gradient(truth, how), np.stack(list(map(_combine, weights, truth.grad))))


CASES = [
    *((law, "per_sequence", k) for law in ("exact_count", "bernoulli", "stratified_count") for k in (1, 2, 3)),
    *(("antithetic", "per_sequence", k) for k in (2, 4, 6)),
    *((law, "pairs", k) for law in ("exact_count", "bernoulli") for k in (1, 3)),
    *(("stratified_count", "pairs", 1), ("antithetic", "pairs", 2), ("antithetic", "pairs", 4)),
]
# One case for each law and each way to choose blocks is fast, and one with fewer draws than blocks and one with as many.
FAST = """exact_count-per_sequence-1-aligned exact_count-per_sequence-2-paper exact_count-per_sequence-3-aligned
exact_count-pairs-3-paper bernoulli-per_sequence-1-paper bernoulli-pairs-1-aligned stratified_count-per_sequence-1-aligned
stratified_count-pairs-1-paper antithetic-per_sequence-2-aligned antithetic-pairs-2-paper"""
NAMED = {"-".join(map(str, (*case, of))): (*case, of) for case in CASES for of in ("aligned", "paper")}
GRID = [pytest.param(*NAMED[n], id=n, marks=() if n in FAST else pytest.mark.slow) for n in NAMED]


@pytest.mark.parametrize("law, blocks, draws, context", GRID)
def test_expected_gradient_is_the_nelbos(truths, law, blocks, draws, context):
    assert bias(truths[2][context], MethodConfig(law=law, blocks=blocks, draws=draws)) < 1e-8


def _integral(power, rest, low):
    """The integral from ``low`` to 1 of t^power (1 - t)^rest, in rationals."""
    terms = ((power + j + 1, Fraction(-1) ** j * comb(rest, j)) for j in range(rest + 1))
    return sum((1 - low**k) / k * c for k, c in terms)


HALF, EPS = Fraction(1, 2), Fraction(1, 1000)
PAPER = MethodConfig(law="floored_bernoulli", blocks="pairs", weighting="masked_mean")


def _of_counts(n, size):
    """At n = 3 a count of 2 is cut at the floor of 1/2."""
    return n * 2 * max(Fraction(size, n) - max(Fraction(size - 1, n), HALF), 0)


def _of_rates(n, size):
    """A set of l has the weight times its chance t^l (1 - t)^(n - l) / t on average, in the NELBO 1 / (l C(n, l))."""
    return size * comb(n, size) * 2 * _integral(size - 1, n - size, HALF)


@pytest.mark.parametrize("law", ["exact_count", "stratified_count", "bernoulli"])
def test_a_floor_leaves_out_small_counts_and_rates(truths, law):
    factor = _of_rates if law == "bernoulli" else _of_counts
    assert bias(truths[2]["aligned"], MethodConfig(law=law, rate_floor=0.5), factor) < 1e-8


@pytest.mark.parametrize("eps", [EPS, Fraction(0)])
def test_papers_masked_mean_is_the_formula(truths, monkeypatch, eps):
    """C(n, l) / (1 - eps) times the integral from eps to 1 of p^l (1 - p)^(n - l), which is 1 / (n + 1) without a floor."""
    monkeypatch.setattr(laws, "RATE_FLOOR", float(eps))
    floored = lambda n, size: comb(n, size) / (1 - eps) * _integral(size, n - size, eps)  # noqa: E731
    assert bias(truths[2]["paper"], PAPER, floored if eps else lambda n, size: Fraction(1, n + 1)) < 1e-8


def test_broken_laws_are_caught(truths, monkeypatch):
    def caught(**how):
        return bias(truths[2]["aligned"], MethodConfig(**how)) > 1e-4

    assert caught(law="floored_bernoulli"), "t >= eps with 1/t"
    assert caught(weighting="masked_mean"), "a masked mean is no NELBO"
    monkeypatch.setitem(laws.LAWS, "bernoulli", lambda t, *given: (laws.bernoulli(t, *given)[0], 1 / t))
    assert caught(law="bernoulli"), "1/t with redraw"
    monkeypatch.setattr(sampling, "complement", lambda masked, *_: (~masked, SIZE / (~masked).sum(-1).clip(1)))
    assert caught(law="antithetic", draws=2), "an empty complement"
    honest = sampling.choose_blocks
    monkeypatch.setattr(sampling, "choose_blocks", lambda u, k, draws: (honest(u, k, draws)[0], jnp.ones((2, draws))))
    assert caught(), "K_i is missing"


def test_dividing_by_masked_tokens_is_biased(truths):
    """Divided by its own number of masks, one block is unbiased and a batch of two is not."""
    sets = np.arange(1, 8)
    size = np.array([s.bit_count() for s in sets])
    grad = truths[2]["aligned"].grad[:, 0, 1:]  # of the first block of two rows, every set but the empty one
    chance = 1 / 3 / np.array([3, 3, 1])[size - 1]  # exact_count
    nelbo = np.einsum("s,rsp->rp", chance * 3 / size, grad)
    assert error(np.einsum("s,rsp->rp", chance / size, grad), nelbo / 3) < 1e-8
    both = (grad[0][:, None] + grad[1]) / (size[:, None] + size)[..., None]
    assert error(np.einsum("a,b,abp->p", chance, chance, both), nelbo.sum(0) / 6) > 1e-4


REAL = [
    pytest.param("aligned", MethodConfig(draws=4), id="exact_count"),  # 4 > 3 blocks
    pytest.param("shifted", MethodConfig(law="antithetic", draws=2, normalize="sequence_mean"), id="antithetic"),
    pytest.param("paper", replace(PAPER, draws=2, normalize="blocks"), id="paper", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("context, how", REAL)
def test_losses_are_the_tables_combination(truths, context, how):
    """Value, gradient and tallies of real draws, K > K_i among them."""
    net, params, made = truths
    truth = made[context]
    canvas, block, origin = _rows(truth, how.pairs)
    rows = len(origin)

    @jax.jit
    def real(seed, canvas, block):
        uniforms = sampling.draw_uniforms(how, truth.layout, jax.random.key(seed), rows)
        return sampling.draw(how, truth.layout, canvas, uniforms, block)

    def total(params, draw, canvas, block):
        out = objective.losses(net, params, truth.layout, canvas, draw, how, drawn_blocks=block)
        return out.loss.total, out

    compiled = jax.jit(jax.value_and_grad(total, has_aux=True))
    data = {"text_tokens": sum(len(text) for _, text in truth.rows), "sequence_mean": rows, "blocks": rows}
    share = [1 / sum(truth.n[i]) if how.normalize == "sequence_mean" else 1 for i in origin]
    for seed in range(2):
        draw = jax.device_get(real(seed, canvas, block))
        (value, out), grad = jax.device_get(compiled(params, draw, canvas, block))
        live = draw.weight > 0
        at = np.broadcast_to(origin, live.shape)[live], draw.block[live], draw.masked[live] @ (1 << np.arange(SIZE))
        weight, loss, size = (draw.weight * share)[live], truth.nll[at].sum(-1), draw.masked[live].sum(-1)
        assert abs(value / (weight @ loss) - 1) < 1e-10
        assert error(np.concatenate([x.ravel() for x in jax.tree.leaves(grad)]), weight @ truth.grad[at]) < 1e-10
        assert float(out.loss.weight) == data[how.normalize]
        for of_block, of_count, what in zip(out.by_block, out.by_count, (loss, size), strict=True):
            np.testing.assert_allclose(of_block, np.bincount(at[1], what, BLOCKS), rtol=1e-10)
            np.testing.assert_allclose(of_count, np.bincount(size, what, SIZE + 1)[1:], rtol=1e-10)
        if how.law == "exact_count":
            blocks = [set(draw.block[live[:, i], i]) for i in range(rows)]
            assert list(map(len, blocks)) == [3, 2], "K draws are distinct blocks, K_i at most"
