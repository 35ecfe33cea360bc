"""Tests the study's statistics against closed forms, full enumeration, SciPy, and simulated studies whose truth is known."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from benchmarks.study_coverage import WORLDS, closed_coverage, coverage, crossover_coverage, found_by_chance, normal
from jaxblock.errors import UserError
from jaxblock.study.crossed import crossed_bootstrap, crossed_draws, crossed_variance, resampled_means
from jaxblock.study.crossover import COURSES, crossover, last_changes
from jaxblock.study.hypotheses import crossed_p, holm, primary_findings, sign_flip_p, student_p
from jaxblock.study.statistics import ratio_interval, t_interval

rng = np.random.default_rng(5)
SOME = rng.standard_normal((4, 8, 30)) + np.array([-1, -0.2, 0.3, 1])[:, None, None]


def test_the_variance_of_the_mean_is_the_analysis_of_variance():
    a, b = np.array([-1.0, 0.0, 4.0]), np.array([2.0, -1.0, 0.5, 3.0])
    found = crossed_variance(7 + a[:, None] + b)
    se = a.var(ddof=1) / 3 + b.var(ddof=1) / 4
    df = se**2 / ((a.var(ddof=1) / 3) ** 2 / 2 + (b.var(ddof=1) / 4) ** 2 / 3)
    assert found[:3] == pytest.approx((7 + 1 + 9 / 8, se, df))
    assert crossed_variance(a[:, None] + 0 * b)[1:3] == pytest.approx((a.var(ddof=1) / 3, 2))
    assert crossed_variance((0 * a[:, None] + b).T).df == pytest.approx(3)  # four seeds, whose part is all there is
    many = np.random.default_rng(1).standard_normal((9, 1)) + 9 * np.array([0.0, 1.0, 3.0])
    assert crossed_variance(many).df == pytest.approx(2, abs=0.1)  # not the 8 of its seeds: its three problems decide
    # Where the rest is all there is, neither seeds nor problems take anything from it.
    checkers = np.array([[1.0, -1.0], [-1.0, 1.0]])
    assert crossed_variance(checkers)[:3] == pytest.approx((0, 4 / 4, 1))
    assert crossed_variance(np.zeros((2, 3, 4))).variance.tolist() == [0, 0]


def test_resampled_means_are_those_of_full_enumeration():
    """Two seeds and two problems have nine resamples: each axis doubles the first, takes both, or doubles the second."""
    difference = np.array([[0.0, 1.0], [3.0, 7.0]])
    weights = [(np.array(w) / 2, share) for w, share in (((2, 0), 0.25), ((1, 1), 0.5), ((0, 2), 0.25))]
    exact = {float(w @ difference @ v): p * q for (w, p), (v, q) in itertools.product(weights, weights)}
    mean = sum(value * share for value, share in exact.items())
    spread = sum(share * (value - mean) ** 2 for value, share in exact.items())
    assert crossed_variance(difference).resampled == pytest.approx(spread)
    both = resampled_means(np.stack([difference, 10 * difference]), 20_000, 0)
    np.testing.assert_allclose(both[1], 10 * both[0])  # budgets share their draws
    values, counts = np.unique(both[0], return_counts=True)
    assert len(exact) == 9 and dict(zip(values, counts / 20_000, strict=True)) == pytest.approx(exact, abs=0.012)


def test_draws_have_students_spread():
    for difference in (rng.standard_normal((40, 50)), np.ones((40, 50)) * rng.standard_normal((40, 1))):
        found = crossed_variance(difference)
        draws = crossed_draws(difference, 20_000, 1)
        assert draws.mean() == pytest.approx(found.mean, abs=0.03 * math.sqrt(found.variance))
        assert draws.var() == pytest.approx(found.variance * found.df / (found.df - 2), rel=0.05)
    interval = crossed_bootstrap(difference)
    closed = t_interval(difference.mean(-1))
    assert interval == pytest.approx(closed, abs=0.1 * (closed.high - closed.low))
    assert crossed_bootstrap(np.ones((3, 4))) == (1, 1, 1, 0.95)


def test_intervals_and_tests_over_seeds_are_scipys():
    x = np.array([0.3, -0.1, 0.5, 0.9, 0.2])
    expected = stats.ttest_1samp(x, 0)
    assert t_interval(x, 0.9)[1:3] == pytest.approx(tuple(expected.confidence_interval(0.9)))
    assert student_p(x) == pytest.approx(expected.pvalue)
    assert student_p(np.ones(3)) == 0 and student_p(np.zeros(3)) == 1
    y = np.exp(x)
    ratio, inverse = ratio_interval(y, 2 * np.ones(5)), ratio_interval(2 * np.ones(5), y)
    assert ratio[:3] == pytest.approx(tuple(np.exp(t_interval(x)[:3]) / 2))
    assert ratio[:3] == pytest.approx((1 / inverse.estimate, 1 / inverse.high, 1 / inverse.low))


def test_sign_flips_are_all_enumerated_and_p_values_are_adjusted_for_their_number():
    x = np.array([0.3, -0.1, 0.5, 0.9, 0.2, 0.0])
    flips = np.mean([abs(x @ signs) >= abs(x.sum()) - 1e-9 for signs in itertools.product((1, -1), repeat=6)])
    found = sign_flip_p(np.stack([x, -x, np.arange(1, 7) / 7, 0 * x]))
    assert found == pytest.approx([flips, flips, 2 / 64, 1]) and sign_flip_p(np.full(8, 0.1)) == 2 / 256
    many = rng.standard_normal(40) + 0.3
    assert sign_flip_p(many) == pytest.approx(stats.ttest_1samp(many, 0).pvalue, rel=0.15)
    assert sign_flip_p(np.ones(40)) == 1 / 65_537
    # Holm's adjustment, by hand.
    table = {(0.01, 0.04, 0.03): (0.03, 0.06, 0.06), (0.5, 0.02, 0.9): (1, 0.06, 1), (0.02, 0.02): (0.04, 0.04)}
    found = primary_findings({"a": SOME[3], "b": SOME[1]}, untested=1)  # as if a third one had a p-value of 1
    assert found["a"].p_adjusted == pytest.approx(3 * found["a"].p) and found["b"].p_adjusted == pytest.approx(
        2 * found["b"].p
    )
    for p_values, adjusted in (table | {(0.2,): (0.2,)}).items():
        np.testing.assert_allclose(holm(np.array([p_values, p_values[::-1]])), [adjusted, adjusted[::-1]])


def test_too_little_or_broken_data_are_refused():
    bad_differences = [
        (SOME[0, :1], "two seeds or more, got 1"),
        (SOME[0, :, :1], "two problems or more, got 1"),
        (np.where(SOME[0] > 0, np.nan, SOME[0]), "NaN or infinite"),
    ]
    bad_budgets = [1, 2, 3], [1, 2, 2, 3], [0, 1, 2, 3], [1, 2, 3, math.nan], []
    x = np.ones(5)
    for function, refused in (
        (crossed_bootstrap, bad_differences),
        (crossed_p, bad_differences),
        (lambda d: primary_findings({"a": d}), bad_differences),
        (lambda d: crossover([1, 2], np.stack([d, d])), bad_differences),
        (lambda b: crossover(b, SOME), [(bad, "budgets") for bad in bad_budgets]),
        (t_interval, [(x[:1], "two seeds or more, got 1"), (np.array([1.0, math.nan]), "NaN")]),
        (lambda confidence: crossed_bootstrap(SOME[0], confidence), [(95.0, r"such as 0.95, got 95.0")]),
        (lambda y: ratio_interval(x, y), [(-x, "positive"), (x[:2], "5 and 2")]),
        (primary_findings, [(bad, "one to 3 primary hypotheses") for bad in ({}, dict.fromkeys("abcd", SOME[0]))]),
    ):
        for bad, message in refused:
            with pytest.raises(UserError, match=message):
                function(bad)


@pytest.mark.parametrize(
    ("curve", "course", "change"),
    [
        ((-1, -1, 1), "overtakes", 1.5),
        ((-1, 0, 3), "overtakes", 1),
        ((-1, 0, 0, 1, 0), "overtakes", 2),
        ((-1, 1, -3, 1, 0, 2), "overtakes", 2.75),
        ((0, -1, 3), "overtakes", 1.25),
        ((3, 1, -1, 0), "is overtaken", 1.5),
        ((-1, 1, -3), "is overtaken", 1.25),
        ((0, 1, 0, 2), "always ahead", math.nan),
        ((0, -1, 0), "always behind", math.nan),
        ((0, 0, 0), "equal", math.nan),
    ],
)
def test_the_last_sign_change_by_hand(curve, course, change):
    course_at, at = last_changes(np.arange(len(curve)) * 1.0, np.array([curve, -np.array(curve)], np.float64))
    swapped = {"overtakes": "is overtaken", "always ahead": "always behind"}
    swapped |= {new: old for old, new in swapped.items()} | {"equal": "equal"}
    assert [COURSES[i] for i in course_at] == [course, swapped[course]]
    np.testing.assert_allclose(at, change)


def test_a_crossover_has_an_interval_and_shares():
    budgets = [10, 20, 40, 80]
    found = crossover(budgets, SOME)
    means = SOME.mean((1, 2))
    by_hand = 20 * 2 ** (-means[1] / (means[2] - means[1]))
    assert found.course == "overtakes" and found.budget == pytest.approx(by_hand)
    assert 10 < found.low < by_hand < found.high < 80 and sum(found.shares.values()) == pytest.approx(1)
    assert found.shares["overtakes"] > 0.99
    mirrored = crossover(budgets, -SOME)
    assert mirrored[1:5] == found[1:5] and mirrored.shares["is overtaken"] == found.shares["overtakes"]
    for shift, course, budget in ((5.0, "always ahead", 0), (-5.0, "always behind", math.inf)):
        none = crossover(budgets, SOME + shift)
        assert none[:4] == (course, budget, budget, budget) and none.shares[course] == 1
        assert none.text("steps").endswith(f"; draws: {course} 100% (no crossover: 100%)")
    assert found.ahead == 1 and found.text("steps").startswith(
        f"overtakes at {by_hand:.1f} steps (95% interval: {found.low:.1f} to "
    )
    early = crossover(budgets, SOME + 0.97)  # may or may not be ahead from the smallest budget on, but is at the end
    assert early.low == 0 and early.text("steps").startswith(
        "ahead after the last sign change (95% interval in steps: below the range to "
    )
    late = crossover(budgets, -SOME - 0.97)
    assert (
        late.ahead == -1
        and late[2:4] == early[2:4]
        and late.text("steps").startswith("behind after the last sign change (95%")
    )
    unsure = crossover(budgets, SOME - 1)  # the largest budget may or may not be enough
    says = "which of the two is ahead after the last sign change cannot be told (95% interval in steps: below the range to beyond the"
    assert unsure.ahead == 0 and unsure.text("steps").startswith(says)
    assert unsure.high == math.inf and 0.2 < unsure.shares["always behind"] < 0.8
    # The chance that there is none is that of either arm always being ahead, not that of the course which most draws take.
    shares = dict(zip(COURSES, (0.25, 0.125, 0.4, 0.2, 0.025), strict=True))
    assert unsure._replace(shares=shares).none == pytest.approx(0.25 + 0.125 + 0.025)
    assert unsure._replace(shares=shares).text("steps").endswith(" (no crossover: 40%)")


def test_intervals_hold_the_truth_as_often_as_they_say():
    """The corrected interval does in every world; each of the others fails in one. Standard error of a share: 1.3%."""
    shares = {name: coverage(world, 300) for name, world in WORLDS.items()}
    for world, share in shares.items():
        assert 0.92 <= share["crossed, corrected"] <= 0.995, (world, share)
        assert share["crossed, corrected"] == pytest.approx(share["crossed, closed form"], abs=0.02)
    assert shares["seeds only"]["crossed, percentile"] < 0.91  # few seeds vary too little
    assert shares["neither (rest only)"]["crossed, percentile"] > 0.99  # the rest counts three times
    assert shares["problems only"]["t over seeds"] < 0.1  # other problems are another matter
    assert shares["problems only"]["nested bootstrap"] < 0.9 and shares["all three"]["nested bootstrap"] < 0.95
    assert 0.92 <= coverage(WORLDS["right or wrong"], 300, mean=0.1)["crossed, corrected"] <= 0.98  # the truth is not 0
    # Where there are fewer problems than seeds, it is their number that bounds the degrees of freedom. Standard error: 0.5%.
    for world, (seeds, problems) in itertools.product(("problems only", "all three"), ((8, 4), (30, 8), (30, 4))):
        assert closed_coverage(WORLDS[world], 2000, seeds, problems) > 0.935, (world, seeds, problems)


def test_intervals_of_three_seeds_hold_the_truth_as_often_as_they_say():
    """On these all secondary experiments rest. Standard error of a share: 1.1%; a nested bootstrap fails where seeds vary."""
    shares = {name: coverage(world, 400, seeds=3) for name, world in WORLDS.items()}
    for world, share in shares.items():
        assert 0.92 <= share["crossed, corrected"] <= 0.995, (world, share)
    assert shares["seeds only"]["nested bootstrap"] < 0.85 and shares["problems only"]["nested bootstrap"] < 0.92
    assert shares["seeds only"]["crossed, percentile"] < 0.85 and shares["problems only"]["t over seeds"] < 0.1
    for world in WORLDS:  # of half the error fewer are right
        half = halved(world)
        assert half < 0.92, (world, half)


def halved(world, replicates=1000):
    """Returns how many intervals of three seeds, in closed form but with half of their error, hold the truth of 0."""
    found = crossed_variance(WORLDS[world](np.random.default_rng(0), replicates, 3, 256, 0.0))
    return np.mean(np.abs(found.mean) <= stats.t.isf(0.025, found.df) * np.sqrt(found.variance) / 2)


def test_who_is_ahead_after_a_crossover_is_said_only_where_it_is_nearly_always_right():
    even = crossover_coverage(150, at=3.0)
    assert even["holds"] > 0.93 and even["told"] > 0.4 and even["wrong"] < 0.03
    # In a world as uncertain as the small study, a course read from the mean curve is the wrong one in a fourth of the studies.
    for at in (2.0, 5.0):
        hard = crossover_coverage(150, at, "small study", slope=0.01)
        assert hard["holds"] > 0.93 and hard["told"] > 0.03 and hard["wrong"] < 0.06, (at, hard)


def test_a_planted_effect_is_found_and_a_planted_null_is_not():
    for name in ("seeds only", "all three", "right or wrong", "problems only"):
        claimed = found_by_chance(WORLDS[name], 500, problems=64)
        assert claimed["both (primary)"] <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 500), (name, claimed)
    assert claimed["sign flip"] > 0.5  # where problems alone differ, seeds agree on what other problems would not show
    # With seeds alone the crossed test is Student's, whose power is known: the effect is claimed at 5% if both others are,
    # and at 5% / 3 in any case.
    effect, spread = 0.04, 0.03
    noncentral = stats.nct(7, effect / spread * math.sqrt(8))
    power = [noncentral.sf(stats.t.isf(level / 2, 7)) for level in (0.05 / 3, 0.05)]
    found = found_by_chance(normal(spread, 0, 1e-6), 1000, problems=4, effect=effect)
    assert power[0] - 0.03 < found["crossed"] < power[1] and found["both (primary)"] > power[0] - 0.15
    assert found_by_chance(WORLDS["right or wrong"], 300, effect=0.1)["both (primary)"] > 0.9
