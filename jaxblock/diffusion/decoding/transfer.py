"""Makes transfer functions, which pick the masked positions of the active block that a decode step commits.

They rank by ``Scores.surprise``, which is -log of the confidence p: probabilities near 1 are equal in float32, their
logarithms are not. A threshold tau on p is -log tau on the surprise. Among equal positions the lowest index comes first.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float, Int

from jaxblock.diffusion.decoding.config import FactorRule, Quota


class Scores(NamedTuple):
    """Holds the tokens and scores from which a transfer function chooses.

    Attributes:
        token: the token that each position would get.
        surprise: -log of the rule's confidence in nats (smaller is more confident), or the number that the rule ranks by instead
            (``scoring.score``).
        eligible: which positions may be committed: those that are still masks.
    """

    token: Int[Array, "B A"]
    surprise: Float[Array, "B A"]
    eligible: Bool[Array, "B A"]


class StepInfo(NamedTuple):
    """Holds the index of a decode step inside its block, and the number of masks that each row had when the block began."""

    step: Int[Array, ""]
    masks_at_start: Int[Array, " B"]


Transfer = Callable[[Scores, StepInfo], Bool[Array, "B A"]]
"""A transfer function: returns the eligible positions that this step commits."""


def rank(scores: Scores) -> Int[Array, "B A"]:
    """Ranks positions from 0, the most confident eligible one; ineligible positions come after all eligible ones."""
    order = jnp.lexsort((scores.surprise, ~scores.eligible), axis=-1)
    return jnp.argsort(order, axis=-1)


def quota_table(schedule: Quota, most: int, steps: int, eps: float = 1e-3) -> np.ndarray:
    """Tabulates how many tokens each step commits, for every number of masks that a block may begin with.

    Args:
        schedule: ``even`` (LLaDA: the remainder goes to the first steps), ``dllm_linear`` (rounding half to even at
            each step; idle steps dropped), ``dream`` (truncation on Dream's float32 time grid, the rest at the end).
        most: the largest number of masks.
        steps: the decode steps of a block.
        eps: the end of Dream's time grid.

    Returns:
        int32 [most + 1, steps]; row n sums to n.
    """
    make = {"even": _even, "dllm_linear": _linear, "dream": lambda n, steps: _dream(n, dream_chances(steps, eps))}
    return np.array([make[schedule](n, steps) for n in range(most + 1)], np.int32)


def most_masks(table: np.ndarray) -> np.ndarray:
    """Returns the most masks that a block may still have before each step, whatever number it began with: int [steps].

    Args:
        table: the quotas, from ``quota_table``.
    """
    before = np.cumsum(table, axis=1) - table
    return np.max(np.arange(len(table))[:, None] - before, axis=0)


def dream_grid(steps: int, eps: float) -> np.ndarray:
    """Returns Dream's times, from 1 down to ``eps`` in equal steps: float32 [steps + 1], equal to ``torch.linspace`` bit for bit.

    ``torch.linspace`` counts from both ends and rounds once per point (a fused multiply-add), and the number of tokens that a
    step commits may depend on the last bit.
    """
    first, last = np.float32(1), np.float32(eps)
    size = float((last - first) / np.float32(steps))
    at = np.arange(steps + 1)
    return np.where(at < (steps + 1) // 2, first + size * at, last - size * (steps - at)).astype(np.float32)


def dream_chances(steps: int, eps: float) -> np.ndarray:
    """Returns the chance that a step commits a masked position, float32 [steps]: 1 - s / t on Dream's grid, 1 in the last step."""
    grid = dream_grid(steps, eps)
    return np.append(np.float32(1) - grid[1:-1] / grid[:-2], np.float32(1))


def _even(n: int, steps: int) -> list[int]:
    return [n // steps + (i < n % steps) for i in range(steps)]


def _linear(n: int, steps: int) -> list[int]:
    # left * chance is often one half up to rounding, so whether it is rounded up depends on float32's error in 1 - (1 - t).
    # Only this type and this order of operations reproduce dllm's published counts.
    one = np.float32(1)
    grid = [one - (one - np.float32(i) / np.float32(steps)) for i in range(steps + 1)]
    counts, left = [], n
    for i in range(steps, 0, -1):
        count = int(np.round(np.float32(left) * (one - grid[i - 1] / grid[i])))
        left -= count
        if count:
            counts.append(count)
    return counts + [0] * (steps - len(counts))


def _dream(n: int, chances: np.ndarray) -> list[int]:
    # Dream takes the mean count of a batch's rows. Its rows always begin with equally many masks and commit equally
    # many, so that mean is each row's own count, and a row's result does not depend on its batch.
    counts, left = [], n
    for chance in chances:
        counts.append(int(np.float32(left) * chance))
        left -= counts[-1]
    return counts


def by_quota(table: np.ndarray) -> Transfer:
    """Returns a function that commits the step's quota of most confident positions.

    Args:
        table: the quotas, from ``quota_table``.
    """
    counts = jnp.asarray(table)

    def rule(scores: Scores, info: StepInfo) -> Bool[Array, "B A"]:
        quota = counts[info.masks_at_start, info.step]
        return (rank(scores) < quota[:, None]) & scores.eligible

    return rule


def quota_after_first_token(most: int, steps: int, eps: float) -> np.ndarray:
    """Tabulates the quotas of Fast-dLLM's decoder for Dream: one token in the first step, the rest on Dream's time grid.

    Args:
        most: the largest number of masks.
        steps: the decode steps of a block, at least 2.
        eps: the end of Dream's time grid.

    Returns:
        int32 [most + 1, steps]; row n sums to n.
    """
    later = dream_chances(steps, eps)[1:]
    return np.array([[min(n, 1), *_dream(max(n - 1, 0), later)] for n in range(most + 1)], np.int32)


def after_first_token(pick: Transfer) -> Transfer:
    """Returns a function that commits the first position of the block in its first step, and then what ``pick`` commits."""

    def rule(scores: Scores, info: StepInfo) -> Bool[Array, "B A"]:
        first = jnp.arange(scores.token.shape[-1]) == 0
        return jnp.where(info.step == 0, first & scores.eligible, pick(scores, info))

    return rule


def by_threshold(threshold: float) -> Transfer:
    """Returns a function that commits every position of at least this confidence, and always the most confident one."""
    bound = -math.log(threshold) if threshold > 0 else math.inf

    def rule(scores: Scores, info: StepInfo) -> Bool[Array, "B A"]:
        return ((scores.surprise <= bound) | (rank(scores) == 0)) & scores.eligible

    return rule


def by_factor(factor: float, most: int, variant: FactorRule = "strict") -> Transfer:
    """Returns a function that commits ranks n = 1, 2, ... while (n + 1)(1 - confidence) <= factor, and rank 1 always.

    The rule is Fast-dLLM's.

    Args:
        factor: the bound.
        most: the positions of a block.
        variant: ``strict`` stops at the first failure; ``v1`` (Fast-dLLM's later code) accepts even that one where it
            is the last rank there is.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        level = 1.0 - factor / np.arange(2.0, most + 2)
        bounds = jnp.asarray(np.where(level > 0, -np.log(level), np.inf), jnp.float32)

    def rule(scores: Scores, info: StepInfo) -> Bool[Array, "B A"]:
        ranks = rank(scores)
        fails = scores.eligible & ~(scores.surprise <= bounds[ranks]) & (ranks > 0)
        if variant == "v1":
            fails = fails & (ranks < jnp.sum(scores.eligible, axis=-1, keepdims=True) - 1)
        first_failure = jnp.min(jnp.where(fails, ranks, most), axis=-1, keepdims=True)
        return (ranks < first_failure) & scores.eligible

    return rule


def by_chance(chances: np.ndarray) -> Transfer:
    """Returns a function that commits each position independently with the step's chance (Dream's ``origin``).

    The scores hold a uniform number from [0, 1) for each position in place of a surprise.

    Args:
        chances: the chance of each step; the last must be 1, so that a block ends.
    """
    levels = jnp.asarray(chances)

    def rule(scores: Scores, info: StepInfo) -> Bool[Array, "B A"]:
        return (scores.surprise < levels[info.step]) & scores.eligible

    return rule
