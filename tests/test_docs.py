"""Checks that what the documentation names exists and runs, and that the numbers in docs/method.md can be computed again.

That every page is in the index, and leads on to what exists, the site's build checks (docs/conf.py).
"""

import ast
import dataclasses
import itertools
import os
import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from math import comb, log
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from scipy.special import beta, betaincc

from jaxblock import cli
from jaxblock.config.config import Config
from jaxblock.config.yaml import config_from_tree
from jaxblock.data.config import DataConfig
from jaxblock.data.text.inputs import open_input
from jaxblock.data.text.recipes import with_recipe
from jaxblock.data.text.sources import read_source
from tests import runs

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
# What the site's build makes lies in docs/_reference and docs/_build.
WRITTEN = [page for page in sorted(DOCS.rglob("*.md")) if page.relative_to(DOCS).parts[0][0] != "_"]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *WRITTEN]
FOLDERS = ("jaxblock", "launch", "configs", "tests", "benchmarks", "docs")
FILES = {"json", "jsonl", "array_record", "safetensors"}  # `train.jsonl` is no setting
MADE = {"docs/_build"}
"""Folders that commands on the pages make."""
SECTIONS = {
    section.section_name: {field.name for field in dataclasses.fields(section)} for section in Config().sections()
}


def _unknown_fields(text: str) -> list[str]:
    """Returns the settings in code marks, such as `canvas.block`, that the config does not have."""
    found = re.findall(rf"`(?:--)?({'|'.join(SECTIONS)})\.([a-z_]+)(?=[ :`])[^`]*`", text)
    return [f"{section}.{name}" for section, name in found if name not in SECTIONS[section] | FILES]


def _missing_tests(text: str) -> list[str]:
    """Returns the tests in code marks, such as `room/test_thing.py::test_it`, that do not exist."""
    missing, file = [], ""
    for path, test in re.findall(r"`(?:tests/)?((?:\w+/)*test_\w+\.py)?(?:::(test_\w+))?`", text):
        file = path or file
        target = ROOT / "tests" / file
        if file and (not target.exists() or f"def {test}" not in target.read_text(encoding="utf-8")):
            missing.append(f"{file}::{test}")
    return missing


def _missing_files(text: str) -> list[str]:
    """Returns the files and folders of this repository that the text names and that do not exist.

    A folder or pattern must begin at the root (`jaxblock/io/`, `configs/quickstart_*.yaml`). A Python file or a script may be
    named by the end of its path (`optim/adamw.py`).
    """
    named = re.findall(rf"(?<![\w./-])(?:(?:{'|'.join(FOLDERS)})/[\w./*-]*\w[*/]?|[\w./-]+\.(?:py|sh|sbatch)\b)", text)
    there = [f"/{file.relative_to(ROOT)}" for folder in FOLDERS for file in (ROOT / folder).rglob("*.*")]
    wrong = (name for name in dict.fromkeys(named) if not any(file.endswith(f"/{name}") for file in there))
    return [name for name in wrong if not any(ROOT.glob(name)) and name.rstrip("/") not in MADE]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_names_exists(page):
    text = page.read_text(encoding="utf-8")
    assert _unknown_fields(text) == _missing_tests(text) == _missing_files(text) == []


def test_names_that_do_not_exist_are_seen():
    assert _unknown_fields("`canvas.block` `--canvas.blok 3` `train.step`") == ["canvas.blok", "train.step"]
    found = _missing_tests("`test_docs.py::test_no_such_thing` `nowhere/test_x.py`")
    assert found == ["test_docs.py::test_no_such_thing", "nowhere/test_x.py::"]
    text = "`jaxblock/io/` (launch/*.sh, optim/adamw.py), `jaxblock/no/` and launch/no_*.sh, no/adamw.py; a.b/launch/x"
    assert _missing_files(text) == ["jaxblock/no/", "launch/no_*.sh", "no/adamw.py"]


def _blocks(language: str, *pages: str) -> list[str]:
    """Returns the blocks of code in a language on these pages of the documentation; without any, on all pages."""
    texts = [page.read_text(encoding="utf-8") for page in ([DOCS / name for name in pages] or PAGES)]
    return [block for text in texts for block in re.findall(rf"^```{language}\n(.*?)^```", text, re.M | re.S)]


def _commands(snippets: list[str]) -> list[list[str]]:
    """Returns the words of each `jaxblock` command in shell snippets, without pipes and redirections."""
    whole = "\n".join(snippets).replace("\\\n", " ")
    lines = (shlex.split(line, comments=True) for line in whole.splitlines() if re.match(r"\s*jaxblock ", line))
    return [[*itertools.takewhile(lambda word: word not in "><|&&", line[1:])] for line in lines]


def _is_wrong(words: list[str]) -> bool:
    """Tells whether a command cannot be read; files of settings that only an example has are left out."""
    verb, *flags = shlex.split(re.sub(r"--config \S+\.yaml", "", shlex.join(words)))
    try:
        cli.parse(verb, [cli.SHORT_FLAGS.get(verb, {}).get(flag, flag) for flag in flags])
    except SystemExit as ended:
        return ended.code != 0
    except (KeyError, cli.UserError):  # no such verb, or a value that is none
        return True
    return False


