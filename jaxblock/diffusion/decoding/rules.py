"""Defines the decoding rules, one record each: it says how a rule ranks and commits positions, and which settings it uses.

A new rule is one entry of ``RULES``; its name also goes to ``config.RuleName``, which the command line shows without JAX.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from jaxblock.diffusion.decoding import measures, transfer
from jaxblock.diffusion.decoding.config import DecodeConfig, RuleName
from jaxblock.diffusion.decoding.measures import Measure
from jaxblock.diffusion.decoding.transfer import Transfer
from jaxblock.settings import require


@dataclass(frozen=True)
class Rule:
    """Describes how one decoding rule works.

    Attributes:
        transfer: takes the settings and the block size, and returns the function that picks the positions to commit.
        measure: how the confidence that ranks positions is measured; None ranks by a uniform random number instead.
        measured_on: the distribution that is measured: the raw ``logits`` (LLaDA's family), or the ``candidates`` that the
            token is drawn from, tempered and filtered (Dream's).
        pace: what decides how many steps a block takes: the ``settings``, or the ``rule``, which commits the confident
            positions of each step and at least one.
        uses: the rule-specific settings that this rule uses; it refuses those of other rules.
        most_masks: takes the settings and the block size, and returns the most masks that a block may still have before each step;
            None where that is not known, so that every step looks at the whole block.
    """

    transfer: Callable[[DecodeConfig, int], Transfer]
    measure: Measure | None
    measured_on: Literal["logits", "candidates"] = "logits"
    pace: Literal["settings", "rule"] = "settings"
    uses: tuple[str, ...] = ()
    most_masks: Callable[[DecodeConfig, int], np.ndarray] | None = None


def transfer_of(options: DecodeConfig, block: int) -> Transfer:
    """Returns the function that picks the positions to commit, for blocks of ``block`` positions."""
    pick = RULES[options.rule].transfer(options, block)
    return pick if options.quirks == "none" else transfer.after_first_token(pick)


def _quotas(options: DecodeConfig, block: int) -> np.ndarray:
    if options.quirks == "fast_dllm":
        return transfer.quota_after_first_token(block, options.steps(block), options.eps)
    return transfer.quota_table(options.quota, block, options.steps(block), options.eps)


def _by_quota(options: DecodeConfig, block: int) -> Transfer:
    return transfer.by_quota(_quotas(options, block))


def _most_by_quota(options: DecodeConfig, block: int) -> np.ndarray:
    return transfer.most_masks(_quotas(options, block))


def _one_less_a_step(options: DecodeConfig, block: int) -> np.ndarray:
    return block - np.arange(block)


def _by_chance(options: DecodeConfig, block: int) -> Transfer:
    return transfer.by_chance(transfer.dream_chances(options.steps(block), options.eps))


def _by_threshold(options: DecodeConfig, block: int) -> Transfer:
    return transfer.by_threshold(options.threshold)


def _by_factor(options: DecodeConfig, block: int) -> Transfer:
    return transfer.by_factor(options.factor, block, options.factor_rule)


_RANKED = ("quota", "alg_temp")

RULES: dict[RuleName, Rule] = {
    "low_confidence": Rule(_by_quota, measures.TOKEN, uses=_RANKED, most_masks=_most_by_quota),
    "random": Rule(_by_quota, None, uses=("quota",), most_masks=_most_by_quota),
    "confidence_threshold": Rule(
        _by_threshold, measures.TOKEN, pace="rule", uses=("threshold",), most_masks=_one_less_a_step
    ),
    "factor": Rule(
        _by_factor, measures.TOKEN, pace="rule", uses=("factor", "factor_rule"), most_masks=_one_less_a_step
    ),
    "maskgit_plus": Rule(_by_quota, measures.TOKEN, "candidates", uses=_RANKED, most_masks=_most_by_quota),
    "topk_margin": Rule(_by_quota, measures.LEAD, "candidates", uses=_RANKED, most_masks=_most_by_quota),
    "entropy": Rule(_by_quota, measures.ENTROPY, "candidates", uses=_RANKED, most_masks=_most_by_quota),
    "origin": Rule(_by_chance, None, uses=("eps",)),
}
"""Every rule by the name that ``decode.rule`` gives it."""


def check_options(options: DecodeConfig) -> None:
    """Raises UserError where a setting is out of range, or is set although the rule does not use it.

    No setting that a user changed is ignored silently.
    """
    options.check()
    name, rule = options.rule, RULES[options.rule]
    for field in dataclasses.fields(options):
        value, users = getattr(options, field.name), [other for other in RULES if field.name in RULES[other].uses]
        require(
            not users or field.name == "eps" or name in users or value == field.default,
            f"decode.{field.name} {value} has no effect under decode.rule {name}: set {field.name} to {field.default}, "
            f"or rule to {' or '.join(users)}",
        )
    _check_time_grid(options, rule)
    _check_filters(options, rule)
    _check_quirks(options)
    require(
        options.eos_suppression != "confidence" or rule.measure is not None,
        f"decode.eos_suppression confidence has no effect under decode.rule {name}, which looks at no confidence: set "
        "eos_suppression to none or logits",
    )


def unused_steps(options: DecodeConfig) -> list[str]:
    """Returns a note where ``decode.steps_per_block`` is set but the rule takes as many steps as it needs; else nothing.

    It is no error, since a config for a rule with a quota often serves for such a rule too.
    """
    if options.steps_per_block is None or RULES[options.rule].pace == "settings":
        return []
    return [
        f"decode.steps_per_block {options.steps_per_block} is not used: decode.rule {options.rule} takes as many steps as it "
        "needs"
    ]


def _check_time_grid(options: DecodeConfig, rule: Rule) -> None:
    on_the_grid = "eps" in rule.uses or ("quota" in rule.uses and options.quota == "dream")
    default = DecodeConfig().eps
    require(
        on_the_grid or options.eps == default,
        f"decode.eps {options.eps} has no effect without Dream's time grid: set eps to {default}, quota to dream "
        "(and a rule that takes a quota), or rule to origin",
    )


def _check_filters(options: DecodeConfig, rule: Rule) -> None:
    on = {"top_p": options.top_p is not None and options.top_p < 1, "top_k": options.top_k is not None}
    filters = [name for name in on if on[name]]
    measuring = [name for name in RULES if RULES[name].measured_on == "candidates"]
    require(
        not filters or options.temperature > 0 or rule.measured_on == "candidates",
        f"decode.{' and decode.'.join(filters)} cannot change the best token, and decode.rule {options.rule} does not "
        f"measure confidence on what is left: set decode.temperature above 0, {' and '.join(filters)} to null, or "
        f"rule to {' or '.join(measuring)}",
    )


def _check_quirks(options: DecodeConfig) -> None:
    if options.quirks == "none":
        return
    require(
        options.cache != "none",
        "decode.quirks fast_dllm has no effect with decode.cache none: set cache to prefix or dual, or quirks to none",
    )
    by_grid = options.rule in ("maskgit_plus", "topk_margin", "entropy") and options.quota == "dream"
    require(
        options.rule == "confidence_threshold" or by_grid,
        f"decode.quirks fast_dllm is what Fast-dLLM does for Dream, and it has no decode.rule {options.rule} with quota "
        f"{options.quota}: set rule to confidence_threshold, or to a rule of Dream's with quota dream; or quirks to none",
    )
    require(
        not by_grid or options.steps_per_block is None or options.steps_per_block > 1,
        "decode.steps_per_block 1 commits only the first token of a block under decode.quirks fast_dllm: set at least 2",
    )
