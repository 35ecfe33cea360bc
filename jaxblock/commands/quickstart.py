"""``jaxblock quickstart``: trains, scores and exports a small model, from nothing to a Hugging Face checkpoint."""

from __future__ import annotations

import pathlib
import shlex
from dataclasses import dataclass

from jaxblock.commands import say
from jaxblock.config.config import Config
from jaxblock.errors import UserError
from jaxblock.io.paths import explained, is_remote

RUNS, PREPARED = "runs/quickstart", "prepared/quickstart"
"""Where the presets of the quickstart have runs and data."""
PROMPT = "Zoe keeps 9 keys. Zoe buys 5 more. Diego borrows 6 keys. How many keys are there now?"


@dataclass(frozen=True)
class Options:
    """Prepares built-in problems, trains a small model on them classically and by Blockwise SFT, scores both, and exports."""

    out: str | None = None
    """Folder for everything; without one, data go to prepared/quickstart and all else to runs/quickstart, as in the presets."""
    control: bool = False
    """Whether to also spend the FLOPs of Blockwise SFT on more classical training from the same start, and score that."""
    short: bool = False
    """Whether to cut every stage to a few steps, in runs/quickstart_short: shows in a minute or two that the installation works."""


def run(options: Options, config: Config) -> int:
    """Runs the phases, each as a process of its own, then prints times, scores and what to try next.

    What is done already is skipped, and a training run that was interrupted goes on where it stopped.

    Returns:
        0, or the exit code of the phase that failed.

    Raises:
        UserError: the folder cannot be written.
    """
    from jaxblock.quickstart.phases import read_phases
    from jaxblock.quickstart.picture import save_picture
    from jaxblock.quickstart.report import format_phases, format_scores
    from jaxblock.quickstart.stages import PhaseFailed, Quickstart

    out, data = _places(options)
    with explained("make the folder", out):
        out.mkdir(parents=True, exist_ok=True)
    work = Quickstart(out, data, options.short)
    try:
        work.run(options.control)
    except PhaseFailed as failed:
        say(f"\nquickstart: {failed.name!r} ended with exit code {failed.code}. The same command goes on from here")
        return failed.code
    scores = {
        "before (classical)": out / "score_before" / "summary.json",
        "after (Blockwise SFT)": out / "score_after" / "summary.json",
        "control (more classical)": out / "score_control" / "summary.json",
    }
    print(f"\n== result\n{format_phases(read_phases(work.record))}\n\n{format_scores(scores)}")
    save_picture(scores, out / "scores.png")
    if options.short:
        print("\nThe installation works. The model learned nothing in so few steps: run it without --short.")
    else:
        print(_next_steps(options, out, data))
    return 0


def _places(options: Options) -> tuple[pathlib.Path, pathlib.Path]:
    """Returns the folder of runs and the folder of data."""
    if options.out is None and not options.short:
        return pathlib.Path(RUNS), pathlib.Path(PREPARED)
    out = options.out or f"{RUNS}_short"
    if is_remote(out):
        raise UserError(f"--out {out}: the quickstart writes to a local folder")
    return pathlib.Path(out), pathlib.Path(out) / "prepared"


def _next_steps(options: Options, out: pathlib.Path, data: pathlib.Path) -> str:
    """Says what lies where, and what can be tried with it."""
    folder = "" if options.out is None else f" --out {shlex.quote(options.out)}"
    lines = f"""
{data}: the data as tokens, the tokenizer, a manifest of what was kept
{out}:
  classical/, blockwise/   the runs: checkpoints, metrics.jsonl, plots/
  score_*/                 each problem's answer and verdict, and a summary
  scores.png               Pass@1 and likelihood bound of all of them
  export/                  the Hugging Face checkpoint
  phases.jsonl             time and memory of every phase

Try next:
  # what the model sees in training, and which tokens carry loss
  jaxblock inspect --config quickstart_blockwise --data.prepared {shlex.quote(str(data))}
  # watch it decode, block by block
  jaxblock decode --checkpoint {shlex.quote(str(out / "blockwise"))} --watch {shlex.quote(PROMPT)}
  # every setting; your own JSONL goes in data.train
  jaxblock train --help-all"""
    if not options.control:
        lines += f"\n  # would as much classical training have done as well?\n  jaxblock quickstart{folder} --control"
    return lines
