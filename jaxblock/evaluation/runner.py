"""Runs an evaluation: decode problems and grade them, estimate the NELBO, and write down both."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

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
from jaxblock.evaluation.graders import grader
from jaxblock.evaluation.statistics import Estimate, Proportion, mean_se, ratio_se, wilson
from jaxblock.models.transformer import Transformer
from jaxblock.parallel import rules
from jaxblock.types import Params


class Solved(NamedTuple):
    """Problems decoded and graded.

    Attributes:
        rows: one per problem, for the per-problem file.
        pass_at_1: how many were right, with a 95% interval.
        nfe: mean forward passes a problem.
        tokens: text tokens decoded (terminator counted; neither prompt nor fill).
        seconds: wall time of decoding, compilation not counted.
    """

    rows: list[dict[str, Any]]
    pass_at_1: Proportion
    nfe: float
    tokens: int
    seconds: float

    @property
    def tokens_per_forward(self) -> float:
        """TPF: text tokens committed per forward pass of a row."""
        spent = sum(row["nfe"] for row in self.rows)
        return self.tokens / spent if spent else float("nan")

    @property
    def tokens_per_second(self) -> float:
        """Text tokens per second of the whole batch; prompt tokens are not counted."""
        return self.tokens / self.seconds if self.seconds else float("nan")


class Bound(NamedTuple):
    """The NELBO of a set of responses, in nats.

    Attributes:
        per_sequence: mean over sequences, with the standard error over them (data and masks).
        per_text_token: sum over sum of text tokens (terminator counted, fill not).
        mask_se: standard error of ``per_sequence.mean`` that the masks drawn leave; 0 where exact.
        exact: whether every masked set was enumerated.
        by_block: (mean NELBO of block k, how many sequences have it).
        by_count: (mean -log p of a masked token in blocks with l masks, how many tokens).
    """

    per_sequence: Estimate
    per_text_token: Estimate
    mask_se: float
    exact: bool
    by_block: list[tuple[float, int]]
    by_count: list[tuple[float, int]]


@dataclass(frozen=True)
class Evaluator:
    """Evaluates parameters as they change: compiles once, is called many times.

    Attributes:
        net: the network.
        canvas: sizes of the canvas.
        encoder: tokenizer and template.
        decode: the decoder's options.
        grader: the grader's name.
        nelbo_samples: masked sets per block.
    """

    net: Transformer
    canvas: CanvasConfig
    encoder: Encoder
    decode: DecodeConfig
    grader: str
    nelbo_samples: int | None = None
    _compiled: dict[Any, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def layout(self) -> Layout:
        """The decoder's canvas.

        Raises:
            UserError: the block does not divide the response.
        """
        return layouts.decoding_layout(self.canvas, self.decode, self.net.arch, self.encoder.special.stop_ids)

    def solve(
        self, params: Params, records: Sequence[Record], progress: Callable[[int], None] = lambda done: None
    ) -> Solved:
        """Decodes and grades records, in batches of one shape.

        Args:
            params: the weights.
            records: the problems; a prompt's random key comes from its record's index.
            progress: told how many problems are done.

        Returns:
            Verdicts and costs.
        """
        layout = self.layout
        options = self.decode.static(layout.block)
        size = min(self.decode.batch_size, max(len(records), 1))
        batches = [records[at : at + size] for at in range(0, len(records), size)]
        inputs = [self._prompts(batch, size) for batch in batches]
        rows: list[dict[str, Any]] = []
        spent, tokens = 0.0, 0
        if inputs:
            run = self._decoder(params, layout, options, inputs[0])
        for batch, arrays in zip(batches, inputs, strict=True):
            begin = time.perf_counter()
            found = jax.device_get(run(params, *_split_rows(params, arrays)))
            spent += time.perf_counter() - begin
            for at, record in enumerate(batch):
                rows.append(self._graded(record, found.response[at], int(found.nfe[at]), layout.stop_ids))
                tokens += rows[-1]["tokens"]
            progress(len(rows))
        correct = sum(row["correct"] for row in rows)
        nfe = float(np.mean([row["nfe"] for row in rows])) if rows else float("nan")
        return Solved(rows, wilson(correct, len(rows)), nfe, tokens, spent)

    def _decoder(self, params: Params, layout: Layout, options: DecodeConfig, inputs: tuple[Any, ...]) -> Any:
        """The decoder compiled for these shapes, ahead, so that the time of decoding is the time of decoding; kept, so that
        the evaluations of a run compile once."""
        given = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype, getattr(leaf, "sharding", None)), (params, inputs))
        leaves, tree = jax.tree.flatten(given)
        key = (layout, options, self.decode.seed, tuple(leaves), tree)
        if key not in self._compiled:
            make = jax.jit(_decode_prompts, static_argnums=(0, 1, 2, 4), out_shardings=_everywhere(params))
            rows = _split_rows(params, inputs)
            lowered = make.lower(self.net, layout, options, params, self.decode.seed, *rows)
            self._compiled[key] = lowered.compile()
        return self._compiled[key]

    def _prompts(self, batch: Sequence[Record], size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns the prompts [size, P], their lengths and their records' indices; a short last batch is filled up."""
        records = filled(batch, size)
        ids, lengths = pad_ids([record.prompt_ids for record in records], self.canvas.prompt_len)
        return ids, lengths, np.array([record.index for record in records], np.int32)

    def _graded(self, record: Record, response: np.ndarray, nfe: int, stop_ids: tuple[int, ...]) -> dict[str, Any]:
        ids = response.tolist()
        end = first_stop(ids, stop_ids)
        text = self.encoder.tokenizer.decode(ids[:end])
        verdict = grader(self.grader)(text, record.response)
        return {
            "index": record.index,
            "source": record.source,
            "grader": self.grader,
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

    def bound(self, params: Params, records: Sequence[Record], seed: int = 0) -> Bound:
        """The NELBO of the records' own responses under the decoder's blocks.

        Args:
            params: the weights.
            records: prompts and responses.
            seed: of the masks.

        Returns:
            Means with standard errors, and the breakdowns.
        """
        layout = layouts.scoring_layout(self.canvas, self.net.arch, self.encoder.special.stop_ids)
        samples = self.nelbo_samples or layout.block
        size = min(64, len(records))
        run = jax.jit(_nelbo_of_rows, static_argnums=(0, 1, 2), out_shardings=_everywhere(params))
        values, errors, blocks, lengths, counts = [], [], [], [], []
        for at in range(0, len(records), size):
            part = records[at : at + size]
            batch = pad_records(filled(part, size), self.canvas)
            ids = (batch.prompt_ids, batch.prompt_len, batch.response_ids, batch.text_len, batch.index)
            keep = np.arange(size) < len(part)
            rows = _split_rows(params, (keep, *ids))
            found = jax.device_get(run(self.net, layout, samples, params, jax.random.key(seed), *rows))
            values.append(found.per_block[keep])
            errors.append(found.variance[keep])
            lengths.append(batch.text_len[keep])
            blocks.append(-(-batch.text_len[keep] // layout.block))
            counts.append(np.stack(found.by_count, -1))
        per_block, text = np.concatenate(values), np.concatenate(lengths)
        has = np.arange(layout.n_blocks) < np.concatenate(blocks)[:, None]
        total, variance = per_block.sum(1), np.concatenate(errors).sum(1)
        by_count = np.sum(counts, 0)
        return Bound(
            per_sequence=mean_se(total),
            per_text_token=ratio_se(total, text),
            mask_se=float(np.sqrt(variance.sum()) / len(total)),
            exact=likelihood.is_exact(layout, samples),
            by_block=[
                (float(per_block[has[:, k], k].mean()) if has[:, k].any() else float("nan"), int(has[:, k].sum()))
                for k in range(layout.n_blocks)
            ],
            by_count=[(float(s / w) if w else float("nan"), int(w)) for s, w in by_count],
        )


def _everywhere(params: Params) -> Any:
    """The results' place: whole on every device, so that each process of a group can read them."""
    place = jax.tree.leaves(params)[0].sharding
    return rules.replicated(place.mesh) if isinstance(place, NamedSharding) else None


def _split_rows(params: Params, arrays: tuple[np.ndarray, ...]) -> tuple[Any, ...]:
    """Rows as parts of global arrays, each device its own, where they divide among the devices; else as they are, whole on
    every device. Every process has all of them."""
    place = jax.tree.leaves(params)[0].sharding
    if not isinstance(place, NamedSharding) or not isinstance(place.mesh, Mesh):
        return arrays
    where = rules.sharding(place.mesh, "batch")
    try:
        where.shard_shape(arrays[0].shape)
    except ValueError:
        where = rules.replicated(place.mesh)
    return tuple(jax.make_array_from_callback(rows.shape, where, rows.__getitem__) for rows in arrays)


def _decode_prompts(net, layout, options, params, seed, prompt_ids, prompt_len, index):  # type: ignore[no-untyped-def]
    canvas = canvases.for_decoding(layout, prompt_ids, prompt_len, index)
    return decoder.decode(net, layout, options, params, canvas, seed)


def _nelbo_of_rows(  # type: ignore[no-untyped-def]
    net, layout, samples, params, key, keep, prompt_ids, prompt_len, response_ids, text_len, index
):
    canvas = canvases.from_rows(layout, prompt_ids, prompt_len, response_ids, text_len, index)
    # A filler row is given no blocks: it adds nothing to the sums by count.
    canvas = canvas._replace(n_blocks=jnp.where(keep, canvas.n_blocks, 0))
    return likelihood.nelbo(net, layout, samples, params, canvas, key)


def summary(solved: Solved | None, bound: Bound | None, about: dict[str, Any]) -> dict[str, Any]:
    """Everything an evaluation found, as plain values for ``summary.json``.

    Args:
        solved: None where nothing was decoded.
        bound: None where no NELBO was asked for.
        about: what was evaluated and how.
    """
    result: dict[str, Any] = dict(about)
    if solved is not None:
        result |= {
            "pass_at_1": {"rate": solved.pass_at_1.rate, **solved.pass_at_1._asdict()},
            "nfe": solved.nfe,
            "tokens_per_forward": solved.tokens_per_forward,
            "tokens_per_second": solved.tokens_per_second,
            "text_tokens": solved.tokens,
            "decode_seconds": solved.seconds,
            "stopped": sum(row["stopped"] for row in solved.rows),
        }
    if bound is not None:
        result |= {
            "nelbo_per_sequence": bound.per_sequence._asdict(),
            "nelbo_per_token": bound.per_text_token._asdict(),
            "nelbo_mask_se": bound.mask_se,
            "nelbo_exact": bound.exact,
            "nelbo_by_block": bound.by_block,
            "nll_by_masked_count": bound.by_count,
        }
    parsed: dict[str, Any] = json.loads(json.dumps(result), parse_constant=lambda name: None)
    return parsed
