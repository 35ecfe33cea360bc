"""A run of twelve steps: it compiles each program once, says where its time went, and keeps its best checkpoint."""

import logging
from collections import Counter

import jax
import pytest

from jaxblock.training import places
from jaxblock.training.checkpoints.reader import CheckpointReader
from jaxblock.training.observe.goodput import CAUSES
from tests import runs

FLAGS = (
    "--train.steps 12 --train.eval_every 3 --train.save_every 4 --profile 3 4 --train.keep 1 --train.keep_best nelbo"
)
# The records of the two evaluations do not fill their last batches, those of training not even one. No other test decodes in
# three steps a block, so that nothing is traced already.
FLAGS += " --train.keep_every 4 --train.eval_problems 6 --train.eval_nelbo_rows 7 --train.batch_size 80"
FLAGS += " --decode.steps_per_block 3 --optimizer.schedule constant"


@pytest.mark.slow
def test_a_run_compiles_once_tells_its_time_and_keeps_its_best(tiny_config, tmp_path, monkeypatch, ran, caplog):
    run, command = tmp_path / "run", f"train --config {tiny_config} --train.out {tmp_path / 'run'} {FLAGS}"
    monkeypatch.setattr(places, "SMALLEST_CANVAS", 0)  # so that this small one has several widths
    jax.clear_caches()  # of other tests
    with caplog.at_level(logging.WARNING), jax.log_compiles():
        said = ran(command).err
    # Each message names a program, its shapes and its shardings.
    compiled = Counter(message for message in caplog.messages if message.startswith("Compiling "))
    names = Counter(message.split(" ")[1] for message in compiled)
    assert set(compiled.values()) == {1}
    assert [names[f"jit({of})"] for of in ("one_step", "_decode_block", "_nelbo_of_rows")] == [1, 1, 1], names
    assert "train.batch_size 80 is more than the 77 training records: every" in said
    assert "goodput" in said and "step " in said and f"the trace is in {run / 'profile'}" in said
    assert list((run / "profile").rglob("*.xplane.pb"))
    told = runs.rows(run, "goodput")
    assert {row["step"] for row in told} == {0, 3, 4, 6, 8, 9, 12}
    assert all(set(row["seconds"]) == set(CAUSES) for row in told)
    for cause in ("start", "step", "evaluation"):
        values = [row["seconds"][cause] for row in told]
        assert values == sorted(values) and values[-1] > 0
    rows = runs.rows(run)
    assert len(rows) == 12 and all("mfu" not in row for row in rows)  # the peak of a CPU is not known
    assert all(1 <= row["computed_per_needed"] < 1.3 for row in rows)  # at the canvas's width it would be 2

    nelbo = {row["step"]: row["nelbo_per_token"]["mean"] for row in runs.rows(run, "eval") if row["step"]}
    best = min(nelbo, key=lambda step: nelbo[step])
    checkpoints = CheckpointReader(run)
    assert checkpoints.best() == best and checkpoints.steps() == sorted({4, 8, 12, best})
    ran(f"decode --checkpoint {run} --step best 1+1?")
    assert "no whole checkpoint of step 7; there are 4" in ran(f"decode --checkpoint {run} --step 7 1+1?", 2).err

    # Under a constant schedule the steps can be raised.
    again = f"{command} {' '.join(runs.QUIET)} --train.keep_best none --train.steps"
    assert "going on from step 12" in ran(f"{again} 13").err
    assert [row["step"] for row in runs.rows(run)] == list(range(1, 14))
    assert "train.steps = 13 then, 12 now (the run has done 13 steps already)" in ran(f"{again} 12", 2).err
