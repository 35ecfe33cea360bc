"""launch/tpu.sh against a stand-in gcloud: what it runs, and that arguments reach the workers as typed."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "launch" / "tpu.sh"
SLICE = ["--name", "pod", "--zone", "us-east5-a"]
BASE = ["compute", "tpus", "tpu-vm"]
HARD = [
    "--text",
    "two words",
    "it's",
    '"quoted"',
    "$HOME `id` $(id)",
    "a\\b",
    "semi;colon & pipe | *",
    "",
    "line\nbreak",
    "--x=é",
]

GCLOUD = """#!/usr/bin/env bash
python3 - "$GCLOUD_RECORD" "$@" <<'PY'
import json, sys
with open(sys.argv[1], "a") as record:
    record.write(json.dumps(sys.argv[2:]) + "\\n")
PY
for argument in "$@"; do
    if [ "$argument" = "${GCLOUD_FAILS:-nothing}" ]; then echo "${GCLOUD_ERROR:-ERROR: no capacity}" >&2; exit 7; fi
done
# Prints (and takes off) the first line of a file of answers; a line that begins with "!" goes to stderr, and fails.
answer() {
    local line
    line="$(head -n 1 "$1")"
    sed -i 1d "$1"
    case "$line" in '!'*) echo "${line#!}" >&2; exit 1 ;; *) printf '%b\\n' "$line" ;; esac
}
if [ "$4" = describe ] && [ -n "${GCLOUD_STATES:-}" ]; then answer "$GCLOUD_STATES"; fi
case "$*" in *'run: none'*) if [ -n "${GCLOUD_RUNS:-}" ]; then answer "$GCLOUD_RUNS"; fi ;; esac
if [ "$4" = scp ] && [ -n "${GCLOUD_KEEP:-}" ]; then cp "$5" "$GCLOUD_KEEP"; fi
exit 0
"""


class Desk:
    """A machine with a stand-in gcloud on PATH."""

    def __init__(self, folder: Path) -> None:
        self.record = folder / "record.jsonl"
        binaries = folder / "bin"
        binaries.mkdir()
        (binaries / "gcloud").write_text(GCLOUD)
        (binaries / "gcloud").chmod(0o755)
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("JAXBLOCK_")}
        self.environment = inherited | {
            "PATH": f"{binaries}:{os.environ['PATH']}",
            "GCLOUD_RECORD": str(self.record),
            "TMPDIR": str(folder),
        }

    def tpu(self, *arguments: str, typed: str = "", **variables: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [SCRIPT, *arguments], input=typed, capture_output=True, text=True, env=self.environment | variables
        )

    @property
    def calls(self) -> list[list[str]]:
        return [json.loads(line) for line in self.record.read_text().splitlines()] if self.record.exists() else []


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(tmp_path)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--type", "v6e-8"], ["--accelerator-type=v6e-8", "--version=v2-alpha-tpuv6e"]),
        (
            ["--type", "v5e-16", "--spot"],
            ["--accelerator-type=v5litepod-16", "--version=v2-alpha-tpuv5-lite", "--spot"],
        ),
        (["--type", "v4-8", "--version", "mine"], ["--accelerator-type=v4-8", "--version=mine"]),
    ],
)
def test_create(desk: Desk, options: list[str], expected: list[str]) -> None:
    assert desk.tpu("create", *SLICE, *options).returncode == 0
    assert desk.calls == [[*BASE, "create", "pod", *expected, "--zone=us-east5-a"]]


def test_names_come_from_the_environment_and_flags_win(desk: Desk) -> None:
    variables = {"JAXBLOCK_TPU_NAME": "env", "JAXBLOCK_TPU_ZONE": "z", "JAXBLOCK_TPU_PROJECT": "my project"}
    assert desk.tpu("delete", "--yes", "--name", "flag", **variables).returncode == 0
    assert desk.calls == [[*BASE, "delete", "flag", "--quiet", "--zone=z", "--project=my project"]]


def worker(desk: Desk, home: Path) -> dict[str, str]:
    """A worker's home with a `jaxblock` that writes down its arguments and its environment, then waits for a file."""
    program = home / "jaxblock" / ".venv" / "bin" / "jaxblock"
    program.parent.mkdir(parents=True)
    (home / "jaxblock" / "logs").mkdir()
    program.write_text(
        "#!/usr/bin/env python3\nimport json, os, sys\n"
        "print(json.dumps([sys.argv[1:], os.environ['JAXBLOCK_DISTRIBUTED'], os.getcwd()]), flush=True)\n"
        "open(os.environ['HOME'] + '/end').read()\n"
    )
    program.chmod(0o755)
    os.mkfifo(home / "end")
    return desk.environment | {"HOME": str(home)}


