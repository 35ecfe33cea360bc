"""Tests plans: costs read off programs, topologies, meshes, what is advised, and the verb from end to end."""

import dataclasses
import json
import threading
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import jax
import jax.numpy as jnp
import pytest

from jaxblock.config.config import Config
from jaxblock.diffusion.config import CanvasConfig, MethodConfig
from jaxblock.errors import UserError
from jaxblock.fit import memory, process, programs, sizes, topology
from jaxblock.fit.advice import Trial, advise
from jaxblock.fit.compile import check_fits
from jaxblock.fit.costs import count_costs
from jaxblock.fit.hlo import parse_program
from jaxblock.fit.memory import CompileResult
from jaxblock.fit.placement import place_run
from jaxblock.fit.plan import plan_run
from jaxblock.fit.transfers import COLLECTIVE_KINDS
from jaxblock.models.config import LoraConfig, ModelConfig
from jaxblock.models.families import registry
from jaxblock.parallel.mesh import make_mesh
from jaxblock.training.config import TrainConfig
from jaxblock.training.observe.device_memory import MemoryPlan, device_limit

SMALL = Config(
    canvas=CanvasConfig(16, 16, 4),
    model=ModelConfig(d_model=64, n_layers=2, n_heads=2, mlp_dim=128),
    train=TrainConfig(batch_size=32, data_parallel=8, fsdp=1),
)
ARCH = registry.architecture_from_config(SMALL.model, vocab_size=512, mask_id=511, eos_id=510)


PROGRAM = (Path(__file__).parents[1] / "fixtures" / "by_hand.hlo").read_text()


def test_loops_and_collectives_of_a_program_by_hand():
    found = count_costs(parse_program(PROGRAM), 4)
    # The outer loop runs from 1 to 32, the inner one from 0 to 4 by twos; a kernel's attributes do not end a computation.
    assert found.flops == 31 * 2 * (2 * 8 * 8 * 8)
    assert found.sent("reduce-scatter") == 31 * (8 * 16 * 4) * 3 / 4
    assert found.sent("all-gather") == 16 * 8 * 2 * 3 / 4  # once, although its channel is in two fusions
    assert found.sent("all-reduce") == 2 * (8 * 16 * 4) / 2  # of the pairs along y
    assert found.sent("collective-permute") == 8 * 16 * 4
    assert found.across == 8 * 16 * 4
    assert found.sent() == sum(found.sent(kind) for kind in COLLECTIVE_KINDS)
    (scatter,) = [one for one in found.collectives if one.kind == "reduce-scatter"]
    assert (scatter.times, scatter.group) == (31, 4)
    # A length that the compiler has noted is believed.
    noted = PROGRAM.replace("body=%outer_body", 'body=%outer_body, backend_config={"known_trip_count":{"n":"5"}}')
    assert count_costs(parse_program(noted), 4).sent("reduce-scatter") == 5 * (8 * 16 * 4) * 3 / 4


@pytest.mark.parametrize(
    "line, flops",
    [
        # A product of [512, 4096] and [4096, 64]; with a batch of 32 as a spatial dimension; padded taps do not count.
        ("bf16[512,64] convolution(%l, %r), dim_labels=bf_io->bf", 2 * 512 * 4096 * 64),
        ("f32[6,2,3] convolution(%p, %q), window={size=3 pad=1_1}, dim_labels=b0f_0io->b0f", 2 * 6 * 4 * 5 * 3),
    ],
)
def test_products_that_are_written_as_convolutions(line, flops):
    text = f"""\
ENTRY %main (l: bf16[512,4096]) -> f32[] {{
  %l = bf16[512,4096]{{1,0}} parameter(0)
  %r = bf16[4096,64]{{1,0}} parameter(1)
  %p = f32[6,2,5]{{2,1,0}} parameter(2)
  %q = f32[3,5,3]{{2,1,0}} parameter(3)
  ROOT %c = {line}
}}
"""
    assert count_costs(parse_program(text), 1).flops == flops


def test_a_scan_counts_all_its_layers():
    """XLA's own analysis counts a loop's body once, which is why costs are read off the program's text."""

    def layers(x: jax.Array, w: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]

    compiled = jax.jit(layers).lower(jnp.zeros((16, 64)), jnp.zeros((7, 64, 64))).compile()
    found = count_costs(parse_program(compiled.as_text()), 1)
    assert found.flops == 7 * 2 * 16 * 64 * 64
    weights = 7 * 64 * 64 * 4
    # Each layer reads its own slice, not the stack (seven times as much); a slice may be written and read once more.
    assert weights <= found.traffic < 5 * weights


