"""Identifies the frozen base of adapters by its content, since adapters work only with the base they were trained on."""

from __future__ import annotations

import hashlib

from jaxblock.errors import UserError
from jaxblock.io.files import read_bytes
from jaxblock.io.paths import as_path
from jaxblock.models.config import Checkpoint
from jaxblock.training.checkpoints import run_folder
from jaxblock.training.checkpoints.checksums import read_lists
from jaxblock.training.checkpoints.reader import CHECKPOINTS_FOLDER
from jaxblock.training.checkpoints.run_folder import FINGERPRINT_FORM, Base

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
    digest = hashlib.sha256()
    for file in sorted(path.glob("*.safetensors")):
        size = file.stat().length
        with file.open("rb") as handle:
            digest.update(f"{file.name}:{size}".encode() + handle.read(_SAMPLE))
            handle.seek(max(size - _SAMPLE, 0))
            digest.update(handle.read(_SAMPLE))
    return Base(source, digest.hexdigest(), None, form)


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
