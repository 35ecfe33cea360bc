"""Finds the sizes of the network of a plan; no weights are read, and nothing is downloaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jaxblock.config.config import Config
from jaxblock.data.store.manifest import read_manifest
from jaxblock.errors import UserError
from jaxblock.huggingface.load import read_architecture
from jaxblock.io.files import read_json
from jaxblock.io.paths import as_path
from jaxblock.models.architecture import Architecture
from jaxblock.models.families import registry
from jaxblock.training.checkpoints import run_folder

_LLADA_8B: dict[str, Any] = {
    "model_type": "llada", "d_model": 4096, "n_layers": 32, "n_heads": 32, "n_kv_heads": 32, "mlp_hidden_size": 12288,
    "embedding_size": 126464, "vocab_size": 126464, "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "weight_tying": False,
    "max_sequence_length": 4096, "mask_token_id": 126336, "eos_token_id": 126081, "pad_token_id": 126081,
}  # fmt: skip
_DREAM_7B: dict[str, Any] = {
    "model_type": "Dream", "hidden_size": 3584, "num_hidden_layers": 28, "num_attention_heads": 28,
    "num_key_value_heads": 4, "intermediate_size": 18944, "vocab_size": 152064, "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0, "tie_word_embeddings": False, "max_position_embeddings": 131072, "mask_token_id": 151666,
    "eos_token_id": 151643, "pad_token_id": 151643,
}  # fmt: skip

PUBLISHED: dict[str, dict[str, Any]] = {
    "GSAI-ML/LLaDA-8B-Instruct": _LLADA_8B,
    "GSAI-ML/LLaDA-8B-Base": _LLADA_8B,
    "GSAI-ML/LLaDA-1.5": _LLADA_8B,
    "Dream-org/Dream-v0-Instruct-7B": _DREAM_7B,
    "Dream-org/Dream-v0-Base-7B": _DREAM_7B,
}
"""The sizes and ids in the config.json of well-known checkpoints."""


def planned_architecture(config: Config, given: str | None) -> tuple[Architecture, str]:
    """Returns the architecture of the network that a config would train, and the source of its sizes.

    Args:
        config: the run's settings, checked.
        given: the path of a config.json, a checkpoint or a run; None for the checkpoint that the config starts from.

    Returns:
        (the architecture, the name of its source).

    Raises:
        UserError: no source of the sizes is found.
    """
    source = given or config.model.init_from
    if source is None:
        return _random(config)
    path = Path(source)
    if run_folder.is_run(source):
        arch, said = run_folder.open_run(source).arch, f"{source}/{run_folder.MODEL}"
    elif path.is_file():
        arch, said = registry.from_hf(read_json(path), source), source
    elif path.is_dir():
        arch, said = read_architecture(source), f"{source}/config.json"
    elif source.split("@")[0] in PUBLISHED:
        name = source.split("@")[0]
        arch, said = registry.from_hf(PUBLISHED[name], name), f"the published config.json of {name}"
    else:
        raise UserError(
            f"{source} is neither a folder here nor a checkpoint whose sizes are known: give its config.json with "
            "--model_config"
        )
    if arch.mask_id is None:
        # An autoregressive checkpoint has no mask token. Which token is used changes no costs.
        arch = registry.with_mask(arch, arch.vocab_size, config.model.alignment)
    return arch, said


def _random(config: Config) -> tuple[Architecture, str]:
    """Returns the architecture of a random start and its source.

    The vocabulary's size is that of the prepared data, or ``data.vocab_size`` where no data are prepared.
    """
    folder = as_path(config.data.prepared)
    vocab, said = config.data.vocab_size, "the config's model section and data.vocab_size"
    if (folder / "manifest.json").exists():
        vocab, said = read_manifest(folder).vocab_size, f"the config's model section and {config.data.prepared}"
    return registry.architecture_from_config(config.model, vocab_size=vocab, mask_id=vocab - 1, eos_id=vocab - 2), said
