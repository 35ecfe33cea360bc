"""Prints the numbers in the text of the study's pages that no table of a report has, from the committed results.

Each is printed in the words in which its page has it, so that a test can look for them there
(`tests/study/test_study_pages.py`). Intervals are Student's over seeds unless they are said to be for new problems too.

    python -m benchmarks.study_pages
"""

from __future__ import annotations

import argparse
import functools
import itertools
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import special, stats

from benchmarks import study_executed
from jaxblock.data.text import corpus
from jaxblock.study import results
from jaxblock.study.crossed import crossed_bootstrap
from jaxblock.study.crossover import crossover
from jaxblock.study.experiments import Experiment
from jaxblock.study.relation import ALL, LAST, Scored, agreement, relate
from jaxblock.study.scores import solved
from jaxblock.study.statistics import t_interval

DOCS = Path(__file__).resolve().parents[1] / "docs" / "study"
EIGHT, THREE = range(8), range(3)
STEPS = {200: 191, 400: 381, 800: 762, 1600: 1525, 3200: 3049}
"""The steps of classical SFT that have as many FLOPs as each number of blockwise ones."""
BLOCKS = {"block_1": 1610, "block_4": 1606, "blockwise": 1600, "block_16": 1589, "classical": 1525}
"""The arms of the grid of block sizes, by size, and their steps."""
WAYS = ("by_1", "by_4", "by_8", "by_16", "by_64")


@functools.cache
def read(folder: str) -> dict[str, results.Result]:
    """Returns the committed results of a study by their cells."""
    return results.read_results(DOCS / folder)


def right(folder: str, arm: str, point: str, seeds: Sequence[int] = EIGHT) -> np.ndarray:
    """Returns which problems are solved: [seeds, problems]."""
    return np.array([solved(read(folder)[f"{arm}-s{seed}"]["scores"][point]) for seed in seeds], np.float64)


def rates(folder: str, arm: str, point: str, seeds: Sequence[int] = EIGHT) -> np.ndarray:
    """Returns Pass@1 in % of each seed."""
    return 100 * right(folder, arm, point, seeds).mean(-1)


def differences(folder: str, budget: int) -> np.ndarray:
    """Returns Blockwise SFT minus classical SFT at equal compute, decoded by blocks of 8: [seeds, problems]."""
    theirs = right(folder, "classical", f"{STEPS[budget]}/by_8")
    return right(folder, "blockwise", f"{budget}/by_8") - theirs


def listed(values: Sequence[float] | np.ndarray, digits: int, unit: str = "", sign: str = "") -> str:
    """Returns numbers as a page has them, such as ``0.65, 0.41 and 0.63``."""
    *first, last = (f"{value:{sign}.{digits}f}{unit}".replace("-", "−") for value in values)
    return f"{', '.join(first)} and {last}" if first else last


def ends(found: Sequence[float], digits: int = 1, sign: str = "+") -> str:
    """Returns an interval as a page has it, such as ``+4.0 points [+2.6, +5.3]`` without its unit."""
    mean, low, high = (f"{value:{sign}.{digits}f}".replace("-", "−") for value in found[:3])
    return f"{mean} [{low}, {high}]"


def no_crossover(folder: str) -> str:
    """Says how likely it is that there is no crossover at equal compute."""
    found = crossover(list(STEPS), np.stack([differences(folder, budget) for budget in STEPS]))
    shares = found.shares
    return (
        f"in {shares['overtakes']:.0%} of the bootstrap's draws Blockwise SFT overtakes somewhere in the range, in "
        f"{shares['is overtaken']:.0%} it is overtaken, and in {found.none:.0%} there is no crossover"
    )


def times(folder: str) -> str:
    """Says how much longer a classical step took, by the medians of the recorded times."""
    blockwise, classical = (
        np.median(
            [1e3 * cell["seconds"]["training"] / cell["steps"] for cell in read(folder).values() if cell["arm"] == arm]
        )
        for arm in ("blockwise", "classical")
    )
    return f"{blockwise:.0f} and {classical:.0f} ms, {classical / blockwise - 1:.0%} more"


