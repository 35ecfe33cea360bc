"""Tests launch/tpu.sh against a stand-in for gcloud: what it runs, and that arguments reach the workers as typed."""

import json
import os
import shlex
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest

from tests.launch.conftest import LAUNCH, Desk, put

# fmt: off
HARD = ["--text", "two words", "it's", '"quoted"', "$HOME `id` $(id)", r"a\b", "semi;colon & pipe | *", "", "line\nbreak",
        "--x=é"]
# fmt: on


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("--type v6e-8", "--accelerator-type=v6e-8 --version=v2-alpha-tpuv6e"),
        ("--type v5e-16 --spot", "--accelerator-type=v5litepod-16 --version=v2-alpha-tpuv5-lite --spot"),
        ("--type v4-8 --version mine", "--accelerator-type=v4-8 --version=mine"),
    ],
)
def test_create(desk, options, expected):
    assert desk.tpu("create", *options.split()).returncode == 0
    assert desk.calls == [["tpu-vm", "create", "pod", *expected.split(), "--zone=us-east5-a"]]


def test_names_come_from_the_environment_and_flags_win(desk):
    variables = {"JAXBLOCK_TPU_NAME": "env", "JAXBLOCK_TPU_ZONE": "z", "JAXBLOCK_TPU_PROJECT": "my project"}
    assert desk.script("delete", "--yes", "--name", "flag", **variables).returncode == 0
    assert desk.calls == [["tpu-vm", "delete", "flag", "--quiet", "--zone=z", "--project=my project"]]


class Worker:
    """A worker's home folder, with a `jaxblock` that prints its arguments and environment, then waits for a file."""

    def __init__(self, desk: Desk) -> None:
        self.home, self.environment = desk.folder / "home", desk.environment | {"HOME": str(desk.folder / "home")}
        self.logs = self.home / "jaxblock" / "logs"
        self.logs.mkdir(parents=True)
        os.mkfifo(self.home / "end")

    def install(self) -> None:
        script = "#!/usr/bin/env python3\nimport json, os, sys\n"
        script += "print(json.dumps([sys.argv[1:], os.environ['JAXBLOCK_DISTRIBUTED'], os.getcwd()]), flush=True)\n"
        put(self.home / "jaxblock/.venv/bin/jaxblock", script + "open(os.environ['HOME'] + '/end').read()\n")
        (self.home / "jaxblock/.venv/ready").touch()

    def ssh(self, call: list[str]) -> subprocess.CompletedProcess[str]:
        """Runs the command of a call as gcloud and ssh do: split at spaces and joined, by whatever is the login shell."""
        command = ["sh", "-c", call[4].removeprefix("--command=")]
        return subprocess.run(command, env=self.environment, cwd=self.home, capture_output=True, text=True)

    @property
    def pid(self) -> int:
        return int((self.logs / "pid").read_text())


@pytest.fixture
def worker(desk: Desk) -> Worker:
    return Worker(desk)


def test_arguments_reach_the_worker_as_typed_and_one_run_holds_the_tpu(desk, worker):
    worker.install()
    assert desk.tpu("run", "--", "jaxblock", *HARD).returncode == 0
    call = desk.calls[0]
    assert call[:4] == ["tpu-vm", "ssh", "pod", "--worker=all"] and call[5:] == ["--zone=us-east5-a"]
    started, second = worker.ssh(call), worker.ssh(call)
    assert started.returncode == 0 and "started process" in started.stdout, started.stderr
    assert second.returncode == 1 and "still going" in second.stderr
    (worker.home / "end").write_text("")  # opening the pipe lets the first run go on, and returns once it has
    assert f"process {worker.pid}" in started.stdout and f"process {worker.pid}" in second.stderr
    desk.tpu("logs", "--lines", "5")
    tail = desk.calls[-1]
    assert tail[:4] == ["tpu-vm", "ssh", "pod", "--worker=0"]
    assert json.loads(worker.ssh(tail).stdout.splitlines()[-1]) == [HARD, "1", str(worker.home / "jaxblock")]


