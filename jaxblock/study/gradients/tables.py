"""Makes the tables of a report from the measurements of gradients of several seeds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxblock.errors import UserError
from jaxblock.evaluation.statistics import Estimate, mean_se
from jaxblock.study.gradients.contexts import CONTEXTS
from jaxblock.study.gradients.decomposition import SOURCES
from jaxblock.study.gradients.variance import MASKED_MEAN, REFERENCE
from jaxblock.study.statistics import Interval, ratio_interval

Measured = Mapping[tuple[str, int], Sequence[Mapping[str, Any]]]
"""The measurements of each seed (``measure.measure_checkpoint``), by arm and steps."""

Table = tuple[list[str], list[list[str]]]
Pair = Sequence[float | None]
"""An estimate and its standard error, as results hold them; None for what is not finite."""

_HIDDEN: Pair = (None, None)

UNKNOWN = "not resolved"
"""What a table says where noise hides a number, such as the cosine of a gradient whose squared length is estimated below 0."""


def over_seeds(pairs: Sequence[Pair]) -> Estimate | None:
    """Returns the mean over seeds with its standard error; that of the one measurement where there is one seed.

    Args:
        pairs: the estimates of the seeds.

    Returns:
        The mean; None where the estimate of some seed is not finite.
    """
    values = [value for value, _ in pairs if value is not None]
    if len(values) < len(pairs):
        return None
    if len(pairs) == 1:
        error = pairs[0][1]
        return Estimate(values[0], float("nan") if error is None else error, 1)
    return mean_se(values)


def tables(measured: Measured) -> list[Table]:
    """Returns the tables of an experiment that measures gradients.

    Raises:
        UserError: the measurements were made with different sizes, so that they cannot be put together.
    """
    _check_sizes(measured)
    return [
        _variances(measured),
        *(_variances_by_group(place, of) for place, of in measured.items()),
        _decompositions(measured),
        _directions(measured),
        _directions_by_block(measured),
        _steepness(measured),
        _tightness(measured),
    ]


def _check_sizes(measured: Measured) -> None:
    sizes = {str(one["sizes"]): place for place, of in measured.items() for one in of}
    if len(sizes) > 1:
        (first, (arm, steps)), (other, (its_arm, its_steps)) = list(sizes.items())[:2]
        raise UserError(
            f"the gradients of {arm} at step {steps} were measured with the sizes {first}, those of {its_arm} at step {its_steps} "
            f"with {other}: take the scores of one of them out of its result, and run the study again"
        )


def _by_checkpoint(measured: Measured, first: str, rows: Sequence[str], cell: Callable[[str, Any], str]) -> Table:
    """Makes a table with a column for each checkpoint; ``cell`` formats a row's name and the measurements of all seeds."""
    header = [first, *(f"{arm}, step {steps:,}" for arm, steps in measured)]
    return header, [[row, *(cell(row, of) for of in measured.values())] for row in rows]


def ratio_over_seeds(pairs: Sequence[Pair]) -> Interval | None:
    """Returns the geometric mean of ratios over seeds with its interval; None for one seed, or where one is not a positive number."""
    values = np.array([np.nan if value is None else value for value, _ in pairs], np.float64)
    if len(values) < 2 or not np.all(values > 0):
        return None
    return ratio_interval(values, np.ones_like(values))


def ratio_text(pairs: Sequence[Pair]) -> str:
    """Formats ratios: their geometric mean over seeds with its interval, or the one of a seed with its standard error."""
    found = ratio_over_seeds(pairs)
    return _text(pairs, 3) if found is None else f"{found.estimate:.3f} [{found.low:.3f}, {found.high:.3f}]"


def _text(pairs: Sequence[Pair], digits: int) -> str:
    found = over_seeds(pairs)
    if found is None:
        return UNKNOWN
    return f"{found.mean:.{digits}f}" + ("" if np.isnan(found.se) else f" ± {found.se:.{digits}f}")


def ratios(of: Sequence[Mapping[str, Any]], name: str, group: str = "all") -> list[Pair]:
    """Returns how many times an estimator's tr Cov / mean² is that of the default for each seed, not finite where noise hides it.

    Estimators with the expectation of the default are divided by the same squared length, which cancels. That of the paper's script
    has a scale of its own, which is known only where the squared length of the common expectation is positive.
    """
    found = [one["variance"][name][group] for one in of]
    own_scale = name.startswith(MASKED_MEAN)
    return [_HIDDEN if own_scale and not is_resolved(one["relative"]) else one["ratio"] for one in found]


