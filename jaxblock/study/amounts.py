"""Computes what a training step costs and supervises, so that arms can be given the same amount of it."""

from __future__ import annotations

import math

import numpy as np

from jaxblock.config.config import Config
from jaxblock.errors import UserError
from jaxblock.models.architecture import Architecture
from jaxblock.models.families import registry
from jaxblock.models.linear.lora import adapter_table, lora_from_config
from jaxblock.study.experiments import Unit
from jaxblock.training.observe.throughput import Work, model_flops
from jaxblock.training.places import SMALLEST_CANVAS


def per_step(config: Config, arch: Architecture | None, unit: Unit) -> float:
    """Returns how much of a unit one update takes.

    Args:
        config: the settings of the run.
        arch: the sizes of its network; only `flops` needs them.
        unit: `flops` counts the matrix products of the forward and backward passes over the whole canvas in all layers (not those
            that rematerialisation repeats; an unrolled last layer computes fewer positions than are counted);
            `block_positions` the supervised positions of the active blocks; `masked_tokens` the expected number of them that are
            masked, and so have a loss.

    Raises:
        UserError: the unit cannot be counted for these settings.
    """
    canvas, method = config.canvas, config.method
    rows = config.train.batch_size * method.draws
    active = canvas.response_len if method.objective == "classical" else canvas.block
    if unit == "steps":
        return 1.0
    if unit == "flops":
        if canvas.suffix_window is not None:
            raise UserError("FLOPs are counted for whole canvases: leave out canvas.suffix_window")
        width = canvas.total_len or canvas.prompt_len + canvas.response_len
        if config.train.widths != "full" and width >= SMALLEST_CANVAS:
            raise UserError(
                f"FLOPs are counted for whole canvases, and on one of {width} positions train.widths auto computes fewer: set train.widths "
                "to full"
            )
        assert arch is not None
        table = registry.param_table(arch)
        lora = lora_from_config(config.lora, table)
        adapters = None if lora is None else adapter_table(table, lora)
        return model_flops(table, arch, Work(rows, rows * width, rows * active), adapters)
    if canvas.context != "aligned":
        raise UserError(
            f"an equal amount of {unit} is counted on the aligned canvas only: set canvas.context to aligned"
        )
    if method.draws > method.masks_per_block:
        raise UserError(
            f"an equal amount of {unit} cannot be counted with method.draws {method.draws}: a row has as many draws as blocks at "
            "most, which depends on the data; compare by flops or steps"
        )
    return float(
        rows * (active if unit == "block_positions" else expected_masks(method.law, active, method.rate_floor))
    )


def expected_masks(law: str, positions: int, rate_floor: float = 0.0) -> float:
    """Returns the expected number of masked positions in a block of ``positions`` supervised ones.

    The laws that draw a count make it 1 + floor(n u), with u uniform from the floor to 1: without a floor every count from 1 to n is
    equally likely. Under `bernoulli` the rate t is uniform and the set is redrawn until it is not empty, so that the expected
    count at a rate is n t / (1 - (1 - t)^n). `floored_bernoulli` draws once, at rates from 0.001 up.

    Args:
        law: the law of the masked set (``MethodConfig.law``).
        positions: n, the number of supervised positions.
        rate_floor: the least mask rate (``MethodConfig.rate_floor``).
    """
    if law in ("exact_count", "stratified_count", "antithetic"):
        count = np.arange(1, positions + 1)
        chance = np.maximum(count / positions - np.maximum((count - 1) / positions, rate_floor), 0) / (1 - rate_floor)
        return float(count @ chance)
    if law == "floored_bernoulli":
        return positions * (1 + 1e-3) / 2
    at, weight = np.polynomial.legendre.leggauss(200)
    rate = rate_floor + (1 - rate_floor) * (at + 1) / 2
    return float(np.sum(weight / 2 * positions * rate / (1 - (1 - rate) ** positions)))


def equal_steps(budget: int, of: float, mine: float) -> int:
    """Returns the number of steps in which an arm gets as much as the reference arm does in ``budget`` steps.

    Args:
        budget: the steps of the reference arm.
        of: what one of its steps takes (``per_step``).
        mine: what one of the arm's own steps takes.

    Raises:
        UserError: this is less than a step.
    """
    steps = budget * of / mine
    if steps < 1:
        raise UserError(
            f"a budget of {budget:,} steps of the reference arm is {steps:.2g} of a step: raise it to {math.ceil(mine / of):,} or more"
        )
    return round(steps)
