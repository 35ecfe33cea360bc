"""``jaxblock evaluate``: scores a checkpoint on prepared problems."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from jaxblock.commands import say
from jaxblock.commands.unused import unused_flags
from jaxblock.config.config import Config
from jaxblock.data.config import DataConfig
from jaxblock.diffusion.config import CanvasConfig
from jaxblock.diffusion.decoding.config import DecodeConfig
from jaxblock.errors import UserError
from jaxblock.evaluation.config import EvaluateConfig
from jaxblock.io.files import check_writable
from jaxblock.io.folders import check_vacant, new_folder
from jaxblock.io.paths import as_path
from jaxblock.models.config import Checkpoint

if TYPE_CHECKING:
    from jaxblock.data.store.prepared_folder import Prepared
    from jaxblock.data.store.records import Record
    from jaxblock.evaluation.graders import Grader
    from jaxblock.evaluation.results import NelboBound, Solved
    from jaxblock.model import Model


@dataclass(frozen=True)
class Options:
    """Scores a checkpoint: Pass@1 with its interval, costs, NELBO; compares it with an earlier evaluation."""

    checkpoint: str
    """A run folder, a Hugging Face folder (or hub id), or a folder of PEFT adapters."""
    out: str
    """Folder for problems.jsonl and summary.json; an existing one is refused, unless `overwrite` is set."""
    overwrite: bool = False
    """Whether to replace an existing evaluation, once the new one is whole."""
    config: str | None = None
    """YAML file of sections, or the name of a preset; without one the run's own config is used. Flags override it."""
    base: str | None = None
    """The folder of the weights that adapters belong to; None for the one used in training."""
    step: Checkpoint = "latest"
    """The checkpoint of a run: the newest, the best by its `train.keep_best`, or that of a step."""
    data: DataConfig = field(default_factory=DataConfig)
    canvas: CanvasConfig = field(default_factory=CanvasConfig)
    decode: DecodeConfig = field(default_factory=DecodeConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)


def run(options: Options, config: Config) -> int:
    """Scores the checkpoint, writes problems.jsonl and summary.json, and prints the summary."""
    from jaxblock import loading
    from jaxblock.data.store.prepared_folder import open_prepared
    from jaxblock.diffusion.decoding.rules import unused_steps
    from jaxblock.evaluation.comparison import compare_evaluations
    from jaxblock.evaluation.graders import find_grader
    from jaxblock.evaluation.problems import format_problems
    from jaxblock.evaluation.results import summarise_evaluation
    from jaxblock.evaluation.runner import Evaluator
    from jaxblock.parallel import processes
    from jaxblock.parallel.rows import on_mesh_of

    process, _ = processes.join_group()
    for note in unused_steps(config.decode) if process == 0 else ():
        say(f"note: {note}")
    inputs = (config.evaluate.compare, options.checkpoint, config.data.prepared)
    check_vacant(options.out, marker="summary.json", overwrite=options.overwrite, inputs=inputs)
    if process == 0:
        check_writable(as_path(options.out).parent)
    grader = find_grader(config.evaluate.grader)
    prepared = open_prepared(config.data.prepared, verify=config.data.verify)
    for note in unused_flags("evaluate", options, config, prepared.manifest) if process == 0 else ():
        say(f"note: {note}")
    prepared.check_canvas(config.canvas)
    settings = config.evaluate
    source = prepared.records(settings.split)
    count = len(source) if settings.problems is None else min(settings.problems, len(source))
    if not count:
        raise UserError(f"{config.data.prepared} has no {settings.split} records to score")
    records = [source[index] for index in range(count)]
    if settings.compare:
        _check_comparable(settings.compare, records, grader)
    model = loading.load(options.checkpoint, base=options.base, step=options.step, mesh="all")
    _check_fit(options, config, model, prepared)
    evaluator = Evaluator(model.net, config.canvas, prepared.encoder, config.decode, grader, settings.nelbo_samples)
    begin = time.perf_counter()
    progress = (lambda done: say(f"decoded {done:,} of {count:,}")) if process == 0 else (lambda done: None)
    with on_mesh_of(model.params):
        solved = evaluator.solve(model.params, records, progress)
        bound = evaluator.estimate_nelbo(model.params, records[: settings.nelbo_rows]) if settings.nelbo else None
    if process > 0:  # one process speaks for all
        return 0
    result = summarise_evaluation(solved, bound, _about(options, config, model, prepared, grader, count))
    with new_folder(options.out, marker="summary.json", overwrite=options.overwrite) as folder:
        (folder / "problems.jsonl").write_text(format_problems(solved.rows), encoding="utf-8")
        if settings.compare:
            test = compare_evaluations(settings.compare, folder / "problems.jsonl")
            result["compared_with"] = {"file": settings.compare, **test._asdict()}
        (folder / "summary.json").write_text(json.dumps(result, indent=1) + "\n")
    _print_summary(options, solved, bound, settings.grader, time.perf_counter() - begin)
    if dropped := result["dropped_in_preparation"]:
        print(
            f"  note: {dropped:,} {settings.split} records were dropped in preparation and are not among the problems"
        )
    if settings.compare:
        print(f"A is {settings.compare}, B is {options.out}/problems.jsonl: {test}")
    return 0


