"""Records survive their files, every batch is a pure function of seed and step, and files are mixed as weights say."""

import dataclasses
import itertools
import pickle
import re
from collections import Counter
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxblock.data
from jaxblock.data import loader
from jaxblock.data.config import DataConfig
from jaxblock.data.loader import Batch, BatchAt
from jaxblock.data.mixture import Mixture, describe_files, file_cycle, mixture_of
from jaxblock.data.store import records
from jaxblock.data.store.records import Record, Records, decode_record, encode_record, record_writer, with_index
from jaxblock.diffusion.config import CanvasConfig
from jaxblock.errors import UserError

CANVAS = CanvasConfig(prompt_len=8, response_len=12, block=4)
PATHS, SIZES, WEIGHTS = ("a.jsonl", "b.jsonl", "c.jsonl"), (7, 40, 11), (0.25, 0.15, 0.6)
MIXTURE = Mixture(PATHS, SIZES, WEIGHTS)


def record(index, n_prompt, n_response):
    prompt = np.arange(100 * index, 100 * index + n_prompt, dtype=np.int32)
    response = -1 - prompt[:1].repeat(n_response)
    return Record(prompt, response, f"q{index}", f"à{index}", f"some.jsonl:{index + 1}", index)


RECORDS = [record(i, 1 + i % 8, 1 + (5 * i) % 12) for i in range(sum(SIZES))]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("records")
    with record_writer(folder, "train") as write:
        for record in RECORDS:
            write(with_index(encode_record(dataclasses.replace(record, index=0)), record.index))
    return Records(folder, "train")


ids = st.lists(st.integers(0, 2**31 - 1), max_size=6).map(lambda values: np.array(values, np.int32))
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)


@settings(max_examples=50, deadline=None)
@given(st.builds(Record, ids, ids, texts, texts, texts, st.integers(0, 2**32 - 1)))
def test_a_record_round_trips(record):
    again = decode_record(encode_record(record))
    np.testing.assert_equal(vars(again), vars(record))
    assert again.prompt_ids.dtype == again.response_ids.dtype == np.int32
    with pytest.raises(ValueError, match="hold no record"):
        decode_record(encode_record(record) + b"x")


@pytest.mark.parametrize("in_memory", [True, False])
def test_a_file_is_read_at_random(source, in_memory, monkeypatch):
    if not in_memory:
        monkeypatch.setattr(records, "_KEEP_IN_MEMORY", 0)
    again = pickle.loads(pickle.dumps(source))
    assert (again._memory is not None) == in_memory
    assert [record.prompt for record in again] == [f"q{i}" for i in range(len(RECORDS))]
    assert [record.index for record in again[-2:]] == [56, 57] and again[-1].index == 57
    np.testing.assert_array_equal(again.lengths(), [[len(r.prompt_ids), len(r.response_ids)] for r in RECORDS])
    np.testing.assert_array_equal(again.lengths(every=5), again.lengths()[::5])
    with pytest.raises(IndexError):
        again[58]


def test_bad_files_are_named(source, tmp_path):
    with pytest.raises(UserError, match="no split 'test'"):
        Records(tmp_path, "test")
    content = Path(source.path).read_bytes()
    (tmp_path / "test.array_record").write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=r"test\.array_record is damaged"):
        Records(tmp_path, "test")
    with pytest.raises(UserError, match="cannot write .*none"), record_writer(tmp_path / "none", "train") as write:
        write(b"")


def test_rows_are_flush_left_padded_and_named():
    batch = loader.pad_records([record(3, 2, 3), record(1, 8, 12)], CANVAS)
    assert batch.prompt_ids.tolist()[0] == [300, 301, 0, 0, 0, 0, 0, 0]
    assert batch.response_ids.tolist()[0] == [-301] * 3 + [0] * 9
    expected = {"prompt_len": [2, 8], "text_len": [3, 12], "block": [-1, -1], "index": [3, 1], "row_id": [0, 1]}
    assert {name: getattr(batch, name).tolist() for name in expected} == expected
    assert {array.dtype for array in batch} == {np.dtype(np.int32)}
    # A short batch is filled with its first row.
    assert loader.filled(["a", "b"], 4) == ["a", "b", "a", "a"] and loader.filled(("a", "b"), 2) == ["a", "b"]


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


def drawn(seed, begin, end, kind, mixture):
    """Returns (record, block) of rows of the endless list."""
    at = BatchAt(RECORDS, canvas=CANVAS, seed=seed, batch_size=4, kind=kind, mixture=mixture)
    batches = map(pickle.loads(pickle.dumps(at)), range(begin, end))
    return [(int(i), int(k)) for batch in batches for i, k in zip(batch.index, batch.block, strict=True)]


