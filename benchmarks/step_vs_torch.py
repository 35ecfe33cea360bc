"""Compares a train step with PyTorch: the paper's step written with transformers' Llama, and ours doing the same job.

The job is: context ``paper``, one active block a row, masks at a rate of U(1e-3, 1), masked mean per row, mean over rows;
gradient clipped to norm 1, AdamW, float32. The PyTorch side computes logits at every position, as the published script
does; ours computes them at the active block: the same loss for less work, so FLOP/s count what each side does. Both
start from the same weights and are given the same noised batch; the script first checks that they compute the same loss,
and that the Llama is bidirectional. They then take turns; the ratio is the median of the pairs' ratios.

    pip install -r benchmarks/requirements.txt
    python -m benchmarks.step_vs_torch
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from jaxblock import build
from jaxblock.data.loader import Batch
from jaxblock.diffusion import layouts
from jaxblock.diffusion.config import CanvasConfig, MethodConfig
from jaxblock.diffusion.corruption import corrupt
from jaxblock.models.config import ModelConfig
from jaxblock.models.families import registry
from jaxblock.models.spec import flatten, init_params, matmul_flops_per_token
from jaxblock.models.transformer import Transformer
from jaxblock.parallel.host_memory import keep_freed_memory
from jaxblock.parallel.mesh import make_mesh
from jaxblock.training.optim.config import OptimizerConfig
from jaxblock.training.optim.make import make_optimizer
from jaxblock.training.state import create_state
from jaxblock.training.step import Learner, Objective, jit_step

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


def torch_loss(model: LlamaForCausalLM, noisy: torch.Tensor, clean: torch.Tensor, flags: torch.Tensor) -> torch.Tensor:
    """Computes the published script's loss: cross-entropy at every position, masked mean per row, mean over rows."""
    logits = model(noisy, attention_mask=visible(*noisy.shape)).logits
    each = torch.nn.functional.cross_entropy(logits.flatten(0, 1), clean.flatten(), reduction="none").view(clean.shape)
    return ((each * flags).sum(1) / flags.sum(1).clamp(min=1)).mean()


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
        "jaxblock": min(timed(lambda: ours(a).block_until_ready()) for _ in range(5)),
        "PyTorch": min(timed(lambda: torch.matmul(b, b)) for _ in range(5)),
    }
    return {name: 2 * size**3 / seconds for name, seconds in best.items()}


def timed(call: Callable[[], Any]) -> float:
    """Returns the wall time of a call in seconds."""
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def compare(batch: int, args: argparse.Namespace) -> dict[str, float]:
    """Checks that both do the same job, then times them in turns."""
    canvas = CanvasConfig(args.canvas // 2, args.canvas // 2, args.block, "paper")
    settings = ModelConfig(d_model=args.d, n_layers=args.layers, n_heads=8, mlp_dim=args.d * 8 // 3 // 8 * 8)
    arch = registry.architecture_from_config(settings, vocab_size=args.vocab, mask_id=args.vocab - 1, eos_id=1)
    net = build.network(arch, settings)
    layout = layouts.training_layout(canvas, PAPER, arch, (1,))
    objective = Objective(net, layout, PAPER, 0, batch)
    rows = random_batch(batch, canvas, args.vocab)
    start = init_params(net.param_table, 0, "float32")

    laid = objective.canvas(rows)
    draws, _ = objective.draw(rows, laid, 0)
    draw = jax.tree.map(lambda leaf: leaf[0], draws)
    seen, _ = corrupt(layout, laid, draw)
    at = np.asarray(seen.active)
    flags = np.zeros(seen.ids.shape, np.float32)
    np.put_along_axis(flags, at, np.asarray(draw.masked, np.float32), 1)
    noisy, clean = (torch.from_numpy(np.array(x)).long() for x in (seen.ids, laid.ids))
    model = llama(net, start)
    check_bidirectional(model, args.canvas)

    found = objective(start, rows, jnp.int32(0)).loss
    ours_loss, theirs_loss = (
        float(found.total / found.weight),
        float(torch_loss(model, noisy, clean, torch.tensor(flags)).detach()),
    )
    assert abs(ours_loss - theirs_loss) <= 2e-5 * abs(theirs_loss), (ours_loss, theirs_loss)

    optimizer = make_optimizer(OptimizerConfig(lr=1e-5, schedule="constant", warmup_steps=0), 1000, net.param_table)
    mesh = make_mesh(1, devices=jax.devices()[:1])
    adam = torch.optim.AdamW(model.parameters(), lr=1e-5, betas=(0.9, 0.95), weight_decay=0.0)
    with jax.set_mesh(mesh):
        state = create_state(start, optimizer, mesh, net.param_table)
        step_fn = jit_step(Learner(net, objective, optimizer), state, mesh)

        def ours() -> None:
            nonlocal state
            state, metrics = step_fn(state, rows, {})
            jax.block_until_ready(metrics)

        def theirs() -> None:
            adam.zero_grad()
            torch_loss(model, noisy, clean, torch.tensor(flags)).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            adam.step()

        ours(), theirs()
        pairs = [(timed(ours), timed(theirs)) for _ in range(args.repeat)]
    mine, other = (statistics.median(column) for column in zip(*pairs, strict=True))
    return {
        "loss": ours_loss,
        "ours": mine,
        "torch": other,
        "speedup": statistics.median(b / a for a, b in pairs),
        "torch_flops": flops(net, batch, args.canvas, args.canvas),
        "ours_flops": flops(net, batch, args.canvas, args.block),
    }


def main(argv: Sequence[str] | None = None) -> list[dict[str, float]]:
    """Prints the steps per second, FLOP/s and matmul peak of both."""
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
    peak = matmul_peaks(args.peak)
    print(f"d {args.d}, {args.layers} layers, canvas {args.canvas}, block {args.block}, vocabulary {args.vocab:,}")
    print(f"matmul peak GFLOP/s: PyTorch {peak['PyTorch'] / 1e9:.0f}, jaxblock {peak['jaxblock'] / 1e9:.0f}")
    results = []
    for batch in args.batch:
        row = compare(batch, args)
        for name, key in (("PyTorch", "torch"), ("jaxblock", "ours")):
            rate = row[f"{key}_flops"] / row[key]
            print(
                f"batch {batch:3} {name:9} {1 / row[key]:8.3f} steps/s {rate / 1e9:8.1f} GFLOP/s "
                f"({rate / peak[name]:.0%} of its peak)"
            )
        print(f"batch {batch:3} PyTorch's time over jaxblock's: {row['speedup']:.2f}; same loss {row['loss']:.5f}")
        results.append(row)
    return results


if __name__ == "__main__":
    keep_freed_memory()  # as the command line does
    main()
