"""``jaxblock decode``: answers prompts with a checkpoint."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator, Sequence
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
from jaxblock.io.paths import as_path
from jaxblock.models.config import Checkpoint

if TYPE_CHECKING:
    import numpy as np

    from jaxblock.data.tokens.encoding import Encoder
    from jaxblock.model import Answer, Model

CANDIDATES = 5
"""How many candidates a page of traces shows for each token."""
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
    """YAML file of sections, or the name of a preset; without one the run's own config is used. Flags override it."""
    file: str | None = None
    """File of prompts: records (.jsonl, .json, .parquet), whose `data.prompt_field` or `data.messages_field` is read, or text with
    one prompt per line. A conversation's last answer is left out, as a record's response is."""
    out: str | None = None
    """Write JSON lines here instead of to standard output; an existing file is refused, unless `overwrite` is set."""
    overwrite: bool = False
    """Whether to replace existing files, once all prompts are answered."""
    watch: bool = False
    """Show the canvas while it is filled, block by block."""
    html: str | None = None
    """Also write one self-contained HTML file here that plays how each canvas was filled, with the candidates for each token; an
    existing file is refused, unless `overwrite` is set."""
    beside: str | None = None
    """With `html`: a second checkpoint, decoded with the same settings and shown side by side."""
    beside_step: Checkpoint = "latest"
    """The checkpoint of `beside` where that is a run, as `step` is of `checkpoint`."""
    candidates: int = CANDIDATES
    """With `html`: how many of the most probable tokens are shown for each token."""
    base: str | None = None
    """The folder of the weights that adapters belong to; None for the one used in training."""
    step: Checkpoint = "latest"
    """The checkpoint of a run: the newest, the best by its `train.keep_best`, or that of a step."""
    data: DataConfig = field(default_factory=DataConfig)
    canvas: CanvasConfig = field(default_factory=CanvasConfig)
    decode: DecodeConfig = field(default_factory=DecodeConfig)


def run(options: Options, config: Config) -> int:
    """Decodes the prompts and prints one line of JSON for each, or shows each canvas while it is filled."""
    from jaxblock.diffusion.decoding.rules import unused_steps
    from jaxblock.parallel import processes

    process, count = processes.join_group()
    for note in unused_steps(config.decode) if process == 0 else ():
        say(f"note: {note}")
    if count > 1 and not options.prompts and options.file is None:
        raise UserError("several processes cannot share standard input: give the prompts by --file or as arguments")
    _check_outputs(options)
    model = _open_model(options.checkpoint, options.step, options.base, config)
    beside = _open_model(options.beside, options.beside_step, None, config) if options.beside else None
    prompts = list(_prompts(options, config.data))
    if not prompts:
        raise UserError("no prompts: give some on the command line, by --file, or on standard input")
    ids = _prompt_ids(model, prompts)
    if options.watch:
        for index, (_, prompt) in enumerate(prompts):
            _watch(model, _as_text(prompt), ids[index], index, shown=process == 0)
        return 0
    if options.html:
        from jaxblock.commands.decode_page import Page, traced_answers

        models = {options.checkpoint: (model, ids)}
        if beside is not None:
            name = _name_beside(options)
            models[name] = (beside, _prompt_ids(beside, prompts, f" ({name})"))
        texts = [_as_text(prompt) for _, prompt in prompts]
        page = Page(options.html, options.candidates, overwrite=options.overwrite, writes=process == 0)
        answers = traced_answers(models, texts, page)
    else:
        answers = model.answers(ids)
    lines = (_answer_line(prompt, answer) for (_, prompt), answer in zip(prompts, answers, strict=True))
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


def _check_outputs(options: Options) -> None:
    """Raises UserError, before the work begins, where flags contradict each other or a file to be written exists."""
    if options.watch and (options.out or options.html):
        flag = "--out" if options.out else "--html"
        raise UserError(f"watch shows the canvas and writes no file: leave out either --watch or {flag}")
    if options.html and options.out and as_path(options.html) == as_path(options.out):
        raise UserError(f"--html and --out both name {options.out}: write the page to another file")
    for path in filter(None, (options.out, options.html)):
        check_absent(path, overwrite=options.overwrite)
    plain = {field.name: field.default for field in dataclasses.fields(options)}
    for name, needs in (("beside", "html"), ("candidates", "html"), ("beside_step", "beside")):
        if getattr(options, name) != plain[name] and getattr(options, needs) is None:
            raise UserError(f"--{name} has no effect without --{needs}: leave it out, or give --{needs} too")


def _name_beside(options: Options) -> str:
    """Returns the name of the second checkpoint, with its step where both are of one run."""
    assert options.beside is not None
    if options.beside != options.checkpoint:
        return options.beside
    if options.beside_step == options.step:
        raise UserError(
            f"--beside is the checkpoint itself ({options.checkpoint}): name another one, or another --beside_step"
        )
    return f"{options.beside}, step {options.beside_step}"


def _open_model(checkpoint: str, step: Checkpoint, base: str | None, config: Config) -> Model:
    """Loads a checkpoint with the canvas, the decoder's settings and the prompt's settings of the config.

    Raises:
        UserError: the checkpoint cannot be loaded or has no mask token, or the config does not fit it.
    """
    from jaxblock import loading

    model = dataclasses.replace(
        loading.load(checkpoint, base=base, step=step, mesh="all"), canvas=config.canvas, decode_defaults=config.decode
    )
    # An autoregressive checkpoint may have neither mask token nor encoder; the error about the mask token is clearer.
    model.arch.need_mask_id()
    if model.encoder is None:
        return model
    encoder = with_prompt_settings(model.encoder, config.data, checkpoint, recorded=model.recorded)
    return dataclasses.replace(model, encoder=encoder)


def _prompt_ids(model: Model, prompts: Sequence[tuple[str, Prompt]], of: str = "") -> list[np.ndarray]:
    """Returns the ids of (origin, prompt) pairs, checked; ``of`` stands after a prompt's origin in messages."""
    import numpy as np

    layout = model.layout(model.decode_defaults)
    # Arrays take a tenth of the lists' memory.
    ids = [np.asarray(model.text_prompt(prompt, f"{where}{of}"), np.int32) for where, prompt in prompts]
    for (where, _), row in zip(prompts, ids, strict=True):
        model.check_prompt(row, f"{where}{of}", layout)
    return ids


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


def _answer_line(prompt: Prompt, answer: Answer) -> str:
    """Returns the line of JSON of one answer."""
    line = {"prompt": prompt, "response": answer.text, "tokens": len(answer.ids), "nfe": answer.nfe}
    return json.dumps(line, ensure_ascii=False) + "\n"


def _as_text(prompt: Prompt) -> str:
    """Returns a prompt as it is shown: a conversation with a line for each turn."""
    return prompt if isinstance(prompt, str) else "\n".join(f"{turn['role']}: {turn['content']}" for turn in prompt)
