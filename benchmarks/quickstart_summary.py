"""Prints the quickstart's numbers as markdown tables: phases, scores with intervals, and the paired tests.

It reads the files of ``jaxblock quickstart``: its record of phases, and the evaluations before, after and of the control.
Parts that are not there are left out.

    python -m benchmarks.quickstart_summary runs/quickstart
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxblock.evaluation.comparison import compare_evaluations
from jaxblock.quickstart.phases import read_phases

SCORES = {
    "before (classical)": "score_before",
    "after (Blockwise SFT)": "score_after",
    "control (more classical)": "score_control",
}
"""What is scored, and the folder of its evaluation."""

PAIRS = (("score_before", "score_after"), ("score_control", "score_after"), ("score_before", "score_control"))
"""Evaluations of the same problems to compare."""


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Formats rows as a markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def clock(seconds: float) -> str:
    """Formats a time as minutes and seconds."""
    return f"{round(seconds) // 60}m{round(seconds) % 60:02}s"


def phase_rows(entries: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Returns the rows with the wall time and peak memory of each phase, then of all of them."""
    rows = [[e["phase"], clock(e["seconds"]), f"{e['peak_bytes'] / 2**30:.2f} GiB"] for e in entries]
    if entries:
        most = max(e["peak_bytes"] for e in entries) / 2**30
        rows.append(["all", clock(sum(e["seconds"] for e in entries)), f"{most:.2f} GiB"])
    return rows


def score_row(label: str, summary: dict[str, Any]) -> list[str]:
    """Returns the row with Pass@1 and its 95% interval, NELBO and its standard error, and the decoder's cost."""
    solved, bound = summary["pass_at_1"], summary["nelbo_per_token"]
    return [
        label,
        f"{solved['rate']:.1%} ({solved['correct']} of {solved['n']})",
        f"{solved['low']:.1%} to {solved['high']:.1%}",
        f"{bound['mean']:.3g} ± {bound['se']:.2g}",
        f"{summary['nfe']:.1f}",
        f"{summary['tokens_per_forward']:.2f}",
    ]


def paired_row(run: Path, first: str, second: str) -> list[str]:
    """Returns the row with McNemar's exact test of two evaluations."""
    test = compare_evaluations(run / first / "problems.jsonl", run / second / "problems.jsonl")
    names = ", ".join(name.removeprefix("score_") for name in (first, second))
    return [names, str(test.only_a), str(test.only_b), f"{test.p_value:.2g}"]


def main(argv: Sequence[str] | None = None) -> dict[str, list[list[str]]]:
    """Prints the tables and returns their rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="?", default="runs/quickstart", help="the quickstart's folder")
    run = Path(parser.parse_args(argv).run)
    record = run / "phases.jsonl"
    there = {name for name in SCORES.values() if (run / name / "summary.json").exists()}
    found = {
        "phases": phase_rows(read_phases(record)),
        "scores": [
            score_row(label, json.loads((run / name / "summary.json").read_text(encoding="utf-8")))
            for label, name in SCORES.items()
            if name in there
        ],
        "paired": [paired_row(run, *pair) for pair in PAIRS if there.issuperset(pair)],
    }
    headers = {
        "phases": ["phase", "wall time", "peak memory"],
        "scores": ["", "Pass@1", "interval", "NELBO per text token (nats)", "NFE per problem", "tokens per forward"],
        "paired": ["paired test", "only the first right", "only the second right", "p"],
    }
    for name, header in headers.items():
        print(table(header, found[name]), end="\n\n")
    return found


if __name__ == "__main__":
    main()