def test_arguments_reach_the_worker_as_typed_and_one_run_holds_the_tpu(desk: Desk, tmp_path: Path) -> None:
    assert desk.tpu("run", *SLICE, "--", "jaxblock", *HARD).returncode == 0
    call = desk.calls[0]
    assert call[:6] == [*BASE, "ssh", "pod", "--worker=all"] and call[7:] == ["--zone=us-east5-a"]
    # gcloud splits the command at spaces, and ssh joins it again.
    remote = " ".join(call[6].removeprefix("--command=").split(" "))
    home = tmp_path / "home"
    environment = worker(desk, home)

    def ssh(command: str) -> subprocess.CompletedProcess[str]:
        # sh as well as bash may be the worker's login shell.
        return subprocess.run(["sh", "-c", command], env=environment, cwd=home, capture_output=True, text=True)

    started = ssh(remote)
    assert started.returncode == 0 and "started process" in started.stdout, started.stderr
    second = ssh(remote)
    assert second.returncode == 1 and "still going" in second.stderr
    (home / "end").write_text("")  # opening the pipe lets the first run go on, and returns once it has
    pid = int((home / "jaxblock" / "logs" / "pid").read_text())
    assert f"process {pid}" in started.stdout and f"process {pid}" in second.stderr

    desk.tpu("logs", *SLICE, "--lines", "5")
    tail = desk.calls[-1]
    assert tail[:6] == [*BASE, "ssh", "pod", "--worker=0"]
    arguments, switch, folder = json.loads(ssh(tail[6].removeprefix("--command=")).stdout.splitlines()[-1])
    assert arguments == HARD and switch == "1" and folder == str(home / "jaxblock")


def test_a_variable_reaches_the_run_in_a_file_that_nobody_else_reads(desk: Desk, tmp_path: Path) -> None:
    secret = 'it\'s "$HOME" & a key'
    home, sent = tmp_path / "home", tmp_path / "sent"
    tell = ["sh", "-c", 'printf "%s, %s" "$WANDB_API_KEY" "$OTHER" >"$HOME/end"']
    command = ["--env", "WANDB_API_KEY", "--env", "OTHER", "--", *tell]
    variables = {"WANDB_API_KEY": secret, "OTHER": ""}
    dry = desk.tpu("run", *SLICE, "--dry-run", *command, **variables)
    assert desk.calls == []
    (tmp_path / "here").mkdir()
    done = desk.tpu("run", *SLICE, *command, **variables, GCLOUD_KEEP=str(sent), TMPDIR=str(tmp_path / "here"))
    assert done.returncode == 0, done.stderr
    for seen in (dry.stdout, dry.stderr, done.stdout, done.stderr, desk.record.read_text()):
        assert "a key" not in seen
    assert not list((tmp_path / "here").iterdir()) and sent.stat().st_mode & 0o77 == 0
    copy, start = desk.calls
    assert copy[3] == "scp" and copy[5:7] == ["pod:jaxblock.env", "--worker=all"]

    environment = worker(desk, home)
    shutil.move(sent, home / "jaxblock.env")
    subprocess.run(["sh", "-c", start[6].removeprefix("--command=")], env=environment, check=True, capture_output=True)
    assert (home / "end").read_text() == f"{secret}, " and not (home / "jaxblock.env").exists()


def test_setup_sends_the_working_tree_and_makes_an_environment(desk: Desk, tmp_path: Path) -> None:
    repository = tmp_path / "repository"
    (repository / "launch").mkdir(parents=True)
    for script in SCRIPT.parent.glob("tpu*.sh"):
        shutil.copy(script, repository / "launch")
    for name in (".gitignore", "kept.py", "deleted.py", "with space.txt", ".venv"):
        (repository / name).write_text(".venv\n")
    subprocess.run(["git", "init", "-q"], cwd=repository, check=True)
    subprocess.run(["git", "add", "--all", "."], cwd=repository, check=True)
    (repository / "deleted.py").unlink()
    (repository / "new.py").write_text("")
    kept = tmp_path / "kept.tar.gz"
    done = subprocess.run(
        [repository / "launch" / "tpu.sh", "setup", *SLICE],
        env=desk.environment | {"GCLOUD_KEEP": str(kept)},
        check=True,
    )
    assert done.returncode == 0
    copy, remote = desk.calls
    assert copy[:4] == [*BASE, "scp"] and copy[5:] == ["pod:jaxblock.tar.gz", "--worker=all", "--zone=us-east5-a"]
    assert not Path(copy[4]).exists()
    with tarfile.open(kept) as archive:
        assert sorted(archive.getnames()) == [
            ".gitignore", "kept.py", "launch/tpu.sh", "launch/tpu_resume.sh", "new.py", "with space.txt",
        ]  # fmt: skip
    steps = remote[6]
    for needed in (
        "tar -xzf jaxblock.tar.gz -C jaxblock",
        "uv venv",
        "--python 3.12",
        "jax[tpu]",
        ".[gcs,wandb]",
        "constraints-py312.txt",
    ):
        assert needed in steps.replace('"$uv" venv', "uv venv")
    subprocess.run(["sh", "-n", "-c", steps.removeprefix("--command=")], check=True)


