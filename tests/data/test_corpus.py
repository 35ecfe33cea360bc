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
def test_answers_are_worked_within_the_levels_bounds_and_splits_are_disjoint_whatever_the_seeds(level):
    bound, chains, questions = corpus.LEVELS[level], {}, {}
    assert 2 <= bound.steps[0] <= bound.steps[1]
    for split, n, seed in (("train", 400, 0), ("test", 200, 7)):
        records = corpus.generate(split, n, level=level, seed=seed)
        chains[split] = [corpus.chain_of(record) for record in records]
        questions[split] = {record["question"] for record in records}
        assert len(set(chains[split])) == n and {corpus.split_of(chain) for chain in chains[split]} == {split}
        for record, chain in list(zip(records, chains[split], strict=True))[:100]:
            totals, (start, *moves) = _replay(chain), chain
            assert bound.steps[0] <= len(moves) <= bound.steps[1]
            assert all(0 <= total <= bound.max_total for total in totals)
            assert all(op in bound.operations and 2 <= n <= bound.max_operand for op, n in moves)
            assert set(record) == {"question", "answer"}
            assert record["answer"].split("\n")[-1] == f"#### {totals[-1]}"
            assert [int(number) for number in re.findall(r"\d+", record["question"])] == [start, *(n for _, n in moves)]
            assert record["question"].endswith("?") and not set("{}\n") & set(record["question"])
    assert not set(chains["train"]) & set(chains["test"]) and not questions["train"] & questions["test"]


def test_fewer_problems_are_a_prefix_of_more_and_another_seed_gives_others():
    assert corpus.generate("train", 50) == corpus.generate("train", 200)[:50]
    assert corpus.generate("train", 50, seed=1) != corpus.generate("train", 50, seed=2)
    assert corpus.generate("test", 0) == []


def test_the_same_in_another_process_with_another_hash_seed():
    code = "from jaxblock.data.text import corpus; print(corpus.generate('test', 20, level='hard', seed=3))"
    environment = os.environ | {"PYTHONHASHSEED": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == f"{corpus.generate('test', 20, level='hard', seed=3)}\n"


def test_asking_for_too_many_says_how_many_exist_and_exactly_that_many_can_be_had(monkeypatch):
    monkeypatch.setitem(corpus.LEVELS, "tiny", corpus.Level(steps=(2, 3), max_operand=4, max_total=9, operations="+-*"))
    chains = _all_chains("tiny")
    for split in ("train", "test"):
        exist = sum(corpus.split_of(chain) == split for chain in chains)
        with pytest.raises(ValueError, match=f"only {exist:,} distinct ones exist"):
            corpus.generate(split, exist + 1, level="tiny")
        found = {corpus.chain_of(record) for record in corpus.generate(split, exist, level="tiny")}
        assert found == {chain for chain in chains if corpus.split_of(chain) == split}
    with pytest.raises(ValueError, match="distinct ones exist"):
        corpus.generate("train", 10**15, level="hard")


def test_bad_arguments_are_named():
    for arguments, message in [
        ({"split": "valid", "n": 1}, "train"),
        ({"split": "train", "n": -1}, "-1"),
        ({"split": "train", "n": 1, "level": "trivial"}, "easy, medium, hard, harder, short, long"),
    ]:
        with pytest.raises((ValueError, TypeError), match=message):  # a TypeError where annotations are checked first
            corpus.generate(**arguments)


def test_chain_of_refuses_answers_that_do_not_hold_together():
    assert corpus.chain_of({"answer": "11 - 6 = 5\n5 + 8 = 13\n#### 13"}) == (11, ("-", 6), ("+", 8))
    for answer, message in [
        ("2 + 2 = 5\n#### 5", "wrong arithmetic"),
        ("2 + 2 = 4\n5 + 2 = 7\n#### 7", "does not start"),
        ("2 + 2 = 4\n#### 5", "last line"),
        ("two plus two\n#### 4", "not a step"),
        ("#### 4", "last line"),
    ]:
        with pytest.raises(ValueError, match=message):
            corpus.chain_of({"question": "", "answer": answer})
