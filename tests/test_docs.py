"""Checks that what the documentation names exists, and that the numbers in docs/method.md can be computed again."""

import ast
import dataclasses
import re
import shlex
import shutil
from collections.abc import Iterator
from fractions import Fraction
from math import comb, factorial, log
from pathlib import Path
from typing import Any

import pytest
import yaml

from jaxblock import cli
from jaxblock.config.config import Config
from jaxblock.config.yaml import config_from_tree
from jaxblock.data.config import DataConfig
from jaxblock.data.text.inputs import open_input
from jaxblock.data.text.recipes import with_recipe
from jaxblock.data.text.sources import read_source

ROOT = Path(__file__).resolve().parents[1]
# What the site's build makes lies in docs/_reference and docs/_build.
WRITTEN = [page for page in sorted((ROOT / "docs").rglob("*.md")) if page.relative_to(ROOT / "docs").parts[0][0] != "_"]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *WRITTEN]
FOLDERS = ("jaxblock", "launch", "configs", "tests", "benchmarks", "docs")
FILES = {"json", "jsonl", "array_record", "safetensors"}  # `train.jsonl` is no setting
SECTIONS = {
    section.name: {entry.name for entry in dataclasses.fields(getattr(Config(), section.name))}
    for section in dataclasses.fields(Config)
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


MADE = {"docs/_build"}
"""Folders that commands on the pages make."""


def _missing_files(text: str) -> list[str]:
    """Returns the files and folders of this repository that the text names and that do not exist.

    A folder or pattern must begin at the root (`jaxblock/io/`, `configs/quickstart_*.yaml`). A Python file or a script may be
    named by the end of its path (`optim/adamw.py`).
    """
    named = re.findall(rf"(?<![\w./-])(?:(?:{'|'.join(FOLDERS)})/[\w./*-]*\w[*/]?|[\w./-]+\.(?:py|sh|sbatch)\b)", text)
    files = [f"/{file.relative_to(ROOT)}" for folder in FOLDERS for file in (ROOT / folder).rglob("*.*")]
    return [
        name
        for name in dict.fromkeys(named)
        if not any(ROOT.glob(name))
        and not any(file.endswith(f"/{name}") for file in files)
        and name.rstrip("/") not in MADE
    ]


def _headings(text: str) -> set[str]:
    """Returns the names by which links reach the headings of a page."""
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in re.findall(r"^#+ (.*)$", text, re.M)}


def _dead_links(page: Path, text: str) -> list[str]:
    dead = []
    for link in re.findall(r"\]\(([^)]+)\)", text):
        name, _, heading = link.partition("#")
        target = page.parent / name
        if not link.startswith("http") and (
            not target.exists() or (heading and heading not in _headings(target.read_text() if name else text))
        ):
            dead.append(link)
    return dead


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_names_exists(page):
    text = page.read_text(encoding="utf-8")
    assert _unknown_fields(text) == []
    assert _missing_tests(text) == []
    assert _missing_files(text) == []
    assert _dead_links(page, text) == []


def test_every_page_is_in_the_index():
    """The site's build fails at a page that no other leads to; this says so sooner."""
    index = set((ROOT / "docs" / "index.md").read_text(encoding="utf-8").splitlines())
    pages = {str(page.relative_to(ROOT / "docs").with_suffix("")) for page in WRITTEN} - {"index"}
    assert pages <= index, f"add to docs/index.md: {pages - index}"


def test_names_that_do_not_exist_are_seen():
    assert _unknown_fields("`canvas.block` `--canvas.blok 3` `train.step`") == ["canvas.blok", "train.step"]
    assert _missing_tests("`test_docs.py::test_no_such_thing` `nowhere/test_x.py`") == [
        "test_docs.py::test_no_such_thing",
        "nowhere/test_x.py::",
    ]
    text = "`jaxblock/io/` (launch/*.sh, optim/adamw.py), `jaxblock/no/` and launch/no_*.sh, no/adamw.py; a.b/launch/x"
    assert _missing_files(text) == ["jaxblock/no/", "launch/no_*.sh", "no/adamw.py"]
    text = "# Here\n[a](#here) [b](#there) [c](nothing.md) [d](https://x.y) [e](README.md#where-to-go) [f](README.md#nothing)"
    assert _dead_links(PAGES[0], text) == ["#there", "nothing.md", "README.md#nothing"]


def _commands(text: str) -> list[list[str]]:
    """Returns the words of each `jaxblock` command in the shell snippets of a page, without pipes and redirections."""
    snippets = "\n".join(re.findall(r"^```sh\n(.*?)^```", text, re.M | re.S)).replace("\\\n", " ")
    lines = (shlex.split(line, comments=True) for line in snippets.splitlines() if re.match(r"\s*jaxblock ", line))
    return [line[1 : next((at for at, word in enumerate(line) if word in "><|&&"), None)] for line in lines]