@pytest.mark.parametrize(
    "arguments",
    [
        ["create", "--type", "v6e-8"],
        ["create", "--type", "v6e-8", "--queued", "--spot"],
        ["setup"],
        ["sync"],
        ["run", "--", "jaxblock", *HARD],
        ["logs", "--follow"],
        ["status"],
        ["stop"],
        ["delete"],
        ["delete", "--queued"],
    ],
    ids=" ".join,
)
def test_a_dry_run_prints_exactly_what_a_run_would_do(desk: Desk, arguments: list[str]) -> None:
    verb, rest = arguments[0], arguments[1:]
    dry = desk.tpu(verb, *SLICE, "--project", "my project", "--dry-run", *rest)
    assert dry.returncode == 0 and desk.calls == []
    assert (
        desk.tpu(verb, *SLICE, "--project", "my project", *(["--yes"] if verb == "delete" else []), *rest).returncode
        == 0
    )
    printed = shlex.split(dry.stdout)
    # The log's name is the time.
    undated = [[a if "nohup" not in a else a[: a.index(">logs/2")] for a in call] for call in desk.calls]
    printed = [a if "nohup" not in a else a[: a.index(">logs/2")] for a in printed]
    for call in undated:
        assert any(printed[i : i + len(call)] == call for i in range(len(printed)))
    assert printed.count("gcloud") == len(undated) > 0


def test_a_dry_resume_prints_what_it_may_do_in_order(desk: Desk) -> None:
    """With comments of when, and otherwise fit to be pasted."""
    command = ["resume", *SLICE, "--dry-run", "--recreate", "--type", "v6e-8", "--spot", "--", "jaxblock", *HARD]
    done = desk.tpu(*command)
    assert done.returncode == 0 and desk.calls == [], done.stderr
    words = shlex.split(done.stdout, comments=True)
    assert [words[i + 4] for i, word in enumerate(words) if word == "gcloud"] == [
        "describe", "ssh", "delete", "create", "scp", "ssh", "ssh",
    ]  # fmt: skip
    pasted = subprocess.run(["bash", "-n"], input=done.stdout, capture_output=True, text=True)
    assert pasted.returncode == 0 and "# where the slice was preempted or is gone:" in done.stdout
    assert "delete" not in desk.tpu("resume", *SLICE, "--dry-run", "--", "true").stdout


def test_the_workers_of_a_slice_that_is_not_there_yet_are_not_asked(desk: Desk, tmp_path: Path) -> None:
    (tmp_path / "states").write_text("WAITING_FOR_RESOURCES\nACTIVE\n")
    states = {"GCLOUD_STATES": str(tmp_path / "states")}
    waiting = desk.tpu("status", *SLICE, "--queued", **states)
    assert (waiting.returncode, waiting.stdout, len(desk.calls)) == (0, "WAITING_FOR_RESOURCES\n", 1)
    assert desk.tpu("status", *SLICE, "--queued", **states).returncode == 0 and desk.calls[-1][3] == "ssh"


