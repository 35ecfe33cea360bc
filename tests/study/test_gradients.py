"""Measurements of gradients against enumeration: of blocks, counts and sets on a tiny network, and of small populations."""

import copy
import itertools
import math

import jax
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from scipy import stats

from jaxblock.diffusion.config import MethodConfig
from jaxblock.diffusion.corruption import corrupt
from jaxblock.diffusion.sampling import Draw
from jaxblock.errors import UserError
from jaxblock.models.spec import flatten
from jaxblock.study import analysis, report
from jaxblock.study.gradients import (
    contexts,
    decomposition,
    direction,
    measure,
    moments,
    rows,
    tables,
    tightness,
    variance,
)
from jaxblock.study.gradients.probe import Population, Probe
from jaxblock.study.gradients.sizes import GradientSizes
from tests.diffusion.conftest import TEXTS, R, build_truth, make_layout, make_net
from tests.diffusion.test_likelihood import log_likelihood
from tests.study.test_study import TREE, laid_out

SIZE = 3  # positions of a block


@pytest.fixture(scope="module")
def tiny():
    """A probe of a network of one layer on two examples, and the gradient of every set by enumeration, in the probe's order."""
    with jax.enable_x64(True):
        net, params = make_net(n_layers=1)
        layout, whole = make_layout(), make_layout(block=R)
        truth = build_truth(net, params, layout, TEXTS["aligned"])
        # Where each entry of ``ravel_pytree`` stands in the probe's order.
        at = flatten(ravel_pytree(params)[1](np.arange(truth.grad.shape[-1], dtype=np.float64)))
        in_order = np.concatenate([np.ravel(at[path]) for path in rows.ordered_paths(net.param_table)]).astype(int)
        truth = truth._replace(grad=truth.grad[..., in_order])
        everything = truth.canvas.ids.copy()
        for row, (prompt, text) in enumerate(truth.rows):
            everything[row, len(prompt) + len(text) : len(prompt) + R] = layout.fill_id
        full = truth.canvas._replace(ids=everything, n_blocks=np.ones(2, np.int32))

        def laid_out(which, places):
            found = jax.tree.map(lambda x: x[places], full if which.block == R else truth.canvas)
            return found._replace(row_id=np.arange(len(places), dtype=np.int32))

        population = Population(truth.canvas.text_len, laid_out)
        yield Probe(net, params, layout, whole, population, "sequences", seed=3), truth


def table_of(truth, canvas_rows, draw):
    """The weighted gradients of draws, looked up: [..., P]."""
    found = truth.grad[canvas_rows, draw.block, draw.masked @ (1 << np.arange(SIZE))]
    return draw.weight[..., None] * np.where(draw.weight[..., None] > 0, found, 0)


def outcomes(truth):
    """Every (chance, example, block, count, weighted gradient) of one row under `exact_count`."""
    for i, sizes in enumerate(truth.n):
        for k, n in enumerate(sizes):
            for s in range(1, 2**n):
                count = s.bit_count()
                chance = 1 / (len(truth.n) * len(sizes) * n * math.comb(n, count))
                yield chance, i, k, count, len(sizes) * n / count * truth.grad[i, k, s]


def enumerated_levels(truth):
    """|E g|^2, E|E[g given example]|^2, and so on down to E|g|^2."""
    found = list(outcomes(truth))
    levels = []
    for depth in range(4):
        means, chances = {}, {}
        for chance, *path, gradient in found:
            key = tuple(path[:depth])
            means[key] = means.get(key, 0) + chance * gradient
            chances[key] = chances.get(key, 0) + chance
        levels.append(sum(np.square(mean).sum() / chances[key] for key, mean in means.items()))
    return [*levels, sum(chance * np.square(gradient).sum() for chance, *_, gradient in found)]


def near(found, want, times=4.0):
    """Whether an estimate is within some of its own standard errors of the truth, which are not too wide to tell."""
    assert found.se < 0.2 * abs(want) + 0.02, f"{found} says nothing about {want}"
    return abs(found.mean - want) < times * found.se


