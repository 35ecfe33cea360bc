"""Tests what the processes of a group share, without a group: see ``tests/training/test_processes.py`` for real ones."""

import contextlib
from collections.abc import Iterator

import jax
import pytest

from jaxblock.errors import UserError
from jaxblock.parallel import processes


@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize("refused", [False, True])
def test_what_process_0_cannot_enter_fails_in_all(monkeypatch, index, refused):
    told: list[str | None] = []

    @contextlib.contextmanager
    def context() -> Iterator[str]:
        if refused:
            raise UserError("held by another")
        yield "held"
        told.append("left")

    def gathered(problem: str | None) -> str | None:
        told.append(problem)
        return "held by another" if refused else None

    monkeypatch.setattr(jax, "process_index", lambda: index)
    monkeypatch.setattr(processes, "first_problem", gathered)
    expected = pytest.raises(UserError, match="held by another") if refused else contextlib.nullcontext()
    with expected, processes.entered_by_first(context) as held:
        assert held == ("held" if index == 0 else None)
    first = ["held by another"] if refused else [None, "left"]
    assert told == (first if index == 0 else [None])