def _unreadable(words: list[str]) -> str:
    """Returns what is wrong with a command; files of settings that only an example has are left out."""
    verb, *flags = words
    if verb not in cli.VERBS:
        return f"{verb}: no verb"
    names_file = [flag == "--config" and value.endswith(".yaml") for flag, value in zip(flags, flags[1:], strict=False)]
    skipped = {at + more for at, found in enumerate(names_file) if found for more in (0, 1)}
    flags = [cli.SHORT_FLAGS.get(verb, {}).get(flag, flag) for at, flag in enumerate(flags) if at not in skipped]
    try:
        cli.parse(verb, flags)
    except SystemExit as ended:
        return "" if ended.code == 0 else f"{shlex.join(words)}: wrong flags"
    except cli.UserError as error:
        return f"{shlex.join(words)}: {error}"
    return ""


def test_commands_in_the_pages_have_flags_that_exist():
    found = [words for page in PAGES for words in _commands(page.read_text(encoding="utf-8"))]
    assert len(found) > 25 and [wrong for words in found if (wrong := _unreadable(words))] == []
    wrong = "```sh\njaxblock train --config llada_8b_lora --train.step 3 > x\njaxblock trian\njaxblock train --config lada_8b_lora\n```"
    assert all(_unreadable(words) for words in _commands(wrong)) and len(_commands(wrong)) == 3


def _blocks(language: str) -> list[str]:
    return [
        block
        for page in PAGES
        for block in re.findall(rf"^```{language}\n(.*?)^```", page.read_text("utf-8"), re.M | re.S)
    ]


def test_settings_and_records_in_the_pages_are_read(tmp_path):
    trees = [yaml.safe_load(block) for block in _blocks("yaml")]
    settings = [tree for tree in trees if tree.keys() <= {field.name for field in dataclasses.fields(Config)}]
    assert (
        len(settings) >= 2 and len(trees) == len(settings) + 1
    )  # tests/harness runs the task of lm-evaluation-harness
    for tree in settings:
        config_from_tree(tree, "a page")
    with pytest.raises(cli.UserError, match="unknown key data.weight"):
        config_from_tree({"data": {"weight": [0.7, 0.3]}}, "a page")
    lines = "".join(_blocks("json"))
    (tmp_path / "records.jsonl").write_text(lines, encoding="utf-8")
    source = read_source(
        [open_input(str(tmp_path / "records.jsonl"), "train")], with_recipe(DataConfig()), "train", [""]
    )
    assert len(list(source.examples())) == len(lines.splitlines()) >= 2


HERE = {
    r"^model\.push_to_hub.*": "",  # tests/io/test_hub_upload.py pushes to a stand-in
    r'"Zoe [^"\n]*\[\[.*?"': '"1+[[1]]?"',
    r'"Zoe .*?"': '"1+2?"',
    r'"9 \+ \[\[1\]\] = 14': '"9+[[1]]=14',
    r'"a = ': '"1 = ',
}
"""What stands in a snippet, and what for it here: the tests' model knows other, shorter questions, and no letters."""


def _snippet(page: str) -> str:
    """Returns the Python snippet of a page of the documentation, in the tests' words."""
    (snippet,) = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs" / page).read_text(encoding="utf-8"), re.M | re.S)
    for said, here in HERE.items():
        snippet = re.sub(said, here, snippet, flags=re.M)
    return str(snippet)


@pytest.mark.slow
def test_the_snippets_of_python_run(tiny_run, tmp_path):
    """tests/models/test_add_a_model.py and tests/harness run those of two other pages."""
    names: dict[str, Any] = {}
    snippet = _snippet("python.md")
    for said, here in {"runs/quickstart/blockwise": tiny_run, "exports/mine": tmp_path / "export"}.items():
        assert f'"{said}"' in snippet
        snippet = snippet.replace(said, str(here))
    exec(compile(snippet, "python.md", "exec"), names)
    assert (tmp_path / "export" / "config.json").is_file() and names["out"].nfe.shape == (1,)
    exec(compile(_snippet("decoding.md"), "decoding.md", "exec"), names)
    assert len(names["found"].fills) == 2 and "[[" not in names["found"].text
    written = [page.name for page in PAGES if "\n```python\n" in page.read_text(encoding="utf-8")]
    assert sorted(written) == ["add-a-model.md", "decoding.md", "harness.md", "python.md"]


