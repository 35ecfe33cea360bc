"""Decoding many prompts in batches that never wait: the schedule with a decoder that only counts, and with a network."""

import json
import random

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxblock import streaming
from jaxblock.cli import main
from jaxblock.diffusion.canvas import Layout
from jaxblock.diffusion.decoding.config import DecodeConfig
from jaxblock.diffusion.decoding.queue import Queue, Row
from jaxblock.diffusion.decoding.shapes import BatchShapes
from jaxblock.inference import DeviceDecoder, decode_many
from jaxblock.parallel import rules
from jaxblock.parallel.mesh import make_mesh
from tests.diffusion.conftest import ONE_LAYER, SPANS, P, decoded, make_layout, make_net


class Line(Row):
    """A row whose answer has a block for each of ``widths``."""

    def __init__(self, number, widths):
        super().__init__(np.array([number]), number, np.array([]), np.array([]))
        self.widths = widths


class Counting:
    """Decodes nothing: it counts, and asserts what the queue promises of every batch."""

    def __init__(self, size, rows):
        self.size, self.rows, self.batches, self.running, self.handed_out = size, rows, 0, [], 0

    def source(self):
        for row in self.rows:
            assert row.index - self.handed_out < 2 * Queue.AHEAD * self.size, "a long file is not held"
            yield row

    def shape(self, row):
        return row.widths[row.block]

    def start(self, shape, rows):
        assert 1 <= len(rows) <= self.size and all(self.shape(row) == shape and not row.ended for row in rows)
        assert len(rows) == self.size or not self.running, "a batch that is not full waits for the one under way"
        numbers = [row.index for row in rows]
        assert not set(numbers) & {number for batch in self.running for number in batch}
        self.running.append(numbers)
        assert len(self.running) <= Queue.IN_FLIGHT
        self.batches += 1
        return numbers

    def finish(self, started, rows):
        assert started == self.running.pop(0) == [row.index for row in rows], "in the order in which they were started"
        for row in rows:
            row.block += 1
            row.ended = row.block == len(row.widths)

    def decoded(self):
        """Decodes the rows, asserts that all are handed out, complete and in their order, and returns after how many batches each."""
        after = []
        for row in Queue(self.source(), self):
            assert row.ended and row.block == len(row.widths) and row.index == self.handed_out
            self.handed_out += 1
            after.append(self.batches)
        assert self.handed_out == len(self.rows) and not self.running
        return after


@settings(deadline=None)
@given(st.integers(1, 4), st.lists(st.lists(st.sampled_from([64, 128, 192]), min_size=1, max_size=5), max_size=90))
def test_every_row_is_decoded_once_a_block_and_handed_out_in_order(size, widths):
    assert len(Counting(size, [Line(number, blocks) for number, blocks in enumerate(widths)]).decoded()) == len(widths)


@pytest.mark.parametrize(("widths", "most"), [(1, 1.04), (2, 1.1)])
@pytest.mark.parametrize("seed", range(3))
def test_hardly_a_place_is_empty(widths, most, seed):
    """512 answers of 1 to 8 blocks at batch 64; decoded batch by batch it would be 64 * 8 * 8 places: 1.78."""
    draw = random.Random(seed)
    rows = [Line(n, [64 * draw.randint(1, widths)] * draw.randint(1, 8)) for n in range(512)]
    assert Counting(64, rows).decoded()[-1] * 64 <= most * sum(len(row.widths) for row in rows)


def test_answers_come_early_while_more_rows_come():
    """The first batch's answers are handed out after the time that they take, not at the end."""
    first, *_ = Counting(4, [Line(number, [64] * 8) for number in range(400)]).decoded()
    assert first <= 8 * Queue.IN_FLIGHT + Queue.IN_FLIGHT


@pytest.mark.parametrize(("cache", "window"), [("none", None), ("none", 40), ("prefix", None), ("dual", 0)])
@pytest.mark.parametrize(
    ("usual", "response", "block", "plain"), [(24, 16, 4, 1), (44, 24, 8, 1), (192, 256, 32, 2), (700, 64, 64, 4)]
)
def test_four_shapes_serve_all_usual_prompts_and_blocks(usual, response, block, plain, window, cache):
    layout = Layout(response, block, "same_position", "aligned", window, 9, 8, (8,))
    shapes = BatchShapes(layout, DecodeConfig(cache=cache), usual, 3000)
    rows = [(length, k) for length in {*range(1, usual, 5), usual} for k in range(layout.n_blocks)]
    found = {row: shapes.of_block(*row) for row in rows}
    assert len(set(found.values())) <= (4 if window is not None or cache == "prefix" else plain)
    for (length, k), shape in found.items():
        assert length <= shape.room < usual + 16
        seen = response if window is None else min(response, (k + 1) * block + window)
        assert shape.sizes.width >= length + seen, "what is visible is computed"
    # Longer prompts double the canvas, up to what the network was made for.
    longer = [shapes.room(length) + response for length in range(usual + 16, 3001 - response, 9)]
    assert longer == sorted(longer) and max(longer) <= 3000 and len(set(longer)) <= 8
    assert all(width >= usual + 16 + 9 * at + response for at, width in enumerate(longer))
    # A prompt length beyond that brings no more room.
    assert shapes._replace(prompt_len=20_000).room(5) + response <= 3000


