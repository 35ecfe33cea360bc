"""Reads the command line, runs the verb, and turns errors into messages and exit codes.

``jaxblock VERB --config FILE --section.field value``
"""

from __future__ import annotations

import difflib
import functools
import io
import itertools
import logging
import os
import sys
import traceback
import typing
import warnings
from collections.abc import Callable, Collection, Sequence
from dataclasses import fields, replace
from typing import Any, Generic, NamedTuple, TypeVar

import tyro
from tyro.constructors import ConstructorRegistry, StructConstructorSpec, StructTypeInfo

import jaxblock
from jaxblock.commands import (
    chat,
    decode,
    evaluate,
    export,
    harness,
    inspect,
    plan,
    prepare,
    presets,
    quickstart,
    report,
    say,
    study,
    train,
)
from jaxblock.config.checks import check_config
from jaxblock.config.config import Config
from jaxblock.config.not_offered import why_not_offered
from jaxblock.config.recorded import read_block
from jaxblock.config.yaml import load_config
from jaxblock.errors import EarlierVersionWarning, UserError
from jaxblock.io.paths import as_path
from jaxblock.parallel import host_memory, platforms
from jaxblock.settings import Section

LOST = 134
"""The exit code where another process of the group was lost; a process that JAX's runtime aborts has the same one."""


Options = TypeVar("Options")


class Command(NamedTuple, Generic[Options]):
    """Holds a verb's flags and the function that runs it.

    Attributes:
        options: a dataclass of its flags. Fields named as sections of ``Config`` are filled from the YAML file.
        run: the function that runs the verb: takes the options and the checked config, returns the exit code.
    """

    options: type[Options]
    run: Callable[[Options, Config], int]


VERBS: dict[str, Command[Any]] = {
    "prepare": Command(prepare.Options, prepare.run),
    "inspect": Command(inspect.Options, inspect.run),
    "train": Command(train.Options, train.run),
    "decode": Command(decode.Options, decode.run),
    "chat": Command(chat.Options, chat.run),
    "evaluate": Command(evaluate.Options, evaluate.run),
    "harness": Command(harness.Options, harness.run),
    "export": Command(export.Options, export.run),
    "plan": Command(plan.Options, plan.run),
    "report": Command(report.Options, report.run),
    "study": Command(study.Options, study.run),
    "presets": Command(presets.Options, presets.run),
    "quickstart": Command(quickstart.Options, quickstart.run),
}

_format_warning = warnings.formatwarning

