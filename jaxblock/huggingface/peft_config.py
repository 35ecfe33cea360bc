"""Reads PEFT's ``adapter_config.json``: which modules are adapted, with which rank and scale, as PEFT itself decides it."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxblock.errors import UserError, shown
from jaxblock.huggingface.expressions import count_steps
from jaxblock.io.files import read_json

# Settings of PEFT that change what an adapter computes, and the values that we support: an adapter with another value is
# refused, because it would give wrong results.
_FIXED: dict[str, tuple[Any, ...]] = {
    "alora_invocation_tokens": (None,),
    "arrow_config": (None,),
    "bias": ("none", None),
    "kasa_config": (None,),
    "layer_replication": (None,),
    "lora_bias": (False, None),
    "modules_to_save": (None, []),
    "monteclora_config": (None,),
    "target_parameters": (None, []),
    "trainable_token_indices": (None,),
    "use_bdlora": (False, None),
    "use_dora": (False, None),
    "use_qalora": (False, None),
    "velora_config": (None,),
}

# The other settings of PEFT. Those that are not read below change nothing in a network of plain linear layers.
_READ = {"exclude_modules", "init_lora_weights", "layers_pattern", "layers_to_transform", "lora_alpha", "lora_dropout"}
_READ |= {"alpha_pattern", "base_model_name_or_path", "peft_type", "r", "rank_pattern", "revision", "target_modules"}
_READ |= {"use_rslora"}
_WITHOUT_EFFECT = {
    "auto_mapping",
    "corda_config",
    "ensure_weight_tying",
    "eva_config",
    "fan_in_fan_out",
    "inference_mode",
}
_WITHOUT_EFFECT |= {"loftq_config", "lora_ga_config", "megatron_config", "megatron_core", "peft_version"}
_WITHOUT_EFFECT |= {"qalora_group_size", "runtime_config", "task_type"}

# Other ways to initialise take a part out of the base's weights, which then are not those of the base's folder.
_PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")

_MERGE = "not supported. Merge the adapters into their base with PEFT (merge_and_unload), save that, and load it"


@dataclass(frozen=True)
class AdapterConfig:
    """Holds what an adapter_config.json says about the adapters.

    Attributes:
        where: the file's path, for messages.
        rank: the rank of modules that no pattern names.
        alpha: the numerator of the scale of modules that no pattern names.
        dropout: the chance that an input of a branch is dropped in training.
        rslora: whether a branch is multiplied by alpha / sqrt(rank) instead of alpha / rank.
        targets: the adapted modules: the ends of their names, or one regular expression of whole names.
        excluded: modules that are not adapted all the same, in the same two forms.
        layers: the indices of the adapted layers; None for all.
        layers_pattern: names of the list of layers, before the index; empty for any.
        ranks: the ranks of single modules, by a regular expression of the end of their names.
        alphas: the alphas of single modules, by a regular expression of the end of their names.
    """

    where: str
    rank: int
    alpha: float
    dropout: float
    rslora: bool
    targets: list[str] | str
    excluded: list[str] | str
    layers: list[int] | None
    layers_pattern: list[str]
    ranks: Mapping[str, int]
    alphas: Mapping[str, float]

    def adapts(self, module: str) -> bool:
        """Returns whether the module with this whole name is adapted."""
        if _names(self.excluded, module):
            return False
        if isinstance(self.targets, str) and self.targets.lower() == "all-linear":
            return True
        if self.layers is None or isinstance(self.targets, str) or module in self.targets:
            return _names(self.targets, module)
        return _names(self.targets, module) and self._layer(module) in self.layers

    def rank_and_alpha(self, module: str) -> tuple[int, float]:
        """Returns a module's rank, and the alpha whose quotient by the rank is the scale of its branch."""
        rank = next((rank for key, rank in self.ranks.items() if _ends_with(key, module)), self.rank)
        alpha = next((alpha for key, alpha in self.alphas.items() if _ends_with(key, module)), self.alpha)
        return rank, alpha * rank**0.5 if self.rslora else alpha

    def _layer(self, module: str) -> int | None:
        patterns = [rf"(?:^|.*?\.){pattern}" for pattern in self.layers_pattern] or [r".*?\.[^.]*"]
        found = (re.match(rf"{pattern}\.(\d+)\.", module) for pattern in patterns)
        return next((int(match[match.lastindex or 0]) for match in found if match), None)


def read_adapter_config(path: Path) -> AdapterConfig:
    """Reads which adapters an adapter_config.json describes, and refuses those that we would compute differently than PEFT.

    Args:
        path: the file.

    Raises:
        UserError: the file asks for anything but LoRA adapters of linear layers, or a field has no sensible value.
    """
    config = read_json(path)
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        found = config.get("peft_type") if isinstance(config, dict) else None
        raise UserError(f"{path}: peft_type is {shown(found)}; only LORA adapters are supported")
    _check_kind(path, config)
    fields = _Fields(path, config)
    layers = config.get("layers_to_transform")
    adapter = AdapterConfig(
        where=str(path),
        rank=fields.rank("r", config.get("r", 8)),
        alpha=fields.number("lora_alpha", config.get("lora_alpha", 8)),
        dropout=fields.number("lora_dropout", config.get("lora_dropout") or 0.0, least=0.0, most=1.0),
        rslora=bool(config.get("use_rslora")),
        targets=fields.names("target_modules"),
        excluded=fields.names("exclude_modules"),
        layers=None if layers is None or layers == [] else fields.indices(layers),
        layers_pattern=fields.patterns("layers_pattern"),
        ranks={key: fields.rank(f"rank_pattern[{key}]", value) for key, value in fields.pattern("rank_pattern")},
        alphas={key: fields.number(f"alpha_pattern[{key}]", value) for key, value in fields.pattern("alpha_pattern")},
    )
    if not adapter.targets:
        raise UserError(f"{path}: target_modules is missing or empty; name the adapted modules there")
    if adapter.layers is not None and isinstance(adapter.targets, str):
        raise UserError(
            f"{path}: layers_to_transform does not go with a target_modules of one text; PEFT refuses it too"
        )
    return adapter


