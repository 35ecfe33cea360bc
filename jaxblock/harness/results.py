"""Completes lm-evaluation-harness's results with what is known of each request, and writes them."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from lm_eval.utils import handle_non_serializable, make_table, sanitize_task_name

from jaxblock.errors import UserError
from jaxblock.harness.language_model import HarnessModel

MARKER = "results.json"
"""The file that says that a folder of results is whole; written last."""


def complete(results: dict[str, Any], lm: HarnessModel) -> None:
    """Adds to each sample what ``lm.details`` knows of its requests, as the field ``jaxblock``, and a summary for each task.

    Where it was not computed whether a text is the greedy answer, the sample says null, not false.

    Args:
        results: what ``lm_eval.simple_evaluate`` returned, with samples; changed in place.
        lm: the model that answered.
    """
    results["jaxblock"] = {}
    for task, samples in results["samples"].items():
        for sample in samples:
            sample["jaxblock"] = about = lm.details.of((task, sample["doc_id"]))
            if any(values.get("is_greedy", ...) is None for values in about):
                sample["resps"] = [[(value, None) for value, _ in request] for request in sample["resps"]]
                sample["filtered_resps"] = [(value, None) for value, _ in sample["filtered_resps"]]
        questions = {sample["doc_id"]: sample["jaxblock"] for sample in samples}
        results["jaxblock"][task] = summarise(questions.values())


def summarise(questions: Iterable[list[dict[str, Any]]]) -> dict[str, Any]:
    """Returns what a task's requests took, and how exact the likelihoods are.

    ``undecided`` counts questions whose likeliest two texts are less than two standard errors apart.
    """
    requests = [request for question in questions for request in question]
    scored = [request for request in requests if "nelbo" in request]
    answered = [request for request in requests if "nfe" in request]
    found: dict[str, Any] = {}
    if scored:
        drawn = [request["standard_error"] for request in scored if not request["exact"]]
        found["scored"] = len(scored)
        found["exact"] = len(scored) - len(drawn)
        found["mean_standard_error"] = float(np.mean(drawn)) if drawn else 0.0
        found["undecided"] = sum(map(_undecided, questions))
    if answered:
        tokens, nfe = (sum(request[name] for request in answered) for name in ("tokens", "nfe"))
        found |= {"answered": len(answered), "tokens": tokens, "nfe": nfe, "tokens_per_forward": tokens / nfe}
        found["at_greatest_length"] = sum(request["ended"] == "length" for request in answered)
    return found


def _undecided(question: list[dict[str, Any]]) -> bool:
    """Tells whether the likeliest two texts of a question are less than two standard errors apart."""
    others = [r for r in question if r.get("above_best_standard_error", 0.0) > 0]
    return any(r["above_best"] < 2 * r["above_best_standard_error"] for r in others)


def for_people(results: dict[str, Any]) -> str:
    """Returns lm-eval's tables of tasks and groups, and the summaries of ``complete``."""
    tables = [make_table(results), *([make_table(results, "groups")] if results.get("groups") else [])]
    return "\n".join([*tables, *(line for task, about in results["jaxblock"].items() for line in _lines(task, about))])


def _lines(task: str, summary: Mapping[str, Any]) -> list[str]:
    """Returns a task's summary as lines for people."""
    found = []
    if "scored" in summary:
        drawn = summary["scored"] - summary["exact"]
        how = f"{summary['exact']:,} exactly" + (
            f", {drawn:,} by random masks with a standard error of {summary['mean_standard_error']:.3g} nats"
            if drawn
            else ""
        )
        found.append(f"{task}: {summary['scored']:,} texts scored, {how}")
        if summary["undecided"]:
            found.append(
                f"{task}: in {summary['undecided']:,} questions the likeliest two texts are less than two standard errors apart: more "
                "--nelbo_samples tell them apart"
            )
    if "answered" in summary:
        cut = summary["at_greatest_length"]
        found.append(
            f"{task}: {summary['answered']:,} answers, {summary['nfe'] / summary['answered']:.1f} forward passes each, "
            f"{summary['tokens_per_forward']:.2f} tokens per forward"
            + (f"; {cut:,} ended at their greatest length" if cut else "")
        )
    return found


def sample_files(tasks: Iterable[str]) -> dict[str, str]:
    """Returns the name of each task's file of samples.

    Raises:
        UserError: two tasks would have the same file, since signs that file names may lack are written as ``_``.
    """
    names: dict[str, str] = {}
    owners: dict[str, str] = {}
    for task in dict.fromkeys(tasks):
        name = names[task] = f"samples_{sanitize_task_name(task)}.jsonl"
        other = owners.setdefault(name, task)
        if other != task:
            raise UserError(
                f"tasks {other} and {task} would both write their samples to {name}: rename one of them in its YAML file, or run "
                "them one after the other into folders of their own (--out)"
            )
    return names


def write_results(folder: pathlib.Path, results: Mapping[str, Any]) -> None:
    """Writes ``samples_TASK.jsonl`` for each task, a line a sample, and everything else as ``results.json``, into a new folder."""
    files = sample_files(results["samples"])
    for task, samples in results["samples"].items():
        text = "".join(_json(sample) + "\n" for sample in samples)
        (folder / files[task]).write_text(text, encoding="utf-8")
    rest = {name: value for name, value in results.items() if name != "samples"}
    (folder / MARKER).write_text(_json(rest, indent=1) + "\n", encoding="utf-8")


def _json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent, default=handle_non_serializable)
