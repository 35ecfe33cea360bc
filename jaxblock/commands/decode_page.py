"""Decodes prompts with traces and writes them as an HTML page, for the verb ``decode``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from jaxblock.commands import say
from jaxblock.data.text.marked import SpannedText
from jaxblock.io.files import write_text

if TYPE_CHECKING:
    import numpy as np

    from jaxblock.model import Answer, Model
    from jaxblock.model.infilled import Infilled
    from jaxblock.streaming import Trace

    Given = np.ndarray | SpannedText


class Page(NamedTuple):
    """Says what page is written.

    Attributes:
        path: the HTML file.
        candidates: how many candidates it shows for each token.
        overwrite: whether an existing file is replaced.
        writes: whether this process writes it; every process of a group decodes.
    """

    path: str
    candidates: int
    overwrite: bool
    writes: bool


def traced_results(
    models: Mapping[str, tuple[Model, Sequence[Given]]], texts: Sequence[str], page: Page
) -> Iterator[Answer | Infilled]:
    """Decodes prompts or fills texts one at a time, yields the results of the first model, and writes the page after the last one.

    Args:
        models: for each checkpoint's name, the model and the prompts' ids, or the texts with spans.
        texts: the prompts as they are shown.
        page: the page to write.
    """
    from jaxblock.reporting.trace import TracedModel, trace_page

    traces: dict[str, list[Trace]] = {name: [] for name in models}
    results: dict[str, list[Answer | Infilled]] = {name: [] for name in models}
    for at in range(len(texts)):
        for name, (model, given) in models.items():
            trace, result = _traced(model, given[at], at, page.candidates)
            traces[name].append(trace)
            results[name].append(result)
        yield next(iter(results.values()))[-1]
    if not page.writes:
        return
    columns = [
        TracedModel(
            name,
            model.layout(model.decode_defaults, infill=isinstance(given[0], SpannedText)),
            model.decode_defaults,
            model.tokenizer.piece,
            traces[name],
            [result.text for result in results[name]],
        )
        for name, (model, given) in models.items()
        if model.tokenizer is not None  # it was needed to make the prompts' ids
    ]
    write_text(page.path, trace_page(texts, columns), overwrite=page.overwrite)
    say(f"wrote {page.path}")


def _traced(model: Model, given: Given, index: int, candidates: int) -> tuple[Trace, Answer | Infilled]:
    """Decodes one prompt, or fills one text, and returns its trace and what ``Model.answers`` or ``Model.fillings`` gives."""
    from jaxblock.model import Answer
    from jaxblock.model.infilled import infilled

    assert model.tokenizer is not None
    if isinstance(given, SpannedText):
        trace = model.trace_infill(given, index=index, candidates=candidates)
        return trace, infilled(model.tokenizer, model.layout(model.decode_defaults, infill=True), given, trace)
    trace = model.trace(given.tolist(), index=index, candidates=candidates)
    ids = model.text_ids(trace.response)
    return trace, Answer(model.tokenizer.decode(ids), ids, trace.nfe)
