"""What a study compares besides arms along budgets: ways of decoding, pace at equal Pass@1, and NELBO against Pass@1."""

import copy
import re
from xml.etree import ElementTree

import numpy as np
import pytest
from scipy import stats

from jaxblock.study import analysis, cells, pace, relation, report
from jaxblock.study.contrasts import Curve
from jaxblock.study.experiments import Experiment
from tests.study.test_study import TREE, laid_out, planted


@pytest.fixture(scope="module")
def made():
    """Returns (study, plan, planted results): one experiment of each of these kinds, and a second task.

    The NELBO falls with training, and the arm with the higher NELBO solves more.
    """
    tree = copy.deepcopy(TREE) | {"seeds": 3}
    tree["scoring"]["nelbo_rows"] = 4
    tree["tasks"]["others"] = {"canvas": tree["tasks"]["sums"]["canvas"]}
    tree["decodings"] |= {"fast": {"decode": {"rule": "confidence_threshold"}}, "elsewhere": {"task": "others"}}
    one = {"arms": ["blockwise", "classical"], "budgets": [20]}
    tree["experiments"] = {
        "ways": {**one, "decodings": ["own", "fast"]},
        "forgetting": {**one, "decodings": ["own", "elsewhere"], "budgets": [5, 20]},
        "pace": {**one, "decodings": ["own", "fast", "whole"], "kind": "pace"},
        "grid": {**one, "decodings": ["own", "whole"], "kind": "grid"},
        "two": {**one, "decodings": ["whole", "fast"], "budgets": [5, 20]},
        "three": {**one, "decodings": ["whole", "fast"], "budgets": [5, 10, 20]},
        "bound": {"arms": one["arms"], "decodings": ["own"], "kind": "relation"},
    }
    study, plan = laid_out(tree)
    found = planted(study, plan, 0.0)
    for cell in plan.cells:
        ahead = cell.arm == "blockwise"
        for point in cell.points:
            few = 8 * (1 + (point.steps > 5) + 2 * ahead)
            bits = np.arange(64) < few - {"fast": 4, "whole": 40 if ahead else 8}.get(point.decoding, 0)
            score = found[cell.name]["scores"][str(point)]
            score["correct"] = np.packbits(bits).tobytes().hex()
            score["nelbo_per_token"] = {"mean": 1 / point.steps + ahead}
            score["tokens_per_forward"] = {"own": 1.0, "fast": 2.0, "whole": 4.0}.get(point.decoding, 1.0) * (1 + ahead)
    return study, plan, found


def test_agreement_is_kendalls_tau_and_counts_only_the_chosen_pairs():
    rng = np.random.default_rng(2)
    ours, theirs = (rng.integers(0, 5, 12).astype(float).tolist() for _ in range(2))  # with ties
    every = np.triu(np.ones((12, 12), bool), 1)
    assert relation.agreement(ours, theirs, every) == pytest.approx(stats.kendalltau(ours, theirs).statistic)
    chosen = every & (rng.uniform(size=every.shape) < 0.4)
    signs = [(np.sign(ours[i] - ours[j]), np.sign(theirs[i] - theirs[j])) for i, j in np.argwhere(chosen)]
    differ = [sum(sign[side] != 0 for sign in signs) for side in (0, 1)]
    want = sum(a * b for a, b in signs) / np.prod(differ) ** 0.5
    assert relation.agreement(ours, theirs, chosen) == pytest.approx(want)
    assert np.isnan(relation.agreement(ours, [1.0] * 12, every))


