"""Tests statistics by hand, paired comparisons of per-problem files, and files that do not match or cannot be read."""

import math

import numpy as np
import pytest

from jaxblock.errors import UserError
from jaxblock.evaluation.comparison import compare_evaluations
from jaxblock.evaluation.problems import format_problems, read_problems
from jaxblock.evaluation.statistics import mcnemar_p, mean_se, ratio_se, wilson


def test_wilson_is_the_formula():
    z, p, n = 1.959963984540054, 0.25, 8
    centre, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    got = wilson(2, 8)
    assert (got.low, got.high) == pytest.approx(
        [(centre + sign * half) / (1 + z * z / n) for sign in (-1, 1)], rel=1e-9
    )
    assert got.rate == 0.25 and str(got).startswith("25.0% (2/8, 95% interval")
    assert wilson(0, 10)[2:] == (0, pytest.approx(z * z / (10 + z * z))) and wilson(10, 10).high == 1
    assert wilson(0, 0)[2:] == (0, 1) and math.isnan(wilson(0, 0).rate)
    with pytest.raises(ValueError, match="3 correct of 2"):
        wilson(3, 2)


def test_means_and_ratios_by_hand():
    # deviations -1, 0, 1: sample variance 1, standard error 1 / sqrt(3)
    assert mean_se([1, 2, 3]) == pytest.approx((2, 1 / math.sqrt(3), 3))
    one = mean_se([5.0])
    assert one.mean == 5 and math.isnan(one.se) and str(one) == "5" and math.isnan(mean_se([]).mean)
    # y = (2, 6), w = (1, 2): r = 8/3, residuals -2/3 and 2/3, se = sqrt(2 * 8/9) / 3 = 4/9
    assert ratio_se([2, 6], [1, 2]) == pytest.approx((8 / 3, 4 / 9, 2))
    # Equal weights give the mean; totals in proportion to the weights are certain.
    y = np.array([1.0, 4.0, 2.5])
    assert ratio_se(y, np.full(3, 2.0))[:2] == pytest.approx(tuple(v / 2 for v in mean_se(y)[:2]))
    assert ratio_se([3, 6, 9], [1, 2, 3]) == pytest.approx((3, 0, 3)) and math.isnan(ratio_se([0.0], [0.0]).mean)
    with pytest.raises(ValueError, match="one length"):
        ratio_se([1.0], [1.0, 2.0])


def test_exact_mcnemar():
    table = {(0, 0): 1.0, (0, 5): 2 / 32, (1, 5): 2 * (1 + 6) / 64, (3, 3): 1.0, (5, 1): 14 / 64}
    assert {cell: mcnemar_p(*cell) for cell in table} == pytest.approx(table)


def rows(verdicts, **changes):
    base = {"grader": "gsm8k_strict"} | changes
    return [{"index": i, "correct": v, "prompt": f"question {i}"} | base for i, v in enumerate(verdicts)]


def write(path, content):
    path.write_text(format_problems(content), encoding="utf-8")
    return path


def test_compare_counts_the_four_cells_in_any_order_of_lines(tmp_path):
    # U+2028 ends a line for str.splitlines, not for JSON lines
    a = write(tmp_path / "a.jsonl", [r | {"response": "\u2028"} for r in rows([True, True, False, False, False])])
    b = write(tmp_path / "b.jsonl", rows([True, False, True, True, False])[::-1])
    got = compare_evaluations(a, b)
    assert (got.n, got.both, got.only_a, got.only_b, got.neither) == (5, 1, 1, 2, 1)
    assert got.p_value == 1 and got.grader == "gsm8k_strict" and "A 40.0%, B 60.0% of 5" in str(got)


def test_compare_names_the_first_mismatch(tmp_path):
    a = write(tmp_path / "a.jsonl", rows([True, False, True]))
    for other, message in [
        (rows([True] * 2), r"a\.jsonl:3: problem 2 is not in .*b\.jsonl"),
        (rows([True] * 4), r"b\.jsonl:4: problem 3 is not in .*a\.jsonl"),
        (rows([True] * 3, grader="exact"), r"problem 0: graded by gsm8k_strict .* but by exact .*b\.jsonl:1"),
        (rows([True] * 3, prompt="other"), r"problem 0: .* ask different questions"),
    ]:
        with pytest.raises(UserError, match=message):
            compare_evaluations(a, write(tmp_path / "b.jsonl", other))


def test_a_bad_file_is_named_with_its_line(tmp_path):
    path = tmp_path / "p.jsonl"
    for text, message in [
        ("", "holds no problems"),
        ("{\n", r"p\.jsonl:1: not JSON"),
        ("[1]\n", r"p\.jsonl:1: expected a JSON object"),
        ('{"index": 0, "grader": "exact", "correct": 1}\n', r"p\.jsonl:1: field 'correct' must be a bool, got 1"),
        ('{"index": true, "grader": "exact", "correct": true}\n', r"field 'index' must be a int"),
        ('{"index": 0, "grader": "exact", "correct": true}\n' * 2, r"p\.jsonl:2: problem 0 occurs twice"),
    ]:
        path.write_text(text, encoding="utf-8")
        with pytest.raises(UserError, match=message):
            read_problems(path)
    with pytest.raises(UserError, match="absent"):
        read_problems(tmp_path / "absent.jsonl")
