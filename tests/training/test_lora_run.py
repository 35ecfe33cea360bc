"""Tests runs that train adapters: from a Hugging Face folder or a run, resumed, scored, exported merged and alone."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

import jaxblock
from jaxblock.cli import main
from jaxblock.errors import UserError
from jaxblock.models.spec import flatten
from jaxblock.training.base_identity import identify_base
from jaxblock.training.checkpoints.reader import CheckpointReader
from tests import runs

LORA = "--lora.rank 2 --lora.alpha 8 --lora.dropout 0.2 --optimizer.ema 0.5 --train.steps 4 --train.save_every 2 "
LORA += " ".join(runs.QUIET)


def _train(config: Path, base: Path, out: Path, flags: str = "") -> str:
    return f"train --config {config} --model.init_from {base} --train.out {out} {LORA} {flags}"


def _flat(params: object) -> dict[str, np.ndarray]:
    return flatten(jax.device_get(params))


@pytest.fixture(scope="module")
def base(tiny_export: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Copies the tiny run's export, and adds files that a published checkpoint has besides."""
    out = shutil.copytree(tiny_export, tmp_path_factory.mktemp("lora") / "base")
    (out / "modeling_llada.py").write_text("raise SystemExit('never run')")
    (out / "generation_config.json").write_text(json.dumps({"temperature": 0.5}))
    return out


@pytest.fixture(scope="module")
def run(tiny_config: Path, base: Path) -> Path:
    out = base.parent / "run"
    assert main(_train(tiny_config, base, out, "--train.eval_nelbo_rows 8").split()) == 0
    return out


@pytest.fixture(scope="module")
def model(run: Path) -> jaxblock.Model:
    return jaxblock.load(run)


@pytest.fixture(scope="module")
def start(base: Path) -> dict[str, np.ndarray]:
    return _flat(jaxblock.load(base).params)


def test_adapters_alone_are_trained_and_saved(run, model, start, tiny_run):
    adapters, frozen = _flat(model.params["lora"]), _flat({k: v for k, v in model.params.items() if k != "lora"})
    assert len(adapters) == 14 and all(leaf.dtype == np.float32 for leaf in adapters.values())
    assert all(np.abs(leaf).max() > 0 for leaf in adapters.values())  # every matrix's b has moved
    for path, leaf in start.items():
        np.testing.assert_array_equal(frozen[path], leaf, err_msg=path)
    sizes = [sum(f.stat().st_size for f in (r / "checkpoints").rglob("*") if f.is_file()) for r in (run, tiny_run)]
    assert sizes[0] < sizes[1]
    first, last = runs.rows(run, "eval")[0], runs.rows(tiny_run, "eval")[-1]
    assert first["nelbo_per_token"]["mean"] == pytest.approx(last["nelbo_per_token"]["mean"], rel=1e-4)
    # What is loaded is the moving average.
    checkpoints = CheckpointReader(run)
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), model.params["lora"])
    for average in (True, False):
        stored = _flat(checkpoints.restore_params(4, like, average=average))
        assert all(np.array_equal(stored[path], leaf) == average for path, leaf in adapters.items())
    checkpoints.close()


@pytest.mark.slow
def test_a_resumed_run_is_the_straight_one_and_its_base_and_devices_may_change(
    run, base, tiny_config, tmp_path, model, ran
):
    out = shutil.copytree(run, tmp_path / "again")
    shutil.rmtree(out / "checkpoints" / "4")
    ran(_train(tiny_config, shutil.copytree(base, tmp_path / "moved"), out, "--train.fsdp 8"))
    got = _flat(jaxblock.load(out, base=base).params["lora"])
    for path, leaf in _flat(model.params["lora"]).items():
        np.testing.assert_allclose(got[path], leaf, rtol=0, atol=2e-6, err_msg=path)


