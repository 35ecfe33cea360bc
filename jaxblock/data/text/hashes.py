"""Computes the hashes of inputs, by which prepared data know what they were made of."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterable, Sequence

from jaxblock.data.config import DataConfig
from jaxblock.data.text.examples import Example
from jaxblock.data.text.fields import fields_json
from jaxblock.data.text.inputs import Input
from jaxblock.data.text.pieces import Piece, is_filtered


def content_sha256(each: Input, config: DataConfig, split: str) -> str:
    """Computes the hash of an input's bytes, or of its examples' texts where there is no file."""
    if each.sha256 is not None:
        return each.sha256
    pieces = (Piece(chunk, config, is_filtered(config, split)) for chunk in each.chunks())
    return _texts_sha256(example for piece in pieces for example in piece.examples())


def _texts_sha256(examples: Iterable[Example]) -> str:
    """Computes the hash of examples' texts, and of their other fields where they have any."""
    content, separator = hashlib.sha256(b"["), b""
    with tempfile.SpooledTemporaryFile(1 << 20) as fields:  # they come after all texts
        for example in examples:
            turns = [[turn["role"], turn["content"]] for turn in example.messages]
            content.update(separator + json.dumps(turns, ensure_ascii=False).encode())
            separator = b", "
            if example.fields:
                text, _ = fields_json(example.fields, example.where)
                fields.write(separator + json.dumps(text, ensure_ascii=False).encode())
        fields.seek(0)
        while more := fields.read(1 << 20):
            content.update(more)
    content.update(b"]")
    return content.hexdigest()


def joint_sha256(hashes: Sequence[str]) -> str:
    """Returns one hash for several inputs in their order; that of a single input stays as it is."""
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("\n".join(hashes).encode()).hexdigest()
