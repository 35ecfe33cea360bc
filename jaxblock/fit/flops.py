"""Counts the floating-point operations of the matrix products in a compiled program."""

from __future__ import annotations

import math
import re

import numpy as np

from jaxblock.fit.hlo import Computation, Instruction, operand_shapes


def instruction_flops(instruction: Instruction, computation: Computation) -> float:
    """Counts the operations of one instruction, two per multiplication; 0 where it is not a matrix product."""
    code = instruction.opcode
    if code == "dot":
        left = computation[instruction.operands[0]].shapes[0].dims
        contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.rest)
        inner = math.prod(left[int(d)] for d in contracted[1].split(",") if d) if contracted else 1
        return 2.0 * instruction.shapes[0].elements * inner
    if code == "convolution":
        return _convolution_flops(instruction, computation)
    if code == "custom-call" and instruction.name.startswith("splash_mha_"):
        return _splash_flops(instruction, computation)
    return 0.0


def _convolution_flops(instruction: Instruction, computation: Computation) -> float:
    """Counts the operations of a convolution.

    In TPU programs matrix products appear as convolutions, whose spatial dimensions are the products' batch dimensions.
    """
    given, kernel = (computation[name].shapes[0].dims for name in instruction.operands[:2])
    made = instruction.shapes[0].dims
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.rest)
    if labels is None:
        return 0.0
    left, right, out = labels.groups()
    groups = _number(r"feature_group_count=(\d+)", instruction.rest)
    batches = _number(r"batch_group_count=(\d+)", instruction.rest)
    products = given[left.index("f")] / groups * made[out.index("f")] * given[left.index("b")] / batches
    spatial = sorted(c for c in out if c.isdigit())
    for place, label in enumerate(spatial):
        window = _window(instruction.rest, place)
        products *= _valid(given[left.index(label)], kernel[right.index(label)], made[out.index(label)], *window)
    return 2.0 * products


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    return int(found[1]) if found else 1


def _window(rest: str, place: int) -> tuple[int, int, int, int]:
    """Returns (stride, low padding, dilation of the input, dilation of the kernel) of a spatial dimension."""
    window = re.search(r"window=\{([^}]*)\}", rest)
    fields = dict(part.split("=") for part in window[1].split()) if window else {}

    def of(name: str, default: str) -> str:
        return fields[name].split("x")[place] if name in fields else default

    low = of("pad", "0_0").rsplit("_", 1)[0]
    return int(of("stride", "1")), int(low), int(of("lhs_dilate", "1")), int(of("rhs_dilate", "1"))


def _valid(given: int, kernel: int, made: int, stride: int, low: int, dilated: int, kernel_dilated: int) -> int:
    """Counts the pairs of output and kernel positions, in one dimension, that read an input and not padding or a gap."""
    at = np.arange(made)[:, None] * stride - low + np.arange(kernel)[None, :] * kernel_dilated
    return int(np.sum((at >= 0) & (at <= (given - 1) * dilated) & (at % dilated == 0)))


def _splash_flops(instruction: Instruction, computation: Computation) -> float:
    """Counts the operations of one of splash attention's kernels, each of which computes several matrix products.

    The forward kernel computes 2: scores and output. The backward kernel for keys and values computes 4: the scores again, and
    the gradients of probabilities, keys and values. That for queries computes 3: the scores again, and the gradients of
    probabilities and queries.
    """
    given = operand_shapes(instruction, computation)
    wide = [s.dims for s in given if s.kind in ("bf16", "f32") and len(s.dims) >= 3 and s.dims[-1] % 128 == 0]
    queries, keys = wide[:2]
    products = {"fwd": 2, "dkv": 4, "dq": 3}[instruction.name.split("_")[2]]
    return 2.0 * products * math.prod(queries) * keys[-2]
