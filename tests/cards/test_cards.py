"""Model cards say where weights come from, how they were made and scored; the hub's own client reads their headers."""

import ast
import dataclasses
import itertools
import json
import re
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import huggingface_hub
import pytest

from jaxblock.cards.card import read_own_card
from jaxblock.cards.make import Export, card_text
from jaxblock.cards.run import described
from jaxblock.errors import UserError
from jaxblock.io.folders import check_vacant
from jaxblock.io.signed_text import is_unedited
from jaxblock.training.base_identity import weights_fingerprint
from jaxblock.training.checkpoints import run_folder
from jaxblock.training.checkpoints.reader import CheckpointReader
from jaxblock.training.versions import running_versions
from tests import runs

SECTIONS = ["How to load it", "Base", "Data", "Training", "Scores", "Licence", "Versions"]


def _export(run: Path, **fields: Any) -> Export:
    arch, weights = run_folder.open_run(run).arch, weights_fingerprint(run, 120)
    export = Export("org/mine", "merged", arch, 9_824, "float32", str(run), 120, None, weights, "tokenizer.model")
    return dataclasses.replace(export, **fields)


def _evaluated(folder: Path, **fields: Any) -> Path:
    """Writes an evaluation's summary.json."""
    summary = {
        "checkpoint": "runs/one", "split": "test", "source": "/home/me/test.jsonl", "grader": "exact", "decode": {"rule": "quota"},
        "pass_at_1": {"rate": 0.828125, "correct": 424, "n": 512, "low": 0.793, "high": 0.858}, "nfe": 23.96,
        "nelbo_per_token": {"mean": 0.0892, "se": 0.0024, "n": 256}, "nelbo_exact": False,
    }  # fmt: skip
    folder.mkdir(parents=True)
    (folder / "summary.json").write_text(json.dumps({**summary, **fields}))
    return folder


def _sections(text: str) -> dict[str, str]:
    _, *parts = re.split(r"^## (.+)\n", text, flags=re.MULTILINE)
    return dict(zip(parts[::2], parts[1::2], strict=True))


def test_the_card_of_a_run(run_copy, tmp_path):
    weights = weights_fingerprint(run_copy, 120)
    _evaluated(tmp_path / "score", weights=weights)  # beside the run
    _evaluated(run_copy / "of_step_100", weights=weights_fingerprint(run_copy, 100))
    _evaluated(tmp_path / "damaged", weights=weights, pass_at_1={"rate": "high"})
    text = card_text(_export(run_copy))
    data, sections = huggingface_hub.ModelCard(text).data, _sections(text)
    assert is_unedited(text.encode()) and list(sections) == SECTIONS
    assert data.tags == ["jaxblock", "masked-diffusion", "llada", "blockwise-sft"] and data.license is None
    assert (data.library_name, data.pipeline_tag) == ("transformers", "text-generation")
    (result,) = data.eval_results
    assert (result.metric_type, result.metric_value, result.dataset_split) == ("pass@1", 0.828125, "test")
    assert result.metric_args == {"problems": 512, "interval_95": [0.793, 0.858]}
    passed, bound, validated, _ = [line for line in sections["Scores"].splitlines() if line.startswith("|")][2:]
    assert passed.startswith(
        "| `test.jsonl`, test | Pass@1, grader `exact` | 82.8% [79.3%, 85.8%] (424 of 512) | rule `quota`"
    )
    assert bound.startswith("| `test.jsonl`, test | NELBO per text token | 0.0892 ± 0.0024 nats | Monte Carlo")
    assert validated.startswith("| validation | Pass@1, grader `gsm8k_strict` | ") and " of 8) | " in validated
    assert "run began from random weights (seed 0)" in sections["Base"] and "None is stated" in sections["Licence"]
    for line in ("| train | `train.jsonl` | 77 | 0 | `", "| test | `test.jsonl` | 15 | 0 |"):
        assert line in sections["Data"]
    assert "Blockwise SFT of every weight: step 120 of 120, 8 sequences a step, blocks of 4" in sections["Training"]
    assert "seed: 0" in sections["Training"] and "log_every" not in sections["Training"]
    for name, version in running_versions().items():
        assert f"| {name} | `{version}` | `{version}` |" in sections["Versions"]
    assert str(tmp_path) not in text and "/home/me" not in text


def test_the_card_of_a_mixture_names_each_file_and_its_share_and_no_folder(run_copy, tmp_path):
    run = run_folder.open_run(run_copy)
    paths, shares = ("here/a.jsonl", "/home/me/b.jsonl", "hf:org/c"), (0.5, 0.3, 0.2)
    files = [{"path": path, "sha256": "0123", "kept": 1_000 + at} for at, path in enumerate(paths)]
    inputs = {**run.manifest.inputs, "train": {"path": ", ".join(paths), "sha256": "4567", "files": files}}
    splits = {**run.manifest.splits, "train": {"kept": 3_003, "dropped": {"too long": 7}, "files": files}}
    config = dataclasses.replace(run.config, data=dataclasses.replace(run.config.data, train=paths, weights=shares))
    manifest = dataclasses.replace(run.manifest, inputs=inputs, splits=splits)
    mixed = dataclasses.replace(run, config=config, prepared=dataclasses.replace(run.prepared, manifest=manifest))
    card = described(mixed, 120)
    assert [line for line in card.sections["Data"].splitlines() if line.startswith("| train")] == [
        "| train | 3 files | 3,003 | 7 | |",
        "| train (0.5 of the rows) | `here/a.jsonl` | 1,000 |  | `0123` |",
        "| train (0.3 of the rows) | `b.jsonl` | 1,001 |  | `0123` |",
        "| train (0.2 of the rows) | `hf:org/c` | 1,002 |  | `0123` |",
    ]
    assert card.header["datasets"] == ["org/c"] and "/home/me" not in str(card)
    _evaluated(tmp_path / "score", weights=weights_fingerprint(run_copy, 120), source=list(paths[:2]))
    text = card_text(_export(run_copy))
    assert "| `here/a.jsonl, b.jsonl`, test | Pass@1" in text and "/home/me" not in text


