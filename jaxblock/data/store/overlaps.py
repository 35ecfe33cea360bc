"""Counts the prompts that two splits share, on disk: there may be more prompts than fit in memory."""

from __future__ import annotations

import itertools
import pathlib
from collections.abc import Iterator
from typing import IO

import numpy as np

_AT_ONCE = 1 << 21  # hashes of a split that are compared at once, 8 bytes each


class PromptHashes:
    """Keeps a hash of every prompt of every split in a folder.

    Two of N different prompts have the same hash with a probability below N² / 2^65: 1 in 30 million for a million prompts.
    """

    def __init__(self, folder: pathlib.Path) -> None:
        """Makes files in a folder of temporary files."""
        self._folder = folder
        self._files: dict[str, IO[bytes]] = {}

    def add(self, split: str, prompt_hash: bytes) -> None:
        """Adds the hash of a prompt, 8 bytes (see `encode.prompt_hash`)."""
        if split not in self._files:
            self._files[split] = open(self._folder / f"{split}.hashes", "w+b")  # noqa: SIM115 (closed by `count_overlaps`)
        self._files[split].write(prompt_hash)

    def count_overlaps(self) -> dict[str, int]:
        """Counts for each pair of splits how many prompts of the second are in the first too, and closes the files.

        Returns:
            {"train and test": n, ...}
        """
        for file in self._files.values():
            file.close()
        sizes = {split: (self._folder / f"{split}.hashes").stat().st_size // 8 for split in self._files}
        shares = -(-max(sizes.values(), default=0) // _AT_ONCE)
        counts = {f"{first} and {second}": 0 for first, second in itertools.combinations(sizes, 2)}
        for share in range(shares):
            some = {split: self._some(split, share, shares) for split in sizes}
            for first, second in itertools.combinations(sizes, 2):
                counts[f"{first} and {second}"] += int(np.isin(some[second], some[first]).sum())
        return counts

    def _some(self, split: str, share: int, shares: int) -> np.ndarray:
        """Returns one share of a split's hashes; equal hashes are in the same share."""
        return np.concatenate([hashes[hashes % np.uint64(shares) == share] for hashes in self._read(split)])

    def _read(self, split: str) -> Iterator[np.ndarray]:
        with open(self._folder / f"{split}.hashes", "rb") as file:
            while content := file.read(8 * _AT_ONCE):
                yield np.frombuffer(content, "<u8")
