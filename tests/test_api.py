"""Tests the Python interface, which does what the verbs do, by the same functions."""

import dataclasses
import re

import numpy as np
import pytest

import jaxblock
from jaxblock import build, loading
from jaxblock.data.prompts import refuse_text
from jaxblock.diffusion.decoding.config import DecodeConfig
from jaxblock.errors import UserError
from jaxblock.model import network
from jaxblock.model.arguments import whole_number
from jaxblock.models.config import ModelConfig

DRAWN = {"temperature": 0.7, "top_k": 9, "steps_per_block": 2, "seed": 4}
"""How several tests decode, which share the compiled program."""


@pytest.fixture(scope="module")
def prompts(model):
    return [model.encoder.prompt(text) for text in ("1+2?", "12+7?", "9?")]


def test_load_sets_the_type(tiny_run):
    assert jaxblock.load is loading.load
    found = jaxblock.load(str(tiny_run), dtype="bfloat16")
    assert found.params["embed"].dtype == "bfloat16" and found.net.dtype == "bfloat16"
    assert found.logits([[3, 4]]).dtype == np.float32


def test_padding_on_either_side_changes_nothing(model, prompts):
    width = max(map(len, prompts)) + 3
    ids, mask = np.full((3, width), model.arch.mask_id), np.zeros((3, width), int)  # a padded mask token is none
    for row, (prompt, start) in enumerate(zip(prompts, (width - len(prompts[0]), 0, 1), strict=True)):
        ids[row, start : start + len(prompt)] = prompt
        mask[row, start : start + len(prompt)] = 1
    np.testing.assert_array_equal(model.decode(ids, mask), model.decode(prompts))
    # Logits come back where their tokens are; positions are counted from the first real token.
    logits = model.logits(ids, mask)
    assert logits.shape == (3, width, model.arch.vocab_size) and not logits[mask == 0].any()
    for row, prompt in enumerate(prompts[:2]):
        np.testing.assert_allclose(logits[row][mask[row] == 1], model.logits([prompt])[0], atol=3e-5)


def test_stream_ends_as_decode_does(model, prompts):
    whole = model.decode(prompts, return_steps=True, **DRAWN)
    for row, prompt in enumerate(prompts[:2]):
        states = list(model.stream(prompt, index=row, **DRAWN))
        assert [nfe for _, nfe in states] == list(range(1, int(whole.nfe[row]) + 1))
        for step, (state, _) in enumerate(states, 1):
            np.testing.assert_array_equal(state, whole.canvases[step, row])
        stop = int(whole.nfe[row]) // 2 * 4
        np.testing.assert_array_equal(states[-1][0][:stop], whole.ids[row, :stop])
    # A prompt's result comes from its index, not from its place in a batch.
    np.testing.assert_array_equal(model.decode(prompts[1:], first_index=1, **DRAWN), whole.ids[1:])


def test_steps_canvases_and_options_by_name(model, prompts):
    found = model.decode(prompts, return_steps=True, early_stop=False, cfg_scale=0.5)
    assert found.canvases.shape == (17, 3, 16) and (found.canvases[0] == model.arch.mask_id).all()
    np.testing.assert_array_equal(found.canvases[-1], found.ids)
    assert (found.nfe == 32).all()  # guidance takes two passes a step
    assert not (found.ids == model.arch.mask_id).any()
    other = model.decode(prompts[:1], response_len=8, block=8, stop_ids=[3], seed=np.int64(1))
    own = dataclasses.replace(model, decode_defaults=DecodeConfig(response_len=8, block=8, stop_ids=(3,), seed=1))
    np.testing.assert_array_equal(own.decode(prompts[:1]), other)


