"""Tests what ``inspect`` shows on a tiny canvas, that no mode has findings, and that broken masking has."""

import dataclasses
import functools
import io
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from jaxblock.commands import train
from jaxblock.config.yaml import load_config
from jaxblock.data.store.prepared_folder import open_prepared
from jaxblock.diffusion import canvas as canvases
from jaxblock.diffusion import corruption
from jaxblock.diffusion.canvas import Layout
from jaxblock.diffusion.config import MethodConfig
from jaxblock.diffusion.sampling import Draw, draw, draw_uniforms
from jaxblock.io import hub
from jaxblock.models.config import ModelConfig
from jaxblock.models.families import registry
from jaxblock.reporting import examine as examining
from jaxblock.reporting.examine import draws_of_steps, examine
from jaxblock.reporting.html import html_page
from jaxblock.reporting.terminal import print_records

MASK, FILL, EOT = 90, 91, 92


def layout(context="aligned", **changes):
    return Layout(8, 4, "same_position", context, None, MASK, FILL, (EOT, FILL))._replace(**changes)


@functools.cache
def tiny(form):
    """Makes row 0 with prompt 1 2, response 11..14 and a terminator (two blocks), and row 1 with prompt 1, response 11, cut."""
    prompts, responses = [[1, 2, 0], [1, 0, 0]], [[11, 12, 13, 14, EOT, 0, 0, 0], [11, 0, 0, 0, 0, 0, 0, 0]]
    rows = (np.array(numbers, np.int32) for numbers in (prompts, [2, 1], responses, [5, 1], [0, 1]))
    return jax.jit(canvases.from_rows, static_argnums=0)(form, *rows)


def examined(form=None, labels=None):
    """Examines a draw for row 0 block 1 with its first and third position masked, and for row 1 block 0 with its second."""
    form = form or layout()
    masked = np.array([[[True, False, True, False], [False, True, False, False]]])
    by_hand = jax.device_put(Draw(np.array([[1, 0]], np.int32), masked, np.array([[4.0, 2.0]], np.float32)))
    return examine(form, tiny(form), by_hand, labels=labels)


LETTER = {"p": "prompt", "r": "response", "t": "terminator", "f": "fill", "d": "padding", "u": "unused", "h": "hidden"}


def test_what_a_draw_shows_by_hand():
    kinds = {"aligned": ["pprrrrtfffh", "prfffuuuuhh"], "paper": ["pprrrrtdddd", "prddddddddd"]}
    for context, rows in kinds.items():
        got = [[p.kind for p in record.positions] for record in examined(layout(context))]
        assert got == [[LETTER[c] for c in row] for row in rows]
    record = examined(labels=["a", "b"])[0]
    shown = record.draws[0]
    assert [p.block for p in record.positions] == [None, None, 0, 0, 0, 0, 1, 1, 1, 1, None]
    assert record.label == "a" and (record.prompt_len, record.text_len, record.n_blocks, record.length) == (2, 5, 2, 10)
    assert [s.id for s in shown.seen] == [1, 2, 11, 12, 13, 14, MASK, FILL, MASK, FILL, MASK]
    lost = [(at, s.target, s.read_at) for at, s in enumerate(shown.seen) if s.loss]
    assert lost == [(6, EOT, 6), (8, FILL, 8)]
    assert [at for at, s in enumerate(shown.seen) if s.active] == [6, 7, 8, 9]
    assert (shown.block, shown.supervised, shown.masked, shown.weight, shown.visible_len) == (1, 4, 2, 4.0, 10)
    assert shown.coefficient == pytest.approx(4.0 / 6) and shown.rotary == (0, 9) and not shown.findings
    shown = examined(layout(alignment="shifted", suffix_window=1))[1].draws[0]
    assert [(at, s.read_at) for at, s in enumerate(shown.seen) if s.loss] == [(2, 1)]
    assert shown.visible_len == 6 and not shown.seen[6].visible and not shown.findings


@pytest.mark.parametrize(
    ("context", "method"),
    [
        ("aligned", MethodConfig(draws=4, prefix_mask_rate=0.9, suffix_mask_prob=0.2, prompt_mask_rate=0.6)),
        ("paper", MethodConfig(draws=4, prefix_mask_rate=0.3, suffix_mask_prob=0.5)),
        ("aligned", MethodConfig(law="antithetic", blocks="pairs", draws=4)),
    ],
)
def test_sound_masking_has_no_findings_and_shows_what_training_feeds(context, method):
    form = layout(context)
    canvas = tiny(form)
    block = jax.device_put(np.array([1, 0], np.int32)) if method.pairs else None

    def draw_of(step):
        uniforms = draw_uniforms(method, form, jax.random.key(step), 2, prompt_room=3)
        return draw(method, form, canvas, uniforms, block), jnp.moveaxis(uniforms.noise, 1, 0)

    draws, noise = draws_of_steps(draw_of, [5, 6])
    got = examine(form, canvas, draws, method=method, noise=noise, drawn_blocks=block)
    assert [d.findings for record in got for d in record.draws] == [()] * 16

    @jax.jit
    def trained(step):
        drawn, noise = draw_of(step)
        feed = jax.vmap(lambda one, u: corruption.corrupt(form, canvas, one, method, u)[0].ids)
        return drawn, feed(drawn, noise if method.needs_noise else None)

    expected, ids = jax.tree.map(np.asarray, trained(6))
    for k in range(4):
        for row, record in enumerate(got):
            shown = record.draws[4 + k]
            assert [s.id for s in shown.seen] == ids[k, row].tolist()
            assert shown.weight == expected.weight[k, row]
            assert sum(s.loss for s in shown.seen) == (expected.masked[k, row].sum() if shown.weight else 0)


