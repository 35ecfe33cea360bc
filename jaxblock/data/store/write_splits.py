"""Encodes the examples of every split and writes their records, one piece of an input after another."""

from __future__ import annotations

import pathlib
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from jaxblock.data.config import DataConfig
from jaxblock.data.store.encode import Encoded, EncodedPiece, PieceEncoder
from jaxblock.data.store.length_rules import LengthCheck, LengthRules, SplitCount
from jaxblock.data.store.overlaps import PromptHashes
from jaxblock.data.store.records import record_writer, with_index
from jaxblock.data.store.statistics import LengthStatistics
from jaxblock.data.store.worker_pool import FileFunction
from jaxblock.data.text.pieces import InOrder, Piece
from jaxblock.data.text.sources import Source, SourcePart
from jaxblock.data.tokens.encoding import Encoder
from jaxblock.diffusion.config import CanvasConfig
from jaxblock.errors import UserError

Progress = Callable[[str], None]

_SECONDS = 20.0  # between two lines of progress


class WritingTools(NamedTuple):
    """Holds what the splits are written with.

    Attributes:
        data: Resolved data settings.
        canvas: The canvas settings.
        encoder: Turns conversations into ids.
        in_order: Encodes the pieces, in this process or in others.
        scratch: A folder of temporary files.
        progress: Is called with lines of text.
    """

    data: DataConfig
    canvas: CanvasConfig
    encoder: Encoder
    in_order: InOrder
    scratch: pathlib.Path
    progress: Progress


def write_splits(
    folder: pathlib.Path, sources: dict[str, Source], tools: WritingTools
) -> tuple[dict[str, Any], dict[str, int]]:
    """Writes the records of every split into a local folder.

    Args:
        folder: The folder.
        sources: The examples of each split, by its name.
        tools: What they are written with.

    Returns:
        (for each split the report that the manifest's `splits` holds, how many prompts each two splits share).

    Raises:
        UserError: If an example cannot be encoded, is too long where `data.overlong` is `error`, or none of a split is kept.
    """
    rules = LengthRules(tools.data, tools.canvas)
    check, hashes = LengthCheck(rules), PromptHashes(tools.scratch)
    encode: Any = PieceEncoder(tools.encoder, rules)
    if tools.in_order is not map:
        encode = FileFunction(encode, tools.scratch / "encoder.pickle")
    found: dict[str, tuple[dict[str, Any], LengthStatistics]] = {}
    for split, source in sources.items():
        most = (tools.data.max_records or 0) if split == "train" else 0
        count, statistics = SplitCount(split, rules, check, most), LengthStatistics(tools.canvas.block)
        tools.progress(f"{split}: {len(source):,} records")
        files = []
        with record_writer(folder, split) as write:
            for part in source.parts:
                before = count.kept
                for example in _kept(part, source, split, encode, count, tools):
                    write(with_index(example.record, count.kept - 1))
                    statistics.add(*example.lengths)
                    hashes.add(split, example.prompt_hash)
                files.append({"path": part.input.path, "kept": count.kept - before})
                if split == "train" and tools.data.weights is not None and not files[-1]["kept"]:
                    raise UserError(
                        f"data.weights gives a share to {part.input.path}, of which no record is left for training: leave the "
                        "file out, or change what drops its records (canvas, data.max_total_len, data.validation_records)"
                    )
        report = count.report()
        report["dropped"] |= source.dropped
        found[split] = report | ({"files": files} if len(files) > 1 else {}), statistics
    check.check()
    return {split: report | lengths.report() for split, (report, lengths) in found.items()}, hashes.count_overlaps()


def _kept(
    part: SourcePart, source: Source, split: str, encode: Any, count: SplitCount, tools: WritingTools
) -> Iterator[Encoded]:
    """Yields the encoded examples of an input that are kept, after counting them and those that are not."""
    total, seen, before, told = part.numbers()[0], 0, count.kept, time.monotonic()
    pieces: Iterator[tuple[str, Piece]] = ((split, piece) for piece in source.pieces(part))
    results: Iterator[EncodedPiece] = tools.in_order(encode, pieces)
    for result in results:
        for example in result.examples:
            seen += 1
            if count.add(example.verdict):
                count.add_fields(example.field_bytes, list(example.left_out))
                count.add_unknown(example.unknown)
                yield example
                if count.is_full(before):
                    count.skip(total - seen)
                    return
        if result.error is not None:
            raise UserError(str(result.error)) from result.error
        if time.monotonic() - told > _SECONDS:
            told = time.monotonic()
            tools.progress(f"{split}: {seen:,} of {total:,} records of {part.input.path}")
