"""Tests that the table of mutants fits the source and the tests, and that a mutant that survives is told."""

import ast

import pytest

from tests import mutants
from tests.mutants import MUTANTS, ROOT, Mutant


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_mutant_stands_once_in_its_file_and_names_a_test(mutant):
    # Another program, and still a program.
    assert ast.dump(ast.parse(mutants.plant(ROOT, mutant))) != ast.dump(ast.parse((ROOT / mutant.file).read_text()))
    file, _, name = mutant.test.partition("::")
    functions = [node.name for node in ast.parse((ROOT / file).read_text()).body if isinstance(node, ast.FunctionDef)]
    assert name.partition("[")[0] in functions and [m.name for m in MUTANTS].count(mutant.name) == 1


def test_a_survivor_is_named_and_the_source_comes_back(tmp_path, monkeypatch, capsys):
    code = tmp_path / "code.py"
    code.write_text("a = 1\n")
    seen = []

    def failure(root, tests):
        seen.append(code.read_text())
        return None if tests == ["weak"] else "1 failed"

    monkeypatch.setattr(mutants, "failure", failure)
    pair = [Mutant(name, "code.py", "1", "2", name) for name in ("weak", "strong")]
    assert mutants.survivors(tmp_path, pair) == ["weak"]
    assert seen == ["a = 2\n"] * 2 and code.read_text() == "a = 1\n"
    first, second = capsys.readouterr().out.splitlines()
    assert first.split()[:2] == ["weak", "SURVIVES"] and second.split()[:2] == ["strong", "dies"]
    for text, times in (("b = 1", 0), ("a", 2)):
        code.write_text("a = a\n")
        with pytest.raises(ValueError, match=rf"mutant 'mine'.* code\.py {times} times"):
            mutants.plant(tmp_path, Mutant("mine", "code.py", text, "", ""))


def test_the_exit_code_says_whether_all_die(monkeypatch, capsys):
    monkeypatch.setattr(mutants, "failure", lambda root, tests: None)
    for left in ([], ["no-shift"]):
        monkeypatch.setattr(mutants, "survivors", lambda root, chosen, left=left: left)
        assert mutants.main(["no-shift"]) == len(left)
    assert mutants.main(["no-such"]) == 2
    assert "no mutant is called no-such; there are index-names-any-file, " in capsys.readouterr().err
    monkeypatch.setattr(mutants, "failure", lambda root, tests: "1 failed" * (root / "jaxblock/cli.py").is_file())
    assert mutants.main([]) == 1 and "this fails without any mutant" in capsys.readouterr().err
