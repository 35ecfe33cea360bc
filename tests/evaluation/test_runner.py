"""Tests the runner: batches change no result, costs are counted, and the NELBO is the likelihood module's."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import jax
import numpy as np
import pytest

import jaxblock
from jaxblock import model as api
from jaxblock.data.store.prepared_folder import open_prepared
from jaxblock.data.store.records import Record
from jaxblock.evaluation import runner
from jaxblock.evaluation.results import summarise_evaluation
from jaxblock.evaluation.runner import Evaluator
from jaxblock.parallel import rules
from jaxblock.parallel.mesh import make_mesh
from jaxblock.parallel.rows import split_rows


@pytest.fixture(scope="module")
def model(tiny_run: Path) -> api.Model:
    return jaxblock.load(tiny_run)


@pytest.fixture(scope="module")
def records(tiny_config: Path) -> list[Record]:
    source = open_prepared(tiny_config.parent / "prepared").records("test")
    return [source[index] for index in range(6)]


@pytest.fixture(scope="module")
def evaluator(model: api.Model) -> Evaluator:
    assert model.encoder is not None
    decode = dataclasses.replace(model.decode_defaults, temperature=0.7)
    return Evaluator(model.net, model.canvas, model.encoder, decode, "gsm8k_strict", nelbo_samples=15)


def test_a_problem_is_decoded_the_same_in_any_batch(
    evaluator: Evaluator, model: api.Model, records: list[Record]
) -> None:
    told: list[int] = []
    by_four = evaluator.solve(model.params, records, told.append)
    assert told == [4, 6]
    by_one = dataclasses.replace(evaluator, decode=dataclasses.replace(evaluator.decode, batch_size=1))
    assert by_one.solve(model.params, records).rows == by_four.rows
    backwards = evaluator.solve(model.params, records[::-1])
    assert backwards.rows[::-1] == by_four.rows
    # And by the public interface.
    ids = model.decode([record.prompt_ids.tolist() for record in records], temperature=0.7)
    assert model.tokenizer is not None
    texts = [model.tokenizer.decode(model.text_ids(row)) for row in np.asarray(ids)]
    assert [row["response"] for row in by_four.rows] == texts


def test_costs_and_verdicts(evaluator: Evaluator, model: api.Model, records: list[Record]) -> None:
    solved = evaluator.solve(model.params, records)
    assert solved.pass_at_1.correct == sum(row["correct"] for row in solved.rows) and solved.pass_at_1.n == 6
    assert solved.nfe == pytest.approx(np.mean([row["nfe"] for row in solved.rows]))
    assert solved.tokens == sum(row["tokens"] for row in solved.rows)
    assert solved.tokens_per_forward == pytest.approx(solved.tokens / sum(row["nfe"] for row in solved.rows))
    assert solved.seconds > 0
    for row, record in zip(solved.rows, records, strict=True):
        assert (row["index"], row["prompt"], row["reference"]) == (record.index, record.prompt, record.response)
        assert row["expected"] == record.response.split("#### ")[1]
        # Without a stop token the whole canvas is text; with one it counts, what follows does not.
        assert row["stopped"] or row["tokens"] == 16
    empty = evaluator.solve(model.params, [])
    assert empty.pass_at_1.n == 0 and math.isnan(empty.nfe) and math.isnan(empty.tokens_per_forward)


def test_perfect_and_wrong_answers_are_told_apart(evaluator: Evaluator, records: list[Record]) -> None:
    record = records[1]
    eot, eos = evaluator.encoder.special.eot, evaluator.encoder.special.eos
    right = np.array([*record.response_ids.tolist(), eos, eos])
    graded = evaluator._graded(record, right, 7, (eot, eos))
    assert graded["correct"] and graded["stopped"] and graded["nfe"] == 7
    assert graded["tokens"] == len(record.response_ids)
    assert graded["response"] == record.response
    wrong = np.array([*records[2].response_ids.tolist()])
    assert not evaluator._graded(record, wrong, 7, (eot, eos))["correct"]


def test_bound_agrees_with_the_interface(
    evaluator: Evaluator, model: api.Model, records: list[Record], monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    padded = runner.pad_records
    monkeypatch.setattr(runner, "pad_records", lambda rows, canvas: sizes.append(len(rows)) or padded(rows, canvas))
    bound = evaluator.estimate_nelbo(model.params, records)
    assert sizes == [4, 4] and evaluator.decode.batch_size == 4  # two batches, since there are six records
    assert bound.exact and bound.mask_se == 0
    values, _ = model.nelbo(
        [record.prompt_ids.tolist() for record in records],
        [record.response_ids.tolist() for record in records],
        samples=15,
    )
    assert bound.per_sequence.mean == pytest.approx(values.mean(), rel=1e-5)
    text = sum(len(record.response_ids) for record in records)
    assert bound.per_text_token.mean == pytest.approx(values.sum() / text, rel=1e-5)
    blocks = [-(-len(record.response_ids) // 4) for record in records]
    assert [count for _, count in bound.by_block] == [sum(k < b for b in blocks) for k in range(4)]
    total = sum(mean * count for mean, count in bound.by_block if count)
    assert total == pytest.approx(values.sum(), rel=1e-5)
    # Filler rows of a short batch add nothing: three rows out of six and six rows at once agree.
    parts = [evaluator.estimate_nelbo(model.params, records[:3]), evaluator.estimate_nelbo(model.params, records[3:])]
    sums = [sum(mean * count for mean, count in part.by_count) for part in parts]
    assert sum(sums) == pytest.approx(sum(mean * count for mean, count in bound.by_count), rel=1e-5)


def test_summary_is_json(evaluator: Evaluator, model: api.Model, records: list[Record]) -> None:
    found = summarise_evaluation(
        evaluator.solve(model.params, records[:1]),
        evaluator.estimate_nelbo(model.params, records[:1]),
        {"checkpoint": "x"},
    )
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found["nelbo_per_sequence"]["se"] is None  # one row has no standard error
    assert found["pass_at_1"]["n"] == 1 and found["checkpoint"] == "x"
    assert summarise_evaluation(None, None, {"a": 1}) == {"a": 1}


def test_devices_share_the_rows_and_a_second_evaluation_compiles_nothing(
    evaluator: Evaluator, model: api.Model, records: list[Record], monkeypatch: pytest.MonkeyPatch
) -> None:
    mesh = make_mesh(4, devices=jax.devices()[:4])
    params = jax.device_put(model.params, rules.replicated(mesh))
    split = dataclasses.replace(evaluator, decode=dataclasses.replace(evaluator.decode, batch_size=4))
    with jax.set_mesh(mesh):
        assert split.solve(params, records).rows == evaluator.solve(model.params, records).rows
        (decode,) = split._compiled.values()
        arrays = split._prompts(records[:4], 4)
        placed = split_rows(params, arrays)
        # What each device holds of the prompts, and computes of a step, is its part of the rows.
        assert {shard.data.shape[0] for shard in placed[0].addressable_shards} == {1}
        whole = next(iter(evaluator._compiled.values()))
        assert decode.cost_analysis()["flops"] < 0.5 * whole.cost_analysis()["flops"]
        monkeypatch.setattr(jax, "jit", lambda *args, **how: pytest.fail("compiled again"))
        assert len(split.solve(params, records).rows) == len(records)
        three = split_rows(params, split._prompts(records[:3], 3))  # does not divide: whole on every device
        assert three[0].sharding.is_fully_replicated
