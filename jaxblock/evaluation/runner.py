"""Runs an evaluation: decodes problems and grades the responses, and estimates the NELBO of the reference responses."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.stages import Compiled

from jaxblock.data.loader import filled, pad_ids, pad_records
from jaxblock.data.store.records import Record
from jaxblock.data.tokens.encoding import Encoder
from jaxblock.data.tokens.special import first_stop
from jaxblock.diffusion import canvas as canvases
from jaxblock.diffusion import layouts, likelihood
from jaxblock.diffusion.canvas import Layout
from jaxblock.diffusion.config import CanvasConfig
from jaxblock.diffusion.decoding import decoder
from jaxblock.diffusion.decoding.config import DecodeConfig
from jaxblock.evaluation.graders import Grader
from jaxblock.evaluation.results import NelboBound, Solved
from jaxblock.evaluation.statistics import mean_se, ratio_se, wilson
from jaxblock.models.transformer import Transformer
from jaxblock.parallel.rows import even_size, split_rows, whole_results
from jaxblock.types import Params


@dataclass(frozen=True)
class Evaluator:
    """Evaluates parameters, also repeatedly during a run; the decoder is compiled once and kept for later calls.

    Attributes:
        net: the network.
        canvas: the sizes of the canvas.
        encoder: the tokenizer and chat template.
        decode: the decoder's options.
        grader: the grader (``graders.find_grader``).
        nelbo_samples: the number of masked sets drawn for each block; None draws as many as the block has positions.
    """

    net: Transformer
    canvas: CanvasConfig
    encoder: Encoder
    decode: DecodeConfig
    grader: Grader
    nelbo_samples: int | None = None
    _compiled: dict[Any, Compiled] = field(default_factory=dict, init=False, repr=False, compare=False)

    def solve(
        self, params: Params, records: Sequence[Record], progress: Callable[[int], None] = lambda done: None
    ) -> Solved:
        """Decodes and grades records, in batches of one shape.

        Args:
            params: the weights.
            records: the problems; a prompt's random key comes from its record's index.
            progress: called after each batch with the number of problems that are done.

        Returns:
            The graded responses and the time that decoding took.

        Raises:
            UserError: the decoder's block size does not divide the response's length.
        """
        layout = layouts.decoding_layout(self.canvas, self.decode, self.net.arch, self.encoder.special.stop_ids)
        options = self.decode.static(layout.block)
        size = even_size(params, min(self.decode.batch_size, max(len(records), 1)))
        batches = [records[at : at + size] for at in range(0, len(records), size)]
        inputs = [self._prompts(batch, size) for batch in batches]
        rows: list[dict[str, Any]] = []
        seconds = 0.0
        if inputs:
            run = self._decoder(params, layout, options, inputs[0])
        for batch, arrays in zip(batches, inputs, strict=True):
            begin = time.perf_counter()
            found = jax.device_get(run(params, *split_rows(params, arrays)))
            seconds += time.perf_counter() - begin
            for at, record in enumerate(batch):
                rows.append(self._graded(record, found.response[at], int(found.nfe[at]), layout.stop_ids))
            progress(len(rows))
        return Solved(rows, wilson(sum(row["correct"] for row in rows), len(rows)), seconds)

    def _decoder(
        self, params: Params, layout: Layout, options: DecodeConfig, inputs: tuple[np.ndarray, ...]
    ) -> Compiled:
        """Returns the decoder, compiled for the shapes of the weights and of a batch of inputs.

        It is compiled before the first batch, so that the measured time of decoding does not include compilation, and kept,
        so that a run compiles it once.
        """
        given = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype, getattr(leaf, "sharding", None)), (params, inputs))
        leaves, tree = jax.tree.flatten(given)
        key = (layout, options, self.decode.seed, tuple(leaves), tree)
        if key not in self._compiled:
            make = jax.jit(decoder.decode_prompts, static_argnums=(0, 1, 2, 4), out_shardings=whole_results(params))
            rows = split_rows(params, inputs)
            lowered = make.lower(self.net, layout, options, params, self.decode.seed, *rows)
            self._compiled[key] = lowered.compile()
        return self._compiled[key]

    def _prompts(self, batch: Sequence[Record], size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns the prompts [size, P], their lengths and their records' indices; a short last batch is filled up."""
        records = filled(batch, size)
        ids, lengths = pad_ids([record.prompt_ids for record in records], self.canvas.prompt_len)
        return ids, lengths, np.array([record.index for record in records], np.int32)

    def _graded(self, record: Record, response: np.ndarray, nfe: int, stop_ids: tuple[int, ...]) -> dict[str, Any]:
        """Returns the row of the per-problem file for a decoded response [R]."""
        ids = response.tolist()
        end = first_stop(ids, stop_ids)
        text = self.encoder.tokenizer.decode(ids[:end])
        verdict = self.grader(text, record)
        row = {
            "index": record.index,
            "source": record.source,
            "grader": self.grader.name,
            "correct": verdict.correct,
            "extracted": verdict.extracted,
            "expected": verdict.expected,
            "prompt": record.prompt,
            "response": text,
            "reference": record.response,
            "stopped": end is not None,
            "tokens": len(ids) if end is None else end + 1,
            "nfe": nfe,
        }
        if self.grader.version is not None:
            row["grader_version"] = self.grader.version
        if verdict.undecided is not None:
            row["undecided"] = verdict.undecided
        return row

    def estimate_nelbo(self, params: Params, records: Sequence[Record], seed: int = 0) -> NelboBound:
        """Estimates the NELBO of the records' own responses under the decoder's blocks.

        Args:
            params: the weights.
            records: the prompts and responses; at least one.
            seed: the seed of the random masks.

        Returns:
            The NELBO with standard errors, and its parts by block and by masked count.
        """
        layout = layouts.scoring_layout(self.canvas, self.net.arch, self.encoder.special.stop_ids)
        samples = self.nelbo_samples or layout.block
        size = even_size(params, min(self.decode.batch_size, len(records)))
        run = jax.jit(_nelbo_of_rows, static_argnums=(0, 1, 2), out_shardings=whole_results(params))
        parts = []
        for at in range(0, len(records), size):
            batch = pad_records(filled(records[at : at + size], size), self.canvas)
            keep = np.arange(size) < len(records) - at
            ids = (batch.prompt_ids, batch.prompt_len, batch.response_ids, batch.text_len, batch.index)
            rows = split_rows(params, (keep, *ids))
            found = jax.device_get(run(self.net, layout, samples, params, jax.random.key(seed), *rows))
            per_row = found.per_block[keep], found.variance[keep], batch.text_len[keep]
            parts.append((*per_row, np.stack(found.by_count)[None]))
        per_block, variance, text_len, by_count = (np.concatenate(part) for part in zip(*parts, strict=True))
        total = per_block.sum(1)
        rows_with_block = np.arange(layout.n_blocks)[:, None] < -(-text_len // layout.block)
        return NelboBound(
            per_sequence=mean_se(total),
            per_text_token=ratio_se(total, text_len),
            mask_se=float(np.sqrt(variance.sum()) / len(total)),
            exact=likelihood.is_exact(layout, samples),
            by_block=_means(per_block.sum(0, dtype=np.float64), rows_with_block.sum(1)),
            by_count=_means(*by_count.sum(0)),
        )


def _means(totals: np.ndarray, counts: np.ndarray) -> list[tuple[float, int]]:
    """Returns pairs (total divided by count, count); the first is NaN where the count is 0."""
    return [(float(t / n) if n else float("nan"), int(n)) for t, n in zip(totals, counts, strict=True)]


def _nelbo_of_rows(
    net: Transformer, layout: Layout, samples: int, params: Params, key: Array, keep: Array, *rows: Array
) -> likelihood.Nelbo:
    """Estimates the NELBO of a batch of rows (``canvas.from_rows``); rows that are not kept only fill up the batch."""
    canvas = canvases.from_rows(layout, *rows)
    # A row with no blocks adds nothing to the sums by count.
    canvas = canvas._replace(n_blocks=jnp.where(keep, canvas.n_blocks, 0))
    return likelihood.nelbo(net, layout, samples, params, canvas, key)
