"""Tests launch/tpu.sh against a stand-in for gcloud: what it runs, that arguments reach the workers as typed, what it starts again."""

import json
import re
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


OTHER = {"JAXBLOCK_TPU_ZONE": "z", "JAXBLOCK_TPU_PROJECT": "my project"}
# fmt: off
CALLS = [  # the command, variables, the call of gcloud
    ("create --type v6e-8", {}, "create pod --accelerator-type=v6e-8 --version=v2-alpha-tpuv6e --zone=us-east5-a"),
    ("create --type v5e-16 --spot", {},
        "create pod --accelerator-type=v5litepod-16 --version=v2-alpha-tpuv5-lite --spot --zone=us-east5-a"),
    ("create --type v4-8 --version mine", {}, "create pod --accelerator-type=v4-8 --version=mine --zone=us-east5-a"),
    ("delete --yes --name flag", OTHER, "delete flag --quiet --zone=z '--project=my project'"),
]
# fmt: on


@pytest.mark.parametrize(("command", "variables", "call"), CALLS)
def test_what_gcloud_is_called_with_and_that_flags_win_over_the_environment(desk, command, variables, call):
    assert desk.tpu(*command.split(), **variables).returncode == 0
    assert desk.calls == [["tpu-vm", *shlex.split(call)]]


class Worker:
    """A worker's home folder, with a `jaxblock` that prints its arguments and environment, and then goes on."""

    def __init__(self, desk: Desk) -> None:
        self.home, self.environment = desk.folder / "home", desk.environment | {"HOME": str(desk.folder / "home")}
        self.logs = self.home / "jaxblock" / "logs"
        self.logs.mkdir(parents=True)

    def install(self) -> None:
        script = "#!/usr/bin/env python3\nimport json, os, sys, time\n"
        script += "print(json.dumps([sys.argv[1:], os.environ['JAXBLOCK_DISTRIBUTED'], os.getcwd()]), flush=True)\n"
        put(self.home / "jaxblock/.venv/bin/jaxblock", script + "time.sleep(60)\n")
        (self.home / "jaxblock/.venv/ready").touch()

    def ssh(self, call: list[str]) -> subprocess.CompletedProcess[str]:
        """Runs the command of a call as gcloud and ssh do: split at spaces and joined, by whatever is the login shell."""
        command = ["sh", "-c", call[4].removeprefix("--command=")]
        return subprocess.run(command, env=self.environment, cwd=self.home, capture_output=True, text=True)


@pytest.fixture
def worker(desk: Desk) -> Worker:
    return Worker(desk)


def test_arguments_reach_the_worker_as_typed_and_one_run_holds_the_tpu_until_it_is_stopped(desk, worker):
    verbs = (["run", "--", "jaxblock", *HARD], ["logs", "--lines", "5"], ["stop"])
    assert [desk.tpu(*verb).returncode for verb in verbs] == [0, 0, 0]
    start, tail, halt, look = desk.calls
    assert start[:4] == ["tpu-vm", "ssh", "pod", "--worker=all"] and start[5:] == ["--zone=us-east5-a"]
    assert tail[:4] == ["tpu-vm", "ssh", "pod", "--worker=0"]
    assert worker.ssh(look).stdout == "run: not set up\n"
    worker.install()
    assert worker.ssh(look).stdout == "run: none\n"
    started, second = worker.ssh(start), worker.ssh(start)
    assert started.returncode == 0 and "started process" in started.stdout, started.stderr
    assert second.returncode == 1 and "still going" in second.stderr
    process = (worker.logs / "pid").read_text().strip()
    assert f"process {process}" in started.stdout and f"process {process}" in second.stderr
    running = f"run: running {process}\n"
    assert worker.ssh(look).stdout == running
    while not (told := worker.ssh(tail).stdout):
        pass
    assert json.loads(told) == [HARD, "1", str(worker.home / "jaxblock")]
    worker.ssh(halt)
    while not (worker.logs / "exit").exists() or worker.ssh(look).stdout == running:
        pass
    assert worker.ssh(look).stdout == "run: ended 143\n"


