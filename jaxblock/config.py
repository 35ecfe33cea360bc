"""Every setting of every verb, as frozen dataclasses: the one source of YAML keys, command-line flags and ``--help``.

A YAML file holds sections (``data``, ``canvas``, ``model``, ...). All verbs read the same file and each uses the
sections it needs, so that one file describes an experiment. Precedence: flag > YAML file > default.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from jaxblock.types import (
    Alignment,
    Blocks,
    Context,
    EosSuppression,
    FactorRule,
    Law,
    Normalize,
    Quota,
    RuleName,
    Weighting,
)

RecipeName = Literal["metamathqa", "gsm8k", "math"]
"""Data sets that `prepare` knows by name (jaxblock/data/recipes.py)."""


@dataclass(frozen=True)
class DataConfig:
    """Where text comes from, how it becomes tokens, and where the prepared result lies."""

    prepared: str = "prepared"
    """Folder of prepared data: `prepare` writes it, every other verb reads it."""
    train: str = "builtin"
    """Training records: a .jsonl, .json or .parquet file, `hf:NAME[@REVISION][:CONFIG][#SPLIT]` (the `datasets` library),
    or `builtin`: the recipe's own source, else generated arithmetic word problems."""
    validation: str | None = None
    """Records scored during training; None takes `validation_records` of them from the training records (for generated
    ones: held-out problems)."""
    test: str | None = "builtin"
    """Records for `decode` and `evaluate`, never trained on and never scored during training; None for none."""
    validation_records: int = 128
    """How many validation records to set apart when `validation` is None; a conversation counts as one, and is never split."""
    recipe: RecipeName | None = None
    """Field names, prompt, length rule and filter of a data set that the paper uses (docs/data.md); a field set here wins."""
    test_recipe: RecipeName | None = None
    """Recipe whose field names (and source, where `test` is `builtin`) the test records have; None for the training records'."""
    prompt_field: str | None = None
    """Field that holds the prompt; None for the recipe's, else `question`."""
    response_field: str | None = None
    """Field that holds the response; None for the recipe's, else `answer`."""
    messages_field: str = "messages"
    """Field of chat records ({"messages": [{"role": ..., "content": ...}]})."""
    turns: Literal["last", "all"] = "last"
    """Which assistant turns of a chat record are supervised: the last, or all, one row each (later turns absent)."""
    prompt_template: str | None = None
    """What a prompt is put into, at `{prompt}` (chat records are left alone); None for the recipe's, else the prompt itself."""
    type_field: str = "type"
    """Field that `exclude_types` looks at."""
    exclude_types: tuple[str, ...] | None = None
    """Training records whose type contains one of these texts are dropped and counted; None for the recipe's, else none."""
    max_total_len: int | None = None
    """Training records with more prompt and response tokens together are dropped and counted; None for the recipe's, else 0:
    no such rule."""
    max_records: int | None = None
    """Keep the first so many training records that pass; None for the recipe's, else 0: all."""
    level: str = "easy"
    """Difficulty of the built-in corpus."""
    builtin_train: int = 6_000
    """Built-in training problems."""
    builtin_test: int = 512
    """Built-in held-out problems."""
    seed: int = 0
    """Seed of the built-in corpus and of the validation split."""
    template: str = "chat"
    """Chat template: `chat` (LLaDA's header layout), `plain` (Question/Answer), `tokenizer` (the checkpoint's own), or a Jinja file."""
    system: str | None = None
    """System message put before every conversation that has none of its own."""
    tokenizer: str = "train"
    """`train` fits a SentencePiece model on the training text; else a path to a .model, a tokenizer.json or a folder, or a
    hub name."""
    tokenizer_type: Literal["bpe", "unigram", "word", "char"] = "bpe"
    """SentencePiece model type, when one is trained."""
    vocab_size: int = 1024
    """Largest vocabulary of a trained tokenizer, special tokens and 256 bytes included."""
    split_digits: bool = False
    """Trained tokenizer: every digit is its own token."""
    mask_token: str | None = None
    """The mask token's text; None for the checkpoint's own (a trained tokenizer: <|mdm_mask|>). A start that has none may name
    an unused token here."""
    add_mask_token: bool = False
    """Add `mask_token` to the vocabulary of a tokenizer.json that lacks it, as the next id."""
    eos_token: str | None = None
    """End of sequence, fills the rest of the terminator's block; None for the checkpoint's own (trained: <|endoftext|>)."""
    eot_token: str | None = None
    """Ends a response; None for the token that the template writes there (trained: <|eot_id|>)."""
    overlong: Literal["error", "drop", "truncate"] = "error"
    """A prompt or response longer than the canvas: stop; drop and count it; or cut the response, which then has no
    terminator (an over-long prompt is dropped even so)."""
    overwrite: bool = False
    """Replace an existing prepared folder."""


