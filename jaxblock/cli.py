"""The command line: parse, call, print. ``jaxblock VERB --config FILE --section.field value``."""

from __future__ import annotations

import difflib
import logging
import os
import sys
import traceback
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from typing import Annotated, Any, Literal

import tyro

from jaxblock.config import files as config_io
from jaxblock.config.config import Config
from jaxblock.data.config import DataConfig
from jaxblock.diffusion.config import CanvasConfig, MethodConfig
from jaxblock.diffusion.decoding.config import DecodeConfig
from jaxblock.errors import UserError
from jaxblock.evaluation.config import EvaluateConfig
from jaxblock.models.config import LoraConfig, ModelConfig
from jaxblock.parallel import host_memory
from jaxblock.training.config import TrainConfig
from jaxblock.training.optim.config import OptimizerConfig

LOST = 134
"""Exit code where another process of the group was lost; the abort of JAX's own runtime gives the same."""


@dataclass(frozen=True)
class Prepare:
    """Turns text records into token records: tokenizer, chat template, length checks, ArrayRecord, manifest."""

    config: str | None = None
    """YAML file of sections; flags override it."""
    data: DataConfig = field(default_factory=DataConfig)
    canvas: CanvasConfig = field(default_factory=CanvasConfig)


@dataclass(frozen=True)
class Inspect:
    """Shows what training feeds the model: token kinds, the block grid, masks, and which tokens carry loss."""

    config: str | None = None
    """YAML file of sections; flags override it."""
    split: Literal["train", "validation", "test"] = "train"
    """Which prepared records."""
    records: tuple[int, ...] = (0, 1)
    """Indices of the records to show."""
    steps: int = 2
    """How many training steps' draws to show for each."""
    html: str | None = None
    """Also write one self-contained HTML file here."""
    data: DataConfig = field(default_factory=DataConfig)
    canvas: CanvasConfig = field(default_factory=CanvasConfig)
    method: MethodConfig = field(default_factory=MethodConfig)
    train: TrainConfig = field(default_factory=TrainConfig)