@pytest.fixture
def played(desk: Desk, tmp_path: Path) -> Callable[..., tuple[subprocess.CompletedProcess[str], list[str]]]:
    """Runs ``resume`` against a play: the slice's states and the workers' runs, in order; returns what was done.

    Its waits take no time, and are written to ``sleeps``.
    """
    (tmp_path / "quick").mkdir()
    sleep = tmp_path / "quick" / "sleep"
    # A resume that would go on for ever is ended.
    end = "[ $(wc -l <sleeps) -lt 100 ] || kill $PPID"
    sleep.write_text(f"#!/bin/sh\ncd '{tmp_path}' && echo \"$1\" >>sleeps && {end}\n")
    sleep.chmod(0o755)
    desk.environment["PATH"] = f"{sleep.parent}:{desk.environment['PATH']}"

    def play(*options: str, states: str | list[str], runs: str, **variables: str) -> tuple[Any, list[str]]:
        lines = states.split() if isinstance(states, str) else states
        (tmp_path / "states").write_text("\n".join(lines) + "\n")
        (tmp_path / "runs").write_text(runs + "\n")
        files = {"GCLOUD_STATES": str(tmp_path / "states"), "GCLOUD_RUNS": str(tmp_path / "runs")}
        arguments = ["resume", *SLICE, *options, "--", "jaxblock", "train"]
        done = desk.tpu(*arguments, **files, **variables)
        kinds = ["run" if "nohup" in " ".join(call) else call[3] for call in desk.calls]
        return done, [kind for call, kind in zip(desk.calls, kinds, strict=True) if "run: none" not in " ".join(call)]

    return play


def test_resume_starts_waits_and_ends_with_the_run(played: Any) -> None:
    runs = "run: none\nrun: running 7\\nrun: ended 143\nrun: ended 143\\nrun: ended 143\nrun: ended 0\\nrun: ended 0"
    done, kinds = played(states="READY READY READY READY", runs=runs)
    assert done.returncode == 0, done.stderr
    assert kinds == ["describe", "run", "describe", "describe", "run", "describe"]


@pytest.mark.parametrize("codes", [(124, 134), (137, 134), (134, 134), (143, 0)])
def test_resume_starts_again_what_hung_was_killed_or_lost_a_process(played: Any, codes: tuple[int, int]) -> None:
    first, second = codes
    done, kinds = played(states="READY READY", runs=f"run: ended {first}\\nrun: ended {second}\nrun: ended 0")
    assert done.returncode == 0 and kinds == ["describe", "run", "describe"], done.stderr


def test_a_run_that_hangs_each_time_ends_after_the_retries(played: Any) -> None:
    hung = "run: ended 124\\nrun: ended 134"
    done, kinds = played("--retries", "2", states="READY READY READY READY", runs="\n".join([hung] * 4))
    assert done.returncode == 2 and "given up after 2 restarts" in done.stderr
    assert kinds == [*["describe", "run"] * 3, "describe"]


def test_a_mistake_of_one_worker_is_not_tried_again(played: Any) -> None:
    done, kinds = played(states="READY", runs="run: ended 134\\nrun: ended 2\\nrun: ended 124")
    assert done.returncode == 2 and "exit code 2" in done.stderr and kinds == ["describe"]


def test_resume_hands_on_the_code_of_a_run_that_failed(played: Any) -> None:
    done, kinds = played(states="READY READY", runs="run: lost\nrun: ended 143\\nrun: ended 2")
    assert done.returncode == 2 and "ended with exit code 2" in done.stderr
    assert kinds == ["describe", "run", "describe"]


def test_a_preempted_slice_is_deleted_only_when_asked(played: Any) -> None:
    done, kinds = played(states="PREEMPTED", runs="")
    assert done.returncode == 2 and "--recreate" in done.stderr and kinds == ["describe"]


def test_a_preempted_slice_is_made_again(played: Any) -> None:
    recreated = ["delete", "create", "scp", "ssh", "run"]
    done, kinds = played(
        "--recreate", "--type", "v6e-8", "--spot", states="PREEMPTED CREATING READY", runs="run: ended 0"
    )
    assert done.returncode == 0, done.stderr
    assert kinds == ["describe", *recreated, "describe", "describe"]


def test_a_queued_slice_is_set_up_once_it_is_there(played: Any) -> None:
    options = ["--recreate", "--type", "v6e-8", "--queued"]
    states = "SUSPENDED ACCEPTED WAITING_FOR_RESOURCES ACTIVE ACTIVE ACTIVE"
    done, kinds = played(*options, states=states, runs="run: not set up\\nrun: not set up\nrun: ended 0")
    assert done.returncode == 0, done.stderr
    assert kinds == ["describe", "delete", "create", *["describe"] * 3, "scp", "ssh", "run", "describe"]


def test_a_setup_that_failed_is_tried_again(played: Any) -> None:
    runs = "\n".join(["run: not set up"] * 3)
    done, kinds = played("--retries", "1", states="READY READY READY", runs=runs, GCLOUD_FAILS="scp")
    assert done.returncode == 2 and "given up after 1 restarts" in done.stderr and "run" not in kinds