@pytest.mark.parametrize("mixture", [None, MIXTURE], ids=["one-file", "three-files"])
@pytest.mark.parametrize("kind", ["per_sequence", "pairs"])
def test_an_epoch_visits_everything_of_a_file_once_and_each_is_shuffled_anew(kind, mixture):
    sizes, weights, end = (SIZES, WEIGHTS, 250) if mixture else ((len(RECORDS),), (1,), 75)
    rows, begin = drawn(3, 0, end, kind, mixture), 0
    for size, weight in zip(sizes, weights, strict=True):
        mine, begin = range(begin, begin + size), begin + size
        blocks = {i: range(-(-len(RECORDS[i].response_ids) // 4)) if kind == "pairs" else [-1] for i in mine}
        expected = {(i, k): 1 for i in mine for k in blocks[i]}
        of_file = [row for row in rows if row[0] in mine]
        assert len(of_file) == round(4 * end * weight)
        epochs = [of_file[at : at + len(expected)] for at in range(0, len(of_file), len(expected))]
        whole = epochs if len(epochs[-1]) == len(expected) else epochs[:-1]
        assert whole and all(Counter(epoch) == expected for epoch in whole)
        assert all(one != next_one for one, next_one in itertools.pairwise([sorted(whole[0]), *epochs]))
    # Nothing but seed and step decides, and neighbouring seeds are not each other's epochs.
    assert drawn(3, end - 9, end, kind, mixture) == rows[-36:]
    other = drawn(2, 0, end, kind, mixture)
    assert other != rows and (mixture or other[len(expected) : 2 * len(expected)] not in epochs)


kinds, mixtures = st.sampled_from(["per_sequence", "pairs"]), st.sampled_from([None, MIXTURE])


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**40), st.integers(0, 10**9), kinds, mixtures, st.sampled_from([2, 3, 6]))
def test_slices_of_processes_make_up_the_batch(seed, step, kind, mixture, n):
    options = {"canvas": CANVAS, "seed": seed, "batch_size": 12, "kind": kind, "mixture": mixture}
    whole = BatchAt(RECORDS, **options)(step)
    assert whole.row_id.tolist() == list(range(12))
    slices = [BatchAt(RECORDS, **options, process_index=i, process_count=n)(step) for i in range(n)]
    np.testing.assert_equal(tuple(map(np.concatenate, zip(*slices, strict=True))), tuple(whole))


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])  # starting them takes seconds
def test_a_start_at_any_step_and_any_worker_count_give_the_same_batches(source, workers):
    at, of_file = (BatchAt(rows, canvas=CANVAS, seed=1, batch_size=6, kind="pairs") for rows in (RECORDS, source))
    for start in (13,) if workers else (0, 13):
        batches = loader.batches(of_file, start_step=start, workers=workers)
        for step, batch in zip(range(start, start + 9), batches, strict=False):
            assert isinstance(batch, Batch)
            np.testing.assert_equal(batch, at(step))
        batches.close()


def described(*kept):
    """Returns the manifest's entry on training files of which so many records were kept."""
    return {"files": [{"path": path, "kept": n} for path, n in zip(PATHS, kept, strict=False)]}


HALF, MADE, TWO = (0.5, 0.5), described(1, 2), PATHS[:2]


def test_a_mixture_is_that_of_the_files_that_were_prepared():
    chances = MIXTURE.chances(np.arange(sum(SIZES)))
    np.testing.assert_allclose([part.sum() for part in np.split(chances, np.cumsum(SIZES)[:-1])], WEIGHTS)
    assert np.isclose(MIXTURE.chances(np.arange(40)).sum(), 1), "some files may be missing from a sample"
    assert mixture_of(MADE, "x", DataConfig()) is None and describe_files({}, None) is None
    assert "rows: every record once an epoch, 1 from " in describe_files(MADE, None)
    assert mixture_of(MADE, "x", DataConfig(weights=HALF)) == Mixture(TWO, (1, 2), HALF)


AT = {"canvas": CANVAS, "seed": 0}


@pytest.mark.parametrize(
    "call, complaint",
    [
        (lambda: loader.pad_records([record(0, 1, 13)], CANVAS), "some.jsonl:1: the response has 13 tokens, more"),
        (lambda: BatchAt(RECORDS, **AT, batch_size=5, process_count=2), "batch_size = 5 does not split over 2"),
        (lambda: BatchAt(RECORDS, **AT, batch_size=0), "train.batch_size = 0"),
        (lambda: BatchAt([], **AT, batch_size=1), "no records"),
        (lambda: mixture_of({}, "x", DataConfig(weights=HALF)), "x was prepared from one: leave them out"),
        (lambda: mixture_of(MADE, "x", DataConfig(weights=WEIGHTS)), "3 shares, .* from 2 files .a.jsonl, b.jsonl"),
        (lambda: mixture_of(MADE, "x", DataConfig(weights=HALF, train=PATHS[1:])), "others or in another order .a.jso"),
        (lambda: mixture_of(described(1, 0), "x", DataConfig(weights=HALF)), "share to b.jsonl, .* x holds no record"),
        (lambda: DataConfig(weights=(0.7, 0.2), train=TWO).check(), "add up to 0.9, not to 1: .* as 0.7778, 0.2222"),
        (lambda: DataConfig(weights=(1.3, -0.3), train=TWO).check(), r"weights is \(1.3, -0.3\): it must be above 0"),
        (lambda: DataConfig(weights=(0.7, 0.2, 0.1), train=TWO).check(), "3 shares, but data.train has 2 files"),
        (lambda: DataConfig(weights=(0.333333, 0.666667), train=TWO).check(), "at most 100,000 can be: round them"),
        (lambda: DataConfig(train=("a", " ")).check(), "a file is missing"),
        (lambda: DataConfig(train=("builtin", "a")).check(), "names `builtin` among other files"),
    ],
)
def test_what_cannot_be_batched_or_mixed_is_named(call, complaint):
    with pytest.raises(UserError, match=complaint):
        call()


def test_data_flows_one_way_from_text_to_the_loader():
    room, order = Path(jaxblock.data.__path__[0]), ("text", "tokens", "store", "mixture", "loader")
    for at, place in enumerate(order):
        files = list((room / place).glob("*.py")) or [room / f"{place}.py"]
        imported = {name for file in files for name in re.findall(r"jaxblock\.data\.(\w+)", file.read_text())}
        assert files and imported <= {*order[: at + 1], "config"}, place