def is_resolved(relative: Pair) -> bool:
    """Tells whether a variance in units of a squared length is known: noise can make the length negative."""
    return relative[0] is not None and relative[0] > 0


def _variances(measured: Measured) -> Table:
    names = list(next(iter(measured.values()))[0]["variance"])
    first = f"tr Cov / mean² of a batch, in that of {REFERENCE}"
    return _by_checkpoint(measured, first, names, lambda name, of: ratio_text(ratios(of, name)))


def _variances_by_group(place: tuple[str, int], of: Sequence[Mapping[str, Any]]) -> Table:
    found = of[0]["variance"]
    groups = list(found[REFERENCE])
    header = [f"the same by group of parameters: {place[0]}, step {place[1]:,}", *groups]
    return header, [[name, *(ratio_text(ratios(of, name, group)) for group in groups)] for name in found]


def _decompositions(measured: Measured) -> Table:
    header = ["variance of one row", "parameters", "tr Cov / mean²", *(f"from the {name} (%)" for name in SOURCES)]
    rows = []
    for (arm, steps), of in measured.items():
        for group in of[0]["decomposition"]:
            found = [one["decomposition"][group] for one in of]
            relative = [one["relative"] if is_resolved(one["relative"]) else _HIDDEN for one in found]
            shares = [_text([_scaled(one[name], 100.0) for one in found], 1) for name in SOURCES]
            rows.append([f"{arm}, step {steps:,}", group, _text(relative, 1), *shares])
    return header, rows


def _scaled(pair: Pair, by: float) -> Pair:
    return [None if value is None else by * value for value in pair]


def _directions(measured: Measured) -> Table:
    def cell(name: str, of: Any) -> str:
        found = [one["direction"][name] for one in of]
        distance, length = over_seeds([one["distance"] for one in found]), over_seeds([one["length"] for one in found])
        rest = "" if distance is None or length is None else f" ({distance.mean:.2f}; {length.mean:.2f})"
        return _text([one["cosine"] for one in found], 3) + rest

    names = [context.name for context in CONTEXTS]
    return _by_checkpoint(measured, "cosine with the ideal gradient (distance of directions; length)", names, cell)


def _directions_by_block(measured: Measured) -> Table:
    """Returns the cosines of each block's part of classical SFT's gradient with the ideal one."""
    blocks = max(len(one["direction"]["classical"]["cosine_by_block"]) for of in measured.values() for one in of)
    names = [f"classical, block {at}" for at in range(blocks)]

    def cell(name: str, of: Any) -> str:
        at = names.index(name)
        found = [one["direction"]["classical"]["cosine_by_block"] for one in of]
        return "" if any(len(each) <= at for each in found) else _text([each[at] for each in found], 3)

    return _by_checkpoint(measured, "cosine with the ideal gradient, by block", names, cell)


def _steepness(measured: Measured) -> Table:
    names = [context.name for context in CONTEXTS if not context.classical and context.suffix_mask_prob == 1]

    def cell(name: str, of: Any) -> str:
        found = [one["direction"][name]["steepness"] for one in of]
        if any(each is None for each in found):
            return UNKNOWN
        largest, median = max(each["largest"] for each in found), np.mean([each["median"] for each in found])
        return f"{largest:.3g} ({median:.3g})"

    return _by_checkpoint(
        measured, "change of a row's gradient / distance of its inputs: the largest (the median)", names, cell
    )


def _tightness(measured: Measured) -> Table:
    header = ["nats per text token", "block", "NELBO", "-log p", "NELBO + log p", "-log p is"]
    rows = []
    for (arm, steps), of in measured.items():
        for size, first in of[0]["tightness"].items():
            found = [one["tightness"][size] for one in of]
            numbers = [_text([one[key] for one in found], 4) for key in ("nelbo", "minus_log_p", "gap")]
            kind = "exact" if first["exact"] else "estimated from above, so the difference from below"
            rows.append([f"{arm}, step {steps:,}", size, *numbers, kind])
    return header, rows