_VERIFY = {"--verify": "--data.verify"}
SHORT_FLAGS = {
    "train": {"--profile": "--train.profile", **_VERIFY},
    **dict.fromkeys(("prepare", "inspect", "evaluate"), _VERIFY),
}
"""The short names of flags, by verb."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the verb that the command line names.

    Args:
        arguments: the command line without the program's name; None for the process's own.

    Returns:
        The exit code: 0 for success; 2 for an error that the user can correct; 130 (143 for SIGTERM) for a run that was
        told to stop; 134 where another process of the group was lost; 1 for a bug in jaxblock, or where the reader of
        our output has exited. In a process group, codes 1, 2 and 134 end the process here.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    traces = "--traceback" in given
    if arguments is None:
        _open_closed_streams()
        _set_up_output()
        platforms.skip_missing_tpu()
        host_memory.keep_freed_memory()
        warnings.formatwarning = _one_line_warning
        if not traces:
            _silence_threads()
    given = [argument for argument in given if argument != "--traceback"]
    if not given or given[0] in ("-h", "--help", "--help-all"):
        print(_overview())
        return 0 if given else 2
    if given[0] == "--version":
        print(jaxblock.__version__)
        return 0
    verb, *flags = given
    short = SHORT_FLAGS.get(verb, {})
    code = _run_verb(verb, [short.get(flag, flag) for flag in flags], traces)
    if code in (1, 2, LOST) and "jax" in sys.modules:
        from jaxblock.parallel import processes

        processes.leave(code, 0.0 if code == LOST else 15.0)
    return code


def _run_verb(verb: str, flags: list[str], traces: bool) -> int:
    """Runs a verb and turns errors into a message and an exit code; ``traces`` lets user errors raise instead."""
    try:
        if verb not in VERBS:
            raise UserError(f"unknown verb {verb!r}{_nearest_verb(verb)}")
        options = parse(verb, flags)
        code = VERBS[verb].run(options, config_of(options))
        if sys.stdout is not None:  # it is None where the caller closed it (`>&-`)
            sys.stdout.flush()  # a closed pipe raises here, not while the interpreter exits
        return code
    except BrokenPipeError:
        # The reader of our output has exited (`| head`): what is still buffered is discarded.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        return _complain("stopped", 130)
    except (UserError, OSError) as error:
        if traces:
            raise
        return _complain(str(error), 2)
    except Exception as error:
        return _report_exception(error, traces)


def _report_exception(error: Exception, traces: bool) -> int:
    """Prints an exception other than ``UserError``, with a traceback if it may be a bug, and returns the exit code."""
    first_line = str(error).splitlines()[0][:200] if str(error) else "on the host"
    if not traces and (isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error)):
        return _complain(
            f"out of memory ({first_line}). Lower train.batch_size or decode.batch_size, or set model.remat to full", 2
        )
    if not traces and str(error).startswith("Unable to initialize backend"):
        return _complain(f"{first_line}. JAX_PLATFORMS chooses the device: unset it, or set it to cpu, cuda or tpu", 2)
    if not traces and "jax" in sys.modules:
        from jaxblock.parallel import processes

        if processes.partner_lost(error):
            return _complain(
                f"another process of the group has ended or cannot be reached ({first_line}): its own output says why. "
                "Start all of them again: the run goes on from its last checkpoint",
                LOST,
            )
    traceback.print_exception(error)
    return _complain("this is a bug; please report it with the lines above", 1)


def _complain(text: str, code: int) -> int:
    """Prints a line to standard error and returns the exit code."""
    print(f"jaxblock: {text}", file=sys.stderr)
    return code


def _one_line_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """Returns the text of a warning: in one line where it is ours, without the place in the code that gave it."""
    if issubclass(category, EarlierVersionWarning):
        return f"jaxblock: warning: {message}\n"
    return _format_warning(message, category, filename, lineno, line)


def _open_closed_streams() -> None:
    """Connects output that the caller closed (`>&-`) to nothing.

    Else messages for a closed standard error would be printed among the results, and a file that is opened later could get its
    number, and then whatever libraries print. Standard input stays None, so that verbs that read it say so.
    """
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is not None:
            continue
        number = os.open(os.devnull, os.O_RDWR)  # the lowest that is free, so the stream's own; it stays open
        if name != "stdin":
            setattr(sys, name, open(number, "w", encoding="utf-8", closefd=False))  # noqa: SIM115


def _set_up_output() -> None:
    """Makes output UTF-8, whatever the locale: answers and pictures hold any letter; and boxes at least 20 columns wide."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8")
    if os.environ.get("COLUMNS", "").strip() in {str(width) for width in range(20)}:  # tyro's help would never end
        os.environ["COLUMNS"] = "20"


def _silence_threads() -> None:
    """Silences the tracebacks that libraries' threads print for errors that we report ourselves in one line."""
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    sys.excepthook = lambda *_: None
    sys.unraisablehook = lambda _: (
        None
    )  # main catches all of our own exceptions, so only libraries' threads call these hooks


def parse(verb: str, arguments: Sequence[str]) -> Any:
    """Reads a verb's options: a flag overrides the YAML file, and the file overrides the default.

    Args:
        verb: a key of ``VERBS``.
        arguments: the flags. Without ``--config``, the settings that the ``--checkpoint`` keeps are read instead of a YAML file.

    Returns:
        An instance of the verb's ``Options``.

    Raises:
        UserError: the YAML file is wrong. (Wrong flags end the process with tyro's message and code 2.)
    """
    kind: Any = VERBS[verb].options
    _check_given_once(kind, arguments)
    _check_places(verb, {field.name for field in fields(kind)}, arguments)
    path = _value_of("--config", arguments)
    if path is None and {"checkpoint", "config"} <= {field.name for field in fields(kind)}:
        config = _config_of(_value_of("--checkpoint", arguments))
        _check_no_code(verb, config, arguments)
    else:
        config = load_config(path)
    short = {"-h", "--help"} & set(arguments)
    more = " Only commonly set fields are shown: --help-all shows all." if short and _sections(config, kind) else ""
    order = " Precedence: flag > YAML file > default." if _sections(config, kind) else ""
    return tyro.cli(
        functools.partial(kind, **_sections(config, kind)),
        prog=f"jaxblock {verb}",
        description=f"{kind.__doc__}{order}{more}",
        args=list(itertools.starmap(_for_tyro, itertools.pairwise(("", *_with_values(arguments))))),
        config=(tyro.conf.AvoidSubcommands,),
        use_underscores=True,
        registry=_only_common_fields(verb) if short else None,
    )


