"""Opens a prepared folder for the commands that read it."""

from __future__ import annotations

import os
from dataclasses import dataclass

from etils import epath

from jaxblock.data.store.manifest import MANIFEST_FILE, Manifest, read_manifest
from jaxblock.data.store.records import Records, records_file
from jaxblock.data.tokens.encoding import Encoder
from jaxblock.data.tokens.load import load_tokenizer
from jaxblock.data.tokens.special import SpecialIds
from jaxblock.data.tokens.templates import Template
from jaxblock.data.tokens.tokenizer import Tokenizer
from jaxblock.diffusion.config import CanvasConfig
from jaxblock.errors import UserError
from jaxblock.io.files import read_bytes, sha256
from jaxblock.io.inventory import check_inventory, has_inventory
from jaxblock.io.paths import PathLike, as_path

TEMPLATE_FILE = "template.jinja"


@dataclass(frozen=True)
class Prepared:
    """Gives access to a prepared folder: its manifest, tokenizer and records.

    Attributes:
        folder: The folder's path.
        manifest: The description of the folder.
        tokenizer: The folder's tokenizer.
        encoder: The tokenizer with the chat template and the special ids.
    """

    folder: str
    manifest: Manifest
    tokenizer: Tokenizer
    encoder: Encoder

    @property
    def special(self) -> SpecialIds:
        """The ids of the special tokens: mask, end of the sequence, end of a turn, padding."""
        return self.encoder.special

    def records(self, split: str) -> Records:
        """Opens a split ("train", "validation" or "test") for random access.

        Raises:
            UserError: If the folder has no split of that name, or its file is damaged.
        """
        if split not in self.manifest.splits:
            raise UserError(
                f"{self.folder} holds no {split!r} records (only {', '.join(self.manifest.splits)}); set "
                f"data.{split} and prepare again"
            )
        return Records(self.folder, split)

    def check_canvas(self, canvas: CanvasConfig) -> None:
        """Raises UserError where a canvas is smaller than the one that the records were prepared for.

        Args:
            canvas: The canvas to train or score on; where it has a `total_len`, each record's length is compared with that.
        """
        prepared_for = self.manifest.canvas_config
        for name, length, least in (
            ("prompt_len", canvas.prompt_len, prepared_for.prompt_len),
            ("response_len", canvas.response_len, prepared_for.response_len),
        ):
            if length < least:
                raise UserError(
                    f"canvas.{name} is {length}, but {self.folder} was prepared with {least}: records may be longer; use "
                    "the same, or prepare again"
                )
        if canvas.total_len is None:
            return
        for split in self.manifest.splits:
            longest = int(self.records(split).lengths().sum(-1).max(initial=0))
            if longest > canvas.total_len:
                raise UserError(
                    f"canvas.total_len is {canvas.total_len}, but a {split} record of {self.folder} has {longest} tokens: "
                    "prepare with data.max_total_len set to it, or raise it"
                )


def open_prepared(folder: PathLike, *, verify: bool = False) -> Prepared:
    """Opens a prepared folder, or a run folder for its tokenizer and manifest.

    Args:
        folder: The folder.
        verify: Whether all files are compared byte by byte with what was prepared; else the small ones are, and the records'
            sizes (`Prepared.records` compares those that it opens).

    Raises:
        UserError: If the folder is absent, not whole, or damaged, or a file of it was replaced.
    """
    manifest = read_manifest(folder)
    check_inventory(folder, sizes_of=records_file("", "*"), verify=verify)
    local = as_path(folder) / "tokenizer"
    if not has_inventory(folder):
        _check_text(manifest, local)
    tokenizer = load_tokenizer(local)
    source = read_bytes(local / TEMPLATE_FILE).decode()
    template = Template(manifest.template["name"], source, manifest.template["tokens"])
    encoder = Encoder(tokenizer, template, manifest.special, manifest.data_config)
    return Prepared(os.fspath(folder), manifest, tokenizer, encoder)


def _check_text(manifest: Manifest, folder: epath.Path) -> None:
    """Raises UserError where tokenizer or template are not those in the manifest, as a folder of an earlier version has it."""
    files = {name: content for name, content in manifest.tokenizer["files"].items() if (folder / name).exists()}
    changed = [name for name, content in files.items() if sha256(folder / name) != content]
    if read_bytes(folder / TEMPLATE_FILE).decode() != manifest.template["source"]:
        changed.append(TEMPLATE_FILE)
    if changed:
        raise UserError(
            f"{folder / changed[0]} is not the file that {MANIFEST_FILE} describes: put the file back, or make the folder again"
        )
