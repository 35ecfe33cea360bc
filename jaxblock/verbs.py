"""What each verb does once its settings are known. Results go to standard output, everything else to standard error."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from rich.console import Console

from jaxblock import build as wiring
from jaxblock import loading
from jaxblock import model as api
from jaxblock.config.config import Config
from jaxblock.data.loader import filled, pad_records
from jaxblock.data.store import prepare as preparing
from jaxblock.data.store.open import Prepared, open_prepared
from jaxblock.data.store.records import Record
from jaxblock.data.text import recipes
from jaxblock.errors import UserError
from jaxblock.evaluation import problems, runner, statistics
from jaxblock.fit import process as planning
from jaxblock.fit import report as plan_report
from jaxblock.io.files import check_absent, check_writable, read_bytes, write_text
from jaxblock.io.folders import check_vacant, folder_bytes, new_folder
from jaxblock.io.paths import as_path
from jaxblock.reporting import html as inspect_html
from jaxblock.reporting import terminal as inspect_terminal
from jaxblock.reporting.examine import Examined, draw_steps, examine
from jaxblock.reporting.watch import Watch
from jaxblock.training import start as setup
from jaxblock.training import weights
from jaxblock.training.checkpoints import run_folder
from jaxblock.training.loop import train as run_training

if TYPE_CHECKING:
    from jaxblock.cli import Decode, Evaluate, Export, Inspect, Plan, Prepare, Train


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def prepare(options: Prepare, config: Config) -> int:
    """Prepares data and prints what became of every record."""
    manifest = preparing.prepare(config, _say)
    for split, report in manifest.splits.items():
        dropped = sum(report["dropped"].values())
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in report["dropped"].items())
        print(f"{split}: {report['kept']:,} kept, {dropped:,} dropped{f' ({reasons})' if reasons else ''}")
    for pair, count in manifest.overlaps.items():
        if count:
            print(f"warning: {count:,} prompts are in both {pair}")
    print(f"{config.data.prepared}: {manifest.vocab_size:,} tokens in the vocabulary; see manifest.json")
    return 0


def inspect(options: Inspect, config: Config) -> int:
    """Shows records as training feeds them."""
    if options.html:
        check_absent(options.html)
    prepared = open_prepared(config.data.prepared)
    examined, layout = examine_records(config, prepared, options.split, options.records, options.steps)
    about = (
        f"{config.method.objective}, law {config.method.law}, {config.method.weighting} weights, "
        f"normalised by {config.method.normalize}, blocks {config.method.blocks}"
    )
    inspect_terminal.show(Console(), layout, examined, prepared.tokenizer.piece, about)
    if options.html:
        write_text(options.html, inspect_html.page(layout, examined, prepared.tokenizer.piece, about=about))
        _say(f"wrote {options.html}")
    return 0


def examine_records(
    config: Config, prepared: Prepared, split: str, indices: tuple[int, ...], steps: int
) -> tuple[list[Examined], Any]:
    """The given records with the draws of the first ``steps`` training steps of a batch made of them.

    Raises:
        UserError: an index outside the split.
    """
    source = prepared.records(split)
    if not indices or steps < 1:
        raise UserError("inspect needs at least one of `records` and at least 1 of `steps`")
    for index in indices:
        if not 0 <= index < len(source):
            raise UserError(f"records: {split} has records 0 to {len(source) - 1}, not {index}")
    records = [source[index] for index in indices]
    block = None
    if config.method.blocks == "pairs" and config.method.objective == "blockwise":
        block = np.zeros(len(records), np.int32)
    batch = pad_records(records, config.canvas, block=block)
    sized = dataclasses.replace(config, train=dataclasses.replace(config.train, batch_size=len(records)))
    special, manifest = prepared.special, prepared.manifest
    arch = wiring.architecture(config.model, vocab_size=manifest.vocab_size, mask_id=special.mask, eos_id=special.eos)
    objective = setup.objective(sized, wiring.network(arch, config.model), special.stop_ids)
    canvas = objective.canvas(batch)
    draws, noise = draw_steps(lambda step: objective.draw(batch, canvas, step), range(steps))
    found = examine(
        objective.layout,
        canvas,
        draws,
        normalize=objective.normalize,
        ablation=objective.ablation,
        noise=noise,
        drawn_blocks=objective.drawn_blocks(batch),
        labels=[f"{split} {record.index} ({record.source})" for record in records],
    )
    return found, objective.layout


def train(options: Train, config: Config) -> int:
    """Trains; says where everything is, or how to go on."""
    console = Console(stderr=True)
    if config.train.debug:
        config = wiring.debug(config)
        prepared = open_prepared(config.data.prepared)
        count = min(2, len(prepared.records("train")))
        examined, layout = examine_records(config, prepared, "train", tuple(range(count)), 1)
        inspect_terminal.show(console, layout, examined, prepared.tokenizer.piece)
        with jax.disable_jit():
            outcome = run_training(config, console)
    else:
        outcome = run_training(config, console)
    if jax.process_index() > 0:  # one process speaks for all
        return outcome.code
    if outcome.interrupted:
        _say(
            f"stopped after step {outcome.step:,} of {config.train.steps:,} and saved. To go on, run the same command "
            f"again (train.resume auto finds {config.train.out})"
        )
        return outcome.code
    if not outcome.finished_before:
        _say(f"done: {outcome.step:,} steps; checkpoints, metrics.jsonl and plots are in {config.train.out}")
    return 0


def decode(options: Decode, config: Config) -> int:
    """Decodes prompts."""
    if options.out:
        if options.watch:
            raise UserError("watch shows the canvas and writes no file: leave out either --watch or --out")
        check_absent(options.out)
    model = dataclasses.replace(
        loading.load(options.checkpoint, base=options.base, step=options.step),
        canvas=config.canvas,
        decode_defaults=config.decode,
    )
    model.arch.need_mask_id()  # an autoregressive checkpoint has none: that comes first, since it has no encoder either
    if model.encoder is None:
        raise UserError(
            f"{options.checkpoint} has no tokenizer with a chat template, so text cannot become tokens; use "
            "jaxblock.load(folder).decode(ids) from Python"
        )
    prompts = list(_prompts(options, config))
    if not prompts:
        raise UserError("no prompts: give some on the command line, by --file, or on standard input")
    ids = [model.encoder.prompt(text, where=where) for where, text in prompts]
    layout = model.layout(config.decode)
    for (where, _), row in zip(prompts, ids, strict=True):
        model.check_prompt(row, where, layout)
    if options.watch:
        for index, (_, text) in enumerate(prompts):
            _watch(model, text, ids[index], index)
        return 0
    lines = _decoded_lines(model, prompts, ids, config.decode.batch_size)
    if options.out:
        write_text(options.out, "".join(lines))
        _say(f"wrote {options.out}")
    else:
        for line in lines:
            print(line, end="", flush=True)
    return 0


def _watch(model: api.Model, text: str, ids: list[int], index: int) -> None:
    assert model.tokenizer is not None
    layout = model.layout(model.decode_defaults)
    shown = Watch(
        text, model.tokenizer.piece, mask_id=layout.mask_id, block=layout.block, stop_ids=layout.stop_ids, pause=0.05
    )
    with shown:
        for response, nfe in model.stream(ids, index=index):
            shown.step(response.tolist(), nfe)


def _prompts(options: Decode, config: Config) -> Iterator[tuple[str, str]]:
    """(where, text) of every prompt."""
    if options.prompts:
        yield from ((f"prompt {at}", text) for at, text in enumerate(options.prompts, 1))
        return
    if options.file is None and sys.stdin.isatty():
        _say("reading prompts from standard input, one a line; end with Ctrl-D")
    name = options.file or "standard input"
    content = sys.stdin.buffer.read() if options.file is None else read_bytes(options.file)
    field = recipes.resolve(config.data).prompt_field or "question"
    # Not splitlines: a prompt may hold other line separators (U+2028, form feed).
    for number, raw in enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        where = f"{name}:{number}"
        try:
            line = raw.decode().removesuffix("\r")
        except UnicodeDecodeError as error:
            raise UserError(f"{where}: not UTF-8 text ({error}); convert the file to UTF-8") from error
        if line.strip():
            yield where, _prompt_of(line, where, field) if name.endswith(".jsonl") else line


def _prompt_of(line: str, where: str, name: str) -> str:
    """The prompt field of a line of JSON."""
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not JSON ({error})") from error
    if not isinstance(row, dict) or name not in row:
        has = f"its fields are {', '.join(row)}" if isinstance(row, dict) else f"it is a {type(row).__name__}"
        raise UserError(f"{where}: no field {name!r} ({has}); set data.prompt_field")
    if not isinstance(row[name], str) or not row[name].strip():
        raise UserError(f"{where}: field {name!r} must be text, not {row[name]!r}")
    prompt: str = row[name]
    return prompt


def _decoded_lines(model: api.Model, prompts: list[tuple[str, str]], ids: list[list[int]], size: int) -> Iterator[str]:
    assert model.tokenizer is not None
    size = min(size, len(ids))
    for at in range(0, len(ids), size):
        part = ids[at : at + size]
        found = model.decode(filled(part, size), return_steps=True, first_index=at)
        assert isinstance(found, api.Decoded)
        for row in range(len(part)):
            text_ids = model.text_ids(found.ids[row])
            answer = {
                "prompt": prompts[at + row][1],
                "response": model.tokenizer.decode(text_ids),
                "tokens": len(text_ids),
                "nfe": int(found.nfe[row]),
            }
            yield json.dumps(answer, ensure_ascii=False) + "\n"


def evaluate(options: Evaluate, config: Config) -> int:
    """Scores a checkpoint and writes problems.jsonl and summary.json."""
    check_vacant(options.out, marker="summary.json")
    check_writable(as_path(options.out).parent)
    model = loading.load(options.checkpoint, base=options.base, step=options.step)
    prepared = open_prepared(config.data.prepared)
    setup.check_data(config, prepared)
    weights.check_vocabulary(model.arch, prepared, options.checkpoint)
    wiring.check_decoding(config.canvas, config.decode, model.arch)
    settings = config.evaluate
    source = prepared.records(settings.split)
    count = len(source) if settings.problems is None else min(settings.problems, len(source))
    if not count:
        raise UserError(f"{config.data.prepared} has no {settings.split} records to score")
    records = [source[index] for index in range(count)]
    if settings.compare:
        _check_comparable(settings.compare, records, settings.grader)
    evaluator = runner.Evaluator(
        model.net, config.canvas, prepared.encoder, config.decode, settings.grader, settings.nelbo_samples
    )
    begin = time.perf_counter()
    solved = evaluator.solve(model.params, records, lambda done: _say(f"decoded {done:,} of {count:,}"))
    bound = None
    if settings.nelbo:
        bound = evaluator.bound(model.params, records[: settings.nelbo_rows])
    dropped = sum(prepared.manifest.splits[settings.split]["dropped"].values())
    about = {
        "checkpoint": options.checkpoint,
        "split": settings.split,
        "problems": count,
        "dropped_in_preparation": dropped,
        "grader": settings.grader,
        "decode": dataclasses.asdict(config.decode),
        "canvas": dataclasses.asdict(config.canvas),
        "devices": [str(device) for device in jax.devices()],
    }
    result = runner.summary(solved, bound, about)
    with new_folder(options.out, marker="summary.json") as folder:
        (folder / "problems.jsonl").write_text(problems.dump(solved.rows), encoding="utf-8")
        if settings.compare:
            test = statistics.compare(settings.compare, folder / "problems.jsonl")
            result["compared_with"] = {"file": settings.compare, **test._asdict()}
        (folder / "summary.json").write_text(json.dumps(result, indent=1) + "\n")
    _print_evaluation(options, solved, bound, settings.grader, time.perf_counter() - begin)
    if dropped:
        print(
            f"  note: {dropped:,} {settings.split} records were dropped in preparation and are not among the problems"
        )
    if settings.compare:
        print(f"against {settings.compare}: {test}")
    return 0


def _check_comparable(path: str, records: Sequence[Record], grader: str) -> None:
    """What ``statistics.compare`` would refuse, said before the work and not after it."""
    earlier = problems.read(path)
    index = {record.index: record for record in records}
    if earlier.keys() != index.keys():
        raise UserError(
            f"evaluate.compare: {path} holds {len(earlier)} problems, this evaluation has {len(index)}, and they are "
            "not the same ones: set evaluate.split and evaluate.problems as they were"
        )
    for at, problem in earlier.items():
        if problem.grader != grader:
            raise UserError(
                f"evaluate.compare: {problem.where} was graded by {problem.grader}: set evaluate.grader to it"
            )
        if problem.prompt not in (None, index[at].prompt):
            raise UserError(f"evaluate.compare: {problem.where} asks another question than this data's problem {at}")


def _print_evaluation(
    options: Evaluate, solved: runner.Solved, bound: runner.Bound | None, grader: str, seconds: float
) -> None:
    print(f"{options.checkpoint}: Pass@1 {solved.pass_at_1}, grader {grader}")
    print(
        f"  {solved.nfe:.1f} forward passes a problem, {solved.tokens_per_forward:.2f} tokens per forward, "
        f"{solved.tokens_per_second:,.0f} text tokens/s (prompts not counted); {seconds:.1f} s in all"
    )
    if bound is not None:
        how = "exact" if bound.exact else "Monte Carlo"
        print(f"  NELBO ({how}): {bound.per_text_token} nats per text token, {bound.per_sequence} per sequence")
    print(f"  problems and summary in {options.out}")


def export(options: Export, config: Config) -> int:
    """Exports, re-imports and compares."""
    if options.format == "adapter":
        if options.dtype is not None:
            raise UserError("format adapter keeps float32: leave out --dtype")
        difference = loading.load(options.checkpoint, base=options.base, step=options.step).save_adapter(options.out)
    else:
        # Merging needs the base as it is, whatever the adapters were trained on.
        is_int8 = run_folder.is_run(options.checkpoint) and run_folder.open_run(options.checkpoint).base is not None
        model = loading.load(
            options.checkpoint, base=options.base, quantize="none" if is_int8 else None, step=options.step
        )
        difference = model.save(options.out, options.dtype)
    size = folder_bytes(options.out)
    print(f"wrote {options.out} ({size / 1e6:.1f} MB); read back: largest difference of any logit {difference:.3g}")
    return 0


def plan(options: Plan, config: Config) -> int:
    """Plans a run; the exit code is 0 whether it fits or not: the answer is the result."""
    if options.tries < 0:
        raise UserError(f"tries is {options.tries}: it must be 0 or more")
    if options.json:
        check_absent(options.json)
    found = planning.run(
        config,
        options.topology,
        model_config=options.model_config,
        decoder=options.decoder,
        tries=options.tries,
        say=_say,
    )
    plan_report.show(Console(), found)
    if options.json:
        write_text(options.json, json.dumps(found, indent=1) + "\n")
        _say(f"wrote {options.json}")
    return 0
