"""Gives the problems of the built-in corpus as an input."""

from __future__ import annotations

from collections.abc import Iterator

from jaxblock.data.config import DataConfig
from jaxblock.data.text import corpus, sudoku
from jaxblock.data.text.inputs import Input
from jaxblock.data.text.recipes import BUILTIN
from jaxblock.data.text.rows import RecordChunk
from jaxblock.errors import UserError

_PROBLEMS = 1000  # in a chunk


class CorpusInput(Input):
    """Holds some problems of the built-in corpus, with places like "builtin:test:12"."""

    def __init__(
        self, split: corpus.CorpusSplit, problems: list[dict[str, str]], first: int, config: DataConfig
    ) -> None:
        """Describes a run of problems that were generated already.

        Args:
            split: The part of the corpus that they are from.
            problems: The problems, as `corpus.generate` makes them.
            first: The number of the first of them in the corpus, from 1.
            config: Resolved settings, which name the fields of prompt and response.
        """
        self.path, self.problems = BUILTIN, problems
        self.size = sum(len(problem["question"]) + len(problem["answer"]) for problem in problems)
        self._split, self._first, self._config = split, first, config

    def chunks(self) -> Iterator[RecordChunk]:
        """Yields some problems at a time, as records with the fields that the settings name."""
        place, config = (f"{self.path}:{self._split}:", ""), self._config
        for at in range(0, len(self.problems), _PROBLEMS):
            records = [
                {config.prompt_field: problem["question"], config.response_field: problem["answer"]}
                for problem in self.problems[at : at + _PROBLEMS]
            ]
            yield RecordChunk(place, place, records, self._first + at)


def generate_problems(split: corpus.CorpusSplit, n: int, config: DataConfig) -> list[dict[str, str]]:
    """Makes `n` problems of the built-in corpus, of the kind, level and seed that the config names.

    Raises:
        UserError: If the level is unknown or has fewer than `n` problems.
    """
    try:
        if config.level == sudoku.LEVEL:
            return sudoku.generate(split, n, seed=config.seed)
        return corpus.generate(split, n, level=config.level, seed=config.seed)
    except ValueError as error:
        raise UserError(f"the built-in corpus (data.level, data.builtin_train, data.builtin_test): {error}") from error
