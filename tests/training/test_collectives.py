"""What devices say to each other in a compiled step: logits stay where they are, and so do rows.

XLA's CPU backend splits a reduce-scatter into other collectives, so that bytes are counted on programs compiled for TPUs
(tests/fit); what must never be gathered shows here too.
"""

import dataclasses
import functools
import math
import re
from typing import Any

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


@functools.cache
def program(
    mesh: tuple[int, int, int], objective="blockwise", rank=0, chunk=None, remat="none", quantize="none", draws=1
) -> str:
    """Returns the text of a train step compiled for eight devices."""
    config = Config(
        canvas=CanvasConfig(P, R, 8),
        method=MethodConfig(objective=objective, draws=draws),
        model=ModelConfig(init_from="x", loss_chunk=chunk, remat=remat, quantize=quantize),
        lora=LoraConfig(rank),
        train=TrainConfig(batch_size=ROWS),
    )
    learner, devices = build.learner(config, ARCH, (ARCH.eos_id,)), make_mesh(*mesh)
    return lower_step(learner, run_shapes(config, learner, devices), devices).compile().as_text() or ""


WHOLE = dict(mesh=(2, 4, 1), draws=3)
INT8 = dict(mesh=(2, 4, 1), rank=2, quantize="int8")
CHUNKS = dict(mesh=(1, 2, 4), objective="classical", chunk=8)


def _slow(*how: dict[str, Any]) -> list[Any]:
    return [pytest.param(each, marks=pytest.mark.slow) for each in how]


@pytest.mark.parametrize("how", [dict(mesh=(1, 2, 4)), *_slow(CHUNKS)], ids=str)
def test_logits_are_never_gathered(how):
    """Neither over rows (fsdp) nor over the vocabulary (tensor), whatever the loss sees of them."""
    found = gathered(program(**how))
    assert found, "the pattern finds nothing: the text of compiled programs has changed"
    # What is gathered is weights: none larger than the largest of them, the head, of which a tensor group has a quarter;
    # it is smaller than one device's share of the logits, an eighth.
    assert max(found) <= VOCAB * D / 4 < ROWS * 8 * VOCAB / 8


SPLIT = [dict(mesh=(1, 8, 1), remat=remat) for remat in ("none", "dots", "full")]
SPLIT += [dict(mesh=(1, 8, 1), rank=2, quantize=quantize) for quantize in ("none", "int8")]


@pytest.mark.parametrize("how", [WHOLE, INT8, *_slow(*SPLIT)], ids=str)
def test_weights_are_gathered_twice_and_never_kept(how):
    """Once in the forward loop and once in the backward one, whatever is recomputed; the head once for both.

    Nor does a device keep a second copy of its own part, or a frozen int8 matrix in the type that it is multiplied in.
    """
    text = program(**how)
    found, frozen, fsdp = gathered(text), "rank" in how, how["mesh"][1]
    assert found.count(D * 128) == 2 * 3  # gate, up and down
    assert found.count(D * D) == 2 * 4  # q, k, v and o
    assert frozen or found.count(VOCAB * D) == 1
    whole = rf"(?:f32|bf16|s8)\[{ARCH.n_layers},(?:{D},128|128,{D})\]"  # all layers' whole matrices, either way round
    assert not re.findall(whole, text)
    if how.get("quantize") == "int8":
        assert re.search(rf"s8\[(1,)?{D},128\]\S* all-gather", text), "what is sent must be a byte a weight"
    # The backward pass reads the weights where they are. Copies would be a stack of each matrix's own parts.
    kept = re.findall(rf"dynamic-update-slice\([^)]*f32\[{ARCH.n_layers},{D // fsdp},128\]", text)
    assert len(kept) <= (0 if frozen else 2), kept  # trained weights: the gradients of gate and up


def test_gradients_are_summed_once_and_only_of_what_is_trained():
    """The sum over draws is taken on each device, before that over devices; of adapters it is far below a matrix's."""

    def summed(text: str) -> list[tuple[int, ...]]:
        shapes = _SHAPE.findall(" ".join(re.findall(r"= (.*?) all-reduce", text)))
        return [tuple(map(int, shape.split(","))) for shape in shapes if shape]

    whole = summed(program(**WHOLE))
    assert max(map(math.prod, whole)) >= 2 * D * D // 4
    assert not [shape for shape in whole if len(shape) > 2 and shape[0] == 3], whole
    assert 0 < max(map(math.prod, summed(program(**INT8)))) <= 2 * 2 * 128


def test_rows_and_columns_of_the_embedding_change_places():
    """Its lookup trades columns for rows (all-to-all); the embedding is gathered for neither lookup nor gradient."""
    text = program(**WHOLE)
    assert text.count(" all-to-all(") + text.count(" all-to-all-start(") >= 2  # there and, for the gradient, back
    assert len([size for size in gathered(text) if size >= VOCAB * D]) <= 2  # the head, forward and backward


def test_families_share_the_rules():
    """A family whose axes had a name without a rule would be copied to every device."""
    for family in registry.FAMILIES:
        arch = dataclasses.replace(ARCH, family=family, **registry.traits(family))
        for path, spec in registry.param_table(arch).items():
            names = [name for name in spec.axes if name not in (None, "layers")]
            assert all(name in rules.RULES for name in names), path
            if spec.is_matrix:
                assert len(names) == 2, path
