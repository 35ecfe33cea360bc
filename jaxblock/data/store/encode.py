"""Turns the examples of a piece of an input into the bytes of records, in whatever process."""

from __future__ import annotations

import hashlib
from typing import NamedTuple

import numpy as np

from jaxblock.data.store.length_rules import LengthRules, Verdict
from jaxblock.data.store.records import Record, encode_record
from jaxblock.data.text.fields import fields_json
from jaxblock.data.text.pieces import Piece
from jaxblock.data.tokens.encoding import Encoder
from jaxblock.errors import UserError


class Encoded(NamedTuple):
    """Holds an example as a record, and what is counted of it.

    Attributes:
        verdict: How it fits the rules on lengths.
        record: The record's bytes, whose place in its split is 0; empty where it is left out.
        lengths: The numbers of tokens of the record's prompt and response.
        prompt_hash: A hash of the prompt, blanks and case aside.
        field_bytes: The number of bytes of the record's other fields.
        left_out: The names of the fields that JSON cannot hold.
        unknown: Whether the response holds letters that the tokenizer lacks.
    """

    verdict: Verdict
    record: bytes = b""
    lengths: tuple[int, int] = (0, 0)
    prompt_hash: bytes = b""
    field_bytes: int = 0
    left_out: tuple[str, ...] = ()
    unknown: bool = False


class EncodedPiece(NamedTuple):
    """Holds the examples of a piece as far as they could be encoded, and the error of the next one, if there is one.

    An error is not raised in the process that finds it: where enough records come before it, it does not matter.
    """

    examples: list[Encoded]
    error: UserError | None


class PieceEncoder:
    """Encodes pieces of inputs. It does not change, so that processes may have copies."""

    def __init__(self, encoder: Encoder, rules: LengthRules) -> None:
        """Keeps the encoder and the rules on lengths."""
        self._encoder, self._rules = encoder, rules

    def __call__(self, work: tuple[str, Piece]) -> EncodedPiece:
        """Encodes a piece of a split's input.

        Args:
            work: The split's name, and the piece.
        """
        split, piece = work
        found: list[Encoded] = []
        try:
            for example in piece.examples():
                prompt_ids, response_ids = self._encoder.prompt_and_response(example)
                verdict = self._rules.judge(split, example, prompt_ids, response_ids)
                if verdict.dropped:
                    found.append(Encoded(verdict))
                    continue
                response_ids = response_ids[: self._rules.limits[1]]
                ids = (np.array(prompt_ids, np.int32), np.array(response_ids, np.int32))
                fields, left_out = fields_json(example.fields, example.where)
                record = Record(*ids, example.prompt, example.response, example.source, 0, fields)
                found.append(
                    Encoded(
                        verdict,
                        encode_record(record),
                        (len(prompt_ids), len(response_ids)),
                        prompt_hash(example.prompt),
                        len(fields),
                        tuple(left_out),
                        self._encoder.holds_unknown(response_ids),
                    )
                )
        except UserError as error:
            return EncodedPiece(found, error)
        return EncodedPiece(found, None)


def prompt_hash(prompt: str) -> bytes:
    """Returns 8 bytes that are equal for prompts that differ in blanks and case alone."""
    normal = " ".join(prompt.split()).casefold()
    return hashlib.blake2b(normal.encode(), digest_size=8).digest()
