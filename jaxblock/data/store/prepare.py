"""Makes a prepared folder from text records: tokenised records, tokenizer, template and manifest, all of them or none."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import pathlib
import tempfile
from typing import Any, NamedTuple

from jaxblock.data.config import DataConfig
from jaxblock.data.store.manifest import (
    MANIFEST_FILE,
    MANIFEST_FORMAT,
    Manifest,
    changed_settings,
    compute_fingerprint,
    read_manifest,
    recorded_settings,
    write_manifest,
)
from jaxblock.data.store.records import records_file
from jaxblock.data.store.worker_pool import count_processes, worker_pool
from jaxblock.data.store.write_splits import Progress, WritingTools, write_splits
from jaxblock.data.text.hashes import joint_sha256
from jaxblock.data.text.recipes import with_recipe
from jaxblock.data.text.sources import Source
from jaxblock.data.text.splits import hash_inputs, open_inputs, read_splits
from jaxblock.data.tokens.encoding import Encoder
from jaxblock.data.tokens.find_special import add_mask, ends_in_checkpoint, find_special, ids_in_checkpoint
from jaxblock.data.tokens.load import load_tokenizer
from jaxblock.data.tokens.sentencepiece_model import train_tokenizer
from jaxblock.data.tokens.templates import Template, template_source
from jaxblock.data.tokens.tokenizer import BOS, EOS, EOT, Tokenizer
from jaxblock.diffusion.config import CanvasConfig
from jaxblock.errors import UserError
from jaxblock.io.files import write_text
from jaxblock.io.folders import check_vacant, new_folder
from jaxblock.io.inventory import check_inventory, write_inventory
from jaxblock.io.locks import only_writer
from jaxblock.io.paths import as_path

# A tokenizer is trained on at most about this much text, all of which the library holds in memory.
_MOST_LETTERS = 1 << 26


def _silent(message: str) -> None:
    del message


def prepare(data: DataConfig, canvas: CanvasConfig, progress: Progress = _silent) -> Manifest:
    """Prepares data in the folder `data.prepared`.

    A folder that was prepared from the same settings and inputs is left as it is.

    Args:
        data: The data settings.
        canvas: The canvas settings; records that do not fit the canvas are treated as `data.overlong` says.
        progress: A function that is called with a line of text at the start of each part of the work.

    Returns:
        The folder's manifest.

    Raises:
        UserError: If a record or a setting is wrong (the message names file and line), or the folder may not be replaced or is
            being prepared by another process. Nothing is written then.
    """
    with only_writer(data.prepared, progress):
        return _prepare(data, canvas, progress)


def _prepare(data: DataConfig, canvas: CanvasConfig, progress: Progress) -> Manifest:
    """Does the work of ``prepare``, whose folder is locked."""
    data.check()
    canvas.check()
    data = with_recipe(data)
    inputs = open_inputs(data)
    given = None if data.tokenizer == "train" else _given_tokenizer(data)
    own_template = given.tokenizer.settings.get("chat_template") if given else None
    template = template_source(data.template, tokenizer_template=own_template)
    settings = recorded_settings(data, canvas)
    hashes = hash_inputs(inputs, data)
    joint = {split: joint_sha256(some) for split, some in hashes.items()}
    origin: dict[str, Any] = {**_sha256_of_files(given.tokenizer), **given.ids} if given else {}
    before = compute_fingerprint(settings, joint, origin, template)
    if given and len(given.ends) > 1:
        origin["ends"] = given.ends
    fingerprint = compute_fingerprint(settings, joint, origin, template)
    there = _prepared_before(data, settings, {1: before, 2: fingerprint, MANIFEST_FORMAT: fingerprint})
    if there is not None and there.format == MANIFEST_FORMAT:
        progress(f"already prepared: {data.prepared} holds the same settings and inputs")
        return there

    size = sum(each.size for some in inputs.values() for each in some)
    with worker_pool(count_processes(data.prepare_workers, size)) as in_order:
        sources = read_splits(inputs, hashes, data, in_order)
        lacks_fields = any(source.has_fields for source in sources.values())
        if there is not None and not (lacks_fields and data.overwrite):
            without = ", but not the records' other fields, which graders get (data.overwrite adds them)" * lacks_fields
            progress(f"already prepared: {data.prepared} holds the same settings and inputs{without}")
            return there
        encoder = _make_encoder(data, sources["train"], given, template, progress)
        with (
            new_folder(data.prepared, marker=MANIFEST_FILE, overwrite=data.overwrite) as folder,
            tempfile.TemporaryDirectory(prefix="jaxblock-") as scratch,
        ):
            tools = WritingTools(data, canvas, encoder, in_order, pathlib.Path(scratch), progress)
            splits, overlaps = write_splits(folder, sources, tools)
            manifest = _manifest(fingerprint, settings, sources, encoder, splits=splits, overlaps=overlaps)
            _write_text(folder, encoder, manifest)
    return manifest


def _manifest(
    fingerprint: str, settings: dict[str, dict[str, Any]], sources: dict[str, Source], encoder: Encoder, **counts: Any
) -> Manifest:
    """Makes the manifest of a folder that was just written; `counts` are what `write_splits` returned."""
    special = encoder.special
    return Manifest(
        format=MANIFEST_FORMAT,
        fingerprint=fingerprint,
        **settings,
        inputs={split: source.described() for split, source in sources.items()},
        tokenizer={"kind": type(encoder.tokenizer).__name__, "files": _sha256_of_files(encoder.tokenizer)},
        template=dataclasses.asdict(encoder.template),
        special=special,
        vocab_size=max(encoder.tokenizer.vocab_size, 1 + max(special.mask, special.pad, *special.stop_ids)),
        **counts,
    )


def _prepared_before(
    data: DataConfig, settings: dict[str, dict[str, Any]], fingerprints: dict[int, str]
) -> Manifest | None:
    """Returns the folder's manifest if it has this fingerprint; None if the folder is to be written.

    Args:
        data: The data settings.
        settings: The settings as a manifest records them.
        fingerprints: The fingerprint of these settings and inputs, by the format of the manifest.

    Raises:
        UserError: If the folder has other content and may not be replaced.
    """
    path = as_path(data.prepared)
    if (path / MANIFEST_FILE).exists():
        try:
            there = read_manifest(data.prepared)
            check_inventory(data.prepared, sizes_of=records_file("", "*"), verify=data.verify)
        except UserError:
            if not data.overwrite:
                raise
            return None
        files = [records_file(data.prepared, split) for split in there.splits]
        if there.fingerprint == fingerprints[there.format] and all(as_path(file).exists() for file in files):
            return there
        if not data.overwrite:
            changed = "; ".join(changed_settings(there, settings))
            raise UserError(
                f"data.prepared: {data.prepared} holds data that were prepared with other settings or inputs "
                f"({changed or 'the content of its input, tokenizer or template files'}). Set data.overwrite to replace "
                "them, or another data.prepared"
            )
    check_vacant(data.prepared, marker=MANIFEST_FILE, overwrite=data.overwrite)
    return None


class _GivenTokenizer(NamedTuple):
    """Holds a tokenizer that is not trained here, and the special ids and all end ids in the files of its checkpoint."""

    tokenizer: Tokenizer
    ids: dict[str, int]
    ends: tuple[int, ...]


def _given_tokenizer(data: DataConfig) -> _GivenTokenizer:
    tokenizer, ids = load_tokenizer(data.tokenizer), ids_in_checkpoint(data.tokenizer)
    tokenizer = add_mask(tokenizer, data, ids) if data.add_mask_token else tokenizer
    return _GivenTokenizer(tokenizer, ids, ends_in_checkpoint(data.tokenizer))


def _make_encoder(
    data: DataConfig, train: Source, given: _GivenTokenizer | None, source: str, progress: Progress
) -> Encoder:
    """Makes the encoder from tokenizer, template and special ids; trains a tokenizer where none is given."""
    if given is None:
        every = max(1, -(-train.letters // _MOST_LETTERS))
        some = "" if every == 1 else f"one of {every} of the "
        progress(f"training a {data.tokenizer_type} tokenizer on {some}{len(train):,} records")
        tokens = {"bos_token": BOS, "eos_token": data.eos_token or EOS, "eot_token": data.eot_token or EOT}
        template = Template(data.template, source, tokens)
        read = itertools.islice(train.examples(), 0, None, every)
        texts = (template.render(example.messages, False, where=example.where) for example in read)
        given = _GivenTokenizer(train_tokenizer(texts, data, template.control_tokens()), {}, ())
    progress(f"tokenizer: {given.tokenizer.vocab_size:,} tokens")
    template, special = find_special(given.tokenizer, data.template, source, data, given.ids, given.ends)
    return Encoder(given.tokenizer, template, special, data)


def _sha256_of_files(tokenizer: Tokenizer) -> dict[str, str]:
    return {name: hashlib.sha256(content).hexdigest() for name, content in tokenizer.files.items()}


def _write_text(folder: pathlib.Path, encoder: Encoder, manifest: Manifest) -> None:
    """Writes the files of a prepared folder that stand beside the records, the manifest and the list of files last."""
    encoder.tokenizer.save(folder / "tokenizer")
    write_text(folder / "tokenizer" / "template.jinja", encoder.template.source)
    write_manifest(folder, manifest)
    write_inventory(folder)
