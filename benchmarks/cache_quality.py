"""Measures what the decoder's caches cost in answers: cache x rule x threshold on a trained run, against no cache.

Every setting decodes the same held-out problems. The table gives forward passes, the positions that they had to compute (token-forwards),
the time of decoding, Pass@1 with its 95% interval, and McNemar's exact test against `decode.cache none` under the same rule. Results
are kept after each setting, so that the same command goes on where it stopped. The picture shows Pass@1 against token-forwards.

    python -m benchmarks.cache_quality --run runs/quickstart/blockwise --prepared prepared/quickstart --out runs/caches
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, get_args

from matplotlib.figure import Figure

from jaxblock import loading
from jaxblock.data.store.prepared_folder import open_prepared
from jaxblock.diffusion.decoding.config import CacheName, DecodeConfig
from jaxblock.evaluation.graders import find_grader
from jaxblock.evaluation.runner import Evaluator
from jaxblock.evaluation.statistics import mcnemar_p
from jaxblock.parallel.host_memory import keep_freed_memory
from jaxblock.parallel.rows import on_mesh_of
from jaxblock.reporting.plot_style import COLOURS, label_axes, save_png, styled

CACHES: tuple[CacheName, ...] = get_args(CacheName)


class Rule(NamedTuple):
    """Names a rule with its setting, and the fields of ``DecodeConfig`` that it needs."""

    name: str
    fields: dict[str, Any]


def rules(block: int) -> list[Rule]:
    """Returns the rules to compare: quotas of 1, 2 and 4 tokens a step, and four thresholds."""
    quotas = [Rule(f"{k} a step", {"steps_per_block": block // k}) for k in (1, 2, 4) if block % k == 0]
    bounds = (0.95, 0.9, 0.7, 0.5)
    return quotas + [Rule(f"threshold {x}", {"rule": "confidence_threshold", "threshold": x}) for x in bounds]


def measure(args: argparse.Namespace, done: dict[str, Any], keep: Path) -> None:
    """Adds the missing results to ``done``, and writes them to ``keep`` one by one."""
    model, prepared = loading.load(args.run), open_prepared(args.prepared)
    source = prepared.records("test")
    records = [source[index] for index in range(min(args.problems, len(source)))]
    grader = find_grader("gsm8k_strict")
    for rule in rules(model.canvas.block):
        for cache in CACHES:
            if (name := f"{rule.name}, {cache}") in done:
                continue
            plain = DecodeConfig(batch_size=args.batch, cache=cache)
            options = dataclasses.replace(plain, **rule.fields)
            evaluator = Evaluator(model.net, model.canvas, prepared.encoder, options, grader)
            with on_mesh_of(model.params):
                found = evaluator.solve(model.params, records)
            done[name] = {
                "rule": rule.name,
                "cache": cache,
                "correct": [bool(row["correct"]) for row in found.rows],
                "interval": [found.pass_at_1.low, found.pass_at_1.high],
                "nfe": found.nfe,
                "token_forwards": found.costs.token_forwards / len(records),
                "seconds": found.seconds,
            }
            keep.write_text(json.dumps(done))
            print(f"{name}: {sum(done[name]['correct'])} of {len(records)}, {found.seconds:.1f} s", flush=True)


def table(done: dict[str, Any]) -> str:
    """Formats the results as a Markdown table."""
    lines = [
        "| rule | cache | NFE | token-forwards | seconds | Pass@1 | interval | only `none` / only this | p |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in done.values():
        right, plain = row["correct"], done[f"{row['rule']}, none"]["correct"]
        only = [sum(a > b for a, b in zip(*pair, strict=True)) for pair in ((plain, right), (right, plain))]
        test = ["", ""] if row["cache"] == "none" else [f"{only[0]} / {only[1]}", f"{mcnemar_p(*only):.2g}"]
        low, high = row["interval"]
        cells = [row["rule"], f"`{row['cache']}`", f"{row['nfe']:.1f}", f"{row['token_forwards']:,.0f}"]
        cells += [f"{row['seconds']:.1f}", f"{sum(right) / len(right):.1%}", f"{low:.1%} to {high:.1%}", *test]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def draw(done: dict[str, Any], path: Path, title: str) -> None:
    """Draws Pass@1 against token-forwards: a line for each cache and kind of rule."""
    with styled():
        figure = Figure(figsize=(7.5, 4.5))
        axes = figure.subplots()
        for cache, colour in zip(CACHES, COLOURS, strict=False):
            for kind, style in (("threshold", "o-"), ("a step", "s--")):
                rows = [row for row in done.values() if row["cache"] == cache and kind in row["rule"]]
                x = [row["token_forwards"] for row in rows]
                y = [100 * sum(row["correct"]) / len(row["correct"]) for row in rows]
                error = [[abs(y[i] - 100 * row["interval"][side]) for i, row in enumerate(rows)] for side in (0, 1)]
                label = f"cache {cache}, {'threshold rule' if kind == 'threshold' else 'quota'}"
                axes.errorbar(x, y, error, fmt=style, color=colour, label=label, capsize=2, linewidth=1.2)
        label_axes(axes, "token-forwards per problem", "Pass@1 in %, with 95% interval", log_x=True)
        figure.suptitle(title)
        figure.legend(loc="outside lower center", ncols=len(CACHES))
        save_png(figure, path)


def main(argv: Sequence[str] | None = None) -> None:
    """Measures what is missing, and writes ``results.json``, ``results.md`` and ``pass_at_1.png``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", required=True, help="the trained run")
    parser.add_argument("--prepared", required=True, help="its data")
    parser.add_argument("--out", type=Path, required=True, help="the folder for the results")
    parser.add_argument("--problems", type=int, default=512)
    parser.add_argument("--batch", type=int, default=64)
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    keep = args.out / "results.json"
    done = json.loads(keep.read_text()) if keep.exists() else {}
    measure(args, done, keep)
    (args.out / "results.md").write_text(table(done))
    draw(done, args.out / "pass_at_1.png", f"Pass@1 against work: {Path(args.run).name}")
    print(table(done))


if __name__ == "__main__":
    keep_freed_memory()  # as the command line does
    main()
