"""What tests of the decoder share: the compiled decoder, its settings, and networks that know nothing or tell what they see."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from jaxblock.diffusion.decoding import decoder
from jaxblock.diffusion.decoding.config import DecodeConfig
from jaxblock.models.transformer import Transformer
from jaxblock.types import KeysValues, View

decode_jit = jax.jit(decoder.decode_prompts, static_argnums=(0, 1, 2))


def decoding(steps, **fields):
    """Returns the decoder's settings, without early stop where ``fields`` do not ask for it."""
    return DecodeConfig(steps_per_block=steps, **{"early_stop": False, **fields})


def padded(prompts, width=4):
    """Returns the ids, lengths and indices of prompts, for a canvas of prompts of ``width`` at most."""
    ids = np.array([p + [0] * (width - len(p)) for p in prompts], np.int32)
    return ids, np.array([len(p) for p in prompts], np.int32), np.arange(len(prompts), dtype=np.int32)


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


class Blind(Fixed):
    """A network that sees the first token of the prompt alone, and whose cache is that token: ``table[token]`` are its logits."""

    def hidden(self, params, view, row_keys=None):
        return jnp.broadcast_to(params["table"][view.ids[:, :1]], (*view.at.shape, params["table"].shape[-1]))

    def refresh(self, params, view):
        kept = view.ids.astype("float32")[None, :, :, None, None]
        return self.hidden(params, view), KeysValues(kept, kept)

    def update(self, params, part, cache):
        return self.hidden(params, part._replace(ids=cache.k[0, :, :, 0, 0].astype("int32")))


BLIND = Blind()


class Recorder(Fixed):
    """A network of random logits that writes down every view it is fed, inside the jitted decoder."""

    def __init__(self):
        self.views = []

    def hidden(self, params, view, row_keys=None):
        jax.debug.callback(lambda *fields: self.views.append(type(view)(*map(np.asarray, fields))), *view, ordered=True)
        noise = jnp.sin(params["scale"] * (1.0 + view.ids[:, :, None] * jnp.arange(1, 6)))
        return jnp.take_along_axis(noise.cumsum(1), view.at[..., None], axis=1)

    def logits(self, params, hidden):
        return hidden @ params["head"]


RECORDED = {"scale": np.float32(3.7), "head": np.random.default_rng(0).normal(size=(5, 11)).astype(np.float32)}
"""The parameters of a ``Recorder`` with 11 tokens."""


@dataclass(frozen=True)
class Refreshing(Transformer):
    """A network whose cache is the view: it computes the whole canvas at every step."""

    def refresh(self, params, view):
        kept = view.ids.astype("float32")[None, :, :, None, None]
        return self.hidden(params, view), KeysValues(kept, kept)

    def update(self, params, part, cache):
        old = cache.k[0, :, :, 0, 0].astype("int32")
        at = np.arange(old.shape[1]) - part.first[:, None]
        here = jnp.clip(at, 0, part.ids.shape[1] - 1)
        ids = jnp.where(at == here, jnp.take_along_axis(part.ids, here, axis=1), old)
        positions, reads = jnp.broadcast_to(np.arange(old.shape[1]), old.shape), part.first[:, None] + part.at
        return self.hidden(params, View(ids, positions, part.length, reads, reads, reads >= 0))
