"""Decides which rows are decoded together, so that no place of a batch waits for another row's answer.

A batch decodes one block of each of its rows, which may stand at different blocks. After every block the rows that have ended
leave, and others take their places. Only rows of one shape share a batch, and a row's shape depends on nothing but the row, so
neither do its tokens. This module knows no device: ``BlockDecoder`` decodes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np


@dataclass(eq=False)
class Row:
    """Holds a prompt, and what is decoded of its response; or a text with masked spans, which begin after the prompt.

    Attributes:
        prompt: the prompt's tokens [P].
        index: what its random key comes from, the index of its prompt.
        response: the response's tokens [R], or those of a text from its first span on; masks where none is committed.
        commit_step: the step that committed each of them; -1 for a mask, ``decoder.GIVEN`` for a given token.
        nfe: the forward passes spent.
        positions: the canvas positions that those passes needed to compute, summed (token-forwards).
        computed: the positions that were computed for the row.
        block: the index of its block; in a text with spans, the response position where the block begins.
        ended: whether the response is complete.
        place: its place in the order of the rows, which the queue fills in.
    """

    prompt: np.ndarray
    index: int
    response: np.ndarray
    commit_step: np.ndarray
    nfe: int = 0
    positions: int = 0
    computed: int = 0
    block: int = 0
    ended: bool = False
    place: int = field(default=0, init=False)


@runtime_checkable
class BlockDecoder(Protocol):
    """Declares what decodes one block of a batch.

    Attributes:
        size: the number of rows that a batch has room for.
    """

    size: int

    def shape(self, row: Row) -> Hashable:
        """Returns the shape of the batches that the row's next block may be decoded in."""
        ...

    def start(self, shape: Any, rows: Sequence[Row]) -> Any:
        """Begins to decode the next block of at most ``size`` rows of one shape, and returns without waiting for the result."""
        ...

    def finish(self, started: Any, rows: Sequence[Row]) -> None:
        """Waits for the result of what ``start`` returned, and updates the rows."""
        ...


class Queue:
    """Decodes any number of rows, and hands them out in their order.

    Two batches are under way at a time: the host reads the results of one while the device works on the other. A batch that is
    not full starts only when nothing else is under way, because rows of the other batch may come to fill it. As long as more
    rows come, the first ones go first, so that their answers come early. At the end the rows with the fewest blocks decoded
    go first, so that no long answer is left to be decoded alone.
    """

    IN_FLIGHT = 2
    """The number of batches under way."""
    AHEAD = 16
    """The rows held, from the first that is not handed out to the last that is read, as a number of batches."""
    LAST = 4
    """The rows of one shape, as a number of batches, of which those with the fewest blocks go first when no more rows come."""

    def __init__(self, rows: Iterable[Row], decoder: BlockDecoder) -> None:
        """Prepares to decode rows, none of which is read yet.

        Args:
            rows: the rows, which are read while others are decoded.
            decoder: what decodes a batch.
        """
        self._source = iter(rows)
        self._count = 0
        self._decoder = decoder
        self._more = True
        self._problem: Exception | None = None
        self._held: deque[Row] = deque()
        self._waiting: dict[Hashable, list[Row]] = {}
        self._running: deque[tuple[list[Row], Any]] = deque()

    def __iter__(self) -> Iterator[Row]:
        """Yields the rows in their order, each when its response and those before it are complete.

        An error of the iterator that gives the rows is raised after the rows before it.
        """
        self._start()
        while self._running:
            rows, started = self._running.popleft()
            self._decoder.finish(started, rows)
            for row in rows:
                if not row.ended:
                    self._wait(row)
            complete = []
            while self._held and self._held[0].ended:
                complete.append(self._held.popleft())
            self._start()  # before the caller works on these rows, so that the device does not wait for it
            yield from complete
        if self._problem is not None:
            raise self._problem

    def _start(self) -> None:
        """Reads rows and starts batches, as many as may be held and under way."""
        while self._more and len(self._held) < self.AHEAD * self._decoder.size:
            self._read()
        while len(self._running) < self.IN_FLIGHT and (shape := self._next_shape()) is not None:
            rows = self._take(shape)
            self._running.append((rows, self._decoder.start(shape, rows)))

    def _read(self) -> None:
        """Reads the next row, if there is one."""
        try:
            row = next(self._source, None)
        except Exception as problem:  # whatever it is, it is raised again
            row, self._problem = None, problem
        if row is None:
            self._more = False
            return
        row.place, self._count = self._count, self._count + 1
        self._held.append(row)
        self._wait(row)

    def _wait(self, row: Row) -> None:
        """Puts a row among those of its shape that wait."""
        self._waiting.setdefault(self._decoder.shape(row), []).append(row)

    def _next_shape(self) -> Hashable | None:
        """Returns the shape of the next batch, which is that of the first row that can go; None where none should start."""
        full = [shape for shape, rows in self._waiting.items() if len(rows) >= self._decoder.size]
        if not full and self._running:
            return None
        first = {shape: min(row.place for row in self._waiting[shape]) for shape in full or self._waiting}
        return min(first, key=first.__getitem__, default=None)

    def _take(self, shape: Hashable) -> list[Row]:
        """Takes the rows of a batch out of those that wait."""
        rows, size = self._waiting.pop(shape), self._decoder.size
        last = not self._more and len(rows) <= self.LAST * size
        rows.sort(key=lambda row: (row.block if last else 0, row.place))
        if rows[size:]:
            self._waiting[shape] = rows[size:]
        return rows[:size]
