"""Makes a tokenizer.json from a Qwen2 tokenizer's vocab.json and merges.txt, since Dream ships only these two files."""

from __future__ import annotations

import json
from collections.abc import Mapping

import tokenizers

from jaxblock.data.tokens.tokenizer import read_settings
from jaxblock.errors import UserError

FILES = ("vocab.json", "merges.txt")
QWEN2_CLASSES = ("DreamTokenizer", "Qwen2Tokenizer", "Qwen2TokenizerFast")
"""Values of `tokenizer_class` in tokenizer_config.json that stand for Qwen2's way of splitting a text."""

# Qwen2 splits a text into these parts before it merges: contractions, words, single digits, punctuation, line ends, blanks.
_QWEN2_PARTS = "|".join(
    (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)",
        r"[^\r\n\p{L}\p{N}]?\p{L}+",
        r"\p{N}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)


def tokenizer_json(files: Mapping[str, bytes], where: str) -> bytes:
    """Makes the content of a tokenizer.json.

    Args:
        files: The contents of vocab.json, merges.txt and tokenizer_config.json by name; tokenizer_config.json gives the
            tokenizer's class, and the added tokens with their ids.
        where: The folder that error messages name.

    Returns:
        The bytes of a tokenizer.json.

    Raises:
        UserError: If the class is unknown, or the files do not make a tokenizer with these ids.
    """
    settings = read_settings(files, where)
    kind = settings.get("tokenizer_class")
    if kind not in QWEN2_CLASSES:
        raise UserError(
            f"{where}: vocab.json and merges.txt of a {kind!r} (tokenizer_class in tokenizer_config.json) are not read, only "
            f"those of {', '.join(QWEN2_CLASSES)}; make a tokenizer.json of them in transformers: "
            "AutoTokenizer.from_pretrained(...).save_pretrained(...)"
        )
    try:
        lines = files["merges.txt"].decode().split("\n")
        rules = [line.split() for line in lines if line.strip() and not line.startswith("#version")]
        pairs = [(left, right) for left, right in rules]
        model = tokenizers.models.BPE(json.loads(files["vocab.json"]), pairs)
        added = settings.get("added_tokens_decoder", {})
        tokens = {int(i): tokenizers.AddedToken(**entry) for i, entry in added.items()}
    except Exception as error:  # the library raises plain Exception
        raise UserError(f"{where}: vocab.json, merges.txt or tokenizer_config.json cannot be used ({error})") from error
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.normalizer = tokenizers.normalizers.NFC()
    parts = tokenizers.pre_tokenizers.Split(tokenizers.Regex(_QWEN2_PARTS), behavior="isolated")
    to_bytes = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([parts, to_bytes])
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    for token_id, token in sorted(tokens.items()):
        tokenizer.add_tokens([token])
        if tokenizer.token_to_id(token.content) != token_id:
            raise UserError(
                f"{where}: tokenizer_config.json gives {token.content!r} the id {token_id}, but after vocab.json it would be "
                f"{tokenizer.token_to_id(token.content)}: the files do not belong together"
            )
    return tokenizer.to_str().encode()
