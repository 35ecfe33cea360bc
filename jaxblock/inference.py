"""Decodes any number of prompts on the devices that hold the weights, in batches that never wait (``diffusion.decoding.queue``)."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import Array
from jax.sharding import NamedSharding

from jaxblock.diffusion.canvas import Layout, decoding_canvas
from jaxblock.diffusion.decoding import decoder
from jaxblock.diffusion.decoding.config import DecodeConfig
from jaxblock.diffusion.decoding.passes import Sizes
from jaxblock.diffusion.decoding.queue import Queue, Row
from jaxblock.diffusion.decoding.shapes import BatchShape, BatchShapes
from jaxblock.models.transformer import Transformer
from jaxblock.parallel.rows import even_size, on_mesh_of, split_rows, whole_results
from jaxblock.types import Params


class BatchState(NamedTuple):
    """Holds the state of a batch's rows before a block, on the host.

    Attributes:
        ids: the tokens of the canvas [B, T]; what is not committed yet is a mask.
        prompt_len: the tokens of each prompt [B].
        length: the visible positions of each row [B].
        row_id: the index of each prompt [B].
        block: the next block of each row [B].
        commit_step: the step that committed each response position [B, R]; -1 for a mask, ``decoder.GIVEN`` for a given token.
        done: which places hold no row [B].
        nfe: the forward passes spent on each row [B].
        positions: the canvas positions that those passes needed to compute [B].
        computed: the positions that were computed for the row [B].
    """

    ids: np.ndarray
    prompt_len: np.ndarray
    length: np.ndarray
    row_id: np.ndarray
    block: np.ndarray
    commit_step: np.ndarray
    done: np.ndarray
    nfe: np.ndarray
    positions: np.ndarray
    computed: np.ndarray


class BlockResult(NamedTuple):
    """Holds what decoding a block changes in a ``BatchState``.

    The program returns nothing that it was only given: with rows split over devices, such an array is gathered independently of
    the decoder's loop, and XLA on a CPU may run the two in another order on each device, which then wait for one another for ever.
    """

    ids: Array
    commit_step: Array
    done: Array
    nfe: Array
    positions: Array
    computed: Array


@dataclass
class Costs:
    """Counts what decoding took, and what of it the rows needed: the rest is padding and places that waited.

    Attributes:
        row_blocks: the blocks decoded of all rows.
        row_blocks_computed: the blocks decoded of all places of all batches.
        token_forwards: the canvas positions that the rows' forward passes needed, summed over rows and passes.
        token_forwards_computed: the positions that were computed.
    """

    row_blocks: int = 0
    row_blocks_computed: int = 0
    token_forwards: int = 0
    token_forwards_computed: int = 0

    def ratios(self) -> tuple[float, float]:
        """Returns what was computed over what was needed, of the blocks and of the token-forwards; NaN where nothing was decoded."""
        if not self.row_blocks:
            return float("nan"), float("nan")
        return self.row_blocks_computed / self.row_blocks, self.token_forwards_computed / self.token_forwards

    def __str__(self) -> str:
        """Returns what was computed and needed, in one line."""
        blocks, positions = self.ratios()
        return (
            f"computed / needed: {self.row_blocks_computed:,} / {self.row_blocks:,} blocks of rows ({blocks:.2f}), "
            f"{self.token_forwards_computed:,} / {self.token_forwards:,} token-forwards ({positions:.2f})"
        )


class DeviceDecoder:
    """Decodes one block of a batch of rows on the devices that hold the weights (see ``queue.BlockDecoder``).

    One program is compiled for each shape. All that a row is between two blocks comes back to the host and is sent again, a few
    kilobytes a row, so that any rows can share a batch.
    """

    def __init__(
        self, net: Transformer, layout: Layout, options: DecodeConfig, params: Params, *, prompt_len: int, rows: int
    ) -> None:
        """Prepares to decode; a program is compiled when a batch first needs it, or by ``compile``.

        Args:
            net: the network.
            layout: the layout of the decoder's canvas.
            options: the decoder's settings.
            params: the network's weights.
            prompt_len: the usual longest prompt (``canvas.prompt_len``); longer ones take further programs.
            rows: how many rows there are, if they are fewer than ``options.batch_size``.
        """
        self.size = even_size(params, min(options.batch_size, max(rows, 1)))
        self.costs = Costs()
        self._layout, self._params = layout, params
        self._static = (net, layout, options.static(layout.block))
        self._shapes = BatchShapes(layout, self._static[2], prompt_len, net.arch.max_len)
        # The low 32 bits, of which JAX makes the key.
        self._seed = np.array(options.seed % 2**32, np.uint32).view(np.int32)

    def row(
        self, prompt: np.ndarray | Sequence[int], index: int, response: np.ndarray | Sequence[int] | None = None
    ) -> Row:
        """Returns a prompt's row, of which nothing is decoded.

        Args:
            prompt: the prompt's tokens.
            index: the row's index, from which its random key comes.
            response: the tokens of a text after the prompt, with masks from its first one on where it is to be filled, at most R
                (the layout then says ``infill``); None for R masks.
        """
        masks = np.full(self._layout.response_len, self._layout.mask_id, np.int32)
        tokens = masks if response is None else np.array(response, np.int32)
        given = np.where(tokens == self._layout.mask_id, -1, decoder.GIVEN).astype(np.int32)
        return Row(np.asarray(prompt, np.int32), index, tokens, given)

    def shape(self, row: Row) -> BatchShape:
        """Returns the shape of the batches that the row's next block is decoded in."""
        return self._shapes.of_block(len(row.prompt), row.block)

    def compile(self, prompts: Iterable[np.ndarray]) -> None:
        """Compiles the programs that decode these prompts, by running them on batches without rows."""
        lengths = {len(prompt) for prompt in prompts}
        shapes = {self._shapes.of_block(n, block) for n in lengths for block in range(self._layout.n_blocks)}
        for shape in sorted(shapes):  # in the same order in every process
            jax.block_until_ready(self._run(shape, ()))

    def start(self, shape: BatchShape, rows: Sequence[Row]) -> Any:
        """Begins to decode the next block of rows of one shape."""
        found = self._run(shape, rows)
        for leaf in found:
            leaf.copy_to_host_async()
        return found

    def finish(self, started: Any, rows: Sequence[Row]) -> None:
        """Waits for the results of a batch, and updates its rows."""
        layout, found = self._layout, BlockResult(*jax.device_get(started))
        self.costs.row_blocks += len(rows)
        self.costs.row_blocks_computed += self.size
        self.costs.token_forwards_computed += int(found.computed.sum()) - sum(row.computed for row in rows)
        for at, row in enumerate(rows):
            self.costs.token_forwards += int(found.positions[at]) - row.positions
            size = len(row.response)
            row.response[:] = found.ids[at, len(row.prompt) :][:size]
            row.commit_step = np.array(found.commit_step[at, :size])  # a view would keep the whole batch
            row.nfe, row.positions, row.computed = (int(n[at]) for n in (found.nfe, found.positions, found.computed))
            masks = np.flatnonzero(row.response == layout.mask_id)
            row.ended = bool(found.done[at]) or not masks.size
            if row.ended:
                row.response[masks] = layout.fill_id
            else:
                row.block = int(masks[0]) // layout.stride

    def _run(self, shape: BatchShape, rows: Sequence[Row]) -> BlockResult:
        """Starts the program of a shape; every process of a group must call it with the same rows."""
        with on_mesh_of(self._params):
            return _compiled(whole_results(self._params))(*self._arguments(shape, rows))

    def _arguments(self, shape: BatchShape, rows: Sequence[Row]) -> tuple[Any, ...]:
        """Returns the program's arguments, the rows split over the devices."""
        batch = split_rows(self._params, self._batch(shape.room, rows))
        return (*self._static, shape.sizes, self._params, self._seed, *batch)

    def _batch(self, room: int, rows: Sequence[Row]) -> BatchState:
        """Lays rows out as a batch; the places that are left are done."""
        size, layout = self.size, self._layout
        zeros = np.zeros((7, size), np.int32)
        batch = BatchState(
            ids=np.full((size, room + layout.response_len), layout.mask_id, np.int32),
            prompt_len=zeros[0] + 1,
            row_id=zeros[1],
            block=zeros[2],
            commit_step=np.full((size, layout.response_len), -1, np.int32),
            done=np.arange(size) >= len(rows),
            nfe=zeros[3],
            positions=zeros[4],
            computed=zeros[5],
            length=zeros[6] + 1,
        )
        for at, row in enumerate(rows):
            tokens = np.concatenate([row.prompt, row.response])
            batch.ids[at, : len(tokens)], batch.length[at] = tokens, len(tokens)
            batch.prompt_len[at], batch.row_id[at], batch.block[at] = len(row.prompt), row.index, row.block
            batch.commit_step[at, : len(row.response)] = row.commit_step
            batch.nfe[at], batch.positions[at], batch.computed[at] = row.nfe, row.positions, row.computed
        return batch