def _only_common_fields(verb: str) -> ConstructorRegistry:
    """Returns what makes tyro leave out, of each section, the fields that the verb's short help does not show."""
    registry, inside = ConstructorRegistry(), set()

    @registry.struct_rule
    def without_other_fields(info: StructTypeInfo) -> StructConstructorSpec | None:
        kind: Any = info.type
        if kind in inside or not (isinstance(kind, type) and issubclass(kind, Section)):
            return None
        inside.add(kind)  # so that the next line asks for tyro's own answer
        whole = ConstructorRegistry.get_struct_spec(info)
        inside.remove(kind)
        assert isinstance(whole, StructConstructorSpec)
        return replace(whole, fields=tuple(field for field in whole.fields if field.name in kind.common(verb)))

    return registry


def _for_tyro(before: str, argument: str) -> str:
    """Returns what tyro calls an argument: it has one help, and its word for YAML's null is None."""
    if argument == "null" and before.startswith("--") and "." in before:
        return "None"
    flag, _, value = argument.partition("=")
    if value == "null" and flag.startswith("--") and "." in flag:
        return f"{flag}=None"
    return "--help" if argument == "--help-all" else argument


def _with_values(arguments: Sequence[str]) -> list[str]:
    """Gives the flag of ``model.scan_layers`` a value where it has none: it may stand alone, as a yes-or-no field's flag does."""
    flag, negated = "--model.scan_layers", "--model.no_scan_layers"
    found = []
    for argument, after in itertools.pairwise((*arguments, "--")):
        if argument == negated:
            found += [flag, "False"]
        elif argument == flag and after not in ("auto", "True", "False"):
            found += [flag, "True"]
        else:
            found.append(argument)
    return found


_NO_CHECKPOINT = {
    "train": "a run goes on from its own folder, --train.out; to begin from the weights of another, give --model.init_from",
    "plan": "give --model.init_from, or the network's sizes as --model_config",
    "prepare": "it reads text; give the tokenizer of a checkpoint as --data.tokenizer",
    "inspect": "it shows prepared data, --data.prepared, under the settings of --config",
}
"""What people who give ``--checkpoint`` to a verb without it should do instead."""


def _check_given_once(kind: Any, arguments: Sequence[str]) -> None:
    """Says which value counts of a setting that is given twice, as by a script that appends flags to its own: the last.

    Args:
        kind: the class of the verb's options.
        arguments: the flags.

    Raises:
        UserError: it is a list, whose other values would be lost, or no setting, such as ``--config``.
    """
    given: dict[str, str] = {}
    for argument, after in itertools.pairwise((*itertools.takewhile(lambda a: a != "--", arguments), "--")):
        if not argument.startswith("--"):
            continue
        flag, _, value = argument.partition("=")
        room, dot, name = flag.removeprefix("--").replace("-", "_").rpartition(".")
        name, value = name.removeprefix("no_"), value or (flag if after.startswith("--") else after)
        if (before := given.get(same := room + dot + name)) is not None:
            section = typing.get_type_hints(kind).get(room, kind)
            if not dot or "tuple" in str(typing.get_type_hints(section).get(name)):
                raise UserError(
                    f"{flag} is given twice ({before}, {value}): give it once; the values of a list follow one flag, as in "
                    "--data.train a.jsonl b.jsonl"
                )
            say(f"note: {flag} is given twice ({before}, {value}): the last counts")
        given[same] = value


