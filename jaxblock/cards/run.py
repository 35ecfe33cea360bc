"""Describes a run for the model card of its export: where its weights began, its data, how it was trained, and its last scores."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any, NamedTuple

import huggingface_hub
import yaml

from jaxblock.cards.card import CARD, Card, read_header, read_licence
from jaxblock.config.yaml import to_tree
from jaxblock.data.store.manifest import Manifest
from jaxblock.errors import UserError
from jaxblock.io.hub import hub_repository
from jaxblock.io.paths import as_path
from jaxblock.training.checkpoints import run_folder
from jaxblock.training.checkpoints.run_folder import Run

_MOST_STARTS = 20  # runs of a chain that begins each from another

_METHODS = {"blockwise": "Blockwise SFT", "classical": "Classical SFT (masks anywhere in the response)"}


class Start(NamedTuple):
    """Says what the first of a chain of runs began from.

    Attributes:
        chain: a sentence for each run, the newest first.
        repository: the hub repository of the first weights; None where they are random or came from a folder.
        random: whether the first weights were random.
        licence: the fields of a card's header that state the licence of the first weights; {} where it is not known.
    """

    chain: list[str]
    repository: str | None
    random: bool
    licence: dict[str, str]


def described(run: Run, step: int) -> Card:
    """Returns what a card says of a run: the header's fields that depend on it, and the sections Base, Data and Training.

    Args:
        run: the run, opened.
        step: the step of the checkpoint that is exported.
    """
    start = _start(run)
    header: dict[str, Any] = {"tags": _tags(run)}
    if start.repository is not None:
        header["base_model"] = start.repository
    if datasets := _hub_datasets(run.manifest):
        header["datasets"] = datasets
    data = _data(run.manifest, run.config.data.weights)
    sections = {"Base": "\n".join(start.chain), "Data": data, "Training": _training(run, step)}
    licence, text = _licence(start)
    return Card({**header, **licence}, {**sections, "Licence": text})


def _tags(run: Run) -> list[str]:
    method = {"blockwise": "blockwise-sft", "classical": "sft"}[run.config.method.objective]
    return ["masked-diffusion", run.arch.family, method, *(["lora"] if run.config.lora.rank else [])]


def _start(run: Run) -> Start:
    """Follows ``model.init_from`` through earlier runs to the weights that the first of them began from."""
    chain: list[str] = []
    origin = run.folder / run_folder.ORIGIN
    while True:
        config = run.config
        init, name = config.model.init_from, shown_path(run.folder)
        if init is None:
            chain.append(f"- {name} began from random weights (seed {config.train.seed}).")
            return Start(chain, None, True, {})
        repository = hub_repository(init)
        called = f"[{repository}](https://huggingface.co/{repository})" if repository else f"`{shown_path(init)}`"
        chain.append(f"- {name} began from {called}.")
        if repository is None and run_folder.is_run(init) and len(chain) < _MOST_STARTS:
            try:
                run = run_folder.open_run(init)
            except UserError:  # it was changed or damaged since; the export does not need it
                return Start(chain, None, False, read_licence(origin))
            continue
        return Start(
            chain, repository or _named_base(origin), False, read_licence(origin) or _licence_at(init, repository)
        )


def _named_base(origin: os.PathLike[str]) -> str | None:
    """Returns the hub repository that the card of the first weights names as their own base, where it names one."""
    base = read_header(origin).get("base_model")
    return base if isinstance(base, str) and re.fullmatch(r"[\w.-]+/[\w.-]+", base) else None


def _licence_at(init: str, repository: str | None) -> dict[str, str]:
    """Reads the licence where the weights are, for runs of earlier versions, which kept no copy of the base's card."""
    if repository is None:
        return read_licence(init)
    card = huggingface_hub.try_to_load_from_cache(repository, CARD)
    return read_licence(os.path.dirname(card)) if isinstance(card, str) else {}


def _licence(start: Start) -> tuple[dict[str, str], str]:
    """Returns the header's licence fields and the text about them; a licence is never invented."""
    if start.licence:
        name = start.licence.get("license_name", start.licence["license"])
        return start.licence, f"The card of the base states its licence as `{name}`. It binds these weights too."
    if start.random:
        return {}, (
            "None is stated: these weights were trained from random ones. Whoever passes them on says under which licence, "
            "as `license:` in the header of this file."
        )
    return {"license": "unknown"}, (
        "The licence of the base is not known: no model card that states it was found with the base. Look it up before you "
        "pass these weights on, and put it into the header of this file."
    )


