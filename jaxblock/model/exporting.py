"""Saves a network as a folder that other libraries read, whole or its adapters alone, and pushes it to the Hugging Face hub."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import DTypeLike

from jaxblock.cards.make import Export, card_text, default_name
from jaxblock.cards.use import Form
from jaxblock.config.recorded import KEY, to_block
from jaxblock.errors import UserError
from jaxblock.huggingface import peft
from jaxblock.huggingface.checks import kept_if_right, old_kept_until_right, only_exporter
from jaxblock.huggingface.companions import Trained
from jaxblock.huggingface.load import read_architecture
from jaxblock.huggingface.save import MARKER, save_checkpoint, verify_checkpoint
from jaxblock.io import hub_upload
from jaxblock.io.hub import local_checkpoint
from jaxblock.io.paths import PathLike, as_path
from jaxblock.io.remote import local_folder
from jaxblock.model.arguments import saved_type
from jaxblock.model.network import Network
from jaxblock.models.linear import lora
from jaxblock.parallel import processes, rules
from jaxblock.parallel.rows import mesh_of, spans_processes
from jaxblock.training.base_identity import identify_base
from jaxblock.training.checkpoints import run_folder
from jaxblock.training.stored_text import record_text, template_for_others
from jaxblock.types import Params

N = TypeVar("N", bound=Network)


def _unchanged(params: Params) -> Params:
    """Returns the parameters; compiled, it gathers them."""
    return params


@dataclasses.dataclass(frozen=True, repr=False)
class Exporting(Network):
    """Adds exports to a network: ``save``, ``save_adapter`` and ``push_to_hub``."""

    def save(
        self,
        folder: PathLike,
        dtype: DTypeLike | None = None,
        *,
        overwrite: bool = False,
        name: str | None = None,
        scores: Sequence[PathLike] = (),
    ) -> float:
        """Writes a Hugging Face folder, reads it back and compares logits; adapters are merged into their base.

        Args:
            folder: the folder to make.
            dtype: the type of the tensors, float32, bfloat16 or float16; None keeps each tensor's own.
            overwrite: whether an existing export is replaced, once the new one is whole and right.
            name: the name that the model card gives to the model, such as that of its repository on the hub; None for the folder's.
            scores: the folders of evaluations whose scores the model card has; with none, those beside the run are looked for.

        Returns:
            The largest difference between any logit before saving and after (0 where the type is kept).

        Raises:
            UserError: the base is int8, weights are not saved in the type, the folder exists, cannot be written or is written by
                another process, an evaluation is of other weights, or the logits differ; nothing is left then.
        """
        dtype, merged = saved_type(dtype), self.merged()
        card = self._card(folder, "merged", merged.params, name, scores, dtype)
        together = spans_processes(merged.params)
        with self._place(folder, MARKER, overwrite=overwrite, together=together) as place:
            save_checkpoint(place, self.arch, merged.params, **self._companions(), card=card, dtype=dtype)
            with kept_if_right(place, MARKER, together=together):
                return verify_checkpoint(place, merged.net, merged.params, self._probe())

    def save_adapter(
        self,
        folder: PathLike,
        *,
        overwrite: bool = False,
        name: str | None = None,
        scores: Sequence[PathLike] = (),
    ) -> float:
        """Writes only the adapters, in PEFT's format, reads them back and compares logits.

        Args:
            folder: the folder to make.
            overwrite: whether an existing export of adapters is replaced, once the new one is whole and right.
            name: the name that the model card gives to the model; None for the folder's.
            scores: the folders of evaluations whose scores the model card has; with none, those beside the run are looked for.

        Returns:
            The largest difference of any logit: 0.

        Raises:
            UserError: there are no adapters, the folder exists or cannot be written, or the base's vocabulary was extended,
                which PEFT's format cannot store.
        """
        if self.net.lora is None:
            raise UserError(f"{self.origin} holds no adapters: save it whole")
        adapters, base, fingerprint = self.params[lora.KEY], self.base, None
        card = self._card(folder, "adapter", adapters, name, scores)
        if base is not None and run_folder.is_run(base):
            base = None  # PEFT cannot load a run: the user must export the base and name that export
        elif base is not None:
            beneath = local_checkpoint(base)
            peft.check_base_rows(folder, self.arch, read_architecture(beneath))
            fingerprint = identify_base(beneath).fingerprint
        together = spans_processes(adapters)
        if together:
            adapters = jax.device_get(self._run(_unchanged, (), adapters))
        with self._place(folder, peft.CONFIG, overwrite=overwrite, together=together) as place:
            if not together or jax.process_index() == 0:
                kept = {name: value for name, value in self._companions().items() if name != "origin"}
                peft.save_adapter(
                    place,
                    self.arch,
                    self.net.lora,
                    adapters,
                    base=base,
                    base_fingerprint=fingerprint,
                    card=card,
                    **kept,
                )
            if together:
                processes.wait(f"{folder} is written")
            with kept_if_right(place, peft.CONFIG, together=together):
                return self._verify_adapter(place)

    def push_to_hub(
        self,
        repository: str,
        *,
        private: bool = True,
        adapter: bool = False,
        dtype: DTypeLike | None = None,
        overwrite: bool = False,
        scores: Sequence[PathLike] = (),
    ) -> str:
        """Exports to a temporary folder, reads that back, and uploads it to the Hugging Face hub.

        Where an upload was interrupted, the same call goes on: what has arrived is not sent again.

        Args:
            repository: the name on the hub, ``org/name``; the repository is made where it does not exist.
            private: whether it is made as a private one; a public one is refused then.
            adapter: whether the adapters alone are exported, in PEFT's format, and not the whole network.
            dtype: the type of the whole network's tensors; None keeps each tensor's own.
            overwrite: whether an earlier export in the repository is replaced.
            scores: the folders of evaluations whose scores the model card has; with none, those beside the run are looked for.

        Returns:
            The address of the repository's page.

        Raises:
            UserError: as ``save`` and ``save_adapter``; or the name is no ``org/name``, there is no token or no network, or the
                repository holds other files.
        """
        if adapter and dtype is not None:
            raise UserError("adapters alone keep float32: leave out dtype")
        dtype = saved_type(dtype)  # before anything is sent
        if spans_processes(self.params):
            raise UserError(
                "several processes hold the weights: save them to a shared folder, and push that by `jaxblock export`"
            )
        hub_upload.find_repository(repository, private=private, overwrite=overwrite)
        with tempfile.TemporaryDirectory(prefix="jaxblock-") as place:
            folder = os.path.join(place, "export")
            if adapter:
                self.save_adapter(folder, name=repository, scores=scores)
            else:
                self.save(folder, dtype, name=repository, scores=scores)
            return hub_upload.push_folder(folder, repository, private=private, overwrite=overwrite, say=warnings.warn)

    def merged(self: N) -> N:
        """Returns the same model with its adapters merged into its weights; the model itself where there are none.

        Raises:
            UserError: the weights are int8.
        """
        if self.net.quantize == "int8":
            raise UserError(
                f"{self.origin} was loaded with int8 weights, which cannot be exported: load it with quantize none"
            )
        if self.net.lora is None:
            return self
        params = lora.merge(self.params, self.net.lora)
        return dataclasses.replace(self, net=dataclasses.replace(self.net, lora=None), params=params, base=None)

    def _card(
        self,
        folder: PathLike,
        form: Form,
        params: Params,
        name: str | None,
        scores: Sequence[PathLike],
        dtype: DTypeLike | None = None,
    ) -> str:
        """Returns the text of the model card of an export of these parameters."""
        leaves = jax.tree.leaves(params)
        kinds = {str(leaf.dtype) for leaf in leaves} if dtype is None else {str(jnp.dtype(dtype))}
        export = Export(
            name=name or default_name(folder),
            form=form,
            arch=self.arch,
            numbers=sum(leaf.size for leaf in leaves),
            dtype=" and ".join(sorted(kinds)),
            origin=self.origin,
            step=self.step,
            base=self.base,
            weights=self.weights_fingerprint(),
            tokenizer=None if self.tokenizer is None else self.tokenizer.main_file()[0],
        )
        return card_text(export, scores)

    @contextlib.contextmanager
    def _place(self, folder: PathLike, marker: str, *, overwrite: bool, together: bool) -> Iterator[PathLike]:
        """Locks the folder of an export and yields where to write it; refuses to replace what this model was loaded from."""
        own = {os.path.realpath(path) for path in (self.origin, self.base) if path is not None}
        if overwrite and os.path.realpath(folder) in own:
            raise UserError(f"{folder} is what the model was loaded from, so it is not replaced: choose another path")
        with (
            only_exporter(folder, together=together),
            old_kept_until_right(folder, marker, overwrite=overwrite, together=together) as place,
        ):
            yield place

    def _verify_adapter(self, folder: PathLike) -> float:
        """Reads saved adapters back and returns the largest difference of any logit; raises UserError unless it is 0."""
        mesh = mesh_of(self.params)
        place = None if mesh is None else functools.partial(rules.param_shardings, mesh)
        found, again = peft.load_adapter(local_folder(folder, ["*.json", "*.safetensors"]), self.arch, place)
        copy = dataclasses.replace(
            self, net=dataclasses.replace(self.net, lora=found), params=lora.attach(self._weights(), again)
        )
        ids = np.asarray(self._probe())
        difference = float(np.abs(copy.logits(ids) - self.logits(ids)).max())
        if not difference == 0:
            raise UserError(
                f"{folder}: logits of the saved adapters differ by {difference:.3g} (NaN: the weights hold one)"
            )
        return difference

    def _companions(self) -> dict[str, Any]:
        """Returns what is saved beside the weights: the folders of the tokenizer and of the original checkpoint, whose files
        are copied, and what the network was trained for."""
        trained = None
        if self.recorded and self.encoder is not None:
            block = to_block(record_text(self.canvas, self.decode_defaults, self.encoder))
            trained = Trained(self.stop_ids, template_for_others(self.encoder), {KEY: block})
        if self.origin is None or not run_folder.is_run(self.origin):
            return {"tokenizer": self.origin, "origin": self.base, "trained": trained}
        kept = as_path(self.origin) / run_folder.ORIGIN
        tokenizer = str(as_path(self.origin) / run_folder.TOKENIZER)
        return {"tokenizer": tokenizer, "origin": str(kept) if kept.exists() else None, "trained": trained}

    def _probe(self) -> Array:
        """Returns random tokens [2, T] to compare logits on."""
        width = min(64, self.arch.max_len)
        return jnp.asarray(np.random.default_rng(0).integers(0, self.arch.vocab_size, (2, width), dtype=np.int32))