def test_commands_in_the_pages_have_flags_that_exist():
    found = _commands(_blocks("sh"))
    assert len(found) > 25 and [words for words in found if _is_wrong(words)] == []
    wrong = [
        "jaxblock train --config llada_8b_lora --train.step 3 > x",
        "jaxblock trian",
        "jaxblock train --config lada",
    ]
    assert list(map(_is_wrong, _commands(wrong))) == [True] * 3


def test_settings_and_records_in_the_pages_are_read(tmp_path):
    trees = [yaml.safe_load(block) for block in _blocks("yaml")]
    settings = [tree for tree in trees if tree.keys() <= SECTIONS.keys()]
    assert len(trees) - 1 == len(settings) >= 2  # tests/harness runs the task of lm-evaluation-harness
    for tree in settings:
        config_from_tree(tree, "a page")
    lines = "".join(_blocks("json"))
    (tmp_path / "records.jsonl").write_text(lines, encoding="utf-8")
    files = [open_input(str(tmp_path / "records.jsonl"), "train")]
    source = read_source(files, with_recipe(DataConfig()), "train", [""])
    assert len(list(source.examples())) == len(lines.splitlines()) >= 2


HERE = {
    r"^model\.push_to_hub.*": "",  # tests/io/test_hub_upload.py pushes to a stand-in
    r'"Zoe [^"\n]*\[\[.*?"': '"1+[[1]]?"',
    r'"Zoe .*?"': '"1+2?"',
    r'"9 \+ \[\[1\]\] = 14': '"9+[[1]]=14',
    r'"a = ': '"1 = ',
}
"""What stands in a snippet, and what for it here: the tests' model knows other, shorter questions, and no letters."""


@pytest.mark.slow
def test_the_snippets_of_python_run(tiny_run, tmp_path):
    """tests/models/test_add_a_model.py and tests/harness run those of two other pages."""
    here = HERE | {'"runs/quickstart/blockwise"': f'"{tiny_run}"', '"exports/mine"': f'"{tmp_path}/export"'}
    names: dict[str, Any] = {}
    for page in ("python.md", "decoding.md"):
        (snippet,) = _blocks("python", page)
        for said, replacement in here.items():
            snippet = re.sub(said, replacement, snippet, flags=re.M)
        exec(compile(snippet, page, "exec"), names)
    assert (tmp_path / "export" / "config.json").is_file() and names["out"].nfe.shape == (1,)
    assert len(names["found"].fills) == 2 and "[[" not in names["found"].text
    written = [page.name for page in PAGES if "\n```python\n" in page.read_text(encoding="utf-8")]
    assert sorted(written) == ["add-a-model.md", "decoding.md", "harness.md", "python.md"]


@pytest.mark.slow
def test_the_shell_snippets_run_in_the_order_in_which_a_user_meets_them(tiny_config, tmp_path, monkeypatch, ran):
    """The commands of "Your own" (start.md), then those that other pages give for such a run, on small records."""
    monkeypatch.chdir(tmp_path)
    settings = tiny_config.read_text().replace(str(tiny_config.parent), str(tmp_path)).replace("steps: 120", "steps: 2")
    (tmp_path / "run.yaml").write_text(settings)
    for name in ("train.jsonl", "test.jsonl"):
        shutil.copy(tiny_config.parent / name, tmp_path)
    (tmp_path / "texts.jsonl").write_text('{"answer": "1+2=[[1]]"}\n')

    def commands(page: str, *has: str) -> list[list[str]]:
        found = _commands(_blocks("sh", page))
        return [words for words in found if any(part in words for part in has) and "--push" not in words]

    own = commands("start.md", "run.yaml", "runs/one")
    assert [words[0] for words in own] == ["prepare", "inspect", "train", "evaluate", "export"]
    for words in own:
        ran(shlex.join(words))
    shutil.copytree("runs/one", "runs/two")
    others = [("data.md", "masks.html"), ("decoding.md", "runs/one"), ("export.md", "exports/half")]
    found = [words for page, has in others for words in commands(page, has)]
    assert len(found) == 5
    for words in found:
        ran(shlex.join([re.sub("^Zoe.*", "1+[[1]]?" if "--infill" in words else "1+2?", word) for word in words]))
    assert {"masks.html", "trace.html", "beside.html"} <= {path.name for path in tmp_path.iterdir()}


def test_the_notebook_is_kept_without_outputs():
    nbformat = pytest.importorskip("nbformat")
    notebook = nbformat.read(DOCS / "notebooks" / "start.ipynb", as_version=4)
    nbformat.validate(notebook)
    assert not any(cell.outputs or cell.execution_count for cell in notebook.cells if cell.cell_type == "code")


