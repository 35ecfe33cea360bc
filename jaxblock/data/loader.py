"""Makes batches: pads rows, and orders them by a pure function of (seed, step).

The batch of step s holds rows s * batch_size to (s + 1) * batch_size of an endless shuffled list, in which every epoch is a
new permutation (with weights for several files, each file has epochs of its own: mixture.py). The rows of step s are computed
from s, so that a run that resumes there reads no earlier rows and a checkpoint stores no data state but the step. Process i of
n makes the i-th of n equal slices of each batch.

No other module pads rows or fills up a short batch.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np

from jaxblock.data.mixture import MixedOrder, Mixture
from jaxblock.data.store.records import Record, Records
from jaxblock.diffusion.config import Blocks, CanvasConfig
from jaxblock.errors import UserError

Item = TypeVar("Item")


class Batch(NamedTuple):
    """Holds B rows on the host, as int32 arrays; P and R are the numbers of prompt and response positions of the canvas.

    Attributes:
        prompt_ids: The prompts' ids [B, P], 0 after each prompt's end.
        prompt_len: The prompts' lengths [B].
        response_ids: The responses' ids [B, R], 0 after each response's end (the terminator is its last token; no fill).
        text_len: The responses' lengths [B].
        block: The active blocks [B] under `pairs`, else -1.
        index: The records' places in their split [B].
        row_id: The rows' places in the global batch [B].
    """

    prompt_ids: np.ndarray
    prompt_len: np.ndarray
    response_ids: np.ndarray
    text_len: np.ndarray
    block: np.ndarray
    index: np.ndarray  # type: ignore[assignment]  # hides tuple.index, which no batch needs
    row_id: np.ndarray


def pad_ids(rows: Sequence[Sequence[int] | np.ndarray], width: int) -> tuple[np.ndarray, np.ndarray]:
    """Lays rows of token ids out in one array, each starting at position 0 and followed by zeros.

    Args:
        rows: B rows of token ids, none longer than `width`.
        width: The number of positions of the array.

    Returns:
        (ids int32 [B, width], lengths int32 [B]).
    """
    ids = np.zeros((len(rows), width), np.int32)
    for row, values in zip(ids, rows, strict=True):
        row[: len(values)] = values
    return ids, np.array([len(values) for values in rows], np.int32)


def filled(rows: Sequence[Item], size: int) -> list[Item]:
    """Fills a short last batch up to `size` rows with copies of its first row, so that its shape needs no new compilation.

    The caller drops what is computed for the copies.
    """
    return [*rows, *([rows[0]] * (size - len(rows)))]


def pad_records(
    records: Sequence[Record],
    canvas: CanvasConfig,
    *,
    block: np.ndarray | None = None,
    row_id: np.ndarray | None = None,
) -> Batch:
    """Lays records out as the rows of a batch.

    Args:
        records: The records, one for each of the B rows.
        canvas: The canvas settings, which give P and R.
        block: The active block of each row, int32 [B]; None for -1.
        row_id: Each row's place in the global batch, int32 [B]; None for 0 to B - 1.

    Raises:
        UserError: If a record is longer than the canvas.
    """
    n = len(records)
    for record in records:
        for name, ids, limit in (
            ("prompt", record.prompt_ids, canvas.prompt_len),
            ("response", record.response_ids, canvas.response_len),
        ):
            if len(ids) > limit:
                raise UserError(
                    f"{record.source}: the {name} has {len(ids)} tokens, more than canvas.{name}_len = {limit}; "
                    f"set canvas.{name}_len to what the data were prepared with, or prepare them again"
                )
    prompt_ids, prompt_len = pad_ids([record.prompt_ids for record in records], canvas.prompt_len)
    response_ids, text_len = pad_ids([record.response_ids for record in records], canvas.response_len)
    return Batch(
        prompt_ids=prompt_ids,
        prompt_len=prompt_len,
        response_ids=response_ids,
        text_len=text_len,
        block=np.full(n, -1, np.int32) if block is None else block.astype(np.int32),
        index=np.array([record.index for record in records], np.int32),
        row_id=np.arange(n, dtype=np.int32) if row_id is None else row_id.astype(np.int32),
    )


def pairs_of(records: Sequence[Record], block: int) -> np.ndarray:
    """Lists the pairs (record, block) for every block that holds a token of the record's response: int32 [pairs, 2].

    Args:
        records: The records, in the order of the result.
        block: The number of response positions of a block.
    """
    if isinstance(records, Records):
        return list_pairs(records.lengths()[:, 1], block)
    return list_pairs(np.array([len(record.response_ids) for record in records], np.int32), block)


def list_pairs(response_len: np.ndarray, block: int) -> np.ndarray:
    """Lists the pairs (place, block) for every block that holds a token of the response at that place: int32 [pairs, 2].

    Args:
        response_len: The numbers of tokens of responses.
        block: The number of response positions of a block.
    """
    counts = -(-response_len // block)
    example = np.repeat(np.arange(len(counts)), counts)
    first = np.repeat(np.cumsum(counts) - counts, counts)
    return np.stack([example, np.arange(len(example)) - first], axis=1).astype(np.int32)


class BatchAt:
    """Makes this process's rows of the batch of any step. It holds no state, so threads and processes may share it."""

    def __init__(
        self,
        records: Sequence[Record],
        *,
        canvas: CanvasConfig,
        seed: int,
        batch_size: int,
        kind: Blocks = "per_sequence",
        mixture: Mixture | None = None,
        process_index: int = 0,
        process_count: int = 1,
    ) -> None:
        """Fixes the order of the rows.

        Args:
            records: The training records (worker processes need them picklable).
            canvas: The canvas settings, which give the lengths of a row and the block size.
            seed: The seed of the order of the rows, 0 or more.
            batch_size: The number of rows of the global batch, a multiple of `process_count`.
            kind: `per_sequence`: a row is a record; `pairs`: a row is a (record, block), each of which is used once per epoch.
            mixture: How several training files are mixed; None where every row is used once per epoch.
            process_index: The index of this process, which is that of its slice of each batch.
            process_count: The number of processes, and so of the slices of each batch.

        Raises:
            UserError: If there are no records, or the batch does not split evenly.
        """
        if batch_size < 1 or batch_size % process_count:
            raise UserError(
                f"train.batch_size = {batch_size} does not split over {process_count} processes: use a multiple of it"
            )
        self._records, self._canvas, self._batch_size = records, canvas, batch_size
        rows = batch_size // process_count
        self._rows = np.arange(process_index * rows, (process_index + 1) * rows)
        self._pairs = pairs_of(records, canvas.block) if kind == "pairs" else None
        n = len(records) if self._pairs is None else len(self._pairs)
        if not n:
            raise UserError("there are no records to make batches of")
        self.epoch = n
        """The number of rows, records or pairs, after which the order begins again."""
        if mixture is not None:
            places = np.arange(n) if self._pairs is None else self._pairs[:, 0]
            sizes = np.bincount(mixture.files_of(places), minlength=len(mixture.sizes)).tolist()
            self._order: Any = MixedOrder(tuple(sizes), mixture.weights, seed)
            return
        # Grain adds the epoch to the seed. The seed is hashed first, so that epoch 1 of seed 0 differs from epoch 0 of seed 1.
        hashed = int(np.random.SeedSequence([seed, 0xDA7A]).generate_state(1)[0])
        import grain  # here, since loading a model does not wait for it

        self._order = grain.MapDataset.range(n).shuffle(seed=hashed).repeat()

    def __call__(self, step: int) -> Batch:
        """Returns this process's slice of the batch of a step."""
        places = [int(self._order[int(step) * self._batch_size + row]) for row in self._rows.tolist()]
        block = None
        if self._pairs is not None:
            chosen = self._pairs[places]
            places, block = chosen[:, 0].tolist(), chosen[:, 1]
        return pad_records([self._records[place] for place in places], self._canvas, block=block, row_id=self._rows)


def batches(at: BatchAt, *, start_step: int = 0, workers: int = 0) -> Iterator[Batch]:
    """Makes endless batches, read ahead by threads or worker processes.

    Args:
        at: A function that makes the rows of a step's batch.
        start_step: The step of the first batch.
        workers: The number of worker processes; 0 reads ahead in two threads.

    Returns:
        A Grain iterator; its `close()` ends the workers at once.
    """
    import grain

    steps = grain.MapDataset.range(start_step, sys.maxsize).map(at)
    dataset = steps.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=4))
    if workers:
        from absl import flags

        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()  # Grain's worker processes read absl flags, and the defaults are right
        # A batch is small, so it is sent through the queue: shared memory would leak if the iterator were dropped midway.
        options = grain.experimental.DatasetOptions(min_shm_size=sys.maxsize)
        dataset = grain.experimental.WithOptionsIterDataset(dataset, options)
        dataset = dataset.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=2))
    return iter(dataset)
