"""Writes how an export is loaded, here and in the libraries that its format is of."""

from __future__ import annotations

from typing import Literal

from jaxblock.models.architecture import Architecture
from jaxblock.models.families import registry

Form = Literal["merged", "adapter"]
"""Whether an export is a whole checkpoint in the layout of ``transformers``, or adapters alone in that of ``peft``."""


def how_to_load(name: str, form: Form, arch: Architecture, *, base: str | None, tokenizer: str | None) -> str:
    """Returns the section on loading an export.

    Args:
        name: the export's folder, or its name on the hub.
        form: the format of the export.
        arch: the network's architecture.
        base: the hub repository of the weights that adapters belong to; None where they are not on the hub.
        tokenizer: the tokenizer's main file; None without a tokenizer.
    """
    alone = form == "adapter"
    where = f'"{name}", base="BASE"' if alone and base is None else f'"{name}"'
    use = 'print(model.generate("..."))' if tokenizer else "print(model.decode([[5, 6, 7]]))"
    parts = [
        "With jaxblock, which decodes block by block, as the network was trained to:",
        f"```python\nimport jaxblock\n\nmodel = jaxblock.load({where})  # a folder, or a name on the hub\n{use}\n```",
        "With `peft`:" if alone else "With `transformers`:",
        f"```python\n{_with_peft(name, arch, base or 'BASE') if alone else _with_transformers(name, arch)}\n```",
        _limits(arch, tokenizer),
    ]
    if alone and base is None:
        parts.append("`BASE` is the folder of the weights that these adapters were trained on (see Base).")
    return "\n\n".join(parts)


def _with_transformers(name: str, arch: Architecture) -> str:
    kind = _auto(arch)
    return f'from transformers import {kind}\n\nmodel = {kind}.from_pretrained("{name}"{_trust(arch)})'


def _with_peft(name: str, arch: Architecture, base: str) -> str:
    kind = _auto(arch)
    imports = f"from peft import PeftModel\nfrom transformers import {kind}"
    loaded = f'base = {kind}.from_pretrained("{base}"{_trust(arch)})\nmodel = PeftModel.from_pretrained(base, "{name}")'
    return f"{imports}\n\n{loaded}"


def _auto(arch: Architecture) -> str:
    return "AutoModel" if registry.FAMILIES[arch.family].code else "AutoModelForCausalLM"


def _trust(arch: Architecture) -> str:
    return ", trust_remote_code=True" if registry.FAMILIES[arch.family].code else ""


def _limits(arch: Architecture, tokenizer: str | None) -> str:
    """Returns what other libraries do not do by themselves."""
    family = registry.FAMILIES[arch.family]
    if family.code:
        text = f"`transformers` runs the model code of `{family.code}` for it, or the code in this folder; look at it before you trust it."
    else:
        alignment = {"shifted": "the next token", "same_position": "its own token"}[arch.alignment]
        text = (
            "Other libraries take this for an autoregressive network. It is a masked diffusion network: it attends in both "
            f"directions, and each position predicts {alignment}. So their `generate` does not work for it, and logits are "
            "right only where every position may attend to every other one (a 4-D attention mask of zeros)."
        )
    if tokenizer is not None and tokenizer.endswith(".model"):
        text += " Its tokenizer is a SentencePiece model (`tokenizer.model`), not a `tokenizer.json`."
    return text
