"""Generates answers in batches that never wait, each until a text or its greatest length ends it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from jaxblock.data.tokens.special import first_stop
from jaxblock.diffusion.canvas import Layout
from jaxblock.diffusion.decoding.config import DecodeConfig
from jaxblock.diffusion.decoding.queue import Queue, Row
from jaxblock.harness.gen_kwargs import Generation
from jaxblock.inference import DeviceDecoder
from jaxblock.model import Model


class Generated(NamedTuple):
    """Holds an answer.

    Attributes:
        text: its text, up to the first text that ends it.
        tokens: the tokens decoded: the terminator is counted, what was cut off as well.
        nfe: the forward passes spent.
        ended: what ended it: a stop token, a text of ``until``, or its greatest length.
    """

    text: str
    tokens: int
    nfe: int
    ended: str


class _Ending:
    """Decodes blocks as ``DeviceDecoder`` does, and ends a row as soon as it holds enough."""

    def __init__(self, device: DeviceDecoder, enough: Callable[[Row], bool]) -> None:
        self.size, self.shape, self.start = device.size, device.shape, device.start
        self._device, self._enough = device, enough

    def finish(self, started: Any, rows: Sequence[Row]) -> None:
        """Waits for the results of a batch, updates its rows, and ends those that hold enough."""
        self._device.finish(started, rows)
        for row in rows:
            row.ended = row.ended or self._enough(row)


class Prompt(NamedTuple):
    """Holds a prompt to be answered: its tokens, the number that its random key comes from, and how it is answered."""

    ids: Sequence[int]
    number: int
    how: Generation


def _decoded_tokens(row: Row) -> int:
    """Returns how many tokens of a row's response are decoded; they are its first ones."""
    return int(np.count_nonzero(row.commit_step >= 0))


@dataclass(frozen=True)
class _Answers:
    """Reads the answers out of the rows of prompts that are decoded together.

    Attributes:
        model: the model.
        prompts: the prompts, in the order of the rows.
        layout: the layout of the decoder's canvas.
    """

    model: Model
    prompts: Sequence[Prompt]
    layout: Layout

    def read(self, row: Row) -> Generated:
        """Returns the answer that a row holds, as far as it is decoded."""
        tokenizer, how = self.model.tokenizer, self.prompts[row.place].how
        assert tokenizer is not None
        ids = row.response[: min(_decoded_tokens(row), how.most)].tolist()
        # The texts of special tokens are not in an answer's text.
        special = (tokenizer.id_of(text) for text in how.until if text in tokenizer.special_texts)
        end = first_stop(ids, {*self.layout.stop_ids, *(i for i in special if i is not None)})
        text = tokenizer.decode(ids[:end])
        cut = min((at for at in map(text.find, how.until) if at >= 0), default=None)
        ended = "until" if cut is not None else "length" if end is None else "stop token"
        return Generated(text[:cut], len(ids) if end is None else end + 1, row.nfe, ended)

    def enough(self, row: Row) -> bool:
        """Tells whether a row needs no more blocks, although it has no stop token."""
        how = self.prompts[row.place].how
        return _decoded_tokens(row) >= how.most or (bool(how.until) and self.read(row).ended != "length")


def generate_all(model: Model, prompts: Sequence[Prompt], progress: Callable[[int, int], None]) -> list[Generated]:
    """Answers prompts in batches that never wait; an answer leaves its batch when a text ends it, or at its greatest length.

    Args:
        model: the model, which has a tokenizer.
        prompts: the prompts.
        progress: called with the number of answers that are done, each time as many as a batch holds are, and that of all.

    Returns:
        The answers, in order.
    """
    found: dict[int, Generated] = {}
    for options in dict.fromkeys(prompt.how.options for prompt in prompts):
        places = [at for at, prompt in enumerate(prompts) if prompt.how.options == options]
        answers = _Answers(model, [prompts[at] for at in places], model.layout(options))
        for at, row in zip(places, _decoded(model, options, answers.prompts, answers.enough), strict=True):
            found[at] = answers.read(row)
            if len(found) % options.batch_size == 0 or len(found) == len(prompts):
                progress(len(found), len(prompts))
    return [found[at] for at in range(len(prompts))]


def first_tokens(model: Model, prompts: Sequence[Prompt]) -> list[list[int]]:
    """Decodes the first ``most`` tokens of the answers to prompts, of which only the blocks that hold them are decoded.

    All prompts have the decoder's settings of the first one.
    """

    def enough(row: Row) -> bool:
        return _decoded_tokens(row) >= prompts[row.place].how.most

    rows = _decoded(model, prompts[0].how.options, prompts, enough)
    return [row.response[: prompt.how.most].tolist() for prompt, row in zip(prompts, rows, strict=True)]


def _decoded(
    model: Model, options: DecodeConfig, prompts: Sequence[Prompt], enough: Callable[[Row], bool]
) -> Iterator[Row]:
    """Decodes prompts and yields their rows in order; ``enough`` tells whether a row needs no more blocks."""
    device = DeviceDecoder(
        model.net,
        model.layout(options),
        options,
        model.params,
        prompt_len=model.canvas.prompt_len,
        rows=len(prompts),
    )
    rows = (device.row(np.asarray(prompt.ids), prompt.number) for prompt in prompts)
    return iter(Queue(rows, _Ending(device, enough)))
