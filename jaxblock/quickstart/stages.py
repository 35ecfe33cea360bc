"""Takes the quickstart's stages in order: prepare, train classically, score, Blockwise SFT, score, export."""

from __future__ import annotations

import os
import pathlib
from dataclasses import dataclass

from jaxblock.config.presets import presets
from jaxblock.errors import printable
from jaxblock.quickstart.phases import run_phase

SHORT = {
    "train": "--train.steps 20 --train.save_every 20 --train.log_every 10 --train.eval_every 20 --train.eval_problems 8 "
    "--train.eval_nelbo_rows 8 --optimizer.warmup_steps 2 --decode.batch_size 8",
    "evaluate": "--evaluate.problems 16 --evaluate.nelbo_rows 16 --decode.batch_size 16",
}
"""The flags by which a verb does little, for a run that only shows that an installation works."""


class PhaseFailed(Exception):
    """Says that a phase ended with an exit code other than 0.

    Attributes:
        name: the phase.
        code: its exit code.
    """

    def __init__(self, name: str, code: int) -> None:
        """Keeps the phase and its exit code."""
        super().__init__(name, code)
        self.name, self.code = name, code


@dataclass(frozen=True)
class Quickstart:
    """Holds where a quickstart reads and writes, and runs its phases. What is done already is skipped.

    Attributes:
        out: the folder of runs, scores, the export and the record of phases.
        data: the folder of the prepared data.
        short: whether every stage is cut short.
    """

    out: pathlib.Path
    data: pathlib.Path
    short: bool = False

    @property
    def record(self) -> pathlib.Path:
        """Returns the file that has a line of JSON for every phase that ended."""
        return self.out / "phases.jsonl"

    def run(self, control: bool) -> None:
        """Runs all phases of the quickstart that have not ended yet.

        Args:
            control: whether the control, as much more classical training, is trained and scored too.

        Raises:
            PhaseFailed: a phase ended with an exit code other than 0.
            UserError: the folder cannot be written.
        """
        out, classical, blockwise = self.out, self.out / "classical", self.out / "blockwise"
        start = ("--model.init_from", str(classical))
        self._phase("prepare", "prepare", "quickstart_classical")
        self._phase("train, classical", "train", "quickstart_classical", "--train.out", str(classical))
        self._score("score before", classical, out / "score_before")
        self._phase("train, blockwise", "train", "quickstart_blockwise", "--train.out", str(blockwise), *start)
        self._score("score after", blockwise, out / "score_after", out / "score_before")
        if control:
            more = out / "control"
            self._phase("train, control", "train", "quickstart_control", "--train.out", str(more), *start)
            self._score("score control", more, out / "score_control", out / "score_after")
        self._export(blockwise, out / "export")

    def _phase(self, name: str, verb: str, preset: str, *flags: str) -> None:
        """Runs one verb on the prepared data with the settings of a preset."""
        settings = ("--config", str(presets()[preset]), "--data.prepared", str(self.data))
        self._start(name, verb, *settings, *(SHORT.get(verb, "").split() if self.short else ()), *flags)

    def _start(self, name: str, *arguments: str) -> None:
        print(f"\n== {name}", flush=True)
        code = run_phase(self.record, name, arguments)
        if code:
            raise PhaseFailed(name, code)

    def _score(self, name: str, run: pathlib.Path, folder: pathlib.Path, before: pathlib.Path | None = None) -> None:
        """Evaluates a run, always with the same decoder settings, so that scores can be compared."""
        flags = ["--checkpoint", str(run), "--out", str(folder)]
        if before is not None:
            flags += ["--evaluate.compare", str(before / "problems.jsonl")]
        if (summary := folder / "summary.json").exists():
            if not newer_than(run, summary):
                return _say_done(name, folder)
            print(f"\n{folder} is older than the run: it is replaced once the new evaluation is whole", flush=True)
            flags.append("--overwrite")
        self._phase(name, "evaluate", "quickstart_blockwise", *flags)

    def _export(self, run: pathlib.Path, folder: pathlib.Path) -> None:
        flags = ["--checkpoint", str(run), "--out", str(folder)]
        if (config := folder / "config.json").exists():
            if not newer_than(run, config):
                return _say_done("export", folder)
            print(f"\n{folder} is older than the run: it is replaced once the new export is whole", flush=True)
            flags.append("--overwrite")
        self._start("export", "export", *flags)


def _say_done(name: str, folder: pathlib.Path) -> None:
    print(f"\n== {name}\ndone already: {printable(str(folder))}", flush=True)


def newer_than(folder: pathlib.Path, file: pathlib.Path) -> bool:
    """Returns whether a file anywhere in the folder was changed after ``file`` was."""
    made = file.stat().st_mtime
    return any(
        os.stat(os.path.join(place, name)).st_mtime > made for place, _, names in os.walk(folder) for name in names
    )
