"""Filling the masked spans of texts: against a decoder in NumPy, against ordinary decoding, and against rows alone."""

import dataclasses
from functools import partial
from typing import get_args

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxblock.diffusion import canvas as canvases
from jaxblock.diffusion.config import CanvasConfig
from jaxblock.diffusion.decoding import decoder
from jaxblock.diffusion.decoding.config import DecodeConfig, RuleName
from jaxblock.diffusion.decoding.queue import Queue, Row
from jaxblock.diffusion.layouts import infilling_layout
from jaxblock.errors import UserError
from jaxblock.inference import DeviceDecoder, decode_many
from tests.diffusion.decoding import RECORDED, Fixed, Recorder, Refreshing, decoding

M = 9
# Before the first span, and from there on: a span longer than a block, two spans within a block, no right side, a span at the end.
TEXTS = [
    ([1], [M, M, M, M, 2, 3]),
    ([2, 3], [M, 5, M, M, 0]),
    ([4, 5, 6], [M] * 9),
    ([0, 1], [M, M, 4, 4, 4, M]),
    ([6], [M, M, M, 1, M, M, M, M]),
]
WAYS = {
    "low_confidence": dict(steps_per_block=2, temperature=1.5),
    "threshold": dict(rule="confidence_threshold", threshold=0.3, cfg_scale=0.5),
    "dream": dict(rule="entropy", quota="dream", temperature=1.2, top_p=0.9, alg_temp=0.3),
}


@pytest.fixture(scope="module")
def made(tiny):
    return tiny[0](dtype="float32", n_layers=2)


def _layout(tiny, alignment="same_position", infill=True):
    return tiny[1](alignment=alignment)._replace(infill=infill)


def _options(**fields):
    return DecodeConfig(**{"early_stop": False, "batch_size": 3, **fields})


@partial(jax.jit, static_argnums=(0, 1, 2))
def _decode(net, layout, options, params, *lengths):
    return decoder.decode(net, layout, options, params, canvases.decoding_canvas(layout, *lengths), 0)


def _scanned(net, layout, options, texts=TEXTS, first=0):
    """The rows that ``decode`` makes of texts: it goes over every response position at which a block may begin."""
    ids = np.full((len(texts), 3 + 9), M, np.int32)
    for row, (prompt, rest) in enumerate(texts):
        ids[row, : len(prompt + rest)] = prompt + rest
    sizes = [len(p) for p, _ in texts], range(first, first + len(texts)), [len(p + rest) for p, rest in texts]
    lengths = [np.array(size, np.int32) for size in sizes]
    found = jax.device_get(_decode(net[0], layout, options.static(3), net[1], ids, *lengths))
    rows = []
    for at, (prompt, rest) in enumerate(texts):
        parts = (leaf[at] for leaf in found)
        response, commit_step, *counts = parts
        rows.append(Row(np.array(prompt), at, response[: len(rest)], commit_step[: len(rest)], *map(int, counts)))
    return rows


def _filled(net, layout, options, texts=TEXTS, first=0):
    """The rows that the queue makes of texts, in batches of one size however few they are: one program serves all calls."""
    device = DeviceDecoder(net[0], layout, options, net[1], prompt_len=3, rows=len(TEXTS))
    rows = [device.row(prompt, at, rest) for at, (prompt, rest) in enumerate(texts, first)]
    return list(Queue(rows, device)), device.costs


def _same(one, other, fields=("response", "commit_step", "nfe", "positions")):
    for a, b in zip(one, other, strict=True):
        chex.assert_trees_all_equal([getattr(a, name) for name in fields], [getattr(b, name) for name in fields])


def _replay(prompt, rest, layout, script):
    """Fills a text's spans in NumPy, a token a step in the order of the script; logs what the network is to be fed at each step.

    Yields:
        (ids, the positions that may be committed, the positions whose logits are read).
    """
    x, script = np.array(prompt + rest), list(script)
    shift = layout.alignment == "shifted"
    while (x == M).any():
        begin = int(np.flatnonzero(x == M)[0])
        end = begin
        while end < len(x) and x[end] == M and end < begin + layout.block:
            end += 1
        while (x[begin:end] == M).any():
            yield x.tolist(), [i for i in range(begin, end) if x[i] == M], [i - shift for i in range(begin, end)]
            at, token = script.pop(0)
            x[len(prompt) + at] = token
    assert not script


@pytest.mark.parametrize("alignment", ["same_position", "shifted"])
def test_every_view_and_commit_is_that_of_a_decoder_in_numpy(tiny, alignment):
    layout, net, options = _layout(tiny, alignment), Recorder(), _options(rule="random", temperature=1.0)
    for index, (prompt, rest) in enumerate(TEXTS):
        net.views.clear()
        (row,) = _scanned((net, RECORDED), layout, options, TEXTS[index : index + 1], first=index)
        jax.effects_barrier()
        masks, length = np.flatnonzero(np.array(rest) == M), len(prompt) + len(rest)
        order = masks[np.argsort(row.commit_step[masks])]
        states = _replay(prompt, rest, layout, [(at, row.response[at]) for at in order.tolist()])
        for step, ((ids, may, reads), seen) in enumerate(zip(states, net.views, strict=True)):
            seen = jax.tree.map(lambda leaf: leaf[0], seen)
            assert seen.length == length and seen.ids[:length].tolist() == ids
            assert seen.positions[:length].tolist() == list(range(length))
            assert seen.at[seen.valid].tolist() == reads and order[step] + len(prompt) in may
            assert set(may) <= set(seen.active[seen.valid].tolist())
        given = np.delete(np.arange(len(rest)), masks)
        assert (row.commit_step[given] == decoder.GIVEN).all() and row.response[given].tolist() == [
            token for token in rest if token != M
        ]
        assert row.nfe == len(masks) == row.commit_step.max() + 1 and row.positions == len(masks) * length
        assert (row.response != M).all() and row.computed == len(masks) * 12