def test_names_of_topologies():
    names = ("v5e-16", "v6e-8", "v5p-8", "2xv5e-256", "h200-1", "cpu-8")
    found = [(t.devices, t.shape, t.is_estimate) for t in map(topology.parse_topology, names)]
    assert found == [
        (16, "4x4", False), (8, "2x4", False), (4, "2x2x1", False), (512, "16x16", False), (1, "", True), (8, "", True),
    ]  # fmt: skip
    for wrong in ("v7-8", "v5e-12", "v5e", "2xh100-8", "h100-16", "2xv5p-8", "v5p-5", "0xv5e-16", "cpu-0"):
        with pytest.raises(UserError, match="topology"):
            topology.parse_topology(wrong)


def test_the_mesh_is_the_configs_or_all_chips():
    def settled(name: str, **fields: Any) -> tuple[TrainConfig, list[str]]:
        given = dataclasses.replace(SMALL, train=TrainConfig(**fields))
        config, notes = place_run(given, topology.parse_topology(name))
        return config.train, notes

    train, notes = settled("2xv5e-16", batch_size=40)
    assert (train.slices, train.data_parallel, train.fsdp, train.tensor, train.batch_size) == (2, 1, 16, 1, 64)
    assert len(notes) == 3 and "--train.fsdp 16" in notes[0] and "--train.batch_size 64" in notes[2]
    assert settled("v5e-16", batch_size=64, fsdp=4, tensor=2)[0].data_parallel == 2
    with pytest.raises(UserError, match="16 chips"):
        settled("v5e-16", fsdp=32)


def test_where_sizes_are_from(tmp_path):
    def planned(start: str, given: Path | None) -> tuple[int, str]:
        config = dataclasses.replace(SMALL, model=ModelConfig(init_from=start))
        arch, source = sizes.planned_architecture(config, given and str(given))
        return arch.n_layers, source

    layers, source = planned("GSAI-ML/LLaDA-8B-Instruct", None)
    assert layers == 32 and "published" in source
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**sizes.PUBLISHED["GSAI-ML/LLaDA-8B-Base"], "n_layers": 3}))
    assert [planned("GSAI-ML/LLaDA-8B-Instruct", given)[0] for given in (path, tmp_path)] == [3, 3]
    with pytest.raises(UserError, match="--model_config"):
        planned("some/model", None)


def _flags(config: Config, needs: Any, tries: int = 9) -> tuple[list[str], str | None]:
    tried, found = advise(config, 8, 8, lambda c: Trial(needs(c), needs(c) <= 10, compiled=needs(c) < 99), tries)
    return [one.flags for one in tried], found.flags if found else None


