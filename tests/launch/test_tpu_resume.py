"""Tests launch/tpu.sh resume against a stand-in for gcloud: what it starts again, what it waits for and when it ends."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.launch.gcloud import SLICE, Desk


@pytest.fixture
def played(desk: Desk, tmp_path: Path) -> Callable[..., tuple[subprocess.CompletedProcess[str], list[str]]]:
    """Returns a function that runs ``resume`` while gcloud answers from a script.

    The script lists the states of the slice and of the workers' runs, in order. Waiting takes no time; how long ``resume``
    wanted to wait is written to the file ``sleeps``. The function returns the finished process and the kinds of commands
    that were run.
    """
    (tmp_path / "quick").mkdir()
    sleep = tmp_path / "quick" / "sleep"
    # Ends a resume that would go on for ever.
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
