"""What tests of the method share: a tiny network and the truth about it by plain enumeration; the decoder, and made-up networks.

The truth is built without the package's own canvas.
"""

import functools
import json
import math
from functools import partial
from pathlib import Path
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from scipy import stats

import jaxblock
from jaxblock.diffusion import canvas as canvases
from jaxblock.diffusion.canvas import Layout
from jaxblock.diffusion.decoding import decoder
from jaxblock.diffusion.decoding.config import DecodeConfig
from jaxblock.models.transformer import Transformer
from tests.models.networks import make_arch, random_params

VOCAB, EOT, FILL, MASK = 11, 7, 8, 9
P, R = 3, 9
PROMPTS = ([1, 2], [3, 4, 5])
TEXTS = {"aligned": ([1, 0, 6, 2, 2, 10, EOT], [5, 3, 1, EOT]), "paper": ([1, 0, 6, 2, 2, 10, 4, EOT], [5, 3, 1, EOT])}
MEASURED = ("low_confidence", "maskgit_plus", "topk_margin", "entropy")
QUESTIONS = [[1], [2, 3], [4, 5, 6], [0, 1]]
# Before the first span, and from there on: a span longer than a block, two spans within a block, no right side, a span at the end.
SPANS = [
    ([1], [MASK] * 4 + [2, 3]),
    ([2, 3], [MASK, 5, MASK, MASK, 0]),
    ([4, 5, 6], [MASK] * 9),
    ([0, 1], [MASK, MASK, 4, 4, 4, MASK]),
    ([6], [MASK] * 3 + [1] + [MASK] * 4),
]


@pytest.fixture
def x64():
    """Float64 inside the test."""
    with jax.enable_x64(True):
        yield


def make_net(dtype="float64", **changes):
    """A network whose predictions are far from uniform, and its parameters."""
    sizes = dict(vocab_size=VOCAB, d_model=8, n_heads=2, n_kv_heads=1, mlp_dim=12)
    arch = make_arch(**{**sizes, "mask_id": MASK, "eos_id": FILL, "pad_id": FILL, **changes})
    net = Transformer(arch, dtype=dtype)
    return net, jax.tree.map(lambda x: x.astype(dtype), random_params(net.param_table, 1, std=0.7))


# The keys and values of a single layer depend on their own token alone, so that its caches are exact.
ONE_LAYER, TWO_LAYERS = (make_net("float32", n_layers=layers) for layers in (1, 2))


def make_layout(context="aligned", alignment="same_position", block=3, response_len=R):
    return Layout(response_len, block, alignment, context, None, MASK, FILL, (EOT, FILL))


def padded(rows, width, pad=0):
    """The ids of rows, each padded to ``width``, and their lengths."""
    ids = [[*row, *[pad] * (width - len(row))] for row in rows]
    return np.array(ids, np.int32), np.array([len(row) for row in rows], np.int32)


_lay = jax.jit(canvases.from_rows, static_argnums=0)


def laid_out(layout, prompts, texts, room=P):
    """The canvas of prompts, for which there is ``room``, with their texts."""
    index = np.arange(len(prompts), dtype=np.int32)
    return jax.device_get(_lay(layout, *padded(prompts, room), *padded(texts, layout.response_len), index))


class Truth(NamedTuple):
    """What training is about, by enumeration: for every row, block and masked set (a bit mask).

    Attributes:
        rows: (prompt, text) of each row.
        n: supervised positions of each row's blocks.
        nll: [row, block, set, position], -log p of each masked token; NaN where there is no such set.
        grad: [row, block, set, parameter], the gradient of the sum over the set.
    """

    layout: Layout
    canvas: canvases.Canvas
    rows: list
    n: list
    nll: np.ndarray
    grad: np.ndarray

    def nelbo_weights(self):
        """1 / (l C(n, l)) of every set [row, block, set]: sum over l of E[c_S / l given |S| = l]."""
        weights = np.zeros(self.nll.shape[:3])
        for i, k, n in ((i, k, n) for i, sizes in enumerate(self.n) for k, n in enumerate(sizes)):
            for s in range(1, 2**n):
                weights[i, k, s] = 1 / (s.bit_count() * math.comb(n, s.bit_count()))
        return weights

    def nelbo(self):
        """NELBO of each block [row, block]."""
        return np.nansum(self.nelbo_weights()[..., None] * self.nll, axis=(2, 3))


def _picture(layout, prompt, text, block, masked):
    """(ids, visible length, supervised tokens of the block) as the design words it, by lists."""
    size = layout.block
    width = P + layout.response_len
    if layout.context == "aligned":
        whole = text + [FILL] * (-len(text) % size)
        visible = len(prompt) + layout.response_len
    else:
        whole, visible = list(text), width
    start = block * size
    targets = whole[start : start + size]
    shown = whole[:start] + [MASK if i in masked else token for i, token in enumerate(targets)]
    shown += [MASK] * (len(whole) - len(shown))
    ids = prompt + shown
    ids += [MASK if layout.context == "aligned" else FILL] * (visible - len(ids))
    return ids + [0] * (width - visible), visible, targets


def _summed(net, params, ids, length, read, targets, masked):
    """The sum of -log p over masked targets, and each of them, from logits of the whole row."""
    logits = net.all_logits(params, ids[None], jnp.arange(ids.shape[0])[None], length[None])[0]
    tokens = jnp.where(masked, -jax.nn.log_softmax(logits)[read, targets], 0.0)
    return tokens.sum(), tokens


