"""Rows that are computed at few widths give the losses and gradients of rows at the canvas's width; few positions are wasted."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxblock import build
from jaxblock.config.config import Config
from jaxblock.config.yaml import load_config
from jaxblock.data.loader import Batch, BatchAt
from jaxblock.data.store.prepare import prepare
from jaxblock.data.store.records import Records
from jaxblock.diffusion.config import CanvasConfig, MethodConfig
from jaxblock.models.config import LoraConfig, ModelConfig
from jaxblock.models.families import registry
from jaxblock.models.lines import widths_of_rows
from jaxblock.models.spec import flatten
from jaxblock.training.config import TrainConfig
from jaxblock.training.lines import sort_into_lines
from jaxblock.training.places import choose_lines
from jaxblock.training.step import gradients
from jaxblock.types import Lines, positions_of_line
from tests.models.networks import random_params

ROWS, P, R, B = 8, 14, 8, 4


def _batch() -> Batch:
    rng, index = np.random.default_rng(0), np.arange(ROWS, dtype=np.int32)
    texts = rng.integers(3, 29, (2, ROWS, P), dtype=np.int32)
    lengths = [3, 12, 5, 1, 8, 2, 6, 4], [8, 7, 1, 3, 6, 5, 4, 8], [0, 1, 0, 0, 1, 1, 0, 0]
    prompt_len, text_len, block = np.array(lengths, np.int32)
    return Batch(texts[0], prompt_len, texts[1, :, :R], text_len, block, index, index)


CASES: dict[str, tuple[Lines, int, tuple[int, int], dict[str, Any], Config]] = {
    # the widths, the parts of the batch, (positions computed, needed), the network
    "three widths": (Lines(((1, 20), (2, 16), (5, 13)), 20), 1, (117, 105), {"family": "dream", "scan_layers": False}, Config()),
    "two lines, with dropout": (
        Lines(((1, 20), (1, 14), (2, 12)), 20), 2, (2 * 2 * 58, 2 * 105), {},
        Config(method=MethodConfig(draws=2, prefix_mask_rate=0.3), lora=LoraConfig(2, dropout=0.4, targets=("q", "down"))),
    ),
    "rows that do not fit": (
        Lines(((1, 20), (3, 13)), 20), 2, (8 * 20, 105), {}, Config(method=MethodConfig("classical")),
    ),
    "a window after known blocks": (
        Lines(((1, 20), (1, 16), (6, 11)), 20), 1, (2 * 102, 2 * 90), {},
        Config(method=MethodConfig(blocks="pairs", draws=2), canvas=CanvasConfig(suffix_window=1)),
    ),
}  # fmt: skip
USUAL = ("three widths", "rows that do not fit")


@pytest.mark.parametrize(
    "case", [case if case in USUAL else pytest.param(case, marks=pytest.mark.slow) for case in CASES]
)
def test_losses_and_gradients_are_those_of_rows_at_the_canvas_width(case):
    lines, parts, positions, model, rest = CASES[case]
    canvas = CanvasConfig(P, R, B, suffix_window=rest.canvas.suffix_window)
    network = ModelConfig(d_model=8, n_layers=1, n_heads=2, mlp_dim=16, init_from="x", **model)
    train = TrainConfig(batch_size=ROWS, accumulate=parts)
    config = dataclasses.replace(rest, canvas=canvas, model=network, train=train)
    arch = registry.architecture_from_config(network, vocab_size=32, mask_id=31, eos_id=1)
    whole, laid = (build.learner(config, arch, (2, 1), lines=each) for each in (None, lines))
    params, base = random_params(whole.net.trainable), random_params(whole.net.param_table, 1) if rest.lora.rank else {}
    run = jax.jit(gradients, static_argnums=(0, 5))
    (want, want_grads), (got, got_grads) = (
        jax.device_get(run(one.objective, params, _batch(), jnp.int32(5), base, parts)) for one in (whole, laid)
    )
    assert tuple(got.positions) == positions and tuple(want.positions) == (22 * ROWS * rest.method.draws, positions[1])
    for name in ("loss", "by_block", "by_count"):
        np.testing.assert_allclose(getattr(got, name), getattr(want, name), rtol=2e-6, err_msg=name)
    theirs = flatten(want_grads)
    for path, ours in flatten(got_grads).items():
        np.testing.assert_allclose(ours, theirs[path], rtol=0, atol=1e-5 * np.abs(theirs[path]).max(), err_msg=path)


def test_rows_are_sorted_within_their_lines_and_fit_whenever_some_order_fits():
    """Every way to give two lines of two rows lengths of 1 to 3, against every order of the rows."""
    for places in (((1, 3), (1, 2)), ((2, 2),), ((1, 2), (1, 1))):
        widths = widths_of_rows(places)
        sort = jax.jit(lambda batch, needed, places=places: sort_into_lines(batch, needed, places))
        for lengths in itertools.product((1, 2, 3), repeat=4):
            rows = np.array(lengths, np.int32)
            batch = Batch(*(np.arange(4, dtype=np.int32) for _ in Batch._fields))
            sorted_rows, fits = sort(batch, rows)
            lines = np.asarray(sorted_rows.row_id).reshape(2, 2)
            assert [sorted(line) for line in lines.tolist()] == [[0, 1], [2, 3]]
            assert all(rows[first] >= rows[second] for first, second in lines)
            orders = [[(a, b), (b, a)] for a, b in (rows[:2], rows[2:])]
            assert bool(fits) == all(any((np.array(one) <= widths).all() for one in line) for line in orders)


@pytest.mark.slow
def test_an_epoch_of_gsm8k_computes_few_positions_in_vain(shared, tmp_path):
    """Counts the real batches of ``configs/gsm8k_small.yaml``; computed at the canvas's width they are 1.35."""
    config = load_config(str(Path(__file__).parents[2] / "configs" / "gsm8k_small.yaml"))
    files = {split: str(shared / "data" / "gsm8k" / f"{split}.jsonl") for split in ("train", "test")}
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, prepared=str(tmp_path / "p"), **files))
    prepare(config.data, config.canvas)
    records = Records(tmp_path / "p", "train")
    arch = registry.architecture_from_config(config.model, vocab_size=4000, mask_id=1, eos_id=2)
    lines = choose_lines(config, records, arch, ways=1)
    assert lines is not None and len(lines.places) <= 4
    order = BatchAt(records, canvas=config.canvas, seed=config.train.seed, batch_size=config.train.batch_size)
    lengths = records.lengths()[:, 0] + config.canvas.response_len
    needed = np.stack([lengths[order(step).index] for step in range(len(records) // config.train.batch_size)])
    fits = (-np.sort(-needed, axis=1) <= widths_of_rows(lines.places)).all(1)
    computed = np.where(fits, positions_of_line(lines.places), needed.shape[1] * lines.widest).sum() / needed.sum()
    assert 1.0 <= computed <= 1.15 < 448 / needed.mean(), computed
    off = dataclasses.replace(config, train=dataclasses.replace(config.train, widths="full"))
    paper = dataclasses.replace(config, canvas=dataclasses.replace(config.canvas, context="paper"))
    assert choose_lines(off, records, arch, 1) is choose_lines(paper, records, arch, 1) is None