@dataclass(frozen=True)
class CanvasConfig:
    """The canvas that training and decoding share."""

    prompt_len: int = 64
    """Longest prompt in tokens."""
    response_len: int = 32
    """R: response positions, a multiple of `block`."""
    block: int = 8
    """B: response positions of a block."""
    context: Context = "aligned"
    """What surrounds the active block in training: the decoder's own view, or the published training script's."""
    total_len: int | None = None
    """`paper` context: canvas positions of prompt and response together, filled to the end; None for the sum of both."""
    suffix_window: int | None = None
    """Ablation: visible positions after the active block, in training and decoding alike; None for all."""


@dataclass(frozen=True)
class MethodConfig:
    """The objective: what is masked, and how its loss is weighed."""

    objective: Literal["blockwise", "classical"] = "blockwise"
    """`blockwise` supervises one active block a draw; `classical` masks tokens all over the response (LLaDA's SFT)."""
    law: Law = "exact_count"
    """How the masked set of a block is drawn (docs/method.md)."""
    weighting: Weighting = "nelbo"
    """Weight of a masked token: unbiased for the NELBO, 1 / masked tokens of the row (the paper's script), or 1."""
    normalize: Normalize = "text_tokens"
    """What the summed loss is divided by; every choice depends on the data alone, never on the draw."""
    blocks: Blocks = "per_sequence"
    """`per_sequence`: draw blocks of each sequence; `pairs`: an epoch visits every (example, block) pair once."""
    draws: int = 1
    """K: draws per sequence and step, by jax.vmap (`per_sequence`: distinct blocks; `pairs`: masks of one block)."""
    prefix_mask_rate: float = 0.0
    """Ablation: chance that a response token before the active block is masked (never the prompt)."""
    suffix_mask_prob: float = 1.0
    """Ablation: chance that a response token after the active block is masked."""


