"""Computes what a result keeps of a score, and reads it back: which problems were solved, the training loss, the versions behind it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxblock.evaluation.problems import read_problems, texts_hash
from jaxblock.io.files import read_json
from jaxblock.io.paths import PathLike, as_path
from jaxblock.study.results import Result
from jaxblock.training.config import TrainConfig
from jaxblock.training.observe.metrics import METRICS_FILE, read_metrics


def score_of(evaluation: PathLike) -> Result:
    """Returns what a result keeps of an evaluation's folder.

    Which problems were solved (``correct``, a hexadecimal number) and a hash of their texts, the version of a grader that has one,
    costs, and the NELBO.
    """
    root = as_path(evaluation)
    summary, problems = read_json(root / "summary.json"), read_problems(root / "problems.jsonl")
    bits = np.array([problem.correct for problem in problems.values()], np.uint8)
    score: Result = {
        "problems": len(bits),
        "texts": texts_hash(problems.values()),
        "correct": np.packbits(bits).tobytes().hex(),
        **{key: shortened(summary[key]) for key in ("nfe", "tokens_per_forward", "decode_seconds", "stopped")},
    }
    if summary.get("grader_version") is not None:
        score["grader_version"] = summary["grader_version"]
    for key in ("nelbo_per_token", "nelbo_per_sequence", "nelbo_by_block"):
        if key in summary:
            score[key] = shortened(summary[key])
    return score


def training_loss(train: TrainConfig, steps: int) -> list[float] | None:
    """Returns the training loss before a checkpoint: -log p of the masked tokens in nats, without the objective's weights.

    It is that of the second half of the training up to the checkpoint: from the last step up to ``steps / 2`` at which a line of
    the run's metrics.jsonl ends, which is one of every ``log_every`` steps and one at each checkpoint that is kept.

    Args:
        train: the settings of the run.
        steps: the step of the checkpoint.

    Returns:
        (sum over these tokens, their number); None where there is no line of that time, or no token.
    """
    begin = max(step for step in (*range(0, steps, train.log_every), *train.keep_steps) if step <= steps / 2)
    file = as_path(train.out) / METRICS_FILE
    rows = read_metrics(file).train if file.exists() else []
    chosen = [row.get("loss_by_block", []) for row in rows if begin < row["step"] <= steps]
    total, weight = np.array([pair for blocks in chosen for pair in blocks], np.float64).reshape(-1, 2).sum(0).tolist()
    return [shortened(total), weight] if weight else None


def made_by(result: Result, points: Iterable[str]) -> set[str]:
    """Returns the names of the versions that trained a cell, and that scored it at some points, as `version_name` names them."""
    versions = trained_by(result) + [score_versions(result, result["scores"][point]) for point in points]
    return set(map(version_name, versions))


def trained_by(result: Result) -> list[Mapping[str, str]]:
    """Returns the versions that trained a cell."""
    return [result["versions"], *result.get("continued_with", ())]


def score_versions(result: Result, score: Result) -> Mapping[str, str]:
    """Returns the versions that computed a score of a cell."""
    own: Mapping[str, str] = score["versions"] if "versions" in score else result["versions"]
    return own


def version_name(versions: Mapping[str, str]) -> str:
    """Names versions by jaxblock's commit, JAX's version and the devices, such as ``d096ee206859, jax 0.10.2, 1 x cpu``."""
    commit, changed, _ = str(versions.get("commit", "")).partition("+")
    ours = commit[:12] or f"jaxblock {versions.get('jaxblock', 'of unknown version')}"
    return f"{ours}{' with changes' * bool(changed)}, jax {versions.get('jax', 'unknown')}, {versions.get('device', 'device unknown')}"


def shortened(value: Any) -> Any:
    """Returns a number with 6 significant digits, and what is made of numbers likewise."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, Mapping):
        return {key: shortened(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [shortened(item) for item in value]
    return value


def solved(score: Result) -> np.ndarray:
    """Returns which problems were solved: bool [problems]."""
    bits = np.unpackbits(np.frombuffer(bytes.fromhex(score["correct"]), np.uint8))
    return bits[: score["problems"]].astype(bool)