def equal_compute() -> list[str]:
    """Returns what is said of equal compute."""
    gaps = 100 * differences("small", 3200).mean(-1)
    start, theirs = rates("small", "start", "5000/by_8"), rates("small", "classical", "3049/by_8")
    moved = rates("small", "classical", "3200/by_8") - theirs
    with_start = [np.corrcoef(start, of)[0, 1] for of in (theirs, rates("small", "blockwise", "3200/by_8"), gaps)]
    found = {arm: study_executed.scores(read("small"), arm) for arm in ("blockwise", "classical")}
    rows = study_executed.compare(found["blockwise"], found["classical"])
    t = {row.budget: row.solved[0] / (row.solved[2] - row.solved[0]) * special.stdtrit(7, 0.975) for row in rows}
    p = {budget: min(1.0, len(rows) * 2 * float(special.stdtr(7, -abs(at)))) for budget, at in t.items()}
    return [
        no_crossover("small"),
        f"runs from {listed([gaps.min()], 1)} points (seed {gaps.argmin()}) to {listed([gaps.max()], 1, '', '+')} (seed {gaps.argmax()}), "
        f"a standard deviation of {gaps.std(ddof=1):.0f}",
        f"changed by {listed([moved.min()], 0)} to {listed([moved.max()], 0, '', '+')} points, with a standard deviation of "
        f"{moved.std(ddof=1):.0f}",
        f"with that of classical SFT {with_start[0]:.2f}, of Blockwise SFT {with_start[1]:.2f}",
        f"the difference ({listed(with_start[2:], 2)}, 8 seeds)",
        f"p = {p[400]:.3f}, {p[800]:.3f} and {p[1600]:.3f}",
        times("small"),
        times("small_plateau"),
    ]


def plateau() -> list[str]:
    """Returns what is said of the runs from one start."""
    whole = [
        right("small_plateau", "classical", f"{at}/by_64") - right("small_plateau", "classical", f"{at}/by_8")
        for at in (1525, 3049)
    ]
    after = [
        ends([100 * end for end in crossed_bootstrap(one)[:3]], sign="").replace(" [", " points [", at == 0)
        for at, one in enumerate(whole)
    ]
    return [
        no_crossover("small_plateau"),
        f"a standard deviation of {100 * differences('small_plateau', 3200).mean(-1).std(ddof=1):.0f} points",
        f"{after[0]} after 1,600 steps and {after[1]} after 3,200",
        *repeated(),
    ]


def repeated() -> list[str]:
    """Returns what is said of the runs from one start that were made once more."""
    again = read("small_repeated")
    found = {arm: study_executed.scores(again, arm) for arm in ("blockwise", "classical")}
    rows = study_executed.compare(found["blockwise"], found["classical"])
    p = corrected(*(100 * differences("small_repeated", budget).mean(-1) for budget in STEPS))
    start = solved(again["start-s100"]["scores"]["5000/by_8"]).mean()
    return [
        *(f"| {row.budget:,} | {ends(row.solved)} | {ends(row.nelbo, 3)} |" for row in rows),
        f"p = {listed(p[2:], 3)}",
        no_crossover("small_repeated"),
        f"It solves {start:.1%} of the test problems of its own task",
    ]


def corrected(*gaps: np.ndarray) -> list[float]:
    """Returns the p values of t tests over seeds, times their number (Bonferroni)."""
    return [min(1.0, len(gaps) * float(stats.ttest_1samp(gap, 0).pvalue)) for gap in gaps]


def block_size() -> list[str]:
    """Returns the table by block size, and what the effect is without the whole response."""
    grid = np.array([[rates("small", arm, f"{at}/{way}") for way in WAYS] for arm, at in BLOCKS.items()])
    rows, sizes = [], len(WAYS)
    for at, way in enumerate(WAYS):
        rest = [other for other in range(sizes) if other != at]
        own, ways, arms = grid[at, at], grid[at, rest].mean(0), grid[rest, at].mean(0)
        rows.append(
            f"| {way[3:]} | {own.mean():.1f}% | {ways.mean():.1f}% | {ends(t_interval(own - ways))} | {own.mean():.1f}% | "
            f"{arms.mean():.1f}% | {ends(t_interval(own - arms))} |"
        )
    few = grid[:-1, :-1]
    own = np.einsum("aas->as", few)
    apart = ((own - (few.sum(0) - own) / (sizes - 2)).mean(0),)
    fewer = [
        ends(t_interval(one)).removeprefix("−").replace(" [", " points fewer [", 1)
        for one in (grid[-1, 2] - grid[-1, -1], grid[2, -1] - grid[2, 2])
    ]
    return [*rows, ends(t_interval(*apart)).replace(" [", " points [", 1), *fewer]


