"""Runs an evaluation: decodes problems and grades the responses, and estimates the NELBO of the reference responses."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxblock.data.loader import filled, pad_records
from jaxblock.data.store.records import Record
from jaxblock.data.tokens.encoding import Encoder
from jaxblock.data.tokens.special import first_stop
from jaxblock.diffusion import canvas as canvases
from jaxblock.diffusion import layouts, likelihood
from jaxblock.diffusion.canvas import Layout
from jaxblock.diffusion.config import CanvasConfig
from jaxblock.diffusion.decoding.config import DecodeConfig
from jaxblock.diffusion.decoding.queue import Queue
from jaxblock.evaluation.graders import Grader
from jaxblock.evaluation.results import NelboBound, Solved
from jaxblock.evaluation.statistics import mean_se, ratio_se, wilson
from jaxblock.inference import DeviceDecoder
from jaxblock.models.spec import count_params
from jaxblock.models.transformer import Transformer
from jaxblock.parallel.compiling import quick_options
from jaxblock.parallel.rows import devices_of, even_size, split_rows, whole_results
from jaxblock.types import Params


@dataclass(frozen=True)
class Evaluator:
    """Evaluates parameters, also repeatedly during a run.

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

    def solve(
        self, params: Params, records: Sequence[Record], progress: Callable[[int], None] = lambda done: None
    ) -> Solved:
        """Decodes and grades records; each is graded while others are decoded.

        Args:
            params: the weights.
            records: the problems; a prompt's random key comes from its record's index.
            progress: called with the number of problems that are done, each time as many as a batch holds are, and at the end.

        Returns:
            The graded responses, and what decoding took.

        Raises:
            UserError: the decoder's block size does not divide the response's length.
        """
        layout = layouts.decoding_layout(self.canvas, self.decode, self.net.arch, self.encoder.special.stop_ids)
        device = DeviceDecoder(
            self.net, layout, self.decode, params, prompt_len=self.canvas.prompt_len, rows=len(records)
        )
        device.compile(record.prompt_ids for record in records)
        rows: list[dict[str, Any]] = []
        begin, told = time.perf_counter(), 0
        queue = Queue((device.row(record.prompt_ids, record.index) for record in records), device)
        for record, row in zip(records, queue, strict=True):
            rows.append(self._graded(record, row.response, row.nfe, layout.stop_ids))
            if len(rows) in (told + device.size, len(records)):
                told = len(rows)
                progress(told)
        seconds = time.perf_counter() - begin
        return Solved(rows, wilson(sum(row["correct"] for row in rows), len(rows)), seconds, device.costs)

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
        """Estimates the NELBO of the records' own responses, in the canvas's own blocks (``canvas.block``).

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
        options = quick_options(devices_of(params), count_params(self.net.param_table))
        where = whole_results(params)
        run = jax.jit(_nelbo_of_rows, static_argnums=(0, 1, 2), out_shardings=where, compiler_options=options)
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