def test_the_order_by_nelbo_is_compared_within_and_between_arms_and_a_seed_with_a_missing_score_is_left_out(made):
    study, plan, results = made
    own = [str(point) for point in plan.cell("classical-s0").points if point.decoding == "own"]
    assert "bound" not in plan.steps and own == ["5/own", "20/own"]
    found = analysis.analyse(study, plan, results)[-1]
    assert found.seeds == (0, 1, 2) and len(found.relation.scores) == 3 * 4
    assert [found.relation.pairs[kind] for kind in relation.PAIRS] == [3 * n for n in (6, 2, 4, 1)]
    agreements = [found.relation.agreement[kind].tolist() for kind in relation.PAIRS]
    # Within an arm both fall together; the arm that is behind by NELBO is always ahead by Pass@1.
    assert agreements == [[pytest.approx((2 - 4) / 6)] * 3, [1.0] * 3, [-1.0] * 3, [-1.0] * 3]
    fewer = copy.deepcopy(results)
    del fewer["classical-s1"]["scores"]["5/own"]
    assert analysis.analyse(study, plan, fewer)[-1].seeds == (0, 2)
    # An arm that has no scores with the last seed: of that seed there is nothing to compare.
    plan = cells.Plan([cell for cell in plan.cells if cell.name != "classical-s2"], plan.steps)
    found = analysis.analyse(study, plan, {name: one for name, one in results.items() if name != "classical-s2"})[-1]
    assert (found.seeds, found.planned) == ((0, 1), 2) and found.relation.over_seeds(relation.SAME) is not None


def test_pace_is_compared_at_the_pass_at_1_of_the_worse_arm(made):
    # The fastest pace lies on the line between the ways of decoding.
    rates, paces = np.array([0.9, 0.5, 0.7, 0.3]), np.array([1.0, 3.0, 2.0, 4.0])
    for level, want in ((0.9, 1.0), (0.8, 1.5), (0.7, 2.0), (0.4, 3.5), (0.3, 4.0), (0.1, 4.0)):
        assert pace.fastest(rates, paces, level) == pytest.approx(want)
    # A way of decoding that is both faster and better is used, whatever lies between.
    assert pace.fastest(np.array([0.9, 0.5, 0.95]), np.array([1.0, 2.0, 3.0]), 0.9) == 3.0
    [ratio] = analysis.analyse(*made)[2].paces
    # The control solves 16 of 64 by `own` and 12 by `fast`: at 16/64 - 0.01 it is 0.64 / 4 of the way from 1 to 2 tokens.
    assert ratio.says == "blockwise / classical" and ratio.level.tolist() == [pytest.approx(0.24)] * 3
    assert ratio.theirs.tolist() == [pytest.approx(1 + 0.64 / 4)] * 3
    # The arm solves 32, 28 and none at 2, 4 and 8 tokens.
    assert ratio.ours.tolist() == [pytest.approx(4 + 4 * (28 - 15.36) / 28)] * 3
    assert ratio.ratio.estimate == pytest.approx(ratio.ours[0] / ratio.theirs[0])


def simulated_paces(rng, seeds, behind=0.2):
    """Returns the comparison of two arms, one of them ``behind``, whose Pass@1 and pace vary by seed, by four ways of decoding."""
    curves = {}
    for arm, quick, best in (("ours", 0.3, 0.6), ("theirs", 0.0, 0.6 + behind)):
        rates = rng.normal(best, 0.05, seeds) - np.array([0, 0.03, 0.06, 0.2])[:, None]
        paces = np.exp(quick + rng.normal(0, 0.2, seeds) + np.array([0, 1.2, 1.5, 1.9])[:, None])
        for way, rate, speed in zip("abcd", rates, paces, strict=True):
            nothing = np.zeros((1, seeds))
            curves[arm, way] = Curve(arm, way, (1,), rate[None, :, None], nothing, nothing, speed[None], nothing)
    [found] = pace.pace_ratios(Experiment("", ("ours", "theirs"), (1,), tuple("abcd"), kind="pace"), curves)
    return found.ratio


def simulated_agreement(rng, seeds, scores=12):
    """Returns Kendall's tau over seeds of scores whose correlation differs by seed; its mean is known in closed form."""
    rho = rng.uniform(0.5, 0.9, (seeds, 1))
    nelbo, noise = rng.normal(size=(2, seeds, scores))
    rate = rho * nelbo + np.sqrt(1 - rho**2) * noise
    every = np.triu(np.ones((scores, scores), bool), 1)
    found = [relation.agreement(*pair, every) for pair in zip(nelbo.tolist(), rate.tolist(), strict=True)]
    return relation.Relation([], {}, {relation.ALL: np.array(found)}).over_seeds(relation.ALL)