RULES = {
    "low_confidence": dict(steps_per_block=2, temperature=1.5),
    "dream": dict(rule="entropy", quota="dream", temperature=1.2, top_p=0.9, alg_temp=0.3, cache="prefix"),
    "origin": dict(rule="origin", temperature=1.0, top_k=4, cfg_scale=0.5),
    "threshold": dict(rule="confidence_threshold", threshold=0.3, temperature=0.9, cache="dual", seed=2**40 + 1),
    "spans": dict(steps_per_block=2, temperature=1.5, early_stop=False),
}
SLOWER = ("dream", "origin", "threshold")
PROMPTS = [[n % 7, n // 7, n % 5][: 1 + n % 3] for n in range(11)]


@pytest.mark.parametrize(
    "name", ["low_confidence", "spans", *(pytest.param(name, marks=pytest.mark.slow) for name in SLOWER)]
)
def test_a_row_is_what_the_scan_over_all_rows_makes_of_it(name):
    """Three places for eleven prompts, whose answers have one to three blocks, or for texts; on canvases of another width."""
    layout = make_layout(alignment="shifted" if name in ("origin", "threshold") else "same_position")
    (net, params), options, prompts, rests = ONE_LAYER, DecodeConfig(batch_size=3, **RULES[name]), PROMPTS, None
    if name == "spans":
        layout, (prompts, rests) = layout._replace(infill=True), zip(*SPANS, strict=True)
        device = DeviceDecoder(net, layout, options, params, prompt_len=P, rows=len(SPANS))
        rows = list(Queue([device.row(prompt, at, rest) for at, (prompt, rest) in enumerate(SPANS)], device))
    else:
        rows = list(decode_many(net, layout, options, params, map(np.array, prompts), prompt_len=P))
    found = decoded(ONE_LAYER, layout, options.static(3), prompts, rests, room=16, seed=options.seed % 2**32)
    for at, row in enumerate(rows):
        expected = jax.tree.map(lambda leaf, at=at: leaf[at], found)
        assert (row.nfe, row.positions) == (expected.nfe, expected.positions)
        for field in ("response", "commit_step"):
            np.testing.assert_array_equal(getattr(row, field), getattr(expected, field)[: len(row.response)])
    assert len({row.block for row in rows}) > 1


@pytest.mark.slow
def test_a_cache_that_is_split_over_devices_by_rows_and_heads_changes_nothing():
    net, params = make_net("float32", vocab_size=12, n_kv_heads=2)
    layout, mesh = make_layout(), make_mesh(2, 1, 2, devices=jax.devices()[:4])
    options = DecodeConfig(batch_size=4, cache="dual", temperature=0.7, cfg_scale=0.5)
    prompts = list(map(np.array, PROMPTS[:6]))
    want = list(decode_many(net, layout, options, params, prompts, prompt_len=P))
    placed = jax.device_put(params, rules.param_shardings(mesh, net.param_table))
    with jax.set_mesh(mesh):
        found = list(decode_many(net, layout, options, placed, prompts, prompt_len=P))
    for ours, theirs in zip(found, want, strict=True):
        np.testing.assert_array_equal(ours.response, theirs.response)
        assert (ours.nfe, ours.positions, ours.computed) == (theirs.nfe, theirs.positions, theirs.computed)


def test_a_streamed_prompt_computes_what_a_queued_one_does():
    (net, params), prompt = ONE_LAYER, np.array([3, 4])
    layout, options = make_layout(response_len=12)._replace(suffix_window=1), DecodeConfig(cache="prefix", batch_size=1)
    (row,) = decode_many(net, layout, options, params, [prompt], prompt_len=P)
    blocks = streaming.Blocks(net, layout, options, params, prompt, 0, P)
    *_, last = blocks.decoded()
    found = jax.tree.map(lambda leaf: np.asarray(leaf)[0], blocks.responses(*last))
    assert (found.computed, found.nfe) == (row.computed, row.nfe)
    np.testing.assert_array_equal(found.response, row.response)


CONFIG = """\
data: {{prepared: {0}/prepared, train: {0}/train.jsonl, test: {0}/test.jsonl, validation_records: 8, template: plain,
       tokenizer_type: char, vocab_size: 300}}
canvas: {{prompt_len: 28, response_len: 32, block: 4}}
model: {{d_model: 16, n_layers: 2, n_heads: 2, mlp_dim: 64, tie_embeddings: true, scan_layers: true}}
optimizer: {{lr: 1.0e-2, warmup_steps: 10}}
train: {{out: {0}/run, steps: 150, batch_size: 32, log_every: 50, eval_every: 0}}
decode: {{batch_size: 64, steps_per_block: 1, temperature: 1.0}}
evaluate: {{nelbo: false, grader: exact}}
"""


@pytest.mark.slow
def test_an_evaluation_of_answers_of_one_to_eight_blocks_computes_little_in_vain(tmp_path, capsys):
    """A model trained on answers of random length draws answers of random length."""
    for name, first in (("train", 0), ("test", 1)):
        lengths = {n: 4 * random.Random(n).randint(1, 8) - 1 for n in range(first, 1024, 2)}
        rows = [json.dumps({"question": f"{n}?", "answer": "a" * length}) for n, length in lengths.items()]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows))
    (tmp_path / "config.yaml").write_text(CONFIG.format(tmp_path))
    for verb in ("prepare", "train"):
        assert main([verb, "--config", str(tmp_path / "config.yaml")]) == 0
    assert main(["evaluate", "--checkpoint", str(tmp_path / "run"), "--out", str(tmp_path / "scores")]) == 0
    problems = [json.loads(line) for line in (tmp_path / "scores" / "problems.jsonl").read_text().splitlines()]
    blocks = [-(-problem["tokens"] // 4) for problem in problems]
    costs = json.loads((tmp_path / "scores" / "summary.json").read_text())["decode_costs"]
    assert len(blocks) == 512 and set(blocks) == set(range(1, 9)) and costs["row_blocks"] == sum(blocks)
    assert costs["computed_over_needed"][0] <= 1.15
    assert f"/ {sum(blocks):,} blocks of rows (1.0" in capsys.readouterr().out
