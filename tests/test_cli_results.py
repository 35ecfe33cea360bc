"""Tests what `decode`, `evaluate` and `export` give, and what a damaged run gives instead."""

import dataclasses
import gzip
import io
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

import jaxblock
from jaxblock import loading
from jaxblock.cli import main
from jaxblock.commands.prompts import read_prompts
from jaxblock.data.config import DataConfig
from jaxblock.errors import UserError
from tests import runs

PROMPTS = ["1+2?", "12+7?", "7+5?", "\u20282?", "9+9?", "0+1?"]


def _rows(text: str) -> list[dict]:
    return [json.loads(line) for line in text.split("\n") if line]


def test_decode_takes_prompts_from_everywhere_and_its_batches_do_not_matter(tiny_run, tmp_path, monkeypatch, ran):
    command = f"decode --checkpoint {tiny_run} --decode.temperature 0.7 "
    out = tmp_path / "out.jsonl"
    out.write_text("old")
    ran(command + f"--out {out} --overwrite " + " ".join(f"'{prompt}'" for prompt in PROMPTS))
    expected = _rows(out.read_text())
    assert [answer["prompt"] for answer in expected] == PROMPTS
    assert set(expected[0]) == {"prompt", "response", "tokens", "nfe"}
    assert all(answer["nfe"] >= answer["tokens"] > 0 for answer in expected)

    (tmp_path / "p.txt").write_text("\r\n".join(PROMPTS) + "\r\n\r\n", encoding="utf-8-sig", newline="")
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({"q": prompt}) + "\n" for prompt in PROMPTS))
    (tmp_path / "p.json").write_text(json.dumps([{"q": prompt, "id": 7} for prompt in PROMPTS], indent=1))
    turns = [[{"role": "user", "content": prompt}, {"role": "assistant", "content": "x"}] for prompt in PROMPTS]
    # With an answer, which is left out, or without.
    chats = json.dumps([{"messages": turn[: 1 + at % 2]} for at, turn in enumerate(turns)])
    (tmp_path / "chats.json.gz").write_bytes(gzip.compress(chats.encode()))
    for flags in ("p.txt --decode.batch_size 1", "p.jsonl --data.prompt_field q", "p.json --data.prompt_field q"):
        assert _rows(ran(command + f"--file {tmp_path}/{flags}").out) == expected
    found = _rows(ran(command + f"--file {tmp_path}/chats.json.gz").out)
    assert [{**answer, "prompt": answer["prompt"][0]["content"]} for answer in found] == expected

    def typed(text: str, code: int = 0):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
        return ran(command, code)

    assert _rows(typed("\n".join(PROMPTS)).out) == expected
    assert "no prompts" in typed("\n  \n", 2).err
    monkeypatch.setattr(sys, "stdin", None)
    assert "standard input is closed, so there are no prompts" in ran(command, 2).err


def test_a_file_of_records_is_known_by_its_name_and_refused_where_that_says_nothing(tmp_path):
    records = [{"q": prompt} for prompt in PROMPTS]
    lines, array = "".join(json.dumps(record) + "\n" for record in records).encode(), json.dumps(records).encode()
    texts = ["[[2]]=3", "{1}+2?"]
    for name, content, expected in (
        ("p.ndjson", lines, PROMPTS),
        ("P.JSONL", lines, PROMPTS),
        ("p.Json.GZ", gzip.compress(array, mtime=0), PROMPTS),
        ("p.txt", lines, lines.decode().splitlines()),
        ("p.TXT.gz", gzip.compress(array, mtime=0), [array.decode()]),
        ("texts", "\n".join(texts).encode(), texts),
        ("lines", b"\xef\xbb\xbf\n" + lines, None),
        ("array.gz", gzip.compress(b"\n" + array, mtime=0), None),
        ("table.dat", b"PAR1...", None),
    ):
        (tmp_path / name).write_bytes(content)
        found = read_prompts((), str(tmp_path / name), DataConfig(prompt_field="q"))
        if expected is None:
            with pytest.raises(UserError, match=f"{name} looks like records.*end it in one of .jsonl"):
                list(found)
        else:
            assert [prompt for _, prompt in found] == expected, name


def test_watch_shows_blocks_where_there_is_no_terminal_and_other_stop_tokens_end_the_text(tiny_run, ran):
    command = f"decode --checkpoint {tiny_run} 1+2? 3+4?"
    shown, answers = ran(f"{command} --watch").out, _rows(ran(command).out)
    assert shown.count("prompt: ") == 2 and "block 1/4" in shown and f"NFE {answers[0]['nfe']}" in shown
    tokenizer = jaxblock.load(tiny_run).tokenizer
    stop = tokenizer.encode("1+2=")[-1]
    (answer, _) = _rows(ran(f"{command} --decode.stop_ids {stop}").out)
    assert tokenizer.piece(stop) not in answer["response"]