def equal_tokens() -> list[str]:
    """Returns how many of classical SFT's masked tokens are fill, and what would follow."""
    blocks = sum(count for _, count in read("small")["classical-s0"]["scores"]["443/by_8"]["nelbo_by_block"]) / 64
    ahead = rates("small", "blockwise", "3200/by_8").mean() - rates("small", "classical", "762/by_8").mean()
    return [
        f"{8 * blocks:.1f} positions on average ({blocks:.2f} blocks, on the 64 responses of the NELBO)",
        f"about {round(443 * 8 / blocks, -1):.0f} steps in place of 443",
        f"at least some {ahead:.0f} points in place of 40",
    ]


def resolved(measured: Iterable[list[dict[str, Any]]]) -> tuple[int, int, int]:
    """Returns how many intervals of variances, in units of the default's, lie above 1 and below it, and of how many."""
    above = below = total = 0
    for of in measured:
        for name in of[0]["variance"]:
            values = np.log([one["variance"][name]["all"]["ratio"][0] for one in of])
            if np.any(values):
                found = t_interval(values)
                above, below, total = above + (found.low > 0), below + (found.high < 0), total + 1
    return above, below, total


def variance() -> list[str]:
    """Returns how many intervals of variances exclude 1, and which part of a row's variance the count has."""
    above, below, total = resolved(gradients().values())
    closer = resolved(
        [read("small_variance")[f"{arm}-s{seed}"]["scores"][f"{at}/gradients"] for seed in range(12)]
        for arm, at in (("begun", 1), ("blockwise", 400))
    )
    laws = np.array([
        [read("small_secondary")[f"{arm}-s{seed}"]["scores"]["1600/by_8"]["nelbo_per_token"]["mean"] for seed in THREE]
        for arm in ("exact_count", "bernoulli", "pairs", "antithetic", "blockwise")
    ])  # fmt: skip
    return [
        f"{above + below} of {total}",
        f"of {closer[2]} intervals {closer[0]} lie above 1 and {closer[1]} below it",
        f"differ by {np.ptp(laws.mean(1)):.3f} at most, while the seeds of one law differ by up to {np.ptp(laws, axis=1).max():.3f}",
    ]


def gradients() -> dict[tuple[str, int], list[dict[str, Any]]]:
    """Returns the measurements of the three seeds, by arm and steps."""
    points = [
        ("begun", 1),
        *itertools.product(("blockwise",), (400, 3200)),
        *itertools.product(("classical",), (381, 3049)),
    ]
    return {
        (arm, at): [read("small_gradients")[f"{arm}-s{seed}"]["scores"][f"{at}/gradients"] for seed in THREE]
        for arm, at in points
    }


def theorems() -> list[str]:
    """Returns numbers of single seeds about the direction and the bound, and what the bound's gap is as a share of the NELBO."""
    of = gradients()
    cosines = {name: [one["direction"][name]["cosine"][0] for one in of[place]] for name, place in (
        ("classical", ("classical", 3049)), ("prefix 0, suffix 0", ("blockwise", 3200)))}  # fmt: skip
    bound = {place: [one["tightness"]["8"] for one in of[place]] for place in of}
    gaps = [one["gap"][0] for one in bound["begun", 1]]
    shares = [
        np.mean([one["gap"][0] for one in bound[place]]) / np.mean([one["nelbo"][0] for one in bound[place]])
        for place in (("begun", 1), ("blockwise", 3200), ("classical", 3049))
    ]
    nelbo = [one["nelbo"][0] for one in bound["begun", 1]]
    return [
        f"by seed {listed(cosines['classical'], 2)};",
        f"the suffix at the last checkpoint: {listed(cosines['prefix 0, suffix 0'], 2)}",
        f"{np.mean(nelbo):.1f} nats a token on average: {listed(nelbo, 1)}",
        f"({listed(gaps, 2)} by seed)",
        f"from {shares[0]:.0%} to {shares[1]:.0%} and {shares[2]:.0%}",
        *steepness(of),
    ]


