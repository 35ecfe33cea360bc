"""Every config is valid, and those that need no checkpoint run for two steps (on little data, a small network).

Those for published 7B and 8B checkpoints are compiled at full size by test_presets.py; test_smollm2.py runs its own.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jaxblock.cli import main
from jaxblock.commands import train as verbs
from jaxblock.config.checks import check_config
from jaxblock.config.config import Config
from jaxblock.config.yaml import load_config

EVERY = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))
CONFIGS = [path for path in EVERY if (load_config(str(path)).model.init_from or "runs/").startswith("runs/")]

# Little data, of which a tokenizer makes long prompts, and a small network.
DATA = "--data.builtin_train 1000 --data.builtin_test 16 --data.validation_records 16 --data.overwrite --data.overlong drop"
TRAIN = (
    "--train.steps 2 --train.eval_problems 8 --train.eval_nelbo_rows 8 --train.log_every 1 --optimizer.warmup_steps 1 "
    "--decode.batch_size 8 --decode.steps_per_block 2 --model.d_model 32 --model.n_layers 1 --model.mlp_dim 32"
)


@pytest.fixture(scope="module")
def train(tmp_path_factory: pytest.TempPathFactory, draw_curves: Any) -> Callable[[Path, Config], Path]:
    """Prepares and trains what a config says in a working folder of its own, and first what it starts from."""
    work = tmp_path_factory.mktemp("work")

    def run(path: Path, config: Config) -> Path:
        out = work / config.train.out
        if out.exists():
            return out
        if config.model.init_from is not None:
            starts = {load_config(str(other)).train.out: other for other in CONFIGS}
            start = starts[config.model.init_from]
            run(start, load_config(str(start)))
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(work)
            patch.setattr(verbs, "draw_curves", draw_curves)
            words = "" if config.data.train == "builtin" else "--data.vocab_size 600"  # few lines have few words
            for verb, flags in (("prepare", f"{DATA} {words}"), ("train", f"{DATA} {words} {TRAIN}")):
                assert main([verb, "--config", str(path), *flags.split()]) == 0
        return out

    return run


@pytest.mark.parametrize("path", EVERY, ids=[path.stem for path in EVERY])
def test_a_config_is_valid(path: Path) -> None:
    config = load_config(str(path))
    assert check_config(config) is config


FAST = ("quickstart_classical",)
"""The quickstart's first phase: the others run the same in another combination, and the slow tests run them all."""


@pytest.mark.parametrize(
    "path", [pytest.param(p, id=p.stem, marks=[pytest.mark.slow] * (p.stem not in FAST)) for p in CONFIGS]
)
def test_a_config_runs(
    path: Path, train: Callable[..., Path], request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> None:
    config = check_config(load_config(str(path)))
    if config.data.train != "builtin":
        # The file's first lines, where the config looks for it.
        shared: Path = request.getfixturevalue("shared")
        for name in (config.data.train, config.data.test):
            assert name is not None
            there = tmp_path_factory.getbasetemp() / "work0" / name
            there.parent.mkdir(parents=True, exist_ok=True)
            lines = (shared / name).read_text(encoding="utf-8").splitlines(keepends=True)
            there.write_text("".join(lines[:150]), encoding="utf-8")
    run = train(path, config)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row["kind"] == "train"] == [1, 2]
    assert all(math.isfinite(row["loss"]) for row in rows if row["kind"] == "train")
    evaluations = [row for row in rows if row["kind"] == "eval"]
    assert [row["step"] for row in evaluations] == [0, 2]
    assert all(row["pass_at_1"]["n"] == 8 and math.isfinite(row["nelbo_per_token"]["mean"]) for row in evaluations)
    assert (run / "plots" / "curves.png").is_file()
