"""Each law's expected gradient is the gradient of the NELBO: exactly, by enumerating the uniforms.

The estimator is a sum over rows and draws, so its expectation needs each draw's own marginal only: all rows and draws
are fed the same atoms (a probability and the uniforms of one draw). ``stratified_count`` ties the draws of a batch
together, so there the joint permutations are enumerated. The laws see nothing but uniforms; gradients come from a table
over (row, block, set) that knows nothing of them.
"""

import itertools
from fractions import Fraction
from math import comb
from types import SimpleNamespace

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


def _uniforms(law, rows, draws, pairs, floor=0.0):
    """(chances [E], uniforms with a leading axis E)."""
    atoms = _atoms(law, floor)
    chance, count, position = (np.array(x) for x in zip(*atoms, strict=True))
    orders = _orders(BLOCKS)[:1] if pairs else _orders(BLOCKS)
    strata = _orders(rows * draws) if law == "stratified_count" else np.zeros((1, rows * draws))
    e = np.array(list(itertools.product(range(len(atoms)), range(len(orders)), range(len(strata)))))
    shape = (len(e), rows, draws)
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


def _draws(truth, how, uniforms, canvas, block):
    draw = jax.vmap(lambda u, canvas, block: sampling.draw(how, truth.layout, canvas, u, block), (0, None, None))
    return jax.device_get(jax.jit(draw)(uniforms, canvas, block))


def _combine(coefficients, grad):
    """sum over (block, set) of coefficient * gradient; a coefficient on a set that cannot be would give NaN."""
    return np.einsum("ks,ksp->p", coefficients, np.where(coefficients[..., None] == 0, 0, grad))


def expected_gradient(truth, how):
    """E over uniforms of the summed gradient of each row [row, parameter]."""
    canvas, block, origin = _rows(truth, how.pairs)
    rows = len(origin)
    chance, uniforms = _uniforms(how.law, rows, how.draws, how.pairs, how.rate_floor)
    assert abs(chance.sum() - 1) < 1e-12
    draw = _draws(truth, how, uniforms, canvas, block)
    sets = draw.masked @ (1 << np.arange(SIZE))
    total = np.zeros((len(truth.n), truth.grad.shape[-1]))
    for i in range(rows):
        key = draw.block[:, :, i] * 2**SIZE + sets[:, :, i]
        value = np.broadcast_to(chance[:, None], key.shape) * draw.weight[:, :, i]
        coefficients = np.bincount(key.ravel(), value.ravel(), BLOCKS * 2**SIZE).reshape(BLOCKS, -1)
        total[origin[i]] += _combine(coefficients, truth.grad[origin[i]])
    return total


def nelbo_gradient(truth):
    """The gradient of each row's enumerated NELBO [row, parameter]."""
    return np.stack([_combine(w, g) for w, g in zip(truth.nelbo_weights(), truth.grad, strict=True)])


def error(got, want):
    """The largest relative error over rows."""
    return (np.linalg.norm(got - want, axis=-1) / np.linalg.norm(want, axis=-1)).max()


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
    truth = truths[2][context]
    how = MethodConfig(law=law, blocks=blocks, draws=draws)
    assert error(expected_gradient(truth, how), nelbo_gradient(truth)) < 1e-8


def _paper_coefficient(n, size, eps):
    """C(n, l) / (1 - eps) * integral from eps to 1 of p^l (1 - p)^(n - l), in rationals."""
    total = Fraction(0)
    for j in range(n - size + 1):
        power = size + j + 1
        total += comb(n - size, j) * Fraction(-1) ** j * (1 - eps**power) / power
    return float(comb(n, size) * total / (1 - eps))


