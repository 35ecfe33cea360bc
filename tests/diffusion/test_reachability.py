"""Whatever training shows the network under ``aligned``, a decoder can arrive at, position for position.

The decoder here is NumPy, written from the published algorithm, one row at a time, with the transfer rule's and the
sampler's dice replaced by a script. Every state that it passes through is logged. It knows nothing of ``canvas.view``.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxblock.diffusion import canvas as canvases
from jaxblock.diffusion import sampling
from jaxblock.diffusion.canvas import Layout
from jaxblock.diffusion.config import MethodConfig
from jaxblock.diffusion.corruption import corrupt
from jaxblock.diffusion.decoding import decoder
from tests.diffusion.decoding import RECORDED, Recorder, decode_jit, decoding, padded

VOCAB, EOT, FILL, MASK = 11, 7, 8, 9
P = 4


def replay(prompt, layout, script):
    """LLaDA's generate with the random rule at one token a step, for one row.

    Args:
        prompt: its tokens.
        layout: R, B, alignment and the mask id.
        script: (response position, token) in the order in which they are committed; may end anywhere.

    Returns:
        The state before each commit, and the one after the last: what the network is fed (ids, positions), what may be
        committed next, and which logits that reads. None where the script asks for what no dice can give.
    """
    x = np.array(list(prompt) + [layout.mask_id] * layout.response_len)
    logits_index = np.arange(len(x))  # stands for the logits: row i of them
    if layout.alignment == "shifted":
        logits_index = np.concatenate([logits_index[:1], logits_index[:-1]])
    script, states = list(script), []
    for begin in range(len(prompt), len(x), layout.block):
        block = range(begin, begin + layout.block)
        for _ in block:
            candidates = [i for i in block if x[i] == layout.mask_id]
            reads = [int(logits_index[i]) for i in block]
            states.append((x.tolist(), list(range(len(x))), candidates, reads))
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
    states = replay(prompt, layout, script)
    shown = seen.ids[: seen.length], seen.positions[: seen.length], seen.active[masked], seen.at
    # The state with no position open is the next block's: training never has it (an empty set has no loss).
    possible = states is not None and states[-1] == tuple(field.tolist() for field in shown)
    return possible and bool(seen.valid.all()) and any(masked)


def _layout(alignment="same_position", block=3, context="aligned"):
    return Layout(12, block, alignment, context, None, MASK, FILL, (EOT, FILL))


ROWS, DRAWS = 3, 2


@partial(jax.jit, static_argnums=(0, 1))
def _train(layout, method, rows, seed):
    """What a training step feeds: views [K, B, ...] and draws of rows with prompts of unequal length."""
    canvas = canvases.from_rows(layout, *rows)
    uniforms = sampling.draw_uniforms(method, layout, jax.random.key(seed), ROWS)
    draws = sampling.draw(method, layout, canvas, uniforms)
    noise = jnp.moveaxis(uniforms.noise, 1, 0) if method.needs_noise else None
    return jax.vmap(lambda d, u: corrupt(layout, canvas, d, method, u)[0])(draws, noise), draws


def _arrays(prompts, texts, layout):
    pad = lambda rows, n: np.array([r + [0] * (n - len(r)) for r in rows], np.int32)  # noqa: E731
    lengths = [np.array([len(r) for r in rows], np.int32) for rows in (prompts, texts)]
    return pad(prompts, P), lengths[0], pad(texts, layout.response_len), lengths[1], np.arange(ROWS, dtype=np.int32)


def _verdicts(prompts, texts, layout, seed=0, spoil=lambda view: view, **method):
    """``reachable`` of every draw that carries loss."""
    rows = _arrays(prompts, texts, layout)
    views, draws = jax.device_get(_train(layout, MethodConfig(draws=DRAWS, **method), rows, seed))
    views = spoil(views)
    for at in zip(*np.nonzero(draws.weight > 0), strict=True):
        seen = jax.tree.map(lambda x, at=at: x[at], views)
        yield reachable(prompts[at[1]], layout, seen, draws.masked[at])


tokens = st.integers(0, 6)
prompts_of = st.lists(st.lists(tokens, min_size=1, max_size=P), min_size=ROWS, max_size=ROWS)
texts_of = st.lists(st.lists(tokens, max_size=11).map(lambda text: [*text, EOT]), min_size=ROWS, max_size=ROWS)


@pytest.mark.parametrize(
    "alignment, block, law",
    [("same_position", 1, "bernoulli"), ("same_position", 3, "exact_count"), ("shifted", 4, "antithetic")],
)
@settings(max_examples=40, deadline=None)
@given(prompts=prompts_of, texts=texts_of, seed=st.integers(0, 2**16))
def test_training_shows_only_what_a_decoder_reaches(alignment, block, law, prompts, texts, seed):
    assert all(_verdicts(prompts, texts, _layout(alignment, block), law=law, seed=seed))


@pytest.mark.parametrize("alignment", ["same_position", "shifted"])
def test_every_masked_set_of_every_block_is_reached(alignment):
    """Exhaustively, for one text of every length."""
    layout = _layout(alignment)
    sets = np.array([[s >> j & 1 for j in range(3)] for s in range(1, 8)], bool)
    prompt = [5, 6]

    @jax.jit
    def run(block, *rows):
        draw = sampling.Draw(jnp.full(7, block), jnp.asarray(sets), jnp.ones(7))
        return corrupt(layout, canvases.from_rows(layout, *rows), draw)[0]

    for length in range(1, 13):
        text = list(range(length - 1)) + [EOT] if length < 8 else [1] * (length - 1) + [EOT]
        ids = (np.tile(np.array(row, np.int32), (7, 1)) for row in (prompt + [0, 0], text + [0] * (12 - length)))
        lengths = (np.full(7, n, np.int32) for n in (2, length))
        prompt_ids, text_ids, prompt_len, text_len = *ids, *lengths
        for block in range(-(-length // 3)):
            rows = prompt_ids, prompt_len, text_ids, text_len, np.arange(7, dtype=np.int32)
            views = jax.device_get(run(np.int32(block), *rows))
            assert all(reachable(prompt, layout, jax.tree.map(lambda x, i=i: x[i], views), sets[i]) for i in range(7))


BROKEN = {
    "true suffix visible": dict(suffix_mask_prob=0.0),
    "noisy prefix": dict(prefix_mask_rate=1.0),
    "paper context": dict(layout=_layout(context="paper")),
    "suffix too long": dict(spoil=lambda v: v._replace(length=v.length + 1)),
    "suffix too short": dict(spoil=lambda v: v._replace(length=v.length - 1)),
    "shift in one place only": dict(layout=_layout("shifted"), spoil=lambda v: v._replace(at=v.active)),
    "positions counted from the response": dict(spoil=lambda v: v._replace(positions=v.positions + 1)),
}


@pytest.mark.parametrize("name", BROKEN)
def test_the_replay_refuses_what_no_decoder_shows(name):
    """Two blocks of text in a row of four, and draws whose block has something before or after it."""
    prompts, texts = [[1], [2, 3], [4, 5, 6]], [[1, 2, 3, 4, EOT], [6, 5, 4, 3, 2, EOT], [1, 1, 2, EOT]]
    options = dict(layout=_layout()) | BROKEN[name]
    verdicts = [v for seed in range(3) for v in _verdicts(prompts, texts, seed=seed, **options)]
    assert not all(verdicts)


@pytest.mark.parametrize("alignment", [pytest.param("same_position", marks=pytest.mark.slow), "shifted"])
def test_the_real_decoder_passes_through_the_replays_states(alignment):
    """Views recorded inside the jitted decoder, and canvases rebuilt from commit_step, against the replay's log."""
    layout, net = _layout(alignment), Recorder()
    prompts = [[1], [2, 3], [4, 5, 6, 0]]
    options = decoding(None, rule="random", temperature=1.0)
    out = jax.device_get(decode_jit(net, layout, options, RECORDED, 5, *padded(prompts)))
    jax.effects_barrier()
    rebuilt = decoder.responses_by_step(layout, out, layout.response_len)
    assert len(net.views) == layout.response_len and out.nfe.tolist() == [layout.response_len] * ROWS
    for row, prompt in enumerate(prompts):
        order = np.argsort(out.commit_step[row])
        states = replay(prompt, layout, [(int(i), int(out.response[row, i])) for i in order])
        for step, ((ids, positions, _, reads), seen) in enumerate(zip(states, net.views, strict=True)):
            length = seen.length[row]
            assert (seen.ids[row, :length].tolist(), seen.positions[row, :length].tolist()) == (ids, positions)
            assert seen.at[row].tolist() == reads
            assert rebuilt[step, row].tolist() == ids[len(prompt) :]
        assert rebuilt[-1, row].tolist() == out.response[row].tolist()
    assert len({tuple(np.argsort(steps)) for steps in out.commit_step}) == ROWS, "each row has its own order"
