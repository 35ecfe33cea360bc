"""Tests the runner: batches change no result, costs are counted, and the NELBO is the likelihood module's."""

import dataclasses
import json
import math

import chex
import jax
import numpy as np
import pytest

from jaxblock import inference
from jaxblock.data.store.prepared_folder import open_prepared
from jaxblock.diffusion.decoding import decoder
from jaxblock.evaluation.graders import find_grader
from jaxblock.evaluation.results import summarise_evaluation
from jaxblock.evaluation.runner import Evaluator
from jaxblock.evaluation.statistics import mean_se
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
    assert model.encoder is not None
    decode = dataclasses.replace(model.decode_defaults, temperature=0.7)
    return Evaluator(model.net, model.canvas, model.encoder, decode, find_grader("gsm8k_strict"), nelbo_samples=15)


@pytest.fixture(scope="module")
def solved(evaluator, model, records):
    told: list[int] = []
    found = evaluator.solve(model.params, records, told.append)
    assert told == [4, 6]
    return found


@pytest.fixture(scope="module")
def bound(evaluator, model, records):
    return evaluator.estimate_nelbo(model.params, records)


def test_a_problem_is_decoded_the_same_in_any_batch(evaluator, model, records, solved):
    assert evaluator.solve(model.params, records[::-1]).rows[::-1] == solved.rows
    # And by the public interface, all six at once.
    ids = model.decode([record.prompt_ids.tolist() for record in records], temperature=0.7)
    assert model.tokenizer is not None
    texts = [model.tokenizer.decode(model.text_ids(row)) for row in np.asarray(ids)]
    assert [row["response"] for row in solved.rows] == texts


def test_costs_and_verdicts(evaluator, model, records, solved):
    assert solved.pass_at_1.correct == sum(row["correct"] for row in solved.rows) and solved.pass_at_1.n == 6
    assert solved.nfe == pytest.approx(np.mean([row["nfe"] for row in solved.rows]))
    total = sum(row["tokens"] for row in solved.rows)
    assert solved.tokens_per_forward == pytest.approx(total / sum(row["nfe"] for row in solved.rows))
    for row, record in zip(solved.rows, records, strict=True):
        assert (row["index"], row["prompt"], row["reference"]) == (record.index, record.prompt, record.response)
        assert row["expected"] == record.response.split("#### ")[1]
        # Without a stop token the whole canvas is text; with one it counts, what follows does not.
        assert row["stopped"] or row["tokens"] == 16
    costs = solved.costs
    assert costs.row_blocks == sum(-(-row["tokens"] // 4) for row in solved.rows) <= costs.row_blocks_computed
    assert 0 < costs.token_forwards < costs.token_forwards_computed and costs.row_blocks_computed % 4 == 0
    empty = evaluator.solve(model.params, [])
    assert empty.pass_at_1.n == 0 and math.isnan(empty.nfe) and math.isnan(empty.tokens_per_forward)


def test_perfect_and_wrong_answers_are_told_apart(evaluator, records):
    record, stops = records[1], (evaluator.encoder.special.eot, evaluator.encoder.special.eos)
    right = np.array([*record.response_ids.tolist(), stops[1], stops[1]])
    graded = evaluator._graded(record, right, 7, stops)
    assert graded["correct"] and graded["stopped"] and graded["nfe"] == 7
    assert (graded["tokens"], graded["response"]) == (len(record.response_ids), record.response)
    assert not evaluator._graded(record, records[2].response_ids, 7, stops)["correct"]


def test_bound_agrees_with_the_interface(model, records, bound):
    """Six records in batches of four: the two rows that fill up the second batch add nothing."""
    assert bound.exact and bound.mask_se == 0
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


def test_summary_is_json(solved, bound):
    one_row = bound._replace(per_sequence=mean_se([3.0]))
    found = summarise_evaluation(solved, one_row, {"checkpoint": "x"})
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found["nelbo_per_sequence"]["se"] is None  # one row has no standard error
    assert found["pass_at_1"]["n"] == 6 and found["checkpoint"] == "x"
    assert summarise_evaluation(None, None, {"a": 1}) == {"a": 1}


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