def test_a_variable_reaches_the_run_in_a_file_that_nobody_else_reads(desk, worker, tmp_path):
    worker.install()
    sent, here = tmp_path / "sent", tmp_path / "here"
    here.mkdir()
    tell = ["sh", "-c", 'printf "%s, %s" "$WANDB_API_KEY" "$OTHER" >"$HOME/end"']
    command = ["--env", "WANDB_API_KEY", "--env", "OTHER", "--", *tell]
    variables = {"WANDB_API_KEY": 'it\'s "$HOME" & a key', "OTHER": ""}
    (worker.home / "end").unlink()
    dry = desk.tpu("run", "--dry-run", *command, **variables)
    assert desk.calls == []
    done = desk.tpu("run", *command, **variables, GCLOUD_KEEP=str(sent), TMPDIR=str(here))
    assert done.returncode == 0, done.stderr
    assert "a key" not in dry.stdout + dry.stderr + done.stdout + done.stderr + desk.record.read_text()
    assert not list(here.iterdir()) and sent.stat().st_mode & 0o77 == 0
    copy, start = desk.calls
    assert copy[1] == "scp" and copy[3:5] == ["pod:jaxblock.env", "--worker=all"]
    shutil.move(sent, worker.home / "jaxblock.env")
    os.mkfifo(worker.home / "end")
    assert worker.ssh(start).returncode == 0
    assert (worker.home / "end").read_text() == f"{variables['WANDB_API_KEY']}, "
    assert not (worker.home / "jaxblock.env").exists()


def test_setup_sends_the_working_tree_and_makes_an_environment(desk, tmp_path):
    repository, kept = tmp_path / "repository", tmp_path / "kept.tar.gz"
    scripts = ["launch/command_line.sh", "launch/tpu.sh", "launch/tpu_resume.sh"]
    for script in scripts:
        put(repository / script, (LAUNCH.parent / script).read_text())
    for name in (".gitignore", "kept.py", "deleted.py", "with space.txt", ".venv"):
        (repository / name).write_text(".venv\n")
    for command in ("init -q", "add --all ."):
        subprocess.run(["git", *command.split()], cwd=repository, check=True)
    (repository / "deleted.py").unlink()
    (repository / "new.py").touch()
    setup = [repository / "launch" / "tpu.sh", "setup", "--name", "pod", "--zone", "us-east5-a"]
    subprocess.run(setup, env=desk.environment | {"GCLOUD_KEEP": str(kept)}, check=True)
    copy, remote = desk.calls
    assert copy[:2] == ["tpu-vm", "scp"] and copy[3:] == ["pod:jaxblock.tar.gz", "--worker=all", "--zone=us-east5-a"]
    assert not Path(copy[2]).exists()
    with tarfile.open(kept) as archive:
        assert sorted(archive.getnames()) == [".gitignore", "kept.py", *scripts, "new.py", "with space.txt"]
    for needed in ("tar -xzf jaxblock.tar.gz -C jaxblock", '"$uv" venv', "--python 3.12", "jax[tpu]", ".[gcs,wandb]",
                   "constraints-py312.txt"):  # fmt: skip
        assert needed in remote[4]
    subprocess.run(["sh", "-n", "-c", remote[4].removeprefix("--command=")], check=True)


@pytest.mark.parametrize(
    "command",
    ["create --type v6e-8", "create --type v6e-8 --queued --spot", "setup", "sync", "run -- jaxblock", "logs --follow", "status",
     "stop", "delete", "delete --queued"],
)  # fmt: skip
def test_a_dry_run_prints_exactly_what_a_run_would_do(desk, command):
    verb, *options = command.split()
    rest = ["--project", "my project", *options, *(HARD if verb == "run" else [])]
    dry = desk.tpu(verb, "--dry-run", *rest)
    assert dry.returncode == 0 and desk.calls == []
    assert desk.tpu(verb, *["--yes"] * (verb == "delete"), *rest).returncode == 0

    def undated(words: list[str]) -> list[str]:
        return [a if "nohup" not in a else a[: a.index(">logs/2")] for a in words]  # the log's name is the time

    printed = undated(shlex.split(dry.stdout))
    for call in map(undated, desk.calls):
        assert any(printed[i : i + len(call)] == call for i in range(len(printed)))
    assert printed.count("gcloud") == len(desk.calls) > 0


