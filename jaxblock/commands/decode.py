"""``jaxblock decode``: answers prompts with a checkpoint."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, cast

import tyro

from jaxblock.commands import say
from jaxblock.commands.prompts import read_prompts, read_texts
from jaxblock.commands.unused import unused_flags
from jaxblock.config.config import Config
from jaxblock.data.config import DataConfig
from jaxblock.data.text.examples import Prompt
from jaxblock.data.text.marked import MarkedText, SpannedText
from jaxblock.diffusion.config import CanvasConfig
from jaxblock.diffusion.decoding.config import DecodeConfig
from jaxblock.errors import UserError
from jaxblock.io.files import check_absent, write_text
from jaxblock.io.paths import as_path
from jaxblock.models.config import Checkpoint

if TYPE_CHECKING:
    import numpy as np

    from jaxblock.data.tokens.encoding import Encoder
    from jaxblock.model import Answer, Model
    from jaxblock.model.infilled import Infilled

    Given = np.ndarray | SpannedText

CANDIDATES = 5
"""How many candidates a page of traces shows for each token."""


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
    """File of prompts: records (.jsonl, .ndjson, .json, .parquet), whose `data.prompt_field` or `data.messages_field` is read, or text with
    one prompt per line. A conversation's last answer is left out, as a record's response is."""
    out: str | None = None
    """Write JSON lines here instead of to standard output; an existing file is refused, unless `overwrite` is set."""
    overwrite: bool = False
    """Whether to replace existing files, once all prompts are answered."""
    infill: bool = False
    """Fill spans inside texts: [[8]] is one of 8 tokens."""
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
    from jaxblock import loading
    from jaxblock.diffusion.decoding.rules import unused_steps
    from jaxblock.parallel import processes

    process, count = processes.join_group()
    notes = [*unused_flags("decode", options, config), *unused_steps(config.decode)]
    for note in notes if process == 0 else ():
        say(f"note: {note}")
    typed = not options.prompts and options.file is None
    if count > 1 and typed:
        raise UserError("several processes cannot share standard input: give the prompts by --file or as arguments")
    _check_flags(options)
    prompts = [] if typed else _prompts(options, config)  # before weights are read, which may take minutes
    if options.beside:
        loading.check_there(options.beside)
    model = _open_model(options.checkpoint, options.step, options.base, config)
    beside = _open_model(options.beside, options.beside_step, None, config) if options.beside else None
    if typed:
        prompts = _prompts(options, config)
    given = _encoded(model, prompts)
    if options.watch:
        for index, (_, prompt) in enumerate(prompts):
            _watch(model, _as_text(prompt), given[index], index, shown=process == 0)
        return 0
    results: Iterator[Answer | Infilled]
    if options.html:
        from jaxblock.commands.decode_page import Page, traced_results

        models = {options.checkpoint: (model, given)}
        if beside is not None:
            name = _name_beside(options)
            models[name] = (beside, _encoded(beside, prompts, f" ({name})"))
        texts = [_as_text(prompt) for _, prompt in prompts]
        page = Page(options.html, options.candidates, overwrite=options.overwrite, writes=process == 0)
        results = traced_results(models, texts, page)
    else:
        results = _results(model, given)
    lines = (_line(prompt, result) for (_, prompt), result in zip(prompts, results, strict=True))
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


def _check_flags(options: Options) -> None:
    """Raises UserError, before the work begins, where flags contradict each other or a file to be written exists."""
    if options.prompts and options.file is not None:
        raise UserError(f"prompts are given on the command line and by --file {options.file}: leave out one of the two")
    if options.watch and (options.out or options.html):
        flag = "--out" if options.out else "--html"
        raise UserError(f"watch shows the canvas and writes no file: leave out either --watch or {flag}")
    if options.html and options.out and as_path(options.html) == as_path(options.out):
        raise UserError(f"--html and --out both name {options.out}: write the page to another file")
    for path in filter(None, (options.out, options.html)):
        read = (options.checkpoint, options.beside, options.base, options.file, options.config)
        check_absent(path, overwrite=options.overwrite, inputs=read)
    plain = {field.name: field.default for field in dataclasses.fields(options)}
    for name, needs in (("beside", "html"), ("candidates", "html"), ("beside_step", "beside")):
        if getattr(options, name) != plain[name] and getattr(options, needs) is None:
            raise UserError(f"--{name} has no effect without --{needs}: leave it out, or give --{needs} too")
    if options.beside:
        _name_beside(options)


def _prompts(options: Options, config: Config) -> list[tuple[str, Prompt | MarkedText]]:
    """Returns (origin, prompt) of all prompts, or of all texts with spans; raises UserError where there are none."""
    read = read_texts if options.infill else read_prompts
    prompts: list[tuple[str, Prompt | MarkedText]] = list(read(options.prompts, options.file, config.data))
    if not prompts:
        kind = "texts" if options.infill else "prompts"
        raise UserError(f"no {kind}: give some on the command line, by --file, or on standard input")
    return prompts


def _name_beside(options: Options) -> str:
    """Returns the name of the second checkpoint, with its step where both are of one run; raises UserError for the same one twice."""
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


def _encoded(model: Model, prompts: Sequence[tuple[str, Prompt | MarkedText]], of: str = "") -> list[Given]:
    """Returns the ids of (origin, prompt) pairs, checked; ``of`` stands after a prompt's origin in messages."""
    import numpy as np

    found: list[Given] = []
    for where, prompt in prompts:
        if isinstance(prompt, MarkedText):
            found.append(model.spanned_text(prompt, f"{where}{of}"))
        else:  # an array takes a tenth of a list's memory
            found.append(np.asarray(model.text_prompt(prompt, f"{where}{of}"), np.int32))
    layout = model.layout(model.decode_defaults, infill=isinstance(found[0], SpannedText))
    for (where, _), given in zip(prompts, found, strict=True):
        if isinstance(given, SpannedText):
            model.check_spans(given, f"{where}{of}", layout)
        else:
            model.check_prompt(given, f"{where}{of}", layout)
    return found


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


