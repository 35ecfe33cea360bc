"""Decodes prompts with traces and writes them as an HTML page, for the verb ``decode``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from jaxblock.commands import say
from jaxblock.io.files import write_text

if TYPE_CHECKING:
    import numpy as np

    from jaxblock.model import Answer, Model
    from jaxblock.streaming import Trace


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


def traced_answers(
    models: Mapping[str, tuple[Model, list[np.ndarray]]], texts: Sequence[str], page: Page
) -> Iterator[Answer]:
    """Decodes prompts one at a time, yields the answers of the first model, and writes the page after the last one.

    Args:
        models: for each checkpoint's name, the model and the prompts' ids.
        texts: the prompts as they are shown.
        page: the page to write.
    """
    from jaxblock.reporting.trace import TracedModel, trace_page

    traces: dict[str, list[Trace]] = {name: [] for name in models}
    answers: dict[str, list[Answer]] = {name: [] for name in models}
    for at in range(len(texts)):
        for name, (model, ids) in models.items():
            traces[name].append(model.trace(ids[at].tolist(), index=at, candidates=page.candidates))
            answers[name].append(_answer(model, traces[name][-1]))
        yield next(iter(answers.values()))[-1]
    if not page.writes:
        return
    columns = [
        TracedModel(
            name,
            model.layout(model.decode_defaults),
            model.decode_defaults,
            model.tokenizer.piece,
            traces[name],
            [answer.text for answer in answers[name]],
        )
        for name, (model, _) in models.items()
        if model.tokenizer is not None  # it was needed to make the prompts' ids
    ]
    write_text(page.path, trace_page(texts, columns), overwrite=page.overwrite)
    say(f"wrote {page.path}")


def _answer(model: Model, trace: Trace) -> Answer:
    """Returns the answer of a trace, as ``Model.answers`` does."""
    from jaxblock.model import Answer

    assert model.tokenizer is not None
    ids = model.text_ids(trace.response)
    return Answer(model.tokenizer.decode(ids), ids, trace.nfe)
