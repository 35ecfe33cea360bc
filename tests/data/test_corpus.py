"""The built-in corpus: deterministic, well formed, solvable from its text, and disjoint between the splits."""

import os
import re
import subprocess
import sys

import pytest

from jaxblock.data.text import corpus

EVERY_LEVEL = pytest.mark.parametrize("level", corpus.LEVELS)


def _replay(chain):
    totals = [chain[0]]
    for operation, operand in chain[1:]:
        totals.append({"+": totals[-1] + operand, "-": totals[-1] - operand, "*": totals[-1] * operand}[operation])
    return totals


def _all_chains(level):
    """Every chain of a level, by brute force: the oracle of the count and of the unranking."""
    bound, found = corpus.LEVELS[level], []
    frontier = [(start,) for start in range(2, bound.max_total + 1)]
    for steps in range(1, bound.steps[1] + 1):
        moves = [(op, n) for op in bound.operations for n in range(2, bound.max_operand + 1)]
        # Nothing times a factor is no step of a story.
        frontier = [chain + (move,) for chain in frontier for move in moves if move[0] != "*" or _replay(chain)[-1] > 0]
        frontier = [chain for chain in frontier if 0 <= _replay(chain)[-1] <= bound.max_total]
        found += frontier if steps >= bound.steps[0] else []
    return found


@EVERY_LEVEL
def test_answers_are_worked_within_the_levels_bounds(level):
    bound = corpus.LEVELS[level]
    for record in corpus.generate("train", 100, level=level):
        assert set(record) == {"question", "answer"}
        chain = corpus.chain_of(record)
        totals = _replay(chain)
        assert bound.steps[0] <= len(chain) - 1 <= bound.steps[1]
        assert all(0 <= total <= bound.max_total for total in totals)
        assert all(op in bound.operations and 2 <= n <= bound.max_operand for op, n in chain[1:])
        assert record["answer"].split("\n")[-1] == f"#### {totals[-1]}"


@EVERY_LEVEL
def test_the_question_states_the_chains_numbers_in_order_and_nothing_is_left_unfilled(level):
    for record in corpus.generate("test", 100, level=level):
        start, *moves = corpus.chain_of(record)
        assert [int(number) for number in re.findall(r"\d+", record["question"])] == [start, *(n for _, n in moves)]
        assert record["question"].endswith("?") and not set("{}\n") & set(record["question"])


def test_every_level_needs_at_least_two_dependent_steps():
    assert corpus.DEFAULT_LEVEL in corpus.LEVELS
    assert all(2 <= level.steps[0] <= level.steps[1] for level in corpus.LEVELS.values())


@EVERY_LEVEL
def test_splits_are_disjoint_whatever_the_seeds(level):
    train, test = (
        corpus.generate("train", 400, level=level, seed=0),
        corpus.generate("test", 200, level=level, seed=7),
    )
    train_chains, test_chains = ({corpus.chain_of(record) for record in records} for records in (train, test))
    assert len(train_chains) == len(train) and len(test_chains) == len(test)
    assert not train_chains & test_chains
    assert not {record["question"] for record in train} & {record["question"] for record in test}


def test_the_split_does_not_depend_on_the_seed_or_on_how_many_are_asked_for():
    everything = [corpus.generate(split, n) for split, n in (("train", 1_000), ("test", 200))]
    for split, records in zip(("train", "test"), everything, strict=True):
        assert {corpus.split_of(corpus.chain_of(record)) for record in records} == {split}


def test_fewer_problems_are_a_prefix_of_more_and_another_seed_gives_others():
    assert corpus.generate("train", 50) == corpus.generate("train", 200)[:50]
    assert corpus.generate("train", 50, seed=1) != corpus.generate("train", 50, seed=2)
    assert corpus.generate("test", 0) == []


def test_the_same_in_another_process_with_another_hash_seed():
    code = "from jaxblock.data.text import corpus; print(corpus.generate('test', 20, level='hard', seed=3))"
    outputs = [
        subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    ]
    assert outputs[0] == outputs[1] == f"{corpus.generate('test', 20, level='hard', seed=3)}\n"


def test_asking_for_too_many_says_how_many_exist_and_exactly_that_many_can_be_had(monkeypatch):
    monkeypatch.setitem(corpus.LEVELS, "tiny", corpus.Level(steps=(2, 3), max_operand=4, max_total=9, operations="+-*"))
    chains = _all_chains("tiny")
    for split in ("train", "test"):
        exist = sum(corpus.split_of(chain) == split for chain in chains)
        with pytest.raises(ValueError, match=f"only {exist:,} distinct ones exist"):
            corpus.generate(split, exist + 1, level="tiny")
        records = corpus.generate(split, exist, level="tiny")
        assert {corpus.chain_of(record) for record in records} == {
            chain for chain in chains if corpus.split_of(chain) == split
        }
    with pytest.raises(ValueError, match="distinct ones exist"):
        corpus.generate("train", 10**15, level="hard")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(("valid", 1), "train"), (("train", -1), "-1"), (("train", 1, "trivial"), "easy, medium, hard, harder")],
)
def test_bad_arguments_are_named(arguments, message):
    split, n, *level = arguments
    with pytest.raises((ValueError, TypeError), match=message):  # a TypeError where the annotation is checked first
        corpus.generate(split, n, **({"level": level[0]} if level else {}))


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ("2 + 2 = 5\n#### 5", "wrong arithmetic"),
        ("2 + 2 = 4\n5 + 2 = 7\n#### 7", "does not start"),
        ("2 + 2 = 4\n#### 5", "last line"),
        ("two plus two\n#### 4", "not a step"),
        ("#### 4", "last line"),
    ],
)
def test_chain_of_refuses_answers_that_do_not_hold_together(answer, message):
    with pytest.raises(ValueError, match=message):
        corpus.chain_of({"question": "", "answer": answer})


def test_chain_of_reads_the_operands_in_order():
    assert corpus.chain_of({"answer": "11 - 6 = 5\n5 + 8 = 13\n#### 13"}) == (11, ("-", 6), ("+", 8))