def test_a_variable_reaches_the_run_in_a_file_that_nobody_else_reads(desk, worker, tmp_path):
    worker.install()
    sent, here = tmp_path / "sent", tmp_path / "here"
    here.mkdir()
    tell = ["sh", "-c", 'printf "%s, %s" "$WANDB_API_KEY" "$OTHER" >"$HOME/told"']
    command = ["run", "--env", "WANDB_API_KEY", "--env", "OTHER", "--", *tell]
    variables = {"WANDB_API_KEY": 'it\'s "$HOME" & a key', "OTHER": ""}
    dry = desk.tpu(*command[:1], "--dry-run", *command[1:], **variables)
    assert desk.calls == []
    done = desk.tpu(*command, **variables, GCLOUD_KEEP=str(sent), TMPDIR=str(here))
    assert done.returncode == 0, done.stderr
    assert "a key" not in dry.stdout + dry.stderr + done.stdout + done.stderr + desk.record.read_text()
    assert not list(here.iterdir()) and sent.stat().st_mode & 0o77 == 0
    copy, start = desk.calls
    assert copy[1] == "scp" and copy[3:5] == ["pod:jaxblock.env", "--worker=all"]
    shutil.move(sent, worker.home / "jaxblock.env")
    assert worker.ssh(start).returncode == 0
    while not (worker.logs / "exit").exists():
        pass
    assert (worker.home / "told").read_text() == f"{variables['WANDB_API_KEY']}, "
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
    subprocess.run(
        [repository / "launch" / "tpu.sh", "setup"], env=desk.environment | {"GCLOUD_KEEP": str(kept)}, check=True
    )
    copy, (*_, remote, _) = desk.calls
    assert copy[:2] == ["tpu-vm", "scp"] and copy[3:] == ["pod:jaxblock.tar.gz", "--worker=all", "--zone=us-east5-a"]
    assert not Path(copy[2]).exists()
    with tarfile.open(kept) as archive:
        assert sorted(archive.getnames()) == [".gitignore", "kept.py", *scripts, "new.py", "with space.txt"]
    parts = (
        "tar -xzf jaxblock.tar.gz -C jaxblock",
        '"$uv" venv',
        "--python 3.12",
        "jax[tpu]",
        ".[gcs,wandb]",
        "-py312.txt",
    )
    assert all(part in remote for part in parts)
    subprocess.run(["sh", "-n", "-c", remote.removeprefix("--command=")], check=True)


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


@pytest.mark.parametrize(("typed", "deleted"), [("pod\n", True), ("y\n", False), ("", False)])
def test_delete_asks(desk, typed, deleted):
    assert (desk.tpu("delete", typed=typed).returncode == 0) == deleted == bool(desk.calls)


NEW = "--recreate --type v6e-8"
WHERE = "ERROR: (gcloud.compute.tpus.tpu-vm.describe)"
REFUSED = "ERROR: (gcloud.compute.tpus.tpu-vm.create) INVALID_ARGUMENT: no accelerator type v9-8"


def play(desk: Desk, options: str, states: str, runs: str) -> tuple[int, str, str]:
    """Runs ``resume`` while gcloud answers with states of the slice and states of the workers' runs, one after the other.

    Two looks at two workers are "none, running 7 / ended 0, ended 0"; "!text" is an error. Waiting takes no time; how long
    ``resume`` wanted to wait is written to the file ``sleeps``. Returns the exit code, standard error, and the kinds of
    commands that were run.
    """

    def look(found: str) -> str:
        return found if found[:1] == "!" else r"\n".join(f"run: {run}" for run in found.split(", "))

    words, variables = shlex.split(options), {}
    while words and words[0][0] != "-":
        name, variables[name] = words.pop(0).split("=", 1)
    sleep = put(desk.folder / "quick" / "sleep", f"#!/bin/sh\necho \"$1\" >>'{desk.folder}/sleeps'\n")
    variables["PATH"] = f"{sleep.parent}:{desk.environment['PATH']}"
    answers = {"GCLOUD_STATES": states.split(" / "), "GCLOUD_RUNS": map(look, runs.split(" / "))}
    variables |= {name: str(put(desk.folder / name, "\n".join(lines) + "\n")) for name, lines in answers.items()}
    done = desk.tpu("resume", *words, "--", "jaxblock", "train", **variables)
    calls = [call for call in desk.calls if "run: none" not in " ".join(call)]
    return done.returncode, done.stderr, " ".join("run" if "nohup" in " ".join(call) else call[1] for call in calls)


def sleeps(desk: Desk) -> list[int]:
    return [int(line) for line in (desk.folder / "sleeps").read_text().split()]


