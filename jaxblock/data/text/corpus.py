"""Generates the built-in corpus from a seed: multi-step arithmetic word problems in GSM8K's format.

A problem is a *chain* (a starting number and the operations applied to it, in order) told as a short story. Whether a
chain belongs to training or to the held-out split depends only on the chain, not on the seed, the level, the wording or
the number of problems asked for. So a training set and a test set never share a chain, even if their seeds or levels differ.
"""

import bisect
import dataclasses
import functools
import hashlib
import itertools
import operator
import random
import re
from collections.abc import Iterator
from typing import Any, Literal

from jaxblock.data.text import stories

CorpusSplit = Literal["train", "test"]
Chain = tuple[Any, ...]
"""(start, (operation, operand), ...): the start is a number, an operation one of "+", "-" and "*"."""

TEST_SHARE = 1 / 8
"""The share of all chains that belongs to the test split."""

_OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul}
_LARGEST_FACTOR = 9  # larger factors ("37 times as many") would sound odd in a story
# Up to this number of chains, all of them may be enumerated to report exactly how many belong to a split.
_COUNTABLE = 2_000_000


@dataclasses.dataclass(frozen=True)
class Level:
    """Bounds the numbers and operations of a problem.

    Attributes:
        steps: The smallest and the largest number of operations.
        max_operand: The largest operand; an operand is at least 2, and a factor at most 9.
        max_total: The largest starting number and running total; a start is at least 2, a running total at least 0.
        operations: The operations used, out of "+", "-" and "*".
        even: Whether every number of operations is equally likely; else every chain is, and since there are many times more
            long chains than short ones, nearly all are long.
        brief: Whether a problem is one line of arithmetic instead of a story, so that little is computed for its prompt.
    """

    steps: tuple[int, int]
    max_operand: int
    max_total: int
    operations: str = "+-"
    even: bool = False
    brief: bool = False


LEVELS: dict[str, Level] = {
    "easy": Level(steps=(2, 3), max_operand=6, max_total=15),
    "medium": Level(steps=(2, 3), max_operand=9, max_total=20),
    "hard": Level(steps=(2, 4), max_operand=20, max_total=100),
    "harder": Level(steps=(3, 5), max_operand=50, max_total=500, operations="+-*"),
    "short": Level(steps=(2, 5), max_operand=4, max_total=9, even=True, brief=True),
    "long": Level(steps=(4, 8), max_operand=4, max_total=9, even=True, brief=True),
}
DEFAULT_LEVEL = "easy"

_STEP = re.compile(r"(\d+) ([-+*]) (\d+) = (\d+)")


def generate(split: CorpusSplit, n: int, *, level: str = DEFAULT_LEVEL, seed: int = 0) -> list[dict[str, str]]:
    """Makes `n` problems, no two of which share a chain.

    The same arguments give the same problems in every process, and a smaller `n` gives a prefix of what a larger one
    gives. Chains are drawn without replacement from the level's chains that belong to the split: uniformly from all of them,
    or, where the level is `even`, uniformly from those of a number of operations that is drawn first.

    Args:
        split: "train" or "test"; their chains (and so their questions) are disjoint for any seeds and levels.
        n: The number of problems.
        level: The name of a level in `LEVELS`.
        seed: The seed that decides which problems are made, in which order and in which words.

    Returns:
        Records {"question", "answer"}; an answer is one "a op b = c" line per step and a last line "#### N".

    Raises:
        ValueError: If the split or level is unknown, `n` is negative, or there are fewer chains than `n`.
    """
    if split not in ("train", "test"):
        raise ValueError(f'split must be "train" or "test", not {split!r}')
    if level not in LEVELS:
        raise ValueError(f"unknown level {level!r}; the built-in corpus has {', '.join(LEVELS)}, sudoku")
    if n < 0:
        raise ValueError(f"n must be 0 or more, not {n}")
    rng = random.Random(f"jaxblock corpus/{split}/{level}/{seed}")
    total, records = _heads(LEVELS[level])[1][-1], []
    if n > total > _COUNTABLE:
        raise ValueError(
            f"{n:,} problems of level {level!r} asked for; only {total:,} distinct ones exist, train and test together"
        )
    for index in _drawn(LEVELS[level], rng) if n else ():
        chain = _unrank(LEVELS[level], index)
        if split_of(chain) == split:
            question = stories.tell_briefly(chain) if LEVELS[level].brief else stories.tell(chain, rng)
            records.append({"question": question, "answer": _worked_answer(chain)})
            if len(records) == n:
                return records
    if n:
        raise ValueError(
            f"{n:,} {split} problems of level {level!r} asked for; only {len(records):,} distinct ones exist. "
            "Ask for at most that many, or use a harder level"
        )
    return records


def split_of(chain: Chain) -> CorpusSplit:
    """Returns the split that a chain belongs to, which is a pure function of its numbers and operations."""
    digest = hashlib.blake2b(repr(chain).encode(), digest_size=8).digest()
    return "test" if int.from_bytes(digest, "big") < TEST_SHARE * 2**64 else "train"


