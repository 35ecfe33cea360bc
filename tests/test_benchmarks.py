"""Benchmarks that have a tiny size run at it and measure what they say; their bars are for the real sizes."""

import json
from dataclasses import replace

import jax
import numpy as np
import pytest

import jaxblock
from benchmarks import (
    cache_quality,
    checkpoint_speed,
    decode_queue,
    decode_traffic,
    decoder_overhead,
    gguf_checkpoint,
    host_time,
    load_checkpoint,
    logits_memory,
    prepare_speed,
    quickstart_summary,
    study_executed,
)


def test_logits_of_the_active_block_take_its_share_of_the_canvas_and_give_the_same_loss():
    found = logits_memory.main(["--batch", "4", "--response", "64", "--block", "8", "--d", "16", "--vocab", "512"])
    assert found["ratio"] < 1.5 * 8 / 64
    draw = np.random.default_rng(0).standard_normal
    hidden, head = draw((2, 12, 4), np.float32), draw((4, 9), np.float32)
    at = np.array([[3, 4, 5], [7, 8, 9]])
    targets, weights = np.array([[1, 2, 3], [4, 5, 6]]), np.array([[1.0, 0.0, 2.0], [0.5, 0.0, 0.0]])
    heads = (logits_memory.active_head, logits_memory.full_head)
    both = [jax.jit(head_of)(hidden, head, at, targets, weights) for head_of in heads]
    np.testing.assert_allclose(*both, rtol=1e-6)


@pytest.mark.slow
def test_the_queue_finds_the_answers_of_batches_in_order():
    sizes = "--d 16 --layers 1 --block 2 --steps 1 --train 60 --problems 128 --batch 8 --repeat 1"
    assert decode_queue.main(sizes.split())["computed"] < 1.15


@pytest.mark.slow
def test_parts_of_a_run_are_timed_and_their_bytes_counted():
    (row,) = prepare_speed.main(["--megabytes", "0.1", "--repeat", "1", "--workers", "1", "--sides", "prepare"])
    assert row["records"] > 50 and row["processor_s"] > 0 and row["peak_MiB"] > 100
    sizes = "--d 16 --layers 1 --batch 2 --prompt 8 --response 8 --block 4 --vocab 32 --repeat 1"
    decoder = decoder_overhead.main(sizes.split())
    assert decoder["ratio"] == pytest.approx(decoder["decoder"] / decoder["bare"])
    sizes = "--d 16 --layers 2 --vocab 32 --prompt 16 --response 16 --block 4 --steps 2 --batch 1"
    moved = decode_traffic.main(sizes.split())
    assert moved["dual, batch 1"] < moved["prefix, batch 1"] < moved["none, batch 1"]
    host = host_time.main(["--d", "16", "--layers", "1", "--batch", "8", "--steps", "4"])
    parts = sum(host[name] for name in ("batch", "place", "dispatch", "metrics"))
    assert host["share"] == pytest.approx(parts / host["step"])
    saves = checkpoint_speed.main(["--d", "16", "--layers", "1", "--batch", "8", "--saves", "1", "--steps", "1"])
    assert 0 < saves["still"] < saves["save"] and saves["restore"] < saves["restart"]
    file = load_checkpoint.main(["--d", "128", "--layers", "3", "--mlp", "200", "--vocab", "500", "--shard-mb", "1"])
    assert file["exact"] and file["bytes"] == 2 * (3 * (4 * 128**2 + 3 * 128 * 200 + 2 * 128) + 128 + 2 * 500 * 128)


def test_scores_are_interpolated_over_the_logarithm_of_steps_seed_by_seed_and_never_beyond_them():
    ratio = study_executed.BLOCKWISE / study_executed.CLASSICAL
    ours = {0: {100: (50.0, 1.0), 1000: (90.0, 0.1)}, 1: {100: (70.0, 1.2), 1000: (90.0, 0.1)}}
    ends = (50 * ratio, 200 * ratio)  # 100 lies halfway, and 1,000 beyond
    theirs = {seed: {ends[0]: (10.0 + seed, 3.0), ends[1]: (30.0 + seed, 2.0)} for seed in ours}
    (row,) = study_executed.compare(ours, theirs)
    assert row.budget == 100 and row.solved[0] == pytest.approx((30 + 49) / 2) and row.nelbo[0] == pytest.approx(-1.4)
    assert row.solved[1] < 30 and row.solved[2] > 49  # two seeds say little


def test_rows_that_rotate_together_are_taken_apart():
    """GGUF has (first, second) pairs side by side in a head, transformers all firsts and then all seconds."""
    head, width, first = np.meshgrid(np.arange(2), np.arange(3), np.arange(2), indexing="ij")
    found = gguf_checkpoint.halves(np.stack([head, width, first], -1).reshape(12, 3), heads=2)
    assert found.tolist() == [[h, w, f] for h in range(2) for f in range(2) for w in range(3)]