def test_gradients_of_rows_and_batches_are_the_tables(tiny):
    """Of real draws, on both layouts: what is computed is what the table holds, in the order that the groups state."""
    probe, truth = tiny
    parts = rows.parts_of(probe.net.param_table)
    assert {part.name for part in parts} == {"all", "embedding", "norms", "attention", "feed-forward", "head"}
    assert sum(part.end - part.start for part in parts[1:]) == parts[0].end == truth.grad.shape[-1]
    with jax.enable_x64(True):
        places = np.array([0, 1, 1, 0, 1])
        canvas = probe.population.canvas(probe.layout, places)
        draws = decomposition.nested_draws(probe, MethodConfig(), canvas)
        weight = draws.weight[0][:, None] * np.ones(SIZE)
        first = jax.tree.map(lambda x: x[0], draws)
        got = rows.all_rows(probe.net, probe.layout, probe.params, canvas, first, weight)
        np.testing.assert_allclose(got, table_of(truth, places, first), rtol=1e-9, atol=1e-12)

        group = direction.draw_group(probe, 0, 4)
        ideal = direction.block_gradients(probe, group, contexts.IDEAL)
        want = table_of(truth, np.asarray(group.canvas.prompt_len) - 2, group.drawn).reshape(3, 4, -1).sum(1)
        np.testing.assert_allclose(ideal, want, rtol=1e-9, atol=1e-12)
        np.testing.assert_array_equal(group.drawn.weight > 0, group.drawn.block < group.canvas.n_blocks)

        for fields in ({"law": "stratified_count"}, {"law": "antithetic", "blocks": "pairs"}):
            method = MethodConfig(draws=2, normalize="sequences", **fields)
            batches = variance.draw_batches(probe, method, 1, 4)
            prompt = batches.canvas.prompt_len[0] - 2  # tells the two examples apart
            want = table_of(truth, prompt, jax.tree.map(lambda x: x[0], batches.draw)).sum(0)
            np.testing.assert_allclose(variance.batch_gradients(probe, batches)[0], want, rtol=1e-9, atol=1e-12)


def test_the_parts_of_a_rows_variance_are_those_of_enumeration(tiny):
    probe, truth = tiny
    examples = 4000
    with jax.enable_x64(True):
        places = probe.population.draw(probe.rng(0), (examples,))
        draws = decomposition.nested_draws(probe, MethodConfig(), probe.population.canvas(probe.layout, places))
    assert (draws.block[:3] == draws.block[0]).all() and (draws.block[3] != draws.block[0]).any()
    counts = draws.masked.sum(-1)
    assert (counts[0] == counts[1]).all() and (counts[0] != counts[2]).any()
    gradients = table_of(truth, np.tile(places, (4, 1)), draws).swapaxes(0, 1)
    mean, products = gradients.mean(1), np.einsum("ejp,ekp->ejk", gradients, gradients)
    found, levels = decomposition.decomposition(mean, products), enumerated_levels(truth)
    total = levels[-1] - levels[0]
    assert near(found.relative, total / levels[0])
    for at, source in enumerate(decomposition.SOURCES):
        want = (levels[at + 1] - levels[at]) / total
        assert near(found.shares[source], want), source
        other = (levels[(at + 1) % 4 + 1] - levels[(at + 1) % 4]) / total
        assert not near(found.shares[source], other), f"{source} could be another part"
    # Eight examples at a time: the mean over pairs is right on average, the squared length of the mean gradient is not.
    groups = mean.reshape(-1, 8, mean.shape[-1])
    unbiased = np.array([moments.product_of_means(group, group).value for group in groups])
    plug_in = np.square(groups.mean(1)).sum(-1)
    error = unbiased.std() / math.sqrt(len(groups))
    assert abs(unbiased.mean() - levels[0]) < 4 * error < abs(plug_in.mean() - levels[0])