def decode_many(
    net: Transformer,
    layout: Layout,
    options: DecodeConfig,
    params: Params,
    prompts: Iterable[np.ndarray],
    *,
    prompt_len: int,
    first_index: int = 0,
) -> Iterator[Row]:
    """Decodes prompts and yields their rows in the prompts' order, each as soon as it and those before it are complete.

    Args:
        net: the network.
        layout: the layout of the decoder's canvas.
        options: the decoder's settings.
        params: the network's weights.
        prompts: the prompts' ids; they are read while others are decoded, a bounded number ahead.
        prompt_len: the usual longest prompt (``canvas.prompt_len``).
        first_index: the index of the first prompt; a prompt's random key comes from its index.
    """
    source, first = iter(prompts), list[np.ndarray]()
    try:
        first.extend(itertools.islice(source, options.batch_size))
    except Exception as problem:  # whatever it is, it is raised again, after the prompts before it
        source = _raising(problem)
    device = DeviceDecoder(net, layout, options, params, prompt_len=prompt_len, rows=len(first))
    rows = (device.row(prompt, at) for at, prompt in enumerate(itertools.chain(first, source), first_index))
    yield from Queue(rows, device)


def _raising(problem: Exception) -> Iterator[np.ndarray]:
    """Returns an iterator whose first item is an error."""
    raise problem
    yield


@functools.cache
def _compiled(results: NamedSharding | None) -> Callable[..., BlockResult]:
    """Returns the compiled program, whose results go where ``results`` says."""
    return jax.jit(_decode_block, static_argnums=(0, 1, 2, 3), out_shardings=results)


def _decode_block(
    net: Transformer, layout: Layout, options: DecodeConfig, sizes: Sizes, params: Params, seed: Array, *batch: Array
) -> BlockResult:
    """Decodes the next block of every row of a ``BatchState``, and returns what that changes."""
    ids, prompt_len, length, row_id, block, commit_step, done, nfe, positions, computed = batch
    canvas = decoding_canvas(layout, ids, prompt_len, row_id, length)
    start = decoder.start_decoding(layout, canvas, seed)._replace(
        commit_step=commit_step, done=done, nfe=nfe, positions=positions, computed=computed
    )
    end = decoder.decode_block(net, layout, options, params, canvas, start, block, sizes)
    return BlockResult(end.ids, end.commit_step, end.done, end.nfe, end.positions, end.computed)