def test_a_card_that_cannot_be_made_leaves_no_checkpoint_open(tiny_run, monkeypatch):
    monkeypatch.setattr(CheckpointReader, "meta", Mock(side_effect=UserError("cannot be read")))
    with runs.checkpoints_closed() as opened, pytest.raises(UserError, match="cannot be read"):
        card_text(_export(tiny_run))
    assert opened


def test_evaluations_that_are_named(run_copy, tmp_path):
    export, far = _export(run_copy), tmp_path / "far"
    right = _evaluated(far / "right", weights=export.weights)
    assert "82.8%" not in card_text(export) and "82.8%" in card_text(export, [right])
    in_memory = dataclasses.replace(export, origin=None, step=None, weights=None)
    for exported, folder, message in [
        (export, _evaluated(far / "other", weights="other"),
         r"summary.json is of other weights \(runs/one\): evaluate the checkpoint that is exported"),
        (export, _evaluated(far / "old"), "summary.json does not say of which weights it is"),
        (export, _evaluated(far / "broken", weights=export.weights, grader=3), "is no summary of `jaxblock evaluate`"),
        (export, run_copy, "holds no summary.json: give the folder"),
        (in_memory, right, "of other weights"),
    ]:  # fmt: skip
        with pytest.raises(UserError, match=message):
            card_text(exported, [folder])


@pytest.mark.parametrize(
    ("init", "base_card", "header", "says"),
    [
        ("org/base@v1", "---\nlicense: other\nlicense_name: mine\nlicense_link: L\n---\n",
         {"base_model": "org/base", "license": "other", "license_name": "mine", "license_link": "L"}, "`mine`. It binds"),
        ("org/base", "# no header", {"base_model": "org/base", "license": "unknown"}, "licence of the base is not known"),
        ("org/base", "---\nlicense: unknown\n---\n", {"base_model": "org/base", "license": "unknown"}, "is not known"),
        ("org/base", "---\n{[\n---\n", {"base_model": "org/base", "license": "unknown"}, "is not known"),
        ("/secret/base", "---\nlicense: mit\nbase_model: org/root\n---\n", {"base_model": "org/root", "license": "mit"}, "`mit`"),
        ("{run}", None, {}, "None is stated"),
    ],
)  # fmt: skip
def test_the_licence_is_that_of_the_base_and_never_invented(run_copy, tiny_run, init, base_card, header, says):
    run = run_folder.open_run(run_copy)
    config = dataclasses.replace(run.config.model, init_from=init.format(run=tiny_run))
    run = dataclasses.replace(run, config=dataclasses.replace(run.config, model=config))
    if base_card is not None:
        (run_copy / "origin").mkdir()
        (run_copy / "origin" / "README.md").write_text(base_card)
    card = described(run, 120)
    assert {name: value for name, value in card.header.items() if name != "tags"} == header
    assert says in card.sections["Licence"] and "secret" not in str(card.sections)
    assert ("random weights" in card.sections["Base"]) == (base_card is None)


def test_an_export_of_an_export_keeps_what_its_card_says(tiny_run, tmp_path):
    text, folder, card = card_text(_export(tiny_run)), tmp_path / "first", tmp_path / "first" / "README.md"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        (folder / name).touch()
    card.write_text(text)
    check_vacant(folder, marker="config.json", overwrite=True)
    edited = text.replace("None is stated", "MIT, say I. None was stated")
    card.write_text(edited)
    with pytest.raises(UserError, match="would delete what is no part of it: 'README.md'. Move that away"):
        check_vacant(folder, marker="config.json", overwrite=True)
    again = card_text(_export(tiny_run, origin=str(folder), step=None, name="second", dtype="bfloat16"))
    first, second = _sections(edited), _sections(again)
    assert is_unedited(again.encode()) and list(second) == SECTIONS
    assert [second[name] for name in SECTIONS[1:6]] == [first[name] for name in SECTIONS[1:6]]
    assert "From this export another was made" in second["Versions"] and "9,824 numbers in bfloat16" in again
    # A checkpoint that we did not write, and one whose header was broken by an edit.
    for content in ("---\nlicense: mit\n---\n# theirs\n", edited.replace("---\n", "---\n[", 1)):
        card.write_text(content)
        assert read_own_card(folder) is None
        assert "Nothing was trained" in card_text(_export(tiny_run, origin=str(folder), step=None))


def test_how_it_is_loaded_is_python(tiny_run):
    export = _export(tiny_run)
    families, bases = ("llada", "dream", "llama", "qwen3"), (None, "org/base", "/secret/base")
    for family, form, base in itertools.product(families, ("merged", "adapter"), bases):
        arch = dataclasses.replace(export.arch, family=family, alignment="shifted")
        text = card_text(dataclasses.replace(export, arch=arch, form=form, base=base))
        blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
        assert len(blocks) == 2 and all(ast.parse(block) and "org/mine" in block for block in blocks)
        assert "secret" not in text
        for said, where in {
            "trust_remote_code=True": family in ("llada", "dream"),
            "autoregressive network. It is a masked": family in ("llama", "qwen3"),
            "PeftModel": form == "adapter",
            "`BASE` is the folder": form == "adapter" and base != "org/base",
        }.items():
            assert (said in text) == where, (family, form, base, said)