def steepness(of: dict[tuple[str, int], list[dict[str, Any]]]) -> list[str]:
    """Returns the ranges of the steepness: of the largest rows over rates of noise, and of the medians of single seeds."""
    names = [f"prefix {rate:g}, suffix 1" for rate in (0.15, 0.3, 0.5)]
    found = {
        place: [[one["direction"][name]["steepness"] for one in seeds] for name in names] for place, seeds in of.items()
    }
    most = [between(np.array([max(one["largest"] for one in each) for each in two])) for two in found.values()]
    every = {place: list(itertools.chain(*two)) for place, two in found.items()}
    start, *later = (np.array([one["median"] for one in two]) for two in every.values())
    return [
        f"in the {between(np.array([one['rows'] for two in every.values() for one in two]))} rows",
        f"is {most[0]} at the start, {most[1]} and {most[2]} along blockwise fine-tuning, {most[3]} and {most[4]} along classical",
        f"medians of single seeds are {between(start)} at the start and {np.min(later):.2f} to {np.max(later):.0f} later",
    ]


def reviewers() -> list[str]:
    """Returns what is said of single seeds, of forgetting by length, and of the NELBO against Pass@1."""
    ours, theirs = (
        rates("small_plateau", arm, point) for arm, point in (("blockwise", "1600/by_8"), ("classical", "1525/by_8"))
    )
    above = [of[:3].mean() - of.mean() for of in (ours, theirs)]
    floor = rates("small_secondary", "classical_30", "1525/by_8", THREE)
    high = np.sort(gaps("classical_60", "1525/by_8", "classical", "1525/by_8"))[::-1]
    early = rates("small_secondary", "early_start", "1000/by_8", THREE)
    ends_of = [
        gaps(arm, f"{at}/{way}", arm, f"{at}/by_8")
        for arm, at in (("blockwise", 1600), ("classical", 1525))
        for way in ("no_fill", "stop_last")
    ]
    return [
        f"({listed(ours[:3], 1, '%')})",
        f"{ours[:3].mean():.1f}%, lies {above[0]:.1f} points above that of all 8 seeds ({ours.mean():.1f}%)",
        f"{theirs[:3].mean():.1f}%, {above[1]:.1f} points ({theirs.mean():.1f}%)",
        f"({listed(floor, 1, '%')}) lie above all 8 runs of plain classical SFT at this budget "
        f"({theirs.min():.1f}% to {theirs.max():.1f}%)",
        f"gains {listed(high[high > 0], 0)} points in two seeds and loses {listed(-high[high < 0], 0)} in the other",
        f"fewer problems are solved, by {between(-np.array(ends_of))} points",
        f"`draws_2` is {listed(-gaps('draws_2', '800/by_8'), 0)} points behind in the three seeds, "
        f"`draws_4` {listed(-gaps('draws_4', '400/by_8'), 0)}",
        f"{early.mean():.1f}% ({listed(early, 1, '%')})",
        f"which for classical SFT is {listed(1 + gaps('classical', '1525/by_8'), 0)} points below its own",
        *forgotten(),
        *agreements(),
    ]


def gaps(arm: str, point: str, control: str = "blockwise", of: str = "1600/by_8") -> np.ndarray:
    """Returns the difference of two scores of the secondary study in points, by seed."""
    return rates("small_secondary", arm, point, THREE) - rates("small_secondary", control, of, THREE)


def between(values: np.ndarray, digits: int = 0, unit: str = "") -> str:
    """Returns the smallest and the largest number as a page has them, such as ``7 to 20``."""
    return f"{values.min():.{digits}f}{unit} to {values.max():.{digits}f}{unit}"


def ablations() -> list[str]:
    """Returns what is said of single seeds of the ablations."""
    stopped = [read("small_secondary")[f"paper-s{seed}"]["scores"]["1600/by_8"]["stopped"] for seed in THREE]
    above = [int((gaps(f"prefix_{rate}", "1600/by_8") > 0).sum()) for rate in (15, 30, 50)]
    assert above == [1, 1, 0] and (gaps("window_0", "1600/by_8") < 0).all()
    return [
        f"three seeds solve fewer, by {between(-gaps('window_0', '1600/by_8'))} points",
        f"with 50% all three, by {between(-gaps('prefix_50', '1600/by_8'))} points",
        f"{listed(stopped, 0)} of 256 answers stop",
    ]