def _texts(tree: ast.AST) -> Iterator[str]:
    """Yields the texts of a program, with … for what is filled in when it runs."""
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield "".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


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
        found = _commands((ROOT / "docs" / page).read_text(encoding="utf-8"))
        return [words for words in found if any(part in words for part in has) and "--push" not in words]

    own = commands("start.md", "run.yaml", "runs/one")
    assert [words[0] for words in own] == ["prepare", "inspect", "train", "evaluate", "export"]
    for words in own:
        ran(shlex.join(words))
    shutil.copytree("runs/one", "runs/two")
    others = [
        *commands("data.md", "masks.html"),
        *commands("decoding.md", "runs/one"),
        *commands("export.md", "exports/half"),
    ]
    assert len(others) == 5
    for words in others:
        ran(shlex.join([re.sub("^Zoe.*", "1+[[1]]?" if "--infill" in words else "1+2?", word) for word in words]))
    assert {"masks.html", "trace.html", "beside.html"} <= {path.name for path in tmp_path.iterdir()}


def test_the_messages_of_the_troubleshooting_page_are_ones_that_are_printed():
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| `(.+?)` \|", page, re.M)
    sources = (file.read_text(encoding="utf-8") for file in (ROOT / "jaxblock").rglob("*.py"))
    printed = "\0".join(text for source in sources for text in _texts(ast.parse(source)))
    assert len(listed) > 30 and [message for message in listed if message not in printed] == []


def _beta(a: int, b: int) -> Fraction:
    return Fraction(factorial(a - 1) * factorial(b - 1), factorial(a + b - 1))


def _above_floor(powers_of_p: int, n: int, size: int, eps: Fraction) -> Fraction:
    """Returns C(n, l) / (1 - eps) * integral from eps to 1 of p^powers (1 - p)^(n - l), where l is `size`."""
    total = Fraction(0)
    for j in range(n - size + 1):
        k = powers_of_p + j + 1
        total += comb(n - size, j) * (-1) ** j * (1 - eps**k) / k
    return comb(n, size) * total / (1 - eps)


def _against_exact_count(n: int) -> Iterator[Fraction]:
    """Yields rho of docs/method.md: the second moment of bernoulli over that of exact_count, for each count."""
    yield sum((Fraction(1, k) for k in range(n, 2 * n)), Fraction(0))
    for size in range(2, n + 1):
        tail = _beta(size - 1, n - size + 1) - _beta(size - 1, 2 * n - size + 1)
        yield Fraction(size * size, n) * comb(n, size) * tail


def test_numbers_of_the_floor():
    eps = Fraction(1, 1000)
    kept = [float(s * _above_floor(s - 1, n, s, eps)) for n, s in ((32, 1), (256, 1), (256, 2), (32, 32))]
    assert [round(value, 3) for value in kept] == [0.969, 0.775, 0.973, 1.001]
    rows = [[round(float((n + 1) * _above_floor(s, n, s, eps)), 4) for s in (1, 2, 3, n)] for n in (8, 32, 256)]
    assert rows == [[1.001, 1.001, 1.001, 1.001], [1.0005, 1.001, 1.001, 1.001], [0.9732, 0.9987, 1.0009, 1.001]]


def test_numbers_of_bernoulli_against_exact_count():
    tables = {n: [float(x) for x in _against_exact_count(n)] for n in (2, 8, 32, 128)}
    for first, *others in tables.values():
        assert first < 1 <= min(others)
    assert [round(tables[n][0], 2) for n in (2, 8, 32)] == [0.83, 0.73, 0.70]
    assert [round(sum(tables[n]) / n, 2) for n in (2, 8, 32)] == [1.08, 1.12, 1.07]


def test_numbers_of_one_over_t_with_redraw():
    def factor(n: int, size: int, floor: float) -> float:
        """Returns l C(n, l) / (1 - floor) * integral of t^(l-1) (1-t)^(n-l) / (1 - (1-t)^n), on a grid in log t."""
        steps, total = 20_000, 0.0
        for i in range(steps):
            t = floor ** ((i + 0.5) / steps)
            total += t**size * (1 - t) ** (n - size) / (1 - (1 - t) ** n)
        return size * comb(n, size) * total * -log(floor) / steps / (1 - floor)

    assert round(factor(2, 2, 1e-12), 2) == 1.39
    assert [round(factor(n, 1, 1e-3), 1) for n in (8, 32)] == [4.8, 3.5]
    assert [round(factor(n, 2, 1e-3), 1) for n in (8, 32)] == [1.6, 1.6]


def test_docs_list_what_a_resumed_run_may_change():
    table = (ROOT / "docs" / "resume.md").read_text().split("| section | fields that may change |")[1].split("\n\n")[0]
    rows = [line.split("|") for line in table.split("\n")[2:-1]]
    listed = {row[1].strip(" `"): set(re.findall(r"`(\w+)`", row[2])) for row in rows}
    may_change = {section.section_name: section.changeable(saved=True) for section in Config().sections()}
    assert all(listed[section] == may_change[section] for section in ("data", "model", "train")), listed
    assert not any(may_change[name] for name in ("canvas", "method", "optimizer"))
    assert "| `decode`, `evaluate` | all |" in table
