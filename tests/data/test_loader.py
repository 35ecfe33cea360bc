"""Records survive their files, and every batch is a pure function of seed and step."""

import dataclasses
import itertools
import pickle
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxblock.data
from jaxblock.data import loader
from jaxblock.data.loader import Batch, BatchAt
from jaxblock.data.store import records
from jaxblock.data.store.records import Record, Records, decode_record, encode_record, record_writer, with_index
from jaxblock.diffusion.config import CanvasConfig
from jaxblock.errors import UserError

CANVAS = CanvasConfig(prompt_len=8, response_len=12, block=4)


def record(index: int, n_prompt: int, n_response: int) -> Record:
    prompt = np.arange(100 * index, 100 * index + n_prompt, dtype=np.int32)
    response = -1 - prompt[:1].repeat(n_response)
    return Record(prompt, response, f"q{index}", f"à{index}", f"some.jsonl:{index + 1}", index)


RECORDS = [record(i, 1 + i % 8, 1 + (5 * i) % 12) for i in range(23)]


def same(a: Batch, b: Batch) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


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
    assert [record.prompt for record in again] == [f"q{i}" for i in range(23)]
    assert [record.index for record in again[-2:]] == [21, 22] and again[-1].index == 22
    np.testing.assert_array_equal(again.lengths(), [[1 + i % 8, 1 + (5 * i) % 12] for i in range(23)])
    np.testing.assert_array_equal(again.lengths(every=5), again.lengths()[::5])
    with pytest.raises(IndexError):
        again[23]


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
    with pytest.raises(UserError, match="some.jsonl:1: the response has 13 tokens, more than canvas.response_len = 12"):
        loader.pad_records([record(0, 1, 13)], CANVAS)

    ids, lengths = loader.pad_ids([[1, 2], np.array([3, 4, 5]), []], 4)
    assert ids.tolist() == [[1, 2, 0, 0], [3, 4, 5, 0], [0, 0, 0, 0]] and lengths.tolist() == [2, 3, 0]
    assert ids.dtype == lengths.dtype == np.int32
    # A short batch is filled with its first row.
    assert loader.filled(["a", "b"], 4) == ["a", "b", "a", "a"] and loader.filled(("a", "b"), 2) == ["a", "b"]


@pytest.mark.parametrize("kind", ["per_sequence", "pairs"])
def test_an_epoch_visits_everything_once_and_each_epoch_is_shuffled_anew(kind):
    expected = [(i, -1) for i in range(23)]
    if kind == "pairs":
        expected = [(i, k) for i, record in enumerate(RECORDS) for k in range(-(-len(record.response_ids) // 4))]
    n = len(expected)

    def epoch(seed: int, number: int) -> list[tuple[int, int]]:
        at = BatchAt(RECORDS, canvas=CANVAS, seed=seed, batch_size=1, kind=kind)
        return [(int(row.index[0]), int(row.block[0])) for row in map(at, range(number * n, (number + 1) * n))]

    epochs = [epoch(3, number) for number in range(3)]
    assert all(Counter(rows) == Counter(expected) for rows in epochs)
    assert all(a != b for a, b in itertools.combinations([*epochs, sorted(epochs[0])], 2))
    assert epoch(2, 1) not in epochs, "neighbouring seeds are not each other's epochs"


steps, kinds = st.integers(0, 10**9), st.sampled_from(["per_sequence", "pairs"])


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**40), step=steps, kind=kinds, n=st.sampled_from([2, 3, 6]))
def test_slices_of_processes_make_up_the_batch(seed, step, kind, n):
    def at(index: int, count: int) -> Batch:
        options = {"canvas": CANVAS, "seed": seed, "batch_size": 12, "kind": kind}
        return BatchAt(RECORDS, **options, process_index=index, process_count=count)(step)

    whole = at(0, 1)
    assert whole.row_id.tolist() == list(range(12))
    assert same(Batch(*map(np.concatenate, zip(*(at(i, n) for i in range(n)), strict=True))), whole)


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])  # starting them takes seconds
def test_a_start_at_any_step_and_any_worker_count_give_the_same_batches(source, workers):
    at, of_file = (BatchAt(rows, canvas=CANVAS, seed=1, batch_size=6, kind="pairs") for rows in (RECORDS, source))
    for start in (13,) if workers else (0, 13):
        batches = loader.batches(of_file, start_step=start, workers=workers)
        for step, batch in zip(range(start, start + 9), batches, strict=False):
            assert isinstance(batch, Batch) and same(batch, at(step))
        batches.close()


def test_what_cannot_be_batched():
    for rows, options, complaint in [
        (RECORDS, {"batch_size": 5, "process_count": 2}, "train.batch_size = 5 does not split over 2 processes"),
        (RECORDS, {"batch_size": 0}, "train.batch_size = 0"),
        ([], {"batch_size": 1}, "no records"),
    ]:
        with pytest.raises(UserError, match=complaint):
            BatchAt(rows, canvas=CANVAS, seed=0, **options)


def test_data_flows_one_way_from_text_to_the_loader():
    room, order = Path(jaxblock.data.__path__[0]), ("text", "tokens", "store", "mixture", "loader")
    for at, place in enumerate(order):
        files = list((room / place).glob("*.py")) or [room / f"{place}.py"]
        imported = {name for file in files for name in re.findall(r"jaxblock\.data\.(\w+)", file.read_text())}
        assert files and imported <= {*order[: at + 1], "config"}, place
