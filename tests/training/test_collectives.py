"""What devices say to each other in a compiled step: logits stay where they are, and so do rows.

XLA's CPU backend splits a reduce-scatter into other collectives, so that bytes are counted on programs compiled for TPUs
(tests/fit); what must never be gathered shows here too.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Callable

import jax
import pytest

from jaxblock import build
from jaxblock.config.config import Config
from jaxblock.diffusion.config import CanvasConfig, MethodConfig
from jaxblock.fit.shapes import lower_step, run_shapes
from jaxblock.models.architecture import Architecture
from jaxblock.models.config import LoraConfig, ModelConfig
from jaxblock.models.families import registry
from jaxblock.parallel import rules
from jaxblock.parallel.mesh import make_mesh
from jaxblock.training.config import TrainConfig

VOCAB, D, P, R, ROWS = 4096, 64, 32, 32, 32
ARCH = Architecture(
    "llada", VOCAB, D, n_layers=2, n_heads=4, n_kv_heads=4, head_dim=16, mlp_dim=128, norm_eps=1e-5, rope_theta=1e4,
    max_len=128, tie_embeddings=False, mask_id=7, eos_id=1, pad_id=1, **registry.traits("llada"),
)  # fmt: skip
_GATHERED = re.compile(r"= (.*?) all-gather(?:-start)?\(")
_SHAPE = re.compile(r"\w+\[([\d,]*)\]")


def gathered(text: str) -> list[int]:
    """Elements of every all-gather's results in a compiled program."""
    shapes = _SHAPE.findall(" ".join(_GATHERED.findall(text)))
    return [math.prod(map(int, shape.split(","))) if shape else 1 for shape in shapes]


@pytest.fixture(scope="module")
def program() -> Callable[..., jax.stages.Compiled]:
    @functools.cache
    def compiled(
        mesh: tuple[int, int, int],
        objective: str = "blockwise",
        rank: int = 0,
        chunk: int | None = None,
        remat: str = "none",
        quantize: str = "none",
        draws: int = 1,
    ) -> jax.stages.Compiled:
        config = Config(
            canvas=CanvasConfig(P, R, 8),
            method=MethodConfig(objective=objective, draws=draws),  # type: ignore[arg-type]
            model=ModelConfig(init_from="x", loss_chunk=chunk, remat=remat, quantize=quantize),  # type: ignore[arg-type]
            lora=LoraConfig(rank),
            train=TrainConfig(batch_size=ROWS),
        )
        learner, devices = build.learner(config, ARCH, (ARCH.eos_id,)), make_mesh(*mesh)
        return lower_step(learner, run_shapes(config, learner, devices), devices).compile()

    return compiled


@pytest.fixture(scope="module")
def compiled(program: Callable[..., jax.stages.Compiled]) -> Callable[..., str]:
    return lambda *args, **how: program(*args, **how).as_text() or ""


@pytest.mark.parametrize("objective, chunk", [("blockwise", None), ("classical", 8)])
def test_logits_are_never_gathered(compiled: Callable[..., str], objective: str, chunk: int | None) -> None:
    """Neither over rows (fsdp) nor over the vocabulary (tensor), whatever the loss sees of them."""
    found = gathered(compiled((1, 2, 4), objective, chunk=chunk))
    positions = 8 if objective == "blockwise" or chunk else R
    logits = ROWS * positions * VOCAB  # of all rows; one device's share of rows and words is an eighth
    assert found, "the pattern finds nothing: the text of compiled programs has changed"
    assert max(found) < logits / 8
    # What is gathered is weights: none larger than the largest of them, the head, of which a tensor group has a quarter.
    assert max(found) <= VOCAB * D / 4


@pytest.mark.parametrize("remat", ["none", "dots", "full"])
def test_weights_are_gathered_twice_and_never_kept(compiled: Callable[..., str], remat: str) -> None:
    """Once in the forward loop and once in the backward one, whatever is recomputed; the head once for both."""
    text = compiled((1, 8, 1), remat=remat)
    found = gathered(text)
    assert found.count(D * 128) == 2 * 3  # gate, up and down
    assert found.count(D * D) == 2 * 4  # q, k, v and o
    assert found.count(VOCAB * D) == 1
    assert not _all_layers(text, D, 128)