def test_another_base_is_refused(run, base, tiny_config, tmp_path):
    other = shutil.copytree(base, tmp_path / "other")
    weights = bytearray((other / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (other / "model.safetensors").write_bytes(weights)
    with pytest.raises(UserError, match="not the base that these adapters were trained on"):
        jaxblock.load(run, base=other)
    with pytest.raises(UserError, match="is not there: set model.init_from"):
        jaxblock.load(run, base=tmp_path / "nowhere")
    out = shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(out / "checkpoints" / "4")
    for where, source, said in ((out, other, "set model.init_from to that one"), ("new", run, "adapters on adapters")):
        with pytest.raises(UserError, match=said):
            runs.session(runs.config(*_train(tiny_config, source, tmp_path / where).split()[2:]))


def test_a_base_is_known_by_its_end_too(tmp_path, tiny_run, run_copy):
    """Only the start and the end of a large file are read; of a run, the step and the weights are part of the identity."""
    found = set()
    for content in (bytes(300_000), bytes(299_999) + b"x", bytes(300_001)):
        (tmp_path / "model.safetensors").write_bytes(content)
        found.add(identify_base(str(tmp_path)).fingerprint)
    assert len(found) == 3
    assert len({identify_base(str(tiny_run), step).fingerprint for step in (100, 120, "latest")}) == 2
    again, config = str(run_copy), run_copy / "config.yaml"
    before = [identify_base(again, 120, form) for form in (1, 2)]
    (run_copy / "files.json").unlink()  # lists the file that is changed here
    config.write_text(config.read_text().replace("log_every: 1", "log_every: 5"))
    assert [identify_base(again, 120, form) == before[form - 1] for form in (1, 2)] == [False, True]
    (sums,) = (run_copy / "checkpoints" / "120").glob("whole-*")
    sums.write_text(sums.read_text().replace("[", "[1", 1))
    assert identify_base(again, 120) != before[1]


def test_exports_give_the_same_network(run, base, tiny_config, tmp_path, model, ran):
    """Exports adapters merged into one checkpoint, and alone in PEFT's format for the same base."""
    merged, alone = tmp_path / "merged", tmp_path / "adapter"
    ran(f"export --checkpoint {run} --out {merged}")
    for flags, code in (("", 0), ("", 2), ("--overwrite", 0)):
        ran(f"export --checkpoint {run} --format adapter --out {alone} {flags}", code)
    assert (merged / "modeling_llada.py").read_text() == (base / "modeling_llada.py").read_text()
    assert json.loads((merged / "generation_config.json").read_text())["temperature"] == 0.5
    assert not (alone / "modeling_llada.py").exists()
    ids = np.random.default_rng(0).integers(0, model.arch.vocab_size, (2, 9))
    want, whole, again = model.logits(ids), jaxblock.load(merged), jaxblock.load(alone, base=base)
    np.testing.assert_allclose(whole.logits(ids), want, atol=2e-5)
    np.testing.assert_array_equal(again.logits(ids), want)
    assert again.stop_ids == model.stop_ids and again.encoder.prompt("3+4?") == model.encoder.prompt("3+4?")
    # On other weights of the same shapes they are other answers: refused, or at least known as another model.
    other = shutil.copytree(base, tmp_path / "other")
    (file,) = other.glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-4] + bytes(4))
    with pytest.raises(UserError, match=r"other is not the base that the adapters in .* were trained on"):
        jaxblock.load(alone, base=other)
    (alone / "adapter_base.json").unlink()
    known = [jaxblock.load(alone, base=folder).weights_fingerprint() for folder in (base, other)]
    assert known[0] != known[1] and known[0] == again.weights_fingerprint()
    # A run that trains the whole network starts from them merged.
    flags = f"--train.out {tmp_path / 'full'} --model.init_from {run}"
    begun = _flat(runs.session(runs.config(tiny_config, *flags.split())).state.params)
    for path, leaf in _flat(whole.params).items():
        np.testing.assert_allclose(begun[path], leaf, rtol=0, atol=1e-6, err_msg=path)


@pytest.mark.slow
def test_int8_trains_on_a_run_and_exports_the_whole_base(tiny_run, tiny_config, start, tmp_path, ran):
    out, small = tmp_path / "run", "--lora.targets q --lora.dropout 0 --optimizer.ema 0"  # it compiles in half the time
    ran(_train(tiny_config, tiny_run, out, f"--model.quantize int8 {small}"))
    losses = [row["loss"] for row in runs.rows(out)]
    assert len(losses) == 4 and np.isfinite(losses).all()
    model, whole = jaxblock.load(out), jaxblock.load(out, quantize="none")
    assert model.net.quantize == "int8" and flatten(model.params)["blocks/q"].dtype == np.int8
    got, want = (np.asarray(m.logits([[5, 6, 7, 8]])) for m in (model, whole))
    assert 0 < np.abs(got - want).max() < 0.1 * np.abs(want).max()
    with pytest.raises(UserError, match="load it with quantize none"):
        model.save(tmp_path / "never")
    ran(f"export --checkpoint {out} --out {tmp_path / 'merged'}")
    merged = _flat(jaxblock.load(tmp_path / "merged").params)
    np.testing.assert_array_equal(merged["embed"], start["embed"], strict=True)
    pair = jax.device_get(model.params["lora"]["blocks"]["q"])
    want = start["blocks/q"] + pair["a"] @ pair["b"] * (8 / 2)
    assert np.abs(want - start["blocks/q"]).max() > 1e-3
    np.testing.assert_allclose(merged["blocks/q"], want, atol=1e-6)  # int8's rounding is nowhere in it