def test_the_quickstart_is_summed_up_from_what_it_left(tmp_path):
    def phase(name, seconds, code=0):
        return json.dumps({"phase": name, "seconds": seconds, "peak_bytes": 2**30, "exit": code}) + "\n"

    record = phase("train", 70.0) + phase("score", 9.0) + phase("train", 300.0, code=1) + phase("train", 2.0)
    (tmp_path / "phases.jsonl").write_text(record)
    for name, verdicts in (("score_before", (True, False, False)), ("score_after", (True, True, True))):
        folder = tmp_path / name
        folder.mkdir()
        rows = [{"index": i, "grader": "exact", "correct": right} for i, right in enumerate(verdicts)]
        (folder / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        solved = {"rate": sum(verdicts) / 3, "correct": sum(verdicts), "n": 3, "low": 0.1, "high": 0.9}
        bound = {"mean": 0.5, "se": 0.01, "n": 3}
        summary = {"pass_at_1": solved, "nelbo_per_token": bound, "nfe": 16.0, "tokens_per_forward": 0.9}
        (folder / "summary.json").write_text(json.dumps(summary))
    found = quickstart_summary.main([str(tmp_path)])
    assert [row[:2] for row in found["phases"]] == [["train", "1m10s"], ["score", "0m09s"], ["all", "1m19s"]]
    assert [row[1] for row in found["scores"]] == ["33.3% (1 of 3)", "100.0% (3 of 3)"]
    assert found["paired"] == [["before, after", "0", "2", "0.5"]]


@pytest.fixture
def torch():
    pytest.importorskip("transformers", reason="benchmarks/requirements.txt is not installed")
    torch = pytest.importorskip("torch", reason="benchmarks/requirements.txt is not installed")
    torch.set_num_threads(1)  # more wait for each other where other programs run
    return torch


@pytest.mark.slow
def test_pytorch_does_the_same_job(torch):
    from benchmarks import decode_vs_torch, step_vs_torch, torch_decoder

    sizes = ["--d", "32", "--layers", "2", "--block", "8", "--vocab", "100", "--repeat", "1", "--batch", "2"]
    (found,) = step_vs_torch.main([*sizes, "--canvas", "32", "--peak", "64"])  # refuses to time two different jobs
    heads = found["flops"]
    assert heads["masked head"] <= heads["jaxblock"] < heads["full head"] and min(found["seconds"].values()) > 0
    decoding = [*sizes, "--prompt", "8", "--response", "16", "--steps", "4"]
    for script in (decode_vs_torch, torch_decoder):  # the first refuses too
        assert list(script.main(decoding)) == ["none, batch 2", "prefix, batch 2", "dual, batch 2"]


def test_the_pytorch_decoder_decodes_as_published(torch, shared):
    from benchmarks.torch_decoder import Network, Options, decode

    models = {name: jaxblock.load(shared / "golden" / "forward" / name) for name in ("llada_mha", "llada_gqa_tied")}
    nets = {name: Network(model.arch, model.net.param_table, model.params) for name, model in models.items()}
    for name, case in json.loads((shared / "golden" / "decode_fast" / "cases.json").read_text()).items():
        z = np.load(shared / "golden" / "decode_fast" / f"{name}.npz")
        response, block, rule = case["gen_length"], case["block_length"], "v1" if name.endswith("_v1") else "strict"
        steps, rates = case["steps"] * block // response, (case.get("threshold"), case.get("factor"))
        options = Options(response, block, steps, case["cache"], *rates, rule)
        for head, rows in (("block", 1), ("all", 2)):
            prompts = torch.from_numpy(np.repeat(z["prompt_ids"], rows, 0))
            found = decode(nets[case["model"]], replace(options, head=head), prompts)
            np.testing.assert_array_equal(found.ids, np.repeat(z["output_ids"], rows, 0), name)
            assert [one.end - one.begin for one in found.forwards] == z["forward_lengths"].tolist(), name
            assert len(found.forwards) == case["nfe"], name


def test_a_cache_is_compared_with_the_same_rule_without_one(tmp_path):
    row = dict(interval=[0.1, 0.9], nfe=4.0, token_forwards=100.0, seconds=1.0)
    right = {"none": [True, True, True, False], "prefix": [True, True, True, True], "dual": [True, False, False, True]}
    done = {
        f"{rule}, {cache}": dict(row, rule=rule, cache=cache, correct=correct if rule == "1 a step" else right["none"])
        for rule in ("1 a step", "threshold 0.9")
        for cache, correct in right.items()
    }
    lines = cache_quality.table(done).splitlines()[2:]
    assert [line.split(" | ")[-4:] for line in lines[:3]] == [
        ["75.0%", "10.0% to 90.0%", "", " |"],
        ["100.0%", "10.0% to 90.0%", "0 / 1", "1 |"],
        ["50.0%", "10.0% to 90.0%", "2 / 1", "1 |"],
    ]
    cache_quality.draw(done, tmp_path / "picture.png", "made up")
    assert (tmp_path / "picture.png").stat().st_size > 10_000