def test_the_cheapest_change_that_is_enough_is_advised():
    split = "--train.fsdp 8 --train.data_parallel 1"
    assert _flags(SMALL, lambda c: 20 // c.train.fsdp) == ([split], split)
    tried, found = _flags(SMALL, lambda c: 20 if c.model.remat != "full" else 10)
    assert found == "--model.remat full" and len(tried) == 2
    # None alone: the first that are enough together.
    tried, found = _flags(SMALL, lambda c: 20 - 6 * (c.train.fsdp == 8) - 6 * (c.model.remat == "full"))
    assert found == f"{split} --model.remat full"
    # What cannot be helped is found out within the tries, and arguments that are too large cost none.
    tried, found = _flags(SMALL, lambda c: 50, tries=3)
    assert found is None and len(tried) == 3
    assert len(_flags(SMALL, lambda c: 99, tries=1)[0]) > 5
    # Only what the run has left is tried.
    train, model = TrainConfig(batch_size=8, fsdp=8, data_parallel=1), ModelConfig(init_from="x", remat="full")
    frozen = dataclasses.replace(SMALL, model=model, lora=LoraConfig(8), method=MethodConfig("classical"), train=train)
    assert _flags(frozen, lambda c: 50)[0][:4] == [
        "--model.loss_chunk 16", "--model.quantize int8", "--model.remat offload",
        "--model.loss_chunk 16 --model.quantize int8",
    ]  # fmt: skip


def test_what_a_compiler_says_of_memory():
    gib, hbm = 2.0**30, "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm."
    found = memory.memory_of_error(f"{hbm} Used 20.5G of 15.75G hbm.", gib)
    assert (found.total, found.limit, found.arguments) == (20.5 * gib, 15.75 * gib, gib)
    required = "the total memory required for HLO temporaries (26.84G) exceeds available HBM (15.75G)."
    found = memory.memory_of_error(f"RESOURCE_EXHAUSTED: Ran out of memory on HBM, {required}", gib)
    assert (found.total, found.temporaries) == (pytest.approx(27.84 * gib), pytest.approx(26.84 * gib))
    assert memory.memory_of_error("INTERNAL: something else", 0.0) is None


@pytest.mark.slow
def test_training_that_cannot_fit_is_refused_with_what_helps():
    mesh = make_mesh(8)
    step = programs.train_program(SMALL, ARCH, mesh)
    built = CompileResult(Mock(), step.memory)
    check_fits(built, None, SMALL, ARCH, mesh, print)  # nothing to compare with
    check_fits(built, built.memory.total, SMALL, ARCH, mesh, print)
    said: list[str] = []
    with pytest.raises(UserError, match=r"needs .* of a device.* compiled and fits .*--train.fsdp 8"):
        check_fits(built, 0.7 * built.memory.total, SMALL, ARCH, mesh, said.append)
    assert len(said) == 2  # what is wrong, and the one change that was compiled
    with pytest.raises(UserError, match=r"None of these is enough"):
        check_fits(CompileResult(None, built.memory._replace(limit=1000.0)), None, SMALL, ARCH, mesh, print)
    offload = dataclasses.replace(SMALL, model=dataclasses.replace(SMALL.model, remat="offload"))
    assert "activations" not in programs.train_program(offload, ARCH, mesh).parts  # the host's
    assert step.parts["activations"] == kept("none")


def kept(remat: str, rows: int = 4) -> float:
    model = dataclasses.replace(SMALL.model, remat=remat)
    return programs.activations(dataclasses.replace(SMALL, model=model), ARCH, rows, "cpu")


def test_what_is_kept_for_the_backward_pass():
    inputs, logits = 2 * 4 * 32 * 64 * 4, 4 * 4 * 512 * 4
    least, everything = kept("full"), kept("none")
    assert inputs + logits <= least < inputs + 5 * logits  # ids, positions, and the head's own inputs
    assert least < kept("dots") < everything
    assert kept("none", rows=8) == pytest.approx(2 * everything, rel=0.01)


def test_a_plan_is_held_against_what_the_device_reports():
    """A CPU reports nothing."""
    device, cpu = Mock(spec=jax.Device), jax.devices("cpu")[0]
    device.memory_stats.return_value = {"bytes_limit": 4 * 2**30, "peak_bytes_in_use": 7 * 2**29}
    plan = MemoryPlan(3.0 * 2**30, device_limit(device))
    assert "3.00 GiB of the 4.00 GiB" in plan.describe()
    assert "3.00 GiB of a device; at its peak 3.50 GiB" in plan.compare(device)
    assert plan._replace(limit=device_limit(cpu)).describe() is plan.compare(cpu) is None


def test_a_plan_says_for_how_long_it_compiles():
    ended, said = threading.Event(), list[str]()
    process._show_time(ended, lambda text: (said.append(text), len(said) == 2 and ended.set()), every=0.001)
    assert len(said) == 2 and all(text.startswith("still compiling: 0 s") for text in said)


@pytest.mark.parametrize("apart", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_verb(apart, tiny_config, tmp_path, ran, monkeypatch):
    """Plans in this process, which has eight devices as well, or in a process apart as users do."""
    if not apart:
        here = lambda config, name, **options: plan_run(config, topology.parse_topology(name), **options)  # noqa: E731
        monkeypatch.setattr(process, "plan_in_process", here)
    out, sizes = tmp_path / "plan.json", tmp_path / "config.json"
    own = ModelConfig(d_model=16, n_layers=1, n_heads=2, mlp_dim=32, tie_embeddings=True)
    arch = registry.architecture_from_config(own, vocab_size=300, mask_id=299, eos_id=298)
    sizes.write_text(json.dumps(registry.to_hf(arch, "float32")))
    command = f"plan --config {tiny_config} --topology cpu-8 --model_config {sizes} --train.fsdp"
    shown = ran(f"{command} 8 --json {out}").out
    for word in ("ESTIMATE", "optimizer state", "temporaries", "logits", "it fits", "all-gather"):
        assert word in shown, word
    plan = json.loads(out.read_text())
    assert plan["notes"] == ["model.n_layers is 2 (the checkpoint's is 1)"]
    assert plan["fits"] and plan["estimate_from_host"] and plan["mesh"]["fsdp"] == 8
    train, parts = plan["train"], plan["train"]["parts"]
    # AdamW: two moments of what is trained, in float32.
    assert parts["optimizer state"] == pytest.approx(2 * parts["parameters"], abs=64)
    # A device's temporaries are not far below what shapes say.
    assert train["memory"]["temporaries"] > 0.5 * (parts["activations"] + parts["gradients"])
    assert train["flops"] > 0 and plan["decode"]["flops"] > 0
    ran(f"{command} 8 --json {out}", 2)  # never overwritten
    assert "8 chips" in ran(f"{command} 3", 2).err
