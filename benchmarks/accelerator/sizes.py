"""The items of the kit and the sizes that they measure. Nothing here needs JAX."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple


class Item(NamedTuple):
    """One thing to measure, in a process of its own.

    Attributes:
        name: what it is called on the command line and in the results.
        share: the largest share of the whole time that it may take. The shares add up to more than 1: most items end early.
        what: what it measures, in a sentence for the table.
    """

    name: str
    share: float
    what: str


ITEMS = (
    Item("parity", 0.12, "Largest difference of the golden models' float32 logits, relative to the largest logit."),
    Item("weights", 0.12, "Random bf16 weights of the model's size, made on the device."),
    Item("lora", 0.25, "LoRA step on short sequences."),
    Item("lora-long", 0.25, "LoRA step on long sequences."),
    Item("int8", 0.2, "LoRA step on short sequences over an int8 base."),
    Item("decode", 0.25, "Blockwise decoding, against what the chip's memory and arithmetic allow."),
    Item("decode-caches", 0.35, "Blockwise decoding without a cache and with each of them."),
    Item("attention", 0.15, "The platform's fused attention against XLA's, and both against the float32 reference."),
    Item("checkpoint", 0.12, "Saving and restoring the state of the LoRA run, checksums included."),
    Item("quickstart", 0.5, "The quickstart's phases, with training cut short where the time is."),
)


class Canvas(NamedTuple):
    """The sizes of a batch of sequences.

    Attributes:
        prompt: prompt positions of a sequence.
        response: response positions of a sequence.
        block: positions of a block.
        rows: sequences per device.
    """

    prompt: int
    response: int
    block: int
    rows: int = 1

    @property
    def length(self) -> int:
        """Positions of a sequence."""
        return self.prompt + self.response


@dataclass(frozen=True)
class Sizes:
    """What is measured.

    Attributes:
        architecture: fields of the network that replace those of LLaDA-8B's published config.json.
        lora_rank: the rank of the adapters; None for that of the preset.
        short: the batch of the short LoRA step.
        long: the batch of the long LoRA step.
        decoding: the canvas of the decoder.
        steps_per_block: decode steps of a block.
        batches: how many prompts are decoded together, one measurement each.
        repeats: the number of timed runs of each measurement.
        seconds: a measurement stops repeating after so many seconds, but not before its third run.
        quickstart_least: the quickstart is skipped where fewer seconds than these are left.
        quickstart_flags: further flags of the quickstart's verbs, by verb.
    """

    architecture: Mapping[str, Any] = field(default_factory=dict)
    lora_rank: int | None = None
    short: Canvas = Canvas(prompt=256, response=256, block=32, rows=16)
    long: Canvas = Canvas(prompt=2048, response=2048, block=32, rows=2)
    decoding: Canvas = Canvas(prompt=128, response=64, block=32)
    steps_per_block: int = 16
    batches: tuple[int, ...] = (1, 8, 32)
    repeats: int = 5
    seconds: float = 12.0
    quickstart_least: float = 60.0
    quickstart_flags: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


FULL = Sizes()
TINY = Sizes(
    architecture={
        "d_model": 32, "n_layers": 2, "n_heads": 2, "n_kv_heads": 2, "head_dim": 16, "mlp_dim": 48, "vocab_size": 64,
        "mask_id": 63, "eos_id": 62, "pad_id": 62, "max_len": 64,
    },
    lora_rank=2,
    short=Canvas(prompt=8, response=8, block=4, rows=2),
    long=Canvas(prompt=32, response=32, block=4, rows=1),
    decoding=Canvas(prompt=8, response=8, block=4),
    steps_per_block=2,
    batches=(1, 2),
    repeats=3,
    quickstart_least=0.0,
    quickstart_flags={
        "prepare": ("--data.builtin_train", "200", "--data.builtin_test", "8", "--data.validation_records", "4",
                    "--data.overlong", "drop"),
        "train": ("--train.steps", "3", "--optimizer.warmup_steps", "1", "--train.eval_every", "0",
                  "--train.eval_problems", "0", "--train.eval_nelbo_rows", "0", "--train.log_every", "1"),
        "evaluate": ("--evaluate.nelbo_rows", "4", "--decode.batch_size", "4"),
    },
)  # fmt: skip
"""Sizes for a rehearsal on a CPU, which takes the same code paths in seconds."""
