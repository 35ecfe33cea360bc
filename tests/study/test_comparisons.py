"""What a study compares besides arms along budgets: ways of decoding, pace at equal Pass@1, and NELBO against Pass@1."""

import copy
import re
from xml.etree import ElementTree

import numpy as np
import pytest
from scipy import stats

from jaxblock.errors import UserError
from jaxblock.study import analysis, pace, relation, report
from tests.study.test_study import TREE, laid_out, planted

ARMS = ["blockwise", "classical"]


def tree():
    """Returns a study with one experiment of each of these kinds, and a second task."""
    made = copy.deepcopy(TREE)
    made["seeds"], made["scoring"]["nelbo_rows"] = 3, 4
    made["tasks"]["others"] = {"canvas": made["tasks"]["sums"]["canvas"]}
    made["decodings"] |= {"fast": {"decode": {"rule": "confidence_threshold"}}, "elsewhere": {"task": "others"}}
    one = {"arms": ARMS, "budgets": [20]}
    made["experiments"] = {
        "ways": {**one, "decodings": ["own", "fast"]},
        "forgetting": {**one, "decodings": ["own", "elsewhere"], "budgets": [5, 20]},
        "pace": {**one, "decodings": ["own", "fast", "whole"], "kind": "pace"},
        "bound": {"arms": ARMS, "decodings": ["own"], "kind": "relation"},
    }
    return made


def results_of(study, plan):
    """Returns planted results: NELBO falls with training, and the arm with the higher NELBO solves more."""
    made = planted(study, plan, 0.0)
    for cell in plan.cells:
        ahead = cell.arm == "blockwise"
        for point in cell.points:
            few = 8 * (1 + (point.steps > 5) + 2 * ahead)
            bits = np.arange(64) < (few - 4 * (point.decoding == "fast") - 40 * (point.decoding == "whole"))
            score = made[cell.name]["scores"][str(point)]
            score["correct"] = np.packbits(bits).tobytes().hex()
            score["nelbo_per_token"] = {"mean": 1 / point.steps + ahead}
            score["tokens_per_forward"] = {"own": 1.0, "fast": 2.0, "whole": 4.0}.get(point.decoding, 1.0) * (1 + ahead)
    return made


def test_agreement_is_kendalls_tau_and_counts_only_the_chosen_pairs():
    rng = np.random.default_rng(2)
    ours, theirs = (rng.integers(0, 5, 12).astype(float).tolist() for _ in range(2))  # with ties
    every = np.triu(np.ones((12, 12), bool), 1)
    assert relation.agreement(ours, theirs, every) == pytest.approx(stats.kendalltau(ours, theirs).statistic)
    chosen = every & (rng.uniform(size=every.shape) < 0.4)
    signs = [(np.sign(ours[i] - ours[j]), np.sign(theirs[i] - theirs[j])) for i, j in np.argwhere(chosen)]
    differ = [sum(sign[side] != 0 for sign in signs) for side in (0, 1)]
    assert relation.agreement(ours, theirs, chosen) == pytest.approx(
        sum(a * b for a, b in signs) / np.prod(differ) ** 0.5
    )
    assert np.isnan(relation.agreement(ours, [1.0] * 12, every))


def test_the_order_by_nelbo_is_compared_within_and_between_arms_and_a_seed_with_a_missing_score_is_left_out():
    study, plan = laid_out(tree())
    assert "bound" not in plan.steps and [str(point) for point in plan.cell("classical-s0").points if point.decoding == "own"] == [
        "5/own", "20/own",
    ]  # fmt: skip
    made = results_of(study, plan)
    found = analysis.analyse(study, plan, made)[-1]
    assert found.seeds == (0, 1, 2) and len(found.relation.scores) == 3 * 4
    assert [found.relation.pairs[kind] for kind in relation.PAIRS] == [3 * n for n in (6, 2, 4, 1)]
    agreements = [found.relation.agreement[kind].tolist() for kind in relation.PAIRS]
    # Within an arm both fall together; the arm that is behind by NELBO is always ahead by Pass@1.
    assert agreements == [[pytest.approx((2 - 4) / 6)] * 3, [1.0] * 3, [-1.0] * 3, [-1.0] * 3]
    del made["classical-s1"]["scores"]["5/own"]
    assert analysis.analyse(study, plan, made)[-1].seeds == (0, 2)