@partial(jax.jit, static_argnums=0)
@partial(jax.vmap, in_axes=(None, None, 0, 0, 0, 0, 0))
def _gradients(net, params, *picture):
    (_, tokens), grad = jax.value_and_grad(_summed, argnums=1, has_aux=True)(net, params, *picture)
    return tokens, ravel_pytree(grad)[0]


def build_truth(net, params, layout, texts, most=64):
    """Enumerates every set of every block. ``most`` pads the number of pictures, so that compiled code is shared."""
    size, rows = layout.block, list(zip(PROMPTS, texts, strict=True))
    pictures, where, n = [], [], []
    for i, (prompt, text) in enumerate(rows):
        n.append([])
        for k in range(-(-len(text) // size)):
            for s in range(2**size):
                masked = {j for j in range(size) if s >> j & 1}
                ids, length, targets = _picture(layout, prompt, text, k, masked)
                if max(masked, default=0) >= len(targets):
                    continue
                at = len(prompt) + k * size + np.arange(size)
                read = np.clip(at - (layout.alignment == "shifted"), 0, len(ids) - 1)
                known = np.pad(targets, (0, size - len(targets)))
                pictures.append((ids, length, read, known, [j in masked for j in range(size)]))
                where.append((i, k, s))
            n[-1].append(len(targets))
    pictures += pictures[:1] * (most - len(pictures))
    found = _gradients(net, params, *(np.array(column) for column in zip(*pictures, strict=True)))

    def table(values):
        whole = np.full((len(rows), layout.n_blocks, 2**size, *values.shape[1:]), np.nan)
        whole[tuple(np.array(where).T)] = values[: len(where)]
        return whole

    return Truth(layout, laid_out(layout, PROMPTS, texts), rows, n, *map(table, jax.device_get(found)))


@pytest.fixture(scope="session")
def truths():
    """(net, params, {name: Truth with gradients}): K_i = 3 and 2, filled blocks (aligned) and short ones (paper)."""
    with jax.enable_x64(True):
        net, params = make_net()
        layouts = {name: make_layout(name) for name in ("aligned", "paper")}
        layouts["shifted"] = make_layout(alignment="shifted")
        return net, params, {name: build_truth(net, params, lay, TEXTS[lay.context]) for name, lay in layouts.items()}


def decoding(steps, **fields):
    """The decoder's settings, without early stop where ``fields`` do not ask for it."""
    return DecodeConfig(steps_per_block=steps, **{"early_stop": False, **fields})


decode_jit = jax.jit(decoder.decode_prompts, static_argnums=(0, 1, 2))


@partial(jax.jit, static_argnums=(0, 1, 2))
def _fill_jit(net, layout, options, params, seed, *texts):
    return decoder.decode(net, layout, options, params, canvases.decoding_canvas(layout, *texts), seed)


def decoded(net, layout, options, prompts=QUESTIONS, rests=None, room=P, first=0, seed=3):
    """Decodes prompts, or fills the masks of ``rests`` after them, by the scan over all blocks; ``net`` is (network, parameters)."""
    ids, lengths = padded(prompts, room)
    index = np.arange(first, first + len(prompts), dtype=np.int32)
    if rests is None:
        return jax.device_get(decode_jit(net[0], layout, options, net[1], seed, ids, lengths, index))
    texts = [[*prompt, *rest] for prompt, rest in zip(prompts, rests, strict=True)]
    whole, ends = padded(texts, room + layout.response_len, layout.mask_id)
    return jax.device_get(_fill_jit(net[0], layout, options, net[1], seed, whole, lengths, index, ends))


def assert_same(one, other, but=("computed",)):
    """Asserts that two batches of responses are equal but for the counts named."""
    chex.assert_trees_all_equal(*(found._replace(**dict.fromkeys(but)) for found in (one, other)))


class Fixed:
    """A network that sees the first token of the prompt alone: ``table[first token, response position]`` are its logits."""

    def unstacked(self, params):
        return params

    def hidden(self, params, view, row_keys=None):
        at = view.active - (view.length - params["table"].shape[1])[:, None]
        return params["table"][view.ids[:, :1], at]

    def logits(self, params, hidden):
        return hidden

    def nll(self, params, hidden, targets):
        raise AssertionError("a decoder knows no targets")


FIXED = Fixed()


def chi_square(seen, chance):
    """Chi-square of counts over its 0.001 quantile: above 1 is a rejection."""
    seen, expected = np.asarray(seen, float), np.asarray(chance) * np.sum(seen)
    there = expected > 0
    if seen[~there].any():  # it cannot be
        return np.inf
    return ((seen - expected)[there] ** 2 / expected[there]).sum() / stats.chi2.isf(0.001, max(there.sum() - 1, 1))


GOLDEN = Path(__file__).resolve().parents[3] / "shared" / "golden"


@pytest.fixture(scope="session")
def golden_model(shared):
    """A function that loads the model of a name."""
    return functools.cache(lambda name: jaxblock.load(GOLDEN / "forward" / name))


def golden_json(name):
    """What a file holds; nothing where there is no reference data."""
    file = GOLDEN / name
    return json.loads(file.read_text()) if file.exists() else {}


def golden_arrays(name):
    with np.load(GOLDEN / name) as arrays:
        return dict(arrays)