def shown_path(path: os.PathLike[str] | str) -> str:
    """Returns a path as strangers may see it: of an absolute one only the last name."""
    text = os.fspath(path)
    return PurePath(text).name if os.path.isabs(text) else text


def shown_source(source: Any) -> str:
    """Returns the paths of a split's source, one or a list of several, as strangers may see them."""
    paths = [source] if isinstance(source, str) else source if isinstance(source, list) else []
    return ", ".join(shown_path(path) for path in paths if isinstance(path, str)) or "not recorded"


def _hub_datasets(manifest: Manifest) -> list[str]:
    """Returns the hub names of the data sets that the training and validation records came from."""
    sources = [source for split in ("train", "validation") for source in _sources(manifest, split)]
    paths = [str(source.get("path", "")) for source in sources]
    names = [found[1] for path in paths if (found := re.match(r"hf:([\w.-]+/[\w.-]+)", path))]
    return [name for name in dict.fromkeys(names) if not as_path(name).exists()]


def _sources(manifest: Manifest, split: str) -> list[Mapping[str, Any]]:
    """Returns what the manifest says of each file, or other source, of a split."""
    whole = manifest.inputs.get(split, {})
    return whole.get("files") or [whole]


def _data(manifest: Manifest, weights: Sequence[float] | None) -> str:
    """Returns the section Data; ``weights`` are the shares of the training files in the rows of training."""
    lines = ["| split | source | records | dropped | SHA-256 |", "|---|---|---|---|---|"]
    for split, found in manifest.splits.items():
        sources = _sources(manifest, split)
        kept, dropped = f"{found.get('kept', 0):,}", f"{sum(found.get('dropped', {}).values()):,}"
        if len(sources) == 1:
            lines.append(f"| {split} | {_named(sources[0], kept, dropped)}")
            continue
        lines.append(f"| {split} | {len(sources)} files | {kept} | {dropped} | |")
        for at, (source, part) in enumerate(zip(sources, found["files"], strict=True)):
            share = f" ({weights[at]:g} of the rows)" if weights is not None and split == "train" else ""
            lines.append(f"| {split}{share} | {_named(source, format(part['kept'], ','), '')}")
    data = manifest.data
    more = [f"recipe `{data['recipe']}`"] if data.get("recipe") else []
    more += [f"chat template `{shown_path(manifest.template['name'])}`"]
    if data.get("prompt_template") not in (None, "{prompt}"):
        more.append("prompts put into a template of text")
    return "\n".join([*lines, "", f"Prepared with {', '.join(more)}; fingerprint `{manifest.fingerprint[:16]}`."])


def _named(source: Mapping[str, Any], kept: str, dropped: str) -> str:
    """Returns the cells of a source, and of the numbers of its records."""
    path, digest = shown_path(str(source.get("path", "not recorded"))), str(source.get("sha256", ""))[:16]
    return f"`{path}` | {kept} | {dropped} | `{digest}` |"


def _training(run: Run, step: int) -> str:
    config = run.config
    method = _METHODS[config.method.objective]
    what = f"LoRA adapters of rank {config.lora.rank}" if config.lora.rank else "every weight"
    average = f", as their moving average ({config.optimizer.ema})" if config.optimizer.ema else ""
    text = (
        f"{method} of {what}{average}: step {step:,} of {config.train.steps:,}, {config.train.batch_size} sequences a step, "
        f"blocks of {config.canvas.block} in responses of {config.canvas.response_len} tokens. The settings that decide what is "
        "learnt, as jaxblock's YAML file has them:"
    )
    settings = yaml.safe_dump(_deciding_settings(run), sort_keys=False, default_flow_style=None, width=100)
    return f"{text}\n\n```yaml\n{settings}```"


def _deciding_settings(run: Run) -> Mapping[str, Any]:
    """Returns the settings that a resumed run may not change, without sizes and sections that this run does not use."""
    config = run.config
    kept = [config.canvas, config.method, config.model, *([config.lora] if config.lora.rank else []), config.optimizer]
    found = {}
    for section in [*kept, config.train]:
        unused = section.changeable(saved=True)
        if section is config.model and config.model.init_from is not None:
            unused |= vars(run.arch).keys() - {"alignment"}
        found[section.section_name] = {k: v for k, v in to_tree(section).items() if k not in unused and v is not None}
    return found
