"""``jaxblock harness``: runs tasks of lm-evaluation-harness on a checkpoint."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import yaml

from jaxblock.commands import say
from jaxblock.config.config import Config
from jaxblock.diffusion.config import CanvasConfig
from jaxblock.diffusion.decoding.config import DecodeConfig
from jaxblock.errors import UserError, first_line, install_command, shown
from jaxblock.io.files import check_writable
from jaxblock.io.folders import check_vacant, new_folder
from jaxblock.io.json_text import parse_json
from jaxblock.io.paths import as_path
from jaxblock.models.config import Checkpoint

if TYPE_CHECKING:
    from jaxblock.model import Model

BOOTSTRAPS = 1_000
"""The resamples of which lm-eval makes the standard error of a metric that is no mean."""


@dataclass(frozen=True)
class Options:
    """Runs tasks of lm-evaluation-harness on a checkpoint: answers by the blockwise decoder, likelihoods by the NELBO."""

    checkpoint: str
    """A run folder, a Hugging Face folder (or hub id), or a folder of PEFT adapters."""
    tasks: tuple[str, ...]
    """The tasks: names, patterns (`mmlu_*`) or YAML files."""
    include_path: str | None = None
    """A folder of task files of your own."""
    num_fewshot: int | None = None
    """The number of examples in each prompt; None for the tasks' own."""
    limit: float | None = None
    """The number of documents of each task, from the first one on, or below 1 their share; None for all."""
    apply_chat_template: bool = False
    """Whether prompts are conversations in the checkpoint's chat template; else the tasks' texts are shown as they are."""
    fewshot_as_multiturn: bool = True
    """Whether, in a chat template, each example is a turn of the user and one of the assistant; else all are in one user's turn."""
    system_instruction: str | None = None
    """The system message, or in bare texts the text before everything else."""
    add_bos_token: bool | None = None
    """Whether bare texts begin with the beginning-of-sequence token; None for what the tokenizer's settings say."""
    gen_kwargs: str | None = None
    """Replaces the tasks' generation_kwargs: `temperature=0.7,do_sample=true`, or a JSON object."""
    nelbo_samples: int | None = None
    """The masked sets drawn per block of a text to be scored, at least 2; None for as many as a block has positions. A block that
    has no more sets than this is exact."""
    out: str | None = None
    """Folder for results.json and samples_TASK.jsonl; an existing one is refused, unless `overwrite` is set."""
    overwrite: bool = False
    """Whether to replace existing results, once the new ones are whole."""
    confirm_run_unsafe_code: bool = False
    """Whether tasks may run the code that the network writes, on this machine."""
    config: str | None = None
    """YAML file of sections; without one the run's own config is used. Flags override it."""
    base: str | None = None
    """The folder of the weights that adapters belong to; None for the one used in training."""
    step: Checkpoint = "latest"
    """The checkpoint of a run: the newest, the best by its `train.keep_best`, or that of a step."""
    canvas: CanvasConfig = field(default_factory=CanvasConfig)
    decode: DecodeConfig = field(default_factory=DecodeConfig)


def run(options: Options, config: Config) -> int:
    """Runs the tasks, writes results and samples, and prints lm-eval's table."""
    gen_kwargs = _checked_gen_kwargs(options)
    os.environ["DISABLE_MULTIPROC"] = "1"  # lm-eval would fork, which may hang a process that has JAX's threads
    try:
        import lm_eval
    except ImportError as error:
        raise UserError(
            f"harness needs lm-evaluation-harness ({first_line(error)}): {install_command('jaxblock[harness]')}"
        ) from error
    from jaxblock import loading
    from jaxblock.diffusion.decoding.rules import unused_steps
    from jaxblock.harness import results as harness_results
    from jaxblock.harness.language_model import HarnessModel
    from jaxblock.harness.tasks import all_tasks, asks_for_greedy, explained_run, load_tasks
    from jaxblock.parallel import processes

    process, _ = processes.join_group()
    tell: Callable[[str], None] = say if process == 0 else lambda line: None
    if options.out:
        check_vacant(options.out, marker=harness_results.MARKER, overwrite=options.overwrite)
        if process == 0:
            check_writable(as_path(options.out).parent)
    loading.check_there(options.checkpoint, options.base)  # reading tasks takes minutes, and may download their data
    loaded = load_tasks(options.tasks, options.include_path, allow_code=options.confirm_run_unsafe_code, say=tell)
    tasks = all_tasks(loaded)
    if options.out:
        harness_results.sample_files(task.task_name for task in tasks)
    model = _model(options, config)
    fixed = [task.task_name for task in tasks if task.get_config("num_fewshot") == 0]
    for note in (*unused_steps(config.decode), *_notes(options, fixed, trained_on_template=model.recorded)):
        tell(f"note: {note}")
    lm = HarnessModel(
        model,
        nelbo_samples=options.nelbo_samples,
        add_bos_token=options.add_bos_token,
        not_greedy=[task.task_name for task in tasks if not asks_for_greedy(task)],
        say=tell,
    )
    with explained_run(), contextlib.redirect_stdout(sys.stderr), _our_commit():
        results = lm_eval.simple_evaluate(
            model=lm,
            tasks=loaded,
            num_fewshot=options.num_fewshot,
            limit=options.limit,
            apply_chat_template=options.apply_chat_template,
            fewshot_as_multiturn=options.fewshot_as_multiturn,
            system_instruction=options.system_instruction,
            gen_kwargs=gen_kwargs,
            bootstrap_iters=BOOTSTRAPS,
            confirm_run_unsafe_code=options.confirm_run_unsafe_code,
        )
    if process > 0:  # one process speaks for all
        return 0
    harness_results.complete(results, lm)
    if options.out:
        with new_folder(options.out, marker=harness_results.MARKER, overwrite=options.overwrite) as folder:
            harness_results.write_results(folder, results)
    print(harness_results.for_people(results))
    if options.out:
        print(f"results and samples in {options.out}")
    return 0


