"""A tiny network in float64, and the truth about it by plain enumeration: built without the package's own canvas."""

import json
import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from jaxblock.diffusion import canvas as canvases
from jaxblock.diffusion.canvas import Layout
from jaxblock.models.families import registry
from jaxblock.models.spec import nest
from jaxblock.models.transformer import Transformer
from tests.models.networks import make_arch, random_params

VOCAB, EOT, FILL, MASK = 11, 7, 8, 9
P, R = 3, 9
PROMPTS = ([1, 2], [3, 4, 5])


@pytest.fixture
def x64():
    """Float64 inside the test."""
    with jax.enable_x64(True):
        yield


def make_net(dtype="float64", **changes):
    """A network whose predictions are far from uniform."""
    sizes = dict(vocab_size=VOCAB, d_model=8, n_heads=2, n_kv_heads=1, mlp_dim=12)
    arch = make_arch(**{**sizes, "mask_id": MASK, "eos_id": FILL, "pad_id": FILL, **changes})
    net = Transformer(arch, dtype=dtype)
    return net, jax.tree.map(lambda x: x.astype(dtype), random_params(net.param_table, 1, std=0.7))


def make_layout(context="aligned", alignment="same_position", block=3, response_len=R):
    return Layout(response_len, block, alignment, context, None, MASK, FILL, (EOT, FILL))


@pytest.fixture(scope="session")
def tiny():
    """(make_net, make_layout): the tiny network and its layouts."""
    return make_net, make_layout


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


_lay = jax.jit(canvases.from_rows, static_argnums=0)


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
                padded = np.pad(targets, (0, size - len(targets)))
                pictures.append((ids, length, read, padded, [j in masked for j in range(size)]))
                where.append((i, k, s))
            n[-1].append(len(targets))
    pictures += pictures[:1] * (most - len(pictures))
    batch = [np.array(column) for column in zip(*pictures, strict=True)]
    nll, grad = _gradients(net, params, *batch)
    entries = tuple(np.array(where).T)
    shape = (len(rows), layout.n_blocks, 2**size)

    def table(values):
        values = np.asarray(values)[: len(where)]
        whole = np.full(shape + values.shape[1:], np.nan)
        whole[entries] = values
        return whole

    arrays = [np.array([x + [0] * (m - len(x)) for x in xs], np.int32) for xs, m in ((PROMPTS, P), (texts, R))]
    lengths = [np.array([len(x) for x in xs], np.int32) for xs in (PROMPTS, texts)]
    index = np.arange(len(rows), dtype=np.int32)
    canvas = jax.device_get(_lay(layout, arrays[0], lengths[0], arrays[1], lengths[1], index))
    return Truth(layout, canvas, rows, n, table(nll), table(grad))


TEXTS = {"aligned": ([1, 0, 6, 2, 2, 10, EOT], [5, 3, 1, EOT]), "paper": ([1, 0, 6, 2, 2, 10, 4, EOT], [5, 3, 1, EOT])}


@pytest.fixture(scope="session")
def truths():
    """(net, params, {name: Truth with gradients}): K_i = 3 and 2, filled blocks (aligned) and short ones (paper).

    The last is about a network whose attention does nothing, so that the order of commits cannot matter.
    """
    with jax.enable_x64(True):
        net, params = make_net()
        layouts = {name: make_layout(name) for name in ("aligned", "paper")}
        layouts["shifted"] = make_layout(alignment="shifted")
        made = {name: build_truth(net, params, lay, TEXTS[lay.context]) for name, lay in layouts.items()}
        order_free = params | {"blocks": params["blocks"] | {"o": 0 * params["blocks"]["o"]}}
        made["order_free"] = build_truth(net, order_free, layouts["aligned"], TEXTS["aligned"])
        return net, params, made


@pytest.fixture(scope="session")
def golden_model(shared):
    """A function: name -> (net, params) of golden/forward/<name>, read without the package's own loader."""
    from safetensors.numpy import load_file

    made = {}

    def load(name):
        if name not in made:
            folder = shared / "golden" / "forward" / name
            arch = registry.from_hf(json.loads((folder / "config.json").read_text()), str(folder))
            tensors = load_file(folder / "model.safetensors")
            net, flat = Transformer(arch), {}
            for path, spec in net.param_table.items():
                names = [spec.hf_name.format(layer=i) for i in range(arch.n_layers if spec.stacked else 1)]
                stack = [tensors[x].T if spec.transpose else tensors[x] for x in names]
                flat[path] = np.stack(stack) if spec.stacked else stack[0]
            made[name] = net, nest(flat)
        return made[name]

    return load
