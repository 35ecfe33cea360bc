"""Scores every masked position of a decode step: finds the token that it would get, and how confident the network is of it.

Two conventions exist. LLaDA's family draws the token from the tempered distribution and measures confidence by the un-noised
softmax of the raw logits. Dream's filters the tempered distribution (top-p, then top-k) and measures confidence on the
filtered distribution that the token is drawn from (``Rule.measured_on``). In both, the mask token is never chosen, but its
probability stays in the normaliser of the confidence.
"""

from __future__ import annotations

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from jaxblock.diffusion.canvas import Layout
from jaxblock.diffusion.decoding.config import DecodeConfig
from jaxblock.diffusion.decoding.measures import best_token
from jaxblock.diffusion.decoding.rules import RULES
from jaxblock.diffusion.decoding.transfer import Scores
from jaxblock.uniforms import uniform

_TOKEN, _CHANCE, _POSITION = 0, 1, 2
"""Constants folded into a row's random key, so that the draws of tokens, chances and positions are independent."""


def keep_top_p(logits: Float[Array, "*rows V"], top_p: float) -> Bool[Array, "*rows V"]:
    """Returns the most probable tokens up to the one with which they sum to more than ``top_p``; ties go to the lowest index.

    Args:
        logits: already divided by the temperature.
        top_p: the sum of probabilities, from 0 to 1.
    """
    order = jnp.argsort(-logits, axis=-1, stable=True)
    mass = jnp.cumsum(jax.nn.softmax(jnp.take_along_axis(logits, order, axis=-1), axis=-1), axis=-1)
    # The best token is kept; any other is kept if the more probable ones sum to at most top_p.
    kept = jnp.concatenate([jnp.ones_like(mass[..., :1], bool), mass[..., :-1] <= top_p], axis=-1)
    return jnp.take_along_axis(kept, jnp.argsort(order, axis=-1), axis=-1)


def keep_top_k(logits: Float[Array, "*rows V"], top_k: int) -> Bool[Array, "*rows V"]:
    """Returns the ``top_k`` most probable tokens; all that tie with the last of them stay, as in Dream.

    Args:
        logits: -inf for what was filtered out before.
        top_k: the number of tokens, at least 1.
    """
    last = jax.lax.top_k(logits, min(top_k, logits.shape[-1]))[0][..., -1:]
    return logits >= last


def candidates(options: DecodeConfig, mask_id: int, logits: Float[Array, "*rows V"]) -> Float[Array, "*rows V"]:
    """Returns the logits that the token is drawn from: divided by the temperature, then cut by top-p, then by top-k.

    The filters see the mask token, as in Dream. They always keep the best token other than it: where only
    the mask token passes a filter, nothing could be drawn. Removed tokens get -inf.

    Args:
        options: the settings; temperature (0 leaves the logits unscaled), top_p and top_k are used.
        mask_id: the mask token.
        logits: float32 or wider.
    """
    if options.temperature > 0:
        logits = logits / options.temperature
    left = logits
    if options.top_p is not None and options.top_p < 1:
        left = jnp.where(keep_top_p(left, options.top_p), left, -jnp.inf)
    if options.top_k is not None:
        left = jnp.where(keep_top_k(left, options.top_k), left, -jnp.inf)
    if left is logits:
        return logits
    ids = jnp.arange(logits.shape[-1])
    best = ids == best_token(logits, mask_id)[..., None]
    return jnp.where(best, logits, left)


class Found(NamedTuple):
    """Holds what a step found at positions of a block, before anything is drawn per position.

    Attributes:
        token: the token that each position would get.
        surprise: the number that the rule's measure ranks by (``Measure.surprise``); None under a rule that has no measure.
    """

    token: Int[Array, "B P"]
    surprise: Float[Array, "B P"] | None


def find(layout: Layout, options: DecodeConfig, logits: Float[Array, "B P V"], keys: Array) -> Found:
    """Finds the token of each position, and how surprising it is.

    Args:
        layout: the canvas's static part, for the special tokens.
        options: the rule, temperature, filters and suppression.
        logits: float32 or wider.
        keys: one random key per row [B].
    """
    chex.assert_shape(keys, logits.shape[:1])
    ids, rule = jnp.arange(logits.shape[-1]), RULES[options.rule]
    if options.eos_suppression == "logits":
        logits = jnp.where(ids == layout.fill_id, -jnp.inf, logits)
    drawn_from = candidates(options, layout.mask_id, logits)
    pick = drawn_from
    if options.temperature > 0:
        # LLaDA takes the argmax of exp(l) / (-log U)^T, which is the argmax of l / T + Gumbel noise. The noise is float32 or
        # wider, since LLaDA notes that a narrower type is biased.
        pick = pick + _gumbel(keys, _TOKEN, pick)
    token = best_token(pick, layout.mask_id)
    if rule.measure is None:
        return Found(token, None)
    measured = drawn_from if rule.measured_on == "candidates" else logits
    if options.eos_suppression == "confidence":
        measured = jnp.where(jnp.isin(ids, _ends(layout)), -jnp.inf, measured)
    return Found(token, rule.measure.surprise(measured, token, layout.mask_id))


def score(layout: Layout, options: DecodeConfig, found: Found, eligible: Bool[Array, "B A"], keys: Array) -> Scores:
    """Returns what the transfer rule ranks the positions of a block by.

    A rule without a measure (``random``, ``origin``) gets a uniform number in place of a surprise. With ``alg_temp`` the surprise is
    -(confidence / alg_temp + Gumbel noise): taking the smallest ones draws positions without replacement from
    softmax(confidence / alg_temp).

    Args:
        layout: the canvas's static part, for the special tokens.
        options: the rule, its temperature and suppression.
        found: what ``find`` found at the eligible positions; what it holds for the others is not used.
        eligible: the positions that may be committed.
        keys: one random key per row [B], those of ``find``.
    """
    token, surprise = found
    chex.assert_equal_shape([token, eligible])
    measure = RULES[options.rule].measure
    if measure is None or surprise is None:
        chance = jax.vmap(lambda key: uniform(jax.random.fold_in(key, _CHANCE), token.shape[1:]))(keys)
        return Scores(token, chance, eligible)
    if options.alg_temp > 0:
        surprise = -(measure.confidence(surprise) / options.alg_temp + _gumbel(keys, _POSITION, surprise))
    if options.eos_suppression == "confidence":
        surprise = jnp.where(jnp.isin(token, _ends(layout)), jnp.inf, surprise)
    return Scores(token, surprise, eligible)


def _ends(layout: Layout) -> Array:
    """Returns the tokens that end a response, and the one that follows."""
    return jnp.asarray((*layout.stop_ids, layout.fill_id))


def _gumbel(keys: Array, purpose: int, like: Array) -> Array:
    """Draws Gumbel noise for every entry, each row's from its own key."""
    return jax.vmap(lambda key: jax.random.gumbel(jax.random.fold_in(key, purpose), like.shape[1:], like.dtype))(keys)
