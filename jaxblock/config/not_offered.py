"""Names settings of other trainers that are left out here on purpose, and says why."""

from __future__ import annotations

_PACKING = (
    "rows are not packed here: one canvas holds one prompt and its response. A bidirectional network would see the rows beside "
    "it, and blocks are counted from the row's own prompt, as in decoding. Short rows cost little: train.widths computes them at "
    "narrower widths. Take the key out"
)
_WORDS = {"pack", "packing", "packed"}  # as in sample_packing, neat_packing, eval_packing, pack_sequences


def why_not_offered(name: str) -> str | None:
    """Returns why jaxblock does not have a setting of other trainers; None for a name that is not known here.

    Args:
        name: The setting's name, without its section.
    """
    return _PACKING if _WORDS & set(name.split("_")) or name == "group_texts" else None
