"""Bounds the likelihood of texts that follow prompts: any number of them, in batches that are always full.

The work is cut into single masked sets of single blocks (``diffusion.likelihood.set_terms``). Short texts take few of them (a
text of one token takes one forward pass), and those of different texts share a batch.
"""

from __future__ import annotations

import functools
import itertools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax import Array
from jax.sharding import NamedSharding

from jaxblock.diffusion.canvas import Layout, decoding_canvas, widths_by_block
from jaxblock.diffusion.decoding.shapes import BatchShapes
from jaxblock.diffusion.likelihood import MaskedSets, count_sets, set_terms
from jaxblock.harness.bounds import Bound, Continuation
from jaxblock.model import Model
from jaxblock.models.transformer import Transformer
from jaxblock.parallel.rows import even_size, on_mesh_of, split_rows, whole_results
from jaxblock.types import Params

IN_FLIGHT = 2
"""The number of batches under way: the host reads the results of one while the device works on the next."""


class _Set(NamedTuple):
    """Says which masked set a place of a batch computes: of which continuation, and the numbers of ``MaskedSets``."""

    of: int
    block: int
    size: int
    number: int
    draws: int
    stream: int


def bound_all(
    model: Model, continuations: Sequence[Continuation], samples: int | None, progress: Callable[[int, int], None]
) -> list[Bound]:
    """Bounds the likelihood of continuations, ``decode.batch_size`` masked sets at a time.

    Args:
        model: the model; its canvas and its `decode` settings give the sizes of the canvas, the batch and the seed of the masks.
        continuations: the prompts with their responses.
        samples: the masked sets drawn per block, at least 2; None for B. Blocks that have no more sets than this are exact.
        progress: called after each batch with the number of sets that are done, and that of all sets.

    Returns:
        The bounds, in order.
    """
    layout, options = model.layout(model.options()), model.options()
    bounds = [_empty_bound(one, layout, samples or max(layout.block, 2)) for one in continuations]
    shapes = BatchShapes(layout, options.static(layout.block), model.canvas.prompt_len, model.arch.max_len)
    by_width: dict[int, list[tuple[int, int]]] = {}
    for at, (one, bound) in enumerate(zip(continuations, bounds, strict=True)):
        widths = widths_by_block(layout, shapes.room(len(one.prompt)))
        for block in range(len(bound.terms)):
            by_width.setdefault(widths[block], []).append((at, block))
    size = even_size(model.params, options.batch_size)
    running: deque[tuple[list[_Set], Array]] = deque()
    done, all_sets = 0, sum(len(terms) for bound in bounds for terms in bound.terms)

    def finish() -> None:
        nonlocal done
        sets, found = running.popleft()
        for value, one in zip(jax.device_get(found)[: len(sets)].tolist(), sets, strict=True):
            bounds[one.of].terms[one.block][one.number] = value
        done += len(sets)
        progress(done, all_sets)

    for width in sorted(by_width):  # in the same order in every process
        source = _sets(by_width[width], continuations, bounds, layout)
        while sets := list(itertools.islice(source, size)):
            running.append((sets, _start(model, layout, continuations, sets, size, width)))
            if len(running) == IN_FLIGHT:
                finish()
    while running:
        finish()
    return bounds


def _sets(
    blocks: Sequence[tuple[int, int]], continuations: Sequence[Continuation], bounds: Sequence[Bound], layout: Layout
) -> Iterator[_Set]:
    """Yields the masked sets of blocks, each given as (index of the continuation, number of the block)."""
    for at, block in blocks:
        size = min(layout.block, len(continuations[at].response) - block * layout.block)
        sets = len(bounds[at].terms[block])
        draws = 0 if bounds[at].exact[block] else sets
        yield from (_Set(at, block, size, n, draws, continuations[at].first_block + block) for n in range(sets))


def _empty_bound(one: Continuation, layout: Layout, samples: int) -> Bound:
    """Returns a bound whose terms are not computed yet."""
    sizes = [min(layout.block, len(one.response) - at) for at in range(0, len(one.response), layout.block)]
    counts = [count_sets(size, samples) for size in sizes]
    return Bound(
        [np.full(count.sets, np.nan) for count in counts], [count.exact for count in counts], len(one.response)
    )


def _start(
    model: Model, layout: Layout, continuations: Sequence[Continuation], sets: Sequence[_Set], size: int, width: int
) -> Array:
    """Starts to compute a batch of masked sets, on canvases of ``width`` positions; the places that are left repeat the first set."""
    ids = np.full((size, width), layout.mask_id, np.int32)
    numbers = np.empty((7, size), np.int32)
    for place in range(size):
        one = sets[place] if place < len(sets) else sets[0]
        text = continuations[one.of]
        shown = [*text.prompt, *text.response][:width]
        ids[place, : len(shown)] = shown
        numbers[:, place] = len(text.prompt), text.question, one.block, one.size, one.number, one.draws, one.stream
    seed = np.array(model.options().seed % 2**32, np.uint32).view(np.int32)
    with on_mesh_of(model.params):
        run = _compiled(whole_results(model.params))
        return run(model.net, layout, model.params, seed, *split_rows(model.params, (ids, *numbers)))


@functools.cache
def _compiled(results: NamedSharding | None) -> Callable[..., Array]:
    """Returns the compiled program, whose results go where ``results`` says."""
    return jax.jit(_terms, static_argnums=(0, 1), out_shardings=results)


def _terms(
    net: Transformer,
    layout: Layout,
    params: Params,
    seed: Array,
    ids: Array,
    prompt_len: Array,
    row_id: Array,
    *sets: Array,
) -> Array:
    """Computes one term for each row; ``sets`` are the fields of ``MaskedSets``."""
    canvas = decoding_canvas(layout, ids, prompt_len, row_id)
    return set_terms(net, layout, params, canvas, MaskedSets(*sets), jax.random.key(seed))
