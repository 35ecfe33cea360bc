"""Counts the tokens and blocks of prepared records, and the prompts that two splits share."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxblock.data.store.records import Record


def length_statistics(records: Sequence[Record], block: int) -> dict[str, Any]:
    """Computes statistics of the token counts (prompt, response, total), and counts the responses of 1, 2, ... blocks.

    Args:
        records: The records of a split, at least one.
        block: The number of response positions of a block.

    Returns:
        {"tokens": {"prompt": {"min", "mean", "median", "p95", "max"}, ...}, "blocks": {"1": number of responses, ...}}
    """
    prompt = np.array([len(record.prompt_ids) for record in records])
    response = np.array([len(record.response_ids) for record in records])
    blocks = Counter((-(-response // block)).tolist())
    return {
        "tokens": {"prompt": _spread(prompt), "response": _spread(response), "total": _spread(prompt + response)},
        "blocks": {str(n): blocks[n] for n in sorted(blocks)},
    }


def count_overlaps(prompts: Mapping[str, Iterable[str]]) -> dict[str, int]:
    """Counts for each pair of splits how many prompts of the second are in the first too; blanks and case are ignored.

    Args:
        prompts: The prompts of each split, by the split's name.

    Returns:
        {"train and test": n, ...}
    """
    normal = {split: [" ".join(text.split()).casefold() for text in texts] for split, texts in prompts.items()}
    counts = {}
    for first, second in itertools.combinations(normal, 2):
        seen = set(normal[first])
        counts[f"{first} and {second}"] = sum(text in seen for text in normal[second])
    return counts


def _spread(lengths: np.ndarray) -> dict[str, int | float]:
    return {
        "min": int(lengths.min()),
        "mean": round(float(lengths.mean()), 2),
        "median": float(np.median(lengths)),
        "p95": round(float(np.percentile(lengths, 95)), 2),
        "max": int(lengths.max()),
    }
