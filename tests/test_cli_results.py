"""Tests what `decode`, `evaluate` and `export` give, and what a damaged run gives instead."""

from __future__ import annotations

import dataclasses
import gzip
import io
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import jaxblock
from jaxblock.cli import main
from jaxblock.errors import UserError
from jaxblock.training.checkpoints.reader import CheckpointReader


def test_decode_takes_prompts_from_everywhere_and_its_batches_do_not_matter(
    tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = ["1+2?", "12+7?", "7+5?", "\u20282?", "9+9?", "0+1?"]
    command = ["decode", "--checkpoint", str(tiny_run), "--decode.temperature", "0.7"]

    def answers() -> list[dict[str, Any]]:
        return [json.loads(line) for line in capsys.readouterr().out.split("\n") if line]

    assert main([*command, *prompts]) == 0
    expected = answers()
    assert [answer["prompt"] for answer in expected] == prompts
    assert set(expected[0]) == {"prompt", "response", "tokens", "nfe"}
    assert all(answer["nfe"] >= answer["tokens"] > 0 for answer in expected)

    (tmp_path / "p.txt").write_text("\r\n".join(prompts) + "\r\n\r\n", encoding="utf-8-sig", newline="")
    assert main([*command, "--file", str(tmp_path / "p.txt"), "--decode.batch_size", "1"]) == 0
    assert answers() == expected
    rows = [json.dumps({"q": prompt}) + "\n" for prompt in prompts]
    (tmp_path / "p.jsonl").write_text("".join(rows))
    out = tmp_path / "out.jsonl"
    assert main([*command, "--file", str(tmp_path / "p.jsonl"), "--data.prompt_field", "q", "--out", str(out)]) == 0
    assert [json.loads(line) for line in out.read_text().split("\n") if line] == expected
    out.write_text("old")
    assert main([*command, *prompts, "--out", str(out), "--overwrite"]) == 0
    assert [json.loads(line) for line in out.read_text().split("\n") if line] == expected
    (tmp_path / "p.json").write_text(json.dumps([{"q": prompt, "id": 7} for prompt in prompts], indent=1))
    capsys.readouterr()
    assert main([*command, "--file", str(tmp_path / "p.json"), "--data.prompt_field", "q"]) == 0
    assert answers() == expected
    turns = [[{"role": "user", "content": prompt}, {"role": "assistant", "content": "x"}] for prompt in prompts]
    chats = [
        {"messages": turn[: 1 + at % 2]} for at, turn in enumerate(turns)
    ]  # with an answer, which is left out, or without
    (tmp_path / "chats.json.gz").write_bytes(gzip.compress(json.dumps(chats).encode()))
    assert main([*command, "--file", str(tmp_path / "chats.json.gz")]) == 0
    assert [{**answer, "prompt": answer["prompt"][0]["content"]} for answer in answers()] == expected
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("\n".join(prompts).encode())))
    assert main(command) == 0
    assert answers() == expected


