"""Checks that a resumed run has the settings, data and model that the run was begun with."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxblock.config.config import Config
from jaxblock.config.yaml import to_tree
from jaxblock.data.store.prepared_folder import Prepared
from jaxblock.data.store.same_text import CheckpointText, check_same_text
from jaxblock.errors import UserError
from jaxblock.io.paths import PathLike
from jaxblock.models.architecture import Architecture
from jaxblock.models.families import registry
from jaxblock.training.checkpoints import run_folder
from jaxblock.training.checkpoints.reader import CheckpointReader
from jaxblock.training.checkpoints.run_folder import Base
from jaxblock.training.versions import running_versions


def saved_values(config: Config, prepared: Prepared, arch: Architecture, base: Base | None) -> dict[str, Any]:
    """Returns the plain values that are saved with every checkpoint: a resumed run is compared with them, an export tells them.

    Args:
        config: the run's settings.
        prepared: the data that it is trained on.
        arch: the network's sizes and special ids.
        base: the frozen base of the adapters; None without adapters.
    """
    return {
        **({} if base is None else {"base": base.fingerprint}),
        "data": prepared.manifest.fingerprint,
        "config": to_tree(config),
        "model": registry.to_hf(arch, config.model.param_dtype),
        "versions": running_versions(),
    }


def check_resume(
    config: Config, folder: PathLike, checkpoints: CheckpointReader, step: int | None, prepared: Prepared
) -> dict[str, Any]:
    """Checks that a config continues the run that a folder holds.

    Args:
        config: the settings to go on with.
        folder: the run folder.
        checkpoints: its checkpoints.
        step: the checkpoint to go on from; None where there is none, so that the run begins again.
        prepared: the data to go on with.

    Returns:
        The plain values that were saved with the checkpoint.

    Raises:
        UserError: a setting differs that may not change, the prepared data or their tokenizer have changed, or model.json was
            edited.
    """
    run = run_folder.open_run(folder)
    if step is None:
        # Without a checkpoint the run begins again from the same weights, so fewer fields may change.
        saved: dict[str, Any] = {"data": run.manifest.fingerprint, "config": to_tree(run.config)}
    else:
        saved = checkpoints.meta(step)
        run_folder.check_model(run, saved)
    _check_settings(config, folder, saved["config"], step)
    text = CheckpointText(str(folder), run.prepared.tokenizer, run.prepared.encoder, recorded=True)
    check_same_text(text, prepared, allow_other_template=False)
    if saved["data"] != prepared.manifest.fingerprint:
        raise UserError(
            f"{folder} was trained on other data than {config.data.prepared} holds now: a resumed run would not be "
            "exact. Prepare the same data, or begin a run with model.init_from"
        )
    return saved


def keep_automatic(config: Config, before: Mapping[str, Any]) -> Config:
    """Returns the config with those choices that are left to jaxblock as the run has made them so far, so that it goes on exactly.

    Args:
        config: the settings to go on with.
        before: the sections that were saved with the checkpoint. An earlier version computed all rows at one width.
    """
    train, model = {"widths": "full", **before["train"]}, before["model"]
    if config.train.widths == "auto":
        config = dataclasses.replace(config, train=dataclasses.replace(config.train, widths=train["widths"]))
    if config.model.scan_layers == "auto":
        kept = dataclasses.replace(config.model, scan_layers=model["scan_layers"])
        config = dataclasses.replace(config, model=kept)
    return config


def kept_choices(asked: Config, kept: Config) -> list[tuple[str, Any, Any]]:
    """Returns the fields in which `keep_automatic` gave another value than was asked for: name, value asked for, value kept."""
    fields: list[tuple[str, Any, Any]] = [
        ("train.widths", asked.train.widths, kept.train.widths),
        ("model.scan_layers", asked.model.scan_layers, kept.model.scan_layers),
    ]
    return [field for field in fields if field[1] != field[2]]


def _check_settings(config: Config, folder: PathLike, before: dict[str, Any], step: int | None) -> None:
    """Raises UserError where a field that a resumed run may not change has changed.

    Args:
        config: the settings to go on with.
        folder: the run folder, for the message.
        before: the sections that were saved with the checkpoint.
        step: the checkpoint to go on from; None where the run begins again.
    """
    schedule, steps = config.optimizer.schedule, config.train.steps
    constant = schedule == "constant" and steps >= (step or 0)  # then no learning rate depends on the number of steps
    changed = [
        f"{section.section_name}.{name} = {then[name]!r} then, {value!r} now"
        for section in config.sections()
        for then in [
            {**to_tree(type(section)()), **before.get(section.section_name, {})}
        ]  # without later versions' fields
        for name, value in to_tree(section).items()
        if name not in section.changeable(saved=step is not None) and then[name] != value
        if not (constant and section is config.train and name == "steps")
    ]
    if changed:
        why = f"the learning rates of the {schedule} schedule depend on it; only those of `constant` do not"
        if schedule == "constant":
            why = f"the run has done {step:,} steps already"
        reason = f" ({why})" if changed[-1].startswith("train.steps") else ""
        raise UserError(
            f"{folder} was begun with other settings: {'; '.join(changed)}{reason}. Undo that, or begin another run "
            "(train.out) from this one (model.init_from)"
        )
