"""LLaDA-8B with LoRA, compiled for a TPU slice by libtpu: what the plan says of it, against arithmetic."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest

from jaxblock import config_io, wiring
from jaxblock.config import Config
from jaxblock.models import families, lora
from jaxblock.models.params import Architecture, count
from jaxblock.plan import command, sizes

pytestmark = pytest.mark.slow

CONFIG = Path(__file__).parents[2] / "configs" / "llada_8b_lora.yaml"
CHIPS, ROWS, VOCAB = 8, 8, 126464


@pytest.fixture(scope="module")
def run() -> tuple[Config, Architecture]:
    config = config_io.validate(config_io.load(str(CONFIG)))
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, batch_size=ROWS))
    return config, sizes.architecture(config, None)[0]


@pytest.fixture(scope="module")
def plan(run: tuple[Config, Architecture]) -> dict[str, Any]:
    pytest.importorskip("libtpu")
    return command.run(run[0], "v6e-8", decoder=False)


def test_memory_is_that_of_the_shapes_and_fits(plan: dict[str, Any], run: tuple[Config, Architecture]) -> None:
    config, arch = run
    adapters = wiring.adapters(config.lora, arch)
    assert adapters is not None
    trained = count(lora.table(families.table(arch), adapters))
    state = (2 * count(families.table(arch)) + 12 * trained) / CHIPS
    assert plan["train"]["memory"]["arguments"] == pytest.approx(state, rel=0.01)
    # Layers' inputs of one row are 128 MiB; the gathered head is 1 GiB.
    assert 2**30 < plan["train"]["memory"]["temporaries"] < 3 * 2**30
    assert plan["fits"] and not plan["estimate_from_host"]


def test_operations_are_three_passes_over_the_layers(plan: dict[str, Any], run: tuple[Config, Architecture]) -> None:
    """Forward, forward again, and backward to the inputs: the frozen weights have no gradients of their own."""
    _, arch = run
    layers = count(families.table(arch)) - 2 * VOCAB * arch.d_model
    down = arch.n_layers * arch.d_model * arch.mlp_dim  # its output is not needed again
    tokens = ROWS / CHIPS * 512
    expected = 2 * tokens * (3 * layers - down)
    assert expected < plan["train"]["flops"] < 1.1 * expected  # the rest: adapters, attention, the head


def test_what_is_sent_is_weights_not_logits(plan: dict[str, Any], run: tuple[Config, Architecture]) -> None:
    """Every weight is gathered forward and backward; docs/plan.md says where the rest above that comes from."""
    _, arch = run
    layers = 2.0 * (count(families.table(arch)) - 2 * VOCAB * arch.d_model)
    head = 2.0 * VOCAB * arch.d_model
    least = (2 * layers + head) * (CHIPS - 1) / CHIPS
    sent = sum(plan["train"]["sent"].values())
    assert least < sent < 1.35 * least
    for one in plan["train"]["collectives"]:
        dims = [int(d) for shape in one["shapes"] for d in shape.split("[")[1].rstrip("]").split(",") if d]
        if one["kind"] == "all-gather" and dims[-1] == VOCAB and arch.d_model not in dims:
            # Backward through the frozen head: its weights or the block's cotangent may be gathered. Only a small block's
            # is worth it; float32 logits never are.
            assert one["shapes"][0].startswith("bf16") and math.prod(dims) < VOCAB * arch.d_model / 8