def _results(model: Model, given: Sequence[Given]) -> Iterator[Answer | Infilled]:
    """Answers the prompts, or fills the texts, and yields the results in their order."""
    texts = [one for one in given if isinstance(one, SpannedText)]
    yield from model.fillings(texts) if texts else model.answers(cast("list[np.ndarray]", given))


def _watch(model: Model, text: str, given: Given, index: int, *, shown: bool) -> None:
    """Decodes one prompt, or fills one text, and shows its canvas after every step; with ``shown`` False it only decodes."""
    from jaxblock.reporting.watch import Watch

    assert model.tokenizer is not None
    layout, start, stops = model.layout(model.decode_defaults), list[int](), tuple[int, ...]()
    if isinstance(given, SpannedText):
        steps, start = model.stream_infill(given, index=index), given.ids[given.first :]
    else:
        steps, stops = model.stream(given.tolist(), index=index), layout.stop_ids
    if not shown:
        for _ in steps:
            pass
        return
    watch = Watch(
        text,
        model.tokenizer.piece,
        mask_id=layout.mask_id,
        block=layout.block,
        stop_ids=stops,
        start=start,
        pause=0.05,
    )
    with watch:
        for response, nfe in steps:
            watch.step(response.tolist(), nfe)


def _line(prompt: Prompt | MarkedText, result: Answer | Infilled) -> str:
    """Returns the line of JSON of one result."""
    if isinstance(prompt, MarkedText):
        found = cast("Infilled", result)
        tokens = sum(end - first for first, end in found.spans)
        line = {"prompt": prompt.prompt, "text": found.text, "fills": found.fills, "tokens": tokens, "nfe": found.nfe}
    else:
        answer = cast("Answer", result)
        line = {"prompt": prompt, "response": answer.text, "tokens": len(answer.ids), "nfe": answer.nfe}
    return json.dumps(line, ensure_ascii=False) + "\n"


def _as_text(prompt: Prompt | MarkedText) -> str:
    """Returns a prompt as it is shown: a conversation with a line for each turn; of a text with spans what is before the first."""
    if isinstance(prompt, MarkedText):
        before = prompt.parts[0] if isinstance(prompt.parts[0], str) else ""
        return before if prompt.prompt is None else f"{_as_text(prompt.prompt)}\n{before}"
    return prompt if isinstance(prompt, str) else "\n".join(f"{turn['role']}: {turn['content']}" for turn in prompt)
