"""Models on many devices, and on two processes, score, decode and export as they do on one device."""

import dataclasses
import io
import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import jaxblock
from jaxblock import loading
from jaxblock.cli import config_of, main, parse
from jaxblock.commands import harness
from jaxblock.models.families import registry
from jaxblock.models.linear import lora
from jaxblock.models.spec import flatten
from jaxblock.parallel import rows, rules
from jaxblock.parallel.mesh import make_mesh
from jaxblock.training.config import TrainConfig
from tests import runs

ROOT = Path(__file__).parents[1]
PROMPTS = [[5, 6, 7], [8, 9, 10, 11], [12, 13], [7, 7, 5], [6, 14, 9]]
"""Five rows, which eight devices cannot share evenly."""


@pytest.fixture(scope="module")
def folders(tiny_config, tiny_export, tmp_path_factory):
    """Returns folders of full weights, of runs of adapters that split weights over 8 devices, and of adapters alone."""
    home = tmp_path_factory.mktemp("many")
    flags = f"--model.init_from {tiny_export} --train.out {home}/lora --train.steps 2 --train.fsdp 8 --lora.rank 2"
    assert main(["train", "--config", str(tiny_config), *flags.split(), *runs.QUIET]) == 0
    int8 = shutil.copytree(home / "lora", home / "int8", ignore=shutil.ignore_patterns("files.json"))
    text = (int8 / "config.yaml").read_text()
    assert "quantize: none" in text
    (int8 / "config.yaml").write_text(text.replace("quantize: none", "quantize: int8"))
    jaxblock.load(home / "lora").save_adapter(home / "adapter")
    return {"full": tiny_export, **{name: home / name for name in ("lora", "int8", "adapter")}}


def _check_places(model: jaxblock.Model) -> None:
    """Asserts that the weights are split over the eight devices as training splits them."""
    table = dict(model.net.param_table)
    if model.net.lora is not None:
        adapters = lora.adapter_table(registry.param_table(model.arch), model.net.lora)
        table |= {f"{lora.KEY}/{path}": spec for path, spec in adapters.items()}
    params = flatten(model.params)
    mesh = params["embed"].sharding.mesh
    assert params.keys() == table.keys() and mesh.size == 8 and mesh.shape["fsdp"] > 1
    for path, where in flatten(rules.param_shardings(mesh, table)).items():
        assert params[path].sharding.is_equivalent_to(where, params[path].ndim), path
    for name in ("embed", "blocks/q", "blocks/down"):
        assert params[name].addressable_shards[0].data.size == params[name].size // mesh.shape["fsdp"], name


@pytest.mark.parametrize("kind", ["lora", "int8", "full", "adapter"])
def test_weights_are_split_and_logits_and_likelihoods_are_those_of_one_device(folders, kind):
    one, many = (jaxblock.load(folders[kind], mesh=mesh) for mesh in (None, make_mesh(2, 4)))
    assert all(len(leaf.sharding.device_set) == 1 for leaf in jax.tree.leaves(one.params))
    _check_places(many)
    jax.tree.map(np.testing.assert_array_equal, one.params, many.params)
    if kind in ("lora", "int8"):  # the others have the same weights
        ids = np.random.default_rng(0).integers(0, one.arch.vocab_size, (3, 9))
        np.testing.assert_allclose(many.logits(ids), one.logits(ids), rtol=0, atol=1e-5)
    if kind == "lora":
        for ours, theirs in zip(many.nelbo(PROMPTS, PROMPTS), one.nelbo(PROMPTS, PROMPTS), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)
        _check_places(many.merged())


def test_devices_that_no_run_names_split_what_divides(folders, monkeypatch):
    _check_places(jaxblock.load(folders["full"], mesh="all"))
    arch = jaxblock.load(folders["lora"]).arch

    def split(fsdp: int) -> tuple[int, int]:
        shape = loading._all_devices(arch, dataclasses.replace(TrainConfig(), fsdp=fsdp)).shape
        return shape["data"], shape["fsdp"]

    assert split(2) == (4, 2)  # where the run's own settings fit the devices, they decide
    monkeypatch.setattr(jax, "devices", lambda: jax.local_devices()[:6])
    assert split(8) == (3, 2)  # fsdp 8 does not fit; 16 columns divide by 2


def test_chat_and_harness_load_on_all_devices(tiny_run, monkeypatch, ran):
    load, loaded = loading.load, []
    monkeypatch.setattr(loading, "load", lambda *args, **options: loaded.append(load(*args, **options)) or loaded[-1])
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO()))
    ran(f"chat --checkpoint {tiny_run}")
    options = parse("harness", ["--checkpoint", str(tiny_run), "--tasks", "sums"])
    harness._model(options, config_of(options))  # what the verb loads, without lm-eval, which may not be installed
    assert [rows.mesh_of(model.params).size for model in loaded] == [8, 8]