def test_capacity_that_never_comes_ends_after_the_retries(played: Any) -> None:
    options = ["--recreate", "--type", "v6e-8", "--retries", "2"]
    absent = "!NOT_FOUND"
    done, kinds = played(*options, states=" ".join([absent] * 5), runs="", GCLOUD_FAILS="create")
    assert done.returncode == 2 and "given up after 2 restarts" in done.stderr
    assert kinds == [*["describe", "create"] * 3, "describe"]


@pytest.mark.parametrize("error", ["!503", "!gcloud: line 9: python3: not found", ""])
def test_resume_does_not_take_a_failed_look_for_a_lost_slice(played: Any, error: str) -> None:
    done, kinds = played("--recreate", "--type", "v6e-8", states=[error, "READY"], runs="run: ended 0")
    assert done.returncode == 0 and kinds == ["describe", "describe"]


def _sleeps(tmp_path: Path) -> list[int]:
    return [int(line) for line in (tmp_path / "sleeps").read_text().splitlines()]


def test_restarts_wait_twice_as_long_each_time_and_begin_anew_after_a_run(played: Any, tmp_path: Path) -> None:
    runs = ["run: none", *["run: lost"] * 6, "run: running 7", *["run: lost"] * 2, "run: ended 0"]
    done, _ = played("--backoff", "100", "--poll", "7", states=["READY"] * 11, runs="\n".join(runs))
    assert done.returncode == 0, done.stderr
    # The first start waits for nothing; a run that is seen going is looked at every --poll.
    assert _sleeps(tmp_path) == [100, 200, 400, 800, 900, 900, 7, 100, 200]
    assert "restart 8 of at most 20 in 200 s" in done.stderr  # --retries counts them all


WHERE = "ERROR: (gcloud.compute.tpus.tpu-vm.describe)"


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        ("PERMISSION_DENIED: Permission 'tpu.nodes.get' denied on 'projects/p/nodes/pod'", "roles/tpu.admin"),
        (
            "PERMISSION_DENIED: Cloud TPU API has not been used in project 1 before or it is disabled.",
            "services enable",
        ),
        ("UNAUTHENTICATED: Request had invalid authentication credentials.", "gcloud auth login"),
        ("INVALID_ARGUMENT: Location us-east5-z is not a zone", "Correct --name, --zone"),
        ("NOT_FOUND: Project 'nobody' was not found", "Correct --zone us-east5-a or --project"),
        ("The required property [project] is not currently set.", "--project PROJECT"),
    ],
)
@pytest.mark.parametrize("looked", ["slice", "workers"])
def test_what_gcloud_will_always_refuse_ends_resume_at_once(played: Any, error: str, advice: str, looked: str) -> None:
    failed = f"!{WHERE} {error}"
    options = ["--recreate", "--type", "v6e-8"]
    done, kinds = played(
        *options, states=[failed] if looked == "slice" else ["READY"], runs="" if looked == "slice" else failed
    )
    assert (done.returncode, kinds) == (2, ["describe"])
    assert failed[1:] in done.stderr and advice in done.stderr.splitlines()[-1]


def test_a_step_that_gcloud_will_always_refuse_is_not_tried_again(played: Any) -> None:
    options = ["--recreate", "--type", "v9-8"]
    refusal = "ERROR: (gcloud.compute.tpus.tpu-vm.create) INVALID_ARGUMENT: no accelerator type v9-8"
    done, kinds = played(*options, states="!NOT_FOUND", runs="", GCLOUD_FAILS="create", GCLOUD_ERROR=refusal)
    assert (done.returncode, kinds) == (2, ["describe", "create"])
    assert refusal in done.stderr and "--type" in done.stderr.splitlines()[-1]


def test_a_slice_that_is_gone_is_no_refusal(played: Any) -> None:
    gone = f"!{WHERE} NOT_FOUND: Resource 'projects/p/locations/us-east5-a/nodes/pod' was not found"
    done, kinds = played("--recreate", "--type", "v6e-8", states=[gone, "READY"], runs="run: ended 0")
    assert done.returncode == 0 and kinds == ["describe", "create", "scp", "ssh", "run", "describe"]


