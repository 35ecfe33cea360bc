"""Defines the `train` section: length, devices, checkpoints and reports of a run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from jaxblock.settings import AT_LEAST_1, NOT_NEGATIVE, ROWS, Section, between, may_change, require, setting

BestBy = Literal["none", "nelbo", "pass_at_1"]
OnHang = Literal["report", "abort"]


@dataclass(frozen=True)
class TrainConfig(Section, name="train"):
    """How long a run trains, on which devices, and what it saves and reports."""

    out: str = may_change("runs/run", common=("train",))
    """The run folder; an existing run is resumed or refused, never overwritten."""
    steps: int = setting(1000, AT_LEAST_1, common=("train",))
    """The number of optimizer updates. Under the schedule `constant` it can be raised later, on a stopped or finished run."""
    batch_size: int = setting(16, ROWS, common=("train", "plan"))
    """The sequences, or (example, block) pairs, per update, over all devices."""
    accumulate: int = may_change(1, AT_LEAST_1, common=("plan",))
    """The number of parts into which a batch is split to save memory; the update is that of the whole batch."""
    widths: Literal["auto", "full"] = may_change("auto")
    """Whether rows are computed at a few widths that fit their prompts (`auto`), or all at the canvas's width (`full`); what is
    learnt is the same, up to rounding."""
    seed: int = setting(0, NOT_NEGATIVE, common=("train",))
    """The seed of data order, draws and random weights."""
    resume: Literal["auto", "never", "must", "restart"] = may_change("auto", common=("train",))
    """Whether to go on from the run folder's last checkpoint: `auto` if there is one, `never` (an existing run is an error), `must`
    (a missing checkpoint is an error), `restart` (as `auto`, but a run whose checkpoints are all damaged begins again)."""
    log_every: int = may_change(20, AT_LEAST_1)
    """Steps between lines of metrics."""
    eval_every: int = may_change(500, NOT_NEGATIVE, common=("train",))
    """Steps between evaluations on the validation records; 0 for start and end only."""
    eval_problems: int = may_change(64, NOT_NEGATIVE)
    """Validation problems decoded for Pass@1; 0 for none."""
    samples: int | None = may_change(None, NOT_NEGATIVE)
    """Decoded validation problems whose responses are shown and kept in samples.jsonl; 0 for none, None for 2."""
    eval_nelbo_rows: int = may_change(64, NOT_NEGATIVE)
    """Validation rows of the NELBO; 0 for none."""
    save_every: int = may_change(500, AT_LEAST_1, common=("train",))
    """Steps between checkpoints; the last step is always saved."""
    keep: int = may_change(2, AT_LEAST_1)
    """The number of newest checkpoints that are kept."""
    tensorboard: bool = may_change(False)
    """Whether to write TensorBoard events."""
    loader_workers: int = may_change(0, between(0, 1024))
    """Worker processes that read data; 0 reads in threads of the main process."""
    debug: bool = may_change(False)
    """Whether to run without jit and with unrolled layers, find the layer and step of a NaN, and show the first batch as `inspect`
    does."""
    overfit_one_batch: bool = False
    """Whether to train only on the first batch, whose loss must then approach 0."""
    data_parallel: int = may_change(-1, common=("plan",))
    """Devices along the `data` mesh axis (of each slice); -1 for all that remain."""
    fsdp: int = may_change(1, AT_LEAST_1, common=("train", "plan"))
    """Devices along the `fsdp` mesh axis (parameters and optimizer state are split)."""
    tensor: int = may_change(1, AT_LEAST_1, common=("plan",))
    """Devices along the `tensor` mesh axis (heads, feed-forward columns and vocabulary are split)."""
    slices: int = may_change(1, AT_LEAST_1)
    """The number of TPU slices, joined by the data-centre network; only gradients are summed over it."""
    profile: tuple[int, int] | None = may_change(None)
    """The first and the last step of a trace in the run folder's `profile/` (also `--profile`); None for none."""
    wandb: Literal["off", "online", "offline"] = may_change("off")
    """Whether to write metrics to Weights & Biases too: over the network, or `offline` to files for `wandb sync`."""
    wandb_project: str = may_change("jaxblock")
    """The project at Weights & Biases; the run there has the run folder's name."""
    keep_every: int = may_change(0, NOT_NEGATIVE)
    """Steps between checkpoints that are kept for good (a multiple of `save_every`); 0 for none."""
    keep_steps: tuple[int, ...] = may_change((), AT_LEAST_1)
    """Single steps after which a checkpoint is saved too, and kept for good, as a curve over the length of training needs."""
    keep_best: BestBy = may_change("none")
    """The metric by which the best checkpoint is saved and kept besides the newest; `none` for no such checkpoint."""
    max_skipped: int = may_change(10, NOT_NEGATIVE)
    """The number of steps in a row with a loss or gradient that is not finite after which the run stops (each is skipped); 0 for
    never."""
    watchdog_seconds: float = may_change(1800.0, between(0, 10**8))
    """Seconds after which a step, save, evaluation or start that still runs is reported with all threads' stacks; 0 for never."""
    on_hang: OnHang = may_change("report")
    """What to do after a report of the watchdog: go on waiting (`report`), or end the process with exit code 124 (`abort`)."""

    @property
    def sample_count(self) -> int:
        """The number of samples of an evaluation, unless there are fewer validation records."""
        return min(2, self.eval_problems) if self.samples is None else self.samples

    def check(self) -> None:
        """Raises UserError where a number is out of range, or two fields of the section contradict each other."""
        super().check()
        require(
            self.sample_count <= self.eval_problems,
            f"train.samples is {self.samples}, but evaluations decode {self.eval_problems} problems: samples are taken from "
            "these, so raise train.eval_problems",
        )
        require(
            self.keep_every % self.save_every == 0,
            f"train.keep_every {self.keep_every} is no multiple of train.save_every {self.save_every}: nothing is saved there",
        )
        require(
            max(self.keep_steps, default=0) <= self.steps,
            f"train.keep_steps holds {max(self.keep_steps, default=0)}, after the last step, train.steps {self.steps}: it would "
            "never be saved",
        )
        for metric, name, count in (
            ("nelbo", "eval_nelbo_rows", self.eval_nelbo_rows),
            ("pass_at_1", "eval_problems", self.eval_problems),
        ):
            require(
                self.keep_best != metric or count > 0,
                f"train.keep_best is {metric}, but train.{name} is 0: set it above 0",
            )
        require(
            self.batch_size % self.accumulate == 0,
            f"train.batch_size {self.batch_size} does not split into train.accumulate {self.accumulate} parts: use a multiple",
        )
        require(
            self.data_parallel == -1 or self.data_parallel >= 1,
            f"train.data_parallel is {self.data_parallel}: it must be at least 1, or -1 for all devices that remain",
        )
        require(
            self.profile is None or len(self.profile) == 2 and 1 <= self.profile[0] <= self.profile[1] <= self.steps,
            f"train.profile is {' '.join(map(str, self.profile or ()))}: give the first and the last step of the trace, between 1 "
            f"and train.steps ({self.steps}); step 1 also compiles",
        )