@pytest.mark.slow
def test_the_notebook_runs_from_top_to_bottom(tmp_path, monkeypatch):
    """Training is cut short, and the folder is empty."""
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    cut = "--train.steps 2 --train.save_every 2 --train.log_every 1 --optimizer.warmup_steps 1"
    monkeypatch.setenv("JAXBLOCK_NOTEBOOK_FLAGS", " ".join([cut, *runs.QUIET]))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)
    monkeypatch.delenv("XLA_FLAGS", raising=False)  # eight devices would compile eight times as much
    notebook = nbformat.read(DOCS / "notebooks" / "start.ipynb", as_version=4)
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    code = (cell for cell in notebook.cells if cell.cell_type == "code")
    told = ["".join(str(one.get("text", "")) for one in cell.outputs) for cell in code]
    assert not any("jaxblock: " in text for text in told), told  # so begins the line of a mistake
    assert "6,000 kept" in told[1] and told[3].count("done: 2 steps") == told[4].count("done: 2 steps") == 1
    assert told[7].count("░") > 24 and told[8].count("forward passes") == 2
    assert "Pass@1" in told[9] and (tmp_path / "exports" / "notebook" / "config.json").is_file()


def _texts(tree: ast.AST) -> Iterator[str]:
    """Yields the texts of a program, with … for what is filled in when it runs."""
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield "".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def test_the_messages_of_the_troubleshooting_page_are_ones_that_are_printed():
    listed = re.findall(r"^\| `(.+?)` \|", (DOCS / "troubleshooting.md").read_text(encoding="utf-8"), re.M)
    sources = (file.read_text(encoding="utf-8") for file in (ROOT / "jaxblock").rglob("*.py"))
    printed = "\0".join(text for source in sources for text in _texts(ast.parse(source)))
    assert len(listed) > 30 and [message for message in listed if message not in printed] == []


def test_docs_list_what_a_resumed_run_may_change():
    table = (DOCS / "resume.md").read_text().split("| section | fields that may change |")[1].split("\n\n")[0]
    rows = [line.split("|") for line in table.split("\n")[2:-1]]
    listed = {row[1].strip(" `"): set(re.findall(r"`(\w+)`", row[2])) for row in rows}
    may_change = {section.section_name: section.changeable(saved=True) for section in Config().sections()}
    assert all(listed[section] == may_change[section] for section in ("data", "model", "train")), listed
    assert not any(may_change[name] for name in ("canvas", "method", "optimizer"))
    assert "| `decode`, `evaluate` | all |" in table


def test_numbers_of_the_floor():
    """The numbers in docs/method.md are those of its formulas: of a floor under the rate, of bernoulli, of a redraw."""

    def above(power: int, n: int, size: int) -> float:
        """Returns C(n, l) / (1 - eps) * integral from eps to 1 of p^power (1 - p)^(n - l), where l is `size`."""
        a, b, eps = power + 1, n - size + 1, 1e-3
        return comb(n, size) * beta(a, b) * betaincc(a, b, eps) / (1 - eps)

    def rho(n: int, size: int) -> float:
        """Returns the second moment of bernoulli over that of exact_count, for sets of a size."""
        if size == 1:
            return sum(1 / k for k in range(n, 2 * n))
        return size**2 / n * comb(n, size) * (beta(size - 1, n - size + 1) - beta(size - 1, 2 * n - size + 1))

    def factor(n: int, size: int, floor: float) -> float:
        """Returns l C(n, l) / (1 - floor) * integral of t^(l-1) (1-t)^(n-l) / (1 - (1-t)^n), on a grid in log t."""
        t = floor ** ((np.arange(20_000) + 0.5) / 20_000)
        mean = np.mean(t**size * (1 - t) ** (n - size) / (1 - (1 - t) ** n))
        return size * comb(n, size) * mean * -log(floor) / (1 - floor)

    one, two, pair, large = (size * above(size - 1, n, size) for n, size in ((32, 1), (256, 1), (256, 2), (32, 32)))
    few, more, many, most = ([rho(n, size) for size in range(1, n + 1)] for n in (2, 8, 32, 128))
    assert all(first < 1 <= min(others) for first, *others in (few, more, many, most))
    rows = {n: " | ".join(f"{(n + 1) * above(s, n, s):.4f}" for s in (1, 2, 3, n)) for n in (8, 32, 256)}
    page = " ".join((DOCS / "method.md").read_text(encoding="utf-8").split())
    for said in (
        f"keeps {one:.3f} of its weight at $n = 32$ and {two:.3f} at $n = 256$ (two masks at 256: {pair:.3f})",
        f"large counts get {large:.3f}",
        *(f"| $n = {n}$ | {row} |" for n, row in rows.items()),
        f"({few[0]:.2f} at $n=2$, {more[0]:.2f} at 8, {many[0]:.2f} at 32)",
        f"the mean over all counts is above 1 ({', '.join(f'{np.mean(table):.2f}' for table in (few, more, many))})",
        f"the set of two counts {factor(2, 2, 1e-12):.2f} times as much",
        f"{factor(8, 1, 1e-3):.1f} times too large at $n=8$ and {factor(32, 1, 1e-3):.1f} times at $n=32$",
        *(f"($\\ell = 2$: {factor(n, 2, 1e-3):.1f} times)" for n in (8, 32)),
    ):
        assert said in page, said
