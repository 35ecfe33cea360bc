"""Tests launch/tpu.sh resume against a stand-in for gcloud: what it starts again, what it waits for and when it ends."""

import shlex
from typing import Any

import pytest

from tests.launch.conftest import put

NEW = "--recreate --type v6e-8"
WHERE = "ERROR: (gcloud.compute.tpus.tpu-vm.describe)"
REFUSED = "ERROR: (gcloud.compute.tpus.tpu-vm.create) INVALID_ARGUMENT: no accelerator type v9-8"


def play(desk: Any, options: str, states: str, runs: str) -> tuple[int, str, str]:
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


def sleeps(desk: Any) -> list[int]:
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
        2, f"{REFUSED}\n", "describe create"),
    "gone": (NEW, f"!{WHERE} NOT_FOUND: Resource 'projects/p/locations/us-east5-a/nodes/pod' was not found / READY",
        "ended 0", 0, "", "describe create scp ssh run describe"),
    # What follows is no lost slice.
    "a failed look": (NEW, "!503 / READY", "ended 0", 0, "", "describe describe"),
    "a broken gcloud": (NEW, "!gcloud: line 9: python3: not found / READY", "ended 0", 0, "", "describe describe"),
    "no state": (NEW, " / READY", "ended 0", 0, "", "describe describe"),
}
# fmt: on


@pytest.mark.parametrize("name", PLAYS)
def test_what_resume_does(desk, name):
    options, states, runs, code, message, commands = PLAYS[name]
    found, told, ran = play(desk, options, states, runs)
    assert (found, ran) == (code, commands) and message in told, told
    assert REFUSED not in told or "--type" in told.splitlines()[-1]


def test_restarts_wait_twice_as_long_each_time_and_begin_anew_after_a_run(desk):
    runs = " / ".join(["none", *["lost"] * 6, "running 7", *["lost"] * 2, "ended 0"])
    code, told, _ = play(desk, "--backoff 100 --poll 7", " / ".join(["READY"] * 11), runs)
    assert code == 0, told
    # The first start waits for nothing; a run that is seen going is looked at every --poll.
    assert sleeps(desk) == [100, 200, 400, 800, 900, 900, 7, 100, 200]
    assert "restart 8 of at most 20 in 200 s" in told  # --retries counts them all


# fmt: off
REFUSALS = [
    ("PERMISSION_DENIED: Permission 'tpu.nodes.get' denied on 'projects/p/nodes/pod'", "roles/tpu.admin"),
    ("PERMISSION_DENIED: Cloud TPU API has not been used in project 1 before or it is disabled.", "services enable"),
    ("UNAUTHENTICATED: Request had invalid authentication credentials.", "gcloud auth login"),
    ("INVALID_ARGUMENT: Location us-east5-z is not a zone", "Correct --name, --zone"),
    ("NOT_FOUND: Project 'nobody' was not found", "Correct --zone us-east5-a or --project"),
    ("The required property [project] is not currently set.", "--project PROJECT"),
]
# fmt: on


@pytest.mark.parametrize(("error", "advice"), REFUSALS)
@pytest.mark.parametrize("looked", ["slice", "workers"])
def test_what_gcloud_will_always_refuse_ends_resume_at_once(desk, error, advice, looked):
    failed = f"!{WHERE} {error}"
    states, runs = (failed, "") if looked == "slice" else ("READY", failed)
    code, told, commands = play(desk, NEW, states, runs)
    assert (code, commands) == (2, "describe")
    assert failed[1:] in told and advice in told.splitlines()[-1]


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
