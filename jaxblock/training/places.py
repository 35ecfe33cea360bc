"""Chooses the widths of a line's places from the lengths of the training records, so that few positions are computed in vain."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from jaxblock.config.config import Config
from jaxblock.data.loader import list_pairs
from jaxblock.data.mixture import Mixture
from jaxblock.data.store.records import Records
from jaxblock.diffusion.canvas import MOST_WIDTHS, canvas_width, needed_positions
from jaxblock.diffusion.layouts import training_layout
from jaxblock.models.architecture import Architecture
from jaxblock.models.lines import widths_of_rows
from jaxblock.types import Lines, Places, positions_of_line

SMALLEST_CANVAS = 256
"""The positions of a canvas from which on it has several widths: for a smaller one they would not repay their compilation."""

_MULTIPLE = 8  # widths are multiples of it, as vector units and kernels like them
_SHARES = (0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 1.0)
_MOST_READ, _MOST_DRAWN = 1 << 16, 1 << 15  # records, and rows of random batches
_LEAST_SAVED = 0.1  # of the positions: for less, sorting and a second way to compute a step are not worth it


def choose_lines(
    config: Config, records: Records, arch: Architecture, ways: int, mixture: Mixture | None = None
) -> Lines | None:
    """Chooses the widths at which a run computes its rows; the same settings, data and devices give the same widths.

    Args:
        config: the run's settings.
        records: the training records.
        arch: the network's traits.
        ways: the number of devices that rows are split over.
        mixture: how several training files are mixed; None where every record is read equally often.

    Returns:
        The widths; None where all rows are computed at the canvas's width, as they always are on a small canvas.
    """
    if config.train.widths == "full":
        return None
    layout = training_layout(config.canvas, config.method, arch, ())
    width = canvas_width(layout, config.canvas.prompt_len)
    if width < SMALLEST_CANVAS:
        return None
    every = -(-len(records) // _MOST_READ)
    lengths = records.lengths(every)
    prompt_len, block, at = lengths[:, 0], None, np.arange(len(records))[::every]
    if config.method.pairs:
        pairs = list_pairs(lengths[:, 1], layout.block)
        prompt_len, block, at = prompt_len[pairs[:, 0]], pairs[:, 1], at[pairs[:, 0]]
    needed = needed_positions(layout, width, prompt_len, block)
    widest = width if every > 1 else min(int(round_up(needed).max()), width)
    lines = ways * config.train.accumulate
    shape = lines, config.train.batch_size // lines
    batches = min(max(_MOST_DRAWN // config.train.batch_size, 100), 4000)
    chances = None if mixture is None else mixture.chances(at)
    places = choose_places(np.random.default_rng(0).choice(needed, (batches, *shape), p=chances), widest)
    return None if all(each == width for _, each in places) else Lines(places, widest)


def choose_places(drawn: np.ndarray, widest: int) -> Places:
    """Chooses the places of a line such that steps compute as few positions as possible, on average.

    A step whose rows do not all fit their places computes them all at the widest width. The places are fitted to quantiles of
    the longest row of a line, of the second longest, and so on, and then changed one by one as long as that helps.

    Args:
        drawn: the positions that the rows of some batches need [batches, lines of a batch, rows of a line].
        widest: the width that every row fits in.

    Returns:
        The places of a line; all as wide as ``widest`` where others would save little.
    """
    size = drawn.shape[2]
    # All lines must fit, so of the longest rows, the second longest, ... of a batch's lines only the longest counts.
    worst = (-np.sort(-drawn, axis=2)).max(1)
    best: Places = ((size, widest),)
    least = (1 - _LEAST_SAVED) * widest * size
    for share in _SHARES:
        widths = np.minimum(round_up(np.quantile(worst, share, axis=0)), widest)
        places = _improved(_grouped(widths), worst, widest)
        cost = expected_positions(places, worst, widest)
        if cost < least:
            best, least = places, cost
    return best


def expected_positions(places: Places, worst: np.ndarray, widest: int) -> float:
    """Returns the positions that a line computes, on average over some batches.

    Args:
        places: the places of a line.
        worst: the positions that the longest row of any line, the second longest, ... need in each batch [batches, rows].
        widest: the width of all rows of a batch that does not fit.
    """
    fits = float((worst <= widths_of_rows(places)).all(1).mean())
    return fits * positions_of_line(places) + (1 - fits) * widest * worst.shape[1]


def round_up(length: np.ndarray) -> np.ndarray:
    """Rounds lengths up to widths that vector units and kernels like."""
    return -(-np.ceil(length).astype(int) // _MULTIPLE) * _MULTIPLE


def _grouped(widths: np.ndarray) -> Places:
    """Widens some of a line's places so that at most ``MOST_WIDTHS`` widths are left, by as few positions as possible.

    Args:
        widths: the width of each place, the widest first.
    """
    n, kinds = len(widths), min(MOST_WIDTHS, len(widths))
    # The fewest positions of the first j places with k widths, and the place at which the last of these widths begins.
    least, begins = np.full((kinds + 1, n + 1), np.inf), np.zeros((kinds + 1, n + 1), int)
    least[0, 0] = 0
    for k in range(1, kinds + 1):
        for j in range(1, n + 1):
            positions = least[k - 1, :j] + np.arange(j, 0, -1) * widths[:j]
            begins[k, j] = np.argmin(positions)
            least[k, j] = positions[begins[k, j]]
    places, end = [], n
    for k in range(int(np.argmin(least[:, n])), 0, -1):
        begin = begins[k, end]
        places.append((int(end - begin), int(widths[begin])))
        end = begin
    return _merged(places)


def _merged(places: Iterable[tuple[int, int]]) -> Places:
    """Joins places of the same width, and drops widths without places."""
    found: list[tuple[int, int]] = []
    for count, width in sorted(places, key=lambda place: -place[1]):
        if found and found[-1][1] == width:
            found[-1] = (found[-1][0] + count, width)
        elif count:
            found.append((count, width))
    return tuple(found)


def _improved(places: Places, worst: np.ndarray, widest: int) -> Places:
    """Changes a width, or gives a place the neighbouring width, as long as fewer positions are computed."""
    cost = expected_positions(places, worst, widest)
    while True:
        found = min(_neighbours(places, widest), key=lambda other: expected_positions(other, worst, widest))
        if (least := expected_positions(found, worst, widest)) >= cost:
            return places
        places, cost = found, least


def _neighbours(places: Places, widest: int) -> Iterator[Places]:
    """Yields the places of a line that differ by one width or in one place, and the given ones."""
    yield places
    for at, (count, width) in enumerate(places):
        for other in (width - _MULTIPLE, min(width + _MULTIPLE, widest)):
            yield _merged((*places[:at], (count, other), *places[at + 1 :]))
        for to in (at - 1, at + 1):
            if 0 <= to < len(places):
                counts = [n - (place == at) + (place == to) for place, (n, _) in enumerate(places)]
                yield _merged(zip(counts, (width for _, width in places), strict=True))
