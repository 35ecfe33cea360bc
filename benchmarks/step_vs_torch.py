"""Compares a train step with PyTorch: the paper's step written with transformers' Llama, and ours doing the same job.

The job is: context ``paper``, one active block a row, masks at a rate of U(1e-3, 1), masked mean per row, mean over rows;
gradient clipped to norm 1, AdamW, float32. PyTorch is measured twice: with logits at every position, as the published
script computes them (`full head`), and with logits at the masked positions alone (`masked head`), which is the least that
the loss needs. Ours computes them at the active block. FLOP/s count what each does. All start from the same weights and are
given the same noised batch; the script first checks that they compute the same loss, and that the Llama is bidirectional.
They then take turns; a ratio is the median over the turns. One layer's matrix products, forward and backward, are timed in both
libraries in the same way, since they are most of a step: what these differ by, neither side's code can change.

    pip install -r benchmarks/requirements.txt
    python -m benchmarks.step_vs_torch
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.small_network import network, seconds
from benchmarks.step_profile import MATRICES, both_ways
from jaxblock.data.loader import Batch
from jaxblock.diffusion import layouts
from jaxblock.diffusion.config import CanvasConfig, MethodConfig
from jaxblock.diffusion.corruption import corrupt
from jaxblock.models.linear.dense import dense
from jaxblock.models.linear.fsdp import Split
from jaxblock.models.spec import flatten, matmul_flops_per_token
from jaxblock.models.transformer import Transformer
from jaxblock.parallel import rules
from jaxblock.parallel.host_memory import keep_freed_memory
from jaxblock.parallel.mesh import make_mesh
from jaxblock.training.optim.config import OptimizerConfig
from jaxblock.training.optim.make import make_optimizer
from jaxblock.training.state import create_state
from jaxblock.training.step import Learner, Objective, jit_step
from jaxblock.types import Params

NAMES = {
    "blocks/attn_norm": "model.layers.{layer}.input_layernorm.weight",
    "blocks/q": "model.layers.{layer}.self_attn.q_proj.weight",
    "blocks/k": "model.layers.{layer}.self_attn.k_proj.weight",
    "blocks/v": "model.layers.{layer}.self_attn.v_proj.weight",
    "blocks/o": "model.layers.{layer}.self_attn.o_proj.weight",
    "blocks/mlp_norm": "model.layers.{layer}.post_attention_layernorm.weight",
    "blocks/gate": "model.layers.{layer}.mlp.gate_proj.weight",
    "blocks/up": "model.layers.{layer}.mlp.up_proj.weight",
    "blocks/down": "model.layers.{layer}.mlp.down_proj.weight",
    "embed": "model.embed_tokens.weight",
    "final_norm": "model.norm.weight",
    "head": "lm_head.weight",
}
"""The names of our parameters in transformers' Llama."""

PAPER = MethodConfig(
    law="floored_bernoulli", weighting="masked_mean", normalize="sequences", blocks="pairs", objective="blockwise"
)


def llama(net: Transformer, params: Any) -> LlamaForCausalLM:
    """Makes transformers' Llama with our weights, which is bidirectional when it is given an all-visible 4-d mask."""
    arch = net.arch
    config = LlamaConfig(
        hidden_size=arch.d_model,
        num_hidden_layers=arch.n_layers,
        num_attention_heads=arch.n_heads,
        num_key_value_heads=arch.n_kv_heads,
        intermediate_size=arch.mlp_dim,
        vocab_size=arch.vocab_size,
        rms_norm_eps=arch.norm_eps,
        rope_theta=arch.rope_theta,
        tie_word_embeddings=False,
        use_cache=False,
    )
    model = LlamaForCausalLM(config).float()
    tensors = {}
    for path, leaf in flatten(params).items():
        spec, array = net.param_table[path], np.array(leaf)
        for layer, part in enumerate(array) if spec.stacked else [(0, array)]:
            tensors[NAMES[path].format(layer=layer)] = torch.from_numpy(
                part.T.copy() if spec.transpose else part.copy()
            )
    model.load_state_dict(tensors, strict=True)
    return model