def held(simulated, scale, truth, seeds, times=1.0):
    """Returns how many of 600 intervals hold the truth, if they are some times as wide, on a scale on which they are symmetric."""
    rng = np.random.default_rng(seeds)
    mean, low, high = np.array([scale(simulated(rng, seeds)[:3]) for _ in range(600)]).T
    assert (low + high) / 2 == pytest.approx(mean)
    return np.mean(np.abs(mean - truth) < times * (high - low) / 2)


@pytest.mark.slow
@pytest.mark.parametrize("seeds", [3, 8])
def test_intervals_over_seeds_of_paces_and_of_agreement_hold_the_truth_as_often_as_they_say(seeds):
    """Those of half the error, or with a normal quantile for Student's, would not. Standard error of a share: 0.9%."""
    by_arcsine = np.mean(2 / np.pi * np.arcsin(np.linspace(0.5, 0.9, 10_001)))
    large = simulated_paces(np.random.default_rng(0), 20_000)
    normal = 1.96 / stats.t.isf(0.025, seeds - 1)
    for of in (
        (simulated_paces, np.log, np.log(large.estimate), seeds),
        (simulated_agreement, np.positive, by_arcsine, seeds),
    ):
        assert 0.925 < held(*of) < 0.975 and held(*of, 0.5) < 0.88 and held(*of, normal) < 0.925, of
    # Where the two solve about equally many, either may be the one at whose Pass@1 paces are read (docs/study/statistics.md).
    level = lambda rng, seeds: simulated_paces(rng, seeds, 0.0)  # noqa: E731
    truth = np.log(level(np.random.default_rng(0), 20_000).estimate)
    assert {3: 0.84, 8: 0.925}[seeds] < held(level, np.log, truth, seeds) < {3: 0.91, 8: 0.975}[seeds]


def test_every_way_of_decoding_is_compared_with_the_control_and_with_the_first_one_on_the_same_task(made):
    found = {one.name: one for one in analysis.analyse(*made)}
    between = ["blockwise - classical, own", "blockwise - classical, fast"]
    contrasts = found["ways"].contrasts
    assert [one.says for one in contrasts] == [*between, "fast - own, of blockwise", "fast - own, of classical"]
    assert [one.crossed[0].estimate for one in contrasts] == [pytest.approx(x / 64) for x in (16, 16, -4, -4)]
    assert [one.says for one in found["forgetting"].contrasts] == [between[0], "blockwise - classical, elsewhere"]
    # In a grid the matching block size is compared with the others: 32 - 16 by `own`, 8 - 0 by `whole`, averaged.
    assert found["grid"].contrasts[0].crossed[0].estimate == pytest.approx((16 + 8) / 2 / 64)


def test_the_report_has_a_picture_of_each_experiment_that_shows_each_arm_by_each_way_of_decoding(made, tmp_path):
    report.write_report(*made, tmp_path)
    text, page = (tmp_path / "report.md").read_text(), (tmp_path / "report.html").read_text()
    shown = [tmp_path / name for name in re.findall(r"!\[.*\]\((.*)\)", text)]
    assert sorted(shown) == sorted((tmp_path / report.PICTURES).iterdir()) and len(shown) == page.count("<svg") == 7
    assert all(ElementTree.parse(picture).getroot().tag.endswith("}svg") for picture in shown)

    def named(experiment):
        svg = (tmp_path / report.PICTURES / f"{experiment}.svg").read_text()
        return sorted(re.findall(r"<!-- ([\w -]+, .*) -->", svg.replace("scale -->", "")))

    lines = [f"{arm}, {way}" for arm in ("blockwise", "classical") for way in ("whole", "fast")]
    assert named("three") == sorted(lines)  # each once, for all panels
    # Two budgets make no curve: each score and each difference has a line of its own, named by its budget.
    lines += [f"blockwise - classical, {way}" for way in ("whole", "fast")]
    lines += [f"fast - whole, of {arm}" for arm in ("blockwise", "classical")]
    assert named("two") == sorted(f"{line}, {budget}" for line in lines for budget in (5, 20))