def forgotten() -> list[str]:
    """Returns the table of Pass@1 on the start's own task by the number of steps of its problems."""
    few = np.array([one["answer"].count("=") <= 3 for one in corpus.generate("test", 256, level="short")])
    rows = [f"problems of 2 and 3 steps ({few.sum()}) | of 4 and 5 steps ({(~few).sum()})"]
    for arm, point, seeds, name in (
        ("start", "5000/by_8", [100], "start"),
        ("blockwise", "1600/on_short", THREE, "blockwise, seeds 0, 1 and 2"),
        ("classical", "1525/on_short", THREE, "classical, seeds 0, 1 and 2"),
    ):
        of = right("small_secondary", arm, point, seeds)
        said = [", ".join(f"{100 * one:.0f}%" for one in of[:, chosen].mean(-1)) for chosen in (few, ~few)]
        rows.append(f"| {name} | {said[0]} | {said[1]} |")
    return rows


def agreements() -> list[str]:
    """Returns how often the NELBO and Pass@1 have the same order: of close pairs, between the two objectives, and in the first study."""
    study, plan = results.read_plan(DOCS / "small_secondary")
    related = relate(study.experiments["bound"], plan, read("small_secondary"), study.seeds)
    last = {(one.arm, one.seed): one for one in related.scores}  # points are sorted by their steps
    close = [close_tau([one for one in last.values() if one.seed == seed]) for seed in THREE]
    alike = []
    for budget, at in STEPS.items():
        theirs, ours = (f"{at}/by_8", f"{budget}/by_8")
        nelbo = [nelbo_of("blockwise", seed, ours) - nelbo_of("classical", seed, theirs) for seed in EIGHT]
        gap = differences("small_plateau", budget).mean(-1)
        alike.append(int(np.sum(np.sign(gap) == -np.sign(nelbo))))
    first, its_plan = results.read_plan(DOCS / "small")
    pairs = relate(
        Experiment("", tuple(BLOCKS), decodings=("by_8",), kind="relation"), its_plan, read("small"), first.seeds
    )
    all_pairs, longest = (ends(pairs.over_seeds(kind) or (), 2) for kind in (ALL, LAST))
    return [
        f"it is {listed(close, 2)} in the three seeds",
        f"alike in {', '.join(map(str, alike[:3]))} and {alike[3]} seeds of 8 at the budgets up to 1,600, and in {alike[4]} of 8 at 3,200",
        f"{all_pairs} over all pairs of a seed, {longest} over those of the longest runs",
    ]


def nelbo_of(arm: str, seed: int, point: str) -> float:
    """Returns the NELBO of a run from the start at its plateau."""
    found: float = read("small_plateau")[f"{arm}-s{seed}"]["scores"][point]["nelbo_per_token"]["mean"]
    return found


def close_tau(scores: list[Scored], points: float = 10) -> float:
    """Returns Kendall's tau-b of -NELBO and Pass@1 over the pairs of scores whose Pass@1 differ by at most so many points."""
    rate = np.array([one.rate for one in scores])
    near = np.abs(np.subtract.outer(rate, rate)) <= points / 100
    return agreement([-one.nelbo for one in scores], rate.tolist(), np.triu(near, 1))


def minutes() -> list[str]:
    """Returns how long the cells of a seed took."""
    taken = {
        folder: {
            seed: sum(sum(one["seconds"].values()) for one in read(folder).values() if one["seed"] == seed) / 60
            for seed in EIGHT
        }
        for folder in ("small", "small_plateau")
    }
    first, later = list(taken["small"].values()), list(taken["small_plateau"].values())
    return [
        f"{min(first):.0f} to {max(first):.0f} minutes",
        f"{min(later):.0f} to {max(later[2:]):.0f} minutes, of seeds 0 and 1 {later[0]:.0f} and {later[1]:.0f}",
    ]


PAGES: dict[str, Callable[[], list[str]]] = {
    "equal_compute.md": equal_compute,
    "plateau.md": plateau,
    "block_size.md": block_size,
    "equal_tokens.md": equal_tokens,
    "variance.md": variance,
    "gradients.md": theorems,
    "ablations.md": ablations,
    "reviewers.md": reviewers,
    "running.md": minutes,
}


def main() -> None:
    """Prints the numbers, page by page."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    for page, said in PAGES.items():
        print(f"\n{page}", *said(), sep="\n")


if __name__ == "__main__":
    main()