@pytest.mark.parametrize("quantize", ["none", "int8"])
def test_a_frozen_base_is_gathered_twice_and_never_kept(compiled: Callable[..., str], quantize: str) -> None:
    """Nor does a device keep a second copy of its own part, or an int8 matrix in the type that it is multiplied in."""
    text = compiled((1, 8, 1), rank=2, quantize=quantize)
    found = gathered(text)
    assert found.count(D * 128) == 2 * 3 and found.count(D * D) == 2 * 4
    assert not _all_layers(text, D, 128)
    if quantize == "int8":
        assert re.search(rf"s8\[(1,)?{D},128\]\S* all-gather", text), "what is sent must be a byte a weight"


@pytest.mark.parametrize("rank", [0, 2])
def test_a_device_keeps_its_part_of_the_weights_once(program: Callable[..., jax.stages.Compiled], rank: int) -> None:
    """The backward pass reads the weights where they are. Copies would be a stack of each matrix's own parts."""
    text = program((1, 8, 1), rank=rank).as_text() or ""
    kept = re.findall(rf"dynamic-update-slice\([^)]*f32\[{ARCH.n_layers},{D // 8},128\]", text)
    assert len(kept) <= (0 if rank else 2), kept  # trained weights: the gradients of gate and up


def _all_layers(text: str, n_in: int, n_out: int) -> list[str]:
    """Where a program has all layers' whole matrices of a shape, either way round, as numbers of some width."""
    shapes = f"{n_in},{n_out}|{n_out},{n_in}"
    return re.findall(rf"(?:f32|bf16|s8)\[{ARCH.n_layers},(?:{shapes})\]", text)


def test_several_draws_send_one_gradient(compiled: Callable[..., str]) -> None:
    """The sum over draws is taken on each device, before that over devices."""
    text = compiled((8, 1, 1), draws=4)
    shapes = re.findall(r"(\w+)\[([\d,]+)\]", " ".join(re.findall(r"= (.*?) all-reduce", text)))
    sent = [tuple(map(int, shape.split(","))) for _, shape in shapes]
    assert {(D, 128), (VOCAB, D)} <= {shape[-2:] for shape in sent}
    assert not [shape for shape in sent if len(shape) > 2 and shape[0] == 4], sent


def test_a_frozen_base_has_no_gradient_to_sum(compiled: Callable[..., str]) -> None:
    """Only adapters are summed over rows: the largest all-reduce is far below the smallest matrix's gradient stack."""
    text = compiled((8, 1, 1), "blockwise", rank=2)
    reduced = re.findall(r"= \(?\w+\[([\d,]*)\][^=]* all-reduce(?:-start)?\(", text)
    sizes = [math.prod(map(int, shape.split(","))) if shape else 1 for shape in reduced]
    assert sizes and max(sizes) <= 2 * 2 * 128
    whole = compiled((8, 1, 1), "blockwise")
    found = re.findall(r"(\w+)\[([\d,]+)\]", " ".join(re.findall(r"= (.*?) all-reduce", whole)))
    assert max(math.prod(map(int, shape.split(","))) for _, shape in found) >= 2 * D * D


def test_families_share_the_rules() -> None:
    """A family whose axes had a name without a rule would be copied to every device."""
    for family in registry.FAMILIES:
        arch = dataclasses.replace(ARCH, family=family, **registry.traits(family))
        for path, spec in registry.param_table(arch).items():
            names = [name for name in spec.axes if name not in (None, "layers")]
            assert all(name in rules.RULES for name in names), path
            if spec.is_matrix:
                assert len(names) == 2, path


def test_there_are_eight_devices() -> None:
    assert jax.device_count() == 8


def test_rows_and_columns_of_the_embedding_change_places(compiled: Callable[..., str]) -> None:
    """Its lookup trades columns for rows (all-to-all); the embedding is gathered for neither lookup nor gradient."""
    text = compiled((2, 4, 1), "blockwise")
    assert text.count(" all-to-all(") + text.count(" all-to-all-start(") >= 2  # there and, for the gradient, back
    whole = [size for size in gathered(text) if size >= VOCAB * D]
    assert len(whole) <= 2  # the head, forward and backward
