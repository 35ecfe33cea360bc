"""Identifies weights by their content: the frozen base of adapters, which fit no other, and what an evaluation is of."""

from __future__ import annotations

import hashlib

from etils import epath

from jaxblock.errors import UserError
from jaxblock.huggingface import peft
from jaxblock.io.files import read_bytes
from jaxblock.io.paths import PathLike, as_path
from jaxblock.models.config import Checkpoint
from jaxblock.training.checkpoints import run_folder
from jaxblock.training.checkpoints.checksums import read_lists
from jaxblock.training.checkpoints.reader import CHECKPOINTS_FOLDER
from jaxblock.training.checkpoints.run_folder import FINGERPRINT_FORM, Base

_DESCRIPTIONS = ("config.json", "adapter_config.json")
"""What makes a network of weights: another rotary base, or another scale of adapters, gives other answers."""

_SAMPLE = 1 << 16  # bytes of a file's start and end that go into a fingerprint


def identify_base(source: str, wanted: Checkpoint = "latest", form: int = FINGERPRINT_FORM) -> Base:
    """Identifies a base by a hash: of a run's model and a checkpoint's checksums, or of the first and last bytes of each file.

    Args:
        source: a run or a local Hugging Face folder.
        wanted: the checkpoint, where the source is a run.
        form: what is hashed (``Base.form``).

    Raises:
        UserError: the source holds adapters itself, or has no such checkpoint.
    """
    path = as_path(source)
    if run_folder.is_run(source):
        run = run_folder.open_run(source)
        if run.config.lora.rank:
            raise UserError(
                f"{source} holds adapters; adapters on adapters are not supported: export it merged "
                "(`jaxblock export`) and set model.init_from to the export"
            )
        step = run_folder.find_step(run, wanted)
        # A run that was begun again with other data has the same config and steps, but other weights.
        sums = read_lists(path / CHECKPOINTS_FOLDER / str(step)) if form > 1 else b""
        content = (
            read_bytes(path / run_folder.MODEL) + (sums or read_bytes(path / run_folder.CONFIG)) + str(step).encode()
        )
        return Base(source, hashlib.sha256(content).hexdigest(), step, form)
    return Base(source, _hash_of_files(path), None, form)


def weights_fingerprint(source: PathLike, step: int | None = None, base: PathLike | None = None) -> str:
    """Returns a hash by which a network is known again: a run's weights with their base's, or what the files of a folder say.

    Args:
        source: a run, or a local Hugging Face folder of weights or adapters.
        step: the step of the run's checkpoint; None where the source is no run.
        base: the folder of the weights beneath the adapters of ``source``; None where it holds none, or is a run.

    Raises:
        UserError: a file cannot be read.
    """
    if step is None:
        folder = as_path(source)
        sizes = [read_bytes(folder / name) for name in _DESCRIPTIONS if (folder / name).exists()]
        beneath = "" if base is None else weights_fingerprint(base)
        return hashlib.sha256(b"".join(sizes) + f"{_hash_of_files(folder)}{beneath}".encode()).hexdigest()
    run = run_folder.open_run(source)
    lists = read_lists(run.folder / CHECKPOINTS_FOLDER / str(step)) or read_bytes(run.folder / run_folder.CONFIG)
    base = "" if run.base is None else run.base.fingerprint
    return hashlib.sha256(read_bytes(run.folder / run_folder.MODEL) + lists + f"{step}{base}".encode()).hexdigest()


def _hash_of_files(folder: epath.Path) -> str:
    """Returns a hash of the names, the sizes and the first and last bytes of a folder's weights."""
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        size = file.stat().length
        with file.open("rb") as handle:
            digest.update(f"{file.name}:{size}".encode() + handle.read(_SAMPLE))
            handle.seek(max(size - _SAMPLE, 0))
            digest.update(handle.read(_SAMPLE))
    return digest.hexdigest()


def check_adapter_base(folder: PathLike, base: PathLike, fingerprint: str | None) -> None:
    """Checks that a Hugging Face folder is the base that exported adapters were trained on.

    Args:
        folder: the folder of the adapters, for messages.
        base: the folder of the weights.
        fingerprint: what the adapters' folder says of their base (``peft.read_base_fingerprint``); None says nothing.

    Raises:
        UserError: the weights are others.
    """
    found = None if fingerprint is None else _hash_of_files(as_path(base))
    if found != fingerprint:
        raise UserError(
            f"{base} is not the base that the adapters in {folder} were trained on (its weights have the fingerprint {str(found)[:12]}, "
            f"and {folder}/{peft.BASE} names {str(fingerprint)[:12]}): give that base, or, if these are the same weights in other files, "
            f"take {peft.BASE} out"
        )


def check_base(source: str, remembered: Base | None) -> Base:
    """Identifies the base at ``source``; raises UserError where it is not the one that adapters were trained on."""
    assert remembered is not None  # run_folder.open_run checks it
    if not as_path(source).is_dir():
        raise UserError(
            f"{source}, the base of these adapters, is not there: set model.init_from (from Python: `base`) to where it is"
        )
    found = identify_base(source, "latest" if remembered.step is None else remembered.step, remembered.form)
    if found.fingerprint != remembered.fingerprint:
        raise UserError(
            f"{source} is not the base that these adapters were trained on (that was {remembered.folder}, fingerprint "
            f"{remembered.fingerprint[:12]}; this is {found.fingerprint[:12]}): set model.init_from to that one"
        )
    return found
