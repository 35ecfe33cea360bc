"""Implements LoRA: low-rank adapters are a second tree beside a frozen base, under ``params["lora"]``.

For each target ``blocks/q`` the adapters are ``blocks/q/a`` [L, in, R] and ``blocks/q/b`` [L, R, out]; the network adds
``x @ a @ b * alpha / rank``. The base's tree and its names do not change.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Shaped

from jaxblock.errors import UserError
from jaxblock.models.config import LoraConfig, Unmatched
from jaxblock.models.numerics import at_least_float32
from jaxblock.models.spec import ParamSpec, Table, flatten, nest
from jaxblock.types import Params, Places

KEY = "lora"
"""The key under which the parameters of a network hold its adapters."""


@dataclass(frozen=True)
class Lora:
    """Says which matrices are adapted, and how. Hashable, so that it can be a static argument.

    Attributes:
        rank: the rank R of the adapters.
        alpha: a branch is multiplied by alpha / rank.
        dropout: the chance that an input of a branch is dropped in training.
        targets: the paths of the adapted matrices in the family's table, in the table's order.
    """

    rank: int
    alpha: float
    dropout: float
    targets: tuple[str, ...]

    @property
    def scale(self) -> float:
        """The number by which each branch is multiplied."""
        return self.alpha / self.rank


class LowRank(NamedTuple):
    """Holds the LoRA branch of one matrix.

    Attributes:
        a: the float32 matrix [I, R] from the input to the rank.
        b: the float32 matrix [R, O] from the rank to the output.
        scale: the factor alpha / rank of the branch's output.
        dropout: the chance that an input of the branch is dropped; used only where there are keys.
        keys: one random key for each row of the batch; None for no dropout.
        places: where rows lie side by side in lines, the places of a line; () where each row is by itself.
    """

    a: Float[Array, "I R"]
    b: Float[Array, "R O"]
    scale: float
    dropout: float = 0.0
    keys: Shaped[Array, " B"] | None = None
    places: Places = ()


def lora_from_config(config: LoraConfig, table: Table) -> Lora | None:
    """Returns the adapters that the ``lora`` section describes; None where its rank is 0.

    Args:
        config: the ``lora`` section.
        table: the family's specs.

    Raises:
        UserError: a target matches nothing.
    """
    if not config.rank:
        return None
    return Lora(config.rank, config.alpha, config.dropout, resolve(table, config.targets, config.unmatched))


def resolve(table: Table, names: Sequence[str], unmatched: Unmatched = "error") -> tuple[str, ...]:
    """Finds the matrices that target names refer to.

    A name is one of ours, which are the same for every family (``q``, ``k``, ``v``, ``o``, ``gate``, ``up``, ``down``, or
    ``all``), or the last component of the checkpoint's module name (``q_proj``, ``attn_out``), as PEFT matches it.

    Args:
        table: the specs of the family's parameters.
        names: the names of the targets.
        unmatched: what to do with a name that matches nothing.

    Returns:
        The paths of the matrices, in the table's order, each once.

    Raises:
        UserError: a name matches no matrix and ``unmatched`` is ``error``, or no name matches a matrix.
    """
    matrices = {path: spec for path, spec in table.items() if spec.stacked and spec.is_matrix}
    found: set[str] = set()
    for name in names:
        hits = {p for p, s in matrices.items() if name in ("all", p.removeprefix("blocks/"), _module(s))}
        if not hits and unmatched == "error":
            known = ", ".join(f"{p.removeprefix('blocks/')} ({_module(s)})" for p, s in matrices.items())
            raise UserError(
                f"lora.targets: {name!r} matches no matrix of this family; it has {known}. Correct the name, or set "
                "lora.unmatched to ignore (the matrix is then not adapted)"
            )
        found |= hits
    if not found:
        raise UserError(f"lora.targets: none of {', '.join(map(repr, names)) or 'no names'} matches a matrix")
    return tuple(path for path in table if path in found)


def _module(spec: ParamSpec) -> str:
    """Returns the last component of the checkpoint's module name, as PEFT matches it."""
    return spec.hf_name.removesuffix(".weight").rsplit(".", 1)[-1]


def adapter_table(base: Table, lora: Lora) -> Table:
    """Returns the specs of the adapters.

    ``a`` starts with PEFT's variance (uniform within 1/sqrt(in) there, a truncated normal here), ``b`` with zeros, so that
    the adapted network starts equal to the base.

    Args:
        base: the specs of the family's parameters.
        lora: what is adapted.

    Returns:
        The specs by path (``blocks/q/a``); ``hf_name`` is PEFT's.
    """
    specs = {}
    for path in lora.targets:
        n_layers, n_in, n_out = base[path].shape
        peft_name = "base_model.model." + base[path].hf_name.removesuffix(".weight")
        a, b = (n_layers, n_in, lora.rank), (n_layers, lora.rank, n_out)
        std = (3 * n_in) ** -0.5
        specs[f"{path}/a"] = ParamSpec(
            a, ("layers", "adapter", None), std, f"{peft_name}.lora_A.weight", transpose=True
        )
        specs[f"{path}/b"] = ParamSpec(
            b, ("layers", None, "adapter"), 0.0, f"{peft_name}.lora_B.weight", transpose=True
        )
    return specs


def layer_branches(
    lora: Lora, adapters: Params, layer: Array | int, row_keys: Shaped[Array, " B"] | None, places: Places = ()
) -> dict[str, LowRank]:
    """Returns the low-rank branches of one layer, by the name of their matrix.

    Args:
        lora: what is adapted.
        adapters: the layer's adapters: ``{"q": {"a": ..., "b": ...}}``.
        layer: the layer's index.
        row_keys: one random key for each row; None for no dropout. The layer and the place in
            ``targets`` are folded into the keys of a branch, so that branches draw independently.
        places: where rows lie side by side in lines, the places of a line.
    """
    branches = {}
    for place, path in enumerate(lora.targets):
        name, keys = path.removeprefix("blocks/"), None
        if row_keys is not None:
            fold = jax.vmap(lambda key, place=place: jax.random.fold_in(jax.random.fold_in(key, layer), place))
            keys = fold(row_keys)
        branches[name] = LowRank(adapters[name]["a"], adapters[name]["b"], lora.scale, lora.dropout, keys, places)
    return branches


def attach(base: Params, adapters: Params) -> Params:
    """Returns the network's parameters: the base with the adapters beside it; for an empty base, ``adapters`` as they are."""
    return {**base, KEY: adapters} if base else adapters


def merge(params: Params, lora: Lora) -> Params:
    """Adds every branch to its matrix: ``w + a @ b * scale``, computed in float32 and stored in the base's type.

    Args:
        params: the base and the adapters; no adapted matrix may be int8.
        lora: what is adapted.

    Returns:
        The parameters of the merged network, without adapters.
    """
    flat = flatten({name: leaf for name, leaf in params.items() if name != KEY})
    adapters = flatten(params[KEY])
    for path in lora.targets:
        flat[path] = _merged(flat[path], adapters[f"{path}/a"], adapters[f"{path}/b"], lora.scale)
    return nest(flat)


def _add(w: Array, a: Array, b: Array, scale: float) -> Array:
    """Adds the branch to the matrix of each layer [L, I, O]."""

    def layer(w: Array, a: Array, b: Array) -> Array:
        return (w.astype(at_least_float32(w.dtype)) + jnp.matmul(a, b, precision="highest") * scale).astype(w.dtype)

    return jax.lax.map(lambda wab: layer(*wab), (w, a, b))  # one layer at a time, so that float32 copies are small


_merged = jax.jit(_add, static_argnums=3)
