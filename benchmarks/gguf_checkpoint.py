"""Converts a GGUF file into a Hugging Face folder: Llama's weights, a byte-level BPE tokenizer, the chat template.

Where the hub cannot be reached, package indices have small models as GGUF files. The `gguf` package turns quantised
tensors into the numbers that they stand for, so the folder holds the quantised model, not the one before. It works for the
Llama architecture with GPT-2's kind of tokenizer (SmolLM2) and refuses anything else.

    python -m benchmarks.gguf_checkpoint SmolLM2-135M-Instruct.Q4_1.gguf folder
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}

_OUTSIDE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_INSIDE = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_CONTROL = 3  # GGUF's token type of special tokens

# What splits text before the merges, by GGUF's name of it: whether every digit is its own piece.
_SPLITS = {"smollm": True}


def convert(file: Path, folder: Path, dtype: str = "float32") -> None:
    """Writes config.json, model.safetensors, tokenizer.json, tokenizer_config.json and generation_config.json.

    Args:
        file: the GGUF file.
        folder: the folder to make; its parent exists.
        dtype: the type of the tensors, ``float32`` (exact) or ``bfloat16`` (rounded).

    Raises:
        ValueError: the file has another architecture or kind of tokenizer.
    """
    import gguf
    from safetensors.numpy import save_file

    reader = gguf.GGUFReader(str(file))
    fields = {name: field.contents() for name, field in reader.fields.items()}
    found = (fields["general.architecture"], fields["tokenizer.ggml.model"], fields["tokenizer.ggml.pre"])
    if found[:2] != ("llama", "gpt2") or found[2] not in _SPLITS:
        raise ValueError(f"{file}: {found} is not read; only llama with a gpt2 tokenizer split as {', '.join(_SPLITS)}")
    config = _config(fields, tied=all(t.name != "output.weight" for t in reader.tensors), dtype=dtype)
    tensors = {}
    for tensor in reader.tensors:
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        name, part = _name(tensor.name)
        heads = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}.get(part)
        tensors[name] = np.ascontiguousarray(
            (values if heads is None else halves(values, config[heads])).astype(DTYPES[dtype])
        )
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    special = ("bos_token_id", "eos_token_id", "pad_token_id")
    generation = {name: config[name] for name in special}
    for name, content in (("config.json", config), ("generation_config.json", generation)):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    _write_tokenizer(fields, folder)


def halves(rows: np.ndarray, heads: int) -> np.ndarray:
    """Reorders the query and key rows of GGUF's Llama files as transformers (and jaxblock) order them.

    In GGUF the two numbers that rotary positions rotate against each other are neighbours within each head; in
    transformers all first numbers come before all second ones.

    Args:
        rows: the rows, shape [heads x width, in].
        heads: the number of heads.

    Returns:
        The same rows in transformers' order.
    """
    pairs = rows.reshape(heads, rows.shape[0] // heads // 2, 2, rows.shape[1])
    return pairs.swapaxes(1, 2).reshape(rows.shape)


def _name(stored: str) -> tuple[str, str]:
    """Returns (a tensor's name in transformers, its kind as GGUF names it)."""
    if stored.startswith("blk."):
        _, layer, part, kind = stored.split(".")
        return f"model.layers.{layer}.{_INSIDE[part]}.{kind}", part
    part, kind = stored.split(".")
    return f"{_OUTSIDE[part]}.{kind}", part


def _config(fields: dict[str, Any], *, tied: bool, dtype: str) -> dict[str, Any]:
    def of(name: str) -> Any:
        return fields[f"llama.{name}"]

    def number(name: str) -> float:
        return float(str(np.float32(of(name))))  # 1e-05, not the float32 next to it

    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
        "hidden_act": "silu",
        "hidden_size": of("embedding_length"),
        "intermediate_size": of("feed_forward_length"),
        "max_position_embeddings": of("context_length"),
        "mlp_bias": False,
        "num_attention_heads": of("attention.head_count"),
        "num_hidden_layers": of("block_count"),
        "num_key_value_heads": of("attention.head_count_kv"),
        "pad_token_id": fields["tokenizer.ggml.padding_token_id"],
        "rms_norm_eps": number("attention.layer_norm_rms_epsilon"),
        "rope_theta": number("rope.freq_base"),
        "tie_word_embeddings": tied,
        "torch_dtype": dtype,
        "vocab_size": len(fields["tokenizer.ggml.tokens"]),
    }


def _write_tokenizer(fields: dict[str, Any], folder: Path) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    pieces: list[str] = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=merges))
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=fields["tokenizer.ggml.add_space_prefix"])
    digits = [pre_tokenizers.Digits(individual_digits=True)] if _SPLITS[fields["tokenizer.ggml.pre"]] else []
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*digits, bytes_only])
    tokenizer.decoder = decoders.ByteLevel()
    kinds = fields["tokenizer.ggml.token_type"]
    special = [piece for piece, kind in zip(pieces, kinds, strict=True) if kind == _CONTROL]
    tokenizer.add_special_tokens([AddedToken(piece, special=True, normalized=False) for piece in special])
    tokenizer.save(str(folder / "tokenizer.json"))
    ids = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    named = {f"{name}_token": pieces[fields[f"tokenizer.ggml.{stored}_token_id"]] for name, stored in ids.items()}
    settings = {
        **named,
        "additional_special_tokens": special,
        "chat_template": fields["tokenizer.chat_template"],
        "clean_up_tokenization_spaces": False,
        "model_max_length": fields["llama.context_length"],
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    text = json.dumps(settings, indent=2, ensure_ascii=False) + "\n"
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> Path:
    """Converts one file and prints the folder's path."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="the GGUF file")
    parser.add_argument("folder", type=Path, help="the folder to make")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="float32", help="of the tensors")
    args = parser.parse_args(argv)
    convert(args.file, args.folder, args.dtype)
    print(f"{args.folder}: {sum(f.stat().st_size for f in args.folder.iterdir()) / 1e9:.2f} GB")
    return args.folder


if __name__ == "__main__":
    main()
