"""Downloads checkpoints named on the Hugging Face hub or kept in an object store into local folders."""

from __future__ import annotations

import os
import re

import huggingface_hub
from huggingface_hub import errors

from jaxblock.errors import UserError, first_line
from jaxblock.io.folders import list_folder
from jaxblock.io.paths import PathLike, is_remote
from jaxblock.io.remote import local_folder

_NAME = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[\w./-]+))?")

# Weights, configs, tokenizers and chat templates: no code and no pickles.
_WEIGHTS = ["*.safetensors"]
_BESIDE = ["*.json", "*.model", "*.jinja", "merges.txt", "vocab.txt"]
_UNWANTED = ["*/*", "*.py", "*.bin", "*.pt", "*.pth"]  # subfolders hold the same weights in other formats
_FILES = (".json", ".jsonl", ".model", ".yaml", ".safetensors")  # a name that ends so is a mistyped path


def local_checkpoint(name: PathLike, *, weights: bool = True) -> str:
    """Returns the local folder of a model that is named by path or by hub name, and downloads it if need be.

    Args:
        name: a path, which is returned as it is; or where no such file or folder exists ``org/name`` or
            ``org/name@revision`` on the hub. The folder of a checkpoint or of adapters at ``gs://`` is copied to a
            temporary folder of this process; that of a run is returned as it is.
        weights: whether the weights are downloaded too; a tokenizer does not need them.

    Returns:
        The path, which is not checked further: whoever reads it says what is missing.

    Raises:
        UserError: the hub name cannot be downloaded.
    """
    text = os.fspath(name)
    if is_remote(text):
        return _copy_of_remote(text, weights)
    match = _NAME.fullmatch(text)
    if match is None or text.endswith(_FILES) or os.path.exists(text):
        return text
    repo, revision = match["repo"], match["revision"]
    wanted = _WEIGHTS + _BESIDE if weights else _BESIDE
    try:
        return str(
            huggingface_hub.snapshot_download(repo, revision=revision, allow_patterns=wanted, ignore_patterns=_UNWANTED)
        )
    except Exception as error:  # the client's, and those of the several HTTP libraries beneath it
        raise UserError(f"{text} is no local folder, and {_why(error, repo, revision)}") from error


def _copy_of_remote(folder: str, weights: bool) -> str:
    """Copies a checkpoint, adapters or a tokenizer from an object store; returns the address of any other folder."""
    names = {entry.name for entry in list_folder(folder)}
    if not names & {"config.json", "adapter_config.json", "tokenizer.json", "tokenizer.model"}:
        return folder
    return str(local_folder(folder, [*(_WEIGHTS if weights else ()), *_BESIDE, "*.py"]))  # code: for an export


def _why(error: Exception, repo: str, revision: str | None) -> str:
    """Explains a failed download and says what to do."""
    if isinstance(error, errors.GatedRepoError):
        return f"the hub repository {repo} is gated: accept its terms on its page there, and set HF_TOKEN to your access token"
    if isinstance(error, errors.RepositoryNotFoundError | errors.HFValidationError):
        return (
            f"the hub has no repository {repo} that you may see: correct the name (or the path), or set HF_TOKEN to a "
            "token that may read it"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return f"the hub repository {repo} has no revision {revision}: correct what follows the @"
    return (
        f"{repo} could not be downloaded from the hub ({type(error).__name__}: {first_line(error)}). Without a network: "
        f"download it elsewhere (`hf download {repo}`), copy the folder here, and give its path"
    )
