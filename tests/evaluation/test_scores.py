"""Tests evaluations: batches change no result, costs are counted, the NELBO is the likelihood module's, and pairs are compared."""

import dataclasses
import json
import math

import chex
import jax
import numpy as np
import pytest
from scipy import stats

from jaxblock import inference
from jaxblock.data.store.prepared_folder import open_prepared
from jaxblock.diffusion.decoding import decoder
from jaxblock.errors import UserError
from jaxblock.evaluation import runner
from jaxblock.evaluation.comparison import compare_evaluations
from jaxblock.evaluation.graders import GRADERS, find_grader
from jaxblock.evaluation.problems import format_problems
from jaxblock.evaluation.results import summarise_evaluation
from jaxblock.evaluation.runner import Evaluator
from jaxblock.evaluation.statistics import mcnemar_p, mean_se, ratio_se, wilson
from jaxblock.inference import DeviceDecoder
from jaxblock.parallel import rules
from jaxblock.parallel.mesh import make_mesh
from jaxblock.parallel.rows import split_rows, whole_results


@pytest.fixture(scope="module")
def records(tiny_config):
    source = open_prepared(tiny_config.parent / "prepared").records("test")
    return [source[index] for index in range(6)]


@pytest.fixture(scope="module")
def evaluator(model):
    decode = dataclasses.replace(model.decode_defaults, temperature=0.7, cache="dual")
    return Evaluator(model.net, model.canvas, model.encoder, decode, find_grader("gsm8k_strict"), nelbo_samples=15)


@pytest.fixture(scope="module")
def solved(evaluator, model, records):
    told = []
    found = evaluator.solve(model.params, records, told.append)
    assert told == [4, 6]
    return found


