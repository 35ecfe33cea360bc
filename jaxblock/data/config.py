"""Defines the `data` section: where text comes from and how it becomes tokens."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from fractions import Fraction
from math import lcm
from typing import Literal

from jaxblock.errors import shown
from jaxblock.settings import ABOVE_0, NOT_NEGATIVE, Section, between, may_change, require, setting

RecipeName = Literal["metamathqa", "gsm8k", "math"]
"""The names of the data sets that `prepare` has recipes for (jaxblock/data/text/recipes.py)."""


_LONGEST_CYCLE = 100_000


@dataclass(frozen=True)
class DataConfig(Section, name="data"):
    """Says where text comes from, how it becomes tokens, and where the prepared data are."""

    prepared: str = may_change("prepared", common=("prepare", "inspect", "train", "evaluate"))
    """Folder of prepared data: `prepare` writes it, every other verb reads it."""
    verify: bool = may_change(False)
    """Whether every byte of the prepared folder is compared with its list of hashes (also `--verify`); else only small files and
    sizes are."""
    train: str | tuple[str, ...] = setting("builtin", common=("prepare",))
    """The training records: a .jsonl, .json or .parquet file, `hf:NAME[@REVISION][:CONFIG][#SPLIT]` (the `datasets` library),
    several of these, or `builtin`: the recipe's own source, else generated arithmetic word problems."""
    weights: tuple[float, ...] | None = setting(None, ABOVE_0, common=("prepare",))
    """The share of each training file in the rows that `train` reads, in the order of `train`, adding up to 1; None reads every
    record once an epoch. Prepared data need not be prepared again for other weights."""
    validation: str | None = setting(None, common=("prepare",))
    """The records scored during training; None takes `validation_records` records out of the training file (for the built-in
    corpus: that many held-out problems)."""
    test: str | None = setting("builtin", common=("prepare",))
    """The records for `decode` and `evaluate`, which training never sees; None for none."""
    validation_records: int = setting(128, NOT_NEGATIVE)
    """The number of validation records to set apart when `validation` is None; a conversation counts as one and is never split."""
    recipe: RecipeName | None = setting(None, common=("prepare",))
    """A data set that the paper uses: its field names, prompt, length rule and filter (docs/data.md); a field that is set here
    overrides the recipe's."""
    test_recipe: RecipeName | None = None
    """The recipe of the test records: their field names, and their source where `test` is `builtin`; None for the training
    records' recipe."""
    prompt_field: str | None = setting(None, common=("prepare", "decode"))
    """The field that holds the prompt; None for the recipe's, else `question`."""
    input_field: str | None = None
    """The field with what the prompt is about, such as Alpaca's `input`; where it holds text, this follows the prompt on a new line.
    None for none."""
    system_field: str | None = None
    """The field with a record's system message, such as `system_prompt`, for records without one among their messages; where it holds
    no text, `system` is used. None for none."""
    response_field: str | None = setting(None, common=("prepare",))
    """The field that holds the response; None for the recipe's, else `answer`."""
    messages_field: str = "messages"
    """The field that holds the turns of chat records ({"messages": [{"role": ..., "content": ...}]})."""
    turns: Literal["last", "all"] = "last"
    """Which assistant turns of a chat record are supervised: the last, or all, each in a row of its own without later turns."""
    prompt_template: str | None = setting(None, common=("prepare",))
    """The text that a prompt is put into, at `{prompt}` (chat records stay as they are); None for the recipe's, else the prompt itself."""
    type_field: str = "type"
    """The field that `exclude_types` looks at."""
    exclude_types: tuple[str, ...] | None = None
    """Training records whose type contains one of these texts are dropped and counted; None for the recipe's, else none."""
    max_total_len: int | None = setting(None, NOT_NEGATIVE)
    """Training records with more than this number of tokens, prompt and response together, are dropped and counted; None for the
    recipe's, else 0, which drops none."""
    max_records: int | None = setting(None, NOT_NEGATIVE)
    """The number of training records that are kept: the first ones that are not dropped; None for the recipe's, else 0, which
    keeps all."""
    level: str = "easy"
    """The kind and difficulty of the built-in problems: easy, medium, hard, harder (stories of arithmetic), short, long (arithmetic
    in a line), or sudoku (4 x 4; its grader is `exact`)."""
    builtin_train: int = setting(6_000, between(0, 10_000_000))
    """The number of built-in training problems."""
    builtin_test: int = setting(512, between(0, 10_000_000))
    """The number of built-in held-out problems."""
    seed: int = setting(0, NOT_NEGATIVE)
    """The seed of the built-in corpus and of the validation split."""
    template: str = setting("chat", common=("prepare",))
    """The chat template: `chat` (LLaDA's header layout), `plain` (Question/Answer), `tokenizer` (the checkpoint's own), or a Jinja file."""
    system: str | None = setting(None, may_be_empty=True)
    """The system message that is put before every conversation without one of its own (an empty one too); None for none."""
    tokenizer: str = setting("train", common=("prepare",))
    """`train` fits a SentencePiece model on the training text; else a path to a .model, a tokenizer.json or a folder, or a
    hub name."""
    tokenizer_type: Literal["bpe", "unigram", "word", "char"] = "bpe"
    """The type of the SentencePiece model, where one is trained."""
    vocab_size: int = setting(1024, between(1, 1 << 20), common=("prepare",))
    """The largest vocabulary of a trained tokenizer, special tokens and 256 bytes included."""
    split_digits: bool = False
    """Whether a trained tokenizer makes every digit a token of its own."""
    mask_token: str | None = setting(None, common=("prepare",))
    """The mask token's text; None for the checkpoint's own (a trained tokenizer: <|mdm_mask|>). A start that has none may name
    an unused token here."""
    add_mask_token: bool = False
    """Whether to add `mask_token` to the vocabulary of a tokenizer.json that lacks it, as the next id."""
    eos_token: str | None = None
    """The end-of-sequence token, which fills the rest of the terminator's block; None for the checkpoint's own (a trained tokenizer:
    <|endoftext|>)."""
    eot_token: str | None = None
    """The token that ends a response; None for the one that the template writes there (a trained tokenizer: <|eot_id|>)."""
    overlong: Literal["error", "drop", "truncate"] = setting("error", common=("prepare",))
    """What happens to a record whose prompt or response is longer than the canvas: `error` stops; `drop` drops and counts it;
    `truncate` cuts the response, which then has no terminator (a record with an over-long prompt is dropped)."""
    allow_other_template: bool = may_change(False)
    """Whether `train` and `evaluate` accept a checkpoint whose chat template is another than that of the prepared data."""
    prepare_workers: int | None = may_change(None, between(0, 1024))
    """The number of processes that read and tokenise for `prepare`: 0 for none but the main one; None for as many as the
    processors that it may use, where the inputs are large. The prepared bytes are the same."""
    overwrite: bool = may_change(False, common=("prepare",))
    """Whether to replace an existing prepared folder."""

    def check(self) -> None:
        """Raises UserError for a number out of range, a `prompt_template` without {prompt}, an empty text in `exclude_types`,
        `add_mask_token` with a tokenizer that is trained here, one field that is named twice, or files and weights that do not fit
        together."""
        super().check()
        self._check_train()
        fields = {
            name: getattr(self, name) for name in ("prompt_field", "input_field", "system_field", "response_field")
        }
        named = [(name, field) for name, field in fields.items() if field is not None]
        for (name, field), (other, again) in itertools.combinations(named, 2):
            require(
                field != again, f"data.{name} and data.{other} are both {shown(field)}: each needs a field of its own"
            )
        require(
            self.prompt_template is None or "{prompt}" in self.prompt_template,
            f"data.prompt_template {self.prompt_template!r} has no {{prompt}}: every record would ask the same",
        )
        require(
            "" not in (self.exclude_types or ()),
            "data.exclude_types holds an empty text, which every type contains: take it out",
        )
        require(
            not self.add_mask_token or self.tokenizer != "train",
            "data.add_mask_token is for a given tokenizer; one that is trained here has the mask token: leave it false",
        )

    def _check_train(self) -> None:
        """Raises UserError where the training files or their weights are wrong."""
        files = (self.train,) if isinstance(self.train, str) else self.train
        require(
            bool(files) and all(path.strip() for path in files),
            f"data.train is {shown(self.train)}: a file is missing; give one or more",
        )
        require(
            len(files) == 1 or "builtin" not in files,
            "data.train names `builtin` among other files: the built-in corpus cannot be one of several; take it out",
        )
        if self.weights is None:
            return
        require(
            isinstance(self.train, str) or len(self.weights) == len(files),
            f"data.weights has {len(self.weights)} shares, but data.train has {len(files)} files: give one share for each",
        )
        total = sum(Fraction(str(weight)) for weight in self.weights)
        require(
            total == 1,
            f"data.weights add up to {float(total):g}, not to 1: give shares such as "
            f"{', '.join(f'{float(Fraction(str(weight)) / total):.4g}' for weight in self.weights)}",
        )
        cycle = lcm(*(Fraction(str(weight)).denominator for weight in self.weights))
        require(
            cycle <= _LONGEST_CYCLE,
            f"data.weights are shares of {cycle:,} rows, after which they repeat, and at most {_LONGEST_CYCLE:,} can be: round them "
            "to five digits",
        )