@pytest.mark.parametrize("looked", ["slice", "workers"])
def test_looks_that_fail_say_why_and_end_after_the_retries(played: Any, tmp_path: Path, looked: str) -> None:
    cause = "ssh: connect to host 10.0.0.2 port 22: Connection timed out"
    fine, failed = "READY", "!" + cause
    states = [failed] * 2 + [fine] + [failed] * 3 if looked == "slice" else [fine] * 6
    runs = ["run: running 7"] if looked == "slice" else [failed] * 2 + ["run: running 7"] + [failed] * 3
    done, kinds = played("--retries", "2", "--backoff", "500", states=states, runs="\n".join(runs))
    # Only failures in a row count.
    assert (done.returncode, kinds) == (2, ["describe"] * 6)
    assert _sleeps(tmp_path) == [500, 900, 60, 500, 900]
    assert done.stderr.count(f"cannot look at pod:\n{cause}\nretry ") == 4
    assert done.stderr.endswith(
        f"pod could not be looked at 3 times in a row. A run that is going goes on. The last error:\n{cause}\n"
    )


def test_waiting_for_capacity_is_no_failure(played: Any, tmp_path: Path) -> None:
    waits = ["WAITING_FOR_RESOURCES", "PROVISIONING"] * 20
    done, _ = played("--queued", "--retries", "0", states=[*waits, "ACTIVE"], runs="run: ended 0")
    assert done.returncode == 0 and _sleeps(tmp_path) == [60] * 40


def test_status_and_stop_on_a_worker(desk: Desk, tmp_path: Path) -> None:
    assert desk.tpu("run", *SLICE, "--", "sh", "-c", "trap 'exit 143' TERM; echo up; sleep 60 & wait").returncode == 0
    assert desk.tpu("stop", *SLICE).returncode == 0
    start, halt, look = (call[6].removeprefix("--command=") for call in desk.calls)
    home = tmp_path / "home"
    (home / "jaxblock" / "logs").mkdir(parents=True)

    def ssh(command: str) -> str:
        environment = desk.environment | {"HOME": str(home)}
        return subprocess.run(["sh", "-c", command], env=environment, capture_output=True, text=True, check=True).stdout

    assert ssh(look) == "run: not set up\n"
    (home / "jaxblock" / ".venv").mkdir()
    (home / "jaxblock" / ".venv" / "ready").write_text("")
    assert ssh(look) == "run: none\n"
    ssh(start)
    pid = int((home / "jaxblock" / "logs" / "pid").read_text())
    assert ssh(look) == f"run: running {pid}\n"
    while "up" not in (home / "jaxblock" / "logs" / "latest.log").read_text():
        pass
    ssh(halt)
    while not (home / "jaxblock" / "logs" / "exit").exists() or ssh(look) == f"run: running {pid}\n":
        pass
    assert ssh(look) == "run: ended 143\n"


@pytest.mark.parametrize(("typed", "deleted"), [("pod\n", True), ("y\n", False), ("", False)])
def test_delete_asks(desk: Desk, typed: str, deleted: bool) -> None:
    done = desk.tpu("delete", *SLICE, typed=typed)
    assert (done.returncode == 0) == deleted == bool(desk.calls)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "usage"),
        (["launch"], "unknown verb 'launch'"),
        (["create", "--zone", "z", "--type", "v6e-8"], "--name"),
        (["create", "--name", "n", "--type", "v6e-8"], "--zone"),
        (["create", *SLICE], "--type"),
        (["run", *SLICE], "needs a command"),
        (["resume", *SLICE], "needs a command"),
        (["resume", *SLICE, "--recreate", "--", "true"], "--recreate needs --type"),
        (["resume", *SLICE, "--backoff", "soon", "--", "true"], "--backoff must be a number"),
        (["run", *SLICE, "--env", "KEY=1", "--", "true"], "--env must be the name of a variable, not 'KEY=1'"),
        (["run", *SLICE, "--env", "NOT_SET", "--", "true"], "NOT_SET is not set here; export NOT_SET first"),
        (["stop", *SLICE, "--", "true"], "stop takes no command"),
        (["run", *SLICE, "jaxblock"], "after --"),
        (["logs", *SLICE, "--lines", "5; rm -rf /"], "must be a number"),
        (["delete", *SLICE, "--name"], "--name needs a value"),
    ],
)
def test_mistakes(desk: Desk, arguments: list[str], message: str) -> None:
    done = desk.tpu(*arguments)
    assert done.returncode == 2 and message in done.stderr and desk.calls == []


def test_a_failing_gcloud_stops_the_rest(desk: Desk) -> None:
    done = desk.tpu("setup", *SLICE, GCLOUD_FAILS="scp")
    assert done.returncode == 2 and "no capacity" in done.stderr and "scp failed" in done.stderr
    assert [call[3] for call in desk.calls] == ["scp"]