def test_a_problem_is_decoded_the_same_in_any_batch_and_graded_and_its_cost_counted(evaluator, model, records, solved):
    assert evaluator.solve(model.params, records[::-1]).rows[::-1] == solved.rows
    # By the public interface, all six at once.
    prompts = [record.prompt_ids.tolist() for record in records]
    responses = np.asarray(model.decode(prompts, temperature=0.7, cache="dual"))
    for row, record, ids in zip(solved.rows, records, responses, strict=True):
        assert row["response"] == model.tokenizer.decode(model.text_ids(ids))
        assert (row["index"], row["prompt"], row["reference"]) == (record.index, record.prompt, record.response)
        assert row["expected"] == record.response.split("#### ")[1]
        assert row["correct"] is GRADERS["gsm8k_strict"](row["response"], record.response).correct
        # Without a stop token the whole canvas is text; with one it counts, what follows does not.
        stops = np.flatnonzero(np.isin(ids, model.stop_ids))
        assert (row["stopped"], row["tokens"]) == ((True, stops[0] + 1) if stops.size else (False, 16))
    costs = solved.costs
    assert costs.row_blocks == sum(-(-row["tokens"] // 4) for row in solved.rows) <= costs.row_blocks_computed
    assert 0 < costs.token_forwards < costs.token_forwards_computed and costs.row_blocks_computed % 4 == 0
    empty = evaluator.solve(model.params, [])
    assert empty.pass_at_1.n == 0 and math.isnan(empty.nfe) and math.isnan(empty.tokens_per_forward)


def test_bound_agrees_with_the_interface(evaluator, model, records, monkeypatch):
    """Six records in batches of four: the two rows that fill up the second batch add nothing."""
    padded, pad = [], runner.pad_records
    monkeypatch.setattr(runner, "pad_records", lambda rows, *rest: padded.append(len(rows)) or pad(rows, *rest))
    bound = evaluator.estimate_nelbo(model.params, records)
    assert bound.exact and bound.mask_se == 0 and padded == [4, 4]
    responses = [record.response_ids.tolist() for record in records]
    values, _ = model.nelbo([record.prompt_ids.tolist() for record in records], responses, samples=15)
    assert bound.per_sequence.mean == pytest.approx(values.mean(), rel=1e-5)
    assert bound.per_text_token.mean == pytest.approx(values.sum() / sum(map(len, responses)), rel=1e-5)
    blocks = [-(-len(response) // 4) for response in responses]
    assert [count for _, count in bound.by_block] == [sum(k < b for b in blocks) for k in range(4)]
    total = sum(mean * count for mean, count in bound.by_block if count)
    assert total == pytest.approx(values.sum(), rel=1e-5)
    # Every set of every block, and every set's -log p by the NELBO's weights 1 / (l C(4, l)).
    assert [count for _, count in bound.by_count] == [sum(blocks) * m * math.comb(4, m) for m in (1, 2, 3, 4)]
    parts = (mean * count / (m * math.comb(4, m)) for m, (mean, count) in enumerate(bound.by_count, 1))
    assert sum(parts) == pytest.approx(values.sum(), rel=1e-5)
    # A single row has no standard error, and the summary is JSON nevertheless.
    found = summarise_evaluation(None, bound._replace(per_sequence=mean_se([3.0])), {"checkpoint": "x"})
    assert json.loads(json.dumps(found, allow_nan=False)) == found and found["nelbo_per_sequence"]["se"] is None


def test_devices_share_the_rows_and_a_second_evaluation_compiles_nothing(
    evaluator, model, records, solved, monkeypatch
):
    mesh = make_mesh(4, devices=jax.devices()[:4])
    params = jax.device_put(model.params, rules.replicated(mesh))
    monkeypatch.setattr(decoder, "decode_block", chex.assert_max_traces(decoder.decode_block, n=2))

    def flops(params):
        layout = model.layout(model.decode_defaults)
        device = DeviceDecoder(model.net, layout, evaluator.decode, params, prompt_len=24, rows=6)
        assert device.size == 4
        arguments = device._arguments(device.shape(device.row([5, 6], 0)), ())
        ids = arguments[-9]
        assert params is model.params or {shard.data.shape[0] for shard in ids.addressable_shards} == {1}
        traced = inference._compiled(whole_results(params)).trace(*arguments)
        # Gathering an argument would not depend on the decoder's loop, and devices that run the two in another order wait for ever.
        program = traced.jaxpr.jaxpr
        assert not {id(of) for of in program.outvars} & {id(of) for of in program.invars}
        return traced.lower().compile().cost_analysis()["flops"]

    whole = flops(model.params)
    with jax.set_mesh(mesh):
        assert evaluator.solve(params, records).rows == solved.rows
        # What each device holds of the prompts, and computes of a step, is its part of the rows.
        assert flops(params) < 0.5 * whole
        monkeypatch.setattr(jax, "jit", lambda *args, **how: pytest.fail("compiled again"))
        assert len(evaluator.solve(params, records).rows) == len(records)
        three = split_rows(params, [np.zeros((3, 2), np.int32)])  # does not divide: whole on every device
        assert three[0].sharding.is_fully_replicated


def test_intervals_are_scipys_and_p_values_means_and_ratios_are_right_by_hand():
    for correct, n in ((2, 8), (0, 10), (10, 10), (517, 1319)):
        low, high = stats.binomtest(correct, n).proportion_ci(method="wilson")
        assert wilson(correct, n)[2:] == (pytest.approx(low, abs=1e-9), pytest.approx(high)), (correct, n)
    assert wilson(2, 8).rate == 0.25 and wilson(0, 0)[2:] == (0, 1) and math.isnan(wilson(0, 0).rate)
    exact = {(0, 0): 1.0, (0, 5): 2 / 32, (1, 5): 2 * (1 + 6) / 64, (3, 3): 1.0, (5, 1): 14 / 64}
    assert {cell: mcnemar_p(*cell) for cell in exact} == pytest.approx(exact)
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
    for function, wrong, says in ((wilson, (3, 2), "3 correct of 2"), (ratio_se, ([1.0], [1.0, 2.0]), "one length")):
        with pytest.raises(ValueError, match=says):
            function(*wrong)


def rows(verdicts, **changes):
    base = {"grader": "gsm8k_strict", "reference": "7"} | changes
    return [{"index": i, "correct": v, "prompt": f"question {i}"} | base for i, v in enumerate(verdicts)]


def test_a_comparison_counts_the_four_cells_and_names_what_does_not_fit_with_its_line(tmp_path):
    a, b = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    # U+2028 ends a line for str.splitlines, not for JSON lines; the order of the lines does not matter.
    a.write_text(
        format_problems([r | {"response": "\u2028"} for r in rows([True, True, False, False, False])]), "utf-8"
    )
    b.write_text(format_problems(rows([True, False, True, True, False])[::-1]), "utf-8-sig")  # as some editors save it
    got = compare_evaluations(a, b)
    assert (got.n, got.both, got.only_a, got.only_b, got.neither) == (5, 1, 1, 2, 1)
    assert got.p_value == 1 and got.grader == "gsm8k_strict" and "A 40.0%, B 60.0% of 5" in str(got)
    for other, message in [
        (format_problems(rows([True] * 4)), r"a\.jsonl:5: problem 4 is not in .*b\.jsonl"),
        (format_problems(rows([True] * 6)), r"b\.jsonl:6: problem 5 is not in .*a\.jsonl"),
        (format_problems(rows([True] * 5, grader="exact")), r"graded by gsm8k_strict .* but by exact .*b\.jsonl:1"),
        (format_problems(rows([True] * 5, prompt="other")), r"problem 0: .* ask different questions"),
        (format_problems(rows([True] * 5, reference="8")), r"problem 0: .* have different right answers"),
        ("", "holds no problems"),
        ("{\n", r"b\.jsonl:1: not JSON"),
        ('{"index": ' + "1" * 5000 + "}\n", r"b\.jsonl:1: not JSON .*Exceeds the limit"),
        ("\n" + "[" * 100_000, r"b\.jsonl:2: not JSON .*nested too deeply"),
        ('{"correct": true, "correct": false}\n', r"b\.jsonl:1: not JSON .*'correct' is given twice"),
        ("[1]\n", r"b\.jsonl:1: expected a JSON object"),
        ('{"index": 0, "grader": "exact", "correct": 1}\n', r"b\.jsonl:1: field 'correct' must be a bool, got 1"),
        ('{"index": true, "grader": "exact", "correct": true}\n', r"field 'index' must be a int"),
        ('{"index": 0, "grader": "exact", "correct": true}\n' * 2, r"b\.jsonl:2: problem 0 occurs twice"),
    ]:
        b.write_text(other, "utf-8")
        with pytest.raises(UserError, match=message):
            compare_evaluations(a, b)
    with pytest.raises(UserError, match="absent"):
        compare_evaluations(a, tmp_path / "absent.jsonl")
