"""Compares how many tokens arms commit per forward pass where they solve equally many problems."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from jaxblock.study.contrasts import Curve
from jaxblock.study.experiments import Experiment
from jaxblock.study.statistics import Interval, ratio_interval

MARGIN = 0.01
"""How far below the Pass@1 of careful decoding the Pass@1 lies at which paces are compared: one point. Without it, a single problem
that is lost would forbid any faster way of decoding."""


class PaceRatio(NamedTuple):
    """Compares the pace of an arm with that of the control, at a Pass@1 that both reach.

    Attributes:
        says: what is divided by what.
        level: the Pass@1 for each seed: `MARGIN` below that of the worse of the two by the first way of decoding.
        ours: the tokens per forward pass of the arm for each seed.
        theirs: those of the control.
        ratio: the interval of the mean ratio over seeds.
    """

    says: str
    level: Float[np.ndarray, " S"]
    ours: Float[np.ndarray, " S"]
    theirs: Float[np.ndarray, " S"]
    ratio: Interval


def pace_ratios(one: Experiment, curves: Mapping[tuple[str, str], Curve]) -> list[PaceRatio]:
    """Compares the pace of each arm with that of the control.

    Args:
        one: the experiment, of the kind `pace`.
        curves: what each arm scored by each way of decoding, with two seeds or more.
    """
    *arms, control = one.arms
    theirs = [curves[control, way] for way in one.decodings]
    return [_ratio(f"{arm} / {control}", [curves[arm, way] for way in one.decodings], theirs) for arm in arms]


def _ratio(says: str, ours: Sequence[Curve], theirs: Sequence[Curve]) -> PaceRatio:
    rates = [np.array([curve.solved[0].mean(-1) for curve in curves]) for curves in (ours, theirs)]
    paces = [np.array([curve.pace[0] for curve in curves]) for curves in (ours, theirs)]
    level = np.minimum(rates[0][0], rates[1][0]) - MARGIN
    mine, other = (
        np.array([fastest(rate[:, seed], pace[:, seed], level[seed]) for seed in range(level.size)])
        for rate, pace in zip(rates, paces, strict=True)
    )
    return PaceRatio(says, level, mine, other, ratio_interval(mine, other))


def fastest(rates: Float[np.ndarray, " D"], paces: Float[np.ndarray, " D"], level: float) -> float:
    """Returns the largest pace at which Pass@1 is at least ``level``, with straight lines between the ways of decoding.

    Args:
        rates: the Pass@1 of each way of decoding; one of them is at least ``level``.
        paces: their tokens per forward pass.
        level: the Pass@1.
    """
    order = np.argsort(paces, kind="stable")
    rates, paces = rates[order], paces[order]
    last = int(np.flatnonzero(rates >= level)[-1])
    if last == len(rates) - 1:
        return float(paces[last])
    share = (rates[last] - level) / (rates[last] - rates[last + 1])
    return float(paces[last] + share * (paces[last + 1] - paces[last]))


def pace_table(ratios: Sequence[PaceRatio]) -> tuple[list[str], list[list[str]]]:
    """Returns the table of the paces at equal Pass@1."""
    header = ["tokens per forward pass at equal Pass@1", "Pass@1", "of the arm", "of the control", "ratio, over seeds"]
    return header, [
        [
            one.says,
            f"{100 * one.level.mean():.1f}%",
            f"{one.ours.mean():.2f}",
            f"{one.theirs.mean():.2f}",
            f"{one.ratio.estimate:.2f} [{one.ratio.low:.2f}, {one.ratio.high:.2f}]",
        ]
        for one in ratios
    ]