def test_the_fastest_pace_lies_on_the_line_between_the_ways_of_decoding():
    rates, paces = np.array([0.9, 0.5, 0.7, 0.3]), np.array([1.0, 3.0, 2.0, 4.0])
    for level, want in ((0.9, 1.0), (0.8, 1.5), (0.7, 2.0), (0.4, 3.5), (0.3, 4.0), (0.1, 4.0)):
        assert pace.fastest(rates, paces, level) == pytest.approx(want)
    # A way of decoding that is both faster and better is used, whatever lies between.
    assert pace.fastest(np.array([0.9, 0.5, 0.95]), np.array([1.0, 2.0, 3.0]), 0.9) == 3.0


def test_pace_is_compared_at_the_pass_at_1_of_the_worse_arm():
    study, plan = laid_out(tree())
    [ratio] = analysis.analyse(study, plan, results_of(study, plan))[2].paces
    # The control solves 16 of 64 by `own` and 12 by `fast`: at 16/64 - 0.01 it is 0.64 / 4 of the way from 1 to 2 tokens.
    assert ratio.says == "blockwise / classical" and ratio.level.tolist() == [pytest.approx(0.24)] * 3
    assert ratio.theirs.tolist() == [pytest.approx(1 + 0.64 / 4)] * 3
    # The arm solves 32, 28 and none at 2, 4 and 8 tokens.
    assert ratio.ours.tolist() == [pytest.approx(4 + 4 * (28 - 15.36) / 28)] * 3
    assert ratio.ratio.estimate == pytest.approx(ratio.ours[0] / ratio.theirs[0])


def test_every_way_of_decoding_is_compared_with_the_control_and_with_the_first_one_on_the_same_task():
    study, plan = laid_out(tree())
    ways, forgetting = analysis.analyse(study, plan, results_of(study, plan))[:2]
    between = ["blockwise - classical, own", "blockwise - classical, fast"]
    assert [one.says for one in ways.contrasts] == [*between, "fast - own, of blockwise", "fast - own, of classical"]
    assert [one.crossed[0].estimate for one in ways.contrasts] == [pytest.approx(x / 64) for x in (16, 16, -4, -4)]
    assert [one.says for one in forgetting.contrasts] == [between[0], "blockwise - classical, elsewhere"]


def test_the_report_has_a_table_and_a_picture_of_each_kind(tmp_path):
    study, plan = laid_out(tree())
    report.write_report(study, plan, results_of(study, plan), tmp_path)
    text, page = (tmp_path / "report.md").read_text(), (tmp_path / "report.html").read_text()
    assert page.count("<svg") == 4
    shown = [tmp_path / name for name in re.findall(r"!\[.*\]\((.*)\)", text)]
    assert sorted(shown) == sorted((tmp_path / report.PICTURES).iterdir()) and len(shown) == 4
    assert all(ElementTree.parse(picture).getroot().tag.endswith("}svg") for picture in shown)
    for row in (
        "| fast - own, of classical | 20 | -6.2 [",
        "| blockwise / classical | 24.0% | 5.81 | 1.16 | 5.00 [5.00, 5.00] |",
        "| blockwise | whole | 20 | 20 | 0.0% ± 0.0 | 1.0500 ± 0.0000 | 16.0 | 8.00 |",
        "| different arms | 12 | -1.00 [-1.00, -1.00] |",
    ):
        assert row in text, row


def test_arms_of_different_tasks_and_arms_without_scores_are_refused():
    made = tree()
    for arms, says in (
        (["start"], "has arm start, which no other experiment scores by own: leave it out"),
        (
            ["blockwise", "other"],
            r"scored on different tasks by own \(blockwise: sums, other: others\): give each task",
        ),
    ):
        made["arms"]["other"] = {"task": "others", "start": "start"}
        made["experiments"]["bound"]["arms"] = arms
        with pytest.raises(UserError, match=says):
            laid_out(made)
