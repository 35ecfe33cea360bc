"""Loads the tokenizer that `data.tokenizer` names by path or hub name."""

from __future__ import annotations

import os

from jaxblock.data.tokens import qwen2
from jaxblock.data.tokens.sentencepiece_model import SentencePieceTokenizer
from jaxblock.data.tokens.tokenizer import Tokenizer
from jaxblock.data.tokens.tokenizer_json import HuggingFaceTokenizer
from jaxblock.errors import UserError
from jaxblock.io.hub import local_checkpoint
from jaxblock.io.paths import PathLike, as_path, explained

# added_tokens.json, vocab.json and merges.txt are older files of the same tokenizer, which some transformers classes still read.
_COMPANIONS = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "added_tokens.json",
    *qwen2.FILES,
)


def has_tokenizer(folder: PathLike) -> bool:
    """Tells whether a folder contains a file from which `load_tokenizer` can make a tokenizer."""
    names = {entry.name for entry in as_path(folder).iterdir()}
    return "tokenizer.json" in names or "merges.txt" in names or any(name.endswith(".model") for name in names)


def load_tokenizer(path: PathLike) -> Tokenizer:
    """Reads a tokenizer: a SentencePiece .model, a tokenizer.json, or a folder (a run, or a hub name) that contains one.

    A folder's tokenizer.json is preferred, then vocab.json with merges.txt (Dream ships its Qwen2 tokenizer so), then a
    .model. These files beside it become part of the tokenizer: tokenizer_config.json, special_tokens_map.json,
    chat_template.jinja, added_tokens.json, vocab.json and merges.txt.

    Raises:
        UserError: If there is no tokenizer, or it cannot be read.
    """
    name = local_checkpoint(path, weights=False)
    target = as_path(name)
    with explained("read the tokenizer", name):
        if (target / "manifest.json").exists() and (target / "tokenizer").is_dir():
            target = target / "tokenizer"  # of a run or of prepared data
        if target.is_dir():
            models = sorted(entry.name for entry in target.iterdir() if entry.name.endswith(".model"))
            names = ["tokenizer.json", "merges.txt", *models]
            main = next((target / entry for entry in names if (target / entry).exists()), None)
            if main is None:
                raise UserError(
                    f"data.tokenizer: the folder {name} holds neither tokenizer.json, nor vocab.json with merges.txt, "
                    "nor a SentencePiece .model"
                )
        elif target.exists():
            main = target
        else:
            raise UserError(
                f"data.tokenizer: {name} does not exist; give `train`, a .model, a tokenizer.json, or a folder with one"
            )
        files = {entry: (main.parent / entry).read_bytes() for entry in _COMPANIONS if (main.parent / entry).exists()}
        content = main.read_bytes()
    where = os.fspath(main)
    if main.name == "merges.txt":
        return HuggingFaceTokenizer({**files, "tokenizer.json": qwen2.tokenizer_json(files, name)}, name)
    if main.suffix == ".json":
        return HuggingFaceTokenizer({**files, "tokenizer.json": content}, where)
    if main.suffix == ".model":
        return SentencePieceTokenizer({**files, "tokenizer.model": content}, where)
    raise UserError(f"data.tokenizer: {where} is neither a SentencePiece .model nor a tokenizer.json")
