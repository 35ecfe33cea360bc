"""Defines the results of an evaluation, and summarises them as plain values."""

from __future__ import annotations

import dataclasses
import json
from typing import Any, NamedTuple

import numpy as np

from jaxblock.evaluation.statistics import Estimate, Proportion
from jaxblock.inference import Costs


class Solved(NamedTuple):
    """Holds problems that were decoded and graded.

    Attributes:
        rows: the rows of the per-problem file (``Evaluator.solve``), one dict for each problem.
        pass_at_1: the share of problems that were solved, with a 95% interval.
        seconds: the wall time of decoding, without compilation. Grading goes on meanwhile; what it takes longer is included.
        costs: how much was computed, and how much of it was needed.
    """

    rows: list[dict[str, Any]]
    pass_at_1: Proportion
    seconds: float
    costs: Costs

    @property
    def nfe(self) -> float:
        """Returns the mean number of forward passes (NFE) spent on a problem; NaN without problems."""
        return float(np.mean([row["nfe"] for row in self.rows])) if self.rows else float("nan")

    @property
    def tokens(self) -> int:
        """Counts the text tokens decoded: terminators are counted, prompts and fill are not."""
        return sum(row["tokens"] for row in self.rows)

    @property
    def undecided(self) -> int:
        """Counts the answers that could not be compared as mathematics, and so count as wrong."""
        return sum("undecided" in row for row in self.rows)

    @property
    def tokens_per_forward(self) -> float:
        """Returns the text tokens committed per forward pass of a row (TPF); NaN without problems."""
        spent = sum(row["nfe"] for row in self.rows)
        return self.tokens / spent if spent else float("nan")

    @property
    def tokens_per_second(self) -> float:
        """Returns the text tokens of the whole batch per second of decoding; NaN without problems."""
        return self.tokens / self.seconds if self.seconds else float("nan")


class NelboBound(NamedTuple):
    """Holds the NELBO of a set of responses, an upper bound on their negative log-likelihood, in nats.

    Attributes:
        per_sequence: the mean NELBO of a sequence, with a standard error that includes the randomness of data and masks.
        per_text_token: the sum over all sequences divided by their number of text tokens (terminator counted, fill not).
        mask_se: the part of the standard error of ``per_sequence.mean`` that the random masks cause; 0 where exact, NaN where only one
            mask was drawn.
        exact: whether every masked set was enumerated.
        by_block: for each block k = 0, 1, ... (mean NELBO of the block, number of sequences that have it).
        by_count: for each l = 1, 2, ... (mean -log p of a masked token in blocks with l masks, number of such tokens).
    """

    per_sequence: Estimate
    per_text_token: Estimate
    mask_se: float
    exact: bool
    by_block: list[tuple[float, int]]
    by_count: list[tuple[float, int]]


def summarise_evaluation(solved: Solved | None, bound: NelboBound | None, about: dict[str, Any]) -> dict[str, Any]:
    """Returns everything that an evaluation found, as plain values for ``summary.json`` (NaN as null).

    Args:
        solved: the decoded problems; None where nothing was decoded.
        bound: the NELBO; None where it was not estimated.
        about: fields that say what was evaluated and how; they come first in the summary.
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
            "decode_costs": {**dataclasses.asdict(solved.costs), "computed_over_needed": solved.costs.ratios()},
            "stopped": sum(row["stopped"] for row in solved.rows),
            "undecided": solved.undecided,
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