def chain_of(record: dict[str, str]) -> Chain:
    """Recovers a problem's chain by reading its answer, and checks the arithmetic on the way.

    Raises:
        ValueError: If a line is not a step, does not continue from the one before, or is wrong.
    """
    *lines, last = record["answer"].split("\n")
    chain: list[Any] = []
    running: int | None = None
    for line in lines:
        match = _STEP.fullmatch(line)
        if match is None:
            raise ValueError(f'not a step of the form "a op b = c": {line!r}')
        left, operation, right, result = int(match[1]), match[2], int(match[3]), int(match[4])
        if running is not None and left != running:
            raise ValueError(f"step {line!r} does not start from the result before it, {running}")
        if _OPERATIONS[operation](left, right) != result:
            raise ValueError(f"wrong arithmetic: {line!r}")
        chain += [(operation, right)] if chain else [left, (operation, right)]
        running = result
    if running is None or last != f"#### {running}":
        raise ValueError(f'the last line must be "#### {running}", not {last!r}')
    return tuple(chain)


@functools.cache
def _moves(level: Level, total: int) -> tuple[tuple[tuple[str, int], int], ...]:
    """Returns the moves from a running total: every ((operation, operand), result) that the level allows."""
    moves = []
    for operation in level.operations:
        largest = min(level.max_operand, _LARGEST_FACTOR) if operation == "*" else level.max_operand
        for operand in range(2, largest + 1):
            result = _OPERATIONS[operation](total, operand)
            if 0 <= result <= level.max_total and (operation != "*" or total > 0):
                moves.append(((operation, operand), result))
    return tuple(moves)


@functools.cache
def _ways(level: Level, total: int, steps: int) -> tuple[int, ...]:
    """Counts the ways to go on from a running total, by their first move.

    Returns:
        Cumulative counts over `_moves(level, total)`: entry i is the number of sequences of `steps` operations whose first
        move comes before move i, so that the first entry is 0 and the last counts all sequences.
    """
    followers = (_ways(level, result, steps - 1)[-1] if steps > 1 else 1 for _, result in _moves(level, total))
    return tuple(itertools.accumulate(followers, initial=0))


@functools.cache
def _heads(level: Level) -> tuple[list[tuple[int, int]], list[int]]:
    """Lists every pair (number of steps, start), and counts the chains of each.

    Returns:
        (the pairs, cumulative counts: entry i is the number of chains of all pairs before pair i). `_unrank` finds a chain's
        pair by its index among these counts; the last count is that of all chains of the level.
    """
    heads = [
        (steps, start) for steps in range(level.steps[0], level.steps[1] + 1) for start in range(2, level.max_total + 1)
    ]
    return heads, list(itertools.accumulate((_ways(level, start, steps)[-1] for steps, start in heads), initial=0))


def _unrank(level: Level, index: int) -> Chain:
    """Returns the chain at `index` in the list of all chains, sorted by number of steps, start, first operation and so on."""
    heads, begins = _heads(level)
    at = bisect.bisect(begins, index) - 1
    index -= begins[at]  # from here on, an index among the chains that share this beginning
    steps, total = heads[at]
    chain: list[Any] = [total]
    for left in range(steps, 0, -1):
        ways = _ways(level, total, left)
        at = bisect.bisect(ways, index) - 1
        index -= ways[at]
        move, total = _moves(level, total)[at]
        chain.append(move)
    return tuple(chain)


def _drawn(level: Level, rng: random.Random) -> Iterator[int]:
    """Yields the index of every chain of a level once, in random order (`Level.even`)."""
    heads, begins = _heads(level)
    if not level.even:
        yield from _shuffled(begins[-1], rng)
        return
    first = [next(at for at, (steps, _) in enumerate(heads) if steps == wanted) for wanted in sorted(dict(heads))]
    edges = [begins[at] for at in first] + [begins[-1]]
    left = [(low, _shuffled(high - low, rng)) for low, high in itertools.pairwise(edges)]
    while left:
        at = rng.randrange(len(left))
        low, shuffled = left[at]
        index = next(shuffled, None)
        if index is None:
            del left[at]
        else:
            yield low + index


def _shuffled(total: int, rng: random.Random) -> Iterator[int]:
    """Yields a random permutation of range(total) lazily, by Fisher and Yates's shuffle on a sparse array."""
    moved: dict[int, int] = {}
    for i in range(total):
        j = rng.randrange(i, total)
        picked, moved[j] = moved.get(j, j), moved.get(i, i)
        yield picked


def _worked_answer(chain: Chain) -> str:
    total, lines = chain[0], []
    for operation, operand in chain[1:]:
        result = _OPERATIONS[operation](total, operand)
        lines.append(f"{total} {operation} {operand} = {result}")
        total = result
    return "\n".join([*lines, f"#### {total}"])
