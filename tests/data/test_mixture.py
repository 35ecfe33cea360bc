"""Several training files are mixed exactly as their weights say, and every row is a pure function of seed and place."""

import pickle
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxblock.data.config import DataConfig
from jaxblock.data.loader import BatchAt
from jaxblock.data.mixture import Mixture, describe_files, file_cycle, mixture_of
from jaxblock.data.store.records import Record
from jaxblock.diffusion.config import CanvasConfig
from jaxblock.errors import UserError

CANVAS = CanvasConfig(prompt_len=2, response_len=12, block=4)
PATHS, SIZES, WEIGHTS = ("a.jsonl", "b.jsonl", "c.jsonl"), (7, 40, 11), (0.25, 0.15, 0.6)
RECORDS = [Record(np.ones(1, np.int32), np.ones(1 + i % 12, np.int32), "q", "a", f"{i}", i) for i in range(sum(SIZES))]


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=2, max_size=9))
def test_counts_are_right_in_every_window_of_rows(parts):
    """Counts every window of three cycles, by the difference of how far two prefixes are off, in whole numbers."""
    first = [round(part / sum(parts), 3) for part in parts[:-1]]
    weights = (*first, float(1 - sum(Fraction(str(weight)) for weight in first)))
    cycle = file_cycle(weights)
    bound = 1 - Fraction(1, 2 * len(weights) - 2)  # Tijdeman's
    for file, weight in enumerate(weights):
        share = Fraction(str(weight))
        wanted = np.arange(3 * len(cycle) + 1) * int(share * len(cycle))
        off = np.concatenate([[0], np.cumsum(np.tile(cycle == file, 3))]) * len(cycle) - wanted
        assert np.abs(off).max() <= bound * len(cycle), "the first rows"
        assert off.max() - off.min() <= (1 if len(weights) == 2 else 2 * bound) * len(cycle), "any rows"
        assert off[-1] == off[len(cycle)] == 0, "a cycle"


def rows(seed: int, begin: int, end: int, kind: str = "per_sequence", **options: int) -> list[tuple[int, int]]:
    """Returns (record, block) of rows of the endless list."""
    at = BatchAt(
        RECORDS, canvas=CANVAS, seed=seed, batch_size=4, kind=kind, mixture=Mixture(PATHS, SIZES, WEIGHTS), **options
    )
    batches = map(pickle.loads(pickle.dumps(at)), range(begin, end))
    return [(int(i), int(k)) for batch in batches for i, k in zip(batch.index, batch.block, strict=True)]


@pytest.mark.parametrize("kind", ["per_sequence", "pairs"])
def test_each_file_has_epochs_of_its_own(kind):
    drawn = rows(3, 0, 250, kind)
    ends = np.cumsum(SIZES)
    every: dict[int, list[tuple[int, int]]] = {0: [], 1: [], 2: []}
    for row in drawn:
        every[int(np.searchsorted(ends, row[0], "right"))].append(row)
    assert [len(some) for some in every.values()] == [250, 150, 600]
    for file, some in every.items():
        records = range(ends[file] - SIZES[file], ends[file])
        blocks = {i: range(-(-len(RECORDS[i].response_ids) // 4)) if kind == "pairs" else [-1] for i in records}
        epoch = sum(map(len, blocks.values()))
        first, second = some[:epoch], some[epoch : 2 * epoch]
        assert Counter(first) == {(i, k): 1 for i in records for k in blocks[i]} and first != sorted(first)
        assert len(second) < epoch or (Counter(second) == Counter(first) and second != first)
    # Nothing but seed and step decides: neither where a run begins nor how many processes share a batch.
    assert rows(3, 100, 250, kind) == drawn[400:] and rows(4, 0, 250, kind) != drawn
    halves = [rows(3, 0, 250, kind, process_index=i, process_count=2) for i in (0, 1)]
    assert [row for pair in zip(*[iter(halves[0])] * 2, strict=True) for row in pair] == halves[0]
    assert [rows_ for i in range(250) for half in halves for rows_ in half[2 * i : 2 * i + 2]] == drawn


def test_chances_are_those_of_the_rows():
    mixture = Mixture(PATHS, SIZES, WEIGHTS)
    chances = mixture.chances(np.arange(sum(SIZES)))
    np.testing.assert_allclose([part.sum() for part in np.split(chances, np.cumsum(SIZES)[:-1])], WEIGHTS)
    assert np.isclose(mixture.chances(np.arange(40)).sum(), 1), "some files may be missing from a sample"


def test_weights_that_do_not_fit():
    def entry(*kept: int) -> dict[str, object]:
        files = [{"path": path, "kept": n} for path, n in zip(PATHS, kept, strict=False)]
        return {"kept": sum(kept)} | ({"files": files} if files else {})

    for kept, config, complaint in [
        ((), {"weights": (0.5, 0.5)}, "x was prepared from one: leave them out"),
        ((1, 2), {"weights": (0.2, 0.3, 0.5)}, r"3 shares, but x was prepared from 2 files .a.jsonl, b.jsonl."),
        (
            (1, 2),
            {"weights": (0.5, 0.5), "train": ("b.jsonl", "a.jsonl")},
            "others or in another order .a.jsonl, b.jsonl.",
        ),
        ((1, 0), {"weights": (0.5, 0.5), "train": PATHS[:2]}, "share to b.jsonl, of which x holds no record"),
    ]:
        with pytest.raises(UserError, match=complaint):
            mixture_of(entry(*kept), "x", DataConfig(**config))
    assert mixture_of(entry(1, 2), "x", DataConfig()) is None and describe_files({"kept": 3}, None) is None
    assert "rows: every record once an epoch, 1 from " in describe_files(entry(1, 2), None)
    found = mixture_of(entry(1, 2), "x", DataConfig(weights=(0.5, 0.5)))
    assert found == Mixture(PATHS[:2], (1, 2), (0.5, 0.5))
    for weights, train, complaint in [
        ((0.7, 0.2), ("a", "b"), r"add up to 0.9, not to 1: give shares such as 0.7778, 0.2222"),
        ((1.3, -0.3), ("a", "b"), r"data.weights is \(1.3, -0.3\): it must be above 0"),
        ((0.7, 0.2, 0.1), ("a", "b"), "3 shares, but data.train has 2 files"),
        ((0.333333, 0.666667), ("a", "b"), "at most 100,000 can be: round them to five digits"),
        (None, ("a", " "), "a file is missing"),
        (None, ("builtin", "a"), "names `builtin` among other files"),
    ]:
        with pytest.raises(UserError, match=complaint):
            DataConfig(train=train, weights=weights).check()
