"""Whatever training shows the network under ``aligned``, a decoder can arrive at, position for position.

The decoder here is NumPy, written from the published algorithm, one row at a time, with the transfer rule's and the
sampler's dice replaced by a script. Every state that it passes through is logged. It knows nothing of ``canvas.view``.
"""

import itertools
from dataclasses import replace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxblock.diffusion import sampling
from jaxblock.diffusion.config import MethodConfig
from jaxblock.diffusion.corruption import CLEAN, corrupt
from jaxblock.diffusion.decoding import decoder
from tests.diffusion.conftest import EOT, MASK, SPANS, VOCAB, Fixed, P, R, decoded, decoding, laid_out, make_layout

SHIFTED = make_layout(alignment="shifted")


def replay(prompt, rest, layout, script):
    """LLaDA's generate with the random rule at one token a step, for one row whose masks after the prompt are decoded.

    Args:
        prompt: its tokens.
        rest: what follows it: masks, and in infilling given tokens, before which a block ends.
        layout: B, alignment and the mask id.
        script: (response position, token) in the order in which they are committed; may end anywhere.

    Returns:
        The state before each commit, and the one after the last: what the network is fed (ids, positions), what may be
        committed next, and which logits that reads. None where the script asks for what no dice can give.
    """
    x = np.array([*prompt, *rest])
    logits_index = np.arange(len(x))  # stands for the logits: row i of them
    if layout.alignment == "shifted":
        logits_index = np.concatenate([logits_index[:1], logits_index[:-1]])
    script, states = list(script), []
    while (masks := np.flatnonzero(x == layout.mask_id)).size:
        block = [i for n, i in enumerate(masks[: layout.block].tolist()) if i == masks[0] + n]
        while candidates := [i for i in block if x[i] == layout.mask_id]:
            states.append((x.tolist(), list(range(len(x))), candidates, logits_index[block].tolist()))
            if not script:
                return states
            at, token = script.pop(0)
            # Random confidence may rank any open position first; Gumbel noise may pick any token but the mask.
            if at + len(prompt) not in candidates or token == layout.mask_id or not 0 <= token < VOCAB:
                return None
            x[at + len(prompt)] = token
    return states


def reachable(prompt, layout, seen, masked):
    """Whether a decoder passes through what ``seen`` (one row of a view) shows, with ``masked`` open.

    The script is read off the row itself: what it shows of earlier blocks, then the unmasked part of its block.
    """
    response = seen.ids[len(prompt) : len(prompt) + layout.response_len]
    script = [(i, int(response[i])) for i in range(int(seen.active[0]) - len(prompt))]
    script += [(int(i) - len(prompt), int(seen.ids[i])) for i in seen.active[~np.asarray(masked)]]
    states = replay(prompt, [layout.mask_id] * layout.response_len, layout, script)
    shown = seen.ids[: seen.length], seen.positions[: seen.length], seen.active[masked], seen.at
    # The state with no position open is the next block's: training never has it (an empty set has no loss).
    possible = states is not None and states[-1] == tuple(field.tolist() for field in shown)
    return possible and bool(seen.valid.all()) and any(masked)