IDS, PADDED, LONG = [[5, 6]], np.array([[3, 4]]), [[3] * 4090]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: jaxblock.load(m.origin, dtype="float15"), "choose float32 or bfloat16"),
        (lambda m: jaxblock.load(""), "folder is '': it must be the path of a checkpoint"),
        (lambda m: jaxblock.load(m.origin, mask_id=7), "records its mask token and alignment"),
        (lambda m: jaxblock.load(m.origin, alignment="shifted"), "records its mask token and alignment"),
        (lambda m: m.decode(IDS, temprature=1.0), "unknown key temprature; did you mean temperature?"),
        (lambda m: m.decode(IDS, rule="low_confidense"), "rule is 'low_confidense'; did you mean low_confidence?"),
        (lambda m: m.decode(IDS, temperature="hot"), "temperature must be float"),
        (lambda m: m.decode(IDS, temperature=-1), "decode.temperature is -1.0"),
        (lambda m: m.decode(IDS, block=5), "decode.block 5 does not divide"),
        (lambda m: m.decode(IDS, steps_per_block=0), "decode.steps_per_block is 0"),
        (lambda m: m.decode(IDS, fill_id=100000), "decode.fill_id: 100000 is outside the vocabulary"),
        (lambda m: m.decode(IDS, stop_ids=(1, 0)), "decode.stop_ids"),
        (lambda m: m.decode(IDS, response_len=5000, block=8), "it is longer than the model's 4096"),
        (lambda m: m.decode([[3, 1, 4]]), "prompt 0 holds the mask token 1"),
        (lambda m: m.decode([[3], []]), "prompt 1 is empty"),
        (lambda m: m.decode(PADDED, [[0, 0]]), "prompt 0 is empty"),
        (lambda m: m.decode([[3, 9999]]), "prompt 0 holds an id outside the vocabulary of"),
        (lambda m: m.decode([[-1]]), "prompt 0 holds an id outside the vocabulary of"),
        (lambda m: m.decode(LONG), "0 has 4090 tokens; with 16 for the response it is longer than the model's 4096"),
        (lambda m: m.decode(PADDED[0]), "ids are a batch [B, T], but these have the shape (2,)"),
        (lambda m: m.decode(PADDED, [[1]]), "attention_mask has the shape (1, 1), the ids (1, 2)"),
        (lambda m: m.decode(PADDED, [[2, 1]]), "attention_mask must be 1 for real tokens and 0 for padding"),
        (lambda m: m.decode(PADDED, np.array([[0, -1e9]])), "attention_mask must be 1 for real tokens and 0 for"),
        (lambda m: m.decode(np.array([[3, 4, 5]]), [[1, 0, 1]]), "padding between the real tokens of row 0"),
        (lambda m: m.decode(np.zeros((1, 0))), "the shape (1, 0)"),
        (lambda m: m.decode(np.array([[3.5]])), "ids must be token ids, which are whole numbers: array([[3.5]])"),
        (lambda m: m.decode(np.array([[True]])), "ids must be token ids"),
        (lambda m: m.decode([[2**32 + 3]]), "prompts must be token ids"),
        (
            lambda m: m.decode(IDS, first_index=2**31),
            "the index of the first of 1 prompts is 2147483648: it must be from 0",
        ),
        (lambda m: next(m.stream(IDS[0], index=-1)), "prompts is -1: it must be from 0"),
        (lambda m: m.nelbo(IDS, [[1]]), "holds the mask token 1"),
        (lambda m: m.nelbo(IDS, [[9999]]), "outside the vocabulary"),
        (lambda m: m.nelbo(IDS, [[]]), "a response of 0 tokens"),
        (lambda m: m.nelbo(IDS, [[4] * 17]), "a response of 17 tokens; response_len is 16"),
        (lambda m: m.nelbo(IDS, [[2**32 + 4]]), "row 0: the response's ids must be token ids"),
        (lambda m: m.nelbo(IDS, [[4], [4]]), "1 prompts, but 2 responses"),
        (
            lambda m: m.nelbo(IDS, [[4]], seed=2**70),
            "seed is 1180591620717411303424: it must be from 0 to 2,147,483,647",
        ),
        (lambda m: m.nelbo(IDS, [[4]], samples=0), "samples is 0: it must be from 1 to"),
        (lambda m: m.logits([[3] * 4097]), "row 0 has 4097 tokens: it is longer than the model's 4096"),
        (lambda m: m.save("/nowhere/never", "bogus"), "dtype is 'bogus': choose float32, bfloat16, float16, or None"),
        (lambda m: m.save("/nowhere/never", np.int8), "dtype is <class 'numpy.int8'>: choose float32"),
        (lambda m: m.push_to_hub("org/never", dtype="x,y"), "dtype is 'x,y': choose float32"),
        # Every whole number of a method goes through it; types are checked before where tests call the methods.
        (lambda m: whole_number(1.5, "n", 0), "n is 1.5: it must be a whole number from 0 to 2,147,483,647"),
        (lambda m: whole_number(True, "n", 0), "n is True: it must be a whole number"),
        (lambda m: whole_number("1", "n", 0), "n is '1': it must be a whole number"),
        (lambda m: m.trace(IDS[0], candidates=0), "candidates is"),
        (lambda m: m.trace(IDS[0], candidates=m.arch.vocab_size + 1), "candidates is"),
        (lambda m: m.generate(""), "the prompt: the text is empty"),
        (lambda m: m.generate(["1+2?", " "]), "prompt 1: the text is empty"),
        (lambda m: m.generate("1+2? " * 20), "the prompt has 118 tokens, more than canvas.prompt_len 24"),
        (lambda m: m.generate("<|eot_id|>"), "contains the special token"),
        (lambda m: m.generate([{"role": "assistant", "content": "1"}]), "the last message must be the user's"),
        (lambda m: m.generate([{"role": "user"}]), 'message[0] must be an object with "role" and "content"'),
        (lambda m: m.generate([[{"role": "robot", "content": "x"}]]), "prompt 0: message[0] has the role 'robot'"),
        # Decoding calls it.
        (lambda m: refuse_text(""), "token ids here, not text"),
        (lambda m: refuse_text(["1+2?", " "]), "token ids here, not text"),
        (lambda m: refuse_text([{"role": "user"}]), "token ids here, not text"),
        (lambda m: refuse_text([[{"role": "robot", "content": "x"}]]), "token ids here, not text"),
    ],
)
def test_what_makes_no_sense_is_refused(model, call, message):
    with pytest.raises(UserError, match=re.escape(message)):
        call(model)


