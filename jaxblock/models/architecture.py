"""The sizes and special ids of a network, as its checkpoint's config.json gives them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from jaxblock.errors import UserError
from jaxblock.settings import Alignment


class RopeScaling(NamedTuple):
    """How rotary frequencies are stretched for longer contexts (``rope_scaling`` of config.json).

    Attributes:
        kind: ``linear`` divides every frequency; ``llama3`` only those slower than ``original_len`` asks for.
        factor: the stretch.
        low_freq_factor: ``llama3``: wavelengths above original_len / this are stretched in full.
        high_freq_factor: ``llama3``: wavelengths below original_len / this are left alone.
        original_len: ``llama3``: the length the model was first trained for.
    """

    kind: Literal["linear", "llama3"]
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_len: int = 8192


@dataclass(frozen=True)
class Architecture:
    """The sizes and special ids of a network, as its checkpoint's config.json gives them.

    Attributes:
        family: key of ``models.families.registry.FAMILIES``.
        mask_id: the mask token; None for an autoregressive checkpoint that has none yet.
        alignment: which hidden state predicts a token (see ``Layout``).
        eos_id: end of sequence; fills the rest of the terminator's block.
        end_ids: further ids that config.json counts as ends of a response.
        qkv_bias: queries, keys and values have biases.
        qk_norm: queries and keys are normalised by head before they are rotated.
        init_std: standard deviation of random weights; None for Mitchell's initialisation.
        extra: the config.json this was read from, kept so that export writes back what it does not understand.
    """

    family: str
    vocab_size: int
    d_model: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    mlp_dim: int
    norm_eps: float
    rope_theta: float
    max_len: int
    tie_embeddings: bool
    mask_id: int | None
    eos_id: int
    pad_id: int
    alignment: Alignment = "same_position"
    end_ids: tuple[int, ...] = ()
    qkv_bias: bool = False
    qk_norm: bool = False
    rope_scaling: RopeScaling | None = None
    init_std: float | None = None
    extra: tuple[tuple[str, str], ...] = ()

    def need_mask_id(self) -> int:
        """The mask token.

        Raises:
            UserError: there is none: the checkpoint is autoregressive.
        """
        if self.mask_id is None:
            raise UserError(
                f"this {self.family} checkpoint is autoregressive: its config.json names no mask_token_id. Train it from "
                "prepared data (which name a mask token), or load it with mask_id set to an id that its text never uses"
            )
        return self.mask_id
