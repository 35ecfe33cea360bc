"""Compiles LLaDA-8B for TPU slices by libtpu, and compares what the plan says with arithmetic."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxblock.config.checks import check_config
from jaxblock.config.config import Config
from jaxblock.config.yaml import load_config
from jaxblock.errors import UserError
from jaxblock.fit import sizes, topology
from jaxblock.fit.process import plan_in_process
from jaxblock.models.architecture import Architecture
from jaxblock.models.families import registry
from jaxblock.models.linear import lora
from jaxblock.models.spec import count_params
from jaxblock.parallel.mesh import make_mesh

pytestmark = pytest.mark.slow

CONFIG = Path(__file__).parents[2] / "configs" / "llada_8b_lora.yaml"
CHIPS, ROWS, VOCAB = 8, 64, 126464


@pytest.fixture(scope="module", autouse=True)
def with_little_effort() -> Iterator[None]:
    """Makes libtpu optimise little, in a third of the time; operations, arguments and bytes sent do not change (docs/plan.md)."""
    pytest.importorskip("libtpu")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_EXEC_TIME_OPTIMIZATION_EFFORT", "-1.0")
        yield


def _settled(file: Path, rows: int) -> tuple[Config, Architecture]:
    config = check_config(load_config(str(file)))
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, batch_size=rows))
    return config, sizes.planned_architecture(config, None)[0]


@pytest.fixture(scope="module")
def run() -> tuple[Config, Architecture]:
    return _settled(CONFIG, ROWS)


@pytest.fixture(scope="module")
def plan(run: tuple[Config, Architecture]) -> dict[str, Any]:
    return plan_in_process(run[0], "v6e-8", decoder=False)


def _trained(config: Config, arch: Architecture) -> int:
    """Counts the adapters' parameters."""
    adapters = lora.lora_from_config(config.lora, registry.param_table(arch))
    assert adapters is not None
    return count_params(lora.adapter_table(registry.param_table(arch), adapters))


def test_memory_is_that_of_the_shapes_and_fits(plan, run):
    state = (2 * count_params(registry.param_table(run[1])) + 12 * _trained(*run)) / CHIPS
    assert plan["train"]["memory"]["arguments"] == pytest.approx(state, rel=0.01)
    # Layers' inputs of a chip's rows are 1 GiB, the gathered head is another.
    assert 2 * 2**30 < plan["train"]["memory"]["temporaries"] < 4 * 2**30
    assert plan["fits"] and not plan["estimate_from_host"]


def test_operations_are_three_passes_over_the_layers(plan, run):
    """The passes are forward, forward again, and backward to the inputs: frozen weights have no gradients of their own."""
    _, arch = run
    down = arch.n_layers * arch.d_model * arch.mlp_dim  # its output is not needed again
    tokens = ROWS / CHIPS * 512
    expected = 2 * tokens * (3 * _layers(arch) - down)
    assert expected < plan["train"]["flops"] < 1.1 * expected  # the rest: adapters, attention, the head


def test_what_is_sent_is_weights_not_logits(plan, run):
    """Every weight is gathered once forward and once backward, the head once for both; adapters' gradients are summed."""
    arch, trained = run[1], _trained(*run)
    gathered = 2.0 * (2 * _layers(arch) + _head(arch)) + 2 * 2.0 * trained
    _near_the_least(plan, gathered + 4.0 * trained, CHIPS)
    for one in plan["train"]["collectives"]:
        for shape in one["shapes"]:
            # The vocabulary's only large traveller is the head itself; logits and their cotangents stay where they are.
            dims = [int(d) for d in shape.split("[")[1].rstrip("]").split(",") if d]
            assert VOCAB not in dims or arch.d_model in dims, one


def test_full_fine_tuning_scatters_its_gradients():
    """Plans for 64 chips, where XLA by itself would use all-reduces, which send twice the bytes."""
    config, arch = _settled(CONFIG.with_name("llada_8b_full.yaml"), 8 * 64)
    plan = plan_in_process(config, "v6e-64", decoder=False)
    weights = 2.0 * (_layers(arch) + _head(arch))
    _near_the_least(plan, 2.0 * (2 * _layers(arch) + _head(arch)) + weights, 64)
    # Rows of 8 x 8 chips, then columns: every first stage is a reduce-scatter, 7/8 of the gradients' bytes by itself.
    assert plan["train"]["sent"]["reduce-scatter"] >= 7 / 8 * weights


def test_a_slice_of_the_mesh_is_a_slice_of_chips():
    """Only gradients may cross the data-centre network, so all chips along the other axes must be of one slice."""
    chips = list(topology.devices_to_compile_for(topology.parse_topology("2xv5e-16")))
    mesh = make_mesh(2, 4, 2, slices=2, devices=chips)
    found = [{chip.slice_index for chip in mesh.devices[at].flat} for at in range(2)]
    assert sorted(map(len, found)) == [1, 1] and found[0] != found[1]
    with pytest.raises(UserError, match=r"train.slices is 4, but these devices are of 2 slices"):
        make_mesh(2, 4, 1, slices=4, devices=chips)


@pytest.mark.parametrize("name, mesh", [("v6e-64", (1, 32, 2)), ("v6e-64", (1, 64, 1)), ("v5p-8", (1, 2, 2))])
def test_an_axis_may_split_a_side_of_the_slice(name, mesh):
    """Tensor groups of two on 8 x 8 chips must be neighbours, one link apart."""
    placed = make_mesh(*mesh, devices=list(topology.devices_to_compile_for(topology.parse_topology(name)))).devices
    groups = np.array([chip.coords for chip in placed.flat]).reshape(*placed.shape, -1)
    assert len({chip.id for chip in placed.flat}) == placed.size
    assert (np.abs(np.diff(groups, axis=3)).sum(-1) == 1).all()


def _layers(arch: Architecture) -> int:
    return count_params(registry.param_table(arch)) - 2 * VOCAB * arch.d_model


def _head(arch: Architecture) -> int:
    return VOCAB * arch.d_model


def _near_the_least(plan: dict[str, Any], size: float, chips: int) -> None:
    """Asserts that a chip sends hardly more than the least: what it does not hold itself, as much as it gets."""
    least = size * (chips - 1) / chips
    sent = sum(plan["train"]["sent"].values())
    assert least < sent < 1.1 * least