@pytest.mark.parametrize("law", ["exact_count", "stratified_count", "bernoulli"])
def test_a_floor_leaves_out_small_counts_and_rates(truths, law):
    """Coefficients of the counts are those of the page, computed in rationals; at n = 3 a count of 2 is cut at the floor of 1/2."""
    truth, floor = truths[2]["aligned"], Fraction(1, 2)
    weights = truth.nelbo_weights()
    for i, k, s in np.argwhere(weights):
        n, size = truth.n[i][k], int(s).bit_count()
        if law == "bernoulli":
            # A set of l has the weight times its chance t^l (1 - t)^(n - l) / t on average, in the NELBO 1 / (l C(n, l)).
            share = size * comb(n, size) * 2 * _power_integral(n, size - 1, floor)
        else:
            share = n * 2 * max(Fraction(size, n) - max(Fraction(size - 1, n), floor), 0)
        weights[i, k, s] *= float(share)
    want = np.stack([_combine(w, g) for w, g in zip(weights, truth.grad, strict=True)])
    assert error(expected_gradient(truth, MethodConfig(law=law, rate_floor=float(floor))), want) < 1e-8


def _power_integral(n, power, floor):
    """The integral from ``floor`` to 1 of t^power (1 - t)^(n - 1 - power), in rationals."""
    rest = n - 1 - power
    terms = ((power + j + 1, Fraction(-1) ** j * comb(rest, j)) for j in range(rest + 1))
    return sum((1 - floor**k) / k * c for k, c in terms)


@pytest.mark.parametrize("eps", [Fraction(1, 1000), Fraction(0)])
def test_papers_masked_mean_is_the_formula(truths, monkeypatch, eps):
    monkeypatch.setattr(laws, "RATE_FLOOR", float(eps))
    truth = truths[2]["paper"]
    weights = truth.nelbo_weights()
    for i, k, s in np.argwhere(weights):
        n = truth.n[i][k]
        weights[i, k, s] *= _paper_coefficient(n, int(s).bit_count(), eps) if eps else 1 / (n + 1)
    want = np.stack([_combine(w, g) for w, g in zip(weights, truth.grad, strict=True)])
    paper = MethodConfig(law="floored_bernoulli", blocks="pairs", weighting="masked_mean")
    assert error(expected_gradient(truth, paper), want) < 1e-8


def _redrawn_with_one_over_t(count, position, valid):
    return laws.bernoulli(count, position, valid)[0], jnp.where(valid.any(-1), 1 / count, 0.0)


def _bare_complement(masked, position, valid):
    partner = ~masked & valid
    return partner, valid.sum(-1) / jnp.maximum(partner.sum(-1), 1)


def _without_k(uniforms, n_blocks, draws, honest=sampling.choose_blocks):
    blocks, weight = honest(uniforms, n_blocks, draws)
    return blocks, weight / n_blocks[:, None]


def test_broken_laws_are_caught(truths, monkeypatch):
    truth = truths[2]["aligned"]

    def caught(**how):
        return error(expected_gradient(truth, MethodConfig(**how)), nelbo_gradient(truth)) > 1e-4

    assert caught(law="floored_bernoulli"), "t >= eps with 1/t"
    assert caught(weighting="masked_mean"), "a masked mean is no NELBO"
    monkeypatch.setitem(laws.LAWS, "bernoulli", _redrawn_with_one_over_t)
    assert caught(law="bernoulli"), "1/t with redraw"
    monkeypatch.setattr(sampling, "complement", _bare_complement)
    assert caught(law="antithetic", draws=2), "an empty complement"
    monkeypatch.setattr(sampling, "choose_blocks", _without_k)
    assert caught(), "K_i is missing"


def test_dividing_by_masked_tokens_is_biased(truths):
    """Divided by its own number of masks, one block is unbiased and a batch of two is not."""
    truth = truths[2]["aligned"]
    chance, uniforms = _uniforms("exact_count", 2, 1, pairs=True)
    how = MethodConfig(blocks="pairs", weighting="uniform")
    draw = _draws(truth, how, uniforms, truth.canvas, np.zeros(2, np.int32))
    sets = (draw.masked @ (1 << np.arange(SIZE)))[:, 0, :]
    grad = [truth.grad[i, 0][sets[:, i]] for i in range(2)]
    size = draw.masked.sum(-1)[:, 0, :]
    want = nelbo_gradient(truth._replace(n=[[SIZE], [SIZE]]))

    one = (grad[0] / size[:, :1]).mean(0)
    assert error(one, want[0] / SIZE) < 1e-8
    a, b = np.array(list(itertools.product(range(len(chance)), repeat=2))).T
    two = ((grad[0][a] + grad[1][b]) / (size[a, :1] + size[b, 1:])).mean(0)
    assert error(two, want.sum(0) / (2 * SIZE)) > 1e-4


