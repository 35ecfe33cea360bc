"""`prepare`: text records in, a prepared folder out (records, tokenizer, template, manifest), whole or not at all."""

from __future__ import annotations

import dataclasses
import hashlib
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from jaxblock.config.config import Config
from jaxblock.data.config import DataConfig
from jaxblock.data.store import manifest as manifests
from jaxblock.data.store import records, statistics
from jaxblock.data.store.lengths import LengthPolicy, check_canvas
from jaxblock.data.store.manifest import Manifest
from jaxblock.data.store.records import Record
from jaxblock.data.text import recipes, splits
from jaxblock.data.text.sources import Example
from jaxblock.data.tokens import special, templates, tokenizers
from jaxblock.data.tokens.encoding import Encoder
from jaxblock.data.tokens.templates import Template
from jaxblock.data.tokens.tokenizers import Tokenizer
from jaxblock.errors import UserError
from jaxblock.io.files import write_text
from jaxblock.io.folders import check_vacant, new_folder
from jaxblock.io.paths import as_path

Progress = Callable[[str], None]


def _silent(message: str) -> None:
    del message


def prepare(config: Config, progress: Progress = _silent) -> Manifest:
    """Prepares the data of a config in `config.data.prepared`.

    If that folder already holds what the same settings and inputs give, it is left as it is.

    Args:
        config: Its data and canvas sections are used.
        progress: Called with a line now and then.

    Returns:
        The folder's manifest.

    Raises:
        UserError: For bad input (file and line named), bad settings, or a folder that may not be replaced; nothing is
            written then.
    """
    check_canvas(config.canvas)
    config = dataclasses.replace(config, data=recipes.resolve(config.data))
    loaded = splits.load(config.data)
    given = None if config.data.tokenizer == "train" else _given(config.data)
    source = templates.find(
        config.data.template, tokenizer_template=given.tokenizer.settings.get("chat_template") if given else None
    )
    origin = {**_hashes_of(given.tokenizer), **given.ids} if given else {}
    fingerprint = manifests.fingerprint(config, loaded.inputs, origin, source)
    there = _existing(config, fingerprint)
    if there is not None:
        progress(f"already prepared: {config.data.prepared} holds the same settings and inputs")
        return there

    encoder = _encoder(config, loaded.examples["train"], given, source, progress)
    made: dict[str, list[Record]] = {}
    report: dict[str, dict[str, Any]] = {}
    lengths = LengthPolicy(config)
    for split, examples in loaded.examples.items():
        progress(f"{split}: {len(examples):,} records")
        made[split], report[split] = lengths.apply(split, map(encoder.pair, examples), examples)
        report[split]["dropped"] |= loaded.dropped.get(split, {})
    lengths.check()
    for split, some in made.items():
        report[split] |= statistics.describe(some, config.canvas.block)
    with new_folder(config.data.prepared, marker=manifests.FILE, overwrite=config.data.overwrite) as folder:
        return _write(folder, config, fingerprint, loaded.inputs, encoder, made, report)


def _existing(config: Config, fingerprint: str) -> Manifest | None:
    """The manifest of a folder that already holds this very result; None if it is to be made."""
    folder = config.data.prepared
    path = as_path(folder)
    if (path / manifests.FILE).exists():
        try:
            there = manifests.read(folder)
        except UserError:
            if not config.data.overwrite:
                raise
            return None
        files = [records.file_of(folder, split) for split in there.splits]
        if there.fingerprint == fingerprint and all(as_path(file).exists() for file in files):
            return there
        if not config.data.overwrite:
            changed = (
                "; ".join(manifests.differences(there, config))
                or "the content of its input, tokenizer or template files"
            )
            raise UserError(
                f"data.prepared: {folder} holds data prepared otherwise ({changed}). Set data.overwrite to replace "
                "them, or another data.prepared"
            )
    check_vacant(folder, marker=manifests.FILE, overwrite=config.data.overwrite)
    return None


class _Given(NamedTuple):
    """A tokenizer that was not trained here, and what its checkpoint calls its special tokens."""

    tokenizer: Tokenizer
    ids: dict[str, int]


def _given(data: DataConfig) -> _Given:
    tokenizer, ids = tokenizers.load(data.tokenizer), special.checkpoint_ids(data.tokenizer)
    return _Given(special.add_mask(tokenizer, data, ids) if data.add_mask_token else tokenizer, ids)


def _encoder(config: Config, train: list[Example], given: _Given | None, source: str, progress: Progress) -> Encoder:
    data = config.data
    if given is None:
        progress(f"training a {data.tokenizer_type} tokenizer on {len(train):,} records")
        eos, eot = data.eos_token or tokenizers.EOS, data.eot_token or tokenizers.EOT
        template = Template(data.template, source, {"bos_token": tokenizers.BOS, "eos_token": eos, "eot_token": eot})
        texts = (template.render(example.messages, False, where=example.where) for example in train)
        given = _Given(tokenizers.train(texts, data, template.control_tokens()), {})
    progress(f"tokenizer: {given.tokenizer.vocab_size:,} tokens")
    template, ids = special.assemble(given.tokenizer, data.template, source, data, given.ids)
    return Encoder(given.tokenizer, template, ids, data)


def _hashes_of(tokenizer: Tokenizer) -> dict[str, str]:
    return {name: hashlib.sha256(content).hexdigest() for name, content in tokenizer.files.items()}


def _write(
    folder: pathlib.Path,
    config: Config,
    fingerprint: str,
    inputs: Mapping[str, Mapping[str, Any]],
    encoder: Encoder,
    made: Mapping[str, list[Record]],
    report: Mapping[str, dict[str, Any]],
) -> Manifest:
    """Fills the scratch folder; the manifest comes last."""
    for split, some in made.items():
        records.write(folder, split, some)
    encoder.tokenizer.save(folder / "tokenizer")
    write_text(folder / "tokenizer" / "template.jinja", encoder.template.source)
    manifest = Manifest(
        format=manifests.FORMAT,
        fingerprint=fingerprint,
        **manifests.settings(config),
        inputs={split: dict(entry) for split, entry in inputs.items()},
        tokenizer={"kind": type(encoder.tokenizer).__name__, "files": _hashes_of(encoder.tokenizer)},
        template={
            "name": encoder.template.name,
            "source": encoder.template.source,
            "tokens": dict(encoder.template.tokens),
        },
        special=encoder.special,
        vocab_size=max(encoder.tokenizer.vocab_size, 1 + max(dataclasses.astuple(encoder.special))),
        splits={split: dict(entry) for split, entry in report.items()},
        overlaps=statistics.overlaps({split: [record.prompt for record in some] for split, some in made.items()}),
    )
    manifests.write(folder, manifest)
    return manifest
