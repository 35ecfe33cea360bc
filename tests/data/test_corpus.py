"""The built-in problems: deterministic, well formed, solvable from their text, and disjoint between the splits."""

import os
import re
import subprocess
import sys

import numpy as np
import pytest

from jaxblock.data.text import corpus, sudoku


def _replay(chain):
    totals = [chain[0]]
    for operation, operand in chain[1:]:
        totals.append({"+": totals[-1] + operand, "-": totals[-1] - operand, "*": totals[-1] * operand}[operation])
    return totals


def _all_chains(bound):
    """Every chain of a level, by brute force: the oracle of the count and of the unranking."""
    frontier, found = [(start,) for start in range(2, bound.max_total + 1)], []
    for steps in range(1, bound.steps[1] + 1):
        moves = [(op, n) for op in bound.operations for n in range(2, bound.max_operand + 1)]
        # Nothing times a factor is no step of a story.
        frontier = [chain + (move,) for chain in frontier for move in moves if move[0] != "*" or _replay(chain)[-1] > 0]
        frontier = [chain for chain in frontier if 0 <= _replay(chain)[-1] <= bound.max_total]
        found += frontier if steps >= bound.steps[0] else []
    return found


@pytest.mark.parametrize("level", corpus.LEVELS)
def test_answers_are_worked_within_the_levels_bounds_and_splits_are_disjoint_whatever_the_seeds(level):
    bound, chains, questions = corpus.LEVELS[level], {}, {}
    for split, n, seed in (("train", 400, 0), ("test", 200, 7)):
        records = corpus.generate(split, n, level=level, seed=seed)
        assert corpus.generate(split, 50, level=level, seed=seed) == records[:50], "fewer are a prefix of more"
        assert corpus.generate(split, 50, level=level, seed=seed + 1) != records[:50]
        assert corpus.generate(split, 0, level=level) == []
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


def test_the_same_in_another_process_with_another_hash_seed():
    code = "from jaxblock.data.text import corpus; print(corpus.generate('test', 20, level='hard', seed=3))"
    environment = os.environ | {"PYTHONHASHSEED": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == f"{corpus.generate('test', 20, level='hard', seed=3)}\n"


def test_asking_for_too_many_says_how_many_exist_and_exactly_that_many_can_be_had(monkeypatch):
    tiny = corpus.Level(steps=(2, 3), max_operand=4, max_total=9, operations="+-*")
    monkeypatch.setitem(corpus.LEVELS, "tiny", tiny)
    chains = _all_chains(tiny)
    for split in ("train", "test"):
        expected = {chain for chain in chains if corpus.split_of(chain) == split}
        with pytest.raises(ValueError, match=f"only {len(expected):,} distinct ones exist"):
            corpus.generate(split, len(expected) + 1, level="tiny")
        records = corpus.generate(split, len(expected), level="tiny")
        assert {corpus.chain_of(record) for record in records} == expected
    with pytest.raises(ValueError, match="distinct ones exist"):
        corpus.generate("train", 10**15, level="hard")


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: corpus.generate("valid", 1), "train"),
        (lambda: corpus.generate("train", -1), "-1"),
        (lambda: corpus.generate("train", 1, level="trivial"), "easy, medium, hard, harder, short, long"),
        (lambda: corpus.chain_of({"answer": "2 + 2 = 5\n#### 5"}), "wrong arithmetic"),
        (lambda: corpus.chain_of({"answer": "2 + 2 = 4\n5 + 2 = 7\n#### 7"}), "does not start"),
        (lambda: corpus.chain_of({"answer": "2 + 2 = 4\n#### 5"}), "last line"),
        (lambda: corpus.chain_of({"answer": "two plus two\n#### 4"}), "not a step"),
        (lambda: corpus.chain_of({"answer": "#### 4"}), "last line"),
    ],
)
def test_bad_arguments_and_answers_that_do_not_hold_together_are_named(call, message):
    with pytest.raises((ValueError, TypeError), match=message):  # a TypeError where annotations are checked first
        call()


def test_every_sudoku_has_its_answer_as_the_only_solution_and_splits_share_none(monkeypatch):
    every = sudoku.solutions().reshape(-1, 4, 4)
    # There are 288 solutions, so that these, all different, are all.
    assert len({one.tobytes() for one in every}) == 288
    quarters = [every[:, r : r + 2, c : c + 2].reshape(-1, 1, 4) for r in (0, 2) for c in (0, 2)]
    for parts in (every, every.swapaxes(1, 2), *quarters):
        assert (np.sort(parts) == [1, 2, 3, 4]).all()
    answers = {}
    for split, n in (("train", 60), ("test", 30)):
        records = sudoku.generate(split, n, seed=3)
        assert records[:10] == sudoku.generate(split, 10, seed=3) and len({one["question"] for one in records}) == n
        assert records != sudoku.generate(split, n, seed=4)
        answers[split] = {one["answer"] for one in records}
        for one in records:
            puzzle, answer = (np.array([line.split(" ") for line in one[k].split("\n")], int) for k in one)
            assert 6 <= (puzzle == 0).sum() <= 10
            solved = [found for found in every if ((puzzle == 0) | (puzzle == found)).all()]
            assert len(solved) == 1 and np.array_equal(solved[0], answer)
    assert not answers["train"] & answers["test"]
    monkeypatch.setattr(sudoku, "HOLES", (0, 0))  # each of some 36 solutions is then one puzzle
    with pytest.raises(ValueError, match="different ones were found"):
        sudoku.generate("test", 60)
