"""Names the flags that a verb does not read, so that none is silent. What a YAML file says may be meant for another verb."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from jaxblock.config.config import Config
from jaxblock.config.yaml import load_config
from jaxblock.io.paths import as_path

if TYPE_CHECKING:
    from jaxblock.data.store.manifest import Manifest


class _Unread(NamedTuple):
    """Describes fields that some verbs do not read.

    Attributes:
        verbs: the verbs.
        section: the section of the fields.
        read: the section's fields that the verbs do read; with a leading "only", what follows is all that they do not.
        why: what to say after the flag's name.
        when: whether this holds for a config.
    """

    verbs: tuple[str, ...]
    section: str
    read: str
    why: str
    when: Callable[[Config], bool] = lambda config: True

    def fields(self, section: Any) -> list[str]:
        """Returns the names of the fields, of an instance of the section, that are not read."""
        first, *rest = names = self.read.split()
        every = [field.name for field in dataclasses.fields(section)]
        return [name for name in every if (name in rest if first == "only" else name not in names)]


_PREPARED = "does not change prepared data: run `jaxblock prepare` again, with the same settings"

_UNREAD = (
    _Unread(
        ("train",),
        "evaluate",
        "grader nelbo_samples",
        "does not change how training evaluates (train.eval_problems and train.eval_nelbo_rows do); the run keeps it for "
        "`jaxblock evaluate`",
    ),
    _Unread(("train", "inspect", "evaluate"), "data", "prepared verify weights allow_other_template", _PREPARED),
    _Unread(
        ("train", "plan"), "lora", "rank", "has no effect without adapters: set lora.rank", lambda c: not c.lora.rank
    ),
    _Unread(
        ("evaluate",),
        "evaluate",
        "only nelbo_samples nelbo_rows",
        "has no effect where no NELBO is estimated (evaluate.nelbo)",
        lambda c: not c.evaluate.nelbo,
    ),
    _Unread(
        ("inspect",),
        "train",
        "seed",
        "does not change what is shown: a batch of the named records, drawn from train.seed",
    ),
    _Unread(
        ("decode",),
        "data",
        "recipe prompt_template system prompt_field input_field system_field response_field messages_field",
        "does not change how prompts are read: tokenizer, template and special tokens are the checkpoint's own",
    ),
    _Unread(
        ("prepare",),
        "data",
        "only tokenizer_type vocab_size split_digits",
        "has no effect on a tokenizer that is given (data.tokenizer)",
        lambda c: c.data.tokenizer != "train",
    ),
    _Unread(
        ("prepare",),
        "data",
        "only level builtin_train builtin_test",
        "has no effect on files and data sets (data.train): it is about the built-in problems",
        lambda c: c.data.train not in ("builtin", ("builtin",)) or c.data.recipe is not None,
    ),
    _Unread(
        ("prepare",),
        "data",
        "only validation_records",
        "has no effect beside validation records of their own (data.validation)",
        lambda c: c.data.validation is not None,
    ),
)


def unused_flags(verb: str, options: Any, config: Config, prepared: Manifest | None = None) -> list[str]:
    """Returns a sentence on each flag that a verb does not read.

    Args:
        verb: the verb.
        options: its options, in which flags have replaced what the file of settings says.
        config: the config that it works with.
        prepared: the manifest of its prepared data; settings that these were prepared with are not named.
    """
    path, checkpoint = options.config, getattr(options, "checkpoint", None)
    if path is None and checkpoint is not None and (as_path(checkpoint) / "config.yaml").exists():
        path = f"{checkpoint}/config.yaml"
    beneath = load_config(path)
    found = []
    for unread in _UNREAD:
        if verb not in unread.verbs or not unread.when(config):
            continue
        given, before = getattr(options, unread.section), getattr(beneath, unread.section)
        as_they_are = _as_prepared(config, prepared) if unread.section == "data" else set()
        names = [name for name in unread.fields(given) if getattr(given, name) != getattr(before, name)]
        found += [f"--{unread.section}.{name} {unread.why}" for name in names if name not in as_they_are]
    return found


def _as_prepared(config: Config, prepared: Manifest | None) -> set[str]:
    """Returns the fields of the ``data`` section whose values are those that prepared data were made with."""
    from jaxblock.data.text.recipes import with_recipe

    if prepared is None:
        return set()
    now, then = with_recipe(config.data), prepared.data_config
    return {field.name for field in dataclasses.fields(now) if getattr(now, field.name) == getattr(then, field.name)}
