"""Tests that the table of mutants fits the source and the tests, and that a mutant that survives is told."""

import ast

import pytest

from tests import mutants
from tests.mutants import MUTANTS, ROOT, Mutant


def test_every_mutant_stands_once_in_its_file_and_names_a_test(tmp_path):
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)
    for mutant in MUTANTS:
        # Another program, and still a program.
        sound, planted = (ROOT / mutant.file).read_text(), mutants.plant(ROOT, mutant)
        assert ast.dump(ast.parse(planted)) != ast.dump(ast.parse(sound)), mutant
        file, _, name = mutant.test.partition("::")
        parts = ast.parse((ROOT / file).read_text()).body
        assert name.partition("[")[0] in [part.name for part in parts if isinstance(part, ast.FunctionDef)], mutant
    (tmp_path / "code.py").write_text("a = a\n")
    for text, times in (("b = 1", 0), ("a", 2)):
        with pytest.raises(ValueError, match=rf"mutant 'mine'.* code\.py {times} times"):
            mutants.plant(tmp_path, Mutant("mine", "code.py", text, "", ""))


def test_a_survivor_is_named_the_source_comes_back_and_the_exit_code_says_whether_all_die(monkeypatch, capsys):
    weak, strong = MUTANTS[:2]
    seen = []

    def failure(root, tests):
        planted = [m for m in (weak, strong) if (root / m.file).read_text() == mutants.plant(ROOT, m)]
        seen.append((planted, tests))
        return "1 failed" if planted == [strong] else None

    monkeypatch.setattr(mutants, "failure", failure)
    assert mutants.main([weak.name, strong.name]) == 1
    assert seen == [([], [weak.test, strong.test]), ([weak], [weak.test]), ([strong], [strong.test])]
    out, err = capsys.readouterr()
    assert [line.split()[:2] for line in out.splitlines()[:2]] == [[weak.name, "SURVIVES"], [strong.name, "dies"]]
    assert "1 of 2 mutants die" in out and f"no test notices: {weak.name}\n" in err
    assert mutants.main([strong.name]) == 0
    assert mutants.main(["no-such"]) == 2
    assert f"no mutant is called no-such; there are {weak.name}, " in capsys.readouterr().err
    monkeypatch.setattr(mutants, "failure", lambda root, tests: "1 failed")
    assert mutants.main([strong.name]) == 1 and "this fails without any mutant" in capsys.readouterr().err
