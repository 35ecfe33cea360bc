"""Masked prompt tokens: every pattern of them is shown as its uniforms say, and nothing else of a step changes."""

import itertools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxblock.diffusion import canvas as canvases
from jaxblock.diffusion import sampling
from jaxblock.diffusion.config import MethodConfig
from jaxblock.diffusion.corruption import corrupt
from tests.diffusion.conftest import EOT, MASK, P, R, make_layout

PATTERNS = np.array(list(itertools.product((False, True), repeat=P)))


@pytest.mark.parametrize(
    "context, method",
    [
        ("aligned", MethodConfig(draws=2, prompt_mask_rate=0.3)),
        ("aligned", MethodConfig(draws=2, prompt_mask_rate=0.3, blocks="pairs", prefix_mask_rate=0.5)),
        ("aligned", MethodConfig(draws=2, prompt_mask_rate=0.3, objective="classical")),
        ("paper", MethodConfig(draws=2, prompt_mask_rate=0.3, suffix_mask_prob=0.5)),
    ],
    ids=["blockwise", "pairs", "classical", "paper"],
)
def test_every_pattern_of_masked_prompt_tokens_is_shown_and_nothing_else_changes(context, method):
    layout = make_layout(context, block=R if method.objective == "classical" else 3)
    texts = [[*range(1, 6), EOT], [6, 5, EOT]]
    ids = (
        np.array([text + [0] * (n - len(text)) for text in rows], np.int32)
        for rows, n in (([[1, 2], [3, 4, 5]], P), (texts, R))
    )
    prompts, responses = ids
    rows = prompts, np.array([2, 3], np.int32), responses, np.array([6, 3], np.int32), np.arange(2, dtype=np.int32)
    plain = replace(method, prompt_mask_rate=0.0)

    @jax.jit
    def shown(seed):
        canvas, block = canvases.from_rows(layout, *map(jnp.asarray, rows)), jnp.array([1, 0]) if method.pairs else None
        uniforms, without = (sampling.draw_uniforms(how, layout, jax.random.key(seed), 2, P) for how in (method, plain))
        draws, noise = sampling.draw(method, layout, canvas, uniforms, block), jnp.moveaxis(uniforms.noise, 1, 0)
        clean = jax.vmap(lambda one, u: corrupt(layout, canvas, one, plain, u[:, :R]))(draws, noise)

        def of_pattern(pattern):
            number = jnp.where(pattern, np.nextafter(np.float32(0.3), np.float32(0)), np.float32(0.3))
            given = noise.at[:, :, R:].set(number)
            return jax.vmap(lambda one, u: corrupt(layout, canvas, one, method, u))(draws, given)

        drawn = jax.vmap(lambda one, u: corrupt(layout, canvas, one, method, u)[0].ids)(draws, noise)
        return uniforms, without, clean, jax.vmap(of_pattern)(PATTERNS), drawn

    uniforms, without, (clean, targets), (seen, same_targets), drawn = jax.device_get(shown(7))
    # What was drawn without the field stays bit for bit what it was, and each draw of each row has numbers of its own.
    assert uniforms.noise.shape == (2, 2, R + P) and len(np.unique(uniforms.noise[..., R:])) == 2 * 2 * P
    if plain.needs_noise:
        np.testing.assert_array_equal(uniforms.noise[..., :R], without.noise)
    for before, after in zip(without[:4], uniforms[:4], strict=True):
        np.testing.assert_array_equal(before, after)

    in_prompt = np.arange(P + R) < rows[1][:, None]  # [B, T]
    masked = np.zeros((len(PATTERNS), 1, 1, P + R), bool)
    masked[..., :P] = PATTERNS[:, None, None]
    np.testing.assert_array_equal(seen.ids, np.where(masked & in_prompt, MASK, clean.ids))
    np.testing.assert_array_equal(same_targets, np.broadcast_to(targets, same_targets.shape))
    for name in ("positions", "length", "active", "at", "valid"):
        field = getattr(seen, name)
        np.testing.assert_array_equal(field, np.broadcast_to(getattr(clean, name), field.shape))
    hit = np.pad(np.moveaxis(uniforms.noise[..., R:], 1, 0) < np.float32(0.3), ((0, 0), (0, 0), (0, R)))
    np.testing.assert_array_equal(drawn, np.where(hit & in_prompt, MASK, clean.ids))