def _check_places(verb: str, flags: Collection[str], arguments: Sequence[str]) -> None:
    """Raises UserError where a config file or a checkpoint is given in the wrong place, or a flag of another trainer is given."""
    for argument in arguments:
        flag = argument.split("=", 1)[0]
        why = why_not_offered(flag.removeprefix("--").rpartition(".")[2].replace("-", "_"))
        if flag.startswith("--") and why is not None:
            raise UserError(f"{flag}: {why}")
    checkpoint = _value_of("--checkpoint", arguments)
    if checkpoint is not None and verb in _NO_CHECKPOINT:
        raise UserError(f"{verb} has no --checkpoint: {_NO_CHECKPOINT[verb]}")
    for before, argument in itertools.pairwise(("", *arguments)):
        alone = not argument.startswith("-") and (not before.startswith("--") or "=" in before)
        if (
            not {"target", "tasks"} & set(flags)  # these take YAML files
            and alone
            and argument.endswith((".yaml", ".yml"))
            and ("prompts" not in flags or as_path(argument).is_file())
        ):
            raise UserError(f"{argument} has no flag before it: give a file of settings as --config {argument}")
    if arguments and "checkpoint" in flags and checkpoint is None and not arguments[0].startswith("-"):
        raise UserError(f"no --checkpoint: if {arguments[0]!r} is meant, give --checkpoint {arguments[0]}")


def _check_no_code(verb: str, config: Config, arguments: Sequence[str]) -> None:
    """Raises UserError where a checkpoint's own config names a grader to import, since the folder may be a stranger's."""
    grader = config.evaluate.grader
    if verb == "evaluate" and ":" in grader and _value_of("--evaluate.grader", arguments) is None:
        raise UserError(
            f"the checkpoint's own settings name code to run: evaluate.grader is {grader[:100]!r}. If you trust it, give it "
            "as --evaluate.grader; else name another grader"
        )


def config_of(options: Any) -> Config:
    """Returns the checked config of a verb's options; sections that the verb does not have keep their defaults."""
    for field in fields(options):
        if getattr(options, field.name) == "":
            raise UserError(f"--{field.name} is empty: give a value, or leave it out")
    sections = _sections(options, Config)
    return check_config(replace(Config(), **sections), sections)


def _sections(source: Any, target: Any) -> dict[str, Any]:
    """Returns the sections of a config that both dataclasses have, with the values of ``source``."""
    shared = {f.name for f in fields(source)} & {f.name for f in fields(target)} & {f.name for f in fields(Config)}
    return {name: getattr(source, name) for name in shared}


def _value_of(flag: str, arguments: Sequence[str]) -> str | None:
    """Returns the value of a flag on the command line; None where the flag is not given."""
    given = [argument.split("=", 1)[1] for argument in arguments if argument.startswith(flag + "=")]
    given += [value for argument, value in itertools.pairwise(arguments) if argument == flag]
    return given[0] if given else None


def _config_of(checkpoint: str | None) -> Config:
    """Returns the config that a run folder keeps, or the canvas and decoder's settings that an export records; else defaults."""
    if not checkpoint:
        return Config()
    path = as_path(checkpoint) / "config.yaml"
    if path.exists():
        return load_config(str(path))
    recorded = read_block(_downloaded(checkpoint))
    return Config() if recorded is None else Config(canvas=recorded.canvas, decode=recorded.decode)


def _downloaded(checkpoint: str) -> str:
    """Returns the local folder of a checkpoint's small files; downloads those of a hub id, which the verb will need anyway."""
    if as_path(checkpoint).exists():
        return checkpoint
    from jaxblock.io.hub import local_checkpoint  # imports the hub's client, which local folders do not need

    try:
        return local_checkpoint(checkpoint, weights=False)
    except UserError:
        return checkpoint  # the verb says what is wrong with it


def _nearest_verb(verb: str) -> str:
    """Returns the end of the message about an unknown verb: the verb that was probably meant, or all verbs."""
    close = difflib.get_close_matches(verb, VERBS, n=1)
    return f"; did you mean {close[0]}?" if close else f"; verbs: {', '.join(VERBS)}"


def _overview() -> str:
    """Returns the text of ``jaxblock --help``."""
    lines = ["usage: jaxblock VERB [--config FILE_OR_PRESET] [--section.field VALUE ...] [--traceback]", ""]
    lines += [f"  {name:10} {(verb.options.__doc__ or '').splitlines()[0]}" for name, verb in VERBS.items()]
    return "\n".join(
        [*lines, "", "jaxblock VERB --help shows the fields that are commonly set, --help-all shows every field."]
    )


if __name__ == "__main__":
    sys.exit(main())