def check_bidirectional(model: LlamaForCausalLM, width: int) -> None:
    """Asserts that changing the last token changes the first position's logits."""
    ids = torch.randint(0, model.config.vocab_size, (1, width))
    other = ids.clone()
    other[0, -1] = (other[0, -1] + 1) % model.config.vocab_size
    with torch.no_grad():
        first, second = (model(i, attention_mask=visible(1, width)).logits[0, 0] for i in (ids, other))
    assert not torch.equal(first, second), "the mask left the model causal"


def visible(batch: int, width: int) -> torch.Tensor:
    """Returns an additive attention mask that hides nothing."""
    return torch.zeros(batch, 1, width, width)


def full_head_loss(
    model: LlamaForCausalLM, noisy: torch.Tensor, clean: torch.Tensor, masked: torch.Tensor
) -> torch.Tensor:
    """Computes the published script's loss: cross-entropy at every position, masked mean per row, mean over rows."""
    logits = model(noisy, attention_mask=visible(*noisy.shape)).logits
    each = torch.nn.functional.cross_entropy(logits.flatten(0, 1), clean.flatten(), reduction="none").view(clean.shape)
    return ((each * masked).sum(1) / masked.sum(1).clamp(min=1)).mean()


def masked_head_loss(
    model: LlamaForCausalLM, noisy: torch.Tensor, clean: torch.Tensor, masked: torch.Tensor
) -> torch.Tensor:
    """Computes the same loss, with logits at the masked positions alone."""
    hidden = model.model(noisy, attention_mask=visible(*noisy.shape)).last_hidden_state
    each = torch.nn.functional.cross_entropy(model.lm_head(hidden[masked]), clean[masked], reduction="none")
    weights = (masked / masked.sum(1, keepdim=True).clamp(min=1))[masked]
    return (each * weights).sum() / len(masked)


LOSSES = {"full head": full_head_loss, "masked head": masked_head_loss}
"""The losses of PyTorch's variants."""


