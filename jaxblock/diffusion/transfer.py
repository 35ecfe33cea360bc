"""Transfer rules: which masked positions of the active block a decode step commits. Pure functions.

Confidence is ranked by -log p (``Scores.surprise``): probabilities near 1 tie in float32, this does not. A threshold
tau becomes -log tau. Ties go to the lowest index.
"""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float, Int

from jaxblock.types import Quota, Rule, RuleName, Scores, StepInfo


def surprise(logits: Float[Array, "*rows V"], token: Int[Array, "*rows"]) -> Float[Array, "*rows"]:
    """-log softmax(logits)[token] as a sum that keeps its precision when the token is nearly certain.

    Args:
        logits: float32 or wider; the mask token's logit included (it stays in the normaliser).
        token: the token of each row.

    Returns:
        Nats; infinite where the token's logit is -inf.
    """
    best = jnp.argmax(logits, axis=-1)
    top = jnp.max(logits, axis=-1)
    others = jnp.where(jnp.arange(logits.shape[-1]) == best[..., None], -jnp.inf, logits)
    rest = jnp.sum(jnp.exp(others - top[..., None]), axis=-1)
    chosen = jnp.take_along_axis(logits, token[..., None], axis=-1)[..., 0]
    return (top - chosen) + jnp.log1p(rest)


def rank(scores: Scores) -> Int[Array, "B A"]:
    """0 for the most confident eligible position, and so on; ineligible positions come after all eligible ones."""
    order = jnp.lexsort((scores.surprise, ~scores.eligible), axis=-1)
    return jnp.argsort(order, axis=-1)


def quota_table(schedule: Quota, most: int, steps: int) -> np.ndarray:
    """How many tokens each step commits, for every number of masks a block may begin with.

    Args:
        schedule: ``even`` (LLaDA: the remainder goes to the first steps), ``dllm_linear`` (rounding half to even at
            each step; idle steps dropped), ``dream`` (truncation on Dream's float32 time grid, the rest at the end).
        most: the largest number of masks.
        steps: steps of a block.

    Returns:
        int32 [most + 1, steps]; row n sums to n.
    """
    make = {"even": _even, "dllm_linear": _linear, "dream": _dream}[schedule]
    return np.array([make(n, steps) for n in range(most + 1)], np.int32)


def _even(n: int, steps: int) -> list[int]:
    return [n // steps + (i < n % steps) for i in range(steps)]


def _linear(n: int, steps: int) -> list[int]:
    # Halves are common here (n * 1/2), so which way they fall is decided by float32's rounding of 1 - (1 - t): the
    # published vectors are met only by computing in that order and in that type.
    one = np.float32(1)
    grid = [one - (one - np.float32(i) / np.float32(steps)) for i in range(steps + 1)]
    counts, left = [], n
    for i in range(steps, 0, -1):
        count = int(np.round(np.float32(left) * (one - grid[i - 1] / grid[i])))
        left -= count
        if count:
            counts.append(count)
    return counts + [0] * (steps - len(counts))


def _dream(n: int, steps: int, eps: float = 1e-3) -> list[int]:
    grid = np.linspace(1, eps, steps + 1, dtype=np.float32)
    counts, left = [], n
    for i in range(steps):
        survive = np.float32(1) - grid[i + 1] / grid[i]
        count = left if i == steps - 1 else int(np.float32(left) * survive)
        counts.append(count)
        left -= count
    return counts


def by_quota(table: np.ndarray) -> Rule:
    """Commits the step's quota of most confident positions.

    Args:
        table: from ``quota_table``.
    """
    counts = jnp.asarray(table)

    def rule(scores: Scores, info: StepInfo) -> Bool[Array, "B A"]:
        quota = counts[info.masks_at_start, info.step]
        return (rank(scores) < quota[:, None]) & scores.eligible

    return rule


def by_threshold(threshold: float) -> Rule:
    """Commits every position at least ``threshold`` confident, and always the most confident one."""
    bound = -math.log(threshold) if threshold > 0 else math.inf

    def rule(scores: Scores, info: StepInfo) -> Bool[Array, "B A"]:
        return ((scores.surprise <= bound) | (rank(scores) == 0)) & scores.eligible

    return rule


def by_factor(factor: float, most: int) -> Rule:
    """Accepts ranks n = 1, 2, ... while (n + 1)(1 - confidence) <= factor, rank 1 always (Fast-dLLM's, strict).

    Args:
        factor: f.
        most: positions of a block.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        level = 1.0 - factor / np.arange(2.0, most + 2)
        bounds = jnp.asarray(np.where(level > 0, -np.log(level), np.inf), jnp.float32)

    def rule(scores: Scores, info: StepInfo) -> Bool[Array, "B A"]:
        ranks = rank(scores)
        fails = scores.eligible & ~(scores.surprise <= bounds[ranks]) & (ranks > 0)
        first_failure = jnp.min(jnp.where(fails, ranks, most), axis=-1, keepdims=True)
        return (ranks < first_failure) & scores.eligible

    return rule


def make_rule(name: RuleName, *, quota: Quota, steps: int, block: int, threshold: float, factor: float) -> Rule:
    """The rule of a name; ``random`` is the quota rule over random confidences, which the decoder supplies."""
    if name == "confidence_threshold":
        return by_threshold(threshold)
    if name == "factor":
        return by_factor(factor, block)
    return by_quota(quota_table(quota, block, steps))
