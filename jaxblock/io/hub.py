"""Downloads checkpoints from the Hugging Face hub or an object store into local folders."""

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

# Only weights, configs, tokenizers, chat templates and the model card are downloaded from the hub: no code and no pickles.
_WEIGHTS = ["*.safetensors"]
_BESIDE = ["*.json", "*.model", "*.jinja", "merges.txt", "vocab.txt", "README.md"]
_UNWANTED = ["*/*", "*.py", "*.bin", "*.pt", "*.pth"]  # subfolders hold the same weights in other formats
_FILES = (
    ".json",
    ".jsonl",
    ".model",
    ".yaml",
    ".yml",
    ".safetensors",
)  # a name with one of these endings is a mistyped path

_LOCAL = ("runs", "exports", "scores", "prepared", "checkpoints", "configs")  # folders here, not people on the hub


def local_checkpoint(name: PathLike, *, weights: bool = True) -> str:
    """Returns the local folder of a model that is named by path or hub name, and downloads it where needed.

    Args:
        name: a local path, which is returned as it is; where it does not exist, ``org/name`` or ``org/name@revision`` is
            downloaded from the hub. A ``gs://`` folder of a checkpoint, adapters or a tokenizer is copied to a temporary
            folder of this process; that of a run is returned as it is.
        weights: whether the weights are downloaded too; a tokenizer does not need them.

    Returns:
        The path. It is not checked: the code that reads it reports what is missing.

    Raises:
        UserError: the hub name cannot be downloaded.
    """
    text = os.fspath(name)
    if is_remote(text):
        return _copy_of_remote(text, weights)
    match = _hub_name(text)
    if match is None:
        return text
    repo, revision = match["repo"], match["revision"]
    wanted = _WEIGHTS + _BESIDE if weights else _BESIDE
    try:
        return str(
            huggingface_hub.snapshot_download(repo, revision=revision, allow_patterns=wanted, ignore_patterns=_UNWANTED)
        )
    except Exception as error:  # huggingface_hub raises its own exceptions and those of several HTTP libraries
        raise UserError(f"{text} is no local folder, and {_why(error, repo, revision)}") from error


def is_downloaded(name: str) -> bool:
    """Tells whether a checkpoint's config.json can be read without the hub: from a folder, or from what was downloaded before."""
    match = _hub_name(name)
    if match is None:
        return is_remote(name) or os.path.isdir(name)
    return isinstance(
        huggingface_hub.try_to_load_from_cache(match["repo"], "config.json", revision=match["revision"]), str
    )


def hub_repository(name: PathLike) -> str | None:
    """Returns the hub repository (``org/name``) that a checkpoint's name means, or that its folder was downloaded from; else None."""
    text = os.fspath(name)
    if (match := _hub_name(text)) is not None:
        return match["repo"]
    place = re.search(r"(?:^|/)models--([^/]+)--([^/]+)/snapshots/[^/]+/?$", text)
    return f"{place[1]}/{place[2]}" if place else None


def with_revision(name: str, revision: str) -> str:
    """Returns the name of a hub repository at a revision; a name that is a path, or has a revision, stays as it is."""
    match = _hub_name(name)
    return name if match is None or match["revision"] is not None else f"{name}@{revision}"


def split_revision(name: str) -> tuple[str, str | None]:
    """Returns a hub name without its revision, and the revision; any other name, and None."""
    match = _hub_name(name)
    return (name, None) if match is None else (match["repo"], match["revision"])


def _hub_name(text: str) -> re.Match[str] | None:
    """Parses a name on the hub; returns None for a text that is a path or can only be one.

    ``runs/typo`` is a path where a folder ``runs`` is here, or by custom; with a revision, ``org/name@main``, it is on the hub.
    """
    if text.endswith(_FILES) or os.path.exists(text):
        return None
    name, first = _NAME.fullmatch(text), text.split("/", 1)[0]
    local = name is not None and name["revision"] is None and (first in _LOCAL or os.path.isdir(first))
    return None if local else name


def _copy_of_remote(folder: str, weights: bool) -> str:
    """Copies a checkpoint, adapters or a tokenizer from an object store; returns the address of any other folder."""
    names = {entry.name for entry in list_folder(folder)}
    if not names & {"config.json", "adapter_config.json", "tokenizer.json", "tokenizer.model"}:
        return folder
    # Model code is copied too, though never run, so that an export can include it.
    return str(local_folder(folder, [*(_WEIGHTS if weights else ()), *_BESIDE, "*.py"]))


def hub_answer(error: Exception) -> Exception:
    """Returns the hub's own answer behind an error, such as that of a client that says only which file it was; else the error."""
    if isinstance(error, ValueError):  # it says what the client itself found wrong
        return error
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, errors.HfHubHTTPError):
            return cause
        cause = cause.__cause__ or cause.__context__
    return error


def _why(error: Exception, repo: str, revision: str | None) -> str:
    """Explains a failed download and says what to do."""
    error = hub_answer(error)
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
