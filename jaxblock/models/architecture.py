"""Defines the sizes and special ids of a network, as its checkpoint's config.json gives them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from jaxblock.errors import UserError
from jaxblock.settings import Alignment

RopeKind = Literal["linear", "llama3", "yarn", "dynamic"]


class RopeScaling(NamedTuple):
    """Says how rotary frequencies are scaled for longer contexts (``rope_scaling`` of config.json).

    Attributes:
        kind: ``linear`` divides every frequency; ``llama3`` and ``yarn`` divide only the slow ones; ``dynamic`` raises their
            base in sequences longer than original_len.
        factor: the number by which frequencies are divided.
        low_freq_factor: ``llama3``: wavelengths above original_len / low_freq_factor are scaled by the whole factor.
        high_freq_factor: ``llama3``: wavelengths below original_len / high_freq_factor are not scaled.
        original_len: the length that the model was first trained for (not used by ``linear``).
        attention_factor: ``yarn``: the number by which cosines and sines are multiplied.
        beta_fast: ``yarn``: frequencies that turn more often within original_len are not scaled.
        beta_slow: ``yarn``: frequencies that turn less often within original_len are scaled by the whole factor.
        truncate: ``yarn``: whether the range between the two is widened to whole dimensions.
    """

    kind: RopeKind
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_len: int = 8192
    attention_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True


@dataclass(frozen=True)
class Architecture:
    """Holds the sizes and special ids of a network, as its checkpoint's config.json gives them.

    Attributes:
        family: the family's name, a key of ``models.families.registry.FAMILIES``.
        vocab_size: the number of token ids.
        d_model: the width of the residual stream.
        n_layers: the number of layers.
        n_heads: the number of query heads.
        n_kv_heads: the number of key and value heads, which divides that of query heads.
        head_dim: the width of a head.
        mlp_dim: the width of the feed-forward layer.
        norm_eps: the number added to the mean square in RMSNorm.
        rope_theta: the base of the rotary frequencies.
        max_len: the longest sequence that the model was made for, in tokens.
        tie_embeddings: whether the head is the transposed embedding.
        mask_id: the mask token; None for an autoregressive checkpoint that has none yet.
        eos_id: the end-of-sequence token, which also fills the rest of a response's last block.
        pad_id: the token that fills rows up to the width of their batch; it is never seen.
        alignment: which hidden state predicts a token (see ``Layout``).
        end_ids: further tokens that end a response, from config.json.
        qkv_bias: whether queries, keys and values have biases.
        qk_norm: whether queries and keys are normalised per head before they are rotated.
        rope_scaling: how rotary frequencies are scaled; None for no scaling.
        init_std: the standard deviation of random weights; None for Mitchell's initialisation.
        extra: all fields of the config.json that this was read from, as JSON, so that an export can write back the unused
            ones.
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
        """Returns the mask token.

        Raises:
            UserError: there is none, because the checkpoint is autoregressive.
        """
        if self.mask_id is None:
            raise UserError(
                f"this {self.family} checkpoint is autoregressive: its config.json names no mask_token_id. Train it from "
                "prepared data (which name a mask token), or load it with mask_id set to an id that its text never uses"
            )
        return self.mask_id