def test_nelbo(model, prompts):
    responses = [[*model.tokenizer.encode("1+2=3"), 3], [4, 5, 3], [6, 3]]
    # Blocks of 4 hold 15 sets: with that many samples they are enumerated.
    exact, zero = model.nelbo(prompts, responses, samples=15)
    assert exact.shape == (3,) and (exact > 0).all() and not zero.any()
    drawn, error = model.nelbo(prompts, responses, samples=4, seed=3)
    assert (error > 0).all() and (np.abs(drawn - exact) < 6 * error).all()
    once, unknown = model.nelbo(prompts, responses, samples=1)
    assert np.isfinite(once).all() and np.isnan(unknown).all()  # one draw does not show its error
    alone, _ = model.nelbo(prompts[1:2], responses[1:2], samples=15)
    np.testing.assert_allclose(alone, exact[1:2], rtol=1e-5)


def test_logits_and_bounds_are_computed_in_batches(model, prompts, monkeypatch):
    """Three rows in batches of two have the logits, and under the same masks the bounds, that they have together."""
    ids, responses = [prompt[:4] for prompt in prompts], [[4, 5, 3], [5, 4, 3], [6, 7, 3]]
    whole, bounds = model.logits(ids), model.nelbo(prompts, responses, seed=3)
    run, sizes = network.run_on_mesh_of, []
    monkeypatch.setattr(network, "run_on_mesh_of", lambda *a: sizes.append(len(a[-1])) or run(*a))
    small = dataclasses.replace(model, decode_defaults=dataclasses.replace(model.decode_defaults, batch_size=2))
    np.testing.assert_allclose(small.logits(ids), whole, atol=3e-5)
    for ours, theirs in zip(small.nelbo(prompts, responses, seed=3), bounds, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5)
    assert sizes == [2] * 4


