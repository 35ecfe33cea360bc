"""The built-in corpus: multi-step arithmetic word problems in GSM8K's format, generated from a seed.

A problem is a *chain* (a starting number and the operations applied to it, in order) told as a short story. Whether a chain belongs
to training or to the held-out split depends on the chain alone: not on the seed, the level, the wording or how many problems are
asked for. So no sequence of numbers seen in training is ever a test item, whatever two calls produced the two sets.
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

Split = Literal["train", "test"]
Chain = tuple[Any, ...]  # (start, (operation, operand), ...)

TEST_SHARE = 1 / 8
_OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul}
_LARGEST_FACTOR = 9  # "37 times as many" is no sentence of a story
_COUNTABLE = 2_000_000  # chains that may be walked through one by one to count a split exactly


@dataclasses.dataclass(frozen=True)
class Level:
    """How hard the problems are.

    Attributes:
        steps: Least and greatest number of dependent operations.
        max_operand: Operands are drawn from 2 to this (factors at most 9).
        max_total: The start and every running total stay within 0 to this.
        operations: The operations used, out of "+", "-" and "*".
    """

    steps: tuple[int, int]
    max_operand: int
    max_total: int
    operations: str = "+-"


LEVELS: dict[str, Level] = {
    "easy": Level(steps=(2, 3), max_operand=6, max_total=15),
    "medium": Level(steps=(2, 3), max_operand=9, max_total=20),
    "hard": Level(steps=(2, 4), max_operand=20, max_total=100),
    "harder": Level(steps=(3, 5), max_operand=50, max_total=500, operations="+-*"),
}
DEFAULT_LEVEL = "easy"

_NAMES = tuple(
    [
        "Ada",
        "Amir",
        "Bea",
        "Boris",
        "Chloe",
        "Dana",
        "Diego",
        "Elif",
        "Emeka",
        "Farah",
        "Finn",
        "Greta",
        "Hana",
        "Hugo",
        "Ines",
        "Ivan",
        "Jun",
        "Kofi",
        "Lena",
        "Luca",
        "Maya",
        "Mina",
        "Nils",
        "Noor",
        "Olga",
        "Omar",
        "Petra",
        "Quinn",
        "Rosa",
        "Sami",
        "Tara",
        "Theo",
        "Uma",
        "Viktor",
        "Wanda",
        "Yuki",
        "Zane",
        "Zoe",
    ]
)
_THINGS = tuple(
    [
        "apples",
        "badges",
        "balloons",
        "beads",
        "books",
        "bottles",
        "buttons",
        "candles",
        "cards",
        "carrots",
        "coins",
        "cookies",
        "crayons",
        "cups",
        "eggs",
        "flowers",
        "keys",
        "lemons",
        "letters",
        "marbles",
        "muffins",
        "pears",
        "pencils",
        "plums",
        "postcards",
        "ribbons",
        "shells",
        "spoons",
        "stamps",
        "stickers",
        "tickets",
        "tulips",
    ]
)
# A number is never followed by a full stop: a tokenizer would make one token of the two, and another number of it.
# Short sentences on purpose: a prompt token costs as much compute as a response token, and the quickstart runs on two cores.
_OPENINGS = (
    "{name} has {n} {things}.",
    "{name} owns {n} {things}.",
    "{name} counts {n} {things}.",
    "{name} keeps {n} {things}.",
    "{name} starts with {n} {things}.",
)
_SENTENCES = {
    "+": (
        "{other} gives {name} {n} more.",
        "{name} buys {n} more.",
        "{name} finds {n} {things}.",
        "Then {other} adds {n} more.",
        "A neighbour brings {n} {things}.",
        "Later {name} gets {n} more.",
        "{n} new {things} arrive.",
        "{name} wins {n} {things}.",
    ),
    "-": (
        "{other} takes {n} of them.",
        "{name} gives {n} to {other}.",
        "Then {name} loses {n} {things}.",
        "{name} sells {n} {things}.",
        "{other} borrows {n} {things}.",
        "{n} of them go missing.",
        "Later {name} mislays {n} {things}.",
        "{name} throws away {n} {things}.",
    ),
    "*": (
        "A lucky trade makes it {n} times as many.",
        "Then there are {n} times as many {things}.",
        "{other} helps {name} to {n} times as many.",
    ),
}
_QUESTIONS = (
    "How many {things} does {name} have now?",
    "How many {things} are there now?",
    "How many {things} are left?",
    "How many {things} does that make?",
)
_STEP = re.compile(r"(\d+) ([-+*]) (\d+) = (\d+)")


def generate(split: Split, n: int, *, level: str = DEFAULT_LEVEL, seed: int = 0) -> list[dict[str, str]]:
    """Makes `n` problems, no two of which share a chain.

    The same arguments give the same problems in every process, and a smaller `n` gives a prefix of what a larger one gives. Chains are
    drawn uniformly without replacement from all of the level's chains that belong to the split.

    Args:
        split: "train" or "test"; their chains (and so their questions) are disjoint for any seeds and levels.
        n: Number of problems.
        level: A name in `LEVELS`.
        seed: Which problems, in which order and in which words.

    Returns:
        Records {"question", "answer"}; an answer is one "a op b = c" line per step and a last line "#### N".

    Raises:
        ValueError: For an unknown split or level, a negative `n`, or more problems than there are chains.
    """
    if split not in ("train", "test"):
        raise ValueError(f'split must be "train" or "test", not {split!r}')
    if level not in LEVELS:
        raise ValueError(f"unknown level {level!r}; the built-in corpus has {', '.join(LEVELS)}")
    if n < 0:
        raise ValueError(f"n must be 0 or more, not {n}")
    rng = random.Random(f"jaxblock corpus/{split}/{level}/{seed}")
    total, records = _heads(LEVELS[level])[1][-1], []
    if n > total > _COUNTABLE:
        raise ValueError(
            f"{n:,} problems of level {level!r} asked for; only {total:,} distinct ones exist, train and test together"
        )
    for index in _shuffled(total, rng) if n else ():
        chain = _unrank(LEVELS[level], index)
        if split_of(chain) == split:
            records.append({"question": _tell(chain, rng), "answer": _work(chain)})
            if len(records) == n:
                return records
    if n:
        raise ValueError(
            f"{n:,} {split} problems of level {level!r} asked for; only {len(records):,} distinct ones exist. "
            "Ask for at most that many, or use a harder level"
        )
    return records


def split_of(chain: Chain) -> Split:
    """The split that a chain belongs to: a pure function of its numbers and operations."""
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
    """Every ((operation, operand), result) that may follow a running total."""
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
    """Running count, from 0, of the chains of `steps` further operations over the moves from `total`; its last entry counts them all."""
    followers = (_ways(level, result, steps - 1)[-1] if steps > 1 else 1 for _, result in _moves(level, total))
    return tuple(itertools.accumulate(followers, initial=0))


@functools.cache
def _heads(level: Level) -> tuple[list[tuple[int, int]], list[int]]:
    """Every (steps, start), and the running count, from 0, of the chains over them."""
    heads = [
        (steps, start) for steps in range(level.steps[0], level.steps[1] + 1) for start in range(2, level.max_total + 1)
    ]
    return heads, list(itertools.accumulate((_ways(level, start, steps)[-1] for steps, start in heads), initial=0))


def _unrank(level: Level, index: int) -> Chain:
    """The chain at `index` in the order: number of steps, start, first operation and so on."""
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


def _shuffled(total: int, rng: random.Random) -> Iterator[int]:
    """A random permutation of range(total), made lazily: Fisher and Yates's shuffle on a sparse array."""
    moved: dict[int, int] = {}
    for i in range(total):
        j = rng.randrange(i, total)
        picked, moved[j] = moved.get(j, j), moved.get(i, i)
        yield picked


def _tell(chain: Chain, rng: random.Random) -> str:
    name, other = rng.sample(_NAMES, 2)
    words = {"name": name, "other": other, "things": rng.choice(_THINGS)}
    parts = [rng.choice(_OPENINGS).format(n=chain[0], **words)]
    parts += [rng.choice(_SENTENCES[operation]).format(n=operand, **words) for operation, operand in chain[1:]]
    return " ".join([*parts, rng.choice(_QUESTIONS).format(**words)])


def _work(chain: Chain) -> str:
    total, lines = chain[0], []
    for operation, operand in chain[1:]:
        result = _OPERATIONS[operation](total, operand)
        lines.append(f"{total} {operation} {operand} = {result}")
        total = result
    return "\n".join([*lines, f"#### {total}"])
