"""Tests that the table of mutants fits the source and the tests, and that a mutant that survives is told."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest

from tests import mutants
from tests.mutants import MUTANTS, ROOT, Mutant


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_mutant_stands_once_in_its_file_and_names_a_test(mutant: Mutant) -> None:
    source = mutants.plant(ROOT, mutant)
    # Another program, and still a program.
    assert ast.dump(ast.parse(source)) != ast.dump(ast.parse((ROOT / mutant.file).read_text()))
    file, _, name = mutant.test.partition("::")
    functions = [node.name for node in ast.parse((ROOT / file).read_text()).body if isinstance(node, ast.FunctionDef)]
    assert name.partition("[")[0] in functions


def test_names_are_unique() -> None:
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)


def test_a_text_that_is_not_there_once_is_told(tmp_path: Path) -> None:
    (tmp_path / "code.py").write_text("a = 1\na = 1\n")
    for text, times in (("b = 1", 0), ("a = 1", 2)):
        with pytest.raises(ValueError, match=rf"mutant 'mine'.* code\.py {times} times"):
            mutants.plant(tmp_path, Mutant("mine", "code.py", text, "", ""))


def test_a_survivor_is_named_and_the_source_comes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    (tmp_path / "code.py").write_text("a = 1\n")
    weak, strong = (Mutant(name, "code.py", "1", "2", name) for name in ("weak", "strong"))
    seen = []

    def failure(root: Path, tests: list[str]) -> str | None:
        seen.append((root / "code.py").read_text())
        return None if tests == ["weak"] else "1 failed"

    monkeypatch.setattr(mutants, "failure", failure)
    assert mutants.survivors(tmp_path, [weak, strong]) == ["weak"]
    assert seen == ["a = 2\n"] * 2 and (tmp_path / "code.py").read_text() == "a = 1\n"
    first, second = capsys.readouterr().out.splitlines()
    assert first.split()[:2] == ["weak", "SURVIVES"] and second.split()[:2] == ["strong", "dies"]


@pytest.mark.parametrize("left", [[], ["no-shift"]])
def test_the_exit_code_says_whether_all_die(left: list[str], monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(mutants, "failure", lambda root, tests: None)
    monkeypatch.setattr(mutants, "survivors", lambda root, chosen: left)
    assert mutants.main(["no-shift"]) == len(left)
    assert capsys.readouterr().err == ("no test notices: no-shift\n" if left else "")


def test_an_unknown_name_is_told(capsys: Any) -> None:
    assert mutants.main(["no-such"]) == 2
    assert "no mutant is called no-such; there are index-names-any-file, " in capsys.readouterr().err


def test_tests_that_fail_without_a_mutant_show_nothing(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    def failure(root: Path, tests: list[str]) -> str:
        assert [(root / file).is_file() for file in ("pyproject.toml", "jaxblock/cli.py", "tests/conftest.py")] == [
            True
        ] * 3
        assert root != ROOT and len(tests) == len(set(tests)) < len(MUTANTS)
        return "1 failed"

    monkeypatch.setattr(mutants, "failure", failure)
    assert mutants.main([]) == 1
    assert capsys.readouterr().err.startswith("1 failed\nthis fails without any mutant")
