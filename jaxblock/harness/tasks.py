"""Finds the tasks of lm-evaluation-harness that a user names, and says in one line why one cannot be had."""

from __future__ import annotations

import contextlib
import difflib
import logging
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import yaml
from lm_eval.api.group import Group
from lm_eval.api.task import Task
from lm_eval.tasks import TaskManager

from jaxblock.errors import UserError, first_line


def load_tasks(
    names: Sequence[str], include_path: str | None, *, allow_code: bool, say: Callable[[str], None] = lambda line: None
) -> list[Task | Group]:
    """Loads tasks, groups and tags, with their data.

    Args:
        names: names, patterns such as ``mmlu_*``, or paths of YAML files; several may be joined by commas.
        include_path: a folder of task files; they come before lm-eval's own tasks of the same names.
        allow_code: whether tasks may run the code that the network writes.
        say: called with a line before what takes long.

    Returns:
        The tasks and groups to evaluate, each once.

    Raises:
        UserError: there is no such task, its file is wrong, its data cannot be had, or it is not for a network that reads text.
    """
    wanted = list(dict.fromkeys(name.strip() for several in names for name in several.split(",") if name.strip()))
    if not wanted:
        raise UserError("no tasks: name some with --tasks")
    if include_path is not None and not Path(include_path).is_dir():
        raise UserError(f"--include_path {include_path} is no folder: give the folder of the tasks' YAML files")
    manager = _manager(wanted, include_path, say)
    specs: list[str] = []
    for name in wanted:
        matches = [name] if _is_file(name) else manager.match_tasks([name])
        if not matches:
            raise UserError(_not_found(name, manager, include_path))
        specs += matches
    found = []
    for spec in dict.fromkeys(specs):
        with _explained(spec):
            found.append(manager.load([spec]))
    groups = {group.name: group for one in found for group in one.get("groups", {}).values()}
    tasks = {name: task for one in found for name, task in one["tasks"].items()}
    for name, task in tasks.items():
        _check(name, task, allow_code=allow_code)
    inner = {below.name for group in groups.values() for below in group.get_all_groups()}
    grouped = {task.task_name for group in groups.values() for task in group.get_all_tasks()}
    tops: list[Task | Group] = [group for name, group in groups.items() if name not in inner]
    return [*tops, *(task for name, task in tasks.items() if name not in grouped)]


def all_tasks(loaded: Sequence[Task | Group]) -> list[Task]:
    """Returns tasks and those of groups."""
    return [task for one in loaded for task in (one.get_all_tasks() if isinstance(one, Group) else [one])]


def asks_for_greedy(task: Task) -> bool:
    """Tells whether a task's metrics may ask whether a text is the greedy answer; multiple choice asks it only for exact_match."""
    config = task.config
    if config.output_type != "multiple_choice" or callable(config.process_results):
        return True
    return any(entry.get("metric") == "exact_match" for entry in config.metric_list or ())


def _manager(wanted: Sequence[str], include_path: str | None, say: Callable[[str], None]) -> TaskManager:
    """Returns what knows the tasks: those of a folder alone where they suffice, since lm-eval's own take a minute to read."""
    local = TaskManager(include_path=include_path, include_defaults=False)
    if all(_is_file(name) or name in local.all_subtasks for name in wanted):
        return local
    say("reading the list of lm-eval's own tasks")
    return TaskManager(include_path=include_path)


def _is_file(name: str) -> bool:
    return name.endswith((".yaml", ".yml")) and Path(name).is_file()


def _not_found(name: str, manager: TaskManager, include_path: str | None) -> str:
    """Returns the message about a task that does not exist."""
    if name.endswith((".yaml", ".yml")):
        return f"--tasks {name}: there is no such file"
    for path in sorted(Path(include_path).rglob("*.yaml")) if include_path else ():
        try:
            yaml.compose(path.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:  # lm-eval leaves such a file out without a word
            return f"there is no task {name!r}; {path} cannot be read: {' '.join(str(error).split())[:200]}"
    near = difflib.get_close_matches(name, manager.all_tasks, n=3)
    meant = f"; did you mean {' or '.join(near)}?" if near else ": `lm-eval ls tasks` lists them"
    here = f" in {include_path} or" if include_path else ""
    return f"there is no task {name!r}{here} in this version of lm-eval{meant}"


@contextlib.contextmanager
def _explained(spec: str) -> Iterator[None]:
    """Turns what goes wrong while a task is loaded into one line, and silences the hub's client, which tells of every try."""
    loud = logging.getLogger("huggingface_hub")
    level = loud.level
    loud.setLevel(logging.CRITICAL)
    try:
        yield
    except UserError:
        raise
    except (ConnectionError, TimeoutError) as error:
        raise UserError(
            f"task {spec}: its data (or a metric) are not on this machine, and the hub cannot be reached ({first_line(error)}). Run "
            "it once where it can, which keeps them in the cache, or name local files in the task's YAML file (dataset_kwargs: "
            "data_files)"
        ) from error
    except FileNotFoundError as error:
        raise UserError(f"task {spec}: its data or files cannot be found: {first_line(error)}") from error
    except Exception as error:  # whatever a task's file and its functions raise
        # datasets says so where another split has records; else lm-eval looks for a first one in vain.
        if isinstance(error, StopIteration) or "corresponds to no data" in str(error):
            raise UserError(
                f"task {spec}: a split of its data has no records: give it some, or leave the task out"
            ) from error
        raise UserError(f"task {spec} cannot be loaded: {type(error).__name__}: {first_line(error)}") from error
    finally:
        loud.setLevel(level)


def _check(name: str, task: Task, *, allow_code: bool) -> None:
    """Raises UserError where a task is not for a network that reads text, or would run code that nobody allowed."""
    if getattr(task, "MULTIMODAL", False):
        raise UserError(f"task {name} shows images or sounds, and the network reads text: leave it out")
    if getattr(task, "UNSAFE_CODE", False) and not allow_code:
        raise UserError(
            f"task {name} runs the code that the network writes. In a sandbox, give --confirm_run_unsafe_code (and set "
            "HF_ALLOW_CODE_EVAL=1, which the metric asks for)"
        )


@contextlib.contextmanager
def explained_run() -> Iterator[None]:
    """Turns an error of a task's own file or functions into one line; errors of this package stay as they are."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        places = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)]
        if isinstance(error, ValueError) and places[-1] == "random" and str(error).startswith("Sample larger"):
            raise UserError(
                "a task's split of examples has fewer of them than --num_fewshot (or the task's file) asks for: give a lower number"
            ) from error
        outside = next((at for at, name in enumerate(places) if name.startswith("lm_eval")), len(places))
        if any(name.startswith("jaxblock") for name in places[outside:]) or outside == len(places):
            raise
        raise UserError(
            f"a task's file, its functions or its metrics fail: {type(error).__name__}: {first_line(error)}"
        ) from error