@dataclass(frozen=True)
class ModelConfig:
    """Where the network comes from and how it runs; the sizes matter for a random start only."""

    init_from: str | None = None
    """A run folder, a Hugging Face folder or a hub id (`org/name`) to start from; None starts from random weights."""
    init_step: Literal["latest", "best"] | int = "latest"
    """Which checkpoint of a run to start from: the newest, the best by its `train.keep_best`, or that of a step."""
    alignment: Alignment | None = None
    """Logit alignment of an autoregressive start (Llama, Qwen): `shifted` keeps its next-token skill, `same_position` is
    LLaDA's; None for `shifted`. The diffusion families have their own."""
    quantize: Literal["none", "int8"] = "none"
    """Keep the layers' matrices in int8: half of bfloat16's memory. For the frozen base of LoRA only."""
    family: Literal["llada", "dream", "llama", "qwen2", "qwen3"] = "llada"
    """Architecture of a random start."""
    d_model: int = 128
    """Width."""
    n_layers: int = 4
    """Layers."""
    n_heads: int = 4
    """Query heads."""
    n_kv_heads: int | None = None
    """Key/value heads; None for as many as query heads."""
    mlp_dim: int = 384
    """Width of the feed-forward layer."""
    max_len: int = 4096
    """Longest sequence, recorded in the checkpoint."""
    rope_theta: float = 500_000.0
    """Rotary base."""
    norm_eps: float = 1e-5
    """Added to the mean square in RMSNorm."""
    tie_embeddings: bool = False
    """The head is the transposed embedding."""
    init_std: float | None = None
    """Standard deviation of random weights (outputs into the residual stream: over sqrt(2 layers)); None for Mitchell's."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Compute and activation type (softmax, norms and loss are float32 in any case)."""
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    """Storage type of the weights."""
    remat: Literal["none", "dots", "full", "offload"] = "none"
    """What the backward pass recomputes: nothing, all but matmuls, or whole layers; `offload` keeps the layers' inputs in
    the host's memory besides."""
    loss_chunk: int | None = None
    """Positions of a row whose logits are held at once (classical SFT needs those of all); None for all."""
    attention: Literal["auto", "xla", "splash", "cudnn", "reference"] = "auto"
    """Attention backend: `auto` takes the platform's (`splash` on TPU, `cudnn` on NVIDIA GPUs, `xla` on CPU; the first two
    for bfloat16 alone); `reference` is the plain oracle."""
    scan_layers: bool = True
    """Run layers by lax.scan (compiles once); False unrolls them (debugging, and faster on a CPU for few layers)."""


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters: the weights stay as they are, and only the adapters are trained, saved and exported."""

    rank: int = 0
    """Rank of the adapters; 0 trains the whole network."""
    alpha: float = 16.0
    """The adapters' output is multiplied by alpha / rank."""
    dropout: float = 0.0
    """Chance that an input of an adapter is dropped in training."""
    targets: tuple[str, ...] = ("all",)
    """Adapted matrices: `all`, or some of q, k, v, o, gate, up, down (the same names for every family), or the
    checkpoint's own module names."""
    unmatched: Literal["error", "ignore"] = "error"
    """A target that matches no matrix: stop, or go on without it (the paper's names match 4 of 7 on LLaDA)."""


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW or Adafactor with a schedule and clipping (docs/optimizer.md)."""

    name: Literal["adamw", "adafactor"] = "adamw"
    """`adafactor` keeps one number per row and column of a matrix instead of a second moment per weight."""
    lr: float = 1e-3
    """Peak learning rate."""
    schedule: Literal["cosine", "linear", "constant", "deepspeed_cosine"] = "cosine"
    """Decay after the warm-up, to `final_ratio` of the peak at the last step; `deepspeed_cosine` is DeepSpeed's WarmupCosineLR."""
    warmup_steps: int = 50
    """Updates of linear warm-up; update 0 has a learning rate above 0. (`deepspeed_cosine`: from `warmup_floor`, at least 2.)"""
    warmup: Literal["linear", "log"] = "linear"
    """`deepspeed_cosine`: shape of the warm-up. DeepSpeed's own default is `log`."""
    warmup_floor: float = 0.0
    """`deepspeed_cosine`: learning rate at the start of the warm-up, as a share of the peak."""
    scheduler_steps: Literal["before_update", "after_update"] = "before_update"
    """`deepspeed_cosine`: `after_update` is the order of DeepSpeed's engine: one update late, the first with a learning rate of 0."""
    final_ratio: float = 0.0
    """Learning rate at the end, as a share of the peak."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    decay: Literal["matrices", "all"] = "matrices"
    """Which parameters decay; `all` includes norms, as the peers' AdamW does."""
    b1: float = 0.9
    """First-moment decay; 0 keeps no first moment under `adafactor`."""
    b2: float = 0.95
    """Second-moment decay."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    clip_norm: float = 1.0
    """Clip the gradient's global norm; 0 for never."""
    ema: float = 0.0
    """Decay of a moving average of what is trained, which evaluations, `decode` and `export` then use; 0 for none."""
    moments: Literal["float32", "bfloat16", "int8"] = "float32"
    """Storage of the moments: 8, 4 or 2 bytes a weight for AdamW's two."""
    rounding: Literal["stochastic", "nearest"] = "stochastic"
    """How updated bfloat16 weights are rounded (float32 ones are not); to the nearest, small updates are lost."""


