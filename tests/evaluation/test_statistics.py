"""Tests statistics against values that were worked out by hand."""

import math

import numpy as np
import pytest

from jaxblock.evaluation.statistics import mcnemar_p, mean_se, ratio_se, wilson


def test_wilson_is_the_formula():
    z, p, n = 1.959963984540054, 0.25, 8
    centre, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    low, high = (centre - half) / (1 + z * z / n), (centre + half) / (1 + z * z / n)
    got = wilson(2, 8)
    assert (got.low, got.high) == pytest.approx((low, high), rel=1e-9)
    assert got.rate == 0.25 and str(got).startswith("25.0% (2/8, 95% interval")
    z2 = z * z
    assert wilson(0, 10).low == 0 and wilson(0, 10).high == pytest.approx(z2 / (10 + z2))
    assert wilson(10, 10).high == 1
    assert wilson(0, 0)[2:] == (0, 1) and math.isnan(wilson(0, 0).rate)
    with pytest.raises(ValueError, match="3 correct of 2"):
        wilson(3, 2)


def test_means_and_ratios_by_hand():
    # deviations -1, 0, 1: sample variance 1, standard error 1 / sqrt(3)
    assert mean_se([1, 2, 3]) == pytest.approx((2, 1 / math.sqrt(3), 3))
    one = mean_se([5.0])
    assert one.mean == 5 and math.isnan(one.se) and str(one) == "5"
    assert math.isnan(mean_se([]).mean)
    # y = (2, 6), w = (1, 2): r = 8/3, residuals -2/3 and 2/3, se = sqrt(2 * 8/9) / 3 = 4/9
    assert ratio_se([2, 6], [1, 2]) == pytest.approx((8 / 3, 4 / 9, 2))
    # Equal weights give the mean; totals in proportion to the weights are certain.
    y = np.array([1.0, 4.0, 2.5])
    assert ratio_se(y, np.full(3, 2.0))[:2] == pytest.approx(tuple(v / 2 for v in mean_se(y)[:2]))
    assert ratio_se([3, 6, 9], [1, 2, 3]) == pytest.approx((3, 0, 3))
    assert math.isnan(ratio_se([0.0], [0.0]).mean)
    with pytest.raises(ValueError, match="one length"):
        ratio_se([1.0], [1.0, 2.0])


def test_exact_mcnemar():
    table = {(0, 0): 1.0, (0, 5): 2 / 32, (1, 5): 2 * (1 + 6) / 64, (3, 3): 1.0, (5, 1): 14 / 64}
    assert {cell: mcnemar_p(*cell) for cell in table} == pytest.approx(table)
