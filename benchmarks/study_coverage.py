"""Measures how often the study's intervals hold the true value, and how often its primary test errs and finds, by simulation.

Differences are drawn from worlds whose true mean is known: normal parts of seeds, problems and the rest, or right and wrong answers.
Prints the tables of docs/study/statistics.md.

    python -m benchmarks.study_coverage --replicates 2000
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from statistics import NormalDist

import numpy as np
from scipy import special

from jaxblock.study.crossed import crossed_draws, crossed_variance, resampled_means
from jaxblock.study.crossover import crossover
from jaxblock.study.hypotheses import crossed_p, holm, primary_p, sign_flip_p

World = Callable[[np.random.Generator, int, int, int, float], np.ndarray]
"""Draws differences [replicates, seeds, problems] from (generator, replicates, seeds, problems, true mean)."""

LEVEL = 0.05
CHUNK = 250
RESAMPLES = 1000


def normal(of_seeds: float, of_problems: float, rest: float) -> World:
    """Returns a world in which seeds, problems and the rest add normal parts with these standard deviations."""

    def draw(rng: np.random.Generator, replicates: int, seeds: int, problems: int, mean: float) -> np.ndarray:
        difference = rest * rng.standard_normal((replicates, seeds, problems))
        difference += of_seeds * rng.standard_normal((replicates, seeds, 1))
        difference += of_problems * rng.standard_normal((replicates, 1, problems))
        return mean + difference

    return draw


def answers(of_seeds: float, of_problems: float, difficulty: float) -> World:
    """Returns a world in which two arms answer right or wrong (a probit model).

    An arm is right where ability - difficulty + noise is positive. The noise is standard normal, for each answer anew. Seeds and
    problems shift the ability of each arm on their own, with these standard deviations; problems are as hard for both arms.
    """
    scale = np.sqrt(1 + of_seeds**2 + of_problems**2 + difficulty**2)

    def draw(rng: np.random.Generator, replicates: int, seeds: int, problems: int, mean: float) -> np.ndarray:
        hard = difficulty * rng.standard_normal((replicates, 1, problems))
        right = []
        for ability in (
            scale * NormalDist().inv_cdf(0.5 + mean),
            0.0,
        ):  # so that the arms are right by 0.5 + mean and 0.5
            shift = normal(of_seeds, of_problems, 1.0)(rng, replicates, seeds, problems, ability)
            right.append(shift > hard)
        return right[0].astype(np.float64) - right[1]

    return draw


WORLDS: dict[str, World] = {
    "seeds only": normal(0.03, 0, 1e-6),
    "problems only": normal(0, 0.5, 0.001),
    "neither (rest only)": normal(0, 0, 0.45),
    "all three": normal(0.03, 0.17, 0.45),
    "right or wrong": answers(0.1, 0.4, 1.0),
}


SIZES = ((8, 256), (8, 8), (8, 4), (30, 8), (30, 4))
"""Numbers of (seeds, problems)."""
FEW = {name: WORLDS[name] for name in ("seeds only", "problems only", "neither (rest only)", "all three")}
"""The worlds in which few problems are simulated."""


def closed_coverage(world: World, replicates: int, seeds: int, problems: int) -> float:
    """Returns the share of simulated studies whose 95% interval for new seeds and new problems, in closed form, holds the truth."""
    held = []
    for difference in _studies(world, replicates, seeds, problems, 0.0):
        found = crossed_variance(difference)
        held.append(np.abs(found.mean) <= special.stdtrit(found.df, 1 - LEVEL / 2) * np.sqrt(found.variance))
    return float(np.concatenate(held).mean())


def coverage(world: World, replicates: int, seeds: int = 8, problems: int = 256, mean: float = 0.0) -> dict[str, float]:
    """Returns, for each kind of 95% interval, the share of simulated studies whose interval holds the true mean."""
    held: dict[str, list[np.ndarray]] = {}
    for difference in _studies(world, replicates, seeds, problems, mean):
        found, centre = crossed_variance(difference), difference.mean((-2, -1))
        by_seed = difference.mean(-1)
        within = np.square(difference - by_seed[..., None]).mean((-2, -1))
        nested = np.sqrt(by_seed.var(-1) / seeds + within / (seeds * problems))
        over_seeds = by_seed.std(-1, ddof=1) / np.sqrt(seeds)
        tails = [LEVEL / 2, 1 - LEVEL / 2]
        ends = {
            "nested bootstrap": centre + np.multiply.outer(special.ndtri(tails), nested),  # its limit in many resamples
            "crossed, percentile": np.quantile(resampled_means(difference, RESAMPLES, 0), tails, axis=-1),
            "t over seeds": centre + np.multiply.outer(special.stdtrit(seeds - 1, tails), over_seeds),
            "crossed, closed form": centre
            + special.stdtrit(found.df, np.array(tails)[:, None]) * np.sqrt(found.variance),
            "crossed, corrected": np.quantile(crossed_draws(difference, RESAMPLES, 0), tails, axis=-1),
        }
        for name, (low, high) in ends.items():
            held.setdefault(name, []).append((low <= mean) & (mean <= high))
    return {name: float(np.concatenate(shares).mean()) for name, shares in held.items()}


def found_by_chance(
    world: World, replicates: int, seeds: int = 8, problems: int = 256, effect: float = 0.0
) -> dict[str, float]:
    """Returns how often Holm's method over three hypotheses claims a difference, for each p-value that it may be given.

    Without an effect: the share of studies that claim anything. With one, which the first hypothesis alone has: the share of
    studies that claim that one.
    """
    kinds = {"sign flip": lambda d: sign_flip_p(d.mean(-1)), "crossed": crossed_p, "both (primary)": primary_p}
    claims: dict[str, list[np.ndarray]] = {name: [] for name in kinds}
    means = (effect, 0.0, 0.0)
    for family in zip(
        *(_studies(world, replicates, seeds, problems, mean, at) for at, mean in enumerate(means)), strict=True
    ):
        for name, p_value in kinds.items():
            claimed = holm(np.stack([p_value(difference) for difference in family], -1)) <= LEVEL
            claims[name].append(claimed[:, 0] if effect else np.asarray(claimed.any(-1)))
    return {name: float(np.concatenate(shares).mean()) for name, shares in claims.items()}


SPREADS = {"even": (0.02,) * 5, "small study": (0.034, 0.050, 0.043, 0.071, 0.159)}
"""By world, the standard deviation of a seed's part of a difference that it has at each budget anew; the second is as large as the
whole spread over seeds of the first experiment in docs/study/small, at its five budgets."""


def crossover_coverage(
    replicates: int, at: float, spread: str = "even", slope: float = 0.03, seeds: int = 8, problems: int = 64
) -> dict[str, float]:
    """Returns what is said of simulated studies in which one arm truly overtakes the other at the budget ``at``.

    The budgets are 1, 2, 4, 8 and 16; the true difference rises by ``slope`` with each doubling. Seeds and problems have a part that
    they keep along the curve (but for the seeds of the world "small study"), and another at each budget.

    Returns:
        The shares of studies whose interval ``holds`` the budget, that say which arm is ahead at the end (``told``), and that say
        the wrong one (``wrong``).
    """
    budgets = 2.0 ** np.arange(5)
    curve = slope * (np.log2(budgets) - np.log2(at))
    of_seeds = np.array(SPREADS[spread])[:, None, None]
    ahead = np.sign(curve[-1])
    rng, said = np.random.default_rng(0), []
    for _ in range(replicates):
        kept = normal(0.03 if spread == "even" else 0.0, 0.17, 0.45)(rng, 1, seeds, problems, 0.0)
        apart = normal(0, 0.1, 0.3)(rng, budgets.size, seeds, problems, 0.0)
        apart += of_seeds * rng.standard_normal((budgets.size, seeds, 1))
        found = crossover(budgets.tolist(), curve[:, None, None] + kept + apart, resamples=400)
        end = found.ahead
        said.append((found.low <= at <= found.high, end != 0, end == -ahead))
    return dict(zip(("holds", "told", "wrong"), np.mean(said, 0).tolist(), strict=True))


def _studies(
    world: World, replicates: int, seeds: int, problems: int, mean: float, key: int = 0
) -> Iterator[np.ndarray]:
    rng = np.random.default_rng(key)
    for start in range(0, replicates, CHUNK):
        yield world(rng, min(CHUNK, replicates - start), seeds, problems, mean)


def _print_table(title: str, rows: dict[str, dict[str, float]]) -> None:
    names = list(next(iter(rows.values())))
    print(f"\n| {title} | {' | '.join(names)} |\n|---|{'---|' * len(names)}", flush=True)
    for world, row in rows.items():
        print(f"| {world} | {' | '.join(f'{share:.1%}' for share in row.values())} |")


def main() -> None:
    """Prints all tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replicates", type=int, default=2000, help="studies simulated for each number")
    parser.add_argument("--seeds", type=int, default=8, help="seeds of a study, in the table of differences found")
    parser.add_argument("--problems", type=int, default=256, help="problems of a study, in that table")
    args = parser.parse_args()
    power = {}
    for name in ("all three", "right or wrong"):
        found = {
            effect: found_by_chance(WORLDS[name], args.replicates, args.seeds, args.problems, effect)
            for effect in (0.03, 0.05, 0.08)
        }
        power[name] = {f"{effect:.0%}": shares["both (primary)"] for effect, shares in found.items()}
    _print_table(f"finds a difference of, {args.seeds} seeds and {args.problems:,} problems", power)
    for seeds in (8, 3):
        rows = {name: coverage(world, args.replicates, seeds) for name, world in WORLDS.items()}
        _print_table(f"coverage, {seeds} seeds", rows)
    chances = {name: found_by_chance(world, 2 * args.replicates) for name, world in WORLDS.items()}
    _print_table("claims anything, no effect", chances)
    few = {
        f"{seeds} x {problems}": {
            name: closed_coverage(world, args.replicates, seeds, problems) for name, world in FEW.items()
        }
        for seeds, problems in SIZES
    }
    _print_table("coverage, seeds x problems", few)
    worlds = [("even", 0.03, at) for at in (0.7, 2.0, 5.0, 20.0)]
    worlds += [("small study", slope, at) for slope in (0.01, 0.03) for at in (2.0, 5.0)]
    crossings = {
        f"{spread}, {100 * slope:g} points a doubling, at {at:g}": crossover_coverage(
            args.replicates // 4, at, spread, slope
        )
        for spread, slope, at in worlds
    }
    _print_table("true crossover (budgets 1 to 16)", crossings)


if __name__ == "__main__":
    main()
