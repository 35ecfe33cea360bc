"""``jaxblock prepare``: turns text into records of tokens."""

from __future__ import annotations

from dataclasses import dataclass, field

from jaxblock.commands import say
from jaxblock.config.config import Config
from jaxblock.data.config import DataConfig
from jaxblock.diffusion.config import CanvasConfig


@dataclass(frozen=True)
class Options:
    """Turns text records into token records: tokenizer, chat template, length checks, ArrayRecord, manifest."""

    config: str | None = None
    """YAML file of sections, or the name of a preset; flags override it."""
    data: DataConfig = field(default_factory=DataConfig)
    canvas: CanvasConfig = field(default_factory=CanvasConfig)


def run(options: Options, config: Config) -> int:
    """Prepares the data and prints how many records were kept and dropped, and why."""
    from jaxblock.data.store.prepare import prepare

    manifest = prepare(config.data, config.canvas, say)
    for split, report in manifest.splits.items():
        dropped = sum(report["dropped"].values())
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in report["dropped"].items())
        print(f"{split}: {report['kept']:,} kept, {dropped:,} dropped{f' ({reasons})' if reasons else ''}")
        for name, count in report.get("fields", {}).get("left_out", {}).items():
            print(f"{split}: field {name!r} of {count:,} records is not kept for graders: JSON cannot hold its values")
    for pair, count in manifest.overlaps.items():
        if count:
            print(f"warning: {count:,} prompts are in both {pair}")
    print(f"{config.data.prepared}: {manifest.vocab_size:,} tokens in the vocabulary; see manifest.json")
    return 0
