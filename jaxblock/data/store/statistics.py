"""Counts the tokens and blocks of prepared records, without holding the records."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np


class LengthStatistics:
    """Counts how many records have which numbers of tokens."""

    def __init__(self, block: int) -> None:
        """Starts with nothing; a block has `block` response positions."""
        self._block = block
        self._counts: dict[str, Counter[int]] = {name: Counter() for name in ("prompt", "response", "total")}

    def add(self, prompt: int, response: int) -> None:
        """Counts a record with these numbers of tokens."""
        for name, length in (("prompt", prompt), ("response", response), ("total", prompt + response)):
            self._counts[name][length] += 1

    def report(self) -> dict[str, Any]:
        """Returns statistics of the token counts, and the numbers of responses of 1, 2, ... blocks, of at least one record.

        Returns:
            {"tokens": {"prompt": {"min", "mean", "median", "p95", "max"}, ...}, "blocks": {"1": number of responses, ...}}
        """
        blocks: Counter[int] = Counter()
        for length, count in self._counts["response"].items():
            blocks[-(-length // self._block)] += count
        return {
            "tokens": {name: _spread(counts) for name, counts in self._counts.items()},
            "blocks": {str(n): blocks[n] for n in sorted(blocks)},
        }


def _spread(counts: Counter[int]) -> dict[str, int | float]:
    lengths = np.array(sorted(counts))
    ends = np.cumsum([counts[length] for length in lengths.tolist()])  # how many records are no longer than each length
    total = int(ends[-1])

    def quantile(share: float) -> float:
        """Returns the value at a share of the sorted lengths, between two of them where it falls there, as NumPy does."""
        at = share * (total - 1)
        low, high = (
            int(lengths[np.searchsorted(ends, place, "right")]) for place in (int(at), min(int(at) + 1, total - 1))
        )
        return low + (high - low) * (at - int(at))

    mean = sum(length * count for length, count in counts.items()) / total
    return {
        "min": int(lengths[0]),
        "mean": round(mean, 2),
        "median": float(quantile(0.5)),
        "p95": round(float(quantile(0.95)), 2),
        "max": int(lengths[-1]),
    }