BROKEN = {
    "carries loss but its token is shown: canvas position 6": lambda v, t: (v._replace(ids=v.ids.at[:, 6].set(EOT)), t),
    "shows a token after the active block: canvas position 7": lambda v, t: (v._replace(ids=v.ids.at[1, 7].set(14)), t),
    "not fed the prompt as it is: canvas position 0": lambda v, t: (v._replace(ids=v.ids.at[:, 0].set(MASK)), t),
    "carries loss but is hidden: canvas position 8": lambda v, t: (v._replace(length=v.length - 2), t),
    "target is not the record's token": lambda v, t: (v, jnp.roll(t, 1, axis=1)),
    "predicted from the wrong position": lambda v, t: (v._replace(at=v.at + 1), t),
    "may not be supervised: 2": lambda v, t: (v._replace(valid=v.valid.at[:, 2].set(False)), t),
}


def test_broken_masking_is_found(monkeypatch):
    for message, broken in BROKEN.items():
        monkeypatch.setattr(examining, "corrupt", lambda *args, of=broken: of(*corruption.corrupt(*args)))
        found = [f for record in examined() for d in record.draws for f in d.findings]
        assert any(message in f for f in found), found


def piece(token):
    return {MASK: "<mask>", FILL: "<eos>", EOT: "<eot>", 11: '▁<b>&"', 12: "\n"}.get(token, f"▁w{token}")


def test_terminal_says_it_without_colour():
    def printed(width, *about):
        records = examined(labels=["record 7 (a.jsonl:8)", "record 8"])
        print_records(Console(file=(out := io.StringIO()), width=width), layout(), records, piece, *about)
        return out.getvalue()

    text = printed(160, "exact_count law")
    assert "record 7 (a.jsonl:8)" in text and "exact_count law" in text and "(no terminator: it was cut)" in text
    assert re.search(r"▶ block 1 +6 ░<eot>░│<eos>│░<eos>░│<eos>", text)
    assert re.search(r"block 0 +2  <b>&\"│⏎│ w13│ w14", text)
    assert "block 1 active, 2 of 4 masked, weight 4 (× 0.667" in text and "sees 10 positions, rotary 0 to 9" in text
    assert "✗" not in text
    narrow = printed(40)  # long lines break between tokens only
    assert "<eot>" in narrow and "…" not in narrow


def test_html_is_whole_escaped_and_needs_nothing_else():
    html = html_page(layout(), examined(labels=["<script>alert(1)</script>", "b"]), piece, about="a & b")
    assert html.startswith("<!doctype html>") and html.rstrip().endswith("</html>")
    assert not re.search(r"<script|<link|<img|src=|href=|url\(|https?:|@import", html)
    assert "&lt;script&gt;" in html and "a &amp; b" in html and "&lt;b&gt;&amp;&quot;" in html
    assert f"must become id {EOT}, predicted from the hidden state at 6; weight 4" in html
    assert html.count('class="t loss"') == 1 + 3  # the legend's, and one per masked token
    assert html.count("<div") == html.count("</div>") and html.count("<span") == html.count("</span>")


BEFORE = "predicted from the position before it"


def test_a_checkpoints_own_alignment_is_shown(tiny_config, tmp_path, ran, monkeypatch):
    """Of a Dream checkpoint with a config.json and no weights. Nothing is downloaded; a debugged run's first batch shows it too."""
    prepared = open_prepared(tiny_config.parent / "prepared")
    special, vocab = prepared.special, prepared.manifest.vocab_size
    dream = ModelConfig(family="dream", d_model=16, n_heads=2)
    arch = registry.architecture_from_config(dream, vocab_size=vocab, mask_id=special.mask, eos_id=special.eos)
    (tmp_path / "config.json").write_text(json.dumps(registry.to_hf(arch, "float32")))
    monkeypatch.setattr(hub.huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("a download"))
    monkeypatch.setattr(hub.huggingface_hub, "try_to_load_from_cache", lambda *_, **__: None)
    for flags, before, says in (
        ("", False, None),
        (f"--model.init_from {tmp_path}", True, None),
        ("--model.init_from Dream-org/Dream-v0-Instruct-7B@main", True, None),
        ("--model.init_from GSAI-ML/LLaDA-8B-Instruct --model.family dream", False, None),
        (
            "--data.tokenizer Dream-org/Dream-v0-Base-7B",
            False,
            "_from is not set: same_position logits.*has shifted logits",
        ),
        ("--model.init_from some/model --model.family qwen2", True, "some/model is not here, so shifted logits"),
        ("--model.init_from runs/later --model.alignment shifted", True, "runs/later is not here"),
    ):
        told = ran(f"inspect --config {tiny_config} --records 0 --steps 1 {flags}")
        assert (BEFORE in " ".join(told.out.split())) is before, flags
        assert re.search(says, told.err, re.S) if says else told.err == ""

    out, config = io.StringIO(), load_config(str(tiny_config))
    model = dataclasses.replace(config.model, init_from=str(tmp_path))
    train._show_first_batch(dataclasses.replace(config, model=model), Console(file=out, width=200))
    assert BEFORE in out.getvalue()
