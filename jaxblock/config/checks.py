"""Checks a whole config: each section by itself, and fields of two sections against each other."""

from __future__ import annotations

from collections.abc import Callable, Collection

from jaxblock.config.config import Config
from jaxblock.settings import require


def check_config(config: Config, sections: Collection[str] | None = None) -> Config:
    """Checks a config and returns it.

    Args:
        config: the config to check.
        sections: the names of the sections that a command uses; None for all. Other sections are not checked.

    Raises:
        UserError: a check fails; the message names the fields and what to set instead.
    """
    used = {section.section_name for section in config.sections()} if sections is None else set(sections)
    for section in config.sections():
        if section.section_name in used:
            section.check()
    if "decode" in used:
        from jaxblock.diffusion.decoding.rules import check_options  # imports JAX, which some commands do not need

        check_options(config.decode)
    for needed, check in _ACROSS.items():
        if used.issuperset(needed):
            check(config)
    return config


def _check_model_width(config: Config) -> None:
    model, canvas = config.model, config.canvas
    width = canvas.prompt_len + canvas.response_len
    require(
        model.init_from is not None or width <= model.max_len,
        f"canvas.prompt_len + canvas.response_len = {width} is longer than model.max_len {model.max_len}",
    )


def _check_adapters(config: Config) -> None:
    lora, model = config.lora, config.model
    require(
        not lora.rank or model.init_from is not None,
        "lora.rank is above 0 but model.init_from is not set: adapters need trained weights beneath them",
    )
    require(
        bool(lora.rank) or model.quantize == "none",
        f"model.quantize is {model.quantize}, but lora.rank is 0: int8 weights cannot be trained; set lora.rank, or "
        "model.quantize to none",
    )


def _check_warmup(config: Config) -> None:
    warmup, steps = config.optimizer.warmup_steps, config.train.steps
    require(
        warmup <= steps,
        f"optimizer.warmup_steps {warmup} is more than train.steps {steps}: the learning rate would never reach its peak. Set "
        f"optimizer.warmup_steps to {steps // 10}, a tenth of the run, or train.steps to more than {warmup}",
    )


def _check_method_on_canvas(config: Config) -> None:
    canvas, method = config.canvas, config.method
    blocks, window = canvas.response_len // canvas.block, canvas.suffix_window
    require(
        method.pairs or method.objective == "classical" or method.draws <= blocks * method.masks_per_block,
        f"method.draws is {method.draws}, but a response has {blocks} blocks at most, and a row is drawn no more often: set it to "
        f"{blocks * method.masks_per_block}, or method.blocks to pairs",
    )
    require(
        window is None or config.method.objective == "blockwise",
        f"canvas.suffix_window {window} hides nothing from classical SFT, whose one block is the whole response, but would hide "
        "much from its decoder: set canvas.suffix_window to null, or method.objective to blockwise",
    )


_ACROSS: dict[tuple[str, ...], Callable[[Config], None]] = {
    ("canvas", "model"): _check_model_width,
    ("canvas", "method"): _check_method_on_canvas,
    ("lora", "model"): _check_adapters,
    ("optimizer", "train"): _check_warmup,
}
"""The checks that involve two sections, by the names of those sections."""
