"""``jaxblock prepare``: turns text into records of tokens."""

from __future__ import annotations

from dataclasses import dataclass, field

from jaxblock.commands import say
from jaxblock.commands.unused import unused_flags
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

    for note in unused_flags("prepare", options, config):
        say(f"note: {note}")
    manifest = prepare(config.data, config.canvas, say)
    for split, report in manifest.splits.items():
        dropped = sum(report["dropped"].values())
        line = f"{split}: {report['kept']:,} kept, {dropped:,} dropped{_reasons(report['dropped'])}"
        if cut := sum(report["cut"].values()):
            line += f", {cut:,} of the kept ones cut{_reasons(report['cut'])}"
        print(line)
        if unknown := report.get("unknown"):
            print(
                f"warning: {split}: {unknown:,} responses hold letters that the tokenizer lacks: its token for unknown letters "
                "stands for them"
            )
        for name, count in report.get("fields", {}).get("left_out", {}).items():
            print(f"{split}: field {name!r} of {count:,} records is not kept for graders: JSON cannot hold its values")
    for pair, count in manifest.overlaps.items():
        if count:
            print(f"warning: {count:,} prompts are in both {pair}")
    print(f"{config.data.prepared}: {manifest.vocab_size:,} tokens in the vocabulary; see manifest.json")
    return 0


def _reasons(counts: dict[str, int]) -> str:
    """Returns counts by reason, in brackets after a space; nothing where there are none."""
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in counts.items())
    return f" ({reasons})" if reasons else ""