@dataclass(frozen=True)
class DecodeConfig:
    """The blockwise decoder."""

    response_len: int | None = None
    """R; None for the canvas's."""
    block: int | None = None
    """B; None for the canvas's."""
    steps_per_block: int | None = None
    """Decode steps of a block; None for one token a step. `confidence_threshold` and `factor` take as many as they need."""
    rule: RuleName = "low_confidence"
    """Transfer rule. A quota of positions: the most confident ones by LLaDA's `low_confidence` or Dream's `maskgit_plus`,
    `topk_margin` or `entropy`, or `random` ones. No quota: `confidence_threshold`, `factor`, or Dream's `origin` (each
    position by chance)."""
    quota: Quota = "even"
    """How a block's masks are split over its steps: LLaDA's `even`, dllm's linear rounding, or Dream's time grid."""
    eps: float = 1e-3
    """End of Dream's time grid, for `quota` dream and `rule` origin."""
    threshold: float = 0.9
    """`confidence_threshold`: commit every token at least this confident (always the best one)."""
    factor: float = 1.0
    """`factor`: accept rank n while (n + 1)(1 - confidence) <= factor."""
    factor_rule: FactorRule = "strict"
    """`factor`: `strict` stops at the first failure; `v1` (Fast-dLLM's later code) accepts it where it is the last rank."""
    temperature: float = 0.0
    """Sampling temperature (Gumbel noise); 0 is greedy."""
    top_p: float | None = None
    """Draw from the most probable tokens up to the one that takes their sum above this; None for all. Dream's rules also
    measure confidence on what is left."""
    top_k: int | None = None
    """Draw from so many most probable tokens (after `top_p`); None for all."""
    alg_temp: float = 0.0
    """Draw the quota's positions without replacement from softmax(confidence / alg_temp); 0 takes the most confident."""
    cfg_scale: float = 0.0
    """Classifier-free guidance: un + (scale + 1)(cond - un); 0 for none."""
    eos_suppression: EosSuppression = "none"
    """Forbid the fill token (`logits`), or rank stop tokens last (`confidence`)."""
    early_stop: bool = True
    """Stop a row after the block that holds a stop token."""
    stop_ids: tuple[int, ...] | None = None
    """Tokens that end a response; None for the checkpoint's own (end of turn and end of sequence)."""
    fill_id: int | None = None
    """The token after a response's end; None for the checkpoint's end of sequence."""
    seed: int = 0
    """Seed of sampling; each prompt's key comes from its index."""
    batch_size: int = 64
    """Prompts decoded together."""


@dataclass(frozen=True)
class EvaluateConfig:
    """Scoring."""

    split: Literal["test", "validation", "train"] = "test"
    """Which prepared records to score."""
    problems: int | None = None
    """Score only the first so many; None for all."""
    grader: Literal["gsm8k_strict", "gsm8k_flexible", "math_boxed", "exact"] = "gsm8k_strict"
    """How an answer is read off a response (named with every number)."""
    nelbo: bool = True
    """Also estimate the NELBO."""
    nelbo_samples: int | None = None
    """Masked sets per block, stratified by count; None for one of each count. Exact by enumeration where 2^B - 1 is not more."""
    nelbo_rows: int | None = 256
    """Rows of the NELBO estimate; None for all."""
    compare: str | None = None
    """A per-problem file of an earlier evaluation on the same problems: adds McNemar's paired test."""


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


@dataclass(frozen=True)
class Config:
    """All sections of a YAML file."""

    data: DataConfig = field(default_factory=DataConfig)
    canvas: CanvasConfig = field(default_factory=CanvasConfig)
    method: MethodConfig = field(default_factory=MethodConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    decode: DecodeConfig = field(default_factory=DecodeConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
