"""``jaxblock chat``: talks with a checkpoint, in a terminal or over a pipe."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import shlex
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from jaxblock.commands import say
from jaxblock.config.config import Config
from jaxblock.config.yaml import to_tree
from jaxblock.diffusion.config import CanvasConfig
from jaxblock.diffusion.decoding.config import DecodeConfig
from jaxblock.errors import UserError, printable
from jaxblock.models.config import Checkpoint

if TYPE_CHECKING:
    from jaxblock.chat import Chat

HELP = """\
/set NAME VALUE ...  changes settings of decode or canvas, as in /set decode.rule confidence_threshold decode.threshold 0.8
/set                 shows the settings of decode
/system TEXT         puts a system message before the conversation; without TEXT, takes it away
/reset               forgets the conversation; system message and settings stay
/help                shows this
/quit                ends; so does the end of the input (Ctrl-D)
//TEXT               is the message /TEXT
Ctrl-C stops an answer; what there is of it stays in the conversation."""


@dataclass(frozen=True)
class Options:
    """Answers messages one after the other, each with the turns before it: typed in a terminal, or one a line on standard input."""

    checkpoint: str
    """A run folder, a Hugging Face folder (or hub id), or a folder of PEFT adapters."""
    config: str | None = None
    """YAML file of sections; without one the run's own config is used. Flags override it."""
    system: str | None = None
    """The system message; None for the one that the checkpoint was trained with, if any."""
    base: str | None = None
    """The folder of the weights that adapters belong to; None for the one used in training."""
    step: Checkpoint = "latest"
    """The checkpoint of a run: the newest, the best by its `train.keep_best`, or that of a step."""
    canvas: CanvasConfig = field(default_factory=CanvasConfig)
    decode: DecodeConfig = field(default_factory=DecodeConfig)


def run(options: Options, config: Config) -> int:
    """Answers messages until the input ends."""
    from jaxblock import loading
    from jaxblock.chat import Chat
    from jaxblock.diffusion.decoding.rules import unused_steps
    from jaxblock.parallel import processes

    _, count = processes.join_group()
    if count > 1:
        raise UserError(
            "several processes cannot share standard input: chat with one process, or give prompts to decode --file"
        )
    if sys.stdin is None:  # the caller closed it (`<&-`)
        raise UserError("standard input is closed, so there are no messages: leave it open, or give prompts to decode")
    model = dataclasses.replace(
        loading.load(options.checkpoint, base=options.base, step=options.step, mesh="all"),
        canvas=config.canvas,
        decode_defaults=config.decode,
    )
    for note in unused_steps(config.decode):
        say(f"note: {note}")
    chat = Chat(model, lambda note: say(f"note: {note}"), options.system)
    for line in _typed() if sys.stdin.isatty() else _piped():
        try:
            if not _one_line(chat, line):
                break
        except UserError as error:
            say(f"jaxblock: {error}")
    return 0


def _typed() -> Iterator[str]:
    """Yields the lines that are typed in a terminal, with editing and history where Python has them."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 (input() uses it)
    say("/help lists the commands, Ctrl-D ends")
    mark = "> " if sys.stdout.isatty() else ""
    while True:
        try:
            yield input(mark)
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print()
            say("/quit or Ctrl-D ends")
        except UnicodeDecodeError as error:
            say(f"jaxblock: what was typed is not UTF-8 text ({error}): it is not answered")


def _piped() -> Iterator[str]:
    """Yields the lines of standard input; one that is not UTF-8 is named and left out."""
    for number, raw in enumerate(sys.stdin.buffer, 1):
        content = raw.removeprefix(b"\xef\xbb\xbf") if number == 1 else raw
        try:
            yield content.decode().removesuffix("\n").removesuffix("\r")
        except UnicodeDecodeError as error:
            say(f"jaxblock: standard input:{number}: not UTF-8 text ({error}): it is not answered")


def _one_line(chat: Chat, line: str) -> bool:
    """Does what a line asks for: a command, or a message to answer. Returns whether the session goes on."""
    if not line.strip():
        return True
    if not line.startswith("/") or line.startswith("//"):
        _show_answer(chat, line[1:] if line.startswith("//") else line)
        return True
    name, _, rest = line.strip().partition(" ")
    if name == "/quit":
        return False
    if name not in _COMMANDS:
        near = difflib.get_close_matches(name, [*_COMMANDS, "/quit"], n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise UserError(
            f"unknown command {name[:40]}; {hint}/help lists the commands; to say it to the model, write /{line[:40]}"
        )
    _COMMANDS[name](chat, rest.strip())
    return True


def _show_answer(chat: Chat, text: str) -> None:
    """Prints an answer while it is decoded, and a line break after it; without control characters in a terminal. Ctrl-C stops it."""
    try:
        with contextlib.closing(chat.answer(text)) as pieces:
            for piece in pieces:
                print(printable(piece.expandtabs(4)) if sys.stdout.isatty() else piece, end="", flush=True)
    except KeyboardInterrupt:
        print(flush=True)
        say("stopped")
        return
    print(flush=True)


def _set(chat: Chat, rest: str) -> None:
    """Changes settings, or shows them."""
    from jaxblock.config.yaml import value_of
    from jaxblock.diffusion.decoding.rules import unused_steps

    try:
        words = shlex.split(rest)
    except ValueError as error:
        raise UserError(f"/set {rest[:80]}: {error}") from error
    if len(words) % 2:
        raise UserError(
            f"/set takes names and values in pairs, as in /set decode.threshold 0.9; {words[-1][:80]!r} stands alone"
        )
    if not words:
        for name, value in to_tree(chat.model.decode_defaults).items():
            say(f"decode.{name} {'null' if value is None else value}")
        return
    names = [name.removeprefix("--") for name in words[::2]]
    if len(set(names)) < len(names):
        raise UserError("/set gives a name twice: give it once")
    chat.set_fields(dict(zip(names, map(value_of, words[1::2]), strict=True)))
    for note in unused_steps(chat.model.decode_defaults):
        say(f"note: {note}")


def _system(chat: Chat, rest: str) -> None:
    """Sets the system message, or takes it away."""
    chat.set_system(rest or None)
    say("the system message is set" if rest else "there is no system message but what the checkpoint was trained with")


def _reset(chat: Chat, rest: str) -> None:
    """Removes all earlier turns, so that the next message begins a new conversation."""
    if rest:
        raise UserError(f"/reset takes nothing after it, not {rest[:80]!r}")
    chat.reset()
    say("the conversation begins anew")


_COMMANDS: dict[str, Callable[[Chat, str], None]] = {
    "/set": _set,
    "/system": _system,
    "/reset": _reset,
    "/help": lambda chat, rest: say(HELP),
}
