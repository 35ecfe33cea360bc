"""Generates 4 x 4 sudokus from a seed: a task in which the order of decoding matters.

A sudoku fills a square of four rows with the digits 1 to 4, so that no digit is twice in a row, a column or a quarter. Some
empty cells follow from the clues at once, others only from cells that were filled before, wherever these are. So a decoder that
commits what it is sure of, within a block, has an advantage over one that writes from left to right.

Whether a puzzle belongs to training or to the held-out split depends on its solution alone: no solution is in both.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import random

import numpy as np

LEVEL = "sudoku"
"""The name of these problems as a level of the built-in corpus."""

HOLES = (6, 10)
"""The smallest and the largest number of empty cells of a puzzle."""

TEST_SHARE = 1 / 8
"""The share of all 288 solutions that belongs to the test split."""


@functools.cache
def solutions() -> np.ndarray:
    """Returns all 288 filled squares, as rows of 16 digits from 1 to 4: int [288, 16]."""
    rows = np.array(list(itertools.permutations((1, 2, 3, 4))))
    squares = rows[np.indices((len(rows),) * 4).reshape(4, -1).T]  # every way to stack four rows
    columns = np.sort(squares, axis=1) == np.arange(1, 5)[:, None]
    quarters = np.sort(squares.reshape(-1, 2, 2, 2, 2).swapaxes(2, 3).reshape(-1, 4, 4), axis=-1) == np.arange(1, 5)
    return squares[columns.all((1, 2)) & quarters.all((1, 2))].reshape(-1, 16)


def split_of(solution: np.ndarray) -> str:
    """Returns the split that a solution belongs to, which is a pure function of its digits."""
    digest = hashlib.blake2b(bytes(solution.astype(np.uint8)), digest_size=8).digest()
    return "test" if int.from_bytes(digest, "big") < TEST_SHARE * 2**64 else "train"


def generate(split: str, n: int, *, seed: int = 0) -> list[dict[str, str]]:
    """Makes `n` different puzzles, each with exactly one solution.

    The same arguments give the same puzzles in every process, and a smaller `n` gives a prefix of what a larger one gives.

    Args:
        split: "train" or "test".
        n: The number of puzzles.
        seed: The seed that decides which puzzles are made, and in which order.

    Returns:
        Records {"question", "answer"}: the puzzle and its solution as four lines of four digits, with 0 for an empty cell.

    Raises:
        ValueError: If so many different puzzles were not found.
    """
    rng = random.Random(f"jaxblock sudoku/{split}/{seed}")
    every = solutions()
    mine = [solution for solution in every if split_of(solution) == split]
    records: list[dict[str, str]] = []
    seen: set[bytes] = set()
    tries = 0
    while len(records) < n:
        tries += 1
        if tries > 100 * n + 10_000:
            raise ValueError(
                f"{n:,} {split} sudokus asked for; after {tries:,} tries only {len(records):,} different ones were found"
            )
        solution = rng.choice(mine)
        kept = np.ones(16, bool)
        kept[rng.sample(range(16), rng.randint(*HOLES))] = False
        puzzle = np.where(kept, solution, 0)
        if puzzle.tobytes() in seen or (every[:, kept] == solution[kept]).all(1).sum() != 1:
            continue
        seen.add(puzzle.tobytes())
        records.append({"question": _written(puzzle), "answer": _written(solution)})
    return records


def _written(square: np.ndarray) -> str:
    """Writes a square as four lines of digits with spaces between them, so that each digit is a token of its own."""
    return "\n".join(" ".join(map(str, row)) for row in square.reshape(4, 4).tolist())
