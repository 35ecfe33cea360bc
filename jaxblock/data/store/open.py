"""A prepared folder, opened for the verbs that read it."""

from __future__ import annotations

import os
from dataclasses import dataclass

from jaxblock.data.config import DataConfig
from jaxblock.data.store import manifest as manifests
from jaxblock.data.store import records
from jaxblock.data.store.manifest import Manifest
from jaxblock.data.tokens import special, templates, tokenizers
from jaxblock.data.tokens.encoding import Encoder
from jaxblock.data.tokens.special import SpecialIds
from jaxblock.data.tokens.templates import Template
from jaxblock.data.tokens.tokenizers import Tokenizer
from jaxblock.errors import UserError
from jaxblock.io.files import read_bytes
from jaxblock.io.paths import PathLike, as_path


@dataclass(frozen=True)
class Prepared:
    """A prepared folder, opened: what `train`, `decode` and the rest need of it."""

    folder: str
    manifest: Manifest
    tokenizer: Tokenizer
    encoder: Encoder

    @property
    def special(self) -> SpecialIds:
        """Ids of the mask, the end of sequence and the end of turn."""
        return self.encoder.special

    def records(self, split: str) -> records.Records:
        """Random access to a split.

        Raises:
            UserError: If the folder has none of that name, or its file is damaged.
        """
        if split not in self.manifest.splits:
            raise UserError(
                f"{self.folder} holds no {split!r} records (only {', '.join(self.manifest.splits)}); set "
                f"data.{split} and prepare again"
            )
        return records.read(self.folder, split)


def open_prepared(folder: PathLike) -> Prepared:
    """Opens a prepared folder.

    Raises:
        UserError: If it is absent, not whole, or damaged.
    """
    manifest = manifests.read(folder)
    local = as_path(folder) / "tokenizer"
    tokenizer = tokenizers.load(local)
    source = read_bytes(local / "template.jinja").decode()
    template = Template(manifest.template["name"], source, manifest.template["tokens"])
    return Prepared(
        os.fspath(folder), manifest, tokenizer, Encoder(tokenizer, template, manifest.special, manifest.data_config)
    )


def encoder_of(folder: PathLike, tokenizer: Tokenizer, mask_id: int | None, eos_id: int) -> Encoder | None:
    """Tokenizer and chat template of a checkpoint's folder, where no manifest says which belong together.

    Args:
        folder: holds template.jinja (written by an export), or the tokenizer brought its own chat template.
        tokenizer: the folder's tokenizer.
        mask_id: from config.json; None if it has none.
        eos_id: from config.json.

    Returns:
        The encoder; None without a template or a mask token.
    """
    if mask_id is None:
        return None
    own = as_path(folder) / "template.jinja"
    source = read_bytes(own).decode() if own.exists() else tokenizer.settings.get("chat_template")
    if source is None:
        return None
    found = templates.find("tokenizer", tokenizer_template=source)
    config = DataConfig(tokenizer=os.fspath(folder))
    name = "tokenizer" if source == tokenizer.settings.get("chat_template") else "template.jinja"
    template, ids = special.assemble(tokenizer, name, found, config, {"mask": mask_id, "eos": eos_id})
    return Encoder(tokenizer, template, ids, config)