def verdicts(layout, method=CLEAN, spoil=lambda views: views):
    """``reachable`` of every masked set of every block of texts of every length, after prompts of several lengths."""
    sets = np.array(list(itertools.product((False, True), repeat=layout.block)))[1:]
    prompts = [[5, 6, 1][: 1 + n % P] for n in range(len(sets))]

    @jax.jit
    def shown(block, canvas):
        draw = sampling.Draw(jnp.full(len(sets), block), jnp.asarray(sets), jnp.ones(len(sets)))
        return corrupt(layout, canvas, draw, method, jnp.full((len(sets), layout.response_len), 0.5))[0]

    for length in range(1, layout.response_len + 1):
        canvas = laid_out(layout, prompts, [[*(n % 7 for n in range(length - 1)), EOT]] * len(sets))
        for block in range(-(-length // layout.block)):
            views = spoil(jax.device_get(shown(np.int32(block), canvas)))
            for row, (prompt, masked) in enumerate(zip(prompts, sets, strict=True)):
                yield reachable(prompt, layout, jax.tree.map(lambda leaf, row=row: leaf[row], views), masked)


@pytest.mark.parametrize("alignment, block", [("same_position", 1), ("same_position", 3), ("shifted", 4)])
def test_every_masked_set_of_every_block_is_reached(alignment, block):
    assert all(verdicts(make_layout(alignment=alignment, block=block, response_len=12)))


BROKEN = {
    "true suffix visible": dict(method=MethodConfig(suffix_mask_prob=0.0)),
    "noisy prefix": dict(method=MethodConfig(prefix_mask_rate=1.0)),
    "paper context": dict(layout=make_layout("paper")),
    "suffix too long": dict(spoil=lambda v: v._replace(length=v.length + 1)),
    "suffix too short": dict(spoil=lambda v: v._replace(length=v.length - 1)),
    "shift in one place only": dict(layout=SHIFTED, spoil=lambda v: v._replace(at=v.active)),
    "positions counted from the response": dict(spoil=lambda v: v._replace(positions=v.positions + 1)),
}


@pytest.mark.parametrize("name", BROKEN)
def test_the_replay_refuses_what_no_decoder_shows(name):
    assert not all(verdicts(**{"layout": make_layout()} | BROKEN[name]))


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


RECORDED = {"scale": np.float32(3.7), "head": np.random.default_rng(0).normal(size=(5, VOCAB)).astype(np.float32)}


@pytest.mark.parametrize("alignment", ["same_position", "shifted"])
@pytest.mark.parametrize("infill", [False, True], ids=["prompts", "spans"])
def test_every_view_and_commit_of_the_decoder_is_the_replays(infill, alignment):
    """Views recorded inside the jitted decoder, and responses rebuilt from ``commit_step``, against the replay's log."""
    layout, net, orders = make_layout(alignment=alignment)._replace(infill=infill), Recorder(), set()
    options = decoding(None, rule="random", temperature=1.0)
    for index, (prompt, spans) in enumerate(SPANS):
        rest = spans if infill else [MASK] * R
        net.views.clear()
        found = decoded((net, RECORDED), layout, options, [prompt], [rest] if infill else None, first=index)
        jax.effects_barrier()
        rebuilt = decoder.responses_by_step(layout, found, R)[:, 0, : len(rest)]
        response, steps, nfe, positions, computed = (leaf[0] for leaf in found)
        masks, length = np.flatnonzero(np.array(rest) == MASK), len(prompt) + len(rest)
        order = masks[np.argsort(steps[masks])]
        orders.add(tuple(order.tolist()))
        states = replay(prompt, rest, layout, [(at, response[at]) for at in order.tolist()])
        for step, ((ids, at, may, reads), seen) in enumerate(zip(states, net.views, strict=True)):
            seen = jax.tree.map(lambda leaf: leaf[0], seen)
            assert seen.length == length and seen.ids[:length].tolist() == ids
            assert seen.positions[:length].tolist() == at and seen.at[seen.valid].tolist() == reads
            assert order[step] + len(prompt) in may and set(may) <= set(seen.active[seen.valid].tolist())
            assert rebuilt[step].tolist() == ids[len(prompt) :]
        given = np.delete(np.arange(len(rest)), masks)
        assert (steps[given] == decoder.GIVEN).all() and (response[given] == np.array(rest)[given]).all()
        assert rebuilt[-1].tolist() == response[: len(rest)].tolist() and not (response == MASK).any()
        assert nfe == len(masks) == steps.max() + 1 and positions == nfe * length and computed == nfe * (P + R)
    assert len(orders) == len(SPANS), "each row has its own order"


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
    canvas = laid_out(layout, [[1, 2], [3, 4, 5]], [[*range(1, 6), EOT], [6, 5, EOT]])
    plain, rate = replace(method, prompt_mask_rate=0.0), np.float32(0.3)

    @jax.jit
    def shown(canvas, seed):
        uniforms, without = (sampling.draw_uniforms(how, layout, jax.random.key(seed), 2, P) for how in (method, plain))
        block = jnp.array([1, 0]) if method.pairs else None
        draws, noise = sampling.draw(method, layout, canvas, uniforms, block), jnp.moveaxis(uniforms.noise, 1, 0)

        def see(how, numbers):
            return jax.vmap(lambda one, u: corrupt(layout, canvas, one, how, u))(draws, numbers)

        below = jnp.where(PATTERNS, np.nextafter(rate, np.float32(0)), rate)
        of_patterns = jax.vmap(lambda numbers: see(method, noise.at[:, :, R:].set(numbers)))(below)
        return uniforms, without, see(plain, noise[..., :R]), of_patterns

    uniforms, without, (clean, targets), (seen, same_targets) = jax.device_get(shown(canvas, 7))
    # What was drawn without the field stays bit for bit what it was, and each draw of each row has numbers of its own.
    assert uniforms.noise.shape == (2, 2, R + P) and len(np.unique(uniforms.noise[..., R:])) == 2 * 2 * P
    if plain.needs_noise:
        np.testing.assert_array_equal(uniforms.noise[..., :R], without.noise)
    chex.assert_trees_all_equal(without[:4], uniforms[:4])

    in_prompt = np.arange(P + R) < canvas.prompt_len[:, None]  # [B, T]
    masked = np.pad(PATTERNS, ((0, 0), (0, R)))[:, None, None]
    np.testing.assert_array_equal(seen.ids, np.where(masked & in_prompt, MASK, clean.ids))
    rest, same = (seen._replace(ids=None), same_targets), (clean._replace(ids=None), targets)
    chex.assert_trees_all_equal(rest, jax.tree.map(lambda x: np.tile(x, (len(PATTERNS), *[1] * x.ndim)), same))
