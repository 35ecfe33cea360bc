"""Mixes the records of several training files by weights, exactly, in an order that depends on nothing but seed and place.

The rows of training are an endless list. Which file a row is from depends on the weights alone: after any number n of rows, a
file of weight w has given n * w rows, up to less than 1 (R. Tijdeman, "The chairman assignment problem", Discrete Mathematics 32,
1980). So in any window of rows the count of a file is right up to less than 2; up to 1 where there are two files. Less is
impossible for most weights of three files and more. Which record of the file the row holds, is decided by the seed: each file's
records are shuffled anew each time they are used up, however often that is for the other files.
"""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from math import lcm
from typing import Any, NamedTuple

import numpy as np

from jaxblock.data.config import DataConfig
from jaxblock.errors import UserError


class Mixture(NamedTuple):
    """Holds the training files of prepared data and their weights.

    Attributes:
        paths: The files.
        sizes: How many records each of them has; they follow each other in the split.
        weights: The share of each file in the rows.
    """

    paths: tuple[str, ...]
    sizes: tuple[int, ...]
    weights: tuple[float, ...]

    def files_of(self, places: np.ndarray) -> np.ndarray:
        """Returns which file each record is from.

        Args:
            places: Places of records in the split.
        """
        return np.searchsorted(np.cumsum(self.sizes), places, "right")

    def chances(self, places: np.ndarray) -> np.ndarray:
        """Returns the share that each of some rows has among random rows of the mixture, float [rows]; they add up to 1.

        Args:
            places: For each row the place of its record in the split.
        """
        files = self.files_of(places)
        chances = (np.array(self.weights) / np.maximum(np.bincount(files, minlength=len(self.sizes)), 1))[files]
        return chances / chances.sum()


def mixture_of(train: Mapping[str, Any], folder: str, config: DataConfig) -> Mixture | None:
    """Returns how training mixes the files of prepared data; None where every record is read once an epoch.

    Args:
        train: The manifest's entry on the training split (`Manifest.splits`).
        folder: The folder's name, for error messages.
        config: The data settings of the run, whose weights count.

    Raises:
        UserError: If the weights do not fit the files that the folder was prepared from.
    """
    if config.weights is None:
        return None
    files = train.get("files", [])
    paths, sizes = tuple(each["path"] for each in files), tuple(each["kept"] for each in files)
    if not files:
        raise UserError(
            f"data.weights are for several training files, but {folder} was prepared from one: leave them out, or prepare "
            "the files that data.train lists"
        )
    if isinstance(config.train, tuple) and config.train != paths:
        raise UserError(
            f"data.weights belong to the files that data.train lists ({', '.join(config.train)}), but {folder} was prepared from "
            f"others or in another order ({', '.join(paths)}): make data.train the same, or prepare again"
        )
    if len(config.weights) != len(files):
        raise UserError(
            f"data.weights has {len(config.weights)} shares, but {folder} was prepared from {len(files)} files "
            f"({', '.join(paths)}): give one share for each"
        )
    empty = [path for path, size in zip(paths, sizes, strict=True) if not size]
    if empty:
        raise UserError(
            f"data.weights gives a share to {empty[0]}, of which {folder} holds no record: all were dropped or became validation "
            "records. Leave the file out, or change what drops its records"
        )
    return Mixture(paths, sizes, config.weights)


def describe_files(train: Mapping[str, Any], mixture: Mixture | None) -> str | None:
    """Says in a line what share of the rows each of several training files has; None where there is one file.

    Args:
        train: The manifest's entry on the training split.
        mixture: How they are mixed; None where every record is read once an epoch.
    """
    files = train.get("files", [])
    if not files:
        return None
    if mixture is not None:
        each = zip(mixture.weights, mixture.paths, mixture.sizes, strict=True)
        return "rows: " + ", ".join(f"{weight:g} from {path} ({size:,} records)" for weight, path, size in each)
    kept = ", ".join(f"{file['kept']:,} from {file['path']}" for file in files)
    return f"rows: every record once an epoch, {kept} (data.weights, given to train, mixes files by shares)"


class MixedOrder:
    """Gives the record of every row of the endless list. What it remembers saves time and changes nothing."""

    def __init__(self, sizes: tuple[int, ...], weights: tuple[float, ...], seed: int) -> None:
        """Computes the sequence of files that one cycle of the mixture takes its records from.

        Args:
            sizes: The number of rows (records, or pairs of record and block) of each file; those of a file follow each other.
            weights: The share of each file.
            seed: The seed of the order of each file's rows.
        """
        self._files = file_cycle(weights)
        self._counts = np.bincount(self._files, minlength=len(weights))
        self._before = np.zeros(len(self._files), np.int32)  # rows of the same file earlier in the cycle
        for file, count in enumerate(self._counts.tolist()):
            self._before[self._files == file] = np.arange(count)
        self._sizes, self._begins, self._seed = sizes, np.cumsum([0, *sizes[:-1]]), seed
        self._kept: dict[tuple[int, int], tuple[int, np.ndarray]] = {}

    def __getitem__(self, row: int) -> int:
        """Returns which row of the files' rows the endless list has at a place."""
        cycle, at = divmod(row, len(self._files))
        file = int(self._files[at])
        epoch, drawn = divmod(cycle * int(self._counts[file]) + int(self._before[at]), self._sizes[file])
        return int(self._begins[file]) + int(self._permutation(file, epoch)[drawn])

    def _permutation(self, file: int, epoch: int) -> np.ndarray:
        """Returns the order of a file's rows in one of its epochs, int32 [rows]; of the last two epochs it is remembered."""
        kept = self._kept.get((file, epoch % 2))
        if kept is None or kept[0] != epoch:
            # Grain's shuffle takes milliseconds a row for a few rows, and has no end for some seeds and two rows. NumPy promises
            # that its RandomState, unlike its newer generators, will always give the same numbers.
            seeds = np.random.SeedSequence([self._seed, 0xDA7A, file, epoch])
            order = np.random.RandomState(np.random.MT19937(seeds)).permutation(self._sizes[file])
            kept = self._kept[file, epoch % 2] = epoch, order.astype(np.int32)
        return kept[1]


def file_cycle(weights: tuple[float, ...]) -> np.ndarray:
    """Lists the file of each row of one cycle, after which each file has given exactly its share: uint16 [rows of a cycle].

    The algorithm is Tijdeman's, in whole numbers: of the files that lag behind their share by at least 1 / (2k - 2) rows, where
    there are k files, the one is next that will be a whole row behind first.

    Args:
        weights: The shares of the files, which add up to 1; there are two or more.
    """
    shares = [Fraction(str(weight)) for weight in weights]
    length = lcm(*(share.denominator for share in shares))
    wanted = [int(share * length) for share in shares]  # rows of a cycle
    slack, together = 2 * len(weights) - 2, lcm(*wanted)
    waits = [together // rows for rows in wanted]  # how slowly a file falls behind
    lag = [0] * len(weights)  # how many rows a file is behind, times `length`
    files = np.zeros(length, np.uint16)
    for row in range(length):
        lag = [behind + more for behind, more in zip(lag, wanted, strict=True)]
        due = [file for file, behind in enumerate(lag) if slack * behind >= length]
        files[row] = chosen = min(due, key=lambda file: ((slack - 1) * length - slack * lag[file]) * waits[file])
        lag[chosen] -= length
    return files