@contextlib.contextmanager
def _our_commit() -> Iterator[None]:
    """Lets results name the commit of jaxblock; lm-eval asks git about the current folder, which complains outside a repository."""
    from lm_eval import evaluator

    from jaxblock.training.versions import running_versions

    before = evaluator.get_git_commit_hash
    evaluator.get_git_commit_hash = lambda: running_versions().get("commit")
    try:
        yield
    finally:
        evaluator.get_git_commit_hash = before


def _model(options: Options, config: Config) -> Model:
    """Loads the checkpoint, with the canvas and the decoder's settings of the config."""
    from jaxblock import loading
    from jaxblock.diffusion import layouts

    model = loading.load(options.checkpoint, base=options.base, step=options.step, mesh="all")
    layouts.check_decoding(config.canvas, config.decode, model.arch)
    return dataclasses.replace(model, canvas=config.canvas, decode_defaults=config.decode)


def _checked_gen_kwargs(options: Options) -> dict[str, Any] | None:
    """Checks the options that need no model, and returns ``gen_kwargs`` as values.

    Raises:
        UserError: an option has a value that it does not take, or no effect.
    """
    from jaxblock.harness import bounds

    if options.num_fewshot is not None and options.num_fewshot < 0:
        raise UserError(f"--num_fewshot is {options.num_fewshot}: it must be 0 or more")
    bounds.check_samples(options.nelbo_samples)
    if options.limit is not None and not (
        0 < options.limit < 1 or options.limit >= 1 and options.limit == int(options.limit)
    ):
        raise UserError(f"--limit is {options.limit:g}: it must be a number of documents, or a share below 1")
    if not options.fewshot_as_multiturn and not options.apply_chat_template:
        raise UserError(
            "--no_fewshot_as_multiturn has no effect without --apply_chat_template: leave it out, or give both"
        )
    if options.apply_chat_template and options.add_bos_token is not None:
        raise UserError(
            "--add_bos_token has no effect with --apply_chat_template, which writes the token itself: leave it out"
        )
    text = options.gen_kwargs
    if text is None:
        return None
    try:
        found = parse_json(text) if text.lstrip().startswith("{") else _pairs(text)
    except (ValueError, AttributeError, RecursionError, yaml.YAMLError) as error:  # `!!int x`, [[[[... without end
        raise UserError(
            f"--gen_kwargs {shown(text)} cannot be read ({first_line(error)}): write temperature=0.7,do_sample=true, or a JSON object"
        ) from error
    return dict(found)


def _pairs(text: str) -> dict[str, Any]:
    """Returns the values of a text such as ``temperature=0.7,do_sample=true``; raises ValueError where a name is given twice."""
    parts = [part.partition("=") for part in text.split(",")]
    wrong = next((name for name, equals, _ in parts if not equals or not name.strip()), None)
    if wrong is not None:
        raise ValueError(f"{wrong!r} has no name or no value")
    names = [name.strip() for name, _, _ in parts]
    twice = next((name for at, name in enumerate(names) if name in names[:at]), None)
    if twice is not None:
        raise ValueError(f"{twice!r} is given twice; keep one of them")
    return {name: yaml.safe_load(value) for name, (_, _, value) in zip(names, parts, strict=True)}


def _notes(options: Options, fixed: Sequence[str], *, trained_on_template: bool) -> Iterator[str]:
    """Yields what a user may not expect.

    Args:
        options: the options.
        fixed: the tasks whose files set ``num_fewshot`` to 0, which lm-eval does not change.
        trained_on_template: whether the checkpoint records the template that it was trained with.
    """
    if options.num_fewshot and fixed:
        yield f"--num_fewshot is not used by {', '.join(fixed[:5])}: the task's file sets it to 0"
    if trained_on_template and not options.apply_chat_template:
        yield (
            "the network was trained on prompts in its chat template, and is shown the tasks' bare texts; --apply_chat_template "
            "puts them into the template"
        )
