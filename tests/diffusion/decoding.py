"""What tests of the decoder share: the compiled decoder, its settings, and a network that knows nothing."""

import jax
import numpy as np

from jaxblock.diffusion.decoding import decoder
from jaxblock.diffusion.decoding.config import DecodeConfig

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

    def hidden(self, params, view, row_keys=None):
        at = view.active - (view.length - params["table"].shape[1])[:, None]
        return params["table"][view.ids[:, :1], at]

    def logits(self, params, hidden):
        return hidden

    def nll(self, params, hidden, targets):
        raise AssertionError("a decoder knows no targets")


FIXED = Fixed()
