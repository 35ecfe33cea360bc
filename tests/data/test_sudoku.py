"""The built-in sudokus: each has one solution, splits share none, and the same seed gives the same."""

import json

import numpy as np
import pytest

from jaxblock.data.text import sudoku


def square(text):
    return np.array([[int(digit) for digit in line.split(" ")] for line in text.split("\n")])


def valid(filled):
    parts = [*filled, *filled.T, *(filled[r : r + 2, c : c + 2].ravel() for r in (0, 2) for c in (0, 2))]
    return all(sorted(part) == [1, 2, 3, 4] for part in parts)


def solve(puzzle):
    """Every way to fill a puzzle, cell by cell: the oracle."""
    empty = np.argwhere(puzzle == 0)
    if not len(empty):
        return [puzzle] if valid(puzzle) else []
    r, c = empty[0]
    found = []
    for digit in range(1, 5):
        quarter = puzzle[r // 2 * 2 : r // 2 * 2 + 2, c // 2 * 2 : c // 2 * 2 + 2]
        if digit not in puzzle[r] and digit not in puzzle[:, c] and digit not in quarter:
            filled = puzzle.copy()
            filled[r, c] = digit
            found += solve(filled)
    return found


def test_every_puzzle_has_its_answer_as_the_only_solution_and_splits_share_none():
    assert len(sudoku.solutions()) == 288 and all(valid(one.reshape(4, 4)) for one in sudoku.solutions())
    answers = {}
    for split, n in (("train", 60), ("test", 30)):
        records = sudoku.generate(split, n, seed=3)
        assert records[:10] == sudoku.generate(split, 10, seed=3) and len({one["question"] for one in records}) == n
        assert records != sudoku.generate(split, n, seed=4)
        answers[split] = {one["answer"] for one in records}
        for one in records:
            puzzle = square(one["question"])
            assert 6 <= (puzzle == 0).sum() <= 10
            solved = solve(puzzle)
            assert len(solved) == 1 and np.array_equal(solved[0], square(one["answer"]))
    assert not answers["train"] & answers["test"]


def test_more_puzzles_than_there_are_cannot_be_had(monkeypatch):
    monkeypatch.setattr(sudoku, "HOLES", (1, 1))  # each of some 36 solutions then has 16 puzzles
    with pytest.raises(ValueError, match="different ones were found"):
        sudoku.generate("test", 1000)


def test_they_are_prepared_as_other_problems_are(ran, tmp_path):
    sizes = "--canvas.prompt_len 64 --canvas.response_len 40 --data.builtin_train 50 --data.builtin_test 8 --data.validation_records 4"
    kind = "--data.level sudoku --data.template plain --data.tokenizer_type char --data.vocab_size 300"
    ran(f"prepare --data.prepared {tmp_path}/prepared {kind} {sizes}")
    assert json.loads((tmp_path / "prepared" / "manifest.json").read_text())["splits"]["test"]["kept"] == 8