def random_batch(batch: int, canvas: CanvasConfig, vocab: int) -> Batch:
    """Makes random prompts and responses that fill the canvas, each with one of its blocks drawn."""
    rng = np.random.default_rng(0)
    prompt = rng.integers(2, vocab - 1, (batch, canvas.prompt_len), dtype=np.int32)
    response = rng.integers(2, vocab - 1, (batch, canvas.response_len), dtype=np.int32)
    full = np.full(batch, canvas.prompt_len, np.int32), np.full(batch, canvas.response_len, np.int32)
    block = rng.integers(0, canvas.response_len // canvas.block, batch).astype(np.int32)
    rows = np.arange(batch, dtype=np.int32)
    return Batch(prompt, full[0], response, full[1], block, rows, rows)


def flops(net: Transformer, batch: int, width: int, head_positions: int) -> float:
    """Counts the FLOPs of the matmuls forward and backward, with the head at ``head_positions`` positions of each row."""
    body = width * matmul_flops_per_token(net.param_table, net.arch, width, head=False)
    return 3 * batch * (body + head_positions * 2.0 * net.arch.vocab_size * net.arch.d_model)


def matmul_peaks(size: int) -> dict[str, float]:
    """Measures the FLOP/s of a large square matrix product in each library, the best of five."""
    ours = jax.jit(lambda a: jnp.matmul(a, a, precision="highest"))
    a, b = jnp.ones((size, size)), torch.ones(size, size)
    ours(a).block_until_ready()
    best = {
        "jaxblock": min(seconds(lambda: ours(a)) for _ in range(5)),
        "PyTorch": min(seconds(lambda: torch.matmul(b, b)) for _ in range(5)),
    }
    return {name: 2 * size**3 / seconds for name, seconds in best.items()}


class Job(NamedTuple):
    """Holds what all contestants compute.

    Attributes:
        net: our network.
        params: the weights at the start.
        objective: our loss.
        rows: the batch before it is noised.
        noised: the batch for PyTorch: noised ids, true ids, and which positions are masked.
    """

    net: Transformer
    params: Params
    objective: Objective
    rows: Batch
    noised: tuple[torch.Tensor, ...]


def make_job(batch: int, args: argparse.Namespace) -> Job:
    """Makes the network, and a batch with the masks that our first step draws."""
    canvas = CanvasConfig(args.canvas // 2, args.canvas // 2, args.block, "paper")
    arch, net, params = network(args)
    layout = layouts.training_layout(canvas, PAPER, arch, (1,))
    objective, rows = Objective(net, layout, PAPER, 0, batch), random_batch(batch, canvas, args.vocab)
    laid = objective.canvas(rows)
    draws, _ = objective.draw(rows, laid, 0)
    draw = jax.tree.map(lambda leaf: leaf[0], draws)
    seen, _ = corrupt(layout, laid, draw)
    masked = np.zeros(seen.ids.shape, bool)
    np.put_along_axis(masked, np.asarray(seen.active), np.asarray(draw.masked), 1)
    noisy, clean = (torch.from_numpy(np.array(ids)).long() for ids in (seen.ids, laid.ids))
    return Job(net, params, objective, rows, (noisy, clean, torch.from_numpy(masked)))


def our_step(job: Job) -> Callable[[], Any]:
    """Returns our train step with its state, compiled; it takes over the job's weights."""
    net, mesh = job.net, make_mesh(1, devices=jax.devices()[:1])
    optimizer = make_optimizer(OptimizerConfig(lr=1e-5, schedule="constant", warmup_steps=0), 1000, net.param_table)
    with jax.set_mesh(mesh):
        # The step would be compiled again for its own result if the first weights were not placed as that is.
        params = jax.device_put(job.params, rules.param_shardings(mesh, net.param_table))
        state = create_state(params, optimizer, mesh, net.param_table)
        step_fn = jit_step(Learner(net, job.objective, optimizer), state, mesh)

    def step() -> Any:
        nonlocal state
        with jax.set_mesh(mesh):
            state, metrics = step_fn(state, job.rows, {})
        return metrics

    return step


def torch_steps(job: Job, model: LlamaForCausalLM) -> dict[str, Callable[[], Any]]:
    """Returns PyTorch's train step with each loss; they train the same model."""
    adam = torch.optim.AdamW(model.parameters(), lr=1e-5, betas=(0.9, 0.95), weight_decay=0.0)

    def step(loss: Callable[..., torch.Tensor]) -> None:
        adam.zero_grad()
        loss(model, *job.noised).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adam.step()

    return {name: partial(step, loss) for name, loss in LOSSES.items()}


def layer_products(job: Job, positions: int) -> dict[str, Callable[[], Any]]:
    """Returns the products of one layer's matrices with ``positions`` vectors in each library, forward and backward."""
    weights = [np.array(job.params["blocks"][name][0]) for name in MATRICES]
    inputs = [np.ones((positions, len(w)), np.float32) for w in weights]
    split = Split((None, None), (None, None))

    def products(inputs: Any, weights: Any) -> Any:
        return [dense(x[None], w, split=split) for x, w in zip(inputs, weights, strict=True)]

    # As PyTorch's linear layers hold them: outputs first.
    theirs = [
        (torch.from_numpy(x).requires_grad_(), torch.from_numpy(w.T.copy()).requires_grad_())
        for x, w in zip(inputs, weights, strict=True)
    ]

    def by_torch() -> None:
        for pair in theirs:
            pair[0].grad = pair[1].grad = None
        results = [torch.nn.functional.linear(x, w) for x, w in theirs]
        torch.autograd.backward(results, [torch.ones_like(result) for result in results])

    return {"jaxblock": both_ways(products, inputs, weights), "PyTorch": by_torch}


def compare(batch: int, args: argparse.Namespace) -> dict[str, Any]:
    """Checks that all contestants do the same job, then times them in turns.

    Returns:
        The loss; each contestant's median ``seconds`` of a step and its ``flops``; the median seconds of one layer's ``products`` in
        each library; and the median of PyTorch's time over ours, the least and the most, under each variant's name and under
        "one layer's products".
    """
    job = make_job(batch, args)
    model = llama(job.net, job.params)
    check_bidirectional(model, args.canvas)
    found = job.objective(job.params, job.rows, jnp.int32(0)).loss
    ours = float(found.total / found.weight)
    for name, loss in LOSSES.items():
        theirs = float(loss(model, *job.noised).detach())
        assert abs(ours - theirs) <= 2e-5 * abs(theirs), (name, ours, theirs)

    products = layer_products(job, batch * args.canvas)
    steps = {"jaxblock": our_step(job), **torch_steps(job, model)}
    turns, of_layer = take_turns(steps, args.repeat), take_turns(products, 5 * args.repeat)
    masked = float(job.noised[2].sum()) / batch
    heads = {"jaxblock": args.block, "full head": args.canvas, "masked head": masked}
    ratios = {name: sorted(turn[name] / turn["jaxblock"] for turn in turns) for name in LOSSES}
    ratios["one layer's products"] = sorted(turn["PyTorch"] / turn["jaxblock"] for turn in of_layer)
    return {
        "loss": ours,
        "seconds": {name: statistics.median(turn[name] for turn in turns) for name in steps},
        "products": {name: statistics.median(turn[name] for turn in of_layer) for name in products},
        "flops": {name: flops(job.net, batch, args.canvas, head) for name, head in heads.items()},
        **{name: (statistics.median(each), each[0], each[-1]) for name, each in ratios.items()},
    }


def take_turns(programs: dict[str, Callable[[], Any]], repeat: int) -> list[dict[str, float]]:
    """Runs all programs once to warm up, then ``repeat`` times in turns; returns the seconds of each turn."""
    for program in programs.values():
        seconds(program)
    return [{name: seconds(program) for name, program in programs.items()} for _ in range(repeat)]


def show(batch: int, row: dict[str, Any], peaks: dict[str, float], layers: int) -> None:
    """Prints what ``compare`` found."""
    print(f"batch {batch:3}: same loss {row['loss']:.5f}")
    for name, time in row["seconds"].items():
        library = "jaxblock" if name == "jaxblock" else "PyTorch"
        rate, share = row["flops"][name] / time, layers * row["products"][library] / time
        print(
            f"batch {batch:3} {name:11} {1 / time:8.3f} steps/s, {row['flops'][name] / 1e9:8.1f} GFLOP a step, "
            f"{rate / 1e9:8.1f} GFLOP/s ({rate / peaks[library]:.0%} of its peak), products of the layers {share:.0%} of it"
        )
    for name in (*LOSSES, "one layer's products"):
        middle, least, most = row[name]
        print(f"batch {batch:3} PyTorch's time with {name} over jaxblock's: {middle:.2f} ({least:.2f} to {most:.2f})")


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Prints the steps per second, FLOP/s and matmul peak of all contestants, and what their matrix products take."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = {
        "d": 512,
        "layers": 8,
        "canvas": 256,
        "block": 32,
        "vocab": 32_000,
        "repeat": 3,
        "threads": 2,
        "peak": 2048,
    }
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--batch", type=int, nargs="+", default=[4, 16])
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    peaks = matmul_peaks(args.peak)
    print(f"d {args.d}, {args.layers} layers, canvas {args.canvas}, block {args.block}, vocabulary {args.vocab:,}")
    print(f"matmul peak GFLOP/s: PyTorch {peaks['PyTorch'] / 1e9:.0f}, jaxblock {peaks['jaxblock'] / 1e9:.0f}")
    results = []
    for batch in args.batch:
        row = compare(batch, args)
        show(batch, row, peaks, args.layers)
        results.append(row)
    return results


if __name__ == "__main__":
    keep_freed_memory()  # as the command line does
    main()
