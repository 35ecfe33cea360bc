"""Reading config.json: what every family's reader needs, and the reader of Llama's layout of it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from jaxblock.errors import UserError
from jaxblock.models.architecture import Architecture, RopeScaling

ALIGNMENT = "logit_alignment"
"""Our own field of an autoregressive start's config.json: transformers keeps fields that it does not know."""

# What the network computes and we do not: a checkpoint that says otherwise would load and be wrong.
_LLAMA_FIXED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "mlp_bias": (False,),
    "use_sliding_window": (False,),
    "pretraining_tp": (1,),
    ALIGNMENT: ("same_position", "shifted"),
}


class Fields:
    """A parsed config.json whose complaints name the file and the field."""

    def __init__(self, config: Mapping[str, Any], where: str, family: str) -> None:
        """Wraps a config.

        Args:
            config: the parsed file.
            where: its path, for messages.
            family: the reader's name, for messages.
        """
        self._config, self._where, self._family = config, where, family

    def get(self, name: str, default: Any = None) -> Any:
        """A field; the default where it is absent or null."""
        value = self._config.get(name)
        return default if value is None else value

    def need(self, name: str) -> Any:
        """A field that must be there.

        Raises:
            UserError: it is absent or null.
        """
        if self._config.get(name) is None:
            raise UserError(f"{self._where}: field {name!r} is missing; a {self._family} config must have it")
        return self._config[name]

    def size(self, name: str, default: int | None = None) -> int:
        """A positive whole number.

        Raises:
            UserError: it is absent, or something else.
        """
        value = self.need(name) if default is None else self.get(name, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise UserError(f"{self._where}: {name} is {value!r}; it must be a whole number above 0")
        return value

    def number(self, name: str, default: float) -> float:
        """A number above 0.

        Raises:
            UserError: it is something else.
        """
        return self._positive(name, self.get(name, default))

    def _positive(self, name: str, value: Any) -> float:
        if not isinstance(value, int | float) or isinstance(value, bool) or not value > 0:
            raise self.refuse(f"{name} is {value!r}; it must be a number above 0")
        return float(value)

    def check_heads(self, d_model: int, n_heads: int, n_kv_heads: int, head_dim: int | None = None) -> None:
        """Checks sizes that tensors cannot contradict.

        Args:
            d_model: width.
            n_heads: query heads.
            n_kv_heads: key and value heads.
            head_dim: where the config names one; None where it is the width over the heads.

        Raises:
            UserError: heads that do not divide, or of an odd size, which cannot be rotated.
        """
        if n_heads % n_kv_heads:
            raise self.refuse(f"{n_heads} query heads are no multiple of {n_kv_heads} key and value heads")
        if head_dim is None and d_model % n_heads:
            raise self.refuse(f"a width of {d_model} does not split into {n_heads} heads")
        if (head_dim or d_model // n_heads) % 2:
            raise self.refuse(
                f"heads of {head_dim or d_model // n_heads} dimensions: rotary positions need an even size"
            )

    def check_fixed(self, fixed: Mapping[str, tuple[Any, ...]]) -> None:
        """Raises UserError where a field asks for something that the network does not do."""
        for name, allowed in fixed.items():
            if self._config.get(name) is not None and self._config[name] not in allowed:
                raise self.refuse(f"{name} is {self._config[name]!r}; this reader supports {allowed[0]!r} only")

    def refuse(self, what: str) -> UserError:
        """An error about this file."""
        return UserError(f"{self._where}: {what}")

    def token(self, name: str, vocab_size: int, default: int | None = None) -> int | None:
        """A special id inside the vocabulary; of a list, the first.

        Raises:
            UserError: it is outside the vocabulary, or no id.
        """
        ids = self.tokens(name, vocab_size)
        return ids[0] if ids else default

    def need_token(self, name: str, vocab_size: int) -> int:
        """A special id that must be there.

        Raises:
            UserError: it is absent, outside the vocabulary, or no id.
        """
        self.need(name)
        ids = self.tokens(name, vocab_size)
        if not ids:
            raise self.refuse(f"{name} is an empty list; it must be a token's id")
        return ids[0]

    def tokens(self, name: str, vocab_size: int) -> tuple[int, ...]:
        """Special ids: one, or a list.

        Raises:
            UserError: one of them is outside the vocabulary, or no id.
        """
        value = self.get(name)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        for one in ids:
            if not isinstance(one, int) or isinstance(one, bool):
                raise self.refuse(f"{name} is {value!r}; it must be a token's id")
            if not 0 <= one < vocab_size:
                raise self.refuse(
                    f"{name} is {one}, outside the vocabulary of {vocab_size} (ids 0 to {vocab_size - 1})"
                )
        return tuple(ids)

    def rope_theta(self) -> float:
        """The rotary base, at the top level or under ``rope_parameters``.

        Raises:
            UserError: it is no number above 0, or ``rope_parameters`` is no object.
        """
        nested = self.get("rope_parameters", {})
        if not isinstance(nested, dict):
            raise self.refuse(f"rope_parameters is {nested!r}; it must be a JSON object")
        return self._positive("rope_theta", self.get("rope_theta", nested.get("rope_theta") or 10_000.0))

    def rope_scaling(self) -> RopeScaling | None:
        """How rotary frequencies are stretched, under ``rope_scaling`` or ``rope_parameters``.

        Raises:
            UserError: a kind that the network does not do, or one that lacks its numbers.
        """
        scaling = self.get("rope_scaling") or self.get("rope_parameters", {})
        try:
            kind = scaling.get("rope_type") or scaling.get("type") or "default"
            if kind == "default":
                return None
            if kind == "linear":
                return RopeScaling("linear", float(scaling["factor"]))
            if kind == "llama3":
                low, high = float(scaling["low_freq_factor"]), float(scaling["high_freq_factor"])
                original = int(scaling["original_max_position_embeddings"])
                return RopeScaling("llama3", float(scaling["factor"]), low, high, original)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise self.refuse(f"rope_scaling cannot be read: {scaling!r} ({type(error).__name__}: {error})") from error
        raise self.refuse(f"rope_scaling of type {kind!r} is not supported (only default, linear and llama3 are)")

    def kept(self) -> tuple[tuple[str, str], ...]:
        """All fields as JSON, so that an export can write back what it does not understand."""
        return tuple(sorted((key, json.dumps(value)) for key, value in self._config.items()))


def read_llama(
    config: Mapping[str, Any],
    where: str,
    family: str,
    *,
    traits: Mapping[str, Any],
    attention_bias: bool = False,
) -> Architecture:
    """Reads a config.json in Llama's layout.

    Args:
        config: the parsed file.
        where: its path, for messages.
        family: key of ``models.families.registry.FAMILIES``.
        traits: what the family's networks share; without an ``alignment`` the family is autoregressive, and config.json
            may say it.
        attention_bias: what ``attention_bias`` must be where it is given.

    Returns:
        The architecture; every special id comes from the config.

    Raises:
        UserError: a field is missing, or asks for something that the network does not do.
    """
    fields = Fields(config, where, family)
    fields.check_fixed({**_LLAMA_FIXED, "attention_bias": (attention_bias,)})
    if "sliding_attention" in fields.get("layer_types", []):
        raise fields.refuse("layer_types asks for sliding_attention; this reader supports full attention only")
    d_model, n_heads = fields.size("hidden_size"), fields.size("num_attention_heads")
    vocab = fields.size("vocab_size")
    ends = fields.tokens("eos_token_id", vocab)
    if not ends:
        raise fields.refuse("eos_token_id is missing; set it to the token that ends a sequence")
    n_kv_heads = fields.size("num_key_value_heads", n_heads)
    head_dim = fields.size("head_dim", d_model // n_heads)
    fields.check_heads(d_model, n_heads, n_kv_heads, None if fields.get("head_dim") is None else head_dim)
    own = dict(traits)
    if autoregressive := "alignment" not in own:
        own["alignment"] = fields.get(ALIGNMENT, "shifted")
    return Architecture(
        **own,
        family=family,
        vocab_size=vocab,
        d_model=d_model,
        n_layers=fields.size("num_hidden_layers"),
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=head_dim,
        mlp_dim=fields.size("intermediate_size"),
        norm_eps=fields.number("rms_norm_eps", 1e-6),
        rope_theta=fields.rope_theta(),
        max_len=fields.size("max_position_embeddings"),
        tie_embeddings=bool(fields.get("tie_word_embeddings", False)),
        mask_id=fields.token("mask_token_id", vocab) if autoregressive else fields.need_token("mask_token_id", vocab),
        eos_id=ends[0],
        pad_id=fields.token("pad_token_id", vocab, ends[0]) or 0,
        end_ids=ends[1:],
        rope_scaling=fields.rope_scaling(),
        init_std=fields.get("initializer_range", 0.02),
        extra=fields.kept(),
    )


def write_llama(
    arch: Architecture, dtype: str, own: Mapping[str, Any], *, autoregressive: bool = False
) -> dict[str, Any]:
    """A config.json in Llama's layout.

    Args:
        arch: sizes and ids; what ``read_llama`` read and did not use is written back as it was.
        dtype: the tensors' type, as torch spells it.
        own: the family's own fields, for an architecture that was not read from a file.
        autoregressive: the family's checkpoints are not diffusion models by themselves: the file must say how ours is
            read (its mask token and logit alignment).

    Returns:
        The dict to write.
    """
    config: dict[str, Any] = {
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "initializer_range": arch.init_std if arch.init_std is not None else 0.02,
        "use_cache": False,
        **own,
    }
    config |= {key: json.loads(value) for key, value in arch.extra}
    ends = [arch.eos_id, *arch.end_ids]
    config |= {
        "eos_token_id": ends if arch.end_ids else arch.eos_id,
        "hidden_size": arch.d_model,
        "intermediate_size": arch.mlp_dim,
        "max_position_embeddings": arch.max_len,
        "num_attention_heads": arch.n_heads,
        "num_hidden_layers": arch.n_layers,
        "num_key_value_heads": arch.n_kv_heads,
        "pad_token_id": arch.pad_id,
        "rms_norm_eps": arch.norm_eps,
        "tie_word_embeddings": arch.tie_embeddings,
        "vocab_size": arch.vocab_size,
    }
    if arch.head_dim * arch.n_heads != arch.d_model:
        config["head_dim"] = arch.head_dim
    if arch.mask_id is not None:
        config["mask_token_id"] = arch.mask_id
        if autoregressive:
            config[ALIGNMENT] = arch.alignment
    return with_rope_and_dtype(config, arch, dtype)


def with_rope_and_dtype(config: dict[str, Any], arch: Architecture, dtype: str) -> dict[str, Any]:
    """Adds the rotary base and the tensors' type, in the spelling that the config already uses (transformers 4 or 5)."""
    nested = config.get("rope_parameters")
    if isinstance(nested, dict) and "rope_theta" in nested:
        config["rope_parameters"] = {**nested, "rope_theta": arch.rope_theta}
    else:
        nested = {}
        config["rope_theta"] = arch.rope_theta
    scaling = arch.rope_scaling
    if scaling is not None and not config.get("rope_scaling") and "factor" not in nested:
        config["rope_scaling"] = {"rope_type": scaling.kind, "factor": scaling.factor}
        if scaling.kind == "llama3":
            config["rope_scaling"] |= {
                "low_freq_factor": scaling.low_freq_factor,
                "high_freq_factor": scaling.high_freq_factor,
                "original_max_position_embeddings": scaling.original_len,
            }
    config["dtype" if "dtype" in config else "torch_dtype"] = dtype
    return config
