"""Measures one checkpoint of a study and returns what its results keep of it: numbers, never vectors."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from jaxblock.config.config import Config
from jaxblock.data.store.prepared_folder import open_prepared
from jaxblock.errors import UserError
from jaxblock.evaluation.statistics import Estimate
from jaxblock.loading import load
from jaxblock.study.gradients.decomposition import Decomposition, measure_decomposition
from jaxblock.study.gradients.direction import Direction, measure_direction
from jaxblock.study.gradients.probe import Probe, probe_of
from jaxblock.study.gradients.sizes import GradientSizes
from jaxblock.study.gradients.tightness import Tightness, measure_tightness
from jaxblock.study.gradients.variance import Spread, measure_variance

_MOST_BYTES = 8 << 30
"""The most memory that the gradients of a measurement may take."""


def measure_checkpoint(run_folder: str, step: int, config: Config, sizes: GradientSizes) -> dict[str, Any]:
    """Measures the gradients of a run's checkpoint on its training records.

    Args:
        run_folder: the run.
        step: the step of the checkpoint.
        config: the settings of the run; its seed is also that of the measurement.
        sizes: how much is drawn.

    Returns:
        The numbers, as they are written to a result: estimates as [value, standard error], None for what is not finite.

    Raises:
        UserError: the run cannot be opened, or the gradients would take too much memory.
    """
    model = load(run_folder, step=step)
    records = open_prepared(config.data.prepared).records("train")
    probe = probe_of(model.net, model.params, records, config.canvas, config.method, model.stop_ids, config.train.seed)
    return measure(probe, sizes)


def measure(probe: Probe, sizes: GradientSizes) -> dict[str, Any]:
    """Takes all measurements of a checkpoint; see ``measure_checkpoint``."""
    _check_memory(probe, sizes)
    variance = measure_variance(probe, sizes.batches, sizes.forwards)
    parts = measure_decomposition(probe, sizes.examples)
    directions = measure_direction(probe, sizes.groups, sizes.forwards)
    tightness = measure_tightness(probe, sizes.bound_blocks, sizes.bound_examples, sizes.orders)
    return {
        "sizes": dataclasses.asdict(sizes),
        "variance": {name: {part: _spread(one) for part, one in of.items()} for name, of in variance.items()},
        "decomposition": {part: _parts(one) for part, one in parts.items()},
        "direction": {name: _direction(one) for name, one in directions.items()},
        "tightness": {str(size): _tightness(one) for size, one in tightness.items()},
    }


def _check_memory(probe: Probe, sizes: GradientSizes) -> None:
    """Raises UserError where the gradients that are held at a time would take too much memory."""
    weights = sum(math.prod(spec.shape) for spec in probe.net.param_table.values())
    most = max(sizes.examples, 3 * sizes.batches, 2 * sizes.groups * probe.layout.n_blocks)
    if 4 * weights * most > _MOST_BYTES:
        raise UserError(
            f"{most:,} gradients of {weights:,} weights take {4 * weights * most / 2**30:.1f} GiB, more than "
            f"{_MOST_BYTES >> 30}: lower gradients.examples, gradients.batches and gradients.groups, or measure a smaller network"
        )


def _pair(found: Estimate) -> list[float | None]:
    return [value if math.isfinite(value) else None for value in (found.mean, found.se)]


def _spread(found: Spread) -> dict[str, Any]:
    return {"relative": _pair(found.relative), "ratio": _pair(found.ratio)}


def _parts(found: Decomposition) -> dict[str, Any]:
    return {"relative": _pair(found.relative)} | {name: _pair(share) for name, share in found.shares.items()}


def _direction(found: Direction) -> dict[str, Any]:
    steep = found.steepness
    return {
        "cosine": _pair(found.all.cosine),
        "distance": _pair(found.all.distance),
        "length": _pair(found.all.length),
        "cosine_by_block": [_pair(one.cosine) for one in found.by_block],
        "steepness": None if steep is None else steep._asdict(),
    }


def _tightness(found: Tightness) -> dict[str, Any]:
    return {
        "nelbo": _pair(found.nelbo),
        "minus_log_p": _pair(found.minus_log_p),
        "gap": _pair(found.gap),
        "exact": found.exact,
    }