def _commands(config: Path, folders: dict[str, Path], out: Path, *decoded: str) -> list[list[str]]:
    """Returns command lines of the verbs that load a model, which write into a folder; the named kinds are decoded."""
    decode = "1+2? 7+5? 9+9? 0+1? --decode.batch_size 3"
    lines = [f"decode --checkpoint {folders[k]} {decode} --config {config} --out {out / k}.jsonl" for k in decoded]
    lines.append(f"evaluate --checkpoint {folders['lora']} --config {config} --out {out}/scores --evaluate.problems 5")
    for kind, flags in (("full", "whole"), ("lora", "merged"), ("lora", "alone --format adapter")):
        lines.append(f"export --checkpoint {folders[kind]} --out {out}/{flags}")
    return [shlex.split(line) for line in lines]


@pytest.fixture(scope="module")
def on_one_device(tiny_config, folders, tmp_path_factory):
    """Returns the folder of what the verbs write on one device."""
    out = tmp_path_factory.mktemp("one")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loading, "_all_devices", lambda arch, train: None)
        assert [main(command) for command in _commands(tiny_config, folders, out, "lora")] == [0] * 5
    return out


def _check_same(out: Path, expected: Path) -> None:
    """Asserts that the verbs wrote the same: text and tokens exactly, NELBO and merged weights up to rounding."""
    ours, theirs = (json.loads((folder / "scores" / "summary.json").read_text()) for folder in (out, expected))
    assert len(ours["devices"]) == 8
    assert ours["nelbo_per_token"]["mean"] == pytest.approx(theirs["nelbo_per_token"]["mean"], rel=1e-5)
    np.testing.assert_allclose(ours["nll_by_masked_count"], theirs["nll_by_masked_count"], rtol=1e-5)
    names = {str(file.relative_to(expected)) for file in expected.rglob("*") if file.is_file()}
    for name in names - {"scores/summary.json", "merged/model.safetensors"}:
        assert (out / name).read_bytes() == (expected / name).read_bytes(), name
    ours, theirs = (flatten(jaxblock.load(folder / "merged").params) for folder in (out, expected))
    for path, leaf in theirs.items():
        np.testing.assert_allclose(ours[path], leaf, rtol=0, atol=2e-6 * np.abs(leaf).max(), err_msg=path)


@pytest.mark.slow
def test_the_verbs_use_all_devices_and_write_what_one_device_writes(
    tiny_config, folders, on_one_device, tmp_path, monkeypatch
):
    load, loaded = loading.load, []
    monkeypatch.setattr(loading, "load", lambda *args, **options: loaded.append(load(*args, **options)) or loaded[-1])
    assert [main(command) for command in _commands(tiny_config, folders, tmp_path, "lora")] == [0] * 5
    assert len(loaded) == 5
    for model in loaded:
        _check_places(model)
    _check_same(tmp_path, on_one_device)


IN_TURN = "import json, sys; from jaxblock.cli import main; sys.exit(max(main(v) for v in json.loads(sys.argv[1])))"


@pytest.mark.slow
def test_two_processes_write_what_one_device_writes(tiny_config, folders, on_one_device, tmp_path, monkeypatch):
    """Two processes of four devices each hold an eighth of the weights per device, so neither has a whole tensor."""
    commands = _commands(tiny_config, folders, tmp_path, "full", "lora", "int8")
    bare = ["decode", "--checkpoint", str(folders["lora"]), "--config", str(tiny_config)]
    commands += [[*bare, "1+2?"], [*bare, "1+2?", "--watch"], bare]  # the last, without prompts, is a mistake
    group = [ROOT / "launch" / "local_pod.sh", "2", "--devices", "4", "--", sys.executable, "-c", IN_TURN]
    done = subprocess.run([*group, json.dumps(commands)], cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 2 and "cannot share standard input" in done.stderr, done.stderr
    _check_same(tmp_path, on_one_device)
    monkeypatch.setattr(loading, "_all_devices", lambda arch, train: None)
    for command in _commands(tiny_config, folders, tmp_path / "one", "full", "int8")[:2]:
        assert main(command) == 0
        written = Path(command[command.index("--out") + 1])
        assert written.read_text() == (tmp_path / written.name).read_text()
    lines = done.stdout.splitlines()
    assert lines and not [line for line in lines if not line.startswith("[0] ")]  # one process speaks for all
    first = json.loads((on_one_device / "lora.jsonl").read_text().splitlines()[0])
    assert f"[0] {json.dumps(first, ensure_ascii=False)}" in lines
    assert any(f"NFE {first['nfe']}" in line for line in lines)
    assert done.stderr.count("decoded 5 of 5") == 1
