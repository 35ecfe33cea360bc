"""The `train` section."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class TrainConfig:
    """The training run."""

    out: str = "runs/run"
    """Run folder; an existing run is resumed or refused, never overwritten."""
    steps: int = 1000
    """Optimizer updates."""
    batch_size: int = 16
    """Sequences (or pairs) per update, over all devices."""
    accumulate: int = 1
    """Parts of a batch that go one after the other, to save memory; the update is that of the whole batch."""
    seed: int = 0
    """Seed of data order, draws and random weights."""
    resume: Literal["auto", "never", "must"] = "auto"
    """Go on from the run folder's last checkpoint: if there is one, never (an existing run is an error), or always."""
    log_every: int = 20
    """Steps between lines of metrics."""
    eval_every: int = 500
    """Steps between evaluations on the validation records; 0 for start and end only."""
    eval_problems: int = 64
    """Validation problems decoded for Pass@1; 0 for none."""
    eval_nelbo_rows: int = 64
    """Validation rows of the NELBO; 0 for none."""
    save_every: int = 500
    """Steps between checkpoints; the last step is always saved."""
    keep: int = 2
    """Newest checkpoints kept."""
    tensorboard: bool = False
    """Also write TensorBoard events."""
    loader_workers: int = 0
    """Worker processes that read data; 0 for threads."""
    debug: bool = False
    """No jit, unrolled layers, NaNs located to layer and step, the first batch shown as `inspect` shows it."""
    overfit_one_batch: bool = False
    """Train on the first batch alone: its loss must approach 0."""
    data_parallel: int = -1
    """Devices along the `data` mesh axis (of each slice); -1 for all that remain."""
    fsdp: int = 1
    """Devices along the `fsdp` mesh axis (parameters and optimizer state are split)."""
    tensor: int = 1
    """Devices along the `tensor` mesh axis (heads, feed-forward columns and vocabulary are split)."""
    slices: int = 1
    """TPU slices joined by the data-centre network: only gradients are summed over it."""
    profile: tuple[int, int] | None = None
    """First and last step of a trace in the run folder's `profile/` (also `--profile`); None for none."""
    wandb: Literal["off", "online", "offline"] = "off"
    """Also write metrics to Weights & Biases: over the network, or to files for `wandb sync`."""
    wandb_project: str = "jaxblock"
    """Its project there; the run has the run folder's name."""
    keep_every: int = 0
    """Keep the checkpoints of every so many steps for good (a multiple of `save_every`); 0 for none."""
    keep_best: Literal["none", "nelbo", "pass_at_1"] = "none"
    """Save at every evaluation that is the best so far by this metric, and keep the best one besides the newest."""
    max_skipped: int = 10
    """Stop after so many steps in a row whose loss or gradient is not finite (each is skipped); 0 for never."""
    watchdog_seconds: float = 1800.0
    """A step, save, evaluation or start that takes longer is reported with the stacks of all threads; 0 for never."""
    on_hang: Literal["report", "abort"] = "report"
    """After such a report: go on waiting, or end the process with exit code 124."""