@dataclass(frozen=True)
class Train:
    """Trains: Blockwise SFT or classical SFT, from random weights, a run or a Hugging Face folder; resumes exactly."""

    config: str | None = None
    """YAML file of sections; flags override it."""
    data: DataConfig = field(default_factory=DataConfig)
    canvas: CanvasConfig = field(default_factory=CanvasConfig)
    method: MethodConfig = field(default_factory=MethodConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    decode: DecodeConfig = field(default_factory=DecodeConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)


@dataclass(frozen=True)
class Decode:
    """Decodes prompts block by block: from the command line, a file, or standard input (one prompt a line)."""

    checkpoint: str
    """A run folder, a Hugging Face folder (or hub id), or a folder of PEFT adapters."""
    prompts: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """Prompts; without any (and without `file`) they are read from standard input."""
    config: str | None = None
    """YAML file of sections; without one the run's own config is used. Flags override it."""
    file: str | None = None
    """Prompts: a text file (one a line), or .jsonl whose `data.prompt_field` is read."""
    out: str | None = None
    """Write JSON lines here instead of to standard output; an existing file is refused."""
    watch: bool = False
    """Show the canvas as it is filled, block by block."""
    base: str | None = None
    """Where the weights beneath adapters are; None for where they were in training."""
    step: Literal["latest", "best"] | int = "latest"
    """Which checkpoint of a run: the newest, the best by its `train.keep_best`, or that of a step."""
    data: DataConfig = field(default_factory=DataConfig)
    canvas: CanvasConfig = field(default_factory=CanvasConfig)
    decode: DecodeConfig = field(default_factory=DecodeConfig)


@dataclass(frozen=True)
class Evaluate:
    """Scores a checkpoint: Pass@1 with its interval, costs, NELBO; compares it with an earlier evaluation."""

    checkpoint: str
    """A run folder, a Hugging Face folder (or hub id), or a folder of PEFT adapters."""
    out: str
    """Folder for problems.jsonl and summary.json; an existing one is refused."""
    config: str | None = None
    """YAML file of sections; without one the run's own config is used. Flags override it."""
    base: str | None = None
    """Where the weights beneath adapters are; None for where they were in training."""
    step: Literal["latest", "best"] | int = "latest"
    """Which checkpoint of a run: the newest, the best by its `train.keep_best`, or that of a step."""
    data: DataConfig = field(default_factory=DataConfig)
    canvas: CanvasConfig = field(default_factory=CanvasConfig)
    decode: DecodeConfig = field(default_factory=DecodeConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)


@dataclass(frozen=True)
class Export:
    """Writes a checkpoint as a Hugging Face folder, or its adapters as PEFT's; reads it back and compares logits."""

    checkpoint: str
    """A run folder, a Hugging Face folder (or hub id), or a folder of PEFT adapters."""
    out: str
    """The folder to make; an existing one is refused."""
    format: Literal["merged", "adapter"] = "merged"
    """Adapters: merged into their base (a whole checkpoint), or alone in PEFT's format."""
    base: str | None = None
    """Where the weights beneath adapters are; None for where they were in training."""
    step: Literal["latest", "best"] | int = "latest"
    """Which checkpoint of a run: the newest, the best by its `train.keep_best`, or that of a step."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Type of the tensors; None keeps each one's own."""


@dataclass(frozen=True)
class Plan:
    """Says what a run needs of a topology, before it is rented: compiles the real step and decoder without any device."""

    topology: str
    """`v5e-16`, `v6e-8`, `v5p-8` (4 chips), `2xv5e-256` (two slices), `h200-1`, `h100-8`, `cpu-8`."""
    config: str | None = None
    """YAML file of sections; flags override it."""
    model_config: str | None = None
    """config.json (or a folder or run) with the network's sizes; None for those of `model.init_from`."""
    decoder: bool = True
    """Compile the decoder too."""
    tries: int = 6
    """Changes that may be compiled in search of one that fits, where the run as it is does not."""
    json: str | None = None
    """Also write the plan here, with every large collective; an existing file is refused."""
    data: DataConfig = field(default_factory=DataConfig)
    canvas: CanvasConfig = field(default_factory=CanvasConfig)
    method: MethodConfig = field(default_factory=MethodConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    decode: DecodeConfig = field(default_factory=DecodeConfig)


VERBS: dict[str, type] = {
    "prepare": Prepare,
    "inspect": Inspect,
    "train": Train,
    "decode": Decode,
    "evaluate": Evaluate,
    "export": Export,
    "plan": Plan,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one verb.

    Args:
        arguments: the command line without the program's name; None for the process's own.

    Returns:
        The exit code: 0; 2 for a mistake that the user can mend; 130 (143 for SIGTERM) for a run that was told to stop;
        134 where another process of the group was lost; 1 for a bug of ours, or a reader of our output that has gone.
        (In a process group 1, 2 and 134 end the process here.)
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    traces = "--traceback" in given
    if arguments is None:
        host_memory.keep_freed_memory()
        if not traces:
            _hush()
    short = {"--profile": "--train.profile"} if given[:1] == ["train"] else {}
    given = [short.get(argument, argument) for argument in given if argument != "--traceback"]
    if not given or given[0] in ("-h", "--help"):
        print(_overview())
        return 0 if given else 2
    if given[0] == "--version":
        import jaxblock

        print(jaxblock.__version__)
        return 0
    code = _guarded(given, traces)
    if code in (1, 2, LOST) and "jax" in sys.modules:
        from jaxblock.parallel import processes

        processes.leave(code, 0.0 if code == LOST else 15.0)
    return code


def _guarded(given: list[str], traces: bool) -> int:
    """Runs the verb; whatever goes wrong becomes a message and an exit code."""
    try:
        verb = given[0]
        if verb not in VERBS:
            raise UserError(f"unknown verb {verb!r}{_nearest_verb(verb)}")
        code = _run(verb, parse(verb, given[1:]))
        sys.stdout.flush()  # a closed pipe shows here, not while the interpreter ends
        return code
    except BrokenPipeError:
        # The reader of our output has gone (`| head`): what is still buffered goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (UserError, OSError) as error:
        if traces:
            raise
        print(f"jaxblock: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("jaxblock: stopped", file=sys.stderr)
        return 130
    except Exception as error:
        if not traces and (isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error)):
            print(
                f"jaxblock: out of memory ({str(error).splitlines()[0][:200] if str(error) else 'on the host'}). Lower "
                "train.batch_size or decode.batch_size, or set model.remat to full",
                file=sys.stderr,
            )
            return 2
        if not traces and "jax" in sys.modules and _partner_lost(error):
            print(
                "jaxblock: another process of the group has ended or cannot be reached "
                f"({str(error).splitlines()[0][:200]}): its own output says why. Start all of them again: the run goes on "
                "from its last checkpoint",
                file=sys.stderr,
            )
            return LOST
        # Not the user's mistake but ours: here the traceback is the message.
        traceback.print_exc()
        print("jaxblock: this is a bug; please report it with the lines above", file=sys.stderr)
        return 1


def _partner_lost(error: Exception) -> bool:
    from jaxblock.parallel import processes

    return processes.partner_lost(error)


def _hush() -> None:
    """Threads of libraries print tracebacks of errors that we report ourselves, in one line: they are silenced."""
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    sys.excepthook = lambda *_: None
    sys.unraisablehook = lambda _: None  # only C++ threads get there: main lets nothing through


def parse(verb: str, arguments: Sequence[str]) -> Any:
    """A verb's settings: flag > YAML file > default.

    Args:
        verb: key of ``VERBS``.
        arguments: its flags.

    Returns:
        An instance of the verb's class.

    Raises:
        UserError: the YAML file is wrong. (Wrong flags end the process with tyro's message and code 2.)
    """
    kind = VERBS[verb]
    path = _value_of("--config", arguments)
    if path is None and (checkpoint := _value_of("--checkpoint", arguments)) and verb in ("decode", "evaluate"):
        path = _config_of(checkpoint)
    base = config_io.load(path)
    sections = {f.name: getattr(base, f.name) for f in fields(Config)}
    # Not kind(...): where a verb needs a value that no YAML gives, tyro must know that it is missing, and MISSING is
    # not of the field's type.
    default: Any = object.__new__(kind)
    for entry in fields(kind):
        object.__setattr__(default, entry.name, sections[entry.name] if entry.name in sections else _default(entry))
    return tyro.cli(
        kind,
        prog=f"jaxblock {verb}",
        description=(kind.__doc__ or "") + " Precedence: flag > YAML file > default.",
        default=default,
        args=list(arguments),
        config=(tyro.conf.AvoidSubcommands,),
        use_underscores=True,
    )


def _default(entry: Any) -> Any:
    if entry.default is not MISSING:
        return entry.default
    return tyro.MISSING


def config_of(options: Any) -> Config:
    """The sections of a verb's settings, checked; sections that the verb does not have keep their defaults."""
    names = {f.name for f in fields(Config)}
    given = {f.name: getattr(options, f.name) for f in fields(options) if f.name in names}
    return config_io.validate(replace(Config(), **given), given)


def _value_of(flag: str, arguments: Sequence[str]) -> str | None:
    for at, argument in enumerate(arguments):
        if argument == flag and at + 1 < len(arguments):
            return arguments[at + 1]
        if argument.startswith(flag + "="):
            return argument.split("=", 1)[1]
    return None


def _config_of(checkpoint: str) -> str | None:
    from jaxblock.io.paths import as_path

    path = as_path(checkpoint) / "config.yaml"
    return str(path) if path.exists() else None


def _nearest_verb(verb: str) -> str:
    close = difflib.get_close_matches(verb, VERBS, n=1)
    return f"; did you mean {close[0]}?" if close else f"; verbs: {', '.join(VERBS)}"


def _overview() -> str:
    lines = ["usage: jaxblock VERB [--config FILE] [--section.field VALUE ...] [--traceback]", ""]
    lines += [f"  {name:10} {(kind.__doc__ or '').splitlines()[0]}" for name, kind in VERBS.items()]
    return "\n".join([*lines, "", "jaxblock VERB --help shows every field, its default and what it does."])


def _run(verb: str, options: Any) -> int:
    from jaxblock import verbs

    return int(getattr(verbs, verb)(options, config_of(options)))


if __name__ == "__main__":
    sys.exit(main())