REAL = {
    "exact_count": ("aligned", MethodConfig(draws=4)),  # 4 > 3 blocks
    "antithetic": ("shifted", MethodConfig(law="antithetic", draws=2, normalize="sequence_mean")),
    "paper": (
        "paper",
        MethodConfig(law="floored_bernoulli", blocks="pairs", draws=2, weighting="masked_mean", normalize="blocks"),
    ),
}


@pytest.mark.parametrize("name", ["exact_count", "antithetic", pytest.param("paper", marks=pytest.mark.slow)])
def test_losses_are_the_tables_combination(truths, name):
    """Value, gradient and tallies of real draws, K > K_i among them; a shift off by one is caught."""
    context, how = REAL[name]
    net, params, made = truths
    truth = made[context]
    canvas, block, origin = _rows(truth, how.pairs)
    rows = len(origin)

    def total(net, params, draw, canvas, block):
        out = objective.losses(net, params, truth.layout, canvas, draw, how, drawn_blocks=block)
        return out.loss.total, out

    @jax.jit
    def real(seed, canvas, block):
        uniforms = sampling.draw_uniforms(how, truth.layout, jax.random.key(seed), rows)
        return sampling.draw(how, truth.layout, canvas, uniforms, block)

    def unshifted(params, view, row_keys):
        return net.hidden(params, view._replace(at=view.active), row_keys)

    wrong = SimpleNamespace(unstacked=net.unstacked, hidden=unshifted, logits=net.logits, nll=net.nll)
    off_by_one = jax.jit(lambda *given: total(wrong, *given)[0])
    compiled = jax.jit(jax.value_and_grad(total, argnums=1, has_aux=True), static_argnums=0)
    supervised = [sum(sizes) for sizes in truth.n]
    data = {"text_tokens": sum(len(text) for _, text in truth.rows), "sequence_mean": rows, "blocks": rows}
    share = [1 / supervised[i] if how.normalize == "sequence_mean" else 1 for i in origin]
    for seed in range(2):
        draw = jax.device_get(real(seed, canvas, block))
        (value, out), grad = jax.device_get(compiled(net, params, draw, canvas, block))
        want, want_grad, by_block, by_count = 0.0, 0.0, np.zeros((BLOCKS, 2)), np.zeros((SIZE, 2))
        for k, i in itertools.product(range(how.draws), range(rows)):
            weight, b = float(draw.weight[k, i]), int(draw.block[k, i])
            if weight == 0:
                continue
            s = int(draw.masked[k, i] @ (1 << np.arange(SIZE)))
            loss = truth.nll[origin[i], b, s].sum()
            want += weight * share[i] * loss
            want_grad += weight * share[i] * truth.grad[origin[i], b, s]
            by_block[b] += loss, s.bit_count()
            by_count[s.bit_count() - 1] += (loss, s.bit_count()) if s else (0, 0)
        assert abs(value / want - 1) < 1e-10
        assert error(np.concatenate([x.ravel() for x in jax.tree.leaves(grad)]), want_grad) < 1e-10
        assert float(out.loss.weight) == data[how.normalize]
        np.testing.assert_allclose(np.stack(out.by_block, -1), by_block, rtol=1e-10)
        np.testing.assert_allclose(np.stack(out.by_count, -1), by_count, rtol=1e-10)
        if how.law == "exact_count":
            live = [set(draw.block[draw.weight[:, i] > 0, i]) for i in range(rows)]
            assert [len(blocks) for blocks in live] == [3, 2], "K draws are distinct blocks, K_i at most"
        if context == "shifted":
            broken = off_by_one(params, draw, canvas, block)
            assert abs(broken / want - 1) > 1e-3, "a shift off by one"
