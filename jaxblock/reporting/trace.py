"""Draws traces of decodes as one HTML page that plays them: ``assets/trace.js`` does the playing."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from jaxblock.diffusion.canvas import Layout
from jaxblock.diffusion.decoding.config import DecodeConfig
from jaxblock.diffusion.decoding.decoder import GIVEN
from jaxblock.reporting.describe import Piece, boxes, visible_text
from jaxblock.reporting.page import html_document
from jaxblock.streaming import Trace

_CONTROLS = """
<div class="bar" role="group" aria-label="Player">
<span class="prompts"><button id="before" type="button" aria-label="Prompt before">‹</button>
<select id="prompt" aria-label="Prompt"></select>
<button id="next" type="button" aria-label="Next prompt">›</button></span>
<button id="play" type="button" aria-pressed="false">Play</button>
<input id="step" type="range" min="0" value="0" step="1" aria-label="Decode step">
<output id="at" for="step"></output>
<label>Speed <select id="speed"><option value="1">1 step/s</option><option value="4" selected>4 steps/s</option>
<option value="12">12 steps/s</option></select></label>
<label>Colour <select id="colour"><option value="probability">by probability</option><option value="step">by step</option>
</select></label>
</div>
<div class="legend"><span><span id="low">0%</span> <span class="ramp" aria-hidden="true"></span>
<span id="high">100%: probability of the token</span></span>
<span><span class="t fresh">x</span> committed in this step</span><span><span class="t mask">░░</span> mask</span>
<span><span class="t given">x</span> given, in a text whose spans are filled</span>
<span><span class="t never">·</span> never decoded</span></div>
<p>Keys: <kbd>←</kbd> <kbd>→</kbd> step, <kbd>Home</kbd> <kbd>End</kbd> first and last, <kbd>Space</kbd> play,
<kbd>n</kbd> <kbd>p</kbd> next prompt and the one before, <kbd>c</kbd> colour; <kbd>Tab</kbd> to a response, then arrows for its
tokens. Point at a token for the candidates of the step that committed it: probabilities are those of the network's own softmax,
before temperature, filters and suppression.</p>
"""


class TracedModel(NamedTuple):
    """Holds a checkpoint's traces, and what is needed to show them.

    Attributes:
        name: the checkpoint's name.
        layout: the layout of its canvas.
        options: the decoder's settings.
        piece: returns the text of a token id.
        traces: a trace for each prompt.
        answers: the text of each response.
    """

    name: str
    layout: Layout
    options: DecodeConfig
    piece: Piece
    traces: Sequence[Trace]
    answers: Sequence[str]


def trace_page(
    prompts: Sequence[str], models: Sequence[TracedModel], *, title: str = "How the canvas was filled"
) -> str:
    """Draws traces as a page: a slider over the steps, and for each token the candidates when it was committed.

    Args:
        prompts: the prompts as plain text.
        models: one or several checkpoints, shown side by side, each with a trace for every prompt.
        title: the heading of the page.

    Returns:
        A whole HTML document that needs no network; all text in it is escaped.
    """
    data = {
        "columns": [_column(model) for model in models],
        "prompts": [
            {"text": text, "traces": [_trace(model, at) for model in models]} for at, text in enumerate(prompts)
        ],
    }
    body = (
        f'<header class="top"><h1>{escape(title)}</h1><button id="theme" type="button">Colours</button></header>'
        f'{_CONTROLS}<section><h2>Prompt</h2><pre id="question"></pre></section><main id="columns"></main>'
        '<noscript><p class="bad">This page plays its traces with a script: allow scripts to see them.</p></noscript>'
    )
    styles, scripts = ["controls.css", "trace.css"], ["theme.js", "tip.js", "trace.js"]
    return html_document(title, body, styles=styles, scripts=scripts, data=data)


def settings_line(layout: Layout, options: DecodeConfig) -> str:
    """Describes in a line how a response was decoded: the rule, the blocks, and every setting that is not the default."""
    plain, hidden = DecodeConfig(), {"rule", "response_len", "block", "stop_ids", "fill_id", "batch_size"}
    changed = [
        f"{field.name} {getattr(options, field.name)}"
        for field in dataclasses.fields(options)
        if field.name not in hidden and getattr(options, field.name) != getattr(plain, field.name)
    ]
    blocks = f"{layout.response_len} positions in blocks of {layout.block}"
    return ", ".join([f"rule {options.rule}", blocks, *changed])


def _column(model: TracedModel) -> dict[str, Any]:
    """Returns what the page's script knows of a checkpoint; the text of each token that occurs stands in it once."""
    ids = [part for trace in model.traces for part in (trace.response, trace.beliefs.ids)]
    used = sorted({int(token) for part in ids for token in np.unique(part)})
    return {
        "name": model.name,
        "settings": settings_line(model.layout, model.options),
        "block": model.layout.block,
        "passes": model.options.passes,
        "mask": model.layout.mask_id,
        "stops": [] if model.layout.infill else list(model.layout.stop_ids),  # a text's end is given
        "pieces": _pieces(model, used),
    }


def _pieces(model: TracedModel, ids: Sequence[int]) -> Mapping[int, str]:
    """Returns the text of each token; ids past the tokenizer's own, which embeddings may have rows for, have none."""
    texts = {}
    for token in ids:
        try:
            texts[token] = visible_text(model.piece(token))
        except IndexError:
            continue
    return texts


def _trace(model: TracedModel, at: int) -> dict[str, Any]:
    """Returns what the page's script knows of the trace of a prompt; probabilities have six decimals."""
    trace = model.traces[at]
    beliefs = trace.beliefs
    return {
        "text": model.answers[at],
        "boxes": boxes((trace.commit_step == GIVEN).tolist(), model.layout.block),
        "steps": trace.steps,
        "ids": trace.response.tolist(),
        "step": trace.commit_step.tolist(),
        "probability": _decimals(beliefs.probability),
        "candidates": beliefs.ids.tolist(),
        "shares": _decimals(beliefs.probabilities),
    }


def _decimals(values: ArrayLike) -> Any:
    return np.nan_to_num(np.asarray(values, np.float64)).round(6).tolist()
