"""Defines texts that follow prompts, and the bounds on their likelihood, of which differences are taken."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from jaxblock.diffusion.canvas import Layout
from jaxblock.errors import UserError


def check_samples(samples: int | None) -> None:
    """Raises UserError where the masked sets drawn per block are too few; None for as many as a block has positions."""
    if samples is not None and samples < 2:
        raise UserError(f"nelbo_samples is {samples}: it must be at least 2, since one draw does not show its error")


class Continuation(NamedTuple):
    """Holds a prompt and the tokens that follow it.

    Attributes:
        prompt: the prompt's tokens, at least one.
        response: the tokens whose likelihood is asked for, at least one and at most R.
        question: what its random masks depend on. Continuations of one question get nearly the same masks, so that the errors
            of their bounds cancel when the bounds are compared.
        first_block: the number of the response's first block, where it is a part of a longer text.
    """

    prompt: Sequence[int]
    response: Sequence[int]
    question: int
    first_block: int = 0


@dataclass(frozen=True)
class Bound:
    """Holds the estimated NELBO of a continuation, in nats: an upper bound on its negative log-likelihood.

    Attributes:
        terms: for each block the terms of its masked sets, in their order.
        exact: for each block whether the sets are all that it has. Then its NELBO is the terms' sum, else their mean.
        tokens: the number of tokens.
    """

    terms: list[np.ndarray]
    exact: list[bool]
    tokens: int

    @property
    def nelbo(self) -> float:
        """Returns the estimated NELBO of the text, in nats."""
        return math.fsum(
            float(terms.sum() if exact else terms.mean()) for terms, exact in zip(self.terms, self.exact, strict=True)
        )

    @property
    def standard_error(self) -> float:
        """The estimate's standard error over the masks drawn; 0 where every set was enumerated.

        The sets are treated as independent, which overstates it: they are stratified by their size.
        """
        return math.sqrt(
            sum(_variance_of_mean(terms) for terms, exact in zip(self.terms, self.exact, strict=True) if not exact)
        )

    def error_of_difference(self, other: Bound) -> float:
        """Returns the standard error of the difference from another bound of the same question, whose masks are nearly the same."""
        total = 0.0
        for block in range(max(len(self.terms), len(other.terms))):
            drawn = [
                bound.terms[block] for bound in (self, other) if block < len(bound.exact) and not bound.exact[block]
            ]
            if len(drawn) == 2:
                total += _variance_of_mean(drawn[0] - drawn[1])
            else:
                total += sum(map(_variance_of_mean, drawn))
        return math.sqrt(total)


def _variance_of_mean(terms: np.ndarray) -> float:
    """Returns the estimated variance of the mean of independent terms."""
    return float(terms.var(ddof=1)) / len(terms)


def windows(
    ids: Sequence[int], prefix: int, layout: Layout, longest_prompt: int, question: int
) -> Iterator[Continuation]:
    """Cuts a text into continuations of R tokens, each after as many of the tokens before it as a prompt may have.

    Args:
        ids: the text's tokens.
        prefix: the token that stands before the text.
        layout: the canvas's static part.
        longest_prompt: the most tokens of a prompt.
        question: what the random masks depend on.

    Yields:
        The continuations; every token of the text is in one of them.
    """
    whole = [prefix, *ids]
    for number, first in enumerate(range(1, len(whole), layout.response_len)):
        response = whole[first : first + layout.response_len]
        yield Continuation(whole[max(0, first - longest_prompt) : first], response, question, number * layout.n_blocks)


def sum_bounds(parts: Sequence[Bound]) -> Bound:
    """Returns the bound of a text whose parts, which follow each other, are bounded."""
    terms = [terms for part in parts for terms in part.terms]
    return Bound(terms, [exact for part in parts for exact in part.exact], sum(part.tokens for part in parts))