def test_text_in_and_text_out(model, prompts):
    texts = ["1+2?", "12+7?", "9?"]
    found = model.generate(texts, seed=3)
    assert found == [model.tokenizer.decode(model.text_ids(row)) for row in np.asarray(model.decode(prompts, seed=3))]
    small = dataclasses.replace(model, decode_defaults=dataclasses.replace(model.decode_defaults, batch_size=2))
    assert small.generate(texts, seed=3) == found  # in batches of 2 and 1
    bad = [*prompts, []]  # a sequence is checked before the work, an iterator as it is read
    for which, ids, expected in ((model, bad, []), (model, iter(bad), found), (small, iter(bad), found)):
        answered = []
        with pytest.raises(UserError, match="prompt 3 is empty"):
            answered.extend(answer.text for answer in which.answers(ids, seed=3))
        assert answered == expected
    assert model.generate(texts[0], seed=3) == found[0]
    chat = [{"role": "user", "content": texts[0]}]
    assert model.generate(chat, seed=3) == found[0] and model.generate([chat, texts[1]], seed=3) == found[:2]
    assert model.generate([]) == []
    assert re.search(r"llada, 9,824 weights in float32.*\n.*canvas 24 \+ 16, blocks of 4.*\n.*run", repr(model))
    # A text ends at its first stop.
    assert model.stop_ids == (3, 2)
    assert model.text_ids(np.array([7, 8, 3, 2, 2])) == [7, 8] == model.text_ids(np.array([7, 8]))
    assert model.text_ids(np.array([7, 8, 3, 2, 2]), stop_ids=[8]) == [7]


@pytest.mark.parametrize("options", [{}, DRAWN])
def test_a_trace_holds_what_the_network_believed_when_it_committed(model, prompts, options):
    """Every probability is computed again from the logits of the canvas before the step."""
    found = model.trace(prompts[1], index=1, candidates=3, **options)
    whole = model.decode(prompts, return_steps=True, **options)
    np.testing.assert_array_equal(found.response, whole.ids[1])
    assert (found.nfe, found.steps) == (whole.nfe[1], found.commit_step.max() + 1)
    before = np.concatenate([np.tile(prompts[1], (len(whole.canvases), 1)), whole.canvases[:, 1]], axis=1)
    logits = model.logits(before)[:, len(prompts[1]) :].astype(np.float64)
    for at, step in enumerate(found.commit_step):
        if step < 0:
            assert found.beliefs.probability[at] == 0 and not found.beliefs.probabilities[at].any()
            continue
        p = np.exp(logits[step, at]) / np.exp(logits[step, at]).sum()
        best = np.argsort(-p, kind="stable")[:3]
        assert found.beliefs.ids[at].tolist() == best.tolist()
        np.testing.assert_allclose(found.beliefs.probabilities[at], p[best], rtol=1e-3, atol=1e-6)
        np.testing.assert_allclose(found.beliefs.probability[at], p[found.response[at]], rtol=1e-3, atol=1e-6)


def test_a_loaded_checkpoint_runs_its_layers_as_a_run_does(model, tiny_export, monkeypatch):
    for least in (1, 10**9):
        monkeypatch.setattr(build, "_LEAST_UNROLLED", least)
        chosen = build.network(model.arch, ModelConfig())
        net = jaxblock.load(tiny_export).net
        assert (net.scan_layers, net.attention) == (least > 1, chosen.attention) == (chosen.scan_layers, "xla")