def test_a_dry_resume_prints_what_it_may_do_in_order(desk):
    """The output can be pasted into a shell; comments say when each command would run."""
    done = desk.tpu(*["resume", "--dry-run", "--recreate", "--type", "v6e-8", "--spot", "--", "jaxblock"], *HARD)
    assert done.returncode == 0 and desk.calls == [], done.stderr
    words = shlex.split(done.stdout, comments=True)
    found = [words[i + 4] for i, word in enumerate(words) if word == "gcloud"]
    assert found == ["describe", "ssh", "delete", "create", "scp", "ssh", "ssh"]
    pasted = subprocess.run(["bash", "-n"], input=done.stdout, capture_output=True, text=True)
    assert pasted.returncode == 0 and "# where the slice was preempted or is gone:" in done.stdout
    assert "delete" not in desk.tpu("resume", "--dry-run", "--", "true").stdout


def test_the_workers_of_a_slice_that_is_not_there_yet_are_not_asked(desk, tmp_path):
    (tmp_path / "states").write_text("WAITING_FOR_RESOURCES\nACTIVE\n")
    states = {"GCLOUD_STATES": str(tmp_path / "states")}
    waiting = desk.tpu("status", "--queued", **states)
    assert (waiting.returncode, waiting.stdout, len(desk.calls)) == (0, "WAITING_FOR_RESOURCES\n", 1)
    assert desk.tpu("status", "--queued", **states).returncode == 0 and desk.calls[-1][1] == "ssh"


def test_status_and_stop_on_a_worker(desk, worker):
    assert desk.tpu("run", "--", "sh", "-c", "trap 'exit 143' TERM; echo up; sleep 60 & wait").returncode == 0
    assert desk.tpu("stop").returncode == 0
    start, halt, look = desk.calls
    assert worker.ssh(look).stdout == "run: not set up\n"
    worker.install()
    assert worker.ssh(look).stdout == "run: none\n"
    worker.ssh(start)
    running = f"run: running {worker.pid}\n"
    assert worker.ssh(look).stdout == running
    while "up" not in (worker.logs / "latest.log").read_text():
        pass
    worker.ssh(halt)
    while not (worker.logs / "exit").exists() or worker.ssh(look).stdout == running:
        pass
    assert worker.ssh(look).stdout == "run: ended 143\n"


@pytest.mark.parametrize(("typed", "deleted"), [("pod\n", True), ("y\n", False), ("", False)])
def test_delete_asks(desk, typed, deleted):
    assert (desk.tpu("delete", typed=typed).returncode == 0) == deleted == bool(desk.calls)


MISTAKES = """
 | usage
launch | unknown verb 'launch'
create --zone z --type v6e-8 | --name
create --name n --type v6e-8 | --zone
create POD | --type
run POD | needs a command
resume POD | needs a command
resume POD --recreate -- true | --recreate needs --type
resume POD --backoff soon -- true | --backoff must be a whole number
run POD --env KEY=1 -- true | --env must be the name of a variable, not 'KEY=1'
run POD --env NOT_SET -- true | NOT_SET is not set here; export NOT_SET first
stop POD -- true | stop takes no command
run POD jaxblock | after --
logs POD --lines '5; rm -rf /' | must be a whole number
delete POD --name | --name needs a value
delete POD --yes=no | unknown argument '--yes=no'
delete POD '--name --zone' z | unknown argument '--name --zone'
"""


@pytest.mark.parametrize("mistake", MISTAKES.strip("\n").splitlines())
def test_mistakes(desk, mistake):
    command, message = mistake.replace("POD", "--name pod --zone z").split(" | ")
    done = desk.script(*shlex.split(command))
    assert done.returncode == 2 and message in done.stderr and desk.calls == []


def test_a_failing_gcloud_stops_the_rest(desk):
    done = desk.tpu("setup", GCLOUD_FAILS="scp")
    assert done.returncode == 2 and "no capacity" in done.stderr and "scp failed" in done.stderr
    assert [call[1] for call in desk.calls] == ["scp"]
