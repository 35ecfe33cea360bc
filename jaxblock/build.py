"""Builds network, objective and optimizer from a config and an architecture.

It is the only module that does so: training, the memory plan, the trials that search for a config that fits (`fit/advice.py`)
and `inspect` all call it.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
from jax import Array

from jaxblock.config.config import Config
from jaxblock.diffusion.layouts import training_layout
from jaxblock.models.architecture import Architecture
from jaxblock.models.attention.backends import backend_of
from jaxblock.models.config import LoraConfig, ModelConfig
from jaxblock.models.families import registry
from jaxblock.models.linear.lora import lora_from_config
from jaxblock.models.transformer import Transformer
from jaxblock.training.optim.make import make_optimizer
from jaxblock.training.step import Learner, Objective
from jaxblock.types import Lines

_MOST_UNROLLED, _LEAST_UNROLLED = 16, 1 << 18
"""The most layers that are unrolled, and the fewest weights of all layers, where ``model.scan_layers`` is ``auto``."""

CheckLayer = Callable[[int, Array], None]
"""A function that is called with a layer's number, from 0, and its output."""


def learner(
    config: Config,
    arch: Architecture,
    stop_ids: tuple[int, ...],
    *,
    platform: str | None = None,
    check_layer: CheckLayer | None = None,
    lines: Lines | None = None,
) -> Learner:
    """Builds the static parts of a run's train step: network, objective, optimizer and two settings.

    Args:
        config: the run's settings, checked.
        arch: the network's sizes and special ids.
        stop_ids: the tokens that end a response.
        platform: the platform that the step will run on; None for the default backend of this process.
        check_layer: a function that is called with every layer's output; None for none.
        lines: the widths at which rows are computed; None for the canvas's.

    Raises:
        UserError: an entry of `lora.targets` matches no matrix.
    """
    net = network(arch, config.model, config.lora, platform=platform, check_layer=check_layer)
    train = config.train
    return Learner(
        net=net,
        objective=objective(config, net, stop_ids, lines),
        optimizer=make_optimizer(config.optimizer, train.steps, net.trainable, train.seed),
        accumulate=train.accumulate,
        ema=config.optimizer.ema,
    )


def network(
    arch: Architecture,
    model: ModelConfig,
    lora: LoraConfig | None = None,
    *,
    platform: str | None = None,
    check_layer: CheckLayer | None = None,
) -> Transformer:
    """Builds the network that the ``model`` section describes, without weights.

    Args:
        arch: the network's sizes and special ids.
        model: the ``model`` section, which says how the network runs.
        lora: the ``lora`` section, which says which matrices have adapters; None for no adapters.
        platform: the platform that the network will run on; None for the default backend of this process.
        check_layer: a function that is called with every layer's output; the layers are then unrolled. None for none.

    Raises:
        UserError: an entry of `lora.targets` matches no matrix.
    """
    platform = platform or jax.default_backend()
    backend = backend_of(platform) if model.attention == "auto" else model.attention
    scan = scans_layers(arch, platform) if model.scan_layers == "auto" else model.scan_layers
    return Transformer(
        arch,
        dtype=model.dtype,
        remat=model.remat,
        attention=backend,
        scan_layers=scan and check_layer is None,
        loss_chunk=model.loss_chunk,
        lora=None if lora is None else lora_from_config(lora, registry.param_table(arch)),
        quantize=model.quantize,
        check_layer=check_layer,
    )


def scans_layers(arch: Architecture, platform: str) -> bool:
    """Says whether layers should be scanned rather than unrolled.

    On a CPU a step with unrolled layers takes about four fifths of the time, since no layer's weights are copied out of their
    stack and only the active block passes through the last layer. But each layer is compiled, which takes a second or two
    of a processor: more than the steps of a tiny network. Accelerators gain nothing.

    Args:
        arch: the network's sizes.
        platform: the platform that the network will run on.
    """
    if platform != "cpu" or arch.n_layers > _MOST_UNROLLED:
        return True
    weights = sum(math.prod(spec.shape) for spec in registry.param_table(arch).values() if spec.stacked)
    return weights < _LEAST_UNROLLED


def objective(config: Config, net: Transformer, stop_ids: tuple[int, ...], lines: Lines | None = None) -> Objective:
    """Builds the loss that the ``canvas`` and ``method`` sections describe.

    Args:
        config: the run's settings; the batch size and the seed of the draws are the ``train`` section's.
        net: the network.
        stop_ids: the tokens that end a response.
        lines: the widths at which rows are computed; None for the canvas's.
    """
    return Objective(
        net=net,
        layout=training_layout(config.canvas, config.method, net.arch, stop_ids),
        method=config.method,
        seed=config.train.seed,
        rows=config.train.batch_size,
        dropout=net.lora is not None and net.lora.dropout > 0,
        lines=lines,
    )