def test_jackknife_errors_are_those_of_repeated_measurements():
    """Of 95% intervals of 40 examples as many hold the truth as they say, of those with half or twice the error too few or too many."""
    rng, mean = np.random.default_rng(1), np.array([2.0, 1.0, 0, 0, 0, 0])
    truth = {"tr Cov / |mean|^2": 6 / 5, "ratio of variances": 1.25, "variance": 6.0, "squared length": 5.0}
    found = []
    for _ in range(1000):
        ours = mean + rng.normal(size=(40, 6))
        theirs = ours + 0.5 * rng.normal(size=ours.shape)
        variances = [moments.variance_of(one) for one in (ours, theirs)]
        length = moments.product_of_means(ours, ours)
        ratios = moments.estimate(np.divide, variances[0], length), moments.estimate(np.divide, *variances[::-1])
        found.append(
            [one[:2] for one in (*ratios, *(moments.estimate(np.positive, x) for x in (variances[0], length)))]
        )
    estimates, errors = np.moveaxis(found, -1, 0)
    away = np.abs(estimates - list(truth.values())) / errors
    # By times of the error; the standard error of a share is 0.7%.
    held = {times: (away < times * stats.t.isf(0.025, 39)).mean(0) for times in (0.5, 1, 2)}
    assert (np.abs(held[1] - 0.95) < 0.025).all() and (held[0.5] < 0.8).all() and (held[2] > 0.985).all(), held
    assert errors.mean(0) == pytest.approx(estimates.std(0), rel=0.1)


def test_the_variance_of_batches_is_that_of_enumeration_on_one_scale(tiny, monkeypatch):
    """The default's tr Cov / |mean|^2, and that of the paper's estimator, whose mean has another scale and direction."""
    probe, truth = tiny
    monkeypatch.setattr(variance, "estimators", lambda normalize: {
        variance.REFERENCE: MethodConfig(normalize=normalize),
        "masked_mean": MethodConfig("blockwise", "floored_bernoulli", "masked_mean", normalize, "pairs"),
        "two": MethodConfig(draws=2, normalize=normalize),
    })  # fmt: skip
    of_table = lambda probe, batches: table_of(truth, batches.canvas.prompt_len - 2, batches.draw).sum(1)  # noqa: E731
    monkeypatch.setattr(variance, "batch_gradients", of_table)
    with jax.enable_x64(True):
        found = {name: groups["all"] for name, groups in variance.measure_variance(probe, 3000, 4).items()}
    levels = enumerated_levels(truth)
    assert near(found[variance.REFERENCE].relative, (levels[-1] - levels[0]) / levels[0] / 4)
    assert found[variance.REFERENCE].ratio.mean == pytest.approx(1)
    # Given the count, a set is uniform; counts have the paper's rates, 1 / (n + 1) each (the floor changes 0.1%).
    pairs = [(i, k, n) for i, sizes in enumerate(truth.n) for k, n in enumerate(sizes)]
    mean, second = 0, 0
    for (i, k, n), s in ((pair, s) for pair in pairs for s in range(1, 2 ** pair[2])):
        chance = 1 / (len(pairs) * (n + 1) * math.comb(n, s.bit_count()))
        gradient = truth.grad[i, k, s] / s.bit_count()
        mean, second = mean + chance * gradient, second + chance * np.square(gradient).sum()
    common = sum(chance * gradient for chance, *_, gradient in outcomes(truth))
    scaled = (mean @ common) ** 2 / (common @ common)
    assert near(found["masked_mean"].relative, (second - mean @ mean) / scaled / 4)
    # Two draws of a row are two of its distinct blocks: less variance than one for each forward, and the example's part doubles.
    assert found["two"].ratio.mean != pytest.approx(1, abs=0.01)


