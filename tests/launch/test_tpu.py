"""Tests launch/tpu.sh against a stand-in for gcloud: what it runs, and that arguments reach the workers as typed."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest

from tests.launch.conftest import LAUNCH, Desk

HARD = [
    "--text",
    "two words",
    "it's",
    '"quoted"',
    "$HOME `id` $(id)",
    r"a\b",
    "semi;colon & pipe | *",
    "",
    "line\nbreak",
    "--x=é",
]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("--type v6e-8", "--accelerator-type=v6e-8 --version=v2-alpha-tpuv6e"),
        ("--type v5e-16 --spot", "--accelerator-type=v5litepod-16 --version=v2-alpha-tpuv5-lite --spot"),
        ("--type v4-8 --version mine", "--accelerator-type=v4-8 --version=mine"),
    ],
)
def test_create(desk: Desk, options: str, expected: str) -> None:
    assert desk.tpu("create", *options.split()).returncode == 0
    assert desk.calls == [["tpu-vm", "create", "pod", *expected.split(), "--zone=us-east5-a"]]


def test_names_come_from_the_environment_and_flags_win(desk: Desk) -> None:
    variables = {"JAXBLOCK_TPU_NAME": "env", "JAXBLOCK_TPU_ZONE": "z", "JAXBLOCK_TPU_PROJECT": "my project"}
    assert desk.script("delete", "--yes", "--name", "flag", **variables).returncode == 0
    assert desk.calls == [["tpu-vm", "delete", "flag", "--quiet", "--zone=z", "--project=my project"]]


def worker(desk: Desk, home: Path) -> dict[str, str]:
    """Makes a worker's home folder with a `jaxblock` that prints its arguments and environment, then waits for a file.

    Returns:
        The variables that the worker's shell runs with.
    """
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
    assert desk.tpu("run", "--", "jaxblock", *HARD).returncode == 0
    call = desk.calls[0]
    assert call[:4] == ["tpu-vm", "ssh", "pod", "--worker=all"] and call[5:] == ["--zone=us-east5-a"]
    # gcloud splits the command at spaces, and ssh joins it again.
    remote = " ".join(call[4].removeprefix("--command=").split(" "))
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

    desk.tpu("logs", "--lines", "5")
    tail = desk.calls[-1]
    assert tail[:4] == ["tpu-vm", "ssh", "pod", "--worker=0"]
    arguments, switch, folder = json.loads(ssh(tail[4].removeprefix("--command=")).stdout.splitlines()[-1])
    assert arguments == HARD and switch == "1" and folder == str(home / "jaxblock")


def test_a_variable_reaches_the_run_in_a_file_that_nobody_else_reads(desk: Desk, tmp_path: Path) -> None:
    secret = 'it\'s "$HOME" & a key'
    home, sent = tmp_path / "home", tmp_path / "sent"
    tell = ["sh", "-c", 'printf "%s, %s" "$WANDB_API_KEY" "$OTHER" >"$HOME/end"']
    command = ["--env", "WANDB_API_KEY", "--env", "OTHER", "--", *tell]
    variables = {"WANDB_API_KEY": secret, "OTHER": ""}
    dry = desk.tpu("run", "--dry-run", *command, **variables)
    assert desk.calls == []
    (tmp_path / "here").mkdir()
    done = desk.tpu("run", *command, **variables, GCLOUD_KEEP=str(sent), TMPDIR=str(tmp_path / "here"))
    assert done.returncode == 0, done.stderr
    for seen in (dry.stdout, dry.stderr, done.stdout, done.stderr, desk.record.read_text()):
        assert "a key" not in seen
    assert not list((tmp_path / "here").iterdir()) and sent.stat().st_mode & 0o77 == 0
    copy, start = desk.calls
    assert copy[1] == "scp" and copy[3:5] == ["pod:jaxblock.env", "--worker=all"]

    environment = worker(desk, home)
    shutil.move(sent, home / "jaxblock.env")
    subprocess.run(["sh", "-c", start[4].removeprefix("--command=")], env=environment, check=True, capture_output=True)
    assert (home / "end").read_text() == f"{secret}, " and not (home / "jaxblock.env").exists()


def test_setup_sends_the_working_tree_and_makes_an_environment(desk: Desk, tmp_path: Path) -> None:
    repository = tmp_path / "repository"
    (repository / "launch").mkdir(parents=True)
    scripts = ["tpu.sh", "tpu_resume.sh", "command_line.sh"]
    for script in scripts:
        shutil.copy(LAUNCH / script, repository / "launch")
    for name in (".gitignore", "kept.py", "deleted.py", "with space.txt", ".venv"):
        (repository / name).write_text(".venv\n")
    subprocess.run(["git", "init", "-q"], cwd=repository, check=True)
    subprocess.run(["git", "add", "--all", "."], cwd=repository, check=True)
    (repository / "deleted.py").unlink()
    (repository / "new.py").write_text("")
    kept = tmp_path / "kept.tar.gz"
    environment = desk.environment | {"GCLOUD_KEEP": str(kept)}
    setup = [repository / "launch" / "tpu.sh", "setup", "--name", "pod", "--zone", "us-east5-a"]
    subprocess.run(setup, env=environment, check=True)
    copy, remote = desk.calls
    assert copy[:2] == ["tpu-vm", "scp"] and copy[3:] == ["pod:jaxblock.tar.gz", "--worker=all", "--zone=us-east5-a"]
    assert not Path(copy[2]).exists()
    with tarfile.open(kept) as archive:
        assert sorted(archive.getnames()) == [
            ".gitignore", "kept.py", *sorted(f"launch/{script}" for script in scripts), "new.py", "with space.txt",
        ]  # fmt: skip
    steps = remote[4]
    for needed in ("tar -xzf jaxblock.tar.gz -C jaxblock", '"$uv" venv', "--python 3.12", "jax[tpu]", ".[gcs,wandb]",
                   "constraints-py312.txt"):  # fmt: skip
        assert needed in steps
    subprocess.run(["sh", "-n", "-c", steps.removeprefix("--command=")], check=True)


@pytest.mark.parametrize(
    "command",
    ["create --type v6e-8", "create --type v6e-8 --queued --spot", "setup", "sync", "run -- jaxblock", "logs --follow", "status",
     "stop", "delete", "delete --queued"],
)  # fmt: skip
def test_a_dry_run_prints_exactly_what_a_run_would_do(desk: Desk, command: str) -> None:
    verb, *options = command.split()
    rest = ["--project", "my project", *options, *(HARD if verb == "run" else [])]
    dry = desk.tpu(verb, "--dry-run", *rest)
    assert dry.returncode == 0 and desk.calls == []
    assert desk.tpu(verb, *["--yes"] * (verb == "delete"), *rest).returncode == 0
    printed = shlex.split(dry.stdout)
    # The log's name is the time.
    undated = [[a if "nohup" not in a else a[: a.index(">logs/2")] for a in call] for call in desk.calls]
    printed = [a if "nohup" not in a else a[: a.index(">logs/2")] for a in printed]
    for call in undated:
        assert any(printed[i : i + len(call)] == call for i in range(len(printed)))
    assert printed.count("gcloud") == len(undated) > 0


def test_a_dry_resume_prints_what_it_may_do_in_order(desk: Desk) -> None:
    """The output can be pasted into a shell; comments say when each command would run."""
    command = ["resume", "--dry-run", "--recreate", "--type", "v6e-8", "--spot", "--", "jaxblock", *HARD]
    done = desk.tpu(*command)
    assert done.returncode == 0 and desk.calls == [], done.stderr
    words = shlex.split(done.stdout, comments=True)
    assert [words[i + 4] for i, word in enumerate(words) if word == "gcloud"] == [
        "describe", "ssh", "delete", "create", "scp", "ssh", "ssh",
    ]  # fmt: skip
    pasted = subprocess.run(["bash", "-n"], input=done.stdout, capture_output=True, text=True)
    assert pasted.returncode == 0 and "# where the slice was preempted or is gone:" in done.stdout
    assert "delete" not in desk.tpu("resume", "--dry-run", "--", "true").stdout


def test_the_workers_of_a_slice_that_is_not_there_yet_are_not_asked(desk: Desk, tmp_path: Path) -> None:
    (tmp_path / "states").write_text("WAITING_FOR_RESOURCES\nACTIVE\n")
    states = {"GCLOUD_STATES": str(tmp_path / "states")}
    waiting = desk.tpu("status", "--queued", **states)
    assert (waiting.returncode, waiting.stdout, len(desk.calls)) == (0, "WAITING_FOR_RESOURCES\n", 1)
    assert desk.tpu("status", "--queued", **states).returncode == 0 and desk.calls[-1][1] == "ssh"


def test_status_and_stop_on_a_worker(desk: Desk, tmp_path: Path) -> None:
    assert desk.tpu("run", "--", "sh", "-c", "trap 'exit 143' TERM; echo up; sleep 60 & wait").returncode == 0
    assert desk.tpu("stop").returncode == 0
    start, halt, look = (call[4].removeprefix("--command=") for call in desk.calls)
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
    done = desk.tpu("delete", typed=typed)
    assert (done.returncode == 0) == deleted == bool(desk.calls)


POD = "--name pod --zone z"


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("", "usage"),
        ("launch", "unknown verb 'launch'"),
        ("create --zone z --type v6e-8", "--name"),
        ("create --name n --type v6e-8", "--zone"),
        (f"create {POD}", "--type"),
        (f"run {POD}", "needs a command"),
        (f"resume {POD}", "needs a command"),
        (f"resume {POD} --recreate -- true", "--recreate needs --type"),
        (f"resume {POD} --backoff soon -- true", "--backoff must be a whole number"),
        (f"run {POD} --env KEY=1 -- true", "--env must be the name of a variable, not 'KEY=1'"),
        (f"run {POD} --env NOT_SET -- true", "NOT_SET is not set here; export NOT_SET first"),
        (f"stop {POD} -- true", "stop takes no command"),
        (f"run {POD} jaxblock", "after --"),
        (f"logs {POD} --lines '5; rm -rf /'", "must be a whole number"),
        (f"delete {POD} --name", "--name needs a value"),
        (f"delete {POD} --yes=no", "unknown argument '--yes=no'"),
        (f"delete {POD} '--name --zone' z", "unknown argument '--name --zone'"),
    ],
)
def test_mistakes(desk: Desk, command: str, message: str) -> None:
    done = desk.script(*shlex.split(command))
    assert done.returncode == 2 and message in done.stderr and desk.calls == []


def test_a_failing_gcloud_stops_the_rest(desk: Desk) -> None:
    done = desk.tpu("setup", GCLOUD_FAILS="scp")
    assert done.returncode == 2 and "no capacity" in done.stderr and "scp failed" in done.stderr
    assert [call[1] for call in desk.calls] == ["scp"]