@pytest.mark.parametrize(
    "fields, alignment",
    [
        ({**WAYS["low_confidence"], "cache": "dual"}, "same_position"),
        ({**WAYS["dream"], "cache": "prefix"}, "shifted"),
        ({**WAYS["threshold"]}, "shifted"),
        *(
            pytest.param(
                {"rule": rule, "cache": cache, "temperature": 0.7, "steps_per_block": 2, "seed": 3},
                "shifted" if cache == "dual" else "same_position",
                marks=pytest.mark.slow,
            )
            for rule, cache in zip(get_args(RuleName), ["prefix", "dual"] * 4, strict=True)
        ),
    ],
)
def test_without_a_right_side_it_is_ordinary_decoding(tiny, made, fields, alignment):
    options = _options(**fields)
    prompts = [text[0] for text in TEXTS]
    layout = _layout(tiny, alignment)._replace(response_len=6)
    ordinary = layout._replace(infill=False)
    plain = decode_many(made[0], ordinary, options, made[1], map(np.array, prompts), prompt_len=3)
    filled, costs = _filled(made, layout, options, [(prompt, [M] * 6) for prompt in prompts])
    _same(filled, list(plain))
    assert costs.row_blocks == 2 * len(prompts)


@pytest.mark.parametrize("cache, alignment", [("prefix", "shifted"), ("dual", "same_position")])
def test_a_cache_refreshed_at_every_step_is_no_cache_and_rows_alone_are_rows_in_a_batch(tiny, made, cache, alignment):
    """Guided where the passes beside the cache have one size; with ``prefix`` there is a program for each of their sizes."""
    layout, (net, params) = _layout(tiny, alignment)._replace(response_len=6), made
    texts = [TEXTS[0], ([4, 5, 6], [M] * 6)]
    options = _options(temperature=1.5, seed=4, cfg_scale=0.5 if cache == "dual" else 0.0)
    plain, _ = _filled(made, layout, options, texts)
    cached = dataclasses.replace(options, cache=cache)
    _same(plain, _filled((Refreshing(net.arch), params), layout, cached, texts)[0], ("response", "commit_step", "nfe"))
    stale, _ = _filled(made, layout, cached, texts)
    assert any((a.response != b.response).any() for a, b in zip(plain, stale, strict=True))
    for index in (0, 1):
        _same(_filled(made, layout, cached, texts[index : index + 1], first=index)[0], stale[index : index + 1])
    # After a block's first step, the block or all after it: from the position before, where that predicts.
    length, shift, passes = 7, alignment == "shifted", options.passes
    beside = [2 * (6 + shift), 0] if cache == "prefix" else [2 * 3, 0]
    assert stale[0].positions == passes * (2 * length + sum(beside)) and plain[0].positions == passes * 4 * length


def test_the_queue_fills_a_batch_of_texts_as_the_scan_does(tiny, made):
    layout, options = _layout(tiny), _options(**WAYS["low_confidence"])
    _same(_scanned(made, layout, options), _filled(made, layout, options)[0])


class SeesTheEnd(Fixed):
    """A network that sees the last visible token alone: ``table[token]`` are the logits of every position."""

    def hidden(self, params, view, row_keys=None):
        last = jnp.take_along_axis(view.ids, view.length[:, None] - 1, axis=1)
        return jnp.broadcast_to(params["table"][last], (*view.active.shape, 11))


SEES_THE_END = SeesTheEnd()


@pytest.mark.parametrize("rule", get_args(RuleName))
def test_every_rule_fills_the_spans_alone_and_guidance_hides_what_is_given(tiny, rule):
    """After token 2 the logits favour 1, after masks 1 even more: guidance of scale 1, which no rule sees, makes them favour 0."""
    table = np.full((11, 11), -30, np.float32)
    table[[2, M], 1], table[[2, M], 0] = [2.0, 4.0], [1.5, 1.0]
    texts, drawn = [([5], [M, M, M, M, 3, M, 2]), ([6, 6], [M, 2])], rule in ("random", "origin")
    for scale, token in ((0.0, 1), (1.0, 0))[: 2 if rule == "low_confidence" else 1]:
        options = _options(rule=rule, cfg_scale=scale, temperature=0.01 if drawn else 0.0, steps_per_block=2)
        rows = _scanned((SEES_THE_END, {"table": table}), _layout(tiny), options, texts)
        for row, (_, rest) in zip(rows, texts, strict=True):
            assert row.response.tolist() == [token if given == M else given for given in rest]
        assert rows[1].nfe >= options.passes


def test_a_window_would_hide_what_is_given(tiny, made):
    with pytest.raises(UserError, match="set canvas.suffix_window to null"):
        infilling_layout(CanvasConfig(suffix_window=8), decoding(None), made[0].arch, (7,))