def _check_fit(options: Options, config: Config, model: Model, prepared: Prepared) -> None:
    """Raises UserError, before the work begins, where the checkpoint does not fit the data or the decoder's settings."""
    from jaxblock.data.store.same_text import CheckpointText, check_same_text
    from jaxblock.diffusion import layouts
    from jaxblock.training import weights

    weights.check_vocabulary(model.arch, prepared, options.checkpoint)
    if model.tokenizer is not None:
        text = CheckpointText(options.checkpoint, model.tokenizer, model.encoder, model.recorded)
        check_same_text(text, prepared, allow_other_template=config.data.allow_other_template)
    layouts.check_decoding(config.canvas, config.decode, model.arch)


def _check_comparable(path: str, records: Sequence[Record], grader: Grader) -> None:
    """Raises UserError, before the work begins, where ``compare_evaluations`` would raise it at the end."""
    from jaxblock.evaluation.problems import read_problems

    earlier = read_problems(path)
    index = {record.index: record for record in records}
    if earlier.keys() != index.keys():
        raise UserError(
            f"evaluate.compare: {path} holds {len(earlier)} problems, this evaluation has {len(index)}, and they are "
            "not the same ones: set evaluate.split and evaluate.problems as they were"
        )
    for at, problem in earlier.items():
        if problem.grader != grader.name:
            raise UserError(
                f"evaluate.compare: {problem.where} was graded by {problem.grader}: set evaluate.grader to it"
            )
        if problem.version != grader.version:
            raise UserError(
                f"evaluate.compare: {problem.where} was graded by {problem.graded_by}, not by {grader.version}: scores of "
                "two versions cannot be compared; evaluate the earlier checkpoint again"
            )
        if problem.prompt not in (None, index[at].prompt):
            raise UserError(f"evaluate.compare: {problem.where} asks another question than this data's problem {at}")
        if problem.reference not in (None, index[at].response):
            raise UserError(f"evaluate.compare: {problem.where} has another right answer than this data's problem {at}")


def _about(
    options: Options, config: Config, model: Model, prepared: Prepared, grader: Grader, count: int
) -> dict[str, object]:
    """Describes what was evaluated and how, for summary.json."""
    import jax

    split = config.evaluate.split
    source = prepared.manifest.inputs.get(split, {})
    files = [file["path"] for file in source.get("files", [])]
    return {
        "checkpoint": options.checkpoint,
        "step": model.step,
        "weights": model.weights_fingerprint(),
        "split": split,
        "source": files or source.get("path"),
        "problems": count,
        "dropped_in_preparation": sum(prepared.manifest.splits[split]["dropped"].values()),
        "grader": grader.name,
        "grader_version": grader.version,
        "decode": dataclasses.asdict(config.decode),
        "canvas": dataclasses.asdict(config.canvas),
        "devices": [str(device) for device in jax.devices()],
    }


def _print_summary(options: Options, solved: Solved, bound: NelboBound | None, grader: str, seconds: float) -> None:
    """Prints Pass@1, the costs and the NELBO."""
    print(f"{options.checkpoint}: Pass@1 {solved.pass_at_1}, grader {grader}")
    print(
        f"  {solved.nfe:.1f} forward passes a problem, {solved.tokens_per_forward:.2f} tokens per forward, "
        f"{solved.tokens_per_second:,.0f} text tokens/s (prompts not counted); {seconds:.1f} s in all"
    )
    print(f"  {solved.costs}")
    if solved.undecided:
        print(
            f"  note: {solved.undecided:,} answers could not be compared as mathematics (too long, or not within the time "
            "limit) and count as wrong; problems.jsonl says which"
        )
    if bound is not None:
        how = "exact" if bound.exact else "Monte Carlo"
        print(f"  NELBO ({how}): {bound.per_text_token} nats per text token, {bound.per_sequence} per sequence")
    print(f"  problems and summary in {options.out}")
