"""``jaxblock decode``: answers prompts with a checkpoint."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from jaxblock.commands import say
from jaxblock.config.config import Config
from jaxblock.data.config import DataConfig
from jaxblock.data.text.examples import Prompt
from jaxblock.data.text.files import decompressed
from jaxblock.diffusion.config import CanvasConfig
from jaxblock.diffusion.decoding.config import DecodeConfig
from jaxblock.errors import UserError
from jaxblock.io.files import check_absent, read_bytes, write_text
from jaxblock.models.config import Checkpoint

if TYPE_CHECKING:
    import numpy as np

    from jaxblock.data.tokens.encoding import Encoder
    from jaxblock.model import Model

RECORDS = (".jsonl", ".json", ".parquet")
"""The suffixes of files that hold records; any other file has one prompt per line."""


@dataclass(frozen=True)
class Options:
    """Decodes prompts block by block: from the command line, a file, or standard input (one prompt per line)."""

    checkpoint: str
    """A run folder, a Hugging Face folder (or hub id), or a folder of PEFT adapters."""
    prompts: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """The prompts. Without any, and without `file`, prompts are read from standard input."""
    config: str | None = None
    """YAML file of sections; without one the run's own config is used. Flags override it."""
    file: str | None = None
    """File of prompts: records (.jsonl, .json, .parquet), whose `data.prompt_field` or `data.messages_field` is read, or text with
    one prompt per line. A conversation's last answer is left out, as a record's response is."""
    out: str | None = None
    """Write JSON lines here instead of to standard output; an existing file is refused, unless `overwrite` is set."""
    overwrite: bool = False
    """Whether to replace an existing file, once all prompts are answered."""
    watch: bool = False
    """Show the canvas while it is filled, block by block."""
    base: str | None = None
    """The folder of the weights that adapters belong to; None for the one used in training."""
    step: Checkpoint = "latest"
    """The checkpoint of a run: the newest, the best by its `train.keep_best`, or that of a step."""
    data: DataConfig = field(default_factory=DataConfig)
    canvas: CanvasConfig = field(default_factory=CanvasConfig)
    decode: DecodeConfig = field(default_factory=DecodeConfig)


def run(options: Options, config: Config) -> int:
    """Decodes the prompts and prints one line of JSON for each, or shows each canvas while it is filled."""
    import numpy as np

    from jaxblock import loading
    from jaxblock.diffusion.decoding.rules import unused_steps
    from jaxblock.parallel import processes

    process, count = processes.join_group()
    for note in unused_steps(config.decode) if process == 0 else ():
        say(f"note: {note}")
    if count > 1 and not options.prompts and options.file is None:
        raise UserError("several processes cannot share standard input: give the prompts by --file or as arguments")
    if options.out:
        if options.watch:
            raise UserError("watch shows the canvas and writes no file: leave out either --watch or --out")
        check_absent(options.out, overwrite=options.overwrite)
    model = dataclasses.replace(
        loading.load(options.checkpoint, base=options.base, step=options.step, mesh="all"),
        canvas=config.canvas,
        decode_defaults=config.decode,
    )
    # An autoregressive checkpoint may have neither mask token nor encoder; the error about the mask token is clearer.
    model.arch.need_mask_id()
    if model.encoder is not None:
        encoder = with_prompt_settings(model.encoder, config.data, options.checkpoint, recorded=model.recorded)
        model = dataclasses.replace(model, encoder=encoder)
    prompts = list(_prompts(options, config.data))
    if not prompts:
        raise UserError("no prompts: give some on the command line, by --file, or on standard input")
    ids = [
        np.asarray(model.text_prompt(prompt, where), np.int32) for where, prompt in prompts
    ]  # a tenth of the lists' memory
    layout = model.layout(config.decode)
    for (where, _), row in zip(prompts, ids, strict=True):
        model.check_prompt(row, where, layout)
    if options.watch:
        for index, (_, prompt) in enumerate(prompts):
            _watch(model, _as_text(prompt), ids[index], index, shown=process == 0)
        return 0
    lines = _decoded_lines(model, prompts, ids)
    if process > 0:  # one process speaks for all
        for _ in lines:
            pass
    elif options.out:
        write_text(options.out, "".join(lines), overwrite=options.overwrite)
        say(f"wrote {options.out}")
    else:
        for line in lines:
            print(line, end="", flush=True)
    return 0