def test_decode_without_prompts_says_so(
    tiny_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\n  \n")))
    assert main(["decode", "--checkpoint", str(tiny_run)]) == 2
    assert "no prompts" in capsys.readouterr().err


def test_watch_shows_blocks_where_there_is_no_terminal(tiny_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["decode", "--checkpoint", str(tiny_run), "1+2?", "3+4?"]
    assert main([*command, "--watch"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("prompt: ") == 2 and "block 1/4" in shown and "NFE" in shown
    assert main(command) == 0
    first = json.loads(capsys.readouterr().out.splitlines()[0])
    assert f"NFE {first['nfe']}" in shown


def test_other_stop_tokens_end_the_text(tiny_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = jaxblock.load(tiny_run)
    assert model.tokenizer is not None
    stop = model.tokenizer.encode("1+2=")[-1]
    assert main(["decode", "--checkpoint", str(tiny_run), "1+2?", "--decode.stop_ids", str(stop)]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert model.tokenizer.piece(stop) not in answer["response"]


@pytest.fixture(scope="module")
def scored(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("scored") / "scores"
    assert main(["evaluate", "--checkpoint", str(tiny_run), "--out", str(out)]) == 0
    return out


def test_evaluate_writes_summary_and_problems(scored: Path, tiny_run: Path) -> None:
    assert sorted(entry.name for entry in scored.iterdir()) == ["problems.jsonl", "summary.json"]
    summary = json.loads((scored / "summary.json").read_text())
    problems = [json.loads(line) for line in (scored / "problems.jsonl").read_text().splitlines()]
    assert summary["checkpoint"] == str(tiny_run) and summary["grader"] == "gsm8k_strict"
    assert [problem["index"] for problem in problems] == list(range(15))
    right = sum(problem["correct"] for problem in problems)
    assert (summary["pass_at_1"]["correct"], summary["pass_at_1"]["n"]) == (right, 15)
    assert summary["pass_at_1"]["low"] <= right / 15 <= summary["pass_at_1"]["high"]
    assert summary["nfe"] == pytest.approx(np.mean([problem["nfe"] for problem in problems]))
    spent = sum(problem["nfe"] for problem in problems)
    assert summary["tokens_per_forward"] == pytest.approx(sum(p["tokens"] for p in problems) / spent)
    assert summary["tokens_per_second"] > 0
    for name in ("nelbo_per_sequence", "nelbo_per_token"):
        assert summary[name]["n"] == 8 and summary[name]["se"] > 0
    assert len(summary["nelbo_by_block"]) == 4 and len(summary["nll_by_masked_count"]) == 4
    for problem in problems:
        assert {"prompt", "response", "reference", "extracted", "expected", "grader", "stopped"} < set(problem)


def test_a_run_compared_with_itself(
    scored: Path, tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--out", str(tmp_path / "again"), "--evaluate.compare", str(scored / "problems.jsonl")]
    flags += ["--decode.batch_size", "7"]
    (tmp_path / "again").mkdir()
    (tmp_path / "again" / "summary.json").write_text("old")
    assert main(["evaluate", "--checkpoint", str(tiny_run), "--overwrite", *flags]) == 0
    told = capsys.readouterr().out
    assert "McNemar exact p = 1" in told
    assert f"A is {scored / 'problems.jsonl'}, B is {tmp_path / 'again'}/problems.jsonl: A " in told
    compared = json.loads((tmp_path / "again" / "summary.json").read_text())["compared_with"]
    assert (compared["p_value"], compared["only_a"], compared["only_b"], compared["n"]) == (1.0, 0, 0, 15)
    assert (tmp_path / "again" / "problems.jsonl").read_text() == (scored / "problems.jsonl").read_text()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--evaluate.problems", "4"], "holds 15 problems, this evaluation has 4"),
        (["--evaluate.grader", "exact"], "was graded by gsm8k_strict: set evaluate.grader to it"),
        (["--evaluate.split", "validation"], "not the same ones"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_the_work(
    scored: Path, tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    compare = ["--evaluate.compare", str(scored / "problems.jsonl")]
    assert main(["evaluate", "--checkpoint", str(tiny_run), "--out", str(tmp_path / "out"), *compare, *flags]) == 2
    told = capsys.readouterr().err
    assert message in told and "decoded" not in told
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_an_export_that_is_wrong_leaves_nothing(tiny_run: Path, tmp_path: Path, dtype: str | None) -> None:
    model = jaxblock.load(tiny_run)
    broken = {**model.params, "final_norm": model.params["final_norm"] * np.nan}
    with pytest.raises(UserError, match="NaN"):
        dataclasses.replace(model, params=broken).save(tmp_path / "made", dtype)
    assert list(tmp_path.iterdir()) == []


def test_a_function_of_the_user_grades_a_run(
    tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text("def even(response, reference, record):\n    return record.index % 2 == 0\n")
    evaluate = ["evaluate", "--checkpoint", str(tiny_run), "--evaluate.problems", "3", "--evaluate.no_nelbo"]
    mine = ["--evaluate.grader", "mine.py:even"]
    assert main([*evaluate, *mine, "--out", "one"]) == 0
    summary = json.loads(Path("one/summary.json").read_text())
    rows = [json.loads(line) for line in Path("one/problems.jsonl").read_text().splitlines()]
    assert summary["grader"] == "mine.py:even" and [row["correct"] for row in rows] == [True, False, True]
    assert {row["grader_version"] for row in rows} == {summary["grader_version"]} and summary["undecided"] == 0
    # Another version of the file is another grader.
    Path("mine.py").write_text("def even(response, reference, record):\n    return True\n")
    # A checkpoint's folder may be a stranger's: the code that it names is not run.
    (tmp_path / "run").mkdir()
    Path("run/config.yaml").write_text("evaluate: {grader: 'mine.py:even'}")
    capsys.readouterr()
    for flags, message in (
        (
            [*mine, "--evaluate.compare", "one/problems.jsonl"],
            "one/problems.jsonl:1 was graded by mine.py:even (sha256:",
        ),
        (["--evaluate.grader", "gsm8k_strct"], "no grader 'gsm8k_strct'; did you mean gsm8k_strict?"),
        (["--evaluate.grader", "mine.py:evn"], "mine.py has no function 'evn'; did you mean even?"),
        (["--checkpoint", "run"], "own settings name code to run: evaluate.grader is 'mine.py:even'. If you trust it"),
    ):
        start = ["evaluate", *evaluate[3:]] if "--checkpoint" in flags else evaluate
        assert main([*start, *flags, "--out", "two"]) == 2
        told = capsys.readouterr().err
        assert message in told and "decoded" not in told and not Path("two").exists()


def test_an_export_is_the_run(tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "hf"
    assert main(["export", "--checkpoint", str(tiny_run), "--out", str(folder)]) == 0
    assert "largest difference of any logit 0" in capsys.readouterr().out
    assert {"config.json", "tokenizer.model", "chat_template.jinja"} < {entry.name for entry in folder.iterdir()}
    run, export = jaxblock.load(tiny_run), jaxblock.load(folder)
    ids = np.random.default_rng(0).integers(0, run.arch.vocab_size, (3, 20))
    np.testing.assert_array_equal(export.logits(ids), run.logits(ids))
    assert export.stop_ids == run.stop_ids
    flags = ["1+2?", "6+7?"]
    assert main(["decode", "--checkpoint", str(folder), *flags]) == 0
    exported = capsys.readouterr().out
    assert main(["decode", "--checkpoint", str(tiny_run), *flags]) == 0
    assert capsys.readouterr().out == exported
    assert main(["export", "--checkpoint", str(folder), "--out", str(folder)]) == 2
    # An export is replaced by a whole and right one alone, and never where it is read from.
    config, replaced = folder / "config.json", folder / "of-the-old-one"
    replaced.touch()
    broken = dataclasses.replace(run, params={**run.params, "final_norm": run.params["final_norm"] * np.nan})
    with pytest.raises(UserError, match="NaN"):
        broken.save(folder, overwrite=True)
    with pytest.raises(UserError, match="what the model was loaded from"):
        export.save(folder, overwrite=True)
    assert replaced.exists() and [entry.name for entry in tmp_path.iterdir()] == ["hf"]
    assert main(["export", "--checkpoint", str(tiny_run), "--out", str(folder), "--overwrite"]) == 0
    assert config.exists() and not replaced.exists() and [entry.name for entry in tmp_path.iterdir()] == ["hf"]


@pytest.mark.parametrize(
    ("name", "value"), [("d_model", 32), ("n_layers", 1), ("n_heads", 4), ("mask_token_id", 7), ("rope_theta", 1e4)]
)
def test_a_run_whose_model_file_disagrees_is_refused(
    tiny_run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    value: float,
) -> None:
    opened: list[CheckpointReader] = []
    closed: list[CheckpointReader] = []
    init, close = CheckpointReader.__init__, CheckpointReader.close
    monkeypatch.setattr(CheckpointReader, "__init__", lambda self, run: opened.append(self) or init(self, run))
    monkeypatch.setattr(CheckpointReader, "close", lambda self: closed.append(self) or close(self))
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    model = json.loads((run / "model.json").read_text())
    before = model[name]
    (run / "model.json").write_text(json.dumps({**model, name: value}))
    assert main(["decode", "--checkpoint", str(run), "1+1?"]) == 2
    told = capsys.readouterr().err
    assert f"model.json does not describe the network that was trained: {name} = {before!r} then, {value!r} now" in told
    assert opened and opened == closed  # a load that fails keeps no threads of Orbax


@pytest.mark.parametrize("damage", ["config", "model", "manifest", "tokenizer", "checkpoint"])
def test_a_damaged_run_is_named(
    tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    changes: dict[str, Callable[[], object]] = {
        "config": lambda: (run / "config.yaml").write_text("train: {steps: 1"),
        "model": lambda: (run / "model.json").write_text("{"),
        "manifest": lambda: (run / "manifest.json").unlink(),
        "tokenizer": lambda: shutil.rmtree(run / "tokenizer"),
        "checkpoint": lambda: shutil.rmtree(run / "checkpoints" / "120" / "params"),
    }
    changes[damage]()
    assert main(["export", "--checkpoint", str(run), "--out", str(tmp_path / "hf")]) == 2
    told = capsys.readouterr().err
    assert str(run) in told and "Traceback" not in told
    assert not (tmp_path / "hf").exists()
