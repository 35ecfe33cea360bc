"""Keeps the answers to a few validation problems, one file line for each of them at each evaluation of a run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from jaxblock.io.json_lines import JsonlWriter
from jaxblock.io.json_text import parse_json
from jaxblock.io.paths import PathLike, as_path, explained

SAMPLES_FILE = "samples.jsonl"
"""The file's name in the run folder."""

Sample = dict[str, Any]
"""A graded problem (a row of an evaluation's ``problems.jsonl``) with the ``step`` after which it was decoded."""

_SHOWN_PROMPT, _SHOWN_RESPONSE = 60, 100  # characters of a sample in the terminal


class SamplesWriter:
    """Appends samples to ``samples.jsonl``; in an object store, which cannot append, writes numbered parts of it."""

    def __init__(self, run: PathLike, step: int) -> None:
        """Opens the file and removes the samples after ``step``, since the run makes them again.

        Args:
            run: the run folder, which exists.
            step: the step that the run continues from; -1 for a new run.

        Raises:
            UserError: the folder cannot be written.
        """
        self.path = as_path(run) / SAMPLES_FILE
        with explained("write samples", self.path):
            self._lines = JsonlWriter(self.path, lambda line: not _is_after(line, step))

    def write_samples(self, samples: Sequence[Sample]) -> None:
        """Appends the samples of one evaluation.

        Raises:
            UserError: the file cannot be written now; the samples are kept, and written with the next ones.
        """
        for sample in samples:
            self._lines.append(json.dumps(sample, ensure_ascii=False))

    def flush(self) -> None:
        """Writes the samples that are still in memory; called before a checkpoint is saved."""
        self._lines.flush()

    def close(self) -> None:
        """Writes the samples that are still in memory and closes the file."""
        self._lines.close()


def _is_after(line: bytes, step: int) -> bool:
    """Tells whether a line holds a sample of a later step; what is no sample was not written here and is kept."""
    try:
        sample = parse_json(line)
    except ValueError:
        return False
    return isinstance(sample, dict) and isinstance(sample.get("step"), int) and sample["step"] > step


def in_one_line(sample: Sample) -> str:
    """Returns a line for the terminal: the verdict, the end of the prompt and the beginning of the response."""
    prompt, response = (" ".join(sample[name].split()) for name in ("prompt", "response"))
    if len(prompt) > _SHOWN_PROMPT:
        prompt = (
            f"... {prompt[-_SHOWN_PROMPT:].partition(' ')[2] or prompt[-_SHOWN_PROMPT:]}"  # from the start of a word
        )
    if len(response) > _SHOWN_RESPONSE:
        response = f"{response[:_SHOWN_RESPONSE]}..."
    verdict = "right" if sample["correct"] else "wrong"
    return f"  problem {sample['index']}, {verdict}: {prompt} => {response or '(empty)'}"


def as_markdown(sample: Sample) -> str:
    """Returns a sample for a text panel, its texts as they are: in code blocks, where nothing is read as markup."""
    verdict = "right" if sample["correct"] else "wrong"
    parts = [("prompt", sample["prompt"]), (f"response ({verdict})", sample["response"])]
    parts.append(("reference", sample["reference"]))
    # A block that is indented cannot be ended by what stands in it.
    blocks = (f"**{name}**\n\n" + "\n".join(f"    {line}" for line in text.split("\n")) for name, text in parts)
    return "\n\n".join(blocks)
