"""Compiles LLaDA-8B for TPU slices by libtpu, and compares what the plan says with arithmetic."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from jaxblock.config.checks import check_config
from jaxblock.config.yaml import load_config
from jaxblock.errors import UserError
from jaxblock.fit import sizes, topology
from jaxblock.fit.process import plan_in_process
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


class Planned:
    """The plan of a preset, and the parameters that it moves."""

    def __init__(self, file: Path, rows: int, topology: str) -> None:
        config = check_config(load_config(str(file)))
        config = dataclasses.replace(config, train=dataclasses.replace(config.train, batch_size=rows))
        self.arch, _ = sizes.planned_architecture(config, None)
        self.plan = plan_in_process(config, topology, decoder=False)
        table = registry.param_table(self.arch)
        self.all, self.head = count_params(table), VOCAB * self.arch.d_model
        self.layers = self.all - 2 * self.head
        adapters = lora.lora_from_config(config.lora, table)
        self.adapters = 0 if adapters is None else count_params(lora.adapter_table(table, adapters))

    def check_sent(self, size: float, chips: int) -> None:
        """Asserts that a chip sends hardly more than the least: what it does not hold itself, as much as it gets."""
        least = size * (chips - 1) / chips
        assert least < sum(self.plan["train"]["sent"].values()) < 1.1 * least


def test_adapters_take_the_memory_operations_and_bytes_that_the_shapes_say():
    found = Planned(CONFIG, ROWS, "v6e-8")
    train, memory = found.plan["train"], found.plan["train"]["memory"]
    assert memory["arguments"] == pytest.approx((2 * found.all + 12 * found.adapters) / CHIPS, rel=0.01)
    # Layers' inputs of a chip's rows are 1 GiB, the gathered head is another.
    assert 2 * 2**30 < memory["temporaries"] < 4 * 2**30
    assert found.plan["fits"] and not found.plan["estimate_from_host"]
    # The passes are forward, forward again, and backward to the inputs: frozen weights have no gradients of their own.
    down = found.arch.n_layers * found.arch.d_model * found.arch.mlp_dim  # its output is not needed again
    expected = 2 * ROWS / CHIPS * 512 * (3 * found.layers - down)
    assert expected < train["flops"] < 1.1 * expected  # the rest: adapters, attention, the head
    # Every weight is gathered once forward and once backward, the head once for both; adapters' gradients are summed.
    found.check_sent(2.0 * (2 * found.layers + found.head) + (2 * 2.0 + 4.0) * found.adapters, CHIPS)
    for one in train["collectives"]:
        for shape in one["shapes"]:
            # The vocabulary's only large traveller is the head itself; logits and their cotangents stay where they are.
            dims = [int(d) for d in shape.split("[")[1].rstrip("]").split(",") if d]
            assert VOCAB not in dims or found.arch.d_model in dims, one


def test_full_fine_tuning_scatters_its_gradients():
    """Plans for 64 chips, where XLA by itself would use all-reduces, which send twice the bytes."""
    found = Planned(CONFIG.with_name("llada_8b_full.yaml"), 8 * 64, "v6e-64")
    weights = 2.0 * (found.layers + found.head)
    found.check_sent(2.0 * (2 * found.layers + found.head) + weights, 64)
    # Rows of 8 x 8 chips, then columns: every first stage is a reduce-scatter, 7/8 of the gradients' bytes by itself.
    assert found.plan["train"]["sent"]["reduce-scatter"] >= 7 / 8 * weights


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