def _data_of(page: Path) -> dict:
    return json.loads(page.read_text(encoding="utf-8").split('id="data">')[1].split("</script>")[0])


def test_a_page_of_traces_holds_both_checkpoints_and_the_answers_stay_the_same(tiny_run, tmp_path, ran):
    page, out = tmp_path / "trace.html", tmp_path / "out.jsonl"
    command = f"decode --checkpoint {tiny_run} 1+2? 3+4? --decode.temperature 0.7 --out {out} --overwrite "
    ran(command)
    plain = out.read_text()
    assert str(page) in ran(command + f"--html {page} --candidates 3 --beside {tiny_run} --beside_step 100").err
    assert out.read_text() == plain
    data = _data_of(page)
    assert [column["name"] for column in data["columns"]] == [str(tiny_run), f"{tiny_run}, step 100"]
    for prompt, answer in zip(data["prompts"], _rows(plain), strict=True):
        first, second = prompt["traces"]
        assert (prompt["text"], first["text"]) == (answer["prompt"], answer["response"])
        assert {len(ids) for ids in first["candidates"]} == {3} and first["shares"] != second["shares"]


@pytest.fixture(scope="module")
def scored(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("scored") / "scores"
    assert main(["evaluate", "--checkpoint", str(tiny_run), "--out", str(out)]) == 0
    return out


def test_evaluate_writes_summary_and_problems_and_a_report_holds_them(scored, tiny_run, tmp_path, ran):
    assert sorted(entry.name for entry in scored.iterdir()) == ["problems.jsonl", "summary.json"]
    summary = json.loads((scored / "summary.json").read_text())
    problems = _rows((scored / "problems.jsonl").read_text())
    assert summary["checkpoint"] == str(tiny_run) and summary["grader"] == "gsm8k_strict"
    assert (summary["step"], summary["weights"]) == (120, jaxblock.load(tiny_run).weights_fingerprint())
    assert summary["source"].endswith("test.jsonl")
    assert [problem["index"] for problem in problems] == list(range(15))
    right, spent = (sum(problem[name] for problem in problems) for name in ("correct", "nfe"))
    assert (summary["pass_at_1"]["correct"], summary["pass_at_1"]["n"]) == (right, 15)
    assert summary["nfe"] == pytest.approx(spent / 15) and summary["tokens_per_second"] > 0
    assert summary["tokens_per_forward"] == pytest.approx(sum(p["tokens"] for p in problems) / spent)
    assert summary["nelbo_per_sequence"]["n"] == summary["nelbo_per_token"]["n"] == 8
    assert len(summary["nelbo_by_block"]) == 4 and len(summary["nll_by_masked_count"]) == 4
    wanted = {"prompt", "response", "reference", "extracted", "expected", "grader", "stopped"}
    assert all(wanted < set(problem) for problem in problems)

    page = tmp_path / "new" / "report.html"
    assert str(page) in ran(f"report {tiny_run} --out {page} --evaluations {scored}").err
    text = page.read_text(encoding="utf-8")
    assert f"({right} of 15)" in text and 'class="own"' in text
    assert "120 of 120" in text and '<th scope="row">canvas.block</th><td>4</td>' in text
    assert {"loss", "grad_norm", "lr"} <= {panel["key"] for panel in _data_of(page)["panels"]}


def test_a_run_is_compared_with_itself_and_what_cannot_be_compared_is_refused_before_the_work(
    scored, tiny_run, tmp_path, monkeypatch, ran
):
    again, file = tmp_path / "again", scored / "problems.jsonl"
    command = f"evaluate --checkpoint {tiny_run} --out {again} --evaluate.compare {file}"
    for flags, message in {
        "--evaluate.problems 4": "holds 15 problems, this evaluation has 4",
        "--evaluate.grader exact": "was graded by gsm8k_strict: set evaluate.grader to it",
        "--evaluate.split validation": "not the same ones",
    }.items():
        with monkeypatch.context() as patch:
            patch.setattr(loading, "load", None)
            assert message in ran(f"{command} {flags}", 2).err and list(tmp_path.iterdir()) == []
    again.mkdir()
    (again / "summary.json").write_text("old")
    told = ran(f"{command} --overwrite --decode.batch_size 7").out
    assert "McNemar exact p = 1" in told and f"A is {file}, B is {again}/problems.jsonl: A " in told
    compared = json.loads((again / "summary.json").read_text())["compared_with"]
    assert (compared["p_value"], compared["only_a"], compared["only_b"], compared["n"]) == (1.0, 0, 0, 15)
    assert (again / "problems.jsonl").read_text() == file.read_text()


def test_a_function_of_the_user_grades_a_run(tiny_run, tmp_path, monkeypatch, ran):
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text("def even(response, reference, record):\n    return record.index % 2 == 0\n")
    evaluate = "evaluate --evaluate.problems 3 --evaluate.no_nelbo"
    grader = f"--checkpoint {tiny_run} --evaluate.grader"
    mine = f"{grader} mine.py:even"
    assert "--evaluate.nelbo_rows has no effect" in ran(f"{evaluate} {mine} --evaluate.nelbo_rows 3 --out one").err
    summary, rows = json.loads(Path("one/summary.json").read_text()), _rows(Path("one/problems.jsonl").read_text())
    assert summary["grader"] == "mine.py:even" and [row["correct"] for row in rows] == [True, False, True]
    assert {row["grader_version"] for row in rows} == {summary["grader_version"]} and summary["undecided"] == 0
    # Another version of the file is another grader.
    Path("mine.py").write_text("def even(response, reference, record):\n    return True\n")
    # A checkpoint's folder may be a stranger's: the code that it names is not run.
    (tmp_path / "run").mkdir()
    Path("run/config.yaml").write_text("evaluate: {grader: 'mine.py:even'}")
    for flags, message in (
        (f"{mine} --evaluate.compare one/problems.jsonl", "one/problems.jsonl:1 was graded by mine.py:even (sha256:"),
        (f"{grader} gsm8k_strct", "no grader 'gsm8k_strct'; did you mean gsm8k_strict?"),
        (f"{grader} mine.py:evn", "mine.py has no function 'evn'; did you mean even?"),
        ("--checkpoint run", "own settings name code to run: evaluate.grader is 'mine.py:even'. If you trust it"),
    ):
        told = ran(f"{evaluate} {flags} --out two", 2).err
        assert message in told and "decoded" not in told and not Path("two").exists()


def test_an_export_is_the_run(tiny_run, tmp_path, ran):
    folder = tmp_path / "hf"
    export = f"export --checkpoint {tiny_run} --out {folder}"
    assert "largest difference of any logit 0" in ran(export).out
    assert {"config.json", "tokenizer.model", "chat_template.jinja"} < {entry.name for entry in folder.iterdir()}
    shown = [ran(f"decode --checkpoint {source} 1+2? 6+7?").out for source in (folder, tiny_run)]
    assert shown[0] == shown[1]
    # An export is replaced by a whole and right one alone, and never where it is read from.
    run, replaced = jaxblock.load(tiny_run), folder / "of_the_old_one.json"
    replaced.touch()
    broken = dataclasses.replace(run, params={**run.params, "final_norm": run.params["final_norm"] * np.nan})
    for place, dtype in ((folder, None), (tmp_path / "made", None), (tmp_path / "made", "bfloat16")):
        with pytest.raises(UserError, match="NaN"):
            broken.save(place, dtype, overwrite=place == folder)
    with pytest.raises(UserError, match="is not overwritten"):
        run.save(folder)
    with pytest.raises(UserError, match="what the model was loaded from"):
        jaxblock.load(folder).save(folder, overwrite=True)
    assert replaced.exists() and [entry.name for entry in tmp_path.iterdir()] == ["hf"]
    (folder / "thesis.tex").touch()
    ran(f"{export} --overwrite", 2)
    (folder / "thesis.tex").unlink()
    ran(f"{export} --overwrite")
    assert not replaced.exists() and [entry.name for entry in tmp_path.iterdir()] == ["hf"]
    assert 0 < run.save(tmp_path / "half", "bfloat16") < 1


def _says(name: str, value: object):
    """Gives a field of the model file another value."""

    def change(run: Path) -> str:
        model = json.loads((run / "model.json").read_text())
        (run / "model.json").write_text(json.dumps({**model, name: value}))
        wrong = "model.json does not describe the network that was trained"
        return f"{wrong}: {name} = {model[name]!r} then, {value!r} now"

    return change


DAMAGES = {
    "config": lambda run: (run / "config.yaml").write_text("train: {steps: 1"),
    "model": lambda run: (run / "model.json").write_text("{"),
    "manifest": lambda run: (run / "manifest.json").unlink(),
    "tokenizer": lambda run: shutil.rmtree(run / "tokenizer"),
    "checkpoint": lambda run: shutil.rmtree(run / "checkpoints" / "120" / "params"),
    "width": _says("d_model", 32),
    "depth": _says("n_layers", 1),
    "mask": _says("mask_token_id", 7),
    "rotary": _says("rope_theta", 1e4),
}
"""What is done to a run; returns what is said of it, if that is known."""


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_run_is_named(run_copy, tmp_path, ran, damage):
    message = DAMAGES[damage](run_copy)
    with runs.checkpoints_closed() as opened:
        told = ran(f"export --checkpoint {run_copy} --out {tmp_path / 'hf'}", 2).err
    assert str(run_copy) in told and "Traceback" not in told and not (tmp_path / "hf").exists()
    assert not isinstance(message, str) or (message in told and opened)