READY = "READY / READY"
AGAIN = "describe run describe"
# What happens: options, states of the slice, states of the runs; the exit code, a message, commands that are run.
# fmt: off
PLAYS = {
    "the run is done": ("", f"{READY} / {READY}", "none / running 7, ended 143 / ended 143, ended 143 / ended 0, ended 0",
        0, "", f"{AGAIN} {AGAIN}"),
    "it hung": ("", READY, "ended 124, ended 134 / ended 0", 0, "", AGAIN),
    "it was killed": ("", READY, "ended 137, ended 134 / ended 0", 0, "", AGAIN),
    "a process was lost": ("", READY, "ended 134, ended 134 / ended 0", 0, "", AGAIN),
    "one process was stopped": ("", READY, "ended 143, ended 0 / ended 0", 0, "", AGAIN),
    "it hangs each time": ("--retries 2", f"{READY} / {READY}", " / ".join(["ended 124, ended 134"] * 4),
        2, "given up after 2 restarts", f"describe run describe run {AGAIN}"),
    "a mistake of one worker": ("", "READY", "ended 134, ended 2, ended 124", 2, "exit code 2", "describe"),
    "a mistake after a restart": ("", READY, "lost / ended 143, ended 2", 2, "ended with exit code 2", AGAIN),
    "preempted": ("", "PREEMPTED", "", 2, "--recreate", "describe"),
    "preempted and made again": (f"{NEW} --spot", "PREEMPTED / CREATING / READY", "ended 0",
        0, "", "describe delete create scp ssh run describe describe"),
    "queued": (f"{NEW} --queued", "SUSPENDED / ACCEPTED / WAITING_FOR_RESOURCES / ACTIVE / ACTIVE / ACTIVE",
        "not set up, not set up / ended 0", 0, "", "describe delete create describe describe describe scp ssh run describe"),
    "a setup that fails": ("GCLOUD_FAILS=scp --retries 1", f"READY / {READY}", " / ".join(["not set up"] * 3),
        2, "given up after 1 restarts", "describe scp describe scp describe"),
    "no capacity": (f"GCLOUD_FAILS=create {NEW} --retries 2", " / ".join(["!NOT_FOUND"] * 5), "",
        2, "given up after 2 restarts", "describe create describe create describe create describe"),
    "a type that is refused": (f"GCLOUD_FAILS=create GCLOUD_ERROR='{REFUSED}' --recreate --type v9-8", "!NOT_FOUND", "",
        2, r"v9-8\n(.*\n)*Correct --name.*--type", "describe create"),
    "gone": (NEW, f"!{WHERE} NOT_FOUND: Resource 'projects/p/locations/us-east5-a/nodes/pod' was not found / READY",
        "ended 0", 0, "", "describe create scp ssh run describe"),
    # What follows is no lost slice.
    "a failed look": (NEW, "!503 / READY", "ended 0", 0, "", "describe describe"),
    "a broken gcloud": (NEW, "!gcloud: line 9: python3: not found / READY", "ended 0", 0, "", "describe describe"),
    "no state": (NEW, " / READY", "ended 0", 0, "", "describe describe"),
}
REFUSALS = [
    ("PERMISSION_DENIED: Permission 'tpu.nodes.get' denied on 'projects/p/nodes/pod'", "If --zone us-east5-a and --project"),
    ("PERMISSION_DENIED: Cloud TPU API has not been used in project 1 before or it is disabled.", "Enable the API: gcloud services enable"),
    ("UNAUTHENTICATED: Request had invalid authentication credentials.", "Log in (gcloud auth login)"),
    ("INVALID_ARGUMENT: Location us-east5-z is not a zone", "Correct --name, --zone"),
    ("NOT_FOUND: Project 'nobody' was not found", "Correct --zone us-east5-a or --project"),
    ("The required property [project] is not currently set.", "Name the project: --project PROJECT"),
]
# fmt: on
for error, advice in REFUSALS:
    failed, told = f"!{WHERE} {error}", re.escape(f"{WHERE} {error}\n{advice}")
    PLAYS[f"slice: {error}"] = (NEW, failed, "", 2, told, "describe")
    PLAYS[f"workers: {error}"] = (NEW, "READY", failed, 2, told, "describe")


@pytest.mark.parametrize("name", PLAYS)
def test_what_resume_does(desk, name):
    options, states, runs, code, message, commands = PLAYS[name]
    found, told, ran = play(desk, options, states, runs)
    assert (found, ran) == (code, commands) and re.search(message, told), told


def test_restarts_wait_twice_as_long_each_time_and_begin_anew_after_a_run(desk):
    runs = " / ".join(["none", *["lost"] * 6, "running 7", *["lost"] * 2, "ended 0"])
    code, told, _ = play(desk, "--backoff 100 --poll 7", " / ".join(["READY"] * 11), runs)
    assert code == 0, told
    # The first start waits for nothing; a run that is seen going is looked at every --poll.
    assert sleeps(desk) == [100, 200, 400, 800, 900, 900, 7, 100, 200]
    assert "restart 8 of at most 20 in 200 s" in told  # --retries counts them all


@pytest.mark.parametrize("looked", ["slice", "workers"])
def test_looks_that_fail_say_why_and_end_after_the_retries(desk, looked):
    cause = "ssh: connect to host 10.0.0.2 port 22: Connection timed out"
    answers = ["!" + cause] * 2 + ["running 7"] + ["!" + cause] * 3
    states = answers[:2] + ["READY"] + answers[3:] if looked == "slice" else ["READY"] * 6
    runs = ["running 7"] if looked == "slice" else answers
    code, told, commands = play(desk, "--retries 2 --backoff 500", " / ".join(states), " / ".join(runs))
    # Only failures in a row count.
    assert (code, commands) == (2, "describe " * 5 + "describe")
    assert sleeps(desk) == [500, 900, 60, 500, 900]
    assert told.count(f"cannot look at pod:\n{cause}\nretry ") == 4
    end = "pod could not be looked at 3 times in a row. A run that is going goes on. The last error:"
    assert told.endswith(f"{end}\n{cause}\n")


def test_waiting_for_capacity_is_no_failure(desk):
    states = "WAITING_FOR_RESOURCES / PROVISIONING / " * 4 + "ACTIVE"
    assert play(desk, "--queued --retries 0", states, "ended 0")[0] == 0 and sleeps(desk) == [60] * 8
