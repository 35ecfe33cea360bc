"""Compares the arms of a committed study at equal *executed* FLOPs, where its budgets count every layer over the whole canvas.

In an unrolled network the last layer is computed at the active positions only, which saves Blockwise SFT more than classical SFT.
Of three layers that is much, of thirty-two it is nothing, so the study does not count it (docs/study/protocol.md). This asks what
counting it would change. Classical SFT has no checkpoint at the steps that it would get: its scores are interpolated, seed by seed,
along straight lines over the logarithm of its steps. Exploratory: intervals are t intervals over seeds.

    python -m benchmarks.study_executed docs/study/small
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jaxblock.study import results
from jaxblock.study.scores import solved
from jaxblock.study.statistics import t_interval

BLOCKWISE, CLASSICAL = 2.48, 3.24
"""GFLOP that XLA counts in an unrolled step of the small studies' network."""
DECODING = "by_8"


class Row(NamedTuple):
    """Holds the differences (blockwise minus classical) at one budget: mean, and the ends of a 95% interval over seeds."""

    budget: int
    steps: float
    solved: tuple[float, float, float]
    nelbo: tuple[float, float, float]


def scores(found: dict[str, results.Result], arm: str) -> dict[int, dict[int, tuple[float, float]]]:
    """Returns Pass@1 in % and the NELBO in nats per text token of an arm, by its seed and its number of steps."""
    table: dict[int, dict[int, tuple[float, float]]] = {}
    for result in found.values():
        if result["arm"] == arm:
            points = (point.split("/") for point in result["scores"])
            table[result["seed"]] = {
                int(steps): (
                    100 * float(solved(result["scores"][f"{steps}/{way}"]).mean()),
                    result["scores"][f"{steps}/{way}"]["nelbo_per_token"]["mean"],
                )
                for steps, way in points
                if way == DECODING
            }
    return table


def compare(
    ours: dict[int, dict[int, tuple[float, float]]], theirs: dict[int, dict[int, tuple[float, float]]]
) -> list[Row]:
    """Returns the differences at each budget for which the other arm's steps lie within those that it was scored at."""
    rows = []
    for budget in sorted(set.intersection(*(set(points) for points in ours.values()))):
        steps = budget * BLOCKWISE / CLASSICAL
        differences = []
        for seed, points in theirs.items():
            at = sorted(points)
            if not at[0] <= steps <= at[-1]:
                break
            there = [np.interp(np.log(steps), np.log(at), [points[x][kind] for x in at]) for kind in (0, 1)]
            differences.append(np.subtract(ours[seed][budget], there))
        else:
            solved, nelbo = (
                (float(m), float(low), float(high)) for m, low, high, *_ in map(t_interval, np.transpose(differences))
            )
            rows.append(Row(budget, steps, solved, nelbo))
    return rows


def main(argv: Sequence[str] | None = None) -> list[Row]:
    """Prints the differences of a study as a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "study", help="folder of a study that has the arms blockwise and classical, such as docs/study/small"
    )
    found = results.read_results(parser.parse_args(argv).study)
    rows = compare(scores(found, "blockwise"), scores(found, "classical"))
    print("| blockwise steps | classical steps (interpolated) | Pass@1, percentage points | NELBO |\n|---|---|---|---|")
    for row in rows:
        (mean, low, high), (bound, least, most) = row.solved, row.nelbo
        print(
            f"| {row.budget:,} | {row.steps:,.0f} | {mean:+.1f} [{low:+.1f}, {high:+.1f}] | {bound:+.4f} [{least:+.4f}, {most:+.4f}] |"
        )
    return rows


if __name__ == "__main__":
    main()
