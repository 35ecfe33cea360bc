"""Defines the record that describes a family of checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from jaxblock.models.architecture import Architecture
from jaxblock.settings import Alignment


@dataclass(frozen=True)
class Family:
    """Describes what distinguishes a family of checkpoints: its traits, its config.json and the names of its tensors.

    Attributes:
        name: the family's name, as ``Architecture.family`` and ``model.family`` have it.
        model_types: the values of ``model_type`` in config.json that mean this family.
        names: the checkpoint's module name for each of our tensors (see ``gated.gated_table``).
        from_hf: reads a config.json; takes the parsed file, its path for messages, and the family.
        to_hf: makes a config.json; takes the architecture, the tensors' type as torch spells it, and the family.
        qkv_bias: whether queries, keys and values have biases.
        qk_norm: whether queries and keys are normalised per head before they are rotated.
        alignment: the logit alignment of all networks of a family of diffusion models. None for an autoregressive family,
            whose networks get one together with their mask token (``registry.with_mask``).
        new_config: fields for the config.json of a network that was not loaded from a checkpoint.
        head_dim: the width of a head where config.json does not say; None for the network's width divided by the heads.
        tied_field: the field of config.json that says whether the head is the transposed embedding.
        code: the hub repository with the family's model code; None where transformers includes it.
    """

    name: str
    model_types: tuple[str, ...]
    names: Mapping[str, str]
    from_hf: Callable[[Mapping[str, Any], str, Family], Architecture]
    to_hf: Callable[[Architecture, str, Family], dict[str, Any]]
    qkv_bias: bool = False
    qk_norm: bool = False
    alignment: Alignment | None = None
    new_config: Mapping[str, Any] = field(default_factory=dict)
    head_dim: int | None = None
    tied_field: str = "tie_word_embeddings"
    code: str | None = None

    @property
    def autoregressive(self) -> bool:
        """Whether the family's checkpoints predict the next token, and so have no mask token until they are given one."""
        return self.alignment is None