def _check_kind(where: Path, config: Mapping[str, Any]) -> None:
    """Raises a UserError where a config asks for anything but plain LoRA adapters."""
    wrong = [name for name, allowed in _FIXED.items() if config.get(name) not in allowed]
    if config.get("init_lora_weights") not in _PLAIN_STARTS:
        wrong.append("init_lora_weights")
    if wrong:
        raise UserError(f"{where}: {'; '.join(f'{name} is {shown(config[name])}' for name in wrong)}: {_MERGE}")
    known = _FIXED.keys() | _READ | _WITHOUT_EFFECT
    unknown = [name for name, value in config.items() if name not in known and value not in (None, False, [], {})]
    if unknown:
        raise UserError(
            f"{where}: the setting {shown(unknown[0])} is unknown, and could change what the adapters compute; take it out if "
            "it does not, or merge the adapters into their base with PEFT (merge_and_unload)"
        )


_MOST_STEPS = 1e7
"""How many steps it may take, at most, to compare one name with the expressions of a field; there are hundreds of names."""


@dataclass(frozen=True)
class _Fields:
    """Reads the fields of an adapter_config.json, with errors that name the file and the field."""

    where: Path
    config: Mapping[str, Any]

    def wrong(self, name: str, value: Any, wanted: str) -> UserError:
        return UserError(f"{self.where}: {name} is {shown(value)}; it must be {wanted}")

    def rank(self, name: str, value: Any) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= 1 << 20:
            raise self.wrong(name, value, "a whole number above 0")
        return value

    def number(self, name: str, value: Any, least: float = -1e30, most: float = 1e30) -> float:
        if not isinstance(value, int | float) or isinstance(value, bool) or not least <= value <= most:
            raise self.wrong(name, value, "a finite number" if most > 1 else "a number from 0 to 1")
        return float(value)

    def indices(self, value: Any) -> list[int]:
        """Returns the layers that `layers_to_transform` names, one or a list of them."""
        indices = value if isinstance(value, list) else [value]
        if not all(isinstance(one, int) and not isinstance(one, bool) for one in indices):
            raise self.wrong("layers_to_transform", value, "a layer's index or a list of them")
        return indices

    def names(self, name: str) -> list[str] | str:
        """Returns a list of names, or a regular expression of whole names."""
        value = self.config.get(name) or []
        if isinstance(value, str):
            return self.expression(name, value)
        if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
            raise self.wrong(name, value, "a list of names, or a regular expression")
        return value

    def patterns(self, name: str) -> list[str]:
        """Returns the regular expressions of a field that holds names, or one expression."""
        names = self.names(name)
        return [self.expression(name, one) for one in ([names] if isinstance(names, str) else names)]

    def pattern(self, name: str) -> list[tuple[str, Any]]:
        """Returns the regular expressions of a field that gives each a number, with these, such as `rank_pattern`."""
        value = self.config.get(name) or {}
        if not isinstance(value, dict):
            raise self.wrong(name, value, "an object of names and numbers")
        keys = [self.expression(name, key) for key in value]
        if sum(count_steps(_END.format(key)) for key in keys) > _MOST_STEPS:
            raise self.wrong(
                name, value, "fewer or simpler patterns: these would take too long to compare with all names"
            )
        return list(zip(keys, value.values(), strict=True))

    def expression(self, name: str, text: str) -> str:
        """Returns a regular expression of a field; raises UserError where it is none, or could take years to match a name."""
        try:
            re.compile(text)
        except (re.error, RecursionError, OverflowError) as error:
            raise self.wrong(name, text, f"a regular expression ({error})") from error
        if count_steps(text) > _MOST_STEPS:
            raise self.wrong(name, text, "a simpler regular expression: this one could take years to match a name")
        return text


def _names(wanted: list[str] | str, module: str) -> bool:
    """Returns whether a regular expression of whole names, or a list of ends of names, names a module."""
    if isinstance(wanted, str):
        return re.fullmatch(wanted, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in wanted)


def _ends_with(pattern: str, module: str) -> bool:
    return _compiled(_END.format(pattern)).match(module) is not None


_END = r"(?:.*\.)?(?:{})$"
"""The expression of whole names that end in what another expression matches."""


@functools.cache  # a rank_pattern may name each of hundreds of modules, more than `re` remembers
def _compiled(expression: str) -> re.Pattern[str]:
    return re.compile(expression)