def with_prompt_settings(encoder: Encoder, data: DataConfig, checkpoint: str, *, recorded: bool) -> Encoder:
    """Returns the encoder with the prompt template and the system message of the config.

    Args:
        encoder: the checkpoint's encoder.
        data: the ``data`` section.
        checkpoint: the checkpoint's name, for the message.
        recorded: whether the encoder has the settings that the checkpoint was trained with, which may not be replaced.
    """
    from jaxblock.config.yaml import load_config
    from jaxblock.data.tokens.encoding import Encoder
    from jaxblock.training.checkpoints.run_folder import is_run

    # What a run's own config.yaml says is not given here, even where its data were prepared with something else.
    kept = load_config(f"{checkpoint}/config.yaml").data if is_run(checkpoint) else DataConfig()
    given = {name: getattr(data, name) for name in ("prompt_template", "system")}
    changed: dict[str, Any] = {
        name: value
        for name, value in given.items()
        if value not in (None, getattr(encoder.config, name), getattr(kept, name))
    }
    if recorded:
        for name, value in changed.items():
            there = getattr(encoder.config, name)
            raise UserError(f"data.{name} is {value!r}, but {checkpoint} was trained with {there!r}: leave it out")
    settings = dataclasses.replace(encoder.config, **changed)
    return Encoder(encoder.tokenizer, encoder.template, encoder.special, settings)


def _prompts(options: Options, data: DataConfig) -> Iterator[tuple[str, Prompt]]:
    """Yields (origin, prompt) of every prompt, from the command line, a file or standard input."""
    if options.prompts:
        yield from ((f"prompt {at}", text) for at, text in enumerate(options.prompts, 1))
    elif options.file is None:
        if sys.stdin.isatty():
            say("reading prompts from standard input, one a line; end with Ctrl-D")
        yield from _lines("standard input", sys.stdin.buffer.read())
    elif options.file.removesuffix(".gz").endswith(RECORDS):
        from jaxblock.data.text.examples import read_prompts
        from jaxblock.data.text.recipes import with_recipe

        yield from read_prompts(options.file, with_recipe(data))
    else:
        yield from _lines(options.file, decompressed(options.file, read_bytes(options.file)))


def _lines(name: str, content: bytes) -> Iterator[tuple[str, str]]:
    """Yields (file:line, text) of every line that is not blank."""
    # splitlines would also split at other separators (U+2028, form feed), which a prompt may contain.
    for number, raw in enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        where = f"{name}:{number}"
        try:
            line = raw.decode().removesuffix("\r")
        except UnicodeDecodeError as error:
            raise UserError(f"{where}: not UTF-8 text ({error}); convert the file to UTF-8") from error
        if line.strip():
            yield where, line


def _watch(model: Model, text: str, ids: np.ndarray, index: int, *, shown: bool) -> None:
    """Decodes one prompt and shows its canvas after every step; with ``shown`` False it only decodes."""
    from jaxblock.reporting.watch import Watch

    assert model.tokenizer is not None
    steps = model.stream(ids.tolist(), index=index)
    if not shown:
        for _ in steps:
            pass
        return
    layout = model.layout(model.decode_defaults)
    watch = Watch(
        text, model.tokenizer.piece, mask_id=layout.mask_id, block=layout.block, stop_ids=layout.stop_ids, pause=0.05
    )
    with watch:
        for response, nfe in steps:
            watch.step(response.tolist(), nfe)


def _decoded_lines(model: Model, prompts: list[tuple[str, Prompt]], ids: list[np.ndarray]) -> Iterator[str]:
    """Decodes the prompts and yields a line of JSON for each."""
    for (_, prompt), answer in zip(prompts, model.answers(ids), strict=True):
        line = {"prompt": prompt, "response": answer.text, "tokens": len(answer.ids), "nfe": answer.nfe}
        yield json.dumps(line, ensure_ascii=False) + "\n"


def _as_text(prompt: Prompt) -> str:
    """Returns a prompt as it is shown: a conversation with a line for each turn."""
    return prompt if isinstance(prompt, str) else "\n".join(f"{turn['role']}: {turn['content']}" for turn in prompt)