def test_an_angle_is_that_of_the_expected_gradients(tiny, monkeypatch):
    rng = np.random.default_rng(2)
    atoms = rng.normal(size=(6, 40)) + 0.3
    other = 0.4 * atoms + rng.normal(size=(6, 40)) + 0.2
    x, y = atoms.mean(0), other.mean(0)
    cosine = x @ y / np.linalg.norm(x) / np.linalg.norm(y)
    drawn = rng.integers(6, size=6000)
    found = direction.angle(atoms[drawn], other[drawn])
    assert near(found.cosine, cosine) and near(found.length, np.linalg.norm(y) / np.linalg.norm(x))
    assert near(found.distance, np.linalg.norm(x / np.linalg.norm(x) - y / np.linalg.norm(y)))
    # Noise in one of two gradients with the same mean turns the mean of a few of them away, but not the estimate.
    noise = 3 * rng.normal(size=(400, 40))
    noisy, steady = 1 + noise - noise.mean(0), np.ones((400, 40))
    few = rng.integers(400, size=(200, 40))
    plug_in = [noisy[at].mean(0).sum() / np.linalg.norm(noisy[at].mean(0)) / math.sqrt(40) for at in few]
    assert abs(np.mean([direction.angle(noisy[at], steady[at]).cosine.mean for at in few]) - 1) < 0.02
    assert np.mean(plug_in) < 0.95
    away = np.array([[1.0, 0], [-1.0, 0], [0, 0.1]])
    assert math.isnan(direction.angle(away, -away).cosine.mean), "both squared lengths are below 0"
    # A block that no response reaches, and which has no loss in any group, has no direction.
    reached = np.array([1.0, 1.0, 0.0])[:, None]
    monkeypatch.setattr(direction, "draw_group", lambda *_: None)
    monkeypatch.setattr(direction, "block_gradients", lambda *_: reached * (1 + rng.normal(size=(3, 5))))
    monkeypatch.setattr(direction, "steepness", lambda *_: None)
    assert {len(one.by_block) for one in direction.measure_direction(tiny[0], 6, 1).values()} == {2}


def test_what_stands_around_a_block_is_what_the_ablations_show_and_classical_masks_every_number_alike(tiny):
    probe, _ = tiny
    with jax.enable_x64(True):
        group = direction.draw_group(probe, 0, 4)
        live = (group.drawn.weight > 0)[:, None]
        for context in (contexts.Context("noisy", 0.5, 1.0), contexts.Context("seen", 0.3, 0.4)):
            method = MethodConfig(prefix_mask_rate=context.prefix_mask_rate, suffix_mask_prob=context.suffix_mask_prob)
            blockwise = jax.jit(lambda c, d, u, m=method: corrupt(probe.layout, c, d, m, u)[0])
            want = blockwise(group.canvas, group.drawn, group.uniforms.noise[:, 0])
            everywhere = Draw(np.zeros(12, np.int32), direction.masked_rows(probe, group, context), np.ones(12))
            got = jax.jit(lambda c, d: corrupt(probe.whole, c, d)[0])(group.whole, everywhere)
            seen = (np.arange(want.ids.shape[1]) < want.length[:, None]) & live
            np.testing.assert_array_equal(np.where(seen, got.ids, 0), np.where(seen, want.ids, 0))
        many = direction.draw_group(probe, 1, 7000)
    full = many.drawn.weight > 0
    weights = contexts.block_weights(probe.layout, many.drawn)
    assert ((weights > 0).sum(-1) == np.where(full, SIZE, 0)).all()

    def surprise(group):
        """The chi-square statistic of the totals of masks against equal chances from 1 to R (docs/study/gradients.md)."""
        totals = direction.masked_rows(probe, group, contexts.Context("classical", classical=True)).sum(-1)
        expected = full.sum() / R
        return np.square(np.bincount(totals[full], minlength=R + 1)[1:] - expected).sum() / expected

    # Restricted to a block, classical SFT gives every total the same chance.
    assert surprise(many) < 26.1, "chi-square of 8 degrees of freedom at 0.001"
    independent = many.uniforms._replace(position=np.random.default_rng(0).permuted(many.uniforms.position, axis=0))
    assert surprise(many._replace(uniforms=independent)) > 100, "a rate that ignores the block's count"


def test_the_bound_and_log_p_are_those_of_all_orders(tiny, monkeypatch):
    losses = np.random.default_rng(1).exponential(size=(16, 4)) * (np.arange(16)[:, None] >> np.arange(4) & 1)
    paths = []
    for order in itertools.permutations(range(4)):
        left, surprise = 15, 0.0
        for position in order:
            surprise += losses[left, position]
            left ^= 1 << position
        paths.append(surprise)
    want = [np.mean(paths), -np.log(np.mean(np.exp(-np.array(paths))))]
    np.testing.assert_allclose(tightness.bound_and_log_p(losses), want, rtol=1e-12)
    probe, truth = tiny
    with jax.enable_x64(True):
        found = tightness.measure_tightness(probe, (1, SIZE), 2, 100)
        monkeypatch.setattr(tightness, "_MOST_ENUMERATED", 0)
        drawn = tightness.measure_tightness(probe, (SIZE,), 2, 100)[SIZE]
    places = probe.population.draw(probe.rng(tightness._ROWS), (2,))
    per_token = lambda values: (values.sum(-1) / truth.canvas.text_len)[places].mean()  # noqa: E731
    want = per_token(truth.nelbo()), per_token(-log_likelihood(truth))
    assert found[1].gap.mean == 0 and found[1].exact, "blocks of one token have one order"
    assert (found[SIZE].nelbo.mean, found[SIZE].minus_log_p.mean) == pytest.approx(want, rel=1e-9)
    assert not drawn.exact and drawn.nelbo.mean == pytest.approx(want[0], rel=0.1)
    assert want[1] - 0.05 < drawn.minus_log_p.mean < drawn.nelbo.mean


def test_a_study_measures_keeps_and_reports_gradients(tiny, tmp_path, monkeypatch):
    sizes = {"batches": 3, "forwards": 4, "examples": 4, "groups": 3, "bound_examples": 2, "orders": 2}
    tree = copy.deepcopy(TREE) | {"gradients": {**sizes, "bound_blocks": [1, 4]}}
    measured = {"kind": "gradients", "arms": ["blockwise", "classical"], "budgets": [5, 20], "seeds": 2}
    tree["experiments"]["noise"] = {**measured, "title": "Gradients"}
    study, plan = laid_out(tree)
    asked = ["20/gradients" in map(str, plan.cell(f"classical-s{seed}").points) for seed in (1, 2)]
    assert asked == [True, False]
    few = {name: variance.estimators("sequences")[name] for name in (variance.REFERENCE, "exact_count, pairs, K = 2")}
    monkeypatch.setattr(variance, "estimators", lambda normalize: few)
    with jax.enable_x64(True):
        score = measure.measure(tiny[0], GradientSizes(**sizes, bound_blocks=(1, 3)))
    assert set(score["direction"]) == {context.name for context in contexts.CONTEXTS} and len(contexts.CONTEXTS) == 12
    results = {}
    for cell in plan.cells:
        scores = {str(point): score for point in cell.points if point.decoding == "gradients"}
        results[cell.name] = {"scores": scores, "steps": 0, "seconds": {}, "versions": {}, "settings": {}}
    hidden = copy.deepcopy(score)
    hidden["decomposition"]["all"]["relative"] = [-18.5, 2.0]  # the squared length is estimated below 0
    results["classical-s1"]["scores"]["20/gradients"] = hidden
    found = analysis.analyse(study, plan, results)[-1]
    assert found.seeds == (0, 1) and set(found.measured) == set(itertools.product(measured["arms"], (5, 20)))
    report.write_report(study, plan, results, tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert "| exact_count, pairs, K = 2 | " in text and "| blockwise, step 5 | 1 | " in text
    hidden_rows = [line for line in text.splitlines() if " | all | not resolved | " in line]
    assert [row.split(" | ")[0] for row in hidden_rows] == ["| classical, step 20"]
    assert text.count("| the same by group of parameters: ") == 4  # of every checkpoint
    other = copy.deepcopy(score)
    other["sizes"]["batches"] = 4
    results["classical-s1"]["scores"]["5/gradients"] = other
    with pytest.raises(UserError, match="were measured with the sizes"):
        report.write_report(study, plan, results, tmp_path)


def test_a_ratio_to_a_squared_length_that_noise_hides_is_not_resolved():
    """But for estimators with one expectation, whose squared length cancels."""
    names = (variance.REFERENCE, "pairs", f"{variance.MASKED_MEAN}, pairs, K = 1")

    def ratios(relative, name):
        of = [{"variance": {name: {"all": {"relative": [one, 1.0], "ratio": [1.5, 0.1]}}}} for one in (4.0, relative)]
        return tables.ratio_text(tables.ratios(of, name))

    assert [ratios(-4.0, name).split(" ")[0] for name in names] == ["1.500", "1.500", "not"]
    assert [ratios(4.0, name).split(" ")[0] for name in names] == ["1.500"] * 3
    assert ratios(None, names[2]) == tables.UNKNOWN
